"""Do the tests bite? Puts small faults into ampo.py, one at a time, and counts how many the tests notice.

    python data/mutate.py --functions policy_objective gae    # all faults in these functions
    python data/mutate.py --sample 300 --seed 0               # so many at random out of all
    python data/mutate.py --functions gae --list              # only show them

The faults: a flipped sign or operator, < for <=, == for !=, min for max, any for all, `and` for `or`, a dropped `not`,
a constant off by one (axes and positions among them), True for False, swapped branches, a dropped mask, a missing
detach or no_grad, a statement left out, a flag that is not read. A fault is caught when a test fails or runs over its
time; first the tests of the function's own class are tried, then all others.
"""
import argparse
import ast
import copy
import os
import random
import signal
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "test_ampo.py"
SECONDS = 120  # for one class of tests; all tests together get ten times as long

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Lt: ast.LtE,
         ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
         ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin", "argmax": "argmin",
         "floor": "ceil", "ceil": "floor", "sum": "mean", "mean": "sum", "log": "exp", "exp": "log"}
DROPPED = {"detach", "abs", "clamp", "exp", "float", "sum", "cumsum", "masked_fill", "clone", "strip"}  # x.detach() -> x


def variants(node, flags):
    """Every faulty form of one syntax node, as (what was done, new node)."""
    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield "operator", changed(op=SWAPS[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield from (("mask dropped", other) for one, other in ((node.left, node.right), (node.right, node.left))
                    if "mask" in ast.unparse(one))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", changed(ops=[SWAPS[type(node.ops[0])]()])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield "sign or not dropped", node.operand
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield from (("constant", changed(value=node.value + by)) for by in (1, -1))
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "constant", changed(value=not node.value)
    if isinstance(node, ast.Constant) and type(node.value) is float and node.value:
        yield "constant", changed(value=node.value * 2)
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "name", changed(attr=NAMES[node.attr])
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield "name", changed(id=NAMES[node.id])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
        yield f"{node.func.attr} dropped", node.func.value
    if isinstance(node, ast.Subscript) and "mask" in ast.unparse(node.slice):
        yield "mask dropped", node.value
    if isinstance(node, ast.IfExp):
        yield "branches swapped", changed(body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("cfg") and node.attr in flags:
        yield "flag not read", ast.Constant(flags[node.attr])


def spliced(source, node, text):
    """The source with the node's text replaced; positions of the syntax tree count bytes."""
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    return (b"".join(lines)[:start] + text.encode() + b"".join(lines)[end:]).decode()


def faults(source, wanted=()):
    """[(function, line, what, before, after, new source)] of every fault in the functions of a file."""
    tree, found = ast.parse(source), []
    config = next(node for node in tree.body if getattr(node, "name", "") == "Config")
    flags = {item.target.id: item.value.args[0].value for item in config.body
             if isinstance(item, ast.AnnAssign) and isinstance(item.value.args[0], ast.Constant)}
    functions = [(item.name, node) for item in tree.body for node in getattr(item, "body", [])
                 if isinstance(item, ast.ClassDef) and isinstance(node, ast.FunctionDef)]  # methods go by their class
    functions += [(item.name, item) for item in tree.body if isinstance(item, ast.FunctionDef)]
    for owner, function in functions:
        if wanted and owner not in wanted:
            continue
        for decorator in function.decorator_list:
            if "grad" in ast.unparse(decorator) or "inference" in ast.unparse(decorator):
                found.append((owner, decorator.lineno, "gradient not stopped", ast.unparse(decorator), "",
                              spliced(source, decorator, "(lambda function: function)")))
        for node in (inner for part in [function.args, *function.body] for inner in ast.walk(part)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                text = ast.unparse(node)
                found.append((owner, node.lineno, "statement dropped", text, "pass", spliced(source, node, "pass")))
            for what, new in variants(node, flags):
                before, after = ast.unparse(node), ast.unparse(new)
                found.append((owner, node.lineno, what, before, after, spliced(source, node, f"({after})")))
    return [fault for fault in found if compiles(fault[-1])]


def compiles(source):
    try:
        return bool(compile(source, "mutant", "exec"))
    except SyntaxError:
        return False


def fails(arguments, module, seconds):
    """Does pytest fail with these arguments? In a child that has everything imported already; no answer counts as yes."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        os.chdir(module.parent)  # whatever a faulty file may write
        os.environ["AMPO_MODULE"] = str(module)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        import pytest
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments]))
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL), os.waitpid(child, 0)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--functions", nargs="*", default=[], help="only faults in these; default: all functions")
    parser.add_argument("--sample", type=int, help="so many faults at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="only the tests of the function's own class")
    parser.add_argument("--list", action="store_true", help="show the faults, run nothing")
    args = parser.parse_args()
    found = faults((ROOT / "ampo.py").read_text(), args.functions)
    if args.sample:
        found = sorted(random.Random(args.seed).sample(found, args.sample), key=lambda fault: fault[1])
    os.environ["OMP_NUM_THREADS"] = "1"
    if not args.list:
        import pytest, torch, transformers  # noqa: once, before the forks
        from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: lazy imports
    caught, seconds = 0, time.time()
    for name, line, what, before, after, source in found:
        verdict = ""
        if not args.list:
            with tempfile.TemporaryDirectory() as folder:
                module = Path(folder) / "ampo.py"
                module.write_text(source)
                (module.parent / "data").symlink_to(ROOT / "data")
                own = "Test_same_answer" if name[0] == "_" else f"Test_{name}"  # all private ones serve it
                bitten = fails([f"{TESTS}::{own}"], module, SECONDS)
                if not bitten and not args.own:
                    bitten = fails([str(TESTS), "-k", f"not {own}"], module, 10 * SECONDS)
            caught += bitten
            verdict = "caught   " if bitten else "SURVIVED "
        print(f"{verdict}{name}:{line} {what}: {' '.join(before.split())[:90]}  ->  {' '.join(after.split())[:90]}", flush=True)
    if not args.list:
        print(f"{caught} of {len(found)} caught, in {time.time() - seconds:.0f} s")


if __name__ == "__main__":
    main()
