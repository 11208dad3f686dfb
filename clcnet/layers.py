"""The layers of CLCNet: sparsemax, ghost batch norm, restricted self-attention, and the TabNet encoder's blocks.

CLCNet: arXiv:2205.09612, section 3. TabNet: arXiv:1908.07442. Two departures in how things are computed, none in what:

* Restricted self-attention keeps only the query of position 0. The key's bias cancels in the softmax, so `q_0 . k_i` is
  `slope * x_i` with one `slope` a row, and the whole layer costs O(n) a row.
* Every layer works on the last two dimensions, (rows, features). Parameters may carry a leading dimension of models,
  (models, ...), and then one call trains or scores that many networks at once; see `clcnet.training`.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

QUERY_WIDTH = 10
GAUSSIAN_WIDTH = 0.01  # standard deviation of the kernel, as a share of the row


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        descending = logits.sort(dim=-1, descending=True).values
        excess = descending.cumsum(dim=-1) - 1
        rank = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
        support = (rank * descending > excess).sum(dim=-1, keepdim=True)
        threshold = excess.gather(-1, support - 1) / support
        weights = (logits - threshold).clamp_(min=0)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        support = (weights > 0).to(grad.dtype)
        mean = (grad * support).sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True)
        return (grad - mean) * support


def sparsemax(logits: Tensor) -> Tensor:
    """Euclidean projection of each row onto the probability simplex (arXiv:1602.02068).

    Args:
        logits: (..., F).

    Returns:
        (..., F), rows sum to 1, most entries exactly 0.
    """
    return _Sparsemax.apply(logits)  # type: ignore[no-any-return, no-untyped-call]


class Linear(nn.Module):
    """Linear layer without bias: (..., rows, inputs) -> (..., rows, outputs)."""

    def __init__(self, num_inputs: int, num_outputs: int, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        nn.init.xavier_normal_(self.weight, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def tabnet_gain(num_inputs: int, num_outputs: int, gated: bool) -> float:
    """Gain of the Xavier initialisation in TabNet; layers in front of a gate start twice as wide."""
    return math.sqrt((num_inputs + num_outputs) / math.sqrt(num_inputs if gated else 4 * num_inputs))


class GhostBatchNorm(nn.Module):
    """Batch norm over virtual batches (arXiv:1705.08741), all of them in one go.

    In training, rows are cut into `ceil(rows / virtual_batch_size)` parts of equal size (the last may be shorter), each
    part is normalised by its own mean and variance, and the running statistics take the parts in as if one after another.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, virtual_batch_size: int, momentum: float, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            scale, shift = self.scale_and_shift()
            return x * scale.unsqueeze(-2) + shift.unsqueeze(-2)
        num_rows = x.shape[-2]
        if num_rows < 2:
            raise ValueError(f"a training batch has {num_rows} row(s); batch norm needs at least 2")
        part = math.ceil(num_rows / math.ceil(num_rows / self.virtual_batch_size))
        num_whole = num_rows // part
        whole = x[..., : num_whole * part, :].unflatten(-2, (num_whole, part))
        normalised = self._normalise(whole).flatten(-3, -2)
        if num_whole * part == num_rows:
            return normalised
        rest = self._normalise(x[..., num_whole * part :, :].unsqueeze(-3)).squeeze(-3)
        return torch.cat([normalised, rest], dim=-2)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """In evaluation this layer is `x * scale + shift`, both (..., F)."""
        scale = self.weight * torch.rsqrt(self.running_var + self.epsilon)
        return scale, self.bias - self.running_mean * scale

    def _normalise(self, parts: Tensor) -> Tensor:
        """Normalise (..., parts, rows, F) part by part and take the statistics in."""
        var, mean = torch.var_mean(parts, dim=-2, correction=0, keepdim=True)  # (..., parts, 1, F)
        if self.momentum > 0:
            self._update_running(mean.detach().squeeze(-2), var.detach().squeeze(-2), parts.shape[-2])
        weight, bias = self.weight[..., None, None, :], self.bias[..., None, None, :]
        scale = torch.rsqrt(var + self.epsilon) * weight
        return parts * scale + (bias - mean * scale)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, num_rows: int) -> None:
        """Exponential moving average over the parts in order; mean, var: (..., parts, F). Variances unbiased."""
        keep = 1 - self.momentum
        num_parts = mean.shape[-2]
        ages = torch.arange(num_parts - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        share = (self.momentum * keep**ages).unsqueeze(-1)
        unbiased = num_rows / max(num_rows - 1, 1)
        self.running_mean.mul_(keep**num_parts).add_((share * mean).sum(dim=-2))
        self.running_var.mul_(keep**num_parts).add_((share * var).sum(dim=-2), alpha=unbiased)


@lru_cache(maxsize=32)
def gaussian_basis(num_positions: int, mapping_dim: int, device: torch.device) -> Tensor:
    """The fixed value matrix: `exp(-(t_j - i/n)^2 / (2 * 0.01^2))`, (n, mapping_dim)."""
    positions = torch.arange(num_positions, dtype=torch.float64) / num_positions
    centres = torch.linspace(0, 1, mapping_dim, dtype=torch.float64)
    basis = torch.exp(-((centres - positions[:, None]) ** 2) / (2 * GAUSSIAN_WIDTH**2))
    return basis.float().to(device)


class _AttentionPool(torch.autograd.Function):
    """`h_j = sum_i softmax_i(slope * x_i) x_i g_ij` with its derivative by `slope`, the one thing that learns.

    Keeping dh/dslope (rows x 100) instead of the graph spares the backward pass everything of length n:
    `da_i/dslope = a_i (x_i - mean)` where `mean = sum_i a_i x_i`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, basis: Tensor) -> Tensor:
        weighted, total = attention_weighted(x, slope)
        pooled = weighted @ basis / total
        mean = weighted.sum(dim=-1, keepdim=True) / total
        ctx.save_for_backward((weighted.mul_(x) @ basis) / total - mean * pooled)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (derivative,) = ctx.saved_tensors
        return None, (grad * derivative).sum(dim=-1, keepdim=True), None


def attention_weighted(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """`exp(slope * x_i) * x_i` and `sum_i exp(slope * x_i)`, both over the same factor, which keeps them finite.

    Args:
        x: (..., B, n), rows in descending order, so the largest exponent is at one of the two ends.
        slope: (..., B, 1).
    """
    end = torch.where(slope > 0, x[..., :1], x[..., -1:])
    weights = (x - end).mul_(slope).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.mul_(x), total


class RestrictedSelfAttention(nn.Module):
    """RSA (arXiv:2205.09612, section 3.1): any number of sorted probabilities to `mapping_dim` sorted numbers.

    Only the top probability asks; the value matrix is a fixed Gaussian basis.
    """

    def __init__(self, mapping_dim: int = 100) -> None:
        super().__init__()
        self.mapping_dim = mapping_dim
        # One input feature: PyTorch's own initialisation of a linear layer draws from [-1, 1] then.
        self.query_weight = nn.Parameter(torch.empty(QUERY_WIDTH).uniform_(-1, 1))
        self.query_bias = nn.Parameter(torch.empty(QUERY_WIDTH).uniform_(-1, 1))
        self.key_weight = nn.Parameter(torch.empty(QUERY_WIDTH).uniform_(-1, 1))

    def slope(self, top: Tensor) -> Tensor:
        """The factor of x_i in `q_0 . k_i / sqrt(mapping_dim)`; top: (..., B, 1), returns (..., B, 1)."""
        weight = (self.query_weight * self.key_weight).sum(dim=-1)[..., None, None]
        bias = (self.query_bias * self.key_weight).sum(dim=-1)[..., None, None]
        return (top * weight + bias) / math.sqrt(self.mapping_dim)

    def forward(self, probs: Tensor) -> Tensor:
        basis = gaussian_basis(probs.shape[-1], self.mapping_dim, probs.device)
        pooled: Tensor = _AttentionPool.apply(probs, self.slope(probs[..., :1]), basis)  # type: ignore[no-untyped-call]
        return pooled.sort(dim=-1, descending=True).values


class GatedLinear(nn.Module):
    """Linear, ghost batch norm, gated linear unit. Several of them may share one `linear`."""

    def __init__(self, linear: Linear, width: int, virtual_batch_size: int, momentum: float) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GhostBatchNorm(2 * width, virtual_batch_size, momentum)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(self.norm(self.linear(x)), dim=-1)


class FeatureTransformer(nn.Module):
    """TabNet's feature transformer: gated layers with residuals, the first ones on linear layers shared by all steps."""

    residual_scale = math.sqrt(0.5)

    def __init__(self, shared: list[Linear], own: list[Linear], width: int, virtual_batch_size: int, momentum: float):
        super().__init__()
        linears = shared + own
        self.layers = nn.ModuleList(GatedLinear(linear, width, virtual_batch_size, momentum) for linear in linears)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = (x + layer(x)) * self.residual_scale
        return x

    def gated_layers(self) -> Iterator[GatedLinear]:
        """The gated layers in order, typed."""
        for layer in self.layers:
            assert isinstance(layer, GatedLinear)
            yield layer


class AttentiveTransformer(nn.Module):
    """TabNet's mask of one step: which of the mapped features it should look at."""

    def __init__(self, width: int, num_features: int, virtual_batch_size: int, momentum: float) -> None:
        super().__init__()
        self.linear = Linear(width, num_features, tabnet_gain(width, num_features, gated=False))
        self.norm = GhostBatchNorm(num_features, virtual_batch_size, momentum)

    def forward(self, prior: Tensor, attended: Tensor) -> Tensor:
        return sparsemax(self.norm(self.linear(attended)) * prior)
