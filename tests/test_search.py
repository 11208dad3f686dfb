"""The search of cascades against brute force, and what may not leak from a fold into what is chosen for it.

python -m pytest tests/test_search.py
"""

from itertools import combinations, product

import numpy as np
import pytest

from clcnet.cascade import pool
from clcnet.cascade import search as module
from clcnet.cascade.curve import Steps
from clcnet.cascade.rules import BEST, Fused
from clcnet.cascade.search import Choice, Search, find_cascades, pareto, quantile_thresholds, tabulate
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Scored
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.outputs import UNKNOWN, Outputs
from tests.test_fused import simulated


def random_steps(costs: list[float], num_images: int, seed: int) -> Steps:
    """Confidences with ties, and right or wrong."""
    random = np.random.default_rng(seed)
    shape = len(costs), num_images
    return Steps(random.integers(0, 6, shape) / 6, random.random(shape) < 0.6, costs)


def literally(steps: Steps, thresholds: tuple[float, ...]) -> tuple[int, float]:
    """Right answers and cost, one image after the other."""
    right, spent = 0, 0.0
    for confidence, correct in zip(steps.confidence.T, steps.correct.T, strict=True):
        k = 0
        spent += steps.flops[0]
        while k < len(thresholds) and confidence[k] < thresholds[k]:
            k += 1
            spent += steps.flops[k]
        right += correct[k]
    return right, spent


@pytest.mark.parametrize("num_models", [1, 2, 3, 4])
def test_the_table_of_all_thresholds_is_the_definition_fold_by_fold(num_models: int) -> None:
    steps = random_steps([1.0, 2.5, 4.0, 10.0][:num_models], 40, seed=num_models)
    thresholds = [np.array([0.2, 0.5, np.inf]), np.array([1 / 6, np.inf]), np.array([0.0, 0.5, 1.0, np.inf])]
    folds = np.arange(40) % 3
    right, spent = tabulate(steps, thresholds[: num_models - 1], folds, 3)
    for column, vector in enumerate(product(*thresholds[: num_models - 1])):
        for fold in range(3):
            expected = literally(steps.subset(folds == fold), vector)
            assert (right[fold, column], spent[fold, column]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_cascade_is_the_one_that_brute_force_finds(seed: int) -> None:
    """One fold, so that no target is raised; few distinct confidences, so that all thresholds are tried."""
    costs = np.array([1.0, 2.0, 5.0, 9.0])
    chains = [chain for size in (1, 2, 3, 4) for chain in combinations(range(4), size)]
    steps = {chain: random_steps(costs[list(chain)], 30, 100 * seed + number) for number, chain in enumerate(chains)}
    search = Search(steps.items(), np.zeros(30))
    everything = []
    for chain in chains:
        limits = [quantile_thresholds(after, module.NUM_BINS[len(chain)]) for after in steps[chain].confidence[:-1]]
        everything += [literally(steps[chain], vector) for vector in product(*limits)]
    for target in (40.0, 60.0, 70.0):
        reached = [spent for right, spent in everything if 100 * right / 30 >= target - 1e-9]
        assert search.best(Goal("accuracy", target)).cost * 30 == pytest.approx(min(reached))
    for budget in (2.0, 4.0, 8.0):
        within = max(right for right, spent in everything if spent / 30 <= budget + 1e-9)
        assert search.best(Goal("flops", budget)).accuracy == pytest.approx(100 * within / 30)
    choice = search.best(Goal("accuracy", 60.0))
    right, spent = literally(steps[choice.chain], choice.thresholds)
    assert (choice.accuracy, choice.cost) == pytest.approx((100 * right / 30, spent / 30))


def test_a_target_out_of_reach_gives_the_most_accurate_cascade_and_a_budget_too_small_the_cheapest() -> None:
    both = Steps([[0.1, 0.9, 0.2, 0.8], [0.5] * 4], [[False, True, False, True], [True] * 3 + [False]], [1.0, 3.0])
    first = Steps(both.confidence[:1], both.correct[:1], [1.0])
    search = Search([((0,), first), ((0, 1), both)], np.zeros(4))
    assert search.reaches(100.0) and not search.reaches(100.5)
    for target in (100.0, 101.0):
        assert search.best(Goal("accuracy", target)) == Choice((0, 1), (0.8,), 100.0, 2.5)
    assert search.best(Goal("flops", 0.5)) == Choice((0,), (), 50.0, 1.0)


def test_points_that_another_beats_are_not_on_the_front() -> None:
    right, spent = np.array([5, 7, 7, 6, 9]), np.array([1.0, 3.0, 2.0, 2.0, 9.0])
    assert pareto(right, spent).tolist() == [0, 2, 4]


def test_what_a_choice_loses_is_its_promise_less_what_it_does_on_the_fold_left_out() -> None:
    """Model 0 is right in fold 0 alone, model 1 in fold 1 alone: the choice on one fold is worthless on the other."""
    halves = np.arange(8) // 4
    steps = [((model,), Steps(np.zeros((1, 8)), [halves == model], [model + 1.0])) for model in (0, 1)]
    search = Search(steps, halves)
    assert search.lost(100.0) == pytest.approx(100 * (1 - 1 / 2))


@pytest.fixture(scope="module")
def models() -> list[Outputs]:
    return simulated(600, 4, (1.5, 2.5, 3.5), seed=3)


FOLDS = np.arange(600) % 4


@pytest.mark.parametrize("confidence", ["margin", BEST])
def test_the_choice_for_a_fold_never_depends_on_its_images(models: list[Outputs], confidence: str) -> None:
    order = np.where(FOLDS == 1, np.roll(np.arange(600), 8), np.arange(600))  # other images, and of other targets
    others = [
        Outputs.from_probs(out.probs[order], targets=np.where(FOLDS == 1, 0, out.targets), record=out.record)
        for out in models
    ]
    goals = [Goal("accuracy", 70.0), Goal("flops", 2.0)]
    engines = []
    for outputs in (models, others):
        rows = module.rows_of(outputs)
        engines.append(module._Engine(rows, np.array([[1.0, 2.0, 3.0]]), FOLDS, 3, confidence, True, False))
    assert engines[0].judges[1] == engines[1].judges[1]
    one, other = (engine.searches[1] for engine in engines)
    assert [one.best(goal) for goal in goals] == [other.best(goal) for goal in goals]
    assert engines[0].searches[0].best(goals[0]) != engines[1].searches[0].best(goals[0])
    elsewhere = np.flatnonzero(FOLDS != 1)
    for chain in engines[0].chains[1]:
        before, after = (engine.prefix_steps(chain, 1, elsewhere) for engine in engines)
        np.testing.assert_array_equal(before.confidence, after.confidence)


def test_the_best_confidence_is_one_that_ranks_fused_answers_best(
    models: list[Outputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    upside_down = {"upside down": lambda probs: -probs[:, 0].astype(float)}
    for place in (pool, module):
        monkeypatch.setattr(place, "SIMPLE_CONFIDENCES", upside_down | SIMPLE_CONFIDENCES)
    goals = [Goal("accuracy", 65.0)]
    worst, best = (find_cascades(models, FOLDS, goals, confidence=name).goals[0] for name in ("upside down", BEST))
    assert best.rule.confidence in SIMPLE_CONFIDENCES and best.cross_fitted.costs[0] < worst.cross_fitted.costs[0]
    two_classes = simulated(300, 2, (1.0, 3.0))  # where all of them rank alike
    monkeypatch.undo()
    found = find_cascades(two_classes, FOLDS[:300], confidence=BEST).goals[0]
    assert found.rule.confidence == "max softmax"
    assert found.choice == find_cascades(two_classes, FOLDS[:300]).goals[0].choice


def test_cross_fitted_figures_are_those_of_rules_fitted_and_thresholds_chosen_elsewhere(models: list[Outputs]) -> None:
    (found,) = find_cascades(models, FOLDS, [Goal("match")]).goals
    assert found.target == pytest.approx(max(out.accuracy for out in models))
    chain = [models[model] for model in found.choice.chain]
    steps = [found.rule.step(chain[: k + 1]) for k in range(len(chain))]
    last = found.choice.decide(np.stack([step.confidence for step in steps]))
    # the rule was fitted on these very images, the figures come from pools that were not: they agree only nearly
    seen = [(last >= k).mean() for k in range(len(chain))]
    np.testing.assert_allclose(seen, found.shares, atol=0.03)
    assert found.costs[0] == pytest.approx(found.shares @ [out.record.flops for out in chain])
    assert found.costs[0] == pytest.approx(found.choice.cost)
    assert abs(found.cross_fitted.accuracy - found.choice.accuracy) < 5
    low, high = found.cross_fitted.accuracy_interval
    assert low < found.cross_fitted.accuracy < high
    saving, (least, most) = found.cross_fitted.saving(3.0)
    assert saving == pytest.approx(3.0 / found.cross_fitted.costs[0])
    assert least < saving < most


def test_the_order_of_the_models_does_not_matter_and_a_second_cost_is_reported(models: list[Outputs]) -> None:
    goals = [Goal("accuracy", 75.0), Goal("flops", 2.0)]
    straight = find_cascades(models, FOLDS, goals, costs=[[1, 2, 3], [30, 20, 10]], max_stages=2)
    turned = find_cascades(models[::-1], FOLDS, goals, costs=[[3, 2, 1], [10, 20, 30]], max_stages=2)
    for one, other in zip(straight.goals + straight.front, turned.goals + turned.front, strict=True):
        assert one.choice.chain == tuple(2 - model for model in other.choice.chain)
        assert one.choice.thresholds == other.choice.thresholds
        np.testing.assert_allclose(one.costs, other.costs)
        np.testing.assert_allclose(one.cross_fitted.costs, other.cross_fitted.costs)
    costs = [row.choice.cost for row in straight.front]
    assert costs == sorted(costs)


def test_a_model_that_another_beats_at_no_higher_cost_is_dropped_by_name(models: list[Outputs]) -> None:
    cascades = find_cascades(models, FOLDS, costs=[1, 3, 2], max_stages=2)
    assert cascades.dropped == {1: "model 1 is no better than model 2, which costs no more"}
    assert all(1 not in found.choice.chain for found in cascades.goals + cascades.front)
    assert [round(each.accuracy, 6) for each in cascades.raw] == [round(out.accuracy, 6) for out in models]
    assert [each.costs.tolist() for each in cascades.raw] == [[1], [3], [2]]
    twice = find_cascades([models[0], models[0]], FOLDS)
    assert list(twice.dropped) == [1] and twice.goals[0].choice.chain == (0,)


def test_corrected_models_are_scored_by_pools_of_the_other_folds(models: list[Outputs]) -> None:
    cascades = find_cascades(models[:2], FOLDS, max_stages=1)
    right = 0
    for fold in range(4):
        inside = FOLDS == fold
        others = FOLDS[~inside]
        rows = module.rows_of([models[0].subset(~inside)])
        pool = module.CrossFit(rows, others).pool()
        right += Fused(pools=(pool,)).step([models[0].subset(inside)]).correct.sum()
    assert cascades.corrected[0].correct.sum() == right


def test_images_without_a_target_and_costs_that_are_not_known(models: list[Outputs]) -> None:
    targets = np.where(np.arange(600) < 300, models[0].targets, UNKNOWN)
    partly = [Outputs.from_probs(out.probs, targets=targets, record=out.record) for out in models[:2]]
    half = find_cascades([out.subset(range(300)) for out in models[:2]], FOLDS[:300], [Goal("accuracy", 70.0)])
    assert find_cascades(partly, FOLDS, [Goal("accuracy", 70.0)]).goals[0].choice == half.goals[0].choice
    with pytest.raises(ValueError, match="three folds or more"):
        find_cascades(models[:2], FOLDS % 2)
    assert find_cascades(models[:2], np.arange(600) % 3, max_stages=1).front
    with pytest.raises(ValueError, match="the cost of model 2 is not known"):
        find_cascades([models[0], Outputs.from_probs(models[1].probs, targets=models[1].targets)], FOLDS)


def test_a_class_missing_from_a_fold_and_probabilities_of_zero_are_searched_all_the_same() -> None:
    targets = np.arange(200) % 4
    folds = np.where(targets == 3, 0, np.arange(200) // 40)
    sure = Outputs.from_probs(np.eye(4)[targets], targets=targets).probs
    doubtful = np.where(np.arange(200)[:, None] % 3 > 0, sure, 0.25)
    outputs = [Outputs.from_probs(doubtful, targets=targets), Outputs.from_probs(sure, targets=targets)]
    (found,) = find_cascades(outputs, folds, costs=[1, 10]).goals
    assert found.cross_fitted.accuracy == 100.0 and found.cross_fitted.costs[0] < 10


def test_the_saving_of_a_constant_cost_has_no_spread() -> None:
    assert Scored(np.ones(10, dtype=bool), np.full((1, 10), 2.0)).saving(6.0) == (3.0, (3.0, 3.0))
