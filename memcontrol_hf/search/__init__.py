"""The outer level: the search of a mask and a learning rate over one Optuna study.

`settings`: what a search is asked for. `storage`: where the study is kept. `sampler`: which hyperparameters the next
trial gets. `study`: the study that workers share. `claims`: what one of its workers does alone. `screened`: the
screening that a study begins with. `processes`: the processes that share a trial. `loop`: trials one after the other.
`callbacks`: how a trial is stopped early. `front`: from the trials to one run. `final`: after the trials. `summary`:
the study in the report. `ray`: workers on a Ray cluster. `protocol`: what a trainer must offer.
"""

from .claims import check_study_name
from .final import claim_final, repeat_runs
from .front import (
    NoRunError,
    best_runs,
    complete_trials,
    dominates,
    is_frozen_base,
    pareto_front,
    rank_runs,
    select_run,
)
from .loop import run_search
from .sampler import SAMPLERS, SeededSampler, check_sampler, known_masks, middle_rate
from .screened import kept_screening, suggested_mask
from .servers import said_in_one_line
from .settings import SearchSettings, check_budget, check_n_trials, check_options, check_prune_at
from .storage import check_study, open_storage, public_address, storage_address
from .study import SharedStudy
from .summary import block_effects, public_study_name, search_summary

__all__ = [
    "SAMPLERS",
    "NoRunError",
    "SearchSettings",
    "SeededSampler",
    "SharedStudy",
    "best_runs",
    "block_effects",
    "check_budget",
    "check_n_trials",
    "check_options",
    "check_prune_at",
    "check_sampler",
    "check_study",
    "check_study_name",
    "claim_final",
    "complete_trials",
    "dominates",
    "is_frozen_base",
    "kept_screening",
    "known_masks",
    "middle_rate",
    "open_storage",
    "pareto_front",
    "public_address",
    "public_study_name",
    "rank_runs",
    "repeat_runs",
    "run_search",
    "said_in_one_line",
    "search_summary",
    "select_run",
    "storage_address",
    "suggested_mask",
]
