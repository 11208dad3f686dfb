"""A lake of images through a cascade on Ray, on one machine or a cluster: `pip install "ray[data]"`, then

    python examples/ray_batch.py --policy weights/cascade.json --images photos --output answers
    python examples/ray_batch.py --policy weights/cascade.json --images lake.parquet --output answers --workers 8

Input: a folder of image files, or Parquet with the columns `path` and `bytes`. Output: a folder of Parquet, a row an
image: path, label, class, confidence, answered_by, and error, empty unless the image has no answer. Each worker holds
a cascade of its own; the policy and its models must be found under the same names on every machine.
"""

import argparse
from typing import Any

import numpy as np
import ray

from clcnet import Cascade
from clcnet.data.images import IMAGE_EXTENSIONS


class Classify:
    """What a worker does with a batch."""

    def __init__(self, policy: str, device: str | None) -> None:
        self.cascade = Cascade.from_policy(policy, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        found = self.cascade(list(batch["bytes"]))
        return {
            "path": batch["path"],
            "label": found.labels,
            "class": np.array(found.names),
            "confidence": found.confidences,
            "answered_by": found.answered_by,
            "error": np.array([found.errors.get(place, "") for place in range(len(found.labels))]),
        }


def main(args: argparse.Namespace) -> None:
    if args.images.endswith(".parquet"):
        images = ray.data.read_parquet(args.images, columns=["path", "bytes"])
    else:
        extensions = [extension.lstrip(".") for extension in IMAGE_EXTENSIONS]
        images = ray.data.read_binary_files(args.images, include_paths=True, file_extensions=extensions)
    images.map_batches(
        Classify,
        fn_constructor_args=(args.policy, args.device),
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        batch_size=args.batch_size,
        num_gpus=args.gpus,
    ).write_parquet(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="cascade.json of train_custom_data.py or of step 4")
    parser.add_argument("--images", required=True, help="a folder, or Parquet with the columns path and bytes")
    parser.add_argument("--output", required=True, help="folder of Parquet to write")
    parser.add_argument("--workers", type=int, default=2, help="cascades at once")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker; a fraction shares one")
    parser.add_argument("--device", help="cuda or cpu (default: the best one there)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at once")
    main(parser.parse_args())
