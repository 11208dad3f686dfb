"""Choosing thresholds: small cases by hand, the rule that nothing is scored on what chose it, and every verdict."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clcnet.cascade.curve import Stage, resampled_sweeps, sweep
from clcnet.cascade.selection import (
    Goal,
    Reference,
    cheapest_at_accuracy,
    choose_or_nearest,
    cross_fit,
    dearest_within,
    most_accurate_within,
    recommend,
    resampled_savings,
    score,
    short_threshold,
)

# deferral 0, 1/4, 3/4, 1: accuracy 50, 75, 50, 50; FLOPs 1, 3.5, 8.5, 11
SMALL = [Stage([0.9, 0.2, 0.5, 0.5], [1, 0, 0, 1], 1.0), Stage([0.1, 0.8, 0.4, 0.6], [0, 1, 1, 0], 10.0)]


def simulated_pair(num_images=4000, shallow=0.75, deep=0.82, knows=True, seed=0, flops=(1.0, 10.0)):
    """Two models that agree on easy images; `knows`: whether the shallow one's confidence says which are hard."""
    random = np.random.default_rng(seed)
    hardness = random.random(num_images)
    noise = random.normal(0, 0.08, (2, num_images))
    room = np.array([[shallow], [deep]]) - hardness - noise  # above 0 the model is right
    right, confidence = room > 0, room + random.normal(0, 0.1, room.shape)
    if not knows:
        confidence = np.stack([random.random(num_images), np.full(num_images, 2.0)])
    stages = [Stage(confidence[k], right[k], flops[k]) for k in (0, 1)]
    return stages, np.arange(num_images) % 5


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
    close = sweep([Stage([0.123456, 0.123467], [1, 1], 1), Stage([0, 0], [1, 1], 1)])
    assert short_threshold(close, 1) == 0.12346


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_short_threshold_defers_the_same_images(confidence):
    stages = [Stage(confidence, np.ones(len(confidence)), 1), Stage(confidence, np.ones(len(confidence)), 1)]
    curve = sweep(stages)
    short = [short_threshold(curve, point) for point in range(len(curve))]
    np.testing.assert_array_equal(sweep(stages, short).deferral, curve.deferral)


def test_cross_fitted_threshold_never_depends_on_the_images_it_is_used_on():
    stages, folds = simulated_pair(500)
    goal = Goal("match")
    before = cross_fit(stages, folds, lambda others: choose_or_nearest(others, goal))
    for fold in range(5):
        inside = folds == fold
        changed = [
            Stage(np.where(inside, 0.5, stage.confidence), stage.correct ^ inside, stage.flops) for stage in stages
        ]
        after = cross_fit(changed, folds, lambda others: choose_or_nearest(others, goal))
        np.testing.assert_array_equal(after[inside], before[inside])
        assert (after[~inside] != before[~inside]).any()


def test_cross_fitting_equals_choosing_on_the_other_folds_one_by_one():
    stages, folds = simulated_pair(300)
    thresholds = cross_fit(stages, folds, lambda others: choose_or_nearest(others, Goal("flops", 4)))
    for fold in range(5):
        curve = sweep([stage.subset(folds != fold) for stage in stages])
        best = max(range(len(curve)), key=lambda p: (curve.flops[p] <= 4, curve.accuracy[p], -p))
        assert set(thresholds[folds == fold]) == {curve.thresholds[best]}


def test_cross_fitting_within_one_fold_is_refused():
    with pytest.raises(ValueError, match="all images lie in one fold"):
        cross_fit(SMALL, np.zeros(4, dtype=np.int64), lambda others: 0.5)


def test_score_of_the_small_cascade_by_hand():
    scored = score(SMALL, 0.5)
    assert (scored.accuracy, scored.flops) == (75, 3.5)
    assert scored.saving == pytest.approx(10 / 3.5)
    assert scored.difference == 25
    assert scored.saving_interval[0] < scored.saving < scored.saving_interval[1]
    assert scored.accuracy_interval == pytest.approx((19.41, 99.37), abs=0.01)


def test_resampled_sweeps_equal_sweeps_over_the_images_drawn():
    stages, _ = simulated_pair(60)
    random = np.random.default_rng(7)
    thresholds = [-1, -0.1, 0.1, 2]
    for curve, single in resampled_sweeps(stages, 3, seed=7, thresholds=thresholds):
        drawn = random.integers(0, 60, 60)
        again = [stage.subset(drawn) for stage in stages]
        expected = sweep(again, thresholds)
        np.testing.assert_allclose(curve.accuracy, expected.accuracy)
        np.testing.assert_allclose(curve.flops, expected.flops)
        np.testing.assert_allclose(single, [stage.accuracy for stage in again])


def test_resampled_savings_choose_the_threshold_anew_each_time():
    stages, _ = simulated_pair(200)
    reference = Reference("deep", stages[1].accuracy, 10.0, stage=1)
    savings = resampled_savings(stages, [reference], seed=1)["deep"]
    random = np.random.default_rng(1)
    for saving in savings[:20]:
        drawn = random.integers(0, 200, 200)
        again = [stage.subset(drawn) for stage in stages]
        curve = sweep(again)
        point = cheapest_at_accuracy(curve, again[1].accuracy)
        assert saving == pytest.approx(0 if point is None else 10 / curve.flops[point])
    assert (savings > 0).mean() > 0.5


def test_good_confidence_earns_the_cascade():
    recommendation = recommend(*simulated_pair(), Goal("match"))
    assert recommendation.choice == "cascade" and recommendation.reached
    assert recommendation.scored.accuracy >= simulated_pair()[0][1].accuracy
    assert recommendation.scored.saving > recommendation.cross_fitted.saving_interval[0] > 1
    assert abs(recommendation.cross_fitted.difference) < 1


def test_confidence_that_knows_nothing_does_not():
    recommendation = recommend(*simulated_pair(knows=False), Goal("match"))
    assert recommendation.choice == "deep"
    assert "not sure that the cascade costs less" in recommendation.reason
    assert recommendation.scored.saving_interval[0] < 1


def test_cascade_that_never_gets_there_does_not_either():
    recommendation = recommend(*simulated_pair(shallow=0.6), Goal("match"))
    assert not recommendation.reached and recommendation.choice == "deep"
    assert "does not hold 81.95%" in recommendation.reason


def test_shallow_model_that_is_as_good_is_used_alone():
    recommendation = recommend(*simulated_pair(shallow=0.82, deep=0.75), Goal("match"))
    assert recommendation.choice == "shallow" and "alone" in recommendation.reason
    assert recommendation.deferral == 0


def test_accuracy_out_of_reach_is_said_to_be():
    recommendation = recommend(*simulated_pair(), Goal("accuracy", 99.9))
    assert not recommendation.reached
    assert "nothing reaches 99.90%" in recommendation.reason


def test_accuracy_that_only_the_cascade_reaches_earns_it():
    stages, folds = simulated_pair()
    top = sweep(stages).accuracy.max()
    assert top > stages[1].accuracy + 0.3
    assert recommend(stages, folds, Goal("accuracy", top - 0.2)).choice == "cascade"


def test_flops_goal_stays_within_and_compares_with_what_one_could_afford():
    stages, folds = simulated_pair()
    within = recommend(stages, folds, Goal("flops", 4.0))
    assert within.scored.flops <= 4 and within.choice == "cascade"
    assert within.scored.difference == pytest.approx(within.scored.accuracy - stages[0].accuracy)


@pytest.mark.parametrize(("flops", "single"), [(4.0, "shallow"), (12.0, "deep")])
def test_flops_goal_names_the_best_affordable_model_where_a_gain_is_possible_but_not_sure(flops, single):
    doubtful = recommend(*simulated_pair(shallow=0.8, deep=0.81, knows=False), Goal("flops", flops))
    low, high = doubtful.cross_fitted.difference_interval
    assert low < 0 < high
    assert doubtful.choice == single and f"against the {single} model alone" in doubtful.reason


def test_flops_below_the_shallow_models_are_refused():
    with pytest.raises(ValueError, match=r"0\.5B FLOPs is below the shallow model's 1B"):
        recommend(*simulated_pair(), Goal("flops", 0.5))


def test_a_recommendation_is_better_by_its_verdict_then_by_what_it_saves_on_images_it_was_not_chosen_on():
    stages, folds = simulated_pair()
    cascade = recommend(stages, folds, Goal("match"))
    single = replace(cascade, choice="deep")
    assert cascade.is_better_than(single) and not single.is_better_than(cascade)
    assert not single.is_better_than(single) and not cascade.is_better_than(cascade)
    cheaper = replace(cascade, cross_fitted=replace(cascade.cross_fitted, saving=cascade.cross_fitted.saving * 1.02))
    assert cheaper.is_better_than(cascade) and not cascade.is_better_than(cheaper)
    dearly = replace(cheaper, cross_fitted=replace(cheaper.cross_fitted, accuracy=cascade.cross_fitted.accuracy - 0.02))
    assert not dearly.is_better_than(cascade)
    within = replace(cascade, goal=Goal("flops", 3.0))
    righter = replace(within, cross_fitted=replace(within.cross_fitted, accuracy=within.cross_fitted.accuracy + 0.02))
    assert righter.is_better_than(within) and not within.is_better_than(righter)


def test_goals_are_described_in_words():
    assert [Goal("match").describe(), Goal("accuracy", 80).describe(), Goal("flops", 0.7).describe()] == [
        "the deep model's accuracy",
        "80% accuracy",
        "no more than 0.7B FLOPs an image",
    ]
