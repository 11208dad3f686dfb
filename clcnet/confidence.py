"""One-line confidences: what the probabilities alone say about the top-1 answer, without a network.

Each function takes `sorted_probs` (N, n), descending rows that sum to 1, and returns (N,) float64, higher is surer.
`SIMPLE_CONFIDENCES` lists them by the name that the tables print, for comparison with CLCNet's score.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Probs = NDArray[np.float32]

SUM_TOLERANCE = 1e-3  # how far a row of probabilities may be from summing to 1


def max_softmax(sorted_probs: Probs) -> Floats:
    """The top probability, in [1/n, 1]: the usual baseline (Hendrycks and Gimpel, arXiv:1610.02136)."""
    return sorted_probs[:, 0].astype(np.float64)


def margin(sorted_probs: Probs) -> Floats:
    """Top-1 minus top-2 probability, in [0, 1]."""
    return sorted_probs[:, 0].astype(np.float64) - sorted_probs[:, 1]


def negative_entropy(sorted_probs: Probs) -> Floats:
    """Sum of p log p, in [-log n, 0]; a probability of 0 adds nothing."""
    logs = np.log(np.maximum(sorted_probs, np.finfo(np.float32).tiny))
    products: Floats = np.einsum("ij,ij->i", sorted_probs, logs, dtype=np.float64)
    return products


def sum_of_squares(sorted_probs: Probs) -> Floats:
    """Sum of p squared, in [1/n, 1]: ranks as DOCTOR's D-alpha does (Granese et al., arXiv:2106.02395)."""
    squares: Floats = np.einsum("ij,ij->i", sorted_probs, sorted_probs, dtype=np.float64)
    return squares.clip(max=1)  # a float32 row may sum to a little more than 1


SIMPLE_CONFIDENCES: dict[str, Callable[[Probs], Floats]] = {
    "max softmax": max_softmax,
    "margin": margin,
    "entropy": negative_entropy,
    "sum of squares (DOCTOR)": sum_of_squares,
}
