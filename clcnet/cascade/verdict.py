"""Whether a cascade is worth it: held against the models alone, on images on which nothing of it was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from clcnet.cascade.curve import Steps, decide
from clcnet.cascade.selection import (
    Goal,
    Reference,
    choose,
    choose_or_nearest,
    cross_fit,
    resampled_savings,
    short_threshold,
)
from clcnet.intervals import Interval, percentile_interval, resampled_means, share_interval
from clcnet.metrics import Bools, Floats, Ints, format_flops


@dataclass(frozen=True)
class Scored:
    """What a decision came to on each of N images."""

    correct: Bools  # (N,)
    spent: Floats  # (U, N) in every unit of the costs

    @classmethod
    def alone(cls, correct: Bools, costs: Floats) -> Scored:
        """A model that costs this much, (U,), on every image."""
        return cls(correct, np.repeat(np.asarray(costs, dtype=np.float64)[:, None], len(correct), axis=1))

    @classmethod
    def at(cls, steps: Steps, thresholds: ArrayLike, costs: Floats | None = None) -> Scored:
        """A cascade at these thresholds, as of `decide`; costs (U, K) of its models, or the FLOPs that they take."""
        last = decide(steps.confidence, thresholds)
        each = steps.flops[None] if costs is None else costs
        return cls(np.take_along_axis(steps.correct, last[None], 0)[0], np.cumsum(each, axis=1)[:, last])

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * float(self.correct.mean())

    @property
    def accuracy_interval(self) -> Interval:
        """Clopper and Pearson's."""
        return share_interval(self.correct.sum(), len(self.correct))

    @property
    def costs(self) -> Floats:
        """(U,) means."""
        return self.spent.mean(axis=1)

    def saving(self, cost: float, unit: int = 0) -> tuple[float, Interval]:
        """How many times cheaper it is than what costs this much, with the bootstrap's interval over images."""
        means = resampled_means(self.spent[unit][:, None])[:, 0]
        return float(cost / self.costs[unit]), percentile_interval(cost / means)

    def gain(self, other: Scored) -> tuple[float, Interval]:
        """Points of accuracy that it has more than another one on the same images, with the paired interval."""
        means = resampled_means(np.stack([self.correct, other.correct], axis=1))
        return self.accuracy - other.accuracy, percentile_interval(100 * (means[:, 0] - means[:, 1]))


@dataclass(frozen=True)
class Units:
    """What is counted: the first unit is the one that is to be saved."""

    names: tuple[str, ...]  # "FLOPs", "milliseconds" where the models' times are known, and that of a file of costs

    def of(self, costs: Floats, name: str) -> float | None:
        """One of the costs (U,), None where it was not counted."""
        return float(costs[self.names.index(name)]) if name in self.names else None

    def format(self, cost: float) -> str:
        """A cost in the first unit."""
        if self.names[0] == "FLOPs":
            return format_flops(cost)
        return f"{cost:.3g} ms" if self.names[0] == "milliseconds" else f"{cost:.4g} {self.names[0]}"

    @property
    def nouns(self) -> list[str]:
        """What there is less of where a cost in each unit is saved."""
        return [{"FLOPs": "multiply-adds", "milliseconds": "time"}.get(name, name) for name in self.names]


@dataclass(frozen=True)
class Single:
    """A model used alone, as it is or corrected by a temperature and offsets of its own."""

    model: int  # its place
    name: str  # as printed
    corrected: bool
    scored: Scored  # on images that nothing of it was fitted on

    @property
    def cost(self) -> float:
        """In the first unit."""
        return float(self.scored.costs[0])


@dataclass(frozen=True)
class Verdict:
    """What to use: the cascade, or its rival alone."""

    cascade: bool  # whether it is the cascade
    reason: str  # one sentence
    rival: Single  # the single model that the cascade is held against
    saving: float = 1.0  # how many times less the cascade costs than that
    saving_interval: Interval = (1.0, 1.0)

    @property
    def single(self) -> Single | None:
        """The model to use alone, where that is the choice."""
        return None if self.cascade else self.rival

    @property
    def choice(self) -> str:
        """`cascade`, or a single model's name."""
        return "cascade" if self.cascade else self.rival.name


def rival_of(singles: Sequence[Single], accuracy: float) -> Single:
    """The cheapest model that is this accurate; where none is, the most accurate one."""
    reaching = [single for single in singles if single.scored.accuracy >= accuracy - 1e-9]
    if reaching:
        return min(reaching, key=lambda single: single.cost)
    return max(singles, key=lambda single: single.scored.accuracy)


def judge(
    fitted: Scored, goal: Goal, target: float, singles: Sequence[Single], units: Units, least_saving: float
) -> Verdict:
    """Whether to use a cascade, or a model alone; in doubt, by the 95% intervals over the same images, the model.

    Args:
        fitted: the cascade, on images that nothing of it was chosen on.
        target: the accuracy that the goal asks for, in percent, where it asks for one.
        least_saving: percent below which a second model is not worth it.
    """
    if goal.kind == "flops":
        affordable = [single for single in singles if single.cost <= goal.value * (1 + 1e-9)]
        rival = rival_of(affordable or singles, np.inf if affordable else 0)
        gain, (low, high) = fitted.gain(rival.scored)
        reason = f"{_points(gain, (low, high), rival)}, within {units.format(goal.value)}"
        if not affordable:
            reason = f"nothing costs as little as {units.format(goal.value)}, and this is the cheapest"
        elif low <= 0:
            reason = f"it is not sure that a cascade gains anything: {reason}"
        return Verdict(bool(affordable) and low > 0, reason, rival, *fitted.saving(rival.cost))
    rival = rival_of(singles, target)
    saving, interval = fitted.saving(rival.cost)
    figures = f"{less(saving, interval, rival, units)} at {fitted.accuracy:.2f}% where {target:.2f}% was asked for"
    gain, (low, high) = fitted.gain(rival.scored)
    doubt = ""
    if rival.scored.accuracy < target - 1e-9 and low > 0:
        figures = f"no single model reaches {target:.2f}%, and it gains {_points(gain, (low, high), rival)}; {figures}"
    elif rival.scored.accuracy + high < target - 1e-9:
        doubt = f"the cascade does not hold {target:.2f}%: "
    elif interval[0] <= 1:
        doubt = "it is not sure that a cascade costs less: "
    elif saving < 1 + least_saving / 100:
        doubt = f"a cascade saves less than {least_saving:g}%: "
    return Verdict(not doubt, doubt + figures, rival, saving, interval)


def less(saving: float, interval: Interval, rival: Single, units: Units) -> str:
    """A saving in words."""
    return f"{saving:.2f}x less {units.nouns[0]} than {rival.name} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _points(gain: float, interval: Interval, rival: Single) -> str:
    return f"{gain:+.2f} points [{interval[0]:+.2f}, {interval[1]:+.2f}] against {rival.name}"


@dataclass(frozen=True)
class Recommendation:
    """The threshold of a rule for a goal, and whether to use it.

    `scored` is the threshold on the images that it was chosen on, as in the paper. For a goal of accuracy the interval
    of its saving takes the choice into account: it is made anew on every resample, and 0 stands for a resample in which
    no threshold served the goal.
    """

    goal: Goal
    threshold: float  # that serves the goal on these images, or comes nearest to it
    reached: bool  # whether it serves it
    calls: Floats  # (K,) share of the images that each model sees
    scored: Scored
    saving_interval: Interval  # of its FLOPs, against the last model
    cross_fitted: Scored  # thresholds chosen on four folds, scored on the fifth
    verdict: Verdict

    @property
    def deferral(self) -> float:
        """Share of the images that go beyond the first model, a fraction."""
        return float(self.calls[1]) if len(self.calls) > 1 else 0.0


def recommend(
    steps: Steps,
    folds: Ints,
    goal: Goal,
    names: Sequence[str] = ("shallow", "deep"),
    least_saving: float = 0.0,
    seed: int = 42,
) -> Recommendation:
    """Choose one threshold for a goal, and judge it on images that it was not chosen on; see `judge`.

    Args:
        steps: of a rule over K models.
        folds: (N,), two or more.
        names: of the models.
        seed: of the bootstrap that chooses anew.
    """
    curve, point, serves = choose(steps, goal)
    threshold = short_threshold(curve, point)
    scored = Scored.at(steps, threshold)
    last = Reference("last", goal.value, float(steps.flops[-1]), len(steps.flops) - 1 if goal.kind == "match" else None)
    _, interval = scored.saving(last.flops)
    if goal.kind != "flops":
        interval = percentile_interval(resampled_savings(steps, [last], seed)[last.name])
    fitted = Scored.at(steps, cross_fit(steps, folds, lambda others: choose_or_nearest(others, goal)))
    alone = enumerate(zip(names, steps.own, steps.flops, strict=True))
    singles = [Single(k, name, False, Scored.alone(right, np.array([cost]))) for k, (name, right, cost) in alone]
    verdict = judge(fitted, goal, goal.target(steps), singles, Units(("FLOPs",)), least_saving)
    return Recommendation(goal, threshold, serves, curve.calls[point], scored, interval, fitted, verdict)
