"""Outputs are replaced whole or not at all, and by one run at a time."""

import errno
import os
from pathlib import Path

import pytest

from clcnet.files import atomic_path, check_output, output_lock


def test_the_temporary_name_keeps_the_suffix_by_which_formats_are_chosen(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "made" / "table.parquet") as temporary:
        assert temporary.suffix == ".parquet"
        temporary.write_bytes(b"x")
    assert (tmp_path / "made" / "table.parquet").read_bytes() == b"x"


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


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "disk" / "t.csv", tmp_path / "t.csv"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(Path("disk", "t.csv"))
    with output_lock(link), atomic_path(link) as temporary:
        assert temporary.parent == target.parent  # the disk that the rename is to happen on
        with pytest.raises(BlockingIOError, match="another run is writing"), output_lock(target):
            pass
        temporary.write_text("rows")
    assert link.is_symlink() and target.read_text() == "rows"
    assert [entry.name for entry in target.parent.glob("[!.]*")] == ["t.csv"]


def test_what_cannot_be_written_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "input").symlink_to("t.csv")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        ".": "is a folder; name a file in it",
        "folder": "is a folder",
        "file/result.csv": "file is a file, not a folder",
        "circle": "in a circle",
        "null": "no regular file",
        "pipe": "is a device or pipe, no regular file; choose another output",
        "/dev/null": "no regular file",
        "/dev/stdout": "no regular file",
        "input": "is also an input",
    }.items():
        with pytest.raises((OSError, ValueError), match=message):
            check_output(tmp_path / name, inputs=[tmp_path / "t.csv"])
    with pytest.raises(OSError, match="no regular file"), atomic_path(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo() and not Path("/dev/null").is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_written_all_the_same_and_that_is_said(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with output_lock(tmp_path / "t.csv"), atomic_path(tmp_path / "t.csv") as temporary:
        temporary.write_text("rows")
    assert (tmp_path / "t.csv").read_text() == "rows"
    assert caplog.messages == [
        f"{tmp_path / 't.csv'} lies on a disk that knows no locks; let no other run write it meanwhile"
    ]
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"), output_lock(tmp_path / "u.csv"):
        pass


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
