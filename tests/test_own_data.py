"""From two or more models of one's own to a policy: names told apart, weights of other models refused."""

import csv
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scripts
from PIL import Image
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, TRAIN_CUSTOM, refusal

from clcnet import CLCNet, Outputs, cli

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


def train(folder: Path, *words: object) -> scripts.Finished:
    return scripts.run(TRAIN_CUSTOM, *words, "--weight-save", folder, *QUICK)


# ---------------------------------------------------------------- names


def test_models_in_folders_of_one_name_are_told_apart_in_every_table(tmp_path: Path) -> None:
    files = save_outputs(tmp_path, {"local-dir:runs/a/hf": 1.0, "local-dir:runs/b/hf": 2.5})
    finished = scripts.run(
        EVALUATE_FOLDS,
        *("--outputs", *files, "--threshold-searching", "--weight-save", tmp_path / "none"),
        *("--performance-result", tmp_path / "performance.csv"),
    )
    assert finished.code == 0, finished.err
    for name in ("results-table", "confidences"):
        with open(tmp_path / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
            assert {"a/hf", "b/hf"} <= {row["model"] for row in csv.DictReader(file)}, name
    assert "CLCNet (S:a/hf+D:b/hf)" in finished.out
    svg = (tmp_path / "results" / "accuracy-FLOPs.svg").read_text()
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
    import eval_custom_data

    monkeypatch.setattr(eval_custom_data, "DEFAULT_WEIGHT", tmp_path / "CLCNet_custom_data.zip")
    words = workshop.command(EVALUATE_CUSTOM, tmp_path)
    message = refusal(scripts.run(EVALUATE_CUSTOM, *words[: words.index("--weight")]))
    assert "train_custom_data.py --cls-output" in message and "--policy" in message


def test_what_is_trained_into_weights_is_the_users_and_never_seen_by_git() -> None:
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "--no-index", "-q", path], cwd=cli.ROOT).returncode == 0

    if subprocess.run(["git", "rev-parse"], cwd=cli.ROOT, capture_output=True).returncode:
        pytest.skip("not in a git repository")
    assert ignored("weights/CLCNet_custom_data.zip") and ignored("weights/cascade.json")
    assert not ignored("weights/demo/CLCNet_custom_data.zip")


# ---------------------------------------------------------------- a folder that grows


def test_a_growing_inbox_asks_the_models_about_the_new_images_alone_and_keeps_their_folders(
    workshop: scripts.Workshop, tmp_path: Path, asked: Counter[str]
) -> None:
    inbox, words = tmp_path / "inbox", workshop.command(EVALUATE_CUSTOM, tmp_path)
    words[words.index("--custom-data") + 1] = inbox
    words += ["--threshold", "inf"]

    def answer() -> list[dict[str, str]]:
        assert scripts.run(EVALUATE_CUSTOM, *words).code == 0
        with open(tmp_path / "custom-data-result.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

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
