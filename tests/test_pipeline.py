"""Steps 3 to 5 on a small demo, by the commands that a user types, checked against a plain second implementation."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, TRAIN_CUSTOM, TRAIN_FOLDS, run
from sklearn.datasets import load_digits

from clcnet import CLCNet
from clcnet.data.images import list_images
from examples import demo

STAGES = ("shallow", "deep")
THRESHOLD = 0.6
VIEWS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all steps have run on views of the first 200 digits."""
    folder = tmp_path_factory.mktemp("pipeline")
    digits = load_digits()
    few = SimpleNamespace(images=digits.images[:200], target=digits.target[:200])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(demo, "load_digits", lambda: few)
        words = ["--output", str(folder / "demo"), "--views", str(VIEWS), "--train-views", "8", "--epochs", "2"]
        demo.main(demo.get_args_parser().parse_args(words))
    images = folder / "demo" / "imagenet_splits_5"
    models = [word for stage in STAGES for word in (f"--{stage}-model", f"local-dir:{folder / 'demo' / stage}")]
    on_cpu = ["--device", "cpu", "--workers", 0, "--store", folder / "store"]
    for stage in STAGES:
        model = ["--model", f"local-dir:{folder / 'demo' / stage}", "--output", folder / f"{stage}.csv"]
        assert run(GENERATE, "--data-path", images, *model, *on_cpu).code == 0
    tables = ["--cls-output", folder / "shallow.csv", folder / "deep.csv", "--weight-save", folder]
    short = ["--max-epochs", 5, "--device", "cpu"]
    assert run(TRAIN_FOLDS, "--imagenet-split", images, *tables, *short).code == 0
    outputs = ["--performance-result", folder / "performance-result.csv"]
    evaluation = ["--imagenet-split", images, *models, "--weight-save", folder, *outputs, *on_cpu]
    assert run(EVALUATE_FOLDS, *evaluation, "--threshold-searching").code == 0
    assert run(TRAIN_CUSTOM, *tables, *short).code == 0
    weight = ["--weight", folder / "CLCNet_custom_data.zip", "--threshold", THRESHOLD]
    result = ["--result", folder / "custom-data-result.csv", *on_cpu]
    step_5 = run(EVALUATE_CUSTOM, "--custom-data", images, *models, *weight, *result)
    assert step_5.code == 0 and "400 answers were in the store" in step_5.out  # both models', from step 3
    return folder


@pytest.fixture(scope="module")
def tables(finished: Path) -> dict[str, pd.DataFrame]:
    """Both tables of step 3, as pandas reads them."""
    return {stage: pd.read_csv(finished / f"{stage}.csv", header=None, dtype={0: str}) for stage in STAGES}


def test_every_image_has_a_row_in_both_tables(finished: Path, tables: dict[str, pd.DataFrame]) -> None:
    files = {path.name for path in (finished / "demo").rglob("*.png")}
    assert len(files) == VIEWS * 100
    for table in tables.values():
        assert set(table[0]) == files and len(table) == len(files)
        probs = table.iloc[:, 1:-1].to_numpy()
        assert probs.shape[1] == 10
        assert (np.diff(probs, axis=1) <= 0).all()
        np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)


def test_performance_at_every_threshold_is_what_the_rule_gives_image_by_image(
    finished: Path, tables: dict[str, pd.DataFrame]
) -> None:
    images = list_images(finished / "demo" / "imagenet_splits_5")
    fold_of = {path.name: int(path.parts[-3][-1]) for path in images.paths}
    networks = {fold: CLCNet.load(finished / f"CLCNet_imagenet_split_{fold}.zip") for fold in range(1, 6)}
    outcomes = []
    for (_, shallow), (_, deep) in zip(*(tables[stage].iterrows() for stage in STAGES), strict=True):
        assert shallow[0] == deep[0]
        network = networks[fold_of[shallow[0]]]
        scores = [float(network.predict(row.to_numpy()[None, 1:-1].astype(np.float32))[0]) for row in (shallow, deep)]
        outcomes.append((*scores, shallow.iloc[-1], deep.iloc[-1]))
    flops = demo_flops(finished)
    performance = pd.read_csv(finished / "performance-result.csv")
    assert list(performance.columns[:3]) == ["threshold", "accuracy", "FLOPs"]
    for row in performance.itertuples():
        num_right = num_deferred = 0
        for shallow_score, deep_score, shallow_right, deep_right in outcomes:
            deferred = shallow_score < row.threshold
            num_deferred += deferred
            num_right += deep_right if deferred and deep_score > shallow_score else shallow_right
        assert row.accuracy == pytest.approx(100 * num_right / len(outcomes), abs=100.1 / len(outcomes))
        assert row.FLOPs == pytest.approx(flops[0] + num_deferred / len(outcomes) * flops[1], rel=0.02)


def demo_flops(finished: Path) -> list[float]:
    """Billions of multiply-adds, as the demo's manifest states them."""
    manifest = json.loads((finished / "demo" / "demo.json").read_text())
    return [manifest["classifiers"][stage]["flops"] for stage in STAGES]


def test_step_5_answers_every_image_by_the_rule(finished: Path, tables: dict[str, pd.DataFrame]) -> None:
    result = pd.read_csv(finished / "custom-data-result.csv")
    assert list(result.columns[:3]) == ["file", "predict", "GT"]
    assert len(result) == VIEWS * 100
    network = CLCNet.load(finished / "CLCNet_custom_data.zip")
    for row, (_, shallow), (_, deep) in zip(
        result.itertuples(), *(tables[stage].iterrows() for stage in STAGES), strict=True
    ):
        scores = [float(network.predict(each.to_numpy()[None, 1:-1].astype(np.float32))[0]) for each in (shallow, deep)]
        assert row.file.rpartition("/")[2] == shallow[0]
        if min(abs(scores[0] - THRESHOLD), abs(scores[0] - scores[1])) < 1e-4:
            continue  # batches of other sizes may round to the other side
        by_deep = scores[0] < THRESHOLD and scores[1] > scores[0]
        assert row.answered_by == STAGES[by_deep]
        assert row.confidence == pytest.approx(scores[by_deep], abs=1e-4)
        assert (row.predict == row.GT) == bool((deep if by_deep else shallow).iloc[-1])


def test_a_threshold_below_every_score_leaves_the_shallow_model_alone(
    finished: Path, tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    shallow = f"local-dir:{finished / 'demo' / 'shallow'}"
    words = ["--imagenet-split", finished / "demo" / "imagenet_splits_5", "--shallow-model", shallow]
    outputs = ["--performance-result", tmp_path / "alone.csv", "--store", tmp_path / "store"]
    assert run(EVALUATE_FOLDS, *words, *outputs, "--threshold", "-999", "--device", "cpu", "--workers", 0).code == 0
    row = pd.read_csv(tmp_path / "alone.csv").iloc[0]
    assert row["accuracy"] == pytest.approx(100 * tables["shallow"].iloc[:, -1].mean())
    assert row["FLOPs"] == pytest.approx(demo_flops(finished)[0])
