"""The evaluation script from end to end: what it computes, what it runs and does not run, and what it refuses."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from forking import run_together
from networks import classify
from plain import judged_by_fold

import eval_imagenet_5fold_cv as script
from clcnet.cascade import comparison, selection
from clcnet.classifiers import timing
from clcnet.classifiers.classes import class_readings
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs
from clcnet.network.model import CLCNet
from clcnet.report import evaluation_report, plots

ROOT = script.cli.ROOT


@pytest.fixture
def weights(tmp_path):
    """Five networks, untrained and each different, named and marked as those of the training script."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for fold in range(1, 6):
        torch.manual_seed(fold)
        others = [other for other in range(1, 6) if other != fold]
        path = folder / f"CLCNet_imagenet_split_{fold}.zip"
        CLCNet(3).save(path, {"fold": fold, "training_folds": others})
    return folder


@pytest.fixture
def images(image_folder):
    return image_folder(images_per_class=10, five_parts=True)


@pytest.fixture
def table_flags(images, tmp_path):
    """Two tables that need not stand in the order of the folder, and what their models cost."""
    names = list_images(images).names
    for name, accuracy, seed in (("small", 0.6, 1), ("large", 0.8, 2)):
        random = np.random.default_rng(seed)
        probs = -np.sort(-random.dirichlet([0.3] * 3, len(names)).astype(np.float32), axis=1)
        correct = random.random(len(names)) < accuracy
        order = random.permutation(len(names))
        Outputs([names[i] for i in order], probs[order], correct=correct[order]).save(tmp_path / f"{name}.csv")
    files = ["--shallow-output", tmp_path / "small.csv", "--deep-output", tmp_path / "large.csv"]
    return [*files, "--shallow-model-FLOPs", 1, "--deep-model-FLOPs", 4]


def one_millisecond(classifiers, *_):
    """What every model is said to take, in every turn."""
    return np.ones((5, len(classifiers)))


@pytest.fixture
def run(images, weights, tmp_path, monkeypatch):
    """Call the script as a user would, output going to a folder of its own; returns what `main` returns.

    Drawing and timing take most of the time, so only a few tests draw, and time the models.
    """
    monkeypatch.setattr(comparison, "NUM_RESAMPLES", 20)
    monkeypatch.setattr(selection, "NUM_SWEEP_RESAMPLES", 20)

    def call(*words, draw=False):
        if not draw:
            monkeypatch.setattr(plots, "save", lambda *_: [])
            monkeypatch.setattr(timing, "_in_turns", one_millisecond)
        flags = ["--imagenet-split", images, "--weight-save", weights, "--store", tmp_path / "store"]
        flags += ["--performance-result", tmp_path / "out" / "performance-result.csv", "--device", "cpu", "-j", "0"]
        return script.main(script.get_args_parser().parse_args([str(word) for word in [*flags, *words]]))

    return call


@pytest.mark.parametrize(
    "words, expected",
    [
        (["0:1:0.25"], [0, 0.25, 0.5, 0.75, 1]),
        (["0.5", "-inf", "0.1"], [-np.inf, 0.1, 0.5]),
        (["0.1:0.3:0.1"], [0.1, 0.2, 0.3]),
    ],
)
def test_thresholds_are_read_as_numbers_or_ranges(words, expected):
    assert script.cli.threshold_grid(words) == pytest.approx(expected)


def test_all_files_are_written_and_the_printing_ends_with_what_to_do(run, table_flags, tmp_path, capsys):
    outcome = run(*table_flags, "--threshold-searching", "--reference", "other:70:2", draw=True)
    folder = tmp_path / "out" / "results"
    written = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    drawn = ("accuracy-cost", "risk-coverage", "reliability", "confidence-histogram")
    assert written == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")} | {
        f"{name}.{kind}" for name in ("results-table", "comparison", "confidences") for kind in ("csv", "md")
    }
    printed = capsys.readouterr().out
    table = (folder / "results-table.md").read_text()
    assert table in printed and "| other " in table
    tail = printed[printed.index(table) + len(table) :]
    assert "take threshold" in tail and "rule alone: use " in tail and "oracle" in tail
    assert tail.splitlines()[-1].startswith(f"49 thresholds in {tmp_path / 'out' / 'performance-result.csv'}")
    assert (
        "GEM" in printed and f"no classes in {tmp_path / 'small.csv'}" in printed
    )  # and how to make a table with them
    assert outcome["paper_rule"].verdict.rival.model in (0, 1)
    rules = pd.read_csv(folder / "comparison.csv").rule.tolist()
    assert rules[0] == "CLCNet" and "oracle" in rules and not any("average" in rule for rule in rules)


def test_tables_need_neither_timm_nor_the_images(table_flags, images, weights, tmp_path):
    for path in images.rglob("*.png"):
        path.write_bytes(b"not an image")
    words = [*table_flags, "--imagenet-split", images, "--weight-save", weights]
    words += ["--performance-result", tmp_path / "out.csv", "--threshold-searching"]
    code = (
        "import sys, eval_imagenet_5fold_cv as script\n"
        "from clcnet.report import plots\n"
        "plots.save = lambda *_: []\n"  # which takes most of the time
        "script.main(script.get_args_parser().parse_args(sys.argv[1:]))\n"
        "assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, check=True, capture_output=True)


def test_flops_left_out_are_counted_from_a_models_name(run, table_flags, classifier_dir, tmp_path):
    name = f"local-dir:{classifier_dir()}"
    files = table_flags[:4]
    outcome = run(*files, "--threshold-searching", "--shallow-model", name, "--deep-model", name)
    flops = outcome["curve"].model_flops
    assert flops[0] == flops[1] == pytest.approx(load_classifier(name, device="cpu").flops)


def test_three_tables_in_any_order_stand_by_what_they_record_of_their_models(run, images, tmp_path, capsys):
    listed = list_images(images)
    random = np.random.default_rng(0)
    for name, flops, lift in (("c", 9.0, 3), ("a", 1.0, 1), ("b", 2.5, 2)):
        logits = random.normal(size=(30, 3)) + lift * np.eye(3)[listed.targets]
        outputs = Outputs.from_logits(logits, listed.names, listed.targets, model=name, flops=flops)
        outputs.save(tmp_path / f"{name}.parquet")
    files = [tmp_path / f"{name}.parquet" for name in "cab"]
    outcome = run("--outputs", *files, "--threshold-searching")
    assert outcome["curve"].model_flops.tolist() == [1, 2.5, 9]
    single = run("--outputs", *files, "--threshold", 0.45)["curve"]
    point = outcome["curve"].thresholds.tolist().index(0.45)
    assert (single.calls[0] == outcome["curve"].calls[point]).all()
    assert single.accuracy[0] == outcome["curve"].accuracy[point]
    printed = capsys.readouterr().out
    assert "CLCNet (a+b+c)" in printed and "best possible choice between the models (oracle)" in printed
    assert "Left out" not in printed and "GEM" in printed


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda flags, _: flags[:4], "what the model of .*small.csv costs"),
        (lambda flags, _: flags[:6], "what the model of .*large.csv costs"),
        (lambda flags, _: flags[:2], "--deep-output is missing"),
        (lambda flags, path: ["--shallow-output", path / "none.csv", *flags[2:]], "none.csv does not exist"),
        (lambda flags, path: [*flags, "--join", path / "small.csv"], "is not a results-table.csv"),
    ],
)
def test_missing_flags_and_files_are_named(run, table_flags, tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(*change(table_flags, tmp_path))
    assert not (tmp_path / "out" / "performance-result.csv").exists()


def test_tables_of_different_images_name_the_first_missing(run, table_flags, tmp_path):
    lines = (tmp_path / "large.csv").read_text().splitlines(keepends=True)
    (tmp_path / "large.csv").write_text("".join(lines[4:]))
    first = min(line.split(",")[0] for line in lines[:4])
    with pytest.raises(ValueError, match=rf"large.csv lacks 4 of the images of .*small.csv: {first}, .*, \.\.\."):
        run(*table_flags)


def test_weight_trained_on_the_images_it_should_judge_is_refused(run, table_flags, weights):
    shutil.copy(weights / "CLCNet_imagenet_split_2.zip", weights / "CLCNet_imagenet_split_4.zip")
    with pytest.raises(ValueError, match="split_4.zip was trained on fold 4, which it should judge"):
        run(*table_flags)


def test_folds_other_than_those_of_the_training_are_refused(run, table_flags, images, weights):
    listed = list_images(images)
    rows = [f"{name},1,{fold + 1},\n" for name, fold in zip(listed.names, listed.folds, strict=True)]
    split = weights / "CLCNet_imagenet_split.csv"
    split.write_text("file,table,fold,validates\n" + "".join(rows))
    run(*table_flags)
    split.write_text(split.read_text().replace(rows[0], f"{listed.names[0]},1,2,\n"))
    with pytest.raises(ValueError, match=f"{listed.names[0]} is in fold 1 of .* but was in fold 2"):
        run(*table_flags)


@pytest.fixture
def models(classifier_dir):
    shallow, deep = classifier_dir(seed=1), classifier_dir(seed=2)
    return ["--shallow-model", f"local-dir:{shallow}", "--deep-model", f"local-dir:{deep}"]


def direct_answers(name, images, weights):
    """The model's confidence and right answers by `classify` and the networks alone, without store and script."""
    listed = list_images(images)
    classifier = load_classifier(name, device="cpu")
    probs = np.concatenate([batch.probs for batch in classify(classifier, listed)])
    outputs = Outputs.from_probs(probs, targets=class_readings(listed, classifier)[0].of(listed.targets))
    networks = [CLCNet.load(weights / f"CLCNet_imagenet_split_{fold}.zip") for fold in range(1, 6)]
    return judged_by_fold(networks, outputs.sorted_probs, listed.folds), outputs.correct


def test_no_model_sees_an_image_twice_and_a_single_threshold_gives_what_the_search_gives_there(
    run, models, images, weights, asked, monkeypatch
):
    confidence, _ = direct_answers(models[1], images, weights)
    low, high = np.quantile(confidence, [0.3, 0.7])
    num_low, num_high = int((confidence < low).sum()), int((confidence < high).sum())
    shallow, deep = models[1], models[3]

    def asked_now(*words):
        asked.clear()
        return run(*models, *words)["curve"], dict(asked)

    singles, numbers = zip(*(asked_now("--threshold", threshold) for threshold in (low, high)), strict=True)
    assert numbers == ({shallow: 30, deep: num_low}, {deep: num_high - num_low})
    monkeypatch.setattr("clcnet.classifiers.classifier.count_flops", None)  # counted once in the life of the store
    searched, number = asked_now("--thresholds", low, high)
    assert number == {deep: 30 - num_high}
    np.testing.assert_array_equal(searched.accuracy, [single.accuracy[0] for single in singles])
    np.testing.assert_array_equal(searched.flops, [single.flops[0] for single in singles])
    for path in weights.glob("*.zip"):
        CLCNet(3).save(path)
    assert asked_now("--threshold-searching")[1] == {}
    os.utime(next(images.rglob("*.png")), (1, 1))
    assert asked_now("--threshold", "inf")[1] == {shallow: 1, deep: 1}


def test_what_step_3_asked_is_not_asked_again(run, models, images, weights, tmp_path, asked):
    table = ["--data-path", images, "--store", tmp_path / "store", "--output", tmp_path / "t.csv"]
    for model in (models[1], models[3]):
        assert scripts.run(scripts.GENERATE, *table, "--model", model, "--device", "cpu", "-j", 0).code == 0
    assert asked == {models[1]: 30, models[3]: 30}
    run(*models, "--threshold-searching")
    run(*models, "--threshold", "0.5")
    CLCNet(3).save(tmp_path / "w.zip")
    custom = ["--custom-data", images, "--weight", tmp_path / "w.zip", "--result", tmp_path / "r.csv", *table[2:4]]
    assert "60 answers were in the store" in scripts.run(scripts.EVALUATE_CUSTOM, *custom, *models, "-j", 0).out
    assert asked == {models[1]: 30, models[3]: 30}


def test_threshold_minus_999_is_the_shallow_model_alone(run, models, images, weights, asked, tmp_path):
    _, correct = direct_answers(models[1], images, weights)
    asked.clear()
    outcome = run("--threshold", "-999", *models[:2], "--weight-save", tmp_path / "nowhere")
    assert outcome["curve"].accuracy.tolist() == [pytest.approx(100 * correct.mean())]
    assert outcome["curve"].deferral.tolist() == [0]
    assert outcome["curve"].flops[0] == pytest.approx(load_classifier(models[1], device="cpu").flops)
    assert asked == {models[1]: 30}


def test_one_model_in_both_places_is_run_once(run, models, asked):
    outcome = run("--shallow-model", models[1], "--deep-model", models[1], "--thresholds", "all")
    assert asked == {models[1]: 30}
    assert len(set(outcome["curve"].accuracy.round(9))) == 1


def test_targets_out_of_reach(run, table_flags, tmp_path, capsys):
    run(*table_flags, "--target-FLOPs", 0.5)
    assert " alone: nothing costs as little as 0.5B" in capsys.readouterr().out
    outcome = run(*table_flags, "--target-accuracy", 101)
    assert not outcome["paper_rule"].reached
    with pytest.raises(SystemExit):
        run(*table_flags, "--target-accuracy", 70, "--target-FLOPs", 3)


def in_a_process(words):
    """The whole script but its report, in a process that was told its rank as by torchrun."""
    evaluation_report.write_report = lambda *_: {}
    evaluation_report.describe_recommendation = lambda *_: ""
    timing.TURNS = timing._BATCHES = 2
    measure = timing._in_turns
    timing._in_turns = lambda *given: np.ones_like(measure(*given))
    script.main(script.get_args_parser().parse_args(words))


@pytest.mark.parametrize("searching", [True, False])
def test_two_processes_give_the_file_of_one(searching, run, models, images, weights, tmp_path):
    confidence = np.sort(direct_answers(models[1], images, weights)[0])
    broken = sorted(images.rglob("*.png"))[7]
    broken.write_bytes(b"")
    # between two images: the last bit of a confidence may differ from process to process
    threshold = ["--threshold-searching"] if searching else ["--threshold", confidence[13:15].mean()]
    expected = run(*models, *threshold)["performance_result"]
    result = tmp_path / "result.csv"
    flags = ["--imagenet-split", images, "--weight-save", weights, "--store", tmp_path / "other store"]
    flags += ["--performance-result", result, "--device", "cpu", "-j", "0", *models, *threshold]
    assert run_together(2, in_a_process, [str(word) for word in flags]) == [0, 0]
    pd.testing.assert_frame_equal(pd.read_csv(result), pd.read_csv(expected))
    assert pd.read_csv(result).num_images[0] == 29
    assert broken.name in (tmp_path / "result.csv.errors.csv").read_text()
