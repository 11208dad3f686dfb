"""The weights that the repository ships: the demo's, enough for its steps 4 and 5, and those for ImageNet's classes."""

import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, run
from test_demo import make_small

from benchmarks.fused import imagenet_outputs
from clcnet import CLCNet, cli, metrics
from clcnet.data.images import list_images
from clcnet.data.outputs import Outputs
from clcnet.network.weights import find_fold_weights, weights_or_shipped
from clcnet.report import plots

SHIPPED = cli.ROOT / "weights" / "demo"
IMAGENET = cli.ROOT / "weights" / "imagenet"
IMAGENET1K = cli.ROOT.parent / "shared" / "imagenet1k"
CARD = (SHIPPED / "README.md").read_text(encoding="utf-8")
DEMO_LOG = (cli.ROOT / "benchmarks" / "results" / "demo.txt").read_text(encoding="utf-8")
CUSTOM = SHIPPED / "CLCNet_custom_data.zip"


def measured(row: str) -> list[str]:
    """AUROC, AURC, MSE and calibration error as the demo's commands printed them."""
    (figures,) = re.findall(rf"^{row}((?: +[\d.]+){{4}})$", DEMO_LOG, flags=re.MULTILINE)
    return figures.split()


@pytest.mark.parametrize("fold", [1, 2, 3, 4, 5, None])
def test_the_weights_are_those_of_the_demo_and_have_the_figures_that_it_printed(fold: int | None) -> None:
    path = find_fold_weights(SHIPPED)[fold - 1] if fold else CUSTOM
    clcnet = CLCNet.load(path)
    assert clcnet.num_classes == 10 and clcnet.calibration is not None
    assert clcnet.metadata["training_arguments"]["seed"] == 42
    assert clcnet.metadata["tables"] == (["shallow.parquet"] if fold else ["shallow.parquet", "deep.parquet"])
    if fold:
        assert clcnet.metadata["training_folds"] == [other for other in range(1, 6) if other != fold]
    names = ("auroc", "aurc", "mse", "calibration_error")
    printed = measured(f"fold {fold}" if fold else "CLCNet")
    assert [f"{clcnet.metadata['test'][name]:.4f}" for name in names] == printed, (
        "copy data/demo/weights to weights/demo"
    )


@pytest.mark.skipif(not IMAGENET1K.is_dir(), reason=f"no folder {IMAGENET1K}")
def test_those_for_imagenet_have_the_figures_that_they_say_on_the_fold_that_they_never_saw() -> None:
    outputs, folds = imagenet_outputs(IMAGENET1K)
    for fold, path in enumerate(find_fold_weights(IMAGENET), start=1):
        clcnet = CLCNet.load(path)
        assert clcnet.num_classes == 1000 and clcnet.metadata["fold"] == fold
        unseen = [each.subset(folds == fold - 1) for each in outputs.values()]
        confidence = np.concatenate([clcnet.predict(each.sorted_probs) for each in unseen])
        correct = np.concatenate([each.correct for each in unseen])
        assert metrics.auroc(confidence, correct) == pytest.approx(clcnet.metadata["test"]["auroc"], abs=1e-4)


def test_where_the_user_trained_none_those_for_imagenet_judge_models_of_1000_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "WEIGHTS_DIR", tmp_path)
    shipped, custom = tmp_path / "imagenet", tmp_path / CUSTOM.name
    shipped.mkdir()
    assert weights_or_shipped(tmp_path, lambda: 1000) == shipped
    assert weights_or_shipped(custom, lambda: 1000) == shipped / CUSTOM.name
    assert capsys.readouterr().out.count(f"those of {shipped} judge") == 2
    for place, script in ((tmp_path, "train_imagenet_5fold_cv.py"), (custom, "train_custom_data.py")):
        with pytest.raises(FileNotFoundError, match=rf"for 1,000 classes, not for 10: train yours with {script}"):
            weights_or_shipped(place, lambda: 10)
    assert weights_or_shipped(tmp_path / "elsewhere", lambda: 1 // 0) == tmp_path / "elsewhere"
    for path in (custom, tmp_path / "CLCNet_imagenet_split_1.zip"):
        path.touch()
    assert weights_or_shipped(tmp_path, lambda: 1 // 0) == tmp_path
    assert weights_or_shipped(custom, lambda: 1 // 0) == custom


def test_step_4_runs_on_tables_of_1000_classes_without_any_training(
    tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = image_folder(images_per_class=20, five_parts=True, size=4)
    monkeypatch.setattr(cli, "WEIGHTS_DIR", tmp_path / "weights")
    shutil.copytree(IMAGENET, tmp_path / "weights" / "imagenet")
    images, flags = list_images(folder), []
    for seed, place in enumerate(("shallow", "deep")):
        logits = np.random.default_rng(seed).normal(0, 3, (len(images), 1000))
        Outputs.from_logits(logits, images.names, images.targets, model=place).save(f"{place}.parquet")
        flags += [f"--{place}-output", f"{place}.parquet", f"--{place}-model-FLOPs", 1 + seed]
    finished = run(
        EVALUATE_FOLDS, "--threshold", 0.5, "--imagenet-split", folder, *flags, "--performance-result", "r.csv"
    )
    assert finished.code == 0, finished.err
    assert "Threshold 0.5: accuracy" in finished.out and "imagenet judge" in finished.out


def test_steps_4_and_5_run_on_demo_images_without_training_as_the_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```", CARD, flags=re.DOTALL | re.MULTILINE)
    make, *evaluations = (shlex.split(line)[1:] for line in block.splitlines())
    assert make == ["-m", "examples.demo", "--output", "data/demo"]
    assert [words[0] for words in evaluations] == [f"{EVALUATE_FOLDS}.py", f"{EVALUATE_CUSTOM}.py"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "save", lambda *_: [])
    make_small(Path("data/demo"), monkeypatch)
    outputs = [["--cache", "cache", "--performance-result", "performance.csv"], ["--result", "answers.csv"]]
    for (script, *words), own in zip(evaluations, outputs, strict=True):
        words = [str(cli.ROOT / word) if word.startswith("weights/demo") else word for word in words]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as: trained at another number of classes
            finished = run(script.removesuffix(".py"), *words, *own, "--device", "cpu", "--workers", 0)
        assert finished.code == 0, finished.err
    assert len(Path("performance.csv").read_text().splitlines()) > 10
    assert len(Path("answers.csv").read_text().splitlines()) == 1 + len(list(Path("data/demo").rglob("*.png")))
