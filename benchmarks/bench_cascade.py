"""How long it takes to know a cascade at every threshold, to say how sure that is, and to answer from the store.

    python -m benchmarks.bench_cascade               # about two minutes on two cores

Outputs are simulated: 50,000 images, 1,000 classes, as many as ImageNet's validation set. The sweep is compared with
the cascade's definition followed image by image, in time and in its answers. The counted multiply-adds of the eight
EfficientNets are compared with those that timm publishes. Results go to benchmarks/results/cascade.json and, as text,
to benchmarks/results/cascade.md.
"""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config

from benchmarks.measured import keep, seconds_of
from clcnet.cascade.comparison import compare
from clcnet.cascade.curve import Curve, Steps, surest_steps, sweep
from clcnet.cascade.evaluation import with_clcnet, with_rivals
from clcnet.cascade.rules import Surest, steps_of
from clcnet.cascade.selection import Goal
from clcnet.cascade.verdict import recommend
from clcnet.classifiers.flops import count_flops
from clcnet.confidence import CLCNET, max_softmax
from clcnet.data.outputs import Outputs, Record
from clcnet.network.model import CLCNet
from clcnet.report.tables import PAPER_REFERENCES, markdown, results_frame

NUM_IMAGES, NUM_CLASSES = 50_000, 1000
REPEATS = 5
# billions of multiply-adds, from timm's own tables of results, at the models' native sizes
PUBLISHED_FLOPS = dict(enumerate([0.40, 0.71, 1.02, 1.87, 4.49, 10.46, 19.40, 38.33]))
VIT, VIT_FLOPS = "vit_base_patch16_224", 17.56


def median_seconds(action: Callable[[], Any]) -> float:
    """Median over a few runs, the first one apart."""
    return statistics.median(seconds_of(action, REPEATS))


def simulated_outputs(accuracy: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) whose top class is mostly the image's, and the images' classes (N,)."""
    random = np.random.default_rng(seed)
    targets = np.arange(NUM_IMAGES) % NUM_CLASSES
    logits = random.standard_normal((NUM_IMAGES, NUM_CLASSES), dtype=np.float32)
    logits[np.arange(NUM_IMAGES), targets] += 3.24 + 1.5 * random.standard_normal(NUM_IMAGES) + 6 * (accuracy - 0.5)
    logits *= 2
    np.exp(logits, out=logits)
    return logits / logits.sum(1, keepdims=True), targets


def literal_point(
    confidence: np.ndarray, correct: np.ndarray, flops: np.ndarray, threshold: float
) -> tuple[float, float]:
    """The definition, one image after the other: accuracy in percent and FLOPs an image."""
    num_right, spent = 0, 0.0
    for image in range(confidence.shape[1]):
        answer = correct[0, image]
        spent += flops[0]
        if confidence[0, image] < threshold:
            spent += flops[1]
            if confidence[1, image] > confidence[0, image]:
                answer = correct[1, image]
        num_right += answer
    return 100 * num_right / confidence.shape[1], spent / confidence.shape[1]


def check_exact(confidence: np.ndarray, steps: Steps, curve: Curve) -> float:
    """Compare with the definition at ten thresholds; returns the seconds that the definition takes for one."""
    start = time.perf_counter()
    points = np.linspace(0, len(curve) - 1, 10).astype(int)
    for point in points:
        accuracy, flops = literal_point(confidence, steps.own, steps.flops, curve.thresholds[point])
        assert np.isclose(accuracy, curve.accuracy[point]) and np.isclose(flops, curve.flops[point])
    return (time.perf_counter() - start) / len(points)


def measure_sweeps() -> dict[str, float]:
    random = np.random.default_rng(0)
    confidence = random.random((3, NUM_IMAGES))
    correct = random.random((3, NUM_IMAGES)) < [[0.754], [0.82], [0.838]]
    flops = np.array([0.39, 4.2, 37.0])
    three, two = surest_steps(confidence, correct, flops), surest_steps(confidence[:2], correct[:2], flops[:2])
    curve = sweep(two)
    assert len(curve) == NUM_IMAGES + 1
    seconds, literal = median_seconds(lambda: sweep(two)), check_exact(confidence, two, curve)
    return {
        "sweep_milliseconds": 1000 * seconds,
        "three_models_milliseconds": 1000 * median_seconds(lambda: sweep(three)),
        "definition_seconds_a_threshold": literal,
        "times_faster_for_all_thresholds": literal * len(curve) / seconds,
    }


def measure_evaluation() -> dict[str, float]:
    """The steps of an evaluation whose model outputs are in the store, in seconds."""
    seconds: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = action()
        seconds[name] = time.perf_counter() - start
        return value

    folds = np.arange(NUM_IMAGES) // (NUM_IMAGES // 5)
    torch.manual_seed(0)
    networks = [CLCNet(NUM_CLASSES)] * 5
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        for number, accuracy in enumerate((0.75, 0.82)):
            probs, targets = simulated_outputs(accuracy, seed=number)
            np.save(Path(folder) / f"{number}.npy", probs)
        del probs

        def read(number: int) -> Outputs:
            record = Record(f"tf_efficientnet_b{4 * number}", flops=(0.39, 4.2)[number])
            return Outputs.from_probs(np.load(Path(folder) / f"{number}.npy"), targets=targets, record=record)

        outputs = timed("read and sort both models' outputs", lambda: [read(0), read(1)])
    timed("score both with CLCNet", lambda: [with_clcnet(out, folds, networks) for out in outputs])
    # an untrained network only takes the time of a trained one; its place in the cascade is taken by max softmax
    outputs = [replace(out, scores={CLCNET: max_softmax(out.sorted_probs)}) for out in outputs]
    steps = steps_of(Surest(CLCNET), outputs)
    timed("sweep and list 50,001 thresholds", lambda: sweep(steps))
    timed("compare with all other rules", lambda: compare([with_rivals(out, folds) for out in outputs], folds))
    models = [out.record.model for out in outputs]
    timed("results table with intervals", lambda: results_frame(steps, models, folds, PAPER_REFERENCES))
    timed("recommend a threshold", lambda: recommend(steps, folds, Goal("match")))
    return seconds | {"together": sum(seconds.values())}


def count_all_flops() -> list[dict[str, Any]]:
    names = {f"tf_efficientnet_b{size}": flops for size, flops in PUBLISHED_FLOPS.items()} | {VIT: VIT_FLOPS}
    rows = []
    for name, published in names.items():
        model = timm.create_model(name, pretrained=False).eval()
        counted = count_flops(model, resolve_model_data_config(model)["input_size"])
        rows.append({"model": name, "counted": counted, "published": published, "ratio": counted / published})
    return rows


def as_text(results: dict[str, Any]) -> str:
    """The results as a page."""
    sweeps, steps = results["sweeps"], results["evaluation_seconds"]
    flops = [
        [row["model"], f"{row['counted']:.3f}", f"{row['published']:.2f}", f"{row['ratio']:.3f}"]
        for row in results["flops"]
    ]
    return f"""# The cascade at every threshold

Made by `python -m benchmarks.bench_cascade` on {results["machine"]}, torch {results["torch"]}, two threads.

A sweep over {NUM_IMAGES:,} images gives accuracy, deferral and FLOPs at all {NUM_IMAGES + 1:,} thresholds that make a
difference in **{sweeps["sweep_milliseconds"]:.1f} ms** (three models: {sweeps["three_models_milliseconds"]:.1f} ms).
Following the definition image by image takes {sweeps["definition_seconds_a_threshold"]:.3f} s for one threshold: the
sweep is {sweeps["times_faster_for_all_thresholds"]:,.0f} times faster, with the same answers (checked at ten
thresholds here, at all of them for small cascades in the tests).

What an evaluation takes when both models' outputs are in the store, {NUM_IMAGES:,} images and {NUM_CLASSES:,} classes:

{markdown(["Step", "Seconds"], [[name, f"{value:.2f}"] for name, value in steps.items()])}

Multiply-adds in billions, counted by `classifiers.flops.count_flops` at the models' native sizes, and as timm publishes
them (attention included in the vision transformer's):

{markdown(["Model", "Counted", "Published", "Ratio"], flops)}
"""


def main() -> None:
    torch.set_num_threads(2)
    results = {
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sweeps": measure_sweeps(),
        "evaluation_seconds": measure_evaluation(),
        "flops": count_all_flops(),
    }
    keep("cascade", results, as_text(results))


if __name__ == "__main__":
    main()
