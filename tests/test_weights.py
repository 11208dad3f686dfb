"""The weights that the repository ships: what the demo trained, and enough for steps 4 and 5 on the demo's images."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, run
from test_demo import make_small

from clcnet import CLCNet, cli
from clcnet.network.weights import find_fold_weights
from clcnet.report import plots

SHIPPED = cli.ROOT / "weights" / "demo"
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


def test_they_are_a_few_hundred_kilobytes() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.zip")) < 500_000


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
