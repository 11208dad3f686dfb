"""The two training scripts as a user calls them: what they write, what they print, what they refuse."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import CLASSES, make_images
from test_training import made_table

import train_custom_data
import train_imagenet_5fold_cv
from clcnet import cli, metrics
from clcnet.data.images import balanced_folds
from clcnet.data.outputs import Outputs
from clcnet.network.model import CLCNet
from clcnet.network.weights import find_fold_weights

QUICK = ["--max-epochs", "2", "--batch-size", "32", "--virtual-batch-size", "16", "--device", "cpu"]


def call(script: Any, *words: str | Path) -> dict[str, Any]:
    return script.main(script.get_args_parser().parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def fold_input(tmp_path_factory) -> tuple[Path, Path, Outputs]:
    """An image folder in five parts and a table of its images."""
    root = tmp_path_factory.mktemp("folds")
    make_images(root / "images", images_per_class=50, five_parts=True, size=4)
    names = [f"{name}_{index:04d}.png" for name in CLASSES for index in range(50)]
    probs, correct = made_table(150, num_classes=3)
    table = Outputs(names, probs, correct=correct)
    table.save(root / "table.csv")
    return root / "images", root / "table.csv", table


@pytest.fixture(scope="module")
def trained(fold_input) -> dict[str, Any]:
    """What training by folds with a log returned; no test changes its files."""
    folder = fold_input[1].parent
    return train_folds(fold_input, folder / "weights", "--log", folder / "log.jsonl")


def custom_input(path: Path, num_rows: int) -> Path:
    probs, correct = made_table(num_rows, num_classes=4)
    Outputs([f"{index}.png" for index in range(num_rows)], probs, correct=correct).save(path)
    return path


def train_folds(fold_input: tuple[Path, Path, Outputs], weights: Path, *more: str | Path) -> dict[str, Any]:
    folder, table, _ = fold_input
    words = ("--imagenet-split", folder, "--cls-output", table, "--weight-save", weights, *QUICK, *more)
    return call(train_imagenet_5fold_cv, *words)


def test_five_weights_and_the_split_are_written_and_know_their_folds(fold_input, trained):
    table = fold_input[2]
    paths = find_fold_weights(trained["split"].parent)
    assert paths == trained["weights"]
    folds = np.array([int(name[4:8]) % 5 for name in table.names])  # as image_folder deals them out
    scores = np.empty(len(table), dtype=np.float32)
    for fold, path in enumerate(paths):
        model = CLCNet.load(path)
        assert model.metadata["fold"] == fold + 1
        assert model.metadata["training_folds"] == [other for other in range(1, 6) if other != fold + 1]
        assert model.metadata["training_arguments"]["seed"] == 42
        scores[folds == fold] = model.predict(table.sorted_probs[folds == fold])
        own = metrics.auroc(scores[folds == fold], table.correct[folds == fold])
        assert model.metadata["test"]["auroc"] == pytest.approx(own)
    np.testing.assert_array_equal(scores, trained["scores"])
    with open(trained["split"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == table.names
    assert [int(row["fold"]) - 1 for row in rows] == list(folds)
    assert {row["run"] for row in rows} == {CLCNet.load(path).metadata["run"] for path in paths} != {None}
    for row in rows:
        assert row["fold"] not in row["validates"].split()


def test_without_an_image_folder_the_folds_are_those_of_the_tables_images(fold_input, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "IMAGENET_SPLITS", tmp_path / "nowhere")
    table = fold_input[2]
    targets = np.arange(150) // 50
    tables = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in tables:
        Outputs(table.names, table.sorted_probs, targets=targets, correct=table.correct).save(path)
    result = call(train_imagenet_5fold_cv, "--cls-output", *tables, "--weight-save", tmp_path / "weights", *QUICK)
    assert "no image folder: the images of" in capsys.readouterr().out
    with open(result["split"], newline="") as file:
        folds = [int(row["fold"]) - 1 for row in csv.DictReader(file)]
    assert folds == 2 * balanced_folds(table.names, targets).tolist()


@pytest.mark.parametrize("script", [train_imagenet_5fold_cv, train_custom_data])
def test_the_same_command_gives_the_same_files_and_another_seed_others(fold_input, tmp_path, script):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        folds = ["--imagenet-split", fold_input[0]] if script == train_imagenet_5fold_cv else []
        call(script, "--cls-output", fold_input[1], "--weight-save", tmp_path / name, "--seed", seed, *QUICK, *folds)
    names = sorted(path.name for path in (tmp_path / "a").glob("CLCNet_*"))
    assert len(names) == (6 if script == train_imagenet_5fold_cv else 2)
    for name in names:
        same, other = ((tmp_path / folder / name).read_bytes() for folder in "bc")
        assert (tmp_path / "a" / name).read_bytes() == same != other


def test_test_images_of_a_fold_change_nothing_in_its_weights(fold_input, trained, tmp_path):
    folder, _, table = fold_input
    held_out = np.array([int(name[4:8]) % 5 == 2 for name in table.names])  # split_part_3
    changed = Outputs(table.names, table.sorted_probs.copy(), correct=table.correct ^ held_out)
    changed.sorted_probs[held_out] = changed.sorted_probs[held_out][::-1]
    changed.save(tmp_path / "changed.csv")
    results = trained, train_folds((folder, tmp_path / "changed.csv", changed), tmp_path)
    rows, same = table.sorted_probs, []
    for fold, paths in enumerate(zip(*(result["weights"] for result in results), strict=True), start=1):
        before, after = map(CLCNet.load, paths)
        same.append(np.array_equal(before.predict(rows), after.predict(rows)))
        if fold == 3:
            assert before.calibration == after.calibration
            assert before.metadata["validation"] == after.metadata["validation"]
    assert same == [False, False, True, False, False]


def test_the_log_has_a_line_for_every_epoch_and_network(fold_input, trained):
    lines = [json.loads(line) for line in fold_input[1].with_name("log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["network"]) for line in lines] == [(e, k) for e in (1, 2) for k in range(1, 6)]
    assert all(0 < line["mse"] < 2 and line["loss"] > 0 for line in lines)
    assert all(line["auroc"] is None or 0 <= line["auroc"] <= 1 for line in lines)  # null where a label is missing


def test_released_weights_in_the_folder_are_not_left_beside_new_ones(fold_input, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "CLCNet_imagenet_split_2(MSE_0.1).zip").touch()
    with pytest.raises(ValueError, match="split_2"):
        train_folds(fold_input, tmp_path / "weights")


# ------------------------------------------------------------------------------------------------------- custom data


def test_custom_training_writes_one_weight_and_its_split_by_the_recipe_that_is_asked_for(tmp_path):
    table = custom_input(tmp_path / "table.csv", 200)
    words = ["--cls-output", table, "--weight-save", tmp_path / "weights", *QUICK, "--recipe", "released"]
    result = call(train_custom_data, *words)
    assert CLCNet.load(result["weights"]).calibration is None
    with open(result["split"], newline="") as file:
        parts = Counter(row["part"] for row in csv.DictReader(file))
    assert parts == {"train": 160, "validation": 20, "test": 20}
    assert result["threshold"] is None


def test_tables_without_a_common_image_suggest_nothing(tmp_path, capsys):
    tables = [custom_input(tmp_path / f"{name}.csv", 40) for name in ("a", "b")]
    tables[1].write_text("".join(f"other{line}" for line in tables[1].read_text().splitlines(keepends=True)))
    result = call(train_custom_data, "--cls-output", *tables, "--weight-save", tmp_path / "weights", *QUICK)
    assert result["threshold"] is None
    assert "no threshold suggested" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_custom_data, train_imagenet_5fold_cv])
def test_defaults_are_the_released_ones(script):
    args = script.get_args_parser().parse_args([])
    assert (args.max_epochs, args.batch_size, args.virtual_batch_size, args.patience) == (200, 256, 128, 50)
    assert (args.seed, args.recipe, args.weight_save.name) == (42, "default", "weights")
    assert [path.name for path in args.cls_output] == ["effb4_output_ds_for_CLCNet.csv"]
