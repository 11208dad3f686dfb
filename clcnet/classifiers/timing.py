"""How long models take an image on this machine: measured together, in turns, the way a folder is classified."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier, default_batch_size, load_classifier
from clcnet.classifiers.model_config import check_loading
from clcnet.classifiers.schedule import cut
from clcnet.classifiers.stream import stream
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs

TURNS = 5
_BATCHES = 6  # a turn of one model, of which the first does not count
_SECONDS = 4.0  # after which a turn ends, once one batch was timed
Batches = Iterator[tuple[int, float]]  # images and seconds of each


def milliseconds_together(
    classifiers: Sequence[Classifier], images: ImageSet, batch_size: int | None = None, workers: int | None = None
) -> NDArray[np.float64]:
    """Time all models in turns, so that a busy moment of the machine hits all: (TURNS, K) milliseconds an image.

    In batches, decoding included, as the models run; on one device, by the main process alone. Of fewer images than a
    few batches some are classified again.
    """
    size = batch_size or default_batch_size(classifiers[0].device)
    batches = cut(np.resize(np.arange(len(images)), _BATCHES * size), size)
    with distributed.alone():
        return _in_turns(
            classifiers,
            lambda model: ((each.num_images, each.seconds) for each in stream([model], images, batches, size, workers)),
        )


def timed_on_noise(outputs: Sequence[Outputs], device: torch.device) -> list[Outputs]:
    """Load models as their outputs record them and time all together, in turns, on random pixels; says so.

    Raises:
        ValueError: a model cannot be had any more.
    """
    models = list[Classifier]()
    for record in (each.record for each in outputs):
        try:
            check_loading("its table", record.loaded_from, may_download=False)
            models.append(load_classifier(**record.loaded_from, device=device))
            if models[-1].key != record.weights:
                raise ValueError("another one lies there now")
        except (TypeError, OSError, ValueError) as error:
            raise ValueError(
                f"{record.model} cannot be timed ({error}), so neither --cost time nor money can be told: make its "
                "table again, or let step 4 run the models"
            ) from error
    found = _in_turns(models, _of_noise)
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


def _in_turns(classifiers: Sequence[Classifier], batches_of: Callable[[Classifier], Batches]) -> NDArray[np.float64]:
    found = np.empty((TURNS, len(classifiers)))
    for turn, k in tqdm([*np.ndindex(found.shape)], desc="timing", unit="turn", leave=False):
        timed, started = list[tuple[int, float]](), time.perf_counter()
        for batch in batches_of(classifiers[k]):
            timed.append(batch)
            if len(timed) > 1 and time.perf_counter() - started > _SECONDS:
                break
        counts, seconds = zip(*timed[1:], strict=True)  # in the first one processes start
        found[turn, k] = 1000 * sum(seconds) / sum(counts)
    return found


def _of_noise(classifier: Classifier) -> Batches:
    batch = torch.rand(default_batch_size(classifier.device), *classifier.input_size)
    for _ in range(_BATCHES):
        started = time.perf_counter()
        classifier.probabilities(batch).cpu()  # which waits for the device
        yield len(batch), time.perf_counter() - started
