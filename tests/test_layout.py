"""The house: imports run one way, array modules need numpy alone, and importing a script does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "clcnet"
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
FOLDERS = ("report", "cascade", "classifiers", "network", "data")  # imports run from left to right
ARRAY_MODULES = ("cascade.curve", "metrics", "confidence")


def module_name(path: Path) -> str:
    """`cascade.curve` for clcnet/cascade/curve.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_modules(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def folder_of(module: str) -> str:
    """`clcnet.data.images` -> `data`; empty for the modules beside the folders and for what is not ours."""
    names = module.split(".")
    return names[1] if names[0] == "clcnet" and len(names) > 1 and names[1] in FOLDERS else ""


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way_by_folder(path: Path) -> None:
    """A folder imports from itself and from those after it; the modules beside the folders serve all of them."""
    own = folder_of(f"clcnet.{module_name(path)}")
    allowed = {"", *FOLDERS[FOLDERS.index(own) :]} if own else {""}
    assert {folder_of(name) for name in imported_modules(path)} <= allowed


def test_the_package_never_imports_a_script() -> None:
    scripts = {Path(name).stem for name in SCRIPTS}
    for path in MODULES:
        assert not imported_modules(path) & scripts, path


@pytest.mark.parametrize("module", ARRAY_MODULES)
def test_array_modules_import_numpy_and_nothing_else_that_is_installed(module: str) -> None:
    outside = {name.split(".")[0] for name in imported_modules(PACKAGE / f"{module.replace('.', '/')}.py")}
    assert outside - sys.stdlib_module_names - {"clcnet"} == {"numpy"}


def printed(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def test_the_array_modules_load_without_torch() -> None:
    modules = ", ".join(f"clcnet.{module}" for module in ARRAY_MODULES)
    assert printed(f"import sys, {modules}; print('torch' in sys.modules)") == ["False"]


def test_importing_the_package_takes_under_300_ms_and_no_torch() -> None:
    seconds, *loaded = printed(
        "import sys, time; start = time.process_time(); import clcnet; "
        "print(time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert float(seconds) < 0.3 and loaded == ["False", "False"]


def is_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_does_nothing_outside_its_guards(script: str) -> None:
    docstring, *statements = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert all(isinstance(statement, definitions) or is_guard(statement) for statement in statements), script
    assert is_guard(statements[-1])
