"""The tables of results.md, from runs.jsonl.

    python data/results/table.py [runs.jsonl] > data/results/results.md

Means over seeds with the half-width of a 95 % interval (Student's t); differences are paired by seed.
"""
import json
import math
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import ampo
import study

OOD = ["ood_letters", "ood_phrasings", "ood_swapped", "ood_deeper", "ood_forward"]
MAIN = ["base", "sft", "grpo", "sft+grpo", "luffy", "guide", "ghpo", "ampo", "grpo, more steps"]
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by number of seeds


def load(path=HERE / "runs.jsonl"):
    """{(part, name): {seed: row}}"""
    runs = {}
    for line in open(path):
        row = json.loads(line)
        runs.setdefault((row["part"], row["name"]), {})[row["seed"]] = row
    return runs


def pass_at_k(row, name, k):
    """The unbiased estimate in per cent over the problems of a set."""
    n = row["samples"]
    return 100 * statistics.mean(ampo.pass_at_k(n, c, k) for c in row[name]["solved"])


def ood_mean(row):
    return statistics.mean(pass_at_k(row, name, 1) for name in OOD)


def entropy(row):
    """Of samples on test, in hundredths of a nat a token."""
    return 100 * row["test"]["entropy"]


def interval(values):
    """mean ± half-width; the mean alone for a single seed."""
    if None in values or not values:
        return "–"
    mean, n = f"{statistics.mean(values):.1f}", len(values)
    return f"{mean} ± {T95[n] * statistics.stdev(values) / math.sqrt(n):.1f}" if n > 1 else mean


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def cells(runs, part, names, columns):
    """One row a run name: its number of seeds and the interval of each column."""
    return [[name, str(len(rows))] + [interval([f(row) for row in rows.values()]) for f in columns]
            for name in names if (rows := runs.get((part, name)))]


def paired(mine, others, f):
    """Interval of f(run) - f(other run of the same seed), of two {seed: row}."""
    return interval([f(mine[s]) - f(others[s]) for s in sorted(mine.keys() & others.keys())])


def newly_solved(row, base):
    """Guide's analysis: the gain in pass@1 on test, split by whether 16 samples of the base would have held a success."""
    n, within, beyond = row["samples"], 0.0, 0.0
    for now, was in zip(row["test"]["solved"], base["test"]["solved"]):
        inside = ampo.pass_at_k(n, was, 16)
        gain = max(0, now - was) / n
        within, beyond = within + gain * inside, beyond + gain * (1 - inside)
    return 100 * within / len(row["test"]["solved"]), 100 * beyond / len(row["test"]["solved"])


def test(k):
    """A column: pass@k on test."""
    return lambda row: pass_at_k(row, "test", k)


COLUMNS = {"test @1": test(1), "@8": test(8), "@32": test(32),
           "letters, phrasings, swapped": lambda row: statistics.mean(pass_at_k(row, name, 1) for name in OOD[:3]),
           "mean of the five": ood_mean, "entropy × 100": entropy}


def main_table(runs, names):
    print("## Test and other families\n\nPer cent solved; the other families at one sample.\n")
    families = [lambda row, s=s: pass_at_k(row, s, 1) for s in OOD]
    print(table(["", "seeds", "test @1", "@8", "@32", *(name[4:] for name in OOD), "mean of the five"],
                cells(runs, "main", names, [test(1), test(8), test(32), *families, ood_mean])))
    grpo = runs.get(("main", "grpo"), {})
    print("Difference to grpo, paired by seed:\n")
    print(table(["", *COLUMNS], [[name, *(paired(runs["main", name], grpo, f) for f in COLUMNS.values())]
                                 for name in names if name not in ("base", "grpo")]))
    print("Test @1 seed by seed:\n")
    print(table(["", "test @1"], [[name, ", ".join(f"{test(1)(row):.1f}" for _, row in sorted(runs["main", name].items()))]
                                  for name in names]))
    ks = [2**i for i in range(6)]
    ampo_runs = runs.get(("main", "ampo"), {})
    for other in ("grpo", "base"):
        base = runs.get(("main", other), {})
        least = [min(test(k)(ampo_runs[s]) - test(k)(base[s]) for k in ks) for s in sorted(ampo_runs.keys() & base.keys())]
        print(f"pass@k of ampo minus {other}'s, the least of k = {', '.join(map(str, ks))}, seed by seed: "
              f"{', '.join(f'{x:.1f}' for x in least)}\n")


def costs(runs, names):
    print("## What it took\n\nEntropy in nats a token and length in tokens on test at temperature 0.6; failed groups "
          "(%) in the last ten steps; tokens sampled in training (millions); seconds of training on one core, of the "
          "fastest seed, as the machine had other work.\n")
    curve = lambda column, f: lambda row: f(row["curves"][column]) if "curves" in row else None
    failed = curve("fail_rate", lambda values: None if values[-1] is None else 100 * values[-1])
    tokens = curve("tokens", lambda values: sum(values) * study.BIN / 1e6)
    seconds = lambda name: min((row["seconds"] for row in runs["main", name].values() if "seconds" in row), default="–")
    rows = cells(runs, "main", names, [entropy, lambda row: row["test"]["length"], failed, tokens])
    print(table(["", "seeds", "entropy × 100", "length", "failed groups", "tokens sampled", "seconds"],
                [[*row, str(seconds(row[0]))] for row in rows]))


def guides_analysis(runs, names):
    print("## Newly solved problems (Guide's analysis)\n\nPoints of pass@1 gained on test: on problems that the base "
          "solves within 16 samples (self-distillation) and on others (capability gain).\n")
    base = runs.get(("main", "base"), {})
    split = {name: [newly_solved(row, base[s]) for s, row in runs["main", name].items() if s in base] for name in names}
    print(table(["", "self-distillation", "capability gain"],
                [[name, interval([a for a, _ in rows]), interval([b for _, b in rows])]
                 for name, rows in split.items() if name != "base"]))


def ablations(runs):
    print("## Ablations of ampo\n\nAfter 100 steps. ampo itself: comprehension, k=2, four teachers, on failure, γ=0.1, "
          "--follow code.\n")
    default = runs.get(("ablations", "ampo"), {})
    difference = lambda name: "" if name == "ampo" else paired(runs["ablations", name], default, test(1))
    rows = cells(runs, "ablations", study.ABLATIONS, [test(1), test(8), test(32), entropy])
    print(table(["", "seeds", "test @1", "@8", "@32", "entropy × 100", "@1 against the default"],
                [[*row, difference(row[0])] for row in rows]))


def claims(runs):
    print("## More runs of 250 steps\n\nWhat two of the claims compare ampo with, and both methods after the papers' "
          "formulae; then differences, paired by seed.\n")
    print(table(["", "seeds", *COLUMNS], cells(runs, "main", ["ampo", "grpo", "grpo, more steps"], COLUMNS.values()) +
                cells(runs, "claims", study.CLAIMS, COLUMNS.values())))
    find = lambda name: runs.get(("main", name)) or runs.get(("claims", name), {})
    pairs = [(one, "grpo, more steps") for one in ("guide", "ghpo", "ampo")]
    pairs += [("ampo", other) for other in ("select random", "teachers work")]
    pairs += [("ampo, follow paper", other) for other in ("grpo, follow paper", "ampo")]
    print(table(["", *COLUMNS], [[f"{one} − {other}", *(paired(find(one), find(other), f) for f in COLUMNS.values())]
                                 for one, other in pairs]))


def main():
    runs = load(sys.argv[1]) if len(sys.argv) > 1 else load()
    names = [name for name in MAIN if ("main", name) in runs]
    print("# Results\n\nMade by table.py from runs.jsonl; see the README for what they say.\n")
    main_table(runs, names)
    costs(runs, names)
    guides_analysis(runs, names)
    ablations(runs)
    claims(runs)
    print("## Learning rate, on the validation set (one seed)\n")
    print(table(["", "seeds", "@1", "@8", "@32"], cells(runs, "sweep", study.SWEEP, [
        lambda row, k=k: pass_at_k(row, "valid", k) for k in (1, 8, 32)])))


if __name__ == "__main__":
    main()
