"""Tables that are none, or odd ones, given to each script that reads tables: one line, exit code 2, nothing lost."""

import bz2
import gzip
import lzma
import re
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scripts
from scripts import EVALUATE_FOLDS, TRAIN_CUSTOM, TRAIN_FOLDS, Workshop, contents, refusal

from clcnet.data import table_files
from clcnet.data.outputs import Outputs, load_labelled

GOOD = b"ant_0000.png,0.5,0.3,0.2,1\nant_0001.png,0.6,0.3,0.1,0\n"
READERS = (TRAIN_FOLDS, TRAIN_CUSTOM, EVALUATE_FOLDS)

# what stands in the file, and what the one line says behind the file's name
DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank lines alone": (b"\n\r\n", "has no rows"),
    "ragged": (GOOD + b"ant_0002.png,0.5,0.5,1\n", "row 3 has 4 columns but row 1 has 5"),
    "3 columns, then 1000": (GOOD + b"x.png," + b"0.001," * 1000 + b"1\n", "row 3 has 1002 columns but row 1 has 5"),
    "header": (
        b"file,p1,p2,p3,label\n" + GOOD,
        "row 1 holds 'p1' where a probability should be; a table has no header",
    ),
    "index column": (b"0,ant_0000.png,0.5,0.3,0.2,1\n", "row 1 holds 'ant_0000.png' where a probability should be"),
    "text for a probability": (GOOD + b"ant_0002.png,0.5,half,0,1\n", "row 3 holds 'half' where a number should be"),
    "empty cell": (GOOD + b"ant_0002.png,0.5,,0.5,1\n", "row 3 holds '' where a number should be"),
    "negative": (GOOD + b"ant_0002.png,0.6,0.5,-0.1,1\n", "row 3, probability 3 (-0.1) is negative"),
    "above one": (GOOD + b"ant_0002.png,1.5,0,0,1\n", "row 3 sums to 1.5 instead of 1"),
    "NaN": (GOOD + b"ant_0002.png,0.5,nan,0,1\n", "row 3, probability 2 (nan) is not a finite number"),
    "infinite": (GOOD + b"ant_0002.png,1e999,0,0,1\n", "row 3, probability 1 (inf) is not a finite number"),
    "not sorted": (GOOD + b"ant_0002.png,0.3,0.5,0.2,1\n", "row 3, probability 2 (0.5) is larger than the one before"),
    "not summing to one": (GOOD + b"ant_0002.png,0.5,0.3,0.1,1\n", "row 3 sums to 0.9 instead of 1"),
    "logits": (b"ant_0000.png,9.5,1.25,-3,1\n", "row 1, probability 3 (-3) is negative"),
    "label 2": (GOOD + b"ant_0002.png,0.5,0.3,0.2,2\n", "row 3 has label 2; labels are 1 (right) or 0 (wrong)"),
    "huge label": (GOOD + b"ant_0002.png,0.5,0.3,0.2,99999999999\n", "row 3 has label 1e+11"),
    "number of 400 digits": (GOOD + b"a,0.5,0.3" + b"0" * 400 + b",0.1,1\n", "row 3 sums to 0.9"),
    "label -1": (GOOD + b"ant_0002.png,0.5,0.3,0.2,-1\n", "row 3 has label -1"),
    "label one half": (GOOD + b"ant_0002.png,0.5,0.3,0.2,0.5\n", "row 3 has label 0.5"),
    "no label": (b"ant_0000.png,0.5\n", "row 1 has 2 columns; expected a file name, at least 2 probabilities, and a"),
    "cut in a name": (GOOD + b"ant_00", "row 3 has 1 columns but row 1 has 5; was the file cut short?"),
    "cut in a number": (GOOD + b"ant_0002.png,0.5,0.", "row 3 has 3 columns but row 1 has 5; was the file cut short?"),
    "cut before the label": (GOOD + b"ant_0002.png,0.5,0.3,0.2,", "row 3 holds '' where a number should be"),
    "quote left open": (GOOD + b'"ant_0002.png,0.5,0.3,0.2,1\n', "row 3 has 1 columns but row 1 has 5"),
    "semicolons": (GOOD.replace(b",", b";"), "row 1 has 1 columns"),
    "no text": (bytes(range(256)) * 4, "row 1"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "one endless cell": (b"a" * (2**24 + 1), "is not a CSV file (field larger than"),
    "gzip": (gzip.compress(GOOD, mtime=0), "is compressed with gzip; unpack it first"),
    "bzip2": (bz2.compress(GOOD), "is compressed with bzip2; unpack it first"),
    "xz": (lzma.compress(GOOD), "is compressed with xz; unpack it first"),
    "zip": (b"PK\x03\x04" + bytes(30), "is a zip file or a workbook; unpack it, or save it as CSV"),
    "Parquet": (b"PAR1" + bytes(30), "is not a Parquet file ("),
}
ONE_ROW = {"one row": (GOOD[: GOOD.index(b"\n") + 1], "")}  # a table, and too little for a script


def command(script: str, workshop: Workshop, folder: Path, table: Path) -> list[object]:
    if script == EVALUATE_FOLDS:
        return [*workshop.command_on_tables(folder), "--deep-output", table]
    return [*workshop.command(script, folder), "--cls-output", table]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_table_is_refused_by_its_name_and_row(tmp_path: Path, defect: str) -> None:
    content, message = DEFECTS[defect]
    (tmp_path / "given.csv").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Outputs.load(tmp_path / "given.csv")
    assert str(tmp_path / "given.csv") in str(caught.value)


@pytest.mark.parametrize("script", READERS)
@pytest.mark.parametrize("defect", ["empty", "NaN", "huge label", "no text", "gzip", "one row"])
def test_a_broken_table_is_refused_in_one_line_and_nothing_is_lost(
    workshop: Workshop, tmp_path: Path, script: str, defect: str
) -> None:
    content, message = (DEFECTS | ONE_ROW)[defect]
    table = tmp_path / "given.csv"
    table.write_bytes(content)
    outputs = workshop.outputs(script, tmp_path)
    for path in outputs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"from before")
    before = contents(tmp_path)
    line = refusal(scripts.run(script, *command(script, workshop, tmp_path, table)))
    assert str(table) in line and message in line
    assert contents(tmp_path) == before


def parquet(**columns: pa.Array) -> bytes:
    return parquet_of([*columns.values()], [*columns])


def parquet_of(columns: list[pa.Array], names: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_arrays(columns, names), sink)
    return sink.getvalue().to_pybytes()


NAMES = pa.array(["a.png", "b.png"])
PROBS = pa.FixedSizeListArray.from_arrays(pa.array([0.75, 0.25, 0.5, 0.5], pa.float32()), 2)
LABELS = pa.array([1, 0], pa.int8())
GOOD_PARQUET = parquet(file=NAMES, sorted_probs=PROBS, correct=LABELS)
PARQUET_DEFECTS = {
    "CSV by another name": (GOOD, "is not a Parquet file"),
    "cut short": (GOOD_PARQUET[:-9], "is not a Parquet file"),
    "damaged inside": (GOOD_PARQUET[:4] + bytes(200) + GOOD_PARQUET[204:], "cannot be read|is not a Parquet"),
    "a column neither there nor not": (  # for which pyarrow would end the process, were it asked for the column's size
        parquet(file=NAMES, sorted_probs=PROBS, correct=LABELS, targets=pa.array([0, 1])).replace(
            b"%\x02\x18\x07targets", b"%\x20\x18\x07targets"
        ),
        "cannot be read|is not a Parquet",
    ),
    "no labels": (parquet(file=NAMES, sorted_probs=PROBS), "correct is missing"),
    "labels as text": (parquet(file=NAMES, sorted_probs=PROBS, correct=NAMES), "correct is string"),
    "label 2": (parquet(file=NAMES, sorted_probs=PROBS, correct=pa.array([1, 2])), "row 2 has label 2"),
    "two columns of one name": (
        parquet_of([NAMES, PROBS, PROBS, LABELS], ["file", "sorted_probs", "sorted_probs", "correct"]),
        "two columns called sorted_probs",
    ),
    "an endless name": (
        parquet(file=pa.array(["a" * 2_000_000, "b"]), sorted_probs=PROBS, correct=LABELS),
        "names of more than 4,096 bytes",
    ),
    "label missing": (
        parquet(file=NAMES, sorted_probs=PROBS, correct=pa.array([1, None])),
        "empty cells in column corr",
    ),
    "name missing": (
        parquet(file=pa.array(["a", None]), sorted_probs=PROBS, correct=LABELS),
        "empty cells in column file",
    ),
    "names as numbers": (parquet(file=LABELS, sorted_probs=PROBS, correct=LABELS), "file is int8"),
    "ragged": (parquet(file=NAMES, sorted_probs=pa.array([[1.0], [0.5, 0.5]]), correct=LABELS), "sorted_probs is list"),
    "probability missing": (
        parquet(file=NAMES, sorted_probs=pa.array([[0.5, 0.5], [1, None]], pa.list_(pa.float32(), 2)), correct=LABELS),
        r"row 2, probability 2 \(nan\) is not a finite number",
    ),
    "something else": (parquet(x=LABELS), "is not a Parquet table"),
    "no rows": (parquet(file=NAMES[:0], sorted_probs=PROBS[:0], correct=LABELS[:0]), "has no rows"),
}


@pytest.mark.parametrize("defect", PARQUET_DEFECTS)
def test_a_broken_parquet_table_is_refused_by_name(tmp_path: Path, defect: str) -> None:
    content, message = PARQUET_DEFECTS[defect]
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t\.parquet.*({message})"):
        Outputs.load(tmp_path / "t.parquet")


def check_same(content: bytes, name: str, expected: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    (folder / "expected.csv").write_bytes(expected)
    table, other = Outputs.load(folder / name), Outputs.load(folder / "expected.csv")
    assert table.names == other.names
    assert table.sorted_probs.tobytes() == other.sorted_probs.tobytes()
    assert table.correct.tolist() == other.correct.tolist()


@pytest.mark.parametrize("name", ["t.csv.gz", "t.zip", "t.bz2", "t.xz", "t.txt", "t", "t.CSV", "ta,b'l\"é.csv"])
def test_plain_text_is_read_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    check_same(GOOD, name, GOOD, tmp_path)


HABITS = {
    "byte-order mark": b"\xef\xbb\xbf" + GOOD,
    "byte-order mark and quotes": b"\xef\xbb\xbf" + GOOD.replace(b"ant_0000.png", b'"ant_0000.png"'),
    "no last newline": GOOD.rstrip(b"\n"),
    "CRLF": GOOD.replace(b"\n", b"\r\n"),
    "CR": GOOD.replace(b"\n", b"\r"),
    "lines of blanks": GOOD.replace(b"\n", b"\n   \n"),
    "blanks before numbers": GOOD.replace(b",", b", ").replace(b"png, ", b"png,"),
    "other decimals": GOOD.replace(b"0.5", b"5.0E-01").replace(b",1\n", b",1.0\n").replace(b",0\n", b",0.0\n"),
}


@pytest.mark.parametrize("habit", HABITS)
def test_harmless_habits_of_other_writers_are_read(tmp_path: Path, habit: str) -> None:
    check_same(HABITS[habit], "t.csv", GOOD, tmp_path)


NAMES_OF_FILES = [
    "with space.png",
    " leading and trailing ",
    'quote".png',
    "comma,comma.png",
    "line\nbreak.png",
    "carriage\rreturn.png",
    "天気.png",
    "NA",
    "1e5",
    "#comment.png",
    "caf\udce9.png",  # a file called caf\xe9.png on a disk that does not speak UTF-8
    "'single'.png",
    "\\back\\slash",
]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_any_name_that_a_file_can_have_survives_writing_and_reading(tmp_path: Path, name: str) -> None:
    count = len(NAMES_OF_FILES)
    Outputs(NAMES_OF_FILES, np.full((count, 2), 0.5, np.float32), correct=np.ones(count, bool)).save(tmp_path / name)
    assert Outputs.load(tmp_path / name).names == NAMES_OF_FILES


@pytest.mark.parametrize("script", [TRAIN_FOLDS, TRAIN_CUSTOM])
def test_a_table_given_twice_is_refused(workshop: Workshop, tmp_path: Path, script: str) -> None:
    table = workshop.table("shallow")
    line = refusal(scripts.run(script, *workshop.command(script, tmp_path), "--cls-output", table, table))
    assert f"table {table} is given twice" in line


@pytest.mark.parametrize("script", READERS)
def test_two_tables_of_different_classes_are_refused(workshop: Workshop, tmp_path: Path, script: str) -> None:
    other = tmp_path / "other.csv"
    other.write_bytes(scripts.table_bytes(["ant_0000.png"], num_classes=4))
    words = command(script, workshop, tmp_path, other)
    if script != EVALUATE_FOLDS:
        words += ["--cls-output", workshop.table("shallow"), other]
    line = refusal(scripts.run(script, *words))
    assert str(other) in line and "has 4" in line and "has 3" in line


def test_tables_that_fit_one_by_one_but_not_together_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "1.csv", tmp_path / "2.csv"]
    for path in paths:
        path.write_bytes(GOOD * 1000)
    monkeypatch.setattr("clcnet.data.table_files.free_bytes", lambda: 900_000)
    assert len(Outputs.load(paths[0])) == 2000
    with pytest.raises(OSError, match=r"1.csv \(0.0 GB\) and .*2.csv \(0.0 GB\) needs about"):
        load_labelled(*paths)


@pytest.mark.parametrize("script", READERS)
def test_a_table_of_5_gb_is_refused_on_a_machine_with_2_gb_free(
    workshop: Workshop, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "given.csv"
    with open(table, "wb") as file:
        file.write(b'"line\nbreak.png",0.5' + b",0.0005" * 1000 + b",1\n")
        file.write(scripts.table_bytes([f"{index}.png" for index in range(100)], num_classes=1001))
        file.truncate(5 * 10**9)  # takes no room on the disk
    monkeypatch.setattr("clcnet.data.table_files.free_bytes", lambda: 2 * 10**9)
    line = refusal(scripts.run(script, *command(script, workshop, tmp_path, table)))
    assert f"{table} (5.0 GB) needs about" in line and "2.0 GB are free; use a machine with more" in line


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_rows_of_21843_classes_are_read_in_pieces_and_all_of_them(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clcnet.data.table_files._VALUES_A_READ", 3 * 21_845)
    monkeypatch.setattr("clcnet.data.table_files._BLOCK", 100_000)
    sorted_probs = np.zeros((10, 21_843), np.float32)
    sorted_probs[:, 0], sorted_probs[:, 1] = np.linspace(0.5, 1, 10), np.linspace(0.5, 0, 10)
    Outputs([f"{row}.png" for row in range(10)], sorted_probs, correct=np.arange(10) % 3 == 0).save(tmp_path / name)
    table = Outputs.load(tmp_path / name)
    assert table.names == [f"{row}.png" for row in range(10)]
    assert table.sorted_probs.tobytes() == sorted_probs.tobytes()
    assert table.correct.tolist() == (np.arange(10) % 3 == 0).tolist()


def sparse_parquet(path: Path) -> None:
    """A small file that unpacks to 40 million rows."""
    type_ = pa.list_(pa.float32(), 1000)
    schema = pa.schema([("file", pa.string()), ("sorted_probs", type_), ("correct", pa.int8())])
    row = np.zeros(1000, np.float32)
    row[0] = 1
    probs = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(row, 1000)), 1000)
    batch = pa.record_batch([pa.array(["x"] * 1000), probs, pa.array(np.ones(1000, np.int8))], schema=schema)
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_batch(batch)


def test_a_parquet_file_that_unpacks_to_more_than_there_is_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse_parquet(tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    monkeypatch.setattr("clcnet.data.table_files.free_bytes", lambda: 10_000_000)
    with pytest.raises(OSError, match="t.parquet.*needs about 0.1 GB of memory and 0.0 GB are free"):
        Outputs.load(tmp_path / "t.parquet")


def test_memory_that_runs_out_while_reading_is_said_with_the_tables_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_bytes(GOOD)

    def run_out(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("clcnet.data.table_files.pa.csv.read_csv", run_out)
    with pytest.raises(OSError, match="t.csv does not fit into memory"):
        Outputs.load(tmp_path / "t.csv")


@pytest.mark.parametrize("said", [4, 6])
def test_a_parquet_file_with_other_rows_than_it_says_is_refused(
    tmp_path: Path, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Outputs([f"{row}.png" for row in range(5)], np.full((5, 2), 0.5, np.float32)).save(tmp_path / "t.parquet")
    file, kinds = table_files._open_parquet(tmp_path / "t.parquet")
    metadata = types.SimpleNamespace(num_rows=said, metadata=file.metadata.metadata)
    lying = types.SimpleNamespace(metadata=metadata, iter_batches=file.iter_batches)
    monkeypatch.setattr(table_files, "_open_parquet", lambda _: (lying, kinds))
    with pytest.raises(ValueError, match="t.parquet has another number of rows than it says; was it damaged"):
        Outputs.load(tmp_path / "t.parquet")


def test_a_long_name_that_parquet_repeats_at_no_cost_takes_its_memory_once(tmp_path: Path) -> None:
    names = pa.array(["x" * 50_000]).take(pa.array([0] * 2000))  # 100 MB of names, one entry in a dictionary
    probs = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 4000, pa.float32()), 2)
    content = parquet(file=names, sorted_probs=probs, correct=pa.array([1] * 2000))
    assert len(content) < 100_000
    (tmp_path / "t.parquet").write_bytes(content)
    tracemalloc.start()
    try:
        assert set(Outputs.load(tmp_path / "t.parquet").names) == {"x" * 50_000}
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
