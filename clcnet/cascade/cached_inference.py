"""Running both models over an image set, each at most once an image, through the cache of their outputs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clcnet import distributed
from clcnet.cascade.curve import Stage
from clcnet.cascade.evaluation import Outputs, Pair, fold_confidence
from clcnet.classifiers.classes import answers_to, settled_classes
from clcnet.classifiers.classifier import Classifier, classify, measure_milliseconds
from clcnet.data.cache import OutputCache
from clcnet.data.images import ImageSet
from clcnet.network.model import CLCNet

_IMAGES_A_ROUND = 4096  # of one process; what several processes found is brought together after each round
_GPU_TIMING_BATCH = 64

LoadModel = Callable[[int], Classifier]  # the model of a stage


@dataclass(frozen=True)
class Options:
    """How the models run: images a batch and decoding processes, None for what suits the machine."""

    cache: Path
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
        answers = answers_to(images, classifier, options.batch_size, options.workers)
        self.targets, note = settled_classes(images, classifier, answers)
        if note and distributed.is_main():
            print(f"{label}: {note}", flush=True)
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

    def outputs(self, indices: NDArray[np.int64]) -> Outputs:
        """What the model said about images that it has seen."""
        return Outputs.from_probs(np.asarray(self.cache.probs[indices]), self.targets[indices])

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


def pair_from_images(
    images: ImageSet,
    load_model: LoadModel,
    networks: Sequence[CLCNet] | None,
    threshold: float | None,
    given_flops: Sequence[float | None],
    options: Options,
) -> Pair | None:
    """Run the shallow model on all images and the deep one on all, or on those that a single threshold defers.

    Args:
        images: with classes.
        load_model: makes the classifier of a stage; the deep one is not made if nothing is deferred to it.
        networks: the five CLCNets; None where nothing is to be deferred.
        threshold: the only one of interest, or None for all.
        given_flops: by stage, None where they are to be counted.
        options: how to run.

    Returns:
        The pair in the main process, None in the others.
    """
    with contextlib.ExitStack() as stack:
        shallow = stack.enter_context(_cached_model("shallow model", load_model(0), images, options))
        shallow.classify(np.arange(len(images)))
        answered, confidence = distributed.broadcast(_judge(shallow, networks) if distributed.is_main() else None)
        deferred = confidence < (np.inf if threshold is None else threshold)
        deep = None
        if deferred.any():
            classifier, deep = load_model(1), shallow
            if classifier.key != shallow.classifier.key:  # else an entry of the cache would be opened twice
                deep = stack.enter_context(_cached_model("deep model", classifier, images, options))
            deep.classify(answered[deferred])
        if not distributed.is_main():
            return None
        if deep is None:
            return _shallow_alone(shallow, answered, given_flops)
        assert networks is not None
        known = deep.cache.done[answered]
        kept = known | ~deferred  # without those that the deep model should have seen and could not read
        return _both(
            shallow, deep, answered[kept], confidence[kept], known[kept], networks, given_flops, threshold is None
        )


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


def _judge(shallow: CachedModel, networks: Sequence[CLCNet] | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The images that could be read, and how sure CLCNet is of the shallow answers: two (N,) arrays."""
    answered = np.flatnonzero(shallow.cache.done)
    if not len(answered):
        index, reason = next(iter(shallow.unreadable.items()))
        images = shallow.images
        raise ValueError(
            f"none of the {len(images)} images in {images.root} can be read ({images.names[index]}: {reason})"
        )
    if networks is None:
        return answered, np.full(len(answered), np.inf)
    return answered, fold_confidence(networks, shallow.outputs(answered), shallow.images.folds[answered])


def _shallow_alone(shallow: CachedModel, answered: NDArray[np.int64], given_flops: Sequence[float | None]) -> Pair:
    flops = given_flops[0] or shallow.flops()
    correct = shallow.outputs(answered).correct
    surest = np.full(len(answered), np.inf)
    stages = [Stage(surest, correct, flops), Stage(-surest, np.zeros(len(answered)), given_flops[1] or 0.0)]
    folds = shallow.images.folds[answered]
    return Pair([shallow.classifier.name, "--"], stages, None, folds, unreadable=shallow.unreadable)


def _both(
    shallow: CachedModel,
    deep: CachedModel,
    answered: NDArray[np.int64],
    confidence: NDArray[np.float64],
    known: NDArray[np.bool_],
    networks: Sequence[CLCNet],
    given_flops: Sequence[float | None],
    timed: bool,
) -> Pair:
    folds = shallow.images.folds[answered]
    outputs = [shallow.outputs(answered), deep.outputs(answered[known])]
    deep_confidence, deep_correct = np.full(len(answered), -np.inf), np.zeros(len(answered), dtype=bool)
    deep_confidence[known] = fold_confidence(networks, outputs[1], folds[known])
    deep_correct[known] = outputs[1].correct
    stages = [
        Stage(confidence, outputs[0].correct, given_flops[0] or shallow.flops()),
        Stage(deep_confidence, deep_correct, given_flops[1] or deep.flops()),
    ]
    return Pair(
        [shallow.classifier.name, deep.classifier.name],
        stages,
        outputs if known.all() else None,
        folds,
        [shallow.milliseconds(), deep.milliseconds()] if timed else None,
        shallow.unreadable | deep.unreadable,
    )
