"""AMPO and its relatives in one file: RL with verifiable rewards, and guidance on failure.

A language model, the student, samples a group of G responses to each problem. A verifier marks
them right or wrong. The advantage A of a response is its reward minus the mean of its group, and
the policy gradient makes responses with A > 0 likelier, those with A < 0 less likely. Where every
response is wrong there is nothing to learn from, and these are the problems one would most like to
learn. The published answers stand here side by side, each in one small function guide_*. A trace
is a teacher's full response to a problem; slot 0 is the first place of a group:

    --method  which groups  the new responses        sampled with   trained with  off-policy
    grpo      -             -                        -              question      no
    luffy     all           a trace, in slot 0       -              question      f, γ = 0.1
    ampo      all failed    the k traces that the    -              question      f, γ = 0.1
                            student comprehends best
    guide     all failed    the student's            its hint       question      f, γ measured
    ghpo      all failed    the student's            a prefix of    that prompt   no
                                                     the solution
    sft       all           all traces, no rollouts  -              question      log p
    rl_sft    all           a trace, in slot 0       -              question      log p

    python ampo.py                                   # AMPO on the embedded miniature
    python ampo.py --method grpo                     # another method; --help lists all flags
    python ampo.py eval --model runs/ampo-0/model    # pass@k of a checkpoint

Every sample carries the prompt it is trained on, and old_logps, the log-probability of its tokens
under whatever produced them: the sampler's, for guide those under the hint, and 0 for a trace: the
teacher's own probability of it, π_φ, is taken as 1. With ratio = exp(logps - old_logps), all
methods share one objective, to be maximised:

    on-policy     min(ratio · A, clip(ratio, 1-ε, 1+ε) · A)      ε = 0.2, the clip
    off-policy    A · f(ratio),   f(x) = x / (x + γ)             γ, the shaping

The method: §1 what the file is about, §2 the objective, §3 guidance, §4 one training step. What
runs it: §5 log-probabilities, §6 sampling, §7 answer verification, §8 running. Data flows one way:
problem -> prompt -> rollouts -> verdicts -> guidance -> advantages -> objective -> update.

Shapes: P problems, G rollouts of each, B sequences, L tokens of prompt and response, T tokens of
a response, V vocabulary, H hidden size. Log-probabilities are in nats; `ids` are lists of tokens.

Papers: AMPO arXiv 2510.02227, LUFFY 2504.14945, Guide 2506.13923, GHPO 2507.10628, GRPO
2402.03300. How each of them turns rewards into a loss is a row of RECIPES. What else they do, and
whether it is followed here, is listed in data/README.md. "(code)" and "(paper)" tell where a
detail was read: in the authors' code or in their paper.

Left out: KL penalty and dual clipping, several GPUs and serving engines (data/to_verl.py leads to
verl), LoRA (peft), recurrent models (refused), rewards other than the verifier's, tools and chat.
"""
import argparse
import copy
import functools
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path

# OpenMP threads keep their core busy while they wait. Without this limit, and beside one other busy
# process on two cores, a step takes half as long again.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import mpmath
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging

# =================================================================================================
# §1 What the file is about


@dataclass(frozen=True)
class Problem:
    """One line of a JSONL file. Only question and answer are required; see data/README.md."""

    question: str
    answer: str
    teachers: dict = field(default_factory=dict)  # name -> a full response that ends in the answer
    hint: str = ""                                # Guide: a complete alternative user message
    solution: str = ""                            # GHPO: its beginning is shown to the student
    system: str = ""                              # a system prompt of its own
    where: str = ""                               # file:line, for messages


@dataclass(frozen=True)
class Sample:
    """One response and all that is needed to train on it."""

    prompt: list              # ids it is trained on; it may have been sampled with others
    ids: list                 # response tokens, the end token included
    old_logps: list           # one per token, under whatever produced it; 0 for a trace
    text: str
    correct: bool             # what the verifier says
    reward: float
    source: str = "student"   # student, hint, or a teacher's name
    off_policy: bool = False
    advantages: list = ()     # one per token, from add_advantages
    old_values: list = ()     # one per token, where there is a value head
    weight: float = 0.0       # of each of its tokens in one update, from token_weights


@dataclass(frozen=True)
class Recipe:
    """How a publication turns rewards into a loss. A row of RECIPES."""

    std: bool                  # divide advantages by the group's standard deviation
    average: str               # over tokens; token_weights lists the kinds
    clip_eps: float            # of the on-policy clip; infinity: none
    right_reward: float        # for a right answer
    format_reward: float       # for an answer that can be read, right or wrong
    entropy_coef: float        # of the bonus, a mean over all response tokens of an update
    std_eps: float = 1e-6      # added to the standard deviation
    trace_reward: float = None  # of every trace, verified before; None: as for any response


@dataclass(frozen=True)
class Method:
    """All that a method changes; the rest of this file is shared."""

    guide: callable               # (student, problems, groups) -> groups
    recipe: str                   # its own conventions; --recipe chooses others
    needs: str = ""               # the field of Problem that it lives on
    rollouts: bool = True
    imitates: bool = False        # traces are learnt by log p, with A = 1, outside the group's mean
    measured_gamma: bool = False  # Guide: γ is the 90th percentile of the guided ratio


@dataclass
class Student:
    """What every step works with: the model in training, its sampler, the settings."""

    model: torch.nn.Module          # float32 weights
    rollout_model: torch.nn.Module  # what samples: the model itself; on a GPU a bfloat16 copy
    tokenizer: object
    value_head: torch.nn.Linear     # on the last hidden state, for --advantage gae
    eos: list                       # ids that end a rollout; the first one ends a trace
    cfg: object                     # Config, the settings of the run (§8)
    method: Method
    recipe: Recipe
    generate: callable              # the sampler: generate (§6) or another of its signature
    tokens_sampled: int = 0         # by rollout(), guidance included


# =================================================================================================
# §2 The objective


def group_advantages(rewards, std=False, std_eps=1e-6):
    """Advantage of each response over its group: rewards (P, G) -> (P, G).

    A = R - mean(R), with `std` divided by the unbiased std(R) + std_eps (GRPO; AMPO Eq. 6). The
    group is the one after guidance, traces included. A group of equal rewards gets exactly 0,
    not rounding noise over a tiny std.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]))
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), std=True)
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + std_eps)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def policy_objective(
    logps, old_logps, advantages, off_policy, clip_eps=0.2, gamma=0.1, shaping="f"
):
    """The objective of each token, to be maximised (AMPO Eq. 7, LUFFY Eq. 6).

    on-policy rows:   min(ratio · A, clip(ratio, 1-ε, 1+ε) · A)
    off-policy rows:  f(ratio) · A,  f(x) = x / (x + γ). Its derivative by log x is γx / (x + γ)²:
                      largest at x = γ, small for sure tokens and for hopeless ones. shaping
                      "ratio" takes x in place of f(x), "log" takes log x.

    logps, old_logps (B, T); advantages (B,) or (B, T); off_policy (B,) bool -> (B, T), neither
    masked nor averaged. A trace has old_logps = 0: its ratio is the student's probability of the
    token. AMPO's paper clips f as well; for A ≥ 0 this changes nothing, as f < 1 < 1 + ε.

    >>> p = torch.tensor([[0.2, 0.6], [0.9, 0.1]])
    >>> old_p = torch.tensor([[0.2, 0.2], [1.0, 1.0]])
    >>> off_policy = torch.tensor([False, True])
    >>> policy_objective(p.log(), old_p.log(), torch.tensor([1.0, 1.0]), off_policy)
    tensor([[1.0000, 1.2000],
            [0.9000, 0.5000]])
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]                       # (B, 1)
    # exp(20) is far outside any clip, and keeps inf / inf = nan out of f.
    log_ratio = (logps - old_logps).clamp(max=20)              # (B, T)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    on = torch.minimum(ratio * advantages, clipped * advantages)
    if shaping == "f":
        off = ratio / (ratio + gamma) * advantages
    elif shaping == "ratio":
        off = ratio * advantages
    else:
        off = log_ratio * advantages
    return torch.where(off_policy[:, None], off, on)


def token_weights(groups, recipe, max_new_tokens):
    """The weight of each sample's tokens in the loss: for each group a number per sample.

    All sums run over the whole update, so that the gradient cannot depend on how it is cut into
    micro-batches. recipe.average:

    "constant"    1 / (sequences · longest response allowed)      AMPO and LUFFY, code
    "responses"   mean over responses of their token means        GRPO, paper; Guide, code
    "groups"      mean over groups of the mean over their tokens  GHPO, code
    "tokens"      one mean over all tokens of both kinds          LUFFY, paper (Eq. 6)
    "split"       off-policy: mean of response means,             AMPO, paper (Eq. 7)
                  on-policy: mean over tokens
    """
    samples = flatten(groups)
    off_policy = [sample for sample in samples if sample.off_policy]
    on_policy_tokens = tokens_of(samples) - tokens_of(off_policy)

    def weight(sample, group):
        if recipe.average == "constant":
            return 1 / (len(samples) * max_new_tokens)
        if recipe.average == "responses":
            return 1 / (len(samples) * len(sample.ids))
        if recipe.average == "groups":
            return 1 / (len(groups) * tokens_of(group))
        if recipe.average == "tokens":
            return 1 / tokens_of(samples)
        if sample.off_policy:
            return 1 / (len(off_policy) * len(sample.ids))
        return 1 / on_policy_tokens

    weights = []
    for group in groups:
        weights.append([weight(sample, group) for sample in group])
    return weights


def gae(values, rewards, mask, gae_lambda=0.95):
    """Generalised advantage estimation, undiscounted, with the reward at the last token.

    values (B, T), rewards (B,), mask (B, T) -> (B, T):
    A_t = δ_t + λ·A_{t+1},  δ_t = r_t + V_{t+1} - V_t  (Schulman et al. 2016, Eq. 16)

    >>> values = torch.tensor([[0.5, 0.5, 0.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> gae(values, torch.tensor([1.0]), mask, gae_lambda=0.5)
    tensor([[0.2500, 0.5000, 0.0000]])
    """
    values = values * mask                                     # nothing comes after the last token
    last = mask.sum(dim=1) - 1                                 # (B,)
    next_advantage = torch.zeros_like(rewards)                 # (B,)
    next_value = torch.zeros_like(rewards)
    advantages = torch.zeros_like(values)                      # (B, T)
    for t in reversed(range(values.shape[1])):
        delta = rewards * (last == t) + next_value - values[:, t]
        next_advantage = delta + gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def value_loss(values, old_values, advantages, clip_eps=0.2):
    """Half the squared error of the value head against the returns, old values + A; all (B, T).

    Of two errors the larger one counts: that of the values, and that of the values clipped to old
    values ± clip_eps. It is in PPO's code, not in its paper.
    """
    returns = old_values + advantages
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


# =================================================================================================
# §3 Guidance: what each method does with a failed group

# A group is a list of Samples of one problem; `groups` has one for each of `problems`.
# In the examples, `student` is data/base with G = 4, `problem` is "Solve 3*(4*x+2)-4=20." with
# traces of the teachers undo, work and secant, a hint and a solution, and `wrong` and `right` are
# two rollouts of it.


def needs_guidance(group, trigger="fail"):
    """fail: no rollout is correct (AMPO Eq. 3). half: fewer than half are (AMPO's second release).
    always: every group.

    >>> needs_guidance([wrong, wrong]), needs_guidance([wrong, right])
    (True, False)
    >>> needs_guidance([right, wrong, wrong], "half"), needs_guidance([right], "always")
    (True, True)
    """
    correct = sum(sample.correct for sample in group)
    if trigger == "always":
        return True
    if trigger == "half":
        return correct < len(group) / 2
    return correct == 0


def teacher_samples(student, problem):
    """The problem's traces as off-policy samples. π_φ is taken as 1, so old_logps are 0.

    Traces longer than the student may write are left out. `correct` is what the verifier says,
    whatever the recipe's trace_reward.

    >>> [(s.source, len(s.ids), s.reward) for s in teacher_samples(student, problem)]
    [('undo', 41, 1.0), ('work', 28, 1.0), ('secant', 45, 1.0)]
    """
    prompt = prompt_of(student, problem)
    samples = []
    for name, text in problem.teachers.items():
        ids = encode(student.tokenizer, text) + student.eos[:1]
        if not text or len(ids) > student.cfg.max_new_tokens:
            continue
        correct, reward = verdict(student.recipe, problem, text)
        if student.recipe.trace_reward is not None:
            reward = student.recipe.trace_reward
        sample = Sample(prompt, ids, [0.0] * len(ids), text, correct, reward, name, off_policy=True)
        samples.append(sample)
    return samples


@torch.no_grad()
def comprehension(model, tokenizer, problem, traces, mean="arithmetic", system=""):
    r"""How well the student understands each trace: r_p, the probability of the gold answer after
    it (AMPO Eq. 5).

    The gold answer takes the place of the trace's final answer, and only its tokens are scored.
    mean: "arithmetic", of the tokens' probabilities (code), or "geometric" (paper: exp of the mean
    log p). Returns a number in [0, 1] for each trace, 0 for one without \boxed{ or <answer>.

    >>> traces = [problem.teachers["undo"], problem.teachers["secant"], "20+4=24"]
    >>> [round(r, 1) for r in comprehension(student.model, student.tokenizer, problem, traces)]
    [1.0, 0.2, 0.0]
    """
    if not traces:
        return []
    prompt = encode_prompt(tokenizer, problem.question, problem.system or system)
    leads = [trace_lead(trace) for trace in traces]
    contexts = []
    answers = []
    for lead in leads:
        before, answer = cut_answer(tokenizer, lead, problem.answer)
        contexts.append(prompt + before)
        answers.append(answer)
    logps, mask = token_logps(model, contexts, answers)        # (B, T)
    scores = []
    for lead, row, row_mask in zip(leads, logps, mask):
        answer_logps = row[row_mask]
        if not lead:
            score = 0.0
        elif mean == "geometric":
            score = answer_logps.mean().exp().item()
        else:
            score = answer_logps.exp().mean().item()
        scores.append(score)
    return scores


def trace_lead(trace):
    r"""A trace up to where its final answer begins; empty where it has no \boxed{ or <answer>.

    A space follows <answer>: the trace's own, or one that is added (code).

    >>> trace_lead("so <answer>5</answer>"), trace_lead(r"2+3 \boxed{5}"), trace_lead("2+3=5")
    ('so <answer> ', '2+3 \\boxed{', '')
    """
    marks = list(re.finditer(r"\\boxed\{|<answer>\s*", trace))
    if not marks:
        return ""
    lead = trace[:marks[-1].end()]
    if lead.endswith("<answer>"):
        return lead + " "
    return lead


def cut_answer(tokenizer, lead, answer):
    """Ids of lead + answer, cut where the answer begins: with the first token that it changes.

    A token may span both, as "{-" does.
    """
    whole = encode(tokenizer, lead + answer)
    start = len(os.path.commonprefix([encode(tokenizer, lead), whole]))
    return whole[:start], whole[start:]


def choose_traces(student, problem, k):
    """The k traces to learn from: those the student comprehends best, in a tie the shorter ones.

    --select random, shortest or longest chooses otherwise.

    >>> sorted(trace.source for trace in choose_traces(student, problem, 2))
    ['undo', 'work']
    """
    cfg = student.cfg
    traces = sorted(teacher_samples(student, problem), key=lambda trace: len(trace.ids))
    order = list(range(len(traces)))                           # --select shortest
    if cfg.select == "longest":
        order.reverse()
    elif cfg.select == "random":
        order = torch.randperm(len(traces)).tolist()
    elif cfg.select == "comprehension":
        kind = comprehension_mean(cfg)
        texts = [trace.text for trace in traces]
        scores = comprehension(
            student.rollout_model, student.tokenizer, problem, texts, kind, cfg.system
        )
        scores = torch.tensor(scores)
        if kind == "arithmetic":
            scores = scores.bfloat16()  # as the official code does; its coarse steps make ties
        order = scores.argsort(descending=True, stable=True).tolist()
    return [traces[i] for i in order][:k]


def comprehension_mean(cfg):
    """Which mean comprehension takes: the code's, or the paper's under --follow paper."""
    return "geometric" if cfg.follow == "paper" else "arithmetic"


def swap_in(traces, group):
    """The group with each trace in the place of an incorrect rollout, chosen at random (Eq. 4).

    >>> [s.source for s in swap_in(teacher_samples(student, problem)[:1], [right, wrong, right])]
    ['student', 'undo', 'student']
    """
    incorrect = [i for i, sample in enumerate(group) if not sample.correct]
    order = torch.randperm(len(incorrect)).tolist()
    group = list(group)
    for j, trace in zip(order, traces):
        group[incorrect[j]] = trace
    return group


def guide_grpo(student, problems, groups):
    """GRPO: nothing. A failed group has no signal, but for a format reward where there is one.

    >>> guide_grpo(student, [problem], [[wrong] * 4]) == [[wrong] * 4]
    True
    """
    return groups


def guide_luffy(student, problems, groups):
    """LUFFY: the first teacher's trace takes slot 0 of every group, failed or not.

    >>> [s.source for s in guide_luffy(student, [problem], [[right] * 4])[0]]
    ['undo', 'student', 'student', 'student']
    """
    guided = []
    for problem, group in zip(problems, groups):
        trace = teacher_samples(student, problem)[:1]
        guided.append(trace + group[len(trace):])
    return guided


def guide_ampo(student, problems, groups):
    """AMPO: in a failed group, the k traces that the student comprehends best replace k failures.

    Under --trigger half they fill the group up to half.

    >>> groups = [[wrong, wrong, wrong, wrong], [wrong, right, wrong, wrong]]
    >>> failed, mixed = guide_ampo(student, [problem, problem], groups)
    >>> sorted(s.source for s in failed), sorted(s.source for s in mixed)
    (['student', 'student', 'undo', 'work'], ['student', 'student', 'student', 'student'])
    """
    cfg = student.cfg
    guided = []
    for problem, group in zip(problems, groups):
        if needs_guidance(group, cfg.trigger):
            k = cfg.k
            if cfg.trigger == "half":
                k = len(group) // 2 - sum(sample.correct for sample in group)
            group = swap_in(choose_traces(student, problem, k), group)
        guided.append(group)
    return guided


def sample_again(student, problems, groups, messages, trigger="fail"):
    """New rollouts for groups that need guidance: {index of a group: rollouts of its message}.

    A problem whose message is empty gets none.

    >>> groups = [[right, wrong], [wrong, wrong]]
    >>> again = sample_again(student, [problem, problem], groups, [problem.hint, problem.hint])
    >>> [(i, len(group)) for i, group in again.items()]
    [(1, 4)]
    """
    todo = []
    for i, group in enumerate(groups):
        if messages[i] and needs_guidance(group, trigger):
            todo.append(i)
    rollouts = rollout(student, [problems[i] for i in todo], [messages[i] for i in todo])
    return dict(zip(todo, rollouts))


def guide_guide(student, problems, groups):
    """Guide: rollouts of a failed group's hinted message train the plain prompt.

    Their old_logps stay those under the hint: their ratio is π(·|q) / π_old(·|q, hint). They
    replace the group (code) or join it (paper, by third-party accounts).

    >>> (hinted,) = guide_guide(student, [problem], [[wrong] * 4])
    >>> {(s.source, s.off_policy, s.prompt == wrong.prompt) for s in hinted}
    {('hint', True, True)}
    """
    hints = [problem.hint for problem in problems]
    again = sample_again(student, problems, groups, hints, student.cfg.trigger)
    guided = list(groups)
    for i, hinted in again.items():
        prompt = prompt_of(student, problems[i])
        hinted = [replace(s, prompt=prompt, off_policy=True, source="hint") for s in hinted]
        if student.cfg.follow == "paper":
            hinted = groups[i] + hinted
        guided[i] = hinted
    return guided


def guide_ghpo(student, problems, groups):
    """GHPO: show more and more of the solution until a new group has a success.

    The new group is trained on the prompt it was sampled with (Eq. 1). The one at ω = ¾ is kept
    even if it failed: its format can still be learnt (code).

    >>> (rescued,) = guide_ghpo(student, [problem], [[wrong] * 4])
    >>> {(s.source, s.off_policy, s.prompt == wrong.prompt) for s in rescued}
    {('hint', False, False)}
    """
    guided = list(groups)
    for share in GHPO_SHARES:
        messages = [solution_prefix(problem, share) for problem in problems]
        for i, hinted in sample_again(student, problems, guided, messages).items():
            if share == GHPO_SHARES[-1] or not needs_guidance(hinted):
                guided[i] = [replace(sample, source="hint") for sample in hinted]
    return guided


GHPO_SHARES = (0.25, 0.5, 0.75)  # ω: how much of the solution is shown
GHPO_LEAD = (
    "\n The following text is the beginning part of the answer, "
    "which you can refer to for solving the problem:\n"
)


def solution_prefix(problem, share):
    """GHPO's message: the question and the first share of its solution; empty without one."""
    if not problem.solution:
        return ""
    prefix = problem.solution[:round(share * len(problem.solution))]
    return problem.question + GHPO_LEAD + prefix


def guide_sft(student, problems, groups):
    """SFT: no rollouts, all traces of all teachers.

    >>> [s.source for s in guide_sft(student, [problem], [[]])[0]]
    ['undo', 'work', 'secant']
    """
    return [teacher_samples(student, problem) for problem in problems]


METHODS = {
    "grpo": Method(guide_grpo, "grpo"),
    "luffy": Method(guide_luffy, "luffy", needs="teachers"),
    "ampo": Method(guide_ampo, "ampo", needs="teachers"),
    "guide": Method(guide_guide, "guide", needs="hint", measured_gamma=True),
    "ghpo": Method(guide_ghpo, "ghpo", needs="solution"),
    "sft": Method(guide_sft, "ampo", needs="teachers", rollouts=False, imitates=True),
    "rl_sft": Method(guide_luffy, "luffy", needs="teachers", imitates=True),
}

RECIPES = {
    #                          std    average      clip_eps  right format entropy
    ("grpo", "paper"):  Recipe(True,  "responses", 0.2,      1.0,  0.0,   0.0),
    ("luffy", "code"):  Recipe(False, "constant",  math.inf, 1.0,  0.0,   0.001),
    ("luffy", "paper"): Recipe(False, "tokens",    math.inf, 1.0,  0.0,   0.01),
    ("ampo", "code"):   Recipe(False, "constant",  0.2,      0.9,  0.1,   0.001, trace_reward=1.0),
    ("ampo", "paper"):  Recipe(True,  "split",     0.2,      0.9,  0.1,   0.001, trace_reward=1.0),
    ("guide", "code"):  Recipe(True,  "responses", 0.2,      1.0,  0.0,   0.0),
    ("ghpo", "code"):   Recipe(True,  "groups",    0.2,      1.0,  0.5,   0.0,   std_eps=1e-4),
}


# =================================================================================================
# §4 One training step


def train_step(student, optimizer, problems):
    """problems -> rollouts -> verdicts -> guidance -> advantages -> updates.

    Returns the metrics of the step, and under "example" what responses.jsonl says of it.
    """
    method = student.method
    student.tokens_sampled = 0
    start = time.perf_counter()

    rollouts = [[] for _ in problems]
    if method.rollouts:
        rollouts = rollout(student, problems, [problem.question for problem in problems])
    sampled = time.perf_counter()

    groups = method.guide(student, problems, rollouts)
    guided = time.perf_counter()

    groups = add_advantages(student, groups)
    updates = []
    for minibatch in chunks(groups, math.ceil(len(groups) / student.cfg.num_minibatches)):
        updates.append(update(student, optimizer, minibatch))
    end = time.perf_counter()

    return step_metrics(rollouts, groups, updates) | {
        "rollout_s": sampled - start,
        "guide_s": guided - sampled,
        "update_s": end - guided,
        "tokens": student.tokens_sampled,
        "example": readable(problems[0], rollouts[0], groups[0]),
    }


def verdict(recipe, problem, text):
    r"""Is a response correct, and what is its reward?

    >>> texts = [r"8-2=6 \boxed{6/4}", r"8-2=6 \boxed{6}", "8-2=6"]
    >>> [verdict(student.recipe, problem, text) for text in texts]
    [(True, 1.0), (False, 0.1), (False, 0.0)]
    """
    correct = verify(text, problem.answer, problem.question)
    reward = recipe.right_reward * correct
    if recipe.format_reward:
        reward += recipe.format_reward * gives_answer(text, problem.answer, problem.question)
    return correct, reward


def rollout(student, problems, messages):
    """G verified rollouts of each message. Adds their tokens to student.tokens_sampled.

    They train on the prompt they were sampled with. --cache_tokens says how many share a pass.

    >>> (group,) = rollout(student, [problem], [problem.question])
    >>> len(group), group[0].prompt == encode_prompt(student.tokenizer, problem.question)
    (4, True)
    """
    cfg = student.cfg
    prompts = []
    for problem, message in zip(problems, messages):
        prompts.append(prompt_of(student, problem, message))
    longest = max([len(prompt) for prompt in prompts], default=0) + cfg.max_new_tokens
    size = max(1, cfg.cache_tokens // (cfg.group_size * longest))
    responses = []
    for part in chunks(prompts, size):
        responses += student.generate(
            student.rollout_model, part, cfg.group_size, cfg.max_new_tokens, cfg.temperature,
            student.eos,
        )
    groups = []
    for problem, prompt, pairs in zip(problems, prompts, responses):
        group = []
        for ids, logps in pairs:
            text = student.tokenizer.decode(ids, skip_special_tokens=True)
            correct, reward = verdict(student.recipe, problem, text)
            group.append(Sample(prompt, ids, logps, text, correct, reward))
        groups.append(group)
    student.tokens_sampled += tokens_of(flatten(groups))
    return groups


def add_advantages(student, groups):
    """The groups with the advantages of each sample, one per token."""
    cfg = student.cfg
    recipe = student.recipe
    done = []
    for group in groups:
        imitated = []
        if student.method.imitates:
            imitated = [sample for sample in group if sample.off_policy]
            group = [sample for sample in group if not sample.off_policy]
        if cfg.advantage == "gae":
            group = with_gae(student, group)
        elif group:
            rewards = torch.tensor([[sample.reward for sample in group]])        # (1, G)
            advantages = group_advantages(rewards, recipe.std, recipe.std_eps)[0].tolist()
            group = [with_advantage(sample, a) for sample, a in zip(group, advantages)]
        done.append(group + [with_advantage(sample, 1.0) for sample in imitated])
    return done


def with_advantage(sample, advantage):
    """The sample with the same advantage for all its tokens."""
    return replace(sample, advantages=[advantage] * len(sample.ids))


@torch.no_grad()
def with_gae(student, group):
    """The PPO form of Guide: advantages from the value head, by GAE."""
    done = []
    for batch in micro_batches(group, student.cfg.micro_tokens):
        _, mask, _, values = score_samples(student, batch)                       # (B, T)
        rewards = torch.tensor([sample.reward for sample in batch]).to(values)   # (B,)
        advantages = gae(values, rewards, mask, student.cfg.gae_lambda)
        for sample, a, v, keep in zip(batch, advantages, values, mask):
            sample = replace(sample, advantages=a[keep].tolist(), old_values=v[keep].tolist())
            done.append(sample)
    return done


def update(student, optimizer, groups):
    """One optimizer step on whole groups. Returns grad_norm and sums over on-policy tokens.

    A sample without advantage has no gradient but that of the entropy bonus. Without a bonus it is
    left out before it costs a forward pass. Where no sample has an advantage, nothing moves: Adam
    would make full steps out of the bonus alone.
    """
    cfg = student.cfg
    recipe = student.recipe
    samples = []
    for group, weights in zip(groups, token_weights(groups, recipe, cfg.max_new_tokens)):
        for sample, weight in zip(group, weights):
            samples.append(replace(sample, weight=weight))
    with_signal = [sample for sample in samples if any(sample.advantages)]
    if recipe.entropy_coef == 0 or not with_signal:
        samples = with_signal
    gamma = cfg.gamma
    if student.method.measured_gamma:
        gamma = guided_gamma(student, with_signal)
    entropy_weight = recipe.entropy_coef / max(1, tokens_of(samples))
    sums = Counter()
    if cfg.gradient_checkpointing:
        student.model.train()  # it acts in this mode alone; dropout is 0, see load_model
    for batch in micro_batches(samples, cfg.micro_tokens):
        loss, batch_sums = batch_loss(student, batch, gamma, entropy_weight)
        loss.backward()
        sums.update(batch_sums)
    student.model.eval()
    if samples:
        sums["grad_norm"] = optimizer_step(student, optimizer)
    return sums


@torch.no_grad()
def guided_gamma(student, samples):
    """γ of Guide: the 90th percentile of the guided tokens' ratio in this update, at least 1e-4.

    Over response tokens alone: the official code takes in the padding as well.
    """
    ratios = []
    for batch in micro_batches([s for s in samples if s.off_policy], student.cfg.micro_tokens):
        logps, mask, _, _ = score_samples(student, batch)                        # (B, T)
        old_logps, _ = pad([sample.old_logps for sample in batch], logps.device)
        ratios.append((logps - old_logps)[mask].exp())
    if not ratios:
        return student.cfg.gamma
    return max(1e-4, torch.cat(ratios).quantile(0.9).item())


def batch_loss(student, batch, gamma, entropy_weight):
    """The loss of one micro-batch, and sums over its on-policy tokens for the log."""
    clip_eps = student.recipe.clip_eps
    logps, mask, entropy, values = score_samples(student, batch)                 # (B, T)
    device = logps.device
    old_logps, _ = pad([sample.old_logps for sample in batch], device)           # (B, T)
    advantages, _ = pad([sample.advantages for sample in batch], device)         # (B, T)
    weights = torch.tensor([sample.weight for sample in batch], device=device)   # (B,)
    off_policy = torch.tensor([sample.off_policy for sample in batch], device=device)
    shaping = "log" if student.method.imitates else student.cfg.shaping
    objective = policy_objective(
        logps, old_logps, advantages, off_policy, clip_eps, gamma, shaping
    )
    if values is not None:
        old_values, _ = pad([sample.old_values for sample in batch], device)
        objective = objective - value_loss(values, old_values, advantages, clip_eps)
    loss = -(weights[:, None] * mask * objective).sum() - entropy_weight * entropy.sum()
    log_ratio = (logps.detach() - old_logps)[mask & ~off_policy[:, None]]        # (tokens,)
    return loss, ratio_sums(log_ratio, clip_eps)


def ratio_sums(log_ratio, clip_eps):
    """For the log, sums over tokens: their number, ratios outside 1 ± ε, how far log ratios are
    from 0.
    """
    clipped = (log_ratio.exp() - 1).abs() > clip_eps
    gap = log_ratio.abs().sum().item()
    return {"tokens": len(log_ratio), "clipped": clipped.sum().item(), "gap": gap}


def optimizer_step(student, optimizer):
    """Clip the gradient at norm 1 and move the weights. Returns the norm that it had.

    A gradient that is not finite moves nothing.
    """
    parameters = optimizer.param_groups[0]["params"]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if math.isfinite(grad_norm):
        optimizer.step()
    else:
        tqdm.write("a gradient is not finite: this update is skipped")
    optimizer.zero_grad()
    if student.rollout_model is not student.model:
        # At lr 1e-6 bfloat16 weights would not move: they are copied from those in float32.
        for low, high in zip(student.rollout_model.parameters(), parameters):
            low.data.copy_(high.data)
    return grad_norm


def mean(values):
    """The mean of a list; None for an empty one."""
    if not values:
        return None
    return sum(values) / len(values)


def tokens_of(samples):
    """The number of response tokens of some samples."""
    return sum(len(sample.ids) for sample in samples)


def flatten(groups):
    """One list of all that is in a list of lists."""
    return list(itertools.chain.from_iterable(groups))


def chunks(items, size):
    """A list cut into lists of `size` items; the last one may be shorter."""
    return [items[first:first + size] for first in range(0, len(items), size)]


# =================================================================================================
# §5 Log-probabilities


def token_logps(model, prompts, responses, temperature=1.0):
    """log π(token | prompt, response so far) of every response token, in nats, differentiable.

    Returns logps (B, T) and mask (B, T), T the longest response; logps are 0 where the mask is
    False. `temperature` must be the one sampled at: another one scores another distribution.
    """
    logps, mask, _, _ = score(model, prompts, responses, temperature)
    return logps, mask


def score(model, prompts, responses, temperature=1.0, value_head=None):
    """One forward pass -> logps, mask, entropy, values of the response tokens, all (B, T).

    logps and entropy are in nats; all but the mask are 0 where it is False. values[b, t] is what
    value_head says before token t: it reads the hidden states and does not train them. Without a
    value_head values are None.
    """
    device = model.device
    ids, _ = pad([prompt + response for prompt, response in zip(prompts, responses)], device)
    targets, mask = pad(responses, device)                                 # (B, T)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        # Padding stands on the right, where causal attention never looks back at it: no mask.
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, H)
        parts = []
        for row, prompt, response in zip(states, prompts, responses):
            start = len(prompt) - 1  # the state before a token predicts it
            parts.append(row[start:start + len(response)])
        hidden = torch.cat(parts)                                          # (response tokens, H)
        head = model.get_output_embeddings()
        logps, entropy = read_head(head, hidden, targets[mask], temperature)
    values = None
    if value_head is not None:
        values = unflatten(value_head(hidden.detach().float())[:, 0], mask)
    return unflatten(logps, mask), mask, unflatten(entropy, mask), values


def read_head(head, hidden, targets, temperature):
    """log p of each target and entropy of its distribution, both (N,), from hidden (N, H).

    The logits of a real vocabulary would fill the memory: they exist for some tokens at a time
    (64 MB), and the backward pass computes them again.
    """
    def read(hidden, targets):
        all_logps = (head(hidden).float() / temperature).log_softmax(-1)   # (N, V)
        logps = all_logps.gather(1, targets[:, None])[:, 0]
        entropy = -(all_logps.exp() * all_logps).sum(-1)
        return logps, entropy

    size = max(1, 2**24 // head.out_features)
    parts = []
    for chunk, chunk_targets in zip(hidden.split(size), targets.split(size)):
        parts.append(checkpoint(read, chunk, chunk_targets, use_reentrant=False))
    logps, entropy = zip(*parts)
    return torch.cat(logps), torch.cat(entropy)


def unflatten(values, mask):
    """values (response tokens,) -> (B, T), 0 where the mask is False."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def pad(sequences, device, side="right"):
    """Lists of unequal length -> tensor (B, T) padded with zeros, mask (B, T).

    The mask comes from the lengths: where padding and end token share an id, one made from ids
    would lose the end.
    """
    rows = [torch.tensor(sequence) for sequence in sequences]
    masks = [torch.ones(len(sequence), dtype=torch.bool) for sequence in sequences]
    padded = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence(masks, batch_first=True, padding_side=side)
    return padded.to(device), mask.to(device)


def has_bfloat16(device):
    """Cards before Ampere compute it by emulation: they stay in float32, as a CPU does."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def micro_batches(samples, budget):
    """Longest first, as many samples together as keep rows · longest within `budget` tokens."""
    def size(sample):
        return len(sample.prompt) + len(sample.ids)

    batches = []
    for sample in sorted(samples, key=size, reverse=True):
        if not batches or (len(batches[-1]) + 1) * size(batches[-1][0]) > budget:
            batches.append([])
        batches[-1].append(sample)
    return batches


def score_samples(student, batch):
    """score() of a micro-batch on the prompts it trains on: logps, mask, entropy, values."""
    prompts = [sample.prompt for sample in batch]
    responses = [sample.ids for sample in batch]
    value_head = student.value_head if student.cfg.advantage == "gae" else None
    return score(student.model, prompts, responses, student.cfg.temperature, value_head)


# =================================================================================================
# §6 Prompts, and sampling with a KV cache


def encode(tokenizer, text):
    """Token ids of a text, without those that the tokenizer would put around it."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_prompt(tokenizer, question, system=""):
    """Token ids of a user message in the model's own chat template, up to where it answers."""
    messages = [{"role": "user", "content": question}]
    if system:
        messages = [{"role": "system", "content": system}] + messages
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def prompt_of(student, problem, message=""):
    """The prompt of a problem: of its question, or of another message in its place."""
    system = problem.system or student.cfg.system
    return encode_prompt(student.tokenizer, message or problem.question, system)


@torch.inference_mode()
def generate(model, prompts, n, max_new_tokens, temperature=1.0, eos_token_id=None):
    """Sample n responses to every prompt.

    Returns for each prompt n pairs (ids, logps). ids keep their end token when they stopped by
    themselves; logps (nats) belong to the distribution at `temperature` that ids were drawn from.
    eos_token_id: an id, a list of ids, or None for no stopping. Temperature 0 takes the likeliest
    token. data/fast_generate.py has a faster one of the same signature.
    """
    if not prompts:
        return []
    eos = torch.tensor(token_list(eos_token_id), dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    ids, mask = pad(prompts, model.device, side="left")    # (P, L): all prompts end together
    responses = [([], []) for _ in range(len(prompts) * n)]
    running = list(responses)                              # the response of each row of the batch
    for t in range(max_new_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # padding does not count
        logits = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions[:, -ids.shape[1]:],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]                                    # (B, V)
        if t == 0:  # each prompt was read once, and n responses go on from it
            cache.batch_repeat_interleave(n)
            logits = logits.repeat_interleave(n, dim=0)
            mask = mask.repeat_interleave(n, dim=0)
        tokens, logps = sample_tokens(logits, temperature)  # (B,)
        for response, token, logp in zip(running, tokens.tolist(), logps.tolist()):
            response[0].append(token)
            response[1].append(logp)
        keep = (~torch.isin(tokens, eos)).nonzero()[:, 0]  # rows that have not ended
        if len(keep) == 0:
            break
        if len(keep) < len(tokens):
            running = [running[row] for row in keep.tolist()]
            cache.batch_select_indices(keep)
        ids = tokens[keep, None]                           # (B, 1)
        mask = F.pad(mask[keep], (0, 1), value=True)       # (B, L + t + 1)
    return chunks(responses, n)


def sample_tokens(logits, temperature):
    """Draw one token a row, with its log-probability under the distribution it was drawn from.

    logits (B, V) -> tokens (B,), logps (B,). Temperature 0 is the argmax, whose distribution is
    a point: log 1 = 0.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logps = (logits.float() / temperature).log_softmax(-1)                 # (B, V)
    # Inverse transform: one uniform number a row, where multinomial draws V. It lies in (0, 1],
    # so that a token of probability 0 is never drawn.
    cumulative = logps.exp().cumsum(-1)
    uniform = 1 - torch.rand(len(logits), 1, device=logits.device)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return tokens[:, 0], logps.gather(1, tokens)[:, 0]


def token_list(ids):
    """An id, a list of ids or None -> a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


# =================================================================================================
# §7 Answer verification

# Stage 1, a table of rules, brings LaTeX down to a small alphabet. Stage 2, a small parser, makes
# a tree of it. Two expressions are equal when their values agree to 350 bits at random points for
# their unknowns; two lists, tuples or relations are equal when their parts are. Equality is built
# up from the inside: same (two numbers), agree (values at all points), equal (trees), matches
# (trees without labels and units), same_answer (texts), verify (a response and its gold answer).

# One rule a line, in the order in which they are applied:
# pattern | replacement | example | what all the rules make of it.  ␣ is a space; ‹…› see PARTS.
# The small alphabet: 3÷4 a fraction, 1&3÷4 a mixed number, .8~3 a periodic decimal, +- a minus
# between terms, f@(x) the value of a function, ⟦(1,2),(3,4)⟧ a matrix, ⦃1,2⦄ a set, "cm" a word or
# unit. Nothing reads ‼: what holds it equals nothing.
RULE_TABLE = r"""
What stands around an answer
^\s*\*\*|\*\*\s*$ | | **5** | 5
(?<!\\)(?:\\[()\[\]]|[$~]) | ␣ | \(1,234\) | 1234
\\(?:begin|end)\{(?:align|aligned|equation|gathered)\*?\} | | \begin{align}x=1\end{align} | x=1
&(?==) | | x&=1 | x=1
\\\\(?=[gl]eq?\b) | \\ | 2x \\le 3 | 2x ≤ 3
\\text *\{ *\((?:about|approx).*$ | | 8 \text{ (about }\pi^2) | 8
^(?!.*\bnot?\b)[A-Za-z ,]*\b(?:is|are|has|Answer:) +(?=[-\d\\({\[]|[A-Z]\b) | | The answer is 7. | 7

Numbers
(?<=\d) *(?:\{,\}|, *\\!|\\[, ]| ) *(?=\d{3}(?![\d/])) | | 11,\! 111{,}000 | 11111000
‹alone›([1-9]\d?\d?),(\d{3})(?!\d|,\d| *[)\]}]) | \1\2 | 1,234 | 1234
‹alone›([1-9]\d?\d?),(\d{3}),(\d{3})(?!\d|,\d| *[)\]}]) | \1\2\3 | 1,234,567 | 1234567
‹alone›([1-9]\d?\d?),(\d{3}),\2,(\d{3})(?![\d,]) | \1\2\2\3 | 11,111,111,100 | 11111111100
\\\$ *(\d*\.?\d+) | \1"dollar" | \$5 | 5"dollar"
\\?%|(?<![A-Za-z])(?:percent(?:age)?|pct)\b | % | 5 percent | 5 %
% *% | ‼ | 5%% | 5‼
\^ *\{? *\\circ *\}?|\\degree|\bdegrees?\b | ° | 30^{\circ} | 30°
\.(\d*)\\overline *\{?(\d+)\}? | .\1~\2 | 0.8\overline{3} | 0.8~3

Commands
\\begin\{(?:[pbB]?matrix|array)\}(?:\{[clr|]*\})? | ⟦( | \begin{matrix}1&2\end{matrix} | ⟦(1,2)⟧
(?:\\\\)?\s*\\end\{(?:[pbB]?matrix|array)\} | )⟧ | \begin{bmatrix}1\\2\\\end{bmatrix} | ⟦(1),(2)⟧
\\\\ | ),( | \begin{matrix}1\\2\end{matrix} | ⟦(1),(2)⟧
\\[,;:!\s]|\\q?quad|\\displaystyle | ␣ | x\,y | x y
\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])\.? | ␣ | \left( x\right) | ( x )
(?<![\\\w])[\[](?=[^\[\](),]*\))|(?<![\\\w@])\((?=[^\[\](),]*\]) | ‼ | [5) | ‼5)
,? *(?:\\(?:text|mbox) *\{ *(?:and|or) *\}|\b(?:and|or)\b|[;&]) *,? | , | 1, \text{ and } 2 | 1,2
\\(?:times|cdot)(?![a-z])|[×·⋅] | * | 3 \times x | 3 * x
\\div(?![a-z])|÷ | / | 6 \div x | 6 / x
[−–] | - | −5 | -5
\\pm(?![a-z]) | ± | 1\pm x | 1+ x,1+-x
\\in(?![a-z])|∈|\\equiv|≡ | = | x \in [0,1] | x = [0,1]
\\leq?(?:slant)?(?![a-z])|<= | ≤ | 2x\le 3 | 2x≤ 3
\\geq?(?:slant)?(?![a-z])|>= | ≥ | 2x>=3 | 3≤2x
\\neq?(?![a-z])| != | ≠ | x != 3 | x≠ 3
\\lt(?![a-z]) | < | 2x \lt 3 | 2x < 3
\\gt(?![a-z]) | > | 2x\gt3 | 3<2x 
\\approx | ≈ | \approx 8 | 8
\\cup(?![a-z]) | ∪ | A\cup B | A∪ B
\\(?:setminus|backslash) | ∖ | A\setminus B | A∖ B
\\mathbb *\{?R\}? | (-∞,∞) | \mathbb{R} | (-∞,∞)
\\infty|\binfinity\b | ∞ | [0,\infty) | [0,∞)
\\(?:emptyset|varnothing)|\\\{ *\\\} | ∅ | \{\} | ∅
\\[{]|\\lbrace | ⦃ | \{1\} | ⦃1⦄
\\[}]|\\rbrace | ⦄ | \{1\} | ⦃1⦄
\\[dtc]frac | \\frac | \dfrac{1}{x} | \frac{1}{x}
\\[dt]binom | \\binom | \dbinom{n}{2} | ((n)!/((2)!(n+-(2))!))
\\lfloor|⌊ | \\floor{ | \lfloor x\rfloor | \floor{ x}
\\lceil|⌈ | \\ceil{ | \lceil x\rceil | \ceil{ x}
\\rfloor|\\rceil|[⌋⌉] | } | \lceil x\rceil | \ceil{ x}
\\lvert(.*?)\\rvert | \\abs{\1} | \lvert x\rvert | \abs{ x}
√ | \\sqrt | √7 | \root{1÷2}7
(?<![A-Za-z\\])(sqrt|pi|a?(?:rc)?(?:sin|cos|tan)|ln|log|exp)(?![A-Za-z]) | \\\1 | 2*pi*r | 2*π*r
\\pi(?![a-z]) | π | 2\pi r | 2π r
\\arc(?=[sct]) | \\a | \arcsin x | \asin x
\\p?mod *\{?(\d+)\}?|\(mod (\d+)\) | ␣"mod \1\2" | x \equiv 5 \pmod{17} | x = 5  "mod 17"

Words: what is in quotes is one token, so that its letters do not commute
(?<=[\d)}]) *\\(?:text|mbox|mathrm) *\{ *([msghLNJWVAKC])\} | "\1" | 6\text{ m} | 6"m"
\\(?:text\w*|mbox|mathrm) *\{ *([A-Za-z]{2,3}) *\} | "\1" | \text{tea} | "tea"
\\(?:text\w*|mbox|mathrm) *\{ *([A-Za-z]+/[A-Za-z]+(?:\^\d)?) *\} | "\1" | 3\text{ m/s} | 3"m/s"
\\(?:text\w*|mbox|mathrm|mathbf|mathbb|operatorname|boxed) *\{([^{}]*)\} | ␣\1␣ | \text{(C)} | (C)
\b0?(\d\d?) *: *(\d\d)\b | \1:\2 | 05\!:\!00 | 5:00
(:\d\d) *"?([AaPp])\.? ?[Mm]\b\.?"? | \1"\2m" | \text{4:30 p.m.} | 4:30"pm"
([\w.]+) *: *([\w.]+) *: *([\w.]+)(?! *:) | (\2/\1,\3/\1) | 1:2:3 | ({2÷1},{3÷1})
:[^,:=]*: | ‼ | (x+1):2:3 | (x+1)‼3
(?<!\d):|:(?!\d\d(?!\d)) | / | 3:4 | {3÷4}
(?<![A-Za-z\\"])([A-Za-z]{4,}|[A-Z][a-z]{2})(?![A-Za-z]) | "\1" | Tea room | "Tea room"
(?<![A-Za-z\\"])(yes|no|not|odd|red|one|two|six|ten)(?![A-Za-z]) | "\1" | yes | "yes"
(?<![A-Za-z\\"])(per|day|sq|ft|lb|oz|in|hr|min|sec|cm|[kmg][glm])(?![A-Za-z]) | "\1" | 3cm | 3"cm"
(?<![\w\\")}])(?<![\d)}] )((?:(?:[A-Za-z]{2,3}|[aAI]) +){1,5})" | "\1 | A sad story | "A sad story"
(?<=") *((?: [A-Za-z]{2,3}){1,5})(?![A-Za-z(]) | "\1" | does not exist | "does not exist"
" *" | ␣ | all the integers | "all the integer"
(?<=[a-z]{3})s" | " | 3 cows | 3 "cow"
(?<=[\d})]) *"[^"]*\b(?:[mb]illion|thousand|hundred|dozen|hal[fv]e?)\b[^"]*" | ‼ | 5 dozen | 5‼
(?<=[\d})]) *"[^"]*\b(?:third|quarter|fourth|fifth|tenth|squared|cubed)\b[^"]*" | ‼ | 5 thirds | 5‼
(?<=[\d})]) *"[^"]*\b(?:plus|minus|time|over|not?)\b[^"]*" | ‼ | 5 minus one | 5‼
" *\^ *\{?(-?\d+)\}? | ^\1" | 3 cm^2 | 3 "cm^2"
" *([/*]) *" | \1 | 30 km/hr | 30 "km/hr"
^\s+|[.,;\s]+$ | | 5. | 5

Names, functions, fractions and powers of ten
\^ *\{? *\\prime *\}? | ' | y^{\prime} | y'
\s*_ *(\\[A-Za-z]+|[^\W_]) | _{\1} | \theta _1 | \theta_{1}
\\(?:angle|triangle) *(?=[A-Z]) | | \angle ABC | ABC
[|]([A-Z]{2,})[|] | \1 | |AB| | AB
⦃ *(\w) *(?:=[^⦃⦄|/]*)?(?:[|/]|\\mid)([^⦃⦄]*[=<≤>≥][^⦃⦄]*)⦄ | \2 | \{x|x<1\} | x=(-∞,1)
[|]([^|]+)[|] | \\abs{\1} | |x| | \abs{x}
\{([^{}]*)\\over([^{}]*)\} | \\frac{\1}{\2} | {1\over x} | \frac{1}{ x}
\\(frac|binom) *(\w) | \\\1{\2} | \frac1x | \frac{1}{x}
\\(frac|binom) *(\{[^{}]*\}) *(\w) | \\\1\2{\3} | \frac1{72} | {1÷72}
\\binom\{([^{}]*)\} *\{([^{}]*)\} | ((\1)!/((\2)!(\1-(\2))!)) | \binom n2 | ((n)!/((2)!(n+-(2))!))
\\frac *\{ *(-?)(\d+) *\} *\{ *(\d+) *\} | {\1\2÷\3} | \frac{3}{4} | {3÷4}
\\frac *\{ *(\d+) *\} *\{ *- *(\d+) *\} | {-\1÷\2} | \frac{3}{-4} | {-3÷4}
(?<![\d.^_/})])(\d+) */ *(\d+)(?![\d.^!(/]) | {\1÷\2} | 1/2x | {1÷2}x
(?<![\w@}])\((\d+)\)/\((\d+)\) | {\1÷\2} | (3)/(4) | {3÷4}
(?<![\d.^_/}])(\d+) *\{(\d+÷\d+)\} | {\1&\2} | 1\frac{3}{4} | {1&3÷4}
\*\* | ^ | x**2 | x^2
!\s*!|\\(?:sum|prod|int|lim)(?![a-z])|\\frac *\{ *d *\} *\{ *d | ‼ | n!! | n‼
(?<![\d._^])10 *\^ *([+-]?\d{1,3})(?!\d) | 10^{\1} | 6*10^3 | 6e3
(?<![\d.^_])(\d*\.?\d+) *\* *10 *\^ *\{ *([+-]?\d{1,3}) *\} | \1e\2 | 6\times10^{23} | 6e23
(?<![\d._^])10 *\^ *\{ *([+-]?\d{1,3}) *\} | 1e\1 | 10^3 | 1e3
\\sqrt *\[ *(\d+) *\] | \\root{1÷\1} | \sqrt[3]{x} | \root{1÷3}{x}
\\sqrt *\[([^\[\]]*)\] | \\root{1/{\1}} | \sqrt[n]{x} | \root{1/{n}}{x}
\\sqrt(?![a-z]) | \\root{1÷2} | \sqrt3 | \root{1÷2}3
\\(sin|cos|tan) *\^ *\{?-1\}? | \\a\1 | \sin^{-1}(x) | \asin(x)
\\(sin|cos|tan|cot|sec|csc|ln) *\^ *(\d|\{[^{}]*\}) | \\root{\2}\\\1 | \sin^2 x | \root{2}\sin x
\\log *_\{e\} | \\ln | \log_e x | \ln x
\\log *_\{([^{}]*)\} | \\root{-1}\\ln{\1}\\ln | \log_2 8 | \root{-1}\ln{2}\ln 8
\\(?:log|lg)(?![a-z]) | \\root{-1}\\ln{10}\\ln | \log x | \root{-1}\ln{10}\ln x
\\exp(?![a-z]) | e^ | \exp(x) | e^(x)

Structure
(?<![A-Za-z])([fghuFGH])\^\{?-1\}?(?= *\() | \1⁻ | f^{-1}(x) | f⁻@(x)
(?<![A-Za-z\\])((?:[fghuFGH]|\\[Pp][hs]i)['⁻]*(?:_\{\w+\})?) *(?=\() | \1@ | f(x+1) | f@(x+1)
(?<![A-Za-z\\])([^\W\d_eiπ]'*(?:_\{\w+\})?) *(?=\((?:-?\d+|\w|[^()]*,[^()]*)\)) | \1@ | I(0) | I@(0)
([(\[])([^][(),]+),([^][(),]+[)\]]) *∖ *⦃([^,⦃⦄]+)⦄ | \1\2,\4)∪(\4,\3 | [0,4)∖\{1\} | [0,1)∪(1,4)
^ *≈ * | | \approx 8 | 8
^( *\w) *≈ | \1= | x \approx 8 | x= 8
≈[^,]* | | \sqrt2\approx 1.4 | \root{1÷2}2
(?:^|(?<=[,⦃]))([^,⦃⦄()\[\]±]*)±([^,⦃⦄]*) | \1+\2,\1-\2 | x\pm 1 | x+ 1,x+-1
(?:^|(?<=[(\[{⦃,=<≤])) *\+ * | | \pm 1 | 1,- 1
(?<=[\w)}\]!%°"'⦄⟧])(?<!\d[eE]) *- * | +- | x - 1 | x+-1

An unknown stands on the left, and an inequality in one unknown is its interval
^ *([-\d.÷{}]+) *=‹label›$ | \2=\1 | 2=x | x=2
‹first›>‹side›>‹side› | \3<\2<\1 | 3>x>2 | x=(2,3)
‹first›>‹side›≥‹side› | \3≤\2<\1 | 3>x\ge2 | x=[2,3)
‹first›≥‹side›>‹side› | \3<\2≤\1 | 3\ge x>2 | x=(2,3]
‹first›≥‹side›≥‹side› | \3≤\2≤\1 | 3\ge x\ge2 | x=[2,3]
‹first›>‹side› | \2<\1 | 2x>6 | 6<2x
‹first›≥‹side› | \2≤\1 | 2x\ge6 | 6≤2x
‹first›<‹label›<‹side› | \2=(\1,\3) | 1<x<2 | x=(1,2)
‹first›<‹label›≤‹side› | \2=(\1,\3] | 1<x\le2 | x=(1,2]
‹first›≤‹label›<‹side› | \2=[\1,\3) | 1\le x<2 | x=[1,2)
‹first›≤‹label›≤‹side› | \2=[\1,\3] | 1\le x\le2 | x=[1,2]
(?<![^,])‹label›<‹side›(?=,|$) | \1=(-∞,\2) | x<3 | x=(-∞,3)
(?<![^,])‹label›≤‹side›(?=,|$) | \1=(-∞,\2] | x\le3 | x=(-∞,3]
‹first›<‹label›(?=,|$) | \2=(\1,∞) | x>3 | x=(3,∞)
‹first›≤‹label›(?=,|$) | \2=[\1,∞) | x\ge3 | x=[3,∞)
"""
PARTS = {
    "‹alone›": r"(?<![\d.,(\[{])(?<![(\[{]-)",  # not in brackets, where a comma separates
    "‹first›": r"(?<![^,])\s*([^<≤>≥=≠,∪|⦃⦄]+)",  # (?<![^,]): at the start, or after a comma
    "‹side›": r"\s*([^<≤>≥=≠,∪|⦃⦄]+)",
    "‹label›": r"\s*((?:\\[A-Za-z]+|[A-Z]{2,}|[A-Za-z])(?:_\{[^{}]*\})?(?:@\([^()]*\))?)\s*",
}


def compile_rules(table):
    """(pattern, replacement, example, what becomes of it) for each row with four cells."""
    rules = []
    for row in table.splitlines():
        for part in PARTS:
            row = row.replace(part, PARTS[part])
        cells = [cell.strip().replace("␣", " ") for cell in re.split(r" \|(?= |$)", row)]
        if len(cells) == 4:
            rules.append((re.compile(cells[0]), *cells[1:]))
    return rules


RULES = compile_rules(RULE_TABLE)

# What the parser reads; 1&3÷4 is a mixed number, 0.8~3 is periodic.
NUMBER = r"\d{1,50}÷\d{1,50}|\d*\.\d*~\d+|\d{0,50}\.?\d{1,50}(?:[eE][+-]?\d{1,3}(?!\d))?"
LETTER = r"(?:\\[A-Za-z]+|[^\W\d_])['⁻]*(?:_\{[^{}]*\})?'*(?:@\([^()]*\))?"
NAME = rf"""\d{{1,2}}:\d\d(?!\d)|\d+_\{{\w+\}}|[A-Z]{{2,}}|{LETTER}|"[^"]*"|[∞∅%°]"""
TOKEN = re.compile(rf"{NAME}|{NUMBER}|\S")
SIGNS = ",=≠<≤∪+&*/ ^"  # loosest first; the blank is for a product without sign, such as 2x
OPERAND = r'[\w\\({\[⟦."%°]'  # what the second factor of such a product begins with

MP = mpmath.MPContext()  # our own: mpmath's global precision stays as it is
MP.prec = 500  # bits
SAME = 2**-350  # numbers that differ by less than this part of them are the same
HUGE = 2**150  # bounds the ratio of two terms, exponents and what functions are taken of
CONSTANTS = {"π": MP.pi, "e": MP.e, "i": MP.j, "%": MP.mpf("0.01"), "°": MP.degree}


def rewrite(text):
    """LaTeX in the small alphabet."""
    for pattern, replacement, *_ in RULES:
        text = pattern.sub(replacement, text)
    return text


# A tree is ("number", Fraction), ("name", "x") or (operation, tree, ...).


@functools.lru_cache(1000)  # one gold answer is compared with many
def read(text):
    r"""The tree of a text. ValueError and the like for what cannot be read.

    >>> rewrite(r"\frac{3}{4}x - 1")
    '{3÷4}x+-1'
    >>> read("2x - 1")[1]
    ('*', ('number', Fraction(2, 1)), ('name', 'x'))
    """
    if len(text) > 400:  # with HUGE it bounds the work: no timeout or subprocess is needed
        raise ValueError
    tokens = ["∎", *reversed(TOKEN.findall(rewrite(text)))]  # ∎ is the end; pop() takes the next
    tree = parse(tokens)
    if tokens != ["∎"]:
        raise ValueError("something is left over")
    return tree


def parse(tokens, signs=SIGNS, operand=OPERAND):
    """Takes operands with these signs between them from the end of `tokens` and joins them.

    What stands after a sign is parsed with the tighter signs alone, so that 1+2x is 1+(2x).
    """
    tree = parse_operand(tokens)
    while tokens[-1] == "!":
        tree = (tokens.pop(), tree)
    while True:
        sign = " " if re.match(operand, tokens[-1]) else tokens[-1]
        if sign not in signs:
            return tree
        if sign != " ":
            tokens.pop()
        tighter = signs.partition(sign)[2]
        if sign in "=^":
            tighter = sign + tighter  # a^b^c is a^(b^c), but a/b/c is (a/b)/c
        right = parse(tokens, tighter, operand)
        tree = join(sign, tree, right)


def join(sign, left, right):
    """The tree of two trees and the sign between them."""
    if sign == "=":
        return equation(left, right)
    if sign in ",∪" and left[0] == sign:
        return (*left, right)
    if sign not in "* ":
        return (sign, left, right)
    if right[0] == "name" and right[1][0] in '"%°':
        return ("unit", right, left)
    if right[0] in ("⟦⟧", "()"):
        return (right[0], *[join("*", left, part) for part in right[1:]])
    return ("*", left, right)


def equation(left, right):
    """The tree of left=right. ValueError where it has no unknowns and does not hold.

    One that holds stands for its right side: 2+3=5 for 5, and so x=2+3=5 for x=5.
    """
    if is_label(left):
        return ("label", left, right)
    if equal(left, right):
        return right
    if unknowns(left):
        return ("=", left, right)
    raise ValueError("an equation that does not hold")


def is_label(tree):
    """x, f(x), AB/CD or (p,q): what an answer may have on the left of its =."""
    if tree[0] == "name":
        return tree[1] not in CONSTANTS
    return tree[0] in ("()", "/") and all(map(is_label, tree[1:]))


def parse_operand(tokens):
    """A bracket, sign, function, name or number."""
    token = tokens.pop()
    if token == "-":
        return ("neg", parse(tokens, "^"))
    if token in "([{⦃⟦":
        inner = parse(tokens)
        kind = token + tokens.pop()
        return (kind, *inner[1:]) if inner[0] == "," else inner
    if token in (r"\frac", r"\root"):
        first = parse_operand(tokens)
        second = parse_operand(tokens)
        return ("/", first, second) if token == r"\frac" else ("^", second, first)
    if token[1:] in FUNCTIONS:
        if tokens[-1] in "({":
            return (token[1:], parse_operand(tokens))
        return (token[1:], parse(tokens, " ^", r"[\w.°]"))
    if re.fullmatch(NAME, token):
        return ("name", token.lower() if token[0] == '"' else token.replace(" ", ""))
    start, _, period = token.replace("÷", "/").partition("~")
    number = ("number", Fraction(start + 300 * period))  # as good as infinitely many periods
    return ("÷", number) if "/" in start and number[1].denominator == 1 else number


def subtrees(tree):
    """The tree and all trees in it, from the top down."""
    trees = [tree]
    for part in tree[1:]:
        if isinstance(part, tuple):
            trees += subtrees(part)
    return trees


def found(tree, kind):
    """The first parts of all trees of a kind in a tree: names, labels or units."""
    return {part[1] for part in subtrees(tree) if part[0] == kind}


def without(tree, kind):
    """The tree without its labels or units: what is left is their last part."""
    if not isinstance(tree, tuple):
        return tree
    if tree[0] == kind:
        return without(tree[-1], kind)
    return tuple(without(part, kind) for part in tree)


def unknowns(tree):
    """Names that are neither constants nor words."""
    return {name for name in found(tree, "name") if name not in CONSTANTS and name[0] != '"'}


def named(name, point):
    """The value of a name: of a constant, or of an unknown at random, as large as the point allows.

    Points 0 to 5 lie in (-1, 1), 6 to 11 in (-10, 10); from 12 on there are ever larger integers.
    """
    if name in CONSTANTS:
        return CONSTANTS[name]
    share = random.Random(f"{name}, {point}").uniform(-1, 1)
    number = MP.mpf(share * 10 ** (point // 6))
    return number if point < 12 else MP.nint(number)


def power(base, exponent):
    """base ** exponent; odd roots of negative numbers are real."""
    whole = MP.nint(exponent * 945)  # for the odd denominators 3, 5, 7, 9 and some more
    if base == -abs(base) and same(exponent * 945, whole):
        return (-1) ** int(whole) * MP.power(-base, exponent)
    return MP.power(base, exponent)


PRODUCTS = {"*": operator.mul, "/": operator.truediv, "÷": operator.pos, "unit": operator.mul,
            "neg": operator.neg, "&": operator.add}
FUNCTIONS = {"abs": abs}  # LaTeX commands that compute; no other name is ever looked up
FUNCTIONS |= {name: getattr(MP, name) for name in
              "floor ceil sin cos tan cot sec csc asin acos atan sinh cosh tanh ln".split()}
OPERATIONS = FUNCTIONS | PRODUCTS | {"+": operator.add, "^": power, "!": MP.factorial}
WORK = set(OPERATIONS) - {"neg", "unit", "&"}
# bi and a+bi: the kind of the tree, then those of the trees in it, sorted and without signs
COMPLEX = ("* name number", "+ name number", "+ * name number number")


@functools.lru_cache(10_000)
def value(tree, point):
    """The value of an expression at a random point; nan where the precision does not reach."""
    kind, *parts = tree
    if kind == "number":
        return MP.convert(parts[0])
    if kind == "name":
        return named(parts[0], point)
    operands = [value(part, point) for part in parts]
    if kind in PRODUCTS:
        return PRODUCTS[kind](*operands)
    sizes = [abs(operand) for operand in operands]
    if max(sizes) > HUGE * (min(sizes) if kind == "+" else 1) > 0:
        return MP.nan  # also where the larger of two terms would swallow the smaller one
    result = OPERATIONS[kind](*operands)
    scale = abs(result) if kind == "^" else max(sizes)
    return MP.chop(result, SAME * scale)  # rounding errors become zero


def at(tree, point):
    """The value, or None where there is none, as for 1/0, or none that is real: \\sqrt{x} at -1."""
    try:
        number = value(tree, point)
    except (ArithmeticError, ValueError):
        return None
    unreal = MP.im(number) != 0 and unknowns(tree) and ("name", "i") not in subtrees(tree)
    return None if unreal else number


def same(left, right):
    """Do two numbers agree?"""
    return MP.almosteq(left, right, SAME, 0)


def agree(left, right):
    """Has an answer, without unknowns of its own, the gold one's value wherever one has any?

    12 points are tried, more where something is rounded: floor and ceil differ at integers only.
    """
    if left == right:
        return True
    if not unknowns(left) <= unknowns(right):
        return False
    kinds = {tree[0] for tree in subtrees(left) + subtrees(right)}
    points = 12 if unknowns(right) else 1
    if kinds & {"floor", "ceil"}:
        points = 80
    compared = False
    for point in range(points):
        pair = [at(left, point), at(right, point)]
        if pair != [None, None]:
            compared = True
            if None in pair or not same(*pair):
                return False
    return compared


def equal(left, right):
    """Have expressions the same values, lists, tuples and relations equal parts?

    Equations are equal when the differences of their sides have a constant ratio: 2x=4y and x-2y=0.
    """
    kinds = {left[0], right[0]}
    if kinds <= {"number", "name", *OPERATIONS}:
        return agree(left, right)
    if kinds <= {",", "∪", "{}", "⦃⦄"}:
        rest = list(right[1:])
        for item in left[1:]:
            equals = [other for other in rest if equal(item, other)]
            if not equals:
                return False
            rest.remove(equals[0])
        return not rest
    if right[0] == "=" and kinds <= {"=", "label"}:
        ratio = ("/", *[("+", tree[1], ("neg", tree[2])) for tree in (left, right)])
        constant = ("number", value(ratio, 0))
        return constant[1] != 0 and agree(constant, ratio)
    return len(kinds) == 1 and len(left) == len(right) and all(map(equal, left[1:], right[1:]))


def is_rational(number):
    """Is a number a fraction of a denominator below 10^30, or a+bi with such fractions?"""
    if not abs(number) * SAME < 1:
        return False
    for part in (MP.re(number), MP.im(number)):
        near = Fraction(int(part / SAME), 2**350).limit_denominator(10**30)
        if not same(part, MP.convert(near)):
            return False
    return True


def numbers(tree, sign):
    """How many numbers a sum or product consists of, whatever their signs."""
    if tree[0] in (sign, "neg"):
        return sum(numbers(part, sign) for part in tree[1:])
    return int(tree[0] == "number")


def undone(tree):
    """The operations in a tree whose value is rational, or a+bi, but not written as a number.

    Two numbers of one sum or product are work as well: x+1+2, 2x·3.
    """
    tree = without(tree, "label")
    kinds = set()
    # 30°+40° is work when its units are left out, \sin 90° when they are not.
    for part in set(subtrees(tree) + subtrees(without(tree, "unit"))):
        kind = part[0]
        if kind in WORK and not unknowns(part) and is_rational(value(part, 0)):
            inner = sorted(each[0] for each in subtrees(part)[1:] if each[0] != "neg")
            if " ".join([kind, *inner]) not in COMPLEX:
                kinds.add(kind)
        if kind in "+*" and numbers(part, kind) > 1:
            kinds.add(kind)
    return kinds


def same_answer(answer, gold):
    r"""Are two bare answers, such as 1/2 and \frac12, equal? Never raises.

    Decimals are exact: 0.333 is not 1/3. The gold answer 35\% takes 35 and 0.35, the gold answer
    35 takes 35\%, but 0.5 does not take 0.5\%. A unit, or the x= of x=5, may be left out but not
    changed. Tuples, intervals and matrices are ordered; lists and sets are not, and a list equals
    a set of the same items, each as often. x<3 is (-\infty,3). Words are equal when their letters
    are, in either case; up to three small letters are a product. 2+3=5 stands for 5, 5=6 for
    nothing. \textbf{(A)}\ 12 is neither A nor 12. What cannot be read equals nothing.

    The answer must be worked out: what is rational must be written as a number (sign, decimal,
    fraction, mixed number, ratio, per cent, power of ten, a+bi), unless the gold answer leaves the
    same operation undone. So 3+4=7 is an answer for 7, but 3+4 and 14/2 are not; \sqrt{18} is one
    for 3\sqrt2. A policy that is paid for 3+4 learns to copy the question.
    """
    try:
        answer = read(answer)
        gold = read(gold)
        return undone(answer) <= undone(gold) and matches(answer, gold)
    except Exception:
        return False


def matches(answer, gold):
    """Equal, if need be without a label such as x= and a unit, where the two have but one."""
    if equal(answer, gold):
        return True
    for kind in ("label", "unit"):
        marks = found(answer, kind) | found(gold, kind)
        whole = gold[0] == "number" and gold[1].denominator == 1 and gold[1] > 1
        # 35 takes 35%, 0.5 does not take 0.5%.
        if len(marks) == 1 and (whole or found(gold, kind) or marks != {("name", "%")}):
            answer = without(answer, kind)
            gold = without(gold, kind)
            if equal(answer, gold):
                return True
    return False


BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{| +([^{}$\n]+))|<answer>(.*?)</answer>", re.DOTALL)


def extract_answer(response):
    r"""The content of the last \boxed{}, \fbox{} or <answer>...</answer>, whichever comes last.

    None when there is none, or when the last one is cut off. The last one counts wherever it
    stands, inside <think> too, whatever prose follows, and also when it is empty. Without braces
    the content ends with the line or at a $.
    """
    start = max(response.rfind(mark) for mark in ("\\boxed", "\\fbox", "<answer>"))
    match = BOX.match(response, start)
    if match is None:
        return None
    if match.lastindex:
        return match[match.lastindex]
    rest = response[match.end():]
    depth = 1
    for mark in re.finditer(r"\\.|[{}]", rest):  # \{ is no brace, \\ no beginning of \{
        if mark[0] == "{":
            depth += 1
        elif mark[0] == "}":
            depth -= 1
        if depth == 0:
            return rest[:mark.start()]
    return None


def skeleton(text):
    """The tokens of a text, without brackets."""
    return " ".join(token for token in TOKEN.findall(rewrite(text)) if token not in "(){}")


def is_copied(answer, gold, question):
    """Does an answer that computes something stand in the question as it is?

    Numbers, words, letters and lists of them may; so may the gold answer, written as it is. Of an
    answer with a label, or a chain of =, the last side counts.
    """
    tree = read(answer)
    if tree == gold or not any(part[0] in OPERATIONS for part in subtrees(tree)):
        return False
    text = skeleton(answer)
    if tree[0] in ("label", *OPERATIONS):
        text = text.rpartition("= ")[2]
    whole = rf"(?<!\S)(?<![-+*/^] ){re.escape(text)}(?! [-+*/^!])(?!\S)"
    return re.search(whole, skeleton(question)) is not None


def gives_answer(response, gold="", question=""):
    """Has the response a final answer that can be read, is worked out and is not copied?

    A format reward pays for this. No box, an empty one, or one with work left undone earn nothing:
    a policy that is paid for the box alone learns to write an empty one.
    """
    try:
        answer = extract_answer(response)
        target = read(gold if gold else "none")
        return undone(read(answer)) <= undone(target) and not is_copied(answer, target, question)
    except Exception:
        return False


def verify(response, gold, question=""):
    """Does the final answer of a response equal `gold`, and is it not copied from the question?

    Two rules keep a policy from handing the question back: `same_answer` refuses work left undone,
    and here an expression that stands in the question is refused, such as a product to be expanded.
    """
    if not gives_answer(response, gold, question):
        return False
    return same_answer(extract_answer(response), gold)


# =================================================================================================
# §8 Running


class InputError(ValueError):
    """Something the user gave cannot be used. The message names file, line and field, or a flag."""


@dataclass(frozen=True)
class Config:
    """Every setting of a run, and every flag: the comments are what --help says."""

    method: str = "ampo"                  # what to do where every rollout failed
    recipe: str = ""                      # ampo, luffy, guide, ghpo, grpo; unset: the method's own
    follow: str = ""                      # paper or official code; unset: code, where known
    model: str = "data/base"              # the student: a folder or hub name
    system: str = ""                      # system prompt; unset: the chat template's own
    data: str = "data/train.jsonl"        # problems; data/README.md describes the format
    out: str = ""                         # folder of the run; unset: runs/METHOD-SEED
    resume: bool = False                  # continue --out with its own flags and those given now
    seed: int = 0                         # of the sampling and of the order of the problems
    steps: int = 250                      # training steps
    prompts_per_step: int = 32            # P: problems per step
    group_size: int = 8                   # G: rollouts per problem
    num_minibatches: int = 2              # optimizer updates per step, at most
    max_new_tokens: int = 128             # longest response
    temperature: float = 1.0              # of the rollouts, and of what is trained
    lr: float = 2e-4                      # of AdamW; 1e-6 for models of a billion parameters
    clip_eps: float = None                # ε of the on-policy clip, inf: none; unset: the recipe's
    entropy_coef: float = None            # weight of the entropy bonus; unset: the recipe's
    gamma: float = 0.1                    # γ of the shaping x / (x + γ); guide measures its own
    shaping: str = "f"                    # of off-policy tokens
    advantage: str = "group"              # against the group's mean, or by value head and GAE
    gae_lambda: float = 0.95              # λ of GAE
    trigger: str = "fail"                 # ampo, guide: where none is right, under half are, always
    k: int = 2                            # ampo: traces swapped into a failed group
    select: str = "comprehension"         # ampo: which traces
    micro_tokens: int = 2048              # padded tokens of one training pass: a matter of memory
    cache_tokens: int = 40000             # tokens in the KV cache of one sampling pass: likewise
    gradient_checkpointing: bool = False  # less memory, one more forward pass
    eval_every: int = 100                 # steps between looks at valid.jsonl; 0: no evaluation
    samples: int = 32                     # samples per problem in evaluations
    save_every: int = 50                  # steps between checkpoints


CHOICES = {
    "method": list(METHODS),
    "follow": ["code", "paper"],
    "shaping": ["f", "ratio", "log"],
    "advantage": ["group", "gae"],
    "trigger": ["fail", "half", "always"],
    "select": ["comprehension", "random", "shortest", "longest"],
}


def check_config(cfg):
    """Raise InputError for settings that cannot be."""
    for name, value in asdict(cfg).items():
        least = 1 if type(value) is int else 0
        if name in ("seed", "eval_every"):
            least = 0
        if type(value) in (int, float) and not value >= least:  # nan is refused, too
            raise InputError(f"--{name} {value}: must be at least {least}")
    if cfg.group_size < 2:
        raise InputError("--group_size 1: nothing to compare a response with")
    if cfg.advantage == "gae" and METHODS[cfg.method].imitates:
        raise InputError(f"--advantage gae: not with --method {cfg.method}, which imitates")
    choose_recipe(cfg)


def choose_recipe(cfg):
    """The row of RECIPES that a run follows. Raises InputError where there is none.

    --recipe unset: the method's own. --follow unset: code where it has such a row, else paper.
    """
    method = METHODS[cfg.method]
    name = cfg.recipe or method.recipe
    follow = cfg.follow or ("code" if (name, "code") in RECIPES else "paper")
    if (name, follow) not in RECIPES:
        known = ", ".join(" ".join(row) for row in RECIPES)
        raise InputError(f"--recipe {name} --follow {follow}: not one of {known}")
    recipe = RECIPES[name, follow]
    if not method.rollouts:
        recipe = replace(recipe, entropy_coef=0.0)  # SFT is the likelihood alone
    if cfg.clip_eps is not None:
        recipe = replace(recipe, clip_eps=cfg.clip_eps)
    if cfg.entropy_coef is not None:
        recipe = replace(recipe, entropy_coef=cfg.entropy_coef)
    return recipe


def load_problems(path):
    """Read a JSONL file of Problems. Raises OSError, or InputError naming file, line and field."""
    problems = []
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            problems.append(parse_problem(line, f"{path}:{number}"))
    if not problems:
        raise InputError(f"{path}: holds no problems")
    return problems


def parse_problem(line, where):
    """One JSON object -> Problem. The answer may be a number; other fields are ignored."""
    try:
        row = json.loads(line)
        teachers = dict((row.get("teachers") or {}).items())
        # JSON can spell halves of characters, which no tokenizer takes.
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object, or 'teachers' is none: {error}")
    texts = {name: row.get(name) or "" for name in ("question", "hint", "solution", "system")}
    answer = row.get("answer")
    if type(answer) in (int, float):
        answer = str(answer)
    texts["answer"] = answer or ""
    for name, text in [*texts.items(), *teachers.items()]:
        if not isinstance(text, str):
            raise InputError(f"{where}: field '{name}' must be text")
    for name in ("question", "answer"):
        if not texts[name].strip():
            raise InputError(f"{where}: field '{name}' is missing")
    if not verify(f"\\boxed{{{answer}}}", texts["answer"]):
        raise InputError(f"{where}: field 'answer': no response could equal {answer!r}")
    return Problem(teachers=teachers, where=where, **texts)


def load_checked(student, path, needs=""):
    """load_problems, which refuses what this student cannot take: a message that leaves no room
    for a response in its context, and text that it would read as a control token.
    """
    context = context_length(student.model.config)
    problems = load_problems(path)
    for problem in problems:
        messages = [problem.question]
        if needs == "hint":
            messages.append(problem.hint)
        if needs == "solution":
            messages.append(solution_prefix(problem, GHPO_SHARES[-1]))
        text = "\n".join([problem.system, *messages, *problem.teachers.values()])
        for token in student.tokenizer.added_tokens_decoder.values():
            if token.special and token.content in text:
                raise InputError(f"{problem.where}: holds {token}, a control token of this model")
        longest = max(len(prompt_of(student, problem, message)) for message in messages)
        size = longest + student.cfg.max_new_tokens
        if size > context:
            raise InputError(f"{problem.where}: {size} tokens with --max_new_tokens, not {context}")
    return problems


def context_length(config):
    """How many tokens a model reads.

    Past its original context, longrope takes other frequencies for all tokens. Keys cached while
    sampling keep the old ones, so that sampling and scoring would disagree.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", math.inf)


def load_inputs(student):
    """Training problems, validation problems, and evaluation sets {name: problems}.

    Says how many problems the method can guide. Raises InputError where there is none.
    """
    cfg = student.cfg
    needs = student.method.needs
    problems = load_checked(student, cfg.data, needs)
    usable = [problem for problem in problems if not needs or getattr(problem, needs)]
    if needs == "teachers":
        usable = [problem for problem in usable if teacher_samples(student, problem)]
    print(f"{cfg.data}: {len(problems)} problems, {len(usable)} with all that {cfg.method} needs")
    if not usable:
        raise InputError(f"{cfg.data}: no line has '{needs}' that --method {cfg.method} can use; "
                         f"traces end within --max_new_tokens {cfg.max_new_tokens}")
    sets = {}
    if cfg.eval_every > 0:
        folder = Path(cfg.data).parent
        paths = [folder / "valid.jsonl", folder / "test.jsonl", *sorted(folder.glob("ood_*.jsonl"))]
        sets = {path.stem: load_checked(student, path) for path in paths if path.exists()}
    return problems, sets.pop("valid", []), sets


PLAIN_TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.role.capitalize() }}:
{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}{% if add_generation_prompt %}Assistant:
{% endif %}"""


def load_model(path):
    """A causal language model in float32 and its tokenizer, from a folder or the hub."""
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)  # dropout would take the first ratio away from 1
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    except Exception as error:  # one bad folder raises errors of many kinds
        raise InputError(f"{path}: no model that can be loaded: {error}")
    for weight in model.parameters():
        # Weights mapped from a file are aligned otherwise, and sums of them round otherwise.
        weight.data = weight.data.clone()
    if tokenizer.chat_template is None:
        print(f"{path}: no chat template; a plain one is used, and saved with the checkpoints")
        tokenizer.chat_template = PLAIN_TEMPLATE
    return model, tokenizer


def check_model(path, model, tokenizer, cfg, sampler):
    """Raise InputError for a model that would be prompted, sampled or scored wrongly.

    A few tokens after two prompts of unequal length tell: recurrent layers and output heads that
    scale or cap their logits give themselves away.
    """
    prompts = [[0, 1, 0], [1]]
    try:
        one = encode_prompt(tokenizer, "1+1?", cfg.system)
        other = encode_prompt(tokenizer, "2+2?", cfg.system)
        groups = sampler(model, prompts, 1, 4)
        responses = [group[0][0] for group in groups]
        sampled = torch.tensor([group[0][1] for group in groups])
        scored, _ = token_logps(model, prompts, responses)
    except Exception as error:
        raise InputError(f"{path}: cannot be sampled from: {error}")
    if one == other:
        raise InputError(f"{path}: its chat template ignores the question")
    if not torch.allclose(scored, sampled, atol=1e-3):
        raise InputError(f"{path}: {model.config.model_type} is sampled and scored differently")


def end_tokens(model, tokenizer):
    """Ids that end a response. The first one, which ends a trace, is what the chat template
    writes after an answer; it need not be the tokenizer's.
    """
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    after = encode(tokenizer, text.rpartition("2")[2])
    ids = [token for token in after[:1] if token in tokenizer.added_tokens_decoder]
    ids += token_list(tokenizer.eos_token_id) + token_list(model.generation_config.eos_token_id)
    return list(dict.fromkeys(ids))


def load_student(path, cfg, sampler=generate):
    """The student, on a CUDA GPU where there is one. Raises InputError for an unsuitable model."""
    model, tokenizer = load_model(path)
    check_model(path, model, tokenizer, cfg, sampler)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    rollout_model = model
    if has_bfloat16(device):
        rollout_model = copy.deepcopy(model)
        for weight in rollout_model.parameters():
            weight.data = weight.data.bfloat16()  # not the buffers: rotary frequencies stay exact
    elif device.type == "cuda":
        print("this card has no bfloat16 of its own: all runs in float32")
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    value_head = torch.nn.Linear(model.config.hidden_size, 1, bias=False).to(device)
    torch.nn.init.zeros_(value_head.weight)
    eos = end_tokens(model, tokenizer)
    method = METHODS[cfg.method]
    recipe = choose_recipe(cfg)
    return Student(
        model, rollout_model, tokenizer, value_head, eos, cfg, method, recipe, sampler
    )


def batch_indices(total, step, cfg):
    """The problems of one step out of an endless series of shuffled epochs.

    A function of the step alone: resuming can neither skip nor repeat one.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    end = (step + 1) * cfg.prompts_per_step
    order = []
    while len(order) < end:
        order += torch.randperm(total, generator=generator).tolist()
    return order[end - cfg.prompts_per_step:end]


def pass_at_k(n, correct, k):
    """Unbiased chance that one of k samples is right, given `correct` right ones among n.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on
    Code", Eq. 1. Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"no estimate for {n=}, {correct=}, {k=}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(student, problems, samples, temperature=0.6):
    """-> {"pass@1", "pass@2", "pass@4" ... "pass@samples", "n", "length"}, and the groups.

    n counts problems, length is the mean in tokens. Seeded by itself, as each training step is:
    it neither depends on when it comes nor changes what comes after.
    """
    cfg = replace(student.cfg, group_size=samples, temperature=temperature)
    torch.manual_seed(cfg.seed)
    questions = [problem.question for problem in problems]
    groups = rollout(replace(student, cfg=cfg), problems, questions)
    right = [sum(sample.correct for sample in group) for group in groups]
    scores = {}
    for k in [2**i for i in range(samples.bit_length())] + [samples]:  # 1, 2, 4 ... and samples
        scores[f"pass@{k}"] = mean([pass_at_k(samples, correct, k) for correct in right])
    scores["n"] = len(problems)
    scores["length"] = mean([len(sample.ids) for sample in flatten(groups)])
    return scores, groups


def report(student, sets):
    """Base against trained model on every set, and a response each to the problem that gained."""
    def gain(example):
        _, was, now = example
        return mean([s.correct for s in now]) - mean([s.correct for s in was])

    cfg = student.cfg
    base = load_student(cfg.model, cfg, student.generate)
    examples = []
    for name, problems in sets.items():
        # The many sets out of distribution get a quarter of the samples: enough for pass@1.
        samples = cfg.samples if name == "test" else math.ceil(cfg.samples / 4)
        before, base_groups = evaluate(base, problems, samples)
        after, groups = evaluate(student, problems, samples)
        row = f"{name:14}"
        for k in sorted({1, min(8, samples), samples}):
            key = f"pass@{k}"
            row += f"   {key} {100 * before[key]:4.1f} -> {100 * after[key]:4.1f}"
        print(row)
        examples += zip(problems, base_groups, groups)
    problem, was, now = max(examples, key=gain)
    print(f"\nProblem: {problem.question}   (answer {problem.answer})")
    for name, group in (("base", was), ("trained", now)):
        word = "right" if group[0].correct else "wrong"
        print(f"--- {name}, {word}:\n{group[0].text.strip()}")


def save_checkpoint(student, optimizer, step, out):
    """model/ loads with from_pretrained. state.pt in it is what --resume needs besides.

    It is written under another name and then swapped in, so that a kill at any moment leaves one
    whole checkpoint: model/, or model.old/.
    """
    new = out / "model.new"
    old = out / "model.old"
    shutil.rmtree(new, ignore_errors=True)
    student.model.save_pretrained(new)
    student.tokenizer.save_pretrained(new)
    (new / "README.md").write_text(SAVED_BY)
    state = {
        "optimizer": optimizer.state_dict(),
        "value_head": student.value_head.state_dict(),
        "step": step,
    }
    torch.save(state, new / "state.pt")
    if (out / "model").exists():
        shutil.rmtree(old, ignore_errors=True)
        (out / "model").rename(old)
    new.rename(out / "model")
    shutil.rmtree(old, ignore_errors=True)


SAVED_BY = """Saved by ampo.py. Load it with transformers 5.17 or later: version 4 misses its rotary
settings and says nothing. data/for_transformers4.py rewrites a folder so that both read it.
"""


def restore(student, optimizer, checkpoint):
    """Put optimizer and value head back as they were. Returns the number of steps done.

    Random numbers need no saving: each step seeds its own.
    """
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        student.value_head.load_state_dict(state["value_head"])
    except Exception as error:  # a damaged file raises errors of many kinds
        raise InputError(f"{checkpoint}: damaged: {error}")
    optimizer.param_groups[0]["lr"] = student.cfg.lr  # --resume --lr
    return state["step"]


def write_text(path, text):
    """Write a file whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def append_line(path, row):
    """Add a line to a log."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def keep_lines(path, steps):
    """Leave the lines of the first `steps` steps in a log."""
    lines = []
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:steps]
    write_text(path, "".join(lines))


def read_flags(path):
    """The flags that a run was begun with. Raises InputError for a file that is not whole."""
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or saved.keys() != asdict(Config()).keys():
        raise InputError(f"{path}: damaged, or of another version of ampo.py")
    return saved


def open_run(argv):
    """The Config of a run, and the checkpoint that it goes on from, if any.

    A new run's folder must be empty. --resume takes the flags that the run began with, changed by
    those given now.
    """
    cfg = parse_flags(argv)
    out = Path(cfg.out or f"runs/{cfg.method}-{cfg.seed}")
    checkpoint = None
    if cfg.resume:
        if not (out / "run.json").exists():
            raise InputError(f"--resume: {out} holds no run to continue, or one of an older "
                             "version, whose flags had other names")
        saved = read_flags(out / "run.json")
        cfg = parse_flags(argv, saved)
        if cfg.model != saved["model"]:
            raise InputError("--resume --model: a run goes on from its own checkpoint")
        for name in ("model.old", "model"):  # the newer one, if both are there
            if (out / name).exists():
                checkpoint = out / name
    elif out.is_file() or any(out.glob("*")):
        raise InputError(f"--out {out}: is taken; --resume continues it")
    return replace(cfg, out=str(out)), checkpoint


def step_metrics(rollouts, groups, updates):
    """Reward, failures, entropy and length are those of the student's plain rollouts, so that
    curves compare across methods. The entropy is the mean of -log p over sampled tokens: unbiased,
    and free.
    """
    own = flatten(rollouts)
    failed = [needs_guidance(group) for group in rollouts if group]
    rescued = [was and not needs_guidance(group) for was, group in zip(failed, groups)]
    sources = Counter(sample.source for sample in flatten(groups))
    total = Counter()
    for sums in updates:
        total.update(sums)  # a Counter adds
    grad_norm = total["grad_norm"] / len(updates)
    return {
        "reward": mean([sample.reward for sample in own]),
        "fail_rate": mean(failed),
        "rescued": mean(rescued),
        "entropy": mean([-logp for logp in flatten([sample.old_logps for sample in own])]),
        "response_length": mean([len(sample.ids) for sample in own]),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "clip_fraction": total["clipped"] / max(1, total["tokens"]),
        # sampler against trainer, before any update
        "logp_gap": updates[0]["gap"] / max(1, updates[0]["tokens"]),
        "sources": sources,
    }


def readable(problem, rollouts, group):
    """One problem of a step, to be read: the student's rollouts, then what guidance brought."""
    guidance = [sample for sample in group if sample.source != "student"]
    responses = []
    for sample in rollouts + guidance:
        response = {"source": sample.source, "correct": sample.correct, "reward": sample.reward}
        responses.append(response | {"text": sample.text})
    return {"question": problem.question, "answer": problem.answer, "responses": responses}


def make_optimizer(student):
    """AdamW over the model and its value head."""
    weights = [*student.model.parameters(), *student.value_head.parameters()]
    return torch.optim.AdamW(weights, student.cfg.lr, weight_decay=0.1, fused=True)


def train(cfg, checkpoint=None, sampler=generate):
    """The whole run: training steps, two logs, checkpoints and the closing table."""
    out = Path(cfg.out)
    metrics_file = out / "metrics.jsonl"
    responses_file = out / "responses.jsonl"
    student = load_student(str(checkpoint or cfg.model), cfg, sampler)
    problems, valid, sets = load_inputs(student)
    optimizer = make_optimizer(student)
    done = 0
    if checkpoint:
        done = restore(student, optimizer, checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "run.json", json.dumps(asdict(cfg), indent=1))
    keep_lines(metrics_file, done)
    keep_lines(responses_file, done)

    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, desc=cfg.method)
    for step in bar:
        # A function of the step alone: nothing to save for --resume.
        torch.manual_seed(cfg.seed * 1000003 + step)
        batch = [problems[i] for i in batch_indices(len(problems), step, cfg)]
        metrics = {"step": step} | train_step(student, optimizer, batch)
        example = {"step": step} | metrics.pop("example")
        if valid and (step + 1) % cfg.eval_every == 0:
            scores, _ = evaluate(student, valid, cfg.group_size)
            metrics["valid"] = scores["pass@1"]
        append_line(responses_file, example)
        append_line(metrics_file, metrics)
        bar.set_postfix(reward=metrics["reward"], failed=metrics["fail_rate"])
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            try:
                save_checkpoint(student, optimizer, step + 1, out)
            except Exception as error:  # a full disk raises errors of many kinds
                raise InputError(f"{out}: no checkpoint written: {error}")
    if sets:
        report(student, sets)
    print(f"run: {out}   logs: metrics.jsonl, responses.jsonl   checkpoint: {out / 'model'}")


def parse_flags(argv, defaults=()):
    """Command line -> Config. Raises InputError for what cannot be."""
    def refuse(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(
        "ampo.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = refuse
    for name, comment in re.findall(r"(\w+): .* # (.*)", inspect.getsource(Config)):
        default = getattr(Config, name)
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=comment)
        else:
            parser.add_argument(
                f"--{name}", type=float if default is None else type(default), default=default,
                choices=CHOICES.get(name), help=comment,
            )
    parser.set_defaults(**dict(defaults))
    cfg = Config(**vars(parser.parse_args(argv)))
    check_config(cfg)
    return cfg


def run(argv, sampler):
    """`ampo.py FLAGS` trains. `ampo.py eval FLAGS` scores --model on --data, and the last line
    that it prints is a JSON object.
    """
    if argv[:1] == ["eval"]:
        cfg = parse_flags(argv[1:], {"data": "data/test.jsonl", "temperature": 0.6})
        student = load_student(cfg.model, cfg, sampler)
        problems = load_checked(student, cfg.data)
        scores, _ = evaluate(student, problems, cfg.samples, cfg.temperature)
        print(json.dumps(scores))
        return
    cfg, checkpoint = open_run(argv)
    if cfg.temperature == 0:
        raise InputError("--temperature 0: all rollouts of a problem would be the same")
    train(cfg, checkpoint, sampler)


def main(argv=None, sampler=generate):
    """Entry point. Returns the exit status: 0, 2 for what cannot be used or does not fit, 130
    after Ctrl-C. `sampler` draws the responses: generate, or another one of its signature.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console may lack a question's characters
    try:
        run(sys.argv[1:] if argv is None else argv, sampler)
        return 0
    except KeyboardInterrupt:
        print("ampo.py: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        message = f"lower --cache_tokens or --micro_tokens: {error}"
    except (InputError, OSError) as error:
        message = str(error)
    first_line = message.split("\n")[0]
    print(f"ampo.py: {first_line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
