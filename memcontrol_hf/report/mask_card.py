"""The card of a mask that is shared without its adapter."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..adapter_folder import MASK
from ..masks import block_map, granularity_of_names, selected_blocks
from ..whole_files import read_json
from .card_metadata import as_yaml, base_metadata, last_part, readable_base
from .escaping import render_template
from .loading_snippet import OUR_METHODS
from .report import MemorizationReport


@dataclass(frozen=True)
class MaskCard:
    """What `mask_card_template.md` says, apart from its own words.

    Args:
        content (`dict`): Content of `mask.json`: `mask`, and where they are known `base_model`, `method`, `search`,
            `figures` (of the frozen base, of all blocks and of the mask), `hub_model_id` and `license`.
        location (`str`): Folder or Hub id of the mask.
    """

    content: dict[str, Any]
    location: str

    @classmethod
    def from_folder(cls, folder: Path) -> "MaskCard":
        """Read the folder of a mask."""
        content = read_json(folder / MASK)
        return cls(content, content.get("hub_model_id") or folder.resolve().name)

    def render(self) -> str:
        """The text of the card."""
        content, mask = self.content, self.content["mask"]
        base, method = content.get("base_model", ""), content.get("method")
        tunes_text = any(name.startswith("text_encoder") for name in mask)
        report = MemorizationReport(figures=content.get("figures", {}), versions={})
        data = ModelCardData(
            **base_metadata(base, "adapter"),
            license=content.get("license"),
            tags=["memcontrol", "memcontrol-mask", *([method] if method else []), "diffusers", "memorization"],
        )
        command = ["memcontrol", "train", "--mask_from", self.location]
        if method:
            known = method in (*OUR_METHODS, "lora")
            command += ["--method", method] if known else ["--peft_config", "YOUR_PEFT_CONFIG"]
        granularity = granularity_of_names(mask)
        command += ["--granularity", granularity or "YOUR_EXPRESSIONS"] if granularity != "block" else []
        command += ["--text_encoder_blocks"] if tunes_text else []
        command += ["--pretrained_model_name_or_path", base] if base and base != "demo" else []
        command += ["--train_data_dir", "my_images", "--encoder", "YOUR_ENCODER"]
        return render_template(
            "mask_card_template.md",
            metadata=as_yaml(data),
            name=last_part(self.location),
            command=shlex.join(command),
            base=readable_base(base),
            method=method,
            block_map=block_map(mask),
            blocks_on=len(selected_blocks(mask)),
            block_count=len(mask),
            search=content.get("search"),
            table=report.table() if report.figures else [],
        )
