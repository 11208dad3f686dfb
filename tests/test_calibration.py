"""The calibration: its formula, its fit against scikit-learn's, and what it makes of a network that knows nothing."""

import math
import statistics

import numpy as np
import pytest
import torch
from networks import sorted_rows
from scipy.stats import spearmanr

from clcnet.network.calibration import Calibration, fit_calibration, simple_scores, tempered_scores


def test_simple_scores_of_a_known_row():
    rows = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]])
    floor = float(np.log(1e-12))
    entropy = 0.5 * np.log(2) + 0.25 * np.log(4) + 2 * 0.125 * np.log(8)
    expected = torch.tensor([[0.0, np.log(0.25), np.log(0.125), np.log(entropy)], [-floor, floor, floor, floor]])
    torch.testing.assert_close(simple_scores(rows), expected.float())


@pytest.mark.parametrize("row", [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.9, 0.06, 0.03, 0.01]])
def test_tempered_scores_of_a_known_row_and_of_one_without_rivals(row):
    logs = [math.log(max(p, 1e-12)) for p in row]
    temperature = 0.6 * statistics.pstdev(logs) ** 0.25
    tempered = [[p ** (1 / t) for p in map(math.exp, logs)] for t in (temperature, 2 * temperature)]
    odds, odds_at_twice = (sharpened[0] / sum(sharpened[1:]) for sharpened in tempered)
    expected = [math.log(odds), math.log(odds / (1 + odds)), math.log(odds_at_twice)]
    torch.testing.assert_close(tempered_scores(torch.tensor([row]))[0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 10, 1000, 1_000_000])
def test_tempered_scores_are_numbers_where_all_classes_are_alike_or_one_is_certain(num_classes):
    rows = torch.full((2, num_classes), 1 / num_classes)
    rows[1] = torch.arange(num_classes) == 0
    alike, certain = tempered_scores(rows)
    chance = torch.tensor([-math.log(num_classes - 1), -math.log(num_classes), -math.log(num_classes - 1)])
    torch.testing.assert_close(alike, chance, rtol=1e-4, atol=1e-5)
    assert certain.isfinite().all() and certain[0] > 20 and certain[2] > 9


@pytest.mark.parametrize("num_weights", [3, 4])  # four in files of version 1.0
def test_calibration_follows_its_formula(num_weights):
    calibration = Calibration(0.5, (1.0, *[0.0] * (num_weights - 1)), 2.0)
    rows = torch.tensor([[0.5, 0.25, 0.25]] if num_weights == 4 else [[0.5, 0.5]])  # log-odds 0: base 0.5
    base = 1 / (1 + np.exp(-0.5))
    expected = 1 / (1 + np.exp(-(0.5 + 2 * (0.9 - base))))
    assert float(calibration.apply(torch.tensor([0.9]), rows)) == pytest.approx(expected, rel=1e-6)


def test_the_fit_is_the_one_that_no_small_step_betters():
    rows = torch.from_numpy(sorted_rows(500, 6, seed=1))
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(500, generator=generator) < rows[:, 0]
    raw, held_back = (
        torch.where(correct, 0.7, 0.4) + 0.3 * torch.rand(500, generator=generator),
        torch.arange(500) < 200,
    )
    fitted = fit_calibration(raw, rows, correct, held_back)
    scores = tempered_scores(rows).double()
    spread = scores.std(0, correction=0)

    def loss(network: float, weights: torch.Tensor, intercept: float) -> float:
        base = scores @ weights + intercept
        if network:
            base = base + network * (raw - torch.sigmoid(base))
        likelihood = torch.nn.functional.binary_cross_entropy_with_logits(base, correct.double(), reduction="none")
        if network:
            return float(likelihood[held_back].sum()) + network**2 / 2
        return float(likelihood.sum() + ((weights * spread) ** 2).sum() / 2)

    weights = torch.tensor(fitted.weights, dtype=torch.float64)
    best = loss(0, weights, fitted.intercept)
    for place in range(3):
        for step in (-1e-3, 1e-3):
            moved = weights + torch.eye(3)[place] * step / spread
            assert loss(0, moved, fitted.intercept - float((moved - weights) @ scores.mean(0))) > best
    assert fitted.network > 0.5
    for step in (-1e-3, 1e-3):
        alone = loss(fitted.network, weights, fitted.intercept)
        assert loss(fitted.network + step, weights, fitted.intercept) > alone


def test_a_network_that_knows_more_gets_weight_and_noise_gets_none_to_speak_of():
    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(sorted_rows(2000, 6, seed=2))
    correct = torch.rand(2000, generator=generator) < 0.5
    held_back = torch.arange(2000) % 2 == 0
    oracle = torch.where(correct, 0.9, 0.1)
    noise = torch.rand(2000, generator=generator)
    assert fit_calibration(oracle, rows, correct, held_back).network > 3
    assert fit_calibration(noise, rows, correct, held_back).network < 0.5
    assert fit_calibration(1 - oracle, rows, correct, held_back).network == 0  # never turned around


def test_a_network_that_says_what_the_probabilities_say_gets_no_weight():
    rows = torch.from_numpy(sorted_rows(2000, 6, seed=1))
    correct = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < rows[:, 0]
    everything = torch.ones(2000, dtype=torch.bool)
    alone = fit_calibration(torch.zeros(2000), rows, correct, everything)
    said = Calibration(alone.intercept, alone.weights, 0.0).apply(torch.zeros(2000), rows)
    assert fit_calibration(said, rows, correct, everything).network < 1e-3


def test_the_networks_weight_comes_from_the_rows_held_back():
    rows = torch.from_numpy(sorted_rows(4000, 6, seed=2))
    correct = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.5
    held_back = torch.arange(4000) >= 3000
    raw = torch.full((4000,), 0.5)
    raw[:3000] = correct[:3000].float()  # knows what it learnt by heart, and nothing else
    assert fit_calibration(raw, rows, correct, held_back).network < 0.5


def test_a_surer_model_than_the_one_it_was_fitted_on_is_ranked_by_how_sure_it_is():
    """The paper's rule asks it of the deep model's answers too; a tenth of the surest ones here are wrong."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(4000, 10, generator=generator)
    rows = logits.softmax(1).sort(1, descending=True).values
    correct = torch.rand(4000, generator=generator) < rows[:, 0].clamp(max=0.9)
    fitted = fit_calibration(torch.zeros(4000), rows, correct, torch.zeros(4000, dtype=torch.bool))
    surer = (4 * logits).softmax(1).sort(1, descending=True).values
    confidence = fitted.apply(torch.zeros(4000), surer).double().numpy()
    ranks = spearmanr(confidence, tempered_scores(surer)[:, 0].numpy()).statistic
    assert ranks > 0.9
