"""The five scripts against those of another checkout, as whole processes in turn: what they take of what they took.

    python -m benchmarks.against ../version-1

On CIFAR-10's 10,000 images, two timm classifiers and two public ResNets' tables in ../shared/cifar10. The figures go to
benchmarks/results/against.json and .md.
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import timm
import torch

from benchmarks.measured import SHARED, keep, machine
from clcnet import cli
from clcnet.report.tables import markdown

CIFAR10 = SHARED / "cifar10"
IMAGES, TABLE = CIFAR10 / "imagenet_splits_5", CIFAR10 / "resnet20.csv"
MODELS = ["--shallow-model", f"local-dir:{CIFAR10 / 'shallow'}", "--deep-model", f"local-dir:{CIFAR10 / 'deep'}"]
TABLES = ["--shallow-output", TABLE, "--shallow-model-FLOPs", 0.041, "--deep-output", CIFAR10 / "resnet56.csv"]
# each with the files of the ones before it; step 5 with one and the same weights, so that it defers the same images
SCRIPTS: dict[str, list[object]] = {
    "generate_data_for_CLCNet.py": ["--data-path", IMAGES, "--model", MODELS[1], "--output", "shallow.csv"],
    "train_imagenet_5fold_cv.py": ["--imagenet-split", IMAGES, "--cls-output", TABLE, "--weight-save", "weights"],
    "eval_imagenet_5fold_cv.py": [
        *("--threshold-searching", "--imagenet-split", IMAGES, *TABLES, "--deep-model-FLOPs", 0.126),
        *("--weight-save", "weights", "--performance-result", "performance-result.csv"),
    ],
    "train_custom_data.py": ["--cls-output", TABLE, "--weight-save", "weights"],
    "eval_custom_data.py": [
        *("--custom-data", IMAGES, "--threshold", 0.8, "--num_classes", 10, *MODELS),
        *("--weight", "../before/weights/CLCNet_custom_data.zip", "--result", "custom-data-result.csv"),
    ],
}
KEEPING = ("generate_data_for_CLCNet.py", "eval_custom_data.py")  # what models say, if the checkout can


def run(tree: Path, script: str, folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of all processors."""
    words = [*SCRIPTS[script], "--device", "cpu"]
    if script in KEEPING and (tree / "clcnet" / "data" / "store.py").exists():
        words += ["--store", f"store of {script}"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, str(tree / script), *map(str, words)]
    with open(folder / "printed.txt", "w", encoding="utf-8") as printed:
        subprocess.run(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(args: argparse.Namespace) -> None:
    trees = {"before": args.before.resolve(), "now": cli.ROOT}
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {name: {tree: [] for tree in trees} for name in SCRIPTS}
    for turn in range(args.turns):
        order = list(trees) if turn % 2 else list(trees)[::-1]
        with tempfile.TemporaryDirectory() as name:
            for tree in trees:
                os.mkdir(Path(name, tree))
            for script, tree in itertools.product(SCRIPTS, order):
                taken[script][tree].append(run(trees[tree], script, Path(name, tree)))
                print(turn, script, tree, *(f"{seconds:.1f} s" for seconds in taken[script][tree][-1]), flush=True)
    rows = []
    for script, of_trees in taken.items():
        (old, old_busy), (new, new_busy) = (map(median, zip(*seconds, strict=True)) for seconds in of_trees.values())
        rows.append([script, f"{old:.1f} s", f"{new:.1f} s", f"{new / old:.2f}", f"{new_busy / old_busy:.2f}"])
    table = markdown(["", "before", "now", "now over before", "of processor time"], rows)
    where = machine(torch, timm)
    note = f"Whole processes in turn, imports included; medians of {args.turns}, on {where}. To stay below 1.05."
    keep("against", {"machine": where, "seconds": taken}, f"{table}\n\n{note}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=5, help="(default: 5)")
    main(parser.parse_args())
