"""The cascade as arithmetic on arrays: how often it is right, and what that costs, at one threshold or at all.

A cascade has K models, cheapest first; two are the paper's case (arXiv:2205.09612). Every image enters the first and
goes on to the next while the confidence in what stands is *below* the threshold, one for all models or one each; one
equal to it stays. What stands after each model, and how sure that is, a rule decides (`rules.steps_of`): `Steps`.

Accuracy is in percent, FLOPs in billions of multiply-adds an image, shares are fractions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from clcnet.metrics import Bools, Floats, Ints

SHALLOW_ALONE = -999.0  # at this threshold or below, no image is deferred whatever the scores


class Steps:
    """What stands after each of K models has spoken about N images.

    Attributes:
        confidence: (K, N) how sure that is.
        correct: (K, N) whether it is right, whichever model gave it.
        flops: (K,) what each model costs an image: billions of multiply-adds, or what else a search saves.
        own: (K, N) whether each model's own answer is right, by default `correct`: the rivals of a cascade.
    """

    def __init__(
        self, confidence: ArrayLike, correct: ArrayLike, flops: ArrayLike, own: ArrayLike | None = None
    ) -> None:
        self.confidence: Floats = np.asarray(confidence, dtype=np.float64)
        self.correct: Bools = np.asarray(correct, dtype=bool)
        self.flops: Floats = np.asarray(flops, dtype=np.float64)
        self.own: Bools = self.correct if own is None else np.asarray(own, dtype=bool)
        shapes = self.confidence.shape, self.correct.shape, self.own.shape
        if len(set(shapes)) > 1 or self.confidence.ndim != 2 or self.flops.shape != shapes[0][:1]:
            raise ValueError(f"expected (models, images) and FLOPs of each model, got {shapes} and {self.flops.shape}")
        if not self.correct.size:
            raise ValueError("a cascade needs one model or more and one image or more")
        if np.isnan(self.confidence).any():
            raise ValueError(f"the confidence of image {int(np.isnan(self.confidence).any(0).argmax())} is NaN")
        if not (self.flops >= 0).all():
            raise ValueError(f"FLOPs must be 0 or more, got {self.flops[~(self.flops >= 0)][0]:g}")

    def __len__(self) -> int:
        return int(self.correct.shape[1])

    def subset(self, rows: Ints | Bools) -> "Steps":
        """The images at these places, or those where a mask is True."""
        return Steps(self.confidence[:, rows], self.correct[:, rows], self.flops, self.own[:, rows])

    @property
    def own_accuracy(self) -> Floats:
        """(K,) top-1 of each model alone, in percent."""
        return np.asarray(100 * self.own.mean(axis=1, dtype=np.float64))


@dataclass(frozen=True)
class Curve:
    """A cascade of K models at T thresholds, rising."""

    thresholds: Floats  # (T,)
    accuracy: Floats  # (T,) percent
    calls: Floats  # (T, K) share of the images that a model sees
    model_flops: Floats  # (K,)
    num_images: int

    def __len__(self) -> int:
        return len(self.thresholds)

    @property
    def deferral(self) -> Floats:
        """(T,) share of the images that go beyond the first model."""
        return self.calls[:, 1] if self.calls.shape[1] > 1 else np.zeros(len(self))

    @property
    def flops(self) -> Floats:
        """(T,) average billions of multiply-adds an image."""
        return self.cost(self.model_flops)

    def cost(self, model_costs: ArrayLike) -> Floats:
        """(T,) average cost an image in any unit, from what each model costs an image."""
        return self.calls @ np.asarray(model_costs, dtype=np.float64)


def decide(confidence: Floats, thresholds: ArrayLike) -> Ints:
    """The last model that sees each image: (N,), from 0; it pays for all up to this one.

    Args:
        confidence: (K, N) how sure what stands after each model is; the last row does not matter.
        thresholds: one for all; or (K - 1,), one a model; or one an image, (1, N) or (K - 1, N).
    """
    limits = np.asarray(thresholds, dtype=np.float64)
    limits = limits[:, None] if limits.ndim == 1 else limits
    last: Ints = np.logical_and.accumulate(confidence[:-1] < limits, axis=0).sum(axis=0)
    return last


def sweep(steps: Steps, thresholds: ArrayLike | None = None) -> Curve:
    """Evaluate the cascade at many thresholds in one go, exactly, in O(N log N + T log N).

    Without thresholds, at every one that makes a difference: each distinct confidence, and infinity, which sends all
    images on. With two models and no equal confidences these are N + 1.
    """
    return _Sorted(steps, thresholds).curve(np.ones(len(steps), dtype=np.int64))


def resampled_counts(num_images: int, num_resamples: int, seed: int) -> Iterator[Ints]:
    """How often each image is drawn, (N,), in every resample; the same seed and number of images, the same draws."""
    random = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(random.integers(0, num_images, num_images), minlength=num_images)


def resampled_sweeps(steps: Steps, num_resamples: int, seed: int) -> Iterator[tuple[Curve, Ints]]:
    """The bootstrap of whole curves: sweeps over images drawn with replacement, and how often each was drawn, (N,)."""
    images = _Sorted(steps)
    for counts in resampled_counts(len(steps), num_resamples, seed):
        yield images.curve(counts), counts


def oracle(correct: ArrayLike, flops: ArrayLike) -> Steps:
    """Perfect confidences: an image goes on only while no own answer (K, N) is right and a later model's will be."""
    right = np.asarray(correct, dtype=bool)
    stands = np.logical_or.accumulate(right, axis=0)
    right_later = np.logical_or.accumulate(right[::-1], axis=0)[::-1]
    return Steps(np.where(stands, 1.0, np.where(right_later, 0.0, 0.5)), stands, flops)


def surest_steps(confidence: ArrayLike, own: ArrayLike, flops: ArrayLike) -> Steps:
    """The paper's rule on arrays: of the models' own answers, (K, N), the surest stands, the earlier one of equals."""
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(own, dtype=bool)
    answered_by = [sure[: k + 1].argmax(axis=0) for k in range(len(sure))]
    return Steps(np.maximum.accumulate(sure, axis=0), np.take_along_axis(right, np.stack(answered_by), 0), flops, right)


def accuracy_at_deferral(curve: Curve, share: float) -> float:
    """Accuracy when this share goes on, in percent; images of equal confidence are taken as drawn at random."""
    return float(np.interp(share, curve.deferral, curve.accuracy))


def area_under_deferral(curve: Curve, highest: float = 1.0) -> float:
    """Mean accuracy in percent over all deferral rates from 0 to `highest`; `curve` must hold every distinct threshold.

    With two models FLOPs rise in proportion to deferral, so with `highest` 1 this is also the area under the
    accuracy-FLOPs curve, divided by its width.
    """
    inside = curve.deferral < highest
    shares = np.append(curve.deferral[inside], highest)
    accuracy = np.append(curve.accuracy[inside], accuracy_at_deferral(curve, highest))
    return float(np.trapezoid(accuracy, shares) / highest)


class _Sorted:
    """A sweep's sorting, done once for any number of resamples."""

    def __init__(self, steps: Steps, thresholds: ArrayLike | None = None) -> None:
        self.steps = steps
        reach = np.maximum.accumulate(steps.confidence[:-1], axis=0)  # model k + 1 sees those where it is < threshold
        if thresholds is None:
            self.grid = np.append(np.unique(reach[reach < np.inf]), np.inf)
        else:
            self.grid = np.sort(np.asarray(thresholds, dtype=np.float64).ravel())
        if np.isnan(self.grid).any():
            raise ValueError("a threshold is NaN")
        self.orders = np.argsort(reach, axis=1)  # in which the images reach a model
        sorted_reach = np.take_along_axis(reach, self.orders, 1)
        self.num_calls = [np.searchsorted(row, self.grid, side="left") for row in sorted_reach]
        self.gains = np.take_along_axis(np.diff(steps.correct.astype(np.int64), axis=0), self.orders, 1)  # -1, 0 or 1

    def curve(self, counts: Ints) -> Curve:
        """The curve of images that were drawn so often, (N,)."""
        num_images, steps = len(counts), self.steps
        num_right = np.full(len(self.grid), counts[steps.correct[0]].sum())
        calls = np.ones((len(self.grid), len(steps.flops)))
        for k, (order, gains, num_calls) in enumerate(zip(self.orders, self.gains, self.num_calls, strict=True)):
            drawn = counts[order]
            num_right += np.append(0, np.cumsum(drawn * gains))[num_calls]
            calls[:, k + 1] = np.append(0, np.cumsum(drawn))[num_calls] / num_images
        return Curve(self.grid, 100 * num_right / num_images, calls, steps.flops, num_images)
