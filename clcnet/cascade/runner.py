"""A cascade and a folder of images -> the result on disk: resumable, in bounded memory, by one process or many."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clcnet import distributed
from clcnet.cascade.image_cascade import Cascade, stream
from clcnet.cascade.predictions import UNKNOWN, Answers, Verdicts, write_result
from clcnet.cascade.resume import Arguments, UnfinishedAnswers, check_processes_agree, partial_folder, run_arguments
from clcnet.cascade.schedule import DEEP, NOTHING, SHALLOW, Outcome
from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import ImageSet, errors_file, write_errors
from clcnet.files import output_lock


class Stopwatch:
    """The time that a run takes, and how much of it the deep model does, waiting for its images included."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._deep_batches: list[tuple[int, float]] = []  # images and seconds
        self.num_images = 0
        self.num_deferred = 0
        self.wall = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome of this run, whichever process it comes from."""
        self.wall = time.perf_counter() - self._started
        count = len(outcome.task.indices)
        if outcome.task.stage == SHALLOW:
            self.num_images += count
        elif outcome.task.stage == DEEP:
            self.num_deferred += count
            self._deep_batches.append((count, outcome.seconds))

    @property
    def images_per_second(self) -> float:
        """Images that this run went through in a second; NaN if there were none."""
        return self.num_images / self.wall if self.num_images else math.nan

    @property
    def deep_seconds(self) -> float:
        """Seconds of one process that the deep model took an image; NaN where no image was deferred in this run.

        The first batch, in which libraries set themselves up, does not count where there are two more.
        """
        if not self._deep_batches:
            return math.nan
        counts, seconds = zip(*self._deep_batches[1 if len(self._deep_batches) > 2 else 0 :], strict=True)
        return sum(seconds) / sum(counts)

    @property
    def time_saving(self) -> float:
        """The time that the deep model alone would have taken for every image, over the time taken; NaN if unknown."""
        alone = self.num_images * self.deep_seconds / distributed.world_size()
        return alone / self.wall if self.num_images else math.nan


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
        """The classes that defer most, by the shallow model's answers where the true ones are not known.

        Returns:
            (name, deferred images, all its images), most deferred first.
        """
        classes = self.targets if self.has_labels else self.verdicts.top1[SHALLOW]
        names = self.class_names or [str(index) for index in range(classes.max() + 1)]
        return [
            (names[index] or str(index), deferred, total)
            for index, deferred, total in self.verdicts.most_deferred(classes)
        ]


def answer_folder(
    cascade: Cascade,
    images: ImageSet,
    output: Path,
    targets: np.ndarray,
    class_names: list[str] | None,
    arguments: Arguments,
    batch_size: int | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> Summary:
    """Run the cascade over all images and write the result; of the processes of a torchrun, the main one writes.

    Args:
        cascade: of two timm models.
        images: the images; their order is the result's.
        output: CSV file to write; replaced only by the finished result.
        targets: (N,) classes as the shallow model numbers them, UNKNOWN where not known.
        class_names: of all classes, where known.
        arguments: what the rows depend on besides models and images.
        batch_size: images a batch; by default what suits the device.
        workers: decoding processes; by default what suits the machine.
        resume: go on with the rows of an interrupted run with the same arguments, if there are any.

    Raises:
        ValueError: other arguments than the interrupted run's; no image can be read; a model's answer is not a number.
        OSError: the output cannot be written, or another run is writing it.
    """
    batch_size = batch_size or cascade.batch_size
    classifiers = [model for model in (cascade.shallow, cascade.deep) if isinstance(model, Classifier)]
    arguments = run_arguments(classifiers, images, targets, batch_size) | arguments
    check_processes_agree(arguments)
    unfinished = UnfinishedAnswers(partial_folder(output), arguments)
    with output_lock(output) if distributed.is_main() else contextlib.nullcontext():
        done = distributed.broadcast(_open(unfinished, resume) if distributed.is_main() else None)
        answers, stopwatch = _answer_rest(cascade, images, unfinished, done, batch_size, workers)
        verdicts = answers.decide(cascade.threshold)
        if distributed.is_main():
            _finish(unfinished, images, output, targets, answers, verdicts, class_names)
    unreadable = {images.names[place]: reason for place, reason in answers.unreadable.items()}
    return Summary(verdicts, targets[verdicts.places], class_names, unreadable, stopwatch)


def _open(unfinished: UnfinishedAnswers, resume: bool) -> list[Outcome]:
    if resume and unfinished.exists():
        return unfinished.resume()
    if resume:
        print(f"nothing to resume: {unfinished.folder} does not exist; starting from the first image", flush=True)
    elif unfinished.exists():
        print(f"starting again: the rows of an interrupted run in {unfinished.folder} are discarded", flush=True)
    unfinished.start()
    return []


def _answer_rest(
    cascade: Cascade,
    images: ImageSet,
    unfinished: UnfinishedAnswers,
    done: list[Outcome],
    batch_size: int,
    workers: int | None,
) -> tuple[Answers, Stopwatch]:
    answers = Answers(len(images))
    for outcome in done:
        answers.add(outcome)
    num_done = sum(len(outcome.task.indices) for outcome in done if outcome.task.stage == SHALLOW)
    if done and distributed.is_main():
        print(f"resuming after {num_done} of {len(images)} images", flush=True)
    stopwatch = Stopwatch()
    with tqdm(
        total=len(images),
        initial=num_done,
        unit="img",
        desc="cascade",
        smoothing=0.1,
        disable=not distributed.is_main(),
    ) as bar:
        for outcome in stream(cascade, images, batch_size, workers, done):
            stopwatch.add(outcome)
            if outcome.task.stage == NOTHING:
                continue
            answers.add(outcome)
            if distributed.is_main():
                unfinished.append(outcome)
            if outcome.task.stage == DEEP:
                bar.set_postfix_str(f"{stopwatch.num_deferred} deferred", refresh=False)
            else:
                bar.update(len(outcome.task.indices))
    return answers, stopwatch


def _finish(
    unfinished: UnfinishedAnswers,
    images: ImageSet,
    output: Path,
    targets: np.ndarray,
    answers: Answers,
    verdicts: Verdicts,
    class_names: list[str] | None,
) -> None:
    write_errors(errors_file(output), images, dict(sorted(answers.unreadable.items())))
    if not len(verdicts):
        unfinished.remove()
        place, reason = next(iter(answers.unreadable.items()))
        raise ValueError(
            f"none of the {len(images)} images in {images.root} can be read ({images.names[place]}: {reason})"
        )
    write_result(output, images.names, targets, verdicts, class_names)
    unfinished.remove()
