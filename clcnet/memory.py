"""How much of the machine a run may take: its cores, its memory, and how that is kept. stdlib alone."""

import contextlib
import ctypes
import os
from pathlib import Path

# what a container may use and uses, and the line of `memory.stat` that tells which part of that is mere file cache
_CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, from glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed for what is allocated next, unless the user's environment tunes it.

    On a CPU each layer's output is allocated anew. Large ones would come from the system every time, page by page,
    which can take longer than to compute them: benchmarks/bench_generate.py measures it. Other C libraries cannot be
    told, and nothing happens.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    _tell_library("mallopt", _M_MMAP_THRESHOLD, 1 << 30)
    _tell_library("mallopt", _M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Have glibc return what it keeps, before processes are forked.

    They would share it, and the system would copy every page of it that this process writes to again.
    """
    _tell_library("malloc_trim", 0)


def _tell_library(function: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        getattr(ctypes.CDLL(None), function)(*arguments)


def num_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int | None:
    """What this process may still take: the least that machine, container and process limit leave; None if unknown."""
    known = [free for free in (_of_machine(), _of_container(), _of_process()) if free is not None]
    return max(min(known), 0) if known else None


def _of_machine() -> int | None:
    try:
        # what is free and what the system holds as file cache and gives back
        return _fields(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on Linux
        return None


def _of_container() -> int | None:
    for limit, used, statistics, cache in _CONTAINERS:
        try:
            free = int(Path(limit).read_text()) - int(Path(used).read_text())
            return free + _fields(Path(statistics)).get(cache, 0)
        except (OSError, ValueError):  # no container of this kind, or one without a limit ("max")
            continue
    return None


def _of_process() -> int | None:
    try:
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number on each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
