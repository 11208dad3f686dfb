"""Step 5: classify a folder of your own images with the cascade; the deep model sees only the images that need it.

    python eval_custom_data.py --custom-data photos --shallow-model tf_efficientnet_b0.aa_in1k --deep-model tf_efficientnet_b4.aa_in1k

Input: a folder of images, in class folders (accuracy is reported), nested or flat (it is not); the weight of train_custom_data.py.
Output: custom-data-result.csv, one row an image, with a header: file, predict and GT (class indices as the shallow model numbers
them; GT is empty where the class is not known), class_name, confidence, answered_by, and both models' own answers and
confidences. Images that cannot be read are left out and listed in RESULT.errors.csv. For several GPUs or machines:
torchrun --nproc-per-node N eval_custom_data.py ...

Exit codes: 0 done, 2 bad input, 3 done but some images were left out, 130 interrupted (go on with --resume).
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from clcnet import CLCNet, Cascade, cli, distributed
from clcnet.streaming import DEEP
from clcnet.classifiers import Classifier, load_classifier, resolve_device
from clcnet.files import check_output
from clcnet.images import list_images
from clcnet.inference import Summary, answer_folder, errors_file, known_targets, name_classes


def get_args_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--custom-data", type=Path, required=True, metavar="FOLDER", help="the images, in any folder structure")
    add("--labels", type=Path, metavar="FILE", help="labels of a flat folder: CSV file,label; or the ILSVRC2012 ground truth")
    add("--class-map", type=Path, metavar="FILE", help="class names in the model's order, one a line, as in timm")
    add("--weight", type=Path, default=cli.WEIGHTS_DIR / "CLCNet_custom.zip", metavar="FILE", help="CLCNet weights")
    add("--threshold", type=cli.threshold, default=0.5, help="images with a confidence below it go to the deep model")
    add("--num_classes", type=cli.number_of_classes, metavar="N", help="classes of both models (default: the models' own)")
    add("--result", type=Path, default=cli.ROOT / "custom-data-result.csv", metavar="FILE", help="CSV to write")
    for stage, model in (("shallow", "tf_efficientnet_b4.aa_in1k"), ("deep", "tf_efficientnet_b7.ra_in1k")):
        group = parser.add_argument_group(f"the {stage} model")
        group.add_argument(
            f"--{stage}-model", default=model, metavar="NAME", help="timm model, local-dir:FOLDER or hf-hub:NAME"
        )
        group.add_argument(
            f"--{stage}-model-weight", type=Path, metavar="FILE", help=".pth, .pth.tar or .safetensors (default: timm's weights)"
        )
        group.add_argument(
            f"--{stage}-model-FLOPs",
            type=cli.positive_float,
            metavar="BILLIONS",
            help="billions of multiply-adds an image (default: counted)",
        )
    cli.add_preprocessing_arguments(parser)
    cli.add_device_arguments(parser)
    return parser


def load_model(args: argparse.Namespace, stage: str, device: torch.device) -> Classifier:
    """Load the shallow or the deep classifier, each by its own name and weights, and print what it is."""
    classifier = load_classifier(
        getattr(args, f"{stage}_model"),
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
    if distributed.is_main():
        print(f"{stage} model: {classifier.describe()}", flush=True)
    return classifier


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Write the result file, print the summary and return it. Unreadable images are counted, not raised."""
    torch.manual_seed(args.seed)
    output = check_output(args.result)
    device = resolve_device(args.device)
    images = list_images(args.custom_data, class_map=args.class_map, labels=args.labels)
    clcnet = CLCNet.load(args.weight, device=device)
    with distributed.processes():
        shallow, deep = (load_model(args, stage, device) for stage in ("shallow", "deep"))
        cascade = Cascade(shallow, deep, clcnet, args.threshold)
        targets, note = known_targets(images, shallow, by_position=args.class_map is not None)
        if distributed.is_main():
            print(f"{len(images)} images in {args.custom_data}{f'; {note}' if note else ''}", flush=True)
        class_names = name_classes(images, targets, shallow)
        summary = answer_folder(cascade, images, output, targets, class_names, args.batch_size, args.workers)
        flops = [args.shallow_model_FLOPs or shallow.flops, args.deep_model_FLOPs or deep.flops]
        outcome = summarise(summary, flops)
        if distributed.is_main():
            print_summary(outcome, output)
    return outcome


def summarise(summary: Summary, flops: list[float]) -> dict[str, Any]:
    """All figures of the last lines: accuracies in percent, shares as fractions, FLOPs in billions of multiply-adds."""
    verdicts = summary.verdicts
    cascade_flops = flops[0] + summary.deferral * flops[1]
    outcome = {
        "num_images": len(verdicts),
        "num_unreadable": len(summary.unreadable),
        "num_deferred": int(verdicts.deferred.sum()),
        "num_answered_by_deep": int((verdicts.answered_by == DEEP).sum()),
        "deferral": summary.deferral,
        "flops": cascade_flops,
        "flops_saving": flops[1] / cascade_flops,
        "time_saving": summary.stopwatch.time_saving,
        "seconds": summary.stopwatch.wall,
        "images_per_second": summary.stopwatch.images_per_second,
        "most_deferred": summary.most_deferred(),
    }
    return outcome | (verdicts.accuracies(summary.targets) if summary.has_labels else {})


def print_summary(outcome: dict[str, Any], output: Path) -> None:
    """Print accuracy where known, deferral, FLOPs, time, and where the result is."""
    if "accuracy" in outcome:
        print(f"top-1 {outcome['accuracy']:.2f}%; the shallow model alone {outcome['shallow_accuracy']:.2f}%")
        if outcome["num_deferred"]:
            print(
                f"on the deferred images: shallow {outcome['shallow_accuracy_on_deferred']:.2f}%, "
                f"deep {outcome['deep_accuracy_on_deferred']:.2f}%"
            )
    print(
        f"{outcome['num_deferred']} of {outcome['num_images']} images deferred ({outcome['deferral']:.1%}); "
        f"the deep answer stands for {outcome['num_answered_by_deep']}"
    )
    for name, deferred, total in outcome["most_deferred"]:
        print(f"    {name}: {deferred} of {total} ({deferred / total:.0%})")
    print(
        f"{outcome['flops']:.4g} billion multiply-adds an image, {outcome['flops_saving']:.2f} times fewer than the deep model's; "
        + describe_time(outcome["time_saving"])
    )
    left_out = f"; {outcome['num_unreadable']} unreadable left out, see {errors_file(output)}" if outcome["num_unreadable"] else ""
    print(f"{outcome['num_images']} images, {outcome['images_per_second']:.1f} images/s, result in {output}{left_out}")


def describe_time(time_saving: float) -> str:
    """The saving in time, beside that in FLOPs."""
    if math.isnan(time_saving):
        return "no image saw the deep model, so its time is not known"
    return f"{time_saving:.2f} times faster than the deep model on every image would have been here"


if __name__ == "__main__":
    cli.run(main, get_args_parser())
