"""Turn published sets into problems that ampo.py reads: JSONL, a JSON array or parquet in, JSONL out.

    python data/convert.py openr1_math_4longcots.parquet --out openr1/train.jsonl
    python data/convert.py example_model_solutions.jsonl --out pool/train.jsonl
    python data/convert.py mine.jsonl --out mine/train.jsonl --question q --answer gold.final \\
        --teacher big=answers.big --teacher small=answers.small

The forms that it knows are the rows of FORMS below; each row of a file is recognised by its
fields, so that one call may mix them. Any other form is read with the flags --question, --answer,
--solution, --hint, --system and --teacher, which take the place of the table.

A trace is taken when the verifier finds its final answer right. What was taken, what was not and
why is printed, with the line of the first of each kind. data/README.md describes what is written.
"""
import argparse
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ampo  # its verifier decides what is taken


# ---------------------------------------------------------------------------------------------------
# The forms


@dataclass(frozen=True)
class Form:
    """Where the parts of a problem stand in a row.

    A path such as a.b leads into objects; several of them are written a.b|c.
    """

    name: str
    has: str            # the fields that every row of this form has
    question: str       # path of a text, or of messages: then the last one of the user
    answer: str         # path of the gold answer: bare, in a box, or after a mark such as ####
    solution: str = ""  # paths, of which the first one with a text counts
    hint: str = ""      # path of a complete other user message
    system: str = ""    # path of a system message, beside those among the messages of `question`
    teachers: dict = field(default_factory=dict)  # name -> path; for * the names stand in the data
    verdicts: str = ""  # paths of lists: the set's own verdicts on a list of traces
    complete: str = ""  # path of a list: False for a trace that was cut off


DEEPMATH = {"r1-1": "r1_solution_1", "r1-2": "r1_solution_2", "r1-3": "r1_solution_3"}
GSM8K_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

# The first row whose fields are all there counts, so the more special ones come first.
FORMS = (
    Form("solutions of four models to GSM8K", "question|ground_truth|6b_finetuning",
         "question", "ground_truth", solution="ground_truth",
         teachers={name: name for name in GSM8K_MODELS}),
    Form("DeepMath", "question|final_answer", "question", "final_answer", teachers=DEEPMATH),
    Form("GSM8K, Guide, and the form that ampo.py reads", "question|answer",
         "question", "answer", solution="solution|answer", hint="hint", system="system",
         teachers={"*": "teachers", "gsm8k": "answer"}),
    Form("DAPO, processed", "prompt|solution|source_prompt", "prompt", "solution"),
    Form("AMPO, LUFFY, Guide, DAPO, and what verl reads", "prompt|reward_model",
         "prompt", "reward_model.ground_truth", solution="solution|target", hint="hint",
         teachers={"target": "target", "*": "target_lst"}),
    Form("Guide with a bare answer", "prompt|answer", "prompt", "answer",
         solution="solution", hint="hint"),
    Form("Guide with a bare ground truth", "prompt|ground_truth", "prompt", "ground_truth",
         solution="solution", hint="hint"),
    Form("OpenR1-Math", "problem|answer|generations", "problem", "answer", solution="solution",
         teachers={"r1": "generations"}, complete="is_reasoning_complete",
         verdicts="correctness_math_verify|correctness_llama"),
    Form("GHPO", "problem|solution|solution_hint", "problem", "solution",
         solution="solution_hint"),
    Form("DeepScaleR, MATH-500, NuminaMath-1.5", "problem|answer", "problem", "answer",
         solution="solution", hint="hint", teachers={"solution": "solution"}),
    Form("MATH, NuminaMath-CoT", "problem|solution", "problem", "solution", solution="solution",
         teachers={"solution": "solution"}),
    Form("conversations", "conversations", "conversations", "conversations", system="system",
         teachers={"reply": "conversations"}),
    Form("messages", "messages", "messages", "messages", system="system",
         teachers={"reply": "messages"}),
)
EXAMPLE = "--question FIELD --answer FIELD --solution FIELD --teacher NAME=FIELD"

# Words in place of an answer: what nobody can verify.
NO_ANSWER = ("proof", "notfound", "not found", "none", "n/a")
MOST_WORDS = 8  # of an answer: nobody repeats more exactly

# Instructions that ask for a final answer in a form that the verifier does not read.
OTHER_ANSWER_FORMS = {
    "Answer: ...": re.compile(r"\bAnswer: *\\?[$\"'\[{<]|[\"']Answer:"),
    "#### ...": re.compile(r"####"),
}


def split(paths):
    """The paths in a text such as a|b.c; none in an empty one."""
    return paths.split("|") if paths else []


def form_of(fields, forms):
    """The form of a row with these fields; None if it has no known one."""
    for form in forms:
        if all(name in fields for name in split(form.has)):
            return form
    return None


def paths_of(form):
    """All paths that a form reads."""
    texts = [form.has, form.question, form.answer, form.solution, form.hint, form.system]
    texts += [form.verdicts, form.complete, *form.teachers.values()]
    return split("|".join(text for text in texts if text))


# ---------------------------------------------------------------------------------------------------
# Counting


@dataclass
class Tally:
    """How often each thing was met, and where first."""

    counts: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)

    def add(self, what, where):
        self.counts[what] += 1
        self.first.setdefault(what, where)

    def lines(self):
        """A line for each thing, the most frequent one first."""
        return [f"  {count} {what} (first: {self.first[what]})"
                for what, count in self.counts.most_common()]


@dataclass
class Report:
    """What became of the rows."""

    rows: int = 0
    taken: int = 0
    parts: Counter = field(default_factory=Counter)   # of the rows taken: how many have a hint ...
    traces: Counter = field(default_factory=Counter)  # teacher -> traces taken
    dropped: Tally = field(default_factory=Tally)
    left_out: Tally = field(default_factory=Tally)
    notes: Tally = field(default_factory=Tally)


def summary(report):
    """The report as text."""
    share = 100 / max(1, report.taken)
    parts = ", ".join(f"{report.parts[name]} with {name}"
                      for name in ("teachers", "hint", "solution", "system"))
    lines = [f"taken {report.taken} of {report.rows} rows: {parts}"]
    for name, count in report.traces.most_common():
        lines.append(f"  {share * count:.0f} % ({count}) have a trace by {name}")
    if len(report.traces) > 1:
        count = report.parts["teachers"]
        lines.append(f"  {share * count:.0f} % ({count}) have a trace by any of them")
    lines += [f"rows dropped: {report.dropped.counts.total()}", *report.dropped.lines()]
    lines += [f"traces and solutions left out: {report.left_out.counts.total()}"]
    lines += report.left_out.lines()
    if report.notes.counts:
        lines += ["to be known:", *report.notes.lines()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# Reading: parquet and JSONL a few rows at a time, since sets of long traces have gigabytes


def read_rows(path, forms):
    """An iterator over (where, row); a row is a parsed one, or a line of text.

    What is missing, be it the file or pyarrow, is found out here, before any file is read.
    """
    if path.suffix == ".parquet":
        return parquet_rows(path, import_pyarrow(path), forms)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        start = file.read(1000).lstrip()
    if start.startswith("["):
        items = read_array(path)
        if items is not None:
            return items
    return json_lines(path)


def import_pyarrow(path):
    """pyarrow, which nothing but parquet takes."""
    path.stat()
    try:
        import pyarrow.parquet
    except ImportError:
        raise ampo.InputError(f"{path}: reading parquet takes pyarrow: pip install pyarrow")
    return pyarrow


def parquet_rows(path, pyarrow, forms):
    """Rows as plain Python objects, some hundred in memory at a time."""
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = columns_to_read(file.schema_arrow.names, forms)
            for batch in file.iter_batches(256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise ampo.InputError(f"{path}: {str(error).splitlines()[0]}")


def columns_to_read(names, forms):
    """Those that some form reads: of the others some are huge. All of them in an unknown form."""
    if form_of(names, forms) is None:
        return list(names)
    wanted = set()
    for form in forms:
        for path in paths_of(form):
            wanted.update([path, path.split(".")[0]])
    return [name for name in names if name in wanted]


def read_array(path):
    """[(where, item)] of a JSON array; None if the file is none, but lists in lines, say."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None
    found = []
    for number, item in enumerate(items, 1):
        if isinstance(item, str):
            item = [item]  # no object, and no line of text to be parsed either
        found.append((f"{path}: item {number}", item))
    return found


def json_lines(path):
    """The lines that are not blank, with their numbers."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line


def parse(row):
    """A row as an object. Raises InputError for broken JSON and for anything else."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            raise ampo.InputError("broken JSON")
    if not isinstance(row, dict):
        raise ampo.InputError("not a JSON object")
    return row


# ---------------------------------------------------------------------------------------------------
# Texts and messages


def at(row, path):
    """The value at a dotted path; None if there is none."""
    if path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def messages_of(value):
    """A text, a message or a list of them -> [(role, text)]; a bare text has the role ""."""
    roles = {"human": "user", "gpt": "assistant", None: ""}
    messages = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            item = {"content": item}
        if not isinstance(item, dict):
            continue
        role = item.get("role", item.get("from"))
        text = item.get("content", item.get("value"))
        if isinstance(text, str) and text.strip():
            messages.append((roles.get(role, role), text))
    return messages


def user_place(messages):
    """The index of the user's last message, which is the question; -1 if there is none."""
    places = [i for i, (role, _) in enumerate(messages) if role in ("user", "")]
    return max(places, default=-1)


def user_message(value):
    """The text of the user's last message; "" if there is none."""
    messages = messages_of(value)
    place = user_place(messages)
    return messages[place][1] if place >= 0 else ""


def system_message(row, form):
    """The system message beside the question, or at a path of its own; "" if there is none."""
    among = [text for role, text in messages_of(at(row, form.question)) if role == "system"]
    own = [text for _, text in messages_of(at(row, form.system))]
    return "\n\n".join(own + among)


def reply(value):
    """A trace: a text, or the assistant's first message after the user's last one."""
    messages = messages_of(value)
    users = [i for i, (role, _) in enumerate(messages) if role == "user"]
    later = messages[max(users, default=-1) + 1:]
    texts = [text for role, text in later if role in ("assistant", "")]
    return texts[0] if texts else ""


# ---------------------------------------------------------------------------------------------------
# The gold answer, and worked solutions that end in it

# GSM8K ends a solution in "#### 72", its example solutions by models in "A: 72".
FINAL_MARK = re.compile(r"(?:####|^A:)[ \t]*(.*?)\s*\Z", re.MULTILINE)
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
THOUGHTS_END = re.compile(r"</think>|<\|end_of_thought\|>")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # TeX commands are none
DOLLARS = re.compile(r"\s*(\$+)([^$]*)\1\s*")


def readable(text):
    """A worked solution that ends in a mark of GSM8K -> the same one ending in a box."""
    found = FINAL_MARK.search(text)
    if not found or ampo.extract_answer(text) is not None:
        return text
    above = CALCULATOR_MARK.sub("", text[:found.start()]).rstrip()
    return f"{above}\n\\boxed{{{found[1]}}}".strip()


def gold_answer(value):
    """The bare gold answer in a number, a text, a list of one or a conversation; "" if none.

    Raises InputError where it cannot be told.
    """
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        value = value[0] if len(value) == 1 else ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    text = THOUGHTS_END.split(reply(value))[-1]
    found = FINAL_MARK.search(text)
    if "\\boxed" in text:
        text = boxed(text)
    elif found:
        text = found[1]
    dollars = DOLLARS.fullmatch(text)
    if dollars:
        text = dollars[2]
    text = text.strip()
    if text.lower() in NO_ANSWER:
        return ""
    if len(WORD.findall(text)) > MOST_WORDS:
        raise ampo.InputError("an answer in prose, or a solution without a box")
    return text


def begins_with_box(text):
    """Is it a bare answer in a box, or in several?"""
    return text.lstrip(" $\n").startswith("\\boxed")


def boxed(text):
    """What stands in the box of a text. A bare answer of several boxes stays as it is."""
    boxes = text.split("\\boxed")[1:]
    contents = {ampo.extract_answer("\\boxed" + box) for box in boxes}
    if len(contents) == 1 and None not in contents:
        return contents.pop()
    if begins_with_box(text):
        return text
    raise ampo.InputError("a solution with several boxes, or with a broken one")


def is_worked(value):
    """Is there more at the gold answer's place than the bare answer?"""
    text = reply(value).strip()
    found = FINAL_MARK.search(text)
    if found:
        return found.start() > 0
    return "\\boxed" in text and not begins_with_box(text)


# ---------------------------------------------------------------------------------------------------
# Traces


@dataclass(frozen=True)
class Trace:
    """One teacher's response as it stands in a row."""

    teacher: str
    text: str
    quality: float = 0.0          # as the set gives it; a larger one is better
    right: bool | None = None     # the set's own verdict, if it has one
    complete: bool | None = None  # False: the set says that it was cut off


def traces_of(row, form):
    """All traces of a row."""
    traces = []
    for name, path in form.teachers.items():
        value = at(row, path)
        if path == form.answer and not is_worked(value):
            continue  # a bare answer
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            traces += listed_traces(row, form, name, value)
        elif name == "*":
            traces += named_traces(value)
        elif isinstance(value, dict) and "solution" in value:
            right = value.get("is_correct")
            traces.append(Trace(name, text_of(value["solution"]), right=right))
        elif value is not None:
            traces.append(Trace(name, reply(value)))
    return traces


def text_of(value):
    """The value if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""


def listed_traces(row, form, name, texts):
    """Several texts by one teacher, with the set's verdicts on them: NAME-1, NAME-2 ..."""
    traces = []
    for i, text in enumerate(texts):
        verdicts = [at(row, f"{path}.{i}") for path in split(form.verdicts)]
        verdicts = [verdict for verdict in verdicts if isinstance(verdict, bool)]
        right = any(verdicts) if verdicts else None
        complete = at(row, f"{form.complete}.{i}")
        traces.append(Trace(f"{name}-{i + 1}", text, right=right, complete=complete))
    return traces


def named_traces(value):
    """Traces that bring their teachers' names: {name: text}, or [{source, content, quality_score}]."""
    if isinstance(value, dict):
        return [Trace(str(name), text_of(text)) for name, text in value.items()]
    traces = []
    for item in value if isinstance(value, list) else []:
        item = item if isinstance(item, dict) else {}
        quality = item.get("quality_score")
        if not isinstance(quality, (int, float)) or math.isnan(quality):
            quality = -math.inf
        name = str(item.get("source") or "target")
        traces.append(Trace(name, text_of(item.get("content")), quality=quality))
    return traces


@dataclass(frozen=True)
class Gold:
    """What a trace is held to."""

    question: str
    answer: str
    tokenizer: object = None  # of --model


def unfit(text, tokenizer):
    """Why no model, or not this one, can be given a text; "" if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "with half a character, which no tokenizer takes"
    if tokenizer is not None:
        for token in tokenizer.all_special_tokens:
            if token in text:
                return f"with {token}, which --model reads as a control token"
    return ""


def fault(trace, gold):
    """Why a trace cannot be taken; "" if it can."""
    if not trace.text.strip():
        return "empty"
    if trace.complete is False:
        return "marked as cut off by the set"
    if trace.right is False:
        return "marked wrong by the set"
    text = readable(trace.text)
    if ampo.extract_answer(text) is None:
        return "without a final answer"
    if not ampo.verify(text, gold.answer, gold.question):
        return "whose final answer is not the gold one"
    return unfit(text, gold.tokenizer)


def choose(traces, gold, left_out, where):
    """{teacher: its best correct trace}, the shorter one of equally good ones.

    Adds what was left out to the tally `left_out`.
    """
    best = {}
    for trace in traces:
        reason = fault(trace, gold)
        if reason:
            left_out.add(reason, where)
            continue
        other = best.get(trace.teacher)
        if other is None:
            best[trace.teacher] = trace
            continue
        left_out.add("whose teacher has a better one", where)
        if (-trace.quality, len(trace.text)) < (-other.quality, len(other.text)):
            best[trace.teacher] = trace
    return {name: readable(trace.text) for name, trace in best.items()}


def solution_of(row, form, gold, left_out, where):
    """The first solution of a row that says more than the answer and does not end in a wrong one.

    Adds one that cannot be taken to the tally `left_out`, unless it is a trace and counted there.
    """
    for path in split(form.solution):
        value = at(row, path)
        text = readable(reply(value))
        if not text or ampo.same_answer(text, gold.answer):
            continue
        if path == form.answer and not is_worked(value):
            continue
        reason = unfit(text, gold.tokenizer)
        says = ampo.extract_answer(text)
        if says is not None and not ampo.verify(text, gold.answer, gold.question):
            reason = "whose final answer is not the gold one"
        if not reason:
            return text
        if path not in form.teachers.values():
            left_out.add(f"solution {reason}", where)
    return ""


# ---------------------------------------------------------------------------------------------------
# One row, all rows


@dataclass(frozen=True)
class Settings:
    """What the flags say beside the files."""

    forms: tuple = FORMS
    instruction: str = ""
    tokenizer: object = None
    max_prompt_tokens: int | None = None
    opening: str = ""  # what the model's chat template begins the response with, such as <think>


def convert(row, form, settings, report, where):
    """A published row -> a problem of the project. Raises InputError that says why there is none.

    Adds what was left out of the row to the report.
    """
    question = user_message(at(row, form.question))
    if not question:
        raise ampo.InputError(f"no question at {form.question}")
    answer = gold_answer(at(row, form.answer))
    if not answer:
        raise ampo.InputError(f"no answer at {form.answer}")
    if not ampo.verify(f"\\boxed{{{answer}}}", answer):
        raise ampo.InputError("an answer that the verifier cannot read")
    problem = {
        "question": question,
        "answer": answer,
        "teachers": {},
        "hint": user_message(at(row, form.hint)),
        "solution": "",
        "system": system_message(row, form),
    }
    problem = with_instruction(problem, settings.instruction)
    if not fits(problem, settings):
        raise ampo.InputError("a prompt longer than --max_prompt_tokens")
    for name in ("question", "hint", "system"):
        reason = unfit(problem[name], settings.tokenizer)
        if reason:
            raise ampo.InputError(f"a {name} {reason}")
    gold = Gold(question, answer, settings.tokenizer)
    teachers = choose(traces_of(row, form), gold, report.left_out, where)
    problem["teachers"] = without_openings(teachers, settings.opening, report.notes, where)
    problem["solution"] = solution_of(row, form, gold, report.left_out, where)
    note_prompt(problem, report.notes, where)
    note_turns(at(row, form.question), report.notes, where)
    return {name: value for name, value in problem.items() if value}


def prompt_of(problem):
    """All that the student is told, without the hint."""
    return problem["system"] + "\n" + problem["question"]


def asks_for_box(problem):
    """Does the prompt ask for an answer that the verifier reads?"""
    prompt = prompt_of(problem)
    return "\\boxed" in prompt or "<answer>" in prompt


def with_instruction(problem, instruction):
    """The problem with the instruction at the end of its user messages, if it asks for no box."""
    if not instruction or asks_for_box(problem):
        return problem
    problem = dict(problem)
    for name in ("question", "hint"):
        if problem[name]:
            problem[name] += "\n" + instruction
    return problem


def fits(problem, settings):
    """Is the prompt short enough? Raises InputError for one that the chat template refuses."""
    if settings.tokenizer is None:
        return True
    try:
        prompt = ampo.encode_prompt(settings.tokenizer, problem["question"], problem["system"])
    except Exception as error:  # templates raise errors of their own, against system messages say
        raise ampo.InputError(f"messages that the chat template refuses ({error})")
    return settings.max_prompt_tokens is None or len(prompt) <= settings.max_prompt_tokens


def without_openings(teachers, opening, notes, where):
    """The traces without the <think> that the chat template writes itself.

    Adds their number to the tally `notes`.
    """
    if not opening:
        return teachers
    traces = {}
    for name, text in teachers.items():
        if text.startswith("<think>"):
            text = text.removeprefix("<think>").removeprefix(opening.removeprefix("<think>"))
            notes.add("traces lost the <think> that the chat template writes itself", where)
        traces[name] = text
    return traces


def note_prompt(problem, notes, where):
    """Add to the tally `notes` what the prompt asks for, unless it is what the verifier reads."""
    prompt = prompt_of(problem)
    for name, pattern in OTHER_ANSWER_FORMS.items():
        if pattern.search(prompt):
            notes.add(f"rows ask for '{name}', which the verifier does not read", where)
    if not asks_for_box(problem):
        notes.add("rows do not ask for \\boxed{}: see --instruction", where)


def note_turns(value, notes, where):
    """Add to the tally `notes` a conversation that leads up to the question: its end is kept."""
    messages = messages_of(value)
    roles = [role for role, _ in messages[:max(0, user_place(messages))]]
    if "user" in roles or "assistant" in roles:
        notes.add("conversations lost what came before the last question", where)


def convert_row(row, settings, report, where):
    """The problem in a row, None if there is none; adds what became of it to the report.

    Raises InputError for an unknown form before any row was taken: there may be no known one.
    """
    try:
        row = parse(row)
    except ampo.InputError as error:
        report.dropped.add(str(error), where)
        return None
    form = form_of(row, settings.forms)
    if form is None and report.taken == 0:
        names = ", ".join(row) if row else "none"
        raise ampo.InputError(f"{where}: no known form; its fields: {names}. Flags say where "
                              f"things are: {EXAMPLE}")
    if form is None:
        report.dropped.add("fields of no known form", where)
        return None
    try:
        return convert(row, form, settings, report, where)
    except ampo.InputError as error:
        report.dropped.add(str(error), where)
        return None


def convert_rows(inputs, file, settings):
    """Convert all rows into the open file. Returns the report."""
    report = Report()
    rows = chain.from_iterable(inputs)
    for where, row in tqdm(rows, unit=" rows", disable=None):
        report.rows += 1
        problem = convert_row(row, settings, report, where)
        if problem is None:
            continue
        file.write(json.dumps(problem) + "\n")
        report.taken += 1
        report.parts.update(problem.keys())
        report.traces.update(problem.get("teachers", {}).keys())
    return report


def convert_files(paths, out, settings):
    """Convert all files into `out`, which must be new; it is deleted again unless it is finished."""
    if out.exists():
        raise ampo.InputError(f"--out {out}: exists already, and is not overwritten")
    inputs = [read_rows(path, settings.forms) for path in paths]
    with open(out, "x", encoding="utf-8") as file:  # x: not even if it was made in the meantime
        try:
            report = convert_rows(inputs, file, settings)
            print(summary(report))
            if not report.taken:
                names = ", ".join(str(path) for path in paths)
                raise ampo.InputError(f"{names}: no row could be taken; nothing was written")
        except BaseException:
            out.unlink()
            raise


# ---------------------------------------------------------------------------------------------------
# The command line


def opening_of(tokenizer):
    """What the chat template begins the assistant's turn with: a <think> and what follows, or ""."""
    messages = [{"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    place = text.rfind("<think>")
    if place < 0 or text[place:].rstrip() != "<think>":
        return ""
    if "<think>" in tokenizer.all_special_tokens:
        return ""  # ampo.py refuses control tokens in traces
    return text[place:]


def load_tokenizer(name):
    """The tokenizer of a model. Libraries raise errors of many kinds for one that is not there."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        opening_of(tokenizer)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ampo.InputError(f"--model {name}: no tokenizer with a chat template in it ({first})")
    return tokenizer


def form_from_flags(args):
    """The form that the flags describe; None without any of them."""
    given = [args.question, args.answer, args.solution, args.hint, args.system, args.teacher]
    if not any(given):
        return None
    if not args.question or not args.answer:
        raise ampo.InputError("--question and --answer go together, and with the flags like them")
    teachers = {}
    for pair in args.teacher:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise ampo.InputError(f"--teacher {pair}: must be NAME=FIELD")
        teachers[name] = path
    return Form("flags", "", args.question, args.answer, args.solution, args.hint, args.system,
                teachers)


def settings_from(args):
    """The flags, checked, as Settings."""
    if args.max_prompt_tokens is not None and args.model is None:
        raise ampo.InputError("--max_prompt_tokens needs --model")
    form = form_from_flags(args)
    tokenizer = load_tokenizer(args.model) if args.model else None
    return Settings(
        forms=FORMS if form is None else (form,),
        instruction=args.instruction,
        tokenizer=tokenizer,
        max_prompt_tokens=args.max_prompt_tokens,
        opening=opening_of(tokenizer) if tokenizer else "",
    )


def refuse(message):
    """Flags that cannot be used are an InputError, like any other bad input."""
    raise ampo.InputError(message)


def parse_args(argv):
    """The command line."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("convert.py", description=about, allow_abbrev=False)
    parser.error = refuse
    add = parser.add_argument
    add("inputs", type=Path, nargs="+", metavar="IN", help="a set: .jsonl, .json or .parquet")
    add("--out", type=Path, required=True, help="the file to write; it must not exist")
    add("--question", default="", help="field of the question, or of messages")
    add("--answer", default="", help="field of the gold answer")
    add("--solution", default="", help="field of a solution, for ghpo")
    add("--hint", default="", help="field of a complete other user message, for guide")
    add("--system", default="", help="field of a system message")
    add("--teacher", action="append", default=[], metavar="NAME=FIELD",
        help="a teacher's traces; may be given several times; a list becomes NAME-1, NAME-2 ...")
    add("--instruction", default="", help="added to questions that do not ask for \\boxed{}")
    add("--model", help="the student: a <think> that its chat template writes leaves the traces")
    add("--max_prompt_tokens", type=int, help="drop rows with longer prompts, by --model")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        args = parse_args(argv)
        convert_files(args.inputs, args.out, settings_from(args))
    except KeyboardInterrupt:
        print("convert.py: stopped; nothing was written", file=sys.stderr)
        return 130
    except (ampo.InputError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
