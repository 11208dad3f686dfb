"""The rules against their definitions, fits against plain ones, and nothing from an image's own fold."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from clcnet.cascade.comparison import compare, figures, resample
from clcnet.cascade.curve import sweep
from clcnet.cascade.evaluation import at_threshold, with_rivals
from clcnet.cascade.rules import (
    CHANCE,
    CLCNET,
    TEMPERED,
    Average,
    Last,
    Surest,
    compared,
    cross_fitted,
    rule_from_json,
    steps_of,
)
from clcnet.confidence import SIMPLE_CONFIDENCES, fit_temperatures, tempered_top
from clcnet.data.outputs import Outputs
from clcnet.report.tables import comparison_frame, comparison_markdown

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
    return [
        with_rivals(dataclasses.replace(each, scores={CLCNET: each.sorted_probs[:, 0] ** 0.5}), FOLDS)
        for each in outputs
    ]


@pytest.mark.parametrize("at_once", [1 << 20, 100])
def test_tempering_the_softmax_equals_the_softmax_of_tempered_logits(at_once, monkeypatch):
    monkeypatch.setattr("clcnet.confidence._CHUNK_NUMBERS", at_once)
    expected = np.stack([softmax(3 * LOGITS[0] / T, axis=1).max(1) for T in (0.5, 1.0, 4.0)], axis=1)
    np.testing.assert_allclose(tempered_top(MODELS[0].sorted_probs, np.array([0.5, 1.0, 4.0])), expected, rtol=1e-5)
    one_hot = np.array([[1, 0, 0], [0.5, 0.5, 0]], dtype=np.float32)
    np.testing.assert_allclose(tempered_top(one_hot, np.array([0.3, 3.0])), [[1, 1], [0.5, 0.5]])


def test_temperature_is_the_one_that_a_plain_fit_finds():
    few = MODELS[2].subset(range(40))
    probs, correct = few.sorted_probs, few.correct

    def loss(temperature):
        top = softmax(np.log(probs) / temperature, axis=1)[:, 0]
        return -np.log(np.where(correct, top, 1 - top)).mean()

    best = minimize_scalar(loss, bounds=(0.3, 5), method="bounded").x
    assert 0.7 < best < 0.9
    assert fit_temperatures(probs, correct) == pytest.approx([best], rel=1e-3)
    fitted = Surest(TEMPERED).fit([few])
    expected = softmax(np.log(probs) / fitted.temperatures[0], axis=1)[:, 0]
    np.testing.assert_allclose(fitted.step([few]).confidence, expected, rtol=1e-5)
    assert fit_temperatures(MODELS[0].sorted_probs, MODELS[0].correct) == pytest.approx([5.0])  # the highest tried


def test_confidences_and_fits_of_a_fold_never_depend_on_its_own_answers():
    flipped = FOLDS == 3
    turned = [dataclasses.replace(each, correct=each.correct ^ flipped) for each in NO_CLASSES]
    before, after = judged(NO_CLASSES), judged(turned)
    first, second = (cross_fitted(Surest(TEMPERED), outputs, FOLDS).confidence[1] for outputs in (before, after))
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
    fitted = Surest(TEMPERED).fit(MODELS)
    again = rule_from_json(json.loads(json.dumps(fitted.to_json())))
    np.testing.assert_array_equal(again.step(MODELS).confidence, fitted.step(MODELS).confidence)
    with pytest.raises(ValueError, match="the rules are surest, last, average, fused"):
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


# The comparison


@pytest.fixture(scope="module")
def contenders():
    return {one.name: one for one in compare(judged(MODELS[:2]), FOLDS)[0]}


def test_ends_of_the_contenders_are_what_their_definition_says(contenders):
    shallow, deep = MODELS[:2]
    average = 100 * ((shallow.probs + deep.probs).argmax(1) == TARGETS).mean()
    found = {name: figures(one.curve, deep.accuracy, 4.0) for name, one in contenders.items()}
    random = found["random deferral"]
    for share in (10, 20, 30, 50, 100):
        between = shallow.accuracy + share / 100 * (deep.accuracy - shallow.accuracy)
        assert random[f"accuracy_at_{share}%"] == pytest.approx(between)
    assert random["area"] == pytest.approx((shallow.accuracy + deep.accuracy) / 2)
    assert random["area_50"] == pytest.approx(0.75 * shallow.accuracy + 0.25 * deep.accuracy)
    for name, end in {
        "random deferral": deep.accuracy,
        "CLCNet, deep answer always kept": deep.accuracy,
        "CLCNet, average answers": average,
        "GEM, average answers random images": average,
        "oracle": 100 * (shallow.correct | deep.correct).mean(),
    }.items():
        assert found[name]["accuracy_at_100%"] == pytest.approx(end)
    assert all(found["oracle"]["area"] >= one["area"] for name, one in found.items() if "average" not in name)
    deferred = (~shallow.correct & deep.correct).mean()  # what the oracle defers, all at one threshold
    assert found["oracle"]["saving"] == pytest.approx(4 / (1 + 4 * deferred))
    assert np.isnan(figures(contenders["oracle"].curve, 100.1, 4.0)["saving"])


def test_without_classes_rules_over_them_are_left_out(contenders):
    found, left_out = compare(judged(NO_CLASSES[:2]), FOLDS)
    names = {one.name for one in found}
    with_classes = {"fused", "corrected shallow", "corrected deep"}
    assert set(left_out) == {"CLCNet, average answers", "GEM, average answers random images"} | with_classes
    assert set(contenders) == names | set(left_out)
    assert compare([with_rivals(each, FOLDS) for each in MODELS[:2]], FOLDS)[1] == []  # what is missing is CLCNet
    renumbered = [MODELS[0], Outputs.from_probs(MODELS[1].probs[:, ::-1], targets=5 - TARGETS, record=MODELS[1].record)]
    assert set(compare(judged(renumbered), FOLDS)[1]) == set(left_out) - {"corrected shallow", "corrected deep"}


@pytest.mark.parametrize("count", [2, 3])
def test_resampled_figures_of_all_contenders_come_from_the_same_draws(count):
    outputs = MODELS[:count]
    contenders = {one.name: one for one in compare(judged(outputs), FOLDS)[0]}
    chosen = [contenders[name] for name in ("CLCNet", "max softmax", "random deferral")]
    samples = resample(chosen, seed=5)
    written = comparison_frame(chosen)
    assert "Area against CLCNet " in comparison_markdown(written).splitlines()[0]
    for one, (_, row) in zip(chosen, written.iterrows(), strict=True):
        expected = figures(one.curve, outputs[-1].accuracy, outputs[-1].record.flops)
        assert row[list(expected)].tolist() == pytest.approx(list(expected.values()), nan_ok=True)
    random = np.random.default_rng(5)
    for number in range(5):
        drawn = random.integers(0, 600, 600)
        last = 100 * outputs[-1].correct[drawn].mean(), outputs[-1].record.flops
        for one, sample in zip(chosen, samples, strict=True):
            again = type(one)(one.name, one.steps.subset(drawn))
            for name, value in figures(again.curve, *last).items():
                assert sample[name][number] == pytest.approx(0 if np.isnan(value) else value)
