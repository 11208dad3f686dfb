"""A service for some minutes: one `Cascade.from_policy`, eight threads, 50,000 requests, broken images among them.

    python -m benchmarks.soak                          # about six minutes on one core

Requests hold 1 to 32 small images, small requests more often: files, bytes of files and arrays; the models have one
layer. Every answer must be the single-threaded one, every broken image be named and harm no other; clients that give up
and requests that are cancelled must leave nothing behind: no thread, no open file, and no memory after the first
thousand requests. Writes benchmarks/results/soak.json.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measured import keep, resident_megabytes
from benchmarks.one_layer import SIDE, save_one_layer
from clcnet import Cascade
from clcnet.cascade.drift import Expected, quantiles
from clcnet.cascade.in_memory import Picture, Predictions
from clcnet.cascade.policy import Policy
from clcnet.cascade.pool import Pool
from clcnet.cascade.rules import Fused
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.outputs import Record

NUM_THREADS, NUM_IMAGES, NUM_KINDS, MOST_IMAGES = 8, 400, 60, 32
BROKEN_EVERY, CANCELLED_EVERY, IMPATIENT_EVERY = 20, 50, 30  # requests
WARM_UP = 1000
MOST_GROWTH = 20.0  # MB
GOES_ON = 0.3  # share of the images


class Recorder:
    """In place of a watch: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []

    def add(self, confidence: np.ndarray) -> None:
        self.told.append(confidence)


def make_images(folder: Path) -> list[Picture]:
    """Small random images, a third each as paths, bytes and arrays."""
    random = np.random.default_rng(0)
    pictures: list[Picture] = []
    for number in range(NUM_IMAGES):
        pixels = random.integers(0, 256, 3) + random.normal(0, 40, (SIDE, SIDE, 3))
        array = np.clip(pixels, 0, 255).astype(np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(array).save(path)
        pictures.append((path, path.read_bytes(), array)[number % 3])
    return pictures


def make_policy(path: Path, images: list[Picture]) -> None:
    """Equal weights of two models, and what to expect of these images."""
    folders = [save_one_layer(path.parent / str(seed), seed) for seed in (1, 2)]
    models = [load_classifier(f"local-dir:{folder}", device="cpu") for folder in folders]
    rule = Fused(pools=(Pool(np.array([1.0])), Pool(np.array([0.5, 0.5]))))
    threshold = float(np.quantile(Cascade.of(models, rule, [-np.inf])(images).confidences, GOES_ON))
    cascade, recorder = Cascade.of(models, rule, [threshold]), Recorder()
    cascade.watch = recorder  # type: ignore[assignment]
    cascade(images)
    steps = [column[~np.isnan(column)] for column in np.concatenate(recorder.told).T]
    shares = [len(step) / len(images) for step in steps]
    expected = Expected(len(images), 80.0, (79.0, 81.0), shares, 0.01, quantiles=quantiles(steps))
    records = [Record(model.name, weights=model.key, loaded_from=model.loaded_from) for model in models]
    Policy(records, rule, [threshold], expected).save(path)


def make_broken(folder: Path) -> list[Path]:
    """Files that are no images any more, and one that is not there."""
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    return [folder / f"{name}.jpg" for name in ("text", "cut", "empty", "absent")]


def left_behind() -> int:
    """What a request could leave: threads and open files."""
    return threading.active_count() + len(os.listdir("/proc/self/fd"))


def same(one: Predictions, other: Predictions) -> bool:
    """Classes and models to the last bit; how sure, to the last digits of float32, which the machine's load sways."""
    labels, confidences, answered_by = (bool(np.allclose(*pair, atol=1e-6)) for pair in zip(one, other, strict=True))
    return labels and confidences and answered_by


def soak(num_requests: int, seed: int = 0) -> dict[str, float]:
    """Serve them all; counts what went wrong."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = make_images(folder)
        make_policy(folder / "cascade.json", images)
        broken = make_broken(folder)
        cascade = Cascade.from_policy(folder / "cascade.json", device="cpu")
        assert cascade.watch is not None
        sizes = np.round(np.geomspace(1, MOST_IMAGES, NUM_KINDS)).astype(int)
        kinds = [[images[k] for k in random.integers(0, len(images), size)] for size in sizes]
        expected = [cascade(kind) for kind in kinds]
        num_deferred = sum(int((found.answered_by > 0).sum()) for found in expected)
        served = list[str]()

        def serve(number: int) -> str:
            kind = number % NUM_KINDS
            if number % BROKEN_EVERY:
                outcome = "" if same(cascade(kinds[kind]), expected[kind]) else "different"
            else:
                bad = broken[number // BROKEN_EVERY % len(broken)]
                found = cascade([*kinds[kind], bad])
                named = list(found.errors) == [len(kinds[kind])] and bad.name in found.errors[len(kinds[kind])]
                rest = Predictions(*(column[:-1] for column in found), errors={})
                outcome = ("told apart" if same(rest, expected[kind]) else "different") if named else "not named"
            served.append(outcome)
            return outcome

        def some(pool: ThreadPoolExecutor, numbers: range) -> tuple[int, int]:
            """Ask for these at once; some clients cancel what has not begun, others do not wait for the answer."""
            asked: list[Future[str]] = [pool.submit(serve, number) for number in numbers]
            cancelled = sum(future.cancel() for future in asked[::CANCELLED_EVERY])
            impatient = 0
            for future in asked[1::IMPATIENT_EVERY]:
                try:
                    future.result(timeout=0)
                except TimeoutError:
                    impatient += 1
            for future in asked:
                if not future.cancelled():
                    future.result()
            return cancelled, impatient

        warm_up = min(WARM_UP, num_requests // 3)
        marks = [0, *range(warm_up, num_requests, WARM_UP), num_requests]
        counts, before, growth, untidy = np.zeros(2, int), 0.0, list[float](), 0
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for first, last in zip(marks, marks[1:], strict=False):
                counts += some(pool, range(first, last))
                gc.collect()
                if first == 0:
                    before, untidy = resident_megabytes(), left_behind()
                growth.append(resident_megabytes() - before)
            after = left_behind()
        return {
            "requests": num_requests,
            "images": int(sum(sizes[number % NUM_KINDS] for number in range(num_requests))),
            "deferred_share": num_deferred / int(sizes.sum()),
            "seconds": time.perf_counter() - start,
            "answered": len(served),
            "cancelled": int(counts[0]),
            "gave_up_waiting": int(counts[1]),
            "broken_told_apart": served.count("told apart"),
            "wrong": sum(outcome not in ("", "told apart") for outcome in served),
            "lost": num_requests - len(served) - int(counts[0]),
            "left_behind": max(after - untidy, 0),
            "growth_megabytes": growth[-1],
            "most_growth_megabytes": max(growth),
            "looks": cascade.watch.num_looks,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000, help="how many (default: 50000)")
    torch.set_num_threads(1)
    found = soak(parser.parse_args().requests)
    keep("soak", found)
    bad = found["wrong"] or found["lost"] or found["left_behind"]
    sys.exit(bool(bad) or found["most_growth_megabytes"] > MOST_GROWTH)


if __name__ == "__main__":
    main()
