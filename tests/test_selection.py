"""Choosing thresholds: small cases by hand, the rule that nothing is scored on what chose it, and every verdict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clcnet.cascade.curve import Steps, resampled_sweeps, surest_steps, sweep
from clcnet.cascade.selection import (
    Goal,
    Reference,
    cheapest_at_accuracy,
    choose_or_nearest,
    cross_fit,
    dearest_within,
    most_accurate_within,
    resampled_savings,
    short_threshold,
)
from clcnet.cascade.verdict import Scored, recommend

# deferral 0, 1/4, 3/4, 1: accuracy 50, 75, 50, 50; FLOPs 1, 3.5, 8.5, 11
SMALL = surest_steps([[0.9, 0.2, 0.5, 0.5], [0.1, 0.8, 0.4, 0.6]], [[1, 0, 0, 1], [0, 1, 1, 0]], [1, 10])


def simulated_pair(num_images=4000, shallow=0.75, deep=0.82, knows=True, seed=0, flops=(1.0, 10.0)):
    """Two models that agree on easy images; `knows`: whether the shallow one's confidence says which are hard."""
    random = np.random.default_rng(seed)
    hardness = random.random(num_images)
    noise = random.normal(0, 0.08, (2, num_images))
    room = np.array([[shallow], [deep]]) - hardness - noise  # above 0 the model is right
    right, confidence = room > 0, room + random.normal(0, 0.1, room.shape)
    if not knows:
        confidence = np.stack([random.random(num_images), np.full(num_images, 2.0)])
    return surest_steps(confidence, right, flops), np.arange(num_images) % 5


def test_points_of_a_small_curve_are_those_chosen_by_hand():
    curve = sweep(SMALL)
    assert [cheapest_at_accuracy(curve, accuracy) for accuracy in (50, 60, 75, 75.1)] == [0, 1, 1, None]
    assert [most_accurate_within(curve, flops) for flops in (0.5, 1, 3.5, 100)] == [None, 0, 1, 1]
    assert [dearest_within(curve, flops) for flops in (0.5, 1, 8.49, 8.5, 100)] == [None, 0, 1, 2, 3]


def test_where_no_threshold_serves_the_nearest_one_is_taken():
    assert choose_or_nearest(SMALL, Goal("accuracy", 99)) == 0.5
    assert choose_or_nearest(SMALL, Goal("accuracy", 60)) == 0.5
    assert choose_or_nearest(SMALL, Goal("flops", 0.5)) == 0.2


def test_short_thresholds_by_hand():
    curve = sweep(SMALL)
    assert [short_threshold(curve, point) for point in range(4)] == [0.2, 0.5, 0.9, 0.91]
    close = sweep(Steps([[0.123456, 0.123467], [0, 0]], np.ones((2, 2)), [1, 1]))
    assert short_threshold(close, 1) == 0.12346


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_short_threshold_defers_the_same_images(confidence):
    steps = Steps([confidence] * 2, np.ones((2, len(confidence))), [1, 1])
    curve = sweep(steps)
    short = [short_threshold(curve, point) for point in range(len(curve))]
    np.testing.assert_array_equal(sweep(steps, short).deferral, curve.deferral)


def test_cross_fitting_equals_choosing_on_the_other_folds_one_by_one():
    steps, folds = simulated_pair(300)
    thresholds = cross_fit(steps, folds, lambda others: choose_or_nearest(others, Goal("flops", 4)))
    for fold in range(5):
        curve = sweep(steps.subset(folds != fold))
        best = max(range(len(curve)), key=lambda p: (curve.flops[p] <= 4, curve.accuracy[p], -p))
        assert set(thresholds[0, folds == fold]) == {curve.thresholds[best]}


def test_cross_fitting_within_one_fold_is_refused():
    with pytest.raises(ValueError, match="all images lie in one fold"):
        cross_fit(SMALL, np.zeros(4, dtype=np.int64), lambda others: 0.5)


def test_figures_of_the_small_cascade_by_hand():
    scored = Scored.at(SMALL, 0.5)
    assert (scored.accuracy, scored.costs) == (75, [3.5])
    saving, (low, high) = scored.saving(10)
    assert saving == pytest.approx(10 / 3.5) and low < saving < high
    assert scored.gain(Scored.alone(SMALL.own[1], [10]))[0] == 25
    assert scored.accuracy_interval == pytest.approx((19.41, 99.37), abs=0.01)


def test_resampled_sweeps_equal_sweeps_over_the_images_drawn():
    steps, _ = simulated_pair(60)
    random = np.random.default_rng(7)
    for curve, counts in resampled_sweeps(steps, 3, seed=7):
        drawn = random.integers(0, 60, 60)
        again = steps.subset(drawn)
        expected = sweep(again, curve.thresholds)
        np.testing.assert_allclose(curve.accuracy, expected.accuracy)
        np.testing.assert_allclose(curve.flops, expected.flops)
        np.testing.assert_allclose(steps.own @ counts / 0.6, again.own_accuracy)


def test_resampled_savings_choose_the_threshold_anew_each_time():
    steps, _ = simulated_pair(200)
    reference = Reference("deep", steps.own_accuracy[1], 10.0, model=1)
    savings = resampled_savings(steps, [reference], seed=1)["deep"]
    random = np.random.default_rng(1)
    for saving in savings[:20]:
        drawn = random.integers(0, 200, 200)
        again = steps.subset(drawn)
        curve = sweep(again)
        point = cheapest_at_accuracy(curve, again.own_accuracy[1])
        assert saving == pytest.approx(0 if point is None else 10 / curve.flops[point])
    assert (savings > 0).mean() > 0.5


@pytest.mark.parametrize(
    ("pair", "goal", "choice", "reached", "reason"),
    [
        ({}, Goal("match"), "cascade", True, "x less multiply-adds than deep"),
        ({"knows": False}, Goal("match"), "deep", True, "not sure that a cascade costs less"),
        ({"shallow": 0.6}, Goal("match"), "deep", False, "does not hold 81.95%"),
        ({"shallow": 0.82, "deep": 0.75}, Goal("match"), "shallow", True, "not sure that a cascade costs less"),
        ({}, Goal("accuracy", 99.9), "deep", False, "does not hold 99.90%"),
    ],
)
def test_verdicts(pair, goal, choice, reached, reason):
    steps, folds = simulated_pair(**pair)
    found = recommend(steps, folds, goal)
    assert (found.verdict.choice, found.reached) == (choice, reached) and reason in found.verdict.reason
    if not pair and reached:  # a good confidence earns the cascade
        assert found.scored.accuracy >= steps.own_accuracy[1] and abs(found.cross_fitted.accuracy - 81.95) < 1
        assert found.scored.saving(10)[0] > found.verdict.saving_interval[0] > 1
    assert (found.deferral == 0) == (choice == "shallow")


def test_accuracy_that_only_the_cascade_reaches_earns_it():
    steps, folds = simulated_pair()
    top = sweep(steps).accuracy.max()
    assert top > steps.own_accuracy[1] + 0.3
    assert recommend(steps, folds, Goal("accuracy", top - 0.2)).verdict.cascade


def test_flops_goal_stays_within_and_compares_with_what_one_could_afford():
    steps, folds = simulated_pair()
    within = recommend(steps, folds, Goal("flops", 4.0))
    assert within.scored.costs[0] <= 4 and within.verdict.cascade and within.verdict.rival.name == "shallow"


@pytest.mark.parametrize(("flops", "single"), [(4.0, "shallow"), (12.0, "deep")])
def test_flops_goal_names_the_best_affordable_model_where_a_gain_is_possible_but_not_sure(flops, single):
    doubtful = recommend(*simulated_pair(shallow=0.8, deep=0.81, knows=False), Goal("flops", flops))
    _, (low, high) = doubtful.cross_fitted.gain(doubtful.verdict.rival.scored)
    assert low < 0 < high
    assert doubtful.verdict.choice == single and f"against {single}" in doubtful.verdict.reason


def test_flops_below_the_shallow_models_give_that_model():
    found = recommend(*simulated_pair(), Goal("flops", 0.5))
    assert (found.verdict.choice, found.reached, found.deferral) == ("shallow", False, 0)
    assert "nothing costs as little as 0.5B" in found.verdict.reason


def test_of_three_models_the_cheapest_that_serves_is_the_rival():
    """The middle one is as accurate as the deep one, so the cascade must be cheaper than that."""
    random = np.random.default_rng(0)
    right = random.random(2000) < 0.8
    own = np.stack([right & (random.random(2000) < 0.9), right, right])
    steps = surest_steps([own[0] + random.normal(0, 0.6, 2000), np.full(2000, 9), np.full(2000, 8)], own, [1, 2, 50])
    names = ("small", "middle", "deep")
    found = recommend(steps, np.arange(2000) % 5, Goal("match"), names)
    assert found.verdict.choice == "middle" and "less multiply-adds than middle" in found.verdict.reason
    assert found.scored.saving(50)[0] > 10
    within = recommend(steps, np.arange(2000) % 5, Goal("flops", 3), names)
    assert within.verdict.choice == "middle" and "against middle" in within.verdict.reason


def test_goals_are_described_in_words():
    assert [Goal("match").describe(), Goal("accuracy", 80).describe(), Goal("flops", 0.7).describe()] == [
        "the deep model's accuracy",
        "80% accuracy",
        "no more than 0.7B FLOPs an image",
    ]
