"""The cascade against its definition followed image by image, and against cases worked out by hand."""

import csv
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clcnet.cascade.curve import (
    Steps,
    accuracy_at_deferral,
    area_under_deferral,
    decide,
    oracle,
    surest_steps,
    sweep,
)
from clcnet.cascade.verdict import Scored
from clcnet.confidence import SIMPLE_CONFIDENCES

CONFIDENCE = [[0.9, 0.2, 0.5, 0.5], [0.1, 0.8, 0.4, 0.6]]
OWN = [[1, 0, 0, 1], [0, 1, 1, 0]]
SMALL = surest_steps(CONFIDENCE, OWN, [1, 10])
LAST = Steps(CONFIDENCE, OWN, [1, 10])


def literal_cascade(confidence, own, flops, threshold, keep):
    """The definition, one image after the other: accuracy in percent, calls of each model, average FLOPs."""
    num_models, num_images = own.shape
    num_right, calls, spent = 0, [0] * num_models, 0.0
    for image in range(num_images):
        surest = None
        for k in range(num_models):
            calls[k] += 1
            spent += flops[k]
            if surest is None or keep == "last" or confidence[k, image] > surest:
                answer = own[k, image]
            surest = confidence[k, image] if surest is None else max(surest, confidence[k, image])
            if not surest < threshold:
                break
        num_right += answer
    return 100 * num_right / num_images, [number / num_images for number in calls], spent / num_images


@st.composite
def models(draw, least=2, most=4):
    """Confidences, of few values so that many are equal, right and wrong answers, and FLOPs of some models."""
    shape = draw(st.integers(least, most)), draw(st.integers(1, 12))
    score = st.sampled_from([-2.0, 0.0, 0.25, 0.5, 1.0, 3.0, np.inf])
    flops = draw(st.lists(st.floats(0, 100), min_size=shape[0], max_size=shape[0]))
    return draw(arrays(float, shape, elements=score)), draw(arrays(bool, shape)), flops


KEPT = {"surest": surest_steps, "last": Steps}


@settings(max_examples=200)
@given(models(least=1), st.sampled_from(list(KEPT)))
def test_sweep_equals_the_definition_followed_image_by_image(parts, keep):
    curve = sweep(KEPT[keep](*parts))
    for point, threshold in enumerate(curve.thresholds):
        accuracy, calls, flops = literal_cascade(*parts, threshold, keep)
        assert curve.accuracy[point] == pytest.approx(accuracy)
        assert curve.calls[point] == pytest.approx(calls)
        assert curve.flops[point] == pytest.approx(flops)


@given(models(), st.sampled_from([-999.0, 0.0, 0.25, 0.3, 1.0, 5.0, np.inf]), st.sampled_from(list(KEPT)))
def test_deciding_each_image_gives_the_sweeps_accuracy_and_cost(parts, threshold, keep):
    steps = KEPT[keep](*parts)
    scored = Scored.at(steps, threshold)
    correct, spent = scored.correct, scored.spent[0]
    curve = sweep(steps, [threshold])
    assert 100 * correct.mean() == pytest.approx(curve.accuracy[0])
    assert spent.mean() == pytest.approx(curve.flops[0])


@given(models())
def test_thresholds_may_be_given_in_any_order(parts):
    steps = surest_steps(*parts)
    curve = sweep(steps)
    np.testing.assert_array_equal(sweep(steps, curve.thresholds[::-1]).accuracy, curve.accuracy)


def test_small_cascade_gives_the_numbers_worked_out_by_hand():
    curve = sweep(SMALL)
    assert curve.thresholds.tolist() == [0.2, 0.5, 0.9, np.inf]
    assert curve.deferral.tolist() == [0, 0.25, 0.75, 1]
    # image 1 gains by its deep answer; of images 2 and 3 only 3 takes it (0.6 > 0.5, 0.4 is not) and is wrong then
    assert curve.accuracy.tolist() == [50, 75, 50, 50]
    assert curve.flops.tolist() == [1, 3.5, 8.5, 11]
    assert curve.cost([2, 4]).tolist() == [2, 3, 5, 6]


def test_where_the_last_answer_stands_the_deep_one_does():
    assert sweep(LAST).accuracy.tolist() == [50, 75, 75, 50]


def test_confidence_equal_to_the_threshold_is_not_deferred():
    assert sweep(SMALL, [0.5]).deferral.tolist() == [0.25]
    assert decide(SMALL.confidence, 0.5).tolist() == [0, 1, 0, 0]


def test_deep_answer_that_is_only_as_sure_does_not_replace_the_shallow_one():
    assert Scored.at(surest_steps([[0.3], [0.3]], [[1], [0]], [1, 1]), 0.5).correct.tolist() == [True]


def test_every_step_and_every_image_may_have_a_threshold_of_its_own():
    three = np.array([[0.1, 0.6, 0.6], [0.5, 0.9, 0.1], [0, 0, 0]])
    assert decide(three, [0.7, 0.6]).tolist() == [2, 1, 2]
    assert decide(three, [0.5, 0.6]).tolist() == [2, 0, 0]  # an image that stays with the first is not asked again
    assert decide(SMALL.confidence, [[1.0, 0.1, 0.5, 0.6]]).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("threshold", [-999, -np.inf, 0.2])
def test_threshold_below_all_confidences_never_calls_the_deep_model(threshold):
    curve = sweep(SMALL, [threshold])
    assert curve.accuracy.tolist() == [50] and curve.flops.tolist() == [1.0]


@given(models(most=2))
def test_no_cascade_of_two_beats_the_oracle(parts):
    confidence, own, flops = parts
    best, curve = sweep(oracle(own, flops)), sweep(surest_steps(*parts))
    assert best.accuracy.max() == pytest.approx(100 * own.any(0).mean())
    for share, accuracy in zip(curve.deferral, curve.accuracy, strict=True):
        assert accuracy_at_deferral(best, share) >= accuracy - 1e-9


def test_oracle_of_three_models_is_right_wherever_one_of_them_is():
    curve = sweep(oracle([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], [1, 1, 1]), [0.1])
    assert curve.accuracy.tolist() == [75]
    assert curve.calls.tolist() == [[1, 0.5, 0.25]]  # image 3, which nobody gets right, stays where it is


def test_random_deferral_is_the_straight_line_between_the_models():
    curve = sweep(Steps(np.zeros((2, 4)), [OWN[0], [1, 1, 1, 0]], [1, 10]))
    assert accuracy_at_deferral(curve, 0.2) == pytest.approx(50 + 0.2 * 25)
    assert area_under_deferral(curve) == pytest.approx(62.5)
    assert area_under_deferral(curve, 0.5) == pytest.approx(50 + 0.25 * 25)


def test_a_single_model_is_a_curve_of_one_point():
    curve = sweep(Steps([[0.2, 0.7]], [[1, 0]], [3]))
    assert (curve.accuracy.tolist(), curve.flops.tolist(), curve.deferral.tolist()) == ([50], [3], [0])
    assert area_under_deferral(curve) == accuracy_at_deferral(curve, 0.3) == 50


def test_area_of_the_small_cascade_by_hand():
    # trapezoids over deferral 0, 0.25, 0.75, 1 of accuracy 50, 75, 50, 50
    assert area_under_deferral(sweep(SMALL)) == pytest.approx(0.25 * 62.5 + 0.5 * 62.5 + 0.25 * 50)


@pytest.mark.parametrize(
    "parts, message",
    [
        (([[]], [[]], [1]), "one image or more"),
        (([], [], []), "expected"),
        (([[0.1, 0.2], [0.1, 0.2]], [[1, 0]], [1, 1]), "expected"),
        (([[0.1]], [[1]], [1, 2]), "expected"),
        (([[0.1, np.nan]], [[1, 0]], [1]), "image 1 is NaN"),
        (([[0.1]], [[1]], [-1]), "0 or more, got -1"),
    ],
)
def test_steps_that_are_none_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Steps(*parts)
    with pytest.raises(ValueError, match="threshold is NaN"):
        sweep(SMALL, [0.5, np.nan])


def test_50000_images_are_swept_at_every_threshold_in_well_under_a_second():
    """`benchmarks/bench_cascade.py` measures the 50 ms; here only that nobody made it quadratic."""
    random = np.random.default_rng(0)
    steps = Steps(random.random((2, 50_000)), random.random((2, 50_000)) < 0.8, [1, 10])
    start = time.perf_counter()
    curve = sweep(steps)
    assert len(curve) == 50_001 and time.perf_counter() - start < 1


def test_real_networks_give_the_known_figures(shared):
    """resnet20 -> resnet56 on CIFAR-10 with max softmax: 82.97, 83.85, 84.44, 84.69% at 10, 20, 30, 50% deferred."""
    outputs = []
    for name in ("resnet20.csv", "resnet56.csv"):
        with open(shared / "cifar10" / name, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
        outputs.append((np.array([row[1:-1] for row in rows], np.float32), np.array([row[-1] == "1" for row in rows])))
    areas = {}
    for name in ("max softmax", "margin", "entropy"):
        scores = [SIMPLE_CONFIDENCES[name](probs) for probs, _ in outputs]
        curve = sweep(surest_steps(scores, [correct for _, correct in outputs], [1, 1]))
        areas[name] = area_under_deferral(curve, 0.5)
        if name == "max softmax":
            at = [round(accuracy_at_deferral(curve, share), 2) for share in (0.1, 0.2, 0.3, 0.5)]
            assert at == [82.97, 83.85, 84.44, 84.69]
    assert areas == pytest.approx({"max softmax": 83.80, "margin": 83.85, "entropy": 83.70}, abs=5e-3)
