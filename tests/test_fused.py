"""Fused answers against a plain second implementation, and where images leave something open.

python -m pytest tests/test_fused.py
"""

import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from clcnet.cascade.pool import (
    PENALTIES,
    CrossFit,
    Pool,
    Rows,
    fit_rows,
    keep_classes,
    log_clipped,
    rows_of,
    simplest_of_best,
    standing,
)
from clcnet.cascade.rules import Fused
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.outputs import UNKNOWN, Outputs


def simulated(num_images: int, num_classes: int, signals: tuple[float, ...], seed: int = 0) -> list[Outputs]:
    """Models that see the target more or less clearly, and lean to class 0."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, num_classes, num_images)
    outputs = []
    for number, signal in enumerate(signals):
        logits = random.normal(size=(num_images, num_classes)) * 2
        logits[np.arange(num_images), targets] += signal
        logits[:, 0] += 1.0
        outputs.append(Outputs.from_logits(logits, targets=targets, model=f"model {number}", flops=number + 1))
    return outputs


def plain_fit(logs: list[np.ndarray], targets: np.ndarray, penalty: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Section by section what a pool is, in float64, with the gradient left to scipy."""
    num_models, num_classes = len(logs), logs[0].shape[1]

    def loss(point: np.ndarray) -> float:
        offsets = point[num_models:] if penalty is not None else np.zeros(num_classes)
        pooled = log_softmax(sum(w * log for w, log in zip(point, logs, strict=False)) + offsets, axis=1)
        return -pooled[np.arange(len(targets)), targets].sum() + (penalty or 0) * (offsets**2).sum()

    size = num_models + (0 if penalty is None else num_classes)
    point = minimize(loss, np.append(np.ones(num_models), np.zeros(size - num_models)), options={"gtol": 1e-6}).x
    return point[:num_models], point[num_models:]


@pytest.mark.parametrize("penalty", [None, 0.5, 10.0])
@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_a_pool_is_the_one_that_a_plain_implementation_finds(num_models: int, penalty: float | None) -> None:
    outputs = simulated(300, 4, (1.5, 2.0, 2.5)[:num_models])
    pool = fit_rows(rows_of(outputs), penalty)
    weights, offsets = plain_fit([np.log(out.probs.astype(float)) for out in outputs], outputs[0].targets, penalty)
    np.testing.assert_allclose(pool.weights, weights, atol=3e-3)
    if penalty is not None:
        np.testing.assert_allclose(pool.offsets, offsets, atol=3e-3)


def test_lumped_classes_hardly_change_a_pool_even_where_models_err_apart() -> None:
    outputs = simulated(500, 200, (4.0, 5.0))
    lumped, exact = (keep_classes([out.probs for out in outputs], outputs[0].targets, kept) for kept in (32, 200))
    assert lumped.logs.shape == (2, 39, 500) and exact.logs.shape == (2, 200, 500)
    for penalty in (None, 5.0):
        np.testing.assert_allclose(fit_rows(lumped, penalty).weights, fit_rows(exact, penalty).weights, rtol=0.05)
    pool = fit_rows(exact, None)
    for name in SIMPLE_CONFIDENCES:
        sure, right = standing(pool, lumped, name)
        exactly_sure, exactly_right = standing(pool, exact, name)
        assert np.abs(sure - exactly_sure).mean() < 0.05 * np.ptp(exactly_sure), name
        assert (right == exactly_right).all()


def test_the_lumped_row_is_exact_where_the_lumped_classes_are_alike() -> None:
    probs = np.full((1, 100), 0.5 / 99, dtype=np.float32)
    probs[0, 7] = 0.5
    rows = keep_classes([probs], np.array([7]), kept=1)
    pooled, log_target = Pool(np.array([2.0])).probs(rows)
    exact = 0.25 / (0.25 + 99 * (0.5 / 99) ** 2)
    np.testing.assert_allclose([pooled[0, 0], pooled[1:, 0].sum()], [exact, 1 - exact], rtol=1e-5)
    assert log_target[0] == pytest.approx(np.log(exact), rel=1e-5)


def test_a_step_is_the_softmax_of_weighted_logs_and_offsets() -> None:
    outputs = simulated(50, 3, (1.0, 2.0))
    weights, offsets = np.array([0.3, 0.9]), np.array([-0.5, 0.2, 0.3])
    rule = Fused("margin", pools=(Pool(np.array([0.7])), Pool(weights, offsets)))
    step = rule.step(outputs)
    pooled = softmax(sum(w * np.log(out.probs) for w, out in zip(weights, outputs, strict=True)) + offsets, axis=1)
    top = -np.sort(-pooled, axis=1)
    np.testing.assert_array_equal(step.labels, pooled.argmax(axis=1))
    np.testing.assert_allclose(step.confidence, top[:, 0] - top[:, 1], atol=1e-6)
    np.testing.assert_array_equal(step.correct, pooled.argmax(axis=1) == outputs[0].targets)
    assert set(step.answered_by) == {1} and set(rule.step(outputs[:1]).answered_by) == {0}
    with pytest.raises(ValueError, match="1 to 2 models, got 3"):
        rule.step([*outputs, outputs[0]])


def test_a_rule_written_to_json_answers_as_before() -> None:
    outputs = simulated(200, 5, (1.5, 2.5))
    rule = Fused("best").fit(outputs)
    again = Fused.from_json(json.loads(json.dumps(rule.to_json())))
    np.testing.assert_array_equal(again.step(outputs).confidence, rule.step(outputs).confidence)
    np.testing.assert_array_equal(again.step(outputs).labels, rule.step(outputs).labels)
    assert again.confidence in SIMPLE_CONFIDENCES


def test_of_confidences_that_rank_alike_the_simplest_is_best() -> None:
    """With two classes all of them rank images by the top probability."""
    assert Fused("best").fit(simulated(200, 2, (1.0, 2.0))).confidence == next(iter(SIMPLE_CONFIDENCES))


def test_of_losses_that_no_standard_error_tells_apart_the_first_is_taken() -> None:
    far, near = np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 1.2, 1.0, 1.2])
    best = np.array([1.0, 1.0, 1.2, 1.0])  # by 0.05 on average, with a standard error of 0.083
    assert [simplest_of_best(np.stack(rows)) for rows in ([best, far], [far, near, best], [far, far - 0.5])] == [
        0,
        1,
        1,
    ]


def test_a_network_is_asked_about_the_pooled_rows() -> None:
    class LastProbability:
        def predict(self, sorted_probs: np.ndarray) -> np.ndarray:
            return sorted_probs[:, -1]

    outputs = simulated(60, 3, (1.0, 2.0))
    step = Fused("CLCNet", network=LastProbability()).fit(outputs).step(outputs)
    assert step.confidence.max() <= 1 / 3


def test_images_without_a_target_are_not_fitted_to() -> None:
    outputs = simulated(120, 3, (1.0, 2.0))
    unknown = outputs[0].targets.copy()
    unknown[100:] = UNKNOWN
    partly = [Outputs.from_probs(out.probs, targets=unknown) for out in outputs]
    full = Fused().fit([out.subset(range(100)) for out in outputs])
    assert Fused().fit(partly).to_json() == full.to_json()
    assert Fused().fit(partly).step(partly).correct is None
    with pytest.raises(ValueError, match="whose classes are known"):
        Fused().fit([Outputs.from_probs(out.probs) for out in outputs])


def test_outputs_of_other_images_are_refused() -> None:
    one, other = simulated(30, 3, (1.0, 2.0))
    with pytest.raises(ValueError, match="give outputs of the same images"):
        Fused().fit([one, other.subset(range(20))])


def test_what_is_held_out_never_changes_what_is_fitted_without_it() -> None:
    outputs = simulated(200, 4, (1.5, 2.0))
    folds = np.arange(200) % 4
    rows = rows_of(outputs)
    other = rows_of([out.subset(np.where(folds == 2, np.roll(np.arange(200), 7), np.arange(200))) for out in outputs])
    mixed = Rows(np.where(folds == 2, other.logs, rows.logs), np.where(folds == 2, 0, rows.positions), 4)
    before, after = (CrossFit(each, folds, deep=True) for each in (rows, mixed))
    assert before.choice({2}) == after.choice({2})
    for out in before.paths:
        same = all((a.weights == b.weights).all() for a, b in zip(before.paths[out], after.paths[out], strict=True))
        assert same == (2 in out)


def test_offsets_are_taken_where_classes_are_favoured_and_left_where_they_are_not() -> None:
    leaning = simulated(600, 4, (2.0,))
    fair_targets = np.repeat(np.arange(4), 4)
    logits = 2.0 * (fair_targets[:, None] == np.arange(4)) + 0.0  # right in 12 of 16, and the same for every class
    logits[::4] = np.roll(logits[::4], 1, axis=1)
    fair = [Outputs.from_logits(np.tile(logits, (20, 1)), targets=np.tile(fair_targets, 20))]
    assert Fused().fit(leaning).pools[0].offsets[0] < -0.3
    assert Fused().fit(fair).pools[0].offsets is None
    assert Fused(offsets=False).fit(leaning).pools[0].offsets is None


def test_a_class_without_images_keeps_a_finite_offset() -> None:
    outputs = simulated(300, 5, (2.0, 3.0))
    here = outputs[0].targets != 4
    for penalty in PENALTIES[1:]:
        offsets = fit_rows(rows_of([out.subset(here) for out in outputs]), penalty).offsets
        assert offsets is not None and -8 < offsets[4] < offsets[1:4].min()


def test_a_model_that_is_always_right_gets_a_finite_weight_and_stays_right() -> None:
    targets = np.arange(100) % 3
    perfect = Outputs.from_logits(np.eye(3)[targets] * 5, targets=targets)
    rule = Fused().fit([perfect, perfect])
    assert np.isfinite(rule.pools[1].weights).all() and rule.step([perfect, perfect]).correct.all()


def test_two_equal_models_share_the_weight_of_one() -> None:
    (model,) = simulated(400, 3, (1.5,))
    one, two = (fit_rows(rows_of([model] * count), None) for count in (1, 2))
    np.testing.assert_allclose(two.weights, one.weights[0] / 2, atol=2e-3)


def test_a_probability_of_exactly_zero_counts_as_the_smallest_normal_number() -> None:
    assert log_clipped([0.0, 1.0]).tolist() == pytest.approx([-87.33655, 0.0])
    targets = np.arange(60) % 2
    certain = Outputs.from_probs(np.eye(2)[np.where(np.arange(60) < 6, 1 - targets, targets)], targets=targets)
    pool = fit_rows(rows_of([certain]), None)
    assert pool.weights[0] * 87.33655 == pytest.approx(np.log(9), abs=0.02)  # 54 of 60 are right: odds of nine to one


@pytest.mark.parametrize("num_images", [1, 2, 7, 19])
def test_a_handful_of_images_is_fitted_without_a_fuss(num_images: int) -> None:
    outputs = simulated(num_images, 3, (1.0, 2.0))
    rule = Fused("best").fit(outputs)
    assert np.isfinite(rule.step(outputs).confidence).all()
    assert all(np.isfinite(pool.weights).all() for pool in rule.pools)
