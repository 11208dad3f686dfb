"""Several processes, on one machine or more, started by `torchrun`: who am I, and bring the results together.

Results travel as numpy arrays in main memory, so the processes always talk over gloo, whatever device their models run
on. Started without torchrun, a script is the one and only process and nothing is initialised.
"""

import contextlib
import datetime
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

# the main process may be writing a large table meanwhile; a process that died is noticed by torchrun, not by this
_PATIENCE = datetime.timedelta(hours=12)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started; leave them at the end, after all have come that far.

    Raises:
        ValueError: the environment speaks of several processes, as clusters set it, and does not say which one this is.
    """
    if _number("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set in the environment but {missing[0]} is not, so torchrun did not start this; unset "
            "WORLD_SIZE to run alone"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _wait_for_others()
    _together(dist.init_process_group, "gloo", timeout=_PATIENCE)  # one may have failed while the others still meet
    try:
        yield
        barrier()  # torchrun ends all processes as soon as one has ended with an error
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """A whole number of the environment; an empty one counts as not set."""
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r} in the environment, and should be a number; unset it to run alone")
    return int(text)


def _wait_for_others() -> None:
    """Wait until all processes are there, and say so: the variables may be left over, and nobody else may come.

    In steps, between which Python acts on a signal: torch's own rendezvous waits for hours in one call.
    """
    number, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    place = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    others = f"{count - 1} other process{'es' if count > 2 else ''} at {place[0]}:{place[1]}"
    print(f"waiting for {others}, since WORLD_SIZE is {count}; unset it to run alone", file=sys.stderr, flush=True)
    if number == 0:
        _meet_others(place, count)
        return
    while True:
        try:
            with socket.create_connection(place, timeout=1) as meeting:
                meeting.settimeout(None)
                if meeting.recv(1):
                    return
        except OSError:  # the main process is not there yet
            time.sleep(0.2)


def _meet_others(place: tuple[str, int], count: int) -> None:
    """Take a call from each of the other processes, then tell all of them that they are complete."""
    try:
        server = socket.create_server(place)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR {place[0]} and MASTER_PORT {place[1]} cannot be used ({error.strerror})"
        ) from None
    with server:
        calls = [server.accept()[0] for _ in range(count - 1)]
    for call in calls:
        call.sendall(b"!")
        call.close()


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


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse to share work among processes that were given different work.

    Raises:
        ValueError: in the main process, naming the first fact that differs.
    """
    for number, theirs in enumerate(gather(dict(facts)) or []):
        for name, value in facts.items():
            if theirs[name] != value:
                raise ValueError(
                    f"process {number} has {name} {theirs[name]} and process 0 has {value}; give every machine the "
                    "same images and model"
                )


def _together(operation: Any, *arguments: Any, **options: Any) -> None:
    try:
        operation(*arguments, **options)
    except RuntimeError as error:
        raise ConnectionAbortedError(
            "another process of this run failed or was killed; where it ran it says why, and the same command goes on"
        ) from error
