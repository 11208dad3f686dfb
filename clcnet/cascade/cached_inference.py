"""Running the models over an image set, each at most once an image, through the cache of their outputs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.cascade.evaluation import Evaluation, folds_by_name, judge
from clcnet.cascade.rule import CLCNET, Judged
from clcnet.classifiers.classifier import Classifier, class_indices, classify, measure_milliseconds
from clcnet.data.cache import OutputCache
from clcnet.data.images import ImageSet
from clcnet.data.outputs import Outputs, Record
from clcnet.network.model import CLCNet

_IMAGES_A_ROUND = 4096  # of one process; what several processes found is brought together after each round
_GPU_TIMING_BATCH = 64

LoadModel = Callable[[int], Classifier]  # the model of a place in the cascade


@dataclass(frozen=True)
class Options:
    """How the models run: images a batch and decoding processes, None for what suits the machine."""

    cache: Path
    by_position: bool = False
    batch_size: int | None = None
    workers: int | None = None


class CachedModel:
    """One model over an image set: only images that the cache lacks are classified.

    With several processes, the main one keeps the cache and tells the others what is missing; each answers its share.
    """

    def __init__(
        self, label: str, classifier: Classifier, images: ImageSet, cache: OutputCache | None, options: Options
    ) -> None:
        self.label, self.classifier, self.images, self.options = label, classifier, images, options
        self.targets = class_indices(images, classifier, by_position=options.by_position)
        self._cache = cache
        self.unreadable: dict[int, str] = {}

    @property
    def cache(self) -> OutputCache:
        assert self._cache is not None, "only the main process keeps the cache"
        return self._cache

    def classify(self, indices: NDArray[np.int64]) -> None:
        """Fill the cache for these images; those that cannot be read are noted in `unreadable`."""
        missing = distributed.broadcast(self.cache.missing(indices) if self._cache else None)
        size = _IMAGES_A_ROUND * distributed.world_size()
        quiet = self._cache is None or not len(missing)
        with tqdm(total=len(missing), desc=self.label, unit="img", disable=quiet) as progress:
            for start in range(0, len(missing), size):
                share = missing[start : start + size][distributed.rank() :: distributed.world_size()]
                self._classify_share(share, progress)

    def _classify_share(self, share: NDArray[np.int64], progress: "tqdm[Any]") -> None:
        answers = classify(
            self.classifier,
            self.images,
            share,
            self.options.batch_size,
            self.options.workers,
            on_unreadable=self.unreadable.__setitem__,
        )
        if distributed.world_size() == 1:
            for indices, probs in answers:
                self._store(indices, probs)
                progress.update(len(indices))
            return
        found = [(indices, probs) for indices, probs in answers if len(indices)]
        for batches, unreadable in distributed.gather((found, self.unreadable)) or []:
            self.unreadable |= unreadable
            for indices, probs in batches:
                self._store(indices, probs)
                progress.update(len(indices))

    def _store(self, indices: NDArray[np.int64], probs: NDArray[np.float32]) -> None:
        broken = ~np.isfinite(probs).all(1)
        if broken.any():
            raise ValueError(
                f"image {self.images.path(indices[broken.argmax()])}: the answer of {self.classifier.name} is not a "
                "number; check its weights, or run without --amp"
            )
        self.cache.store(indices, probs)

    def outputs(self, indices: NDArray[np.int64], flops: float | None, timed: bool) -> Outputs:
        """What the model said about images that it has seen; FLOPs are counted where they are not given."""
        milliseconds = self.milliseconds() if timed else None
        record = Record(self.classifier.name, flops=flops or self.flops(), milliseconds=milliseconds)
        names = [self.images.names[index] for index in indices]
        return Outputs.from_probs(np.asarray(self.cache.probs[indices]), names, self.targets[indices], record)

    def flops(self) -> float:
        """Multiply-adds in billions, counted once in the life of the cache."""
        return self._remembered("flops", lambda: self.classifier.flops)

    def milliseconds(self) -> float:
        """Time an image on this device: one at a time on a CPU, in batches elsewhere. Measured once."""
        device = self.classifier.device
        batch_size = 1 if device.type == "cpu" else self.options.batch_size or _GPU_TIMING_BATCH
        key = f"milliseconds on {device} at batch size {batch_size}"
        return self._remembered(key, lambda: measure_milliseconds(self.classifier, batch_size))

    def _remembered(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.cache.about:
            self.cache.remember(**{"model": self.classifier.name, key: measure()})
        return float(self.cache.about[key])


def evaluation_of_images(
    images: ImageSet,
    load_model: LoadModel,
    networks: Sequence[CLCNet],
    threshold: float | None,
    given_flops: Sequence[float | None],
    options: Options,
) -> Evaluation | None:
    """Run the shallow model on all images and the deep one on all, or on those that a single threshold defers.

    Args:
        images: with classes.
        load_model: makes the classifier of a place; the deep one is not made if nothing is deferred to it.
        networks: of each fold; none where nothing is to be deferred.
        threshold: the only one of interest, or None for all.
        given_flops: by place, None where they are to be counted.
        options: how to run.

    Returns:
        What was found in the main process, None in the others.
    """
    timed = threshold is None
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(_cached_model("shallow model", load_model(0), images, options))]
        models[0].classify(np.arange(len(images)))
        found: list[Judged] = []
        deferred = None
        if distributed.is_main():
            found.append(_answers(models[0], given_flops[0], timed, networks))
            confidence = found[0].scores.get(CLCNET)
            answered = np.flatnonzero(models[0].cache.done)
            limit = np.inf if threshold is None else threshold
            deferred = answered[:0] if confidence is None else answered[confidence < limit]
        deferred = distributed.broadcast(deferred)
        if len(deferred):
            classifier = load_model(1)
            models.append(models[0])
            if classifier.key != models[0].classifier.key:  # else an entry of the cache would be opened twice
                models[1] = stack.enter_context(_cached_model("deep model", classifier, images, options))
            models[1].classify(deferred)
            if distributed.is_main():
                found.append(_answers(models[1], given_flops[1], timed, networks, deferred))
        if not distributed.is_main():
            return None
        unreadable = {index: reason for model in models for index, reason in model.unreadable.items()}
        if timed and found[0].names != found[-1].names:  # some were read by one model alone
            both = set(found[0].names) & set(found[-1].names)
            found = [each.subset(np.array([name in both for name in each.names])) for each in found]
        folds = folds_by_name(found[0].names, images)
        return Evaluation(found, folds, [model.classifier.name for model in models], unreadable)


def _answers(
    model: CachedModel,
    flops: float | None,
    timed: bool,
    networks: Sequence[CLCNet],
    asked: NDArray[np.int64] | None = None,
) -> Judged:
    """What a model said of the images that it was asked about and could be read, in their order."""
    done = model.cache.done if asked is None else np.isin(np.arange(len(model.images)), asked) & model.cache.done
    answered = np.flatnonzero(done)
    if not len(answered) and asked is None:
        images, (index, reason) = model.images, next(iter(model.unreadable.items()))
        raise ValueError(
            f"none of the {len(images)} images in {images.root} can be read ({images.names[index]}: {reason})"
        )
    return judge(model.outputs(answered, flops, timed), model.images, networks)


@contextlib.contextmanager
def _cached_model(label: str, classifier: Classifier, images: ImageSet, options: Options) -> Iterator[CachedModel]:
    if not distributed.is_main():
        yield CachedModel(label, classifier, images, None, options)
        return
    with OutputCache.open(options.cache, classifier.key, images, classifier.num_classes) as cache:
        model = CachedModel(label, classifier, images, cache, options)
        classifier.flops = model.flops()
        print(f"{label}: {classifier.describe()}", flush=True)
        yield model
