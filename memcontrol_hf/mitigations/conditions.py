"""The conditions that a training step reads, with the changes that the mitigations make to captions and embeddings."""

from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset

from ..families import Condition, Family
from ..randomness import seeded_generator
from .base import Mitigation, overrides


class TrainingConditions:
    """The conditions of training rows, as one step reads them.

    Args:
        mitigations (list of [`~memcontrol_hf.mitigations.Mitigation`]): in the order in which they apply.
        family ([`~memcontrol_hf.families.Family`]): family of the pipeline.
        images (`Dataset`): the training images, with the column `text` and those that mitigations read.
        numbers (list of `int`): the number of each row of `images`, which its draws are keyed by.
    """

    def __init__(self, mitigations: Iterable[Mitigation], family: Family, images: Dataset, numbers: Sequence[int]):
        mitigations = list(mitigations)
        self._family = family
        self._of_captions = [m for m in mitigations if overrides(m, "caption")]
        self._of_embeddings = [m for m in mitigations if overrides(m, "embedding")]
        self._rows = dict(zip(numbers, images.remove_columns("image"), strict=True))

    def captions(self, numbers: Iterable[int], key: tuple[int, ...]) -> list[str]:
        """The captions of some rows, by the key of [`__call__`]."""
        captions = []
        for number in numbers:
            row = self._rows[number]
            caption = row["text"]
            for mitigation in self._of_captions:
                generator = seeded_generator(*key, mitigation.number, number)
                caption = mitigation.caption(caption, row, self._family.pipeline.tokenizer, generator)
            captions.append(caption)
        return captions

    def __call__(
        self, condition: Condition, numbers: Sequence[int], key: tuple[int, ...], encode: bool = False
    ) -> Condition:
        """The conditions of some rows.

        Args:
            condition (`Condition`): the cached conditions of the rows, which are used unless a caption changes.
            numbers (list of `int`): the numbers of the rows.
            key (tuple of `int`): seed, purpose and epoch (or step). With the row, this is all that a draw depends on.
            encode (`bool`): encode the captions even if none changes, because text encoders are tuned.
        """
        if self._of_captions or encode:
            encoded = self._family.encode_prompts(self.captions(numbers, key))
            condition = {name: encoded[name].to(tensor) for name, tensor in condition.items()}
        for mitigation in self._of_embeddings:
            generators = [seeded_generator(*key, mitigation.number, number) for number in numbers]
            condition = {
                name: torch.stack([mitigation.embedding(*pair) for pair in zip(tensor, generators)])
                if tensor.is_floating_point()
                else tensor
                for name, tensor in condition.items()
            }
        return condition
