"""A self-cascade: one network at two sizes of its images, the small one first; the search finds what that saves.

    python -m benchmarks.self_cascade ../shared > benchmarks/results/self-cascade.md     # minutes on two cores

Each size is a table of step 3 (`--img-size`), and two tables are two models to the search. Everything is chosen and
fitted on four fifths of the images and scored on the last; brackets are 95% intervals. Reads cifar10/ and imagenet1k/
of that folder; what is absent is skipped with a line.
"""

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import generate_data_for_CLCNet as step_3
from clcnet.cascade.search import find_cascades
from clcnet.cascade.selection import Goal
from clcnet.data.outputs import Outputs
from clcnet.report.tables import markdown


@dataclass(frozen=True)
class Case:
    """A network, its images, and the two sides in pixels."""

    name: str
    model: str
    images: str
    sizes: tuple[int, int]
    labels: str | None = None


CASES = (
    Case("resnet10t, CIFAR-10", "cifar10/deep", "cifar10/imagenet_splits_5", (24, 32)),
    Case(
        "tf_efficientnet_lite2, val1300",
        "imagenet1k/tf_efficientnet_lite2",
        "imagenet1k/val1300",
        (192, 260),
        "imagenet1k/val1300/labels.csv",
    ),
)


def outputs_of(case: Case, shared: Path, work: Path) -> list[Outputs]:
    """The tables of both sizes."""
    found = []
    for size in case.sizes:
        table = work / f"{Path(case.model).name}-{size}.parquet"
        words = ["--data-path", shared / case.images, "--model", f"local-dir:{shared / case.model}"]
        words += ["--img-size", size, "--output", table, "--store", work / "store"]
        words += ["--labels", shared / case.labels] if case.labels else []
        with contextlib.redirect_stdout(sys.stderr):
            step_3.main(step_3.get_args_parser().parse_args([*map(str, words)]))
        found.append(Outputs.load(table))
    return found


def rows_of(case: Case, outputs: list[Outputs]) -> list[list[str]]:
    """A line for each size alone, one for the cascade that is as right as the better of them, and two for less."""
    folds = np.arange(len(outputs[0])) % 5  # images are listed class by class
    best = max(outputs, key=lambda each: each.accuracy)
    goals = [Goal("match"), *(Goal("accuracy", best.accuracy - points) for points in (0.5, 1.0))]
    cascades = find_cascades(outputs, folds, goals)
    rows = [
        [case.name, f"{size} pixels", f"{each.accuracy:.2f}%", f"{1000 * each.record.flops:.4g}M", "--"]
        for size, each in zip(case.sizes, outputs, strict=True)
    ]
    for found in cascades.goals:
        chain = " > ".join(str(case.sizes[model]) for model in found.choice.chain)
        scored = found.cross_fitted
        saving, (low, high) = scored.saving(best.record.flops)
        worst, most = scored.accuracy_interval
        rows.append(
            [
                case.name,
                f"{chain} for {found.target:.2f}%, {found.shares[-1]:.1%} see the last",
                f"{scored.accuracy:.2f}% [{worst:.2f}, {most:.2f}]",
                f"{1000 * scored.costs[0]:.4g}M",
                f"{saving:.2f}x [{low:.2f}, {high:.2f}]",
            ]
        )
    return rows


def main(shared: Path) -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for case in CASES:
            if not (shared / case.images).is_dir():
                print(f"skipped, no {case.images}: {case.name}", file=sys.stderr)
                continue
            rows += rows_of(case, outputs_of(case, shared, Path(work)))
    head = ["Network and images", "Sizes", "Top-1", "Multiply-adds an image", "Less than the better size alone"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
