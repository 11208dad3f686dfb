"""Evaluation on custom data from the command line to the file: any folder, resuming, several processes, bad input."""

import csv
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import numpy as np
import pytest
import torch

import eval_custom_data as script
from clcnet import CLCNet
from clcnet.cascade.resume import UnfinishedAnswers
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.images import list_images

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
    return [*fixed, *both, "-j", "0", "-b", "4", *arguments]


THRESHOLD = -0.19  # with the untrained network of `weight`, some are deferred and some of those overruled


def read(path: Path) -> list[Row]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- content


def test_flops_left_out_are_counted(image_folder: Factory, evaluate: Evaluate, models: list[str]) -> None:
    outcome = evaluate(image_folder())
    shallow, deep = (load_classifier(name, device="cpu").flops for name in models)
    assert outcome["flops"] == pytest.approx(shallow + outcome["num_deferred"] / 15 * deep)


def test_at_minus_999_the_shallow_model_answers_alone_and_the_deep_one_is_not_even_loaded(
    image_folder: Factory, evaluate: Evaluate, output: Path
) -> None:
    outcome = evaluate(image_folder(), "--threshold", "-999", "--deep-model", "no_such_model")
    assert outcome["num_deferred"] == outcome["num_answered_by_deep"] == 0
    assert outcome["accuracy"] == outcome["shallow_accuracy"]
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
    assert read(output) == [{**row, "GT": ""} for row in expected]
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
    assert "; the folders are taken for the model's classes, in natural order\n" in capsys.readouterr().out
    assert all(row["GT"] == str(["ant", "bee", "cat"].index(row["file"].split("_")[0])) for row in read(output))
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
        assert row["GT"] == str(names.index(row["file"].split("_")[0]))
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
    assert read(output) == rows
    (tmp_path / "labels.csv").write_text("".join(f"{path.name},{index}\n" for index, path in enumerate(images.paths)))
    with pytest.raises(ValueError, match="the images have 15 classes"):
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
    assert "bee_0002.png" not in [row["file"] for row in read(output)]
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


# ---------------------------------------------------------------- resuming


@pytest.fixture
def interrupted(
    image_folder: Factory, evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, bytes]:
    """A folder, the bytes of an uninterrupted run over it, and beside the output what a run left after five batches."""
    folder = image_folder(images_per_class=9)
    (folder / "bee" / "bad.png").touch()
    evaluate(folder)
    expected = output.read_bytes()
    output.unlink()
    stop_after(5, evaluate, folder, monkeypatch)
    return folder, expected


def stop_after(
    batches: int, evaluate: Evaluate, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> None:
    kept = []
    append = UnfinishedAnswers.append

    def stopping(self: UnfinishedAnswers, outcome: object) -> None:
        if len(kept) == batches:
            raise KeyboardInterrupt
        kept.append(outcome)
        append(self, outcome)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedAnswers, "append", stopping)
        with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
            evaluate(folder, *arguments)


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one_wherever_it_stopped(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = interrupted
    for batches in (0, 1, 4, 7):
        stop_after(batches, evaluate, folder, monkeypatch)
        assert not output.exists()
        outcome = evaluate(folder, "--resume")
        assert output.read_bytes() == expected
        assert outcome["num_images"] == 27 and outcome["num_unreadable"] == 1
        assert not Path(f"{output}.partial").exists()
        output.unlink()


def test_a_line_cut_short_by_a_kill_does_not_count(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path
) -> None:
    folder, expected = interrupted
    outcomes = Path(f"{output}.partial") / "outcomes.jsonl"
    outcomes.write_bytes(outcomes.read_bytes()[:-7])
    evaluate(folder, "--resume")
    assert output.read_bytes() == expected


@pytest.mark.parametrize("file", ["arguments.json", "outcomes.jsonl"])
def test_damaged_rows_of_an_interrupted_run_are_refused(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path, file: str
) -> None:
    (Path(f"{output}.partial") / file).write_text('{"stage": 0}\n{\n')
    with pytest.raises(ValueError, match=f"{file} is damaged; delete"):
        evaluate(interrupted[0], "--resume")


def test_resumed_batches_are_not_classified_again(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path
) -> None:
    folder, _ = interrupted
    outcomes = Path(f"{output}.partial") / "outcomes.jsonl"
    lines = outcomes.read_text().splitlines()
    first = json.loads(lines[0])
    first["top1"] = [2] * 4  # not what the model would say if it were asked again
    outcomes.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    evaluate(folder, "--resume")
    assert [row["shallow_predict"] for row in read(output)[:4]] == ["2"] * 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--threshold", "0.3"], "threshold"),
        (["-b", "5"], "batch size"),
        (["--img-size", "40"], "weights and preprocessing"),
    ],
)
def test_resuming_with_other_arguments_is_refused_and_the_rows_stay(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path, arguments: list[str], named: str
) -> None:
    folder, expected = interrupted
    with pytest.raises(ValueError, match=f"--resume: the interrupted run in .* had {named}"):
        evaluate(folder, "--resume", *arguments)
    evaluate(folder, "--resume")
    assert output.read_bytes() == expected


def test_resuming_with_another_confidence_network_is_refused(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, tmp_path: Path
) -> None:
    CLCNet(num_classes=3).save(tmp_path / "other.zip")
    with pytest.raises(ValueError, match="had CLCNet weights"):
        evaluate(interrupted[0], "--resume", "--weight", str(tmp_path / "other.zip"))


def test_without_resume_an_interrupted_run_is_started_again(
    interrupted: tuple[Path, bytes], evaluate: Evaluate, output: Path, capsys
) -> None:
    folder, expected = interrupted
    evaluate(folder)
    assert output.read_bytes() == expected
    assert "the rows of an interrupted run in" in capsys.readouterr().out
    evaluate(folder, "--resume")
    assert "nothing to resume" in capsys.readouterr().out


def test_a_run_killed_at_random_points_ends_with_the_bytes_of_an_uninterrupted_one(
    image_folder: Factory, evaluate: Evaluate, models: list[str], weight: Path, output: Path
) -> None:
    folder = image_folder(images_per_class=40)
    (folder / "bee" / "bad.png").touch()
    evaluate(folder)
    expected, errors = output.read_bytes(), Path(f"{output}.errors.csv").read_bytes()
    output.unlink()
    rows = Path(f"{output}.partial") / "outcomes.jsonl"
    generator = random.Random(0)
    progress = []
    for kill in range(10):
        process = forking.start(evaluate_custom, *command_line(folder, models, weight, output, "--resume"))
        aim = (kill + generator.random()) / 10 * 9000  # so many bytes of outcomes, more each time
        while process.is_alive() and not (rows.exists() and rows.stat().st_size >= aim):
            time.sleep(0.0005)
        time.sleep(generator.random() * 0.005)
        process.kill()
        process.join()
        if not rows.exists():  # it was quick enough to finish
            break
        progress.append(rows.stat().st_size)
    assert len(progress) >= 6 and len(set(progress)) > 3
    evaluate(folder, "--resume")
    assert output.read_bytes() == expected
    assert Path(f"{output}.errors.csv").read_bytes() == errors


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
    assert forking.run_together(2, evaluate_custom, *command_line(folder, models, weight, output)) == [0, 0]
    assert output.read_bytes() == expected


def test_torchrun_starts_it_as_the_readme_says(
    image_folder: Factory, evaluate: Evaluate, models: list[str], weight: Path, output: Path
) -> None:
    folder = image_folder(images_per_class=9)
    (folder / "bee" / "bad.png").touch()
    evaluate(folder)
    expected, errors = output.read_bytes(), Path(f"{output}.errors.csv").read_bytes()
    output.unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "eval_custom_data.py"), *command_line(folder, models, weight, output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert output.read_bytes() == expected, done.stderr
    assert Path(f"{output}.errors.csv").read_bytes() == errors
    assert done.stdout.count("result in ") == done.stdout.count("shallow model: ") == 1  # one process speaks
    assert done.stderr.count("cascade: 100%") >= 1 and not Path(f"{output}.partial").exists()


def test_two_processes_go_on_where_one_stopped(
    interrupted: tuple[Path, bytes], models: list[str], weight: Path, output: Path
) -> None:
    folder, expected = interrupted
    words = command_line(folder, models, weight, output, "--resume")
    assert forking.run_together(2, evaluate_custom, *words) == [0, 0]
    assert output.read_bytes() == expected


# ---------------------------------------------------------------- precision


def test_mixed_precision_is_close_to_float32_and_is_not_gone_on_with_in_another(
    image_folder: Factory, evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder = image_folder()
    evaluate(folder)
    expected = read(output)
    evaluate(folder, "--amp")
    assert capsys.readouterr().out.count("on cpu, bfloat16") == 2
    rows = read(output)
    assert rows != expected
    same = [row["shallow_predict"] == wanted["shallow_predict"] for row, wanted in zip(rows, expected, strict=True)]
    assert np.mean(same) > 0.8
    stop_after(2, evaluate, folder, monkeypatch, "--amp")
    with pytest.raises(ValueError, match="had precision bfloat16, this one has float32"):
        evaluate(folder, "--resume")


# ---------------------------------------------------------------- what is printed


def test_what_a_run_cannot_know_of_the_deep_model_it_does_not_state(
    image_folder: Factory, evaluate: Evaluate, output: Path, capsys
) -> None:
    evaluate(image_folder(), "--threshold", "-999", "--deep-model", "no_such_model")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("FLOPs: ") and lines[-3].endswith("; those of the deep model are not known")
    assert lines[-2].startswith("time: ") and lines[-2].endswith("; that of the deep model is not known")


def test_a_resumed_run_that_finds_everything_answered_states_no_speed(
    image_folder: Factory, evaluate: Evaluate, output: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder = image_folder()
    with monkeypatch.context() as patch:
        patch.setattr("clcnet.cascade.runner._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder)
    outcome = evaluate(folder, "--resume")
    assert np.isnan([outcome["images_per_second"], outcome["time_saving"]]).all()
    assert "time: none; the interrupted run had answered every image" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="the shallow model has 3 classes and the deep one 4"):
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
    assert (
        70 < outcome["shallow_accuracy"] < 84 and 76 < outcome["deep_accuracy_on_deferred"] < 89
    )  # 76.8 and 82.2 on all
