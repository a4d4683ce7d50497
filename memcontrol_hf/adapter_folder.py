"""The folder that a fine-tune leaves: names of its files, its adapters, their digests, and what may be published."""

import hashlib
from pathlib import Path

REPORT, CARD, PLOT, MASK = "memorization_report.json", "README.md", "pareto_front.png", "mask.json"

ADAPTER, LORA = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"

PARTS = ("", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Where an adapter's folder holds adapters: the denoiser's in itself, a text encoder's in a folder of its name."""


def adapter_parts(folder: Path) -> tuple[str, ...]:
    """Those of `PARTS` where there is an adapter."""
    return tuple(p for p in PARTS if all((folder / p / name).is_file() for name in (ADAPTER, "adapter_config.json")))


def adapter_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights in an adapter's folder: what a report was measured on."""
    files = [f"{part}/{ADAPTER}".lstrip("/") for part in adapter_parts(folder)] + [LORA]
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files if (folder / name).is_file()
    }


PUBLIC_FILES = (
    *(f"{part}/{name}".lstrip("/") for part in PARTS for name in (ADAPTER, "adapter_config.json")),
    *(LORA, REPORT, PLOT, CARD),
)
"""What a push uploads, where the folder has it, the card last; nothing else of the folder."""
