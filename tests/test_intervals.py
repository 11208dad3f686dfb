"""Intervals against published and hand-made values."""

import numpy as np
import pytest

from clcnet.intervals import exact_interval, percentile_interval, resampled_means


@pytest.mark.parametrize(
    "num_right, low, high",
    [
        (8, 44.39, 97.48),
        (0, 0, 30.85),
        (1, 0.25, 44.5),
        (9, 55.5, 99.75),
        (10, 69.15, 100),
    ],  # Clopper and Pearson, of 10
)
def test_exact_interval_equals_clopper_and_pearsons_published_values(num_right, low, high):
    assert np.round(exact_interval(num_right, 10), 2).tolist() == [low, high]


def test_exact_interval_takes_many_counts_at_once():
    low, high = exact_interval([0, 5, 10], 10)
    assert (low < high).all() and low[0] == 0 and high[2] == 100


def test_percentile_interval_is_the_middle_95_percent():
    assert percentile_interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))


def test_resampled_means_spread_as_the_mean_of_a_sample_does():
    values = np.repeat([0.0, 1.0, 4.0], [500, 300, 200])
    means = resampled_means(values[:, None], num_resamples=4000, seed=0)[:, 0]
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.std() == pytest.approx(values.std() / np.sqrt(1000), rel=0.05)


def test_columns_are_resampled_together():
    right = np.arange(100) < 70
    means = resampled_means(np.stack([right, right, ~right], axis=1), num_resamples=50)
    np.testing.assert_allclose(means[:, 0], means[:, 1])
    np.testing.assert_allclose(means[:, 0] + means[:, 2], 1)


def test_one_seed_gives_the_same_interval_again():
    columns = np.random.default_rng(0).random((50, 2)) < 0.5
    np.testing.assert_array_equal(resampled_means(columns, 10, seed=3), resampled_means(columns, 10, seed=3))
    assert (resampled_means(columns, 10, seed=3) != resampled_means(columns, 10, seed=4)).any()
