"""The conditions that a training step reads, after mitigations have changed captions and embeddings."""

from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset

from ..families import Condition, Family
from ..randomness import seeded_generator
from .base import Mitigation, overrides


class TrainingConditions:
    """Makes the conditions that a training step reads for its rows.

    Args:
        mitigations (list of [`~memcontrol_hf.mitigations.Mitigation`]): mitigations in the order in which they apply.
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        images (`Dataset`): training images with the column `text` and the columns that mitigations read.
        numbers (list of `int`): number of each row of `images`; the random draws for a row depend on it.
    """

    def __init__(self, mitigations: Iterable[Mitigation], family: Family, images: Dataset, numbers: Sequence[int]):
        mitigations = list(mitigations)
        self._family = family
        self._caption_mitigations = [m for m in mitigations if overrides(m, "caption")]
        self._embedding_mitigations = [m for m in mitigations if overrides(m, "embedding")]
        self._rows = dict(zip(numbers, images.remove_columns("image"), strict=True))

    def captions(self, numbers: Iterable[int], key: tuple[int, ...]) -> list[str]:
        """The captions of some rows after the mitigations. `numbers` and `key` are those of [`__call__`]."""
        captions = []
        for number in numbers:
            row = self._rows[number]
            caption = row["text"]
            for mitigation in self._caption_mitigations:
                generator = seeded_generator(*key, mitigation.number, number)
                caption = mitigation.caption(caption, row, self._family.pipeline.tokenizer, generator)
            captions.append(caption)
        return captions

    def __call__(
        self, condition: Condition, numbers: Sequence[int], key: tuple[int, ...], encode: bool = False
    ) -> Condition:
        """The conditions of some rows after the mitigations.

        Args:
            condition (`Condition`): cached conditions of the rows, which are used unless captions are encoded again.
            numbers (list of `int`): numbers of the rows.
            key (tuple of `int`): seed, purpose and epoch (or step). A draw depends on the key, the mitigation and the
                row, and on nothing else.
            encode (`bool`): whether to encode captions that no mitigation changes, because text encoders are tuned.
        """
        if self._caption_mitigations or encode:
            encoded = self._family.encode_prompts(self.captions(numbers, key))
            condition = {name: encoded[name].to(tensor) for name, tensor in condition.items()}
        for mitigation in self._embedding_mitigations:
            generators = [seeded_generator(*key, mitigation.number, number) for number in numbers]
            condition = {
                name: torch.stack([mitigation.embedding(*pair) for pair in zip(tensor, generators)])
                if tensor.is_floating_point()
                else tensor
                for name, tensor in condition.items()
            }
        return condition
