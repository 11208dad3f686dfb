"""The embedded data set: images of real handwriting and two classifiers, made on the spot without a network.

    python -m examples.demo --output data/demo

Output, in the folder:

    imagenet_splits_5/split_part_1..5/<class>/<file>.png    validation images, in the layout of the specification
    shallow/, deep/                                         classifiers for timm.create_model("local-dir:...")
    demo.json                                               how it was made; written last

The handwriting is scikit-learn's copy of 1,797 digits of the UCI set by Alpaydin and Kaynak. Half of them become the
validation images, several distorted views each; the classifiers learn from views of the other half, each from originals
of its own, so that they err on different images. A view is turned, shifted, drawn thicker or thinner, blurred, covered
in part and made noisy, by a strength of its own: as in ImageNet, most images are easy, and a few are hopeless. A second
run with the same arguments takes what is there.
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from timm.models import save_for_hf
from torch import nn
from tqdm import tqdm

from clcnet import cli
from clcnet.classifiers.flops import count_flops
from clcnet.classifiers.models import configuration
from clcnet.data.images import NUM_FOLDS
from clcnet.files import atomic_path, output_lock

IMAGE_SIZE = 32
NUM_CLASSES = 10
ARCHITECTURES = {"shallow": "test_efficientnet", "deep": "resnet10t"}  # 2.3 and 22.4 million multiply-adds
# Trained on hard labels, the shallow model is as sure of its guesses as the deep one of its answers, and the surer
# answer is then too often the wrong one. Most of timm's weights were trained on soft labels, the EfficientNets too.
LABEL_SMOOTHING = {"shallow": 0.3, "deep": 0.0}
DEEP_EVERY = 4  # the deep model learns from every fourth of the training originals, the shallow one from the others
TRAIN_VIEWS = {"shallow": 20, "deep": 30}  # of each original: more of the few
EPOCHS = {"shallow": 2, "deep": 4}
HARDEST = 0.85  # strength of the strongest distortion
IMAGES_FOLDER = "imagenet_splits_5"
MANIFEST = "demo.json"

_VERSION = 2  # of the images and the training: a folder of another version is made again
_BATCH_SIZE = 128
_MEAN, _STD = (0.25,) * 3, (0.33,) * 3  # of the images, roughly; saved with the classifiers


@dataclass(frozen=True)
class Settings:
    """What determines the demo: views of each original, those for training and passes over them, the seed.

    None stands for `TRAIN_VIEWS` and `EPOCHS`; a number is for both classifiers.
    """

    views: int = 6
    train_views: int | None = None
    epochs: int | None = None
    seed: int = 42


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    defaults, add = Settings(), parser.add_argument
    add("--output", type=Path, default=cli.DATA_DIR / "demo", metavar="FOLDER", help="where to make it")
    add("--views", type=cli.positive_int, default=defaults.views, metavar="N", help="images of each of 900 originals")
    for flag, by_stage, unit in (
        ("--train-views", TRAIN_VIEWS, "training images of each original"),
        ("--epochs", EPOCHS, "passes over the training images"),
    ):
        default = " and ".join(f"{number} for the {stage} one" for stage, number in by_stage.items())
        add(flag, type=cli.positive_int, metavar="N", help=f"{unit}, of both classifiers (default: {default})")
    cli.add_seed_argument(parser)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Make the demo or take what is there; returns what the manifest says."""
    settings = Settings(args.views, args.train_views, args.epochs, args.seed)
    with output_lock(args.output / MANIFEST):
        manifest = read_complete(args.output, settings)
        if manifest is not None:
            print(f"{args.output} is complete: nothing to make")
        else:
            manifest = make(args.output, settings)
    print(f"{manifest['num_images']} images in {args.output / IMAGES_FOLDER}")
    for stage, classifier in manifest["classifiers"].items():
        cost = f"{1000 * classifier['flops']:.1f} million multiply-adds"
        print(
            f"{stage} classifier: {classifier['architecture']}, {cost}, top-1 {classifier['top1']:.2f}%, "
            f"in {args.output / stage}"
        )
    return manifest


def read_complete(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """What the manifest says, if the folder was made with these settings and is as it was then; else None.

    Raises:
        FileExistsError: the folder holds something that is no demo.
    """
    path = folder / MANIFEST
    if not path.exists():
        strangers = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if strangers:
            raise FileExistsError(f"output {folder} holds {strangers[0]} and no {MANIFEST}; choose another folder")
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"version": _VERSION, "settings": asdict(settings)}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return None
    return manifest if manifest.get("digest") == digest(folder) else None


def digest(folder: Path) -> str:
    """Name for the content of all files that the demo consists of."""
    content = hashlib.blake2b(digest_size=16)
    for part in (IMAGES_FOLDER, *ARCHITECTURES):
        for path in sorted((folder / part).rglob("*.*")):
            content.update(path.relative_to(folder).as_posix().encode() + b"\0")
            content.update(hashlib.blake2b(path.read_bytes()).digest())
    return content.hexdigest()


def make(folder: Path, settings: Settings) -> dict[str, Any]:
    """Make the images and the classifiers, anew, and write the manifest last."""
    manifest: dict[str, Any] = {"version": _VERSION, "settings": asdict(settings)}
    write_manifest(folder, manifest)  # marks the folder as the demo's, to be made again if this run does not finish
    for part in (IMAGES_FOLDER, *ARCHITECTURES):
        if (folder / part).is_symlink():
            raise FileExistsError(f"{folder / part} is a symbolic link; delete it or choose another folder")
        shutil.rmtree(folder / part, ignore_errors=True)
    digits = load_digits()
    training, validation = split_originals(digits.target, settings.seed)
    images = distorted_views(digits.images, validation, settings.views, settings.seed, "validation images")
    write_images(folder / IMAGES_FOLDER, images, digits.target, validation)
    classifiers = {}
    for stage, architecture in ARCHITECTURES.items():
        originals = originals_of(stage, training)
        views = settings.train_views or TRAIN_VIEWS[stage]
        train_images = distorted_views(digits.images, originals, views, settings.seed, f"{stage} training images")
        train_targets = digits.target[originals].repeat(views)
        model = new_classifier(architecture, settings.seed)
        epochs, smoothing = settings.epochs or EPOCHS[stage], LABEL_SMOOTHING[stage]
        train_classifier(model, train_images, train_targets, epochs, settings.seed, stage, smoothing)
        save_for_hf(model, str(folder / stage), safe_serialization=True)
        answers = classify(model, images)
        classifiers[stage] = {
            "architecture": architecture,
            "flops": count_flops(model, (3, IMAGE_SIZE, IMAGE_SIZE)),
            "top1": 100 * float(np.mean(answers == digits.target[validation].repeat(settings.views))),
        }
    manifest |= {"num_images": len(images), "classifiers": classifiers, "digest": digest(folder)}
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the folder."""
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def split_originals(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the originals in two halves with the same share of every class.

    Returns:
        The originals to train with and those to validate with, in random order, as indices.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    return by_class[::2], by_class[1::2]


def originals_of(stage: str, training: np.ndarray) -> np.ndarray:
    """The training originals that a classifier learns from.

    Args:
        stage: "shallow" or "deep".
        training: (M,) originals, class by class, so that every class is shared out alike.
    """
    is_deep = np.arange(len(training)) % DEEP_EVERY == 0
    return training[is_deep if stage == "deep" else ~is_deep]


def distorted_views(originals: np.ndarray, indices: np.ndarray, views: int, seed: int, description: str) -> np.ndarray:
    """Draw views of originals, each from a generator of its own, so that a view does not depend on the others.

    Args:
        originals: (M, 8, 8), ink from 0 to 16.
        indices: (N,) which of them.
        views: of each original.
        seed: with the original's index and the view's number, it determines a view.
        description: for the progress bar.

    Returns:
        (N * views, IMAGE_SIZE, IMAGE_SIZE) uint8, all views of an original together.
    """
    images = np.empty((len(indices), views, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    with tqdm(total=len(indices) * views, desc=description, unit="image") as progress:
        for place, index in enumerate(indices):
            for view in range(views):
                images[place, view] = distort(originals[index] / 16, np.random.default_rng([seed, index, view]))
            progress.update(views)
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE)


def distort(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw one view of a digit, from nearly clean to hardly legible.

    Args:
        digit: (8, 8), ink from 0 to 1.
        generator: draws the strength of the distortion and each distortion's share of it.

    Returns:
        (IMAGE_SIZE, IMAGE_SIZE) uint8, white ink on black.
    """
    strength = HARDEST * generator.uniform()
    image = _turn_and_shift(digit, strength, generator)
    image = _change_stroke(image, strength * generator.uniform(-1, 1))
    image = ndimage.gaussian_filter(image, sigma=2.0 * strength * generator.uniform())
    if generator.uniform() < 0.1 + 0.7 * strength:
        _cover(image, strength, generator)
    image += 0.45 * strength * generator.uniform() * generator.standard_normal(image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _turn_and_shift(digit: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Enlarge to the image's size; turn by up to 60 degrees, shift by up to 4 pixels, scale a little."""
    angle = np.deg2rad(60) * strength * generator.uniform(-1, 1)
    scale = 1 + strength * generator.uniform(-0.25, 0.1)
    shift = 4 * strength * generator.uniform(-1, 1, size=2)
    framed = np.pad(digit, 1)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation * len(framed) / IMAGE_SIZE / scale  # from pixels of the image to those of the original
    centre, image_centre = (len(framed) - 1) / 2, (IMAGE_SIZE - 1) / 2
    offset = centre - matrix @ (image_centre + shift)
    image = ndimage.affine_transform(framed, matrix, offset, (IMAGE_SIZE, IMAGE_SIZE), order=3)
    return np.clip(image, 0, 1)


def _change_stroke(image: np.ndarray, amount: float) -> np.ndarray:
    """Draw the strokes thicker (amount up to 1) or thinner (down to -1)."""
    changed = ndimage.maximum_filter(image, 5) if amount > 0 else ndimage.minimum_filter(image, 3)
    return image + abs(amount) * (changed - image)


def _cover(image: np.ndarray, strength: float, generator: np.random.Generator) -> None:
    """Paint a grey rectangle over the image, in place."""
    height, width = generator.uniform(4, 6 + 10 * strength, size=2).astype(int)
    top, left = generator.integers(0, IMAGE_SIZE - height + 1), generator.integers(0, IMAGE_SIZE - width + 1)
    image[top : top + height, left : left + width] = generator.uniform()


def write_images(folder: Path, images: np.ndarray, targets: np.ndarray, originals: np.ndarray) -> None:
    """Write views as PNG files in five parts, all views of an original in one, with as many of every class in each.

    Args:
        folder: gets split_part_1..5/<class>/<original>_<view>.png.
        images: (N * views, height, width) uint8.
        targets: (M,) the class of every original.
        originals: (N,) indices of the originals, class by class.
    """
    by_original = images.reshape(len(originals), -1, IMAGE_SIZE, IMAGE_SIZE)
    for place, (original, views) in enumerate(zip(originals, by_original, strict=True)):
        class_folder = folder / f"split_part_{place % NUM_FOLDS + 1}" / str(targets[original])
        class_folder.mkdir(parents=True, exist_ok=True)
        for view, image in enumerate(views):
            Image.fromarray(image).save(class_folder / f"{original:04d}_{view}.png")


def new_classifier(architecture: str, seed: int) -> nn.Module:
    """Create an untrained timm model for the digits, whose configuration holds its preprocessing and class names."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=NUM_CLASSES)
    preprocessing = {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "crop_pct": 1.0,
        "mean": _MEAN,
        "std": _STD,
        "num_classes": NUM_CLASSES,
        "label_names": [str(digit) for digit in range(NUM_CLASSES)],
    }
    model.pretrained_cfg = configuration(model) | preprocessing  # type: ignore[assignment]  # nn.Module takes any
    return model


def train_classifier(
    model: nn.Module,
    images: np.ndarray,
    targets: np.ndarray,
    epochs: int,
    seed: int,
    description: str,
    label_smoothing: float = 0.0,
) -> None:
    """Train with AdamW and a learning rate that rises and falls once; leaves the model in evaluation mode.

    Args:
        model: changed in place.
        images: (N, IMAGE_SIZE, IMAGE_SIZE) uint8.
        targets: (N,) classes.
        epochs: passes over the images.
        seed: of the order of the images.
        description: for the progress bar.
        label_smoothing: share of each label that is spread evenly over all classes.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.from_numpy(targets).long()
    batches_per_epoch = max(1, len(images) // _BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * batches_per_epoch)
    model.to(memory_format=torch.channels_last).train()  # the quicker layout on a CPU
    with tqdm(total=epochs * batches_per_epoch, desc=f"{description} classifier", unit="batch") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for batch in order.tensor_split(batches_per_epoch):
                logits = model(to_input(images[batch]))
                loss = nn.functional.cross_entropy(logits, labels[batch], label_smoothing=label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
    model.to(memory_format=torch.contiguous_format).eval()  # safetensors saves no other layout


def to_input(images: np.ndarray) -> torch.Tensor:
    """Grey images (B, height, width) uint8 as the classifiers see them through timm: (B, 3, height, width)."""
    grey = torch.from_numpy(images)[:, None].float() / 255
    return ((grey - _MEAN[0]) / _STD[0]).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def classify(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """The model's answers for grey images (N, height, width) uint8: (N,) classes."""
    answers = [model(to_input(images[start : start + 512])).argmax(1) for start in range(0, len(images), 512)]
    return torch.cat(answers).numpy()


if __name__ == "__main__":
    cli.run(main, get_args_parser())
