"""Promises that hold with a probability, on images that nothing else was fitted on: array functions.

What a cascade loses is tested by betting (arXiv:2010.09686): a capital that can hardly grow unless the loss is below
what is promised. Thresholds are walked in an order fixed beforehand, from the safe end, up to the first one that fails:
then all that passed hold together (fixed-sequence testing, arXiv:2110.01052). Shares are bounded exactly. Everything
assumes images like these: drawn at random from those to come.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clcnet.intervals import exact_interval
from clcnet.metrics import Bools, Floats

PRIOR_VARIANCE = 0.04  # that of 2% won and 2% lost; counts as one image's
PROMISES = np.arange(1, 200) / 1000  # what could be promised is looked for in steps of 0.1 points


def log_capital(differences: ArrayLike, eps: float, delta: float) -> Floats:
    """The logarithm of the highest capital of bets that the mean difference is below eps.

    Args:
        differences: (..., N) from -1 to 1, in random order: deep right less cascade right.
        eps: a fraction; were the mean eps or more, the capital would reach 1 / delta with probability delta at most.
        delta: sets the stakes.

    Returns:
        (...,).
    """
    given = np.asarray(differences, dtype=np.float64)
    size = given.shape[-1]
    seen = np.arange(2, size + 2)
    squares = (given - np.cumsum(given, axis=-1) / seen) ** 2
    variance = np.full(given.shape, PRIOR_VARIANCE)  # before each image
    variance[..., 1:] = (PRIOR_VARIANCE + np.cumsum(squares[..., :-1], axis=-1)) / seen[:-1]
    stakes = np.minimum(np.sqrt(2 * np.log(1 / delta) / (size * variance)), 0.5 / (1 - eps))
    growth = np.cumsum(np.log1p(stakes * (eps - given)), axis=-1)
    return np.asarray(growth.max(axis=-1))


def loses_less(differences: ArrayLike, eps: float, delta: float) -> Bools:
    """Whether a mean difference below eps is certified at 1 - delta, of differences (..., N) in random order."""
    return np.asarray(log_capital(differences, eps, delta) >= np.log(1 / delta))


def passed(results: Iterable[bool]) -> int:
    """How many pass before the first that fails; of lazy results no more are asked for."""
    count = 0
    for result in results:
        if not result:
            break
        count += 1
    return count


def shuffled(num_images: int) -> NDArray[np.int64]:
    """A fixed random order: files come class by class, and bets are made one image after the other."""
    return np.random.default_rng(0).permutation(num_images)


def certify(deep_right: Bools, cascade_right_by_threshold: Iterable[Bools], eps: float, delta: float) -> int:
    """How many of the thresholds, in their order, lose less than eps against the deep model, certified at 1 - delta.

    Args:
        deep_right: (N,) whether the model is right that is to be held against.
        cascade_right_by_threshold: (N,) each, in an order fixed without these images, the safest first.
        eps: a fraction of the images.
        delta: probability that any of those counted loses eps or more.
    """
    order = shuffled(len(deep_right))
    deep = deep_right[order].astype(np.int8)
    return passed(bool(loses_less(deep - right[order], eps, delta)) for right in cascade_right_by_threshold)


def could_promise(deep_right: Bools, cascade_right: Bools, delta: float) -> float:
    """The least loss, in points, that these images certify of one cascade; NaN where it would be 20 or more."""
    order = shuffled(len(deep_right))
    differences = deep_right[order].astype(np.int8) - cascade_right[order]
    return next((float(100 * eps) for eps in PROMISES if loses_less(differences, float(eps), delta)), np.nan)


def most_share(count: ArrayLike, num_images: ArrayLike, delta: float) -> Floats:
    """Clopper and Pearson's upper bound of a share, which holds with probability 1 - delta; 1 of no images."""
    _, high = exact_interval(count, num_images, 1 - 2 * delta)
    return high / 100


def most_cost(last: NDArray[np.int64], costs: ArrayLike, delta: float) -> float:
    """An upper bound of a cascade's mean cost, from the last model (N,) that saw each image and models' costs (K,)."""
    each = np.asarray(costs, dtype=np.float64)
    later = len(each) - 1
    shares = most_share([(last > k).sum() for k in range(later)], len(last), delta / max(later, 1))
    return float(each[0] + each[1:] @ shares)


def certify_risk(confidence: ArrayLike, right: Bools, thresholds: Iterable[float], risk: float, delta: float) -> int:
    """How many of the thresholds, falling, answer with a share of errors of at most `risk`, certified at 1 - delta.

    Args:
        confidence: (N,) of the final answers; below a threshold the answer is "unsure".
        right: (N,) whether they are right.
        thresholds: fixed without these images.
        risk: fraction of the images that are answered.
        delta: probability that any of those counted errs more often.
    """
    sure = np.asarray(confidence)
    answered = (sure >= threshold for threshold in thresholds)
    return passed(bool(most_share((~right & kept).sum(), kept.sum(), delta) <= risk) for kept in answered)
