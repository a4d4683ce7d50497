"""The peak memory of a piece of work in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(work: Callable[[], Any]) -> tuple[float, float]:
    """What this process holds before some work, and the most that it holds during the work, in MiB. Linux only.

    The peak is read from /proc, where it can begin anew. `ru_maxrss` cannot: a process that another one starts begins
    with the peak of the other.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _mib("VmRSS")
    work()
    return before, _mib("VmHWM")


def _mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
