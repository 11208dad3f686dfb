"""The cheapest cascade of one to four of the models at hand: every subset and every vector of thresholds is tried.

What a cascade does at all threshold vectors at once follows from one histogram a step over the bins of its prefixes'
confidences, summed along every axis. Choosing the best of so many flatters, so every choice is made on some folds and
reported on others, and what a choice promises is lowered by what it lost when it was made anew inside the folds.
Accuracy is in percent, shares are fractions, costs are an image's, in any unit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clcnet.cascade.fused import PENALTIES, CrossFit, Fused, Pool, Rows, rows_of, standing
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.intervals import Interval, exact_interval, percentile_interval, resampled_means

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Chain = tuple[int, ...]  # models, cheapest first

NUM_BINS = {1: 0, 2: 400, 3: 48, 4: 20}  # of each step's confidences, by the number of models
SMOOTHED_OVER = np.linspace(-0.4, 0.4, 9)  # points around a target over which what a choice loses is averaged


@dataclass(frozen=True)
class Cascade:
    """Models in the order in which they are asked, and below which confidence an image goes on after each but the last."""

    chain: Chain
    thresholds: tuple[float, ...]


def going_on(confidence: ArrayLike, thresholds: Sequence[float]) -> Ints:
    """(N,) how many models each image passes on its way, from the confidences (K, N) after each."""
    below = np.asarray(confidence)[: len(thresholds)] < np.asarray(thresholds, dtype=np.float64)[:, None]
    return np.logical_and.accumulate(below, axis=0).sum(axis=0) if len(thresholds) else np.zeros(
        np.shape(confidence)[1], dtype=np.int64)


def quantile_thresholds(confidence: Floats, num_bins: int) -> Floats:
    """Rising thresholds that send 0 to 100% of the images on, densest where few go, and infinity, which sends all."""
    shares = (np.arange(1, num_bins) / num_bins) ** 2
    return np.append(np.unique(np.quantile(confidence, shares, method="higher")), np.inf)


def tabulate(
    confidence: Floats, correct: Bools, thresholds: Sequence[Floats], folds: Ints, num_folds: int
) -> tuple[Ints, list[Ints]]:
    """Count, for every vector of thresholds, the right answers and the images that go on.

    Args:
        confidence: (K - 1, N) or more, after each model.
        correct: (K, N) whether the answer that stands then is right.
        thresholds: K - 1 rising lists that end with infinity, of lengths T_1, ..., T_{K-1}.
        folds: (N,) numbers from 0, counted apart.
        num_folds: F.

    Returns:
        right (F, T_1, ..., T_{K-1}), and for each step k the images that go on: (F, T_1, ..., T_k).
    """
    right = np.bincount(folds, correct[0], num_folds).astype(np.int64)
    cells, shape, calls = folds, [num_folds], []
    for k, rising in enumerate(thresholds):
        cells = cells * len(rising) + np.searchsorted(rising, confidence[k], side="right")
        shape.append(len(rising))
        sums = []
        for weights in (correct[k + 1].astype(np.float64) - correct[k], None):
            counts = np.bincount(cells, weights, int(np.prod(shape))).astype(np.int64).reshape(shape)
            for axis in range(1, k + 2):
                np.cumsum(counts, axis=axis, out=counts)
            sums.append(counts)
        right = right[..., None] + sums[0]
        calls.append(sums[1])
    return right, calls


def pareto(accuracy: Floats, cost: Floats) -> Ints:
    """Places of the points that no other point beats in both, by rising cost (and accuracy)."""
    order = np.lexsort((-accuracy, cost))
    best = np.maximum.accumulate(accuracy[order])
    rises = np.append(True, best[1:] > best[:-1])
    return order[rises]


class Search:
    """All cascades over some images in folds, and the best of them for a goal.

    Args:
        confidence: by chain, (K, N) after each of its models.
        correct: by chain, (K, N).
        costs: of every model.
        folds: (N,) any numbers; a choice is made anew without each, to learn what choosing loses.
    """

    def __init__(
        self,
        confidence: Mapping[Chain, Floats],
        correct: Mapping[Chain, Bools],
        costs: Sequence[float],
        folds: Ints,
    ) -> None:
        numbers, folds = np.unique(folds, return_inverse=True)
        self.sizes = np.bincount(folds)
        self.cascades: list[tuple[Chain, tuple[Floats, ...], Ints]] = []
        rights, spents, which = [], [], []
        for number, chain in enumerate(confidence):
            num_bins = NUM_BINS[len(chain)]
            thresholds = tuple(quantile_thresholds(after, num_bins) for after in confidence[chain][:-1])
            right, calls = tabulate(confidence[chain], correct[chain], thresholds, folds, len(numbers))
            ends = (..., *[None] * len(thresholds))
            spent = self.sizes[ends] * costs[chain[0]] + np.zeros(right.shape)
            for k, counts in enumerate(calls):
                spent += counts[(..., *[None] * (len(thresholds) - k - 1))] * costs[chain[k + 1]]
            right, spent = right.reshape(len(numbers), -1), spent.reshape(len(numbers), -1)
            wanted = self._wanted(right, spent)
            self.cascades.append((chain, thresholds, wanted))
            rights.append(right[:, wanted])
            spents.append(spent[:, wanted])
            which.append(np.full(len(wanted), number))
        self.right, self.spent, self.which = np.hstack(rights), np.hstack(spents), np.concatenate(which)
        self.starts = np.cumsum([0] + [len(part) for part in which])
        self.fronts = [self._front(out) for out in range(len(numbers))]
        self.front = self._front(None)

    def _wanted(self, right, spent) -> Ints:
        everything = [pareto(right.sum(0), spent.sum(0))]
        if len(right) > 1:
            everything += [pareto(right.sum(0) - one, spent.sum(0) - other) for one, other in zip(right, spent, strict=True)]
        return np.unique(np.concatenate(everything))

    def _front(self, out: int | None) -> tuple[Ints, Floats, Floats]:
        """Places, accuracy and cost of the Pareto front over all images, or without a fold."""
        size = self.sizes.sum() - (0 if out is None else self.sizes[out])
        right, spent = (
            array.sum(axis=0) - (0 if out is None else array[out]) for array in (self.right, self.spent)
        )
        if not size:
            size = 1
        places = pareto(right, spent)
        return places, 100 * right[places] / size, spent[places] / size

    def lost(self, target: float, by: Literal["accuracy", "cost"] = "accuracy") -> float:
        """Points by which a cascade chosen for a target on all folds but one falls short of it on that one, on average."""
        losses = []
        for out, (places, accuracy, cost) in enumerate(self.fronts):
            chosen = places[_choose(accuracy, cost, target + SMOOTHED_OVER)]
            promised = accuracy[_choose(accuracy, cost, target + SMOOTHED_OVER)]
            losses.append(self.sizes[out] * promised - 100 * self.right[out, chosen])
        return float(np.sum(losses, axis=0).mean() / self.sizes.sum())

    def cheapest(self, target: float, correct_for_choice: bool = True) -> tuple[Cascade, float, float]:
        """The cheapest cascade that reaches an accuracy also on images to come, else the most accurate one.

        Returns:
            it, its accuracy and its cost on the images of the search.
        """
        places, accuracy, cost = self.front
        place = int(_choose(accuracy, cost, target + (max(self.lost(target), 0) if correct_for_choice else 0)))
        return self.cascade(places[place]), float(accuracy[place]), float(cost[place])

    def best_within(self, most: float) -> tuple[Cascade, float, float]:
        """The most accurate cascade within a cost, else the cheapest one."""
        places, accuracy, cost = self.front
        place = max(int(np.searchsorted(cost, most, side="right")) - 1, 0)
        return self.cascade(places[place]), float(accuracy[place]), float(cost[place])

    def cascade(self, place: int) -> Cascade:
        number = int(self.which[place])
        chain, thresholds, wanted = self.cascades[number]
        cell = wanted[place - self.starts[number]]
        at = np.unravel_index(cell, [len(rising) for rising in thresholds]) if thresholds else ()
        return Cascade(chain, tuple(float(rising[i]) for rising, i in zip(thresholds, at, strict=True)))


def _choose(accuracy: Floats, cost: Floats, target: ArrayLike) -> Ints:
    """Places in a front of the cheapest points that reach the targets; the last where none does."""
    return np.minimum(np.searchsorted(accuracy, np.asarray(target) - 1e-9), len(accuracy) - 1)
