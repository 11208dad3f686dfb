"""Step 5: classify a folder of your own images with the cascade; the deep model sees only the images that need it.

    python eval_custom_data.py --custom-data photos --threshold 0.5 \\
        --shallow-model tf_efficientnet_b0.aa_in1k --deep-model tf_efficientnet_b4.aa_in1k

Input: a folder of images, in class folders (then accuracy is reported), nested or flat (then it is not); two timm
models of the same classes; the weight of train_custom_data.py.

Output: custom-data-result.csv, one row an image, with a header: file, predict and GT (class indices as the shallow
model numbers them; GT is empty where the class is not known), class_name, confidence, answered_by, and both models' own
answers and confidences. Images that cannot be read are left out and listed in RESULT.errors.csv.

For several GPUs or machines: torchrun --nproc-per-node N eval_custom_data.py ...

Exit codes: 0 done, 2 bad input, 3 done but some images were left out, 130 interrupted (go on with --resume). torchrun
makes 1 of them all but 0, so under it a run that left images out ends with 0; the last line still counts them.
"""

import argparse
import hashlib
import math
from pathlib import Path
from typing import Any

from clcnet import cli
from clcnet.memory import keep_freed_memory

if __name__ == "__main__":
    cli.expect_interrupts()  # before the imports that take seconds
    cli.leave_cores_to_decoders()
    keep_freed_memory()

import torch

from clcnet import Cascade, CLCNet, distributed
from clcnet.cascade.curve import SHALLOW_ALONE
from clcnet.cascade.predictions import STAGE_NAMES
from clcnet.cascade.resume import partial_folder
from clcnet.cascade.runner import Summary, answer_folder
from clcnet.cascade.schedule import DEEP
from clcnet.classifiers.classes import answers_to, known_targets, name_classes
from clcnet.classifiers.classifier import Classifier, load_classifier, resolve_device
from clcnet.data.images import errors_file, list_images
from clcnet.files import check_output
from clcnet.report import tables as report

DEFAULT_WEIGHT = cli.WEIGHTS_DIR / "CLCNet_custom_data.zip"
DEFAULT_MODELS = ("tf_efficientnet_b4.aa_in1k", "tf_efficientnet_b7.ra_in1k")


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--custom-data", type=Path, required=True, metavar="FOLDER", help="the images; any folder structure")
    add("--labels", type=Path, metavar="FILE", help="CSV file,label for a flat folder; or the ILSVRC2012 ground truth")
    add(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="names of the models' classes in their order, one a line, as in timm",
    )
    group = parser.add_argument_group("models")
    add = group.add_argument
    for stage, default in zip(STAGE_NAMES, DEFAULT_MODELS, strict=True):
        add(f"--{stage}-model", default=default, metavar="NAME", help="timm model, local-dir:FOLDER or hf-hub:NAME")
        add(
            f"--{stage}-model-weight",
            type=Path,
            metavar="FILE",
            help=".pth, .pth.tar or .safetensors (default: timm's)",
        )
        add(
            f"--{stage}-model-FLOPs",
            type=cli.positive_float,
            metavar="BILLIONS",
            help="multiply-adds an image (default: counted)",
        )
    add("--num_classes", type=cli.number_of_classes, metavar="N", help="classes of the models (default: their own)")
    group = parser.add_argument_group("cascade")
    add = group.add_argument
    add("--weight", type=Path, default=DEFAULT_WEIGHT, metavar="FILE", help="CLCNet weights, of train_custom_data.py")
    add(
        "--threshold",
        type=cli.threshold,
        default=0.5,
        metavar="T",
        help="images with less confidence go to the deep model",
    )
    add(
        "--deep-offset",
        type=cli.finite_float,
        default=0.0,
        metavar="H",
        help="head start, in log-odds, of the deep answer against the shallow one, as train_custom_data.py and "
        "eval_imagenet_5fold_cv.py measure it (default: 0, the paper's rule)",
    )
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--result", type=Path, default=cli.ROOT / "custom-data-result.csv", metavar="FILE", help="CSV to write")
    add("--resume", action="store_true", help="go on with an interrupted run that had the same arguments")
    cli.add_preprocessing_arguments(parser)
    cli.add_device_arguments(parser)
    return parser


def load_model(args: argparse.Namespace, stage: str, device: torch.device) -> Classifier:
    """Load the shallow or the deep classifier, each by its own name and weights, and print what it is."""
    classifier = load_classifier(
        getattr(args, f"{stage}_model"),
        weight=getattr(args, f"{stage}_model_weight"),
        device=device,
        **cli.classifier_options(args),
    )
    if distributed.is_main():
        print(f"{stage} model: {classifier.describe()}", flush=True)
    return classifier


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Write the result file, print the summary and return it. Unreadable images are counted, not raised."""
    torch.manual_seed(args.seed)
    output = check_output(
        args.result,
        inputs=[args.labels, args.class_map, args.weight, args.shallow_model_weight, args.deep_model_weight],
    )
    device = resolve_device(args.device)
    images = list_images(args.custom_data, class_map=args.class_map, labels=args.labels, any_folder=True)
    clcnet = CLCNet.load(args.weight, device=device)
    with distributed.processes():
        for line in images.notes if distributed.is_main() else ():
            print(line, flush=True)
        shallow = load_model(args, "shallow", device)
        # never asked at such a threshold, so it need not be had
        deep = load_model(args, "deep", device) if args.threshold > SHALLOW_ALONE else shallow
        cascade = Cascade(shallow, deep, clcnet, args.threshold, deep_offset=args.deep_offset)
        targets, note = known_targets(images, shallow, answers_to(images, shallow, args.batch_size, args.workers))
        if distributed.is_main():
            print(f"{len(images)} images in {args.custom_data}", flush=True)
            if note:
                print(note, flush=True)
        try:
            summary = answer_folder(
                cascade,
                images,
                output,
                targets,
                name_classes(images, targets, shallow),
                arguments={
                    "threshold": args.threshold,
                    "deep offset": args.deep_offset,
                    "CLCNet weights": file_digest(args.weight),
                },
                batch_size=args.batch_size,
                workers=args.workers,
                resume=args.resume,
            )
        except KeyboardInterrupt:
            kept = partial_folder(output)
            advice = f"the rows so far are in {kept}; go on with --resume"
            raise KeyboardInterrupt(*[advice] if kept.exists() else []) from None
        if not distributed.is_main():
            return {}
        deep_flops = args.deep_model_FLOPs or (deep.flops if deep is not shallow else math.nan)
        outcome = summarise(summary, [args.shallow_model_FLOPs or shallow.flops, deep_flops])
        print_summary(outcome, output)
    return outcome


def file_digest(path: Path) -> str:
    """Name for the file's content."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def summarise(summary: Summary, flops: list[float]) -> dict[str, Any]:
    """All figures of the last lines: accuracies in percent, shares as fractions, FLOPs in billions of multiply-adds."""
    verdicts, stopwatch = summary.verdicts, summary.stopwatch
    cascade_flops = flops[0] + (summary.deferral * flops[1] if summary.deferral else 0)
    outcome = {
        "num_images": len(verdicts),
        "num_unreadable": len(summary.unreadable),
        "num_deferred": int(verdicts.deferred.sum()),
        "num_answered_by_deep": int((verdicts.answered_by == DEEP).sum()),
        "deferral": summary.deferral,
        "flops": cascade_flops,
        "deep_flops": flops[1],
        "flops_saving": flops[1] / cascade_flops,
        "seconds": stopwatch.wall,
        "deep_seconds": stopwatch.wall * stopwatch.time_saving,
        "time_saving": stopwatch.time_saving,
        "images_per_second": stopwatch.images_per_second,
        "most_deferred": summary.most_deferred(),
    }
    return outcome | (verdicts.accuracies(summary.targets) if summary.has_labels else {})


def print_summary(outcome: dict[str, Any], output: Path) -> None:
    """Print accuracy where known, deferral, cost and time against the deep model's, and where the result is."""
    if "accuracy" in outcome:
        print(f"accuracy {outcome['accuracy']:.2f}% (the shallow model alone {outcome['shallow_accuracy']:.2f}%)")
    print(
        f"deferred to the deep model: {outcome['deferral']:.1%} of the images ({outcome['num_deferred']}); "
        f"its answer stands for {outcome['num_answered_by_deep']}"
    )
    if "accuracy" in outcome and outcome["num_deferred"]:
        print(
            f"on the deferred ones the shallow model has {outcome['shallow_accuracy_on_deferred']:.2f}%, "
            f"the deep one {outcome['deep_accuracy_on_deferred']:.2f}%"
        )
    if outcome["most_deferred"]:
        by = "" if "accuracy" in outcome else ", by the shallow model's answers"
        shares = (f"{name}: {part / total:.0%} ({part} of {total})" for name, part, total in outcome["most_deferred"])
        print(f"classes that defer most{by}: {', '.join(shares)}")
    print(_describe_flops(outcome))
    print(_describe_time(outcome))
    left_out = (
        f", {outcome['num_unreadable']} unreadable left out ({errors_file(output)})"
        if outcome["num_unreadable"]
        else ""
    )
    print(f"{outcome['num_images']} images{left_out}; result in {output}")


def _describe_flops(outcome: dict[str, Any]) -> str:
    text = f"FLOPs: {report.format_flops(outcome['flops'])} an image"
    if math.isnan(outcome["flops_saving"]):  # it was not loaded
        return f"{text}; those of the deep model are not known"
    deep = report.format_flops(outcome["deep_flops"])
    return f"{text}; the deep model on every image: {deep}, {_times(outcome['flops_saving'], 'many')}"


def _describe_time(outcome: dict[str, Any]) -> str:
    if math.isnan(outcome["images_per_second"]):
        return "time: none; the interrupted run had answered every image"
    text = f"time: {outcome['seconds']:.1f} s, {outcome['images_per_second']:.1f} images/s"
    if math.isnan(outcome["time_saving"]):
        return f"{text}; that of the deep model is not known"
    deep = f"about {outcome['deep_seconds']:.1f} s by its time on the deferred ones"
    return f"{text}; the deep model on every image: {deep}, {_times(outcome['time_saving'], 'long')}"


def _times(saving: float, word: str) -> str:
    return f"{saving:.2f} times as {word}" + (": the cascade saves nothing" if saving < 1 else "")


if __name__ == "__main__":
    cli.run(main, get_args_parser())
