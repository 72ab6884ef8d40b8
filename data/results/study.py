"""The study: methods and ablations over seeds, by ampo.py's own command line.

    python data/results/study.py --list       # the runs, how many are done, what they cost
    python data/results/study.py              # what runs.jsonl does not hold yet; days on two cores
    python data/results/study.py main own     # only these parts

Each run is a process with one thread. When it ends, a JSON line is added to runs.jsonl: its flags,
its learning curves in means of ten steps, and for each evaluation set how many of 32 samples
solved each problem. A run that was cut off goes on from its last checkpoint (in runs/study).
table.py and ../plot.py read the lines.

--first runs the list of the first version's study with today's code, into runs_first.jsonl.
runs_v1.jsonl holds what the first version's code gave.
"""
import argparse
import json
import os
import re
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

SAMPLES = 32  # to each problem of an evaluation
TEMPERATURE = 0.6
BIN = 10  # steps that make one point of a curve
VALID = ["valid"]
TEST = ["test"]
ALL = ["test", "ood_letters", "ood_phrasings", "ood_swapped", "ood_deeper", "ood_forward"]

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


DATA = "runs/data"
UNTRAINED = "untrained"  # in place of flags: the base model itself

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

ABLATIONS = """
    ampo                       0-4
    select random              0-4  --select random
    select shortest            0-4  --select shortest
    select longest             0-4  --select longest
    k=1                        0-4  --k 1
    k=3                        0-4  --k 3
    k=4                        0-4  --k 4
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

STUDY = {
    "sweep": Part(VALID, "--recipe ampo --steps 250", SWEEP),
    "main": Part(ALL, "--recipe ampo --steps 250", MAIN),
    "own": Part(ALL, "--steps 250", OWN),
    "ablations": Part(TEST, "--method ampo --recipe ampo --steps 150", ABLATIONS),
}

# The first study. It trained every method under AMPO's conventions, but for LUFFY's clip.
FIRST_MAIN = """
    base              0-7  untrained
    grpo              0-7  --method grpo
    ampo              0-7  --method ampo
    sft               0-4  --method sft
    luffy             0-4  --method luffy --clip_eps inf
    guide             0-7  --method guide
    ghpo              0-7  --method ghpo
    grpo, more steps  0-4  --method grpo --steps 400
    sft+grpo          0-4  --method sft --steps 125 THEN --method grpo --steps 125
"""

FIRST_ABLATIONS = """
    ampo                0-2
    select random       0-2  --select random
    select shortest     0-2  --select shortest
    select longest      0-2  --select longest
    k=1                 0-2  --k 1
    k=3                 0-2  --k 3
    k=4                 0-2  --k 4
    teachers undo       0-2  --k 1 --data runs/data/undo.jsonl
    teachers work       0-2  --k 1 --data runs/data/work.jsonl
    teachers expand     0-2  --k 1 --data runs/data/expand.jsonl
    teachers secant     0-2  --k 1 --data runs/data/secant.jsonl
    teachers undo,work  0-2  --data runs/data/undo,work.jsonl
    always              0-2  --trigger always
    v2's trigger        0-2  --trigger half
    follow paper        0-2  --follow paper
    gamma=0.01          0-2  --gamma 0.01
    gamma=1             0-2  --gamma 1
"""

FIRST_CLAIMS = """
    select random       0-4  --method ampo --select random
    teachers work       0-4  --method ampo --k 1 --data runs/data/work.jsonl
    ampo, follow paper  0-4  --method ampo --follow paper
    grpo, follow paper  0-4  --method grpo --follow paper
"""

FIRST_STUDY = {
    "sweep": Part(VALID, "--recipe ampo --steps 250", SWEEP),
    "main": Part(ALL, "--recipe ampo --steps 250", FIRST_MAIN),
    "ablations": Part(TEST, "--method ampo --recipe ampo --steps 100", FIRST_ABLATIONS),
    "claims": Part(ALL, "--recipe ampo --steps 250", FIRST_CLAIMS),
}

# For the estimate: seconds of one quiet core for a training step, and for a problem evaluated.
STEP_SECONDS = {
    "grpo": 0.8, "sft": 0.7, "ampo": 1.3, "rl_sft": 1.9, "luffy": 1.9, "guide": 1.6, "ghpo": 1.8,
}
PROBLEM_SECONDS = 0.06


@dataclass(frozen=True)
class Run:
    """One run of one seed."""

    part: str
    name: str
    seed: int
    sets: list
    trainings: list  # the flags of each, a list; none for the base model itself

    def key(self):
        return self.part, self.name, self.seed


def files_of(first):
    """The results file of a study, and the folder of its runs; `first`: of the first study."""
    if first:
        return HERE / "runs_first.jsonl", ROOT / "runs" / "study_first"
    return HERE / "runs.jsonl", ROOT / "runs" / "study"


def runs_of(study, parts):
    """All Runs of these parts, seed by seed: a study cut short has all methods of some seeds."""
    runs = []
    for part in parts:
        sets = study[part].sets
        of_part = []
        for line in study[part].table.strip().splitlines():
            name, seeds, flags = (re.split(r"\s{2,}", line.strip()) + [""])[:3]
            trainings = []
            if flags != UNTRAINED:
                for own in flags.split("THEN"):
                    trainings.append(study[part].flags.split() + own.split())
            first, last = seeds.split("-")
            for seed in range(int(first), int(last) + 1):
                of_part.append(Run(part, name, seed, sets, trainings))
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
    names = path.stem.split(",")
    lines = []
    for line in open(ROOT / "data" / "train.jsonl"):
        row = json.loads(line)
        teachers = row["teachers"]
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


def curves(metrics_file):
    """metrics.jsonl -> {column: a value for every BIN steps}, and the seconds in all.

    Means; None where a method has no rollouts of its own. sources: {name: samples trained on}.
    """
    rows = [json.loads(line) for line in open(metrics_file)]
    columns = (
        "reward", "fail_rate", "rescued", "entropy", "response_length", "clip_fraction", "tokens",
    )
    points = {column: [] for column in columns}
    points["sources"] = []
    for chunk in ampo.chunks(rows, BIN):
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


def evaluate(model, seed, name):
    """How a model does on one set: how often it solves each problem, length, entropy."""
    student = ampo.load_student(str(model), ampo.Config(seed=seed))
    problems = ampo.load_problems(ROOT / "data" / f"{name}.jsonl")
    scores, groups = ampo.evaluate(student, problems, SAMPLES, TEMPERATURE)
    solved = []
    surprises = []
    for group in groups:
        solved.append(sum(sample.correct for sample in group))
        for sample in group:
            surprises += [-logp for logp in sample.old_logps]
    return {"solved": solved, "length": scores["length"], "entropy": ampo.mean(surprises)}


def train_and_evaluate(run, folder):
    """Do one run in this process. Returns its line of the results file, as a dictionary."""
    row = {"part": run.part, "name": run.name, "seed": run.seed, "samples": SAMPLES}
    row["flags"] = [" ".join(flags) for flags in run.trainings]
    model = ROOT / "data" / "base"
    for number, flags in enumerate(run.trainings):
        name = f"{run.part}-{run.name}-{run.seed}".replace(" ", "_")
        if number < len(run.trainings) - 1:
            name += f"-training{number}"
        out = folder / name
        train([*flags, "--model", str(model)], run.seed, out)
        row["curves"], row["seconds"] = curves(out / "metrics.jsonl")
        model = out / "model"
    for name in run.sets:
        row[name] = evaluate(model, run.seed, name)
    return row


# =================================================================================================
# All runs


def launch(run, first):
    """One run in a process of its own; its line is added to the results when it is whole."""
    results, _ = files_of(first)
    command = [sys.executable, __file__, "--run", run.part, run.name, str(run.seed)]
    if first:
        command.append("--first")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        print(f"failed: {run.key()}\n{result.stderr[-2000:]}", flush=True)
        return
    with open(results, "a") as file:
        file.write(result.stdout.splitlines()[-1] + "\n")
    print(f"done: {run.key()}", flush=True)


def minutes(run):
    """About how long a run takes on one quiet core."""
    seconds = 0
    for flags in run.trainings:
        cfg = ampo.parse_flags(flags)
        seconds += cfg.steps * STEP_SECONDS[cfg.method]
    problems = sum(256 if name == "test" else 128 for name in run.sets)
    return (seconds + problems * PROBLEM_SECONDS) / 60


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
    parser.add_argument("--first", action="store_true", help="the list of the first study")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--list", action="store_true", help="only show the runs")
    parser.add_argument("--run", nargs=3, metavar=("PART", "NAME", "SEED"),
                        help="one run in this process; prints its line")
    args = parser.parse_args(argv)
    study = FIRST_STUDY if args.first else STUDY
    results, folder = files_of(args.first)
    unknown = set(args.parts) - set(study)
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(study)}")
    runs = runs_of(study, args.parts or study)
    if args.run:
        part, name, seed = args.run
        run, = [run for run in runs if run.key() == (part, name, int(seed))]
        print(json.dumps(train_and_evaluate(run, folder)))
        return
    finished = done(results)
    if args.list:
        show(runs, finished)
        return
    pool = ThreadPoolExecutor(args.jobs)
    jobs = []
    for run in runs:
        if run.key() not in finished:
            jobs.append(pool.submit(launch, run, args.first))
    try:
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C starts no more of them


if __name__ == "__main__":
    main()
