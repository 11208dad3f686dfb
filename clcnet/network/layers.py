"""The layers of CLCNet: sparsemax, ghost batch norm, restricted self-attention, and TabNet's transformers.

CLCNet: arXiv:2205.09612, section 3. TabNet: arXiv:1908.07442. What is computed is theirs; how it is computed is not:

* Restricted self-attention keeps only the query of position 0. The key's bias cancels in the softmax, so `q_0 . k_i` is
  `slope * x_i` plus a constant, with one `slope` a row, and the whole layer costs O(n) a row.
* The feature transformers of all steps live in one module, in parameters with a leading dimension of blocks, and run
  at once where the steps have the same input.
* Every layer works on the last dimensions. Parameters may carry a leading dimension of models as well, and then one
  call trains or scores that many networks; see `clcnet.network.training`.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

QUERY_WIDTH = 10
GAUSSIAN_WIDTH = 0.01  # standard deviation of the kernel, as a share of the row
GAUSSIAN_REACH = 7.0  # standard deviations; beyond them the kernel is below 3e-11 and left out
BAND = 200  # positions that share one block of the banded product; fewer make the blocks too small to be fast
RESIDUAL_SCALE = math.sqrt(0.5)
ALL = slice(None)

Like = tuple[torch.dtype, torch.device]  # of the tensor that a cached one is to go with


def descending(x: Tensor) -> Tensor:
    """The last dimension sorted from largest to smallest; no gradient. NumPy's sort is ten times torch's on a CPU."""
    if torch.compiler.is_compiling():
        return x.topk(x.shape[-1]).values  # ONNX has no other sort
    if x.device.type != "cpu":
        return x.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(x.detach().numpy(), axis=-1)).flip(-1)


def _descending_order(x: Tensor) -> Tensor:
    """Indices that sort the last dimension from largest to smallest."""
    if torch.compiler.is_compiling():
        return x.topk(x.shape[-1]).indices
    if x.device.type != "cpu":
        return x.argsort(dim=-1, descending=True)
    return torch.from_numpy(np.argsort(x.detach().numpy(), axis=-1)).flip(-1)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        top_first = descending(logits)
        excess = top_first.cumsum(dim=-1).sub_(1)
        rank = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
        support = (top_first.mul_(rank) > excess).sum(dim=-1, keepdim=True).clamp_(min=1)
        threshold = excess.gather(-1, support - 1) / support
        weights = (logits - threshold).clamp_(0, 1)  # both ends: of logits beyond 2**24, rounding may leave either
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        support = (weights > 0).to(grad.dtype)
        grad = grad * support
        return grad.sub_(support.mul_(grad.sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True)))


def sparsemax(logits: Tensor) -> Tensor:
    """Euclidean projection of each row onto the probability simplex (arXiv:1602.02068).

    Args:
        logits: (..., F).

    Returns:
        (..., F), rows sum to 1, most entries exactly 0.
    """
    weights: Tensor = _Sparsemax.apply(logits)
    return weights


def linear_weight(*shape: int, gated: bool) -> nn.Parameter:
    """Weights (..., outputs, inputs) of a linear layer without bias, drawn as TabNet draws them.

    Xavier with TabNet's gain; layers in front of a gate start twice as wide.
    """
    num_outputs, num_inputs = shape[-2:]
    gain = math.sqrt((num_inputs + num_outputs) / math.sqrt(num_inputs if gated else 4 * num_inputs))
    return nn.Parameter(torch.randn(shape) * gain * math.sqrt(2 / (num_inputs + num_outputs)))


class _Normalise(torch.autograd.Function):
    """Rows (..., R, F) to mean 0 and variance 1 over R; also returns both, (..., 1, F). Few passes over the data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(dim=-2, keepdim=True)
        centred = x - mean
        variance = centred.square().mean(dim=-2, keepdim=True)
        inverse = torch.rsqrt(variance + epsilon)
        normalised = centred.mul_(inverse)
        ctx.save_for_backward(normalised, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return normalised, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        normalised, inverse = ctx.saved_tensors
        along = (grad * normalised).mean(dim=-2, keepdim=True)
        return (grad - grad.mean(dim=-2, keepdim=True)).addcmul_(normalised, along, value=-1).mul_(inverse), None


class GhostBatchNorm(nn.Module):
    """Batch norm over virtual batches (arXiv:1705.08741), all of them in one go.

    In training, rows are cut into `ceil(rows / virtual_batch_size)` parts of equal size (the last may be shorter). Each
    is normalised by its own mean and variance, and the running statistics take them in as if one after another.

    Args:
        num_blocks: sets of parameters, for as many steps of the encoder.
        num_features: F.
        virtual_batch_size: rows normalised together in training.
        momentum: weight of a part in the running statistics; 0 leaves them as they are.
    """

    epsilon = 1e-5
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_blocks: int, num_features: int, virtual_batch_size: int, momentum: float) -> None:
        super().__init__()
        self.virtual_batch_size = virtual_batch_size
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_blocks, num_features))
        self.bias = nn.Parameter(torch.zeros(num_blocks, num_features))
        self.register_buffer("running_mean", torch.zeros(num_blocks, num_features))
        self.register_buffer("running_var", torch.ones(num_blocks, num_features))

    def forward(self, x: Tensor, blocks: slice = ALL) -> Tensor:
        """x: (..., blocks or 1, B, F) to (..., blocks, B, F)."""
        if not self.training:
            scale, shift = self.scale_and_shift()
            return torch.addcmul(shift[..., blocks, None, :], x, scale[..., blocks, None, :])
        num_rows = x.shape[-2]
        if num_rows < 2:
            raise ValueError(f"a training batch has {num_rows} row(s); batch norm needs at least 2")
        part = math.ceil(num_rows / math.ceil(num_rows / self.virtual_batch_size))
        num_whole = num_rows // part
        whole = x[..., : num_whole * part, :]
        normalised = self._normalise(whole.reshape(*x.shape[:-2], num_whole, part, x.shape[-1]), blocks)
        if num_whole * part < num_rows:
            rest = self._normalise(x[..., num_whole * part :, :].unsqueeze(-3), blocks)
            normalised = torch.cat([normalised, rest], dim=-2)
        return torch.addcmul(self.bias[..., blocks, None, :], normalised, self.weight[..., blocks, None, :])

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """In evaluation this layer is `x * scale + shift`, both (..., blocks, F)."""
        scale = self.weight * torch.rsqrt(self.running_var + self.epsilon)
        return scale, self.bias - self.running_mean * scale

    def _normalise(self, parts: Tensor, blocks: slice) -> Tensor:
        """Normalise (..., parts, rows, F) part by part, take the statistics in, and return (..., rows, F)."""
        normalised, mean, variance = _Normalise.apply(parts, self.epsilon)
        if self.momentum > 0:
            self._update_running(mean.squeeze(-2), variance.squeeze(-2), parts.shape[-2], blocks)
        flat: Tensor = normalised.flatten(-3, -2)
        return flat

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, num_rows: int, blocks: slice) -> None:
        """Exponential moving average over the parts in order; mean, variance: (..., parts, F). Variances unbiased."""
        keep = 1 - self.momentum
        num_parts = mean.shape[-2]
        ages = torch.arange(num_parts - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        share = (self.momentum * keep**ages).unsqueeze(-1)
        unbiased = num_rows / max(num_rows - 1, 1)
        for running, values in ((self.running_mean, mean), (self.running_var, variance * unbiased)):
            running[..., blocks, :] = running[..., blocks, :] * keep**num_parts + (share * values).sum(dim=-2)


@lru_cache(maxsize=32)
def gaussian_basis(num_positions: int, mapping_dim: int, like: Like) -> Tensor:
    """The fixed value matrix: `exp(-(t_j - i/n)^2 / (2 * 0.01^2))`, (n, mapping_dim)."""
    positions = torch.arange(num_positions, dtype=torch.float64) / num_positions
    centres = torch.linspace(0, 1, mapping_dim, dtype=torch.float64)
    basis = torch.exp(-((centres - positions[:, None]) ** 2) / (2 * GAUSSIAN_WIDTH**2))
    dtype, device = like
    return basis.to(dtype).to(device)


@lru_cache(maxsize=32)
def _bands(num_positions: int, mapping_dim: int, like: Like) -> list[tuple[slice, slice, Tensor]]:
    """The basis cut into blocks of positions, each with the few columns that it reaches."""
    basis = gaussian_basis(num_positions, mapping_dim, like)
    reach = GAUSSIAN_REACH * GAUSSIAN_WIDTH
    bands = []
    for start in range(0, num_positions, BAND):
        stop = min(start + BAND, num_positions)
        first = max(0, math.floor((start / num_positions - reach) * (mapping_dim - 1)))
        last = min(mapping_dim, math.ceil(((stop - 1) / num_positions + reach) * (mapping_dim - 1)) + 1)
        rows, columns = slice(start, stop), slice(first, last)
        bands.append((rows, columns, basis[rows, columns].contiguous()))
    return bands


def times_gaussian(x: Tensor, mapping_dim: int) -> Tensor:
    """`x @ gaussian_basis(n, mapping_dim)` for x (..., n), leaving out what the kernel does not reach."""
    num_positions, like = x.shape[-1], (x.dtype, x.device)
    if num_positions <= BAND or torch.compiler.is_compiling():
        return x @ gaussian_basis(num_positions, mapping_dim, like)
    rows = x.reshape(-1, num_positions)
    product = torch.zeros(len(rows), mapping_dim, dtype=x.dtype, device=x.device)
    for positions, columns, basis in _bands(num_positions, mapping_dim, like):
        product[:, columns].addmm_(rows[:, positions], basis)
    return product.view(*x.shape[:-1], mapping_dim)


def attention_weighted(x: Tensor, slope: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`exp(slope * x_i) * x_i` and `sum_i exp(slope * x_i)`, both over the same factor, which keeps them finite.

    Args:
        x: (..., B, n), rows in descending order, so the largest exponent is at one of the two ends.
        slope: (..., B, 1).
        out: as x, to hold the first result.
    """
    end = torch.where(slope > 0, x[..., :1], x[..., -1:])
    weights = torch.sub(x, end, out=out).mul_(slope).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return weights.mul_(x), total


class _SortedPool(torch.autograd.Function):
    """`h_j = sum_i softmax_i(slope * x_i) x_i g_ij`, sorted, with its derivative by `slope`, all that is learned.

    Keeping dh/dslope (B, mapping_dim) instead of the graph spares the backward pass everything of length n:
    `da_i/dslope = a_i (x_i - mean)` where `mean = sum_i a_i x_i`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, mapping_dim: int) -> Tensor:
        weighted, total = attention_weighted(x, slope)
        pooled = times_gaussian(weighted, mapping_dim).div_(total)
        order = _descending_order(pooled)
        mean = weighted.sum(dim=-1, keepdim=True) / total
        derivative = times_gaussian(weighted.mul_(x), mapping_dim).div_(total).addcmul_(mean, pooled, value=-1)
        ctx.save_for_backward(derivative.gather(-1, order))
        return pooled.gather(-1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return None, (grad * derivative).sum(dim=-1, keepdim=True), None


class RestrictedSelfAttention(nn.Module):
    """RSA (arXiv:2205.09612, section 3.1): any number of sorted probabilities to `mapping_dim` sorted numbers.

    Only the top probability asks; the value matrix is a fixed Gaussian basis.
    """

    def __init__(self, mapping_dim: int) -> None:
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
        return torch.addcmul(bias, top, weight) / math.sqrt(self.mapping_dim)

    def forward(self, probs: Tensor) -> Tensor:
        """probs: (..., B, n), rows sorted; returns (..., B, mapping_dim), rows sorted."""
        slope = self.slope(probs[..., :1])
        pooled: Tensor = _SortedPool.apply(probs, slope, self.mapping_dim)
        return pooled


class FeatureTransformers(nn.Module):
    """TabNet's feature transformers of all blocks: gated layers with residuals, the first ones on shared weights.

    Args:
        num_blocks: the encoder's initial splitter, then its steps.
        num_inputs: width of the input.
        width: width of the output.
        num_shared: gated layers whose linear weights all blocks share; at least 1.
        num_own: gated layers with weights of each block's own.
        virtual_batch_size: of ghost batch norm.
        momentum: of ghost batch norm.
    """

    def __init__(
        self,
        num_blocks: int,
        num_inputs: int,
        width: int,
        num_shared: int,
        num_own: int,
        virtual_batch_size: int,
        momentum: float,
    ) -> None:
        super().__init__()
        inputs = [num_inputs] + [width] * (num_shared - 1)
        self.shared = nn.ParameterList(linear_weight(2 * width, size, gated=True) for size in inputs)
        self.own = nn.ParameterList(linear_weight(num_blocks, 2 * width, width, gated=True) for _ in range(num_own))
        self.norms = nn.ModuleList(
            GhostBatchNorm(num_blocks, 2 * width, virtual_batch_size, momentum) for _ in range(num_shared + num_own)
        )

    def forward(self, x: Tensor, blocks: slice = ALL) -> Tensor:
        """x: (..., blocks or 1, B, num_inputs) to (..., blocks, B, width)."""
        first, *others = self.gated_layers(blocks)
        x = self._gated(x, *first, blocks)
        for weight, norm in others:
            x = (x + self._gated(x, weight, norm, blocks)) * RESIDUAL_SCALE
        return x

    def gated_layers(self, blocks: slice = ALL) -> list[tuple[Tensor, GhostBatchNorm]]:
        """Of every gated layer the linear weight, (..., blocks or 1, outputs, inputs), and the batch norm."""
        weights = [weight.unsqueeze(-3) for weight in self.shared] + [weight[..., blocks, :, :] for weight in self.own]
        return list(zip(weights, (norm for norm in self.norms if isinstance(norm, GhostBatchNorm)), strict=True))

    @staticmethod
    def _gated(x: Tensor, weight: Tensor, norm: GhostBatchNorm, blocks: slice) -> Tensor:
        return nn.functional.glu(norm(x @ weight.mT, blocks), dim=-1)


class AttentiveTransformers(nn.Module):
    """The part of TabNet's attentive transformers in front of the prior and sparsemax, for all steps."""

    def __init__(self, num_steps: int, width: int, num_features: int, virtual_batch_size: int, momentum: float):
        super().__init__()
        self.weight = linear_weight(num_steps, num_features, width, gated=False)
        self.norm = GhostBatchNorm(num_steps, num_features, virtual_batch_size, momentum)

    def forward(self, attended: Tensor) -> Tensor:
        """attended: (..., steps, B, width) to logits (..., steps, B, num_features)."""
        logits: Tensor = self.norm(attended @ self.weight.mT)
        return logits
