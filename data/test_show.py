"""Tests of show.py: its numbers against formulas and forward passes of their own, and its page.

The student is a random model. Its rollouts are scripted, with old log-probabilities beside its own
ones, so that ratios lie within the clip and on both sides of it.
"""
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from test_ampo import (
    RIGHT, WRONG, ampo, expect, flat, full_logps, ids_of, problem_of, prompt_of, random_model,
    scripted, student_of, tokenizer,
)
import show

import pytest
import torch

NASTY = "<script>alert('1')</script> <img src=x onerror=\"alert(2)\"> &amp; é\n"
SHIFTS = (0.5, 0.0, -0.5)  # of the old log-probabilities, token by token


def says(prompt, i):
    """No rollout is right without help; with a hint or half of the solution the first one is."""
    helped = "divide" in prompt or "abcde" in prompt
    return RIGHT if helped and i == 0 else WRONG


def first_is_right(prompt, i):
    return RIGHT if i == 0 else WRONG


@pytest.fixture
def make(tokenizer):
    """make(method, says): a student whose i-th rollout of a prompt is says(prompt, i)."""
    def make(method, says=says, **flags):
        flags = {"method": method, "entropy_coef": 0.0, "lr": 1e-3} | flags
        student = student_of(random_model(len(tokenizer), scale=1.0), tokenizer, **flags)
        script = scripted(tokenizer, says)

        def generate(model, prompts, *args):
            groups = script(model, prompts, *args)
            for prompt, group in zip(prompts, groups):
                for ids, logps in group:
                    for t, logp in enumerate(full_logps(model, prompt, ids)):
                        logps[t] = logp + SHIFTS[t % 3]
            return groups

        student.generate = generate
        return student
    return make


def steps_of(student, names, **changes):
    """The steps of some methods on one problem, from the same rollouts."""
    problem = problem_of(**changes)
    rollouts = show.draw(student, problem)
    return [show.take_step(show.copy_for(student, name), problem, rollouts) for name in names]


def test_push_of_rollouts_is_that_of_the_clipped_ratio(make):
    step, = steps_of(make("grpo", first_is_right), ["grpo"])
    seen = set()
    for response in step.responses:
        length = len(response.sample.ids)
        advantage = 1.5 if response.sample.correct else -0.5  # of 1, 0, 0, 0: over the std of 1/2
        wanted = []
        for t in range(length):
            ratio = math.exp(-SHIFTS[t % 3])
            cut = ratio > 1.2 if advantage > 0 else ratio < 0.8
            wanted.append(0.0 if cut else advantage * ratio / (4 * length))
            seen.add((advantage, cut))
        expect(f"pushes of {response.title}", response.pushes, wanted, 1e-4)
    assert len(seen) == 4


def test_push_of_traces_is_that_of_the_shaping(make, tokenizer):
    student = make("ampo", max_new_tokens=30)
    step, = steps_of(student, ["ampo"])
    prompt = prompt_of(tokenizer, "Solve 2*x=3.")
    traces = [response for response in step.responses if response.sample.off_policy]
    for response in traces:
        logps = full_logps(student.model, prompt, response.sample.ids)
        expect(f"logps of the {response.title}", response.logps, logps, 1e-4)
        p = torch.tensor(logps).exp()
        wanted = 0.45 * 0.1 * p / (p + 0.1) ** 2 / (4 * 30)  # 0.45: of rewards 1, 1, 0.1, 0.1
        expect(f"pushes of the {response.title}", response.pushes, wanted, 1e-4)
    places = sorted(response.title[-len("rollout 1"):] for response in step.responses)
    assert len(traces) == 2
    assert places == [f"rollout {i}" for i in range(1, 5)]


@pytest.mark.parametrize("method", ["grpo", "luffy", "ampo", "guide", "ghpo", "rl_sft", "sft"])
def test_pushes_make_the_gradient_of_the_update(make, method):
    student = make(method)
    step, = steps_of(student, [method])
    total = torch.zeros(())
    for response in step.responses:
        sample = response.sample
        logps, _ = ampo.token_logps(student.model, [sample.prompt], [sample.ids])
        total = total + logps[0] @ torch.tensor(response.pushes)
    total.backward()
    norm = flat([weight.grad for weight in student.model.parameters()]).norm().item()
    expect(f"{method}: norm of the gradient", step.grad_norm, norm, 1e-3)
    assert (norm == 0) == (method == "grpo")
    assert (step.rollouts == []) == (method == "sft")


def test_a_failed_group_under_grpo_moves_nothing(make):
    step, = steps_of(make("grpo"), ["grpo"])
    assert not any(any(response.pushes) for response in step.responses)
    assert step.before == step.after
    assert "All pushes are zero" in show.page([step])


def test_traces_before_and_after(make, tokenizer):
    student = make("ampo")
    step, = steps_of(student, ["ampo"])
    chosen = [response.sample.source for response in step.responses]
    prompt = prompt_of(tokenizer, "Solve 2*x=3.")
    for old, new in zip(step.before, step.after):
        logps = full_logps(student.model, prompt, ids_of(tokenizer, old.text) + student.eos)
        expect(f"p of {old.name}", old.p, math.exp(sum(logps) / len(logps)), 1e-4)
        lead = ids_of(tokenizer, old.text[:old.text.index("{") + 1])
        logps = full_logps(student.model, prompt + lead, ids_of(tokenizer, "3/2"))
        wanted = list(zip("3/2", torch.tensor(logps).exp().tolist()))
        expect(f"the gold answer after {old.name}", old.answer, wanted, 1e-4)
        mean = sum(p for _, p in wanted) / 3
        expect(f"comprehension of {old.name}", old.comprehension, mean, 1e-4)
        assert new.p > old.p or old.name not in chosen


class Reader(HTMLParser):
    """What a browser makes of a page: its text, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.text = ""
        self.tags = []
        self.attributes = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_the_page_escapes_what_others_wrote_and_needs_no_network(make):
    student = make("ampo", lambda prompt, i: NASTY + says(prompt, i), max_new_tokens=120)
    page = show.page(steps_of(
        student, show.BESIDE, question=NASTY, hint=NASTY + "divide", where=NASTY,
        solution=NASTY + "abcdefghij", teachers={NASTY: NASTY + RIGHT},
    ))
    read = Reader(page)
    assert read.tags.count("script") == 1
    assert not re.search("<[^a-z/!]", page)
    assert dict(read.attributes).keys() == {
        "aria-label", "charset", "class", "content", "href", "id", "lang", "name", "open", "role",
        "scope", "style", "tabindex",
    }
    assert "http" not in page
    assert "link" not in read.tags
    assert all(value[0] == "#" for name, value in read.attributes if name == "href")
    assert read.text.count("<img src=x onerror=\"alert(2)\"> &amp;") > 5 * 4
    assert "\ufffd\ufffd" in read.text  # the two bytes of é are tokens of their own


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags for a file in the current folder: an empty line 2, no teachers on line 3."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Solve {a}*x=3.", "answer": f"3/{a}"} for a in (2, 4, 5)]
    rows[0]["teachers"] = {"one": "\\boxed{3/2}"}
    rows[2]["teachers"] = {"one": "\\boxed{3/5}"}
    first, second, third = map(json.dumps, rows)
    Path("some.jsonl").write_text(f"{first}\n\n{second}\n{third}\n")
    return ["--data", "some.jsonl", "--model", str(ROOT / "data" / "base")]


def test_problem_picks_a_line_and_else_the_first_that_failed(flags, make):
    more = "--max_new_tokens 24 --trigger always --problem 3".split()
    assert show.main([*flags, *more]) == 0
    text = Reader(Path("step.html").read_text(encoding="utf-8")).text
    assert "Solve 4*x=3." in text
    assert "no teachers that can be used" in text
    student = make("ampo", lambda prompt, i: RIGHT if "2*x" in prompt else WRONG, data="some.jsonl")
    for line, wanted in ((None, 4), (1, 1), (3, 3)):
        problem, rollouts = show.pick(student, line)
        assert problem.where == f"some.jsonl:{wanted}"
        assert {sample.correct for sample in rollouts} == {wanted == 1}


@pytest.mark.parametrize("wrong, said", [
    ("--problem 2", "no problem on this line"), ("--problem x", "--problem"),
    ("--nonsense 1", "--nonsense"), ("--temperature 0", "--temperature 0"),
    ("--data none.jsonl", "none.jsonl"), ("--recipe grpo --follow code", "--follow code"),
])
def test_a_wrong_command_ends_with_status_2_and_one_line(flags, capsys, wrong, said):
    assert show.main([*flags, *wrong.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("show.py: ")
    assert said in message
    assert message.count("\n") == 1
    assert not Path("step.html").exists()
