"""Outputs are replaced whole or not at all, and by one run at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from clcnet.files import atomic_path, check_output, output_lock


def test_a_finished_block_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.csv"]


def test_an_error_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("halfway")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.csv"]


def test_the_temporary_name_keeps_the_suffix_by_which_formats_are_chosen(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "made" / "table.parquet") as temporary:
        assert temporary.suffix == ".parquet"
        temporary.write_bytes(b"x")
    assert (tmp_path / "made" / "table.parquet").read_bytes() == b"x"


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        check_output(tmp_path)


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        check_output(tmp_path / "file" / "result.csv")


def test_a_second_run_is_refused_the_same_output(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    second = f"from clcnet.files import output_lock\nwith output_lock({str(path)!r}): print('wrote')"
    with output_lock(path):
        refused = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True)
    assert "another run is writing" in refused.stderr and refused.stdout == ""
    accepted = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True)
    assert accepted.stdout == "wrote\n"
