"""Killing the scripts at random points, and seeing what they leave and how they go on."""

import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import forking
from scripts import Workshop, contents

OLD = b"from an earlier run"
_TRIES_A_KILL = 5  # a run may be over before its signal comes


@dataclass
class Toll:
    """What came of the kills.

    Attributes:
        kills: signals that hit a running process.
        finished: runs that came to their end, the last one or before their signal; their outputs are compared.
        lost: outputs that were neither the old file nor the finished one after a kill.
        different: outputs of finished runs that differ from those of a run that was never killed.
        rows: rows that finished runs should have written in CSV files.
        rows_lost: rows of these that they did not write.
        bad_exits: processes that ended otherwise than with 0, or 130 after SIGTERM, or by SIGKILL.
    """

    kills: int = 0
    finished: int = 0
    lost: int = 0
    different: int = 0
    rows: int = 0
    rows_lost: int = 0
    bad_exits: int = 0


def start(script: str, words: list[object]) -> BaseProcess:
    """Start a script in a process that has torch loaded already, and wait until it heeds signals."""
    ready = forking.CONTEXT.Event()
    process = forking.start(forking.run_script, script, [str(word) for word in words], ready)
    ready.wait(60)
    return process


def kill_and_compare(workshop: Workshop, script: str, folder: Path, num_kills: int = 10, seed: int = 0) -> Toll:
    """Kill a script over and over, each time after a random part of its running time, then let it finish.

    A run goes on with what the one before it left. Where one is over before its signal comes, the next starts afresh.

    Args:
        workshop: inputs.
        script: which of the five.
        folder: to work in.
        num_kills: how many signals must hit a running process; every third is SIGTERM, the others are SIGKILL.
        seed: of the moments.
    """
    expected, seconds = _uninterrupted(workshop, script, folder / "whole")
    generator, toll, hurt = random.Random(seed), Toll(), folder / "hurt"
    words = workshop.command(script, hurt)
    outputs = [path for path in workshop.outputs(script, hurt) if path.relative_to(hurt).as_posix() in expected]
    _lay_old(hurt, outputs)
    for _ in range(num_kills * _TRIES_A_KILL):
        process = start(script, words)
        process.join(generator.random() * seconds)
        number = signal.SIGTERM if toll.kills % 3 == 2 else signal.SIGKILL
        if process.exitcode is None:
            toll.kills += 1
            (process.terminate if number == signal.SIGTERM else process.kill)()
            process.join(60)
        if process.exitcode == 0:
            _compare(hurt, expected, toll)
            _lay_old(hurt, outputs)
        else:
            toll.bad_exits += process.exitcode != (130 if number == signal.SIGTERM else -signal.SIGKILL)
            left = [(path.read_bytes(), expected[path.relative_to(hurt).as_posix()]) for path in outputs]
            toll.lost += sum(content not in (OLD, finished) for content, finished in left)
        if toll.kills == num_kills:
            break
    process = start(script, words)
    process.join(120)
    toll.bad_exits += process.exitcode != 0
    _compare(hurt, expected, toll)
    return toll


def _lay_old(hurt: Path, outputs: list[Path]) -> None:
    shutil.rmtree(hurt, ignore_errors=True)
    hurt.mkdir(parents=True)
    for path in outputs:
        path.write_bytes(OLD)


def _compare(hurt: Path, expected: dict[str, bytes], toll: Toll) -> None:
    after = contents(hurt)
    toll.finished += 1
    for name, content in expected.items():
        toll.different += after.get(name) != content
        if name.endswith(".csv"):
            rows = Counter(content.splitlines())
            toll.rows += rows.total()
            toll.rows_lost += (rows - Counter(after.get(name, b"").splitlines())).total()


def _uninterrupted(workshop: Workshop, script: str, folder: Path) -> tuple[dict[str, bytes], float]:
    """The outputs, stores apart, and the seconds of a run that nobody disturbs; the second one, when all is loaded."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        process = start(script, workshop.command(script, folder))
        process.join(120)
        assert process.exitcode == 0, (script, process.exitcode)
    seconds = time.perf_counter() - started
    kept = {name: content for name, content in contents(folder).items() if not name.startswith("store/")}
    return kept, seconds
