"""What models take an image, by a clock of our own."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clcnet.classifiers import timing
from clcnet.classifiers.classifier import default_batch_size
from clcnet.data.outputs import Outputs, Record

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of now."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def model(name: str, seconds: list[float], clock: list[float]) -> Any:
    """One whose batches take so long, one after the other."""
    left = iter(seconds)

    def probabilities(batch: torch.Tensor) -> torch.Tensor:
        clock[0] += next(left)
        return batch

    about = {"name": name, "key": "key", "device": CPU, "device_name": "cpu", "describe_run": lambda: "float32"}
    return SimpleNamespace(**about, input_size=(3, 2, 2), probabilities=probabilities)


@pytest.mark.parametrize(
    ("seconds", "mean", "num_batches"),
    [
        ([9.0, 3.0, 7.0], 3.0, 2),  # the first one does not count, but it takes its time
        ([0.5, 1.0, 1.5, 1.1, 7.0], 1.2, 4),  # four seconds are over after the fourth
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 7.0], 0.4, 6),
    ],
)
def test_a_turn_ends_after_four_seconds_or_six_batches_of_which_the_first_does_not_count(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, seconds: list[float], mean: float, num_batches: int
) -> None:
    monkeypatch.setattr(timing, "TURNS", 1)
    found = timing._in_turns([model("m", seconds, clock)], timing._of_noise)
    assert found == pytest.approx(1000 * mean / default_batch_size(CPU))
    assert clock[0] == pytest.approx(sum(seconds[:num_batches]))


@pytest.mark.parametrize(
    ("rounds", "mean"),
    [
        ([(2, 3.0), (2, 0.25), (4, 0.95), (4, 9.0)], 0.2),  # the last one comes too late to count
        ([(2, 0.5), (2, 0.1), (2, 0.2), (2, 0.3), (2, 0.4), (2, 0.5)], 0.15),
    ],
)
def test_a_turn_over_images_ends_after_four_seconds_once_two_batches_are_timed(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, rounds: list[tuple[int, float]], mean: float
) -> None:
    clock[0] = 100.0
    asked: list[list[int]] = []

    def stream(_: Any, images: Any, batches: list[np.ndarray], *__: Any) -> Iterator[Any]:
        asked[:] = [batch.tolist() for batch in batches]
        for size, seconds in rounds:
            clock[0] += seconds
            yield SimpleNamespace(num_images=size, seconds=seconds)

    monkeypatch.setattr(timing, "stream", stream)
    found = timing.milliseconds_together([model("m", [], clock)] * 2, range(5), batch_size=2)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, np.full((5, 2), 1000 * mean))
    assert asked == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]], "six batches, whose images come again"


def test_models_of_tables_are_timed_in_turns_and_their_medians_told(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = default_batch_size(CPU)
    seconds = {
        "slow": [x for turn in (50, 10, 20, 30, 40) for x in (9, turn * size / 1000)],
        "fast": [x for turn in (1, 3, 2, 3, 2.5) for x in (9, turn * size / 1000)],
    }
    models = {name: model(name, times, clock) for name, times in seconds.items()}
    monkeypatch.setattr(timing, "load_classifier", lambda name, device: models[name])
    records = [Record(name, "key", loaded_from={"name": name}) for name in models]
    outputs = [Outputs.from_probs([[0.5, 0.5]], record=record) for record in records]
    timed = [each.record for each in timing.timed_on_noise(outputs, CPU)]
    assert [record.milliseconds for record in timed] == pytest.approx([30, 2.5])
    how = {"device": "cpu", "batch_size": size, "images": "random pixels without reading", "run": "float32"}
    assert [record.timed for record in timed] == [how, how]
    told = "slow 30 ms an image (10 to 50) in float32, fast 2.5 ms an image (1 to 3) in float32"
    assert capsys.readouterr().out == (
        f"time, on cpu, {size} images a batch, random pixels without reading, in 5 turns: {told}\n"
    )
    models["fast"].key = "another"
    with pytest.raises(ValueError, match=r"fast cannot be timed \(another one lies there now\)"):
        timing.timed_on_noise(outputs, CPU)
