"""A cascade on images, for a service to hold: `Cascade`.

from clcnet import Cascade, CLCNet
from clcnet.classifiers.classifier import load_classifier

cascade = Cascade.from_policy("cascade.json")       # what training or the evaluation recommended, or by hand:

shallow = load_classifier("tf_efficientnet_b0.aa_in1k")
deep = load_classifier("tf_efficientnet_b4.aa_in1k")
cascade = Cascade(shallow, deep, CLCNet.load("weights/CLCNet_custom_data.zip"), threshold=0.5)
labels, confidences, answered_by = cascade(["cat.jpg", "dog.jpg"])  # paths or PIL images
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from clcnet.cascade.drift import OnDrift, Watch
from clcnet.cascade.policy import Policy
from clcnet.cascade.rule import CLCNET, Network, Rule, Surest
from clcnet.classifiers.classes import match_classes
from clcnet.classifiers.classifier import Classifier, HalvingForward, default_batch_size
from clcnet.classifiers.loading import read_image
from clcnet.data.outputs import Outputs

Picture = Image.Image | str | os.PathLike[str]
Model = Classifier | tuple[nn.Module, Callable[[Image.Image], torch.Tensor]]


class Predictions(NamedTuple):
    """What a cascade says about B images.

    Attributes:
        labels: (B,) int64 class index, as the first model numbers them.
        confidences: (B,) float32 confidence of that answer.
        answered_by: (B,) int64 number of the model whose answer stands: 0 for the first one.
    """

    labels: NDArray[np.int64]
    confidences: NDArray[np.float32]
    answered_by: NDArray[np.int64]


class Cascade:
    """Models of rising cost: the first answers every image, each later one those of which the cascade is not sure.

    The constructor takes the paper's case, two models and the surer answer (arXiv:2205.09612); `of` takes any number
    and any rule, `from_policy` a file. Several threads may share one cascade: calls change nothing inside but the
    number of images at once, which shrinks when memory runs out.
    """

    def __init__(
        self, shallow: Model, deep: Model, clcnet: Network, threshold: float, batch_size: int | None = None
    ) -> None:
        """Put the paper's cascade together.

        Args:
            shallow: from `load_classifier`, or a model that returns logits with the transform of its images.
            deep: likewise, for the same classes.
            clcnet: the confidence network, for both models' answers.
            threshold: images whose confidence is below it go to the deep model; -inf never asks it, inf always.
            batch_size: images at once in a call; by default what suits the device.

        Raises:
            ValueError: the models have different classes, the threshold is not a number, or a batch would be empty.
        """
        self._put_together([shallow, deep], Surest(CLCNET, network=clcnet), [threshold], batch_size)

    @classmethod
    def of(
        cls, models: Sequence[Model], rule: Rule, thresholds: Sequence[float], batch_size: int | None = None
    ) -> Cascade:
        """Put any models together under any fitted rule; one threshold between two of them. See the constructor."""
        cascade = cls.__new__(cls)
        cascade._put_together(models, rule, thresholds, batch_size)
        return cascade

    @classmethod
    def from_policy(
        cls,
        path: Path | str,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        on_drift: OnDrift = "warn",
    ) -> Cascade:
        """Load what a policy names: models, rule, thresholds.

        Its `watch` compares the images that come with those that the policy was measured on, and warns, or raises
        `DriftError`; take the place of `watch` for another window or level, or set it to None.

        Raises:
            OSError, ValueError: see `Policy.load` and `Policy.load_classifiers`.
        """
        policy = Policy.load(path)
        cascade = cls.of(policy.load_classifiers(device=device), policy.rule, policy.thresholds, batch_size)
        cascade.policy = policy
        cascade.watch = policy.expected.watch(on_drift) if policy.expected else None
        return cascade

    def unsure(self, predictions: Predictions) -> NDArray[np.bool_]:
        """(B,) where the policy would rather not answer, at the risk that it promises; nowhere without a promise."""
        if self.policy is None:
            return np.zeros(len(predictions.labels), dtype=bool)
        return self.policy.is_unsure(predictions.confidences)

    def _put_together(
        self, models: Sequence[Model], rule: Rule, thresholds: Sequence[float], batch_size: int | None
    ) -> None:
        if len(thresholds) != len(models) - 1:
            raise ValueError(f"{len(models)} models need {len(models) - 1} thresholds, not {len(thresholds)}")
        if np.isnan(thresholds).any():
            raise ValueError("the threshold is NaN; give a number, inf or -inf")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more, or None")
        self.models = [model if isinstance(model, Classifier) else _PlainModel(*model) for model in models]
        self.policy: Policy | None = None
        self.watch: Watch | None = None
        self.rule, self.thresholds = rule, [float(threshold) for threshold in thresholds]
        self.batch_size = batch_size or default_batch_size(self.models[0].device)
        self._forwards = [HalvingForward(model, self.batch_size) for model in self.models]
        self._orders = match_classes(self.models)

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
            DriftError: the images are no longer like the policy's, where `watch` is to stop at that.
        """
        if isinstance(images, Image.Image | str | os.PathLike):
            raise TypeError(f"a cascade takes a list of images; give [{images!r}]")
        named = [(_name(image, place), image) for place, image in enumerate(images, start=1)]
        labels, answered_by = np.zeros((2, len(named)), np.int64)
        confidences = np.zeros(len(named), np.float32)
        asked = np.full((len(named), len(self.models)), np.nan, np.float32)
        going_on, outputs = np.arange(len(named)), list[Outputs]()
        for stage, threshold in enumerate([*self.thresholds, -np.inf]):
            if not len(going_on):
                break
            probs = self._ask(stage, [named[index] for index in going_on])
            outputs.append(Outputs.from_probs(probs, list(map(str, going_on))))  # rules see that images are the same
            step = self.rule.step(outputs)
            assert step.labels is not None, "a model's own outputs know their classes"
            labels[going_on], confidences[going_on], answered_by[going_on] = (
                step.labels,
                step.confidence,
                step.answered_by,
            )
            asked[going_on, stage] = step.confidence if step.own is None else step.own
            deferred = step.confidence < threshold
            going_on, outputs = going_on[deferred], [said.subset(deferred) for said in outputs]
        if self.watch is not None:
            self.watch.add(asked)
        return Predictions(labels, confidences, answered_by)

    def _ask(self, stage: int, named: Sequence[tuple[str, Picture]]) -> NDArray[np.float32]:
        """Probabilities (B, C) in the first model's order of classes."""
        model, order, pieces = self.models[stage], self._orders[stage], []
        for start in range(0, len(named), self.batch_size):
            batch = named[start : start + self.batch_size]
            probs = self._forwards[stage](torch.stack([_prepare(image, name, model) for name, image in batch]))
            broken = ~np.isfinite(probs).all(axis=1)
            if broken.any():
                raise ValueError(
                    f"image {batch[broken.argmax()][0]}: the answer of {model.name} is not a number; check its "
                    "weights, or run without mixed precision (--amp)"
                )
            pieces.append(probs if order is None else probs[:, order])
        return np.concatenate(pieces)


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
