"""The folder beside an output is a run's own, or is left alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clcnet.cascade.resume import WRONG, UnfinishedAnswers, UnfinishedRun, UnfinishedTable

ADVICE = r"t\.csv\.partial is not what an interrupted run left; delete or rename it, or choose another output"


def unfinished(folder: Path) -> UnfinishedTable:
    return UnfinishedTable(folder / "t.csv.partial", {"a": 1}, num_classes=2)


def victim_of(folder: Path) -> Path:
    victim = folder / "victim"
    victim.mkdir()
    (victim / "arguments.json").write_text('{"a": 1}')
    (victim / "rows").write_text("precious")
    return victim


def lay_folder(folder: Path) -> None:
    (folder / "t.csv.partial").mkdir()
    (folder / "t.csv.partial" / "thesis.tex").write_text("precious")


def lay_folder_beside_arguments(folder: Path) -> None:
    lay_folder(folder)
    (folder / "t.csv.partial" / "arguments.json").write_text('{"a": 1}')


def lay_rows_without_arguments(folder: Path) -> None:
    (folder / "t.csv.partial").mkdir()
    (folder / "t.csv.partial" / "rows").write_text("precious")


def lay_file(folder: Path) -> None:
    (folder / "t.csv.partial").write_text("precious")


def lay_link(folder: Path) -> None:
    (folder / "t.csv.partial").symlink_to(victim_of(folder))


def lay_link_to_nothing(folder: Path) -> None:
    (folder / "t.csv.partial").symlink_to(folder / "nothing")


def lay_link_inside(folder: Path) -> None:
    victim = victim_of(folder)
    unfinished(folder).start()
    rows = folder / "t.csv.partial" / "rows"
    rows.unlink()
    rows.symlink_to(victim / "rows")


@pytest.mark.parametrize(
    "lay",
    [
        lay_folder,
        lay_folder_beside_arguments,
        lay_rows_without_arguments,
        lay_file,
        lay_link,
        lay_link_to_nothing,
        lay_link_inside,
    ],
)
def test_what_no_run_left_is_neither_removed_nor_written_to(tmp_path: Path, lay: Callable[[Path], None]) -> None:
    lay(tmp_path)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for act in (UnfinishedRun.exists, UnfinishedRun.start):
        with pytest.raises(FileExistsError, match=ADVICE):
            act(unfinished(tmp_path))
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("names", [[], [".arguments.00ff.partial.json"], ["arguments.json"]])
def test_what_a_kill_at_the_beginning_or_the_end_leaves_is_no_obstacle(tmp_path: Path, names: list[str]) -> None:
    run = unfinished(tmp_path)
    run.folder.mkdir()
    for name in names:
        (run.folder / name).write_text('{"a": 1}')
    if run.exists():
        run.resume(batch_size=2, num_images=5)
        assert UnfinishedAnswers(run.folder, {"a": 1}).resume() == []
    else:
        run.start()
    run.append(np.array([WRONG]), np.array([[0.5, 0.5]]), {})
    assert run.count() == (1, 0)
    run.start()
    assert (run.folder / "rows").stat().st_size == 0
    run.remove()
    assert not run.folder.exists()
