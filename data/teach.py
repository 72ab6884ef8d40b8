"""Let a teacher model solve the problems of a file, and add what it solved under its name.

    python data/teach.py --model TEACHER --name big --data problems.jsonl --out one.jsonl
    python data/teach.py --model ANOTHER --name old --data one.jsonl --out train.jsonl

Of the correct responses to a problem the shortest one is kept. Run once a teacher, each time on the
file of the one before, it makes a pool of several. What stands in --data stays as it is, fields
that ampo.py does not know included. A run that was stopped goes on where it stopped when it is
started again, and ends with the same file.
"""
import argparse
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import ampo  # the prompts, the sampler and the verifier are those of training
from convert import opening_of, refuse


@dataclass(frozen=True)
class Teacher:
    """A model and what it takes to sample from it."""

    name: str
    model: object
    tokenizer: object
    eos: list            # the ids that end a response
    opening: str         # a <think> that the chat template writes, which is part of the trace
    max_new_tokens: int
    args: object         # the command line


# ---------------------------------------------------------------------------------------------------
# The files: what was written before is never written over


def with_trace(row, name, text):
    """A copy of a row in which the teacher `name` says `text`."""
    teachers = dict(row.get("teachers") or {})
    teachers[name] = text
    return {**row, "teachers": teachers}


def without_trace(row, name):
    """A copy of a row in which the teacher `name` says nothing."""
    teachers = dict(row.get("teachers") or {})
    teachers.pop(name, None)
    return {**row, "teachers": teachers}


def read_rows(path, name, problems):
    """The rows of the file as they are, one for each of its `problems`."""
    for problem in problems:
        if name in problem.teachers:
            raise ampo.InputError(
                f"{problem.where}: field 'teachers': has a trace by {name!r} already")
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    return [dict(json.loads(line)) for line in lines if line.strip()]


def is_same_row(line, row, name):
    """Is the line this row, but for what the teacher `name` says?"""
    try:
        done = dict(json.loads(line))
        done = without_trace(done, name)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False
    return json.dumps(done) == json.dumps(without_trace(row, name))


def is_torn_row(torn, row):
    """Is `torn` (bytes) how the line of this row begins?

    The lines of a row with and without a trace are alike as far as the teachers or, where there
    are none, as far as the end.
    """
    begin = json.dumps(row).split('"teachers"')[0].rstrip("}").encode()
    return torn[:len(begin)] == begin[:len(torn)]


def read_done(out, rows, name):
    """-> the rows in `out` that are complete, and how many bytes they take.

    What follows is a line that was torn when the run was stopped. Raises InputError for a file
    that this run cannot have written: it would be added to, and cut where its end looks torn.
    """
    content = out.read_bytes() if out.exists() else b""
    *lines, torn = content.split(b"\n")
    if len(lines) > len(rows):
        raise ampo.InputError(f"{out}:{len(rows) + 1}: is not a continuation of --data, too long")
    done = []
    for number, line in enumerate(lines, 1):
        if not is_same_row(line, rows[number - 1], name):
            raise ampo.InputError(
                f"{out}:{number}: is not a continuation of --data with --name {name}")
        done.append(json.loads(line))
    if torn and (len(done) == len(rows) or not is_torn_row(torn, rows[len(done)])):
        raise ampo.InputError(f"{out}: its end is not a continuation of --data")
    return done, len(content) - len(torn)


# ---------------------------------------------------------------------------------------------------
# The teacher


def end_tokens(tokenizer, model):
    """The ids that end a response: the tokenizer's, and those of the generation config."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = []
    if isinstance(ids, int):
        ids = [ids]
    ids = [tokenizer.eos_token_id, *ids]
    return [i for i in dict.fromkeys(ids) if i is not None]


def load_teacher(args):
    """The model on the best device there is. Libraries raise errors of many kinds for a bad one."""
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    elif torch.backends.mps.is_available():
        device = "mps"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
        opening = opening_of(tokenizer)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ampo.InputError(f"--model {args.model}: cannot be loaded ({first})")
    # Half of the context is left to the prompt.
    max_new_tokens = min(args.max_new_tokens, context_of(model) // 2)
    return Teacher(args.name, model, tokenizer, end_tokens(tokenizer, model), opening,
                   max_new_tokens, args)


def context_of(model):
    """How many tokens the model can read; a large number where its config does not say."""
    return getattr(model.config, "max_position_embeddings", 10**9)


def has_room(teacher, prompt):
    """Does the context hold the prompt and the longest response?"""
    return len(prompt) + teacher.max_new_tokens <= context_of(teacher.model)


def prompt_of(teacher, problem):
    """Token ids of a problem's prompt, under its own system message or the one of --system."""
    system = problem.system
    if not system:
        system = teacher.args.system
    return ampo.encode_prompt(teacher.tokenizer, problem.question, system)


def sample(teacher, prompts):
    """Responses to each prompt, so many prompts at a time as the KV cache has room for."""
    longest = max(len(prompt) for prompt in prompts) + teacher.max_new_tokens
    size = max(1, teacher.args.cache_tokens // (teacher.args.samples * longest))
    groups = []
    for start in range(0, len(prompts), size):
        groups += ampo.generate(teacher.model, prompts[start:start + size], teacher.args.samples,
                                teacher.max_new_tokens, teacher.args.temperature, teacher.eos)
    return groups


def shortest_correct(teacher, problem, responses):
    """The text of the shortest response that is whole and right; None if there is none."""
    best = None
    for ids, _ in sorted(responses, key=lambda response: len(response[0])):
        if best is not None or ids[-1] not in teacher.eos:
            continue  # cut off: it may be right, but it would teach not to end
        text = teacher.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.startswith("<think>"):
            text = teacher.opening + text
        if ampo.verify(text, problem.answer, problem.question):
            best = text
    return best


def solve(teacher, problems, start):
    """A trace for each problem of one batch; None where none is right or the prompt is too long."""
    # A function of the seed and the place in the file, so that a run may stop anywhere.
    seed = random.Random(f"{teacher.args.seed} {start}").getrandbits(63)
    torch.manual_seed(seed)
    prompts = [prompt_of(teacher, problem) for problem in problems]
    asked = [i for i, prompt in enumerate(prompts) if has_room(teacher, prompt)]
    texts = [None] * len(problems)
    if not asked:
        return texts
    groups = sample(teacher, [prompts[i] for i in asked])
    for i, responses in zip(asked, groups):
        texts[i] = shortest_correct(teacher, problems[i], responses)
    return texts


# ---------------------------------------------------------------------------------------------------
# The run


def teach(teacher, problems, rows, done, file):
    """Solve the rows that are not in `done` yet. Returns all rows, as they stand in the file.

    Each batch goes to the file as soon as it is there.
    """
    finished = list(done)
    solved = len(traces_in(done, teacher.name))
    batch = teacher.args.batch
    # A batch that was stopped halfway through its writing is solved again, to the same end.
    first = len(done) // batch * batch
    with tqdm(total=len(rows), initial=len(done), desc=teacher.name, unit=" problems") as bar:
        for start in range(first, len(rows), batch):
            texts = solve(teacher, problems[start:start + batch], start)
            new = []
            for row, text in zip(rows[start:start + batch], texts):
                new.append(row if text is None else with_trace(row, teacher.name, text))
            new = new[len(finished) - start:]
            lines = "".join(json.dumps(row) + "\n" for row in new)
            file.write(lines.encode())
            file.flush()
            finished += new
            solved += len(traces_in(new, teacher.name))
            bar.set_postfix_str(f"yield {solved / len(finished):.0%}")
            bar.update(len(new))
    return finished


def traces_in(rows, name):
    """All that the teacher `name` says in the rows."""
    found = [(row.get("teachers") or {}).get(name) for row in rows]
    return [text for text in found if text is not None]


def report(teacher, rows):
    """How many problems the teacher solved, and how long the traces are without their end token."""
    traces = traces_in(rows, teacher.name)
    share = len(traces) / len(rows)
    line = f"{teacher.name} solved {len(traces)} of {len(rows)} problems (yield {share:.1%})"
    if traces:
        sizes = [len(ids) for ids in teacher.tokenizer(traces, add_special_tokens=False).input_ids]
        line += f", mean length of kept traces {sum(sizes) / len(sizes):.1f} tokens"
    return line


def run(args):
    """The whole run: all that can be refused first, then the sampling, then the report."""
    problems = ampo.load_problems(args.data)
    if args.out.exists() and args.out.samefile(args.data):
        raise ampo.InputError(f"--out {args.out}: is --data itself")
    if not args.out.parent.is_dir():
        raise ampo.InputError(f"--out {args.out}: its folder does not exist")
    rows = read_rows(args.data, args.name, problems)
    done, size = read_done(args.out, rows, args.name)
    teacher = load_teacher(args)
    note_long_prompts(teacher, problems)
    with open(args.out, "ab") as file:
        file.truncate(size)
        if len(done) == len(rows):
            print(f"{args.out}: all {len(rows)} problems were done already")
        else:
            done = teach(teacher, problems, rows, done, file)
    print(report(teacher, done))


def note_long_prompts(teacher, problems):
    """Say how many problems are not sampled, and where the first one stands."""
    long = []
    for problem in problems:
        if not has_room(teacher, prompt_of(teacher, problem)):
            long.append(problem)
    if long:
        print(f"{len(long)} of {len(problems)} questions leave no room for a response and are "
              f"not sampled (first: {long[0].where})")


def parse_args(argv):
    """The command line, checked."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("teach.py", description=about, allow_abbrev=False)
    parser.error = refuse
    add = parser.add_argument
    add("--model", required=True, help="the teacher: a folder or hub name that transformers loads")
    add("--name", required=True, help="the name of its traces in the field 'teachers'")
    add("--data", required=True, help="problems; format in data/README.md")
    add("--out", type=Path, required=True, help="the file to write, or to go on with")
    add("--samples", type=int, default=8, help="responses to each problem [8]")
    add("--batch", type=int, default=32, help="problems solved and written at a time [32]")
    add("--max_new_tokens", type=int, default=2048,
        help="longest response, in tokens; at most half of the model's context [2048]")
    add("--temperature", type=float, default=1.0, help="temperature of the sampling [1.0]")
    add("--seed", type=int, default=0, help="seed of the sampling [0]")
    add("--system", default="", help="system prompt of rows without one [the template's own]")
    add("--cache_tokens", type=int, default=40000,
        help="tokens in the KV cache at a time: memory, speed and which samples are drawn [40000]")
    args = parser.parse_args(argv)
    for name in ("samples", "batch", "max_new_tokens", "cache_tokens"):
        if getattr(args, name) < 1:
            raise ampo.InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ampo.InputError(f"--temperature {args.temperature}: must be at least 0")
    if not args.name.strip():
        raise ampo.InputError("--name: is empty")
    return args


def main(argv=None):
    """Returns the exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        run(parse_args(argv))
    except KeyboardInterrupt:
        print("teach.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ampo.InputError, OSError) as error:
        print(f"teach.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
