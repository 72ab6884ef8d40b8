"""Tests of ampo.py, which also grade another file of the same names: AMPO_MODULE=student.py pytest -k generate

A class a function, of its name; classes without an underscore are about several. The mathematics is compared with
independent oracles: plain loops over floats, full forward passes of transformers without cache or padding, enumeration.
The twelve mistakes often found in published code of this kind have a test each; their names begin with test_mistake.
"""
import ast
import copy
import doctest
import errno
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import string
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # a model name that does not exist is looked for on this machine only

import mpmath
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer, PreTrainedModel,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

HERE = Path(__file__).parent
BASE = str(HERE / "data" / "base")


def load_module(path):
    """The file under test, under the name that the tests' patches and child processes expect."""
    spec = importlib.util.spec_from_file_location("ampo", Path(path).resolve())
    sys.modules["ampo"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ampo = load_module(os.environ.get("AMPO_MODULE", HERE / "ampo.py"))


# ---------------------------------------------------------------------------------------------------------------------
# What a failure says: the case, what was expected and what came, but not the lines of the test


def same(got, wanted, tolerance):
    """Equal, floats within a relative tolerance or a millionth, lists and tuples item by item."""
    if isinstance(wanted, (list, tuple)):
        pairs = isinstance(got, (list, tuple)) and len(got) == len(wanted) and zip(got, wanted)
        return pairs is not False and all(same(one, other, tolerance) for one, other in pairs)
    if type(wanted) is float and isinstance(got, (int, float)):
        return got == wanted or math.isclose(got, wanted, rel_tol=tolerance, abs_tol=1e-6)
    return got == wanted


def expect(case, got, wanted, tolerance=1e-5):
    """Fail with the case, what was expected and what came. Tensors are compared as lists."""
    got, wanted = (x.tolist() if isinstance(x, torch.Tensor) else x for x in (got, wanted))
    if not same(got, wanted, tolerance):
        short = lambda m: f"{float(m[0]):.5g}"
        shown = [re.sub(r"-?\d+\.\d{5,}(e-?\d+)?", short, repr(x))[:600] for x in (wanted, got)]
        pytest.fail(f"{case}\n    expected {shown[0]}\n    got      {shown[1]}", pytrace=False)


# ---------------------------------------------------------------------------------------------------------------------
# A random model to compare with, a student around it, and rollouts that say what a test wants them to say


def random_model(vocab=60, scale=4.0, **settings):
    """A tiny Qwen2 with grouped-query attention and weights large enough for peaked, context-dependent predictions."""
    torch.manual_seed(1)
    settings = dict(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1,
                    pad_token_id=1) | settings
    model = Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def make_student(tokenizer):
    """A Student around a random model with the miniature's tokenizer."""
    def make(**flags):
        model = random_model(len(tokenizer), scale=1.0)
        critic = torch.nn.Linear(32, 1)
        torch.nn.init.zeros_(critic.weight), torch.nn.init.zeros_(critic.bias)
        cfg = ampo.Config(**{"group_size": 4, "max_new_tokens": 40} | flags)
        return ampo.Student(model, model, tokenizer, critic, [tokenizer.eos_token_id], cfg)
    return make


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """Replace generate: scripted(f) makes the i-th rollout of a prompt say f(prompt text, i), with log p = -0.5."""
    def install(says):
        def generate(model, prompts, n, max_new_tokens, temperature=1.0, eos_token_id=None):
            groups = []
            for prompt in prompts:
                texts = [says(tokenizer.decode(prompt), i) for i in range(n)]
                encoded = [tokenizer(t, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for t in texts]
                groups.append([(ids, [-0.5] * len(ids)) for ids in encoded])
            return groups
        monkeypatch.setattr(ampo, "generate", generate)
    return install


def full_logps(model, prompt, response, temperature=1.0):
    """Oracle: one sequence, no padding, no cache, the model's own forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
    start = len(prompt) - 1
    return [logits[start + t].log_softmax(-1)[token].item() for t, token in enumerate(response)]


def sample_of(ids, prompt=(2, 3), reward=1.0, correct=True, **more):
    more = {"old_logps": [-1.0] * len(ids), "text": ""} | more
    return ampo.Sample(list(prompt), list(ids), correct=correct, reward=reward, **more)


PROBLEM = dict(question="Solve 2*x=3.", answer="3/2", hint="Solve 2*x=3.\nHint: divide.", solution="abcdefghij",
               teachers={"one": "2*x=3\n\\boxed{3/2}", "two": "3/2\n\\boxed{3/2}", "three": "so \\boxed{3/2}"})
RIGHT, WRONG = "\\boxed{3/2}", "\\boxed{5}"


def problem(**changes):
    return ampo.Problem(**PROBLEM | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of other families, as they lie on a disk


LINES = [{"question": f"Solve {a}*x={b}.", "answer": f"{b}/{a}",
          "teachers": {"divide": f"{a}*x={b}\n\\boxed{{{b}/{a}}}", "short": f"\\boxed{{{b}/{a}}}"}}
         for a in (3, 7) for b in (5, 8)]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, bos_token_id=None)
# What is special about each family's checkpoint, as in published ones: heads, pad token, end tokens.
FAMILIES = {
    "qwen2": dict(tie_word_embeddings=True, pad="<|im_end|>"),
    "qwen3": dict(head_dim=16, tie_word_embeddings=False, pad="<|pad|>"),
    "llama": dict(tie_word_embeddings=False, pad=None, ends=["<|im_end|>", "<|pad|>"]),
    "gemma": dict(head_dim=8, num_key_value_heads=1, tie_word_embeddings=True, pad="<|pad|>", scale=12.0)}


def small_tokenizer(pad=None, template=TEMPLATE):
    """A byte-level BPE of some 300 tokens with a chat template that knows system messages."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"], show_progress=False)
    bpe.train_from_iterator([json.dumps(LINES), "system user assistant\n"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token=pad, chat_template=template)


def save_model(path, kind, pad=None, ends=None, scale=8.0, template=TEMPLATE, **settings):
    """A random checkpoint of a family in a folder; its weights give peaked, context-dependent predictions."""
    tokenizer = small_tokenizer(pad, template)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, vocab_size=len(tokenizer))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | ids | settings))
    for parameter in model.parameters():
        if parameter.dim() > 1: parameter.data *= scale
    if ends: model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    for part in (model, tokenizer): part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Folder of one family's checkpoint; the tests only read it."""
    return save_model(tmp_path_factory.mktemp("base") / request.param, request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a checkpoint where the family does not matter."""
    return save_model(tmp_path_factory.mktemp("any"), "qwen2", **FAMILIES["qwen2"])


def run_flags(path, tmp_path, *more):
    """A run of one step on LINES."""
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return ["--model", str(path), "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "run"), "--steps", "1",
            "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "32", "--eval_every", "0",
            "--lr", "1e-3", *more]


SMALL = ["--model", BASE, "--data", str(HERE / "data" / "train.jsonl"), "--prompts_per_step", "8", "--group_size", "4",
         "--max_new_tokens", "64", "--eval_every", "0", "--save_every", "2"]


def metrics_of(out):
    """metrics.jsonl without the clocks."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]  # and tokens_per_s


def weights_of(out):
    return AutoModelForCausalLM.from_pretrained(Path(out) / "model").state_dict()


@pytest.fixture(autouse=True)
def default_ctrl_c():
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def next_token(model, context, temperature=1.0):
    """Oracle: the probability of each token after a context."""
    with torch.no_grad():
        return (model(torch.tensor([context])).logits[0, -1].double() / temperature).softmax(-1)


def contradicts(seen, p):
    """Do counts of outcomes contradict their probabilities? Pearson's chi-square, at five standard deviations."""
    n = sum(seen.values())
    common = [outcome for outcome in p if n * p[outcome] >= 10]
    chi2 = sum((seen[outcome] - n * p[outcome]) ** 2 / (n * p[outcome]) for outcome in common)
    return len(common) < 4 or chi2 >= len(common) + 5 * math.sqrt(2 * len(common))


def expect_exact(model, prompts, groups, temperature=1.0):
    """The log-probabilities of each group's (ids, logps) are those of a forward pass without cache and padding."""
    for prompt, group in zip(prompts, groups):
        for ids, logps in group:
            expect(f"log-probabilities of the response {ids} to the prompt {prompt} at temperature {temperature}, "
                   "next to a forward pass without cache and padding",
                   logps, full_logps(model, prompt, ids, temperature), 2e-4)


def prompt_of(tokenizer, text, system=""):
    """Token ids of a user message, up to where the assistant's turn begins."""
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def with_start_token(tokenizer):
    """A tokenizer that begins every text with a token of its own, as those of Llama and Gemma do."""
    tokenizer, token = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, 2)])
    return tokenizer


def group_of(*rights, prompt=(2, 3)):
    """A group of rollouts, each right or wrong, and each with other tokens."""
    return [sample_of([5, 6 + i], prompt, 1.0 if right else 0.1, bool(right)) for i, right in enumerate(rights)]


def watched(model):
    """A list that grows with every pass of the model: (rows of its batch, whether gradients were recorded)."""
    passes = []
    def look(module, args, kwargs):
        passes.append((len(args[0] if args else kwargs["input_ids"]), torch.is_grad_enabled()))
    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    return passes


@pytest.fixture(scope="module")
def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def write_lines(path, rows=LINES):
    """A JSONL file; returns its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def adamw(student):
    return torch.optim.AdamW([*student.model.parameters(), *student.critic.parameters()], 1e-3)


def message_of(call, *args):
    """What the InputError of a call says; nothing where there is none."""
    try:
        call(*args)
    except ampo.InputError as error:
        return str(error)
    return ""


def same_state(one, other):
    """Are two state dicts the same, tensor by tensor?"""
    one, other = tree_leaves(one), tree_leaves(other)
    return len(one) == len(other) and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                                          for a, b in zip(one, other))


# ---------------------------------------------------------------------------------------------------------------------
# §1 Configuration


class Test_flag:
    def test_carries_default_help_bound_and_choices(self):
        field = ampo.flag(3, "so many", 1, (1, 3))
        expect("flag(3, 'so many', 1, (1, 3)): default and metadata", (field.default, dict(field.metadata)),
               (3, {"help": "so many [3]", "least": 1, "choices": (1, 3)}))

    def test_neither_bound_nor_choices_unless_given(self):
        metadata = ampo.flag("a", "a letter").metadata
        expect("least and choices of flag('a', 'a letter')", (metadata["least"], metadata["choices"]), (None, None))

    @pytest.mark.parametrize("default, shown", [(0, "what [0]"), (False, "what [False]"), (0.5, "what [0.5]"),
                                                ("", "what")])
    def test_help_shows_every_default_but_the_empty_text(self, default, shown):
        expect(f"help of flag({default!r}, 'what')", ampo.flag(default, "what").metadata["help"], shown)


class Test_refuse:
    @pytest.mark.parametrize("bad", [False, None, "", []])
    def test_lets_pass_what_is_not_bad(self, bad):
        expect(f"bad = {bad!r}", ampo.refuse(bad, "p.jsonl:2: no"), None)

    @pytest.mark.parametrize("bad", [True, "something"])
    def test_raises_the_message_where_it_is(self, bad):
        expect(f"bad = {bad!r}", message_of(ampo.refuse, bad, "p.jsonl:2: no"), "p.jsonl:2: no")


class Test_attempt:
    def call(self, error):
        def raises():
            raise error
        return message_of(ampo.attempt, "p.pt: damaged", raises)

    def test_returns_what_the_call_returns(self):
        got = ampo.attempt("no", lambda *args, **kwargs: (args, kwargs), 1, [2], key=3)
        expect("attempt('no', call, 1, [2], key=3)", got, ((1, [2]), {"key": 3}))

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyError("disk full"), RuntimeError("disk full"),
                                       ampo.InputError("disk full")], ids=lambda error: type(error).__name__)
    def test_every_error_becomes_an_input_error(self, error):
        expect(f"a call that raises {error!r}", self.call(error), f"p.pt: damaged ({error})")

    def test_only_the_first_line_of_an_error_is_told(self):
        error = ValueError("\n\n  why\nand a long story\n")
        expect(f"a call that raises {error!r}", self.call(error), "p.pt: damaged (why)")

    @pytest.mark.parametrize("error", [ValueError(), ValueError(" \n")], ids=["none", "blank"])
    def test_an_error_without_text_is_shown_by_its_type(self, error):
        expect(f"a call that raises {error!r}", self.call(error), f"p.pt: damaged ({error!r})")

    def test_ctrl_c_is_no_bad_input(self):
        def raises():
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            ampo.attempt("no", raises)


# ---------------------------------------------------------------------------------------------------------------------
# §2 Problems and prompts


class Test_load_problems:
    GOOD = '{"question": "q", "answer": "1"}'

    def write(self, tmp_path, *lines):
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    def test_reads_every_field_and_ignores_the_others(self, tmp_path):
        path = self.write(tmp_path, json.dumps(PROBLEM | {"level": 3}), "", json.dumps({"question": "q", "answer": 7}))
        first, second = ampo.load_problems(path)
        expect("a line with all fields and one more", {name: getattr(first, name) for name in PROBLEM}, PROBLEM)
        expect("a line with question and answer only",
               (second.question, second.answer, second.teachers, second.hint, second.solution), ("q", "7", {}, "", ""))

    def test_problems_know_their_lines(self, tmp_path):
        """Blank lines are no problems but count."""
        path = self.write(tmp_path, "", self.GOOD, " \t ", self.GOOD, "")
        places = [p.where for p in ampo.load_problems(path)]
        expect("problems in lines 2 and 4 of 5", places, [f"{path}:2", f"{path}:4"])

    @pytest.mark.parametrize("line, named", [
        ("{broken", "JSON"), ("[1, 2]", "JSON"), ('"text"', "JSON"), ("7", "JSON"), ("null", "JSON"),
        ('{"answer": "1"}', "question"), ('{"question": "q"}', "answer"), ('{"question": "q", "answer": 1e}', "JSON"),
        ('{"question": "q", "answer": "?"}', "answer"), ('[["question", "q"], ["answer", "1"]]', "JSON"),
        (r'{"question": "q\ud800", "answer": "1"}', "JSON"),
        (r'{"question": "q", "answer": "1", "hint": "\udfff"}', "JSON"),
    ])
    def test_bad_line_is_named(self, tmp_path, line, named):
        path = self.write(tmp_path, self.GOOD, line)
        message = message_of(ampo.load_problems, path)
        assert f"{path}:2" in message and named in message and "\n" not in message, (
            f"the message for line 2, {line}, names file, line and '{named}' in one line")

    def test_missing_empty_and_binary_files_are_named(self, tmp_path):
        (tmp_path / "empty").write_text("\n \n")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        for name in ("missing", "empty", "binary", "."):
            with pytest.raises((ampo.InputError, OSError), match=str(tmp_path)):
                ampo.load_problems(tmp_path / name)

    def test_a_line_separator_inside_a_text_does_not_split_the_line(self, tmp_path):
        path = self.write(tmp_path, json.dumps({"question": "a\u2028b", "answer": "1"}, ensure_ascii=False))
        expect("a question with U+2028 in it", ampo.load_problems(path)[0].question, "a\u2028b")

    def test_embedded_problems_are_complete(self):
        for p in ampo.load_problems(HERE / "data" / "train.jsonl")[:200]:
            assert p.hint.startswith(p.question) and p.solution and len(p.teachers) == 4, (
                f"{p.where} has a hint that begins with the question, a solution and four teachers")


class Test_parse_problem:
    ROW = {"question": "q", "answer": "1"}

    def test_fields_of_the_row_become_those_of_the_problem(self):
        row = PROBLEM | {"level": 3, "where": "elsewhere"}
        before = copy.deepcopy(row)
        expect("all fields; one that Problem does not have is ignored, and where is the one that was passed",
               ampo.parse_problem(row, "p.jsonl:5"), ampo.Problem(**PROBLEM, where="p.jsonl:5"))
        expect("the row itself afterwards", row, before)

    def test_fields_that_are_missing_or_null_are_empty(self):
        for row in (self.ROW, self.ROW | {"teachers": None, "hint": None, "solution": None}):
            expect(f"{row}", ampo.parse_problem(row, "f:1"), ampo.Problem("q", "1", {}, "", "", "f:1"))

    @pytest.mark.parametrize("number, text", [(7, "7"), (-2, "-2"), (0, "0"), (0.5, "0.5")])
    def test_numbers_become_text(self, number, text):
        p = ampo.parse_problem({"question": number, "answer": number}, "f:1")
        expect(f"question and answer {number!r}", (p.question, p.answer), (text, text))

    @pytest.mark.parametrize("change, field", [
        ({"question": None}, "question"), ({"question": "  "}, "question"), ({"question": ["q"]}, "question"),
        ({"answer": None}, "answer"), ({"answer": ""}, "answer"), ({"answer": "?"}, "answer"),
        ({"answer": ["1"]}, "answer"), ({"answer": True}, "answer"), ({"answer": math.nan}, "answer"),
        ({"answer": -math.inf}, "answer"), ({"hint": ["h"]}, "hint"),
        ({"solution": {"a": "b"}}, "solution"), ({"teachers": ["t"]}, "teachers"), ({"teachers": "t"}, "teachers"),
        ({"teachers": {"a": 1}}, "teachers"), ({"teachers": {"a": "t", "b": None}}, "teachers")], ids=str)
    def test_bad_field_is_named(self, change, field):
        message = message_of(ampo.parse_problem, self.ROW | change, "p.jsonl:5")
        assert message.startswith("p.jsonl:5") and f"'{field}'" in message and "\n" not in message, (
            f"the message for {change} begins with p.jsonl:5 and names '{field}', in one line")

    @pytest.mark.parametrize("change, wanted", [({"hint": ["h"]}, ["text"]), ({"teachers": ["t"]}, ["text", "object"])],
                             ids=str)
    def test_the_message_says_whether_a_text_or_an_object_of_texts_is_wanted(self, change, wanted):
        message = message_of(ampo.parse_problem, self.ROW | change, "f:1")
        expect(f"words in the message for {change}", [word for word in ("text", "object") if word in message], wanted)


class Test_encode_prompt:
    def test_is_the_chat_template_with_the_assistants_turn_begun(self, tokenizer):
        ids = ampo.encode_prompt(tokenizer, "Solve 2*x=3.")
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Solve 2*x=3."}], tokenize=False,
                                             add_generation_prompt=True)
        assert isinstance(ids, list) and all(isinstance(i, int) for i in ids), "the prompt is a list of token ids"
        expect("the prompt of 'Solve 2*x=3.' decoded", tokenizer.decode(ids), text)
        assert "Solve 2*x=3." in text

    def test_system_prompt_is_a_message_of_the_chat_template(self):
        tokenizer, end = small_tokenizer(), "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        expect("question 'Why?', system prompt 'Be short.'",
               tokenizer.decode(ampo.encode_prompt(tokenizer, "Why?", "Be short.")),
               f"<|im_start|>system\nBe short.<|im_end|>\n{end}")
        expect("question 'Why?', no system prompt", tokenizer.decode(ampo.encode_prompt(tokenizer, "Why?")), end)


# ---------------------------------------------------------------------------------------------------------------------
# §3 Answer verification: (gold, answer)


EQUAL = {
    "integers": [("58", "58.0"), ("58", "058"), ("58", "+58"), ("-58", "- 58"), ("91", "100-9"), ("0", "-0")],
    "thousands": [("73250", "73,250"), ("73,250", "73 250"), ("8{,}100{,}000", "8100000"),
        ("2,000, 3,000", "3000, 2000"), ("4\\,096", "2^{12}"), ("-6,300", "-6300")],
    "decimals and fractions": [("0.625", "\\frac58"), (".75", "3/4"), ("\\frac{4}{11}", "0.\\overline{36}"),
        ("\\frac{10}{4}", "5/2"), ("1.1\\overline{6}", "\\frac{7}{6}"), ("4.50", "4.5")],
    "shorthands": [("\\frac{4}{15}", "\\dfrac4{15}"), ("\\frac{4}{15}", "{4 \\over 15}"),
        ("\\frac{\\sqrt7}{3}", "\\frac{\\sqrt{7}}3"), ("\\frac{2}{1+\\frac{1}{3}}", "\\frac32"),
        ("\\frac{5x}{8}", "\\frac58x"), ("\\frac{m-n}{2}", "-(n-m)/2")],
    "mixed numbers": [("5\\frac{1}{6}", "\\frac{31}{6}"), ("-5\\frac16", "-31/6"), ("5 1/6", "31/6"), ("4½", "4.5")],
    "percent": [("18\\%", "18"), ("18\\%", "0.18"), ("18\\%", "\\frac{9}{50}"), ("18", "18\\%"),
        ("0.18", "18 percent"), ("0.4\\%", "0.4")],
    "pi": [("\\frac{7\\pi}{3}", "7π/3"), ("20\\pi", "\\pi \\cdot 20"), ("8-2\\pi", "2(4-\\pi)"),
        ("3/2\\pi", "\\frac{3\\pi}{2}")],
    "roots": [("4\\sqrt{6}", "\\sqrt{96}"), ("4\\sqrt6", "4*sqrt(6)"), ("\\sqrt{11+6\\sqrt2}", "3+\\sqrt2"),
        ("\\frac{6}{\\sqrt3}", "2√3"), ("\\sqrt[3]{250}", "5\\sqrt[3]{2}"), ("27^{2/3}", "9")],
    "powers": [("3^7", "2187"), ("2^{2^3}", "256"), ("-5^2", "-25"), ("x^{-3}", "\\frac{1}{x^3}"),
        ("9^{x}", "3^{2x}"), ("y²", "y**2"), ("6.4\\times10^{-5}", "0.000064"), ("7.1 \\cdot 10^4", "7.1e4")],
    "units": [("14\\text{ km}", "14"), ("14", "14 km"), ("14\\text{ km}", "14\\,\\mathrm{km}"),
        ("3\\ \\mathrm{m/s^2}", "3"), ("2 hours", "2\\text{ hour}"), ("24\\text{ cm}^3", "24"), ("50^\\circ", "50"),
        ("50°", "50\\text{ degrees}"), ("\\sqrt3", "\\tan 60^\\circ"), ("\\$8.40", "8.4"), ("\\$5,200", "5200"),
        ("9\\text{ dollars}", "\\$9")],
    "words": [("\\text{odd}", "Odd"), ("Saturday", "\\text{saturday}"), ("\\text{acute angle}", "acute angle"),
        ("\\text{DCAB}", "DCAB"), ("\\text{(A)}", "A"), ("E", "(E)"), ("\\text{Ann, Ben}", "Ben and Ann")],
    "tuples": [("(4,-9)", "\\left( 4,\\, -9 \\right)"), ("(\\frac14,2)", "(0.25, \\sqrt4)"), ("(a,b)=(2,3)", "(2,3)"),
        ("(1,5),(2,6)", "(2,6) and (1,5)")],
    "intervals": [("[3,8)", "[3, 8)"), ("(-\\infty,4]", "(-∞, 4]"),
        ("(-\\infty,0)\\cup(6,\\infty)", "(6,+\\infty)\\cup(-\\infty,0)"), ("x\\in(0,\\sqrt{12}]", "(0,2\\sqrt3]")],
    "sets and lists": [("\\{7,2\\}", "\\{2, 7\\}"), ("\\emptyset", "\\{\\}"), ("\\{\\pm3\\}", "\\{3,-3\\}"),
        ("4,-6", "-6 \\text{ or } 4"), ("2\\pm\\sqrt{3}", "2-\\sqrt3, 2+\\sqrt3"), ("x=4\\text{ or }x=-6", "4,-6"),
        ("\\{5\\}", "5")],
    "equations": [("x=12", "12"), ("12", "n = 12"), ("12", "5+7=12"), ("y=4x-1", "4x-y=1"), ("2x+6y=8", "x+3y-4=0"),
        ("f(x)=x^3", "x^3"), ("x=1, y=6", "y=6, x=1"), ("x^2+y^2=5", "-x^2=y^2-5"),
        ("\\sqrt2", "x=\\sqrt2\\approx 1.41")],
    "inequalities": [("x\\ge 6", "6≤x"), ("x<9", "9 > x"), ("-3<x\\le4", "4\\ge x>-3"), ("x\\ne2", "x≠2"),
        ("3x>12", "x>4"), ("x<1\\text{ or }x>5", "x>5\\text{ or }x<1")],
    "algebra": [("(x-4)(x+4)", "x^2-16"), ("\\frac{1}{a}-\\frac{1}{b}", "\\frac{b-a}{ab}"), ("\\binom{9}{4}", "126"),
        ("7!", "5040"), ("\\binom{n}{2}", "\\frac{n(n-1)}{2}"), ("\\log_3 81", "4"), ("\\log 1000", "3"),
        ("\\ln 15", "\\ln3+\\ln5"), ("|u-v|", "|v-u|"), ("a_1+a_{12}", "a_{12}+a_1"), ("\\lfloor 9.7\\rfloor", "9"),
        ("pq", "q\\times p")],
    "trigonometry": [("\\sin 2t", "2\\sin t\\cos t"), ("\\cos^2 t", "1-\\sin^2 t"),
        ("\\frac{\\pi}{6}", "\\sin^{-1}\\frac12"), ("\\sec^2 t-\\tan^2 t", "1"), ("\\arctan 1", "\\frac{\\pi}{4}"),
        ("0", "\\cos\\frac{\\pi}{2}")],
    "matrices": [
        ("\\begin{pmatrix}1&\\frac12\\\\0&3\\end{pmatrix}", "\\begin{bmatrix} 1 & 0.5 \\\\ 0 & 3 \\end{bmatrix}"),
        ("\\begin{pmatrix}6\\\\-7\\end{pmatrix}", "\\begin{pmatrix} 6 \\\\ -7 \\end{pmatrix}")],
    "complex numbers": [("3-8i", "-8i+3"), ("(1-i)^2", "-2i"), ("\\sqrt{-49}", "7i"), ("|8+15i|", "17"),
        ("e^{i\\pi}", "-1")],
    "noise": [("21", "$21$"), ("21", "\\[21\\]"), ("21", "**21**"), ("21", "21."), ("21", "\\text{21}"),
        ("21", "\\boxed{21}"), ("(x+1)^2", "\\left(x+1\\right)^{2}"), ("x+4", "x\\,+\\,4"), ("3\\cdot7", "21")],
    "huge numbers": [("6^{6^{6^6}}", "6^{6^{6^6}}"), ("900!", "900!"), ("2^{90}", "1237940039285380274899124224"),
        ("\\infty", "+\\infty"), ("1" + "0" * 200, "1" + "0" * 200 + ".0")],
}
DIFFERENT = {
    "numbers": [("58", "85"), ("58", "58.1"), ("-58", "58"), ("11", "1 1"), ("0.05", "0.5"), ("7", ".7"),
        ("73250", "73,25"), ("(6,300)", "6300"), ("3.141", "3,141"), ("\\frac{4}{15}", "\\frac{15}{4}"),
        ("\\frac{x+4}{2}", "x+\\frac42")],
    "mixed numbers": [("5\\frac16", "\\frac56"), ("5\\frac16", "5\\cdot\\frac16"), ("-5\\frac16", "-\\frac{29}{6}")],
    "rounding": [("\\frac13", "0.333333333333"), ("\\sqrt3", "1.7320508075688772"), ("\\pi", "\\frac{355}{113}"),
        ("e", "2.718281828459045"), ("0.000001", "0"), ("3000000", "3000001"),
        ("e^{\\pi\\sqrt{163}}", "262537412640768744"), ("x^2", "x^2+10^{-12}")],
    "percent": [("18\\%", "1.8"), ("18\\%", "0.18\\%"), ("0.4", "0.4\\%"), ("18\\%", "81\\%"),
        ("9\\%", "9\\text{ cm}")],
    "constants": [("20\\pi", "62.83"), ("20\\pi", "20"), ("4\\sqrt6", "6\\sqrt4"), ("\\sqrt[3]{5}", "3\\sqrt5"),
        ("\\sqrt{13}", "\\sqrt4+\\sqrt9"), ("2e", "2E"), ("6i", "6"), ("3-8i", "3+8i"), ("\\ln 7", "\\log 7"),
        ("\\log_2 9", "\\log_9 2")],
    "powers": [("2^{3^2}", "(2^3)^2"), ("(-3)^2", "-3^2"), ("x^{-3}", "-x^3"),
        ("6.4\\times10^{-5}", "6.4\\times10^{5}")],
    "units": [("14\\text{ km}", "14\\text{ m}"), ("3\\text{ hours}", "3\\text{ days}"), ("3\\text{ hours}", "180"),
        ("50^\\circ", "50\\text{ cm}"), ("3\\text{ hours}", "3\\text{ hours }10\\text{ minutes}"),
        ("\\$9", "9\\text{ cents}"), ("5", "5\\text{ million}"), ("\\text{Area}=12", "\\text{Area}=13\\text{ cm}")],
    "words": [("\\text{odd}", "\\text{even}"), ("\\text{teal}", "\\text{late}"), ("\\text{ABD}", "\\text{BAD}"),
        ("C", "(D)"), ("1", "\\text{yes}"), ("\\text{Ann}", "\\text{Ann and Ben}"), ("x", "X"),
        ("\\text{blue}", "\\text{not blue}")],
    "tuples and intervals": [("(4,-9)", "(-9,4)"), ("(4,-9)", "\\{4,-9\\}"), ("(4,-9)", "(4,-9,0)"),
        ("[3,8)", "(3,8]"), ("[3,8)", "[3,8]"), ("(2,\\infty)", "(2,-\\infty)"),
        ("(0,1)\\cup(2,3)", "(0,1)\\cap(2,3)"), ("(0,1)\\cup(2,3)", "(0,3)"), ("(4,-9)", "(4,-9"), ("[3,8)", "[3,8")],
    "sets and lists": [("\\{7,2\\}", "\\{7\\}"), ("\\emptyset", "\\{0\\}"), ("4,-6", "4"), ("4", "4,-6"),
        ("4", "4 \\text{ or } 5"), ("\\pm 4", "4"), ("2\\pm\\sqrt3", "2+\\sqrt3"), ("1,1,2", "1,2,2"), ("2,3", "23"),
        ("2,3", "6")],
    "equations": [("x=12", "y=12"), ("x=12", "21"), ("y=4x-1", "y=4x+1"), ("y=4x-1", "x=4y-1"), ("12", "5+8=12"),
        ("x+y=3", "3"), ("x=1, y=6", "x=6, y=1"), ("x=1, y=6", "6, 1"), ("x^2=9", "x=3"), ("x=5", "x\\ne5"),
        ("x\\approx 3", "x\\approx 4"), ("3", "x\\approx 3.1")],
    "inequalities": [("x\\ge6", "x>6"), ("x\\ge6", "x\\le6"), ("-3<x\\le4", "-3\\le x<4"),
        ("x<1\\text{ or }x>5", "5<x<1"), ("1<x<5", "x>1\\text{ or }x<5"), ("x<9", "9"), ("x<9", "y<9")],
    "algebra": [("x-y", "y-x"), ("2(x+3)", "2x+3"), ("\\sqrt{x^2}", "x"), ("|x|", "-x"), ("ab", "a+b"),
        ("a_1", "a_2"), ("7!", "7"), ("\\binom{9}{4}", "\\binom94+1"), ("\\sin x\\cos^2x", "\\sin(x\\cos^2x)"),
        ("\\sin^2x", "\\sin x^2"), ("2", "2ab"), ("4:5", "5:4"), ("1:2:3", "1:3:2"), ("110_2", "110_3")],
    "matrices": [("\\begin{pmatrix}6\\\\-7\\end{pmatrix}", "\\begin{pmatrix}6&-7\\end{pmatrix}"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "-2"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}")],
    "no answers": [("4", ""), ("4", "?"), ("0", "{}"), ("4", "()"), ("4", "4 4"), ("4", "4)"), ("4", "4="),
        ("1", "\\frac10"), ("0", "0/0"), ("4", "\\")],
    "huge numbers": [("6^{6^{6^6}}", "6^{6^{6^6}}+1"), ("2^{1000}", "2^{1000}-1"), ("900!", "901!"),
        ("\\infty", "-\\infty"), ("9", "\\infty"), ("1" + "0" * 200, "1" + "0" * 199 + "1")],
}


def cases(table):
    return [pytest.param(gold, answer, id=f"{name}: {gold[:40]} / {answer[:40]}")
            for name in table for gold, answer in table[name]]


ATTACKS = [
    '__import__("os").system("touch PWNED")', 'open("PWNED","w")', 'exec("open(\'PWNED\',\'w\')")',
    'eval("open(\'PWNED\',\'w\')")', 'lambdify([],"open(\'PWNED\',\'w\')")()', "x.__class__.__mro__", "().__class__",
    "getattr(x,'y')", "breakpoint()", "exit()", "{x.__init__}", "8**8**8**8", "8^{8^{8^8}}", "10^{10^{100}}",
    "2^{-2^{99}}", "(10^9)!", "((9!)!)!", "\\binom{10^9}{10^8}", "e^{e^{e^{e^9}}}", "0^{-1}", "\\tan\\frac{\\pi}{2}",
    "\\ln 0", "1" * 5000, "1+" * 5000 + "1", "1," * 5000 + "1", "(" * 3000 + "1" + ")" * 3000,
    "(" * 59 + "1" + ")" * 59, "\\sqrt{" * 500 + "2" + "}" * 500, "-" * 399 + "1", "x^" * 150 + "x", "1/" * 150 + "1",
    "x!+" * 120 + "x", "(x!)!+" * 60 + "1", "x^{99999.5}+" * 30 + "1", "\\{" * 50 + "1" + "\\}" * 50, "|" * 399,
    "±1" * 190, "\\frac" * 70, "\\over" * 70, "\x00", "\ud800", "\u202e5", "\\boxed{" + "{" * 20000,
    "\\boxed{" * 20000, "<answer>" * 20000, "\\text{" * 50, "\"" * 399, "#" * 399, "٣", "𝟗^𝟗", "nan", "inf",
    "1e999999999",
]


def timed(check, *texts):
    """The verdict of check(*texts), which is a bool that comes at once."""
    start = time.perf_counter()
    result = check(*texts)
    assert time.perf_counter() - start < 0.5, f"{str(texts)[:200]} takes longer than half a second"
    assert type(result) is bool, f"{str(texts)[:200]} gives {result!r}, not True or False"
    return result


def withstands(check, attack):
    """An attack as answer and as gold answer: check gives a verdict at once, and none that the attack is right."""
    others = "5", attack, attack + " ", "x+\\sqrt2"
    for answer, gold in [(attack, other) for other in others] + [(other, attack) for other in others]:
        assert not (timed(check, answer, gold) and gold == "5"), f"{answer[:50]!r} is not 5"


def garbled():
    """2000 pairs (answer, gold): random bytes, random pieces of LaTeX, known answers with a piece exchanged."""
    rng = random.Random(0)
    pieces = ("\\frac { } ( ) [ ] ^ _ \\sqrt \\sin \\ln 1 2 7 x y + - * / = < , \\pm \\pi \\infty ! | % \\{ \\} & "
              "\\\\ . or \\text{ \\begin{pmatrix} \\end{pmatrix} \\cup \\le ° ² ½ \\binom \\log_ : ' \" $ "
              "\\overline ∞ ∧ · ⟦ ⦄").split() + [" ", "\n"]
    known = [text for table in (EQUAL, DIFFERENT) for pairs in table.values() for pair in pairs for text in pair]
    for _ in range(2000):
        shape, gold = rng.randrange(3), rng.choice(known)
        if shape == 0:
            answer = bytes(rng.randrange(256) for _ in range(rng.randrange(60))).decode("latin-1")
        elif shape == 1:
            answer = "".join(rng.choices(pieces, k=rng.randrange(1, 40)))
        else:
            cut = rng.randrange(len(gold) + 1)
            answer = gold[:cut] + rng.choice(pieces) + gold[cut + rng.randrange(3):]
        yield answer, gold


class Test_same_answer:
    def equal(self, case, *pairs):
        for answer, gold in pairs:
            expect(f"{case}: is {answer!r} equal to the gold answer {gold!r}?", ampo.same_answer(answer, gold), True)

    def different(self, case, *pairs):
        for answer, gold in pairs:
            expect(f"{case}: is {answer!r} equal to the gold answer {gold!r}?", ampo.same_answer(answer, gold), False)

    @pytest.mark.parametrize("gold, answer", cases(EQUAL))
    def test_equal(self, gold, answer):
        self.equal("two spellings of one answer", (answer, gold), (gold, gold))

    @pytest.mark.parametrize("gold, answer", cases(DIFFERENT))
    def test_different(self, gold, answer):
        self.different("two answers", (answer, gold))

    def test_decimals_are_exact(self):
        self.different("decimals", ("0.333", "\\frac13"))
        self.equal("decimals", ("0.250", "\\frac14"))

    def test_percent_gold_takes_both_readings(self):
        self.equal("percent", ("35", "35\\%"), ("0.35", "35\\%"))
        self.different("percent", ("0.5\\%", "0.5"))

    def test_units_may_be_left_out_but_not_changed(self):
        self.equal("units", ("6", "6\\text{ m}"), ("6\\text{ m}", "6"))
        self.different("units", ("6\\text{ cm}", "6\\text{ m}"))

    def test_tuples_are_ordered_and_sets_are_not(self):
        self.different("tuples", ("(2,1)", "(1,2)"))
        self.equal("sets", ("\\{2,1\\}", "\\{1,2\\}"))

    def test_order_does_not_matter_in_lists_of_three_either(self):
        self.equal("three items", ("3,1,2", "1,2,3"), ("\\{3,1,2\\}", "\\{1,2,3\\}"), ("5,1,3", "3,5,1"),
                   ("(4,5)\\cup(0,1)\\cup(2,3)", "(0,1)\\cup(2,3)\\cup(4,5)"))
        self.different("three items", ("(3,1,2)", "(1,2,3)"), ("1,2,2", "1,2,3"))

    def test_a_chain_that_does_not_hold_is_false(self):
        self.different("chains", ("5=6=5", "5"), ("x=5=6", "5"), ("5=6", "6"))

    def test_words_compare_as_strings(self):
        self.different("words", ("\\text{tea}", "\\text{eat}"))
        self.equal("words", ("Tea", "\\text{tea}"))

    def test_both_signs_are_probed(self):
        self.different("x may be negative", ("x", "\\sqrt{x^2}"), ("-x", "\\sqrt{x^2}"))
        self.equal("x may be negative", ("|x|", "\\sqrt{x^2}"))
        for letter in sorted(set(string.ascii_letters) - {"e", "i"}):
            self.different("every letter but e and i may be negative and positive", (letter, f"|{letter}|"),
                           (f"-{letter}", f"|{letter}|"))

    def test_near_integers_need_the_second_precision(self):
        self.different("they differ from digit 31 on", ("\\frac{\\ln(640320^3+744)}{\\sqrt{163}}", "\\pi"))

    def test_an_expression_that_vanishes_is_zero(self):
        self.equal("zero", ("\\sqrt{5+2\\sqrt6}-\\sqrt2-\\sqrt3", "0"), ("\\sin\\pi", "0"))

    @pytest.mark.parametrize("gold", [
        "\\text{yes}", "B", "\\frac{1}{2}", "(1,2)", "x>3", "10^{10^{10}}", "a_n=2n+1", "\\emptyset",
    ])
    def test_a_readable_answer_equals_itself(self, gold):
        self.equal("itself", (gold, gold))

    @pytest.mark.parametrize("gold", [
        "", " ", "?", "{}", "()", "\\frac{1}{0}", "0/0", "$$", "\\", "(1,2", "x" * 2000, None, 7,
    ])
    def test_an_unreadable_answer_equals_nothing(self, gold):
        self.different("not even itself", (gold, gold))

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: ascii(attack[:30]))
    def test_mistake_12_attacks_neither_run_nor_raise_nor_hang(self, attack, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        withstands(ampo.same_answer, attack)
        assert os.listdir(tmp_path) == [], "the attack wrote a file"

    def test_works_in_threads(self):
        wrong, pairs = [], [pair for pairs in EQUAL.values() for pair in pairs]
        def work():
            wrong.extend(pair for pair in pairs if not ampo.same_answer(pair[1], pair[0]))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expect("(gold, answer) that are equal but not found so in four threads at once", wrong, [])

    def test_leaves_global_state_alone(self):
        random.seed(3)
        state, bits = random.getstate(), mpmath.mp.prec
        ampo.same_answer("\\sin(x)+\\binom{n}{2}", "\\sqrt[3]{y}")
        assert random.getstate() == state and mpmath.mp.prec == bits, (
            "the state of random and the precision of mpmath.mp stay as they were")

    def test_fuzz(self):
        for answer, gold in garbled():
            timed(ampo.same_answer, answer, gold), timed(ampo.same_answer, gold, answer)


class Test_extract_answer:
    @pytest.mark.parametrize("response, answer", [
        ("So \\boxed{31}.", "31"),
        ("\\boxed{\\frac{3}{\\sqrt{5}}} as claimed", "\\frac{3}{\\sqrt{5}}"),
        ("\\boxed{\\{2,3\\}}", "\\{2,3\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed {31}", "31"),
        ("\\boxed 31", "31"),
        ("\\fbox{31}", "31"),
        ("\\boxed{31}}}", "31"),
        ("\\boxed{}", ""),
        ("<answer>31</answer>", "31"),
        ("<answer>\n31\n</answer>", "\n31\n"),
        ("31", None),
        ("", None),
        ("boxed{31}", None),
        ("<answer>31", None),
        ("\\boxed", None),
    ])
    def test_reads_the_mark(self, response, answer):
        expect(f"the answer in {response!r}", ampo.extract_answer(response), answer)

    @pytest.mark.parametrize("response", [
        "\\boxed{3} no, \\boxed{4}", "<answer>3</answer> \\boxed{4}", "\\boxed{3} <answer>4</answer>",
        "<answer>3</answer><answer>4</answer>", "\\boxed{3, \\boxed{4}}", "\\fbox{3} \\boxed{4}",
        "\\boxed{3} \\fbox{4}",
    ])
    def test_the_last_mark_wins(self, response):
        expect(f"the answer in {response!r}", ampo.extract_answer(response), "4")

    @pytest.mark.parametrize("response", [
        "\\boxed{4", "\\boxed{3} so \\boxed{4", "\\boxed{\\frac{1}{2}", "\\boxed{4} and <answer>4",
    ])
    def test_a_truncated_mark_is_no_answer(self, response):
        expect(f"the answer in {response!r}", ampo.extract_answer(response), None)


class Test_verify:
    @pytest.mark.parametrize("response, gold, right", [
        ("We find $\\boxed{x = \\frac{9}{4}}$.", "2.25", True),
        ("\\boxed{8} or rather \\boxed{9}", "8", False),
        ("<answer>$9$</answer>", "9", True),
        ("The answer is 9.", "9", False),
        ("\\boxed{9", "9", False),
        ("\\boxed{}", "9", False),
        ("\\boxed{\\text{I do not know}}", "9", False),
        ("\\boxed{9 \\text{ or } 8}", "9", False),
    ])
    def test_whole_responses(self, response, gold, right):
        result = ampo.verify(response, gold)
        assert result is right, f"the response {response!r} to the gold answer {gold!r} is {right}, not {result!r}"

    @pytest.mark.parametrize("response, gold", [
        (None, "1"), (1, "1"), ("\\boxed{1}", None), ("\\boxed{1}", 1), (b"\\boxed{1}", "1"), ([], {}),
    ])
    def test_input_that_is_no_string(self, response, gold):
        result = ampo.verify(response, gold)
        assert result is False, f"the response {response!r} to the gold answer {gold!r} is False, not {result!r}"

    def test_embedded_traces_and_solutions_are_right(self):
        for line in (HERE / "data" / "train.jsonl").read_text().splitlines()[:200]:
            row = json.loads(line)
            for text in [*row["teachers"].values(), row["solution"]]:
                expect(f"{text!r} for the gold answer {row['answer']}", ampo.verify(text, row["answer"]), True)

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: ascii(attack[:30]))
    def test_mistake_12_attacks_neither_run_nor_raise_nor_hang(self, attack, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        withstands(lambda answer, gold: ampo.verify("\\boxed{" + answer + "}", gold), attack)
        assert os.listdir(tmp_path) == [], "the attack wrote a file"

    def test_fuzz(self):
        for answer, gold in garbled():
            timed(ampo.verify, "\\boxed{" + answer, gold)


# ---------------------------------------------------------------------------------------------------------------------
# §4 Sampling, and what a CUDA graph does, without CUDA


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on any device: operations recorded on the very tensors they saw, Python left out."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read a number back"
        out = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr(): old.copy_(new)


def fill_new_memory(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **more: new_empty(x, *size, **more).fill_(math.nan))


class Test_Slab:
    def slab(self, n=3, room=8):
        """Two prompts of 5 tokens, 3 heads of size 4, where the next keys go into slot 5."""
        layer, rng = DynamicLayer(), torch.Generator().manual_seed(0)
        keys, values = torch.randn(2, 2, 3, 5, 4, generator=rng)
        layer.update(keys, values)
        return ampo.Slab(layer, n, room, torch.tensor([5])), keys, values

    def test_begins_with_the_prompts_in_room_for_all_responses(self):
        slab, *prompts = self.slab()
        assert isinstance(slab, DynamicLayer) and slab.window == 5, "a cache layer that shows the slots of the prompts"
        for name, buffer, prompt in zip(("keys", "values"), slab.buffers, prompts):
            expect(f"shape of the buffer of {name}: 2 prompts of 3 responses each, 3 heads, 8 slots, size 4",
                   list(buffer.shape), [6, 3, 8, 4])
            expect(f"{name} of the prompts, in the first rows and slots", buffer[:2, :, :5], prompt)

    @pytest.mark.parametrize("rows", [[0, 1], [1, 0, 0, 1, 1], [1], [0], [0, 0, 0, 1, 1, 1]], ids=str)
    def test_rows_are_copied_and_the_new_slots_are_zero(self, monkeypatch, rows):
        fill_new_memory(monkeypatch)
        slab, *prompts = self.slab()
        places = [buffer.data_ptr() for buffer in slab.buffers]
        slab.resize(torch.tensor(rows), 7)
        expect(f"window after resize({rows}, 7)", slab.window, 7)
        for name, x, prompt in zip(("keys", "values"), (slab.keys, slab.values), prompts):
            expect(f"rows {rows} of the {name}", x[:, :, :5], prompt[rows])
            expect(f"{name} of the slots that were opened", x[:, :, 5:7], torch.zeros(len(rows), 3, 2, 4))
        expect("the memory stays where it is", [x.data_ptr() for x in (slab.keys, slab.values)], places)

    def test_a_step_writes_one_slot_and_sees_the_window(self, monkeypatch):
        fill_new_memory(monkeypatch)
        slab, *prompts = self.slab()
        slab.resize(torch.tensor([1, 0, 1]), 7)
        for slot in (5, 6):  # whoever samples moves the slot on
            slab.slot[:] = slot
            new = torch.full((3, 3, 1, 4), slot + 0.1), torch.full((3, 3, 1, 4), slot + 0.2)
            seen = slab.update(*new)
            for name, x, prompt, added in zip(("keys", "values"), seen, prompts, new):
                expect(f"shape of the {name} that attention sees", list(x.shape), [3, 3, 7, 4])
                expect(f"{name} written to slot {slot}", x[:, :, slot:slot + 1], added)
                expect(f"{name} of the prompts", x[:, :, :5], prompt[[1, 0, 1]])
        expect("keys in slot 5 after slot 6 was written", seen[0][:, :, 5], torch.full((3, 3, 4), 5.1))

    def test_what_was_written_moves_with_its_row(self):
        slab, *_ = self.slab()
        slab.resize(torch.tensor([0, 1]), 6)
        slab.update(torch.tensor([10.0, 20.0]).view(2, 1, 1, 1), torch.tensor([30.0, 40.0]).view(2, 1, 1, 1))
        slab.resize(torch.tensor([1, 1, 0]), 7)
        expect("keys and values in slot 5 after rows [1, 1, 0] replaced rows [0, 1]",
               (slab.keys[:, 0, 5, 0].tolist(), slab.values[:, 1, 5, 2].tolist()),
               ([20.0, 20.0, 10.0], [40.0, 40.0, 30.0]))

    def test_serves_as_a_layer_of_a_cache(self):
        slab, *_ = self.slab()
        slab.resize(torch.tensor([0, 1]), 6)
        cache = Cache(layers=[slab])
        new = torch.ones(2, 3, 1, 4), -torch.ones(2, 3, 1, 4)
        expect("keys and values of slot 5 through a cache of transformers",
               [x[:, :, 5:].tolist() for x in cache.update(*new, 0)], [x.tolist() for x in new])
        assert isinstance(cache.get_seq_length(), int), "models may ask the cache for its length"


class Test_replayed:
    def test_is_the_step_itself_elsewhere(self):
        step = lambda: None
        assert ampo.replayed(step, torch.device("cpu")) is step, "on the CPU there is nothing to record"

    def test_on_cuda_python_runs_once_and_its_operations_again(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
        monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
        x, calls = torch.tensor([1.0, 2.0]), []
        def step():
            calls.append(1)
            return (3 * x).cumsum(0)
        again = ampo.replayed(step, torch.device("cuda"))
        for values, wanted in (([1.0, 2.0], [3.0, 9.0]), ([5.0, 6.0], [15.0, 33.0]), ([0.0, 7.0], [0.0, 21.0])):
            x[:] = torch.tensor(values)
            expect(f"3·x summed up, for x = {values}", again(), wanted)
        expect("calls of step(), which was recorded", len(calls), 1)


class Test_sample_tokens:
    P = [0.05, 0.3, 0.25, 0.4]

    def draw(self, logits, temperature=1.0, n=4000):
        torch.manual_seed(0)
        return ampo.sample_tokens(torch.tensor(logits).repeat(n, 1), temperature)

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_draws_from_the_distribution_at_a_temperature(self, temperature):
        tokens, _ = self.draw([2 + math.log(p) for p in self.P], temperature)
        powers = [p ** (1 / temperature) for p in self.P]
        wanted = {token: power / sum(powers) for token, power in enumerate(powers)}
        assert tokens.shape == (4000,) and tokens.dtype == torch.long, "a token id for each row"
        seen = Counter(tokens.tolist())
        assert not contradicts(seen, wanted), (
            f"temperature {temperature}: of 4000 draws {dict(seen)} do not fit the probabilities {wanted}")

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_logps_are_those_of_the_tokens_drawn(self, temperature):
        tokens, logps = self.draw([2 + math.log(p) for p in self.P], temperature, 40)
        powers = [p ** (1 / temperature) for p in self.P]
        expect(f"log-probabilities of {tokens.tolist()}, drawn at temperature {temperature} from {self.P}",
               logps, [math.log(powers[token] / sum(powers)) for token in tokens])

    def test_each_row_has_its_own_distribution(self):
        torch.manual_seed(0)
        logits = torch.full((6, 6), -30.0)
        for row, token in enumerate(order := [3, 0, 5, 1, 4, 2]): logits[row, token] = 0.0
        tokens, logps = ampo.sample_tokens(logits, 1.0)
        expect("six rows that are certain of another token each", (tokens.tolist(), logps.tolist()), (order, [0.0] * 6))

    def test_mistake_9_temperature_zero_is_the_argmax(self):
        tokens, logps = ampo.sample_tokens(torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 3.0, 2.0, 1.0]]), 0)
        expect("temperature 0: tokens and log-probabilities of a distribution that is a point",
               (tokens.tolist(), logps.tolist()), ([1, 0], [0.0, 0.0]))

    def test_low_precision_logits_are_normalised_in_float32(self):
        logits = torch.linspace(-3, 3, 50).bfloat16()
        torch.manual_seed(0)
        tokens, logps = ampo.sample_tokens(logits.repeat(20, 1), 0.7)
        expect("type of the log-probabilities from bfloat16 logits", str(logps.dtype), "torch.float32")
        expect("log-probabilities from bfloat16 logits", logps, (logits.double() / 0.7).log_softmax(-1)[tokens])

    def test_never_draws_a_token_of_probability_zero(self):
        torch.manual_seed(0)
        logits = torch.full((20000, 6), -math.inf)
        logits[:, 2], logits[:, 4] = 0.0, -1.0
        tokens, logps = ampo.sample_tokens(logits, 1.0)
        expect("tokens drawn where only 2 and 4 are possible", sorted(set(tokens.tolist())), [2, 4])
        assert torch.isfinite(logps).all(), "what was drawn has a probability above zero"

    @pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
    def test_the_ends_of_the_unit_interval_give_possible_tokens(self, monkeypatch, number):
        """The sum of many rounded probabilities is not quite 1."""
        torch.manual_seed(0)
        logits = torch.randn(32, 30000)
        logits[:, :5], logits[:, -5:] = -math.inf, -math.inf
        monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.full(size, number))
        tokens, logps = ampo.sample_tokens(logits, 1.0)
        assert ((5 <= tokens) & (tokens < 29995)).all() and torch.isfinite(logps).all(), (
            f"where the random number is {number}: tokens of probability zero among {tokens.tolist()}")


def learned_positions():
    torch.manual_seed(1)
    config = AutoConfig.for_model("gpt2", vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                  initializer_range=0.5, bos_token_id=None, eos_token_id=1)
    return AutoModelForCausalLM.from_config(config).eval()


class Test_prefill:
    PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]  # unequal lengths: the short ones get filled up

    def run(self, model, n=3, room=20):
        with torch.no_grad():
            return ampo.prefill(model, self.PROMPTS, n, room)

    def test_reads_each_prompt_once(self, model):
        logits, cache, mask, lengths, slot = self.run(model)
        expect("shapes of logits and mask", (list(logits.shape), list(mask.shape)), ([3, 60], [3, 1, 1, 20]))
        expect("lengths of the prompts, slot after the longest", (lengths.tolist(), slot.tolist()), ([3, 8, 1], [8]))
        with torch.no_grad():
            for i, prompt in enumerate(self.PROMPTS):
                alone = model(torch.tensor([prompt]), use_cache=True)
                seen = [False] * (8 - len(prompt)) + [True] * len(prompt) + [False] * 12
                expect(f"logits after the prompt {prompt}", logits[i], alone.logits[0, -1], 1e-4)
                expect(f"mask of {prompt}: 0 for its tokens, -inf before and after them",
                       mask[i, 0, 0], [0.0 if s else -math.inf for s in seen])
                for slab, layer in zip(cache.layers, alone.past_key_values.layers):
                    for buffer, x in zip(slab.buffers, (layer.keys, layer.values)):
                        expect("a buffer with room for the rows of all rollouts", list(buffer.shape), [9, 2, 20, 8])
                        expect(f"keys or values of {prompt}", buffer[i, :, 8 - len(prompt):8], x[0], 1e-4)

    def test_all_layers_share_the_slot_that_is_returned(self, model):
        *_, cache, _, _, slot = self.run(model)
        slot[:] = 11
        expect("slot of each layer after slot[:] = 11", [layer.slot.item() for layer in cache.layers], [11, 11])

    def test_positions_count_from_the_first_token_of_a_prompt(self):
        """Learned positions, as GPT-2 has them, show a shift that rotary ones hide; there is none below 0."""
        model = learned_positions()
        for prompt, logits in zip(self.PROMPTS, self.run(model)[0]):
            expect(f"logits after the prompt {prompt}", logits.softmax(-1), next_token(model, prompt), 1e-4)

    def test_a_cache_of_another_kind_is_an_input_error(self):
        model = random_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
        assert "qwen2" in message_of(self.run, model), "the message names the model's type"


def chain_model(successor):
    """Attention and MLP say nothing, so that the likeliest token after each one is its successor in the table."""
    model = random_model(vocab=30)
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj): part.weight.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(30, 32)
    model.lm_head.weight.data.zero_()
    for token, then in successor.items(): model.lm_head.weight.data[then, token] = 1.0
    return model


class Test_generate:
    PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]  # unequal lengths: the short ones get filled up
    STOPS, N, T = [20, 21, 22], 10, 60

    def sample(self, model, span, temperature=1.0):
        torch.manual_seed(0)
        return ampo.generate(model, self.PROMPTS, self.N, self.T, temperature, self.STOPS, span=span)

    def forwards(self, monkeypatch, model):
        """The (rows, tokens a row, width of the mask, gradients on?) of every forward pass from now on."""
        seen, forward = [], model.forward
        monkeypatch.setattr(model, "forward", lambda **inputs: (seen.append(
            (*inputs["input_ids"].shape, inputs["attention_mask"].shape[-1], torch.is_grad_enabled())),
            forward(**inputs))[1])
        return seen

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
    def test_logps_equal_an_uncached_forward_pass(self, model, temperature):
        torch.manual_seed(0)
        stops = list(range(20, 30))  # many stop tokens, so that rows leave the batch at many moments
        groups = ampo.generate(model, self.PROMPTS, 12, 24, temperature, stops)
        expect_exact(model, self.PROMPTS, groups, temperature)

    def test_n_responses_to_each_prompt_in_order(self, model):
        groups = ampo.generate(model, self.PROMPTS, 5, 7)
        expect("responses to each of three prompts, n = 5", [len(group) for group in groups], [5, 5, 5])
        expect("tokens and log-probabilities a response, max_new_tokens = 7 and nothing that stops",
               [(len(ids), len(logps)) for group in groups for ids, logps in group], [(7, 7)] * 15)
        expect_exact(model, self.PROMPTS, groups)  # at temperature 1 unless another one is given

    def test_nothing_to_say_without_prompts(self, model):
        expect("no prompts", ampo.generate(model, [], 3, 5), [])

    def test_stops_at_the_first_end_token_and_keeps_it(self, model):
        torch.manual_seed(0)
        groups = ampo.generate(model, self.PROMPTS, 40, 30, 1.0, [20, 21, 22, 23, 24])
        rows = [ids for group in groups for ids, _ in group]
        assert all(not set(ids[:-1]) & {20, 21, 22, 23, 24} for ids in rows), "nothing is said after an end token"
        assert all(ids[-1] in {20, 21, 22, 23, 24} for ids in rows if len(ids) < 30), "short ones keep their end token"
        assert len({len(ids) for ids in rows}) > 5, "responses end at different lengths"

    def test_responses_are_cut_after_their_first_stop_token(self):
        """The same with a model that has only one thing to say after each prompt."""
        model = chain_model({20: 4, 4: 9, 21: 5, 5: 5, 22: 8, 23: 1, 1: 2, 2: 3, 3: 9, 24: 10, 10: 11, 11: 8, 25: 9,
                             9: 8, 8: 9})
        said = {20: [4, 9, 8, 9], 21: [5, 5, 5, 5], 22: [8, 9, 8, 9], 23: [1, 2, 3, 9], 24: [10, 11, 8, 9],
                25: [9, 8, 9, 8]}
        cut = {20: [4, 9], 21: [5, 5, 5, 5], 22: [8], 23: [1, 2, 3, 9], 24: [10, 11, 8], 25: [9]}
        prompts = [[7, token] for token in said]
        for stops, wanted in (([9, 8], cut), (None, said), ([], said)):
            expect(f"two responses to each of {prompts} with the end tokens {stops}",
                   ampo.generate(model, prompts, 2, 4, 0, stops),
                   [[(ids, [0.0] * len(ids))] * 2 for ids in wanted.values()])

    def test_one_end_token_may_be_a_plain_number(self, model):
        torch.manual_seed(0)
        a = ampo.generate(model, self.PROMPTS, 8, 20, 1.0, 21)
        torch.manual_seed(0)
        expect("eos_token_id = 21 next to [21]", a, ampo.generate(model, self.PROMPTS, 8, 20, 1.0, [21]))

    def test_samples_from_the_models_distribution(self, model):
        torch.manual_seed(0)
        seen = Counter(ids[0] for ids, _ in ampo.generate(model, [[5, 6, 7]], 4000, 1, 1.3)[0])
        p = dict(enumerate(next_token(model, [5, 6, 7], 1.3).tolist()))
        assert not contradicts(seen, p), "4000 first tokens do not fit their probabilities at temperature 1.3"

    def test_responses_that_share_a_past_draw_independently(self, model):
        """Pairs of tokens: one draw for all that said the same so far would repeat pairs far too often."""
        torch.manual_seed(0)
        prompt, temperature = [5, 6, 7], 0.6
        seen = Counter(tuple(ids) for ids, _ in ampo.generate(model, [prompt, [9]], 4000, 2, temperature)[0])
        first = next_token(model, prompt, temperature)
        p = {(a, b): first[a].item() * then for a in first.topk(3).indices.tolist()
             for b, then in enumerate(next_token(model, [*prompt, a], temperature).tolist())}
        assert sum(4000 * x >= 10 for x in p.values()) > 8
        assert not contradicts(seen, p), "4000 pairs of tokens do not fit their probabilities at temperature 0.6"

    def test_same_seed_same_samples(self, model):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(ampo.generate(model, self.PROMPTS, 4, 10))
        expect("seed 3 twice", runs[0], runs[1])
        assert runs[1] != runs[2], "seeds 3 and 4 give different samples"

    def test_mistake_6_filling_on_the_left_changes_nothing(self, model):
        """A short prompt beside a long one is scored in the context it was sampled in, alone or in company."""
        torch.manual_seed(0)
        alone, in_company = [[16]], [[16], list(range(5, 45))]
        expect_exact(model, alone, ampo.generate(model, in_company, 1, 12)[:1])
        expect("greedy response to [16] beside a long prompt, next to the one alone",
               ampo.generate(model, in_company, 1, 12, 0)[0], ampo.generate(model, alone, 1, 12, 0)[0])

    def test_positions_go_on_from_the_prompt(self):
        model = learned_positions()
        torch.manual_seed(0)
        expect_exact(model, self.PROMPTS, ampo.generate(model, self.PROMPTS, 4, 10))

    def test_mistake_9_temperature_zero_is_greedy(self, model):
        (ids, logps), (other, _) = ampo.generate(model, [[5, 6, 7]], 2, 8, 0)[0]
        for t, token in enumerate(ids):
            expect(f"temperature 0: the token after {[5, 6, 7, *ids[:t]]}",
                   token, next_token(model, [5, 6, 7, *ids[:t]]).argmax().item())
        expect("temperature 0: a second response, and the log-probabilities of both", (other, logps), (ids, [0.0] * 8))

    def test_mistake_9_first_tokens_of_a_group_differ(self, model):
        torch.manual_seed(0)
        first = {ids[0] for ids, _ in ampo.generate(model, [[5, 6, 7]], 64, 1)[0]}
        assert len(first) > 3, f"64 responses to one prompt begin with {first} only"

    def test_leaves_no_gradient_and_no_mode_behind(self, model, monkeypatch):
        with monkeypatch.context() as patch:
            seen = self.forwards(patch, model)
            ampo.generate(model, self.PROMPTS, 2, 3)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "modes are as before"
        assert not any(gradient for *_, gradient in seen), "forward passes keep nothing for a backward pass"

    @pytest.mark.parametrize("span", [1, 3, 16, 64])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logps_are_exact_however_the_window_opens(self, model, monkeypatch, span, temperature):
        """Fresh memory holds NaN, so that a slot which is read before it is written would show."""
        fill_new_memory(monkeypatch)
        groups = self.sample(model, span, temperature)
        expect_exact(model, self.PROMPTS, groups, temperature)
        assert len({len(ids) for group in groups for ids, _ in group}) > 10
        assert max(len(ids) for group in groups for ids, _ in group) > 3 * 16  # the window of 16 opened several times

    @pytest.mark.parametrize("span", [3, 16, 64])
    def test_span_changes_nothing(self, model, span):
        ids = [[[r for r, _ in group] for group in self.sample(model, s, 0)] for s in (1, span)]
        expect(f"greedy responses with span {span}, next to span 1", ids[1], ids[0])

    @pytest.mark.parametrize("span, widths", [(None, [9, 10, 11, 12, 13, 14]), (4, [12, 12, 12, 12, 16, 16])])
    def test_window_opens_by_a_span_which_is_one_slot_on_the_cpu(self, model, monkeypatch, span, widths):
        with monkeypatch.context() as patch:
            seen = self.forwards(patch, model)
            ampo.generate(model, self.PROMPTS, 2, 7, span=span)
        expect(f"span {span}, prompts of 8 tokens: tokens a row and width of the mask of each forward pass",
               [one[1:3] for one in seen], [(8, 8)] + [(1, width) for width in widths])

    @pytest.mark.parametrize("span", [16, 64])
    def test_steps_can_be_recorded_and_run_again(self, model, monkeypatch, span):
        """A graph reads the memory it was recorded on and nothing else: a tensor that is rebound between captures, or
        a number that Python hands in, stays for ever what it was."""
        expected, recorded = self.sample(model, span), []

        def replayed(step, device):
            with Tape() as tape: logits = step()
            logits.fill_(math.nan)  # recording computes nothing
            recorded.append(calls[-1])
            return lambda: tape.replay() or logits

        with monkeypatch.context() as patch:
            fill_new_memory(patch)
            patch.setattr(ampo, "replayed", replayed)
            calls = self.forwards(patch, model)
            groups = self.sample(model, span)
        ours, theirs = ([[ids for ids, _ in group] for group in run] for run in (groups, expected))
        expect("responses where steps are recorded, next to those without", ours, theirs)
        expect_exact(model, self.PROMPTS, groups)
        assert len(recorded) > 2 and {window % span for _, _, window, _ in recorded} == {0}, "windows are whole spans"
        steps = max(len(ids) for group in groups for ids, _ in group) - 1
        assert len(recorded) == len(set(recorded)) and len(calls) < 1 + steps, "the other steps run from the recording"

    def test_responses_that_said_the_same_share_a_row(self, model, monkeypatch):
        """A prompt is read once; then there is a row for each different past of a running one, and few others."""
        with monkeypatch.context() as patch:
            rows = self.forwards(patch, model)
            groups = self.sample(model, 1, 0.2)
        expect("rows and tokens of the first forward pass", rows[0][:2], (3, 8))
        expect("tokens a row of the later ones", {width for _, width, *_ in rows[1:]}, {1})
        shared = 0
        for t, (count, *_) in enumerate(rows[1:], 1):
            running = [(i, tuple(ids[:t])) for i, group in enumerate(groups) for ids, _ in group
                       if not set(ids[:t]) & set(self.STOPS)]
            assert len(set(running)) <= count <= max(len(set(running)) / 0.85, 1), (
                f"{count} rows for {len(set(running))} different pasts of length {t}")
            shared += len(running) - len(set(running))
        assert shared > 20
        expect("forward passes", len(rows), max(len(ids) for group in groups for ids, _ in group))


class Test_pad:
    @pytest.mark.parametrize("side, tokens, real", [
        ("right", [[5, 0, 7], [8, 0, 0], [0, 9, 0]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        ("left", [[5, 0, 7], [0, 0, 8], [0, 0, 9]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]])])
    def test_fills_one_side_with_zeros_and_marks_what_is_real(self, side, tokens, real):
        got, mask = ampo.pad([[5, 0, 7], [8], [0, 9]], torch.device("cpu"), side)
        assert (got.dtype, mask.dtype) == (torch.long, torch.bool), "ids are integers, masks booleans"
        expect(f"[[5, 0, 7], [8], [0, 9]] filled on the {side}: ids, and a mask that does not come from the ids",
               (got.tolist(), mask.int().tolist()), (tokens, real))

    def test_on_the_right_unless_told_and_floats_stay_floats(self):
        got, mask = ampo.pad([[0.5], [1.5, 2.5]], torch.device("cpu"))
        expect("[[0.5], [1.5, 2.5]]", (got.tolist(), mask.int().tolist()), ([[0.5, 0.0], [1.5, 2.5]], [[1, 0], [1, 1]]))

    def test_lies_on_the_device_asked_for(self):
        got, mask = ampo.pad([[1], [2, 3]], torch.device("meta"))
        expect("devices of ids and mask", (got.device.type, mask.device.type), ("meta", "meta"))


# ---------------------------------------------------------------------------------------------------------------------
# §5 Log-probabilities, for large vocabularies and deep models too


class Widest(TorchDispatchMode):
    """The most rows that any tensor over the whole vocabulary had, forward and backward; (32, V) is the head itself."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.vocab and x.shape[0] != 32:
                self.rows = max(self.rows, x.numel() // self.vocab)
        return out


def logps_and_entropies(model, prompt, response, temperature=1.0):
    """Oracle with gradient: one sequence alone, from all its logits."""
    log_p = (model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature).log_softmax(-1)
    return log_p.gather(1, torch.tensor(response)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class Test_read_head:
    @pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
    def test_logps_and_entropies_of_known_distributions(self, temperature):
        """The head is the identity, so that the states are the logits."""
        table, targets = [[0.5, 0.25, 0.25], [0.9, 0.05, 0.05], [0.1, 0.2, 0.7]], [1, 0, 0]
        states = torch.tensor(table).log() + 3
        logps, entropies = ampo.read_head(torch.nn.Identity(), states, torch.tensor(targets), temperature)
        powers = [[p ** (1 / temperature) for p in row] for row in table]
        rows = [[power / sum(row) for power in row] for row in powers]
        expect(f"log p of the tokens {targets} under {table} at temperature {temperature}",
               logps, [math.log(row[target]) for row, target in zip(rows, targets)])
        expect(f"entropies of {table} at temperature {temperature}",
               entropies, [-sum(p * math.log(p) for p in row) for row in rows])

    def test_applies_the_head(self):
        head = torch.nn.Linear(2, 3, bias=False)
        head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        logps, _ = ampo.read_head(head, torch.tensor([[0.0, 1.0]]), torch.tensor([2]), 1.0)
        expect("log p of token 2 for the logits [0, 1, 2]", logps.tolist(), [2 - math.log(1 + math.e + math.e ** 2)])

    def test_low_precision_logits_are_normalised_in_float32(self):
        states, targets = torch.linspace(-3, 3, 40).bfloat16().repeat(5, 1), torch.tensor([0, 7, 20, 30, 39])
        logps, entropies = ampo.read_head(torch.nn.Identity(), states, targets, 0.7)
        exact = (states.double() / 0.7).log_softmax(-1)
        expect("types from bfloat16 logits", [str(x.dtype) for x in (logps, entropies)], ["torch.float32"] * 2)
        expect("log p from bfloat16 logits", logps, exact.gather(1, targets[:, None])[:, 0])
        expect("entropy from bfloat16 logits", entropies, -(exact.exp() * exact).sum(-1))


class Test_score:
    RESPONSES = [[5 + i % 50 for i in range(40)], [7, 9, 1], [11 + i % 40 for i in range(62)], [12] * 30]
    PROMPTS = [[3, 4], [5] * 9, [6], [7, 8, 9]]

    def model_of(self, tied, outputs=2**22):
        """A head that says it has 2^22 outputs is computed for 2^26 / 2^22 = 16 tokens at a time."""
        model = random_model(vocab=61, tie_word_embeddings=tied)
        model.lm_head.out_features = outputs
        return model

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_equals_one_sequence_at_a_time(self, model, temperature):
        prompts, responses = [[5, 6, 7], [8], [9, 10, 11, 12]], [[13, 14], [15, 16, 17, 18, 1], [1]]
        logps, mask, entropy, values = ampo.score(model, prompts, responses, temperature)
        assert mask.dtype == torch.bool and values is None, "the mask is boolean, and without a critic are no values"
        for row, bits, m, prompt, response in zip(logps, entropy, mask, prompts, responses):
            empty, case = [0.0] * (5 - len(response)), f"{prompt} + {response} at temperature {temperature}"
            with torch.no_grad():
                exact, spread = logps_and_entropies(model, prompt, response, temperature)
            expect(f"mask of {case}", m.tolist(), [True] * len(response) + [False] * len(empty))
            expect(f"log-probabilities of {case}", row.tolist(), exact.tolist() + empty, 1e-4)
            expect(f"entropies of {case}", bits.tolist(), spread.tolist() + empty, 1e-4)

    def test_temperature_is_one_unless_given(self, model):
        expect("log-probabilities without a temperature", ampo.score(model, [[5]], [[6, 7]])[0].tolist(),
               [full_logps(model, [5], [6, 7])], 1e-4)

    def test_mistake_1_the_end_token_counts_even_where_it_is_what_fills_up(self, model):
        """pad = eos = 1 here: a mask made from ids would lose the last token."""
        assert model.config.pad_token_id == model.config.eos_token_id == 1
        logps, mask, *_ = ampo.score(model, [[5], [5]], [[6, 1], [1]])
        expect("mask of the responses [6, 1] and [1]", mask.tolist(), [[True, True], [True, False]])
        expect("log-probability of the end token 1 after [5, 6] and [5]", [logps[0, 1].item(), logps[1, 0].item()],
               [full_logps(model, [5], [6, 1])[1], full_logps(model, [5], [1])[0]], 1e-4)

    def test_mistake_7_inputs_stay_as_they_were(self, model):
        prompts, responses = [[5, 6], [7]], [[8], [9, 1]]
        ampo.score(model, prompts, responses)
        expect("prompts and responses afterwards", (prompts, responses), ([[5, 6], [7]], [[8], [9, 1]]))

    @pytest.mark.parametrize("tied", [True, False])
    def test_equals_full_logits_in_value_and_gradient(self, tied):
        model, twin = self.model_of(tied), random_model(vocab=61, tie_word_embeddings=tied)
        logps, mask, entropy, _ = ampo.score(model, self.PROMPTS, self.RESPONSES, 0.7)
        loss, total = (2 * logps - entropy)[mask].mean(), 0
        for prompt, response, row, bits, m in zip(self.PROMPTS, self.RESPONSES, logps, entropy, mask):
            exact, spread = logps_and_entropies(twin, prompt, response, 0.7)
            assert torch.allclose(row[m], exact, atol=1e-4), f"log-probabilities of {prompt} + {response}"
            assert torch.allclose(bits[m], spread, atol=1e-4), f"entropies of {prompt} + {response}"
            assert (row[~m] == 0).all() and (bits[~m] == 0).all(), "zero where the mask is False"
            total = total + (2 * exact - spread).sum()
        total = total / sum(map(len, self.RESPONSES))
        gradients = [torch.autograd.grad(x, list(m.parameters())) for x, m in ((loss, model), (total, twin))]
        for (name, _), a, b in zip(model.named_parameters(), *gradients):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-3) and b.abs().sum() > 0, f"gradient of {name}"

    def test_logits_never_exist_for_all_tokens_together(self, monkeypatch):
        """They would be the largest tensor of a run by far: 152k logits for each of 100k tokens."""
        sizes, read_head, model = [], ampo.read_head, self.model_of(False)
        monkeypatch.setattr(ampo, "read_head", lambda head, states, *rest: (
            sizes.append(len(states)), read_head(head, states, *rest))[1])
        with Widest(61) as widest:
            logps, *_ = ampo.score(model, self.PROMPTS, self.RESPONSES)
            forward = list(sizes)
            logps.sum().backward()
        count = sum(map(len, self.RESPONSES))
        expect("tokens at a time where the head has 2^22 outputs", forward, [16] * (count // 16) + [count % 16])
        assert count % 16
        expect("reads of the head: the backward pass computes them again", len(sizes), 2 * len(forward))
        expect("most rows of logits that existed at a time", widest.rows, 16)

    def test_a_vocabulary_beyond_all_bounds_still_takes_a_token_at_a_time(self):
        model, plain = self.model_of(False, 2**27), random_model(vocab=61)
        with Widest(61) as widest:
            ours = ampo.score(model, [[5]], [[6, 7, 8]])[0]
        expect("rows of logits at a time for 2^27 outputs", widest.rows, 1)
        expect("log-probabilities of [5] + [6, 7, 8]", ours.tolist(), [full_logps(plain, [5], [6, 7, 8])], 1e-4)

    def test_gradient_reaches_every_weight_and_no_other_embedding(self):
        model = random_model(tie_word_embeddings=False)
        ampo.score(model, [[5], [6, 7]], [[8, 9, 10], [11]])[0].sum().backward()
        used = {5, 6, 7, 8, 9}  # the last token of a response is predicted, not read; 0 fills up
        rows = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
        expect("embeddings with a gradient for [5] + [8, 9, 10] and [6, 7] + [11]", set(rows), used)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), "each weight has one"

    def test_critic_reads_the_state_before_each_token_and_does_not_change_it(self):
        """In bfloat16, as the states are on CUDA, while the critic is in float32."""
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            model, critic = random_model(scale=1.0).to(dtype), torch.nn.Linear(32, 1)
            *_, mask, _, values = ampo.score(model, [[5], [6, 7, 8]], [[9, 10, 1], [11]], critic=critic)
            for row, prompt, response in zip(values, [[5], [6, 7, 8]], [[9, 10, 1], [11]]):
                with torch.no_grad():
                    states = model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1:-1]
                    wanted = critic(states.float())[:, 0].tolist()
                wanted += [0.0] * (3 - len(response))
                expect(f"values of {prompt} + {response}", row.tolist(), wanted, tolerance)
            values.sum().backward()
            assert critic.weight.grad.abs().sum() > 0, "the values have a gradient for the critic"
            assert all(p.grad is None for p in model.parameters()), "the values have no gradient for the model"

    @pytest.mark.parametrize("recompute", [False, True])
    def test_layers_run_again_under_checkpointing_and_dropout_stays_off(self, recompute):
        """With dropout the first ratio would not be 1; checkpointing of transformers asks for training mode."""
        model, calls = random_model(attention_dropout=0.5), []
        if recompute: model.activation_checkpointing_enable()
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        logps = ampo.score(model, [[5, 6]], [[7, 8, 9]])[0]
        forward = len(calls)
        logps.sum().backward()
        expect(f"runs of the first layer, checkpointing {recompute}: in the forward pass, and with the backward pass",
               (forward, len(calls)), (1, 1 + recompute))
        wanted = [full_logps(model, [5, 6], [7, 8, 9])]
        expect("log-probabilities of a model with dropout", logps.tolist(), wanted, 1e-4)
        assert not any(module.training for module in model.modules()), "no module is left in training mode"


class Test_token_logps:
    PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
    RESPONSES = [[13, 14], [15, 16, 17, 18, 1], [1]]

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_equals_one_sequence_at_a_time(self, model, temperature):
        logps, mask = ampo.token_logps(model, self.PROMPTS, self.RESPONSES, temperature)
        assert logps.shape == mask.shape == (3, 5) and mask.dtype == torch.bool, "(B, T), and the mask is boolean"
        for row, m, prompt, response in zip(logps, mask, self.PROMPTS, self.RESPONSES):
            empty, exact = 5 - len(response), full_logps(model, prompt, response, temperature)
            expect(f"mask of {response}", m.tolist(), [True] * len(response) + [False] * empty)
            expect(f"log-probabilities of {prompt} + {response} at temperature {temperature}",
                   row.tolist(), exact + [0.0] * empty, 1e-4)

    def test_temperature_is_one_unless_given(self, model):
        expect("log-probabilities without a temperature", ampo.token_logps(model, [[5]], [[6, 7]])[0].tolist(),
               [full_logps(model, [5], [6, 7])], 1e-4)

    def test_mistake_3_takes_the_temperature_that_was_sampled_at(self, model):
        """The sampler is that of transformers, which says what it drew from."""
        torch.manual_seed(0)
        out = model.generate(torch.tensor([[5, 6]]), do_sample=True, temperature=0.7, top_k=0, max_new_tokens=10,
                             eos_token_id=None, return_dict_in_generate=True, output_scores=True)
        ids = out.sequences[0, 2:].tolist()
        sampled = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(out.scores, ids)]
        expect(f"log-probabilities of {ids}, sampled at temperature 0.7",
               ampo.token_logps(model, [[5, 6]], [ids], 0.7)[0].tolist(), [sampled], 2e-4)
        hotter = ampo.token_logps(model, [[5, 6]], [ids], 1.0)[0][0].tolist()
        assert hotter != pytest.approx(sampled, abs=2e-2), "another temperature is another distribution"

    def test_gradient_reaches_every_weight(self):
        model = random_model(tie_word_embeddings=False)
        ampo.token_logps(model, [[5], [6, 7]], [[8, 9, 10], [11]])[0].sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), "each weight has one"


# ---------------------------------------------------------------------------------------------------------------------
# §6 The objective


def advantages_by_hand(row, follow):
    return [(r - statistics.mean(row)) / (statistics.stdev(row) if follow == "paper" else 1) for r in row]


class Test_group_advantages:
    REWARDS = [[1.0, 0.0, 0.1, 0.1], [1.0, 1.0, 1.0, 0.0]]

    def test_code_subtracts_the_groups_mean(self):
        wanted = [advantages_by_hand(row, "code") for row in self.REWARDS]
        for name, more in (("follow='code'", ["code"]), ("no follow given", [])):
            got = ampo.group_advantages(torch.tensor(self.REWARDS), *more)
            expect(f"rewards {self.REWARDS} with {name}: each minus the mean of its own group", got, wanted)

    def test_paper_also_divides_by_the_groups_std(self):
        wanted = [advantages_by_hand(row, "paper") for row in self.REWARDS]
        got = ampo.group_advantages(torch.tensor(self.REWARDS), "paper")
        expect(f"rewards {self.REWARDS} with follow='paper': divided by the group's unbiased std", got, wanted, 1e-4)

    @pytest.mark.parametrize("follow", ["code", "paper"])
    @pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1.0, 1 / 3])
    def test_mistake_5_equal_rewards_are_exactly_no_signal(self, follow, reward):
        got = ampo.group_advantages(torch.full((3, 7), reward), follow)
        expect(f"groups of seven rewards {reward:.3g} with follow='{follow}': exactly 0, no rounding noise",
               (got == 0).all(), True)

    @pytest.mark.parametrize("follow", ["code", "paper"])
    def test_a_group_without_signal_leaves_its_neighbours_alone(self, follow):
        rewards = [[0.1] * 7, [1.0, 0.0, 0.1, 0.1, 0.1, 1.0, 1.0], [1.0] * 7]
        got = ampo.group_advantages(torch.tensor(rewards), follow)
        wanted = [[0.0] * 7, advantages_by_hand(rewards[1], follow), [0.0] * 7]
        case = f"rewards {rewards} with follow='{follow}': only groups of equal rewards get 0"
        expect(case, got, wanted, 1e-4)
        expect(f"{case}, and exactly 0", (got == 0).all(1), [True, False, True])


def gae_by_hand(values, reward, lam):
    """The double sum over one row without padding."""
    n, v = len(values), [*values, 0.0]
    delta = [(reward if t == n - 1 else 0.0) + v[t + 1] - v[t] for t in range(n)]
    return [sum(lam ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


class Test_gae:
    @pytest.mark.parametrize("lam", [0.9, 0.5, 0.0])
    def test_equals_the_double_sum(self, lam):
        torch.manual_seed(0)
        values, lengths, rewards = torch.randn(3, 5), [5, 2, 1], [1.0, 0.0, 0.9]
        mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
        out = ampo.gae(values, torch.tensor(rewards), mask, lam)
        wanted = [gae_by_hand(row[:n], reward, lam) + [0.0] * (5 - n)
                  for row, n, reward in zip(values.tolist(), lengths, rewards)]
        expect(f"three rows of 5, 2 and 1 tokens, λ = {lam}: the sum of λ^(u-t)·δ_u up to the last token, 0 after it",
               out, wanted)

    def test_lambda_one_is_reward_minus_value(self):
        values, mask = torch.tensor([[0.3, 0.5, -0.2]]), torch.ones(1, 3, dtype=torch.bool)
        expect("values [0.3, 0.5, -0.2], reward 1, λ = 1: the reward minus the value",
               ampo.gae(values, torch.tensor([1.0]), mask, 1.0)[0], [0.7, 0.5, 1.2])

    def test_lambda_is_095_where_none_is_given(self):
        values, mask = [0.3, 0.5, -0.2], torch.ones(1, 3, dtype=torch.bool)
        expect("values [0.3, 0.5, -0.2], reward 1 and no λ given: λ is 0.95",
               ampo.gae(torch.tensor([values]), torch.tensor([1.0]), mask)[0], gae_by_hand(values, 1.0, 0.95))

    def test_values_stay_as_they_were(self):
        values, mask = torch.tensor([[0.3, 0.5, -0.2]]), torch.tensor([[True, True, False]])
        ampo.gae(values, torch.tensor([1.0]), mask, 0.5)
        expect("the tensor of values that was passed in is not written to", values, [[0.3, 0.5, -0.2]])


def objective_by_hand(logp, old_logp, advantage, off, clip=0.2, gamma=0.1):
    ratio = math.exp(logp - old_logp)
    if off:
        return advantage * ratio / (ratio + gamma)
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def expect_entries(case, out, logps, old, advantages, off, *settings):
    """Compare entry by entry, and name the first that differs."""
    for b, t in itertools.product(range(len(logps)), range(logps.shape[1])):
        advantage = advantages[b, t] if advantages.dim() == 2 else advantages[b]
        entry = logps[b, t].item(), old[b, t].item(), advantage.item(), off[b].item()
        kind = "off-policy" if entry[3] else "on-policy"
        expect(f"{case}: {kind}, ratio {math.exp(entry[0] - entry[1]):.3g}, A = {entry[2]:.3g}", out[b, t].item(),
               objective_by_hand(*entry, *settings))


def objective_gradient(log_ratio, advantage, off):
    logps = torch.tensor([[float(log_ratio)]], requires_grad=True)
    ampo.policy_objective(logps, torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([off])).sum().backward()
    return logps.grad.item()


class Test_policy_objective:
    def test_equals_the_formula_entry_by_entry(self):
        torch.manual_seed(0)
        logps, old = -3 * torch.rand(40, 6), -3 * torch.rand(40, 6)
        advantages, off = torch.randn(40), torch.rand(40) < 0.5
        out = ampo.policy_objective(logps, old, advantages, off)
        expect_entries("ε = 0.2 and γ = 0.1 where none are given", out, logps, old, advantages, off)

    def test_advantages_may_be_given_per_token(self):
        torch.manual_seed(0)
        logps, old, advantages = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
        off = torch.tensor([False, True])
        out = ampo.policy_objective(logps, old, advantages, off, clip=0.1, gamma=0.3)
        expect_entries("one advantage a token, ε = 0.1, γ = 0.3", out, logps, old, advantages, off, 0.1, 0.3)

    @pytest.mark.parametrize("log_ratio, advantage, flows", [
        (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.0, 1.0, True),
        (0.0, -1.0, True)])
    def test_mistake_4_the_clip_takes_the_smaller_side_for_both_signs(self, log_ratio, advantage, flows):
        """With max for min, a bad token whose probability already grew would stop being pushed down."""
        expect(f"on-policy, log ratio {log_ratio}, A = {advantage}: the gradient {'flows' if flows else 'is clipped'}",
               objective_gradient(log_ratio, advantage, False), math.exp(log_ratio) * advantage if flows else 0.0)

    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    def test_off_policy_gradient_has_the_sign_of_the_advantage(self, advantage):
        """The surrogate often copied as A/(ratio+γ) has the opposite one."""
        for log_ratio in (-6.0, -2.0, 0.0, 2.0):
            p = math.exp(log_ratio)
            expect(f"off-policy, log ratio {log_ratio}, A = {advantage}: the gradient of A·x/(x+γ)",
                   objective_gradient(log_ratio, advantage, True), advantage * p * 0.1 / (p + 0.1) ** 2)

    def test_extreme_ratios_stay_finite(self):
        logps = torch.tensor([[0.0, -200.0]], requires_grad=True)
        for off in (True, False):
            out = ampo.policy_objective(logps, torch.tensor([[-200.0, 0.0]]), torch.tensor([1.0]), torch.tensor([off]))
            out.sum().backward()
            expect(f"log ratios of 200 and -200, off-policy {off}: objective and gradient are finite",
                   (torch.isfinite(out).all().item(), torch.isfinite(logps.grad).all().item()), (True, True))


# ---------------------------------------------------------------------------------------------------------------------
# §7 Guidance


def all_examples():
    """Docstrings by name of the public functions of §6 and §7, of the reference: the file under test may lack them."""
    source = (HERE / "ampo.py").read_text(encoding="utf-8")
    first, last = (source[:source.index(title)].count("\n") for title in ("# §6 The objective", "# §8 The loop"))
    return {node.name: ast.get_docstring(node) or "" for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and first < node.lineno < last and node.name[0] != "_"}


EXAMPLES = all_examples()


@pytest.fixture(scope="module")
def example_names(base_model, tokenizer):
    texts = {"undo": "3*(4*x+2)-4=20\n3*(4*x+2)=24\n4*x+2=8\n4*x=6\n", "work": "20+4=24\n24/3=8\n8-2=6\n",
             "secant": "0: 0,2,6,2\n1: 4,6,18,14\n(20-2)/(14-2)\n"}
    teachers = {name: text + RIGHT for name, text in texts.items()}
    question = "Solve 3*(4*x+2)-4=20."
    student = ampo.Student(base_model, base_model, tokenizer, torch.nn.Linear(base_model.config.hidden_size, 1),
                           [tokenizer.eos_token_id], ampo.Config(group_size=4))
    return {"student": student, "wrong": sample_of([8, 1], [7], 0.1, False), "right": sample_of([8, 1], [7]),
            "problem": ampo.Problem(question, "3/2", teachers, question + "\nHint: the steps give 24, 8.",
                                    teachers["work"])}


class TestWorkedExamples:
    """Every function of §6 and §7 has a worked example, and each comes out as written."""

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_comes_out_as_written(self, example_names, name):
        example = doctest.DocTestParser().get_doctest(EXAMPLES[name], vars(ampo) | example_names, name, None, None)
        assert example.examples, f"the docstring of {name} in the reference has a worked example"
        torch.manual_seed(0)
        said = []
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
        if runner.run(example, out=said.append).failed:
            lines = "".join(said).splitlines()[2:]  # without stars and line number
            pytest.fail(f"the worked example of {name} comes out differently\n" + "\n".join(lines), pytrace=False)


class Test_rollout:
    QUESTIONS = [f"Solve {a}*x={'17' * (1 + 6 * (a % 4))}." for a in range(2, 13)]

    @pytest.mark.parametrize("cache_tokens, size", [(1, 1), (4 * 2, 1), (2.5, 2), (3, 3), (5, 5), (40000, 11)])
    def test_a_pass_holds_no_more_than_the_cache(self, make_student, monkeypatch, tokenizer, cache_tokens, size):
        prompts = [prompt_of(tokenizer, question) for question in self.QUESTIONS]
        row = 4 * (max(map(len, prompts)) + 10)
        budget = cache_tokens if cache_tokens in (1, 8, 40000) else int(cache_tokens * row)
        student, calls, generate = make_student(max_new_tokens=10, cache_tokens=budget), [], ampo.generate
        monkeypatch.setattr(ampo, "generate", lambda model, prompts, *rest, **more: (
            calls.append(prompts), generate(model, prompts, *rest, **more))[1])
        problems = [ampo.Problem(question, "1") for question in self.QUESTIONS]
        student.sampled = 5
        groups = ampo.rollout(student, problems, self.QUESTIONS)
        case = f"11 prompts, of {row} tokens with their 4 rollouts, --cache_tokens {budget}"
        expect(f"{case}: prompts of each pass", [len(call) for call in calls],
               [size] * (11 // size) + [11 % size] * (11 % size > 0))
        expect(f"{case}: all prompts in their order", sum(calls, []), prompts)
        assert all(len(call) * row <= max(budget, row) for call in calls), f"{case}: no pass holds more"
        expect(f"{case}: rollouts of each", [len(group) for group in groups], [4] * 11)
        for group, prompt in zip(groups, prompts):
            for s in group:
                expect("a rollout trains on the prompt it was sampled with", s.prompt, prompt)
                expect("old_logps are the sampler's log-probabilities", list(s.old_logps),
                       full_logps(student.model, prompt, s.ids), 2e-4)
        expect("student.sampled was 5, and grows by the tokens of all rollouts", student.sampled,
               5 + sum(len(s.ids) for group in groups for s in group))

    def test_no_problems_no_passes(self, make_student):
        student = make_student()
        expect("no problems: no groups, no tokens", (ampo.rollout(student, [], []), student.sampled), ([], 0))

    @pytest.mark.parametrize("flags", [dict(system="Be brief."), dict(temperature=0.6)], ids=["system", "temperature"])
    def test_samples_as_it_was_configured(self, make_student, tokenizer, flags):
        student = make_student(max_new_tokens=6, group_size=3, **flags)
        student.eos = []
        torch.manual_seed(0)
        group, = ampo.rollout(student, [problem()], ["x?"])
        expect("max_new_tokens 6 and no end token: tokens of each", [len(s.ids) for s in group], [6] * 3)
        prompt = prompt_of(tokenizer, "x?", flags.get("system", ""))
        expect(f"group_size 3, {flags}: prompts of the group", [s.prompt for s in group], [prompt] * 3)
        for s in group:
            expect(f"{flags}: log-probabilities of the distribution that was drawn from", list(s.old_logps),
                   full_logps(student.model, prompt, s.ids, flags.get("temperature", 1.0)), 2e-4)

    def test_ends_at_any_end_token_and_samples_with_the_sampler(self, make_student, tokenizer):
        student = make_student(max_new_tokens=4, group_size=2)
        student.eos, student.model = list(range(len(tokenizer))), None
        group, = ampo.rollout(student, [problem()], ["x?"])
        expect("every token is an end token, and student.model is not asked: tokens of each rollout",
               [len(s.ids) for s in group], [1, 1])

    def test_verifies_and_rewards(self, make_student, scripted, tokenizer):
        scripted(lambda prompt, i: [RIGHT, WRONG, "no answer", "\\boxed{3/2"][i])
        group, = ampo.rollout(make_student(), [problem()], [PROBLEM["question"]])
        case = "rollouts: right, wrong, without an answer, with one cut off"
        expect(f"{case}: correct", [s.correct for s in group], [True, False, False, False])
        expect(f"{case}: reward", [s.reward for s in group], [1.0, 0.1, 0.0, 0.0])
        prompt = prompt_of(tokenizer, PROBLEM["question"])
        expect(f"{case}: prompt, source, off-policy", [(s.prompt, s.source, s.off_policy) for s in group],
               [(prompt, "student", False)] * 4)
        expect("the end-of-sequence token belongs to the response", group[0].ids[-1], tokenizer.eos_token_id)
        expect("old_logps come with the rollout", group[0].old_logps, [-0.5] * len(group[0].ids))

    def test_each_problem_has_its_own_message_and_answer(self, make_student, scripted):
        scripted(lambda prompt, i: RIGHT if "first" in prompt else WRONG)
        problems = [problem(), problem(answer="5"), problem(answer="5")]
        groups = ampo.rollout(make_student(), problems, ["first", "first", "other"])
        expect("says 3/2 to the message 'first' and else 5; answers 3/2, 5, 5; messages first, first, other: correct",
               [[s.correct for s in group] for group in groups], [[True] * 4, [False] * 4, [True] * 4])


class Test_judge:
    @pytest.mark.parametrize("text, correct, reward", [
        (RIGHT, True, 1.0), ("so <answer>1.5</answer>", True, 1.0), (WRONG, False, 0.1), ("no answer", False, 0.0),
        ("3/2", False, 0.0), ("\\boxed{3/2", False, 0.0), (f"{RIGHT} {WRONG}", False, 0.1), ("", False, 0.0)])
    def test_rewards_a_right_answer_and_any_answer(self, make_student, tokenizer, text, correct, reward):
        ids = ids_of(tokenizer, text) + [tokenizer.eos_token_id]
        s = ampo.judge(make_student(), problem(), [7, 8], ids, [-0.5] * len(ids))
        expect(f"response {text!r} to a problem whose answer is 3/2: correct, reward", (s.correct, float(s.reward)),
               (correct, reward))
        expect(f"response {text!r}: prompt, ids, old_logps as given, text without the end token, source, off-policy",
               (s.prompt, s.ids, s.old_logps, s.text, s.source, s.off_policy),
               ([7, 8], ids, [-0.5] * len(ids), text, "student", False))


class Test_needs_guidance:
    @pytest.mark.parametrize("rights, fail, half", [
        ([0, 0, 0, 0], True, True), ([0, 0, 1, 0], False, True), ([1, 0, 1, 0], False, False),
        ([1, 1, 1, 1], False, False), ([0, 1, 0, 0, 1], False, True), ([0], True, True), ([1], False, False)])
    def test_looks_at_the_share_of_right_ones(self, rights, fail, half):
        group = group_of(*rights)
        case = f"a group of {len(rights)} with {sum(rights)} right, trigger"
        for name, wanted in (("fail", fail), ("half", half), ("always", True)):
            expect(f"{case} {name!r}", bool(ampo.needs_guidance(group, name)), wanted)
        expect(f"{case} not given: that is 'fail'", bool(ampo.needs_guidance(group)), fail)


class Test_teacher_samples:
    def test_are_the_traces_with_an_end_token_and_probability_one(self, make_student, tokenizer):
        student = make_student()
        student.eos = [tokenizer.eos_token_id, 9]
        samples = ampo.teacher_samples(student, problem())
        expect("traces of three teachers: sources in the order of the file", [s.source for s in samples],
               ["one", "two", "three"])
        for s in samples:
            text = PROBLEM["teachers"][s.source]
            expect(f"trace {text!r}, end tokens [1, 9]: its tokens and the first end token", s.ids,
                   ids_of(tokenizer, text) + [tokenizer.eos_token_id])
            expect(f"trace {text!r}: prompt, text, off-policy, correct, reward, old_logps",
                   (s.prompt, s.text, s.off_policy, s.correct, s.reward, s.old_logps),
                   (prompt_of(tokenizer, PROBLEM["question"]), text, True, True, 1.0, [0.0] * len(s.ids)))

    def test_v1_forces_the_reward_of_a_trace_and_v2_looks_at_its_answer(self, make_student):
        unlike = problem(teachers={"one": WRONG, "two": RIGHT})
        for trigger, rewards in (("fail", [1.0, 1.0]), ("always", [1.0, 1.0]), ("half", [0.0, 1.0])):
            samples = ampo.teacher_samples(make_student(trigger=trigger), unlike)
            expect(f"a wrong and a right trace, trigger {trigger!r}: rewards", [s.reward for s in samples], rewards)
            expect(f"a wrong and a right trace, trigger {trigger!r}: correct", [bool(s.correct) for s in samples],
                   [reward == 1 for reward in rewards])

    def test_traces_too_long_or_empty_stay_out(self, make_student):
        student = make_student(max_new_tokens=12)
        texts = {"one": "2*x=3\n" * 9 + RIGHT, "two": RIGHT, "three": ""}
        expect("a trace of over 12 tokens, a short one, an empty one, with max_new_tokens = 12: sources",
               [s.source for s in ampo.teacher_samples(student, problem(teachers=texts))], ["two"])

    def test_a_trace_may_be_as_long_as_the_student_may_write(self, make_student, tokenizer):
        size = len(ids_of(tokenizer, RIGHT)) + 1
        for room, sources in ((size, ["two"]), (size - 1, [])):
            samples = ampo.teacher_samples(make_student(max_new_tokens=room), problem(teachers={"two": RIGHT}))
            expect(f"a trace of {size} tokens with its end token, max_new_tokens = {room}: sources",
                   [s.source for s in samples], sources)

    def test_no_teachers_no_samples(self, make_student):
        expect("a problem without teachers", ampo.teacher_samples(make_student(), problem(teachers={})), [])

    def test_has_the_system_message_and_without_another_start(self, make_student, tokenizer):
        student = make_student(system="Be brief.")
        student.tokenizer = with_start_token(tokenizer)
        s = ampo.teacher_samples(student, problem())[0]
        expect("prompt with --system 'Be brief.'", s.prompt, prompt_of(tokenizer, PROBLEM["question"], "Be brief."))
        expect("a tokenizer that begins texts with a token of its own: no such token begins a response",
               s.ids[0] == 2, False)


def comprehension_by_hand(model, tokenizer, before, answer, follow="code", system=""):
    """r_p of one trace that was cut after `before`."""
    start, whole = ids_of(tokenizer, before), ids_of(tokenizer, before + answer)
    same = [a == b for a, b in zip(start, whole)] + [False]
    prompt, cut = prompt_of(tokenizer, PROBLEM["question"], system), same.index(False)
    logps = full_logps(model, prompt + whole[:cut], whole[cut:])
    return math.exp(statistics.mean(logps)) if follow == "paper" else statistics.mean(map(math.exp, logps))


@pytest.fixture(scope="module")
def reader(tokenizer):
    return random_model(len(tokenizer))


class Test_comprehension:
    def test_is_the_probability_of_the_gold_answer_after_the_cut_trace(self, reader, tokenizer):
        trace, before = "first \\boxed{7} then\n2*x=3\n\\boxed{9/4}", "first \\boxed{7} then\n2*x=3\n\\boxed{"
        code, paper = (comprehension_by_hand(reader, tokenizer, before, "3/2", how) for how in ("code", "paper"))
        assert abs(code / paper - 1) > 0.01  # else the test would tell nothing
        for more, mean, wanted in (([], "arithmetic", code), (["code"], "arithmetic", code),
                                   (["paper"], "geometric", paper)):
            expect(f"trace {trace!r}, follow {more}: {mean} mean of the probabilities of the tokens of 3/2 after the "
                   "last mark", ampo.comprehension(reader, tokenizer, problem(), [trace], *more), [wanted], 1e-6)

    @pytest.mark.parametrize("follow", ["code", "paper"])
    def test_a_token_may_span_mark_and_answer(self, tokenizer, follow):
        """With a token for "{\\frac3", the answer has more tokens after <answer> than after \\boxed{."""
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["{\\frac3"])
        reader, gold = random_model(len(tokenizer)), "\\frac32"
        befores = ["2*x=3\n\\boxed{", "2*x=3\n<answer>", "\\boxed{1} \\boxed{"]
        got = ampo.comprehension(reader, tokenizer, problem(answer=gold), [b + "7}" for b in befores], follow)
        wanted = [comprehension_by_hand(reader, tokenizer, b, gold, follow) for b in befores]
        expect(f"answer {gold!r} after {befores}, where '{{\\frac3' is one token: from the first token that differs",
               got, wanted, 1e-6)

    def test_what_stands_in_the_box_does_not_count(self, reader, tokenizer):
        traces = ["2*x=3 \\boxed{3/2}", "2*x=3 \\boxed{99}"]
        a, b = ampo.comprehension(reader, tokenizer, problem(), traces)
        expect(f"traces {traces}: the second as much as the first", b, a, 1e-7)

    def test_without_a_mark_it_is_zero_and_answer_tags_count(self, reader, tokenizer):
        traces = ["no mark", "x <answer>3/2</answer>", "", "\\boxed{3/2}"]
        got = ampo.comprehension(reader, tokenizer, problem(), traces)
        expect(f"traces {traces}: no mark counts 0, others lie between 0 and 1",
               [r == 0 if i in (0, 2) else 0 < r < 1 for i, r in enumerate(got)], [True] * 4)
        expect("a single trace without a mark", ampo.comprehension(reader, tokenizer, problem(), ["no mark"]), [0.0])

    def test_a_system_message_comes_before_and_no_other_start(self, base_model, tokenizer):
        def ask(tokenizer, system): return ampo.comprehension(base_model, tokenizer, problem(), [RIGHT], "code", system)
        wanted = comprehension_by_hand(base_model, tokenizer, "\\boxed{", "3/2", system="Be brief.")
        expect("with a system message", ask(tokenizer, "Be brief."), [wanted], 1e-4)
        expect("a tokenizer that begins texts with a token of its own changes nothing",
               ask(with_start_token(tokenizer), "Be brief."), [wanted], 1e-4)

    def test_records_no_gradient(self, tokenizer):
        reader = random_model(len(tokenizer))
        passes = watched(reader)
        ampo.comprehension(reader, tokenizer, problem(), [RIGHT])
        assert passes and not any(grad for _, grad in passes), "the passes record no gradients"

    def test_tells_understood_from_confusing_traces_on_the_base_model(self, base_model, tokenizer):
        undo, nonsense = [], []
        for line in (HERE / "data" / "train.jsonl").read_text().splitlines()[:30]:
            row = json.loads(line)
            p = ampo.Problem(row["question"], row["answer"])
            a, b = ampo.comprehension(base_model, tokenizer, p, [row["teachers"]["undo"], "1+1=2\n\\boxed{2}"])
            undo.append(a), nonsense.append(b)
        # Even after nonsense the "/" and the divisor are easy to guess.
        assert statistics.mean(undo) > 0.9, "the base model understands traces of the teacher undo: mean over 0.9"
        assert statistics.mean(nonsense) < 0.7, "it guesses badly after nonsense: mean under 0.7"


@pytest.fixture
def understood(monkeypatch):
    """Replace comprehension: understood(r) makes it return r; the list it returns collects what it was asked."""
    def install(r):
        asked = []
        def comprehension(model, tokenizer, problem, traces, follow="code", system=""):
            asked.append((model, traces, follow, system))
            return r
        monkeypatch.setattr(ampo, "comprehension", comprehension)
        return asked
    return install


def bfloat16(x):
    """The nearest number of eight binary digits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


class Test_choose_traces:
    TWO = {"long": "2*x=3\n2*x=3\n\\boxed{3/2}", "short": "\\boxed{3/2}"}

    def test_takes_the_k_best_understood(self, make_student, understood):
        understood([0.2, 0.9, 0.8])
        for k, wanted in ((1, ["two"]), (2, ["two", "three"]), (3, ["two", "three", "one"]),
                          (9, ["two", "three", "one"])):
            got = [s.source for s in ampo.choose_traces(make_student(), problem(), k)]
            expect(f"teachers one, two, three understood 0.2, 0.9, 0.8, k = {k}", got, wanted)

    def test_ties_go_to_the_shorter_trace(self, make_student, understood):
        """0.900 and 0.901 are one number in the bfloat16 of the official ranking; the paper tells them apart."""
        for r, follow, wanted in (([0.901, 0.900], "code", "short"), ([0.901, 0.900], "paper", "long"),
                                  ([0.9, 0.9], "paper", "short"), ([0.95, 0.90], "code", "long")):
            understood(r)
            got = ampo.choose_traces(make_student(follow=follow), problem(teachers=self.TWO), 1)
            expect(f"a long and a short trace, understood {r}, follow {follow!r}", [s.source for s in got], [wanted])

    def test_the_official_ranking_is_coarse(self, make_student, understood):
        student, rng = make_student(), random.Random(0)
        for _ in range(150):
            high = rng.random()
            r = [high, high - 0.004 * rng.random() * high]
            understood(r)
            long, short = (bfloat16(0.9 * x + 0.1) for x in r)
            got = ampo.choose_traces(student, problem(teachers=self.TWO), 1)
            expect(f"a long and a short trace, understood {r}: ranked by 0.9·r_p + 0.1 in bfloat16",
                   [s.source for s in got], ["long" if long > short else "short"])

    def test_asks_the_sampler_as_it_was_configured(self, make_student, understood):
        student, asked = make_student(follow="paper", system="Be brief."), understood([0.2, 0.9, 0.8])
        student.sampler = object()
        ampo.choose_traces(student, problem(), 2)
        assert len(asked) == 1, "comprehension is called once, for all traces"
        assert asked[0][0] is student.sampler, "the model that is asked is the sampler"
        expect("comprehension is called with the traces' texts, follow and system", asked[0][1:],
               (list(PROBLEM["teachers"].values()), "paper", "Be brief."))

    def test_ranks_by_what_the_model_says(self, make_student, tokenizer):
        student = make_student(follow="paper")
        befores = {name: text[:text.index("{") + 1] for name, text in PROBLEM["teachers"].items()}
        r = {name: comprehension_by_hand(student.model, tokenizer, before, "3/2", "paper")
             for name, before in befores.items()}
        got = ampo.choose_traces(student, problem(), 2)
        expect("follow 'paper', a random model: sources", sources(got), sorted(r, key=r.get, reverse=True)[:2])
        expect("they are off-policy samples", [(s.off_policy, s.reward) for s in got], [(True, 1.0)] * 2)

    def test_no_teachers_no_traces(self, make_student):
        expect("a problem without teachers", ampo.choose_traces(make_student(), problem(teachers={}), 2), [])


def trace_of(source):
    return sample_of([7, 8, 9], source=source, off_policy=True, old_logps=[0.0] * 3)


def sources(group):
    return [sample.source for sample in group]


class Test_swap_in:
    def test_takes_the_place_of_as_many_wrong_ones(self):
        torch.manual_seed(0)
        group, traces = group_of(1, 0, 0, 1, 0), [trace_of("one"), trace_of("two")]
        out = ampo.swap_in(traces, group)
        expect("two traces into five rollouts: size, traces in it", (len(out), Counter(sources(out))),
               (5, Counter(student=3, one=1, two=1)))
        assert out[0] is group[0] and out[3] is group[3], "right rollouts stay where they are"
        assert sum(a is b for a, b in zip(out, group)) == 3, "the wrong rollout that is left stays where it is"

    def test_the_places_are_random_and_all_wrong_ones_serve(self):
        torch.manual_seed(0)
        group = group_of(0, 0, 1, 0, 0)
        seen = {tuple(sources(ampo.swap_in([trace_of("one"), trace_of("two")], group))) for _ in range(200)}
        expect("200 draws of two traces into four wrong rollouts of five: places, in both orders", len(seen), 12)

    def test_repeats_under_the_same_seed(self):
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append([sources(ampo.swap_in([trace_of("one")], group_of(*[0] * 8))) for _ in range(5)])
        expect("torch.manual_seed alone decides the places", draws[1], draws[0])

    def test_group_stays_as_it_was(self):
        group = group_of(0, 0)
        ampo.swap_in([trace_of("one")], group)
        expect("the list that was passed in is not changed", sources(group), ["student"] * 2)

    @pytest.mark.parametrize("rights, traces, wanted", [
        ([1, 1], 1, 0), ([1, 0], 2, 1), ([0, 0], 0, 0), ([0, 0], 2, 2)])
    def test_no_more_traces_than_wrong_ones(self, rights, traces, wanted):
        out = ampo.swap_in([trace_of("one")] * traces, group_of(*rights))
        expect(f"{traces} traces into a group of two with {sum(rights)} right: traces in it, size",
               (sum(s.off_policy for s in out), len(out)), (wanted, 2))


def guided(student, problems, groups):
    """What the method's guide makes of copies of the groups."""
    return ampo.METHODS[student.cfg.method].guide(student, problems, list(groups))


class Test_guide_grpo:
    def test_leaves_every_group_alone(self, make_student):
        groups = [group_of(0, 0, 0, 0), group_of(1, 0, 0, 0)]
        assert guided(make_student(method="grpo"), [problem()] * 2, groups) == groups, "both groups are as before"


class Test_guide_luffy:
    def test_a_trace_takes_slot_zero_of_every_group(self, make_student, tokenizer):
        prompt = prompt_of(tokenizer, PROBLEM["question"])
        groups = [group_of(1, 1, 1, 1, prompt=prompt), group_of(0, 0, 0, 0, prompt=prompt), group_of(0, 1)]
        right, wrong, bare = guided(make_student(method="luffy"), [problem(), problem(), problem(teachers={})], groups)
        trace = ids_of(tokenizer, PROBLEM["teachers"]["one"]) + [tokenizer.eos_token_id]
        for name, group, before in (("right", right, groups[0]), ("wrong", wrong, groups[1])):
            case = f"four {name} rollouts"
            expect(f"{case}: slot 0 has the first teacher's tokens, source, off-policy, old_logps, reward, prompt",
                   (group[0].ids, group[0].source, group[0].off_policy, group[0].old_logps, group[0].reward,
                    group[0].prompt), (trace, "one", True, [0.0] * len(trace), 1.0, prompt))
            assert group[1:] == before[1:], f"{case}: the other slots are as before"
        assert bare == groups[2], "without a teacher the group is as before"

    def test_its_on_policy_ratio_has_no_clip(self):
        expect("METHODS['luffy'].clipped", ampo.METHODS["luffy"].clipped, False)


class Test_guide_ampo:
    @pytest.fixture(autouse=True)
    def ranking(self, understood):
        understood([0.2, 0.9, 0.8])

    @pytest.mark.parametrize("k, wanted", [(1, {"two"}), (2, {"two", "three"}), (3, {"one", "two", "three"})])
    def test_swaps_k_traces_into_a_failed_group(self, make_student, k, wanted):
        before = group_of(0, 0, 0, 0)
        group, = guided(make_student(method="ampo", k=k), [problem()], [before])
        injected = [s for s in group if s.off_policy]
        case = f"four wrong rollouts, traces understood 0.2, 0.9, 0.8, k = {k}"
        expect(f"{case}: traces, size", ({s.source for s in injected}, len(group)), (wanted, 4))
        expect(f"{case}: old_logps, reward, correct of a trace", [(s.old_logps, s.reward, s.correct) for s in injected],
               [([0.0] * len(s.ids), 1.0, True) for s in injected])
        assert sum(s in before for s in group) == 4 - k, f"{case}: the others are rollouts of before"

    def test_k_is_two_where_none_is_given(self, make_student):
        group, = guided(make_student(method="ampo"), [problem()], [group_of(0, 0, 0, 0)])
        expect("no --k given: traces", {s.source for s in group if s.off_policy}, {"two", "three"})

    def test_replaces_random_failures(self, make_student):
        torch.manual_seed(0)
        student = make_student(method="ampo")
        groups = guided(student, [problem()] * 30, [group_of(0, 0, 0, 0) for _ in range(30)])
        slots = {tuple(s.off_policy for s in group) for group in groups}
        expect("30 failed groups of four: pairs of places that two traces took", len(slots), 6)

    def test_leaves_a_group_with_one_success_alone(self, make_student):
        groups = [group_of(0, 0, 0, 1)]
        assert guided(make_student(method="ampo"), [problem()], groups) == groups, "one right of four: as before"

    def test_each_group_gets_its_own_problems_traces(self, make_student, understood):
        understood([0.5])
        problems = [problem(teachers={name: RIGHT}) for name in ("a", "b", "c")]
        groups = guided(make_student(method="ampo", k=1), problems, [group_of(0, 0), group_of(1, 0), group_of(0, 0)])
        expect("wrong, half right, wrong, with teachers a, b, c: sources", [set(sources(group)) for group in groups],
               [{"student", "a"}, {"student"}, {"student", "c"}])

    @pytest.mark.parametrize("rights, injected", [
        ([0, 0, 0, 0], 2), ([1, 0, 0, 0], 1), ([1, 1, 0, 0], 0), ([1, 1, 1, 1], 0), ([0] * 5, 2),
        ([1, 0, 0, 0, 0, 0], 2)])
    def test_v2_fills_up_to_half(self, make_student, rights, injected):
        before = group_of(*rights)
        group, = guided(make_student(method="ampo", trigger="half", k=1), [problem()], [before])
        case = f"trigger 'half', {sum(rights)} right of {len(rights)}"
        expect(f"{case}: traces", sum(s.off_policy for s in group), injected)
        assert group[:sum(rights)] == before[:sum(rights)], f"{case}: right rollouts stay"

    def test_always_keeps_successes(self, make_student):
        group, = guided(make_student(method="ampo", trigger="always"), [problem()], [group_of(1, 1, 1, 0)])
        expect("trigger 'always', three right of four: sources", sources(group), ["student"] * 3 + ["two"])

    def test_without_teachers_leaves_the_group(self, make_student):
        groups = [group_of(0, 0, 0, 0)]
        assert guided(make_student(method="ampo"), [problem(teachers={})], groups) == groups, "no teachers: as before"


class Test_retry:
    def test_samples_anew_for_failed_groups_with_a_message(self, make_student, scripted, tokenizer):
        scripted(lambda prompt, i: f"\\boxed{{{i}}}" if "again" in prompt else WRONG)
        problems = [problem(hint="a"), problem(hint="b"), problem(hint=""), problem(hint="d", answer="2")]
        groups = [group_of(0, 1), group_of(0, 0), group_of(0, 0), group_of(0, 0)]
        fresh = ampo.retry(make_student(), problems, groups, lambda p: p.hint and f"again {p.hint}")
        case = "a group with a success, a failed one, one without a message, a failed one whose answer is 2"
        expect(f"{case}: indices and correct", {i: [s.correct for s in group] for i, group in fresh.items()},
               {1: [False] * 4, 3: [False, False, True, False]})
        expect(f"{case}: prompts", [group[0].prompt for group in fresh.values()],
               [prompt_of(tokenizer, "again b"), prompt_of(tokenizer, "again d")])
        assert [len(group) for group in groups] == [2] * 4, "the groups that were passed in are not changed"

    @pytest.mark.parametrize("trigger, wanted", [("fail", [2]), ("half", [1, 2]), ("always", [0, 1, 2])])
    def test_whom_it_asks_depends_on_the_trigger(self, make_student, scripted, trigger, wanted):
        scripted(lambda prompt, i: WRONG)
        groups = [group_of(1, 1, 0), group_of(0, 1, 0), group_of(0, 0, 0)]
        fresh = ampo.retry(make_student(), [problem()] * 3, groups, lambda p: p.hint, trigger)
        expect(f"2, 1 and 0 right of 3, trigger {trigger!r}: indices", list(fresh), wanted)

    def test_nothing_to_do_is_nothing_sampled(self, make_student, scripted):
        scripted(lambda prompt, i: WRONG)
        student = make_student()
        fresh = ampo.retry(student, [problem()], [group_of(1, 0)], lambda p: p.hint)
        expect("no group has failed: fresh ones, tokens sampled", (fresh, student.sampled), ({}, 0))


def by_hint(prompt, i):
    """A student that fails on the plain question and succeeds once in four with a hint."""
    return RIGHT if "Hint" in prompt and i == 1 else WRONG


class Test_guide_guide:
    def test_hinted_responses_serve_the_plain_prompt(self, make_student, scripted, tokenizer):
        scripted(by_hint)
        prompt = prompt_of(tokenizer, PROBLEM["question"])
        groups = [group_of(0, 0, 0, 0, prompt=prompt), group_of(0, 0, 0, 0), group_of(0, 1, 0, 0)]
        group, *others = guided(make_student(method="guide"), [problem(), problem(hint=""), problem()], groups)
        case = "four wrong rollouts, one of four right with the hint"
        expect(f"{case}: source, off-policy, prompt is the question's",
               [(s.source, s.off_policy, s.prompt == prompt) for s in group], [("hint", True, True)] * 4)
        expect(f"{case}: correct, reward", [(s.correct, s.reward) for s in group],
               [(i == 1, 1.0 if i == 1 else 0.1) for i in range(4)])
        expect(f"{case}: old_logps are the sampler's, under the hint", [s.old_logps for s in group],
               [[-0.5] * len(s.ids) for s in group])
        assert others == groups[1:], "without a hint, or with a success, the group is as before"

    def test_paper_lets_them_join_the_group(self, make_student, scripted):
        scripted(by_hint)
        before = group_of(0, 0, 0, 0)
        group, = guided(make_student(method="guide", follow="paper"), [problem()], [before])
        expect("follow 'paper': the four rollouts of before, then the four hinted ones; off-policy",
               [s.off_policy for s in group], [False] * 4 + [True] * 4)
        assert group[:4] == before, "follow 'paper': the four rollouts of before come first"

    @pytest.mark.parametrize("trigger, wanted", [("fail", [0, 1, 0]), ("half", [1, 1, 0]), ("always", [1, 1, 1])])
    def test_whom_it_guides_depends_on_the_trigger(self, make_student, scripted, trigger, wanted):
        scripted(by_hint)
        groups = [group_of(0, 1, 0, 0), group_of(0, 0, 0, 0), group_of(0, 1, 1, 1)]
        out = guided(make_student(method="guide", trigger=trigger), [problem()] * 3, groups)
        expect(f"1, 0 and 3 right of 4, trigger {trigger!r}: groups guided",
               [int(group[0].off_policy) for group in out], wanted)

    def test_denominator_is_taken_under_the_hint(self, make_student, tokenizer):
        """With real sampling: old_logps equal a full forward pass under the hint."""
        student = make_student(method="guide", max_new_tokens=6)
        student.eos = []
        torch.manual_seed(0)
        plain, hinted = prompt_of(tokenizer, PROBLEM["question"]), prompt_of(tokenizer, PROBLEM["hint"])
        group, = guided(student, [problem()], [group_of(0, 0, 0, 0, prompt=plain)])
        for s in group:
            expect("old_logps are those under the hint", s.old_logps, full_logps(student.model, hinted, s.ids), 1e-4)
            expect("the prompt to train on is the plain one", s.prompt, plain)


class Test_guide_ghpo:
    def test_climbs_the_ladder_and_stays_on_the_prompt_it_sampled_with(self, make_student, scripted, tokenizer):
        """'abcdefghij': rounds to 2, 5 and 8 characters. One problem is rescued at each rung, one at none."""
        calls = []
        answers = {"q1?": "ab", "q2?": "abcde", "q3?": "abcdefgh", "q4?": "never"}

        def says(prompt, i):
            name = next(n for n in answers if n in prompt)
            calls.append(name)
            return RIGHT if i == 0 and prompt.split("problem:\n")[-1].startswith(answers[name]) else WRONG
        scripted(says)
        problems = [problem(question=name) for name in answers]
        plain = [group_of(0, 0, 0, 0) for _ in answers]
        groups = guided(make_student(method="ghpo"), problems, plain)
        lead = ("\n The following text is the beginning part of the answer, "
                "which you can refer to for solving the problem:\n")
        for name, group in list(zip(answers, groups))[:3]:
            case = f"solution 'abcdefghij', solved once {answers[name]!r} is shown"
            expect(f"{case}: source, off-policy, correct", [(s.source, s.off_policy, s.correct) for s in group],
                   [("hint", False, i == 0) for i in range(4)])
            prompt = prompt_of(tokenizer, name + lead + answers[name])
            expect(f"{case}: the prompt is the one it was sampled with", [tokenizer.decode(s.prompt) for s in group],
                   [tokenizer.decode(prompt)] * 4)
            assert all(s.prompt == prompt for s in group), f"{case}: the prompt is the one it was sampled with"
        assert groups[3] == plain[3], "not solved with ¾ of the solution either: the group is as before"
        expect("fresh groups of each problem, which ends with the first success",
               {name: calls.count(name) // 4 for name in answers}, {"q1?": 1, "q2?": 2, "q3?": 3, "q4?": 3})

    def test_leaves_alone_what_needs_or_has_no_help(self, make_student, scripted):
        scripted(lambda prompt, i: RIGHT)
        groups = [group_of(0, 0, 0, 1), group_of(0, 0, 0, 0)]
        out = guided(make_student(method="ghpo"), [problem(), problem(solution="")], groups)
        assert out == groups, "with a success, or without a solution, the group is as before"


class Test_guide_sft:
    def test_takes_all_traces_of_all_teachers(self, make_student):
        groups = guided(make_student(method="sft"), [problem(), problem(teachers={}), problem(teachers={"x": RIGHT})],
                        [[], [], []])
        expect("problems with teachers one, two, three; with none; with x: sources", [sources(g) for g in groups],
               [["one", "two", "three"], [], ["x"]])
        expect("off-policy, old_logps", [(s.off_policy, set(s.old_logps)) for s in groups[0]], [(True, {0.0})] * 3)


# ---------------------------------------------------------------------------------------------------------------------
# §8 Updates


class Test_set_advantages:
    @pytest.mark.parametrize("rewards, wanted", [
        ([1.0, 0.1, 0.0, 0.0], [0.725, -0.175, -0.275, -0.275]),
        ([0.1, 1.0, 0.1, 0.1], [-0.225, 0.675, -0.225, -0.225]),
        ([1.0, 0.1, 0.1, 1.0], [0.45, -0.45, -0.45, 0.45]), ([1.0, 0.1, 0.1, 0.1], [0.675, -0.225, -0.225, -0.225]),
        ([0.1] * 4, [0.0] * 4)])
    def test_every_token_has_its_responses_advantage_over_the_group(self, make_student, rewards, wanted):
        others = [sample_of([5], reward=0.0), sample_of([6], reward=1.0)]
        group = [sample_of([5] * (i + 1), reward=reward, off_policy=i == 0) for i, reward in enumerate(rewards)]
        ampo.set_advantages(make_student(), [others, group])
        expect(f"rewards {rewards}, responses of 1, 2, 3 and 4 tokens: advantages", [s.advantages for s in group],
               [[a] * (i + 1) for i, a in enumerate(wanted)])
        expect("the other group has its own mean", [s.advantages for s in others], [[-0.5], [0.5]])

    def test_paper_divides_by_the_std(self, make_student):
        group = [sample_of([5, 6], reward=reward) for reward in (1.0, 0.0, 0.0, 0.0)]
        ampo.set_advantages(make_student(follow="paper"), [group])
        expect("rewards [1, 0, 0, 0], follow 'paper'", [s.advantages for s in group], [[1.5] * 2] + [[-0.5] * 2] * 3)

    def test_sft_gives_all_traces_equal_weight(self, make_student):
        groups = [[sample_of([5, 6], reward=reward, off_policy=True) for reward in (1.0, 0.0)], [sample_of([7])]]
        ampo.set_advantages(make_student(method="sft"), groups)
        expect("method sft: 1 for every token, whatever the rewards", [s.advantages for s in sum(groups, [])],
               [[1.0] * 2, [1.0] * 2, [1.0]])

    def test_an_empty_group_is_no_hindrance(self, make_student):
        pair = [sample_of([5], reward=0.0), sample_of([6], reward=1.0)]
        ampo.set_advantages(make_student(), [[], pair])
        expect("an empty group and one with rewards 0 and 1", [s.advantages for s in pair], [[-0.5], [0.5]])

    @pytest.mark.parametrize("lam", [0.9, 0.5])
    def test_with_a_value_head_they_come_from_its_values(self, make_student, lam):
        student = make_student(advantage="gae", lam=lam)
        torch.nn.init.normal_(student.critic.weight)
        samples = [sample_of([5, 6, 7], reward=0.7), sample_of([8], reward=0.1), sample_of([9, 4], [4, 3, 2], 0.0)]
        ampo.set_advantages(student, [samples[:2], samples[2:]])
        for s in samples:
            hidden = student.model.base_model(torch.tensor([s.prompt + s.ids])).last_hidden_state
            values = student.critic(hidden[0, len(s.prompt) - 1:-1])[:, 0].tolist()
            case = f"a response of {len(s.ids)} tokens with reward {s.reward}, --advantage gae, λ = {lam}"
            expect(f"{case}: values of the head on the state before each token", s.values, values, 1e-4)
            expect(f"{case}: advantages", s.advantages, gae_by_hand(values, s.reward, lam), 1e-4)

    def test_passes_keep_to_the_budget_and_record_no_gradient(self, make_student):
        student = make_student(advantage="gae", micro_tokens=10)
        passes = watched(student.model)
        ampo.set_advantages(student, [[sample_of([5, 6, 7]) for _ in range(4)]])
        expect("four samples of 5 tokens with --micro_tokens 10: rows of each pass, gradients recorded", passes,
               [(2, False)] * 2)
        passes = watched(other := make_student().model)
        ampo.set_advantages(make_student(), [[sample_of([5])]])
        expect("without --advantage gae no pass is needed", (passes, other is None), ([], False))


class Test_value_loss:
    def test_is_the_larger_of_clipped_and_plain_error(self):
        old, returns = torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([[1.0, 1.2, 0.0]])
        loss = ampo.value_loss(torch.tensor([[1.0, 1.0, 0.9]]), old, returns - old, clip=0.2)
        for t, (case, wanted) in enumerate([("right, yet clipped to 0.7 it misses by 0.3", 0.3**2 / 2),
                                            ("inside the clip, misses by 0.2", 0.2**2 / 2),
                                            ("outside, on the wrong side, misses by 0.9", 0.9**2 / 2)]):
            expect(case, loss[0, t], wanted)

    @pytest.mark.parametrize("value, old, advantage, wanted", [
        (-1.0, 0.0, -1.0, 0.7**2 / 2), (-1.0, 0.0, 1.0, 2.0**2 / 2), (0.1, 0.0, 2.0, 1.9**2 / 2),
        (-2.0, -2.0, 0.5, 0.5**2 / 2), (3.0, 2.0, 0.4, 0.6**2 / 2)])
    def test_of_one_token(self, value, old, advantage, wanted):
        loss = ampo.value_loss(*(torch.tensor([[x]]) for x in (value, old, advantage)), clip=0.3)
        expect(f"value {value}, was {old}, advantage {advantage} and so a return of {old + advantage}, ε = 0.3",
               loss[0, 0], wanted)


def mixed_samples():
    samples = [sample_of([5, 6, 7], advantages=[0.5] * 3), sample_of([8], advantages=[-0.3]),
               sample_of([9, 10, 11, 12, 13], prompt=[4], advantages=[0.8] * 5, off_policy=True, old_logps=[0.0] * 5),
               sample_of([14, 15], prompt=[4, 5, 6], advantages=[-0.5] * 2)]
    return samples


class Test_set_weights:
    def test_code_counts_all_sequences_at_their_longest(self):
        samples = mixed_samples()
        ampo.set_weights(samples, ampo.Config(max_new_tokens=40))
        expect("four samples, max_new_tokens = 40, follow 'code': 1/160 for each token", [s.weights for s in samples],
               [[1 / 160] * len(s.ids) for s in samples], 1e-9)

    def test_paper_averages_the_two_kinds_apart(self):
        samples = mixed_samples() + [sample_of([5, 6], off_policy=True)]
        ampo.set_weights(samples, ampo.Config(max_new_tokens=40, follow="paper"))
        expect("on-policy samples of 3, 1 and 2 tokens, off-policy ones of 5 and 2, follow 'paper'",
               [s.weights for s in samples], [[1 / 6] * 3, [1 / 6], [1 / 10] * 5, [1 / 6] * 2, [1 / 4] * 2], 1e-9)

    def test_one_kind_alone_and_none(self):
        for off, wanted in ((True, [[0.25] * 2, [0.5]]), (False, [[1 / 3] * 2, [1 / 3]])):
            samples = [sample_of([5, 6], off_policy=off), sample_of([5], off_policy=off)]
            ampo.set_weights(samples, ampo.Config(follow="paper"))
            expect(f"samples of 2 and 1 tokens, all off-policy {off}, follow 'paper'", [s.weights for s in samples],
                   wanted, 1e-9)
        ampo.set_weights([], ampo.Config())


class Test_micro_batches:
    def test_hold_every_sample_once_within_the_budget(self):
        rng = random.Random(0)
        samples = [sample_of([5] * rng.randint(1, 30), prompt=[4] * rng.randint(1, 20)) for _ in range(50)]
        batches = ampo.micro_batches(samples, 100)
        assert sorted(map(id, sum(batches, []))) == sorted(map(id, samples)), "every sample is in one batch"
        for batch in batches:
            longest = max(len(s.prompt) + len(s.ids) for s in batch)
            assert len(batch) == 1 or len(batch) * longest <= 100, "rows · longest stay within the budget of 100 tokens"

    @pytest.mark.parametrize("budget, wanted", [
        (24, [[6, 6, 5, 4], [4, 3]]), (23, [[6, 6, 5], [4, 4, 3]]), (1, [[6], [6], [5], [4], [4], [3]]),
        (12, [[6, 6], [5, 4], [4, 3]]), (15, [[6, 6], [5, 4, 4], [3]]), (1000, [[6, 6, 5, 4, 4, 3]])])
    def test_longest_first_as_many_as_fit(self, budget, wanted):
        sizes = [(1, 3), (3, 3), (2, 1), (2, 2), (1, 4), (4, 2)]  # tokens of prompt and response
        samples = [sample_of([5] * response, prompt=[4] * prompt) for prompt, response in sizes]
        got = [[len(s.prompt) + len(s.ids) for s in batch] for batch in ampo.micro_batches(samples, budget)]
        expect(f"samples of {[sum(pair) for pair in sizes]} tokens, budget {budget}: sizes of each batch", got, wanted)

    def test_no_samples_no_batches(self):
        expect("no samples", ampo.micro_batches([], 100), [])


class Test_score_samples:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_reads_responses_after_the_prompts_they_learn_from(self, make_student, temperature):
        student = make_student(temperature=temperature)
        batch = mixed_samples()
        with torch.no_grad():
            logps, mask, entropy, values = ampo.score_samples(student, batch)
        expect("samples of 3, 1, 5 and 2 tokens: tokens in the mask", mask.sum(1), [3, 1, 5, 2])
        for i, s in enumerate(batch):
            case = f"prompt {s.prompt}, response {s.ids}, temperature {temperature}"
            expect(f"{case}: log-probabilities", logps[i][mask[i]],
                   full_logps(student.model, s.prompt, s.ids, temperature), 1e-4)
            with torch.no_grad():
                logits = student.model(torch.tensor([s.prompt + s.ids])).logits[0, len(s.prompt) - 1:-1] / temperature
            expect(f"{case}: entropies", entropy[i][mask[i]],
                   torch.distributions.Categorical(logits=logits).entropy().tolist(), 1e-4)
        assert values is None, "without --advantage gae there are no values"

    def test_value_head_reads_states_and_does_not_move_the_model(self, make_student):
        student = make_student(advantage="gae")
        torch.nn.init.normal_(student.critic.weight)
        _, _, _, values = ampo.score_samples(student, [sample_of([5, 6])])
        hidden = student.model.base_model(torch.tensor([[2, 3, 5, 6]])).last_hidden_state[0, 1:-1]
        expect("values of the head on the state before each token", values.detach()[0],
               student.critic(hidden)[:, 0].tolist(), 1e-4)
        values.sum().backward()
        assert all(p.grad is None for p in student.model.parameters()), "no gradient from the head to the model"
        assert student.critic.weight.grad is not None, "a gradient to the head"


class Test_columns:
    def test_are_tensors_filled_up_with_zeros(self, make_student):
        batch = [sample_of([5, 6, 7], old_logps=[-1.0, -2.0, -3.0], advantages=[0.5, 0.6, 0.7]),
                 sample_of([8], old_logps=[-4.0], advantages=[0.8])]
        got = ampo.columns(make_student(), batch, "advantages old_logps ids")
        wanted = [[[0.5, 0.6, 0.7], [0.8, 0.0, 0.0]], [[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]], [[5, 6, 7], [8, 0, 0]]]
        expect("samples of 3 and 1 tokens, names 'advantages old_logps ids'", [x.tolist() for x in got], wanted)
        expect("one name: one tensor", [tuple(x.shape) for x in ampo.columns(make_student(), batch, "ids")], [(2, 3)])

    def test_a_field_that_nobody_filled_is_empty(self, make_student):
        got, = ampo.columns(make_student(), [sample_of([5, 6]), sample_of([7])], "values")
        expect("values without a value head: shape", tuple(got.shape), (2, 0))


def percentile_by_hand(numbers, q):
    numbers, position = sorted(numbers), q * (len(numbers) - 1)
    low = numbers[int(position)]
    return low + (position % 1) * (numbers[math.ceil(position)] - low)


class Test_guided_gamma:
    def test_is_the_90th_percentile_over_response_tokens_only(self, make_student):
        """Unequal lengths bring places without a token, whose ratio would be 1; the plain sample must not count."""
        student = make_student(method="guide")
        samples = [sample_of([5, 6, 7, 8, 9, 10, 11], old_logps=[0.0] * 7, off_policy=True),
                   sample_of([5], old_logps=[-0.5], off_policy=True), sample_of([5, 6], old_logps=[-9.0] * 2)]
        ratios = [math.exp(p - old) for s in samples[:2]
                  for p, old in zip(full_logps(student.model, s.prompt, s.ids), s.old_logps)]
        expect("off-policy responses of 7 and 1 tokens, an on-policy one with larger ratios",
               float(ampo.guided_gamma(student, samples)), percentile_by_hand(ratios, 0.9), 1e-6)

    def test_is_at_least_one_in_ten_thousand(self, make_student):
        tiny = [sample_of([5, 6], old_logps=[15.0] * 2, off_policy=True)]
        expect("ratios far below 1e-4", ampo.guided_gamma(make_student(), tiny), 1e-4, 1e-9)

    def test_without_guided_samples_it_is_the_configured_one(self, make_student):
        expect("no off-policy sample, --gamma 0.3", ampo.guided_gamma(make_student(gamma=0.3), [sample_of([5])]), 0.3)

    def test_passes_keep_to_the_budget_and_record_no_gradient(self, make_student):
        student = make_student(micro_tokens=10)
        passes = watched(student.model)
        ampo.guided_gamma(student, [sample_of([5, 6, 7], off_policy=i < 4) for i in range(6)])
        expect("four off-policy samples of 5 tokens with --micro_tokens 10: rows of each pass, gradients recorded",
               passes, [(2, False)] * 2)


def gradient_of(student, samples):
    """The gradient of one step, before clipping: SGD with lr 1 on a copy moves by it, shortened to norm 1."""
    before = [p.detach().clone() for p in student.model.parameters()]
    optimizer = torch.optim.SGD(student.model.parameters(), lr=1.0)
    stats = ampo.update(student, optimizer, samples)
    return [(b - p.detach()) * max(1, stats["grad_norm"]) for b, p in zip(before, student.model.parameters())], stats


def gradient_by_hand(model, samples, follow="code", clip=0.2, gamma=0.1, entropy_coef=0.001, temperature=1.0):
    """One sequence at a time, entropy from full logits; the weights of 'paper' are those of mixed_samples."""
    total, on_tokens = 0.0, 3 + 1 + 2
    for s in samples:
        logits = model(torch.tensor([s.prompt + s.ids])).logits[0, len(s.prompt) - 1:-1] / temperature
        logps = logits.log_softmax(-1)
        entropy, logps = -(logps.exp() * logps).sum(-1), logps.gather(1, torch.tensor(s.ids)[:, None])[:, 0]
        ratio, a = (logps - torch.tensor(s.old_logps)).exp(), torch.tensor(s.advantages)
        on = torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
        objective = (a * ratio / (ratio + gamma) if s.off_policy else on) + entropy_coef * entropy
        paper = 1 * len(s.ids) if s.off_policy else on_tokens
        weight = 1 / (len(samples) * 40 if follow == "code" else paper)
        total = total - weight * objective.sum()
    total.backward()
    return [p.grad for p in model.parameters()]


def norm_of(tensors):
    return math.sqrt(sum(x.pow(2).sum().item() for x in tensors))


def expect_gradient(case, got, wanted, tolerance=1e-3):
    """The distance of two gradients, relative to their size."""
    distance = norm_of([a - b for a, b in zip(got, wanted)]) / (norm_of(wanted) or 1)
    if not distance < tolerance:
        pytest.fail(f"{case}\n    expected a gradient of norm {norm_of(wanted):.5g}\n    got one of norm "
                    f"{norm_of(got):.5g}, which is {100 * distance:.3g} % away from it", pytrace=False)


class Test_update:
    @pytest.mark.parametrize("flags", [
        {}, dict(follow="paper"), dict(clip=0.05), dict(gamma=0.4), dict(entropy_coef=0.2), dict(temperature=0.7)],
        ids=lambda flags: "-".join(f"{name}={value}" for name, value in flags.items()) or "defaults")
    def test_gradient_is_that_of_the_written_objective(self, make_student, flags):
        student, twin = make_student(**flags), make_student().model
        samples = mixed_samples()
        exact = full_logps(twin, [2, 3], [5, 6, 7], flags.get("temperature", 1.0))
        samples[0].old_logps = [p - math.log(ratio) for p, ratio in zip(exact, (1.1, 0.9, 1.4))]
        wanted = gradient_by_hand(twin, samples, **flags)
        gradient, stats = gradient_of(student, samples)
        case = f"three on-policy samples and an off-policy one, {flags or 'default flags'}"
        expect_gradient(f"{case}: gradient", gradient, wanted)
        expect(f"{case}: grad_norm", stats["grad_norm"], norm_of(wanted), 1e-6)

    @pytest.mark.parametrize("follow", ["code", "paper"])
    def test_mistake_2_gradient_does_not_depend_on_the_passes(self, make_student, follow):
        whole, stats = gradient_of(make_student(follow=follow), mixed_samples())
        student = make_student(follow=follow, micro_tokens=1)
        passes = watched(student.model)
        parts, part_stats = gradient_of(student, mixed_samples())
        expect("--micro_tokens 1: rows of each pass", [rows for rows, _ in passes], [1] * 4)
        expect_gradient("four micro-batches against one: gradient", parts, whole)
        # mistake 11: the statistics are those of all micro-batches, not of the last one
        for name in ("tokens", "clipped", "gap", "grad_norm"):
            expect(f"four micro-batches against one: {name}", part_stats[name], stats[name], 1e-6)
        expect("on-policy tokens", stats["tokens"], 6)

    def test_samples_without_advantage_count_in_the_normaliser_only(self, make_student):
        silent = [sample_of([5, 6], advantages=[0.0] * 2) for _ in range(4)]
        alone, _ = gradient_of(make_student(), mixed_samples())
        student = make_student()
        passes = watched(student.model)
        diluted, _ = gradient_of(student, mixed_samples() + silent)
        expect_gradient("four samples and four without advantage: half the gradient", diluted, [a / 2 for a in alone])
        expect("samples without advantage cost no forward pass: rows", sum(rows for rows, _ in passes), 4)

    def test_one_token_with_an_advantage_is_enough(self, make_student):
        samples, twin = [sample_of([5, 6], advantages=[0.0, 1.0]), *mixed_samples()[1:]], make_student().model
        wanted = gradient_by_hand(twin, samples)
        expect_gradient("advantages [0, 1] of a sample: it counts", gradient_of(make_student(), samples)[0], wanted)

    @pytest.mark.parametrize("clip, clipped", [(0.2, 1), (0.05, 2), (0.5, 0)])
    def test_clip_statistics_count_on_policy_tokens_outside_the_clip(self, make_student, clip, clipped):
        student = make_student(clip=clip)
        exact = full_logps(student.model, [2, 3], [5, 6, 7])
        shifted = [exact[0], exact[1] + 0.5, exact[2] - 0.1]  # ratios 1, 0.61, 1.11
        stats = ampo.update(student, torch.optim.SGD(student.model.parameters(), lr=0.0), [
            sample_of([5, 6, 7], old_logps=shifted, advantages=[1.0] * 3),
            sample_of([8, 9, 10, 11], old_logps=[0.0] * 4, advantages=[1.0] * 4, off_policy=True)])
        case = f"ratios 1, 0.61, 1.11 with ε = {clip}, and an off-policy sample"
        expect(f"{case}: tokens, clipped", (stats["tokens"], stats["clipped"]), (3, clipped))
        expect(f"{case}: gap, the sum of |log ratio|", stats["gap"], 0.6, 1e-3)

    def test_mistake_8_without_signal_nothing_moves(self, make_student):
        student = make_student()
        before = [p.detach().clone() for p in student.model.parameters()]
        optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.1, weight_decay=0.1)
        for samples in ([], [sample_of([5], advantages=[0.0])]):
            expect(f"{len(samples)} samples, none with an advantage: statistics",
                   ampo.update(student, optimizer, samples), {"grad_norm": 0, "tokens": 0, "clipped": 0, "gap": 0})
        assert all(torch.equal(b, p) for b, p in zip(before, student.model.parameters())), "the weights do not move"

    def test_mistake_8_a_gradient_that_is_not_finite_skips_the_step(self, make_student, capsys):
        student = make_student()
        before = [p.detach().clone() for p in student.model.parameters()]
        optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.1)
        poisoned = sample_of([5, 6], advantages=[float("nan"), 1.0])
        expect("an advantage is nan: grad_norm", ampo.update(student, optimizer, [poisoned])["grad_norm"], None)
        assert "not finite" in "".join(capsys.readouterr()), "an advantage is nan: a message says 'not finite'"
        assert all(torch.equal(b, p) for b, p in zip(before, student.model.parameters())), "the weights do not move"
        assert ampo.update(student, optimizer, mixed_samples())["grad_norm"] > 0, "and the next one works"
        assert all(torch.isfinite(p).all() for p in student.model.parameters()), "with finite weights"

    def test_each_step_begins_without_the_gradient_of_the_last(self, make_student):
        student = make_student()
        ampo.update(student, torch.optim.SGD(student.model.parameters(), lr=0.0), mixed_samples())
        first, _ = gradient_of(make_student(), mixed_samples())
        expect_gradient("the same step twice, the first with lr 0: gradient of the second",
                        gradient_of(student, mixed_samples())[0], first)

    def test_gradients_are_clipped_to_norm_one(self, make_student):
        student = make_student()
        before = [p.detach().clone() for p in student.model.parameters()]
        steep = [sample_of([5, 6, 7], old_logps=full_logps(student.model, [2, 3], [5, 6, 7]), advantages=[-1e4] * 3)]
        stats = ampo.update(student, torch.optim.SGD(student.model.parameters(), lr=1.0), steep)
        assert stats["grad_norm"] > 10, "advantages of -10000: grad_norm is that before clipping"
        moved = norm_of([b - p.detach() for b, p in zip(before, student.model.parameters())])
        expect("advantages of -10000, SGD with lr 1: the weights move by", moved, 1.0, 1e-2)

    @pytest.mark.parametrize("method, clip, flows", [("grpo", 0.2, False), ("grpo", 2.0, True), ("luffy", 0.2, True)])
    def test_luffy_does_not_clip_on_policy(self, make_student, method, clip, flows):
        """A ratio of e with A > 0: clipped methods get no gradient from it, LUFFY does."""
        student = make_student(method=method, clip=clip, entropy_coef=0.0)
        old = [p - 1 for p in full_logps(student.model, [2, 3], [5, 6])]
        _, stats = gradient_of(student, [sample_of([5, 6], old_logps=old, advantages=[1.0] * 2)])
        norm, rule = stats["grad_norm"], "over 1e-4" if flows else "0"
        assert (norm > 1e-4) if flows else norm == 0, f"ratio e, A = 1, method {method}, ε = {clip}: a gradient {rule}"

    def test_sft_gradient_is_that_of_the_log_likelihood(self, make_student):
        student, twin = make_student(method="sft", entropy_coef=0.2), make_student().model
        s = sample_of([5, 6, 7], advantages=[1.0] * 3, off_policy=True, old_logps=[0.0] * 3)
        logits = twin(torch.tensor([s.prompt + s.ids])).logits[0, 1:-1].log_softmax(-1)
        (-logits.gather(1, torch.tensor(s.ids)[:, None]).sum() / 40).backward()
        expect_gradient("method sft: the log-likelihood's gradient, without an entropy bonus",
                        gradient_of(student, [s])[0], [p.grad for p in twin.parameters()])

    @pytest.mark.parametrize("advantage", [0.7, -0.7])
    def test_guide_gradient_is_that_of_the_shaped_ratio_with_a_detached_gamma(self, make_student, advantage):
        student, twin = make_student(method="guide", entropy_coef=0.0), make_student().model
        s = sample_of([5, 6, 7], old_logps=[-2.0, -3.0, -1.0], advantages=[advantage] * 3, off_policy=True)
        ratios = [math.exp(p - old) for p, old in zip(full_logps(twin, s.prompt, s.ids), s.old_logps)]
        wanted = gradient_by_hand(twin, [s], gamma=percentile_by_hand(ratios, 0.9), entropy_coef=0.0)
        expect_gradient(f"method guide, A = {advantage}: γ is the 90th percentile of the ratio, and has no gradient",
                        gradient_of(student, [s])[0], wanted)

    @pytest.mark.parametrize("clip, flows", [(5.0, True), (0.2, False)])
    def test_value_head_follows_the_gradient_of_its_error(self, make_student, clip, flows):
        """The head says 1 and said 0 before the step, the return is 2: clipped to 0.2, it is pushed no further."""
        student = make_student(advantage="gae", clip=clip)
        torch.nn.init.ones_(student.critic.bias)
        s = sample_of([5, 6, 7], values=[0.0] * 3, advantages=[2.0] * 3)
        ampo.update(student, torch.optim.SGD(student.critic.parameters(), lr=1.0), [s])
        expect(f"the head says 1, said 0, return 2, ε = {clip}, 3 tokens of weight 1/40: its bias moves by",
               student.critic.bias.item() - 1, 3 / 40 if flows else 0.0)

    def test_value_head_learns_to_predict_the_reward(self, make_student):
        student = make_student(advantage="gae", clip=10.0)
        optimizer = torch.optim.Adam(student.critic.parameters(), lr=0.05)
        samples = [sample_of([5, 6], reward=0.8), sample_of([9], reward=0.8)]
        with torch.no_grad():  # only the head learns, so that the states stay
            states = [student.model.base_model(torch.tensor([s.prompt + s.ids])).last_hidden_state[0, 1:-1]
                      for s in samples]
        for _ in range(100):
            for s, state in zip(samples, states):
                s.values = student.critic(state)[:, 0].tolist()
                s.advantages = gae_by_hand(s.values, s.reward, 0.95)
            ampo.update(student, optimizer, samples)
        expect("reward 0.8 a hundred times: the head's values", samples[0].values, [0.8, 0.8], 0.1)

    def test_sampler_of_its_own_becomes_a_copy_of_the_weights(self, make_student):
        student = make_student()
        student.sampler = copy.deepcopy(student.model).bfloat16()
        ampo.update(student, torch.optim.SGD(student.model.parameters(), lr=1.0), mixed_samples())
        assert all(torch.equal(low, master.bfloat16()) for low, master in zip(
            student.sampler.parameters(), student.model.parameters())), "its weights are the model's, in bfloat16"

    @pytest.fixture
    def two_processes(self, monkeypatch):
        """As if another process took part: two_processes(other) has it add `other(gradient)` to each gradient."""
        def install(other):
            reduced = []
            def all_gather_object(values, value): values[:] = [value, 4 if value == 0 else value]
            def all_reduce(gradient): reduced.append(gradient.shape), gradient.add_(other(gradient))
            patches = dict(is_initialized=lambda: True, get_world_size=lambda: 2, all_gather_object=all_gather_object,
                           all_reduce=all_reduce)
            for name, function in patches.items(): monkeypatch.setattr(torch.distributed, name, function)
            return reduced
        return install

    def test_two_processes_add_their_gradients(self, make_student, two_processes):
        """Each with the same samples: both together do what one does alone with them."""
        alone, _ = gradient_of(make_student(), mixed_samples())
        reduced = two_processes(lambda gradient: gradient)
        student = make_student()
        both, _ = gradient_of(student, mixed_samples())
        expect_gradient("twice the samples, on two processes: gradient", both, alone)
        expect("the gradients of all weights are added up", reduced, [p.shape for p in student.model.parameters()])

    def test_a_process_without_signal_still_takes_part(self, make_student, two_processes):
        two_processes(torch.ones_like)
        student = make_student()
        gradient, _ = gradient_of(student, [sample_of([5], advantages=[0.0])])
        expect_gradient("the other process alone has a gradient, of ones", gradient,
                        [torch.ones_like(g) for g in gradient])


# ---------------------------------------------------------------------------------------------------------------------
# §8 Epochs, metrics, evaluation


def all_indices(total, steps, **flags):
    cfg = ampo.Config(**flags)
    return [i for step in range(steps) for i in ampo.batch_indices(total, step, cfg)]


class Test_batch_indices:
    @pytest.mark.parametrize("total, n", [(12, 4), (7, 3), (3, 7), (5, 5), (1, 2), (10, 1)])
    def test_mistake_10_every_epoch_takes_every_problem_once(self, total, n):
        """Whole epochs, however the steps cut them, and also where a step is longer than an epoch."""
        cfg = ampo.Config(prompts_per_step=n)
        steps = [ampo.batch_indices(total, step, cfg) for step in range(3 * total)]
        case = f"{total} problems, {n} a step"
        expect(f"{case}: problems of each step", {len(step) for step in steps}, {n})
        order = sum(steps, [])
        epochs = [order[i:i + total] for i in range(0, len(order), total)]
        assert all(sorted(epoch) == list(range(total)) for epoch in epochs), f"{case}: every epoch takes each once"
        assert all(type(i) is int for i in order), f"{case}: plain numbers"

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        orders = [all_indices(12, 9, prompts_per_step=4, seed=seed) for seed in (0, 1, 2)]
        epochs = [tuple(order[i:i + 12]) for order in orders for i in (0, 12, 24)]
        expect("seeds 0, 1 and 2, three epochs of 12 problems each: different orders", len(set(epochs)), 9)

    def test_is_a_function_of_the_step_alone(self):
        cfg = ampo.Config(prompts_per_step=4)
        torch.manual_seed(0)
        first = [ampo.batch_indices(12, step, cfg) for step in (5, 0, 3)]
        state = torch.get_rng_state()
        torch.manual_seed(1)
        again = {step: ampo.batch_indices(12, step, cfg) for step in range(6)}
        expect("steps 5, 0 and 3 by themselves are those of a whole run", first, [again[step] for step in (5, 0, 3)])
        torch.manual_seed(0)
        assert torch.equal(state, torch.get_rng_state()), "the random numbers of the sampling are left alone"


class Test_measure:
    NONE = dict(grad_norm=0.0, tokens=0, clipped=0, gap=0.0)

    def test_mistake_11_metrics_are_those_of_the_students_own_responses(self):
        """Two groups of two, the first failed and rescued by a trace, which leaves reward, entropy, length alone."""
        plain = [[sample_of([5, 6], reward=0.1, correct=False, old_logps=[-1.0, -2.0]),
                  sample_of([5], reward=0.0, correct=False, old_logps=[-3.0])],
                 [sample_of([5], old_logps=[-4.0]), sample_of([5, 6], old_logps=[-1.0, -1.0])]]
        trace = sample_of([7] * 9, source="one", off_policy=True, old_logps=[0.0] * 9)
        stats = [dict(grad_norm=1.0, tokens=10, clipped=1, gap=0.5), dict(grad_norm=3.0, tokens=30, clipped=5, gap=9.0)]
        out = ampo.measure(plain, [[trace, plain[0][1]], plain[1]], stats)
        case = "two groups of two rollouts, the first failed and rescued by a trace of 'one'"
        for name, wanted in dict(reward=2.1 / 4, fail_rate=0.5, rescued=0.5, entropy=12 / 6, response_length=1.5,
                                 teachers={"one": 1}).items():
            expect(f"{case}: {name}", out[name], wanted)
        for name, wanted in dict(grad_norm=2.0, clip_fraction=6 / 40, logp_gap=0.05).items():
            expect(f"statistics of two updates, {stats}: {name}", out[name], wanted)

    def test_rescued_are_only_failed_groups_that_now_have_a_success(self):
        plain = [group_of(0, 0), group_of(0, 0), group_of(1, 0), group_of(0, 0), group_of(0, 0)]
        hinted = [sample_of([7], source="hint", correct=right) for right in (True, False)]
        groups = [plain[0], hinted, plain[2], [trace_of("two"), plain[3][1]], [trace_of("two"), trace_of("one")]]
        out = ampo.measure(plain, groups, [self.NONE])
        expect("five groups, four failed; one with a hint and two with traces have a success now: fail_rate, rescued",
               (out["fail_rate"], out["rescued"]), (0.8, 0.6))
        expect("teachers: hints are none", out["teachers"], {"one": 1, "two": 2})

    def test_without_responses_there_is_nothing_to_average(self):
        out = ampo.measure([[], []], [[trace_of("one")], []], [self.NONE | {"grad_norm": 2.0}])
        expect("method sft: reward, fail_rate, rescued, entropy, response_length", [
            out[name] for name in ("reward", "fail_rate", "rescued", "entropy", "response_length")], [None] * 5)
        expect("method sft, no on-policy tokens: grad_norm, clip_fraction, logp_gap, teachers",
               [out[name] for name in ("grad_norm", "clip_fraction", "logp_gap", "teachers")], [2.0, 0, 0, {"one": 1}])

    def test_a_skipped_step_has_no_norm_and_a_single_token_counts_whole(self):
        stats = [dict(grad_norm=3.0, tokens=1, clipped=1, gap=0.5), dict(grad_norm=None, tokens=0, clipped=0, gap=0.0)]
        out = ampo.measure([group_of(0, 1)], [group_of(0, 1)], stats)
        expect(f"statistics {stats}: grad_norm, clip_fraction, logp_gap",
               (out["grad_norm"], out["clip_fraction"], out["logp_gap"]), (None, 1.0, 0.5))

    def test_entropy_estimate_agrees_with_the_exact_one(self, model):
        """Rollouts drawn here, token by token, from the model's own distributions."""
        torch.manual_seed(0)
        ids, logps, exact = torch.tensor([[2, 3]] * 64), [], []
        with torch.no_grad():
            for _ in range(8):
                step = torch.distributions.Categorical(logits=model(ids).logits[:, -1])
                tokens = step.sample()
                logps.append(step.log_prob(tokens)), exact.append(step.entropy())
                ids = torch.cat([ids, tokens[:, None]], 1)
        group = [sample_of(row[2:], old_logps=p) for row, p in zip(ids.tolist(), torch.stack(logps, 1).tolist())]
        estimate = ampo.measure([group], [group], [self.NONE])["entropy"]
        expect("64 rollouts of 8 tokens: entropy", estimate, torch.stack(exact).mean().item(), 0.06)


def chance_by_hand(flags, k):
    """The share of all subsets of k that hold a right one."""
    subsets = list(itertools.combinations(flags, k))
    return sum(map(any, subsets)) / len(subsets)


class Test_pass_at_k:
    @pytest.mark.parametrize("n, correct", [(1, 0), (1, 1), (5, 0), (5, 1), (5, 3), (6, 5), (6, 6)])
    def test_equals_enumeration_of_all_subsets(self, n, correct):
        for k in range(1, n + 1):
            expect(f"n = {n}, {correct} correct, k = {k}", ampo.pass_at_k(n, correct, k),
                   chance_by_hand([True] * correct + [False] * (n - correct), k), 1e-9)

    @pytest.mark.parametrize("n, correct, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
    def test_rejects_what_it_cannot_estimate(self, n, correct, k):
        try:
            got = ampo.pass_at_k(n, correct, k)
        except ValueError:
            return
        pytest.fail(f"n = {n}, {correct} correct, k = {k}: ValueError expected, got {got}", pytrace=False)


class Test_evaluate:
    @pytest.mark.parametrize("samples, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]),
                                             (9, [1, 2, 4, 8, 9])])
    def test_is_the_mean_of_the_unbiased_estimator(self, make_student, scripted, tokenizer, samples, ks):
        scripted(lambda prompt, i: RIGHT if ("one" in prompt and i < 3) else WRONG)
        problems = [problem(question="one?"), problem(question="two?")]
        out, groups = ampo.evaluate(make_student(), problems, samples, 1.0)
        case = f"{samples} samples of two problems, the first right up to three times"
        expect(f"{case}: what is returned", list(out), [*(f"pass@{k}" for k in ks), "n", "length"])
        rights = [i < 3 for i in range(samples)]
        expect(f"{case}: pass@k for k in {ks}", [out[f"pass@{k}"] for k in ks],
               [chance_by_hand(rights, k) / 2 for k in ks])
        sizes = [len(ids_of(tokenizer, RIGHT if right else WRONG)) + 1 for right in rights + [False] * samples]
        expect(f"{case}: n, mean length in tokens", (out["n"], out["length"]), (2, statistics.mean(sizes)))
        expect(f"{case}: groups", [[s.correct for s in group] for group in groups], [rights, [False] * samples])

    @pytest.mark.parametrize("given, wanted", [([], 0.6), ([1.0], 1.0), ([0.3], 0.3)], ids=["default", "1.0", "0.3"])
    def test_samples_at_its_own_temperature(self, make_student, given, wanted):
        student = make_student(max_new_tokens=5, temperature=0.9)
        cfg = student.cfg
        _, (group,) = ampo.evaluate(student, [problem()], 2, *given)
        for s in group:
            expect(f"temperature {given or 'not given'}: the distribution that was drawn from", list(s.old_logps),
                   full_logps(student.model, s.prompt, s.ids, wanted), 2e-4)
        assert student.cfg == cfg, "the student's flags stay as they were"

    def test_seeds_itself(self, make_student):
        """The same figures whenever it is called, and other ones under another seed."""
        texts = []
        for call, seed in enumerate((5, 5, 6, 0)):
            student = make_student(max_new_tokens=3, seed=seed)
            torch.manual_seed(100 + call)
            _, groups = ampo.evaluate(student, [problem()], 4, 1.0)
            texts.append([sample.ids for sample in groups[0]])
        assert texts[0] == texts[1], "seed 5 twice: the same samples"
        expect("seeds 5, 6 and 0: different samples", len(set(map(str, texts))), 3)


# ---------------------------------------------------------------------------------------------------------------------
# §8 The loop


class Test_gather:
    def test_alone(self):
        expect("the value of a process alone, in a list", ampo.gather({"a": 1}), [{"a": 1}])

    def test_three_processes(self, monkeypatch):
        def all_gather_object(values, value, group=None):
            values[:] = [["rank 0"], value, ["rank 2"]]
        for name, stub in (("is_initialized", lambda: True), ("get_world_size", lambda group=None: 3),
                           ("get_rank", lambda group=None: 1), ("all_gather_object", all_gather_object)):
            monkeypatch.setattr(torch.distributed, name, stub)
        expect("the objects of three processes, in the order of ranks", ampo.gather(["mine"]),
               [["rank 0"], ["mine"], ["rank 2"]])


class Test_load_student:
    NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE

    def test_what_it_loads(self, folder):
        cfg = ampo.Config(seed=7)
        student = ampo.load_student(folder, cfg)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(value.cpu(), saved[name]) for name, value in student.model.state_dict().items()), \
            "the weights are those of the folder"
        assert student.cfg is cfg and not student.model.training, "the settings are kept, and dropout stays off"
        expect("the tokenizer is the folder's", student.tokenizer("Solve 3*x=5.").input_ids,
               AutoTokenizer.from_pretrained(folder)("Solve 3*x=5.").input_ids)
        critic = student.critic
        expect("the value head's inputs, outputs, and the sum of its absolute weights",
               (critic.in_features, critic.out_features, sum(p.abs().sum().item() for p in critic.parameters())),
               (32, 1, 0.0))
        assert (student.sampler is student.model) != torch.cuda.is_available(), \
            "where there is no CUDA the model itself is sampled from"

    def test_master_weights_are_float32(self, tmp_path):
        path = save_model(tmp_path / "base", "qwen2")
        AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
        model = ampo.load_student(path, ampo.Config()).model
        expect("dtypes of a model whose file has bfloat16", {p.dtype for p in model.parameters()}, {torch.float32})

    def test_weights_are_in_memory_of_their_own(self, tmp_path):
        model = ampo.load_student(save_model(tmp_path / "base", "qwen2"), ampo.Config()).model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with open(tmp_path / "base" / "model.safetensors", "r+b") as file:
            file.write(bytes(os.path.getsize(file.name)))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), \
            "the weights do not change with the file that they were read from"

    @pytest.mark.parametrize("ends, wanted", [
        (None, ["<|im_end|>"]), (["<|pad|>", "<|im_end|>", "<|im_start|>"], ["<|im_end|>", "<|pad|>", "<|im_start|>"])],
        ids=["one", "three"])
    def test_what_ends_a_response(self, tmp_path, ends, wanted):
        student = ampo.load_student(save_model(tmp_path / "base", "qwen2", ends=ends), ampo.Config())
        expect(f"the tokenizer's end, then those of the generation config, {ends or 'the same one'}, each once",
               student.tokenizer.convert_ids_to_tokens(student.eos), wanted)

    def test_a_model_that_never_ends(self, tmp_path):
        path = save_model(tmp_path / "base", "qwen2")
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        tokenizer.eos_token = model.generation_config.eos_token_id = model.config.eos_token_id = None
        for part in (tokenizer, model): part.save_pretrained(path)
        expect("no end in tokenizer and generation config", ampo.load_student(path, ampo.Config()).eos, [])

    def test_no_bar_of_the_library(self, folder):
        from transformers.utils import logging
        logging.enable_progress_bar()
        ampo.load_student(folder, ampo.Config())
        assert not logging.is_progress_bar_enabled(), "transformers shows a progress bar"

    def test_recomputation(self, folder):
        """Checkpointing of the reentrant kind knows no torch.autograd.grad."""
        for recompute in (False, True):
            model, runs = ampo.load_student(folder, ampo.Config(recompute=recompute)).model.train(), []
            model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
            hidden = model.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).last_hidden_state
            torch.autograd.grad(hidden.sum(), model.model.layers[0].mlp.down_proj.weight)
            expect(f"how often a layer is computed with {recompute=}", len(runs), 1 + recompute)

    def test_folders_without_a_part(self, tmp_path, folder):
        for name in ("no model", "no tokenizer"):
            path = Path(shutil.copytree(folder, tmp_path / name))
            for file in path.iterdir():
                if file.name.startswith(("model", "config") if name == "no model" else ("token", "config", "chat")):
                    file.unlink()
            said = message_of(ampo.load_student, str(path), ampo.Config())
            assert said.startswith(f"{path}: {name} in it"), f"a folder with {name}; it says {said}"

    def test_chat_templates_that_do_not_work(self, tmp_path):
        broken = save_model(tmp_path / "broken", "qwen2", template="{% for m in messages %}")
        strict = save_model(tmp_path / "strict", "qwen2", template=self.NO_SYSTEM)
        for path, system in ((broken, ""), (strict, "Be brief.")):
            said = message_of(ampo.load_student, path, ampo.Config(system=system))
            assert said.startswith(f"{path}: no chat template that works"), f"the template of {path}; it says {said}"
        assert message_of(ampo.load_student, strict, ampo.Config()) == "", \
            "a template without system messages is fine where there is no system message"

    @pytest.mark.parametrize("kind, settings, named", [
        ("mistral", dict(sliding_window=8), "cannot sample from"),
        ("granite", dict(logits_scaling=16.0), "disagree about a granite model")], ids=["window", "head"])
    def test_models_that_cannot_be_used(self, tmp_path, kind, settings, named):
        path = save_model(tmp_path / "base", kind, **settings)
        said = message_of(ampo.load_student, path, ampo.Config())
        assert path in said and named in said, f"a {kind} model with {settings}; it says {said}"


class Test_train_step:
    FIVE = [problem(question=f"Solve {a}*x=3.", answer=f"3/{a}") for a in (2, 5, 7, 8, 11)]

    @pytest.fixture
    def two(self, scripted):
        """A problem with one right rollout of four and one that failed."""
        scripted(lambda prompt, i: RIGHT if i == 2 else WRONG)
        return self.FIVE[:2]

    def test_from_problems_to_metrics(self, make_student, two):
        student = make_student(method="ampo", k=3)
        before = [weight.clone() for weight in student.model.parameters()]
        row = ampo.train_step(student, adamw(student), two, 4)
        names = ("step", "reward", "fail_rate", "rescued", "entropy")
        expect(f"{', '.join(names)} of rollouts of which one in eight is right", [row[name] for name in names],
               [4, 0.2125, 0.5, 0.5, 0.5])
        expect("teachers in the groups after guidance", row["teachers"], {"one": 1, "two": 1, "three": 1})
        assert row["grad_norm"] > 0, "there is a gradient"
        assert any(not torch.equal(a, b) for a, b in zip(student.model.parameters(), before)), "the weights move"
        assert {"response_length", "clip_fraction", "logp_gap", "rollout_s", "guide_s", "update_s", "tokens",
                "tokens_per_s"} <= set(row), "all metrics are there"

    def test_a_group_of_equals_moves_nothing(self, make_student, two):
        """What is guided here has no signal either: advantages belong to the groups after guidance."""
        student = make_student(method="grpo")
        row = ampo.train_step(student, adamw(student), two[1:], 0)
        expect("grad_norm of a failed group with grpo", row["grad_norm"], 0.0)

    def test_tokens_of_this_step_alone(self, make_student, two, tokenizer):
        student = make_student(method="guide")
        wanted = 4 * (3 * len(tokenizer(WRONG).input_ids) + len(tokenizer(RIGHT).input_ids)) // 4 + 4
        for number in range(2):
            row = ampo.train_step(student, adamw(student), two, number)
            expect(f"tokens in step {number}: eight rollouts and four guided ones", row["tokens"], 3 * wanted)

    def test_cold_start(self, make_student, two):
        student = make_student(method="luffy", cold_start=1)
        for number, wanted in ((0, {}), (1, {"one": 2}), (2, {"one": 2})):
            row = ampo.train_step(student, adamw(student), two, number)
            expect(f"teachers in step {number} where cold_start is 1", row["teachers"], wanted)

    def test_sft_samples_nothing(self, make_student, scripted):
        scripted(lambda prompt, i: 1 / 0)
        student = make_student(method="sft")
        row = ampo.train_step(student, adamw(student), self.FIVE[:2], 0)
        expect("tokens, reward and teachers of sft", (row["tokens"], row["reward"], row["teachers"]),
               (0, None, {"one": 2, "two": 2, "three": 2}))
        assert row["grad_norm"] > 0, "sft has a gradient"

    @pytest.mark.parametrize("updates, wanted", [(1, [5]), (2, [3, 2]), (3, [2, 2, 1])])
    def test_whole_groups_share_the_optimizer_s_steps(self, make_student, scripted, monkeypatch, updates, wanted):
        scripted(lambda prompt, i: RIGHT if i == 2 else WRONG)
        seen = []

        def update(student, optimizer, samples):
            seen.append(samples)
            assert all(len(s.advantages) == len(s.ids) for s in samples), "advantages come before the optimizer's step"
            return {"grad_norm": 1.0, "tokens": 1, "clipped": 0, "gap": 0.0}
        monkeypatch.setattr(ampo, "update", update)
        student = make_student(method="grpo", updates=updates)
        ampo.train_step(student, adamw(student), self.FIVE, 0)
        expect(f"groups of each of {updates} steps of the optimizer, five in all", [len(s) / 4 for s in seen],
               list(map(float, wanted)))
        expect("problems that had their turn", len({tuple(s.prompt) for s in sum(seen, [])}), 5)

    @pytest.fixture
    def stopwatch(self, monkeypatch, scripted):
        """A clock on which a call of rollout takes 1 s, guidance 10 s and a step of the optimizer 100 s."""
        now = [50.0]

        def slow(function, seconds):
            def call(*args, **kwargs):
                now[0] += seconds
                return function(*args, **kwargs)
            return call
        scripted(lambda prompt, i: WRONG)
        for name, seconds in (("rollout", 1), ("update", 100)):
            monkeypatch.setattr(ampo, name, slow(getattr(ampo, name), seconds))
        monkeypatch.setitem(ampo.METHODS, "grpo", ampo.Method(slow(lambda student, problems, groups: groups, 10)))
        clock = lambda: now[0]
        monkeypatch.setattr(ampo, "time", SimpleNamespace(perf_counter=clock, monotonic=clock, time=clock))

    def test_clocks(self, make_student, stopwatch):
        student = make_student(method="grpo", updates=2)
        row = ampo.train_step(student, adamw(student), self.FIVE[:2], 0)
        expect("seconds of rollouts, guidance and two steps of the optimizer",
               [row[name] for name in ("rollout_s", "guide_s", "update_s")], [1.0, 10.0, 200.0])
        expect("tokens a second, a whole number", row["tokens_per_s"], round(row["tokens"] / 211))
        assert row["tokens_per_s"] or row["tokens"] < 106, "tokens a second"

    def test_all_processes_count(self, make_student, two, monkeypatch):
        rows = []
        for processes in (1, 2):
            monkeypatch.setattr(ampo, "gather", lambda value: [value] * processes)
            student = make_student(method="luffy")
            rows.append(ampo.train_step(student, adamw(student), two, 0))
        one, both = rows
        expect("tokens and teachers of two processes that do the same", (both["tokens"], both["teachers"]),
               (2 * one["tokens"], {"one": 4}))
        expect("reward and fail_rate of two processes that do the same", (both["reward"], both["fail_rate"]),
               (one["reward"], one["fail_rate"]))


class Test_report:
    RIGHT = {"a": (1, 2), "b": (4, 1), "c": (3, 4), "d": (0, 3)}  # of four rollouts of a problem, before and after

    @pytest.fixture
    def shown(self, monkeypatch, make_student, tmp_path, capsys):
        """shown(samples, rows of metrics.jsonl) -> the lines that are printed about two sets of two problems."""
        def show(samples, rows):
            base, trained = make_student(), make_student(model="the/base", samples=samples)
            loaded, sizes = [], set()

            def evaluate(student, problems, samples, temperature=0.6):
                now = student is trained
                sizes.add(samples)
                says = lambda p, i: f"\n {p.question}{i}{' later' * now}\n\n"
                groups = [[sample_of([5], correct=i >= 4 - self.RIGHT[p.question][now], text=says(p, i))
                           for i in range(4)] for p in problems]
                first = 0.125 * (1 + (problems[0].question == "c"))
                return {f"pass@{2**i}": first + i / 16 + now / 8 for i in range(6)}, groups
            monkeypatch.setattr(ampo, "load_student", lambda path, cfg: loaded.append(path) or base)
            monkeypatch.setattr(ampo, "evaluate", evaluate)
            write_lines(tmp_path / "metrics.jsonl", rows)
            sets = {"test": [problem(question=q, answer="7") for q in "ab"],
                    "ood_far": [problem(question=q, answer="7") for q in "cd"]}
            ampo.report(trained, sets, tmp_path)
            expect("what is loaded to compare with, and the samples a problem", (loaded, sizes),
                   (["the/base"], {samples}))
            return capsys.readouterr().out.splitlines()
        return show

    @pytest.mark.parametrize("samples, ks, numbers", [
        (1, [1], [12.5, 25.0]), (4, [1, 4], [12.5, 25.0, 25.0, 37.5]),
        (32, [1, 8, 32], [12.5, 25.0, 31.2, 43.8, 43.8, 56.2])], ids=["1", "4", "32"])
    def test_table(self, shown, samples, ks, numbers):
        lines = shown(samples, [{"teachers": {}}])
        head = next(i for i, line in enumerate(lines) if line.startswith("base -> "))
        got = list(map(int, re.findall(r"pass@(\d+)", lines[head])))
        expect(f"pass@ of 1, 8 and all of {samples} samples", got, ks)
        for name, line, more in (("test", lines[head + 1], 0), ("ood_far", lines[head + 2], 12.5)):
            assert line.startswith(name), f"the row of {name}"
            got = list(map(float, re.findall(r"\d+\.\d", line)))
            expect(f"base -> trained in per cent of {name}, to one decimal", got, [x + more for x in numbers], 0.003)
            expect(f"width of the row of {name}, which is that of the table's head", len(line), len(lines[head]))

    def test_problem_that_gained_most(self, shown):
        lines = shown(4, [{"teachers": {}}])
        start = next(i for i, line in enumerate(lines) if line.startswith("Problem: "))
        assert re.search(r"Problem: d +\(answer 7\)", lines[start]), "d gains three right answers, c one and a one"
        expect("two rollouts of each model, marked and without space around them", lines[start + 1:start + 9],
               ["--- base, wrong:", "d0", "--- base, wrong:", "d1", "--- trained, wrong:", "d0 later",
                "--- trained, right:", "d1 later"])

    def test_teachers(self, shown):
        rows = [{"teachers": {"one": 2}}, {"teachers": {}}, {"teachers": {"two": 4, "one": 1}}]
        expect("teachers of all steps, the most frequent one first", shown(4, rows)[-1],
               "teachers chosen: {'two': 4, 'one': 3}")
        expect("no teacher in any step", shown(4, [{"teachers": {}}])[-1], "teachers chosen: none")


class FileOperations:
    """Calls watch(name) before each file operation of save_checkpoint in this process, and in the middle of those two
    that are not Python's, with the file half written."""

    def __init__(self, monkeypatch, watch):
        self.watch, self.on = watch, False
        sys.addaudithook(self.hook)  # Python cannot remove it again
        save, save_model, save_state = ampo.save_checkpoint, PreTrainedModel.save_pretrained, torch.save
        monkeypatch.setattr(ampo, "save_checkpoint", lambda *args: self.during(save, *args))
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda model, path, *args, **kwargs: (
            save_model(model, path, *args, **kwargs), self.halve(Path(path) / "model.safetensors")))
        monkeypatch.setattr(torch, "save", lambda what, path: (save_state(what, path), self.halve(Path(path))))

    def during(self, save, *args):
        self.on = True
        try:
            return save(*args)
        finally:
            self.on = False

    def hook(self, event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if self.on and (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")):
            self.call(f"{event} {Path(str(args[0])).name}")

    def halve(self, path):
        if self.on:
            whole = path.read_bytes()
            path.write_bytes(whole[:len(whole) // 2])
            self.call(f"write {path.name}")
            path.write_bytes(whole)

    def call(self, name):
        self.on = False
        try:
            self.watch(name)
        finally:
            self.on = True


def whole_checkpoint(out):
    """The step of the whole checkpoint in a run's folder, or None."""
    try:
        checkpoint = next(out / name for name in ("model", "model.old") if (out / name).exists())
        json.loads((checkpoint / "run.json").read_text())
        weights_of_size = AutoModelForCausalLM.from_pretrained(checkpoint) and AutoTokenizer.from_pretrained(checkpoint)
        return weights_of_size and torch.load(checkpoint / "state.pt")["step"]
    except Exception:
        return None


class Test_save_checkpoint:
    @pytest.fixture
    def saved(self, make_student, tmp_path):
        """saved(step) -> the student and the optimizer that were saved in tmp_path."""
        student = make_student(seed=3, lam=0.5)
        optimizer = adamw(student)
        (tmp_path / "metrics.jsonl").write_text("12345")

        def save(step):
            for weight in [*student.model.parameters(), *student.critic.parameters()]:
                weight.grad = torch.full_like(weight, 0.1 * step)
            optimizer.step()
            ampo.save_checkpoint(student, optimizer, step, tmp_path)
            return student, optimizer
        return save

    def test_what_it_holds(self, saved, tmp_path):
        student, optimizer = saved(6)
        weights = weights_of(tmp_path)
        assert all(torch.equal(value, weights[name]) for name, value in student.model.state_dict().items()), \
            "transformers loads the weights from model/"
        assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == student.tokenizer.get_vocab(), \
            "transformers loads the tokenizer from model/"
        state = torch.load(tmp_path / "model" / "state.pt")
        expect("step, and how long metrics.jsonl was", (state["step"], state["metrics_bytes"]), (6, 5))
        for name, part in (("optimizer", optimizer), ("critic", student.critic)):
            assert same_state(state[name], part.state_dict()), f"state.pt has the {name}'s state"
        expect("the settings in run.json", ampo.Config(**json.loads((tmp_path / "model" / "run.json").read_text())),
               student.cfg)
        expect("the run's folder", sorted(os.listdir(tmp_path)), ["metrics.jsonl", "model"])

    @pytest.mark.parametrize("left", ["model.new", "model.old"])
    def test_what_a_kill_left_behind(self, saved, tmp_path, left):
        """A half checkpoint's files in a new one, or two checkpoints in the end."""
        for step in (1, 2):
            (tmp_path / left).mkdir()
            (tmp_path / left / "junk").write_text("x")
            saved(step)
            expect(f"the run's folder after {left}/ was there", sorted(os.listdir(tmp_path)),
                   ["metrics.jsonl", "model"])
            assert not (tmp_path / "model" / "junk").exists(), f"a file of {left}/ is in the checkpoint"
            expect("the step that is saved", whole_checkpoint(tmp_path), step)

    def test_only_the_old_one_is_there(self, saved, tmp_path):
        saved(1)
        (tmp_path / "model").rename(tmp_path / "model.old")
        saved(2)
        expect("the run's folder after a kill between two renames, and a new checkpoint", sorted(os.listdir(tmp_path)),
               ["metrics.jsonl", "model"])
        expect("the step that is saved", whole_checkpoint(tmp_path), 2)

    def test_one_is_whole_at_every_moment(self, saved, tmp_path, monkeypatch):
        """A moment between two file operations, or in the middle of one, that leaves neither old nor new one."""
        saved(1)
        steps = []
        FileOperations(monkeypatch, lambda name: steps.append(whole_checkpoint(tmp_path)))
        saved(2)
        assert len(steps) > 10 and set(steps) == {1, 2} and steps == sorted(steps), \
            f"at any moment one of the checkpoints of steps 1 and 2 is whole; there were {steps}"


class Test_restore:
    @pytest.fixture
    def checkpoint(self, make_student, tmp_path):
        """A checkpoint's state.pt after one step of the optimizer, and metrics.jsonl with more than it knows of."""
        student = make_student()
        torch.nn.init.ones_(student.critic.weight)
        optimizer = adamw(student)
        student.model(input_ids=torch.tensor([[5, 6]])).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        state = {"optimizer": optimizer.state_dict(), "critic": student.critic.state_dict(), "step": 5,
                 "metrics_bytes": 9}
        (tmp_path / "model").mkdir()
        torch.save(state, tmp_path / "model" / "state.pt")
        (tmp_path / "metrics.jsonl").write_text("step five\nstep six\nst")
        return tmp_path / "model", state

    def test_what_it_puts_back(self, make_student, checkpoint, tmp_path):
        path, state = checkpoint
        student = make_student()
        optimizer = adamw(student)
        expect("the steps done", ampo.restore(student, optimizer, path, tmp_path / "metrics.jsonl"), 5)
        expect("metrics.jsonl up to the checkpoint", (tmp_path / "metrics.jsonl").read_text(), "step five")
        expect("a weight of the value head", student.critic.weight[0, 3].item(), 1.0)
        assert same_state(optimizer.state_dict(), state["optimizer"]), "the optimizer's moments are back"

    @pytest.mark.parametrize("kind", ["empty", "half", "code", "other model"])
    def test_a_damaged_one(self, make_student, checkpoint, tmp_path, kind):
        """Metrics must not be cut before the damage is noticed, nor a pickle be executed."""
        path, state = checkpoint
        whole = (path / "state.pt").read_bytes()
        (path / "state.pt").write_bytes(whole[:len(whole) // 2 * (kind == "half")])
        if kind == "code": torch.save(state | {"more": SimpleNamespace()}, path / "state.pt")
        student = make_student()
        if kind == "other model": torch.save(state | {"critic": {"weight": torch.ones(1, 7)}}, path / "state.pt")
        with pytest.raises(Exception):
            ampo.restore(student, adamw(student), path, tmp_path / "metrics.jsonl")
        assert (tmp_path / "metrics.jsonl").read_text().endswith("\nst"), "metrics stay as they were"


class Test_open_run:
    @pytest.fixture
    def run(self, tmp_path):
        """run(folders) -> a run's folder with metrics and checkpoints, whose seeds are 1, 2 ..."""
        def make(*folders):
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "metrics.jsonl").touch()
            for i, name in enumerate(folders, 1):
                (tmp_path / "run" / name).mkdir()
                write_lines(tmp_path / "run" / name / "run.json", [{"seed": i, "lr": 0.5, "out": "elsewhere"}])
            return tmp_path / "run"
        return make

    @pytest.mark.parametrize("given, folder", [
        ({}, "runs/ampo-0"), ({"method": "grpo", "seed": 4}, "runs/grpo-4"), ({"out": "a/b"}, "a/b")],
        ids=["default", "method and seed", "out"])
    def test_a_new_run(self, tmp_path, monkeypatch, given, folder):
        monkeypatch.chdir(tmp_path)
        wanted = ampo.Config(**given | {"out": folder}), None
        expect(f"settings and checkpoint of a new run with {given}", ampo.open_run(ampo.Config(**given), given), wanted)
        assert not os.listdir(tmp_path), "nothing is written yet"
        Path(folder).mkdir(parents=True)
        expect("the same where the folder is there and empty", ampo.open_run(ampo.Config(**given), given), wanted)

    def test_a_folder_that_is_taken(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        for out in (tmp_path, tmp_path / "notes.txt"):
            said = message_of(ampo.open_run, ampo.Config(out=str(out)), {})
            assert said.startswith(f"--out {out}: "), f"a folder that is not empty, or a file; it says {said}"
        expect("what was in the folder", os.listdir(tmp_path), ["notes.txt"])

    def test_a_run_with_checkpoints_is_taken_too(self, run):
        assert message_of(ampo.open_run, ampo.Config(out=str(run("model"))), {}), "without --resume it stays as it is"

    @pytest.mark.parametrize("folders, chosen", [(["model"], "model"), (["model.old"], "model.old"),
                                                 (["model", "model.old"], "model"), (["model.new"], None), ([], None)],
                             ids=["one", "old", "both", "half", "none"])
    def test_resume(self, run, folders, chosen):
        out = run(*folders)
        given = {"resume": True, "lr": 0.25, "out": str(out)}
        cfg, checkpoint = ampo.open_run(ampo.Config(**given), given)
        expect(f"the checkpoint where there are {folders}", checkpoint, chosen and out / chosen)
        expect("the run's settings, changed by those given now", cfg, ampo.Config(**given, seed=int(bool(chosen))))

    def test_settings_that_are_given_again(self, run):
        """A default that was given stands against what the run began with."""
        out = run("model")
        given = {"resume": True, "seed": 0, "out": str(out)}
        expect("seed 0 is given, the run began with 1", ampo.open_run(ampo.Config(**given), given)[0].seed, 0)
        expect("it is not given", ampo.open_run(ampo.Config(resume=True, out=str(out)), {"resume": True})[0].seed, 1)

    def test_nothing_to_resume(self, tmp_path):
        for out in (tmp_path, tmp_path / "none"):
            said = message_of(ampo.open_run, ampo.Config(out=str(out), resume=True), {})
            assert "--resume" in said and str(out) in said, f"a folder without metrics.jsonl; it says {said}"

    @pytest.mark.parametrize("content", [b"", b'{"seed": ', b"\xff", b'{"nonsense": 1}'],
                             ids=["empty", "half", "bytes", "unknown"])
    def test_damaged_settings(self, run, content):
        out = run("model", "model.old")
        (out / "model" / "run.json").write_bytes(content)
        said = message_of(ampo.open_run, ampo.Config(out=str(out), resume=True), {"resume": True})
        assert said.startswith(f"{out / 'model'}: damaged"), f"run.json is {content}; it says {said}"


class Test_load_inputs:
    @pytest.fixture
    def loaded(self, make_student, tmp_path):
        """loaded(names of files, ...) -> the questions of all that is loaded. Each file has one, of its name."""
        def load(*names, rows=(), **settings):
            for name in names:
                write_lines(tmp_path / f"{name}.jsonl", [{"question": f"of {name}", "answer": "1"}])
            data = write_lines(tmp_path / "mine.jsonl", [{"question": "q", "answer": "1"}, *rows])
            student = make_student(**{"data": data, "method": "grpo"} | settings)
            problems, valid, sets = ampo.load_inputs(student)
            asked = lambda problems: [p.question for p in problems]
            return asked(problems), asked(valid), {name: asked(problems) for name, problems in sets.items()}
        return load

    def test_what_lies_beside_the_data(self, loaded):
        names = ("ood_b", "test", "valid", "ood_a", "other")
        got = loaded(*names, rows=[{"question": "q2", "answer": "2"}])
        expect("problems, those of valid.jsonl, and sets of test.jsonl and ood_*.jsonl", got,
               (["q", "q2"], ["of valid"], {"test": ["of test"], "ood_a": ["of ood_a"], "ood_b": ["of ood_b"]}))
        expect("the sets in the order of the table", list(got[2]), ["test", "ood_a", "ood_b"])

    def test_nothing_beside_the_data(self, loaded):
        expect("data without other files", loaded(), (["q"], [], {}))

    def test_without_evaluation(self, loaded):
        expect("eval_every is 0", loaded("test", "valid", "ood_a", eval_every=0), (["q"], [], {}))

    @pytest.mark.parametrize("method, field", [("ampo", "teachers"), ("luffy", "teachers"), ("sft", "teachers"),
                                               ("guide", "hint"), ("ghpo", "solution")])
    def test_a_method_without_what_it_needs(self, loaded, method, field):
        said = message_of(lambda: loaded(method=method))
        assert "mine.jsonl: " in said and f"'{field}'" in said, f"no line has what {method} needs; it says {said}"
        value = {"one": "\\boxed{1}"} if field == "teachers" else "Try 1."
        expect(f"one of two lines has what {method} needs",
               loaded(method=method, rows=[{"question": "q2", "answer": "1", field: value}])[0], ["q", "q2"])

    def test_all_files_are_checked(self, loaded, tokenizer):
        size = len(prompt_of(tokenizer, "q"))
        assert "valid.jsonl:1" in message_of(lambda: loaded("valid", max_new_tokens=256 - size)), \
            "a question of valid.jsonl that is too long"


class Test_load_checked:
    LONGEST = "Solve " + "2*x=" * 40

    def load(self, student, tmp_path):
        return ampo.load_checked(student, write_lines(tmp_path / "p.jsonl", [
            {"question": "q", "answer": "1"}, {"question": self.LONGEST, "answer": "2", "hint": "h"}]))

    def room(self, tokenizer):
        """What the longest question leaves of a context of 256 tokens."""
        return 256 - len(prompt_of(tokenizer, self.LONGEST))

    def test_questions_that_fit_and_that_do_not(self, make_student, tokenizer, tmp_path):
        room = self.room(tokenizer)
        problems = self.load(make_student(max_new_tokens=room), tmp_path)
        expect("problems of which the longest just fits", [(p.question, p.answer, p.hint) for p in problems],
               [("q", "1", ""), (self.LONGEST, "2", "h")])
        said = message_of(self.load, make_student(max_new_tokens=room + 1), tmp_path)
        assert all(word in said for word in ("p.jsonl:2", "'question'", "257", "256", "--max_new_tokens")), \
            f"line 2 is a token too long; it says {said}"

    def test_the_system_message_counts(self, make_student, tokenizer, tmp_path):
        """The miniature's template has none, so this one is given one."""
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        for system, wanted in (("", False), ("1" * 20, True)):
            student = make_student(system=system, max_new_tokens=self.room(plain))
            student.tokenizer = plain
            expect(f"is line 2 refused where the system message is {system!r}",
                   "p.jsonl:2" in message_of(self.load, student, tmp_path), wanted)

    def test_a_model_without_a_limit(self, make_student, tmp_path):
        student = make_student(max_new_tokens=10**6)
        student.model = SimpleNamespace(config=SimpleNamespace())
        expect("problems for a model of unlimited context", len(self.load(student, tmp_path)), 2)

    def test_errors_of_the_file(self, make_student, tmp_path):
        data = write_lines(tmp_path / "p.jsonl", [{"question": "q", "answer": "1"}, {"question": "q", "answer": "?"}])
        assert "p.jsonl:2" in message_of(ampo.load_checked, make_student(), data), \
            "an answer that cannot be read is named with file and line"
        with pytest.raises(FileNotFoundError):
            ampo.load_checked(make_student(), tmp_path / "none.jsonl")


class Test_train:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path, folder):
        """run(**settings) -> what happened in a whole run with stand-ins for its steps, evaluations, table and
        checkpoints. Of run.ctrl_c the steps are interrupted so many times; run.files lie beside the data."""
        def step(student, optimizer, problems, step):
            seen.steps.append((step, [p.question for p in problems]))
            seen.seeds.append(torch.initial_seed())
            seen.student, seen.optimizer = student, optimizer
            for _ in range(run.ctrl_c.get(step, 0)): os.kill(os.getpid(), signal.SIGINT)
            return {"step": step, "reward": 0.5, "fail_rate": 0.25, "rescued": None, "entropy": 1.5, "tokens_per_s": 7}

        def save(student, optimizer, step, out):
            if run.full: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            seen.saved.append((step, len((out / "metrics.jsonl").read_text().splitlines())))

        def restore(student, optimizer, checkpoint, metrics_file):
            seen.restored = (optimizer is not None, Path(checkpoint), Path(metrics_file))
            return 3

        def evaluate(student, problems, samples, temperature=0.6):
            seen.evaluated.append((len(problems), samples))
            return {"pass@1": 0.75, "pass@4": 1.0}, []

        def report(student, sets, out):
            seen.tables.append((list(sets), Path(out)))

        def run(checkpoint=None, rank=None, **settings):
            nonlocal seen
            seen = SimpleNamespace(steps=[], seeds=[], saved=[], evaluated=[], tables=[], restored=None, status=None)
            if rank is not None:  # one of two processes
                monkeypatch.setattr(ampo, "gather", lambda value: [value, value])
                monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
            data = tmp_path / "data"
            data.mkdir(exist_ok=True)
            for name in ("p", *run.files): write_lines(data / f"{name}.jsonl", LINES)
            seen.out = tmp_path / "new" / "run"
            small = dict(method="grpo", steps=5, prompts_per_step=2, group_size=4, save_every=3, eval_every=2)
            paths = dict(model=folder, data=str(data / "p.jsonl"), out=str(seen.out))
            cfg = ampo.Config(**small | paths | settings)
            try:
                seen.status = ampo.train(cfg, checkpoint)
            except SystemExit as end:
                seen.status = f"exit {end.code}"
            seen.rows = metrics_of(seen.out)
            return seen
        seen, run.ctrl_c, run.files, run.full = None, {}, (), False
        for name, stub in (("train_step", step), ("save_checkpoint", save), ("restore", restore),
                           ("evaluate", evaluate), ("report", report)):
            monkeypatch.setattr(ampo, name, stub)
        return run

    def test_steps_log_and_checkpoints(self, run, capsys):
        seen = run()
        expect("exit status and the steps of a run of five", (seen.status, [step for step, _ in seen.steps]),
               (0, [0, 1, 2, 3, 4]))
        expect("the first line of metrics.jsonl", seen.rows[0],
               {"step": 0, "reward": 0.5, "fail_rate": 0.25, "rescued": None, "entropy": 1.5})
        expect("the steps in metrics.jsonl", [row["step"] for row in seen.rows], [0, 1, 2, 3, 4])
        expect("checkpoints every three steps and at the end: steps done, lines of metrics.jsonl by then", seen.saved,
               [(3, 3), (5, 5)])
        shown = capsys.readouterr()
        for word in ("grpo", "5/5", "reward=0.5", "entropy=1.5"):
            assert word in shown.err, f"the progress bar shows {word}"
        for path in (seen.out, seen.out / "metrics.jsonl", seen.out / "model"):
            assert re.search(rf"{path}(\s|$)", shown.out), f"the last line names {path}"
        expect("evaluations and tables of a run without files for them", (seen.evaluated, seen.tables), ([], []))

    def test_model_and_optimizer(self, run):
        seen = run(steps=1, lr=0.0625)
        expect("hidden size of the model from --model", seen.student.model.config.hidden_size, 32)
        group, = seen.optimizer.param_groups
        assert isinstance(seen.optimizer, torch.optim.AdamW), "AdamW"
        expect("learning rate", group["lr"], 0.0625)
        expect("weights that the optimizer has: the model's and the value head's", {id(p) for p in group["params"]},
               {id(p) for part in (seen.student.model, seen.student.critic) for p in part.parameters()})

    def test_more_traces_than_a_group_holds(self, run):
        with pytest.raises(ampo.InputError, match="--k 5: more than --group_size 4"):
            run(k=5)
        expect("status with as many as it holds", run(k=4, steps=1).status, 0)

    def test_every_problem_has_its_turn(self, run):
        seen = run(steps=4)
        names = [name for _, problems in seen.steps for name in problems]
        expect("problems in an epoch of two steps", [sorted(names[:4]), sorted(names[4:])],
               [sorted(line["question"] for line in LINES)] * 2)

    def test_random_numbers_are_those_of_the_step(self, run):
        """Nothing to save for --resume, and no two steps, runs or processes alike."""
        first, again, other, second = run(), run(), run(seed=1), run(rank=1)
        assert first.seeds == again.seeds, "the same seed gives the same random numbers"
        expect("different seeds in five steps of seed 0, of seed 1, and of another process",
               len({*first.seeds, *other.seeds, *second.seeds}), 15)

    def test_evaluation(self, run):
        run.files = ("valid", "test", "ood_one")
        seen = run(steps=6, eval_every=3)
        expect("the score of valid.jsonl by step where eval_every is 3", [row.get("valid") for row in seen.rows],
               [None, None, 0.75, None, None, 0.75])
        expect("problems and samples of these evaluations", seen.evaluated, [(4, 4)] * 2)
        expect("the closing table", seen.tables, [(["test", "ood_one"], seen.out)])

    def test_evaluation_without_valid(self, run):
        run.files = ("test",)
        seen = run(steps=2)
        assert all("valid" not in row for row in seen.rows) and not seen.evaluated, "there is no valid.jsonl"
        expect("the closing table", seen.tables, [(["test"], seen.out)])

    def test_no_evaluation(self, run):
        run.files = ("valid", "test")
        seen = run(steps=2, eval_every=0)
        assert not seen.evaluated and not seen.tables, "eval_every is 0"

    def test_from_a_checkpoint(self, run, tmp_path, capsys):
        """Three steps are done. What restore leaves of metrics.jsonl stays."""
        out = tmp_path / "new" / "run"
        out.mkdir(parents=True)
        write_lines(out / "metrics.jsonl", [{"step": step} for step in range(3)])
        seen = run(checkpoint=Path(BASE))
        expect("what restore gets: the optimizer, the checkpoint and metrics.jsonl", seen.restored,
               (True, Path(BASE), out / "metrics.jsonl"))
        assert seen.student.model.config.hidden_size != 32, "the weights are the checkpoint's, not those of --model"
        expect("steps that were left", [step for step, _ in seen.steps], [3, 4])
        expect("steps in metrics.jsonl", [row["step"] for row in seen.rows], [0, 1, 2, 3, 4])
        expect("problems and seeds are those of a run without interruption", (seen.steps, seen.seeds),
               [part[3:] for part in (lambda whole: (whole.steps, whole.seeds))(run())])
        assert re.search(r" 3/5 ", capsys.readouterr().err), "the progress bar begins at 3 of 5"

    def test_all_steps_are_done(self, run):
        seen = run(checkpoint=Path(BASE), steps=3)
        expect("status, steps and checkpoints where nothing is left to do", (seen.status, seen.steps, seen.saved),
               (0, [], []))

    def test_metrics_of_a_run_without_checkpoint_are_forgotten(self, run, tmp_path):
        """It was killed before the first one."""
        (tmp_path / "new" / "run").mkdir(parents=True)
        write_lines(tmp_path / "new" / "run" / "metrics.jsonl", [{"step": 0}])
        expect("steps in metrics.jsonl", [row["step"] for row in run(steps=2).rows], [0, 1])

    def test_the_first_ctrl_c_lets_the_step_finish(self, run, capsys):
        run.ctrl_c = {1: 1}
        seen = run(save_every=50)
        expect("status after Ctrl-C in step 1, steps, checkpoints", (seen.status, len(seen.steps), seen.saved),
               (130, 2, [(2, 2)]))
        said = capsys.readouterr().out
        assert "stopped after step 2" in said and f"--resume --out {seen.out}" in said, f"how to go on; it says {said}"

    def test_the_second_ctrl_c_ends_at_once(self, run):
        run.ctrl_c = {1: 2}
        seen = run()
        expect("status after two Ctrl-C in step 1, lines of metrics.jsonl, checkpoints",
               (seen.status, len(seen.rows), seen.saved), ("exit 130", 1, []))

    def test_ctrl_c_is_as_before_in_the_end(self, run):
        run(steps=1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C works again in what follows"

    @pytest.mark.parametrize("rank", [0, 1])
    def test_two_processes_share_a_step(self, run, capsys, rank):
        run.files = ("valid", "test")
        seen, shown = run(rank=rank), capsys.readouterr()
        expect(f"problems a step of rank {rank}, two in all", [len(problems) for _, problems in seen.steps], [1] * 5)
        counts = len(seen.rows), len(seen.saved), len(seen.tables)
        expect(f"lines, checkpoints and tables of rank {rank}", counts, (0, 0, 0) if rank else (5, 2, 1))
        expect(f"does rank {rank} print, does it show a bar, and its status",
               (bool(shown.out), "grpo" in shown.err, seen.status), (not rank, not rank, 0))

    def test_two_processes_have_different_problems(self, run):
        steps = [run(rank=rank).steps for rank in (0, 1)]
        expect("problems of both in the first epoch", sorted(sum((p for rank in steps for _, p in rank[:2]), [])),
               sorted(line["question"] for line in LINES))

    def test_problems_that_cannot_be_shared(self, run, tmp_path):
        said = message_of(lambda: run(rank=0, prompts_per_step=3))
        assert "--prompts_per_step 3:" in said and "2 processes" in said, f"3 problems, 2 processes; it says {said}"
        assert not (tmp_path / "new").exists(), "nothing is written"

    def test_nothing_is_written_before_all_is_loaded(self, run, tmp_path):
        assert message_of(lambda: run(model="no/such/folder")), "a model that is not there"
        assert message_of(lambda: run(method="guide")), "no line has what guide needs"
        assert not (tmp_path / "new").exists(), "nothing is written"

    def test_a_full_disk(self, run, tmp_path):
        run.full = True
        said = message_of(run)
        assert f"{tmp_path / 'new' / 'run'}: no checkpoint written" in said and "No space left" in said, \
            f"an OSError while a checkpoint is written; it says {said}"


class Test_parse_config:
    NAMES = [f.name for f in fields(ampo.Config)]
    LEAST = {f.name: f.metadata["least"] for f in fields(ampo.Config) if f.metadata["least"] is not None}

    def test_nothing_given(self):
        expect("no arguments", ampo.parse_config([]), (ampo.Config(), {}))

    @pytest.mark.parametrize("name", NAMES, ids=[name[:2] + name[-2:] for name in NAMES])
    def test_every_setting(self, name):
        default = getattr(ampo.Config(), name)
        value = {"method": "sft", "advantage": "gae", "follow": "paper", "trigger": "half"}.get(name)
        value = value or (True if default is False else "text" if isinstance(default, str) else default + 3)
        argv = [f"--{name}", *[str(value)] * (value is not True)]
        cfg, given = ampo.parse_config(argv)
        expect(f"{argv}: what was given", given, {name: value})
        expect(f"{argv}: settings", cfg, ampo.Config(**{name: value}))
        assert type(getattr(cfg, name)) is type(default), f"{argv} gives the type of the default"

    def test_a_default_that_is_given_counts_as_given(self):
        expect("--seed 0 --k 2", ampo.parse_config(["--seed", "0", "--k", "2"]), (ampo.Config(), {"seed": 0, "k": 2}))

    @pytest.mark.parametrize("name, least", LEAST.items(), ids=[name[:2] + name[-2:] for name in LEAST])
    def test_least_values(self, name, least):
        expect(f"--{name} {least}", getattr(ampo.parse_config([f"--{name}", str(least)])[0], name), least)
        for value in (least - 1, "nan"):
            said = message_of(ampo.parse_config, [f"--{name}", str(value)])
            assert f"--{name}" in said, f"--{name} {value} cannot be; it says {said}"

    IMPOSSIBLE = {
        "not a number": ("--steps x", ["--steps", "x"]), "unknown": ("--nonsense 1", ["--nonsense"]),
        "method": ("--method ppo", ["--method", "ppo", "grpo", "ampo", "luffy", "guide", "ghpo", "sft"]),
        "choice": ("--follow me", ["--follow", "me", "code", "paper"]), "short form": ("--step 3", ["--step"]),
        "no value": ("--lr", ["--lr"]), "stray": ("twice", ["twice"])}

    @pytest.mark.parametrize("argv, words", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
    def test_what_cannot_be(self, argv, words):
        said = message_of(ampo.parse_config, argv.split())
        assert all(word in said for word in words), f"{argv}: the message names {words}; it says {said}"

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as end:
            ampo.parse_config(["--help"])
        bare = lambda text: re.sub(r"\s", "", text)  # lines are broken anywhere
        shown = bare(capsys.readouterr().out)
        expect("exit status of --help", end.value.code, 0)
        for f in fields(ampo.Config):
            wanted = re.escape(bare(f.metadata["help"]))
            assert re.search(rf"--{f.name}.*?{wanted}", shown), f"--help explains --{f.name}"
        first = bare(ampo.__doc__.split("\n\n")[0])
        assert shown.split("options:")[0].endswith(f"]{first}"), "above the list is the first sentence of the file"


WRONG_INPUTS = {  # what is given, and what the message names
    "one": ("--group_size 1", "--group_size"), "cold": ("--temperature -1", "--temperature"),
    "greedy": ("--temperature 0", "--temperature"), "traces": ("--k 9", "--k"), "no steps": ("--steps 0", "--steps"),
    "not a number": ("--steps x", "--steps"), "nan": ("--lr nan", "--lr"), "method": ("--method ppo", "ppo"),
    "follow": ("--follow me", "--follow"), "unknown": ("--nonsense 1", "--nonsense"),
    "no model": ("--model no/such/folder", "no/such/folder"),
    "no model in it": (f"--model {HERE / 'data'}", str(HERE / "data")),
    "no data": ("--data missing.jsonl", "missing.jsonl"), "no room": ("--max_new_tokens 5000", "train.jsonl:1")}


class Test_main:
    """What cannot be used: exit status 2, one line that names the culprit, nothing written."""

    @pytest.fixture
    def refused(self, capsys):
        def refused(*argv):
            status, shown = ampo.main(list(argv)), capsys.readouterr()
            expect(f"{argv}: exit status, lines on stderr ({shown.err.strip()}), text on stdout",
                   (status, shown.err.count("\n"), shown.out), (2, 1, ""))
            return shown.err
        return refused

    @pytest.fixture
    def began(self, monkeypatch):
        """The arguments that train was called with; it returns 130."""
        calls = []
        monkeypatch.setattr(ampo, "train", lambda cfg, checkpoint=None: calls.append((cfg, checkpoint)) or 130)
        return calls

    def test_arguments_of_the_command_line(self, monkeypatch, began, tmp_path):
        monkeypatch.setattr(sys, "argv", ["ampo.py", "--seed", "5", "--out", str(tmp_path / "run")])
        expect("exit status, which is that of the run", ampo.main(), 130)
        expect("settings and checkpoint", began, [(ampo.Config(seed=5, out=str(tmp_path / "run")), None)])

    def test_an_empty_list_is_not_the_command_line(self, monkeypatch, began, tmp_path):
        monkeypatch.setattr(sys, "argv", ["ampo.py", "--seed", "5"])
        monkeypatch.chdir(tmp_path)
        ampo.main([])
        expect("the seed", began[0][0].seed, 0)

    def test_temperature(self, began, tmp_path):
        ampo.main(["--temperature", "0.25", "--out", str(tmp_path / "run")])
        expect("--temperature 0.25", [cfg.temperature for cfg, _ in began], [0.25])

    def test_resume(self, began, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "model" / "run.json").write_text('{"seed": 4, "steps": 9, "group_size": 16}')
        ampo.main(["--resume", "--out", str(tmp_path), "--steps", "11", "--k", "12"])
        wanted = ampo.Config(seed=4, steps=11, group_size=16, k=12, resume=True, out=str(tmp_path))
        expect("settings and checkpoint of --resume --steps 11 --k 12", began, [(wanted, tmp_path / "model")])

    @pytest.mark.parametrize("argv, wanted", [
        ("", ("data/base", "data/test.jsonl", 32, 0.6)), ("--temperature 0", ("data/base", "data/test.jsonl", 32, 0.0)),
        ("--model m --data d --samples 3 --temperature 1.5", ("m", "d", 3, 1.5))], ids=["defaults", "greedy", "given"])
    def test_eval(self, monkeypatch, capsys, argv, wanted):
        calls = []
        monkeypatch.setattr(ampo, "load_student", lambda path, cfg: calls.append(path) or SimpleNamespace(cfg=cfg))
        monkeypatch.setattr(ampo, "load_checked", lambda student, path: calls.append(str(path)) or ["a", "b"])
        monkeypatch.setattr(ampo, "evaluate", lambda student, problems, samples, temperature=0.6: (
            calls.extend([samples, temperature, problems]), ({"pass@1": 0.5, "n": 2}, ["groups"]))[1])
        expect(f"exit status of eval {argv}", ampo.main(["eval", *argv.split()]), 0)
        expect("model, data, samples, temperature and problems", calls, [*wanted, ["a", "b"]])
        expect("the last line as JSON", json.loads(capsys.readouterr().out.splitlines()[-1]), {"pass@1": 0.5, "n": 2})

    @pytest.mark.parametrize("error, wanted", [
        (PermissionError(13, "Permission denied", "/x"), "ampo.py: [Errno 13] Permission denied: '/x'\n"),
        (torch.OutOfMemoryError("out of memory"), "ampo.py: out of memory; lower --micro_tokens\n")],
        ids=["file", "memory"])
    def test_errors_that_end_a_run(self, monkeypatch, capsys, tmp_path, error, wanted):
        def fail(cfg, checkpoint=None):
            raise error
        monkeypatch.setattr(ampo, "train", fail)
        expect("exit status", ampo.main(["--out", str(tmp_path / "run")]), 2)
        expect("what is on stderr", capsys.readouterr().err, wanted)

    def test_memory_that_does_not_suffice_for_sampling(self, monkeypatch, capsys, tmp_path):
        def generate():
            raise torch.OutOfMemoryError("out of memory")
        monkeypatch.setattr(ampo, "train", lambda cfg, checkpoint=None: generate())
        expect("exit status", ampo.main(["--out", str(tmp_path / "run")]), 2)
        expect("what is on stderr", capsys.readouterr().err, "ampo.py: out of memory; lower --cache_tokens\n")

    def test_errors_of_the_program_are_not_hidden(self, monkeypatch, tmp_path):
        monkeypatch.setattr(ampo, "train", lambda cfg, checkpoint=None: {}["no such key"])
        with pytest.raises(KeyError):
            ampo.main(["--out", str(tmp_path / "run")])

    @pytest.mark.parametrize("rank, ready, cuda, wanted", [
        (None, False, True, []), ("1", False, False, ["init"]), ("1", True, True, []), ("1", False, True, [1, "init"])],
        ids=["alone", "torchrun", "twice", "cuda"])
    def test_processes_of_torchrun(self, monkeypatch, began, tmp_path, rank, ready, cuda, wanted):
        calls = []
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank: monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: ready)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: calls.append("init"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "set_device", calls.append)
        ampo.main(["--out", str(tmp_path / "run")])
        expect(f"LOCAL_RANK is {rank}, CUDA is there: {cuda}, processes are connected already: {ready}", calls, wanted)

    @pytest.mark.parametrize("argv, named", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
    def test_wrong_input(self, tmp_path, refused, argv, named):
        said = refused(*SMALL, "--out", str(tmp_path / "run"), *argv.split())
        assert said.startswith("ampo.py: ") and named in said, f"{argv}: the message names {named}; it says {said}"
        assert not (tmp_path / "run").exists(), f"{argv}: nothing is written"

    @pytest.mark.parametrize("method, field", [("ampo", "teachers"), ("luffy", "teachers"), ("sft", "teachers"),
                                               ("guide", "hint"), ("ghpo", "solution")])
    def test_a_method_without_what_it_needs(self, tmp_path, refused, method, field):
        data = write_lines(tmp_path / "p.jsonl", [{"question": "2*x=3", "answer": "3/2"}])
        said = refused(*SMALL, "--method", method, "--data", data, "--out", str(tmp_path / "run"))
        assert field in said and "p.jsonl" in said, f"the message names file and field; it says {said}"
        assert not (tmp_path / "run").exists(), "nothing is written"

    def test_a_bad_line(self, tmp_path, refused):
        data = write_lines(tmp_path / "p.jsonl", [{"question": "q", "answer": "1"}, {"question": "q", "answer": "?"}])
        said = refused(*SMALL, "--data", data, "--out", str(tmp_path / "run"))
        assert "p.jsonl:2" in said and "answer" in said, f"the message names file, line and field; it says {said}"
        assert not (tmp_path / "run").exists(), "nothing is written"

    def test_a_folder_that_is_taken(self, tmp_path, refused):
        (tmp_path / "notes.txt").write_text("mine")
        for out in (tmp_path, tmp_path / "notes.txt"):
            assert "--out" in refused(*SMALL, "--out", str(out)), "the message names --out"
        expect("what is in the folder", os.listdir(tmp_path), ["notes.txt"])

    def test_nothing_to_resume(self, tmp_path, refused):
        assert "--resume" in refused("--resume", "--out", str(tmp_path / "none")), "the message names --resume"

    def test_eval_is_as_strict(self, refused):
        assert "no/model" in refused("eval", "--model", "no/model"), "the message names the model"
        assert "--samples" in refused("eval", "--samples", "0"), "the message names the argument"
        assert "later" in refused("--samples", "4", "later"), "a stray word is named"

    def test_as_a_command(self, tmp_path):
        """The real thing: what the shell gets to see."""
        command = [sys.executable, ampo.__file__, "--group_size", "1"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        expect("--group_size 1: exit status, lines on stderr, text on stdout",
               (run.returncode, run.stderr.count("\n"), run.stdout), (2, 1, ""))
        assert "--group_size" in run.stderr, f"the line names --group_size; it says {run.stderr}"


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


class TestRuns:
    def test_same_seed_same_run_and_another_seed_another(self, tmp_path):
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
            assert ampo.main([*SMALL, "--steps", "3", "--seed", seed, "--out", str(tmp_path / name)]) == 0
        assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b") != metrics_of(tmp_path / "c")
        a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
        assert all(torch.equal(a[k], b[k]) for k in a)

    @pytest.mark.parametrize("flags", [[], ["--advantage", "gae", "--method", "guide"]], ids=["ampo", "guide"])
    def test_mistake_10_resume_continues_bit_for_bit(self, tmp_path, flags):
        whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
        ampo.main([*SMALL, *flags, "--steps", "5", "--out", whole])
        ampo.main([*SMALL, *flags, "--steps", "3", "--out", parts])
        # A kill after the checkpoint of step 3: further metrics, half a line, half a checkpoint, an old one left over.
        (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 3, "reward": 9}\n{"st')
        (tmp_path / "parts" / "model.new").mkdir()
        assert ampo.main(["--resume", "--out", parts, "--steps", "5"]) == 0
        assert metrics_of(whole) == metrics_of(parts)
        a, b = weights_of(whole), weights_of(parts)
        assert all(torch.equal(a[k], b[k]) for k in a)

    def test_resume_finds_the_old_checkpoint_when_a_kill_came_between_the_renames(self, tmp_path):
        ampo.main([*SMALL, "--steps", "2", "--out", str(tmp_path / "run")])
        (tmp_path / "run" / "model").rename(tmp_path / "run" / "model.old")
        assert ampo.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
        assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]
        assert not (tmp_path / "run" / "model.old").exists()

    @pytest.mark.parametrize("method", list(ampo.METHODS))
    def test_every_method_runs_and_logs_the_same_fields(self, tmp_path, method):
        assert ampo.main([*SMALL, "--method", method, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
        row, = metrics_of(tmp_path / "run")
        assert {"step", "reward", "fail_rate", "rescued", "entropy", "response_length", "grad_norm",
                "clip_fraction"} <= set(row)
        full = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
        assert {"rollout_s", "guide_s", "update_s"} <= set(full)
        if method != "sft":
            assert row["logp_gap"] < 1e-4 and row["entropy"] > 0  # sampler and trainer agree; ratios start at 1

    def test_a_checkpoint_works_with_transformers_alone(self, tmp_path):
        ampo.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "run")])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        ids = prompt_of(tokenizer, "Solve 2*x=3.")
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids):].tolist()
        (ours, _), = ampo.generate(model, [ids], 1, 24, 0, tokenizer.eos_token_id)[0]
        assert ours == theirs

    def test_a_short_run_raises_the_reward(self, tmp_path):
        flags = ["--model", BASE, "--data", str(HERE / "data" / "train.jsonl"), "--prompts_per_step", "16",
                 "--steps", "40", "--eval_every", "0", "--out", str(tmp_path / "run")]
        assert ampo.main(flags) == 0
        rewards = [row["reward"] for row in metrics_of(tmp_path / "run")]
        assert statistics.mean(rewards[-8:]) > statistics.mean(rewards[:8]) + 0.05

    def test_closing_table_and_eval_command(self, tmp_path, capsys):
        lines = (HERE / "data" / "test.jsonl").read_text().splitlines(keepends=True)
        for name in ("train", "valid", "test", "ood_one"):
            (tmp_path / f"{name}.jsonl").write_text("".join(lines[:4]))
        flags = [*SMALL, "--data", str(tmp_path / "train.jsonl"), "--method", "grpo", "--eval_every", "1",
                 "--samples", "4", "--prompts_per_step", "2", "--steps", "1", "--out", str(tmp_path / "run")]
        assert ampo.main(flags) == 0
        shown = capsys.readouterr().out
        for word in ("pass@1", "pass@4", "ood_one", "Problem:", "base,", "trained,", "metrics.jsonl", "model", "none"):
            assert word in shown
        assert "valid" in metrics_of(tmp_path / "run")[0]
        row = next(line for line in shown.splitlines() if line.startswith("test"))
        command = ["eval", "--model", str(tmp_path / "run" / "model"), "--data", str(tmp_path / "test.jsonl"),
                   "--samples", "4"]
        assert ampo.main(command) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert list(last) == ["pass@1", "pass@2", "pass@4", "n", "length"]
        assert [float(n) for n in re.findall(r"-> +([\d.]+)", row)] == [100 * last["pass@1"], 100 * last["pass@4"]]

    def test_ctrl_c_saves_and_says_how_to_resume(self, tmp_path):
        out = tmp_path / "run"
        run = subprocess.Popen([sys.executable, ampo.__file__, *SMALL, "--steps", "500", "--out", str(out)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while run.poll() is None and len(metrics_of(out) if (out / "metrics.jsonl").exists() else []) < 1:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=60)
        assert run.returncode == 130 and f"--resume --out {out}" in said
        done = len(metrics_of(out))
        assert torch.load(out / "model" / "state.pt")["step"] == done
        assert ampo.main(["--resume", "--out", str(out), "--steps", str(done + 1)]) == 0
        assert len(metrics_of(out)) == done + 1


class TestLowPrecisionSampler:
    """On CUDA a bfloat16 copy samples and the float32 masters train."""

    def student(self, make_student):
        student = make_student(max_new_tokens=24, lr=1e-2)
        student.sampler = copy.deepcopy(student.model).bfloat16()
        return student

    def test_is_close_to_its_master(self, make_student, tokenizer):
        student = self.student(make_student)
        prompts = [tokenizer(question).input_ids for question in ("Solve 3*x=5.", "x", "Solve 11*x+4=5.")]
        torch.manual_seed(0)
        for prompt, group in zip(prompts, ampo.generate(student.sampler, prompts, 6, 24, 1.0, student.eos, span=16)):
            responses = [ids for ids, _ in group]
            logps, mask = ampo.token_logps(student.model, [prompt] * 6, responses)
            sampled = torch.tensor(sum((p for _, p in group), []))
            assert torch.isfinite(sampled).all() and 0 < (logps[mask] - sampled).abs().mean() < 0.05

    def test_follows_its_master_whenever_that_moves(self, make_student):
        """Updated by itself it would not move: a step of 1e-6 vanishes beside a bfloat16 weight."""
        student = self.student(make_student)
        before = [p.clone() for p in student.sampler.parameters()]
        optimizer = torch.optim.AdamW(student.model.parameters(), 1e-2)
        s = ampo.Sample([2, 3], [5, 6, 7], [-1.0] * 3, "", True, 1.0, advantages=[1.0] * 3)
        assert ampo.update(student, optimizer, [s])["grad_norm"] > 0
        for low, master, old in zip(student.sampler.parameters(), student.model.parameters(), before):
            assert low.dtype == torch.bfloat16 and torch.equal(low, master.bfloat16())
        assert any(not torch.equal(p, old) for p, old in zip(student.sampler.parameters(), before))
        assert {p.dtype for p in student.model.parameters()} == {torch.float32}

    def test_a_step_moves_the_masters(self, make_student, monkeypatch):
        """On-policy ratios near 1: the sampler's log-probabilities, not the masters', are the denominator."""
        student = self.student(make_student)
        monkeypatch.setattr(ampo, "verify", lambda text, gold: len(text) % 2 == 0)
        row = ampo.train_step(student, adamw(student), [ampo.Problem(**line) for line in LINES], 0)
        assert 1e-6 < row["logp_gap"] < 0.05 and row["grad_norm"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Runs of a tenth of a second a step, and Python in another process


def few_problems(folder):
    """Flags for tiny runs on the first problems of the miniature. The first steps have groups of all kinds."""
    lines = (HERE / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:40]))
    return ["--model", BASE, "--data", str(folder / "few.jsonl"), "--prompts_per_step", "2", "--group_size", "2",
            "--max_new_tokens", "32", "--updates", "1", "--eval_every", "0", "--save_every", "1"]


def same_run(one, other):
    """Equal metrics, and equal weights bit for bit."""
    a, b = weights_of(one), weights_of(other)
    return metrics_of(one) == metrics_of(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def calling(name, *args):
    """The program that calls a function of this file."""
    test = Path(__file__)
    return f"import sys; sys.path.insert(0, {str(test.parent)!r}); import {test.stem}; {test.stem}.{name}(*{args!r})"


def torchrun(script, *argv):
    """A script in two processes; returns how it ended. What hangs fails by the time limit, generous for a busy CPU:
    torchrun then ends its processes on SIGTERM, but could not on SIGKILL."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        said = process.communicate(timeout=120)
    finally:
        process.terminate(), process.wait()
    return subprocess.CompletedProcess(command, process.returncode, *said)


# ---------------------------------------------------------------------------------------------------------------------
# §8 Several processes


def guided_samples():
    """Off-policy samples with ratios far apart, so that each rank alone would measure another γ."""
    return [sample_of([5, 6, 7], old_logps=[-9.0, -2.0, -1.0], advantages=[0.7] * 3, off_policy=True),
            sample_of([16, 17], old_logps=[-0.1, -0.2], advantages=[-0.4] * 2, off_policy=True)]


def shares():
    """What each of two ranks has in its update, by case."""
    silent = [sample_of([5, 6], advantages=[0.0] * 2), sample_of([5, 6, 7], advantages=[0.0] * 3, off_policy=True)]
    mixed, guided = mixed_samples(), guided_samples()
    return {"uneven": (mixed[:3] + guided[:1], guided[1:]), "on against off": (mixed[:2] + mixed[3:], guided),
            "one silent": (silent, mixed + guided), "one empty": (mixed + guided, []), "both silent": (silent, silent)}


UPDATES = [dict(method="ampo", follow="code"), dict(method="ampo", follow="paper"), dict(method="guide", follow="code"),
           dict(method="guide", follow="paper"), dict(method="ampo", advantage="gae")]


def moved_by_update(samples, flags):
    """Parameters of model and value head after one update by SGD with lr 1, how far that was before the gradient was
    shortened to norm 1, and the update's statistics."""
    critic = torch.nn.Linear(32, 1)
    for weight in critic.parameters():
        weight.data.zero_()
    model, cfg = random_model(scale=1.0), ampo.Config(max_new_tokens=40, micro_tokens=16, **flags)
    student = ampo.Student(model, model, None, critic, [1], cfg)
    weights = [*model.parameters(), *critic.parameters()]
    for sample in samples:
        sample.values = [0.2] * len(sample.ids)
    before = [weight.detach().clone() for weight in weights]
    stats = ampo.update(student, torch.optim.SGD(weights, lr=1.0), samples)
    after = [weight.detach().clone() for weight in weights]
    scale = [max(1, stats["grad_norm"])] * (len(weights) - 2) + [1, 1]
    return after, [(b - a) * s for b, a, s in zip(before, after, scale)], stats


def updates_of_this_rank(folder):
    """Run by torchrun: every case of shares() with every line of UPDATES."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = {(case, i): moved_by_update(share[rank], flags) for i, flags in enumerate(UPDATES)
               for case, share in shares().items()}
    torch.save(results, Path(folder) / f"{rank}.pt")


def record_and_die(folder, argv):
    """Run by torchrun: ampo.main that notes every rollout, and in which rank 1 dies at step 1."""
    rank, judge, train_step = int(os.environ["RANK"]), ampo.judge, ampo.train_step

    def noted(*args):
        sample = judge(*args)
        with open(Path(folder) / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps({"tokens": len(sample.ids), "reward": sample.reward, "problem": args[1].where,
                                   "seed": torch.initial_seed()}) + "\n")
        return sample

    def deadly(student, optimizer, problems, step):
        if (rank, step) == (1, 1):
            ampo.gather((0, 0, 0))  # what set_weights gathers: by now the other rank has saved step 0
            os._exit(3)
        return train_step(student, optimizer, problems, step)
    ampo.judge, ampo.train_step = noted, deadly
    sys.exit(ampo.main(argv))


@pytest.fixture(scope="class")
def pair(tmp_path_factory):
    """A whole run of three steps in two processes: its folder, its flags, and how it ended."""
    folder = tmp_path_factory.mktemp("pair")
    flags = [*few_problems(folder), "--prompts_per_step", "4", "--steps", "3", "--eval_every", "3", "--samples", "2"]
    shutil.copy(folder / "few.jsonl", folder / "all.jsonl")
    for name in ("valid", "test"):
        (folder / f"{name}.jsonl").write_text("".join((folder / "all.jsonl").open().readlines()[:2]))
    return folder / "whole", flags, torchrun(ampo.__file__, *flags, "--out", str(folder / "whole"))


class TestTorchrun:
    def test_a_step_of_two_ranks_is_that_of_one_process_on_all_samples(self, tmp_path):
        """Normalisers, γ and gradients of one rank only; a rank without samples that waits for nobody, or for ever."""
        (tmp_path / "rank.py").write_text(calling("updates_of_this_rank", str(tmp_path)))
        run = torchrun(tmp_path / "rank.py")
        assert run.returncode == 0, run.stderr
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        for (case, i), (after, gradient, stats) in first.items():
            assert all(torch.equal(a, b) for a, b in zip(after, second[case, i][0])), (case, UPDATES[i])
            _, expected, whole = moved_by_update(sum(shares()[case], []), UPDATES[i])
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradient, expected)), (case, UPDATES[i])
            assert stats["grad_norm"] == second[case, i][2]["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
            assert (stats["grad_norm"] > 0) == (case != "both silent")
            for name in ("tokens", "clipped", "gap"):
                assert stats[name] + second[case, i][2][name] == pytest.approx(whole[name], rel=1e-4)

    def test_one_log_one_table_and_one_checkpoint(self, pair):
        """Both ranks writing, printing or saving."""
        out, _, run = pair
        assert run.returncode == 0, run.stderr
        assert [row["step"] for row in metrics_of(out)] == [0, 1, 2] and "valid" in metrics_of(out)[2]
        for line in ("base -> trained", "Problem:", "run: "):
            assert run.stdout.count(line) == 1
        assert run.stderr.count("0/3 [00:00<?, ?it/s]") == 1
        assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "model"]
        weights, base = weights_of(out), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).state_dict()
        assert any(not torch.equal(weights[name], base[name]) for name in base)

    def test_a_rank_that_dies_ends_the_other_and_resuming_gives_the_whole_run(self, pair, tmp_path):
        """A hang; metrics of one rank's groups only; random numbers or problems that differ after --resume."""
        whole, flags, _ = pair
        out = tmp_path / "run"
        program = calling("record_and_die", str(tmp_path), [*flags, "--out", str(out)])
        (tmp_path / "rank.py").write_text(program)
        assert torchrun(tmp_path / "rank.py").returncode != 0
        assert time.time() - (tmp_path / "1.jsonl").stat().st_mtime < 60
        notes = [[json.loads(line) for line in (tmp_path / f"{rank}.jsonl").open()] for rank in (0, 1)]
        row, = metrics_of(out)
        assert weights_of(out) and torch.load(out / "model" / "state.pt")["step"] == 1
        # Rank 0 has begun step 1 alone: its first four rollouts are those of step 0, as are all of rank 1's.
        first, second = notes[0][:4], notes[1]
        assert len(second) == 4 and first[0]["seed"] != second[0]["seed"]  # else their samples are correlated
        assert len({note["problem"] for note in first + second}) == 4
        assert row["tokens"] == sum(note["tokens"] for note in first + second)
        assert row["reward"] == pytest.approx(sum(note["reward"] for note in first + second) / 8)
        run = torchrun(ampo.__file__, "--resume", "--out", str(out))
        assert run.returncode == 0, run.stderr
        assert same_run(out, whole)

    def test_problems_that_cannot_be_shared_evenly(self, pair, tmp_path):
        """Ranks with unequal numbers of updates would wait for each other for ever."""
        run = torchrun(ampo.__file__, *pair[1], "--prompts_per_step", "3", "--out", str(tmp_path / "run"))
        assert run.returncode != 0 and "ampo.py: --prompts_per_step 3: no multiple of 2 processes\n" in run.stderr
        assert f'File "{ampo.__file__}"' not in run.stderr and not (tmp_path / "run").exists()  # torchrun's own shows


# ---------------------------------------------------------------------------------------------------------------------
# §8 Faults


def live(argv):
    """Fork a process that runs ampo.main; returns its id and a pipe that gets a byte at the start of each step."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    try:
        batch_indices = ampo.batch_indices
        ampo.batch_indices = lambda *args: os.write(write, b".") and batch_indices(*args)
        os._exit(ampo.main(argv))
    finally:
        traceback.print_exc()
        os._exit(1)


def kill_often(flags, whole, out, kills):
    """Run in a fresh process, where forking is safe: an uninterrupted run, and one killed at random moments."""
    torch.set_num_threads(1)
    rng, out = random.Random(0), Path(out)
    pid, pipe = live([*flags, "--out", whole])
    os.read(pipe, 1)
    began, steps = time.perf_counter(), 1 + len(b"".join(iter(lambda: os.read(pipe, 100), b"")))
    a_step = (time.perf_counter() - began) / steps
    assert os.waitpid(pid, 0)[1] == 0
    for kill in range(kills + 1):
        known = (out / "metrics.jsonl").exists()
        pid, pipe = live([*flags, "--out", str(out), *["--resume"] * known])
        if kill < kills:
            for _ in range(rng.randrange(3)):
                os.read(pipe, 1)
            time.sleep(rng.uniform(0, 1.2 * a_step))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        os.close(pipe)
        assert status == signal.SIGKILL * (kill < kills), (kill, status)


@pytest.fixture(scope="class")
def runs(tmp_path_factory):
    """Folders of an uninterrupted run of three steps, of one that stopped after two, and the flags of both."""
    folder = tmp_path_factory.mktemp("runs")
    flags = few_problems(folder)
    for name, steps in (("whole", "3"), ("two", "2")):
        assert ampo.main([*flags, "--steps", steps, "--out", str(folder / name)]) == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return folder / "whole", folder / "two", flags


@pytest.fixture
def two(runs, tmp_path):
    """A copy of the run that stopped after two steps."""
    return Path(shutil.copytree(runs[1], tmp_path / "run"))


def resume(out, steps=3):
    return ampo.main(["--resume", "--steps", str(steps), "--out", str(out)])


def once_training(patch, name, function):
    """Replace a function of ampo.py at the beginning of the first step, as loading a model calls some too."""
    batch_indices = ampo.batch_indices
    patch.setattr(ampo, "batch_indices", lambda *args: patch.setattr(ampo, name, function) or batch_indices(*args))


def complaint(capsys):
    """The one line on stderr that ampo.py says before it gives up, beside its progress bar."""
    said = capsys.readouterr().err
    found = re.findall(r"^ampo\.py: .*\n", re.sub(r"[^\n]*\r", "", said), re.MULTILINE)
    assert len(found) == 1 and "Traceback" not in said, said
    return found[0]


class TestFaults:
    def test_kill_9_at_random_moments(self, tmp_path):
        """A checkpoint that is not whole at every moment, state that is not in it, metrics lost or written twice."""
        whole, out, flags = tmp_path / "whole", tmp_path / "run", [*few_problems(tmp_path), "--steps", "25"]
        program = calling("kill_often", flags, str(whole), str(out), 20)
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
        assert run.returncode == 0, run.stderr
        assert len(metrics_of(out)) == 25 and same_run(out, whole)
        assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "model"]

    def test_a_kill_at_every_file_operation_of_a_checkpoint(self, runs, tmp_path, monkeypatch, capsys):
        """A moment between two operations that leaves neither the old checkpoint nor the new one. What a kill would
        leave behind is a copy of the folder at that moment."""
        whole, two, flags = runs
        states, names, begun, train_step = tmp_path / "states", [], [], ampo.train_step
        operations = FileOperations(monkeypatch, lambda name: (
            shutil.copytree(tmp_path / "run", states / str(len(names))), names.append(name)))
        assert ampo.main([*flags, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
        assert names.count("os.rename model.new") == 2 and names.count("os.rename model") == 1
        assert {"write model.safetensors", "write state.pt", "os.rmdir model.old"} <= set(names) and len(names) > 25

        def survives_another_kill(name):
            checkpoint = ampo.open_run(ampo.Config(out=str(out), resume=True), {})[1]
            assert not saved or {"model.safetensors", "state.pt", "config.json"} <= set(os.listdir(checkpoint))
        operations.watch = survives_another_kill
        monkeypatch.setattr(ampo, "train_step", lambda *args: begun.append(args[3]) or train_step(*args))
        for i, name in enumerate(names):
            out, saved = states / str(i), names[:i].count("os.rename model.new")
            steps, expected = (3, whole) if (out / "model.old").exists() else (2, two)  # the next save clears it away
            begun.clear()
            assert ampo.main([*flags, "--steps", str(steps), "--resume", "--out", str(out)]) == 0, name
            assert begun == list(range(saved, steps)), name  # it went on, and did not start over
            assert same_run(out, expected) and sorted(os.listdir(out)) == ["metrics.jsonl", "model"], name

    @pytest.mark.parametrize("operation", ["os.mkdir model.new", "open config.json", "open run.json", "os.rename model",
                                           "os.rename model.new"])
    def test_a_disk_that_is_full_at_an_operation_of_a_checkpoint(self, runs, two, monkeypatch, capsys, operation):
        """An error of the system that ends in a traceback, or after which the last checkpoint is gone."""
        def fail(name):
            if name == operation:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        operations = FileOperations(monkeypatch, fail)
        assert resume(two) == 2
        said = complaint(capsys)
        assert f"{two}: no checkpoint written" in said and "No space left on device" in said
        operations.watch = lambda name: None
        assert resume(two) == 0 and same_run(two, runs[0])

    @pytest.mark.parametrize("room, named", [(500_000, "no checkpoint written"), (2_500_000, "no checkpoint written"),
                                             (None, "File too large")], ids=["model", "state", "metrics"])
    def test_files_that_may_not_grow(self, runs, two, capsys, room, named):
        """The real thing, in which safetensors and torch raise errors of their own kinds: a limit on the size of files
        that stops model.safetensors, state.pt, or the line in metrics.jsonl."""
        before = weights_of(two)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room or (two / "metrics.jsonl").stat().st_size + 10, limits[1]))
        try:
            status = resume(two)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 2 and named in complaint(capsys)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(two).items())
        assert resume(two) == 0 and same_run(two, runs[0])

    @pytest.mark.parametrize("out", ["few.jsonl/run", "/proc/xyz", "/proc/xyz/run"])
    def test_a_folder_that_cannot_be(self, runs, capsys, out):
        """A traceback, or training for nothing, where there is no place to write to."""
        folder = runs[0].parent
        before = sorted(folder.rglob("*"))
        assert ampo.main([*runs[2], "--steps", "1", "--out", str(folder / out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("ampo.py: ") and said.count("\n") == 1 and out.split("/run")[0] in said
        assert sorted(folder.rglob("*")) == before

    @pytest.mark.parametrize("content", [lambda whole: b"", lambda whole: whole[:len(whole) // 2]],
                             ids=["empty", "half"])
    @pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "run.json", "tokenizer.json", "config.json"])
    def test_a_checkpoint_with_a_cut_file(self, runs, two, capsys, name, content):
        """A traceback; metrics cut or weights drawn anew before the damage is noticed."""
        self.damage(runs, two, capsys, name, content)

    @pytest.mark.parametrize("name, content", [
        ("chat_template.jinja", lambda whole: whole[:len(whole) // 2]), ("run.json", lambda whole: b"\xff"),
        ("run.json", lambda whole: b'{"nonsense": 1}')], ids=["template", "bytes", "unknown"])
    def test_a_checkpoint_with_a_file_that_is_something_else(self, runs, two, capsys, name, content):
        """A template with a syntax error, flags that are not text, and a flag of another version of this file."""
        self.damage(runs, two, capsys, name, content)

    def damage(self, runs, two, capsys, name, content):
        file, metrics = two / "model" / name, (two / "metrics.jsonl").read_bytes()
        whole = file.read_bytes()
        file.write_bytes(content(whole))
        assert resume(two) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"ampo.py: {two / 'model'}") and said.count("\n") == 1
        assert (two / "metrics.jsonl").read_bytes() == metrics
        file.write_bytes(whole)
        assert resume(two) == 0 and same_run(two, runs[0])

    def test_a_gradient_that_is_not_finite_costs_one_step(self, runs, tmp_path, monkeypatch, capsys):
        """Weights, or AdamW's moments, that are nan from then on."""
        calls, method = [], ampo.METHODS["sft"]

        def objective(*args):
            calls.append(len(calls))
            return method.objective(*args) * (float("nan") if len(calls) == 2 else 1)
        monkeypatch.setitem(ampo.METHODS, "sft", replace(method, objective=objective))
        assert ampo.main([*runs[2], "--method", "sft", "--steps", "4", "--out", str(tmp_path / "run")]) == 0
        assert len(calls) == 4
        norms = [row["grad_norm"] for row in metrics_of(tmp_path / "run")]
        assert norms[1] is None and all(norm > 0 and math.isfinite(norm) for norm in norms[:1] + norms[2:])
        assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
        assert "".join(capsys.readouterr()).count("a gradient is not finite") == 1
        assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run").values())
        state = torch.load(tmp_path / "run" / "model" / "state.pt")["optimizer"]["state"]
        assert all(value.isfinite().all() for moments in state.values() for value in moments.values())
        assert {int(moments["step"]) for moments in state.values() if moments["exp_avg"].any()} == {3}

    @pytest.mark.parametrize("function, flag", [("prefill", "--cache_tokens"), ("score", "--micro_tokens")],
                             ids=["sampling", "learning"])
    def test_memory_that_does_not_suffice(self, runs, two, monkeypatch, capsys, function, flag):
        """A traceback without a hint at what to do about it, or a hint at the other flag."""
        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        with monkeypatch.context() as patch:
            once_training(patch, function, full)
            assert resume(two) == 2
        said = complaint(capsys)
        assert "out of memory" in said and said.endswith(f"; lower {flag}\n")
        assert len(metrics_of(two)) == 2 and resume(two) == 0 and same_run(two, runs[0])

    @pytest.mark.parametrize("function", ["generate", "update", "save_checkpoint"],
                             ids=["sampling", "learning", "saving"])
    def test_the_second_ctrl_c_ends_at_once(self, runs, two, monkeypatch, function):
        """Being stuck in a long step, or a checkpoint that the second one breaks."""
        original, begun, ended = getattr(ampo, function), [], []

        def interrupted(*args, **kwargs):
            begun.append(os.kill(os.getpid(), signal.SIGINT))
            assert len(begun) == 1  # the first Ctrl-C only asks; what follows is the second
            os.kill(os.getpid(), signal.SIGINT)
            ended.append(original(*args, **kwargs))
        with monkeypatch.context() as patch:
            once_training(patch, function, interrupted)
            with pytest.raises(SystemExit) as end:
                resume(two)
        assert end.value.code == 130 and len(begun) == 1 and not ended
        assert resume(two) == 0 and same_run(two, runs[0])


# ---------------------------------------------------------------------------------------------------------------------
# Families of models, system prompts, gradient checkpointing


class TestModelFamilies:
    QUESTIONS = ["Solve 3*x=5.", "x?", "Solve 7*x=8 and say how you found out what x is."]

    def prompts(self, student):
        return [ampo.encode_prompt(student.tokenizer, question) for question in self.QUESTIONS]

    def test_loads_with_all_its_end_tokens(self, family):
        """Llama 3 ends a turn with a token that only generation_config knows: without it no rollout would stop."""
        student, expected = ampo.load_student(family, ampo.Config()), FAMILIES[Path(family).name]
        ends = expected.get("ends", ["<|im_end|>"])
        assert student.tokenizer.convert_ids_to_tokens(student.eos) == ends
        assert student.tokenizer.pad_token == expected["pad"]
        assert student.model.dtype == torch.float32 and not student.model.training

    def test_sampling_equals_an_uncached_forward_pass(self, family):
        """Position ids, padding, cache and scaling of embeddings differ between families."""
        student = ampo.load_student(family, ampo.Config())
        stops, prompts = student.eos + list(range(20, 50)), self.prompts(student)
        torch.manual_seed(0)
        groups = ampo.generate(student.model, prompts, 8, 24, 0.8, stops)
        expect_exact(student.model, prompts, groups, 0.8)
        assert len(set(map(len, prompts))) == 3 and len({len(ids) for group in groups for ids, _ in group}) > 5
        for prompt, group in zip(prompts, groups):  # the first ratio is 1
            ids, sampled = zip(*group)
            logps, mask = ampo.token_logps(student.model, [prompt] * 8, list(ids), 0.8)
            assert logps[mask].tolist() == pytest.approx(sum(sampled, []), abs=2e-4)

    def test_greedy_equals_that_of_transformers(self, family):
        student = ampo.load_student(family, ampo.Config())
        prompts, stops = self.prompts(student), student.eos + list(range(20, 50))
        for prompt, ((ours, _),) in zip(prompts, ampo.generate(student.model, prompts, 1, 24, 0, stops)):
            assert ours == greedy(student.model, prompt, eos_token_id=stops)

    def test_logps_equal_one_sequence_at_a_time(self, family):
        """base_model and output head are looked up in the model: their names and what lies between them differ."""
        student, rng = ampo.load_student(family, ampo.Config()), torch.Generator().manual_seed(0)
        prompts = self.prompts(student)
        responses = [torch.randint(0, 300, (n,), generator=rng).tolist() for n in (9, 1, 17)]
        logps, mask = ampo.token_logps(student.model, prompts, responses, 0.8)
        for row, m, prompt, response in zip(logps, mask, prompts, responses):
            assert row[m].tolist() == pytest.approx(full_logps(student.model, prompt, response, 0.8), abs=2e-4)

    def test_what_is_compared_depends_on_the_context(self, family):
        """Otherwise the tests above would pass with a wrong mask or wrong positions."""
        student = ampo.load_student(family, ampo.Config())
        prompt, response = self.prompts(student)[0], list(range(60, 80))
        exact = full_logps(student.model, prompt, response)
        for other in (prompt[1:], [*prompt[:5], prompt[6], prompt[5], *prompt[7:]]):
            assert max(abs(a - b) for a, b in zip(exact, full_logps(student.model, other, response))) > 0.05

    @pytest.mark.parametrize("method", ["ampo", "grpo"])
    def test_learns_and_the_result_loads_with_transformers_alone(self, family, method, tmp_path, monkeypatch):
        if method == "grpo": monkeypatch.setattr(ampo, "verify", lambda text, gold: len(text) % 2 == 0)
        assert ampo.main(run_flags(family, tmp_path, "--method", method)) == 0
        row, = map(json.loads, open(tmp_path / "run" / "metrics.jsonl"))
        assert row["logp_gap"] < 1e-3 and row["grad_norm"] > 0 and bool(row["teachers"]) == (method == "ampo")
        saved, base = tmp_path / "run" / "model", AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
        assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters()))
        assert model.generation_config.eos_token_id == base.generation_config.eos_token_id
        prompt = ampo.encode_prompt(tokenizer, self.QUESTIONS[0])
        (ours, _), = ampo.generate(model, [prompt], 1, 24, 0, model.generation_config.eos_token_id)[0]
        assert tokenizer.decode(ours) == tokenizer.decode(greedy(model, prompt))


def greedy(model, prompt, **more):
    ids = torch.tensor([prompt])
    settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0) | more
    return model.generate(ids, **settings)[0, len(prompt):].tolist()


class TestSystemPrompt:
    SYSTEM, QUESTION = "Answer in a box.", "Solve 3*x=5."

    def test_answers_and_traces_are_learnt_under_it(self, folder, tmp_path, monkeypatch):
        """A trace trained on another prompt than the rollouts would teach nothing about the prompt that is used."""
        trained, update = [], ampo.update
        monkeypatch.setattr(ampo, "update", lambda student, optimizer, samples: (
            trained.extend(samples), update(student, optimizer, samples))[1])
        assert ampo.main(run_flags(folder, tmp_path, "--system", self.SYSTEM)) == 0
        tokenizer = small_tokenizer()
        expected = [ampo.encode_prompt(tokenizer, line["question"], self.SYSTEM) for line in LINES]
        assert {s.source for s in trained} == {"student", "divide", "short"}
        assert sorted(map(tuple, expected)) == sorted({tuple(s.prompt) for s in trained})

    def test_answers_are_sampled_under_it(self, folder):
        student = ampo.load_student(folder, ampo.Config(system=self.SYSTEM, max_new_tokens=8, group_size=2))
        group, = ampo.rollout(student, [ampo.Problem(self.QUESTION, "5/3")], [self.QUESTION])
        for s in group:
            assert s.prompt == ampo.encode_prompt(student.tokenizer, self.QUESTION, self.SYSTEM)
            assert s.old_logps == pytest.approx(full_logps(student.model, s.prompt, s.ids), abs=2e-4)

    def test_traces_are_understood_under_it(self, folder, monkeypatch):
        student, seen, token_logps = ampo.load_student(folder, ampo.Config(system=self.SYSTEM)), [], ampo.token_logps
        problem, tokenizer, trace = ampo.Problem(**LINES[0]), student.tokenizer, "3*x=5\n\\boxed{1}"
        prompt = ampo.encode_prompt(tokenizer, problem.question, self.SYSTEM)
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        before, whole = encode("3*x=5\n\\boxed{"), encode("3*x=5\n\\boxed{5/3")
        start = len(os.path.commonprefix([before, whole]))
        logps = full_logps(student.model, prompt + whole[:start], whole[start:])
        score, = ampo.comprehension(student.model, tokenizer, problem, [trace], system=self.SYSTEM)
        assert score == pytest.approx(sum(map(math.exp, logps)) / len(logps), rel=1e-3)
        monkeypatch.setattr(ampo, "token_logps", lambda model, prompts, *rest: (
            seen.extend(prompts), token_logps(model, prompts, *rest))[1])
        ampo.choose_traces(student, problem, 2)
        assert len(seen) == 2 and all(ids[:len(prompt)] == prompt for ids in seen)


class TestRecompute:
    PROMPTS, RESPONSES = [[5, 6, 7], [8], [9, 10, 11, 12]], [[13, 14], [15, 16, 17, 18, 1], [1]]

    def student(self, folder, recompute=True):
        return ampo.load_student(folder, ampo.Config(recompute=recompute))

    def test_gradient_stays_the_same_and_layers_run_again(self, folder):
        gradients, runs = [], []
        for recompute in (False, True):
            student, calls = self.student(folder, recompute), []
            student.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
            logps, _ = ampo.token_logps(student.model, self.PROMPTS, self.RESPONSES)
            forward = len(calls)
            logps.sum().backward()
            runs.append((forward, len(calls)))
            gradients.append([p.grad for p in student.model.parameters()])
        assert runs == [(1, 1), (1, 2)]
        assert all(torch.allclose(a, b, atol=1e-6) and a.abs().sum() > 0 for a, b in zip(*gradients))

    @pytest.mark.parametrize("recompute", [False, True])
    def test_dropout_stays_off(self, tmp_path, recompute):
        """With dropout the first ratio would not be 1; checkpointing of transformers asks for training mode."""
        student = self.student(save_model(tmp_path, "qwen2", attention_dropout=0.5), recompute)
        assert student.model.config.attention_dropout == 0.5
        logps, mask = ampo.token_logps(student.model, self.PROMPTS, self.RESPONSES)
        for row, m, prompt, response in zip(logps, mask, self.PROMPTS, self.RESPONSES):
            assert row[m].tolist() == pytest.approx(full_logps(student.model, prompt, response), abs=1e-4)
        assert not any(module.training for module in student.model.modules())

    def test_dropout_of_a_whole_layer_stays_off(self, tmp_path):
        """OPT drops out in the layer itself, which is what checkpointing puts into training mode."""
        student = self.student(save_model(tmp_path, "opt", ffn_dim=64, word_embed_proj_dim=32, dropout=0.5), False)
        for prompt, response in zip(self.PROMPTS, self.RESPONSES):
            logps, _ = ampo.token_logps(student.model, [prompt], [response])
            assert logps[0].tolist() == pytest.approx(full_logps(student.model, prompt, response), abs=1e-4)

    def test_sampling_keeps_its_cache(self, folder):
        """Transformers drop the cache of a model that is checkpointed while training."""
        student = self.student(folder)
        ampo.token_logps(student.model, self.PROMPTS, self.RESPONSES)[0].sum().backward()
        widths, forward = [], student.model.model.forward
        student.model.model.forward = lambda input_ids=None, **more: (
            widths.append(input_ids.shape[1]), forward(input_ids=input_ids, **more))[1]
        groups = ampo.generate(student.sampler, self.PROMPTS, 4, 12)
        assert widths == [4] + [1] * 11  # each prompt is read once, then a token at a time
        expect_exact(student.model, self.PROMPTS, groups)

    def test_a_run_with_it_is_a_run_without_it(self, folder, tmp_path):
        rows = []
        for name, more in (("a", []), ("b", ["--recompute"])):
            (tmp_path / name).mkdir()
            assert ampo.main(run_flags(folder, tmp_path / name, *more)) == 0
            rows.append(json.loads((tmp_path / name / "run" / "metrics.jsonl").read_text()))
        for column in ("reward", "entropy", "response_length", "grad_norm"):
            assert rows[0][column] == pytest.approx(rows[1][column], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be trained is refused


class TestUnsuitableModels:
    """Exit status 2 and a message that says why, where a model would otherwise be sampled from or trained wrongly."""

    UNSUITABLE = {
        "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "mistral": dict(sliding_window=8),
        "gemma3_text": dict(head_dim=8, sliding_window=8),
        "mamba": dict(state_size=4, num_hidden_layers=2),
        "qwen3_next": dict(head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                           linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                           shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"])}
    # Their logits are not what the output head makes of the last hidden states.
    CHANGED_HEADS = {
        "gemma2": dict(head_dim=8, final_logit_softcapping=1.0, layer_types=["full_attention"] * 2),
        "granite": dict(logits_scaling=16.0), "cohere": dict(logit_scale=0.05)}

    def message(self, capsys, *argv):
        capsys.readouterr()
        status = ampo.main(list(argv))
        message = capsys.readouterr().err.split("ampo.py: ")[1:]  # before it stands the progress bar
        assert status == 2 and len(message) == 1 and message[0].count("\n") == 1
        return message[0]

    @pytest.mark.parametrize("kind", UNSUITABLE)
    def test_other_caches(self, tmp_path, capsys, kind):
        path = save_model(tmp_path / "base", kind, **self.UNSUITABLE[kind])
        flags = run_flags(path, tmp_path)
        assert kind in self.message(capsys, *flags, "--method", "grpo")
        assert kind in self.message(capsys, "eval", *flags, "--samples", "2")

    @pytest.mark.parametrize("kind", ["recurrent_gemma", "rwkv"])
    def test_caches_that_fail_before_they_are_looked_at(self, tmp_path, capsys, kind):
        """One raises inside transformers' first forward pass, the other leaves the cache it was given empty."""
        path = save_model(tmp_path / "base", kind)
        assert kind in self.message(capsys, "eval", *run_flags(path, tmp_path), "--samples", "2")

    @pytest.mark.parametrize("kind", CHANGED_HEADS)
    def test_changed_heads(self, tmp_path, capsys, kind):
        path = save_model(tmp_path / "base", kind, scale=16.0, **self.CHANGED_HEADS[kind])
        assert "disagree" in self.message(capsys, *run_flags(path, tmp_path))
        assert not (tmp_path / "run" / "model").exists()

    @pytest.mark.parametrize("kind, neutral", [
        ("gemma2", dict(final_logit_softcapping=None)), ("granite", dict(logits_scaling=1.0)),
        ("cohere", dict(logit_scale=1.0))])
    def test_the_same_families_learn_with_a_plain_head(self, tmp_path, kind, neutral):
        path = save_model(tmp_path / "base", kind, **self.CHANGED_HEADS[kind] | neutral)
        assert ampo.main(run_flags(path, tmp_path)) == 0

    def test_without_chat_template(self, tmp_path, capsys):
        path = save_model(tmp_path / "base", "qwen2", template=None)
        assert "chat template" in self.message(capsys, *run_flags(path, tmp_path))
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The file as a companion: what is copied runs, what is asked of a student is graded, what the pages name is there


def load_script(name):
    """One of the scripts in data/, as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / "data" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


SOURCE, EXERCISE = (HERE / "ampo.py").read_text(), load_script("exercise")
FOUND = EXERCISE.definitions(ast.parse(SOURCE))
PUBLIC = [name for name, node in FOUND.items() if isinstance(node, ast.FunctionDef) and name[0] != "_"]


def section(first, last):
    """The names defined in some sections of ampo.py."""
    start, end = (SOURCE[:SOURCE.index(f"# §{number} ")].count("\n") for number in (first, last + 1))
    return [name for name in FOUND if start < FOUND[name].lineno < end]


def copied(name):
    """An empty namespace with the imports of ampo.py, a definition, and the names it needs, with theirs in turn."""
    wanted = [name]
    for one in wanted: wanted += [other for other in EXERCISE.needs(one, FOUND) if other not in wanted]
    nodes = [node for node in ast.parse(SOURCE).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    nodes += {FOUND[one].lineno: FOUND[one] for one in sorted(wanted, key=lambda one: FOUND[one].lineno)}.values()
    exec(compile(ast.Module(nodes, []), "copied", "exec"), namespace := {"__name__": "copied"})
    return namespace


class TestCopies:
    """Functions are made to be copied: up to §7 none needs more than three other names; §8 is the wiring."""

    def test_no_more_than_three_names_are_needed(self):
        needs = {name: EXERCISE.needs(name, FOUND) for name in section(1, 7) if name in PUBLIC}
        assert {name: names for name, names in needs.items() if len(names) > 3} == {}

    def test_sections_4_and_5_run_alone(self, model):
        p, r, states = [[2, 3, 4], [5, 6]], [[7, 8], [9]], torch.ones(2, 32)
        layer = SimpleNamespace(keys=torch.rand(2, 2, 3, 4), values=torch.rand(2, 2, 3, 4))
        calls = {
            "Slab": lambda f: f(layer, 1, 3, torch.tensor([3])).buffers,
            "replayed": lambda f: f(lambda: 5, model.device)(), "sample_tokens": lambda f: f(torch.eye(5), 0.7),
            "prefill": lambda f: [f(model, p, 2, 8)[i] for i in (0, 2, 3, 4)],
            "generate": lambda f: f(model, p, 3, 5, eos_token_id=7), "pad": lambda f: f(r, "cpu", "left"),
            "read_head": lambda f: f(model.lm_head, states, torch.tensor([3, 4]), 0.5),
            "score": lambda f: f(model, p, r)[:3], "token_logps": lambda f: f(model, p, r)}
        assert set(section(4, 5)) == set(calls)
        for name, call in calls.items():
            results = []
            for f in (copied(name)[name], getattr(ampo, name)):
                torch.manual_seed(0)
                results.append(str(call(f)))
            expect(f"{name} copied, next to the one in its file", *results)

    def test_sections_6_and_7_run_alone(self, example_names):
        """The worked examples, with the function that they are about taken from its copy."""
        for name in (name for name in section(6, 7) if name in PUBLIC):
            names = vars(ampo) | example_names | {name: copied(name)[name]}
            example = doctest.DocTestParser().get_doctest(ast.get_docstring(FOUND[name]), names, name, None, 0)
            torch.manual_seed(0)
            assert example.examples and doctest.DocTestRunner().run(example).failed == 0, name


def pytest_on(module, *arguments):
    """What pytest says of these tests for a file under test."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_ampo.py"), *arguments]
    return subprocess.run(command, env=os.environ | {"AMPO_MODULE": str(module)}, capture_output=True, text=True).stdout


class TestGrading:
    def test_each_function_is_graded_by_its_name_alone(self):
        collected = pytest_on(HERE / "ampo.py", "--collect-only").splitlines()
        tests = [line.split("::", 1)[1].lower() for line in collected if "::" in line]
        for name in PUBLIC:
            chosen = {test.split("::")[0] for test in tests if name in test} - {"testworkedexamples"}
            assert f"test_{name}" in chosen and all(name in one for one in chosen), (name, chosen)

    def test_a_failure_is_one_of_the_function_itself_and_says_what_was_expected_not_how(self, tmp_path):
        """A file in which gae is missing and group_advantages is wrong."""
        right = "advantages = rewards - rewards.mean(1, keepdim=True)"
        assert right in SOURCE
        source = EXERCISE.without_bodies(SOURCE.replace(right, "advantages = rewards + 0.0"), ["gae"])
        (tmp_path / "student.py").write_text(source)
        said = pytest_on(tmp_path / "student.py", "-k", "Test_gae or Test_group_ or Test_policy_ or Test_swap_in")
        assert set(re.findall(r"^FAILED .*?::(\w+)", said, re.M)) == {"Test_gae", "Test_group_advantages"}
        assert "NotImplementedError: gae is yours to write" in said
        assert "expected [[0.7, -0.3, -0.2, -0.2]" in said and "rewards.mean" not in said


class TestPages:
    def test_what_the_pages_name_is_there(self):
        text = (HERE / "README.md").read_text() + (HERE / "data" / "README.md").read_text()
        tests = (HERE / "test_ampo.py").read_text() + (HERE / "data" / "test_data.py").read_text()
        for name in set(re.findall(r"`(Test\w+|test_\w+)`", text)):
            assert re.search(rf"(class|def) {name}\b", tests), name
        known = {f.name for f in fields(ampo.Config)} | {"help", "nproc_per_node", "tb"}
        scripts = "".join(path.read_text() for path in (HERE / "data").rglob("*.py"))
        for flag in set(re.findall(r"--([a-z_]+)", text)):
            assert flag in known or f'"--{flag}"' in scripts, f"--{flag}"
