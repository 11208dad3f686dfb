"""How sure a model is of its top-1 answer, by name: every confidence, with CLCNet passed in where it is the one asked.

A confidence takes `sorted_probs` (N, n), descending rows that sum to 1, and returns (N,) float64, higher is surer.
`SIMPLE_CONFIDENCES` lists those of one line by the name that the tables print, the simplest first: of equals the search
takes the first. The tempered softmax is fitted to a model's answers. Which answer stands, of several models', is the
matter of rules (`cascade/rules.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clcnet.metrics import Bools, Floats

Probs = NDArray[np.float32]

CLCNET, TEMPERED, CHANCE = "CLCNet", "temperature-scaled softmax", "chance"
SUM_TOLERANCE = 1e-3  # how far a row of probabilities may be from summing to 1
_TEMPERATURES = np.geomspace(0.2, 5, 21)  # neighbours differ by 17%, between which a parabola finds the best
_FIT_ROWS = 10_000  # spread over the table; one number needs no more
_CHUNK_NUMBERS = 1 << 20  # probabilities handled at once; bounds the memory


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


class Network(Protocol):
    """What judges an answer: `CLCNet`, or anything with its `predict`."""

    def predict(self, probs: Probs) -> NDArray[np.floating[Any]]:
        """Sorted probabilities (N, n) -> (N,) confidence that the first is right."""


def can_judge(confidence: str, network: Network | None) -> bool:
    """Whether `confidence_of` knows this one."""
    return confidence in SIMPLE_CONFIDENCES or (confidence == CLCNET and network is not None)


def confidence_of(confidence: str, sorted_probs: Probs, network: Network | None) -> Floats:
    """How sure sorted probabilities (N, n) are, (N,), by a one-line confidence or by CLCNet."""
    if confidence in SIMPLE_CONFIDENCES:
        return SIMPLE_CONFIDENCES[confidence](sorted_probs)
    if network is None or confidence != CLCNET:
        raise ValueError(f"the confidence {confidence!r} is not known, or its network is not at hand")
    return network.predict(sorted_probs).astype(np.float64)


def fit_temperatures(sorted_probs: Probs, correct: Bools, parts: Sequence[Bools] | None = None) -> Floats:
    """The temperature of a model (Guo et al., arXiv:1706.04599), fitted on each of several parts (N,) of its rows.

    Sorted probabilities do not hold that of the right class, so the temperature maximises the likelihood of the top-1
    answer being right or wrong instead of that of the class.
    """
    drawn = np.linspace(0, len(correct) - 1, min(len(correct), _FIT_ROWS)).astype(int)
    top = tempered_top(sorted_probs[drawn], _TEMPERATURES)  # (rows, T)
    losses = -np.log(np.clip(np.where(correct[drawn, None], top, 1 - top), 1e-7, 1))
    masks = [part[drawn] for part in parts or [np.ones(len(correct), dtype=bool)]]
    return np.exp([_lowest_point(np.log(_TEMPERATURES), losses[mask if mask.any() else ...].mean(0)) for mask in masks])


def tempered_top(sorted_probs: Probs, temperatures: Floats) -> Floats:
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
