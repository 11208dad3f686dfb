"""Promises about a cascade: some folds choose a path of cascades, from dear to cheap, and the others certify it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from clcnet.cascade.curve import Steps
from clcnet.cascade.drift import quantiles
from clcnet.cascade.fused import Fused
from clcnet.cascade.guarantee import certify, certify_risk, could_promise, most_cost, passed
from clcnet.cascade.policy import Certificate
from clcnet.cascade.rule import known
from clcnet.cascade.search import Found, score
from clcnet.cascade.verdict import Scored, Single, Units, Verdict, less
from clcnet.data.outputs import Outputs
from clcnet.metrics import Bools, Floats, Ints, format_flops

SHARE_CHOOSING = 0.4  # of the folds; weights are settled by few images, a small promise needs many
NUM_COVERAGES = 100


@dataclass(frozen=True)
class Promise:
    """What is to be promised, each thing only where it is given; see `Certificate`."""

    probability: float = 0.95
    most_drop: float | None = None
    most_flops: float | None = None
    most_risk: float | None = None

    @property
    def any_cascade_will_do(self) -> bool:
        """Whether neither accuracy nor cost is promised, so that there is nothing to walk for."""
        return self.most_drop is None and self.most_flops is None

    @property
    def delta(self) -> float:
        """Probability with which each promise may be broken."""
        asked = (self.most_drop, self.most_flops, self.most_risk)
        return (1 - self.probability) / sum(one is not None for one in asked)


@dataclass(frozen=True)
class Promised:
    """What can be promised.

    Attributes:
        found: the cascade, with shares, costs and `cross_fitted` of the certifying images; None where none keeps it.
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


def alone_on(
    outputs: Sequence[Outputs], chosen_on: Sequence[Outputs], costs: Floats, confidence: str
) -> tuple[list[Scored], list[Scored]]:
    """Each model alone on images: as it is, and with a temperature and offsets fitted on the images that chose."""
    raw = [known(out.correct, out) for out in outputs]
    fitted = [Fused(confidence).fit([one]).step([out]) for one, out in zip(chosen_on, outputs, strict=True)]
    corrected = [known(step.correct, out) for step, out in zip(fitted, outputs, strict=True)]
    return list(map(Scored.alone, raw, costs.T)), list(map(Scored.alone, corrected, costs.T))


class _OnImages:
    """Cascades on some images; what stands after a prefix is worked out once."""

    def __init__(self, outputs: Sequence[Outputs], costs: Floats) -> None:
        self.outputs, self.costs = outputs, costs
        self._prefixes: dict[tuple[int, ...], tuple[Floats, Bools]] = {}

    def steps(self, found: Found) -> Steps:
        """Of a fitted cascade."""
        chain = found.choice.chain
        for k in range(len(chain)):
            if chain[: k + 1] not in self._prefixes:
                step = found.rule.step([self.outputs[model] for model in chain[: k + 1]])
                correct = known(step.correct, self.outputs[chain[k]])
                self._prefixes[chain[: k + 1]] = step.confidence, correct
        prefixes = [self._prefixes[chain[: k + 1]] for k in range(len(chain))]
        sure, right = map(np.stack, zip(*prefixes, strict=True))
        return Steps(sure, right, self.costs[0, list(chain)])

    def last(self, found: Found) -> Ints:
        """(N,) the last model that sees each image."""
        return found.choice.decide(self.steps(found).confidence)

    def final(self, found: Found) -> tuple[Floats, Bools]:
        """How sure the final answers are, and whether they are right, (N,) each."""
        places, steps = (self.last(found), np.arange(len(self.outputs[0]))), self.steps(found)
        return steps.confidence[places].astype(np.float32), steps.correct[places]


def on_others(cascades: Sequence[Found], outputs: Sequence[Outputs], costs: Floats) -> list[Found]:
    """The same cascades with their figures on other images than those that they were chosen and fitted on."""
    images, found = _OnImages(outputs, costs), []
    for each in cascades:
        scored, sure = score(each.choice, images.steps(each), costs)
        shares = np.array([len(step) for step in sure]) / len(outputs[0])
        same = replace(each, shares=shares, costs=scored.costs, cross_fitted=scored, quantiles=quantiles(sure))
        found.append(same)
    return found


def promised_by(
    path: Sequence[Found],
    chosen_on: Sequence[Outputs],
    outputs: Sequence[Outputs],
    costs: Floats,
    deep: int,
    promise: Promise,
) -> Promised:
    """The cheapest cascade of a path that keeps all promises; without one on accuracy, the dearest.

    Args:
        path: from dear to cheap, fitted and ordered on other images than `outputs`.
        chosen_on: of all models, over those other images.
        outputs: of all models, over the images that certify.
        costs: (U, M) of all models.
        deep: the model that accuracy is held against.
        promise: what is to be kept.
    """
    images, delta = _OnImages(outputs, costs), promise.delta
    flops = np.array([np.nan if out.record.flops is None else out.record.flops for out in outputs])
    deep_right = known(outputs[deep].correct, outputs[deep])

    @cache
    def at(place: int) -> tuple[Scored, list[Floats]]:
        return score(path[place].choice, images.steps(path[place]), costs)

    accurate, cheap = len(path), len(path)  # counted from the dear end and from the cheap one
    if promise.most_drop is not None:
        rights = (at(place)[0].correct for place in range(len(path)))
        accurate = certify(deep_right, rights, promise.most_drop / 100, delta)
    if promise.most_flops is not None:
        bounds = (most_cost(images.last(found), flops[list(found.choice.chain)], delta) for found in reversed(path))
        cheap = passed(bound <= promise.most_flops for bound in bounds)
    holding = range(len(path) - cheap, accurate)
    if not holding:
        return Promised(reason=_why_not(promise, deep_right, at(0)[0].correct, accurate, cheap))
    place = holding[-1 if promise.most_drop is not None else 0]
    (found,) = on_others([path[place]], outputs, costs)
    scored = found.cross_fitted
    stops = images.last(found) < len(found.choice.chain) - 1
    losses = deep_right.astype(np.int8) - scored.correct
    certificate = Certificate(
        promise.probability,
        len(deep_right),
        outputs[deep].record.model or "the best model",
        100 * float(losses.mean()),
        100 * float(losses[stops].mean()) if stops.any() else None,
        promise.most_drop,
        promise.most_flops,
        promise.most_risk,
    )
    if promise.most_risk is None:
        return Promised(found, certificate)
    # the cascade was chosen from the path on these very images, so each of the path counts as asked about
    limits = _coverage_thresholds(
        _OnImages(chosen_on, costs).final(found)[0], len(deep_right), promise.most_risk, delta
    )
    confidence, right = images.final(found)
    count = certify_risk(confidence, right, limits, promise.most_risk, delta / len(path))
    if not count:
        return Promised(reason=f"no answers can be promised to err on at most {promise.most_risk:.1%} of their images")
    answered = confidence >= limits[count - 1]
    certificate = replace(certificate, coverage=float(answered.mean()), risk=float(1 - right[answered].mean()))
    return Promised(found, certificate, limits[count - 1] if count < len(limits) else None)


def _coverage_thresholds(confidence: Floats, num_images: int, risk: float, delta: float) -> list[float]:
    """Falling thresholds that answer more and more, from about as few images as can show such a risk to all."""
    fewest = min(1.0, 3 * np.log(1 / delta) / (max(risk, 1e-9) * num_images))
    answered = np.linspace(fewest, 1, NUM_COVERAGES)[:-1]
    return [*np.quantile(confidence, 1 - answered, method="inverted_cdf").tolist(), -np.inf]


def _why_not(promise: Promise, deep_right: Bools, dearest_right: Bools, accurate: int, cheap: int) -> str:
    images = f"{len(deep_right):,} images"
    if not accurate:
        could = could_promise(deep_right, dearest_right, promise.delta)
        instead = "less than 20 points cannot be" if np.isnan(could) else f"with them {could:.1f} points could be"
        return f"{images} are too few to promise that it loses at most {promise.most_drop:g} points; {instead} promised"
    if not cheap:
        return (
            f"no cascade takes at most {format_flops(promise.most_flops or 0)} FLOPs an image for certain, by {images}"
        )
    return f"the cascades that are cheap enough are not accurate enough for certain, by {images}"
