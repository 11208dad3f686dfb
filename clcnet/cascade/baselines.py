"""What else one could do with the same two models: the rules that a learned confidence has to beat.

Every rule is a cascade of its own, a list of stages and how answers are kept, and so is swept like CLCNet's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.curve import (
    Bools,
    Curve,
    Floats,
    Keep,
    Stage,
    accuracy_at_deferral,
    area_under_deferral,
    oracle,
    resampled_sweeps,
    sweep,
)
from clcnet.cascade.deep_offset import can_have_offset, cross_fitted_offsets, with_deep_offset
from clcnet.cascade.selection import cheapest_at_accuracy
from clcnet.confidence import SIMPLE_CONFIDENCES

DEFERRAL_SHARES = (0.1, 0.2, 0.3, 0.5)
NUM_RULE_RESAMPLES = 400  # of every rule's curve; enough for an interval printed with two digits
_OFFSET_RIVALS = ("max softmax", "temperature-scaled softmax")  # what CLCNet may do, its nearest rivals may too
_TEMPERATURES = np.geomspace(0.2, 5, 21)  # neighbours differ by 17%, between which a parabola finds the best
_FIT_ROWS = 10_000  # spread over the table; one number needs no more
_CHUNK_NUMBERS = 1 << 20  # probabilities handled at once; bounds the memory


@dataclass(frozen=True)
class Rule:
    """A way to use the two models: its name, its stages, and which answer it keeps."""

    name: str
    stages: Sequence[Stage]
    keep: Keep = "surest"

    @cached_property
    def curve(self) -> Curve:
        """Over all distinct thresholds."""
        return sweep(self.stages, keep=self.keep)

    def at(self, share: float) -> float:
        """Accuracy in percent when this share of the images goes to the deep model."""
        return accuracy_at_deferral(self.curve, share)

    @property
    def area(self) -> float:
        """Mean accuracy over the whole range of FLOPs, from the shallow model alone to both models on every image."""
        return area_under_deferral(self.curve)

    def saving_at(self, accuracy: float, flops: float) -> float:
        """FLOPs of a single model over those that the rule needs for its accuracy; nan if it never gets there."""
        point = cheapest_at_accuracy(self.curve, accuracy)
        return math.nan if point is None else flops / float(self.curve.flops[point])


@dataclass(frozen=True)
class RuleSamples:
    """A rule's figures on B resamples of the images, the same ones for all rules.

    Attributes:
        at: share deferred -> (B,) accuracy in percent.
        area: (B,).
        saving: (B,), 0 where the rule does not get to the deep model's accuracy on the resample.
    """

    at: dict[float, Floats]
    area: Floats
    saving: Floats


def compare(
    stages: Sequence[Stage],
    sorted_probs: Sequence[NDArray[np.float32]],
    folds: NDArray[np.int64],
    average_correct: Bools | None = None,
) -> list[Rule]:
    """List CLCNet and every other rule over the same answers.

    Args:
        stages: the cascade with CLCNet's confidences, two models.
        sorted_probs: two (N, n) arrays.
        folds: (N,); temperatures and deep offsets are fitted on the other folds.
        average_correct: (N,) whether the average of both models' probabilities is right; where it is not known, the
            rules that use the average are left out.
    """
    shallow, deep = stages
    rules = [Rule("CLCNet", stages), *_offset_rules("CLCNet", stages, folds)]
    rules.append(Rule("CLCNet, deep answer always kept", stages, "last"))
    for name, scores in confidences(sorted_probs, [stage.correct for stage in stages], folds).items():
        rule = Rule(name, [_with(stage, scores[k]) for k, stage in enumerate(stages)])
        rules += [rule, *(_offset_rules(name, rule.stages, folds) if name in _OFFSET_RIVALS else [])]
    nothing_known = _with(shallow, np.zeros(len(shallow)))
    rules.append(Rule("random deferral", [nothing_known, deep], "last"))
    if average_correct is not None:
        average = Stage(deep.confidence, average_correct, deep.flops)
        rules.append(Rule("CLCNet, average answers", [shallow, average], "last"))
        rules.append(Rule("GEM, average answers random images", [nothing_known, average], "last"))
    rules.append(Rule("oracle", oracle(stages)))
    return rules


def _offset_rules(name: str, stages: Sequence[Stage], folds: NDArray[np.int64]) -> list[Rule]:
    """The same with a deep offset, where the confidences are probabilities."""
    if not can_have_offset(stages):
        return []
    return [Rule(f"{name}, deep offset", with_deep_offset(stages, cross_fitted_offsets(stages, folds)))]


def resample(rules: Sequence[Rule], deep: Stage, seed: int) -> list[RuleSamples]:
    """Bootstrap the figures of all rules over the same resamples, so that their differences are paired.

    Args:
        rules: over the same images; the first has `deep` as its last stage.
        deep: the model whose accuracy `saving` refers to.
        seed: of the draws.
    """
    targets = [single[-1] for _, single in resampled_sweeps(rules[0].stages, NUM_RULE_RESAMPLES, seed, thresholds=[0])]
    return [_resample_rule(rule, deep.flops, targets, seed) for rule in rules]


def _resample_rule(rule: Rule, deep_flops: float, targets: Sequence[float], seed: int) -> RuleSamples:
    shares = (*DEFERRAL_SHARES, 1.0)
    at, areas, savings = [], [], []
    curves = resampled_sweeps(rule.stages, len(targets), seed, keep=rule.keep)
    for (curve, _), target in zip(curves, targets, strict=True):
        at.append([accuracy_at_deferral(curve, share) for share in shares])
        areas.append(area_under_deferral(curve))
        point = cheapest_at_accuracy(curve, target)
        savings.append(0.0 if point is None else deep_flops / curve.flops[point])
    return RuleSamples(dict(zip(shares, np.array(at).T, strict=True)), np.array(areas), np.array(savings))


def confidences(
    sorted_probs: Sequence[NDArray[np.float32]], correct: Sequence[Bools], folds: NDArray[np.int64]
) -> dict[str, list[Floats]]:
    """The confidences without a network, by name; for each model, (N,)."""
    scores = {name: [score(probs) for probs in sorted_probs] for name, score in SIMPLE_CONFIDENCES.items()}
    scores["temperature-scaled softmax"] = [
        temperature_scaled(probs, right, folds) for probs, right in zip(sorted_probs, correct, strict=True)
    ]
    return scores


def average_is_correct(shallow: NDArray[np.float32], deep: NDArray[np.float32], targets: NDArray[np.int64]) -> Bools:
    """The paper's general ensemble (GEM), equal weights: (N,) whether the mean of both (N, C) softmaxes is right."""
    right: Bools = (shallow + deep).argmax(1) == targets
    return right


def temperature_scaled(sorted_probs: NDArray[np.float32], correct: Bools, folds: NDArray[np.int64]) -> Floats:
    """Top probability after temperature scaling (Guo et al., arXiv:1706.04599), fitted on the other folds: (N,).

    A table of sorted probabilities does not hold the probability of the right class, so the temperature maximises the
    likelihood of the top-1 answer being right or wrong instead of that of the class.
    """
    drawn = np.linspace(0, len(correct) - 1, min(len(correct), _FIT_ROWS)).astype(int)
    top = tempered_top(sorted_probs[drawn], _TEMPERATURES)  # (rows, T)
    losses = -np.log(np.clip(np.where(correct[drawn, None], top, 1 - top), 1e-7, 1))
    scaled = np.empty(len(sorted_probs))
    for fold in np.unique(folds):
        others = folds[drawn] != fold
        temperature = _lowest_point(np.log(_TEMPERATURES), losses[others if others.any() else slice(None)].mean(0))
        inside = folds == fold
        scaled[inside] = tempered_top(sorted_probs[inside], np.exp([temperature]))[:, 0]
    return scaled


def tempered_top(sorted_probs: NDArray[np.float32], temperatures: Floats) -> Floats:
    """Top probability of softmax(logits / T) for several T, from softmax(logits) alone: (N, T)."""
    rows = max(1, _CHUNK_NUMBERS // sorted_probs.shape[1])
    top = np.empty((len(sorted_probs), len(temperatures)))
    for start in range(0, len(sorted_probs), rows):
        chunk = sorted_probs[start : start + rows]
        with np.errstate(divide="ignore"):
            logits = np.log(chunk) - np.log(chunk[:, :1])  # 0 for the top class, -inf where the softmax underflowed
        for column, temperature in enumerate(temperatures):
            top[start : start + rows, column] = 1 / np.exp(logits / np.float32(temperature)).sum(1)
    return top


def _lowest_point(x: Floats, y: Floats) -> float:
    """Where the parabola through the lowest of equally spaced points and its neighbours is lowest."""
    k = int(y.argmin())
    if k in (0, len(x) - 1):
        return float(x[k])
    left, middle, right = y[k - 1 : k + 2]
    curvature = left - 2 * middle + right
    return float(x[k] + (0.5 * (left - right) / curvature * (x[1] - x[0]) if curvature > 0 else 0.0))


def _with(stage: Stage, confidence: Floats) -> Stage:
    return Stage(confidence, stage.correct, stage.flops)
