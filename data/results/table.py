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


def paired(runs, part, names, base, f):
    """Interval of f(run) - f(base run of the same seed)."""
    out = {}
    for name in names:
        mine = runs.get((part, name), {})
        out[name] = interval([f(mine[s]) - f(base[s]) for s in sorted(mine.keys() & base.keys())])
    return out


def newly_solved(row, base):
    """Guide's analysis: the gain in pass@1 on test, split by whether 16 samples of the base would have held a success."""
    n, within, beyond = row["samples"], 0.0, 0.0
    for now, was in zip(row["test"]["solved"], base["test"]["solved"]):
        inside = ampo.pass_at_k(n, was, 16)
        gain = max(0, now - was) / n
        within, beyond = within + gain * inside, beyond + gain * (1 - inside)
    return 100 * within / len(row["test"]["solved"]), 100 * beyond / len(row["test"]["solved"])


def main():
    runs = load(sys.argv[1]) if len(sys.argv) > 1 else load()
    test = lambda k: lambda row: pass_at_k(row, "test", k)
    last = lambda column: lambda row: row["curves"][column][-1] if "curves" in row else None
    percent = lambda f: lambda row: None if f(row) is None else 100 * f(row)
    tokens = lambda row: sum(row["curves"]["tokens"]) * 10 / 1e6 if "curves" in row else None
    names = [name for name in MAIN if ("main", name) in runs]
    print("# Results\n\nMade by table.py from runs.jsonl; see the README for what they say.\n")
    print("## Test and other families\n\nPer cent solved; the other families at one sample.\n")
    print(table(["", "seeds", "test @1", "@8", "@32", *(name[4:] for name in OOD), "mean of the five"],
                cells(runs, "main", names, [test(1), test(8), test(32)] +
                      [lambda row, s=s: pass_at_k(row, s, 1) for s in OOD] + [ood_mean])))
    grpo = runs.get(("main", "grpo"), {})
    columns = [paired(runs, "main", names, grpo, f) for f in (test(1), test(8), test(32), ood_mean)]
    print("Difference to grpo, paired by seed, and test @1 of each seed:\n")
    each = lambda name: ", ".join(f"{test(1)(row):.1f}" for _, row in sorted(runs["main", name].items()))
    print(table(["", "test @1", "@8", "@32", "mean of the five", "test @1 seed by seed"],
                [[name, *("" if name in ("base", "grpo") else column[name] for column in columns), each(name)]
                 for name in names]))
    print("## What it took\n\nEntropy in nats a token and length in tokens on test at temperature 0.6; failed groups "
          "(%) in the last ten steps; tokens sampled in training (millions); seconds of training on one core, of the fastest seed, as the machine had "
          "other work.\n")
    seconds = lambda name: [row["seconds"] for row in runs["main", name].values() if "seconds" in row]
    costs = cells(runs, "main", names, [lambda row: 100 * row["test"]["entropy"], lambda row: row["test"]["length"],
                                        percent(last("fail_rate")), tokens])
    print(table(["", "seeds", "entropy × 100", "length", "failed groups", "tokens sampled", "seconds"],
                [[*row, str(min(seconds(row[0]), default="–"))] for row in costs]))
    print("## Newly solved problems (Guide's analysis)\n\nPoints of pass@1 gained on test: on problems that the base "
          "solves within 16 samples (self-distillation) and on others (capability gain).\n")
    base = runs.get(("main", "base"), {})
    split = {name: [newly_solved(row, base[s]) for s, row in runs["main", name].items() if s in base] for name in names}
    print(table(["", "self-distillation", "capability gain"],
                [[name, interval([a for a, _ in rows]), interval([b for _, b in rows])]
                 for name, rows in split.items() if name != "base"]))
    ablations = [name for name in study.ABLATIONS if ("ablations", name) in runs]
    reference = runs.get(("ablations", "ampo"), {})
    print("## Ablations of ampo\n\nAfter 100 steps. ampo itself: comprehension, k=2, four teachers, on failure, γ=0.1, "
          "--follow code.\n")
    rows = cells(runs, "ablations", ablations,
                 [test(1), test(8), test(32), lambda row: 100 * row["test"]["entropy"]])
    difference = paired(runs, "ablations", ablations, reference, test(1))
    print(table(["", "seeds", "test @1", "@8", "@32", "entropy × 100", "@1 against the default"],
                [[*row, "" if row[0] == "ampo" else difference[row[0]]] for row in rows]))
    print("## Learning rate, on the validation set (one seed)\n")
    print(table(["", "seeds", "@1", "@8", "@32"], cells(runs, "sweep", study.SWEEP, [
        lambda row, k=k: pass_at_k(row, "valid", k) for k in (1, 8, 32)])))


if __name__ == "__main__":
    main()
