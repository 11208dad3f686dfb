"""From tables or images to the stages of a cascade: what both models say of each image, and how sure CLCNet is of it.

Image i is judged by the network of its own fold, the one that was not trained on it. Nothing here chooses a threshold.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short

import numpy as np
import torch
from numpy.typing import NDArray

from clcnet.cascade.baselines import average_is_correct
from clcnet.cascade.curve import Bools, Stage
from clcnet.data.images import NUM_FOLDS, ImageSet
from clcnet.data.table import match_rows, read_table, sort_probs
from clcnet.network.model import CLCNet
from clcnet.network.weights import SPLIT_FILE, find_fold_weights


@dataclass
class Outputs:
    """What one model says about M images.

    Attributes:
        sorted_probs: (M, n) float32, descending.
        correct: (M,) whether the top-1 answer is right.
        probs: (M, C) float32 in the order of the classes, where the model's own outputs are at hand.
        targets: (M,) the classes, likewise.
    """

    sorted_probs: NDArray[np.float32]
    correct: Bools
    probs: NDArray[np.float32] | None = None
    targets: NDArray[np.int64] | None = None

    @classmethod
    def from_probs(cls, probs: NDArray[np.float32], targets: NDArray[np.int64]) -> "Outputs":
        sorted_probs, correct, _ = sort_probs(probs, targets)
        return cls(sorted_probs, correct, probs, targets)


@dataclass
class Pair:
    """Both models over the same N images, ready to be swept.

    Attributes:
        models: their names.
        stages: the cascade with CLCNet's confidences.
        outputs: what both models said; None where the deep model was asked about deferred images only. Of the others
            its stage then holds a confidence that never wins, so only the threshold that deferred them may be swept.
        folds: (N,) from 0.
        milliseconds: of both models an image, where they were measured.
        unreadable: index of an image -> why it was left out.
    """

    models: list[str]
    stages: list[Stage]
    outputs: list[Outputs] | None
    folds: NDArray[np.int64]
    milliseconds: list[float] | None = None
    unreadable: dict[int, str] = field(default_factory=dict)

    def average_correct(self) -> Bools | None:
        """Whether the average of both models' answers is right, (N,); None where only sorted tables are at hand."""
        assert self.outputs is not None
        shallow, deep = self.outputs
        if shallow.probs is None or deep.probs is None or shallow.targets is None:
            return None
        return average_is_correct(shallow.probs, deep.probs, shallow.targets)


def pair_from_tables(
    paths: Sequence[Path], images: ImageSet, networks: Sequence[CLCNet], models: list[str], flops: Sequence[float]
) -> Pair:
    """Take both models' outputs from their tables, in the order of the image set; no image is opened.

    Raises:
        OSError, ValueError: a table is missing or broken, or the two differ in classes or images.
    """
    tables = [read_table(path) for path in paths]
    if tables[0].num_classes != tables[1].num_classes:
        raise ValueError(
            f"{paths[0]} has {tables[0].num_classes} classes but {paths[1]} has {tables[1].num_classes}; "
            "give the tables of two models with the same classes"
        )
    matched = [match_rows(table, images, str(path)) for table, path in zip(tables, paths, strict=True)]
    _check_same_images(matched, paths, images)
    orders = [np.argsort(indices) for indices in matched]
    outputs = [
        Outputs(table.sorted_probs[order], table.correct[order]) for table, order in zip(tables, orders, strict=True)
    ]
    folds = images.folds[np.sort(matched[0])]
    stages = [
        Stage(fold_confidence(networks, output, folds), output.correct, cost)
        for output, cost in zip(outputs, flops, strict=True)
    ]
    return Pair(models, stages, outputs, folds)


def _check_same_images(matched: Sequence[NDArray[np.int64]], paths: Sequence[Path], images: ImageSet) -> None:
    for here, there in ((0, 1), (1, 0)):
        missing = np.setdiff1d(matched[here], matched[there])
        if len(missing):
            first = ", ".join(images.names[index] for index in missing[:3])
            raise ValueError(
                f"{paths[there]} lacks {len(missing)} of the images of {paths[here]}: {first}"
                f"{', ...' if len(missing) > 3 else ''}; make both tables from the same images"
            )


def load_fold_networks(folder: Path, images: ImageSet, device: torch.device | str = "cpu") -> list[CLCNet]:
    """Load the five networks, the one that judges fold k at index k.

    Raises:
        OSError, ValueError: see `find_fold_weights` and `CLCNet.load`; or a file, or the list of images beside the
            files, says that a network was trained on images that it should judge, or is of another training.
    """
    networks, runs = [], {}
    for fold, path in enumerate(find_fold_weights(folder), start=1):
        network = CLCNet.load(path, device)
        held_out, trained = (network.metadata.get(key) for key in ("fold", "training_folds"))
        if held_out not in (fold, None) or (isinstance(trained, list) and fold in trained):
            raise ValueError(
                f"{path} was trained on fold {fold}, which it should judge (it held out fold {short(held_out)}); give "
                "the files their own names back, or run train_imagenet_5fold_cv.py"
            )
        networks.append(network)
        runs[path.name] = network.metadata.get("run")  # the released weights, and ours of earlier versions, have none
    split = folder / SPLIT_FILE
    if split.exists():  # the released weights come without
        runs[SPLIT_FILE] = _check_same_folds(split, images)
    (first, run), *_ = runs.items()
    others = ", ".join(name for name, other in runs.items() if other != run)
    if others:
        raise ValueError(
            f"{folder} mixes two trainings: {first} is of another than {others}; run train_imagenet_5fold_cv.py again"
        )
    return networks


def _check_same_folds(path: Path, images: ImageSet) -> str | None:
    """Refuse folds other than those of the training, where its list of them has these very images; gives its run."""
    if not path.is_file():  # opening a pipe would wait for its other end
        raise ValueError(f"{path} is not a file; run train_imagenet_5fold_cv.py again")
    fold_of, runs = {}, set()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(file):
                fold_of[row["file"]] = int(row["fold"]) - 1
                runs.add(row.get("run"))
        (run,) = runs
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is not a whole list of folds; run train_imagenet_5fold_cv.py again") from None
    trained = np.array([fold_of.get(name, -1) for name in images.names])
    moved = np.flatnonzero((trained >= 0) & (trained != images.folds))
    if len(moved) and (trained >= 0).all():
        index = moved[0]
        raise ValueError(
            f"{images.names[index]} is in fold {images.folds[index] + 1} of {images.root} but was in fold "
            f"{trained[index] + 1} of {NUM_FOLDS} when {path.parent} was trained, as were {len(moved) - 1} others; "
            "evaluate on the folds of the training"
        )
    return run


def fold_confidence(networks: Sequence[CLCNet], outputs: Outputs, folds: NDArray[np.int64]) -> NDArray[np.float64]:
    """CLCNet's confidence in every answer, by the network of the image's fold: (M,)."""
    confidence = np.empty(len(folds))
    for fold in np.unique(folds):
        inside = folds == fold
        confidence[inside] = networks[fold].predict(outputs.sorted_probs[inside])
    return confidence


def flops_of(model: str) -> float:
    """Count a model's multiply-adds, in billions, from its name alone; no weights are needed."""
    import timm
    from timm.data.config import resolve_model_data_config

    from clcnet.classifiers.flops import count_flops

    try:
        architecture = timm.create_model(model, pretrained=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"model {model}: timm cannot make it ({error})") from error
    config = resolve_model_data_config(architecture)  # type: ignore[no-untyped-call]
    return count_flops(architecture.eval(), config["input_size"])
