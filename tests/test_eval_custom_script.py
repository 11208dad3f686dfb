"""Evaluation on custom data from the command line to the file: any folder, going on, several processes, bad input."""

import csv
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import CLASSES

import eval_custom_data as script
from clcnet import Cascade, CLCNet
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Surest
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.images import list_images
from clcnet.data.outputs import Record

Factory = Callable[..., Path]
Evaluate = Callable[..., dict[str, Any]]
Row = dict[str, str]
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(classifier_dir: Factory) -> list[str]:
    return [f"local-dir:{classifier_dir(seed=1)}", f"local-dir:{classifier_dir('test_convnext', seed=2)}"]


@pytest.fixture(scope="module")
def weight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "CLCNet_custom_data.zip"
    CLCNet(num_classes=3).save(path)
    return path


@pytest.fixture
def folder(image_folder: Factory) -> Path:
    """Fifteen images of three classes."""
    return image_folder()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "custom-data-result.csv"


@pytest.fixture
def evaluate(models: list[str], weight: Path, output: Path) -> Evaluate:
    return lambda folder, *arguments: script.main(parse(command_line(folder, models, weight, output, *arguments)))


def parse(words: list[str]):
    return script.get_args_parser().parse_args(words)


def command_line(folder: Path, models: list[str], weight: Path, output: Path, *arguments: str) -> list[str]:
    fixed = ["--custom-data", str(folder), "--weight", str(weight), "--result", str(output), "--device", "cpu"]
    both = ["--shallow-model", models[0], "--deep-model", models[1], "--threshold", str(THRESHOLD)]
    return [*fixed, *both, "-j", "0", "-b", "4", "--store", str(output.parent / "store"), *arguments]


THRESHOLD = -0.19  # with the untrained network of `weight`, some are deferred and some of those overruled


def read(path: Path) -> list[Row]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- content


def test_clcnet_runs_where_the_models_run(models: list[str], weight: Path, tmp_path: Path) -> None:
    device = torch.device("meta")  # stands for a GPU: nothing is computed
    policy = tmp_path / "cascade.json"
    records = [Record(name, loaded_from={"name": name}) for name in models]
    Policy(records, Surest(network=CLCNet.load(weight)), [0.5]).save(policy, weight)
    by_flags = command_line(tmp_path, models, weight, tmp_path / "result.csv")
    by_policy = ["--custom-data", str(tmp_path), "--policy", str(policy)]
    rules = [script.load_cascade(parse(words), device)[1].rule for words in (by_flags, by_policy)]
    for rule in (*rules, Cascade.from_policy(policy, device).rule):
        assert rule.network.final_weight.device == device


def test_at_minus_999_the_shallow_model_answers_alone_and_the_deep_one_is_not_even_loaded(
    folder: Path, evaluate: Evaluate, output: Path, capsys
) -> None:
    outcome = evaluate(folder, "--threshold", "-999", "--deep-model", "no_such_model")
    assert outcome["num_deferred"] == 0 and outcome["num_seen"] == {"shallow": 15}
    assert {row["answered_by"] for row in read(output)} == {"shallow"}
    assert all(row["predict"] == row["shallow_predict"] for row in read(output))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("FLOPs: ") and lines[-4].endswith("; those of the deep model are not known")
    assert lines[-3].startswith("time: ") and lines[-3].endswith("; that of the deep model is not known")
    alone = evaluate(folder, "--threshold", "inf")["first_accuracy"]
    assert outcome["accuracy"] == outcome["first_accuracy"] == alone


def test_each_model_is_built_from_its_own_name_and_its_own_weights(
    folder: Path, evaluate: Evaluate, models: list[str], tmp_path: Path, output: Path
) -> None:
    evaluate(folder, "--threshold", "inf")
    expected = output.read_bytes()
    weights = {}
    for stage, name in zip(("shallow", "deep"), models, strict=True):
        weights[stage] = tmp_path / f"{stage}.pth"
        torch.save({"state_dict": load_classifier(name, device="cpu").model.state_dict()}, weights[stage])
    names = "--shallow-model test_resnet --deep-model test_convnext --num_classes 3 --img-size 32".split()
    files = ["--shallow-model-weight", str(weights["shallow"]), "--deep-model-weight", str(weights["deep"])]
    preprocessing = ["--crop-pct", "1", "--interpolation", "bicubic"]
    outcome = evaluate(folder, "--threshold", "inf", *names, *files, *preprocessing)
    assert output.read_bytes() == expected
    assert outcome["num_deferred"] == 15


# ---------------------------------------------------------------- folders and class names


def spread(folder: Path, into: Path, places: list[str]) -> Path:
    """Copy the images into these folders, in turn."""
    for index, path in enumerate(list_images(folder).paths):
        place = into / places[index % len(places)]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return into


def test_a_flat_folder_has_the_same_answers_without_accuracy_unless_a_file_of_labels_gives_it(
    folder: Path, evaluate: Evaluate, output: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.csv"
    labelled = evaluate(folder)
    expected = [row | {"file": Path(row["file"]).name} for row in read(output)]
    labels.write_text("".join(f"{path.name},{path.parent.name}\n" for path in list_images(folder).paths))
    flat = spread(folder, tmp_path / "flat", ["."])
    outcome = evaluate(flat)
    assert read(output) == [row | {"GT": ""} for row in expected]
    assert "accuracy" in labelled and "accuracy" not in outcome
    for row in outcome["classes"]:  # without true classes, those that the shallow model sees
        assert row["images"] == sum(each["shallow_predict"] == str(CLASSES.index(row["name"])) for each in expected)
    assert evaluate(flat, "--labels", str(labels))["accuracy"] == labelled["accuracy"]
    assert read(output) == expected
    for wrong in ("14", "spring"):
        labels.write_text("".join(f"{row['file']},{wrong}\n" for row in expected))
        with pytest.raises(ValueError, match=f"class '{wrong}' .* rename it or give a --class-map"):
            evaluate(flat, "--labels", str(labels))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["2024/may", "2024/june"], "folders are not taken for classes, so no accuracy is reported"),
        ([".", "2024"], ""),
        (["april", "june", "may"], "class 'april' of the images is not among the classes of"),
    ],
)
def test_folders_that_are_not_the_models_classes_are_no_classes(
    folder: Path, evaluate: Evaluate, output: Path, tmp_path: Path, places: list[str], said: str, capsys
) -> None:
    outcome = evaluate(spread(folder, tmp_path / "nested", places))
    rows = read(output)
    assert "accuracy" not in outcome and said in capsys.readouterr().out
    assert len(rows) == 15 and {row["GT"] for row in rows} == {""} and {row["class_name"] for row in rows} <= {*CLASSES}


def test_a_class_without_a_folder_shifts_no_other(folder: Path, evaluate: Evaluate, output: Path) -> None:
    evaluate(folder)
    expected = [row for row in read(output) if not row["file"].startswith("ant")]
    shutil.rmtree(folder / "ant")
    outcome = evaluate(folder)
    assert read(output) == expected and {row["GT"] for row in expected} == {"1", "2"}
    assert outcome["accuracy"] == pytest.approx(100 * np.mean([row["predict"] == row["GT"] for row in expected]))


def test_class_names_come_from_the_folders_where_the_models_have_none(
    folder: Path, classifier_dir: Factory, evaluate: Evaluate, output: Path, tmp_path: Path, capsys
) -> None:
    nameless = [f"local-dir:{classifier_dir(seed=seed, label_names=None)}" for seed in (1, 2)]
    flags = ["--shallow-model", nameless[0], "--deep-model", nameless[1]]
    evaluate(folder, *flags)
    assert "\nthe classes are taken in natural order (ant, bee, cat), as timm sorts\n" in capsys.readouterr().out
    for row in read(output):
        assert row["GT"] == str(CLASSES.index(row["file"].split("/")[0]))
        assert row["class_name"] == CLASSES[int(row["predict"])]
    (folder / "dog").mkdir()
    shutil.copy(folder / "ant" / "ant_0000.png", folder / "dog")
    assert "accuracy" not in evaluate(folder, *flags)  # none of four folders is known to be a class
    assert "no accuracy is reported: the images have 4 classes but" in capsys.readouterr().out
    evaluate(spread(folder, tmp_path / "flat", ["."]), *flags)
    assert {row["class_name"] for row in read(output)} == {""}


# ---------------------------------------------------------------- going on, and again


def test_an_image_that_cannot_be_read_is_counted_and_named_until_it_is_gone(
    folder: Path, evaluate: Evaluate, output: Path
) -> None:
    errors = Path(f"{output}.errors.csv")
    (folder / "bee" / "bad.png").touch()
    outcome = evaluate(folder)
    assert (outcome["num_images"], outcome["num_unreadable"]) == (15, 1)
    assert [row["file"] for row in read(errors)] == ["bee/bad.png"]
    (folder / "bee" / "bad.png").unlink()
    assert evaluate(folder)["num_unreadable"] == 0 and not errors.exists()


def test_with_another_threshold_the_deep_model_sees_the_additional_images_alone(
    folder: Path, evaluate: Evaluate, models: list[str], output: Path, asked: Counter[str], tmp_path: Path, capsys
) -> None:
    outcome, expected = evaluate(folder), read(output)
    seen = outcome["num_seen"]
    assert asked == {models[0]: 15, models[1]: seen["deep"]} and 0 < seen["deep"] < 15
    shallow, deep = (load_classifier(name, device="cpu").flops for name in models)
    assert outcome["flops"] == pytest.approx(shallow + seen["deep"] / 15 * deep)  # counted where no flag says it
    asked.clear()
    assert evaluate(folder, "--threshold", "inf", "--resume")["num_from_store"] == 15 + seen["deep"]
    assert asked == {models[1]: 15 - seen["deep"]}
    asked.clear()
    CLCNet(num_classes=3).save(tmp_path / "other.zip")
    evaluate(folder, "--weight", str(tmp_path / "other.zip"))
    assert not asked, "the store keeps what the models said, not how sure CLCNet was"
    capsys.readouterr()
    evaluate(folder, "--amp")
    assert capsys.readouterr().out.count("on cpu, bfloat16") == 2 and asked.total() > 15, "apart from float32"
    rows = read(output)
    same = [row["shallow_predict"] == wanted["shallow_predict"] for row, wanted in zip(rows, expected, strict=True)]
    assert rows != expected and np.mean(same) > 0.8


# ---------------------------------------------------------------- several processes


def test_torchrun_starts_it_as_the_readme_says(
    image_folder: Factory, evaluate: Evaluate, models: list[str], weight: Path, output: Path
) -> None:
    folder = image_folder(images_per_class=9)
    (folder / "bee" / "bad.png").touch()
    evaluate(folder)
    expected, errors = output.read_bytes(), Path(f"{output}.errors.csv").read_bytes()
    shutil.rmtree(output.parent)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "eval_custom_data.py"), *command_line(folder, models, weight, output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert output.read_bytes() == expected, done.stderr
    assert Path(f"{output}.errors.csv").read_bytes() == errors
    assert done.stdout.count("result in ") == done.stdout.count("shallow model: ") == 1  # one process speaks
    assert done.stderr.count("cascade: 100%") >= 1


# ---------------------------------------------------------------- the command itself


def test_the_command_as_the_specification_writes_it_is_understood() -> None:
    words = (
        "--custom-data photos --threshold 0.5 --num_classes 10 "
        "--shallow-model tf_efficientnet_b4 --shallow-model-FLOPs 4.2 --shallow-model-weight s.pth "
        "--deep-model tf_efficientnet_b7 ---deep-model-FLOPs 37 --deep-model-weight d.pth"
    )
    args = parse(words.split())
    assert (args.threshold, args.num_classes) == (0.5, 10)
    assert (args.shallow_model, args.shallow_model_FLOPs) == ("tf_efficientnet_b4", 4.2)
    assert (args.deep_model, args.deep_model_FLOPs) == ("tf_efficientnet_b7", 37)
    assert (args.shallow_model_weight, args.deep_model_weight) == (Path("s.pth"), Path("d.pth"))
    assert args.result == ROOT / "custom-data-result.csv"
