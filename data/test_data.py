"""Tests of convert.py and teach.py: published rows made by hand, and the base model as a teacher.

A test for each published form, then what is dropped and refused; teaching twice, stopped and in one go. At the end
exercise.py and mutate.py, and the study and its tables.
"""
import ast
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a model name that does not exist is looked for on this machine only

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "results")]
import ampo
import convert
import exercise
import mutate
import study
import table
import teach

BASE, TRAIN = str(HERE / "base"), HERE / "train.jsonl"
QUESTION = "What is half of 144?"
RIGHT, WRONG, TRACE = "<think>\n144/2\n</think>\n\nSo \\boxed{72}.", "So \\boxed{71}.", "\\boxed{72}"


# ---------------------------------------------------------------------------------------------------------------------
# convert.py


def prompt(question=QUESTION):
    """The published sets' messages: a system message may stand first."""
    return [{"role": "system", "content": "Think step by step."}, {"role": "user", "content": question}]


def verl_row(**fields):
    """A row in the layout that the official AMPO set and LUFFY's share."""
    return {"data_source": "openr1", "prompt": prompt(), "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "72"}, "extra_info": {"index": 1}} | fields


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def converted(tmp_path, capsys):
    """converted(rows): convert.py's problems as plain objects, and what it printed."""
    def run(rows):
        source, out = write_lines(tmp_path / "published.jsonl", rows), tmp_path / "problems.jsonl"
        assert convert.main([str(source), "--out", str(out)]) == 0
        ampo.load_problems(out)
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out
    return run


def refused(capsys, main, *argv):
    """Run a script that must exit with status 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    line, = capsys.readouterr().err.splitlines()
    return line


class TestForms:
    def test_official_ampo_keeps_the_best_correct_trace_of_each_source(self, converted):
        traces = [("r1", .2, RIGHT), ("r1", .9, RIGHT + " And half."), ("r1", .9, RIGHT + " Really."), ("r1", 1, WRONG),
                  ("qwen", None, TRACE), ("glm", 0.5, WRONG), ("yi", 0.5, "72"), ("phi", 0.5, "")]
        targets = [{"content": text, "source": source, "quality_score": score} for source, score, text in traces]
        (row, bare), said = converted([verl_row(target_lst=targets), verl_row(target_lst=None)])
        assert bare == {"question": QUESTION, "answer": "72"}
        assert row == bare | {"teachers": {"r1": RIGHT + " Really.", "qwen": TRACE}}
        assert said.splitlines() == [
            "taken 2: with teachers 1, hint 0, solution 0", "  1 teacher r1", "  1 teacher qwen", "rows dropped 0",
            "traces left out 6", "  2 its source has a better one", "  2 final answer not the gold one",
            "  1 no final answer", "  1 empty"]

    @pytest.mark.parametrize("target", [[{"role": "assistant", "content": text} for text in (RIGHT, TRACE)], RIGHT,
                                        [{"content": RIGHT}], {"role": "assistant", "content": RIGHT}, [RIGHT]])
    def test_luffy_target_is_the_solution_too(self, converted, target):
        (row,), said = converted([verl_row(target=target)])
        assert row == {"question": QUESTION, "answer": "72", "teachers": {"target": RIGHT}, "solution": RIGHT}
        assert "with teachers 1, hint 0, solution 1" in said

    def test_luffy_wrong_target_is_no_solution_either(self, converted):
        (row,), said = converted([verl_row(target=[{"role": "assistant", "content": WRONG}])])
        assert row == {"question": QUESTION, "answer": "72"} and "1 final answer not the gold one" in said

    def test_target_and_target_lst_in_one_row(self, converted):
        other = {"content": TRACE, "source": "r1", "quality_score": 1.0}
        (row,), _ = converted([verl_row(target=RIGHT, target_lst=[other], solution="Halve it.")])
        assert row["teachers"] == {"target": RIGHT, "r1": TRACE} and row["solution"] == "Halve it."

    @pytest.mark.parametrize("hint", [QUESTION + "\nHint: divide.", prompt(QUESTION + "\nHint: divide."),
                                      {"role": "user", "content": QUESTION + "\nHint: divide."}])
    def test_guide_hint_is_a_user_message(self, converted, hint):
        wanted = {"question": QUESTION, "answer": "72", "hint": QUESTION + "\nHint: divide."}
        rows, said = converted([verl_row(hint=hint), {"question": QUESTION, "answer": 72, "hint": hint}])
        assert rows == [wanted, wanted] and "with teachers 0, hint 2, solution 0" in said

    def test_gsm8k_solution_is_a_trace_too(self, converted):
        answer = "She sold 48/2 = <<48/2=24>>24.\nIn all 1,176+24 = <<1176+24=1200>>1,200.\n#### 1,200"
        text = "She sold 48/2 = 24.\nIn all 1,176+24 = 1,200.\n\\boxed{1,200}"
        (row,), _ = converted([{"question": "How many?", "answer": answer}])
        assert row == {"question": "How many?", "answer": "1,200", "teachers": {"gsm8k": text}, "solution": text}
        assert ampo.verify("\\boxed{1200}", row["answer"])

    @pytest.mark.parametrize("truth, gold", [
        ("$72$", "72"), ("$$ 72 $$", "72"), (TRACE, "72"), ("$\\boxed{72}$", "72"), ("\\boxed{$72$}", "72"),
        (["72"], "72"), (72, "72"), (0.5, "0.5"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), (" (1,2) ", "(1,2)"),
        ("$1$ and $2$", "$1$ and $2$"), ("\\boxed{1}, \\boxed{2}", "\\boxed{1}, \\boxed{2}")])
    def test_ground_truths_are_unwrapped(self, truth, gold):
        assert convert.gold_answer({"reward_model": {"ground_truth": truth}, "answer": "unused"})[0] == gold

    def test_the_question_ends_the_conversation(self, converted):
        example = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        (row,), _ = converted([verl_row(prompt=example + prompt())])
        assert row["question"] == QUESTION

    def test_forms_may_be_mixed_and_files_joined(self, tmp_path, capsys):
        files = [write_lines(tmp_path / "a.jsonl", [verl_row(target=RIGHT), {"question": "?", "answer": "x\n#### 3"}]),
                 write_lines(tmp_path / "b.jsonl", ["", verl_row(hint="h")])]
        assert convert.main([*map(str, files), "--out", str(tmp_path / "out")]) == 0
        problems = ampo.load_problems(tmp_path / "out")
        assert [(p.answer, *p.teachers, p.hint) for p in problems] == [("72", "target", ""), ("3", "gsm8k", ""),
                                                                      ("72", "h")]
        assert "taken 3: with teachers 2, hint 1, solution 2" in capsys.readouterr().out


class TestDropping:
    def test_each_reason_is_counted(self, converted):
        bad = ["{broken", "[" * 100_000, "3", '["a list"]', verl_row(prompt=None), verl_row(prompt=prompt()[:1]),
               verl_row(prompt=prompt("  ")), verl_row(reward_model=None), {"question": QUESTION, "answer": " \n#### "},
               verl_row(reward_model={"ground_truth": "((("}), verl_row(reward_model={"ground_truth": ["1", "2"]})]
        rows, said = converted([verl_row(), *bad])
        assert len(rows) == 1
        assert set(said.splitlines()[1:]) == {
            "rows dropped 11", "  2 broken JSON", "  2 not a JSON object", "  3 no question", "  3 no answer",
            "  1 an answer that the verifier cannot read", "traces left out 0"}

    @pytest.mark.parametrize("fields", [{"prompt": 5}, {"prompt": [5, None]}, {"target_lst": 5}, {"target_lst": [5]},
                                        {"target_lst": {"content": [RIGHT]}}, {"target": [None]}, {"hint": [3]},
                                        {"reward_model": "72"}, {"answer": {}}, {"solution": [1]},
                                        {"target_lst": [{"content": 5, "source": {}, "quality_score": "high"}]}])
    def test_no_row_is_a_crash(self, converted, fields):
        rows, _ = converted([verl_row(), verl_row(**fields)])
        assert rows[0] == {"question": QUESTION, "answer": "72"} and all("teachers" not in row for row in rows)

    def test_what_the_reader_refuses_is_dropped(self, converted, monkeypatch):
        parse = ampo.parse_problem
        def picky(row, where):
            ampo.refuse("picky" in row.values(), f"{where}: too picky")
            return parse(row, where)
        monkeypatch.setattr(ampo, "parse_problem", picky)
        rows, said = converted([verl_row(), verl_row(hint="picky")])
        assert len(rows) == 1 and "  1 other: row: too picky" in said.splitlines()

    def test_a_quality_that_is_no_number_counts_least(self):
        traces = [("r", -math.inf, TRACE), ("r", -5, RIGHT)]
        rows = [{"target_lst": [{"source": "r", "quality_score": score, "content": text}
                                for score, (_, _, text) in zip((bad, -5), traces)]} for bad in (None, "9", math.nan)]
        assert all(convert.traces_of(row, "") == traces for row in rows)
        assert convert.choose(traces, "72", convert.Counter()) == {"r": RIGHT}


class TestConvertRefuses:
    def test_an_out_file_that_exists(self, tmp_path, capsys):
        source, out = write_lines(tmp_path / "in.jsonl", [verl_row()]), write_lines(tmp_path / "out", ["precious"])
        assert "exists already" in refused(capsys, convert.main, source, "--out", out)
        assert "exists already" in refused(capsys, convert.main, source, "--out", source)
        assert out.read_text() == "precious\n" and json.loads(source.read_text()) == verl_row()

    @pytest.mark.parametrize("missing", ["none.jsonl", "none.parquet"])
    def test_a_missing_input_before_it_reads_the_others(self, tmp_path, capsys, missing):
        source, out = write_lines(tmp_path / "in.jsonl", [verl_row()]), tmp_path / "out"
        line = refused(capsys, convert.main, source, tmp_path / missing, "--out", out)
        assert missing in line and "No such file" in line and not out.exists()

    def test_nothing_taken(self, tmp_path, capsys):
        source, out = write_lines(tmp_path / "in.jsonl", ["{}"]), tmp_path / "out"
        assert "in.jsonl: no row could be taken" in refused(capsys, convert.main, source, "--out", out)
        assert not out.exists()

    def test_bad_flags(self, capsys):
        assert "--out" in refused(capsys, convert.main, "x.jsonl")

    def test_ctrl_c_leaves_nothing_behind(self, tmp_path, capsys, monkeypatch):
        def interrupt(*_): raise KeyboardInterrupt
        monkeypatch.setattr(convert, "convert", interrupt)
        source, out = write_lines(tmp_path / "in.jsonl", [verl_row()]), tmp_path / "out"
        assert convert.main([str(source), "--out", str(out)]) == 130
        assert "nothing was written" in capsys.readouterr().err and not out.exists()


class TestParquet:
    def test_rows_are_those_of_jsonl(self, tmp_path, capsys):
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        target = {"content": RIGHT, "source": "r1", "quality_score": 0.9}
        rows = [verl_row(prompt=prompt(f"{i}?"), target_lst=[target] * (i % 3) or None, probs=[0.5] * 9,
                         target=[{"role": "assistant", "content": RIGHT}], hint="h") for i in range(600)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        write_lines(tmp_path / "rows.jsonl", rows)
        outs = [tmp_path / "of_parquet", tmp_path / "of_jsonl"]
        for name, out in zip(("rows.parquet", "rows.jsonl"), outs):
            assert convert.main([str(tmp_path / name), "--out", str(out)]) == 0
        assert outs[0].read_text() == outs[1].read_text() and len(ampo.load_problems(outs[0])) == 600
        broken = write_lines(tmp_path / "broken.parquet", ["no parquet"])
        assert "broken.parquet: " in refused(capsys, convert.main, broken, "--out", tmp_path / "out")

    def test_without_pyarrow_it_says_what_to_install(self, tmp_path, capsys, monkeypatch):
        for name in ("pyarrow", "pyarrow.parquet"):
            monkeypatch.setitem(sys.modules, name, None)
        line = refused(capsys, convert.main, write_lines(tmp_path / "x.parquet", ["PAR1"]), "--out", tmp_path / "out")
        assert "x.parquet: " in line and "pip install pyarrow" in line and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# teach.py


@pytest.fixture(scope="module")
def easy():
    """Ten problems of level 2 as they stand in train.jsonl, some with fields that ampo.py does not know."""
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    rows = [row for row in rows if row["level"] == 2][:10]
    return [row if i % 2 else {key: row[key] for key in ("question", "answer", "level")} for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def pool(easy, tmp_path_factory):
    """What teach.py makes of the easy problems in one go: (folder, input, output)."""
    folder = tmp_path_factory.mktemp("teach")
    data = write_lines(folder / "in.jsonl", easy)
    assert run_teach(data, folder / "out.jsonl") == 0
    return folder, data, folder / "out.jsonl"


def run_teach(data, out, *flags, name="base"):
    return teach.main(["--model", BASE, "--name", name, "--data", str(data), "--out", str(out), "--samples", "3",
                       "--batch", "4", "--max_new_tokens", "32", *flags])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestTeach:
    def test_it_adds_verified_traces_and_nothing_else(self, pool, easy, capsys):
        _, data, out = pool
        rows, solved = lines_of(out), 0
        assert data.read_text() == "".join(json.dumps(row) + "\n" for row in easy) and len(rows) == len(easy)
        for row, before in zip(rows, easy):
            trace = row.get("teachers", {}).get("base")
            solved += trace is not None
            after = before | {"teachers": before.get("teachers", {}) | {"base": trace}}
            assert row == (before if trace is None else after)
            assert trace is None or ampo.verify(trace, row["answer"]) and "<|end|>" not in trace
        assert 3 <= solved and len(ampo.load_problems(out)) == len(easy)
        capsys.readouterr()
        assert run_teach(data, out) == 0  # again: everything is done
        said = capsys.readouterr().out
        assert f"all {len(easy)} problems were done already" in said
        assert f"base solved {solved} of {len(easy)} problems (yield {solved / len(easy):.1%}), mean length of" in said

    @pytest.mark.parametrize("kept, torn", [(0, ""), (0, '{"quest'), (4, ""), (5, '{"question": "'), (9, "all but 9"),
                                            (6, "all but 1")])
    def test_a_stopped_run_ends_with_the_same_bytes(self, pool, tmp_path, kept, torn):
        _, data, whole = pool
        lines, out = whole.read_text().splitlines(keepends=True), tmp_path / "out.jsonl"
        torn = lines[kept][:-int(torn.split()[-1])] if torn.startswith("all") else torn
        out.write_text("".join(lines[:kept]) + torn)
        assert run_teach(data, out) == 0
        assert out.read_bytes() == whole.read_bytes()

    def test_ctrl_c(self, pool, tmp_path, capsys, monkeypatch):
        _, data, whole = pool
        out, rollout, calls = tmp_path / "out.jsonl", ampo.rollout, []
        def interrupted(*args):
            calls.append(args)
            if len(calls) == 1: return rollout(*args)
            assert len(out.read_text().splitlines()) == 4  # on the disk already: not even a kill would lose them
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(ampo, "rollout", interrupted)
            assert run_teach(data, out) == 130
        assert "same command goes on" in capsys.readouterr().err.splitlines()[-1]
        assert out.read_text().splitlines() == whole.read_text().splitlines()[:4]
        assert run_teach(data, out) == 0 and out.read_bytes() == whole.read_bytes()

    def test_the_seed_matters_and_chunks_differ(self, easy, tmp_path, monkeypatch):
        rollout, drawn = ampo.rollout, []
        def recorded(*args):
            groups = rollout(*args)
            drawn.append([sample.ids for sample in groups[0]])
            return groups
        monkeypatch.setattr(ampo, "rollout", recorded)
        data = write_lines(tmp_path / "same.jsonl", [easy[0]] * 2)
        for seed in "12":
            assert run_teach(data, tmp_path / seed, "--seed", seed, "--batch", "1", "--temperature", "2") == 0
        assert len(drawn) == 4 and all(one != other for i, one in enumerate(drawn) for other in drawn[:i])

    def test_a_second_teacher_makes_a_pool_of_two(self, pool, tmp_path):
        out = tmp_path / "two.jsonl"
        assert run_teach(pool[2], out, "--seed", "1", name="other") == 0
        teachers = [row.get("teachers", {}) for row in lines_of(out)]
        assert any({"base", "other"} <= set(names) for names in teachers)
        for now, before in zip(teachers, lines_of(pool[2])):
            assert {name: text for name, text in now.items() if name != "other"} == before.get("teachers", {})

    def test_the_shortest_correct_one_is_kept(self, easy, tmp_path, monkeypatch, capsys):
        def said(correct, size, text):
            return ampo.Sample([], [0] * size, [], text, correct, float(correct))
        groups = iter([[said(True, 9, "nine"), said(True, 7, "the seven"), said(False, 3, "no"), said(True, 8, "8")],
                       [said(False, 3, "no")]])
        asked = []
        def rollout(student, problems, messages):
            asked.append((student.cfg.group_size, messages))
            return [next(groups) for _ in problems]
        monkeypatch.setattr(ampo, "rollout", rollout)
        data, out = write_lines(tmp_path / "in.jsonl", easy[:2]), tmp_path / "out.jsonl"
        assert run_teach(data, out, "--samples", "1") == 0
        assert lines_of(out) == [easy[0] | {"teachers": {"base": "the seven"}}, easy[1]]
        assert asked == [(1, [row["question"] for row in easy[:2]])]
        tokens = len(ampo.AutoTokenizer.from_pretrained(BASE)("the seven").input_ids)
        assert capsys.readouterr().out.splitlines()[-1] == \
            f"base solved 1 of 2 problems (yield 50.0%), mean length of kept traces {tokens}.0 tokens"

    def test_too_long_a_question_is_written_as_it_is(self, easy, tmp_path, monkeypatch, capsys):
        right, trace = ampo.Sample([], [0], [], "right", True, 1.0), {"teachers": {"base": "right"}}
        monkeypatch.setattr(ampo, "rollout", lambda student, problems, messages: [[right] for _ in messages])
        long = {"question": "long " * 1000, "answer": "1"}
        data, out = write_lines(tmp_path / "in.jsonl", [easy[0], long, easy[2]]), tmp_path / "out.jsonl"
        assert run_teach(data, out) == 0
        assert lines_of(out) == [easy[0] | trace, long, easy[2] | trace]
        said = capsys.readouterr().out
        assert "in.jsonl: 1 questions leave no room" in said and "base solved 2 of 3 problems" in said

    def test_sampling_flags_reach_the_config(self, easy, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(ampo, "rollout", lambda student, *_: seen.append(student.cfg) or [[]])
        flags = "--cache_tokens 4096 --temperature 0.5 --seed 7 --system".split()
        assert run_teach(write_lines(tmp_path / "in.jsonl", easy[:1]), tmp_path / "out", *flags, "Be brief.") == 0
        cfg, = seen
        assert (cfg.system, cfg.cache_tokens, cfg.temperature, cfg.seed, cfg.max_new_tokens, cfg.group_size) == \
            ("Be brief.", 4096, 0.5, 7, 32, 3)


class TestTeachRefuses:
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        """All of these are found out before a model is loaded."""
        monkeypatch.setattr(ampo, "load_student", lambda *_: pytest.fail("a model was loaded"))

    def refusal(self, capsys, data, out, *flags, name="base"):
        return refused(capsys, teach.main, "--model", BASE, "--name", name, "--data", data, "--out", out, *flags)

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
        assert f"{data}:2: field 'teachers': has a trace by 'undo' already" in \
            self.refusal(capsys, data, tmp_path / "out", name="undo")

    @pytest.mark.parametrize("change", "question name longer field json newline torn list".split())
    def test_an_output_that_is_no_continuation(self, pool, tmp_path, capsys, change):
        _, data, whole = pool
        lines, out = whole.read_text().splitlines(keepends=True), tmp_path / "out.jsonl"
        content = {"question": lines[1] + lines[0], "longer": "".join(lines + lines[:1]), "json": "my notes\n",
                   "field": lines[0].replace('"level": 2', '"level": 3'), "newline": "my notes", "list": "[1]\n",
                   "torn": "".join(lines) + '{"question', "name": "".join(lines)}[change]
        out.write_text(content)
        name = "other" if change == "name" else "base"
        line = self.refusal(capsys, data, out, name=name)
        assert "is not a continuation of" in line and str(out) in line and out.read_text() == content

    def test_bad_flags_and_files(self, easy, tmp_path, capsys):
        data, out = write_lines(tmp_path / "in.jsonl", easy), tmp_path / "out"
        for flag, value in [("--samples", 0), ("--batch", 0), ("--max_new_tokens", 0), ("--temperature", -1.0)]:
            assert f"{flag} {value}: must be at least" in self.refusal(capsys, data, out, flag, value)
        assert all("--name" in self.refusal(capsys, data, out, name=name) for name in ("", " "))
        assert "none.jsonl" in self.refusal(capsys, tmp_path / "none.jsonl", out)
        assert "folder does not exist" in self.refusal(capsys, data, tmp_path / "none" / "out")
        assert "in.jsonl:11: not a JSON object" in self.refusal(capsys, write_lines(data, [*easy, "{"]), out)
        assert not out.exists()


def test_teach_refuses_a_model_that_is_none(easy, tmp_path, capsys):
    data, out = write_lines(tmp_path / "in.jsonl", easy), tmp_path / "out"
    line = refused(capsys, teach.main, "--model", tmp_path / "none", "--name", "n", "--data", data, "--out", out)
    assert str(tmp_path / "none") in line and not out.exists()


class TestPromptLimit:
    def test_longer_prompts_are_dropped_and_counted(self, tmp_path, capsys):
        base = HERE / "base"
        tokenizer = convert.AutoTokenizer.from_pretrained(base)
        rows = [{"question": "Solve 2*x=3.", "answer": "#### 3/2"}, {"question": "Solve 2*x=3. " * 9, "answer": "#### 3/2"}]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        limit = len(ampo.encode_prompt(tokenizer, rows[0]["question"]))
        for allowed, taken in ((limit, 1), (limit - 1, 0)):
            out = tmp_path / f"out{allowed}.jsonl"
            status = convert.main([str(tmp_path / "in.jsonl"), "--out", str(out), "--model", str(base),
                                   "--max_prompt_tokens", str(allowed)])
            said = capsys.readouterr().out
            assert status == (0 if taken else 2) and f"{2 - taken} a question longer than --max_prompt_tokens" in said
            assert not taken or len(ampo.load_problems(out)) == 1

    def test_needs_the_model(self, tmp_path, capsys):
        (tmp_path / "in.jsonl").write_text("{}\n")
        assert convert.main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "o"), "--max_prompt_tokens", "9"]) == 2
        assert "--model" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# exercise.py and mutate.py


class TestExercise:
    def test_only_the_bodies_named_are_taken_out(self, capsys):
        exercise.main(["gae", "pad"])
        sources = exercise.SOURCE.read_text(), capsys.readouterr().out
        assert sources[1].count('\n    raise NotImplementedError("gae is yours to write")\n') == 1
        before, after = (exercise.definitions(ast.parse(source)) for source in sources)
        changed = {name for name in before if ast.unparse(before[name]) != ast.unparse(after[name])}
        assert changed == {"gae", "pad"} and before.keys() == after.keys()
        assert ast.get_docstring(after["gae"]) == ast.get_docstring(before["gae"])

    def test_a_name_that_is_none(self):
        with pytest.raises(SystemExit, match="nonsense"):
            exercise.main(["gae", "nonsense"])


class TestMutate:
    SOURCE = """
class Config:
    clip: float = flag(0.2, "help")

def f(x, mask, cfg):
    y = min(x * mask, 1) - x.detach()
    return y if not cfg.clip < 3 else -y
"""

    def test_each_fault_is_one_change_that_compiles(self):
        faults = mutate.faults(self.SOURCE)
        assert all(source != self.SOURCE and compile(source, "f", "exec") for *_, source in faults)
        said = {(what, before, after) for _, _, what, before, after, _ in faults}
        assert said >= {("name", "min", "max"), ("mask dropped", "x * mask", "x"), ("detach dropped", "x.detach()", "x"),
                        ("comparison", "cfg.clip < 3", "cfg.clip <= 3"), ("flag not read", "cfg.clip", "0.2"),
                        ("constant", "1", "2"), ("constant", "1", "0"), ("sign or not dropped", "-y", "y"),
                        ("operator", "min(x * mask, 1) - x.detach()", "min(x * mask, 1) + x.detach()")}

    def test_only_the_functions_wanted(self):
        assert mutate.faults(self.SOURCE, ["g"]) == []


# ---------------------------------------------------------------------------------------------------------------------
# results/table.py and results/study.py


class TestTables:
    def test_gains_are_split_by_what_the_base_can_do(self):
        """Of 32 samples the base solves 32, 2 and 0. With 2, sixteen samples hold one with 1 - C(30, 16) / C(32, 16)."""
        base = {"samples": 32, "test": {"solved": [32, 2, 0, 0]}}
        row = {"samples": 32, "test": {"solved": [16, 18, 8, 0]}}  # a loss, half a problem, a quarter, nothing
        inside = 1 - math.comb(30, 16) / math.comb(32, 16)
        within, beyond = table.newly_solved(row, base)
        assert within == pytest.approx(100 * 0.5 * inside / 4)
        assert beyond == pytest.approx(100 * (0.5 * (1 - inside) + 0.25) / 4)

    def test_intervals_are_those_of_students_t(self):
        values = [3.0, 4.0, 8.0]  # mean 5, standard error sqrt(7/3), t 4.30
        assert table.interval(values) == "5.0 ± 6.6" and table.interval([5.0]) == "5.0"
        assert table.interval([]) == table.interval([1.0, None]) == "–"

    def test_differences_are_paired_by_seed(self):
        assert table.paired({0: 5.0, 1: 9.0, 2: 1.0}, {1: 8.0, 0: 4.0, 3: 0.0}, float) == "1.0 ± 0.0"
        assert table.paired({}, {0: 4.0}, float) == "–"

    def test_the_published_results_are_those_of_the_runs(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["table.py"])
        table.main()
        assert capsys.readouterr().out == (HERE / "results" / "results.md").read_text()

    def test_the_readme_has_its_intervals_from_there(self):
        """But for entropies, which it gives in nats, with three decimals."""
        interval = re.compile(r"(?<![\d.])\d+\.\d ± \d+\.\d(?!\d)")
        said = interval.findall((HERE.parent / "README.md").read_text())
        assert len(said) > 40 and not set(said) - set(interval.findall((HERE / "results" / "results.md").read_text()))


class TestStudy:
    def test_every_flag_is_one_of_ampo(self):
        for part, (runs, _) in study.PARTS.items():
            for flags in (flags for flags, _ in runs.values() if flags is not None):
                cfg, given = ampo.parse_config(flags)
                assert part == "main" or cfg.method in ("grpo", "ampo") and given

    def test_what_is_published_is_all_of_it(self):
        assert study.done() == set(study.todo(study.PARTS))

    def test_selections_rank_traces_by_length(self):
        tokenizer = ampo.AutoTokenizer.from_pretrained(BASE)
        rank = lambda kind: study.other_selection(kind)(None, tokenizer, None, ["1+1", "1", "1+1+1"])
        longest, shortest = rank("longest"), rank("shortest")
        assert max(longest) == longest[2] and max(shortest) == shortest[1] and sorted(longest) == sorted(shortest)

    def test_teachers_are_filtered(self, tmp_path):
        path = study.with_teachers("undo,work", tmp_path / "some.jsonl")
        assert all(list(p.teachers) == ["undo", "work"] for p in ampo.load_problems(path)[:20])
