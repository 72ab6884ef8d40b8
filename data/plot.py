"""Pictures of training runs: one's own side by side, or the figures of the study.

    pip install matplotlib
    python data/plot.py runs/ampo-0 runs/grpo-0     # writes runs.png
    python data/plot.py                             # writes the study's figures to data/results

The study's figures, from results/runs.jsonl or the file that --results names:

    curves.png     reward, failed groups and entropy over the training steps
    pass_at_k.png  pass@k of base, grpo and ampo on test
    teachers.png   whose traces ampo learns from over the steps, where the file tells
    shaping.png    f(p) and the weight that it gives the gradient, computed by ampo.py itself
"""
import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, without a screen
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "results"))
import study
import table

import ampo

# Told apart by readers who see few colours (Okabe and Ito), with a line style for print.
PALETTE = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8b6d00", "#56b4e9", "#000000"]
DASHES = ["-", "--", "-.", ":"]
COLOURS = {
    "base": "#8a8a8a", "grpo": "#0072b2", "ampo": "#d55e00",
    "luffy": "#009e73", "guide": "#cc79a7", "ghpo": "#8b6d00",
}
STYLES = {"base": "--", "grpo": "-", "ampo": "-", "luffy": "--", "guide": "-.", "ghpo": ":"}
CURVES = {
    "reward": "Reward of plain rollouts",
    "fail_rate": "Share of groups that all failed",
    "entropy": "Entropy (nats per token)",
}
OWN_CURVES = CURVES | {
    "rescued": "Share of groups rescued by guidance",
    "response_length": "Response length (tokens)",
    "valid": "pass@1 on valid.jsonl",
}


def clean(axis, title, xlabel):
    """Title and label of one panel, with as little frame as reading needs."""
    axis.set_title(title, fontsize=12, loc="left")
    axis.set_xlabel(xlabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def own_style(i):
    """How the i-th line is drawn where lines have no colour of their own."""
    return {
        "color": PALETTE[i % len(PALETTE)],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 2.2,
    }


def draw_seeds(axis, xs, seeds, name):
    """The mean over seeds, and each seed as a thin line.

    An interval would hide that some seeds differ in kind.
    """
    if len(seeds) > 1:
        for ys in seeds:
            axis.plot(xs, ys, color=COLOURS[name], linewidth=0.8, alpha=0.25)
    mean = [statistics.mean(ys) for ys in zip(*seeds)]
    axis.plot(xs, mean, color=COLOURS[name], linestyle=STYLES[name], linewidth=2.2, label=name)


# -------------------------------------------------------------------------------------------------
# One's own runs


def read_column(folder, column):
    """The steps and values of one column of a run's metrics.jsonl, those without a value left out."""
    steps = []
    values = []
    for line in open(Path(folder) / "metrics.jsonl"):
        row = json.loads(line)
        if row.get(column) is not None:
            steps.append(row["step"] + 1)
            values.append(row[column])
    return steps, values


def running_mean(values, width=10):
    """The mean of each value and of those before it, `width` together."""
    means = []
    for end in range(1, len(values) + 1):
        means.append(statistics.mean(values[max(0, end - width):end]))
    return means


def draw_runs(folders, path):
    """Runs side by side: thin what was measured, thick its mean over ten steps."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), constrained_layout=True)
    for axis, (column, title) in zip(axes.flat, OWN_CURVES.items()):
        for i, folder in enumerate(folders):
            steps, values = read_column(folder, column)
            if not values:
                continue
            style = own_style(i)
            if column == "valid":
                axis.plot(steps, values, marker="o", **style)
                continue
            axis.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.3)
            axis.plot(steps, running_mean(values), label=Path(folder).name, **style)
        clean(axis, title, "training step")
        if not axis.lines:  # no run has the column
            axis.set_axis_off()
    axes[0, 0].legend(frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------
# The study


def draw_curves(part, path):
    """Reward, failed groups and entropy of the student's own rollouts, in means of ten steps."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), constrained_layout=True)
    for axis, (column, title) in zip(axes, CURVES.items()):
        for name in ("grpo", "luffy", "guide", "ghpo", "ampo"):
            seeds = [row["curves"][column] for row in part.get(name, {}).values()]
            if seeds:
                draw_seeds(axis, points(seeds[0]), seeds, name)
        clean(axis, title, "training step")
    axes[0].legend(frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def points(values):
    """The training step in the middle of each bin of a curve of the main part."""
    width = study.STUDY["main"].bin
    return [width * (i + 0.5) for i in range(len(values))]


def mean_pass_at_k(row, levels, k):
    """pass@k on the problems of test.jsonl that have one of these levels, from 0 to 1."""
    estimates = []
    problems = open(HERE / "test.jsonl")
    for line, solved in zip(problems, row["test"]["solved"], strict=True):
        if json.loads(line)["level"] in levels:
            estimates.append(ampo.pass_at_k(row["samples"], solved, k))
    return statistics.mean(estimates)


def draw_pass_at_k(part, path):
    """pass@k of base, grpo and ampo on all of test and on its levels 4 and 5."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True, sharey=True)
    panels = {"pass@k, test": (2, 3, 4, 5), "pass@k, its levels 4 and 5": (4, 5)}
    for axis, (title, levels) in zip(axes, panels.items()):
        for name in ("base", "grpo", "ampo"):
            seeds = []
            for row in part.get(name, {}).values():
                seeds.append([mean_pass_at_k(row, levels, k) for k in table.KS])
            if seeds:
                draw_seeds(axis, table.KS, seeds, name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(table.KS, table.KS)
        axis.set_ylim(0, 1)
        clean(axis, title, "k")
    axes[0].legend(frameon=False, fontsize=10, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def count_teachers(seeds):
    """For each bin of steps {teacher: traces learnt from}, all seeds together."""
    curves = [row["curves"]["sources"] for row in seeds.values()]
    counts = []
    for bins in zip(*curves):
        total = Counter()
        for sources in bins:
            total.update(sources)
        del total["student"]
        del total["hint"]
        counts.append(total)
    return counts


def draw_teachers(counts, path):
    """Each teacher's share of the traces learnt from, over the steps."""
    figure, axis = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    names = set().union(*counts)
    for i, name in enumerate(sorted(names)):
        shares = [total[name] / max(1, total.total()) for total in counts]
        axis.plot(points(counts), shares, label=name, **own_style(i))
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=10)
    clean(axis, "Share of the traces that ampo learns from", "training step")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shaping_curves(gamma):
    """p, f(p) and the gradient's weight f'(p) · p, of a trace's tokens with advantage 1.

    The weight is the derivative of ampo.py's objective by log p: SFT's would be 1.
    """
    p = torch.linspace(0.001, 1, 500)
    logps = p.log()[None].requires_grad_()                     # (1, T)
    objective = ampo.policy_objective(
        logps, torch.zeros_like(logps), torch.ones(1), torch.tensor([True]), gamma=gamma
    )
    weight, = torch.autograd.grad(objective.sum(), logps)
    return p, objective[0].detach(), weight[0]


def draw_shaping(path):
    """LUFFY's shaping: which tokens of a trace are learnt from."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    for i, gamma in enumerate((0.01, 0.1, 1.0)):
        p, value, weight = shaping_curves(gamma)
        axes[0].plot(p, value, label=f"γ = {gamma}", **own_style(i))
        axes[1].plot(p, weight, **own_style(i))
    axes[0].plot(p, p, color=COLOURS["base"], linewidth=1, label="p itself")
    axes[1].plot(p, p, color=COLOURS["base"], linewidth=1)
    clean(axes[0], "f(p) = p / (p + γ)", "p, the student's probability of a token")
    clean(axes[1], "Weight of its gradient, f′(p) · p", "p, the student's probability of a token")
    axes[0].legend(frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_study(results, folder):
    """All figures of the study."""
    part = table.load(results)["main"]
    draw_curves(part, folder / "curves.png")
    draw_pass_at_k(part, folder / "pass_at_k.png")
    seeds = part.get("ampo", {})
    if seeds and all("sources" in row["curves"] for row in seeds.values()):
        draw_teachers(count_teachers(seeds), folder / "teachers.png")
    draw_shaping(folder / "shaping.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs; none: the study's figures")
    parser.add_argument("--results", type=Path, default=study.RESULTS,
                        help="lines of the study, written by study.py")
    parser.add_argument("--out", type=Path,
                        help="where to draw: a file for runs [runs.png], else a folder")
    args = parser.parse_args(argv)
    for run in args.runs:
        if not (Path(run) / "metrics.jsonl").exists():
            parser.error(f"{run}: no folder of a run, which would hold metrics.jsonl")
    if args.runs:
        draw_runs(args.runs, args.out or Path("runs.png"))
    else:
        draw_study(args.results, args.out or HERE / "results")


if __name__ == "__main__":
    main()
