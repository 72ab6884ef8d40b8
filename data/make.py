"""Make the embedded miniature from one seed: the problems, the tokenizer and the base model.

    python data/make.py                  # five minutes on two CPU cores
    python data/make.py --out FOLDER     # leaves the files here alone

A problem is a linear equation in one unknown, made by wrapping a*x in additions, subtractions and
multiplications. Its level is the number of operations: 3*(4*x+2)-4=20 has level 4 and the answer
3/2. a never divides the number that a*x equals, so every answer is a fraction and guessing does
not pay. Four scripted teachers solve it, each only some forms of it (see ABLE). README.md, beside
this file, describes what is written and how good the base model is.

One random generator draws everything, in the order in which it is called: whoever moves a draw
makes other problems.
"""
import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ampo  # the verifier, the prompt format and the sampler are those of training

# Surface forms. The base model sees all of them, reinforcement learning only the first group: the
# second group then tells whether what was learnt carries over.
RL_LETTERS = "xyn"
OTHER_LETTERS = "abkmptz"
RL_PHRASINGS = (
    "Solve {equation}.",
    "Solve for {x}: {equation}",
    "Find {x} if {equation}.",
)
OTHER_PHRASINGS = (
    "What is {x} when {equation}?",
    "Given {equation}, determine {x}.",
    "Let {equation}. Compute {x}.",
    "Which {x} satisfies {equation}?",
    "{equation}, so {x} is?",
)

# What the base model is taught, as shares. Levels 4 and 5 come only with a hint or a prefix: it
# learns what those are for, and the plain problems of these levels are left to RL.
BASE_STYLES = {"undo": 0.45, "work": 0.40, "expand": 0.12, "secant": 0.03}
PLAIN_LEVELS = {1: 0.05, 2: 0.60, 3: 0.35}
FORWARD_LEVELS = {1: 0.1, 2: 0.3, 3: 0.4, 4: 0.2}
GUIDED_LEVELS = {2: 0.3, 3: 0.4, 4: 0.15, 5: 0.15}
HINT_SHARE = 0.15
PREFIX_SHARE = 0.15
FORWARD_SHARE = 0.12
SWAPPED_SHARE = 0.25
SLIPS = 0.25  # a base model has read much that is wrong: what is there for RL to sharpen
LARGEST_TERM = 5  # with terms up to 9 it takes twice as long to learn to add

POOL = 64_000  # examples to teach from
BATCH = 32
LEARNING_RATE = 3e-3

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]


# -------------------------------------------------------------------------------------------------
# Equations

INVERSE = {"+": "-", "-": "+", "*": "/"}


@dataclass(frozen=True)
class Equation:
    """`a` times the unknown equals `start`; `wraps` are the operations around it."""

    a: int
    start: int
    wraps: tuple  # of (operator, number), from the inside out


def level_of(equation):
    """The number of operations around and in a*x."""
    return 1 + len(equation.wraps)


def answer_of(equation):
    """The unknown, as a fraction in lowest terms."""
    return str(Fraction(equation.start, equation.a))


def calculate(value, operator, number):
    """One operation on a whole number; None for a quotient that is not whole."""
    if operator == "+":
        return value + number
    if operator == "-":
        return value - number
    if operator == "*":
        return value * number
    if value % number == 0:
        return value // number
    return None


def values_of(equation):
    """The value of a*x, then the value after each wrap; the last is the right-hand side."""
    values = [equation.start]
    for operator, number in equation.wraps:
        values.append(calculate(values[-1], operator, number))
    return values


def wrap(text, wraps):
    """Write operations around a text: "4*x" with +2 and *3 is "3*(4*x+2)"."""
    for operator, number in wraps:
        if operator == "*":
            text = f"{number}*({text})"
        else:
            text = f"{text}{operator}{number}"
    return text


def left_side(equation, x="x"):
    """The side of the equation that holds the unknown, written x."""
    return wrap(f"{equation.a}*{x}", equation.wraps)


def usual_order(level):
    """The operations around a*x in training, from the inside out: sums and products in turn."""
    return "s*s*"[:level - 1]


def draw_equation(rng, order, whole=False, largest=300):
    """An equation with operations in this order ("s*s": sum, product, sum, from the inside out).

    Its answer is a whole number or not. All values are positive and at most `largest`: what the
    base model can calculate.
    """
    while True:
        a = rng.randint(2, 9)
        start = rng.randint(1, 40)
        wraps = []
        for kind in order:
            if kind == "*":
                wraps.append(("*", rng.randint(2, 5)))
            else:
                wraps.append((rng.choice("+-"), rng.randint(1, LARGEST_TERM)))
        equation = Equation(a, start, tuple(wraps))
        # Fractions that cancel (6*x=8) are hard for so small a model: one in four is kept.
        too_hard = math.gcd(a, start) > 1 and rng.random() < 0.75
        if (start % a == 0) != whole or (too_hard and not whole):
            continue
        values = values_of(equation)
        if min(values) > 0 and max(values) <= largest:
            return equation


# -------------------------------------------------------------------------------------------------
# The four teachers

# A teacher takes the equation and the values met on the way in, and returns its lines and its
# answer. It stops before the computation that gives the answer. Where the innermost value holds a
# slip, so does the answer.


def undo(equation, values):
    """Rewrite the equation line by line, with x for the unknown and the unknown on the left."""
    lines = []
    for i in reversed(range(len(values))):
        lines.append(f"{wrap(f'{equation.a}*x', equation.wraps[:i])}={values[i]}")
    return lines, Fraction(values[0], equation.a)


def work(equation, values):
    """Only the arithmetic, from the outside in: 20+4=24, 24/3=8, 8-2=6."""
    lines = []
    for i in reversed(range(len(equation.wraps))):
        operator, number = equation.wraps[i]
        before = values[i]
        after = values[i + 1]
        # The operation that was done, which is the wrong one where there is a slip.
        for done in (INVERSE[operator], "-", "+"):
            if calculate(after, done, number) == before:
                break
        lines.append(f"{after}{done}{number}={before}")
    return lines, Fraction(values[0], equation.a)


def expand(equation, values):
    """Multiply out from the inside until one a*x=c is left."""
    a = equation.a
    b = 0
    right = values[-1]
    lines = [f"{left_side(equation)}={right}"]
    for i, (operator, number) in enumerate(equation.wraps):
        b = calculate(b, operator, number)
        if operator == "*":
            a = a * number
        if i > 0:  # the first sum needs no rewriting
            inner = f"{a}*x{b:+d}" if b else f"{a}*x"
            lines.append(f"{wrap(inner, equation.wraps[i + 1:])}={right}")
    slip = values[0] - equation.start
    c = right - b + slip
    if b:
        lines.append(f"{a}*x={c}")
    return lines, Fraction(c, a)


def secant(equation, values):
    """Double false position: the values at x=0 and x=1 fix the line."""
    at_zero = values_of(replace(equation, start=0))
    at_one = values_of(replace(equation, start=equation.a))
    right = values[-1]
    slip = values[0] - equation.start
    lines = [
        "0: " + ",".join(map(str, at_zero)),
        "1: " + ",".join(map(str, at_one)),
        f"({right}-{at_zero[-1]})/({at_one[-1]}-{at_zero[-1]})",
    ]
    return lines, Fraction(right - at_zero[-1] + slip, at_one[-1] - at_zero[-1])


TEACHERS = {"undo": undo, "work": work, "expand": expand, "secant": secant}

# Which forms each teacher is able to do: the level, then the signs of the sums from the inside out.
# Each form of levels 2 to 4 has two teachers, each form of level 5 has three. Fixed before any
# method was run on these problems.
ABLE = {
    "undo": ["2+", "3+", "4++", "4+-", "5++", "5+-", "5-+"],
    "work": ["2-", "3-", "4+-", "4-+", "4--", "5+-", "5--"],
    "expand": ["2-", "3-", "4-+", "4--", "5++", "5-+", "5--"],
    "secant": ["2+", "3+", "4++", "5++", "5+-", "5-+", "5--"],
}


def form_of(equation):
    """The level and the signs of the sums: "4+-" for 3*(4*x+2)-4=20."""
    signs = [operator for operator, _ in equation.wraps if operator != "*"]
    return f"{level_of(equation)}{''.join(signs)}"


def write(lines, answer):
    """A response: the lines, then the answer in a box."""
    return "\n".join([*lines, f"\\boxed{{{answer}}}"])


def checked(text, gold):
    """The text of a trace, once the verifier of training has found it right."""
    if not ampo.verify(text, gold):
        raise ValueError(f"a trace that is wrong: {text!r}, gold answer {gold}")
    return text


def values_with_slips(rng, equation, chance):
    """The values on the way in when each step may take the wrong operation.

    A sum in place of a difference and the other way round, a difference in place of a quotient.
    The values without slips where those with them are not positive.
    """
    values = values_of(equation)[-1:]
    for operator, number in reversed(equation.wraps):
        right = calculate(values[0], INVERSE[operator], number)
        wrong = calculate(values[0], "+" if operator == "+" else "-", number)
        # After a slip a quotient may leave a remainder: then it has to be another slip.
        slips = right is None or rng.random() < chance
        values.insert(0, wrong if slips else right)
    if min(values) > 0:
        return values
    return values_of(equation)


# -------------------------------------------------------------------------------------------------
# Problems in words


def question_of(equation, phrasing, x, swapped=False):
    """The user's message; `swapped` puts the unknown on the right-hand side."""
    left = left_side(equation, x)
    right = values_of(equation)[-1]
    text = f"{right}={left}" if swapped else f"{left}={right}"
    return phrasing.format(x=x, equation=text)


def hint_of(question, equation):
    """A complete user message: the question and the intermediate values, all but the last one."""
    inner = [str(value) for value in reversed(values_of(equation)[:-1])]
    told = inner[:max(1, len(inner) - 1)]
    return f"{question}\nHint: the steps give {', '.join(told)}."


def equation_problem(rng, equation, letters, phrasings, swapped=False):
    """One line of a file, with the traces of the teachers that are able, a hint and a solution.

    The solution is what "work" would write, able or not.
    """
    phrasing = rng.choice(phrasings)
    letter = rng.choice(letters)
    question = question_of(equation, phrasing, letter, swapped)
    gold = answer_of(equation)
    values = values_of(equation)
    form = form_of(equation)
    traces = {}
    for name, teacher in TEACHERS.items():
        if form in ABLE[name]:
            traces[name] = checked(write(*teacher(equation, values)), gold)
    return {
        "question": question,
        "answer": gold,
        "level": level_of(equation),
        "family": "swapped" if swapped else "equation",
        "teachers": traces,
        "hint": hint_of(question, equation),
        "solution": checked(write(*work(equation, values)), gold),
    }


def forward_problem(equation):
    """Another task that the base can do: put a number in and calculate."""
    x = equation.start // equation.a
    values = values_of(equation)
    gold = str(values[-1])
    lines = [f"{equation.a}*{x}={equation.start}"]
    for (operator, number), before, after in zip(equation.wraps, values, values[1:]):
        if operator == "*":
            lines.append(f"{number}*{before}={after}")
        else:
            lines.append(f"{before}{operator}{number}={after}")
    return {
        "question": f"What is {left_side(equation, x)}?",
        "answer": gold,
        "level": level_of(equation),
        "family": "forward",
        "teachers": {"work": checked(write(lines[:-1], gold), gold)},
    }


def draw_set(rng, count, orders, taken, make, whole=False):
    """`count` problems make(equation), the orders in turn. Adds their equations to `taken`.

    No equation is in `taken` before. Every answer makes up less than 1 %, so that one who ignores
    the question is almost never right.
    """
    problems = []
    answers = Counter()
    most = math.ceil(count / 100) - 1
    while len(problems) < count:
        order = orders[len(problems) % len(orders)]
        equation = draw_equation(rng, order, whole)
        gold = str(values_of(equation)[-1]) if whole else answer_of(equation)
        if equation in taken or answers[gold] >= most:
            continue
        taken.add(equation)
        answers[gold] += 1
        problems.append(make(equation))
    return problems


def draw_all_sets(rng, taken):
    """{name: problems} of all files. Adds their equations to `taken`."""
    def plain(equation):
        return equation_problem(rng, equation, RL_LETTERS, RL_PHRASINGS)

    def with_letters(equation):
        return equation_problem(rng, equation, OTHER_LETTERS, RL_PHRASINGS)

    def with_phrasings(equation):
        return equation_problem(rng, equation, RL_LETTERS, OTHER_PHRASINGS)

    def swapped(equation):
        return equation_problem(rng, equation, RL_LETTERS, RL_PHRASINGS, swapped=True)

    usual = [usual_order(level) for level in (2, 3, 4, 5)]
    # Levels 4 and 5 with a product first, or with two sums in a row.
    other = ["ss*", "*s*s", "*ss", "*ss*"]
    forward = [usual_order(level) for level in (2, 3, 3, 3, 3, 4)]
    sets = {}
    sets["test"] = draw_set(rng, 256, usual, taken, plain)
    sets["valid"] = draw_set(rng, 128, usual, taken, plain)
    sets["ood_letters"] = draw_set(rng, 128, usual, taken, with_letters)
    sets["ood_phrasings"] = draw_set(rng, 128, usual, taken, with_phrasings)
    sets["ood_swapped"] = draw_set(rng, 128, usual, taken, swapped)
    sets["ood_orders"] = draw_set(rng, 128, other, taken, plain)
    sets["ood_forward"] = draw_set(rng, 128, forward, taken, forward_problem, whole=True)
    sets["train"] = draw_set(rng, 3000, usual, taken, plain)
    return sets


# -------------------------------------------------------------------------------------------------
# What the base model is taught


def pick(rng, shares):
    """One of the names in {name: share}."""
    return rng.choices(list(shares), list(shares.values()))[0]


def new_equation(rng, levels, taken, whole):
    """An equation that no set has."""
    while True:
        equation = draw_equation(rng, usual_order(pick(rng, levels)), whole)
        if equation not in taken:
            return equation


def base_example(rng, taken):
    """One pair (user message, response).

    With a hint or a prefix the response is still the complete trace: what is learnt there can
    reach the plain prompt. Only plain ones have slips.
    """
    shares = {"hint": HINT_SHARE, "prefix": PREFIX_SHARE, "forward": FORWARD_SHARE}
    shares["plain"] = 1 - sum(shares.values())
    kind = pick(rng, shares)
    if kind == "forward":
        problem = forward_problem(new_equation(rng, FORWARD_LEVELS, taken, whole=True))
        return problem["question"], problem["teachers"]["work"]

    levels = PLAIN_LEVELS if kind == "plain" else GUIDED_LEVELS
    equation = new_equation(rng, levels, taken, whole=False)
    swapped = rng.random() < SWAPPED_SHARE
    letters = RL_LETTERS + OTHER_LETTERS
    phrasings = RL_PHRASINGS + OTHER_PHRASINGS
    problem = equation_problem(rng, equation, letters, phrasings, swapped)
    share = rng.choice(ampo.GHPO_SHARES)
    message = problem["question"]
    if kind == "hint":
        message = problem["hint"]
    elif kind == "prefix":
        message = prefixed(problem, share)
    teacher = TEACHERS[pick(rng, BASE_STYLES)]
    values = values_with_slips(rng, equation, SLIPS if kind == "plain" else 0)
    lines, answer = teacher(equation, values)
    return message, write(lines, answer)


def prefixed(problem, share):
    """GHPO's message: the question and the first part of the solution."""
    shown = ampo.Problem(problem["question"], problem["answer"], solution=problem["solution"])
    return ampo.solution_prefix(shown, share)


def train_tokenizer(texts, folder, vocab_size=384):
    """A byte-level BPE that reads any text; digits stay single, for arithmetic digit by digit.

    Text is cut into words as Qwen2 does: transformers puts that in for every Qwen2 model that it
    loads, whatever the file says. Hence the reload, too: the base model must be taught with the
    tokenizer that everyone will use.
    """
    qwen2 = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = qwen2.pre_tokenizer
    tokenizer.decoder = qwen2.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    # transformers 4 knows the class by its older name alone, version 5 by both.
    settings = folder / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return AutoTokenizer.from_pretrained(folder)


def new_model(tokenizer):
    """A Qwen2 of half a million parameters, with a pair of keys and values for two queries."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def size(pair):
    """The tokens of prompt and response together."""
    prompt, response = pair
    return len(prompt) + len(response)


def draw_batches(rng, pairs, count):
    """`count` batches of pairs of similar length, so that little is padding. Shuffles `pairs`."""
    batches = []
    while len(batches) < count:
        rng.shuffle(pairs)
        for chunk in ampo.chunks(pairs, 50 * BATCH):
            together = ampo.chunks(sorted(chunk, key=size), BATCH)
            rng.shuffle(together)
            batches += together
    return batches[:count]


def response_loss(model, batch):
    """The mean next-token loss on the responses of a batch of pairs."""
    width = max(size(pair) for pair in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)        # (B, L)
    in_response = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        in_response[row, len(prompt):end] = True
    # Padding is on the right, where causal attention never looks back from: no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = in_response[:, 1:]                                   # (B, L - 1)
    logits = model.lm_head(hidden[:, :-1][wanted])                # (response tokens, V)
    return F.cross_entropy(logits, ids[:, 1:][wanted])


def train_base(model, pairs, rng, steps):
    """Teach the model in place; a short warm-up, then a cosine down to zero."""
    def schedule(step):
        warm_up = min(1, (step + 1) / 100)
        return warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began = time.time()
    for step, batch in enumerate(draw_batches(rng, pairs, steps)):
        loss = response_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 500 == 0 or step == steps - 1:
            seconds = time.time() - began
            print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


# -------------------------------------------------------------------------------------------------
# Measuring


def solve(model, tokenizer, messages, golds, n):
    """For each message n sampled responses, as pairs (text, is it correct)."""
    prompts = [ampo.encode_prompt(tokenizer, message) for message in messages]
    groups = []
    for part in ampo.chunks(prompts, 1024 // n):
        groups += ampo.generate(model, part, n, 128, 1.0, tokenizer.eos_token_id)
    solved = []
    for group, gold in zip(groups, golds):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in group]
        solved.append([(text, ampo.verify(text, gold)) for text in texts])
    return solved


def solve_rates(model, tokenizer, messages, golds):
    """For each message the share of 8 sampled responses that are correct."""
    rates = []
    for group in solve(model, tokenizer, messages, golds, 8):
        rates.append(ampo.mean([correct for _, correct in group]))
    return rates


def measure_rollouts(model, tokenizer, problems):
    """{what: one number a problem} of sampled responses: plain, with hint, with prefixes.

    Also the plain responses, from solve().
    """
    golds = [problem["answer"] for problem in problems]
    questions = [problem["question"] for problem in problems]
    plain = solve(model, tokenizer, questions, golds, 32)
    right = []
    for group in plain:
        right.append(sum(correct for _, correct in group))
    rows = {}
    for k in (1, 8, 32):
        rows[f"pass@{k}"] = [ampo.pass_at_k(32, count, k) for count in right]
    rows["8 all fail"] = [1 - p for p in rows["pass@8"]]
    hints = [problem["hint"] for problem in problems]
    rows["hint"] = solve_rates(model, tokenizer, hints, golds)
    for share in ampo.GHPO_SHARES:
        messages = [prefixed(problem, share) for problem in problems]
        rows[f"prefix {share}"] = solve_rates(model, tokenizer, messages, golds)
    return rows, plain


def measure_traces(model, tokenizer, problems):
    """{what: one number a problem} of traces: how well the base comprehends them, their tokens.

    None where a teacher has no trace.
    """
    scores = []   # for each problem {teacher: comprehension of its trace}
    lengths = []  # for each problem {teacher: tokens of its trace}
    for problem in problems:
        teachers = problem["teachers"]
        traces = list(teachers.values())
        bare = ampo.Problem(problem["question"], problem["answer"])
        scores.append(dict(zip(teachers, ampo.comprehension(model, tokenizer, bare, traces))))
        tokens = [len(tokenizer.encode(trace)) for trace in traces]
        lengths.append(dict(zip(teachers, tokens)))
    rows = {}
    for title, column in (("r_p", scores), ("tok", lengths)):
        for name in TEACHERS:
            rows[f"{title} {name}"] = [of_problem.get(name) for of_problem in column]
    return rows


def style_of(text):
    """Which teacher a sampled response resembles, by its first line or two."""
    first, second = (text.split("\n") + [""])[:2]
    if first.startswith("0:"):
        return "secant"
    if "x" not in first:
        return "work"
    if first.split("=")[-1] == second.split("=")[-1]:
        return "expand"
    return "undo"


def measure(model, tokenizer, problems):
    """Print what the base can do, on the whole and by level."""
    rows, plain = measure_rollouts(model, tokenizer, problems)
    rows |= measure_traces(model, tokenizer, problems)
    lengths = []
    styles = Counter()
    for group in plain:
        texts = [text for text, _ in group]
        lengths.append(ampo.mean([len(tokenizer.encode(text)) for text in texts]))
        styles.update(style_of(text) for text in texts)
    rows["tok sampled"] = lengths

    levels = (2, 3, 4, 5)
    print("\nlevel           all" + "".join(f"{level:8}" for level in levels))
    for name, row in rows.items():
        known = [(x, problem["level"]) for x, problem in zip(row, problems) if x is not None]
        line = f"{name:11}{ampo.mean([x for x, _ in known]):8.2f}"
        for level in levels:
            line += f"{ampo.mean([x for x, its in known if its == level]):8.2f}"
        print(line)
    print("styles sampled:", dict(styles.most_common()))


# -------------------------------------------------------------------------------------------------


def write_sets(sets, folder):
    """A JSONL file for each set, and a line about it on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in sets.items():
        lines = [json.dumps(problem) + "\n" for problem in problems]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        answers = Counter(problem["answer"] for problem in problems)
        (top, times), = answers.most_common(1)
        share = times / len(problems)
        print(f"{name:14} {len(problems):5d} problems, most common answer {top} in {share:.2%}")


def encode_pairs(tokenizer, examples):
    """(message, response) -> token ids of prompt and response, the end token included."""
    pairs = []
    for message, text in examples:
        prompt = ampo.encode_prompt(tokenizer, message)
        pairs.append((prompt, tokenizer.encode(text) + [tokenizer.eos_token_id]))
    return pairs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3600, help="supervised steps of the base")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args(argv)
    base = args.out / "base"
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    began = time.time()

    taken = set()
    sets = draw_all_sets(rng, taken)
    write_sets(sets, args.out)
    examples = [base_example(rng, taken) for _ in range(POOL)]
    tokenizer = train_tokenizer(ampo.flatten(examples), base)
    pairs = encode_pairs(tokenizer, examples)
    model = new_model(tokenizer)
    seconds = time.time() - began
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, {seconds:.0f} s for data")

    train_base(model, pairs, rng, args.steps)
    model.to(torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # Measured on the validation set: the test sets are for the published table alone.
    measure(model, tokenizer, sets["valid"])
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
