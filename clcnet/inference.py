"""A cascade and a folder of images -> one row an image on disk: resumable, in bounded memory, by one process or many."""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset
from tqdm import tqdm

from clcnet import distributed
from clcnet.answers import UNKNOWN, Answers, Verdicts, write_result
from clcnet.classifiers import Classifier, class_indices
from clcnet.files import atomic_path, output_lock
from clcnet.images import ImageSet
from clcnet.streaming import DEEP, NOTHING, SHALLOW, Outcome
from clcnet.system import Cascade, stream


@dataclass
class Stopwatch:
    """Time spent on each model, waiting for its images included, by all processes together, and on how many images."""

    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    images: list[int] = field(default_factory=lambda: [0, 0])
    started: float = field(default_factory=time.perf_counter)
    wall: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome of this run."""
        if outcome.task.stage != NOTHING:
            self.seconds[outcome.task.stage] += outcome.seconds
            self.images[outcome.task.stage] += len(outcome.task.indices)
        self.wall = time.perf_counter() - self.started

    @property
    def images_per_second(self) -> float:
        """Images that this run went through in a second."""
        return self.images[SHALLOW] / self.wall if self.wall else float("nan")

    @property
    def time_saving(self) -> float:
        """How many times longer the deep model would have taken on every image, by its time on the deferred ones; NaN if none."""
        if not self.images[DEEP]:
            return float("nan")
        deep_alone = self.images[SHALLOW] * self.seconds[DEEP] / self.images[DEEP] / distributed.world_size()
        return deep_alone / self.wall


def known_targets(images: ImageSet, classifier: Classifier, by_position: bool) -> tuple[np.ndarray, str | None]:
    """The classes of the images as the classifier numbers them, or UNKNOWN for all where the folders are not its classes.

    Args:
        images: the images.
        classifier: the model.
        by_position: the data set's classes are numbered by a class map.

    Returns:
        (N,) int64, and what to tell the user about folders that are not classes.

    Raises:
        ValueError: a class map does not fit the model, or some folders are classes of the model and others are not.
    """
    nothing = np.full(len(images), UNKNOWN)
    if not images.has_labels:
        return nothing, None
    try:
        return class_indices(images, classifier, by_position), None
    except ValueError as error:
        if by_position or set(images.class_names) & set(classifier.label_names or ()):
            raise
        return nothing, f"the folders are not taken for classes, so no accuracy is reported: {error}"


def name_classes(
    images: ImageSet, targets: np.ndarray, classifier: Classifier, class_map: Sequence[str] | None = None
) -> list[str] | None:
    """Name the classifier's classes: by the class map, else the model's own names, else the folders, else ImageNet; or None.

    Args:
        images: the images.
        targets: (N,) their classes as the classifier numbers them, UNKNOWN where not known.
        classifier: the model.
        class_map: names by class index.
    """
    names = [""] * classifier.num_classes
    subset = infer_imagenet_subset(classifier.model) if classifier.label_names_inferred else None
    if subset:
        names = ImageNetInfo(subset).label_descriptions()
    numbers, firsts = np.unique(targets, return_index=True)
    for number, first in zip(numbers, firsts, strict=True):
        if number != UNKNOWN:
            names[number] = images.class_names[images.targets[first]]
    if classifier.label_names and not classifier.label_names_inferred:
        names = list(classifier.label_names)
    for index, name in enumerate((class_map or [])[: classifier.num_classes]):
        names[index] = name
    return names if any(names) else None


@dataclass(frozen=True)
class Summary:
    """What a finished run over a folder says.

    Attributes:
        verdicts: the answers that stand.
        targets: (M,) classes of the images answered, UNKNOWN where not known.
        class_names: of all classes, where known.
        unreadable: name of an image left out -> reason.
        stopwatch: the time it took.
    """

    verdicts: Verdicts
    targets: np.ndarray
    class_names: list[str] | None
    unreadable: dict[str, str]
    stopwatch: Stopwatch

    @property
    def has_labels(self) -> bool:
        """Whether accuracy can be told."""
        return bool(len(self.targets)) and bool((self.targets != UNKNOWN).all())

    @property
    def deferral(self) -> float:
        """Share of the images that the deep model was asked about."""
        return float(self.verdicts.deferred.mean())

    def most_deferred(self) -> list[tuple[str, int, int]]:
        """Class name, deferred images, all images, of the classes that defer most; by the shallow answer where no class is known."""
        classes = self.targets if self.has_labels else self.verdicts.top1[SHALLOW]
        names = self.class_names or [str(index) for index in range(classes.max() + 1)]
        return [(names[index] or str(index), *counts) for index, *counts in self.verdicts.most_deferred(classes)]


def answer_folder(
    cascade: Cascade,
    images: ImageSet,
    output: Path,
    targets: np.ndarray,
    class_names: list[str] | None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Summary:
    """Run the cascade over all images and write the result. Every process of a torchrun calls this; the main one writes.

    Args:
        cascade: of two timm models.
        images: the images; their order is the result's.
        output: CSV file to write; replaced only by the finished result.
        targets: (N,) classes as the shallow model numbers them, UNKNOWN where not known.
        class_names: of all classes, where known.
        batch_size: images a batch; by default what suits the device.
        workers: decoding processes; by default what suits the machine.

    Raises:
        ValueError: no image can be read, or a model's answer is not a number.
        OSError: the output cannot be written, or another run is writing it.
    """
    answers, stopwatch = Answers(len(images)), Stopwatch()
    with output_lock(output) if distributed.is_main() else contextlib.nullcontext():
        with tqdm(total=len(images), unit="img", desc="cascade", smoothing=0.1, disable=not distributed.is_main()) as bar:
            for outcome in stream(cascade, images, batch_size, workers):
                answers.add(outcome)
                stopwatch.add(outcome)
                if outcome.task.stage == SHALLOW:
                    bar.update(len(outcome.task.indices))
        verdicts = answers.decide(cascade.threshold)
        unreadable = {images.names[place]: reason for place, reason in sorted(answers.unreadable.items())}
        if distributed.is_main():
            write_errors(errors_file(output), unreadable)
        if not len(verdicts):
            name, reason = next(iter(unreadable.items()))
            raise ValueError(f"none of the {len(images)} images in {images.root} can be read; {name}: {reason}")
        if distributed.is_main():
            write_result(output, images.names, targets, verdicts, class_names)
    return Summary(verdicts, targets[verdicts.places], class_names, unreadable, stopwatch)


def write_errors(path: Path, unreadable: dict[str, str]) -> None:
    """Name the images left out, with their reasons; without any, remove the file that an earlier run left."""
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "reason"])
        writer.writerows(unreadable.items())


def errors_file(output: Path) -> Path:
    return Path(f"{output}.errors.csv")
