"""Step 3: classify a folder of images with a timm model and save the sorted-probability table that CLCNet learns from.

    python generate_data_for_CLCNet.py --model tf_efficientnet_b4.aa_in1k

Input: images that the model was not trained on, else it is surer of them than of any others, and all that is learnt
from the table flatters. They lie in class folders, in the five-part layout split_part_1..5/<class>/<file>, in a flat
folder with --labels, in a tar file, or in one of timm's data sets (hfds/NAME, wds/PATH, ...). Output: one row an image:
file name, all class probabilities in descending order, 1 if the top-1 answer is right, else 0; CSV without a header, or
Parquet by the output's extension. Images that cannot be read are left out and listed, with the reason, in
OUTPUT.errors.csv. Images are read as timm's own validation reads them: the first frame of an animation, orientation
tags unheeded, 16-bit values above 255 clipped.

Several GPUs or machines: torchrun --nproc-per-node N generate_data_for_CLCNet.py ... gives the rows of one process,
byte for byte on GPUs of one kind; on CPUs with the same OMP_NUM_THREADS, which may sway the last digit.

Exit codes: 0 done, 2 bad input, 3 done but some images were left out, 130 interrupted (the same command goes on).
torchrun makes 1 of them all but 0, so under it a run that left images out ends with 0; the last line still counts them.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from clcnet import cli

if __name__ == "__main__":
    cli.start(decodes=True)

import numpy as np
import torch
from timm.models import safe_model_name

from clcnet import distributed
from clcnet.classifiers.checkpoint import doubt_top1
from clcnet.classifiers.classes import class_readings, name_classes
from clcnet.classifiers.classifier import load_classifier
from clcnet.classifiers.decoding import sum_up_remarks
from clcnet.classifiers.kept import Kept, classify_missing, kept_answers
from clcnet.classifiers.stream import describe_waiting
from clcnet.classifiers.timing import fastest
from clcnet.data import sources
from clcnet.data.checks import doubts, rows_at_once
from clcnet.data.images import errors_file, list_images, write_errors
from clcnet.data.table_files import TableWriter, check_table_output
from clcnet.files import atomic_path, output_lock


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    folder = "images: folder, .tar, hfds/NAME"
    sources.add_image_arguments(parser, "--data-path", folder, labels=True, default=cli.IMAGENET_SPLITS)
    group = parser.add_argument_group("model and output")
    add = group.add_argument
    model = "timm model, local-dir:FOLDER, hf-hub:NAME"
    add("--model", default="tf_efficientnet_b4.aa_in1k", metavar="NAME", help=model)
    add("--model-weight", type=Path, metavar="FILE", help=".pth, .pth.tar or .safetensors (default: timm's weights)")
    add("--num_classes", type=cli.number_of_classes, metavar="N", help="classes of --model-weight (default: its own)")
    add("--output", type=Path, metavar="FILE", help=".csv or .parquet (default: MODEL_output_ds_for_CLCNet.csv)")
    cli.add_store_arguments(group)
    cli.add_preprocessing_arguments(parser)
    cli.add_device_arguments(parser)
    return parser


def default_output(model: str) -> Path:
    """The table's path in the repository's root, named after the model, or after the folder of a `local-dir:` model."""
    folder = model.removeprefix("local-dir:")
    name = Path(folder).resolve().name if folder != model else safe_model_name(model)
    return cli.ROOT / f"{name}_output_ds_for_CLCNet.csv"


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Write the table and return what the last lines say. Unreadable images are counted, not raised."""
    torch.manual_seed(args.seed)
    inputs = [args.labels, args.class_map, args.model_weight]
    output = check_table_output(args.output or default_output(args.model), inputs)
    device = distributed.resolve_device(args.device)
    images = list_images(args.data_path, args.class_map, args.labels, options=sources.data_set_options(args))
    if not images.has_labels:
        raise ValueError(f"{args.data_path} does not say which classes its images have; give --labels")
    with distributed.processes():
        classifier = load_classifier(args.model, args.model_weight, device=device, **cli.classifier_options(args))
        readings = class_readings(images, classifier)
        if args.fast:
            classifier = fastest(classifier, images, args.batch_size)
        if distributed.is_main():
            print(classifier.describe(), flush=True)
            print(f"{len(images)} images of {len(images.class_names)} classes in {args.data_path}", flush=True)
            cli.print_lines(*images.notes)
        with kept_answers(args.store, classifier, images) as kept:
            num_before = kept.num_before if kept else 0
            seconds, waited = classify_missing(kept, classifier, images, None, args.batch_size, args.workers)
            if kept is None:
                return {}
            cli.print_lines(kept.settle(readings), sum_up_remarks(kept.remarks.values()))
            num_rows, num_right = write_table(kept, output)
        num_unreadable, top1 = len(images) - num_rows, 100 * num_right / num_rows
        summary = f"{classifier.name}: top-1 {top1:.2f}% of {num_rows} images"
        if num_unreadable:
            summary += f", {num_unreadable} unreadable ones left out ({errors_file(output)})"
        speed = (len(images) - num_before) / seconds if seconds else math.nan
        if seconds:
            summary += f"; {speed:.1f} images/s{describe_waiting(seconds, waited)}"
        print(f"{summary}; table in {output}")
        doubt = doubt_top1(num_right, num_rows, classifier.num_classes, classifier.trained_top1)
        cli.print_lines(*(doubts({classifier.name: top1}) or [doubt and f"warning: {doubt}"]))
    return {
        "output": output,
        "model": classifier.name,
        "flops": classifier.flops,
        "top1": top1,
        "num_images": len(images),
        "num_rows": num_rows,
        "num_unreadable": num_unreadable,
        "images_per_second": speed,
    }


def write_table(kept: Kept, output: Path) -> tuple[int, int]:
    """Write the table, in bounded memory, and the errors file; returns the numbers of rows and of right answers."""
    answered = np.flatnonzero(kept.places >= 0)
    num_right, step = 0, rows_at_once(kept.classifier.num_classes)
    named = name_classes(kept.images, kept.targets, kept.classifier)
    record = dataclasses.replace(kept.record, class_names=named)
    with output_lock(output), atomic_path(output) as temporary, TableWriter(temporary, record) as writer:
        for start in range(0, len(answered), step):
            outputs = kept.outputs(answered[start : start + step])
            assert outputs.correct is not None, "every image has a class"
            num_right += int(outputs.correct.sum())
            writer.write(outputs)
    write_errors(errors_file(output), kept.images, kept.reasons)
    return len(answered), num_right


if __name__ == "__main__":
    cli.run(main, get_args_parser())
