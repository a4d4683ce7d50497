"""Fine-tunes of one mask each, measured on held-out images."""

from pathlib import Path

import torch
from datasets import DatasetDict

from memcontrol_hf import MemControlTrainer, metrics
from memcontrol_hf.adapters import merged
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.randomness import Purpose, row_keys

from .choice import Mask

ATTACKS = ("loss", "clid", "pia")
PIA_TIMESTEP = 200  # of the demo's 1,000, as in the audit

Figures = dict[str, float | int]


def fine_tune(trainer: MemControlTrainer, mask: Mask, rate: float, seed: int, adapter: Path | None = None) -> None:
    """Leave the trainer with the model of a mask, and save its adapter if a folder is given; an empty mask is none."""
    trainer.args.seed = seed
    trainer.apply_hyperparameters({"mask": mask, "learning_rate": rate})
    if any(mask.values()):
        trainer.train()
        if adapter is not None:
            trainer.save_model(str(adapter))


def measure(trainer: MemControlTrainer, data: DatasetDict, seed: int) -> Figures:
    """The size of the present model, its loss on held-out images, and the AUC of three membership attacks."""
    held_out = trainer.encode(data["held_out"])
    with torch.no_grad(), merged(trainer.adapters.adapted.values()):
        members = scores(trainer, trainer.train_dataset, Purpose.AUDIT_MEMBERS, seed)
        others = scores(trainer, held_out, Purpose.AUDIT_NONMEMBERS, seed)
    return {
        "blocks": sum(trainer.mask.values()),
        "parameters": trainer.trainable_parameters,
        "percent": trainer.trainable_percent,
        "loss": -others["loss"].mean().item(),
        "loss_train": -members["loss"].mean().item(),
        **{f"auc_{name}": metrics.membership(members[name], others[name]).auc for name in ATTACKS},
    }


def scores(trainer: MemControlTrainer, images: EncodedImages, purpose: Purpose, seed: int) -> dict[str, torch.Tensor]:
    """Scores of the attacks on each distinct image, higher for members: name of the attack -> `[N]`.

    The scores are those of the audit. SecMI, which costs as much as the other attacks together, is left out.
    """
    family, rows, batch = trainer.family, images.distinct, trainer.args.per_device_eval_batch_size
    timesteps = family.noise.timesteps(trainer.args.eval_num_timesteps)
    keys = row_keys(seed, purpose, (images.numbers[row] for row in rows))
    inputs = (family, trainer.model.eval(), images.encoded[rows]["latents"], images.condition(family.conditions, rows))
    losses = metrics.denoising_losses(*inputs, timesteps, keys, batch)
    null = family.null_condition()
    return {
        "loss": -losses.mean(1),
        "clid": metrics.clid(*inputs, null, timesteps, keys, batch, losses),
        "pia": metrics.pia(*inputs, PIA_TIMESTEP, batch_size=batch),
    }


def fid(trainer: MemControlTrainer, data: DatasetDict, images: int) -> dict[str, float | int]:
    """fid of at least so many images, as many from each held-out caption, against the held-out images."""
    held_out = trainer.encode(data["held_out"])
    per_caption = -(-images // len(held_out.distinct))
    with merged(trainer.adapters.adapted.values()):
        generated = trainer.evaluator().images(held_out, held_out.distinct, Purpose.AUDIT_QUALITY, per_caption)
    features = trainer.encoder(generated)
    return {"fid": metrics.fid(features, held_out.features(trainer.encoder)), "images": len(generated)}
