"""Images beside their latents and conditions, which are computed once and cached on disk."""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, Features, List, Value, concatenate_datasets
from datasets import config as datasets_config
from datasets.fingerprint import Hasher
from torch import nn

from ..families import Family
from ..images import pixel_digest, to_pixels


@torch.no_grad()
def encode(
    dataset: Dataset, family: Family, resolution: int, batch_size: int = 32, digests: Sequence[str] | None = None
) -> Dataset:
    """Latents and text embeddings of a dataset, computed once and kept on disk by `datasets`.

    They are found again under a fingerprint of the rows, the weights of the autoencoder and the text encoders, what
    else the family says that they depend on, and the resolution.

    Args:
        dataset (`Dataset`): columns `image`, `text`.
        family: the pipeline's (`memcontrol_hf.families.family_of`).
        resolution (`int`): in pixels.
        digests (list of `str`, *optional*): [`weights_digest`] of the family's encoders, where they are known.

    Returns:
        `Dataset`: columns `latents` `[C, h, w]`, the family's conditions (`prompt_embeds` `[L, D]`, ...), `pixels`
        (equal for exact copies of an image) and `row`; in torch format.
    """
    digests = [weights_digest(module) for module in family.encoder_modules] if digests is None else digests
    fingerprint = Hasher.hash([dataset._fingerprint, *digests, *family.encoding(), resolution])
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "memcontrol_hf"
    folder.mkdir(parents=True, exist_ok=True)
    probe = family.encode_images(torch.zeros(1, 3, resolution, resolution))
    condition = family.encode_prompts(dataset[:1]["text"])
    features = Features(
        {
            "latents": Array3D(tuple(probe.shape[1:]), "float32"),
            **{name: _feature(tensor[0]) for name, tensor in condition.items()},
            "pixels": Value("int64"),
        }
    )

    def encode_batch(batch: dict[str, list]) -> dict[str, np.ndarray]:
        return {
            "latents": family.encode_images(to_pixels(batch["image"], resolution)).cpu().numpy(),
            **{name: tensor.cpu().numpy() for name, tensor in family.encode_prompts(batch["text"]).items()},
            "pixels": [int.from_bytes(pixel_digest(image), "little", signed=True) for image in batch["image"]],
        }

    encoded = dataset.map(
        encode_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        load_from_cache_file=True,
        desc="Encoding images and captions",
    )
    rows = Dataset.from_dict({"row": list(range(len(encoded)))})
    return concatenate_datasets([encoded.with_format(None), rows], axis=1).with_format("torch")


def _feature(row: torch.Tensor) -> Value | List | Array2D:
    """The column for one row of a condition's tensor: a number, a vector or a matrix."""
    dtype = str(row.dtype).removeprefix("torch.")
    match row.dim():
        case 0:
            return Value(dtype)
        case 1:
            return List(Value(dtype), length=len(row))
        case _:
            return Array2D(tuple(row.shape), dtype)


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers, by value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unique_rows(encoded: Dataset) -> list[int]:
    """The first row of each distinct image of an encoded dataset: exact repeats count once."""
    return first_rows(int(pixels) for pixels in encoded["pixels"])


def first_rows(keys: Iterable[Hashable]) -> list[int]:
    """The row in which each distinct key occurs first, in order."""
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return list(first.values())


class EncodedImages(torch.utils.data.Dataset):
    """A dataset beside its cached latents and text embeddings; what training reads are the latter."""

    def __init__(self, images: Dataset, encoded: Dataset):
        self.images = images
        self.encoded = encoded
        self.unique = unique_rows(encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.encoded[row]

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        batch = self.encoded[rows]  # one read for a whole batch
        return [{name: column[i] for name, column in batch.items()} for i in range(len(rows))]

    def select(self, rows: list[int]) -> "EncodedImages":
        """Some of the rows; each keeps its number, and with it its noise."""
        return EncodedImages(self.images.select(rows), self.encoded.select(rows))
