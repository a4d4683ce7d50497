"""Rows of numbers, read from the file of a dataset as they lie in it."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from datasets import Array2D, Array3D, Dataset, List, Value


class Columns:
    """The columns of numbers in a dataset, without a copy of them in memory.

    The torch format of `datasets` makes a tensor of each row, which takes ten times as long.

    Args:
        dataset (`Dataset`): its columns hold numbers, or lists and arrays of one shape; columns of text are left out.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        numbers = {n: c for n, c in dataset.features.items() if not (isinstance(c, Value) and c.dtype == "string")}
        self._parts = {
            name: [_numbers(part).reshape(len(part), *_shape(column)) for part in dataset.data.column(name).chunks]
            for name, column in numbers.items()
        }
        self._starts = {name: np.cumsum([0, *map(len, parts)]) for name, parts in self._parts.items()}

    def __reduce__(self) -> tuple:
        return Columns, (self.dataset,)  # what is pickled are not the numbers, but where they are

    def rows(self, rows: Sequence[int], names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The numbers of `N` rows: a tensor `[N, ...]` for each column, or for each of some names."""
        places = np.asarray(rows, dtype=np.int64)
        if (indices := self.dataset._indices) is not None:  # of a dataset in which rows were selected
            places = indices.column(0).take(pa.array(places)).to_numpy().astype(np.int64)
        return {name: self._read(name, places) for name in (self._parts if names is None else names)}

    def _read(self, name: str, places: np.ndarray) -> torch.Tensor:
        parts, starts = self._parts[name], self._starts[name]
        numbers = np.searchsorted(starts, places, side="right") - 1
        found = np.empty((len(places), *parts[0].shape[1:]), parts[0].dtype)
        for row, (part, place) in enumerate(zip(numbers, places)):
            found[row] = parts[part][place - starts[part]]
        return torch.from_numpy(found)


def _numbers(part: pa.Array) -> np.ndarray:
    """The numbers of a part of a column, whatever lists its rows are; no copy is made."""
    while isinstance(part, (pa.ExtensionArray, pa.ListArray, pa.FixedSizeListArray)):
        part = part.storage if isinstance(part, pa.ExtensionArray) else part.flatten()
    return part.to_numpy()


def _shape(column: Value | List | Array2D | Array3D) -> tuple[int, ...]:
    """The shape of a row."""
    if isinstance(column, Value):
        return ()
    return (column.length,) if isinstance(column, List) else tuple(column.shape)
