"""Promises about a cascade: some folds choose a path of cascades, from dear to cheap, and the others certify it.

What a cascade loses is tested by betting (arXiv:2010.09686): a capital that can hardly grow unless the loss is below
what is promised. Cascades and thresholds are walked in an order fixed beforehand, from the safe end, up to the first
one that fails: then all that passed hold together (fixed-sequence testing, arXiv:2110.01052). Shares are bounded
exactly. Everything assumes images like these: drawn at random from those to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clcnet.cascade.curve import Steps
from clcnet.cascade.policy import Certificate
from clcnet.cascade.rules import Fused, known
from clcnet.cascade.search import Cascades, Found
from clcnet.cascade.verdict import Scored, Single, Units, Verdict, less
from clcnet.data.outputs import Outputs
from clcnet.intervals import exact_interval
from clcnet.metrics import Bools, Floats, Ints, format_flops

SHARE_CHOOSING = 0.4  # of the folds; weights are settled by few images, a small promise needs many
NUM_COVERAGES = 100
PRIOR_VARIANCE = 0.04  # that of 2% won and 2% lost; counts as one image's
PROMISES = np.arange(1, 200) / 1000  # what could be promised is looked for in steps of 0.1 points


@dataclass(frozen=True)
class Promise:
    """What is to be promised, each thing only where it is given; see `Certificate`."""

    probability: float = 0.95
    most_drop: float | None = None
    most_flops: float | None = None
    most_risk: float | None = None

    @property
    def delta(self) -> float:
        """Probability with which each promise may be broken."""
        asked = (self.most_drop, self.most_flops, self.most_risk)
        return (1 - self.probability) / sum(one is not None for one in asked)


@dataclass(frozen=True)
class Promised:
    """What can be promised.

    Attributes:
        found: the cascade, with its figures on the certifying images; None where none keeps it.
        certificate: None likewise.
        unsure_below: see `Policy`.
        reason: why nothing can be promised.
    """

    found: Found | None = None
    certificate: Certificate | None = None
    unsure_below: float | None = None
    reason: str = ""

    def judge(self, rival: Single, units: Units, least_saving: float) -> Verdict:
        """Whether to use the cascade that keeps the promises, or the model that it is held against."""
        if self.found is None or self.certificate is None:
            return Verdict(False, self.reason, rival)
        saving, interval = self.found.cross_fitted.saving(rival.cost)
        figures, doubt = less(saving, interval, rival, units), ""
        if self.certificate.most_drop is not None and saving < 1 + least_saving / 100:
            doubt = f"a cascade that keeps the promise saves less than {least_saving:g}%: "
        return Verdict(not doubt, doubt + figures, rival, saving, interval)


def choosing_images(folds: Ints) -> Bools:
    """(N,) which images choose; the others certify."""
    numbers = np.unique(folds)
    return np.isin(folds, numbers[: max(1, round(SHARE_CHOOSING * len(numbers)))])


class _OnImages:
    """Cascades on images; what stands after a prefix is worked out once."""

    def __init__(self, outputs: Sequence[Outputs], costs: Floats) -> None:
        self.outputs, self.costs = outputs, costs
        self._prefixes: dict[tuple[int, ...], tuple[Floats, Bools]] = {}

    def steps(self, found: Found) -> Steps:
        """Of a fitted cascade."""
        chain, after = found.choice.chain, []
        for k in range(len(chain)):
            prefix = chain[: k + 1]
            if prefix not in self._prefixes:
                step = found.rule.step([self.outputs[model] for model in prefix])
                self._prefixes[prefix] = step.confidence, known(step.correct, self.outputs[chain[k]])
            after.append(self._prefixes[prefix])
        sure, right = map(np.stack, zip(*after, strict=True))
        return Steps(sure, right, self.costs[0, list(chain)])

    def measure(self, found: Found) -> Found:
        """The same cascade with its figures on these images."""
        return Found.on(self.steps(found), self.costs, found.target, found.choice, found.rule)

    def last(self, found: Found) -> Ints:
        """(N,) the last model that sees each image."""
        return found.choice.decide(self.steps(found).confidence)

    def confidence(self, found: Found) -> NDArray[np.float32]:
        """(N,) how sure the final answers are."""
        return np.take_along_axis(self.steps(found).confidence, self.last(found)[None], 0)[0].astype(np.float32)


def certified(
    cascades: Cascades,
    chosen_on: Sequence[Outputs],
    outputs: Sequence[Outputs],
    costs: Floats,
    best: int,
    promise: Promise,
    confidence: str,
) -> tuple[Cascades, Promised]:
    """Certify the cheapest cascade of a front that keeps all promises; without one on accuracy, the dearest.

    Args:
        cascades: found on images that certify nothing.
        chosen_on: of all models, over those images.
        outputs: of all models, over the images that certify.
        costs: (U, M) of all models.
        best: the most accurate model alone, which accuracy is held against.
        promise: what is to be kept.
        confidence: of corrected models, as of `Fused`.

    Returns:
        The cascades with their figures on the images that certify, the promised one in the first goal's place, and what
        is promised.
    """
    images = _OnImages(outputs, costs)
    goal, *others = cascades.goals
    free = promise.most_drop is None and promise.most_flops is None  # so that any cascade will do
    front = [*map(images.measure, cascades.front)]
    path = front[::-1] if front and not free else [images.measure(goal)]
    promised = _promised(path, _OnImages(chosen_on, costs), images, best, promise)
    raw = [known(out.correct, out) for out in outputs]
    rules = [Fused(confidence).fit([one]) for one in chosen_on]
    corrected = [known(rule.step([out]).correct, out) for rule, out in zip(rules, outputs, strict=True)]
    alone = [list(map(Scored.alone, right, costs.T)) for right in (raw, corrected)]
    goals = [promised.found or goal, *map(images.measure, others)]
    return replace(cascades, goals=goals, front=front, raw=alone[0], corrected=alone[1]), promised


def _promised(path: Sequence[Found], chosen_on: _OnImages, images: _OnImages, best: int, promise: Promise) -> Promised:
    """Walk a path from dear to cheap, measured on the images that certify; `best` is the model it is held against."""
    against, delta = images.outputs[best], promise.delta
    best_right = known(against.correct, against)
    flops = np.array([np.nan if out.record.flops is None else out.record.flops for out in images.outputs])
    accurate, cheap = len(path), len(path)  # counted from the dear end and from the cheap one
    if promise.most_drop is not None:
        rights = (found.cross_fitted.correct for found in path)
        accurate = certify(best_right, rights, promise.most_drop / 100, delta)
    if promise.most_flops is not None:
        bounds = (most_cost(images.last(found), flops[list(found.choice.chain)], delta) for found in reversed(path))
        cheap = passed(bound <= promise.most_flops for bound in bounds)
    holding = path[len(path) - cheap : accurate]
    if not holding:
        return Promised(reason=_why_not(promise, best_right, path[0].cross_fitted.correct, accurate, cheap))
    found = holding[-1 if promise.most_drop is not None else 0]
    right = found.cross_fitted.correct
    stops = images.last(found) < len(found.choice.chain) - 1
    losses = best_right.astype(np.int8) - right
    certificate = Certificate(
        **asdict(promise),
        num_images=len(best_right),
        against=against.record.model or "the best model",
        drop=100 * float(losses.mean()),
        kept_drop=100 * float(losses[stops].mean()) if stops.any() else None,
    )
    if promise.most_risk is None:
        return Promised(found, certificate)
    # the cascade was chosen from the path on these very images, so each of the path counts as asked about
    limits = _coverage_thresholds(chosen_on.confidence(found), len(best_right), promise.most_risk, delta)
    sure = images.confidence(found)
    count = certify_risk(sure, right, limits, promise.most_risk, delta / len(path))
    if not count:
        reason = f"no answers can be promised to err on at most {promise.most_risk:.1%} of their images"
        return Promised(reason=reason)
    answered = sure >= limits[count - 1]
    certificate = replace(certificate, coverage=float(answered.mean()), risk=float(1 - right[answered].mean()))
    return Promised(found, certificate, limits[count - 1] if count < len(limits) else None)


def _coverage_thresholds(confidence: NDArray[np.float32], num_images: int, risk: float, delta: float) -> list[float]:
    """Falling thresholds that answer more and more, from about as few images as can show such a risk to all."""
    fewest = min(1.0, 3 * np.log(1 / delta) / (max(risk, 1e-9) * num_images))
    answered = np.linspace(fewest, 1, NUM_COVERAGES)[:-1]
    return [*np.quantile(confidence, 1 - answered, method="inverted_cdf").tolist(), -np.inf]


def _why_not(promise: Promise, best_right: Bools, dearest_right: Bools, accurate: int, cheap: int) -> str:
    images = f"{len(best_right):,} images"
    if not accurate:
        could = could_promise(best_right, dearest_right, promise.delta)
        instead = "less than 20 points cannot be" if np.isnan(could) else f"with them {could:.1f} points could be"
        return f"{images} are too few to promise that it loses at most {promise.most_drop:g} points; {instead} promised"
    if not cheap:
        return (
            f"no cascade takes at most {format_flops(promise.most_flops or 0)} FLOPs an image for certain, by {images}"
        )
    return f"the cascades that are cheap enough are not accurate enough for certain, by {images}"


def log_capital(differences: ArrayLike, eps: float, delta: float) -> Floats:
    """The logarithm of the highest capital of bets that the mean difference is below eps.

    Args:
        differences: (..., N) from -1 to 1, in random order: best model right less cascade right.
        eps: a fraction; were the mean eps or more, the capital would reach 1 / delta with probability delta at most.
        delta: sets the stakes.

    Returns:
        (...,).
    """
    given = np.asarray(differences, dtype=np.float64)
    size = given.shape[-1]
    seen = np.arange(2, size + 2)
    squares = (given - np.cumsum(given, axis=-1) / seen) ** 2
    variance = np.full(given.shape, PRIOR_VARIANCE)  # before each image
    variance[..., 1:] = (PRIOR_VARIANCE + np.cumsum(squares[..., :-1], axis=-1)) / seen[:-1]
    stakes = np.minimum(np.sqrt(2 * np.log(1 / delta) / (size * variance)), 0.5 / (1 - eps))
    growth = np.cumsum(np.log1p(stakes * (eps - given)), axis=-1)
    return np.asarray(growth.max(axis=-1))


def loses_less(differences: ArrayLike, eps: float, delta: float) -> Bools:
    """Whether a mean difference below eps is certified at 1 - delta, of differences (..., N) in random order."""
    return np.asarray(log_capital(differences, eps, delta) >= np.log(1 / delta))


def passed(results: Iterable[bool]) -> int:
    """How many pass before the first that fails; of lazy results no more are asked for."""
    return sum(1 for _ in takewhile(bool, results))


def shuffled(num_images: int) -> NDArray[np.int64]:
    """A fixed random order: files come class by class, and bets are made one image after the other."""
    return np.random.default_rng(0).permutation(num_images)


def certify(best_right: Bools, cascade_right_by_threshold: Iterable[Bools], eps: float, delta: float) -> int:
    """How many of the thresholds, in their order, lose less than eps against the best model, certified at 1 - delta.

    Args:
        best_right: (N,) whether the model is right that is to be held against.
        cascade_right_by_threshold: (N,) each, in an order fixed without these images, the safest first.
        eps: a fraction of the images.
        delta: probability that any of those counted loses eps or more.
    """
    order = shuffled(len(best_right))
    best = best_right[order].astype(np.int8)
    return passed(bool(loses_less(best - right[order], eps, delta)) for right in cascade_right_by_threshold)


def could_promise(best_right: Bools, cascade_right: Bools, delta: float) -> float:
    """The least loss, in points, that these images certify of one cascade; NaN where it would be 20 or more."""
    kept = (eps for eps in PROMISES if certify(best_right, [cascade_right], float(eps), delta))
    return float(100 * next(kept, np.nan))


def most_share(count: ArrayLike, num_images: ArrayLike, delta: float) -> Floats:
    """Clopper and Pearson's upper bound of a share, which holds with probability 1 - delta; 1 of no images."""
    _, high = exact_interval(count, num_images, 1 - 2 * delta)
    return high / 100


def most_cost(last: NDArray[np.int64], costs: ArrayLike, delta: float) -> float:
    """An upper bound of a cascade's mean cost, from the last model (N,) that saw each image and models' costs (K,)."""
    each = np.asarray(costs, dtype=np.float64)
    later = len(each) - 1
    shares = most_share([(last > k).sum() for k in range(later)], len(last), delta / max(later, 1))
    return float(each[0] + each[1:] @ shares)


def certify_risk(confidence: ArrayLike, right: Bools, thresholds: Iterable[float], risk: float, delta: float) -> int:
    """How many of the thresholds, falling, answer with a share of errors of at most `risk`, certified at 1 - delta.

    Args:
        confidence: (N,) of the final answers; below a threshold the answer is "unsure".
        right: (N,) whether they are right.
        thresholds: fixed without these images.
        risk: fraction of the images that are answered.
        delta: probability that any of those counted errs more often.
    """
    sure = np.asarray(confidence)
    answered = (sure >= threshold for threshold in thresholds)
    return passed(bool(most_share((~right & kept).sum(), kept.sum(), delta) <= risk) for kept in answered)
