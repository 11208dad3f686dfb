"""What the scripts with models set before torch starts: how its threads wait, and that freed memory is kept."""

import os
import platform
import subprocess
import sys

import pytest
from scripts import EVALUATE_CUSTOM, EVALUATE_FOLDS, GENERATE, TRAIN_CUSTOM

from clcnet.cli import ROOT

# runs a script up to its import of torch, then ends with what it finds
STOP_AT_TORCH = """
import os, resource, runpy, sys

def pages_that_a_second_allocation_takes_from_the_system():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = b"x" * (64 << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(f"{os.environ.get('OMP_WAIT_POLICY')} {pages_that_a_second_allocation_takes_from_the_system()}")

sys.meta_path.insert(0, Stop())
runpy.run_path(sys.argv[1], run_name="__main__")
"""
TUNES = ("OMP_WAIT_POLICY", "MALLOC_", "GLIBC_TUNABLES")


def state_at_torch(script: str, **environment: str) -> tuple[str, int]:
    """The waiting policy of threads, and the pages that allocating 64 MiB a second time takes from the system."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(TUNES)}
    command = [sys.executable, "-c", STOP_AT_TORCH, f"{script}.py"]
    ended = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False, timeout=60
    )
    policy, pages = ended.stderr.split()
    return policy, int(pages)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (GENERATE, "PASSIVE"),
        (EVALUATE_CUSTOM, "PASSIVE"),
        (EVALUATE_FOLDS, "None"),  # it times single images, which wait for threads to wake up
        (TRAIN_CUSTOM, "None"),  # no processes decode
    ],
)
def test_threads_sleep_while_they_wait_where_processes_decode(script: str, expected: str) -> None:
    assert state_at_torch(script)[0] == expected


def test_the_users_waiting_policy_stays() -> None:
    assert state_at_torch(GENERATE, OMP_WAIT_POLICY="ACTIVE")[0] == "ACTIVE"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told to keep freed memory")
@pytest.mark.parametrize("script", [GENERATE, EVALUATE_CUSTOM, EVALUATE_FOLDS])
def test_memory_that_was_freed_is_not_taken_from_the_system_again(script: str) -> None:
    assert state_at_torch(script)[1] < 100
    assert state_at_torch(script, MALLOC_TOP_PAD_="0")[1] > 10_000  # the user tunes it: as it was, in pages of 4 KiB
