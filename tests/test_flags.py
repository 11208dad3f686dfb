"""Every flag of every script given a value that cannot be meant: one line that names the flag, exit code 2."""

import importlib
import re
from pathlib import Path

import pytest
import scripts
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, SCRIPTS, TRAIN_CUSTOM, TRAIN_FOLDS, Workshop, refusal

from clcnet import cli

ON_IMAGES = (GENERATE, EVALUATE_FOLDS, EVALUATE_CUSTOM)
TRAINING = (TRAIN_FOLDS, TRAIN_CUSTOM)
CASCADES = (EVALUATE_FOLDS, EVALUATE_CUSTOM)


def flags_of(script: str) -> list[str]:
    """All flags but --help, as the help spells them."""
    text = importlib.import_module(script).get_args_parser().format_help()
    lines = re.findall(r"^  (-.*?)(?:  |$)", text, flags=re.MULTILINE)
    return [flag for line in lines for flag in re.findall(r"--[\w-]+", line) if flag != "--help"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_with_a_letter_lost_doubled_or_swapped_is_recognised(script: str) -> None:
    required = ["--custom-data", "photos"] if script == EVALUATE_CUSTOM else []
    known = {flag.replace("_", "-").lower() for flag in flags_of(script)}
    for flag in flags_of(script):
        middle = len(flag) // 2 + 1
        lost = flag[:middle] + flag[middle + 1 :]
        doubled = flag[:middle] + flag[middle] + flag[middle:]
        swapped = flag[: middle - 1] + flag[middle] + flag[middle - 1] + flag[middle + 1 :]
        for misspelled in {lost, doubled, swapped}:
            if misspelled.replace("_", "-").lower() not in known:
                finished = scripts.run(script, misspelled, "1", *required)
                assert f"unknown flag {misspelled}; did you mean --" in refusal(finished)


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_may_be_written_with_hyphens_underscores_and_small_letters(script: str) -> None:
    required = ["--custom-data", "photos"] if script == EVALUATE_CUSTOM else []
    for flag in flags_of(script):
        for spelling in (flag.replace("-", "_").replace("__", "--", 1), flag.replace("_", "-"), flag.lower()):
            line = refusal(scripts.run(script, *required, spelling, "--no-such-flag"))
            assert re.search(rf"unknown flag --no-such-flag|argument .*{flag}\b.*: expected", line), line


BAD_VALUES = {
    "--batch-size": (SCRIPTS, ["0", "-1", "1.5", "many", "9" * 30]),
    "--workers": (ON_IMAGES, ["-1", "2.5", "all", "1000000"]),
    "--seed": (SCRIPTS, ["-1", "x", "9" * 30]),
    "--device": (SCRIPTS, ["quantum", "cuda:99", "", "cpu:cpu"]),
    "--img-size": (ON_IMAGES, ["0", "-32", "big", "1000000"]),
    "--crop-pct": (ON_IMAGES, ["0", "-0.5", "1.5", "nan", "1e-9"]),
    "--crop-mode": (ON_IMAGES, ["middle"]),
    "--interpolation": (ON_IMAGES, ["magic"]),
    "--amp": (ON_IMAGES, ["float8"]),
    "--num_classes": (ON_IMAGES, ["0", "1", "-3", "three"]),
    "--threshold": (CASCADES, ["nan", "half", "0,5"]),
    "--shallow-model-FLOPs": (CASCADES, ["0", "-1", "nan", "inf", "4.2B"]),
    "--deep-model-FLOPs": (CASCADES, ["0", "-1", "nan", "inf", "37B"]),
    "--threshold-searching": ([EVALUATE_FOLDS], ["maybe", "2"]),
    "--thresholds": ([EVALUATE_FOLDS], ["x", "nan", "1:0:0.1", "0:1:0", "0:1:-1", "0:1", "0:1:1e-12"]),
    "--target-accuracy": ([EVALUATE_FOLDS], ["0", "-1", "nan"]),
    "--target-FLOPs": ([EVALUATE_FOLDS], ["0", "-1", "nan"]),
    "--reference": ([EVALUATE_FOLDS], ["name", "name:80", "name:80:0", "name:101:1", ":80:1"]),
    "--max-epochs": (TRAINING, ["0", "-1", "1.5"]),
    "--patience": (TRAINING, ["0", "-1"]),
    "--virtual-batch-size": (TRAINING, ["0", "1", "-1"]),
    "--recipe": (TRAINING, ["best"]),
}


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [(script, flag, value) for flag, (where, values) in BAD_VALUES.items() for script in where for value in values],
)
def test_a_value_that_cannot_be_meant_is_refused(
    workshop: Workshop, tmp_path: Path, script: str, flag: str, value: str
) -> None:
    line = refusal(scripts.run(script, *workshop.command(script, tmp_path), f"{flag}={value}"))
    assert flag.lstrip("-") in line
    assert not any(path.exists() for path in workshop.outputs(script, tmp_path))


@pytest.mark.parametrize("script", ON_IMAGES)
def test_a_number_of_classes_that_the_model_has_not_is_refused(workshop: Workshop, tmp_path: Path, script: str) -> None:
    line = refusal(scripts.run(script, *workshop.command(script, tmp_path), "--num_classes", 7))
    assert "was trained on 3 classes, not 7; leave out --num_classes" in line
    weight = "--model-weight" if script == GENERATE else "--shallow-model-weight"
    file = workshop.root / "shallow" / "model.safetensors"
    line = refusal(scripts.run(script, *workshop.command(script, tmp_path), "--num_classes", 7, weight, file))
    assert "it has 3 classes, the model 7; give --num_classes 3" in line


@pytest.mark.parametrize("script", ON_IMAGES)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tf_efficientnet_b44", "did you mean"),
        ("local-dir:nowhere", "nowhere/config.json does not exist"),
        ("some/folder", "local-dir:some/folder"),
        ("ftp:model", "ftp:model"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    workshop: Workshop, tmp_path: Path, script: str, model: str, words: str
) -> None:
    flag = "--model" if script == GENERATE else "--deep-model"
    assert words in refusal(scripts.run(script, *workshop.command(script, tmp_path), flag, model))


@pytest.mark.parametrize("script", ON_IMAGES)
def test_pictures_may_be_as_small_as_one_pixel(workshop: Workshop, tmp_path: Path, script: str) -> None:
    assert scripts.run(script, *workshop.command(script, tmp_path), "--img-size", 1).code == 0


FILES = {  # of a script: the flag of an output, those of inputs
    GENERATE: ("--output", ["--labels", "--class-map", "--model-weight"]),
    EVALUATE_FOLDS: ("--performance-result", ["--class-map", "--shallow-output", "--deep-output"]),
    EVALUATE_CUSTOM: ("--result", ["--labels", "--class-map", "--weight"]),
    TRAIN_FOLDS: ("--log", ["--cls-output"]),
    TRAIN_CUSTOM: ("--log", ["--cls-output"]),
}


@pytest.mark.parametrize(("script", "given"), [(script, each) for script in FILES for each in FILES[script][1]])
def test_an_output_that_is_also_an_input_is_refused_and_stays_as_it_is(
    workshop: Workshop, tmp_path: Path, script: str, given: str
) -> None:
    file = tmp_path / "both.csv"
    file.write_bytes(workshop.table("shallow").read_bytes())
    before = file.read_bytes()
    (tmp_path / "link.csv").symlink_to(file)
    words = [*workshop.command(script, tmp_path), FILES[script][0], tmp_path / "link.csv", given, file]
    assert f"output {tmp_path / 'link.csv'} is also an input" in refusal(scripts.run(script, *words))
    assert file.read_bytes() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_any_flags_the_line_says_what_is_missing(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (cli.DATA_DIR / "imagenet_splits_5").exists() or (cli.DATA_DIR / "effb4_output_ds_for_CLCNet.csv").exists():
        pytest.skip("the default inputs are there")
    line = refusal(scripts.run(script))
    assert any(words in line for words in ("does not exist", "--custom-data"))
