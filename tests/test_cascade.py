"""The cascade against its definition followed image by image, and against cases worked out by hand."""

import csv
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clcnet.cascade.curve import (
    Stage,
    accuracy_at_deferral,
    area_under_deferral,
    distinct_thresholds,
    oracle,
    outcome,
    run_cascade,
    sweep,
)
from clcnet.confidence import SIMPLE_CONFIDENCES

SHALLOW = Stage([0.9, 0.2, 0.5, 0.5], [1, 0, 0, 1], flops=1.0)
DEEP = Stage([0.1, 0.8, 0.4, 0.6], [0, 1, 1, 0], flops=10.0)


def literal_cascade(stages, threshold, keep="surest"):
    """The definition, one image after the other: accuracy in percent, calls of each stage, average FLOPs."""
    num_images = len(stages[0].correct)
    num_right, calls, flops = 0, [0] * len(stages), 0.0
    for image in range(num_images):
        surest = None
        for k, stage in enumerate(stages):
            calls[k] += 1
            flops += stage.flops
            if surest is None or keep == "last" or stage.confidence[image] > surest[0]:
                answer = stage.correct[image]
            if surest is None or stage.confidence[image] > surest[0]:
                surest = (stage.confidence[image],)
            if not surest[0] < threshold:
                break
        num_right += answer
    return 100 * num_right / num_images, [number / num_images for number in calls], flops / num_images


def stage_lists(num_stages, max_images=12):
    score = st.sampled_from([-2.0, 0.0, 0.25, 0.5, 1.0, 3.0, np.inf])  # few values, so that many are equal

    def build(num_images):
        one = st.tuples(
            st.lists(score, min_size=num_images, max_size=num_images),
            st.lists(st.booleans(), min_size=num_images, max_size=num_images),
            st.floats(0, 100),
        )
        return st.lists(one.map(lambda parts: Stage(*parts)), min_size=num_stages, max_size=num_stages)

    return st.integers(1, max_images).flatmap(build)


@settings(max_examples=200)
@given(st.integers(2, 4).flatmap(stage_lists), st.sampled_from(["surest", "last"]))
def test_sweep_equals_the_definition_followed_image_by_image(stages, keep):
    curve = sweep(stages, keep=keep)
    for point, threshold in enumerate(curve.thresholds):
        accuracy, calls, flops = literal_cascade(stages, threshold, keep)
        assert curve.accuracy[point] == pytest.approx(accuracy)
        assert curve.calls[point] == pytest.approx(calls)
        assert curve.flops[point] == pytest.approx(flops)


@given(stage_lists(2), st.sampled_from([-999.0, 0.0, 0.25, 0.3, 1.0, 5.0, np.inf]), st.sampled_from(["surest", "last"]))
def test_deciding_each_image_gives_the_sweeps_accuracy_and_cost(stages, threshold, keep):
    correct, spent = outcome(stages, threshold, keep)
    curve = sweep(stages, [threshold], keep)
    assert 100 * correct.mean() == pytest.approx(curve.accuracy[0])
    assert spent.mean() == pytest.approx(curve.flops[0])


@given(stage_lists(3))
def test_cost_never_falls_as_the_threshold_rises(stages):
    curve = sweep(stages)
    assert (np.diff(curve.calls, axis=0) >= 0).all()
    assert (np.diff(curve.thresholds) > 0).all()


@given(stage_lists(2))
def test_lowest_threshold_is_the_shallow_model_alone(stages):
    curve = sweep(stages)
    assert curve.deferral[0] == 0
    assert curve.accuracy[0] == pytest.approx(stages[0].accuracy)
    assert curve.flops[0] == pytest.approx(stages[0].flops)


@given(stage_lists(2))
def test_thresholds_may_be_given_in_any_order(stages):
    np.testing.assert_array_equal(sweep(stages, distinct_thresholds(stages)[::-1]).accuracy, sweep(stages).accuracy)


def test_small_cascade_gives_the_numbers_worked_out_by_hand():
    curve = sweep([SHALLOW, DEEP])
    assert curve.thresholds.tolist() == [0.2, 0.5, 0.9, np.inf]
    assert curve.deferral.tolist() == [0, 0.25, 0.75, 1]
    # image 1 gains by its deep answer; of images 2 and 3 only 3 takes it (0.6 > 0.5, 0.4 is not) and is wrong then
    assert curve.accuracy.tolist() == [50, 75, 50, 50]
    assert curve.flops.tolist() == [1, 3.5, 8.5, 11]
    assert curve.cost([2, 4]).tolist() == [2, 3, 5, 6]


def test_without_keeping_the_surer_answer_the_deep_one_stands():
    assert sweep([SHALLOW, DEEP], keep="last").accuracy.tolist() == [50, 75, 75, 50]


def test_confidence_equal_to_the_threshold_is_not_deferred():
    assert sweep([SHALLOW, DEEP], [0.5]).deferral.tolist() == [0.25]
    answered_by, last_seen = run_cascade([SHALLOW, DEEP], 0.5)
    assert answered_by.tolist() == [0, 1, 0, 0] and last_seen.tolist() == [0, 1, 0, 0]


def test_deep_answer_that_is_only_as_sure_does_not_replace_the_shallow_one():
    assert run_cascade([Stage([0.3], [1], 1), Stage([0.3], [0], 1)], 0.5)[0].tolist() == [0]


@pytest.mark.parametrize("threshold", [-999, -np.inf, 0.2])
def test_threshold_below_all_confidences_never_calls_the_deep_model(threshold):
    curve = sweep([SHALLOW, DEEP], [threshold])
    assert curve.accuracy.tolist() == [SHALLOW.accuracy] and curve.flops.tolist() == [1.0]


def test_each_image_may_have_a_threshold_of_its_own():
    _, last_seen = run_cascade([SHALLOW, DEEP], np.array([1.0, 0.1, 0.5, 0.6]))
    assert last_seen.tolist() == [1, 0, 0, 1]


@given(stage_lists(2))
def test_no_two_stage_cascade_beats_the_oracle(stages):
    best = sweep(oracle(stages))
    ceiling = 100 * (stages[0].correct | stages[1].correct).mean()
    assert best.accuracy.max() == pytest.approx(ceiling)
    for share, accuracy in zip(sweep(stages).deferral, sweep(stages).accuracy, strict=True):
        assert accuracy_at_deferral(best, share) >= accuracy - 1e-9


def test_oracle_of_three_models_is_right_wherever_one_of_them_is():
    stages = [Stage([0] * 4, right, 1) for right in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0])]
    curve = sweep(oracle(stages), [0.1])
    assert curve.accuracy.tolist() == [75]
    assert curve.calls.tolist() == [[1, 0.5, 0.25]]  # image 3, which nobody gets right, stays where it is


def test_random_deferral_is_the_straight_line_between_the_models():
    shallow = Stage(np.zeros(4), SHALLOW.correct, 1)
    curve = sweep([shallow, Stage(np.zeros(4), [1, 1, 1, 0], 10)], keep="last")
    assert accuracy_at_deferral(curve, 0.2) == pytest.approx(50 + 0.2 * 25)
    assert area_under_deferral(curve) == pytest.approx(62.5)
    assert area_under_deferral(curve, 0.5) == pytest.approx(50 + 0.25 * 25)


def test_area_of_the_small_cascade_by_hand():
    # trapezoids over deferral 0, 0.25, 0.75, 1 of accuracy 50, 75, 50, 50
    assert area_under_deferral(sweep([SHALLOW, DEEP])) == pytest.approx(0.25 * 62.5 + 0.5 * 62.5 + 0.25 * 50)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([SHALLOW], "two stages or more"),
        ([Stage([], [], 1), Stage([], [], 1)], "one image or more"),
        ([SHALLOW, Stage([0.1], [1], 1)], r"differ in their number of images: \[4, 1\]"),
    ],
)
def test_stages_that_are_no_cascade_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        sweep(stages)


def test_bad_numbers_are_refused_with_the_place():
    with pytest.raises(ValueError, match="image 1 is NaN"):
        Stage([0.1, np.nan], [1, 0], 1)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        Stage([0.1], [1], -1)
    with pytest.raises(ValueError, match="lists of one length"):
        Stage([0.1], [1, 0], 1)
    with pytest.raises(ValueError, match="threshold is NaN"):
        sweep([SHALLOW, DEEP], [0.5, np.nan])


def test_50000_images_are_swept_at_every_threshold_in_well_under_a_second():
    """`benchmarks/bench_cascade.py` measures the 50 ms; here only that nobody made it quadratic."""
    random = np.random.default_rng(0)
    stages = [Stage(random.random(50_000), random.random(50_000) < 0.8, flops) for flops in (1, 10)]
    start = time.perf_counter()
    curve = sweep(stages)
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
        stages = [Stage(SIMPLE_CONFIDENCES[name](probs), correct, 1) for probs, correct in outputs]
        curve = sweep(stages)
        areas[name] = area_under_deferral(curve, 0.5)
        if name == "max softmax":
            at = [round(accuracy_at_deferral(curve, share), 2) for share in (0.1, 0.2, 0.3, 0.5)]
            assert at == [82.97, 83.85, 84.44, 84.69]
    assert areas == pytest.approx({"max softmax": 83.80, "margin": 83.85, "entropy": 83.70}, abs=5e-3)
