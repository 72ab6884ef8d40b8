"""Let a teacher model solve the problems of a file, and add what it solved under that teacher's name.

    python data/teach.py --model TEACHER --name big --data problems.jsonl --out one.jsonl --samples 8
    python data/teach.py --model ANOTHER --name old --data one.jsonl --out train.jsonl --samples 8

Of the correct responses to a problem the shortest one is kept. Run once a teacher, each on the file of the one before:
the last file is a multi-teacher pool. What stands in --data stays as it is, fields that ampo.py does not know included.
A run that was stopped goes on where it stopped when it is started again, and ends with the same file.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ampo  # the prompt format, the sampler and the verifier are those of training

# These flags have the defaults and the bounds that ampo.py gives them.
SAMPLING = {"max_new_tokens": "longest response, in tokens", "temperature": "temperature of the sampling",
            "seed": "seed of the sampling", "system": "system prompt; default: the chat template's own",
            "cache_tokens": "tokens in the KV cache of one sampling pass; changes memory and the samples drawn"}


def with_trace(row, name, text):
    """A copy of a row in which the teacher `name` says `text`; None takes the teacher out."""
    teachers = {other: trace for other, trace in (row.get("teachers") or {}).items() if other != name}
    return row | {"teachers": teachers | ({} if text is None else {name: text})}


def read_rows(path, name, problems):
    """The lines of the file as they are, one for each of its `problems`."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for problem in problems:
        ampo.refuse(name in problem.teachers, f"{problem.where}: field 'teachers': has a trace by {name!r} already")
    return [dict(json.loads(line)) for line in lines if line.strip()]


def read_done(out, rows, name):
    """-> the rows in `out` that are complete, and how many bytes they take; what follows is a torn line.

    Refuses a file that this run cannot have written: it would be added to, and cut where its last line looks torn.
    """
    content = out.read_bytes() if out.exists() else b""
    *lines, torn = content.split(b"\n")
    done = []
    for number, (line, row) in enumerate(zip(lines, rows), 1):
        try:
            done.append(dict(json.loads(line)))
            same = json.dumps(with_trace(done[-1], name, None)) == json.dumps(with_trace(row, name, None))
        except (ValueError, TypeError, AttributeError, RecursionError):
            same = False
        ampo.refuse(not same, f"{out}:{number}: is not a continuation of --data with --name {name}")
    # A torn line begins like the next row, as far as the teachers or, without any, as far as its end.
    begin = json.dumps(rows[len(done)]).split('"teachers"')[0].rstrip("}").encode() if len(done) < len(rows) else b""
    fits = len(lines) <= len(rows) and torn[:len(begin)] == begin[:len(torn)] and (begin or not torn)
    ampo.refuse(not fits, f"{out}: its end is not a continuation of --data")
    return done, len(content) - len(torn)


def has_room(student, problem):
    """Does the model's context hold the prompt and the longest response?"""
    context = getattr(student.model.config, "max_position_embeddings", math.inf)
    prompt = ampo.encode_prompt(student.tokenizer, problem.question, student.cfg.system)
    return len(prompt) + student.cfg.max_new_tokens <= context


def solve(student, problems, start):
    """The shortest correct response to each problem of one chunk; None for none, and for a problem that is None."""
    # A function of the seed and the place in the file alone, so that it does not matter where a run was stopped.
    torch.manual_seed(random.Random(f"{student.cfg.seed} {start}").getrandbits(63))
    asked = [problem for problem in problems if problem]
    groups = iter(ampo.rollout(student, asked, [problem.question for problem in asked]))
    correct = [[sample for sample in next(groups) if sample.correct] if problem else [] for problem in problems]
    return [min(group, key=lambda sample: len(sample.ids)).text if group else None for group in correct]


def teach(student, name, problems, rows, done, file, batch):
    """Solve the rows that are not in `done` yet, a chunk of `batch` at a time; each goes to the file as soon as it is
    there, and to `done`."""
    with tqdm(total=len(rows), initial=len(done), desc=name, unit=" problems") as bar:
        for start in range(len(done) // batch * batch, len(rows), batch):
            texts = solve(student, problems[start:start + batch], start)
            # A chunk that was stopped halfway through its writing is solved again: its samples depend on one another.
            pairs = list(zip(rows[start:start + batch], texts))[max(0, len(done) - start):]
            new = [row if text is None else with_trace(row, name, text) for row, text in pairs]
            file.write("".join(json.dumps(row) + "\n" for row in new).encode())
            file.flush()
            done += new
            bar.update(len(new))


def report(student, name, rows):
    """One line: how many problems the teacher solved, and how long the traces are without their end token."""
    traces = [row["teachers"][name] for row in rows if name in (row.get("teachers") or {})]
    sizes = [len(student.tokenizer(text, add_special_tokens=False).input_ids) for text in traces]
    length = f", mean length of kept traces {sum(sizes) / len(sizes):.1f} tokens" if sizes else ""
    return f"{name} solved {len(traces)} of {len(rows)} problems (yield {len(traces) / len(rows):.1%}){length}"


def parse_args(argv):
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="teach.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: ampo.refuse(True, message)
    parser.add_argument("--model", required=True, help="the teacher: a folder or hub name that transformers loads")
    parser.add_argument("--name", required=True, help="the name of its traces in the field 'teachers'")
    parser.add_argument("--data", required=True, help="problems; format in data/README.md")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, or to go on with")
    parser.add_argument("--samples", type=int, default=8, help="responses to each problem [8]")
    parser.add_argument("--batch", type=int, default=32, help="problems sampled and written at a time [32]")
    known = {f.name: f for f in fields(ampo.Config)}
    for name, text in SAMPLING.items():
        default = known[name].default
        parser.add_argument("--" + name, type=known[name].type, default=default, help=f"{text} [{default}]")
    args = parser.parse_args(argv)
    for name, least in [("samples", 1), ("batch", 1), *((name, known[name].metadata["least"]) for name in SAMPLING)]:
        value = getattr(args, name)
        ampo.refuse(least is not None and not value >= least, f"--{name} {value}: must be at least {least}")
    ampo.refuse(not args.name.strip(), "--name: is empty")
    return args


def run(args):
    """The whole run: all that can be refused first, then the sampling, then the report."""
    problems = ampo.load_problems(args.data)
    ampo.refuse(args.out.exists() and args.out.samefile(args.data), f"--out {args.out}: is --data itself")
    ampo.refuse(not args.out.parent.is_dir(), f"--out {args.out}: its folder does not exist")
    rows = read_rows(args.data, args.name, problems)
    done, size = read_done(args.out, rows, args.name)
    cfg = ampo.Config(model=args.model, data=args.data, group_size=args.samples,
                      **{name: getattr(args, name) for name in SAMPLING})
    student = ampo.load_student(args.model, cfg)
    problems = [problem if has_room(student, problem) else None for problem in problems]
    if None in problems:
        print(f"{args.data}: {problems.count(None)} questions leave no room for a response and are not sampled")
    with open(args.out, "ab") as file:
        file.truncate(size)
        if len(done) == len(rows):
            print(f"{args.out}: all {len(rows)} problems were done already")
        else:
            teach(student, args.name, problems, rows, done, file, args.batch)
    print(report(student, args.name, done))


def main(argv=None):
    """Entry point; returns the exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        run(parse_args(argv))
        return 0
    except KeyboardInterrupt:
        print("teach.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ampo.InputError, OSError) as error:
        print(f"teach.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
