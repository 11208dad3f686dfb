"""What one classifier said about N images: `Outputs`, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clcnet.confidence import SUM_TOLERANCE

UNKNOWN = -1  # the target of an image whose class is not known


@dataclass(frozen=True)
class Record:
    """Where outputs come from: all that a reader of the file would want to know of the model.

    Attributes:
        model: its name, tag included.
        weights: digest of all that determines its answers (`Classifier.key`).
        flops: billions of multiply-adds an image.
        class_names: by class index.
        preprocessing: timm's data configuration.
        milliseconds: an image, where it was measured, on `device`.
        device: where it ran.
        versions: of torch, timm and the like.
        loaded_from: the arguments of `load_classifier`.
    """

    model: str = ""
    weights: str = ""
    flops: float | None = None
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    milliseconds: float | None = None
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    loaded_from: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """What one classifier said about N images, of n classes.

    Attributes:
        names: of the images, as tables print them.
        sorted_probs: (N, n) float32, each row in descending order, summing to one.
        classes: (N, n) of the smallest unsigned type, the class behind each probability; None where a table does not
            say (the specification's CSV). Of equal probabilities the lowest class comes first.
        targets: (N,) int64 true classes, UNKNOWN where one is not known; None where none is.
        correct: (N,) bool, whether the top-1 answer is right; None where that is not known.
        record: where they come from.
    """

    names: list[str]
    sorted_probs: NDArray[np.float32]
    classes: NDArray[np.unsignedinteger[Any]] | None = None
    targets: NDArray[np.int64] | None = None
    correct: NDArray[np.bool_] | None = None
    record: Record = field(default_factory=Record)

    @classmethod
    def from_logits(
        cls,
        logits: ArrayLike,
        names: Sequence[str] | None = None,
        targets: ArrayLike | None = None,
        model: str = "",
        flops: float | None = None,
        **record: Any,
    ) -> Outputs:
        """Take anybody's logits, not timm's alone.

        Args:
            logits: (N, n), any real numbers; -inf for a class that is impossible.
            names: of the images; "0", "1", ... when left out.
            targets: (N,) true classes.
            model: its name, as tables print it.
            flops: billions of multiply-adds an image.
            record: further fields of `Record`.

        Raises:
            ValueError: wrong shapes, or a row without a finite largest logit.
        """
        rows = np.asarray(logits, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] < 2:
            raise ValueError(f"logits have shape {rows.shape}; expected (images, classes) of at least 2 classes")
        top = rows.max(axis=1, keepdims=True, initial=-np.inf)
        if not np.isfinite(top).all():
            raise ValueError(f"logits: row {int((~np.isfinite(top)).argmax()) + 1} has no finite largest number")
        powers = np.exp(rows - top)
        probs = powers / powers.sum(axis=1, keepdims=True)
        return cls.from_probs(probs, names, targets, Record(model=model, flops=flops, **record))

    @classmethod
    def from_probs(
        cls,
        probs: ArrayLike,
        names: Sequence[str] | None = None,
        targets: ArrayLike | None = None,
        record: Record | None = None,
    ) -> Outputs:
        """Sort probabilities (N, n) in the order of the classes.

        Raises:
            ValueError: lengths differ, a target is no class, or a row is none of probabilities.
        """
        rows = np.asarray(probs, dtype=np.float32)
        sums = rows.sum(axis=1, dtype=np.float64)
        bad = ~(np.isfinite(rows).all(axis=1) & (rows >= 0).all(axis=1) & (np.abs(sums - 1) <= SUM_TOLERANCE))
        if bad.any():
            raise ValueError(f"probs: row {int(bad.argmax()) + 1} is no row of probabilities; give softmax outputs")
        names = [str(index) for index in range(len(rows))] if names is None else list(names)
        sorted_probs, classes = sort_probs(rows)
        known = None if targets is None else np.asarray(targets, dtype=np.int64)
        if len(names) != len(rows) or (known is not None and known.shape != (len(rows),)):
            raise ValueError(f"{len(rows)} rows, {len(names)} names and targets {np.shape(targets)}: one of each a row")
        if known is not None and len(known) and not UNKNOWN <= known.min() <= known.max() < rows.shape[1]:
            raise ValueError(
                f"targets run from {known.min()} to {known.max()}; the classes are 0 to {rows.shape[1] - 1}"
            )
        correct = None if known is None or (known == UNKNOWN).any() else classes[:, 0] == known
        return cls(names, sorted_probs, classes, known, correct, record or Record())

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """n."""
        return int(self.sorted_probs.shape[1])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) the answered classes.

        Raises:
            ValueError: the table does not say which class a probability belongs to.
        """
        return self._classes()[:, 0].astype(np.int64)

    @property
    def probs(self) -> NDArray[np.float32]:
        """(N, n) in the order of the classes, made anew at each call; raises as `labels` does."""
        probs = np.empty_like(self.sorted_probs)
        np.put_along_axis(probs, self._classes().astype(np.int64), self.sorted_probs, axis=1)
        return probs

    def _classes(self) -> NDArray[np.unsignedinteger[Any]]:
        if self.classes is None:
            raise ValueError(
                f"the outputs of {self.record.model or 'this model'} do not say which class a probability belongs to; "
                "make them again as .parquet"
            )
        return self.classes

    @property
    def accuracy(self) -> float:
        """Top-1 in percent.

        Raises:
            ValueError: it is not known which answers are right.
        """
        if self.correct is None:
            raise ValueError(f"the outputs of {self.record.model or 'this model'} do not say which answers are right")
        return 100 * float(self.correct.mean())

    def subset(self, rows: Sequence[int] | NDArray[Any]) -> Outputs:
        """The images at these places, in that order, or those where a mask is True."""
        places = np.asarray(rows)
        places = np.flatnonzero(places) if places.dtype == bool else places
        parts: dict[str, Any] = {
            name: None if (array := getattr(self, name)) is None else array[places]
            for name in ("sorted_probs", "classes", "targets", "correct")
        }
        return dataclasses.replace(self, names=[self.names[place] for place in places], **parts)


def sort_probs(probs: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger[Any]]]:
    """Sort each row in descending order; of equal probabilities the lowest class comes first.

    One integer holds a probability and its class: the bits of floats that are not negative rise as they do, and
    integers of 64 bits sort several times as fast as floats with an argsort.

    Args:
        probs: (N, n) float32, none negative, none NaN.

    Returns:
        sorted_probs (N, n) float32, classes (N, n) of the smallest unsigned type.
    """
    num_classes = probs.shape[1]
    bits = np.ascontiguousarray(probs + np.float32(0)).view(np.uint32)  # + 0 makes -0 a 0
    keys = (~bits).astype(np.uint64) << np.uint64(32) | np.arange(num_classes, dtype=np.uint64)
    keys.sort(axis=1)
    sorted_probs = (~(keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return sorted_probs, keys.astype(np.uint32).astype(np.min_scalar_type(num_classes - 1))
