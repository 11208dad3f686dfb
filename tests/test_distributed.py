"""Processes that torchrun started, and the single one that it did not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
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


def refusal_of(environment: dict[str, str]) -> str:
    program = "from clcnet import cli, distributed\n" + FAIL[FAIL.index("def main") :].replace("== 1", "== 0")
    environment = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def test_variables_that_a_cluster_left_behind_are_named_and_empty_ones_mean_nothing() -> None:
    advice = "unset WORLD_SIZE to run alone"
    assert refusal_of({"WORLD_SIZE": "4"}).startswith("error: WORLD_SIZE is set in the environment but RANK is not")
    assert refusal_of({"WORLD_SIZE": "4", "RANK": "0"}).endswith(advice)
    assert refusal_of({"WORLD_SIZE": "x"}).endswith(
        "'x' in the environment, and should be a number; unset it to run alone"
    )
    assert refusal_of({"WORLD_SIZE": ""}) == "error: process 1 has had enough; let it rest"  # it ran alone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_others_says_so_and_ends_on_a_signal(rank: str, number: signal.Signals) -> None:
    port = {"0": "29671", "1": "29672"}[rank]
    environment = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = [sys.executable, "-c", FAIL]
    process = subprocess.Popen(program, env=os.environ | environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    expected = f"waiting for 1 other process at 127.0.0.1:{port}, since WORLD_SIZE is 2; unset it to run alone\n"
    assert process.stderr.readline() == expected
    process.send_signal(number)
    assert process.wait(20) == 130


def test_processes_that_somebody_else_started_meet(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAIL)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29673", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "fail.py")]
    started = [
        subprocess.Popen(command, env=os.environ | environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("1", "0")
    ]
    ends = [process.communicate(timeout=120)[1].splitlines()[-1] for process in started]
    assert ends[0] == "error: process 1 has had enough; let it rest"
    assert "another process of this run failed" in ends[1]
