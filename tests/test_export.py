"""`clcnet.cascade.export`: its file answers in onnxruntime as the cascade does in torch, and runs no model in vain."""

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from networks import sorted_rows, trained_looking
from PIL import Image
from scripts import run as command

from clcnet import Cascade, CLCNet, Outputs
from clcnet.cascade import export
from clcnet.cascade.policy import Policy
from clcnet.cascade.pool import Pool
from clcnet.cascade.rules import Average, Fused, Last, Rule, Surest
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.confidence import CLCNET, SIMPLE_CONFIDENCES, TEMPERED
from clcnet.data.outputs import Record
from clcnet.network.calibration import Calibration

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runtime() -> ModuleType:
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install .[onnx]")
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install .[onnx]")


def calibrated(num_classes: int, weights: tuple[float, ...] = (0.5, -0.1, 0.2, -0.3)) -> CLCNet:
    network = trained_looking(num_classes)
    network.calibration = Calibration(0.3, weights, 0.4)
    return network


def fused(num_classes: int, count: int, offsets: bool, **options: Any) -> Fused:
    random = np.random.default_rng(0)
    pools = tuple(
        Pool(random.uniform(0.3, 1, k), random.normal(0, 1, num_classes) if offsets else None)
        for k in range(1, count + 1)
    )
    return Fused(offsets=offsets, pools=pools, **options)


RULES: dict[str, Rule] = {
    CLCNET: Surest(CLCNET, network=calibrated(3)),
    "CLCNet, its own score": Surest(CLCNET, network=trained_looking(3)),
    **{name: Surest(name) for name in SIMPLE_CONFIDENCES},
    TEMPERED: Surest(TEMPERED, temperatures=(0.7, 1.6, 2.5)),
    "last": Last("margin"),
    "average": Average("entropy"),
    "fused": fused(3, 3, offsets=True),
    "fused without b, judged by CLCNet": fused(3, 3, offsets=False, confidence=CLCNET, network=calibrated(3)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_rule_on_tensors_says_what_it_says_on_outputs(name: str, count: int) -> None:
    random = np.random.default_rng(1)
    outputs = [Outputs.from_logits(random.normal(0, 2, (500, 3))) for _ in range(count)]
    expected = RULES[name].step(outputs)
    with torch.inference_mode():
        found = export._Step(RULES[name], count)([torch.from_numpy(each.probs) for each in outputs])
    labels, confidence, answered_by = (each.numpy() for each in found)
    np.testing.assert_allclose(confidence, expected.confidence, atol=2e-6)
    assert labels.tolist() == expected.labels.tolist() and answered_by.tolist() == expected.answered_by.tolist()


@pytest.fixture(scope="module")
def three(classifier_dir: Callable[..., Path]) -> list[Classifier]:
    """Three models that see images of two sizes; the second one numbers the classes otherwise."""
    orders, sizes = (["ant", "bee", "cat"], ["cat", "ant", "bee"], ["ant", "bee", "cat"]), (32, 32, 48)
    return [
        load_classifier(f"local-dir:{classifier_dir(seed=seed, label_names=names, size=size)}", device="cpu")
        for seed, (names, size) in enumerate(zip(orders, sizes, strict=True))
    ]


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(5)
    colours = random.integers(0, 256, (count, 1, 1, 3)) + random.normal(0, 40, (count, 48, 48, 3))
    return [Image.fromarray(pixels) for pixels in colours.clip(0, 255).astype(np.uint8)]


def run(runtime: ModuleType, model: Any, classifiers: Sequence[Classifier], images: Sequence[Any]) -> list[np.ndarray]:
    session = runtime.InferenceSession(model if isinstance(model, str) else model.SerializeToString())
    batches = [torch.stack([each.transform(image) for image in images]).numpy() for each in classifiers]
    feeds = {f"images_{place}": batch for place, batch in enumerate(batches)}
    return session.run(["labels", "confidences", "answered_by"], feeds)


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for ours, theirs in zip(found[::2], list(expected)[::2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], list(expected)[1], atol=1e-5)


@pytest.mark.parametrize("name, count", [(CLCNET, 2), ("fused", 3)])
def test_the_file_answers_as_the_cascade_does(runtime, three, tmp_path: Path, name: str, count: int) -> None:
    models, images = three[:count], pictures(80)
    shares = (0.6, 0.5)[: count - 1]
    thresholds: list[float] = []
    for stage, share in enumerate(shares):  # so that each model sees a part of what came to the one before it
        so_far = Cascade.of(models[: stage + 1], RULES[name], thresholds)(images)
        reached = so_far.confidences[so_far.confidences < (thresholds[-1] if thresholds else np.inf)]
        thresholds.append(float(np.quantile(reached, share)) + 1e-4)
    records = [Record(each.name, each.key, loaded_from=each.loaded_from) for each in models]
    policy = Policy(records, RULES[name], thresholds)
    weights = tmp_path / "clcnet.zip"
    if name == CLCNET:
        RULES[name].network.save(weights)
    policy.save(tmp_path / "cascade.json", weights if name == CLCNET else None)
    output = tmp_path / "cascade.onnx"
    finished = command(export.__name__, "--policy", tmp_path / "cascade.json", "--output", output)
    assert finished.code == 0, finished

    expected = Cascade.from_policy(tmp_path / "cascade.json", "cpu")(images)
    assert len(set(expected.answered_by.tolist())) > 1
    assert_same(run(runtime, str(output), models, images), expected)
    for size in (1, 3):
        assert_same(run(runtime, str(output), models, images[:size]), [part[:size] for part in expected])
    written = pytest.importorskip("onnx").load(output)
    told = {prop.key: json.loads(prop.value) for prop in written.metadata_props}
    assert told["class_names"] == ["ant", "bee", "cat"]
    assert told["models"][-1]["preprocessing"]["input_size"] == list(models[-1].input_size)
    assert {one.domain: one.version for one in written.opset_import}[""] == export.OPSET


def set_threshold(model: Any, threshold: float) -> None:
    """Give a cascade of two models another one."""
    from onnx import numpy_helper

    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("_threshold"))
    tensor.CopyFrom(numpy_helper.from_array(np.float64(threshold), tensor.name))


OF_SIMPLE, OF_TEMPERED = (0.5, -0.1, 0.2, -0.3), (0.5, -0.1, 0.2)


@pytest.mark.parametrize(("num_classes", "weights"), [(10, OF_SIMPLE), (10, OF_TEMPERED), (1000, OF_TEMPERED)])
def test_clcnet_alone_scores_as_in_torch(runtime, tmp_path: Path, num_classes: int, weights: tuple[float, ...]) -> None:
    network = calibrated(num_classes, weights)
    network.save(tmp_path / "clcnet.zip")
    finished = command(export.__name__, "--weight", tmp_path / "clcnet.zip", "--output", tmp_path / "clcnet.onnx")
    assert finished.code == 0, finished
    session = runtime.InferenceSession(str(tmp_path / "clcnet.onnx"))
    for count in (1, 300):
        rows = sorted_rows(count, num_classes)
        (found,) = session.run(["confidences"], {"probs": rows})
        np.testing.assert_allclose(found, network.predict(rows), atol=1e-5)


def test_cifar10_is_answered_alike_and_models_that_nothing_goes_to_are_not_run(runtime, shared: Path) -> None:
    folder = shared / "cifar10"
    models = [load_classifier(f"local-dir:{folder / name}", device="cpu") for name in ("shallow", "deep")]
    files = sorted((folder / "imagenet_splits_5").rglob("*.jpg"))[::10]
    images = [Image.open(file).convert("RGB") for file in files]
    rule = Surest(CLCNET, network=CLCNet.load(ROOT / "weights" / "demo" / "CLCNet_custom_data.zip"))
    model = export.export_policy(Policy([], rule, [0.8]), models)
    expected = Cascade.of(models, rule, [0.8])(images)
    assert len(images) == 1000 and 0.1 < expected.answered_by.mean() < 0.9
    assert_same(run(runtime, model, models, images), expected)

    batch = [torch.stack([each.transform(image) for image in images[:256]]).numpy() for each in models]
    seconds = []
    for threshold in (-np.inf, np.inf):
        set_threshold(model, threshold)
        session = runtime.InferenceSession(model.SerializeToString())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            session.run(None, {"images_0": batch[0], "images_1": batch[1]})
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    print(f"256 images: {seconds[0]:.3f} s with nothing deferred, {seconds[1]:.3f} s with everything")
    assert seconds[0] < 0.6 * seconds[1]  # multiply-adds: 4.1 against 26.5 million


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed; pip install 'clcnet\[onnx\]'"):
        export.check_extras()
