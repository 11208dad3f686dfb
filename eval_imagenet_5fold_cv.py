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
from pathlib import Path
from typing import Any

from clcnet import cli
from clcnet.memory import keep_freed_memory

if __name__ == "__main__":
    cli.expect_interrupts()  # before the imports that take seconds
    keep_freed_memory()

import numpy as np
from numpy.typing import NDArray

from clcnet import distributed
from clcnet.cascade.baselines import compare, confidences
from clcnet.cascade.curve import SHALLOW_ALONE, Bools, Curve, Floats, Stage, oracle, sweep
from clcnet.cascade.deep_offset import can_have_offset, cross_fitted_offsets, fit_deep_offset, with_deep_offset
from clcnet.cascade.evaluation import Pair, flops_of, load_fold_networks, pair_from_tables
from clcnet.cascade.selection import Goal, Recommendation, Reference, recommend
from clcnet.data.images import ImageSet, list_images
from clcnet.files import check_output, output_lock
from clcnet.report import plots
from clcnet.report import tables as report
from clcnet.report.paper_table import PAPER_REFERENCES, Row, accuracy_interval, display_name, merge_rows, results_rows

STAGES = ("shallow", "deep")
DEFAULT_MODELS = ("tf_efficientnet_b4.aa_in1k", "tf_efficientnet_b7.ra_in1k")
RELEASED_GRID = tuple(round(0.05 + 0.02 * step, 2) for step in range(49))  # 0.05, 0.07, ..., 1.01
MOST_THRESHOLDS = 1_000_000


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("models")
    for stage, default in zip(("shallow", "deep"), DEFAULT_MODELS, strict=True):
        add = group.add_argument
        add(f"--{stage}-model", metavar="NAME", help=f"timm model, local-dir:FOLDER, hf-hub:NAME (default: {default})")
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
    add(
        "--imagenet-split",
        type=Path,
        default=cli.IMAGENET_SPLITS,
        metavar="FOLDER",
        help="split_part_1..5, or class folders",
    )
    add("--class-map", type=Path, metavar="FILE", help="class folders in the models' order, one a line, as in timm")
    add("--cache", type=Path, default=cli.DATA_DIR / "cache", metavar="FOLDER", help="where model outputs are kept")
    group = parser.add_argument_group("thresholds")
    add = group.add_argument
    add("--threshold", type=cli.threshold, default=0.5, metavar="T", help="less confident images go to the deep model")
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
    add(
        "--deep-offset",
        type=deep_offset,
        default=0.0,
        metavar="H|fit",
        help="head start, in log-odds, of the deep answer against the shallow one; fit: measured on the other folds "
        "(default: 0, the paper's rule)",
    )
    goal = group.add_mutually_exclusive_group()
    add = goal.add_argument
    add("--match", choices=["deep"], help="recommend the cheapest threshold to reach its accuracy (the default)")
    add("--target-accuracy", type=cli.positive_float, metavar="PERCENT", help="recommend the cheapest that reaches it")
    add("--target-FLOPs", type=cli.positive_float, metavar="BILLIONS", help="recommend the best that costs no more")
    add = group.add_argument
    add(
        "--reference",
        action="append",
        type=parse_references,
        default=[],
        metavar="NAME:ACCURACY:FLOPS",
        help="a single model for the results table; `paper` for the paper's eight; may be repeated",
    )
    add(
        "--join",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="results-table.csv of other cascades, to be printed in one table with this one's",
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
    try:
        name, *figures = text.rsplit(":", 2)  # a name may hold colons itself, as local-dir:FOLDER does
        accuracy, flops = map(float, figures)
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
            if (stop - start) / step > MOST_THRESHOLDS:
                raise ValueError(
                    f"--thresholds: {word} names more than {MOST_THRESHOLDS:,} of them; take a larger step"
                )
            grid += [round(start + step * index, 10) for index in range(int((stop - start) / step + 1e-9) + 1)]
        elif len(numbers) == 1 and not math.isnan(numbers[0]):
            grid += numbers
        else:
            raise ValueError(f"--thresholds: {word!r} is neither a number, nor START:STOP:STEP, nor all")
    if not grid:
        raise ValueError(f"--thresholds {' '.join(words)}: no threshold lies in this range")
    return np.unique(grid)


def deep_offset(text: str) -> float:
    """A number of log-odds, or nan for `fit`."""
    try:
        return math.nan if text == "fit" else float(cli.finite_float(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a finite number nor fit") from None


def parse_goal(args: argparse.Namespace) -> Goal:
    """What the threshold is to be chosen for; the deep model's accuracy unless told otherwise."""
    if args.target_accuracy is not None:
        return Goal("accuracy", args.target_accuracy)
    return Goal("match") if args.target_FLOPs is None else Goal("flops", args.target_FLOPs)


def is_searching(args: argparse.Namespace) -> bool:
    """Whether more than one threshold is asked for, so that the deep model must see every image."""
    asked = (args.thresholds, args.match, args.target_accuracy, args.target_FLOPs, math.isnan(args.deep_offset))
    return args.threshold_searching or any(asked)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, write all files, print the report; returns its figures."""
    grid, goal, searching = parse_thresholds(args.thresholds), parse_goal(args), is_searching(args)
    folder = args.results_folder or args.performance_result.parent / "results"
    check_output(args.performance_result, inputs=[args.shallow_output, args.deep_output, args.class_map, *args.join])
    check_output(folder / "results-table.md")
    joined = [report.read_results(path) for path in args.join]
    images = list_images(args.imagenet_split, class_map=args.class_map)
    with (
        distributed.processes(),
        output_lock(args.performance_result) if distributed.is_main() else contextlib.nullcontext(),
    ):
        for note in images.notes if distributed.is_main() else ():
            print(note, flush=True)
        pair = load_tables(args, images) if args.shallow_output or args.deep_output else run_models(args, images)
        if pair is None:  # not the main process
            return {}
        stages = keep_answers(pair, args.deep_offset)
        curve = sweep(stages, grid if searching else [args.threshold])
        recommendation = recommend(stages, pair.folds, goal, args.seed) if searching else None
        report.write_csv(report.performance_frame(curve, pair.milliseconds), args.performance_result)
        outcome = {
            "performance_result": args.performance_result,
            "results_folder": folder,
            "num_images": len(pair.folds),
            "num_unreadable": len(pair.unreadable),
            "curve": curve,
            "confidence": pair.stages[0].confidence,
            "recommendation": recommendation,
        }
        if recommendation is not None:
            references = [reference for group in args.reference for reference in group]
            outcome |= write_report(pair, stages, references, joined, folder, args.seed)
            print(describe_recommendation(recommendation, pair))
            outcome |= report_offset(recommendation, pair, args.deep_offset, args.seed)
        else:
            print(describe_threshold(curve, pair))
        if pair.unreadable:
            print(f"{len(pair.unreadable)} images could not be read: {args.performance_result}.errors.csv")
        files = f"{len(curve)} threshold{'s' * (len(curve) > 1)} in {args.performance_result}"
        print(files + (f"; tables and plots in {folder}" if searching else ""))
    return outcome


def keep_answers(pair: Pair, offset: float) -> list[Stage]:
    """The stages under a deep offset, nan for one fitted on the other folds of each image."""
    nothing_deferred = bool(np.isneginf(pair.stages[-1].confidence).all())
    if offset == 0 or nothing_deferred:
        return pair.stages
    offsets = cross_fitted_offsets(pair.stages, pair.folds) if math.isnan(offset) else offset
    return with_deep_offset(pair.stages, offsets)


def load_tables(args: argparse.Namespace, images: ImageSet) -> Pair:
    """Take both models' outputs from the tables of step 3; FLOPs are counted only where a model's name is given."""
    paths = [getattr(args, f"{stage}_output") for stage in STAGES]
    if None in paths:
        raise ValueError(f"--{STAGES[paths.index(None)]}-output is missing; give the tables of both models, or of none")
    models, flops = [], []
    for stage, path in zip(STAGES, paths, strict=True):
        model, stage_flops = getattr(args, f"{stage}_model"), getattr(args, f"{stage}_model_FLOPs")
        if stage_flops is None and model is None:
            raise ValueError(f"--{stage}-model-FLOPs is missing; give it, or --{stage}-model NAME to have it counted")
        flops.append(flops_of(model) if stage_flops is None else stage_flops)
        models.append(model or path.stem)
    return pair_from_tables(paths, images, load_fold_networks(args.weight_save, images), models, flops)


def run_models(args: argparse.Namespace, images: ImageSet) -> Pair | None:
    """Classify with both models, each image at most once; None in processes other than the main one."""
    # timm takes seconds to import, and tables need none of it
    from clcnet.cascade.cached_inference import Options, pair_from_images
    from clcnet.classifiers.classifier import Classifier, load_classifier, resolve_device
    from clcnet.data.images import errors_file, write_errors

    if not images.has_labels:
        raise ValueError(f"image folder {args.imagenet_split} has no class folders; make them, accuracy needs them")
    device = resolve_device(args.device)

    def load_model(number: int) -> Classifier:
        stage = STAGES[number]
        return load_classifier(
            getattr(args, f"{stage}_model") or DEFAULT_MODELS[number],
            weight=getattr(args, f"{stage}_model_weight"),
            device=device,
            **cli.classifier_options(args),
        )

    threshold = None if is_searching(args) else args.threshold
    networks = None
    if threshold is None or threshold > SHALLOW_ALONE:
        networks = load_fold_networks(args.weight_save, images, device)
    given_flops = [getattr(args, f"{stage}_model_FLOPs") for stage in STAGES]
    options = Options(args.cache, args.batch_size, args.workers)
    pair = pair_from_images(images, load_model, networks, threshold, given_flops, options)
    if pair is not None:
        write_errors(errors_file(args.performance_result), images, pair.unreadable)
    return pair


def write_report(
    pair: Pair,
    stages: list[Stage],
    references: list[Reference],
    joined: list[list[Row]],
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Write tables and plots, print the tables, and return their figures.

    The comparison of confidences and rules is over the pair's own stages; the results are those of `stages`, which may
    hold a deep offset.
    """
    assert pair.outputs is not None
    probs = [outputs.sorted_probs for outputs in pair.outputs]
    correct = [stage.correct for stage in pair.stages]
    names = [display_name(model) for model in pair.models]
    average_correct = pair.average_correct()
    rules = compare(pair.stages, probs, pair.folds, average_correct)
    scores = {"CLCNet": [stage.confidence for stage in pair.stages], **confidences(probs, correct, pair.folds)}
    comparison = report.comparison_frame(rules, pair.stages[-1], seed)
    figures = report.confidence_frame(names, scores, pair.stages)
    rows = merge_rows([*joined, results_rows(stages, pair.models, pair.folds, references, seed)])
    tables = {
        "confidences": (figures, report.confidence_markdown(figures)),
        "comparison": (comparison, report.comparison_markdown(comparison)),
        "results-table": (report.results_frame(rows), report.results_markdown(rows)),
    }
    for name, (frame, text) in tables.items():
        report.write_csv(frame, folder / f"{name}.csv")
        report.write_text(text, folder / f"{name}.md")
    cost = plots.plot_accuracy_and_cost(rules, pair.stages, names, references, pair.milliseconds)
    plots.save(cost, folder, "accuracy-FLOPs")
    draw_confidences({name: by_model[0] for name, by_model in scores.items()}, correct[0], names[0], folder)
    print(f"How well each confidence tells right from wrong:\n\n{tables['confidences'][1]}\n")
    print(f"Accuracy (%) when a share of the images goes on to {names[-1]}:\n\n{tables['comparison'][1]}\n")
    if average_correct is None:
        print("GEM, the average of both models, needs their outputs class by class, which tables do not hold.\n")
    print(f"Results, with 95% intervals:\n\n{tables['results-table'][1]}\n")
    return {"rules": rules, "confidences": figures, "rows": rows}


def draw_confidences(scores: dict[str, Floats], correct: Bools, model: str, folder: Path) -> None:
    """Draw how the confidences in the shallow model's answers tell right from wrong."""
    probabilities = {name: scores[name] for name in ("CLCNet", "max softmax", "temperature-scaled softmax")}
    plots.save(plots.plot_risk_coverage(scores, correct, model), folder, "risk-coverage")
    plots.save(plots.plot_reliability(probabilities, correct, model), folder, "reliability")
    plots.save(plots.plot_histogram(scores["CLCNet"], correct, model), folder, "confidence-histogram")


def describe_threshold(curve: Curve, pair: Pair) -> str:
    """What the one threshold asked for gives, beside the models whose answers on all images are known."""
    known = pair.stages if pair.outputs is not None else pair.stages[:1]
    alone = ", ".join(
        f"{display_name(model)} alone {stage.accuracy:.2f}% at {report.format_flops(stage.flops)}"
        for model, stage in zip(pair.models, known, strict=False)
    )
    interval = accuracy_interval(curve.accuracy[0], curve.num_images)
    return (
        f"Threshold {curve.thresholds[0]:g}: accuracy {curve.accuracy[0]:.2f}%{report.format_interval(interval)}, "
        f"{100 * curve.deferral[0]:.2f}% deferred, {report.format_flops(curve.flops[0])} FLOPs an image "
        f"({alone})."
    )


def describe_recommendation(recommendation: Recommendation, pair: Pair) -> str:
    """The threshold to take, what it gives, and the verdict."""
    scored, fitted = recommendation.scored, recommendation.cross_fitted
    ceiling = sweep(oracle(pair.stages), [0.1])  # sends on exactly the images that a later model gets right
    ceiling_interval = accuracy_interval(ceiling.accuracy[0], ceiling.num_images)
    nearest = "" if recommendation.reached else " No threshold gets there; this one comes nearest."
    lines = [
        f"For {recommendation.goal.describe()}, take threshold {recommendation.threshold:g}: accuracy "
        f"{scored.accuracy:.2f}%{report.format_interval(scored.accuracy_interval)}, "
        f"{100 * recommendation.deferral:.1f}% deferred, {report.format_flops(scored.flops)} FLOPs an image, "
        f"{report.format_saving(scored.saving, scored.saving_interval)} fewer than {display_name(pair.models[-1])}."
        f"{nearest}",
        f"With the threshold chosen on four folds and scored on the fifth: accuracy {fitted.accuracy:.2f}%"
        f"{report.format_interval(fitted.accuracy_interval)}, {report.format_flops(fitted.flops)}, "
        f"{report.format_saving(fitted.saving, fitted.saving_interval)} fewer.",
        f"The best possible choice between the two models (oracle): {ceiling.accuracy[0]:.2f}%"
        f"{report.format_interval(ceiling_interval)} at {report.format_flops(ceiling.flops[0])}.",
    ]
    if pair.milliseconds is not None:
        shallow, deep = pair.milliseconds
        cost = shallow + recommendation.deferral * deep
        lines.append(
            f"In time: {cost:.3g} ms an image against {deep:.3g} ms for {display_name(pair.models[-1])}, "
            f"{deep / cost:.2f}x less ({shallow:.3g} ms for {display_name(pair.models[0])})."
        )
    return "\n".join([*lines, f"Verdict: use the {describe_choice(recommendation, pair)}: {recommendation.reason}."])


def describe_choice(recommendation: Recommendation, pair: Pair) -> str:
    """`cascade`, or which of the models alone."""
    if recommendation.choice == "cascade":
        return "cascade"
    model = pair.models[0 if recommendation.choice == "shallow" else -1]
    return f"{recommendation.choice} model ({display_name(model)})"


def report_offset(recommendation: Recommendation, pair: Pair, offset: float, seed: int) -> dict[str, Any]:
    """Print and return the fitted deep offset: the one used, or one that would do better than the paper's rule."""
    if not (math.isnan(offset) or (offset == 0 and can_have_offset(pair.stages))):
        return {}
    by_fold = cross_fitted_offsets(pair.stages, pair.folds)
    fitted = fit_deep_offset(pair.stages)
    spread = f"{fitted:.2f} (from {by_fold.min():.2f} to {by_fold.max():.2f} without one of the folds)"
    if math.isnan(offset):
        print(f"Deep offset: {spread}; in step 5, --threshold {recommendation.threshold} --deep-offset {fitted:.2f}.")
        return {"deep_offset": fitted}
    other = recommend(with_deep_offset(pair.stages, by_fold), pair.folds, recommendation.goal, seed)
    if not other.is_better_than(recommendation):
        return {}
    print(
        f"Better with --deep-offset fit, which gives {spread}: threshold {other.threshold}, "
        f"use the {describe_choice(other, pair)}: {other.reason}."
    )
    return {"deep_offset": fitted}


if __name__ == "__main__":
    cli.run(main, get_args_parser())
