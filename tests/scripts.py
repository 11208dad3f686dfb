"""The five scripts as a user runs them, but in this process: a command line in, exit code and printed lines out."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GENERATE, TRAIN_FOLDS, EVALUATE_FOLDS = "generate_data_for_CLCNet", "train_imagenet_5fold_cv", "eval_imagenet_5fold_cv"
TRAIN_CUSTOM, EVALUATE_CUSTOM = "train_custom_data", "eval_custom_data"
SCRIPTS = (GENERATE, TRAIN_FOLDS, EVALUATE_FOLDS, TRAIN_CUSTOM, EVALUATE_CUSTOM)
CLASSES = ("ant", "bee", "cat")
IMAGES_PER_CLASS = 20
_NOBODY = 65534


@dataclass(frozen=True)
class Finished:
    """What a run left on the screen, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def last_error(self) -> str:
        """The last line on stderr, progress bars apart."""
        return self.err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]


def run(script: str, *words: object) -> Finished:
    """Run a script with these words on its command line; anything but an exit is an error of ours and raised."""
    from clcnet import cli

    module = importlib.import_module(script)
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [f"{script}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(module.main, module.get_args_parser())
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return Finished(exit_.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before


def refusal(finished: Finished) -> str:
    """The one line with which a run refused its input."""
    assert finished.code == 2, finished
    assert finished.last_error.startswith("error: "), finished.err
    assert "Traceback" not in finished.err and finished.err.count("error: ") == 1, finished.err
    return finished.last_error


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Let a run stop, as by Ctrl-C, before it keeps batch number `num_batches` of any model, counted from 0."""
    from clcnet.data.store import Store

    append, count = Store.append, iter(range(1000))

    def stop(self: Store, *arguments: np.ndarray) -> np.ndarray:
        if next(count) == num_batches:
            raise KeyboardInterrupt
        return append(self, *arguments)

    monkeypatch.setattr(Store, "append", stop)


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Be a user whom permissions bind: another one where this process is root's."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setresuid(_NOBODY, _NOBODY, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


@dataclass(frozen=True)
class Workshop:
    """Tiny but complete inputs of all five scripts, in one folder that no test writes to."""

    root: Path

    @property
    def images(self) -> Path:
        """Sixty images of three classes in five parts."""
        return self.root / "images"

    def table(self, stage: str) -> Path:
        """A table as the "shallow" or "deep" model could have given it."""
        return self.root / f"{stage}.csv"

    @property
    def weights(self) -> Path:
        """Five fold weights and the custom one, untrained."""
        return self.root / "weights"

    def models(self) -> list[object]:
        """Flags for the two classifiers."""
        names = ((f"--{stage}-model", f"local-dir:{self.root / stage}") for stage in ("shallow", "deep"))
        return [word for pair in names for word in pair]

    def outputs(self, script: str, folder: Path) -> list[Path]:
        """The files that a script writes when its outputs go to `folder`."""
        return {
            GENERATE: [folder / "table.csv"],
            TRAIN_FOLDS: [folder / f"CLCNet_imagenet_split_{fold}.zip" for fold in range(1, 6)]
            + [folder / "CLCNet_imagenet_split.csv"],
            EVALUATE_FOLDS: [folder / "performance-result.csv", folder / "results" / "results-table.md"],
            TRAIN_CUSTOM: [folder / "CLCNet_custom_data.zip", folder / "CLCNet_custom_data_split.csv"],
            EVALUATE_CUSTOM: [folder / "custom-data-result.csv"],
        }[script]

    def command(self, script: str, folder: Path) -> list[object]:
        """A complete command line for a script, with all its outputs in `folder`."""
        output = self.outputs(script, folder)[0]
        on_images = ["--device", "cpu", "--workers", 0, "--batch-size", 8, "--store", folder / "store"]
        training = ["--weight-save", folder, "--max-epochs", 2, "--batch-size", 16, "--device", "cpu"]
        return {
            GENERATE: ["--data-path", self.images, "--model", self.models()[1], "--output", output, *on_images],
            TRAIN_FOLDS: ["--imagenet-split", self.images, "--cls-output", self.table("shallow"), *training],
            EVALUATE_FOLDS: [
                *("--imagenet-split", self.images, *self.models(), "--weight-save", self.weights),
                *("--performance-result", output, *on_images),
            ],
            TRAIN_CUSTOM: ["--cls-output", self.table("shallow"), *training],
            EVALUATE_CUSTOM: [
                *("--custom-data", self.images, *self.models(), "--result", output, *on_images),
                *("--weight", self.weights / "CLCNet_custom_data.zip"),
            ],
        }[script]

    def command_on_tables(self, folder: Path) -> list[object]:
        """A command line for the evaluation by folds that reads tables in place of running models."""
        tables = [word for stage in ("shallow", "deep") for word in (f"--{stage}-output", self.table(stage))]
        costs = ["--shallow-model-FLOPs", 1, "--deep-model-FLOPs", 10]
        output = self.outputs(EVALUATE_FOLDS, folder)[0]
        return [
            *("--imagenet-split", self.images, *tables, *costs, "--weight-save", self.weights),
            *("--performance-result", output),
        ]


def save_classifier(
    folder: Path,
    architecture: str = "test_resnet",
    num_classes: int = 3,
    label_names: Sequence[str] | None = CLASSES,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """Save a tiny untrained timm classifier for `timm.create_model("local-dir:PATH", pretrained=True)`; return PATH."""
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=num_classes)
    # timm starts the last layer near zero, where all classes tie; spread and centre the answers over flat colours
    colours = torch.rand(64, 3, 1, 1) * 2 - 1 + torch.randn(64, 3, size, size) * 0.3
    with torch.no_grad():
        torch.nn.init.normal_(model.get_classifier().weight, std=10.0)
        model.get_classifier().bias -= model.eval()(colours).mean(0)
    facts = {"input_size": (3, size, size), "crop_pct": 1.0, "interpolation": "bicubic", "num_classes": num_classes}
    named = {} if label_names is None else {"label_names": list(label_names)}
    model.pretrained_cfg = {**model.pretrained_cfg, **facts, **named}
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def make_images(
    root: Path,
    classes: Sequence[str] = CLASSES,
    images_per_class: int = 5,
    five_parts: bool = False,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """Make class folders of small random PNG images, or the five-part layout, and return the folder."""
    generator = np.random.default_rng(seed)
    for class_name in classes:
        for index in range(images_per_class):
            part = f"split_part_{index % 5 + 1}" if five_parts else ""
            path = root / part / class_name / f"{class_name}_{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = generator.integers(0, 256, 3)  # images that differ, so that classifiers answer differently
            pixels = np.clip(colour + generator.normal(0, 40, (size, size, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def build_workshop(root: Path, classifier_dir: Callable[..., Path]) -> Workshop:
    """Make the inputs: images that classifiers tell apart, two classifiers, two tables, six networks."""
    from clcnet import CLCNet

    workshop = Workshop(root)
    make_images(workshop.images, images_per_class=IMAGES_PER_CLASS, five_parts=True)
    names = [f"{class_name}_{index:04d}.png" for class_name in CLASSES for index in range(IMAGES_PER_CLASS)]
    for seed, stage in enumerate(("shallow", "deep")):
        (root / stage).symlink_to(classifier_dir(seed=seed))
        workshop.table(stage).write_bytes(table_bytes(names, seed=seed))
    networks = [f"CLCNet_imagenet_split_{fold}.zip" for fold in range(1, 6)] + ["CLCNet_custom_data.zip"]
    for name in networks:
        CLCNet(num_classes=3).save(workshop.weights / name)
    return workshop


def table_bytes(names: list[str], num_classes: int = 3, seed: int = 0) -> bytes:
    """A valid table, in plain text, written without the code under test."""
    generator = np.random.default_rng(seed)
    rows = []
    for name in names:
        thousandths = np.sort(generator.multinomial(1000, generator.dirichlet(np.ones(num_classes))))[::-1]
        rows.append(",".join([name, *(f"{value / 1000:g}" for value in thousandths), str(generator.integers(0, 2))]))
    return ("\n".join(rows) + "\n").encode()


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder with what is in them, locks apart."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }
