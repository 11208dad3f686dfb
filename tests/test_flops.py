"""Multiply-adds against published figures and against counts by hand."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from clcnet.classifiers.flops import count_flops

# timm's published multiply-adds (billions) at native sizes; the counter finds 1.5 to 3.5% less, as it leaves out
# normalisation, activations and pooling
PUBLISHED = {
    "tf_efficientnet_b0": 0.40,
    "tf_efficientnet_b1": 0.71,
    "tf_efficientnet_b2": 1.02,
    "tf_efficientnet_b3": 1.87,
    "tf_efficientnet_b4": 4.49,
    "tf_efficientnet_b5": 10.46,
    "tf_efficientnet_b6": 19.40,
    "tf_efficientnet_b7": 38.33,
}


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_efficientnets_at_native_size_agree_with_timms_figures_within_five_percent(name: str, published: float) -> None:
    model = meta_model(name)
    assert count_flops(model, resolve_model_data_config(model)["input_size"]) == pytest.approx(published, rel=0.05)


def test_attention_is_counted_so_a_vision_transformer_has_its_published_figure() -> None:
    assert count_flops(meta_model("vit_base_patch16_224"), (3, 224, 224)) == pytest.approx(17.56, rel=0.005)


def test_a_convolution_and_a_linear_layer_count_as_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 8, 5)).eval()
    assert count_flops(model, (3, 8, 8)) * 1e9 == pytest.approx(8 * 8 * 4 * 3 * 9 + 4 * 8 * 8 * 5)


def test_a_model_that_makes_tensors_on_a_real_device_is_counted_with_a_real_image() -> None:
    class OwnTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(images.flatten(1)) + torch.ones(2, device="cpu")

    assert count_flops(OwnTensor().eval(), (3, 2, 2)) * 1e9 == pytest.approx(24)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("test_resnet").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_flops(model, (3, 64, 64))
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
