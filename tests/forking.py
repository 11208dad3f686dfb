"""Child processes of the tests that start at once, with torch and timm loaded: to be killed, or to work together."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["generate_data_for_CLCNet", "eval_imagenet_5fold_cv"])


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start `function(*arguments)` in a process of its own; it may have children."""
    process = CONTEXT.Process(target=_run, args=(function, arguments, {}))
    process.start()
    return process


def run_together(num_processes: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Run a function in several processes that see what torchrun would tell them; return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(num_processes)}
    processes = []
    for rank in range(num_processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        processes.append(CONTEXT.Process(target=_run, args=(function, arguments, shared | own)))
        processes[-1].start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def exchange(folder: Path) -> None:
    """Use every way of talking between processes and write down what came of it."""
    from clcnet import distributed

    with distributed.processes():
        distributed.barrier()
        gathered = distributed.gather({"rank": distributed.rank()})
        told = distributed.broadcast(f"from {distributed.rank()}")
        result = [distributed.world_size(), distributed.is_main(), gathered, told]
        (folder / str(distributed.rank())).write_text(repr(result))


def run_script(script: str, words: list[str], ready: Any = None) -> None:
    """Run one of the five scripts from its command line to its exit code, silently; `ready` is an event to be set."""
    import importlib
    import signal
    import sys

    from clcnet import cli

    # what `cli.run` gives back at its end: a child of multiprocessing never comes to the `atexit` of a script
    signal.signal(signal.SIGTERM, lambda *_: os._exit(cli.EXIT_INTERRUPTED))
    if ready:
        ready.set()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = [f"{script}.py", *words]
    cli.expect_interrupts()  # as the script does before its imports
    module = importlib.import_module(script)
    cli.run(module.main, module.get_args_parser())
