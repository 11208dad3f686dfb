"""Counting a model's multiply-adds, the unit of every FLOPs figure here (0.39 billion for EfficientNet-B0)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, input_size: Sequence[int]) -> float:
    """Count the multiply-adds of one image, matrix products of attention included.

    PyTorch's counter counts a multiply and an add as two, the literature on EfficientNets as one; hence the half.

    Args:
        model: a classifier in evaluation mode, not compiled; it stays as it is.
        input_size: (channels, height, width).

    Returns:
        Billions of multiply-adds.
    """
    try:
        return _count(model, input_size, "meta")
    except (RuntimeError, NotImplementedError, TypeError):
        # a model that makes tensors of its own on a real device cannot run on shapes alone: show it an image
        return _count(model, input_size, next(model.parameters()).device)


@torch.inference_mode()
def _count(model: nn.Module, input_size: Sequence[int], device: torch.device | str) -> float:
    tensors = {name: tensor.to(device) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    image = torch.zeros(1, *input_size, device=device)
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, tensors, (image,))
    return counter.get_total_flops() / 2 / 1e9
