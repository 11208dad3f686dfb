"""The house: imports run one way, array modules need numpy alone, and importing a script does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "clcnet"
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
ARRAY_MODULES = ("cascade", "metrics", "confidence")


def imported_modules(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def listed_modules() -> list[str]:
    """The modules in the order in which CONTRIBUTING.md lists them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("(a test checks this list)")[1]
    lines = text.split("```")[1].strip().splitlines()
    return [name for line in lines for name in re.split(r"\s{2,}", line)[0].split(", ")]


def test_every_module_is_listed_once_and_imports_only_from_modules_listed_after_it() -> None:
    listed = listed_modules()
    assert sorted(listed) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    for place, name in enumerate(listed):
        imported = imported_modules(PACKAGE / f"{name}.py")
        assert not [other for other in listed[: place + 1] if f"clcnet.{other}" in imported], name


def test_the_package_never_imports_a_script() -> None:
    scripts = {Path(name).stem for name in SCRIPTS}
    for path in PACKAGE.glob("*.py"):
        assert not imported_modules(path) & scripts, path


@pytest.mark.parametrize("module", ARRAY_MODULES)
def test_array_modules_import_numpy_and_nothing_else_that_is_installed(module: str) -> None:
    outside = {name.split(".")[0] for name in imported_modules(PACKAGE / f"{module}.py")}
    assert outside - sys.stdlib_module_names == {"numpy"}


def test_the_array_modules_load_without_torch() -> None:
    program = f"import sys, {', '.join(f'clcnet.{module}' for module in ARRAY_MODULES)}; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout == "False\n"


def is_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_does_nothing_outside_its_guards(script: str) -> None:
    docstring, *statements = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert all(isinstance(statement, definitions) or is_guard(statement) for statement in statements), script
    assert is_guard(statements[-1])


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_every_module_says_in_its_first_line_what_it_holds(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and docstring.splitlines()[0].endswith((".", "?", "alone", ":"))
