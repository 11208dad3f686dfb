"""What holds for any input: tables round trip, folds and splits partition, the order of the disk does not matter."""

import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs, match_rows
from clcnet.network.training import fold_splits, split_rows

file_names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12)


@st.composite
def any_outputs(draw: st.DrawFn) -> Outputs:
    """Any outputs that a classifier could give: ties, zeros, certainty and near-certainty included."""
    num_rows, num_classes = draw(st.integers(1, 6)), draw(st.integers(2, 7))
    weight = st.one_of(st.sampled_from([0.0, 1.0, 1e-30]), st.floats(0, 1, width=32))
    weights = draw(
        st.lists(st.lists(weight, min_size=num_classes, max_size=num_classes), min_size=num_rows, max_size=num_rows)
    )
    rows = np.array(weights) + np.eye(num_rows, num_classes) * 1e-3 + 1e-9
    names = draw(st.lists(file_names, min_size=num_rows, max_size=num_rows))
    return Outputs.from_probs(rows / rows.sum(1, keepdims=True), names, np.zeros(num_rows, np.int64))


@settings(max_examples=60)
@given(any_outputs(), st.sampled_from(["t.csv", "t.parquet"]))
def test_any_outputs_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, outputs: Outputs, name: str
) -> None:
    path = tmp_path_factory.mktemp("table") / name
    outputs.save(path)
    read = Outputs.load(path)
    assert read.names == outputs.names
    assert read.sorted_probs.tobytes() == outputs.sorted_probs.tobytes()
    assert read.correct.tolist() == outputs.correct.tolist()
    if name == "t.parquet":
        assert read.classes.tobytes() == outputs.classes.tobytes() and read.classes.dtype == outputs.classes.dtype
        assert read.targets.tolist() == outputs.targets.tolist()
    again = path.with_name(f"again_{name}")
    read.save(again)
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
        assert len(split.train) + len(split.validation) == (folds != fold).sum()
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
    outputs = Outputs([images.names[index] for index in order], probs)
    assert match_rows(outputs, images).tolist() == order
