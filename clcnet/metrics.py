"""How good a confidence is at telling right answers from wrong ones: numbers from two arrays.

Every function takes `confidence` (N,), on any scale where higher means surer, and `correct` (N,), True where the answer
is right. Equal confidences are given the mean over all orders in which they could stand, so no result depends on the
order of the rows. NaN, an empty array and arrays of different length are a ValueError; a figure that the data leave
undefined is nan.

`brier`, `log_loss` and `calibration_error` read the confidence as the probability of a right answer; the last two are
nan for scores outside [0, 1]. scikit-learn has AUROC, Brier and log-loss but no risk-coverage figure; the tests compare
with it where they can.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

NUM_BINS = 15  # of the calibration error, as in Guo et al.
RISK_LEVELS = (0.01, 0.02, 0.05)  # at which `summary` gives the coverage


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Chance that a right answer is surer than a wrong one, equal ones counting half; nan if all or none are right."""
    scores, right = _check(confidence, correct)
    num_right = int(right.sum())
    num_wrong = len(right) - num_right
    if not num_right or not num_wrong:
        return float("nan")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2  # 1-based, shared by the equal ones
    return float((mean_rank[group][right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Share of the images answered, rising to 1, and of wrong ones among them, at each distinct confidence: (D,)."""
    num_answered, num_wrong = _answered_and_wrong(*_check(confidence, correct))
    return num_answered / num_answered[-1], num_wrong / num_answered


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean over k = 1..N of the risk among the k surest (arXiv:1705.08500)."""
    num_answered, num_wrong = _answered_and_wrong(*_check(confidence, correct))
    k = np.arange(1, num_answered[-1] + 1)
    return float((np.interp(k, np.append(0, num_answered), np.append(0, num_wrong)) / k).mean())


def e_aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Excess AURC: above that of an order with all right answers first (Geifman et al., arXiv:1805.08206)."""
    _, right = _check(confidence, correct)
    return aurc(confidence, correct) - aurc(right, right)


def augrc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve: wrong answers given over all images (arXiv:2407.01032)."""
    num_answered, num_wrong = _answered_and_wrong(*_check(confidence, correct))
    num_images = num_answered[-1]
    return float(np.trapezoid(np.append(0, num_wrong), np.append(0, num_answered)) / num_images**2)


def coverage_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """Largest share of the images that one threshold can answer with at most this share wrong; 0 if none can."""
    coverage, risks = risk_coverage_curve(confidence, correct)
    allowed = risks <= risk
    return float(coverage[allowed][-1]) if allowed.any() else 0.0


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared distance between the confidence and what happened (1 right, 0 wrong)."""
    scores, right = _check(confidence, correct)
    return float(np.square(scores - right).mean())


def log_loss(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean negative log-likelihood of what happened; 0 and 1 are moved off by what float32 can just tell from 1."""
    scores, right = _check(confidence, correct)
    if not _are_probabilities(scores):
        return float("nan")
    tiny = np.finfo(np.float32).eps
    scores = np.clip(scores, tiny, 1 - tiny)
    return float(-np.log(np.where(right, scores, 1 - scores)).mean())


def calibration_bins(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> tuple[Ints, Floats, Floats]:
    """Sort the images into bins of equal width over [0, 1], each closed above, the first also below.

    Returns:
        Images in a bin, their mean confidence and share of right answers, nan where it is empty: (num_bins,) each.
    """
    scores, right = _check(confidence, correct)
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.searchsorted(edges[1:-1], scores, side="left")
    counts = np.bincount(bins, minlength=num_bins)
    filled = np.where(counts > 0, counts, np.nan)
    mean_confidence = np.bincount(bins, weights=scores, minlength=num_bins) / filled
    accuracy = np.bincount(bins, weights=right, minlength=num_bins) / filled
    return counts, mean_confidence, accuracy


def calibration_error(confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error over bins of equal width (Guo et al., arXiv:1706.04599)."""
    scores, _ = _check(confidence, correct)
    if not _are_probabilities(scores):
        return float("nan")
    counts, mean_confidence, accuracy = calibration_bins(confidence, correct, num_bins)
    filled = counts > 0
    return float((counts[filled] * np.abs(mean_confidence - accuracy)[filled]).sum() / len(scores))


def summary(confidence: ArrayLike, correct: ArrayLike) -> dict[str, float]:
    """All figures of this module for one confidence, by name, in the order of the printed tables."""
    figures = {one.__name__: one(confidence, correct) for one in (auroc, aurc, e_aurc, augrc)}
    figures |= {f"coverage_at_{risk:.0%}_risk": coverage_at_risk(confidence, correct, risk) for risk in RISK_LEVELS}
    return figures | {one.__name__: one(confidence, correct) for one in (brier, log_loss, calibration_error)}


def _check(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Bools]:
    scores = np.asarray(confidence, dtype=np.float64)
    labels = np.asarray(correct)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"confidence and correct must be lists of one length, got {scores.shape} and {labels.shape}")
    if not len(scores):
        raise ValueError("confidence is empty: there is nothing to measure")
    if np.isnan(scores).any():
        raise ValueError(f"confidence[{int(np.isnan(scores).argmax())}] is NaN")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"correct must hold 0 and 1 only, got {labels[~np.isin(labels, (0, 1))][0]}")
    return scores, labels.astype(bool)


def _answered_and_wrong(scores: Floats, right: Bools) -> tuple[Ints, Ints]:
    """Images at or above each distinct confidence, highest first, and the wrong ones among them: two (D,) counts."""
    _, group = np.unique(-scores, return_inverse=True)
    num_answered = np.cumsum(np.bincount(group))
    num_wrong = np.cumsum(np.bincount(group, weights=~right)).astype(np.int64)
    return num_answered, num_wrong


def _are_probabilities(scores: Floats) -> bool:
    return bool(scores.min() >= 0 and scores.max() <= 1)


def format_flops(flops: float) -> str:
    """0.39 -> `0.39B`, 18.5764 -> `18.58B`, 0.0041 -> `4.1M`."""
    return f"{flops:.4g}B" if flops >= 0.1 else f"{1000 * flops:.4g}M"
