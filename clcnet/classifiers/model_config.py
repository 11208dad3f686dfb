"""A model folder's config.json, read as a stranger's: what describes the model is checked, the rest never reaches timm.

timm hands what stands there to its own `create_model`, which may download, write and read files wherever it says.
"""

import inspect
import re
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, is_model, model_entrypoint
from torch import nn

from clcnet.strangers import LARGEST_JSON, is_line, is_number, parse_json, read_bytes

_MOST_CLASSES, _LARGEST_SIDE, _LARGEST_NUMBER, _DEEPEST, _LONGEST = 1_000_000, 4096, 10**9, 4, 64
_WORD = re.compile(rf"[\w.+-]{{0,{_LONGEST}}}")  # no path and no address
_EVERY_ARCHITECTURES = {"num_classes", "in_chans", "img_size", "global_pool", "bn_eps", "bn_momentum", "use_naflex"}
_THE_FACTORYS = {
    name for factory in (timm.create_model, build_model_with_cfg) for name in inspect.signature(factory).parameters
}
_OF_THE_MACHINE = {"device", "dtype"}


def _is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_side(value: Any) -> bool:
    return _is_whole(value, 1, _LARGEST_SIDE)


def _is_channels(value: Any) -> bool:
    return type(value) is int and value in (1, 3)


def _is_list(value: Any, lengths: tuple[int, ...], of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(of, value))


def _are_labels(value: Any) -> bool:
    labels = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(labels, list) and all(type(label) is int or is_line(label) for label in labels)


def _are_layers(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(layer, str) for layer in value))


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_plain(item, depth + 1) for item in items)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return isinstance(value, bool) or value is None or is_number(value, -_LARGEST_NUMBER, _LARGEST_NUMBER)


_Check = tuple[Callable[[Any], bool], str]
_CLASSES: _Check = (lambda value: _is_whole(value, 0, _MOST_CLASSES), f"a whole number up to {_MOST_CLASSES:,}")
_PLAIN: _Check = (_is_plain, f"a number up to {_LARGEST_NUMBER:,}, a word or a short list of these")
_FACTS: dict[str, _Check] = {  # of timm's `pretrained_cfg`, all that a classifier here makes use of
    "num_classes": _CLASSES,
    "input_size": (
        lambda value: (
            _is_list(value, (3,), lambda _: True) and _is_channels(value[0]) and all(map(_is_side, value[1:]))
        ),
        f"[1 or 3 channels, height, width] of up to {_LARGEST_SIDE} pixels",
    ),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    "interpolation": (
        lambda value: value in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
        "nearest, bilinear, bicubic, lanczos, box or hamming",
    ),
    "crop_pct": (lambda value: is_number(value, 0.05, 2), "a number from 0.05 to 2"),
    "crop_mode": (lambda value: value in ("center", "border", "squash"), "center, border or squash"),
    "mean": (
        lambda value: _is_list(value, (1, 3), lambda number: is_number(number, -255, 255)),
        "1 or 3 numbers from -255 to 255",
    ),
    "std": (
        lambda value: _is_list(value, (1, 3), lambda number: is_number(number, 1e-6, 255)),
        "1 or 3 numbers from 0.000001 to 255",
    ),
    "label_names": (_are_labels, "a list of names, or names by class index"),
    "label_offset": _CLASSES,
    "first_conv": (_are_layers, "a layer's name or a list of them"),
    "classifier": (_are_layers, "a layer's name or a list of them"),
}
_ARGUMENTS: dict[str, _Check] = {
    "num_classes": _CLASSES,
    "in_chans": (_is_channels, "1 or 3"),
    "img_size": (
        lambda value: _is_side(value) or _is_list(value, (2,), _is_side),
        f"a side, or [height, width], of up to {_LARGEST_SIDE} pixels",
    ),
}
_LOADING: dict[str, _Check] = {key: _FACTS[key] for key in ("num_classes", "crop_pct", "crop_mode", "interpolation")}
_LOADING |= {"img_size": (_is_side, f"a side of up to {_LARGEST_SIDE} pixels")}
_LOADING |= {key: (is_line, "one line of text") for key in ("name", "weight")}


def read(path: Path) -> dict[str, Any]:
    """Read a config.json as timm's `save_for_hf` and `push_to_hf_hub` write it, or the flat one of older versions.

    Returns:
        `architecture`, `model_args` and `pretrained_cfg` as such a file has them, with nothing in them that was not
        checked, and no word of where weights lie.

    Raises:
        ValueError: what is wrong with it, and where.
    """
    content = read_bytes(path, LARGEST_JSON)
    try:
        config = parse_json(content)
        architecture = config["architecture"]
        facts = dict(config.get("pretrained_cfg") or {"label_names": config.get("labels"), **config})
        facts |= {key: config[key] for key in ("num_classes", "label_names") if key in config}
        arguments = dict(config.get("model_args") or {})
        known = is_model(architecture)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a timm model's configuration ({error!r})") from None
    if not known:
        raise ValueError(f"timm {timm.__version__} knows no {architecture[:_LONGEST]}, the architecture in {path}")
    facts = {key: value for key, value in facts.items() if key in _FACTS and value is not None}
    for key, value in facts.items():
        _check(f"{path}: {key}", value, _FACTS[key])
    takes = _arguments_of(architecture)
    for key, value in arguments.items():
        if key not in takes:
            raise ValueError(
                f"{path}: model_args {reprlib.repr(key)} is no argument of {architecture}; delete it there"
            )
        if value is not None:
            _check(f"{path}: model_args {key}", value, _ARGUMENTS.get(key, _PLAIN))
    return {"architecture": architecture, "model_args": arguments, "pretrained_cfg": facts}


def of_training(arguments: dict[str, Any]) -> dict[str, Any]:
    """What evaluation needs of the arguments of timm's train.py, which its checkpoints keep, where they make sense."""
    names = ("model", "num_classes", "in_chans", "input_size", "img_size", "mean", "std", "interpolation", "crop_pct")
    values = {name: arguments.get(name) for name in names}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    checks = _FACTS | _ARGUMENTS | {"model": _PLAIN}
    return {name: value for name, value in values.items() if value is not None and checks[name][0](value)}


def check_loading(place: str, arguments: dict[str, Any]) -> None:
    """Refuse what are no arguments of `load_classifier`, as a policy or a table may name them.

    Raises:
        ValueError: what is wrong, and `place`.
    """
    for key, value in arguments.items():
        if key not in _LOADING:
            raise ValueError(
                f"{place}: {reprlib.repr(key)} is no argument with which a model is loaded; delete it there"
            )
        _check(f"{place}: {key}", value, _LOADING[key])


def _check(place: str, value: Any, check: _Check) -> None:
    is_good, wanted = check
    if not is_good(value):
        raise ValueError(f"{place} is {reprlib.repr(value)}, not {wanted}; mend it there")


def _arguments_of(architecture: str) -> set[str]:
    """What the networks of an architecture's module are built with; nothing that timm's factory keeps for itself."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    networks = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, nn.Module)]
    taken = {name for network in networks for name in inspect.signature(network).parameters}
    return (taken - _THE_FACTORYS - _OF_THE_MACHINE) | _EVERY_ARCHITECTURES
