"""Work that exactly one of a study's workers does. Workers claim it by asking for a trial of a study of its own."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import optuna
from optuna.trial import FrozenTrial

from .worker import is_alive, this_worker, wait_for_names

FINAL, SCREENING = "-final", "-screening"
"""What the name of the study has at its end by which one worker takes the final fine-tune, or makes the screening."""

SILENCE = 600.0
"""Seconds without a sign of life after which a claim of another machine is taken by the next worker.

That is twice as long as a worker waits for a server of the study that does not answer.
"""

_BEAT = 120.0  # seconds between two signs of life
_SEEN = "seen"  # attribute of a claim: seconds since 1970, at its worker's last sign of life


def check_study_name(name: str, called: str = "study_name") -> None:
    """Raise `ValueError` for a name that the claims on another study have; `called` is what the caller calls it."""
    if name.endswith((FINAL, SCREENING)):
        raise ValueError(
            f"{called} must not end in {FINAL} or {SCREENING}, as the names do under which the workers of a study "
            f"claim work, but is {name!r}: give another name"
        )


def is_held(claim: FrozenTrial) -> bool:
    """Whether the worker of a claim has not released the claim and is alive.

    A worker of another machine is alive while it gives signs of life, which a claim of an earlier version has not.
    """
    if claim.state.is_finished():
        return False
    if claim.user_attrs.get("worker", [socket.gethostname()])[0] == socket.gethostname():
        return is_alive(claim)
    return time.time() - last_sign_of_life(claim) < SILENCE


def last_sign_of_life(claim: FrozenTrial) -> float:
    """When the worker of a claim was last seen at work, in seconds since 1970; earlier versions do not say it."""
    return claim.user_attrs.get(_SEEN, (claim.datetime_complete or claim.datetime_start).timestamp())


def holders(study: optuna.Study, work: str) -> str:
    """The processes that hold a claim on a piece of work of the study, in words; empty when there is none."""
    claims = optuna.load_study(storage=study._storage, study_name=study.study_name + work)
    held = [claim.user_attrs.get("worker") for claim in claims.get_trials(deepcopy=False) if is_held(claim)]
    return ", ".join(f"process {worker[1]} on {worker[0]}" for worker in held if worker)  # one may have no name yet


class Claim:
    """A claim on a piece of work, which the worker holds until it releases the claim or its process ends.

    A thread gives signs of life all the while, by which workers of other machines know that the claim is held.

    Args:
        study (`optuna.Study`): the study of the claims.
        trial (`optuna.Trial`): the trial that stands for the claim.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial) -> None:
        self._study, self._trial = study, trial
        self._released = threading.Event()
        threading.Thread(target=self._give_signs_of_life, daemon=True).start()

    def _give_signs_of_life(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(Exception):  # the study's server may be gone for a while, and the work goes on without it
                self._trial.set_user_attr(_SEEN, time.time())

    @classmethod
    def make(cls, study: optuna.Study, work: str, holds: Callable[[FrozenTrial], bool]) -> "Claim | None":
        """Claim a piece of work.

        Args:
            study (`optuna.Study`): the study whose workers share the work.
            work (`str`): `FINAL` or `SCREENING`.
            holds (`Callable`): whether an earlier claim still holds.

        Returns:
            [`Claim`]; `None` when an earlier claim holds.
        """
        claims = optuna.create_study(storage=study._storage, study_name=study.study_name + work, load_if_exists=True)
        named = (trial for trial in claims.get_trials(deepcopy=False) if "worker" in trial.user_attrs)
        if any(map(holds, named)):
            return None  # who waits for the work asks again and again, and leaves no trial each time
        claim = claims.ask()
        claim.set_user_attr(_SEEN, time.time())
        claim.set_user_attr("worker", this_worker())
        wait_for_names(claims)
        earlier = [trial for trial in claims.get_trials(deepcopy=False) if trial.number < claim.number]
        if any(map(holds, earlier)):
            claims.tell(claim, state=optuna.trial.TrialState.FAIL)
            return None
        return cls(claims, claim)

    def release(self) -> None:
        """Record that the work has ended, after an error, too."""
        self._released.set()
        self._trial.set_user_attr(_SEEN, time.time())
        self._study.tell(self._trial, 0.0)
