"""Weights files that are none, or hostile ones: one line, exit code 2, no code run, no memory taken, nothing lost."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripts
import torch
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, Workshop, contents, refusal

from clcnet import CLCNet
from clcnet.network.weights import PARAMS_MEMBER, SPLIT_FILE, STATE_MEMBER

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def members(workshop: Workshop) -> Members:
    """What a good weights file holds."""
    with zipfile.ZipFile(workshop.weights / "CLCNet_custom_data.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return sink.getvalue()


def saved(state: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(state, sink)
    return sink.getvalue()


def declaring(content: bytes, member: str, size: int) -> bytes:
    """The same zip, in whose directory a member claims another size."""
    changed = bytearray(content)
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(member.encode()))
    struct.pack_into("<I", changed, entry + 24, size)
    return bytes(changed)


def twice(members: Members) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            for name, content in [*members.items(), (STATE_MEMBER, b"")]:
                archive.writestr(name, content)
    return sink.getvalue()


BYTES_BY_NUMBER = b"cbuiltins\nbytearray\nJ\0\0\0\x20\x85R."  # bytearray(2**29)
TENSOR = (  # {"a": the first N numbers, STEP apart, of a storage}
    b"}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\n"
    b"X\1\0\0\x000X\3\0\0\0cpuK\1tQK\0J%s\x85%s\x85\x89}tRs."
)
VARIANCE = "tabnet.encoder.att_transformers.1.bn.bn.running_var"
FINAL = "tabnet.final_mapping.weight"


Make = Callable[[Members], bytes]


def member(name: str, content: bytes) -> Make:
    """A weights file in which one member is another."""
    return lambda members: pack({**members, name: content})


def bomb(name: str, wrapped: Callable[[bytes], bytes] = bytes) -> Make:
    """A weights file of a few hundred kilobytes, of which a member unpacks to 200 MB."""
    return lambda members: member(name, wrapped(bytes(200 * 2**20)))(members)


def params(change: Callable[[dict[str, Any]], Any]) -> Make:
    """A weights file whose JSON is changed."""

    def make(members: Members) -> bytes:
        changed = json.loads(members[PARAMS_MEMBER])
        change(changed)
        return member(PARAMS_MEMBER, json.dumps(changed).encode())(members)

    return make


def saying(**values: Any) -> Make:
    return params(lambda changed: changed.update(values))


def calibrated(intercept: float, calibration_weights: list[float]) -> Make:
    return saying(calibration={"intercept": intercept, "weights": calibration_weights, "network": 1})


def describing(**values: Any) -> Make:
    return params(lambda changed: changed["init_params"].update(values))


def state(change: Callable[[dict[Any, Any]], Any]) -> Make:
    """A weights file whose tensors are changed."""

    def make(members: Members) -> bytes:
        changed = torch.load(io.BytesIO(members[STATE_MEMBER]), weights_only=True)
        change(changed)
        return member(STATE_MEMBER, saved(changed))(members)

    return make


def holding(value: Any, name: Any = FINAL) -> Make:
    return state(lambda changed: changed.update({name: value}))


def opcodes(built: bytes, storage: bytes = b"") -> Make:
    """A weights file whose state dict is what these opcodes of pickle build."""
    parts = {"archive/data.pkl": b"\x80\2" + built, "archive/data/0": storage}
    return member(STATE_MEMBER, pack(parts, zipfile.ZIP_STORED))


DEFECTS: dict[str, tuple[Make, str]] = {
    "empty": (lambda members: b"", "not a readable zip file"),
    "text": (lambda members: b"<html>404</html>", "not a readable zip file"),
    "cut short": (lambda members: pack(members)[:-100], "not a readable zip file"),
    "damaged inside": (lambda members: pack(members, 0).replace(b"n_steps", b"n_stepz", 1), "Bad CRC-32"),
    "no params": (lambda members: pack({STATE_MEMBER: b"x"}), f"no member {PARAMS_MEMBER}"),
    "no state": (lambda members: pack({PARAMS_MEMBER: b"{}"}), f"no member {STATE_MEMBER}"),
    "params no JSON": (member(PARAMS_MEMBER, b"{'n': 1}"), "is not JSON"),
    "params no text": (member(PARAMS_MEMBER, b"\xff\xfe\x00"), "is not JSON"),
    "params too deep": (member(PARAMS_MEMBER, b"[" * 100_000), "is not JSON"),
    "params a list": (member(PARAMS_MEMBER, b"[]"), "is not a JSON object"),
    "params without n_d": (params(lambda p: p["init_params"].pop("n_d")), "n_d in"),
    "params no dict": (saying(init_params=3), "no init_params"),
    "a size of 0": (describing(n_steps=0), "n_steps in"),
    "an absurd size": (describing(n_d=10**9), "n_d in"),
    "absurd sizes together": (describing(n_d=1024, n_a=1024, n_steps=32, n_independent=32), "describes a network"),
    "many small layers": (describing(n_steps=1024, n_shared=1024), "n_steps in"),
    "gamma a word": (describing(gamma="x"), "gamma in"),
    "gamma NaN": (describing(gamma=float("nan")), "gamma"),
    "gamma at the bound": (describing(gamma=1e10), "gamma"),
    "newer version": (saying(format_version=2), "format version 2, this code reads up to 1; update"),
    "unknown mask": (describing(mask_type="entmax"), "mask_type 'entmax'; only sparsemax is known"),
    "a size that is true": (describing(mapping_dim=True), "mapping_dim in"),
    "unknown calibration": (saying(calibration=[1]), "calibration"),
    "calibration of one weight": (calibrated(1, [1]), "unknown calibration"),
    "calibration NaN": (calibrated(float("nan"), [0] * 4), "calibration with numbers that are not finite"),
    "state no torch file": (member(STATE_MEMBER, b"x"), "not a plain torch state dict"),
    "state empty": (member(STATE_MEMBER, b""), "not a plain torch state dict"),
    "state a list": (member(STATE_MEMBER, saved([1])), "holds a list, not a state dict"),
    "state a number": (member(STATE_MEMBER, saved(1)), "holds a int, not a state dict"),
    "missing key": (state(lambda s: s.pop(FINAL)), f"lacks {FINAL}"),
    "extra key": (holding(torch.ones(1), "more"), "holds unknown more"),
    "keys that are no names": (state(lambda s: s.update({1: torch.ones(1), "more": 2})), "a key is a int, not a name"),
    "another shape": (holding(torch.ones(1, 9)), f"{FINAL} in {STATE_MEMBER} has shape (1, 9), expected (1, 8)"),
    "no tensor": (holding([1.0]), "is a list, not a tensor"),
    "a name of two lines": (holding(torch.ones(1), "a\n\x1b[2Jb"), r"holds unknown a\n\x1b[2Jb"),
    "a sparse tensor": (holding(torch.ones(1, 8).to_sparse()), f"{FINAL} holds torch.serialization _get_layout"),
    "a quantised tensor": (
        state(lambda s: s.update({FINAL: torch.quantize_per_tensor(torch.ones(1, 8), 1, 0, torch.qint8)})),
        f"{FINAL} holds torch QInt8Storage",
    ),
    "a tensor without numbers": (
        holding(torch.empty(1, 8, device="meta")),
        f"{FINAL} holds torch._utils _rebuild_meta_tensor_no_storage",
    ),
    "NaN inside": (state(lambda s: s[FINAL].fill_(float("nan"))), "values that are not finite numbers"),
    "3e38 inside": (state(lambda s: s[FINAL].fill_(-3e38)), f"{FINAL} in {STATE_MEMBER}"),
    "more than float32 holds": (
        holding(torch.full((1, 8), 1e300, dtype=torch.float64)),
        f"{FINAL} in {STATE_MEMBER} holds numbers from 1e+300 to 1e+300",
    ),
    "a negative variance": (
        state(lambda s: s[VARIANCE].fill_(-1e-3)),
        f"{VARIANCE} in {STATE_MEMBER} holds numbers from -0.001",
    ),
    "products beyond float32": (
        state(lambda s: [s[name].fill_(1e9) for name in s if "glu" in name]),
        "scores may be no numbers",
    ),
    "whole numbers inside": (holding(torch.ones(1, 8, dtype=torch.int64)), f"{FINAL} in {STATE_MEMBER}"),
    "calibration of 1e308": (
        calibrated(0, [1e308] * 4),
        "calibration with numbers that are not finite or not below 1e+10",
    ),
    "400 digits": (calibrated(10**400, [0] * 4), "unknown calibration"),
    "5000 digits": (member(PARAMS_MEMBER, b'{"fold": %s}' % (b"1" * 5000)), "is not JSON"),
    "a key twice": (member(PARAMS_MEMBER, b'{"a": 1, "a": 2}'), "a key is there twice"),
    "params nested": (
        member(PARAMS_MEMBER, b'{"a": %s}' % (b"[" * 600 + b"]" * 600)),
        "more than 500 lists and objects",
    ),
    "a member twice": (twice, "not a readable zip file (a member is there twice)"),
    "a zip of the future": (
        lambda members: pack(members).replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\xff\x03\xff", 1),
        "zip file version 25.5",
    ),
    "packed by LZMA": (
        lambda members: pack(members, zipfile.ZIP_LZMA),
        "packed by method 14; only stored and deflated",
    ),
    "packed by bzip2": (lambda members: pack(members, zipfile.ZIP_BZIP2), "packed by method 12; only stored and"),
    "places by number": (opcodes(b"}r\xff\xff\xff\xff)R."), "not a plain torch state dict"),
    "bytes by number": (opcodes(BYTES_BY_NUMBER), "it holds builtins bytearray"),
    "doubling tuples": (opcodes(b"})" + b"q\0h\0\x86" * 60 + b"Ns."), "a key is a tuple, not"),
    "deep tuples": (opcodes(b"})" + b"\x85" * 2**17 + b"Ns."), "a key is a tuple, not a name"),
    "more numbers than the file": (
        opcodes(TENSOR % (b"\x01\0\0\x7f", b"K\1"), b"1234"),
        "not a plain torch state dict (setStorage",
    ),
    "one number many times": (opcodes(TENSOR % (b"\0\0\0\x7f", b"K\0"), b"1234"), "lacks tabnet."),
    "a shape of doubling tuples": (
        opcodes((TENSOR % (b"\1\0\0\0", b")" + b"q\0h\0\x86" * 60)), b"1234"),
        "not a plain torch state dict",
    ),
    "another order of bytes": (
        member(STATE_MEMBER, pack({"a/data.pkl": b"}.", "a/byteorder": b"big"})),
        "little-endian",
    ),
    "larger than any": (lambda members: pack(members) + bytes(2**23), "is larger than the 8,388,608 bytes"),
    "params bomb": (bomb(PARAMS_MEMBER), f"declares {200 * 2**20:,} bytes, more than"),
    "state bomb": (bomb(STATE_MEMBER), f"declares {200 * 2**20:,} bytes, more than"),
    "bomb inside the state": (
        bomb(STATE_MEMBER, lambda zeros: pack({"archive/data.pkl": b"", "archive/data/0": zeros})),
        "declares 209,715,200 bytes, more than",
    ),
    "declares 4 GB": (
        lambda members: declaring(pack(members), STATE_MEMBER, 2**32 - 2),
        "declares 4,294,967,294 bytes, more than",
    ),
    "declares too little": (lambda members: declaring(pack(members), STATE_MEMBER, 100), STATE_MEMBER),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_weights_file_is_refused_in_one_line_and_quickly(
    tmp_path: Path, members: Members, defect: str
) -> None:
    make, message = DEFECTS[defect]
    (tmp_path / "w.zip").write_bytes(make(members))
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        CLCNet.load(tmp_path / "w.zip")
    assert time.perf_counter() - start < 5
    assert str(caught.value).startswith(str(tmp_path / "w.zip")) and "\n" not in str(caught.value)
    assert message in str(caught.value)


MEASURE = """
import resource, sys
from clcnet import CLCNet
CLCNet.load(sys.argv[1])
honest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        CLCNet.load(path)
    except ValueError:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - honest
        if grown > 2**15:
            sys.exit(f"{path}: {grown:,} KiB more")
    else:
        sys.exit(f"{path} was read")
"""


def test_files_that_declare_little_take_no_more_memory_than_an_honest_one(tmp_path: Path, members: Members) -> None:
    zeros = {**members, STATE_MEMBER: bytes(2**26)}
    bombs = {
        "deflated": declaring(pack(zeros), STATE_MEMBER, 100),
        "bzip2": pack(zeros, zipfile.ZIP_BZIP2),
        "bytes": opcodes(BYTES_BY_NUMBER)(members),
        "places": opcodes(b"}r\xff\xff\xff\x7f.")(members),
        "norms": describing(n_steps=1024, n_shared=1024, n_d=16, n_a=16)(members),
        "classes": describing(input_dim=2**20)(members),
    }
    for name, content in {"honest": pack(members), **bombs}.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("honest", *bombs)]
    finished = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "w.zip")
    with pytest.raises(OSError, match="w.zip is not a file, but a folder, pipe or device"):
        CLCNet.load(tmp_path / "w.zip")


class Attack:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


ATTACKS: dict[str, Callable[[Any], bytes]] = {
    "torch file": lambda attack: saved({"tabnet.final_mapping.weight": attack}),
    "old torch file": lambda attack: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(attack, 2),
    "bare pickle": lambda attack: pickle.dumps(attack),
    "protocol 0": lambda attack: pickle.dumps(attack, 0),
}


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("member", [PARAMS_MEMBER, STATE_MEMBER])
@pytest.mark.parametrize("script", [EVALUATE_FOLDS, EVALUATE_CUSTOM])
def test_code_in_a_weights_file_never_runs(
    workshop: Workshop, tmp_path: Path, members: Members, script: str, member: str, kind: str
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(workshop.weights, weights)
    hostile = weights / ("CLCNet_imagenet_split_4.zip" if script == EVALUATE_FOLDS else "CLCNet_custom_data.zip")
    hostile.write_bytes(pack({**members, member: ATTACKS[kind](Attack(tmp_path / "ran"))}))
    words = (
        [*workshop.command_on_tables(tmp_path), "--weight-save", weights]
        if script == EVALUATE_FOLDS
        else [*workshop.command(script, tmp_path), "--weight", hostile]
    )
    before = contents(tmp_path)
    assert str(hostile) in refusal(scripts.run(script, *words))
    assert not (tmp_path / "ran").exists() and contents(tmp_path) == before


def test_the_attacks_would_work_on_a_careless_reader(tmp_path: Path) -> None:
    for kind, make in ATTACKS.items():
        content = make(Attack(tmp_path / kind))
        with contextlib.suppress(pickle.UnpicklingError, RuntimeError, TypeError, KeyError):  # once it has run
            torch.load(io.BytesIO(content), weights_only=False) if "torch" in kind else pickle.loads(content)
        assert (tmp_path / kind).is_dir()


def fold(number: int) -> str:
    return f"CLCNet_imagenet_split_{number}.zip"


def save_folds(metadata: Callable[[int], dict[str, Any]], last: int = 5) -> Callable[[Path], None]:
    """Networks of the folds up to one, with what they say of their training."""

    def save(folder: Path) -> None:
        for number in range(1, last + 1):
            CLCNet(num_classes=3).save(folder / fold(number), metadata(number))

    return save


def split(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SPLIT_FILE).write_text(text)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "one left out": (lambda folder: (folder / fold(3)).unlink(), "found 0 weights for fold 3"),
    "one twice": (
        lambda folder: shutil.copy(folder / fold(2), folder / "CLCNet_imagenet_split_2(MSE_0.1097).zip"),
        "found 2 weights for fold 2",
    ),
    "one broken": (lambda folder: (folder / fold(5)).write_bytes(b"no zip"), f"{fold(5)}: not a readable zip file"),
    "one a folder": (lambda folder: [(folder / fold(1)).unlink(), (folder / fold(1)).mkdir()], fold(1)),
    "empty": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "found 0 weights for fold 1"),
    "absent": (shutil.rmtree, "no such folder of fold weights; run train_imagenet_5fold_cv.py"),
    "swapped": (save_folds(lambda number: {"fold": 3 - number}, last=2), "it held out fold 2"),
    "of two trainings": (  # what a kill between the renames of a second one leaves
        save_folds(lambda number: {"run": "old" if number > 2 else "new"}),
        f"mixes two trainings: {fold(1)} is of another than {fold(3)}, {fold(4)}, {fold(5)}; "
        "run train_imagenet_5fold_cv.py again",
    ),
    "one of a later training": (
        save_folds(lambda number: {"run": "new"}, last=1),
        f"mixes two trainings: {fold(1)} is of another than {fold(2)}",
    ),
    "another training's split": (
        split("file,table,fold,validates,run\na.png,1,1,,old\n"),
        f"{fold(1)} is of another than {SPLIT_FILE}",
    ),
    "half a split": (
        split("file,table,fold,validates\na.png,1,1,\nb.png,1"),
        f"{SPLIT_FILE} is not a whole list of folds; run train_imagenet_5fold_cv.py again",
    ),
    "a pipe for a split": (lambda folder: os.mkfifo(folder / SPLIT_FILE), f"{SPLIT_FILE} is not a file"),
    "odd metadata": (save_folds(lambda number: {"fold": ["\n" * 99], "training_folds": 3}), "it held out fold ["),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_folder_without_exactly_five_good_weights_is_refused_by_fold(
    workshop: Workshop, tmp_path: Path, spoilt: str
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(workshop.weights, weights)
    spoil, message = SPOILT[spoilt]
    spoil(weights)
    output = tmp_path / "performance-result.csv"
    output.write_text("old")
    for words in (workshop.command_on_tables(tmp_path), workshop.command(EVALUATE_FOLDS, tmp_path)):
        assert message in refusal(scripts.run(EVALUATE_FOLDS, *words, "--weight-save", weights))
        assert output.read_text() == "old"
