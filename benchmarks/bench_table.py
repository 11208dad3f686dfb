"""How long does ImageNet's table, 50,000 rows of 1,000 probabilities, take to write and to read, against pandas?

    python -m benchmarks.bench_table                # about four minutes on two cores, 5 GB of memory
    python -m benchmarks.bench_table --rows 5000

Written and read, as CSV and as Parquet, by `clcnet.table` and, as CSV, by pandas with each of its engines. Every figure
is one run with the file in the system's cache. Results go to benchmarks/results/table.json and, as text, to
benchmarks/table.md.
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow

from clcnet import cli
from clcnet.report import markdown
from clcnet.table import Table, read_table, write_table

RESULTS = cli.ROOT / "benchmarks" / "results" / "table.json"
TEXT = cli.ROOT / "benchmarks" / "table.md"
NUM_CLASSES = 1000


def make_table(num_rows: int) -> Table:
    """Probabilities as a good classifier gives them: a few large ones and a long tail down to 1e-9."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (num_rows, NUM_CLASSES)).astype(np.float32)
    logits[:, 0] += generator.normal(10, 4, num_rows).astype(np.float32)
    logits -= logits.max(axis=1, keepdims=True)
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    probs = -np.sort(-probs, axis=1)
    names = [f"ILSVRC2012_val_{row + 1:08d}.JPEG" for row in range(num_rows)]
    return Table(names, probs, generator.random(num_rows) < 0.8, np.zeros(num_rows, dtype=np.int64))


Times = dict[str, tuple[float, float]]


def clock(times: Times, name: str, action: Callable[[], Any]) -> Any:
    """Run once; note seconds by the wall and of processor time (of all threads), and return the result."""
    gc.collect()
    start, used = time.perf_counter(), time.process_time()
    result = action()
    times[name] = time.perf_counter() - start, time.process_time() - used
    print(name, times[name], flush=True)
    return result


def measure(table: Table, folder: Path) -> tuple[Times, dict[str, float]]:
    """Times to write and to read in each way, and megabytes of the files."""
    ours, theirs, parquet = folder / "ours.csv", folder / "pandas.csv", folder / "ours.parquet"
    frame = pd.DataFrame(table.sorted_probs)
    frame.insert(0, "file", table.names)
    frame["correct"] = table.correct.astype(int)
    types = {column: np.float32 for column in range(1, NUM_CLASSES + 1)}
    times: Times = {}
    clock(times, "write CSV", lambda: write_table(table, ours))
    clock(times, "write Parquet", lambda: write_table(table, parquet))
    for engine in ("c", "pyarrow"):
        clock(
            times,
            f"read CSV, pandas ({engine})",
            lambda engine=engine: pd.read_csv(ours, header=None, engine=engine, dtype=types),
        )
    for name, path in [("read CSV", ours), ("read Parquet", parquet)]:
        again = clock(times, name, lambda path=path: read_table(path))
        assert again.names == table.names and np.array_equal(again.correct, table.correct)
        assert np.array_equal(again.sorted_probs.view(np.uint32), table.sorted_probs.view(np.uint32)), "bits differ"
    clock(times, "write CSV, pandas", lambda: frame.to_csv(theirs, header=False, index=False))
    return times, {path.name: path.stat().st_size / 1e6 for path in (ours, theirs, parquet)}


def as_text(results: dict[str, Any]) -> str:
    """The results as a section of the benchmarks' page."""
    times, sizes = results["seconds"], results["megabytes"]
    fastest = min(("read CSV, pandas (c)", "read CSV, pandas (pyarrow)"), key=lambda name: times[name][0])
    bounds = [
        ("write CSV", "write CSV, pandas", "pandas.DataFrame.to_csv", 0.25),
        ("read CSV", fastest, "the faster engine of pandas.read_csv", 1.0),
        ("write Parquet", "write CSV", "writing CSV", 0.25),
        ("read Parquet", "read CSV", "reading CSV", 0.25),
    ]
    rows = [
        [
            name,
            f"{times[name][0]:.1f} s",
            f"{times[other][0]:.1f} s ({what})",
            f"{times[name][0] / times[other][0]:.3f}",
            f"{times[name][1] / times[other][1]:.3f}",
            f"at most {bound:g}",
        ]
        for name, other, what, bound in bounds
    ]
    return f"""## The table: CSV and Parquet

{markdown(["table", "time", "against", "ratio", "ratio, processor time", "to stay"], rows)}

{results["rows"]:,} rows of {NUM_CLASSES:,} probabilities, read back equal bit for bit; as CSV
{sizes["ours.csv"]:.0f} MB, as Parquet {sizes["ours.parquet"]:.0f} MB. {results["machine"]}. Made by
`python -m benchmarks.bench_table --rows {results["rows"]}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=cli.positive_int, default=50_000, help="images of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times, sizes = measure(make_table(args.rows), Path(folder))
    versions = f"pandas {pd.__version__}, pyarrow {pyarrow.__version__}"
    machine = f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), {versions}"
    results = {"rows": args.rows, "machine": machine, "seconds": times, "megabytes": sizes}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    TEXT.write_text(as_text(results), encoding="utf-8")
    print(as_text(results))


if __name__ == "__main__":
    main()
