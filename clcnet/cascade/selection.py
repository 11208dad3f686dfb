"""Choosing a threshold: for a target, and without looking at the images that it is scored on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.curve import Curve, Steps, resampled_sweeps, surest_steps, sweep
from clcnet.cascade.rules import known
from clcnet.data.outputs import Outputs
from clcnet.intervals import NUM_SWEEP_RESAMPLES
from clcnet.metrics import Floats, Ints, format_flops

_SLACK = 1e-9  # relative; a target typed as a decimal counts as reached when rounding alone keeps it from being so


@dataclass(frozen=True)
class Goal:
    """What the threshold is chosen for.

    "match": the accuracy of the deep model, in a search of the best one, as cheaply as possible; "accuracy": `value`
    percent, as cheaply as possible; "flops": the best accuracy at a cost of no more than `value`, in billions of
    multiply-adds an image or what else a search saves.
    """

    kind: Literal["match", "accuracy", "flops"]
    value: float = math.nan

    def target(self, steps: Steps) -> float:
        """The accuracy asked for, in percent, on these images."""
        return float(steps.own_accuracy[-1]) if self.kind == "match" else self.value

    def describe(self) -> str:
        if self.kind == "match":
            return "the deep model's accuracy"
        if self.kind == "accuracy":
            return f"{self.value:g}% accuracy"
        return f"no more than {format_flops(self.value)} FLOPs an image"


@dataclass(frozen=True)
class Reference:
    """A single model to compare the cascade with."""

    name: str
    accuracy: float
    flops: float
    model: int | None = None  # which of the cascade's own it is, measured on the same images; None if published

    def accuracy_on(self, steps: Steps) -> float:
        """Accuracy on the images of these steps, where it can be measured; else the published one."""
        return self.accuracy if self.model is None else float(steps.own_accuracy[self.model])


def cheapest_at_accuracy(curve: Curve, accuracy: float) -> int | None:
    """The first point of the curve that is this accurate; cost rises along a curve."""
    reached = curve.accuracy >= accuracy * (1 - _SLACK)
    return int(reached.argmax()) if reached.any() else None


def most_accurate_within(curve: Curve, flops: float) -> int | None:
    """The most accurate point at no more than these FLOPs, the cheapest of equals."""
    affordable = curve.flops <= flops * (1 + _SLACK)
    return int(np.where(affordable, curve.accuracy, -1).argmax()) if affordable.any() else None


def dearest_within(curve: Curve, flops: float) -> int | None:
    """The point of the curve that comes nearest to these FLOPs from below."""
    affordable = np.flatnonzero(curve.flops <= flops * (1 + _SLACK))
    return int(affordable[-1]) if len(affordable) else None


def choose(steps: Steps, goal: Goal) -> tuple[Curve, int, bool]:
    """Sweep all thresholds for a goal.

    Returns:
        The curve, its point that serves the goal or, where none does, that comes nearest to it, and whether it serves.
    """
    curve = sweep(steps)
    if goal.kind == "flops":
        point, nearest = most_accurate_within(curve, goal.value), 0
    else:
        point, nearest = cheapest_at_accuracy(curve, goal.target(steps)), int(curve.accuracy.argmax())
    return curve, nearest if point is None else point, point is not None


def choose_or_nearest(steps: Steps, goal: Goal) -> float:
    """The threshold of the point that `choose` finds."""
    curve, point, _ = choose(steps, goal)
    return float(curve.thresholds[point])


def cross_fit(steps: Steps, folds: Ints, choose_threshold: Callable[[Steps], float]) -> Floats:
    """The threshold for each image, chosen on the images of the other folds alone: (1, N), for `outcome`."""
    if len(np.unique(folds)) < 2:
        raise ValueError("all images lie in one fold; a threshold is chosen on some folds and scored on another")
    thresholds = np.empty((1, len(folds)))
    for fold in np.unique(folds):
        inside = folds == fold
        thresholds[:, inside] = choose_threshold(steps.subset(~inside))
    return thresholds


def resampled_savings(steps: Steps, references: Sequence[Reference], seed: int) -> dict[str, Floats]:
    """How much cheaper the cascade is at each reference's accuracy, with the threshold chosen anew on each resample."""
    savings = {reference.name: np.zeros(NUM_SWEEP_RESAMPLES) for reference in references}
    for number, (curve, counts) in enumerate(resampled_sweeps(steps, NUM_SWEEP_RESAMPLES, seed)):
        for reference in references:
            target = reference.accuracy
            if reference.model is not None:
                target = 100 * counts[steps.own[reference.model]].sum() / len(steps)
            point = cheapest_at_accuracy(curve, target)
            if point is not None:
                savings[reference.name][number] = reference.flops / curve.flops[point]
    return savings


def short_threshold(curve: Curve, point: int) -> float:
    """The shortest decimal with the effect of a point of a curve over all distinct thresholds.

    Every threshold above the confidence before, up to the one at `point`, defers the same images.
    """
    high = float(curve.thresholds[point])
    low = float(curve.thresholds[point - 1]) if point else -math.inf
    base, step = (high, 0) if math.isfinite(high) else (low if math.isfinite(low) else 0.0, 1)
    for digits in range(2, 18):
        value = round((math.floor(base * 10**digits) + step) / 10**digits, digits)
        if low < value <= high:
            return value
    return high


def suggest_threshold(outputs: Outputs, source: NDArray[np.int64], confidence: NDArray[np.float32]) -> float | None:
    """The lowest threshold at which the cascade is as accurate as the deep model on held-out images of both tables.

    The more accurate table is taken to be the deep model's. Prints the threshold with what it gives; where there is
    none, the one that comes nearest.

    Args:
        outputs: N held-out rows of both tables.
        source: (N,) the table of each row, 0 or 1.
        confidence: (N,) in the answers.

    Returns:
        The shortest decimal with that effect; None where no threshold is accurate enough, or no image in both tables.
    """
    row_of = [{name: row for row, name in enumerate(outputs.names) if source[row] == table} for table in (0, 1)]
    both = [name for name in row_of[0] if name in row_of[1]]
    if not both:
        print("no threshold suggested: the two tables share no held-out image")
        return None
    rows, correct = np.array([[place[name] for name in both] for place in row_of]), known(outputs.correct, outputs)
    rows = rows[order := np.argsort(correct[rows].sum(axis=1), kind="stable")]
    steps = surest_steps(confidence[rows], correct[rows], [0, 0])
    shallow, deep = order + 1
    print(
        f"on the {len(steps)} held-out images of both tables the shallow model (table {shallow}) has "
        f"{steps.own_accuracy[0]:.2f}%, the deep one (table {deep}) {steps.own_accuracy[1]:.2f}%"
    )
    curve, point, serves = choose(steps, Goal("match"))
    threshold = short_threshold(curve, point)
    gives = f"{threshold}: {curve.accuracy[point]:.2f}% with {curve.deferral[point]:.1%} deferred"
    if not serves:
        print(f"no threshold reaches the deep model's accuracy: use it alone, or the nearest threshold {gives}")
        return None
    print(f"suggested threshold {gives}")
    return threshold
