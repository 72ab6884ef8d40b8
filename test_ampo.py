"""Tests of ampo.py, which also grade another file of the same names: AMPO_MODULE=student pytest -k TestGenerate

A class a function. The mathematics is compared with independent oracles: plain loops over floats, full forward passes
of transformers without cache or padding, enumeration. The twelve mistakes often found in published code of this kind
have a test each; their names begin with test_mistake.
"""
import copy
import doctest
import errno
import importlib
import inspect
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
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model name that does not exist is looked for on this machine only

import mpmath
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
ampo = importlib.import_module(os.environ.get("AMPO_MODULE", "ampo"))
BASE = str(HERE / "data" / "base")


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
# §2 Problems and prompts


class TestLoadProblems:
    def write(self, tmp_path, *lines):
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    def test_reads_every_field_and_ignores_the_others(self, tmp_path):
        path = self.write(tmp_path, json.dumps(PROBLEM | {"level": 3}), "", json.dumps({"question": "q", "answer": 7}))
        first, second = ampo.load_problems(path)
        assert {name: getattr(first, name) for name in PROBLEM} == PROBLEM
        assert (second.question, second.answer, second.teachers, second.hint, second.solution) == ("q", "7", {}, "", "")

    @pytest.mark.parametrize("line, field", [
        ("{broken", "JSON"), ("[1, 2]", "JSON"), ('"text"', "JSON"), ("7", "JSON"),
        ('{"answer": "1"}', "question"), ('{"question": "  ", "answer": "1"}', "question"),
        ('{"question": "q"}', "answer"), ('{"question": "q", "answer": null}', "answer"),
        ('{"question": "q", "answer": ""}', "answer"), ('{"question": "q", "answer": "?"}', "answer"),
        ('{"question": "q", "answer": ["1"]}', "answer"), ('{"question": "q", "answer": "1", "hint": ["h"]}', "hint"),
        ('{"question": "q", "answer": "1", "teachers": ["t"]}', "teachers"),
        ('{"question": "q", "answer": "1", "teachers": {"a": 1}}', "teachers"),
    ])
    def test_bad_line_is_named(self, tmp_path, line, field):
        path = self.write(tmp_path, '{"question": "q", "answer": "1"}', line)
        with pytest.raises(ampo.InputError) as error:
            ampo.load_problems(path)
        assert f"{path}:2" in str(error.value) and field in str(error.value) and "\n" not in str(error.value)

    def test_missing_empty_and_binary_files_are_named(self, tmp_path):
        (tmp_path / "empty").write_text("\n\n")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        for name in ("missing", "empty", "binary", "."):
            with pytest.raises((ampo.InputError, OSError), match=str(tmp_path)):
                ampo.load_problems(tmp_path / name)

    def test_a_line_separator_inside_a_text_does_not_split_the_line(self, tmp_path):
        path = self.write(tmp_path, json.dumps({"question": "a\u2028b", "answer": "1"}, ensure_ascii=False))
        assert ampo.load_problems(path)[0].question == "a\u2028b"

    def test_embedded_problems_are_complete_and_their_traces_verify(self):
        for p in ampo.load_problems(HERE / "data" / "train.jsonl")[:200]:
            assert p.hint.startswith(p.question) and p.solution and len(p.teachers) == 4
            assert all(ampo.verify(text, p.answer) for text in [*p.teachers.values(), p.solution])


class TestEncodePrompt:
    def test_is_the_chat_template_with_the_generation_prompt(self, tokenizer):
        ids = ampo.encode_prompt(tokenizer, "Solve 2*x=3.")
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Solve 2*x=3."}], tokenize=False,
                                             add_generation_prompt=True)
        assert isinstance(ids, list) and all(isinstance(i, int) for i in ids)
        assert tokenizer.decode(ids) == text and "Solve 2*x=3." in text


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


class TestExtractAnswer:
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
        assert ampo.extract_answer(response) == answer

    @pytest.mark.parametrize("response", [
        "\\boxed{3} no, \\boxed{4}", "<answer>3</answer> \\boxed{4}", "\\boxed{3} <answer>4</answer>",
        "<answer>3</answer><answer>4</answer>", "\\boxed{3, \\boxed{4}}",
    ])
    def test_the_last_mark_wins(self, response):
        assert ampo.extract_answer(response) == "4"

    @pytest.mark.parametrize("response", [
        "\\boxed{4", "\\boxed{3} so \\boxed{4", "\\boxed{\\frac{1}{2}", "\\boxed{4} and <answer>4",
    ])
    def test_a_truncated_mark_is_no_answer(self, response):
        assert ampo.extract_answer(response) is None


class TestSameAnswer:
    @pytest.mark.parametrize("gold, answer", cases(EQUAL))
    def test_equal(self, gold, answer):
        assert ampo.same_answer(answer, gold)
        assert ampo.same_answer(gold, gold)

    @pytest.mark.parametrize("gold, answer", cases(DIFFERENT))
    def test_different(self, gold, answer):
        assert not ampo.same_answer(answer, gold)

    def test_decimals_are_exact(self):
        assert not ampo.same_answer("0.333", "\\frac13") and ampo.same_answer("0.250", "\\frac14")

    def test_percent_gold_takes_both_readings(self):
        assert ampo.same_answer("35", "35\\%") and ampo.same_answer("0.35", "35\\%")
        assert not ampo.same_answer("0.5\\%", "0.5")

    def test_units_may_be_left_out_but_not_changed(self):
        assert ampo.same_answer("6", "6\\text{ m}") and ampo.same_answer("6\\text{ m}", "6")
        assert not ampo.same_answer("6\\text{ cm}", "6\\text{ m}")

    def test_tuples_are_ordered_and_sets_are_not(self):
        assert not ampo.same_answer("(2,1)", "(1,2)") and ampo.same_answer("\\{2,1\\}", "\\{1,2\\}")

    def test_a_chain_that_does_not_hold_is_false(self):
        for answer, gold in (("5=6=5", "5"), ("x=5=6", "5"), ("5=6", "6")):
            assert not ampo.same_answer(answer, gold)

    def test_words_compare_as_strings(self):
        assert not ampo.same_answer("\\text{tea}", "\\text{eat}") and ampo.same_answer("Tea", "\\text{tea}")

    def test_both_signs_are_probed(self):
        assert not ampo.same_answer("x", "\\sqrt{x^2}") and not ampo.same_answer("-x", "\\sqrt{x^2}")
        assert ampo.same_answer("|x|", "\\sqrt{x^2}")

    def test_near_integers_need_the_second_precision(self):
        assert not ampo.same_answer("\\frac{\\ln(640320^3+744)}{\\sqrt{163}}", "\\pi")

    def test_an_expression_that_vanishes_is_zero(self):
        assert ampo.same_answer("\\sqrt{5+2\\sqrt6}-\\sqrt2-\\sqrt3", "0") and ampo.same_answer("\\sin\\pi", "0")

    @pytest.mark.parametrize("gold", [
        "\\text{yes}", "B", "\\frac{1}{2}", "(1,2)", "x>3", "10^{10^{10}}", "a_n=2n+1", "\\emptyset",
    ])
    def test_a_readable_answer_equals_itself(self, gold):
        assert ampo.same_answer(gold, gold)

    @pytest.mark.parametrize("gold", [
        "", " ", "?", "{}", "()", "\\frac{1}{0}", "0/0", "$$", "\\", "(1,2", "x" * 2000, None, 7,
    ])
    def test_an_unreadable_answer_equals_nothing(self, gold):
        assert not ampo.same_answer(gold, gold)


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


class TestVerify:
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
        assert ampo.verify(response, gold) is right

    @pytest.mark.parametrize("response, gold", [
        (None, "1"), (1, "1"), ("\\boxed{1}", None), ("\\boxed{1}", 1), (b"\\boxed{1}", "1"), ([], {}),
    ])
    def test_input_that_is_no_string(self, response, gold):
        assert ampo.verify(response, gold) is False

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: ascii(attack[:30]))
    def test_mistake_12_attacks_neither_run_nor_raise_nor_hang(self, attack, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        others = "5", attack, attack + " ", "x+\\sqrt2"
        for answer, gold in [(attack, other) for other in others] + [(other, attack) for other in others]:
            for check in (lambda: ampo.same_answer(answer, gold), lambda: ampo.verify("\\boxed{" + answer + "}", gold)):
                start = time.perf_counter()
                result = check()
                assert time.perf_counter() - start < 0.5
                assert type(result) is bool and not (result and gold == "5")
        assert os.listdir(tmp_path) == []

    def test_works_in_threads(self):
        wrong, pairs = [], [pair for pairs in EQUAL.values() for pair in pairs]
        def work():
            wrong.extend(pair for pair in pairs if not ampo.same_answer(pair[1], pair[0]))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_leaves_global_state_alone(self):
        random.seed(3)
        state, bits = random.getstate(), mpmath.mp.prec
        ampo.same_answer("\\sin(x)+\\binom{n}{2}", "\\sqrt[3]{y}")
        assert random.getstate() == state and mpmath.mp.prec == bits

    def test_fuzz(self):
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
            start = time.perf_counter()
            results = [ampo.same_answer(answer, gold), ampo.same_answer(gold, answer),
                       ampo.verify("\\boxed{" + answer, gold)]
            assert time.perf_counter() - start < 0.5 * len(results), answer
            assert all(type(result) is bool for result in results), answer


# ---------------------------------------------------------------------------------------------------------------------
# §4 Sampling


class TestGenerate:
    PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]  # unequal lengths: the short ones get padded

    @pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
    def test_logps_equal_an_uncached_forward_pass(self, model, temperature):
        torch.manual_seed(0)
        stops = list(range(20, 30))  # many stop tokens, so that rows leave the batch at many moments
        for prompt, group in zip(self.PROMPTS, ampo.generate(model, self.PROMPTS, 12, 24, temperature, stops)):
            for ids, logps in group:
                assert logps == pytest.approx(full_logps(model, prompt, ids, temperature), abs=2e-4)

    def test_n_rollouts_of_each_prompt_in_order(self, model):
        groups = ampo.generate(model, self.PROMPTS, 5, 7)
        assert [len(group) for group in groups] == [5, 5, 5]
        assert all(len(ids) == len(logps) == 7 for group in groups for ids, logps in group)

    def test_stops_at_the_first_end_token_and_keeps_it(self, model):
        torch.manual_seed(0)
        groups = ampo.generate(model, self.PROMPTS, 40, 30, 1.0, [20, 21, 22, 23, 24])
        rows = [ids for group in groups for ids, _ in group]
        assert all(not set(ids[:-1]) & {20, 21, 22, 23, 24} for ids in rows)
        assert all(ids[-1] in {20, 21, 22, 23, 24} for ids in rows if len(ids) < 30)
        assert len({len(ids) for ids in rows}) > 5

    def test_one_end_token_may_be_a_plain_number(self, model):
        torch.manual_seed(0)
        a = ampo.generate(model, self.PROMPTS, 8, 20, 1.0, 21)
        torch.manual_seed(0)
        assert a == ampo.generate(model, self.PROMPTS, 8, 20, 1.0, [21])

    def test_samples_from_the_models_distribution(self, model):
        torch.manual_seed(0)
        n, prompt = 4000, [5, 6, 7]
        seen = Counter(ids[0] for ids, _ in ampo.generate(model, [prompt], n, 1, 1.3)[0])
        with torch.no_grad():
            p = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1).tolist()
        common = [token for token in range(len(p)) if n * p[token] >= 10]
        chi2 = sum((seen[t] - n * p[t]) ** 2 / (n * p[t]) for t in common)
        assert len(common) > 3 and chi2 < len(common) + 5 * math.sqrt(2 * len(common))

    def test_rollouts_that_share_a_past_draw_independently(self, model):
        """Pairs of tokens: one draw for all rollouts that said the same so far would repeat pairs far too often."""
        torch.manual_seed(0)
        n, prompt, temperature = 4000, [5, 6, 7], 0.6
        seen = Counter(tuple(ids) for ids, _ in ampo.generate(model, [prompt, [9]], n, 2, temperature)[0])
        with torch.no_grad():
            first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
            common = first.topk(3).indices.tolist()
            then = (model(torch.tensor([[*prompt, t] for t in common])).logits[:, -1] / temperature).softmax(-1)
        p = {(a, b): (first[a] * then[i, b]).item() for i, a in enumerate(common) for b in range(60)}
        common = [pair for pair in p if n * p[pair] >= 10]
        chi2 = sum((seen[pair] - n * p[pair]) ** 2 / (n * p[pair]) for pair in common)
        assert len(common) > 8 and chi2 < len(common) + 5 * math.sqrt(2 * len(common))

    def test_never_draws_a_token_of_probability_zero(self):
        torch.manual_seed(0)
        logits = torch.full((20000, 6), -math.inf)
        logits[:, 2], logits[:, 4] = 0.0, -1.0
        tokens, logps = ampo.sample_tokens(logits, 1.0)
        assert set(tokens.tolist()) == {2, 4} and torch.isfinite(logps).all()

    def test_same_seed_same_samples(self, model):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(ampo.generate(model, self.PROMPTS, 4, 10))
        assert runs[0] == runs[1] != runs[2]

    def test_mistake_6_left_padding_changes_nothing(self, model):
        """A short prompt beside a long one is scored in the context it was sampled in, alone or in company."""
        torch.manual_seed(0)
        (ids, logps), = ampo.generate(model, [[16], list(range(5, 45))], 1, 12)[0]
        assert logps == pytest.approx(full_logps(model, [16], ids), abs=2e-4)
        alone, in_company = [[16]], [[16], list(range(5, 45))]
        assert ampo.generate(model, in_company, 1, 12, 0)[0] == ampo.generate(model, alone, 1, 12, 0)[0]

    def test_mistake_9_temperature_zero_is_greedy(self, model):
        (ids, logps), (other, _) = ampo.generate(model, [[5, 6, 7]], 2, 8, 0)[0]
        context = [5, 6, 7]
        for token in ids:
            with torch.no_grad():
                assert token == model(torch.tensor([context])).logits[0, -1].argmax().item()
            context.append(token)
        assert ids == other and logps == [0.0] * 8

    def test_mistake_9_first_tokens_of_a_group_differ(self, model):
        torch.manual_seed(0)
        assert len({ids[0] for ids, _ in ampo.generate(model, [[5, 6, 7]], 64, 1)[0]}) > 3

    def test_leaves_no_gradient_and_no_mode_behind(self, model):
        ampo.generate(model, self.PROMPTS, 2, 3)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# §5 Log-probabilities


class TestTokenLogps:
    PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
    RESPONSES = [[13, 14], [15, 16, 17, 18, 1], [1]]

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_equals_one_sequence_at_a_time(self, model, temperature):
        logps, mask = ampo.token_logps(model, self.PROMPTS, self.RESPONSES, temperature)
        assert logps.shape == mask.shape == (3, 5) and mask.dtype == torch.bool
        for row, m, prompt, response in zip(logps, mask, self.PROMPTS, self.RESPONSES):
            assert m.tolist() == [True] * len(response) + [False] * (5 - len(response))
            assert row[m].tolist() == pytest.approx(full_logps(model, prompt, response, temperature), abs=1e-4)
            assert (row[~m] == 0).all()

    def test_mistake_1_the_end_token_is_trained_even_where_padding_shares_its_id(self, model):
        """pad = eos = 1 here: a mask made from ids would lose the last token."""
        assert model.config.pad_token_id == model.config.eos_token_id == 1
        logps, mask = ampo.token_logps(model, [[5]], [[6, 1]])
        assert mask.tolist() == [[True, True]] and logps[0, 1].item() == pytest.approx(
            full_logps(model, [5], [6, 1])[1], abs=1e-4)

    def test_mistake_3_scores_at_the_temperature_that_was_sampled(self, model):
        torch.manual_seed(0)
        (ids, sampled), = ampo.generate(model, [[5, 6]], 1, 10, 0.7)[0]
        assert ampo.token_logps(model, [[5, 6]], [ids], 0.7)[0][0].tolist() == pytest.approx(sampled, abs=2e-4)
        assert ampo.token_logps(model, [[5, 6]], [ids], 1.0)[0][0].tolist() != pytest.approx(sampled, abs=2e-2)

    def test_mistake_7_inputs_stay_as_they_were(self, model):
        prompts, responses = [[5, 6], [7]], [[8], [9, 1]]
        ampo.token_logps(model, prompts, responses)
        assert (prompts, responses) == ([[5, 6], [7]], [[8], [9, 1]])

    def test_gradient_reaches_every_weight_and_padding_none(self):
        model = random_model(tie_word_embeddings=False)
        logps, _ = ampo.token_logps(model, [[5], [6, 7]], [[8, 9, 10], [11]])
        logps.sum().backward()
        used = {5, 6, 7, 8, 9}  # the last token of a response is predicted, not read; 0 pads
        rows = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
        assert set(rows) == used
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# §6 The objective


class TestGroupAdvantages:
    REWARDS = torch.tensor([[1.0, 0.0, 0.1, 0.1], [1.0, 1.0, 1.0, 0.0]])

    def test_code_subtracts_the_groups_mean(self):
        for row, out in zip(self.REWARDS.tolist(), ampo.group_advantages(self.REWARDS).tolist()):
            assert out == pytest.approx([r - statistics.mean(row) for r in row])

    def test_paper_also_divides_by_the_groups_std(self):
        for row, out in zip(self.REWARDS.tolist(), ampo.group_advantages(self.REWARDS, "paper").tolist()):
            assert out == pytest.approx([(r - statistics.mean(row)) / statistics.stdev(row) for r in row], rel=1e-4)

    @pytest.mark.parametrize("follow", ["code", "paper"])
    @pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1.0, 1 / 3])
    def test_mistake_5_equal_rewards_are_exactly_no_signal(self, follow, reward):
        assert (ampo.group_advantages(torch.full((3, 7), reward), follow) == 0).all()


class TestPolicyObjective:
    def oracle(self, logps, old_logps, advantage, off, clip=0.2, gamma=0.1):
        ratio = math.exp(logps - old_logps)
        if off:
            return advantage * ratio / (ratio + gamma)
        return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)

    def test_equals_the_formula_entry_by_entry(self):
        torch.manual_seed(0)
        logps, old = -3 * torch.rand(40, 6), -3 * torch.rand(40, 6)
        advantages, off = torch.randn(40), torch.rand(40) < 0.5
        out = ampo.policy_objective(logps, old, advantages, off)
        for b, t in itertools.product(range(40), range(6)):
            expected = self.oracle(logps[b, t].item(), old[b, t].item(), advantages[b].item(), off[b].item())
            assert out[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)

    def test_advantages_may_be_given_per_token(self):
        torch.manual_seed(0)
        logps, old, advantages = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
        out = ampo.policy_objective(logps, old, advantages, torch.tensor([False, True]), clip=0.1, gamma=0.3)
        for b, t in itertools.product(range(2), range(3)):
            expected = self.oracle(logps[b, t].item(), old[b, t].item(), advantages[b, t].item(), b == 1, 0.1, 0.3)
            assert out[b, t].item() == pytest.approx(expected, rel=1e-4)

    def gradient(self, log_ratio, advantage, off):
        logps = torch.tensor([[float(log_ratio)]], requires_grad=True)
        ampo.policy_objective(logps, torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([off])).sum().backward()
        return logps.grad.item()

    @pytest.mark.parametrize("log_ratio, advantage, flows", [
        (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.0, 1.0, True),
        (0.0, -1.0, True)])
    def test_mistake_4_the_clip_takes_the_smaller_side_for_both_signs(self, log_ratio, advantage, flows):
        """With max for min, a bad token whose probability already grew would stop being pushed down."""
        gradient = self.gradient(log_ratio, advantage, False)
        assert gradient == pytest.approx(math.exp(log_ratio) * advantage if flows else 0.0)

    @pytest.mark.parametrize("advantage", [1.0, -1.0])
    def test_off_policy_gradient_has_the_sign_of_the_advantage(self, advantage):
        """The surrogate often copied as A/(ratio+γ) has the opposite one."""
        for log_ratio in (-6.0, -2.0, 0.0, 2.0):
            p = math.exp(log_ratio)
            expected = advantage * p * 0.1 / (p + 0.1) ** 2
            assert self.gradient(log_ratio, advantage, True) == pytest.approx(expected, rel=1e-3)

    def test_extreme_ratios_stay_finite(self):
        logps = torch.tensor([[0.0, -200.0]], requires_grad=True)
        for off in (True, False):
            out = ampo.policy_objective(logps, torch.tensor([[-200.0, 0.0]]), torch.tensor([1.0]), torch.tensor([off]))
            out.sum().backward()
            assert torch.isfinite(out).all() and torch.isfinite(logps.grad).all()


class TestGae:
    def test_equals_the_double_sum(self):
        torch.manual_seed(0)
        values, lengths, rewards, lam = torch.randn(3, 5), [5, 2, 1], [1.0, 0.0, 0.9], 0.9
        mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
        out = ampo.gae(values, torch.tensor(rewards), mask, lam)
        for b, n in enumerate(lengths):
            v = values[b, :n].tolist() + [0.0]
            delta = [(rewards[b] if t == n - 1 else 0.0) + v[t + 1] - v[t] for t in range(n)]
            expected = [sum(lam ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]
            assert out[b].tolist() == pytest.approx(expected + [0.0] * (5 - n), abs=1e-5)

    def test_lambda_one_is_reward_minus_value(self):
        values, mask = torch.tensor([[0.3, 0.5, -0.2]]), torch.ones(1, 3, dtype=torch.bool)
        assert ampo.gae(values, torch.tensor([1.0]), mask, 1.0)[0].tolist() == pytest.approx([0.7, 0.5, 1.2])


# ---------------------------------------------------------------------------------------------------------------------
# §7 Guidance


class TestComprehension:
    def test_is_the_probability_of_the_gold_answer_after_the_cut_trace(self, tokenizer):
        model = random_model(len(tokenizer))
        trace, gold = "first \\boxed{7} then\n2*x=3\n\\boxed{9/4}", "3/2"
        prompt = ampo.encode_prompt(tokenizer, PROBLEM["question"])
        before = tokenizer("first \\boxed{7} then\n2*x=3\n\\boxed{", add_special_tokens=False).input_ids
        answer = tokenizer(gold, add_special_tokens=False).input_ids
        logps = full_logps(model, prompt + before, answer)
        code, = ampo.comprehension(model, tokenizer, problem(), [trace])
        paper, = ampo.comprehension(model, tokenizer, problem(), [trace], "paper")
        assert code == pytest.approx(statistics.mean(math.exp(p) for p in logps), rel=1e-3)
        assert paper == pytest.approx(math.exp(statistics.mean(logps)), rel=1e-3)
        assert code != pytest.approx(paper, rel=1e-2)

    def test_what_stands_in_the_box_does_not_count(self, model, tokenizer):
        model = random_model(len(tokenizer))
        a, b = ampo.comprehension(model, tokenizer, problem(), ["2*x=3 \\boxed{3/2}", "2*x=3 \\boxed{99}"])
        assert a == pytest.approx(b)

    def test_no_answer_mark_scores_zero_and_answer_tags_count(self, tokenizer):
        model = random_model(len(tokenizer))
        traces = ["no mark", "x <answer>3/2</answer>", "", "\\boxed{3/2}"]
        scores = ampo.comprehension(model, tokenizer, problem(), traces)
        assert scores[0] == scores[2] == 0 and 0 < scores[1] < 1 and 0 < scores[3] < 1
        assert ampo.comprehension(model, tokenizer, problem(), ["no mark"]) == [0.0]

    def test_tells_understood_from_confusing_traces_on_the_base_model(self, tokenizer):
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        undo, nonsense = [], []
        for p in ampo.load_problems(HERE / "data" / "train.jsonl")[:30]:
            a, b = ampo.comprehension(base, tokenizer, p, [p.teachers["undo"], "1+1=2\n\\boxed{2}"])
            undo.append(a), nonsense.append(b)
        # Even after nonsense the "/" and the divisor are easy to guess.
        assert statistics.mean(undo) > 0.9 and statistics.mean(nonsense) < 0.7


def by_hint(prompt, i):
    """A student that fails on the plain question and succeeds once in four with a hint."""
    return RIGHT if "Hint" in prompt and i == 1 else WRONG


class TestGuides:
    def run(self, student, *problems):
        plain = ampo.rollout(student, list(problems), [p.question for p in problems])
        groups = ampo.METHODS[student.cfg.method].guide(student, list(problems), list(plain))
        ampo.set_advantages(student, groups)
        return plain, groups

    def test_rollout_verifies_and_rewards(self, make_student, scripted, tokenizer):
        scripted(lambda prompt, i: [RIGHT, WRONG, "no answer", "\\boxed{3/2"][i])
        (group,), _ = self.run(make_student(method="grpo"), problem())
        assert [s.correct for s in group] == [True, False, False, False]
        assert [s.reward for s in group] == pytest.approx([1.0, 0.1, 0.0, 0.0])
        assert all(s.prompt == ampo.encode_prompt(tokenizer, PROBLEM["question"]) and not s.off_policy for s in group)
        assert group[0].ids[-1] == tokenizer.eos_token_id and group[0].old_logps == [-0.5] * len(group[0].ids)
        assert [s.advantages[0] for s in group] == pytest.approx([0.725, -0.175, -0.275, -0.275])

    def test_grpo_leaves_a_failed_group_without_signal(self, make_student, scripted):
        scripted(lambda prompt, i: WRONG)
        plain, groups = self.run(make_student(method="grpo"), problem())
        assert groups == plain and not any(a for s in groups[0] for a in s.advantages)

    def test_luffy_takes_slot_zero_of_every_group(self, make_student, scripted, tokenizer):
        scripted(lambda prompt, i: RIGHT)  # even where every rollout is right
        plain, (group, bare) = self.run(make_student(method="luffy"), problem(), problem(teachers={}))
        trace = tokenizer(PROBLEM["teachers"]["one"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        assert (group[0].ids, group[0].source, group[0].off_policy) == (trace, "one", True)
        assert group[0].old_logps == [0.0] * len(trace) and group[0].reward == 1.0
        assert group[0].prompt == group[1].prompt and group[1:] == plain[0][1:] and bare == plain[1]
        assert not ampo.METHODS["luffy"].clipped

    def test_ampo_swaps_k_traces_into_a_failed_group(self, make_student, scripted, monkeypatch):
        scripted(lambda prompt, i: WRONG)
        monkeypatch.setattr(ampo, "comprehension", lambda *args: [0.2, 0.9, 0.8])
        plain, (group,) = self.run(make_student(method="ampo"), problem())
        injected = [s for s in group if s.off_policy]
        assert {s.source for s in injected} == {"two", "three"} and len(group) == 4
        assert all(s.old_logps == [0.0] * len(s.ids) and s.reward == 1.0 and s.correct for s in injected)
        assert sum(s in plain[0] for s in group) == 2
        assert all(s.advantages[0] == pytest.approx((1.0 if s.off_policy else 0.1) - 0.55) for s in group)

    def test_ampo_leaves_a_group_with_one_success_alone(self, make_student, scripted):
        scripted(lambda prompt, i: RIGHT if i == 3 else WRONG)
        plain, groups = self.run(make_student(method="ampo"), problem())
        assert groups == plain

    def test_ampo_replaces_random_failures(self, make_student, scripted, monkeypatch):
        scripted(lambda prompt, i: WRONG)
        monkeypatch.setattr(ampo, "comprehension", lambda *args: [0.2, 0.9, 0.8])
        torch.manual_seed(0)
        student = make_student(method="ampo")
        slots = {tuple(s.off_policy for s in self.run(student, problem())[1][0]) for _ in range(30)}
        assert len(slots) == 6  # all pairs out of four

    def test_ampo_ties_go_to_the_shorter_trace(self, make_student, scripted, monkeypatch):
        """0.900 and 0.901 are one number in the bfloat16 of the official ranking; the paper tells them apart."""
        scripted(lambda prompt, i: WRONG)
        teachers = {"long": "2*x=3\n2*x=3\n\\boxed{3/2}", "short": "\\boxed{3/2}"}
        monkeypatch.setattr(ampo, "comprehension", lambda *args: [0.901, 0.900])
        for follow, expected in (("code", "short"), ("paper", "long")):
            _, (group,) = self.run(make_student(method="ampo", k=1, follow=follow), problem(teachers=teachers))
            assert [s.source for s in group if s.off_policy] == [expected]

    def test_ampo_v2_fills_up_to_half(self, make_student, scripted, monkeypatch):
        monkeypatch.setattr(ampo, "comprehension", lambda *args: [0.2, 0.9, 0.8])
        for right, injected in ((0, 2), (1, 1), (2, 0), (4, 0)):
            scripted(lambda prompt, i: RIGHT if i < right else WRONG)
            plain, (group,) = self.run(make_student(method="ampo", trigger="half"), problem())
            assert sum(s.off_policy for s in group) == injected
            assert group[:right] == plain[0][:right]  # successes stay

    def test_v1_forces_the_reward_of_a_trace_and_v2_verifies_it(self, make_student):
        wrong = problem(teachers={"one": WRONG, "two": RIGHT})
        assert [s.reward for s in ampo.teacher_samples(make_student(), wrong)] == [1.0, 1.0]
        assert [s.reward for s in ampo.teacher_samples(make_student(trigger="half"), wrong)] == [0.0, 1.0]

    def test_ampo_always_keeps_successes(self, make_student, scripted, monkeypatch):
        monkeypatch.setattr(ampo, "comprehension", lambda *args: [0.2, 0.9, 0.8])
        scripted(lambda prompt, i: RIGHT if i < 3 else WRONG)
        _, (group,) = self.run(make_student(method="ampo", trigger="always"), problem())
        assert [s.off_policy for s in group] == [False, False, False, True] and group[3].source == "two"

    def test_traces_too_long_or_empty_stay_out(self, make_student):
        student = make_student(max_new_tokens=12)
        texts = {"one": "2*x=3\n" * 9 + RIGHT, "two": RIGHT, "three": ""}
        assert [s.source for s in ampo.teacher_samples(student, problem(teachers=texts))] == ["two"]

    def test_ampo_without_teachers_leaves_the_group(self, make_student, scripted):
        scripted(lambda prompt, i: WRONG)
        plain, groups = self.run(make_student(method="ampo"), problem(teachers={}))
        assert groups == plain

    def test_guide_trains_hinted_rollouts_on_the_plain_prompt(self, make_student, scripted, tokenizer):
        scripted(by_hint)
        plain, (group, other) = self.run(make_student(method="guide"), problem(), problem(hint=""))
        assert len(group) == 4 and all(s.off_policy and s.source == "hint" for s in group)
        assert all(s.prompt == ampo.encode_prompt(tokenizer, PROBLEM["question"]) for s in group)
        assert all(s.old_logps == [-0.5] * len(s.ids) for s in group)  # the sampler's, under the hint
        assert [s.advantages[0] for s in group] == pytest.approx([-0.225, 0.675, -0.225, -0.225])
        assert other == plain[1]  # no hint, no guidance

    def test_guide_paper_lets_them_join_the_group(self, make_student, scripted):
        scripted(by_hint)
        plain, (group,) = self.run(make_student(method="guide", follow="paper"), problem())
        assert len(group) == 8 and group[:4] == plain[0] and [s.off_policy for s in group] == [False] * 4 + [True] * 4

    def test_guide_ratio_is_plain_numerator_over_hinted_denominator(self, make_student):
        """With real sampling: old_logps equal a full forward pass under the hint; the numerator is taken without it."""
        student = make_student(method="guide", max_new_tokens=6)
        student.eos = []
        torch.manual_seed(0)
        (group,), tok = self.run(student, problem())[1], student.tokenizer
        hinted, plain = ampo.encode_prompt(tok, PROBLEM["hint"]), ampo.encode_prompt(tok, PROBLEM["question"])
        logps, mask, _, _ = ampo.score_samples(student, group)
        for sample, row, m in zip(group, logps, mask):
            assert sample.old_logps == pytest.approx(full_logps(student.model, hinted, sample.ids), abs=1e-4)
            assert row[m].tolist() == pytest.approx(full_logps(student.model, plain, sample.ids), abs=1e-4)

    def test_guide_gamma_is_the_90th_percentile_over_response_tokens_only(self, make_student):
        """Unequal lengths bring padding, whose ratio would be 1; the plain sample must not count either."""
        student = make_student(method="guide")
        samples = [sample_of([5, 6, 7, 8, 9, 10, 11], old_logps=[0.0] * 7, off_policy=True),
                   sample_of([5], old_logps=[0.0], off_policy=True), sample_of([5, 6], old_logps=[-9.0] * 2)]
        ratios = sorted(math.exp(p) for s in samples[:2] for p in full_logps(student.model, s.prompt, s.ids))
        position = 0.9 * (len(ratios) - 1)
        low = ratios[int(position)]
        expected = low + (position % 1) * (ratios[int(position) + 1] - low)
        assert ampo.guided_gamma(student, samples) == pytest.approx(expected, rel=1e-3)
        tiny = [sample_of([5, 6], old_logps=[15.0] * 2, off_policy=True)]
        assert ampo.guided_gamma(student, tiny) == 1e-4  # the floor

    def test_ghpo_climbs_the_ladder_and_trains_where_it_sampled(self, make_student, scripted, tokenizer):
        """'abcdefghij': rounds to 2, 5 and 8 characters. One problem is rescued at each rung, one at none."""
        calls = []
        answers = {"q1?": "ab", "q2?": "abcde", "q3?": "abcdefgh", "q4?": "never"}

        def says(prompt, i):
            name = next(n for n in answers if n in prompt)
            calls.append(name)
            return RIGHT if i == 0 and prompt.split("problem:\n")[-1].startswith(answers[name]) else WRONG
        scripted(says)
        problems = [problem(question=name) for name in answers]
        plain, groups = self.run(make_student(method="ghpo"), *problems)
        lead = ("\n The following text is the beginning part of the answer, "
                "which you can refer to for solving the problem:\n")
        for name, group in list(zip(answers, groups))[:3]:
            expected = ampo.encode_prompt(tokenizer, name + lead + answers[name])
            assert all(s.prompt == expected and not s.off_policy and s.source == "hint" for s in group)
            assert [s.advantages[0] for s in group] == pytest.approx([0.675, -0.225, -0.225, -0.225])
        assert groups[3] == plain[3] and not any(a for s in groups[3] for a in s.advantages)  # no signal
        assert {name: calls.count(name) // 4 for name in answers} == {"q1?": 2, "q2?": 3, "q3?": 4, "q4?": 4}

    def test_sft_takes_all_traces_with_equal_weight(self, make_student):
        student = make_student(method="sft")
        groups = ampo.METHODS["sft"].guide(student, [problem()], [[]])
        ampo.set_advantages(student, groups)
        assert [s.source for s in groups[0]] == ["one", "two", "three"]
        assert all(a == 1.0 for s in groups[0] for a in s.advantages)

    def test_cold_start_withholds_guidance(self, make_student, scripted, monkeypatch):
        scripted(lambda prompt, i: WRONG)
        monkeypatch.setattr(ampo, "update", lambda *_: dict(grad_norm=0.0, tokens=0, clipped=0, gap=0.0))
        student = make_student(method="luffy", cold_start=1)
        optimizer = torch.optim.SGD(student.model.parameters(), lr=0.0)
        assert ampo.train_step(student, optimizer, [problem()], 0)["teachers"] == {}
        assert ampo.train_step(student, optimizer, [problem()], 1)["teachers"] == {"one": 1}


class TestDoctests:
    def test_worked_examples(self, tokenizer):
        """Every function of §6 and §7 has a worked example, and each comes out as written."""
        student = ampo.load_student(BASE, ampo.Config(group_size=4))
        texts = {"undo": "3*(4*x+2)-4=20\n3*(4*x+2)=24\n4*x+2=8\n4*x=6\n", "work": "20+4=24\n24/3=8\n8-2=6\n",
                 "secant": "0: 0,2,6,2\n1: 4,6,18,14\n(20-2)/(14-2)\n"}
        teachers = {name: text + RIGHT for name, text in texts.items()}
        question = "Solve 3*(4*x+2)-4=20."
        names = {"student": student, "wrong": sample_of([8, 1], [7], 0.1, False), "right": sample_of([8, 1], [7]),
                 "problem": ampo.Problem(question, "3/2", teachers, question + "\nHint: the steps give 24, 8.",
                                         teachers["work"])}
        torch.manual_seed(0)
        tested = {}
        for test in doctest.DocTestFinder().find(ampo, extraglobs=names):
            tested[test.name.split(".")[-1]] = len(test.examples)
            assert doctest.DocTestRunner().run(test).failed == 0, test.name
        source = inspect.getsource(ampo)
        section = source[source.index("# §6 The objective"):source.index("# §8 The loop")]
        assert all(tested[name] for name in re.findall(r"^def (\w+)", section, re.M))


# ---------------------------------------------------------------------------------------------------------------------
# §8 Updates


def gradient_of(student, samples):
    """The gradient of one update, before clipping: SGD with lr 1 on a copy moves by it, shortened to norm 1."""
    before = [p.detach().clone() for p in student.model.parameters()]
    optimizer = torch.optim.SGD(student.model.parameters(), lr=1.0)
    stats = ampo.update(student, optimizer, samples)
    return [(b - p.detach()) * max(1, stats["grad_norm"]) for b, p in zip(before, student.model.parameters())], stats


def mixed_samples():
    samples = [sample_of([5, 6, 7], advantages=[0.5] * 3), sample_of([8], advantages=[-0.3]),
               sample_of([9, 10, 11, 12, 13], prompt=[4], advantages=[0.8] * 5, off_policy=True, old_logps=[0.0] * 5),
               sample_of([14, 15], prompt=[4, 5, 6], advantages=[-0.5] * 2)]
    return samples


class TestUpdate:
    @pytest.mark.parametrize("follow", ["code", "paper"])
    def test_gradient_is_that_of_the_written_objective(self, make_student, follow):
        """Oracle: sum over single sequences, weights written out, entropy from full logits."""
        student = make_student(follow=follow)
        twin = random_model(len(student.tokenizer), scale=1.0)
        total, on_tokens = 0.0, 3 + 1 + 2
        for s in mixed_samples():
            logits = twin(torch.tensor([s.prompt + s.ids])).logits[0, len(s.prompt) - 1:-1].log_softmax(-1)
            logps = logits.gather(1, torch.tensor(s.ids)[:, None])[:, 0]
            entropy = -(logits.exp() * logits).sum(-1)
            ratio, a = (logps - torch.tensor(s.old_logps)).exp(), s.advantages[0]
            on = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            objective = (a * ratio / (ratio + 0.1) if s.off_policy else on) + 0.001 * entropy
            weight = 1 / (4 * 40) if follow == "code" else 1 / (1 * len(s.ids)) if s.off_policy else 1 / on_tokens
            total = total - weight * objective.sum()
        total.backward()
        gradient, stats = gradient_of(student, mixed_samples())
        for ours, p in zip(gradient, twin.parameters()):
            assert torch.allclose(ours, p.grad, atol=1e-5, rtol=1e-3)
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in twin.parameters()))
        assert stats["grad_norm"] == pytest.approx(norm, rel=1e-3)

    @pytest.mark.parametrize("follow", ["code", "paper"])
    def test_mistake_2_gradient_does_not_depend_on_the_micro_batches(self, make_student, follow):
        whole, stats = gradient_of(make_student(follow=follow), mixed_samples())
        parts, part_stats = gradient_of(make_student(follow=follow, micro_tokens=1), mixed_samples())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts))
        # mistake 11: the statistics are those of all micro-batches, not of the last one
        assert part_stats["tokens"] == stats["tokens"] == 6 and part_stats["clipped"] == stats["clipped"]
        assert part_stats["gap"] == pytest.approx(stats["gap"], rel=1e-4)

    def test_samples_without_advantage_count_in_the_normaliser_only(self, make_student):
        silent = [sample_of([5, 6], advantages=[0.0] * 2) for _ in range(4)]
        alone, _ = gradient_of(make_student(), mixed_samples())
        diluted, _ = gradient_of(make_student(), mixed_samples() + silent)
        assert all(torch.allclose(a / 2, b, atol=1e-6) for a, b in zip(alone, diluted))

    def test_clip_statistics_count_on_policy_tokens_outside_the_clip(self, make_student):
        student = make_student()
        exact = full_logps(student.model, [2, 3], [5, 6, 7])
        shifted = [exact[0], exact[1] + 0.5, exact[2] - 0.1]  # ratios 1, 0.61, 1.11
        stats = ampo.update(student, torch.optim.SGD(student.model.parameters(), lr=0.0), [
            sample_of([5, 6, 7], old_logps=shifted, advantages=[1.0] * 3),
            sample_of([8, 9], old_logps=[0.0] * 2, advantages=[1.0] * 2, off_policy=True)])
        assert (stats["tokens"], stats["clipped"]) == (3, 1) and stats["gap"] == pytest.approx(0.6, abs=1e-3)

    def test_mistake_8_without_signal_nothing_moves(self, make_student):
        student = make_student()
        before = [p.detach().clone() for p in student.model.parameters()]
        optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.1, weight_decay=0.1)
        for samples in ([], [sample_of([5], advantages=[0.0])]):
            assert ampo.update(student, optimizer, samples)["grad_norm"] == 0
        assert all(torch.equal(b, p) for b, p in zip(before, student.model.parameters()))

    def test_mistake_8_a_gradient_that_is_not_finite_skips_the_update(self, make_student, capsys):
        student = make_student()
        before = [p.detach().clone() for p in student.model.parameters()]
        optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.1)
        poisoned = sample_of([5, 6], advantages=[float("nan"), 1.0])
        assert ampo.update(student, optimizer, [poisoned])["grad_norm"] is None
        assert "not finite" in "".join(capsys.readouterr())
        assert all(torch.equal(b, p) for b, p in zip(before, student.model.parameters()))
        assert ampo.update(student, optimizer, mixed_samples())["grad_norm"] > 0  # and the next one works
        assert all(torch.isfinite(p).all() for p in student.model.parameters())

    def test_gradients_are_clipped_to_norm_one(self, make_student):
        student = make_student()
        before = [p.detach().clone() for p in student.model.parameters()]
        steep = [sample_of([5, 6, 7], old_logps=full_logps(student.model, [2, 3], [5, 6, 7]), advantages=[-1e4] * 3)]
        assert ampo.update(student, torch.optim.SGD(student.model.parameters(), lr=1.0), steep)["grad_norm"] > 10
        moved = math.sqrt(sum((b - p).pow(2).sum().item() for b, p in zip(before, student.model.parameters())))
        assert moved == pytest.approx(1.0, rel=1e-2)

    def test_luffy_does_not_clip_on_policy(self, make_student):
        """A ratio of e with A > 0: clipped methods get no gradient from it, LUFFY does."""
        def norm(method):
            student = make_student(method=method, entropy_coef=0.0)
            old = [p - 1 for p in full_logps(student.model, [2, 3], [5, 6])]
            return gradient_of(student, [sample_of([5, 6], old_logps=old, advantages=[1.0] * 2)])[1]["grad_norm"]
        assert norm("grpo") == 0 and norm("luffy") > 1e-4

    def test_sft_gradient_is_that_of_the_log_likelihood(self, make_student):
        student, twin = make_student(method="sft"), make_student().model
        s = sample_of([5, 6, 7], advantages=[1.0] * 3, off_policy=True, old_logps=[0.0] * 3)
        logits = twin(torch.tensor([s.prompt + s.ids])).logits[0, 1:-1].log_softmax(-1)
        (-logits.gather(1, torch.tensor(s.ids)[:, None]).sum() / 40).backward()
        gradient, _ = gradient_of(student, [s])
        assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(gradient, twin.parameters()))

    @pytest.mark.parametrize("advantage", [0.7, -0.7])
    def test_guide_gradient_is_that_of_the_shaped_ratio_with_a_detached_gamma(self, make_student, advantage):
        student, twin = make_student(method="guide", entropy_coef=0.0), make_student().model
        s = sample_of([5, 6, 7], old_logps=[-2.0, -3.0, -1.0], advantages=[advantage] * 3, off_policy=True)
        logits = twin(torch.tensor([s.prompt + s.ids])).logits[0, 1:-1].log_softmax(-1)
        ratio = (logits.gather(1, torch.tensor(s.ids)[:, None])[:, 0] - torch.tensor(s.old_logps)).exp()
        gamma = ratio.detach().quantile(0.9)
        (-advantage * ratio / (ratio + gamma) / 40).sum().backward()
        gradient, _ = gradient_of(student, [s])
        assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(gradient, twin.parameters()))

    def test_micro_batches_hold_every_sample_once_within_the_budget(self):
        rng = random.Random(0)
        samples = [sample_of([5] * rng.randint(1, 30), prompt=[4] * rng.randint(1, 20)) for _ in range(50)]
        batches = ampo.micro_batches(samples, 100)
        assert sorted(map(id, sum(batches, []))) == sorted(map(id, samples))
        for batch in batches:
            longest = max(len(s.prompt) + len(s.ids) for s in batch)
            assert len(batch) == 1 or len(batch) * longest <= 100


class TestValueHead:
    def test_advantages_are_gae_of_the_heads_values(self, make_student):
        student = make_student(advantage="gae", lam=0.9)
        torch.nn.init.normal_(student.critic.weight)
        s = sample_of([5, 6, 7], reward=0.7)
        ampo.set_advantages(student, [[s, sample_of([8], reward=0.1)]])
        hidden = student.model.model(torch.tensor([s.prompt + s.ids])).last_hidden_state[0, 1:-1]
        values = student.critic(hidden)[:, 0].tolist()
        assert s.values == pytest.approx(values, abs=1e-4)
        expected = ampo.gae(torch.tensor([values]), torch.tensor([0.7]), torch.ones(1, 3, dtype=torch.bool), 0.9)
        assert s.advantages == pytest.approx(expected[0].tolist(), abs=1e-4)

    def test_loss_is_the_larger_of_clipped_and_plain_error(self, make_student):
        old, returns = torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([[1.0, 1.2, 0.0]])
        loss = ampo.value_loss(torch.tensor([[1.0, 1.0, 0.9]]), old, returns - old, clip=0.2)
        # 1: right, yet clipped to 0.7 it misses by 0.3; 2: inside the clip; 3: outside, on the wrong side
        assert loss[0].tolist() == pytest.approx([0.3**2 / 2, 0.2**2 / 2, 0.9**2 / 2])

    def test_head_does_not_train_the_model(self, make_student):
        student = make_student(advantage="gae")
        torch.nn.init.normal_(student.critic.weight)
        _, _, _, values = ampo.score_samples(student, [sample_of([5, 6])])
        values.sum().backward()
        assert all(p.grad is None for p in student.model.parameters()) and student.critic.weight.grad is not None

    def test_head_learns_to_predict_the_reward(self, make_student):
        student = make_student(advantage="gae", clip=10.0)
        optimizer = torch.optim.Adam(student.critic.parameters(), lr=0.05)
        for _ in range(100):
            samples = [sample_of([5, 6], reward=0.8), sample_of([9], reward=0.8)]
            ampo.set_advantages(student, [samples])
            ampo.update(student, optimizer, samples)
        assert samples[0].values == pytest.approx([0.8, 0.8], abs=0.1)


class TestMeasure:
    def test_mistake_11_metrics_are_the_plain_rollouts_own(self):
        """Two groups of two, the first failed and rescued by a trace, which leaves reward, entropy, length alone."""
        plain = [[sample_of([5, 6], reward=0.1, correct=False, old_logps=[-1.0, -2.0]),
                  sample_of([5], reward=0.0, correct=False, old_logps=[-3.0])],
                 [sample_of([5], old_logps=[-4.0]), sample_of([5, 6], old_logps=[-1.0, -1.0])]]
        trace = sample_of([7] * 9, source="one", off_policy=True, old_logps=[0.0] * 9)
        stats = [dict(grad_norm=1.0, tokens=10, clipped=1, gap=0.5), dict(grad_norm=3.0, tokens=30, clipped=5, gap=9.0)]
        out = ampo.measure(plain, [[trace, plain[0][1]], plain[1]], stats)
        assert out["reward"] == pytest.approx(2.1 / 4) and out["fail_rate"] == 0.5 and out["rescued"] == 0.5
        assert out["entropy"] == pytest.approx(12 / 6) and out["response_length"] == 1.5
        assert out["grad_norm"] == 2.0 and out["clip_fraction"] == 6 / 40 and out["logp_gap"] == 0.05
        assert out["teachers"] == {"one": 1}

    def test_entropy_estimate_agrees_with_the_exact_one(self, make_student):
        student = make_student(method="grpo", group_size=64, max_new_tokens=8)
        student.eos = []
        torch.manual_seed(0)
        group, = ampo.rollout(student, [problem()], [PROBLEM["question"]])
        with torch.no_grad():
            _, mask, entropy, _ = ampo.score_samples(student, group)
        stats = [dict(grad_norm=0.0, tokens=0, clipped=0, gap=0.0)]
        estimate = ampo.measure([group], [group], stats)["entropy"]
        assert estimate == pytest.approx(entropy[mask].mean().item(), rel=0.03)


class TestPassAtK:
    @pytest.mark.parametrize("n, correct", [(1, 0), (1, 1), (5, 0), (5, 1), (5, 3), (6, 5), (6, 6)])
    def test_equals_enumeration_of_all_subsets(self, n, correct):
        flags = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(flags, k))
            assert ampo.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))

    @pytest.mark.parametrize("n, correct, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
    def test_refuses_what_it_cannot_estimate(self, n, correct, k):
        with pytest.raises(ValueError):
            ampo.pass_at_k(n, correct, k)


class TestEvaluate:
    def test_scores_by_the_unbiased_estimator(self, make_student, scripted):
        scripted(lambda prompt, i: RIGHT if ("one" in prompt and i < 3) else WRONG)
        problems = [problem(question="one?"), problem(question="two?")]
        out, groups = ampo.evaluate(make_student(), problems, 6, 1.0)
        assert list(out) == ["pass@1", "pass@2", "pass@4", "pass@6", "n", "length"] and out["n"] == 2
        for k in (1, 2, 4, 6):
            assert out[f"pass@{k}"] == pytest.approx(ampo.pass_at_k(6, 3, k) / 2)
        assert [len(group) for group in groups] == [6, 6]

    def test_seeds_itself(self, make_student):
        """The same figures whenever it is called, and other ones under another seed."""
        texts = []
        for seed in (5, 5, 6):
            student = make_student(max_new_tokens=3, seed=seed)
            torch.rand(seed)
            _, groups = ampo.evaluate(student, [problem()], 4, 1.0)
            texts.append([sample.ids for sample in groups[0]])
        assert texts[0] == texts[1] != texts[2]


# ---------------------------------------------------------------------------------------------------------------------
# §8 Whole runs


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


class TestTrain:
    def test_same_seed_same_run_and_another_seed_another(self, tmp_path):
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
            assert ampo.main([*SMALL, "--steps", "3", "--seed", seed, "--out", str(tmp_path / name)]) == 0
        assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b") != metrics_of(tmp_path / "c")
        a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
        assert all(torch.equal(a[k], b[k]) for k in a)

    @pytest.mark.parametrize("flags", [[], ["--advantage", "gae", "--method", "guide"]])
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

    def test_mistake_10_every_epoch_takes_every_problem_once(self):
        cfg = ampo.Config(prompts_per_step=4)
        order = [i for step in range(9) for i in ampo.batch_indices(12, step, cfg)]
        epochs = [order[i:i + 12] for i in (0, 12, 24)]
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]
        big = ampo.batch_indices(3, 1, ampo.Config(prompts_per_step=7))  # a step of more than two epochs
        assert len(big) == 7 and set(big) == {0, 1, 2}

    def test_resume_finds_the_old_checkpoint_when_a_kill_came_between_the_renames(self, tmp_path):
        ampo.main([*SMALL, "--steps", "2", "--out", str(tmp_path / "run")])
        (tmp_path / "run" / "model").rename(tmp_path / "run" / "model.old")
        assert ampo.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
        assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]
        assert not (tmp_path / "run" / "model.old").exists()

    @pytest.mark.parametrize("method", list(ampo.METHODS))
    def test_every_method_runs_and_logs_the_same_columns(self, tmp_path, method):
        assert ampo.main([*SMALL, "--method", method, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
        row, = metrics_of(tmp_path / "run")
        assert {"step", "reward", "fail_rate", "rescued", "entropy", "response_length", "grad_norm",
                "clip_fraction"} <= set(row)
        full = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
        assert {"rollout_s", "guide_s", "update_s"} <= set(full)
        if method != "sft":
            assert row["logp_gap"] < 1e-4 and row["entropy"] > 0  # sampler and trainer agree; ratios start at 1

    def test_checkpoint_loads_and_generates_with_transformers_alone(self, tmp_path):
        ampo.main([*SMALL, "--steps", "1", "--out", str(tmp_path / "run")])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        ids = ampo.encode_prompt(tokenizer, "Solve 2*x=3.")
        theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids):].tolist()
        (ours, _), = ampo.generate(model, [ids], 1, 24, 0, tokenizer.eos_token_id)[0]
        assert ours == theirs

    def test_a_short_run_raises_the_reward(self, tmp_path):
        flags = ["--model", BASE, "--data", str(HERE / "data" / "train.jsonl"), "--prompts_per_step", "16",
                 "--steps", "40", "--eval_every", "0", "--out", str(tmp_path / "run")]
        assert ampo.main(flags) == 0
        rewards = [row["reward"] for row in metrics_of(tmp_path / "run")]
        assert statistics.mean(rewards[-8:]) > statistics.mean(rewards[:8]) + 0.05

    def test_closing_report_and_eval_command(self, tmp_path, capsys):
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
        run = subprocess.Popen([sys.executable, str(HERE / "ampo.py"), *SMALL, "--steps", "500", "--out", str(out)],
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


class TestBadInput:
    """Exit status 2, one line that names the culprit, nothing written."""

    def refuse(self, capsys, *argv):
        status = ampo.main(list(argv))
        said = capsys.readouterr().err
        assert status == 2 and said.count("\n") == 1, said
        return said

    @pytest.mark.parametrize("flags, named", [
        (["--group_size", "1"], "--group_size"),
        (["--temperature", "-1"], "--temperature"), (["--temperature", "0"], "--temperature"),
        (["--k", "9"], "--k"),
        (["--steps", "0"], "--steps"), (["--steps", "x"], "--steps"), (["--lr", "nan"], "--lr"),
        (["--method", "ppo"], "ppo"), (["--follow", "me"], "--follow"), (["--nonsense", "1"], "--nonsense"),
        (["--model", "no/such/folder"], "no/such/folder"), (["--model", str(HERE / "data")], str(HERE / "data")),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--max_new_tokens", "5000"], "train.jsonl:1"),
    ])
    def test_flags_and_files(self, tmp_path, capsys, flags, named):
        assert named in self.refuse(capsys, *SMALL, "--out", str(tmp_path / "run"), *flags)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("method, field", [("ampo", "teachers"), ("luffy", "teachers"), ("sft", "teachers"),
                                               ("guide", "hint"), ("ghpo", "solution")])
    def test_a_method_without_what_it_needs(self, tmp_path, capsys, method, field):
        (tmp_path / "p.jsonl").write_text('{"question": "2*x=3", "answer": "3/2"}\n')
        said = self.refuse(capsys, *SMALL, "--method", method, "--data", str(tmp_path / "p.jsonl"),
                           "--out", str(tmp_path / "run"))
        assert field in said and "p.jsonl" in said and not (tmp_path / "run").exists()

    def test_a_bad_line_is_named_with_file_line_and_field(self, tmp_path, capsys):
        (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": "1"}\n{"question": "q", "answer": "?"}\n')
        said = self.refuse(capsys, *SMALL, "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "run"))
        assert "p.jsonl:2" in said and "answer" in said and not (tmp_path / "run").exists()

    def test_a_folder_that_is_taken(self, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert "--out" in self.refuse(capsys, *SMALL, "--out", str(tmp_path))
        assert "--out" in self.refuse(capsys, *SMALL, "--out", str(tmp_path / "notes.txt"))
        assert os.listdir(tmp_path) == ["notes.txt"]

    def test_nothing_to_resume(self, tmp_path, capsys):
        assert "--resume" in self.refuse(capsys, "--resume", "--out", str(tmp_path / "none"))

    def test_eval_refuses_likewise(self, tmp_path, capsys):
        assert "no/model" in self.refuse(capsys, "eval", "--model", "no/model")
        assert "--samples" in self.refuse(capsys, "eval", "--samples", "0")

    def test_as_a_command(self):
        command = [sys.executable, str(HERE / "ampo.py"), "--group_size", "1"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and not run.stdout


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
        stops, prompts, lengths = student.eos + list(range(20, 50)), self.prompts(student), set()
        torch.manual_seed(0)
        for prompt, group in zip(prompts, ampo.generate(student.model, prompts, 8, 24, 0.8, stops)):
            for ids, logps in group:
                lengths.add(len(ids))
                assert logps == pytest.approx(full_logps(student.model, prompt, ids, 0.8), abs=2e-4)
        assert len(set(map(len, prompts))) == 3 and len(lengths) > 5

    def test_greedy_equals_generate_of_transformers(self, family):
        student = ampo.load_student(family, ampo.Config())
        prompts, stops = self.prompts(student), student.eos + list(range(20, 50))
        for prompt, ((ours, _),) in zip(prompts, ampo.generate(student.model, prompts, 1, 24, 0, stops)):
            assert ours == greedy(student.model, prompt, eos_token_id=stops)

    def test_scoring_equals_one_sequence_at_a_time(self, family):
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
    def test_trains_and_the_result_loads_with_transformers_alone(self, family, method, tmp_path, monkeypatch):
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

    def test_is_a_message_of_the_chat_template(self):
        tokenizer = small_tokenizer()
        with_it = tokenizer.decode(ampo.encode_prompt(tokenizer, self.QUESTION, self.SYSTEM))
        without = tokenizer.decode(ampo.encode_prompt(tokenizer, self.QUESTION))
        end = f"<|im_start|>user\n{self.QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        assert with_it == f"<|im_start|>system\n{self.SYSTEM}<|im_end|>\n{end}" and without == end

    def test_rollouts_and_traces_train_under_it(self, folder, tmp_path, monkeypatch):
        """A trace trained on another prompt than the rollouts would teach nothing about the prompt that is used."""
        trained, update = [], ampo.update
        monkeypatch.setattr(ampo, "update", lambda student, optimizer, samples: (
            trained.extend(samples), update(student, optimizer, samples))[1])
        assert ampo.main(run_flags(folder, tmp_path, "--system", self.SYSTEM)) == 0
        tokenizer = small_tokenizer()
        expected = [ampo.encode_prompt(tokenizer, line["question"], self.SYSTEM) for line in LINES]
        assert {s.source for s in trained} == {"student", "divide", "short"}
        assert sorted(map(tuple, expected)) == sorted({tuple(s.prompt) for s in trained})

    def test_rollouts_are_sampled_under_it(self, folder):
        student = ampo.load_student(folder, ampo.Config(system=self.SYSTEM, max_new_tokens=8, group_size=2))
        group, = ampo.rollout(student, [ampo.Problem(self.QUESTION, "5/3")], [self.QUESTION])
        for s in group:
            assert s.prompt == ampo.encode_prompt(student.tokenizer, self.QUESTION, self.SYSTEM)
            assert s.old_logps == pytest.approx(full_logps(student.model, s.prompt, s.ids), abs=2e-4)

    def test_comprehension_is_measured_under_it(self, folder, monkeypatch):
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

    def refuse(self, capsys, *argv):
        capsys.readouterr()
        status = ampo.main(list(argv))
        message = capsys.readouterr().err.split("ampo.py: ")[1:]  # before it stands the progress bar
        assert status == 2 and len(message) == 1 and message[0].count("\n") == 1
        return message[0]

    @pytest.mark.parametrize("kind", UNSUITABLE)
    def test_other_caches_are_refused(self, tmp_path, capsys, kind):
        path = save_model(tmp_path / "base", kind, **self.UNSUITABLE[kind])
        flags = run_flags(path, tmp_path)
        assert kind in self.refuse(capsys, *flags, "--method", "grpo")
        assert kind in self.refuse(capsys, "eval", *flags, "--samples", "2")

    @pytest.mark.parametrize("kind", ["recurrent_gemma", "rwkv"])
    def test_caches_that_fail_before_they_are_looked_at(self, tmp_path, capsys, kind):
        """One raises inside transformers' first forward pass, the other leaves the cache it was given empty."""
        path = save_model(tmp_path / "base", kind)
        assert kind in self.refuse(capsys, "eval", *run_flags(path, tmp_path), "--samples", "2")

    @pytest.mark.parametrize("kind", CHANGED_HEADS)
    def test_changed_heads_are_refused_in_training(self, tmp_path, capsys, kind):
        path = save_model(tmp_path / "base", kind, scale=16.0, **self.CHANGED_HEADS[kind])
        assert "disagree" in self.refuse(capsys, *run_flags(path, tmp_path))
        assert not (tmp_path / "run" / "model").exists()

    @pytest.mark.parametrize("kind, neutral", [
        ("gemma2", dict(final_logit_softcapping=None)), ("granite", dict(logits_scaling=1.0)),
        ("cohere", dict(logit_scale=1.0))])
    def test_the_same_families_train_with_a_plain_head(self, tmp_path, kind, neutral):
        path = save_model(tmp_path / "base", kind, **self.CHANGED_HEADS[kind] | neutral)
        assert ampo.main(run_flags(path, tmp_path)) == 0

    def test_without_chat_template(self, tmp_path, capsys):
        path = save_model(tmp_path / "base", "qwen2", template=None)
        assert "chat template" in self.refuse(capsys, *run_flags(path, tmp_path))
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# §4 on CUDA, without CUDA


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


class TestWindow:
    PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]
    STOPS, N, T = [20, 21, 22], 10, 60

    def sample(self, model, span, temperature=1.0):
        torch.manual_seed(0)
        return ampo.generate(model, self.PROMPTS, self.N, self.T, temperature, self.STOPS, span=span)

    @pytest.mark.parametrize("span", [1, 3, 16, 64])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logps_equal_an_uncached_forward_pass(self, model, monkeypatch, span, temperature):
        """Fresh memory holds NaN, so that a slot which is read before it is written would show."""
        fill_new_memory(monkeypatch)
        groups = self.sample(model, span, temperature)
        for prompt, group in zip(self.PROMPTS, groups):
            for ids, logps in group:
                assert logps == pytest.approx(full_logps(model, prompt, ids, temperature), abs=2e-4)
        assert len({len(ids) for group in groups for ids, _ in group}) > 10
        assert max(len(ids) for group in groups for ids, _ in group) > 3 * 16  # the window of 16 opened several times

    @pytest.mark.parametrize("span", [3, 16, 64])
    def test_span_changes_nothing(self, model, span):
        ids = [[[r for r, _ in group] for group in self.sample(model, s, 0)] for s in (1, span)]
        assert ids[0] == ids[1]

    @pytest.mark.parametrize("span", [16, 64])
    def test_steps_can_be_recorded_and_replayed(self, model, monkeypatch, span):
        """A graph reads the memory it was recorded on and nothing else: a tensor that is rebound between captures, or
        a number that Python hands in, stays for ever what it was."""
        expected, recorded, calls, forward = self.sample(model, span), [], [], model.forward

        def replayed(step, device):
            with Tape() as tape: logits = step()
            logits.fill_(math.nan)  # recording computes nothing
            recorded.append(calls[-1])
            return lambda: tape.replay() or logits

        with monkeypatch.context() as patch:
            fill_new_memory(patch)
            patch.setattr(ampo, "replayed", replayed)
            patch.setattr(model, "forward", lambda **inputs: (
                calls.append((len(inputs["input_ids"]), inputs["attention_mask"].shape[-1])), forward(**inputs))[1])
            groups = self.sample(model, span)
        assert [[ids for ids, _ in g] for g in groups] == [[ids for ids, _ in g] for g in expected]
        for prompt, group in zip(self.PROMPTS, groups):
            for ids, logps in group:
                assert logps == pytest.approx(full_logps(model, prompt, ids), abs=2e-4)
        assert len(recorded) > 2 and {window % span for _, window in recorded} == {0}
        steps = max(len(ids) for group in groups for ids, _ in group) - 1
        assert len(recorded) == len(set(recorded)) and len(calls) < 1 + steps  # the other steps were replayed

    def test_rollouts_that_said_the_same_share_a_row(self, model, monkeypatch):
        """A prompt is read once; then there is a row for each different past of a running rollout, and few others."""
        rows, forward = [], model.forward
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", lambda **inputs: (
                rows.append(inputs["input_ids"].shape), forward(**inputs))[1])
            groups = self.sample(model, 1, 0.2)
        assert rows[0] == (3, 8) and {width for _, width in rows[1:]} == {1}
        shared = 0
        for t, (count, _) in enumerate(rows[1:], 1):
            running = [(i, tuple(ids[:t])) for i, group in enumerate(groups) for ids, _ in group
                       if not set(ids[:t]) & set(self.STOPS)]
            assert len(set(running)) <= count <= max(len(set(running)) / 0.85, 1)
            shared += len(running) - len(set(running))
        assert shared > 20
        assert len(rows) == max(len(ids) for group in groups for ids, _ in group)

    def test_prefill_reads_each_prompt_once(self, model):
        with torch.inference_mode():
            logits, cache, mask, lengths, slot = ampo.prefill(model, self.PROMPTS, 3, 20)
        assert logits.shape == (3, 60) and mask.shape == (3, 1, 1, 20)
        assert lengths.tolist() == [3, 8, 1] and slot.tolist() == [8]
        with torch.no_grad():
            for i, prompt in enumerate(self.PROMPTS):
                alone = model(torch.tensor([prompt]), use_cache=True)
                seen = [False] * (8 - len(prompt)) + [True] * len(prompt) + [False] * 12
                assert torch.allclose(logits[i], alone.logits[0, -1], atol=1e-4)
                assert mask[i, 0, 0].tolist() == [0.0 if s else -math.inf for s in seen]
                for slab, layer in zip(cache.layers, alone.past_key_values.layers):
                    for buffer, x in zip(slab.buffers, (layer.keys, layer.values)):
                        assert buffer.shape == (9, 2, 20, 8)  # room for the rows of all rollouts
                        assert torch.allclose(buffer[i, :, 8 - len(prompt):8], x[0], atol=1e-4)

    def test_responses_are_cut_after_their_first_stop_token(self):
        ids = torch.tensor([[4, 9, 5, 9], [5, 5, 5, 5], [8, 1, 1, 1], [1, 2, 3, 9], [1, 1, 8, 9], [9, 8, 9, 8]])
        logps = -torch.arange(24.0).view(6, 4)
        groups = ampo.cut_responses(ids, logps, torch.tensor([9, 8]), 2)
        assert [[r for r, _ in group] for group in groups] == [
            [[4, 9], [5, 5, 5, 5]], [[8], [1, 2, 3, 9]], [[1, 1, 8], [9]]]
        assert [[p for _, p in group] for group in groups] == [
            [[0, -1], [-4, -5, -6, -7]], [[-8], [-12, -13, -14, -15]], [[-16, -17, -18], [-20]]]
        unstopped = ampo.cut_responses(ids, logps, torch.tensor([], dtype=torch.long), 3)
        assert [[r for r, _ in group] for group in unstopped] == [ids[:3].tolist(), ids[3:].tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# §5 for large vocabularies and deep models


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


class TestHeadInChunks:
    RESPONSES = [[5 + i % 50 for i in range(40)], [7, 9, 1], [11 + i % 40 for i in range(62)], [12] * 30]
    PROMPTS = [[3, 4], [5] * 9, [6], [7, 8, 9]]

    def model_of(self, tied):
        """A head that says it has 2^22 outputs is computed for 2^26 / 2^22 = 16 tokens at a time."""
        model = random_model(vocab=61, tie_word_embeddings=tied)
        model.lm_head.out_features = 2**22
        return model

    @pytest.mark.parametrize("tied", [True, False])
    def test_equals_full_logits_in_value_and_gradient(self, tied):
        model, twin = self.model_of(tied), random_model(vocab=61, tie_word_embeddings=tied)
        logps, mask, entropy, _ = ampo.score(model, self.PROMPTS, self.RESPONSES, 0.7)
        (2 * logps - entropy)[mask].mean().backward()
        total = 0
        for prompt, response, row, bits, m in zip(self.PROMPTS, self.RESPONSES, logps, entropy, mask):
            log_p = (twin(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / 0.7).log_softmax(-1)
            exact, spread = log_p.gather(1, torch.tensor(response)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
            assert torch.allclose(row[m], exact, atol=1e-4) and torch.allclose(bits[m], spread, atol=1e-4)
            assert (row[~m] == 0).all() and (bits[~m] == 0).all()
            total = total + (2 * exact - spread).sum()
        (total / sum(map(len, self.RESPONSES))).backward()
        for a, b in zip(model.parameters(), twin.parameters()):
            assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-3) and b.grad.abs().sum() > 0

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
        assert forward == [16] * (count // 16) + [count % 16] and count % 16
        assert len(sizes) == 2 * len(forward)  # the backward pass computes them again instead of keeping them
        assert widest.rows == 16

    def test_a_vocabulary_beyond_all_measure_still_takes_a_token_at_a_time(self):
        model, plain = self.model_of(False), random_model(vocab=61)
        model.lm_head.out_features = 2**27
        ours, theirs = (ampo.token_logps(m, [[5]], [[6, 7]])[0] for m in (model, plain))
        assert torch.allclose(ours, theirs, atol=1e-5)


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
        for prompt, group in zip(self.PROMPTS, groups):
            for ids, logps in group:
                assert logps == pytest.approx(full_logps(student.model, prompt, ids), abs=2e-4)

    def test_a_run_with_it_is_a_run_without_it(self, folder, tmp_path):
        rows = []
        for name, more in (("a", []), ("b", ["--recompute"])):
            (tmp_path / name).mkdir()
            assert ampo.main(run_flags(folder, tmp_path / name, *more)) == 0
            rows.append(json.loads((tmp_path / name / "run" / "metrics.jsonl").read_text()))
        for column in ("reward", "entropy", "response_length", "grad_norm"):
            assert rows[0][column] == pytest.approx(rows[1][column], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# §7 Rollouts in passes, a sampler in bfloat16


class TestPasses:
    QUESTIONS = [f"Solve {a}*x={'17' * (1 + 6 * (a % 4))}." for a in range(2, 13)]

    def rollouts(self, make_student, monkeypatch, cache_tokens):
        student, calls, generate = make_student(max_new_tokens=10, cache_tokens=cache_tokens), [], ampo.generate
        monkeypatch.setattr(ampo, "generate", lambda model, prompts, *rest: (
            calls.append(prompts), generate(model, prompts, *rest))[1])
        problems = [ampo.Problem(question, "1") for question in self.QUESTIONS]
        student.sampled = 5
        groups = ampo.rollout(student, problems, self.QUESTIONS)
        monkeypatch.setattr(ampo, "generate", generate)
        return student, calls, groups

    @pytest.mark.parametrize("cache_tokens, size", [(1, 1), (4 * 2, 1), (2.5, 2), (3, 3), (5, 5), (40000, 11)])
    def test_hold_no_more_than_the_cache(self, make_student, monkeypatch, tokenizer, cache_tokens, size):
        prompts = [ampo.encode_prompt(tokenizer, question) for question in self.QUESTIONS]
        row = 4 * (max(map(len, prompts)) + 10)
        budget = cache_tokens if cache_tokens in (1, 8, 40000) else int(cache_tokens * row)
        student, calls, groups = self.rollouts(make_student, monkeypatch, budget)
        assert [len(call) for call in calls] == [size] * (11 // size) + [11 % size] * (11 % size > 0)
        assert sum(calls, []) == prompts and all(len(c) * row <= max(budget, row) for c in calls)
        assert [len(group) for group in groups] == [4] * 11
        for group, prompt in zip(groups, prompts):
            for s in group:
                assert s.prompt == prompt
                assert s.old_logps == pytest.approx(full_logps(student.model, prompt, s.ids), abs=2e-4)
        assert student.sampled == 5 + sum(len(s.ids) for group in groups for s in group)

    def test_no_problems_no_passes(self, make_student, monkeypatch):
        student = make_student()
        assert ampo.rollout(student, [], []) == [] and student.sampled == 0


class TestLowPrecisionSampler:
    """On CUDA a bfloat16 copy samples and the float32 masters train."""

    def student(self, make_student):
        student = make_student(max_new_tokens=24, lr=1e-2)
        student.sampler = copy.deepcopy(student.model).bfloat16()
        return student

    def test_is_close_to_its_master(self, make_student, tokenizer):
        student = self.student(make_student)
        prompts = [ampo.encode_prompt(tokenizer, question) for question in ("Solve 3*x=5.", "x", "Solve 11*x+4=5.")]
        torch.manual_seed(0)
        for prompt, group in zip(prompts, ampo.generate(student.sampler, prompts, 6, 24, 1.0, student.eos, span=16)):
            responses = [ids for ids, _ in group]
            logps, mask = ampo.token_logps(student.model, [prompt] * 6, responses)
            sampled, _ = ampo.pad([p for _, p in group], "cpu")
            assert sampled.dtype == torch.float32 and torch.isfinite(sampled).all()
            assert 0 < (logps - sampled)[mask].abs().mean() < 0.05

    def test_follows_its_master_in_every_update(self, make_student):
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

    def test_a_step_trains_the_masters(self, make_student, monkeypatch):
        """On-policy ratios near 1: the sampler's log-probabilities, not the masters', are the denominator."""
        student = self.student(make_student)
        monkeypatch.setattr(ampo, "verify", lambda text, gold: len(text) % 2 == 0)
        optimizer = torch.optim.AdamW([*student.model.parameters(), *student.critic.parameters()], 1e-3)
        row = ampo.train_step(student, optimizer, [ampo.Problem(**line) for line in LINES], 0)
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
    def test_update_of_two_ranks_is_that_of_one_process_on_all_samples(self, tmp_path):
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

    def test_one_log_one_report_and_one_checkpoint(self, pair):
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
        ("run.json", lambda whole: b'{"nonsense": 1}')], ids=["template", "bytes", "flag"])
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

    def test_a_gradient_that_is_not_finite_costs_one_update(self, runs, tmp_path, monkeypatch, capsys):
        """Weights, or AdamW's moments, that are nan from then on."""
        calls, method = [], ampo.METHODS["sft"]

        def objective(*args):
            calls.append(len(calls))
            return method.objective(*args) * (float("nan") if len(calls) == 2 else 1)
        monkeypatch.setitem(ampo.METHODS, "sft", ampo.replace(method, objective=objective))
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

    @pytest.mark.parametrize("function, flag", [("prefill", "--cache_tokens"), ("score", "--micro_tokens")])
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

    @pytest.mark.parametrize("function", ["generate", "update", "save_checkpoint"])
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
