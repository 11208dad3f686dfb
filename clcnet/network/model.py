"""CLCNet (arXiv:2205.09612): how likely is the top-1 answer behind a row of sorted probabilities right?

This file holds the network, its scoring of many rows, and what the released implementation calls its tensors.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from numpy.typing import NDArray
from torch import Tensor, nn

from clcnet import hub
from clcnet.data.checks import check_sorted_probs
from clcnet.network import layers, weights
from clcnet.network.calibration import Calibration
from clcnet.network.layers import GhostBatchNorm
from clcnet.strangers import read_bytes

STEPS = slice(1, None)  # of the blocks of the feature transformers; block 0 is TabNet's initial splitter
_GROUP = 64  # rows that products of matrices are sure to treat alike
LARGEST_SCORE = 1e37  # on the way to a score; a tenth of float32's largest leaves room for rounding


class CLCNet(nn.Module, ModelHubMixin):
    """The confidence network: restricted self-attention, then a TabNet encoder, then one linear layer.

    `save_pretrained(folder)`, `push_to_hub("user/name")` and `from_pretrained("user/name")` are `ModelHubMixin`'s.

    Args:
        num_classes: n of the rows it is trained on. The network takes any n; `predict` warns when it meets another.
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

    _hub_mixin_config = hub.NO_CONFIG

    def __init__(
        self,
        num_classes: int = 1000,
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
        self.num_classes, self.n_d, self.n_a, self.n_steps = num_classes, n_d, n_a, n_steps
        self.gamma, self.mapping_dim, self.n_shared, self.n_independent = gamma, mapping_dim, n_shared, n_independent
        self.virtual_batch_size, self.momentum, self.epsilon = virtual_batch_size, momentum, epsilon
        self.calibration: Calibration | None = None
        self.metadata: dict[str, Any] = {}
        self._warned_classes: set[int] = set()

        norm = (virtual_batch_size, momentum)
        self.attention = layers.RestrictedSelfAttention(mapping_dim)
        self.feature_transformers = layers.FeatureTransformers(
            n_steps + 1, mapping_dim, n_d + n_a, n_shared, n_independent, *norm
        )
        self.attentive_transformers = layers.AttentiveTransformers(n_steps, n_a, mapping_dim, *norm)
        self.final_weight = layers.linear_weight(1, n_d, gated=False)

    def forward(self, probs: Tensor) -> Tensor:
        """Raw scores.

        Args:
            probs: (B, n), each row sorted from largest to smallest.

        Returns:
            (B,), the network's own output, not bounded to [0, 1].
        """
        mapped = self.attention(probs).unsqueeze(-3)
        return self.final_score(self.feature_transformers(mapped, STEPS))

    def score_and_sparsity(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Raw scores (..., B) and M, the mean over steps of `mean_b sum_j m_j log(m_j + epsilon)`, (...)."""
        mapped = self.attention(probs).unsqueeze(-3)  # (..., 1, B, mapping_dim)
        out = self.feature_transformers(mapped)  # (..., n_steps + 1, B, n_d + n_a)
        logits = self.attentive_transformers(out[..., :-1, :, self.n_d :])
        steps: list[Tensor] = []  # the masks, (..., B, mapping_dim) each
        prior: Tensor | float = 1.0
        for step_logits in logits.unbind(-3):
            steps.append(layers.sparsemax(step_logits * prior))
            prior = prior * (self.gamma - steps[-1])  # features once used become less likely
        masks = torch.stack(steps, dim=-3)
        sparsity = (masks * torch.log(masks + self.epsilon)).sum(dim=(-3, -2, -1))
        return self.final_score(out[..., 1:, :, :]), sparsity / (self.n_steps * probs.shape[-2])

    def final_score(self, features: Tensor) -> Tensor:
        """features: (..., n_steps, B, n_d + n_a) to (..., B)."""
        decision = features[..., : self.n_d].relu().sum(dim=-3)
        return (decision @ self.final_weight.mT).squeeze(-1)

    @torch.inference_mode()
    def predict(self, probs: Any, calibrated: bool = True, batch_size: int | None = None) -> Any:
        """Confidences of many rows, in evaluation mode whatever the mode of the module.

        Args:
            probs: (N, n), each row sorted from largest to smallest; of torch or numpy, or what numpy takes, in any
                floating dtype, layout and device. Scored as float32.
            calibrated: apply the calibration, if the network has one. False gives the network's own output.
            batch_size: rows at a time, which bounds the memory: by default few, which stay in a processor's cache, and
                on other devices many, after each of which the checks wait for them.

        Returns:
            (N,) float32, on the same device for torch, else numpy.

        Raises:
            ValueError: the rows are not sorted probabilities.
        """
        rows = probs.detach() if isinstance(probs, Tensor) else np.asanyarray(probs)
        _check_rows(rows)
        device = self.final_weight.device
        if batch_size is None:
            batch_size = 512 if device.type == "cpu" else max(2**25 // rows.shape[1], 1)
        if batch_size < 1:  # a negative one would score nothing
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        self._warn_of_other_classes(rows.shape[1])
        scorer = _Scorer(self)
        calibration = self.calibration if calibrated else None
        scores = torch.empty(len(rows), dtype=torch.float32, device=device)
        for start in range(0, len(rows), batch_size):
            given = _as_tensor(rows[start : start + batch_size])
            check_sorted_probs(given.to("cpu", torch.float32).numpy(), first=start + 1)
            block = given.to(device, torch.float32).contiguous()  # what was on the CPU is checked before it goes there
            filled = _fill(block)
            raw = scorer(filled)
            filled_scores = raw if calibration is None else calibration.apply(raw, filled)
            scores[start : start + batch_size] = filled_scores[: len(block)]
        return scores.to(rows.device) if isinstance(rows, Tensor) else scores.cpu().numpy()

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
        weights.write_weights(path, *self._content())

    def _content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        calibration = None if self.calibration is None else self.calibration.to_json()
        return weights.to_params(vars(self), calibration, self.metadata), to_released_state(self)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "CLCNet":
        """Read a weights file, ours or a released one. Pickled code is never run.

        Args:
            path: of the zip.
            device: to put the network on.

        Returns:
            The network in evaluation mode.

        Raises:
            OSError: there is no such file.
            ValueError: the file is not a CLCNet weights file; the message says what is wrong with it.
        """
        content = read_bytes(Path(path), weights.LARGEST_MEMBER)
        try:
            return cls._made_of(*weights.read_weights(content)).to(device)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None

    @classmethod
    def _made_of(cls, params: dict[str, Any], arguments: dict[str, Any], state: dict[str, Any]) -> "CLCNet":
        model = cls(**arguments)
        load_released_state(model, state)
        model.calibration = Calibration.from_json(params.get("calibration"))
        model.metadata = weights.metadata_of(params)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        weights.write_pretrained(save_directory, *self._content())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str | torch.device = "cpu", **options: Any) -> "CLCNet":
        files = [hub.fetch(model_id, name, options) for name in (weights.CONFIG_FILE, weights.TENSORS_FILE)]
        try:
            return cls._made_of(*weights.read_pretrained(*files)).to(device)
        except ValueError as problem:
            text = str(problem).replace(weights.PARAMS_MEMBER, weights.CONFIG_FILE)
            raise ValueError(f"{model_id}: {text.replace(weights.STATE_MEMBER, weights.TENSORS_FILE)}") from None

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What it was trained on and how well it judged there, by its metadata."""
        return hub.clcnet_card(self.num_classes, self.calibration is not None, self.metadata)


# ---------------------------------------------------------------------------------------------------------- scoring


class _Scorer:
    """A CLCNet made ready to score many rows: batch norms folded into the linear layers, which then have a bias."""

    def __init__(self, model: CLCNet) -> None:
        self.model = model
        self.layers = []  # each a weight (steps, inputs, outputs) and a bias (steps, 1, outputs)
        for weight, norm in model.feature_transformers.gated_layers(STEPS):
            scale, bias = (part[STEPS].unsqueeze(-2) for part in norm.scale_and_shift())
            self.layers.append((weight.mT * scale, bias))
        self.workspace: Tensor | None = None

    def __call__(self, probs: Tensor) -> Tensor:
        """Raw scores (B,) of rows (B, n), as `model(probs)` gives in evaluation mode."""
        model, attention = self.model, self.model.attention
        if self.workspace is None or self.workspace.shape != probs.shape:
            self.workspace = torch.empty_like(probs)
        weighted, total = layers.attention_weighted(probs, attention.slope(probs[:, :1]), out=self.workspace)
        mapped = layers.descending(layers.times_gaussian(weighted, model.mapping_dim).div_(total))
        (weight, bias), *others = self.layers
        x = nn.functional.glu(torch.baddbmm(bias, mapped.expand(len(weight), -1, -1), weight), dim=-1)
        for weight, bias in others:
            x = x.add_(nn.functional.glu(torch.baddbmm(bias, x, weight), dim=-1)).mul_(layers.RESIDUAL_SCALE)
        return model.final_score(x)

    def largest_number(self) -> float:
        """No number on the way to any row's score is larger, NaN if some may be no number: all signs taken to agree.

        Restricted self-attention gives at most 1; a gate lets through at most all.
        """
        x: Tensor | None = None
        for weight, bias in self.layers:
            inputs = weight.new_ones(1, 1, weight.shape[1]) if x is None else x
            both = torch.baddbmm(bias.abs(), inputs.expand(len(weight), -1, -1), weight.abs())
            gated = torch.maximum(*both.chunk(2, dim=-1))
            x = gated if x is None else (x + gated) * layers.RESIDUAL_SCALE
        assert x is not None
        return float((x[:, 0, : self.model.n_d].sum(dim=0) @ self.model.final_weight.mT.abs()).max())


def _check_rows(rows: Tensor | NDArray[Any]) -> None:
    if isinstance(rows, Tensor):
        good = rows.is_floating_point() and rows.layout == torch.strided and rows.device.type != "meta"
    else:
        good = rows.dtype.kind == "f" and not isinstance(rows, np.ma.MaskedArray)
    if not good or rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(
            "probabilities must be plain floating-point numbers of shape (N, n) with n >= 2, not a "
            f"{type(rows).__name__} of {rows.dtype} and shape {tuple(rows.shape)}"
        )


def _as_tensor(rows: Tensor | NDArray[Any]) -> Tensor:
    """Torch takes no reversed, foreign-endian or long arrays, and warns of read-only ones."""
    if isinstance(rows, Tensor):
        return rows.resolve_neg()
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as inf
        return torch.from_numpy(np.require(rows, np.float32, ["C", "W", "E"]))


def _fill(rows: Tensor) -> Tensor:
    """Repeat the last row until there are whole groups of rows.

    Products of matrices round the rows that are left over otherwise, and a row's score must not depend on those that it
    is asked about with: a resumed run would end with other digits.
    """
    missing = -len(rows) % _GROUP
    return torch.cat([rows, rows[-1:].expand(missing, -1)]) if missing else rows


# --------------------------------------------------------------------------------------------------- released names


def released_names(model: CLCNet) -> Iterator[tuple[str, Tensor]]:
    """All that our network holds, under its released names; a shared layer has several."""
    encoder = "tabnet.encoder."
    attention, transformers, attentive = model.attention, model.feature_transformers, model.attentive_transformers
    yield f"{encoder}res_att.query.weight", attention.query_weight.unsqueeze(-1)
    yield f"{encoder}res_att.query.bias", attention.query_bias
    yield f"{encoder}res_att.key.weight", attention.key_weight.unsqueeze(-1)
    for block in range(model.n_steps + 1):
        name = f"{encoder}feat_transformers.{block - 1}" if block else f"{encoder}initial_splitter"
        for layer, (weight, norm) in enumerate(transformers.gated_layers()):
            if layer < model.n_shared:
                prefix = f"{name}.shared.glu_layers.{layer}."
                yield f"{name}.shared.shared_layers.{layer}.weight", weight[0]
            else:
                prefix = f"{name}.specifics.glu_layers.{layer - model.n_shared}."
            yield f"{prefix}fc.weight", weight[block % len(weight)]  # of a shared layer there is one
            yield from _norm_names(f"{prefix}bn.bn.", norm, block)
    for step in range(model.n_steps):
        yield f"{encoder}att_transformers.{step}.fc.weight", attentive.weight[step]
        yield from _norm_names(f"{encoder}att_transformers.{step}.bn.bn.", attentive.norm, step)
    yield "tabnet.final_mapping.weight", model.final_weight


def _norm_names(prefix: str, norm: GhostBatchNorm, block: int) -> Iterator[tuple[str, Tensor]]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield prefix + name, getattr(norm, name)[block]


def _unread_state(model: CLCNet) -> dict[str, Tensor]:
    """What the released network carries and never reads, at its neutral values."""
    state = {}
    for prefix in ("tabnet.initial_bn.", "tabnet.encoder.initial_bn."):
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            state[prefix + name] = torch.full((model.num_classes,), value)
    prefix = "tabnet.encoder.nor_att."
    for name, width in (("query", layers.QUERY_WIDTH), ("key", layers.QUERY_WIDTH), ("value", model.mapping_dim)):
        state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"] = torch.zeros(width, 1), torch.zeros(width)
    state["tabnet.encoder.res_att.key.bias"] = torch.zeros(layers.QUERY_WIDTH)
    return state


def to_released_state(model: CLCNet) -> dict[str, Tensor]:
    named = list(released_names(model))
    # one copy a tensor: shared layers stay shared in the file, and nothing else of a larger storage gets in
    copies = {tensor.data_ptr(): tensor.detach().cpu().clone() for _, tensor in named}
    state = {name: copies[tensor.data_ptr()] for name, tensor in named}
    state |= _unread_state(model)
    counters = [name.removesuffix("running_var") + "num_batches_tracked" for name in state if "running_var" in name]
    return state | {name: torch.tensor(0) for name in counters}


def load_released_state(model: CLCNet, state: dict[str, Any]) -> None:
    """Copy a released state dict into the model, after checking every name, shape and number."""
    ours = dict(released_names(model))
    weights.check_state(state, ours, _unread_state(model))
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name])
        if not _Scorer(model).largest_number() < LARGEST_SCORE:
            largest, name = max((float(tensor.abs().max()), name) for name, tensor in ours.items())
            raise ValueError(
                f"{name} in {weights.STATE_MEMBER} holds {largest:g}: scores may be no numbers; train it again"
            )
