"""The study: methods and ablations over seeds, by ampo.py's own command line.

    python data/results/study.py --list       # the runs, how many are done, what they cost
    python data/results/study.py              # what runs.jsonl does not hold yet; days on two cores
    python data/results/study.py main own     # only these parts

Each run is a process with one thread. When it ends, a JSON line is added to runs.jsonl: its flags,
its learning curves in means of some steps, and for each evaluation set how many samples solved
each problem. A run that was cut off goes on from its last checkpoint (in runs/study). table.py and
../plot.py read the lines.

The part "words" takes a real language model: ../smollm.py makes it, ../words.py its problems.
"""
import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import ampo

TEMPERATURE = 0.6
VALID = ["valid"]
TEST = ["test"]
ALL = ["test", "ood_letters", "ood_phrasings", "ood_swapped", "ood_orders", "ood_forward"]

# =================================================================================================
# The runs


@dataclass(frozen=True)
class Part:
    """Runs of one kind.

    The table has a line for each: name, first and last seed, and ampo.py's flags, at least two
    spaces apart. THEN starts a second training from the model of the first. --data NAMES.jsonl in
    DATA is made of train.jsonl: the traces of these teachers alone.
    """

    sets: list   # what it is evaluated on, files in data/
    flags: str   # of all its runs, before their own
    table: str
    samples: int = 32  # to each problem of an evaluation
    bin: int = 10      # steps that make one point of a curve


DATA = "runs/data"
EVERYWHERE = "everywhere"  # a file in DATA: one teacher, which solves every problem as work does
UNTRAINED = "untrained"    # in place of flags: the base model itself

SWEEP = """
    grpo lr=1e-4   100-100  --method grpo --lr 1e-4
    ampo lr=1e-4   100-100  --method ampo --lr 1e-4
    grpo lr=2e-4   100-100  --method grpo --lr 2e-4
    ampo lr=2e-4   100-100  --method ampo --lr 2e-4
    grpo lr=4e-4   100-100  --method grpo --lr 4e-4
    ampo lr=4e-4   100-100  --method ampo --lr 4e-4
"""

# "grpo, more steps" samples about as many tokens as guide and ghpo do.
MAIN = """
    base              0-7  untrained
    grpo              0-7  --method grpo
    ampo              0-7  --method ampo
    guide             0-7  --method guide
    ghpo              0-7  --method ghpo
    sft               0-4  --method sft
    sft+grpo          0-4  --method sft --steps 125 THEN --method grpo --steps 125
    luffy             0-4  --method luffy
    grpo, more steps  0-4  --method grpo --steps 400
"""

# Each paper compares its method with GRPO under its own conventions. For ampo after its code, both
# are in MAIN.
OWN = """
    luffy                         0-4  --method luffy
    rl_sft                        0-4  --method rl_sft
    grpo under luffy              0-4  --method grpo --recipe luffy
    guide                         0-4  --method guide
    grpo under guide              0-4  --method grpo --recipe guide
    guide, value head             0-4  --method guide --advantage gae
    grpo under guide, value head  0-4  --method grpo --recipe guide --advantage gae
    ghpo                          0-4  --method ghpo
    grpo under ghpo               0-4  --method grpo --recipe ghpo
    ampo, paper                   0-4  --method ampo --follow paper
    grpo under ampo, paper        0-4  --method grpo --recipe ampo --follow paper
"""

# No form of problem has more than three teachers: k=3 takes all of them.
ABLATIONS = """
    ampo                       0-4
    select random              0-4  --select random
    select shortest            0-4  --select shortest
    select longest             0-4  --select longest
    k=1                        0-4  --k 1
    k=1, random                0-4  --k 1 --select random
    k=1, shortest              0-4  --k 1 --select shortest
    k=1, longest               0-4  --k 1 --select longest
    k=3                        0-4  --k 3
    teachers work everywhere   0-4  --data runs/data/everywhere.jsonl
    teachers undo              0-4  --data runs/data/undo.jsonl
    teachers work              0-4  --data runs/data/work.jsonl
    teachers expand            0-4  --data runs/data/expand.jsonl
    teachers secant            0-4  --data runs/data/secant.jsonl
    teachers undo,work         0-4  --data runs/data/undo,work.jsonl
    teachers undo,work,expand  0-4  --data runs/data/undo,work,expand.jsonl
    always                     0-4  --trigger always
    balanced trigger           0-4  --trigger half
    shaping p                  0-4  --shaping ratio
    shaping log p              0-4  --shaping log
    no clip                    0-4  --clip_eps inf
    gamma=0.01                 0-4  --gamma 0.01
    gamma=1                    0-4  --gamma 1
"""

# A real language model.
SMOLLM = "--recipe ampo --model data/smollm2"
WORDS_FLAGS = (
    f"{SMOLLM} --data data/words/train.jsonl --prompts_per_step 8 --group_size 4 "
    "--max_new_tokens 48 --micro_tokens 512"
)
SCHOOL_FLAGS = (
    f"{SMOLLM} --data data/school/train.jsonl --prompts_per_step 4 --group_size 4 "
    "--max_new_tokens 128 --micro_tokens 512"
)
WORDS_SWEEP = """
    ampo lr=2e-5  100-100  --method ampo --lr 2e-5
    ampo lr=5e-5  100-100  --method ampo --lr 5e-5
"""
WORDS = """
    base   0-0  untrained
    grpo   0-2  --method grpo
    ampo   0-2  --method ampo
    guide  0-0  --method guide
    ghpo   0-0  --method ghpo
    sft    0-0  --method sft
"""

# GSM8K's test problems with the solutions of four real language models: 1,000 for training, 319 for
# test. ../README.md says how they are made.
SCHOOL = """
    base  0-0  untrained
    grpo  0-0  --method grpo
    ampo  0-0  --method ampo
"""

STUDY = {
    "sweep": Part(VALID, "--recipe ampo --steps 250", SWEEP),
    "main": Part(ALL, "--recipe ampo --steps 250", MAIN),
    "own": Part(ALL, "--steps 250", OWN),
    "ablations": Part(TEST, "--method ampo --recipe ampo --steps 150", ABLATIONS),
    "words sweep": Part(["words/valid"], f"{WORDS_FLAGS} --steps 40", WORDS_SWEEP, 8, 4),
    "words": Part(["words/test", "words/ood_longer"], f"{WORDS_FLAGS} --steps 40 --lr 2e-5",
                  WORDS, 8, 4),
    "school": Part(["school/test"], f"{SCHOOL_FLAGS} --steps 40 --lr 2e-5", SCHOOL, 4, 4),
}

# For the estimate: seconds of one quiet core for a training step, and for an evaluation (8 unless
# listed).
STEP_SECONDS = {
    "grpo": 0.8, "sft": 0.7, "ampo": 1.3, "rl_sft": 1.9, "luffy": 1.9, "guide": 1.6, "ghpo": 1.8,
}
SMOLLM_STEP_SECONDS = {"grpo": 30, "sft": 36, "ampo": 50, "guide": 60, "ghpo": 85}
SET_SECONDS = {
    "test": 15, "words/test": 240, "words/valid": 120, "words/ood_longer": 120, "school/test": 600,
}

RESULTS = HERE / "runs.jsonl"
RUNS = ROOT / "runs" / "study"


@dataclass(frozen=True)
class Run:
    """One run of one seed."""

    part: str
    name: str
    seed: int
    trainings: list  # the flags of each, a list; none for the base model itself

    def key(self):
        return self.part, self.name, self.seed


def runs_of(study, parts):
    """All Runs of these parts, seed by seed: a study cut short has all methods of some seeds."""
    runs = []
    for part in parts:
        of_part = []
        for line in study[part].table.strip().splitlines():
            name, seeds, flags = (re.split(r"\s{2,}", line.strip()) + [""])[:3]
            trainings = []
            if flags != UNTRAINED:
                for own in flags.split("THEN"):
                    trainings.append(study[part].flags.split() + own.split())
            first, last = seeds.split("-")
            for seed in range(int(first), int(last) + 1):
                of_part.append(Run(part, name, seed, trainings))
        runs += sorted(of_part, key=attrgetter("seed"))
    return runs


def done(path):
    """{(part, name, seed)} of the runs that a file holds."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["part"], row["name"], row["seed"]) for row in rows}


# =================================================================================================
# One run


def filter_teachers(path):
    """Write the training set with the traces of the teachers that the file's name lists."""
    lines = []
    for line in open(ROOT / "data" / "train.jsonl"):
        row = json.loads(line)
        teachers = row["teachers"]
        if path.stem == EVERYWHERE:
            row["teachers"] = {"work": row["solution"]}
        else:
            names = path.stem.split(",")
            row["teachers"] = {name: teachers[name] for name in names if name in teachers}
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")  # another run may be reading the file
    new.write_text("".join(lines))
    new.replace(path)


def train(flags, seed, out):
    """One training through the command line. Goes on from its last checkpoint, if it has one."""
    if (out / "run.json").exists():
        argv = ["--resume", "--out", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        argv = [*flags, "--seed", str(seed), "--eval_every", "0", "--out", str(out)]
    for flag in flags:
        if flag.startswith(DATA):
            filter_teachers(ROOT / flag)
    status = ampo.main(argv)
    if status != 0:
        raise RuntimeError(f"ampo.py ended with {status}: {' '.join(argv)}")


def curves(metrics_file, width):
    """metrics.jsonl -> {column: a value for every `width` steps}, and the seconds in all.

    Means; None where a method has no rollouts of its own. sources: {name: samples trained on}.
    """
    rows = [json.loads(line) for line in open(metrics_file)]
    columns = (
        "reward", "fail_rate", "rescued", "entropy", "response_length", "clip_fraction", "tokens",
    )
    points = {column: [] for column in columns}
    points["sources"] = []
    for chunk in ampo.chunks(rows, width):
        for column in columns:
            values = [row[column] for row in chunk]
            point = None if None in values else round(ampo.mean(values), 5)
            points[column].append(point)
        sources = Counter()
        for row in chunk:
            sources.update(row["sources"])
        points["sources"].append(dict(sources))
    seconds = sum(row["rollout_s"] + row["guide_s"] + row["update_s"] for row in rows)
    return points, round(seconds)


def evaluate(model, cfg, name, samples):
    """How a model does on one set: how often it solves each problem, length, entropy."""
    student = ampo.load_student(str(model), cfg)
    problems = ampo.load_problems(ROOT / "data" / f"{name}.jsonl")
    scores, groups = ampo.evaluate(student, problems, samples, TEMPERATURE)
    solved = []
    surprises = []
    for group in groups:
        solved.append(sum(sample.correct for sample in group))
        for sample in group:
            surprises += [-logp for logp in sample.old_logps]
    return {"solved": solved, "length": scores["length"], "entropy": ampo.mean(surprises)}


def train_and_evaluate(run, part, folder):
    """Do one run in this process. Returns its line of the results file, as a dictionary."""
    row = {
        "part": run.part, "name": run.name, "seed": run.seed,
        "samples": part.samples, "bin": part.bin,
        "flags": [" ".join(flags) for flags in run.trainings],
    }
    cfg = ampo.parse_flags(part.flags.split() + ["--seed", str(run.seed)])
    model = ROOT / cfg.model
    for number, flags in enumerate(run.trainings):
        name = f"{run.part}-{run.name}-{run.seed}".replace(" ", "_")
        if number < len(run.trainings) - 1:
            name += f"-training{number}"
        out = folder / name
        train([*flags, "--model", str(model)], run.seed, out)
        row["curves"], row["seconds"] = curves(out / "metrics.jsonl", part.bin)
        model = out / "model"
    if run.trainings:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["memory"] = round(kilobytes * 1024 / 1e9, 2)  # the peak in GB
    for name in part.sets:
        row[name] = evaluate(model, cfg, name, part.samples)
    return row


# =================================================================================================
# All runs


def launch(run):
    """One run in a process of its own; its line is added to the results when it is whole."""
    command = [sys.executable, __file__, "--run", run.part, run.name, str(run.seed)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        print(f"failed: {run.key()}\n{result.stderr[-2000:]}", flush=True)
        return
    with open(RESULTS, "a") as file:
        file.write(result.stdout.splitlines()[-1] + "\n")
    print(f"done: {run.key()}", flush=True)


def minutes(run):
    """About how long a run takes on one quiet core."""
    part = STUDY[run.part]
    seconds = 0
    for flags in run.trainings:
        cfg = ampo.parse_flags(flags)
        step = STEP_SECONDS[cfg.method]
        if "smollm2" in cfg.model:
            step = SMOLLM_STEP_SECONDS[cfg.method]  # 8 x 48 tokens, or 4 x 128
        seconds += cfg.steps * step
    for name in part.sets:
        seconds += SET_SECONDS.get(name, 8)
    return seconds / 60


def show(runs, finished):
    """Print a line for each name, and what is left to do."""
    hours_left = 0
    for part, name in dict.fromkeys((run.part, run.name) for run in runs):
        same = [run for run in runs if (run.part, run.name) == (part, name)]
        number = sum(run.key() in finished for run in same)
        cost = minutes(same[0])
        hours_left += cost * (len(same) - number) / 60
        flags = [" ".join(training) for training in same[0].trainings] or [UNTRAINED]
        print(f"{part:10} {name:29} {number} of {len(same)} done, {cost:4.1f} min each   "
              f"{' THEN '.join(flags)}")
    left = sum(run.key() not in finished for run in runs)
    print(f"{left} of {len(runs)} runs to do, about {hours_left:.1f} hours of one core")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--list", action="store_true", help="only show the runs")
    parser.add_argument("--run", nargs=3, metavar=("PART", "NAME", "SEED"),
                        help="one run in this process; prints its line")
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(STUDY)
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(STUDY)}")
    runs = runs_of(STUDY, args.parts or STUDY)
    if args.run:
        part, name, seed = args.run
        run, = [run for run in runs if run.key() == (part, name, int(seed))]
        print(json.dumps(train_and_evaluate(run, STUDY[part], RUNS)))
        return
    finished = done(RESULTS)
    if args.list:
        show(runs, finished)
        return
    pool = ThreadPoolExecutor(args.jobs)
    jobs = []
    for run in runs:
        if run.key() not in finished:
            jobs.append(pool.submit(launch, run))
    try:
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C starts no more of them


if __name__ == "__main__":
    main()
