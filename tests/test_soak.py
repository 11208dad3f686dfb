"""Long loads in small: benchmarks/soak.py and benchmarks/large_folder.py run them for minutes."""

from pathlib import Path

import pytest

from benchmarks import large_folder, soak

pytestmark = pytest.mark.usefixtures("one_thread")


def test_eight_threads_get_the_answers_of_one_and_requests_that_fail_or_are_given_up_leave_nothing() -> None:
    found = soak.soak(400)
    assert found["wrong"] == found["lost"] == found["left_behind"] == 0
    assert found["answered"] + found["cancelled"] == 400
    assert found["broken_told_apart"] > 10 and found["gave_up_waiting"] > 0 and found["looks"] > 0


def test_step_5_that_is_killed_over_and_over_ends_with_the_bytes_of_a_run_that_never_was(tmp_path: Path) -> None:
    found = large_folder.run(3000, 3, tmp_path)
    assert found["kills"] == 3 and found["outputs"] == 3 and found["different"] == 0
