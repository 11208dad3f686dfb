"""Images through models into a result file: against the definition image by image, interrupted, by two processes."""

import csv
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import forking
import numpy as np
import pytest
import torch
from networks import classify
from PIL import Image
from scripts import interrupt_after

from clcnet import Cascade, distributed
from clcnet.cascade.rules import Surest
from clcnet.cascade.runner import FolderRun, Stopwatch, run_folder, write_result
from clcnet.classifiers import decoding
from clcnet.classifiers.classes import class_readings
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.classifiers.decoding import DecodedImages, ImageDataset
from clcnet.classifiers.schedule import NOTHING, Indices, cut
from clcnet.classifiers.stream import Batch, Round, stream
from clcnet.data.images import ImageSet, list_images

Factory = Callable[..., Path]
CLASSES = ["ant", "bee", "cat"]
RULE = Surest("max softmax")
STAGES = ("small", "middle", "large")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def names(classifier_dir: Factory) -> list[str]:
    """Three models; the third numbers its classes in another order, and the second sees larger images."""
    folders = [
        classifier_dir(seed=1),
        classifier_dir("test_vit", size=48, seed=2),
        classifier_dir("test_convnext", seed=3, label_names=("cat", "ant", "bee")),
    ]
    return [f"local-dir:{folder}" for folder in folders]


@pytest.fixture(scope="module")
def models(names: list[str]) -> list[Classifier]:
    return [load(name) for name in names]


def load(name: str) -> Classifier:
    """A model with less extreme answers than the fixture's, whose confidences would all be 1."""
    classifier = load_classifier(name, device="cpu")
    with torch.no_grad():
        for parameter in classifier.model.get_classifier().parameters():
            parameter.mul_(0.1 if "resnet" in name else 0.02)
    return classifier


class Scene(NamedTuple):
    """Models and images, with thresholds such that 18 of these see the second model and 9 the third."""

    models: list[Classifier]
    images: ImageSet
    probs: np.ndarray  # (3, 27, 3): what each model says of every image alone, classes in the first one's order
    thresholds: list[float]

    def run(self, folder: Path, workers: int = 0) -> FolderRun:
        """The cascade from images to the files `folder`/result.csv and `folder`/store."""
        found = run(self.models, self.thresholds, self.images, folder, workers)
        assert found is not None
        return found

    def expected(self) -> list[tuple[int, float, int, int]]:
        """What the definition says, image by image: class, confidence, whose answer stands, which model came last."""
        return [literal(self.probs[:, image], self.thresholds) for image in range(27)]


@pytest.fixture
def scene(models: list[Classifier], image_folder: Factory) -> Scene:
    """No confidence lies near a threshold."""
    images, found = list_images(image_folder(images_per_class=9)), []
    for model in models:
        alone = np.concatenate([batch.probs for batch in classify(model, images, batch_size=4)])
        assert model.label_names is not None
        found.append(alone[:, [model.label_names.index(name) for name in CLASSES]])
    first = found[0].max(axis=1)
    after_first = float(np.sort(first)[17:19].mean())
    after_second = np.maximum(first, found[1].max(axis=1))[first < after_first]
    return Scene(models, images, np.stack(found), [after_first, float(np.sort(after_second)[8:10].mean())])


def literal(probs: np.ndarray, thresholds: list[float]) -> tuple[int, float, int, int]:
    """The definition, for one image (K, C): class, confidence, whose answer stands, which model was asked last."""
    label, confidence, answered_by = -1, -np.inf, -1
    for stage, answer in enumerate(probs):
        if answer.max() > confidence:
            label, confidence, answered_by = int(answer.argmax()), float(answer.max()), stage
        if stage == len(thresholds) or confidence >= thresholds[stage]:
            return label, confidence, answered_by, stage
    raise AssertionError


def run(
    models: list[Classifier], thresholds: list[float], images: ImageSet, folder: Path, workers: int = 0
) -> FolderRun | None:
    with distributed.processes():
        readings = class_readings(images, models[0])
        found = run_folder(models, RULE, thresholds, images, readings, folder / "store", 4, workers)
        if found is not None:
            write_result(folder / "result.csv", images, found.answers, STAGES[: len(models)], CLASSES)
        return found


def run_in_a_process(names: list[str], thresholds: list[float], root: Path, folder: Path) -> None:
    run([load(name) for name in names], thresholds, list_images(root), folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_three_models_give_the_file_that_the_definition_gives_image_by_image(
    scene: Scene, tmp_path: Path, workers: int, asked: Counter[str]
) -> None:
    asked.clear()
    found = scene.run(tmp_path / "out", workers)
    with open(tmp_path / "out" / "result.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = scene.expected()
    assert Counter(last for *_, last in expected) == {0: 9, 1: 9, 2: 9}
    assert len({answered_by for _, _, answered_by, _ in expected}) == 3, "each model has the last word somewhere"
    for index, (row, (label, confidence, answered_by, last)) in enumerate(zip(rows, expected, strict=True)):
        assert row["file"] == f"{CLASSES[index // 9]}/{CLASSES[index // 9]}_{index % 9:04d}.png"
        assert (row["predict"], row["GT"], row["class_name"]) == (str(label), str(index // 9), CLASSES[label])
        assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-6)
        assert row["answered_by"] == STAGES[answered_by]
        for stage, name in enumerate(STAGES):
            own = scene.probs[stage, index]
            assert row[f"{name}_predict"] == (str(own.argmax()) if stage <= last else "")
            if stage <= last:
                assert float(row[f"{name}_confidence"]) == pytest.approx(own.max(), abs=1e-6)
    assert found.answers.calls.tolist() == pytest.approx([1, 18 / 27, 9 / 27])
    assert [asked[model.name] for model in scene.models] == [27, 18, 9], "a model sees what goes on to it and no more"


def test_the_cascade_called_on_the_same_images_says_the_same(scene: Scene, tmp_path: Path) -> None:
    found = scene.run(tmp_path)
    labels, confidences, answered_by = Cascade.of(scene.models, RULE, scene.thresholds)(scene.images.paths)
    np.testing.assert_array_equal(found.answers.labels, labels)
    np.testing.assert_array_equal(found.answers.answered_by, answered_by)
    np.testing.assert_allclose(found.answers.confidence, confidences, atol=1e-5)


@pytest.fixture
def whole(scene: Scene, tmp_path: Path) -> bytes:
    """The result of one process that nobody interrupted."""
    scene.run(tmp_path / "whole")
    return (tmp_path / "whole" / "result.csv").read_bytes()


def test_two_processes_write_the_bytes_of_one_and_go_on_with_what_one_began(
    scene: Scene, names: list[str], whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt, match="kept in .*store; the same command goes on from there"):
            scene.run(tmp_path / "begun")
    for folder in (tmp_path / "two", tmp_path / "begun"):
        assert forking.run_together(2, run_in_a_process, names, scene.thresholds, scene.images.root, folder) == [0, 0]
        assert (folder / "result.csv").read_bytes() == whole


@pytest.mark.parametrize("num_batches", [0, 1, 6, 13])
def test_wherever_a_run_is_interrupted_the_next_one_ends_with_the_same_bytes_and_asks_for_the_rest_alone(
    scene: Scene, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Counter[str], num_batches: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_batches)
        with pytest.raises(KeyboardInterrupt):
            scene.run(tmp_path)
    assert not (tmp_path / "result.csv").exists()
    scene.run(tmp_path)
    assert (tmp_path / "result.csv").read_bytes() == whole
    lost_batch = sum(asked.values()) - (27 + 18 + 9)  # it was answered but not kept
    assert 1 <= lost_batch <= 4


def test_a_run_over_what_is_all_known_asks_no_model_and_says_the_same(
    scene: Scene, whole: bytes, tmp_path: Path, asked: Counter[str]
) -> None:
    found = scene.run(tmp_path / "whole")
    assert (tmp_path / "whole" / "result.csv").read_bytes() == whole
    assert not asked
    assert found.num_before == [27, 18, 9]
    assert np.isnan([found.stopwatch.images_per_second, found.stopwatch.time_saving]).all()


def test_with_higher_thresholds_the_additional_images_alone_are_asked_about(
    scene: Scene, whole: bytes, tmp_path: Path, asked: Counter[str]
) -> None:
    asked.clear()
    scene = scene._replace(thresholds=[np.inf, scene.thresholds[1]])
    found, expected = scene.run(tmp_path / "whole"), scene.expected()
    num_last = sum(last == 2 for *_, last in expected)
    assert found.answers.labels.tolist() == [label for label, *_ in expected]
    assert [asked[model.name] for model in scene.models] == [0, 27 - 18, num_last - 9]


def test_an_image_that_only_a_later_model_cannot_read_is_left_out_too(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = next(index for index, (*_, last) in enumerate(scene.expected()) if last == 1)
    read = ImageDataset.read

    def read_and_remove(self: ImageDataset, index: int) -> Image.Image:
        image = read(self, index)
        if index == gone:
            scene.images.paths[gone].unlink()
        return image

    monkeypatch.setattr(ImageDataset, "read", read_and_remove)
    monkeypatch.setattr(DecodedImages, "put", lambda *_: None)  # as where there is no room to keep decoded images
    found = scene.run(tmp_path)
    assert list(found.unreadable) == [gone] and found.answers.places.tolist() == [k for k in range(27) if k != gone]


@pytest.mark.parametrize("room", [True, False])
def test_an_image_is_decoded_once_for_all_models_where_there_is_room(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    reads: Counter[int] = Counter()
    read = ImageDataset.read

    def count(self: ImageDataset, place: int) -> Image.Image:
        reads[place] += 1
        return read(self, place)

    monkeypatch.setattr(ImageDataset, "read", count)
    monkeypatch.setattr(decoding, "SHARED", tmp_path / "memory")
    monkeypatch.setattr(decoding, "free_bytes", lambda: None if room else 0)
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 0, 2**30))
    (tmp_path / "memory" / f"clcnet-{2**22 + 1}-of-a-killed-run").mkdir(parents=True)  # no process has this number
    found = scene.run(tmp_path)
    seen = [1 if room else last + 1 for *_, last in scene.expected()]
    assert [reads[place] for place in range(27)] == seen
    assert not list((tmp_path / "memory").iterdir())
    assert found.answers.labels.tolist() == [label for label, *_ in scene.expected()]


# ---------------------------------------------------------------- the stream below


@pytest.mark.parametrize("workers", [0, 1])
def test_later_models_work_on_full_batches_between_those_of_the_first_one(scene: Scene, workers: int) -> None:
    def every_other(batch: Batch) -> list[tuple[int, Indices]]:
        return [(1, batch.indices[::2])] if batch.stage == 0 else []

    rounds = list(stream(scene.models[:2], scene.images, cut(np.arange(27), 4), 4, workers, every_other))
    sizes = [[found.num_images for found in rounds if found.stage == stage] for stage in (0, 1)]
    assert sizes == [[4, 4, 4, 4, 4, 4, 3], [4, 4, 4, 2]]
    stages = [found.stage for found in rounds if found.stage != NOTHING]
    assert stages.index(1) < len(stages) - 1 - stages[::-1].index(0)


def test_the_last_models_time_is_that_of_its_rounds_the_first_of_which_sets_up() -> None:
    def took(stage: int, num_images: int, seconds: float) -> Round:
        indices = np.arange(num_images)
        return Round([Batch(stage, indices, indices >= 0, np.ones((num_images, 1), np.float32), {})], seconds, 0.25)

    stopwatch = Stopwatch(2)
    assert np.isnan([stopwatch.time_saving, stopwatch.images_per_second]).all()
    for found in [took(0, 8, 1), took(1, 4, 9), took(0, 8, 1), took(NOTHING, 0, 5), took(1, 4, 2)]:
        stopwatch.add(found)
    stopwatch.wall = 11.0
    assert stopwatch.time_saving == pytest.approx(2.0)  # 11 s for 8 images: both rounds count where there are but two
    stopwatch.add(took(1, 1, 0.5))
    assert stopwatch.waited == pytest.approx(6 * 0.25)
    stopwatch.wall = 4.0
    # 2.5 s for 5 images: 8 s for all 16, twice what the cascade took
    assert stopwatch.time_saving == pytest.approx(2.0)
    assert stopwatch.images_per_second == pytest.approx(4.0)
    assert [stopwatch.num_images(stage) for stage in (0, 1)] == [16, 9]
    alone = Stopwatch(1)
    alone.add(took(0, 8, 1))
    assert np.isnan(alone.time_saving) and alone.images_per_second > 0  # a model alone says nothing of a later one
