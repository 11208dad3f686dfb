"""The sorted-probability table: a classifier's output, one image a row, and whether its answer is right.

A row holds the file name, n probabilities in descending order, and 1 if the top-1 answer is right, else 0. CSV without
a header (UTF-8; a byte-order mark is accepted) or Parquet, by the file's extension, with the same content. Reading
gives the float32 numbers that were written, bit for bit.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from clcnet.confidence import SUM_TOLERANCE
from clcnet.data import table_csv, table_parquet
from clcnet.data.images import ImageSet, names_of
from clcnet.data.table_rows import ROWS_A_CHUNK, bytes_a_read, map_rows
from clcnet.files import atomic_path
from clcnet.memory import free_bytes

_NAME_BYTES = 100  # of a name in memory, roughly


@dataclasses.dataclass(frozen=True)
class Table:
    """A sorted-probability table in memory.

    Attributes:
        names: N file names.
        sorted_probs: (N, n) float32, each row in descending order, summing to one.
        correct: (N,) bool, whether the top-1 answer is right.
        source: (N,) which of the tables read together a row came from, from 0.
    """

    names: list[str]
    sorted_probs: np.ndarray
    correct: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """How many probabilities a row has."""
        return int(self.sorted_probs.shape[1])

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float(self.correct.mean())

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Table":
        """The rows at `indices`, in that order."""
        positions = np.asarray(indices)
        names = [self.names[index] for index in (np.flatnonzero(positions) if positions.dtype == bool else positions)]
        return Table(names, self.sorted_probs[positions], self.correct[positions], self.source[positions])


def sort_probs(probs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn a classifier's probabilities into rows of the table.

    Args:
        probs: (N, C), rows sum to one.
        targets: (N,) class indices.

    Returns:
        sorted_probs (N, C) float32 in descending order, correct (N,) bool, top1 (N,) int64, the answered class: the
        lowest index among ties.
    """
    probs = np.asarray(probs, dtype=np.float32)
    answer = probs.argmax(axis=1)
    return -np.sort(-probs, axis=1), answer == targets, answer


def check_sorted_probs(probs: np.ndarray, source: str = "probs") -> None:
    """Refuse what is not a table of sorted probabilities. Ties, one-hot and uniform rows are valid.

    Args:
        probs: (N, n).
        source: what to call the array in the message.

    Raises:
        ValueError: not two-dimensional, n < 2, or the first row (counted from 1) with a value that is not finite,
            negative, above one, out of order, or with a sum off one by more than 1e-3.
    """
    if probs.ndim != 2:
        raise ValueError(f"{source} has shape {tuple(probs.shape)}; expected (images, classes)")
    if probs.shape[1] < 2:
        raise ValueError(f"{source} has {probs.shape[1]} probabilities a row; at least 2 are needed")
    sound = map_rows(lambda rows: _all_sorted_probs(probs[rows]), len(probs))
    if not all(sound):
        start = sound.index(False) * ROWS_A_CHUNK
        _refuse_first_defect(probs[start : start + ROWS_A_CHUNK], start, source)


def _all_sorted_probs(chunk: np.ndarray) -> bool:
    """Whether all rows are valid, in few passes: in a sorted row the ends bound the rest, and NaN never compares."""
    descending = (chunk[:, :-1] >= chunk[:, 1:]).all()
    in_range = (chunk[:, -1] >= 0).all() and (chunk[:, 0] <= 1 + SUM_TOLERANCE).all()
    return bool(descending and in_range and (np.abs(chunk.sum(axis=1, dtype=np.float64) - 1) <= SUM_TOLERANCE).all())


def _refuse_first_defect(chunk: np.ndarray, start: int, source: str) -> None:
    sums = chunk.sum(axis=1, dtype=np.float64)
    _check_values(chunk, ~np.isfinite(chunk), start, source, "is not a finite number")
    _check_values(chunk, chunk < 0, start, source, "is negative")
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if off.any():
        row = int(off.argmax())
        raise ValueError(f"{source}: row {start + row + 1} sums to {sums[row]:.6g} instead of 1; give softmax outputs")
    _check_values(chunk, chunk > 1 + SUM_TOLERANCE, start, source, "is above 1")
    unsorted = np.zeros(chunk.shape, dtype=bool)
    np.greater(chunk[:, 1:], chunk[:, :-1], out=unsorted[:, 1:])
    _check_values(chunk, unsorted, start, source, "is larger than the one before it; sort each row in descending order")


def _check_values(chunk: np.ndarray, bad: np.ndarray, start: int, source: str, problem: str) -> None:
    if bad.any():
        row, column = divmod(int(bad.argmax()), bad.shape[1])
        raise ValueError(
            f"{source}: row {start + row + 1}, probability {column + 1} ({chunk[row, column]:.6g}) {problem}"
        )


class TableWriter:
    """Writes a table piece by piece, in bounded memory. A context manager; the format follows the extension.

    It writes to the path given, as it goes: wrap it in `files.atomic_path` where a half-written file must not be seen.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._csv: IO[bytes] | None = None
        self._parquet: table_parquet.RowsWriter | None = None
        self.num_rows = 0

    def __enter__(self) -> "TableWriter":
        if is_parquet(self.path):
            self._parquet = table_parquet.RowsWriter(self.path)
        else:
            self._csv = open(self.path, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._csv, self._parquet):
            if file is not None:
                file.close()

    def write(self, names: Sequence[str], sorted_probs: np.ndarray, correct: np.ndarray) -> None:
        """Append rows: N names, (N, n) float32 probabilities, (N,) labels."""
        assert len(names) == len(sorted_probs) == len(correct), (len(names), sorted_probs.shape, correct.shape)
        for start in range(0, len(names), ROWS_A_CHUNK):
            rows = slice(start, start + ROWS_A_CHUNK)
            if self._csv is not None:
                self._csv.write(table_csv.encode_rows(names[rows], sorted_probs[rows], correct[rows]))
            elif self._parquet is not None:
                self._parquet.write(names[rows], sorted_probs[rows], correct[rows])
        self.num_rows += len(names)


def is_parquet(path: Path) -> bool:
    """Whether the path's extension asks for Parquet; everything else is CSV."""
    return path.suffix.lower() in (".parquet", ".pq")


def write_table(table: Table, path: Path | str) -> None:
    """Write a table to .csv or .parquet; an existing file is replaced only by a finished one."""
    with atomic_path(path) as temporary, TableWriter(temporary) as writer:
        writer.write(table.names, table.sorted_probs, table.correct)


def read_tables(paths: Sequence[Path | str]) -> Table:
    """Read one or more tables and concatenate them; `source` tells their rows apart.

    Raises:
        OSError, ValueError: see `read_table`; or the tables have different numbers of classes, or one is given twice.
    """
    for position, path in enumerate(paths):
        if Path(path).resolve() in [Path(earlier).resolve() for earlier in paths[:position]]:
            raise ValueError(f"table {path} is given twice; name each table once")
    if len(paths) == 1:
        return read_table(paths[0])
    _check_memory(paths)
    tables = [read_table(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table.num_classes != tables[0].num_classes:
            raise ValueError(
                f"{path} has {table.num_classes} classes but {paths[0]} has {tables[0].num_classes}; "
                "give tables of models with the same classes"
            )
    return Table(
        names=[name for table in tables for name in table.names],
        sorted_probs=np.concatenate([table.sorted_probs for table in tables]),
        correct=np.concatenate([table.correct for table in tables]),
        source=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
    )


def read_table(path: Path | str) -> Table:
    """Read a sorted-probability table from CSV or Parquet and check every row.

    Raises:
        OSError: the file is missing or cannot be read, or it would not fit into the memory that is free.
        ValueError: it is not such a table; the message names the file and the row.
    """
    path = Path(path)
    _check_memory([path])
    try:
        if is_parquet(path):
            names, sorted_probs, labels = table_parquet.read_rows(path)
        else:
            free = free_bytes()
            at_once = free is None or _needed_bytes(path, at_once=True) < free
            names, sorted_probs, labels = table_csv.read_rows(path, at_once)
    except MemoryError:
        raise OSError(f"table {path} does not fit into memory; use a machine with more, or fewer rows") from None
    check_sorted_probs(sorted_probs, str(path))
    other = np.flatnonzero((labels != 0) & (labels != 1))
    if other.size:
        raise ValueError(
            f"{path}: row {other[0] + 1} has label {labels[other[0]]:g}; labels are 1 (right) or 0 (wrong)"
        )
    return Table(names, sorted_probs, labels.astype(bool), np.zeros(len(names), dtype=np.int64))


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"table {path} does not exist; make it with generate_data_for_CLCNet.py")
    if path.is_dir():
        raise IsADirectoryError(f"table {path} is a folder; name a CSV or Parquet file")
    if path.stat().st_size == 0:
        raise ValueError(f"table {path} is empty")
    if not is_parquet(path) and (other := table_csv.other_format(path)):
        raise ValueError(f"table {path} is {other}")


def _check_memory(paths: Sequence[Path | str]) -> None:
    """Refuse files whose rows would not fit into memory together, before the machine starts to swap."""
    needed = sum(map(_needed_bytes, map(Path, paths)))
    free = free_bytes()
    if free is not None and needed > free:
        sizes = " and ".join(f"{path} ({Path(path).stat().st_size / 1e9:.1f} GB)" for path in paths)
        raise OSError(
            f"table {sizes} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; use a "
            "machine with more, or fewer rows"
        )


def _needed_bytes(path: Path, at_once: bool = False) -> int:
    """What reading takes at most: of a CSV file at once, or in pieces, when these and the whole are alive together."""
    _check_file(path)
    num_rows, num_values = table_parquet.size(path) if is_parquet(path) else table_csv.estimate_size(path)
    of_values = (
        table_csv.BYTES_A_VALUE_AT_ONCE * num_values if at_once else 2 * 4 * num_values + bytes_a_read(num_values)
    )
    return of_values + num_rows * _NAME_BYTES


def match_rows(table: Table, images: ImageSet, source: str = "the table") -> np.ndarray:
    """Find the image of every row of a table, by bare name or by the path from the class folder's parent.

    Args:
        table: rows, of one or several tables read together.
        images: the data set.
        source: what to call the table in messages.

    Returns:
        (N,) index into `images` for every row.

    Raises:
        ValueError: a row names no image, or more than one, or two rows of one table name the same image.
    """
    index_of = {name: index for index, name in enumerate(images.names)}
    other_names: dict[str, list[int]] = {}
    for index in range(len(images)):
        for name in names_of(images, index):
            other_names.setdefault(name, []).append(index)
    matched = np.empty(len(table), dtype=np.int64)
    for row, name in enumerate(table.names):
        found = (
            [index_of[name]]
            if name in index_of
            else other_names.get(name, other_names.get(name.replace("\\", "/"), []))
        )
        if not found:
            raise ValueError(f"{source}: row {row + 1} names {name!r}, which is not in {images.root}")
        if len(found) > 1:
            first, second = (images.files[index] for index in found[:2])
            raise ValueError(
                f"{source}: row {row + 1} names {name!r}, which may be {first} or {second}; make the table again"
            )
        matched[row] = found[0]
    _check_named_once(table, matched, source)
    return matched


def _check_named_once(table: Table, matched: np.ndarray, source: str) -> None:
    seen: dict[tuple[Any, Any], int] = {}
    for row, key in enumerate(zip(table.source, matched, strict=True)):
        first = seen.setdefault(key, row)
        if first != row:
            raise ValueError(
                f"{source}: rows {first + 1} and {row + 1} both name {table.names[row]!r}; keep one of them"
            )


def fold_of_rows(table: Table, images: ImageSet, source: str = "the table") -> np.ndarray:
    """The fold, from 0, of every row's image: (N,). Raises as `match_rows` does."""
    folds: np.ndarray = images.folds[match_rows(table, images, source)]
    return folds
