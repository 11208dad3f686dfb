"""A service in small: benchmarks/soak.py runs it for a minute."""

from pathlib import Path

import pytest

from benchmarks import soak


@pytest.mark.usefixtures("one_thread")
def test_eight_threads_get_the_answers_of_one_and_broken_images_harm_no_other(shared: Path) -> None:
    found = soak.soak(80)
    assert found["wrong"] == 0
    assert found["broken_told_apart"] == 4
    assert found["looks"] > 0
