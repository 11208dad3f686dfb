"""The metrics against numbers worked out by hand, against scikit-learn, and against known figures of real networks."""

import csv
from itertools import permutations

import numpy as np
import plain
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clcnet import metrics

RANDOM = np.random.default_rng(0)
CONFIDENCE = RANDOM.random(400).astype(np.float32)
CORRECT = RANDOM.random(400) < CONFIDENCE
pytestmark = pytest.mark.filterwarnings("error")  # no division by an empty bin or by no wrong answers


@pytest.fixture(scope="module")
def resnet20(shared):
    with open(shared / "cifar10" / "resnet20.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    return np.array([row[1:-1] for row in rows], dtype=np.float32), np.array([row[-1] == "1" for row in rows])


@pytest.mark.parametrize(
    "confidence, correct, expected",
    [
        # the three surest are right, right, wrong: risks 0, 0, 1/3, 1/4
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], {"auroc": 2 / 3, "aurc": (1 / 3 + 1 / 4) / 4, "augrc": (0.5 + 1) / 16}),
        # one wrong among three equal: risk 1/3 at every k
        ([0.5, 0.5, 0.5], [1, 0, 1], {"auroc": 0.5, "aurc": 1 / 3, "augrc": 1 / 6}),
        ([0.9, 0.1], [1, 1], {"auroc": np.nan, "aurc": 0, "e_aurc": 0, "augrc": 0, "brier": (0.01 + 0.81) / 2}),
        ([0.9, 0.1], [0, 0], {"auroc": np.nan, "aurc": 1, "e_aurc": 0, "augrc": 0.5, "brier": (0.81 + 0.01) / 2}),
        ([0.1, 0.9], [1, 0], {"auroc": 0, "aurc": 0.75, "e_aurc": 0.5, "augrc": (0.5 + 1) / 4, "brier": 0.81}),
        ([0.9, 0.1], [1, 0], {"auroc": 1, "aurc": 0.25, "e_aurc": 0, "augrc": 0.125, "brier": 0.01}),
        ([1.0], [1], {"auroc": np.nan, "aurc": 0, "e_aurc": 0, "augrc": 0, "brier": 0}),
        ([np.inf, -np.inf], [1, 0], {"auroc": 1, "aurc": 0.25}),
    ],
)
def test_small_cases_give_the_numbers_worked_out_by_hand(confidence, correct, expected):
    for name, value in expected.items():
        assert getattr(metrics, name)(confidence, correct) == pytest.approx(value, nan_ok=True), name


def test_equal_confidences_count_as_the_mean_over_their_orders():
    correct = np.array([1, 0, 0, 1, 1], dtype=bool)
    risks = [np.cumsum(~np.array(order)) / np.arange(1, 6) for order in permutations(correct)]
    assert metrics.aurc(np.ones(5), correct) == pytest.approx(np.mean(risks))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1), st.randoms())
def test_the_order_of_the_rows_does_not_matter(rows, random):
    before = metrics.summary(*zip(*rows, strict=True))
    random.shuffle(rows)
    assert metrics.summary(*zip(*rows, strict=True)) == pytest.approx(before, nan_ok=True)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1))
def test_augrc_follows_from_auroc_and_accuracy(rows):
    """Traub et al., arXiv:2407.01032: AUGRC = (1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2."""
    confidence, correct = zip(*rows, strict=True)
    accuracy = np.mean(correct)
    unordered = 0 if accuracy in (0, 1) else (1 - metrics.auroc(confidence, correct)) * accuracy * (1 - accuracy)
    assert metrics.augrc(confidence, correct) == pytest.approx(unordered + (1 - accuracy) ** 2 / 2)


@pytest.mark.parametrize("confidence", [CONFIDENCE, np.round(CONFIDENCE, 1)])  # with ties, 0 and 1 among them
def test_all_figures_equal_a_plain_second_implementation(confidence):
    expected = plain.metrics(confidence.astype(float), CORRECT)
    assert metrics.summary(confidence, CORRECT) == pytest.approx(expected, rel=1e-6)


def test_coverage_at_risk_is_the_largest_that_a_threshold_can_give():
    confidence, correct = [0.9, 0.8, 0.8, 0.7, 0.6], [1, 1, 0, 1, 1]  # risks 0, 1/3 (two at once), 1/4, 1/5
    assert metrics.coverage_at_risk(confidence, correct, 0.0) == 0.2
    assert metrics.coverage_at_risk(confidence, correct, 0.2) == 1.0
    assert metrics.coverage_at_risk(confidence, correct, 0.19) == 0.2
    assert metrics.coverage_at_risk([0.9, 0.8], [0, 1], 0.05) == 0.0
    # of 100 images the 60th is wrong, the 80th, 90th and 95th, and all after it: 1/79, 4/95 and 5/96 are 1.3, 4.2, 5.2%
    correct = ~np.isin(np.arange(1, 101), [60, 80, 90, *range(95, 101)])
    found = metrics.summary(-np.arange(100), correct)
    assert [found[f"coverage_at_{risk}%_risk"] for risk in (1, 2, 5)] == [0.59, 0.79, 0.95]


def test_calibration_error_weighs_the_gap_of_each_bin_by_its_images():
    # two bins: {0.2, 0.5} is right half the time at a mean of 0.35; {0.6, 1.0} always at 0.8
    error = metrics.calibration_error([0.2, 0.5, 0.6, 1.0], [0, 1, 1, 1], num_bins=2)
    assert error == pytest.approx(0.5 * 0.15 + 0.5 * 0.2)
    # one image to a bin, the middle one empty
    assert metrics.calibration_error([0.1, 0.9], [1, 0], num_bins=3) == pytest.approx(0.9)
    counts, mean_confidence, accuracy = metrics.calibration_bins([0.0, 0.9], [0, 1], num_bins=3)
    assert counts.tolist() == [1, 0, 1]
    np.testing.assert_allclose(mean_confidence, [0, np.nan, 0.9])
    np.testing.assert_allclose(accuracy, [0, np.nan, 1])


@pytest.mark.parametrize(("confidence", "brier"), [([-0.5, 1.0], 0.25 / 2), ([0.0, 2.0], 1 / 2)])
def test_scores_that_are_no_probabilities_have_no_log_loss_and_no_calibration_error(confidence, brier):
    figures = metrics.summary(confidence, [0, 1])
    assert np.isnan(figures["log_loss"]) and np.isnan(figures["calibration_error"])
    assert figures["brier"] == pytest.approx(brier)


@pytest.mark.parametrize(
    "confidence, correct, message",
    [
        ([0.5, np.nan], [1, 0], r"confidence\[1\] is NaN"),
        ([], [], "empty"),
        ([0.5, 0.5], [1], "one length"),
        ([[0.5]], [[1]], "one length"),
        ([0.5, 0.5], [1, 2], "0 and 1 only, got 2"),
    ],
)
@pytest.mark.parametrize("figure", ["auroc", "aurc", "e_aurc", "brier", "log_loss", "calibration_error", "summary"])
def test_bad_arrays_are_refused_with_the_reason(figure, confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, figure)(confidence, correct)


def test_real_outputs_give_the_known_figures(resnet20):
    probs, correct = resnet20
    top, entropy = probs[:, 0], (probs * np.log(np.maximum(probs, 1e-30))).sum(1)
    assert correct.mean() == 0.8103
    assert metrics.auroc(top, correct) == pytest.approx(0.8621, abs=5e-5)
    assert metrics.brier(top, correct) == pytest.approx(0.1394, abs=5e-5)
    assert metrics.auroc(entropy, correct) == pytest.approx(0.8636, abs=5e-5)
    assert metrics.aurc(entropy, correct) == pytest.approx(0.04894, abs=5e-6)


def test_aurc_of_real_outputs_with_a_thousand_ties_lies_between_their_best_and_worst_order(resnet20):
    """1,016 images have top probability 1.0; taken in file order the area is 0.04958, no merit of the table."""
    probs, correct = resnet20
    top = probs[:, 0]
    by_order = {
        name: (np.cumsum(~correct[order]) / np.arange(1, len(top) + 1)).mean()
        for name, order in {
            "file": np.argsort(-top, kind="stable"),
            "best": np.lexsort((~correct, -top)),
            "worst": np.lexsort((correct, -top)),
        }.items()
    }
    assert by_order["file"] == pytest.approx(0.04958, abs=5e-6)
    assert by_order["best"] < metrics.aurc(top, correct) < by_order["worst"]
    assert metrics.aurc(top, correct) == pytest.approx(0.04939, abs=5e-6)


def test_flops_are_printed_in_billions_from_a_tenth_on():
    assert [metrics.format_flops(flops) for flops in (0.1, 0.0999)] == ["0.1B", "99.9M"]
