"""Do the tests bite? Puts faults into ampo.py, one at a time, and counts those that tests notice.

    python data/mutate.py --functions policy_objective gae    # all faults in these functions
    python data/mutate.py --own --sample 300 --seed 0         # so many at random out of all
    python data/mutate.py --functions gae --list              # only show them

The faults: a flipped sign or operator, < for <=, == for !=, min for max, any for all, `and` for
`or`, a dropped `not`, a constant off by one (axes and positions among them) or doubled, True for
False, swapped branches, a dropped mask, a missing detach or no_grad, a statement left out, a flag
that is not read. A fault is caught when a test fails or runs over its time. First the function's
own class of tests is tried, Test_<its name> or what TESTED_BY says, then, without --own, all
others.
"""
import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_FILES = ("test_ampo.py", "data/test_running.py")
SECONDS = 120  # for one class of tests; all tests together get ten times as long

# Functions that have no class of their own, and the classes that test them.
TESTED_BY = {
    "trace_lead": ["Test_comprehension"],
    "solution_prefix": ["Test_guide_ghpo"],
    "guide_grpo": ["TestWorkedExamples"],
    "guide_sft": ["TestWorkedExamples"],
    "encode": ["Test_teacher_samples", "Test_comprehension"],
    "read_flags": ["Test_open_run"],
    "prompt_of": ["Test_rollout", "Test_teacher_samples"],
    "with_advantage": ["Test_add_advantages"],
    "batch_loss": ["Test_update"],
    "score_samples": ["Test_update", "Test_with_gae", "Test_guided_gamma"],
    "mean": ["Test_step_metrics"],
    "flatten": ["Test_step_metrics"],
    "chunks": ["Test_rollout", "Test_generate"],
    "unflatten": ["Test_score"],
    "tokens_of": ["Test_rollout", "Test_token_weights"],
    "write_text": ["Test_train", "Test_open_run"],
    "run": ["Test_main"],
}
# All of §7 serves its four public functions.
VERIFIER = ["Test_same_answer", "Test_extract_answer", "Test_gives_answer", "Test_verify"]

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin",
    "argmax": "argmin", "minimum": "maximum", "maximum": "minimum", "floor": "ceil",
    "ceil": "floor", "sum": "mean", "mean": "sum", "log": "exp", "exp": "log",
}
DROPPED = "detach abs clamp exp float sum cumsum masked_fill clone strip".split()  # x.detach() -> x


def changed(node, **fields):
    """A copy of a syntax node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def wrong_operators(node):
    """Faults in operators and comparisons, as (what was done, new node)."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        yield "operator", changed(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if "mask" in ast.unparse(node.left):
            yield "mask dropped", node.right
        if "mask" in ast.unparse(node.right):
            yield "mask dropped", node.left
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", changed(node, ops=[COMPARISONS[type(node.ops[0])]()])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield "sign or not dropped", node.operand
    if isinstance(node, ast.IfExp):
        yield "branches swapped", changed(node, body=node.orelse, orelse=node.body)


def wrong_constants(node):
    """Faults in constants, as (what was done, new node)."""
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if type(value) is bool:
        yield "constant", changed(node, value=not value)
    elif type(value) is int:
        yield "constant", changed(node, value=value + 1)
        yield "constant", changed(node, value=value - 1)
    elif type(value) is float and value:
        yield "constant", changed(node, value=value * 2)


def wrong_names(node, flags):
    """Faults in names, calls and subscripts, as (what was done, new node)."""
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield "name", changed(node, id=NAMES[node.id])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "name", changed(node, attr=NAMES[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in DROPPED:
            yield f"{node.func.attr} dropped", node.func.value
    if isinstance(node, ast.Subscript) and "mask" in ast.unparse(node.slice):
        yield "mask dropped", node.value
    if isinstance(node, ast.Attribute) and node.attr in flags:
        if ast.unparse(node.value).endswith("cfg"):
            yield "flag not read", ast.Constant(flags[node.attr])


def spliced(source, node, text):
    """The source with the node's text replaced; positions of the syntax tree count bytes."""
    lines = source.encode().splitlines(keepends=True)
    whole = b"".join(lines)
    start = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    return (whole[:start] + text.encode() + whole[end:]).decode()


def flag_defaults(tree):
    """{name: default} of the fields of Config."""
    flags = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    flags[item.target.id] = item.value
    for name, value in flags.items():
        if isinstance(value, ast.Call):  # as in field(default)
            flags[name] = value.args[0]
    return {name: node.value for name, node in flags.items() if isinstance(node, ast.Constant)}


def functions_of(tree):
    """(name, node) of each function. Methods go by the name of their class."""
    functions = []
    for item in tree.body:
        if isinstance(item, ast.FunctionDef):
            functions.append((item.name, item))
        if isinstance(item, ast.ClassDef):
            methods = [node for node in item.body if isinstance(node, ast.FunctionDef)]
            functions += [(item.name, node) for node in methods]
    return functions


def faults_in(function, flags):
    """(node, what was done, its new text) of every fault in one function."""
    found = []
    for decorator in function.decorator_list:
        text = ast.unparse(decorator)
        if "grad" in text or "inference" in text:
            found.append((decorator, "gradient not stopped", "(lambda function: function)"))
    for part in [function.args, *function.body]:
        for node in ast.walk(part):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                found.append((node, "statement dropped", "pass"))
            variants = [*wrong_operators(node), *wrong_constants(node), *wrong_names(node, flags)]
            for what, new in variants:
                found.append((node, what, f"({ast.unparse(new)})"))
    return found


def faults(source, wanted=()):
    """[(function, line, what, before, after, new source)] of every fault in a file's functions."""
    tree = ast.parse(source)
    flags = flag_defaults(tree)
    found = []
    for name, function in functions_of(tree):
        if wanted and name not in wanted:
            continue
        for node, what, text in faults_in(function, flags):
            new_source = spliced(source, node, text)
            if compiles(new_source):
                before = ast.unparse(node)
                after = text.removeprefix("(").removesuffix(")")
                found.append((name, node.lineno, what, before, after, new_source))
    return found


def compiles(source):
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def own_classes(source):
    """{function of ampo.py: the classes that test it, as pytest names them}; none: an empty list."""
    there = {}
    for path in TEST_FILES:
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                there[node.name] = f"{path}::{node.name}"
    verifier = source[source.find("# §7 "):source.find("# §8 ")]
    serves = {}
    for name, _ in functions_of(ast.parse(source)):
        classes = TESTED_BY.get(name, [])
        if f"Test_{name}" in there:
            classes = [f"Test_{name}"]
        elif f"\ndef {name}(" in verifier:
            classes = VERIFIER
        serves[name] = [there[one] for one in classes if one in there]
    return serves


def fails(folder, arguments, seconds):
    """Does pytest fail? In a child that has all imported already; no answer counts as yes."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        os.chdir(folder)  # whatever a faulty file may write
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import pytest
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments]))
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def is_caught(source, classes, own):
    """Do the tests notice this source? They lie beside it, so that none is skipped."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        (folder / "ampo.py").write_text(source, encoding="utf-8")
        for path in TEST_FILES:
            shutil.copy(ROOT / path, folder / path)
        for path in (ROOT / "data").iterdir():
            if not (folder / "data" / path.name).exists():
                (folder / "data" / path.name).symlink_to(path)
        if classes and fails(folder, classes, SECONDS * len(classes)):
            return True
        if own:
            return False
        others = [f"--deselect={name}" for name in classes]
        return fails(folder, [*TEST_FILES, *others], 10 * SECONDS)


def short(text):
    return " ".join(text.split())[:90]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--functions", nargs="*", default=[], help="faults in these; default: all")
    parser.add_argument("--sample", type=int, help="so many faults at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="only the tests of the function itself")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    return parser.parse_args()


def main():
    args = parse_args()
    source = (ROOT / "ampo.py").read_text(encoding="utf-8")
    found = faults(source, args.functions)
    if args.sample and args.sample < len(found):
        found = random.Random(args.seed).sample(found, args.sample)
        found.sort(key=lambda fault: fault[1])
    if args.list:
        for name, line, what, before, after, _ in found:
            print(f"{name}:{line} {what}: {short(before)}  ->  {short(after)}")
        return

    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest, torch, transformers  # noqa: F401, once, before the forks
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: F401, lazy imports
    sys.dont_write_bytecode = True  # of sources that are thrown away
    serves = own_classes(source)
    classes = set()
    for name in sorted({fault[0] for fault in found}):
        classes.update(serves[name])
        if not serves[name]:
            print(f"no class tests {name}")
    if is_caught(source, sorted(classes), own=True):
        sys.exit("mutate.py: the tests fail without any fault")
    caught = 0
    start = time.time()
    for name, line, what, before, after, new_source in found:
        bitten = is_caught(new_source, serves[name], args.own)
        caught += bitten
        word = "caught  " if bitten else "SURVIVED"
        print(f"{word} {name}:{line} {what}: {short(before)}  ->  {short(after)}", flush=True)
    print(f"{caught} of {len(found)} caught, in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
