"""Promises: betting by hand and by a second implementation, how often they are broken on the boundary; certified on
images that chose nothing, kept in the policy, told at the end of step 5.

python -m pytest tests/test_guarantee.py
"""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.stats import binom
from scripts import EVALUATE_CUSTOM, GENERATE, TRAIN_CUSTOM, run

from clcnet import Cascade
from clcnet.cascade.drift import DriftError
from clcnet.cascade.guarantee import (
    Promise,
    certified,
    certify,
    certify_risk,
    choosing_images,
    could_promise,
    log_capital,
    loses_less,
    most_cost,
    most_share,
    passed,
    shuffled,
)
from clcnet.cascade.policy import Policy
from clcnet.cascade.pool import folds_of_classes
from clcnet.cascade.search import find_cascades
from clcnet.cascade.selection import Goal
from clcnet.data.outputs import Outputs
from clcnet.report.search_cli import SearchRequest
from clcnet.report.search_report import search_and_report
from tests.test_fused import simulated


def plain_capital(differences: list[float], eps: float, delta: float) -> float:
    """Section by section, one image after the other."""
    capital, highest, total, squares = 1.0, 0.0, 0.0, 0.04
    for seen, difference in enumerate(differences, start=1):
        variance = squares / seen
        stake = min(math.sqrt(2 * math.log(1 / delta) / (len(differences) * variance)), 0.5 / (1 - eps))
        capital *= 1 + stake * (eps - difference)
        highest = max(highest, capital)
        total += difference
        squares += (difference - total / (seen + 1)) ** 2
    return highest


@settings(max_examples=100, deadline=None)
@example([-1, -1, 1] * 20, 0.0)  # so varied that stakes stay below their bound
@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=60), st.sampled_from([0.0, 0.005, 0.1, 0.5]))
def test_the_capital_is_that_of_one_bet_after_the_other(differences: list[int], eps: float) -> None:
    assert math.exp(log_capital(differences, eps, 0.05)) == pytest.approx(plain_capital(differences, eps, 0.05))


def test_two_bets_worked_out_by_hand() -> None:
    """Stakes are at their bound, 0.5 / 0.8 = 0.625: after a gain 1 + 0.625 * 1.2 = 1.75, after a loss half of that."""
    assert math.exp(log_capital([-1, 1], 0.2, 0.05)) == pytest.approx(1.75)
    assert math.exp(log_capital([1, -1], 0.2, 0.05)) == pytest.approx(0.875)


def test_equal_models_need_enough_images_for_the_smallest_promise() -> None:
    """Without a difference the capital grows by 1 + 0.5 / 0.995 * 0.005 an image at most: 20 is reached after 1,194."""
    assert math.ceil(math.log(20) / math.log1p(0.5 / 0.995 * 0.005)) == 1194
    certified = [bool(loses_less(np.zeros(size), 0.005, 0.05)) for size in (1193, 1200)]
    assert certified == [False, True]
    assert could_promise(np.ones(1200, bool), np.ones(1200, bool), 0.05) == pytest.approx(0.5)
    assert math.isnan(could_promise(np.ones(20, bool), np.zeros(20, bool), 0.05))
    # 1.125^20 = 10.55 is what 20 images could show of a loss of 20 points; of 19.9, the most that is promised, 10.41
    found = [could_promise(np.ones(20, bool), np.ones(20, bool), 1 / capital) for capital in (10.3, 10.5)]
    assert found == pytest.approx([19.8, math.nan], abs=0.11, nan_ok=True)
    assert could_promise(np.ones(20_000, bool), np.ones(20_000, bool), 0.05) == pytest.approx(0.1)


def test_a_walk_ends_at_the_first_failure_whatever_comes_after_it() -> None:
    deep = np.ones(2000, bool)
    bad = np.arange(2000) % 10 > 0
    assert certify(deep, [deep, deep, bad, deep], 0.01, 0.05) == 2
    assert certify(deep, [bad, deep], 0.01, 0.05) == 0
    results = iter([True, False, True])
    assert passed(results) == 1 and list(results) == [True]


def test_images_that_come_class_by_class_are_judged_as_if_shuffled() -> None:
    """All losses last, or all first, is one and the same sample."""
    deep = np.ones(5000, bool)
    shares = [could_promise(deep, np.roll(np.arange(5000) >= 100, shift), 0.05) for shift in (0, 4900)]
    assert shares == pytest.approx([2.6, 2.6], abs=0.3)


@pytest.mark.parametrize("eps", [0.005, 0.02])
def test_a_loss_on_the_boundary_is_certified_no_more_often_than_promised(eps: float) -> None:
    """2% of the images are won, 2% + eps lost: with 2,000 runs more than 5% + 4 standard errors would be 7%."""
    draws = np.random.default_rng(1).random((2000, 1000))
    differences = np.where(draws < 0.02 + eps, 1, np.where(draws > 0.98, -1, 0))
    assert loses_less(differences, eps, 0.05).mean() < 0.07


def test_a_share_is_bounded_as_the_binomial_says() -> None:
    """The bound p is where as few as that many are seen with probability delta."""
    counts = np.array([0, 3, 59, 100])
    bounds = most_share(counts, 100, 0.05)
    np.testing.assert_allclose(binom.cdf(counts[:3], 100, bounds[:3]), 0.05)
    assert bounds[3] == 1.0 and most_share(0, 0, 0.05) == 1.0


def test_the_cost_of_three_models_is_bounded_share_by_share() -> None:
    last = np.repeat([0, 1, 2], [70, 20, 10])
    second, third = most_share([30, 10], 100, 0.025)
    assert most_cost(last, [1.0, 2.0, 5.0], 0.05) == pytest.approx(1 + 2 * second + 5 * third)
    assert most_cost(np.minimum(last, 1), [1.0, 2.0], 0.05) == pytest.approx(1 + 2 * most_share(30, 100, 0.05))
    assert most_cost(np.zeros(100, int), [1.5], 0.05) == 1.5


def test_what_is_answered_errs_no_more_than_promised() -> None:
    """Of the surest 400 none is wrong, of the rest half: 0.05^(1/400) leaves a risk of 0.75%, 600 would have 20%."""
    confidence = np.arange(1000) / 1000
    right = (confidence >= 0.6) | (np.arange(1000) % 2 == 0)
    assert certify_risk(confidence, right, [0.9, 0.8, 0.6, 0.4, 0.0], 0.015, 0.05) == 0
    assert certify_risk(confidence, right, [0.8, 0.6, 0.4, 0.0], 0.015, 0.05) == 2
    assert certify_risk(np.full(400, 0.5), np.ones(400, bool), [0.5], 0.015, 0.05) == 1  # as sure as asked is enough


# ---------------------------------------------------------------- certified on images that chose nothing

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
    assert choosing_images(np.array([0, 1, 0])).tolist() == [True, False, True]
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
    too_few = (
        "60 images are too few to promise that it loses at most 0.05 points; with them 14.3 points could be promised"
    )
    assert found["reason"] == too_few
    assert Policy.load(tmp_path / "cascade.json").models[0].model == "model 2"
    assert could_promise(np.ones(600, bool), np.ones(600, bool), 0.05) == pytest.approx(1.0)


def test_of_the_cascades_that_keep_a_promise_the_cheapest_is_taken(models: list[Outputs]) -> None:
    chosen_on, held = ([out.subset(rows) for out in models] for rows in (~HELD, HELD))
    costs = np.array([[1.0, 3.0, 10.0]])
    found = find_cascades(chosen_on, folds_of_classes(chosen_on[0].targets), [Goal("match")], costs, 3)
    measured, promised = certified(found, chosen_on, held, costs, 2, Promise(most_drop=5.0), "max softmax")
    dear_first = measured.front[::-1]
    losses = [(held[2].correct.astype(np.int8) - each.cross_fitted.correct)[shuffled(3600)] for each in dear_first]
    keep = [bool(loses_less(loss, 0.05, 0.05)) for loss in losses]
    assert 3 <= keep.index(False) < len(keep) and promised.found is not None
    assert promised.found.choice == dear_first[keep.index(False) - 1].choice
    assert [each.accuracy for each in measured.raw] == pytest.approx([100 * out.correct.mean() for out in held])

    # what is promised of the answers alone any cascade can keep by answering less: the goal's is taken
    _, promised = certified(found, chosen_on, held, costs, 2, Promise(most_risk=0.3), "max softmax")
    assert promised.found is not None and promised.found.choice == found.goals[0].choice != found.front[-1].choice


def test_a_kept_promise_is_advised_from_the_least_saving_on(models: list[Outputs], tmp_path: Path) -> None:
    saving = ask(models, tmp_path, most_drop=1.0)[1]["saving"]
    for least, choice in ((100 * (saving - 1) - 0.1, "cascade"), (100 * (saving - 1) + 0.1, "model 2")):
        request = SearchRequest(Goal("match"), max_stages=2, least_saving=least, promise=Promise(most_drop=1.0))
        found = search_and_report(models, FOLDS, request, tmp_path, tmp_path / "cascade.json")["recommendation"]
        assert found["choice"] == choice and ("a cascade that keeps the promise saves less" in found["reason"]) == (
            choice == "model 2"
        )


def test_few_images_promise_no_risk(models: list[Outputs], tmp_path: Path) -> None:
    few = [out.subset(range(100)) for out in models]
    request = SearchRequest(Goal("match"), promise=Promise(most_risk=0.05))
    found = search_and_report(few, FOLDS[:100], request, tmp_path, tmp_path / "cascade.json")["recommendation"]
    assert found["certificate"] is None and "no answers can be promised" in found["reason"]


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
