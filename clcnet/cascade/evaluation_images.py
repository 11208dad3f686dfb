"""Step 4 on images: what two models say of them. Each sees an image once, and none that the store knows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clcnet import distributed
from clcnet.cascade.evaluation import Evaluation, with_clcnet
from clcnet.classifiers.classes import class_readings
from clcnet.classifiers.classifier import Classifier
from clcnet.classifiers.decoding import sum_up_remarks
from clcnet.classifiers.kept import classify_missing, kept_answers
from clcnet.classifiers.timing import timed_on_images
from clcnet.cli import one_line
from clcnet.confidence import CLCNET
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs
from clcnet.metrics import Ints
from clcnet.network.model import CLCNet


def evaluation_of_images(
    images: ImageSet,
    load_model: Callable[[int], Classifier],
    networks: Sequence[CLCNet],
    threshold: float | None,
    given_flops: Sequence[float | None],
    store: Path,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Evaluation | None:
    """Run the shallow model on all images and the deep one on all, or on those that a single threshold defers.

    Args:
        images: with classes.
        load_model: makes the shallow classifier, 0, or the deep one, 1, which is not made if nothing is deferred to it.
        networks: of each fold; none where nothing is to be deferred.
        threshold: the only one of interest, or None for all; then the models are timed too.
        given_flops: by place, None where they are to be counted.
        store: where the models' answers are kept.
        batch_size, workers: images a batch and decoding processes; None for what suits.

    Returns:
        What was found in the main process, None in the others.
    """
    seen: list[Ints] = []  # places of the images that each model could read
    found: list[Outputs] = []
    models: list[Classifier] = []
    unreadable: dict[int, str] = {}
    asked = np.arange(len(images))
    with contextlib.ExitStack() as stack:
        for place, label in enumerate(("shallow model", "deep model")):
            models.append(load_model(place))
            readings = class_readings(images, models[-1])
            kept = stack.enter_context(kept_answers(store, models[-1], images))
            if kept:
                models[-1].flops = kept.record.flops  # type: ignore[assignment]  # it is known by now
                print(f"{label}: {models[-1].describe()}", flush=True)
            classify_missing(kept, models[-1], images, asked, batch_size, workers)
            if kept:
                for note in filter(None, (kept.settle(readings), sum_up_remarks(kept.remarks.values()))):
                    print(f"{label}: {one_line(note)}", flush=True)
                unreadable |= kept.reasons
                seen.append(asked[kept.known(asked)])
                outputs = kept.outputs(seen[-1])
                if given_flops[place] is not None:
                    outputs = replace(outputs, record=replace(outputs.record, flops=given_flops[place]))
                found.append(with_clcnet(outputs, images.folds[seen[-1]], networks))
                asked = seen[-1] if networks else seen[-1][:0]
                if networks and threshold is not None:
                    asked = asked[found[-1].scores[CLCNET] < threshold]
            asked = distributed.broadcast(asked)
            if not len(asked):
                break
    if not distributed.is_main():
        return None
    if threshold is None:
        both = np.intersect1d(seen[0], seen[-1])  # some may have been read by one model alone
        found = [each.subset(np.isin(places, both)) for each, places in zip(found, seen, strict=True)]
        seen = [both]
        found = timed_on_images(found, models, images, batch_size, workers)
    return Evaluation(found, images.folds[seen[0]], [model.name for model in models], unreadable, images)
