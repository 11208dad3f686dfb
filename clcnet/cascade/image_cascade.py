"""The whole cascade on images: `Cascade`, for a service to hold, and its run over the images of a folder.

from clcnet import Cascade, CLCNet
from clcnet.classifiers.classifier import load_classifier

shallow = load_classifier("tf_efficientnet_b0.aa_in1k")
deep = load_classifier("tf_efficientnet_b4.aa_in1k")
cascade = Cascade(shallow, deep, CLCNet.load("weights/CLCNet_custom_data.zip"), threshold=0.5)
labels, confidences, answered_by = cascade(["cat.jpg", "dog.jpg"])  # paths or PIL images
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import adapt_to_chs
from torch import nn

from clcnet import distributed
from clcnet.cascade.deep_offset import shifted
from clcnet.cascade.predictions import STAGE_NAMES, decide
from clcnet.cascade.schedule import DEEP, NOTHING, SHALLOW, Outcome, Schedule, Task, is_deferred
from clcnet.classifiers.classifier import (
    Classifier,
    HalvingForward,
    ImageDataset,
    ReadImages,
    collate,
    default_batch_size,
    default_workers,
    loaded_batches,
    read_image,
)
from clcnet.data.images import ImageSet
from clcnet.data.table import sort_probs

Picture = Image.Image | str | os.PathLike[str]


class Confidence(Protocol):
    """What judges an answer: `CLCNet`, or anything with its `predict`."""

    def predict(self, probs: np.ndarray) -> np.ndarray:
        """Sorted probabilities (B, C) -> (B,) confidence that the first is right."""


class Predictions(NamedTuple):
    """What a cascade says about B images.

    Attributes:
        labels: (B,) int64 class index.
        confidences: (B,) float32 confidence of that answer.
        answered_by: (B,) int64, 0 where the shallow model's answer stands and 1 where the deep model's does.
    """

    labels: np.ndarray
    confidences: np.ndarray
    answered_by: np.ndarray


class Cascade:
    """A shallow model that answers every image and a deep one for those whose confidence is below a threshold.

    The deep answer stands where it is the surer of the two (arXiv:2205.09612), after a head start if it is given one
    (`clcnet.cascade.deep_offset`). Several threads may share one cascade: calls change nothing inside but the number of
    images at once, which shrinks when memory runs out.
    """

    def __init__(
        self,
        shallow: Classifier | tuple[nn.Module, Callable[[Image.Image], torch.Tensor]],
        deep: Classifier | tuple[nn.Module, Callable[[Image.Image], torch.Tensor]],
        clcnet: Confidence,
        threshold: float,
        batch_size: int | None = None,
        deep_offset: float = 0.0,
    ) -> None:
        """Put the parts together.

        Args:
            shallow: from `load_classifier`, or a model that returns logits with the transform of its images.
            deep: likewise, for the same classes.
            clcnet: the confidence network, for both models' answers.
            threshold: images whose confidence is below it go to the deep model; -inf never asks it, inf always.
            batch_size: images at once in a call; by default what suits the device.
            deep_offset: the deep model's head start in log-odds; its confidences include it.

        Raises:
            ValueError: the models have different classes, the threshold or the offset is not a number, or a batch would
                be empty.
        """
        if np.isnan(threshold):
            raise ValueError("the threshold is NaN; give a number, inf or -inf")
        if not np.isfinite(deep_offset):
            raise ValueError(f"deep_offset is {deep_offset}; give a finite number, 0 for none")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more, or None")
        self.shallow = shallow if isinstance(shallow, Classifier) else _PlainModel(*shallow)
        self.deep = deep if isinstance(deep, Classifier) else _PlainModel(*deep)
        self.clcnet = clcnet
        self.threshold, self.deep_offset = float(threshold), float(deep_offset)
        self.batch_size = batch_size or default_batch_size(self.shallow.device)
        self._forwards = [HalvingForward(model, self.batch_size) for model in (self.shallow, self.deep)]
        self._deep_to_shallow = _match_classes(self.shallow, self.deep)

    def __call__(self, images: Sequence[Picture]) -> Predictions:
        """Classify PIL images or image files.

        Args:
            images: a list of them, paths and pictures mixed as you like, of any size and mode. Orientation tags are not
                heeded, as in timm.

        Raises:
            TypeError: a single image instead of a list, or something else in the list.
            OSError, ValueError: an image is missing, cannot be read, or gets no answer; the message names it. None of
                the list is answered then.
            MemoryError: not even one image fits into memory.
        """
        if isinstance(images, Image.Image | str | os.PathLike):
            raise TypeError(f"a cascade takes a list of images; give [{images!r}]")
        named = [(_name(image, place), image) for place, image in enumerate(images, start=1)]
        labels, confidences = self._ask(SHALLOW, named)
        deferred = np.flatnonzero(is_deferred(confidences, self.threshold))
        deep_labels, deep_confidences = np.zeros_like(labels), np.full_like(confidences, -np.inf)
        deep_labels[deferred], deep_confidences[deferred] = self._ask(DEEP, [named[index] for index in deferred])
        answered_by, _ = decide(confidences, deep_confidences, self.threshold)
        kept = answered_by == DEEP
        return Predictions(
            np.where(kept, deep_labels, labels), np.where(kept, deep_confidences, confidences), answered_by
        )

    def judge(self, stage: int, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn a model's probabilities into answers.

        Args:
            stage: SHALLOW or DEEP, which model they come from.
            probs: (B, C) in that model's own order of classes.

        Returns:
            top1 (B,) int64 as the shallow model numbers the classes, confidence (B,) float32.

        Raises:
            ValueError: there is a deep offset, and the confidences are no probabilities.
        """
        sorted_probs, _, top1 = sort_probs(probs, np.zeros(len(probs), np.int64))
        confidence = np.asarray(self.clcnet.predict(sorted_probs))
        if stage == DEEP and self.deep_offset:
            confidence = shifted(confidence, self.deep_offset)
        if stage == DEEP and self._deep_to_shallow is not None:
            top1 = self._deep_to_shallow[top1]
        return top1, confidence.astype(np.float32, copy=False)

    def _ask(self, stage: int, named: Sequence[tuple[str, Picture]]) -> tuple[np.ndarray, np.ndarray]:
        model = (self.shallow, self.deep)[stage]
        answers = [(np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for start in range(0, len(named), self.batch_size):
            batch = named[start : start + self.batch_size]
            probs = self._forwards[stage](torch.stack([_prepare(image, name, model) for name, image in batch]))
            _check_finite(probs, stage, [name for name, _ in batch])
            answers.append(self.judge(stage, probs))
        labels, confidences = zip(*answers, strict=True)
        return np.concatenate(labels), np.concatenate(confidences)


class _PlainModel:
    """A model and its transform, with the part of `Classifier` that a cascade needs."""

    num_classes = None
    label_names = None
    label_names_inferred = False
    image_mode = "RGB"
    input_size = (3, 0, 0)  # only the transform knows

    def __init__(self, model: nn.Module, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.model = model.eval()
        self.name = type(model).__name__
        self.transform = transform
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(batch.to(self.device))
        return logits.float().softmax(dim=-1)


def _name(image: Picture, place: int) -> str:
    """What to call an image in a message: its file, or which of the list it is, counted from 1."""
    if isinstance(image, Image.Image):
        return f"{place} of the list"
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    raise TypeError(f"a cascade takes PIL images and paths; image {place} of the list is a {type(image).__name__}")


def _prepare(image: Picture, name: str, model: Classifier | _PlainModel) -> torch.Tensor:
    try:
        picture = read_image(image, model.image_mode, model.input_size)
    except Exception as error:  # PIL's decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        if isinstance(error, OSError) and name in str(error):
            raise
        raise ValueError(f"image {name} cannot be read ({error})") from error
    return model.transform(picture)


def _check_finite(probs: np.ndarray, stage: int, names: Sequence[str]) -> None:
    broken = ~np.isfinite(probs).all(axis=1)
    if broken.any():
        raise ValueError(
            f"image {names[broken.argmax()]}: the {STAGE_NAMES[stage]} model's answer is not a number; check its "
            "weights, or run without mixed precision (--amp)"
        )


def _match_classes(shallow: Classifier | _PlainModel, deep: Classifier | _PlainModel) -> np.ndarray | None:
    """The shallow model's number of each of the deep model's classes, or None where both number them alike."""
    if None not in (shallow.num_classes, deep.num_classes) and shallow.num_classes != deep.num_classes:
        raise ValueError(
            f"the shallow model has {shallow.num_classes} classes and the deep one {deep.num_classes}; "
            "a cascade needs two models of the same classes"
        )
    ours, theirs = shallow.label_names, deep.label_names
    if ours is None or theirs is None or ours == theirs:
        return None
    missing = sorted(set(theirs) - set(ours))
    if missing and (shallow.label_names_inferred or deep.label_names_inferred):
        # ImageNet's names, which timm guesses from the number of classes, say nothing about a model of others
        return None
    if missing:
        raise ValueError(
            f"the deep model's class {missing[0]!r} is not among the shallow model's; "
            "a cascade needs two models of the same classes"
        )
    place = {name: index for index, name in enumerate(ours)}
    return np.array([place[name] for name in theirs], np.int64)


def stream(
    cascade: Cascade,
    images: ImageSet,
    batch_size: int | None = None,
    workers: int | None = None,
    done: Iterable[Outcome] = (),
) -> Iterator[Outcome]:
    """Run a cascade of two `Classifier`s over all images; every process of a torchrun calls this and gets all outcomes.

    One set of worker processes reads for both models, batch by batch in the order that `Schedule` sets, so images for
    the deep model are decoded while the shallow model computes. Only a few batches are in memory at a time, whatever
    the number of images.

    Args:
        cascade: its threshold decides which images are deferred.
        images: the images.
        batch_size: images a batch of either model; by default what suits the device.
        workers: processes that decode; 0 decodes in this process; by default what suits the machine.
        done: outcomes of an interrupted run, in order; their batches are not run again.

    Yields:
        What came of each batch, in the schedule's order.
    """
    batch_size = batch_size or cascade.batch_size
    schedule = Schedule(
        len(images), (batch_size, batch_size), cascade.threshold, distributed.rank(), distributed.world_size()
    )
    for outcome in done:
        schedule.restore(outcome)
    stages = [_StageRunner(cascade, stage, images, batch_size) for stage in (SHALLOW, DEEP)]
    given: deque[Task] = deque()
    loader = torch.utils.data.DataLoader(
        _BothStages([stage.dataset for stage in stages]),
        batch_sampler=_give(schedule, given),
        collate_fn=_collate,
        num_workers=default_workers() if workers is None else workers,
        pin_memory=cascade.shallow.device.type == "cuda",
    )
    started = time.perf_counter()
    for pixels, read in loaded_batches(loader):
        task = given.popleft()
        outcome = stages[task.stage].run(task, pixels, read) if task.stage != NOTHING else _no_outcome(task)
        now = time.perf_counter()
        outcome.seconds, started = now - started, now
        for shared in distributed.broadcast(distributed.gather(outcome)):
            schedule.add(shared)
            yield shared


def _give(schedule: Schedule, given: deque[Task]) -> Iterator[list[tuple[int, int]]]:
    """The schedule as DataLoader takes it, called lazily from the loop that also adds the outcomes."""
    for task in schedule:
        given.append(task)
        yield [(task.stage, index) for index in task.indices]


class _BothStages(torch.utils.data.Dataset[tuple[torch.Tensor, int, str, str]]):
    """All images as each of the stages sees them, by stage and place."""

    def __init__(self, datasets: list[ImageDataset]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, str, str]:
        stage, place = key
        return self.datasets[stage][place]


def _collate(batch: list[tuple[torch.Tensor, int, str, str]]) -> tuple[torch.Tensor, ReadImages]:
    return collate(batch) if batch else (torch.empty(0), ReadImages(np.zeros(0, np.int64), {}, {}))


def _no_outcome(task: Task) -> Outcome:
    return Outcome(task, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


class _StageRunner:
    """One model of a cascade with its images."""

    def __init__(self, cascade: Cascade, stage: int, images: ImageSet, batch_size: int) -> None:
        classifier = (cascade.shallow, cascade.deep)[stage]
        assert isinstance(classifier, Classifier), "a folder is streamed through timm models only"
        self.cascade, self.stage, self.device = cascade, stage, classifier.device
        self.dataset = ImageDataset(images, classifier)
        self.dataset.transform = create_transform(**classifier.data_config, is_training=False, use_prefetcher=True)
        self.forward = HalvingForward(classifier, batch_size)
        self.mean, self.std = (self._per_channel(classifier.data_config, name) for name in ("mean", "std"))

    def _per_channel(self, data_config: dict[str, Any], name: str) -> torch.Tensor:
        """In the units of the pixels, as timm's own loader has them."""
        values = adapt_to_chs(data_config[name], data_config["input_size"][0])
        return torch.tensor([value * 255 for value in values], device=self.device).view(1, -1, 1, 1)

    def run(self, task: Task, pixels: torch.Tensor, read: ReadImages) -> Outcome:
        """Classify a batch.

        Args:
            task: which images they are.
            pixels: (B, channels, height, width) uint8.
            read: which of them could be read.
        """
        readable = read.readable
        batch = pixels.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        indices = np.array(task.indices, np.int64)
        probs = self.forward(batch)[readable]
        _check_finite(probs, self.stage, [self.dataset.path(index) for index in indices[readable]])
        top1, confidence = self.cascade.judge(self.stage, probs)
        return Outcome(task, indices[readable], top1, confidence, tuple(read.reasons.items()))
