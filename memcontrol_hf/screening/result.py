"""The result of a screening: what each block learns and memorizes, and the masks that follow from these figures."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..whole_files import read_json, write_whole

SCREENING_VERSION = 1
"""Version of the file format of a screening."""

LEAST_SHARE = 0.01
"""A block that learns no more than this share of what the best block learns is on in no mask."""

_FIGURES = ("learns", "memorizes", "learns_error", "memorizes_error")


@dataclass
class Screening:
    """What each block of a model learns and memorizes while all blocks are trained together.

    The fall of a loss during the training is allocated to the blocks: each step's update of a block, multiplied with
    the gradient of the loss in the middle of the step ("loss change allocation", Lan et al., NeurIPS 2019,
    https://huggingface.co/papers/1909.01440). The figures of all blocks add up to the fall of the loss, up to the
    error of the probes.

    A screening serves as an additive model of masks: a mask learns what its blocks learn, and memorizes what its
    blocks memorize, where a block with a negative figure counts as memorizing nothing. The model is an approximation:
    blocks that are trained without the others learn more than they do here.

    Args:
        learns (`dict[str, float]`):
            Fall of the loss on validation images that is owed to each block, by the block's name. The sum over the
            blocks approximates the fall of the mean denoising loss.
        memorizes (`dict[str, float]`):
            How much further each block lowers the loss on training images than the loss on validation images. The two
            sets of images need not be equally hard, so that the figures can be shifted, and negative.
        learns_error, memorizes_error (`dict[str, float]`):
            Standard errors of these figures; NaN where one probe was made in one run.
        parameters (`dict[str, int]`):
            Number of parameters that the method trains in each block.
        settings (`dict`):
            How the figures were made: `steps`, `every`, `learning_rate`, `seeds` (number of runs), `seed` (of the
            first run), `train_images` and `validation_images` (numbers of distinct images), and the losses at fixed
            timesteps before and after the training, of as many images as a probe draws: `loss_before`, `loss_after`
            (validation images), `loss_train_before`, `loss_train_after` (training images).
        version (`int`):
            Version of the file format; see `SCREENING_VERSION`.
        singular_values (`dict[str, dict[str, list[float]]]`, *optional*):
            SV-DIFF, when it was asked for: `learns` and `memorizes` of each single singular value, by the full name of
            the module, with the largest singular value first. Their sums over a block are the block's figures.

    Raises:
        ValueError: when the figures are not those of the same blocks.
    """

    learns: dict[str, float]
    memorizes: dict[str, float]
    learns_error: dict[str, float]
    memorizes_error: dict[str, float]
    parameters: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = SCREENING_VERSION
    singular_values: dict[str, dict[str, list[float]]] | None = None

    def __post_init__(self) -> None:
        for name in (*_FIGURES, "parameters"):
            if differing := self.learns.keys() ^ getattr(self, name).keys():
                raise ValueError(f"{name} and learns are of different blocks: {', '.join(sorted(differing))}")

    def masks(self, n: int) -> list[dict[str, bool]]:
        """Masks along the trade-off between learning and memorizing, from the largest mask to the smallest.

        For a price λ ≥ 0 of memorizing, a block is on when `learns > λ · max(memorizes, 0)`, and when it learns more
        than `LEAST_SHARE` of what the best block learns. No mask of the additive model has a larger
        `learns - λ · memorizes`. A mask changes with λ only where a block's two sides are equal, which gives all masks
        of the sweep exactly; the empty mask is left out.

        Args:
            n (`int`): Largest number of masks, at least 1. When the front is longer, evenly spaced masks with both
                ends are taken; the mask in the middle when `n` is 1.

        Returns:
            list of `dict[str, bool]`: Distinct masks over all blocks, of which none is empty. There are fewer than
            `n` where the front is shorter, and none where no block lowers the loss on validation images.

        Raises:
            ValueError: for an `n` below 1.
        """
        if n < 1:
            raise ValueError(f"the number of masks must be at least 1, but is {n}")
        least = LEAST_SHARE * max(self.learns.values(), default=0.0)
        prices = {  # what a block memorizes for each unit that it learns; on while this is below 1 / λ
            name: max(self.memorizes[name], 0.0) / learns
            for name, learns in self.learns.items()
            if learns > max(least, 0.0)
        }
        limits = sorted({*prices.values()}, reverse=True)
        if len(limits) > n:
            last = len(limits) - 1
            limits = [limits[round(i * last / (n - 1))] for i in range(n)] if n > 1 else [limits[last // 2]]
        return [{name: prices.get(name, math.inf) <= limit for name in self.learns} for limit in limits]

    def cheapest_singular_values(self, n: int) -> dict[str, list[int]]:
        """The single singular values of the lowest price: what each memorizes for each unit that it learns.

        It is the rule of [`Screening.masks`] with each singular value as a block of its own. Of equal prices, such as
        0, those come first that learn more.

        Args:
            n (`int`): Number of singular values, at least 1.

        Returns:
            `dict[str, list[int]]`: Full name of the module -> numbers of its singular values, ascending; modules
            without any are left out. It is the `singular_values` of a [`~memcontrol_hf.MemControlConfig`].

        Raises:
            ValueError: when single singular values were not screened, and for an `n` below 1 or above the number of
                those that learn anything.
        """
        cheapest = self._single_values()
        if not 1 <= n <= len(cheapest):
            total = sum(len(figures["learns"]) for figures in self.singular_values.values())
            raise ValueError(
                f"the number of singular values must be from 1 to {len(cheapest)}, since so many of {total} lower the "
                f"loss on validation images, but is {n}"
            )
        chosen: dict[str, list[int]] = {module: [] for module in self.singular_values}
        for module, number, _, _ in cheapest[:n]:
            chosen[module].append(number)
        return {module: sorted(numbers) for module, numbers in chosen.items() if numbers}

    def singular_value_front(self, points: int) -> list[tuple[int, float, float]]:
        """What numbers of [`Screening.cheapest_singular_values`] learn and memorize by the additive model.

        Args:
            points (`int`): How many numbers, at least 1: all that learn anything, and halves of the one before.

        Returns:
            list of tuples, the smallest number first: number of singular values, and their shares, from 0 to 1, of
            what all that learn anything learn and memorize. There are fewer than `points` where a half is nothing.

        Raises:
            ValueError: when single singular values were not screened.
        """
        figures = [pair for _, _, *pair in self._single_values()]
        sums = [(0.0, 0.0), *accumulate(figures, lambda one, other: (one[0] + other[0], one[1] + other[1]))]
        numbers = sorted({len(figures) >> i for i in range(points)} - {0})
        return [(n, *(part / (whole or 1.0) for part, whole in zip(sums[n], sums[-1]))) for n in numbers]

    def _single_values(self) -> list[tuple[str, int, float, float]]:
        """Module, number, what it learns and memorizes, of each singular value that learns; the lowest price first."""
        if self.singular_values is None:
            raise ValueError("single singular values were not screened: give screen(singular_values=True)")
        values = [
            (module, number, learns, max(memorizes, 0.0))
            for module, figures in self.singular_values.items()
            for number, (learns, memorizes) in enumerate(zip(figures["learns"], figures["memorizes"]))
            if learns > 0
        ]
        return sorted(values, key=lambda value: (value[3] / value[2], -value[2]))

    def predict(self, mask: Mapping[str, bool]) -> tuple[float, float]:
        """What a mask learns and memorizes by the additive model.

        Args:
            mask (`dict[str, bool]`): Mask over the block names; blocks that the mask does not name are off.

        Returns:
            tuple of `float`: Sums of `learns` and of `max(memorizes, 0)` over the blocks that are on.

        Raises:
            ValueError: when the mask names a block that was not screened.
        """
        if unknown := sorted(mask.keys() - self.learns.keys()):
            raise ValueError(f"the mask names blocks that were not screened: {', '.join(unknown)}")
        on = [name for name in self.learns if mask.get(name, False)]
        return sum(self.learns[name] for name in on), sum(max(self.memorizes[name], 0.0) for name in on)

    def table(self) -> list[list[str]]:
        """The rows of a table, the head first: block, trained parameters, learns, memorizes, with standard errors."""

        def figure(value: float, error: float) -> str:
            return f"{value:+.4f} ± {error:.4f}" if math.isfinite(error) else f"{value:+.4f}"

        head = ["block", "parameters", "learns", "memorizes"]
        return [head] + [
            [
                name,
                f"{self.parameters[name]:,}",
                figure(self.learns[name], self.learns_error[name]),
                figure(self.memorizes[name], self.memorizes_error[name]),
            ]
            for name in self.learns
        ]

    def to_dict(self) -> dict[str, Any]:
        """The screening as plain dictionaries that JSON can hold; an unknown standard error is `None`."""
        content = asdict(self)
        if self.singular_values is None:
            del content["singular_values"]
        for name in ("learns_error", "memorizes_error"):
            content[name] = {block: None if math.isnan(error) else error for block, error in content[name].items()}
        return content

    def to_json(self, path: str | Path) -> None:
        """Write the screening as JSON.

        Raises:
            ValueError: when a figure is not finite.
        """
        write_whole(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_dict(cls, content: Any) -> "Screening":
        """The screening that [`Screening.to_dict`] made these dictionaries of.

        Raises:
            ValueError: when they are no screening, or a screening of another version; says what is wrong.
        """
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}, not an object")
        if (found := content.get("version")) != SCREENING_VERSION:
            raise ValueError(f"it has version {found!r}, but this package reads {SCREENING_VERSION}")
        return cls(**_checked(content))

    @classmethod
    def from_json(cls, path: str | Path) -> "Screening":
        """Read a screening.

        Raises:
            ValueError: when the file holds no screening, or a screening of another version; says what is wrong.
        """
        try:
            return cls.from_dict(read_json(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path} is no screening: {error}") from None


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stored screening, with unknown standard errors as NaN; raises `ValueError` for a wrong field."""
    names, content = [f.name for f in fields(Screening)], dict(content)
    if missing := [name for name in names if name not in content and name != "singular_values"]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown := [name for name in content if name not in names]:
        raise ValueError(f"it has the unknown field(s) {', '.join(unknown)}")
    for name in (*_FIGURES, "parameters", "settings"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{name} is a {type(content[name]).__name__}, not an object")
    for name in ("learns_error", "memorizes_error"):
        content[name] = {block: math.nan if error is None else error for block, error in content[name].items()}
    for name in (*_FIGURES, "parameters"):
        for block, value in content[name].items():
            if isinstance(value, bool) or not isinstance(value, int if name == "parameters" else (int, float)):
                raise ValueError(f"{name} of {block} is {value!r}, not a number")
            if not math.isfinite(value) and not name.endswith("_error"):
                raise ValueError(f"{name} of {block} is {value}")
    if "singular_values" in content:
        _check_singular_values(content["singular_values"])
    return content


def _check_singular_values(content: Any) -> None:
    """Raise `ValueError` unless these are the figures of single singular values by module."""
    for module, figures in content.items() if isinstance(content, dict) else [("", content)]:
        kinds = isinstance(figures, dict) and [figures.get(name) for name in ("learns", "memorizes")]
        if not (kinds and all(isinstance(values, list) for values in kinds) and len(kinds[0]) == len(kinds[1])):
            where = f" of {module}" if module else ""
            raise ValueError(f"singular_values{where} has no lists learns and memorizes of equal length")
        if not all(isinstance(value, (int, float)) for values in kinds for value in values):
            raise ValueError(f"singular_values of {module} are not all numbers")
