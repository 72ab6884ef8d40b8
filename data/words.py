"""Make sums and differences in words: what a small pretrained model fails and can learn.

    python data/words.py --out data/words        # a second; the same bytes for the same --seed

SmolLM2-135M-Instruct knows what 14+7 means, but hardly ever works such a story out and puts the
answer in a box. A problem is a story of some numbers up to 29: the first is there, each of the
others comes or goes. Its form is their signs: "+-" is a gain and then a loss. Training has the
forms of two to four numbers; ood_longer.jsonl has five, in stories that training never tells.

Four scripted teachers write differently, and none of them can do every form:

    steps    running totals, line by line         at most three numbers
    prose    running totals, in a sentence        at most one loss
    places   tens, then ones, then both           no loss
    sides    gains, then losses, the difference   three numbers or more, at least one loss

Alone they do 67, 81, 40 and 48 % of the training problems, together all of them. `solution` is
running totals line by line whatever the form, `hint` the numbers with their signs and the first
total.
Traces are short: SmolLM2's tokenizer makes at most 48 tokens of one, its end token included.

A guesser is almost never right: no answer makes up 2 % of a set, and none is a number of its own
question. One random generator draws everything, in the order in which it is called.
"""
import argparse
import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ampo  # the verifier is that of training

# Part of the question: the system prompt that a chat template writes by itself stays in place.
FORMAT = "Put the answer in \\boxed{}."


@dataclass(frozen=True)
class Scene:
    """The sentences of a story: {n} is a number, {who} somebody, {what} some things."""

    start: str
    gain: str
    loss: str
    ask: str


SCENES = (
    Scene("{who} has {n} {what}.", "{who} finds {n} more.", "{who} gives away {n}.",
          "How many {what} does {who} have now?"),
    Scene("A box holds {n} {what}.", "{who} puts in {n} more.", "{who} takes out {n}.",
          "How many {what} are in the box?"),
    Scene("A shop has {n} {what}.", "{n} more arrive.", "{n} are sold.",
          "How many {what} are left?"),
    Scene("{n} people are on a bus.", "{n} more get on.", "{n} get off.",
          "How many people are on the bus?"),
)
OTHER_SCENES = (
    Scene("{who}'s score is {n}.", "It goes up by {n}.", "It drops by {n}.",
          "What is the score at the end?"),
    Scene("There are {n} birds at a lake.", "{n} join them.", "{n} fly off.",
          "How many birds stay at the lake?"),
    Scene("A tank contains {n} litres.", "{n} litres are poured in.", "{n} litres leak out.",
          "How many litres does it contain then?"),
)
PEOPLE = ("Ana", "Ben", "Mia", "Tom", "Eva", "Sam")
THINGS = ("apples", "books", "cards", "coins", "pens", "stones")


# -------------------------------------------------------------------------------------------------
# Numbers

# `terms` are the numbers of a problem with their signs: (34, 27, -15) is 34+27-15.


def form_of(terms):
    """The signs after the first number: "+-" for (34, 27, -15)."""
    return "".join("+" if term > 0 else "-" for term in terms[1:])


def draw_terms(rng, length):
    """Terms whose totals are positive on the way, and whose answer is none of their numbers or
    earlier totals.

    All forms of one length are equally likely; half of the numbers have two digits.
    """
    signs = [1, *rng.choices([1, -1], k=length - 1)]
    while True:
        terms = []
        for sign in signs:
            number = rng.choice([rng.randint(2, 9), rng.randint(10, 29)])
            terms.append(sign * number)
        totals = list(accumulate(terms))
        if min(totals) < 1:
            continue
        if totals[-1] not in [*totals[:-1], *[abs(term) for term in terms]]:
            return tuple(terms)


# -------------------------------------------------------------------------------------------------
# The teachers

# A teacher takes terms and returns the lines of its trace without the answer: none for a form that
# it cannot do.


def running_totals(terms):
    """One line a step: 34+27=61, 61-15=46."""
    lines = []
    for term, (before, after) in zip(terms[1:], pairwise(accumulate(terms))):
        lines.append(f"{before}{term:+d}={after}")
    return lines


def addition(numbers):
    """The line that adds up some numbers; none where there is nothing to add."""
    if len(numbers) < 2:
        return []
    return ["+".join(map(str, numbers)) + f"={sum(numbers)}"]


def steps(terms):
    """Running totals, line by line. At most three numbers."""
    if len(terms) > 3:
        return []
    return running_totals(terms)


def prose(terms):
    """Running totals, in a sentence. At most one loss."""
    if form_of(terms).count("-") > 1:
        return []
    parts = [str(terms[0])]
    for term, total in zip(terms[1:], list(accumulate(terms))[1:]):
        word = "plus" if term > 0 else "minus"
        parts.append(f"{word} {abs(term)} is {total},")
    return [" ".join(parts).rstrip(",") + "."]


def places(terms):
    """Tens, then ones, then both together. No loss."""
    if "-" in form_of(terms):
        return []
    tens = [term - term % 10 for term in terms if term >= 10]
    ones = [term % 10 for term in terms if term % 10 > 0]
    both = [total for total in (sum(tens), sum(ones)) if total > 0]
    return addition(tens) + addition(ones) + addition(both)


def sides(terms):
    """Gains, then losses, then the difference. Three numbers or more, at least one loss."""
    if len(terms) < 3 or "-" not in form_of(terms):
        return []
    gains = [term for term in terms if term > 0]
    losses = [-term for term in terms if term < 0]
    difference = f"{sum(gains)}-{sum(losses)}={sum(terms)}"
    return [*addition(gains), *addition(losses), difference]


TEACHERS = {"steps": steps, "prose": prose, "places": places, "sides": sides}


def checked(question, lines, terms):
    """The text of a trace, once the verifier of training has found it right."""
    gold = str(sum(terms))
    text = "\n".join([*lines, f"\\boxed{{{gold}}}"])
    if not ampo.verify(text, gold, question):
        raise ValueError(f"a trace that is wrong: {text!r}")
    return text


# -------------------------------------------------------------------------------------------------
# Problems


def question_of(rng, terms, scenes):
    """The story: one scene, one person, one kind of thing."""
    scene = rng.choice(scenes)
    sentences = [scene.start, *[scene.gain if term > 0 else scene.loss for term in terms[1:]]]
    who = rng.choice(PEOPLE)
    what = rng.choice(THINGS)
    told = []
    for sentence, term in zip(sentences, terms):
        told.append(sentence.format(n=abs(term), who=who, what=what))
    return " ".join([*told, scene.ask.format(who=who, what=what), FORMAT])


def hint_of(question, terms):
    """A complete user message: the question, its numbers with their signs, the first total."""
    numbers = "".join(f"{term:+d}" for term in terms).lstrip("+")
    told = f"it is {numbers}"
    if len(terms) > 2:
        told += f", and {running_totals(terms)[0]}"
    return f"{question}\nHint: {told}."


def problem_of(rng, terms, scenes):
    """One line of a file."""
    question = question_of(rng, terms, scenes)
    traces = {}
    for name, teacher in TEACHERS.items():
        lines = teacher(terms)
        if lines:
            traces[name] = checked(question, lines, terms)
    return {
        "question": question,
        "answer": str(sum(terms)),
        "teachers": traces,
        "hint": hint_of(question, terms),
        "solution": checked(question, running_totals(terms), terms),
        "form": form_of(terms),
    }


def draw_set(rng, count, lengths, taken, scenes):
    """`count` problems, the lengths in turn. Adds their terms to `taken`, where none was before.

    Every answer makes up less than 2 %.
    """
    problems = []
    answers = Counter()
    most = math.ceil(count / 50) - 1
    while len(problems) < count:
        length = lengths[len(problems) % len(lengths)]
        terms = draw_terms(rng, length)
        if terms in taken or answers[sum(terms)] >= most:
            continue
        taken.add(terms)
        answers[sum(terms)] += 1
        problems.append(problem_of(rng, terms, scenes))
    return problems


def draw_all_sets(seed):
    """{name: problems} of all files."""
    rng = random.Random(seed)
    taken = set()
    lengths = [2, 3, 4]
    return {
        "test": draw_set(rng, 128, lengths, taken, SCENES),
        "valid": draw_set(rng, 64, lengths, taken, SCENES),
        "ood_longer": draw_set(rng, 64, [5], taken, OTHER_SCENES),
        "train": draw_set(rng, 600, lengths, taken, SCENES),
    }


def write_sets(sets, folder):
    """A JSONL file for each set, and a line about it on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in sets.items():
        lines = [json.dumps(problem) + "\n" for problem in problems]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        able = Counter()
        for problem in problems:
            able.update(list(problem["teachers"]))
        shares = [f"{teacher} {able[teacher] / len(problems):.0%}" for teacher in TEACHERS]
        print(f"{name:10} {len(problems):5d} problems", *shares, sep="   ")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "words")
    args = parser.parse_args(argv)
    write_sets(draw_all_sets(args.seed), args.out)


if __name__ == "__main__":
    main()
