"""What all runs over a folder of images share: what determines their rows, and what lies beside their output."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import timm
import torch

from clcnet import distributed
from clcnet.classifiers import Classifier
from clcnet.files import atomic_path
from clcnet.images import ImageSet

Arguments = dict[str, str | int | bool]


def partial_folder(output: Path | str) -> Path:
    """Where an interrupted run keeps its rows."""
    return Path(f"{output}.partial")


def errors_file(output: Path | str) -> Path:
    """Where the images left out are named, with their reasons."""
    return Path(f"{output}.errors.csv")


def write_errors(path: Path, images: ImageSet, reasons: Mapping[int, str]) -> None:
    """Name the images left out, by index, with their reasons; without any, remove the file that an earlier run left."""
    if not reasons:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "reason"])
            writer.writerows([images.names[index], reason] for index, reason in reasons.items())


def run_arguments(
    classifiers: Sequence[Classifier], images: ImageSet, targets: np.ndarray, batch_size: int
) -> Arguments:
    """All that a model's answer to an image may depend on.

    Apart from the number of a CPU's threads, which may sway the last bit: a run may be resumed with other cores.
    """
    listing = hashlib.blake2b(targets.tobytes(), digest_size=16)
    for name in images.names:
        listing.update(name.encode("utf-8", "surrogateescape") + b"\0")
    first = classifiers[0]
    return {
        "model": " and ".join(classifier.name for classifier in classifiers),
        "precision": str(first.amp or torch.float32).removeprefix("torch."),
        "weights and preprocessing": " and ".join(classifier.key for classifier in classifiers),
        "number of images": len(images),
        "images and labels": listing.hexdigest(),
        "batch size": batch_size,
        "device": first.device.type,
        "channels last": first.channels_last,
        "compile": first.compile,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def check_processes_agree(arguments: Arguments) -> None:
    """Refuse to share work among processes of one torchrun that were given different work.

    Raises:
        ValueError: in the main process, naming the first difference.
    """
    gathered = distributed.gather(arguments) or []
    for rank, theirs in enumerate(gathered):
        for name, value in arguments.items():
            if theirs[name] != value:
                raise ValueError(
                    f"process {rank} has {name} {theirs[name]} and process 0 has {value}; give every machine the same "
                    "images and model"
                )
