"""The most memory that this process has taken."""

from pathlib import Path


def peak_mebibytes() -> float:
    """Since it was started; `getrusage` would count that of the process that started it too. Linux alone."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
