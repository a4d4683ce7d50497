"""The rows that are compared, by docs/results/design.md: which mask is tuned, and which mitigation is added."""

from typing import NamedTuple

from common.trainers import DP_SGD

STEPS = (10, 20, 40, 80, 120)
"""The steps after which a run is measured; the last one is its length."""
EQUAL = 80
"""The step at which two rows are compared at equal steps."""
SEEDS = 10
"""Number of seeds of the whole study."""
RATE_SEED = 100
"""Seed of the choice of the learning rates; no other run has it."""
SCREENING_SEED = 1000
"""Added to the seed of a screening: no run has these seeds."""
RANDOM = 5
"""Number of random masks of the size of the found mask, for each seed."""

METHODS = {"attention": "attention weights", "svdiff": "SV-DIFF", "lora": "LoRA"}
BASE, FULL, ALL, FOUND, OWN_RATE, WORST, TRANSFERRED = (
    "base",
    "full",
    "all",
    "found",
    "found_own_rate",
    "worst",
    "transferred",
)
RANDOMS = tuple(f"random{number}" for number in range(1, RANDOM + 1))
SHARES = {"quarter": 1 / 4, "half": 1 / 2, "three_quarters": 3 / 4}


class Row(NamedTuple):
    """A row.

    Args:
        title: Title on the page.
        mitigation: Mitigations that are added.
        rate: The row whose learning rate this row has, in the same method.
    """

    title: str
    mitigation: tuple[str, ...] = ()
    rate: str = ALL


ROWS = {
    BASE: Row("frozen base"),
    FULL: Row("full fine-tune", rate=FULL),
    ALL: Row("all blocks"),
    FOUND: Row("found mask"),
    **{name: Row(f"random mask {number} of its size") for number, name in enumerate(RANDOMS, 1)},
    WORST: Row("worst mask of its size"),
    TRANSFERRED: Row("mask found on the other set"),
    "all+rwa": Row("all blocks with RWA", ("rwa",), "all+rwa"),
    "all+threshold": Row("all blocks with threshold", ("threshold",), "all+threshold"),
    "all+dp_sgd": Row("all blocks with DP-SGD (ε 8)", (DP_SGD,), "all+dp_sgd"),
    "found+rwa": Row("found mask with RWA", ("rwa",), "all+rwa"),
    "found+threshold": Row("found mask with threshold", ("threshold",), "all+threshold"),
    OWN_RATE: Row("found mask, its own rate", rate=OWN_RATE),
    **{name: Row(f"random mask of {share:.0%} of the parameters") for name, share in SHARES.items()},
}
TUNED = tuple(name for name, row in ROWS.items() if row.rate == name and name != FULL)
"""Rows of a method whose learning rate is chosen."""


def group(data: str, method: str, row: str) -> str:
    """The folder of a row's pieces: the frozen base and the full fine-tune are the same for all methods."""
    return f"{data}-{row if row in (BASE, FULL) else method}"


def piece_of(kind: str, data: str, method: str, row: str, seed: int) -> str:
    """The name of the piece of a row: `kind` is `runs` or `rates`."""
    return f"{kind}/{group(data, method, row)}/{row}-{seed}"
