"""A timm model of one layer, for loads that are to try the project and not the processor: `one_layer`, 8x8 pixels."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, save_for_hf
from torch import nn

SIDE = 8
CLASSES = ["ant", "bee", "cat"]


class OneLayer(nn.Module):
    """All pixels, one linear layer."""

    def __init__(self, num_classes: int = 3, in_chans: int = 3, **_: Any) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, in_chans * SIDE * SIDE
        self.fc = nn.Linear(self.num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(images.flatten(1))
        return logits


_facts = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "classifier": "fc", "num_classes": 3, "label_names": CLASSES}
default_cfgs = generate_default_cfgs({"one_layer.untrained": _facts})


@register_model
def one_layer(pretrained: bool = False, **kwargs: Any) -> OneLayer:
    model: OneLayer = build_model_with_cfg(OneLayer, "one_layer", pretrained, **kwargs)
    return model


def save_one_layer(folder: Path, seed: int) -> Path:
    """Save one with random weights, for `local-dir:`; returns the folder."""
    torch.manual_seed(seed)
    save_for_hf(timm.create_model("one_layer"), folder, safe_serialization=True)
    return folder
