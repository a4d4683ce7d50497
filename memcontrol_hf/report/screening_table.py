"""What each block does, by the screening, as rows of the card's table."""

from collections.abc import Mapping
from typing import Any

from ..masks import block_map, part_of

MOST_ROWS = 32
"""Largest number of rows of the table; with more blocks, it has a row for each part of the model."""


def screening_table(screening: Mapping[str, Any], mask: Mapping[str, bool]) -> list[dict[str, str]]:
    """What each block, or each part of the model, learns and memorizes, in percent of what all blocks do.

    Args:
        screening (`dict`): the screening: `report.screening`.
        mask (`dict[str, bool]`): the selected mask: `report.mask`.

    Returns:
        list of `dict[str, str]`: rows with `name`, `blocks` (a square for each block, ■ where it was trained),
        `learns` and `memorizes` (percent with standard error). A negative figure counts as 0.
    """
    names = list(screening["learns"])
    by_part = len(names) > MOST_ROWS
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(part_of(name) if by_part else name, []).append(name)
    return [
        {
            "name": row,
            "blocks": "".join(squares for _, squares in block_map({name: mask.get(name, False) for name in blocks})),
            **{side: _percent(screening, side, blocks) for side in ("learns", "memorizes")},
        }
        for row, blocks in rows.items()
    ]


def _percent(screening: Mapping[str, Any], side: str, blocks: list[str]) -> str:
    """The share of some blocks in what all blocks learn or memorize, with its standard error."""
    positive = {name: max(value, 0.0) for name, value in screening[side].items()}
    total = sum(positive.values())
    if total == 0:
        return "0 %"
    share = f"{100 * sum(positive[name] for name in blocks) / total:.0f}"
    errors = [screening[f"{side}_error"][name] for name in blocks]
    if None in errors:
        return f"{share} %"
    return f"{share} ± {100 * sum(error**2 for error in errors) ** 0.5 / total:.0f} %"
