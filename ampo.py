"""AMPO and its relatives in one file: reinforcement learning with verifiable rewards, and guidance on failure.

A language model samples G answers to each problem, a verifier marks them right or wrong, and the policy gradient makes
the right ones likelier. On a problem where every answer is wrong there is nothing to learn from, and these are the
problems one would most like to learn. This file has the published answers to that, each in one small function guide_*:

    --method   which groups    the new responses            sampled with     trained with     old_logps       off-policy
    grpo       -               -                            -                question         sampler's       no
    luffy      all             one teacher's, in slot 0     -                question         0 (π_φ = 1)     f, γ = 0.1
    ampo       all failed      the k teachers' that the     -                question         0 (π_φ = 1)     f, γ = 0.1
                               student comprehends best
    guide      all failed      the student's                its hint         question         under the hint  f, γ = P90
    ghpo       all failed      the student's                a prefix of the  that prompt      sampler's       no
                                                            solution
    sft        all             all teachers', no rollouts   -                question         -               likelihood

    python ampo.py                                         # AMPO on the embedded miniature: minutes on two CPU cores
    python ampo.py --method grpo                           # the same with another method; --help lists all flags
    python ampo.py eval --model runs/ampo-0/model          # pass@k of a checkpoint

Read it top to bottom; data flows one way: problem -> prompt -> rollouts -> verdicts -> guidance -> advantages ->
objective -> update. What keeps it small is that every sample carries the log-probability of its tokens under whatever
produced them (old_logps) and the prompt it is trained on. All methods then share one objective, with
ratio = exp(logps - old_logps):

    on-policy    min(ratio · A, clip(ratio, 1-ε, 1+ε) · A)
    off-policy   A · ratio / (ratio + γ)                      f(x) = x/(x+γ), without a clip

Shapes: P prompts, G rollouts a prompt, B sequences, L tokens of prompt and response, T tokens of a response,
V vocabulary, H hidden size, D head size. Log-probabilities are in nats; `ids` are lists of token ids.

Paper                                                                       Equation -> function
    AMPO   arXiv 2510.02227  comprehension r_p (Eq. 5)                      comprehension, choose_traces
                             advantage (Eq. 6)                              group_advantages
                             mixed objective (Eq. 7)                        policy_objective, set_weights
                             replacement on failure                         guide_ampo, swap_in
    LUFFY  arXiv 2504.14945  mixed objective with shaping f (Eq. 6)         policy_objective, guide_luffy
    Guide  arXiv 2506.13923  guided rollouts, importance weight, γ          guide_guide, guided_gamma
                             the form with a value head                     gae, value_loss (--advantage gae)
    GHPO   arXiv 2507.10628  objective (Eq. 1), hints of ¼, ½, ¾            guide_ghpo
    Where papers and official code disagree, --follow code (default: it produced the papers' numbers) or paper decides.

Left out, and where to find it: a KL penalty (off in the official runs) and dual clipping at 10 (rarely active), model
and sequence parallelism and a serving engine (verl, on which the official AMPO runs), LoRA (peft), judges other than
the verifier, tool use and multi-turn chat.
"""
import argparse, copy, functools, json, math, os
import random, re, shutil, signal, sys, time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import mpmath, torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, DynamicLayer, logging

# =====================================================================================================================
# §1 Configuration


def flag(default, help, least=None, choices=None):
    """A field of Config that is also a command line flag: its help, its lower bound, its choices."""
    return field(default=default, metadata={"help": f"{help} [{default}]", "least": least, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults train the embedded miniature in a few minutes on two CPU cores."""

    method: str = flag("ampo", "what to do with a problem on which every rollout failed; see METHODS")
    model: str = flag("data/base", "the student: a folder or hub name that transformers loads")
    data: str = flag("data/train.jsonl", "problems to train on, or to evaluate; format in data/README.md")
    eval_data: str = flag("", "files of the closing table, comma separated; default: test and ood_* beside --data")
    out: str = flag("", "folder of the run; default: runs/METHOD-SEED")
    resume: bool = flag(False, "continue the run in --out from its last checkpoint, with the flags it began with")
    seed: int = flag(0, "seed of the sampling and of the order of the problems")
    steps: int = flag(250, "training steps", 1)
    prompts_per_step: int = flag(32, "P: problems a step", 1)
    group_size: int = flag(8, "G: rollouts a problem", 2)
    updates: int = flag(2, "optimizer updates a step; from the second one on ratios leave 1", 1)
    max_new_tokens: int = flag(128, "longest response, in tokens", 1)
    temperature: float = flag(1.0, "temperature of the rollouts and of the log-probabilities trained on", 0)
    lr: float = flag(2e-4, "learning rate of AdamW; 1e-6 for models of a billion parameters", 0)
    weight_decay: float = flag(0.1, "weight decay of AdamW", 0)
    max_grad_norm: float = flag(1.0, "norm at which gradients are clipped", 0)
    clip: float = flag(0.2, "ε of the clipped on-policy objective", 0)
    advantage: str = flag("group", "reward against the group's mean, or value head and GAE", choices=("group", "gae"))
    lam: float = flag(0.95, "λ of GAE", 0)
    gamma: float = flag(0.1, "γ of the off-policy shaping x/(x+γ); guide measures its own", 0)
    entropy_coef: float = flag(0.001, "weight of the entropy bonus", 0)
    format_weight: float = flag(0.1, "share of the reward paid for giving any final answer", 0)
    follow: str = flag("code", "whom to follow where paper and official code disagree", choices=("code", "paper"))
    trigger: str = flag("fail", "guide groups with none right, or under half (v2)", choices=("fail", "half", "always"))
    k: int = flag(2, "ampo: traces swapped into a failed group", 1)
    select: str = flag("comprehension", "ampo: by what", choices=("comprehension", "random", "shortest", "longest"))
    teachers: str = flag("", "use only these teachers, comma separated; luffy takes the first; default: all")
    cold_start: int = flag(0, "first steps without any guidance (an option of GHPO)", 0)
    micro_tokens: int = flag(2048, "padded tokens of one training pass; a matter of memory, not of results", 1)
    eval_every: int = flag(100, "score valid.jsonl beside --data every so many steps; 0: no evaluation at all", 0)
    samples: int = flag(32, "samples a problem in evaluations", 1)
    eval_temperature: float = flag(0.6, "temperature of evaluations during and after training", 0)
    save_every: int = flag(50, "steps between checkpoints", 1)


class InputError(ValueError):
    """Something the user gave cannot be used; the message names file, line and field, or the flag."""


def refuse(bad: bool, message: str):
    """Raise InputError where an input is bad."""
    if bad: raise InputError(message)


# =====================================================================================================================
# §2 Problems and prompts


@dataclass(frozen=True)
class Problem:
    """One line of a JSONL file; only question and answer are required. data/README.md describes the format."""

    question: str
    answer: str
    teachers: dict = field(default_factory=dict)  # name -> full response that ends in the answer
    hint: str = ""                                # Guide: a complete alternative user message
    solution: str = ""                            # GHPO: its beginning is shown to the student
    where: str = ""                               # file:line, for messages


def load_problems(path) -> list[Problem]:
    """Read a JSONL file of problems. Raises OSError, or InputError naming file, line and field."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    problems = [parse_problem(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    refuse(not problems, f"{path}: holds no problems")
    return problems


def parse_problem(line: str, where: str) -> Problem:
    """One JSON object -> Problem. Numbers become text; fields that Problem does not have are ignored."""
    try: row = dict(json.loads(line))
    except (ValueError, TypeError, RecursionError): raise InputError(f"{where}: not a JSON object")
    row = {f.name: row[f.name] for f in fields(Problem) if row.get(f.name) is not None} | {"where": where}
    row |= {name: str(value) for name, value in row.items() if type(value) in (int, float)}
    for f in fields(Problem):
        kind = "an object of texts" if f.type is dict else "text"
        refuse(not isinstance(row.get(f.name, f.type()), f.type), f"{where}: field '{f.name}' must be {kind}")
    texts = row.get("teachers", {}).values()
    refuse(not all(isinstance(text, str) for text in texts), f"{where}: field 'teachers' must be an object of texts")
    for name in ("question", "answer"): refuse(not row.get(name, "").strip(), f"{where}: field '{name}' is missing")
    # What the verifier cannot read is equal to nothing, not even to itself.
    refuse(not same_answer(gold := row["answer"], gold), f"{where}: field 'answer': cannot be verified: {gold!r}")
    return Problem(**row)


def encode_prompt(tokenizer, question: str) -> list[int]:
    """Token ids of a user message in the model's own chat template, up to where the assistant's turn begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


# =====================================================================================================================
# §3 Answer verification

# COMMANDS and REWRITES bring LaTeX down to a small alphabet; a precedence-climbing parser evaluates it while reading.
# A number is the list of its values at four random points of both signs; anything else is a pair (kind, items):
# ("[)", [0, 1]) an interval, (",", [1, 2]) a bare list, ("<", [x - 2]) an inequality. Two answers are equal when their
# values, rounded, are the same at two precisions. Nothing that a model or a data file wrote is ever executed.

# The length bounds the work, so neither a timeout nor a subprocess is needed; brackets are counted as nesting recurses.
# Numbers above 2^MAX_EXPONENT are not added up with others, which they would swallow at the precision used here.
MAX_CHARS, MAX_BRACKETS, MAX_EXPONENT = 400, 60, 110

# TeX commands and other spellings -> the alphabet of the parser, where functions have the names they have in mpmath
COMMANDS = {name: token for token, names in {
    "*": "times cdot × · ⋅", "/": "div ÷", "-": "− –", "±": "pm", "^": "**", "=": "in ∈", "≤": "le leq leqslant <=",
    "≥": "ge geq geqslant >=", "≠": "ne neq !=", "<": "lt", ">": "gt", "∪": "cup", "≈": "approx", "|": "lvert rvert",
    "⦃": "{", "⦄": "}", "∅": "emptyset varnothing", "∞": "infty infinity", "),(": "\\", ",": "& ;", "·0.01": "%",
    "·(π/180)": "circ degree °", r"\fdiv": "frac dfrac tfrac cfrac", r"\binom": "dbinom tbinom", r"\sqrt ": "√",
    r"\floor{": "lfloor", r"\ceil{": "lceil", "}": "rfloor rceil", r"\asin": "arcsin", r"\acos": "arccos",
    r"\atan": "arctan", r"\power{-1}\tan": "cot", r"\power{-1}\cos": "sec", r"\power{-1}\sin": "csc", "^2": "²",
    "^3": "³", "^{-1}": "⁻¹", r"\fdiv{1}{2}": "½", r"\fdiv{1}{4}": "¼", r"\fdiv{3}{4}": "¾", "π": "pi", "θ": "theta",
    r"\text": "mbox mathrm textbf operatorname", " ": "left right big Big displaystyle quad boxed mathbf mathbb $ ~",
}.items() for name in names.split()}
WORD = r"(?<!\d)(?:[A-Za-z]{4,}|[A-Z][a-z]{2,})|yes|no|No|odd|cm|mm|km|kg|mg|ml|ft|lb|oz|mph|in|min|sec|hr"
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in [
    # thousands, currency, matrices, commands
    (r"(?<=\d)(?:\{,\}|,\\!|\\[, ]| )(?=\d{3}(?!\d))", ""), (r"\\\$\s*(\d(?:[\d.,]*\d)?)", r'\1"dollar"'),
    (r"(?<![(\[{,.\d])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", "")),
    (r"\\begin\{(?:[pbB]?matrix|array)\}(?:\{[clr|]*\})?", "⟦("), (r"\\end\{(?:[pbB]?matrix|array)\}", ")⟧"),
    (r"(?<![A-Za-z\\])(sqrt|pi|infinity|(?:arc|a)?(?:sin|cos|tan)|ln|log|exp)(?![A-Za-z])", r"\\\1"),
    (r"^\*\*|\*\*$|(?<!\\)\\[ ,;:!()\[\]]|\s+", " "), (r"\{([^{}]*)\\over([^{}]*)\}", r"\\fdiv{\1}{\2}"),
    (r"\\([A-Za-z]+|.)|[<>!]=|\*\*|⁻¹|[&;%~$]|[^\x00-\x7f]", lambda m: COMMANDS.get(m[1] or m[0], m[0])),
    # words and units: what is in quotes is one token, so that its letters do not commute
    (r"\bpercent\b", "·0.01"), (r"\bdegrees?\b|\^ *\{? *·\(π/180\) *\}?", "·(π/180)"), (r",? *\b(?:and|or)\b", ","),
    (r"\\text *\{([^{}]*)\}", lambda m: re.sub(r"(?<!\\)\b(?![ei]\b)[A-Za-z]+(?: +[A-Za-z]+)*", r'"\g<0>"', m[1])),
    (rf'"[^"]*"|\\[A-Za-z]+|(?<![A-Za-z])(?:{WORD})(?![A-Za-z])', lambda m: f'"{m[0]}"' if m[0].isalpha() else m[0]),
    (r'" *"', " "), (r's"', r'"'), (r'" *\^ *\{?(-?\d+)\}?', r'^\1"'), (r'" *([/*]) *"', r"\1"), ("[.,; ]+$", ""),
    # numbers and functions
    (r"\\(fdiv|binom) *(\d)", r"\\\1{\2}"), (r"(?<![\d.^_/}])(\d+) +(\d+/\d+)(?![\d.])", r"(\1+\2)"),
    (r"(?<![\d.^_/}])(\d+) *\\fdiv *\{ *(\d+) *\} *\{? *(\d+) *\}?", r"(\1+\2/\3)"), ("⦃ *⦄", "∅"),
    (r"(\.\d*)\\overline *\{?(\d+)\}?", lambda m: f"{m[1]}0+{m[2]}/{'9' * len(m[2])}{'0' * (len(m[1]) - 1)}"),
    (r"\\binom *\{([^{}]*)\} *\{([^{}]*)\}", r"\\fdiv{\\factorial{\1}}{\\factorial{\2}\\factorial{\1-(\2)}}"),
    (r"\\(sin|cos|tan) *\^ *\{?-1\}?", r"\\a\1"), (r"\\(sin|cos|tan|ln) *\^ *(\w|\{[^{}]*\})", r"\\power{\2}\\\1"),
    (r"\\log(?![a-z]) *(?:_ *(\w|\{[^{}]*\}))?", lambda m: rf"\power{{-1}}\ln{{{m[1] or 10}}}·\ln "),
    (r"\\sqrt *\[([^\[\]]*)\]", r"\\power{1/(\1)}"), (r"(\d+|[^\W\d_]|\([^()]*\))!", r"\\factorial{\1}"),
    # structure: bars, tails, lists; 1/2x is (1/2)x, x<y<z is x<y∧y<z
    (r"\|([^|]+)\|", r"\\fabs{\1}"), (r"(=[^≈]*)≈.*", r"\1"), (r"([^,⦃⦄]*)±([^,⦃⦄]*)", r"\1+\2,\1-\2"),
    (r"(\d+/\d+)(?= *[a-zA-Zπ\\(])", r"(\1)"), (r"([^,:->≤≥≠]+)([:->≤≥≠])([^,:->≤≥≠]+)(?=[:->≤≥≠])", r"\1\2\3∧\3"),
]]
TOKEN = re.compile(r'"[^"]*"|\\[A-Za-z]+|[A-Z]{2,}|(?:[^\W\d_]|\d+)_(?:\w|\{[^{}]*\})|\d+\.\d+e[+-]?\d\d?|\d*\.?\d+|\S')
UNIT = re.compile(r'·0\.01|·\(π/180\)|(?<=[\w)}!]) *"(?![mb]illion|thousand|hundred)[A-Za-z][^"]*"')
LABEL = re.compile(r'(?:^|(?<=,)) *([A-Z]*[^\W\d](?:_\w+)?(?:\([\w, ]+\))?|\\[a-z]+|"[^"]*"|\([A-Za-z, ]+\)) *=')
BRACES = functools.reduce(lambda inner, _: rf"(?:\\.|[^{{}}\\]|\{{{inner}\}})*", range(10), "")
BOX = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{({BRACES})\}}|(\w+))|<answer>(.*?)</answer>", re.DOTALL)

# How tight each operator binds, loosest first; "s" is the sign of -x and "·" the product without a sign, as in \sin 2x.
LEVEL = {op: level for level, ops in enumerate([",", "∧", "=<>≤≥≠", "∪", "+-", "*/:", "s", "·", "^"], 1) for op in ops}
# Of mpmath only these names are ever looked up; what a model wrote is at most a key of a table.
NAMES = dict(zip("+-*·/:^πei", "fadd fsub fmul fmul fdiv fdiv power pi e j".split()))
FUNCTIONS = "sin cos tan asin acos atan sinh cosh tanh exp ln power".split()
PREFIXES = "sqrt fabs floor ceil factorial fdiv".split()
KINDS = {kind: kind for kind in ("()", "[]", "[)", "(]", "{}", "⦃⦄", "⟦⟧")}


@functools.cache
def _context(bits):
    """An mpmath of our own at so many bits of precision."""
    context = mpmath.MPContext()  # mpmath's own one is global; what is called here never changes the precision
    context.prec = bits
    return context


def _plain(text):
    """LaTeX -> the parser's alphabet; ValueError for what is too long or too deep."""
    if len(text) > MAX_CHARS or sum(map(text.count, "([{")) > MAX_BRACKETS: raise ValueError("too long")
    return functools.reduce(lambda text, rewrite: rewrite[0].sub(rewrite[1], text), REWRITES, text).strip()


@functools.lru_cache(1000)
def _symbol(name, context):
    """Random values, seeded by the name itself: no global state is read or changed."""
    if name in NAMES: return [getattr(context, NAMES[name]) * 1] * 4
    rng = random.Random(name)
    return [sign * context.mpf(rng.randrange(301, 3000)) / 1009 for sign in (1, -1, *rng.choices((1, -1), k=2))]


def _apply(context, name, *operands):
    """One operation at all points.  What is too large becomes a symbol of its own, equal only to itself."""
    results = [getattr(context, name)(*numbers) for numbers in zip(*operands)]
    bounded = all(context.mag(result) <= MAX_EXPONENT for result in results)  # not a nan either
    return results if bounded else _symbol(f"{name}{operands}", context)


def _parse(tokens, context, floor=0):
    """Precedence climbing: reads what binds tighter than `floor` and returns its value."""
    left = _operand(tokens, context)
    while True:
        if re.match(r'[^\W\d_]|["\\(\[{⟦]', tokens[-1]):  # a product without a sign
            tokens.append("*" if tokens[-1][1:] in FUNCTIONS else "·")
        if LEVEL.get(tokens[-1], 0) <= floor: return left
        op = tokens.pop()
        left = _join(context, left, op, _parse(tokens, context, LEVEL[op] - (op == "^")))


def _join(context, left, op, right):
    """The value of left op right; a relation, list, union or conjunction is a pair (kind, items)."""
    if op in NAMES: return _apply(context, NAMES[op], left, right)
    if op in ",∪∧": return (op, [*(left[1] if left[0] == op else [left]), right])
    difference = _apply(context, "fsub", *((right, left) if op in ">≥" else (left, right)))
    if op == "=" and not any(difference): return right  # 2+3=5 stands for 5
    scale = difference[0] if op in "=≠" else abs(difference[0])  # a relation holds up to a factor
    return (op.translate(str.maketrans(">≥", "<≤")), [[number / scale for number in difference]])


def _operand(tokens, context):
    """Reads a number, name, word, bracket, sign or function; ValueError or KeyError for anything else."""
    token = tokens.pop()
    name = token.strip('"\\')
    if token in ("(", "[", "{", "⦃", "⟦"):
        inner = _parse(tokens, context)
        kind = KINDS[token + tokens.pop()]
        return (kind, inner[1]) if inner[0] == "," else inner
    if token in ("+", "-"): return _apply(context, NAMES[token], [0] * 4, _parse(tokens, context, LEVEL["s"]))
    if token[:1] == "\\" and name in FUNCTIONS + PREFIXES:
        if name in FUNCTIONS and tokens[-1] not in ("(", "{"):
            return _apply(context, name, _parse(tokens, context, LEVEL["s"]))
        operands = [_operand(tokens, context) for _ in range(2 if name in ("fdiv", "power") else 1)]
        return _apply(context, name, *(operands[::-1] if name == "power" else operands))
    if name[:1].isalpha() or name in ("∞", "∅") or "_" in name:
        word = re.fullmatch('"..+"|[A-Z]{2,}', token)
        return _symbol(name.lower() if word else re.sub("[{} ]", "", name), context)
    return _apply(context, "mpf", [token] * 4)  # ValueError for anything that is no number


def _canonical(value, context):
    """Something hashable that is the same for all spellings of a value."""
    if isinstance(value, tuple):
        kind, items = value[0], [_canonical(item, context) for item in value[1]]
        return (kind, *(sorted(items, key=repr) if kind in ",∪∧⦃⦄" else items))
    scale = context.ldexp(1, context.prec - 128)  # 128 bits are left for MAX_EXPONENT and rounding errors
    return tuple(context.nint(part * scale) for number in value for part in (number.real, number.imag))


@functools.lru_cache(1000)  # one gold answer is compared with many
def _evaluate(text, bits):
    """The canonical value of a text at one precision."""
    context, tokens = _context(bits), ["", *reversed(TOKEN.findall(text))]
    return _canonical(_parse(tokens, context), context), tokens  # tokens that are left over count as well


def same_answer(answer, gold):
    """Are two bare answers, such as 1/2 and \\frac12, equal?  Never raises: what cannot be read is equal to nothing.

    Policies: decimals are exact, so 0.333 is not 1/3.  The gold answer 35\\% takes 35 and 0.35.  A unit, or the x= of
    x=5, may be left out but not changed.  Bare lists and sets are unordered, tuples, intervals and matrices ordered.
    Words compare as strings, whatever their case.  A chain such as 5=6=5 is no number.
    """
    try:
        texts = [_plain(answer), _plain(gold)]
        if all(re.fullmatch(r"-?(?:\d+/\d+|\d*\.?\d+)", text) for text in texts):
            return Fraction(texts[0]) == Fraction(texts[1])
        labels = [set(LABEL.findall(text)) for text in texts]
        if len(labels[0] | labels[1]) == 1 and (labels[0] == labels[1] or not all("=" in text for text in texts)):
            texts = [LABEL.sub("", text) for text in texts]
        bare = [UNIT.sub("", text) for text in texts]
        # The answer 35% to the gold answer 35 is fine, 0.5% to 0.5 is not.
        lenient = (texts[0] == bare[0]) != (texts[1] == bare[1]) and ("·0.01" not in texts[0] or texts[1].isdigit())
        # The first precision weeds out, the second tells e^(pi sqrt 163) from the integer that it is so close to.
        return any(all(_evaluate(one, bits) == _evaluate(other, bits) for bits in (192, 320))
                   for one, other in [texts, bare][:1 + lenient])
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError):
        return False


def extract_answer(response):
    """The content of the last \\boxed{}, \\fbox{} or <answer>...</answer>, whichever comes last.

    None when there is none, or when the last one is cut off.  A \\boxed without braces takes the word that follows.
    """
    found = BOX.match(response, max(0, *map(response.rfind, ("\\boxed", "\\fbox", "<answer>"))))
    return found and found[found.lastindex]


def verify(response, gold):
    """Does the final answer of `response` equal `gold`?  Never raises, whatever the two are."""
    return isinstance(response, str) and same_answer(extract_answer(response), gold)


# =====================================================================================================================
# §4 Sampling with a KV cache


class Slab(DynamicLayer):
    """One layer's keys and values in a buffer with room for the whole response: a decoding step writes one slice
    where transformers' own cache copies everything. Made from a prefilled layer, each row repeated n times."""

    def __init__(self, layer, n: int, room: int):
        super().__init__()
        self.length = layer.keys.shape[2]
        grow = lambda x: torch.nn.functional.pad(x.repeat_interleave(n, 0), (0, 0, 0, room))
        self.keys, self.values = grow(layer.keys), grow(layer.values)

    def update(self, keys, values, *args, **kwargs):
        """Called by each attention layer: store the new keys and values, return all so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length:end], self.values[:, :, self.length:end] = keys, values  # (B, heads, 1, D)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def sample_tokens(logits, temperature: float):
    """Draw one token a row and return it with its log-probability under the very distribution it was drawn from.

    logits (B, V) -> tokens (B,), logps (B,). Temperature 0 is the argmax, whose distribution is a point: log 1 = 0.
    """
    if temperature == 0: return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logps = (logits.float() / temperature).log_softmax(-1)
    cdf = logps.exp().cumsum(-1)
    # Inverse transform: one uniform number a row, where multinomial draws V. 1 - rand lies in (0, 1]: no empty bin.
    tokens = torch.searchsorted(cdf, (1 - torch.rand(len(cdf), 1, device=cdf.device)) * cdf[:, -1:])
    return tokens[:, 0], logps.gather(1, tokens)[:, 0]


@torch.inference_mode()
def generate(model, prompts: list[list[int]], n: int, max_new_tokens: int, temperature=1.0, eos_token_id=None) -> list:
    """Sample n responses to every prompt.

    Each prompt is prefilled once and its cache repeated for its n rows; rows that finished leave the batch.
    Returns for each prompt n pairs (ids, logps): ids keep their end-of-sequence token when they stopped by
    themselves, and logps (nats) belong to the distribution at `temperature` that the ids were drawn from.
    eos_token_id: an id, a list of ids, or None for no stopping.
    """
    if not prompts: return []
    device, stops = model.device, [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    stops = torch.tensor(stops, dtype=torch.long, device=device)
    ids, mask = pad(prompts, device, side="left")  # (P, L)
    cache = DynamicCache()
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache = Cache(layers=[Slab(layer, n, max_new_tokens) for layer in cache.layers])
    logits, lengths = logits.repeat_interleave(n, 0), mask.sum(1).repeat_interleave(n)
    # (B, 1, 1, L + T): padding before the prompt is never looked at
    mask = torch.nn.functional.pad(mask.repeat_interleave(n, 0), (0, max_new_tokens), value=True)[:, None, None]
    rows = torch.arange(len(lengths), device=device)  # which response each row of the shrinking batch belongs to
    running = torch.ones_like(rows, dtype=torch.bool)
    all_ids = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)
    all_logps = torch.zeros(len(rows), max_new_tokens, device=device)
    for t in range(max_new_tokens):
        tokens, logps = sample_tokens(logits, temperature)
        all_ids[rows, t], all_logps[rows, t] = tokens, logps
        running &= ~torch.isin(tokens, stops)
        alive = int(running.sum())
        if alive == 0 or t == max_new_tokens - 1: break
        if alive < 0.85 * len(rows):  # copying the cache costs about as much as the finished rows save
            rows, tokens, lengths, mask = rows[running], tokens[running], lengths[running], mask[running]
            for layer in cache.layers: layer.keys, layer.values = layer.keys[running], layer.values[running]
            running = running[running]
        logits = model(input_ids=tokens[:, None], attention_mask=mask[..., :ids.shape[1] + t + 1],
                       position_ids=(lengths + t)[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    return cut_responses(all_ids, all_logps, stops, n)


def cut_responses(ids, logps, stops, n: int):
    """(P·n, T) sampled ids and logps -> for each prompt n pairs of lists that end with their first stop token."""
    stopped = torch.isin(ids, stops)
    ends = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, ids.shape[1]).tolist()
    pairs = [(i[:end], p[:end]) for i, p, end in zip(ids.tolist(), logps.tolist(), ends)]
    return [pairs[start:start + n] for start in range(0, len(pairs), n)]


def pad(sequences: list[list], device, side: str = "right"):
    """Lists of unequal length -> tensor (B, T) filled up with zeros, mask (B, T). The mask comes from the lengths:
    where padding and end-of-sequence share an id, a mask made from ids would lose the end."""
    fill = lambda rows: torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, padding_side=side)
    return fill(sequences).to(device), fill([[True] * len(sequence) for sequence in sequences]).to(device)


# =====================================================================================================================
# §5 Log-probabilities


def score(model, prompts, responses, temperature: float = 1.0, critic=None):
    """One forward pass over prompt + response -> logps, entropy, values, mask, all (B, T), of the response's tokens.

    values[b, t] is what critic, if any, says before token t; it only reads the states and does not train them."""
    ids, _ = pad([p + r for p, r in zip(prompts, responses)], model.device)  # (B, L)
    targets, mask = pad(responses, ids.device)  # (B, T)
    predicts, _ = pad([[False] * (len(p) - 1) + [True] * len(r) + [False] for p, r in zip(prompts, responses)],
                      ids.device)  # (B, L): the state before each response token
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        # Padding stands on the right, where causal attention never looks back at it: no attention mask is needed.
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[predicts]  # (response tokens, H)
        logits = model.get_output_embeddings()(states).float() / temperature  # (response tokens, V)
    log_p = logits.log_softmax(-1)
    unflatten = lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x)
    values = unflatten(critic(states.detach().float())[:, 0]) if critic else None
    logps, entropy = log_p.gather(1, targets[mask][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    return unflatten(logps), unflatten(entropy), values, mask


def token_logps(model, prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0):
    """log π(token | prompt, response so far) of every response token, in nats, differentiable.

    Returns logps (B, T) and mask (B, T), T the longest response; logps are 0 where the mask is False.
    `temperature` must be the one sampled at: another one scores another distribution.
    """
    logps, _, _, mask = score(model, prompts, responses, temperature)
    return logps, mask


# =====================================================================================================================
# §6 The objective


def group_advantages(rewards, follow: str = "code"):
    """Advantage of each response over its group: rewards (P, G) -> (P, G).

    code:   A = R - mean(R), over the group after guidance changed it
    paper:  A = (R - mean(R)) / std(R)  (AMPO Eq. 6; unbiased std)
    A group of equal rewards gets exactly 0, not rounding noise divided by a tiny std.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if follow == "paper": advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)


def gae(values, rewards, mask, lam: float = 0.95):
    """Generalised advantage estimation with γ = 1 and the reward at the last token (Schulman et al. 2016, Eq. 16).

    values (B, T), rewards (B,), mask (B, T) -> (B, T):  A_t = δ_t + λ·A_{t+1},  δ_t = r_t + V_{t+1} - V_t
    """
    values = values * mask
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1  # (B, T)
    delta = rewards[:, None] * last + torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    advantages, later = torch.zeros_like(values), 0
    for t in reversed(range(mask.shape[1])): advantages[:, t] = later = delta[:, t] + lam * later
    return advantages * mask


def policy_objective(logps, old_logps, advantages, off_policy, clip: float = 0.2, gamma=0.1):
    """The per-token objective that every method here maximises (AMPO Eq. 7, LUFFY Eq. 6).

    on-policy rows:   min(ratio·A, clip(ratio, 1-ε, 1+ε)·A)
    off-policy rows:  f(ratio)·A,  f(x) = x/(x+γ): tokens the student finds unlikely weigh most

    logps, old_logps (B, T); advantages (B,) or (B, T); off_policy (B,) bool -> (B, T), not masked, not averaged.
    A teacher's trace has old_logps = 0, so its ratio is the student's probability itself.
    AMPO's paper writes the clip around f as well: for A ≥ 0 it changes nothing, since f < 1 < 1 + ε.
    """
    if advantages.dim() == 1: advantages = advantages[:, None]
    # exp(20) is far outside any clip, and keeps inf/inf = nan out of f.
    ratio = (logps - old_logps).clamp(max=20).exp()
    on = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    off = ratio / (ratio + gamma) * advantages
    return torch.where(off_policy[:, None], off, on)


# =====================================================================================================================
# §7 Guidance: what each method does with a failed group


@dataclass
class Sample:
    """One response and all that is needed to train on it."""

    prompt: list[int]        # the prompt it is trained on, which need not be the one it was sampled with
    ids: list[int]           # response tokens, end-of-sequence included
    old_logps: list[float]   # log-probability of each under whatever produced it; 0 for a teacher's trace
    text: str
    correct: bool
    reward: float
    source: str = "student"  # student, hint, or a teacher's name
    off_policy: bool = False
    advantages: list[float] = field(default_factory=list)  # one a token
    weight: float = 0.0      # 1 / normaliser of the whole update
    values: list[float] = field(default_factory=list)  # --advantage gae: the value head's, one a token


@dataclass
class Student:
    """The model in training and what it takes to sample from it."""

    model: torch.nn.Module   # float32 master weights
    sampler: torch.nn.Module  # what generate() runs: the model itself; on CUDA a bfloat16 copy of it
    tokenizer: object
    critic: torch.nn.Linear  # value head on the last hidden state, for --advantage gae
    eos: list[int]           # the first one ends a teacher's trace, any of them ends a rollout
    cfg: Config


def rollout(student: Student, problems: list[Problem], messages: list[str]) -> list[list[Sample]]:
    """G verified rollouts of each message, a group a problem; they train on the prompt they were sampled with."""
    cfg, prompts = student.cfg, [encode_prompt(student.tokenizer, message) for message in messages]
    groups = generate(student.sampler, prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature, student.eos)
    return [[judge(student, problem, prompt, ids, logps) for ids, logps in group]
            for problem, prompt, group in zip(problems, prompts, groups)]


def judge(student: Student, problem: Problem, prompt, ids, logps) -> Sample:
    """Verify one rollout. The reward is 0.9 for a right answer + 0.1 for giving one at all, as in official AMPO."""
    text, w = student.tokenizer.decode(ids, skip_special_tokens=True), student.cfg.format_weight
    correct = verify(text, problem.answer)
    return Sample(prompt, ids, logps, text, correct, (1 - w) * correct + w * (extract_answer(text) is not None))


def needs_guidance(group: list[Sample], trigger: str = "fail") -> bool:
    """fail: no rollout is correct, the situation this file is about. half: fewer than half are (AMPO v2). always."""
    share = sum(sample.correct for sample in group) / len(group)
    return {"fail": share == 0, "half": share < 0.5, "always": True}[trigger]


def teacher_samples(student: Student, problem: Problem) -> list[Sample]:
    """The problem's traces as samples, in the order of --teachers or of the file. π_φ is taken as 1, so old_logps = 0.
    Their reward is forced to 1 (AMPO v1; v2 verifies it). Traces longer than the student may write are left out."""
    samples, prompt = [], encode_prompt(student.tokenizer, problem.question)
    for name in student.cfg.teachers.split(",") if student.cfg.teachers else problem.teachers:
        text = problem.teachers.get(name, "")
        ids = student.tokenizer(text, add_special_tokens=False).input_ids + student.eos[:1]
        right = student.cfg.trigger != "half" or verify(text, problem.answer)
        if text and len(ids) <= student.cfg.max_new_tokens:
            samples.append(Sample(prompt, ids, [0.0] * len(ids), text, right, float(right), name, off_policy=True))
    return samples


@torch.no_grad()
def comprehension(model, tokenizer, problem: Problem, traces: list[str], follow: str = "code") -> list[float]:
    """How well the student understands each trace: the probability r_p of the gold answer after it (AMPO Eq. 5).

    A trace is cut where its final answer starts, the gold answer is put there, and only its tokens are scored.
    code:   the arithmetic mean of the tokens' probabilities
    paper:  exp(mean log p), their geometric mean
    Returns a number in [0, 1] for each trace; a trace without an answer mark scores 0.
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    prompt, prompts, answers, marked = encode_prompt(tokenizer, problem.question), [], [], []
    for trace in traces:
        cuts = [mark.end() for mark in re.finditer(r"\\boxed\{|<answer>", trace)]
        before = trace[:cuts[-1]] if cuts else ""
        ids = encode(before + problem.answer)
        # A token may span mark and answer, as "{\" does: the answer begins with the first token that differs.
        start = len(os.path.commonprefix([ids, encode(before)]))
        prompts.append(prompt + ids[:start])
        answers.append(ids[start:])
        marked.append(bool(cuts))
    logps, mask = token_logps(model, prompts, answers)
    mean = lambda x: (x * mask).sum(1) / mask.sum(1)
    scores = mean(logps).exp() if follow == "paper" else mean(logps.exp())
    return (scores * torch.tensor(marked, device=scores.device)).tolist()


def choose_traces(student: Student, problem: Problem, k: int) -> list[Sample]:
    """The k traces to learn from: those that the student comprehends best, ties to the shorter one."""
    cfg, traces = student.cfg, teacher_samples(student, problem)
    if cfg.select == "comprehension" and traces:
        r = comprehension(student.sampler, student.tokenizer, problem, [t.text for t in traces], cfg.follow)
        # The official code ranks by 0.9·r_p + 0.1·format in bfloat16, whose coarse steps make ties.
        if cfg.follow == "code": r = (0.9 * torch.tensor(r) + 0.1).bfloat16().tolist()
    key = {"comprehension": lambda i: (-r[i], len(traces[i].ids)), "random": lambda i: torch.rand(()).item(),
           "shortest": lambda i: len(traces[i].ids), "longest": lambda i: -len(traces[i].ids)}[cfg.select]
    return [traces[i] for i in sorted(range(len(traces)), key=key)[:k]]


def swap_in(traces: list[Sample], group: list[Sample]) -> list[Sample]:
    """The group with traces in place of as many random incorrect rollouts."""
    wrong, group = [i for i, sample in enumerate(group) if not sample.correct], list(group)
    for slot, trace in zip(torch.randperm(len(wrong)).tolist(), traces): group[wrong[slot]] = trace
    return group


def guide_grpo(student, problems, groups):
    """GRPO: nothing. A failed group stays without signal."""
    return groups


def guide_luffy(student, problems, groups):
    """LUFFY: one teacher's trace takes slot 0 of every group, failed or not."""
    traces = [teacher_samples(student, problem)[:1] for problem in problems]
    return [trace + group[len(trace):] for trace, group in zip(traces, groups)]


def guide_ampo(student, problems, groups):
    """AMPO: in a failed group the k traces that the student comprehends best replace k random failures."""
    groups = list(groups)
    for i, group in enumerate(groups):
        if needs_guidance(group, student.cfg.trigger):
            k = len(group) // 2 - sum(s.correct for s in group) if student.cfg.trigger == "half" else student.cfg.k
            groups[i] = swap_in(choose_traces(student, problems[i], k), group)
    return groups


def retry(student, problems, groups, message: callable, trigger: str = "fail") -> dict[int, list[Sample]]:
    """Fresh rollouts of message(problem) for the groups that need guidance, by their index; without a message, none."""
    todo = [i for i, group in enumerate(groups) if needs_guidance(group, trigger) and message(problems[i])]
    return dict(zip(todo, rollout(student, [problems[i] for i in todo], [message(problems[i]) for i in todo])))


def guide_guide(student, problems, groups):
    """Guide: rollouts of a failed group's hinted message train the plain prompt. Their old_logps are the sampler's
    under the hint, so that their ratio is π(·|q) / π_old(·|q, hint). They replace the group (code) or join it (paper).
    """
    groups = list(groups)
    for i, hinted in retry(student, problems, groups, lambda p: p.hint, student.cfg.trigger).items():
        hinted = [replace(s, prompt=groups[i][0].prompt, off_policy=True, source="hint") for s in hinted]
        groups[i] = hinted if student.cfg.follow == "code" else groups[i] + hinted
    return groups


LEAD = "\n The following text is the beginning part of the answer, which you can refer to for solving the problem:\n"


def guide_ghpo(student, problems, groups):
    """GHPO: show more and more of the solution until a fresh group has a success, and train that group on the prompt
    it was sampled with. (The official code rebuilds the prompts of groups rescued earlier: a bug, not copied.)"""
    groups = list(groups)
    for omega in (0.25, 0.5, 0.75):
        begun = lambda p: p.solution and p.question + LEAD + p.solution[:round(len(p.solution) * omega)]
        for i, hinted in retry(student, problems, groups, begun).items():
            if not needs_guidance(hinted): groups[i] = [replace(s, source="hint") for s in hinted]
    return groups


def guide_sft(student, problems, groups):
    """SFT: no rollouts, all traces of all teachers."""
    return [teacher_samples(student, problem) for problem in problems]


@dataclass(frozen=True)
class Method:
    """All that a method changes; the rest of this file is shared."""

    guide: callable                 # (student, problems, groups) -> groups
    needs: str = ""                 # the field of Problem that it lives on
    rollouts: bool = True
    clipped: bool = True            # LUFFY leaves its on-policy ratio unclipped
    measured_gamma: bool = False    # Guide: γ is the 90th percentile of the guided ratio
    advantages: callable = group_advantages
    objective: callable = policy_objective


METHODS = {
    "grpo": Method(guide_grpo),
    "ampo": Method(guide_ampo, "teachers"),
    "luffy": Method(guide_luffy, "teachers", clipped=False),
    "guide": Method(guide_guide, "hint", measured_gamma=True),
    "ghpo": Method(guide_ghpo, "solution"),
    "sft": Method(guide_sft, "teachers", rollouts=False, advantages=lambda rewards, follow: torch.ones_like(rewards),
                  objective=lambda logps, *_: logps),
}


# =====================================================================================================================
# §8 The loop


def set_advantages(student: Student, groups: list[list[Sample]]):
    """One advantage a token: the response's over its group, or the value head's GAE."""
    for group in filter(None, groups):
        rewards = torch.tensor([[sample.reward for sample in group]])  # (1, G)
        advantages = METHODS[student.cfg.method].advantages(rewards, student.cfg.follow)[0].tolist()
        for sample, advantage in zip(group, advantages): sample.advantages = [advantage] * len(sample.ids)
    for batch in micro_batches(sum(groups, []), student.cfg.micro_tokens) if student.cfg.advantage == "gae" else []:
        with torch.no_grad():
            _, _, values, mask = score_samples(student, batch)
        advantages = gae(values, torch.tensor([s.reward for s in batch], device=values.device), mask, student.cfg.lam)
        for sample, a, v in zip(batch, advantages.tolist(), values.tolist()):
            sample.advantages, sample.values = a[:len(sample.ids)], v[:len(sample.ids)]


def value_loss(values, old_values, advantages, clip: float):
    """Squared error of the value head against GAE's returns, not better than what the clip allows; all (B, T)."""
    returns = old_values + advantages
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2


def set_weights(samples: list[Sample], cfg: Config):
    """What each token counts in one whole update, so that the gradient cannot depend on the micro-batches.

    code:   1 / (sequences · longest response allowed), on- and off-policy alike
    paper:  off-policy a mean over responses of their means, on-policy a mean over all tokens (AMPO Eq. 7)
    """
    off, on_tokens = sum(s.off_policy for s in samples), sum(len(s.ids) for s in samples if not s.off_policy)
    for s in samples:
        paper = off * len(s.ids) if s.off_policy else on_tokens
        s.weight = 1 / (len(samples) * cfg.max_new_tokens if cfg.follow == "code" else paper)


def micro_batches(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Longest first, as many samples together as keep rows · longest within `budget` tokens."""
    size, batches = lambda sample: len(sample.prompt) + len(sample.ids), []
    for sample in sorted(samples, key=size, reverse=True):
        if not batches or (len(batches[-1]) + 1) * size(batches[-1][0]) > budget: batches.append([])
        batches[-1].append(sample)
    return batches


def score_samples(student: Student, batch: list[Sample]):
    """score() of a micro-batch on the prompts it trains on."""
    critic = student.critic if student.cfg.advantage == "gae" else None
    return score(student.model, [s.prompt for s in batch], [s.ids for s in batch], student.cfg.temperature, critic)


def column(name: str, batch: list[Sample], device):
    """One per-token field of all samples as a padded tensor (B, T)."""
    return pad([getattr(sample, name) for sample in batch], device)[0]


@torch.no_grad()
def guided_gamma(student: Student, samples: list[Sample]) -> float:
    """Guide's γ: the 90th percentile of the guided tokens' ratio in this update, at least 1e-4. Over response tokens
    only: the official code forgets the mask and takes in the padding, whose ratio is 1."""
    ratios = []
    for batch in micro_batches([s for s in samples if s.off_policy], student.cfg.micro_tokens):
        logps, _, _, mask = score_samples(student, batch)
        ratios.append((logps - column("old_logps", batch, logps.device))[mask].exp())
    return max(1e-4, torch.cat(ratios).quantile(0.9).item()) if ratios else student.cfg.gamma


def update(student: Student, optimizer, samples: list[Sample]) -> dict:
    """One optimizer step on whole groups; returns its grad_norm and sums over all its micro-batches.

    Samples without advantage are dropped before they cost a forward pass; if none is left, nothing moves.
    """
    cfg, method, device = student.cfg, METHODS[student.cfg.method], student.model.device
    set_weights(samples, cfg)
    samples = [sample for sample in samples if any(sample.advantages)]
    gamma = guided_gamma(student, samples) if method.measured_gamma else cfg.gamma
    clip, entropy_coef = cfg.clip if method.clipped else math.inf, cfg.entropy_coef if method.rollouts else 0
    stats = {"grad_norm": 0.0, "tokens": 0, "clipped": 0, "gap": 0.0}
    for batch in micro_batches(samples, cfg.micro_tokens):
        logps, entropy, values, mask = score_samples(student, batch)  # (B, T)
        old_logps, advantages = column("old_logps", batch, device), column("advantages", batch, device)  # (B, T)
        off_policy = torch.tensor([s.off_policy for s in batch], device=device)  # (B,)
        weight = torch.tensor([s.weight for s in batch], device=device)[:, None] * mask
        objective = method.objective(logps, old_logps, advantages, off_policy, clip, gamma)
        loss = 0 if values is None else value_loss(values, column("values", batch, device), advantages, cfg.clip)
        (weight * (loss - objective - entropy_coef * entropy)).sum().backward()
        log_ratio = (logps.detach() - old_logps)[mask & ~off_policy[:, None]]
        stats["tokens"] += log_ratio.numel()
        stats["clipped"] += (log_ratio.exp() - 1).abs().gt(cfg.clip).sum().item()
        stats["gap"] += log_ratio.abs().sum().item()
    if samples:
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(student.model.parameters(), cfg.max_grad_norm).item()
        if math.isfinite(stats["grad_norm"]): optimizer.step()
        else: stats["grad_norm"] = tqdm.write("a gradient is not finite: this update is skipped")  # None
        optimizer.zero_grad()
    if student.sampler is not student.model:  # at lr 1e-6 bfloat16 weights would not move: they copy the masters
        for low, master in zip(student.sampler.parameters(), student.model.parameters()): low.data.copy_(master.data)
    return stats


def load_student(path: str, cfg: Config) -> Student:
    """A causal language model with its tokenizer, from a folder or the hub, on the best device there is."""
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds here
        raise InputError(f"{path}: no model can be loaded from it ({str(error).strip().splitlines()[0]})")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model = model.to(device).eval()  # eval: dropout would take the first ratio away from 1
    sampler = copy.deepcopy(model).bfloat16() if device == "cuda" else model
    stops = model.generation_config.eos_token_id
    stops = [tokenizer.eos_token_id] + (stops if isinstance(stops, list) else [stops])
    critic = torch.nn.Linear(model.config.hidden_size, 1).to(device)
    torch.nn.init.zeros_(critic.weight), torch.nn.init.zeros_(critic.bias)
    return Student(model, sampler, tokenizer, critic, [s for s in dict.fromkeys(stops) if s is not None], cfg)


def batch_indices(total: int, step: int, cfg: Config) -> list[int]:
    """The problems of one step out of an endless series of shuffled epochs. A function of the step alone: resuming can
    neither skip nor repeat one."""
    first, n = step * cfg.prompts_per_step, cfg.prompts_per_step
    epochs = range(first // total, (first + n - 1) // total + 1)
    shuffled = [torch.randperm(total, generator=torch.Generator().manual_seed(cfg.seed * 100003 + e)) for e in epochs]
    return torch.cat(shuffled)[first % total:first % total + n].tolist()


def train_step(student: Student, optimizer, problems: list[Problem], step: int) -> dict:
    """problems -> rollouts -> verdicts -> guidance -> advantages -> updates. Returns the step's metrics."""
    cfg, method, clock = student.cfg, METHODS[student.cfg.method], [time.perf_counter()]
    plain = rollout(student, problems, [p.question for p in problems]) if method.rollouts else [[] for _ in problems]
    clock.append(time.perf_counter())
    groups = method.guide(student, problems, plain) if step >= cfg.cold_start else plain
    clock.append(time.perf_counter())
    set_advantages(student, groups)
    size = math.ceil(len(groups) / cfg.updates)
    stats = [update(student, optimizer, sum(groups[i:i + size], [])) for i in range(0, len(groups), size)]
    clock.append(time.perf_counter())
    seconds = {name: b - a for name, a, b in zip(("rollout_s", "guide_s", "update_s"), clock, clock[1:])}
    return {"step": step} | measure(plain, groups, stats, sum(seconds.values())) | seconds


def measure(plain: list[list[Sample]], groups: list[list[Sample]], stats: list[dict], seconds: float) -> dict:
    """Metrics of a step. Reward, failures, entropy and length are those of the student's plain rollouts, so that curves
    compare across methods. The entropy is the mean of -log p over sampled tokens: unbiased, and free."""
    mean = lambda values: sum(values) / len(values) if values else None
    own, norms = sum(plain, []), [s["grad_norm"] for s in stats]
    sources = [s.source for group in groups for s in group if s.source not in ("student", "hint")]
    failed = [needs_guidance(group) for group in plain if group]
    return {
        "reward": mean([s.reward for s in own]), "fail_rate": mean(failed),
        "rescued": mean([f and not needs_guidance(group) for f, group in zip(failed, groups)]),
        "entropy": mean([-p for s in own for p in s.old_logps]), "response_length": mean([len(s.ids) for s in own]),
        "grad_norm": None if None in norms else mean(norms), "teachers": dict(Counter(sources)),
        "clip_fraction": sum(s["clipped"] for s in stats) / max(1, sum(s["tokens"] for s in stats)),
        "logp_gap": stats[0]["gap"] / max(1, stats[0]["tokens"]),  # sampler against trainer, before any update
        "tokens": sum(len(s.ids) for s in own), "tokens_per_s": round(sum(len(s.ids) for s in own) / seconds),
    }


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, given `correct` right ones among n: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", Eq. 1. Raises ValueError unless
    0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n): raise ValueError(f"no estimate for {n=}, {correct=}, {k=}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(student: Student, problems: list[Problem], samples: int, temperature: float):
    """-> ({"pass@1", "pass@2", "pass@4" ... "pass@samples", "n" problems, mean "length" in tokens}, the groups).

    Draws random numbers of its own, so that training goes on as if there had been no evaluation."""
    student = replace(student, cfg=replace(student.cfg, group_size=samples, temperature=temperature))
    size = max(1, 1024 // samples)  # problems at once: bounds the KV cache
    with torch.random.fork_rng():
        torch.manual_seed(student.cfg.seed)
        parts = (problems[i:i + size] for i in range(0, len(problems), size))
        groups = [group for part in parts for group in rollout(student, part, [p.question for p in part])]
    right = [sum(sample.correct for sample in group) for group in groups]
    ks = [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]
    scores = {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks}
    length = sum(len(sample.ids) for group in groups for sample in group) / (samples * len(groups))
    return scores | {"n": len(problems), "length": length}, groups


def report(student: Student, sets: dict[str, list[Problem]], out: Path):
    """Base against trained model on every evaluation set, and two rollouts each of the problem that gained most."""
    cfg, base, results, examples = student.cfg, load_student(student.cfg.model, student.cfg), {}, []
    ks = [f"pass@{k}" for k in sorted({1, min(8, cfg.samples), cfg.samples})]
    print(f"\n{'base -> trained, in %':22}" + "".join(f"{k:>18}" for k in ks))
    for name, problems in sets.items():
        scores, groups = zip(*(evaluate(who, problems, cfg.samples, cfg.eval_temperature) for who in (base, student)))
        results[name] = dict(zip(("base", "trained"), scores))
        print(f"{name:22}" + "".join(f"{100 * scores[0][k]:7.1f} -> {100 * scores[1][k]:5.1f}".rjust(18) for k in ks))
        examples += zip(problems, *groups)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    problem, *groups = max(examples, key=lambda row: sum(s.correct for s in row[2]) - sum(s.correct for s in row[1]))
    print(f"\nProblem: {problem.question}   (answer {problem.answer})")
    for name, sample in [(name, s) for name, group in zip(("base", "trained"), groups) for s in group[:2]]:
        print(f"--- {name}, {'right' if sample.correct else 'wrong'}:\n{sample.text.strip()}")
    chosen = sum((Counter(json.loads(line)["teachers"]) for line in open(out / "metrics.jsonl")), Counter())
    print("teachers chosen: " + (", ".join(f"{name} {times}" for name, times in chosen.most_common()) or "none"))


def save_checkpoint(student: Student, optimizer, step: int, out: Path):
    """model/ loads with from_pretrained, and holds run.json and state.pt to resume from. It is written under another
    name and then swapped in, so that a kill at any moment leaves one whole checkpoint: model/, or model.old/."""
    new, old, model = out / "model.new", out / "model.old", out / "model"
    shutil.rmtree(new, ignore_errors=True)
    student.model.save_pretrained(new)
    student.tokenizer.save_pretrained(new)
    torch.save({"optimizer": optimizer.state_dict(), "critic": student.critic.state_dict(),
                "rng": torch.get_rng_state()}, new / "state.pt")
    run = {"step": step, "metrics_bytes": (out / "metrics.jsonl").stat().st_size, "config": asdict(student.cfg)}
    (new / "run.json").write_text(json.dumps(run, indent=1))
    if model.exists():
        shutil.rmtree(old, ignore_errors=True)
        model.rename(old)
    new.rename(model)
    shutil.rmtree(old, ignore_errors=True)


def restore(student: Student, optimizer, checkpoint: Path, metrics_file: Path) -> int:
    """Put optimizer, value head and random numbers back as they were, and forget the metrics of later steps; returns
    the number of steps done."""
    run = json.loads((checkpoint / "run.json").read_text())
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    student.critic.load_state_dict(state["critic"])
    torch.set_rng_state(state["rng"])
    os.truncate(metrics_file, run["metrics_bytes"])
    return run["step"]


def open_run(cfg: Config, given: dict) -> tuple[Config, Path | None]:
    """Settle the run's folder and find the checkpoint to go on from. A new run's folder must be empty; --resume takes
    the flags the run began with, changed by those given now."""
    out = Path(cfg.out or f"runs/{cfg.method}-{cfg.seed}")
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    refuse(taken and not cfg.resume, f"--out {out}: is taken; --resume continues a run, another --out starts a new one")
    refuse(cfg.resume and not (out / "metrics.jsonl").exists(), f"--resume: {out} holds no run to continue")
    checkpoints = [out / name for name in ("model", "model.old") if cfg.resume and (out / name / "run.json").exists()]
    saved = json.loads((checkpoints[0] / "run.json").read_text())["config"] if checkpoints else asdict(cfg)
    return Config(**saved | given | {"out": str(out)}), checkpoints[0] if checkpoints else None


def load_inputs(cfg: Config):
    """-> training problems, validation problems, evaluation sets {name: problems}."""
    problems, beside, needs = load_problems(cfg.data), Path(cfg.data).parent, METHODS[cfg.method].needs
    refuse(needs and not any(getattr(problem, needs) for problem in problems),
           f"{cfg.data}: --method {cfg.method} needs the field '{needs}', and no line has it")
    names = {name for problem in problems for name in problem.teachers}
    refuse(not set(cfg.teachers.split(",")) <= names | {""}, f"--teachers {cfg.teachers}: known are {sorted(names)}")
    paths = cfg.eval_data.split(",") if cfg.eval_data else [*beside.glob("test.jsonl"), *sorted(beside.glob("ood_*"))]
    sets = {Path(path).stem: load_problems(path) for path in [*beside.glob("valid.jsonl"), *paths] if cfg.eval_every}
    return problems, sets.pop("valid", []), sets


def check_lengths(student: Student, problems: list[Problem]):
    """Refuse a question that leaves no room for a response in the model's context."""
    context = getattr(student.model.config, "max_position_embeddings", math.inf)
    for problem in problems:
        size = len(encode_prompt(student.tokenizer, problem.question)) + student.cfg.max_new_tokens
        refuse(size > context, f"{problem.where}: field 'question': {size} tokens with --max_new_tokens, not {context}")


def train(cfg: Config, checkpoint: Path | None = None) -> int:
    """The whole run: training steps, metrics.jsonl, checkpoints and the closing table. Returns the exit status."""
    problems, valid, sets = load_inputs(cfg)
    out, metrics_file = Path(cfg.out), Path(cfg.out) / "metrics.jsonl"
    student = load_student(str(checkpoint or cfg.model), cfg)
    check_lengths(student, sum(sets.values(), problems + valid))
    torch.manual_seed(cfg.seed)
    optimizer = torch.optim.AdamW([*student.model.parameters(), *student.critic.parameters()], cfg.lr, fused=True,
                                  weight_decay=cfg.weight_decay)
    out.mkdir(parents=True, exist_ok=True)
    metrics_file.open("a" if checkpoint else "w").close()
    done = restore(student, optimizer, checkpoint, metrics_file) if checkpoint else 0
    stop = []  # the first Ctrl-C lets the step finish, so that what is saved is whole; the second one ends at once
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, desc=cfg.method)
    for step in bar:
        metrics = train_step(student, optimizer, [problems[i] for i in batch_indices(len(problems), step, cfg)], step)
        if valid and (step + 1) % cfg.eval_every == 0:
            metrics["valid"] = evaluate(student, valid, cfg.group_size, cfg.eval_temperature)[0]["pass@1"]
        with open(metrics_file, "a") as file: file.write(json.dumps(metrics) + "\n")
        bar.set_postfix({name: metrics[name] for name in ("reward", "fail_rate", "rescued", "entropy", "tokens_per_s")})
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stop:
            save_checkpoint(student, optimizer, step + 1, out)
        if stop:
            tqdm.write(f"stopped after step {step + 1}; to continue: python ampo.py --resume --out {out}")
            return 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sets: report(student, sets, out)
    print(f"run: {out}   metrics: {metrics_file}   checkpoint: {out / 'model'}")
    return 0


def parse_config(argv: list[str]) -> tuple[Config, dict]:
    """Command line -> the Config and the flags that were given. Raises InputError for impossible ones."""
    parser = argparse.ArgumentParser(prog="ampo.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: refuse(True, message)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, help=f.metadata["help"], **kind)
    cfg = Config(**(given := vars(parser.parse_args(argv))))
    for f in fields(Config):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        refuse(least is not None and not value >= least, f"--{f.name} {value}: must be at least {least}")
    refuse(cfg.method not in METHODS, f"--method {cfg.method}: not one of {', '.join(METHODS)}")
    refuse(cfg.k > cfg.group_size, f"--k {cfg.k}: more than --group_size {cfg.group_size}")
    return cfg, given


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C.

    `ampo.py eval` scores --model on --data; the last line it prints is a JSON object."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] != ["eval"]:
            cfg, given = parse_config(argv)
            refuse(cfg.temperature == 0, "--temperature 0: all rollouts of a problem would be the same")
            return train(*open_run(cfg, given))
        cfg, _ = parse_config(["--data", "data/test.jsonl", "--temperature", str(Config.eval_temperature), *argv[1:]])
        problems, student = load_problems(cfg.data), load_student(cfg.model, cfg)
        check_lengths(student, problems)
        print(json.dumps(evaluate(student, problems, cfg.samples, cfg.temperature)[0]))
        return 0
    except (InputError, OSError) as error:
        print(f"ampo.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__": sys.exit(main())
