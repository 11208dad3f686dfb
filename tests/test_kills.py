"""Each stage killed at ten random points: what was there before stays whole, and the end is as if nothing had been."""

from pathlib import Path

import pytest
from killing import Toll, kill_and_compare
from scripts import EVALUATE_FOLDS, TRAIN_CUSTOM, TRAIN_FOLDS, Workshop


# the two that can be resumed have tests of their own, in test_generate_script.py and test_eval_custom_script.py
@pytest.mark.parametrize("script", [TRAIN_FOLDS, EVALUATE_FOLDS, TRAIN_CUSTOM])
def test_ten_kills_at_random_points_lose_nothing_and_change_nothing(
    workshop: Workshop, tmp_path: Path, script: str
) -> None:
    toll = kill_and_compare(workshop, script, tmp_path)
    assert toll.kills >= 5, "most kills should hit a running process"
    assert toll == Toll(kills=toll.kills)
