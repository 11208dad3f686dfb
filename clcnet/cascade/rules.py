"""All rules by name, those that the tables compare, and how a rule becomes `Steps` for a curve.

A new rule is a class of its own (`clcnet.cascade.rule`), entered in `RULES` and, to stand in the tables, in `compared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from clcnet.cascade.curve import Steps
from clcnet.cascade.fused import Fused
from clcnet.cascade.rule import Rule, Step, Surest, known, labels_correct
from clcnet.confidence import CHANCE, CLCNET, SIMPLE_CONFIDENCES, TEMPERED, Network
from clcnet.data.outputs import Outputs
from clcnet.metrics import Ints


@dataclass(frozen=True)
class Last(Surest):
    """The answer of the last model asked stands, as sure as it is itself."""

    name = "last"

    def step(self, outputs: Sequence[Outputs]) -> Step:
        place, last = len(outputs) - 1, outputs[-1]
        labels = None if last.classes is None else last.labels
        return Step(self._confidence(place, last), labels, last.correct, np.full(len(last), place))


@dataclass(frozen=True)
class Average(Surest):
    """The class with the highest mean probability stands: the paper's general ensemble (GEM), equal weights.

    It is as sure as the models are on average.
    """

    name = "average"
    needs_classes = True

    def step(self, outputs: Sequence[Outputs]) -> Step:
        total = outputs[0].probs
        for each in outputs[1:]:
            total += each.probs
        labels = total.argmax(axis=1)
        answered_by = np.full(len(labels), len(outputs) - 1)
        sureness = self.confidences(outputs).mean(axis=0)
        return Step(sureness, labels, labels_correct(labels, outputs[-1]), answered_by)


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Surest, Last, Average, Fused)}


class Compared(NamedTuple):
    """A line of the comparison: its label, the rule, and which of the models it is over."""

    label: str
    rule: Rule
    models: slice = slice(None)


def compared() -> list[Compared]:
    """All that the tables compare; CLCNet's own rule comes first, the others are measured against it."""
    return [
        Compared(CLCNET, Surest(CLCNET)),
        Compared(f"{CLCNET}, deep answer always kept", Last(CLCNET)),
        *(Compared(name, Surest(name)) for name in (*SIMPLE_CONFIDENCES, TEMPERED)),
        Compared("random deferral", Last(CHANCE)),
        Compared(f"{CLCNET}, average answers", Average(CLCNET)),
        Compared("GEM, average answers random images", Average(CHANCE)),
        Compared(Fused.name, Fused()),
        Compared("corrected shallow", Fused(), slice(0, 1)),
        Compared("corrected deep", Fused(), slice(-1, None)),
    ]


def rule_from_json(fields: dict[str, Any], network: Network | None = None) -> Rule:
    """The rule that `to_json` described.

    Raises:
        ValueError: no rule has this name, or its fields are others.
    """
    try:
        return RULES[fields["name"]].from_json(fields, network)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"no rule can be made of {short(fields)} ({error}); the rules are {', '.join(RULES)}"
        ) from None


def steps_of(rule: Rule, outputs: Sequence[Outputs]) -> Steps:
    """What stands after each model, and what each costs by its record, for scoring.

    Raises:
        ValueError: it is not known which answers are right, or what a model costs.
    """
    free = [each.record.model or "a model" for each in outputs if each.record.flops is None]
    if free:
        raise ValueError(f"nothing says what {free[0]} costs; give its FLOPs")
    flops = np.array([each.record.flops for each in outputs], dtype=np.float64)
    own = [known(each.correct, each) for each in outputs]
    steps = [rule.step(outputs[:count]) for count in range(1, len(outputs) + 1)]
    correct = [known(step.correct, each) for step, each in zip(steps, outputs, strict=True)]
    return Steps(np.stack([step.confidence for step in steps]), correct, flops, own)


def cross_fitted(rule: Rule, outputs: Sequence[Outputs], folds: Ints) -> Steps:
    """The same where each fold's images are answered by the rule fitted on the other folds."""
    if not rule.learns(outputs):
        return steps_of(rule, outputs)
    order, parts = [], []
    for fold in np.unique(folds):
        inside = folds == fold
        fitted = rule.fit([each.subset(~inside) for each in outputs])
        parts.append(steps_of(fitted, [each.subset(inside) for each in outputs]))
        order.append(np.flatnonzero(inside))
    back = np.argsort(np.concatenate(order))
    confidence, correct, own = (
        np.concatenate([getattr(part, name) for part in parts], axis=1)[:, back]
        for name in ("confidence", "correct", "own")
    )
    return Steps(confidence, correct, parts[0].flops, own)
