"""The two training scripts as a user calls them: what they write, what they print, what they refuse."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


@pytest.fixture
def fold_input(image_folder, tmp_path) -> tuple[Path, Path, Outputs]:
    """An image folder in five parts and a table of its images."""
    folder = image_folder(images_per_class=50, five_parts=True, size=4)
    names = [f"{name}_{index:04d}.png" for name in ("ant", "bee", "cat") for index in range(50)]
    probs, correct = made_table(150, num_classes=3)
    table = Outputs(names, probs, correct=correct)
    table.save(tmp_path / "table.csv")
    return folder, tmp_path / "table.csv", table


def custom_input(path: Path, num_rows: int, accuracy_shift: int = 0) -> Path:
    probs, correct = made_table(num_rows, num_classes=4, seed=accuracy_shift)
    correct[:: accuracy_shift + 10] |= True
    names = [f"{index}.png" for index in range(num_rows)]
    Outputs(names, probs, correct=correct).save(path)
    return path


def train_folds(fold_input: tuple[Path, Path, Outputs], weights: Path, *more: str | Path) -> dict[str, Any]:
    folder, table, _ = fold_input
    words = ("--imagenet-split", folder, "--cls-output", table, "--weight-save", weights, *QUICK, *more)
    return call(train_imagenet_5fold_cv, *words)


def test_five_weights_and_the_split_are_written_and_know_their_folds(fold_input, tmp_path):
    result = train_folds(fold_input, tmp_path / "weights")
    table = fold_input[2]
    paths = find_fold_weights(tmp_path / "weights")
    assert paths == result["weights"]
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
    np.testing.assert_array_equal(scores, result["scores"])
    with open(result["split"], newline="") as file:
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
    for name in ("a", "b"):
        Outputs(table.names, table.sorted_probs, targets=targets, correct=table.correct).save(
            tmp_path / f"{name}.parquet"
        )
    flags = ["--weight-save", tmp_path / "weights", *QUICK]
    call(train_imagenet_5fold_cv, "--cls-output", tmp_path / "a.parquet", tmp_path / "b.parquet", *flags)
    assert "no image folder: the images of" in capsys.readouterr().out
    with open(tmp_path / "weights" / "CLCNet_imagenet_split.csv", newline="") as file:
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


def test_test_images_of_a_fold_change_nothing_in_its_weights(fold_input, tmp_path):
    folder, path, table = fold_input
    train_folds(fold_input, tmp_path / "before")
    held_out = np.array([int(name[4:8]) % 5 == 2 for name in table.names])  # split_part_3
    changed = Outputs(table.names, table.sorted_probs.copy(), correct=table.correct ^ held_out)
    changed.sorted_probs[held_out] = changed.sorted_probs[held_out][::-1]
    changed.save(path)
    train_folds(fold_input, tmp_path / "after")
    rows = table.sorted_probs
    same = []
    for fold in range(1, 6):
        name = f"CLCNet_imagenet_split_{fold}.zip"
        before, after = (CLCNet.load(tmp_path / when / name) for when in ("before", "after"))
        same.append(np.array_equal(before.predict(rows), after.predict(rows)))
        if fold == 3:
            assert before.calibration == after.calibration
            assert before.metadata["validation"] == after.metadata["validation"]
    assert same == [False, False, True, False, False]


def test_the_log_has_a_line_for_every_epoch_and_network(fold_input, tmp_path):
    train_folds(fold_input, tmp_path / "weights", "--log", tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["network"]) for line in lines] == [(e, k) for e in (1, 2) for k in range(1, 6)]
    assert all(0 < line["mse"] < 2 and line["loss"] > 0 for line in lines)
    assert all(line["auroc"] is None or 0 <= line["auroc"] <= 1 for line in lines)  # null where a label is missing


def test_the_released_recipe_has_no_calibration(fold_input, tmp_path):
    train_folds(fold_input, tmp_path / "weights", "--recipe", "released")
    assert CLCNet.load(tmp_path / "weights" / "CLCNet_imagenet_split_1.zip").calibration is None


def test_released_weights_in_the_folder_are_not_left_beside_new_ones(fold_input, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "CLCNet_imagenet_split_2(MSE_0.1).zip").touch()
    with pytest.raises(ValueError, match="split_2"):
        train_folds(fold_input, tmp_path / "weights")


# ------------------------------------------------------------------------------------------------------- custom data


def test_custom_training_writes_one_weight_and_its_split(tmp_path):
    table = custom_input(tmp_path / "table.csv", 200)
    result = call(train_custom_data, "--cls-output", table, "--weight-save", tmp_path / "weights", *QUICK)
    with open(tmp_path / "weights" / "CLCNet_custom_data_split.csv", newline="") as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    assert {part: parts.count(part) for part in set(parts)} == {"train": 160, "validation": 20, "test": 20}
    assert result["threshold"] is None


def test_tables_without_a_common_image_suggest_nothing(tmp_path, capsys):
    tables = [custom_input(tmp_path / f"{name}.csv", 40) for name in ("a", "b")]
    tables[1].write_text("".join(f"other{line}" for line in tables[1].read_text().splitlines(keepends=True)))
    result = call(train_custom_data, "--cls-output", *tables, "--weight-save", tmp_path / "weights", *QUICK)
    assert result["threshold"] is None
    assert "no threshold suggested" in capsys.readouterr().out


def test_tiny_tables_are_refused(tmp_path):
    tiny = custom_input(tmp_path / "tiny.csv", 3)
    with pytest.raises(ValueError, match="3 images cannot be cut"):
        call(train_custom_data, "--cls-output", tiny, "--weight-save", tmp_path / "w", *QUICK)
    assert not list((tmp_path / "w").glob("*.zip"))


@pytest.mark.parametrize("script", [train_custom_data, train_imagenet_5fold_cv])
def test_defaults_are_the_released_ones(script):
    args = script.get_args_parser().parse_args([])
    assert (args.max_epochs, args.batch_size, args.virtual_batch_size, args.patience) == (200, 256, 128, 50)
    assert (args.seed, args.recipe, args.weight_save.name) == (42, "default", "weights")
    assert [path.name for path in args.cls_output] == ["effb4_output_ds_for_CLCNet.csv"]
