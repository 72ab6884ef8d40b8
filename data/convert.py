"""Turn published sets into problems that ampo.py reads: JSONL or parquet in, JSONL out.

    python data/convert.py openr1_math_4longcots.parquet --out openr1/train.jsonl
    python data/convert.py gsm8k_train.jsonl math_train.jsonl --out both/train.jsonl
    python data/convert.py luffy.parquet --out luffy/train.jsonl --model Qwen/Qwen2.5-1.5B --max_prompt_tokens 1024

Each row is recognised by its fields, so one call may mix the forms:

    official AMPO   prompt (messages), target_lst [{content, source, quality_score}], reward_model.ground_truth
    LUFFY           the same with target, one assistant's message; it is the solution as well
    Guide           prompt or question, hint (a complete other user message), ground truth or answer
    GSM8K           question, answer: a worked solution that ends in "#### 72"

Traces stay as they are, thoughts and all, but only those whose final answer the verifier finds right are taken. What
was dropped, and why, is counted on stdout. README.md, beside this file, describes what is written.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ampo  # what is taken is what its verifier and its reader accept

FIELDS = ("prompt", "question", "reward_model", "answer", "target_lst", "target", "hint", "solution")


# --- Reading: nothing holds a whole file, sets of long traces have gigabytes -----------------------


def read_rows(path):
    """An iterator over the rows of a file: parsed ones from parquet, lines of text from anything else.

    What is missing, be it the file or pyarrow, is found out here and not after the files before it were read.
    """
    if path.suffix != ".parquet":
        return open(path, encoding="utf-8-sig", errors="replace", newline="\n")
    path.stat()
    try:
        import pyarrow.parquet
    except ImportError:
        raise ampo.InputError(f"{path}: reading parquet takes pyarrow: pip install pyarrow")
    return parquet_rows(path, pyarrow)


def parquet_rows(path, pyarrow):
    """Yield rows as plain Python objects, some hundred in memory at a time."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Of the other columns some are huge, such as the log-probabilities of every target's tokens.
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            for batch in file.iter_batches(256, columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ampo.InputError(f"{path}: {str(error).splitlines()[0]}")


# --- One row ---------------------------------------------------------------------------------------


def contents(value, role):
    """The texts in a text, in a message or in a list of messages; of messages only those by `role`."""
    messages = value if isinstance(value, list) else [value]
    messages = [{"content": message} if isinstance(message, str) else message for message in messages]
    texts = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") in (role, None)]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def user_message(*values):
    """The user's message in the first value that has one: the last, where a conversation leads up to the question."""
    return next((texts[-1] for value in values if (texts := contents(value, "user"))), "")


def gold_answer(row):
    """-> the bare gold answer ("" if there is none) and the worked solution above it, as in GSM8K."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    gold = row.get("answer") if truth is None else truth
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    gold = str(gold) if type(gold) in (int, float) else gold if isinstance(gold, str) else ""
    worked, _, gold = gold.rpartition("####")
    if gold.count("\\boxed") == 1:  # of several boxes none is the whole answer
        gold = ampo.extract_answer(gold) or gold
    gold = re.sub(r"^\s*(\$+)([^$]*)\1\s*$", r"\2", gold).strip()
    return gold, worked and re.sub(r"<<[^<>]*>>", "", worked).rstrip() + f"\n\\boxed{{{gold}}}"


def traces_of(row, worked):
    """All traces of a row as (source, quality, text)."""
    traces = [("gsm8k", 0, worked)] if worked else []
    traces += [("target", 0, text) for text in contents(row.get("target"), "assistant")[:1]]
    items = row.get("target_lst")
    for item in items if isinstance(items, list) else []:
        item = item if isinstance(item, dict) else {}
        quality, text = item.get("quality_score"), item.get("content")
        known = isinstance(quality, (int, float)) and not math.isnan(quality)
        traces.append((str(item.get("source") or "target"), quality if known else -math.inf, text))
    return traces


def choose(traces, answer, left_out):
    """{source: its best correct trace}, the shorter of equally good ones; counts the others in `left_out`."""
    best = {}
    for source, quality, text in traces:
        if not isinstance(text, str) or not text.strip():
            left_out["empty"] += 1
        elif not ampo.verify(text, answer):
            left_out["no final answer" if ampo.extract_answer(text) is None else "final answer not the gold one"] += 1
        else:
            left_out["its source has a better one"] += source in best
            key = (-quality, len(text), text)
            best[source] = min(best.get(source, key), key)
    return {source: key[-1] for source, key in best.items()}


def convert(row, left_out, fits=lambda question: True):
    """A published row, or a line that holds one -> a problem of the project. InputError says why there is none."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError):
        raise ampo.InputError("broken JSON")
    ampo.refuse(not isinstance(row, dict), "not a JSON object")
    question, (answer, worked) = user_message(row.get("prompt"), row.get("question")), gold_answer(row)
    ampo.refuse(not question, "no question")
    ampo.refuse(not fits(question), "a question longer than --max_prompt_tokens")
    ampo.refuse(not answer, "no answer")
    ampo.refuse(not ampo.same_answer(answer, answer), "an answer that the verifier cannot read")
    teachers = choose(traces_of(row, worked), answer, left_out)
    solution = row.get("solution") or teachers.get("gsm8k") or "target" in row and teachers.get("target")
    problem = {"question": question, "answer": answer, "teachers": teachers, "hint": user_message(row.get("hint")),
               "solution": solution if isinstance(solution, str) else ""}
    problem = {name: value for name, value in problem.items() if value}
    try:
        ampo.parse_problem(problem, "row")
    except ampo.InputError as error:
        raise ampo.InputError(f"other: {error}")
    return problem


# --- All rows --------------------------------------------------------------------------------------


def within(model, limit):
    """A test of questions: do they fit into `limit` tokens of the model's chat template? Without a limit all do."""
    if limit is None:
        return lambda question: True
    tokenizer = ampo.attempt(f"--model {model}: no tokenizer in it", AutoTokenizer.from_pretrained, model)
    return lambda question: len(ampo.encode_prompt(tokenizer, question)) <= limit


def write_problems(inputs, out, fits):
    """Convert all rows into the open file `out`. Returns the counters taken, dropped and left_out."""
    taken, dropped, left_out = Counter(), Counter(), Counter()
    for row in tqdm((row for rows in inputs for row in rows), unit=" rows", disable=None):
        if isinstance(row, str) and not row.strip():
            continue
        try:
            problem = convert(row, left_out, fits)
        except ampo.InputError as error:
            dropped[str(error)] += 1
            continue
        out.write(json.dumps(problem) + "\n")
        taken.update(["rows", *problem, *(f"teacher {name}" for name in problem.get("teachers", ()))])
    return taken, dropped, left_out


def convert_files(paths, out, fits):
    """Convert all files into `out`, which must be new; it is deleted again unless it gets finished."""
    ampo.refuse(out.exists(), f"--out {out}: exists already, and is not overwritten")
    inputs = [read_rows(path) for path in paths]
    with open(out, "x", encoding="utf-8") as file:  # x: not even if somebody made it in the meantime
        try:
            counters = write_problems(inputs, file, fits)
            print(summary(*counters))
            ampo.refuse(not counters[0], f"{', '.join(map(str, paths))}: no row could be taken")
        except BaseException:
            out.unlink()
            raise


def summary(taken, dropped, left_out):
    """What was taken and what was not, a reason a line."""
    lines = [f"taken {taken['rows']}: with teachers {taken['teachers']}, hint {taken['hint']}, "
             f"solution {taken['solution']}"]
    lines += [f"  {count} {name}" for name, count in taken.items() if name.startswith("teacher ")]
    for title, counts in ("rows dropped", dropped), ("traces left out", left_out):
        lines += [f"{title} {counts.total()}", *(f"  {n} {reason}" for reason, n in counts.most_common() if n)]
    return "\n".join(lines)


def main(argv=None):
    """Entry point; returns the exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: ampo.refuse(True, message)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="a published set, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="the file to write; it must not exist")
    parser.add_argument("--model", help="whose tokenizer and chat template count the prompt tokens")
    parser.add_argument("--max_prompt_tokens", type=int, help="drop rows with longer prompts; default: take them all")
    try:
        args = parser.parse_args(argv)
        ampo.refuse((args.model is None) != (args.max_prompt_tokens is None), "--max_prompt_tokens goes with --model")
        convert_files(args.inputs, args.out, within(args.model, args.max_prompt_tokens))
        return 0
    except (ampo.InputError, OSError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print(f"convert.py: {'stopped; nothing was written' if stopped else error}", file=sys.stderr)
        return 130 if stopped else 2


if __name__ == "__main__":
    sys.exit(main())
