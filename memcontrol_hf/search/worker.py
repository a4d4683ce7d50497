"""Which process works on a trial, and whether that process is still alive."""

import socket
from datetime import datetime, timedelta
from typing import Any

import psutil
from optuna.trial import FrozenTrial

_UNNAMED = timedelta(seconds=10)  # how long a trial may run before its process has written down who it is


def this_worker() -> list[Any]:
    """The identity of this process: the machine's name, the process number, and the time when it was started."""
    process = psutil.Process()
    return [socket.gethostname(), process.pid, process.create_time()]


def is_alive(trial: FrozenTrial, timeout: float | None = None) -> bool:
    """Whether the process of a running trial is still there.

    Args:
        trial (`FrozenTrial`):
            A trial that is recorded as running.
        timeout (`float`, *optional*):
            Seconds that a trial may take. Nothing can be known of a process on another machine, so its trial is given
            up after twice this time; without a timeout, never.
    """
    age = datetime.now() - trial.datetime_start
    if "worker" not in trial.user_attrs:  # killed, or about to say who it is
        return age < _UNNAMED
    host, pid, created = trial.user_attrs["worker"]
    if host != socket.gethostname():
        return timeout is None or age < timedelta(seconds=2 * timeout)
    try:
        return psutil.Process(pid).create_time() == created
    except psutil.NoSuchProcess:
        return False
