"""What else one could do with the same models: every rule, the oracle and chance over the same images, as curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clcnet.cascade.curve import (
    Curve,
    Steps,
    accuracy_at_deferral,
    area_under_deferral,
    oracle,
    resampled_counts,
    resampled_sweeps,
    sweep,
)
from clcnet.cascade.rules import compared, cross_fitted, know_classes
from clcnet.cascade.selection import cheapest_at_accuracy
from clcnet.data.outputs import Outputs
from clcnet.metrics import Floats, Ints

DEFERRAL_SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)
NUM_RESAMPLES = 400  # of every curve; enough for an interval printed with two digits


@dataclass(frozen=True)
class Contender:
    """A line of the comparison: its name and its steps."""

    name: str
    steps: Steps

    @cached_property
    def curve(self) -> Curve:
        """Over all distinct thresholds."""
        return sweep(self.steps)


def figures(curve: Curve, deep_accuracy: float, deep_flops: float) -> dict[str, float]:
    """Accuracy in percent at several shares deferred, mean accuracies over deferral, and the saving, by name."""
    point = cheapest_at_accuracy(curve, deep_accuracy)
    return {
        **{f"accuracy_at_{share:.0%}": accuracy_at_deferral(curve, share) for share in DEFERRAL_SHARES},
        "area": area_under_deferral(curve),
        "area_50": area_under_deferral(curve, 0.5),
        "saving": math.nan if point is None else deep_flops / float(curve.flops[point]),
    }


def compare(outputs: Sequence[Outputs], folds: Ints) -> tuple[list[Contender], list[str]]:
    """Score every rule of `compared` over the same images, whatever it is fitted to coming from the other folds.

    Returns:
        The contenders, CLCNet's rule first where it has judged, and the labels of those left out for want of classes.
    """
    contenders, left_out = [], []
    for label, rule, models in compared():
        if rule.applies_to(outputs[models]):
            contenders.append(Contender(label, cross_fitted(rule, outputs[models], folds)))
        elif rule.needs_classes and not know_classes(outputs[models]):
            left_out.append(label)
    first = contenders[0].steps
    return [*contenders, Contender("oracle", oracle(first.own, first.flops))], left_out


def resample(contenders: Sequence[Contender], seed: int) -> list[dict[str, Floats]]:
    """Bootstrap the figures of contenders over the same images and resamples, so that differences are paired.

    Returns:
        The figures of each by name, (B,); a saving of 0 where it does not get to the deep model's accuracy.
    """
    steps = contenders[0].steps
    draws = resampled_counts(len(steps), NUM_RESAMPLES, seed)
    targets = [100 * counts[steps.own[-1]].sum() / len(steps) for counts in draws]
    found = []
    for contender in contenders:
        curves = resampled_sweeps(contender.steps, NUM_RESAMPLES, seed)
        rows = [figures(curve, target, steps.flops[-1]) for (curve, _), target in zip(curves, targets, strict=True)]
        found.append({name: np.nan_to_num([row[name] for row in rows]) for name in rows[0]})
    return found
