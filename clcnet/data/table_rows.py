"""Rows of a table on their way between a file and memory: how many at a time, in threads or not, names as bytes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

ROWS_A_CHUNK = 512  # bounds the memory of writing and checking, large enough to keep pyarrow busy
VALUES_A_READ = 1 << 22  # at a time: rows may have 2 numbers or 21,843

Rows = tuple[list[str], np.ndarray, np.ndarray]  # names; (N, n) float32 probabilities; (N,) labels as they stand there
T = TypeVar("T")


def rows_a_read(num_columns: int) -> int:
    """How many rows to read at a time."""
    return max(VALUES_A_READ // max(num_columns, 1), 1)


def bytes_a_read(num_values: int) -> int:
    """The memory of one read of a file with so many numbers, while pandas and NumPy hold the same ones."""
    return 40 * min(num_values, VALUES_A_READ)


def map_rows(function: Callable[[slice], T], num_rows: int) -> list[T]:
    """Call a function of chunks of rows, in threads where there are several: NumPy lets them run side by side."""
    chunks = [slice(start, start + ROWS_A_CHUNK) for start in range(0, num_rows, ROWS_A_CHUNK)]
    if len(chunks) < 2:
        return [function(chunk) for chunk in chunks]
    with ThreadPoolExecutor() as threads:
        return [*threads.map(function, chunks)]


def encode_name(name: str) -> bytes:
    """The bytes of a file name, as the file system has them."""
    return name.encode("utf-8", "surrogateescape")
