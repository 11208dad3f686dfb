"""Writing files so that an interrupted run leaves the old file or the new one, never half of one."""

import contextlib
import csv
import errno
import logging
import os
import secrets
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

_LONGEST_NAME = 220  # bytes; file systems take 255
_OPEN_FILES = ("/dev/std", "/dev/fd/", "/proc/")  # whatever they are today
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of network disks
_DISK_TROUBLES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_logger = logging.getLogger(__name__)


def check_output(path: Path | str, inputs: Iterable[Path | str | None] = ()) -> Path:
    """Refuse, before any work is done, an output path that could not be written at the end.

    Args:
        path: the file to be written later; its folder is made if it is missing.
        inputs: files that it must not be, because they are read from.
    """
    path = given = Path(path)
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise OSError(
            f"output {path} has a name too long for its companions (.lock, .errors.csv); choose a shorter one"
        )
    path = _target(path)
    if any(os.path.realpath(path) == os.path.realpath(source) for source in inputs if source is not None):
        raise ValueError(f"output {given} is also an input; choose another output")
    if path.is_dir():
        raise IsADirectoryError(f"output {path} is a folder; name a file in it")
    if (path.exists() and not path.is_file()) or os.path.abspath(given).startswith(_OPEN_FILES):
        raise OSError(f"output {path} is a device or pipe, no regular file; choose another output")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"output {path}: {parent} is a file, not a folder; choose another output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"output folder {path.parent} cannot be made ({error.strerror}); choose another output"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"output folder {path.parent} is not writable; choose another output")
    return given


def _target(path: Path) -> Path:
    """The file that is written: where a link leads."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(f"output {path} is a link in a circle; choose another output")
    return target


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the place of `path` only when the block ends without an error.

    The temporary path lies in the same folder and has the same suffix. Of a link, what it leads to is replaced.
    """
    with atomic_paths([path]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_paths(paths: Sequence[Path | str]) -> Iterator[list[Path]]:
    """As `atomic_path`, for files that belong together: they are replaced when all of them are written, or none is."""
    targets = [_target(check_output(path)) for path in paths]
    temporaries: list[Path] = []
    try:
        with naming_full_disks(*targets):
            for path in targets:  # names that nobody can have laid a link at
                temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}")
                temporary.touch(exist_ok=False)  # O_EXCL, which follows no link; the mode is what the umask leaves
                temporaries.append(temporary)
            yield temporaries
            for temporary in temporaries:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())  # else the renaming may outlive the bytes in a power cut
        for temporary, path in zip(temporaries, targets, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_full_disks(*paths: Path, advice: str = "make room or choose another place, and run again") -> Iterator[None]:
    """Say which file could not be written: the system does not, when a disk or a quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_TROUBLES:
            raise
        reason = os.strerror(error.errno)
        raise OSError(f"{' and '.join(map(str, paths))} cannot be written ({reason}); {advice}") from error


def csv_writer(file: TextIO) -> Any:
    """As `csv.writer` with `\\n` between rows; it quotes a carriage return too, at which readers would end a row."""
    return csv.writer(types.SimpleNamespace(write=lambda row: file.write(row[:-2] + "\n")), lineterminator="\r\n")


def write_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, file names in it byte for byte as the file system has them."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv_writer(file).writerows(rows)


@contextlib.contextmanager
def output_lock(path: Path | str) -> Iterator[None]:
    """Hold `path` for this run, so that two runs never write the same output at once.

    Args:
        path: the output file. The lock is a file beside it, `.NAME.lock`. Disks that know no locks are written without.

    Raises:
        OSError: another run holds it, the lock is a link, or see `check_output`.
    """
    path = _target(check_output(path))
    file = path.with_name(f".{path.name}.lock")
    if file.is_symlink():
        raise FileExistsError(f"{file} is a symbolic link, not a lock; delete it or choose another output")
    lock = FileLock(file, fallback_to_soft=False)  # which a killed run would leave behind
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another run is writing {path}; wait for it or choose another output") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _logger.warning("%s lies on a disk that knows no locks; let no other run write it meanwhile", path)
    try:
        yield
    finally:
        lock.release()


def first_sentence(error: BaseException) -> str:
    """What a library's error says, in short."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
