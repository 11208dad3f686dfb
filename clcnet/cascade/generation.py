"""Images and a classifier -> the sorted-probability table: resumable, in bounded memory, by one process or many.

The images are cut into batches once, the same for any number of processes; process r of W answers batches r, r + W,
r + 2W, ... and the main process writes them in order. So the table does not depend on how many processes made it, nor
on how often the run was killed: every image stands in the same batch each time.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clcnet import distributed
from clcnet.cascade.resume import LEFT_OUT, RIGHT, UnfinishedTable, check_processes_agree, partial_folder, run_arguments
from clcnet.classifiers.classifier import Classifier, classify, default_batch_size
from clcnet.data.images import ImageSet, errors_file, write_errors
from clcnet.data.outputs import Outputs, sort_probs
from clcnet.data.tables import TableWriter, check_table_output
from clcnet.files import atomic_path, output_lock


@dataclass(frozen=True)
class Outcome:
    """What a finished run did.

    Attributes:
        num_images: images in the data set.
        num_unreadable: how many of them were left out.
        num_right: how many were classified rightly.
        num_resumed: how many an interrupted run had done before.
        seconds: time that this run took over the others.
    """

    num_images: int
    num_unreadable: int
    num_right: int
    num_resumed: int
    seconds: float

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.num_images - self.num_unreadable

    @property
    def top1(self) -> float:
        """Accuracy in percent of the images that could be read."""
        return 100 * self.num_right / self.num_rows

    @property
    def images_per_second(self) -> float:
        """Images a second of this run, reading included."""
        return (self.num_images - self.num_resumed) / self.seconds


@dataclass(frozen=True)
class _Batch:
    """Consecutive images: (B,) status as in `resume`, (B, n) sorted probabilities, reasons of those left out."""

    status: np.ndarray
    sorted_probs: np.ndarray
    reasons: dict[int, str]


def generate_table(
    classifier: Classifier,
    images: ImageSet,
    targets: np.ndarray,
    output: Path | str,
    batch_size: int | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> Outcome:
    """Classify all images and write the table. Every process of a torchrun calls this; the main one writes.

    Args:
        classifier: the model.
        images: the data set; its order is the table's.
        targets: (N,) true classes as the classifier numbers them.
        output: .csv or .parquet; replaced only by the finished table.
        batch_size: images a batch; by default what suits the device.
        workers: decoding processes; by default what suits the machine.
        resume: go on with the rows of an interrupted run with the same arguments, if there are any.

    Raises:
        ValueError: other arguments than the interrupted run's; no image can be read; the model gives no probabilities.
        OSError: the output cannot be written, or another run is writing it.
    """
    output = Path(output)
    batch_size = batch_size or default_batch_size(classifier.device)
    arguments = run_arguments([classifier], images, targets, batch_size)
    check_processes_agree(arguments)
    unfinished = UnfinishedTable(partial_folder(output), arguments, classifier.num_classes)
    with output_lock(output) if distributed.is_main() else contextlib.nullcontext():
        if distributed.is_main():
            check_table_output(output)
            _open(unfinished, resume, batch_size, len(images))
        num_resumed = distributed.broadcast(unfinished.num_images)
        start = time.perf_counter()
        _classify_rest(classifier, images, targets, unfinished, num_resumed, batch_size, workers)
        seconds = time.perf_counter() - start
        finished = _finish(unfinished, images, output) if distributed.is_main() else None
    num_unreadable, num_right = distributed.broadcast(finished)
    return Outcome(len(images), num_unreadable, num_right, num_resumed, seconds)


def _open(unfinished: UnfinishedTable, resume: bool, batch_size: int, num_images: int) -> None:
    if resume and unfinished.exists():
        unfinished.resume(batch_size, num_images)
        print(f"resuming after {unfinished.num_images} of {num_images} images", flush=True)
        return
    if resume:
        print(f"nothing to resume: {unfinished.folder} does not exist; starting from the first image", flush=True)
    elif unfinished.exists():
        print(f"starting again: the rows of an interrupted run in {unfinished.folder} are discarded", flush=True)
    unfinished.start()


def _classify_rest(
    classifier: Classifier,
    images: ImageSet,
    targets: np.ndarray,
    unfinished: UnfinishedTable,
    num_resumed: int,
    batch_size: int,
    workers: int | None,
) -> None:
    answered, right = unfinished.count() if distributed.is_main() else (0, 0)
    batches = _batches(classifier, images, targets, num_resumed, batch_size, workers)
    with tqdm(
        total=len(images),
        initial=num_resumed,
        unit="img",
        desc=classifier.name,
        smoothing=0.1,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # seconds; every update is a line in a log file
        disable=not distributed.is_main(),
    ) as bar:
        for batch in batches:
            unfinished.append(batch.status, batch.sorted_probs, batch.reasons)
            answered += len(batch.status) - len(batch.reasons)
            right += int((batch.status == 1).sum())
            if answered:
                bar.set_postfix_str(f"top-1 {100 * right / answered:.2f}%", refresh=False)
            bar.update(len(batch.status))


def _batches(
    classifier: Classifier, images: ImageSet, targets: np.ndarray, first: int, batch_size: int, workers: int | None
) -> Iterator[_Batch]:
    """All batches in order in the main process, none elsewhere; every process answers its share of them."""
    starts = range(first, len(images), batch_size)
    mine = starts[distributed.rank() :: distributed.world_size()]
    ranges = [np.arange(start, min(start + batch_size, len(images))) for start in mine]
    indices = np.concatenate([np.arange(0), *ranges])
    reasons: dict[int, str] = {}
    answers = classify(classifier, images, indices, batch_size, workers, on_unreadable=reasons.__setitem__)
    for turn in range(math.ceil(len(starts) / distributed.world_size())):
        batch = None
        if turn < len(mine):
            answered, probs = next(answers)
            batch = _make_batch(images, targets, ranges[turn], answered, probs, dict(reasons))
            reasons.clear()
        yield from (batch for batch in distributed.gather(batch) or [] if batch is not None)


def _make_batch(
    images: ImageSet,
    targets: np.ndarray,
    indices: np.ndarray,
    answered: np.ndarray,
    probs: np.ndarray,
    reasons: dict[int, str],
) -> _Batch:
    broken = ~np.isfinite(probs).all(axis=1)
    if broken.any():
        raise ValueError(
            f"image {images.path(answered[broken.argmax()])}: the model's answer is not a number; check its "
            "weights, or run without --amp"
        )
    rows = answered - indices[0]
    status = np.full(len(indices), LEFT_OUT, np.uint8)
    sorted_probs = np.zeros((len(indices), probs.shape[1]), np.float32)
    sorted_probs[rows], classes = sort_probs(probs)
    status[rows] = classes[:, 0] == targets[answered]
    return _Batch(status, sorted_probs, reasons)


def _finish(unfinished: UnfinishedTable, images: ImageSet, output: Path) -> tuple[int, int]:
    """Write the errors file and the table; return the numbers of images left out and of right answers."""
    answered, right = unfinished.count()
    write_errors(errors_file(output), images, unfinished.reasons)
    if not answered:
        index, reason = next(iter(unfinished.reasons.items()))
        unfinished.remove()
        raise ValueError(
            f"none of the {len(images)} images in {images.root} can be read ({images.names[index]}: {reason})"
        )
    with atomic_path(output) as temporary, TableWriter(temporary) as writer:
        for start, status, sorted_probs in unfinished.chunks():
            kept = np.flatnonzero(status != LEFT_OUT)
            names = [images.names[start + row] for row in kept]
            writer.write(Outputs(names, sorted_probs[kept], correct=status[kept] == RIGHT))
    unfinished.remove()
    return len(unfinished.reasons), right
