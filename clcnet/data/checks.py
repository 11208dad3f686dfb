"""What every row of outputs must be, and how long arrays are worked through: in chunks of rows, by all cores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clcnet.confidence import SUM_TOLERANCE
from clcnet.memory import num_cores
from clcnet.metrics import Bools

ROWS_A_CHUNK = 512  # bounds the memory of sorting, checking and writing, large enough to keep pyarrow busy
_COLUMNS_A_CORE = 1 << 10  # of all chunks that are sorted or encoded side by side; bounds the memory
UNKNOWN = -1  # the target of an image whose class is not known, and in place of 1 or 0 for an answer to it
TOO_GOOD = 99.5  # percent, beyond which a model has probably seen the images before
T = TypeVar("T")


def map_rows(function: Callable[[slice], T], num_rows: int) -> list[T]:
    """Call a function of chunks of rows, in threads where there are several: NumPy lets them run side by side."""
    chunks = [slice(start, start + ROWS_A_CHUNK) for start in range(0, num_rows, ROWS_A_CHUNK)]
    if len(chunks) < 2:
        return [function(chunk) for chunk in chunks]
    # more than cores, as some wait for Python's lock; not without end, as each holds its rows
    with ThreadPoolExecutor(min(num_cores() + 4, 32)) as threads:
        return [*threads.map(function, chunks)]


def rows_at_once(num_classes: int) -> int:
    """How many rows to sort or encode side by side: a chunk a core, from 8 to 16, or fewer where rows are long."""
    chunks = min(max(num_cores(), 8), 16)
    return ROWS_A_CHUNK * min(max(_COLUMNS_A_CORE * chunks // num_classes, 2), chunks)


def doubts(accuracies: dict[str, float]) -> list[str]:
    """A line for each model, by name, so accurate (percent) that it was probably trained on the very images."""
    return [
        f"warning: {name} is right on {accuracy:.2f}% of these images: was it trained on them? Tables must come from "
        "images that no model was trained on; else all confidences and savings flatter"
        for name, accuracy in accuracies.items()
        if accuracy >= TOO_GOOD
    ]


def refuse_rows(bad: Bools, source: str, problem: Callable[[int], str]) -> None:
    """Raise ValueError with the first bad row, counted from 1, and what is wrong with it."""
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{source}: row {row + 1} {problem(row)}")


def are_probs(rows: NDArray[Any]) -> Bools:
    """(N,) whether a row (N, n) holds probabilities: none negative, their sum one within 1e-3. NaN never compares."""
    sums: NDArray[np.float64] = rows.sum(axis=1, dtype=np.float64)
    return np.asarray((rows >= 0).all(axis=1) & (np.abs(sums - 1) <= SUM_TOLERANCE))


def check_sorted_probs(probs: NDArray[Any], source: str = "probs", first: int = 1) -> None:
    """Refuse what is not rows of sorted probabilities (N, n). Ties, one-hot and uniform rows are valid.

    Raises:
        ValueError: not two-dimensional, n < 2, or the first row at fault; `source` is what the message calls the array,
            and `first` the number of its first row there.
    """
    if probs.ndim != 2:
        raise ValueError(f"{source} has shape {tuple(probs.shape)}; expected (images, classes)")
    if probs.shape[1] < 2:
        raise ValueError(f"{source} has {probs.shape[1]} probabilities a row; at least 2 are needed")
    sound = map_rows(lambda rows: _are_sorted_probs(probs[rows]), len(probs))
    bad = ~np.concatenate([np.ones(0, np.bool_), *sound])
    if bad.any():
        raise ValueError(f"{source}: row {bad.argmax() + first}{_defect(probs[bad.argmax()])}")


def _are_sorted_probs(rows: NDArray[Any]) -> Bools:
    """As `are_probs`, in few passes: in a sorted row the last one bounds the rest."""
    sums = rows.sum(axis=1, dtype=np.float64)
    descending = (rows[:, :-1] >= rows[:, 1:]).all(axis=1)
    return np.asarray(descending & (rows[:, -1] >= 0) & (np.abs(sums - 1) <= SUM_TOLERANCE))


def _defect(row: NDArray[Any]) -> str:
    total = row.sum(dtype=np.float64)
    larger = np.append(False, row[1:] > row[:-1]) & (abs(total - 1) <= SUM_TOLERANCE)
    for bad, problem in (
        (~np.isfinite(row), "is not a finite number"),
        (row < 0, "is negative"),
        (larger, "is larger than the one before it; sort each row in descending order"),
    ):
        if bad.any():
            return f", probability {bad.argmax() + 1} ({row[bad.argmax()]:.6g}) {problem}"
    return f" sums to {total:.6g} instead of 1; give softmax outputs"


def check_answers(
    correct: NDArray[Any], classes: NDArray[Any] | None, targets: NDArray[Any] | None, num_classes: int, source: str
) -> None:
    """Refuse answers that contradict each other, by the first row at fault.

    Args:
        correct: (N,) 1 where the answer is right, 0 where not; UNKNOWN only where there are targets.
        classes: (N, n) the class behind each probability.
        targets: (N,) classes, or UNKNOWN.
        num_classes: n.
        source: what to call them in the message.
    """
    bad = (correct != 0) & (correct != 1) & ((correct != UNKNOWN) | (targets is None))
    refuse_rows(bad, source, lambda row: f"has label {correct[row]:.6g}; labels are 1 (right) or 0 (wrong)")
    if targets is not None:
        check_targets(targets, num_classes, source)
    if classes is not None:
        whole = np.concatenate(map_rows(lambda rows: _have_every_class(classes[rows]), len(classes)))
        refuse_rows(~whole, source, lambda row: f"does not name every class from 0 to {num_classes - 1} once")
        if targets is not None:
            bad = (targets != UNKNOWN) & (correct != UNKNOWN) & ((classes[:, 0] == targets) != (correct == 1))
            words = "answers {} where {} is right, but has label {:g}"
            refuse_rows(bad, source, lambda row: words.format(classes[row, 0], targets[row], correct[row]))


def check_targets(targets: NDArray[Any], num_classes: int, source: str) -> None:
    """Refuse targets (N,) that are neither classes nor UNKNOWN."""
    bad = (targets < UNKNOWN) | (targets >= num_classes)
    refuse_rows(bad, source, lambda row: f"has target {targets[row]}; the classes are 0 to {num_classes - 1}")


def _have_every_class(classes: NDArray[Any]) -> Bools:
    seen = np.zeros(classes.shape, dtype=bool)
    np.put_along_axis(seen, np.minimum(classes, classes.shape[1] - 1).astype(np.int64), True, axis=1)
    return np.asarray(seen.all(axis=1) & (classes < classes.shape[1]).all(axis=1))
