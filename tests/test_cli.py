"""The command line: forgiving spelling, one-line errors, exit codes."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clcnet import cli

Main = Callable[[argparse.Namespace], dict[str, Any]]


@pytest.fixture
def parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="eval.py")
    parser.add_argument("--num_classes", type=cli.number_of_classes, default=1000, help="number of classes")
    parser.add_argument("--deep-model-FLOPs", type=cli.positive_float)
    parser.add_argument("--threshold", type=cli.threshold, default=0.5)
    parser.add_argument("--threshold-searching", nargs="?", const=True, default=False, type=cli.true_or_false)
    parser.add_argument("--folder", type=Path, nargs="+")
    cli.add_device_arguments(parser)
    cli.add_preprocessing_arguments(parser)
    return parser


@pytest.mark.parametrize("words", [["--folder", ""], ["--folder="], ["--folder", "a", " "]])
def test_an_empty_path_is_not_the_current_folder(
    parser: cli.ArgumentParser, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert "argument --folder: the path is empty; is a variable not set?" in capsys.readouterr().err
    assert parser.parse_args(["--folder", "."]).folder == [Path(".")]


def test_the_specifications_three_dashes_are_read_as_two(parser: cli.ArgumentParser) -> None:
    assert parser.parse_args(["---deep-model-FLOPs", "37"]).deep_model_FLOPs == 37


@pytest.mark.parametrize(
    ("text", "value"), [("-999", -999), ("-1e3", -1000), ("-inf", -float("inf")), ("inf", float("inf"))]
)
def test_a_threshold_may_be_any_number(parser: cli.ArgumentParser, text: str, value: float) -> None:
    assert parser.parse_args(["--threshold", text]).threshold == value


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["--threshold-searching"], True), (["--threshold-searching", "True"], True)]
    + [(["--threshold-searching", word], False) for word in ("False", "no", "0")],
)
def test_threshold_searching_stands_alone_or_takes_a_word(
    parser: cli.ArgumentParser, words: list[str], value: bool
) -> None:
    assert parser.parse_args(words).threshold_searching is value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--treshold", "1"], "unknown flag --treshold; did you mean --threshold?"),
        (["--thresh", "1"], "unknown flag --thresh; did you mean --threshold?"),
        (["--zzzzzz"], "unknown flag --zzzzzz;"),
        (["stray"], "unexpected argument 'stray'"),
        (["--threshold", "nan"], "'nan' is not a threshold"),
        (["--threshold", "half"], "'half' is not a threshold"),
        (["--batch-size", "-3"], "'-3' is not a whole number of at least 1"),
        (["--threshold-searching", "maybe"], "'maybe' is neither True nor False"),
    ],
)
def test_a_wrong_flag_gets_one_line_and_exit_code_2(
    parser: cli.ArgumentParser, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(words)
    printed = capsys.readouterr().err
    assert exit_.value.code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed


@pytest.fixture(autouse=True)
def no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])


def run(main: Main) -> object:
    """The exit code of a script."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, cli.ArgumentParser())
    return exit_.value.code


def raising(error: Exception) -> Main:
    def main(args: argparse.Namespace) -> dict[str, Any]:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("row 3\nis bad"), "error: row 3 is bad\n"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), "error: a.csv: No such file or directory\n"),
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
    ],
)
def test_the_users_errors_become_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(error)) == 2
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("outcome", "code"), [({}, 0), ({"num_unreadable": 0}, 0), ({"num_unreadable": 2}, 3)])
def test_images_left_out_give_exit_code_3(outcome: dict[str, int], code: int) -> None:
    assert run(lambda args: outcome) == code


def test_torchrun_is_told_why_a_run_failed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    assert run(lambda args: {"num_unreadable": 2}) == 0 and not file.exists()
    assert run(raising(ValueError("no such\nfolder"))) == 2
    assert json.loads(file.read_text())["message"] == "error: no such folder"


def test_an_error_amid_a_progress_bar_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def main(args: argparse.Namespace) -> dict[str, int]:
        sys.stderr.write("\rshallow: 10%")
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    run(main)
    bar, line, _ = capsys.readouterr().err.split("\n")
    assert bar == "\rshallow: 10%"
    assert line.startswith("error: a process that decodes images died") and "--workers" in line


def test_our_own_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run(raising(KeyError("ours")))


either_signal = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
INTERRUPTED = "\ninterrupted: no file is half-written; give the same command to start again\n"


def started(script: str) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def signalled(script: str, word: str, number: signal.Signals) -> tuple[int, str]:
    """Run a program, send it a signal once it has printed a word, and return its exit code and stderr."""
    process = started(script)
    assert process.stdout is not None and process.stdout.readline() == f"{word}\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=20)
    return process.returncode, printed


@either_signal
def test_ctrl_c_and_sigterm_end_with_one_line_and_130(number: signal.Signals) -> None:
    script = (
        "import time\nfrom clcnet import cli\n"
        "def main(args):\n    print('started', flush=True)\n    time.sleep(60)\n"
        "cli.run(main, cli.ArgumentParser())\n"
    )
    assert signalled(script, "started", number) == (130, INTERRUPTED)


@either_signal
def test_a_signal_while_torch_is_being_imported_is_one_line_and_130(number: signal.Signals) -> None:
    script = (
        "import time\nfrom clcnet import cli\ncli.expect_interrupts()\n"
        "try:\n    print('importing', flush=True)\n    time.sleep(60)\n"
        "except BaseException:\n    time.sleep(60)\n"  # as an import swallows what is raised in it
    )
    assert signalled(script, "importing", number) == (130, INTERRUPTED)


@either_signal
def test_a_signal_that_comes_when_all_is_done_changes_neither_the_exit_code_nor_the_last_line(
    number: signal.Signals,
) -> None:
    script = (
        "import atexit, time\nfrom clcnet import cli\n"
        "atexit.register(lambda: (print('unloading', flush=True), time.sleep(1)))\n"
        "cli.run(lambda args: {}, cli.ArgumentParser())\n"
    )
    assert signalled(script, "unloading", number) == (0, "")


def test_a_reader_that_ends_early_costs_one_line() -> None:
    process = started(
        "from clcnet import cli\n"
        "def main(args):\n    while True:\n        print('row ' * 100)\n"
        "cli.run(main, cli.ArgumentParser())\n"
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    printed = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=20) == 2
    assert printed == "error: what is printed could not be passed on: the program that read it has ended\n"
