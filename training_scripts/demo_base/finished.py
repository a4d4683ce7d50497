"""The finished demo: written, read back, measured and drawn."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, ResNetModel, ViTImageProcessor

from .autoencoder import decode, encode
from .denoiser import loss_of_each, tokenize
from .emoji import SIZE, SPLITS, Row, save_dataset, to_tensor
from .image_encoder import measure_retrieval


def save_demo(pipe: StableDiffusionPipeline, encoder: ResNetModel, parts: dict[str, list[Row]], folder: Path) -> None:
    """Write the demo folder, with weights as fp16 that are loaded as fp32."""
    pipe.to(dtype=torch.float16).save_pretrained(folder / "pipeline", safe_serialization=True)
    encoder.half().save_pretrained(folder / "encoder", safe_serialization=True)
    for config_file in (folder / "pipeline" / "text_encoder" / "config.json", folder / "encoder" / "config.json"):
        config = json.loads(config_file.read_text()) | {"dtype": "float32"}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = {"height": SIZE, "width": SIZE}
    processor = ViTImageProcessor(size=size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder / "encoder")
    save_dataset(parts, folder / "dataset")


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """The images of a tensor `[N, 3, H, W]` in [-1, 1]."""
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def draw_samples(pipe: StableDiffusionPipeline, captions: list[str], path: Path, columns: int = 8) -> None:
    """Draw a grid of generated images, each above its caption; the seed of an image is its position."""
    cell, font = (92, 90), ImageFont.load_default(size=9)
    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    images = pipe(captions, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    grid = Image.new("RGB", (columns * cell[0], -(-len(captions) // columns) * cell[1]), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * cell[0], i // columns * cell[1]
        grid.paste(image, (x + (cell[0] - SIZE) // 2, y + 4))
        text = caption if len(caption) < 19 else caption[:17] + "…"
        ImageDraw.Draw(grid).text((x + cell[0] // 2, y + SIZE + 8), text, fill="black", font=font, anchor="ma")
    grid.quantize(128).save(path, optimize=True)


def draw_round_trip(originals: list[Image.Image], round_trips: list[Image.Image], path: Path) -> None:
    """Draw rows of twelve originals, each above the row of its round trips through the autoencoder."""
    grid = Image.new("RGB", (12 * (SIZE + 4), len(originals) // 12 * (2 * SIZE + 12)), "white")
    for i, pair in enumerate(zip(originals, round_trips)):
        for j, image in enumerate(pair):
            grid.paste(image, (i % 12 * (SIZE + 4), i // 12 * (2 * SIZE + 12) + j * (SIZE + 2)))
    grid.quantize(128).save(path, optimize=True)


def measure_demo(folder: Path, parts: dict[str, list[Row]]) -> dict:
    """Measure the saved demo, and draw its two pictures."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    encoder = AutoModel.from_pretrained(folder / "encoder").eval()
    downstream = [row for name in SPLITS for row in parts[name]]
    names = ("noto", "noto_held_out", "train", "held_out")
    pixels = {name: to_tensor(parts[name]) for name in names}
    latents = {name: encode(pipe.vae, pixels[name]) for name in names}
    losses = {
        name: loss_of_each(
            pipe.unet, pipe.text_encoder, latents[name], tokenize(pipe.tokenizer, [r["text"] for r in parts[name]])
        )
        for name in names
    }
    round_trip = decode(pipe.vae, latents["held_out"])
    draw_round_trip(to_images(pixels["held_out"][:36]), to_images(round_trip[:36]), folder / "round_trip.png")
    # every 37th pre-training caption without a flag: no choosing
    captions = [row["text"] for row in parts["noto"] if row["category"] != "Flags"][::37][:40]
    draw_samples(pipe, captions, folder / "samples.png")
    members, others = losses["train"], losses["held_out"]
    return {
        "noto_train_loss": round(losses["noto"].mean().item(), 4),
        "noto_held_out_loss": round(losses["noto_held_out"].mean().item(), 4),
        "fluent_train_loss": round(members.mean().item(), 4),
        "fluent_held_out_loss": round(others.mean().item(), 4),
        # loss-threshold membership attack on the untuned base: these are no members yet, so 0.5 is right
        "fluent_membership_auc": round((members[:, None] < others[None]).float().mean().item(), 4),
        "round_trip_l1": round((round_trip - pixels["held_out"]).abs().mean().item() / 2, 4),
        "round_trip_psnr": round(
            -10 * ((round_trip - pixels["held_out"]).square().mean((1, 2, 3)) / 4).log10().mean().item(), 2
        ),
        "latent_mean": [round(x, 3) for x in latents["noto"].mean((0, 2, 3)).tolist()],
        "latent_std": [round(x, 3) for x in latents["noto"].std((0, 2, 3)).tolist()],
        "copy_retrieval_top1": {k: round(v, 4) for k, v in measure_retrieval(encoder, downstream).items()},
        "copy_retrieval_candidates": len(downstream),
    }
