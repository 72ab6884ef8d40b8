"""The figures of the README, from runs.jsonl.

    pip install matplotlib
    python data/results/plot.py [runs.jsonl]         # writes curves.png and pass_at_k.png beside this file
"""
import json
import statistics
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from table import HERE, ampo, load

COLOURS = {"base": "#8a8a8a", "grpo": "#0072b2", "ampo": "#d55e00", "luffy": "#009e73", "guide": "#cc79a7",
           "ghpo": "#8b6d00"}  # told apart by readers who see few colours
STYLES = {"grpo": "-", "ampo": "-", "luffy": "--", "guide": "-.", "ghpo": ":", "base": "--"}


def lines(axis, xs, series, name):
    """The mean over seeds, and each seed as a thin line: an interval would hide that some seeds differ in kind."""
    for values in series if len(series) > 1 else []:
        axis.plot(xs, values, color=COLOURS[name], linewidth=0.8, alpha=0.25)
    mean = [statistics.mean(values) for values in zip(*series)]
    axis.plot(xs, mean, color=COLOURS[name], linestyle=STYLES[name], linewidth=2.2, label=name)


def clean(axis, title, xlabel):
    axis.set_title(title, fontsize=12, loc="left")
    axis.set_xlabel(xlabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def curves(runs):
    """Reward, share of failed groups and entropy of the student's own rollouts over the training steps."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), constrained_layout=True)
    titles = {"reward": "Reward of plain rollouts", "fail_rate": "Share of groups that all failed",
              "entropy": "Entropy (nats a token)"}
    for axis, (column, title) in zip(axes, titles.items()):
        for name in ("grpo", "luffy", "guide", "ghpo", "ampo"):
            series = [row["curves"][column] for row in runs.get(("main", name), {}).values()]
            if series:
                lines(axis, [10 * i + 5 for i in range(len(series[0]))], series, name)
        clean(axis, title, "training step")
    axes[0].legend(frameon=False, fontsize=10)
    figure.savefig(HERE / "curves.png", dpi=130)


def pass_at_k_curves(runs):
    """pass@k of base, grpo and ampo on all of test and on its levels 4 and 5."""
    levels = [json.loads(line)["level"] for line in open(HERE.parent / "test.jsonl")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True, sharey=True)
    ks = [1, 2, 4, 8, 16, 32]
    for axis, hard, title in ((axes[0], (2, 3, 4, 5), "pass@k, test"), (axes[1], (4, 5), "pass@k, its levels 4 and 5")):
        for name in ("base", "grpo", "ampo"):
            rows = runs.get(("main", name), {}).values()
            solved = [[c for c, level in zip(row["test"]["solved"], levels) if level in hard] for row in rows]
            mean = lambda row, k: statistics.mean(ampo.pass_at_k(32, c, k) for c in row)
            lines(axis, ks, [[mean(row, k) for k in ks] for row in solved], name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, ks)
        axis.set_ylim(0, 1)
        clean(axis, title, "k")
    axes[0].legend(frameon=False, fontsize=10, loc="lower right")
    figure.savefig(HERE / "pass_at_k.png", dpi=130)


if __name__ == "__main__":
    loaded = load(sys.argv[1]) if len(sys.argv) > 1 else load()
    curves(loaded)
    pass_at_k_curves(loaded)
