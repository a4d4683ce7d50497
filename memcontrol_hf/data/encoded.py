"""Images with captions, beside what is computed of them once: latents and conditions, digests, features."""

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import nn

from ..families import Condition, Family
from ..images import DEFAULT_FRAMING, DIGEST_VERSION, Framing, pixel_digest, thumbnails, to_pixels
from ..progress import bar
from ..randomness import Purpose, seeded_generator
from ..whole_files import check_room
from .cache import cache_folder, delete_damaged, is_whole, seal
from .columns import Columns
from .splits import group_name

logger = logging.getLogger(__name__)


class EncodedImages(torch.utils.data.Dataset):
    """A dataset of images and captions, beside what is computed of it once.

    Training reads the latents and the conditions, row by row. Every measure reads the *distinct* images: exact copies
    count once. A row keeps its number in the whole data set, and with it the seeds of its draws, when only some rows
    are selected.

    Args:
        images (`Dataset`):
            Columns `image` and, unless only distances between images are measured, `text`. A column `group` names the
            person that an image shows.
        resolution (`int`): side in pixels at which images are compared.
        encoded (`Dataset`, *optional*): what [`encode`] returns for the same rows.
        framing ([`~memcontrol_hf.images.Framing`]): how an image becomes a square.

    Attributes:
        numbers (list of `int`): number of each row in the whole data set.
    """

    def __init__(
        self,
        images: Dataset,
        resolution: int,
        encoded: Dataset | None = None,
        framing: Framing = DEFAULT_FRAMING,
    ):
        self.images = images
        self.resolution = resolution
        self.encoded = encoded
        self.framing = framing
        self.numbers: list[int] = list(range(len(images)))
        self._columns: Columns | None = None
        self._features: list[tuple[Callable, torch.Tensor]] = []

    def encoded_by(self, family: Family, weights_digests: Sequence[str] | None = None) -> "EncodedImages":
        """The same images beside the latents and conditions that a pipeline's encoders give: see [`encode`]."""
        result = copy.copy(self)
        result.encoded = encode(
            self.images, family, self.resolution, weights_digests=weights_digests, framing=self.framing
        )
        return result

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.encoded[row]

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        batch = self.batch(rows)  # one read for a whole batch
        return [{name: column[i] for name, column in batch.items()} for i in range(len(rows))]

    def batch(self, rows: Sequence[int], names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """What is computed of `N` rows: tensors `[N, ...]`, by all names in [`encode`] but `digest`, or by some."""
        if self._columns is None or self._columns.dataset is not self.encoded:
            self._columns = Columns(self.encoded)
        return self._columns.rows(rows, names)

    def select(self, rows: Sequence[int]) -> "EncodedImages":
        """Some of the rows, each with its number."""
        encoded = None if self.encoded is None else self.encoded.select(rows)
        result = EncodedImages(self.images.select(rows), self.resolution, encoded, self.framing)
        result.numbers = [self.numbers[row] for row in rows]
        return result

    # ---- distinct images ----

    @cached_property
    def digests(self) -> list[str]:
        """The [`~memcontrol_hf.images.pixel_digest`] of each row."""
        if self.encoded is not None:
            return self.encoded.with_format(None)["digest"][:]
        return [pixel_digest(image) for image in self.images["image"]]

    @cached_property
    def distinct(self) -> list[int]:
        """The first row of each distinct image, in order."""
        return first_rows(self.digests)

    @cached_property
    def repeated(self) -> set[int]:
        """Those of the distinct rows whose image occurs more than once: the canaries."""
        counts = Counter(self.digests)
        return {row for row in self.distinct if counts[self.digests[row]] > 1}

    def shuffled(self, seed: int, purpose: Purpose) -> list[int]:
        """The distinct rows in an order that the seed and the purpose draw."""
        order = torch.randperm(len(self.distinct), generator=seeded_generator(seed, purpose)).tolist()
        return [self.distinct[i] for i in order]

    def halves(self, seed: int) -> "tuple[EncodedImages, EncodedImages]":
        """The distinct images in two halves that the seed draws. Images of one person are in one half."""
        count = len(set(self.units.values()))
        order = torch.randperm(count, generator=seeded_generator(seed, Purpose.AUDIT_HALVES)).tolist()
        first = set(order[: count // 2])
        parts = ([row for row in self.distinct if (self.units[row] in first) is half] for half in (True, False))
        return tuple(self.select(rows) for rows in parts)

    # ---- persons ----

    @property
    def by_person(self) -> bool:
        """Whether it is known which person each image shows: by a column `group`."""
        return "group" in self.images.column_names

    @cached_property
    def units(self) -> dict[int, int]:
        """Number of the unit of each distinct row: the person where persons are known, else the image itself.

        Units are numbered from 0 in the order of their first image.
        """
        names = [group_name(group) for group in self.images["group"]] if self.by_person else range(len(self))
        numbers: dict[Hashable, int] = {}
        return {row: numbers.setdefault(names[row], len(numbers)) for row in self.distinct}

    def units_of(self, rows: Sequence[int]) -> list[int]:
        """The unit of each of some distinct rows."""
        return [self.units[row] for row in rows]

    # ---- what is computed of the images ----

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """The images of some rows: `[len(rows), 3, resolution, resolution]` in [0, 1]."""
        return to_pixels((self.images[row]["image"] for row in rows), self.resolution, self.framing)

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The captions of some rows."""
        return self.images["text"][list(rows)]

    def condition(self, names: Sequence[str], rows: Sequence[int]) -> Condition:
        """The cached conditions of some rows."""
        return self.batch(rows, names)

    @cached_property
    def thumbnails(self) -> torch.Tensor:
        """The distinct images at 32 x 32 pixels: `[N, 3, 32, 32]` in [0, 1]."""
        return thumbnails(self.images, self.distinct, self.framing)

    def features(self, encoder: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features of the distinct images by an encoder of images in [0, 1], computed once: `[N, D]`."""
        for known, features in self._features:
            if known is encoder:
                return features
        parts = [self.distinct[i : i + 64] for i in range(0, len(self.distinct), 64)]
        features = torch.cat([encoder(self.pixels(part)) for part in bar(parts, "features of images")])
        self._features.append((encoder, features))
        return features


@torch.no_grad()
def encode(
    dataset: Dataset,
    family: Family,
    resolution: int,
    batch_size: int = 32,
    weights_digests: Sequence[str] | None = None,
    framing: Framing = DEFAULT_FRAMING,
) -> Dataset:
    """Compute the latents and conditions of a dataset once; `datasets` keeps them on disk.

    They are found again under a fingerprint of the rows, the weights of the autoencoder and the text encoders, what
    else the family says that they depend on, the resolution, the framing and the version of this format.

    Args:
        dataset (`Dataset`): columns `image`, `text`.
        family: the pipeline's family (`memcontrol_hf.families.family_of`).
        resolution (`int`): side of the images in pixels.
        batch_size (`int`): number of images encoded at once; only the speed depends on it.
        weights_digests (list of `str`, *optional*): [`weights_digest`] of each of the family's encoders, if known.
        framing ([`~memcontrol_hf.images.Framing`]): how an image becomes a square.

    Returns:
        `Dataset`: columns `latents` `[C, h, w]`, the family's conditions (`prompt_embeds` `[L, D]`, ...), `digest`
        (equal for exact copies of an image) and `row` (the row's number), in torch format.
    """
    if weights_digests is None:
        weights_digests = [weights_digest(module) for module in family.encoder_modules]
    key = [dataset._fingerprint, *weights_digests, *family.cache_key(), resolution]
    how = [f"digest {DIGEST_VERSION}", f"transparency over {framing.background}"]
    how += [] if framing.fit == "crop" else [framing.fit]
    fingerprint = Hasher.hash([*key, *how])
    folder = cache_folder()
    if (earlier := folder / f"{Hasher.hash(key)}.arrow").exists():
        logger.warning(f"{earlier} was cached by an earlier version: it is not read, and can be deleted")
    probe = family.encode_images(torch.zeros(1, 3, resolution, resolution))
    condition = family.encode_prompts(dataset[:1]["text"])
    features = Features(
        {
            "latents": Array3D(tuple(probe.shape[1:]), "float32"),
            **{name: _column_type(tensor[0]) for name, tensor in condition.items()},
            "digest": Value("string"),
        }
    )

    file = folder / f"{fingerprint}.arrow"
    if not is_whole(file):
        delete_damaged(file)
        floats = [probe[0].numel(), *(tensor[0].numel() for tensor in condition.values())]
        check_room(folder, 4 * sum(floats) * len(dataset), "what is computed once of the images")

    def encode_batch(batch: dict[str, list]) -> dict[str, np.ndarray | list[str]]:
        return {
            "latents": family.encode_images(to_pixels(batch["image"], resolution, framing)).cpu().numpy(),
            **{name: tensor.cpu().numpy() for name, tensor in family.encode_prompts(batch["text"]).items()},
            "digest": [pixel_digest(image) for image in batch["image"]],
        }

    encoded = dataset.map(
        encode_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=fingerprint,
        cache_file_name=str(file),
        load_from_cache_file=True,
        desc="Encoding images and captions",
    )
    seal(file)
    rows = Dataset.from_dict({"row": list(range(len(encoded)))})
    return concatenate_datasets([encoded.with_format(None), rows], axis=1).with_format("torch")


def _column_type(row: torch.Tensor) -> Value | List | Array2D:
    """The type of the column that holds one row of a condition's tensor: a number, a vector or a matrix."""
    dtype = str(row.dtype).removeprefix("torch.")
    match row.dim():
        case 0:
            return Value(dtype)
        case 1:
            return List(Value(dtype), length=len(row))
        case _:
            return Array2D(tuple(row.shape), dtype)


def weights_digest(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of a module's parameters and buffers, by name and value.

    Args:
        module (`nn.Module`): the module.
        dtype (`torch.dtype`, *optional*): type to which floating-point values are rounded first.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def images_digest(*datasets: EncodedImages) -> str:
    """A digest of the images and captions of data sets, which a study names; it begins with its version."""
    digest = hashlib.blake2b(digest_size=8)
    for data in datasets:
        digest.update(repr([data.digests, data.images["text"][:]]).encode())
    return f"v{DIGEST_VERSION}:{digest.hexdigest()}"


def first_rows(keys: Iterable[Hashable]) -> list[int]:
    """The row in which each distinct key occurs first, in order."""
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return list(first.values())
