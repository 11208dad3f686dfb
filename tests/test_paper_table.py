"""The paper's table from simulated outputs of eight models, and its rows by hand on a small cascade."""

import argparse
import re
from pathlib import Path

import numpy as np
import plain
import pytest

from clcnet.cascade.curve import surest_steps, sweep
from clcnet.cascade.selection import Reference
from clcnet.report.tables import (
    PAPER_REFERENCES,
    _gain_interval,
    accuracy_interval,
    cascade_name,
    display_name,
    distinct_names,
    merge_frames,
    parse_references,
    performance_frame,
    results_frame,
)

NUM_IMAGES = 10_000
FOLDS = np.arange(NUM_IMAGES) % 5


def test_the_papers_models_are_those_of_its_table():
    text = (Path(__file__).parent.parent / "benchmarks" / "results" / "paper.md").read_text()
    rows = re.findall(r"\| (EfficientNet-B\d) +\| ([\d.]+)% +\| -- +\| ([\d.]+)B", text)
    assert parse_references("paper") == [Reference(name, float(percent), float(flops)) for name, percent, flops in rows]


def test_references_are_a_name_a_percentage_and_billions():
    assert parse_references("net:100:0.5") == [Reference("net", 100, 0.5)]
    assert parse_references("local-dir:net:0.5:1.5") == [Reference("local-dir:net", 0.5, 1.5)]
    for wrong in ("net", ":70:1", "net:0:1", "net:100.5:1", "net:70:0", "net:70:inf", "net:nan:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is neither `paper` nor NAME:PERCENT:BILLIONS"):
            parse_references(wrong)


@pytest.fixture(scope="module")
def eight_models():
    """Confidences, right answers and FLOPs of EfficientNet-B0 to B7 with exactly the paper's accuracies and FLOPs.

    An image has a hardness and every model some noise of its own: models mostly fail on the same images, and better
    ones are also surer.
    """
    random = np.random.default_rng(0)
    hardness = random.random(NUM_IMAGES)
    found = []
    for reference in PAPER_REFERENCES:
        strain = hardness + random.normal(0, 0.08, NUM_IMAGES)
        num_right = round(reference.accuracy * NUM_IMAGES / 100)
        limit = np.sort(strain)[num_right]
        confidence = limit - strain + random.normal(0, 0.06, NUM_IMAGES)
        found.append((confidence, strain < limit, reference.flops))
        assert 100 * found[-1][1].mean() == pytest.approx(reference.accuracy)
    return found


def steps_of_models(eight_models, *numbers):
    return surest_steps(*zip(*(eight_models[number] for number in numbers), strict=True))


def paper_rows(eight_models, shallow, deep):
    steps = steps_of_models(eight_models, shallow, deep)
    models = [f"tf_efficientnet_b{size}" for size in (shallow, deep)]
    return results_frame(steps, models, FOLDS, PAPER_REFERENCES)


@pytest.fixture(scope="module")
def both_cascades(eight_models):
    return [paper_rows(eight_models, *pair) for pair in ((0, 4), (4, 7))]


def cascades_of(frame):
    return list(frame[frame.threshold.notna()].itertuples())


def test_all_rows_of_the_papers_table_come_from_two_cascades(both_cascades):
    frame = merge_frames(both_cascades)
    singles = frame[frame.threshold.isna()]
    assert list(zip(singles.model, singles.accuracy.round(2), singles.FLOPs, strict=True)) == [
        (reference.name, reference.accuracy, reference.flops) for reference in PAPER_REFERENCES
    ]
    place = {row.model: row.Index for row in singles.itertuples()}
    after = [row.Index for row in cascades_of(frame)]
    assert [max(at for at in place.values() if at < index) for index in after] == [
        place[row.reference] for row in cascades_of(frame)
    ]
    compared = {(row.model, row.reference, kind) for row in cascades_of(frame) for kind in row.same.split("+")}
    for cascade, references in (("CLCNet (S:B0+D:B4)", "123"), ("CLCNet (S:B4+D:B7)", "56")):
        for size in references:
            for kind in ("flops", "accuracy"):
                assert (cascade, f"EfficientNet-B{size}", kind) in compared
    assert ("CLCNet (S:B4+D:B7)", "EfficientNet-B7", "accuracy") in compared


def test_models_smaller_than_the_shallow_one_get_no_cascade_row(both_cascades):
    compared = {row.reference for row in cascades_of(both_cascades[1])}
    assert compared == {"EfficientNet-B5", "EfficientNet-B6", "EfficientNet-B7"}


def test_measured_models_take_the_place_of_published_ones_of_the_same_name(both_cascades):
    for frame in (both_cascades[0], merge_frames(both_cascades[::-1])):
        singles = frame[frame.threshold.isna()].set_index("model")
        assert singles.index.is_unique and not np.isnan(singles.loc["EfficientNet-B0", "accuracy_low"])
        assert not np.isnan(singles.loc["EfficientNet-B4", "accuracy_low"])
        assert np.isnan(singles.loc["EfficientNet-B5", "accuracy_low"])


def test_one_row_serves_for_both_where_accuracy_is_equal_at_equal_flops():
    # deferral 0, 1/4, 3/4, 1: accuracy 50, 75, 50, 50; FLOPs 1, 3.5, 8.5, 11
    steps = surest_steps([[0.9, 0.2, 0.5, 0.5], [0.1, 0.8, 0.4, 0.6]], [[1, 0, 0, 1], [0, 1, 1, 0]], [1, 10])
    frame = results_frame(steps, ["s", "d"], np.array([0, 1, 2, 3]), [Reference("r", 74.95, 3.6)])
    name, both = "CLCNet (S:s+D:d)", "accuracy+flops"
    # the deep model has the shallow one's accuracy, so the cascade has only a row at its FLOPs
    expected = [("s", "", 50), ("r", "", 74.95), (name, both, 75), ("d", "", 50), (name, both, 50)]
    assert list(zip(frame.model, frame.same, frame.accuracy, strict=True)) == expected
    assert frame.loc[2, ["threshold", "accuracy", "FLOPs", "deferral"]].tolist() == [0.5, 75, 3.5, 0.25]
    frame = results_frame(steps, ["s", "d"], np.array([0, 1, 2, 3]), [Reference("r", 74.85, 3.6)])
    assert frame[frame.reference == "r"].same.tolist() == ["", "flops", "accuracy"]  # 0.15 points are two rows


def test_every_figure_of_the_table_is_what_a_plain_implementation_gives():
    random = np.random.default_rng(1)
    sure = np.round(random.random((2, 60)), 2)
    right, deep_right = (random.random(60) < 0.2 + 0.7 * each for each in (sure[0], 0.3 + sure[1]))
    two, folds = plain.Two(*sure, right, deep_right, (1.0, 4.0)), np.arange(60) % 5
    published = {"p": (100 * right.mean() + 3, 2.0), "q": (100.0, 3.0), "r": (1.0, 0.5), "as all": (99.0, 5.0)}
    published["as the best"] = two.curve()[2].max(), 1.5  # which some folds do not reach
    references = [Reference(name, *figures) for name, figures in published.items()]
    steps = surest_steps(sure, [right, deep_right], [1, 4])
    frame = results_frame(steps, ["s", "d"], folds, references)
    rows = frame.replace({np.nan: None}).to_dict("records")
    printed = plain.check_results(rows, two, folds, ("s", "d"), published)
    assert {row["same"] for row in rows} >= {"", "flops", "accuracy"} and len(printed) == len(rows)
    performance = performance_frame(sweep(steps), [3.0, 5.0])
    plain.check_performance(performance.to_dict("records"), two, two.curve()[0])
    assert performance.milliseconds.tolist() == pytest.approx(3 + 5 * two.curve()[1])


def test_gain_is_paired_with_a_reference_measured_on_the_same_images():
    random = np.random.default_rng(0)
    right = random.random(1000) < 0.8
    steps = surest_steps([random.random(1000), np.full(1000, 2.0)], [right, right], [1, 2])
    frame = results_frame(steps, ["s", "d"], FOLDS[:1000], [Reference("published", steps.own_accuracy[0] - 2, 1.5)])
    every = surest_steps([[0.1] * 9, [0.2] * 9], [[False] * 9, [True] * 9], [1, 2])
    assert _gain_interval(every, 0.5, Reference("s", 0.0, 1.0, 0), seed=0) == (100, 100)
    by_reference = {row.reference: row for row in cascades_of(frame)}
    assert (by_reference["d"].gain_low, by_reference["d"].gain_high) == (0, 0)
    low, high = by_reference["published"].gain_low, by_reference["published"].gain_high
    assert low < 2 < high and high - low > 3


def test_names_are_shortened_as_in_the_paper():
    assert display_name("tf_efficientnet_b4.aa_in1k") == "EfficientNet-B4"
    assert display_name("efficientnet_b0") == "EfficientNet-B0"
    assert display_name("local-dir:some/folder/a:deep") == "a:deep"
    assert display_name("vit_base_patch16_224.augreg_in1k") == "vit_base_patch16_224.augreg_in1k"
    assert cascade_name(["tf_efficientnet_b0.aa_in1k", "tf_efficientnet_b4"]) == "CLCNet (S:B0+D:B4)"
    assert cascade_name(["local-dir:x/shallow/", "resnet56"]) == "CLCNet (S:shallow+D:resnet56)"
    assert cascade_name(["efficientnet_b0", "efficientnet_b2", "resnet56"]) == "CLCNet (B0+B2+resnet56)"
    models = ["local-dir:a/x/deep", "local-dir:b/x/deep", "local-dir:b/x/deep", "local-dir:c/other"]
    assert distinct_names(models) == ["a/x/deep", "b/x/deep", "b/x/deep (2)", "other"]
    assert distinct_names(["local-dir:y/a:b/deep", "local-dir:y/b/deep"]) == ["a:b/deep", "b/deep"]
    assert distinct_names(["resnet56", "resnet56"]) == ["resnet56", "resnet56 (2)"]


def test_accuracy_interval_is_that_of_the_number_of_right_answers():
    assert accuracy_interval(80.0, 10) == pytest.approx((44.39, 97.48), abs=0.01)
    for right in range(100):  # of 99, whose percentages are no decimals
        assert accuracy_interval(100 * right / 99, 99) == pytest.approx(tuple(plain.exact(right, 99)))
