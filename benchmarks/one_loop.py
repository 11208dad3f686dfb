"""One run over a folder of images, in a process of its own, and its images a second: step 3's, or a bare timm loop.

    python -m benchmarks.one_loop step3 local-dir:../shared/cifar10/shallow ../shared/cifar10/imagenet_splits_5

For bench_generate: a process that ran a model before would hand its memory on to the next run.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from clcnet import cli
from clcnet.memory import keep_freed_memory

if __name__ == "__main__" and "bare" not in sys.argv[1:2]:
    cli.leave_cores_to_decoders()
    keep_freed_memory()

import torch
from timm.data import ImageDataset, create_loader

from clcnet.classifiers.classifier import Classifier, load_classifier
from clcnet.classifiers.kept import classify_missing, kept_answers
from clcnet.data.images import ImageSet, list_images
from generate_data_for_CLCNet import write_table

LOOPS = ("bare", "bare, set up", "step3")


def run_bare(classifier: Classifier, folder: Path, batch_size: int, workers: int) -> int:
    """Go through a folder with timm's dataset, loader and model, and bring the answers to main memory."""
    dataset = ImageDataset(folder)
    loader = create_loader(
        dataset, batch_size=batch_size, num_workers=workers, device=classifier.device, **classifier.data_config
    )
    with torch.inference_mode(), torch.autocast(classifier.device.type, classifier.amp, enabled=bool(classifier.amp)):
        for images, _ in loader:
            classifier.model(images).cpu()
    return len(dataset)


def run_step3(classifier: Classifier, folder: Path, batch_size: int, workers: int) -> int:
    """Step 3, from listing the folder to the finished table."""
    images = list_images(folder)
    make_table(classifier, images, batch_size, workers)
    return len(images)


def make_table(classifier: Classifier, images: ImageSet, batch_size: int, workers: int) -> None:
    """Step 3 with an empty store, without its words and its look at what the classes are called."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        kept_answers(Path(scratch, "store"), classifier, images) as kept,
    ):
        classify_missing(kept, classifier, images, None, batch_size, workers)
        assert kept is not None, "there is one process"
        kept.targets = images.targets
        write_table(kept, Path(scratch, "table.csv"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=LOOPS, help="which loop; a bare one may be set up as step 3 sets itself up")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--amp", choices=("bfloat16", "float16"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    classifier = load_classifier(args.model, amp=args.amp)
    run: Callable[[Classifier, Path, int, int], int] = run_step3 if args.loop == "step3" else run_bare
    start = time.perf_counter()
    num_images = run(classifier, args.folder, args.batch_size, args.workers)
    print(num_images / (time.perf_counter() - start))


if __name__ == "__main__":
    main()
