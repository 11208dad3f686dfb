"""Is step 3 as fast as a bare loop of timm's loader and model, and what do its options and defaults bring?

    python -m benchmarks.bench_generate                   # about ten minutes on two cores
    python -m benchmarks.bench_generate --parts ratio

Parts: `ratio`, the whole of step 3 against the bare loop with the same workers, batch and precision, in turn;
`options`, the model alone with each option; `defaults`, batch sizes and workers; `cost`, FLOPs against time; `memory`,
the peak for few and for many images. Results go to benchmarks/results/generate.json and, as text, to
benchmarks/results/generate.md. Models that would need a download have random weights, which cost the same time.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clcnet import cli
from clcnet.memory import keep_freed_memory

if __name__ == "__main__":
    cli.leave_cores_to_decoders()  # as step 3 does
    keep_freed_memory()

import numpy as np
import timm
import torch
from timm.models import save_for_hf

from benchmarks.measured import SHARED, in_fresh_process, keep, kept, machine, num_cores, peak_mebibytes
from benchmarks.one_loop import LOOPS, make_table
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.data.images import list_images
from clcnet.distributed import resolve_device
from clcnet.report.tables import markdown

TURNS = 5


def untrained(name: str, scratch: Path, **arguments: Any) -> str:
    """Save a timm architecture with random weights; return the name under which it loads."""
    folder = scratch / name
    if not folder.exists():
        torch.manual_seed(0)
        save_for_hf(timm.create_model(name, **arguments), folder, safe_serialization=True)
    return f"local-dir:{folder}"


def photographs(scratch: Path, count: int) -> Path:
    """The sample of ImageNet's photographs over and over, in one class folder."""
    folder = scratch / f"{count} photographs" / "n01440764"
    if not folder.exists():
        folder.mkdir(parents=True)
        paths = sorted((SHARED / "imagenet_sample").glob("*.JPEG"))
        for number in range(count):
            (folder / f"{number}.JPEG").symlink_to(paths[number % len(paths)])
    return folder.parent


def images_per_second(
    loop: str, model: str, folder: Path, amp: str | None = None, batch_size: int = 64, workers: int = 2
) -> float:
    """Images a second of one run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.one_loop", loop, model, folder]
    command += ["--batch-size", batch_size, "--workers", workers, *(["--amp", amp] if amp else [])]
    run = subprocess.run(list(map(str, command)), cwd=cli.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout)


def measure_ratio(scratch: Path) -> list[dict[str, Any]]:
    """All loops, in turn, on small and on large images, in float32 and in mixed precision.

    So many images that each run takes seconds: starting the decoding processes would sway a shorter one.
    """
    cifar10 = SHARED / "cifar10" / "imagenet_splits_5"
    b0 = untrained("tf_efficientnet_b0", scratch)
    cases = [
        ("CIFAR-10 (10,000 at 32x32), test_resnet", f"local-dir:{SHARED / 'cifar10' / 'shallow'}", cifar10, None),
        ("photographs (200), tf_efficientnet_b0", b0, photographs(scratch, 200), None),
        ("photographs (200), tf_efficientnet_b0, bfloat16", b0, photographs(scratch, 200), "bfloat16"),
    ]
    results = []
    for title, model, folder, amp in cases:
        turns = []
        for turn in range(TURNS):
            loops = LOOPS if turn % 2 else LOOPS[::-1]
            turns.append({loop: images_per_second(loop, model, folder, amp) for loop in loops})
        medians = {loop: statistics.median(turn[loop] for turn in turns) for loop in LOOPS}
        results.append({"case": title, "medians": medians, "turns": turns})
        print(results[-1], flush=True)
    return results


def model_milliseconds(classifier: Classifier, batch_size: int = 1, seconds: float = 2.0) -> float:
    """Milliseconds an image of the model alone, on a batch that is there already."""
    batch = torch.rand(batch_size, *classifier.data_config["input_size"])
    for _ in range(2):  # sets up
        classifier.probabilities(batch).cpu()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        classifier.probabilities(batch).cpu()
        count += batch_size
    return 1000 * (time.perf_counter() - started) / count


def measure_options(scratch: Path) -> list[dict[str, Any]]:
    """Milliseconds an image of the model alone, with each option."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("float32", {}),
        ("--channels-last", {"channels_last": True}),
        ("--amp bfloat16", {"amp": "bfloat16"}),
        ("--compile", {"compile": True}),
    ]
    if resolve_device().type != "cpu":  # the rest would take minutes on a CPU
        options += [
            ("--amp float16", {"amp": "float16"}),
            ("--amp bfloat16 --channels-last", {"amp": "bfloat16", "channels_last": True}),
            ("--amp bfloat16 --channels-last --compile", {"amp": "bfloat16", "channels_last": True, "compile": True}),
        ]
    results = []
    for name in ("tf_efficientnet_b0", "resnet50"):
        model = untrained(name, scratch)
        for title, arguments in options:
            milliseconds = model_milliseconds(load_classifier(model, **arguments), batch_size=16, seconds=2)
            results.append({"model": name, "options": title, "milliseconds": milliseconds})
            print(results[-1], flush=True)
    return results


def measure_defaults(scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """The model alone by batch size; step 3 by number of workers."""
    b0 = untrained("tf_efficientnet_b0", scratch)
    classifier = load_classifier(b0)
    batches = [
        {"batch size": size, "milliseconds": model_milliseconds(classifier, batch_size=size, seconds=2)}
        for size in (1, 8, 32, 64)
    ]
    small = f"local-dir:{SHARED / 'cifar10' / 'shallow'}"
    part = SHARED / "cifar10" / "imagenet_splits_5" / "split_part_1"
    workers = [
        {
            "workers": count,
            "photographs": images_per_second("step3", b0, photographs(scratch, 200), workers=count),
            "cifar10": images_per_second("step3", small, part, workers=count),
        }
        for count in (0, 1, 2, 4)
    ]
    print(batches, workers, flush=True)
    return {"batches": batches, "workers": workers}


def measure_cost(scratch: Path) -> list[dict[str, Any]]:
    """Multiply-adds and time of B0 and B4 at their own sizes, one image at a time."""
    results = []
    for name in ("tf_efficientnet_b0", "tf_efficientnet_b4"):
        classifier = load_classifier(untrained(name, scratch))
        results.append(
            {"model": name, "flops": classifier.flops, "milliseconds": model_milliseconds(classifier, seconds=5)}
        )
        print(results[-1], flush=True)
    return results


def measure_memory(scratch: Path) -> list[dict[str, Any]]:
    """Peak memory of fresh processes that make a table with 1,000 columns, of few images and of many."""
    model = untrained("test_resnet", scratch, num_classes=1000)
    return [
        {
            "images": num_images,
            "peak MiB": in_fresh_process(_peak_memory, model, num_images),
            "table MiB": num_images * 4_000 / 2**20,
        }
        for num_images in (10_000, 40_000)
    ]


def _peak_memory(model: str, num_images: int) -> float:
    torch.set_num_threads(1)
    images = list_images(SHARED / "cifar10" / "imagenet_splits_5")
    images = images.subset(np.arange(num_images) % len(images))
    classifier = load_classifier(model, img_size=32)
    make_table(classifier, images, 64, 0)
    return peak_mebibytes()


PARTS: dict[str, Callable[[Path], Any]] = {
    "ratio": measure_ratio,
    "options": measure_options,
    "defaults": measure_defaults,
    "cost": measure_cost,
    "memory": measure_memory,
}


def as_text(results: dict[str, Any]) -> str:
    """The results as a section of the benchmarks' page."""
    sections = [f"## Step 3: images to table\n\nMeasured on {results['machine']}.\n"]
    if "ratio" in results:
        header = ["images and model", "bare timm loop, images/s", "step 3, images/s", "ratio", "to a loop set up alike"]
        rows = []
        for result in results["ratio"]:
            turns = result["turns"]
            speeds = [f"{result['medians'][name]:.0f}" for name in ("bare", "step3")]
            ratios = [
                f"{statistics.median(turn['step3'] / turn[name] for turn in turns):.3f}"
                for name in ("bare", "bare, set up")
            ]
            rows.append([result["case"], *speeds, *ratios])
        sections.append(
            f"{markdown(header, rows)}\n\nMedians of {len(turns)} turns, each run in a process of its own, batches of "
            "64, 2 workers, everything included from listing the folder to the finished CSV file. To stay at 0.97 or "
            "above. On a CPU step 3 has torch's threads sleep while they wait (OMP_WAIT_POLICY=PASSIVE), which leaves "
            "the cores to the processes that decode, and has glibc keep the memory of one layer's output for the "
            "next. Both help any loop: the last column is against a bare one that is set up alike.\n"
        )
    if "options" in results:
        first = {r["model"]: r["milliseconds"] for r in reversed(results["options"])}
        rows = [
            [r["model"], r["options"], f"{r['milliseconds']:.1f}", f"{first[r['model']] / r['milliseconds']:.2f} x"]
            for r in results["options"]
        ]
        sections.append(
            f"{markdown(['model', 'options', 'ms an image', 'speed'], rows)}\n\nThe model alone, batches of 16. None "
            "of the options is a default: each changes the last digits of the answers, and which of them helps depends "
            "on the machine.\n"
        )
    if "defaults" in results:
        batches, workers = results["defaults"]["batches"], results["defaults"]["workers"]
        rows = [[str(b["batch size"]), f"{b['milliseconds']:.1f}"] for b in batches]
        sections.append(markdown(["batch size (tf_efficientnet_b0)", "ms an image"], rows) + "\n")
        rows = [[str(w["workers"]), f"{w['photographs']:.1f}", f"{w['cifar10']:.0f}"] for w in workers]
        header = ["workers", "photographs, tf_efficientnet_b0, images/s", "CIFAR-10, test_resnet, images/s"]
        sections.append(markdown(header, rows) + "\n")
    if "cost" in results:
        rows = [[c["model"], f"{c['flops']:.2f}", f"{c['milliseconds']:.0f}"] for c in results["cost"]]
        header = ["model", "billion multiply-adds", "ms, one image at a time"]
        sections.append(markdown(header, rows) + "\n")
    if "memory" in results:
        said = [
            f"{m['peak MiB']:.0f} MiB for {m['images']:,} images ({m['table MiB']:.0f} MiB of numbers)"
            for m in results["memory"]
        ]
        sections.append(f"Peak memory of the main process with 1,000 classes:\n{' and '.join(said)}.\n")
    sections.append("Made by `python -m benchmarks.bench_generate`.\n")
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to measure")
    args = parser.parse_args()
    torch.set_num_threads(num_cores())
    gpu = torch.cuda.get_device_name() if resolve_device().type == "cuda" else ""
    with tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            results = kept("generate") | {"machine": machine(torch, timm, gpu=gpu), part: PARTS[part](Path(scratch))}
            keep("generate", results, as_text(results))


if __name__ == "__main__":
    main()
