"""When which model runs on which images: the order of batches, and nothing of what is answered. numpy alone.

Which images go on to the next model comes from outside, round by round (`cascade/answers.py` says it in step 5).

The first model's batches are cut at fixed places. Images that go on to the next model wait, in order, until they fill a
batch of it for every process; these batches then go before all earlier models'. So what stands together in a batch
depends on neither the number of processes nor on interruptions, and the answers are the same to the last bit.

Work goes round by round. All processes run the same model in a round, one batch each, so that none waits for a slower
model of another. A round is planned from the outcomes of rounds that lie a fixed number behind it, whatever a process's
loader has asked for ahead, so the processes of one run never plan different rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOTHING = -1  # the model of a round in which all wait for outcomes

Indices = NDArray[np.int64]
Entering = Sequence[tuple[int, Indices]]  # a model's number, and the images that are to see it


@dataclass(frozen=True)
class Task:
    """One batch: the number of its model, or NOTHING, and its images by their place in the list, maybe none."""

    stage: int
    indices: Indices


class Schedule:
    """The tasks of process `rank`, made as the outcomes come in; iterate over it once.

    All processes hold the same schedule and are told all outcomes in the same order.

    Args:
        first: the batches of the first model, of `num_stages`.
        batch_size: images a batch of the later ones.
        ahead: how many rounds a loader may ask for before it has handed out the outcome of the first of them.
        waiting: images that wait for later models from the start.
    """

    def __init__(
        self,
        first: Sequence[Indices],
        num_stages: int,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        ahead: int = 1,
        waiting: Entering = (),
    ) -> None:
        self.rank, self.num_ranks, self.batch_size, self.ahead = rank, num_ranks, batch_size, ahead
        self._first = deque(first)
        self._waiting: list[deque[int]] = [deque() for _ in range(num_stages)]
        self._under_way: deque[int] = deque()  # models of the rounds whose outcomes have not been let in
        self._outcomes: deque[Entering] = deque()
        self._let_in(waiting)

    def __iter__(self) -> Iterator[Task]:
        while True:
            if len(self._under_way) == self.ahead:
                self._under_way.popleft()
                self._let_in(self._outcomes.popleft())
            stage = self._next_stage()
            if stage is None:
                return
            self._under_way.append(stage)
            yield Task(stage, self._next_batches(stage)[self.rank])

    def add(self, entering: Entering) -> None:
        """Take note of the next round's outcome: the images that go on."""
        self._outcomes.append(entering)

    def _let_in(self, entering: Entering) -> None:
        for stage, indices in entering:
            self._waiting[stage].extend(indices.tolist())

    def _next_stage(self) -> int | None:
        """The model of the next round; None when all work is given out."""
        full = self.num_ranks * self.batch_size
        for stage in range(len(self._waiting) - 1, 0, -1):
            if len(self._waiting[stage]) >= full:
                return stage
        if self._first:
            return 0
        for stage in range(1, len(self._waiting)):
            if stage - 1 in self._under_way:
                return NOTHING  # images are on their way that may fill the batch
            if self._waiting[stage]:
                return stage
        return None

    def _next_batches(self, stage: int) -> list[Indices]:
        """The next batches of a model, one for each process, empty where there are too few."""
        nothing = np.zeros(0, np.int64)
        if stage == NOTHING:
            return [nothing] * self.num_ranks
        if stage == 0:
            return [self._first.popleft() if self._first else nothing for _ in range(self.num_ranks)]
        queue = self._waiting[stage]
        counts = [min(self.batch_size, max(0, len(queue) - rank * self.batch_size)) for rank in range(self.num_ranks)]
        return [np.array([queue.popleft() for _ in range(count)], np.int64) for count in counts]


def later_batch_size(batch_size: int) -> int:
    """Images a batch of later models: few, so that the last round, in which processes may lack work, is short."""
    return min(batch_size, 64)


def cut(indices: Indices, batch_size: int) -> list[Indices]:
    """Cut a list of images into batches."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
