"""`torchrun` over two nodes, both on this machine: the file of one process, and what is left when a node dies."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from scripts import run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "generate_data_for_CLCNet.py"
# the script, in whose second batch this node's process ends
DYING = """
import os, runpy, signal, sys
from clcnet.classifiers.classifier import Classifier

answer, batches = Classifier.probabilities, []

def die(self, batch):
    batches.append(len(batch))
    if len(batches) == 2:
        {death}
    return answer(self, batch)

Classifier.probabilities = die
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
BROKEN_DISK = 'raise OSError(5, "Input/output error", "/scratch of node 1")'
POWER_CUT = "os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)"


def start(scripts: list[Path], words: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """A torchrun a node, of one process each; they meet at a port of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = ["--master-addr", "localhost", "--master-port", str(free.getsockname()[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for rank, script in enumerate(scripts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), *meeting]
        command = [*torchrun, "--nproc-per-node", "1", str(script), *words]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ended = [process.communicate(timeout=180) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(started, ended, strict=True)
    ]


def test_two_nodes_write_the_file_of_one_and_go_on_where_a_node_died(
    image_folder: Callable[..., Path], classifier_dir: Callable[..., Path], tmp_path: Path, one_thread: None
) -> None:
    folder = image_folder(images_per_class=12)  # ten batches, of which a run that dies leaves most
    (folder / "ant" / "bad.png").touch()
    words = ["--data-path", str(folder), "--model", f"local-dir:{classifier_dir()}", "-b", "4", "-j", "0"]
    words += ["--device", "cpu", "--store", str(tmp_path / "store"), "--output"]
    assert run(SCRIPT.stem, *words, tmp_path / "one.csv").code == 3  # the unreadable image
    shutil.rmtree(tmp_path / "store")
    words.append(str(tmp_path / "two.csv"))
    dying = tmp_path / "dying.py"
    for death in (BROKEN_DISK, POWER_CUT):
        dying.write_text(DYING.format(death=death, script=str(SCRIPT)))
        main, other = start([SCRIPT, dying], words)
        assert main.returncode != 0 and other.returncode != 0
        assert "error: another process of this run failed or was killed" in main.stderr, main.stderr
        assert f'File "{ROOT / "clcnet"}' not in main.stderr  # torchrun adds a traceback of its own; ours have none
        if death == BROKEN_DISK:
            assert "error: /scratch of node 1: Input/output error" in other.stderr, other.stderr
        assert not (tmp_path / "two.csv").exists() and any((tmp_path / "store").iterdir())

    main, other = start([SCRIPT, SCRIPT], words)
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    for suffix in (".csv", ".csv.errors.csv"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()
    assert main.stdout.count("top-1") == 1 and "top-1" not in other.stdout  # the first node speaks
