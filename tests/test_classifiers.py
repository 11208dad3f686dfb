"""Models by name, their probabilities against timm's own, odd images, odd checkpoints, and memory that runs out."""

import copy
import dataclasses
import logging
import os
import shutil
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from networks import classify
from PIL import Image
from timm.data import ImageDataset, create_loader, resolve_model_data_config

from clcnet.classifiers import classifier as classifiers
from clcnet.classifiers import decoding, stream
from clcnet.classifiers.classifier import Classifier, is_out_of_memory, load_classifier
from clcnet.classifiers.stream import Batch
from clcnet.data.images import list_images
from clcnet.distributed import resolve_device

Factory = Callable[..., Path]


def probabilities_of_timm(model: str, folder: Path, **overrides: object) -> np.ndarray:
    """What timm's dataset, loader and model say about a folder: the second implementation."""
    network = timm.create_model(model, pretrained=True).eval()
    config = resolve_model_data_config(network, overrides)
    loader = create_loader(ImageDataset(folder), batch_size=4, device=torch.device("cpu"), num_workers=0, **config)
    with torch.inference_mode():
        return np.concatenate([network(images).softmax(dim=1).numpy() for images, _ in loader])


def probabilities_of_ours(classifier: Classifier, folder: Path, **options: object) -> np.ndarray:
    return np.concatenate([batch.probs for batch in classify(classifier, list_images(folder), workers=0, **options)])


def reasons_of(batches: Iterable[Batch]) -> dict[int, str]:
    return {place: reason for batch in batches for place, reason in batch.reasons.items()}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(classifier_dir: Factory) -> str:
    return f"local-dir:{classifier_dir()}"


@pytest.fixture
def classifier(model: str) -> Classifier:
    return load_classifier(model, device="cpu")


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("workers", [0, 2])
def test_probabilities_equal_those_of_timms_own_loader_and_model(
    image_folder: Factory, model: str, classifier: Classifier, workers: int
) -> None:
    folder = image_folder(images_per_class=3, size=48)
    images = list_images(folder)
    batches = list(classify(classifier, images, batch_size=4, workers=workers))
    assert [len(batch.indices) for batch in batches] == [4, 4, 1]
    assert np.concatenate([batch.answered for batch in batches]).tolist() == list(range(9))
    probs = np.concatenate([batch.probs for batch in batches])
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, probabilities_of_timm(model, folder), atol=1e-6, rtol=0)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        {"img_size": 40},
        {"crop_pct": 0.5},
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"interpolation": "nearest"},
        {"img_size": 24, "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"},
    ],
)
def test_each_preprocessing_override_does_what_it_does_in_timm(
    tmp_path: Path, model: str, overrides: dict[str, object]
) -> None:
    for name, size in [("a/wide.png", (64, 36)), ("b/tall.png", (30, 70))]:
        (tmp_path / name).parent.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    ours = probabilities_of_ours(load_classifier(model, device="cpu", **overrides), tmp_path)
    np.testing.assert_allclose(ours, probabilities_of_timm(model, tmp_path, **overrides), atol=1e-6, rtol=0)
    assert np.abs(ours - probabilities_of_timm(model, tmp_path)).max() > 1e-4


def test_real_images_through_a_real_model_equal_timm(shared: Path) -> None:
    folder = shared / "cifar10" / "imagenet_splits_5" / "split_part_1" / "cat"
    model = f"local-dir:{shared / 'cifar10' / 'deep'}"
    ours = probabilities_of_ours(load_classifier(model, device="cpu"), folder)
    np.testing.assert_allclose(ours, probabilities_of_timm(model, folder), atol=1e-6, rtol=0)


def test_the_transform_for_single_pictures_gives_the_same_probabilities_as_the_loader(
    image_folder: Factory, classifier: Classifier
) -> None:
    images = list_images(image_folder(images_per_class=1, size=50))
    batch = torch.stack([classifier.transform(Image.open(path).convert("RGB")) for path in images.paths])
    probs = np.concatenate([batch.probs for batch in classify(classifier, images)])
    # the loader normalises whole batches of bytes, the transform single pictures: the last digits of float32 differ
    np.testing.assert_allclose(classifier.probabilities(batch).numpy(), probs, atol=1e-5)


def test_a_model_for_grayscale_images_sees_them_as_timm_shows_them(tmp_path: Path, image_folder: Factory) -> None:
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    network.pretrained_cfg["num_classes"] = 3
    timm.models.save_for_hf(network, tmp_path / "gray", safe_serialization=True)
    classifier = load_classifier(f"local-dir:{tmp_path / 'gray'}", device="cpu")
    assert classifier.image_mode == "L"
    assert probabilities_of_ours(classifier, image_folder()).shape == (15, 3)


# ---------------------------------------------------------------- images of all kinds


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_gray(path: Path, dtype: type, factor: float) -> None:
    ramp = np.arange(256).reshape(16, 16)
    Image.fromarray((ramp * factor).astype(dtype)).save(path)


def save_turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    picture().save(path, exif=exif)


READABLE: dict[str, Callable[[Path], None]] = {
    "cmyk.jpg": lambda path: picture("CMYK").save(path),
    "sixteen_bits.png": lambda path: save_gray(path, np.uint16, 257),
    "palette.png": lambda path: picture("P").save(path),
    "gray.jpg": lambda path: picture("L").save(path),
    "transparent.png": lambda path: picture("RGBA").save(path),
    "rotated.jpg": lambda path: save_turned(path, 6),  # by a quarter
    # a GIF by another name, since timm looks for PNG and JPEG names only
    "animated.png": lambda path: picture().save(path, "GIF", save_all=True, append_images=[picture().rotate(180)]),
    "one_pixel.png": lambda path: picture(size=(1, 1)).save(path),
}


@pytest.mark.parametrize("name", READABLE)
def test_an_unusual_image_is_read_as_timm_reads_it(
    tmp_path: Path, model: str, classifier: Classifier, name: str
) -> None:
    (tmp_path / "a").mkdir()
    READABLE[name](tmp_path / "a" / name)
    ours = probabilities_of_ours(classifier, tmp_path)
    np.testing.assert_allclose(ours, probabilities_of_timm(model, tmp_path), atol=1e-6, rtol=0)


def save_truncated(path: Path) -> None:
    picture().save(path)
    path.write_bytes(path.read_bytes()[:-500])


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated.jpg": (save_truncated, "truncated"),
    "truncated.png": (save_truncated, "truncated"),
    "empty.jpg": (Path.touch, "cannot identify"),
    "text.png": (lambda path: path.write_text("no image"), "cannot identify"),
    "header_only.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "cannot identify"),
    "folder.png": (Path.mkdir, "directory"),
    "link_to_nothing.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_are_no_images_are_left_out_and_reported_with_the_reason(
    image_folder: Factory, classifier: Classifier, workers: int
) -> None:
    folder = image_folder(images_per_class=2)
    expected = probabilities_of_ours(classifier, folder)
    images = list_images(folder)
    files = list(images.files)
    for position, (name, (make, _)) in enumerate(UNREADABLE.items()):
        make(folder / name)
        files.insert(2 * position, name)  # between the good ones
    bad = [files.index(name) for name in UNREADABLE]
    mixed = dataclasses.replace(images.subset([0] * len(files)), files=files)
    batches = list(classify(classifier, mixed, batch_size=4, workers=workers))
    reasons = reasons_of(batches)
    assert sorted(reasons) == sorted(bad)
    for index, (_, words) in zip(bad, UNREADABLE.values(), strict=True):
        assert words in reasons[index]
        assert str(folder) not in reasons[index]
    kept = np.concatenate([batch.answered for batch in batches])
    assert kept.tolist() == [index for index in range(len(files)) if index not in bad]
    np.testing.assert_allclose(np.concatenate([batch.probs for batch in batches]), expected, atol=1e-6)


REMARKABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "16_bit.png": (lambda path: save_gray(path, np.uint16, 257), "values beyond 8 bits"),
    "16_bit.tif": (lambda path: save_gray(path, np.uint16, 257), "values beyond 8 bits"),
    "16_bit_dark.png": (lambda path: save_gray(path, np.uint16, 1), ""),
    "fractions.tif": (lambda path: save_gray(path, np.float32, 1 / 255), "fractions from 0 to 1"),
    "float.tif": (lambda path: save_gray(path, np.float32, 1), ""),
    "negative.tif": (lambda path: save_gray(path, np.int32, -1), "values beyond 8 bits"),
    "turned.jpg": (lambda path: save_turned(path, 6), "an orientation tag"),
    "turned.png": (lambda path: save_turned(path, 3), "an orientation tag"),
    "turned.webp": (lambda path: save_turned(path, 3), "an orientation tag"),
    "turned.tif": (lambda path: save_turned(path, 6), ""),  # PIL itself turns it
    "upright.jpg": (lambda path: save_turned(path, 1), ""),
    "bad_tag.jpg": (lambda path: picture().save(path, exif=b"Exif\0\0nonsense"), ""),
    "clear.png": (lambda path: Image.new("RGBA", (8, 8), (255, 0, 0, 9)).save(path), "transparency"),
    "opaque.png": (lambda path: Image.new("RGBA", (8, 8), "red").save(path), ""),
    "clear.gif": (lambda path: picture("P").save(path, transparency=0), "transparency"),
    "plain.jpg": (lambda path: picture().save(path), ""),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_model_sees_otherwise_than_a_viewer_is_remarked_on(
    tmp_path: Path, classifier: Classifier, workers: int
) -> None:
    for name, (save, _) in REMARKABLE.items():
        save(tmp_path / name)
    images = list_images(tmp_path)
    batches = classify(classifier, images, batch_size=4, workers=workers)
    remarks = {place: remark for batch in batches for place, remark in batch.remarks.items()}
    assert {images.names[index] for index in remarks} == {name for name, (_, words) in REMARKABLE.items() if words}
    for index, remark in remarks.items():
        assert REMARKABLE[images.names[index]][1] in decoding.REMARKS[remark]
    line = decoding.sum_up_remarks(remarks.values())
    assert "3 with values beyond 8 bits" in line and "3 with an orientation tag" in line
    assert decoding.sum_up_remarks([]) == ""


def test_an_image_that_fails_once_is_reported_with_the_reason_of_that_once(
    image_folder: Factory, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = decoding.ImageDataset.read
    calls = iter([OSError("stale file handle")])

    def fail_once(self: decoding.ImageDataset, position: int) -> Image.Image:
        for error in calls:
            raise error
        return read(self, position)

    monkeypatch.setattr(decoding.ImageDataset, "read", fail_once)
    reasons = reasons_of(classify(classifier, list_images(image_folder())))
    assert reasons == {0: "stale file handle"}


# ---------------------------------------------------------------- memory


class LittleMemory(torch.nn.Module):
    """Answers batches of at most `room` images; runs out of memory with more."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        return images.mean(dim=(2, 3))


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_the_user_is_told(
    image_folder: Factory, classifier: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder()
    big = dataclasses.replace(classifier, model=LittleMemory(room=100))
    small = dataclasses.replace(classifier, model=LittleMemory(room=2))
    expected = probabilities_of_ours(big, folder, batch_size=6)
    np.testing.assert_array_equal(probabilities_of_ours(small, folder, batch_size=6), expected)
    assert small.model.seen == [6, 3, 1, 1, 1, 1, 1, 1] + [1] * 9
    assert caplog.messages == [
        "out of memory with 6 images at once: going on with 3",
        "out of memory with 3 images at once: going on with 1",
    ]


def test_one_image_that_does_not_fit_is_an_error(image_folder: Factory, classifier: Classifier) -> None:
    classifier.model = LittleMemory(room=0)
    with pytest.raises(MemoryError, match="one image do not fit"):
        list(classify(classifier, list_images(image_folder())))


def test_errors_other_than_memory_are_not_swallowed(image_folder: Factory, classifier: Classifier) -> None:
    classifier.model = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        list(classify(classifier, list_images(image_folder())))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_freed_memory_is_returned_before_decoding_processes_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    start = torch.utils.data.DataLoader.__iter__
    monkeypatch.setattr(decoding, "return_freed_memory", lambda: events.append("return"))
    monkeypatch.setattr(
        torch.utils.data.DataLoader, "__iter__", lambda loader: events.append("start processes") or start(loader)
    )
    # a loader of torch's own starts its processes at once, one of timm's with the first batch
    assert len(list(decoding.loaded_batches(torch.utils.data.DataLoader([1, 2, 3], num_workers=1)))) == 3
    assert events == ["return", "start processes"]


def test_a_gpu_starts_on_the_next_batch_before_the_answers_to_this_one_are_waited_for(
    image_folder: Factory, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    forward = classifiers.HalvingForward.__call__

    def fetch(probs: torch.Tensor) -> Callable[[], np.ndarray]:
        return lambda: events.append("wait") or probs.numpy()

    monkeypatch.setattr(stream, "_computes_apart", lambda device: True)
    monkeypatch.setattr(stream, "_fetch", fetch)
    monkeypatch.setattr(
        classifiers.HalvingForward, "__call__", lambda *arguments: events.append("launch") or forward(*arguments)
    )
    folder = image_folder()
    probs = probabilities_of_ours(classifier, folder, batch_size=5)
    assert events == ["launch", "launch", "wait", "launch", "wait", "wait"]
    monkeypatch.undo()
    np.testing.assert_array_equal(probs, probabilities_of_ours(classifier, folder, batch_size=5))


def test_the_answers_of_a_second_gpu_are_waited_for_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class OnSecondGpu:
        device = torch.device("cuda:1")

        def to(self, place: str, non_blocking: bool) -> torch.Tensor:
            events.append((place, non_blocking))
            return torch.tensor([0.5])

    def current_stream(device: torch.device) -> object:
        event = types.SimpleNamespace(synchronize=lambda: events.append(f"{device} has arrived"))
        return types.SimpleNamespace(record_event=lambda: event)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    fetched = stream._fetch(OnSecondGpu())
    assert events == [("cpu", True)]
    assert fetched().tolist() == [0.5] and events[1:] == ["cuda:1 has arrived"]


# ---------------------------------------------------------------- names and tags


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tf_efficientnet_b44", "knows no tf_efficientnet_b44; did you mean tf_efficientnet_b4 or"),
        ("qqqqqqqq", r"knows no qqqqqqqq; timm.list_models\(\)"),
        ("tf_efficientnet_b4.aa", "no such weights of tf_efficientnet_b4; it has tf_efficientnet_b4.aa_in1k,"),
        ("vit_base_patch16_gap_224", "no pretrained weights.*give a weights file"),
        ("some/folder", "local-dir:some/folder"),
    ],
)
def test_a_name_that_timm_does_not_know_is_one_line_with_a_way_out(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_classifier(name)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("timm.models._builder.load_state_dict_from_hf", "test_resnet"),
        ("clcnet.classifiers.models.hf_hub_download", "hf-hub:timm/resnet18.a1_in1k"),
    ],
)
def test_weights_that_cannot_be_downloaded_are_one_line_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file\non the Hub. Please check.")

    monkeypatch.setattr(place, offline)
    with pytest.raises(OSError, match=rf"{name}.*cannot be had \(An error.*on the Hub\).*weights file") as caught:
        load_classifier(name, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every download of pretrained weights succeed at once, with random ones; return what was asked for."""
    asked: list[str] = []

    def pretend(model: torch.nn.Module, pretrained_cfg: object = None, **_: object) -> None:
        asked.append(pretrained_cfg.hf_hub_id if hasattr(pretrained_cfg, "hf_hub_id") else str(pretrained_cfg))

    monkeypatch.setattr("timm.models._builder.load_pretrained", pretend)
    return asked


@pytest.mark.parametrize(
    ("name", "resolved", "paper"),
    [
        ("tf_efficientnet_b0", "tf_efficientnet_b0.ns_jft_in1k", "tf_efficientnet_b0.aa_in1k"),
        ("tf_efficientnet_b5", "tf_efficientnet_b5.ns_jft_in1k", "tf_efficientnet_b5.ra_in1k"),
        ("test_resnet", "test_resnet.r160_in1k", None),
        ("tf_efficientnet_b0.aa_in1k", "tf_efficientnet_b0.aa_in1k", None),
    ],
)
def test_a_bare_name_says_which_weights_it_stands_for_and_which_the_paper_used(
    no_download: list[str], caplog: pytest.LogCaptureFixture, name: str, resolved: str, paper: str | None
) -> None:
    classifier = load_classifier(name, device="cpu")
    assert classifier.name == resolved
    stands = [f"{name} stands for {resolved} in timm {timm.__version__}"] if name != resolved else []
    assert caplog.messages == [f"{words}; the paper used {paper}" if paper else words for words in stands]


def test_a_model_is_described_by_what_it_sees_and_costs(no_download: list[str]) -> None:
    description = load_classifier("tf_efficientnet_b0.aa_in1k", device="cpu").describe()
    for part in ("1000 classes", "224x224", "bicubic", "crop 0.875 center", "0.3858B multiply-adds", "on cpu, float32"):
        assert part in description


def test_imagenets_names_are_guessed_for_timms_own_weights_alone(no_download: list[str], tmp_path: Path) -> None:
    timms = load_classifier("test_resnet.r160_in1k", device="cpu")
    assert timms.label_names_inferred and timms.label_names is not None and timms.label_names[0] == "n01440764"
    torch.save(timms.model.state_dict(), tmp_path / "mine.pth")
    mine = load_classifier("test_resnet", weight=tmp_path / "mine.pth", device="cpu")
    assert mine.num_classes == 1000 and mine.label_names is None and not mine.label_names_inferred


def test_another_number_of_classes_than_the_pretrained_weights_have_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match="test_resnet was trained on 1000 classes, not 10"):
        load_classifier("test_resnet", num_classes=10)
    with pytest.raises(ValueError, match="trained on 3 classes, not 4"):
        load_classifier(model, num_classes=4)
    assert load_classifier(model, num_classes=3).num_classes == 3


# ---------------------------------------------------------------- keys, devices, speed


def test_the_key_says_what_the_model_is_and_the_run_key_also_how_it_runs(
    classifier: Classifier, model: str, classifier_dir: Factory
) -> None:
    assert load_classifier(model, device="cpu").key == classifier.key
    other_folder = classifier_dir(seed=5)
    others = [
        load_classifier(model, weight=other_folder / "model.safetensors", device="cpu"),
        load_classifier(model, device="cpu", img_size=40),
        load_classifier(model, device="cpu", crop_mode="squash"),
    ]
    assert len({other.key for other in others} | {classifier.key}) == 4
    same_weights = load_classifier(f"local-dir:{other_folder}", device="cpu")
    assert same_weights.key == others[0].key  # wherever the file lies
    half = load_classifier(model, device="cpu", amp="bfloat16")
    assert half.key == classifier.key and half.run_key != classifier.run_key
    on_gpu = dataclasses.replace(classifier, device=torch.device("cuda"))
    assert dataclasses.replace(on_gpu, tf32=True).run_key != on_gpu.run_key


def test_another_activation_is_another_model_though_the_weights_are_the_same(classifier: Classifier) -> None:
    other = dataclasses.replace(classifier, model=copy.deepcopy(classifier.model))
    assert other.key == classifier.key
    other.model.act1 = torch.nn.Sigmoid()
    another = dataclasses.replace(classifier, model=copy.deepcopy(classifier.model))
    another.model.bn1.eps = 0.5
    assert len({classifier.key, dataclasses.replace(other).key, another.key}) == 3


@pytest.mark.parametrize("text", ["cuda:99", "quantum", "meta", "cpu:x"])
def test_a_device_that_is_not_here_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=f"device {text} .*give another --device or none"):
        resolve_device(text)


def test_the_best_device_is_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *_, device: device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device() == torch.device("cuda", 3)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", number) for number in (0, 3, 1)]  # events and streams are on the same one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")


def test_a_gpu_goes_by_its_own_name(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert dataclasses.replace(classifier, device=torch.device("cuda:1")).device_name == "GPU 1"
    assert classifier.device_name == "cpu"


@pytest.mark.parametrize(
    ("options", "most", "words"),
    [
        ({"amp": "bfloat16"}, 0.1, "bfloat16"),
        ({"amp": "float16"}, 0.1, "float16"),
        ({"channels_last": True}, 1e-5, "float32, channels last"),
    ],
)
def test_precision_and_layout_change_little_and_are_said(
    image_folder: Factory, model: str, options: dict[str, Any], most: float, words: str
) -> None:
    folder = image_folder(images_per_class=1)
    other, plain = load_classifier(model, device="cpu", **options), load_classifier(model, device="cpu")
    probs = probabilities_of_ours(other, folder)
    assert probs.dtype == np.float32 and other.describe().endswith(f"on cpu, {words}")
    assert (0 if "amp" in options else -1) < np.abs(probs - probabilities_of_ours(plain, folder)).max() < most
    weight = next(tensor for tensor in other.model.parameters() if tensor.ndim == 4 and tensor.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == other.channels_last


def test_a_compiled_model_sees_batches_of_one_size_alone(
    image_folder: Factory, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda module: lambda batch: seen.append(len(batch)) or module(batch))
    classifier, folder = load_classifier(model, device="cpu", compile=True), image_folder()
    probs = probabilities_of_ours(classifier, folder, batch_size=4)
    assert seen == [4, 4, 4, 4] and "compiled" in classifier.describe()  # of 15 images; another size compiles anew
    plain = probabilities_of_ours(load_classifier(model, device="cpu"), folder, batch_size=4)
    np.testing.assert_allclose(probs, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("seconds", "waited", "words"),
    [(100, 45, ", 45% of the time waiting for images to be decoded"), (100, 15, ""), (5, 5, ""), (0, 0, "")],
)
def test_what_waits_for_decoding_is_said_where_it_is_much(seconds: float, waited: float, words: str) -> None:
    assert stream.describe_waiting(seconds, waited) == words


def test_defaults_suit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [classifiers.default_batch_size(torch.device(name)) for name in ("cpu", "cuda")] == [64, 256]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    monkeypatch.setattr(decoding, "free_bytes", lambda: 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**32))
    assert decoding.default_workers(2**20) == 95  # one core is left to the process that runs the model
    assert decoding.default_workers(2**26) == 32  # whose batches fill half of 4 GiB of shared memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [decoding.default_workers(2**20), decoding.default_workers(2**26)] == [11, 4]
    monkeypatch.setattr(decoding, "free_bytes", lambda: 2**32)
    assert decoding.default_workers(2**20) == 1  # 512 MiB a process


def test_labels_given_by_index_in_the_models_configuration_are_understood(classifier: Classifier) -> None:
    config = {**classifier.model.pretrained_cfg, "label_names": {"0": "x", "1": "y", "2": "z"}}
    classifier.model.pretrained_cfg = config
    assert classifiers._label_names(classifier.model, is_timms=False) == (["x", "y", "z"], False)


@pytest.fixture(autouse=True)
def warnings_reach_caplog() -> None:
    logging.getLogger("clcnet").propagate = True
