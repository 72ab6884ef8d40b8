"""The tables of results.md, from the lines that study.py wrote.

    python data/results/table.py [FILE]                      # default: runs.jsonl
    python data/results/table.py > data/results/results.md

Means over seeds with the half-width of a 95 % interval (Student's t); differences are paired by
seed. A part of the study that the file does not hold is left out.
"""
import json
import math
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import study

import ampo

OOD = ["ood_letters", "ood_phrasings", "ood_swapped", "ood_orders", "ood_forward"]
SURFACE = ["ood_letters", "ood_phrasings", "ood_swapped"]
ORDER = ["base", "sft", "grpo", "sft+grpo", "luffy", "guide", "ghpo", "ampo", "grpo, more steps"]
KS = [1, 2, 4, 8, 16, 32]

# One run of a part against another, paired by seed.
OWN_PAIRS = [
    ("luffy", "grpo under luffy"),
    ("rl_sft", "grpo under luffy"),
    ("luffy", "rl_sft"),
    ("guide", "grpo under guide"),
    ("guide, value head", "grpo under guide, value head"),
    ("ghpo", "grpo under ghpo"),
    ("ampo, paper", "grpo under ampo, paper"),
]
# Against plain GRPO that sampled about as many tokens.
TOKENS_PAIRS = [
    ("guide", "grpo, more steps"),
    ("ghpo", "grpo, more steps"),
    ("ampo", "grpo, more steps"),
]
SINGLE_TEACHERS = ["teachers undo", "teachers work", "teachers expand", "teachers secant"]
REWARDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]  # at which entropies are compared

# Student's t by number of seeds.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def load(path):
    """{part: {name: {seed: row}}}, names in the study's order."""
    rows = [json.loads(line) for line in open(path)]
    rows.sort(key=place)
    runs = {}
    for row in rows:
        part = runs.setdefault(row["part"], {})
        part.setdefault(row["name"], {})[row["seed"]] = row
    return runs


def place(row):
    """Where a row stands in the tables; a number for sorting."""
    names = list(ORDER)
    if row["part"] in study.STUDY:
        names += [run.name for run in study.runs_of(study.STUDY, [row["part"]])]
    return names.index(row["name"])


# -------------------------------------------------------------------------------------------------
# Columns: functions of one row


def pass_at_k(row, name, k):
    """The unbiased estimate over the problems of a set, in per cent."""
    estimates = [ampo.pass_at_k(row["samples"], solved, k) for solved in row[name]["solved"]]
    return 100 * statistics.mean(estimates)


def column(name, k=1):
    """The column of pass@k on a set."""
    def value(row):
        return pass_at_k(row, name, k)

    return value


def surface(row):
    """pass@1 where only letters, phrasing or the unknown's side differ."""
    return statistics.mean(pass_at_k(row, name, 1) for name in SURFACE)


def all_families(row):
    """pass@1, the mean over all sets out of distribution."""
    return statistics.mean(pass_at_k(row, name, 1) for name in OOD)


def entropy(row):
    """Of samples on test, in hundredths of a nat per token."""
    return 100 * row["test"]["entropy"]


def length(row):
    """Of samples on test, in tokens."""
    return row["test"]["length"]


def failed_groups(row):
    """In the last ten steps, in per cent; None where nothing was sampled in training."""
    if "curves" not in row or row["curves"]["fail_rate"][-1] is None:
        return None
    return 100 * row["curves"]["fail_rate"][-1]


def tokens_sampled(row):
    """In training, in millions."""
    if "curves" not in row:
        return None
    return sum(row["curves"]["tokens"]) * row["bin"] / 1e6


def steps_of(row):
    """The number of training steps."""
    return len(row["curves"]["reward"]) * row["bin"]


def entropy_at(reward):
    """The column of the entropy in training when the reward first reached this, in hundredths of a
    nat per token. None for a run that did not reach it.
    """
    def value(row):
        curves = row.get("curves", {"reward": [], "entropy": []})
        for reached, nats in zip(curves["reward"], curves["entropy"]):
            if reached is not None and reached >= reward:
                return 100 * nats
        return None

    return value


TEST_COLUMNS = {"test @1": column("test", 1), "@8": column("test", 8), "@32": column("test", 32)}
WORDS_COLUMNS = {
    "test @1": column("words/test"),
    "@8": column("words/test", 8),
    "longer @1": column("words/ood_longer"),
    "longer @8": column("words/ood_longer", 8),
}
SCHOOL_COLUMNS = {"test @1": column("school/test"), "@4": column("school/test", 4)}
COLUMNS = TEST_COLUMNS | {
    "letters, phrasings, swapped": surface,
    "mean of the five": all_families,
    "entropy × 100": entropy,
}


# -------------------------------------------------------------------------------------------------
# Cells and tables


def interval(values):
    """mean ± half-width; the mean alone for a single seed."""
    if not values or None in values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {T95[len(values)] * error:.1f}"


def table(head, rows):
    """A table in markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def means(part, columns):
    """A table's rows: the name of a run, its number of seeds and the interval of each column."""
    rows = []
    for name, seeds in part.items():
        row = [name, str(len(seeds))]
        for function in columns.values():
            row.append(interval([function(seed_row) for seed_row in seeds.values()]))
        rows.append(row)
    return rows


def paired_gaps(mine, others, function):
    """The differences between two {seed: row}, for the seeds in which both have a value."""
    found = []
    for seed in sorted(mine.keys() & others.keys()):
        one = function(mine[seed])
        other = function(others[seed])
        if one is not None and other is not None:
            found.append(one - other)
    return found


def paired(mine, others, function):
    """The interval of the difference between two {seed: row}."""
    return interval(paired_gaps(mine, others, function))


def differences(pairs, part, columns):
    """A table's rows: one run minus another, for the pairs that the part holds."""
    rows = []
    for one, other in pairs:
        if one in part and other in part:
            row = [f"{one} − {other}"]
            for function in columns.values():
                row.append(paired(part[one], part[other], function))
            rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------
# Sections


def main_table(part):
    columns = dict(TEST_COLUMNS)
    for name in OOD:
        columns[name.removeprefix("ood_")] = column(name)
    columns["mean of the five"] = all_families
    print("## Test and other families\n\nPer cent solved; the other families at one sample.\n")
    print(table(["", "seeds", *columns], means(part, columns)))

    print("Difference to grpo, paired by seed:\n")
    rows = []
    for name in part:
        if name not in ("base", "grpo"):
            grpo = part.get("grpo", {})
            cells = [paired(part[name], grpo, function) for function in COLUMNS.values()]
            rows.append([name, *cells])
    print(table(["", *COLUMNS], rows))

    rows = differences(TOKENS_PAIRS, part, COLUMNS)
    if rows:
        print("At about equal numbers of sampled tokens, paired by seed:\n")
        print(table(["", *COLUMNS], rows))

    print("Test @1 seed by seed:\n")
    rows = []
    for name, seeds in part.items():
        scores = [f"{pass_at_k(seeds[seed], 'test', 1):.1f}" for seed in sorted(seeds)]
        rows.append([name, ", ".join(scores)])
    print(table(["", "test @1"], rows))

    for other in ("grpo", "base"):
        gaps = least_gaps(part.get("ampo", {}), part.get(other, {}))
        least = [f"{gap:.1f}" for gap in gaps]
        print(f"pass@k of ampo minus {other}'s, the least of k = {', '.join(map(str, KS))}, "
              f"seed by seed: {', '.join(least)}\n")


def least_gaps(mine, others):
    """For each seed the least difference in pass@k on test over all k."""
    gaps = []
    for seed in sorted(mine.keys() & others.keys()):
        pair = (mine[seed], others[seed])
        by_k = [pass_at_k(pair[0], "test", k) - pass_at_k(pair[1], "test", k) for k in KS]
        gaps.append(min(by_k))
    return gaps


def costs(part):
    print("## What it took\n\n"
          "Entropy in nats per token and length in tokens on test at temperature 0.6; failed "
          "groups (%) in the last ten steps; tokens sampled in training (millions); seconds of "
          "training on one core, of the fastest seed, as the machine had other work.\n")
    columns = {
        "entropy × 100": entropy,
        "length": length,
        "failed groups": failed_groups,
        "tokens sampled": tokens_sampled,
    }
    rows = []
    for row in means(part, columns):
        seeds = part[row[0]].values()
        seconds = [seed_row["seconds"] for seed_row in seeds if "seconds" in seed_row]
        rows.append([*row, str(min(seconds, default="–"))])
    print(table(["", "seeds", *columns, "seconds"], rows))


def newly_solved(row, base):
    """Guide's analysis: the gain in pass@1 on test in points, within and beyond the base's reach.

    Each problem's gain is split by the chance that 16 samples of the base hold a success.
    """
    n = row["samples"]
    problems = len(row["test"]["solved"])
    within = 0.0
    beyond = 0.0
    for now, was in zip(row["test"]["solved"], base["test"]["solved"]):
        gain = max(0, now - was) / n
        inside = ampo.pass_at_k(n, was, 16)
        within += gain * inside
        beyond += gain * (1 - inside)
    return 100 * within / problems, 100 * beyond / problems


def guides_analysis(part):
    print("## Newly solved problems (Guide's analysis)\n\nPoints of pass@1 gained on test: on "
          "problems that the base solves within 16 samples (self-distillation) and on others "
          "(capability gain).\n")
    base = part.get("base", {})
    rows = []
    for name, seeds in part.items():
        if name != "base":
            split = [newly_solved(seeds[seed], base[seed]) for seed in seeds if seed in base]
            within = [gain for gain, _ in split]
            beyond = [gain for _, gain in split]
            rows.append([name, interval(within), interval(beyond)])
    print(table(["", "self-distillation", "capability gain"], rows))


def own_comparisons(runs):
    print("## Each method under its paper's own conventions\n\nEach against grpo under the same "
          "ones; then differences, paired by seed.\n")
    print(table(["", "seeds", *COLUMNS], means(runs["own"], COLUMNS)))
    rows = differences(OWN_PAIRS, runs["own"], COLUMNS)
    rows += differences([("ampo", "grpo")], runs.get("main", {}), COLUMNS)
    print(table(["", *COLUMNS], rows))


def entropies(part):
    print("## Entropy at equal reward\n\nA model that solves more is surer. So ampo's entropy "
          "in training, in hundredths of a nat per token, minus grpo's, at the step at which each "
          "first reached a reward; over the seeds in which both did.\n")
    mine = part.get("ampo", {})
    others = part.get("grpo", {})
    rows = []
    for reward in REWARDS:
        found = paired_gaps(mine, others, entropy_at(reward))
        rows.append([str(reward), str(len(found)), interval(found)])
    print(table(["reward", "seeds", "entropy × 100, ampo − grpo"], rows))


def ablations(part):
    default = part["ampo"]
    steps = max(map(steps_of, default.values()))
    print(f"## Ablations of ampo\n\nAfter {steps} steps. ampo itself: comprehension, k=2, four "
          "teachers, on failure, γ=0.1, --follow code. The last column: test @1 minus that of "
          "ampo, or of k=1 for what selects one trace, paired by seed.\n")
    columns = TEST_COLUMNS | {"entropy × 100": entropy}
    rows = []
    for row in means(part, columns):
        name = row[0]
        reference = part.get("k=1", {}) if name.startswith("k=1,") else default
        difference = ""
        if part[name] is not reference:
            difference = paired(part[name], reference, column("test"))
        rows.append([*row, difference])
    singles = [part.get(name, {}) for name in SINGLE_TEACHERS]
    seeds = set(default).intersection(*singles)
    if seeds:
        rows.append(mean_of_singles(singles, default, seeds, columns))
    print(table(["", "seeds", *columns, "@1 against it"], rows))


def mean_of_singles(singles, default, seeds, columns):
    """A row of the ablations: one teacher, when it is not known which."""
    row = ["one teacher, mean of the four", str(len(seeds))]
    for function in columns.values():
        row.append(interval([average(singles, seed, function) for seed in seeds]))
    at_one = column("test")
    gaps = [average(singles, seed, at_one) - at_one(default[seed]) for seed in seeds]
    return [*row, interval(gaps)]


def average(runs, seed, function):
    """The mean over some {seed: row} of a function of their row of this seed."""
    return statistics.mean(function(run[seed]) for run in runs)


def real_model(part, title, scores):
    """SmolLM2-135M-Instruct on problems of one kind; `scores` are the columns of its sets."""
    print(f"## SmolLM2-135M-Instruct: {title}\n\nPer cent solved; failed groups (%) and reward "
          "in the last four steps of 40, seconds a step on one core beside other work, peak "
          "memory in GB.\n")
    columns = scores | {"failed groups": failed_groups}
    rows = []
    for row in means(part, columns):
        seeds = part[row[0]].values()
        trained = [seed_row for seed_row in seeds if "curves" in seed_row]
        rows.append([*row, last_reward(trained), speed(trained), memory(trained)])
    head = ["", "seeds", *columns, "reward", "s a step", "GB"]
    print(table(head, rows))

    rows = []
    for name, seeds in part.items():
        for seed, row in seeds.items():
            if "curves" in row and None not in row["curves"]["reward"]:
                curve = [f"{reward:.2f}" for reward in row["curves"]["reward"]]
                failed = [f"{100 * share:.0f}" for share in row["curves"]["fail_rate"]]
                nats = [f"{value:.2f}" for value in row["curves"]["entropy"]]
                rows.append([f"{name}, seed {seed}", *map(" ".join, (curve, failed, nats))])
    if rows:
        print("Reward of the plain rollouts, means of four steps:\n")
        print(table(["", "reward", "failed groups, %", "entropy, nats per token"], rows))


def last_reward(rows):
    """Of the plain rollouts, at the end of training."""
    rewards = [row["curves"]["reward"][-1] for row in rows]
    if not rewards or None in rewards:
        return "–"
    return f"{statistics.mean(rewards):.2f}"


def speed(rows):
    """Seconds a training step, of the fastest seed."""
    if not rows:
        return "–"
    return f"{min(row['seconds'] for row in rows) / steps_of(rows[0]):.0f}"


def memory(rows):
    """The peak of a run."""
    if not rows:
        return "–"
    return f"{max(row['memory'] for row in rows):.1f}"


def sweep(part, name):
    print(f"## Learning rate, on {name} (one seed)\n")
    columns = {"@1": column(name, 1), "@8": column(name, 8)}
    print(table(["", "seeds", *columns], means(part, columns)))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    path = Path(argv[0]) if argv else study.RESULTS
    runs = load(path)
    print(f"# Results\n\nMade by table.py from {path.name}; see the README for what they say.\n")
    if "main" in runs:
        main_table(runs["main"])
        entropies(runs["main"])
        costs(runs["main"])
        guides_analysis(runs["main"])
    if "own" in runs:
        own_comparisons(runs)
    if "ampo" in runs.get("ablations", {}):
        ablations(runs["ablations"])
    if "sweep" in runs:
        sweep(runs["sweep"], "valid")
    if "words" in runs:
        real_model(runs["words"], "sums in words", WORDS_COLUMNS)
    if "words sweep" in runs:
        sweep(runs["words sweep"], "words/valid")
    if "school" in runs:
        real_model(runs["school"], "GSM8K, four real teachers", SCHOOL_COLUMNS)


if __name__ == "__main__":
    main()
