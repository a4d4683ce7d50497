"""A mask over blocks, `{block name: bool}`, as it is shown to people."""

import re
from collections.abc import Collection, Mapping, Sequence

# UNets: each attention site (16 in Stable Diffusion 1.5). Transformers (DiT): each block. CLIP and T5: each layer.
BLOCK = re.compile(
    r"^(?:.+\.)?attentions\.\d+$|^(?:single_)?transformer_blocks\.\d+$"
    r"|^text_encoder\w*\.(?:text_model\.)?encoder\.(?:layers|block)\.\d+$"
)
"""Name of a block."""
SITE = re.compile(r"\.(?:attn\d*|ff(?:_context)?|self_attn|mlp|layer\.\d+)$")
"""How the name of a site inside of a block ends."""
# Blocks, and what a finer granularity names inside of them, are together in a part.
_PART = re.compile(r"(.+?)\.attentions\.\d+|(text_encoder.*?\.(?:layers|block)|.*?transformer_blocks)\.\d+(?=\.|$)")


GRANULARITIES = ("block", "site", "module")
"""Names for what a bit of a mask stands for."""


def named_granularity(words: Sequence[str]) -> str | list[str]:
    """The granularity that a command line gives: a name, or a list of regular expressions.

    Raises:
        ValueError: for a single plain word that is no name: as an expression it would make one block.
    """
    if len(words) > 1 or not words[0].isalpha():
        return list(words)
    if words[0] not in GRANULARITIES:
        raise ValueError(
            f"unknown granularity {words[0]!r}: use {', '.join(GRANULARITIES)}, or regular expressions over module "
            "names, one for each block"
        )
    return words[0]


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


def granularity_of_names(names: Collection[str]) -> str | None:
    """The granularity of a mask, by the names in it.

    Args:
        names (list of `str`): Names of a mask, as [`SearchSpace.from_model`] gives them.

    Returns:
        `str`: `"block"`, `"site"` or `"module"`; `None` for other names, which are regular expressions.
    """

    def size(name: str) -> str | None:
        if BLOCK.search(name):
            return "block"
        parts = name.split(".")
        if not any(BLOCK.search(".".join(parts[:count])) for count in range(1, len(parts))):
            return None
        return "site" if SITE.search(name) else "module"

    sizes = {size(name) for name in names}
    return None if None in sizes else next((size for size in ("module", "site", "block") if size in sizes), None)
