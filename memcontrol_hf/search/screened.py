"""The screening of a study: one worker makes it before the first trial, and all of them try its masks first."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import optuna
import torch
from accelerate.utils.memory import clear_device_cache
from transformers.trainer_utils import BestRun

from ..screening import Screening
from .claims import SCREENING, Claim, holders, is_held
from .front import select_run
from .processes import Processes, from_first, reason_in_words
from .protocol import HpSpace, SearchableTrainer
from .sampler import known_trials, middle_rate
from .settings import MEMORIZATION, QUALITY, SearchSettings
from .study import SharedStudy

logger = logging.getLogger(__name__)

SCREENED_MASKS = 4
"""Number of masks along the front of a screening from which a search takes those that it tries first."""

_ATTRIBUTE = "screening"  # of the study: what `Screening.to_dict` gives, or the `failure`
_POLL_SECONDS = 2.0


def suggested_mask(screening: Screening) -> dict[str, bool]:
    """The knee of a screening's front: the rule by which a search without a budget selects a run, without trials.

    [`select_run`] reads the knee off the figures of trials. Here it reads the knee off what the additive model of the
    screening predicts of all masks of its front, beside the frozen base.

    Raises:
        ValueError: when no block of the screening learns anything.
    """
    off = dict.fromkeys(screening.learns, False)
    runs = []
    for mask in [off, *screening.masks(len(off))]:
        learns, memorizes = screening.predict(mask)
        runs.append(BestRun(str(len(runs)), (-learns, memorizes), {"mask": mask}))
    return select_run(runs).hyperparameters["mask"]


def is_to_be_screened(trainer: SearchableTrainer, settings: SearchSettings, hp_space: HpSpace | None) -> bool:
    """Whether a search makes a screening first.

    Without a word in the settings it does where its masks can help: for a quality and a memorization objective, and
    the default `hp_space`, and where the trainer can be screened.

    Raises:
        ValueError: when the settings ask for a screening and the trainer cannot be screened.
    """
    if settings.screen is False:
        return False
    ask = getattr(trainer, "obstacle_to_screening", lambda steps: "this kind of trainer cannot be screened")
    obstacle = ask(settings.screen_steps)
    if settings.screen and obstacle:
        raise ValueError(obstacle)
    objectives = set(settings.objectives or ())
    helpful = hp_space is None and bool(objectives & QUALITY) and bool(objectives & MEMORIZATION)
    if settings.screen is None and helpful and obstacle:
        logger.info(f"the search begins without a screening: {obstacle}")
    return obstacle is None and (bool(settings.screen) or helpful)


def screening_of_study(
    trainer: SearchableTrainer, settings: SearchSettings, shared: SharedStudy | None
) -> Screening | None:
    """The screening that the study keeps; before the first trial, it is made if no other worker makes it.

    Args:
        trainer ([`~memcontrol_hf.search.protocol.SearchableTrainer`]):
            The trainer to screen.
        settings ([`SearchSettings`]):
            Settings of the search.
        shared ([`SharedStudy`], *optional*):
            The study, in the first of the processes that share a trial; `None` in the others.

    Returns:
        [`~memcontrol_hf.screening.Screening`]; `None` when the screening has failed, and for a study whose first trial
        was begun without one.
    """
    said = False
    while True:
        # All processes go through each round: none may wait for the first one longer than its backend allows.
        kept, claim, waits = _kept_or_claimed(shared) if shared else (None, None, False)
        kept, make, waits = from_first((kept, claim is not None, waits), trainer.args.world_size)
        if not waits:
            break
        if shared and not said:
            holder = holders(shared.study, SCREENING) or "another process"
            logger.info(f"the screening of this study is made by {holder}: waiting for it")
            said = True
        time.sleep(_POLL_SECONDS)
    if make:
        try:
            kept = _make(trainer, settings, Processes(trainer.args.world_size))
            if shared:
                shared.study.set_user_attr(_ATTRIBUTE, kept)
        finally:
            if claim:
                claim.release()
    return None if _failed(kept) else Screening.from_dict(kept)


def _kept_or_claimed(shared: SharedStudy) -> tuple[Mapping[str, Any] | None, Claim | None, bool]:
    """The screening that the study keeps, the claim to make it, and whether another worker is to be waited for.

    There is neither of them when trials were begun without a screening.
    """
    if (kept := shared.study.user_attrs.get(_ATTRIBUTE)) is not None or shared.has_trials():
        return kept, None, False
    claim = Claim.make(shared.study, SCREENING, is_held)
    if claim is not None and (kept := shared.study.user_attrs.get(_ATTRIBUTE)) is not None:
        claim.release()  # it was finished between the two looks
        return kept, None, False
    return None, claim, claim is None


def kept_screening(study: optuna.Study) -> dict[str, Any] | None:
    """The screening that a study keeps, as dictionaries; `None` when it keeps none, or the screening has failed."""
    kept = study.user_attrs.get(_ATTRIBUTE)
    return None if _failed(kept) else kept


def _failed(kept: Mapping[str, Any] | None) -> bool:
    return kept is None or "failure" in kept


def _make(trainer: SearchableTrainer, settings: SearchSettings, processes: Processes) -> dict[str, Any]:
    """The screening as the study keeps it.

    A screening that diverges or runs out of memory is kept as a failure, and is not made again.
    """
    rate = middle_rate(*settings.learning_rate_range)
    started, error = time.perf_counter(), None
    try:
        screening = trainer.screen(settings.screen_steps, learning_rate=rate, seeds=settings.screen_seeds)
    except (ValueError, torch.OutOfMemoryError) as raised:
        error = reason_in_words(raised)
    if error := processes.first_error(error):
        clear_device_cache(garbage_collection=True)
        logger.warning(f"the search goes on without a screening: {error}")
        return {"failure": error}
    seconds = time.perf_counter() - started
    times = f"{settings.screen_seeds} times " if settings.screen_seeds > 1 else ""
    logger.info(
        f"screening: what each of {len(screening.learns)} blocks learns and memorizes, from {times}"
        f"{screening.settings['steps']} steps with all of them on at the learning rate {rate:.2g} ({seconds:.0f} s)"
    )
    return screening.to_dict()


def screened_trials(screening: Screening | None, low: float, high: float) -> list[dict[str, Any]]:
    """Parameters of the trials of a screening's masks, those in the middle of the trade-off first.

    Where the learning rate is searched, the largest mask is left out, being close to all blocks. The middle one of the
    others is tried at two rates: at the [`middle_rate`], which the screening had, and halfway from there to the
    highest one. The smaller mask is tried at the first of them, the larger mask at the second. These four are spread
    along the front (docs/screening.md has the figures).
    """
    if screening is None:
        return []
    if not (masks := screening.masks(SCREENED_MASKS)):  # the largest first
        logger.warning("no block of the screening lowers the validation loss: the search goes on without its masks")
        return []
    if low == high:
        order = sorted(range(len(masks)), key=lambda place: abs(place - (len(masks) - 1) / 2))
        return known_trials([masks[place] for place in order], low, high)
    masks = masks[-3:]
    place = min(1, len(masks) - 1)
    middle, smaller, larger = masks[place : place + 1], masks[place + 1 :], masks[:place]
    first, *others = known_trials([*middle, *larger], middle_rate(low, high), high)
    return [*known_trials(middle, low, high), first, *known_trials(smaller, low, high), *others]
