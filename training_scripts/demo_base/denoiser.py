"""The UNet, the text encoder and the tokenizer, in Stable Diffusion 1.x's layout but much narrower."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .autoencoder import encode
from .emoji import Row, to_tensor
from .training import Stage

BATCH = 64


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer of 1,724 tokens, which can write any text."""
    empty = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The ends of words as special tokens get fixed numbers, and so do equally frequent merges.
    trainer = trainers.BpeTrainer(
        vocab_size=1722,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=[c + "</w>" for c in alphabet],
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The token ids `[N, 16]` of captions, as the pipeline makes them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def make_denoiser(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder before training."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=12,
        out_channels=12,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=96,
        attention_head_dim=2,  # the number of heads, as in Stable Diffusion 1.x
        norm_num_groups=8,
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        projection_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return unet, CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule and epsilon prediction, sampled deterministically."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


@torch.no_grad()
def loss_of_each(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, latents: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The epsilon loss of each image `[N]`: mean over five timesteps with fixed noise."""
    scheduler, generator = make_scheduler(), torch.Generator().manual_seed(0)
    losses = []
    for t in (100, 300, 500, 700, 900):
        noise = torch.randn(latents.shape, generator=generator)
        for x, e, token_ids in zip(latents.split(64), noise.split(64), ids.split(64)):
            timesteps = torch.full((len(x),), t)
            noisy = scheduler.add_noise(x, e, timesteps)
            predicted = unet(noisy, timesteps, text_encoder(token_ids).last_hidden_state).sample
            losses.append((predicted - e).square().mean((1, 2, 3)))
    return torch.cat(losses).view(5, -1).mean(0)


def train_unet(
    parts: dict[str, list[Row]], vae: AutoencoderKL, args: argparse.Namespace, log: dict
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Train UNet and text encoder on Noto emoji: epsilon loss with min-SNR weights, and 10 % empty captions.

    The weights are those of huggingface.co/papers/2303.09556. The function is long because it is one loop, to be read
    from top to bottom.

    Args:
        parts: Emoji by part; `noto` is trained on, `noto_held_out` is measured.
        vae: Autoencoder of the latents.
        args: The flags of the command.
        log: Gets the entry `unet`.
    """
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([row["text"] for row in parts["noto"]])
    unet, text_encoder = make_denoiser(tokenizer)
    train, held_out = (Encoded.of(parts[name], vae, tokenizer) for name in ("noto", "noto_held_out"))
    null_ids = tokenize(tokenizer, [""])
    noise_scheduler = make_scheduler()
    snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)
    weights = snr.clamp(max=5.0) / snr

    unet.to(memory_format=torch.channels_last)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.75, foreach=True)
    modules = {"unet": unet, "text_encoder": text_encoder}
    stage = Stage(
        "unet", modules, parameters, ema, args.unet_steps, 200, args, learning_rate=1.5e-3, weight_decay=1e-2
    )
    workers = PartialState()
    own = slice(workers.process_index, None, workers.num_processes)  # the share of this process in each batch
    curve = args.output_dir / "unet_curve.jsonl"
    for step, generator in stage.draws():
        index, timesteps, noise, dropped = (drawn[own] for drawn in draw_batch(train.latents, generator))
        ids = torch.where(dropped, null_ids, train.ids[index])
        noisy = noise_scheduler.add_noise(train.latents[index], noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
        errors = (predicted - noise).square().mean((1, 2, 3))
        stage.update((errors * weights[timesteps]).mean(), workers.num_processes)
        if workers.is_main_process:
            stage.report(step, 100, loss=errors.mean().item())
            if stage.checkpoint(step):
                ema.store(parameters)
                ema.copy_to(parameters)
                append_to_curve(curve, step + 1, unet, text_encoder, train, held_out)
                ema.restore(parameters)
    ema.copy_to(parameters)
    unet.to(memory_format=torch.contiguous_format)
    log["unet"] = {
        "unet_parameters": unet.num_parameters(),
        "text_encoder_parameters": text_encoder.num_parameters(),
        "vocabulary": len(tokenizer),
        "steps": args.unet_steps,
        "batch_size": BATCH,
        "images": len(train.latents),
        "seconds": round(stage.seconds),
        "curve": [json.loads(line) for line in curve.open()],
    }
    return unet.eval(), text_encoder.eval(), tokenizer


class Encoded(NamedTuple):
    """The latents `[N, 12, 8, 8]` and the token ids `[N, 16]` of some emoji."""

    latents: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, rows: list[Row], vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> "Encoded":
        """Encode images and captions."""
        return cls(encode(vae, to_tensor(rows)), tokenize(tokenizer, [row["text"] for row in rows]))


def draw_batch(latents: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """The draws of a step: rows `[B]`, timesteps `[B]`, noise `[B, 12, 8, 8]` and dropped captions `[B, 1]`."""
    return (
        torch.randint(len(latents), (BATCH,), generator=generator),
        torch.randint(1000, (BATCH,), generator=generator),
        torch.randn(BATCH, *latents.shape[1:], generator=generator),
        torch.rand(BATCH, 1, generator=generator) < 0.1,
    )


def append_to_curve(
    file: Path, step: int, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, train: Encoded, held_out: Encoded
) -> None:
    """Measure the averaged weights on held-out and on as many training images, and add a line to the curve."""
    shown = len(held_out.latents)
    held_out_loss = loss_of_each(unet, text_encoder, *held_out).mean().item()
    train_loss = loss_of_each(unet, text_encoder, train.latents[:shown], train.ids[:shown]).mean().item()
    print(f"unet {step} ema: train {train_loss:.4f} held-out {held_out_loss:.4f}", flush=True)
    line = {"step": step, "train": round(train_loss, 4), "held_out": round(held_out_loss, 4)}
    with file.open("a") as curve:
        curve.write(json.dumps(line) + "\n")
