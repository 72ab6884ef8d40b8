"""Tests of convert.py, teach.py and to_verl.py.

The published rows are made by hand in the schemas of the sets. The teacher is the base model.
pyarrow and verl are not needed: what takes them is skipped without.
"""
import ast
import importlib.util
import json
import math
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model that does not exist is looked for on this machine only

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import ampo
import convert
import teach
import to_verl

BASE = str(HERE / "base")
QUESTION = "What is half of 144?"
RIGHT = "<think>\n144/2\n</think>\n\nSo \\boxed{72}."
WRONG = "So \\boxed{71}."
SHORT = "\\boxed{72}"
PLAIN = {"question": QUESTION, "answer": "72"}


def write_lines(path, rows):
    """A file with a row a line; rows that are text stay as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, main, *argv):
    """Run a script that must exit with status 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    status = main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def convert_rows(tmp_path, capsys):
    """convert_rows(rows, *flags): convert.py's problems as plain objects, and what it printed."""
    def run(rows, *flags):
        source = write_lines(tmp_path / "in.jsonl", rows)
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        capsys.readouterr()
        assert convert.main([str(source), "--out", str(out), *flags]) == 0
        ampo.load_problems(out)  # what is written can be read
        return lines_of(out), capsys.readouterr().out
    return run


# ---------------------------------------------------------------------------------------------------
# convert.py: the forms


def messages(question=QUESTION, system=""):
    """The messages of a published set; a system message may stand first."""
    user = {"role": "user", "content": question}
    return [{"role": "system", "content": system}, user] if system else [user]


def verl_row(**fields):
    """A row in the layout that verl's sets share."""
    row = {
        "data_source": "openr1",
        "prompt": messages(),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"index": 1, "split": "default"},
    }
    return {**row, **fields}


def target(source, text, quality=0.5):
    """A trace in the layout of the official AMPO's set."""
    return {"source": source, "content": text, "quality_score": quality}


def solved(text, right=True):
    """A model's solution in the layout of GSM8K's example solutions."""
    return {"is_correct": right, "solution": text}


def openr1_row(generations, verify, llama=None, complete=None):
    count = len(generations)
    return {
        "problem": QUESTION,
        "solution": "Halve it.",
        "answer": "72",
        "generations": generations,
        "correctness_math_verify": verify,
        "correctness_llama": llama,
        "is_reasoning_complete": complete if complete else [True] * count,
        "messages": messages(),
    }


class TestForms:
    """A row of each published form -> the problem that is made of it."""

    def check(self, convert_rows, row, **fields):
        problems, said = convert_rows([row])
        assert problems == [{**PLAIN, **fields}]
        assert said.startswith("taken 1 of 1 rows")
        return said

    def test_ampo(self, convert_rows):
        targets = [
            target("r1", RIGHT, 0.2), target("r1", RIGHT + " And half.", 0.9),
            target("r1", RIGHT + " Really.", 0.9), target("r1", WRONG, 1.0),
            target("qwen", SHORT, None), target("glm", WRONG), target("yi", "72"),
            target("phi", ""),
        ]
        row = verl_row(target_lst=targets)
        said = self.check(convert_rows, row, teachers={"r1": RIGHT + " Really.", "qwen": SHORT})
        assert "traces and solutions left out: 6" in said
        assert "2 whose teacher has a better one" in said
        assert "2 whose final answer is not the gold one" in said
        assert "1 without a final answer" in said
        assert "1 empty" in said

    def test_ampo_without_traces(self, convert_rows):
        self.check(convert_rows, verl_row(target_lst=None))

    def test_luffy(self, convert_rows):
        row = verl_row(target=[{"role": "assistant", "content": RIGHT}])
        said = self.check(convert_rows, row, teachers={"target": RIGHT}, solution=RIGHT)
        assert "conversations lost" not in said

    def test_luffy_wrong_target_is_no_solution_either(self, convert_rows):
        row = verl_row(target=[{"role": "assistant", "content": WRONG}])
        assert "1 whose final answer is not the gold one" in self.check(convert_rows, row)

    def test_both_targets(self, convert_rows):
        row = verl_row(target=RIGHT, target_lst=[target("r1", SHORT)], solution="Halve it.")
        self.check(convert_rows, row, teachers={"target": RIGHT, "r1": SHORT},
                   solution="Halve it.")

    def test_a_system_message_is_kept(self, convert_rows):
        row = verl_row(prompt=messages(system="Think step by step."))
        said = self.check(convert_rows, row, system="Think step by step.")
        assert "1 with system" in said

    @pytest.mark.parametrize("as_message", [False, True])
    def test_guide(self, convert_rows, as_message):
        text = QUESTION + "\nHint: divide."
        hint = messages(text) if as_message else text
        for row in (verl_row(hint=hint), {**PLAIN, "answer": 72, "hint": hint},
                    {"prompt": QUESTION, "ground_truth": "72", "hint": hint},
                    {"prompt": messages(), "answer": "$72$", "hint": hint}):
            self.check(convert_rows, row, hint=text)

    def test_ghpo(self, convert_rows):
        row = {"problem": QUESTION, "solution": "$72$", "solution_hint": "Halve it: 72."}
        self.check(convert_rows, row, solution="Halve it: 72.")

    def test_gsm8k(self, convert_rows):
        worked = "A day 48/2 = <<48/2=24>>24.\nIn all 1,176+24 = <<1176+24=1200>>1,200.\n#### 1,200"
        text = "A day 48/2 = 24.\nIn all 1,176+24 = 1,200.\n\\boxed{1,200}"
        self.check(convert_rows, {"question": QUESTION, "answer": worked},
                   answer="1,200", teachers={"gsm8k": text}, solution=text)
        assert ampo.verify("\\boxed{1200}", "1,200")

    def test_gsm8k_without_working(self, convert_rows):
        self.check(convert_rows, {"question": QUESTION, "answer": "#### 72"})

    def test_solutions_of_four_models(self, convert_rows):
        first = "Half of 144 is 144/2 = <<144/2=72>>72\nA: 72"
        row = {
            "question": QUESTION,
            "ground_truth": "144 / 2 = <<144/2=72>>72.\nA: 72",
            "6b_finetuning": solved(first),
            "6b_verification": solved("It is 71\nA: 71", right=False),
            "175b_finetuning": solved("Lucky\nA: 72", right=False),
            "175b_verification": solved("It is 72\nA: 72"),
        }
        other = {**row, "6b_finetuning": solved("A: 3", right=False),
                 "175b_verification": solved("No end")}
        problems, said = convert_rows([row, other])
        solution = "144 / 2 = 72.\n\\boxed{72}"
        traces = {"6b_finetuning": "Half of 144 is 144/2 = 72\n\\boxed{72}",
                  "175b_verification": "It is 72\n\\boxed{72}"}
        assert problems == [{**PLAIN, "teachers": traces, "solution": solution},
                            {**PLAIN, "solution": solution}]
        assert "  50 % (1) have a trace by 6b_finetuning\n" in said
        assert "  50 % (1) have a trace by any of them\n" in said
        assert "5 marked wrong by the set" in said
        assert "1 without a final answer (first:" in said

    @pytest.mark.parametrize("solution", ["", "Halve it.", "Halve it: $\\boxed{72}$."])
    def test_deepscaler(self, convert_rows, solution):
        fields = {"solution": solution} if solution else {}
        if "boxed" in solution:
            fields["teachers"] = {"solution": solution}
        row = {"problem": QUESTION, "answer": "72", "solution": solution}
        self.check(convert_rows, row, **fields)

    def test_numinamath_with_a_wrong_answer_in_its_solution(self, convert_rows):
        row = {"problem": QUESTION, "answer": "72", "solution": WRONG}
        assert "1 whose final answer is not the gold one" in self.check(convert_rows, row)

    @pytest.mark.parametrize("solution", [
        "Halve it: $\\boxed{72}$.", "So $72 = \\boxed{72}$, that is \\boxed{72}."])
    def test_math(self, convert_rows, solution):
        row = {"problem": QUESTION, "level": "Level 1", "type": "Algebra", "solution": solution}
        self.check(convert_rows, row, solution=solution, teachers={"solution": solution})

    def test_openr1(self, convert_rows):
        row = openr1_row([WRONG, RIGHT, SHORT, RIGHT], [False, True, True, True],
                         complete=[True, True, False, True])
        said = self.check(convert_rows, row, teachers={"r1-2": RIGHT, "r1-4": RIGHT},
                          solution="Halve it.")
        assert "1 marked wrong by the set" in said
        assert "1 marked as cut off by the set" in said

    def test_openr1_one_of_its_verdicts_is_enough(self, convert_rows):
        row = openr1_row([RIGHT, SHORT], [False, False], llama=[True, False])
        self.check(convert_rows, row, teachers={"r1-1": RIGHT}, solution="Halve it.")
        row = openr1_row([RIGHT], None)
        self.check(convert_rows, row, teachers={"r1-1": RIGHT}, solution="Halve it.")

    def test_dapo(self, convert_rows):
        question = ("Solve it. The last line should be of the form Answer: $Answer.\n\n" + QUESTION)
        said = self.check(convert_rows, verl_row(prompt=messages(question)), question=question)
        assert "1 rows ask for 'Answer: ...', which the verifier does not read (first: " in said

    def test_dapo_processed_has_no_solution(self, convert_rows):
        row = verl_row(prompt=QUESTION, solution="72", source_prompt=messages())
        self.check(convert_rows, row)

    def test_an_answer_alone_is_no_solution(self, convert_rows):
        self.check(convert_rows, verl_row(solution="$72$"))

    def test_deepmath(self, convert_rows):
        row = {"question": QUESTION, "final_answer": "72", "difficulty": 1.0,
               "r1_solution_1": RIGHT, "r1_solution_2": WRONG, "r1_solution_3": SHORT}
        self.check(convert_rows, row, teachers={"r1-1": RIGHT, "r1-3": SHORT})

    @pytest.mark.parametrize("field, role, text, names", [
        ("conversations", "from", "value", ("human", "gpt")),
        ("conversations", "from", "value", ("user", "assistant")),
        ("messages", "role", "content", ("user", "assistant"))])
    def test_conversations(self, convert_rows, field, role, text, names):
        thoughts = "<think>Is it \\boxed{70}? No.</think>\nIt is \\boxed{72}."
        turns = [{role: names[0], text: QUESTION}, {role: names[1], text: thoughts}]
        self.check(convert_rows, {"system": "Be brief.", field: turns}, system="Be brief.",
                   teachers={"reply": thoughts})

    def test_the_question_ends_the_conversation(self, convert_rows):
        example = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        said = self.check(convert_rows, verl_row(prompt=example + messages()))
        assert "1 conversations lost what came before the last question (first: " in said

    def test_our_own(self, convert_rows):
        row = {**PLAIN, "teachers": {"b": RIGHT, "a": SHORT}, "hint": "h", "solution": "s",
               "system": "y"}
        problems, _ = convert_rows([{**row, "level": 3}])
        assert problems == [row]

    def test_forms_may_be_mixed_and_files_joined(self, tmp_path, capsys):
        first = write_lines(tmp_path / "a.jsonl", [verl_row(target=RIGHT),
                                                   {"question": "?", "answer": "x\n#### 3"}])
        second = write_lines(tmp_path / "b.jsonl", ["", verl_row(hint="h")])
        out = tmp_path / "out"
        assert convert.main([str(first), str(second), "--out", str(out)]) == 0
        found = [(p.answer, list(p.teachers), p.hint) for p in ampo.load_problems(out)]
        assert found == [("72", ["target"], ""), ("3", ["gsm8k"], ""), ("72", [], "h")]
        said = capsys.readouterr().out
        assert "taken 3 of 3 rows: 2 with teachers, 1 with hint, 2 with solution" in said


class TestGoldAnswer:
    @pytest.mark.parametrize("value, gold", [
        ("$72$", "72"), ("$$ 72 $$", "72"), (SHORT, "72"), ("$\\boxed{72}$", "72"),
        ("\\boxed{$72$}", "72"), (["72"], "72"), (72, "72"), (0.5, "0.5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), (" (1,2) ", "(1,2)"), ("x\n#### 5", "5"),
        ("#### $5$", "5"), ("#### \\boxed{5}", "5"), ("x\nA: 5 ", "5"),
        ("$1$ and $2$", "$1$ and $2$"), ("\\boxed{1}, \\boxed{2}", "\\boxed{1}, \\boxed{2}"),
        (["1", "2"], ""), ([], ""), (None, ""), (True, ""), ({}, ""), ("proof", ""), (" ", "")])
    def test_it_is_unwrapped(self, value, gold):
        assert convert.gold_answer(value) == gold

    @pytest.mark.parametrize("text", ["Is it $\\boxed{1}$ or\n$\\boxed{2}$?", "So \\boxed{1"])
    def test_a_solution_that_does_not_tell(self, text):
        with pytest.raises(ampo.InputError, match="several boxes"):
            convert.gold_answer(text)


    def test_prose_is_none(self):
        with pytest.raises(ampo.InputError, match="prose"):
            convert.gold_answer("Since two is even there are no such odd primes at all.")
        matrix = "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix} \\text{ or two on each side}"
        assert convert.gold_answer(matrix) == matrix


class TestReadable:
    @pytest.mark.parametrize("text", [
        "### A heading\nIt is \\boxed{5}", "#### The end: \\boxed{5}", "1 << 3 is 8, 16 >> 1 too"])
    def test_other_texts_stay_as_they_are(self, text):
        assert convert.readable(text) == text


# ---------------------------------------------------------------------------------------------------
# convert.py: flags


class TestOwnFields:
    ROW = {"q": QUESTION, "gold": {"final": "72"},
           "by": {"big": [RIGHT, WRONG, SHORT], "old": SHORT}, "how": "Halve it.",
           "help": "A hint", "role": "Be brief.", "a b": {"x.y": SHORT}}
    FLAGS = ["--question", "q", "--answer", "gold.final", "--teacher", "big=by.big",
             "--teacher", "old=by.old", "--solution", "how", "--hint", "help", "--system", "role"]

    def test_fields_are_named_by_flags(self, convert_rows):
        problems, _ = convert_rows([self.ROW], *self.FLAGS)
        teachers = {"big-1": RIGHT, "big-3": SHORT, "old": SHORT}
        assert problems == [{**PLAIN, "teachers": teachers, "hint": "A hint",
                             "solution": "Halve it.", "system": "Be brief."}]

    def test_names_with_spaces_and_dots_and_places_in_lists(self, convert_rows):
        problems, _ = convert_rows([self.ROW], "--question", "q", "--answer", "gold.final",
                                   "--teacher", "one=by.big.0", "--solution", "a b")
        assert problems == [{**PLAIN, "teachers": {"one": RIGHT}}]
        assert convert.at(self.ROW["a b"], "x.y") == SHORT
        assert convert.at(self.ROW, "by.big.3") is None

    def test_flags_take_the_place_of_known_forms(self, convert_rows):
        row = {"question": "another", "answer": "1", **self.ROW}
        problems, _ = convert_rows([row], "--question", "q", "--answer", "gold.final")
        assert problems == [PLAIN]

    def test_an_unknown_form_ends_with_its_fields_and_the_flags(self, tmp_path, capsys):
        source = write_lines(tmp_path / "in.jsonl", [self.ROW])
        line = refused(capsys, convert.main, source, "--out", tmp_path / "out")
        assert "in.jsonl:1: no known form; its fields: q, gold, by, how" in line
        assert "--question FIELD --answer FIELD" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("flags", [["--question", "q"], ["--teacher", "a=b"],
                                       ["--question", "q", "--answer", "a", "--teacher", "b"]])
    def test_flags_that_miss_a_part(self, tmp_path, capsys, flags):
        source = write_lines(tmp_path / "in.jsonl", [self.ROW])
        line = refused(capsys, convert.main, source, "--out", tmp_path / "out", *flags)
        assert "--question" in line or "--teacher" in line

    def test_a_json_array(self, tmp_path, capsys):
        source = tmp_path / "in.json"
        source.write_text(json.dumps([PLAIN, {"answer": "1"}, "x", PLAIN], indent=1))
        out = tmp_path / "out"
        assert convert.main([str(source), "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert lines_of(out) == [PLAIN, PLAIN]
        assert f"1 fields of no known form (first: {source}: item 2)" in said
        assert f"1 not a JSON object (first: {source}: item 3)" in said


class TestInstruction:
    TEXT = "Put the answer into \\boxed{}."

    def test_it_is_added_where_no_box_is_asked_for(self, convert_rows):
        asking = verl_row(prompt=messages(system="Answer in <answer> tags."))
        boxed = verl_row(prompt=QUESTION + " \\boxed{}")
        rows = [verl_row(hint="Divide " + QUESTION), boxed, asking]
        problems, said = convert_rows(rows, "--instruction", self.TEXT)
        assert problems[0] == {**PLAIN, "question": QUESTION + "\n" + self.TEXT,
                               "hint": "Divide " + QUESTION + "\n" + self.TEXT}
        assert problems[1]["question"] == QUESTION + " \\boxed{}"
        assert problems[2]["question"] == QUESTION
        assert "do not ask for" not in said

    def test_rows_without_one_are_told_of(self, convert_rows):
        _, said = convert_rows([verl_row(prompt=QUESTION + " \\boxed{}"), verl_row(), verl_row()])
        assert "2 rows do not ask for \\boxed{}: see --instruction (first: " in said
        assert "in.jsonl:2)" in said

    def test_another_answer_form_is_told_of(self, convert_rows):
        rows = [verl_row(prompt=messages(system="End with #### and the answer."))]
        _, said = convert_rows(rows, "--instruction", self.TEXT)
        assert "1 rows ask for '#### ...', which the verifier does not read" in said


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A folder with the base model whose chat template opens <think> itself."""
    folder = tmp_path_factory.mktemp("thinker")
    for path in Path(BASE).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = folder / "chat_template.jinja"
    opening = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    template.write_text(template.read_text() + opening)
    return str(folder)


class TestModel:
    def test_the_template_opens_the_thoughts(self, convert_rows, thinker):
        other = "<think>\n\n144/2</think> \\boxed{72}"
        row = {**PLAIN, "teachers": {"a": RIGHT, "b": other, "c": SHORT}}
        problems, said = convert_rows([row], "--model", thinker)
        assert problems[0]["teachers"] == {"a": RIGHT.removeprefix("<think>\n"),
                                           "b": "\n144/2</think> \\boxed{72}", "c": SHORT}
        assert "2 traces lost the <think> that the chat template writes itself" in said

    def test_the_template_does_not(self, convert_rows):
        row = {**PLAIN, "teachers": {"a": RIGHT}}
        assert convert_rows([row], "--model", BASE)[0] == [row]

    def test_longer_prompts_are_dropped(self, tmp_path, capsys):
        tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
        rows = [PLAIN, {**PLAIN, "system": "Be brief."}]
        limit = len(ampo.encode_prompt(tokenizer, QUESTION))
        source = write_lines(tmp_path / "in.jsonl", rows)
        flags = ["--model", BASE, "--max_prompt_tokens"]
        assert convert.main([str(source), "--out", str(tmp_path / "a"), *flags, str(limit)]) == 0
        said = capsys.readouterr().out
        assert lines_of(tmp_path / "a") == rows[:1]
        assert "1 a prompt longer than --max_prompt_tokens (first: " in said
        assert "in.jsonl:2)" in said
        line = refused(capsys, convert.main, source, "--out", tmp_path / "b", *flags, limit - 1)
        assert "no row could be taken" in line

    def test_a_template_without_system_messages(self, convert_rows, thinker):
        template = Path(thinker) / "chat_template.jinja"
        before = template.read_text()
        has_system = "{% if messages[0].role == 'system' %}"
        refuse = "{{ raise_exception('no system') }}{% endif %}"
        template.write_text(has_system + refuse + before)
        try:
            problems, said = convert_rows([PLAIN, {**PLAIN, "system": "x"}], "--model", thinker)
        finally:
            template.write_text(before)
        assert problems == [PLAIN]
        assert "1 messages that the chat template refuses (no system)" in said

    def test_control_tokens(self, convert_rows):
        rows = [PLAIN, {**PLAIN, "question": "<|end|>?"},
                {**PLAIN, "teachers": {"a": "<|end|>" + SHORT, "b": SHORT}, "solution": "<|pad|>"}]
        problems, said = convert_rows(rows, "--model", BASE)
        assert problems == [PLAIN, {**PLAIN, "teachers": {"b": SHORT}}]
        assert "1 a question with <|end|>, which --model reads as a control token" in said
        assert "1 solution with <|pad|>" in said
        assert len(convert_rows(rows)[0]) == 3

    @pytest.mark.parametrize("flags", [["--max_prompt_tokens", "9"], ["--model", "/none"]])
    def test_refused(self, tmp_path, capsys, flags):
        source = write_lines(tmp_path / "in.jsonl", [PLAIN])
        assert "--model" in refused(capsys, convert.main, source, "--out", tmp_path / "o", *flags)


# ---------------------------------------------------------------------------------------------------
# convert.py: what is dropped and refused


class TestDropping:
    def test_each_reason_is_counted_and_its_first_line_named(self, convert_rows):
        rows = [
            PLAIN, "{broken", "[" * 100_000, "3", '["a list"]', {"only": 1},
            verl_row(prompt=None), verl_row(prompt=[{"role": "system", "content": "x"}]),
            verl_row(prompt=messages("  ")), verl_row(reward_model=None),
            {"question": QUESTION, "answer": " \n#### "}, {"problem": QUESTION, "answer": "proof"},
            verl_row(reward_model={"ground_truth": "((("}),
            verl_row(reward_model={"ground_truth": ["1", "2"]}),
            '{"question": "half a character: \\ud800", "answer": "1"}',
            {"problem": QUESTION, "solution": "Either\n\\boxed{1} or \\boxed{2}"},
        ]
        problems, said = convert_rows(rows)
        assert problems == [PLAIN]
        assert "taken 1 of 16 rows" in said
        assert "rows dropped: 15" in said
        for line in ("2 broken JSON (first: {}:2)", "2 not a JSON object (first: {}:4)",
                     "1 fields of no known form (first: {}:6)",
                     "3 no question at prompt (first: {}:7)",
                     "2 no answer at reward_model.ground_truth (first: {}:10)",
                     "2 no answer at answer (first: {}:11)",
                     "1 an answer that the verifier cannot read (first: {}:13)",
                     "1 a question with half a character, which no tokenizer takes (first: {}:15)",
                     "1 a solution with several boxes, or with a broken one (first: {}:16)"):
            assert line.replace("{}", "in.jsonl") in said.replace(self.folder(said), "")

    @staticmethod
    def folder(said):
        """The folder that stands before in.jsonl in what was printed."""
        start = said.index("(first: ") + len("(first: ")
        return said[start:said.index("in.jsonl")]

    def test_a_bare_answer_of_two_lines_is_no_trace(self, convert_rows):
        row = {"question": QUESTION, "answer": "1,\n2"}
        problems, said = convert_rows([row])
        assert problems == [row]
        assert "left out: 0" in said

    @pytest.mark.parametrize("fields", [
        {"prompt": 5}, {"prompt": [5, None]}, {"target_lst": 5}, {"target_lst": [5]},
        {"target_lst": {"content": [RIGHT]}}, {"target": [None]}, {"hint": [3]}, {"answer": {}},
        {"reward_model": "72"}, {"solution": [1]}, {"target": {"solution": 3}},
        {"target_lst": [{"content": 5, "source": {}, "quality_score": "high"}]}])
    def test_no_row_is_a_crash(self, convert_rows, fields):
        problems, _ = convert_rows([verl_row(), verl_row(**fields)])
        assert problems[0] == PLAIN
        assert all("teachers" not in problem for problem in problems)

    @pytest.mark.parametrize("bad", [None, "9", math.nan])
    def test_a_quality_that_is_no_number_counts_least(self, convert_rows, bad):
        row = verl_row(target_lst=[target("r", SHORT, bad), target("r", RIGHT, -5)])
        assert convert_rows([row])[0][0]["teachers"] == {"r": RIGHT}

    def test_a_copied_question_is_no_answer(self, monkeypatch):
        """The verifier is asked with the question, so that it can refuse a copy of it."""
        asked = []
        monkeypatch.setattr(ampo, "verify", lambda *args: asked.append(args) or True)
        gold = convert.Gold(QUESTION, "72")
        assert convert.fault(convert.Trace("a", SHORT), gold) == ""
        assert asked == [(SHORT, "72", QUESTION)]


class TestConvertRefuses:
    def test_an_out_file_that_exists(self, tmp_path, capsys):
        source = write_lines(tmp_path / "in.jsonl", [PLAIN])
        out = write_lines(tmp_path / "out", ["precious"])
        assert "exists already" in refused(capsys, convert.main, source, "--out", out)
        assert "exists already" in refused(capsys, convert.main, source, "--out", source)
        assert out.read_text() == "precious\n"
        assert lines_of(source) == [PLAIN]

    @pytest.mark.parametrize("missing", ["none.jsonl", "none.parquet"])
    def test_a_missing_input_before_it_reads_the_others(self, tmp_path, capsys, missing):
        source = write_lines(tmp_path / "in.jsonl", [PLAIN])
        out = tmp_path / "out"
        line = refused(capsys, convert.main, source, tmp_path / missing, "--out", out)
        assert missing in line
        assert "No such file" in line
        assert not out.exists()

    def test_nothing_taken(self, tmp_path, capsys):
        source = write_lines(tmp_path / "in.jsonl", [{**PLAIN, "answer": ""}])
        out = tmp_path / "out"
        line = refused(capsys, convert.main, source, "--out", out)
        assert "in.jsonl: no row could be taken" in line
        assert not out.exists()

    def test_bad_flags(self, capsys):
        assert "--out" in refused(capsys, convert.main, "x.jsonl")

    def test_ctrl_c_leaves_nothing_behind(self, tmp_path, capsys, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt
        monkeypatch.setattr(convert, "convert", interrupt)
        source = write_lines(tmp_path / "in.jsonl", [PLAIN])
        out = tmp_path / "out"
        assert convert.main([str(source), "--out", str(out)]) == 130
        assert "nothing was written" in capsys.readouterr().err
        assert not out.exists()


class TestParquet:
    @pytest.fixture
    def write(self, tmp_path):
        """write(rows): a parquet file."""
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        def run(rows):
            path = tmp_path / "in.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            return path
        return run

    def test_rows_are_those_of_jsonl(self, tmp_path, write):
        rows = []
        for i in range(600):
            rows.append(verl_row(prompt=messages(f"{i}?"), probs=[0.5] * 9, hint="h",
                                 target_lst=[target("r1", RIGHT)] * (i % 3) or None))
        paths = [write(rows), write_lines(tmp_path / "in.jsonl", rows)]
        for path in paths:
            out = tmp_path / f"out{path.suffix}"
            assert convert.main([str(path), "--out", str(out)]) == 0
        assert (tmp_path / "out.parquet").read_text() == (tmp_path / "out.jsonl").read_text()
        assert len(ampo.load_problems(tmp_path / "out.parquet")) == 600

    def test_columns_that_no_form_reads_stay_on_the_disk(self):
        names = ["prompt", "probs", "reward_model", "target_lst"]
        wanted = convert.columns_to_read(names, convert.FORMS)
        assert wanted == ["prompt", "reward_model", "target_lst"]

    def test_flags_and_the_row_number(self, tmp_path, capsys, write):
        path = write([{"q": {"text": "1?"}, "a": 1}, {"q": {"text": ""}, "a": 1}])
        out = tmp_path / "out"
        flags = ["--question", "q.text", "--answer", "a"]
        assert convert.main([str(path), "--out", str(out), *flags]) == 0
        assert lines_of(out) == [{"question": "1?", "answer": "1"}]
        assert "1 no question at q.text (first: " in capsys.readouterr().out
        line = refused(capsys, convert.main, path, "--out", tmp_path / "other")
        assert "in.parquet: row 1: no known form; its fields: q, a" in line

    def test_a_broken_file(self, tmp_path, capsys):
        pytest.importorskip("pyarrow")
        path = write_lines(tmp_path / "in.parquet", ["no parquet"])
        assert "in.parquet: " in refused(capsys, convert.main, path, "--out", tmp_path / "out")

    def test_without_pyarrow_it_says_what_to_install(self, tmp_path, capsys, monkeypatch):
        for name in ("pyarrow", "pyarrow.parquet"):
            monkeypatch.setitem(sys.modules, name, None)
        path = write_lines(tmp_path / "in.parquet", ["PAR1"])
        line = refused(capsys, convert.main, path, "--out", tmp_path / "out")
        assert "in.parquet: " in line
        assert "pip install pyarrow" in line
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------
# teach.py


@pytest.fixture(scope="module")
def easy():
    """Ten problems that the base model often solves, half of them with fields of other methods."""
    rows = []
    for row in lines_of(HERE / "train.jsonl"):
        if row["level"] == 2 and len(rows) < 10:
            if len(rows) % 2 == 0:
                row = {key: row[key] for key in ("question", "answer", "level")}
            rows.append(row)
    return rows


@pytest.fixture(scope="module")
def taught(easy, tmp_path_factory):
    """What teach.py makes of the easy problems in one go: (input, output)."""
    folder = tmp_path_factory.mktemp("teach")
    data = write_lines(folder / "in.jsonl", easy)
    assert run_teach(data, folder / "out.jsonl") == 0
    return data, folder / "out.jsonl"


def run_teach(data, out, *flags, name="base", model=BASE):
    return teach.main(["--model", model, "--name", name, "--data", str(data), "--out", str(out),
                       "--samples", "3", "--batch", "4", "--max_new_tokens", "32", *flags])


def says(text, eos=True):
    """A response with this text, in the sampler's form."""
    tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = ids + [tokenizer.eos_token_id] if eos else ids
    return ids, [0.0] * len(ids)


@pytest.fixture
def scripted(monkeypatch):
    """scripted(groups): the sampler returns these, and notes what it was called with."""
    def use(groups):
        left = list(groups)
        calls = []

        def generate(model, prompts, n, max_new_tokens, temperature=1.0, eos_token_id=None):
            calls.append((prompts, n, max_new_tokens, temperature))
            return [left.pop(0) for _ in prompts]
        monkeypatch.setattr(ampo, "generate", generate)
        return calls
    return use


class TestTeach:
    def test_it_adds_verified_traces_and_nothing_else(self, taught, easy, capsys):
        data, out = taught
        assert lines_of(data) == easy
        rows = lines_of(out)
        assert len(rows) == len(easy)
        solved_rows = 0
        for row, before in zip(rows, easy):
            trace = row.get("teachers", {}).get("base")
            if trace is None:
                assert row == before
                continue
            solved_rows += 1
            teachers = {**before.get("teachers", {}), "base": trace}
            assert row == {**before, "teachers": teachers}
            assert ampo.verify(trace, row["answer"])
            assert "<|" not in trace
        assert solved_rows >= 3
        assert len(ampo.load_problems(out)) == len(easy)
        capsys.readouterr()
        assert run_teach(data, out) == 0  # again: everything is done
        said = capsys.readouterr().out
        share = solved_rows / len(easy)
        assert f"all {len(easy)} problems were done already" in said
        assert f"base solved {solved_rows} of {len(easy)} problems (yield {share:.1%})" in said

    def test_the_bar_shows_the_yield(self, easy, tmp_path, scripted, capsys):
        right = [says(f"\\boxed{{{easy[0]['answer']}}}")]
        scripted([right, [says("no")], [says("no")], [says("no")]])
        data = write_lines(tmp_path / "in.jsonl", [easy[0]] * 4)
        assert run_teach(data, tmp_path / "out.jsonl") == 0
        bar = capsys.readouterr().err
        assert "yield 25%" in bar
        assert "4/4" in bar

    @pytest.mark.parametrize("kept, torn", [
        (0, ""), (0, '{"quest'), (4, ""), (5, '{"question": "'), (9, "all but 9"),
        (6, "all but 1")])
    def test_a_stopped_run_ends_with_the_same_bytes(self, taught, tmp_path, kept, torn):
        data, whole = taught
        lines = whole.read_text().splitlines(keepends=True)
        if torn.startswith("all but"):
            torn = lines[kept][:-int(torn.split()[-1])]
        out = tmp_path / "out.jsonl"
        out.write_text("".join(lines[:kept]) + torn)
        assert run_teach(data, out) == 0
        assert out.read_bytes() == whole.read_bytes()

    def test_ctrl_c(self, taught, tmp_path, capsys, monkeypatch):
        data, whole = taught
        out = tmp_path / "out.jsonl"
        generate = ampo.generate
        calls = []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 1:
                return generate(*args)
            assert len(lines_of(out)) == 4  # on the disk: not even a kill would lose them
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(ampo, "generate", interrupted)
            assert run_teach(data, out) == 130
        assert "same command goes on" in capsys.readouterr().err.splitlines()[-1]
        assert out.read_text().splitlines() == whole.read_text().splitlines()[:4]
        assert run_teach(data, out) == 0
        assert out.read_bytes() == whole.read_bytes()

    def test_the_seed_matters_and_batches_differ(self, easy, tmp_path, monkeypatch):
        generate = ampo.generate
        drawn = []

        def recorded(*args):
            groups = generate(*args)
            drawn.append([ids for ids, _ in groups[0]])
            return groups
        monkeypatch.setattr(ampo, "generate", recorded)
        data = write_lines(tmp_path / "same.jsonl", [easy[0]] * 2)
        for seed in ("1", "2"):
            flags = ["--seed", seed, "--batch", "1", "--temperature", "2"]
            assert run_teach(data, tmp_path / seed, *flags) == 0
        assert len(drawn) == 4
        assert all(drawn.count(group) == 1 for group in drawn)

    def test_a_second_teacher_makes_a_pool_of_two(self, taught, tmp_path):
        out = tmp_path / "two.jsonl"
        assert run_teach(taught[1], out, "--seed", "1", name="other") == 0
        both = 0
        for now, before in zip(lines_of(out), lines_of(taught[1])):
            teachers = dict(now.get("teachers", {}))
            both += {"base", "other"} <= set(teachers)
            teachers.pop("other", None)
            assert teachers == before.get("teachers", {})
        assert both > 0

    def test_the_shortest_whole_correct_one_is_kept(self, easy, tmp_path, scripted, capsys):
        answer = easy[0]["answer"]
        trace = f"Hm \\boxed{{{answer}}}"
        cut = says(f"\\boxed{{{answer}}}", eos=False)
        calls = scripted([[says("Hm, " + trace), cut, says(trace), says("no")], [says("no")]])
        data = write_lines(tmp_path / "in.jsonl", easy[:2])
        out = tmp_path / "out.jsonl"
        assert run_teach(data, out, "--temperature", "0.5", "--system", "Be brief.") == 0
        assert lines_of(out) == [{**easy[0], "teachers": {"base": trace}}, easy[1]]
        tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
        prompts = [ampo.encode_prompt(tokenizer, row["question"], "Be brief.") for row in easy[:2]]
        assert calls == [(prompts, 3, 32, 0.5)]
        size = len(says(trace)[0]) - 1
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == ("base solved 1 of 2 problems (yield 50.0%), "
                        f"mean length of kept traces {size}.0 tokens")

    def test_a_system_message_of_the_row_comes_first(self, easy, tmp_path, scripted):
        calls = scripted([[says("no")], [says("no")]])
        rows = [{**easy[0], "system": "Mine."}, easy[0]]
        data = write_lines(tmp_path / "in.jsonl", rows)
        assert run_teach(data, tmp_path / "out", "--system", "Yours.") == 0
        tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
        assert calls[0][0] == [ampo.encode_prompt(tokenizer, easy[0]["question"], "Mine."),
                               ampo.encode_prompt(tokenizer, easy[0]["question"], "Yours.")]

    def test_a_thought_that_the_template_opens_is_whole(self, easy, tmp_path, scripted, thinker):
        text = f"Hm</think>\\boxed{{{easy[0]['answer']}}}"
        scripted([[says(text)], [says("<think>" + text)]])
        data = write_lines(tmp_path / "in.jsonl", [easy[0]] * 2)
        assert run_teach(data, tmp_path / "out", model=thinker) == 0
        traces = [row["teachers"]["base"] for row in lines_of(tmp_path / "out")]
        assert traces == ["<think>\n" + text, "<think>" + text]

    def test_as_many_prompts_at_a_time_as_the_cache_holds(self, easy, tmp_path, scripted):
        calls = scripted([[says("no")]] * 8)
        data = write_lines(tmp_path / "in.jsonl", [easy[0]] * 8)
        tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
        longest = len(ampo.encode_prompt(tokenizer, easy[0]["question"])) + 32
        tokens = str(2 * 3 * longest)  # two prompts of three responses
        assert run_teach(data, tmp_path / "out", "--cache_tokens", tokens) == 0
        assert [len(prompts) for prompts, *_ in calls] == [2, 2, 2, 2]

    def test_too_long_a_question_is_written_as_it_is(self, easy, tmp_path, scripted, capsys):
        right = says(f"\\boxed{{{easy[0]['answer']}}}")
        scripted([[right], [right], [says("no")]])
        config = json.loads((Path(BASE) / "config.json").read_text())
        tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
        others = len(ampo.encode_prompt(tokenizer, "")) + 32  # tokens besides the question's
        fits = {"question": "1" * (config["max_position_embeddings"] - others), "answer": "1"}
        long = {"question": fits["question"] + "1", "answer": "1"}
        data = write_lines(tmp_path / "in.jsonl", [easy[0], long, easy[0], fits])
        assert run_teach(data, tmp_path / "out") == 0
        rows = lines_of(tmp_path / "out")
        assert rows[1] == long
        assert ["teachers" in row for row in rows] == [True, False, True, False]
        said = capsys.readouterr().out
        assert "1 of 4 questions leave no room for a response" in said
        assert "in.jsonl:2)" in said

    def test_half_of_the_context_is_left_to_the_prompt(self, easy, tmp_path, scripted):
        calls = scripted([[says("no")]])
        data = write_lines(tmp_path / "in.jsonl", easy[:1])
        assert run_teach(data, tmp_path / "out", "--max_new_tokens", "100000") == 0
        context = json.loads((Path(BASE) / "config.json").read_text())["max_position_embeddings"]
        assert calls[0][2] == context // 2


class TestTeachRefuses:
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        """All of these are found out before a model is loaded."""
        monkeypatch.setattr(teach, "load_teacher", lambda *_: pytest.fail("a model was loaded"))

    def refusal(self, capsys, data, out, *flags, name="base"):
        return refused(capsys, teach.main, "--model", BASE, "--name", name, "--data", data,
                       "--out", out, *flags)

    def test_its_input_as_its_output(self, easy, tmp_path, capsys, monkeypatch):
        data = write_lines(tmp_path / "in.jsonl", easy)
        (tmp_path / "soft").symlink_to(data)
        (tmp_path / "hard").hardlink_to(data)
        monkeypatch.chdir(tmp_path)
        for out in (data, "in.jsonl", f"../{tmp_path.name}/in.jsonl", "soft", "hard"):
            assert "is --data itself" in self.refusal(capsys, data, out)
        assert lines_of(data) == easy

    def test_a_teacher_that_is_there_already(self, easy, tmp_path, capsys):
        data = write_lines(tmp_path / "in.jsonl", easy)
        name = next(iter(easy[1]["teachers"]))
        line = self.refusal(capsys, data, tmp_path / "out", name=name)
        assert f"{data}:2: field 'teachers': has a trace by '{name}' already" in line

    @pytest.mark.parametrize("change", [
        "question", "name", "longer", "field", "json", "newline", "torn", "list"])
    def test_an_output_that_is_no_continuation(self, taught, tmp_path, capsys, change):
        data, whole = taught
        lines = whole.read_text().splitlines(keepends=True)
        content = {
            "question": lines[1] + lines[0],
            "longer": "".join(lines + lines[:1]),
            "json": "my notes\n",
            "field": lines[0].replace('"level": 2', '"level": 3'),
            "newline": "my notes",
            "list": "[1]\n",
            "torn": "".join(lines) + '{"question',
            "name": "".join(lines),
        }[change]
        out = tmp_path / "out.jsonl"
        out.write_text(content)
        name = "other" if change == "name" else "base"
        line = self.refusal(capsys, data, out, name=name)
        assert "is not a continuation of" in line
        assert str(out) in line
        assert out.read_text() == content

    def test_bad_flags_and_files(self, easy, tmp_path, capsys):
        data = write_lines(tmp_path / "in.jsonl", easy)
        out = tmp_path / "out"
        for flag, value in [("--samples", 0), ("--batch", 0), ("--max_new_tokens", 0),
                            ("--cache_tokens", 0), ("--temperature", -1.0)]:
            line = self.refusal(capsys, data, out, flag, value)
            assert f"{flag} {value}: must be at least" in line
        for name in ("", " "):
            assert "--name" in self.refusal(capsys, data, out, name=name)
        assert "none.jsonl" in self.refusal(capsys, tmp_path / "none.jsonl", out)
        line = self.refusal(capsys, data, tmp_path / "none" / "out")
        assert "folder does not exist" in line
        write_lines(data, [*easy, "{"])
        assert "in.jsonl:11: not a JSON object" in self.refusal(capsys, data, out)
        assert not out.exists()


def test_teach_refuses_a_model_that_is_none(easy, tmp_path, capsys):
    data = write_lines(tmp_path / "in.jsonl", easy)
    out = tmp_path / "out"
    line = refused(capsys, teach.main, "--model", tmp_path / "none", "--name", "n",
                   "--data", data, "--out", out)
    assert str(tmp_path / "none") in line
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------
# to_verl.py


FULL = {**PLAIN, "teachers": {"b": RIGHT, "a": SHORT}, "hint": "h", "solution": "Halve it.",
        "system": "Be brief."}


@pytest.fixture
def exported(tmp_path, capsys):
    """exported(rows, *flags): the folder that to_verl.py writes, and the command's settings."""
    pytest.importorskip("pyarrow")

    def run(rows, *flags, folder="verl"):
        data = write_lines(tmp_path / "train.jsonl", rows)
        capsys.readouterr()
        argv = ["--to", str(tmp_path / folder), "--data", str(data), *flags]
        assert to_verl.main(argv) == 0
        said = capsys.readouterr().out
        return tmp_path / folder, said
    return run


def words_of(said):
    """The words of the command in what was printed."""
    command = said[said.index("python -m"):].split("\n#")[0]
    return shlex.split(command.replace("\\\n", " "))


def settings_of(said):
    """The command's settings: key -> value."""
    pairs = [word.lstrip("+").split("=", 1) for word in words_of(said)[3:]]
    assert len(dict(pairs)) == len(pairs)  # none is said twice
    return dict(pairs)


class TestTable:
    def test_its_names_are_flags_of_ampo(self):
        names = set(ampo.Config.__dataclass_fields__)
        assert set(to_verl.TABLE) <= names
        assert set(to_verl.AMPO_TABLE) <= names
        assert set(to_verl.ELSEWHERE) <= names

    def test_every_average_has_a_name_there(self):
        assert {recipe.average for recipe in ampo.RECIPES.values()} == set(to_verl.AVERAGES)


class TestParquetOfVerl:
    def read_back(self, folder, tmp_path):
        out = tmp_path / "back.jsonl"
        assert convert.main([str(folder / "train.parquet"), "--out", str(out)]) == 0
        return lines_of(out)

    def test_what_is_read_back_is_what_went_in(self, exported, tmp_path):
        rows = [FULL, PLAIN, {**PLAIN, "teachers": {"a": RIGHT}}, {**PLAIN, "hint": "h"}]
        folder, _ = exported(rows)
        assert self.read_back(folder, tmp_path) == rows

    def test_the_miniature_too(self, exported, tmp_path):
        rows = lines_of(HERE / "train.jsonl")[:50]
        folder, _ = exported(rows)
        for row, back in zip(rows, self.read_back(folder, tmp_path)):
            assert back == {name: row[name] for name in back}
            assert list(back["teachers"]) == list(row["teachers"])

    def test_its_fields_are_those_of_verl_and_ampo(self, exported):
        import pyarrow.parquet
        folder, said = exported([FULL, PLAIN], "--system", "Mine.")
        full, plain = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
        assert full["prompt"] == messages(system="Be brief.")
        assert plain["prompt"] == messages(system="Mine.")
        assert full["reward_model"] == {"style": "rule", "ground_truth": "72"}
        assert [item["source"] for item in full["target_lst"]] == ["b", "a"]
        assert [item["content"] for item in full["target_lst"]] == [RIGHT, SHORT]
        qualities = [item["quality_score"] for item in full["target_lst"]]
        assert qualities[1] > qualities[0]  # the shorter one
        assert plain["target_lst"] is None
        assert plain["extra_info"] == {"index": 1, "split": "train", "question": QUESTION,
                                       "num_teacher_models": 0}
        assert "1 problems have no trace (first: " in said
        assert "train.jsonl:2)" in said

    def test_problems_without_a_trace_may_be_left_out(self, exported, tmp_path):
        folder, said = exported([PLAIN, FULL], "--only_taught")
        assert self.read_back(folder, tmp_path) == [FULL]
        assert "1 problems have no trace (first: " in said

    def test_the_validation_set_comes_along(self, exported, tmp_path):
        write_lines(tmp_path / "valid.jsonl", [PLAIN])
        folder, said = exported([FULL], "--eval_every", "7")
        settings = settings_of(said)
        assert settings["data.val_files"] == str(folder / "valid.parquet")
        assert settings["trainer.test_freq"] == "7"
        assert (folder / "valid.parquet").exists()

    def test_nothing_is_written_over(self, exported, tmp_path, capsys):
        folder, _ = exported([FULL])
        before = (folder / "train.parquet").read_bytes()
        line = refused(capsys, to_verl.main, "--to", folder, "--data", tmp_path / "train.jsonl")
        assert "train.parquet exists already" in line
        assert (folder / "train.parquet").read_bytes() == before


class TestCommand:
    def test_flags_are_translated(self, exported):
        flags = ["--method", "grpo", "--recipe", "ampo", "--follow", "code", "--model", "M",
                 "--prompts_per_step", "96", "--num_minibatches", "3", "--group_size", "5",
                 "--max_new_tokens", "2048", "--lr", "1e-6", "--clip_eps", "0.3", "--out", "runs/x",
                 "--entropy_coef", "0.01", "--steps", "20", "--gpus", "4", "--resume"]
        _, said = exported([FULL, PLAIN], *flags)
        assert words_of(said)[:3] == ["python", "-m", "verl.trainer.main_ppo"]
        settings = settings_of(said)
        actor = "actor_rollout_ref.actor."
        wanted = {
            "actor_rollout_ref.model.path": "M",
            "data.train_batch_size": "96",
            actor + "ppo_mini_batch_size": "32",
            "actor_rollout_ref.rollout.n": "5",
            "data.max_response_length": "2048",
            actor + "optim.lr": "1e-06",
            actor + "clip_ratio_low": "0.3",
            actor + "clip_ratio_high": "0.3",
            actor + "entropy_coeff": "0.01",
            actor + "loss_agg_mode": "seq-mean-token-sum-norm",
            "algorithm.adv_estimator": "grpo",
            "algorithm.norm_adv_by_std_in_grpo": "False",
            "reward.custom_reward_function.reward_kwargs.right_reward": "0.9",
            "reward.custom_reward_function.reward_kwargs.format_reward": "0.1",
            "trainer.total_training_steps": "20",
            "trainer.n_gpus_per_node": "4",
            "trainer.default_local_dir": "runs/x",
            "trainer.resume_mode": "auto",
            "trainer.test_freq": "-1",  # there is no valid.jsonl
        }
        assert {key: settings[key] for key in wanted} == wanted
        # Epochs end a run of verl, too: 20 steps of 96 problems out of 2 must fit into them.
        assert int(settings["trainer.total_epochs"]) * 2 >= 20 * 96
        assert float(settings[actor + "ppo_max_token_len_per_gpu"]) >= 1024 + 2048

    def test_an_endless_clip_and_a_value_head(self, exported):
        _, said = exported([FULL], "--method", "luffy", "--advantage", "gae")
        settings = settings_of(said)
        assert float(settings["actor_rollout_ref.actor.clip_ratio_high"]) >= 1000
        assert settings["algorithm.adv_estimator"] == "gae"
        assert settings["critic.model.path"] == "data/base"
        assert "verl has no --method luffy" in said

    def test_the_official_ampo(self, exported):
        _, said = exported([FULL], "--method", "ampo", "--k", "3")
        assert words_of(said)[2] == "verl.adaptive_mix_src.main_mix_dapo"
        settings = settings_of(said)
        assert settings["data.num_off_policy_targets"] == "3"
        assert settings["data.max_available_targets"] == "2"
        assert "only" not in said[said.index("python -m"):]
        assert not any(key.startswith("reward.") for key in settings)

    def test_what_the_official_ampo_does_not_have(self, exported):
        flags = ["--trigger", "half", "--select", "longest", "--gamma", "0.2"]
        _, said = exported([FULL], "--method", "ampo", *flags)
        assert "--trigger half is not in this version" in said
        assert "--select longest is only the order" in said
        assert "knows 0.1, 0.3 and 0.5 only" in said

    def test_what_is_not_translated_is_said(self, exported):
        _, said = exported([FULL], "--method", "ghpo", "--shaping", "log")
        assert "verl has no --method ghpo" in said
        assert "not translated: --shaping" in said
        assert "only the nearest one" in said

    def test_the_flags_of_a_run(self, exported, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        flags = asdict(ampo.Config(method="grpo", group_size=6, lr=1e-5))
        (run / "run.json").write_text(json.dumps(flags))
        _, said = exported([FULL], "--run", str(run), "--lr", "1e-4")
        settings = settings_of(said)
        assert settings["actor_rollout_ref.rollout.n"] == "6"
        assert settings["actor_rollout_ref.actor.optim.lr"] == "0.0001"

    def test_refused(self, tmp_path, capsys):
        pytest.importorskip("pyarrow")
        data = write_lines(tmp_path / "in.jsonl", [PLAIN])
        go = [to_verl.main, "--data", data, "--to", tmp_path / "verl"]
        assert "--group_size" in refused(capsys, *go, "--group_size", 1)
        assert "--nonsense" in refused(capsys, *go, "--nonsense", 1)
        assert "run.json" in refused(capsys, *go, "--run", tmp_path)
        (tmp_path / "run.json").write_text('{"updates": 2}')
        assert "does not hold the flags" in refused(capsys, *go, "--run", tmp_path)
        assert "no problem has a trace" in refused(capsys, *go, "--only_taught")
        assert "--num_minibatches" in refused(capsys, *go, "--num_minibatches", 5)
        assert not (tmp_path / "verl").exists()


class TestComputeScore:
    @pytest.mark.parametrize("text, score, acc", [
        (RIGHT, 1.0, 1.0), (WRONG, 0.1, 0.0), ("72", 0.0, 0.0)])
    def test_our_verifier_and_the_two_rewards(self, text, score, acc):
        info = {"question": QUESTION, "index": 3}
        result = to_verl.compute_score("ampo.py", text, "72", info, right_reward=0.9,
                                       format_reward=0.1, reward_router_address="unused")
        assert result["score"] == pytest.approx(score)
        assert result["acc"] == acc

    def test_the_question_is_handed_on(self, monkeypatch):
        asked = []
        monkeypatch.setattr(ampo, "verify", lambda *args: asked.append(args) or True)
        to_verl.compute_score("ampo.py", "x", "72", {"question": QUESTION})
        assert asked == [("x", "72", QUESTION)]


class TestWithVerl:
    """verl itself reads what we write. Skipped where it, or something that it takes, is missing."""

    @pytest.fixture(autouse=True)
    def verl(self):
        if importlib.util.find_spec("verl") is None:
            pytest.skip("verl is not installed")

    def test_its_dataset_class_loads_the_file(self, exported):
        rl_dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
        omegaconf = pytest.importorskip("omegaconf")
        folder, _ = exported([FULL, PLAIN, {**PLAIN, "question": "long " * 500}])
        tokenizer = convert.AutoTokenizer.from_pretrained(BASE)
        config = omegaconf.OmegaConf.create({
            "max_prompt_length": 100, "filter_overlong_prompts": True,
            "filter_overlong_prompts_workers": 1, "cache_dir": str(folder / "cache")})
        dataset = rl_dataset.RLHFDataset([str(folder / "train.parquet")], tokenizer, config)
        assert len(dataset) == 2
        item = dataset[0]
        assert item["raw_prompt"] == messages(system="Be brief.")
        assert item["reward_model"]["ground_truth"] == "72"
        assert item["index"] == 0
        batch = rl_dataset.collate_fn([dataset[0], dataset[1]])
        assert list(batch["data_source"]) == ["ampo.py", "ampo.py"]

    def test_it_knows_every_setting(self, exported):
        hydra = pytest.importorskip("hydra")
        omegaconf = pytest.importorskip("omegaconf")
        configs = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
        for i, flags in enumerate([[], ["--advantage", "gae"]]):
            _, said = exported([FULL], "--method", "grpo", *flags, folder=f"verl{i}")
            with hydra.initialize_config_dir(str(configs), version_base=None):
                config = hydra.compose("ppo_trainer", overrides=words_of(said)[3:])
            for key, value in settings_of(said).items():
                found = omegaconf.OmegaConf.select(config, key)
                assert str(found) == value.replace("[console]", "['console']")

    def test_it_loads_our_rewards(self, exported):
        reward = pytest.importorskip("verl.trainer.ppo.reward")
        omegaconf = pytest.importorskip("omegaconf")
        _, said = exported([FULL], "--method", "grpo", "--recipe", "ampo")
        config = omegaconf.OmegaConf.create({})
        for key, value in settings_of(said).items():
            if key.startswith("reward."):
                omegaconf.OmegaConf.update(config, key, typed(value))
        score = reward.get_custom_reward_fn(config)
        result = score(data_source="ampo.py", solution_str=WRONG, ground_truth="72",
                       extra_info={"question": QUESTION})
        assert result["score"] == pytest.approx(0.1)


def typed(value):
    """A setting as hydra reads it: a number where it is one."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
