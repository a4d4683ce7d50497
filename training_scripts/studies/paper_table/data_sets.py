"""The two data sets of the table."""

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets import DatasetDict

from memcontrol_hf import demo_dataset

ELPV_SCRIPT = Path(__file__).parents[2] / "elpv.py"


def elpv_dataset() -> DatasetDict:
    """The solar cells with the splits of `training_scripts/elpv.py`, which stands in another folder than the studies.

    Raises:
        ImportError: The package with the images is not installed.
    """
    return runpy.run_path(str(ELPV_SCRIPT))["elpv_dataset"]()


class DataSet(NamedTuple):
    """A data set of the table.

    Args:
        title: Title on the page.
        load: Function that returns the splits `train`, `validation` and `held_out`.
        public: Whether the licence lets the repository show the images, and generated images that resemble them.
    """

    title: str
    load: Callable[[], DatasetDict]
    public: bool


DATA = {
    "demo": DataSet("Fluent emoji (the demo's)", demo_dataset, public=True),
    "elpv": DataSet("ELPV solar cells", elpv_dataset, public=False),
}


@cache
def images(name: str, count: int | None) -> DatasetDict:
    """The splits of a data set.

    Args:
        name: Name out of `DATA`.
        count: Number of images that are left of each split, for a quick try; all images when `None`.
    """
    data = DATA[name].load()
    if count is None:
        return data
    return DatasetDict({split: rows.select(range(min(count, len(rows)))) for split, rows in data.items()})
