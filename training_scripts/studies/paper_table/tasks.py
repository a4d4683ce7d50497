"""The plan: which pieces of work the rows need, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from common.pieces import Part

from .data_sets import DATA
from .rows import ROWS, TRANSFER

FINAL_SEED = 100  # added to the seed of a row, so that no search saw the seed of the fine-tune that is measured
RATE_SEED = 1000  # the seed of the choice of a learning rate, which no other run has
PICTURED_SEED = 0  # the runs with this seed draw samples to look at


@dataclass(frozen=True)
class Settings:
    """Settings that all pieces of one output folder have in common; each is a flag of reproduce_table.py."""

    max_train_steps: int = field(default=200, metadata={"help": "steps of the fine-tune of a row"})
    search_max_steps: int = field(default=50, metadata={"help": "steps of a trial of a search"})
    n_trials: int = field(default=12, metadata={"help": "trials of a search"})
    eval_num_images: int = field(default=144, metadata={"help": "images generated for fid, and as many for amd"})
    num_prompts: int = field(
        default=24, metadata={"help": "training captions that the audit samples: the repeated images first"}
    )
    images_per_prompt: int = field(default=8, metadata={"help": "images that the audit generates for each caption"})
    max_images: int | None = field(
        default=None, metadata={"help": "images that are left of each split, for a quick try; all images by default"}
    )


class Task(NamedTuple):
    """A piece of work.

    Args:
        kind: `rate` chooses a learning rate, `search` searches a mask, `run` fine-tunes and attacks a row.
        data: Name of the data set.
        name: Name of the row. A search has the name of what is tuned.
        seed: Seed of the row.
    """

    kind: str
    data: str
    name: str
    seed: int

    @property
    def piece(self) -> str:
        """The name of the file with the result."""
        return f"{self.kind}/{self.data}-{self.name}-{self.seed}"

    def rate(self) -> "Task | None":
        """The task that the learning rate of a run comes from."""
        row = ROWS[self.name]
        if row.mask in ("found", "random"):
            return Task("search", self.data, row.tuned, self.seed)
        if self.name in TRANSFER:
            return Task("rate", self.data, "svdiff", RATE_SEED)
        return None if row.mask == "off" else Task("rate", self.data, self.name, RATE_SEED)

    def search(self) -> "Task | None":
        """The task that the mask of a run comes from."""
        row = ROWS[self.name]
        if row.mask in ("on", "off"):
            return None
        other = "transferred" in row.mask
        data = next(name for name in DATA if name != self.data) if other else self.data
        return Task("search", data, row.tuned, self.seed)

    def needs(self) -> "list[Task]":
        """The tasks that must be finished before this one."""
        found = (self.rate(), self.search()) if self.kind == "run" else ()
        return list(dict.fromkeys(task for task in found if task is not None))


def plan(data: Sequence[str], rows: Sequence[str], seeds: Sequence[int], part: Part) -> list[Task]:
    """The runs of one machine, each after the tasks that it needs."""
    runs = [Task("run", name, row, seed) for seed in seeds for row in rows for name in data]
    return list(dict.fromkeys(task for run in part.of(runs) for task in (*run.needs(), run)))
