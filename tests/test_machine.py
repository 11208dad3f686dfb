"""Machines that are not as ours: no compiler, a notebook's settings, little shared memory, limits, other locales."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from networks import classify
from scripts import EVALUATE_CUSTOM, GENERATE, TRAIN_CUSTOM, Finished, Workshop

from clcnet import cli
from clcnet.classifiers import decoding
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.images import list_images
from clcnet.report import plots

pytest.importorskip("resource", reason="locales, bytes of file names and signals are as Unix has them")
pytestmark = pytest.mark.usefixtures("one_thread")


def run_alone(script: str, *words: object, **environment: str) -> Finished:
    """Run a script in a process of its own, with another environment; a hang is a failure."""
    command = [sys.executable, str(cli.ROOT / f"{script}.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120)
    out, err = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
    return Finished(done.returncode, out, err)


def test_a_long_temporary_folder_is_no_hang(workshop: Workshop, tmp_path: Path) -> None:
    (long := tmp_path / ("a" * 90)).mkdir()
    finished = run_alone(GENERATE, *workshop.command(GENERATE, tmp_path), "--workers", 2, TMPDIR=str(long))
    assert finished.code == 0 and "too long" not in finished.err, finished
    assert (tmp_path / "table.csv").read_bytes().count(b"\n") == 60


def test_compiling_without_a_compiler_is_one_line(workshop: Workshop, tmp_path: Path) -> None:
    environment = {"PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    finished = run_alone(GENERATE, *workshop.command(GENERATE, tmp_path), "--compile", **environment)
    assert finished.code == 2 and "Traceback" not in finished.err, finished
    assert "torch.compile needs a C++ compiler such as g++" in finished.last_error
    assert finished.last_error.endswith("or leave out --compile")


def test_neither_a_backend_that_is_not_installed_nor_a_matplotlibrc_that_is_no_text_hinders_anything(
    tmp_path: Path,
) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"font.family: caf\xe9\n")
    code = "import os, sys, clcnet.report.plots\nprint(os.environ['MPLBACKEND'], 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPLBACKEND": "module://not_installed.backend", "PYTHONPATH": str(cli.ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "module://not_installed.backend False\n", done.stderr  # what is started from here may need it


@pytest.mark.parametrize(
    "setting", [{"text.usetex": True}, {"savefig.format": "pdf"}, {"axes.titlesize": 40}, {"svg.fonttype": "none"}]
)
def test_a_users_style_is_not_for_our_pictures(tmp_path: Path, setting: dict[str, object]) -> None:
    def draw(folder: Path) -> list[bytes]:
        scores = {"CLCNet": np.linspace(0.1, 0.9, 40)}
        figure = plots.plot_risk_coverage(scores, np.arange(40) % 3 > 0, "model_1")
        return [path.read_bytes() for path in plots.save(figure, folder, "risk")]

    expected = draw(tmp_path / "plain")
    with matplotlib.rc_context(setting):
        assert draw(tmp_path / "styled") == expected
        assert {name: matplotlib.rcParams[name] for name in setting} == setting  # and the user keeps it


@pytest.mark.parametrize("text", ["is killed by signal: Bus error", "unable to allocate shared memory(shm)", "killed"])
@pytest.mark.parametrize("size", [64 << 20, 8 << 30])
def test_little_shared_memory_is_named(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(size, 0, size))  # type: ignore[attr-defined]
    advice = decoding._advice(RuntimeError(f"DataLoader worker (pid 7) {text}"))
    assert ("--shm-size" in advice and "--batch-size" in advice and "--workers 0" in advice) == (
        size < 1 << 30 or text != "killed"
    )
    assert decoding._advice(RuntimeError("of our own")) == ""


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_processes_that_the_system_does_not_allow_are_one_line(
    workshop: Workshop, error: Exception, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    classifier = load_classifier(workshop.models()[1], device="cpu")
    with pytest.raises(ChildProcessError, match=f"{limit}.*--workers 0"):
        next(classify(classifier, list_images(workshop.images), workers=2))
    assert len(list(classify(classifier, list_images(workshop.images)))) > 0


def test_names_keep_their_bytes_under_a_locale_of_one_byte_a_character(workshop: Workshop, tmp_path: Path) -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    images = tmp_path / "images"
    shutil.copytree(workshop.images, images)
    names = {b"bee_0000.png": "天気 é.png".encode(), b"bee_0005.png": b"caf\xe9.png"}  # the second is not UTF-8
    for before, after in names.items():
        for path in images.rglob(os.fsdecode(before)):
            path.rename(path.with_name(os.fsdecode(after)))
    (images / "split_part_1" / "bee" / os.fsdecode("ß".encode() + b"\xff.png")).write_bytes(b"no image")
    folder = tmp_path / "é"
    finished = run_alone(GENERATE, *workshop.command(GENERATE, folder), "--data-path", images, **environment)
    assert finished.code == 3, finished
    table = (folder / "table.csv").read_bytes()
    assert all(b"\n" + name + b"," in table for name in names.values())
    assert (folder / "table.csv.errors.csv").read_bytes().splitlines()[1].startswith("ß".encode() + b"\xff.png,")
    assert str(folder / "table.csv") in finished.out
    shutil.copytree(images / "split_part_1" / "bee", tmp_path / "flat" / "bëe")
    words = [*workshop.command(EVALUATE_CUSTOM, folder), "--custom-data", tmp_path / "flat"]
    finished = run_alone(EVALUATE_CUSTOM, *words, **environment)
    assert "bëe" in finished.out, finished
    rows = (folder / "custom-data-result.csv").read_bytes()
    assert all("\nbëe/".encode() + name + b"," in rows for name in names.values())


SESSION = """
import runpy, signal, sys
{interactive}
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
for words in {commands}:
    sys.argv = ["train_custom_data.py", *words]
    try:
        runpy.run_path("train_custom_data.py", run_name="__main__")
    except SystemExit as ended:
        print("exit code", ended.code)
    print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before)
"""


@pytest.mark.parametrize("interactive", ["sys.ps1 = 'In [1]: '", ""])
def test_a_session_that_goes_on_has_its_signals_back(workshop: Workshop, tmp_path: Path, interactive: str) -> None:
    done = [str(word) for word in workshop.command(TRAIN_CUSTOM, tmp_path)]
    commands = [done, ["--help"], ["--no-such-flag"], ["--cls-output", "nowhere.csv"]]
    code = SESSION.format(interactive=interactive, commands=commands)
    ran = subprocess.run([sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True, timeout=120)
    ends = [line for line in ran.stdout.splitlines() if line in ("True", "False") or line.startswith("exit code")]
    assert ends == [word for code in (0, 0, 2, 2) for word in (f"exit code {code}", "True")], ran


def test_a_job_in_the_background_stays_deaf_to_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(sys, "argv", ["script.py"])
            cli.run(lambda args: {"num_unreadable": 0}, cli.ArgumentParser())
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
