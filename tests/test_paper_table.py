"""The paper's table from simulated outputs of eight models, and its rows by hand on a small cascade."""

import numpy as np
import pytest

from clcnet.cascade.curve import surest_steps, sweep
from clcnet.cascade.selection import Reference
from clcnet.report.paper_table import (
    PAPER_REFERENCES,
    accuracy_interval,
    cascade_name,
    display_name,
    merge_rows,
    results_rows,
)

NUM_IMAGES = 10_000
FOLDS = np.arange(NUM_IMAGES) % 5


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
    return results_rows(steps, models, FOLDS, PAPER_REFERENCES)


@pytest.fixture(scope="module")
def both_cascades(eight_models):
    return [paper_rows(eight_models, *pair) for pair in ((0, 4), (4, 7))]


def test_all_rows_of_the_papers_table_come_from_two_cascades(both_cascades):
    rows = merge_rows(both_cascades)
    singles = [row for row in rows if row.threshold is None]
    assert [(row.model, round(row.accuracy, 2), row.flops) for row in singles] == [
        (reference.name, reference.accuracy, reference.flops) for reference in PAPER_REFERENCES
    ]
    compared = {(row.model, row.reference, kind) for row in rows for kind in row.same}
    for cascade, references in (("CLCNet (S:B0+D:B4)", "123"), ("CLCNet (S:B4+D:B7)", "56")):
        for size in references:
            for kind in ("flops", "accuracy"):
                assert (cascade, f"EfficientNet-B{size}", kind) in compared
    assert ("CLCNet (S:B4+D:B7)", "EfficientNet-B7", "accuracy") in compared


def test_every_row_keeps_its_promise(both_cascades):
    references = {reference.name: reference for reference in PAPER_REFERENCES}
    for row in merge_rows(both_cascades):
        reference = references[row.reference]
        if row.threshold is None:
            continue
        assert row.deferral > 0
        if "flops" in row.same:
            assert 0.97 * reference.flops <= row.flops <= reference.flops * (1 + 1e-9)
        if row.same == ("accuracy",):
            assert reference.accuracy - 1e-9 <= row.accuracy <= reference.accuracy + 0.1
            assert row.saving == pytest.approx(reference.flops / row.flops)
        assert row.gain == pytest.approx(row.accuracy - reference.accuracy)
        assert row.accuracy_interval[0] < row.accuracy < row.accuracy_interval[1]
        assert abs(row.cross_fitted.accuracy - row.accuracy) < 0.5


def test_thresholds_printed_give_the_figures_printed(both_cascades, eight_models):
    for rows, pair in zip(both_cascades, ((0, 4), (4, 7)), strict=True):
        steps = steps_of_models(eight_models, *pair)
        for row in rows:
            if row.threshold is not None:
                curve = sweep(steps, [row.threshold])
                assert (curve.accuracy[0], curve.flops[0]) == pytest.approx((row.accuracy, row.flops))


def test_models_smaller_than_the_shallow_one_get_no_cascade_row(both_cascades):
    compared = {row.reference for row in both_cascades[1] if row.threshold is not None}
    assert compared == {"EfficientNet-B5", "EfficientNet-B6", "EfficientNet-B7"}


def test_measured_models_take_the_place_of_published_ones_of_the_same_name(both_cascades):
    rows = both_cascades[0]
    assert [row.model for row in rows].count("EfficientNet-B4") == 1
    measured = next(row for row in rows if row.model == "EfficientNet-B4")
    assert measured.accuracy_interval is not None
    published = next(row for row in rows if row.model == "EfficientNet-B5")
    assert published.accuracy_interval is None


def test_one_row_serves_for_both_where_accuracy_is_equal_at_equal_flops():
    # deferral 0, 1/4, 3/4, 1: accuracy 50, 75, 50, 50; FLOPs 1, 3.5, 8.5, 11
    steps = surest_steps([[0.9, 0.2, 0.5, 0.5], [0.1, 0.8, 0.4, 0.6]], [[1, 0, 0, 1], [0, 1, 1, 0]], [1, 10])
    rows = results_rows(steps, ["s", "d"], np.array([0, 1, 2, 3]), [Reference("r", 74.95, 3.6)])
    assert [(row.model, row.same) for row in rows[:3]] == [
        ("s", ()),
        ("r", ()),
        ("CLCNet (S:s+D:d)", ("accuracy", "flops")),
    ]
    assert (rows[2].threshold, rows[2].accuracy, rows[2].flops, rows[2].deferral) == (0.5, 75, 3.5, 0.25)
    # the deep model has the shallow one's accuracy, so the cascade has only a row at its FLOPs
    assert [(row.model, row.same, row.accuracy) for row in rows[3:]] == [
        ("d", (), 50),
        ("CLCNet (S:s+D:d)", ("accuracy", "flops"), 50),
    ]


def test_gain_is_paired_with_a_reference_measured_on_the_same_images():
    random = np.random.default_rng(0)
    right = random.random(1000) < 0.8
    steps = surest_steps([random.random(1000), np.full(1000, 2.0)], [right, right], [1, 2])
    rows = results_rows(steps, ["s", "d"], FOLDS[:1000], [Reference("published", steps.own_accuracy[0] - 2, 1.5)])
    by_reference = {row.reference: row for row in rows if row.threshold is not None}
    assert by_reference["d"].gain_interval == (0, 0)
    low, high = by_reference["published"].gain_interval
    assert low < 2 < high and high - low > 3


def test_names_are_shortened_as_in_the_paper():
    assert display_name("tf_efficientnet_b4.aa_in1k") == "EfficientNet-B4"
    assert display_name("efficientnet_b0") == "EfficientNet-B0"
    assert display_name("local-dir:some/folder/deep") == "deep"
    assert display_name("vit_base_patch16_224.augreg_in1k") == "vit_base_patch16_224.augreg_in1k"
    assert cascade_name(["tf_efficientnet_b0.aa_in1k", "tf_efficientnet_b4"]) == "CLCNet (S:B0+D:B4)"
    assert cascade_name(["local-dir:x/shallow/", "resnet56"]) == "CLCNet (S:shallow+D:resnet56)"
    assert cascade_name(["efficientnet_b0", "efficientnet_b2", "resnet56"]) == "CLCNet (B0+B2+resnet56)"


def test_accuracy_interval_is_exact():
    assert accuracy_interval(80.0, 10) == pytest.approx((44.39, 97.48), abs=0.01)
