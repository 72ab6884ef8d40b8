"""Makes the file of an exercise: ampo.py without the bodies of some functions, docstrings left in.

    python data/exercise.py gae > student.py
    AMPO_MODULE=student.py pytest test_ampo.py::Test_gae

Several names take out several bodies. Without names it lists the functions, each with the names
of the file that it needs to be copied elsewhere.
"""
import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "ampo.py"


def definitions(tree):
    """{name: node} of all that is defined at the top level: functions, classes, constants."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    found[name.id] = node
    return found


def needs(name, found):
    """The other top-level names that a definition uses, in its annotations too."""
    node = found[name]
    used = set()
    local = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            used.add(inner.id)
            if isinstance(inner.ctx, ast.Store):
                local.add(inner.id)
        elif isinstance(inner, ast.arg):
            local.add(inner.arg)
    if not isinstance(node, ast.FunctionDef):
        local = set()
    return sorted(used & set(found) - local - {name})


def without_bodies(source, names):
    """The source with `raise NotImplementedError` for the bodies of these functions."""
    lines = source.splitlines()
    found = definitions(ast.parse(source))
    from_the_end = sorted(names, key=lambda name: -found[name].lineno)
    for name in from_the_end:  # so that the line numbers before it stay true
        node = found[name]
        body = node.body
        if ast.get_docstring(node) is not None:
            body = body[1:]
        stub = f'    raise NotImplementedError("{name} is yours to write")'
        lines[body[0].lineno - 1:node.end_lineno] = [stub]
    return "\n".join(lines) + "\n"


def main(names):
    source = SOURCE.read_text(encoding="utf-8")
    found = definitions(ast.parse(source))
    functions = []
    for name, node in found.items():
        if isinstance(node, ast.FunctionDef) and not name.startswith("_"):
            functions.append(name)
    unknown = set(names) - set(functions)
    if unknown:
        sys.exit(f"exercise.py: no function of ampo.py: {', '.join(sorted(unknown))}")
    if names:
        print(without_bodies(source, names), end="")
        return
    for name in functions:
        print(" ".join([f"{name:18}", *needs(name, found)]))


if __name__ == "__main__":
    main(sys.argv[1:])
