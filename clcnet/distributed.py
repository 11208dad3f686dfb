"""Several processes started by `torchrun`, on one machine or more: who am I, which device is mine, what comes together.

Results travel as numpy arrays in main memory, so the processes always talk over gloo, whatever device their models run
on. Started without torchrun, a script is the one and only process and nothing is initialised.
"""

import contextlib
import datetime
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from clcnet.files import first_sentence

# the main process may be writing a large table meanwhile; a process that died is noticed by torchrun, not by this
_PATIENCE = datetime.timedelta(hours=12)
_FAILED = "another process of this run failed or was killed; where it ran it says why, and the same command goes on"
_alone = False


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started; leave them at the end, after all have come that far.

    Raises:
        ValueError: the environment speaks of several processes, as clusters set it, and does not say which one this is.
    """
    text = os.environ.get("WORLD_SIZE") or "1"  # an empty one counts as not set
    if not text.isdigit():
        raise ValueError(f"WORLD_SIZE is {text!r} in the environment, and should be a number; unset it to run alone")
    world = int(text)
    if world == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set in the environment but {missing[0]} is not, so torchrun did not start this; unset "
            "WORLD_SIZE to run alone"
        )
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # the variables may be left over, and nobody else may come
        count, place = world - 1, f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        others = f"{count} other process{'es' if count > 1 else ''} at {place}"
        print(f"waiting for {others}, since WORLD_SIZE is {world}; unset it to run alone", file=sys.stderr, flush=True)
    _meet_others()
    try:
        yield
        barrier()  # torchrun ends all processes as soon as one has ended with an error
    finally:
        dist.destroy_process_group()


def _meet_others() -> None:
    """In a thread, beside which Python acts on signals: torch waits for hours in one call."""
    errors: list[Exception] = []

    def meet() -> None:
        try:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors and "listen" in str(errors[0]):
        place = f"MASTER_ADDR {os.environ['MASTER_ADDR']} and MASTER_PORT {os.environ['MASTER_PORT']}"
        raise ValueError(f"{place} cannot be used ({str(errors[0]).splitlines()[0]})")
    if errors:
        raise ConnectionAbortedError(_FAILED) from errors[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the main process work by itself meanwhile, as if there were no others; these wait in what follows."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _several() -> bool:
    return dist.is_initialized() and not _alone


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _several():
        _together(dist.barrier)


def gather(value: Any) -> list[Any] | None:
    """Bring one value from every process to the main one: a list by rank there, None elsewhere."""
    if not _several():
        return [value]
    values = [None] * world_size() if is_main() else None
    _together(dist.gather_object, value, values)
    return values


def broadcast(value: Any) -> Any:
    """Give the main process's value to all."""
    if not _several():
        return value
    box = [value]
    _together(dist.broadcast_object_list, box)
    return box[0]


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse, in the main process, to share work among processes that were given different work."""
    for number, theirs in enumerate(gather(dict(facts)) or []):
        for name, value in facts.items():
            if theirs[name] != value:
                raise ValueError(
                    f"process {number} has {name} {theirs[name]} and process 0 has {value}; give every machine the "
                    "same images and model"
                )


def _together(operation: Any, *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise ConnectionAbortedError(_FAILED) from error


def resolve_device(text: torch.device | str | None = None) -> torch.device:
    """The device named, or the best one here: cuda, then mps, then cpu. Processes of one torchrun take a GPU each.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if isinstance(text, torch.device):
        return text
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what names no device is then on this one: events, streams, pinned memory
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_sentence(error)
        raise ValueError(f"device {text} cannot be used here ({reason}); give another --device or none") from None
    if device.type == "meta":
        raise ValueError("device meta computes nothing; give another --device or none")
    return device
