"""What a cascade said about every image of a folder: which answer stands, and the result file. numpy alone."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clcnet.cascade import curve
from clcnet.cascade.schedule import DEEP, NOTHING, SHALLOW, Outcome
from clcnet.files import atomic_path

COLUMNS = (
    "file",
    "predict",
    "GT",
    "class_name",
    "confidence",
    "answered_by",
    "shallow_predict",
    "shallow_confidence",
    "deep_predict",
    "deep_confidence",
)
STAGE_NAMES = ("shallow", "deep")
UNKNOWN = -1  # a class that no model gave, or that no folder names


@dataclass
class Answers:
    """What both models said, by the image's place in the list; 24 bytes an image.

    Attributes:
        top1: two (N,) arrays, one a stage: class, UNKNOWN where the stage gave none.
        confidence: two (N,) float32 arrays, -inf where the stage gave none.
        unreadable: place of an image that could not be read -> reason.
    """

    num_images: int
    top1: tuple[np.ndarray, np.ndarray] = field(init=False)
    confidence: tuple[np.ndarray, np.ndarray] = field(init=False)
    unreadable: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.top1 = np.full(self.num_images, UNKNOWN), np.full(self.num_images, UNKNOWN)
        nothing = np.full(self.num_images, -np.inf, np.float32)
        self.confidence = nothing, nothing.copy()

    def add(self, outcome: Outcome) -> None:
        """Enter an outcome's answers."""
        stage = outcome.task.stage
        if stage != NOTHING:
            self.top1[stage][outcome.answered] = outcome.top1
            self.confidence[stage][outcome.answered] = outcome.confidence
            self.unreadable.update(outcome.unreadable)

    def decide(self, threshold: float) -> Verdicts:
        """Settle which answer stands for every image that each model asked could read."""
        readable = np.ones(self.num_images, bool)
        readable[list(self.unreadable)] = False
        places = np.flatnonzero(readable)
        top1 = np.stack([column[places] for column in self.top1])
        confidence = np.stack([column[places] for column in self.confidence])
        answered_by, deferred = decide(confidence[SHALLOW], confidence[DEEP], threshold)
        return Verdicts(places, top1, confidence, answered_by, deferred)


def decide(shallow: np.ndarray, deep: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The cascade's rule on confidences.

    Args:
        shallow: (N,) confidences of the shallow answers.
        deep: (N,) confidences of the deep answers; what stands where none was asked for does not matter.
        threshold: below it an image is deferred.

    Returns:
        answered_by (N,) int64, SHALLOW or DEEP, and deferred (N,) bool.
    """
    deferred = curve.decide(np.stack([shallow, deep]).astype(np.float64), threshold) == DEEP
    return np.where(deferred & (deep > shallow), DEEP, SHALLOW), deferred


@dataclass(frozen=True)
class Verdicts:
    """The answers that stand, for the M images that could be read.

    Attributes:
        places: (M,) their places in the list, ascending.
        top1: (2, M) both models' answers.
        confidence: (2, M) how sure each was.
        answered_by: (M,) SHALLOW or DEEP.
        deferred: (M,) whether the deep model was asked.
    """

    places: np.ndarray
    top1: np.ndarray
    confidence: np.ndarray
    answered_by: np.ndarray
    deferred: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @property
    def predict(self) -> np.ndarray:
        """(M,) the class that stands."""
        return np.take_along_axis(self.top1, self.answered_by[None], 0)[0]

    @property
    def sureness(self) -> np.ndarray:
        """(M,) float32, the confidence of the answer that stands."""
        return np.take_along_axis(self.confidence, self.answered_by[None], 0)[0]

    def accuracies(self, targets: np.ndarray) -> dict[str, float]:
        """Top-1 in percent, where the class of every image is known.

        Args:
            targets: (M,) classes.

        Returns:
            Of the cascade, of the shallow model alone, and of both models on the deferred images (NaN if there are
            none).
        """
        right = self.top1 == targets
        asked = right[:, self.deferred] if self.deferred.any() else np.full((2, 1), np.nan)
        return {
            "accuracy": _percent(self.predict == targets),
            "shallow_accuracy": _percent(right[SHALLOW]),
            "shallow_accuracy_on_deferred": _percent(asked[SHALLOW]),
            "deep_accuracy_on_deferred": _percent(asked[DEEP]),
        }

    def most_deferred(self, classes: np.ndarray, count: int = 5) -> list[tuple[int, int, int]]:
        """The classes with the largest share of deferred images.

        Args:
            classes: (M,) class of each image, by its folder or, where that is unknown, by the shallow model.
            count: how many classes to return at most.

        Returns:
            (class, deferred, images) each, largest share first, then most images; classes without a deferred image are
            left out.
        """
        known, group = np.unique(classes, return_inverse=True)
        totals = np.bincount(group)
        deferred = np.bincount(group, weights=self.deferred).astype(np.int64)
        order = np.lexsort((known, -totals, -deferred / totals))
        return [(int(known[k]), int(deferred[k]), int(totals[k])) for k in order[:count] if deferred[k]]


def write_result(
    path: Path | str, names: Sequence[str], targets: np.ndarray, verdicts: Verdicts, class_names: Sequence[str] | None
) -> None:
    """Write the result file: a header, then one row an image in the order of the list.

    Args:
        path: CSV to write; an existing one is replaced only by a finished one.
        names: (N,) each image's name.
        targets: (N,) classes as the models number them, UNKNOWN where not known (an empty cell).
        verdicts: the answers.
        class_names: of all classes, or None (an empty column).
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_rows(names, targets, verdicts, class_names))


def _rows(
    names: Sequence[str], targets: np.ndarray, verdicts: Verdicts, class_names: Sequence[str] | None
) -> Iterator[tuple[object, ...]]:
    predict, sureness = verdicts.predict, verdicts.sureness
    for row, place in enumerate(verdicts.places):
        deep = verdicts.top1[DEEP, row], verdicts.confidence[DEEP, row]
        yield (
            names[place],
            predict[row],
            targets[place] if targets[place] != UNKNOWN else "",
            class_names[predict[row]] if class_names else "",
            sureness[row],
            STAGE_NAMES[verdicts.answered_by[row]],
            verdicts.top1[SHALLOW, row],
            verdicts.confidence[SHALLOW, row],
            *(deep if verdicts.deferred[row] else ("", "")),
        )


def _percent(correct: np.ndarray) -> float:
    return 100 * float(correct.mean(dtype=np.float64))
