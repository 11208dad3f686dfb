"""Choosing a threshold: for a target, without looking at the images it is scored on, and whether to cascade at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.curve import Curve, Floats, Stage, outcome, percent, resampled_sweeps, sweep
from clcnet.intervals import NUM_SWEEP_RESAMPLES, Interval, exact_interval, percentile_interval, resampled_means

Choice = Literal["cascade", "shallow", "deep"]

_SLACK = 1e-9  # relative; a target typed as a decimal counts as reached when rounding alone keeps it from being so


@dataclass(frozen=True)
class Goal:
    """What the threshold is chosen for.

    "match": the deep model's accuracy, as cheaply as possible; "accuracy": `value` percent, as cheaply as possible;
    "flops": the best accuracy at no more than `value` billion multiply-adds an image.
    """

    kind: Literal["match", "accuracy", "flops"]
    value: float = math.nan

    def describe(self) -> str:
        if self.kind == "match":
            return "the deep model's accuracy"
        if self.kind == "accuracy":
            return f"{self.value:g}% accuracy"
        return f"no more than {self.value:g}B FLOPs an image"


@dataclass(frozen=True)
class Reference:
    """A single model to compare the cascade with.

    Attributes:
        name: as printed.
        accuracy: percent.
        flops: billions of multiply-adds an image.
        stage: which of the cascade's own models it is, measured on the same images; None for published figures.
    """

    name: str
    accuracy: float
    flops: float
    stage: int | None = None

    def accuracy_on(self, stages: Sequence[Stage]) -> float:
        """Accuracy on the images of `stages`, where it can be measured; else the published one."""
        return self.accuracy if self.stage is None else stages[self.stage].accuracy


@dataclass(frozen=True)
class Scored:
    """A decision about every image, scored: figures with their 95% intervals (paired bootstrap, exact for accuracy)."""

    accuracy: float
    accuracy_interval: Interval
    flops: float
    saving: float  # FLOPs of the last stage over those of the decision
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


def choose(stages: Sequence[Stage], goal: Goal) -> tuple[Curve, int | None]:
    """Sweep all thresholds and return the curve and the point that serves the goal, None where none does."""
    curve = sweep(stages)
    if goal.kind == "flops":
        return curve, most_accurate_within(curve, goal.value)
    target = stages[-1].accuracy if goal.kind == "match" else goal.value
    return curve, cheapest_at_accuracy(curve, target)


def choose_or_nearest(stages: Sequence[Stage], goal: Goal) -> float:
    """The threshold that serves the goal or, where none does, the one that comes nearest to it."""
    curve, point = choose(stages, goal)
    if point is None:
        point = 0 if goal.kind == "flops" else int(curve.accuracy.argmax())
    return float(curve.thresholds[point])


def cross_fit(
    stages: Sequence[Stage], folds: NDArray[np.int64], choose_threshold: Callable[[list[Stage]], float]
) -> Floats:
    """The threshold for each image, chosen on the images of the other folds alone: (N,)."""
    if len(np.unique(folds)) < 2:
        raise ValueError("all images lie in one fold; a threshold is chosen on some folds and scored on another")
    thresholds = np.empty(len(folds))
    for fold in np.unique(folds):
        inside = folds == fold
        thresholds[inside] = choose_threshold([stage.subset(~inside) for stage in stages])
    return thresholds


def score(stages: Sequence[Stage], threshold: float | Floats, rival: Stage | None = None, seed: int = 42) -> Scored:
    """Score one threshold, or one for each image; the rival in accuracy is the last stage, unless another is given."""
    correct, spent = outcome(stages, threshold)
    rival, deep_flops = rival or stages[-1], stages[-1].flops
    means = resampled_means(np.stack([correct, rival.correct, spent], axis=1), seed=seed)
    low, high = exact_interval(correct.sum(), len(correct))
    return Scored(
        accuracy=percent(correct),
        accuracy_interval=(float(low), float(high)),
        flops=float(spent.mean()),
        saving=deep_flops / float(spent.mean()),
        saving_interval=percentile_interval(deep_flops / means[:, 2]),
        difference=percent(correct) - rival.accuracy,
        difference_interval=percentile_interval(100 * (means[:, 0] - means[:, 1])),
    )


@dataclass(frozen=True)
class Recommendation:
    """What to use for a goal, and why.

    Attributes:
        choice: the verdict.
        reason: one sentence.
        threshold: that serves the goal on these images, or comes nearest to it.
        reached: whether it serves it.
        deferral: share of the images that go to the deep model, a fraction.
        scored: the threshold scored on the images it was chosen on, as the paper does. For a goal of accuracy the
            interval of the saving takes the choice into account: it is made anew on every resample, and 0 stands for
            a resample in which no threshold served the goal.
        cross_fitted: thresholds chosen on four folds, scored on the fifth.
    """

    goal: Goal
    choice: Choice
    reason: str
    threshold: float
    reached: bool
    deferral: float
    scored: Scored
    cross_fitted: Scored

    def is_better_than(self, other: "Recommendation") -> bool:
        """Whether this cascade, for the same goal, is worth using where the other is not, or surpasses it by far.

        On the images that no threshold was chosen on: by more than a hundredth of its FLOPs, and no lower in accuracy,
        or, where the goal is a cost, by more than a hundredth of a point.
        """
        if not self.choice == other.choice == "cascade":
            return self.choice == "cascade"
        ours, theirs = self.cross_fitted, other.cross_fitted
        if self.goal.kind == "flops":
            return ours.accuracy > theirs.accuracy + 0.01
        return ours.saving > 1.01 * theirs.saving and ours.accuracy >= theirs.accuracy - 0.01


def recommend(stages: Sequence[Stage], folds: NDArray[np.int64], goal: Goal, seed: int = 42) -> Recommendation:
    """Choose the threshold for a goal and say whether the cascade, or one of the models alone, should be used.

    The verdict rests on images that the threshold was not chosen on. For an accuracy, the cascade must there surely be
    cheaper than the deep model and not surely below that accuracy; for a cost, it must surely be more accurate than the
    best model that one can afford. "Surely": the 95% interval leaves no doubt.
    """
    if goal.kind == "flops" and goal.value < stages[0].flops * (1 - _SLACK):
        raise ValueError(
            f"the goal of {goal.value:g}B FLOPs is below the shallow model's {stages[0].flops:g}B; nothing is cheaper"
        )
    curve, point = choose(stages, goal)
    reached = point is not None
    if point is None:
        point = int(curve.accuracy.argmax())
    threshold = short_threshold(curve, point)
    rival = _rival(stages, goal)
    scored = score(stages, threshold, rival, seed)
    if goal.kind != "flops":
        on_same_images = len(stages) - 1 if goal.kind == "match" else None
        target = Reference("deep", goal.value, stages[-1].flops, on_same_images)
        savings = resampled_savings(stages, [target], seed)["deep"]
        scored = replace(scored, saving_interval=percentile_interval(savings))
    thresholds = cross_fit(stages, folds, lambda others: choose_or_nearest(others, goal))
    fitted = score(stages, thresholds, rival, seed)
    choice, reason = _verdict(stages, goal, reached, scored, fitted)
    return Recommendation(goal, choice, reason, threshold, reached, float(curve.deferral[point]), scored, fitted)


def _rival(stages: Sequence[Stage], goal: Goal) -> Stage:
    """The single model to compare with: the deep one, or the most accurate one that the goal's FLOPs can pay for."""
    if goal.kind != "flops":
        return stages[-1]
    affordable = [stage for stage in stages if stage.flops <= goal.value * (1 + _SLACK)]
    return max(affordable, key=lambda stage: stage.accuracy)


def _verdict(stages: Sequence[Stage], goal: Goal, reached: bool, scored: Scored, fitted: Scored) -> tuple[Choice, str]:
    if goal.kind == "flops":
        return _verdict_within_flops(stages, goal, fitted)
    shallow, deep = stages[0], stages[-1]
    target = deep.accuracy if goal.kind == "match" else goal.value
    if shallow.accuracy >= target:
        return "shallow", f"it reaches {target:.2f}% alone"
    if not reached and deep.accuracy < target:
        best: Choice = "cascade" if scored.accuracy > deep.accuracy else "deep"
        return best, f"nothing reaches {target:.2f}%; this comes nearest"
    low, high = fitted.saving_interval
    saving = f"{fitted.saving:.2f}x fewer FLOPs than the deep model [{low:.2f}, {high:.2f}]"
    low_difference, high_difference = fitted.difference_interval
    figures = f"{saving}, {fitted.difference:+.2f} points [{low_difference:+.2f}, {high_difference:+.2f}]"
    holds = high_difference >= 0 if goal.kind == "match" else fitted.accuracy_interval[1] >= target
    if not reached or not holds:
        return "deep", f"the cascade does not hold {target:.2f}%: {figures}"
    if low <= 1 and deep.accuracy >= target:
        return "deep", f"it is not sure that the cascade costs less: {figures}"
    return "cascade", figures


def _verdict_within_flops(stages: Sequence[Stage], goal: Goal, fitted: Scored) -> tuple[Choice, str]:
    single: Choice = "shallow" if _rival(stages, goal) is stages[0] else "deep"
    low, high = fitted.difference_interval
    figures = f"{fitted.difference:+.2f} points [{low:+.2f}, {high:+.2f}] against the {single} model alone"
    if low > 0:
        return "cascade", f"{figures}, at {goal.describe()}"
    return single, f"it is not sure that the cascade gains anything at {goal.describe()}: {figures}"


def resampled_savings(stages: Sequence[Stage], references: Sequence[Reference], seed: int) -> dict[str, Floats]:
    """How much cheaper the cascade is at each reference's accuracy, with the threshold chosen anew on each resample."""
    savings = {reference.name: np.zeros(NUM_SWEEP_RESAMPLES) for reference in references}
    for number, (curve, single) in enumerate(resampled_sweeps(stages, NUM_SWEEP_RESAMPLES, seed)):
        for reference in references:
            target = reference.accuracy if reference.stage is None else single[reference.stage]
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
    if math.isinf(high):
        low_end = low if math.isfinite(low) else 0.0
        return next(value for digits in range(2, 18) if (value := _round_up(low_end, digits)) > low_end)
    for digits in range(2, 18):
        value = _round_down(high, digits)
        if low < value <= high:
            return value
    return high


def _round_down(value: float, digits: int) -> float:
    return float(round(math.floor(value * 10**digits) / 10**digits, digits))


def _round_up(value: float, digits: int) -> float:
    return float(round((math.floor(value * 10**digits) + 1) / 10**digits, digits))
