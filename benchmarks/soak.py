"""A service for a minute: one `Cascade.from_policy`, eight threads, 1,500 requests, broken images among them.

    python -m benchmarks.soak --requests 1500          # about a minute on two cores

Models and images are those of ../shared/cifar10. Every answer must be the single-threaded one, every broken image be
named and harm no other, and the memory stay flat after the first third of the requests. Writes
benchmarks/results/soak.json.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from clcnet import Cascade, cli
from clcnet.cascade.cascade import Predictions
from clcnet.cascade.drift import quantiles
from clcnet.cascade.fused import Fused, Pool
from clcnet.cascade.policy import Expected, Policy
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.outputs import Record

RESULTS = cli.ROOT / "benchmarks" / "results" / "soak.json"
CIFAR = cli.ROOT.parent / "shared" / "cifar10"
NUM_THREADS, NUM_KINDS, MOST_IMAGES = 8, 40, 32
BROKEN_EVERY = 20  # requests
MOST_GROWTH = 20.0  # MB
THRESHOLD = 0.8


class Recorder:
    """In place of a watch: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []

    def add(self, confidence: np.ndarray) -> None:
        self.told.append(confidence)


def make_policy(path: Path, images: Sequence[Path]) -> None:
    """Equal weights of two models, and what to expect of these images."""
    models = [load_classifier(f"local-dir:{CIFAR / name}", device="cpu") for name in ("shallow", "deep")]
    rule = Fused(pools=(Pool(np.array([1.0])), Pool(np.array([0.5, 0.5]))))
    cascade, recorder = Cascade.of(models, rule, [THRESHOLD]), Recorder()
    cascade.watch = recorder  # type: ignore[assignment]
    cascade(images)
    steps = [column[~np.isnan(column)] for column in np.concatenate(recorder.told).T]
    shares = [len(step) / len(images) for step in steps]
    expected = Expected(len(images), 80.0, (79.0, 81.0), shares, 0.01, quantiles=quantiles(steps))
    records = [Record(model.name, weights=model.key, loaded_from=model.loaded_from) for model in models]
    Policy(records, rule, [THRESHOLD], expected).save(path)


def make_broken(folder: Path, image: Path) -> list[Path]:
    """Files that are no images any more, and one that is not there."""
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes(image.read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    return [folder / f"{name}.jpg" for name in ("text", "cut", "empty", "absent")]


def resident_megabytes() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 1e6


def same(one: Predictions, other: Predictions) -> bool:
    """Classes and models to the last bit; how sure, to the last digits of float32, which the machine's load sways."""
    labels, confidences, answered_by = (bool(np.allclose(*pair, atol=1e-6)) for pair in zip(one, other, strict=True))
    return labels and confidences and answered_by


def soak(num_requests: int, seed: int = 0) -> dict[str, float]:
    """Serve them all; counts what went wrong."""
    random = np.random.default_rng(seed)
    images = sorted((CIFAR / "imagenet_splits_5" / "split_part_1").glob("*/*.jpg"))[::4]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_policy(folder / "cascade.json", images)
        broken = make_broken(folder, images[0])
        cascade = Cascade.from_policy(folder / "cascade.json", device="cpu")
        kinds = [
            [images[k] for k in random.integers(0, len(images), size)]
            for size in random.integers(1, MOST_IMAGES + 1, NUM_KINDS)
        ]
        expected = [cascade(kind) for kind in kinds]

        def serve(number: int) -> str:
            kind = number % NUM_KINDS
            if number % BROKEN_EVERY:
                return "" if same(cascade(kinds[kind]), expected[kind]) else "different"
            bad = broken[number // BROKEN_EVERY % len(broken)]
            found = cascade([*kinds[kind], bad])
            if list(found.errors) != [len(kinds[kind])] or bad.name not in found.errors[len(kinds[kind])]:
                return "not named"
            rest = Predictions(*(column[:-1] for column in found), errors={})
            return "told apart" if same(rest, expected[kind]) else "different"

        outcomes = list[str]()
        warm_up = num_requests // 3
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            outcomes += pool.map(serve, range(warm_up))
            before = resident_megabytes()
            outcomes += pool.map(serve, range(warm_up, num_requests))
            growth = resident_megabytes() - before
        assert cascade.watch is not None
        return {
            "requests": num_requests,
            "seconds": time.perf_counter() - start,
            "broken_told_apart": outcomes.count("told apart"),
            "wrong": sum(outcome not in ("", "told apart") for outcome in outcomes),
            "growth_megabytes": growth,
            "looks": cascade.watch.num_looks,
            "alarms": len(cascade.watch.found),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500, help="how many (default: 1500)")
    torch.set_num_threads(1)
    found = soak(parser.parse_args().requests)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["wrong"]) or found["growth_megabytes"] > MOST_GROWTH)


if __name__ == "__main__":
    main()
