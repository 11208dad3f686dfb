"""What holds for any input: tables round trip, folds and splits partition, the order of the disk does not matter."""

import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clcnet.cascade.curve import Stage, sweep
from clcnet.data.images import list_images
from clcnet.data.table import Table, match_rows, read_table, sort_probs, write_table
from clcnet.network.training import fold_splits, split_rows

file_names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Any table that a classifier could give: ties, zeros, certainty and near-certainty included."""
    num_rows, num_classes = draw(st.integers(1, 6)), draw(st.integers(2, 7))
    weight = st.one_of(st.sampled_from([0.0, 1.0, 1e-30]), st.floats(0, 1, width=32))
    weights = draw(
        st.lists(st.lists(weight, min_size=num_classes, max_size=num_classes), min_size=num_rows, max_size=num_rows)
    )
    rows = np.array(weights) + np.eye(num_rows, num_classes) * 1e-3 + 1e-9
    sorted_probs, correct, _ = sort_probs(rows / rows.sum(1, keepdims=True), np.zeros(num_rows, np.int64))
    names = draw(st.lists(file_names, min_size=num_rows, max_size=num_rows))
    return Table(names, sorted_probs, correct, np.zeros(num_rows, np.int64))


@settings(max_examples=60)
@given(tables(), st.sampled_from(["t.csv", "t.parquet"]))
def test_any_table_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, table: Table, name: str) -> None:
    path = tmp_path_factory.mktemp("table") / name
    write_table(table, path)
    read = read_table(path)
    assert read.names == table.names
    assert read.sorted_probs.tobytes() == table.sorted_probs.tobytes()
    assert read.correct.tolist() == table.correct.tolist()
    again = path.with_name(f"again_{name}")
    write_table(read, again)
    assert again.read_bytes() == path.read_bytes()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_folds_do_not_depend_on_the_order_in_which_the_disk_lists_its_files(
    tmp_path_factory: pytest.TempPathFactory, classes: list[int], random
) -> None:
    root = tmp_path_factory.mktemp("images")
    for index, label in enumerate(classes):
        (root / f"class{label}").mkdir(exist_ok=True)
        (root / f"class{label}" / f"{index}.png").touch()
    walk = os.walk

    def shuffled(*arguments: object, **options: object):
        for folder, subfolders, files in walk(*arguments, **options):
            random.shuffle(subfolders)
            yield folder, subfolders, random.sample(files, len(files))

    expected = list_images(root)
    with mock.patch("clcnet.data.images.os.walk", shuffled):
        images = list_images(root)
    assert images.names == expected.names and images.targets.tolist() == expected.targets.tolist()
    assert images.folds.tolist() == expected.folds.tolist()
    for of_fold in (images.folds, *(images.folds[images.targets == target] for target in set(images.targets))):
        sizes = np.bincount(of_fold, minlength=5)
        assert sizes.sum() == len(of_fold) and sizes.max() - sizes.min() <= 1


groups_of_rows = st.lists(st.integers(0, 60), min_size=25, max_size=120).filter(lambda groups: len(set(groups)) >= 15)


@given(groups_of_rows, st.integers(0, 2**32 - 1))
def test_a_split_has_every_row_once_and_tears_no_image_apart(groups: list[int], seed: int) -> None:
    split = split_rows(np.array(groups), seed)
    parts = [split.train, split.validation, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    images = [set(np.array(groups)[part]) for part in parts]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    again = split_rows(np.array(groups), seed)
    assert [part.tolist() for part in parts] == [part.tolist() for part in (again.train, again.validation, again.test)]


@given(groups_of_rows, st.integers(0, 1000))
def test_no_network_trains_or_stops_on_the_fold_that_it_will_judge(groups: list[int], seed: int) -> None:
    groups_array = np.array(groups)
    folds = groups_array % 5  # all rows of an image lie in its fold
    if len(set(folds.tolist())) < 5:
        return
    splits = fold_splits(folds, groups_array, seed)
    assert sorted(np.concatenate([split.test for split in splits]).tolist()) == list(range(len(groups)))
    for fold, split in enumerate(splits):
        assert set(folds[split.test]) == {fold}
        assert fold not in folds[split.train] and fold not in folds[split.validation]
        assert not set(groups_array[split.train]) & set(groups_array[split.validation])


@settings(max_examples=30)
@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_rows_in_any_order_find_their_images(tmp_path_factory: pytest.TempPathFactory, count: int, random) -> None:
    root = tmp_path_factory.mktemp("images")
    for index in range(count):
        path = root / f"c{index % 3}" / f"{index // 2}.png"  # some bare names are taken twice
        path.parent.mkdir(exist_ok=True)
        path.touch()
    images = list_images(root)
    order = random.sample(range(len(images)), len(images))
    rows = len(order)
    probs = np.full((rows, 2), 0.5, np.float32)
    table = Table([images.names[index] for index in order], probs, np.ones(rows, bool), np.zeros(rows, np.int64))
    assert match_rows(table, images).tolist() == order


scores = st.lists(st.tuples(st.floats(-5, 5), st.booleans(), st.floats(-5, 5), st.booleans()), min_size=1, max_size=40)


@given(scores, st.floats(0, 100), st.floats(0, 100))
def test_a_sweep_defers_ever_more_and_its_ends_are_the_single_models(
    rows: list[tuple[float, bool, float, bool]], shallow_flops: float, deep_flops: float
) -> None:
    columns = list(zip(*rows, strict=True))
    stages = [Stage(columns[0], columns[1], shallow_flops), Stage(columns[2], columns[3], deep_flops)]
    curve = sweep(stages, keep="last")
    assert (np.diff(curve.deferral) > 0).all() and (np.diff(curve.flops) >= 0).all()
    assert (curve.deferral[0], curve.deferral[-1]) == (0, 1)
    assert curve.accuracy[0] == pytest.approx(stages[0].accuracy)
    assert curve.accuracy[-1] == pytest.approx(stages[1].accuracy)
    assert curve.flops[0] == pytest.approx(shallow_flops)
    assert curve.flops[-1] == pytest.approx(shallow_flops + deep_flops)
