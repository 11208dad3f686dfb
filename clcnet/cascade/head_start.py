"""A head start for later models: a number, in log-odds, added to their confidence before answers are compared.

The paper keeps the deep answer where c_d > c_s (arXiv:2205.09612). Both confidences may be calibrated and the rule
still lose right answers: it matters only where the models disagree, and there the better model is right more often than
the confidences, each from one model's output alone, can say. A start of 0 is the paper's rule, a very large one always
keeps the deep answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from clcnet.cascade.curve import Bools, Floats
from clcnet.cascade.rule import Step, Surest, know_classes, known, surest
from clcnet.data.outputs import Outputs

_SUREST = 1 - 2.0**-24  # float32 knows none between this and 1; the logit of 1 itself is infinite


@dataclass(frozen=True)
class HeadStart(Surest):
    """The surest answer stands, after each later model's confidence was moved in log-odds.

    Where classes are known, fused answers do more with less; there the rule is not compared.

    Attributes:
        starts: in log-odds, of each model after the first.
    """

    name = "head start"
    starts: tuple[float, ...] = ()

    def applies_to(self, outputs: Sequence[Outputs]) -> bool:
        return (
            super().applies_to(outputs) and not know_classes(outputs) and are_probabilities(self.confidences(outputs))
        )

    def learns(self, outputs: Sequence[Outputs]) -> bool:
        return True

    def fit(self, outputs: Sequence[Outputs]) -> Self:
        fitted = super().fit(outputs)
        confidence, correct = fitted.confidences(outputs), np.stack([known(each.correct, each) for each in outputs])
        starts: list[float] = []
        sure, right = confidence[0], correct[0]
        for own, own_right in zip(confidence[1:], correct[1:], strict=True):
            starts.append(fit_head_start(sure, right, own, own_right))
            own = shifted(own, starts[-1])
            right = np.where(own > sure, own_right, right)
            sure = np.maximum(sure, own)
        return dataclasses.replace(fitted, starts=tuple(starts))

    def is_fitted_for(self, num_models: int) -> bool:
        starts = len(self.starts) == num_models - 1 and all(isinstance(start, int | float) for start in self.starts)
        return starts and super().is_fitted_for(num_models)

    def step(self, outputs: Sequence[Outputs]) -> Step:
        confidence = self.confidences(outputs)
        moved = [shifted(own, start) for own, start in zip(confidence[1:], self.starts, strict=False)]
        return surest(outputs, np.stack([confidence[0], *moved]))


def shifted(confidence: NDArray[np.floating], start: float) -> Floats:
    """Confidences moved by a number of log-odds.

    Raises:
        ValueError: they are no probabilities.
    """
    if not are_probabilities(confidence):
        raise ValueError(
            "a head start needs confidences from 0 to 1, and these weights give others; use weights that are "
            "calibrated, as the default recipe trains them"
        )
    return np.asarray(expit(_log_odds(confidence) + start) if start else confidence, dtype=np.float64)


def fit_head_start(shallow: Floats, shallow_correct: Bools, deep: Floats, deep_correct: Bools) -> float:
    """The start under which the surer answer is the right one, as often as can be.

    Only images that exactly one of the two gets right can tell. A logistic regression finds from the difference of the
    log-odds which it is; the start lies where it would toss a coin.

    Returns:
        The start; 0 where the images cannot tell.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second, and running a cascade fits nothing

    telling = shallow_correct != deep_correct
    deep_is_right = deep_correct[telling]
    if len(np.unique(deep_is_right)) < 2:
        return 0.0
    difference = (_log_odds(deep) - _log_odds(shallow))[telling]
    fitted = LogisticRegression().fit(difference[:, None], deep_is_right)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return intercept / slope if slope > 0 else 0.0


def are_probabilities(confidence: NDArray[np.floating]) -> bool:
    """Whether all lie in [0, 1], as those of released weights do not."""
    return bool(((confidence >= 0) & (confidence <= 1)).all())


def _log_odds(confidence: NDArray[np.floating]) -> Floats:
    return np.asarray(logit(np.clip(confidence, 1 - _SUREST, _SUREST)), dtype=np.float64)
