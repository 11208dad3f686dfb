"""Step 5 over 200,000 small images: memory flat, and killed ten times it ends with the bytes of a run never killed.

    python -m benchmarks.large_folder                  # about ten minutes on one core

The models have one layer, so that time goes into what the project does. Writes benchmarks/results/large-folder.json.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measured import keep, resident_megabytes
from benchmarks.one_layer import CLASSES, SIDE, save_one_layer
from clcnet import cli
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Surest
from clcnet.classifiers.classifier import load_classifier
from clcnet.data.outputs import Record

sys.path.append(str(cli.ROOT / "tests"))

import forking  # noqa: E402

MOST_GROWTH = 40.0  # MB while the last nine tenths are classified
A_FOLDER = 1000  # images
OUTPUTS = ("result.csv", "result.csv.report.html", "result.csv.errors.csv")


def make_images(folder: Path, num_images: int) -> None:
    """Random ones, some thousand different ones, and one in ten thousand that cannot be read."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (1000, SIDE, SIDE, 3), np.uint8)
    for number in range(num_images):
        place = folder / CLASSES[number // A_FOLDER % len(CLASSES)] / str(number // A_FOLDER)
        if number % A_FOLDER == 0:
            place.mkdir(parents=True)
        path = place / f"{number:06d}.png"
        if number % 10_000 == 77:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(np.roll(pixels[number % 1000], number // 1000, axis=0)).save(path, compress_level=1)


def evaluate(images: str, policy: str, folder: str) -> None:
    """Step 5 in a process that knows the model of one layer."""
    import benchmarks.one_layer  # noqa: F401
    import eval_custom_data as script

    words = ["--custom-data", images, "--policy", policy, "--result", f"{folder}/result.csv"]
    words += ["--store", f"{folder}/store", "--device", "cpu", "-j", "0", "-b", "256"]
    script.main(script.get_args_parser().parse_args(words))


def start(images: Path, policy: Path, folder: Path) -> BaseProcess:
    """Start it."""
    folder.mkdir(exist_ok=True)
    return forking.start(evaluate, str(images), str(policy), str(folder))


def kept(folder: Path) -> int:
    """Bytes in a store, which say how far a run is."""
    return sum(path.stat().st_size for path in folder.glob("store/*/*.answers"))


def watch_memory(process: BaseProcess, folder: Path, seen: list[tuple[int, float]]) -> None:
    """While it runs, note the store's size and the megabytes in use."""
    while process.exitcode is None:
        try:
            seen.append((kept(folder), resident_megabytes(process.pid or "self")))
        except OSError:
            return
        time.sleep(0.2)


def outputs(folder: Path) -> dict[str, bytes]:
    """What a run wrote."""
    return {name: (folder / name).read_bytes() for name in OUTPUTS if (folder / name).exists()}


def run(num_images: int, num_kills: int, root: Path, seed: int = 0) -> dict[str, float]:
    """Once undisturbed, once killed over and over."""
    images, generator = root / "images", random.Random(seed)
    make_images(images, num_images)
    models = [load_classifier(f"local-dir:{save_one_layer(root / str(seed), seed)}", device="cpu") for seed in (1, 2)]
    records = [Record(model.name, model.key, 1e-6, loaded_from=model.loaded_from) for model in models]
    Policy(records, Surest("max softmax"), [0.5]).save(root / "cascade.json")
    seen = list[tuple[int, float]]()
    begun = time.perf_counter()
    process = start(images, root / "cascade.json", root / "whole")
    watcher = threading.Thread(target=watch_memory, args=(process, root / "whole", seen))
    watcher.start()
    process.join()
    watcher.join()
    seconds = time.perf_counter() - begun
    assert process.exitcode == 0, process.exitcode
    whole, size = outputs(root / "whole"), kept(root / "whole")
    classifying = [memory for done, memory in seen if 0.1 * size <= done < size]
    kills = 0
    for number in range(num_kills):
        process = start(images, root / "cascade.json", root / "hurt")
        while kept(root / "hurt") < size * (number + generator.random()) / (num_kills + 1) and process.exitcode is None:
            time.sleep(0.02)
        kills += process.exitcode is None
        os.kill(process.pid or 0, signal.SIGKILL if number % 3 < 2 else signal.SIGTERM)
        process.join()
    process = start(images, root / "cascade.json", root / "hurt")
    process.join()
    assert process.exitcode == 0, process.exitcode
    return {
        "images": num_images,
        "seconds": seconds,
        "images_per_second": num_images / seconds,
        "megabytes_at_a_tenth": classifying[0] if classifying else 0.0,
        "growth_megabytes": max(classifying) - classifying[0] if classifying else 0.0,
        "peak_megabytes": max(memory for _, memory in seen),
        "kills": kills,
        "different": sum(outputs(root / "hurt").get(name) != content for name, content in whole.items()),
        "outputs": len(whole),
        "answers_lost": kept(root / "whole") - kept(root / "hurt"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000, help="how many (default: 200000)")
    parser.add_argument("--kills", type=int, default=10, help="how many (default: 10)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = run(args.images, args.kills, Path(name))
    keep("large-folder", found)
    sys.exit(bool(found["different"]) or found["growth_megabytes"] > MOST_GROWTH)


if __name__ == "__main__":
    main()
