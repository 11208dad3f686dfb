"""Weights files that are none, or hostile ones: one line, exit code 2, no code run, no memory taken, nothing lost."""

import io
import json
import os
import pickle
import shutil
import struct
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
from clcnet.network.weights import LARGEST_MEMBER, PARAMS_MEMBER, STATE_MEMBER

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


def with_params(members: Members, change: Callable[[dict[str, Any]], Any]) -> bytes:
    params = json.loads(members[PARAMS_MEMBER])
    change(params)
    return pack({**members, PARAMS_MEMBER: json.dumps(params).encode()})


def with_state(members: Members, change: Callable[[dict[Any, Any]], Any]) -> bytes:
    state = torch.load(io.BytesIO(members[STATE_MEMBER]), weights_only=True)
    change(state)
    return pack({**members, STATE_MEMBER: saved(state)})


def declaring(content: bytes, member: str, size: int) -> bytes:
    """The same zip, in whose directory a member claims another size."""
    changed = bytearray(content)
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(member.encode()))
    struct.pack_into("<I", changed, entry + 24, size)
    return bytes(changed)


def bomb(members: Members, member: str) -> bytes:
    """A zip of a few hundred kilobytes whose member unpacks to 200 MB."""
    return pack({**members, member: bytes(200 * 2**20)})


def nested_bomb(members: Members) -> bytes:
    """As `bomb`, inside the zip that a torch file is."""
    return pack({**members, STATE_MEMBER: pack({"archive/data.pkl": b"", "archive/data/0": bytes(200 * 2**20)})})


FINAL = "tabnet.final_mapping.weight"
DEFECTS: dict[str, tuple[Callable[[Members], bytes], str]] = {
    "empty": (lambda members: b"", "not a readable zip file"),
    "text": (lambda members: b"<html>404</html>", "not a readable zip file"),
    "cut short": (lambda members: pack(members)[:-100], "not a readable zip file"),
    "damaged inside": (lambda members: pack(members, 0).replace(b"n_steps", b"n_stepz", 1), "Bad CRC-32"),
    "no params": (lambda members: pack({STATE_MEMBER: b"x"}), f"no member {PARAMS_MEMBER}"),
    "no state": (lambda members: pack({PARAMS_MEMBER: b"{}"}), f"no member {STATE_MEMBER}"),
    "params no JSON": (lambda members: pack({**members, PARAMS_MEMBER: b"{'n': 1}"}), "is not JSON"),
    "params no text": (lambda members: pack({**members, PARAMS_MEMBER: b"\xff\xfe\x00"}), "is not JSON"),
    "params too deep": (lambda members: pack({**members, PARAMS_MEMBER: b"[" * 100_000}), "is not JSON"),
    "params a list": (lambda members: pack({**members, PARAMS_MEMBER: b"[]"}), "is not a JSON object"),
    "params without n_d": (lambda members: with_params(members, lambda p: p["init_params"].pop("n_d")), "n_d in"),
    "params no dict": (lambda members: with_params(members, lambda p: p.update(init_params=3)), "no init_params"),
    "a size of 0": (lambda members: with_params(members, lambda p: p["init_params"].update(n_steps=0)), "n_steps in"),
    "an absurd size": (lambda members: with_params(members, lambda p: p["init_params"].update(n_d=10**9)), "n_d in"),
    "absurd sizes together": (
        lambda members: with_params(
            members, lambda p: p["init_params"].update(n_d=1024, n_a=1024, n_steps=1024, n_independent=1024)
        ),
        "describes a network",
    ),
    "gamma a word": (lambda members: with_params(members, lambda p: p["init_params"].update(gamma="x")), "gamma in"),
    "gamma NaN": (lambda members: with_params(members, lambda p: p["init_params"].update(gamma=float("nan"))), "gamma"),
    "newer version": (
        lambda members: with_params(members, lambda p: p.update(format_version=2)),
        "format version 2, this code reads up to 1; update",
    ),
    "unknown mask": (
        lambda members: with_params(members, lambda p: p["init_params"].update(mask_type="entmax")),
        "mask_type 'entmax'; only sparsemax is known",
    ),
    "unknown calibration": (lambda members: with_params(members, lambda p: p.update(calibration=[1])), "calibration"),
    "calibration NaN": (
        lambda members: with_params(
            members, lambda p: p.update(calibration={"intercept": float("nan"), "weights": [0] * 4, "network": 1})
        ),
        "calibration with numbers that are not finite",
    ),
    "state no torch file": (lambda members: pack({**members, STATE_MEMBER: b"x"}), "not a plain torch state dict"),
    "state empty": (lambda members: pack({**members, STATE_MEMBER: b""}), "not a plain torch state dict"),
    "state a list": (lambda members: pack({**members, STATE_MEMBER: saved([1])}), "holds a list, not a state dict"),
    "missing key": (lambda members: with_state(members, lambda s: s.pop(FINAL)), f"lacks {FINAL}"),
    "extra key": (lambda members: with_state(members, lambda s: s.update(more=torch.ones(1))), "holds unknown more"),
    "keys that are no names": (
        lambda members: with_state(members, lambda s: s.update({1: torch.ones(1), "more": 2})),
        "holds unknown 1, more",
    ),
    "another shape": (
        lambda members: with_state(members, lambda s: s.update({FINAL: torch.ones(1, 9)})),
        f"{FINAL} in {STATE_MEMBER} has shape (1, 9), expected (1, 8)",
    ),
    "no tensor": (lambda members: with_state(members, lambda s: s.update({FINAL: [1.0]})), "is a list, not a tensor"),
    "a sparse tensor": (
        lambda members: with_state(members, lambda s: s.update({FINAL: torch.ones(1, 8).to_sparse()})),
        f"{FINAL} in {STATE_MEMBER}",
    ),
    "NaN inside": (
        lambda members: with_state(members, lambda s: s[FINAL].fill_(float("nan"))),
        "values that are not finite numbers",
    ),
    "whole numbers inside": (
        lambda members: with_state(members, lambda s: s.update({FINAL: torch.ones(1, 8, dtype=torch.int64)})),
        f"{FINAL} in {STATE_MEMBER}",
    ),
    "params bomb": (lambda members: bomb(members, PARAMS_MEMBER), f"declares {200 * 2**20:,} bytes, more than"),
    "state bomb": (lambda members: bomb(members, STATE_MEMBER), f"declares {200 * 2**20:,} bytes, more than"),
    "bomb inside the state": (nested_bomb, "declares 209,715,200 bytes, more than"),
    "declares 4 GB": (
        lambda members: declaring(pack(members), STATE_MEMBER, 2**32 - 2),
        f"declares 4,294,967,294 bytes, more than the {LARGEST_MEMBER:,} allowed",
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
    assert str(caught.value).startswith(f"{tmp_path / 'w.zip'}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


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
        with (
            pytest.raises((pickle.UnpicklingError, RuntimeError, TypeError, KeyError))
            if "old" in kind
            else open(os.devnull)
        ):
            content = make(Attack(tmp_path / kind))
            if kind == "torch file":
                torch.load(io.BytesIO(content), weights_only=False)
            elif kind == "old torch file":
                torch.load(io.BytesIO(content), weights_only=False)
            else:
                pickle.loads(content)
        assert (tmp_path / kind).is_dir()


def leave_out(folder: Path) -> str:
    (folder / "CLCNet_imagenet_split_3.zip").unlink()
    return "found 0 weights for fold 3"


def double(folder: Path) -> str:
    shutil.copy(folder / "CLCNet_imagenet_split_2.zip", folder / "CLCNet_imagenet_split_2(MSE_0.1097).zip")
    return "found 2 weights for fold 2"


def break_one(folder: Path) -> str:
    (folder / "CLCNet_imagenet_split_5.zip").write_bytes(b"no zip")
    return "CLCNet_imagenet_split_5.zip: not a readable zip file"


def make_folder(folder: Path) -> str:
    (folder / "CLCNet_imagenet_split_1.zip").unlink()
    (folder / "CLCNet_imagenet_split_1.zip").mkdir()
    return "CLCNet_imagenet_split_1.zip"


def empty(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "found 0 weights for fold 1"


def remove(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no such folder of fold weights; run train_imagenet_5fold_cv.py"


def swap(folder: Path) -> str:
    for fold in (1, 2):
        CLCNet(num_classes=3).save(folder / f"CLCNet_imagenet_split_{fold}.zip", {"fold": 3 - fold})
    return "it held out fold 2"


@pytest.mark.parametrize("spoil", [leave_out, double, break_one, make_folder, empty, remove, swap])
def test_a_folder_without_exactly_five_good_weights_is_refused_by_fold(
    workshop: Workshop, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(workshop.weights, weights)
    message = spoil(weights)
    output = tmp_path / "performance-result.csv"
    output.write_text("old")
    for words in (workshop.command_on_tables(tmp_path), workshop.command(EVALUATE_FOLDS, tmp_path)):
        assert message in refusal(scripts.run(EVALUATE_FOLDS, *words, "--weight-save", weights))
        assert output.read_text() == "old"


@pytest.mark.parametrize("name", ["absent.zip", "."])
def test_a_custom_weight_that_is_no_file_is_refused(workshop: Workshop, tmp_path: Path, name: str) -> None:
    line = refusal(
        scripts.run(EVALUATE_CUSTOM, *workshop.command(EVALUATE_CUSTOM, tmp_path), "--weight", tmp_path / name)
    )
    assert f"{tmp_path / name}: no such weights file" in line
