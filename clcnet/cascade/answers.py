"""What stands for each image while a cascade runs, and whether that is sure enough or the image goes on.

When, and in which batch, the next model sees the image is not decided here but in `classifiers/schedule.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from clcnet.cascade.rules import Rule
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.metrics import Bools, Ints

Ask = Callable[[int, Ints], tuple[Outputs, Bools]]


class Answers:
    """What stands for N images of a list after those models that they went on to, all -1 or NaN before any spoke.

    Attributes:
        places: (N,) the images' places in the list.
        labels: (N,) the class that stands, as the first model numbers them.
        correct: (N,) whether it is right, as far as that is known.
        confidence: (N,) float32, how sure it is.
        answered_by: (N,) number of the model whose answer stands.
        last_seen: (N,) number of the last model that saw the image.
        own_labels: (K, N) each model's own answer, UNKNOWN where it was not asked.
        own_confidence: (K, N) float32, how sure the cascade was of it; NaN where it was not asked.
        sureness: (K, N) float32, likewise of what stood then.
        failed: (N,) whether a model could not read the image.
        targets: (N,) classes, UNKNOWN where not known.
    """

    def __init__(self, rule: Rule, thresholds: Sequence[float], num_images: int) -> None:
        self.rule, self.thresholds = rule, [*thresholds, -np.inf]
        steps = len(self.thresholds)
        self.places = np.arange(num_images)
        self.correct, self.failed = np.zeros((2, num_images), bool)
        self.labels, self.targets, self.answered_by, self.last_seen = np.full((4, num_images), UNKNOWN)
        self.confidence = np.full(num_images, np.nan, np.float32)
        self.own_labels = np.full((steps, num_images), UNKNOWN)
        self.own_confidence, self.sureness = np.full((2, steps, num_images), np.nan, np.float32)

    def __len__(self) -> int:
        return len(self.places)

    def update(self, images: Ints, outputs: Sequence[Outputs]) -> Bools:
        """Let the rule speak on images that one more model has answered; says which of them go on to the next one."""
        stage, step = len(outputs) - 1, self.rule.step(outputs)
        if step.labels is not None:
            self.labels[images], self.own_labels[stage, images] = step.labels, outputs[-1].labels
        if step.correct is not None:
            self.correct[images] = step.correct
        self.confidence[images] = self.sureness[stage, images] = step.confidence
        self.own_confidence[stage, images] = step.confidence if step.own is None else step.own
        self.answered_by[images], self.last_seen[images] = step.answered_by, stage
        goes_on: Bools = step.confidence < self.thresholds[stage]
        return goes_on

    def read(self) -> Answers:
        """Those to the images that every model that was asked could read."""
        rows = np.flatnonzero((self.last_seen >= 0) & ~self.failed)
        part = copy.copy(self)
        for name in vars(self).keys() - {"rule", "thresholds"}:
            setattr(part, name, getattr(self, name)[..., rows])
        return part

    @property
    def calls(self) -> NDArray[np.float64]:
        """(K,) share of the images that each model saw."""
        return np.array([(self.last_seen >= stage).mean() for stage in range(len(self.own_labels))])

    @property
    def deferred(self) -> Bools:
        """(N,) whether an image went beyond the first model."""
        return self.last_seen > 0

    @property
    def has_labels(self) -> bool:
        """Whether accuracy can be told."""
        return bool(len(self.targets) and (self.targets != UNKNOWN).all())

    @property
    def confidences(self) -> list[NDArray[np.float32]]:
        """How sure the cascade was after each model of the images that it saw."""
        return [sure[self.last_seen >= stage] for stage, sure in enumerate(self.sureness)]


def run_cascade(rule: Rule, thresholds: Sequence[float], num_images: int, ask: Ask) -> Answers:
    """Run a cascade, each model answering the images that go on to it.

    Args:
        ask: from the number of a model and (M,) images to what it says of those that it can read, and which, (M,).
    """
    answers = Answers(rule, thresholds, num_images)
    going, seen = answers.places, list[Outputs]()
    for stage in range(len(thresholds) + 1):
        outputs, read = ask(stage, going)
        answers.failed[going[~read]] = True
        going, seen = going[read], [*(one.subset(read) for one in seen), outputs]
        if not len(going):
            break
        goes_on = answers.update(going, seen)
        going, seen = going[goes_on], [one.subset(goes_on) for one in seen]
    return answers
