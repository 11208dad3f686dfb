"""Step 4: evaluate the cascade on ImageNet by five-fold cross-validation, at one threshold or at all of them.

    python eval_imagenet_5fold_cv.py --threshold-searching --shallow-model tf_efficientnet_b0.aa_in1k \\
        --deep-model tf_efficientnet_b4.aa_in1k

Input: the images (--imagenet-split) and two timm models, or the tables that step 3 made of them (--shallow-output,
--deep-output; then no model runs); and the five CLCNet weights (--weight-save). Each image is judged by the network
that was not trained on its fold. Each model sees an image at most once: its outputs are kept in a cache, and the next
call with other thresholds or other weights takes them from there.

Output: performance-result.csv, and in a folder beside it the results table (Markdown and CSV), the comparison with
other confidences, and the plots.

Exit codes: 0 done, 2 bad input, 3 done but some images could not be read and are left out, 130 interrupted.
"""

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clcnet import cli, report
from clcnet.cascade import Stage, sweep
from clcnet.evaluation import (
    SHALLOW_ALONE,
    ImageOutputs,
    Outputs,
    flops_of,
    fold_confidence,
    load_fold_networks,
    read_outputs,
)
from clcnet.files import check_output
from clcnet.images import ImageSet, list_images
from clcnet.paper_table import PAPER_REFERENCES, Reference, display_name, results_rows
from clcnet.selection import Goal, Recommendation, recommend

DEFAULT_MODELS = ("tf_efficientnet_b4.aa_in1k", "tf_efficientnet_b7.ra_in1k")
RELEASED_GRID = tuple(round(0.05 + 0.02 * step, 2) for step in range(49))  # 0.05, 0.07, ..., 1.01


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("models")
    for stage, default in zip(("shallow", "deep"), DEFAULT_MODELS, strict=True):
        add = group.add_argument
        add(f"--{stage}-model", metavar="NAME", help=f"timm model, local-dir:FOLDER or hf-hub:NAME (default: {default})")
        add(f"--{stage}-model-weight", type=Path, metavar="FILE", help=".pth, .pth.tar or .safetensors")
        add(
            f"--{stage}-model-FLOPs",
            type=cli.positive_float,
            metavar="BILLIONS",
            help="multiply-adds an image (default: counted)",
        )
        add(f"--{stage}-output", type=Path, metavar="FILE", help="its table from step 3, in place of running the model")
    group.add_argument("--num_classes", type=cli.number_of_classes, metavar="N", help="classes of the weight files")
    group.add_argument(
        "--weight-save",
        "--weight",
        dest="weight_save",
        type=Path,
        default=cli.WEIGHTS_DIR,
        metavar="FOLDER",
        help="the five CLCNet weights",
    )
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--imagenet-split", type=Path, default=cli.IMAGENET_SPLITS, metavar="FOLDER", help="five parts, or a plain folder")
    add("--class-map", type=Path, metavar="FILE", help="class folders in the models' order, one a line, as in timm")
    add("--cache", type=Path, default=cli.DATA_DIR / "cache", metavar="FOLDER", help="where model outputs are kept")
    group = parser.add_argument_group("thresholds")
    add = group.add_argument
    add("--threshold", type=cli.threshold, default=0.5, metavar="T", help="images with less confidence go to the deep model")
    add(
        "--threshold-searching",
        nargs="?",
        const=True,
        default=False,
        type=cli.true_or_false,
        metavar="True|False",
        help="evaluate all thresholds instead of one (default: False)",
    )
    add(
        "--thresholds",
        nargs="+",
        metavar="T",
        help="those listed in performance-result.csv: numbers, START:STOP:STEP, or all (default: 0.05:1.01:0.02)",
    )
    add("--target-accuracy", type=cli.positive_float, metavar="PERCENT", help="choose the cheapest threshold that reaches it")
    add("--target-FLOPs", type=cli.positive_float, metavar="BILLIONS", help="choose the most accurate one that costs no more")
    add("--match", choices=["deep"], help="choose the cheapest one as accurate as the deep model (the default goal)")
    add(
        "--reference",
        action="append",
        type=parse_references,
        default=[],
        metavar="NAME:ACCURACY:FLOPS",
        help="a single model for the results table; `paper` for the paper's eight; may be repeated",
    )
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--performance-result",
        type=Path,
        default=cli.ROOT / "performance-result.csv",
        metavar="FILE",
        help="accuracy and FLOPs at every threshold",
    )
    add("--results-folder", type=Path, metavar="FOLDER", help="tables and plots (default: results, beside the former)")
    cli.add_preprocessing_arguments(parser)
    cli.add_device_arguments(parser)
    return parser


def parse_references(text: str) -> list[Reference]:
    """`paper`, or `name:accuracy:FLOPs` with the accuracy in percent and the FLOPs in billions."""
    if text == "paper":
        return list(PAPER_REFERENCES)
    name, _, figures = text.partition(":")
    try:
        accuracy, flops = (float(figure) for figure in figures.split(":"))
        if not (name and 0 < accuracy <= 100 and 0 < flops < math.inf):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither `paper` nor NAME:PERCENT:BILLIONS") from None
    return [Reference(name, accuracy, flops)]


def parse_thresholds(words: list[str] | None) -> NDArray[np.float64] | None:
    """The grid of performance-result.csv; None for every threshold that makes a difference."""
    if words is None:
        return np.array(RELEASED_GRID)
    if words == ["all"]:
        return None
    grid: list[float] = []
    for word in words:
        try:
            numbers = [float(number) for number in word.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 3 and numbers[2] > 0 and all(map(math.isfinite, numbers)):
            start, stop, step = numbers
            grid += [round(start + step * index, 10) for index in range(int((stop - start) / step + 1e-9) + 1)]
        elif len(numbers) == 1 and not math.isnan(numbers[0]):
            grid += numbers
        else:
            raise ValueError(f"--thresholds: {word!r} is neither a number, nor START:STOP:STEP, nor all")
    if not grid:
        raise ValueError(f"--thresholds {' '.join(words)}: no threshold lies in this range")
    return np.unique(grid)


@dataclass
class Pair:
    """Both models over the same images. `deep` is None where nothing was deferred, partial where little was."""

    models: list[str]
    flops: list[float]
    stages: list[Stage]
    outputs: list[Outputs]
    folds: NDArray[np.int64]
    deep_complete: bool
    unreadable: dict[int, str]


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, write all files, print the report; returns its figures."""
    grid = parse_thresholds(args.thresholds)
    goal = parse_goal(args)
    searching = args.threshold_searching or args.thresholds is not None or args.match or goal.kind != "match"
    check_output(args.performance_result)
    folder = args.results_folder or args.performance_result.parent / "results"
    check_output(folder / "results-table.md")
    images = list_images(args.imagenet_split, class_map=args.class_map)
    pair = pair_from_tables(args, images) if args.shallow_output or args.deep_output else pair_from_images(args, images, searching)
    curve = sweep(pair.stages, grid if searching else [args.threshold])
    report.write_csv(report.performance_frame(curve), args.performance_result)
    if not searching:
        print(
            f"threshold {args.threshold:g}: accuracy {curve.accuracy[0]:.2f}%, {100 * curve.deferral[0]:.2f}% deferred, "
            f"{report.format_flops(curve.flops[0])} FLOPs an image"
        )
    outcome: dict[str, Any] = {
        "performance_result": args.performance_result,
        "num_images": len(pair.folds),
        "num_unreadable": len(pair.unreadable),
        "thresholds": curve.thresholds,
        "accuracy": curve.accuracy,
        "deferral": curve.deferral,
        "flops": curve.flops,
    }
    if pair.deep_complete:
        references = [reference for group in args.reference for reference in group]
        rows = results_rows(pair.stages, pair.models, pair.folds, references, args.seed)
        table = report.results_markdown(rows)
        report.write_text(table, folder / "results-table.md")
        report.write_csv(report.results_frame(rows), folder / "results-table.csv")
        recommendation = recommend(pair.stages, pair.folds, goal, args.seed)
        print(table)
        print(describe(recommendation, pair))
        outcome |= {"rows": rows, "recommendation": recommendation}
    print(f"results in {args.performance_result}; tables in {folder}")
    return outcome


def parse_goal(args: argparse.Namespace) -> Goal:
    goals = [
        goal
        for goal, given in (
            (Goal("match"), args.match),
            (Goal("accuracy", args.target_accuracy or math.nan), args.target_accuracy),
            (Goal("flops", args.target_FLOPs or math.nan), args.target_FLOPs),
        )
        if given
    ]
    if len(goals) > 1:
        raise ValueError("give one of --match, --target-accuracy and --target-FLOPs, not several")
    return goals[0] if goals else Goal("match")


def pair_from_tables(args: argparse.Namespace, images: ImageSet) -> Pair:
    """Take both models' outputs from their tables; no model runs and no image is opened."""
    for stage in ("shallow", "deep"):
        if not getattr(args, f"{stage}_output"):
            raise ValueError(f"--{stage}-output is missing: give the tables of both models, or of none")
    flops, names = [], []
    for stage in ("shallow", "deep"):
        model, given = getattr(args, f"{stage}_model"), getattr(args, f"{stage}_model_FLOPs")
        if given is None and model is None:
            raise ValueError(f"--{stage}-model-FLOPs is missing: give it, or --{stage}-model to have it counted")
        flops.append(given if given is not None else flops_of(model))
        names.append(model or getattr(args, f"{stage}_output").stem)
    outputs, folds = read_outputs(args.shallow_output, args.deep_output, images)
    networks = load_fold_networks(args.weight_save)
    stages = [
        Stage(fold_confidence(networks, output, folds), output.correct, cost)
        for output, cost in zip(outputs, flops, strict=True)
    ]
    return Pair(names, flops, stages, outputs, folds, True, {})


def pair_from_images(args: argparse.Namespace, images: ImageSet, searching: bool) -> Pair:
    """Run the shallow model on all images, and the deep one on all or, for a single threshold, on the deferred ones."""
    from clcnet.cache import OutputCache
    from clcnet.classifiers import load_classifier, resolve_device

    if not images.has_labels:
        raise ValueError(f"image folder {args.imagenet_split} has no class folders; accuracy needs them")
    alone = not searching and args.threshold <= SHALLOW_ALONE
    device = resolve_device(args.device)
    print(f"device: {device}")
    networks = None if alone else load_fold_networks(args.weight_save, device)
    options = {"batch_size": args.batch_size, "workers": args.workers}
    with contextlib.ExitStack() as stack:

        def open_model(stage: str, default: str) -> ImageOutputs:
            classifier = load_classifier(
                getattr(args, f"{stage}_model") or default,
                weight=getattr(args, f"{stage}_model_weight"),
                num_classes=args.num_classes,
                device=device,
                img_size=args.img_size,
                crop_pct=args.crop_pct,
                crop_mode=args.crop_mode,
                interpolation=args.interpolation,
                amp=args.amp,
                channels_last=args.channels_last,
                compile=args.compile,
            )
            print(f"{stage} model: {classifier.describe()}")
            cache = stack.enter_context(OutputCache.open(args.cache, classifier.key, images, classifier.num_classes))
            return ImageOutputs(classifier, images, cache)

        shallow = open_model("shallow", DEFAULT_MODELS[0])
        shallow.classify(np.arange(len(images)), "shallow", **options)
        seen = np.flatnonzero(shallow.cache.done)
        shallow_outputs = shallow.outputs(seen)
        folds = images.folds[seen]
        shallow_flops = args.shallow_model_FLOPs or shallow.classifier.flops
        unreadable = dict(shallow.unreadable)
        if alone:
            stages = [
                Stage(np.zeros(len(seen)), shallow_outputs.correct, shallow_flops),
                Stage(np.zeros(len(seen)), np.zeros(len(seen)), args.deep_model_FLOPs or 0.0),
            ]
            return Pair([shallow.classifier.name, "--"], [shallow_flops, 0.0], stages, [shallow_outputs], folds, False, unreadable)
        assert networks is not None
        confidence = fold_confidence(networks, shallow_outputs, folds)
        deep = open_model("deep", DEFAULT_MODELS[1])
        deferred = np.ones(len(seen), dtype=bool) if searching else confidence < args.threshold
        deep.classify(seen[deferred], "deep", **options)
        known = deep.cache.done[seen]
        deep_flops = args.deep_model_FLOPs or deep.classifier.flops
        deep_outputs = deep.outputs(seen[known])
        deep_confidence, deep_correct = np.full(len(seen), -np.inf), np.zeros(len(seen), dtype=bool)
        deep_confidence[known] = fold_confidence(networks, deep_outputs, folds[known])
        deep_correct[known] = deep_outputs.correct
        stages = [
            Stage(confidence, shallow_outputs.correct, shallow_flops),
            Stage(deep_confidence, deep_correct, deep_flops),
        ]
        return Pair(
            [shallow.classifier.name, deep.classifier.name],
            [shallow_flops, deep_flops],
            stages,
            [shallow_outputs, deep_outputs],
            folds,
            bool(known.all()),
            unreadable | deep.unreadable,
        )


def describe(recommendation: Recommendation, pair: Pair) -> str:
    """The threshold to take, what it gives, and the verdict."""
    scored, fitted = recommendation.scored, recommendation.cross_fitted
    reached = "" if recommendation.reached else " (not reached; this comes nearest)"
    return "\n".join(
        [
            f"Goal: {recommendation.goal.describe()}{reached}.",
            f"Take threshold {recommendation.threshold:g}: accuracy {scored.accuracy:.2f}%"
            f"{report.format_interval(scored.accuracy_interval)}, {100 * recommendation.deferral:.1f}% deferred, "
            f"{report.format_flops(scored.flops)} FLOPs an image, {scored.saving:.2f}x fewer than the deep model"
            f"{report.format_interval(scored.saving_interval)}.",
            f"Chosen on four folds and scored on the fifth: accuracy {fitted.accuracy:.2f}%"
            f"{report.format_interval(fitted.accuracy_interval)}, {report.format_flops(fitted.flops)}, "
            f"{fitted.saving:.2f}x fewer{report.format_interval(fitted.saving_interval)}.",
            f"Verdict: use the {display_verdict(recommendation, pair)}: {recommendation.reason}.",
        ]
    )


def display_verdict(recommendation: Recommendation, pair: Pair) -> str:
    if recommendation.choice == "cascade":
        return "cascade"
    name = display_name(pair.models[0 if recommendation.choice == "shallow" else -1])
    return f"{recommendation.choice} model ({name})"


if __name__ == "__main__":
    cli.run(main, get_args_parser())
