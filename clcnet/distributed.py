"""Several processes, on one machine or more, started by `torchrun`: who am I, and bring the results together.

Results travel as numpy arrays in main memory, so the processes always talk over gloo, whatever device their models run
on. Started without torchrun, a script is the one and only process and nothing is initialised.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

# the main process may be writing a large table meanwhile; a process that died is noticed by torchrun, not by this
_PATIENCE = datetime.timedelta(hours=12)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started; leave them at the end, after all have come that far."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
        barrier()  # torchrun ends all processes as soon as one has ended with an error
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        _together(dist.barrier)


def gather(value: Any) -> list[Any] | None:
    """Bring one value from every process to the main one: a list by rank there, None elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    _together(dist.gather_object, value, values)
    return values


def broadcast(value: Any) -> Any:
    """Give the main process's value to all."""
    if not dist.is_initialized():
        return value
    box = [value]
    _together(dist.broadcast_object_list, box)
    return box[0]


def _together(operation: Any, *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise ConnectionAbortedError("another process of this run failed and said why; see its message") from error
