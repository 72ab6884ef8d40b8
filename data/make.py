"""Make the embedded miniature from one seed: the problems, the tokenizer and the base model.

    python data/make.py            # four and a half minutes on two CPU cores

A problem is a linear equation in one unknown, made by wrapping a*x in additions, subtractions and
multiplications. Its level is the number of operations: 3*(4*x+2)-4=20 has level 4 and the answer 3/2.
a never divides the number that a*x equals, so every answer is a fraction and guessing does not pay.
README.md, beside this file, describes what is written and how good the base model is.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          Qwen2Tokenizer)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ampo  # the verifier, the prompt format and the sampler are those of training

# Surface forms. The base model sees all of them, reinforcement learning only the first group:
# the second group then tells whether what was learnt carries over.
RL_LETTERS, OTHER_LETTERS = "xyn", "abkmptz"
RL_PHRASINGS = ("Solve {equation}.", "Solve for {x}: {equation}", "Find {x} if {equation}.")
OTHER_PHRASINGS = ("What is {x} when {equation}?", "Given {equation}, determine {x}.", "Let {equation}. Compute {x}.",
                   "Which {x} satisfies {equation}?", "{equation}, so {x} is?")

# What the base model is taught. Levels 4 and 5 come only with a hint or a prefix: it learns what those are for, and the
# plain problems of these levels are left to reinforcement learning.
BASE_STYLES = {"undo": 0.45, "work": 0.40, "expand": 0.12, "secant": 0.03}
PLAIN_LEVELS = {1: 0.05, 2: 0.60, 3: 0.35}
FORWARD_LEVELS = {1: 0.1, 2: 0.3, 3: 0.4, 4: 0.2}
GUIDED_LEVELS = {2: 0.3, 3: 0.4, 4: 0.15, 5: 0.15}
FORWARD_SHARE, HINT_SHARE, PREFIX_SHARE, SWAPPED_SHARE = 0.12, 0.15, 0.15, 0.25
SLIPS = 0.25  # a base model has read much that is wrong: what is there for reinforcement learning to sharpen
LARGEST_TERM = 5  # with terms up to 9 it takes twice as long to learn to add
BATCH, POOL = 32, 64_000

CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
SPECIAL = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]


# --- Equations -----------------------------------------------------------------------------------

INVERSE = {"+": "-", "-": "+", "*": "/"}


class Equation(NamedTuple):
    """`a` times the unknown equals `start`; `wraps` are the operations around it, from the inside out."""

    a: int
    start: int
    wraps: tuple  # of (operator, number)


def level(eq):
    """The number of operations around and in a*x."""
    return 1 + len(eq.wraps)


def answer(eq):
    """The unknown, as a fraction in lowest terms."""
    return str(Fraction(eq.start, eq.a))


def values(eq):
    """The value of a*x, then the value after each wrap; the last one is the right-hand side."""
    out = [eq.start]
    for op, n in eq.wraps:
        out.append(apply(op, n, out[-1]))
    return out


def apply(op, n, value):
    return {"+": value + n, "-": value - n, "*": value * n, "/": value // n if value % n == 0 else None}[op]


def wrap(text, wraps):
    """Write the operations `wraps` around `text`: ("4*x", +2, *3) -> "3*(4*x+2)"."""
    for op, n in wraps:
        text = f"{n}*({text})" if op == "*" else f"{text}{op}{n}"
    return text


def left_side(eq, x="x"):
    return wrap(f"{eq.a}*{x}", eq.wraps)


def draw_equation(rng, level, whole=False, largest=300):
    """Sums and products take turns, so each operation is one step; values stay within what the base can compute."""
    while True:
        a, start = rng.randint(2, 9), rng.randint(1, 40)
        wraps = [("*", rng.randint(2, 5)) if i % 2 else (rng.choice("+-"), rng.randint(1, LARGEST_TERM))
                 for i in range(level - 1)]
        eq = Equation(a, start, tuple(wraps))
        # Fractions that cancel (6*x=8) are kept in one case of four: they are hard for so small a model.
        cancels = math.gcd(a, start) > 1 and rng.random() < 0.75
        if (start % a == 0) == whole and (whole or not cancels) and min(values(eq)) > 0 and max(values(eq)) <= largest:
            return eq


# --- The four teachers: each stops before the computation that gives the answer --------------------
# A teacher takes the equation and the values met on the way in, and returns lines and answer. Where the last value
# holds a slip, so does the answer.


def steps(eq, v):
    """The arithmetic from the outside in: ["20+4=24", "24/3=8", "8-2=6"]."""
    lines = []
    for (op, n), after, before in reversed(list(zip(eq.wraps, v[1:], v))):
        done = next(o for o in (INVERSE[op], *"-+") if apply(o, n, after) == before)
        lines.append(f"{after}{done}{n}={before}")
    return lines


def undo(eq, v):
    """Rewrite the equation line by line, with x for the unknown and the unknown on the left."""
    lines = [f"{wrap(f'{eq.a}*x', eq.wraps[:i])}={v[i]}" for i in range(len(eq.wraps), -1, -1)]
    return lines, Fraction(v[0], eq.a)


def work(eq, v):
    """Only the arithmetic."""
    return steps(eq, v), Fraction(v[0], eq.a)


def expand(eq, v):
    """Multiply out from the inside until one a*x=c is left."""
    a, b = eq.a, 0
    lines = [f"{left_side(eq)}={v[-1]}"]
    for i, (op, n) in enumerate(eq.wraps):
        a, b = (a * n, b * n) if op == "*" else (a, apply(op, n, b))
        if i:  # the first sum needs no rewriting
            lines.append(f"{wrap(f'{a}*x{b:+d}' if b else f'{a}*x', eq.wraps[i + 1:])}={v[-1]}")
    c = v[-1] - b + v[0] - eq.start
    return lines + ([f"{a}*x={c}"] if b else []), Fraction(c, a)


def secant(eq, v):
    """Double false position: the values at x=0 and x=1 fix the line."""
    at0, at1 = (values(eq._replace(start=start)) for start in (0, eq.a))
    lines = ["0: " + ",".join(map(str, at0)), "1: " + ",".join(map(str, at1)),
             f"({v[-1]}-{at0[-1]})/({at1[-1]}-{at0[-1]})"]
    return lines, Fraction(v[-1] - at0[-1] + v[0] - eq.start, at1[-1] - at0[-1])


TEACHERS = {"undo": undo, "work": work, "expand": expand, "secant": secant}


def write(lines, answer):
    return "\n".join([*lines, f"\\boxed{{{answer}}}"])


def trace(lines, answer, gold):
    """A teacher's response, checked by the verifier that training uses."""
    text = write(lines, answer)
    assert ampo.verify(text, gold), text
    return text


def with_slips(rng, eq, chance):
    """The values on the way in when each step may use the wrong operation: a sum in place of a difference and the
    other way round, a difference in place of a quotient."""
    v = values(eq)[-1:]
    for op, n in reversed(eq.wraps):
        right, wrong = apply(INVERSE[op], n, v[0]), apply("+" if op == "+" else "-", n, v[0])
        v.insert(0, wrong if right is None or rng.random() < chance else right)  # None: a slip left a remainder
    return v if min(v) > 0 else values(eq)


# --- Problems in words ---------------------------------------------------------------------------


def question(eq, phrasing, x, swapped=False):
    left, right = left_side(eq, x), values(eq)[-1]
    return phrasing.format(x=x, equation=f"{right}={left}" if swapped else f"{left}={right}")


def hint(question, eq):
    """A complete alternative user message: the question and the first intermediate values, all but the last one."""
    inner = [str(v) for v in reversed(values(eq)[:-1])]
    return f"{question}\nHint: the steps give {', '.join(inner[:max(1, len(inner) - 1)])}."


def guided_by_prefix(question, solution, omega):
    """The user message of GHPO: the question and the first part of the solution."""
    return question + ampo.LEAD + solution[:round(len(solution) * omega)]


def equation_problem(rng, eq, letters, phrasings, swapped=False):
    text, gold = question(eq, rng.choice(phrasings), rng.choice(letters), swapped), answer(eq)
    return {"question": text, "answer": gold, "level": level(eq), "family": "swapped" if swapped else "equation",
            "teachers": {name: trace(*f(eq, values(eq)), gold) for name, f in TEACHERS.items()},
            "hint": hint(text, eq), "solution": trace(*work(eq, values(eq)), gold)}


def forward_problem(rng, eq):
    """Another task that the base can do: put a number in and calculate. The response is the arithmetic."""
    v, lines = values(eq), [f"{eq.a}*{eq.start // eq.a}={eq.start}"]
    for (op, n), before, after in zip(eq.wraps, v, v[1:]):
        lines.append(f"{n}*{before}={after}" if op == "*" else f"{before}{op}{n}={after}")
    gold = str(v[-1])
    return {"question": f"What is {left_side(eq, eq.start // eq.a)}?", "answer": gold, "level": level(eq),
            "family": "forward", "teachers": {"work": trace(lines[:-1], gold, gold)}}


def draw_set(rng, count, levels, taken, make, whole=False):
    """`count` problems, the levels in turn, on equations that are not in `taken`. Every answer makes up less than 1 %,
    so that one who ignores the question is almost never right."""
    problems, answers, most = [], Counter(), math.ceil(count / 100) - 1
    while len(problems) < count:
        eq = draw_equation(rng, levels[len(problems) % len(levels)], whole)
        gold = str(values(eq)[-1]) if whole else answer(eq)
        if eq in taken or answers[gold] >= most:
            continue
        taken.add(eq)
        answers[gold] += 1
        problems.append(make(rng, eq))
    return problems


def draw_all_sets(rng, taken):
    def forms(letters=RL_LETTERS, phrasings=RL_PHRASINGS, swapped=False):
        return lambda rng, eq: equation_problem(rng, eq, letters, phrasings, swapped)

    rl = [2, 3, 4, 5]
    sets = {"test": draw_set(rng, 256, rl, taken, forms()),
            "valid": draw_set(rng, 128, rl, taken, forms()),
            "ood_letters": draw_set(rng, 128, rl, taken, forms(letters=OTHER_LETTERS)),
            "ood_phrasings": draw_set(rng, 128, rl, taken, forms(phrasings=OTHER_PHRASINGS)),
            "ood_swapped": draw_set(rng, 128, rl, taken, forms(swapped=True)),
            "ood_deeper": draw_set(rng, 128, [6, 7], taken, forms()),
            "ood_forward": draw_set(rng, 128, [2, 3, 3, 3, 3, 4], taken, forward_problem, whole=True),
            "train": draw_set(rng, 3000, rl, taken, forms())}
    return sets


# --- What the base model is taught ---------------------------------------------------------------


def pick(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


def base_example(rng, taken):
    """One (user message, response) pair. With a hint or prefix the response is still the complete trace."""
    kind = pick(rng, {"hint": HINT_SHARE, "prefix": PREFIX_SHARE, "forward": FORWARD_SHARE,
                      "plain": 1 - HINT_SHARE - PREFIX_SHARE - FORWARD_SHARE})
    levels = {"plain": PLAIN_LEVELS, "forward": FORWARD_LEVELS}.get(kind, GUIDED_LEVELS)
    eq = None
    while eq is None or eq in taken:
        eq = draw_equation(rng, pick(rng, levels), kind == "forward")
    if kind == "forward":
        problem = forward_problem(rng, eq)
        return problem["question"], problem["teachers"]["work"]
    problem = equation_problem(rng, eq, RL_LETTERS + OTHER_LETTERS, RL_PHRASINGS + OTHER_PHRASINGS,
                               rng.random() < SWAPPED_SHARE)
    prefixed = guided_by_prefix(problem["question"], problem["solution"], rng.choice((0.25, 0.5, 0.75)))
    message = {"plain": problem["question"], "hint": problem["hint"], "prefix": prefixed}[kind]
    teacher = TEACHERS[pick(rng, BASE_STYLES)]
    return message, write(*teacher(eq, with_slips(rng, eq, SLIPS if kind == "plain" else 0)))


def train_tokenizer(texts, folder, vocab_size=384):
    """A byte-level BPE that reads any text; digits stay single, so that arithmetic is done digit by digit.

    The way text is cut into words is Qwen2's: transformers puts that in for every Qwen2 model it loads, whatever the
    file says. Hence also the reload: the base model must be taught with the tokenizer that everyone will use."""
    qwen2 = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    tokenizer.decoder = qwen2.decoder
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>",
                            chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def new_model(tokenizer):
    """Qwen2 with one shared key-value pair of heads for two query heads; about half a million parameters."""
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10_000.0,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def batches(rng, pairs, count):
    """`count` batches of pairs of similar length: padded to the longest of all, most tokens would be padding."""
    made = []
    while len(made) < count:
        rng.shuffle(pairs)
        for i in range(0, len(pairs), 50 * BATCH):
            chunk = sorted(pairs[i:i + 50 * BATCH], key=lambda pair: len(pair[0]) + len(pair[1]))
            group = [chunk[j:j + BATCH] for j in range(0, len(chunk), BATCH)]
            rng.shuffle(group)
            made += group
    return made[:count]


def train_base(model, pairs, rng, steps, lr=3e-3):
    """Next-token loss on the responses; a short warm-up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * i / steps)))
    began = time.time()
    for i, batch in enumerate(batches(rng, pairs, steps)):
        width = max(len(p) + len(r) for p, r in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (p, r) in enumerate(batch):
            ids[row, :len(p) + len(r)] = torch.tensor(p + r)
            labels[row, len(p):len(p) + len(r)] = torch.tensor(r)
        # Padding is on the right, where causal attention never looks back from: no mask is needed.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % 500 == 0 or i == steps - 1:
            print(f"step {i:5d}  loss {loss.item():.3f}  {time.time() - began:.0f} s", flush=True)


# --- Measuring -----------------------------------------------------------------------------------


def solve(model, tokenizer, messages, golds, n):
    """For each message n sampled responses as (text, is it correct)."""
    out = []
    size = 1024 // n
    for i in range(0, len(messages), size):
        prompts = [ampo.encode_prompt(tokenizer, m) for m in messages[i:i + size]]
        for rows, gold in zip(ampo.generate(model, prompts, n, 128, 1.0, tokenizer.eos_token_id), golds[i:i + size]):
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in rows]
            out.append([(text, ampo.verify(text, gold)) for text in texts])
    return out


def mean(values):
    values = list(values)
    return sum(values) / max(1, len(values))


def measure(model, tokenizer, sets):
    """Print what the base can do: plain, with hint, with prefixes, and how well it comprehends each teacher. Measured
    on the validation set: the test sets are for the published table alone."""
    problems = sets["valid"]
    golds = [p["answer"] for p in problems]
    plain = solve(model, tokenizer, [p["question"] for p in problems], golds, 32)
    guided = {"hint": solve(model, tokenizer, [p["hint"] for p in problems], golds, 8)}
    for omega in (0.25, 0.5, 0.75):
        messages = [guided_by_prefix(p["question"], p["solution"], omega) for p in problems]
        guided[f"prefix {omega}"] = solve(model, tokenizer, messages, golds, 8)
    print("\nlevel      " + "".join(f"{lv:>8}" for lv in ("all", 2, 3, 4, 5)))
    rows = {f"pass@{k}": [ampo.pass_at_k(32, sum(ok for _, ok in r), k) for r in plain] for k in (1, 8, 32)}
    rows["8 all fail"] = [1 - p for p in rows["pass@8"]]
    rows |= {name: [mean(ok for _, ok in r) for r in results] for name, results in guided.items()}
    r_p = [ampo.comprehension(model, tokenizer, ampo.Problem(p["question"], p["answer"]),
                              [p["teachers"][name] for name in TEACHERS]) for p in problems]
    rows |= {f"r_p {name}": column for name, column in zip(TEACHERS, zip(*r_p))}
    rows |= {f"tok {name}": [len(tokenizer.encode(p["teachers"][name])) for p in problems] for name in TEACHERS}
    rows["tok sampled"] = [mean(len(tokenizer.encode(t)) for t, _ in r) for r in plain]
    for name, row in rows.items():
        cells = [mean(row)] + [mean(r for r, p in zip(row, problems) if p["level"] == lv) for lv in (2, 3, 4, 5)]
        print(f"{name:11}" + "".join(f"{c:8.2f}" for c in cells))
    print("styles sampled:", dict(Counter(style(t) for r in plain for t, _ in r).most_common()))


def style(text):
    """Which teacher a sampled response resembles, by its first line or two."""
    first, second = (text.split("\n") + [""])[:2]
    if first.startswith("0:"):
        return "secant"
    if "x" not in first:
        return "work"
    return "expand" if first.split("=")[-1] == second.split("=")[-1] else "undo"


def main():
    parser = argparse.ArgumentParser(description="Make the problems, the tokenizer and the base model.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3600, help="supervised steps of the base model")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args()
    rng, taken, began = random.Random(args.seed), set(), time.time()
    torch.manual_seed(args.seed)

    sets = draw_all_sets(rng, taken)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, problems in sets.items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
        (top, times), = Counter(p["answer"] for p in problems).most_common(1)
        assert times < 0.01 * len(problems)
        print(f"{name:14} {len(problems):5d} problems, most common answer {top} in {times / len(problems):.2%}")

    examples = [base_example(rng, taken) for _ in range(POOL)]
    tokenizer = train_tokenizer([text for pair in examples for text in pair], args.out / "base")
    pairs = [(ampo.encode_prompt(tokenizer, message), tokenizer.encode(text) + [tokenizer.eos_token_id])
             for message, text in examples]
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, data made in {time.time() - began:.0f} s")
    train_base(model, pairs, rng, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.out / "base")

    model = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32)
    measure(model, tokenizer, sets)
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
