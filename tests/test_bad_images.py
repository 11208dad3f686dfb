"""Image folders that no one would make on purpose, given to each script that opens images."""

import csv
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import scripts
from PIL import Image
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, Workshop, refusal

from clcnet.classifiers.decoding import ImageDataset
from clcnet.data.images import errors_file, list_images
from clcnet.data.outputs import Outputs

READERS = (GENERATE, EVALUATE_FOLDS, EVALUATE_CUSTOM)


def png(width: int, height: int) -> bytes:
    """A PNG of the given size in its header, with next to nothing behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "zz_empty.png": (Path.touch, "cannot identify image file"),
    "zz_script.jpg": (lambda path: Image.new("RGB", (9, 9)).save(path, "EPS"), "cannot identify image file"),
    "zz_rare.png": (lambda path: Image.new("RGB", (9, 9)).save(path, "TGA"), "cannot identify image file"),
    "zz_text.jpg": (lambda path: path.write_text("no image"), "cannot identify image file"),
    "zz_bomb.png": (lambda path: path.write_bytes(png(60_000, 60_000)), "could be decompression bomb"),
    "zz_strip.png": (lambda path: Image.new("L", (1, 200_000)).save(path), "too long and thin to be resized"),
    "zz_loop.png": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "zz_gone.png": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "zz_pipe.png": (os.mkfifo, "a directory, pipe or device, not a file"),
    "zz_device.png": (lambda path: path.symlink_to("/dev/zero"), "a directory, pipe or device, not a file"),
}
ODD_NAMES = ("zz_line\nbreak.png", 'zz_comma, "quote".png', "zz_天気 é.png", "zz_caf\udce9.png", "zz_space .png")


@pytest.fixture
def folder(workshop: Workshop, tmp_path: Path) -> Path:
    """The images of the workshop, to be spoiled."""
    return Path(shutil.copytree(workshop.images, tmp_path / "images"))


def command(script: str, workshop: Workshop, folder: Path, output_folder: Path) -> list[object]:
    flag = {GENERATE: "--data-path", EVALUATE_FOLDS: "--imagenet-split", EVALUATE_CUSTOM: "--custom-data"}[script]
    return [*workshop.command(script, output_folder), flag, folder]


def names_in(output: Path) -> list[str]:
    with open(output, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [row[0] for row in csv.reader(file)]


@pytest.mark.parametrize("script", READERS)
def test_what_is_no_image_is_left_out_with_its_reason_and_odd_names_are_kept(
    workshop: Workshop, folder: Path, tmp_path: Path, script: str
) -> None:
    ants = folder / "split_part_1" / "ant"
    for name, (make, _) in UNREADABLE.items():
        make(ants / name)
    for name in ODD_NAMES:
        shutil.copy(ants / "ant_0000.png", ants / name)
    (ants / "round").symlink_to(folder)
    (ants / "loop").symlink_to("loop")
    (ants / "folder.png").mkdir()
    finished = scripts.run(script, *command(script, workshop, folder, tmp_path / "out"))
    assert finished.code == 3, finished
    output = workshop.outputs(script, tmp_path / "out")[0]
    with open(errors_file(output), encoding="utf-8", newline="") as file:
        reasons = dict(list(csv.reader(file))[1:])
    assert reasons.pop("split_part_1/ant/loop") == "passed over: not decoded here: no extension"
    assert reasons.pop("split_part_1/ant/round/") == "passed over: a link in a circle"
    place = "split_part_1/ant/" if script == EVALUATE_CUSTOM else ""  # as each names images in its output
    assert reasons.keys() == {place + name for name in UNREADABLE}
    for name, (_, words) in UNREADABLE.items():
        assert words in reasons[place + name]
    assert str(len(UNREADABLE)) in finished.out and str(errors_file(output)) in finished.out
    if script != EVALUATE_FOLDS:
        names = names_in(output)
        assert len(names) == 60 + len(ODD_NAMES) + (script == EVALUATE_CUSTOM)
        names = [name.rpartition("/")[2] for name in names]  # step 5 gives the path below the folder
        assert set(ODD_NAMES) < set(names) and not UNREADABLE.keys() & set(names)


def test_images_above_pils_limit_have_a_switch(workshop: Workshop, tmp_path: Path) -> None:
    for name, side in (("small", 40), ("large", 120)):
        (tmp_path / "images" / "ant").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(tmp_path / "images" / "ant" / f"{name}.png")
    words = command(GENERATE, workshop, tmp_path / "images", tmp_path)
    before = Image.MAX_IMAGE_PIXELS
    try:
        assert scripts.run(GENERATE, *words, "--max-image-pixels", 14_399, "--workers", 1).code == 3
        assert "--max-image-pixels lets it in" in errors_file(tmp_path / "table.csv").read_text()
        assert scripts.run(GENERATE, *words, "--max-image-pixels", 14_400).code == 0
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_a_table_with_odd_names_finds_its_images_again(workshop: Workshop, folder: Path, tmp_path: Path) -> None:
    bees = folder / "split_part_2" / "bee"
    for name in ODD_NAMES:
        shutil.copy(bees / "bee_0001.png", bees / name)
    for suffix in (".csv", ".parquet"):
        table = tmp_path / f"t{suffix}"
        assert scripts.run(GENERATE, *command(GENERATE, workshop, folder, tmp_path), "--output", table).code == 0
        assert Outputs.load(table).names == list_images(folder).names
        words = [*workshop.command(scripts.TRAIN_FOLDS, tmp_path / "w"), "--imagenet-split", folder]
        assert scripts.run(scripts.TRAIN_FOLDS, *words, "--cls-output", table, "--max-epochs", 1).code == 0
        assert set(ODD_NAMES) < set(names_in(tmp_path / "w" / "CLCNet_imagenet_split.csv"))


def spoil(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"spoilt")


@pytest.mark.parametrize("script", READERS)
def test_a_folder_of_nothing_but_broken_images_is_refused_and_nothing_is_lost(
    workshop: Workshop, folder: Path, tmp_path: Path, script: str
) -> None:
    spoil(folder)
    output = workshop.outputs(script, tmp_path)[0]
    output.write_text("old")
    line = refusal(scripts.run(script, *command(script, workshop, folder, tmp_path)))
    assert "none of the 60 images" in line and str(folder) in line
    assert output.read_text() == "old"


@pytest.mark.parametrize("script", READERS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "holds no images"),
        (lambda folder: [shutil.rmtree(folder), folder.touch()], "is a file"),
        (lambda folder: shutil.rmtree(folder / "split_part_3"), "but not split_part_3"),
        (lambda folder: [shutil.rmtree(folder), folder.symlink_to(folder.name)], "Too many levels|does not exist"),
    ],
    ids=["absent", "empty", "a file", "a part missing", "a link to itself"],
)
def test_a_folder_that_holds_no_data_set_is_refused(
    workshop: Workshop, folder: Path, tmp_path: Path, script: str, make: Callable[[Path], object], words: str
) -> None:
    make(folder)
    line = refusal(scripts.run(script, *command(script, workshop, folder, tmp_path / "out")))
    assert any(word in line for word in words.split("|")) and str(folder) in line


@pytest.mark.parametrize("script", READERS)
def test_a_folder_that_changes_during_the_run_costs_no_more_than_what_is_gone(
    workshop: Workshop, folder: Path, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ImageDataset.read
    calls = iter(range(10_000))

    def change_then_read(self: ImageDataset, position: int) -> Image.Image:
        if next(calls) == 20:  # two batches and a half are done
            shutil.rmtree(folder / "split_part_5" / "cat")
            (folder / "split_part_4" / "cat" / "cat_0003.png").write_bytes(b"half a file")
            shutil.copy(folder / "split_part_1" / "ant" / "ant_0000.png", folder / "split_part_1" / "ant" / "new.png")
        return read(self, position)

    monkeypatch.setattr(ImageDataset, "read", change_then_read)
    finished = scripts.run(script, *command(script, workshop, folder, tmp_path / "out"))
    assert finished.code == 3, finished
    output = workshop.outputs(script, tmp_path / "out")[0]
    gone = {f"cat_{index:04d}.png" for index in (3, 4, 9, 14, 19)}
    assert {name.rpartition("/")[2] for name in names_in(errors_file(output))} == {"file", *gone}
    if script != EVALUATE_FOLDS:
        names = {name.rpartition("/")[2] for name in names_in(output)}
        assert names - {"file"} == {path.name for path in workshop.images.rglob("*.png")} - gone


@pytest.mark.parametrize("script", READERS)
def test_files_without_permission_are_left_out(open_workshop: Workshop, tmp_path: Path, script: str) -> None:
    scripts.run(script, *open_workshop.command(script, tmp_path))  # imports all: Python itself may lie in root's home
    root = open_workshop.root.with_name(f"images_{script}")
    with scripts.without_root():
        shutil.copytree(open_workshop.images, root / "images")
        ants = root / "images" / "split_part_1" / "ant"
        (ants / "ant_0000.png").chmod(0)
        finished = scripts.run(script, *command(script, open_workshop, root / "images", root / "out"))
        assert finished.code == 3, finished
        errors = errors_file(open_workshop.outputs(script, root / "out")[0])
        place = "split_part_1/ant/" if script == EVALUATE_CUSTOM else ""
        assert errors.read_text() == f"file,reason\n{place}ant_0000.png,Permission denied\n"
        ants.chmod(0)
        line = refusal(scripts.run(script, *command(script, open_workshop, root / "images", root / "out")))
        assert f"{ants}: Permission denied" in line
        ants.chmod(0o700)


def test_a_model_that_sees_one_image_of_any_shape_is_given_it(tmp_path: Path, workshop: Workshop) -> None:
    for size in [(1, 1), (1, 3000), (3000, 1), (33, 31), (5000, 4000)]:
        path = tmp_path / "images" / "ant" / f"{size[0]}x{size[1]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    words = command(GENERATE, workshop, tmp_path / "images", tmp_path)
    assert scripts.run(GENERATE, *words).code == 0
    assert len(Outputs.load(tmp_path / "table.csv")) == 5


def test_deeply_nested_and_very_many_folders_are_listed(tmp_path: Path) -> None:
    deep = tmp_path / "images" / "/".join(["d"] * 100) / "ant"
    deep.mkdir(parents=True)
    (deep / "1.png").touch()
    for index in range(300):
        (tmp_path / "images" / f"c{index}").mkdir()
        (tmp_path / "images" / f"c{index}" / "1.png").touch()
    images = list_images(tmp_path / "images")
    assert len(images) == 301
    assert images.class_names[:3] == ["ant", "c0", "c1"]
