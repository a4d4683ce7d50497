"""Work that exactly one of a study's workers does. Workers claim it by asking for a trial of a study of its own."""

from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial

from .worker import this_worker, wait_for_names

FINAL, SCREENING = "-final", "-screening"
"""What the name of the study has at its end by which one worker takes the final fine-tune, or makes the screening."""


class Claim:
    """A claim on a piece of work, which the worker holds until it releases the claim or its process ends.

    Args:
        study (`optuna.Study`): the study of the claims.
        number (`int`): number of the claim.
    """

    def __init__(self, study: optuna.Study, number: int) -> None:
        self._study, self._number = study, number

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
        claim = claims.ask()
        claim.set_user_attr("worker", this_worker())
        wait_for_names(claims)
        earlier = [trial for trial in claims.get_trials(deepcopy=False) if trial.number < claim.number]
        if any(map(holds, earlier)):
            claims.tell(claim, state=optuna.trial.TrialState.FAIL)
            return None
        return cls(claims, claim.number)

    def release(self) -> None:
        """Record that the work has ended, after an error, too."""
        self._study.tell(self._number, 0.0)
