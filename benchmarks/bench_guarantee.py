"""How often a promise about a cascade is broken, and what it takes to keep one.

    python -m benchmarks.bench_guarantee               # about a minute

The 10,000 images of ../shared/cifar10/logits.npz stand for all images there are, so that what a threshold loses is
known exactly: it is chosen on a random part of them, a resplit, and lost on all. On the boundary images are drawn anew.
Results go to benchmarks/results/guarantee.json and, as text, to benchmarks/results/guarantee.md.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from benchmarks.measured import SHARED, keep
from clcnet.cascade.guarantee import loses_less, most_share
from clcnet.intervals import exact_interval

LOGITS = SHARED / "cifar10" / "logits.npz"

NUM_RUNS = 1000
EPS, DELTA = 0.005, 0.05
DISAGREE = 0.02  # of the images each model loses to the other
AT_ONCE = 100  # runs
Differences = NDArray[np.int8]  # (R, N): deep right less cascade right
METHODS = {
    "read off": lambda differences: differences.mean(axis=-1) <= EPS,
    "Clopper-Pearson on the losses": lambda differences: losses_at_most(differences, EPS),
    "certified": lambda differences: loses_less(differences, EPS, DELTA),
}


def losses_at_most(differences: Differences, eps: float) -> NDArray[np.bool_]:
    """Whether the images that the cascade loses are few for certain; those that it wins do not count."""
    return np.asarray(most_share((differences > 0).sum(axis=-1), differences.shape[-1], DELTA) <= eps)


def walk(by_threshold: list[Any], method: str, num_runs: int) -> NDArray[np.int64]:
    """How many thresholds each run takes: up to the first failure, or, where it is read off, the last success."""
    taken, alive = np.zeros(num_runs, dtype=np.int64), np.ones(num_runs, dtype=bool)
    for number, differences in enumerate(by_threshold, start=1):
        runs = np.flatnonzero(alive)
        good = METHODS[method](differences(runs))
        taken[runs[good]] = number
        if method != "read off":
            alive[runs[~good]] = False
        if not alive.any():
            break
    return taken


def summary(broken: int, runs: int) -> dict[str, float]:
    """Violations in percent with their binomial 95% interval."""
    low, high = exact_interval(broken, runs)
    return {"violations": 100 * broken / runs, "low": float(low), "high": float(high)}


def cifar(num_images: int) -> dict[str, dict[str, float]]:
    """resnet20 -> resnet56 by max softmax, the deep answer kept; 50 thresholds from "defer all" to "defer none"."""
    file = np.load(LOGITS)
    shallow, deep = (file[name].astype(np.float64) for name in ("resnet20", "resnet56"))
    confidence = softmax(shallow, axis=1).max(axis=1)
    gains = (deep.argmax(1) == file["targets"]).astype(np.int8) - (shallow.argmax(1) == file["targets"])
    thresholds = np.append(np.inf, np.quantile(confidence, np.arange(49, -1, -1) / 50))
    truth = np.array([(gains * (confidence >= threshold)).mean() for threshold in thresholds])
    deferral = np.array([(confidence < threshold).mean() for threshold in thresholds])
    random, taken = np.random.default_rng(0), {method: [] for method in METHODS}
    for _ in range(NUM_RUNS // AT_ONCE):
        drawn = random.permuted(np.tile(np.arange(len(gains)), (AT_ONCE, 1)), axis=1)[:, :num_images]
        gain, sure = gains[drawn], confidence[drawn].astype(np.float64)
        by_threshold = [lambda runs, t=t, g=gain, s=sure: g[runs] * (s[runs] >= t) for t in thresholds]
        for method, chosen in taken.items():
            chosen.append(walk(by_threshold, method, AT_ONCE))
    found = {}
    for method, chosen in taken.items():
        places = np.concatenate(chosen)
        last = np.maximum(places - 1, 0)
        broken = int(((truth[last] > EPS) & (places > 0)).sum())
        found[method] = summary(broken, NUM_RUNS) | {"deferral": 100 * float(deferral[last].mean())}
    return found


def drawn_differences(random: np.random.Generator, shape: tuple[int, int], loss: float) -> Differences:
    """Images of which 2% are won and 2% + `loss` are lost."""
    draws = random.random(shape, dtype=np.float32)
    return np.where(draws < DISAGREE + loss, 1, np.where(draws > 1 - DISAGREE, -1, 0)).astype(np.int8)


def boundary(num_images: int) -> dict[str, dict[str, float]]:
    """The second threshold loses exactly what is not to be lost: taking it breaks the promise."""
    random, broken = np.random.default_rng(1), dict.fromkeys(METHODS, 0)
    for _ in range(NUM_RUNS // AT_ONCE):
        differences = drawn_differences(random, (AT_ONCE, num_images), EPS)
        for method in METHODS:
            by_threshold = [
                lambda runs: np.zeros((len(runs), num_images), np.int8),
                lambda runs, d=differences: d[runs],
            ]
            broken[method] += int((walk(by_threshold, method, AT_ONCE) == 2).sum())
    return {method: summary(count, NUM_RUNS) for method, count in broken.items()}


def slack(num_images: int, runs: int = 100) -> dict[str, float]:
    """Points that are certified of a cascade that loses nothing on average: the median over samples."""
    differences = drawn_differences(np.random.default_rng(2), (runs, num_images), 0.0)
    low, high = np.zeros(runs), np.full(runs, 0.1)
    for _ in range(8):
        middle = (low + high) / 2
        certified = np.array([loses_less(row, eps, DELTA) for row, eps in zip(differences, middle, strict=True)])
        low, high = np.where(certified, low, middle), np.where(certified, middle, high)
    counted = most_share((differences > 0).sum(axis=1), num_images, DELTA)
    return {"certified": 100 * float(np.median(high)), "Clopper-Pearson on the losses": 100 * float(np.median(counted))}


def as_text(results: dict[str, Any]) -> str:
    """The results as a section of the benchmarks' page."""
    rows = "\n".join(
        f"| {case} | {method} | {found['violations']:.1f}% [{found['low']:.1f}, {found['high']:.1f}] "
        f"| {format(found['deferral'], '.1f') + '%' if 'deferral' in found else '-'} |"
        for case, methods in results["violations"].items()
        for method, found in methods.items()
    )
    slacks = "\n".join(
        f"| {int(size):,} | {found['certified']:.2f} | {found['Clopper-Pearson on the losses']:.2f} |"
        for size, found in results["slack"].items()
    )
    return f"""## Promises

Made by `python -m benchmarks.bench_guarantee`: {NUM_RUNS:,} resplits each, a loss of at most {100 * EPS:g} points
promised with probability {1 - DELTA:.0%}, so at most {DELTA:.0%} of the promises may be broken; 95% intervals in
brackets. Of CIFAR-10's 10,000 images so many choose the threshold, and all of them say whether the promise holds. On
the boundary the second threshold of drawn images loses exactly that much: taking it breaks the promise.

| images | threshold | promises broken | deferred |
|---|---|---|---|
{rows}

What is certified, in points, of a cascade that loses nothing on average where both models lose {DISAGREE:.0%} to the
other:

| images | certified | Clopper-Pearson on the losses |
|---|---|---|
{slacks}
"""


def main() -> None:
    """Measure and write both files."""
    violations = {f"CIFAR-10, {size:,}": cifar(size) for size in (2000, 5000)}
    violations |= {f"boundary, {size:,}": boundary(size) for size in (2000, 5000, 10_000)}
    sizes = (2000, 5000, 10_000, 50_000)
    results = {"violations": violations, "slack": {str(size): slack(size) for size in sizes}}
    keep("guarantee", results, as_text(results))


if __name__ == "__main__":
    main()
