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

_LARGEST_NUMBER, _DEEPEST, _LONGEST = 10**9, 4, 64
_HUB = re.compile(r"\s*hf[-_]hub\s*:", re.IGNORECASE)
_WORD = re.compile(rf"[\w.+-]{{0,{_LONGEST}}}")  # no path and no address
_EVERY_ARCHITECTURES = {"num_classes", "in_chans", "img_size", "global_pool", "bn_eps", "bn_momentum", "use_naflex"}
_NEVER = {"device", "dtype"} | {
    name for factory in (timm.create_model, build_model_with_cfg) for name in inspect.signature(factory).parameters
}

_Check = tuple[Callable[[Any], bool], str]  # whether a value will do, and in words what would


def _number(low: float, high: float) -> _Check:
    return lambda value: is_number(value, low, high), f"a number from {low:g} to {high:g}"


def _whole(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _one_of(*choices: object) -> _Check:
    known = [(type(choice), choice) for choice in choices]
    return lambda value: (type(value), value) in known, " or ".join(map(str, choices))


def _list(of: _Check, *lengths: int) -> _Check:
    words = f"a list of {' or '.join(map(str, lengths)) or 'any'} values, each {of[1]}"

    def is_good(value: Any) -> bool:
        return isinstance(value, list) and (not lengths or len(value) in lengths) and all(map(of[0], value))

    return is_good, words


def _either(first: _Check, second: _Check) -> _Check:
    return lambda value: first[0](value) or second[0](value), f"{first[1]}, or {second[1]}"


def _is_input_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and _CHANNELS[0](value[0]) and all(map(_SIDE[0], value[1:]))


def _are_labels(value: Any) -> bool:
    labels = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(labels, list) and all(type(label) is int or is_line(label) for label in labels)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_plain(item, depth + 1) for item in items)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return isinstance(value, bool) or value is None or is_number(value, -_LARGEST_NUMBER, _LARGEST_NUMBER)


_CHANNELS, _SIDE, _CLASSES = _one_of(1, 3), _whole(1, 4096), _whole(0, 1_000_000)
_PLAIN: _Check = (_is_plain, f"a number up to {_LARGEST_NUMBER:,}, a word or a short list of these")
_TEXT: _Check = (lambda value: isinstance(value, str), "text")
_LINE: _Check = (is_line, "one line of text")
_FACTS: dict[str, _Check] = {  # of timm's `pretrained_cfg`, all that a classifier here makes use of
    "num_classes": _CLASSES,
    "input_size": (_is_input_size, f"[1 or 3 channels, height, width], each side {_SIDE[1]}"),
    "fixed_input_size": _one_of(True, False),
    "interpolation": _one_of("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
    "crop_pct": _number(0.05, 2),
    "crop_mode": _one_of("center", "border", "squash"),
    "mean": _list(_number(-255, 255), 1, 3),
    "std": _list(_number(1e-6, 255), 1, 3),
    "label_names": (_are_labels, "a list of names, or names by class index"),
    "label_offset": _CLASSES,
    "first_conv": _either(_TEXT, _list(_TEXT)),
    "classifier": _either(_TEXT, _list(_TEXT)),
}
_ARGUMENTS = {"num_classes": _CLASSES, "in_chans": _CHANNELS, "img_size": _either(_SIDE, _list(_SIDE, 2))}
_LOADING = {key: _FACTS[key] for key in ("num_classes", "crop_pct", "crop_mode", "interpolation", "mean", "std")}
_LOADING |= {"img_size": _SIDE, "name": _LINE, "weight": _LINE}


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
    arguments = {key: value for key, value in arguments.items() if value is not None}
    _check(f"{path}:", facts, _FACTS, "")
    takes = {key: _ARGUMENTS.get(key, _PLAIN) for key in _arguments_of(architecture)}
    _check(f"{path}: model_args", arguments, takes, f"of {architecture}")
    return {"architecture": architecture, "model_args": arguments, "pretrained_cfg": facts}


def of_training(arguments: dict[str, Any]) -> dict[str, Any]:
    """What evaluation needs of the arguments of timm's train.py, which its checkpoints keep, where they make sense."""
    names = ("model", "num_classes", "in_chans", "input_size", "img_size", "mean", "std", "interpolation", "crop_pct")
    values = {name: arguments.get(name) for name in names}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    checks = _FACTS | _ARGUMENTS | {"model": _PLAIN}
    return {name: value for name, value in values.items() if value is not None and checks[name][0](value)}


def check_loading(place: str, arguments: dict[str, Any], may_download: bool) -> None:
    """Refuse what are no arguments of `load_classifier`, as a policy or a table may name them.

    Args:
        place: what names them, for the message.
        arguments: to be checked.
        may_download: whether the user, not a stranger, said that the model is on the Hub.

    Raises:
        ValueError: what is wrong, and `place`.
    """
    _check(f"{place}:", arguments, _LOADING, "with which a model is loaded")
    if not may_download and _HUB.match(arguments.get("name", "")):
        raise ValueError(f"{place} would download {arguments['name']}; if you trust it, name it yourself")


def _check(place: str, values: dict[str, Any], checks: dict[str, _Check], what_for: str) -> None:
    for key, value in values.items():
        if key not in checks:
            raise ValueError(f"{place} {reprlib.repr(key)} is no argument {what_for}; delete it there")
        is_good, wanted = checks[key]
        if not is_good(value):
            raise ValueError(f"{place} {key} is {reprlib.repr(value)}, not {wanted}; mend it there")


def _arguments_of(architecture: str) -> set[str]:
    """What the networks of an architecture's module are built with; nothing that timm's factory keeps for itself."""
    module = sys.modules[model_entrypoint(architecture).__module__]
    networks = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, nn.Module)]
    taken = {name for network in networks for name in inspect.signature(network).parameters}
    return (taken - _NEVER) | _EVERY_ARCHITECTURES
