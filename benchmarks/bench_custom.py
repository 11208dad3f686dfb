"""Is a cascade over a folder as fast as its parts, and does its memory stay the same however many images there are?

    python -m benchmarks.bench_custom                # about six minutes on two cores
    python -m benchmarks.bench_custom --pairs demo

Per pair of models, in one process and through the same loader, a few times in turn: the shallow model on all N images,
the deep model on all N images, and the cascade at a threshold that defers 30% of them. The bound for the cascade's time
is N times the shallow model's time an image plus the number deferred times the deep model's, both of the same turn,
since a machine's speed drifts; the median of the turns' ratios counts. Results go to benchmarks/results/custom.json
and, as text, to benchmarks/results/custom.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clcnet import cli
from clcnet.memory import keep_freed_memory

if __name__ == "__main__":
    cli.leave_cores_to_decoders()  # as step 5 does
    keep_freed_memory()

import numpy as np
import timm
import torch

from benchmarks.bench_generate import untrained
from benchmarks.measured import SHARED, in_fresh_process, keep, kept, machine, peak_mebibytes
from clcnet.cascade.rules import Surest
from clcnet.cascade.runner import FolderRun, run_folder
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.confidence import CLCNET
from clcnet.data.images import ImageSet, list_images
from clcnet.network.model import CLCNet
from clcnet.report.tables import markdown

DEFERRED = 0.3


def local_pair(folder: Path, num_images: int) -> tuple[Classifier, Classifier, ImageSet]:
    """Two classifiers that lie in a folder, and about so many of the images beside them."""
    shallow, deep = (load_classifier(f"local-dir:{folder / name}", device="cpu") for name in ("shallow", "deep"))
    images = list_images(folder / "imagenet_splits_5")
    return shallow, deep, images.subset(np.arange(0, len(images), max(1, len(images) // num_images)))


def photo_pair() -> tuple[Classifier, Classifier, ImageSet]:
    """MobileNetV3 and ResNet-50 at their native 224 pixels, untrained, on 100 full-size photographs."""
    with tempfile.TemporaryDirectory() as scratch:
        names = [untrained(name, Path(scratch)) for name in ("mobilenetv3_large_100", "resnet50")]
        shallow, deep = (load_classifier(name, device="cpu") for name in names)
    return shallow, deep, list_images(SHARED / "imagenet_sample")


# the batch sizes give every pair several deep batches
PAIRS: dict[str, tuple[Callable[[], tuple[Classifier, Classifier, ImageSet]], int]] = {
    "demo": (partial(local_pair, cli.DATA_DIR / "demo", 2000), 64),
    "cifar10": (partial(local_pair, SHARED / "cifar10", 1000), 64),
    "photographs": (photo_pair, 10),
}


def run(
    models: list[Classifier], clcnet: CLCNet, thresholds: list[float], images: ImageSet, batch_size: int
) -> tuple[float, FolderRun]:
    """Time one pass with an empty store. Returns seconds, and what the script finds."""
    with tempfile.TemporaryDirectory() as store:
        start = time.perf_counter()
        found = run_folder(models, Surest(CLCNET, network=clcnet), thresholds, images, [], Path(store), batch_size)
        assert found is not None, "there is one process"
        return time.perf_counter() - start, found


def deferring_threshold(found: FolderRun) -> float:
    """The threshold that defers the share, by a pass of the first model."""
    return float(np.quantile(found.answers.own_confidence[0], DEFERRED))


def measure_pair(name: str, num_turns: int) -> dict[str, Any]:
    """Time a pair of models alone and as a cascade, in turn."""
    load, batch_size = PAIRS[name]
    shallow, deep, images = load()
    torch.manual_seed(0)
    clcnet = CLCNet(num_classes=shallow.num_classes).eval()
    _, found = run([shallow], clcnet, [], images, batch_size)  # warms up, and says which threshold defers the share
    run([deep], clcnet, [], images.subset(np.arange(2 * batch_size)), batch_size)
    threshold = deferring_threshold(found)
    turns = []
    for _ in range(num_turns):
        seconds = [run([model], clcnet, [], images, batch_size)[0] for model in (shallow, deep)]
        wall, found = run([shallow, deep], clcnet, [threshold], images, batch_size)
        turns.append([*(1000 * total / len(images) for total in (*seconds, wall)), found.stopwatch.time_saving])
        print(f"{name}: {' '.join(f'{figure:.3f}' for figure in turns[-1])}", flush=True)
    deferred = int(found.answers.deferred.sum())
    shallow_ms, deep_ms, cascade_ms, printed = np.array(turns).T
    share = deferred / len(images)
    flops = [shallow.flops, deep.flops]
    return {
        "images": len(images),
        "deferred": deferred,
        "batch_size": batch_size,
        "shallow_ms": float(np.median(shallow_ms)),
        "deep_ms": float(np.median(deep_ms)),
        "cascade_ms": float(np.median(cascade_ms)),
        "over_bound": float(np.median(cascade_ms / (shallow_ms + share * deep_ms))),
        "time_saving": float(np.median(deep_ms / cascade_ms)),
        "time_saving_printed": float(np.median(printed)),
        "flops": flops,
        "flops_saving": flops[1] / (flops[0] + share * flops[1]),
        "turns": turns,
    }


def peak_memory(num_images: int) -> float:
    """Peak memory in MiB of this process once it ran the cascade over so many images, some of them many times."""
    shallow, deep, images = PAIRS["cifar10"][0]()
    torch.manual_seed(0)
    clcnet = CLCNet(num_classes=10).eval()
    _, found = run([shallow], clcnet, [], images, 64)
    repeated = images.subset(np.resize(np.arange(len(images)), num_images))
    run([shallow, deep], clcnet, [deferring_threshold(found)], repeated, 64)
    return peak_mebibytes()


def as_text(results: dict[str, Any]) -> str:
    """The results as a section of the benchmarks' page."""
    header = ["models", "images", "deferred", "shallow", "deep", "cascade"]
    header += ["over the bound", "time saved", "FLOPs saved"]
    rows = [
        [
            name,
            str(pair["images"]),
            f"{pair['deferred'] / pair['images']:.0%}",
            *(f"{pair[key]:.2f} ms" for key in ("shallow_ms", "deep_ms", "cascade_ms")),
            f"{pair['over_bound']:.3f}",
            f"{pair['time_saving']:.2f} x",
            f"{pair['flops_saving']:.2f} x",
        ]
        for name, pair in results["pairs"].items()
    ]
    memory = ", ".join(f"{mib:.0f} MiB at {num_images} images" for num_images, mib in results["peak_mib"].items())
    return f"""## The cascade over a folder

{markdown(header, rows)}

Times are an image's, medians of a few turns in one process through the same loader, on
{results["machine"]}.
"Over the bound" is the cascade's time over N times the shallow model's plus the deferred times the deep model's (to
stay under 1.08). "Time saved" and "FLOPs saved" are against the deep model on every image. Peak memory of the main
process, CIFAR-10 models: {memory}. Made by `python -m benchmarks.bench_custom`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=[*PAIRS, "none"], default=list(PAIRS), help="which to measure")
    parser.add_argument("--turns", type=cli.positive_int, default=5, help="how often (default: 5)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    results = {"pairs": {}, "peak_mib": {}} | kept("custom")
    results["machine"] = machine(torch, timm)
    for name in args.pairs:
        if name != "none":
            results["pairs"][name] = measure_pair(name, args.turns)
            keep("custom", results, as_text(results))
    if args.memory:
        results["peak_mib"] = {str(count): in_fresh_process(peak_memory, count) for count in (2_000, 20_000)}
    keep("custom", results, as_text(results))


if __name__ == "__main__":
    main()
