"""Processes that torchrun started, and the single one that it did not."""

import os
import subprocess
import sys
from pathlib import Path

from forking import exchange, run_together

from clcnet import distributed

ROOT = Path(__file__).resolve().parent.parent

FAIL = """
from clcnet import cli, distributed

def main(args):
    with distributed.processes():
        if distributed.rank() == 1:
            raise ValueError("process 1 has had enough; let it rest")
        distributed.gather(None)
        distributed.barrier()
    return {}

cli.run(main, cli.ArgumentParser())
"""


def test_without_torchrun_the_only_process_is_the_main_one() -> None:
    with distributed.processes():
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.gather("mine") == ["mine"]
        assert distributed.broadcast("mine") == "mine"
        distributed.barrier()


def test_values_are_gathered_by_the_main_process_in_order_and_its_own_go_to_all(tmp_path: Path) -> None:
    assert run_together(2, exchange, tmp_path) == [0, 0]
    assert (tmp_path / "0").read_text() == "[2, True, [{'rank': 0}, {'rank': 1}], 'from 0']"
    assert (tmp_path / "1").read_text() == "[2, False, None, 'from 0']"


def test_one_failing_process_ends_all_and_its_message_is_seen(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAIL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "fail.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "error: process 1 has had enough; let it rest\n" in done.stderr
    assert "traceback : error: process 1 has had enough; let it rest\n" in done.stderr  # in torchrun's own summary
    assert f'File "{tmp_path}' not in done.stderr  # torchrun adds a traceback of its own; ours have none
