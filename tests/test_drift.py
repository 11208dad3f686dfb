"""Drift: false alarms no more often than promised, and alarms where the images are others.

python -m pytest tests/test_drift.py
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import fisher_exact, ks_2samp

from clcnet.cascade.drift import DriftError, Expected, Watch, confidence_chance, find_drift, quantiles, share_chance

THRESHOLD = 0.7
EXPECTED = Expected(2000, 80.0, (78.0, 82.0), [1.0, 0.41], 1.0)  # of two models; nothing of confidences


def steps(random: np.random.Generator, num_images: int, shift: float = 0.0) -> list[np.ndarray]:
    """How sure a first model is, and a second one of the images of which the first is not."""
    first = 1 / (1 + np.exp(-random.normal(1.0 - shift, 1.0, num_images)))
    going_on = (first < THRESHOLD).sum()
    return [first, 1 / (1 + np.exp(-random.normal(1.5 - shift, 1.0, going_on)))]


def expected(random: np.random.Generator, num_images: int) -> Expected:
    measured = steps(random, num_images)
    shares = [1.0, len(measured[1]) / num_images]
    return Expected(num_images, 80.0, (78.0, 82.0), shares, 1.0, quantiles=quantiles(measured))


def test_shares_of_two_runs_are_compared_as_by_fisher() -> None:
    for count, total in ((89, 100), (45, 100), (41, 100), (0, 3)):
        table = [[count, total - count], [410, 590]]
        twice_the_tail = min(1, 2 * min(fisher_exact(table, side).pvalue for side in ("less", "greater")))
        assert share_chance(count, total, 410, 1000) == pytest.approx(twice_the_tail)


def test_quantiles_show_no_more_of_a_distance_than_all_numbers_would() -> None:
    random = np.random.default_rng(0)
    for shift in (0.0, 0.1, 1.0):
        one, other = (np.round(random.normal(*size), 2) for size in ((0, 1, 700), (shift, 1, 500)))
        distance = ks_2samp(one, other).statistic
        bound = math.e * math.exp(-2 * 500 * 700 / 1200 * distance**2)
        (limits,) = quantiles([one])
        found = confidence_chance(other, limits, 700)
        assert found >= min(bound, 1) * (1 - 1e-6)
        assert found <= 1e-9 or shift < 1


def test_distances_from_quantiles_worked_out_by_hand() -> None:
    hundredths = [k / 100 for k in range(1, 100)]
    assert quantiles([np.arange(1, 101), np.empty(0)]) == [pytest.approx(range(1, 100), abs=1), []]
    assert confidence_chance(np.full(50, 0.5), [0.5] * 99, 100) == 1.0  # as far apart as one number from itself
    below_all = math.e * math.exp(-2 * (2 * 2 / (2 + 2)) * 0.99**2)
    assert confidence_chance(np.zeros(2), hundredths, 2) == pytest.approx(below_all)


def test_a_share_of_89_percent_where_41_were_expected_is_an_alarm_by_50_images() -> None:
    (line,) = find_drift([np.full(50, 0.9), np.full(45, 0.5)], EXPECTED)
    assert line == "90.0% of 50 images go on past model 1, 41.0% were expected"
    assert find_drift([np.full(50, 0.5), np.full(26, 0.5)], EXPECTED) == []
    assert find_drift([np.empty(0), np.empty(0)], EXPECTED) == []
    first = quantiles([np.arange(1, 101) / 100])[0]
    (line,) = find_drift([np.full(50, 0.9), np.full(20, 0.5)], replace(EXPECTED, quantiles=[first, []]))
    assert line == "model 1's confidences differ: their median is 0.900, 0.500 was expected"


def test_the_tests_of_a_look_share_its_level_and_looks_that_of_the_watch() -> None:
    """Two models make three tests; the first look has half of the watch's level, the second a sixth."""
    chance = share_chance(30, 50, 820, 2000)
    table = np.full((50, 2), 0.5)
    table[30:, 1] = np.nan
    for part, alarmed in ((0.99, False), (1.01, True)):
        assert bool(find_drift([np.full(50, 0.5), np.full(30, 0.5)], EXPECTED, 3 * chance * part)) == alarmed
        for looks, share in ((1, 2), (2, 6)):
            watch = Watch(EXPECTED, window=50, level=3 * share * chance * part)
            for _ in range(looks):
                watch.add(table)
            assert watch.num_looks == looks and bool(watch.found) == alarmed


def test_a_watch_looks_when_its_window_is_full_and_then_after_every_half_of_one() -> None:
    watch, looks = Watch(EXPECTED, window=4), []
    for _ in range(9):
        watch.add(np.full((1, 2), 0.5))
        looks.append(watch.num_looks)
    assert looks == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_runs_over_images_like_before_raise_no_more_alarms_than_promised() -> None:
    """Of 400 runs, policy and images drawn anew, 5% may be alarms: 20, and with 3 standard errors 33."""
    random = np.random.default_rng(1)
    alarms = sum(bool(find_drift(steps(random, 400), expected(random, 800), level=0.05)) for _ in range(400))
    assert alarms <= 33


def test_a_service_over_images_like_before_raises_no_more_alarms_than_promised() -> None:
    """200 services of 10 looks each; 5% may ever be alarmed: 10, and with 3 standard errors 19."""
    random = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        watch = Watch(expected(random, 1000), window=200, level=0.05)
        found = False
        for _ in range(11):
            watch.add(rows(steps(random, 100)))
            found |= bool(watch.found)
        assert watch.num_looks == 10
        alarms += found
    assert alarms <= 19


def rows(measured: list[np.ndarray]) -> np.ndarray:
    """(N, K) as a cascade tells them."""
    table = np.full((len(measured[0]), 2), np.nan)
    table[:, 0] = measured[0]
    table[measured[0] < THRESHOLD, 1] = measured[1]
    return table


@pytest.mark.parametrize("shift", [0.6, -0.6])
def test_other_images_are_found_and_a_watch_stops_until_they_are_as_before(shift: float) -> None:
    random = np.random.default_rng(3)
    measured = expected(random, 2000)
    assert len(find_drift(steps(random, 500, shift), measured)) == 3
    watch = Watch(measured, window=300, on_drift="stop")
    watch.add(rows(steps(random, 299)))
    with pytest.raises(DriftError, match="not like those of the policy: .*were expected"):
        for _ in range(6):
            watch.add(rows(steps(random, 100, shift)))
    with pytest.raises(DriftError):  # no new look yet
        watch.add(rows(steps(random, 1)))
    for _ in range(3):
        try:
            watch.add(rows(steps(random, 300)))
        except DriftError:
            continue
    assert watch.found == []


def test_threads_share_a_watch_and_lose_no_image(caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(4)
    watch = Watch(expected(random, 1000), window=100)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(watch.add, [rows(steps(random, 5, 2.0)) for _ in range(200)]))
    assert watch.num_looks == 1 + (1000 - 100) // 50
    assert "drift: model 1's confidences differ" in caplog.text
