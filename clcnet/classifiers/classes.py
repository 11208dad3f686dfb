"""Which of a model's classes an image's class is, and what the classes are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo, infer_imagenet_subset

from clcnet.classifiers.classifier import Classifier, class_indices
from clcnet.data.images import ImageSet
from clcnet.data.outputs import UNKNOWN


class HasClasses(Protocol):
    """What `match_classes` asks of a model."""

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def label_names(self) -> list[str] | None: ...
    @property
    def label_names_inferred(self) -> bool: ...


def match_classes(models: Sequence[HasClasses]) -> list[NDArray[np.int64] | None]:
    """For each model the place of the first model's classes among its own; None where both number them alike.

    Raises:
        ValueError: the models have different classes.
    """
    return [_match(models[0], model) for model in models]


def _match(first: HasClasses, other: HasClasses) -> NDArray[np.int64] | None:
    if None not in (first.num_classes, other.num_classes) and first.num_classes != other.num_classes:
        raise ValueError(
            f"{first.name} has {first.num_classes} classes and {other.name} has {other.num_classes}; a cascade needs "
            "models of the same classes"
        )
    ours, theirs = first.label_names, other.label_names
    if ours is None or theirs is None or ours == theirs:
        return None
    missing = sorted(set(theirs) - set(ours))
    if missing and (first.label_names_inferred or other.label_names_inferred):
        # ImageNet's names, which timm guesses from the number of classes, say nothing about a model of others
        return None
    if missing:
        raise ValueError(
            f"the class {missing[0]!r} of {other.name} is not among those of {first.name}; a cascade needs models of "
            "the same classes"
        )
    place = {name: index for index, name in enumerate(theirs)}
    return np.array([place[name] for name in ours], np.int64)


def known_targets(
    images: ImageSet, classifier: Classifier, by_position: bool = False, must_fit: bool = False
) -> tuple[np.ndarray, str | None]:
    """The classes of the images as the classifier numbers them; UNKNOWN for all where the folders are not its classes.

    Args:
        images: the images.
        classifier: the model.
        by_position: the data set's classes are numbered by a class map.
        must_fit: the user said that these are the classes, so that it is an error if they are not.

    Returns:
        (N,) int64, and what to tell the user about folders that are not classes, or are taken for classes by their
        order alone.

    Raises:
        ValueError: the classes do not fit and must, or some folders are classes of the model and others are not.
    """
    nothing = np.full(len(images), UNKNOWN)
    if not images.has_labels:
        return nothing, None
    some_known = bool(set(images.class_names) & set(classifier.label_names or ()))
    try:
        targets = class_indices(images, classifier, by_position)
    except ValueError as error:
        if must_fit or some_known:
            raise
        return nothing, f"the folders are not taken for classes, so no accuracy is reported: {error}"
    if some_known or by_position or all(name.isdigit() for name in images.class_names):
        return targets, None
    return targets, "the folders are taken for the model's classes, in natural order"


def name_classes(
    images: ImageSet, targets: np.ndarray, classifier: Classifier, class_map: Sequence[str] | None = None
) -> list[str] | None:
    """Name the classifier's classes by the class map, else by the model's own names, the folders, or ImageNet.

    Args:
        images: the images.
        targets: (N,) their classes as the classifier numbers them, UNKNOWN where not known.
        classifier: the model.
        class_map: names by class index.

    Returns:
        A name for every class, empty where none is known; None where none at all is.
    """
    names = [""] * classifier.num_classes
    subset = infer_imagenet_subset(classifier.model) if classifier.label_names_inferred else None
    if subset:
        names = list(ImageNetInfo(subset).label_descriptions())
    numbers, firsts = np.unique(targets, return_index=True)
    for number, first in zip(numbers, firsts, strict=True):
        if number != UNKNOWN:
            names[number] = images.class_names[images.targets[first]]
    if classifier.label_names and not classifier.label_names_inferred:
        names = list(classifier.label_names)
    for index, name in enumerate((class_map or [])[: classifier.num_classes]):
        names[index] = name
    return names if any(names) else None
