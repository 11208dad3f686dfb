"""Choosing a threshold: for a target, without looking at the images it is scored on, and whether to cascade at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clcnet.cascade.curve import Curve, Steps, outcome, resampled_sweeps, sweep
from clcnet.intervals import NUM_SWEEP_RESAMPLES, Interval, percentile_interval, resampled_means, share_interval
from clcnet.metrics import Floats, Ints, format_flops

CASCADE = -1  # the choice of no model alone

_SLACK = 1e-9  # relative; a target typed as a decimal counts as reached when rounding alone keeps it from being so


@dataclass(frozen=True)
class Goal:
    """What the threshold is chosen for.

    "match": the deep model's accuracy, as cheaply as possible; "accuracy": `value` percent, as cheaply as possible;
    "flops": the best accuracy at no more than `value` billion multiply-adds an image.
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


@dataclass(frozen=True)
class Measured:
    """Figures of a decision about every image, with 95% intervals (paired bootstrap, exact for accuracy)."""

    accuracy: float
    accuracy_interval: Interval
    flops: float
    saving: float  # FLOPs of the last model over those of the decision
    saving_interval: Interval
    difference: float  # accuracy minus the rival's, points
    difference_interval: Interval


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


def choose(steps: Steps, goal: Goal) -> tuple[Curve, int | None]:
    """Sweep all thresholds and return the curve and the point that serves the goal, None where none does."""
    curve = sweep(steps)
    if goal.kind == "flops":
        return curve, most_accurate_within(curve, goal.value)
    return curve, cheapest_at_accuracy(curve, goal.target(steps))


def choose_or_nearest(steps: Steps, goal: Goal) -> float:
    """The threshold that serves the goal or, where none does, the one that comes nearest to it."""
    curve, point = choose(steps, goal)
    if point is None:
        point = 0 if goal.kind == "flops" else int(curve.accuracy.argmax())
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


def measure(steps: Steps, thresholds: float | Floats, rival: int = -1, seed: int = 42) -> Measured:
    """Measure one threshold, or more as `outcome` takes them; the rival in accuracy is the last model, or another."""
    correct, spent = outcome(steps, thresholds)
    deep_flops = float(steps.flops[-1])
    means = resampled_means(np.stack([correct, steps.own[rival], spent], axis=1), seed=seed)
    accuracy = 100 * float(correct.mean(dtype=np.float64))
    return Measured(
        accuracy=accuracy,
        accuracy_interval=share_interval(correct.sum(), len(correct)),
        flops=float(spent.mean()),
        saving=deep_flops / float(spent.mean()),
        saving_interval=percentile_interval(deep_flops / means[:, 2]),
        difference=accuracy - float(steps.own_accuracy[rival]),
        difference_interval=percentile_interval(100 * (means[:, 0] - means[:, 1])),
    )


@dataclass(frozen=True)
class Recommendation:
    """What to use for a goal, and why.

    `scored` is the threshold on the images it was chosen on, as in the paper. For a goal of accuracy the interval of
    the saving takes the choice into account: it is made anew on every resample, and 0 stands for a resample in which no
    threshold served the goal.
    """

    goal: Goal
    choice: int  # CASCADE, or which of the models alone
    reason: str  # one sentence
    threshold: float  # that serves the goal on these images, or comes nearest to it
    reached: bool  # whether it serves it
    calls: Floats  # (K,) share of the images that each model sees
    scored: Measured
    cross_fitted: Measured  # thresholds chosen on four folds, scored on the fifth

    @property
    def deferral(self) -> float:
        """Share of the images that go beyond the first model, a fraction."""
        return float(self.calls[1]) if len(self.calls) > 1 else 0.0


def recommend(steps: Steps, folds: Ints, goal: Goal, seed: int = 42) -> Recommendation:
    """Choose the threshold for a goal and say whether the cascade, or one of the models alone, should be used.

    The verdict rests on images that the threshold was not chosen on. For an accuracy, the cascade must there surely be
    cheaper than the deep model and not surely below that accuracy; for a cost, it must surely be more accurate than the
    best model that one can afford. "Surely": the 95% interval leaves no doubt.
    """
    if goal.kind == "flops" and goal.value < steps.flops[0] * (1 - _SLACK):
        raise ValueError(
            f"the goal of {format_flops(goal.value)} FLOPs is below the shallow model's "
            f"{format_flops(steps.flops[0])}; nothing is cheaper"
        )
    curve, best = choose(steps, goal)
    reached, point = best is not None, int(curve.accuracy.argmax()) if best is None else best
    threshold = short_threshold(curve, point)
    rival = _rival(steps, goal)
    scored = measure(steps, threshold, rival, seed)
    if goal.kind != "flops":
        deep = len(steps.flops) - 1 if goal.kind == "match" else None
        target = Reference("deep", goal.value, float(steps.flops[-1]), deep)
        savings = resampled_savings(steps, [target], seed)["deep"]
        scored = replace(scored, saving_interval=percentile_interval(savings))
    thresholds = cross_fit(steps, folds, lambda others: choose_or_nearest(others, goal))
    fitted = measure(steps, thresholds, rival, seed)
    choice, reason = _verdict(steps, goal, reached, scored, fitted)
    return Recommendation(goal, choice, reason, threshold, reached, curve.calls[point], scored, fitted)


def _rival(steps: Steps, goal: Goal) -> int:
    """The single model to compare with: the most accurate that a budget can pay for; for an accuracy, of those after
    the first, the cheapest that serves the goal, else the last.
    """
    if goal.kind == "flops":
        return int(np.where(steps.flops <= goal.value * (1 + _SLACK), steps.own_accuracy, -1).argmax())
    serves = np.flatnonzero(steps.own_accuracy[1:] >= goal.target(steps))
    return 1 + int(serves[0]) if len(serves) else len(steps.flops) - 1


def _verdict(steps: Steps, goal: Goal, reached: bool, scored: Measured, fitted: Measured) -> tuple[int, str]:
    rival = _rival(steps, goal)
    single, rival_accuracy = role(rival, steps), steps.own_accuracy[rival]
    low_difference, high_difference = fitted.difference_interval
    difference = f"{fitted.difference:+.2f} points [{low_difference:+.2f}, {high_difference:+.2f}]"
    if goal.kind == "flops":
        figures = f"{difference} against the {single} model alone"
        if low_difference > 0:
            return CASCADE, f"{figures}, at {goal.describe()}"
        return rival, f"it is not sure that the cascade gains anything at {goal.describe()}: {figures}"
    target = goal.target(steps)
    if steps.own_accuracy[0] >= target:
        return 0, f"it reaches {target:.2f}% alone"
    if not reached and rival_accuracy < target:
        best = CASCADE if scored.accuracy > rival_accuracy else rival
        return best, f"nothing reaches {target:.2f}%; this comes nearest"
    times = steps.flops[rival] / steps.flops[-1]  # savings are against the last model
    low, high = (times * end for end in fitted.saving_interval)
    saving = f"{times * fitted.saving:.2f}x fewer FLOPs than the {single} model [{low:.2f}, {high:.2f}]"
    figures = f"{saving}, {difference}"
    holds = high_difference >= 0 if goal.kind == "match" else fitted.accuracy_interval[1] >= target
    if not reached or not holds:
        return rival, f"the cascade does not hold {target:.2f}%: {figures}"
    if low <= 1 and rival_accuracy >= target:
        return rival, f"it is not sure that the cascade costs less: {figures}"
    return CASCADE, figures


def role(model: int, steps: Steps) -> str:
    """`shallow`, `deep`, or `middle` where there are more than two."""
    return "shallow" if model == 0 else "deep" if model == len(steps.flops) - 1 else "middle"


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
