"""Change one operator or number of a module at a time, and count the changes that no test notices.

    python -m benchmarks.mutate clcnet/metrics.py clcnet/intervals.py --sample 100

Each mutant runs, in a copy of the tree, tests/test_MODULE.py (where there is none, the test files that import the
module) and tests/test_figures*.py, until one fails. Counts and survivors go to benchmarks/results/mutations.md; exit
code 1 if there are survivors.
"""

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutations.md"
NUM_PROCESSES = 2
SWAPS = ("Lt LtE", "Gt GtE", "Eq NotEq", "Is IsNot", "In NotIn", "And Or", "Add Sub", "Mult Div", "BitAnd BitOr")
OPERATORS = {getattr(ast, a): getattr(ast, b) for a, b in map(str.split, SWAPS)}
OPERATORS |= {new: old for old, new in OPERATORS.items()}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.Mult}
NAMES = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all", "floor": "ceil"}
NAMES |= {new: old for old, new in NAMES.items()}
SIDES = {"left": "right", "right": "left"}
TYPES = ("annotation", "returns")
UNCHANGED = ast.Raise | ast.Assert | ast.Import | ast.ImportFrom  # no figure comes from messages


class Mutant(NamedTuple):
    path: Path
    line: int
    text: str  # of the whole module
    diff: str


def changes(node: Any) -> Iterator[tuple[str, object]]:
    """Fields of a node with what may stand in their place."""
    match node:
        case ast.Compare():
            for place, op in enumerate(node.ops):
                yield "ops", [*node.ops[:place], OPERATORS[type(op)](), *node.ops[place + 1 :]]
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield "op", OPERATORS[type(node.op)]()
        case ast.UnaryOp():
            yield "operand", ast.UnaryOp(node.op, node.operand)
        case ast.Constant(value=bool()):
            yield "value", not node.value
        case ast.Constant(value=int() | float()):
            yield "value", node.value + 1
        case ast.Constant(value="left" | "right"):
            yield "value", SIDES[node.value]
        case ast.Name() if node.id in NAMES:
            yield "id", NAMES[node.id]
        case ast.Attribute() if node.attr in NAMES:
            yield "attr", NAMES[node.attr]
        case ast.Slice():
            yield "lower", ast.Constant(1) if node.lower is None else ast.BinOp(node.lower, ast.Add(), ast.Constant(1))
            if node.upper is not None:
                yield "upper", ast.BinOp(node.upper, ast.Add(), ast.Constant(1))
        case ast.IfExp() | ast.If():
            yield "test", ast.UnaryOp(ast.Not(), node.test)
        case ast.Return(value=ast.Compare() | ast.BoolOp() | ast.Call(func=ast.Name(id="bool"))):
            yield "value", ast.UnaryOp(ast.Not(), node.value)
        case ast.Return() if node.value is not None and "nan" not in ast.unparse(node.value):
            yield "value", ast.UnaryOp(ast.USub(), node.value)


def inner_nodes(node: ast.AST, whole: ast.AST | None = None) -> Iterator[tuple[Any, ast.AST]]:
    """All nodes below that can sway a figure, types apart, each with the one to be written anew: an f-string whole."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in TYPES and not isinstance(child, UNCHANGED):
                written = whole or child
                yield child, written
                yield from inner_nodes(child, written if isinstance(written, ast.JoinedStr) else None)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a module."""
    source = (ROOT / path).read_text(encoding="utf-8")
    lines = source.encode().splitlines(keepends=True)  # columns of the syntax tree are bytes
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    for node, whole in inner_nodes(ast.parse(source)):
        for field, value in changes(node):
            old: Any = node.test if isinstance(node, ast.If) else whole
            before = getattr(node, field)
            setattr(node, field, value)
            new = node.test if isinstance(node, ast.If) else whole
            words = f"({ast.unparse(new)})" if isinstance(new, ast.expr) else ast.unparse(new)
            setattr(node, field, before)
            if isinstance(new, ast.Slice | ast.Constant | ast.Name | ast.Attribute):
                words = words[1:-1]
            begin, end = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            text = (source.encode()[:begin] + words.encode() + source.encode()[end:]).decode()
            diff = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm=""))[3:]
            yield Mutant(path, old.lineno, text, "\n".join(diff))


def tests_of(path: Path) -> list[str]:
    """The module's own tests, or else those that import it, and the figures of all scripts."""
    module = ".".join(path.with_suffix("").parts)
    parent = ".".join(path.parent.parts)
    imports = re.compile(rf"{re.escape(module)}\b|from {re.escape(parent)} import .*\b{path.stem}\b")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    own = [file for file in files if file.stem == f"test_{path.stem}"]
    chosen = own or [file for file in files if imports.search(file.read_text(encoding="utf-8"))]
    figures = [file for file in files if file.stem.startswith("test_figures")]
    return list(dict.fromkeys(str(file.relative_to(ROOT)) for file in [*chosen, *figures]))


def left_out(folder: str, names: list[str]) -> list[str]:
    """What a copy of the tree can do without: hidden files, and data in the tree's root."""
    return [name for name in names if name[0] == "." or name == "__pycache__" or Path(folder, name) == ROOT / "data"]


def fails(tree: Path, tests: list[str], limit: float | None = None) -> bool:
    """Whether one of the tests fails, or they take longer than the limit in seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return bool(process.wait(limit))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def survivors_of(mutants: list[Mutant], tests: list[str], trees: list[Path]) -> list[Mutant]:
    """The mutants that no test notices; each copy of the tree serves one process."""
    started = time.perf_counter()
    if fails(trees[0], tests):
        sys.exit(f"error: {' '.join(tests)} fail before anything is changed")
    limit = 10 + 4 * (time.perf_counter() - started)
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def survives(mutant: Mutant) -> bool:
        tree = free.get()
        (tree / mutant.path).write_text(mutant.text, encoding="utf-8")
        survived = not fails(tree, tests, limit)
        shutil.copy(ROOT / mutant.path, tree / mutant.path)
        free.put(tree)
        if survived:
            print(f"{mutant.path}:{mutant.line}\n{mutant.diff}\n", flush=True)
        return survived

    with ThreadPoolExecutor(len(trees)) as pool:
        return [mutant for mutant, survived in zip(mutants, pool.map(survives, mutants), strict=True) if survived]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", type=Path, help="files of the package, as clcnet/metrics.py")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="test files in place of those above")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    args = parser.parse_args()
    table, listed = "| Module | Mutants | Killed | Survived |\n| :-- | --: | --: | --: |\n", ""
    with tempfile.TemporaryDirectory() as folder:
        trees = [shutil.copytree(ROOT, Path(folder, str(n), "clcnet"), ignore=left_out) for n in range(NUM_PROCESSES)]
        for path in args.modules:
            mutants = list(mutants_of(path))
            mutants = random.Random(args.seed).sample(mutants, min(args.sample or len(mutants), len(mutants)))
            alive = survivors_of(mutants, args.tests or tests_of(path), trees)
            table += f"| `{path}` | {len(mutants)} | {len(mutants) - len(alive)} | {len(alive)} |\n"
            listed += "".join(f"\n`{it.path}:{it.line}`\n```diff\n{it.diff}\n```\n" for it in sorted(alive))
    command = " ".join(["python -m benchmarks.mutate", *sys.argv[1:]])
    RESULT.write_text(f"Made by `{command}`.\n\n{table}{listed}", encoding="utf-8")
    print(table)
    sys.exit(bool(listed))


if __name__ == "__main__":
    main()
