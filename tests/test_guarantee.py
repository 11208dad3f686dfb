"""Promises: betting by hand and by a second implementation, and how often they are broken on the boundary.

python -m pytest tests/test_guarantee.py
"""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from clcnet.cascade.guarantee import (
    certify,
    certify_risk,
    could_promise,
    log_capital,
    loses_less,
    most_cost,
    most_share,
    passed,
)


def plain_capital(differences: list[float], eps: float, delta: float) -> float:
    """Section by section, one image after the other."""
    capital, highest, total, squares = 1.0, 0.0, 0.0, 0.04
    for seen, difference in enumerate(differences, start=1):
        variance = squares / seen
        stake = min(math.sqrt(2 * math.log(1 / delta) / (len(differences) * variance)), 0.5 / (1 - eps))
        capital *= 1 + stake * (eps - difference)
        highest = max(highest, capital)
        total += difference
        squares += (difference - total / (seen + 1)) ** 2
    return highest


@settings(max_examples=100, deadline=None)
@example([-1, -1, 1] * 20, 0.0)  # so varied that stakes stay below their bound
@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=60), st.sampled_from([0.0, 0.005, 0.1, 0.5]))
def test_the_capital_is_that_of_one_bet_after_the_other(differences: list[int], eps: float) -> None:
    assert math.exp(log_capital(differences, eps, 0.05)) == pytest.approx(plain_capital(differences, eps, 0.05))


def test_two_bets_worked_out_by_hand() -> None:
    """Stakes are at their bound, 0.5 / 0.8 = 0.625: after a gain 1 + 0.625 * 1.2 = 1.75, after a loss half of that."""
    assert math.exp(log_capital([-1, 1], 0.2, 0.05)) == pytest.approx(1.75)
    assert math.exp(log_capital([1, -1], 0.2, 0.05)) == pytest.approx(0.875)


def test_equal_models_need_enough_images_for_the_smallest_promise() -> None:
    """Without a difference the capital grows by 1 + 0.5 / 0.995 * 0.005 an image at most: 20 is reached after 1,194."""
    assert math.ceil(math.log(20) / math.log1p(0.5 / 0.995 * 0.005)) == 1194
    certified = [bool(loses_less(np.zeros(size), 0.005, 0.05)) for size in (1193, 1200)]
    assert certified == [False, True]
    assert could_promise(np.ones(1200, bool), np.ones(1200, bool), 0.05) == pytest.approx(0.5)
    assert math.isnan(could_promise(np.ones(20, bool), np.zeros(20, bool), 0.05))
    # 1.125^20 = 10.55 is what 20 images could show of a loss of 20 points; of 19.9, the most that is promised, 10.41
    found = [could_promise(np.ones(20, bool), np.ones(20, bool), 1 / capital) for capital in (10.3, 10.5)]
    assert found == pytest.approx([19.8, math.nan], abs=0.11, nan_ok=True)
    assert could_promise(np.ones(20_000, bool), np.ones(20_000, bool), 0.05) == pytest.approx(0.1)


def test_a_walk_ends_at_the_first_failure_whatever_comes_after_it() -> None:
    deep = np.ones(2000, bool)
    bad = np.arange(2000) % 10 > 0
    assert certify(deep, [deep, deep, bad, deep], 0.01, 0.05) == 2
    assert certify(deep, [bad, deep], 0.01, 0.05) == 0
    results = iter([True, False, True])
    assert passed(results) == 1 and list(results) == [True]


def test_images_that_come_class_by_class_are_judged_as_if_shuffled() -> None:
    """All losses last, or all first, is one and the same sample."""
    deep = np.ones(5000, bool)
    shares = [could_promise(deep, np.roll(np.arange(5000) >= 100, shift), 0.05) for shift in (0, 4900)]
    assert shares == pytest.approx([2.6, 2.6], abs=0.3)


@pytest.mark.parametrize("eps", [0.005, 0.02])
def test_a_loss_on_the_boundary_is_certified_no_more_often_than_promised(eps: float) -> None:
    """2% of the images are won, 2% + eps lost: with 2,000 runs more than 5% + 4 standard errors would be 7%."""
    draws = np.random.default_rng(1).random((2000, 1000))
    differences = np.where(draws < 0.02 + eps, 1, np.where(draws > 0.98, -1, 0))
    assert loses_less(differences, eps, 0.05).mean() < 0.07


def test_a_share_is_bounded_as_the_binomial_says() -> None:
    """The bound p is where as few as that many are seen with probability delta."""
    counts = np.array([0, 3, 59, 100])
    bounds = most_share(counts, 100, 0.05)
    np.testing.assert_allclose(binom.cdf(counts[:3], 100, bounds[:3]), 0.05)
    assert bounds[3] == 1.0 and most_share(0, 0, 0.05) == 1.0


def test_the_cost_of_three_models_is_bounded_share_by_share() -> None:
    last = np.repeat([0, 1, 2], [70, 20, 10])
    second, third = most_share([30, 10], 100, 0.025)
    assert most_cost(last, [1.0, 2.0, 5.0], 0.05) == pytest.approx(1 + 2 * second + 5 * third)
    assert most_cost(np.minimum(last, 1), [1.0, 2.0], 0.05) == pytest.approx(1 + 2 * most_share(30, 100, 0.05))
    assert most_cost(np.zeros(100, int), [1.5], 0.05) == 1.5


def test_what_is_answered_errs_no_more_than_promised() -> None:
    """Of the surest 400 none is wrong, of the rest half: 0.05^(1/400) leaves a risk of 0.75%, 600 would have 20%."""
    confidence = np.arange(1000) / 1000
    right = (confidence >= 0.6) | (np.arange(1000) % 2 == 0)
    assert certify_risk(confidence, right, [0.9, 0.8, 0.6, 0.4, 0.0], 0.015, 0.05) == 0
    assert certify_risk(confidence, right, [0.8, 0.6, 0.4, 0.0], 0.015, 0.05) == 2
    assert certify_risk(np.full(400, 0.5), np.ones(400, bool), [0.5], 0.015, 0.05) == 1  # as sure as asked is enough
