"""The study behind the README's tables: every method and ablation over seeds, through ampo.py's own command line.

    python data/results/study.py                    # what runs.jsonl does not hold yet; hours on two CPU cores
    python data/results/study.py sweep main         # only these parts; also: ablations, claims
    python data/results/study.py --list             # the runs and whether they are done

Each run is a process with one thread. When it ends, one JSON line is added to runs.jsonl: its flags, its learning
curves in means of ten steps, and for each evaluation set how many of 32 samples solved each problem. A run that was
cut off goes on from its last checkpoint (in runs/study). table.py and plot.py read runs.jsonl.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = HERE / "runs.jsonl"
STEPS, SAMPLES, TEMPERATURE, BIN = 250, 32, 0.6, 10
TEST = ["test", "ood_letters", "ood_phrasings", "ood_swapped", "ood_deeper", "ood_forward"]

# name: (flags, sets to evaluate). The sweep chooses the learning rate, on the validation set alone.
SWEEP = {f"{method} lr={lr}": (["--method", method, "--lr", lr], ["valid"])
         for lr in ("1e-4", "2e-4", "4e-4") for method in ("grpo", "ampo")}
MAIN = {"base": (None, TEST)} | {name: (["--method", *flags.split()], TEST) for name, flags in {
    "grpo": "grpo", "ampo": "ampo", "sft": "sft", "luffy": "luffy", "guide": "guide", "ghpo": "ghpo",
    "grpo, more steps": "grpo --steps 400",  # about as many sampled tokens as ghpo
    "sft+grpo": f"grpo --steps {STEPS // 2} --model runs/study/sft_half-SEED/model"}.items()}  # as many steps in all
SFT_HALF = ["--method", "sft", "--steps", str(STEPS // 2)]
BEGINNINGS = {"sft": "sft_half", "grpo, more steps": "main-grpo"}  # shorter runs that these only continue
ABLATIONS = {name: (["--method", "ampo", "--steps", "100", *flags.split()], ["test"]) for name, flags in {
    "ampo": "", "select random": "", "select shortest": "", "select longest": "",
    "k=1": "--k 1", "k=3": "--k 3", "k=4": "--k 4", "teachers undo": "--k 1", "teachers work": "--k 1",
    "teachers expand": "--k 1", "teachers secant": "--k 1", "teachers undo,work": "",
    "always": "--trigger always", "v2's trigger": "--trigger half",
    "follow paper": "--follow paper", "gamma=0.01": "--gamma 0.01", "gamma=1": "--gamma 1"}.items()}
CLAIMS = {name: (["--method", *flags.split()], TEST) for name, flags in {  # as long as the main runs, to compare with
    "select random": "ampo", "teachers work": "ampo --k 1",  # work: the best single teacher of the ablations
    "ampo, follow paper": "ampo --follow paper", "grpo, follow paper": "grpo --follow paper"}.items()}
PARTS = {"sweep": (SWEEP, [100]), "main": (MAIN, range(8)), "ablations": (ABLATIONS, range(3)),
         "claims": (CLAIMS, range(5))}
COMPARED = ("base", "grpo", "ampo", "guide", "ghpo")  # whom the papers' claims compare: eight seeds, the others five


def other_selection(kind):
    """A stand-in for ampo.comprehension that ranks traces by chance or length."""
    def score(model, tokenizer, problem, traces, *_):
        key = {"random": lambda i: torch.rand(()).item(), "longest": lambda i: len(tokenizer.encode(traces[i])),
               "shortest": lambda i: -len(tokenizer.encode(traces[i]))}[kind]
        ranks = sorted(range(len(traces)), key=key)
        return [ranks.index(i) / len(traces) for i in range(len(traces))]
    return score


def with_teachers(names, out):
    """The training set with the traces of these teachers alone."""
    rows = [json.loads(line) for line in open(ROOT / "data" / "train.jsonl")]
    for row in rows:
        row["teachers"] = {name: row["teachers"][name] for name in names.split(",")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(out)


def todo(parts):
    """(part, name, seed) of every run, seed by seed, so that a study cut short has all methods of the first seeds."""
    return [(part, name, seed) for part in parts for seed in PARTS[part][1] for name in PARTS[part][0]
            if part != "main" or seed < 5 or name in COMPARED]


def done():
    rows = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return {(row["part"], row["name"], row["seed"]) for row in rows}


def curves(metrics_file):
    """metrics.jsonl -> {column: means of BIN steps}, None where a method has no rollouts of its own; seconds in all."""
    rows = [json.loads(line) for line in open(metrics_file)]
    chunks = [rows[i:i + BIN] for i in range(0, len(rows), BIN)]
    mean = lambda values: None if None in values else round(sum(values) / len(values), 5)
    columns = ("reward", "fail_rate", "rescued", "entropy", "response_length", "clip_fraction", "tokens")
    seconds = sum(row[part] for row in rows for part in ("rollout_s", "guide_s", "update_s"))
    return {c: [mean([row[c] for row in chunk]) for chunk in chunks] for c in columns}, round(seconds)


def train(ampo, flags, seed, out, beginning=None):
    """One training run through the command line; goes on from its last checkpoint, or from that of its beginning."""
    if beginning and (beginning / "model").exists() and not out.exists():
        shutil.copytree(beginning, out)  # resuming is exact
    argv = ["--steps", str(STEPS), *flags, "--seed", str(seed), "--eval_every", "0", "--out", str(out)]
    return ampo.main(argv + ["--resume"] * (out / "metrics.jsonl").exists())


def run(part, name, seed):
    """Train and evaluate one run in this process; returns its line of runs.jsonl."""
    sys.path.insert(0, str(ROOT))
    import ampo
    flags, sets = PARTS[part][0][name]
    out, row = ROOT / "runs" / "study" / f"{part}-{name}-{seed}".replace(" ", "_"), {}
    kind, _, what = name.partition(" ")
    if kind == "select":
        ampo.comprehension = other_selection(what)
    if kind == "teachers":
        flags = [*flags, "--data", with_teachers(what, out.parent / f"{what}-{seed}.jsonl")]
    if name in ("sft", "sft+grpo"):
        assert train(ampo, SFT_HALF, seed, out.parent / f"sft_half-{seed}") == 0
        flags = [flag.replace("SEED", str(seed)) for flag in flags]
    if flags is not None:
        beginning = out.parent / f"{BEGINNINGS[name]}-{seed}" if name in BEGINNINGS else None
        assert train(ampo, flags, seed, out, beginning) == 0
        row["curves"], row["seconds"] = curves(out / "metrics.jsonl")
    student = ampo.load_student(str(out / "model") if flags else str(ROOT / "data" / "base"), ampo.Config(seed=seed))
    for name_of_set in sets:
        problems = ampo.load_problems(ROOT / "data" / f"{name_of_set}.jsonl")
        scores, groups = ampo.evaluate(student, problems, SAMPLES, TEMPERATURE)
        solved = [sum(sample.correct for sample in group) for group in groups]
        entropy = [-p for group in groups for sample in group for p in sample.old_logps]
        row[name_of_set] = {"solved": solved, "length": scores["length"], "entropy": sum(entropy) / len(entropy)}
    flags = [str(Path(flag).name) if str(flag).startswith("/") else flag for flag in flags or []]
    return {"part": part, "name": name, "seed": seed, "flags": flags, "samples": SAMPLES} | row


def launch(job):
    """One run in a process of its own; its line is added to runs.jsonl when it is whole."""
    part, name, seed = job
    command = [sys.executable, __file__, "--run", part, name, str(seed)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode:
        return print(f"failed: {job}\n{result.stderr[-2000:]}", flush=True)
    with open(RUNS, "a") as file:
        file.write(result.stdout.splitlines()[-1] + "\n")
    print(f"done: {job}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--list", action="store_true", help="show what is done and what is not")
    parser.add_argument("--run", nargs=3, metavar=("PART", "NAME", "SEED"), help="one run; prints its line")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run[0], args.run[1], int(args.run[2]))))
    elif args.list:
        for job in todo(args.parts):
            print("done" if job in done() else "    ", *job)
    else:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(launch, [job for job in todo(args.parts) if job not in done()]))


if __name__ == "__main__":
    main()
