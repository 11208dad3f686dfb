"""Images through one model or several, batch by batch: decoded by worker processes, shared among those of a torchrun.

One set of decoding processes reads for all models in the order that `Schedule` sets, so images for a later model are
decoded while an earlier one computes. Only a few batches are in memory at a time, whatever the number of images.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from timm.data.loader import adapt_to_chs

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier, HalvingForward, default_batch_size
from clcnet.classifiers.loading import ImageDataset, ReadImages, collate, default_workers, loaded_batches
from clcnet.classifiers.schedule import Entering, Indices, Schedule, Task, cut
from clcnet.data.images import ImageSet

PREFETCH = 2  # batches that each decoding process reads ahead


@dataclass(frozen=True)
class Batch:
    """What a model said about a batch.

    Attributes:
        stage: the model's number.
        indices: (B,) places of the images in the list.
        readable: (B,) whether an image could be read.
        probs: (A, C) float32, one row a readable image, in the model's own order of classes.
        reasons: place of an image that could not be read -> why.
        remarks: place of one of which the model sees less than there is -> what.
    """

    stage: int
    indices: Indices
    readable: NDArray[np.bool_]
    probs: NDArray[np.float32]
    reasons: dict[int, str]
    remarks: dict[int, str] = field(default_factory=dict)

    @property
    def answered(self) -> Indices:
        """(A,) places of the images that could be read."""
        return self.indices[self.readable]


@dataclass(frozen=True)
class Round:
    """One batch from every process, all by the same model, and the seconds since the round before."""

    batches: list[Batch]
    seconds: float

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
    decide: Callable[[Batch], Entering] = lambda batch: (),
    waiting: Entering = (),
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Round]:
    """Run images through models; every process of a torchrun calls this and runs through it.

    Args:
        classifiers: the models, in the order in which an image sees them.
        images: the images.
        first: batches of the first model.
        decide: called in the main process for every batch, in order; says which images are to see which model next.
        waiting: images that are to see a later model from the start.
        batch_size: images a batch; by default what suits the device.
        workers: processes that decode; 0 decodes in this process; by default what suits the machine.

    Yields:
        In the main process what came of each round, in the schedule's order; elsewhere nothing.

    Raises:
        ValueError: a model's answer is not a number.
        MemoryError: a single image does not fit into memory.
        ChildProcessError: a decoding process died.
    """
    batch_size = batch_size or default_batch_size(classifiers[0].device)
    workers = default_workers() if workers is None else workers
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
    schedule = Schedule(
        first,
        len(classifiers),
        batch_size,
        distributed.rank(),
        distributed.world_size(),
        distributed.broadcast(max(asked_ahead) if asked_ahead else None),
        waiting,
    )
    stages = [_Stage(classifier, images, batch_size) for classifier in classifiers]
    given: deque[Task] = deque()
    loader = torch.utils.data.DataLoader(
        _AllStages([stage.dataset for stage in stages]),
        batch_sampler=_give(schedule, given),
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=asynchronous,
    )
    started = time.perf_counter()
    for batch in _batches(stages, given, loaded_batches(loader), asynchronous):
        gathered = distributed.gather(batch)
        entering = [pair for found in gathered for pair in decide(found)] if gathered else None
        schedule.add(distributed.broadcast(entering))
        now = time.perf_counter()
        seconds, started = now - started, now
        if gathered:
            yield Round(gathered, seconds)


def classify(
    classifier: Classifier,
    images: ImageSet,
    indices: Sequence[int] | Indices | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Classify images, all of them or some, batch by batch and in order; nothing is kept.

    A batch that does not fit into memory is halved, as are those after it, and the user is told.
    """
    wanted = np.arange(len(images)) if indices is None else np.asarray(indices, dtype=np.int64)
    batches = cut(wanted, batch_size or default_batch_size(classifier.device))
    for found in stream([classifier], images, batches, batch_size=batch_size, workers=workers):
        yield from found.batches


def _give(schedule: Schedule, given: deque[Task]) -> Iterator[list[tuple[int, int]]]:
    """The schedule as DataLoader takes it, called lazily from the loop that also adds the outcomes."""
    for task in schedule:
        given.append(task)
        yield [(task.stage, index) for index in task.indices.tolist()]


def _batches(
    stages: Sequence[_Stage],
    given: deque[Task],
    loaded: Iterator[tuple[torch.Tensor, ReadImages]],
    asynchronous: bool,
) -> Iterator[Batch]:
    """What comes of each task; a GPU computes the next one while the caller looks at this one."""
    under_way: deque[Callable[[], Batch]] = deque()
    for pixels, read in loaded:
        task = given.popleft()
        under_way.append(stages[task.stage].launch(task, pixels, read) if len(task.indices) else _nothing(task))
        if len(under_way) > asynchronous:
            yield under_way.popleft()()
    while under_way:
        yield under_way.popleft()()


def _nothing(task: Task) -> Callable[[], Batch]:
    empty = Batch(task.stage, task.indices, np.zeros(0, np.bool_), np.zeros((0, 0), np.float32), {})
    return lambda: empty


class _AllStages(torch.utils.data.Dataset[tuple[torch.Tensor, int, str, str]]):
    """All images as each of the models sees them, by model and place."""

    def __init__(self, datasets: list[ImageDataset]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, str, str]:
        stage, place = key
        return self.datasets[stage][place]


def _collate(batch: list[tuple[torch.Tensor, int, str, str]]) -> tuple[torch.Tensor, ReadImages]:
    return collate(batch) if batch else (torch.empty(0), ReadImages(np.zeros(0, np.int64), {}, {}))


class _Stage:
    """One of the models with the images as it sees them."""

    def __init__(self, classifier: Classifier, images: ImageSet, batch_size: int) -> None:
        self.classifier, self.batch_size = classifier, batch_size
        self.dataset = ImageDataset(images, classifier)
        self.dataset.transform = create_transform(**classifier.data_config, is_training=False, use_prefetcher=True)
        self.forward = HalvingForward(classifier, batch_size)
        self.mean, self.std = (self._per_channel(classifier.data_config, name) for name in ("mean", "std"))

    def _per_channel(self, data_config: dict[str, Any], name: str) -> torch.Tensor:
        """In the units of the pixels, as timm's own loader has them."""
        values = adapt_to_chs(data_config[name], data_config["input_size"][0])
        return torch.tensor([value * 255 for value in values], device=self.classifier.device).view(1, -1, 1, 1)

    def launch(self, task: Task, pixels: torch.Tensor, read: ReadImages) -> Callable[[], Batch]:
        """Start to classify a batch; what is returned waits for it.

        Args:
            task: which images they are.
            pixels: (B, channels, height, width) uint8.
            read: which of them could be read.
        """
        batch = pixels.to(self.classifier.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        if self.classifier.compile and len(batch) < self.batch_size:  # another size would be compiled anew
            batch = torch.cat([batch, batch[:1].expand(self.batch_size - len(batch), -1, -1, -1)])
        fetched = _fetch(self.forward.launch(batch)[: len(task.indices)])

        def wait() -> Batch:
            readable = read.readable
            answers = fetched()[readable]
            broken = ~np.isfinite(answers).all(axis=1)
            if broken.any():
                place = task.indices[readable][broken.argmax()]
                raise ValueError(
                    f"image {self.dataset.path(place)}: the answer of {self.classifier.name} is not a number; check "
                    "its weights, or run without --amp"
                )
            return Batch(task.stage, task.indices, readable, answers, read.reasons, read.remarks)

        return wait


def _computes_apart(device: torch.device) -> bool:
    """Whether a device goes on computing while this process does something else."""
    return device.type == "cuda"


def _fetch(probs: torch.Tensor) -> Callable[[], NDArray[np.float32]]:
    """Start to bring probabilities into main memory; what is returned waits until they are there."""
    if not _computes_apart(probs.device):
        return probs.cpu().numpy
    copy = probs.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(probs.device).record_event()  # of their own device, not of the current one

    def wait() -> NDArray[np.float32]:
        arrived.synchronize()
        array: NDArray[np.float32] = copy.numpy()
        return array

    return wait
