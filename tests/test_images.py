"""Which images a folder holds, in which order, of which class, in which fold."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.data.readers.reader_image_folder import find_images_and_targets

from clcnet.data.images import balanced_folds, image_keys, list_images, write_errors
from clcnet.data.labels import natural_key


def touch(root: Path, *names: str) -> Path:
    """Listing never opens an image, so empty files will do."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_classes_and_files_are_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "class10/b.png", "class9/img10.JPEG", "class9/img9.jpg", "class9/notes.txt", "class9/.hidden.png")
    images = list_images(tmp_path)
    assert images.class_names == ["class9", "class10"]
    assert images.names == ["img9.jpg", "img10.JPEG", "b.png"]
    assert images.targets.tolist() == [0, 0, 1]


def test_a_class_absent_from_one_part_does_not_shift_the_others(tmp_path: Path) -> None:
    touch(tmp_path, *(f"split_part_{part}/{name}/{part}.png" for part in range(1, 6) for name in ("ant", "bee", "cat")))
    (tmp_path / "split_part_2/ant/2.png").unlink()
    images = list_images(tmp_path)
    target_of = {
        path.relative_to(tmp_path).as_posix(): target for path, target in zip(images.paths, images.targets, strict=True)
    }
    assert target_of["split_part_2/bee/2.png"] == 1
    assert target_of["split_part_2/cat/2.png"] == 2


def test_the_order_is_the_same_whether_or_not_the_folder_is_cut(image_folder: Callable[..., Path]) -> None:
    whole, cut = list_images(image_folder("whole")), list_images(image_folder("cut", five_parts=True))
    assert whole.names == cut.names
    assert whole.targets.tolist() == cut.targets.tolist()
    assert cut.folds.tolist() == [0, 1, 2, 3, 4] * 3


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["ant/1.png", "bee/2.png"], ["1.png", "2.png"]),
        (["ant/1.png", "bee/1.png"], ["ant/1.png", "bee/1.png"]),
        (["may/ant/1.png", "june/bee/1.png"], ["ant/1.png", "bee/1.png"]),
        (["may/ant/1.png", "june/ant/1.png"], ["june/ant/1.png", "may/ant/1.png"]),
    ],
)
def test_names_are_as_short_as_they_can_be_and_never_collide(
    tmp_path: Path, files: list[str], names: list[str]
) -> None:
    assert list_images(touch(tmp_path, *files), model_classes=["ant", "bee"]).names == names


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path, "1.png", "2.png"))
    assert images.targets.tolist() == [-1, -1]
    assert images.class_names == [] and not images.has_labels


def test_images_of_one_class_and_name_are_in_the_order_of_their_paths(tmp_path: Path) -> None:
    touch(tmp_path, "b/ant/2.png", "b/ant/10.png", "a/ant/10.png", "a/Bee/1.png")
    images = list_images(tmp_path, model_classes=["ant", "Bee"])
    assert images.names == ["b/ant/2.png", "a/ant/10.png", "b/ant/10.png", "a/Bee/1.png"]


# ---------------------------------------------------------------- links


def test_a_circle_of_links_is_walked_once_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "ant/1.png", "bee/2.png")
    (tmp_path / "ant" / "again").symlink_to(tmp_path)
    (tmp_path / "bee" / "itself").symlink_to(".")
    images = list_images(tmp_path)
    assert images.names == ["1.png", "2.png"]
    assert images.passed_over == {"ant/again/": "a link in a circle", "bee/itself/": "a link in a circle"}


def test_a_link_to_another_class_folder_takes_nothing_from_it(tmp_path: Path) -> None:
    touch(tmp_path, "w6/1.png", "w7/2.png")
    (tmp_path / "seven").symlink_to("w7")  # comes first in the walk
    images = list_images(tmp_path)
    assert images.files == ["seven/2.png", "w6/1.png", "w7/2.png"] and images.class_names == ["seven", "w6", "w7"]
    assert images.notes == ["seven and w7 are one folder: what links lead to is listed each time"]
    theirs, _ = find_images_and_targets(str(tmp_path))
    assert sorted(path for path, _ in theirs) == sorted(map(str, images.paths))


def test_three_links_to_one_folder_are_three_folders(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "1.png", "2.png")
    (tmp_path / "images").mkdir()
    for name in "abc":
        (tmp_path / "images" / name).symlink_to("../elsewhere")
    assert len(list_images(tmp_path / "images")) == 6
    assert len(list_images(tmp_path / "images" / "a")) == 2


def test_links_across_end_where_they_close_a_circle(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    images = list_images(tmp_path, any_folder=True)
    assert sorted(images.files) == ["a/1.png", "a/to_b/2.png", "b/2.png", "b/to_a/1.png"]
    assert sorted(images.passed_over) == ["a/to_b/to_a/", "b/to_a/to_b/"]


# ---------------------------------------------------------------- what is passed over


def test_what_pil_reads_is_listed_and_what_it_does_not_is_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"ant/a{extension}" for extension in (".png", ".AVIF", ".jfif", ".jpe", ".jp2", ".mpo", ".qoi")))
    touch(tmp_path, "ant/IMG.heic", "ant/IMG.CR2", "ant/notes.txt", "ant/.a.png", ".cache/b.png", "@eaDir/b.png/s.jpg")
    images = list_images(tmp_path)
    assert len(images) == 7
    assert images.passed_over == {
        "ant/IMG.heic": "not decoded here: .heic",
        "ant/IMG.CR2": "not decoded here: .cr2",
        "ant/notes.txt": "not decoded here: .txt",
        "ant/.a.png": "hidden",
        ".cache/": "hidden",
        "@eaDir/": "thumbnails or a system's folder",
    }
    (note,) = images.notes
    assert "2 hidden (.cache/, ant/.a.png)" in note and "1 not decoded here: .heic (ant/IMG.heic)" in note


def test_thumbnails_lie_beside_images_and_a_class_of_that_name_does_not(tmp_path: Path) -> None:
    touch(tmp_path, "thumbs/1.png", "fists/2.png", "fists/Thumbs/2.png", "__MACOSX/fists/2.png", "lost+found/x.png")
    images = list_images(tmp_path)
    assert images.class_names == ["fists", "thumbs"]
    assert sorted(images.passed_over) == ["__MACOSX/", "fists/Thumbs/", "lost+found/"]


def test_the_errors_file_names_what_was_passed_over_too(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path / "images", "1.png", "2.heic"))
    write_errors(tmp_path / "errors.csv", images, {0: "broken"})
    assert (tmp_path / "errors.csv").read_text() == (
        "file,reason\n1.png,broken\n2.heic,passed over: not decoded here: .heic\n"
    )
    write_errors(tmp_path / "errors.csv", list_images(touch(tmp_path / "others", "1.png")), {})
    assert not (tmp_path / "errors.csv").exists()


# ---------------------------------------------------------------- what tells images apart


def test_the_key_of_an_image_is_its_own_and_changes_when_it_is_written_to(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path / "a", "1.png", "2.png", "3.png"))
    before = image_keys(images)
    assert before.shape == (3, 16) and before.dtype == np.uint8 and len(np.unique(before, axis=0)) == 3
    assert (image_keys(images.subset([2, 0])) == before[[2, 0]]).all()
    assert (image_keys(list_images(os.path.relpath(tmp_path / "a"))) == before).all()
    (tmp_path / "a" / "1.png").write_bytes(b"x")
    times = (tmp_path / "a" / "2.png").stat()
    os.utime(tmp_path / "a" / "2.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been written to
    (tmp_path / "a" / "3.png").unlink()
    after = image_keys(images)
    assert (after != before).any(axis=1).all()
    assert (image_keys(images)[2] == after[2]).all()


# ---------------------------------------------------------------- bad folders


PARTS = [f"split_part_{part}/ant/{part}.png" for part in range(1, 6)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], "holds no images"),
        (["1.png", "ant/2.png"], "1.png lies beside the class folders"),
        ([*PARTS, "ant/1.png"], "ant/1.png lies outside the five parts"),
        ([*PARTS[:4], "split_part_5/notes.txt"], "but not split_part_5"),
    ],
)
def test_a_bad_folder_gets_one_clear_line(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_images(touch(tmp_path, *files))


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(ValueError, match="the path of the image folder is empty"):
        list_images("")


@given(st.lists(st.integers(0, 4), min_size=5, max_size=200), st.randoms())
def test_folds_are_complete_balanced_and_do_not_depend_on_the_order(targets: list[int], random) -> None:
    names = [f"{target}/{index}.png" for index, target in enumerate(targets)]
    folds = balanced_folds(names, np.array(targets))
    sizes = np.bincount(folds, minlength=5)
    assert sizes.sum() == len(names) and sizes.max() - sizes.min() <= 1
    for target in set(targets):
        counts = np.bincount(folds[np.array(targets) == target], minlength=5)
        assert counts.max() - counts.min() <= 1
    order = random.sample(range(len(names)), len(names))
    shuffled = balanced_folds([names[index] for index in order], np.array(targets)[order])
    assert shuffled.tolist() == folds[order].tolist()


def test_folds_of_a_plain_folder_never_change() -> None:
    # written down so that a weight trained today still knows tomorrow which images it has not seen
    names = [f"image_{index}.png" for index in range(10)]
    assert balanced_folds(names, np.zeros(10, dtype=int)).tolist() == [0, 1, 3, 0, 4, 2, 4, 1, 2, 3]


@given(st.lists(st.text(max_size=8), max_size=20))
def test_natural_order_takes_any_text(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key), key=natural_key) == sorted(reversed(names), key=natural_key)


def test_natural_order_counts() -> None:
    assert sorted(["b2", "b10", "a", "B1"], key=natural_key) == ["a", "B1", "b2", "b10"]
