"""Fused cascades on real images: what was to be reached, and what is, cross-fitted over five folds.

    python -m benchmarks.fused ../shared             # a few minutes on two cores

Reads cifar10/ (and runs its two timm classifiers once) and imagenet1k/ of that folder; what is absent is skipped with a
line. A saving counts where the cross-fitted accuracy is at most 0.15 points (ImageNet: 0.25) below the one named.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from clcnet.cascade.pool import CrossFit, rows_of, standing
from clcnet.cascade.search import find_cascades
from clcnet.cascade.selection import Goal
from clcnet.data.images import balanced_folds
from clcnet.data.outputs import Outputs

CIFAR_COSTS = {"test_resnet": 4.1, "resnet10t": 22.4, "resnet20": 41.0, "resnet56": 126.0}  # million multiply-adds
LITE2 = "tf_efficientnet_lite2"
IMAGENET_COSTS = {
    "mobilenetv1_025_128": 14.0,
    "mobilenetv1_050_160": 77.0,
    "mobilenetv1_075_192": 239.0,
    "mobilenetv2_100_224": 301.0,
    "tf_efficientnet_lite0": 385.0,
    "tf_efficientnet_lite1": 600.0,
    LITE2: 860.0,
}


def cifar_outputs(folder: Path) -> tuple[dict[str, Outputs], np.ndarray]:
    """Outputs by name and the folds of the five-part folder."""
    data = np.load(folder / "logits.npz")
    paths = {path.name: path for path in folder.glob("imagenet_splits_5/*/*/*.jpg")}
    names = [str(name) for name in data["names"]]
    logits = {name: data[name] for name in ("resnet20", "resnet56")}
    for name, local in (("test_resnet", "shallow"), ("resnet10t", "deep")):
        logits[name] = classified(folder / local, [paths[name] for name in names])
    folds = np.array([int(paths[name].parts[-3].removeprefix("split_part_")) for name in names])
    costs = CIFAR_COSTS.items()
    return {
        name: Outputs.from_logits(logits[name], names, data["targets"], model=name, flops=cost / 1000)
        for name, cost in costs
    }, folds


@torch.inference_mode()
def classified(folder: Path, paths: Sequence[Path], batch: int = 500) -> np.ndarray:
    """Logits (N, n) of a timm model in a local folder."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    parts = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    stacks = (torch.stack([transform(Image.open(path).convert("RGB")) for path in part]) for part in parts)
    return torch.cat([model(stack) for stack in stacks]).numpy()


def imagenet_outputs(folder: Path) -> tuple[dict[str, Outputs], np.ndarray]:
    """Outputs of the seven networks over both sets of photographs, and balanced folds."""
    sets = [np.load(folder / f"{name}_logits.npz") for name in ("val1300", "flickr1000")]
    names = [str(name) for each in sets for name in each["files"]]
    targets = np.concatenate([each["labels"] for each in sets]).astype(np.int64)
    outputs = {}
    for name, cost in IMAGENET_COSTS.items():
        logits = np.concatenate([each[name] for each in sets])
        outputs[name] = Outputs.from_logits(logits, names, targets, model=name, flops=cost / 1000)
    return outputs, balanced_folds(names, targets)


def area_50(outputs: Sequence[Outputs], folds: np.ndarray) -> float:
    """Mean top-1 of a fused pair over deferral from 0 to 50%, each fold's by pools fitted on the others."""
    rows = rows_of(outputs)
    fits = [CrossFit(rows.take(range(count)), folds, deep=True) for count in (1, 2)]
    confidence, correct = np.empty((2, len(folds))), np.empty((2, len(folds)), dtype=np.int64)
    for k, fit in enumerate(fits):
        for fold in fit.numbers:
            confidence[k, folds == fold], correct[k, folds == fold] = standing(fit.pool({fold}), fit.parts[fold])
    gains = (correct[1] - correct[0])[np.argsort(confidence[0], kind="stable")]
    accuracy = 100 * (correct[0].sum() + np.append(0, np.cumsum(gains))) / len(folds)
    return float(accuracy[: len(folds) // 2 + 1].mean())


def savings(
    outputs: Sequence[Outputs], folds: np.ndarray, goals: dict[float, float], most: int, slack: float, rival: float
) -> Iterator[str]:
    """A line for each target accuracy, with the saving that was to be reached."""
    cascades = find_cascades(outputs, folds, [Goal("accuracy", target) for target in goals], max_stages=most)
    for found, wanted in zip(cascades.goals, goals.values(), strict=True):
        saving, (low, high) = found.cross_fitted.saving(rival)
        counts = found.cross_fitted.accuracy >= found.target - slack
        verdict = "reached" if counts and saving >= wanted else "missed"
        chain = " > ".join(outputs[model].record.model for model in found.choice.chain)
        yield (
            f"| {chain}, saving at {found.target:.2f}% | >= {wanted:g} | {saving:.2f} [{low:.2f}, {high:.2f}] at "
            f"{found.cross_fitted.accuracy:.2f}% | {verdict} |"
        )


def lines(shared: Path) -> Iterator[str]:
    """The table, row by row."""
    yield "| data and figure | to reach | cross-fitted | |"
    yield "|---|---|---|---|"
    if (shared / "cifar10" / "logits.npz").exists():
        outputs, folds = cifar_outputs(shared / "cifar10")
        area = area_50([outputs["resnet20"], outputs["resnet56"]], folds)
        yield f"| resnet20 > resnet56, area_50 | >= 85.6 | {area:.2f} | {'reached' if area >= 85.6 else 'missed'} |"
        for names, goals, most in (
            (("resnet20", "resnet56"), {83.20: 2.8, 84.98: 2.15}, 2),
            (("test_resnet", "resnet10t"), {82.20: 1.95, 82.52: 1.7}, 2),
            (tuple(CIFAR_COSTS), {83.20: 9.0, 84.98: 6.4}, 4),
        ):
            yield from savings([outputs[n] for n in names], folds, goals, most, 0.15, CIFAR_COSTS[names[-1]] / 1000)
    else:
        yield f"| skipped: {shared / 'cifar10'} has no logits.npz | | | |"
    if (shared / "imagenet1k" / "val1300_logits.npz").exists():
        outputs, folds = imagenet_outputs(shared / "imagenet1k")
        area = area_50([outputs["tf_efficientnet_lite0"], outputs[LITE2]], folds)
        yield f"| lite0 > lite2, area_50 | >= 88.1 | {area:.2f} | {'reached' if area >= 88.1 else 'missed'} |"
        goals = {outputs[LITE2].accuracy: 2.15}
        yield from savings(list(outputs.values()), folds, goals, 3, 0.25, IMAGENET_COSTS[LITE2] / 1000)
    else:
        yield f"| skipped: {shared / 'imagenet1k'} has no val1300_logits.npz | | | |"


if __name__ == "__main__":
    for line in lines(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared")):
        print(line, flush=True)
