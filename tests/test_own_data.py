"""From two or more models of one's own to a policy: names told apart, weights of other models refused."""

import csv
import dataclasses
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from PIL import Image
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, TRAIN_CUSTOM, refusal

from clcnet import Cascade, CLCNet, Outputs, cli
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Surest
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import Scored, Single, Units, Verdict, judge
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.outputs import Record
from clcnet.report.search_cli import CostFile

Factory = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--max-epochs", 2, "--batch-size", 64, "--device", "cpu")


def save_outputs(folder: Path, lifts: dict[str, float], num_images: int = 300, **record: object) -> list[Path]:
    """Outputs of models over the same images of three classes: the higher its lift the more it is right, 1, 2.. B."""
    random = np.random.default_rng(0)
    targets = np.arange(num_images) % 3
    noise = random.normal(size=(num_images, 3))  # models err on the same images, for the greater part
    files = []
    for place, (model, lift) in enumerate(lifts.items(), start=1):
        logits = noise + 0.5 * random.normal(size=(num_images, 3)) + lift * np.eye(3)[targets]
        names = [f"{row:04d}.png" for row in range(num_images)]
        files.append(folder / f"model{place}.parquet")
        outputs = Outputs.from_logits(logits, names, targets, model=model, flops=10.0 ** (place - 1), **record)
        outputs.save(files[-1])
    return files


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a run's time."""
    monkeypatch.setattr("clcnet.report.plots.save", lambda *_: [])


def train(folder: Path, *words: object) -> scripts.Finished:
    return scripts.run(TRAIN_CUSTOM, *words, "--weight-save", folder, *QUICK)


def search(folder: Path, *words: object) -> tuple[scripts.Finished, dict[str, Any]]:
    """Step 4 from tables: what it printed, and recommendation.json."""
    place = ("--weight-save", folder / "none", "--performance-result", folder / "performance.csv")
    finished = scripts.run(EVALUATE_FOLDS, *words, "--threshold-searching", *place)
    assert finished.code == 0, finished.err
    return finished, json.loads((folder / "results" / "recommendation.json").read_text())


# ---------------------------------------------------------------- names


def test_models_in_folders_of_one_name_are_told_apart_in_every_table(tmp_path: Path) -> None:
    files = save_outputs(tmp_path, {"local-dir:runs/a/hf": 1.0, "local-dir:runs/b/hf": 2.5})
    finished, _ = search(tmp_path, "--outputs", *files)
    for name in ("results-table", "confidences"):
        assert {"a/hf", "b/hf"} <= {*pd.read_csv(tmp_path / "results" / f"{name}.csv").model}, name
    assert "max softmax (S:a/hf+D:b/hf)" in finished.out
    svg = (tmp_path / "results" / "accuracy-cost.svg").read_text()
    assert "<!-- a/hf -->" in svg and "<!-- b/hf -->" in svg


# ---------------------------------------------------------------- whose weights


def test_weights_of_another_number_of_classes_are_refused_unless_asked_for(
    workshop: scripts.Workshop, tmp_path: Path
) -> None:
    other = tmp_path / "four.zip"
    CLCNet(num_classes=4).save(other)
    words = [*workshop.command(EVALUATE_CUSTOM, tmp_path), "--weight", other]
    message = refusal(scripts.run(EVALUATE_CUSTOM, *words))
    assert "was trained at 4 classes" in message and "has 3" in message and "--any-n" in message
    assert not (tmp_path / "custom-data-result.csv").exists()
    with pytest.warns(UserWarning, match="trained at n = 4"):
        assert scripts.run(EVALUATE_CUSTOM, *words, "--any-n").code == 0


def test_without_weights_of_ones_own_step_5_says_how_to_make_them(
    workshop: scripts.Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "WEIGHTS_DIR", tmp_path)
    words = workshop.command(EVALUATE_CUSTOM, tmp_path)
    message = refusal(scripts.run(EVALUATE_CUSTOM, *words[: words.index("--weight")]))
    assert "train_custom_data.py --cls-output" in message and "not for 3" in message
    assert "absent.zip" in refusal(scripts.run(EVALUATE_CUSTOM, *words, "--weight", tmp_path / "absent.zip"))


def test_what_is_trained_into_weights_is_the_users_and_never_seen_by_git() -> None:
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "--no-index", "-q", path], cwd=cli.ROOT).returncode == 0

    if subprocess.run(["git", "rev-parse"], cwd=cli.ROOT, capture_output=True).returncode:
        pytest.skip("not in a git repository")
    assert ignored("weights/CLCNet_custom_data.zip") and ignored("weights/cascade.json")
    assert not ignored("weights/demo/CLCNet_custom_data.zip")


# ---------------------------------------------------------------- where models lie


def test_a_policy_finds_its_models_from_any_folder_and_moves_with_them(
    tmp_path: Path, classifier_dir: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(classifier_dir(seed=1), work / "runs" / "hf")
    torch.save(load_classifier(f"local-dir:{classifier_dir(seed=2)}").model.state_dict(), work / "runs" / "best.pth")
    monkeypatch.chdir(work)
    of_file = {"weight": Path("runs/best.pth"), "num_classes": 3, "img_size": 32}
    models = [load_classifier("local-dir:runs/hf"), load_classifier("test_resnet", **of_file)]
    records = [Record(each.name, each.key, loaded_from=each.loaded_from) for each in models]
    Policy(records, Surest("max softmax"), [0.9]).save("weights/cascade.json")
    monkeypatch.chdir(tmp_path)
    for name in ("work", "moved"):
        policy = Policy.load(tmp_path / name / "weights" / "cascade.json")
        assert [each.key for each in policy.load_classifiers(device="cpu")] == [each.key for each in models]
        if name == "work":
            work.rename(tmp_path / "moved")
    policy.save("here.json")
    assert Policy.load("here.json").models == policy.models
    weights = (tmp_path / "moved" / "runs" / "best.pth").rename(tmp_path / "renamed.pth")
    here = policy.load_classifiers([f"local-dir:{tmp_path / 'moved' / 'runs' / 'hf'}", str(weights)], device="cpu")
    assert [each.key for each in here] == [each.key for each in models]


def test_what_a_policy_says_is_not_said_again_by_flags(tmp_path: Path) -> None:
    Policy([Record("alone")], Surest("max softmax"), []).save(tmp_path / "cascade.json")
    words = ("--custom-data", tmp_path, "--policy", tmp_path / "cascade.json")
    for flag in ("--threshold", "--deep-model", "--img-size"):
        assert f"--policy says what {flag} would" in refusal(scripts.run(EVALUATE_CUSTOM, *words, flag, 32))


def test_classes_of_a_model_without_names_are_called_by_the_folders_of_its_table(
    tmp_path: Path, classifier_dir: Factory, image_folder: Factory
) -> None:
    """As checkpoints of timm's training are; the photographs to come lie in no class folders."""
    folder, tables = image_folder(images_per_class=40), []
    for seed in (1, 2):
        tables.append(tmp_path / f"{seed}.parquet")
        model = f"local-dir:{classifier_dir(seed=seed, label_names=None)}"
        words = ("--data-path", folder, "--model", model, "--store", tmp_path / "store", "--device", "cpu", "-j", 0)
        assert scripts.run(GENERATE, *words, "--output", tables[-1]).code == 0
    assert Outputs.load(tables[0]).record.class_names == ["ant", "bee", "cat"]
    assert train(tmp_path, "--cls-output", *tables, "--images", folder).code == 0
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "<td>bee</td>" in page and "data:image/jpeg;base64," in page
    flat = [shutil.copy(path, tmp_path) for path in sorted((folder / "bee").iterdir())[:3]]
    cascade = Cascade.from_policy(tmp_path / "cascade.json", device="cpu")
    assert set(cascade(flat).names) <= {"ant", "bee", "cat"}
    (inbox := tmp_path / "inbox").mkdir()
    shutil.copy(flat[0], inbox)
    words = ("--custom-data", inbox, "--policy", tmp_path / "cascade.json", "--result", tmp_path / "out.csv")
    assert scripts.run(EVALUATE_CUSTOM, *words, "--store", tmp_path / "store", "--device", "cpu", "-j", 0).code == 0
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert row["class_name"] == cascade(flat[:1]).names[0]


# ---------------------------------------------------------------- a folder that grows


def test_a_growing_inbox_asks_the_models_about_the_new_images_alone_and_keeps_their_folders(
    workshop: scripts.Workshop, tmp_path: Path, asked: Counter[str]
) -> None:
    inbox = tmp_path / "inbox"
    words = [*workshop.command(EVALUATE_CUSTOM, tmp_path), "--custom-data", inbox, "--threshold", "inf"]

    def answer() -> list[dict[str, str]]:
        assert scripts.run(EVALUATE_CUSTOM, *words).code == 0
        return list(csv.DictReader((tmp_path / "custom-data-result.csv").read_text().splitlines()))

    for place in ("monday/x.png", "tuesday/y.png"):
        (inbox / place).parent.mkdir(parents=True)
        Image.effect_noise((32, 32), 80).convert("RGB").save(inbox / place)
    before = answer()
    assert [row["file"] for row in before] == ["monday/x.png", "tuesday/y.png"]
    asked.clear()
    Image.effect_noise((32, 32), 60).convert("RGB").save(inbox / "monday" / "new.png")
    after = answer()
    assert [row["file"] for row in after] == ["monday/new.png", "monday/x.png", "tuesday/y.png"]
    assert after[1:] == before and set(asked.values()) == {1}


# ---------------------------------------------------------------- the verdict


RIGHT, BETTER = np.arange(1000) < 900, np.arange(1000) < 930
BARELY = np.roll(RIGHT, 50) | (np.arange(1000) < 2)  # as many others are right, and two more
ALONE = {"deep": 10.0}


def spent_where(share_on: float) -> np.ndarray:
    """Of a cascade whose models cost 1 and 10."""
    return 1 + 10.0 * (np.arange(1000) % 100 < 100 * share_on)


@pytest.mark.parametrize(
    ("correct", "spent", "goal", "alone", "choice", "reason"),
    [
        (RIGHT, spent_where(0.80), Goal("match"), ALONE, "cascade", "1.11x less"),  # 1 + 0.8 * 10 = 9 of 10
        (RIGHT, spent_where(0.85), Goal("match"), ALONE, "deep", "a cascade saves less than 10%"),  # 10 / 9.5 = 1.05
        (RIGHT, spent_where(0.90), Goal("match"), ALONE, "deep", "not sure that a cascade costs less"),  # just as much
        (RIGHT, spent_where(1.00), Goal("match"), ALONE, "deep", "not sure that a cascade costs less"),  # one more
        (BETTER, spent_where(1.00), Goal("accuracy", 99), ALONE, "cascade", ""),  # no model reaches it
        (BARELY, spent_where(1.00), Goal("accuracy", 99), ALONE, "deep", "does not hold 99.00%"),
        (RIGHT, np.full(1000, 2.0), Goal("flops", 1), {"small": 2.0} | ALONE, "small", "nothing costs as little as 1B"),
    ],
)
def test_a_cascade_is_recommended_where_it_saves_ten_percent_or_is_surely_better(
    correct: np.ndarray, spent: np.ndarray, goal: Goal, alone: dict[str, float], choice: str, reason: str
) -> None:
    verdict = judged(correct, spent, goal, alone)
    assert (verdict.choice, reason in verdict.reason) == (choice, True), verdict.reason


def judged(correct: np.ndarray, spent: np.ndarray, goal: Goal, alone: dict[str, float]) -> Verdict:
    """By models alone of which each is right on the first 90% of the images."""
    right = RIGHT[: len(correct)]
    singles = [Single(0, name, False, Scored.alone(right, np.array([cost]))) for name, cost in alone.items()]
    target = goal.value or 100 * right.mean()
    return judge(Scored(correct, spent[None]), goal, target, singles, Units(("FLOPs",)), 10)


def test_no_saving_is_recommended_whose_interval_includes_none() -> None:
    """Ten images: the mean is 20% cheaper, and that may be chance."""
    verdict = judged(RIGHT[:10], np.array([1.0] * 4 + [12.0] * 6), Goal("match"), {"deep": 9.5})
    assert verdict.saving > 1.1 and verdict.saving_interval[0] < 1
    assert verdict.choice == "deep" and "not sure" in verdict.reason


def test_training_says_first_what_to_use_then_what_giving_up_saves_then_details(tmp_path: Path, undrawn: None) -> None:
    files = save_outputs(tmp_path, {"small": 2.0, "big": 4.0}, num_images=1500)
    finished = train(tmp_path / "weights", "--cls-output", *files)
    assert finished.code == 0, finished.err
    verdict, table, details = (finished.out.index(words) for words in ("Verdict: use ", "| Give up", "CLCNet   "))
    assert verdict < table < details
    what, cost, sure = finished.out[verdict:table].split("\n")[:3]
    assert "% of the images" in what and "of its multiply-adds" in cost and "1,500 images" in sure
    assert "of its time" not in cost  # nobody measured any
    table_file = pd.read_csv(tmp_path / "weights" / "results" / "cascades.csv")
    assert "milliseconds" not in table_file or table_file["milliseconds"].isna().all()


def test_time_and_money_come_from_one_measurement_of_all_models_in_turns(
    tmp_path: Path, classifier_dir: Factory
) -> None:
    names = [f"local-dir:{classifier_dir(seed=seed)}" for seed in (1, 2)]
    models = [load_classifier(name, device="cpu") for name in names]
    files = save_outputs(tmp_path, dict(zip(names, (2.0, 4.0), strict=True)), num_images=1500)
    for file, model in zip(files, models, strict=True):
        outputs = Outputs.load(file)  # as step 3 writes it; a time of another day must not count
        record = dataclasses.replace(outputs.record, weights=model.key, loaded_from=model.loaded_from, milliseconds=1e6)
        dataclasses.replace(outputs, record=record).save(file)
    money = ("--cost", "time", "--price-per-hour", 3600, "--images-per-month", 1e6)
    finished = train(tmp_path / "weights", "--cls-output", *files, *money)
    assert finished.code == 0, finished.err
    assert "time, on cpu, 64 images a batch, random pixels without reading, in 5 turns: " in finished.out
    assert "Hours a month" in finished.out and "Money a month" in finished.out
    recommended = json.loads((tmp_path / "weights" / "results" / "recommendation.json").read_text())
    assert all(0 < rival["milliseconds"] < 1000 for rival in recommended["rivals"])
    how = {"device": "cpu", "batch_size": 64, "images": "random pixels without reading", "run": "float32"}
    assert all(model.timed == how for model in Policy.load(tmp_path / "weights" / "cascade.json").models)


@pytest.mark.parametrize(
    ("other", "alike"),
    [({}, True), ({"run": "bfloat16"}, True), ({"device": "another GPU"}, False), ({"batch_size": 256}, False)],
)
def test_times_taken_elsewhere_or_otherwise_are_not_compared_and_a_line_says_so(
    tmp_path: Path, other: dict[str, object], alike: bool, undrawn: None
) -> None:
    how: dict[str, object] = {"device": "a GPU", "batch_size": 64, "images": "reading included", "run": "float32"}
    files = save_outputs(tmp_path, {"small": 2.0, "big": 4.0}, milliseconds=3.0, timed=how)
    outputs = Outputs.load(files[1])
    dataclasses.replace(outputs, record=dataclasses.replace(outputs.record, timed=how | other)).save(files[1])
    finished, _ = search(tmp_path, "--outputs", *files)
    assert ("times are not compared" in finished.out) is not alike
    assert ("milliseconds" in pd.read_csv(tmp_path / "performance.csv")) is alike


@pytest.mark.parametrize("script", [TRAIN_CUSTOM, EVALUATE_FOLDS])
def test_a_probability_without_a_promise_is_refused_before_any_work(script: str) -> None:
    tables = "--cls-output" if script == TRAIN_CUSTOM else "--outputs"
    message = refusal(scripts.run(script, tables, "absent.parquet", "absent.parquet", "--guarantee", 0.9))
    assert "--guarantee needs a promise; give --most-drop, --most-FLOPs or --most-risk" in message


def test_models_that_cannot_be_had_any_more_are_not_timed_from_memory(tmp_path: Path) -> None:
    files = save_outputs(tmp_path, {"small": 2.0, "big": 4.0}, milliseconds=3.0)
    message = refusal(train(tmp_path / "weights", "--cls-output", *files, "--cost", "time"))
    assert "small cannot be timed" in message


# ---------------------------------------------------------------- costs of one's own


def test_what_a_file_says_of_costs_decides_and_every_table_speaks_its_unit(tmp_path: Path, undrawn: None) -> None:
    """By multiply-adds `big` costs ten times `small`, so a cascade saves most of them; by the file, next to nothing."""
    files = save_outputs(tmp_path, {"small.tag": 2.0, "big": 4.0}, num_images=1500)
    (tmp_path / "costs.csv").write_text("model,note,cents\nsmall,cheap,0.9\nbig,dear,1\nother,,7\n")
    cents = ("--cost", f"{tmp_path / 'costs.csv'}:cents")
    assert search(tmp_path, "--outputs", *files)[1]["choice"] == "cascade"
    finished, recommended = search(tmp_path, "--outputs", *files, *cents)
    assert recommended["choice"] == "big"
    assert [rival["cents"] for rival in recommended["rivals"]] == pytest.approx([0.9, 1, 0.9, 1])
    assert "use big alone" in finished.out and "at 1 cents an image" in finished.out
    assert "| Of big's cents" in finished.out and "x less cents than big" in finished.out

    recommended = search(tmp_path, "--outputs", *files, *cents, "--target-cost", 0.99)[1]
    assert recommended["goal"] == {"kind": "flops", "target": 0.99, "unit": "cents"}
    assert recommended["models"] == ["small.tag", "big"] and recommended["cents"] <= 0.99
    shares = recommended["shares"]
    assert recommended["cents"] == pytest.approx(0.9 * shares[0] + 1.0 * shares[1])
    assert recommended["FLOPs"] == pytest.approx(1 * shares[0] + 10 * shares[1])
    front = pd.read_csv(tmp_path / "results" / "cascades.csv")
    assert (np.diff(front["cents"]) > 0).all() and front["cross_fitted_cents"].between(0.9, 1.9).all()
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "cents an image" in page


@pytest.mark.parametrize(
    "content, column, message",
    [
        (None, "", "is neither FLOPs, nor time, nor a CSV file"),
        ("model,cents\nsmall,1\n", "", "has no row for big"),
        ("model,cents\nsmall,1\nbig,free\n", "", "the cents of big is no number above 0"),
        ("model,cents\nsmall,1\nbig,0\n", "", "the cents of big is no number above 0"),
        ("model,cents\nsmall,1\nbig,2\n", ":euros", "no column 'euros'"),
        ("model\nsmall\nbig\n", "", "no column 'model'"),
        ("", "", "is no CSV file of models and their costs"),
    ],
)
def test_a_file_of_costs_that_is_none_is_refused(tmp_path: Path, content: str, column: str, message: str) -> None:
    if content is not None:
        (tmp_path / "costs.csv").write_text(content)
    with pytest.raises((OSError, ValueError), match=message):
        CostFile.read(f"{tmp_path / 'costs.csv'}{column}").of(["small", "big"], ["small", "big"])


# ---------------------------------------------------------------- images that a model was trained on


def test_a_model_that_is_nearly_always_right_is_doubted_and_an_able_one_is_not(tmp_path: Path) -> None:
    files = save_outputs(tmp_path, {"able": 2.0, "knows them by heart": 12.0})
    finished = train(tmp_path / "weights", "--cls-output", *files)
    doubted = [line for line in finished.out.splitlines() if line.startswith("warning")]
    assert len(doubted) == 1 and "model2.parquet is right on 100.00%" in doubted[0]
    assert "no model was trained on" in doubted[0]
