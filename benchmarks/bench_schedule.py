"""How busy do the processes of one run stay? The real schedule, followed with made-up answers and costs: no model.

    python -m benchmarks.bench_schedule

50,000 images of which 30% go on from each model to the next; the last one costs 7 times as much as the first, a middle
one the root of that. A round lasts as long as its largest batch takes; efficiency is the models' work over what the
processes could have done in that time. For comparison: later models' batches as large as the first one's. The table
goes to benchmarks/results/schedule.md.
"""

import numpy as np

from benchmarks.measured import RESULTS
from clcnet.classifiers.schedule import NOTHING, Schedule, cut, later_batch_size
from clcnet.report.tables import markdown

IMAGES, BATCH, DEFERRED, DEARER, AHEAD = 50_000, 256, 0.3, 7, 33  # as 16 decoding processes ask for ahead


def efficiency(num_ranks: int, num_stages: int, later: int | None = None, num_images: int = IMAGES) -> float:
    """Work over what all processes could have done in the same time."""
    costs = [DEARER ** (stage / (num_stages - 1)) for stage in range(num_stages)]
    going_on = np.random.default_rng(0).random((num_stages, num_images)) < DEFERRED
    batches = cut(np.arange(num_images), BATCH)
    ranks = [
        Schedule(batches, num_stages, later or later_batch_size(BATCH), rank, num_ranks, AHEAD)
        for rank in range(num_ranks)
    ]
    tasks, pending, work, time = [iter(schedule) for schedule in ranks], [], 0.0, 0.0
    while True:
        while len(pending) < AHEAD and (first := next(tasks[0], None)):
            pending.append([first, *(next(each) for each in tasks[1:])])
        if not pending:
            return work / (num_ranks * time)
        done = pending.pop(0)
        stage, sizes = done[0].stage, [len(task.indices) for task in done]
        if stage != NOTHING:
            work, time = work + sum(sizes) * costs[stage], time + max(sizes) * costs[stage]
        onward = [(stage + 1, task.indices[going_on[stage, task.indices]]) for task in done if len(task.indices)]
        for schedule in ranks:
            schedule.add(onward if NOTHING < stage < num_stages - 1 else [])


def main() -> None:
    rows = [
        [str(stages), str(ranks), f"{efficiency(ranks, stages):.3f}", f"{efficiency(ranks, stages, BATCH):.3f}"]
        for stages in (2, 3)
        for ranks in (2, 4, 8, 16)
    ]
    table = markdown(["models", "processes", "efficiency", f"with all batches of {BATCH}"], rows)
    text = (
        f"{table}\n\n{IMAGES:,} images in batches of {BATCH}, those of later models of {later_batch_size(BATCH)}; "
        f"{DEFERRED:.0%} go on from each model to the next; the last costs {DEARER} times as much as the first, a "
        "middle one the root of that. To stay at 0.9 or above. Made by `python -m benchmarks.bench_schedule`.\n"
    )
    (RESULTS / "schedule.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
