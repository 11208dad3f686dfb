"""How fast are scoring and training, against the bare matrix product and the literal O(n^2) network?

    python -m benchmarks.bench_network        # about one minute on two idle cores

All times come from one run with two threads, best of several turns, since what else runs can only slow a turn down; the
ratios are what counts. Needs about 9 GB of free memory: the literal network holds the (1024, 1000, 1000) attention that
the released one holds. Results: benchmarks/results/network.json and, as text, benchmarks/results/network.md.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clcnet import cli
from clcnet.network.calibration import Calibration
from clcnet.network.model import CLCNet, to_released_state
from clcnet.network.training import Settings, Split, _Run

sys.path.insert(0, str(cli.ROOT / "tests"))
from literal_clcnet import LiteralCLCNet  # noqa: E402

RESULTS = cli.ROOT / "benchmarks" / "results" / "network.json"
ABLATION = cli.ROOT / "benchmarks" / "results" / "ablation.md"
STABILITY = cli.ROOT / "benchmarks" / "results" / "stability.json"
TEXT = cli.ROOT / "benchmarks" / "results" / "network.md"
NUM_ROWS, NUM_CLASSES, LITERAL_ROWS = 50_000, 1000, 1024


def best_time(action: Callable[[], object], turns: int) -> float:
    """Seconds of the quickest turn, after one to warm up."""
    action()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def made_rows(num_rows: int) -> np.ndarray:
    """Sorted softmax outputs, (num_rows, NUM_CLASSES) float32, made in place."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((num_rows, NUM_CLASSES), dtype=np.float32)
    rows *= 2
    rows[:, 0] += generator.exponential(6, num_rows)
    np.exp(rows, out=rows)
    rows /= rows.sum(axis=1, keepdims=True)
    rows *= -1
    rows.sort(axis=1)
    rows *= -1
    return rows


def measure_scoring(turns: int) -> dict[str, float]:
    """Scoring all rows, with and without calibration, the bare product, and the literal network."""
    rows = made_rows(NUM_ROWS)
    model = CLCNet(NUM_CLASSES).eval()
    matrix, tensor = torch.randn(NUM_CLASSES, 100), torch.from_numpy(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.predict(rows)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    product = best_time(lambda: tensor @ matrix, turns)
    raw = best_time(lambda: model.predict(rows), turns)
    model.calibration = Calibration(0.0, (1.0, 0.1, 0.1), 0.5)
    calibrated = best_time(lambda: model.predict(rows), turns)
    literal_network = LiteralCLCNet(to_released_state(model))
    with torch.inference_mode():
        start = time.perf_counter()
        literal_network(tensor[:LITERAL_ROWS])
        literal = time.perf_counter() - start
    return {
        "product_seconds": product,
        "raw_seconds": raw,
        "calibrated_seconds": calibrated,
        "raw_over_product": raw / product,
        "calibrated_over_product": calibrated / product,
        "extra_memory_mb": memory,
        "literal_rows_a_second": LITERAL_ROWS / literal,
        "rows_a_second": NUM_ROWS / raw,
        "times_literal": (NUM_ROWS / raw) / (LITERAL_ROWS / literal),
    }


def measure_training(num_networks: int, turns: int) -> float:
    """Seconds an epoch of 32,000 rows a network, batch 256, n = 1000, evaluation apart."""
    rows = made_rows(4000)
    correct = np.random.default_rng(1).random(len(rows)) < rows[:, 0]
    split = Split(np.arange(3200), np.arange(3200, 4000), np.arange(0))
    run = _Run(rows, correct, [split] * num_networks, Settings(), torch.device("cpu"))
    return best_time(run.train_epoch, turns) * 32_000 / (run.steps_per_epoch * 256)


def write_page() -> None:
    """Write the page from the results that there are of this benchmark and of those of the training."""
    parts = ["# The network"]
    if RESULTS.exists():
        parts.append(_speed_page(json.loads(RESULTS.read_text(encoding="utf-8"))))
    if ABLATION.exists():
        parts.append("## What each part of the recipe is worth\n\n" + ABLATION.read_text(encoding="utf-8").strip())
    if STABILITY.exists():
        parts.append(_stability_page(json.loads(STABILITY.read_text(encoding="utf-8"))))
    TEXT.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _speed_page(results: dict[str, Any]) -> str:
    scoring, training = results["scoring"], results["training"]
    return f"""Made by `python -m benchmarks.bench_network` on {results["machine"]}.

| {NUM_ROWS:,} rows, n = {NUM_CLASSES:,} | measured | wanted |
|---|---|---|
| scoring, over the product with a {NUM_CLASSES} x 100 matrix | {scoring["raw_over_product"]:.2f} | at most 3 |
| the same with calibration | {scoring["calibrated_over_product"]:.2f} | |
| rows a second, over the literal network's (batch {LITERAL_ROWS}) | {scoring["times_literal"]:,.0f} | at least 1,000 |
| peak memory beside the input, MB | {scoring["extra_memory_mb"]:.0f} | at most 200 |
| seconds a training epoch of 32,000 rows | {training["epoch_seconds"]:.2f} | at most 1.0 |
| seconds the same of five networks at once | {training["epoch_seconds_of_five"]:.2f} | |"""


def _stability_page(results: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "## Stability\n",
        "Validation MSE from the fifth epoch on over the best of the same training, the worst epoch of five folds "
        "(`python -m benchmarks.stability`; at most 1.3 is wanted of the default recipe):\n",
        "| recipe | " + " | ".join(f"seed {seed}" for seed in next(iter(results.values()))) + " |",
        "|---" * (1 + len(next(iter(results.values())))) + "|",
    ]
    for recipe, by_seed in results.items():
        lines.append(f"| {recipe} | " + " | ".join(f"{max(ratios):.2f}" for ratios in by_seed.values()) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(2)
    results: dict[str, Any] = {"machine": f"{platform.machine()}, 2 threads, torch {torch.__version__}"}
    results["scoring"] = measure_scoring(args.turns)
    one, five = measure_training(1, args.turns), measure_training(5, args.turns)
    results["training"] = {"epoch_seconds": one, "epoch_seconds_of_five": five, "five_over_one": five / one}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    scoring = results["scoring"]
    print(
        f"scoring {NUM_ROWS} x {NUM_CLASSES}: {scoring['raw_seconds']:.2f} s, "
        f"{scoring['raw_over_product']:.2f} times the bare product "
        f"({scoring['calibrated_over_product']:.2f} with calibration), {scoring['extra_memory_mb']:.0f} MB beside the "
        f"input, {scoring['times_literal']:.0f} times as many rows a second as the literal network"
    )
    print(f"training 32,000 x {NUM_CLASSES}: {one:.2f} s an epoch, {five:.2f} s for five networks at once")
    write_page()
    print(f"results in {RESULTS} and {TEXT}")
    return results


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--turns", type=cli.positive_int, default=5, metavar="N", help="turns, of which the best counts"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
