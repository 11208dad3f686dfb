"""How long models take an image on this machine, and `--fast`: the quickest way to run one here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier, default_batch_size, load_classifier
from clcnet.classifiers.model_config import check_loading
from clcnet.classifiers.schedule import Task, cut
from clcnet.classifiers.stream import Stage, stream
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs

TURNS = 5
_BATCHES = 6  # a turn of one model, of which the first does not count
_SECONDS = 4.0  # after which a turn ends, once one batch was timed
_TRIED: dict[str, Any] = {"channels_last": True, "amp": torch.bfloat16, "compile": True}  # by --fast
_BATCHES_TRIED = 4
_AGREEMENT = 0.999
_LEAST_GAIN = 1.02  # what gains less may be chance
Batches = Iterator[tuple[int, float]]  # images and seconds of each


def timed_on_images(
    outputs: Sequence[Outputs],
    classifiers: Sequence[Classifier],
    images: ImageSet,
    batch_size: int | None = None,
    workers: int | None = None,
) -> list[Outputs]:
    """Time all models in batches, decoding included, as they run over a folder, and enter it into their outputs.

    On one device, by the main process alone. Of fewer images than a few batches some are classified again.
    """
    size = batch_size or default_batch_size(classifiers[0].device)
    batches = cut(np.resize(np.arange(len(images)), _BATCHES * size), size)

    def of_images(model: Classifier) -> Batches:
        return ((each.num_images, each.seconds) for each in stream([model], images, batches, size, workers))

    with distributed.alone():
        return _timed(outputs, classifiers, of_images, size, "reading included")


def timed_on_noise(outputs: Sequence[Outputs], device: torch.device) -> list[Outputs]:
    """Load models as their outputs record them, time all on random pixels, and enter it into their outputs.

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
    return _timed(outputs, models, _of_noise, default_batch_size(device), "random pixels without reading")


def _timed(
    outputs: Sequence[Outputs],
    classifiers: Sequence[Classifier],
    batches_of: Callable[[Classifier], Batches],
    batch_size: int,
    images: str,
) -> list[Outputs]:
    """Enter each model's median time into its record, and how it was taken; print both, with the least and the most."""
    timed, words = list[Outputs](), list[str]()
    for each, model, times in zip(outputs, classifiers, _in_turns(classifiers, batches_of).T, strict=True):
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
    """Milliseconds an image (TURNS, K), in turns, so that a busy moment of the machine hits all models."""
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


def fastest(classifier: Classifier, images: ImageSet, batch_size: int | None = None) -> Classifier:
    """Try channels last, bfloat16 and compiling, one on top of the other, on some images; take what gains, and say so.

    A setting is taken if it is quicker and top-1 is that of the plain model on at least 99.9% of these images. Every
    process of a torchrun calls this; the main one tries and chooses.
    """
    chosen: dict[str, Any] = {}
    if distributed.is_main():
        size = batch_size or default_batch_size(classifier.device)
        places = np.unique(np.linspace(0, len(images) - 1, _BATCHES_TRIED * size).astype(int))
        dataset = Stage(classifier, images, size).dataset
        batches = [torch.stack([dataset[place][0] for place in batch.tolist()]) for batch in cut(places, size)]
        plain, before = _run(classifier, images, size, batches)
        best, agreement = before, 1.0
        for name, value in _TRIED.items():
            try:
                top1, seconds = _run(replace(classifier, **chosen | {name: value}), images, size, batches)
            except ValueError:  # it cannot be compiled here
                continue
            agrees = float((top1 == plain).mean())
            if seconds * _LEAST_GAIN < best and agrees >= _AGREEMENT:
                chosen[name], best, agreement = value, seconds, agrees
        words = replace(classifier, **chosen).describe_run() if chosen else "nothing gains"
        print(
            f"--fast: {words}; {before / best:.2f} times as fast on {len(places)} images, {agreement:.2%} of "
            "them with the same top-1"
        )
    return replace(classifier, **distributed.broadcast(chosen))  # which lays out the model that they all share anew


def _run(classifier: Classifier, images: ImageSet, size: int, batches: list[torch.Tensor]) -> tuple[np.ndarray, float]:
    """Top-1 of all images, and seconds of the quickest batch."""
    stage, found, seconds = Stage(classifier, images, size), [], []
    for batch in itertools.chain(batches[:1], batches):  # the first sets up
        started = time.perf_counter()
        answers = stage.launch(Task(0, np.arange(len(batch))), batch, {}, {})()
        seconds.append((time.perf_counter() - started) / len(batch))
        found.append(answers.probs.argmax(axis=1))
    return np.concatenate(found[1:]), min(seconds[1:])
