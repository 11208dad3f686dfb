"""The files of outputs: CSV as the specification has it, and Parquet, which keeps all that is known.

CSV has no header: file name, n probabilities in descending order, 1 if the top-1 answer is right, else 0 (UTF-8; a
byte-order mark is accepted). Parquet has the columns file, sorted_probs, correct and, where they are known, targets (-1
of an image whose class is not) and classes; the record stands as JSON in the file's metadata. Both are read as the
float32 numbers that were written, bit for bit.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from clcnet.data.checks import ROWS_A_CHUNK, UNKNOWN, map_rows, rows_at_once
from clcnet.files import check_output
from clcnet.memory import free_bytes
from clcnet.strangers import parse_json

if TYPE_CHECKING:
    from clcnet.data.outputs import Outputs, Record

_BLOCK = 1 << 24  # bytes of CSV that one thread takes at a time
_VALUES_A_READ = 1 << 22  # of Parquet: rows may have 2 numbers or 21,843
_BYTES_A_NAME = 100  # in memory, roughly
_LONGEST_NAME = 4096  # bytes, as of a path
_LONGEST_LINE = 1 << 22  # characters; 21,843 classes take 300,000
_SAMPLE = 1 << 20  # bytes of a file from which its numbers of rows and values are told
_RECORD = b"clcnet"  # the record's key in the metadata
_TO_QUOTE = re.compile(r'[,"\r\n]|^\s|\s$')
_NO_TABLE = (
    "table {} is not a Parquet table with file (text), sorted_probs (lists of n numbers), correct (0 or 1) and, maybe, "
    "classes and targets: {} is {}"
)
_BLANKS = re.compile(r"got 1: \s*\Z")  # pyarrow's words
_RAGGED = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_NO_NUMBER = re.compile(r"column #(\d+): Row #(\d+): .* invalid value ('.*')", re.DOTALL)
_NO_CSV = {  # how other files begin, whatever their name says
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"PK\x03\x04": "a zip file or a workbook; unpack it, or save it as CSV",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


class Rows(NamedTuple):
    """What stands in a file, not yet checked."""

    names: list[str]
    sorted_probs: NDArray[np.float32]
    correct: NDArray[Any]  # numbers
    classes: NDArray[np.unsignedinteger[Any]] | None
    targets: NDArray[np.int64] | None
    record: Any  # what JSON says; None where it is none


def check_table_output(path: Path | str, inputs: Iterable[Path | str | None] = ()) -> Path:
    """As `files.check_output`, for a table: its extension must also say in which format to write it."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet", ".pq") and not path.is_dir():
        raise ValueError(f"output {path} ends in neither .csv nor .parquet; name one of these formats")
    return check_output(path, inputs)


class TableWriter:
    """Writes outputs piece by piece, in bounded memory. A context manager; the format follows the extension.

    It writes to the path given, as it goes: wrap it in `files.atomic_path` where a half-written file must not be seen.
    `record` is what Parquet keeps of the model; that of the first piece when left out.
    """

    def __init__(self, path: Path | str, record: Record | None = None) -> None:
        self.path = check_table_output(path)
        self.record = record
        self._file: Any = None

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, outputs: Outputs) -> None:
        """Append rows; of the first ones' number of classes, and with classes if those had them."""
        is_csv = self.path.suffix.lower() == ".csv"
        if is_csv and outputs.correct is None:
            raise ValueError(
                "a CSV table says which answers are right, and these outputs do not; give the true classes, or save "
                "them as .parquet"
            )
        step = rows_at_once(outputs.num_classes) if is_csv else ROWS_A_CHUNK
        for start in range(0, len(outputs), step):
            piece = outputs.subset(range(start, min(start + step, len(outputs))))
            if is_csv:
                self._file = self._file or open(self.path, "wb")
                self._file.writelines(map_rows(functools.partial(encode_rows, piece), len(piece)))
            else:
                batch = _to_batch(piece)
                self._file = self._file or _parquet_writer(self.path, batch.schema, self.record or outputs.record)
                self._file.write_batch(batch)


def _parquet_writer(path: Path, schema: pa.Schema, record: Record) -> pa.parquet.ParquetWriter:
    lists = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    return pa.parquet.ParquetWriter(
        path,
        schema.with_metadata({_RECORD: json.dumps(dataclasses.asdict(record))}),
        compression="zstd",
        use_dictionary=False,  # numbers hardly repeat, so one costs time and saves nothing
        # the bytes of a number apart: what the first ones hold changes slowly along a row
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists},
    )


def encode_rows(outputs: Outputs, rows: slice) -> bytes:
    """Rows of the CSV table as bytes: each number the shortest decimal that reads back as the same float32."""
    assert outputs.correct is not None, "CSV says which answers are right"
    names, correct = outputs.names[rows], outputs.correct[rows].astype(np.int8)
    columns = np.ascontiguousarray(outputs.sorted_probs[rows].T, dtype=np.float32)
    arrays = [pa.array(column) for column in (*columns, correct)]
    numbers = pa.record_batch(arrays, names=[str(index) for index in range(len(arrays))])
    sink = pa.BufferOutputStream()
    options = pa.csv.WriteOptions(include_header=False, quoting_style="none", batch_size=max(len(names), 1))
    pa.csv.write_csv(numbers, sink, options)
    lines = sink.getvalue().to_pybytes().splitlines()
    return b"".join(b"%b,%b\n" % (_quote(name), line) for name, line in zip(names, lines, strict=True))


def _quote(name: str) -> bytes:
    if _TO_QUOTE.search(name):
        name = '"' + name.replace('"', '""') + '"'
    return _encode(name)


def _encode(name: str) -> bytes:
    """The bytes of a file name as the file system has them: they need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _decode(names: pa.Array) -> list[str]:
    return [name.decode("utf-8", "surrogateescape") for name in names.cast(pa.binary()).to_pylist()]


def _to_batch(outputs: Outputs) -> pa.RecordBatch:
    correct = targets = np.full(len(outputs), UNKNOWN)
    if outputs.targets is not None:
        targets = outputs.targets
        if outputs.classes is not None:
            correct = np.where(targets == UNKNOWN, UNKNOWN, outputs.classes[:, 0] == targets)
    columns = {
        "file": pa.array([_encode(name) for name in outputs.names], pa.binary()).cast(pa.string(), safe=False),
        "sorted_probs": _lists(outputs.sorted_probs),
        "correct": pa.array((correct if outputs.correct is None else outputs.correct).astype(np.int8)),
        "targets": pa.array(targets.astype(np.int64)),
    }
    if outputs.classes is not None:
        columns["classes"] = _lists(outputs.classes)
    return pa.record_batch(columns)


def _lists(rows: NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def read_rows(path: Path) -> Rows:
    """Read a file of outputs: Parquet if it is called so or begins so, else CSV; see `Outputs.load`."""
    check_memory([path])
    try:
        return _read_parquet(path) if _is_parquet(path) else _read_csv(path)
    except MemoryError:
        raise OSError(f"table {path} does not fit into memory; use a machine with more, or fewer rows") from None


def check_memory(paths: Sequence[Path]) -> None:
    """Refuse files that are missing or would not fit into memory together, before the machine starts to swap."""
    needed = sum(map(_needed_bytes, paths))
    free = free_bytes()
    if free is not None and needed > free:
        sizes = " and ".join(f"{path} ({path.stat().st_size / 1e9:.1f} GB)" for path in paths)
        raise OSError(
            f"table {sizes} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; use a "
            "machine with more, or fewer rows"
        )


def _needed_bytes(path: Path) -> int:
    """What reading takes at most: all numbers twice, names, and what is on its way."""
    if not path.exists():
        raise FileNotFoundError(f"table {path} does not exist; make it with generate_data_for_CLCNet.py")
    if not path.is_file():
        kind = "folder" if path.is_dir() else "pipe or device"
        raise OSError(f"table {path} is a {kind}; name a CSV or Parquet file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"table {path} is empty")
    if _is_parquet(path):
        file, types = _open_parquet(path)
        num_rows = file.metadata.num_rows
        num_values = num_rows * types["sorted_probs"].list_size * (1 + ("classes" in types))
        on_its_way = 16 * min(num_values, _VALUES_A_READ)
    else:  # if all of it is like its start
        lines = _first_lines(path)
        num_rows, num_values = (math.ceil(size / len(lines) * max(lines.count(mark), 1)) for mark in (b"\n", b","))
        on_its_way = 8 * min(size, _BLOCK)
    return int(2 * 4 * num_values + num_rows * _BYTES_A_NAME + on_its_way)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq") or _start(path, 4) == b"PAR1"


def _start(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


# ---------------------------------------------------------------- CSV


def _first_lines(path: Path) -> bytes:
    start = _start(path, _SAMPLE)
    start = start if b"\n" in start else _start(path, _LONGEST_LINE)
    other = next((problem for magic, problem in _NO_CSV.items() if start.startswith(magic)), None)
    if other:
        raise ValueError(f"table {path} is {other}")
    return start[: start.rfind(b"\n") + 1] or start


def _read_csv(path: Path) -> Rows:
    num_columns = len(_first_row(path))
    if num_columns < 4:
        raise ValueError(
            f"{path}: row 1 has {num_columns} columns; expected a file name, at least 2 probabilities, and a label"
        )
    columns = [str(index) for index in range(num_columns)]
    try:
        table = _parse_csv(path, columns)
    except pa.ArrowInvalid:
        table = _parse_odd_csv(path, columns)
    sorted_probs = np.empty((len(table), num_columns - 2), np.float32)
    done = 0
    for batch in table.select(columns[1:-1]).to_batches():
        sorted_probs[done : done + len(batch)] = batch.to_tensor().to_numpy()
        done += len(batch)
    return Rows(_decode(table[0]), sorted_probs, table[columns[-1]].to_numpy(), None, None, {})


def _first_row(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE), "")
        try:
            return next(row for row in csv.reader(lines) if len(row) > 1 or (row and row[0].strip()))
        except StopIteration:
            raise ValueError(f"table {path} has no rows") from None
        except csv.Error as error:
            raise ValueError(f"table {path} is not a CSV file ({error})") from None


def _parse_csv(
    path: Path, columns: list[str], threads: bool = True, on_other_rows: Callable[[Any], str] | None = None
) -> pa.Table:
    types = {columns[0]: pa.binary()} | dict.fromkeys(columns[1:], pa.float32())
    with open(path, "rb") as file:  # pyarrow would unpack a path by its extension
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # in quotes a value may hold line breaks: pyarrow then looks for the ends of rows in one thread
            has_quotes = content.find(b'"') >= 0
        return pa.csv.read_csv(
            file,
            pa.csv.ReadOptions(column_names=columns, block_size=_BLOCK, use_threads=threads),
            pa.csv.ParseOptions(newlines_in_values=has_quotes, invalid_row_handler=on_other_rows),
            pa.csv.ConvertOptions(column_types=types, null_values=[]),
        )


def _parse_odd_csv(path: Path, columns: list[str]) -> pa.Table:
    """Read what holds lines of blanks, which are no rows; name the first row that is none of a table."""
    try:
        try:
            return _parse_csv(path, columns, threads=False)  # in one thread, pyarrow counts rows
        except pa.ArrowInvalid as error:
            if not _BLANKS.search(str(error)):
                raise
            # not for all files, since pyarrow complains on stderr of rows that are not UTF-8
            return _parse_csv(path, columns, False, lambda row: "error" if row.text.strip() else "skip")
    except pa.ArrowInvalid as error:
        message = str(error)
    if ragged := _RAGGED.search(message):
        row, expected, found = ragged.groups()
        raise ValueError(f"{path}: row {row} has {found} columns but row 1 has {expected}; was the file cut short?")
    if no_number := _NO_NUMBER.search(message):
        column, row, cell = no_number.groups()
        is_header = (row, column) == ("1", "1")
        wanted = "a probability should be; a table has no header row" if is_header else "a number should be"
        raise ValueError(f"{path}: row {row} holds {cell} where {wanted}")
    raise ValueError(f"table {path} cannot be read ({message[:200]})")


# ---------------------------------------------------------------- Parquet


def _open_parquet(path: Path) -> tuple[pa.parquet.ParquetFile, dict[str, Any]]:
    """A Parquet file and the types of its columns, which are those of a table."""
    try:  # pre_buffer would hold all of the file at once
        file = pa.parquet.ParquetFile(path, pre_buffer=False, read_dictionary=["file"])
    except KeyError:
        raise ValueError(_NO_TABLE.format(path, "file", "missing")) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"table {path} is not a Parquet file ({error}); was it cut short?") from None
    names = file.schema_arrow.names
    types = dict(zip(names, file.schema_arrow.types, strict=True))
    if len(types) < len(names):
        raise ValueError(f"table {path} has two columns called {max(names, key=names.count)}")
    num_classes = getattr(types.get("sorted_probs"), "list_size", 0)
    of_classes = pa.list_(pa.from_numpy_dtype(np.min_scalar_type(max(num_classes - 1, 0))), num_classes)
    expected: dict[str, Callable[[Any], bool]] = {
        "file": pa.types.is_dictionary,  # of text alone
        "sorted_probs": lambda kind: pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type),
        "correct": lambda kind: pa.types.is_integer(kind) or pa.types.is_boolean(kind),
        "classes": lambda kind: kind.equals(of_classes),
        "targets": lambda kind: kind.equals(pa.int64()),
    }
    for name, is_right in expected.items():
        optional = name in ("classes", "targets")
        if not (optional if name not in types else is_right(types[name])):
            raise ValueError(_NO_TABLE.format(path, name, types.get(name, "missing")))
    # not column by column: of a damaged one pyarrow ends the process
    size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
    if size > (_LONGEST_NAME + 16 * num_classes + 64) * file.metadata.num_rows + _SAMPLE:
        raise ValueError(f"table {path} has names of more than {_LONGEST_NAME:,} bytes; was it damaged?")
    return file, types


def _read_parquet(path: Path) -> Rows:
    file, types = _open_parquet(path)
    num_rows, num_classes = file.metadata.num_rows, types["sorted_probs"].list_size
    names: list[str] = []
    arrays: dict[str, NDArray[Any]] = {
        "sorted_probs": np.empty((num_rows, num_classes), np.float32),
        "correct": np.empty(num_rows, np.int64),
        "targets": np.empty(num_rows, np.int64),
        "classes": np.empty((num_rows, num_classes), np.min_scalar_type(num_classes - 1)),
    }
    arrays = {name: array for name, array in arrays.items() if name in types}
    try:
        for batch in file.iter_batches(max(_VALUES_A_READ // num_classes, 1), columns=["file", *arrays]):
            for name in ("file", *arrays):
                if batch[name].null_count or (name == "classes" and batch[name].flatten().null_count):
                    raise ValueError(f"table {path} has empty cells in column {name}")
            rows = slice(len(names), len(names) + len(batch))
            # as a dictionary, a name that is repeated at no cost takes its memory once
            known = _decode(batch["file"].dictionary)
            names += [known[index] for index in batch["file"].indices.to_pylist()]
            if len(names) > num_rows:
                break
            for name, array in arrays.items():
                array[rows] = _numbers(batch[name]).reshape(array[rows].shape)
    except MemoryError:  # pyarrow's own is one of its ArrowExceptions too
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"table {path} cannot be read ({error}); was it damaged?") from None
    if not names:
        raise ValueError(f"table {path} has no rows")
    if len(names) != num_rows:
        raise ValueError(f"table {path} has another number of rows than it says; was it damaged?")
    record = None
    with contextlib.suppress(ValueError):
        record = parse_json((file.metadata.metadata or {}).get(_RECORD, b"{}"))
    return Rows(names, arrays["sorted_probs"], arrays["correct"], arrays.get("classes"), arrays.get("targets"), record)


def _numbers(column: Any) -> NDArray[Any]:
    column.validate(full=True)
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return numbers
