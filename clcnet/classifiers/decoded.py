"""Decoded images that may be asked for again, in shared memory: an image that goes on is decoded once for all models.

All processes of a machine share a folder of files, one an image. What does not fit, or lies on another machine, is
decoded again: nothing depends on what is kept here but time.
"""

import contextlib
import os
import secrets
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from clcnet import distributed
from clcnet.memory import free_bytes

SHARED = Path("/dev/shm")
REMARK = "clcnet remark"  # in PIL's `info`
_HEADER = struct.Struct("<III")  # width, height, bytes of the remark
_PREFIX = "clcnet-"


class DecodedImages:
    """Images by their place, in a quarter of the free memory, and of the shared one, which batches need too."""

    def __init__(self) -> None:
        name = distributed.broadcast(f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}")
        self._folder, self._least_free = SHARED / name, 0
        with contextlib.suppress(OSError):  # there is none, and nothing is kept
            self._remove_left_behind()
            free, of_memory = shutil.disk_usage(SHARED).free, free_bytes()
            self._least_free = free - min(free, free if of_memory is None else of_memory) // 4
            self._folder.mkdir(mode=0o700, exist_ok=True)

    def _remove_left_behind(self) -> None:
        """What runs left that were killed; of a live one, in another container, it would cost time alone."""
        for folder in SHARED.glob(f"{_PREFIX}*-*"):
            try:
                os.kill(int(folder.name.split("-")[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, place: int, mode: str) -> Path:
        return self._folder / f"{place}.{mode}"

    def put(self, place: int, image: Image.Image) -> None:
        """Keep an image, if there is room."""
        path, size = self._path(place, image.mode), image.width * image.height * len(image.getbands())
        remark = image.info.get(REMARK, "").encode()
        try:
            if shutil.disk_usage(self._folder).free - size > self._least_free:
                path.write_bytes(_HEADER.pack(*image.size, len(remark)) + remark + image.tobytes())
        except OSError:  # full by now, or no such folder
            with contextlib.suppress(OSError):
                path.unlink()

    def take(self, place: int, mode: str) -> Image.Image | None:
        """An image that is kept."""
        try:
            content = self._path(place, mode).read_bytes()
        except OSError:
            return None
        width, height, length = _HEADER.unpack_from(content)
        pixels = _HEADER.size + length
        image = Image.frombytes(mode, (width, height), memoryview(content)[pixels:])
        image.info |= {REMARK: content[_HEADER.size : pixels].decode()} if length else {}
        return image

    def drop(self, places: Iterable[int]) -> None:
        """Keep these no longer."""
        for place in places:
            for mode in ("RGB", "L"):
                self._path(place, mode).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep nothing any more."""
        shutil.rmtree(self._folder, ignore_errors=True)
