"""Evaluation on custom data from the command line to the file: any folder, going on, several processes, bad input."""

import csv
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import numpy as np
import pytest
import torch
from scripts import interrupt_after

import eval_custom_data as script
from clcnet import CLCNet
from clcnet.classifiers.classifier import load_classifier
from clcnet.classifiers.stream import classify
from clcnet.data.images import list_images
from clcnet.report.folder import print_summary

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
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "custom-data-result.csv"


@pytest.fixture
def evaluate(models: list[str], weight: Path, output: Path) -> Evaluate:
    def run(folder: Path, *arguments: str) -> dict[str, Any]:
        return script.main(parse(command_line(folder, models, weight, output, *arguments)))

    return run


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


def literal_rows(folder: Path, models: list[str], weight: Path, threshold: float) -> list[dict[str, Any]]:
    """The cascade's definition, image by image, from both models' answers to everything."""
    images, clcnet = list_images(folder), CLCNet.load(weight)
    answers = []
    for name in models:
        batches = classify(load_classifier(name, device="cpu"), images, batch_size=4, workers=0)
        probs = np.concatenate([batch.probs for batch in batches])
        answers.append((probs.argmax(axis=1), clcnet.predict(-np.sort(-probs, axis=1))))
    rows = []
    for index, file in enumerate(images.files):
        (shallow, shallow_sure), (deep, deep_sure) = ((top1[index], sure[index]) for top1, sure in answers)
        deferred = float(shallow_sure) < threshold
        stage = int(deferred and deep_sure > shallow_sure)
        rows.append(
            {
                "file": file,
                "predict": (shallow, deep)[stage],
                "GT": images.targets[index],
                "class_name": images.class_names[(shallow, deep)[stage]],
                "confidence": (shallow_sure, deep_sure)[stage],
                "answered_by": ("shallow", "deep")[stage],
                "shallow_predict": shallow,
                "shallow_confidence": shallow_sure,
                "deep_predict": deep if deferred else "",
                "deep_confidence": deep_sure if deferred else "",
            }
        )
    return rows


def percent_right(rows: list[dict[str, Any]], column: str) -> float:
    return 100 * float(np.mean([row[column] == row["GT"] for row in rows]))


def assert_same(row: Row, expected: dict[str, Any]) -> None:
    assert list(row) == list(expected)
    for column, value in expected.items():
        if isinstance(value, np.floating):
            assert float(row[column]) == pytest.approx(float(value), abs=1e-6), column
        else:
            assert row[column] == str(value), column


# ---------------------------------------------------------------- content


def test_every_row_is_what_the_definition_says(
    image_folder: Factory, evaluate: Evaluate, models: list[str], weight: Path, output: Path
) -> None:
    folder = image_folder(images_per_class=9)
    outcome = evaluate(folder)
    rows, expected = read(output), literal_rows(folder, models, weight, THRESHOLD)
    assert len(rows) == len(expected) == 27
    for row, wanted in zip(rows, expected, strict=True):
        assert_same(row, wanted)
    deferred = [row["deep_predict"] != "" for row in expected]
    by_deep = sum(row["answered_by"] == "deep" for row in expected)
    assert 3 < sum(deferred) < 24 and 0 < by_deep < sum(deferred)
    assert outcome["accuracy"] == pytest.approx(percent_right(expected, "predict"))
    assert outcome["first_accuracy"] == pytest.approx(percent_right(expected, "shallow_predict"))
    on_deferred = [row for row in expected if row["deep_predict"] != ""]
    accuracies = [percent_right(on_deferred, f"{stage}_predict") for stage in ("shallow", "deep")]
    assert outcome["accuracies_on_last_seen"] == pytest.approx(accuracies)
    assert outcome["num_seen"] == {"shallow": 27, "deep": sum(deferred)}
    assert outcome["num_answered_by"] == {"shallow": 27 - by_deep, "deep": by_deep}
    assert outcome["num_deferred"] == sum(deferred) and outcome["deferral"] == pytest.approx(np.mean(deferred))
    per_class = {
        name: [row["deep_predict"] != "" for row in expected if row["GT"] == k]
        for k, name in enumerate(["ant", "bee", "cat"])
    }
    counts = {name: (deferred, total) for name, deferred, total in outcome["most_deferred"]}
    assert counts == {name: (sum(asked), 9) for name, asked in per_class.items() if any(asked)}


def test_flops_an_image_are_the_shallow_ones_plus_the_deferred_share_of_the_deep_ones(
    image_folder: Factory, evaluate: Evaluate, models: list[str]
) -> None:
    outcome = evaluate(image_folder(), "--shallow-model-FLOPs", "4.2", "---deep-model-FLOPs", "37")
    assert outcome["flops"] == pytest.approx(4.2 + outcome["num_deferred"] / 15 * 37)
    assert outcome["flops_saving"] == pytest.approx(37 / outcome["flops"])
    counted = evaluate(image_folder())
    shallow, deep = (load_classifier(name, device="cpu").flops for name in models)
    assert counted["flops"] == pytest.approx(shallow + outcome["num_deferred"] / 15 * deep)


def test_at_minus_999_the_shallow_model_answers_alone_and_the_deep_one_is_not_even_loaded(
    image_folder: Factory, evaluate: Evaluate, output: Path
) -> None:
    folder = image_folder()
    alone = evaluate(folder, "--threshold", "inf")["first_accuracy"]
    outcome = evaluate(folder, "--threshold", "-999", "--deep-model", "no_such_model")
    assert outcome["num_deferred"] == 0 and outcome["num_seen"] == {"shallow": 15}
    assert outcome["accuracy"] == outcome["first_accuracy"] == alone
    assert {row["answered_by"] for row in read(output)} == {"shallow"}
    assert all(row["predict"] == row["shallow_predict"] for row in read(output))


def test_each_model_is_built_from_its_own_name_and_its_own_weights(
    image_folder: Factory, evaluate: Evaluate, models: list[str], tmp_path: Path, output: Path
) -> None:
    folder = image_folder()
    evaluate(folder, "--threshold", "inf")
    expected = output.read_bytes()
    weights = {}
    for stage, name in zip(("shallow", "deep"), models, strict=True):
        weights[stage] = tmp_path / f"{stage}.pth"
        torch.save({"state_dict": load_classifier(name, device="cpu").model.state_dict()}, weights[stage])
    names = [
        "--shallow-model",
        "test_resnet",
        "--deep-model",
        "test_convnext",
        "--num_classes",
        "3",
        "--img-size",
        "32",
    ]
    files = ["--shallow-model-weight", str(weights["shallow"]), "--deep-model-weight", str(weights["deep"])]
    preprocessing = ["--crop-pct", "1", "--interpolation", "bicubic"]
    outcome = evaluate(folder, "--threshold", "inf", *names, *files, *preprocessing)
    assert output.read_bytes() == expected
    assert outcome["num_deferred"] == 15


# ---------------------------------------------------------------- folders and class names


def test_a_flat_folder_has_no_gt_and_no_accuracy_but_the_same_answers(
    image_folder: Factory, evaluate: Evaluate, output: Path, tmp_path: Path
) -> None:
    folder = image_folder()
    labelled = evaluate(folder)
    expected = read(output)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in list_images(folder).paths:
        shutil.copy(path, flat)
    outcome = evaluate(flat)
    assert read(output) == [{**row, "file": Path(row["file"]).name, "GT": ""} for row in expected]
    assert "accuracy" in labelled and "accuracy" not in outcome
    # without true classes, those that the shallow model sees
    counts = {name: total for name, _, total in outcome["most_deferred"]}
    for name, total in counts.items():
        assert total == sum(row["shallow_predict"] == str(["ant", "bee", "cat"].index(name)) for row in expected)


@pytest.mark.parametrize("places", [["2024/may", "2024/june"], [".", "2024"], ["ant", "zebra", "bee", "owl"]])
def test_folders_that_are_not_the_models_classes_are_no_classes(
    image_folder: Factory, evaluate: Evaluate, output: Path, tmp_path: Path, places: list[str], capsys
) -> None:
    nested = tmp_path / "nested"
    for index, path in enumerate(list_images(image_folder()).paths):
        place = nested / places[index % len(places)]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    if "zebra" in places:  # some are: then the others are a mistake
        with pytest.raises(ValueError, match="class 'owl' of the images is not among the classes of"):
            evaluate(nested)
        return
    outcome = evaluate(nested)
    assert "accuracy" not in outcome
    rows = read(output)
    assert len(rows) == 15 and {row["GT"] for row in rows} == {""}
    assert {row["class_name"] for row in rows} <= {"ant", "bee", "cat"}
    if "." not in places:
        assert "folders are not taken for classes, so no accuracy is reported" in capsys.readouterr().out


def test_as_many_folders_as_classes_but_of_other_names_are_no_classes(
    image_folder: Factory, evaluate: Evaluate, output: Path, tmp_path: Path, capsys
) -> None:
    folder = image_folder(classes=("april", "june", "may"))
    outcome = evaluate(folder)
    assert "accuracy" not in outcome and {row["GT"] for row in read(output)} == {""}
    assert "class 'april' of the images is not among the classes of" in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("".join(f"{path.name},spring\n" for path in list_images(folder).paths))
    for path in list_images(folder).paths:
        shutil.move(path, folder)
    with pytest.raises(ValueError, match="class 'spring' .* rename it or give a --class-map"):  # stated to be classes
        evaluate(folder, "--labels", str(tmp_path / "labels.csv"))


def test_a_class_without_a_folder_shifts_no_other(image_folder: Factory, evaluate: Evaluate, output: Path) -> None:
    folder = image_folder()
    evaluate(folder)
    expected = [row for row in read(output) if not row["file"].startswith("ant")]
    shutil.rmtree(folder / "ant")
    outcome = evaluate(folder)
    rows = read(output)
    assert [(row["file"], row["GT"]) for row in rows] == [(row["file"], row["GT"]) for row in expected]
    assert {row["GT"] for row in rows} == {"1", "2"}
    assert outcome["accuracy"] == pytest.approx(100 * np.mean([row["predict"] == row["GT"] for row in rows]))


def test_more_folders_than_classes_are_an_error_where_some_are_classes_and_no_classes_where_none_is_known(
    image_folder: Factory, classifier_dir: Factory, evaluate: Evaluate, capsys
) -> None:
    folder = image_folder(classes=("ant", "bee", "cat", "dog"))
    with pytest.raises(ValueError, match="class 'dog' of the images is not among the classes of .* though others are"):
        evaluate(folder)
    nameless = [f"local-dir:{classifier_dir(seed=seed, label_names=None)}" for seed in (1, 2)]
    outcome = evaluate(folder, "--shallow-model", nameless[0], "--deep-model", nameless[1])
    assert "accuracy" not in outcome
    assert "no accuracy is reported: the images have 4 classes but" in capsys.readouterr().out


def test_class_names_come_from_the_folders_where_the_models_have_none(
    image_folder: Factory, classifier_dir: Factory, evaluate: Evaluate, output: Path, capsys
) -> None:
    nameless = [f"local-dir:{classifier_dir(seed=seed, label_names=None)}" for seed in (1, 2)]
    flags = ["--shallow-model", nameless[0], "--deep-model", nameless[1]]
    folder = image_folder()
    evaluate(folder, *flags)
    note = "\nthe classes are taken in natural order (ant, bee, cat), as timm sorts\n"
    assert note in capsys.readouterr().out
    assert all(row["GT"] == str(["ant", "bee", "cat"].index(row["file"].split("/")[0])) for row in read(output))
    assert all(row["class_name"] == ["ant", "bee", "cat"][int(row["predict"])] for row in read(output))
    for path in list_images(folder).paths:
        shutil.move(path, folder)
    for name in ("ant", "bee", "cat"):
        (folder / name).rmdir()
    evaluate(folder, *flags)
    assert {row["class_name"] for row in read(output)} == {""}


def test_a_class_map_names_and_numbers_the_classes(
    image_folder: Factory, evaluate: Evaluate, output: Path, tmp_path: Path
) -> None:
    folder = image_folder()
    (tmp_path / "map.txt").write_text("cat\nant\nbee\n")
    evaluate(folder, "--class-map", str(tmp_path / "map.txt"))
    names = ["cat", "ant", "bee"]
    for row in read(output):
        assert row["class_name"] == names[int(row["predict"])]
        assert row["GT"] == str(names.index(row["file"].split("/")[0]))
    shutil.rmtree(folder / "bee")
    for path in list_images(folder).paths:
        shutil.move(path, folder)
    shutil.rmtree(folder / "ant")
    shutil.rmtree(folder / "cat")
    evaluate(folder, "--class-map", str(tmp_path / "map.txt"))
    assert all(row["class_name"] == names[int(row["predict"])] and row["GT"] == "" for row in read(output))


def test_a_file_of_labels_gives_a_flat_folder_its_accuracy(
    image_folder: Factory, evaluate: Evaluate, output: Path, tmp_path: Path
) -> None:
    folder = image_folder()
    expected = evaluate(folder)
    rows = read(output)
    images = list_images(folder)
    (tmp_path / "labels.csv").write_text("".join(f"{path.name},{path.parent.name}\n" for path in images.paths))
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.paths:
        shutil.copy(path, flat)
    outcome = evaluate(flat, "--labels", str(tmp_path / "labels.csv"))
    assert outcome["accuracy"] == expected["accuracy"]
    assert read(output) == [{**row, "file": Path(row["file"]).name} for row in rows]
    (tmp_path / "labels.csv").write_text("".join(f"{path.name},{index}\n" for index, path in enumerate(images.paths)))
    with pytest.raises(ValueError, match="class '14' of the images is not among the classes"):
        evaluate(flat, "--labels", str(tmp_path / "labels.csv"))


# ---------------------------------------------------------------- images that cannot be read


def test_unreadable_images_are_left_out_named_and_counted(
    image_folder: Factory, evaluate: Evaluate, output: Path
) -> None:
    folder = image_folder()
    whole = evaluate(folder)
    (folder / "bee" / "bee_0002.png").write_bytes(b"")
    outcome = evaluate(folder)
    assert (outcome["num_images"], outcome["num_unreadable"]) == (14, 1)
    assert "bee/bee_0002.png" not in [row["file"] for row in read(output)]
    errors = read(Path(f"{output}.errors.csv"))
    assert [error["file"] for error in errors] == ["bee_0002.png"] and errors[0]["reason"]
    (folder / "bee" / "bee_0002.png").unlink()
    outcome = evaluate(folder)
    assert outcome["num_unreadable"] == 0 and whole["num_images"] == 15
    assert not Path(f"{output}.errors.csv").exists()  # it spoke of an earlier run


def test_when_no_image_can_be_read_the_old_result_stays(
    image_folder: Factory, evaluate: Evaluate, output: Path
) -> None:
    folder = image_folder(images_per_class=1)
    evaluate(folder)
    before = output.read_bytes()
    for path in list_images(folder).paths:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 3 images"):
        evaluate(folder)
    assert output.read_bytes() == before


# ---------------------------------------------------------------- going on, and again


@pytest.fixture
def interrupted(
    image_folder: Factory, evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, bytes]:
    """A folder, the bytes of an uninterrupted run over it, and a store with what a run kept in its five batches."""
    folder = image_folder(images_per_class=9)
    (folder / "bee" / "bad.png").touch()
    evaluate(folder)
    expected = output.read_bytes()
    shutil.rmtree(output.parent)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt, match="kept in .*store; the same command goes on from there"):
            evaluate(folder)
    assert not output.exists()
    return folder, expected


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_the_same_command_goes_on_and_ends_with_the_bytes_of_an_uninterrupted_run(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path, capsys, flags: list[str]
) -> None:
    folder, expected = interrupted
    outcome = evaluate(folder, *flags)
    assert output.read_bytes() == expected
    assert outcome["num_images"] == 27 and outcome["num_unreadable"] == 1
    assert 0 < outcome["num_from_store"] <= 20 and np.isnan([outcome["time_saving"], outcome["last_seconds"]]).all()
    kept = outcome["num_from_store"]
    assert f"time: not compared; {kept} answers were in the store" in capsys.readouterr().out.splitlines()


def test_with_another_threshold_the_deep_model_sees_the_additional_images_alone(
    image_folder: Factory, evaluate: Evaluate, models: list[str], output: Path, asked: Counter[str], tmp_path: Path
) -> None:
    folder = image_folder()
    seen = evaluate(folder)["num_seen"]
    assert asked == {models[0]: 15, models[1]: seen["deep"]} and 0 < seen["deep"] < 15
    asked.clear()
    evaluate(folder, "--threshold", "inf")
    assert asked == {models[1]: 15 - seen["deep"]}
    asked.clear()
    CLCNet(num_classes=3).save(tmp_path / "other.zip")
    evaluate(folder, "--weight", str(tmp_path / "other.zip"))
    assert not asked, "the store keeps what the models said, not how sure CLCNet was"


def evaluate_custom(*arguments: str) -> None:
    """Run step 5 with a command line, in a process of its own."""
    script.main(parse(list(arguments)))


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("images_per_class", [1, 9])
def test_two_processes_write_the_bytes_of_one(
    image_folder: Factory, evaluate: Evaluate, models: list[str], weight: Path, output: Path, images_per_class: int
) -> None:
    folder = image_folder(images_per_class=images_per_class)
    (folder / "bee" / "bad.png").touch()
    evaluate(folder)
    expected = output.read_bytes()
    output.unlink()
    shutil.rmtree(output.parent / "store")
    assert forking.run_together(2, evaluate_custom, *command_line(folder, models, weight, output)) == [0, 0]
    assert output.read_bytes() == expected


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


def test_two_processes_go_on_where_one_stopped(
    interrupted: tuple[Path, bytes], models: list[str], weight: Path, output: Path
) -> None:
    folder, expected = interrupted
    assert forking.run_together(2, evaluate_custom, *command_line(folder, models, weight, output)) == [0, 0]
    assert output.read_bytes() == expected


# ---------------------------------------------------------------- precision


def test_mixed_precision_is_close_to_float32_and_is_kept_apart_from_it(
    image_folder: Factory, evaluate: Evaluate, output: Path, asked: Counter[str], capsys
) -> None:
    folder = image_folder()
    evaluate(folder)
    expected = read(output)
    asked.clear()
    evaluate(folder, "--amp")
    assert capsys.readouterr().out.count("on cpu, bfloat16") == 2 and asked.total() > 15
    rows = read(output)
    assert rows != expected
    same = [row["shallow_predict"] == wanted["shallow_predict"] for row, wanted in zip(rows, expected, strict=True)]
    assert np.mean(same) > 0.8


# ---------------------------------------------------------------- what is printed


FIGURES: dict[str, Any] = {
    "num_images": 200,
    "num_unreadable": 0,
    "num_seen": {"shallow": 200, "deep": 50},
    "num_answered_by": {"shallow": 160, "deep": 40},
    "num_from_store": 0,
    "flops": 0.9,
    "last_flops": 2.0,
    "flops_saving": 2 / 0.9,
    "seconds": 10.0,
    "last_seconds": 18.0,
    "time_saving": 1.8,
    "images_per_second": 20.0,
    "waiting": "",
    "most_deferred": [("cat", 30, 60), ("8", 20, 80)],
}
ACCURACIES = {"accuracy": 91.0, "first_accuracy": 85.5, "accuracies_on_last_seen": [50.0, 74.0]}


def printed(capsys, *stage_names: str, **changes: Any) -> list[str]:
    print_summary(FIGURES | changes, stage_names or ("shallow", "deep"), Path("answers.csv"))
    return capsys.readouterr().out.splitlines()


def test_the_last_lines_say_what_was_saved_and_at_what_accuracy(capsys) -> None:
    assert printed(capsys, **ACCURACIES) == [
        "accuracy 91.00% (the shallow model alone 85.50%)",
        "deferred to the deep model: 25.0% of the images (50); its answer stands for 40",
        "on the deferred ones the shallow model has 50.00%, the deep model 74.00%",
        "classes that defer most: cat: 50% (30 of 60), 8: 25% (20 of 80)",
        "FLOPs: 0.9B an image; the deep model on every image: 2B, 2.22 times as many",
        "time: 10.0 s, 20.0 images/s; the deep model on every image: about 18.0 s by its time on the deferred ones, "
        "1.80 times as long",
        "200 images; result in answers.csv",
    ]


def test_without_labels_the_classes_that_defer_most_are_those_that_the_shallow_model_sees(capsys) -> None:
    lines = printed(capsys, num_unreadable=2)
    by = "by the answers of the shallow model"
    assert lines[1] == f"classes that defer most, {by}: cat: 50% (30 of 60), 8: 25% (20 of 80)"
    assert lines[-1] == "200 images, 2 unreadable left out (answers.csv.errors.csv); result in answers.csv"


def test_a_cascade_that_saves_nothing_is_said_to(capsys) -> None:
    lines = printed(capsys, flops=2.5, flops_saving=0.8, time_saving=0.5, deep_seconds=5.0)
    assert lines[2].endswith("2B, 0.80 times as many: the cascade saves nothing")
    assert lines[3].endswith("0.50 times as long: the cascade saves nothing")


def test_every_later_model_of_a_longer_cascade_has_its_line(capsys) -> None:
    lines = printed(
        capsys,
        *("b0", "b2", "b4"),
        **ACCURACIES | {"accuracies_on_last_seen": [40.0, 50.0, 60.0]},
        num_seen={"b0": 200, "b2": 50, "b4": 10},
        num_answered_by={"b0": 160, "b2": 35, "b4": 5},
    )
    assert lines[:4] == [
        "accuracy 91.00% (b0 alone 85.50%)",
        "deferred to b2: 25.0% of the images (50); its answer stands for 35",
        "deferred to b4: 5.0% of the images (10); its answer stands for 5",
        "on the deferred ones b0 has 40.00%, b4 60.00%",
    ]


def test_what_a_run_cannot_know_of_the_deep_model_it_does_not_state(
    image_folder: Factory, evaluate: Evaluate, capsys
) -> None:
    evaluate(image_folder(), "--threshold", "-999", "--deep-model", "no_such_model")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("FLOPs: ") and lines[-3].endswith("; those of the deep model are not known")
    assert lines[-2].startswith("time: ") and lines[-2].endswith("; that of the deep model is not known")


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


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval_custom_data.py"), *words], capture_output=True, text=True, timeout=300
    )


def test_the_script_prints_its_figures_and_exits_with_3_when_an_image_was_left_out(
    image_folder: Factory, models: list[str], weight: Path, output: Path
) -> None:
    folder = image_folder()
    (folder / "bee" / "bad.png").touch()
    done = run_script(*command_line(folder, models, weight, output, "-j", "1"))
    assert done.returncode == 3, done.stderr
    assert "cascade: 100%" in done.stderr and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"shallow model: {models[0]}: 3 classes, 32x32 pixels")
    assert lines[1].startswith(f"deep model: {models[1]}: 3 classes, 32x32 pixels")
    assert "accuracy " in lines[3] and "the shallow model alone" in lines[3]
    assert all(any(line.startswith(start) for line in lines) for start in ("deferred ", "FLOPs: ", "time: "))
    assert lines[-1].startswith("15 images, 1 unreadable left out") and lines[-1].endswith(f"result in {output}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--custom-data", "absent"], "image folder absent does not exist"),
        (["--weight", "absent.zip"], "absent.zip"),
        (["--num_classes", "7"], "7"),
        (["--threshold", "nan"], "threshold"),
        (["--shallow-model", "resnet_18"], "did you mean"),
        (["--deep-model", "local-dir:absent"], "absent"),
        (["--result", "."], "folder"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    image_folder: Factory,
    models: list[str],
    weight: Path,
    output: Path,
    flags: list[str],
    message: str,
    capsys,
    monkeypatch,
) -> None:
    from clcnet import cli

    output.parent.mkdir()
    output.write_text("before")
    words = command_line(image_folder(), models, weight, output, *flags)
    monkeypatch.setattr(sys, "argv", ["eval_custom_data.py", *words])
    with pytest.raises(SystemExit) as exit:
        cli.run(script.main, script.get_args_parser())
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert output.read_text() == "before"
    assert [path.name for path in output.parent.iterdir() if not path.name.startswith(".")] == [output.name]


def test_models_of_different_classes_are_refused(
    image_folder: Factory, classifier_dir: Factory, evaluate: Evaluate
) -> None:
    four = f"local-dir:{classifier_dir(num_classes=4, label_names=None)}"
    with pytest.raises(ValueError, match="has 3 classes and .* has 4; a cascade needs models of the same classes"):
        evaluate(image_folder(), "--deep-model", four)


def test_real_images_give_the_known_accuracies_of_both_models(shared: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    cifar = shared / "cifar10"
    folder = tmp_path / "some"
    for path in sorted((cifar / "imagenet_splits_5" / "split_part_1").glob("*/*.jpg"))[::8]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    CLCNet(num_classes=10).save(tmp_path / "w.zip")
    flags = ["--shallow-model", f"local-dir:{cifar / 'shallow'}", "--deep-model", f"local-dir:{cifar / 'deep'}"]
    outcome = evaluate(folder, *flags, "--weight", str(tmp_path / "w.zip"), "--threshold", "inf", "-b", "64")
    assert outcome["num_images"] == 250
    assert outcome["accuracies_on_last_seen"] == pytest.approx([76.8, 82.2], abs=7)  # on all 10,000
