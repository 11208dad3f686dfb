"""The one-line confidences on rows whose values can be worked out by hand."""

import numpy as np
import pytest

from clcnet.confidence import SIMPLE_CONFIDENCES, margin, max_softmax, negative_entropy, sum_of_squares

ROWS = np.array([[1, 0, 0, 0], [0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]], dtype=np.float32)


@pytest.mark.parametrize(
    "confidence, expected",
    [
        (max_softmax, [1, 0.5, 0.25]),
        (margin, [1, 0.25, 0]),
        (negative_entropy, [0, -1.75 * np.log(2), -2 * np.log(2)]),
        (sum_of_squares, [1, 0.34375, 0.25]),
    ],
)
def test_values_equal_those_worked_out_by_hand(confidence, expected):
    np.testing.assert_allclose(confidence(ROWS), expected, atol=1e-7)


def test_rounding_makes_no_confidence_of_more_than_1():
    assert sum_of_squares(np.float32([[1 + 2**-23, 0]])) == 1


@pytest.mark.parametrize("name", SIMPLE_CONFIDENCES)
def test_a_surer_row_scores_higher_and_everything_stays_finite(name):
    scores = SIMPLE_CONFIDENCES[name](ROWS)
    assert scores.dtype == np.float64 and np.isfinite(scores).all()
    assert scores[0] > scores[1] > scores[2]


def test_max_softmax_is_compared_in_double_precision():
    """A threshold typed as 0.3 lies below float32's 0.3, so such an image is not deferred, whoever compares."""
    assert not max_softmax(np.array([[0.3, 0.7]], dtype=np.float32))[0] < 0.3
