"""Which of a model's classes are the images' classes? By name, by number, or by their order.

Where several readings are possible, natural or plain order, counted from 0 or from 1, the model's own answers to a few
hundred images say which one fits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.data import ImageNetInfo, infer_imagenet_subset

from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import ImageSet
from clcnet.data.labels import first_few, natural_key, plain
from clcnet.data.outputs import UNKNOWN

_FROM_ZERO = "as indices, from 0"
_DOUBT = 1e-3  # two readings fit alike unless chance would set them so far apart more rarely than this


@dataclass(frozen=True)
class Reading:
    """One way to number the images' classes as a model does."""

    words: str  # what it is, for a message; empty where no other would make sense
    positions: NDArray[np.int64]  # (K,) the model's class that each of the images' classes is

    def of(self, targets: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) indices among the images' classes -> the model's; UNKNOWN stays."""
        return np.append(self.positions, UNKNOWN)[targets]


def readings_of_classes(
    names: Sequence[str], num_classes: int, known: Sequence[str] | None, classes_by: str, model: str
) -> list[Reading]:
    """All ways in which the images' classes may be the model's; the likeliest first.

    Args:
        names: K classes of the images.
        num_classes: C, of the model.
        known: its classes by name; None where it has no names.
        classes_by: what says which classes there are: "folders", "labels", a "data set", or a class "map" in the
            model's order.
        model: its name, for messages.

    Raises:
        ValueError: there is none: too many classes, too few, or not the model's names.
    """
    count = len(names)
    place = {plain(name): index for index, name in enumerate(known or [])}
    unknown = [name for name in names if plain(name) not in place]
    if classes_by == "map" and count <= num_classes:
        return [Reading("", np.arange(count))]
    if classes_by != "map":
        if not unknown:
            return [Reading("", np.array([place[plain(name)] for name in names], np.int64))]
        found = _as_numbers(names, num_classes) if len(unknown) == count else []
        if not found and classes_by == "data set" and len(unknown) == count == num_classes:
            found = [Reading("as the data set numbers them", np.arange(count))]
        if not found and known:
            stranger = unknown[-1 if unknown[0].isdigit() else 0]  # of numbers, the one that is too large
            raise ValueError(
                f"class {stranger!r} of the images is not among the classes of {model} "
                f"({', '.join(list(place)[:3])}, ...){', though others are' if len(unknown) != count else ''}; rename "
                "it or give a --class-map"
            )
    if classes_by == "map" or (not found and count != num_classes):
        raise ValueError(
            f"the images have {count} classes but {model} has {num_classes}; give the model trained on these classes, "
            "or a --class-map"
        )
    natural, sorted_plainly = sorted(names, key=natural_key), sorted(names)
    parting = next((index for index in range(count) if natural[index] != sorted_plainly[index]), 1)
    if not found:
        found = [_in_order(names, natural, parting, "in natural order ({}), as timm sorts")]
    if classes_by == "folders" and count == num_classes and natural != sorted_plainly:
        found.append(_in_order(names, sorted_plainly, parting, "in plain order ({}), as torchvision sorts"))
    return found


def _in_order(names: Sequence[str], order: list[str], parting: int, words: str) -> Reading:
    place = {name: index for index, name in enumerate(order)}
    around = ("..., " if parting > 1 else "") + first_few(order[max(parting - 1, 0) :])
    return Reading(words.format(around), np.array([place[name] for name in names], np.int64))


def _as_numbers(names: Sequence[str], num_classes: int) -> list[Reading]:
    if not all(name.isascii() and name.isdigit() for name in names):
        return []
    numbers = np.array([int(name) for name in names])
    if len(set(numbers.tolist())) < len(names):
        return []
    from_zero, from_one = Reading(_FROM_ZERO, numbers), Reading("as numbers counted from 1", numbers - 1)
    found = [from_zero] if numbers.max() < num_classes else []
    return found + ([from_one] if 1 <= numbers.min() and numbers.max() <= num_classes else [])


def telling_images(readings: Sequence[Reading], targets: NDArray[np.int64], most: int = 300) -> NDArray[np.int64]:
    """The images, spread over the data set and at most so many, whose class is another under another reading."""
    answers = np.stack([reading.of(targets) for reading in readings])
    telling = np.flatnonzero((answers != answers[0]).any(axis=0))
    return telling[np.unique(np.linspace(0, len(telling) - 1, most).astype(int))] if len(telling) > most else telling


def choose_reading(
    readings: Sequence[Reading], targets: NDArray[np.int64], top1: NDArray[np.int64]
) -> tuple[Reading, str]:
    """Choose among readings by a model's answers `top1` to M images of the classes `targets`.

    The first stands unless another fits better than chance explains (sign test on the images that part the two).

    Returns:
        The reading, and one line on what was taken and how well each fits; empty where there was nothing to say.
    """
    if len(readings) == 1:
        words = readings[0].words
        return readings[0], f"the classes are taken {words}" if words not in ("", _FROM_ZERO) else ""
    right = [reading.of(targets) == top1 for reading in readings]
    best = max(range(len(readings)), key=lambda number: (right[number].sum(), -number))
    gains, losses = int((right[best] & ~right[0]).sum()), int((right[0] & ~right[best]).sum())
    chance = sum(math.comb(gains + losses, wins) for wins in range(gains, gains + losses + 1)) / 2 ** (gains + losses)
    taken = best if chance < _DOUBT else 0
    fits = (
        reading.words + (f": {100 * hits.mean():.1f}% right" if len(hits) else "")
        for reading, hits in zip(readings, right, strict=True)
    )
    return readings[taken], (
        f"the classes may be taken {'; or '.join(fits)}, of {len(top1)} images that tell these apart; the "
        f"{('first', 'second', 'third')[taken]} is taken; a --class-map settles it"
    )


def class_readings(images: ImageSet, classifier: Classifier) -> list[Reading]:
    """All ways in which the images' classes may be the classifier's; see `readings_of_classes`.

    ImageNet's WordNet ids are looked up in any model of so many classes: folders of these names mean them.
    """
    known = classifier.label_names
    subset = infer_imagenet_subset(classifier.model)
    if subset and (known is None or classifier.label_names_inferred):
        wordnet = ImageNetInfo(subset).label_names()
        known = wordnet if set(images.class_names) <= set(wordnet) else None
    return readings_of_classes(images.class_names, classifier.num_classes, known, images.classes_by, classifier.name)


def possible_readings(images: ImageSet, classifier: Classifier) -> tuple[list[Reading], str]:
    """As `class_readings`, for folders that may be no classes: then there are none, and the line says why.

    Raises:
        ValueError: the user said that these are the classes, by a class map or labels, and they do not fit; or some
            folders are classes of the model and others are not.
    """
    if not images.has_labels:
        return [], ""
    try:
        return class_readings(images, classifier), ""
    except ValueError as error:
        names = set(map(plain, classifier.label_names or ()))
        if images.classes_by in ("labels", "map") or not names.isdisjoint(images.class_names):
            raise
        return [], f"the folders are not taken for classes, so no accuracy is reported: {error}"


def name_classes(images: ImageSet, targets: NDArray[np.int64], classifier: Classifier) -> list[str] | None:
    """Name the classifier's classes by the class map, else by the model's own names, the folders, or ImageNet.

    ImageNet's names are guessed from the number of classes for timm's own weights alone. `targets` are the images'
    classes as the classifier numbers them. A name is empty where none is known; None where none at all is.
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
    if images.classes_by == "map":
        names = [*images.class_names[: len(names)], *names[len(images.class_names) :]]
    return names if any(names) else None


def match_classes(models: Sequence[Any]) -> list[NDArray[np.int64] | None]:
    """For each model the place of the first model's classes among its own; None where both number them alike.

    Models have the name, num_classes, label_names and label_names_inferred of a `Classifier`; ValueError where they
    have different classes.
    """
    return [_match(models[0], model) for model in models]


def _match(first: Any, other: Any) -> NDArray[np.int64] | None:
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
        return None  # ImageNet's names, guessed from the number of classes, say nothing about a model of others
    if missing:
        raise ValueError(
            f"the class {missing[0]!r} of {other.name} is not among those of {first.name}; a cascade needs models of "
            "the same classes"
        )
    place = {name: index for index, name in enumerate(theirs)}
    return np.array([place[name] for name in ours], np.int64)
