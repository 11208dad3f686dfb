"""Every figure of the scripts that run models, against tests/plain.py, timm alone and a clock of our own."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import scripts
import timm
import torch
from PIL import Image
from plain import NEAR, NEARER, check_performance, judged_by_fold, line_with, numbers
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, Workshop
from timm.data import create_transform, resolve_data_config
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet

from clcnet import CLCNet

FLOPS = (1.0, 4.0)
FIXED, SHALLOW_SECONDS, DEEP_SECONDS = 0.5, 0.25, 2.0  # what a batch takes, and an image in it with either model
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Gallery:
    """Sixty images, two models of different kinds, and what these say, run by timm alone."""

    workshop: Workshop
    models: list[str]
    names: list[str]
    folds: Any
    targets: Any
    probs: list[Any]  # of the shallow and the deep model: (N, 3)

    def answers(self, model: int) -> tuple[Any, Any]:
        """Sorted probabilities and right answers."""
        return -np.sort(-self.probs[model], axis=1), self.probs[model].argmax(1) == self.targets


@pytest.fixture(scope="module")
def gallery(workshop: Workshop, classifier_dir: Callable[..., Path]) -> Gallery:
    models = [f"local-dir:{classifier_dir(seed=1)}", f"local-dir:{classifier_dir('test_convnext', seed=2)}"]
    paths = sorted(workshop.images.rglob("*.png"), key=lambda path: path.name)
    probs = []
    for name in models:
        model = timm.create_model(name, pretrained=True).eval()
        transform = create_transform(**resolve_data_config({}, model=model))
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        with torch.inference_mode():
            probs.append(model(batch).softmax(1).numpy())
    folds = np.array([int(path.parent.parent.name[-1]) - 1 for path in paths])
    targets = np.array([scripts.CLASSES.index(path.parent.name) for path in paths])
    return Gallery(workshop, models, [path.name for path in paths], folds, targets, probs)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time that passes in the models alone."""
    now = [0.0]
    for model, seconds in ((ResNet, SHALLOW_SECONDS), (ConvNeXt, DEEP_SECONDS)):

        def forward(self: Any, batch: Any, plain: Any = model.forward, seconds: float = seconds) -> Any:
            now[0] += FIXED + seconds * len(batch)
            return plain(self, batch)

        monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    yield


def num_batches(images: int, size: int = 8) -> int:
    return -(-images // size)


def test_step_3_prints_top_1_and_images_a_second(gallery: Gallery, clock: None, tmp_path: Path) -> None:
    words = gallery.workshop.command(GENERATE, tmp_path)
    finished = scripts.run(GENERATE, *words, "--model", gallery.models[0])
    sorted_probs, right = gallery.answers(0)
    names, written, labels = plain.read_table(tmp_path / "table.csv")
    assert names == gallery.names and labels.tolist() == right.tolist()
    np.testing.assert_allclose(written, sorted_probs, atol=1e-5)
    seconds = 60 * SHALLOW_SECONDS + num_batches(60) * FIXED
    said = numbers(line_with("images/s", finished).partition("top-1")[2])
    assert said == pytest.approx([100 * right.mean(), 60, 60 / seconds], abs=NEAR)


def test_step_4_prints_what_an_image_takes_in_batches_and_averages_both_models(
    gallery: Gallery, clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clcnet.report.plots.save", lambda *_: [])
    words = [*gallery.workshop.command(EVALUATE_FOLDS, tmp_path), "--thresholds", "all"]
    words += ["--shallow-model", gallery.models[0], "--deep-model", gallery.models[1]]
    finished = scripts.run(EVALUATE_FOLDS, *words, "--shallow-model-FLOPs", FLOPS[0], "--deep-model-FLOPs", FLOPS[1])
    assert finished.code == 0, finished.err
    networks = [CLCNet.load(gallery.workshop.weights / f"CLCNet_imagenet_split_{fold}.zip") for fold in range(1, 6)]
    (shallow, right), (deep, deep_right) = gallery.answers(0), gallery.answers(1)
    sure = [judged_by_fold(networks, rows, gallery.folds) for rows in (shallow, deep)]
    two = plain.Two(*sure, right, deep_right, FLOPS)
    rows = plain.read(tmp_path / "performance-result.csv")
    check_performance(rows, two, two.curve()[0])
    shallow_time, deep_time = (1000 * (FIXED / 8 + seconds) for seconds in (SHALLOW_SECONDS, DEEP_SECONDS))
    times = [shallow_time + row["deferral"] * deep_time for row in rows]
    assert [row["milliseconds"] for row in rows] == pytest.approx(times)
    deferral = numbers(line_with("take threshold", finished))[4] / 100
    cost = shallow_time + deferral * deep_time
    said = numbers(line_with("In time:", finished))
    assert said == pytest.approx([cost, deep_time, deep_time / cost, shallow_time], rel=5e-3)
    average = sum(gallery.probs).argmax(1) == gallery.targets
    written = plain.read(tmp_path / "results" / "comparison.csv", "rule")
    averaged = {
        "CLCNet, average answers": two._replace(deep_right=average, last=True),
        "GEM, average answers random images": two._replace(first=np.zeros(60), deep_right=average, last=True),
    }
    for name, rule in averaged.items():
        expected = rule.figures() | {"saving": rule.saving(100 * deep_right.mean(), FLOPS[1])}
        assert {column: np.nan if written[name][column] is None else written[name][column] for column in expected} == (
            pytest.approx(expected, nan_ok=True)
        ), name


@pytest.mark.parametrize("labelled", [True, False])
def test_step_5_says_what_the_cascade_saved_and_at_what_accuracy(
    gallery: Gallery, clock: None, tmp_path: Path, labelled: bool
) -> None:
    network = CLCNet.load(gallery.workshop.weights / "CLCNet_custom_data.zip")
    (shallow, right), (deep, deep_right) = gallery.answers(0), gallery.answers(1)
    sure = [network.predict(rows) for rows in (shallow, deep)]
    threshold = float(np.sort(sure[0])[25:27].mean())
    photos = gallery.workshop.images
    if not labelled:
        photos = tmp_path / "flat"
        photos.mkdir()
        for path in gallery.workshop.images.rglob("*.png"):
            (photos / path.name).symlink_to(path)
    words = [*gallery.workshop.command(EVALUATE_CUSTOM, tmp_path), "--custom-data", photos, f"--threshold={threshold}"]
    words += ["--shallow-model", gallery.models[0], "--deep-model", gallery.models[1]]
    finished = scripts.run(EVALUATE_CUSTOM, *words, "--shallow-model-FLOPs", FLOPS[0], "--deep-model-FLOPs", FLOPS[1])
    assert finished.code == 0, finished.err
    deferred = sure[0] < threshold
    kept = deferred & (sure[1] > sure[0])
    predicted = [rows.argmax(1) for rows in gallery.probs]
    read = plain.read(tmp_path / "custom-data-result.csv", "file")
    rows = {name.rpartition("/")[2]: row for name, row in read.items()}
    assert sorted(rows) == gallery.names and 10 < deferred.sum() < 40 and kept.any()
    for k, name in enumerate(gallery.names):
        row, stage = rows[name], int(kept[k])
        assert row["GT"] == (gallery.targets[k] if labelled else None)
        assert (row["predict"], row["answered_by"]) == (predicted[stage][k], ("shallow", "deep")[stage])
        assert row["class_name"] == scripts.CLASSES[predicted[stage][k]]
        found = [row["confidence"], row["shallow_predict"], row["shallow_confidence"]]
        assert found == pytest.approx([sure[stage][k], predicted[0][k], sure[0][k]], abs=1e-4)
        expected = [predicted[1][k], sure[1][k]] if deferred[k] else [None, None]
        assert [row["deep_predict"], row["deep_confidence"]] == pytest.approx(expected, abs=1e-4)

    number = int(deferred.sum())
    said = numbers(line_with("deferred to the deep model", finished))
    assert said == pytest.approx([100 * number / 60, number, kept.sum()], abs=NEAR)
    if labelled:
        accuracies = [100 * np.where(kept, deep_right, right).mean(), 100 * right.mean()]
        assert numbers(line_with("accuracy", finished)) == pytest.approx(accuracies, abs=NEARER)
        asked = [100 * right[deferred].mean(), 100 * deep_right[deferred].mean()]
        assert numbers(line_with("on the deferred ones the", finished)) == pytest.approx(asked, abs=NEARER)
    else:
        assert "accuracy" not in finished.out
    classes = gallery.targets if labelled else predicted[0]
    most = {name: [(deferred & (classes == k)).sum(), (classes == k).sum()] for k, name in enumerate(scripts.CLASSES)}
    found = re.findall(r"(\w+): (\d+)% \((\d+) of (\d+)\)", line_with("classes that defer most", finished))
    assert {name: [int(part), int(total)] for name, _, part, total in found} == {k: v for k, v in most.items() if v[0]}
    shares = [int(part) / int(total) for _, _, part, total in found]
    assert shares == sorted(shares, reverse=True)
    assert [int(percent) for _, percent, _, _ in found] == [round(100 * share) for share in shares]

    cost = FLOPS[0] + FLOPS[1] * number / 60
    said = numbers(line_with("FLOPs:", finished))
    assert said == pytest.approx([cost, FLOPS[1], FLOPS[1] / cost], abs=NEARER)
    seconds = 60 * SHALLOW_SECONDS + num_batches(60) * FIXED + number * DEEP_SECONDS + num_batches(number) * FIXED
    timed = [8, *[8] * (num_batches(number) - 2), number - 8 * (num_batches(number) - 1)][1:]  # without the first
    alone = 60 * sum(FIXED + DEEP_SECONDS * count for count in timed) / sum(timed)
    said = numbers(line_with("time:", finished))
    assert said == pytest.approx([seconds, 60 / seconds, alone, alone / seconds], abs=NEAR + 1e-9)
    assert alone / seconds > 1.05
    assert numbers(finished.out.splitlines()[-1])[0] == 60
