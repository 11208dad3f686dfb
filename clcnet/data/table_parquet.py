"""The table's rows as Parquet: file (text), sorted_probs (lists of n float32), correct (0 or 1)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from clcnet.data.table_rows import Rows, encode_name, rows_a_read


class RowsWriter:
    """Writes rows to a Parquet file piece by piece; their number of probabilities is known with the first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: pa.parquet.ParquetWriter | None = None

    def write(self, names: Sequence[str], sorted_probs: np.ndarray, correct: np.ndarray) -> None:
        """Append rows."""
        flat = pa.array(np.ascontiguousarray(sorted_probs, dtype=np.float32).reshape(-1))
        columns = [
            # as bytes, because a file name need not be UTF-8
            pa.array([encode_name(name) for name in names], pa.binary()).cast(pa.string(), safe=False),
            pa.FixedSizeListArray.from_arrays(flat, sorted_probs.shape[1]),
            pa.array(correct.astype(np.int8)),
        ]
        batch = pa.record_batch(columns, names=["file", "sorted_probs", "correct"])
        if self._writer is None:
            # probabilities hardly repeat, so a dictionary costs time and saves nothing
            self._writer = pa.parquet.ParquetWriter(self.path, batch.schema, compression="zstd", use_dictionary=False)
        self._writer.write_batch(batch)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def size(path: Path) -> tuple[int, int]:
    """How many rows and numbers a Parquet file says that it holds. Raises ValueError if it is not a table."""
    file = _open(path)
    num_rows = file.metadata.num_rows
    return num_rows, num_rows * (file.schema_arrow.field("sorted_probs").type.list_size + 1)


def read_rows(path: Path) -> Rows:
    """Read the rows of a Parquet file.

    Raises:
        ValueError: it is not a table, or damaged.
    """
    file = _open(path)
    num_classes = file.schema_arrow.field("sorted_probs").type.list_size
    names: list[str] = []
    sorted_probs = np.empty((file.metadata.num_rows, num_classes), np.float32)
    labels = np.empty(len(sorted_probs))
    try:
        for batch in file.iter_batches(rows_a_read(num_classes), columns=["file", "sorted_probs", "correct"]):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                column.validate(full=column.type != pa.string())  # which need not be UTF-8
                if column.null_count:
                    raise ValueError(f"table {path} has empty cells in column {name}")
            rows = slice(len(names), len(names) + len(batch))
            names += [name.decode("utf-8", "surrogateescape") for name in batch["file"].cast(pa.binary()).to_pylist()]
            if len(names) > len(labels):
                break
            flat = batch["sorted_probs"].flatten().to_numpy(zero_copy_only=False)
            sorted_probs[rows] = flat.reshape(len(batch), num_classes)
            labels[rows] = batch["correct"].to_numpy(zero_copy_only=False)
    except MemoryError:  # pyarrow's own is one of its ArrowExceptions too
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"table {path} cannot be read ({error}); was it damaged?") from None
    if not names:
        raise ValueError(f"table {path} has no rows")
    if len(names) != len(labels):
        raise ValueError(f"table {path} has another number of rows than it says; was it damaged?")
    return names, sorted_probs, labels


def _open(path: Path) -> pa.parquet.ParquetFile:
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
