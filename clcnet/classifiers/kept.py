"""One model over an image set, through the store: what was said before is read, what is missing is computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.classifiers.classes import Reading, choose_reading, telling_images
from clcnet.classifiers.classifier import Classifier, default_batch_size, versions
from clcnet.classifiers.decoding import REMARKS
from clcnet.classifiers.schedule import Indices, cut
from clcnet.classifiers.stream import Batch, stream
from clcnet.data.images import ImageSet, image_keys
from clcnet.data.outputs import UNKNOWN, Outputs, Record
from clcnet.data.store import KEY_BYTES, READ, UNREADABLE, Store
from clcnet.strangers import is_number


class Kept:
    """What the store in a folder knows of one classifier's answers to an image set. Of the main process alone.

    Attributes:
        targets: (N,) their classes as the classifier numbers them, once they are settled; UNKNOWN until then.
        places: (N,) where in the store an image's answer is kept, -1 where there is none.
        reasons: place of an image that this run could not read -> why.
        remarks: place of one of which the model sees less than there is -> what, of `REMARKS`.
        num_before: how many answers were there before this run.
    """

    def __init__(self, folder: Path, classifier: Classifier, images: ImageSet) -> None:
        self.classifier, self.images = classifier, images
        self.targets = np.full(len(images), UNKNOWN)
        self.store = Store(folder, classifier.run_key, classifier.num_classes)
        self._keys = image_keys(images).view(f"S{KEY_BYTES}").ravel()
        self.places, status = self.store.find(self._keys)
        self._failed = status == UNREADABLE
        self.reasons: dict[int, str] = {}
        remarked = np.flatnonzero((status > READ) & (status < READ + len(REMARKS)))
        self.remarks: dict[int, int] = dict(zip(remarked.tolist(), (status[remarked] - READ).tolist(), strict=True))
        self.num_before = int((self.places >= 0).sum())

    def known(self, indices: Indices) -> NDArray[np.bool_]:
        """Whether the store has answers to these images."""
        return self.places[indices] >= 0

    def missing(self, wanted: Indices, batch_size: int) -> list[Indices]:
        """Those of the images that have no answer yet, cut into batches.

        What an earlier run could not read is tried again, apart from the others: these are cut where a run that was
        never interrupted cuts them, and a model's answer may depend, in its last bit, on the batch that it stands in.
        """
        left = wanted[~self.known(wanted)]
        failed = self._failed[left]
        return cut(left[failed], batch_size) + cut(left[~failed], batch_size)

    def add(self, batch: Batch) -> None:
        """Keep a batch's answers."""
        if not len(batch.indices):
            return
        probs = np.zeros((len(batch.indices), self.classifier.num_classes), np.float32)
        probs[batch.readable] = batch.probs
        status = np.where(batch.readable, READ, UNREADABLE).astype(np.uint8)
        for place, remark in batch.remarks.items():
            status[batch.indices == place] += remark
        places = self.store.append(self._keys[batch.indices], status, probs)
        self.places[batch.answered] = places[batch.readable]
        self.reasons.update(batch.reasons)
        self.remarks.update(batch.remarks)

    def settle(self, readings: Sequence[Reading]) -> str:
        """Number the images' classes by the reading that fits the model's answers best; say how, where it is not plain.

        Args:
            readings: all that are possible; none leaves the classes unknown.
        """
        if not readings:
            return ""
        answered = np.flatnonzero(self.places >= 0)
        telling = answered[telling_images(readings, self.images.targets[answered])]
        top1 = self.store.probs(self.places[telling]).argmax(axis=1)
        reading, note = choose_reading(readings, self.images.targets[telling], top1)
        self.targets = reading.of(self.images.targets)
        return note

    def outputs(self, indices: Indices, order: Indices | None = None) -> Outputs:
        """What the model said of these images, all of which have an answer, its classes brought into this order."""
        probs = self.store.probs(self.places[indices])
        return Outputs.from_probs(
            probs if order is None else probs[:, order],
            [self.images.names[index] for index in indices],
            self.targets[indices],
            self.record,
        )

    @functools.cached_property
    def record(self) -> Record:
        """Where the outputs come from; the multiply-adds are counted once in the life of the store."""
        classifier = self.classifier
        if is_number(self.store.about.get("flops"), 1e-9, 1e9):  # a stranger may have left the store
            classifier.flops = float(self.store.about["flops"])
        else:
            self.store.remember(model=classifier.name, flops=classifier.flops)
        return Record(
            model=classifier.name,
            weights=classifier.key,
            flops=classifier.flops,
            class_names=classifier.label_names,
            preprocessing=classifier.data_config,
            device=classifier.device_name,
            versions=versions(),
            loaded_from=classifier.loaded_from,
        )

    def refuse_nothing_read(self) -> None:
        """Raise ValueError where no image at all has an answer."""
        if not (self.places >= 0).any():
            place, reason = next(iter(self.reasons.items()))
            raise ValueError(
                f"none of the {len(self.images)} images in {self.images.root} can be read "
                f"({self.images.names[place]}: {reason})"
            )


@contextlib.contextmanager
def kept_answers(folder: Path, classifier: Classifier, images: ImageSet) -> Iterator[Kept | None]:
    """What is kept of a classifier's answers, in the main process; None in the others of a torchrun."""
    kept = Kept(folder, classifier, images) if distributed.is_main() else None
    try:
        yield kept
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what was classified is kept in {folder}; the same command goes on from there"
        ) from None
    finally:
        if kept is not None:
            kept.store.close()


def classify_missing(
    kept: Kept | None,
    classifier: Classifier,
    images: ImageSet,
    wanted: Indices | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> tuple[float, float]:
    """Classify what the store lacks; every process of a torchrun calls this, the main one with `kept`.

    Args:
        wanted: places of the images that are wanted, in the main process; all of them when left out.

    Returns:
        Seconds that it took, and those of them that the model waited for images; 0 where nothing was missing.

    Raises:
        ValueError: of the wanted images none can be read; see `stream` for more.
    """
    batch_size = batch_size or default_batch_size(classifier.device)
    wanted = np.arange(len(images)) if wanted is None else wanted
    batches = distributed.broadcast(kept.missing(wanted, batch_size) if kept else None)
    num_missing = sum(map(len, batches))
    if kept and num_missing < len(wanted):
        print(f"{len(wanted) - num_missing} of {len(wanted)} images were classified before; see {kept.store.folder}")
    if not num_missing:
        return 0.0, 0.0
    spent = np.zeros(2)
    with tqdm(total=num_missing, unit="img", desc=Path(classifier.name).name, smoothing=0.1, disable=not kept) as bar:
        for found in stream([classifier], images, batches, batch_size, workers):
            assert kept is not None, "rounds are handed out in the main process"
            for batch in found.batches:
                kept.add(batch)
            spent += found.seconds, found.waited
            bar.update(found.num_images)
    if kept:
        kept.refuse_nothing_read()
    return float(spent[0]), float(spent[1])
