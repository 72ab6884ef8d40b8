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
    torchrun --nproc_per_node=2 ampo.py --model ...        # a process a GPU: they share the problems of a step

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

Left out, and where to find it: a KL penalty (off in the official runs) and dual clipping at 10 (rarely active), models
that need more than one device and a serving engine (verl, on which the official AMPO runs), LoRA (peft), sliding-window
and recurrent models (refused), judges other than the verifier, tool use and multi-turn chat.
"""
import argparse, copy, functools, json, math, os, random, re, shutil, signal, sys, time, traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import mpmath, torch, torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, DynamicLayer, logging

# =====================================================================================================================
# §1 Configuration


def flag(default, help, least=None, choices=None):
    """A field of Config that is also a command line flag: its help, its lower bound, its choices."""
    help = f"{help} [{default}]" if str(default) else help
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults train the embedded miniature in a few minutes on two CPU cores."""

    method: str = flag("ampo", "what to do where every rollout failed: grpo, ampo, luffy, guide, ghpo or sft")
    model: str = flag("data/base", "the student: a folder or hub name that transformers loads")
    system: str = flag("", "system prompt; default: the chat template's own")
    data: str = flag("data/train.jsonl", "problems to train on, or to evaluate; format in data/README.md")
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
    clip: float = flag(0.2, "ε of the clipped on-policy objective", 0)
    advantage: str = flag("group", "reward against the group's mean, or value head and GAE", choices=("group", "gae"))
    lam: float = flag(0.95, "λ of GAE", 0)
    gamma: float = flag(0.1, "γ of the off-policy shaping x/(x+γ); guide measures its own", 0)
    entropy_coef: float = flag(0.001, "weight of the entropy bonus", 0)
    follow: str = flag("code", "whom to follow where paper and official code disagree", choices=("code", "paper"))
    trigger: str = flag("fail", "ampo, guide: with none right, or under half (v2)", choices=("fail", "half", "always"))
    k: int = flag(2, "ampo: traces swapped into a failed group", 1)
    cold_start: int = flag(0, "first steps without any guidance (an option of GHPO)", 0)
    micro_tokens: int = flag(2048, "padded tokens of one training pass; a matter of memory, not of results", 1)
    cache_tokens: int = flag(40000, "tokens in the KV cache of one sampling pass; a matter of memory", 1)
    recompute: bool = flag(False, "gradient checkpointing: keep one activation a layer, compute the others again")
    eval_every: int = flag(100, "score valid.jsonl beside --data every so many steps; 0: no evaluation at all", 0)
    samples: int = flag(32, "samples a problem in evaluations", 1)
    save_every: int = flag(50, "steps between checkpoints", 1)


class InputError(ValueError):
    """Something the user gave cannot be used; the message names file, line and field, or the flag."""


def refuse(bad: bool, message: str):
    """Raise InputError where an input is bad."""
    if bad: raise InputError(message)


def attempt(message: str, call: callable, *args, **kwargs):
    """call(*args, **kwargs), where libraries raise errors of many kinds for one bad file or full disk."""
    try: return call(*args, **kwargs)
    except Exception as error: raise InputError(f"{message} ({(str(error).strip() or repr(error)).splitlines()[0]})")


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


def load_problems(path) -> list:
    """Read a JSONL file of Problems. Raises OSError, or InputError naming file, line and field."""
    lines = enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n"), 1)
    lines = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    # Written and read once more, as JSON can spell halves of characters that no tokenizer takes.
    decode = lambda line: json.loads(json.dumps(json.loads(line) | {}, ensure_ascii=False).encode())
    problems = [parse_problem(attempt(f"{where}: not a JSON object", decode, line), where) for where, line in lines]
    refuse(not problems, f"{path}: holds no problems")
    return problems


def parse_problem(row: dict, where: str) -> Problem:
    """One JSON object -> Problem. Numbers become text; fields that Problem does not have are ignored."""
    row = {f.name: row[f.name] for f in fields(Problem) if row.get(f.name) is not None} | {"where": where}
    row |= {name: str(value) for name, value in row.items() if type(value) in (int, float) and abs(value) < math.inf}
    for f in fields(Problem):
        value, kind = row.get(f.name, f.type()), "an object of texts" if f.type is dict else "text"
        good = isinstance(value, f.type) and {type(v) for v in (value.values() if f.type is dict else [])} <= {str}
        refuse(not good, f"{where}: field '{f.name}' must be {kind}")
    for name in ("question", "answer"): refuse(not row.get(name, "").strip(), f"{where}: field '{name}' is missing")
    # What the verifier cannot read is equal to nothing, not even to itself.
    refuse(not same_answer(gold := row["answer"], gold), f"{where}: field 'answer': cannot be verified: {gold!r}")
    return Problem(**row)


def encode_prompt(tokenizer, question: str, system: str = "") -> list[int]:
    """Token ids of a user message in the model's own chat template, up to where the assistant's turn begins."""
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
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
        left = _join(context, left, op := tokens.pop(), _parse(tokens, context, LEVEL[op] - (op == "^")))


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
    name = (token := tokens.pop()).strip('"\\')
    if token in ("(", "[", "{", "⦃", "⟦"):
        inner, kind = _parse(tokens, context), KINDS[token + tokens.pop()]
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


def _readings(answer, gold):
    """The two texts in the parser's alphabet, and where one has a unit that the other lacks, both without units."""
    texts = [_plain(answer), _plain(gold)]
    labels = [set(LABEL.findall(text)) for text in texts]
    if len(labels[0] | labels[1]) == 1 and (labels[0] == labels[1] or not all("=" in text for text in texts)):
        texts = [LABEL.sub("", text) for text in texts]
    bare = [UNIT.sub("", text) for text in texts]
    # The answer 35% to the gold answer 35 is fine, 0.5% to 0.5 is not.
    lenient = (texts[0] == bare[0]) != (texts[1] == bare[1]) and ("·0.01" not in texts[0] or texts[1].isdigit())
    return [texts, bare][:1 + lenient]


def same_answer(answer, gold):
    """Are two bare answers, such as 1/2 and \\frac12, equal?  Never raises: what cannot be read is equal to nothing.

    Policies: decimals are exact, so 0.333 is not 1/3.  The gold answer 35\\% takes 35 and 0.35.  A unit, or the x= of
    x=5, may be left out but not changed.  Bare lists and sets are unordered, tuples, intervals and matrices ordered.
    Words compare as strings, whatever their case.  A chain such as 5=6=5 is no number.
    """
    try:
        readings = _readings(answer, gold)
        if all(re.fullmatch(r"-?(?:\d+/\d+|\d*\.?\d+)", text) for text in readings[0]):
            return Fraction(readings[0][0]) == Fraction(readings[0][1])
        # The first precision weeds out, the second tells e^(pi sqrt 163) from the integer that it is so close to.
        return any(all(_evaluate(one, bits) == _evaluate(other, bits) for bits in (192, 320))
                   for one, other in readings)
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
    """One layer's keys and values in buffers with room for n whole responses to each prompt: a decoding step writes one
    slot where transformers' own cache copies everything. Some rows are in use, and of each the first `window` slots."""

    def __init__(self, layer, n: int, room: int, slot):
        super().__init__()
        self.slot, self.window = slot, layer.keys.shape[2]
        self.buffers = [x.new_empty(len(x) * n, x.shape[1], room, x.shape[3]) for x in (layer.keys, layer.values)]
        for buffer, x in zip(self.buffers, (layer.keys, layer.values)): buffer[:len(x), :, :self.window] = x

    def update(self, keys, values, *args, **kwargs):
        """Called by each attention layer: store the new keys and values (B, heads, 1, D), return all in the window."""
        self.keys[:, :, self.slot], self.values[:, :, self.slot] = keys, values
        return self.keys[:, :, :self.window], self.values[:, :, :self.window]

    def resize(self, rows, window: int):
        """Put copies of `rows` in the place of all rows, and open the window further. The memory stays where it is."""
        moves = not torch.equal(rows, torch.arange(len(rows), device=rows.device))
        for x in self.buffers:
            if moves: x[:len(rows), :, :self.window] = x[:, :, :self.window].index_select(0, rows)
            x[:len(rows), :, self.window:window] = 0  # masked until it is written, but 0 · nan would be nan
        self.keys, self.values, self.window = *(x[:len(rows)] for x in self.buffers), window


def replayed(step: callable, device) -> callable:
    """On CUDA, the kernels of step() recorded once into a graph: launching them one by one takes longer than a small
    model takes to compute. What step() reads and writes must stay where it is, and it must have been called before, as
    libraries set themselves up in a first call. Elsewhere this is step itself."""
    if device.type != "cuda": return step
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()): logits = step()
    return lambda: graph.replay() or logits


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


def prefill(model, prompts: list[list[int]], n: int, room: int):
    """Run every prompt through the model once.

    Returns logits (P, V) of the first response token, a cache of Slabs, the mask (P, 1, 1, room) that is added to the
    attention scores, prompt lengths (P,), and the slot (1,) where the next keys go: a tensor, as graphs need it.
    Raises InputError for a model whose cache is not plain keys and values."""
    ids, mask = pad(prompts, model.device, side="left")  # (P, L)
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                   past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    refuse({type(layer) for layer in cache.layers} != {DynamicLayer},
           f"a {model.config.model_type} model: sliding windows and recurrent layers cannot be sampled from")
    slot = torch.tensor([ids.shape[1]], device=model.device)
    cache = Cache(layers=[Slab(layer, n, room, slot) for layer in cache.layers])
    seen = torch.nn.functional.pad(mask, (0, room - ids.shape[1]))  # neither padding nor slots of tokens to come
    bias = torch.where(seen, 0.0, -math.inf).to(model.dtype)
    return logits, cache, bias[:, None, None], mask.sum(1), slot


@torch.inference_mode()
def generate(model, prompts, n, max_new_tokens, temperature=1.0, eos_token_id=None, span=None) -> list:
    """Sample n responses to every prompt.

    Rollouts that have said the same so far share a row of the batch: each prompt is read once, a row becomes several
    where its rollouts part, and what nobody reads any more leaves. This is exact, as each draws its own tokens.
    Returns for each prompt n pairs (ids, logps): ids keep their end-of-sequence token when they stopped by
    themselves, and logps (nats) belong to the distribution at `temperature` that the ids were drawn from.
    eos_token_id: an id, a list of ids, or None for no stopping. span: attention's window on the cache opens by so many
    slots at a time, and one CUDA graph serves for as long as neither it nor the rows change; 256 on CUDA, else 1.
    """
    if not prompts: return []
    device, stops = model.device, [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    stops, span = torch.tensor(stops, dtype=torch.long, device=device), span or (256 if device.type == "cuda" else 1)
    width, window = max(map(len, prompts)), 0
    logits, cache, mask, lengths, slot = prefill(model, prompts, n, span * math.ceil((width + max_new_tokens) / span))
    who = torch.arange(len(prompts) * n, device=device)  # the rollouts that are still running
    row, V = who // n, logits.shape[1]  # which row of the batch each of them reads
    all_ids = torch.zeros(len(who), max_new_tokens, dtype=torch.long, device=device)
    all_logps, ends = torch.zeros_like(all_ids, dtype=torch.float), torch.zeros_like(who)
    for t in range(max_new_tokens):
        tokens, logps = sample_tokens(logits[row], temperature)
        all_ids[who, t], all_logps[who, t], ends[who] = tokens, logps, t + 1
        going = ~torch.isin(tokens, stops)
        who, row, tokens = who[going], row[going], tokens[going]
        if len(who) == 0 or t == max_new_tokens - 1: break
        pasts, shared = torch.unique(row * V + tokens, return_inverse=True)
        # Rows are regrouped where rollouts part; where some only left, when that pays for moving the cache.
        regroup = len(pasts) > len(row.unique()) or len(pasts) < (0.85 if span == 1 else 0.5) * len(lengths)
        if regroup or width + t >= window:
            keep, row = (pasts // V, shared) if regroup else (torch.arange(len(lengths), device=device), row)
            window = span * (1 + (width + t) // span)
            for layer in cache.layers: layer.resize(keep, window)
            lengths, mask = lengths[keep], mask[keep]
            ids, positions = torch.zeros(2, len(lengths), 1, dtype=torch.long, device=device)
            args = dict(input_ids=ids, position_ids=positions, attention_mask=mask[..., :window], past_key_values=cache)
            step = forward = lambda: model(**args).logits[:, -1]
        elif step is forward: step = replayed(forward, device)  # not at once, as rows often part again
        mask[..., width + t], slot[:] = 0, width + t
        ids[row, 0], positions[:, 0] = tokens, lengths + t
        logits = step()
    pairs = [(ids[:end], logps[:end]) for ids, logps, end in zip(all_ids.tolist(), all_logps.tolist(), ends.tolist())]
    return [pairs[start:start + n] for start in range(0, len(pairs), n)]


def pad(sequences: list[list], device, side: str = "right"):
    """Lists of unequal length -> tensor (B, T) filled up with zeros, mask (B, T). The mask comes from the lengths:
    where padding and end-of-sequence share an id, a mask made from ids would lose the end."""
    fill = lambda rows: torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, padding_side=side)
    return fill(sequences).to(device), fill([[True] * len(sequence) for sequence in sequences]).to(device)


# =====================================================================================================================
# §5 Log-probabilities


def read_head(head, states, targets, temperature: float):
    """log p of each target and entropy of its distribution, both (N,) and in nats, from hidden states (N, H)."""
    log_p = (head(states).float() / temperature).log_softmax(-1)  # (N, V)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def score(model, prompts, responses, temperature: float = 1.0, critic=None):
    """One forward pass over prompt + response -> logps, mask, entropy, values, all (B, T), of the response's tokens.
    logps and entropy are in nats; all but the mask are 0 where it is False.

    values[b, t] is what critic, if any, says before token t; it only reads the states and does not train them.
    The logits of a real vocabulary would fill the memory: they exist for some tokens at a time, and the backward pass
    computes them again."""
    ids, _ = pad([p + r for p, r in zip(prompts, responses)], model.device)  # (B, L)
    targets, mask = pad(responses, ids.device)  # (B, T)
    # The state before a token predicts it: the response's places (B, L), moved left by one.
    places = pad([[False] * len(p) + [True] * len(r) for p, r in zip(prompts, responses)], ids.device)[0].roll(-1, 1)
    head, units = model.get_output_embeddings(), [m for m in model.modules() if getattr(m, "gradient_checkpointing", 0)]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        for unit in units: unit.training = True  # what --recompute looks at; the dropout inside stays off
        # Padding stands on the right, where causal attention never looks back at it: no attention mask is needed.
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[places]  # (response tokens, H)
        for unit in units: unit.training = False
        size = max(1, 2**26 // head.out_features)  # tokens at a time: 256 MB of logits
        chunks = zip(states.split(size), targets[mask].split(size))
        parts = [torch.utils.checkpoint.checkpoint(read_head, head, *chunk, temperature, use_reentrant=False)
                 for chunk in chunks]
    unflatten = lambda x: x.new_zeros(mask.shape).masked_scatter(mask, x)
    values = unflatten(critic(states.detach().float())[:, 0]) if critic else None
    logps, entropy = (unflatten(torch.cat(part)) for part in zip(*parts))
    return logps, mask, entropy, values


def token_logps(model, prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0):
    """log π(token | prompt, response so far) of every response token, in nats, differentiable.

    Returns logps (B, T) and mask (B, T), T the longest response; logps are 0 where the mask is False.
    `temperature` must be the one sampled at: another one scores another distribution.
    """
    return score(model, prompts, responses, temperature)[:2]


# =====================================================================================================================
# §6 The objective


def group_advantages(rewards, follow: str = "code"):
    """Advantage of each response over its group: rewards (P, G) -> (P, G).

    code:   A = R - mean(R), over the group after guidance changed it
    paper:  A = (R - mean(R)) / std(R)  (AMPO Eq. 6; unbiased std)
    A group of equal rewards gets exactly 0, not rounding noise divided by a tiny std.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]))
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "paper")
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if follow == "paper": advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    return advantages.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)


def gae(values, rewards, mask, lam: float = 0.95):
    """Generalised advantage estimation with γ = 1 and the reward at the last token (Schulman et al. 2016, Eq. 16).

    values (B, T), rewards (B,), mask (B, T) -> (B, T):  A_t = δ_t + λ·A_{t+1},  δ_t = r_t + V_{t+1} - V_t

    >>> gae(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([1.0]), torch.tensor([[True, True, False]]), lam=0.5)
    tensor([[0.2500, 0.5000, 0.0000]])
    """
    values = values * mask
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1  # (B, T)
    delta = rewards[:, None] * last + torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    advantages, later = torch.zeros_like(values), 0
    for t in reversed(range(mask.shape[1])): advantages[:, t] = later = delta[:, t] + lam * later
    return advantages


def policy_objective(logps, old_logps, advantages, off_policy, clip: float = 0.2, gamma=0.1):
    """The per-token objective that every method here maximises (AMPO Eq. 7, LUFFY Eq. 6).

    on-policy rows:   min(ratio·A, clip(ratio, 1-ε, 1+ε)·A)
    off-policy rows:  f(ratio)·A,  f(x) = x/(x+γ): tokens the student finds unlikely weigh most

    logps, old_logps (B, T); advantages (B,) or (B, T); off_policy (B,) bool -> (B, T), not masked, not averaged.
    A teacher's trace has old_logps = 0, so its ratio is the student's probability itself.
    AMPO's paper writes the clip around f as well: for A ≥ 0 it changes nothing, since f < 1 < 1 + ε.

    >>> p, old_p = torch.tensor([[0.2, 0.6], [0.9, 0.1]]), torch.tensor([[0.2, 0.2], [1.0, 1.0]])  # ratios 1, 3; .9, .1
    >>> policy_objective(p.log(), old_p.log(), torch.tensor([1.0, 1.0]), torch.tensor([False, True]))
    tensor([[1.0000, 1.2000],
            [0.9000, 0.5000]])
    """
    if advantages.dim() == 1: advantages = advantages[:, None]
    # exp(20) is far outside any clip, and keeps inf/inf = nan out of f.
    ratio = (logps - old_logps).clamp(max=20).exp()
    on = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    off = ratio / (ratio + gamma) * advantages
    return torch.where(off_policy[:, None], off, on)


# =====================================================================================================================
# §7 Guidance: what each method does with a failed group

# In the examples, `student` is data/base with G = 4, `problem` is "Solve 3*(4*x+2)-4=20." with traces of the teachers
# undo, work and secant, a hint and a solution, and `wrong` and `right` are two rollouts of it. Throughout, `problems` are
# Problems, a group is a list of Samples, and `groups` has one a problem.


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
    weights: list[float] = field(default_factory=list)  # one a token: 1 / normaliser of the whole update
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
    sampled: int = 0         # tokens sampled in this step, guidance included


def rollout(student, problems, messages: list[str]) -> list[list]:
    """G verified rollouts of each message, a group a problem; they train on the prompt they were sampled with.

    >>> (group,) = rollout(student, [problem], [problem.question])
    >>> len(group), group[0].prompt == encode_prompt(student.tokenizer, problem.question)
    (4, True)
    """
    cfg, groups = student.cfg, []
    prompts = [encode_prompt(student.tokenizer, message, cfg.system) for message in messages]
    size = max(1, cfg.cache_tokens // cfg.group_size // (max(map(len, prompts), default=0) + cfg.max_new_tokens))
    for i in range(0, len(prompts), size):
        groups += generate(student.sampler, prompts[i:i + size], cfg.group_size, cfg.max_new_tokens, cfg.temperature,
                           student.eos)
    student.sampled += sum(len(ids) for group in groups for ids, _ in group)
    return [[judge(student, p, prompt, *pair) for pair in group] for p, prompt, group in zip(problems, prompts, groups)]


def judge(student, problem, prompt: list[int], ids: list[int], logps: list[float]) -> Sample:
    """Verify one rollout. The reward is 0.9 for a right answer + 0.1 for giving one at all, as in official AMPO.

    >>> texts = ["8-2=6 \\\\boxed{6/4}", "8-2=6 \\\\boxed{6}", "8-2=6"]
    >>> [judge(student, problem, [7], student.tokenizer(text).input_ids, []).reward for text in texts]
    [1.0, 0.1, 0.0]
    """
    correct = verify(text := student.tokenizer.decode(ids, skip_special_tokens=True), problem.answer)
    return Sample(prompt, ids, logps, text, correct, 0.9 * correct + 0.1 * (extract_answer(text) is not None))


def needs_guidance(group, trigger: str = "fail") -> bool:
    """fail: no rollout is correct, the situation this file is about. half: fewer than half are (AMPO v2). always.

    >>> two, three = [wrong, wrong], [wrong, wrong, right]
    >>> needs_guidance(two), needs_guidance(three), needs_guidance(three, "half")
    (True, False, True)
    """
    return sum(sample.correct for sample in group) / len(group) < {"fail": 1e-9, "half": 0.5, "always": 2}[trigger]


def teacher_samples(student, problem) -> list[Sample]:
    """The problem's traces as samples, in the order of the file. π_φ is taken as 1, so old_logps = 0. Their reward is
    forced to 1 (AMPO v1; v2 verifies it). Traces longer than the student may write are left out.

    >>> [(s.source, len(s.ids), s.reward, s.old_logps[0]) for s in teacher_samples(student, problem)]
    [('undo', 41, 1.0, 0.0), ('work', 28, 1.0, 0.0), ('secant', 45, 1.0, 0.0)]
    """
    samples, prompt = [], encode_prompt(student.tokenizer, problem.question, student.cfg.system)
    for name, text in problem.teachers.items():
        ids = student.tokenizer(text, add_special_tokens=False).input_ids + student.eos[:1]
        right = student.cfg.trigger != "half" or verify(text, problem.answer)
        if text and len(ids) <= student.cfg.max_new_tokens:
            samples.append(Sample(prompt, ids, [0.0] * len(ids), text, right, float(right), name, off_policy=True))
    return samples


@torch.no_grad()
def comprehension(model, tokenizer, problem, traces: list[str], follow="code", system="") -> list[float]:
    """How well the student understands each trace: the probability r_p of the gold answer after it (AMPO Eq. 5).

    A trace is cut where its final answer starts, the gold answer is put there, and only its tokens are scored.
    code:   the arithmetic mean of the tokens' probabilities
    paper:  exp(mean log p), their geometric mean
    Returns a number in [0, 1] for each trace; a trace without an answer mark scores 0.

    >>> traces = [problem.teachers["undo"], problem.teachers["secant"], "20+4=24"]
    >>> [round(r, 1) for r in comprehension(student.model, student.tokenizer, problem, traces)]
    [1.0, 0.2, 0.0]
    """
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    prompt = encode_prompt(tokenizer, problem.question, system)
    cut = [(re.match(r".*(?:\\boxed\{|<answer>)", trace, re.DOTALL) or [""])[0] for trace in traces]
    ids = [encode(before + problem.answer) for before in cut]
    # A token may span mark and answer, as "{\" does: the answer begins with the first token that differs.
    starts = [len(os.path.commonprefix([encode(before), whole])) for before, whole in zip(cut, ids)]
    pairs = [(prompt + whole[:start], whole[start:]) for whole, start in zip(ids, starts)]
    logps, mask = token_logps(model, *zip(*pairs))
    mean = lambda x: (x * mask).sum(1) / mask.sum(1)
    scores = mean(logps).exp() if follow == "paper" else mean(logps.exp())
    return [score * bool(before) for score, before in zip(scores.tolist(), cut)]


def choose_traces(student, problem, k: int) -> list:
    """The k traces to learn from: those that the student comprehends best, ties to the shorter one (AMPO).

    >>> sorted(trace.source for trace in choose_traces(student, problem, 2))
    ['undo', 'work']
    """
    cfg, traces = student.cfg, teacher_samples(student, problem)
    texts = [trace.text for trace in traces]
    r = comprehension(student.sampler, student.tokenizer, problem, texts, cfg.follow, cfg.system) if texts else []
    # The official code ranks by 0.9·r_p + 0.1·format in bfloat16, whose coarse steps make ties.
    if cfg.follow == "code": r = (0.9 * torch.tensor(r) + 0.1).bfloat16().tolist()
    return [traces[i] for i in sorted(range(len(traces)), key=lambda i: (-r[i], len(traces[i].ids)))[:k]]


def swap_in(traces, group) -> list:
    """The group with traces in place of as many random incorrect rollouts (AMPO).

    >>> [s.source for s in swap_in(teacher_samples(student, problem)[:1], [right, wrong, right])]
    ['student', 'undo', 'student']
    """
    wrong, group = [i for i, sample in enumerate(group) if not sample.correct], list(group)
    for slot, trace in zip(torch.randperm(len(wrong)).tolist(), traces): group[wrong[slot]] = trace
    return group


def guide_grpo(student, problems, groups):
    """GRPO (Shao et al. 2024, arXiv 2402.03300): nothing. A failed group stays without signal.

    >>> guide_grpo(student, [problem], [[wrong] * 4]) == [[wrong] * 4]
    True
    """
    return groups


def guide_luffy(student, problems, groups):
    """LUFFY (arXiv 2504.14945): one teacher's trace takes slot 0 of every group, failed or not.

    >>> [s.source for s in guide_luffy(student, [problem], [[right] * 4])[0]]
    ['undo', 'student', 'student', 'student']
    """
    return [(trace := teacher_samples(student, p)[:1]) + group[len(trace):] for p, group in zip(problems, groups)]


def guide_ampo(student, problems, groups):
    """AMPO (arXiv 2510.02227): in a failed group the k traces that the student comprehends best replace k random
    failures. With the trigger of its second version they fill the group up to half.

    >>> failed, mixed = guide_ampo(student, [problem, problem], [[wrong] * 4, [wrong, right, wrong, wrong]])
    >>> sorted(s.source for s in failed), {s.source for s in mixed}
    (['student', 'student', 'undo', 'work'], {'student'})
    """
    for i, group in enumerate(groups):
        if needs_guidance(group, student.cfg.trigger):
            k = len(group) // 2 - sum(s.correct for s in group) if student.cfg.trigger == "half" else student.cfg.k
            groups[i] = swap_in(choose_traces(student, problems[i], k), group)
    return groups


def retry(student, problems, groups, message: callable, trigger: str = "fail") -> dict[int, list]:
    """Fresh rollouts of message(problem) for the groups that need guidance, by their index; without a message, none.

    >>> fresh = retry(student, [problem, problem], [[right, wrong], [wrong, wrong]], lambda p: p.hint)
    >>> [(i, len(group)) for i, group in fresh.items()]
    [(1, 4)]
    """
    todo = [i for i, group in enumerate(groups) if needs_guidance(group, trigger) and message(problems[i])]
    return dict(zip(todo, rollout(student, [problems[i] for i in todo], [message(problems[i]) for i in todo])))


def guide_guide(student, problems, groups):
    """Guide (arXiv 2506.13923): rollouts of a failed group's hinted message train the plain prompt. Their old_logps are
    the sampler's under the hint, so that their ratio is π(·|q) / π_old(·|q,hint). They replace the group (code) or join
    it (paper, by third-party accounts).

    >>> hinted = guide_guide(student, [problem], [[wrong] * 4])[0]
    >>> {(s.source, s.off_policy, s.prompt == wrong.prompt) for s in hinted}
    {('hint', True, True)}
    """
    for i, hinted in retry(student, problems, groups, lambda p: p.hint, student.cfg.trigger).items():
        hinted = [replace(s, prompt=groups[i][0].prompt, off_policy=True, source="hint") for s in hinted]
        groups[i] = hinted if student.cfg.follow == "code" else groups[i] + hinted
    return groups


LEAD = "\n The following text is the beginning part of the answer, which you can refer to for solving the problem:\n"


def guide_ghpo(student, problems, groups):
    """GHPO (arXiv 2507.10628): show more and more of the solution until a fresh group has a success, and train that
    group on the prompt it was sampled with. (The official code rebuilds the prompts of groups rescued earlier: a bug,
    not copied.)

    >>> rescued = guide_ghpo(student, [problem], [[wrong] * 4])[0]
    >>> {(s.source, s.off_policy, s.prompt == wrong.prompt) for s in rescued}, any(s.correct for s in rescued)
    ({('hint', False, False)}, True)
    """
    for omega in (0.25, 0.5, 0.75):
        begun = lambda p: p.solution and p.question + LEAD + p.solution[:round(len(p.solution) * omega)]
        for i, hinted in retry(student, problems, groups, begun).items():
            if not needs_guidance(hinted): groups[i] = [replace(s, source="hint") for s in hinted]
    return groups


def guide_sft(student, problems, groups):
    """SFT: no rollouts, all traces of all teachers.

    >>> [s.source for s in guide_sft(student, [problem], [[]])[0]]
    ['undo', 'work', 'secant']
    """
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
    "grpo": Method(guide_grpo), "ampo": Method(guide_ampo, "teachers"),
    "luffy": Method(guide_luffy, "teachers", clipped=False), "ghpo": Method(guide_ghpo, "solution"),
    "guide": Method(guide_guide, "hint", measured_gamma=True),
    "sft": Method(guide_sft, "teachers", rollouts=False, advantages=lambda rewards, follow: torch.ones_like(rewards),
                  objective=lambda logps, *_: logps)}


# =====================================================================================================================
# §8 The loop


def gather(value) -> list:
    """The value of every process under torchrun, in the order of ranks; alone, just this one's."""
    if not dist.is_initialized(): return [value]
    dist.all_gather_object(values := [None] * dist.get_world_size(), value)
    return values


@torch.no_grad()
def set_advantages(student: Student, groups: list[list[Sample]]):
    """One advantage a token: the response's over its group, or the value head's GAE."""
    cfg, method = student.cfg, METHODS[student.cfg.method]
    for group in filter(None, groups):
        advantages = method.advantages(torch.tensor([[sample.reward for sample in group]]), cfg.follow)[0].tolist()
        for sample, advantage in zip(group, advantages): sample.advantages = [advantage] * len(sample.ids)
    for batch in micro_batches(sum(groups, []), cfg.micro_tokens) if cfg.advantage == "gae" else []:
        _, mask, _, values = score_samples(student, batch)
        advantages = gae(values, torch.tensor([s.reward for s in batch], device=values.device), mask, cfg.lam)
        for s, a, v in zip(batch, advantages.tolist(), values.tolist()):
            s.advantages, s.values = a[:len(s.ids)], v[:len(s.ids)]


def value_loss(values, old_values, advantages, clip: float):
    """Half the squared error of the value head against GAE's returns, and no less than if the values had moved by at
    most `clip` (customary in PPO, though not in its paper); all (B, T)."""
    returns, clipped = old_values + advantages, old_values + (values - old_values).clamp(-clip, clip)
    return torch.max((values - returns) ** 2, (clipped - returns) ** 2) / 2


def set_weights(samples: list[Sample], cfg: Config):
    """What each token counts in one whole update, so that the gradient cannot depend on the micro-batches.

    code:   1 / (sequences · longest response allowed), on- and off-policy alike
    paper:  off-policy a mean over responses of their means, on-policy a mean over all tokens (AMPO Eq. 7)
    """
    own = len(samples), sum(s.off_policy for s in samples), sum(len(s.ids) for s in samples if not s.off_policy)
    count, off, on_tokens = map(sum, zip(*gather(own)))  # of all processes
    for s in samples:
        paper = off * len(s.ids) if s.off_policy else on_tokens
        s.weights = [1 / (count * cfg.max_new_tokens if cfg.follow == "code" else paper)] * len(s.ids)


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


def columns(student: Student, batch: list[Sample], names: str) -> list:
    """Per-token fields of all samples, each as a padded tensor (B, T)."""
    return [pad([getattr(sample, name) for sample in batch], student.model.device)[0] for name in names.split()]


@torch.no_grad()
def guided_gamma(student: Student, samples: list[Sample]) -> float:
    """γ of Guide (arXiv 2506.13923): the 90th percentile of the guided tokens' ratio in this update, at least 1e-4,
    over response tokens only: the official code forgets the mask and takes in the padding, whose ratio is 1."""
    ratios = [torch.zeros(0)]
    for batch in micro_batches([s for s in samples if s.off_policy], student.cfg.micro_tokens):
        logps, mask, _, _ = score_samples(student, batch)
        ratios.append((logps - columns(student, batch, "old_logps")[0])[mask].exp().cpu())
    ratios = torch.cat(gather(torch.cat(ratios)))
    return max(1e-4, ratios.quantile(0.9).item()) if len(ratios) else student.cfg.gamma


def update(student: Student, optimizer, samples: list[Sample]) -> dict:
    """One optimizer step on whole groups; returns its grad_norm and sums over all its micro-batches.

    Samples without advantage are dropped before they cost a forward pass; if none is left, nothing moves.
    """
    cfg, method, device = student.cfg, METHODS[student.cfg.method], student.model.device
    set_weights(samples, cfg)
    samples, parameters = [s for s in samples if any(s.advantages)], optimizer.param_groups[0]["params"]
    gamma = guided_gamma(student, samples) if method.measured_gamma else cfg.gamma
    clip, entropy_coef = cfg.clip if method.clipped else math.inf, cfg.entropy_coef if method.rollouts else 0
    stats = {"grad_norm": 0.0, "tokens": 0, "clipped": 0, "gap": 0.0}
    for batch in micro_batches(samples, cfg.micro_tokens):
        logps, mask, entropy, values = score_samples(student, batch)  # (B, T)
        old_logps, advantages, weights, old_values = columns(student, batch, "old_logps advantages weights values")
        off_policy = torch.tensor([s.off_policy for s in batch], device=device)  # (B,)
        objective = method.objective(logps, old_logps, advantages, off_policy, clip, gamma)
        loss = 0 if values is None else value_loss(values, old_values, advantages, cfg.clip)
        (weights * (loss - objective - entropy_coef * entropy)).sum().backward()
        log_ratio = (logps.detach() - old_logps)[mask & ~off_policy[:, None]]
        stats["tokens"] += log_ratio.numel()
        stats["clipped"] += (log_ratio.exp() - 1).abs().gt(cfg.clip).sum().item()
        stats["gap"] += log_ratio.abs().sum().item()
    if sum(gather(len(samples))):
        for p in parameters if dist.is_initialized() else []:  # all processes' gradients
            if p.grad is None: p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if math.isfinite(stats["grad_norm"]): optimizer.step()
        else: stats["grad_norm"] = tqdm.write("a gradient is not finite: this update is skipped")  # None
        optimizer.zero_grad()
    if student.sampler is not student.model:  # at lr 1e-6 bfloat16 weights would not move: they copy the masters
        for low, master in zip(student.sampler.parameters(), student.model.parameters()): low.data.copy_(master.data)
    return stats


def load_student(path: str, cfg: Config) -> Student:
    """A causal language model with its tokenizer, from a folder or the hub, on the best device there is."""
    logging.disable_progress_bar()
    tokenizer = attempt(f"{path}: no tokenizer in it", AutoTokenizer.from_pretrained, path)
    model = attempt(f"{path}: no model in it", AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    attempt(f"{path}: no chat template that works", encode_prompt, tokenizer, "1+1?", cfg.system)
    # A cache or an output head of another kind would be sampled or scored wrongly, so both are tried. The model stays
    # in eval mode, as it was loaded: dropout would take the first ratio away from 1.
    (ids, logps), = attempt(f"{path}: cannot sample from {model.config.model_type}", generate, model, [[0, 1]], 1, 4)[0]
    agree = torch.allclose(token_logps(model, [[0, 1]], [ids])[0], torch.tensor([logps]), atol=1e-3)
    refuse(not agree, f"{path}: generate and token_logps disagree about a {model.config.model_type} model")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # A copy, as the alignment of a mapped file would change the rounding of a run that is resumed.
    for weight in model.to(device).parameters(): weight.data = weight.data.clone()
    if cfg.recompute: model.activation_checkpointing_enable()
    sampler = copy.deepcopy(model).bfloat16() if device == "cuda" else model
    stops = [tokenizer.eos_token_id] + torch.tensor(model.generation_config.eos_token_id or []).reshape(-1).tolist()
    for weight in (critic := torch.nn.Linear(model.config.hidden_size, 1).to(device)).parameters(): weight.data.zero_()
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
    cfg, method, clock, student.sampled = student.cfg, METHODS[student.cfg.method], [time.perf_counter()], 0
    plain = rollout(student, problems, [p.question for p in problems]) if method.rollouts else [[] for _ in problems]
    clock.append(time.perf_counter())
    groups = method.guide(student, problems, list(plain)) if step >= cfg.cold_start else plain
    clock.append(time.perf_counter())
    set_advantages(student, groups)
    size = math.ceil(len(groups) / cfg.updates)
    stats = [update(student, optimizer, sum(groups[i:i + size], [])) for i in range(0, len(groups), size)]
    clock.append(time.perf_counter())
    seconds = {name: b - a for name, a, b in zip(("rollout_s", "guide_s", "update_s"), clock, clock[1:])}
    plain, groups, stats, tokens = (sum(parts, []) for parts in zip(*gather((plain, groups, stats, [student.sampled]))))
    return {"step": step} | measure(plain, groups, stats) | seconds | {
        "tokens": sum(tokens), "tokens_per_s": round(sum(tokens) / sum(seconds.values()))}


def measure(plain: list[list[Sample]], groups: list[list[Sample]], stats: list[dict]) -> dict:
    """Metrics of a step. Reward, failures, entropy and length are those of the student's plain rollouts, so that curves
    compare across methods. The entropy is the mean of -log p over sampled tokens: unbiased, and free."""
    mean = lambda values: sum(values) / len(values) if values else None
    own, norms = sum(plain, []), [s["grad_norm"] for s in stats]
    sources = [s.source for s in sum(groups, []) if s.source not in ("student", "hint")]
    failed = [needs_guidance(group) for group in plain if group]
    return {"reward": mean([s.reward for s in own]), "fail_rate": mean(failed),
            "rescued": mean([f and not needs_guidance(group) for f, group in zip(failed, groups)]),
            "entropy": mean([-p for s in own for p in s.old_logps]), "response_length": mean([len(s.ids) for s in own]),
            "grad_norm": None if None in norms else mean(norms), "teachers": dict(Counter(sources)),
            "clip_fraction": sum(s["clipped"] for s in stats) / max(1, sum(s["tokens"] for s in stats)),
            "logp_gap": stats[0]["gap"] / max(1, stats[0]["tokens"])}  # sampler against trainer, before any update


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, given `correct` right ones among n: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", Eq. 1. Raises ValueError unless
    0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n): raise ValueError(f"no estimate for {n=}, {correct=}, {k=}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(student: Student, problems: list[Problem], samples: int, temperature: float = 0.6):
    """-> ({"pass@1", "pass@2", "pass@4" ... "pass@samples", "n" problems, mean "length" in tokens}, the groups).

    Seeded by itself, as each training step is: it neither depends on when it comes nor changes what comes after."""
    student = replace(student, cfg=replace(student.cfg, group_size=samples, temperature=temperature))
    torch.manual_seed(student.cfg.seed)
    groups = rollout(student, problems, [problem.question for problem in problems])
    right = [sum(sample.correct for sample in group) for group in groups]
    ks = [2**i for i in range(samples.bit_length())] + [samples]
    scores = {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks}
    return scores | {"n": len(right), "length": sum(len(s.ids) for s in sum(groups, [])) / samples / len(right)}, groups


def report(student: Student, sets: dict[str, list[Problem]], out: Path):
    """Base against trained model on every evaluation set, and two rollouts each of the problem that gained most."""
    cfg, base, examples = student.cfg, load_student(student.cfg.model, student.cfg), []
    ks = [f"pass@{k}" for k in sorted({1, min(8, cfg.samples), cfg.samples})]
    print(f"\n{'base -> trained, in %':22}" + "".join(f"{k:>18}" for k in ks))
    for name, problems in sets.items():
        (was, before), (now, after) = (evaluate(who, problems, cfg.samples) for who in (base, student))
        print(f"{name:22}" + "".join(f"{100 * was[k]:7.1f} -> {100 * now[k]:5.1f}".rjust(18) for k in ks))
        examples += zip(problems, before, after)
    problem, before, after = max(examples, key=lambda e: sum(s.correct for s in e[2]) - sum(s.correct for s in e[1]))
    print(f"\nProblem: {problem.question}   (answer {problem.answer})")
    for name, sample in zip(("base", "base", "trained", "trained"), before[:2] + after[:2]):
        print(f"--- {name}, {'right' if sample.correct else 'wrong'}:\n{sample.text.strip()}")
    rows = map(json.loads, open(out / "metrics.jsonl"))
    print("teachers chosen:", dict(sum((Counter(row["teachers"]) for row in rows), Counter()).most_common()) or "none")


def save_checkpoint(student: Student, optimizer, step: int, out: Path):
    """model/ loads with from_pretrained, and holds run.json and state.pt to resume from. It is written under another
    name and then swapped in, so that a kill at any moment leaves one whole checkpoint: model/, or model.old/."""
    new, old, model, metrics = out / "model.new", out / "model.old", out / "model", out / "metrics.jsonl"
    shutil.rmtree(new, ignore_errors=True)
    for part in (student.model, student.tokenizer): part.save_pretrained(new)
    torch.save({"optimizer": optimizer.state_dict(), "critic": student.critic.state_dict(), "step": step,
                "metrics_bytes": metrics.stat().st_size}, new / "state.pt")
    (new / "run.json").write_text(json.dumps(asdict(student.cfg), indent=1))
    if model.exists(): shutil.rmtree(old, ignore_errors=True), model.rename(old)
    new.rename(model), shutil.rmtree(old, ignore_errors=True)


def restore(student: Student, optimizer, checkpoint: Path, metrics_file: Path) -> int:
    """Put optimizer and value head back as they were, and forget the metrics of later steps; returns the number of
    steps done. Random numbers need no saving: each step seeds its own. Raises what the libraries raise."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"]), student.critic.load_state_dict(state["critic"])
    return os.truncate(metrics_file, state["metrics_bytes"]) or state["step"]


def open_run(cfg: Config, given: dict) -> tuple[Config, Path | None]:
    """Settle the run's folder and find the checkpoint to go on from. A new run's folder must be empty; --resume takes
    the flags the run began with, changed by those given now."""
    out = Path(cfg.out or f"runs/{cfg.method}-{cfg.seed}")
    refuse(not cfg.resume and (out.is_file() or any(out.glob("*"))), f"--out {out}: is taken; --resume continues it")
    refuse(cfg.resume and not (out / "metrics.jsonl").exists(), f"--resume: {out} holds no run to continue")
    saved = [out / name for name in ("model", "model.old") if cfg.resume and (out / name).exists()]
    if saved: cfg = attempt(f"{saved[0]}: damaged", lambda: Config(**json.loads((saved[0] / "run.json").read_text())))
    return replace(cfg, **given | {"out": str(out)}), saved[0] if saved else None


def load_inputs(student: Student):
    """-> training problems, validation problems, evaluation sets {name: problems}."""
    cfg, beside, needs = student.cfg, Path(student.cfg.data).parent, METHODS[student.cfg.method].needs
    problems = load_checked(student, cfg.data)
    refuse(needs and not any(getattr(p, needs) for p in problems), f"{cfg.data}: no line has the field '{needs}'")
    paths = [*beside.glob("valid.jsonl"), *beside.glob("test.jsonl"), *sorted(beside.glob("ood_*"))]
    sets = {path.stem: load_checked(student, path) for path in paths if cfg.eval_every}
    return problems, sets.pop("valid", []), sets


def load_checked(student: Student, path) -> list[Problem]:
    """load_problems, which refuses a question that leaves no room for a response in the model's context."""
    cfg, context = student.cfg, getattr(student.model.config, "max_position_embeddings", math.inf)
    for p in (problems := load_problems(path)):
        size = len(encode_prompt(student.tokenizer, p.question, cfg.system)) + cfg.max_new_tokens
        refuse(size > context, f"{p.where}: field 'question': {size} tokens with --max_new_tokens, not {context}")
    return problems


def train(cfg: Config, checkpoint: Path | None = None) -> int:
    """The whole run: training steps, metrics.jsonl, checkpoints and the closing table. Returns the exit status."""
    out, metrics_file, ranks = Path(cfg.out), Path(cfg.out) / "metrics.jsonl", len(gather(0))
    rank = dist.get_rank() if ranks > 1 else 0  # the processes share a step's problems; the first one logs and saves
    refuse(cfg.prompts_per_step % ranks, f"--prompts_per_step {cfg.prompts_per_step}: no multiple of {ranks} processes")
    refuse(cfg.k > cfg.group_size, f"--k {cfg.k}: more than --group_size {cfg.group_size}")
    student = load_student(str(checkpoint or cfg.model), cfg)
    data, valid, sets = load_inputs(student)
    weights = [*student.model.parameters(), *student.critic.parameters()]
    opt = torch.optim.AdamW(weights, cfg.lr, weight_decay=0.1, fused=True)
    out.mkdir(parents=True, exist_ok=True), metrics_file.open("a" if checkpoint else "w").close()
    done = attempt(f"{checkpoint}: damaged", restore, student, opt, checkpoint, metrics_file) if checkpoint else 0
    stop = []  # the first Ctrl-C lets the step finish, so that what is saved is whole; the second one ends at once
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, desc=cfg.method, disable=rank > 0)
    for step in bar:
        torch.manual_seed(hash((cfg.seed, step, rank)))  # a function of the step alone: nothing to save for --resume
        metrics = train_step(student, opt, [data[i] for i in batch_indices(len(data), step, cfg)][rank::ranks], step)
        if valid and (step + 1) % cfg.eval_every == 0:
            metrics["valid"] = evaluate(student, valid, cfg.group_size)[0]["pass@1"]
        if rank > 0: continue
        with open(metrics_file, "a") as file: file.write(json.dumps(metrics) + "\n")
        bar.set_postfix({name: metrics[name] for name in ("reward", "fail_rate", "rescued", "entropy", "tokens_per_s")})
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stop:
            attempt(f"{out}: no checkpoint written", save_checkpoint, student, opt, step + 1, out)
        if stop: return tqdm.write(f"stopped after step {step + 1}; go on: python ampo.py --resume --out {out}") or 130
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sets and rank == 0: report(student, sets, out)
    if rank == 0: print(f"run: {out}   metrics: {metrics_file}   checkpoint: {out / 'model'}")
    return 0


def parse_config(argv: list[str]) -> tuple[Config, dict]:
    """Command line -> the Config and the flags that were given. Raises InputError for impossible ones."""
    parser = argparse.ArgumentParser(prog="ampo.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: refuse(True, message)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, help=f.metadata["help"], **kind)
    cfg = Config(**(given := vars(parser.parse_args(argv))))
    for name, least in [(f.name, f.metadata["least"]) for f in fields(Config) if f.metadata["least"] is not None]:
        refuse(not getattr(cfg, name) >= least, f"--{name} {getattr(cfg, name)}: must be at least {least}")
    refuse(cfg.method not in METHODS, f"--method {cfg.method}: not one of {', '.join(METHODS)}")
    return cfg, given


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for what cannot be used or does not fit, 130 after Ctrl-C.

    `ampo.py eval` scores --model on --data; the last line it prints is a JSON object."""
    argv = sys.argv[1:] if argv is None else argv
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    try:
        if argv[:1] != ["eval"]:
            cfg, given = parse_config(argv)
            refuse(cfg.temperature == 0, "--temperature 0: all rollouts of a problem would be the same")
            return train(*open_run(cfg, given))
        cfg, _ = parse_config(["--data", "data/test.jsonl", "--temperature", "0.6", *argv[1:]])
        problems = load_checked(student := load_student(cfg.model, cfg), cfg.data)
        return print(json.dumps(evaluate(student, problems, cfg.samples, cfg.temperature)[0])) or 0
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        phase = "cache" if ", in generate" in traceback.format_exc() else "micro"  # what was under way
        remedy = f"; lower --{phase}_tokens" * isinstance(error, torch.OutOfMemoryError)
        return print(f"ampo.py: {error}{remedy}", file=sys.stderr) or 2


if __name__ == "__main__": sys.exit(main())
