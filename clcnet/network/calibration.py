"""Calibration: from CLCNet's raw score and the probabilities it was given to the chance that the answer is right."""

from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor, nn

from clcnet.network.weights import LARGEST_NUMBER

LOWEST_PROBABILITY = 1e-12  # what a probability of 0 counts as in a logarithm
_NETWORK_PRECISION = 1.0  # of the normal prior on the network's weight, centred at 0: noise alone gets no say


@dataclass(frozen=True)
class Calibration:
    """Turns a raw score into a probability, together with what the probabilities themselves say.

    `base` is a logistic regression on four numbers of the row, `simple_scores`; being logarithms they also resolve the
    rows whose top probability rounds to 1. The network then moves it by its disagreement:

        P(correct) = sigmoid(base + network * (raw - sigmoid(base)))

    Attributes:
        intercept: of `base`.
        weights: of `base`, for `simple_scores`.
        network: weight of the network, 0 or more.
    """

    intercept: float
    weights: tuple[float, float, float, float]
    network: float

    def apply(self, raw: Tensor, probs: Tensor) -> Tensor:
        """P(correct), (B,), from raw scores (B,) and the rows they belong to (B, n)."""
        scores = simple_scores(probs)
        base = scores @ torch.tensor(self.weights, dtype=scores.dtype, device=scores.device) + self.intercept
        return torch.sigmoid(base + self.network * (raw - torch.sigmoid(base)))

    def to_json(self) -> dict[str, Any]:
        return {"intercept": self.intercept, "weights": list(self.weights), "network": self.network}

    @classmethod
    def from_json(cls, content: Any) -> "Calibration | None":
        """Read what `to_json` gave, None for none; ValueError if it is anything else."""
        if content is None:
            return None
        try:
            numbers = [float(value) for value in (content["intercept"], *content["weights"], content["network"])]
            intercept, first, second, third, fourth, network = numbers
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"unknown calibration: {short(content)}") from None
        if not all(abs(number) < LARGEST_NUMBER for number in numbers):  # NaN fails too
            raise ValueError(f"calibration with numbers that are not finite or not below {LARGEST_NUMBER:g}")
        return cls(intercept, (first, second, third, fourth), network)


def simple_scores(probs: Tensor) -> Tensor:
    """Log-odds of the top probability, logarithms of the second, the third and the entropy: (B, n) to (B, 4).

    The odds come from the sum of the others, not from 1 - p, which float32 rounds to 0. With n = 2, the second stands
    in for the third.
    """
    rest = probs[:, 1:].sum(dim=1)
    third = probs[:, min(2, probs.shape[1] - 1)]
    entropy = -probs.clamp(LOWEST_PROBABILITY).log_().mul_(probs).sum(dim=1)
    scores = torch.stack([probs[:, 0], rest, probs[:, 1], third, entropy]).clamp_(LOWEST_PROBABILITY).log_()
    return torch.stack([scores[0] - scores[1], *scores[2:]], dim=1)


def fit_calibration(raw: Tensor, probs: Tensor, correct: Tensor, held_back: Tensor) -> Calibration:
    """Fit a calibration.

    Args:
        raw: (N,) raw scores.
        probs: (N, n), the rows that they belong to.
        correct: (N,) bool, whether the top-1 answer is right.
        held_back: (N,) bool, rows that the network did not learn from. Only they set the network's weight: on the
            others it would seem better than it is. The regression, with its five numbers, uses all rows.
    """
    scores, labels = torch.cat([simple_scores(block) for block in torch.split(probs, 4096)]).double(), correct.double()
    mean, spread = scores.mean(dim=0), scores.std(dim=0) + 1e-6
    inputs = torch.cat([torch.ones_like(labels)[:, None], (scores - mean) / spread], dim=1)
    precision = torch.tensor([1e-6, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    fitted = _logistic_regression(inputs, labels, precision, torch.zeros_like(labels))
    weights = fitted[1:] / spread
    first, second, third, fourth = weights.tolist()

    base = (inputs @ fitted)[held_back]
    disagreement = (raw[held_back].double() - torch.sigmoid(base))[:, None]
    prior = torch.tensor([_NETWORK_PRECISION], dtype=torch.float64)
    (network,) = _logistic_regression(disagreement, labels[held_back], prior, base)
    intercept = float(fitted[0] - weights @ mean)
    return Calibration(intercept, (first, second, third, fourth), max(0.0, float(network)))


def _logistic_regression(inputs: Tensor, labels: Tensor, precision: Tensor, offset: Tensor) -> Tensor:
    """Weights (F,) that fit labels (N,) with `sigmoid(offset + inputs @ weights)`, by damped Newton steps.

    Args:
        inputs: (N, F).
        labels: (N,) 0 and 1.
        precision: (F,) of a normal prior around 0 on each weight.
        offset: (N,).
    """
    weights = torch.zeros_like(precision)

    def loss(candidate: Tensor) -> Tensor:
        logits = offset + inputs @ candidate
        return (
            nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            + (precision * candidate.square()).sum() / 2
        )

    for _ in range(100):
        probability = torch.sigmoid(offset + inputs @ weights)
        gradient = inputs.T @ (probability - labels) + precision * weights
        curvature = (inputs * (probability * (1 - probability))[:, None]).T @ inputs + torch.diag(precision)
        step, size = torch.linalg.solve(curvature, gradient), 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if size * step.abs().max() < 1e-9:
            break
    return weights
