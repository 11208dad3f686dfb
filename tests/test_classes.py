"""Which of a model's classes the images' classes are, and what the model's own answers say where it may be doubted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clcnet.classifiers.classes import (
    choose_reading,
    class_readings,
    name_classes,
    possible_readings,
    readings_of_classes,
    telling_images,
)
from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import ImageSet

NATURAL = [f"n{number}" for number in range(1, 11)]


def fake(num_classes: int, names: list[str] | None = None, inferred: bool = False) -> Classifier:
    """A classifier that is never asked."""
    model = torch.nn.Identity()
    model.num_classes = num_classes  # type: ignore[assignment]
    return Classifier(model, "M", num_classes, names, inferred, {}, torch.device("cpu"))


def images_of(names: list[str], targets: list[int] | None = None, classes_by: str = "folders") -> ImageSet:
    """Two images of each class, unless their targets are given."""
    numbers = np.repeat(np.arange(len(names)), 2) if targets is None else np.array(targets)
    files = [f"{index}.png" for index in range(len(numbers))]
    return ImageSet(Path("."), files, files, numbers, names, numbers % 5, classes_by)


def indices(images: ImageSet, classifier: Classifier) -> list[int]:
    """The images' classes by the likeliest reading."""
    return class_readings(images, classifier)[0].of(images.targets).tolist()


def taken(images: ImageSet, classifier: Classifier) -> str:
    """What is said where there is one reading alone, and the model need not be asked."""
    (reading,) = class_readings(images, classifier)
    return choose_reading([reading], np.zeros(0, int), np.zeros(0, int))[1]


@pytest.mark.parametrize(
    ("names", "num_classes", "known", "classes_by", "positions"),
    [
        (["ant", "bee", "cat"], 3, ["cat", "ant", "bee"], "folders", [[1, 2, 0]]),
        (["bee"], 3, ["cat", "ant", "bee"], "folders", [[2]]),
        (["été"], 2, ["hiver", "e\u0301te\u0301"], "folders", [[1]]),
        (["c1", "c9"], 2, None, "folders", [[0, 1]]),
        (["c1", "c9", "c10"], 3, None, "folders", [[0, 1, 2], [0, 2, 1]]),
        (["a", "B"], 2, None, "folders", [[0, 1], [1, 0]]),  # capitals come first in plain order
        (["c1", "c9", "c10"], 3, None, "labels", [[0, 1, 2]]),
        (["c1", "c9", "c10"], 3, ["c10", "c1", "c9"], "folders", [[1, 2, 0]]),
        (["c1", "c10", "c9"], 3, ["c10", "c1", "c9"], "data set", [[1, 0, 2]]),
        (["c1", "c10", "c9"], 3, ["x", "y", "z"], "data set", [[0, 1, 2]]),
        (["0", "1", "2"], 5, None, "data set", [[0, 1, 2]]),
        (["c10", "c1", "c9"], 5, None, "map", [[0, 1, 2]]),
        (["bee", "ant"], 3, ["ant", "bee", "cat"], "map", [[0, 1]]),
        (["0", "3", "7"], 10, None, "folders", [[0, 3, 7]]),
        (["0", "2"], 3, ["ant", "bee", "cat"], "folders", [[0, 2]]),
        (["1", "3"], 10, None, "folders", [[1, 3], [0, 2]]),
        (["1", "10"], 10, None, "labels", [[0, 9]]),
        (["1", "2", "3"], 3, None, "labels", [[0, 1, 2]]),
        (["100", "200", "1000"], 3, None, "labels", [[0, 1, 2]]),
        ([str(n) for n in range(11)], 11, None, "folders", [[*range(11)], [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2]]),
        ([str(n) for n in range(11)], 11, None, "labels", [[*range(11)]]),
    ],
)
def test_all_readings_that_are_possible_are_known(
    names: list[str], num_classes: int, known: list[str] | None, classes_by: str, positions: list[list[int]]
) -> None:
    readings = readings_of_classes(names, num_classes, known, classes_by, "M")
    assert [reading.positions.tolist() for reading in readings] == positions
    assert len(readings) == 1 or all(reading.words for reading in readings)


@pytest.mark.parametrize(
    ("names", "known", "classes_by", "message"),
    [
        (["x", "y"], None, "folders", "the images have 2 classes but M has 3; give the model trained on these"),
        (["x", "y", "z", "zz"], None, "map", "the images have 4 classes but M has 3"),
        (["0", "3"], None, "labels", "the images have 2 classes but M has 3"),
        (["x", "y"], None, "data set", "the images have 2 classes but M has 3"),
        (["ant", "bee", "dog"], ["ant", "bee", "cat"], "data set", "class 'dog' .* though others are"),
        (["ant", "bee", "dog"], ["ant", "bee", "cat"], "folders", "class 'dog' .* not among .*, though others are"),
        (["chat", "abeille", "fourmi"], ["ant", "bee", "cat"], "labels", r"class 'chat' .*\(ant, bee, cat, ...\)"),
    ],
)
def test_classes_that_cannot_be_the_models_are_refused(
    names: list[str], known: list[str] | None, classes_by: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        readings_of_classes(names, 3, known, classes_by, "M")


def test_wordnet_folders_are_found_among_imagenets_thousand_whosoever_the_weights_are() -> None:
    names = ["n01440764", "n02119789", "n15075141"]  # tench is ImageNet's first class, toilet tissue its last
    assert indices(images_of(names), fake(1000)) == [0, 0, 278, 278, 999, 999]
    with pytest.raises(ValueError, match="the images have 2 classes but M has 1000"):
        class_readings(images_of(["n01440764", "n00000000"]), fake(1000))


def test_images_without_labels_stay_without() -> None:
    assert indices(images_of([], [-1, -1]), fake(3)) == [-1, -1]
    assert possible_readings(images_of([], [-1]), fake(3)) == ([], "")


# ---------------------------------------------------------------- what the model's answers say


def test_the_reading_that_fits_the_models_answers_is_taken_and_said() -> None:
    images = images_of(NATURAL)
    torchvisions = {name: index for index, name in enumerate(sorted(NATURAL))}
    truth = np.array([torchvisions[NATURAL[target]] for target in images.targets])
    readings = class_readings(images, fake(10))
    places = telling_images(readings, images.targets)
    assert places.tolist() == list(range(2, 20))  # n1 is the first class in both orders, and tells nothing
    reading, note = choose_reading(readings, images.targets[places], truth[places])
    assert (reading.of(images.targets) == truth).all()
    assert note == (
        "the classes may be taken in natural order (n1, n2, n3, ...), as timm sorts: 0.0% right; or in plain order "
        "(n1, n10, n2, ...), as torchvision sorts: 100.0% right, of 18 images that tell these apart; the second is "
        "taken; a --class-map settles it"
    )


@pytest.mark.parametrize(("others", "taken"), [(9, 0), (10, 1)])
def test_the_first_reading_stands_unless_chance_is_ruled_out(others: int, taken: int) -> None:
    readings = readings_of_classes(["1", "3"], 10, None, "labels", "M")  # from 0 or from 1
    # ten heads in a row come up once in 1,024, nine once in 512
    chosen, note = choose_reading(readings, np.zeros(others, int), np.zeros(others, int))
    assert chosen is readings[taken] and f"the {('first', 'second')[taken]} is taken" in note
    assert choose_reading(readings, np.zeros(20, int), np.full(20, -1))[0] is readings[0]
    assert choose_reading(readings, np.zeros(0, int), np.zeros(0, int))[0] is readings[0]


def test_images_that_tell_are_spread_over_the_data_set() -> None:
    readings = readings_of_classes(NATURAL, 10, None, "folders", "M")
    targets = np.repeat(np.arange(10), 1000)
    places = telling_images(readings, targets)
    assert len(places) == 300 and set(targets[places].tolist()) == set(range(1, 10))


def test_what_is_plain_is_not_said() -> None:
    assert taken(images_of(["ant", "bee"]), fake(2, ["bee", "ant"])) == ""
    assert taken(images_of(["0", "1"], classes_by="labels"), fake(2)) == ""
    assert taken(images_of(["ant", "bee"]), fake(2)).startswith("the classes are taken in natural")
    assert taken(images_of(["1", "2"]), fake(2)) == "the classes are taken as numbers counted from 1"


# ---------------------------------------------------------------- folders that may be no classes, and names


def test_folders_that_are_no_classes_are_none_and_stated_ones_an_error() -> None:
    readings, note = possible_readings(images_of(["may", "june"]), fake(3, ["ant", "bee", "cat"]))
    assert readings == [] and "the folders are not taken for classes, so no accuracy is reported" in note
    for by in ("labels", "map"):
        with pytest.raises(ValueError, match="class"):
            possible_readings(images_of(["may", "june", "july", "ice"], classes_by=by), fake(3, ["a", "b", "c"]))
    with pytest.raises(ValueError, match="class 'june' .* though others are"):
        possible_readings(images_of(["ant", "june"]), fake(3, ["ant", "bee", "cat"]))


@pytest.mark.parametrize(
    ("names", "classes_by", "own", "inferred", "expected"),
    [
        ([], "folders", None, False, None),  # somebody's own thousand classes
        (["a", "b"], "map", None, False, ["a", "b", ""]),
        (["a", "b"], "map", ["x", "y", "z"], False, ["a", "b", "z"]),
        (["x", "z"], "folders", ["x", "y", "z"], False, ["x", "y", "z"]),
        (["0", "2"], "folders", None, False, ["0", "", "2"]),
    ],
)
def test_classes_are_named_by_the_map_then_the_model_then_the_folders(
    names: list[str], classes_by: str, own: list[str] | None, inferred: bool, expected: list[str] | None
) -> None:
    images, classifier = images_of(names, None if names else [-1], classes_by), fake(3, own, inferred)
    assert name_classes(images, class_readings(images, classifier)[0].of(images.targets), classifier) == expected


def test_imagenets_names_are_guessed_for_timms_own_weights_alone() -> None:
    images = images_of([], [-1])
    names = name_classes(images, images.targets, fake(1000, ["n01440764"] * 1000, inferred=True))
    assert names is not None and names[0] == "tench, Tinca tinca"
    assert name_classes(images, images.targets, fake(1000)) is None
