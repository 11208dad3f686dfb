"""From images or tables to the stages of a cascade: what each model says of each image, and how sure CLCNet is of it.

Image i is judged by the network of its own fold, the one that was not trained on it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from numpy.typing import NDArray
from timm.data import resolve_model_data_config
from tqdm import tqdm

from clcnet.cache import OutputCache
from clcnet.classifiers import Classifier, class_indices, classify
from clcnet.flops import count_flops
from clcnet.images import ImageSet
from clcnet.model import CLCNet, find_fold_weights
from clcnet.table import match_rows, read_table, sort_probs

SHALLOW_ALONE = -999.0  # at this threshold or below no image is deferred, whatever the scores, and CLCNet is not asked


@dataclass
class Outputs:
    """What one model says about M images.

    Attributes:
        sorted_probs: (M, n) float32, descending.
        correct: (M,) whether the top-1 answer is right.
        probs: (M, C) float32 in the order of the classes, where the model's outputs are at hand.
        targets: (M,) the classes, likewise.
    """

    sorted_probs: NDArray[np.float32]
    correct: NDArray[np.bool_]
    probs: NDArray[np.float32] | None = None
    targets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.correct)

    def subset(self, indices: NDArray[Any]) -> "Outputs":
        return Outputs(
            self.sorted_probs[indices],
            self.correct[indices],
            None if self.probs is None else self.probs[indices],
            None if self.targets is None else self.targets[indices],
        )


def outputs_from_probs(probs: NDArray[np.float32], targets: NDArray[np.int64]) -> Outputs:
    """Outputs of a model that has just run, or of its cache."""
    sorted_probs, correct, _ = sort_probs(probs, targets)
    return Outputs(sorted_probs, correct, probs, targets)


def read_outputs(shallow_path: Path, deep_path: Path, images: ImageSet) -> tuple[list[Outputs], NDArray[np.int64]]:
    """Read the tables of both models, bring their rows into one order, and find each row's fold.

    Raises:
        OSError, ValueError: a table is missing or broken, or the two differ in classes or images.
    """
    tables = [read_table(path) for path in (shallow_path, deep_path)]
    if tables[0].num_classes != tables[1].num_classes:
        raise ValueError(
            f"{shallow_path} has {tables[0].num_classes} classes but {deep_path} has {tables[1].num_classes}; "
            "give the tables of two models with the same classes"
        )
    matched = [
        match_rows(table, images, str(path)) for table, path in zip(tables, (shallow_path, deep_path), strict=True)
    ]
    _check_same_images(matched, (shallow_path, deep_path), images)
    order = np.sort(matched[0])
    outputs = [
        Outputs(table.sorted_probs[rows], table.correct[rows])
        for table, rows in ((table, np.argsort(match)) for table, match in zip(tables, matched, strict=True))
    ]
    return outputs, images.folds[order]


def _check_same_images(matched: Sequence[NDArray[np.int64]], paths: Sequence[Path], images: ImageSet) -> None:
    for here, there in ((0, 1), (1, 0)):
        missing = np.setdiff1d(matched[here], matched[there])
        if len(missing):
            first = ", ".join(images.names[index] for index in missing[:3])
            raise ValueError(
                f"{paths[there]} lacks {len(missing)} of the images of {paths[here]}: {first}"
                f"{', ...' if len(missing) > 3 else ''}; make both tables from the same images"
            )


class ImageOutputs:
    """One model over an image set, through the cache: only images that it has not seen are classified."""

    def __init__(self, classifier: Classifier, images: ImageSet, cache: OutputCache) -> None:
        self.classifier, self.images, self.cache = classifier, images, cache
        self.targets = class_indices(images, classifier)
        self.unreadable: dict[int, str] = {}

    def classify(self, indices: NDArray[np.int64], label: str, **options: Any) -> None:
        """Classify those of the images that the cache lacks; unreadable ones are noted in `unreadable`."""
        missing = self.cache.missing(indices)
        if not len(missing):
            return
        note = self.unreadable.__setitem__
        batches = classify(self.classifier, self.images, missing, on_unreadable=note, **options)
        with tqdm(total=len(missing), desc=label, unit="image", file=sys.stderr) as progress:
            for batch, probs in batches:
                self.cache.store(batch, probs)
                progress.update(len(batch))

    def outputs(self, indices: NDArray[np.int64]) -> Outputs:
        """What the model said about images that it has seen."""
        return outputs_from_probs(np.array(self.cache.probs[indices]), self.targets[indices])


def load_fold_networks(folder: Path, device: str = "cpu") -> list[CLCNet]:
    """Load the five networks, the one for fold k at index k.

    Raises:
        OSError, ValueError: see `find_fold_weights` and `CLCNet.load`; or a file says that it was trained on the fold
            that it should judge.
    """
    networks = []
    for fold, path in enumerate(find_fold_weights(folder), start=1):
        network = CLCNet.load(path, device)
        held_out = network.metadata.get("fold")
        if held_out is not None and held_out != fold:
            raise ValueError(
                f"{path} was trained on fold {fold}, which it should judge (it says that fold {held_out} was held out); "
                "give each file its own name back, or run train_imagenet_5fold_cv.py"
            )
        networks.append(network)
    return networks


def fold_confidence(networks: Sequence[CLCNet], outputs: Outputs, folds: NDArray[np.int64]) -> NDArray[np.float64]:
    """CLCNet's confidence in every image's answer, by the network of the image's fold: (M,)."""
    confidence = np.empty(len(folds))
    for fold in np.unique(folds):
        inside = folds == fold
        confidence[inside] = networks[fold].predict(outputs.sorted_probs[inside])
    return confidence


def flops_of(model: str) -> float:
    """Count a model's multiply-adds, in billions, from its name alone; no weights are needed."""
    try:
        architecture = timm.create_model(model, pretrained=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"model {model}: timm cannot make it ({error})") from error
    return count_flops(architecture.eval(), resolve_model_data_config(architecture)["input_size"])
