"""Makes the file of an exercise: ampo.py with the bodies of some functions taken out, docstrings left in.

    python data/exercise.py group_advantages policy_objective > student.py
    AMPO_MODULE=student.py pytest test_ampo.py --tb=short -k "group_advantages or policy_objective"

Without names it lists the functions, with the names of the file that each one needs to be copied elsewhere.
"""
import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "ampo.py"


def definitions(tree):
    """{name: its node} of everything defined at the top level: functions, classes and constants."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            targets = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= {name.id: node for name in targets}
    return found


def needs(name, found):
    """The other top-level names that a definition uses, in its annotations too."""
    used = [node for node in ast.walk(found[name]) if isinstance(node, ast.Name)]
    local = {node.id for node in used if isinstance(node.ctx, ast.Store) and isinstance(found[name], ast.FunctionDef)}
    return sorted({node.id for node in used} & set(found) - local - {name})


def without_bodies(source, names):
    """The source with `raise NotImplementedError` for the bodies of these functions."""
    lines, found = source.splitlines(), definitions(ast.parse(source))
    for name in sorted(names, key=lambda name: -found[name].lineno):  # from the end, so that line numbers stay true
        first = found[name].body[bool(ast.get_docstring(found[name]))]
        lines[first.lineno - 1:found[name].end_lineno] = [f'    raise NotImplementedError("{name} is yours to write")']
    return "\n".join(lines) + "\n"


def main(names):
    source = SOURCE.read_text()
    found = definitions(ast.parse(source))
    functions = [name for name, node in found.items() if isinstance(node, ast.FunctionDef) and name[0] != "_"]
    if unknown := set(names) - set(functions):
        sys.exit(f"exercise.py: no function of ampo.py: {', '.join(sorted(unknown))}")
    if names:
        print(without_bodies(source, names), end="")
    else:
        print("\n".join(" ".join([f"{name:18}", *needs(name, found)]) for name in functions))


if __name__ == "__main__":
    main(sys.argv[1:])
