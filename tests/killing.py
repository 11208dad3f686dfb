"""Killing the scripts at random points, and seeing what they leave and how they go on."""

import random
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import forking
from scripts import EVALUATE_CUSTOM, GENERATE, Workshop, contents

RESUMABLE = (GENERATE, EVALUATE_CUSTOM)
OLD = b"from an earlier run"


@dataclass
class Toll:
    """What came of the kills.

    Attributes:
        kills: signals that hit a running process.
        lost: outputs that were neither the old file nor the finished one afterwards.
        different: outputs of the last, uninterrupted run that differ from those of a run that was never killed.
        bad_exits: processes that SIGTERM ended otherwise than with 130, or 0 when they were just done.
    """

    kills: int = 0
    lost: int = 0
    different: int = 0
    bad_exits: int = 0


def start(script: str, words: list[object]) -> BaseProcess:
    """Start a script in a process that has torch loaded already."""
    return forking.start(forking.run_script, script, [str(word) for word in words])


def kill_and_compare(workshop: Workshop, script: str, folder: Path, num_kills: int = 10, seed: int = 0) -> Toll:
    """Kill a script over and over, each time after a random part of its running time, then let it finish.

    Args:
        workshop: inputs.
        script: which of the five.
        folder: to work in.
        num_kills: how often; SIGKILL and SIGTERM take turns.
        seed: of the moments.
    """
    expected, seconds = _uninterrupted(workshop, script, folder / "whole")
    generator, toll, hurt = random.Random(seed), Toll(), folder / "hurt"
    hurt.mkdir()
    outputs = [path.relative_to(hurt) for path in workshop.outputs(script, hurt) if path.suffix != ".md"]
    for path in outputs:
        (hurt / path).write_bytes(OLD)
    words = workshop.command(script, hurt) + (["--resume"] if script in RESUMABLE else [])
    for kill in range(num_kills):
        process = start(script, words)
        process.join(generator.random() * seconds)
        _hit(process, (signal.SIGKILL, signal.SIGTERM)[kill % 2], toll)
        toll.lost += sum((hurt / path).read_bytes() not in (OLD, expected[path.as_posix()]) for path in outputs)
    process = start(script, words)
    process.join(120)
    after = contents(hurt)
    toll.different = sum(after.get(name) != content for name, content in expected.items())
    return toll


def _hit(process: BaseProcess, number: signal.Signals, toll: Toll) -> None:
    if process.is_alive():
        toll.kills += 1
        assert process.pid is not None
        (process.kill if number == signal.SIGKILL else process.terminate)()
    process.join(60)
    if number == signal.SIGTERM and process.exitcode not in (0, 130):
        toll.bad_exits += 1


def _uninterrupted(workshop: Workshop, script: str, folder: Path) -> tuple[dict[str, bytes], float]:
    """The outputs, caches apart, and the seconds of a run that nobody disturbs; the second one, when all is loaded."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        process = start(script, workshop.command(script, folder))
        process.join(120)
        assert process.exitcode == 0, (script, process.exitcode)
    seconds = time.perf_counter() - started
    kept = {name: content for name, content in contents(folder).items() if not name.startswith("cache/")}
    return kept, seconds
