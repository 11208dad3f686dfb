"""Step 4: evaluate the cascade on ImageNet by five-fold cross-validation, at one threshold or at all of them.

    python eval_imagenet_5fold_cv.py --threshold-searching --shallow-model tf_efficientnet_b0.aa_in1k \\
        --deep-model tf_efficientnet_b4.aa_in1k

Input: the images (--imagenet-split) and two timm models, or the outputs that step 3 made of them (--shallow-output and
--deep-output, or --outputs for any number; then no model runs); and the five CLCNet weights (--weight-save). Each image
is judged by the network that was not trained on its fold. Each model sees an image at most once: its answers are kept
in a store, which steps 3 and 5 share.

Output: performance-result.csv, and in a folder beside it the results table (Markdown and CSV), the comparison with
other confidences, the plots and, where classes are known, the best cascade: report.html, cascades.csv, cascade.json.

Exit codes: 0 done, 2 bad input, 3 done but some images could not be read and are left out, 130 interrupted.
"""

import argparse
import contextlib
import functools
from pathlib import Path
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.start()

from clcnet import distributed
from clcnet.cascade import evaluation
from clcnet.cascade.curve import SHALLOW_ALONE, sweep
from clcnet.cascade.rules import Surest, cross_fitted, know_classes
from clcnet.cascade.verdict import recommend
from clcnet.confidence import CLCNET
from clcnet.data import sources
from clcnet.data.checks import doubts
from clcnet.data.images import ImageSet, errors_file, list_images, write_errors
from clcnet.data.outputs import load_labelled
from clcnet.files import check_output, output_lock
from clcnet.network.weights import weights_or_shipped
from clcnet.report import evaluation_report
from clcnet.report.search_cli import SearchRequest, add_search_arguments
from clcnet.report.search_report import search_and_report
from clcnet.report.tables import distinct_names, parse_references, performance_frame, read_results, write_csv

RELEASED_GRID = "0.05:1.01:0.02"


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add = cli.add_pair_arguments(parser).add_argument
    for place in cli.PLACES:
        table = f"the {place} model's table from step 3, in place of running it"
        add(f"--{place}-output", type=Path, metavar="FILE", help=table)
    several = "outputs of two to twelve models from step 3, in any order (.parquet), to find the best cascade of them"
    add("--outputs", nargs="+", type=Path, default=[], metavar="FILE", help=several)
    add("--weight-save", "--weight", type=Path, default=cli.WEIGHTS_DIR, metavar="FOLDER", help="five CLCNet weights")
    parts = "split_part_1..5, or class folders (default: data/imagenet_splits_5; with --outputs, none)"
    cli.add_store_arguments(sources.add_image_arguments(parser, "--imagenet-split", parts))
    add = parser.add_argument_group("thresholds").add_argument
    add("--threshold", type=cli.threshold, metavar="T", help="less sure images go to the deep model (default: 0.5)")
    search: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "type": cli.true_or_false}
    every = "evaluate all thresholds instead of one (default: False)"
    add("--threshold-searching", metavar="True|False", help=every, **search)
    grid = f"those listed in performance-result.csv: numbers, START:STOP:STEP, or all (default: {RELEASED_GRID})"
    add("--thresholds", nargs="+", metavar="T", help=grid)
    stands = "a single model for the results table; `paper` for the paper's eight; may be repeated"
    add("--reference", metavar="NAME:ACCURACY:FLOPS", action="extend", type=parse_references, default=[], help=stands)
    others = "results-table.csv of other cascades, to be printed in one table with this one's"
    add("--join", nargs="+", type=Path, default=[], metavar="FILE", help=others)
    add_search_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    result = cli.ROOT / "performance-result.csv"
    add("--performance-result", type=Path, default=result, metavar="FILE", help="accuracy and FLOPs at every threshold")
    add("--results-folder", type=Path, metavar="FOLDER", help="tables and plots (default: results, beside the former)")
    cli.add_preprocessing_arguments(parser)
    cli.add_device_arguments(parser)
    return parser


def one_threshold(args: argparse.Namespace) -> float | None:
    """The only threshold that is asked for; None for more than one, so that the deep model must see every image."""
    goals = (args.match, args.target_accuracy, args.target_FLOPs, args.most_drop, args.most_FLOPs, args.most_risk)
    if args.threshold_searching or any((args.thresholds, *goals)) or (args.outputs and args.threshold is None):
        return None
    return 0.5 if args.threshold is None else float(args.threshold)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, write all files, print the report; returns its figures."""
    request = SearchRequest.of(args)  # refused before any work
    grid = cli.threshold_grid(args.thresholds or [RELEASED_GRID])
    folder = args.results_folder or args.performance_result.parent / "results"
    inputs = [args.shallow_output, args.deep_output, args.class_map]
    check_output(args.performance_result, inputs=[*inputs, *args.outputs, *args.join])
    check_output(folder / "results-table.md")
    joined = [read_results(path) for path in args.join]
    load = load_tables if args.outputs or args.shallow_output or args.deep_output else run_models
    if load is load_tables and args.cost == "time":
        raise ValueError("tables do not say what models take in time; name the models, to have them run")
    threshold = one_threshold(args)
    with (
        distributed.processes(),
        output_lock(args.performance_result) if distributed.is_main() else contextlib.nullcontext(),
    ):
        found = load(args)
        if found is None:  # not the main process
            return {}
        if found.images:
            write_errors(errors_file(args.performance_result), found.images, found.unreadable)
        outcome = {
            "performance_result": args.performance_result,
            "results_folder": folder,
            "num_images": len(found.folds),
            "num_unreadable": len(found.unreadable),
            "confidence": found.outputs[0].scores.get(CLCNET),
        }
        cli.print_lines(*doubts({each.record.model: each.accuracy for each in found.outputs}))
        rule = Surest("max softmax" if outcome["confidence"] is None else CLCNET)
        if threshold is None:
            steps = cross_fitted(rule, found.outputs, found.folds)
            curve = sweep(steps, grid)
            names = distinct_names(found.models)
            recommendation = recommend(steps, found.folds, request.goal_of_flops, names, args.least_saving, args.seed)
            write_csv(performance_frame(curve, found.milliseconds), args.performance_result)
            if know_classes(found.outputs):
                milliseconds = found.milliseconds if load is run_models else None
                places = folder, folder / "cascade.json", found.images
                outcome |= search_and_report(found.outputs, found.folds, request, *places, milliseconds)
            outcome |= evaluation_report.write_report(found, steps, args.reference, joined, folder, args.seed)
            outcome["paper_rule"] = recommendation
            print(evaluation_report.describe_recommendation(recommendation, found, steps))
        else:
            curve = evaluation.at_threshold(rule, found.outputs, threshold)
            write_csv(performance_frame(curve), args.performance_result)
            print(evaluation_report.describe_threshold(curve, found))
        if found.unreadable:
            print(f"{len(found.unreadable)} images could not be read: {errors_file(args.performance_result)}")
        files = f"{len(curve)} threshold{'s' * (len(curve) > 1)} in {args.performance_result}"
        print(files + (f"; tables and plots in {folder}" if threshold is None else ""))
    return outcome | {"curve": curve}


def images_of(args: argparse.Namespace) -> ImageSet:
    options = sources.data_set_options(args)
    return list_images(args.imagenet_split or cli.IMAGENET_SPLITS, args.class_map, options=options)


def load_tables(args: argparse.Namespace) -> evaluation.Evaluation:
    """Take models' outputs from their tables: any number, or two."""
    flags = ("output", "model", "model_FLOPs")
    paths, models, flops = ([getattr(args, f"{place}_{flag}") for place in cli.PLACES] for flag in flags)
    if args.outputs:
        paths, models, flops = args.outputs, [], []
    elif None in paths:
        missing = cli.PLACES[paths.index(None)]
        raise ValueError(f"--{missing}-output is missing; give the tables of both models, or of none")
    found, folder, networks = load_labelled(*paths), args.weight_save, []
    if args.outputs and not args.imagenet_split:
        images, known_folds = evaluation.images_of_outputs(found[0], paths[0], folder)
    else:
        images, known_folds = images_of(args), True
    if args.outputs:
        known_folds = known_folds and any(folder.glob("CLCNet_imagenet_split_*"))
    else:
        folder = weights_or_shipped(folder, lambda: found[0].num_classes)
    if known_folds:
        networks = evaluation.load_fold_networks(folder, images)
    else:
        print(f"no CLCNet weights in {folder} for these folds: the rules that need them are left out")
    return evaluation.evaluation_of_tables(found, paths, images, networks, models, flops)


def run_models(args: argparse.Namespace) -> evaluation.Evaluation | None:
    """Classify with both models, each image at most once; None in processes other than the main one."""
    # timm takes seconds to import, and tables need none of it
    from clcnet.cascade.evaluation_images import evaluation_of_images
    from clcnet.classifiers.classifier import Classifier, load_classifier
    from clcnet.classifiers.timing import fastest

    images, threshold = images_of(args), one_threshold(args)
    if not images.has_labels:
        raise ValueError(f"{images.root} does not say of which classes its images are; accuracy needs class folders")
    device = distributed.resolve_device(args.device)

    @functools.cache
    def load_model(number: int) -> Classifier:
        model = load_classifier(**cli.pair_options(args, cli.PLACES[number]), device=device)
        return fastest(model, images, args.batch_size) if args.fast else model

    networks = []
    if threshold is None or threshold > SHALLOW_ALONE:
        folder = weights_or_shipped(args.weight_save, lambda: load_model(0).num_classes)
        networks = evaluation.load_fold_networks(folder, images, device)
    flops = [getattr(args, f"{place}_model_FLOPs") for place in cli.PLACES]
    how = args.store, args.batch_size, args.workers
    return evaluation_of_images(images, load_model, networks, threshold, flops, *how)


if __name__ == "__main__":
    cli.run(main, get_args_parser())
