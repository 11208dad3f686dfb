"""The weights file: a zip with `model_params.json` and `network.pt`, the format of the released implementation.

What is needed beyond that format lies under further top-level keys of `model_params.json`, which that implementation
ignores. Reading never runs pickled code, and takes no more memory than the network that the file describes. Errors say
what is wrong; `CLCNet.load` puts the path before them.
"""

import hashlib
import io
import json
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from reprlib import repr as short  # of what a stranger wrote, for one line
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clcnet import cli, distributed
from clcnet.data.images import NUM_FOLDS
from clcnet.files import atomic_path
from clcnet.strangers import parse_json, read_bytes

FORMAT_VERSION = 1
LARGEST_MEMBER = 8 * 2**20  # bytes, packed or not; a network for 1,000 classes takes 150 kB
LARGEST_PARAMS = 2**18  # bytes; 1,200 are usual
LARGEST_NUMBER = 1e10  # in a tensor; trained ones stay below 1e3
PARAMS_MEMBER, STATE_MEMBER = "model_params.json", "network.pt"
CONFIG_FILE, TENSORS_FILE = "config.json", "model.safetensors"
SPLIT_FILE = "CLCNet_imagenet_split.csv"  # beside the five weights: the fold of each image when they were trained
SHIPPED_CLASSES = 1000  # of weights/imagenet
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # fixed, so that the same network gives the same file

_RESERVED_KEYS = {"init_params", "class_attrs", "format_version", "masked", "calibration"}
_LARGEST_SIZES = {"n_d": 1024, "n_a": 1024, "n_steps": 32, "mapping_dim": 1024, "n_shared": 32, "n_independent": 32}
_NUMBERS = ("gamma", "momentum", "epsilon")
_FLOATS = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
_DTYPES = {f"torch {kind}Storage": dtype for kind, dtype in (_FLOATS | {"Long": torch.int64}).items()}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1, "BINPERSID": 1, "REDUCE": 2}
_TO_MARK = ("TUPLE", "APPENDS", "SETITEMS")


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


def read_weights(content: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read the JSON object, the arguments of `CLCNet` in it, and the state dict, no larger than these ask for.

    Raises:
        ValueError: what is wrong with the file of this content.
    """
    try:
        archive = _open_zip(content)
    except Exception as problem:  # on damaged bytes nearly anything is raised
        raise ValueError(f"not a readable zip file ({problem}); download or train it again") from None
    for name in (PARAMS_MEMBER, STATE_MEMBER):
        if name not in archive.NameToInfo:
            raise ValueError(f"not a CLCNet weights file: it has no member {name}")
    params, arguments, limit = _read_params(_read_member(archive, PARAMS_MEMBER, LARGEST_PARAMS))
    return params, arguments, _read_state(_read_member(archive, STATE_MEMBER, limit), limit)


def write_pretrained(folder: Path, params: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Write the same as the Hub has it: JSON and safetensors, in which no two names share a tensor."""
    for name, content in (
        (CONFIG_FILE, json.dumps(params, indent=1, sort_keys=True).encode()),
        (TENSORS_FILE, safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()})),
    ):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)


def read_pretrained(config: Path, tensors: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read what `write_pretrained` wrote, as `read_weights` does.

    Raises:
        OSError: a file is missing.
        ValueError: what is wrong with them.
    """
    params, arguments, limit = _read_params(read_bytes(config, LARGEST_PARAMS))
    content = read_bytes(tensors, 2 * limit)  # a shared layer is there for each of its names
    try:
        return params, arguments, safetensors.torch.load(content)
    except safetensors.SafetensorError as problem:
        raise ValueError(f"{STATE_MEMBER} cannot be read ({problem}); download it again") from None


def _check_size(name: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(f"{name} declares {num_bytes:,} bytes, more than the {limit:,} allowed")


def _open_zip(content: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("a member is there twice")
    return archive


def _read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed by method {info.compress_type}; only stored and deflated members are read")
    _check_size(name, info.file_size, limit)
    try:
        with archive.open(info) as member:
            return member.read(limit + 1)  # without a number it would unpack whatever is there, then cut
    except Exception as problem:
        raise ValueError(f"{name} cannot be unpacked ({problem})") from None


def _read_params(content: bytes) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What the JSON says, checked; the arguments of `CLCNet` in it; and bytes of the largest state dict of these."""
    try:
        params = parse_json(content)
    except ValueError as problem:
        raise ValueError(f"{PARAMS_MEMBER} is not JSON ({problem})") from None
    if not isinstance(params, dict):
        raise ValueError(f"{PARAMS_MEMBER} is not a JSON object")
    arguments = _constructor_arguments(params)
    return params, arguments, _largest_state(arguments)


def _read_state(content: bytes, limit: int) -> dict[str, Any]:
    try:
        archive = _open_zip(content)
        _check_size("it", sum(info.file_size for info in archive.infolist()), limit)
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.NameToInfo and _read_member(archive, f"{folder}byteorder", 10) != b"little":
            raise ValueError("bytes in another order than little-endian")
        state = _unpickle(archive, pickled, limit)
    except Exception as problem:  # on damaged bytes nearly anything is raised, IndexError included
        reason = ascii(str(problem).split("\n")[0][:120])[1:-1] or type(problem).__name__
        raise ValueError(f"{STATE_MEMBER} is not a plain torch state dict ({reason})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_MEMBER} holds a {type(state).__name__}, not a state dict")
    return state


def _unpickle(archive: zipfile.ZipFile, pickled: str, limit: int) -> Any:
    """What a state dict is pickled as: names, numbers, tuples and plain tensors. Nothing named in it is looked up.

    A pickle may else do all that Python can, ask for memory by a number (`bytearray(n)`, places of the memo), and hash
    tuples of tuples, which doubles with each. So keys are names, and whatever torch does not write is refused.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    storage = cache(lambda key: bytearray(_read_member(archive, pickled.removesuffix(".pkl") + "/" + key, limit)))
    for opcode, argument, _ in pickletools.genops(_read_member(archive, pickled, limit // 4)):
        start = marks.pop() if opcode.name in _TO_MARK else len(stack) - _TAKEN.get(opcode.name, 0)
        taken = stack[start:]
        del stack[start:]
        match opcode.name:
            case "PROTO" | "STOP" | "BUILD":  # the last sets attributes of an ordered dict; nothing reads them
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "GLOBAL":
                stack.append(argument)  # of GLOBAL "module name", as text
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if opcode.name == "EMPTY_DICT" else [])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "APPEND" | "APPENDS":
                stack[-1].extend(taken)
            case "SETITEM" | "SETITEMS":
                for key, value in zip(taken[::2], taken[1::2], strict=True):
                    if not isinstance(key, str):
                        raise ValueError(f"a key is a {type(key).__name__}, not a name")
                    stack[-1][key] = value
            case "BINPERSID":
                match taken:
                    case [("storage", str(kind), str(key), *_)] if kind in _DTYPES:
                        stack.append(torch.frombuffer(storage(key), dtype=_DTYPES[kind]))
                    case [(_, kind, *_)]:
                        raise _foreign(kind, stack)
            case "REDUCE":
                match taken:
                    case "collections OrderedDict", ():
                        stack.append({})
                    case "torch._utils _rebuild_tensor_v2", (Tensor() as data, offset, size, steps, *_):
                        stack.append(data.as_strided(size, steps, offset))  # checks that the storage holds it
                    case function, _:
                        raise _foreign(function, stack)
            case name:
                raise _foreign(name, stack)
    return stack.pop()


def _foreign(what: Any, stack: list[Any]) -> ValueError:
    name = next((item for item in reversed(stack) if isinstance(item, str) and " " not in item), "it")
    return ValueError(f"{name} holds {what if isinstance(what, str) else type(what).__name__}")


def check_state(state: dict[str, Any], read: dict[str, Tensor], unread: dict[str, Tensor]) -> None:
    """Refuse a state dict that lacks a tensor of `read`, holds one neither there nor in `unread`, or no sound one."""
    missing = sorted(read.keys() - state.keys())
    if missing:
        raise ValueError(f"{STATE_MEMBER} lacks {_some(missing)}")
    extra = sorted(name for name in state if name not in read | unread and not name.endswith(".num_batches_tracked"))
    if extra:
        raise ValueError(f"{STATE_MEMBER} holds unknown {_some(extra)}")
    for name, tensor in (unread | read).items():
        if name in state:
            _check_tensor(name, state[name], tensor.shape)


def _check_tensor(name: str, value: Any, shape: torch.Size) -> None:
    smallest = 0.0 if name.endswith("running_var") else -LARGEST_NUMBER
    name = f"{name} in {STATE_MEMBER}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {short(tuple(value.shape))}, expected {tuple(shape)}")
    if not value.is_floating_point() or not value.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite numbers")
    lowest, highest = float(value.min()), float(value.max())
    if lowest < smallest or highest > LARGEST_NUMBER:
        raise ValueError(
            f"{name} holds numbers from {lowest:g} to {highest:g}, which no training gives; train it again"
        )


def _some(names: list[str]) -> str:
    first = ", ".join(ascii(name)[1:-1][:80] for name in names[:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def to_params(
    arguments: Mapping[str, Any], calibration: Mapping[str, Any] | None, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of `model_params.json`: the released keys first in meaning, then ours.

    Args:
        arguments: of `CLCNet`, as `_constructor_arguments` gives them back.
        calibration: as JSON takes it.
        metadata: further keys.

    Raises:
        ValueError: a key of the metadata is one that the file needs.
    """
    clash = _RESERVED_KEYS & metadata.keys()
    if clash:
        raise ValueError(f"metadata may not use the key(s) {', '.join(sorted(clash))}: the weights file needs them")
    init_params = {key: arguments[key] for key in (*_LARGEST_SIZES, *_NUMBERS)}
    init_params |= {"input_dim": arguments["num_classes"], "output_dim": 1, "mask_type": "sparsemax"}
    init_params |= {"lambda_sparse": 1e-3, "cat_dims": [], "cat_emb_dim": 1, "cat_idxs": [], "clip_value": 1}
    init_params |= {"optimizer_params": {"lr": 0.02}, "scheduler_fn": None, "scheduler_params": {}}
    init_params |= {"seed": 0, "verbose": 1, "device_name": "auto"}
    return {
        "init_params": init_params,
        "class_attrs": {"preds_mapper": None},
        "format_version": FORMAT_VERSION,
        "calibration": calibration,
        **metadata,
    }


def metadata_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model_params.json` that say what is known of the network beyond what makes it."""
    return {key: value for key, value in params.items() if key not in _RESERVED_KEYS}


def _constructor_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Check `model_params.json` and turn it into the arguments of `CLCNet`."""
    init_params = params.get("init_params")
    if not isinstance(init_params, dict):
        raise ValueError(f"{PARAMS_MEMBER} has no init_params")
    version = params.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"format version {short(version)}, this code reads up to {FORMAT_VERSION}; update the code")
    if init_params.get("mask_type", "sparsemax") != "sparsemax":
        raise ValueError(f"mask_type {short(init_params['mask_type'])}; only sparsemax is known")
    if params.get("masked"):
        raise ValueError("its masks reach the score, which they no longer may; train it again")
    arguments: dict[str, Any] = {}
    for name, most in (_LARGEST_SIZES | {"input_dim": 2**20}).items():
        size = init_params.get(name)
        if type(size) is not int or not 1 <= size <= most:
            raise ValueError(f"{name} in {PARAMS_MEMBER} is {short(size)}, not a whole number from 1 to {most}")
        arguments[name] = size
    for name in _NUMBERS:
        number: Any = init_params.get(name)
        if type(number) not in (int, float) or not abs(number) < LARGEST_NUMBER:
            raise ValueError(f"{name} in {PARAMS_MEMBER} is {short(number)}, not a number below {LARGEST_NUMBER:g}")
        arguments[name] = float(number)
    arguments["num_classes"] = arguments.pop("input_dim")
    return arguments


def _largest_state(arguments: dict[str, Any]) -> int:
    """Bytes of the largest state dict of these sizes: float64, or float32 with each shared layer written for itself.

    Raises:
        ValueError: sizes that are fine one by one ask together for more than a weights file may hold.
    """
    n_steps, mapping_dim, width = arguments["n_steps"], arguments["mapping_dim"], arguments["n_d"] + arguments["n_a"]
    layers = (n_steps + 1) * (arguments["n_shared"] + arguments["n_independent"])
    numbers = layers * 2 * width * (max(width, mapping_dim) + 4) + n_steps * mapping_dim * (arguments["n_a"] + 4)
    num_bytes: int = 8 * (numbers + 8 * arguments["num_classes"]) + 1024 * (8 * layers + 8 * n_steps + 64)  # and names
    if num_bytes > LARGEST_MEMBER:
        raise ValueError(
            f"{PARAMS_MEMBER} describes a network of {num_bytes:,} bytes, more than the {LARGEST_MEMBER:,} allowed"
        )
    return num_bytes


def run_id(networks: Iterable[Iterable[Tensor]]) -> str:
    """What the files of one training have in common: a digest of the tensors of its networks."""
    content = b"".join(tensor.cpu().numpy().tobytes() for tensors in networks for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


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
    found = []
    for fold in range(1, NUM_FOLDS + 1):
        pattern = re.compile(rf"CLCNet_imagenet_split_{fold}(\(MSE_[^()]*\))?\.zip")
        paths = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
        if not paths:
            raise FileNotFoundError(
                f"found 0 weights for fold {fold} in {folder}, expected 1 ({fold_weights_name(fold)}); "
                "run train_imagenet_5fold_cv.py"
            )
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise ValueError(f"found {len(paths)} weights for fold {fold} in {folder}, expected 1: {names}; remove one")
        found += paths
    return found


def weights_or_shipped(path: Path, num_classes: Callable[[], int]) -> Path:
    """The weights to read: at the default place, where none are, those that ship for 1,000 classes take their place.

    Args:
        path: folder of fold weights, or one file.
        num_classes: asked only where the default place is empty.

    Raises:
        FileNotFoundError: it is empty, and the models have other classes.
    """
    place = Path(path).absolute()
    is_folder = place == cli.WEIGHTS_DIR
    is_there = any(path.glob("CLCNet_imagenet_split_*")) if is_folder else path.exists()
    if is_there or place not in (cli.WEIGHTS_DIR, cli.WEIGHTS_DIR / "CLCNet_custom_data.zip"):
        return path
    shipped = cli.WEIGHTS_DIR / "imagenet"
    if (count := num_classes()) != SHIPPED_CLASSES or not shipped.is_dir():
        raise FileNotFoundError(
            f"there are no weights {path}, and those that ship are for {SHIPPED_CLASSES:,} classes, not for {count}: "
            f"train yours with {'train_imagenet_5fold_cv.py' if is_folder else 'train_custom_data.py'} --cls-output "
            "SHALLOW.parquet DEEP.parquet, step 3's tables of your models"
        )
    if distributed.is_main():
        print(f"no CLCNet weights in {cli.WEIGHTS_DIR}: those of {shipped} judge; README.md there says what they know")
    return shipped if is_folder else shipped / path.name


def check_no_other_fold_weights(folder: str | Path) -> None:
    """Raise ValueError if weights under a released name lie where ours would go: a fold would then have two."""
    for path in sorted(Path(folder).glob(f"CLCNet_imagenet_split_[1-{NUM_FOLDS}](MSE_*).zip")):
        raise ValueError(f"{path} would stand beside new weights for its fold; move it or use another folder")
