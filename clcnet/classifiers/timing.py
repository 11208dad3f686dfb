"""How long models take an image on this machine: measured together, in turns, the way a folder is classified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet.classifiers.classifier import Classifier, default_batch_size
from clcnet.classifiers.schedule import cut
from clcnet.classifiers.stream import stream
from clcnet.data.images import ImageSet

TURNS = 5
_BATCHES = 6  # a turn of one model, of which the first, in which processes start, does not count
_SECONDS = 4.0  # after which a turn ends, once two batches were timed


def milliseconds_together(
    classifiers: Sequence[Classifier], images: ImageSet, batch_size: int | None = None, workers: int | None = None
) -> NDArray[np.float64]:
    """Time all models in one go, one after the other and again, so that a busy moment of the machine hits all of them.

    In batches, decoding included, with the precision and layout that the models run with. Where the images are fewer
    than a few batches, some are classified more than once.

    Returns:
        (TURNS, K) milliseconds an image: a line a turn, so that ratios of two models can be taken within each.
    """
    size = batch_size or default_batch_size(classifiers[0].device)
    places = np.resize(np.arange(len(images)), _BATCHES * size)
    found = np.empty((TURNS, len(classifiers)))
    with tqdm(total=found.size, desc="timing", unit="turn", leave=False) as bar:
        for turn in range(TURNS):
            for k, classifier in enumerate(classifiers):
                bar.set_postfix_str(Path(classifier.name).name)
                found[turn, k] = _one_turn(classifier, images, places, size, workers)
                bar.update()
    return found


def _one_turn(
    classifier: Classifier, images: ImageSet, places: NDArray[np.int64], size: int, workers: int | None
) -> float:
    count, seconds, started = 0, 0.0, time.perf_counter()
    for number, found in enumerate(stream([classifier], images, cut(places, size), batch_size=size, workers=workers)):
        if number:
            count, seconds = count + found.num_images, seconds + found.seconds
        if number > 1 and time.perf_counter() - started > _SECONDS:
            break
    return 1000 * seconds / count
