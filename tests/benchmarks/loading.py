"""An SV-DIFF adapter loaded and called once, beside a LoRA of the same layers."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from memcontrol_hf import SearchSpace
from memcontrol_hf.families import family_of
from memcontrol_hf.tuners import MemControlConfig

from .timing import alternate, clock, compared
from .training_step import sd15_like

BLOCKS = (2, 16)


def rows(pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of the page: an adapter of two blocks, and of all. The decompositions are on the disk already.

    Args:
        pairs: At most so many turns of each side; each takes a second on a CPU, so ten do there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = pairs if device.type == "cuda" else min(pairs, 10)
    pipeline = sd15_like(64).to(device)
    family, unet, config = family_of(pipeline), pipeline.unet.eval(), pipeline.unet.config
    space, condition = SearchSpace.from_model(unet, "block"), family.encode_prompts([""])
    latents = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size, device=device)
    step = torch.zeros(1, dtype=torch.long, device=device)

    def load(folder: Path) -> Callable[[nn.Module], None]:
        @torch.no_grad()
        def side(base: nn.Module) -> None:
            family.denoise(PeftModel.from_pretrained(base, folder), latents, step, condition)

        return side

    for count in BLOCKS:
        with tempfile.TemporaryDirectory() as temporary:
            sides = {}
            mask = {name: number < count for number, name in enumerate(space.blocks)}
            for name, config_of in (("SV-DIFF", MemControlConfig(method="svdiff")), ("LoRA", LoraConfig(r=4))):
                folder = Path(temporary) / name
                get_peft_model(copy.deepcopy(unet), space.apply(config_of, mask)).save_pretrained(folder)
                sides[name] = load(folder)
            seconds = alternate(sides, pairs, clock(device), lambda: (copy.deepcopy(unet),))
            yield compared(f"an adapter loaded and called once, {count} blocks", 1.5, seconds)
