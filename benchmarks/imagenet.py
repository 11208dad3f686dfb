"""Real ImageNet classes: the table of section 6, the confidences at n = 1,000, and how long B0 to B7 will take.

    python -m benchmarks.imagenet outputs --imagenet1k ../shared/imagenet1k --tables data/imagenet/outputs
    python -m benchmarks.imagenet table --tables data/imagenet/outputs --weights weights/imagenet
    python -m benchmarks.imagenet ship --weights data/imagenet/weights
    python -m benchmarks.imagenet time

`make imagenet` calls the first two around the steps of README; `ship` copies its weights into weights/imagenet.
Each image is judged by the CLCNet that never saw its fold; the released ones come from ../shared/reference, and saw
1,300 of the images in another network's outputs. `time` is an estimate, from what benchmarks/results holds and timm
publishes. Results: benchmarks/results/imagenet.md and imagenet-time.md.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.ablation_1000 import Photographs
from benchmarks.fused import imagenet_outputs
from benchmarks.measured import RESULTS, SHARED, kept
from clcnet import CLCNet, cli, metrics
from clcnet.cascade.evaluation import Evaluation, evaluation_of_tables, images_of_outputs, load_fold_networks
from clcnet.cascade.rules import Surest, cross_fitted
from clcnet.cascade.search import Found, find_cascades
from clcnet.cascade.selection import Goal, Reference
from clcnet.confidence import CLCNET, margin, max_softmax
from clcnet.data.outputs import load_labelled
from clcnet.network.weights import SPLIT_FILE
from clcnet.report import tables
from clcnet.report.tables import (
    COLUMNS,
    TEXTS,
    accuracy_interval,
    cascade_name,
    distinct_names,
    merge_frames,
    results_frame,
    with_interval,
)

RELEASED = SHARED / "reference"
PAIRS = (("mobilenetv1_050_160", "tf_efficientnet_lite0"), ("tf_efficientnet_lite0", "tf_efficientnet_lite2"))
NUM_IMAGES = 50_000  # of the ImageNet validation set


def save_outputs(folder: Path, target: Path) -> None:
    """Write the seven networks' outputs as tables of step 3."""
    target.mkdir(parents=True, exist_ok=True)
    for name, outputs in imagenet_outputs(folder)[0].items():
        outputs.save(target / f"{name}.parquet")
        print(f"{target / name}.parquet: {len(outputs)} images, {outputs.accuracy:.2f}%")


def ship(weights: Path, target: Path) -> None:
    """Copy the networks, and the list of folds with one line an image instead of one an image and network."""
    for path in weights.glob("CLCNet_*.zip"):
        shutil.copy(path, target)
    rows = pd.read_csv(weights / SPLIT_FILE, dtype=str, usecols=["file", "fold", "run"])
    tables.write_csv(rows.drop_duplicates("file"), target / SPLIT_FILE)


def evaluation(folder: Path, weights: Path) -> Evaluation:
    """The seven networks, cheapest first, judged by the five CLCNets."""
    paths = sorted(folder.glob("*.parquet"))
    outputs = load_labelled(*paths)
    images, trained = images_of_outputs(outputs[0], paths[0], weights)
    assert trained, f"{weights} was trained on other images"
    return evaluation_of_tables(outputs, paths, images, load_fold_networks(weights, images))


def released_networks() -> list[CLCNet]:
    return [CLCNet.load(path) for path in sorted(RELEASED.glob("CLCNet_imagenet_split_*.zip"))]


def paper_rows(found: Evaluation) -> Iterator[pd.DataFrame]:
    """The paper's rule with each confidence: the cheaper pair against models up to its deep one, then the dearer."""
    singles = singles_of(found)
    released = released_networks()[:1]
    kinds = {"CLCNet": found.outputs, "max softmax": [replace(each, scores={}) for each in found.outputs]}
    if released:
        judged = [replace(each, scores={CLCNET: released[0].predict(each.sorted_probs)}) for each in found.outputs]
        kinds["released CLCNet"] = judged
    lowest = 0.0
    for pair in PAIRS:
        for kind, outputs in kinds.items():
            two = [outputs[found.models.index(name)] for name in pair]
            steps = cross_fitted(Surest("max softmax" if kind == "max softmax" else CLCNET), two, found.folds)
            highest = float(steps.flops[-1])
            rivals = [single for single in singles if lowest < single.flops <= highest]
            rows = results_frame(steps, pair, found.folds, rivals, confidence=kind)
            yield rows[rows["reference"].isin([rival.name for rival in rivals])]
        lowest = highest


def singles_of(found: Evaluation) -> list[Reference]:
    names = distinct_names(found.models)
    return [
        Reference(name, each.accuracy, float(each.record.flops or 0))
        for name, each in zip(names, found.outputs, strict=True)
    ]


def fused_rows(found: Evaluation) -> pd.DataFrame:
    """The cheapest fused cascade at each model's accuracy, and the most accurate at its cost."""
    singles = singles_of(found)[1:]
    goals = [goal for each in singles for goal in (Goal("flops", each.flops), Goal("accuracy", each.accuracy))]
    cascades = find_cascades(found.outputs, found.folds, goals, max_stages=3)
    rows = []
    for number, each in enumerate(cascades.goals):
        single, same = singles[number // 2], ("flops", "accuracy")[number % 2]
        if len(each.choice.chain) > 1:
            rows.append(fused_row(each, single, same, [found.models[model] for model in each.choice.chain]))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({name: float for name in COLUMNS if name not in TEXTS})


def fused_row(found: Found, single: Reference, same: str, models: Sequence[str]) -> dict[str, Any]:
    fitted = found.cross_fitted
    names = {"model": cascade_name(models, "fused"), "reference": single.name, "same": same}
    figures = {"FLOPs": found.choice.cost, "threshold": found.choice.thresholds[0]}
    return (
        names
        | figures
        | with_interval(
            "accuracy", found.choice.accuracy, accuracy_interval(found.choice.accuracy, len(fitted.correct))
        )
        | with_interval("gain", fitted.accuracy - single.accuracy, None)
        | with_interval("saving", *fitted.saving(single.flops))
        | with_interval("cross_fitted_accuracy", fitted.accuracy, fitted.accuracy_interval)
        | {"cross_fitted_FLOPs": float(fitted.costs[0])}
    )


def confidence_lines(found: Evaluation) -> Iterator[str]:
    """How well each confidence tells right from wrong, network by network, and the mean."""
    data = Photographs(dict(zip(found.models, found.outputs, strict=True)), found.folds)
    kinds = {
        "max softmax": data.by_image(max_softmax(data.probs)),
        "margin": data.by_image(margin(data.probs)),
        "ours": np.stack([each.scores[CLCNET] for each in found.outputs]),
    }
    for number, network in enumerate(released_networks(), start=1):
        kinds[f"released {number}"] = data.by_image(network.predict(data.probs))
    right = data.by_image(data.correct)
    yield "| network | " + " | ".join(f"AUROC, {kind}" for kind in kinds) + " | ours over the better of two |"
    yield "|---" * (len(kinds) + 2) + "|"
    for k, name in enumerate(distinct_names(found.models)):
        cells = [f"{metrics.auroc(scores[k], right[k]):.4f}" for scores in kinds.values()]
        yield f"| {name} | {' | '.join(cells)} | {data.gain(kinds['ours'], [k])} |"
    means = [f"{data.aurocs(scores).mean():.4f}" for scores in kinds.values()]
    yield f"| mean | {' | '.join(means)} | {data.gain(kinds['ours'])} |"
    real = np.array([name.startswith("ILSVRC") for name in found.outputs[0].names])
    for name, part in (("ImageNet validation", real), ("other photographs", ~real)):
        there = [scores[:, part] for scores in kinds.values()]
        yield f"| mean, {part.sum():,} of {name} | {means_of(metrics.auroc, there, right[:, part])} | |"
        cells = means_of(lambda s, r: r.mean() - s.mean(), there, right[:, part])
        yield f"| share right less confidence, there | {cells} | |"
    yield f"| mean AURC | {means_of(metrics.aurc, list(kinds.values()), right)} | |"
    yield f"| mean calibration error | {means_of(metrics.calibration_error, list(kinds.values()), right)} | |"


def means_of(figure: Callable[..., float], kinds: Sequence[np.ndarray], right: np.ndarray) -> str:
    """Cells of a figure's means over the networks; a dash where it is undefined."""
    means = [np.mean([figure(*pair) for pair in zip(scores, right, strict=True)]) for scores in kinds]
    return " | ".join("-" if np.isnan(one) else f"{one:.4f}" for one in means)


def time_lines() -> Iterator[str]:
    """An estimate of step 3 over the 50,000 images, by model."""
    counted, generate = kept("cascade")["flops"], kept("generate")
    published = json.loads((RESULTS.parent / "quoted.json").read_text())["timm_throughput"]
    (rate,) = (case["medians"]["step3"] for case in generate["ratio"] if case["case"].endswith("tf_efficientnet_b0"))
    base = counted[0]["counted"]
    yield f"Estimated, not measured: step 3 over {NUM_IMAGES:,} images."
    yield f"CPU: {rate:.0f} images/s measured of B0 on {generate['machine']}; others by multiply-adds."
    yield f"GPU: {published['source']}; decoding not included."
    yield ""
    yield "| model | billion multiply-adds | CPU, hours | GPU, minutes |"
    yield "|---|---|---|---|"
    for each in counted[: len(published["images_per_second"])]:
        hours = NUM_IMAGES / rate * each["counted"] / base / 3600
        minutes = NUM_IMAGES / published["images_per_second"][each["model"]] / 60
        yield f"| {each['model']} | {each['counted']:.2f} | {hours:.1f} | {minutes:.1f} |"


def main(args: argparse.Namespace) -> dict[str, str]:
    if args.what == "outputs":
        save_outputs(args.imagenet1k, args.tables)
        return {}
    if args.what == "ship":
        ship(args.weights, cli.WEIGHTS_DIR / "imagenet")
        return {}
    if args.what == "time":
        path, text = RESULTS / "imagenet-time.md", "\n".join(time_lines())
    else:
        found = evaluation(args.tables, args.weights)
        rows = merge_frames([*paper_rows(found), fused_rows(found)])
        path = RESULTS / "imagenet.md"
        text = "\n".join([tables.results_markdown(rows), "", *confidence_lines(found)])
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nresults in {path}")
    return {"text": text}


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("outputs", "table", "ship", "time"))
    parser.add_argument("--imagenet1k", type=Path, default=SHARED / "imagenet1k", metavar="FOLDER")
    parser.add_argument("--tables", type=Path, default=cli.DATA_DIR / "imagenet" / "outputs", metavar="FOLDER")
    parser.add_argument("--weights", type=Path, default=cli.WEIGHTS_DIR / "imagenet", metavar="FOLDER")
    return parser


if __name__ == "__main__":
    cli.run(main, get_args_parser())
