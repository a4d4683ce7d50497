"""A mask over blocks, `{block name: bool}`, as it is shown to people."""

import re
from collections.abc import Mapping

# Blocks, and what a finer granularity names inside of them, are together in a part.
_PART = re.compile(r"(.+?)\.attentions\.\d+|(text_encoder.*?\.(?:layers|block)|.*?transformer_blocks)\.\d+(?=\.|$)")


def block_map(mask: Mapping[str, bool]) -> list[tuple[str, str]]:
    """A mask as rows of a table: each part of the model with its blocks in order, ■ for on and □ for off.

    Args:
        mask (`dict[str, bool]`): For each block whether it is trained, in the order of the model.

    Returns:
        list of `tuple[str, str]`: Name of the part (`down_blocks.0`, `transformer_blocks`, ...) and one square for
        each block. A block whose name has no such part is a part of its own.
    """
    rows: dict[str, str] = {}
    for name, on in mask.items():
        key = part_of(name)
        rows[key] = rows.get(key, "") + ("■" if on else "□")
    return list(rows.items())


def part_of(block: str) -> str:
    """The part of the model (`down_blocks.0`, `transformer_blocks`, ...) that a block is in, or else the block."""
    part = _PART.match(block)
    return (part[1] or part[2]) if part else block


def selected_blocks(mask: Mapping[str, bool]) -> list[str]:
    """Names of the blocks that a mask has on."""
    return [name for name, on in mask.items() if on]
