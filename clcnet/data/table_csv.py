"""The table's rows as CSV: written as the shortest decimals, read back as the same float32 numbers, bit for bit."""

import csv
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from clcnet.data.table_rows import Rows, encode_name, map_rows, rows_a_read

BYTES_A_VALUE_AT_ONCE = 30  # while pandas holds numbers twice and takes a third of the text apart
_LONGEST_LINE = 1 << 24
_SAMPLE = 1 << 20  # bytes of a file from which its numbers of rows and values are told
_TO_QUOTE = re.compile(r'[,"\r\n]|^\s|\s$')
# Of all float32 numbers from 0 to 1, one alone lies so that decimal -> double -> float32 ends at its neighbour
# (benchmarks/exact_float32.py tries them all).
_DECIMAL, _EXACT, _NEIGHBOUR = 7.038531e-26, np.uint32(0x15AE43FD).view(np.float32), np.float32(7.038531e-26)
_CSV_OPTIONS: dict[str, Any] = {
    "header": None,
    "na_filter": False,  # a file may be called "NA.jpg", and an empty cell is a defect to report
    "compression": None,  # pandas would go by the extension
}
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
    if _TO_QUOTE.search(name):
        name = '"' + name.replace('"', '""') + '"'
    return encode_name(name)


def other_format(path: Path) -> str | None:
    """What a file is that is no CSV, by its first bytes, and what to do about it."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((problem for magic, problem in _NO_CSV.items() if start.startswith(magic)), None)


def estimate_size(path: Path) -> tuple[int, int]:
    """About how many rows and numbers a CSV file holds, if all of it is like its start."""
    with open(path, "rb") as file:
        start = file.read(_SAMPLE)
        start += b"" if b"\n" in start else file.read(_LONGEST_LINE)
    lines = start[: start.rfind(b"\n") + 1] or start  # whole ones
    ratio = path.stat().st_size / len(lines)
    num_rows, num_values = (math.ceil(ratio * max(lines.count(mark), 1)) for mark in (b"\n", b","))
    return num_rows, num_values


def read_rows(path: Path, at_once: bool) -> Rows:
    """Read the rows of a CSV file.

    Args:
        path: the file.
        at_once: there is memory for `BYTES_A_VALUE_AT_ONCE`, so that the file can be read by all cores.

    Raises:
        ValueError: the rows are not names, probabilities and labels; the message names the row.
    """
    num_columns = _count_columns(path)
    try:
        return (at_once and _read_at_once(path)) or _read_in_pieces(path, num_columns)
    except ValueError as error:  # pandas' ParserError and UnicodeDecodeError among them; so is a row that is too short
        raise ValueError(_first_bad_row(path, num_columns) or f"table {path} cannot be read ({error})") from None


def _read_at_once(path: Path) -> Rows | None:
    """All rows by all cores, which pandas uses for whole files alone.

    Returns:
        None where something cannot be read, or a number may not be exact.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)  # that names have a converter and so no type
            # a type for each column would have pandas put each together on its own, which takes longer
            frame = pd.read_csv(path, converters={0: str}, dtype=np.float32, **_CSV_OPTIONS)
    except ValueError:  # a defect, or a name that is not UTF-8
        return None
    by_column = frame.iloc[:, 1:-1].to_numpy()
    sorted_probs = np.empty(by_column.shape, np.float32)

    def copy(rows: slice) -> bool:
        sorted_probs[rows] = by_column[rows]
        return bool((sorted_probs[rows] == _NEIGHBOUR).any())

    if any(map_rows(copy, len(frame))):
        return None
    return frame[0].tolist(), sorted_probs, frame.iloc[:, -1].to_numpy(np.float64)


def _read_in_pieces(path: Path, num_columns: int) -> Rows:
    """The same in less memory and more time, with every name and exact in every bit."""
    names: list[str] = []
    probs, labels = [], []
    with pd.read_csv(
        path,
        dtype={0: object},
        encoding_errors="surrogateescape",  # a file name need not be UTF-8
        low_memory=False,  # or it would warn of columns in which numbers and text mix
        chunksize=rows_a_read(num_columns),
        **_CSV_OPTIONS,
    ) as reader:
        for frame in reader:
            names += frame[0].tolist()
            values = frame.iloc[:, 1:-1].to_numpy(np.float64)
            piece = values.astype(np.float32, order="C")
            piece[values == _DECIMAL] = _EXACT
            probs.append(piece)
            labels.append(frame.iloc[:, -1].to_numpy(np.float64))
    return names, np.concatenate(probs), np.concatenate(labels)


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
