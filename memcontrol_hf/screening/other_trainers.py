"""A mask as the flags of other trainers, which let people choose blocks: diffusers, kohya, OneTrainer, ai-toolkit.

Block names are those of diffusers. Where a trainer has no such choice for a kind of model, nothing is said of it.
"""

import re
from collections.abc import Mapping

_UNET_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.attentions\.(\d+)")
_TRANSFORMER_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)")
_KOHYA_BLOCKS = 25  # IN00 to IN11, MID, OUT00 to OUT11 of a UNet with four levels, as in SD 1 and SD 2
_KOHYA_DIM = 8


def other_trainers(mask: Mapping[str, bool]) -> dict[str, str]:
    """The flags or settings by which other trainers train a LoRA in the same blocks.

    Args:
        mask (`dict[str, bool]`): For each block whether it is on, at the granularity `block`.

    Returns:
        `dict[str, str]`: Name of the trainer -> flag or setting. Empty for a mask that is no choice of whole blocks of
        a denoiser: another granularity, or blocks of a text encoder that are on.
    """
    on = [name for name, is_on in mask.items() if is_on]
    if on and all(_TRANSFORMER_BLOCK.fullmatch(name) for name in mask):
        return _of_transformer(mask, on)
    if on and all(_UNET_BLOCK.fullmatch(name) for name in mask):
        return _of_unet(mask, on)
    return {}


def _of_transformer(mask: Mapping[str, bool], on: list[str]) -> dict[str, str]:
    numbers: dict[bool, list[int]] = {False: [], True: []}
    for name in on:
        single, number = _TRANSFORMER_BLOCK.fullmatch(name).groups()
        numbers[bool(single)].append(int(number))
    found = {}
    if any(name.startswith("single_") for name in mask):  # Flux
        indices = [_ranges(numbers[single]) or "none" for single in (False, True)]
        found["kohya (networks.lora_flux)"] = (
            f'--network_args "train_double_block_indices={indices[0]}" "train_single_block_indices={indices[1]}"'
        )
    else:
        found["diffusers (train_dreambooth_lora_sd3.py)"] = f"--lora_blocks {','.join(map(str, numbers[False]))}"
        found["OneTrainer (layer filter)"] = ",".join(f"{name}." for name in on)
    contains = ", ".join(f'"transformer.{name}."' for name in on)
    found["ai-toolkit (network_kwargs)"] = f"only_if_contains: [{contains}]"
    return found


def _of_unet(mask: Mapping[str, bool], on: list[str]) -> dict[str, str]:
    found = {"OneTrainer (layer filter)": ",".join(f"{name}." for name in on)}
    places = {name: _kohya_place(name) for name in mask}
    of_sd1 = len(mask) == 16 and None not in places.values() and len({*places.values()}) == len(mask)
    if of_sd1:  # 16 blocks with attention are those of SD 1 and SD 2
        dims = [0] * _KOHYA_BLOCKS
        for name in on:
            dims[places[name]] = _KOHYA_DIM
        found["kohya (networks.lora)"] = f'--network_args "block_dims={",".join(map(str, dims))}"'
    return found


def _kohya_place(name: str) -> int | None:
    """The place of a block of SD 1 or SD 2 among kohya's 25 blocks, which count all its layers."""
    part, level, number = _UNET_BLOCK.fullmatch(name).groups()
    if part == "mid_block":
        return 12
    place = 3 * int(level) + int(number)
    return (1 + place if place < 11 else None) if part == "down_blocks" else (13 + place if place < 12 else None)


def _ranges(numbers: list[int]) -> str:
    """Numbers as kohya writes them: `0,1,2,5` is `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
