"""What a model said about every image, kept on disk, so that no model sees an image twice.

An entry is a folder named by a hash of the model (architecture, weights, preprocessing, precision) and of the images
(names, sizes, times of change): `probs.npy`, (N, C) float32 in the order of the image set, `done.npy`, (N,) bool, and
`about.json` with what was measured along the way. An entry may be partial: a cascade at one threshold asks the deep
model about deferred images only, and an interrupted run leaves what it finished.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from clcnet.data.images import ImageSet
from clcnet.files import atomic_path, output_lock, reserve


def images_key(images: ImageSet) -> str:
    """Changes as soon as an image is added, removed, renamed or written to."""
    digest = hashlib.blake2b(digest_size=16)
    for file in images.files:
        try:
            status = os.stat(images.root / file)
            state = status.st_size, status.st_mtime_ns
        except OSError:  # a link to nothing, or gone since it was listed: it will be left out as unreadable
            state = -1, -1
        digest.update(b"%b\0%d\0%d\n" % (file.encode("utf-8", "surrogateescape"), *state))
    return digest.hexdigest()


class OutputCache:
    """One entry: the outputs of one model on one set of images. Open it with `OutputCache.open`."""

    def __init__(self, folder: Path, num_images: int, num_classes: int) -> None:
        self.folder = folder
        self.about = self._read_about()
        self.probs, begun = self._array("probs.npy", (num_images, num_classes), np.float32)
        self.done, _ = self._array("done.npy", (num_images,), np.bool_)
        if begun:
            self.done[:] = False

    @classmethod
    @contextmanager
    def open(cls, root: Path, model_key: str, images: ImageSet, num_classes: int) -> Iterator["OutputCache"]:
        """Open or begin an entry under `root`; OSError if another run is filling the same one."""
        name = hashlib.blake2b(f"{model_key} {images_key(images)}".encode(), digest_size=12).hexdigest()
        with output_lock(root / name / "probs.npy"):
            yield cls(root / name, len(images), num_classes)

    def _array(self, name: str, shape: tuple[int, ...], dtype: type) -> tuple[NDArray[Any], bool]:
        """Open a file that holds an array, or begin it; returns whether it was begun."""
        path = self.folder / name
        try:
            array = open_memmap(path, mode="r")  # "r+" would quietly lengthen a file that was cut short
            if array.shape == shape and array.dtype == dtype and not path.is_symlink():  # or it wrote to the target
                return open_memmap(path, mode="r+"), False
        except (OSError, ValueError):  # none yet, or broken
            pass
        with atomic_path(path) as temporary:
            open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            reserve(temporary)
        return open_memmap(path, mode="r+"), True

    def _read_about(self) -> dict[str, Any]:
        try:
            about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or broken: what it held is measured again
            return {}
        return about if isinstance(about, dict) else {}

    def missing(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the images that the model has not seen."""
        left: NDArray[np.int64] = indices[~self.done[indices]]
        return left

    def store(self, indices: NDArray[np.int64], probs: NDArray[np.float32]) -> None:
        """Keep a batch. It counts as done only once its probabilities are written."""
        self.probs[indices] = probs
        self.done[indices] = True

    def remember(self, **facts: Any) -> None:
        """Keep facts about the model beside its outputs."""
        self.about |= facts
        with atomic_path(self.folder / "about.json") as temporary:
            temporary.write_text(json.dumps(self.about, indent=1), encoding="utf-8")
