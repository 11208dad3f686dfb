"""How long it takes to find the best cascade of several models, with everything cross-fitted, and in how much memory.

    python -m benchmarks.bench_search               # about a minute and a half on two idle cores

Outputs are simulated. Results go to benchmarks/results/search.json and, as text, to benchmarks/results/search.md.
"""

import time

import numpy as np

from benchmarks.measured import in_fresh_process, keep, num_cores, peak_mebibytes
from clcnet.cascade.search import find_cascades
from clcnet.data.outputs import Outputs

SIZES = {  # models, images, classes, stages, most seconds, most gigabytes
    "many models": (6, 10_000, 10, 4, 20, None),
    "many classes": (4, 50_000, 1000, 3, 180, 6),
}


def simulated(num_models: int, num_images: int, num_classes: int) -> list[Outputs]:
    """Models of rising cost and accuracy, which lean to some classes."""
    random = np.random.default_rng(0)
    targets = np.arange(num_images) % num_classes
    outputs = []
    for number in range(num_models):
        logits = random.standard_normal((num_images, num_classes), dtype=np.float32)
        strength = 1.2 + 0.3 * number + (2.0 if num_classes > 100 else 0.0)
        logits[np.arange(num_images), targets] += strength + 1.5 * random.standard_normal(num_images)
        logits *= 2
        logits += 0.5 * random.standard_normal(num_classes, dtype=np.float32)
        outputs.append(Outputs.from_logits(logits, targets=targets, model=str(number), flops=2.0**number))
    return outputs


def measure(name: str) -> dict[str, float]:
    """Seconds, of the clock and of the processors, and the highest memory of this process."""
    num_models, num_images, num_classes, stages, _, _ = SIZES[name]
    outputs, folds = simulated(num_models, num_images, num_classes), np.arange(num_images) // (num_images // 5)
    wall, busy = time.perf_counter(), time.process_time()
    cascades = find_cascades(outputs, folds, max_stages=stages)
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - busy,
        "gigabytes": peak_mebibytes() / 1024,
        "cascades_on_the_front": len(cascades.front),
    }


def as_text(results: dict[str, dict[str, float]]) -> str:
    """The results as a page."""
    rows = []
    for name, measured in results.items():
        num_models, num_images, num_classes, stages, seconds, gigabytes = SIZES[name]
        rows.append(
            f"| {num_models} | {num_images:,} | {num_classes:,} | {stages} | {measured['seconds']:.1f} ({seconds}) "
            f"| {measured['processor_seconds']:.1f} | {measured['gigabytes']:.1f} ({gigabytes or '-'}) |\n"
        )
    return f"""# Finding a cascade

Made by `python -m benchmarks.bench_search` on {num_cores()} cores; the bounds in brackets.
Everything is cross-fitted over five folds: weights, offsets, their penalty, models and thresholds.

| models | images | classes | stages | seconds | of the processors | GB at most, outputs included |
|---|---|---|---|---|---|---|
{"".join(rows)}"""


if __name__ == "__main__":
    found = {name: in_fresh_process(measure, name) for name in SIZES}  # whose memory is then its own
    keep("search", found, as_text(found))
