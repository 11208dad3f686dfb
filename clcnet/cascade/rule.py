"""What a rule is: from the outputs of the models seen so far to the answer that stands, and how sure it is.

`Surest` is the paper's. It goes by a confidence in each model's own answer, one of those in `clcnet/confidence.py`:
CLCNet's, one of the one-line scores, or the top probability of a tempered softmax.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from clcnet.confidence import (
    CHANCE,
    CLCNET,
    TEMPERED,
    Network,
    can_judge,
    confidence_of,
    fit_temperatures,
    tempered_top,
)
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.metrics import Bools, Floats, Ints


@dataclass(frozen=True)
class Step:
    """What stands for N images after some models have spoken."""

    confidence: Floats  # (N,) how sure the answer is; below a threshold the image goes on
    labels: Ints | None  # (N,) the class that stands; None where the outputs do not know classes
    correct: Bools | None  # (N,) whether it is right; None where that is not known
    answered_by: Ints  # (N,) the model whose answer stands; of an answer made of several, the last one asked
    own: Floats | None = None  # (N,) how sure the last model asked is of its own answer, where the rule goes by that


class Rule(ABC):
    """A way to use several models: `step` says what stands after the first k of them, for any k.

    A rule is a frozen dataclass whose fields, numbers and text, are what it has been fitted to.
    """

    name: ClassVar[str]
    needs_classes: ClassVar[bool] = False  # whose probability is which; tables of the specification do not say

    def applies_to(self, outputs: Sequence[Outputs]) -> bool:
        """Whether the rule can be used, and measured, on outputs like these."""
        return not self.needs_classes or know_classes(outputs)

    def learns(self, outputs: Sequence[Outputs]) -> bool:
        """Whether `fit` would find anything in outputs like these."""
        return True

    @abstractmethod
    def fit(self, outputs: Sequence[Outputs]) -> Self:
        """The same rule fitted to labelled images; itself where nothing is to be fitted."""

    @abstractmethod
    def is_fitted_for(self, num_models: int) -> bool:
        """Whether its fields are whole and those of a rule over so many models: they may come from a stranger."""

    @abstractmethod
    def step(self, outputs: Sequence[Outputs]) -> Step:
        """Say what stands when these models, in their order, have spoken about the same images."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Name and fitted numbers, for `from_json`."""

    @classmethod
    @abstractmethod
    def from_json(cls, fields: dict[str, Any], network: Network | None = None) -> Self:
        """The rule that `to_json` described; a network is not part of that and is passed in."""


@dataclass(frozen=True)
class Surest(Rule):
    """The paper's rule: the surest answer stands, the earlier one of two that are equally sure."""

    name = "surest"
    confidence: str = CLCNET  # or a name in SIMPLE_CONFIDENCES, TEMPERED, or CHANCE, which knows nothing
    temperatures: tuple[float, ...] = ()  # of each model, where the confidence is TEMPERED
    network: Network | None = field(default=None, repr=False, compare=False)  # CLCNet, if it is to judge

    def applies_to(self, outputs: Sequence[Outputs]) -> bool:
        asks = self.confidence == CLCNET and self.network is None
        return super().applies_to(outputs) and not (asks and any(CLCNET not in each.scores for each in outputs))

    def fit(self, outputs: Sequence[Outputs]) -> Self:
        if not self.learns(outputs):
            return self
        fitted = [float(fit_temperatures(each.sorted_probs, known(each.correct, each))[0]) for each in outputs]
        return dataclasses.replace(self, temperatures=tuple(fitted))

    def learns(self, outputs: Sequence[Outputs]) -> bool:
        return self.confidence == TEMPERED and not all(TEMPERED in each.scores for each in outputs)

    def is_fitted_for(self, num_models: int) -> bool:
        judged = self.confidence in (TEMPERED, CHANCE) or can_judge(self.confidence, self.network)
        temperatures = num_models if self.confidence == TEMPERED else 0
        return judged and len(self.temperatures) == temperatures and all(each > 0 for each in self.temperatures)

    def step(self, outputs: Sequence[Outputs]) -> Step:
        confidence = self.confidences(outputs)
        answered_by = confidence.argmax(axis=0)  # the first of equals

        def standing(columns: Sequence[np.ndarray | None]) -> Any:
            known = [column for column in columns if column is not None]
            return np.take_along_axis(np.stack(known), answered_by[None], 0)[0] if len(known) == len(columns) else None

        labels = standing([None if each.classes is None else each.labels for each in outputs])
        correct = standing([each.correct for each in outputs])
        return Step(confidence.max(axis=0), labels, correct, answered_by, confidence[-1])

    def confidences(self, outputs: Sequence[Outputs]) -> Floats:
        """How sure each model's own answer is: (k, N)."""
        return np.stack([self._confidence(place, each) for place, each in enumerate(outputs)])

    def _confidence(self, place: int, outputs: Outputs) -> Floats:
        if self.confidence in outputs.scores:
            return outputs.scores[self.confidence]
        if self.confidence == CHANCE:
            return np.zeros(len(outputs))
        if self.confidence == TEMPERED:
            return tempered_top(outputs.sorted_probs, np.array([self.temperatures[place]]))[:, 0]
        return confidence_of(self.confidence, outputs.sorted_probs, self.network)

    def to_json(self) -> dict[str, Any]:
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "network"}
        return {"name": self.name} | {key: value for key, value in fields.items() if value != ()}

    @classmethod
    def from_json(cls, fields: dict[str, Any], network: Network | None = None) -> Self:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items() if key != "name"
        }
        return cls(**values, network=network)


def know_classes(outputs: Sequence[Outputs]) -> bool:
    """Whether a rule over classes can be used on these outputs and scored: a CSV table holds too little.

    Models may also number their classes differently.
    """
    targets = [each.targets for each in outputs if each.classes is not None and each.targets is not None]
    same = all(np.array_equal(targets[0], others) for others in targets)
    return len(targets) == len(outputs) and same and UNKNOWN not in targets[0]


def known(correct: Bools | None, outputs: Outputs) -> Bools:
    """Which answers are right, where that is known; else a `ValueError`."""
    if correct is None:
        raise ValueError(f"nothing says which answers of {outputs.record.model or 'a model'} are right")
    return correct


def labels_correct(labels: Ints, outputs: Outputs) -> Bools | None:
    """Whether these classes are the images' own; None where those are not known."""
    return None if outputs.targets is None or UNKNOWN in outputs.targets else labels == outputs.targets
