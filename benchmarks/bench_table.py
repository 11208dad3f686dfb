"""How long does ImageNet's table, 50,000 rows of 1,000 probabilities, take to write and to read, against pandas?

    python -m benchmarks.bench_table                # about four minutes on two cores, 5 GB of memory
    python -m benchmarks.bench_table --rows 5000

Written and read, as CSV and Parquet, by `clcnet.data.outputs` and, as CSV, by pandas with each of its engines, into the
same arrays of names, probabilities and labels. Writing is one run; reading the median of several in turn, each in a
process of its own, because memory that an earlier one gave back would be quicker to get; the file is in the system's
cache. Results go to benchmarks/results/table.json and, as text, to benchmarks/results/table.md.
"""

import argparse
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow

from benchmarks.measured import in_fresh_process, keep, machine
from clcnet import cli
from clcnet.data.outputs import Outputs
from clcnet.report.tables import markdown

NUM_CLASSES = 1000
TURNS = 7


def make_table(num_rows: int) -> Outputs:
    """Probabilities as a good classifier gives them: a few large ones and a long tail down to 1e-9."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (num_rows, NUM_CLASSES)).astype(np.float32)
    logits[:, 0] += generator.normal(10, 4, num_rows).astype(np.float32)
    logits -= logits.max(axis=1, keepdims=True)
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    names = [f"ILSVRC2012_val_{row + 1:08d}.JPEG" for row in range(num_rows)]
    targets = np.where(generator.random(num_rows) < 0.8, probs.argmax(axis=1), 1)
    return Outputs.from_probs(probs, names, targets)


def clock(action: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one run."""
    gc.collect()
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def read_by_pandas(path: Path, engine: Literal["c", "pyarrow"]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, probabilities and labels, as `Outputs.load` has them, though unchecked."""
    types = {column: np.float32 for column in range(1, NUM_CLASSES + 1)}
    frame = pd.read_csv(path, header=None, engine=engine, dtype=types)
    return frame[0].tolist(), frame.iloc[:, 1:-1].to_numpy(np.float32), frame.iloc[:, -1].to_numpy(bool)


def check_same(read: Outputs, written: Outputs) -> None:
    """Bit for bit."""
    assert read.names == written.names and np.array_equal(read.correct, written.correct)
    assert np.array_equal(read.sorted_probs.view(np.uint32), written.sorted_probs.view(np.uint32)), "bits differ"


def measure(table: Outputs, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times to write and to read in each way, and megabytes of the files."""
    ours, theirs, parquet = folder / "ours.csv", folder / "pandas.csv", folder / "ours.parquet"
    frame = pd.DataFrame(table.sorted_probs)
    frame.insert(0, "file", table.names)
    frame["correct"] = table.correct.astype(int)
    times = {
        "write CSV": [clock(table.save, ours)],
        "write Parquet": [clock(table.save, parquet)],
        "write CSV, pandas": [clock(functools.partial(frame.to_csv, header=False, index=False), theirs)],
    }
    for path in (ours, parquet):
        check_same(Outputs.load(path), table)
    readers: dict[str, tuple[Any, ...]] = {
        "read CSV": (Outputs.load, ours),
        "read CSV, pandas (c)": (read_by_pandas, ours, "c"),
        "read CSV, pandas (pyarrow)": (read_by_pandas, ours, "pyarrow"),
        "read Parquet": (Outputs.load, parquet),
    }
    for _ in range(TURNS):
        for name, reader in readers.items():
            times.setdefault(name, []).append(in_fresh_process(clock, *reader))
    print(times, flush=True)
    return times, {path.name: path.stat().st_size / 1e6 for path in (ours, theirs, parquet)}


def median_of_ratios(ours: list[float], theirs: list[float]) -> float:
    """Turn by turn where both took turns; else of the medians."""
    if len(ours) != len(theirs):
        return statistics.median(ours) / statistics.median(theirs)
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def as_text(results: dict[str, Any]) -> str:
    """The results as a section of the benchmarks' page."""
    times, sizes = results["seconds"], results["megabytes"]
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    fastest = min(("read CSV, pandas (c)", "read CSV, pandas (pyarrow)"), key=lambda name: median[name])
    bounds = [
        ("write CSV", "write CSV, pandas", "pandas.DataFrame.to_csv", 0.25),
        ("read CSV", fastest, "the faster engine of pandas.read_csv", 1.2),
        ("write Parquet", "write CSV", "writing CSV", 0.25),
        ("read Parquet", "read CSV", "reading CSV", 0.25),
    ]
    rows = [
        [
            name,
            f"{median[name]:.1f} s",
            f"{median[other]:.1f} s ({what})",
            f"{median_of_ratios(times[name], times[other]):.3f}",
            f"at most {bound:g}",
        ]
        for name, other, what, bound in bounds
    ]
    return f"""## The table: CSV and Parquet

{markdown(["table", "time", "against", "ratio", "to stay"], rows)}

{results["rows"]:,} rows of {NUM_CLASSES:,} probabilities, read back equal bit for bit and checked row by row; by pandas
into the same arrays, unchecked. As CSV {sizes["ours.csv"]:.0f} MB, as Parquet {sizes["ours.parquet"]:.0f} MB.
{results["machine"]}. Made by
`python -m benchmarks.bench_table --rows {results["rows"]}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=cli.positive_int, default=50_000, help="images of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times, sizes = measure(make_table(args.rows), Path(folder))
    results = {"rows": args.rows, "machine": machine(pd, pyarrow), "seconds": times, "megabytes": sizes}
    keep("table", results, as_text(results))


if __name__ == "__main__":
    main()
