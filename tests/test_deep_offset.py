"""The deep model's head start: by hand, against the best of all offsets, and never from an image's own fold."""

import numpy as np
import pytest
from scipy.special import expit, logit

from clcnet.cascade.curve import Stage, outcome, run_cascade
from clcnet.cascade.deep_offset import (
    are_probabilities,
    cross_fitted_offsets,
    fit_deep_offset,
    shifted,
    with_deep_offset,
)


def test_an_offset_of_log_3_turns_even_odds_into_3_to_1():
    np.testing.assert_allclose(shifted(np.array([0.5, 0.25, 0.75]), np.log(3)), [0.75, 0.5, 0.9])


def test_an_offset_of_0_changes_no_bit():
    confidence = np.random.default_rng(0).random(1000)
    np.testing.assert_array_equal(shifted(confidence, 0.0), confidence)


def test_certainties_and_answers_not_asked_for_bear_an_offset():
    moved = shifted(np.array([0.0, 1.0, -np.inf]), 2.0)
    assert 0 < moved[0] < 1e-6 and 1 - 1e-6 < moved[1] <= 1 and moved[2] == -np.inf


def by_hand():
    """Four images, all deferred at a threshold of 1; the deep model is right and less sure on the middle two."""
    shallow = Stage([0.9, 0.6, 0.7, 0.5], [True, False, False, True], 1.0)
    deep = Stage([0.5, 0.5, 0.6, 0.5], [False, True, True, True], 10.0)
    return [shallow, deep]


@pytest.mark.parametrize(("offset", "answered_by"), [(0, [0, 0, 0, 0]), (0.5, [0, 1, 1, 1]), (9, [1, 1, 1, 1])])
def test_the_deep_answer_stands_where_its_log_odds_and_the_offset_exceed_those_of_the_shallow_one(offset, answered_by):
    stages = with_deep_offset(by_hand(), offset)
    assert run_cascade(stages, 1.0)[0].tolist() == answered_by


def test_an_offset_defers_no_other_images():
    shallow, deep = by_hand()
    moved, _ = with_deep_offset([shallow, deep], 3.0)
    np.testing.assert_array_equal(moved.confidence, shallow.confidence)


def biased_pair(num_images=4000, bias=1.0):
    """Confidences that would be right if the deep model's log-odds were larger by `bias`, where the models disagree."""
    random = np.random.default_rng(1)
    low, high = random.normal(0, 1, num_images), random.normal(0, 1, num_images)
    deep_is_right = random.random(num_images) < expit(high + bias - low)
    return [Stage(expit(low), ~deep_is_right, 1.0), Stage(expit(high), deep_is_right, 10.0)]


def test_the_fit_finds_the_bias_that_was_put_in():
    assert fit_deep_offset(biased_pair(bias=1.0)) == pytest.approx(1.0, abs=0.15)
    assert fit_deep_offset(biased_pair(bias=-0.5)) == pytest.approx(-0.5, abs=0.15)


def test_the_fitted_offset_is_nearly_as_accurate_as_the_best_of_all():
    stages = biased_pair()

    def accuracy(offset):
        return outcome(with_deep_offset(stages, offset), np.inf)[0].mean()

    best = max(accuracy(offset) for offset in np.linspace(-3, 3, 121))
    assert accuracy(fit_deep_offset(stages)) > best - 0.005
    assert accuracy(0.0) < best - 0.02


def test_images_that_both_models_get_right_or_wrong_say_nothing():
    shallow, deep = biased_pair()
    agree = np.random.default_rng(2).random(500)
    more = [
        Stage(np.append(stage.confidence, agree), np.append(stage.correct, agree > 0.5), stage.flops)
        for stage in (shallow, deep)
    ]
    assert fit_deep_offset(more) == pytest.approx(fit_deep_offset([shallow, deep]))


@pytest.mark.parametrize("deep_correct", [[True, False], [True, True]])
def test_where_the_images_cannot_tell_the_offset_is_0(deep_correct):
    assert fit_deep_offset([Stage([0.2, 0.8], [True, False], 1.0), Stage([0.4, 0.9], deep_correct, 2.0)]) == 0.0


def test_a_confidence_that_points_the_wrong_way_gets_no_offset():
    shallow, deep = biased_pair()
    turned = [Stage(1 - stage.confidence, stage.correct, stage.flops) for stage in (shallow, deep)]
    assert fit_deep_offset(turned) == 0.0


def test_the_offset_of_a_fold_never_depends_on_its_own_answers():
    shallow, deep = biased_pair()
    folds = np.arange(len(shallow)) % 5
    before = cross_fitted_offsets([shallow, deep], folds)
    flipped = folds == 3
    after = cross_fitted_offsets(
        [Stage(stage.confidence, stage.correct ^ flipped, stage.flops) for stage in (shallow, deep)], folds
    )
    np.testing.assert_array_equal(after[flipped], before[flipped])
    assert (after[~flipped] != before[~flipped]).all()


@pytest.mark.parametrize("confidence", [[-0.1, 0.5], [0.5, 1.2]])
def test_scores_that_are_no_probabilities_get_no_offset(confidence):
    stages = [Stage([0.1, 0.2], [True, False], 1.0), Stage(confidence, [False, True], 2.0)]
    assert [are_probabilities(stage.confidence) for stage in stages] == [True, False]
    with pytest.raises(ValueError, match="confidences from 0 to 1"):
        with_deep_offset(stages, 1.0)
    with pytest.raises(ValueError, match="confidences from 0 to 1"):
        fit_deep_offset(stages)


def test_logit_and_shift_agree_over_the_whole_range():
    confidence = np.linspace(1e-6, 1 - 1e-6, 1001)
    np.testing.assert_allclose(logit(shifted(confidence, -1.5)), logit(confidence) - 1.5, atol=1e-9)
