"""Tests of what runs ampo.py: flags, files, models of all kinds, checkpoints, resuming."""
import json
import math
import os
import re
import statistics
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from test_ampo import BASE, HERE, PROBLEM, RIGHT, WRONG, adamw, ampo, engine, expect, expect_exact
from test_ampo import family_model, full_logps, ids_of, message_of, problem_of, prompt_of
from test_ampo import random_model, same, scripted
from test_ampo import make_student, tokenizer  # fixtures

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


# -------------------------------------------------------------------------------------------------
# Checkpoints of other families, as they lie on a disk, and runs of a step or two


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    {
        "question": f"Solve {a}*x={b}.", "answer": f"{b}/{a}", "hint": f"Solve {a}*x={b}. Divide.",
        "solution": f"{b}/{a} is it",
        "teachers": {"divide": f"{a}*x={b}\n\\boxed{{{b}/{a}}}", "short": f"\\boxed{{{b}/{a}}}"},
    }
    for a, b in ((3, 5), (3, 8), (7, 5), (7, 8))
]


def small_tokenizer(pad=None, template=TEMPLATE):
    """A byte-level BPE of some 300 tokens with a chat template that knows system messages."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
    )
    bpe.train_from_iterator([json.dumps(LINES), "system user assistant\n"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token=pad, chat_template=template
    )


def save_random(path, kind="qwen2", tokenizer=None, scale=8.0, **settings):
    """A random checkpoint of a family in a folder, its predictions peaked."""
    tokenizer = tokenizer or small_tokenizer()
    defaults = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **defaults | settings)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a random checkpoint; the tests only read it."""
    return save_random(tmp_path_factory.mktemp("any"))


def write_lines(path, rows=LINES):
    """A JSONL file; returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_flags(model, tmp_path, *more):
    """Flags of a run of one step on LINES."""
    data = write_lines(tmp_path / "problems.jsonl")
    return [
        "--model", str(model), "--data", data, "--out", str(tmp_path / "run"), "--steps", "1",
        "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "32",
        "--eval_every", "0", "--lr", "1e-3", *more,
    ]


def metrics_of(out):
    """metrics.jsonl without the clocks, with each step's line of responses.jsonl."""
    rows = []
    logs = [(Path(out) / name).read_text() for name in ("metrics.jsonl", "responses.jsonl")]
    for line, example in zip(*map(str.splitlines, logs), strict=True):
        row = json.loads(line)
        assert json.loads(example)["step"] == row["step"]
        kept = {key: value for key, value in row.items() if not key.endswith("_s")}
        rows.append(kept | {"example": example})
    return rows


def names(said, *words):
    """Fail unless a message names all the words."""
    missing = [word for word in words if word not in said]
    if missing:
        pytest.fail(f"a message should name {missing}; it is {said!r}", pytrace=False)


def says(call, *args, **more):
    """What the InputError of a call says; empty where there is none."""
    return message_of(lambda: call(*args, **more))


def weights_of(out):
    model = AutoModelForCausalLM.from_pretrained(Path(out) / "model")
    return [weight.tolist() for weight in model.parameters()]


def asked(problems):
    return [problem.question for problem in problems]


class Test_check_config:
    @pytest.mark.parametrize("name, value, least", [
        ("steps", 0, "1"), ("k", 0, "1"), ("group_size", 1, ""), ("samples", -1, "1"),
        ("lr", math.nan, "0"), ("temperature", -0.1, "0"), ("clip_eps", -1.0, "0"),
        ("eval_every", -1, "0"), ("recipe", "ppo", ""),
    ])
    def test_names_what_cannot_be(self, name, value, least):
        cfg = ampo.Config(**{name: value})
        names(says(ampo.check_config, cfg), f"--{name} {value}", least)

    def test_together(self):
        ampo.check_config(ampo.Config(lr=0.0, eval_every=0, clip_eps=math.inf, seed=0))
        ampo.check_config(ampo.Config(method="guide", advantage="gae", group_size=2))
        cfg = ampo.Config(method="sft", advantage="gae")
        names(says(ampo.check_config, cfg), "--advantage gae", "sft")


class Test_parse_flags:
    def test_flags_become_settings(self):
        line = "--steps 7 --lr 0.5 --clip_eps inf --method sft --resume --system s"
        wanted = dict(steps=7, lr=0.5, clip_eps=math.inf, method="sft", resume=True, system="s")
        expect(line, ampo.parse_flags(line.split()), ampo.Config(**wanted))
        expect("no flags", ampo.parse_flags([]), ampo.Config())

    @pytest.mark.parametrize("line, named", [
        ("--nonsense 1", "--nonsense"), ("--step 5", "--step"), ("--steps x", "--steps"),
        ("later", "later"), ("--method ppo", "ppo"), ("--follow me", "me"), ("--k 0", "--k 0"),
    ])
    def test_what_is_no_flag(self, line, named):
        names(says(ampo.parse_flags, line.split()), named)


class Test_load_problems:
    def test_a_byte_order_mark_blank_lines_and_a_separator_inside_a_text(self, tmp_path):
        one = '{"question": "a\u2028b", "answer": 1}'
        path = tmp_path / "p.jsonl"
        path.write_text(f"\ufeff{one}\n\n{one}\n", encoding="utf-8")
        problems = ampo.load_problems(path)
        got = [(problem.question, problem.where) for problem in problems]
        expect("questions", got, [("a\u2028b", f"{path}:1"), ("a\u2028b", f"{path}:3")])

    @pytest.mark.parametrize("name, content", [("empty", b"\n"), ("bytes", b"\xff\xfe\x00")])
    def test_files_that_hold_nothing(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        names(says(ampo.load_problems, tmp_path / name), name)


class Test_parse_problem:
    def parse(self, **row):
        return ampo.parse_problem(json.dumps({"question": "q", "answer": "1"} | row), "f:7")

    def test_reads_every_field_and_ignores_others(self):
        row = PROBLEM | {"system": "s"}
        expect("a full row", self.parse(**row, other=[1]), ampo.Problem(**row, where="f:7"))
        nulls = dict.fromkeys(("teachers", "hint", "solution", "system"))
        expect("null is nothing", self.parse(**nulls), ampo.Problem("q", "1", where="f:7"))

    @pytest.mark.parametrize("number", [0, 5, -1.5])
    def test_numbers_become_text(self, number):
        expect(f"the gold answer {number}", self.parse(answer=number).answer, str(number))

    @pytest.mark.parametrize("field, value", [
        ("question", " "), ("question", {"a": "b"}), ("answer", " "), ("answer", ["1"]),
        ("answer", [1, 2]), ("answer", True), ("hint", ["h"]), ("teachers", ["t"]), ("teachers", "t"), ("system", 5),
        ("solution", {"a": "b"}), ("answer", "1/0"), ("answer", "?"), ("answer", "{"),
    ])
    def test_names_the_field(self, field, value):
        """The last ones are gold answers that no response can equal."""
        names(says(self.parse, **{field: value}), "f:7", f"'{field}'")

    @pytest.mark.parametrize("line", [
        "[1]", "5", '{"question": ', '{"question": "\\ud800", "answer": "1"}', "[" * 100000,
    ])
    def test_lines_that_are_no_object(self, line):
        """Half a character, which no tokenizer takes, is none either."""
        names(says(ampo.parse_problem, line, "f:7"), "f:7", "not a JSON object")


class Test_load_checked:
    def load(self, student, tmp_path, needs="", **fields):
        row = {"question": "q", "answer": "1"}
        data = write_lines(tmp_path / "p.jsonl", [row, row | fields])
        return ampo.load_checked(student, data, needs)

    @pytest.mark.parametrize("needs", ["", "hint", "solution"])
    def test_every_message_leaves_room_in_the_context(
        self, make_student, tokenizer, tmp_path, needs
    ):
        """256 tokens here. Of a solution three quarters are shown."""
        text = "2*x=" * 20
        shown = "q" + ampo.GHPO_LEAD + text[:60] if needs == "solution" else text
        room = 256 - len(prompt_of(tokenizer, shown))
        fields = {needs or "question": text}
        fits = make_student(max_new_tokens=room)
        expect("256 tokens", says(self.load, fits, tmp_path, needs, **fields), "")
        long = make_student(max_new_tokens=room + 1)
        said = says(self.load, long, tmp_path, needs, **fields)
        names(said, "p.jsonl:2", "257", "256", "--max_new_tokens")

    @pytest.mark.parametrize("fields", [
        {"question": "a{}"}, {"hint": "a{}"}, {"system": "a{}"}, {"teachers": {"one": "1{}2"}},
    ])
    @pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>"])
    def test_text_that_would_be_a_control_token(self, folder, tmp_path, fields, token):
        """Also one that is neither end nor padding."""
        student = ampo.load_student(folder, ampo.Config(max_new_tokens=8))
        fields = json.loads(json.dumps(fields).replace("{}", token))
        names(says(self.load, student, tmp_path, "hint", **fields), "p.jsonl:2", token)


class Test_context_length:
    @pytest.mark.parametrize("kind, wanted, rope", [
        ("default", 64, {}), ("dynamic", 64, {"factor": 4.0}),
        ("longrope", 32, {
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
            "original_max_position_embeddings": 32,
        }),
    ])
    def test_is_as_far_as_sampling_is_exact(self, kind, wanted, rope):
        rope = rope | {"rope_type": kind, "rope_theta": 10000.0}
        model = family_model("qwen2", rope_parameters=rope, max_position_embeddings=64)
        expect(f"rope type {kind}", ampo.context_length(model.config), wanted)
        expect_exact(model, [[5] * 9], ampo.generate(model, [[5] * 9], 2, wanted - 9))
        if kind != "default":
            ids, logps = ampo.generate(model, [[5] * 9], 1, wanted + 9)[0][0]
            assert not same(logps, full_logps(model, [5] * 9, ids), 0.01), "a test without bite"


class Test_load_inputs:
    def load(self, make_student, tmp_path, *rows, **settings):
        """Files of one question each, of their name, beside data of the given rows."""
        for name in ("ood_b.jsonl", "test.jsonl", "valid.jsonl", "ood_a.jsonl", "other.jsonl"):
            write_lines(tmp_path / name, [{"question": name, "answer": "1"}])
        (tmp_path / "ood_a.md").write_text("about it")
        data = write_lines(tmp_path / "mine.jsonl", [{"question": "q", "answer": "1"}, *rows])
        return ampo.load_inputs(make_student(**{"data": data} | settings))

    def test_what_lies_beside_the_data(self, make_student, tmp_path):
        problems, valid, sets = self.load(make_student, tmp_path, method="grpo")
        expect("problems", (asked(problems), asked(valid)), (["q"], ["valid.jsonl"]))
        wanted = ["test", "ood_a", "ood_b"]
        expect("sets", list(sets), wanted)
        expect("what they hold", [asked(sets[name]) for name in wanted],
               [[f"{name}.jsonl"] for name in wanted])
        _, *other = self.load(make_student, tmp_path, method="grpo", eval_every=0)
        expect("--eval_every 0", other, [[], {}])

    @pytest.mark.parametrize("method, field, value, useless", [
        ("ampo", "teachers", {"a": "\\boxed{1}"}, {"a": "2*x=3, " * 40}),
        ("ghpo", "solution", "s", ""), ("guide", "hint", "h", ""),
        ("sft", "teachers", {"a": "\\boxed{1}"}, {}),
    ])
    def test_counts_what_a_method_can_use(
        self, make_student, tmp_path, capsys, method, field, value, useless
    ):
        """None at all is an error, as where all traces are longer than a response may be."""
        row = {"question": "q2", "answer": "1", field: useless}
        said = says(self.load, make_student, tmp_path, row, method=method)
        names(said, "mine.jsonl", field, "--max_new_tokens 40")
        capsys.readouterr()
        self.load(make_student, tmp_path, row, row | {field: value}, method=method)
        names(capsys.readouterr().out, "3 problems", "1 with")


class Test_load_model:
    def test_a_base_model_gets_a_plain_template(self, tmp_path, capsys):
        """It is said, and saved. The model is float32, whatever was saved."""
        path = save_random(tmp_path / "base", tokenizer=small_tokenizer(template=None))
        AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
        model, tokenizer = ampo.load_model(path)
        expect("type of the weights", model.dtype, torch.float32)
        names(capsys.readouterr().out, path, "no chat template")
        ampo.main(run_flags(path, tmp_path))
        saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        expect("the saved template", saved.chat_template, tokenizer.chat_template)
        text = saved.decode(ampo.encode_prompt(saved, "What is 1+1?", "Be brief."))
        names(text, "Be brief.", "What is 1+1?", "Assistant:")

    @pytest.mark.parametrize("kind, settings", [
        ("qwen2", {"attention_dropout": 0.5}), ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    ])
    def test_gradient_checkpointing_changes_no_figure(self, tmp_path, kind, settings):
        """Not by dropout, which GPT-2 has by default, and not by sampling without a cache."""
        path = save_random(tmp_path, kind, scale=4.0, **settings)
        student = ampo.load_student(path, ampo.Config(gradient_checkpointing=True))
        exact = AutoModelForCausalLM.from_pretrained(path).eval()
        groups = ampo.generate(student.rollout_model, [[5, 6], [7]], 2, 9)
        expect_exact(exact, [[5, 6], [7]], groups)
        calls = []
        student.model.train()
        layer = next(part for name, part in student.model.named_modules() if name.endswith(".mlp"))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        logps, _ = ampo.token_logps(student.model, [[5, 6]], [[7, 8, 9]])
        logps.sum().backward()
        expect("runs of a layer", len(calls), 2)
        expect(f"{kind}: scored", logps, [full_logps(exact, [5, 6], [7, 8, 9])], 1e-4)


MOE = dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
)


class Test_check_model:
    @engine
    @pytest.mark.parametrize("kind, settings, fine", [
        ("mamba", {"state_size": 4}, False), ("rwkv", {}, False), ("qwen3_next", MOE, False),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0}, False),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 16.0}, False), ("granite", {"logits_scaling": 1.0}, True),
        ("cohere", {"logit_scale": 0.05}, False),
        ("mistral", {"head_dim": 8, "sliding_window": 3}, True),
    ])
    def test_recurrent_models_and_heads_that_scale_or_cap(self, tmp_path, kind, settings, fine):
        path = save_random(tmp_path, kind, scale=16.0, **settings)
        said = says(ampo.load_student, path, ampo.Config())
        expect(f"{kind} {settings}: refused with its folder's name", path in said, not fine)

    @pytest.mark.parametrize("template, named", [
        ("{% for m in messages %}hello{% endfor %}", "question"), ("{% for", "sampled"),
        ("{{ raise_exception('no system') }}", "no system"),
    ])
    def test_templates_that_cannot_prompt(self, tmp_path, template, named):
        path = save_random(tmp_path, tokenizer=small_tokenizer(template=template))
        names(says(ampo.load_student, path, ampo.Config()), path, named)


class Test_end_tokens:
    @pytest.mark.parametrize("written, generation, wanted", [
        ("<|im_end|>", None, ["<|im_end|>"]), ("", None, ["<|im_end|>"]),
        ("<|pad|>\n", None, ["<|pad|>", "<|im_end|>"]), ("\n", 2, ["<|im_end|>", "<|pad|>"]),
        ("<|im_start|>", None, ["<|im_start|>", "<|im_end|>"]),
        ("<|im_end|>", [2, 1], ["<|im_end|>", "<|pad|>"]),
    ])
    def test_what_the_template_writes_comes_first(self, written, generation, wanted):
        """If it is a control token, whether or not the tokenizer knows it as one of its ends."""
        tokenizer = small_tokenizer("<|pad|>", TEMPLATE.replace("<|im_end|>\n", written))
        model = random_model(len(tokenizer))
        model.generation_config.eos_token_id = generation
        ids = ampo.end_tokens(model, tokenizer)
        case = f"the template writes {written!r}, generation_config has {generation}"
        expect(case, tokenizer.convert_ids_to_tokens(ids), wanted)


class Test_load_student:
    def test_what_is_wired(self, folder):
        cfg = ampo.Config(method="guide", clip_eps=0.3)
        student = ampo.load_student(folder, cfg, ampo.generate)
        got = [student.cfg, student.method, student.recipe, student.generate, student.eos]
        wanted = [cfg, ampo.METHODS["guide"], ampo.choose_recipe(cfg), ampo.generate, [1]]
        expect("settings, method, recipe, sampler, end tokens", got, wanted)
        assert student.rollout_model is student.model, "on a CPU the model itself samples"
        expect("the value head at first", student.value_head(torch.ones(1, 32)), [[0.0]])

    @pytest.mark.parametrize("left_out", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_folders_without_a_part(self, tmp_path, left_out):
        path = save_random(tmp_path)
        (tmp_path / left_out).unlink()
        names(says(ampo.load_student, path, ampo.Config()), path)


class Test_evaluate:
    def test_means_over_problems(self, make_student, tokenizer):
        def text(prompt, i):
            return RIGHT if "one" in prompt and i < 3 else WRONG

        student = replace(make_student(), generate=scripted(tokenizer, text))
        problems = [problem_of(question="one?"), problem_of(question="two?")]
        scores, groups = ampo.evaluate(student, problems, 6)
        # half of 1 - C(3, k) / C(6, k)
        chances = {"pass@1": 0.25, "pass@2": 0.4, "pass@4": 0.5, "pass@6": 0.5}
        lengths = [len(ids_of(tokenizer, text)) + 1 for text in [RIGHT] * 3 + [WRONG] * 9]
        wanted = chances | {"n": 2, "length": statistics.mean(lengths)}
        expect("6 samples, 3 of one problem are right", list(scores.items()), list(wanted.items()))
        rights = [[sample.correct for sample in group] for group in groups]
        expect("groups", rights, [[True] * 3 + [False] * 3, [False] * 6])

    def test_seeds_itself_and_has_its_own_temperature(self, make_student):
        runs = []
        for seed in (5, 5, 6):
            student = make_student(max_new_tokens=4, seed=seed, temperature=0.9)
            torch.manual_seed(len(runs))
            _, (group,) = ampo.evaluate(student, [problem_of()], 4)
            runs.append([sample.ids for sample in group])
            logps = full_logps(student.model, group[0].prompt, group[0].ids, 0.6)
            expect("temperature 0.6 unless given", group[0].old_logps, logps, 2e-4)
        expect("seed 5 twice", runs[0], runs[1])
        assert runs[1] != runs[2], "seeds 5 and 6 sample the same"


class Test_report:
    def test_base_against_trained(self, make_student, tokenizer, monkeypatch, capsys):
        """The sets but test get a quarter of the samples. Problem b gained most."""
        def before(prompt, i):
            return RIGHT if "a?" in prompt else WRONG

        def after(prompt, i):
            return RIGHT if "b?" in prompt or i < 4 else WRONG

        base = replace(make_student(), generate=scripted(tokenizer, before))
        monkeypatch.setattr(ampo, "load_student", lambda *args: base)
        student = replace(make_student(samples=15), generate=scripted(tokenizer, after))
        sets = {"test": [problem_of(question="a?")], "ood_far": [problem_of(question="b?")]}
        ampo.report(student, sets)
        shown = capsys.readouterr().out
        numbers = re.findall(r"pass@(\d+) +([\d.]+) -> +([\d.]+)", shown)
        test = [("1", "100.0", "26.7"), ("8", "100.0", "97.4"), ("15", "100.0", "100.0")]
        expect("the table", numbers, [*test, ("1", "0.0", "100.0"), ("4", "0.0", "100.0")])
        names(shown, "ood_far", "Problem: b?", "answer 3/2", f"wrong:\n{WRONG}", f"right:\n{RIGHT}")


class Test_save_checkpoint:
    @pytest.mark.parametrize("left", ["model.new", "model.old"])
    def test_one_whole_checkpoint_whatever_a_kill_left(self, make_student, tmp_path, left):
        student = make_student()
        optimizer = adamw(student)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.ones_like(weight)
        for step in (1, 2):
            (tmp_path / left).mkdir()
            (tmp_path / left / "junk").touch()
            optimizer.step()
            ampo.save_checkpoint(student, optimizer, step, tmp_path)
            expect("folders", [path.name for path in tmp_path.iterdir()], ["model"])
        checkpoint = tmp_path / "model"
        assert (checkpoint / "README.md").exists() and not (checkpoint / "junk").exists()
        vocabulary = AutoTokenizer.from_pretrained(checkpoint).get_vocab()
        expect("the tokenizer", vocabulary, student.tokenizer.get_vocab())
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert torch.equal(loaded.lm_head.weight, student.model.lm_head.weight), "other weights"


class Test_restore:
    def test_puts_back_all_but_a_new_learning_rate(self, make_student, tmp_path):
        student = make_student()
        optimizer = adamw(student)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        ampo.save_checkpoint(student, optimizer, 7, tmp_path)
        other = make_student(lr=0.5)
        fresh = adamw(other)
        expect("the step", ampo.restore(other, fresh, tmp_path / "model"), 7)
        expect("the value head", other.value_head.weight, student.value_head.weight)
        moments = []
        for each in (fresh, optimizer):
            moments.append([state["exp_avg"].sum().item() for state in each.state.values()])
        expect("moments", *moments)
        expect("--lr", fresh.param_groups[0]["lr"], 0.5)
        (tmp_path / "model" / "state.pt").write_bytes(b"half")
        names(says(ampo.restore, other, fresh, tmp_path / "model"), str(tmp_path / "model"))


class Test_open_run:
    @pytest.fixture
    def begun(self, tmp_path, monkeypatch):
        """A run begun with seed 4 and --lr 0.5, in the folder run of the current one."""
        monkeypatch.chdir(tmp_path)
        Path("run/model.old").mkdir(parents=True)
        began = {"seed": 4, "lr": 0.5, "method": "guide", "model": "m"}
        write_lines(Path("run/run.json"), [asdict(ampo.Config(**began))])
        return ampo.Config(**began, out="run", resume=True)

    def test_a_new_run(self, begun):
        for line, out in (("", "runs/ampo-0"), ("--method sft --seed 4", "runs/sft-4")):
            cfg, checkpoint = ampo.open_run(line.split())
            expect(f"{line}: folder and checkpoint", (cfg.out, checkpoint), (out, None))
        Path("notes").touch()
        for out in ("run", "notes"):
            names(says(ampo.open_run, ["--out", out]), f"--out {out}", "--resume")
        expect("written so far", sorted(os.listdir()), ["notes", "run"])

    def test_resume_takes_its_own_flags_changed_by_those_given(self, begun):
        """A default that is given counts as given."""
        got = ampo.open_run("--resume --out run --seed 0".split())
        expect("--seed 0", got, (replace(begun, seed=0), Path("run/model.old")))
        Path("run/model").mkdir()
        got = ampo.open_run("--resume --out run".split())
        expect("both checkpoints", got, (begun, Path("run/model")))

    def test_what_cannot_be_resumed(self, begun):
        names(says(ampo.open_run, "--resume --out run --model other".split()), "--model")
        Path("old/model").mkdir(parents=True)
        write_lines(Path("old/model/run.json"), [{"updates": 2}])
        for out in ("old", "none"):
            names(says(ampo.open_run, ["--resume", "--out", out]), out, "older version")

    @pytest.mark.parametrize("content", [
        "", '{"seed": ', "[1]", "{}", '{"updates": 2, "model": "m"}',
    ])
    def test_flags_that_are_damaged_or_of_another_version(self, begun, content):
        Path("run/run.json").write_text(content)
        names(says(ampo.open_run, ["--resume", "--out", "run"]), "run.json")


@pytest.fixture(scope="class")
def by_length():
    """A response is right if its length is odd, so that groups of a random model are mixed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ampo, "verify", lambda text, gold, question="": len(text) % 2 == 1)
        yield


@pytest.fixture(scope="class")
def whole(by_length, folder, tmp_path_factory):
    """Flags but for steps and folder, metrics and weights of a run of four steps."""
    path = tmp_path_factory.mktemp("whole")
    more = "--method guide --advantage gae --trigger always --seed 2 --max_new_tokens 12"
    flags = [*run_flags(folder, path, *more.split()), "--prompts_per_step", "3", "--steps"]
    ampo.main([*flags, "4"])
    rows = metrics_of(path / "run")
    assert all(row["grad_norm"] > 0 for row in rows), "nothing was trained"
    return flags, rows, weights_of(path / "run")


@engine
@pytest.mark.usefixtures("by_length")
class Test_train:
    def run(self, out, *flags):
        expect(f"exit status of {flags}", ampo.main([*flags, "--out", str(out)]), 0)

    def test_mistake_10_resume_is_exact(self, whole, tmp_path, monkeypatch):
        """After a kill that came with half a line of each log and half a checkpoint more."""
        batch_indices = ampo.batch_indices
        steps = []

        def watched(total, step, cfg):
            steps.append(step)
            return batch_indices(total, step, cfg)

        monkeypatch.setattr(ampo, "batch_indices", watched)
        flags, rows, weights = whole
        self.run(tmp_path, *flags, "2")
        for name in ("metrics.jsonl", "responses.jsonl"):
            with open(tmp_path / name, "a") as file:
                file.write('{"step": 2, "reward": 9}\n{"st')
        (tmp_path / "model.new").mkdir()
        self.run(tmp_path, "--resume", "--steps", "4")
        expect("metrics", metrics_of(tmp_path), rows, 0)
        expect("steps whose problems were taken", steps, [0, 1, 2, 3])
        expect("steps in the log", [row["step"] for row in rows], [0, 1, 2, 3])
        assert weights_of(tmp_path) == weights, "other weights"

    def test_a_kill_before_the_first_checkpoint(self, whole, tmp_path, monkeypatch):
        """--resume goes on with the same method and data."""
        flags, rows, weights = whole
        with monkeypatch.context() as patch:
            patch.setattr(ampo, "save_checkpoint", lambda *args: sys.exit(9))
            with pytest.raises(SystemExit):
                self.run(tmp_path, *flags, "4", "--save_every", "2")
        self.run(tmp_path, "--resume")
        expect("metrics", metrics_of(tmp_path), rows, 0)
        assert weights_of(tmp_path) == weights, "other weights"

    def test_looks_at_valid_every_so_many_steps(self, whole, folder, tmp_path):
        flags = run_flags(folder, tmp_path, "--steps", "5", "--eval_every", "3")
        write_lines(tmp_path / "valid.jsonl")
        self.run(tmp_path / "run", *flags)
        rows = metrics_of(tmp_path / "run")
        expect("steps with a look", [row["step"] for row in rows if "valid" in row], [2])

    def test_flags_given_with_resume(self, whole, tmp_path):
        self.run(tmp_path, *whole[0], "1")
        before = weights_of(tmp_path)
        self.run(tmp_path, "--resume", "--lr", "0", "--steps", "2")
        expect("steps", [row["step"] for row in metrics_of(tmp_path)], [0, 1])
        assert weights_of(tmp_path) == before, "--resume --lr 0 moved the weights"
        self.run(tmp_path, "--resume", "--lr", "1e-3", "--steps", "3")
        assert weights_of(tmp_path) != before, "--resume --lr 1e-3 moved nothing"


class Test_main:
    def refused(self, capsys, *argv):
        """What main says on stderr where it must refuse: one line, exit status 2."""
        capsys.readouterr()
        status = ampo.main([str(word) for word in argv])
        said = capsys.readouterr().err
        expect(f"{argv}: status, lines on stderr ({said})", (status, said.count("\n")), (2, 1))
        return said

    @pytest.mark.parametrize("line, named", [
        ("--group_size 1", "--group_size"), ("--temperature 0", "--temperature"),
        ("--recipe ppo", "ppo"), ("--model no/model", "no/model"), ("--model data", "data"),
        ("--data none.jsonl", "none.jsonl"), ("--data .", "."), ("--resume", "--resume"),
        ("--max_new_tokens 5000", ".jsonl:1"), ("eval --samples 0", "--samples"),
        ("eval --data none.jsonl", "none.jsonl"), ("eval --model no/model", "no/model"),
    ])
    def test_wrong_input_is_one_line(self, tmp_path, capsys, monkeypatch, line, named):
        monkeypatch.chdir(HERE)
        names(self.refused(capsys, *line.split(), "--out", tmp_path / "run"), "ampo.py: ", named)
        assert not (tmp_path / "run").exists(), "something is written"

    @pytest.mark.parametrize("error, status, said", [
        (torch.OutOfMemoryError("none left\nhere"), 2, ["none left", "--cache_tokens", "--micro_"]),
        (OSError("disk full\nhere"), 2, ["disk full"]), (KeyboardInterrupt(), 130, ["--resume"]),
    ])
    def test_what_a_run_may_end_of(self, tmp_path, capsys, monkeypatch, error, status, said):
        def fail(*args):
            raise error

        monkeypatch.setattr(ampo, "train", fail)
        expect("exit status", ampo.main(["--out", str(tmp_path / "run")]), status)
        shown = capsys.readouterr().err
        names(shown, "ampo.py: ", *said)
        expect(f"lines on stderr ({shown})", shown.count("\n"), 1)

    def test_takes_the_command_line_and_a_sampler(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(ampo, "train", lambda *args: calls.append(args))
        monkeypatch.setattr(sys, "argv", ["ampo.py", "--seed", "5", "--out", "run"])
        expect("exit status", ampo.main(sampler=max), 0)
        expect("what train gets", calls, [(ampo.Config(seed=5, out="run"), None, max)])
        ampo.main([])
        expect("the seed of no flags", calls[1][0].seed, 0)


def test_a_reward_of_your_own_as_the_readme_has_it(tmp_path, monkeypatch):
    """Its three lines, run on four problems: they, not ampo.py's verifier, say what is right."""
    lines = re.search(r"( {4}import ampo .*\n(?: {4}.*\n)+)", (HERE / "README.md").read_text())[1]
    data = tmp_path / "four.jsonl"
    data.write_text("".join(open(HERE / "data/valid.jsonl").readlines()[:4]))
    out = tmp_path / "run"
    flags = f"--method grpo --model {BASE} --data {data} --out {out} --steps 1"
    flags += " --prompts_per_step 4 --eval_every 0"
    monkeypatch.setattr(sys, "argv", ["mine.py", *flags.split()])
    monkeypatch.setattr(ampo, "verify", ampo.verify)  # and put back after the test
    with pytest.raises(SystemExit) as end:
        exec(textwrap.dedent(lines), {})
    expect("exit status", end.value.code, 0)
    example = json.loads((out / "responses.jsonl").read_text())
    wanted = [example["answer"] in r["text"] for r in example["responses"]]
    expect("verdicts", [r["correct"] for r in example["responses"]], wanted)
    assert len(wanted) == 8


class Test_token_list:
    @pytest.mark.parametrize("ids, wanted", [(None, []), (0, [0]), (7, [7]), ([7, 8], [7, 8])])
    def test_is_a_list(self, ids, wanted):
        expect(f"{ids}", ampo.token_list(ids), wanted)


class Test_has_bfloat16:
    @pytest.mark.parametrize("native", [True, False])
    def test_only_where_a_card_computes_it_itself(self, monkeypatch, native):
        def supported(including_emulation=True):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        expect("a card", ampo.has_bfloat16(torch.device("cuda")), native)
        expect("a CPU", ampo.has_bfloat16(torch.device("cpu")), False)


@engine
class Test_bfloat16_copy:
    def test_mistake_13_parameters_only(self, monkeypatch):
        """What samples on a GPU. Cast as well, rotary frequencies would turn far tokens astray."""
        monkeypatch.setattr(ampo, "has_bfloat16", lambda device: True)
        monkeypatch.setattr(ampo, "check_model", lambda *args: None)
        student = ampo.load_student(BASE, ampo.Config())
        models = [student.model, student.rollout_model, AutoModelForCausalLM.from_pretrained(BASE)]
        models[2].to(torch.bfloat16)
        types = [{weight.dtype for weight in model.parameters()} for model in models[:2]]
        expect("types of both", types, [{torch.float32}, {torch.bfloat16}])
        ids = ids_of(student.tokenizer, "Solve 2*(3*x+4)-5=6.\n2*(3*x+4)=6+5=11\n3*x+4=11/2\n" * 80)
        exact, copied, cast = [full_logps(model, ids[:1000], ids[1000:2000]) for model in models]
        drift = statistics.mean(abs(a - b) for a, b in zip(copied, exact))
        assert drift < 0.15, f"positions 1000 to 2000: log p of the copy is off by {drift}"
        worse = statistics.mean(abs(a - b) for a, b in zip(cast, exact))
        assert worse > 5 * drift, "casting all does no harm here: a test without bite"
