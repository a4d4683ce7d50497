"""The image encoder: a small ResNet that tells every image from every other, and finds the original of a copy."""

import argparse
import io
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image, ImageFilter
from transformers import ResNetConfig, ResNetModel

from .emoji import SIZE, Row, to_tensor


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random copy of each image: crop, colour, blur, noise.

    Args:
        images: Images `[N, 3, 64, 64]` in [-1, 1].
        generator: Source of all random draws.

    Returns:
        Tensor of the same shape.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    scale = uniform(0.65, 1.0)
    turn = uniform(-0.15, 0.15)
    shift = uniform(-1, 1, 2) * (1 - scale)[:, None]
    theta = torch.stack(
        [
            torch.stack([scale * turn.cos(), -scale * turn.sin(), shift[:, 0]], 1),
            torch.stack([scale * turn.sin(), scale * turn.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mix = torch.eye(3) + uniform(-0.12, 0.12, 3, 3)  # brightness, contrast, saturation and hue at once
    out = torch.einsum("nij,njhw->nihw", mix, out - 1) + 1 + uniform(-0.25, 0.1, 1, 1, 1)
    blurred = F.interpolate(F.avg_pool2d(out, 2), scale_factor=2.0, mode="bilinear")
    more_blurred = F.interpolate(F.avg_pool2d(out, 4), scale_factor=4.0, mode="bilinear")
    kind = uniform(0, 1, 1, 1, 1)
    out = torch.where(kind < 0.15, more_blurred, torch.where(kind < 0.4, blurred, out))
    noise = torch.randn(out.shape, generator=generator) * (uniform(-0.2, 0.4, 1, 1, 1)).clamp(min=0)
    return (out + noise).clamp(-1, 1)


def train_encoder(images: torch.Tensor, args: argparse.Namespace, log: dict) -> ResNetModel:
    """Train an image encoder by contrastive instance discrimination (NT-Xent, huggingface.co/papers/2002.05709).

    Args:
        images: Images `[N, 3, 64, 64]` in [-1, 1].
        args: The flags of the command.
        log: Gets the entry `encoder`.
    """
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic", num_channels=3
    )
    encoder = ResNetModel(config)
    head = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    checkpoint = args.output_dir / "encoder.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(state["model"])
        log["encoder"] = state["log"]
        return encoder.eval()
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 50, args.encoder_steps)
    batch_size, temperature, start = 192, 0.15, time.time()
    encoder.train()
    for step in range(args.encoder_steps):
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        views = torch.cat([augment(batch, generator), augment(batch, generator)])
        z = F.normalize(head(encoder(views).pooler_output.flatten(1)), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
        loss = F.cross_entropy(logits, torch.arange(2 * batch_size).roll(batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 25 == 0:
            print(f"encoder {step + 1}/{args.encoder_steps} loss {loss:.3f} {time.time() - start:.0f} s", flush=True)
    log["encoder"] = {
        "parameters": encoder.num_parameters(),
        "steps": args.encoder_steps,
        "batch_size": batch_size,
        "images": len(images),
        "final_loss": round(loss.item(), 4),
        "seconds": round(time.time() - start),
    }
    part = checkpoint.with_suffix(".tmp")
    torch.save({"model": encoder.state_dict(), "log": log["encoder"]}, part)
    part.replace(checkpoint)
    return encoder.eval()


@torch.no_grad()
def measure_retrieval(encoder: ResNetModel, rows: list[Row]) -> dict[str, float]:
    """The share of damaged copies whose nearest original by cosine is their own, for each damage."""

    def jpeg(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=30)
        return Image.open(buffer).convert("RGB")

    def crop(image: Image.Image) -> Image.Image:
        return image.crop((8, 4, 60, 56)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(2))

    def noise(image: Image.Image) -> Image.Image:
        array = np.asarray(image) + np.random.default_rng(0).normal(0, 25, (SIZE, SIZE, 3))
        return Image.fromarray(array.clip(0, 255).astype(np.uint8))

    def features(rows: list[Row]) -> torch.Tensor:
        return F.normalize(encoder(to_tensor(rows)).pooler_output.flatten(1), dim=1)

    originals, result = features(rows), {}
    for damage in (jpeg, crop, blur, noise):
        copies = features([{"image": damage(row["image"])} for row in rows])
        result[damage.__name__] = ((copies @ originals.T).argmax(1) == torch.arange(len(rows))).float().mean().item()
    return result
