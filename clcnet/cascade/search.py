"""The cheapest cascade of one to four of the models at hand: every subset and every vector of thresholds is tried.

What a cascade does at all threshold vectors at once follows from one histogram a step over the bins of its prefixes'
confidences, summed along every axis. Choosing the best of so many flatters: so every choice is made on some folds and
reported on another, and it aims higher than its target by what such a choice loses when it is made anew inside the
folds. Accuracy is in percent, shares are fractions, costs are an image's, in any unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from clcnet.cascade.curve import Steps, decide
from clcnet.cascade.drift import quantiles
from clcnet.cascade.pool import PENALTIES, CrossFit, Pool, Rows, rows_of, simplest_of_best, standing
from clcnet.cascade.rules import BEST, Fused
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Scored, Single
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.metrics import Bools, Floats, Ints, aurc

Chain = tuple[int, ...]  # models in the order in which they are asked, cheapest first

NUM_BINS = {1: 1, 2: 400, 3: 48, 4: 20}  # of every step's confidences, by the number of models
AROUND = np.linspace(-1, 1, 9)  # points around a target over which the loss of a choice is averaged
FRONT_STEP = 0.1  # points between the rows of a front
FRONT_ROWS = 60
NUM_THREADS = 2


@dataclass(frozen=True)
class Choice:
    """A cascade, and what it did on the images that it was chosen on."""

    chain: Chain
    thresholds: tuple[float, ...]
    accuracy: float
    cost: float

    def decide(self, confidence: Floats) -> Ints:
        """The last model that sees each image, (N,), from confidences (K, N)."""
        return decide(confidence, self.thresholds)

    def score(self, steps: Steps, costs: Floats) -> Scored:
        """What it does on images of which these are its steps, at costs (U, M) of all models."""
        return Scored.at(steps, self.thresholds, costs[:, self.chain])


def quantile_thresholds(confidence: Floats, num_bins: int) -> Floats:
    """Rising thresholds that send 0 to 100% of the images on, densest where few go; the last is infinity."""
    shares = (np.arange(1, num_bins) / num_bins) ** 2
    return np.append(np.unique(np.quantile(confidence, shares, method="higher")), np.inf)


def tabulate(steps: Steps, thresholds: Sequence[Floats], folds: Ints, num_folds: int) -> tuple[Ints, Floats]:
    """Right answers and cost of every vector of K - 1 thresholds, summed over a fold's images: two of (F, T).

    The vectors stand in the order of nested loops over rising thresholds, which end with infinity.
    """
    correct, costs = steps.correct, steps.flops
    right: NDArray[Any] = np.bincount(folds[correct[0]], minlength=num_folds)
    spent: NDArray[Any] = costs[0] * np.bincount(folds, minlength=num_folds)
    cells, shape = folds, [num_folds]
    for k, rising in enumerate(thresholds):
        cells = cells * len(rising) + np.searchsorted(rising, steps.confidence[k], side="right")
        shape.append(len(rising))
        sums = []
        for weights in (correct[k + 1].astype(np.float64) - correct[k], None):
            counts = np.bincount(cells, weights, int(np.prod(shape))).astype(np.int64).reshape(shape)
            for axis in range(1, k + 2):
                np.cumsum(counts, axis=axis, out=counts)
            sums.append(counts)
        right, spent = right[..., None] + sums[0], spent[..., None] + costs[k + 1] * sums[1]
    return right.reshape(num_folds, -1), spent.reshape(num_folds, -1)


def pareto(right: NDArray[Any], spent: NDArray[Any]) -> Ints:
    """Places of the points that no other one beats, both rising."""
    order = np.lexsort((-right, spent))
    best = np.maximum.accumulate(right[order])
    return order[np.append(True, best[1:] > best[:-1])]


class Search:
    """All cascades over some images in folds, and the best of them for a goal.

    A choice is made anew without each fold, to see what choosing loses.
    """

    def __init__(self, cascades: Iterable[tuple[Chain, Steps]], folds: Ints) -> None:
        """Take every chain with its steps over the same N images in folds (N,)."""
        _, folds, self.sizes = np.unique(folds, return_inverse=True, return_counts=True)
        self.tables: list[tuple[Chain, list[Floats]]] = []
        rights, spents, origins = [], [], []
        for number, (chain, steps) in enumerate(cascades):
            thresholds = [quantile_thresholds(after, NUM_BINS[len(chain)]) for after in steps.confidence[:-1]]
            right, spent = tabulate(steps, thresholds, folds, len(self.sizes))
            pairs = zip(_without_each(right), _without_each(spent), strict=True)
            cells = np.unique(np.concatenate([pareto(*pair) for pair in pairs]))
            self.tables.append((chain, thresholds))
            rights.append(right[:, cells])
            spents.append(spent[:, cells])
            origins.append(np.stack([np.full(len(cells), number), cells]))
        self.right, spent = np.hstack(rights), np.hstack(spents)
        self.origins = np.hstack(origins)  # of every point, the number of its table and the cell there
        self.fronts = []  # over all images, and without each fold: places, accuracy, cost
        for right, cost, size in zip(*map(_without_each, (self.right, spent, self.sizes[:, None])), strict=True):
            places = pareto(right, cost)
            self.fronts.append((places, 100 * right[places] / size, cost[places] / size))

    def lost(self, target: float) -> float:
        """Points of accuracy that a choice for this target on these images is likely to lose on others, 0 or more.

        Each fold is held against what was promised by the choice on the others, which with F folds are fewer by 1 / F.
        """
        losses = []
        for size, fold_right, (places, accuracy, _) in zip(self.sizes, self.right, self.fronts[1:], strict=False):
            chosen = _first_at(accuracy, target + AROUND)
            losses.append(size * accuracy[chosen] - 100 * fold_right[places[chosen]])
        mean = np.sum(losses) / len(AROUND) / self.sizes.sum()
        return float(max(mean * (1 - 1 / len(self.sizes)), 0))

    def best(self, goal: Goal) -> Choice:
        """The cheapest cascade that is likely to reach an accuracy on other images, or the most accurate within a cost.

        Where none is, the most accurate one, or the cheapest.
        """
        places, accuracy, cost = self.fronts[0]
        if goal.kind == "flops":
            point = max(int(np.searchsorted(cost, goal.value * (1 + 1e-9), side="right")) - 1, 0)
        else:
            point = int(_first_at(accuracy, goal.value + self.lost(goal.value)))
        number, cell = self.origins[:, places[point]]
        chain, thresholds = self.tables[number]
        at = np.unravel_index(cell, [len(rising) for rising in thresholds])
        limits = tuple(float(rising[index]) for rising, index in zip(thresholds, at, strict=True))
        return Choice(chain, limits, float(accuracy[point]), float(cost[point]))

    def reaches(self, target: float) -> bool:
        """Whether a cascade is likely to reach an accuracy on other images."""
        return bool(target + self.lost(target) <= self.fronts[0][1][-1] + 1e-9)


def _without_each(counts: NDArray[Any]) -> NDArray[Any]:
    """Sums of (F, T) over all folds, and over all but each where there are several: (F + 1, T), or (1, T)."""
    total = counts.sum(axis=0)
    return np.vstack([total, total - counts]) if len(counts) > 1 else total[None]


def _first_at(rising: Floats, target: ArrayLike) -> Ints:
    """Where rising numbers reach the targets; the last where they do not."""
    return np.minimum(np.searchsorted(rising, np.asarray(target) - 1e-9), len(rising) - 1)


@dataclass(frozen=True)
class Found:
    """The cascade for a target, fitted on all images, and what choosing like that reaches on images left out."""

    target: float  # accuracy or cost that was asked for
    choice: Choice  # models by their place in the list given, thresholds, accuracy and cost on all images
    rule: Fused  # fitted for the models of the choice
    shares: Floats  # (K,) of the images that each of its models sees
    costs: Floats  # (U,) in every unit, on all images
    cross_fitted: Scored  # with all chosen and fitted on the other folds
    quantiles: list[list[float]]  # of how sure each step is of the images that reach it, as of `drift`

    @classmethod
    def on(
        cls, steps: Steps, costs: Floats, target: float, choice: Choice, rule: Fused, cross_fitted: Scored | None = None
    ) -> Found:
        """A cascade with its figures on the images of these steps."""
        scored, last = choice.score(steps, costs), choice.decide(steps.confidence)
        sure = [row[last >= k] for k, row in enumerate(steps.confidence)]
        shares = np.array([len(each) for each in sure]) / len(last)
        return cls(target, choice, rule, shares, scored.costs, cross_fitted or scored, quantiles(sure))


@dataclass(frozen=True)
class Cascades:
    """All that `find_cascades` found."""

    goals: list[Found]  # in the order of the goals
    front: list[Found]  # by rising cost, the cheapest cascades for rising accuracies
    raw: list[Scored]  # of each model as it is, by its place
    corrected: list[Scored]  # of each model with its own temperature and offsets, cross-fitted
    dropped: dict[int, str]  # why models were left out, by place

    def singles(self, names: Sequence[str]) -> list[Single]:
        """All models alone, as they are and corrected."""
        return [
            Single(model, f"{names[model]} (corrected)" if corrected else names[model], corrected, scored)
            for corrected, group in ((False, self.raw), (True, self.corrected))
            for model, scored in enumerate(group)
        ]


class _Engine:
    """Prefix pools of every set of models without every fold, and the searches over them.

    A context is what a choice may know: all folds but one, by its number, or all of them, the last context. There an
    image is answered by pools that were fitted neither on its own fold nor on the one left out.
    """

    def __init__(
        self, rows: Rows, costs: Floats, folds: Ints, most: int, confidence: str, offsets: bool, progress: bool
    ) -> None:
        self.rows, self.costs, self.offsets = rows, costs, offsets
        self.names = list(SIMPLE_CONFIDENCES) if confidence == BEST else [confidence]
        numbers, self.folds = np.unique(folds, return_inverse=True)
        self.images = [np.flatnonzero(self.folds == fold) for fold in range(len(numbers))]  # of each fold
        self.contexts = [np.flatnonzero(self.folds != fold) for fold in range(len(numbers))]
        self.contexts.append(np.arange(len(folds)))
        self.order = [int(model) for model in np.argsort(costs[0], kind="stable")]
        self.raw = rows.logs[:, : rows.kept].argmax(axis=1) == rows.positions
        self.steps: dict[Chain, tuple[NDArray[np.float32], Bools]] = {}  # by context: (C, F + 1, N), and (F + 1, N)
        self.pools: dict[Chain, Pool] = {}
        alone: list[Chain] = [(model,) for model in self.order]
        self._fit(alone, progress=False)
        kept = [[m for m in self.order if m not in self.dominated(place)] for place in range(len(self.contexts))]
        self.chains = [
            [chain for size in range(1, most + 1) for chain in combinations(models, size)] for models in kept
        ]
        self._fit(sorted({chain for chains in self.chains for chain in chains} - set(alone)), progress)
        self.judges = [self._best_confidence(context) for context in range(len(self.contexts))]
        self.searches = [
            Search(((chain, self.prefix_steps(chain, context, images)) for chain in chains), self.folds[images])
            for context, (chains, images) in enumerate(zip(self.chains, self.contexts, strict=True))
        ]

    def _fit(self, sets: Sequence[Chain], progress: bool) -> None:
        threads = ThreadPoolExecutor(NUM_THREADS)  # numpy leaves the other cores idle
        try:
            with threadpool_limits(1):  # the fits share the cores; matrices too small to be shared only wait for them
                found = tqdm(threads.map(self._fit_one, sets), "pools", len(sets), delay=2, disable=not progress)
                for models, (confidence, correct, pool) in zip(sets, found, strict=True):
                    self.steps[models], self.pools[models] = (confidence, correct), pool
        finally:
            threads.shutdown(cancel_futures=True)  # an interrupt waits for no more than two fits

    def _fit_one(self, models: Chain) -> tuple[NDArray[np.float32], Bools, Pool]:
        fit = CrossFit(self.rows.take(models), self.folds, PENALTIES if self.offsets else (None,), deep=True)
        shape = len(self.contexts), len(self.folds)
        confidence, correct = np.empty((len(self.names), *shape), dtype=np.float32), np.empty(shape, dtype=bool)
        for context in fit.numbers:
            penalty = fit.choice({context})
            for fold in fit.numbers:
                inside, pool = self.images[fold], fit.paths[frozenset({context, fold})][penalty]
                for sure, name in zip(confidence, self.names, strict=True):
                    sure[context, inside], correct[context, inside] = standing(pool, fit.parts[fold], name)
            own = self.images[context]
            confidence[:, -1, own], correct[-1, own] = confidence[:, context, own], correct[context, own]
        return confidence, correct, fit.pool()

    def _best_confidence(self, context: int) -> int:
        """Place of the confidence that ranks best over the folds of a context; of those as good, the simplest."""
        if len(self.names) == 1:
            return 0
        losses = []
        for images in (images for fold, images in enumerate(self.images) if fold != context):
            after = [self.steps[models] for models in self.chains[context]]
            losses.append(
                [
                    sum(aurc(sure[place, context, images], right[context, images]) for sure, right in after)
                    for place in range(len(self.names))
                ]
            )
        return simplest_of_best(np.array(losses).T)

    def prefix_steps(self, chain: Chain, context: int, images: Ints) -> Steps:
        """Steps of a chain as a context knows them."""
        judge, after = self.judges[context], [self.steps[chain[: k + 1]] for k in range(len(chain))]
        return Steps(
            np.stack([confidence[judge, context, images] for confidence, _ in after]),
            np.stack([correct[context, images] for _, correct in after]),
            self.costs[0, list(chain)],
        )

    def dominated(self, context: int) -> dict[int, int]:
        """Models that another one clearly beats, or equals, raw and corrected, at no higher cost; with that other one.

        Clearly is by two standard errors of the paired difference: a model that is a little worse may still err apart.
        """
        images = self.contexts[context]
        corrected = {m: self.steps[(m,)][1][context, images] for m in self.order}
        answers = {m: np.stack([self.raw[m, images], corrected[m]]).astype(np.int64) for m in self.order}
        beaten: dict[int, int] = {}
        for place, model in enumerate(self.order):
            for other in self.order[:place]:
                gains = answers[other] - answers[model]  # (2, N)
                if (gains.sum(axis=1) >= 2 * np.sqrt((gains**2).sum(axis=1))).all():
                    beaten.setdefault(model, other)
        return beaten

    def find(self, goal: Goal) -> Found:
        """The choice for an accuracy or a cost on all images, and on the folds without each."""
        *without, choice = (search.best(goal) for search in self.searches)
        correct, spent = np.empty(len(self.folds), dtype=bool), np.empty((len(self.costs), len(self.folds)))
        for fold, (other, inside) in enumerate(zip(without, self.images, strict=True)):
            scored = other.score(self.prefix_steps(other.chain, fold, inside), self.costs)
            correct[inside], spent[:, inside] = scored.correct, scored.spent
        pools = tuple(self.pools[choice.chain[: k + 1]] for k in range(len(choice.chain)))
        rule = Fused(self.names[self.judges[-1]], self.offsets, pools)
        steps = self.prefix_steps(choice.chain, -1, self.contexts[-1])
        return Found.on(steps, self.costs, goal.value, choice, rule, Scored(correct, spent))

    def front(self) -> list[Found]:
        """The choices for accuracies at even steps, as far as one is likely to reach them."""
        search = self.searches[-1]
        lowest, highest = search.fronts[0][1][[0, -1]]
        step = max(FRONT_STEP, (highest - lowest) / FRONT_ROWS)
        targets = [t for t in np.arange(np.ceil(lowest / step), highest / step) * step if search.reaches(t)]
        rows: list[Found] = []
        for target in targets[::-1]:  # a lower target is sometimes raised more than the one above it
            row = self.find(Goal("accuracy", target))
            if not rows or row.choice.cost < rows[-1].choice.cost:
                rows.append(row)
        return rows[::-1]


def find_cascades(
    outputs: Sequence[Outputs],
    folds: Ints,
    goals: Sequence[Goal] = (Goal("match"),),
    costs: ArrayLike | None = None,
    max_stages: int = 4,
    confidence: str = "max softmax",
    offsets: bool = True,
    progress: bool = False,
) -> Cascades:
    """Find the cheapest cascades of some models for some goals, all of it chosen on some folds and scored on others.

    Args:
        outputs: of two to twelve models over the same images, in any order; images without a target are left out.
        folds: (N,) numbers, three different ones or more.
        goals: "match" is the accuracy of the best model as it is; the cost of "flops" is in the first unit.
        costs: (M,) of an image by each model, or (U, M) in several units of which the first is to be saved; None for
            the records' billions of multiply-adds.
        max_stages: models in a cascade, at most 4.
        confidence: of the fused answers, a name of `SIMPLE_CONFIDENCES`, or `BEST` for the one that ranks them best.
        offsets: False for pools without b.
        progress: whether to show a bar where it takes longer than two seconds.

    Raises:
        ValueError: the outputs do not say classes or targets or are not of the same images, or a cost is not known.
    """
    if max_stages not in NUM_BINS:
        raise ValueError(f"a cascade of at most {max_stages} models; give 1 to {max(NUM_BINS)}")
    names = [out.record.model or f"model {place + 1}" for place, out in enumerate(outputs)]
    known = [out.record.flops for out in outputs]
    if costs is None and None in known:
        raise ValueError(f"the cost of {names[known.index(None)]} is not known; give it")
    table = np.atleast_2d(np.asarray(known if costs is None else costs, dtype=np.float64))
    rows = rows_of(outputs)
    labelled = np.flatnonzero(rows.positions != UNKNOWN)
    if len(np.unique(folds[labelled])) < 3:
        raise ValueError("a search needs images of known classes in three folds or more; make the tables as .parquet")
    everything = range(len(outputs))
    rows = rows.take(everything, labelled)
    engine = _Engine(rows, table, folds[labelled], max_stages, confidence, offsets, progress)
    raw = [Scored.alone(engine.raw[m], table[:, m]) for m in everything]
    corrected = [Scored.alone(engine.steps[(m,)][1][-1], table[:, m]) for m in everything]
    match = Goal("accuracy", max(each.accuracy for each in raw))
    found = [engine.find(match if goal.kind == "match" else goal) for goal in goals]
    beaten = engine.dominated(-1)
    dropped = {m: f"{names[m]} is no better than {names[other]}, which costs no more" for m, other in beaten.items()}
    return Cascades(found, engine.front(), raw, corrected, dropped)
