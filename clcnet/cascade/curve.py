"""The cascade as arithmetic on arrays: which model answers an image, and what that costs, at one threshold or at all.

A cascade is a list of stages, cheapest first; two are the paper's case (arXiv:2205.09612). An image enters stage 0 and
goes on to the next stage while the highest confidence seen so far is *below* the threshold; one equal to it stays. Of
the answers seen the surest stands, and the earlier one when two are equally sure. With two stages: images with
c_s < threshold see the deep model, and its answer is kept where c_d > c_s.

No model runs twice for this: the right/wrong answers and the confidences of each stage are all that is needed.
Accuracy is in percent, FLOPs in billions of multiply-adds an image, shares are fractions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Keep = Literal["surest", "last"]  # which of the answers seen stands

SHALLOW_ALONE = -999.0  # at this threshold or below, no image is deferred whatever the scores


class Stage:
    """One model over all images: how sure it is, whether it is right, and what it costs an image."""

    def __init__(self, confidence: ArrayLike, correct: ArrayLike, flops: float) -> None:
        """Args: confidence: (N,), no NaN. correct: (N,) bools. flops: billions of multiply-adds an image."""
        self.confidence: Floats = np.asarray(confidence, dtype=np.float64)
        self.correct: Bools = np.asarray(correct, dtype=bool)
        self.flops = float(flops)
        if self.confidence.shape != self.correct.shape or self.confidence.ndim != 1:
            raise ValueError(
                f"confidence {self.confidence.shape} and correct {self.correct.shape} must be lists of one length"
            )
        if np.isnan(self.confidence).any():
            raise ValueError(f"the confidence of image {int(np.isnan(self.confidence).argmax())} is NaN")
        if not self.flops >= 0:
            raise ValueError(f"FLOPs must be 0 or more, got {flops}")

    def __len__(self) -> int:
        return len(self.correct)

    def subset(self, indices: NDArray[np.int64] | Bools) -> "Stage":
        return Stage(self.confidence[indices], self.correct[indices], self.flops)

    @property
    def accuracy(self) -> float:
        """Top-1 of this model alone, in percent."""
        return percent(self.correct)


@dataclass(frozen=True)
class Curve:
    """A cascade of K stages at T thresholds, rising."""

    thresholds: Floats  # (T,)
    accuracy: Floats  # (T,) percent
    calls: Floats  # (T, K) share of the images that a stage sees
    stage_flops: Floats  # (K,)
    num_images: int

    def __len__(self) -> int:
        return len(self.thresholds)

    @property
    def deferral(self) -> Floats:
        """(T,) share of the images that go beyond the first stage."""
        return self.calls[:, 1]

    @property
    def flops(self) -> Floats:
        """(T,) average billions of multiply-adds an image."""
        return self.cost(self.stage_flops)

    def cost(self, stage_costs: ArrayLike) -> Floats:
        """(T,) average cost an image in any unit, from what each stage costs an image."""
        return self.calls @ np.asarray(stage_costs, dtype=np.float64)


def run_cascade(
    stages: Sequence[Stage], threshold: float | Floats, keep: Keep = "surest"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Decide every image at one threshold, or at a threshold of its own.

    Returns:
        answered_by: (N,) the stage whose answer stands.
        last_seen: (N,) the last stage that saw the image; it paid for all up to this one.
    """
    reach, winners = _reach_and_winners(stages, keep)
    last_seen = (reach < threshold).sum(0)
    return np.take_along_axis(winners, last_seen[None], 0)[0], last_seen


def outcome(stages: Sequence[Stage], threshold: float | Floats, keep: Keep = "surest") -> tuple[Bools, Floats]:
    """Whether the cascade is right on each image, (N,), and what it spends on it in FLOPs, (N,)."""
    answered_by, last_seen = run_cascade(stages, threshold, keep)
    correct = np.stack([stage.correct for stage in stages])
    spent = np.cumsum([stage.flops for stage in stages])
    return np.take_along_axis(correct, answered_by[None], 0)[0], spent[last_seen]


def sweep(stages: Sequence[Stage], thresholds: ArrayLike | None = None, keep: Keep = "surest") -> Curve:
    """Evaluate the cascade at many thresholds in one go, exactly, in O(N log N + T log N).

    Args:
        stages: Cheapest first, two or more, over the same images.
        thresholds: Any order, sorted here; None for every threshold that makes a difference (`distinct_thresholds`).
        keep: "surest" is the paper's rule; with "last" the answer of the last model asked stands.
    """
    plan = _plan(stages, thresholds, keep)
    num_images = len(stages[0])
    num_right = np.full(len(plan.grid), stages[0].correct.sum())
    calls = np.ones((len(plan.grid), len(stages)))
    for k, (_, gains, num_calls) in enumerate(plan.steps, start=1):
        num_right += _running_sum(gains)[num_calls]
        calls[:, k] = num_calls / num_images
    stage_flops = np.array([stage.flops for stage in stages])
    return Curve(plan.grid, 100 * num_right / num_images, calls, stage_flops, num_images)


def resampled_sweeps(
    stages: Sequence[Stage],
    num_resamples: int,
    seed: int,
    thresholds: ArrayLike | None = None,
    keep: Keep = "surest",
) -> Iterator[tuple[Curve, Floats]]:
    """Sweep over images drawn with replacement, again and again: the bootstrap of whole curves.

    One seed and one number of images give the same draws, so figures of several cascades can be paired.

    Yields, for each resample:
        its curve at the thresholds of `sweep`, and the accuracy of each model alone, (K,) percent.
    """
    plan = _plan(stages, thresholds, keep)
    random = np.random.default_rng(seed)
    num_images = len(stages[0])
    stage_flops = np.array([stage.flops for stage in stages])
    for _ in range(num_resamples):
        counts = np.bincount(random.integers(0, num_images, num_images), minlength=num_images)
        single = np.array([counts[stage.correct].sum() for stage in stages])
        num_right = np.full(len(plan.grid), single[0])
        calls = np.ones((len(plan.grid), len(stages)))
        for k, (order, gains, num_calls) in enumerate(plan.steps, start=1):
            drawn = counts[order]
            num_right += _running_sum(drawn * gains)[num_calls]
            calls[:, k] = _running_sum(drawn)[num_calls] / num_images
        curve = Curve(plan.grid, 100 * num_right / num_images, calls, stage_flops, num_images)
        yield curve, 100 * single / num_images


def distinct_thresholds(stages: Sequence[Stage]) -> Floats:
    """Every threshold that makes a difference: each distinct confidence, and infinity, which sends all images on.

    With two stages and no equal confidences these are N + 1: 0, 1, ..., N images deferred.
    """
    return _distinct(_reach_and_winners(stages, "surest")[0])


def oracle(stages: Sequence[Stage]) -> list[Stage]:
    """The same models with perfect confidences: an image goes on only if a later model is right and this one is not."""
    right_later = np.zeros(len(stages[0]), dtype=bool)
    perfect = []
    for stage in reversed(stages):
        confidence = np.where(stage.correct, 1.0, np.where(right_later, 0.0, 0.5))
        perfect.append(Stage(confidence, stage.correct, stage.flops))
        right_later |= stage.correct
    return perfect[::-1]


def accuracy_at_deferral(curve: Curve, share: float) -> float:
    """Accuracy when this share goes on, in percent; images of equal confidence are taken as drawn at random."""
    return float(np.interp(share, curve.deferral, curve.accuracy))


def area_under_deferral(curve: Curve, highest: float = 1.0) -> float:
    """Mean accuracy in percent over all deferral rates from 0 to `highest`; `curve` must hold every distinct threshold.

    With two stages FLOPs rise in proportion to deferral, so with `highest` 1 this is also the area under the
    accuracy-FLOPs curve, divided by its width.
    """
    inside = curve.deferral < highest
    shares = np.append(curve.deferral[inside], highest)
    accuracy = np.append(curve.accuracy[inside], accuracy_at_deferral(curve, highest))
    return float(np.trapezoid(accuracy, shares) / highest)


def percent(correct: ArrayLike) -> float:
    """Share of True, in percent."""
    return 100 * float(np.asarray(correct, dtype=np.float64).mean())


@dataclass(frozen=True)
class _Plan:
    """A sweep's sorting, done once: thresholds (T,), and for every stage after the first what it does.

    A step holds the order (N,) in which images reach the stage, what each adds to the number of right answers then,
    (N,) of -1, 0, 1, and how many have reached it at each threshold, (T,).
    """

    grid: Floats
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]


def _plan(stages: Sequence[Stage], thresholds: ArrayLike | None, keep: Keep) -> _Plan:
    reach, winners = _reach_and_winners(stages, keep)
    grid = _distinct(reach) if thresholds is None else np.sort(np.asarray(thresholds, dtype=np.float64).ravel())
    if np.isnan(grid).any():
        raise ValueError("a threshold is NaN")
    correct = np.stack([stage.correct for stage in stages])
    right = np.take_along_axis(correct, winners, 0).astype(np.int64)  # (K, N): of the answer after stage k
    steps = []
    for k in range(1, len(stages)):
        order = np.argsort(reach[k - 1])
        num_calls = np.searchsorted(reach[k - 1][order], grid, side="left")  # images strictly below the threshold
        steps.append((order, (right[k] - right[k - 1])[order], num_calls))
    return _Plan(grid, steps)


def _running_sum(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of the first 0, 1, ..., N values: (N + 1,)."""
    return np.append(0, np.cumsum(values))


def _reach_and_winners(stages: Sequence[Stage], keep: Keep) -> tuple[Floats, NDArray[np.int64]]:
    """What decides every image at every threshold.

    Returns:
        reach: (K - 1, N) an image sees stage k + 1 where reach[k] < threshold.
        winners: (K, N) the stage whose answer stands after stage k has spoken.
    """
    if len(stages) < 2 or not len(stages[0]):
        raise ValueError(f"a cascade needs two stages or more and one image or more, got {len(stages)} stages")
    if len({len(stage) for stage in stages}) > 1:
        raise ValueError(f"the stages differ in their number of images: {[len(stage) for stage in stages]}")
    confidence = np.stack([stage.confidence for stage in stages])
    highest = np.maximum.accumulate(confidence, axis=0)
    number = np.arange(len(stages))[:, None]
    if keep == "last":
        return highest[:-1], np.broadcast_to(number, confidence.shape)
    surer = np.vstack([np.ones((1, confidence.shape[1]), dtype=bool), confidence[1:] > highest[:-1]])
    return highest[:-1], np.maximum.accumulate(np.where(surer, number, 0), axis=0)


def _distinct(reach: Floats) -> Floats:
    return np.append(np.unique(reach[reach < np.inf]), np.inf)
