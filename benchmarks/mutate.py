"""Change one operator or number of a module at a time, and count the changes that no test notices.

    python -m benchmarks.mutate clcnet/metrics.py clcnet/intervals.py --sample 100

In a copy of the tree, tests/test_MODULE.py (where there is none, the test files that import the module) and
tests/test_figures*.py run once as the module is. Each mutant then runs those tests that came by the changed function,
quickest first, until one fails; libraries are imported once, for processes that are forked. Counts and survivors go to
benchmarks/results/mutations.json and .md, beside those of the modules counted before. Survivors that change nothing
stand with the reason in benchmarks/mutate.toml; exit code 1 if there are others.
"""

import argparse
import ast
import difflib
import functools
import gc
import inspect
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutations.json"
REASONS = ROOT / "benchmarks" / "mutate.toml"
LIBRARIES = "torch torchvision timm pandas pyarrow scipy.stats sklearn.metrics hypothesis pytest".split()
QUICK = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
LONGEST = 60  # seconds of a test that is worth it, where a quicker one comes by the line
FORKED = multiprocessing.get_context("forkserver")
SWAPS = ("Lt LtE", "Gt GtE", "Eq NotEq", "Is IsNot", "In NotIn", "And Or", "Add Sub", "Mult Div", "BitAnd BitOr")
OPERATORS = {getattr(ast, a): getattr(ast, b) for a, b in map(str.split, SWAPS)}
OPERATORS |= {new: old for old, new in OPERATORS.items()}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.Mult}
NAMES = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all", "floor": "ceil"}
NAMES |= {new: old for old, new in NAMES.items()}
SIDES = {"left": "right", "right": "left"}
CONTRARY = ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn
TYPES = ("annotation", "returns")
NOT_NUMBERS = ast.Tuple | ast.List | ast.Dict | ast.ListComp | ast.DictComp | ast.JoinedStr  # have no negative
UNCHANGED = ast.Raise | ast.Assert | ast.Import | ast.ImportFrom  # no figure comes from messages


class Mutant(NamedTuple):
    path: Path
    line: int
    text: str  # of the whole module
    diff: str


def reversed_already(test: ast.expr) -> bool:
    """Whether a change of the test's own operator is its contrary."""
    return isinstance(test, ast.UnaryOp) or isinstance(test, ast.Compare) and isinstance(test.ops[0], CONTRARY)


def changes(node: Any) -> Iterator[tuple[str, object]]:
    """Fields of a node with what may stand in their place."""
    match node:
        case ast.Compare():
            for place, op in enumerate(node.ops):
                yield "ops", [*node.ops[:place], OPERATORS[type(op)](), *node.ops[place + 1 :]]
        case ast.BinOp(op=ast.BitOr(), right=ast.Constant(value=None)):
            pass  # a type
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield "op", OPERATORS[type(node.op)]()
        case ast.UnaryOp():  # twice, which is not at all
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
        case ast.IfExp() | ast.If() if not reversed_already(node.test):
            yield "test", ast.UnaryOp(ast.Not(), node.test)
        case ast.Return(value=ast.Compare() | ast.BoolOp() | ast.Call(func=ast.Name(id="bool"))):
            yield "value", ast.UnaryOp(ast.Not(), node.value)
        case ast.Return() if not isinstance(node.value, NOT_NUMBERS) and "nan" not in ast.unparse(node.value or node):
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


class Net:
    """A pytest plugin that runs a module's tests once as it is, and then those that a mutant may fail, for each mutant.

    Each run is a fork of a process that has imported and collected everything; there the changed function gets its
    code, or the constant its value. What is changed in a class is left to processes from the start.
    """

    def __init__(self, tree: Path, mutants: list[Mutant], warm: bool) -> None:
        self.tree, self.mutants, self.warm = tree, mutants, warm
        self.path, self.coverage = mutants[0].path, None
        parsed = ast.walk(ast.parse((tree / self.path).read_text(encoding="utf-8")))
        bodies = [node for node in parsed if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        ranges = [range(node.body[0].lineno, (node.end_lineno or 0) + 1) for node in bodies]
        self.classes = [lines for node, lines in zip(bodies, ranges, strict=True) if isinstance(node, ast.ClassDef)]
        self.bodies = [lines for node, lines in zip(bodies, ranges, strict=True) if isinstance(node, ast.FunctionDef)]

    def pytest_runtestloop(self, session: Any) -> bool:
        self.session, self.items = session, {item.nodeid: item for item in session.items}
        file = str(self.tree / self.path)
        found = self.tree / "tests_by_line.json"
        observe = functools.partial(self.observe, file, found)
        if observe() if self.warm else self.forked(observe, None):
            os.write(2, b"error: the tests fail before anything is changed\n")
            return True
        if self.warm and self.forked(lambda: self.run_items(list(self.items)), None):
            os.write(2, b"error: the tests fail in a process that is forked from one that ran them\n")
            return True
        loaded = (thing for thing in gc.get_objects() if isinstance(thing, FunctionType))
        self.functions: dict[str, list[FunctionType]] = {}
        for function in loaded:
            if function.__code__.co_filename == file:
                self.functions.setdefault(function.__code__.co_qualname, []).append(function)
        gc.freeze()  # what is there is not looked through again
        self.seconds, self.lines = json.loads(found.read_text(encoding="utf-8"))
        for place, mutant in enumerate(self.mutants):
            names = self.of_line(mutant.line)
            limit = 20 + 4 * sum(self.seconds[name] for name in names)
            text = mutant.text.encode()
            (self.tree / self.path).write_bytes(text)
            inside, in_class = (any(mutant.line in body for body in of) for of in (self.bodies, self.classes))
            how = self.changed if inside else self.anew if in_class else self.set_anew
            failed = self.forked(lambda: how(file, text, names), limit)  # noqa: B023
            self.told(place, failed)
        return True

    def pytest_runtest_setup(self, item: Any) -> None:
        if self.coverage:  # a fixture may serve all tests of its file
            self.coverage.switch_context(item.nodeid.partition("::")[0])

    def pytest_runtest_call(self, item: Any) -> None:
        if self.coverage:
            self.coverage.switch_context(item.nodeid)

    def told(self, place: int, failed: bool | None) -> None:
        mutant = self.mutants[place]
        with open(self.tree / "told.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([mutant.line, mutant.diff, failed]) + "\n")
        if not failed:
            words = " took too long" if failed is None else ""
            os.write(2, f"{mutant.path}:{mutant.line}{words}\n{mutant.diff}\n\n".encode())

    def forked(self, work: Callable[[], int], limit: float | None) -> bool | None:
        """Whether work in a forked process fails; None where it takes longer than the limit in seconds."""
        if not (process := os.fork()):
            code = 3
            try:
                os.setsid()
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        end = time.monotonic() + (limit or 3600)
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return status != 0
            time.sleep(0.005)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return None

    def run_items(self, names: list[str], started: Callable[[str], object] = str) -> int:
        """Run these tests until one fails."""
        items = [self.items[name] for name in names]
        if self.warm and items:
            self.session._setupstate.teardown_exact(items[0])  # what it does not share with the last one that ran
        after = items[0] if self.warm and items else None  # keeps fixtures of the module and of the session
        for item, following in zip(items, [*items[1:], after], strict=True):
            started(item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return 1
        return 0

    def observe(self, file: str, found: Path) -> int:
        """Note which test comes by which line and how long each takes."""
        from coverage import Coverage

        coverage = Coverage(data_file=None, include=[file], config_file=False)
        coverage.start()
        self.coverage = coverage
        begun: dict[str, float] = {}

        def started(name: str) -> None:
            begun[name] = time.perf_counter()

        code = self.run_items(list(self.items), started)
        coverage.stop()
        self.coverage = None
        ends = [*list(begun.values())[1:], time.perf_counter()]
        taken = {name: end - begin for (name, begin), end in zip(begun.items(), ends, strict=True)}
        found.write_text(json.dumps([taken, coverage.get_data().contexts_by_lineno(file)]), encoding="utf-8")
        return code

    def of_line(self, line: int) -> list[str]:
        """The tests that run the line's function, or all: by file and in it the quickest first."""
        body = min((body for body in self.bodies if line in body), key=len, default=range(0))
        found = {name for number in body for name in self.lines.get(str(number), [])}
        names = {name for name in self.seconds if name in found or name.partition("::")[0] in found}
        files: dict[str, list[str]] = {}
        for place, name in enumerate(sorted(names or self.seconds, key=self.seconds.__getitem__)):
            if place == 0 or self.seconds[name] <= LONGEST:
                files.setdefault(name.partition("::")[0], []).append(name)
        quickest = sorted(files.values(), key=lambda names: sum(self.seconds[name] for name in names))
        return [name for names in quickest for name in names]

    def changed(self, file: str, text: bytes, names: list[str]) -> int:
        """Run tests with a function changed."""
        codes = [compile(text, file, "exec", dont_inherit=True)]
        while codes:
            code = codes.pop()
            for function in self.functions.get(code.co_qualname, []):
                function.__code__ = code
            if not code.co_flags & inspect.CO_NEWLOCALS:  # the module and its classes; what is in functions comes along
                codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        return self.run_items(names)

    def set_anew(self, file: str, text: bytes, names: list[str]) -> int:
        """Run tests with a constant or a default changed, wherever it was imported."""
        (old,) = (module for module in list(sys.modules.values()) if getattr(module, "__file__", None) == file)
        fresh: dict[str, Any] = {"__name__": old.__name__, "__file__": file}
        exec(compile(text, file, "exec", dont_inherit=True), fresh)
        for name, value in fresh.items():
            before = vars(old).get(name)
            if isinstance(value, FunctionType):
                for function in self.functions.get(name, []):
                    function.__defaults__, function.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
            elif type(value).__module__ in ("builtins", "numpy", "re") and repr(value) != repr(before):
                for module in list(sys.modules.values()):
                    if name[:2] != "__" and vars(module).get(name) is before:
                        setattr(module, name, value)
        return self.run_items(names)

    def anew(self, file: str, text: bytes, names: list[str]) -> int:
        """Run tests in a process that imports the changed module."""
        files = list(dict.fromkeys(name.partition("::")[0] for name in names))
        skipped = [f"--deselect={name}" for name in self.items if name not in names]
        command = [sys.executable, "-m", "pytest", *QUICK, *files, *skipped]
        return subprocess.run(command, cwd=self.tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


def run_mutants(tree: Path, mutants: list[Mutant], files: list[str], *how: Any) -> None:
    """In a process of its own: collect the tests in a copy of the tree, and run them for each mutant."""
    os.chdir(tree)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.dont_write_bytecode = True  # two mutants of one second and size would pass for each other
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    import pytest

    pytest.main([*QUICK, f"--basetemp={tree.parent / 'made'}", *files], plugins=[Net(tree, mutants, *how)])


def survivors_of(mutants: list[Mutant], files: list[str], trees: list[Path], *how: Any) -> list[Mutant]:
    """The mutants that no test notices; each copy of the tree serves one process."""
    processes = []
    for place, tree in enumerate(trees):
        (tree / "told.jsonl").write_text("")
        processes.append(FORKED.Process(target=run_mutants, args=(tree, mutants[place :: len(trees)], files, *how)))
        processes[-1].start()
    for process in processes:
        process.join()
    told = [json.loads(line) for tree in trees for line in (tree / "told.jsonl").read_text().splitlines()]
    if len(told) < len(mutants):
        sys.exit(2)
    for tree in trees:
        shutil.copy(ROOT / mutants[0].path, tree / mutants[0].path)
    alive = [(line, diff) for line, diff, failed in told if failed is False]
    return [mutant for mutant in mutants if (mutant.line, mutant.diff) in alive]


def written(diff: str) -> str:
    """What a mutant has in place of the module's lines, as one line: by this benchmarks/mutate.toml knows it."""
    return " ".join(line[1:].strip() for line in diff.splitlines() if line[0] == "+")


def page(modules: dict[str, Any], reasons: dict[str, dict[str, list[str]]]) -> tuple[str, int]:
    """The counts and the survivors with their reasons; and how many have none."""
    table = "| Module | Mutants | Killed | Survived | of these change nothing |\n| :-- | --: | --: | --: | --: |\n"
    listed, missing = "", 0
    for path, module in sorted(modules.items()):
        known = {line: reason for reason, lines in reasons.get(path, {}).items() for line in lines}
        by_reason: dict[str, list[str]] = {}
        for line, diff in module["survivors"]:
            by_reason.setdefault(known.get(written(diff), ""), []).append(f"{line}: {written(diff)}")
        total, alive = module["mutants"], len(module["survivors"])
        missing += len(by_reason.get("", []))
        table += f"| `{path}` | {total} | {total - alive} | {alive} | {alive - len(by_reason.get('', []))} |\n"
        for reason, lines in by_reason.items():
            listed += f"\n`{path}`, {reason or 'no reason known'}:\n\n```python\n" + "\n".join(lines) + "\n```\n"
        listed += f"\nBy `{module['command']}`.\n"
    return table + listed, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", type=Path, help="files of the package; none: write the page anew")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="test files in place of those above")
    parser.add_argument("--again", action="store_true", help="only those that survived the last time")
    parser.add_argument("--sample", type=int, metavar="N", help="mutants of each module (default: all)")
    parser.add_argument("--warm", action="store_true", help="make the tests' fixtures once, by the module as it is")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="mutants at a time (default: 2)")
    args = parser.parse_args()
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    FORKED.set_forkserver_preload(LIBRARIES)
    kept: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    counted: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = [
            shutil.copytree(ROOT, Path(folder, f"tree{n}", "clcnet"), ignore=left_out) for n in range(args.processes)
        ]
        for path in args.modules:
            mutants = list(mutants_of(path))
            total = len(mutants)
            if args.again:
                before = kept[str(path)]
                total, survived = before["mutants"], [diff for _, diff in before["survivors"]]
                mutants = [mutant for mutant in mutants if mutant.diff in survived]
            mutants = random.Random(0).sample(mutants, min(args.sample or len(mutants), len(mutants)))
            files, started = args.tests or tests_of(path), time.perf_counter()
            how = files, trees[: len(mutants)], args.warm
            alive = sorted(survivors_of(mutants, *how)) if mutants else []
            print(
                f"{path}: {len(mutants)} mutants, {len(alive)} alive, {time.perf_counter() - started:.0f} s", flush=True
            )
            chosen = ["--sample", str(args.sample)] if args.sample else []
            chosen += ["--tests", *args.tests] if args.tests else []
            command = shlex.join(["python", "-m", "benchmarks.mutate", str(path), *chosen])
            if args.again:
                command = f"{kept[str(path)]['command']}`, and the survivors by `{command}"
            survivors = [[mutant.line, mutant.diff] for mutant in alive]
            total = min(args.sample or total, total)
            counted[str(path)] = {"command": command, "mutants": total, "survivors": survivors}
    kept = (json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}) | counted
    text, missing = page(kept, tomllib.loads(REASONS.read_text(encoding="utf-8")))
    RESULT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.exit(missing > 0)


if __name__ == "__main__":
    main()
