"""What the tests share: small image folders, tiny timm classifiers saved as a user would, the real data if present."""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from scripts import Workshop, build_workshop, make_images, save_classifier

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
    """Make images in a folder of the test's own, see `scripts.make_images`, and return it."""
    return lambda name="images", **options: make_images(tmp_path / name, **options)


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a tiny untrained timm classifier, see `scripts.save_classifier`, and return its folder."""

    def make(architecture: str = "test_resnet", num_classes: int = 3, **options: Any) -> Path:
        return save_classifier(tmp_path_factory.mktemp(architecture), architecture, num_classes, **options)

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
