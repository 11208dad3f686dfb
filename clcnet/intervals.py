"""How far to trust a figure: 95% intervals over images, exact where a formula exists, by the bootstrap elsewhere."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from clcnet.metrics import Floats

Interval = tuple[float, float]

LEVEL = 0.95
NUM_RESAMPLES = 10_000  # of a fixed decision: one multinomial draw each
NUM_SWEEP_RESAMPLES = 1_000  # of a choice of threshold: one sweep each


def exact_interval(num_right: ArrayLike, num_images: ArrayLike, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Clopper and Pearson's interval of a share, in percent: lower and upper ends, as `num_right` shaped."""
    count, total = np.asarray(num_right, dtype=np.float64), np.asarray(num_images, dtype=np.float64)
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(count > 0, betaincinv(count, total - count + 1, tail), 0.0)
        high = np.where(count < total, betaincinv(count + 1, total - count, 1 - tail), 1.0)
    return 100 * low, 100 * high


def share_interval(num_right: float, num_images: int) -> Interval:
    """The same of one share."""
    low, high = exact_interval(num_right, num_images)
    return float(low), float(high)


def percentile_interval(samples: Floats) -> Interval:
    """The middle 95% of the bootstrap's figures."""
    low, high = np.percentile(samples, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def resampled_means(columns: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 42) -> Floats:
    """Means of several columns over images drawn with replacement, the same images for all columns (paired).

    Images that agree in every column are interchangeable, so one multinomial draw over the distinct rows replaces
    drawing N images: with right/wrong columns, of few distinct rows, 10,000 resamples take milliseconds.

    Returns:
        (B, D), of columns (N, D).
    """
    rows, counts = np.unique(np.asarray(columns, dtype=np.float64), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=num_resamples)
    means: Floats = drawn @ rows / counts.sum()
    return means
