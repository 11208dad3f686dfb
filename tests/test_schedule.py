"""The order of work of streamed models, followed with made-up answers: no model and no image."""

from collections import deque

import numpy as np
import pytest

from benchmarks.bench_schedule import efficiency
from clcnet.classifiers.schedule import NOTHING, Schedule, Task, cut

RNG = np.random.default_rng(0)


def run(
    confidences: np.ndarray,
    threshold: float = 0.5,
    batch_size: int = 3,
    num_ranks: int = 1,
    asked_ahead: tuple[int, ...] = (1,),
    first: list[np.ndarray] | None = None,
    waiting: tuple[tuple[int, np.ndarray], ...] = (),
) -> list[Task]:
    """All tasks that hold images, in order, where an image goes on past model k if confidences[k] is below 0.5.

    Args:
        confidences: (K, N).
        asked_ahead: how many rounds each process's loader asks for before it hands out the first of them.
    """
    num_stages, num_images = confidences.shape
    first = cut(np.arange(num_images), 4) if first is None else first
    ranks = [
        Schedule(first, num_stages, batch_size, rank, num_ranks, max(asked_ahead), waiting) for rank in range(num_ranks)
    ]
    taking = [iter(schedule) for schedule in ranks]
    given: list[deque[Task]] = [deque() for _ in ranks]
    done: list[Task] = []
    while True:
        for queue, tasks, depth in zip(given, taking, asked_ahead * num_ranks, strict=False):
            while len(queue) < depth and (task := next(tasks, None)):
                queue.append(task)
        if not all(given):
            assert not any(given), "a process was left without a task while others had one"
            return done
        tasks = [queue.popleft() for queue in given]
        assert len({task.stage for task in tasks}) == 1, "two models in one round"
        entering = []
        for task in tasks:
            if task.stage not in (NOTHING, num_stages - 1) and len(task.indices):
                below = confidences[task.stage, task.indices] < threshold
                entering.append((task.stage + 1, task.indices[below]))
        for schedule in ranks:
            schedule.add(entering)
        done += [task for task in tasks if len(task.indices)]


def seen(tasks: list[Task], stage: int) -> list[list[int]]:
    return [task.indices.tolist() for task in tasks if task.stage == stage]


def test_deferred_images_go_on_in_full_batches_before_the_next_ones_are_screened():
    confidences = np.array([[0.9, 0.1, 0.2, 0.9, 0.3, 0.9, 0.4, 0.9, 0.9, 0.9], np.ones(10)])  # 1, 2, 4, 6 go on
    assert [(task.stage, task.indices.tolist()) for task in run(confidences)] == [
        (0, [0, 1, 2, 3]),
        (0, [4, 5, 6, 7]),
        (1, [1, 2, 4]),
        (0, [8, 9]),
        (1, [6]),
    ]


@pytest.mark.parametrize("num_images", [1, 3, 4, 5, 97])
@pytest.mark.parametrize("threshold", [-999.0, 0.0, 0.3, 1.0, np.inf])
def test_every_image_is_screened_once_and_each_later_model_sees_exactly_what_goes_on(num_images, threshold):
    confidences = RNG.random((3, num_images))
    tasks = run(confidences, threshold, asked_ahead=(3,))
    going_on = np.arange(num_images)
    for stage in range(3):
        batches = seen(tasks, stage)
        assert sorted(sum(batches, [])) == going_on.tolist()
        assert stage == 0 or len(batches) == -(-len(going_on) // 3), "batches are full but the last"
        going_on = going_on[confidences[stage, going_on] < threshold]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("asked_ahead", [(1,), (2,), (9,), (17, 9), (1, 33)])
def test_batches_are_the_same_for_any_number_of_processes_and_whatever_their_loaders_ask_ahead(num_ranks, asked_ahead):
    confidences = RNG.random((3, 61))
    tasks = run(confidences, num_ranks=num_ranks, asked_ahead=asked_ahead)
    assert [seen(tasks, stage) for stage in range(3)] == [seen(run(confidences), stage) for stage in range(3)]


def test_images_that_wait_from_the_start_are_seen_first_and_once():
    confidences = np.array([np.ones(6), np.ones(6)])
    tasks = run(confidences, first=[np.array([4, 5])], waiting=((1, np.array([0, 1, 2, 3])),))
    assert [(task.stage, task.indices.tolist()) for task in tasks] == [(1, [0, 1, 2]), (0, [4, 5]), (1, [3])]


def test_nothing_to_do_ends_at_once():
    assert run(np.zeros((2, 0)), first=[]) == []


def test_the_queue_of_waiting_images_stays_short_however_many_images_there_are():
    schedule = Schedule(cut(np.arange(100_000), 64), 2, 64)
    longest = 0
    for task in schedule:
        schedule.add([(1, task.indices)] if task.stage == 0 else [])
        longest = max(longest, len(schedule._waiting[1]))
    assert longest <= 64


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("num_processes", [2, 4, 8, 16])
def test_processes_are_busy_for_nine_tenths_of_the_time(num_processes: int, num_models: int) -> None:
    assert efficiency(num_processes, num_models) >= 0.9
