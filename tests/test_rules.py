"""The rules against their definitions, fits against plain ones, and nothing from an image's own fold."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, softmax

from clcnet import confidence as confidences
from clcnet.cascade.comparison import compare, resample
from clcnet.cascade.curve import sweep
from clcnet.cascade.evaluation import at_threshold, with_rivals
from clcnet.cascade.head_start import HeadStart, fit_head_start, shifted
from clcnet.cascade.rule import CHANCE, CLCNET, TEMPERED, Judged, Surest
from clcnet.cascade.rules import Average, Last, compared, cross_fitted, rule_from_json, steps_of
from clcnet.confidence import SIMPLE_CONFIDENCES, fit_temperatures, tempered_top
from clcnet.data.outputs import Outputs

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 1.5, (3, 600, 6))
TARGETS = np.array([RANDOM.choice(6, p=row) for row in softmax(LOGITS.mean(0) * 2, axis=1)])
FOLDS = np.arange(600) % 5


def three_models():
    """Of rising quality; the first takes its logits three times too seriously."""
    sure = [3 * LOGITS[0], LOGITS[1] + np.eye(6)[TARGETS], LOGITS[2] + 2 * np.eye(6)[TARGETS]]
    return [
        Outputs.from_logits(logits, targets=TARGETS, model=name, flops=flops)
        for logits, name, flops in zip(sure, "abc", (1.0, 4.0, 20.0), strict=True)
    ]


MODELS = three_models()
NO_CLASSES = [dataclasses.replace(each, classes=None, targets=None) for each in MODELS]


def judged(outputs):
    """With made-up confidences of CLCNet that are probabilities."""
    return [with_rivals(Judged.of(each, {CLCNET: each.sorted_probs[:, 0] ** 0.5}), FOLDS) for each in outputs]


def test_tempering_the_softmax_equals_the_softmax_of_tempered_logits():
    expected = np.stack([softmax(3 * LOGITS[0] / T, axis=1).max(1) for T in (0.5, 1.0, 4.0)], axis=1)
    np.testing.assert_allclose(tempered_top(MODELS[0].sorted_probs, np.array([0.5, 1.0, 4.0])), expected, rtol=1e-5)
    one_hot = np.array([[1, 0, 0], [0.5, 0.5, 0]], dtype=np.float32)
    np.testing.assert_allclose(tempered_top(one_hot, np.array([0.3, 3.0])), [[1, 1], [0.5, 0.5]])


def test_temperature_is_the_one_that_a_plain_fit_finds():
    probs, correct = MODELS[0].sorted_probs, MODELS[0].correct

    def loss(temperature):
        top = softmax(np.log(probs) / temperature, axis=1)[:, 0]
        return -np.log(np.where(correct, top, 1 - top)).mean()

    best = minimize_scalar(loss, bounds=(0.3, 5), method="bounded").x
    assert 2 < best < 5
    assert fit_temperatures(probs, correct) == pytest.approx([best], rel=0.02)
    fitted = Surest(TEMPERED).fit(MODELS)
    expected = softmax(np.log(probs) / fitted.temperatures[0], axis=1)[:, 0]
    np.testing.assert_allclose(fitted.step(MODELS[:1]).confidence, expected, rtol=1e-5)


def test_confidences_and_fits_of_a_fold_never_depend_on_its_own_answers():
    flipped = FOLDS == 3
    turned = [dataclasses.replace(each, correct=each.correct ^ flipped) for each in NO_CLASSES]
    before, after = judged(NO_CLASSES), judged(turned)
    for rule in (Surest(TEMPERED), HeadStart("max softmax")):
        first, second = (cross_fitted(rule, outputs, FOLDS).confidence[1] for outputs in (before, after))
        np.testing.assert_array_equal(first[flipped], second[flipped])
        assert (first[~flipped] != second[~flipped]).any()


@pytest.mark.parametrize("name", SIMPLE_CONFIDENCES)
def test_the_surest_answer_stands_and_the_last_and_the_average_likewise(name):
    scores = np.stack([SIMPLE_CONFIDENCES[name](each.sorted_probs) for each in MODELS])
    labels = np.stack([each.labels for each in MODELS])
    step = Surest(name).step(MODELS)
    for image in range(100):
        best = max(range(3), key=lambda k: (scores[k, image], -k))
        assert (step.answered_by[image], step.labels[image]) == (best, labels[best, image])
        assert step.confidence[image] == scores[best, image]
    np.testing.assert_array_equal(step.correct, step.labels == TARGETS)
    last = Last(name).step(MODELS[:2])
    np.testing.assert_array_equal(last.confidence, scores[1])
    np.testing.assert_array_equal(last.labels, labels[1])
    mean = Average(name).step(MODELS)
    np.testing.assert_array_equal(mean.labels, np.mean([each.probs for each in MODELS], axis=0).argmax(1))
    np.testing.assert_array_equal(mean.correct, mean.labels == TARGETS)
    assert set(mean.answered_by) == {2}


def test_of_equally_sure_answers_the_earlier_one_stands():
    same = [MODELS[0], MODELS[0]]
    assert set(Surest(CHANCE).step(same).answered_by) == {0}


def test_clcnet_judges_where_nobody_has_judged_before():
    class Network:
        def predict(self, probs):
            return 1 - probs[:, 0]

    step = Surest(CLCNET, network=Network()).step(MODELS[:1])
    np.testing.assert_allclose(step.confidence, 1 - MODELS[0].sorted_probs[:, 0])
    for name in (CLCNET, "no such score"):
        with pytest.raises(ValueError, match=f"confidence '{name}' is not known"):
            Surest(name).step(MODELS)


def test_a_rule_read_back_from_json_says_the_same():
    for _, rule, _ in compared():
        if not rule.needs_classes:
            fitted = rule.fit(judged(NO_CLASSES))
            assert rule_from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    fitted = HeadStart("max softmax").fit(MODELS)
    again = rule_from_json(json.loads(json.dumps(fitted.to_json())))
    np.testing.assert_array_equal(again.step(MODELS).confidence, fitted.step(MODELS).confidence)
    with pytest.raises(ValueError, match="the rules are surest, last, average, head start, fused"):
        rule_from_json({"name": "unheard of"})


def test_steps_need_to_know_what_is_right_and_what_it_costs():
    blind = [dataclasses.replace(each, correct=None) for each in MODELS]
    with pytest.raises(ValueError, match="which answers of a are right"):
        steps_of(Surest("margin"), blind)
    with pytest.raises(ValueError, match="what b costs"):
        steps_of(Surest("margin"), [MODELS[0], Outputs.from_logits(LOGITS[0], targets=TARGETS, model="b")])


def test_at_one_threshold_a_later_model_is_needed_for_the_images_that_reach_it_alone():
    rule = Surest("margin")
    curve = sweep(steps_of(rule, MODELS), [0.6])
    reached = [steps_of(rule, MODELS).confidence[:k].max(axis=0, initial=-1) < 0.6 for k in range(3)]
    asked = [each.subset(mask) for each, mask in zip(MODELS, reached, strict=True)]
    assert len(asked[2]) < len(asked[1]) < 600
    found = at_threshold(rule, asked, 0.6)
    for name in ("accuracy", "calls", "flops", "num_images"):
        np.testing.assert_array_equal(getattr(found, name), getattr(curve, name))
    without = at_threshold(rule, [asked[0], asked[1].subset(range(1, len(asked[1]))), asked[2]], 0.6)
    assert without.num_images == 599  # the one that the second model could not read
    assert at_threshold(rule, MODELS[:1], -999).calls.tolist() == [[1]]


# A head start


@pytest.mark.parametrize("start, right", [(0, [1, 0, 0, 1]), (0.5, [1, 1, 1, 1]), (9, [0, 1, 1, 1])])
def test_the_deep_answer_stands_where_its_log_odds_and_the_start_exceed_those_of_the_shallow_one(start, right):
    known = [([1, 0, 0, 1], [0.9, 0.6, 0.7, 0.5]), ([0, 1, 1, 1], [0.5, 0.5, 0.6, 0.5])]
    outputs = [
        Judged(list("abcd"), np.zeros((4, 2)), correct=np.array(own, bool), scores={"s": np.array(score)})
        for own, score in known
    ]
    assert HeadStart("s", starts=(start,)).step(outputs).correct.tolist() == right


def test_a_start_moves_log_odds_and_one_of_0_changes_no_bit():
    np.testing.assert_allclose(shifted(np.array([0.5, 0.25, 0.75]), np.log(3)), [0.75, 0.5, 0.9])
    confidence = np.linspace(0, 1, 1001)
    np.testing.assert_array_equal(shifted(confidence, 0.0), confidence)
    inside = confidence[1:-1]
    np.testing.assert_allclose(logit(shifted(inside, -1.5)), logit(inside) - 1.5, atol=1e-9)
    low, high = shifted(np.array([0.0, 1.0]), 2.0)
    assert 0 < low < 1e-6 and 1 - 1e-6 < high <= 1


def biased_pair(num_images=4000, bias=1.0):
    """Confidences that would be right if the deep model's log-odds were larger by `bias`, where the models disagree."""
    random = np.random.default_rng(1)
    low, high = random.normal(0, 1, num_images), random.normal(0, 1, num_images)
    deep_is_right = random.random(num_images) < expit(high + bias - low)
    return expit(low), ~deep_is_right, expit(high), deep_is_right


def test_the_fit_finds_the_bias_that_was_put_in_and_is_nearly_as_accurate_as_the_best_of_all():
    assert fit_head_start(*biased_pair(bias=-0.5)) == pytest.approx(-0.5, abs=0.15)
    low, low_right, high, high_right = biased_pair()
    fitted = fit_head_start(low, low_right, high, high_right)
    assert fitted == pytest.approx(1.0, abs=0.15)

    def accuracy(start):
        return np.where(shifted(high, start) > low, high_right, low_right).mean()

    best = max(accuracy(start) for start in np.linspace(-3, 3, 121))
    assert accuracy(fitted) > best - 0.005 and accuracy(0.0) < best - 0.02
    agree = np.random.default_rng(2).random(500)  # images that both get right or wrong say nothing
    added = agree, agree > 0.5, agree, agree > 0.5
    more = map(np.append, (low, low_right, high, high_right), added)
    assert fit_head_start(*more) == pytest.approx(fitted)
    assert fit_head_start(1 - low, low_right, 1 - high, high_right) == 0  # confidences that point the wrong way


@pytest.mark.parametrize("deep_correct", [[True, False], [True, True]])
def test_where_the_images_cannot_tell_there_is_no_start(deep_correct):
    pair = np.array([0.2, 0.8]), np.array([True, False]), np.array([0.4, 0.9]), np.array(deep_correct)
    assert fit_head_start(*pair) == 0


def test_scores_that_are_no_probabilities_get_no_head_start():
    outputs = [Judged.of(each, {CLCNET: 3 * each.sorted_probs[:, 0]}) for each in NO_CLASSES]
    assert not HeadStart(CLCNET).applies_to(outputs) and HeadStart("max softmax").applies_to(outputs)
    with pytest.raises(ValueError, match="confidences from 0 to 1"):
        HeadStart(CLCNET, starts=(1.0, 1.0)).step(outputs)


# The comparison


@pytest.fixture(scope="module")
def contenders():
    return {one.name: one for one in compare(judged(MODELS[:2]), FOLDS)[0]}


def test_every_contender_starts_at_the_shallow_model_alone(contenders):
    for name, one in contenders.items():
        if name in ("fused", "corrected shallow", "corrected deep"):  # a model corrected is another model
            continue
        assert one.curve.accuracy[0] == pytest.approx(MODELS[0].accuracy)
        assert one.curve.flops[0] == 1.0 and one.curve.flops[-1] == 5.0


def test_ends_of_the_contenders_are_what_their_definition_says(contenders):
    shallow, deep = MODELS[:2]
    average = 100 * ((shallow.probs + deep.probs).argmax(1) == TARGETS).mean()
    figures = {name: one.figures(deep.accuracy, 4.0) for name, one in contenders.items()}
    random = figures["random deferral"]
    assert random["accuracy_at_30%"] == pytest.approx(0.7 * shallow.accuracy + 0.3 * deep.accuracy)
    assert random["area"] == pytest.approx((shallow.accuracy + deep.accuracy) / 2)
    assert random["area_50"] == pytest.approx(0.75 * shallow.accuracy + 0.25 * deep.accuracy)
    for name, end in {
        "random deferral": deep.accuracy,
        "CLCNet, deep answer always kept": deep.accuracy,
        "CLCNet, average answers": average,
        "GEM, average answers random images": average,
        "oracle": 100 * (shallow.correct | deep.correct).mean(),
    }.items():
        assert figures[name]["accuracy_at_100%"] == pytest.approx(end)
    assert all(figures["oracle"]["area"] >= one["area"] for name, one in figures.items() if "average" not in name)
    deferred = (~shallow.correct & deep.correct).mean()  # what the oracle defers, all at one threshold
    assert figures["oracle"]["saving"] == pytest.approx(4 / (1 + 4 * deferred))
    assert np.isnan(contenders["oracle"].figures(100.1, 4.0)["saving"])


def test_without_classes_rules_over_them_are_left_out_and_head_starts_come_in(contenders):
    found, left_out = compare(judged(NO_CLASSES[:2]), FOLDS)
    names = {one.name for one in found}
    with_classes = {"fused", "corrected shallow", "corrected deep"}
    assert set(left_out) == {"CLCNet, average answers", "GEM, average answers random images"} | with_classes
    assert names - set(contenders) == {"CLCNet, head start", "max softmax, head start"}
    assert set(contenders) - names == set(left_out)
    renumbered = [MODELS[0], Outputs.from_probs(MODELS[1].probs[:, ::-1], targets=5 - TARGETS, record=MODELS[1].record)]
    assert set(compare(judged(renumbered), FOLDS)[1]) == set(left_out) - {"corrected shallow", "corrected deep"}


def test_a_new_score_is_compared_by_itself(monkeypatch):
    monkeypatch.setitem(confidences.SIMPLE_CONFIDENCES, "second best", lambda probs: -probs[:, 1].astype(float))
    found = {one.name: one for one in compare(judged(MODELS), FOLDS)[0]}
    step = found["second best"].steps
    np.testing.assert_array_equal(step.confidence[0], -MODELS[0].sorted_probs[:, 1])
    assert step.own.shape == (3, 600)


def test_resampled_figures_of_all_contenders_come_from_the_same_draws(contenders):
    chosen = [contenders[name] for name in ("CLCNet", "max softmax", "random deferral")]
    samples = resample(chosen, seed=5)
    random = np.random.default_rng(5)
    for number in range(5):
        drawn = random.integers(0, 600, 600)
        for one, sample in zip(chosen, samples, strict=True):
            again = type(one)(one.name, one.steps.subset(drawn))
            figures = again.figures(100 * MODELS[1].correct[drawn].mean(), 4.0)
            for name, value in figures.items():
                assert sample[name][number] == pytest.approx(0 if np.isnan(value) else value)
