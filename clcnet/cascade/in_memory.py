"""`Cascade`: a cascade on images in memory, for a service to hold.

from clcnet import Cascade, CLCNet
from clcnet.classifiers.classifier import load_classifier

cascade = Cascade.from_policy("cascade.json")       # what training or the evaluation recommended, or by hand:

shallow = load_classifier("tf_efficientnet_b0.aa_in1k")
deep = load_classifier("tf_efficientnet_b4.aa_in1k")
cascade = Cascade(shallow, deep, CLCNet.load("weights/CLCNet_custom_data.zip"), threshold=0.5)
found = cascade(["cat.jpg", "dog.jpg"])             # paths, bytes of files, PIL images or arrays
found.names, found.confidences, found.errors        # ["cat", ""], [0.93, nan], {1: "image dog.jpg cannot be read (..."}
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from clcnet.cascade.answers import run_cascade
from clcnet.cascade.drift import OnDrift, Watch
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Rule, Surest
from clcnet.classifiers.classes import match_classes
from clcnet.classifiers.classifier import Classifier, HalvingForward, default_batch_size
from clcnet.classifiers.decoding import read_image
from clcnet.classifiers.schedule import cut
from clcnet.confidence import CLCNET, Network
from clcnet.data.outputs import UNKNOWN, Outputs
from clcnet.distributed import resolve_device
from clcnet.metrics import Bools, Ints

Picture = Image.Image | str | os.PathLike[str] | bytes | NDArray[np.uint8]
Model = Classifier | tuple[nn.Module, Callable[[Image.Image], torch.Tensor]]


@dataclass(frozen=True)
class Predictions:
    """What a cascade says about B images; unpacks into the first three.

    Attributes:
        labels: (B,) int64 class index, as the first model numbers them; -1 for an image without an answer.
        confidences: (B,) float32 confidence of that answer; NaN without one.
        answered_by: (B,) int64 place of the model whose answer stands, in the cascade's order: 0 for the first one;
            where answers are joined, the last that was asked; -1 without an answer.
        errors: place in the list of an image without an answer -> why.
        class_names: by class index, where the models know them.
    """

    labels: NDArray[np.int64]
    confidences: NDArray[np.float32]
    answered_by: NDArray[np.int64]
    errors: dict[int, str]
    class_names: Sequence[str] | None = None

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter((self.labels, self.confidences, self.answered_by))

    @property
    def names(self) -> list[str]:
        """The names of the answered classes, their numbers where none are known; "" for images without an answer."""
        known = self.class_names
        return ["" if label == UNKNOWN else known and known[label] or str(label) for label in self.labels.tolist()]


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
        path: Policy | Path | str,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        on_drift: OnDrift = "warn",
        models: Sequence[str] | None = None,
    ) -> Cascade:
        """Load what a policy, or its file, names: rule, thresholds, and models, from where they lie here if given.

        Its `watch` compares the images that come with those that the policy was measured on, and warns, or raises
        `DriftError`; take the place of `watch` for another window or level, or set it to None.

        Raises:
            OSError, ValueError: see `Policy.load` and `Policy.load_classifiers`.
        """
        device = resolve_device(device)
        policy = path if isinstance(path, Policy) else Policy.load(path, device)
        cascade = cls.of(policy.load_classifiers(models, device), policy.rule, policy.thresholds, batch_size)
        cascade.policy = policy
        cascade._class_names = cascade._class_names or policy.class_names(cascade.models[0].num_classes)
        cascade.watch = Watch(policy.expected, on_drift=on_drift) if policy.expected else None
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
        self._orders = [slice(None) if order is None else order for order in match_classes(self.models)]
        self._class_names = self.models[0].label_names

    def __call__(self, images: Sequence[Picture]) -> Predictions:
        """Classify images; one that is missing, cannot be read or gets no answer is told apart and harms no other.

        Args:
            images: a list of them, mixed as you like: paths, the bytes of files, PIL images, and uint8 arrays (H, W, 3)
                or (H, W); of any size and mode. Orientation tags are not heeded, as in timm.

        Raises:
            TypeError: a single image instead of a list, or something else in the list.
            MemoryError: not even one image fits into memory.
            DriftError: the images are no longer like the policy's, where `watch` is to stop at that.
        """
        one_array = isinstance(images, np.ndarray) and images.ndim < 4
        if one_array or isinstance(images, Image.Image | str | os.PathLike | bytes):
            raise TypeError("a cascade takes a list of images; put the one into brackets")
        named = [(_name(image, place), image) for place, image in enumerate(images, start=1)]
        errors = dict[int, str]()
        ask = functools.partial(self._ask, named, errors)
        answers = run_cascade(self.rule, self.thresholds, len(named), ask)
        if self.watch is not None:
            self.watch.add(answers.read().sureness.T)
        # what an earlier model said of an image that failed does not stand: it was not sure
        none = answers.failed
        labels, answered_by = (np.where(none, UNKNOWN, said) for said in (answers.labels, answers.answered_by))
        confidences = np.where(none, np.float32(np.nan), answers.confidence)
        return Predictions(labels, confidences, answered_by, dict(sorted(errors.items())), self._class_names)

    def _ask(
        self, named: Sequence[tuple[str, Picture]], errors: dict[int, str], stage: int, images: Ints
    ) -> tuple[Outputs, Bools]:
        """What a model says of these images, its classes in the first model's order, and of which; errors are noted."""
        model, answers = self.models[stage], dict[int, NDArray[np.float32]]()
        for batch in cut(images, self.batch_size):
            tensors = dict[int, torch.Tensor]()
            for image in batch.tolist():
                name, given = named[image]
                try:
                    picture = read_image(_for_pil(given), model.image_mode, model.input_size)
                except Exception as error:  # PIL's decoders raise nearly everything: OSError, SyntaxError, ...
                    errors[image] = f"image {name} cannot be read ({error})"
                else:  # what a transform raises is not the image's fault
                    tensors[image] = model.transform(picture)
            if tensors:
                probs = self._forwards[stage](torch.stack([*tensors.values()])).cpu().numpy()
                answers |= zip(tensors, probs[:, self._orders[stage]], strict=True)
        for image in [image for image, probs in answers.items() if not np.isfinite(probs).all()]:
            del answers[image]
            errors[image] = (
                f"image {named[image][0]}: the answer of {model.name} is not a number; check its weights, or run "
                "without mixed precision (--amp)"
            )
        probs = np.stack([*answers.values()]) if answers else np.empty((0, 2), np.float32)
        return Outputs.from_probs(probs, [*map(str, answers)]), np.isin(images, [*answers])  # rules see the same images


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
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
            raise TypeError(
                f"arrays are taken as uint8 of shape (H, W, 3) or (H, W); image {place} of the list is "
                f"{image.dtype} of shape {image.shape}"
            )
    elif not isinstance(image, Image.Image | bytes):
        raise TypeError(
            f"a cascade takes paths, bytes, PIL images and arrays; image {place} of the list is a "
            f"{type(image).__name__}"
        )
    return f"{place} of the list"


def _for_pil(image: Picture) -> Image.Image | io.BytesIO | str | os.PathLike[str]:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image
