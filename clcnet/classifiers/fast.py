"""`--fast`: the quickest way to run a model on this machine whose answers are still the model's."""

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier, default_batch_size
from clcnet.classifiers.schedule import Task, cut
from clcnet.classifiers.stream import Stage
from clcnet.data.images import ImageSet

_TRIED: dict[str, Any] = {"channels_last": True, "amp": torch.bfloat16, "compile": True}
_BATCHES = 4
_AGREEMENT = 0.999
_LEAST_GAIN = 1.02  # what gains less may be chance


def fastest(classifier: Classifier, images: ImageSet, batch_size: int | None = None) -> Classifier:
    """Try channels last, bfloat16 and compiling, one on top of the other, on some images; take what gains, and say so.

    A setting is taken if it is quicker and top-1 is that of the plain model on at least 99.9% of these images. Every
    process of a torchrun calls this; the main one tries and chooses.
    """
    chosen: dict[str, Any] = {}
    if distributed.is_main():
        size = batch_size or default_batch_size(classifier.device)
        places = np.unique(np.linspace(0, len(images) - 1, _BATCHES * size).astype(int))
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
