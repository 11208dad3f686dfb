"""Step 5: a cascade over a folder. Each model sees only the images that go on to it, and none that the store knows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.cascade.answers import Answers
from clcnet.cascade.rules import Rule
from clcnet.classifiers.classes import Reading, match_classes
from clcnet.classifiers.classifier import Classifier, default_batch_size
from clcnet.classifiers.decoding import sum_up_remarks
from clcnet.classifiers.kept import Kept, kept_answers
from clcnet.classifiers.schedule import NOTHING, Entering, Indices, cut
from clcnet.classifiers.stream import Batch, Round, stream
from clcnet.data.images import ImageSet
from clcnet.data.outputs import UNKNOWN
from clcnet.files import atomic_path, write_rows
from clcnet.strangers import for_spreadsheet

_IMAGES_AT_ONCE = 1024  # of those that the store knows


class Stopwatch:
    """The time that a run takes, and how much of it each model does, waiting for its images included."""

    def __init__(self, num_stages: int) -> None:
        self._started = time.perf_counter()
        self._rounds: list[list[tuple[int, float]]] = [[] for _ in range(num_stages)]  # images and seconds
        self.wall = self.waited = 0.0

    def add(self, found: Round) -> None:
        """Count a round."""
        self.wall = time.perf_counter() - self._started
        self.waited += found.waited
        if found.stage != NOTHING:
            self._rounds[found.stage].append((found.num_images, found.seconds))

    def num_images(self, stage: int = 0) -> int:
        """Images that a model saw in this run."""
        return sum(count for count, _ in self._rounds[stage])

    @property
    def images_per_second(self) -> float:
        """Images that the first model went through in a second of this run; NaN if there were none."""
        return self.num_images() / self.wall if self.num_images() else math.nan

    @property
    def time_saving(self) -> float:
        """The time that the last model alone would have taken for every image, over the time taken; NaN if unknown.

        Its first round, in which libraries set themselves up, does not count where there are two more.
        """
        rounds = self._rounds[-1][1 if len(self._rounds[-1]) > 2 else 0 :]
        if not rounds or not self.num_images() or len(self._rounds) == 1:  # a model alone says nothing of a later one
            return math.nan
        counts, seconds = zip(*rounds, strict=True)
        return self.num_images() * sum(seconds) / sum(counts) / self.wall


@dataclass(frozen=True)
class FolderRun:
    """What a run over a folder found.

    Attributes:
        answers: those that stand.
        unreadable: place of an image that was left out -> why.
        stopwatch: the time that it took.
        num_before: how many answers of each model the store had.
        targets: (N,) classes of all images as the first model numbers them, UNKNOWN where not known.
        notes: lines for the user, on how classes and images were taken.
    """

    answers: Answers
    unreadable: dict[int, str]
    stopwatch: Stopwatch
    num_before: list[int]
    targets: NDArray[np.int64]
    notes: list[str]


class _Run:
    """The state of a run, in the main process."""

    def __init__(self, kept: Sequence[Kept], orders: Sequence[Indices | None], answers: Answers) -> None:
        self.kept, self.orders, self.answers = kept, orders, answers

    def begin(self, batch_size: int) -> tuple[list[Indices], Entering]:
        """Batches of the first model, and images that wait for later ones since the store knows its answers."""
        everything = self.answers.places
        waiting = [pair for pair in self.enter(0, everything) if pair[0] > 0]
        return self.kept[0].missing(everything, batch_size), waiting

    def enter(self, stage: int, indices: Indices) -> Entering:
        """Images that are to see a model: what the store knows is decided at once, the rest is given back."""
        known = self.kept[stage].known(indices)
        entering = [(stage, indices[~known])] if not known.all() else []
        for part in cut(indices[known], _IMAGES_AT_ONCE):
            entering += self.decide(stage, part)
        return entering

    def take(self, batch: Batch) -> Entering:
        """Keep a batch's answers and decide."""
        self.kept[batch.stage].add(batch)
        self.answers.failed[batch.indices[~batch.readable]] = True
        return self.decide(batch.stage, batch.answered)

    def decide(self, stage: int, indices: Indices) -> Entering:
        """Let the rule speak on images that a model has answered; those of which it is not sure enter the next one."""
        if not len(indices):
            return []
        asked = zip(self.kept[: stage + 1], self.orders, strict=False)
        going_on = indices[self.answers.update(indices, [kept.outputs(indices, order) for kept, order in asked])]
        return self.enter(stage + 1, going_on) if len(going_on) else []


def run_folder(
    classifiers: Sequence[Classifier],
    rule: Rule,
    thresholds: Sequence[float],
    images: ImageSet,
    readings: Sequence[Reading],
    store: Path,
    batch_size: int | None = None,
    workers: int | None = None,
) -> FolderRun | None:
    """Run a cascade over all images; every process of a torchrun calls this.

    Args:
        classifiers: the K models, in the order in which an image sees them.
        rule: which answer stands, and how sure it is.
        thresholds: K - 1; an image goes on past model k while its confidence is below threshold k.
        images: the images.
        readings: ways in which their classes may be the first model's; none where they have none.
        store: folder of what models said.
        batch_size, workers: as in `stream`; by default what suits the device.

    Returns:
        What it found, in the main process; None in the others.

    Raises:
        ValueError: the models have different classes; no image can be read; see `stream` for more.
    """
    assert len(thresholds) == len(classifiers) - 1, "one threshold between two models"
    orders = match_classes(classifiers)
    batch_size = batch_size or default_batch_size(classifiers[0].device)
    with contextlib.ExitStack() as stack:
        in_all = [stack.enter_context(kept_answers(store, model, images)) for model in classifiers]
        kept = [one for one in in_all if one]  # none but in the main process
        run = _Run(kept, orders, Answers(rule, thresholds, len(images) if kept else 0))
        first, waiting = distributed.broadcast(run.begin(batch_size) if kept else None)
        stopwatch, num_known = Stopwatch(len(classifiers)), len(images) - sum(map(len, first))
        bar = tqdm(total=len(images), initial=num_known, unit="img", desc="cascade", smoothing=0.1, disable=not kept)
        with bar:
            for found in stream(classifiers, images, first, batch_size, workers, run.take, waiting):
                stopwatch.add(found)
                if found.stage > 0:
                    bar.set_postfix_str(f"{stopwatch.num_images(1)} deferred", refresh=False)
                elif found.stage == 0:
                    bar.update(found.num_images)
        if not kept:
            return None
        kept[0].refuse_nothing_read()
        note, targets = kept[0].settle(readings), kept[0].targets
        run.answers.targets, run.answers.correct = targets, run.answers.labels == targets
        unreadable = {place: reason for one in kept for place, reason in one.reasons.items()}
        remarks = {place: remark for one in kept for place, remark in one.remarks.items()}
        notes = [line for line in (note, sum_up_remarks(remarks.values())) if line]
        before = [one.num_before for one in kept]
        return FolderRun(run.answers.read(), dict(sorted(unreadable.items())), stopwatch, before, targets, notes)


def write_result(
    path: Path | str,
    images: ImageSet,
    answers: Answers,
    stage_names: Sequence[str],
    class_names: Sequence[str] | None,
    unsure: NDArray[np.bool_] | None = None,
    spreadsheet_safe: bool = False,
) -> None:
    """Write the result file: a header, then one row an image in the order of the list.

    Args:
        path: CSV to write; an existing one is replaced only by a finished one.
        images: the images; a row names its file by the path below their folder.
        answers: what stands.
        stage_names: of the models, in the columns; those of models that were not loaded leave theirs empty.
        class_names: of all classes, or None (an empty column).
        unsure: (M,) whether an answer is not to be relied on, a column of 0 and 1; None for no such column.
        spreadsheet_safe: see to it that a spreadsheet takes no name for a formula.
    """
    cell = for_spreadsheet if spreadsheet_safe else str

    def rows() -> Iterator[list[Any]]:
        columns = ["file", "predict", "GT", "class_name", "confidence", "answered_by"]
        columns += [] if unsure is None else ["unsure"]
        columns += [f"{name}_{what}" for name in stage_names for what in ("predict", "confidence")]
        yield [*map(cell, columns)]
        for row, place in enumerate(answers.places):
            label, target = answers.labels[row], answers.targets[row]
            own = [*zip(answers.own_labels[:, row], answers.own_confidence[:, row], strict=True)]
            own += [(UNKNOWN, np.nan)] * (len(stage_names) - len(own))
            yield [
                cell(images.files[place]),
                label,
                target if target != UNKNOWN else "",
                cell(class_names[label]) if class_names else "",
                answers.confidence[row],
                cell(stage_names[answers.answered_by[row]]),
                *([] if unsure is None else [int(unsure[row])]),
                *(each for pair in own for each in (pair if pair[0] != UNKNOWN else ("", ""))),
            ]

    with atomic_path(path) as temporary:
        write_rows(temporary, rows())
