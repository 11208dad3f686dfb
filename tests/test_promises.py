"""Promises about cascades: certified on images that chose nothing, kept in the policy, told at the end of step 5.

python -m pytest tests/test_promises.py
"""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scripts import EVALUATE_CUSTOM, GENERATE, TRAIN_CUSTOM, run

from clcnet import Cascade
from clcnet.cascade.drift import DriftError
from clcnet.cascade.guarantee import could_promise, loses_less, most_cost, most_share, shuffled
from clcnet.cascade.policy import Policy
from clcnet.cascade.promises import Promise, choosing_images
from clcnet.cascade.selection import Goal
from clcnet.data.outputs import Outputs
from clcnet.report.search_cli import SearchRequest
from clcnet.report.search_report import search_and_report
from tests.test_fused import simulated

FOLDS = np.arange(6000) % 5
HELD = FOLDS >= 2


@pytest.fixture(scope="module")
def models() -> list[Outputs]:
    """The last one costs ten times the first."""
    outputs = simulated(6000, 4, (2.5, 3.5, 4.5), seed=5)
    return [replace(out, record=replace(out.record, flops=cost)) for out, cost in zip(outputs, (1, 3, 10), strict=True)]


def ask(models: list[Outputs], folder: Path, stages: int = 2, **promises: float) -> tuple[Policy, dict]:
    request = SearchRequest(Goal("match"), max_stages=stages, promise=Promise(**promises))
    found = search_and_report(models, FOLDS, request, folder, folder / "cascade.json")
    assert json.loads((folder / "recommendation.json").read_text()) == json.loads(json.dumps(found["recommendation"]))
    return Policy.load(folder / "cascade.json"), found["recommendation"]


def by_hand(policy: Policy, models: list[Outputs]) -> list[tuple[bool, int, float]]:
    """One held image after the other: right or not, number of models asked, final confidence."""
    held = [next(out for out in models if out.record.model == record.model).subset(HELD) for record in policy.models]
    steps = [policy.rule.step(held[: k + 1]) for k in range(len(held))]
    answers = []
    for image in range(HELD.sum()):
        asked = 0
        while asked < len(policy.thresholds) and steps[asked].confidence[image] < policy.thresholds[asked]:
            asked += 1
        answers.append((bool(steps[asked].correct[image]), asked, float(steps[asked].confidence[image])))
    return answers


def test_a_certificate_is_that_of_the_policy_image_by_image(models: list[Outputs], tmp_path: Path) -> None:
    promises = {"most_drop": 1.0, "most_flops": 9.0, "most_risk": 0.05}
    policy, recommendation = ask(models, tmp_path, stages=3, probability=0.9, **promises)
    certificate, expected = policy.certificate, policy.expected
    assert certificate is not None and expected is not None and policy.unsure_below is not None
    assert {name: getattr(certificate, name) for name in promises} == promises
    assert certificate.probability == 0.9 and certificate.num_images == expected.num_images == 3600
    assert certificate.against == "model 2" and len(policy.models) > 1
    right, last, confidence = map(np.array, zip(*by_hand(policy, models), strict=True))
    deep = models[2].correct[HELD]
    losses = deep.astype(int) - right
    stops = last < len(policy.thresholds)
    assert certificate.drop == pytest.approx(100 * losses.mean())
    assert certificate.kept_drop == pytest.approx(100 * losses[stops].mean())
    answered = confidence.astype(np.float32) >= np.float32(policy.unsure_below)
    assert certificate.coverage == answered.mean() and certificate.risk == pytest.approx(1 - right[answered].mean())
    assert expected.shares == [(last >= k).mean() for k in range(len(policy.models))]
    assert expected.accuracy == pytest.approx(100 * right.mean())
    assert [len(each) for each in expected.quantiles] == [99] * len(policy.models)
    # what must have been certified, each promise with a third of the tenth
    assert loses_less(losses[shuffled(3600)], 0.01, 0.1 / 3)
    assert most_cost(last, [model.flops for model in policy.models], 0.1 / 3) <= 9.0
    assert most_share((~right & answered).sum(), answered.sum(), 0.1 / 3) <= 0.05
    assert recommendation["unsure_below"] == policy.unsure_below
    assert recommendation["certificate"]["most_risk"] == 0.05


def test_images_that_certify_choose_nothing(models: list[Outputs], tmp_path: Path) -> None:
    """With half of their answers swapped the weights stay the same, and the certificate goes."""
    np.testing.assert_array_equal(choosing_images(FOLDS), ~HELD)
    swapped = np.where(HELD, np.roll(models[0].targets, 5), models[0].targets)
    others = [Outputs.from_probs(out.probs, targets=swapped, record=out.record) for out in models]
    policy, _ = ask(models, tmp_path, most_risk=0.3)
    other, recommendation = ask(others, tmp_path, most_risk=0.3)
    assert policy.certificate is not None and other.certificate is None
    assert recommendation["certificate"] is None and "no answers can be promised" in recommendation["reason"]
    assert policy.models == [models[place].record for place in range(3) if models[place].record in policy.models]


def test_where_images_are_too_few_it_is_said_what_could_be_promised(models: list[Outputs], tmp_path: Path) -> None:
    few = [out.subset(range(100)) for out in models]
    request = SearchRequest(Goal("match"), promise=Promise(most_drop=0.05))
    found = search_and_report(few, FOLDS[:100], request, tmp_path, tmp_path / "cascade.json")["recommendation"]
    assert found["choice"] == "model 2" and found["certificate"] is None
    assert "60 images are too few to promise that it loses at most 0.05 points; " in found["reason"]
    assert Policy.load(tmp_path / "cascade.json").models[0].model == "model 2"
    assert could_promise(np.ones(600, bool), np.ones(600, bool), 0.05) == pytest.approx(1.0)


def test_a_cost_alone_gets_the_dearest_cascade_that_keeps_it(models: list[Outputs], tmp_path: Path) -> None:
    cheap, _ = ask(models, tmp_path, most_flops=4.0)
    dear, _ = ask(models, tmp_path, most_flops=8.0)
    assert cheap.expected.flops < 4.0 < dear.expected.flops < 8.0
    none, recommendation = ask(models, tmp_path, most_flops=0.5)
    assert none.certificate is None and "no cascade takes at most 0.5B FLOPs" in recommendation["reason"]
    _, recommendation = ask(models, tmp_path, most_flops=1.5, most_drop=0.5)
    assert "cheap enough are not accurate enough" in recommendation["reason"]


# ---------------------------------------------------------------- on real images


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with promises for two models, by step 5's training on 2,000 images."""
    folder, cifar = tmp_path_factory.mktemp("real"), shared / "cifar10"
    for name in ("shallow", "deep"):
        model = ["--model", f"local-dir:{cifar / name}", "--output", folder / f"{name}.parquet"]
        data = ["--data-path", cifar / "imagenet_splits_5" / "split_part_1"]
        assert run(GENERATE, *data, *model, "--device", "cpu", "--workers", 0, "--store", folder / "store").code == 0
    tables = ["--cls-output", folder / "shallow.parquet", folder / "deep.parquet", "--weight-save", folder]
    promises = ["--guarantee", 0.9, "--most-drop", 3, "--most-risk", 0.1]
    outcome = run(TRAIN_CUSTOM, *tables, *promises, "--max-epochs", 2, "--device", "cpu")
    assert outcome.code == 0
    assert "Certificate: with probability 90%, it loses at most 3 points" in outcome.out
    return folder


def classify(real: Path, images: Path, *more: str | Path) -> tuple[str, int, list[dict[str, str]]]:
    words = ["--custom-data", images, "--policy", real / "cascade.json", "--result", real / "result.csv", *more]
    outcome = run(EVALUATE_CUSTOM, *words, "--device", "cpu", "--workers", 0, "--store", real / "store")
    rows = []
    if outcome.code == 0:
        with open(real / "result.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    return outcome.out + outcome.err, outcome.code, rows


def blurred(folder: Path, paths: list[Path]) -> Path:
    for path in paths:
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).filter(ImageFilter.GaussianBlur(1.5)).save(target)
    return folder


def test_step_5_says_what_is_promised_and_what_it_is_unsure_of(real: Path, shared: Path) -> None:
    images = shared / "cifar10" / "imagenet_splits_5" / "split_part_2"
    told, code, rows = classify(real, images)
    policy = Policy.load(real / "cascade.json")
    assert code == 0 and "no drift" in told
    assert "Certificate: with probability 90%" in told and "and on no others" in told
    unsure = np.array([int(row["unsure"]) for row in rows], dtype=bool)
    confidence = np.array([float(row["confidence"]) for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(unsure, confidence < np.float32(policy.unsure_below))
    wrong = np.array([row["predict"] != row["GT"] for row in rows])
    assert f"coverage {1 - unsure.mean():.1%}: unsure of {unsure.sum()} images" in told
    assert f"wrong on {wrong[~unsure].mean():.2%} of the others" in told
    assert wrong[~unsure].mean() < 0.1


def test_blurred_images_and_other_classes_are_drift(real: Path, shared: Path, tmp_path: Path) -> None:
    parts = shared / "cifar10" / "imagenet_splits_5"
    usual = sorted(parts.glob("split_part_3/*/*.jpg"))[::5]
    blurry = sorted(blurred(tmp_path / "blurred", usual).glob("*/*.jpg"))
    others = sorted((shared / "imagenet1k" / "val1300").glob("*.[jJ]*"))[:400]
    told, code, _ = classify(real, tmp_path / "blurred")
    assert code == 0 and "Drift: these are not images like the policy's" in told
    told, code, _ = classify(real, tmp_path / "blurred", "--on-drift", "stop")
    assert code == 2 and "--on-drift warn" in told
    for paths, drifts in ((usual, False), (blurry, True), (others, True)):
        cascade = Cascade.from_policy(real / "cascade.json", device="cpu", on_drift="stop")
        cascade.watch.window = 300
        if drifts:
            with pytest.raises(DriftError):
                cascade(paths)
        else:
            predictions = cascade(paths)
            np.testing.assert_array_equal(
                cascade.unsure(predictions), predictions.confidences < np.float32(cascade.policy.unsure_below)
            )
