"""Damage files at random, and see that their readers refuse them as they should.

    python -m benchmarks.fuzz --files 10000

Tables (CSV and Parquet), weights files, checkpoints of timm's training, configurations of models, policies and stores
take turns. Checksums would catch most damage to a zip, so half of these are damaged inside and packed anew. A reader
may read what it is given or raise ValueError or OSError; anything else, or more than `SLOW` seconds for a file, is a
failure, and the file is kept in --keep.
"""

import argparse
import io
import json
import random
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.torch
import torch

from benchmarks.one_layer import one_layer
from clcnet import CLCNet
from clcnet.cascade.policy import Policy
from clcnet.cascade.pool import Pool
from clcnet.cascade.rules import TEMPERED, Fused, Surest
from clcnet.classifiers import checkpoint, model_config
from clcnet.data.outputs import Outputs, Record
from clcnet.data.store import READ, Store

SLOW = 10.0
Samples = dict[str, list[bytes]]
KEYS = np.array([bytes([65 + number]) * 16 for number in range(5)], "S16")


def read_store(segment: Path) -> None:
    """All that a store with this one file says; an error names the folder, which is to be deleted."""
    store = Store(segment.parent.parent, segment.parent.name, 10)
    places, _ = store.find(KEYS)
    store.probs(places[places >= 0])


def read_checkpoint(path: Path) -> None:
    """A checkpoint of timm's training, into the model that it is of."""
    wanted = one_layer().state_dict()
    weights, _ = checkpoint.read(path).weights(wanted)
    checkpoint.fits(weights, wanted)


READERS: dict[str, Callable[[Path], object]] = {
    "csv": Outputs.load,
    "parquet": Outputs.load,
    "zip": CLCNet.load,
    "config.json": model_config.read,
    "policy.json": Policy.load,
    "answers": read_store,
    "pth": read_checkpoint,
    "safetensors": read_checkpoint,
}
TORCH = ("zip", "pth")  # zips, the latter's members of torch's own
TURNS = ("csv", "zip", "parquet", "pth", "config.json", "zip", "policy.json", "answers", "zip", "safetensors", "pth")
TEXT = b"0123456789.,-+eEnaifNI\"'\r\n\t ;{}[]:\0\xff\xef\xbb\xbf"


def make_samples(folder: Path) -> Samples:
    """Whole files of every kind to damage, by suffix."""
    generator = np.random.default_rng(0)
    samples: Samples = {suffix: [] for suffix in READERS}
    for num_rows, num_classes in ((1, 2), (30, 10), (5, 1000)):
        logits = generator.standard_normal((num_rows, num_classes)) * 3
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        names = [f'class "{row}"/é, {row}.png' for row in range(num_rows)]
        outputs = Outputs.from_probs(probs, names, generator.integers(0, num_classes, num_rows))
        for suffix in ("csv", "parquet"):
            outputs.save(folder / f"sample.{suffix}")
            samples[suffix].append((folder / f"sample.{suffix}").read_bytes())
    samples["csv"].append(b"\xef\xbb\xbf" + samples["csv"][1].replace(b"\n", b"\r\n"))
    for num_classes in (2, 50):
        network = CLCNet(num_classes=num_classes)
        network.save(folder / "sample.zip", {"fold": 1, "validation": {"mse": 0.1}})
        samples["zip"].append((folder / "sample.zip").read_bytes())
    facts = {"num_classes": 2, "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    config = {"architecture": "test_resnet", "model_args": {"img_size": 32}, "label_names": ["ant", "bee"]}
    samples["config.json"].append(json.dumps(config | {"pretrained_cfg": facts}, indent=1).encode())
    pools = tuple(Pool(np.full(count, 0.7), np.linspace(-1, 1, 10)) for count in (1, 2))
    models = [Record(name, flops=1.5, loaded_from={"name": name}) for name in ("small", "large")]
    for rule in (Surest(TEMPERED, (1.2, 0.8)), Fused("max softmax", True, pools)):
        Policy(models, rule, [0.7]).save(folder / "policy.json")
        samples["policy.json"].append((folder / "policy.json").read_bytes())
    store = Store(folder, "model", 10)
    for start in range(0, 5, 2):
        keys = KEYS[start : start + 2]
        store.append(keys, np.full(len(keys), READ, np.uint8), np.full((len(keys), 10), 0.1, np.float32))
    store.close()
    state = one_layer().state_dict()
    training = {"arch": "one_layer", "epoch": 7, "metric": 80.5, "state_dict": state, "state_dict_ema": state}
    training["args"] = argparse.Namespace(model="one_layer", num_classes=3, img_size=8, mean=[0.5] * 3, crop_pct=0.9)
    for content in (training, state):
        torch.save(content, folder / "sample.pth")
        samples["pth"].append((folder / "sample.pth").read_bytes())
    safetensors.torch.save_file(state, folder / "sample.safetensors")
    samples["safetensors"].append((folder / "sample.safetensors").read_bytes())
    (segment,) = store.folder.glob("*.answers")
    samples["answers"].append(segment.read_bytes())
    segment.unlink()
    return samples


def damage(content: bytes, generator: random.Random) -> bytes:
    """Change a few places: bits, bytes, pieces lost, doubled, moved, or filled with what text formats are made of."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 5, 20))):
        place = generator.randrange(len(data) + 1)
        length = min(generator.choice((1, 1, 2, 4, 8, 50, 500)), len(data) - place)
        piece = data[place : place + length]
        kind = generator.randrange(8)
        if kind == 0 and length:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[place : place + length] = generator.randbytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = piece * generator.choice((1, 3))
        elif kind == 4:
            data[place : place + length] = bytes(generator.choice((TEXT, b"\0", b"\xff"))[0:1]) * length
        elif kind == 5:
            data[place : place + length] = bytes(generator.choices(TEXT, k=length))
        elif kind == 6:
            other = generator.randrange(len(data) + 1)
            data[other : other + length] = piece
        elif generator.random() < 0.3:
            del data[place:]
    return bytes(data)


def damage_inside(content: bytes, generator: random.Random) -> bytes:
    """Damage one member of a zip, or a member of the zip that this member is, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = generator.choice(sorted(members))
    pickles = [name for name in members if name.endswith("data.pkl")]  # where a torch file is most tender
    if pickles and generator.random() < 0.7:
        name = pickles[0]
    deeper = zipfile.is_zipfile(io.BytesIO(members[name])) and generator.random() < 0.8
    members[name] = (damage_inside if deeper else damage)(members[name], generator)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for member, inside in members.items():
            archive.writestr(member, inside)
    return sink.getvalue()


def fuzz(num_files: int, seed: int, keep: Path) -> tuple[Counter[str], list[str]]:
    """Damage and read that many files.

    Args:
        num_files: how many; the kinds take turns.
        seed: of the damage.
        keep: folder for the files at which a reader failed.

    Returns:
        how many of each kind were read or refused, and a line for every failure.
    """
    generator = random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures = []
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = make_samples(Path(name))
        for number in range(num_files):
            suffix = TURNS[number % len(TURNS)]
            sample = generator.choice(samples[suffix])
            inside = suffix in TORCH and generator.random() < 0.5
            content = (damage_inside if inside else damage)(sample, generator)
            path = Path(name) / "model" / f"damaged.{suffix}"
            path.write_bytes(content)
            outcome = _read(READERS[suffix], path)
            outcomes[f"{suffix} {outcome if outcome in ('read', 'refused') else 'failed'}"] += 1
            if outcome not in ("read", "refused"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}_{number}.{suffix}").write_bytes(content)
                failures.append(f"{keep / f'{seed}_{number}.{suffix}'}: {outcome}")
    return outcomes, failures


def _read(reader: Callable[[Path], object], path: Path) -> str:
    start = time.perf_counter()
    try:
        reader(path)
        outcome = "read"
    except (ValueError, OSError) as error:
        named = path.parent if path.suffix == ".answers" else path
        outcome = "refused" if str(named) in str(error) else f"the error does not name the file: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return outcome if seconds < SLOW else f"took {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="how many files to damage (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for files that break a reader")
    args = parser.parse_args()
    start = time.perf_counter()
    outcomes, failures = fuzz(args.files, args.seed, args.keep)
    for failure in failures:
        print(failure)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items())))
    print(f"{args.files} damaged files, {len(failures)} failures, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
