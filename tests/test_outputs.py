"""Outputs on disk: what is written is read back, and what holds no outputs is refused by row."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clcnet.data.checks import check_sorted_probs, rows_at_once
from clcnet.data.images import list_images
from clcnet.data.outputs import UNKNOWN, Outputs, Record, concatenated, load_labelled, match_rows, sort_probs
from clcnet.data.table_files import TableWriter, encode_rows


def make_table(names: list[str], sorted_probs: list[list[float]], correct: list[int]) -> Outputs:
    return Outputs(names, np.float32(sorted_probs), correct=np.array(correct, dtype=bool))


def random_table(num_rows: int, num_classes: int, seed: int = 0) -> Outputs:
    generator = np.random.default_rng(seed)
    logits = 8 * generator.standard_normal((num_rows, num_classes))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = -np.sort(-probs / probs.sum(axis=1, keepdims=True), axis=1)
    return make_table([f"{row}.jpg" for row in range(num_rows)], probs, generator.integers(0, 2, num_rows))


def assert_same(read: Outputs, written: Outputs) -> None:
    assert read.names == written.names
    assert read.sorted_probs.tobytes() == written.sorted_probs.tobytes()
    assert read.correct.tolist() == written.correct.tolist()


def test_probabilities_are_sorted_and_of_equal_ones_the_lower_class_answers() -> None:
    sorted_probs, classes = sort_probs(np.float32([[0.2, 0.7, 0.1], [0.4, 0.4, 0.2], [-0.0, 0.0, 1.0]]))
    assert sorted_probs.tolist() == np.float32([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [1, 0, 0]]).tolist()
    assert classes.tolist() == [[1, 0, 2], [0, 1, 2], [2, 0, 1]]


def test_the_csv_format_is_the_specifications(tmp_path: Path) -> None:
    make_table(["a.jpg", "b.jpg"], [[0.75, 0.25], [0.5, 0.5]], [1, 0]).save(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == b"a.jpg,0.75,0.25,1\nb.jpg,0.5,0.5,0\n"


@pytest.mark.parametrize("extension", ["csv", "parquet"])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_reading_gives_the_same_float32(tmp_path: Path, extension: str, num_classes: int) -> None:
    table = random_table(1500, num_classes)
    table.save(tmp_path / f"t.{extension}")
    assert_same(Outputs.load(tmp_path / f"t.{extension}"), table)


def test_another_reader_sees_the_same_table(tmp_path: Path) -> None:
    table = random_table(50, 10)
    table.save(tmp_path / "t.csv")
    frame = pd.read_csv(tmp_path / "t.csv", header=None)
    assert frame[0].tolist() == table.names
    assert np.array_equal(frame.iloc[:, 1:-1].to_numpy(np.float32), table.sorted_probs)
    assert frame.iloc[:, -1].tolist() == table.correct.astype(int).tolist()


@pytest.mark.parametrize("bits", [0x15AE43FC, 0x15AE43FD, 0x15AE43FE, 0x00000001, 0x007FFFFF, 0x3F7FFFFF])
def test_the_float32_numbers_that_are_hardest_to_read_survive(tmp_path: Path, bits: int) -> None:
    value = np.uint32(bits).view(np.float32)  # 0x15AE43FD is rounded wrongly when read through a double
    pair = sorted([float(value), float(np.float32(1) - value)], reverse=True)
    table = make_table(["a"], [pair], [1])
    table.save(tmp_path / "t.csv")
    assert_same(Outputs.load(tmp_path / "t.csv"), table)


float32s = st.floats(0, 1, width=32)


@given(float32s)
def test_every_float32_survives_the_csv(value: np.float32) -> None:
    line = encode_rows(make_table(["x"], [[value, value]], [1]), slice(1))
    assert np.float32(line.split(b",")[1]).tobytes() == np.float32(value).tobytes()


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_rows_written_piece_by_piece_are_the_same_rows(tmp_path: Path, extension: str) -> None:
    table = random_table(100, 5)
    table.save(tmp_path / f"whole.{extension}")
    with TableWriter(tmp_path / f"pieces.{extension}") as writer:
        for start in range(0, 100, 7):
            writer.write(table.subset(range(start, min(start + 7, 100))))
    pieces, whole = tmp_path / f"pieces.{extension}", tmp_path / f"whole.{extension}"
    assert_same(Outputs.load(pieces), Outputs.load(whole))
    assert extension == "parquet" or pieces.read_bytes() == whole.read_bytes()


def test_more_cores_encode_more_rows_at_once_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, written = random_table(2100, 1000), set()
    for cores, chunks in ((1, 8), (8, 8), (12, 12), (96, 16)):
        monkeypatch.setattr("clcnet.data.checks.num_cores", lambda cores=cores: cores)
        assert rows_at_once(10) == rows_at_once(1000) == 512 * chunks and rows_at_once(100_000) == 512 * 2
        monkeypatch.setattr("clcnet.data.table_files.rows_at_once", lambda _, cores=cores: 512 * cores)
        table.save(tmp_path / "t.csv")
        written.add((tmp_path / "t.csv").read_bytes())
    assert len(written) == 1


@pytest.fixture(scope="module")
def large_table() -> Outputs:
    """Of 12 MB as CSV: large enough for pandas to cut it into parts, one a core."""
    table = random_table(2000, 500)
    names = ["NA", "0012", "None", " lead.jpg", 'a,b"c.jpg', "nan", "é.jpg"]
    return dataclasses.replace(table, names=names + table.names[len(names) :])


@pytest.mark.parametrize("first", ["0.jpg", "two\nlines.jpg", "not UTF-8 \udcff.jpg", "0", "numbers alone"])
def test_a_large_table_is_read_bit_for_bit_whatever_its_names(large_table: Outputs, tmp_path: Path, first: str) -> None:
    names = [f"{row:08d}" for row in range(2000)] if first == "numbers alone" else [first, *large_table.names[1:]]
    table = dataclasses.replace(large_table, names=names)
    table.save(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").stat().st_size > 10_000_000
    assert_same(Outputs.load(tmp_path / "t.csv"), table)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b",1\n", b",yes\n", "row 1500 holds 'yes' where a number should be"),
        (b",0.0", b",zero", "row 1500 holds 'zero.*' where a number should be"),
        (b",0.0", b",", "row 1500 sums to .* instead of 1"),
        (b",0.0", b",,0.0", "row 1500 has 503 columns but row 1 has 502"),
        (b",1\n", b"\n", "row 1500 has 501 columns but row 1 has 502"),
        (b",1\n", b",2\n", "row 1500 has label 2"),
    ],
)
def test_a_defect_in_a_large_table_is_named_by_its_row(
    large_table: Outputs, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    correct = large_table.correct.copy()
    correct[1499] = True
    dataclasses.replace(large_table, correct=correct).save(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_bytes().splitlines(keepends=True)
    assert old in lines[1499]
    lines[1499] = lines[1499].replace(old, new, 1)
    (tmp_path / "t.csv").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=message):
        Outputs.load(tmp_path / "t.csv")


def test_a_missing_table_a_folder_and_a_pipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"t.csv does not exist; make it with"):
        Outputs.load(tmp_path / "t.csv")
    with pytest.raises(OSError, match="is a folder"):
        Outputs.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.csv")  # which is not waited for
    with pytest.raises(OSError, match="pipe.csv is a pipe or device"):
        Outputs.load(tmp_path / "pipe.csv")


def known_outputs() -> Outputs:
    """Of three images of classes 2, 0 and 1, of three classes; the model is right about the first and the last."""
    probs = [[0.25, 0.0, 0.75], [0.125, 0.625, 0.25], [0.25, 0.5, 0.25]]
    record = Record("tiny", "1f", flops=0.5, class_names=["ant", "bee", "cat"], versions={"torch": "2"})
    return Outputs.from_probs(probs, ["a.png", "b.png", "c.png"], [2, 0, 1], record)


def test_parquet_keeps_classes_targets_and_record_and_csv_the_specifications_columns(tmp_path: Path) -> None:
    outputs = known_outputs()
    for path in (tmp_path / "t.parquet", tmp_path / "t.pq", tmp_path / "t.csv"):
        outputs.save(path)
        read = Outputs.load(path)
        assert_same(read, outputs)
        if path.suffix == ".csv":
            assert read.classes is None and read.targets is None and read.record == Record()
        else:
            assert read.probs.tolist() == [[0.25, 0, 0.75], [0.125, 0.625, 0.25], [0.25, 0.5, 0.25]]
            assert read.labels.tolist() == [2, 1, 1] and read.targets.tolist() == [2, 0, 1]
            assert read.record == outputs.record


def test_what_is_not_known_is_not_known_after_reading(tmp_path: Path) -> None:
    probs = [[0.25, 0.75], [0.5, 0.5]]
    for targets in (None, [1, UNKNOWN]):
        outputs = Outputs.from_probs(probs, ["a", "b"], targets)
        outputs.save(tmp_path / "t.parquet")
        read = Outputs.load(tmp_path / "t.parquet")
        assert read.correct is None
        assert (None if read.targets is None else read.targets.tolist()) == targets
        with pytest.raises(ValueError, match="a CSV table says which answers are right, and these outputs do"):
            outputs.save(tmp_path / "t.csv")
        with pytest.raises(ValueError, match=r"t.parquet does not say which answers are right"):
            load_labelled(tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv", "t.xlsx", "t.json", "t"])
def test_only_csv_and_parquet_are_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"output .*{name} ends in neither .csv nor .parquet"):
        known_outputs().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_parquet_of_the_first_layout_is_read(tmp_path: Path) -> None:
    outputs = known_outputs()
    outputs.save(tmp_path / "t.parquet")
    first = pa.parquet.read_table(tmp_path / "t.parquet").select(["file", "sorted_probs", "correct"])
    pa.parquet.write_table(first.replace_schema_metadata(), tmp_path / "first.parquet")
    read = Outputs.load(tmp_path / "first.parquet")
    assert_same(read, outputs)
    assert read.classes is None and read.targets is None and read.record == Record()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": np.uint8([[2, 0, 1], [1, 2, 2], [1, 0, 2]])}, "row 2 does not name every class from 0 to 2 once"),
        ({"classes": np.uint8([[2, 0, 1], [1, 2, 0], [1, 0, 3]])}, "row 3 does not name every class from 0 to 2 once"),
        ({"targets": np.array([2, 0, 3])}, "row 3 has target 3; the classes are 0 to 2"),
        ({"targets": np.array([2, -2, 1])}, "row 2 has target -2"),
        ({"correct": np.array([True, True, True])}, "row 2 answers 1 where 0 is right, but has label 1"),
    ],
)
def test_outputs_that_contradict_themselves_are_refused_by_row(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    dataclasses.replace(known_outputs(), **changes).save(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=rf"t\.parquet: {message}"):
        Outputs.load(tmp_path / "t.parquet")


@pytest.mark.parametrize("record", ["", "[]", "[" * 100_000, '{"model": 3}', '{"flops": "many"}'])
def test_a_damaged_record_is_refused_and_an_unknown_field_is_not(tmp_path: Path, record: str) -> None:
    known_outputs().save(tmp_path / "t.parquet")
    table = pa.parquet.read_table(tmp_path / "t.parquet")
    pa.parquet.write_table(table.replace_schema_metadata({"clcnet": record}), tmp_path / "damaged.parquet")
    with pytest.raises(ValueError, match=r"damaged.parquet: what it says of the model is damaged"):
        Outputs.load(tmp_path / "damaged.parquet")
    pa.parquet.write_table(table.replace_schema_metadata({"clcnet": '{"mood": "good"}'}), tmp_path / "later.parquet")
    assert Outputs.load(tmp_path / "later.parquet").record == Record()


@pytest.mark.parametrize("probs", [np.ones(3), np.ones((2, 1))])
def test_fewer_than_two_classes_are_refused(probs: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shape|at least 2"):
        check_sorted_probs(probs)


def test_tables_read_together_remember_where_rows_came_from(tmp_path: Path) -> None:
    make_table(["a", "b"], [[0.75, 0.25]] * 2, [1, 0]).save(tmp_path / "1.csv")
    make_table(["a"], [[0.5, 0.5]], [1]).save(tmp_path / "2.csv")
    paths = [tmp_path / "1.csv", tmp_path / "2.csv"]
    both, source = concatenated(load_labelled(*paths), paths)
    assert both.names == ["a", "b", "a"] and source.tolist() == [0, 0, 1]
    assert both.accuracy == pytest.approx(200 / 3)


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0]), np.array([True, False, True])])
def test_a_subset_keeps_names_and_numbers_together(rows: list[int] | np.ndarray) -> None:
    subset = random_table(3, 4).subset(rows)
    assert sorted(subset.names) == ["0.jpg", "2.jpg"]
    row_of = {name: row for name, row in zip(subset.names, subset.sorted_probs.tolist(), strict=True)}
    assert row_of["2.jpg"] == random_table(3, 4).sorted_probs[2].tolist()


@pytest.fixture
def colliding_images(tmp_path: Path) -> Path:
    """Two classes with a file of the same name each, in the five-part layout."""
    for part in range(1, 6):
        for class_name in ("ant", "bee"):
            path = tmp_path / f"split_part_{part}" / class_name / f"000{part}.png"
            path.parent.mkdir(parents=True)
            path.touch()
    return tmp_path


def test_rows_find_their_image_and_fold(colliding_images: Path) -> None:
    images = list_images(colliding_images)
    table = make_table(["bee/0003.png", "split_part_2/ant/0002.png"], [[0.5, 0.5]] * 2, [1, 1])
    assert [images.paths[index].parent.name for index in match_rows(table, images)] == ["bee", "ant"]
    assert images.folds[match_rows(table, images)].tolist() == [2, 1]


def test_an_images_own_name_goes_before_another_images_short_one(tmp_path: Path) -> None:
    for folder in ("ant", "old/ant"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").touch()
    images = list_images(tmp_path, model_classes=["ant"])
    assert images.names == ["ant/1.png", "old/ant/1.png"]
    table = make_table(["old/ant/1.png", "ant/1.png"], [[0.5, 0.5]] * 2, [1, 1])
    assert match_rows(table, images).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0003.png"], "row 1 names '0003.png', which may be split_part_3/ant/0003.png or split_part_3/bee/0003.png"),
        (["wasp/0001.png"], "row 1 names 'wasp/0001.png', which is not in"),
        (["ant/0001.png", "bee/0001.png", "ant/0001.png"], "rows 1 and 3 both name 'ant/0001.png'"),
    ],
)
def test_rows_that_name_no_image_or_several_are_refused(colliding_images: Path, names: list[str], message: str) -> None:
    table = make_table(names, [[0.5, 0.5]] * len(names), [1] * len(names))
    with pytest.raises(ValueError, match=message):
        match_rows(table, list_images(colliding_images))


def test_the_real_tables_rows_have_the_folds_of_their_folders(shared: Path) -> None:
    table = Outputs.load(shared / "cifar10/resnet56.csv")
    images = list_images(shared / "cifar10/imagenet_splits_5")
    folds = images.folds[match_rows(table, images)]
    assert np.bincount(folds).tolist() == [2000] * 5
    for row in range(0, 10000, 997):
        assert list(images.root.glob(f"split_part_{folds[row] + 1}/*/{table.names[row]}"))
