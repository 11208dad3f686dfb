"""The embedded data set: disjoint halves, honest folds, the same images everywhere, classifiers that timm loads."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from networks import classify
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_data_config

from clcnet.classifiers.classes import class_readings
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.images import list_images
from examples import demo

NUM_DIGITS = 120


def make_small(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, object]:
    """Run the demo's command on the first few digits."""
    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:NUM_DIGITS], target=digits.target[:NUM_DIGITS])
    monkeypatch.setattr(demo, "load_digits", lambda: few)
    settings = ["--views", "3", "--train-views", "3", "--epochs", "1"]
    return demo.main(demo.get_args_parser().parse_args(["--output", str(folder), *settings, *words]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A small demo that no test changes, and what its command returned."""
    folder = tmp_path_factory.mktemp("demo") / "small"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, make_small(folder, monkeypatch)


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the files alone: leave small classifiers as they start."""
    monkeypatch.setattr(demo, "ARCHITECTURES", {"shallow": "test_efficientnet", "deep": "test_resnet"})
    monkeypatch.setattr(demo, "train_classifier", lambda model, *_: model.eval())


def test_the_halves_are_disjoint_complete_and_alike_in_every_class_and_so_are_the_classifiers_shares() -> None:
    targets = load_digits().target
    training, validation = demo.split_originals(targets, seed=42)
    assert sorted([*training, *validation]) == list(range(1797))
    assert len(validation) * demo.Settings().views >= 5000
    shallow, deep = (demo.originals_of(stage, training) for stage in ("shallow", "deep"))
    assert sorted([*shallow, *deep]) == sorted(training)
    counts = [np.bincount(targets[part]) for part in (training, validation, shallow, deep)]
    assert (abs(counts[0] - counts[1]) <= 1).all() and (abs(counts[2] - 3 * counts[3]) <= 3).all()


def test_images_are_the_validation_half_and_its_originals_are_dealt_evenly_to_the_parts_with_all_their_views(
    made: tuple[Path, dict],
) -> None:
    folder, _ = made
    targets = load_digits().target
    part_of: dict[int, set[str]] = {}
    for path in (folder / "imagenet_splits_5").rglob("*.png"):
        part, class_name, _ = path.relative_to(folder / "imagenet_splits_5").parts
        original = int(path.stem.partition("_")[0])
        assert class_name == str(targets[original])
        part_of.setdefault(original, set()).add(part)
    _, validation = demo.split_originals(targets[:NUM_DIGITS], seed=42)
    assert sorted(part_of) == sorted(validation)
    assert all(len(parts) == 1 for parts in part_of.values())
    sizes = Counter(part for (part,) in part_of.values())
    assert sorted(sizes) == [f"split_part_{number}" for number in range(1, 6)]
    assert max(sizes.values()) - min(sizes.values()) <= 1
    images = list_images(folder / "imagenet_splits_5")
    for target in range(10):
        in_parts = np.bincount(images.folds[images.targets == target], minlength=5)
        assert in_parts.max() - in_parts.min() <= 3  # one original, of three views


def test_the_images_are_the_same_on_every_machine() -> None:
    views = demo.distorted_views(load_digits().images, np.array([0, 7, 1796]), 20, 42, "test")
    assert hashlib.sha256(views.tobytes()).hexdigest()[:16] == "0859550a3cb4c0e2"


def test_a_view_does_not_depend_on_the_views_beside_it() -> None:
    digits = load_digits().images
    many = demo.distorted_views(digits, np.array([3, 4]), 4, 42, "test").reshape(2, 4, 32, 32)
    few = demo.distorted_views(digits, np.array([4]), 2, 42, "test")
    assert np.array_equal(many[1, :2], few)
    assert not np.array_equal(few[0], few[1])


def test_timm_loads_the_classifiers_with_their_preprocessing(made: tuple[Path, dict]) -> None:
    folder, _ = made
    path = next((folder / "imagenet_splits_5").rglob("*.png"))
    pixels = np.array(Image.open(path))
    for stage in ("shallow", "deep"):
        model = timm.create_model(f"local-dir:{folder / stage}", pretrained=True)
        transform = create_transform(**resolve_data_config({}, model=model))
        seen = transform(Image.open(path).convert("RGB"))
        torch.testing.assert_close(seen, demo.to_input(pixels[None])[0], atol=1e-6, rtol=0)


def test_the_manifest_states_the_accuracy_that_the_package_measures(made: tuple[Path, dict]) -> None:
    folder, manifest = made
    images = list_images(folder / "imagenet_splits_5")
    for stage, entry in manifest["classifiers"].items():  # type: ignore[attr-defined]
        classifier = load_classifier(f"local-dir:{folder / stage}", device="cpu")
        answers = np.concatenate([batch.probs.argmax(1) for batch in classify(classifier, images)])
        top1 = 100 * (answers == class_readings(images, classifier)[0].of(images.targets)).mean()
        assert top1 == pytest.approx(entry["top1"], abs=1e-9)
        assert classifier.flops == entry["flops"]
    assert manifest["classifiers"]["deep"]["flops"] >= 5 * manifest["classifiers"]["shallow"]["flops"]


def squares() -> tuple[np.ndarray, np.ndarray]:
    """A task that can be learnt in seconds: which of ten places a square lies at."""
    images, targets = np.zeros((640, 32, 32), np.uint8), np.arange(640) % 10
    for image, target in zip(images, targets, strict=True):
        image[6 * (target // 2) : 6 * (target // 2) + 6, 16 * (target % 2) : 16 * (target % 2) + 16] = 200
    return images, targets


def test_training_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_BATCH_SIZE", 16)  # more steps for the same time
    images, targets = squares()
    model = demo.new_classifier("test_resnet", seed=0)
    demo.train_classifier(model, images, targets, epochs=4, seed=0, description="test")
    assert not model.training
    assert (demo.classify(model, images) == targets).mean() > 0.3  # three times what guessing gives


def test_the_same_seed_trains_the_same_classifier() -> None:
    images, targets = squares()
    states = []
    for seed in (0, 0, 1):
        model = demo.new_classifier("test_resnet", seed)
        demo.train_classifier(model, images, targets, epochs=1, seed=seed, description="test")
        states.append(model.get_classifier().weight.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_second_run_takes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_training: None
) -> None:
    first = make_small(tmp_path, monkeypatch)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.suffix != ".lock"}
    monkeypatch.setattr(demo, "make", None)
    assert make_small(tmp_path, monkeypatch) == first
    assert "nothing to make" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_damaged_demo_is_made_again_and_another_seed_makes_another_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_training: None
) -> None:
    first = make_small(tmp_path, monkeypatch)
    image = next((tmp_path / "imagenet_splits_5").rglob("*.png"))
    for damage in (
        image.unlink,
        lambda: image.write_bytes(image.read_bytes()[:50]),
        (tmp_path / "deep" / "model.safetensors").unlink,
        lambda: image.with_name("9999_0.png").write_bytes(image.read_bytes()),
    ):
        damage()
        assert make_small(tmp_path, monkeypatch)["digest"] == first["digest"] == demo.digest(tmp_path)
    other = make_small(tmp_path, monkeypatch, "--seed", "1")
    assert other["digest"] != first["digest"]
    assert other["num_images"] == len(list(tmp_path.rglob("*.png")))


def test_an_interrupted_run_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_training: None
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as context:
        context.setattr(demo, "train_classifier", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_small(tmp_path, context)
    assert "digest" not in json.loads((tmp_path / "demo.json").read_text())
    assert make_small(tmp_path, monkeypatch)["digest"] == demo.digest(tmp_path)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shallow").mkdir()
    (tmp_path / "shallow" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds shallow and no demo.json; choose another folder"):
        make_small(tmp_path, monkeypatch)
    assert (tmp_path / "shallow" / "thesis.txt").read_text() == "mine"


def test_a_link_in_the_demos_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "shallow").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError, match="shallow is a symbolic link; delete it or choose another folder"):
        demo.make(tmp_path / "demo", demo.Settings(1, 1, 1, 0))
    assert not list((tmp_path / "victim").iterdir())
