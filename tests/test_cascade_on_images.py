"""`Cascade` on pictures and paths: against its definition image by image, from several threads, with timm models."""

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch import nn

from clcnet import Cascade, CLCNet
from clcnet.cascade.in_memory import Picture, Predictions
from clcnet.cascade.pool import Pool
from clcnet.cascade.rules import Average, Fused, Surest
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.data.images import IMAGE_EXTENSIONS, ImageSet, list_images

Factory = Callable[..., Path]
SHALLOW, DEEP = 0, 1
pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """A model whose logits are the pixels that its transform found; it remembers how many images it was asked about."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.batches: list[int] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(batch))
        return self.weight * batch


def colour(image: Image.Image) -> torch.Tensor:
    """The first pixel's channels, from 0 to 1: three classes, the strongest channel wins."""
    return torch.tensor(image.getpixel((0, 0))) / 255


def picture(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (red, green, blue))


class MaxSoftmax:
    """A confidence to work out by hand."""

    def predict(self, probs: np.ndarray) -> np.ndarray:
        return probs[:, 0]


def of_two(models: Sequence[nn.Module], threshold: float = 0.6, transform: Any = colour) -> Cascade:
    return Cascade(*((model, transform) for model in models), MaxSoftmax(), threshold)


# the deep model contradicts the shallow one, and is surer
CASCADE = of_two([Counting(4.0), Counting(-40.0)])
PICTURES = [picture(255, 0, 0), picture(130, 140, 120), picture(0, 0, 200), picture(128, 128, 128)]


@pytest.fixture
def models() -> tuple[Counting, Counting]:
    """Those of `CASCADE`, not asked yet."""
    return Counting(4.0), Counting(-40.0)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def literal(
    images: list[Image.Image], thresholds: Sequence[float], weights: Sequence[float]
) -> list[tuple[int, float, int]]:
    """The cascade's definition, one image at a time, in numpy: class, confidence, and whose answer it is."""
    answers = []
    for image in images:
        pixel = np.array(image.getpixel((0, 0))) / 255
        answer = (0, -math.inf, 0)
        for stage, (weight, threshold) in enumerate(zip(weights, [*thresholds, -math.inf], strict=True)):
            probs = softmax(weight * pixel)
            if probs.max() > answer[1]:
                answer = (int(probs.argmax()), probs.max(), stage)
            if answer[1] >= threshold:
                break
        answers.append(answer)
    return answers


def assert_answers(predictions: Predictions, expected: list[tuple[int, float, int]]) -> None:
    labels, confidences, answered_by = zip(*expected, strict=True)
    assert predictions.labels.tolist() == list(labels)
    np.testing.assert_allclose(predictions.confidences, confidences, rtol=1e-6)
    assert predictions.answered_by.tolist() == list(answered_by)


TWO = [(threshold,) for threshold in (-math.inf, 0.35, 0.6, 0.95, math.inf)]
THREE = [(0.6, 0.9), (0.9, 0.6), (math.inf, 0.95), (0.6, -math.inf), (-math.inf, 1)]


@pytest.mark.parametrize("thresholds", [*TWO, *THREE])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_a_batch_is_answered_as_the_definition_says(thresholds: tuple[float, ...], batch_size: int | None) -> None:
    weights = (4.0, -5.0, 40.0) if len(thresholds) == 2 else (4.0, -40.0)
    models = [(Counting(weight), colour) for weight in weights]
    cascade = Cascade.of(models, Surest("max softmax"), thresholds, batch_size=batch_size)
    assert_answers(cascade(PICTURES), literal(PICTURES, thresholds, weights))


def test_a_rule_that_joins_answers_is_told_all_of_them(models) -> None:
    cascade = Cascade.of([(model, colour) for model in models], Average("max softmax"), [0.6])
    probs = np.array([[softmax(model.weight.item() * colour(image).numpy()) for image in PICTURES] for model in models])
    alone = probs[0].max(axis=1) >= 0.6  # the first and the third picture
    joined = np.where(alone[:, None], probs[0], probs.mean(axis=0))
    labels, confidences, answered_by = cascade(PICTURES)
    assert labels.tolist() == joined.argmax(axis=1).tolist()
    assert answered_by.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(confidences, np.where(alone, probs[0].max(axis=1), probs.max(axis=2).mean(axis=0)))


def test_fused_answers_of_a_list_of_which_a_part_goes_on_are_those_of_its_images_one_by_one(models) -> None:
    rule = Fused(pools=(Pool(np.array([1.0])), Pool(np.array([0.5, 0.2]))))
    cascade = Cascade.of([(model, colour) for model in models], rule, [0.6])
    together, alone = cascade(PICTURES), [cascade([image]) for image in PICTURES]
    assert together.answered_by.tolist() == [0, 1, 0, 1]
    for column, *single in zip(together, *alone, strict=True):
        np.testing.assert_allclose(column, np.concatenate(single), rtol=1e-6)


def test_the_deep_model_sees_the_deferred_images_and_no_other(models) -> None:
    _, _, answered_by = of_two(models)(PICTURES)
    assert answered_by.tolist() == [0, 1, 0, 0]  # the grey one goes on too, but neither model prefers a class
    assert (models[0].batches, models[1].batches) == ([4], [2])
    assert of_two(models, -999)(PICTURES[:3]).names == ["0", "1", "2"]
    assert models[1].batches == [2], "where nothing is deferred it is not called"
    Cascade((models[0], colour), (models[1], colour), MaxSoftmax(), math.inf, batch_size=3)(PICTURES * 2)
    assert models[0].batches[2:] == models[1].batches[1:] == [3, 3, 2]


def test_a_compiled_model_is_not_compiled_anew_for_every_number_of_images(
    classifier_dir: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = load_classifier(f"local-dir:{classifier_dir()}", device="cpu", compile=True)
    model.model = nn.Sequential(nn.Conv2d(3, 3, 32), nn.Flatten()).eval()
    cascade = Cascade.of([model], Surest("max softmax"), [])
    for count in (4, 3, 2, 1, 4, 1):
        cascade(PICTURES[:count])
    assert len(compiled) == 3  # the first size, any size, and a single image: padding as in step 5 would cost more


def test_paths_and_pictures_of_any_mode_give_the_same(tmp_path: Path) -> None:
    for index, image in enumerate(PICTURES):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png"), tmp_path / "2.png", tmp_path / "3.png"]
    others = [image.convert("RGBA") for image in PICTURES]
    for same in (others, [path.read_bytes() for path in map(Path, paths)], [*map(np.asarray, PICTURES)]):
        for one, other in zip(CASCADE(paths), CASCADE(same), strict=True):
            np.testing.assert_array_equal(one, other)
    grey = np.full((5, 4), 128, np.uint8)
    assert CASCADE([grey, PICTURES[3]]).confidences.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert len(CASCADE(np.stack([np.asarray(image) for image in PICTURES])).labels) == 4


def test_a_single_image_instead_of_a_list_is_refused() -> None:
    for image in ("cat.jpg", Path("cat.jpg"), PICTURES[0], b"bytes", np.asarray(PICTURES[0])):
        with pytest.raises(TypeError, match="takes a list of images"):
            CASCADE(image)


def test_no_image_gives_empty_answers() -> None:
    labels, confidences, answered_by = CASCADE([])
    assert labels.shape == confidences.shape == answered_by.shape == (0,)


def test_pictures_of_every_mode_are_converted_as_timm_converts_them(models) -> None:
    seen: list[Image.Image] = []

    def keep(image: Image.Image) -> torch.Tensor:
        seen.append(image)
        return colour(image)

    grey_and_red = Image.new("L", (3, 2), 77), Image.new("CMYK", (2, 5), (0, 255, 255, 0))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 200, 30])
    turned = picture(1, 2, 3).resize((4, 2))
    turned.getexif()[0x0112] = 6  # on its side, which timm's loader does not heed
    of_two(models, -math.inf, keep)([*grey_and_red, palette, turned])
    assert {image.mode for image in seen} == {"RGB"}
    assert [image.size for image in seen] == [(3, 2), (2, 5), (2, 2), (4, 2)]
    assert [image.getpixel((0, 0)) for image in seen] == [(77, 77, 77), (255, 0, 0), (9, 200, 30), (1, 2, 3)]


def assert_second_fails(image: Picture, words: str) -> None:
    """Between two others, whose answers are those that they get without it."""
    found, expected = CASCADE([PICTURES[0], image, PICTURES[1]]), CASCADE([PICTURES[0], PICTURES[1]])
    assert list(found.errors) == [1] and re.search(words, found.errors[1]), found.errors
    assert (found.labels[1], found.answered_by[1], found.names[1]) == (-1, -1, "")
    assert np.isnan(found.confidences[1])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[[0, 2]], other)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    PICTURES[0].resize((200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    for image, words in (
        (tmp_path / "text.png", "cannot identify image file .*text.png"),
        (tmp_path / "cut.png", "cut.png cannot be read"),
        (tmp_path / "absent.png", "No such file .*absent.png"),
        (tmp_path, "a directory, pipe or device"),
        ((tmp_path / "cut.png").read_bytes(), "image 2 of the list cannot be read"),
        (b"", "image 2 of the list cannot be read"),
    ):
        assert_second_fails(image, words)
    with Image.open(tmp_path / "cut.png") as opened:
        assert_second_fails(opened, "image 2 of the list cannot be read")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # PIL's error for it is neither OSError nor ValueError
    assert_second_fails(tmp_path / "whole.png", "whole.png cannot be read .*40000 pixels")


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that PIL takes for Ghostscript; it leaves a file behind, whose path is returned."""
    program, trace = tmp_path / "bin" / "gs", tmp_path / "was-run"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    assert EpsImagePlugin.has_ghostscript()
    trace.unlink()
    return trace


def test_no_image_has_a_program_run(tmp_path: Path, ghostscript: Path) -> None:
    script = tmp_path / "script.jpg"
    PICTURES[0].save(script, "EPS")
    assert_second_fails(script, "cannot identify image file .*script.jpg")
    assert_second_fails(script.read_bytes(), "cannot identify image file")
    words = r"image 2 of the list cannot be read \(its format, EPS, is not one of JPEG .*; convert it first\)"
    with Image.open(script) as opened:
        assert_second_fails(opened, words)
    assert not ghostscript.exists()


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_images_of_every_listed_extension_are_read_and_taken_from_pil(tmp_path: Path, extension: str) -> None:
    PICTURES[0].convert("1" if extension == ".pbm" else "RGB").save(tmp_path / f"x{extension}")
    if extension == ".jpg":  # a photograph of several pictures is one too
        PICTURES[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))])
    with Image.open(tmp_path / f"x{extension}") as opened:
        assert len(CASCADE([tmp_path / f"x{extension}", opened]).labels) == 2
        assert opened.format == "MPO" or extension != ".jpg"


def test_what_is_neither_picture_nor_path_is_refused() -> None:
    for image, words in (
        (np.zeros((2, 2, 3)), r"image 2 of the list is float64 of shape \(2, 2, 3\)"),
        (np.zeros((3, 2, 2), np.uint8), r"image 2 of the list is uint8 of shape \(3, 2, 2\)"),
        (7, "image 2 of the list is a int"),
    ):
        with pytest.raises(TypeError, match=words):
            CASCADE([PICTURES[0], image])  # type: ignore[list-item]


def test_an_error_of_a_transform_is_not_blamed_on_the_image(models) -> None:
    def broken(image: Image.Image) -> torch.Tensor:
        raise ArithmeticError("of the transform")

    with pytest.raises(ArithmeticError, match="of the transform"):
        of_two(models, transform=broken)(PICTURES)


@pytest.mark.parametrize(("broken", "place"), [(SHALLOW, 1), (DEEP, 2)])
def test_an_answer_that_is_not_a_number_names_the_picture_and_the_model(models, broken: int, place: int) -> None:
    models[broken].weight.data.fill_(math.nan)
    models[broken].__class__ = type("Broken", (Counting,), {})
    found = of_two(models)(PICTURES)
    assert list(found.errors) == ([0, 1, 2, 3] if broken == SHALLOW else [1, 3])
    assert found.errors[place - 1].startswith(f"image {place} of the list: the answer of Broken is not a number")
    assert [label == -1 for label in found.labels] == [index in found.errors for index in range(4)]


class Small(Counting):
    """A model for whose memory more than three images are too many."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        answer = super().forward(batch)
        if len(batch) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return answer


def test_a_batch_larger_than_the_memory_is_answered_in_pieces_and_the_next_call_knows(caplog) -> None:
    expected = CASCADE(PICTURES * 3)
    deep = Small(-40.0)
    small = of_two([Small(4.0), deep])
    for _ in range(2):
        for one, other in zip(small(PICTURES * 3), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert deep.batches == [6, 3, 3, 3, 3]
    assert "out of memory with 6 images at once: going on with 3" in caplog.text


def test_a_model_for_which_one_image_is_too_much_is_an_error() -> None:
    class Tiny(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(MemoryError, match="Tiny and one image do not fit"):
        of_two([Tiny(), Counting(4.0)])(PICTURES)


def test_a_cascade_needs_one_threshold_between_two_models_a_number_and_some_images_at_once(models) -> None:
    for thresholds, batch_size, message in (
        ([0.5, 0.5], None, "2 models need 1 thresholds, not 2"),
        ([math.nan], None, "threshold is NaN"),
        ([0.5], 0, "batch_size is 0; give 1 or more"),
        ([0.5], -1, "batch_size is -1; give 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Cascade.of([(model, colour) for model in models], Surest("max softmax"), thresholds, batch_size)


# ---------------------------------------------------------------- timm models


@pytest.fixture(scope="module")
def shallow(classifier_dir: Factory) -> Classifier:
    return load_classifier(f"local-dir:{classifier_dir(seed=1)}", device="cpu")


@pytest.fixture(scope="module")
def deep(classifier_dir: Factory) -> Classifier:
    return load_classifier(f"local-dir:{classifier_dir('test_vit', size=48, seed=2)}", device="cpu", img_size=48)


@pytest.fixture
def images(image_folder: Factory) -> ImageSet:
    return list_images(image_folder(images_per_class=9))


@pytest.fixture
def of_timm(shallow: Classifier, deep: Classifier, images: ImageSet) -> Cascade:
    """CLCNet's, with a threshold that defers 13 of the 27 images."""
    torch.manual_seed(0)
    clcnet = CLCNet(num_classes=3).eval()
    confidences = np.sort(Cascade(shallow, deep, clcnet, -math.inf)(images.paths).confidences)
    return Cascade(shallow, deep, clcnet, float(confidences[12:14].mean()))


def test_each_model_sees_an_image_through_its_own_preprocessing_and_in_its_own_mode(
    classifier_dir: Factory, deep: Classifier, tmp_path: Path
) -> None:
    shallow = load_classifier(f"local-dir:{classifier_dir(seed=7)}", device="cpu", crop_mode="squash")
    generator = np.random.default_rng(0)
    pictures = []
    for index, (mode, size) in enumerate([("RGB", (70, 40)), ("L", (33, 90)), ("RGBA", (48, 48)), ("P", (20, 300))]):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
        pictures.append(Image.fromarray(pixels).convert(mode))
        pictures[-1].save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(len(pictures))]
    for images in (pictures, paths):
        labels, confidences, answered_by = Cascade(shallow, deep, MaxSoftmax(), math.inf)(images)
        for index, image in enumerate(pictures):
            batches = [model.transform(image.convert("RGB"))[None] for model in (shallow, deep)]
            assert [batch.shape[-1] for batch in batches] == [32, 48]
            both = [
                model.probabilities(batch)[0].numpy() for model, batch in zip((shallow, deep), batches, strict=True)
            ]
            stage = int(both[DEEP].max() > both[SHALLOW].max())
            assert (labels[index], answered_by[index]) == (both[stage].argmax(), stage)
            assert confidences[index] == pytest.approx(both[stage].max(), abs=1e-5)


def test_a_strip_that_would_fill_the_memory_is_refused(of_timm: Cascade) -> None:
    found = of_timm([Image.new("L", (1, 2_000_000))])
    assert "image 1 of the list cannot be read" in found.errors[0] and "too long and thin" in found.errors[0]


def test_answers_have_the_names_that_the_first_model_gives_its_classes(of_timm: Cascade, images: ImageSet) -> None:
    found = of_timm([*images.paths, "absent.png"])
    assert found.names == [*(("ant", "bee", "cat")[label] for label in found.labels[:-1]), ""]


def test_models_that_number_their_classes_differently_agree_on_what_they_say(
    classifier_dir: Factory, shallow: Classifier, images: ImageSet
) -> None:
    plain = load_classifier(f"local-dir:{classifier_dir(seed=5)}", device="cpu")
    names = ("cat", "ant", "bee")
    mixed = load_classifier(f"local-dir:{classifier_dir(seed=5, label_names=names)}", device="cpu")
    one, other = (Cascade(shallow, deep, MaxSoftmax(), math.inf)(images.paths) for deep in (plain, mixed))
    from_deep = one.answered_by == DEEP
    assert from_deep.any()
    np.testing.assert_array_equal(one.answered_by, other.answered_by)
    # the same network's answer k means names[k] for one and ("ant", "bee", "cat")[k] for the other
    place = np.array([("ant", "bee", "cat").index(name) for name in names])
    np.testing.assert_array_equal(other.labels[from_deep], place[one.labels[from_deep]])


def test_models_of_other_classes_are_refused(classifier_dir: Factory, shallow: Classifier) -> None:
    four = load_classifier(f"local-dir:{classifier_dir(num_classes=4, label_names=None)}", device="cpu")
    with pytest.raises(ValueError, match=f"has 3 classes and {four.name} has 4; a cascade needs models of the same"):
        Cascade(shallow, four, MaxSoftmax(), 0.5)
    birds = load_classifier(f"local-dir:{classifier_dir(label_names=('ant', 'bee', 'owl'))}", device="cpu")
    with pytest.raises(ValueError, match="the class 'owl' of .* is not among those of"):
        Cascade(shallow, birds, MaxSoftmax(), 0.5)


# ---------------------------------------------------------------- the package's front door


def test_the_package_knows_its_three_names_and_no_other() -> None:
    import clcnet

    assert {"CLCNet", "Cascade", "Outputs"} <= set(dir(clcnet))
    with pytest.raises(AttributeError, match="no attribute 'Casacde'"):
        clcnet.Casacde  # noqa: B018
