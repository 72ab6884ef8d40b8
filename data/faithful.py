"""Is an update the published one? Each row of RECIPES, with its own method, against its formula.

    python data/faithful.py                 # a Markdown table; half a minute on one core

The student is data/base after one update on the first problems of data/train.jsonl. Its rollouts,
and the guidance of those that failed, are real ones. Compared is the gradient of the next update on
them, as ampo.update has it before the clip at norm 1, with that of the formula written out below:
one response at a time, without padding, means as they are written, gradients by autograd. The first
update moves the policy from what was sampled, so that the on-policy clip acts.

Of ampo.py it takes the samples alone (prompt, ids, old_logps, reward, off_policy): rewards,
triggers, traces, hints and the optimizer are not compared. Of what the official code does besides,
both sides leave out: old log-probabilities computed anew by the trainer; dual clip and clamped
ratios (AMPO); weights that depend on the packing of micro-batches (AMPO, LUFFY); groups dropped and
refilled (Guide); one update a batch (GHPO); the clip of f in AMPO's paper, which does nothing where
A is positive, as for its traces. Guide's code takes γ of each response, padding included, here it
is one number of the update: what this costs stands below the table.
"""
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float32 on the CPU: nothing but the formulas can differ
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import ampo  # before torch: it sets how OpenMP's threads wait

import torch

LONGEST = 128  # tokens allowed in a response


def read(model, sample):
    """What the formulas need of a response of T tokens, by a forward pass of its own."""
    logits = model(torch.tensor([sample.prompt + sample.ids])).logits[0]      # (L, V)
    all_logps = logits[len(sample.prompt) - 1:-1].log_softmax(-1)             # (T, V)
    logps = all_logps[range(len(sample.ids)), sample.ids]
    return SimpleNamespace(
        ratio=(logps - torch.tensor(sample.old_logps)).exp(),                 # (T,)
        entropy=-(all_logps.exp() * all_logps).sum(-1),                       # (T,)
        reward=sample.reward, off_policy=sample.off_policy,
    )


# -------------------------------------------------------------------------------------------------
# The formulas. An update is a list of groups, and a group a list of responses.


def advantages_of(group, std_eps=None):
    """A = R - mean(R), or that divided by std(R) + std_eps, with n - 1 in std."""
    mean = sum(response.reward for response in group) / len(group)
    advantages = [response.reward - mean for response in group]
    if std_eps is not None:
        std = math.sqrt(sum(a * a for a in advantages) / (len(group) - 1))
        advantages = [a / (std + std_eps) for a in advantages]
    return advantages


def objective(response, advantage, eps=0.2, gamma=0.1):
    """Of each token (T,): LUFFY's f off-policy, PPO's clip on-policy."""
    ratio = response.ratio
    if response.off_policy:
        return advantage * ratio / (ratio + gamma)
    return torch.min(ratio * advantage, ratio.clip(1 - eps, 1 + eps) * advantage)


def of_group(group, std_eps=None, **settings):
    pairs = zip(group, advantages_of(group, std_eps))
    return [objective(response, advantage, **settings) for response, advantage in pairs]


def of_all(groups, **settings):
    return sum([of_group(group, **settings) for group in groups], [])


def mean_entropy(groups):  # traces included
    return torch.cat([response.entropy for response in sum(groups, [])]).mean()


def mean_of_means(responses):
    return torch.stack([tokens.mean() for tokens in responses]).mean()


def sum_over_constant(responses):
    return torch.cat(responses).sum() / LONGEST / len(responses)


def grpo_paper(groups):
    return mean_of_means(of_all(groups, std_eps=1e-6))


def luffy_code(groups):
    return sum_over_constant(of_all(groups, eps=math.inf)) + 0.001 * mean_entropy(groups)


def luffy_paper(groups):
    return torch.cat(of_all(groups, eps=math.inf)).mean() + 0.01 * mean_entropy(groups)


def ampo_code(groups):
    return sum_over_constant(of_all(groups)) + 0.001 * mean_entropy(groups)


def ampo_paper(groups):
    """Eq. 7: traces by the mean of their means, rollouts by the mean over all of their tokens."""
    pairs = list(zip(sum(groups, []), of_all(groups, std_eps=1e-6)))
    traces = [tokens for response, tokens in pairs if response.off_policy]
    rollouts = [tokens for response, tokens in pairs if not response.off_policy]
    return mean_of_means(traces) + torch.cat(rollouts).mean() + 0.001 * mean_entropy(groups)


def guided_gamma(responses):
    ratios = [response.ratio.detach() for response in responses]
    return max(1e-4, torch.cat(ratios).quantile(0.9).item())


def guide_code(groups):
    """A group without signal is dropped before γ is taken."""
    kept = [group for group in groups if any(advantages_of(group))]
    gamma = guided_gamma([response for response in sum(kept, []) if response.off_policy])
    return mean_of_means(of_all(groups, std_eps=1e-6, gamma=gamma))


def guide_own_gamma(groups):
    """γ of each response."""
    responses = []
    for group in groups:
        for response, advantage in zip(group, advantages_of(group, 1e-6)):
            responses.append(objective(response, advantage, gamma=guided_gamma([response])))
    return mean_of_means(responses)


def ghpo_code(groups):
    """The mean over groups of the mean over a group's tokens."""
    return mean_of_means([torch.cat(of_group(group, std_eps=1e-4)) for group in groups])


FORMULAS = {
    ("grpo", "paper"): grpo_paper, ("luffy", "code"): luffy_code, ("luffy", "paper"): luffy_paper,
    ("ampo", "code"): ampo_code, ("ampo", "paper"): ampo_paper, ("guide", "code"): guide_code,
    ("ghpo", "code"): ghpo_code,
}


class Recorder(torch.optim.SGD):
    """An optimizer that moves nothing and keeps the gradient that it is given."""

    def step(self, closure=None):
        self.gradient = torch.cat([w.grad.flatten() for w in self.param_groups[0]["params"]])


def prepare(row, count=12):
    """A student after one update, and the groups of that update with their advantages."""
    cfg = ampo.Config(method=row[0], follow=row[1], max_new_tokens=LONGEST)
    student = ampo.load_student(str(HERE / "base"), cfg)
    problems = ampo.load_problems(HERE / "train.jsonl")[:count]
    torch.manual_seed(0)
    rollouts = ampo.rollout(student, problems, [problem.question for problem in problems])
    groups = student.method.guide(student, problems, rollouts)
    groups = ampo.add_advantages(student, groups)
    ampo.update(student, torch.optim.AdamW(student.model.parameters(), 1e-3), groups)
    return student, groups


def compare(student, groups, formula):
    """-> cosine of the two gradients, their norms' relative difference, clipped share of tokens."""
    optimizer = Recorder(student.model.parameters(), lr=0.0)
    sums = ampo.update(student, optimizer, groups)
    ours = optimizer.gradient * max(1.0, sums["grad_norm"])
    read_groups = []
    for group in groups:
        read_groups.append([read(student.model, sample) for sample in group])
    theirs = torch.autograd.grad(-formula(read_groups), list(student.model.parameters()))
    theirs = torch.cat([gradient.flatten() for gradient in theirs]).double()
    ours = ours.double()
    cosine = torch.cosine_similarity(ours, theirs, dim=0).item()
    difference = (ours.norm() / theirs.norm() - 1).item()
    return cosine, difference, sums["clipped"] / max(1, sums["tokens"])


def main():
    print("| recipe and method | responses | off-policy | clipped | cosine | norm |")
    print("|---|---|---|---|---|---|")
    for row, formula in FORMULAS.items():
        student, groups = prepare(row)
        samples = sum(groups, [])
        off_policy = sum(sample.off_policy for sample in samples)
        cosine, difference, clips = compare(student, groups, formula)
        print(f"| {' '.join(row)} | {len(samples)} | {off_policy} | {100 * clips:.0f} % "
              f"| {cosine:.6f} | {difference:+.1e} |")
        if row == ("guide", "code"):
            own, _, _ = compare(student, groups, guide_own_gamma)
    print(f"\nGuide against its formula with γ of each response: cosine {own:.5f}")


if __name__ == "__main__":
    main()
