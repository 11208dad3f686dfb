"""The rival rules: temperature scaling against a plain fit, and each rule's curve against its definition."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logit, softmax

from clcnet.cascade.baselines import (
    Rule,
    average_is_correct,
    compare,
    confidences,
    resample,
    temperature_scaled,
    tempered_top,
)
from clcnet.cascade.curve import Stage, sweep
from clcnet.cascade.deep_offset import fit_deep_offset

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 1.5, (600, 6)).astype(np.float32)
TARGETS = np.array([RANDOM.choice(6, p=row) for row in softmax(LOGITS.astype(float), axis=1)])
OVERSURE = softmax(3 * LOGITS, axis=1)  # a model that takes its logits three times too seriously
SORTED = -np.sort(-OVERSURE, axis=1)
CORRECT = OVERSURE.argmax(1) == TARGETS
FOLDS = np.arange(600) % 5


def test_tempering_the_softmax_equals_the_softmax_of_tempered_logits():
    expected = np.stack([softmax(3 * LOGITS / T, axis=1).max(1) for T in (0.5, 1.0, 4.0)], axis=1)
    np.testing.assert_allclose(tempered_top(SORTED, np.array([0.5, 1.0, 4.0])), expected, rtol=1e-5)


def test_tempering_bears_one_hot_rows():
    rows = np.array([[1, 0, 0], [0.5, 0.5, 0]], dtype=np.float32)
    np.testing.assert_allclose(tempered_top(rows, np.array([0.3, 3.0])), [[1, 1], [0.5, 0.5]])


def test_temperature_is_the_one_that_a_plain_fit_on_the_other_folds_finds():
    scaled = temperature_scaled(SORTED, CORRECT, FOLDS)
    others = FOLDS != 2

    def loss(temperature):
        top = softmax(np.log(SORTED[others]) / temperature, axis=1)[:, 0]
        return -np.log(np.where(CORRECT[others], top, 1 - top)).mean()

    best = minimize_scalar(loss, bounds=(0.3, 5), method="bounded").x
    assert 2 < best < 5
    expected = softmax(np.log(SORTED[~others]) / best, axis=1)[:, 0]
    np.testing.assert_allclose(scaled[~others], expected, atol=0.01)


def test_temperature_of_a_fold_never_depends_on_its_own_answers():
    before = temperature_scaled(SORTED, CORRECT, FOLDS)
    after = temperature_scaled(SORTED, CORRECT ^ (FOLDS == 3), FOLDS)
    np.testing.assert_array_equal(after[FOLDS == 3], before[FOLDS == 3])
    assert (after[FOLDS != 3] != before[FOLDS != 3]).any()


def test_average_of_both_models_by_hand():
    shallow = np.array([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], dtype=np.float32)
    deep = np.array([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6]], dtype=np.float32)
    assert average_is_correct(shallow, deep, np.array([1, 1, 1])).tolist() == [True, False, True]


@pytest.fixture
def rules():
    shallow = Stage(RANDOM.random(600), CORRECT, 1.0)
    deep = Stage(RANDOM.random(600), RANDOM.random(600) < 0.9, 4.0)
    average = RANDOM.random(600) < 0.95
    found = compare([shallow, deep], [SORTED, SORTED], FOLDS, average)
    return shallow, deep, average, {rule.name: rule for rule in found}


def test_every_rule_starts_at_the_shallow_model_alone(rules):
    shallow, _, _, by_name = rules
    assert len(by_name) == 14
    for rule in by_name.values():
        assert rule.at(0) == pytest.approx(shallow.accuracy)
        assert rule.curve.flops[0] == 1.0 and rule.curve.flops[-1] == 5.0


def test_a_deep_offset_is_fitted_on_the_other_folds_and_moves_the_deep_confidence_alone(rules):
    shallow, deep, _, by_name = rules
    moved_shallow, moved_deep = by_name["CLCNet, deep offset"].stages
    np.testing.assert_array_equal(moved_shallow.confidence, shallow.confidence)
    inside = FOLDS == 1
    offset = fit_deep_offset([shallow.subset(~inside), deep.subset(~inside)])
    moved = logit(moved_deep.confidence[inside]) - logit(deep.confidence[inside])
    np.testing.assert_allclose(moved, offset, atol=1e-6)
    assert {"max softmax, deep offset", "temperature-scaled softmax, deep offset"} < by_name.keys()


def test_scores_that_are_no_probabilities_are_compared_without_an_offset():
    scores = RANDOM.normal(0, 3, 600)  # as those of the released weights
    names = [rule.name for rule in compare([Stage(scores, CORRECT, 1.0)] * 2, [SORTED, SORTED], FOLDS)]
    assert "CLCNet, deep offset" not in names and "max softmax, deep offset" in names


def test_ends_of_the_rules_are_what_their_definition_says(rules):
    shallow, deep, average, by_name = rules
    assert by_name["random deferral"].at(1) == pytest.approx(deep.accuracy)
    assert by_name["random deferral"].at(0.3) == pytest.approx(0.7 * shallow.accuracy + 0.3 * deep.accuracy)
    assert by_name["random deferral"].area == pytest.approx((shallow.accuracy + deep.accuracy) / 2)
    assert by_name["CLCNet, deep answer always kept"].at(1) == pytest.approx(deep.accuracy)
    assert by_name["CLCNet, average answers"].at(1) == pytest.approx(100 * average.mean())
    assert by_name["GEM, average answers random images"].at(1) == pytest.approx(100 * average.mean())
    assert by_name["oracle"].at(1) == pytest.approx(100 * (shallow.correct | deep.correct).mean())
    assert all(by_name["oracle"].area >= rule.area for name, rule in by_name.items() if "average" not in name)


def test_without_the_models_outputs_the_average_is_left_out():
    stage = Stage(SORTED[:, 0], CORRECT, 1.0)
    names = [rule.name for rule in compare([stage, stage], [SORTED, SORTED], FOLDS)]
    assert not any("average" in name for name in names) and len(names) == 12


def test_confidences_are_swept_on_both_models():
    scores = confidences([SORTED, SORTED[::-1]], [CORRECT, CORRECT[::-1]], FOLDS)
    shallow, deep = scores["max softmax"]
    np.testing.assert_array_equal(shallow, deep[::-1])
    stages = [Stage(SORTED[:, 0], CORRECT, 1.0), Stage(SORTED[::-1, 0], CORRECT[::-1], 1.0)]
    rule = next(r for r in compare(stages, [SORTED, SORTED[::-1]], FOLDS) if r.name == "max softmax")
    np.testing.assert_array_equal(rule.curve.accuracy, sweep(stages).accuracy)


def test_saving_is_by_the_cheapest_point_that_is_accurate_enough(rules):
    shallow, deep, _, by_name = rules
    oracle = by_name["oracle"]
    share = (deep.accuracy - shallow.accuracy) / 100
    assert oracle.saving_at(deep.accuracy, 4.0) >= 4 / 5
    assert np.isnan(oracle.saving_at(100.1, 4.0))
    assert share > 0


def test_resampled_figures_of_all_rules_come_from_the_same_draws(rules):
    _, deep, _, by_name = rules
    chosen = [by_name["CLCNet"], by_name["max softmax"], by_name["random deferral"]]
    samples = resample(chosen, deep, seed=5)
    random = np.random.default_rng(5)
    for number in range(5):
        drawn = random.integers(0, 600, 600)
        for rule, sample in zip(chosen, samples, strict=True):
            again = Rule(rule.name, [stage.subset(drawn) for stage in rule.stages], rule.keep)
            assert sample.at[0.3][number] == pytest.approx(again.at(0.3))
            assert sample.area[number] == pytest.approx(again.area)
            saving = again.saving_at(deep.subset(drawn).accuracy, 4.0)
            assert sample.saving[number] == pytest.approx(0 if np.isnan(saving) else saving)
