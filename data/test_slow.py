"""Slow tests: kills, full disks, damaged files, and a device that is not the CPU.

Runs are of a random model on four problems. What they say counts as right if its length is odd,
so that groups are mixed and every step moves the weights.
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import fast_generate
import standin_device
from test_ampo import adamw, ampo, expect, random_model, student_of
from test_running import LINES, metrics_of, run_flags, save_random, small_tokenizer, write_lines

import pytest
import torch
from safetensors.torch import load_file


def odd(text, gold, question=""):
    """In the place of verify."""
    return len(text) % 2 == 1


@pytest.fixture(autouse=True, scope="module")
def odd_is_right():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ampo, "verify", odd)
        yield


def weights_of(checkpoint):
    """{name: tensor} of a checkpoint's file."""
    return load_file(checkpoint / "model.safetensors")


def same_weights(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def same_run(out, other):
    """Do two runs have the same metrics, and bit for bit the same weights?"""
    equal = same_weights(weights_of(out / "model"), weights_of(other / "model"))
    return equal and metrics_of(out) == metrics_of(other)


def begin(out, flags, steps):
    return ampo.main([*flags, "--steps", str(steps), "--out", str(out)])


def resume(out, steps, sampler=ampo.generate):
    return ampo.main(["--resume", "--steps", str(steps), "--out", str(out)], sampler)


SHORT = "--method grpo --max_new_tokens 8 --prompts_per_step 3 --save_every 1".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, odd_is_right):
    """A folder with a model in base, and its runs three and two, of as many steps."""
    folder = tmp_path_factory.mktemp("runs")
    flags = run_flags(save_random(folder / "base"), folder, *SHORT)
    for name, steps in (("three", 3), ("two", 2)):
        assert begin(folder / name, flags, steps) == 0
    return folder


@pytest.fixture
def two(runs, tmp_path):
    """A copy of the run of two steps."""
    return Path(shutil.copytree(runs / "two", tmp_path / "run"))


def complaint(capsys):
    """The line on stderr with which ampo.py gives up; progress bars stand beside it."""
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    lines = [line for line in said.replace("\r", "\n").split("\n") if line.startswith("ampo.py:")]
    assert len(lines) == 1, said
    return lines[0]


# -------------------------------------------------------------------------------------------------
# kill -9. A process that has done nothing but importing forks all others, as locks of libraries
# do not survive forking.


def fork(function, *args):
    """Call a function in a process of its own; returns the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function(*args))
        except BaseException as error:  # what a forked process raises must not run on
            print(repr(error), file=sys.stderr)
        os._exit(99)
    return pid


def status_of(pid):
    """0, an exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_moments(folder, flags, steps, kills):
    """Kill one run again and again, and resume it each time. Returns the exit statuses."""
    start = time.perf_counter()
    status_of(fork(begin, folder / "whole", flags, steps))
    duration = time.perf_counter() - start
    rng = random.Random(0)
    out = folder / "run"
    statuses = []
    for _ in range(kills):
        begun = (out / "run.json").exists()
        pid = fork(resume, out, steps) if begun else fork(begin, out, flags, steps)
        time.sleep(rng.uniform(0.2, 0.6) * duration)
        os.kill(pid, signal.SIGKILL)
        statuses.append(status_of(pid))
    return [*statuses, status_of(fork(resume, out, steps))]


def save_and_die(out, count):
    """Make the checkpoint of step 2 after that of step 1, and kill this process before the file
    operation of that number.
    """
    cfg, checkpoint = ampo.open_run(["--resume", "--out", str(out)])
    student = ampo.load_student(str(checkpoint), cfg)
    student.model.lm_head.weight.data[0, 0] = 2.0
    operations = []

    def audit(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & 3 != os.O_RDONLY
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            operations.append(event)
            if len(operations) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    optimizer = adamw(student)
    sys.addaudithook(audit)
    ampo.save_checkpoint(student, optimizer, 2, out)
    return 0


def kill_at_operations(folder, first):
    """Kill the second checkpoint at each of its file operations, until one comes through.

    Copies of the run's folder `first` are left as kills left them. Returns the exit statuses.
    """
    statuses = [-signal.SIGKILL]
    while statuses[-1] == -signal.SIGKILL:
        out = shutil.copytree(first, folder / str(len(statuses)))
        statuses.append(status_of(fork(save_and_die, out, len(statuses))))
    return statuses[1:]


def kills(folder, flags, first):
    """What a fresh process does. It leaves results.json."""
    ampo.verify = odd
    moments = kill_at_moments(folder, flags, 6, 4)
    operations = kill_at_operations(folder, first)
    (folder / "results.json").write_text(json.dumps([moments, operations]))


def restored(out):
    """The student that --resume would go on with, and its step."""
    cfg, checkpoint = ampo.open_run(["--resume", "--out", str(out)])
    student = ampo.load_student(str(checkpoint), cfg)
    return student, ampo.restore(student, adamw(student), checkpoint)


@pytest.fixture(scope="module")
def killed(runs, tmp_path_factory):
    """A folder full of killed runs, and the exit statuses of the two kinds."""
    folder = tmp_path_factory.mktemp("kills")
    first = folder / "first"
    first.mkdir()
    model = str(runs / "base")
    (first / "run.json").write_text(json.dumps(asdict(ampo.Config(model=model))))
    student = ampo.load_student(model, ampo.Config())
    student.model.lm_head.weight.data[0, 0] = 1.0
    ampo.save_checkpoint(student, adamw(student), 1, first)
    flags = run_flags(model, folder, *SHORT)
    program = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT / 'data')!r}); "
        f"import test_slow; test_slow.kills(Path({str(folder)!r}), {flags!r}, {str(first)!r})"
    )
    quiet = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, *json.loads((folder / "results.json").read_text())


class Test_kill:
    def test_a_run_killed_at_many_moments_is_the_run_that_was_not(self, killed):
        folder, statuses, _ = killed
        expect("exit statuses", statuses, [-9, -9, -9, -9, 0])
        out = folder / "run"
        assert same_run(out, folder / "whole")
        expect("steps", [row["step"] for row in metrics_of(out)], list(range(6)))
        left = sorted(path.name for path in out.iterdir())
        expect("what is left", left, ["metrics.jsonl", "model", "responses.jsonl", "run.json"])

    def test_one_checkpoint_is_whole_whichever_operation_is_the_last(self, killed):
        folder, _, statuses = killed
        assert len(statuses) > 15, f"only {len(statuses)} file operations were seen"
        expect("statuses", statuses, [-9] * (len(statuses) - 1) + [0])
        steps = []
        for i in range(1, len(statuses) + 1):
            out = folder / str(i)
            student, step = restored(out)
            weight = student.model.lm_head.weight[0, 0].item()
            expect(f"a weight of step {step}, killed at operation {i}", weight, float(step))
            steps.append(step)
            if i % 4 == 0:
                ampo.save_checkpoint(student, adamw(student), 3, out)
                expect(f"the next checkpoint after kill {i}", restored(out)[1], 3)
                left = sorted(path.name for path in out.iterdir())
                expect(f"what is left after kill {i}", left, ["model", "run.json"])
        expect("the old one until the new one is whole", steps, sorted(steps))
        expect("both occur", set(steps), {1, 2})


# -------------------------------------------------------------------------------------------------
# Disks, files, memory, Ctrl-C


class Test_full_disk:
    @pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "metrics.jsonl"])
    def test_ends_with_a_line_and_the_last_checkpoint_stays(self, runs, two, capsys, name):
        """Files may not grow beyond a size that stops one of them."""
        room = {"model.safetensors": 20_000, "metrics.jsonl": 10}
        sizes = {path.name: path.stat().st_size for path in (two / "model").iterdir()}
        room["state.pt"] = (sizes["model.safetensors"] + sizes["state.pt"]) // 2
        room["metrics.jsonl"] += (two / "metrics.jsonl").stat().st_size
        before = weights_of(two / "model")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room[name], limits[1]))
        try:
            status = resume(two, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        expect("exit status", status, 2)
        said = complaint(capsys)
        assert str(two) in said or "too large" in said, said
        assert same_weights(weights_of(two / "model"), before), "the last checkpoint is another"
        expect("exit status with room", resume(two, 3), 0)
        assert same_run(two, runs / "three")

    @pytest.mark.parametrize("out", ["problems.jsonl/run", "/proc/none/run"])
    def test_a_folder_that_cannot_be(self, runs, capsys, out):
        flags = run_flags(runs / "base", runs, "--method", "grpo")
        expect("exit status", begin(runs / out, flags, 1), 2)
        assert out.split("/run")[0] in complaint(capsys)


class Test_damaged_checkpoint:
    @pytest.mark.parametrize("name", [
        "model/model.safetensors", "model/state.pt", "model/config.json", "model/tokenizer.json",
        "model/chat_template.jinja", "run.json",
    ])
    def test_is_named_in_one_line_and_nothing_is_lost(self, runs, two, capsys, name):
        """Each file cut in half. What is whole again goes on."""
        whole = (two / name).read_bytes()
        (two / name).write_bytes(whole[:len(whole) // 2])
        metrics = (two / "metrics.jsonl").read_bytes()
        expect("exit status", resume(two, 3), 2)
        assert str(two) in complaint(capsys), "the line names the run"
        expect("the log", (two / "metrics.jsonl").read_bytes(), metrics)
        (two / name).write_bytes(whole)
        expect("exit status", resume(two, 3), 0)
        assert same_run(two, runs / "three")


def failing(action):
    """A sampler that acts once training has begun: it is tried on a model with n = 1 first."""
    def generate(model, prompts, n, *settings):
        if n > 1:
            action()
        return ampo.generate(model, prompts, n, *settings)
    return generate


class Test_interrupted:
    def test_memory_that_does_not_suffice(self, runs, two, capsys):
        def full():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

        expect("exit status", resume(two, 3, failing(full)), 2)
        said = complaint(capsys)
        for word in ("CUDA out of memory", "--cache_tokens", "--micro_tokens"):
            assert word in said, said
        expect("exit status with memory", resume(two, 3), 0)
        assert same_run(two, runs / "three")

    def test_ctrl_c(self, runs, two, capsys):
        """A real signal, in the middle of a step."""
        def interrupt():
            signal.raise_signal(signal.SIGINT)

        expect("exit status", resume(two, 3, failing(interrupt)), 130)
        assert "--resume" in complaint(capsys)
        expect("exit status", resume(two, 3), 0)
        assert same_run(two, runs / "three")


# -------------------------------------------------------------------------------------------------
# Whole runs


class Test_run:
    @pytest.mark.parametrize("method", ampo.METHODS)
    def test_every_method_logs_the_same_fields(self, runs, tmp_path, method):
        flags = run_flags(runs / "base", tmp_path, "--method", method)
        expect("exit status", ampo.main(flags), 0)
        row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
        fields = "step reward fail_rate rescued entropy response_length grad_norm clip_fraction"
        for name in [*fields.split(), "rollout_s", "guide_s", "update_s"]:
            assert name in row, f"{method}: {name} is missing"
        if method != "sft":
            assert row["logp_gap"] < 1e-4, "sampled and scored differently"

    def test_validation_and_closing_table_agree_with_eval(self, runs, tmp_path, capsys):
        for name in ("valid", "test"):
            write_lines(tmp_path / f"{name}.jsonl", LINES[:2])
        flags = run_flags(runs / "base", tmp_path, "--samples", "4", "--eval_every", "1")
        expect("exit status", ampo.main(flags), 0)
        row = re.search(r"^test .*", capsys.readouterr().out, re.MULTILINE)[0]
        assert 0 < metrics_of(tmp_path / "run")[0]["valid"] < 1
        command = f"eval --model {tmp_path}/run/model --data {tmp_path}/test.jsonl --samples 4"
        expect("exit status", ampo.main([*command.split(), "--max_new_tokens", "32"]), 0)
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        expect("keys", list(last), ["pass@1", "pass@2", "pass@4", "n", "length"])
        trained = [float(number) for number in re.findall(r"-> +([\d.]+)", row)]
        expect("trained", trained, [100 * last["pass@1"], 100 * last["pass@4"]], 0.01)

    def test_gradient_checkpointing_changes_no_figure(self, runs, tmp_path):
        flags = run_flags(runs / "base", tmp_path, *SHORT)
        expect("exit status", begin(tmp_path / "run", [*flags, "--gradient_checkpointing"], 2), 0)
        rows = zip(metrics_of(tmp_path / "run"), metrics_of(runs / "two"))
        for i, (row, other) in enumerate(rows):
            assert row["logp_gap"] < 1e-4, f"step {i}: sampled and scored differently"
            for name in ("reward", "entropy", "grad_norm"):
                expect(f"step {i}: {name}", row[name], other[name], 1e-3)

    def test_a_console_without_the_characters(self, runs, tmp_path, monkeypatch):
        flags = run_flags(runs / "base", tmp_path, "--eval_every", "1", "--samples", "1")
        write_lines(tmp_path / "test.jsonl", [LINES[0] | {"question": "Löse 3·x=5 ∀x."}])
        with open(tmp_path / "console", "w", encoding="ascii") as console:
            monkeypatch.setattr(sys, "stdout", console)
            expect("exit status", ampo.main(flags), 0)
        assert "L?se 3?x=5" in (tmp_path / "console").read_text()

    @pytest.mark.parametrize("given, wanted", [(None, "1000"), ("7", "7")])
    def test_threads_that_wait_do_not_spin(self, tmp_path, monkeypatch, given, wanted):
        """Set before torch is imported, which here only shows it, unless the user did."""
        program = "import os\nprint(os.environ['GOMP_SPINCOUNT'], flush=True)\nos._exit(0)\n"
        (tmp_path / "torch.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        shown = subprocess.run([sys.executable, ampo.__file__], capture_output=True, text=True)
        expect(f"GOMP_SPINCOUNT where it was {given}", shown.stdout.strip(), wanted)


# -------------------------------------------------------------------------------------------------
# A device that is not the CPU


CASES = [(method, "group", ampo.generate) for method in ampo.METHODS]
CASES += [("guide", "gae", ampo.generate), ("grpo", "group", fast_generate.generate)]


OLD_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


@pytest.mark.skipif(OLD_TORCH, reason="the stand-in device takes torch 2.13 or later")
class Test_device:
    def step(self, device, method, advantage, sampler):
        """Metrics of one step, without clocks, and a weight afterwards."""
        tokenizer = small_tokenizer()
        student = student_of(
            random_model(len(tokenizer), scale=3.0), tokenizer, method=method, group_size=3,
            max_new_tokens=12, trigger="always", advantage=advantage,
        )
        student.generate = sampler
        student.model.to(device)
        student.value_head.to(device)
        torch.manual_seed(0)
        problems = [ampo.Problem(**line) for line in LINES[:2]]
        metrics = ampo.train_step(student, adamw(student), problems)
        greedy = sampler(student.model, [[5, 6]], 2, 2, 0, [1])
        weight = student.model.model.layers[0].mlp.up_proj.weight.detach().abs().sum().item()
        rows = [(key, value) for key, value in metrics.items() if not key.endswith("_s")]
        return [*rows, ("greedy", greedy), ("weight", weight)]

    @pytest.mark.parametrize("method, advantage, sampler", CASES)
    def test_a_step_leaves_no_tensor_on_the_cpu(self, method, advantage, sampler):
        """And comes out as on the CPU."""
        with standin_device.StandIn():
            got = self.step("standin", method, advantage, sampler)
        wanted = self.step("cpu", method, advantage, sampler)
        for (name, value), (_, other) in zip(got, wanted):
            if name != "logp_gap":
                expect(f"{method}: {name}", value, other, 1e-3)
        assert dict(wanted)["grad_norm"] > 0, "a step that does nothing"

    def test_the_stand_in_refuses_tensors_of_the_cpu(self):
        with standin_device.StandIn():
            there = torch.ones(2, device="standin")
            expect("its device", there.device.type, "standin")
            expect("moved there", (there + torch.ones(2).to("standin")).tolist(), [2.0, 2.0])
            expect("a single number", (there * torch.tensor(3.0)).tolist(), [3.0, 3.0])
            with pytest.raises(RuntimeError, match="stand-in"):
                there + torch.ones(2)
