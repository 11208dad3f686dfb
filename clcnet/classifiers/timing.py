"""How long models take an image on this machine: measured together, in turns, the way a folder is classified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier, default_batch_size, load_classifier
from clcnet.classifiers.schedule import cut
from clcnet.classifiers.stream import stream
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs

TURNS = 5
_BATCHES = 6  # a turn of one model, of which the first, in which processes start, does not count
_SECONDS = 4.0  # after which a turn ends, once two batches were timed


def milliseconds_together(
    classifiers: Sequence[Classifier], images: ImageSet, batch_size: int | None = None, workers: int | None = None
) -> NDArray[np.float64]:
    """Time all models in turns, so that a busy moment of the machine hits all: (TURNS, K) milliseconds an image.

    In batches, decoding included, as the models run; on one device, by the main process alone. Of fewer images than a
    few batches some are classified again.
    """
    size = batch_size or default_batch_size(classifiers[0].device)
    places = np.resize(np.arange(len(images)), _BATCHES * size)
    with distributed.alone():
        return _in_turns(classifiers, lambda classifier: _one_turn(classifier, images, places, size, workers))


def timed_on_noise(outputs: Sequence[Outputs], device: torch.device) -> list[Outputs]:
    """Load models as their outputs record them and time all together, in turns, on random pixels; says so.

    Raises:
        ValueError: a model cannot be had any more.
    """
    models = list[Classifier]()
    for record in (each.record for each in outputs):
        try:
            models.append(load_classifier(**record.loaded_from, device=device))
            if models[-1].key != record.weights:
                raise ValueError("another one lies there now")
        except (TypeError, OSError, ValueError) as error:
            raise ValueError(
                f"{record.model} cannot be timed ({error}), so neither --cost time nor money can be told: make its "
                "table again, or let step 4 run the models"
            ) from error
    found = _in_turns(models, _one_turn_of_noise)
    return with_times(outputs, models, found, default_batch_size(device), "random pixels without reading")


def with_times(
    outputs: Sequence[Outputs],
    classifiers: Sequence[Classifier],
    milliseconds: NDArray[np.float64],
    batch_size: int,
    images: str,
) -> list[Outputs]:
    """Enter medians of (TURNS, K) into the records, and how they were taken; says both, with the least and the most."""
    timed, words = list[Outputs](), list[str]()
    for each, model, times in zip(outputs, classifiers, milliseconds.T, strict=True):
        how = {"device": model.device_name, "batch_size": batch_size, "images": images, "run": model.describe_run()}
        middle = float(np.median(times))
        timed.append(replace(each, record=replace(each.record, milliseconds=middle, timed=how)))
        low, high = times.min(), times.max()
        words.append(f"{model.name} {middle:.3g} ms an image ({low:.3g} to {high:.3g}) in {how['run']}")
    print(
        f"time, on {classifiers[0].device_name}, {batch_size} images a batch, {images}, in {TURNS} turns: "
        f"{', '.join(words)}"
    )
    return timed


def _in_turns(classifiers: Sequence[Classifier], one_turn: Callable[[Classifier], float]) -> NDArray[np.float64]:
    found = np.empty((TURNS, len(classifiers)))
    for turn, k in tqdm([*np.ndindex(found.shape)], desc="timing", unit="turn", leave=False):
        found[turn, k] = one_turn(classifiers[k])
    return found


def _one_turn_of_noise(classifier: Classifier) -> float:
    batch, seconds = torch.rand(default_batch_size(classifier.device), *classifier.input_size), list[float]()
    while len(seconds) < _BATCHES and (len(seconds) < 2 or sum(seconds) < _SECONDS):
        started = time.perf_counter()
        classifier.probabilities(batch).cpu()  # which waits for the device
        seconds.append(time.perf_counter() - started)
    return float(1000 * np.mean(seconds[1:]) / len(batch))


def _one_turn(
    classifier: Classifier, images: ImageSet, places: NDArray[np.int64], size: int, workers: int | None
) -> float:
    count, seconds, started = 0, 0.0, time.perf_counter()
    for number, found in enumerate(stream([classifier], images, cut(places, size), size, workers)):
        if number:
            count, seconds = count + found.num_images, seconds + found.seconds
        if number > 1 and time.perf_counter() - started > _SECONDS:
            break
    return 1000 * seconds / count
