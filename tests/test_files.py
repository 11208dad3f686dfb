"""Outputs are replaced whole or not at all, and by one run at a time."""

import os
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


def test_a_link_laid_where_a_temporary_file_could_be_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".t.{os.getpid()}.partial.csv").symlink_to(victim)
    with atomic_path(tmp_path / "t.csv") as first, atomic_path(tmp_path / "t.csv") as second:
        assert first != second and first.is_file() and not first.is_symlink()
        first.write_text("rows")
        second.write_text("rows")
    assert victim.read_text() == "precious" and (tmp_path / "t.csv").read_text() == "rows"


def test_a_temporary_name_that_is_taken_is_an_error_and_its_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clcnet.files.secrets.token_hex", lambda _: "0")
    victim, link = tmp_path / "victim", tmp_path / ".t.0.partial.csv"
    link.symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_path(tmp_path / "t.csv"):
        pass
    assert link.is_symlink() and not victim.exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_output_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "t.csv") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "t.csv").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_output_that_is_a_link_takes_its_place_and_leaves_the_target(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "t.csv").symlink_to(victim)
    with atomic_path(tmp_path / "t.csv") as temporary:
        temporary.write_text("rows")
    assert victim.read_text() == "precious" and (tmp_path / "t.csv").read_text() == "rows"


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_laid_where_the_lock_goes_leaves_its_target_alone(tmp_path: Path, link) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    before = victim.stat()
    link(tmp_path / ".t.csv.lock", victim)
    if link == Path.symlink_to:
        with pytest.raises(
            FileExistsError, match=r"\.t\.csv\.lock is a symbolic link, not a lock; delete it or choose"
        ):
            output_lock(tmp_path / "t.csv").__enter__()
    else:
        with output_lock(tmp_path / "t.csv"):
            pass
    after = victim.stat()
    assert victim.read_text() == "precious"
    assert (after.st_mode, after.st_mtime_ns, after.st_ino) == (before.st_mode, before.st_mtime_ns, before.st_ino)
