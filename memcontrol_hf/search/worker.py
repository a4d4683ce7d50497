"""Which process works on a trial, and whether that process is still alive."""

import os
import socket
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

STARTED = "started"
"""The attribute of a trial: when it was started, in seconds since 1970.

A gRPC proxy tells Optuna's own `datetime_start` as the clocks of its time zone show it.
"""

_UNNAMED = timedelta(seconds=10)  # how long a trial may run before its process has written down who it is


def this_worker() -> list[Any]:
    """The identity of this process: the machine's name, the process number, and when it was started."""
    pid = os.getpid()
    return [socket.gethostname(), pid, _started(pid)]


def is_alive(trial: FrozenTrial, timeout: float | None = None) -> bool:
    """Whether the process of a running trial is still there.

    Args:
        trial (`FrozenTrial`):
            A trial that is recorded as running.
        timeout (`float`, *optional*):
            Seconds that a trial may take, with all of its measuring. Nothing can be known of a process on another
            machine, so its trial is given up after twice this time; without a timeout, never.
    """
    if "worker" not in trial.user_attrs:  # killed, or about to say who it is
        return datetime.now() - trial.datetime_start < _UNNAMED
    host, pid, created = trial.user_attrs["worker"]
    if host != socket.gethostname():
        started = trial.user_attrs.get(STARTED, trial.datetime_start.timestamp())  # earlier versions do not say it
        return timeout is None or time.time() - started < 2 * timeout
    try:
        return _started(pid) == created
    except psutil.NoSuchProcess:
        return False


def seconds_of_a_trial(study: optuna.Study, timeout: float | None) -> float | None:
    """The `timeout` of [`is_alive`] for the trials of a study; `None` where there is no `trial_timeout`.

    A `trial_timeout` counts the training alone, so a whole trial may take as long as the longest finished one.
    """
    if timeout is None:
        return None
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max([timeout, *(trial.duration.total_seconds() for trial in finished)])


def wait_for_names(study: optuna.Study, poll_seconds: float = 0.2) -> None:
    """Wait until the process of each running trial has written down who it is, or was killed before it could."""
    states = (TrialState.RUNNING,)
    while any("worker" not in t.user_attrs and is_alive(t) for t in study.get_trials(deepcopy=False, states=states)):
        time.sleep(poll_seconds)


def _started(pid: int) -> str | float:
    """When a process was started. On Linux in clock ticks since the boot, since the time of day can be set anew."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return f"{ticks} after boot {Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}"
    except OSError:  # another system, or no such process
        return psutil.Process(pid).create_time()
