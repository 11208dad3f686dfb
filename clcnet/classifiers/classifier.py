"""A timm model with all that determines its answers: weights, preprocessing, precision, device.

Nothing of timm's preprocessing is copied: the model's configuration comes from `resolve_model_data_config`, the
transform from `create_transform`, so probabilities are those of timm's own validation.
"""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from torch import nn

from clcnet.classifiers import checkpoint as checkpoints
from clcnet.classifiers import models as timm_models
from clcnet.classifiers.flops import count_flops
from clcnet.distributed import resolve_device
from clcnet.metrics import format_flops

_PLAIN = bool | int | float | str | tuple | None  # what a module holds besides weights

_logger = logging.getLogger(__name__)


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
        tf32: whether a GPU may multiply in TF32 and choose algorithms by trying, as in timm's scripts; else float32 is
            float32, and each process chooses the same.
        channels_last: whether images are laid out with channels last.
        compile: whether it runs through `torch.compile`.
        trained_top1: percent, as the training that wrote its checkpoint measured it; None where it does not say.
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
    tf32: bool = False
    trained_top1: float | None = None
    loaded_from: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.to(memory_format=self.layout)

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and images in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @functools.cached_property
    def flops(self) -> float:
        """Billions of multiply-adds an image.

        Raises:
            ValueError: the model cannot take images of this size; this is the first that it is shown.
        """
        try:
            return count_flops(self.model, self.input_size)
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            (height, width), reason = self.input_size[1:], " ".join(str(error).split())
            raise ValueError(
                f"{self.name} cannot take images of {height}x{width} pixels ({reason}); give another --img-size"
            ) from error

    @functools.cached_property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """timm's evaluation transform: a PIL image in `image_mode` -> a normalised (channels, height, width) tensor."""
        return create_transform(**self.data_config, is_training=False)

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
        run += [self.tf32] if self.device.type == "cuda" else []
        return hashlib.blake2b(json.dumps(run).encode(), digest_size=16).hexdigest()

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model sees."""
        return tuple(self.data_config["input_size"])  # type: ignore[return-value]

    @property
    def image_mode(self) -> str:
        """The mode that PIL converts images to, as timm's own validation chooses it."""
        return "RGB" if self.input_size[0] == 3 else "L"

    @functools.cached_property
    def _runner(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.compile(self.model) if self.compile else self.model

    @torch.inference_mode()
    def probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """Transformed images (B, channels, height, width) -> softmax (B, C) in float32, on `device`."""
        batch = batch.to(self.device, memory_format=self.layout)
        precision = torch.autocast(self.device.type, self.amp) if self.amp else contextlib.nullcontext()
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
            torch.backends.cudnn.benchmark = self.tf32
        try:
            with precision:
                logits = self._runner(batch)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")) or is_out_of_memory(error):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"{self.name} cannot be compiled here ({reason}); torch.compile needs a C++ compiler such as g++, on a "
                "GPU Triton too: install it, or leave out --compile"
            ) from error
        return logits.float().softmax(dim=-1)

    def describe(self) -> str:
        """One line for the user: what the model is, what it sees, what it costs, where and how it runs."""
        config, (height, width) = self.data_config, self.input_size[1:]
        return (
            f"{self.name}: {self.num_classes} classes, {height}x{width} pixels ({config['interpolation']}, crop "
            f"{config['crop_pct']:g} {config['crop_mode']}), {format_flops(self.flops)} multiply-adds an image, on "
            f"{self.device}, {self.describe_run()}"
        )

    def describe_run(self) -> str:
        """How it runs: precision and options."""
        precision = str(self.amp).removeprefix("torch.") if self.amp else "float32"
        known = {"TF32": self.tf32, "channels last": self.channels_last, "compiled": self.compile}
        return ", ".join([precision, *(name for name, on in known.items() if on)])

    @property
    def device_name(self) -> str:
        """The GPU's own name, which times go by; of other devices torch's."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)


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


def load_classifier(
    name: str,
    weight: Path | str | None = None,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    amp: torch.dtype | str | None = None,
    channels_last: bool = False,
    compile: bool = False,
    tf32: bool = False,
) -> Classifier:
    """Load a timm model with its weights and its preprocessing, in the precision and layout of a `Classifier`.

    A bare name logs the weights' tag that timm chose for it and, for the paper's models, the tag that the paper used. A
    checkpoint of timm's train.py knows the model's classes and preprocessing, which are taken from there and logged.

    Args:
        name: anything that `timm.create_model` takes, `local-dir:` and `hf-hub:` included.
        weight: a .pth, .pth.tar or .safetensors file in place of the pretrained weights.
        num_classes: classes of that file; what it says itself, or the model's own, when left out.
        device: where to run; the best one here when left out.
        img_size, crop_pct, crop_mode, interpolation, mean, std: override the model's own preprocessing, as in timm.

    Raises:
        ValueError, OSError: unknown name or device, or the weights cannot be had or do not fit.
    """
    device = resolve_device(device)
    overrides: dict[str, Any] = {"img_size": img_size, "crop_pct": crop_pct, "crop_mode": crop_mode}
    overrides |= {"interpolation": interpolation, "mean": mean, "std": std}
    given = {"name": name, "weight": weight and str(weight), "num_classes": num_classes, **overrides}
    checkpoint = checkpoints.read(weight) if weight is not None else None
    settings = _settings_of_training(checkpoint, given) if checkpoint else {}
    channels = settings.pop("in_chans", None)
    num_classes = num_classes or settings.pop("num_classes", None)
    overrides |= settings
    model = timm_models.create(name, checkpoint, num_classes, overrides["img_size"], channels)
    if channels:
        overrides["input_size"] = (channels, *resolve_model_data_config(model, overrides)["input_size"][1:])
    resolved = timm_models.resolved_name(name, model) if weight is None else name
    is_timms = weight is None and (":" not in name or name.startswith("hf-hub:timm/"))
    label_names, inferred = _label_names(model, is_timms)
    return Classifier(
        model=model.to(device),
        name=resolved,
        num_classes=timm_models.num_classes_of(model),
        label_names=label_names,
        label_names_inferred=inferred,
        data_config=_data_config(model, overrides),
        device=device,
        amp=getattr(torch, amp) if isinstance(amp, str) else amp,
        channels_last=channels_last,
        compile=compile,
        tf32=tf32,
        trained_top1=checkpoint.top1 if checkpoint else None,
        loaded_from={argument: value for argument, value in given.items() if value is not None},
    )


def _settings_of_training(checkpoint: checkpoints.Checkpoint, given: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's training says and no flag does; tells the user."""
    settings = {key: value for key, value in checkpoint.settings.items() if given.get(key) is None and key != "model"}
    if "input_size" in settings or isinstance(settings.get("img_size"), list):
        size = settings.pop("input_size", None) or [settings.get("in_chans", 3), *settings["img_size"]]
        settings["in_chans"], settings["img_size"] = size[0], size[1]
        if size[1] != size[2] and given["img_size"] is None:
            raise ValueError(f"weights file {checkpoint.path} is of images of {size[2]}x{size[1]}; give --img-size")
    if given["img_size"] is not None:
        settings.pop("img_size", None)
    if settings:
        taken = ", ".join(f"{key} {value}" for key, value in settings.items())
        _logger.warning("taken from the training that wrote %s: %s", checkpoint.path, taken)
    return settings


def _data_config(model: nn.Module, overrides: dict[str, Any]) -> dict[str, Any]:
    channels = resolve_model_data_config(model, overrides | {"mean": None, "std": None})["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"the model takes images of {channels} channels; only gray (1) and colour (3) can be read")
    for name in ("mean", "std"):
        count = len(overrides[name] or [0])
        if count not in (1, channels):
            raise ValueError(f"--{name} takes 1 number or {channels}, one for each channel, not {count}")
    if min(overrides["std"] or [1]) <= 0:
        raise ValueError("--std takes numbers above 0")
    return resolve_model_data_config(model, overrides)


def _label_names(model: nn.Module, is_timms: bool) -> tuple[list[str] | None, bool]:
    """Names of the model's classes and whether they are only inferred from their number, as for timm's own weights."""
    names = timm_models.configuration(model).get("label_names")
    if isinstance(names, dict):
        names = [names.get(index, names.get(str(index), "")) for index in range(len(names))]
    if names and len(names) == timm_models.num_classes_of(model):
        return [str(name) for name in names], False
    subset = infer_imagenet_subset(model) if is_timms else None  # others' thousand classes need not be ImageNet's
    return (ImageNetInfo(subset).label_names(), True) if subset else (None, False)


def default_batch_size(device: torch.device) -> int:
    """Images a batch when the user names no number."""
    return 64 if device.type == "cpu" else 256


class HalvingForward:
    """Runs batches through a classifier in ever smaller pieces when memory runs out; threads may share one."""

    def __init__(self, classifier: Any, size: int) -> None:
        self.classifier, self.size = classifier, size

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Probabilities of a batch, (B, C), on the device, where they may be still to compute."""
        while True:
            size = min(self.size, len(batch))
            try:
                return torch.cat([self.classifier.probabilities(piece) for piece in batch.split(size)])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise MemoryError(
                        f"{self.classifier.name} and one image do not fit into the memory of {self.classifier.device}"
                    ) from error
            self.size = min(self.size, size // 2)
            _logger.warning("out of memory with %d images at once: going on with %d", size, self.size)
            # outside of the handler, where the failed batch's tensors are no longer held by the traceback
            if self.classifier.device.type == "cuda":
                torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    # CUDA alone has a type for it; the allocators of the CPU and of mps raise plain RuntimeErrors
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in str(error) for phrase in phrases)
