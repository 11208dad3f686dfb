"""For the tests: random networks and rows, the released network of the reference file, and a classifier asked alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from clcnet.classifiers.classifier import Classifier
from clcnet.classifiers.schedule import cut
from clcnet.classifiers.stream import Batch, stream
from clcnet.data.images import ImageSet
from clcnet.network.model import CLCNet, load_released_state

REFERENCE = Path(__file__).parent / "data" / "clcnet_reference.npz"


def read_reference() -> dict[str, np.ndarray]:
    """What the released implementation computed: `state/`, the network of n = 50, and its figures."""
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


def part_of(reference: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.from_numpy(value) for name, value in reference.items() if prefix in name}


def released_network() -> CLCNet:
    """The network of the reference file."""
    model = CLCNet(num_classes=50)
    load_released_state(model, part_of(read_reference(), "state/"))
    return model.eval()


def sorted_rows(num_rows: int, num_classes: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (num_rows, num_classes))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -np.sort(-probs, axis=1).astype(np.float32)


def trained_looking(num_classes: int = 10, seed: int = 3) -> CLCNet:
    """A network whose batch norms have other parameters and statistics than a new one's."""
    torch.manual_seed(seed)
    model = CLCNet(num_classes)
    with torch.no_grad():
        for norm in model.ghost_norms():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def classify(classifier: Classifier, images: ImageSet, batch_size: int = 64, workers: int = 0) -> Iterator[Batch]:
    """What a classifier says of images, batch by batch and in order, without store and script."""
    batches = cut(np.arange(len(images)), batch_size)
    for found in stream([classifier], images, batches, batch_size, workers):
        yield from found.batches
