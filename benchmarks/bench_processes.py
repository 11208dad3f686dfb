"""Steps 3 and 5 by one process and by two: images a second, and the same bytes? On a GPU against timm's loop besides.

    python -m benchmarks.bench_processes --before ../old     # a checkout to compare with, in turn
    make gpu                                                 # where there is a GPU: writes results/gpu.json

On a CPU one process has two threads and two have one each; on GPUs each process has one, or they share the only one.
Models have random weights, which cost the same time: EfficientNet-B0, and at a threshold that defers 30% of the images
ResNet-50, on photographs over and over. Without a GPU the figures go to benchmarks/results/processes.json.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from benchmarks.bench_generate import images_per_second, photographs, untrained
from benchmarks.measured import keep, machine, num_cores
from clcnet import CLCNet, cli
from clcnet.data.outputs import Outputs
from clcnet.report.tables import markdown

DEFERRED = 0.3
STEPS = {"step 3": "generate_data_for_CLCNet.py", "step 5": "eval_custom_data.py"}


def run(tree: Path, step: str, words: list[str], num_processes: int, device: str) -> float:
    """Images a second of a step, as it prints them."""
    threads = max(1, num_cores() // num_processes) if device == "cpu" else 4
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    words = [*words, "--device", device, *(["--batch-size", "32"] if device == "cpu" else [])]  # enough for two
    command = [sys.executable, *(start if num_processes > 1 else []), STEPS[step], *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(re.findall(r"([\d.]+) images/s", done.stdout)[-1])


def measure(trees: dict[str, Path], device: str, num_images: int, turns: int) -> dict[str, Any]:
    """By tree, step and number of processes: images a second, medians of the turns; whether the bytes are the same."""
    speeds: dict[str, Any] = {tree: {step: {1: [], 2: []} for step in STEPS} for tree in trees}
    same = dict.fromkeys(trees, True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shallow, deep = (untrained(model, scratch) for model in ("tf_efficientnet_b0", "resnet50"))
        images = photographs(scratch, num_images)
        torch.manual_seed(0)
        network, weight, threshold = CLCNet(num_classes=1000).eval(), scratch / "clcnet.zip", 0.0
        network.save(weight)
        for turn in range(turns + 1):  # the first sets up
            for tree, folder in trees.items():
                outputs: dict[str, list[bytes]] = {step: [] for step in STEPS}
                for count in (1, 2) if turn % 2 else (2, 1):
                    out = scratch / "out.csv"
                    keeps = (folder / "clcnet" / "data" / "store.py").exists()  # version 1 kept nothing
                    stores = [["--store", f"{scratch}/{step} {tree} {turn} {count}"] if keeps else [] for step in STEPS]
                    words = ["--data-path", str(images), "--model", shallow, "--output", str(out), *stores[0]]
                    found = {"step 3": run(folder, "step 3", words, count, device)}
                    outputs["step 3"].append(out.read_bytes())
                    threshold = threshold or float(
                        np.quantile(network.predict(Outputs.load(out).sorted_probs), DEFERRED)
                    )
                    words = ["--custom-data", str(images), "--shallow-model", shallow, "--deep-model", deep]
                    words += ["--weight", str(weight), "--threshold", str(threshold), "--result", str(out)]
                    found["step 5"] = run(folder, "step 5", [*words, *stores[1]], count, device)
                    outputs["step 5"].append(out.read_bytes())
                    for step, speed in found.items():
                        speeds[tree][step][count] += [speed] if turn else []
                same[tree] &= all(one == two for one, two in outputs.values())
                print(tree, turn, speeds[tree], same[tree], flush=True)
        result = {"images": num_images, "images/s": _medians(speeds)}
        if device != "cpu":  # there the number of threads, which differs, may sway the last bit
            result["same bytes"] = same
            result["of timm's loop"] = _against_timm(shallow, images)
    return result


def _medians(speeds: Any) -> Any:
    if isinstance(speeds, list):
        return statistics.median(speeds)
    return {str(key): _medians(value) for key, value in speeds.items()}


def _against_timm(model: str, images: Path) -> dict[str, float]:
    """Step 3 over the same loop as timm's validate.py, with the same workers; and the share of time the GPU is busy."""
    workers = max(1, num_cores() - 1)
    found = {loop: images_per_second(loop, model, images, None, 256, workers) for loop in ("bare", "step3")}
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        images_per_second("step3", model, images, None, 256, workers)
        watch.terminate()
        busy = [float(line) for line in watch.communicate()[0].split()]
    working = np.flatnonzero(busy)  # without loading and ending
    busy = busy[working[0] : working[-1] + 1] if len(working) else [0.0]
    return {**found, "ratio": found["step3"] / found["bare"], "GPU busy": statistics.mean(busy) / 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--images", type=int, help="(default: 200 on a CPU, 20,000 on a GPU)")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trees = {"before": args.before} if args.before else {}
    num_images = args.images or (200 if device == "cpu" else 20_000)
    where = machine(torch, timm, gpu=torch.cuda.get_device_name() if device == "cuda" else "")
    result = {"machine": where} | measure(trees | {"now": cli.ROOT}, device, num_images, args.turns)
    keep("processes" if device == "cpu" else "gpu", result, page(result) if device == "cpu" else "")


def page(result: dict[str, Any]) -> str:
    """The images a second as a table, of one process and of two."""
    speeds = (
        (tree, step, *found.values()) for tree, steps in result["images/s"].items() for step, found in steps.items()
    )
    rows = [[step, tree, f"{one:.1f}", f"{two:.1f}", f"{two / one:.2f}"] for tree, step, one, two in speeds]
    table = markdown(["", "", "one process", "two", "two over one"], rows)
    return f"{table}\n\nImages a second of {result['images']} photographs, on {result['machine']}.\n"


if __name__ == "__main__":
    main()
