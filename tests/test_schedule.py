"""The order of work of a streamed cascade, followed with made-up answers: no model and no image."""

from collections import deque

import numpy as np
import pytest

from clcnet.cascade.schedule import DEEP, NOTHING, SHALLOW, Outcome, Schedule, Task

RNG = np.random.default_rng(0)


def outcome_of(task: Task, confidence: np.ndarray, unreadable: frozenset[int] = frozenset()) -> Outcome:
    answered = np.array([index for index in task.indices if index not in unreadable], np.int64)
    failed = tuple((index, "broken") for index in task.indices if index in unreadable)
    return Outcome(task, answered, answered % 7, confidence[answered].astype(np.float32), failed)


def run(
    confidence: np.ndarray,
    threshold: float = 0.5,
    batch_sizes: tuple[int, int] = (4, 3),
    num_ranks: int = 1,
    prefetch: int = 1,
    unreadable: frozenset[int] = frozenset(),
    done: tuple[Outcome, ...] = (),
) -> list[Outcome]:
    """All outcomes in order; tasks are taken `prefetch` ahead of the answers, as DataLoader's workers do."""
    ranks = [Schedule(len(confidence), batch_sizes, threshold, rank, num_ranks) for rank in range(num_ranks)]
    for schedule in ranks:
        for outcome in done:
            schedule.restore(outcome)
    taking = [iter(schedule) for schedule in ranks]
    ahead: deque[list[Task]] = deque()
    outcomes: list[Outcome] = []
    while True:
        while len(ahead) < prefetch and (tasks := [task for task in (next(rank, None) for rank in taking) if task]):
            assert len(tasks) == num_ranks, "a process was left without a task while others had one"
            ahead.append(tasks)
        if not ahead:
            return outcomes
        for task in ahead.popleft():
            outcome = outcome_of(task, confidence, unreadable)
            for schedule in ranks:
                schedule.add(outcome)
            if task.stage != NOTHING:
                outcomes.append(outcome)


def tasks_of(outcomes: list[Outcome], stage: int) -> list[tuple[int, ...]]:
    return [outcome.task.indices for outcome in outcomes if outcome.task.stage == stage]


def test_deferred_images_go_to_the_deep_model_in_full_batches_while_the_shallow_one_goes_on():
    confidence = np.array([0.9, 0.1, 0.2, 0.9, 0.3, 0.9, 0.4, 0.9, 0.9, 0.9])  # deferred: 1, 2, 4, 6
    outcomes = run(confidence)
    assert [(outcome.task.stage, outcome.task.indices) for outcome in outcomes] == [
        (SHALLOW, (0, 1, 2, 3)),
        (SHALLOW, (4, 5, 6, 7)),
        (DEEP, (1, 2, 4)),
        (SHALLOW, (8, 9)),
        (DEEP, (6,)),
    ]


@pytest.mark.parametrize("num_images", [1, 3, 4, 5, 97])
@pytest.mark.parametrize("threshold", [-999.0, 0.0, 0.3, 1.0, np.inf])
def test_every_image_is_screened_once_and_exactly_the_deferred_ones_are_asked_again(num_images, threshold):
    confidence = RNG.random(num_images).astype(np.float32)
    outcomes = run(confidence, threshold, prefetch=3)
    assert sum(tasks_of(outcomes, SHALLOW), ()) == tuple(range(num_images))
    deferred = np.flatnonzero(confidence < threshold)
    deep = tasks_of(outcomes, DEEP)
    assert sum(deep, ()) == tuple(deferred)
    assert len(deep) == -(-len(deferred) // 3), "deep batches are full but the last"


def test_an_image_exactly_at_the_threshold_is_kept():
    assert tasks_of(run(np.array([0.5, np.nextafter(np.float32(0.5), 0)])), DEEP) == [(1,)]


def test_confidences_are_compared_with_the_threshold_as_given_not_rounded_to_their_own_precision():
    assert float(np.float32(0.7)) < 0.7
    assert tasks_of(run(np.array([0.7], np.float32), threshold=0.7), DEEP) == [(0,)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("prefetch", [1, 2, 8])
def test_batches_are_the_same_for_any_number_of_processes_and_of_batches_ahead(num_ranks, prefetch):
    confidence = RNG.random(61)
    unreadable = frozenset({0, 7, 8, 9, 10, 60})
    expected = run(confidence, unreadable=unreadable)
    outcomes = run(confidence, num_ranks=num_ranks, prefetch=prefetch, unreadable=unreadable)
    for stage in (SHALLOW, DEEP):
        assert tasks_of(outcomes, stage) == tasks_of(expected, stage)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_cut_anywhere_goes_on_with_the_same_batches(num_ranks):
    confidence = RNG.random(41)
    unreadable = frozenset({3, 4, 5, 6, 7, 30})
    whole = run(confidence, unreadable=unreadable, num_ranks=num_ranks)
    for cut in range(len(whole) + 1):
        rest = run(confidence, unreadable=unreadable, num_ranks=num_ranks, done=tuple(whole[:cut]))
        for stage in (SHALLOW, DEEP):
            assert tasks_of(whole[:cut] + rest, stage) == tasks_of(whole, stage)


def test_the_queue_of_deferred_images_stays_short_however_many_images_there_are():
    schedule = Schedule(100_000, (64, 64), threshold=0.5)
    longest = 0
    for task in schedule:
        schedule.add(outcome_of(task, np.zeros(100_000)))
        longest = max(longest, len(schedule._waiting))
    assert longest <= 64
