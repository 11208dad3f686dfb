"""Images through one model or several, batch by batch: decoded by worker processes, shared among those of a torchrun.

One set of decoding processes reads for all models in the order that `Schedule` sets, so images for a later model are
decoded while an earlier one computes. Only a few batches are in memory at a time, whatever the number of images.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.loader import adapt_to_chs

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier, HalvingForward
from clcnet.classifiers.decoding import DecodedImages, ImageDataset, Loaded, collate, default_workers, loaded_batches
from clcnet.classifiers.schedule import Entering, Indices, Schedule, Task, later_batch_size
from clcnet.data.images import ImageSet

_LEAST_SECONDS, _LEAST_WAITING = 10, 0.2
PREFETCH = 2  # batches that each decoding process reads ahead


@dataclass(frozen=True)
class Batch:
    """What a model said about a batch.

    Attributes:
        stage: the model's number.
        indices: (B,) places of the images in the list.
        readable: (B,) whether an image could be read, as A of them could.
        probs: (A, C) float32, in the model's own order of classes.
        reasons: place of an image that could not be read -> why.
        remarks: place of one of which the model sees less than there is -> what, of `REMARKS`.
    """

    stage: int
    indices: Indices
    readable: NDArray[np.bool_]
    probs: NDArray[np.float32]
    reasons: dict[int, str]
    remarks: dict[int, int] = field(default_factory=dict)

    @property
    def answered(self) -> Indices:
        """(A,) places of the images that could be read."""
        return self.indices[self.readable]


@dataclass(frozen=True)
class Round:
    """One batch from every process, all by the same model; seconds since the round before, and waiting for images."""

    batches: list[Batch]
    seconds: float
    waited: float = 0.0

    @property
    def stage(self) -> int:
        """The model's number, or NOTHING."""
        return self.batches[0].stage

    @property
    def num_images(self) -> int:
        """Images of all processes' batches."""
        return sum(len(batch.indices) for batch in self.batches)


def stream(
    classifiers: Sequence[Classifier],
    images: ImageSet,
    first: Sequence[Indices],
    batch_size: int,
    workers: int | None = None,
    decide: Callable[[Batch], Entering] = lambda batch: (),
    waiting: Entering = (),
) -> Iterator[Round]:
    """Run images through models; every process of a torchrun calls this and runs through it.

    Args:
        classifiers: in the order in which an image sees them.
        images: those of which places are given.
        first: batches of the first model.
        batch_size: images a batch of the first model.
        workers: processes that decode; 0 decodes in this process; by default what suits the machine.
        decide: called in the main process for every batch, in order; says which images are to see which model next.
        waiting: images that are to see a later model from the start.

    Yields:
        In the main process what came of each round, in the schedule's order; elsewhere nothing.

    Raises:
        ValueError: a model's answer is not a number.
        MemoryError: a single image does not fit into memory.
        ChildProcessError: a decoding process died.
    """
    sizes = [batch_size] + [later_batch_size(batch_size)] * (len(classifiers) - 1)
    decoded = DecodedImages() if len(classifiers) > 1 else None
    stages = [Stage(classifier, images, size, decoded) for classifier, size in zip(classifiers, sizes, strict=True)]
    if workers is None:
        largest = max(math.prod(classifier.input_size) for classifier in classifiers)
        workers = default_workers(PREFETCH * batch_size * largest)
    distributed.check_agreement(
        {
            "models": [classifier.run_key for classifier in classifiers],
            "number of images": len(images),
            "images": hashlib.blake2b("\0".join(images.files).encode(errors="surrogateescape")).hexdigest()[:16],
            "batch size": batch_size,
        }
    )
    asynchronous = any(_computes_apart(classifier.device) for classifier in classifiers)
    asked_ahead = distributed.gather(workers * PREFETCH + 1 + asynchronous)
    ahead = distributed.broadcast(max(asked_ahead) if asked_ahead else None)
    ranks = distributed.rank(), distributed.world_size()
    schedule = Schedule(first, len(classifiers), sizes[-1], *ranks, ahead, waiting)
    given: deque[Task] = deque()
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([stage.dataset for stage in stages]),
        batch_sampler=_give(schedule, given, len(images)),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=asynchronous,
    )
    rounds = _rounds(stages, schedule, given, loaded_batches(loader), decide, decoded, asynchronous)
    try:
        yield from rounds
    finally:
        if decoded:
            decoded.close()


def _rounds(
    stages: Sequence[Stage],
    schedule: Schedule,
    given: deque[Task],
    loaded: Iterator[Loaded],
    decide: Callable[[Batch], Entering],
    decoded: DecodedImages | None,
    asynchronous: bool,
) -> Iterator[Round]:
    under_way = deque[Callable[[], Batch]]()
    started, waited = time.perf_counter(), 0.0
    while True:
        before = time.perf_counter()
        batch = next(loaded, None)
        waited += time.perf_counter() - before
        if batch is not None:
            task = given.popleft()
            under_way.append(stages[task.stage].launch(task, *batch))
            if len(under_way) <= asynchronous:  # a GPU computes the next batch while this process looks at the last one
                continue
        elif not under_way:
            return
        mine = under_way.popleft()()
        gathered = distributed.gather(mine)
        entering = [pair for found in gathered for pair in decide(found)] if gathered else None
        entering = distributed.broadcast(entering)
        schedule.add(entering)
        if decoded:
            decoded.drop(set(mine.indices.tolist()).difference(*(indices.tolist() for _, indices in entering)))
        now = time.perf_counter()
        if gathered:
            yield Round(gathered, now - started, waited)
        started, waited = now, 0.0


def _give(schedule: Schedule, given: deque[Task], num_images: int) -> Iterator[list[int]]:
    """The schedule as DataLoader takes it, called lazily from the loop that also adds the outcomes."""
    for task in schedule:
        given.append(task)
        yield [task.stage * num_images + index for index in task.indices.tolist()]


class Stage:
    """One of the models with the images as it sees them."""

    def __init__(
        self, classifier: Classifier, images: ImageSet, batch_size: int, decoded: DecodedImages | None = None
    ) -> None:
        self.classifier, self.batch_size = classifier, batch_size
        self.dataset = ImageDataset(images, classifier, decoded)
        self.forward = HalvingForward(classifier, batch_size)
        config = classifier.data_config
        self.mean, self.std = (  # in the units of the pixels, as timm's own loader has them
            torch.tensor([value * 255 for value in adapt_to_chs(config[name], config["input_size"][0])])
            .view(1, -1, 1, 1)
            .to(classifier.device)
            for name in ("mean", "std")
        )

    def launch(
        self, task: Task, pixels: torch.Tensor, reasons: dict[int, str], remarks: dict[int, int]
    ) -> Callable[[], Batch]:
        """Start to classify a batch, maybe of nothing, from pixels as `Loaded`; what is returned waits for it."""
        readable = np.array([place not in reasons for place in task.indices.tolist()], np.bool_)
        if not len(readable):
            return lambda: Batch(task.stage, task.indices, readable, np.zeros((0, 0), np.float32), {})
        pixels = pixels.to(self.classifier.device, non_blocking=True).permute(0, 3, 1, 2)
        batch = pixels.to(torch.float32, memory_format=self.classifier.layout).sub_(self.mean).div_(self.std)
        if self.classifier.compile and len(batch) < self.batch_size:  # another size would be compiled anew
            batch = torch.cat([batch, batch[:1].expand(self.batch_size - len(batch), -1, -1, -1)])
        fetched = _fetch(self.forward(batch)[: len(readable)])

        def wait() -> Batch:
            answers = fetched()[readable]
            broken = ~np.isfinite(answers).all(axis=1)
            if broken.any():
                place = task.indices[readable][broken.argmax()]
                raise ValueError(
                    f"image {self.dataset.path(place)}: the answer of {self.classifier.name} is not a number; check "
                    "its weights, or run without --amp"
                )
            return Batch(task.stage, task.indices, readable, answers, reasons, remarks)

        return wait


def describe_waiting(seconds: float, waited: float) -> str:
    """What to say of the time that the models waited for images; empty where it was little, or the run short."""
    share = waited / seconds if seconds > _LEAST_SECONDS else 0
    return f", {share:.0%} of the time waiting for images to be decoded" if share > _LEAST_WAITING else ""


def _computes_apart(device: torch.device) -> bool:
    return device.type == "cuda"  # and this process may do something else meanwhile


def _fetch(probs: torch.Tensor) -> Callable[[], NDArray[np.float32]]:
    """Start to bring probabilities into main memory; what is returned waits until they are there."""
    if not _computes_apart(probs.device):
        return probs.cpu().numpy
    copy = probs.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(probs.device).record_event()  # of their own device, not of the current one

    def wait() -> NDArray[np.float32]:
        arrived.synchronize()
        return copy.numpy()

    return wait
