"""The sorted-probability table: a classifier's output, one image a row, and whether its answer is right.

A row holds the file name, n probabilities in descending order, and 1 if the top-1 answer is right, else 0. CSV without
a header (UTF-8; a byte-order mark is accepted) or Parquet, by the file's extension, with the same content. Reading
gives the float32 numbers that were written, bit for bit.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from clcnet.confidence import SUM_TOLERANCE
from clcnet.files import atomic_path
from clcnet.images import ImageSet, names_of
from clcnet.memory import free_bytes

ROWS_A_CHUNK = 512  # bounds the memory of writing and checking, large enough to keep pyarrow busy
_VALUES_A_READ = 1 << 22  # at a time: rows may have 2 numbers or 21,843
_NAME_BYTES = 100  # of a name in memory, roughly
_BYTES_A_VALUE_READ = 40  # while pandas and NumPy hold the same piece
_LONGEST_LINE = 1 << 24
_NO_CSV = {  # how other files begin, whatever their name says
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"PK\x03\x04": "a zip file or a workbook; unpack it, or save it as CSV",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
}


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
    for start in range(0, len(probs), ROWS_A_CHUNK):
        chunk = probs[start : start + ROWS_A_CHUNK]
        sums = chunk.sum(axis=1, dtype=np.float64)
        if not _all_sorted_probs(chunk, sums):
            _refuse_first_defect(chunk, sums, start, source)


def _all_sorted_probs(chunk: np.ndarray, sums: np.ndarray) -> bool:
    """Whether all rows are valid, in few passes: in a sorted row the ends bound the rest, and NaN never compares."""
    descending = (chunk[:, :-1] >= chunk[:, 1:]).all()
    in_range = (chunk[:, -1] >= 0).all() and (chunk[:, 0] <= 1 + SUM_TOLERANCE).all()
    return bool(descending and in_range and (np.abs(sums - 1) <= SUM_TOLERANCE).all())


def _refuse_first_defect(chunk: np.ndarray, sums: np.ndarray, start: int, source: str) -> None:
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
        self._file: IO[bytes] | None = None
        self._parquet: pa.parquet.ParquetWriter | None = None
        self.num_rows = 0

    def __enter__(self) -> "TableWriter":
        if not is_parquet(self.path):
            self._file = open(self.path, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._parquet is not None:
            self._parquet.close()

    def write(self, names: Sequence[str], sorted_probs: np.ndarray, correct: np.ndarray) -> None:
        """Append rows: N names, (N, n) float32 probabilities, (N,) labels."""
        assert len(names) == len(sorted_probs) == len(correct), (len(names), sorted_probs.shape, correct.shape)
        for start in range(0, len(names), ROWS_A_CHUNK):
            rows = slice(start, start + ROWS_A_CHUNK)
            if self._file is not None:
                self._file.write(encode_rows(names[rows], sorted_probs[rows], correct[rows]))
            else:
                self._write_parquet(names[rows], sorted_probs[rows], correct[rows])
        self.num_rows += len(names)

    def _write_parquet(self, names: Sequence[str], sorted_probs: np.ndarray, correct: np.ndarray) -> None:
        flat = pa.array(np.ascontiguousarray(sorted_probs, dtype=np.float32).reshape(-1))
        columns = [
            # as bytes, because a file name need not be UTF-8
            pa.array([_encode(name) for name in names], pa.binary()).cast(pa.string(), safe=False),
            pa.FixedSizeListArray.from_arrays(flat, sorted_probs.shape[1]),
            pa.array(correct.astype(np.int8)),
        ]
        batch = pa.record_batch(columns, names=["file", "sorted_probs", "correct"])
        if self._parquet is None:
            # probabilities hardly repeat, so a dictionary costs time and saves nothing
            self._parquet = pa.parquet.ParquetWriter(self.path, batch.schema, compression="zstd", use_dictionary=False)
        self._parquet.write_batch(batch)


def is_parquet(path: Path) -> bool:
    """Whether the path's extension asks for Parquet; everything else is CSV."""
    return path.suffix.lower() in (".parquet", ".pq")


def encode_rows(names: Sequence[str], sorted_probs: np.ndarray, correct: np.ndarray) -> bytes:
    """Rows of the CSV table as bytes: each number the shortest decimal that reads back as the same float32."""
    columns = np.ascontiguousarray(np.asarray(sorted_probs, dtype=np.float32).T)
    arrays = [pa.array(column) for column in columns] + [pa.array(np.asarray(correct).astype(np.int8))]
    numbers = pa.record_batch(arrays, names=[str(index) for index in range(len(arrays))])
    sink = pa.BufferOutputStream()
    options = pa.csv.WriteOptions(include_header=False, quoting_style="none", batch_size=max(len(names), 1))
    pa.csv.write_csv(numbers, sink, options)
    lines = sink.getvalue().to_pybytes().splitlines()
    return b"".join(b"%b,%b\n" % (_quote(name), line) for name, line in zip(names, lines, strict=True))


def _quote(name: str) -> bytes:
    if any(character in name for character in ',"\r\n') or name != name.strip():
        name = '"' + name.replace('"', '""') + '"'
    return _encode(name)


def _encode(name: str) -> bytes:
    """The bytes of a file name, as the file system has them."""
    return name.encode("utf-8", "surrogateescape")


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
        names, sorted_probs, labels = _read_parquet(path) if is_parquet(path) else _read_csv(path)
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
    with open(path, "rb") as file:
        start = file.read(8)
    if not is_parquet(path):
        for magic, problem in _NO_CSV.items():
            if start.startswith(magic):
                raise ValueError(f"table {path} is {problem}")


def _open_parquet(path: Path) -> pa.parquet.ParquetFile:
    """A Parquet file whose columns have the types of a table."""
    try:
        file = pa.parquet.ParquetFile(path, pre_buffer=False)  # which would hold all of it at once
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"table {path} is not a Parquet file ({error}); was it cut short?") from None
    types = {field.name: field.type for field in file.schema_arrow}
    expected: dict[str, Callable[[Any], bool]] = {
        "file": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "sorted_probs": lambda kind: pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type),
        "correct": lambda kind: pa.types.is_integer(kind) or pa.types.is_boolean(kind),
    }
    for name, is_right in expected.items():
        if name not in types or not is_right(types[name]):
            raise ValueError(
                f"table {path} is not a Parquet table with file (text), sorted_probs (lists of n numbers) and correct "
                f"(0 or 1): {name} is {types.get(name, 'missing')}"
            )
    return file


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    file = _open_parquet(path)
    num_classes = file.schema_arrow.field("sorted_probs").type.list_size
    names: list[str] = []
    probs, labels = [], []
    try:
        for batch in file.iter_batches(_rows_a_read(num_classes), columns=["file", "sorted_probs", "correct"]):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                column.validate(full=column.type != pa.string())  # which need not be UTF-8
                if column.null_count:
                    raise ValueError(f"table {path} has empty cells in column {name}")
            names += [name.decode("utf-8", "surrogateescape") for name in batch["file"].cast(pa.binary()).to_pylist()]
            # copied, or the piece would hold on to all of its batch
            flat = np.array(batch["sorted_probs"].flatten().to_numpy(zero_copy_only=False), np.float32)
            probs.append(flat.reshape(len(batch), num_classes))
            labels.append(batch["correct"].to_numpy(zero_copy_only=False).astype(np.float64))
    except MemoryError:  # pyarrow's own is one of its ArrowExceptions too
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"table {path} cannot be read ({error}); was it damaged?") from None
    if not names:
        raise ValueError(f"table {path} has no rows")
    return names, np.concatenate(probs), np.concatenate(labels)


def _rows_a_read(num_columns: int) -> int:
    return max(_VALUES_A_READ // max(num_columns, 1), 1)


def _read_csv(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    num_columns = _count_columns(path)
    names: list[str] = []
    pieces = []
    try:
        with pd.read_csv(
            path,
            header=None,
            dtype={0: object},
            na_filter=False,  # a file may be called "NA.jpg", and an empty cell is a defect to report
            encoding_errors="surrogateescape",  # a file name need not be UTF-8
            compression=None,  # pandas would go by the extension
            low_memory=False,  # or it would warn of columns in which numbers and text mix
            chunksize=_rows_a_read(num_columns),
        ) as reader:
            for frame in reader:
                names += frame[0].tolist()
                pieces.append(_to_float32(frame.iloc[:, 1:].to_numpy(np.float64)))
    except (ValueError, UnicodeDecodeError) as error:  # pandas' ParserError is a ValueError
        raise ValueError(_first_bad_row(path, num_columns) or f"table {path} cannot be read ({error})") from None
    values = np.concatenate(pieces)
    if np.isnan(values).any() and (message := _first_bad_row(path, num_columns)):
        raise ValueError(message)
    return names, values[:, :-1], values[:, -1]


def _to_float32(values: np.ndarray) -> np.ndarray:
    """Round doubles, parsed from the shortest decimals of float32 numbers, back to those numbers.

    Of all float32 numbers from 0 to 1, one alone lies so that decimal -> double -> float32 ends at its neighbour
    (benchmarks/exact_float32.py tries them all).
    """
    rounded = values.astype(np.float32)
    rounded[values == 7.038531e-26] = np.uint32(0x15AE43FD).view(np.float32)
    return rounded


def _count_columns(path: Path) -> int:
    """The number of columns of the first row, which must look like a table's."""
    row = next(_rows(path), None)
    if row is None:
        raise ValueError(f"table {path} has no rows")
    if len(row) < 4:
        raise ValueError(
            f"{path}: row 1 has {len(row)} columns; expected a file name, at least 2 probabilities, and a label"
        )
    if not _is_number(row[1]):
        raise ValueError(f"{path}: row 1 holds {row[1]!r} where a probability should be; a table has no header row")
    return len(row)


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows by Python's own reader: slow, used for the first row and to find the row that a fast reader refused."""
    limit_of_others = csv.field_size_limit(_LONGEST_LINE)
    with open(path, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        try:
            yield from (row for row in csv.reader(file) if row)
        except csv.Error as error:
            raise ValueError(f"table {path} is not a CSV file ({error})") from None
        finally:
            csv.field_size_limit(limit_of_others)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_bad_row(path: Path, num_columns: int) -> str | None:
    for number, row in enumerate(_rows(path), start=1):
        if len(row) != num_columns:
            return f"{path}: row {number} has {len(row)} columns but row 1 has {num_columns}; was the file cut short?"
        bad = next((cell for cell in row[1:] if not _is_number(cell)), None)
        if bad is not None:
            return f"{path}: row {number} holds {bad!r} where a number should be"
    return None


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


def _needed_bytes(path: Path) -> int:
    """What reading a table takes at most: the numbers twice, because the pieces and the whole are alive together."""
    _check_file(path)
    if is_parquet(path):
        file = _open_parquet(path)
        num_rows: int = file.metadata.num_rows
        num_values: int = num_rows * (file.schema_arrow.field("sorted_probs").type.list_size + 1)
    else:
        with open(path, "rb") as opened:
            start = opened.read(_LONGEST_LINE)
        lines = start[: start.rfind(b"\n") + 1] or start  # whole ones
        num_files = path.stat().st_size / len(lines)  # like this start
        num_rows, num_values = (math.ceil(num_files * max(lines.count(mark), 1)) for mark in (b"\n", b","))
    return 2 * 4 * num_values + _BYTES_A_VALUE_READ * min(num_values, _VALUES_A_READ) + num_rows * _NAME_BYTES


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
            first, second = (images.paths[index].relative_to(images.root).as_posix() for index in found[:2])
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
