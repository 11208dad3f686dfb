"""A file of weights -> the tensors that fit a model, and what the training that wrote it says of itself.

Whatever wrapped the weights is taken off; what is no checkpoint is called what it is. No pickled code is ever run.
"""

import argparse
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from clcnet.classifiers import model_config
from clcnet.files import first_sentence
from clcnet.intervals import exact_interval

Tensors = dict[str, torch.Tensor]

_EXPECTED = "expected .pth, .pth.tar or .safetensors"
_OTHER_KINDS = {  # how files begin that are no checkpoints
    rb"\Z": "empty",
    rb"version https://git-lfs": (
        "a Git LFS pointer, not the weights; run git lfs pull in the repository it came from"
    ),
    rb"\x89HDF": "an HDF5 file, as Keras writes it",
    rb"GGUF": "a GGUF file",
    rb"\x1f\x8b": "compressed with gzip; unpack it",
    rb"BZh": "compressed with bzip2; unpack it",
    rb"\xfd7zXZ": "compressed with xz; unpack it",
    rb"(?s:.{257})ustar": "an archive of files; unpack it",
    rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|head|!--))": (
        "a web page, perhaps one that asks before a download; open the address in a browser and save the file"
    ),
}
# harmless, and what trainings save beside weights: their arguments, and figures as numpy has them
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"pathlib{module}.PosixPath") for module in ("", "._local")),
    *((pathlib.PureWindowsPath, f"pathlib{module}.WindowsPath") for module in ("", "._local")),
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # type: ignore[attr-defined]
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "bool"))),
]
_A_MODEL = re.compile(r"GLOBAL ((timm|torchvision|torch\.nn|torch\.jit|models?|ultralytics)\.\S+)")
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PLACES = ("state_dict", "model", "model_state_dict", "net", "module", "")  # timm's own first
_PREFIXES = ("", "module.", "model.", "net.")
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?)([^a-z]|$)")
# counted, or computed anew: files of older versions and of profilers lack them or have more of them
_NO_WEIGHTS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params", "relative_position_index", "attn_mask")
_DEEPEST = 3  # dicts within dicts
_MEASURES = ("best_acc1", "best_acc", "max_accuracy", "acc")  # of PyTorch's and others' examples
_NEAR_CHANCE, _POINTS_BELOW, _POINTS_ABOVE = 0.15, 10, 5


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds."""

    path: Path
    content: Any  # as `torch.load` or safetensors gives it
    settings: dict[str, Any]  # what its training says of the model and its preprocessing, as far as it makes sense
    top1: float | None  # percent, as the training measured it, where it says so

    def weights(self, wanted: Mapping[str, torch.Tensor]) -> tuple[Tensors, str]:
        """The tensors that fit the wanted ones best, by the model's own names, and what to say of the choice.

        Raises:
            ValueError: no tensors, tensors without plain values, or several that fit alike.
        """
        found = [
            (place, prefix, tensors)
            for place, group in _groups(self.content)
            for prefix, tensors in _unwrapped(group, wanted)
        ]
        if not found:
            held = ", ".join(map(str, self.content)) if isinstance(self.content, dict) else type(self.content).__name__
            raise ValueError(f"weights file {self.path} holds no weights, but {held[:200] or 'nothing'}")
        fitting = sorted((one for one in found if fits(one[2], wanted)), key=_preference)
        if not fitting:
            return max(found, key=lambda one: len(one[2].keys() & wanted.keys()))[2], ""
        names = [f"{place}:{prefix}".strip(":") for place, prefix, _ in fitting]
        if len(fitting) > 1 and _preference(fitting[0]) == _preference(fitting[1]):
            raise ValueError(
                f"weights file {self.path} holds several models that fit: {' and '.join(names)}; save one alone"
            )
        self._check_plain(fitting[0][2], wanted)
        note = f"of {', '.join(names)} in {self.path}, {names[0]} was taken" if len(names) > 1 else ""
        return fitting[0][2], note

    def _check_plain(self, tensors: Tensors, wanted: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            integers = name in wanted and wanted[name].is_floating_point() and not tensor.is_floating_point()
            odd = "sparse" if tensor.layout != torch.strided else "quantised" if tensor.is_quantized or integers else ""
            odd = "without values (on device meta)" if tensor.is_meta else odd
            if odd:
                raise ValueError(f"weights file {self.path}: {name} is {odd}; save the model's plain float weights")


def read(path: Path | str) -> Checkpoint:
    """Read a file of weights.

    Raises:
        ValueError: it is no checkpoint, or holds Python objects that may run code.
        OSError: it is missing, or no regular file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights file {path} does not exist; check the path")
    if not path.is_file():
        raise OSError(f"weights file {path} is a folder, pipe or device, not a file; {_EXPECTED}")
    content = _content(path)
    record = content if isinstance(content, dict) else {}
    arguments = record.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = arguments if isinstance(arguments, dict) else {}
    return Checkpoint(path, content, model_config.of_training(arguments), _top1(record, arguments))


def _content(path: Path) -> Any:
    with open(path, "rb") as file:
        head = file.read(512)
    what = _other_kind(path, head)
    if what:
        raise ValueError(f"weights file {path} cannot be read: it is {what}; {_EXPECTED}")
    try:
        if _is_safetensors(head):
            return safetensors.torch.load_file(path)
        # opened here, since torch goes by the names of paths
        with open(path, "rb") as file, torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # every format has errors of its own
        text = f"{error} {error.__cause__}"
        whole = _A_MODEL.search(text)
        if whole or "unsupported global" in text.lower():  # torch's words
            held = f"is a whole pickled model ({whole[1]})" if whole else "holds Python objects besides weights"
            raise ValueError(
                f"weights file {path} cannot be read: it {held}, which may run code; save the model's state_dict() "
                "alone with torch.save"
            ) from error
        raise ValueError(f"weights file {path} cannot be read ({first_sentence(error)}); {_EXPECTED}") from error


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _other_kind(path: Path, head: bytes) -> str:
    """What a file is that is no checkpoint, as far as its bytes say; empty where it may be one."""
    for beginning, what in _OTHER_KINDS.items():
        if re.match(beginning, head):
            return what
    if head.startswith(b"PK"):
        return _other_zip(path)
    text = not _is_safetensors(head) and all(9 <= byte < 127 for byte in head)
    return f"text that begins with {' '.join(head[:60].decode().split())!r}" if text else ""


def _other_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # names that are no text, versions to come
        return "cut short or damaged; fetch it again"
    if "constants.pkl" in members:
        return "TorchScript, a program with its weights; save the state_dict() of the model that it was made from"
    if "data.pkl" in members:
        return ""
    return "numpy's .npz" if any(name.endswith(".npy") for name in members) else "a zip archive that torch did not save"


def _top1(record: dict[Any, Any], arguments: dict[str, Any]) -> float | None:
    """Percent; a number up to 1 is taken for a share."""
    measures = [record.get(name) for name in _MEASURES]
    if arguments.get("eval_metric", "top1") == "top1":
        measures.insert(0, record.get("metric"))
    for value in measures:
        if isinstance(value, int | float | np.number) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            number = float(value)
            if 0 < number <= 100:
                return 100 * number if number <= 1 else number
    return None


def _groups(content: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensors]]:
    """All dicts that hold tensors, with the way to them."""
    if not isinstance(content, dict) or len(place) > _DEEPEST:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield "/".join(place), tensors
    for key, value in content.items():
        yield from _groups(value, (*place, str(key)))


def _unwrapped(tensors: Tensors, wanted: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Tensors]]:
    """The tensors below each prefix at which the model's first weight stands; all of them where it is nowhere."""
    plain = {_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}
    first = next(iter(wanted))
    prefixes = [key[: -len(first)] for key in plain if f".{key}".endswith(f".{first}")]
    for prefix in prefixes or [""]:
        yield prefix, {key[len(prefix) :]: tensor for key, tensor in plain.items() if key.startswith(prefix)}


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Of the weights alone, without what is counted."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if key.rpartition(".")[2] not in _NO_WEIGHTS}


def fits(tensors: Tensors, wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are a model's weights, none missing and none too many."""
    return shapes(tensors) == shapes(wanted)


def _preference(candidate: tuple[str, str, Tensors]) -> tuple[bool, int, int]:
    """The lowest is taken: averaged weights before others, as in timm, then by usual names."""
    place, prefix, _ = candidate
    averaged = _AVERAGED.search(f"{place}:{prefix}".lower()) is not None
    return (
        not averaged,
        _PLACES.index(place) if place in _PLACES else len(_PLACES),
        _PREFIXES.index(prefix) if prefix in _PREFIXES else len(_PREFIXES),
    )


def doubt_top1(num_right: int, num_images: int, num_classes: int, trained: float | None = None) -> str:
    """What to say of a measured top-1 that guessing would reach, or that is not what the training measured, if at all.

    `trained` is percent, as the training measured it. Chance alone seldom brings a line about (95% intervals).
    """
    low, high = exact_interval(num_right, num_images)
    top1, chance = 100 * num_right / num_images, 100 / num_classes
    told = f"top-1 is {top1:.2f}%" + (f", and the checkpoint's own metric {trained:.2f}%" if trained else "")
    check = "check the weights, the order of the classes and the preprocessing (--mean, --std, --img-size)"
    if trained and high < trained - _POINTS_BELOW:
        return f"{told}: {check}"
    if high < chance + _NEAR_CHANCE * (100 - chance) and not (trained and low <= trained):
        return f"{told}, hardly more than guessing among {num_classes} classes gives: {check}"
    if trained and low > trained + _POINTS_ABOVE:
        return f"{told}: was the model trained on these images? a table must come from images that it never saw"
    return ""
