"""The rules: from the outputs of the models seen so far to the answer that stands, and how sure it is.

`Surest` is the paper's. It goes by a confidence in each model's own answer, one of those in `clcnet/confidence.py`:
CLCNet's, one of the one-line scores, or the top probability of a tempered softmax.

A new rule is a class here, entered in `RULES` and, to stand in the tables, in `compared`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from clcnet.cascade.curve import Steps
from clcnet.cascade.pool import (
    PENALTIES,
    CrossFit,
    Pool,
    check_same,
    folds_of_classes,
    rows_of,
    simplest_of_best,
    standing,
)
from clcnet.confidence import (
    CHANCE,
    CLCNET,
    SIMPLE_CONFIDENCES,
    TEMPERED,
    Network,
    can_judge,
    confidence_of,
    fit_temperatures,
    tempered_top,
)
from clcnet.data.images import NUM_FOLDS
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.metrics import Bools, Floats, Ints, aurc

BEST = "best"  # of the one-line confidences


@dataclass(frozen=True)
class Step:
    """What stands for N images after some models have spoken."""

    confidence: Floats  # (N,) how sure the answer is; below a threshold the image goes on
    labels: Ints | None  # (N,) the class that stands; None where the outputs do not know classes
    correct: Bools | None  # (N,) whether it is right; None where that is not known
    answered_by: Ints  # (N,) the model whose answer stands; of an answer made of several, the last one asked
    own: Floats | None = None  # (N,) how sure the last model asked is of its own answer, where the rule goes by that


@dataclass(frozen=True)
class Rule(ABC):
    """A way to use several models: `step` says what stands after the first k of them, for any k.

    Its fields, numbers and text, are what it has been fitted to.
    """

    name: ClassVar[str]
    needs_classes: ClassVar[bool] = False  # whose probability is which; tables of the specification do not say
    confidence: str
    network: Network | None = field(default=None, repr=False, compare=False, kw_only=True)  # CLCNet, if it is to judge

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

    def to_json(self) -> dict[str, Any]:
        """Name and fitted numbers, for `rule_from_json`; of a network a policy keeps the file."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "network"}
        return {"name": self.name} | {key: value for key, value in fields.items() if value != ()}

    @classmethod
    def from_json(cls, fields: dict[str, Any], network: Network | None = None) -> Self:
        """The rule that `to_json` described; a network is not part of that and is passed in."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items() if key != "name"
        }
        return cls(**values, network=network)


@dataclass(frozen=True)
class Surest(Rule):
    """The paper's rule: the surest answer stands, the earlier one of two that are equally sure."""

    name = "surest"
    confidence: str = CLCNET  # or a name in SIMPLE_CONFIDENCES, TEMPERED, or CHANCE, which knows nothing
    temperatures: tuple[float, ...] = ()  # of each model, where the confidence is TEMPERED

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
        # the same rule stands in curve.py, swept over thresholds, and in export.py, on tensors
        confidence = self.confidences(outputs)
        answered_by = confidence.argmax(axis=0)  # the first of equals

        def of_the_surest(columns: Sequence[np.ndarray | None]) -> Any:
            given = [column for column in columns if column is not None]
            return np.take_along_axis(np.stack(given), answered_by[None], 0)[0] if len(given) == len(columns) else None

        labels = of_the_surest([None if each.classes is None else each.labels for each in outputs])
        correct = of_the_surest([each.correct for each in outputs])
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


@dataclass(frozen=True)
class Fused(Rule):
    """The pool of the models asked so far answers, and its own confidence defers.

    Attributes:
        confidence: a name of `SIMPLE_CONFIDENCES`, `BEST` for the one that cross-validates best in `fit` (of those that
            do equally well, the simplest), or CLCNET.
        offsets: False for a pool without b.
        pools: of the first 1, 2, ..., K models, once fitted.
    """

    name = "fused"
    needs_classes = True
    confidence: str = "max softmax"
    offsets: bool = True
    pools: tuple[Pool, ...] = ()

    def fit(self, outputs: Sequence[Outputs]) -> Self:
        """Fit the pools of the first 1, 2, ..., K models on the images whose targets are known."""
        rows = rows_of(outputs)
        labelled = np.flatnonzero(rows.positions != UNKNOWN)
        if not len(labelled):
            raise ValueError("fused answers are fitted on images whose classes are known; make the tables as .parquet")
        folds = folds_of_classes(rows.targets[labelled], min(NUM_FOLDS, len(labelled)))
        penalties = PENALTIES if self.offsets else (None,)
        fits = [CrossFit(rows.take(range(k + 1), labelled), folds, penalties) for k in range(len(outputs))]
        confidence = self._best_confidence(fits) if self.confidence == BEST else self.confidence
        return dataclasses.replace(self, confidence=confidence, pools=tuple(fit.pool() for fit in fits))

    def _best_confidence(self, fits: Sequence[CrossFit]) -> str:
        names = list(SIMPLE_CONFIDENCES)
        if len(fits[0].numbers) < 2:
            return names[0]
        pools = [(fit, fit.choice()) for fit in fits]
        losses = [
            [
                sum(aurc(*standing(fit.paths[frozenset({fold})][at], fit.parts[fold], name)) for fit, at in pools)
                for fold in fits[0].numbers
            ]
            for name in names
        ]
        return names[simplest_of_best(np.array(losses))]

    def is_fitted_for(self, num_models: int) -> bool:
        sizes = {pool.offsets.shape for pool in self.pools if pool.offsets is not None}
        fitted = [pool.weights.shape for pool in self.pools] == [(count,) for count in range(1, num_models + 1)]
        finite = all(np.isfinite(pool.weights).all() for pool in self.pools)
        same = len(sizes) < 2 and all(len(size) == 1 for size in sizes)
        return can_judge(self.confidence, self.network) and fitted and finite and same

    def step(self, outputs: Sequence[Outputs]) -> Step:
        if not 1 <= len(outputs) <= len(self.pools):
            raise ValueError(f"the fused rule was fitted for 1 to {len(self.pools)} models, got {len(outputs)}")
        check_same(outputs)
        pool = self.pools[len(outputs) - 1]
        if pool.offsets is not None and len(pool.offsets) != outputs[0].num_classes:
            raise ValueError(
                f"the fused rule was fitted for {len(pool.offsets)} classes, got {outputs[0].num_classes}; fit it again"
            )
        sorted_probs, labels = pool.sorted(outputs)
        confidence = confidence_of(self.confidence, sorted_probs, self.network)
        answered_by = np.full(len(labels), len(outputs) - 1)
        return Step(confidence, labels, labels_correct(labels, outputs[0]), answered_by)

    def to_json(self) -> dict[str, Any]:
        pools = [
            {name: None if array is None else array.tolist() for name, array in vars(pool).items()}
            for pool in self.pools
        ]
        return super().to_json() | {"pools": pools}

    @classmethod
    def from_json(cls, fields: dict[str, Any], network: Network | None = None) -> Self:
        def array(numbers: list[float] | None) -> Any:
            return None if numbers is None else np.array(numbers, np.float64)

        pools = tuple(Pool(np.array(pool["weights"], np.float64), array(pool["offsets"])) for pool in fields["pools"])
        return cls(fields["confidence"], fields["offsets"], pools, network=network)


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
    filled = np.empty((3, len(outputs), len(folds)))
    for fold in np.unique(folds):
        inside = folds == fold
        fitted = rule.fit([each.subset(~inside) for each in outputs])
        part = steps_of(fitted, [each.subset(inside) for each in outputs])
        filled[:, :, inside] = part.confidence, part.correct, part.own
    confidence, correct, own = filled
    return Steps(confidence, correct, part.flops, own)


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
