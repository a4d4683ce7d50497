"""Fine-tunes of one mask each, measured on held-out images."""

from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict

from common.audits import attack_scores
from memcontrol_hf import MemControlTrainer, metrics
from memcontrol_hf.adapters import merged
from memcontrol_hf.randomness import Purpose

from .choice import Mask

Figures = dict[str, float | int]


def fine_tune(trainer: MemControlTrainer, mask: Mask, rate: float, seed: int, adapter: Path | None = None) -> None:
    """Leave the trainer with the model of a mask, and save its adapter if a folder is given; an empty mask is none."""
    trainer.args.seed = seed
    trainer.apply_hyperparameters({"mask": mask, "learning_rate": rate})
    if any(mask.values()):
        trainer.train()
        if adapter is not None:
            trainer.save_model(str(adapter))


Scores = dict[str, torch.Tensor]
"""The score of each distinct image by the name of the attack: `[N]`."""


def held_out_scores(
    trainer: MemControlTrainer, data: Mapping[str, Dataset], seed: int, train: Dataset | None = None
) -> tuple[Scores, Scores]:
    """The scores of the training and of the held-out images, also in the middle of a training.

    Args:
        trainer: The trainer, whose model is attacked.
        data: Split `held_out`.
        seed: Random seed of the attacks.
        train: The training images where they are asked with other captions; those of the trainer by default.
    """
    held_out, training = trainer.encode(data["held_out"]), trainer.model.training
    seen = trainer.train_dataset if train is None else trainer.encode(train)
    with torch.no_grad(), merged(trainer.adapters.adapted.values()):
        measured = (trainer.family, trainer.model.eval())
        settings = (seed, trainer.args.eval_num_timesteps, trainer.args.per_device_eval_batch_size)
        members = attack_scores(*measured, seen, Purpose.AUDIT_MEMBERS, *settings)
        others = attack_scores(*measured, held_out, Purpose.AUDIT_NONMEMBERS, *settings)
    trainer.model.train(training)
    return members, others


def losses_and_attacks(members: Scores, others: Scores) -> dict[str, float]:
    """The loss on held-out and on training images, and the AUC of each membership attack."""
    return {
        "loss": -others["loss"].mean().item(),
        "loss_train": -members["loss"].mean().item(),
        **{f"auc_{name}": metrics.membership(members[name], others[name]).auc for name in members},
    }


def measure(trainer: MemControlTrainer, data: DatasetDict, seed: int) -> Figures:
    """The size of the present model, its loss on held-out images, and the AUC of three membership attacks."""
    return {
        "blocks": sum(trainer.mask.values()),
        "parameters": trainer.trainable_parameters,
        "percent": trainer.trainable_percent,
        **losses_and_attacks(*held_out_scores(trainer, data, seed)),
    }


def fid(trainer: MemControlTrainer, data: DatasetDict, images: int) -> dict[str, float | int]:
    """fid of at least so many images, as many from each held-out caption, against the held-out images."""
    held_out = trainer.encode(data["held_out"])
    per_caption = -(-images // len(held_out.distinct))
    with merged(trainer.adapters.adapted.values()):
        generated = trainer.evaluator().images(held_out, held_out.distinct, Purpose.AUDIT_QUALITY, per_caption)
    features = trainer.encoder(generated)
    return {"fid": metrics.fid(features, held_out.features(trainer.encoder)), "images": len(generated)}
