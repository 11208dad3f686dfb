"""Listing an image folder: which images there are, in which order, of which class, in which fold.

Three layouts are understood: class folders, the five-part layout `split_part_1..5/<class>/<file>`, and a flat folder,
with or without a file of labels. Nothing here opens an image; those that a run could not open are named in a file
beside its output.
"""

import csv
import dataclasses
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clcnet.files import atomic_path

NUM_FOLDS = 5
PART_NAMES = tuple(f"split_part_{part}" for part in range(1, NUM_FOLDS + 1))
IMAGE_FORMATS = {  # PIL's names; nothing else is decoded, whatever a file is called: for EPS, PIL runs Ghostscript
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
IMAGE_EXTENSIONS = tuple(extension for extensions in IMAGE_FORMATS.values() for extension in extensions)
_DIGITS = re.compile(r"([0-9]+)")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The images of one data set, in the order of its tables.

    Attributes:
        root: the folder that was listed.
        files: where each image lies below `root`, with forward slashes; strings, because a million pathlib.Path would
            take half a minute to make.
        names: each image's name in a table: the bare file name while bare names are unique in the data set, else the
            path from the class folder's parent, else the path from `root`; always with forward slashes.
        targets: (N,) index into `class_names`; -1 where the class is not known.
        class_names: all classes of the whole data set, in natural order, as timm numbers them.
        folds: (N,) from 0 to 4: the part that holds the image, or its class-balanced fold where there are no parts.
    """

    root: Path
    files: list[str]
    names: list[str]
    targets: np.ndarray
    class_names: list[str]
    folds: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Where one image lies."""
        return self.root / self.files[index]

    @property
    def paths(self) -> list[Path]:
        """Where all images lie, made anew at each call."""
        return [self.root / file for file in self.files]

    @property
    def has_labels(self) -> bool:
        """Whether the class of every image is known."""
        return bool(self.class_names) and bool((self.targets >= 0).all())

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images at `indices`, in that order, with the classes of the whole data set."""
        return dataclasses.replace(
            self,
            files=[self.files[index] for index in indices],
            names=[self.names[index] for index in indices],
            targets=self.targets[indices],
            folds=self.folds[indices],
        )


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Sort key under which `img2` comes before `img10`, without regard to case; as timm sorts classes and files."""
    pieces: list[str | int] = [*_DIGITS.split(text.lower())]
    pieces[1::2] = map(int, pieces[1::2])
    return pieces, text


def list_images(
    folder: Path | str,
    class_map: Path | str | None = None,
    labels: Path | str | None = None,
    any_folder: bool = False,
) -> ImageSet:
    """List the images of `folder`, in natural order of class and file name.

    The order is the same on every machine, and whether or not the folder is cut into five parts. Files without an
    image's extension and names that begin with a dot are passed over. In nested folders the class is the folder that
    holds the image, as in timm.

    Args:
        folder: class folders, the five-part layout, or a flat folder of images.
        class_map: text file with one class folder a line, in the order of their indices (timm's format).
        labels: for a folder without class folders: a CSV file `file,label`, or the official
            ILSVRC2012_validation_ground_truth.txt with the development kit's meta.mat beside it.
        any_folder: take folders for what they are: where images lie beside folders, or a class map knows none of the
            folders, no image has a class. Otherwise these are errors.

    Raises:
        OSError: the folder or a file named is missing or cannot be read.
        ValueError: no images, a missing part, a class that the map does not know, an image without a label.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"image folder {root} does not exist; check the path")
    if not root.is_dir():
        raise NotADirectoryError(f"image folder {root} is a file; name the folder that holds the images")
    relative = _in_natural_order(_walk(root))
    if not relative:
        raise ValueError(f"image folder {root} holds no images (looked for {' '.join(IMAGE_EXTENSIONS)})")
    parts = _parts(root, relative)
    classes = _classes(root, relative, parts, any_folder)
    if labels is not None:
        if classes is not None:
            raise ValueError(
                f"image folder {root} has class folders, so --labels {labels} would contradict them; leave one out"
            )
        classes, known_classes = _read_labels(Path(labels), relative)
    elif classes is not None:
        known_classes = sorted(set(classes), key=natural_key)
    else:
        known_classes = []
    if class_map is not None:
        known_classes = _read_class_map(Path(class_map))
        if any_folder and labels is None and not set(known_classes) & set(classes or ()):
            classes = None
        _check_class_map(Path(class_map), known_classes, classes or [])
    index_of = {name: index for index, name in enumerate(known_classes)}
    targets = np.array(
        [index_of[name] for name in classes] if classes is not None else [-1] * len(relative), dtype=np.int64
    )
    names = _unique_names(relative)
    folds = np.array(parts, dtype=np.int64) if parts is not None else balanced_folds(names, targets)
    return ImageSet(root, relative, names, targets, known_classes, folds)


def balanced_folds(names: Sequence[str], targets: np.ndarray, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Cut images into folds of equal size in which every class is spread evenly, by nothing but their names.

    Inside a class, images go round the folds in the order of a hash of their names: the same on every machine and for
    every order of the file system, and unrelated to the order in which they were recorded.

    Args:
        names: N names, all different.
        targets: (N,) classes.
        num_folds: how many folds.

    Returns:
        (N,) fold numbers from 0; fold sizes, and each class's counts over the folds, differ by at most one.
    """
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    order = sorted(range(len(names)), key=lambda index: (targets[index], hashes[index]))
    folds = np.empty(len(names), dtype=np.int64)
    folds[order] = np.arange(len(names)) % num_folds
    return folds


def _walk(root: Path) -> list[str]:
    """All image files below `root`, relative to it; symbolic links are followed, but never in a circle."""
    found: list[str] = []
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for directory, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(directory).relative_to(root).as_posix()
        prefix = "" if inside == "." else inside + "/"
        found += [prefix + name for name in files if _is_image(name)]
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _in_natural_order(relative: list[str]) -> list[str]:
    """Sort by class folder and file name; where both are the same, by the whole path."""
    split = [(*_folder_and_file(path), path) for path in relative]
    folders = sorted({folder for folder, _, _ in split}, key=natural_key)
    place = {folder: position for position, folder in enumerate(folders)}  # quicker to compare than keys
    return [path for *_, path in sorted((place[folder], natural_key(name), path) for folder, name, path in split)]


def _folder_and_file(path: str) -> tuple[str, str]:
    """The name of the folder that holds a file, empty for the root, and the file's own name."""
    folder, name = f"/{path}".rsplit("/", 2)[-2:]
    return folder, name


def _parts(root: Path, relative: list[str]) -> list[int] | None:
    """The part of each image, from 0, or None where the folder is not cut into parts."""
    present = [name for name in PART_NAMES if (root / name).is_dir()]
    if not present:
        return None
    if len(present) < NUM_FOLDS:
        missing = ", ".join(name for name in PART_NAMES if name not in present)
        raise ValueError(f"image folder {root} holds {', '.join(present)} but not {missing}; give all five parts")
    tops = [path.partition("/")[0] for path in relative]
    stray = [path for path, top in zip(relative, tops, strict=True) if top not in PART_NAMES]
    if stray:
        raise ValueError(f"image folder {root}: {stray[0]} lies outside the five parts; move it into one of them")
    parts = [PART_NAMES.index(top) for top in tops]
    empty = [PART_NAMES[part] for part in range(NUM_FOLDS) if part not in set(parts)]
    if empty:
        raise ValueError(f"image folder {root / empty[0]} holds no images; give all five parts")
    return parts


def _classes(root: Path, relative: list[str], parts: list[int] | None, any_folder: bool) -> list[str] | None:
    """The class folder's name of each image, or None in a flat folder."""
    depth = 0 if parts is None else 1
    flat = [path for path in relative if path.count("/") == depth]
    if len(flat) == len(relative) and parts is None:
        return None
    if flat and any_folder:
        return None
    if flat:
        raise ValueError(f"image folder {root}: {flat[0]} lies beside the class folders; move it into one of them")
    return [_folder_and_file(path)[0] for path in relative]


def _unique_names(relative: list[str]) -> list[str]:
    for name_of in (_bare_name, _class_and_file):
        names = [name_of(path) for path in relative]
        if len(set(names)) == len(names):
            return names
    return relative


def _bare_name(path: str) -> str:
    return path.rpartition("/")[2]


def _class_and_file(path: str) -> str:
    return "/".join(path.rsplit("/", 2)[-2:])


def names_of(image_set: ImageSet, index: int) -> set[str]:
    """All names under which a table may speak of one image: bare, with its class folder, from the root."""
    file = image_set.files[index]
    return {_bare_name(file), _class_and_file(file), file}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _read_class_map(path: Path) -> list[str]:
    if path.suffix.lower() not in (".txt", ""):
        raise ValueError(
            f"class map {path}: only text files are read, one class folder a line; timm's pickles may run code"
        )
    known = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    repeated = [name for name, count in Counter(known).items() if count > 1]
    if repeated:
        raise ValueError(f"class map {path} names {repeated[0]!r} more than once")
    return known


def _check_class_map(path: Path, known: list[str], classes: list[str]) -> None:
    unknown = sorted(set(classes) - set(known), key=natural_key)
    if unknown:
        raise ValueError(f"class folder {unknown[0]!r} is not in the class map {path}; add a line for it")


def _read_labels(path: Path, relative: list[str]) -> tuple[list[str], list[str]]:
    """Return the class of each image and all classes in order, from a file of labels."""
    try:
        rows = [row for row in csv.reader(io.StringIO(_read_text(path), newline="")) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file ({error}); give rows of file,label") from None
    if rows and all(len(row) == 1 for row in rows):
        return _read_ground_truth(path, [row[0] for row in rows], relative)
    label_of: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise ValueError(f"{path}: row {number} has {len(row)} columns instead of 2 (file,label)")
        name, label = (cell.strip() for cell in row)
        if label_of.setdefault(name, label) != label:
            raise ValueError(f"{path}: row {number} labels {name} a second time and differently")
    classes = []
    for image in relative:
        label_found = label_of.get(image, label_of.get(_bare_name(image)))
        if label_found is None:
            raise ValueError(f"{path} has no label for {image}; add a row for it")
        classes.append(label_found)
    if all(label.isascii() and label.isdigit() for label in classes):
        classes = [str(int(label)) for label in classes]
        return classes, [str(index) for index in range(max(map(int, classes)) + 1)]
    if not _is_image(rows[0][0].strip()):  # a header
        del label_of[rows[0][0].strip()]
    return classes, sorted(set(label_of.values()), key=natural_key)


def _read_ground_truth(path: Path, ids: list[str], relative: list[str]) -> tuple[list[str], list[str]]:
    """Read ILSVRC2012's own ground truth: line k is the ILSVRC2012_ID, 1 to 1000, of ILSVRC2012_val_<k, 8 digits>.JPEG.

    The ids are not in the order of the WordNet ids by which folders and models number the classes; the development
    kit's meta.mat, beside the ground truth, translates them.
    """
    meta = path.with_name("meta.mat")
    if not meta.exists():
        raise FileNotFoundError(
            f"{path} holds ILSVRC2012 ids; put the development kit's meta.mat beside it to translate them"
        )
    from scipy.io import loadmat  # here, because only this one format needs it

    synsets = loadmat(meta, squeeze_me=True, struct_as_record=False)["synsets"]
    wnid_of = {int(synset.ILSVRC2012_ID): str(synset.WNID) for synset in synsets if int(synset.num_children) == 0}
    classes = []
    for image in relative:
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", _bare_name(image))
        if number is None or not 1 <= int(number[1]) <= len(ids):
            raise ValueError(
                f"{image}: not a name of the {len(ids)} images of {path} (ILSVRC2012_val_00000001.JPEG ...)"
            )
        truth = ids[int(number[1]) - 1]
        if not truth.isdigit() or int(truth) not in wnid_of:
            raise ValueError(f"{path}: row {int(number[1])} is {truth!r}, not an ILSVRC2012 id that meta.mat knows")
        classes.append(wnid_of[int(truth)])
    return classes, sorted(wnid_of.values(), key=natural_key)


def errors_file(output: Path | str) -> Path:
    """Where the images left out are named, with their reasons."""
    return Path(f"{output}.errors.csv")


def write_errors(path: Path, images: ImageSet, reasons: Mapping[int, str]) -> None:
    """Name the images left out, by index, with their reasons; without any, remove the file that an earlier run left."""
    if not reasons:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "reason"])
            writer.writerows([images.names[index], reason] for index, reason in reasons.items())
