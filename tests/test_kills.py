"""Each stage killed at ten random points: what was there before stays whole, and the end is as if nothing had been."""

from pathlib import Path

import pytest
from killing import Toll, kill_and_compare
from scripts import SCRIPTS, Workshop


@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_kills_at_random_points_lose_nothing_and_change_nothing(
    workshop: Workshop, tmp_path: Path, script: str
) -> None:
    toll = kill_and_compare(workshop, script, tmp_path)
    assert toll == Toll(kills=10, finished=toll.finished, rows=toll.rows)
