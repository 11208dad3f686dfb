"""What the benchmarks share: where data lie and results go, and how time and memory are taken."""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from clcnet import cli
from clcnet.memory import num_cores

SHARED = cli.ROOT.parent / "shared"
RESULTS = cli.ROOT / "benchmarks" / "results"


def kept(name: str) -> dict[str, Any]:
    """What was measured before; nothing where nothing was."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(name: str, results: object, page: str = "") -> None:
    """Write results/NAME.json and the page of it, if there is one, results/NAME.md; print the latter, or the former."""
    text = json.dumps(results, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    if page:
        (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    print(page or text, flush=True)


def machine(*libraries: ModuleType, gpu: str = "") -> str:
    """What it was measured on, in words."""
    versions = [f"{library.__name__} {library.__version__}" for library in libraries]
    return ", ".join([f"{gpu or f'{num_cores()} cores'} ({platform.machine()})", *versions])


def seconds_of(action: Callable[[], object], turns: int) -> list[float]:
    """Of every turn, after one to warm up."""
    action()
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return taken


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own; unlike one of a `Pool`, it may have decoding processes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def peak_mebibytes() -> float:
    """The most memory that this process has taken; `getrusage` would count its parent's too. Linux alone."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def resident_megabytes(process: int | str = "self") -> float:
    """The memory that a process takes now. Linux alone."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
