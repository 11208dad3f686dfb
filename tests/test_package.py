"""What `pip install .` puts into a service's environment, and what it leaves behind."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from scripts import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, in which nothing has been built."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "clcnet", folder / "clcnet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"{script}.py" for script in SCRIPTS)):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def environment(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the package, whose dependencies are this one's."""
    folder, alone = tmp_path_factory.mktemp("fresh"), ["--quiet", "--no-deps", "--no-index"]
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", folder, source]
    made = subprocess.run(build, capture_output=True, text=True)
    if made.returncode and "setuptools" in made.stderr:
        pytest.skip("needs a setuptools that pyproject.toml accepts")
    assert made.returncode == 0, made.stderr
    venv.create(folder, with_pip=False, symlinks=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", folder / "bin" / "python", "install", *alone, wheel], check=True)
    (site_of(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def site_of(environment: Path) -> Path:
    """Where its packages lie."""
    (site,) = environment.glob("lib/*/site-packages")
    return site


@pytest.fixture
def installed(environment: Path) -> Path:
    return site_of(environment)


def run(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of its programs far from the repository."""
    command: Sequence[str] = [str(environment / "bin" / words[0]), *words[1:]]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)


def test_the_wheel_holds_every_module_the_scripts_and_the_page(installed: Path) -> None:
    kept = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    files = [path for path in (ROOT / "clcnet").rglob("*") if path.suffix in (".py", ".html")]
    assert {path.relative_to(ROOT).as_posix() for path in files} | {f"{name}.py" for name in SCRIPTS} <= kept
    assert not [name for name in kept if name.startswith(("tests/", "benchmarks/", "examples/"))]


def test_outside_of_the_repository_the_package_is_imported_and_writes_to_the_current_folder(
    environment: Path, installed: Path, tmp_path: Path
) -> None:
    program = "import clcnet; from clcnet import cli; clcnet.Cascade; print(clcnet.__file__, cli.ROOT, sep='\\n')"
    done = run(environment, tmp_path, "python", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(installed / "clcnet" / "__init__.py"), str(tmp_path.resolve())]


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_each_command_is_one_of_the_scripts(environment: Path, tmp_path: Path, command: str) -> None:
    done = run(environment, tmp_path, command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {command}"), done.stderr
    assert len(PROJECT["scripts"]) == len(SCRIPTS)


def test_a_library_of_an_extra_that_is_missing_is_named_in_one_line(environment: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from clcnet.commands import eval_imagenet as f; f()"
    done = run(environment, tmp_path, "python", "-c", program, "--help")
    assert done.stderr == "error: matplotlib is not installed; pip install 'clcnet[report]' brings it\n"


def test_every_pin_lies_in_its_range_and_every_range_has_a_pin() -> None:
    files = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-dev.txt")]
    pins = dict(line.split("==") for file in files for line in file.splitlines() if "==" in line)
    extras = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
        assert not str(requirement.specifier).startswith("=="), requirement


def test_what_installing_leaves_is_not_seen_by_git(source: Path, environment: Path) -> None:
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not in a git repository")
    left = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    left = [path for path in left if not (ROOT / path).exists()] or [Path("build/lib/x.py")]
    for path in (*left, "clcnet.egg-info/PKG-INFO"):
        assert subprocess.run(["git", "check-ignore", "--no-index", "-q", path], cwd=ROOT).returncode == 0, path
