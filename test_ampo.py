"""Tests of ampo.py, which also grade a file of the same names:

    AMPO_MODULE=student.py pytest test_ampo.py::Test_gae

A class a function, of its name. The mathematics is compared with independent oracles: plain loops
over floats, and forward passes of transformers without cache or padding. The mistakes often found
in published code have a test each; their names begin with test_mistake. What only our engine does
is marked with `engine` and skipped when another file is graded.
"""
import ast
import doctest
import importlib.util
import itertools
import math
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that does not exist is looked for on this machine only

import mpmath
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM,
)

HERE = Path(__file__).parent
BASE = str(HERE / "data" / "base")

engine = pytest.mark.skipif("AMPO_MODULE" in os.environ, reason="of ampo.py's own engine")


def load_file(name, path):
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(path).resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


ampo = load_file("ampo", os.environ.get("AMPO_MODULE", HERE / "ampo.py"))


# -------------------------------------------------------------------------------------------------
# What a failure says: the case, what was expected and what came, not the lines of the test


def same(got, wanted, tolerance):
    """Equal, floats within a tolerance (relative and absolute), lists and tuples item by item."""
    if isinstance(wanted, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(wanted):
            return False
        return all(same(one, other, tolerance) for one, other in zip(got, wanted))
    if isinstance(wanted, float) and isinstance(got, (int, float)):
        return got == wanted or math.isclose(got, wanted, rel_tol=tolerance, abs_tol=tolerance / 10)
    return got == wanted


def expect(case, got, wanted, tolerance=1e-5):
    """Fail with the case, what was expected and what came. Tensors are compared as lists."""
    if isinstance(got, torch.Tensor):
        got = got.tolist()
    if isinstance(wanted, torch.Tensor):
        wanted = wanted.tolist()
    if not same(got, wanted, tolerance):
        shown = f"{case}\n    expected {str(wanted)[:600]}\n    got      {str(got)[:600]}"
        pytest.fail(shown, pytrace=False)


# -------------------------------------------------------------------------------------------------
# A random model to compare with, a student around it, and rollouts that say what a test wants


def random_model(vocab=60, scale=4.0, **settings):
    """A tiny Qwen2 with grouped-query attention and peaked, context-dependent predictions."""
    torch.manual_seed(1)
    defaults = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )
    model = Qwen2ForCausalLM(Qwen2Config(**defaults | settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def student_of(model, tokenizer, **flags):
    """A Student around a model, by ampo.py's own wiring of flags to method and recipe."""
    cfg = ampo.Config(**{"group_size": 4, "max_new_tokens": 40} | flags)
    value_head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(value_head.weight)
    torch.nn.init.zeros_(value_head.bias)
    return ampo.Student(
        model=model, rollout_model=model, tokenizer=tokenizer, value_head=value_head,
        eos=[tokenizer.eos_token_id], cfg=cfg, method=ampo.METHODS[cfg.method],
        recipe=ampo.choose_recipe(cfg), generate=ampo.generate,
    )


@pytest.fixture
def make_student(tokenizer):
    """make_student(method="guide", ...): a Student around a random model."""
    def make(**flags):
        return student_of(random_model(len(tokenizer), scale=1.0), tokenizer, **flags)
    return make


def scripted(tokenizer, says):
    """A sampler whose i-th rollout of a prompt is says(prompt text, i), with log p = -0.5."""
    def generate(model, prompts, n, max_new_tokens, temperature=1.0, eos_token_id=None):
        groups = []
        for prompt in prompts:
            group = []
            for i in range(n):
                ids = ids_of(tokenizer, says(tokenizer.decode(prompt), i))
                ids.append(tokenizer.eos_token_id)
                group.append((ids, [-0.5] * len(ids)))
            groups.append(group)
        return groups
    return generate


def full_logps(model, prompt, response, temperature=1.0):
    """Oracle: one sequence, no padding, no cache, the model's own forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
    start = len(prompt) - 1
    rows = [logits[start + t].log_softmax(-1) for t in range(len(response))]
    return [row[token].item() for row, token in zip(rows, response)]


def sample_of(ids, prompt=(2, 3), reward=1.0, correct=True, **more):
    fields = {"old_logps": [-1.0] * len(ids), "text": ""} | more
    return ampo.Sample(list(prompt), list(ids), correct=correct, reward=reward, **fields)


def group_of(*rights, prompt=(2, 3)):
    """A group of rollouts, each right or wrong, and each with other tokens."""
    group = []
    for i, right in enumerate(rights):
        group.append(sample_of([5, 6 + i], prompt, 1.0 if right else 0.1, bool(right)))
    return group


RIGHT = "\\boxed{3/2}"
WRONG = "\\boxed{5}"
PROBLEM = dict(
    question="Solve 2*x=3.", answer="3/2", hint="Solve 2*x=3.\nHint: divide.",
    solution="abcdefghij",
    teachers={"one": "2*x=3\n\\boxed{3/2}", "two": "3/2\n\\boxed{3/2}", "three": "so \\boxed{3/2}"},
)


def problem_of(**changes):
    return ampo.Problem(**PROBLEM | changes)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_of(tokenizer, text, system=""):
    """Oracle: token ids of a user message, up to where the assistant's turn begins."""
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return ids_of(tokenizer, text)


def adamw(student):
    weights = [*student.model.parameters(), *student.value_head.parameters()]
    return torch.optim.AdamW(weights, 1e-3)


def message_of(call, *args):
    """What the InputError of a call says; empty where there is none."""
    try:
        call(*args)
    except ampo.InputError as error:
        return str(error)
    return ""


# =================================================================================================
# §2 The objective, and the update of §4

# What is published, written down once more. std_eps is added to the standard deviation; None: no
# division by it. A trace earns `trace`; None: what it deserves.
PUBLISHED = {
    # std_eps, clip, right, format, entropy, trace
    ("grpo", "paper"): (1e-6, 0.2, 1.0, 0.0, 0.0, None),
    ("luffy", "code"): (None, math.inf, 1.0, 0.0, 0.001, None),
    ("luffy", "paper"): (None, math.inf, 1.0, 0.0, 0.01, None),
    ("ampo", "code"): (None, 0.2, 0.9, 0.1, 0.001, 1.0),
    ("ampo", "paper"): (1e-6, 0.2, 0.9, 0.1, 0.001, 1.0),
    ("guide", "code"): (1e-6, 0.2, 1.0, 0.0, 0.0, None),
    ("ghpo", "code"): (1e-4, 0.2, 1.0, 0.5, 0.0, None),
}
OWN_ROWS = {row[0]: row for row in PUBLISHED if row[1] == "code"}
OWN_ROWS |= {"grpo": ("grpo", "paper"), "sft": OWN_ROWS["ampo"], "rl_sft": OWN_ROWS["luffy"]}
# Each row with a method of its own, then methods under the conventions of others.
PAIRS = [
    *OWN_ROWS.items(), ("luffy", ("luffy", "paper")), ("ampo", ("ampo", "paper")),
    ("grpo", ("guide", "code")), ("grpo", ("ampo", "code")), ("guide", ("ampo", "code")),
    ("luffy", ("ampo", "paper")), ("ampo", ("ghpo", "code")), ("rl_sft", ("ampo", "paper")),
]
LONGEST = 40  # max_new_tokens of make_student


def average(values):
    return sum(values) / len(values)


def published_advantages(method, row, group):
    """Each reward against its group's; what is imitated is outside of the group."""
    imitates = method in ("sft", "rl_sft")
    rewards = [sample.reward for sample in group if not (imitates and sample.off_policy)]
    scale = 1.0
    if PUBLISHED[row][0] is not None and len(rewards) > 1:
        scale = statistics.stdev(rewards) + PUBLISHED[row][0]
    advantages = []
    for sample in group:
        if imitates and sample.off_policy:
            advantages.append(1.0)
        elif len(set(rewards)) == 1:
            advantages.append(0.0)
        else:
            advantages.append((sample.reward - average(rewards)) / scale)
    return advantages


def tokens_of(responses):
    return sum([values for _, values in responses], [])


def published_average(row, groups):
    """One number of a whole update, whose groups are lists of (off_policy, a number a token)."""
    responses = sum(groups, [])
    if row in [("ampo", "code"), ("luffy", "code")]:
        return sum(tokens_of(responses)) / LONGEST / len(responses)
    if row in [("grpo", "paper"), ("guide", "code")]:
        return average([average(values) for _, values in responses])
    if row == ("ghpo", "code"):
        return average([average(tokens_of(group)) for group in groups])
    if row == ("luffy", "paper"):
        return average(tokens_of(responses))
    traces = [average(values) for off_policy, values in responses if off_policy]  # AMPO's Eq. 7
    rollouts = tokens_of([response for response in responses if not response[0]])
    total = average(traces) if traces else 0.0
    return total + average(rollouts) if rollouts else total


def token_by_hand(logp, old_logp, advantage, off_policy, clip_eps=0.2, gamma=0.1, shaping="f"):
    """The objective of one token. A clipped one is a constant, without gradient."""
    log_ratio = logp - old_logp
    ratio = math.e ** log_ratio
    if off_policy:
        shaped = {"f": ratio / (ratio + gamma), "ratio": ratio, "log": log_ratio}
        return advantage * shaped[shaping]
    if advantage > 0 and ratio > 1 + clip_eps:
        return advantage * (1 + clip_eps)
    if advantage < 0 and ratio < 1 - clip_eps:
        return advantage * (1 - clip_eps)
    return advantage * ratio


def slope_by_hand(ratio, advantage, off_policy, clip_eps=0.2, gamma=0.1, shaping="f"):
    """The derivative of token_by_hand by log p, in closed form."""
    if off_policy:
        slopes = {"f": ratio * gamma / (ratio + gamma) ** 2, "ratio": ratio, "log": 1.0}
        return advantage * slopes[shaping]
    clipped = ratio > 1 + clip_eps if advantage > 0 else ratio < 1 - clip_eps
    return 0.0 if clipped else advantage * ratio


def read_by_hand(model, sample, temperature=1.0):
    """log p and entropy at each token of a response: a pass of its own, without padding."""
    logits = model(torch.tensor([sample.prompt + sample.ids])).logits[0] / temperature
    logps = []
    entropies = []
    for t, token in enumerate(sample.ids):
        all_logps = logits[len(sample.prompt) - 1 + t].log_softmax(-1)
        logps.append(all_logps[token])
        entropies.append(-(all_logps.exp() * all_logps).sum())
    return logps, entropies


def gamma_by_hand(model, samples):
    """The 90th percentile of the ratio over the tokens of hinted responses."""
    ratios = []
    for sample in samples:
        logps = full_logps(model, sample.prompt, sample.ids)
        ratios += [math.exp(logp - old) for logp, old in zip(logps, sample.old_logps)]
    ratios.sort()
    place = 0.9 * (len(ratios) - 1)
    low = ratios[math.floor(place)]
    return low + (place - math.floor(place)) * (ratios[math.ceil(place)] - low)


def loss_by_hand(model, method, row, groups, temperature=1.0, entropy_coef=None, **settings):
    """The loss of an update as it is published: one sample at a time, means as they are written."""
    _, clip_eps, _, _, bonus, _ = PUBLISHED[row]
    settings = {"clip_eps": clip_eps} | settings
    if method in ("sft", "rl_sft"):
        settings["shaping"] = "log"
    if method == "guide":
        hinted = [sample for sample in sum(groups, []) if sample.off_policy]
        settings["gamma"] = gamma_by_hand(model, hinted)
    objectives = []
    entropies = []
    for group in groups:
        objectives.append([])
        for sample, advantage in zip(group, published_advantages(method, row, group)):
            logps, at_tokens = read_by_hand(model, sample, temperature)
            entropies += at_tokens
            of_tokens = []
            for pair in zip(logps, sample.old_logps):
                of_tokens.append(token_by_hand(*pair, advantage, sample.off_policy, **settings))
            objectives[-1].append((sample.off_policy, of_tokens))
    if method == "sft":
        bonus = 0.0
    elif entropy_coef is not None:
        bonus = entropy_coef
    return -published_average(row, objectives) - bonus * average(entropies)


def unequal_groups(model, end, method):
    """Groups of 4, 6 and 3 responses of 1 to 9 tokens, the last one without signal; on-policy
    ratios lie on both sides of the clip. What is off-policy depends on the method.
    """
    rewards = [[1.0, 0.1, 0.0, 0.1], [0.1, 1.0, 1.0, 0.0, 0.1, 0.5], [0.1, 0.1, 0.1]]
    slots = {"luffy": [(0, 0), (1, 0), (2, 0)], "ampo": [(0, 0), (1, 1), (1, 2)]}
    slots["rl_sft"] = slots["luffy"]
    slots["sft"] = list(itertools.product(range(3), range(6)))
    ratios = itertools.cycle([1.0, 0.5, 1.1, 1.6, 0.9])
    lengths = iter([1, 9, 3, 5, 2, 7, 1, 4, 8, 3, 2, 6, 1])
    rng = random.Random(0)
    groups = [[], [], []]
    for g, i in itertools.product(range(3), range(6)):
        if i >= len(rewards[g]):
            continue
        prompt = [4 + g] * (1 + 2 * g)
        ids = [rng.randrange(60) for _ in range(next(lengths) - 1)] + [end]
        trace = (g, i) in slots.get(method, [])
        old_logps = [0.0] * len(ids)
        if not trace:
            exact = full_logps(model, prompt, ids)
            old_logps = [logp - math.log(next(ratios)) for logp in exact]
        off_policy = trace or (method == "guide" and g == 1)
        more = dict(old_logps=old_logps, off_policy=off_policy)
        groups[g].append(sample_of(ids, prompt, rewards[g][i], **more))
    return groups


@pytest.fixture(scope="module")
def unequal(tokenizer):
    """{method: unequal_groups}, for the weights that every student of make_student begins with."""
    model = random_model(len(tokenizer), scale=1.0)
    end = tokenizer.eos_token_id
    return {method: unequal_groups(model, end, method) for method in OWN_ROWS}


def flags_of(method, row):
    return dict(method=method, recipe=row[0], follow=row[1])


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient that it is given, flat, and moves nothing."""

    def step(self, closure=None):
        gradients = []
        for weight in self.param_groups[0]["params"]:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(gradient.flatten())
        self.seen = torch.cat(gradients)


def trainable(student):
    return [*student.model.parameters(), *student.value_head.parameters()]


def flat(tensors):
    """All numbers of some tensors as one tensor of its own."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(student, groups):
    """The gradient of one update before the clip at norm 1, and what update() returned."""
    optimizer = Recorder(trainable(student), lr=1.0)
    sums = ampo.update(student, optimizer, groups)
    return optimizer.seen * max(1.0, sums["grad_norm"]), sums


def gradient_by_hand(student, loss):
    weights = trainable(student)
    return flat(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))


def expect_gradient(case, got, wanted):
    """The distance of two gradients, relative to their size."""
    size = wanted.norm().item()
    distance = (got - wanted).norm().item() / (size or 1.0)
    expect(f"{case}: gradient of norm {size:.4g}, relative distance < 1e-4", distance < 1e-4, True)


class Test_group_advantages:
    REWARDS = [[1.0, 0.0, 0.1, 0.1], [0.1] * 4, [1.0, 1.0, 1.0, 0.0]]

    @pytest.mark.parametrize("row", PUBLISHED, ids=" ".join)
    def test_are_the_rewards_against_their_group(self, row):
        rewards = torch.tensor(self.REWARDS)
        std_eps = PUBLISHED[row][0]
        flags = [] if std_eps is None else [True, std_eps]
        got = ampo.group_advantages(rewards, *flags)
        for reward_row, values in zip(self.REWARDS, got):
            group = [sample_of([5], reward=reward) for reward in reward_row]
            wanted = published_advantages("grpo", row, group)
            expect(f"rewards {reward_row}, std and std_eps {flags}", values, wanted, 1e-6)
        expect("mistake 7: the rewards that were given do not change", rewards, self.REWARDS)

    @pytest.mark.parametrize("std", [False, True])
    @pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1 / 3])
    def test_mistake_5_equal_rewards_are_exactly_no_signal(self, std, reward):
        got = ampo.group_advantages(torch.full((3, 7), reward), std)
        case = f"groups of seven rewards {reward:.3g}, std={std}: exactly 0, no rounding noise"
        expect(case, got.abs().max().item() == 0, True)


class Test_policy_objective:
    @pytest.mark.parametrize("settings", [
        {}, dict(clip_eps=0.05, gamma=0.4), dict(clip_eps=math.inf), dict(shaping="ratio"),
        dict(shaping="log"),
    ], ids=str)
    def test_mistake_4_value_and_slope_are_the_published_ones(self, settings):
        """With max for min, a bad token that has grown likelier would not be pushed down again."""
        log_ratios = [-6.0, -0.5, -0.1, 0.1, 0.5, 2.0]
        old_logps = torch.linspace(-3, -0.1, 24).reshape(4, 6)
        logps = (torch.tensor([log_ratios] * 4) + old_logps).requires_grad_()
        advantages = torch.tensor([0.7, -0.7, 0.7, -0.7])
        of_tokens = advantages[:, None].expand(4, 6)
        if settings:  # an advantage for each token
            of_tokens = of_tokens * torch.linspace(0.5, 2, 6)
            advantages = of_tokens
        off_policy = [False, False, True, True]
        rest = [old_logps, advantages, torch.tensor(off_policy)]
        out = ampo.policy_objective(logps, *rest, **settings)
        out.sum().backward()
        for b, t in itertools.product(range(4), range(6)):
            kind = [of_tokens[b, t].item(), off_policy[b]]
            x = log_ratios[t]
            case = f"{settings}, log ratio {x}, A and off-policy {kind}"
            wanted = token_by_hand(x, 0.0, *kind, **settings)
            expect(f"{case}: value", out[b, t].item(), wanted)
            wanted = slope_by_hand(math.exp(x), *kind, **settings)
            expect(f"{case}: gradient", logps.grad[b, t].item(), wanted)

    @pytest.mark.parametrize("off_policy", [False, True])
    def test_extreme_ratios_stay_finite(self, off_policy):
        logps = torch.tensor([[0.0, -200.0]], requires_grad=True)
        rest = [torch.tensor([[-200.0, 0.0]]), torch.ones(1), torch.tensor([off_policy])]
        out = ampo.policy_objective(logps, *rest)
        out.sum().backward()
        finite = torch.stack([out, logps.grad]).isfinite().all().item()
        expect(f"log ratios 200 and -200, off-policy {off_policy}: all finite", finite, True)


class Test_token_weights:
    @pytest.mark.parametrize("row", PUBLISHED, ids=" ".join)
    @pytest.mark.parametrize("method", ["grpo", "ampo", "guide", "sft"])
    def test_are_the_derivatives_of_the_published_average(self, unequal, row, method):
        got = ampo.token_weights(unequal[method], ampo.RECIPES[row], LONGEST)
        groups = []
        leaves = {}
        for g, group in enumerate(unequal[method]):
            groups.append([])
            for i, sample in enumerate(group):
                leaves[g, i] = torch.ones(len(sample.ids), requires_grad=True)
                groups[g].append((sample.off_policy, list(leaves[g, i])))
        published_average(row, groups).backward()
        for (g, i), ones in leaves.items():
            case = f"{row}, groups of 4, 6 and 3: response {i} of group {g}, {len(ones)} tokens"
            expect(case, [got[g][i]] * len(ones), ones.grad)
        expect("mistake 8: no groups", ampo.token_weights([], ampo.RECIPES[row], LONGEST), [])


def gae_by_hand(values, reward, gae_lambda):
    """The double sum, over one response without padding."""
    n = len(values)
    deltas = [after - now for now, after in zip(values, [*values[1:], reward])]
    sums = []
    for t in range(n):
        sums.append(sum(gae_lambda ** (u - t) * deltas[u] for u in range(t, n)))
    return sums


class Test_gae:
    @pytest.mark.parametrize("settings, gae_lambda", [([], 0.95), ([1.0], 1.0), ([0.5], 0.5)])
    def test_is_the_double_sum(self, settings, gae_lambda):
        rows = [[0.3, 0.5, -0.2, 1.0, 0.4], [-0.7, 0.6, 9.0, 9.0, 9.0], [0.8, 9.0, 9.0, 9.0, 9.0]]
        rewards = [1.0, 0.0, 0.9]
        values = torch.tensor(rows)
        mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
        got = ampo.gae(values, torch.tensor(rewards), mask, *settings)
        for row, n, reward, advantages in zip(rows, (5, 2, 1), rewards, got):
            wanted = gae_by_hand(row[:n], reward, gae_lambda)
            case = f"values {row}, {n} of them real, reward {reward}, λ = {gae_lambda}"
            expect(case, advantages[:n], wanted)
        expect("mistake 7: the values that were given do not change", values, rows)


class Test_value_loss:
    @pytest.mark.parametrize("value, old, advantage, clip_eps, miss", [
        (1.0, 0.5, 0.5, 0.2, 0.3), (1.0, 0.9, 0.3, 0.2, 0.2), (0.9, 0.5, -0.5, 0.2, 0.9),
        (-1.0, 0.0, -1.0, 0.3, 0.7), (-1.0, 0.0, 1.0, 0.3, 2.0), (3.0, 2.0, 0.4, math.inf, 0.6),
    ])
    def test_is_the_larger_of_clipped_and_plain_error(self, value, old, advantage, clip_eps, miss):
        got = ampo.value_loss(*torch.tensor([[[value]], [[old]], [[advantage]]]), clip_eps)
        case = f"value {value}, was {old}, return {old + advantage}, ε = {clip_eps}"
        expect(case, got, [[miss ** 2 / 2]])


class Test_choose_recipe:
    @pytest.mark.parametrize("row", PUBLISHED, ids=" ".join)
    def test_rows_are_as_published(self, row):
        recipe = ampo.choose_recipe(ampo.Config(**flags_of(row[0], row)))
        got = [recipe.std_eps if recipe.std else None, recipe.clip_eps, recipe.right_reward]
        got += [recipe.format_reward, recipe.entropy_coef, recipe.trace_reward]
        expect(f"{row}: std_eps, clip, right, format, entropy, trace", got, [*PUBLISHED[row]], 1e-9)

    @pytest.mark.parametrize("method", OWN_ROWS)
    def test_unset_is_the_methods_own_and_no_trigger_changes_it(self, method):
        given = {"": OWN_ROWS[method], "ampo": ("ampo", "code"), "grpo": ("grpo", "paper")}
        for name, row in given.items():
            wanted = ampo.RECIPES[row]
            if method == "sft":  # the likelihood alone
                wanted = replace(wanted, entropy_coef=0.0)
            for trigger in ("fail", "half", "always"):
                flags = dict(method=method, recipe=name, trigger=trigger)
                expect(f"{flags}", ampo.choose_recipe(ampo.Config(**flags)), wanted)

    @pytest.mark.parametrize("flags, words", [
        (dict(method="grpo", follow="code"), "grpo code"), (dict(recipe="nobody"), "nobody"),
        (dict(method="guide", follow="paper"), "guide paper"),
        (dict(method="ampo", recipe="ghpo", follow="paper"), "ghpo paper"),
    ], ids=str)
    def test_a_row_that_is_absent_is_an_input_error(self, flags, words):
        said = message_of(ampo.choose_recipe, ampo.Config(**flags))
        missing = [word for word in words.split() if word not in said]
        expect(f"{flags}: words that the message {said!r} lacks", missing, [])

    @pytest.mark.parametrize("name", ["clip_eps", "entropy_coef"])
    @pytest.mark.parametrize("value", [0.0, 0.05])
    @pytest.mark.parametrize("method", OWN_ROWS)
    def test_a_flag_overrides_the_row(self, method, name, value):
        wanted = ampo.choose_recipe(ampo.Config(method=method))
        wanted = replace(wanted, **{name: value})
        got = ampo.choose_recipe(ampo.Config(**{"method": method, name: value}))
        expect(f"--method {method} --{name} {value}", got, wanted)


class Test_add_advantages:
    @pytest.mark.parametrize("method, row", PAIRS, ids=str)
    def test_every_token_has_the_published_one(self, make_student, unequal, method, row):
        groups = [*unequal[method], []]
        done = ampo.add_advantages(make_student(**flags_of(method, row)), groups)
        expect("groups, and how long each is", [len(group) for group in done], [4, 6, 3, 0])
        for got, group in zip(done, groups):
            found = {tuple(sample.ids): list(sample.advantages) for sample in got}
            rewards = [sample.reward for sample in group]
            for sample, wanted in zip(group, published_advantages(method, row, group)):
                case = f"{method}, {row}: reward {sample.reward} of {rewards}"
                expect(case, found[tuple(sample.ids)], [wanted] * len(sample.ids))
        left = [sample.advantages for sample in sum(groups, [])]
        expect("mistake 7: the samples that were given do not change", left, [()] * 13)


class Test_with_gae:
    @pytest.mark.parametrize("gae_lambda", [0.9, 0.5])
    def test_reads_the_value_head(self, make_student, gae_lambda):
        student = make_student(advantage="gae", gae_lambda=gae_lambda, micro_tokens=10)
        torch.nn.init.normal_(student.value_head.weight)
        group = [sample_of([5, 6, 7], reward=0.7), sample_of([8], reward=0.1)]
        group += [sample_of([9, 4], [4, 3, 2], 0.0), sample_of([6, 6, 6, 5], reward=1.0)]
        done = sum(ampo.add_advantages(student, [group]), [])
        found = {tuple(sample.ids): sample for sample in done}
        for sample in group:
            states = student.model.base_model(torch.tensor([sample.prompt + sample.ids]))
            before = states.last_hidden_state[0, len(sample.prompt) - 1:-1]
            values = student.value_head(before)[:, 0].tolist()
            got = found[tuple(sample.ids)]
            case = f"response {sample.ids}, reward {sample.reward}, λ = {gae_lambda}"
            expect(f"{case}: values before each token", list(got.old_values), values, 1e-4)
            wanted = gae_by_hand(values, sample.reward, gae_lambda)
            expect(f"{case}: advantages", list(got.advantages), wanted, 1e-4)


class Test_micro_batches:
    @pytest.mark.parametrize("budget", [1, 40, 100, 10000])
    def test_hold_every_sample_once_within_the_budget(self, budget):
        rng = random.Random(0)
        sizes = [(rng.randint(1, 30), rng.randint(1, 20)) for _ in range(50)]
        samples = [sample_of([i] * size, [4] * more) for i, (size, more) in enumerate(sizes)]
        batches = ampo.micro_batches(samples, budget)
        expect("the 50 samples", sorted(s.ids[0] for s in sum(batches, [])), list(range(50)))
        for batch in batches:
            longest = max(len(sample.prompt + sample.ids) for sample in batch)
            fits = len(batch) == 1 or len(batch) * longest <= budget
            expect(f"{len(batch)} rows of up to {longest} tokens, budget {budget}", fits, True)

    @pytest.mark.parametrize("budget, count", [(5, 12), (10, 6), (29, 3), (30, 2), (60, 1)])
    def test_are_as_full_as_they_can_be(self, budget, count):
        got = ampo.micro_batches([sample_of([5, 6, 7])] * 12, budget)
        expect(f"12 samples of 5 tokens, a budget of {budget}: batches", len(got), count)


class Test_guided_gamma:
    def test_is_the_90th_percentile_over_response_tokens(self, make_student):
        """Padding has a ratio as well, and so has the plain rollout: neither counts."""
        student = make_student(method="guide", micro_tokens=20)
        hinted = [sample_of([5, 6, 7, 8, 9, 10, 11], old_logps=[-0.3] * 7, off_policy=True),
                  sample_of([5], old_logps=[-0.5], off_policy=True),
                  sample_of([7, 5, 9], [4], old_logps=[-5.0] * 3, off_policy=True)]
        plain = sample_of([5, 6], old_logps=[-9.0] * 2)
        got = float(ampo.guided_gamma(student, [*hinted, plain]))
        wanted = gamma_by_hand(student.model, hinted)
        expect("hinted responses of 7, 1 and 3 tokens and a plain one", got, wanted)

    @pytest.mark.parametrize("off_policy, wanted", [(True, 1e-4), (False, 0.3)])
    def test_has_a_least_value_and_is_the_flags_where_nothing_is_hinted(
        self, make_student, off_policy, wanted
    ):
        tiny = sample_of([5, 6], old_logps=[15.0] * 2, off_policy=off_policy)
        got = float(ampo.guided_gamma(make_student(gamma=0.3), [tiny]))
        expect(f"ratios far below 1e-4, off-policy {off_policy}, --gamma 0.3", got, wanted)


class Test_update:
    @pytest.mark.parametrize("method, row", PAIRS, ids=str)
    def test_mistake_1_gradient_is_the_published_one(self, make_student, unequal, method, row):
        """All responses end with the end token, and token 0, which pads, is in some of them."""
        student = make_student(**flags_of(method, row))
        loss = loss_by_hand(student.model, method, row, unequal[method])
        wanted = gradient_by_hand(student, loss)
        got, sums = gradient_of(student, ampo.add_advantages(student, unequal[method]))
        expect_gradient(f"{method}, {row}, 13 responses", got, wanted)
        expect("grad_norm, before the clip", sums["grad_norm"], wanted.norm().item(), 1e-4)

    @pytest.mark.parametrize("flags", [
        dict(clip_eps=0.05), dict(gamma=0.4), dict(entropy_coef=0.2), dict(entropy_coef=0.0),
        dict(shaping="ratio"), dict(shaping="log"), dict(temperature=0.7),
    ], ids=str)
    def test_mistake_3_flags_change_it(self, make_student, unequal, flags):
        student = make_student(method="ampo", **flags)
        groups = unequal["ampo"]
        loss = loss_by_hand(student.model, "ampo", OWN_ROWS["ampo"], groups, **flags)
        got, _ = gradient_of(student, ampo.add_advantages(student, groups))
        expect_gradient(f"ampo with {flags}", got, gradient_by_hand(student, loss))

    @pytest.mark.parametrize("method, row", [(row[0], row) for row in PUBLISHED], ids=str)
    def test_mistake_2_does_not_depend_on_the_micro_batches(
        self, make_student, unequal, method, row
    ):
        student = make_student(**flags_of(method, row))
        parts = make_student(**flags_of(method, row), micro_tokens=1)
        groups = ampo.add_advantages(student, unequal[method])
        wanted, wanted_sums = gradient_of(student, groups)
        got, sums = gradient_of(parts, groups)
        expect_gradient(f"{method}, {row}, one by one or at once", got, wanted)
        for name in ("tokens", "clipped", "gap"):
            case = f"mistake 11, one by one or at once: {name}"
            expect(case, float(sums[name]), float(wanted_sums[name]), 1e-4)

    def test_mistake_8_without_signal_nothing_moves(self, make_student):
        student = make_student(method="grpo")
        before = flat(student.model.parameters())
        for groups in ([], [[]], [[sample_of([5], advantages=[0.0])]]):
            sums = ampo.update(student, adamw(student), groups)
            got = [sums[name] for name in ("grad_norm", "tokens", "clipped")]
            expect(f"{len(sum(groups, []))} samples without advantage: sums", got, [0, 0, 0])
        moved = (before - flat(student.model.parameters())).norm().item()
        expect("samples without advantage: the weights move by", moved, 0.0)

    @pytest.mark.parametrize("clip_eps, slope", [(5.0, -1 / 3), (0.2, 1 / 3)])
    def test_the_value_head_follows_its_error_and_the_model_does_not(
        self, make_student, clip_eps, slope
    ):
        """It says 1, said 0 before, and the returns are 0, 2, 2. The clip holds the latter back."""
        student = make_student(method="grpo", advantage="gae", clip_eps=clip_eps)
        torch.nn.init.ones_(student.value_head.bias)
        advantages = [0.0, 2.0, 2.0]
        sample = sample_of([5, 6, 7], old_values=[0.0] * 3, advantages=advantages)
        got, _ = gradient_of(student, [[sample]])
        expect(f"ε = {clip_eps}: gradient of its bias", got[-1].item(), slope)
        logps, _ = read_by_hand(student.model, sample)
        triples = zip(logps, sample.old_logps, advantages)
        objective = average([token_by_hand(*three, False, clip_eps) for three in triples])
        size = student.value_head.weight.numel() + 1
        wanted = gradient_by_hand(student, -objective)[:-size]
        expect_gradient("the model's gradient is the policy's alone", got[:-size], wanted)

    @pytest.mark.parametrize("clip_eps, clipped", [(0.2, 1), (0.05, 2), (math.inf, 0)])
    def test_sums_are_over_on_policy_tokens(self, make_student, clip_eps, clipped):
        student = make_student(clip_eps=clip_eps)
        exact = full_logps(student.model, [2, 3], [5, 6, 7])
        old_logps = [exact[0], exact[1] + 0.5, exact[2] - 0.1]   # ratios 1, 0.61 and 1.11
        rollout = sample_of([5, 6, 7], old_logps=old_logps, advantages=[1.0] * 3)
        trace = sample_of([8, 9, 10, 11], off_policy=True, advantages=[1.0] * 4)
        _, sums = ampo.batch_loss(student, [rollout, trace], 0.1, 0.0)
        got = [sums["tokens"], sums["clipped"], sums["gap"]]
        case = f"ratios 1, 0.61, 1.11, ε = {clip_eps}, and a trace: tokens, clipped, Σ|log ratio|"
        expect(case, got, [3, clipped, 0.6], 1e-3)


class Test_optimizer_step:
    @pytest.fixture
    def stepped(self, make_student):
        """stepped(gradient, poison): the student, what was returned, and the weights before."""
        def step(gradient, poison=None):
            student = make_student()
            student.rollout_model = random_model(len(student.tokenizer), scale=0.5).bfloat16()
            for weight in student.model.parameters():
                weight.grad = torch.full_like(weight, gradient)
            if poison is not None:
                weight.grad[0] = poison
            before = flat(student.model.parameters())
            optimizer = torch.optim.SGD(student.model.parameters(), lr=1.0)
            return student, ampo.optimizer_step(student, optimizer), before
        return step

    @pytest.mark.parametrize("gradient", [1e-4, 0.1])
    def test_the_gradient_is_clipped_to_norm_one(self, stepped, gradient):
        student, got, before = stepped(gradient)
        norm = gradient * math.sqrt(len(before))
        expect(f"a gradient of norm {norm:.3g}: what is returned", got, norm, 1e-3)
        moved = (before - flat(student.model.parameters())).norm().item()
        wanted = min(norm, 1.0)
        expect(f"a gradient of norm {norm:.3g}, SGD with lr 1: moves by", moved, wanted, 1e-2)
        copied = flat(student.rollout_model.parameters())
        wanted = flat(student.model.parameters()).bfloat16()
        expect("the sampler is a bfloat16 copy of the weights", torch.equal(copied, wanted), True)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_mistake_8_what_is_not_finite_is_skipped(self, stepped, capsys, poison):
        student, norm, before = stepped(1e-3, poison)
        expect(f"one {poison} in the gradient: the norm is finite", math.isfinite(norm), False)
        after = flat(student.model.parameters())
        expect("the weights stay", torch.equal(before, after), True)
        expect("a message", "not finite" in "".join(capsys.readouterr()), True)
        left = [w.grad for w in student.model.parameters() if w.grad is not None and w.grad.any()]
        expect("what is left of the gradient", left, [])


class Test_step_metrics:
    def test_mistake_11_are_of_the_students_own_rollouts_and_all_updates(self):
        """Two groups, the first of which failed and got a trace: that changes none of them."""
        wrong = dict(correct=False, reward=0.0)
        plain = [[sample_of([5, 6], old_logps=[-1.0, -2.0], **wrong | {"reward": 0.1}),
                  sample_of([5], old_logps=[-3.0], **wrong)],
                 [sample_of([5], old_logps=[-4.0]), sample_of([5, 6])]]
        trace = sample_of([7] * 9, source="one", off_policy=True, old_logps=[0.0] * 9)
        updates = [Counter(grad_norm=1.0, tokens=10, clipped=1, gap=0.5),
                   Counter(grad_norm=3.0, tokens=30, clipped=5, gap=9.0)]
        got = ampo.step_metrics(plain, [[trace, plain[0][1]], plain[1]], updates)
        wanted = dict(
            reward=2.1 / 4, fail_rate=0.5, rescued=0.5, entropy=2.0, response_length=1.5,
            grad_norm=2.0, clip_fraction=6 / 40, logp_gap=0.05,
        )
        for name, value in wanted.items():
            expect(f"four rollouts, a trace, updates {updates}: {name}", got[name], value)

    def test_rescued_groups_failed_and_have_a_success_now(self):
        plain = [group_of(0, 0), group_of(0, 0), group_of(1, 0), group_of(0, 0)]
        guided = [group_of(0, 1), group_of(0, 0), *plain[2:]]
        got = ampo.step_metrics(plain, guided, [Counter(grad_norm=math.nan)])
        names = ("fail_rate", "rescued", "grad_norm")
        case = f"three of four failed, one is solved now, the update was skipped: {names}"
        expect(case, [got[name] for name in names], [0.75, 0.25, None])

    def test_mistake_8_nothing_to_average(self):
        traces = [[sample_of([7], source="one", off_policy=True)], []]
        got = ampo.step_metrics([[], []], traces, [Counter(grad_norm=2.0)])
        names = ("reward", "fail_rate", "entropy", "response_length", "clip_fraction", "logp_gap")
        case = f"no rollouts: {names}"
        expect(case, [got[name] for name in names], [None, None, None, None, 0, 0])


class Test_train_step:
    FIVE = [problem_of(question=f"Solve {a}*x=3.", answer=f"3/{a}") for a in (2, 5, 7, 8, 11)]

    @pytest.fixture
    def make(self, make_student, tokenizer):
        """A student whose third rollout is right for the first problem; all others are wrong."""
        def make(**flags):
            student = make_student(**flags)
            student.generate = scripted(tokenizer, lambda prompt, i: RIGHT if i == 2 else WRONG)
            return student
        return make

    @pytest.mark.parametrize("method, rescued", [("grpo", 0), ("ampo", 1)])
    def test_advantages_are_of_the_groups_after_guidance(self, make, method, rescued):
        student = make(method=method, recipe="ampo", entropy_coef=0.0)
        before = flat(student.model.parameters())
        problem = problem_of(answer="1", teachers={"one": "\\boxed{1}"})
        got = ampo.train_step(student, adamw(student), [problem])
        names = ("reward", "fail_rate", "entropy", "rescued")
        case = f"{method}, four wrong rollouts: {names}"
        expect(case, [got[name] for name in names], [0.1, 1.0, 0.5, float(rescued)])
        moved = not torch.equal(before, flat(student.model.parameters()))
        case = f"{method}: there is a gradient, the weights move"
        expect(case, [got["grad_norm"] > 0, moved], [bool(rescued)] * 2)
        responses = [(r["text"], r["reward"]) for r in got["example"]["responses"]]
        wanted = [(text, 0.1) for text in (WRONG, WRONG, RIGHT, WRONG)]
        wanted += [("\\boxed{1}", 1.0)] * rescued
        expect(f"{method}: the rollouts, then what guidance brought", responses, wanted)

    def test_sft_samples_nothing(self, make_student):
        student = make_student(method="sft")
        student.generate = None
        got = ampo.train_step(student, adamw(student), self.FIVE[:2])
        expect("no reward, a gradient", [got["reward"], got["grad_norm"] > 0], [None, True])

    @pytest.mark.parametrize("num_minibatches, wanted", [(1, [5]), (2, [2, 3]), (3, [1, 2, 2])])
    def test_updates_share_whole_groups(self, make, monkeypatch, num_minibatches, wanted):
        """Rollouts take 1 s, guidance 10 s, each update 100 s."""
        now = [50.0]
        seen = []

        def slow(function, seconds):
            def call(*args, **more):
                now[0] += seconds
                return function(*args, **more)
            return call

        def update(student, optimizer, groups):
            seen.append(groups)
            return Counter(grad_norm=1.0)

        student = make(method="grpo", num_minibatches=num_minibatches)
        student.generate = slow(student.generate, 1)
        student.method = replace(student.method, guide=slow(student.method.guide, 10))
        monkeypatch.setattr(ampo, "update", slow(update, 100))
        for name in ("perf_counter", "monotonic", "time"):
            monkeypatch.setattr(time, name, lambda: now[0])
        got = ampo.train_step(student, adamw(student), self.FIVE)
        sizes = sorted(len(groups) for groups in seen)
        expect(f"five groups in {num_minibatches} updates: groups of each", sizes, wanted)
        samples = sum(sum(seen, []), [])
        expect("prompts", set(Counter(tuple(s.prompt) for s in samples).values()), {4})
        expect("all have advantages", all(len(s.advantages) == len(s.ids) for s in samples), True)
        got = [got[name] for name in ("rollout_s", "guide_s", "update_s", "tokens")]
        wanted = [1.0, 10.0, 100.0 * len(wanted), sum(len(s.ids) for s in samples)]
        expect("seconds of rollouts, guidance, updates; tokens sampled", got, wanted)


# -------------------------------------------------------------------------------------------------
# §3 Guidance, and prompts, verdicts and rollouts of §4


# The worked examples are those of the reference: a file to be graded may lack them.
EXAMPLES = {}
for node in ast.parse((HERE / "ampo.py").read_text(encoding="utf-8")).body:
    if isinstance(node, ast.FunctionDef) and ">>>" in ast.unparse(node):
        EXAMPLES[node.name] = ast.get_docstring(node)


@pytest.fixture(scope="module")
def example_names(base_model, tokenizer):
    """What the examples call student, problem, wrong and right."""
    question = "Solve 3*(4*x+2)-4=20."
    texts = {
        "undo": "3*(4*x+2)-4=20\n3*(4*x+2)=24\n4*x+2=8\n4*x=6\n\\boxed{3/2}",
        "work": "20+4=24\n24/3=8\n8-2=6\n\\boxed{3/2}",
        "secant": "0: 0,2,6,2\n1: 4,6,18,14\n(20-2)/(14-2)\n\\boxed{3/2}",
    }
    hint = f"{question}\nHint: the steps give 24, 8."
    prompt = prompt_of(tokenizer, question)
    return {
        "student": student_of(base_model, tokenizer, max_new_tokens=128),
        "problem": ampo.Problem(question, "3/2", texts, hint, texts["work"]),
        "wrong": sample_of([8, 1], prompt, 0.1, False),
        "right": sample_of([8, 1], prompt),
    }


class TestWorkedExamples:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_comes_out_as_written(self, example_names, name):
        parse = doctest.DocTestParser().get_doctest
        example = parse(EXAMPLES[name], vars(ampo) | example_names, name, None, None)
        torch.manual_seed(0)
        said = []
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
        if runner.run(example, out=said.append).failed:
            lines = "".join(said).splitlines()[2:]  # without stars and line number
            pytest.fail(f"{name}: its worked example\n" + "\n".join(lines), pytrace=False)


def begins_texts():
    """A tokenizer that begins every text with a token of its own, as those of Llama and Gemma."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    token = tokenizer.convert_ids_to_tokens(2)
    begin = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, 2)])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


def rollouts_of(rights):
    """A group from text: "010" is wrong, right, wrong."""
    return group_of(*[right == "1" for right in rights])


def sources_of(group):
    return [sample.source for sample in group]


def guided(student, problems, groups):
    """What the student's method makes of the groups, which must stay as they were."""
    before = repr(groups)
    result = student.method.guide(student, problems, groups)
    expect("mistake 7: the groups that were passed in", repr(groups), before)
    return result


class Test_needs_guidance:
    @pytest.mark.parametrize("rights, wanted", [
        ("0000", "fail half"), ("0010", "half"), ("1010", ""), ("01001", "half"), ("1", ""),
    ])
    def test_counts_the_right_ones_not_their_rewards(self, rights, wanted):
        group = rollouts_of(rights)
        for trigger in ("fail", "half", "always"):
            got = bool(ampo.needs_guidance(group, trigger))
            expect(f"{rights}, {trigger}", got, trigger in wanted + "always")
        expect(f"{rights}, no trigger given", bool(ampo.needs_guidance(group)), "fail" in wanted)


class Test_teacher_samples:
    def test_mistake_1_traces_keep_the_end_token(self, make_student, tokenizer):
        """Nothing else is added; all have probability 1. Those that are empty or longer than the
        student may write are left out.
        """
        texts = {"one": f"2*x=3\n{RIGHT}", "two": RIGHT, "long": f"2*x=33\n{RIGHT}", "empty": ""}
        ids = [ids_of(tokenizer, text) + [tokenizer.eos_token_id] for text in texts.values()]
        student = make_student(max_new_tokens=len(ids[0]))
        student.tokenizer = begins_texts()
        student.eos = [tokenizer.eos_token_id, 9]
        prompt = prompt_of(tokenizer, PROBLEM["question"])
        samples = ampo.teacher_samples(student, problem_of(teachers=texts))
        expect("traces that fit, too long, empty", sources_of(samples), ["one", "two"])
        for s, tokens in zip(samples, ids):
            got = (s.prompt, s.ids, s.old_logps, s.text, s.off_policy)
            wanted = (prompt, tokens, [0.0] * len(tokens), texts[s.source], True)
            expect(f"trace {s.text!r}", got, wanted)

    @pytest.mark.parametrize("recipe, follow", ampo.RECIPES)
    def test_correct_is_what_the_verifier_says(self, make_student, recipe, follow):
        """Only the recipe ampo gives all traces the reward 1."""
        student = make_student(recipe=recipe, follow=follow)
        texts = {"one": WRONG, "two": RIGHT, "three": "none"}
        samples = ampo.teacher_samples(student, problem_of(teachers=texts))
        case = f"traces wrong, right, without answer; recipe {recipe}, {follow}"
        expect(f"{case}: correct", [s.correct for s in samples], [False, True, False])
        pays = student.recipe.format_reward
        wanted = [pays, student.recipe.right_reward + pays, 0.0]
        if recipe == "ampo":
            wanted = [1.0, 1.0, 1.0]
        expect(f"{case}: rewards", [float(s.reward) for s in samples], wanted)


def comprehension_by_hand(model, tokenizer, lead, answer, mean, system):
    """r_p of one trace that was cut after `lead`, to the question Why?"""
    before = ids_of(tokenizer, lead)
    whole = ids_of(tokenizer, lead + answer)
    start = 0
    while whole[:start + 1] == before[:start + 1]:
        start += 1
    prompt = prompt_of(tokenizer, "Why?", system)
    logps = full_logps(model, prompt + whole[:start], whole[start:])
    if "geometric" in mean:
        return math.exp(statistics.mean(logps))
    return statistics.mean([math.exp(logp) for logp in logps])


class Test_comprehension:
    LEADS = {
        "\\boxed{7}\n\\boxed{9/4} it is": "\\boxed{7}\n\\boxed{",
        "\\boxed{3/2}": "\\boxed{", "\\boxed{99}": "\\boxed{", "\\boxed{ 9}": "\\boxed{",
        "a <answer>9</answer>": "a <answer> ", "a <answer> 9</answer>": "a <answer> ",
        "a <answer>\n 9</answer>": "a <answer>\n ",
    }

    @pytest.mark.parametrize("mean", [[], ["arithmetic"], ["geometric"]])
    @pytest.mark.parametrize("answer, own", [("3/2", ""), ("-37/2", "Be kind.")])
    def test_is_the_probability_of_the_gold_answer(self, tokenizer, mean, answer, own):
        """In place of the last answer. A tag without whitespace gets one space. As "{-3" is one
        token here, an answer may begin inside a token. A problem's own system prompt comes first.
        """
        tokenizer = begins_texts()  # that token must not come in
        tokenizer.add_tokens(["{-3"])
        model = random_model(len(tokenizer))
        problem = problem_of(question="Why?", answer=answer, system=own)
        system = own if own else "Be brief."
        wanted = [0.0, 0.0, 0.0]
        for lead in self.LEADS.values():
            wanted.append(comprehension_by_hand(model, tokenizer, lead, answer, mean, system))
        recorded = set()

        def look(module, args, output):
            recorded.add(output.last_hidden_state.requires_grad)

        model.base_model.register_forward_hook(look)
        traces = ["no mark", "boxed{2}", "", *self.LEADS]
        got = ampo.comprehension(model, tokenizer, problem, traces, *mean, system="Be brief.")
        for trace, one, other in zip(traces, got, wanted, strict=True):
            expect(f"trace {trace!r}, answer {answer}, mean {mean}", one, other)
        expect("its pass is recorded for a gradient", recorded, {False})
        expect("no traces", ampo.comprehension(model, tokenizer, problem, []), [])


def understand(monkeypatch, scores):
    """Comprehension becomes {trace: r}. The set that is returned says how it was asked."""
    asked = set()

    def comprehension(model, tokenizer, problem, traces, mean="arithmetic", system=""):
        asked.add((mean, system))
        return [scores[trace] for trace in traces]

    monkeypatch.setattr(ampo, "comprehension", comprehension)
    return asked


UNDERSTOOD = dict(zip(PROBLEM["teachers"].values(), (0.2, 0.9, 0.8)))
LENGTHS = {"mid": f"2*x=3\n{RIGHT}", "short": RIGHT, "long": f"2*x=3\n2*x=3\n{RIGHT}"}


class Test_choose_traces:
    @pytest.mark.parametrize("follow, mean", [("code", "arithmetic"), ("paper", "geometric")])
    def test_takes_the_best_understood(self, make_student, monkeypatch, follow, mean):
        """In a tie the shorter one. The code compares in bfloat16, which has 8 binary digits."""
        student = make_student(follow=follow, system="Be brief.")
        generator = random.Random(0)
        for near in [0.0, 1e-3, 0.1] + [0.004 * generator.random() for _ in range(100)]:
            long = generator.random()
            short = long - near * long
            scores = dict(zip(LENGTHS.values(), (0.0, short, long)))
            asked = understand(monkeypatch, scores)
            (got,) = ampo.choose_traces(student, problem_of(teachers=LENGTHS), 1)
            digits = 60 if follow == "paper" else 8 - math.frexp(long)[1]
            more = round(math.ldexp(long, digits)) > round(math.ldexp(short, digits))
            case = f"--follow {follow}: a long trace understood {long}, a short one {short}"
            expect(case, got.source, "long" if more else "short")
            expect("mean and system prompt", asked, {(mean, "Be brief.")})

    def test_by_length_or_chance(self, make_student):
        torch.manual_seed(0)
        random.seed(0)
        for select, wanted in (("shortest", "short mid"), ("longest", "long mid"), ("random", "")):
            student = make_student(select=select)
            seen = set()
            for _ in range(40):
                got = ampo.choose_traces(student, problem_of(teachers=LENGTHS), 2)
                seen.add(" ".join(sources_of(got)))
            expect(f"--select {select}: ordered pairs", len(seen), 1 if wanted else 6)
            expect(f"--select {select}", wanted in seen, bool(wanted))


class Test_swap_in:
    def test_mistake_7_takes_random_places_in_a_new_group(self):
        torch.manual_seed(0)
        random.seed(0)
        a = sample_of([7], source="a", off_policy=True)
        b = sample_of([8], source="b", off_policy=True)
        for rights, traces, wanted in (
            ("00100", [a, b], 12), ("10", [a, b], 1), ("11", [a], 1), ("000", [a, b], 6),
        ):
            group = rollouts_of(rights)
            seen = set()
            for _ in range(150):
                got = ampo.swap_in(traces, group)
                seen.add(tuple(sources_of(got)))
                kept = [new == old or new.off_policy > old.correct for new, old in zip(got, group)]
                expect(f"{rights}: kept, or wrong ones replaced", kept, [True] * len(rights))
            swapped = min(len(traces), rights.count("0"))
            expect(f"{rights}: traces", sum(s.off_policy for s in got), swapped)
            expect(f"{rights}: arrangements of {len(traces)} traces", len(seen), wanted)
            expect("the group that was passed in", group, rollouts_of(rights))


class Test_guide_luffy:
    @pytest.mark.parametrize("method", ["luffy", "rl_sft"])
    def test_a_trace_takes_slot_zero_of_every_group(self, make_student, method):
        groups = [rollouts_of("111"), rollouts_of("000"), rollouts_of("01")]
        student = make_student(method=method)
        trace = ampo.teacher_samples(student, problem_of())[:1]
        got = guided(student, [problem_of(), problem_of(), problem_of(teachers={})], groups)
        wanted = [trace + groups[0][1:], trace + groups[1][1:], groups[2]]
        expect("right, wrong, without a teacher", got, wanted)
        expect(f"{method}: imitates", student.method.imitates, method == "rl_sft")


class Test_guide_ampo:
    @pytest.mark.parametrize("case", [
        "fail 1 0000 two", "fail 2 0000 two three", "fail 3 00 two three", "fail 2 0100",
        "half 1 0000 two three", "half 2 0100 two", "half 2 1100", "half 1 00000 two three",
        "half 2 0000000 one two three", "always 2 1110 two", "always 1 0100 two", "always 2 11",
    ])
    def test_swaps_in_what_is_understood(self, make_student, monkeypatch, case):
        """--trigger half fills up to half of the group, whatever --k."""
        understand(monkeypatch, UNDERSTOOD)
        trigger, k, rights, *wanted = case.split()
        student = make_student(trigger=trigger, k=int(k))
        bare = problem_of(teachers={})
        got, other = guided(student, [problem_of(), bare], [rollouts_of(rights)] * 2)
        traces = {s.source for s in got if s.off_policy}
        case = f"--trigger {trigger} --k {k}, right: {rights}"
        expect(f"{case}: traces, size", (traces, len(got)), (set(wanted), len(rights)))
        kept = sum(s.correct for s in got if not s.off_policy)
        expect(f"{case}: right ones kept", kept, rights.count("1"))
        expect(f"{case}: no teachers", other, rollouts_of(rights))


def says_four_things(prompt, i):
    return [RIGHT, WRONG, "no answer", "\\boxed{3/2"][i]


class Test_sample_again:
    @pytest.mark.parametrize("trigger, wanted", [("fail", [1, 4]), ("half", [1, 2, 4])])
    def test_new_rollouts_of_the_messages(self, make_student, tokenizer, trigger, wanted):
        student = make_student()
        student.generate = scripted(tokenizer, says_four_things)
        groups = [rollouts_of(rights) for rights in ("11", "00", "010", "0", "0")]
        messages = ["zero", "one", "two", "", "four"]
        problems = [problem_of()] * 4 + [problem_of(answer="5")]
        got = ampo.sample_again(student, problems, groups, messages, trigger)
        expect(f"--trigger {trigger}: groups", sorted(got), wanted)
        for i, group in got.items():
            prompt = prompt_of(tokenizer, messages[i])
            expect(f"{messages[i]}: prompts", [s.prompt for s in group], [prompt] * 4)
            expect(f"{messages[i]}: correct", group[0].correct, i != 4)


class Test_guide_guide:
    @pytest.mark.parametrize("follow", ["code", "paper"])
    def test_hinted_rollouts_serve_the_plain_prompt(self, make_student, tokenizer, follow):
        """They replace the group (code) or join it (paper)."""
        student = make_student(method="guide", recipe="ampo", follow=follow)
        student.generate = scripted(tokenizer, says_four_things)
        groups = [rollouts_of("0000"), rollouts_of("0000"), rollouts_of("0100")]
        problems = [problem_of(), problem_of(hint=""), problem_of()]
        got = guided(student, problems, groups)
        expect("without a hint, or with a success", got[1:], groups[1:])
        plain = [s for s in got[0] if not s.off_policy]
        expect(f"--follow {follow}: plain", plain, groups[0] if follow == "paper" else [])
        hinted = [s for s in got[0] if s.off_policy]
        expect("hinted: correct", [s.correct for s in hinted], [True, False, False, False])
        wanted = ("hint", prompt_of(tokenizer, PROBLEM["question"]))
        expect("source, prompt", [(s.source, s.prompt) for s in hinted], [wanted] * 4)

    def test_mistake_6_old_logps_are_those_under_the_hint(self, make_student, tokenizer):
        student = make_student(method="guide", max_new_tokens=6)
        (group,) = guided(student, [problem_of()], [rollouts_of("0000")])
        prompt = prompt_of(tokenizer, PROBLEM["hint"])
        for s in group:
            expect(f"{s.ids}", s.old_logps, full_logps(student.model, prompt, s.ids), 1e-4)


class Test_guide_ghpo:
    def test_shows_more_until_a_group_has_a_success(self, make_student, tokenizer):
        """And trains on the prompt that it sampled with; the last share even where it fails."""
        shown = {"q1?": "ab", "q2?": "abcde", "q3?": "abcdefgh", "q4?": "abcdefgh"}
        lead = "the beginning part of the answer, which you can refer to for solving the problem:\n"
        prompts = []
        for name, prefix in shown.items():
            message = f"{name}\n The following text is {lead}{prefix}"
            prompts.append(prompt_of(tokenizer, message))
        asked = []

        def says(text, i):
            asked.append(text)
            solved = ids_of(tokenizer, text) in prompts[:3]
            return RIGHT if solved and i == 0 else WRONG

        student = make_student(method="ghpo")
        student.generate = scripted(tokenizer, says)
        problems = [problem_of(question=name) for name in shown]
        others = [problem_of(), problem_of(solution="")]
        groups = [rollouts_of("0000")] * 4 + [rollouts_of("0100"), rollouts_of("0000")]
        got = guided(student, problems + others, groups)
        for name, prompt, group in zip(shown, prompts, got):
            expect(f"{name}: prompts", [s.prompt for s in group], [prompt] * 4)
            how = (group[0].source, group[0].off_policy, group[0].correct)
            expect(f"{name}: source, off-policy, correct", how, ("hint", False, name != "q4?"))
        expect("a success; no solution", got[4:], groups[4:])
        expect("rollouts of 1, 2, 3 and 3 shares", len(asked), 9 * 4)


class Test_encode_prompt:
    @pytest.mark.parametrize("system", ["", "Be kind."])
    def test_is_the_chat_template_with_the_assistants_turn_begun(self, tokenizer, system):
        before = f"<|system|>{system}<|end|>" if system else ""
        wanted = tokenizer(before + "<|user|>Why?<|end|><|assistant|>").input_ids
        expect(f"system prompt {system!r}", ampo.encode_prompt(tokenizer, "Why?", system), wanted)
        wanted = prompt_of(begins_texts(), "Why?", system)
        expect("nothing is added", ampo.encode_prompt(begins_texts(), "Why?", system), wanted)


class Test_verdict:
    @pytest.mark.parametrize("recipe", ampo.RECIPES.values())
    def test_pays_as_the_recipe_says(self, recipe, monkeypatch):
        """The question is passed on: a verifier refuses a copy of it."""
        for text, correct, read in ((RIGHT, 1, 1), (WRONG, 0, 1), ("3/2", 0, 0)):
            reward = recipe.right_reward * correct + recipe.format_reward * read
            got = ampo.verdict(recipe, problem_of(), text)
            expect(f"{recipe}: {text!r} for 3/2", got, (correct == 1, reward))

        def told(response, gold="", question=""):
            return [response, gold, question] == ["text", "3/2", PROBLEM["question"]]

        monkeypatch.setattr(ampo, "verify", told)
        monkeypatch.setattr(ampo, "gives_answer", told)
        wanted = (True, recipe.right_reward + recipe.format_reward)
        expect("all three reach both", ampo.verdict(recipe, problem_of(), "text"), wanted)


class Test_rollout:
    @pytest.mark.parametrize("room, passes", [(0.01, 11), (1, 11), (2.5, 6), (3, 4), (50, 1)])
    def test_a_pass_holds_no_more_than_the_cache(self, make_student, tokenizer, room, passes):
        messages = [f"Solve {'17' * length}." for length in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)]
        prompts = [prompt_of(tokenizer, message) for message in messages]
        row = 4 * (max(map(len, prompts)) + 10)
        cache = max(1, int(room * row))
        student = make_student(max_new_tokens=10, cache_tokens=cache)
        student.tokens_sampled = 5
        sampler = scripted(tokenizer, says_four_things)
        held = []

        def generate(model, prompts, *more, **named):
            held.append(4 * len(prompts) * (max(map(len, prompts)) + 10))
            return sampler(model, prompts, *more, **named)

        student.generate = generate
        problems = [problem_of()] * 10 + [problem_of(answer="5")]
        groups = ampo.rollout(student, problems, messages)
        case = f"a cache for {room} prompts with their rollouts, the longest"
        expect(f"{case}: no more in a pass", max(held) <= max(row, cache), True)
        expect(f"{case}: no more passes than {passes}", len(held) <= passes, True)
        expect("prompts", [group[3].prompt for group in groups], prompts)
        expect("answer 3/2", [s.reward for s in groups[9]], [1.0, 0.1, 0.0, 0.0])
        expect("answer 5", [s.correct for s in groups[10]], [False, True, False, False])
        ids = ids_of(tokenizer, RIGHT) + [tokenizer.eos_token_id]
        expect("the end token stays", (groups[0][0].ids, groups[0][0].text), (ids, RIGHT))
        tokens = sum(len(s.ids) for s in groups[0])
        expect("tokens counted, 5 before", student.tokens_sampled, 5 + 11 * tokens)

    @pytest.mark.parametrize("own, used", [("", "Be brief."), ("Be kind.", "Be kind.")])
    def test_mistake_3_samples_as_it_was_configured(self, make_student, tokenizer, own, used):
        student = make_student(max_new_tokens=6, temperature=0.6, system="Be brief.")
        prompt = prompt_of(tokenizer, "Why?", used)
        for eos, size in (([], 6), (list(range(len(tokenizer))), 1)):
            student.eos = eos
            (group,) = ampo.rollout(student, [problem_of(system=own)], ["Why?"])
            expect(f"{len(eos)} end tokens, room for 6", [len(s.ids) for s in group], [size] * 4)
            for s in group:
                expect(f"own system prompt {own!r}", s.prompt, prompt)
                wanted = full_logps(student.rollout_model, prompt, s.ids, 0.6)
                expect(f"old_logps of {s.ids} at temperature 0.6", s.old_logps, wanted, 1e-4)
        expect("no problems", ampo.rollout(student, [], []), [])


# =================================================================================================
# §5 Log-probabilities and §6 sampling


@pytest.fixture(scope="module")
def generate():
    """The sampler in question: ampo's, or that of the file which AMPO_SAMPLER names."""
    path = os.environ.get("AMPO_SAMPLER")
    if path is None:
        return ampo.generate
    return load_file("sampler", path).generate


def contradicts(outcomes, probabilities):
    """Chi-square: are outcomes further from {outcome: p} than five standard deviations?"""
    counts = Counter(outcomes)
    draws = len(outcomes)
    common = [one for one, p in probabilities.items() if draws * p >= 10]
    pairs = [(counts[one], draws * probabilities[one]) for one in common]
    rare = (draws - sum(seen for seen, _ in pairs), draws - sum(wanted for _, wanted in pairs))
    statistic = sum((seen - wanted) ** 2 / max(wanted, 10) for seen, wanted in [*pairs, rare])
    return statistic > len(pairs) + 5 * math.sqrt(2 * len(pairs))


@torch.no_grad()
def next_token(model, ids, temperature=1.0):
    """Oracle: the probability of each token after ids."""
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    return (logits / temperature).softmax(-1).tolist()


def expect_exact(model, prompts, groups, temperature=1.0):
    """Sampled log-probabilities equal those of one sequence at a time, without cache or padding."""
    for prompt, group in zip(prompts, groups):
        for ids, logps in group:
            case = f"temperature {temperature}: log-probabilities of {ids} after {prompt}"
            expect(case, logps, full_logps(model, prompt, ids, temperature), 3e-4)


PLAIN = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
)
WINDOW = PLAIN | {"head_dim": 8, "sliding_window": 16}
FAMILIES = {
    "qwen2": PLAIN, "qwen3": PLAIN | {"head_dim": 8}, "llama": PLAIN,
    "gemma": PLAIN | {"head_dim": 8}, "mistral": WINDOW,
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
}


def family_model(kind, **changes):
    """A tiny random model of a family, its predictions peaked."""
    torch.manual_seed(1)
    settings = dict(vocab_size=60, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    config = AutoConfig.for_model(kind, **settings | FAMILIES[kind] | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def table_model(then):
    """The likeliest token after each one is then[token]: attention and MLP say nothing."""
    model = random_model(vocab=30)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(30, 32)
    model.lm_head.weight.data.zero_()
    for token, following in then.items():
        model.lm_head.weight.data[following, token] = 1.0
    return model


class Test_pad:
    @pytest.mark.parametrize("side, tokens, real", [
        ("right", [[5, 0, 7], [8, 0, 0], [0, 9, 0]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        ("left", [[5, 0, 7], [0, 0, 8], [0, 0, 9]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
    ])
    def test_the_mask_comes_from_the_lengths(self, side, tokens, real):
        got, mask = ampo.pad([[5, 0, 7], [8], [0, 9]], torch.device("cpu"), side)
        expect("types of ids and mask", [got.dtype, mask.dtype], [torch.long, torch.bool])
        expect(f"[[5, 0, 7], [8], [0, 9]] padded on the {side}", got, tokens)
        expect("its mask", mask.int(), real)

    def test_on_the_right_unless_told_on_the_device_asked_for(self):
        got, _ = ampo.pad([[0.5], [1.5, 2.5]], torch.device("cpu"))
        expect("[[0.5], [1.5, 2.5]]", got, [[0.5, 0.0], [1.5, 2.5]])
        devices = [tensor.device.type for tensor in ampo.pad([[1], [2, 3]], torch.device("meta"))]
        expect("devices of ids and mask", devices, ["meta", "meta"])


class Test_read_head:
    def run(self, outputs=11, dtype=torch.float32):
        """Values and gradients of 37 tokens, and those by full logits.

        outputs: how many the head says it has, which decides how the tokens are cut.
        """
        torch.manual_seed(0)
        head = torch.nn.Linear(8, 11, bias=False, dtype=dtype)
        head.out_features = outputs
        states = torch.randn(37, 8, dtype=dtype, requires_grad=True)
        targets = torch.arange(37) % 11
        got = ampo.read_head(head, states, targets, 0.7)
        log_p = ((states @ head.weight.T).float() / 0.7).log_softmax(-1)
        exact = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        gradients = []
        for logps, entropies in (got, exact):
            loss = (2 * logps - entropies).mean()
            gradients.append(torch.autograd.grad(loss, [states, head.weight]))
        return [*got, *gradients[0]], [*exact, *gradients[1]]

    @pytest.mark.parametrize("outputs", [11, 2**22, 2**27])
    def test_the_same_in_chunks_in_value_and_gradient(self, outputs):
        got, wanted = self.run(outputs)
        for name, one, other in zip(("logps", "entropies", "∇states", "∇weight"), got, wanted):
            expect(f"{name}, a head that says it has {outputs} outputs", one, other, 1e-4)

    def test_low_precision_is_normalised_in_float32(self):
        got, wanted = self.run(dtype=torch.bfloat16)
        expect("types", [one.dtype for one in got[:2]], [torch.float32, torch.float32])
        expect("log-probabilities and entropies", torch.stack(got[:2]), torch.stack(wanted[:2]))

    @engine
    @pytest.mark.parametrize("outputs, wanted", [(2**20, [16, 16, 5]), (2**25, [1] * 37)])
    def test_logits_exist_for_some_tokens_at_a_time(self, monkeypatch, outputs, wanted):
        """The head reads 2^24 / outputs tokens at a time, and again in the backward pass."""
        rows = []

        def forward(head, states):
            rows.append(len(states))
            return torch.nn.functional.linear(states, head.weight)

        monkeypatch.setattr(torch.nn.Linear, "forward", forward)
        self.run(outputs)
        expect(f"rows at a time, {outputs} outputs", rows[:len(wanted)], wanted)
        expect("rows altogether", sum(rows), 2 * 37)


class Test_score:
    PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
    RESPONSES = [[13, 14], [15, 16, 17, 18, 1], [1]]

    @pytest.mark.parametrize("temperature, tied", [(1.0, True), (0.5, False)])
    def test_equals_full_logits_in_value_and_gradient(self, temperature, tied):
        model = random_model(tie_word_embeddings=tied)
        twin = random_model(tie_word_embeddings=tied)
        logps, mask, entropy, values = ampo.score(model, self.PROMPTS, self.RESPONSES, temperature)
        expect("type of the mask, values", [mask.dtype, values], [torch.bool, None])
        (2 * logps - entropy).sum().backward()
        for i, (prompt, response) in enumerate(zip(self.PROMPTS, self.RESPONSES)):
            logits = twin(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
            log_p = (logits / temperature).log_softmax(-1)
            exact = log_p.gather(1, torch.tensor(response)[:, None])[:, 0]
            spread = -(log_p.exp() * log_p).sum(-1)
            (2 * exact - spread).sum().backward()
            case = f"of {response} after {prompt} at temperature {temperature}"
            padding = 5 - len(response)
            expect(f"mask {case}", mask[i], [True] * len(response) + [False] * padding)
            expect(f"log-probabilities {case}", logps[i], exact.tolist() + [0.0] * padding, 1e-4)
            expect(f"entropies {case}", entropy[i], spread.tolist() + [0.0] * padding, 1e-4)
        for (name, weight), other in zip(model.named_parameters(), twin.parameters()):
            assert other.grad.abs().sum() > 0
            assert torch.allclose(weight.grad, other.grad, atol=1e-4, rtol=1e-3), f"∇ of {name}"

    def test_mistake_1_the_end_token_counts_where_padding_has_its_id(self, model):
        """pad = eos = 1 here."""
        logps, mask, _, _ = ampo.score(model, [[5], [5]], [[6, 1], [1]])
        expect("mask of the responses [6, 1] and [1]", mask, [[True, True], [True, False]])
        wanted = [full_logps(model, [5], [6, 1]), full_logps(model, [5], [1]) + [0.0]]
        expect("log-probabilities of both", logps, wanted, 1e-4)

    def test_mistake_7_inputs_stay_as_they_were(self, model):
        prompts = [[5, 6], [7]]
        responses = [[8], [9, 1]]
        ampo.score(model, prompts, responses)
        expect("prompts and responses", (prompts, responses), ([[5, 6], [7]], [[8], [9, 1]]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_value_head_reads_the_state_before_each_token(self, dtype):
        """It is in float32 and trains itself alone."""
        model = random_model(scale=1.0).to(dtype)
        head = torch.nn.Linear(32, 1)
        _, _, _, values = ampo.score(model, [[5, 6], [7]], [[8], [9, 1]], value_head=head)
        wanted = []
        for ids, first in (([5, 6, 8], 1), ([7, 9, 1], 0)):
            states = model.model(torch.tensor([ids])).last_hidden_state[0, first:-1]
            wanted.append(head(states.float())[:, 0].tolist())
        expect("values of [8] after [5, 6] and of [9, 1] after [7]", values,
               [wanted[0] + [0.0], wanted[1]], 1e-4)
        values.sum().backward()
        assert head.weight.grad.abs().sum() > 0, "the value head has no gradient"
        assert all(p.grad is None for p in model.parameters()), "values have one for the model"


class Test_token_logps:
    def test_mistake_3_takes_the_temperature_that_was_sampled_at(self, model):
        """transformers samples here, and says what it drew from."""
        torch.manual_seed(0)
        out = model.generate(
            torch.tensor([[5, 6]]), do_sample=True, temperature=0.7, top_k=0, eos_token_id=None,
            max_new_tokens=10, return_dict_in_generate=True, output_scores=True,
        )
        ids = out.sequences[0, 2:].tolist()
        steps = zip(out.scores, ids)
        sampled = [logits[0].log_softmax(-1)[token].item() for logits, token in steps]
        for given, wanted in (([0.7], sampled), ([], full_logps(model, [5, 6], ids))):
            logps, _ = ampo.token_logps(model, [[5, 6], [7]], [ids, [8]], *given)
            expect(f"{ids}, drawn at 0.7, scored at temperature {given}", logps[0], wanted, 2e-4)

    def test_mask_and_gradient(self):
        model = random_model(tie_word_embeddings=False)
        logps, mask = ampo.token_logps(model, [[5], [6, 7]], [[8, 9, 10], [11]])
        expect("mask", mask, [[True, True, True], [True, False, False]])
        expect("log-probabilities past the end", logps[1, 1:], [0.0, 0.0])
        logps.sum().backward()
        read = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0]
        expect("tokens whose embeddings have a gradient", read, [5, 6, 7, 8, 9])
        assert all(p.grad.abs().sum() > 0 for p in model.parameters()), "a weight has no gradient"


class Test_sample_tokens:
    P = [0.05, 0.3, 0.25, 0.4, 0.0]

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_draws_from_the_distribution_and_gives_its_log_p(self, temperature):
        torch.manual_seed(0)
        logits = 2 + torch.tensor(self.P).log().repeat(4000, 1)
        tokens, logps = ampo.sample_tokens(logits, temperature)
        powers = [p ** (1 / temperature) for p in self.P]
        wanted = {token: power / sum(powers) for token, power in enumerate(powers)}
        drawn = tokens.tolist()
        case = f"temperature {temperature}: 4000 draws"
        assert 4 not in drawn, f"{case}: one has probability 0"
        assert not contradicts(drawn, wanted), f"{case} {Counter(drawn)} do not fit {wanted}"
        exact = [math.log(wanted[token]) for token in drawn]
        expect(f"{case}: their log-probabilities", logps, exact)

    def test_each_row_has_its_own_distribution(self):
        order = [3, 0, 5, 1, 4, 2]
        logits = torch.eye(6)[order] * 60
        tokens, logps = ampo.sample_tokens(logits, 1.0)
        expect("rows that are certain of a token each", (tokens.tolist(), logps.tolist()),
               (order, [0.0] * 6))

    def test_mistake_9_temperature_zero_is_the_argmax(self):
        logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 3.0, 2.0, 1.0]])
        tokens, logps = ampo.sample_tokens(logits, 0)
        expect("temperature 0", (tokens.tolist(), logps.tolist()), ([1, 0], [0.0, 0.0]))

    def test_low_precision_is_normalised_in_float32(self):
        logits = torch.linspace(-3, 3, 50).bfloat16()
        tokens, logps = ampo.sample_tokens(logits.repeat(20, 1), 0.7)
        expect("type of log-probabilities", logps.dtype, torch.float32)
        exact = (logits.double() / 0.7).log_softmax(-1)
        expect("log-probabilities from bfloat16 logits", logps, exact[tokens])

    @engine
    @pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
    def test_the_ends_of_the_unit_interval(self, monkeypatch, number):
        """The sum of many rounded probabilities is not quite 1."""
        torch.manual_seed(0)
        logits = torch.nn.functional.pad(torch.randn(32, 29990), (5, 5), value=-math.inf)
        monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.full(size, number))
        tokens, _ = ampo.sample_tokens(logits, 1.0)
        possible = (tokens >= 5) & (tokens < 29995)
        assert possible.all(), f"where the random number is {number}: impossible tokens {tokens}"


class Test_generate:
    PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]
    STOPS = [20, 21, 22, 23, 24]

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
    def test_mistake_6_equals_a_pass_without_cache_and_padding(self, generate, model, temperature):
        torch.manual_seed(0)
        groups = generate(model, self.PROMPTS, 30, 24, temperature, self.STOPS)
        expect("responses to each prompt", [len(group) for group in groups], [30, 30, 30])
        expect_exact(model, self.PROMPTS, groups, temperature)
        lengths = set()
        for ids, _ in itertools.chain(*groups):
            lengths.add(len(ids))
            assert not set(ids[:-1]) & set(self.STOPS), f"it goes on after an end token: {ids}"
            assert len(ids) == 24 or ids[-1] in self.STOPS, f"the end token is missing: {ids}"
        assert len(lengths) > 5, "they end at few lengths"

    @pytest.mark.parametrize("kind", FAMILIES)
    def test_every_family_equals_an_unpadded_pass(self, generate, kind):
        """Windows of 16 tokens are left behind by the prompt or by the response."""
        model = family_model(kind)
        prompts = [list(range(5, 8)), list(range(9, 39)), list(range(20, 37))]
        torch.manual_seed(0)
        groups = generate(model, prompts, 3, 30, 0.8, [50, 51])
        expect_exact(model, prompts, groups, 0.8)
        for prompt, group in zip(prompts, groups):
            scored, mask = ampo.token_logps(model, [prompt] * 3, [ids for ids, _ in group], 0.8)
            sampled = list(itertools.chain(*[logps for _, logps in group]))
            expect(f"{kind}: sampled and scored after {prompt}", scored[mask], sampled, 3e-4)

    @pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
    def test_the_windows_of_these_families_matter(self, kind):
        ids = list(range(5, 55))
        near = full_logps(family_model(kind), ids, [7])
        far = full_logps(family_model(kind, sliding_window=200), ids, [7])
        assert abs(near[0] - far[0]) > 0.01, "the window changes nothing: a test without bite"

    def test_counts_and_lengths(self, generate, model):
        for n, longest in ((1, 1), (1, 7), (5, 1), (5, 7)):
            groups = generate(model, self.PROMPTS, n, longest)
            lengths = [[(len(ids), len(logps)) for ids, logps in group] for group in groups]
            case = f"n = {n}, max_new_tokens = {longest}, no end token: lengths"
            expect(case, lengths, [[(longest, longest)] * n] * 3)
            expect_exact(model, self.PROMPTS, groups)
        expect("no prompts", generate(model, [], 3, 5), [])

    def test_mistake_9_temperature_zero_is_greedy_and_stops_where_told(self, generate):
        """Prompts that end differently, in a model that knows one next token for each."""
        model = table_model({20: 4, 4: 9, 21: 5, 5: 5, 22: 8, 23: 1, 1: 2, 2: 3, 3: 9, 9: 8, 8: 9})
        said = {20: [4, 9, 8, 9], 21: [5, 5, 5, 5], 22: [8, 9, 8, 9], 23: [1, 2, 3, 9]}
        both = said | {20: [4, 9], 22: [8]}
        one = said | {20: [4, 9, 8], 22: [8]}
        prompts = [[7, 6, 20], [21], [7, 22], [7, 23]]
        for stops, wanted in ((None, said), ([], said), ([9, 8], both), (8, one), ([8], one)):
            groups = generate(model, prompts, 2, 4, 0, stops)
            rows = [[(ids, [0.0] * len(ids))] * 2 for ids in wanted.values()]
            expect(f"greedy after {prompts} with end tokens {stops}", groups, rows)

    def test_mistake_9_rollouts_draw_independently_from_the_models_distribution(
        self, generate, model
    ):
        """Pairs of tokens, so that those which began alike are looked at too."""
        torch.manual_seed(0)
        groups = generate(model, [[5, 6, 7], [9]], 4000, 2, 0.6)
        pairs = {}
        for a, p in enumerate(next_token(model, [5, 6, 7], 0.6)):
            if p > 0.002:
                for b, then in enumerate(next_token(model, [5, 6, 7, a], 0.6)):
                    pairs[a, b] = p * then
        assert sum(4000 * p >= 10 for p in pairs.values()) > 8
        drawn = [tuple(ids) for ids, _ in groups[0]]
        assert not contradicts(drawn, pairs), "4000 pairs of tokens do not fit their probabilities"

    @engine
    def test_reads_a_prompt_once_without_gradient_and_ended_rows_leave(self, model, monkeypatch):
        shapes = []
        forward = model.forward

        def watched(*args, **inputs):
            shapes.append((*inputs["input_ids"].shape, torch.is_grad_enabled()))
            return forward(*args, **inputs)

        monkeypatch.setattr(model, "forward", watched)
        torch.manual_seed(0)
        groups = ampo.generate(model, self.PROMPTS, 8, 24, 1.0, self.STOPS)
        lengths = [len(ids) for ids, _ in itertools.chain(*groups)]
        wanted = [(3, 8, False)]
        for t in range(1, max(lengths)):
            wanted.append((sum(length > t for length in lengths), 1, False))
        expect("rows, tokens and gradient of each forward pass", shapes, wanted)


# =================================================================================================
# §7 Answer verification

# kind | gold answer | answers that are equal | answers that are not; two blanks between answers
EQUALITY = r"""
integers | 63 | 63.0  +63  063  \(63\)  $63$  63.  {63}  \text{63}  6300\% | 36  6.3  -63  63x  6,3
fractions | \frac{7}{12} | 7/12  \dfrac7{12}  \frac{14}{24}  {7 \over 12} | \frac{12}{7}  0.58  7:13
decimals | 0.125 | .125  \frac18  1/8  12.5\%  1.25\times10^{-1} | 0.12  0.1250001  0.125\%
periodic decimals | \frac{11}{90} | 0.1\overline{2}  0.12\overline{2} | 0.12  0.\overline{12}
mixed numbers | 2\frac{3}{5} | 2.6  \frac{13}{5}  2 3/5 | \frac{6}{5}  2\cdot\frac35
per cent | 64\% | 64  0.64  64 percent  64 pct  \frac{16}{25} | 6.4  0.064  64\%\%
scientific | 3.2e7 | 3.2\times 10^7  3.2 \cdot 10^{7}  32000000  3.2E7 | 3.2\times 10^6  3.2  10^7
thousands | 3,450,000 | 3450000  3{,}450{,}000  3,\! 450,\! 000  \(3,450,000\) | 3  345
pairs | [-15,240] | [-15, 240] | (-15,240)  [-15,240)  -15240  15240
hundreds | 113,127,131,149 | 113, 127, 131, 149  \{149,131,127,113\} | 113127131149  113
units | 15\text{ cm} | 15  15cm  15 cm  15\ \mathrm{cm} | 15\text{ m}  15\text{ cm}^2  1.5  15x
no unit | 8 | 8 \text{ apples}  \$8  8^\circ | 8 dozen  8\text{ million}  8\text{ halves}  8 squared
degrees | 55^\circ | 55  55°  55 degrees | 56  55'
times | \text{6:05 AM} | 6:05 AM  6:05 a.m.  06:05 am | 6/5  12:10 AM  6:05 PM
ratios | 6:7 | 6/7  \frac67 | 7:6  6:8
three terms | 1:4:9 | 2:8:18 | 1:9:4  1:36  1/36
roots | 5\sqrt{3} | \sqrt{75}  5*sqrt(3)  \frac{15}{\sqrt3}  5·3^{1/2} | 3\sqrt5  8.66  \sqrt[5]3
odd roots | -\sqrt[3]{7} | \sqrt[3]{-7}  (-7)^{1/3} | \sqrt[3]{7}  -\sqrt{7}
powers of roots | t^{4/3} | \sqrt[3]{t^4}  t\sqrt[3]{t}  (\sqrt[3]{t})^4 | \sqrt[4]{t^3}  t^{3/4}
even roots | \sqrt{\frac{5}{t}} | \frac{\sqrt5}{\sqrt{t}}  \frac{\sqrt{5t}}{t} | \frac{5}{t}
logarithms | \log_3 7 | \frac{\ln 7}{\ln 3}  \frac{\log 7}{\log 3} | \log_7 3  1.7712
expressions | (t-2)^2 | t^2-4t+4  (2-t)^2  (t-2)(t-2) | t^2+4  (t+2)^2  t^2-4t+4.0000001
trigonometry | \cos 2t | 1-2\sin^2 t  \cos^2(t)-\sin^2(t) | \cos^2 t  2\cos t
factorials | \frac{n!}{2!(n-2) !} | \binom{n}{2}  \frac{n(n-1)}{2!} | \frac{n!}{2}  \binom{n}{3}
subscripts | \mu_{0} a_1 | \mu_0 a_{1}  a_1\mu_{0} | \mu_1 a_1  \mu a_1
functions | h(0) | h(0) | 0  h(1)  h
floors | \lfloor m/4\rfloor | \left\lfloor\frac m4\right\rfloor | m/4  \lfloor m/5\rfloor
large | 5^{300} | 25^{150} | 5^{301}  5^{300}+1  0
tiny | \left(\frac23\right)^{800} | (2/3)^{800} | 0  \left(\frac23\right)^{801}
near one | 1-(\frac15)^{400} | 1-\left(\frac15\right)^{400} | 1  1-\left(\frac15\right)^{401}
towers | 10^{10^{12}} | 10^{10^{12}} | 10^{10^{12}}+1  10^{10^{11}}
zero | 0 | 0.0  -0 | 7.1e-29  10^{-90}  e^{-700}  t-t  \frac{1}{\infty}  \infty-\infty
near | \sqrt3 | 3^{0.5} | 1.7320508075688772935274463415058723669428052538103806280558069794519
sets | \{4,-1\} | -1, 4  \{-1,4\}  {4,-1}  4 \text{ and } -1  4 or -1 | (4,-1)  4  \{4,1\}  4,-1,-1
many | 3, 8, \text{ and } 11 | 8,3,11  \{3,8,11\} | 3,8  3,8,12
both signs | 2\pm\sqrt7 | 2-\sqrt7, 2+\sqrt7  \{2\pm\sqrt{7}\} | 2+\sqrt7  2\mp7
tuples | (3,\frac12) | \left(3,\,\frac{1}{2}\right)  (x,y)=(3,0.5) | (0.5,3)  [3,0.5]  (x,2)=(3,0.5)
unions | (-\infty,0)\cup(2,\infty) | (2,\infty)\cup(-\infty,0)  x<0 \text{ or } x>2 | (0,2)  x>2
taken out | (-\infty,3)\cup(3,\infty) | \mathbb{R}\setminus\{3\} | \mathbb{R}\setminus\{2\}
matrices | \begin{pmatrix}1&\frac12\\0&4\\\end{pmatrix} | \begin{bmatrix}1&0.5\\0&4\end{bmatrix} | 1
columns | \frac13\begin{pmatrix}3\\2\end{pmatrix} | \begin{pmatrix}1\\2/3\end{pmatrix} | (1,2/3)
intervals | 1\le x<6 | [1,6)  x \in [1,6)  6>x\ge1  \{x \mid 1\le x<6\} | [1,6]  (1,6)  1\le y<6
values in order | g(1)<g(4)<g(2) | g(2)>g(4)>g(1) | g(2)<g(4)<g(1)  g(1)<g(3)<g(2)
constants | 2<9 | 2<9 | 4<7  9<2  0=0
labels | a_{n}=4n-3 | 4n-3  a_n=-3+4n | 4n+3  b_n=4n-3  a_n
named values | |CD|=9 | 9 | 8
angles | 35^\circ | \angle ABC = 35^\circ | \angle ABC = 53^\circ
inverses | f^{-1}(x)=\frac{x}{2}-1 | \frac{x-2}{2} | \frac{x}{2}+1
residues | 4 | n \equiv 4 \pmod 9 | n \equiv 5 \pmod 9
lines | 3x-y+2=0 | y=3x+2  6x-2y+4=0 | 3x-y=2  2
isolated | \frac94=x | 2.25  x=2\frac14 | 4x=9  4x-9=0  y=\frac94  2x=\frac92
chains | 7 | 3+4=7  x=3+4=7 | 3+4=8  7=8  8=7  3+4
equations of numbers | \log_8 4=\frac23 | \frac23 | 0=1  0=0  \log_8 4=\frac32
approximations | \frac{\sqrt5}{2} | \frac{\sqrt5}{2}\approx1.1  x=\frac{\sqrt5}{2}\approx1.1 | 1.1
words | no such number | \text{no such number}  No such number | \text{such number}
short words | \text{tea} | Tea  \textbf{tea} | eat  ate
sentences | A square is a rectangle. | A square is a rectangle | A  square
choices | D | (D)  \text{D}  \textbf{(D)}  D.  **D** | A  C, D  d x
letter and value | \textbf{(A)}\ 12 | (A) 12 | 12  A  B
hedges | 14 | 14 | 14 or 15  14, 15  14\pm1  14\text{ or }15  14?  \text{not }14  15, \text{ no } 14
nothing | 14 | 14 |   {}  ()  ?  \frac{14}{0}  14+  )14  \boxed{}  \text{}
complex | 2-5i | -5i+2  2-i5 | 2+5i  -3  2-5
"""

# gold answer | answers that are worked out | answers that leave work undone
WORK = r"""
48 | 48  48.0  40+8=48  x=6\cdot8=48  4800\% | 40+8  6\cdot 8  96/2  \frac{96}{2}  \sqrt{2304}  48+0
120 | 120  1.2\times10^2  5!=120 | 5!  \binom{10}{3}  |{-120}|  \lfloor 120.5\rfloor  x+11^2-1-x
1024 | 1024 | 2^{10}  2^10  4^5  \log_{2} 2^{1024}  1024^1
2^{10} | 1024  2^{10}  4^5 | 1000+24  2\cdot 512
\frac{5}{4} | \frac{10}{8}  1.25  1\frac14  125\% | \frac{6-1}{4}  1+\frac14  \frac{5}{2^2}
6\sqrt2 | \sqrt{72}  6\sqrt{2} | (4+2)\sqrt2  \sqrt{9}\sqrt8  2\cdot3\sqrt2  2\sqrt2\cdot3
1 | 1 | \sin 90^\circ  \frac{\pi}{\pi}  \cos 0  \frac{3}{3}
70^\circ | 70 | 30^\circ+40^\circ  180-110
(2,9) | (2,9) | (2,3^2)  (1+1,9)  (\frac{4}{2},9)
5,6 | 6,5 | 5,3+3
3-4i | -4i+3 | (2-i)^2  1-4i+2  3-4i+0  -1(4i-3)
x=12 | 12  x=12 | x-12=0  3x=36  x=7+5
2^4\cdot 5 | 5\cdot 2^4  80 | 79+1
"""

ATTACKS = [
    "__import__('os').system('touch PWNED')", "open('PWNED','w')", "exec(\"open('PWNED','w')\")",
    "().__class__.__base__", "lambdify([],\"open('PWNED','w')\")()", "sin.__init__.__globals__",
    "x.real", "breakpoint()", "9**9**9**9", "9^{9^{9^{9}}}", "10^{10^{10}}", "2**(2**40)",
    "(10^9)!", "((9!)!)!", "\\binom{10^9}{10^8}", "floor(pi*10**1000000)", "\\sin(10^{10^{9}})",
    "e^{e^{e^{e^{9}}}}", "(x!)!+" * 60 + "1", "9^{6000}+" * 45 + "1", "x^{99999.5}+" * 30 + "x",
    "\\sqrt{" * 60 + "2" + "}" * 60, "\\sqrt{" * 1000 + "2" + "}" * 1000,
    "(" * 190 + "x" + ")" * 190, "-" * 390 + "1", "1," * 199 + "1", "1+" * 20000 + "1", "9" * 5000,
    "x^" * 190 + "x", "1/" * 190 + "1", "x=" * 190 + "x", "±x" * 190, "|" * 390, "[|" * 190,
    "a " * 190, "1:2:" * 90, "0.1\\overline{3}" * 20, "\"" * 390, "\u200b5", "\u0663", "\x00",
    "nan", "inf", "1e999999999", "0x" + "f" * 300, "\\frac" * 70, "{" * 390, "}" * 390,
    "\\boxed{" * 50, "$" * 390, "@x", "f@(x",
]


def compare(answer, gold, wanted, kind):
    """Fails, naming the two, unless same_answer says what is wanted."""
    found = ampo.same_answer(answer, gold)
    expect(f"{kind}: is {answer!r} the gold answer {gold!r}?", found, wanted)


def short(case):
    """The name of a test: a row's kind, or the beginning of an attack."""
    return case[0] if isinstance(case, list) else ascii(case[:30])


def rows(table):
    """The lines of a table, split at its bars; a bar of |x| has no blanks around it."""
    return [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]


def withstands(function, attack):
    """Neither raises nor hangs, whichever of the two texts is hostile."""
    for pair in [(attack, "1"), ("x^2+1", attack), (attack, attack)]:
        start = time.process_time()
        function(*pair)
        seconds = time.process_time() - start
        assert seconds < 0.5, f"{pair[0][:40]!r} against {pair[1][:40]!r} takes {seconds:.1f} s"


class Test_extract_answer:
    @pytest.mark.parametrize("response, answer", [
        ("So \\boxed{31}.", "31"),
        ("\\boxed{\\frac{3}{\\sqrt{5}}} as claimed", "\\frac{3}{\\sqrt{5}}"),
        ("\\boxed{\\{2,3\\}}", "\\{2,3\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."), ("\\boxed {31}", "31"),
        ("\\boxed{x\\\\}", "x\\\\"),
        ("\\boxed 31", "31"), ("so $\\boxed 1/2$", "1/2"), ("\\boxed 5x+1\nyes", "5x+1"),
        ("\\fbox{31}", "31"), ("\\boxed{31}}}", "31"), ("\\boxed{}", ""),
        ("<answer>31</answer>", "31"), ("<answer>\n31\n</answer>", "\n31\n"),
        ("<think>\\boxed{31}</think> done", "31"), ("\\boxed{31} and more prose", "31"),
        ("\\boxed{31} \\boxed{}", ""), ("31", None), ("", None), ("boxed{31}", None),
        ("<answer>31", None), ("\\boxed", None),
    ])
    def test_reads_the_mark(self, response, answer):
        expect(f"the answer in {response!r}", ampo.extract_answer(response), answer)

    @pytest.mark.parametrize("response", [
        "\\boxed{3} no, \\boxed{4}", "<answer>3</answer> \\boxed{4}",
        "\\boxed{3} <answer>4</answer>", "<answer>3</answer><answer>4</answer>",
        "\\boxed{3, \\boxed{4}}", "\\fbox{3} \\boxed{4}", "<think>\\boxed{3}</think> \\boxed{4}",
        "<answer>\\boxed{4}</answer>",
    ])
    def test_the_last_mark_wins(self, response):
        expect(f"the answer in {response!r}", ampo.extract_answer(response), "4")

    @pytest.mark.parametrize("response", [
        "\\boxed{4", "\\boxed{3} so \\boxed{4", "\\boxed{\\frac{1}{2}", "\\boxed{4} and <answer>4",
    ])
    def test_a_truncated_mark_is_no_answer(self, response):
        expect(f"the answer in {response!r}", ampo.extract_answer(response), None)

    def test_deep_braces_do_not_hang(self):
        start = time.perf_counter()
        ampo.extract_answer("\\boxed{" + "{" * 5000 + "5" + "}" * 5000)
        assert time.perf_counter() - start < 1, "5,000 open braces take more than a second"


class Test_same_answer:
    @pytest.mark.parametrize("row", rows(EQUALITY), ids=short)
    def test_kinds(self, row):
        kind, gold, equal, different = row
        for answer in [gold, *equal.split("  ")]:
            compare(answer, gold, True, kind)
        for answer in different.split("  "):
            compare(answer, gold, False, kind)

    @pytest.mark.parametrize("row", rows(WORK), ids=short)
    def test_work_left_undone(self, row):
        gold, finished, undone = row
        for answer in finished.split("  "):
            compare(answer, gold, True, "worked out")
        for answer in undone.split("  "):
            compare(answer, gold, False, "work left undone")

    def test_every_letter_may_be_negative_and_positive(self):
        for letter in "abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
            compare(letter, f"|{letter}|", False, "signs")
            compare(rf"\neg {letter}", f"-{letter}", False, "not is no sign")
            compare(f"-{letter}", f"|{letter}|", False, "signs")

    def test_an_integer_that_is_almost_reached(self):
        compare("\\frac{\\ln(640320^3+744)}{\\sqrt{163}}", "\\pi", False, "differs in digit 31")

    @pytest.mark.parametrize("text", [
        "", " ", "?", "{}", "()", "\\frac{1}{0}", "0/0", "$$", "\\", "(1,2", "x" * 2000, None, 7,
    ])
    def test_what_cannot_be_read_equals_nothing(self, text):
        compare(text, text, False, "not even itself")

    @pytest.mark.parametrize("attack", ATTACKS, ids=short)
    def test_mistake_12_attacks_neither_run_nor_raise_nor_hang(self, attack, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        withstands(ampo.same_answer, attack)
        assert os.listdir(tmp_path) == [], "the attack wrote a file"

    def test_works_in_threads(self):
        wrong = []
        table = rows(EQUALITY)[:20]

        def work():
            for _, gold, equal, _ in table:
                for answer in equal.split("  "):
                    if not ampo.same_answer(answer, gold):
                        wrong.append(answer)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expect("answers that three threads find wrong", wrong, [])

    def test_leaves_global_state_alone(self):
        random.seed(3)
        before = (random.getstate(), mpmath.mp.prec)
        ampo.same_answer("\\sin(x)+\\binom{n}{2}", "\\sqrt[3]{y}")
        assert random.getstate() == before[0], "the state of random has changed"
        assert mpmath.mp.prec == before[1], "mpmath.mp.prec has changed"


class Test_verify:
    @pytest.mark.parametrize("response, gold, right", [
        ("We find $\\boxed{x = \\frac{9}{4}}$.", "2.25", True),
        ("\\boxed{8} or rather \\boxed{9}", "8", False),
        ("<answer>$9$</answer>", "9", True),
        ("<answer>The answer is 9.</answer>", "9", True),
        ("<answer>The answer is not 9.</answer>", "9", False),
        ("<answer>So the total is 9 apples.</answer>", "9", True),
        ("\\boxed{\\begin{aligned} x&=9 \\end{aligned}}", "9", True),
        ("The answer is 9.", "9", False), ("\\boxed{9", "9", False), ("\\boxed{}", "9", False),
        ("\\boxed{\\text{I do not know}}", "9", False), ("\\boxed{9 \\text{ or } 8}", "9", False),
    ])
    def test_whole_responses(self, response, gold, right):
        expect(f"is {response!r} right for {gold!r}?", ampo.verify(response, gold), right)

    def test_the_reward_hack_of_copying_the_question_earns_nothing(self):
        question = "What is 61 + 17 - 40 + 9?"
        copy = "\\boxed{61 + 17 - 40 + 9}"
        expect("the question in the box", ampo.verify(copy, "47", question), False)
        expect("the same without the question", ampo.verify(copy, "47"), False)
        expect("the format reward for it", ampo.gives_answer(copy, "47", question), False)
        expect("the sum itself", ampo.verify("\\boxed{47}", "47", question), True)

    @pytest.mark.parametrize("answer, gold, question, right", [
        ("(t+4)(t-1)", "t^2+3t-4", "Expand $(t+4)(t-1)$.", False),
        ("(t + 4)(t - 1)", "t^2+3t-4", "Expand (t+4)(t-1) and simplify.", False),
        ("((t+4)(t-1))", "t^2+3t-4", "Expand (t+4)(t-1).", False),
        ("y=(t+4)(t-1)", "t^2+3t-4", "Expand $(t+4)(t-1)$.", False),
        ("t^2+3t-4", "t^2+3t-4", "Expand $(t+4)(t-1)$.", True),
        ("t^2+3t-4", "t^2+3t-4", "Write $t^2+3t-4$ as it is.", True),
        ("3t-4", "-4+3t", "Which line is tangent to $t^2+3t-4$?", True),
        ("12", "12", "Ann has 12 apples and gives none away. How many are left?", True),
        ("\\frac{1}{4}", "0.25", "Is it 1/4 or 1/3?", True),
        ("(1,2)", "(1,2)", "Is it (1,2) or (2,1)?", True),
        ("\\text{red}", "red", "Is it red or blue?", True),
    ])
    def test_expressions_of_the_question(self, answer, gold, question, right):
        result = ampo.verify(f"\\boxed{{{answer}}}", gold, question)
        expect(f"is {answer!r} right for {gold!r} and the question {question!r}?", result, right)

    @pytest.mark.parametrize("response, gold", [
        (None, "1"), (1, "1"), ("\\boxed{1}", None), ("\\boxed{1}", 1), (b"\\boxed{1}", "1"),
        ([], {}),
    ])
    def test_input_that_is_no_string(self, response, gold):
        expect(f"the response {response!r} to {gold!r}", ampo.verify(response, gold), False)

    @pytest.mark.parametrize("attack", ATTACKS, ids=short)
    def test_mistake_12_attacks_neither_run_nor_raise_nor_hang(self, attack, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        start = time.process_time()
        ampo.verify("\\boxed{" + attack + "}", "1", attack)
        assert time.process_time() - start < 0.5, f"{attack[:40]!r} takes too long"
        assert os.listdir(tmp_path) == [], "the attack wrote a file"


class Test_gives_answer:
    @pytest.mark.parametrize("response, gold, paid", [
        ("\\boxed{5}", "7", True), ("\\boxed{5}", "", True), ("<answer>x=5</answer>", "7", True),
        ("\\boxed{\\text{cat}}", "7", True), ("\\boxed{\\frac{10}{4}}", "7", True),
        ("\\boxed{x^2+1}", "x", True), ("\\boxed{2^9}", "2^{10}", True),
        ("\\boxed{3+4=7}", "7", True), ("\\boxed{\\sqrt{18}}", "3\\sqrt2", True),
        ("5", "7", False), ("", "7", False), ("\\boxed{}", "7", False), ("\\boxed{ }", "7", False),
        ("\\boxed{5", "7", False), ("\\boxed{5} \\boxed{}", "5", False),
        ("\\boxed{?}", "7", False), ("\\boxed{5+}", "7", False),
        ("\\boxed{\\frac{5}{0}}", "7", False), ("\\boxed{" + "5+" * 400 + "5}", "7", False),
        ("\\boxed{3+4}", "7", False), ("\\boxed{3+4}", "", False), ("\\boxed{2^9}", "1024", False),
        ("\\boxed{5=6}", "7", False), (None, "7", False), (7, "7", False),
    ])
    def test_is_paid_for_an_answer_that_can_be_read(self, response, gold, paid):
        result = ampo.gives_answer(response, gold)
        expect(f"is {response!r} paid for answering {gold!r}?", result, paid)

    def test_what_is_right_is_paid(self):
        for kind, gold, equal, _ in rows(EQUALITY):
            for answer in equal.split("  "):
                paid = ampo.gives_answer(f"\\boxed{{{answer}}}", gold)
                expect(f"{kind}: is {answer!r} paid for answering {gold!r}?", paid, True)


@engine
class Test_rules:
    @pytest.mark.parametrize("number", range(len(getattr(ampo, "RULES", []))))
    def test_each_example_goes_through_all_rules(self, number):
        pattern, replacement, example, result = ampo.RULES[number]
        expect(f"the example {example!r} of rule {pattern.pattern}", ampo.rewrite(example), result)


# =================================================================================================
# §8 Running


class Test_batch_indices:
    @pytest.mark.parametrize("total, size", [(7, 3), (4, 4), (3, 8)])
    def test_mistake_10_every_epoch_takes_every_problem_once(self, total, size):
        cfg = ampo.Config(prompts_per_step=size, seed=3)
        steps = [ampo.batch_indices(total, step, cfg) for step in range(2 * total)]
        expect("problems a step", {len(step) for step in steps}, {size})
        series = list(itertools.chain(*steps))
        epochs = [series[i:i + total] for i in range(0, len(series), total)]
        for epoch in epochs:
            expect(f"an epoch of {total} by {size}", sorted(epoch), list(range(total)))
        assert len(set(map(tuple, epochs))) > 1, "all epochs have the same order"

    def test_a_function_of_step_and_seed_alone(self):
        cfg = ampo.Config(prompts_per_step=5)
        first = ampo.batch_indices(40, 9, cfg)
        torch.rand(3)
        expect("step 9 again", ampo.batch_indices(40, 9, cfg), first)
        assert ampo.batch_indices(40, 9, replace(cfg, seed=1)) != first, "another seed, same order"


class Test_pass_at_k:
    @pytest.mark.parametrize("n, correct", [(1, 0), (1, 1), (5, 2), (6, 6), (6, 1)])
    def test_equals_enumeration(self, n, correct):
        rights = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            chances = [float(any(some)) for some in itertools.combinations(rights, k)]
            got = ampo.pass_at_k(n, correct, k)
            expect(f"n={n}, {correct} right, k={k}", got, statistics.mean(chances))

    @pytest.mark.parametrize("n, correct, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
    def test_what_cannot_be_estimated(self, n, correct, k):
        with pytest.raises(ValueError):
            ampo.pass_at_k(n, correct, k)
