"""How much memory is free: the least that machine, container and process limit leave."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from clcnet import memory
from clcnet.cli import ROOT

GB = 10**9


@pytest.mark.parametrize(
    ("machine", "container", "process", "expected"),
    [
        (8 * GB, None, None, 8 * GB),
        (8 * GB, 2 * GB, None, 2 * GB),
        (8 * GB, 2 * GB, 1 * GB, 1 * GB),
        (8 * GB, -5, None, 0),
        (None, None, 3 * GB, 3 * GB),
        (None, None, None, None),
    ],
)
def test_the_narrowest_limit_counts(
    machine: object, container: object, process: object, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_of_machine", lambda: machine)
    monkeypatch.setattr(memory, "_of_container", lambda: container)
    monkeypatch.setattr(memory, "_of_process", lambda: process)
    assert memory.free_bytes() == expected


def test_this_machine_has_some_memory_free_and_not_more_than_it_has() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("only Linux tells all of its memory there")
    free = memory.free_bytes()
    assert free is not None and 0 < free <= memory._fields(meminfo)["MemTotal:"] * 1024


@pytest.mark.parametrize(("limit", "free"), [("1000\n", 600), ("max\n", None)])
def test_a_containers_limit_counts_its_file_cache_as_free(
    tmp_path: Path, limit: str, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container of the newer kind that uses 700 bytes, 300 of them as file cache."""
    places = [tmp_path / name for name in ("memory.max", "memory.current", "memory.stat")]
    for place, content in zip(places, (limit, "700\n", "anon 400\ninactive_file 300\n"), strict=True):
        place.write_text(content)
    none = [tmp_path / "none"] * 3
    monkeypatch.setattr(memory, "_CONTAINERS", [(*none, "x"), (*places, "inactive_file")])
    assert memory._of_container() == free


def test_a_limit_of_this_process_counts() -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells what a process has")
    assert memory._of_process() is None or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * GB, before[1]))
    try:
        free = memory._of_process()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert free == pytest.approx(2 * GB, abs=0.1 * GB)


def test_without_the_file_of_linux_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> dict[str, int]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory, "_fields", missing)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory._of_machine() == 4_096_000
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory._of_machine() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told to keep freed memory")
def test_freed_memory_is_kept_until_it_is_to_be_returned() -> None:
    program = (
        "import resource\n"
        "from pathlib import Path\n"
        "from clcnet import memory\n"
        "def taken(): return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()\n"
        "memory.keep_freed_memory()\n"
        "at_first = taken()\n"
        "blocks = [b'x' * 10_000_000 for _ in range(6)]\n"
        "del blocks\n"
        "kept = taken()\n"
        "memory.return_freed_memory()\n"
        "print(kept - at_first, taken() - at_first)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    kept, returned = map(int, printed.split())
    assert kept > 55_000_000 and returned < 5_000_000
