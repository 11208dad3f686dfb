"""Calibration: from CLCNet's raw score and the probabilities it was given to the chance that the answer is right."""

from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from clcnet.network.weights import LARGEST_NUMBER

LOWEST_PROBABILITY = 1e-12  # what a probability of 0 counts as in a logarithm
SHARPENING = 0.6  # temperature of a row whose log-probabilities spread by 1; `benchmarks.ablation_1000` has others
NUM_SCORES = 3
_NETWORK_PRECISION = 1.0  # of the normal prior on the network's weight, centred at 0: noise alone gets no say


@dataclass(frozen=True)
class Calibration:
    """Turns a raw score into a probability, together with what the probabilities themselves say.

    `base` is a logistic regression on three numbers of the row, `tempered_scores`; being logarithms they also resolve
    the rows whose top probability rounds to 1. The network then moves it by its disagreement:

        P(correct) = sigmoid(base + network * (raw - sigmoid(base)))

    Attributes:
        intercept: of `base`.
        weights: of `base`, for `tempered_scores`; four, for `simple_scores`, in files of version 1.0 and before.
        network: weight of the network, 0 or more.
    """

    intercept: float
    weights: tuple[float, ...]
    network: float

    def apply(self, raw: Tensor, probs: Tensor) -> Tensor:
        """P(correct), (B,), from raw scores (B,) and the rows they belong to (B, n)."""
        scores = simple_scores(probs) if len(self.weights) == 4 else tempered_scores(probs)
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
        except (KeyError, TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) not in (4 + 2, NUM_SCORES + 2):
            raise ValueError(f"unknown calibration: {short(content)}")
        if not all(abs(number) < LARGEST_NUMBER for number in numbers):  # NaN fails too
            raise ValueError(f"calibration with numbers that are not finite or not below {LARGEST_NUMBER:g}")
        return cls(numbers[0], tuple(numbers[1:-1]), numbers[-1])


def tempered_scores(probs: Tensor) -> Tensor:
    """Three scores of a row: (B, n) to (B, 3).

    Log-odds and logarithm of the top probability at temperature T, and its log-odds at 2 T. T is `SHARPENING` times the
    fourth root of the standard deviation of the row's log-probabilities. Sharpened, the closest rivals weigh most, as
    in the margin; a network of larger logits is sharpened less, so that the same odds mean nearly the same on all
    networks (Cattelan and Silva divide logits by their norm, arXiv:2305.15508). The second score bends the line among
    unsure rows and is 0 on the surest: products of scores also bend it there, and lead astray on a surer network.
    """
    logs = probs.clamp(LOWEST_PROBABILITY).log_()
    temperature = SHARPENING * logs.std(dim=1, correction=0, keepdim=True).clamp_(1e-6).sqrt_().sqrt_()
    rivals = (logs[:, 1:] - logs[:, :1]).div_(2 * temperature).exp_()
    doubled, odds = rivals.sum(dim=1), rivals.square_().sum(dim=1).clamp_(torch.finfo(probs.dtype).tiny)
    return torch.stack([-odds.log(), -odds.log1p(), -doubled.log()], dim=1)


def simple_scores(probs: Tensor) -> Tensor:
    """Log-odds of the top probability, logarithms of the second, the third and the entropy: (B, n) to (B, 4)."""
    third = probs[:, min(2, probs.shape[1] - 1)]
    entropy = -probs.clamp(LOWEST_PROBABILITY).log_().mul_(probs).sum(dim=1)
    scores = [probs[:, 0], probs[:, 1:].sum(dim=1), probs[:, 1], third, entropy]
    logs = torch.stack(scores).clamp_(LOWEST_PROBABILITY).log_()
    return torch.stack([logs[0] - logs[1], *logs[2:]], dim=1)


def fit_calibration(raw: Tensor, probs: Tensor, correct: Tensor, held_back: Tensor) -> Calibration:
    """Fit a calibration.

    Args:
        raw: (N,) raw scores.
        probs: (N, n), the rows that they belong to.
        correct: (N,) bool, whether the top-1 answer is right.
        held_back: (N,) bool, rows that the network did not learn from. Only they set the network's weight: on the
            others it would seem better than it is. The regression, with its four numbers, uses all rows.
    """
    # both take a second to import, and scoring fits nothing
    from scipy.optimize import brentq
    from sklearn.linear_model import LogisticRegression

    scores = torch.cat([tempered_scores(block) for block in torch.split(probs, 4096)]).double().numpy()
    labels, mean, scale = correct.numpy(), scores.mean(axis=0), scores.std(axis=0) + 1e-6
    regression = LogisticRegression(solver="newton-cholesky", tol=1e-8).fit((scores - mean) / scale, labels)
    weights = regression.coef_[0] / scale
    intercept = regression.intercept_[0] - weights @ mean

    rows = held_back.numpy()
    base, labels = (scores @ weights + intercept)[rows], labels[rows]
    disagreement = raw.double().numpy()[rows] - expit(base)

    def slope(network: float) -> float:
        """Of minus the logarithm of the posterior of the network's weight: it rises, and is positive at `limit`."""
        pull = disagreement @ (expit(base + network * disagreement) - labels)
        return float(pull + _NETWORK_PRECISION * network)

    limit = np.abs(disagreement).sum() / _NETWORK_PRECISION + 1
    return Calibration(float(intercept), tuple(weights.tolist()), brentq(slope, 0, limit) if slope(0) < 0 else 0.0)
