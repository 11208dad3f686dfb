"""What `make imagenet` and the ablation at 1,000 classes compute beside the package."""

import json
import subprocess

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import ablation_1000, imagenet
from clcnet import cli


def test_auroc_of_drawn_images_is_that_of_the_images_repeated_as_often():
    generator = np.random.default_rng(0)
    scores, right = generator.integers(0, 9, 60) / 10, generator.random(60) < 0.6  # many are equal
    weights = generator.integers(0, 4, (5, 60))
    expected = [roc_auc_score(np.repeat(right, times), np.repeat(scores, times)) for times in weights]
    np.testing.assert_allclose(ablation_1000.drawn_aurocs(scores, right, weights), expected)


def test_calibration_error_by_chance_is_nothing_where_nothing_is_left_to_chance_and_shrinks_with_the_images():
    assert ablation_1000.error_by_chance(np.array([0.0, 1.0, 1.0])) == 0
    few, many = (ablation_1000.error_by_chance(np.full(count, 0.5), num_draws=400) for count in (100, 2500))
    assert few == pytest.approx(np.sqrt(2 / np.pi) * 0.05, rel=0.1)  # the mean distance of a share from a half
    assert many == pytest.approx(few / 5, rel=0.1)


def test_the_estimate_of_b7_is_the_measured_rate_times_its_multiply_adds():
    text = list(imagenet.time_lines())
    rates = json.loads((imagenet.RESULTS / "generate.json").read_text())["ratio"]
    (rate,) = (case["medians"]["step3"] for case in rates if case["case"] == "photographs (200), tf_efficientnet_b0")
    assert "Estimated, not measured" in text[0]
    cells = text[-1].split(" | ")
    assert float(cells[2]) == pytest.approx(50_000 / rate / 3600 * 37.7459 / 0.3858, abs=0.06)
    assert float(cells[3].removesuffix(" |")) == pytest.approx(50_000 / 150.33 / 60, abs=0.06)


def test_make_imagenet_says_why_it_does_nothing_where_the_data_are_absent(tmp_path):
    settings = [f"IMAGENET1K={tmp_path / 'none'}", "--assume-old=.venv/installed"]
    words = ["make", "--no-print-directory", "imagenet", *settings]  # a make inside `make test` names its folders
    finished = subprocess.run(words, cwd=cli.ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"skipped: there is no folder {tmp_path / 'none'}")
