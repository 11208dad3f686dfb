"""Image files -> what a model sees: decoded as timm's own dataset does, by this process or by others, in batches.

In step 5 what is decoded is kept for later models.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.util
import os
import secrets
import shutil
import stat
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import create_transform

from clcnet import distributed
from clcnet.classifiers.classifier import Classifier
from clcnet.data.images import IMAGE_FORMATS, ImageSet
from clcnet.memory import free_bytes, num_cores, return_freed_memory

SHARED = Path("/dev/shm")
_KEPT = "clcnet-"  # how the folders of decoded images begin there
_KEPT_HEADER = struct.Struct("<IIB")  # width, height, number of the remark
_WORKER_BYTES = 300 * 2**20  # what a decoding process may take of the memory, roughly
_LONGEST_TEMPORARY = 70  # bytes of a folder; of a socket's path in it, Unix takes 107
_LITTLE_SHARED_MEMORY = 2**30
_REMARK = "clcnet remark"  # its number, in PIL's `info`
REMARKS = (  # on images of which a model sees less than there is; stores keep their numbers: append only
    "",
    "values beyond 8 bits, which are clipped",
    "fractions from 0 to 1, which become black",
    "an orientation tag, which is not heeded",
    "transparency, which is dropped",
)


def default_workers(prefetched_bytes: int) -> int:
    """Decoding processes when the user names no number: one a core but one, among the processes of one torchrun.

    No more than fit into the memory, and than hand over batches of so many bytes each in half of the shared memory.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = [num_cores() // processes - 1, (free_bytes() or 2**40) // processes // _WORKER_BYTES]
    if SHARED.is_dir():
        room.append(shutil.disk_usage(SHARED).free // 2 // processes // prefetched_bytes)
    return max(1, min(room))


Example = tuple[torch.Tensor, int, str, int]  # (height, width, channels) uint8, its place, why unread, its remark
Loaded = tuple[torch.Tensor, dict[int, str], dict[int, int]]  # (B, height, width, channels) uint8; by place: as above


def collate(batch: Sequence[Example]) -> Loaded:
    """Make a batch, maybe of nothing."""
    if not batch:
        return torch.empty(0), {}, {}
    images = torch.utils.data.default_collate([image for image, *_ in batch])
    reasons = {place: reason for _, place, reason, _ in batch if reason}
    return images, reasons, {place: remark for _, place, _, remark in batch if remark}


class DecodedImages:
    """Images that may be asked for again, by their place: one that goes on is decoded once for all models.

    They lie in shared memory, in a quarter of what is free there and of all memory; the processes of a machine share a
    folder of files, one an image. What does not fit, or lies on another machine, is decoded again: nothing depends on
    what is kept but time.
    """

    def __init__(self) -> None:
        name = distributed.broadcast(f"{_KEPT}{os.getpid()}-{secrets.token_hex(8)}")
        self._folder, self._least_free = SHARED / name, 0
        with contextlib.suppress(OSError):  # there is none, and nothing is kept
            self._remove_left_behind()
            free, of_memory = shutil.disk_usage(SHARED).free, free_bytes()
            self._least_free = free - min(free, free if of_memory is None else of_memory) // 4
            self._folder.mkdir(mode=0o700, exist_ok=True)

    def _remove_left_behind(self) -> None:
        """What runs left that were killed; of a live one, in another container, it would cost time alone."""
        for folder in SHARED.glob(f"{_KEPT}*-*"):
            try:
                os.kill(int(folder.name.split("-")[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, place: int, mode: str) -> Path:
        return self._folder / f"{place}.{mode}"

    def put(self, place: int, image: Image.Image) -> None:
        """Keep an image, if there is room."""
        path, size = self._path(place, image.mode), image.width * image.height * len(image.getbands())
        try:
            if shutil.disk_usage(self._folder).free - size > self._least_free:
                path.write_bytes(_KEPT_HEADER.pack(*image.size, image.info[_REMARK]) + image.tobytes())
        except OSError:  # full by now, or no such folder
            with contextlib.suppress(OSError):
                path.unlink()

    def take(self, place: int, mode: str) -> Image.Image | None:
        """An image that is kept."""
        try:
            content = self._path(place, mode).read_bytes()
        except OSError:
            return None
        width, height, remark = _KEPT_HEADER.unpack_from(content)
        image = Image.frombytes(mode, (width, height), memoryview(content)[_KEPT_HEADER.size :])
        image.info[_REMARK] = remark
        return image

    def drop(self, places: Iterable[int]) -> None:
        """Keep these no longer."""
        for place in places:
            for mode in ("RGB", "L"):
                self._path(place, mode).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep nothing any more."""
        shutil.rmtree(self._folder, ignore_errors=True)


class ImageDataset(torch.utils.data.Dataset[Example]):
    """Images as a model sees them, in bytes; for a file that cannot be read a black one, and the reason.

    They are taken from `decoded` where an earlier model's are kept there, and kept there for later ones.
    """

    def __init__(self, images: ImageSet, classifier: Classifier, decoded: DecodedImages | None = None) -> None:
        self._decoded = decoded
        self._root, self._source = os.fspath(images.root), images.source
        self._files = np.array([os.fsencode(file) for file in images.files])  # one block, shared with forked workers
        self.mode, self.input_size = classifier.image_mode, classifier.input_size
        self._transform = create_transform(**classifier.data_config, is_training=False, use_prefetcher=True)
        self._most_pixels = Image.MAX_IMAGE_PIXELS  # which a process that is not forked would not know

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> Example:
        try:
            image = self._kept_or_read(position)
            # timm views the channels in front; a device copies them there faster
            return self._transform(image).permute(1, 2, 0), position, "", image.info[_REMARK]
        except Exception as error:  # PIL's decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
            channels, *sides = self.input_size
            return torch.zeros(*sides, channels, dtype=torch.uint8), position, self._reason(position, error), 0

    def path(self, position: int) -> str:
        """Where the image lies."""
        return os.path.join(self._root, os.fsdecode(self._files[position]))

    def _kept_or_read(self, position: int) -> Image.Image:
        Image.MAX_IMAGE_PIXELS = self._most_pixels
        image = self._decoded.take(position, self.mode) if self._decoded else None
        if image is not None:
            _refuse_strip(image.size, self.input_size)
            return image
        image = self.read(position)
        if self._decoded:
            self._decoded.put(position, image)
        return image

    def read(self, position: int) -> Image.Image:
        """Decode an image in the model's mode."""
        image = self._source.open(os.fsdecode(self._files[position])) if self._source else self.path(position)
        return read_image(image, self.mode, self.input_size)

    def _reason(self, position: int, error: Exception) -> str:
        if isinstance(error, UnidentifiedImageError):
            return "cannot identify image file"  # without PIL's name for what it was given
        path = self.path(position)  # which PIL likes to repeat
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        text = text.replace(repr(path), "").replace(path, "")
        if isinstance(error, Image.DecompressionBombError):
            text += "; --max-image-pixels lets it in"
        return " ".join(text.split()) or type(error).__name__


def read_image(
    image: Image.Image | BinaryIO | str | os.PathLike[str], mode: str, input_size: tuple[int, int, int]
) -> Image.Image:
    """Decode an image as timm's dataset does: first frame, orientation tag unheeded, in the model's mode.

    Its `info[_REMARK]` is the number of what of it the model does not see. What is no readable image raises nearly
    everything, as PIL's decoders do.
    """
    if isinstance(image, Image.Image):
        if image.format not in (None, "MPO", *IMAGE_FORMATS):  # MPO: a JPEG of several pictures, opened as JPEG
            raise ValueError(f"its format, {image.format}, is not one of {' '.join(IMAGE_FORMATS)}; convert it first")
        _refuse_strip(image.size, input_size)
        converted = image.convert(mode)
        converted.info[_REMARK] = _remark_on(image)
        return converted
    if isinstance(image, str | os.PathLike) and not stat.S_ISREG(os.stat(image).st_mode):
        raise OSError("a directory, pipe or device, not a file")  # a pipe would be waited for forever
    with Image.open(image, formats=[*IMAGE_FORMATS]) as opened:
        return read_image(opened, mode, input_size)


def _remark_on(image: Image.Image) -> int:
    """What is lost when PIL brings a decoded image into 8 bits of gray or red, green and blue: its place in REMARKS."""
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = cast(tuple[float, float], image.getextrema())
        if low < 0 or high > 255:
            return 1
        if image.mode == "F" and high <= 1:
            return 2
    with contextlib.suppress(Exception):  # a broken tag is no broken image
        if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # PIL turns a TIFF itself
            return 3
    alpha = image.convert("RGBA").getchannel("A").getextrema() if image.has_transparency_data else (255, 255)
    return 4 if cast(tuple[int, int], alpha)[0] < 255 else 0


def sum_up_remarks(remarks: Iterable[int]) -> str:
    """One line on all of a run's remarks, as timm's way of reading images explains them; empty where there are none."""
    said = "; ".join(f"{count} with {REMARKS[remark]}" for remark, count in Counter(remarks).most_common())
    return f"images that the models see otherwise than a viewer shows them, as in timm: {said}" if said else ""


def _refuse_strip(size: tuple[int, int], input_size: tuple[int, int, int]) -> None:
    """Refuse an image so long and thin that bringing its short side to the model's size would fill the memory."""
    pixels = max(input_size[1:]) ** 2 * max(size) / max(min(size), 1)
    if Image.MAX_IMAGE_PIXELS and pixels > 2 * Image.MAX_IMAGE_PIXELS:  # twice, as PIL itself
        raise ValueError(f"{size[0]}x{size[1]} pixels are too long and thin to be resized ({pixels:.1e} pixels)")


def loaded_batches(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Loaded]:
    """The loader's batches; a decoding process that died, or could not be started, is an error with advice."""
    return_freed_memory()
    if loader.num_workers:
        _shorten_temporary_folder()
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as error:
        advice = _advice(error)
        if not advice:
            raise
        raise ChildProcessError(advice) from error


def _shorten_temporary_folder() -> None:
    """Have processes meet in a folder of a short name: beyond Unix's limit they would wait for each other forever."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # which remembers it, and hands it on to children
        finally:
            tempfile.tempdir = before


def _advice(error: Exception) -> str:
    """What to do about decoding processes that the system did not allow; empty for other errors."""
    text = str(error)
    if "can't start new thread" in text or isinstance(error, BlockingIOError):
        return "no more processes or threads may be started here (ulimit -u); give fewer --workers, or --workers 0"
    if "Too many open files" in text or (isinstance(error, OSError) and error.errno == errno.EMFILE):
        return "too many files are open for more processes (ulimit -n); give fewer --workers, or --workers 0"
    # without the DataLoader's words where the process died while it handed a batch over
    if not isinstance(error, ConnectionError | EOFError) and "DataLoader worker" not in text:
        return ""
    size = shutil.disk_usage(SHARED).total if SHARED.is_dir() else 0
    if size < _LITTLE_SHARED_MEMORY or "Bus error" in text or "shared memory" in text:
        return (
            f"a process that decodes images died: {SHARED}, where batches are handed over, holds {size >> 20} MiB; "
            "give it more (docker run --shm-size=2g), or a smaller --batch-size, or --workers 0"
        )
    return "a process that decodes images died, perhaps for want of memory; try again with fewer --workers"
