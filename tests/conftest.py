"""What the tests share: small image folders, tiny timm classifiers saved as a user would, the real data if present."""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from scripts import Workshop, build_workshop, save_classifier

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; tests send it on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Put back what `cli.run` set for the rest of a process; children would inherit signals that are ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data beside the repository; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder `shared` with real data beside the repository")
    return SHARED


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as processes of torchrun and killed ones do: the number of threads sways the last bit.

    Models this small are slowed down by threads besides, most of all where other work runs beside the tests.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many images each model has been asked about, by its name."""
    from clcnet.classifiers.classifier import Classifier

    counts: Counter[str] = Counter()
    probabilities = Classifier.probabilities

    def count(self: Classifier, batch: "torch.Tensor") -> "torch.Tensor":
        counts[self.name] += len(batch)
        return probabilities(self, batch)

    monkeypatch.setattr(Classifier, "probabilities", count)
    return counts


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make class folders of small random PNG images, or the five-part layout, and return the folder."""

    def make(
        name: str = "images",
        classes: Sequence[str] = ("ant", "bee", "cat"),
        images_per_class: int = 5,
        five_parts: bool = False,
        size: int = 32,
        seed: int = 0,
    ) -> Path:
        generator = np.random.default_rng(seed)
        root = tmp_path / name
        for class_name in classes:
            for index in range(images_per_class):
                part = f"split_part_{index % 5 + 1}" if five_parts else ""
                path = root / part / class_name / f"{class_name}_{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                colour = generator.integers(0, 256, 3)  # images that differ, so that classifiers answer differently
                pixels = np.clip(colour + generator.normal(0, 40, (size, size, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
        return root

    return make


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a tiny untrained timm classifier, see `scripts.save_classifier`, and return its folder."""

    def make(architecture: str = "test_resnet", num_classes: int = 3, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        return save_classifier(folder, architecture, num_classes, **options)

    return make


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, classifier_dir: Callable[..., Path]) -> Workshop:
    """Tiny inputs of all five scripts; not to be written to."""
    return build_workshop(tmp_path_factory.mktemp("workshop"), classifier_dir)


@pytest.fixture(scope="session")
def open_workshop(workshop: Workshop) -> Iterator[Workshop]:
    """The same where any user may read, and make folders beside it: pytest's own folders are the user's alone."""
    if not hasattr(os, "setresuid"):
        pytest.skip("needs users as Linux has them")
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(workshop.root, Path(name) / "workshop")
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o777)
        yield Workshop(Path(name) / "workshop")
