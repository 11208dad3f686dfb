"""The order of work of a cascade over many images: which batch of which model comes next.

Shallow batches cut the list of images at fixed places. Images whose confidence is too low wait, in order, until they
fill a batch of the deep model; that batch then goes before the next shallow one. So what stands together in a batch
depends on neither the number of processes nor on interruptions, and the answers are the same to the last bit. numpy
alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SHALLOW, DEEP = 0, 1
NOTHING = -1  # the stage of a task that only keeps a process in step with the others


@dataclass(frozen=True)
class Task:
    """One batch to be classified: the stage that does it and the images, by their place in the list."""

    stage: int
    indices: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What came of a task.

    Attributes:
        task: the batch.
        answered: (B,) places of the images that could be read, a subset of the task's, in its order.
        top1: (B,) the class each was given.
        confidence: (B,) float32, how sure that answer is.
        unreadable: the others, each with the reason.
        seconds: time from the outcome before to this one, waiting for images included.
    """

    task: Task
    answered: np.ndarray
    top1: np.ndarray
    confidence: np.ndarray
    unreadable: tuple[tuple[int, str], ...] = ()
    seconds: float = 0.0


def is_deferred(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Which images go on to the deep model: (N,) bool. Below the threshold is deferred, equal to it stays.

    Compared in float64 as `cascade.run_cascade` does; numpy alone would round the threshold to the confidences'
    float32.
    """
    return confidence.astype(np.float64) < threshold


class Schedule:
    """The tasks of one process, made as the outcomes come in; iterate over it once.

    With several processes all of them hold the same schedule and are told all outcomes in the same order. Work goes
    round by round, one task each; a process for which a round has none gets an empty one, so that all stay in step.
    """

    def __init__(
        self, num_images: int, batch_sizes: tuple[int, int], threshold: float, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.num_images = num_images
        self.batch_sizes = batch_sizes
        self.threshold = threshold
        self.rank, self.num_ranks = rank, num_ranks
        self._next_image = 0
        self._num_screened = 0  # images that the shallow model is done with
        self._waiting: deque[int] = deque()  # deferred, not yet given to the deep model

    def __iter__(self) -> Iterator[Task]:
        while self._num_screened < self.num_images or self._waiting:
            yield [self._take() for _ in range(self.num_ranks)][self.rank]

    def _take(self) -> Task:
        all_screened = self._num_screened == self.num_images
        if self._waiting and (all_screened or len(self._waiting) >= self.batch_sizes[DEEP]):
            count = min(len(self._waiting), self.batch_sizes[DEEP])
            return Task(DEEP, tuple(self._waiting.popleft() for _ in range(count)))
        if self._next_image < self.num_images:
            first = self._next_image
            self._next_image = min(first + self.batch_sizes[SHALLOW], self.num_images)
            return Task(SHALLOW, tuple(range(first, self._next_image)))
        return Task(NOTHING)  # shallow answers are on their way that may fill the deep model's batch

    def add(self, outcome: Outcome) -> None:
        """Take note of an outcome: shallow answers below the threshold join the queue of the deep model."""
        if outcome.task.stage == SHALLOW:
            self._num_screened += len(outcome.task.indices)
            self._waiting.extend(outcome.answered[is_deferred(outcome.confidence, self.threshold)].tolist())

    def restore(self, outcome: Outcome) -> None:
        """Take note, before iterating, of an outcome of an earlier run: its task is not given out again."""
        if outcome.task.stage == SHALLOW:
            self._next_image += len(outcome.task.indices)
            self.add(outcome)
        else:
            for _ in outcome.task.indices:
                self._waiting.popleft()
