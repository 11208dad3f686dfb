"""CLCNet (arXiv:2205.09612): how likely is the top-1 answer behind a row of sorted probabilities right?

This file holds the network, its calibration, and its weights file: a zip with `model_params.json` and `network.pt`, as
the released implementation writes and reads it. What is needed beyond that format lies under further top-level keys of
`model_params.json`, which that implementation ignores.
"""

import io
import json
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clcnet.files import atomic_path
from clcnet.layers import (
    QUERY_WIDTH,
    RESIDUAL_SCALE,
    AttentiveTransformers,
    FeatureTransformers,
    GhostBatchNorm,
    RestrictedSelfAttention,
    attention_weighted,
    descending,
    linear_weight,
    sparsemax,
    times_gaussian,
)

FORMAT_VERSION = 1
LARGEST_MEMBER = 64 * 2**20  # bytes; a network for 1,000 classes takes 150 kB
PARAMS_MEMBER, STATE_MEMBER = "model_params.json", "network.pt"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # fixed, so that the same network gives the same file
NUM_FOLDS = 5
SUM_TOLERANCE = 1e-3  # how far a row of probabilities may be from summing to 1


class CLCNet(nn.Module):
    """The confidence network: restricted self-attention, then a TabNet encoder, then one linear layer.

    Args:
        num_classes: n of the rows it is trained on. The network takes any n; `predict` warns when it meets another.
        masked: feed `mask * h` to each step, as the paper's figure draws it. The released network feeds `h`, and its
            masks reach training through the sparsity term alone.
        n_d: width of what a step adds to the decision.
        n_a: width of what a step hands to the next step's mask.
        n_steps: number of decision steps.
        gamma: how freely a feature may be used by several masks; 1 forbids it.
        mapping_dim: numbers that restricted self-attention maps a row to.
        n_shared: gated layers whose linear part all steps share.
        n_independent: gated layers of each step's own.
        virtual_batch_size: rows that ghost batch norm normalises together.
        momentum: of the running statistics.
        epsilon: inside the logarithm of the sparsity term.

    Attributes:
        calibration: turns raw scores into probabilities in `predict`, or None.
        metadata: what the weights file says about the training: metrics, arguments, folds.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        masked: bool = False,
        n_d: int = 8,
        n_a: int = 8,
        n_steps: int = 3,
        gamma: float = 1.3,
        mapping_dim: int = 100,
        n_shared: int = 2,
        n_independent: int = 2,
        virtual_batch_size: int = 128,
        momentum: float = 0.02,
        epsilon: float = 1e-15,
    ) -> None:
        super().__init__()
        self.num_classes, self.masked, self.n_d, self.n_a, self.n_steps = num_classes, masked, n_d, n_a, n_steps
        self.gamma, self.mapping_dim, self.n_shared, self.n_independent = gamma, mapping_dim, n_shared, n_independent
        self.virtual_batch_size, self.momentum, self.epsilon = virtual_batch_size, momentum, epsilon
        self.calibration: Calibration | None = None
        self.metadata: dict[str, Any] = {}
        self._warned_classes: set[int] = set()

        norm = (virtual_batch_size, momentum)
        self.attention = RestrictedSelfAttention(mapping_dim)
        # Block 0 of the feature transformers is TabNet's initial splitter, block k is step k.
        self.feature_transformers = FeatureTransformers(
            n_steps + 1, mapping_dim, n_d + n_a, n_shared, n_independent, *norm
        )
        self.attentive_transformers = AttentiveTransformers(n_steps, n_a, mapping_dim, *norm)
        self.final_weight = linear_weight(1, n_d, gated=False)

    def forward(self, probs: Tensor) -> Tensor:
        """Raw scores.

        Args:
            probs: (B, n), each row sorted from largest to smallest.

        Returns:
            (B,), the network's own output, not bounded to [0, 1].
        """
        if self.masked:
            return self.score_and_sparsity(probs)[0]
        mapped = self.attention(probs).unsqueeze(-3)
        return self.final_score(self.feature_transformers(mapped, slice(1, None)))

    def score_and_sparsity(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Raw scores (..., B) and M, the mean over steps of `mean_b sum_j m_j log(m_j + epsilon)`, (...)."""
        mapped = self.attention(probs).unsqueeze(-3)  # (..., 1, B, mapping_dim)
        if self.masked:
            features, masks = self._masked_steps(mapped)
        else:
            out = self.feature_transformers(mapped)  # (..., n_steps + 1, B, n_d + n_a)
            logits = self.attentive_transformers(out[..., :-1, :, self.n_d :])
            masks = list(self.masks(logits.unbind(-3)))
            features = out[..., 1:, :, :]
        stacked = torch.stack(masks, dim=-3)
        sparsity = (stacked * torch.log(stacked + self.epsilon)).sum(dim=(-3, -2, -1))
        return self.final_score(features), sparsity / (self.n_steps * probs.shape[-2])

    def _masked_steps(self, mapped: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (..., n_steps, B, n_d + n_a) and masks where each step sees `mask * h`: one step after another."""
        outs = [self.feature_transformers(mapped, slice(0, 1))]
        masks: list[Tensor] = []
        logits = (
            self.attentive_transformers(outs[-1][..., self.n_d :], slice(step, step + 1)).squeeze(-3)
            for step in range(self.n_steps)
        )
        for mask in self.masks(logits):
            masks.append(mask)
            block = slice(len(masks), len(masks) + 1)
            outs.append(self.feature_transformers(mask.unsqueeze(-3) * mapped, block))
        return torch.cat(outs[1:], dim=-3), masks

    def masks(self, logits: Iterable[Tensor]) -> Iterator[Tensor]:
        """Masks (..., B, mapping_dim) of the steps in order; features once used become less likely."""
        prior: Tensor | float = 1.0
        for step_logits in logits:
            mask = sparsemax(step_logits * prior)
            prior = prior * (self.gamma - mask)
            yield mask

    def final_score(self, features: Tensor) -> Tensor:
        """features: (..., n_steps, B, n_d + n_a) to (..., B)."""
        decision = features[..., : self.n_d].relu().sum(dim=-3)
        return (decision @ self.final_weight.mT).squeeze(-1)

    @torch.inference_mode()
    def predict(self, probs: np.ndarray | Tensor, calibrated: bool = True, batch_size: int = 512) -> Any:
        """Confidences of many rows, in evaluation mode whatever the mode of the module.

        Args:
            probs: (N, n), each row sorted from largest to smallest; numpy or torch.
            calibrated: apply the calibration, if the network has one. False gives the network's own output.
            batch_size: rows at a time; bounds the memory, and small ones stay in the processor's cache.

        Returns:
            (N,) float32, numpy or torch as given.

        Raises:
            ValueError: the rows are not sorted probabilities.
        """
        rows = torch.as_tensor(probs)
        _check_shape(rows)
        self._warn_of_other_classes(rows.shape[1])
        device = self.final_weight.device
        scorer = _Scorer(self)
        calibration = self.calibration if calibrated else None
        scores = torch.empty(len(rows), dtype=torch.float32)
        for start in range(0, len(rows), batch_size):
            block = rows[start : start + batch_size].to(device, torch.float32)
            _check_block(block, start)
            raw = scorer(block)
            block_scores = raw if calibration is None else calibration.apply(raw, block)
            scores[start : start + batch_size] = block_scores
        return scores.numpy() if isinstance(probs, np.ndarray) else scores.to(rows.device)

    def _warn_of_other_classes(self, num_classes: int) -> None:
        if num_classes != self.num_classes and num_classes not in self._warned_classes:
            self._warned_classes.add(num_classes)
            warnings.warn(
                f"this CLCNet was trained at n = {self.num_classes} and now scores rows of n = {num_classes}; "
                "its confidences may be off",
                stacklevel=4,  # past predict and its inference_mode wrapper
            )

    def ghost_norms(self) -> Iterator[GhostBatchNorm]:
        """All batch norms, in order."""
        return (module for module in self.modules() if isinstance(module, GhostBatchNorm))

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write the weights file, readable here and by the released implementation.

        Args:
            path: of the zip.
            metadata: JSON values to keep beside the weights, added to `self.metadata`.
        """
        self.metadata = self.metadata | (metadata or {})
        params = _params_to_json(self)
        buffer = io.BytesIO()
        torch.save(_to_released_state(self), buffer)
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, content in (
                (PARAMS_MEMBER, json.dumps(params, indent=1, sort_keys=True).encode()),
                (STATE_MEMBER, buffer.getvalue()),
            ):
                archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), content, zipfile.ZIP_DEFLATED)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "CLCNet":
        """Read a weights file, ours or a released one. Pickled code is never run.

        Args:
            path: of the zip.
            device: to put the network on.

        Returns:
            The network in evaluation mode.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a CLCNet weights file; the message says what is wrong with it.
        """
        params, state = _read_zip(Path(path))
        try:
            model = cls(**_constructor_arguments(params))
            _load_released_state(model, state, params["init_params"]["input_dim"])
            model.calibration = Calibration.from_json(params.get("calibration"))
        except _BrokenFile as problem:
            raise ValueError(f"{path}: {problem}") from None
        model.metadata = {key: value for key, value in params.items() if key not in _RESERVED_KEYS}
        return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------- scoring


class _Scorer:
    """A CLCNet made ready to score many rows: batch norms folded into the linear layers, which then have a bias."""

    def __init__(self, model: CLCNet) -> None:
        self.model = model
        transformers, attentive = model.feature_transformers, model.attentive_transformers
        self.layers = [
            _fold(weight, norm) for weight, norm in zip(transformers.weights(), transformers.ghost_norms(), strict=True)
        ]
        self.mask_layer = _fold(attentive.weight, attentive.norm)
        self.workspace: Tensor | None = None

    def __call__(self, probs: Tensor) -> Tensor:
        """Raw scores (B,) of rows (B, n), as `model(probs)` gives in evaluation mode."""
        model, attention = self.model, self.model.attention
        if self.workspace is None or self.workspace.shape != probs.shape:
            self.workspace = torch.empty_like(probs)
        weighted, total = attention_weighted(probs, attention.slope(probs[:, :1]), out=self.workspace)
        mapped = descending(times_gaussian(weighted, model.mapping_dim).div_(total))
        features = self._masked_features(mapped) if model.masked else self._features(mapped, slice(1, None))
        return model.final_score(features)

    def _features(self, mapped: Tensor, blocks: slice) -> Tensor:
        """Feature transformers: (B, mapping_dim) to (blocks, B, n_d + n_a)."""
        (weight, bias), *others = ((weight[blocks], bias[blocks]) for weight, bias in self.layers)
        x = nn.functional.glu(torch.baddbmm(bias, mapped.expand(len(weight), -1, -1), weight), dim=-1)
        for weight, bias in others:
            x = x.add_(nn.functional.glu(torch.baddbmm(bias, x, weight), dim=-1)).mul_(RESIDUAL_SCALE)
        return x

    def _masked_features(self, mapped: Tensor) -> Tensor:
        """Features of all steps where each sees `mask * h`."""
        model = self.model
        outs = [self._features(mapped, slice(0, 1))]
        weights, biases = self.mask_layer
        logits = (
            torch.addmm(bias, outs[-1][0, :, model.n_d :], weight) for weight, bias in zip(weights, biases, strict=True)
        )
        for step, mask in enumerate(model.masks(logits), start=1):
            outs.append(self._features(mask * mapped, slice(step, step + 1)))
        return torch.cat(outs[1:])


def _fold(weight: Tensor, norm: GhostBatchNorm) -> tuple[Tensor, Tensor]:
    """A linear layer and the batch norm behind it as one: (blocks, inputs, outputs) and (blocks, 1, outputs)."""
    scale, shift = norm.scale_and_shift()
    return weight.mT * scale.unsqueeze(-2), shift.unsqueeze(-2)


def _check_shape(rows: Tensor) -> None:
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(f"probabilities must have shape (N, n) with n >= 2, not {tuple(rows.shape)}")


def _check_block(rows: Tensor, start: int) -> None:
    """Raise ValueError for the first row that is not a descending row of probabilities."""
    # NaN fails every comparison
    good = ((rows.sum(dim=1) - 1).abs() <= SUM_TOLERANCE) & (rows[:, -1] >= 0)
    if good.all() and _all_descending(rows):
        return
    good &= (rows[:, 1:] <= rows[:, :-1]).all(dim=1)
    index = int((~good).nonzero()[0])
    raise ValueError(f"row {start + index + 1} {_describe_bad_row(rows[index])}")


def _all_descending(rows: Tensor) -> bool:
    """Whether no number is larger than the one before it; NumPy compares four times as fast as torch on a CPU."""
    if rows.device.type == "cpu":
        array = rows.numpy()
        return bool((array[:, 1:] <= array[:, :-1]).all())
    return bool((rows[:, 1:] <= rows[:, :-1]).all())


def _describe_bad_row(row: Tensor) -> str:
    bad = ~(row.isfinite() & (row >= 0))
    if bad.any():
        column = int(bad.nonzero()[0])
        return f"holds {row[column]:g} at position {column + 1}; probabilities are finite and not negative"
    rising = row[1:] > row[:-1]
    if rising.any():
        column = int(rising.nonzero()[0])
        return (
            f"is not sorted from largest to smallest: {row[column]:g} comes before {row[column + 1]:g} "
            f"at position {column + 2}"
        )
    return f"sums to {row.sum():g}; probabilities sum to 1 within {SUM_TOLERANCE}"


# ------------------------------------------------------------------------------------------------------ calibration


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
        if content is None:
            return None
        try:
            numbers = [float(value) for value in (content["intercept"], *content["weights"], content["network"])]
            intercept, first, second, third, fourth, network = numbers
        except (KeyError, TypeError, ValueError):
            raise _BrokenFile(f"{PARAMS_MEMBER} holds an unknown calibration: {str(content)[:80]}") from None
        if not all(map(math.isfinite, numbers)):
            raise _BrokenFile(f"{PARAMS_MEMBER} holds a calibration with numbers that are not finite")
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


# ----------------------------------------------------------------------------------------------------- weights file

_RESERVED_KEYS = {"init_params", "class_attrs", "format_version", "masked", "calibration"}
_SIZES = ("n_d", "n_a", "n_steps", "mapping_dim", "n_shared", "n_independent")
_NUMBERS = ("gamma", "momentum", "epsilon")


class _BrokenFile(Exception):
    """What is wrong with a weights file; `CLCNet.load` adds its path."""


def _params_to_json(model: CLCNet) -> dict[str, Any]:
    """Content of `model_params.json`: the released keys first in meaning, then ours."""
    clash = _RESERVED_KEYS & model.metadata.keys()
    if clash:
        raise ValueError(f"metadata may not use the key(s) {', '.join(sorted(clash))}: the weights file needs them")
    init_params = {key: getattr(model, key) for key in (*_SIZES, *_NUMBERS)}
    init_params |= {"input_dim": model.num_classes, "output_dim": 1, "mask_type": "sparsemax", "lambda_sparse": 1e-3}
    init_params |= {"cat_dims": [], "cat_emb_dim": 1, "cat_idxs": [], "clip_value": 1, "device_name": "auto"}
    init_params |= {"optimizer_params": {"lr": 0.02}, "scheduler_fn": None, "scheduler_params": {}}
    init_params |= {"seed": 0, "verbose": 1}
    return {
        "init_params": init_params,
        "class_attrs": {"preds_mapper": None},
        "format_version": FORMAT_VERSION,
        "masked": model.masked,
        "calibration": None if model.calibration is None else model.calibration.to_json(),
        **model.metadata,
    }


def _constructor_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Check `model_params.json` and turn it into the arguments of `CLCNet`."""
    init_params = params.get("init_params")
    if not isinstance(init_params, dict):
        raise _BrokenFile(f"{PARAMS_MEMBER} has no init_params")
    version = params.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise _BrokenFile(f"format version {version!r}, this code reads up to {FORMAT_VERSION}; update the code")
    if init_params.get("mask_type", "sparsemax") != "sparsemax":
        raise _BrokenFile(f"mask_type {init_params['mask_type']!r}; only sparsemax is known")
    arguments: dict[str, Any] = {"num_classes": _size(init_params, "input_dim"), "masked": params.get("masked") is True}
    arguments |= {name: _size(init_params, name) for name in _SIZES}
    for name in _NUMBERS:
        value = init_params.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise _BrokenFile(f"{name} in {PARAMS_MEMBER} is {value!r}, not a number")
        arguments[name] = float(value)
    _check_room(arguments)
    return arguments


def _check_room(arguments: dict[str, Any]) -> None:
    """Refuse sizes that are fine one by one and together ask for more memory than a weights file can fill."""
    width = arguments["n_d"] + arguments["n_a"]
    num_layers = arguments["n_shared"] + (arguments["n_steps"] + 1) * arguments["n_independent"]
    num_bytes = 4 * num_layers * 2 * width * max(width, arguments["mapping_dim"])
    if num_bytes > LARGEST_MEMBER:
        raise _BrokenFile(
            f"{PARAMS_MEMBER} describes a network of {num_bytes:,} bytes, more than the {LARGEST_MEMBER:,} allowed"
        )


def _size(init_params: dict[str, Any], name: str) -> int:
    value = init_params.get(name)
    largest = 2**20 if name == "input_dim" else 1024
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise _BrokenFile(f"{name} in {PARAMS_MEMBER} is {value!r}, not a whole number from 1 to {largest}")
    return value


def _released_names(model: CLCNet) -> Iterator[tuple[str, Tensor]]:
    """All that our network holds, under its released names; a shared layer has several."""
    prefix = "tabnet.encoder."
    attention = model.attention
    yield f"{prefix}res_att.query.weight", attention.query_weight.unsqueeze(-1)
    yield f"{prefix}res_att.query.bias", attention.query_bias
    yield f"{prefix}res_att.key.weight", attention.key_weight.unsqueeze(-1)
    for block in range(model.n_steps + 1):
        name = f"{prefix}feat_transformers.{block - 1}" if block else f"{prefix}initial_splitter"
        yield from _block_names(name, model, block)
    attentive = model.attentive_transformers
    for step in range(model.n_steps):
        yield f"{prefix}att_transformers.{step}.fc.weight", attentive.weight[step]
        yield from _norm_names(f"{prefix}att_transformers.{step}.bn.bn.", attentive.norm, step)
    yield "tabnet.final_mapping.weight", model.final_weight


def _block_names(name: str, model: CLCNet, block: int) -> Iterator[tuple[str, Tensor]]:
    """One feature transformer: linear weights and batch norms, the shared ones first."""
    transformers = model.feature_transformers
    for layer, norm in enumerate(transformers.ghost_norms()):
        own = layer - model.n_shared
        if own < 0:
            weight: Tensor = transformers.shared[layer]
            yield f"{name}.shared.shared_layers.{layer}.weight", weight
            prefix = f"{name}.shared.glu_layers.{layer}."
        else:
            weight = transformers.own[own][block]
            prefix = f"{name}.specifics.glu_layers.{own}."
        yield f"{prefix}fc.weight", weight
        yield from _norm_names(f"{prefix}bn.bn.", norm, block)


def _norm_names(prefix: str, norm: GhostBatchNorm, block: int) -> Iterator[tuple[str, Tensor]]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield prefix + name, getattr(norm, name)[block]


def _unread_state(model: CLCNet, input_dim: int) -> dict[str, Tensor]:
    """What the released network carries and never reads, at its neutral values."""
    width = model.mapping_dim
    state = {}
    for prefix in ("tabnet.initial_bn.", "tabnet.encoder.initial_bn."):
        state[f"{prefix}weight"], state[f"{prefix}bias"] = torch.ones(input_dim), torch.zeros(input_dim)
        state[f"{prefix}running_mean"], state[f"{prefix}running_var"] = torch.zeros(input_dim), torch.ones(input_dim)
    for name in ("query", "key"):
        state[f"tabnet.encoder.nor_att.{name}.weight"] = torch.zeros(QUERY_WIDTH, 1)
        state[f"tabnet.encoder.nor_att.{name}.bias"] = torch.zeros(QUERY_WIDTH)
    state["tabnet.encoder.nor_att.value.weight"] = torch.zeros(width, 1)
    state["tabnet.encoder.nor_att.value.bias"] = torch.zeros(width)
    state["tabnet.encoder.res_att.key.bias"] = torch.zeros(QUERY_WIDTH)
    return state


def _to_released_state(model: CLCNet) -> dict[str, Tensor]:
    named = list(_released_names(model))
    # one copy a tensor: shared layers stay shared in the file, and nothing else of a larger storage gets in
    copies = {id(tensor): tensor.detach().cpu().clone() for _, tensor in named}
    state = {name: copies[id(tensor)] for name, tensor in named}
    state |= _unread_state(model, model.num_classes)
    counters = [name.removesuffix("running_var") + "num_batches_tracked" for name in state if "running_var" in name]
    return state | {name: torch.tensor(0) for name in counters}


def _load_released_state(model: CLCNet, state: dict[str, Any], input_dim: int) -> None:
    """Copy a released state dict into the model, after checking every name and shape."""
    ours = dict(_released_names(model))
    unread = _unread_state(model, input_dim)
    missing = sorted(ours.keys() - state.keys())
    if missing:
        raise _BrokenFile(f"{STATE_MEMBER} lacks {_some(missing)}")
    others = map(str, state.keys() - ours.keys() - unread.keys())
    extra = sorted(name for name in others if not name.endswith(".num_batches_tracked"))
    if extra:
        raise _BrokenFile(f"{STATE_MEMBER} holds unknown {_some(extra)}")
    for name, tensor in (unread | ours).items():
        if name in state:
            _check_tensor(name, state[name], tensor.shape)
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])


def _check_tensor(name: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise _BrokenFile(f"{name} in {STATE_MEMBER} is a {type(value).__name__}, not a tensor")
    if value.shape != shape:
        raise _BrokenFile(f"{name} in {STATE_MEMBER} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    plain = value.layout == torch.strided and value.is_floating_point() and value.device.type == "cpu"
    if not plain or not value.isfinite().all():
        raise _BrokenFile(f"{name} in {STATE_MEMBER} holds values that are not finite numbers")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_zip(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two members of a weights file: the JSON object and the state dict. Sizes are checked before reading."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        with zipfile.ZipFile(path) as archive:
            params_bytes, state_bytes = (_read_member(archive, name) for name in (PARAMS_MEMBER, STATE_MEMBER))
        params = json.loads(params_bytes)
        if not isinstance(params, dict):
            raise _BrokenFile(f"{PARAMS_MEMBER} is not a JSON object")
        return params, _read_state(state_bytes)
    except _BrokenFile as problem:
        raise ValueError(f"{path}: {problem}") from None
    except zipfile.BadZipFile as problem:
        raise ValueError(f"{path}: not a readable zip file ({problem}); download or train it again") from None
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: {PARAMS_MEMBER} is not JSON ({problem})") from None


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise _BrokenFile(f"not a CLCNet weights file: it has no member {name}") from None
    if info.file_size > LARGEST_MEMBER:
        raise _BrokenFile(f"{name} declares {info.file_size:,} bytes, more than the {LARGEST_MEMBER:,} allowed")
    try:
        return archive.read(info)
    except (NotImplementedError, RuntimeError, EOFError, OSError, ValueError, zlib.error) as problem:
        raise _BrokenFile(f"{name} cannot be unpacked ({problem})") from None


def _read_state(content: bytes) -> dict[str, Any]:
    """Unpickle tensors alone; anything else in the file is refused by torch."""
    buffer = io.BytesIO(content)
    declared = 0
    try:
        if zipfile.is_zipfile(buffer):
            with zipfile.ZipFile(buffer) as archive:
                declared = sum(info.file_size for info in archive.infolist())
        if declared <= LARGEST_MEMBER:
            buffer.seek(0)
            with warnings.catch_warnings(action="ignore"):  # of what is odd about the file: the error below says more
                state = torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as problem:  # on damaged bytes torch's unpickler raises nearly anything, IndexError included
        reason = str(problem).splitlines()[0][:120] if str(problem) else type(problem).__name__
        raise _BrokenFile(f"{STATE_MEMBER} is not a plain torch state dict ({reason})") from None
    if declared > LARGEST_MEMBER:
        raise _BrokenFile(f"{STATE_MEMBER} declares {declared:,} bytes, more than the {LARGEST_MEMBER:,} allowed")
    if not isinstance(state, dict):
        raise _BrokenFile(f"{STATE_MEMBER} holds a {type(state).__name__}, not a state dict")
    return state


def find_fold_weights(folder: str | Path) -> list[Path]:
    """The five fold weights in a folder, in order of the fold that each was not trained on.

    Accepts our names, `CLCNet_imagenet_split_K.zip`, and the released ones, `CLCNet_imagenet_split_K(MSE_0.1097).zip`.

    Raises:
        FileNotFoundError: a fold has no weights; the message says which.
        ValueError: a fold has two.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of fold weights; run train_imagenet_5fold_cv.py")
    candidates = _fold_candidates(folder)
    for fold, paths in candidates.items():
        if not paths:
            raise FileNotFoundError(
                f"found 0 weights for fold {fold} in {folder}, expected 1 (CLCNet_imagenet_split_{fold}.zip); "
                "run train_imagenet_5fold_cv.py"
            )
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise ValueError(f"found {len(paths)} weights for fold {fold} in {folder}, expected 1: {names}; remove one")
    return [paths[0] for paths in candidates.values()]


def check_no_other_fold_weights(folder: str | Path) -> None:
    """Raise ValueError if weights under a released name lie where ours would go: a fold would then have two."""
    folder = Path(folder)
    for paths in _fold_candidates(folder).values() if folder.is_dir() else ():
        for path in paths:
            if "(" in path.name:
                raise ValueError(f"{path} would stand beside new weights for its fold; move it or use another folder")


def _fold_candidates(folder: Path) -> dict[int, list[Path]]:
    candidates: dict[int, list[Path]] = {fold: [] for fold in range(1, NUM_FOLDS + 1)}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(rf"CLCNet_imagenet_split_([1-{NUM_FOLDS}])(\(MSE_[^()]*\))?\.zip", path.name)
        if match:
            candidates[int(match[1])].append(path)
    return candidates
