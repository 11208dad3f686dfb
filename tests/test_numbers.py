"""Numbers at the edge: huge and equal logits, two classes and 21,843, models that are always right or always wrong."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, TRAIN_CUSTOM, TRAIN_FOLDS, Workshop, refusal

from clcnet import CLCNet
from clcnet.classifiers.classifier import load_classifier
from clcnet.confidence import SIMPLE_CONFIDENCES
from clcnet.data.checks import check_sorted_probs
from clcnet.data.outputs import Outputs


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.as_tensor(logits, dtype=torch.float32), dim=-1).numpy()


LOGITS = {
    "logits of 1e4": np.array([[1e4, 0.0, -1e4], [1e4, 1e4, 0.0], [-1e4, -1e4, -1e4]]),
    "all equal": np.zeros((3, 5)),
    "two classes": np.array([[0.1, 0.0], [50.0, -50.0], [0.0, 0.0]]),
    "21,843 classes": np.random.default_rng(0).standard_normal((3, 21_843)),
    "21,843 equal ones": np.zeros((2, 21_843)),
    "21,843, one sure": np.where(np.arange(21_843) == 7, 1e4, 0.0)[None],
}


@pytest.mark.parametrize("case", LOGITS)
def test_extreme_rows_are_valid_tables_and_get_finite_scores(tmp_path: Path, case: str) -> None:
    probs = softmax(LOGITS[case])
    outputs = Outputs.from_probs(probs, targets=np.zeros(len(probs), np.int64))
    sorted_probs = outputs.sorted_probs
    check_sorted_probs(sorted_probs)
    assert outputs.correct is not None and outputs.correct.tolist() == (probs.argmax(1) == 0).tolist()
    for name in ("t.csv", "t.parquet"):
        outputs.save(tmp_path / name)
        assert Outputs.load(tmp_path / name).sorted_probs.tobytes() == sorted_probs.tobytes()
    network = CLCNet(num_classes=probs.shape[1]).eval()
    assert np.isfinite(network.predict(sorted_probs)).all()
    for confidence in SIMPLE_CONFIDENCES.values():
        assert np.isfinite(confidence(sorted_probs)).all()


@pytest.mark.parametrize("scale", [1e4, 1e30, 0.0])
def test_a_classifier_with_absurd_weights_still_gives_probabilities(workshop: Workshop, scale: float) -> None:
    classifier = load_classifier(workshop.models()[1], device="cpu")
    with torch.no_grad():
        classifier.model.get_classifier().weight.mul_(scale)
    probs = classifier.probabilities(torch.rand(4, 3, 32, 32)).numpy()
    assert np.isfinite(probs).all() and np.allclose(probs.sum(1), 1)


@pytest.mark.parametrize("script", [GENERATE, EVALUATE_FOLDS, EVALUATE_CUSTOM])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_classifier_whose_answer_is_no_number_is_one_line_with_the_image(
    workshop: Workshop, tmp_path: Path, script: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "clcnet.classifiers.classifier.Classifier.probabilities",
        lambda self, batch: torch.full((len(batch), 3), value).softmax(dim=-1),
    )
    line = refusal(scripts.run(script, *workshop.command(script, tmp_path)))
    assert "ant_0000.png: the answer of local-dir:" in line and "not a number" in line
    assert not any(path.exists() for path in workshop.outputs(script, tmp_path))


@pytest.mark.parametrize("right", [True, False])
def test_tables_of_a_model_always_right_or_always_wrong(workshop: Workshop, tmp_path: Path, right: bool) -> None:
    lines = workshop.table("shallow").read_text().splitlines()
    table = tmp_path / "t.csv"
    table.write_text("".join(f"{line[:-1]}{int(right)}\n" for line in lines))
    for script in (TRAIN_FOLDS, TRAIN_CUSTOM):
        line = refusal(scripts.run(script, *workshop.command(script, tmp_path), "--cls-output", table))
        assert str(table) in line and f"label {int(right)}; a confidence needs right and wrong answers" in line
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        words = [*workshop.command_on_tables(tmp_path), "--threshold-searching"]
        for flags in (["--shallow-output", table], ["--deep-output", table]):
            finished = scripts.run(EVALUATE_FOLDS, *words, *flags)
            assert finished.code == 0 and "rule alone: use " in finished.out
