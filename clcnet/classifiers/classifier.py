"""A timm model and a set of images -> class probabilities, prepared, loaded and batched by timm's own functions.

Nothing of timm's preprocessing is copied: the model's configuration comes from `resolve_model_data_config`, transform
and loader from `create_transform` and `create_loader`, so probabilities are those of timm's own validation.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import PIL
import timm
import torch
from PIL import ExifTags, Image
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from torch import nn

from clcnet.classifiers import models as timm_models
from clcnet.classifiers.flops import count_flops
from clcnet.data.images import IMAGE_FORMATS, ImageSet
from clcnet.memory import return_freed_memory

_PLAIN = bool | int | float | str | tuple | None

_logger = logging.getLogger(__name__)

GPU_BATCH_SIZE = 256
CPU_BATCH_SIZE = 64
MAX_WORKERS = 8  # enough decoders for one device; more only take memory

REMARK = "clcnet remark"  # in PIL's `info`


@dataclass
class Classifier:
    """A timm model ready to classify, with all that determines its answers.

    Attributes:
        model: in evaluation mode, on `device`; not compiled.
        name: its name, with the tag of its pretrained weights where timm knows one.
        num_classes: C.
        label_names: the names of its classes in its own order, where they are known.
        label_names_inferred: whether they were guessed from the number of classes (ImageNet's), for timm's own weights.
        data_config: timm's: input size, interpolation, crop, mean, standard deviation.
        device: where it runs.
        amp: type of the mixed precision, or None for float32 throughout.
        channels_last: whether images are laid out with channels last.
        compile: whether it runs through `torch.compile`.
        loaded_from: the arguments with which `load_classifier` loads the same model again, devices and speed apart.
    """

    model: nn.Module
    name: str
    num_classes: int
    label_names: list[str] | None
    label_names_inferred: bool
    data_config: dict[str, Any]
    device: torch.device
    amp: torch.dtype | None = None
    channels_last: bool = False
    compile: bool = False
    loaded_from: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def flops(self) -> float:
        """Billions of multiply-adds an image.

        Raises:
            ValueError: the model cannot take images of this size; this is the first that it is shown.
        """
        try:
            return count_flops(self.model, self.data_config["input_size"])
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            height, width = self.data_config["input_size"][1:]
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.name} cannot take images of {height}x{width} pixels ({reason}); give another --img-size"
            ) from error

    @functools.cached_property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """timm's evaluation transform: a PIL image in `image_mode` -> a normalised (channels, height, width) tensor."""
        transform: Callable[[Image.Image], torch.Tensor] = create_transform(**self.data_config, is_training=False)
        return transform

    @functools.cached_property
    def key(self) -> str:
        """Digest of what the model is: differs as soon as architecture, arguments, weights or preprocessing do."""
        settings = {name: self.data_config[name] for name in sorted(self.data_config)}
        modules = [(name, str(type(module)), _settings(module)) for name, module in self.model.named_modules()]
        digest = hashlib.blake2b(json.dumps([modules, settings], default=str).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @functools.cached_property
    def run_key(self) -> str:
        """Digest of all that its answers depend on: what it is, and how and by what it runs.

        Apart from the batch that an image stands in and the number of a CPU's threads, which may sway the last bit.
        """
        run = [self.key, str(self.amp), self.device.type, self.channels_last, self.compile, versions()]
        return hashlib.blake2b(json.dumps(run).encode(), digest_size=16).hexdigest()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model sees."""
        size: tuple[int, int, int] = self.data_config["input_size"]
        return size

    @property
    def image_mode(self) -> str:
        """The mode that PIL converts images to, as timm's own validation chooses it."""
        return "RGB" if self.input_size[0] == 3 else "L"

    @functools.cached_property
    def _runner(self) -> Callable[[torch.Tensor], torch.Tensor]:
        runner: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.model) if self.compile else self.model
        return runner

    @torch.inference_mode()
    def probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """Classify a batch.

        Args:
            batch: (B, channels, height, width), transformed.

        Returns:
            (B, C) softmax in float32, on `device`.
        """
        batch = batch.to(self.device, memory_format=_memory_format(self.channels_last))
        precision = torch.autocast(self.device.type, self.amp) if self.amp else contextlib.nullcontext()
        with precision:
            logits = self._runner(batch)
        return logits.float().softmax(dim=-1)

    def describe(self) -> str:
        """One line for the user: what the model is, what it sees, what it costs, where and how it runs."""
        config = self.data_config
        height, width = config["input_size"][1:]
        precision = str(self.amp).removeprefix("torch.") if self.amp else "float32"
        options = [name for name, on in (("channels last", self.channels_last), ("compiled", self.compile)) if on]
        return (
            f"{self.name}: {self.num_classes} classes, {height}x{width} pixels ({config['interpolation']}, crop "
            f"{config['crop_pct']:g} {config['crop_mode']}), {self.flops:.4g} billion multiply-adds an image, on "
            + ", ".join([str(self.device), precision, *options])
        )


def versions() -> dict[str, str]:
    """The libraries that decode images and run models."""
    return {library.__name__: library.__version__ for library in (torch, timm, PIL)}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers, words and functions that a module holds besides weights, such as an activation or an epsilon."""
    simple = {
        name: value if isinstance(value, _PLAIN) else getattr(value, "__qualname__", type(value).__qualname__)
        for name, value in sorted(vars(module).items())
        if isinstance(value, _PLAIN) or callable(value)
    }
    simple.pop("training")
    return simple


def resolve_device(text: str | None = None) -> torch.device:
    """The device named, or the best one here: cuda, then mps, then cpu. Processes of one torchrun take a GPU each.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what names no device is then on this one: events, streams, pinned memory
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"device {text} cannot be used here ({reason}); give another --device or none") from None
    if device.type == "meta":
        raise ValueError("device meta computes nothing; give another --device or none")
    return device


def load_classifier(
    name: str,
    weight: Path | str | None = None,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    amp: torch.dtype | str | None = None,
    channels_last: bool = False,
    compile: bool = False,
) -> Classifier:
    """Load a timm model with its weights and its preprocessing.

    A bare name logs the weights' tag that timm chose for it and, for the paper's models, the tag that the paper used.

    Args:
        name: anything that `timm.create_model` takes, `local-dir:` and `hf-hub:` included.
        weight: a .pth, .pth.tar or .safetensors file in place of the pretrained weights.
        num_classes: classes of that file; the model's own when left out.
        device: where to run; the best one here when left out.
        img_size, crop_pct, crop_mode, interpolation: override the model's own preprocessing, as in timm.
        amp: "bfloat16" or "float16" for mixed precision.
        channels_last: lay images and weights out with channels last.
        compile: run through `torch.compile`.

    Raises:
        ValueError, OSError: unknown name or device, or the weights cannot be had or do not fit.
    """
    device = device if isinstance(device, torch.device) else resolve_device(device)
    model = timm_models.create(name, weight, num_classes, img_size)
    overrides = {"img_size": img_size, "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    given = {"name": name, "weight": weight and str(weight), "num_classes": num_classes, **overrides}
    resolved = timm_models.resolved_name(name, model) if weight is None else name
    note = timm_models.tag_note(name, resolved)
    if note:
        _logger.warning(note)
    label_names, inferred = _label_names(model)
    if inferred and (weight is not None or (":" in name and not name.startswith("hf-hub:timm/"))):
        label_names, inferred = None, False  # somebody's own thousand classes need not be ImageNet's
    return Classifier(
        model=model.to(device).to(memory_format=_memory_format(channels_last)),
        name=resolved,
        num_classes=timm_models.num_classes_of(model),
        label_names=label_names,
        label_names_inferred=inferred,
        data_config=resolve_model_data_config(model, overrides),
        device=device,
        amp=getattr(torch, amp) if isinstance(amp, str) else amp,
        channels_last=channels_last,
        compile=compile,
        loaded_from={argument: value for argument, value in given.items() if value is not None},
    )


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.preserve_format


def _label_names(model: nn.Module) -> tuple[list[str] | None, bool]:
    """Names of the model's classes and whether they are only inferred from their number."""
    names = timm_models.configuration(model).get("label_names")
    if isinstance(names, dict):
        names = [names.get(index, names.get(str(index), "")) for index in range(len(names))]
    if names and len(names) == timm_models.num_classes_of(model):
        return [str(name) for name in names], False
    subset = infer_imagenet_subset(model)
    return (ImageNetInfo(subset).label_names(), True) if subset else (None, False)


def default_batch_size(device: torch.device) -> int:
    """Images a batch when the user names no number."""
    return CPU_BATCH_SIZE if device.type == "cpu" else GPU_BATCH_SIZE


def default_workers() -> int:
    """Decoding processes when the user names no number: one a core, shared among the processes of one torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass(frozen=True)
class ReadImages:
    """Which images a batch holds. Not a tensor, which would take a file descriptor from process to process.

    Attributes:
        positions: (B,) in the data set.
        reasons: position of an image that could not be read -> why.
        remarks: position of one of which the model sees less than there is -> what.
    """

    positions: np.ndarray
    reasons: dict[int, str]
    remarks: dict[int, str]

    @property
    def readable(self) -> np.ndarray:
        """(B,) bool."""
        return np.array([position not in self.reasons for position in self.positions.tolist()], np.bool_)


def collate(batch: Sequence[tuple[torch.Tensor, int, str, str]]) -> tuple[torch.Tensor, ReadImages]:
    """Make a batch of what `ImageDataset` gives: (B, channels, height, width) uint8, and which images they are."""
    images, positions, reasons, remarks = zip(*batch, strict=True)
    unread, remarked = (
        {position: text for position, text in zip(positions, texts, strict=True) if text}
        for texts in (reasons, remarks)
    )
    return torch.utils.data.default_collate(list(images)), ReadImages(np.array(positions), unread, remarked)


class ImageDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int, str, str]]):
    """Images for timm's loader, each with its position; for a file that cannot be read a black one, and the reason."""

    def __init__(self, images: ImageSet, classifier: Classifier) -> None:
        self._root = os.fspath(images.root)
        self._files = np.array([os.fsencode(file) for file in images.files])  # one block, shared with forked workers
        self.mode = classifier.image_mode
        self.input_size = classifier.input_size
        self.transform: Callable[[Image.Image], torch.Tensor] | None = None  # create_loader sets it
        self._most_pixels = Image.MAX_IMAGE_PIXELS  # which a process that is not forked would not know

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, str, str]:
        assert self.transform is not None
        try:
            image = self.read(position)
            return self.transform(image), position, "", image.info.get(REMARK, "")
        except Exception as error:  # PIL's decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
            return torch.zeros(self.input_size, dtype=torch.uint8), position, self._reason(position, error), ""

    def path(self, position: int) -> str:
        """Where the image lies."""
        return os.path.join(self._root, os.fsdecode(self._files[position]))

    def read(self, position: int) -> Image.Image:
        """Decode an image in the model's mode."""
        Image.MAX_IMAGE_PIXELS = self._most_pixels
        return read_image(self.path(position), self.mode, self.input_size)

    def _reason(self, position: int, error: Exception) -> str:
        path = self.path(position)  # which PIL likes to repeat
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        text = text.replace(repr(path), "").replace(path, "")
        if isinstance(error, Image.DecompressionBombError):
            text += "; --max-image-pixels lets it in"
        return " ".join(text.split()) or type(error).__name__


def read_image(image: Image.Image | str | os.PathLike[str], mode: str, input_size: tuple[int, int, int]) -> Image.Image:
    """Decode an image as timm's dataset does: first frame, orientation tag unheeded, in the model's mode.

    Args:
        image: a file, or an image that PIL has opened.
        mode: of PIL, for what is returned.
        input_size: channels, height and width of what the model sees.

    Returns:
        The image; `info[REMARK]` says what of it the model does not see, where there is something.

    Raises:
        Exception: it is not a readable image. PIL's decoders raise nearly everything.
    """
    if isinstance(image, Image.Image):
        if image.format not in (None, "MPO", *IMAGE_FORMATS):  # MPO: a JPEG of several pictures, opened as JPEG
            raise ValueError(f"its format, {image.format}, is not one of {' '.join(IMAGE_FORMATS)}; convert it first")
        _refuse_strip(image.size, input_size)
        converted = image.convert(mode)
        remark = remark_on(image)
        if remark:
            converted.info[REMARK] = remark
        return converted
    if not stat.S_ISREG(os.stat(image).st_mode):
        raise OSError("a directory, pipe or device, not a file")  # a pipe would be waited for forever
    with Image.open(image, formats=[*IMAGE_FORMATS]) as opened:
        return read_image(opened, mode, input_size)


def remark_on(image: Image.Image) -> str:
    """What is lost when PIL brings a decoded image into 8 bits of gray or red, green and blue; empty if nothing is."""
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = cast(tuple[float, float], image.getextrema())
        if low < 0 or high > 255:
            return "values beyond 8 bits, which are clipped"
        if image.mode == "F" and high <= 1:
            return "fractions from 0 to 1, which become black"
    with contextlib.suppress(Exception):  # a broken tag is no broken image
        if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # PIL turns a TIFF itself
            return "an orientation tag, which is not heeded"
    if (
        image.has_transparency_data
        and cast(tuple[int, int], image.convert("RGBA").getchannel("A").getextrema())[0] < 255
    ):
        return "transparency, which is dropped"
    return ""


def sum_up_remarks(remarks: Iterable[str]) -> str:
    """One line on all of a run's remarks, as timm's way of reading images explains them; empty where there are none."""
    counts = Counter(remarks)
    said = "; ".join(f"{count} with {remark}" for remark, count in counts.most_common())
    return f"images that the models see otherwise than a viewer shows them, as in timm: {said}" if said else ""


def _refuse_strip(size: tuple[int, int], input_size: tuple[int, int, int]) -> None:
    """Refuse an image so long and thin that bringing its short side to the model's size would fill the memory."""
    pixels = max(input_size[1:]) ** 2 * max(size) / max(min(size), 1)
    if Image.MAX_IMAGE_PIXELS and pixels > 2 * Image.MAX_IMAGE_PIXELS:  # twice, as PIL itself
        raise ValueError(f"{size[0]}x{size[1]} pixels are too long and thin to be resized ({pixels:.1e} pixels)")


def loaded_batches(loader: Any) -> Iterator[tuple[torch.Tensor, ReadImages]]:
    """The loader's batches; a decoding process that died is an error of its own, with advice."""
    return_freed_memory()
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # without the DataLoader's words where the process died while it handed a batch over
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                "a process that decodes images died, perhaps for want of memory; try again with fewer --workers"
            ) from error
        if batch is None:
            return
        yield batch


class AnswersBatches(Protocol):
    """What `HalvingForward` asks of a classifier."""

    name: str
    device: torch.device

    def probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """Softmax of a batch, (B, C)."""


class HalvingForward:
    """Runs batches through a classifier, in ever smaller pieces when memory runs out; threads may share one."""

    def __init__(self, classifier: AnswersBatches, size: int) -> None:
        self.classifier = classifier
        self.size = size

    def __call__(self, batch: torch.Tensor) -> np.ndarray:
        """Probabilities of a batch, (B, C)."""
        probs: np.ndarray = self.launch(batch).cpu().numpy()
        return probs

    def launch(self, batch: torch.Tensor) -> torch.Tensor:
        """The same on the device, where they may be still to compute."""
        while True:
            size = min(self.size, len(batch))
            try:
                return torch.cat([self.classifier.probabilities(piece) for piece in batch.split(size)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(size)
            # outside of the handler, where the failed batch's tensors are no longer held by the traceback
            if self.classifier.device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise MemoryError(
                f"{self.classifier.name} and one image do not fit into the memory of {self.classifier.device}"
            )
        self.size = min(self.size, tried // 2)
        _logger.warning("out of memory with %d images at once: going on with %d", tried, self.size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    # CUDA alone has a type for it; the allocators of the CPU and of mps raise plain RuntimeErrors
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in str(error) for phrase in phrases)
