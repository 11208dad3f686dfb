"""A head start for the deep model: a number, in log-odds, added to its confidence before the two answers are compared.

The paper keeps the deep answer where c_d > c_s (arXiv:2205.09612). Both confidences may be calibrated and the rule
still lose right answers: it matters only where the models disagree, and there the better model is right more often than
the confidences, each from one model's output alone, can say. So the deep answer is kept where logit(c_d) + offset >
logit(c_s). An offset of 0 is the paper's rule, a very large one always keeps the deep answer. Only the deep model's
confidence moves, and by a rising function, so a cascade with an offset is a cascade like any other: `with_deep_offset`
gives its stages.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from clcnet.cascade.curve import Floats, Stage

_SUREST = 1 - 2.0**-24  # float32 knows none between this and 1; the logit of 1 itself is infinite


def shifted(confidence: NDArray[np.floating], offset: float | Floats) -> Floats:
    """Confidences (N,) moved by an offset in log-odds; -inf, of an answer that was not asked for, stays.

    Raises:
        ValueError: they are no probabilities.
    """
    _check(confidence)
    moves = np.isfinite(confidence) & (np.asarray(offset) != 0)  # what does not move keeps its last bit
    return np.where(moves, expit(_log_odds(np.where(moves, confidence, 0.5)) + offset), confidence)


def with_deep_offset(stages: Sequence[Stage], offset: float | Floats) -> list[Stage]:
    """The same two models, the deep one with its offset: one number, or one for each image, (N,).

    Raises:
        ValueError: the confidences are no probabilities, as those of released weights.
    """
    shallow, deep = stages
    _check(shallow.confidence)
    return [shallow, Stage(shifted(deep.confidence, offset), deep.correct, deep.flops)]


def fit_deep_offset(stages: Sequence[Stage]) -> float:
    """The offset under which the surer answer is the right one, as often as can be.

    Only images that exactly one of the two models gets right can tell. A logistic regression finds from the difference
    of the log-odds which model it is; the offset lies where it would toss a coin.

    Returns:
        The offset; 0 where the images cannot tell.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second, and running a cascade fits nothing

    shallow, deep = stages
    for stage in stages:
        _check(stage.confidence)
    telling = shallow.correct != deep.correct
    deep_is_right = deep.correct[telling]
    if len(np.unique(deep_is_right)) < 2:
        return 0.0
    difference = (_log_odds(deep.confidence) - _log_odds(shallow.confidence))[telling]
    fitted = LogisticRegression().fit(difference[:, None], deep_is_right)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return intercept / slope if slope > 0 else 0.0


def cross_fitted_offsets(stages: Sequence[Stage], folds: NDArray[np.int64]) -> Floats:
    """An offset for each image, fitted on the images of the other folds alone: (N,)."""
    offsets = np.empty(len(folds))
    for fold in np.unique(folds):
        others = folds != fold
        offsets[~others] = fit_deep_offset([stage.subset(others) for stage in stages])
    return offsets


def can_have_offset(stages: Sequence[Stage]) -> bool:
    """Whether all confidences are probabilities, as those of released weights are not."""
    return all(are_probabilities(stage.confidence) for stage in stages)


def are_probabilities(confidence: NDArray[np.floating]) -> bool:
    """Whether all lie in [0, 1], -inf of an answer that was not asked for aside."""
    return bool((((confidence >= 0) & (confidence <= 1)) | np.isneginf(confidence)).all())


def _check(confidence: NDArray[np.floating]) -> None:
    if not are_probabilities(confidence):
        raise ValueError(
            "a deep offset needs confidences from 0 to 1, and these weights give others; use weights that are "
            "calibrated, as the default recipe trains them, or leave the offset at 0"
        )


def _log_odds(confidence: NDArray[np.floating]) -> Floats:
    return np.asarray(logit(np.clip(confidence, 1 - _SUREST, _SUREST)), dtype=np.float64)
