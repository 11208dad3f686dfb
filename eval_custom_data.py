"""Step 5: classify a folder of your own images with the cascade; the deep model sees only the images that need it.

    python eval_custom_data.py --custom-data photos --threshold 0.5 \\
        --shallow-model tf_efficientnet_b0.aa_in1k --deep-model tf_efficientnet_b4.aa_in1k

Input: a folder of images, in class folders (then accuracy is reported), nested or flat (then it is not); the policy of
train_custom_data.py (--policy), or two timm models of the same classes and the weight that it trained.

Output: custom-data-result.csv, one row an image, with a header: file, predict and GT (class indices as the first model
numbers them; GT is empty where the class is not known), class_name, confidence, answered_by, and of each model its own
answer and how sure the cascade was after it. RESULT.report.html says what was done; RESULT.errors.csv lists what could
not be read.

For several GPUs or machines: torchrun --nproc-per-node N eval_custom_data.py ...

Exit codes: 0 done, 2 bad input, 3 done but some images were left out, 130 interrupted (the same command goes on).
torchrun makes 1 of them all but 0, so under it a run that left images out ends with 0; the last line still counts them.
"""

import argparse
import contextlib
import itertools
from pathlib import Path
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.start(decodes=True)

import torch

from clcnet import CLCNet, distributed
from clcnet.cascade.curve import SHALLOW_ALONE
from clcnet.cascade.drift import DriftError, find_drift
from clcnet.cascade.policy import Policy
from clcnet.cascade.rules import Surest
from clcnet.cascade.runner import run_folder, write_result
from clcnet.classifiers.classes import name_classes, possible_readings
from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.classifiers.timing import fastest
from clcnet.confidence import CLCNET
from clcnet.data import sources
from clcnet.data.images import errors_file, list_images, write_errors
from clcnet.files import check_output, output_lock
from clcnet.network.weights import weights_or_shipped
from clcnet.report.folder_report import print_summary, promise_lines, summarise, summary_lines, write_page
from clcnet.report.tables import distinct_names


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    sources.add_image_arguments(parser, "--custom-data", "folder, .tar, hfds/NAME", labels=True, required=True)
    cli.add_pair_arguments(parser)
    add = parser.add_argument_group("cascade").add_argument
    add("--weight", type=Path, metavar="FILE", help="of train_custom_data.py (default: weights/CLCNet_custom_data.zip)")
    any_n = "take CLCNet weights that were trained at another number of classes than the models have"
    add("--any-n", action="store_true", help=any_n)
    less_sure = "less sure images go to the deep model (default: 0.5)"
    add("--threshold", type=cli.threshold, metavar="T", help=less_sure)
    policy = "cascade.json of train_custom_data.py or of step 4, in place of models, weights and threshold"
    add("--policy", type=Path, metavar="FILE", help=policy)
    where = "the policy's models here, in its order: names or weight files (default: where they lay when measured)"
    add("--models", nargs="+", metavar="NAME", help=where)
    drift = "what to do where the images are not like those that the policy was measured on"
    add("--on-drift", choices=("warn", "stop"), default="warn", help=drift)
    group = parser.add_argument_group("output")
    result = "CSV to write; FILE.report.html beside it says what was done, on one page"
    group.add_argument("--result", type=Path, default=cli.ROOT / "custom-data-result.csv", metavar="FILE", help=result)
    safe = "put a ' before names that a spreadsheet takes for formulas"
    group.add_argument("--spreadsheet-safe", action="store_true", help=safe)
    cli.add_store_arguments(group)
    cli.add_preprocessing_arguments(parser)
    cli.add_device_arguments(parser)
    return parser


def load_cascade(args: argparse.Namespace, device: torch.device) -> tuple[list[Classifier], Policy, list[float | None]]:
    """The models, how they are used, and the models' FLOPs: the policy's, or the paper's of the flags."""
    if args.policy:
        policy = Policy.load(args.policy, device)
        cli.refuse_beside_policy(args)
        models = policy.load_classifiers(args.models, device, **{name: getattr(args, name) for name in cli.SPEED})
        return models, policy, [model.flops for model in policy.models]
    if args.models:
        raise ValueError("--models names the models of a --policy; give one")
    threshold = 0.5 if args.threshold is None else args.threshold
    stages = cli.PLACES if threshold > SHALLOW_ALONE else cli.PLACES[:1]  # a deep model never asked need not be had
    models = [load_classifier(**cli.pair_options(args, stage), device=device) for stage in stages]
    path = weights_or_shipped(args.weight or cli.WEIGHTS_DIR / "CLCNet_custom_data.zip", lambda: models[0].num_classes)
    network = CLCNet.load(path, device=device)
    if network.num_classes != models[0].num_classes and not args.any_n:
        raise ValueError(
            f"{path} was trained at {network.num_classes} classes and {models[0].name} has "
            f"{models[0].num_classes}: it knows nothing of these models; train with their tables, or give --any-n"
        )
    given = (args.shallow_model_FLOPs, args.deep_model_FLOPs)
    flops = [cost or getattr(model, "flops", None) for cost, model in itertools.zip_longest(given, models)]
    return models, Policy([], Surest(CLCNET, network=network), [threshold] * (len(models) - 1)), flops


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Write the result file, print the summary and return it. Unreadable images are counted, not raised."""
    torch.manual_seed(args.seed)
    inputs = [args.labels, args.class_map, args.weight, args.policy, args.shallow_model_weight, args.deep_model_weight]
    output = check_output(args.result, inputs=inputs)
    device = distributed.resolve_device(args.device)
    with distributed.processes():
        models, policy, flops = load_cascade(args, device)
        options = sources.data_set_options(args)
        images = list_images(args.custom_data, args.class_map, args.labels, True, models[0].label_names or (), options)
        own_names = distinct_names([model.name for model in models])
        names = own_names if args.policy and len(models) != len(cli.PLACES) else cli.PLACES[: len(models)]
        readings, note = possible_readings(images, models[0])
        if args.fast:
            models = [fastest(model, images, args.batch_size) for model in models]
        if distributed.is_main():
            for name, model in zip(names, models, strict=True):
                print(f"{name} model: {model.describe()}" if name in cli.PLACES else model.describe(), flush=True)
            print(f"{len(images)} images in {args.custom_data}", flush=True)
            cli.print_lines(*images.notes, note)
        with output_lock(output) if distributed.is_main() else contextlib.nullcontext():
            found = run_folder(
                models, policy.rule, policy.thresholds, images, readings, args.store, args.batch_size, args.workers
            )
            if found is None:
                return {}
            drift = find_drift(found.answers.confidences, policy.expected) if policy.expected else []
            if drift and args.on_drift == "stop":
                raise DriftError(f"{'; '.join(drift)}; nothing is written, as it would be with --on-drift warn")
            class_names = name_classes(images, found.targets, models[0]) or policy.class_names(models[0].num_classes)
            # without a deep model its columns are there all the same, empty
            columns = cli.PLACES if len(models) < len(cli.PLACES) and not args.policy else names
            unsure = None if policy.unsure_below is None else policy.is_unsure(found.answers.confidence)
            write_result(output, images, found.answers, columns, class_names, unsure, args.spreadsheet_safe)
            write_errors(errors_file(output), images, found.unreadable, args.spreadsheet_safe, images.files)
        cli.print_lines(*found.notes)
        outcome = summarise(found, flops, names, class_names)
        outcome |= {"drift": drift, "num_unsure": 0 if unsure is None else int(unsure.sum())}
        promises = promise_lines(policy, drift, found.answers, unsure)
        lines = [*summary_lines(outcome, names), *promises]
        write_page(output, found.answers, images, outcome, flops, names, own_names, lines)
        cli.print_lines(*promises)
        print_summary(outcome, names, output)
    return outcome


if __name__ == "__main__":
    cli.run(main, get_args_parser())
