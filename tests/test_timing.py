"""What models take an image, by a clock of our own, and which way of running one `--fast` takes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import classify

from clcnet.classifiers import timing
from clcnet.classifiers.classifier import Classifier, default_batch_size, load_classifier
from clcnet.classifiers.schedule import Task
from clcnet.data.images import ImageSet, list_images
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

    about = {"name": name, "key": "key", "device": CPU, "device_name": "GPU", "describe_run": lambda: f"{name}'s way"}
    return SimpleNamespace(**about, input_size=(3, 2, 2), probabilities=probabilities)


def outputs_of(*names: str) -> list[Outputs]:
    return [Outputs.from_probs([[0.5, 0.5]], record=Record(name, "key", loaded_from={"name": name})) for name in names]


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
def test_over_images_models_take_turns_which_end_after_four_seconds_once_two_batches_are_timed(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, rounds: list[tuple[int, float]], mean: float
) -> None:
    clock[0] = 100.0
    asked: list[list[int]] = []
    turns: list[str] = []

    def stream(models: list[Any], images: Any, batches: list[np.ndarray], *__: Any) -> Iterator[Any]:
        asked[:] = [batch.tolist() for batch in batches]
        turns.append(models[0].name)
        for size, seconds in rounds:
            clock[0] += seconds
            yield SimpleNamespace(num_images=size, seconds=seconds * (2 if models[0].name == "slow" else 1))

    monkeypatch.setattr(timing, "stream", stream)
    models = [model(name, [], clock) for name in ("fast", "slow")]
    found = timing.timed_on_images(outputs_of("fast", "slow"), models, range(5), batch_size=2)  # type: ignore[arg-type]
    assert [each.record.milliseconds for each in found] == pytest.approx([1000 * mean, 2000 * mean])
    how = {"device": "GPU", "batch_size": 2, "images": "reading included"}
    assert [each.record.timed for each in found] == [how | {"run": f"{each.name}'s way"} for each in models]
    assert turns == ["fast", "slow"] * 5
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
    timed = [each.record for each in timing.timed_on_noise(outputs_of(*models), CPU)]
    assert [record.milliseconds for record in timed] == pytest.approx([30, 2.5])
    how = {"device": "GPU", "batch_size": size, "images": "random pixels without reading"}
    assert [record.timed for record in timed] == [how | {"run": f"{name}'s way"} for name in models]
    told = "slow 30 ms an image (10 to 50) in slow's way, fast 2.5 ms an image (1 to 3) in fast's way"
    assert capsys.readouterr().out == (
        f"time, on GPU, {size} images a batch, random pixels without reading, in 5 turns: {told}\n"
    )
    models["fast"].key = "another"
    with pytest.raises(ValueError, match=r"fast cannot be timed \(another one lies there now\)"):
        timing.timed_on_noise(outputs_of(*models), CPU)


def test_a_table_has_nothing_downloaded() -> None:
    with pytest.raises(ValueError, match="its table would download hf-hub:nobody/anything"):
        timing.timed_on_noise(outputs_of("hf-hub:nobody/anything"), CPU)


# ---------------------------------------------------------------- the quickest way


@pytest.fixture
def classifier(classifier_dir: Callable[..., Path]) -> Classifier:
    return load_classifier(f"local-dir:{classifier_dir()}", device="cpu")


@pytest.fixture
def images(image_folder: Callable[..., Path]) -> ImageSet:
    return list_images(image_folder())


def test_fast_takes_what_gains_and_leaves_the_answers_as_they_are(
    images: ImageSet, classifier: Classifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried_ones = []

    def run(tried: Classifier, images: object, size: int, batches: list[torch.Tensor]) -> tuple[np.ndarray, float]:
        assert [len(batch) for batch in batches] == [7, 7, 1]
        tried_ones.append((tried.channels_last, tried.amp, tried.compile))
        if tried.compile:
            raise ValueError("no compiler")
        top1 = np.zeros(15, int)
        top1[0] = tried.amp is not None  # one of 15 is more than a thousandth
        return top1, 3.0 - gain * tried.channels_last - (tried.amp is not None)

    monkeypatch.setattr(timing, "_run", run)
    gain = 1.0
    chosen = timing.fastest(classifier, images, batch_size=7)
    assert (chosen.channels_last, chosen.amp, chosen.compile) == (True, None, False)
    assert capsys.readouterr().out == (
        "--fast: float32, channels last; 1.50 times as fast on 15 images, 100.00% of them with the same top-1\n"
    )
    assert tried_ones == [(False, None, False), (True, None, False), (True, torch.bfloat16, False), (True, None, True)]
    gain = 0.03  # a hundredth may be chance
    assert not timing.fastest(classifier, images, batch_size=7).channels_last
    assert capsys.readouterr().out == (
        "--fast: nothing gains; 1.00 times as fast on 15 images, 100.00% of them with the same top-1\n"
    )


def test_fast_takes_the_time_of_the_quickest_batch_by_image_but_the_first(
    classifier: Classifier, images: ImageSet, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([0.1, 1.0, 3.0, 4.0])  # seconds

    class Stage:
        def __init__(self, *_: object) -> None:
            pass

        def launch(self, task: Task, batch: torch.Tensor, *_: object) -> Callable[[], SimpleNamespace]:
            assert task.stage == 0 and task.indices.tolist() == list(range(len(batch)))
            clock[0] += next(taken)
            return lambda: SimpleNamespace(probs=batch.numpy())

    monkeypatch.setattr(timing, "Stage", Stage)
    probs = torch.eye(3)[[0, 2, 1, 1, 0, 2, 2]]
    top1, seconds = timing._run(classifier, images, 4, [probs[:2], probs[2:6], probs[6:]])
    assert top1.tolist() == [0, 2, 1, 1, 0, 2, 2] and seconds == 0.5


def test_fast_measures_the_model_itself(images: ImageSet, classifier: Classifier) -> None:
    chosen = timing.fastest(classifier, images, batch_size=5)
    top1 = [
        np.concatenate([batch.probs.argmax(axis=1) for batch in classify(each, images)])
        for each in (classifier, chosen)
    ]
    assert (top1[0] == top1[1]).all() and chosen.key == classifier.key
