"""The weights file: a zip with `model_params.json` and `network.pt`, the format of the released implementation.

What is needed beyond that format lies under further top-level keys of `model_params.json`, which that implementation
ignores. Reading never runs pickled code and never takes more memory than a network can need. Errors say what is wrong;
`CLCNet.load` puts the path before them.
"""

import io
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clcnet.data.images import NUM_FOLDS
from clcnet.files import atomic_path

FORMAT_VERSION = 1
LARGEST_MEMBER = 64 * 2**20  # bytes; a network for 1,000 classes takes 150 kB
PARAMS_MEMBER, STATE_MEMBER = "model_params.json", "network.pt"
SPLIT_FILE = "CLCNet_imagenet_split.csv"  # beside the five weights: the fold of each image when they were trained
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # fixed, so that the same network gives the same file

_RESERVED_KEYS = {"init_params", "class_attrs", "format_version", "masked", "calibration"}
_SIZES = ("n_d", "n_a", "n_steps", "mapping_dim", "n_shared", "n_independent")
_NUMBERS = ("gamma", "momentum", "epsilon")


def write_weights(path: str | Path, params: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Write the two members: `params` from `to_params` and a state dict under the released names."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in (
            (PARAMS_MEMBER, json.dumps(params, indent=1, sort_keys=True).encode()),
            (STATE_MEMBER, buffer.getvalue()),
        ):
            archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), content, zipfile.ZIP_DEFLATED)


def read_weights(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the two members, the JSON object and the state dict. Sizes are checked before anything is unpacked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is wrong with the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        with zipfile.ZipFile(path) as archive:
            params_bytes, state_bytes = (_read_member(archive, name) for name in (PARAMS_MEMBER, STATE_MEMBER))
    except zipfile.BadZipFile as problem:
        raise ValueError(f"not a readable zip file ({problem}); download or train it again") from None
    return _read_params(params_bytes), _read_state(state_bytes)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"not a CLCNet weights file: it has no member {name}") from None
    if info.file_size > LARGEST_MEMBER:
        raise ValueError(f"{name} declares {info.file_size:,} bytes, more than the {LARGEST_MEMBER:,} allowed")
    try:
        return archive.read(info)
    except (NotImplementedError, RuntimeError, EOFError, OSError, ValueError, zlib.error) as problem:
        raise ValueError(f"{name} cannot be unpacked ({problem})") from None


def _read_params(content: bytes) -> dict[str, Any]:
    try:
        params = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{PARAMS_MEMBER} is not JSON ({problem})") from None
    if not isinstance(params, dict):
        raise ValueError(f"{PARAMS_MEMBER} is not a JSON object")
    return params


def _read_state(content: bytes) -> dict[str, Any]:
    """Unpickle tensors alone; anything else in the file is refused by torch."""
    buffer = io.BytesIO(content)
    declared = 0
    try:
        if zipfile.is_zipfile(buffer):
            with zipfile.ZipFile(buffer) as archive:
                declared = sum(info.file_size for info in archive.infolist())
        if declared <= LARGEST_MEMBER:
            buffer.seek(0)
            with warnings.catch_warnings(action="ignore"):  # of what is odd about the file: the error below says more
                state = torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as problem:  # on damaged bytes torch's unpickler raises nearly anything, IndexError included
        reason = str(problem).splitlines()[0][:120] if str(problem) else type(problem).__name__
        raise ValueError(f"{STATE_MEMBER} is not a plain torch state dict ({reason})") from None
    if declared > LARGEST_MEMBER:
        raise ValueError(f"{STATE_MEMBER} declares {declared:,} bytes, more than the {LARGEST_MEMBER:,} allowed")
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_MEMBER} holds a {type(state).__name__}, not a state dict")
    return state


def to_params(
    arguments: Mapping[str, Any], calibration: Mapping[str, Any] | None, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of `model_params.json`: the released keys first in meaning, then ours.

    Args:
        arguments: of `CLCNet`, as `constructor_arguments` gives them back.
        calibration: as JSON takes it.
        metadata: further keys.

    Raises:
        ValueError: a key of the metadata is one that the file needs.
    """
    clash = _RESERVED_KEYS & metadata.keys()
    if clash:
        raise ValueError(f"metadata may not use the key(s) {', '.join(sorted(clash))}: the weights file needs them")
    init_params = {key: arguments[key] for key in (*_SIZES, *_NUMBERS)}
    init_params |= {"input_dim": arguments["num_classes"], "output_dim": 1, "mask_type": "sparsemax"}
    init_params |= {"lambda_sparse": 1e-3, "cat_dims": [], "cat_emb_dim": 1, "cat_idxs": [], "clip_value": 1}
    init_params |= {"optimizer_params": {"lr": 0.02}, "scheduler_fn": None, "scheduler_params": {}}
    init_params |= {"seed": 0, "verbose": 1, "device_name": "auto"}
    return {
        "init_params": init_params,
        "class_attrs": {"preds_mapper": None},
        "format_version": FORMAT_VERSION,
        "masked": arguments["masked"],
        "calibration": calibration,
        **metadata,
    }


def metadata_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model_params.json` that say what is known of the network beyond what makes it."""
    return {key: value for key, value in params.items() if key not in _RESERVED_KEYS}


def constructor_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Check `model_params.json` and turn it into the arguments of `CLCNet`."""
    init_params = params.get("init_params")
    if not isinstance(init_params, dict):
        raise ValueError(f"{PARAMS_MEMBER} has no init_params")
    version = params.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this code reads up to {FORMAT_VERSION}; update the code")
    if init_params.get("mask_type", "sparsemax") != "sparsemax":
        raise ValueError(f"mask_type {init_params['mask_type']!r}; only sparsemax is known")
    arguments: dict[str, Any] = {"num_classes": _size(init_params, "input_dim"), "masked": params.get("masked") is True}
    arguments |= {name: _size(init_params, name) for name in _SIZES}
    for name in _NUMBERS:
        value = init_params.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise ValueError(f"{name} in {PARAMS_MEMBER} is {value!r}, not a number")
        arguments[name] = float(value)
    _check_room(arguments)
    return arguments


def _check_room(arguments: dict[str, Any]) -> None:
    """Refuse sizes that are fine one by one and together ask for more memory than a weights file can fill."""
    width = arguments["n_d"] + arguments["n_a"]
    num_layers = arguments["n_shared"] + (arguments["n_steps"] + 1) * arguments["n_independent"]
    num_bytes = 4 * num_layers * 2 * width * max(width, arguments["mapping_dim"])
    if num_bytes > LARGEST_MEMBER:
        raise ValueError(
            f"{PARAMS_MEMBER} describes a network of {num_bytes:,} bytes, more than the {LARGEST_MEMBER:,} allowed"
        )


def _size(init_params: dict[str, Any], name: str) -> int:
    value = init_params.get(name)
    largest = 2**20 if name == "input_dim" else 1024
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ValueError(f"{name} in {PARAMS_MEMBER} is {value!r}, not a whole number from 1 to {largest}")
    return value


def fold_weights_name(fold: int) -> str:
    """The file of the network that was not trained on this fold, from 1."""
    return f"CLCNet_imagenet_split_{fold}.zip"


def find_fold_weights(folder: str | Path) -> list[Path]:
    """The five fold weights in a folder, in order of the fold that each was not trained on.

    Accepts our names, `CLCNet_imagenet_split_K.zip`, and the released ones, `CLCNet_imagenet_split_K(MSE_0.1097).zip`.

    Raises:
        FileNotFoundError: a fold has no weights; the message says which.
        ValueError: a fold has two.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of fold weights; run train_imagenet_5fold_cv.py")
    candidates = _fold_candidates(folder)
    for fold, paths in candidates.items():
        if not paths:
            raise FileNotFoundError(
                f"found 0 weights for fold {fold} in {folder}, expected 1 ({fold_weights_name(fold)}); "
                "run train_imagenet_5fold_cv.py"
            )
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise ValueError(f"found {len(paths)} weights for fold {fold} in {folder}, expected 1: {names}; remove one")
    return [paths[0] for paths in candidates.values()]


def check_no_other_fold_weights(folder: str | Path) -> None:
    """Raise ValueError if weights under a released name lie where ours would go: a fold would then have two."""
    folder = Path(folder)
    for paths in _fold_candidates(folder).values() if folder.is_dir() else ():
        for path in paths:
            if "(" in path.name:
                raise ValueError(f"{path} would stand beside new weights for its fold; move it or use another folder")


def _fold_candidates(folder: Path) -> dict[int, list[Path]]:
    candidates: dict[int, list[Path]] = {fold: [] for fold in range(1, NUM_FOLDS + 1)}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(rf"CLCNet_imagenet_split_([1-{NUM_FOLDS}])(\(MSE_[^()]*\))?\.zip", path.name)
        if match:
            candidates[int(match[1])].append(path)
    return candidates
