"""What every row of outputs must be, and how long arrays are worked through: in chunks of rows, by all cores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clcnet.confidence import SUM_TOLERANCE

ROWS_A_CHUNK = 512  # bounds the memory of sorting, checking and writing, large enough to keep pyarrow busy
UNKNOWN = -1  # the target of an image whose class is not known, and the label of an answer to it
TOO_GOOD = 99.5  # percent, beyond which a model has probably seen the images before
T = TypeVar("T")


def map_rows(function: Callable[[slice], T], num_rows: int) -> list[T]:
    """Call a function of chunks of rows, in threads where there are several: NumPy lets them run side by side."""
    chunks = [slice(start, start + ROWS_A_CHUNK) for start in range(0, num_rows, ROWS_A_CHUNK)]
    if len(chunks) < 2:
        return [function(chunk) for chunk in chunks]
    with ThreadPoolExecutor() as threads:
        return [*threads.map(function, chunks)]


def doubts(accuracies: dict[str, float]) -> list[str]:
    """A line for each model so accurate that it was probably trained on the very images, where it is always sure.

    Args:
        accuracies: of the models, by name, in percent.
    """
    return [
        f"warning: {name} is right on {accuracy:.2f}% of these images: was it trained on them? Tables must come from "
        "images that no model was trained on; else all confidences and savings flatter"
        for name, accuracy in accuracies.items()
        if accuracy >= TOO_GOOD
    ]


def check_sorted_probs(probs: NDArray[Any], source: str = "probs", first: int = 1) -> None:
    """Refuse what is not rows of sorted probabilities. Ties, one-hot and uniform rows are valid.

    Args:
        probs: (N, n).
        source: what to call the array in the message.
        first: number of the first row, there.

    Raises:
        ValueError: not two-dimensional, n < 2, or the first row with a value that is not finite,
            negative, above one, out of order, or with a sum off one by more than 1e-3.
    """
    if probs.ndim != 2:
        raise ValueError(f"{source} has shape {tuple(probs.shape)}; expected (images, classes)")
    if probs.shape[1] < 2:
        raise ValueError(f"{source} has {probs.shape[1]} probabilities a row; at least 2 are needed")
    sound = map_rows(lambda rows: _all_sorted_probs(probs[rows]), len(probs))
    if not all(sound):
        start = sound.index(False) * ROWS_A_CHUNK
        _refuse_first_defect(probs[start : start + ROWS_A_CHUNK], start + first - 1, source)


def _all_sorted_probs(chunk: NDArray[Any]) -> bool:
    """Whether all rows are valid, in few passes: in a sorted row the ends bound the rest, and NaN never compares."""
    descending = (chunk[:, :-1] >= chunk[:, 1:]).all()
    in_range = (chunk[:, -1] >= 0).all() and (chunk[:, 0] <= 1 + SUM_TOLERANCE).all()
    return bool(descending and in_range and (np.abs(chunk.sum(axis=1, dtype=np.float64) - 1) <= SUM_TOLERANCE).all())


def _refuse_first_defect(chunk: NDArray[Any], start: int, source: str) -> None:
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


def _check_values(chunk: NDArray[Any], bad: NDArray[np.bool_], start: int, source: str, problem: str) -> None:
    if bad.any():
        row, column = divmod(int(bad.argmax()), bad.shape[1])
        raise ValueError(
            f"{source}: row {start + row + 1}, probability {column + 1} ({chunk[row, column]:.6g}) {problem}"
        )


def check_answers(
    labels: NDArray[Any], classes: NDArray[Any] | None, targets: NDArray[Any] | None, num_classes: int, source: str
) -> None:
    """Refuse answers that contradict each other, by the first row (counted from 1) at fault.

    Args:
        labels: (N,) 1 where the answer is right, 0 where not; UNKNOWN only where there are targets.
        classes: (N, n) the class behind each probability.
        targets: (N,) classes, or UNKNOWN.
        num_classes: n.
        source: what to call them in the message.
    """
    bad = (labels != 0) & (labels != 1) & ((labels != UNKNOWN) | (targets is None))
    if bad.any():
        row = bad.argmax()
        raise ValueError(f"{source}: row {row + 1} has label {labels[row]:.6g}; labels are 1 (right) or 0 (wrong)")
    if targets is not None and (bad := (targets < UNKNOWN) | (targets >= num_classes)).any():
        row = bad.argmax()
        raise ValueError(f"{source}: row {row + 1} has target {targets[row]}; the classes are 0 to {num_classes - 1}")
    if classes is None:
        return
    whole = np.concatenate(map_rows(lambda rows: _has_every_class(classes[rows]), len(classes)))
    if not whole.all():
        raise ValueError(
            f"{source}: row {whole.argmin() + 1} does not name every class from 0 to {num_classes - 1} once"
        )
    if targets is not None:
        bad = (targets != UNKNOWN) & (labels != UNKNOWN) & ((classes[:, 0] == targets) != (labels == 1))
        if bad.any():
            row = bad.argmax()
            raise ValueError(
                f"{source}: row {row + 1} answers {classes[row, 0]} where {targets[row]} is right, "
                f"but has label {labels[row]:g}"
            )


def _has_every_class(classes: NDArray[Any]) -> NDArray[np.bool_]:
    num_classes = classes.shape[1]
    seen = np.zeros(classes.shape, dtype=bool)
    np.put_along_axis(seen, np.minimum(classes, num_classes - 1).astype(np.int64), True, axis=1)
    return np.asarray(seen.all(axis=1) & (classes < num_classes).all(axis=1))
