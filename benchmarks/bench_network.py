"""How fast are scoring and training, against the bare matrix product and the literal O(n^2) network?

    python -m benchmarks.bench_network        # about one minute on two idle cores

All times come from one run with two threads, best of several turns, since what else runs can only slow a turn down; the
ratios are what counts. Needs about 9 GB of free memory: the literal network holds the (1024, 1000, 1000) attention that
the released one holds. Results: benchmarks/results/network.json and, as text, benchmarks/results/network.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measured import RESULTS, keep, kept, machine, peak_mebibytes, seconds_of
from clcnet import cli
from clcnet.network.calibration import Calibration
from clcnet.network.model import CLCNet, to_released_state
from clcnet.network.training import Settings, Split, _Run

sys.path.insert(0, str(cli.ROOT / "tests"))
from literal_clcnet import LiteralCLCNet  # noqa: E402

NUM_ROWS, NUM_CLASSES, LITERAL_ROWS = 50_000, 1000, 1024


def best_time(action: Callable[[], object], turns: int) -> float:
    """Seconds of the quickest turn, after one to warm up."""
    return min(seconds_of(action, turns))


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
    before = peak_mebibytes()
    model.predict(rows)
    memory = peak_mebibytes() - before
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
    parts, ablation = ["# The network"], RESULTS / "ablation.md"
    if speed := kept("network"):
        parts.append(_speed_page(speed))
    if ablation.exists():
        parts.append("## What each part of the recipe is worth\n\n" + ablation.read_text(encoding="utf-8").strip())
    if stability := kept("stability"):
        parts.append(_stability_page(stability))
    (RESULTS / "network.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


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
    scoring = measure_scoring(args.turns)
    one, five = measure_training(1, args.turns), measure_training(5, args.turns)
    training = {"epoch_seconds": one, "epoch_seconds_of_five": five, "five_over_one": five / one}
    results = {"machine": machine(torch), "scoring": scoring, "training": training}
    keep("network", results)
    write_page()
    return results


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--turns", type=cli.positive_int, default=5, metavar="N", help="turns, of which the best counts"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
