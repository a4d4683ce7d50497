# Copyright 2026 The memcontrol_hf authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Make the demo that ships in the package again: data set, image encoder, autoencoder, UNet and text encoder.

```bash
npm install --prefix DIR emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 training_scripts/pretrain_demo_base.py --npm_dir DIR/node_modules
```

The UNet's batch is shared by the processes: on two cores two of them are nearly twice as fast as one with two threads.
The stages before it run in one process, on all cores.

Each stage leaves a checkpoint in `--output_dir`; the same command goes on where it stopped. The last stage writes
the demo folder. Four stages:

1. data: emoji of three vendors as 64x64 images over white, with names as captions; three splits of Fluent emoji,
2. encoder: a small ResNet, trained to tell every image from every other (NT-Xent),
3. vae: an autoencoder, 64x64 -> 8x8 latents, on all images but the downstream splits,
4. unet: the UNet and the text encoder, on Noto emoji and their names alone.
"""

import argparse
import io
import json
import random
import re
import time
from collections import defaultdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessor,
)

SIZE = 64
SPLITS = {"train": 92, "validation": 192, "held_out": 256}  # unique images of each
REPEATED, TIMES = 12, 4  # so many of the training images occur so often
DOWNSTREAM_CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
VAE_BATCH, PERCEPTUAL_WEIGHT, KL_WEIGHT = 16, 0.05, 3e-4
LARGEST_FAMILY = 6  # larger families of look-alikes (clock faces, moons) stay out of the downstream set


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--npm_dir", type=Path, required=True, help="node_modules folder with the three packages")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_base"), help="checkpoints go here")
    parser.add_argument(
        "--demo_dir",
        type=Path,
        default=Path(__file__).parent.parent / "memcontrol_hf" / "demo",
        help="the finished demo is written here",
    )
    parser.add_argument("--encoder_steps", type=int, default=300)
    parser.add_argument("--vae_steps", type=int, default=1000)
    parser.add_argument("--decoder_steps", type=int, default=1500)
    parser.add_argument("--unet_steps", type=int, default=8000)
    parser.add_argument("--checkpointing_steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# 1. Data


def read_image(path: Path) -> Image.Image:
    """A 64x64 RGB image, transparency composited over white."""
    rgba = Image.open(path).convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return rgb if rgb.size == (SIZE, SIZE) else rgb.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def clean_caption(name: str) -> str:
    """`"BLACK RIGHT-POINTING TRIANGLE"` -> `"black right pointing triangle"`."""
    return " ".join(re.sub(r"[^a-z0-9']+", " ", name.lower().replace("’", "'")).split())


def find_families(rows: list[dict]) -> list[list[dict]]:
    """Group emoji that are variants of one another: same head noun in the name, or nearly the same small picture."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    heads: dict[str, int] = {}
    for i, row in enumerate(rows):
        words = re.split(r" (?:with|of|and|behind|over|on|in|without|at|for) ", row["text"])[0].split()
        words = [w for w in words if w not in ("face", "symbol", "sign", "medium", "button")] or words
        parent[root(i)] = root(heads.setdefault(words[-1].rstrip("s"), i))
    small = np.stack([np.asarray(row["image"].resize((16, 16), Image.Resampling.BOX)) for row in rows])
    small = small.reshape(len(rows), -1) / 255.0
    for i in range(len(rows)):
        distance = np.sqrt(((small[i + 1 :] - small[i]) ** 2).mean(1))
        for j in np.flatnonzero(distance < 0.1):
            parent[root(i + 1 + int(j))] = root(i)
    families = defaultdict(list)
    for i, row in enumerate(rows):
        families[root(i)].append(row)
    return list(families.values())


def load_data(npm_dir: Path, seed: int) -> dict[str, list[dict]]:
    """Read the emoji and split them.

    Args:
        npm_dir: The `node_modules` folder.
        seed: Seed of the splits.

    Returns:
        Rows of `image`, `text` and `category` by part: `noto`, `noto_held_out`, `twemoji`, `fluent_rest` and the
        downstream splits `train` (repeats not yet repeated), `validation` and `held_out`.
    """
    table = json.loads((npm_dir / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8"))
    fluent_dir = npm_dir / "@lobehub" / "fluent-emoji-3d" / "assets"
    fluent_files = {p.stem.replace("-fe0f", ""): p for p in fluent_dir.glob("*.webp")}
    parts = defaultdict(list)
    fluent = []
    for entry in sorted(table, key=lambda e: e["sort_order"]):
        text = clean_caption(entry["name"])
        for part, vendor in (("noto", "google"), ("twemoji", "twitter")):
            path = npm_dir / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / entry["image"]
            if path.is_file() and entry["category"] != "Component":
                parts[part].append({"image": read_image(path), "text": text, "category": entry["category"]})
        path = fluent_files.pop(entry["unified"].lower().replace("-fe0f", ""), None)
        if path:
            fluent.append({"image": read_image(path), "text": text, "category": entry["category"]})

    rng = random.Random(seed)
    rng.shuffle(parts["noto"])
    parts["noto_held_out"] = parts["noto"][: len(parts["noto"]) // 20]
    parts["noto"] = parts["noto"][len(parts["noto"]) // 20 :]

    parts["fluent_rest"] = [row for row in fluent if row["category"] not in DOWNSTREAM_CATEGORIES]
    families = find_families([row for row in fluent if row["category"] in DOWNSTREAM_CATEGORIES])
    parts["fluent_rest"] += [row for family in families if len(family) > LARGEST_FAMILY for row in family]
    families = [family for family in families if len(family) <= LARGEST_FAMILY]
    # Dealt category by category to the part that lacks the largest share: all parts get the same mix.
    rng.shuffle(families)
    families.sort(key=lambda family: (family[0]["category"], -len(family)))
    wanted = SPLITS | {"fluent_rest": sum(map(len, families)) - sum(SPLITS.values())}
    lacking = dict(wanted)
    for family in families:
        fits = [name for name in wanted if lacking[name] >= len(family)]
        name = max(fits or ["fluent_rest"], key=lambda name: lacking[name] / wanted[name])
        parts[name] += family
        lacking[name] -= len(family)
    assert all(len(parts[name]) == number for name, number in SPLITS.items()), lacking
    for name in SPLITS:
        rng.shuffle(parts[name])
    singles = {id(family[0]) for family in families if len(family) == 1}
    parts["train"].sort(key=lambda row: id(row) not in singles)  # the first ones get repeated: none with a look-alike
    return dict(parts)


def to_tensor(rows: list[dict]) -> torch.Tensor:
    """Images as float32 [N, 3, 64, 64] in [-1, 1]."""
    array = np.stack([np.asarray(row["image"]) for row in rows])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def save_dataset(parts: dict[str, list[dict]], folder: Path) -> None:
    """Write the downstream splits as Parquet files with the columns `image` (PNG bytes) and `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for name in SPLITS:
        rows = parts[name]
        if name == "train":
            rows = rows[REPEATED:] + rows[:REPEATED] * TIMES
            random.Random(0).shuffle(rows)
        columns = {"image": [], "text": [row["text"] for row in rows]}
        for row in rows:
            buffer = io.BytesIO()
            row["image"].save(buffer, format="PNG", optimize=True)
            columns["image"].append({"bytes": buffer.getvalue(), "path": None})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


# 2. Image encoder


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random copy of each image: crop, colour, blur, noise.

    Args:
        images: [N, 3, 64, 64] in [-1, 1].
        generator: Source of all randomness.

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
    """Contrastive instance discrimination (NT-Xent, huggingface.co/papers/2002.05709)."""
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
    torch.save({"model": encoder.state_dict(), "log": log["encoder"]}, checkpoint)
    return encoder.eval()


@torch.no_grad()
def measure_retrieval(encoder: ResNetModel, rows: list[dict]) -> dict[str, float]:
    """Share of damaged copies whose nearest original, by cosine, is their own; of images never trained on."""

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

    def features(rows: list[dict]) -> torch.Tensor:
        return F.normalize(encoder(to_tensor(rows)).pooler_output.flatten(1), dim=1)

    originals, result = features(rows), {}
    for damage in (jpeg, crop, blur, noise):
        copies = features([{"image": damage(row["image"])} for row in rows])
        result[damage.__name__] = ((copies @ originals.T).argmax(1) == torch.arange(len(rows))).float().mean().item()
    return result


# 3. Autoencoder


def perceptual_distance(encoder: ResNetModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the encoder's normalized feature maps at its first three resolutions."""
    fx = encoder(x, output_hidden_states=True).hidden_states[:3]
    with torch.no_grad():
        fy = encoder(y, output_hidden_states=True).hidden_states[:3]
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in zip(fx, fy))


def reconstruction_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels, and of the two opponent colours at a quarter of the resolution: without it hues come late."""
    red, green, blue = F.avg_pool2d(x - y, 4).unbind(1)
    return (x - y).abs().mean() + (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()


@torch.no_grad()
def start_as_pyramid(vae: AutoencoderKL) -> None:
    """Before training: three latent channels are the mean colours of 8x8 pixels, and the decoder paints them smoothly.

    With a random start the hues come thousands of steps after the shapes. Colours travel as +RGB and -RGB in six
    channels through blocks that start as the identity, because SiLU(x) - SiLU(-x) = x.
    """
    signs = torch.cat([torch.eye(3), -torch.eye(3)])
    centre, mean, smooth = torch.zeros(3, 3), torch.zeros(3, 3), torch.tensor([0.25, 0.5, 0.25])
    centre[1, 1], mean[:2, :2] = 1, 0.25

    def carry(conv: torch.nn.Conv2d, matrix: torch.Tensor, kernel: torch.Tensor) -> None:
        rows, columns = matrix.shape
        conv.weight[:rows] = 0
        conv.bias[:rows] = 0
        conv.weight[:rows, :columns] = matrix[:, :, None, None] * kernel

    one = torch.ones(1, 1)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                carry(module.conv_shortcut, torch.eye(6), one)
        elif isinstance(module, Attention):
            torch.nn.init.zeros_(module.to_out[0].weight)
        elif isinstance(module, Downsample2D):
            carry(module.conv, torch.eye(6), mean)
        elif isinstance(module, Upsample2D):
            carry(module.conv, torch.eye(6), torch.outer(smooth, smooth))
    carry(vae.encoder.conv_in, signs, centre)
    carry(vae.encoder.conv_out, signs.T / 2, centre)
    carry(vae.quant_conv, torch.eye(3), one)
    vae.quant_conv.bias[vae.config.latent_channels :] = -4.0  # little noise at first
    carry(vae.post_quant_conv, torch.eye(3), one)
    carry(vae.decoder.conv_in, signs, centre)
    carry(vae.decoder.conv_out, signs.T / 2, centre)


def train_vae(images: torch.Tensor, encoder: ResNetModel, args: argparse.Namespace, log: dict) -> AutoencoderKL:
    """L1, a perceptual term and a little KL; ends with latents of mean 0 and standard deviation 1 by channel."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=2,  # small groups would normalize the hues away
        sample_size=SIZE,
    ).to(memory_format=torch.channels_last)
    start_as_pyramid(vae)
    encoder.requires_grad_(False)
    parameters = list(vae.parameters())
    ema = EMAModel(parameters, decay=0.995, foreach=True)
    optimizer = torch.optim.AdamW(parameters, lr=1.2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 30, args.vae_steps)
    state = {"vae": vae, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    first, seconds = resume(args.output_dir / "vae.pt", state)
    start, totals = time.time() - seconds, np.zeros(3)
    for step in range(first, args.vae_steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        batch = images[torch.randint(len(images), (VAE_BATCH,), generator=generator)]
        batch = batch.to(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        l1 = reconstruction_distance(decoded, batch)
        perceptual = perceptual_distance(encoder, decoded, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        update(l1 + PERCEPTUAL_WEIGHT * perceptual + KL_WEIGHT * kl, parameters, optimizer, scheduler, ema)
        totals += [l1.item(), perceptual.item(), kl.item()]
        if (step + 1) % 50 == 0:
            l1, perceptual, kl = (totals / 50).round(4)
            totals[:] = 0
            seconds = time.time() - start
            print(
                f"vae {step + 1}/{args.vae_steps} l1 {l1} perceptual {perceptual} kl {kl} {seconds:.0f} s", flush=True
            )
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.vae_steps:
            save_state(args.output_dir / "vae.pt", state, step + 1, time.time() - start)
    ema.copy_to(parameters)
    vae.eval()
    whiten_latents(vae, images)
    log["vae"] = {
        "parameters": vae.num_parameters(),
        "steps": args.vae_steps,
        "batch_size": VAE_BATCH,
        "images": len(images),
        "perceptual_weight": PERCEPTUAL_WEIGHT,
        "kl_weight": KL_WEIGHT,
        "seconds": round(seconds),
    }
    return vae


def train_decoder(
    vae: AutoencoderKL, encoder: ResNetModel, images: torch.Tensor, args: argparse.Namespace, log: dict
) -> None:
    """Train the decoder on, alone: the latents stay what they are, so this and stage 4 do not wait for each other."""
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    ema = EMAModel(parameters, decay=0.998, foreach=True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 50, args.decoder_steps)
    state = {"vae": vae, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    first, seconds = resume(args.output_dir / "decoder.pt", state)
    if first < args.decoder_steps:
        with torch.no_grad():
            moments = torch.cat([vae.encode(x).latent_dist.parameters for x in images.split(64)]).contiguous()
    start, totals = time.time() - seconds, np.zeros(2)
    for step in range(first, args.decoder_steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        latents = DiagonalGaussianDistribution(moments[index]).sample(generator=generator)
        target = images[index].to(memory_format=torch.channels_last)
        decoded = vae.decode(latents.to(memory_format=torch.channels_last)).sample
        l1, perceptual = reconstruction_distance(decoded, target), perceptual_distance(encoder, decoded, target)
        update(l1 + PERCEPTUAL_WEIGHT * perceptual, parameters, optimizer, scheduler, ema)
        totals += [l1.item(), perceptual.item()]
        if (step + 1) % 50 == 0:
            seconds, (l1, perceptual), totals = time.time() - start, (totals / 50).round(4), np.zeros(2)
            print(
                f"decoder {step + 1}/{args.decoder_steps} l1 {l1} perceptual {perceptual} {seconds:.0f} s", flush=True
            )
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.decoder_steps:
            save_state(args.output_dir / "decoder.pt", state, step + 1, time.time() - start)
    ema.copy_to(parameters)
    log["decoder"] = {"steps": args.decoder_steps, "seconds": round(seconds)}


def update(loss: torch.Tensor, parameters: list, optimizer, scheduler, ema: EMAModel, processes: int = 1) -> None:
    """One step of the optimizer, with clipped gradients, which are averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    if processes > 1:
        gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
        torch.distributed.all_reduce(gradients)
        for parameter, mean in zip(parameters, (gradients / processes).split([p.numel() for p in parameters])):
            parameter.grad.copy_(mean.view(parameter.shape))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    scheduler.step()
    ema.step(parameters)


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold a shift and a scale of each latent channel into the two 1x1 convolutions, so `scaling_factor` is 1."""
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    c = len(mean)  # the first c outputs are the means, the others the log-variances
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.bias[c:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Means of the latents, [N, 12, 8, 8]."""
    batches = images.contiguous(memory_format=torch.channels_last).split(64)
    return torch.cat([vae.encode(x).latent_dist.mean for x in batches]).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1]."""
    batches = latents.split(64)
    return torch.cat([vae.decode(z).sample for z in batches]).clamp(-1, 1).contiguous()


def save_state(path: Path, state: dict, step: int, seconds: float) -> None:
    """Write a checkpoint; an interruption leaves the old one."""
    content = {name: part.state_dict() for name, part in state.items()} | {"step": step, "seconds": seconds}
    torch.save(content, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def resume(path: Path, state: dict) -> tuple[int, float]:
    """Load a checkpoint if there is one. Returns the next step and the seconds spent so far."""
    if not path.is_file():
        return 0, 0.0
    content = torch.load(path, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(content[name])
    return content["step"], content["seconds"]


# 4. UNet and text encoder


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer of 1,724 tokens: any text can be written in it."""
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
    """Token ids [N, 16], as the pipeline makes them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def make_denoiser(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The two models with Stable Diffusion 1.x's layout, much narrower."""
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
    """Epsilon loss of each image, mean over five timesteps with fixed noise, [N]."""
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
    parts: dict[str, list[dict]], vae: AutoencoderKL, args: argparse.Namespace, log: dict
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Epsilon loss with min-SNR weights (huggingface.co/papers/2303.09556) on Noto emoji; 10 % empty captions."""
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([row["text"] for row in parts["noto"]])
    unet, text_encoder = make_denoiser(tokenizer)
    latents, held_out_latents = (encode(vae, to_tensor(parts[name])) for name in ("noto", "noto_held_out"))
    ids, held_out_ids = (tokenize(tokenizer, [r["text"] for r in parts[n]]) for n in ("noto", "noto_held_out"))
    null_ids = tokenize(tokenizer, [""])
    noise_scheduler = make_scheduler()
    snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)
    weights = snr.clamp(max=5.0) / snr

    unet.to(memory_format=torch.channels_last)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 200, args.unet_steps)
    state = {"unet": unet, "text_encoder": text_encoder, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    first, seconds = resume(args.output_dir / "unet.pt", state)
    batch_size, start, total, curve = 64, time.time() - seconds, 0.0, []
    workers = PartialState()
    own = slice(workers.process_index, None, workers.num_processes)  # of each batch
    for step in range(first, args.unet_steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < 0.1
        index, timesteps, noise, dropped = (drawn[own] for drawn in (index, timesteps, noise, dropped))
        embeddings = text_encoder(torch.where(dropped, null_ids, ids[index])).last_hidden_state
        noisy = noise_scheduler.add_noise(latents[index], noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        errors = (unet(noisy, timesteps, embeddings).sample - noise).square().mean((1, 2, 3))
        loss = (errors * weights[timesteps]).mean()
        update(loss, parameters, optimizer, scheduler, ema, workers.num_processes)
        total += errors.mean().item()
        if not workers.is_main_process:
            continue
        if (step + 1) % 100 == 0:
            seconds = time.time() - start
            print(f"unet {step + 1}/{args.unet_steps} loss {total / 100:.4f} {seconds:.0f} s", flush=True)
            total = 0.0
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == args.unet_steps:
            save_state(args.output_dir / "unet.pt", state, step + 1, time.time() - start)
            ema.store(parameters)
            ema.copy_to(parameters)
            held_out_loss = loss_of_each(unet, text_encoder, held_out_latents, held_out_ids).mean().item()
            train_loss = loss_of_each(unet, text_encoder, latents[:95], ids[:95]).mean().item()
            ema.restore(parameters)
            print(f"unet {step + 1} ema: train {train_loss:.4f} held-out {held_out_loss:.4f}", flush=True)
            curve.append({"step": step + 1, "train": round(train_loss, 4), "held_out": round(held_out_loss, 4)})
            with (args.output_dir / "unet_curve.jsonl").open("a") as file:
                file.write(json.dumps(curve[-1]) + "\n")
    ema.copy_to(parameters)
    unet.to(memory_format=torch.contiguous_format)
    log["unet"] = {
        "unet_parameters": unet.num_parameters(),
        "text_encoder_parameters": text_encoder.num_parameters(),
        "vocabulary": len(tokenizer),
        "steps": args.unet_steps,
        "batch_size": batch_size,
        "images": len(latents),
        "seconds": round(seconds),
        "curve": [json.loads(line) for line in (args.output_dir / "unet_curve.jsonl").open()],
    }
    return unet.eval(), text_encoder.eval(), tokenizer


# 5. Save, read back and measure what was saved


def save_demo(pipe: StableDiffusionPipeline, encoder: ResNetModel, parts: dict[str, list[dict]], folder: Path) -> None:
    """Write the demo folder; weights as fp16, to be loaded as fp32."""
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
    """Images of a [-1, 1] tensor [N, 3, H, W]."""
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def draw_samples(pipe: StableDiffusionPipeline, captions: list[str], path: Path, columns: int = 8) -> None:
    """A grid of generated images, each above its caption; seed = position."""
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
    """Rows of twelve originals, each above the row of their round trips."""
    grid = Image.new("RGB", (12 * (SIZE + 4), len(originals) // 12 * (2 * SIZE + 12)), "white")
    for i, pair in enumerate(zip(originals, round_trips)):
        for j, image in enumerate(pair):
            grid.paste(image, (i % 12 * (SIZE + 4), i // 12 * (2 * SIZE + 12) + j * (SIZE + 2)))
    grid.quantize(128).save(path, optimize=True)


def measure_demo(folder: Path, parts: dict[str, list[dict]]) -> dict:
    """Figures of the saved demo, and its two pictures."""
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


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    workers, threads = PartialState(cpu=True, timeout=timedelta(days=1)), torch.get_num_threads()
    parts = load_data(args.npm_dir, args.seed)
    log = {"seed": args.seed, "processes": workers.num_processes}
    libraries = ("torch", "diffusers", "transformers", "tokenizers", "datasets")
    log["packages"] = {name: version(name) for name in libraries}
    log["images"] = {name: len(rows) for name, rows in parts.items()}

    pixels = to_tensor(parts["noto"] + parts["noto_held_out"] + parts["twemoji"] + parts["fluent_rest"])
    with workers.main_process_first():  # the others find its checkpoints
        torch.set_num_threads(threads * workers.num_processes)
        encoder = train_encoder(pixels, args, log)
        vae = train_vae(pixels, encoder, args, log)
        train_decoder(vae, encoder, pixels, args, log)
        torch.set_num_threads(threads)
    unet, text_encoder, tokenizer = train_unet(parts, vae, args, log)
    if not workers.is_main_process:
        return
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_demo(pipe, encoder, parts, args.demo_dir)
    log["measured"] = measure_demo(args.demo_dir, parts)
    files = [p for p in args.demo_dir.rglob("*") if p.suffix in (".safetensors", ".json", ".parquet", ".png")]
    log["bytes"] = {p.relative_to(args.demo_dir).as_posix(): p.stat().st_size for p in sorted(files)}
    (args.demo_dir / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log["measured"], indent=2))


if __name__ == "__main__":
    main()
