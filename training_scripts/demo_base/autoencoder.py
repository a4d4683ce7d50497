"""The autoencoder: 64x64 images to 8x8 latents of mean 0 and standard deviation 1 by channel."""

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.training_utils import EMAModel
from transformers import ResNetModel

from .emoji import SIZE
from .training import Stage

VAE_BATCH, PERCEPTUAL_WEIGHT, KL_WEIGHT = 16, 0.05, 3e-4


def perceptual_distance(encoder: ResNetModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of the encoder's normalized feature maps at its first three resolutions."""
    fx = encoder(x, output_hidden_states=True).hidden_states[:3]
    with torch.no_grad():
        fy = encoder(y, output_hidden_states=True).hidden_states[:3]
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in zip(fx, fy))


def reconstruction_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels, and of two opponent colours at a quarter of the resolution, without which hues come late."""
    red, green, blue = F.avg_pool2d(x - y, 4).unbind(1)
    return (x - y).abs().mean() + (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()


@torch.no_grad()
def start_as_pyramid(vae: AutoencoderKL) -> None:
    """Start with three latent channels that are the mean colours of 8x8 pixels, which the decoder paints smoothly.

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


def make_vae() -> AutoencoderKL:
    """The autoencoder before training."""
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
    return vae


def train_vae(images: torch.Tensor, encoder: ResNetModel, args: argparse.Namespace, log: dict) -> AutoencoderKL:
    """Train the autoencoder by L1, a perceptual term and a little KL.

    Args:
        images: Images `[N, 3, 64, 64]` in [-1, 1].
        encoder: Image encoder of the perceptual term.
        args: The flags of the command.
        log: Gets the entry `vae`.

    Returns:
        The autoencoder, whose latents have mean 0 and standard deviation 1 by channel.
    """
    torch.manual_seed(args.seed)
    vae = make_vae()
    encoder.requires_grad_(False)
    parameters = list(vae.parameters())
    ema = EMAModel(parameters, decay=0.995, foreach=True)
    stage = Stage("vae", {"vae": vae}, parameters, ema, args.vae_steps, 30, args, learning_rate=1.2e-3)
    for step, generator in stage.draws():
        batch = images[torch.randint(len(images), (VAE_BATCH,), generator=generator)]
        batch = batch.to(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        l1 = reconstruction_distance(decoded, batch)
        perceptual = perceptual_distance(encoder, decoded, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        stage.update(l1 + PERCEPTUAL_WEIGHT * perceptual + KL_WEIGHT * kl)
        stage.report(step, 50, l1=l1.item(), perceptual=perceptual.item(), kl=kl.item())
        stage.checkpoint(step)
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
        "seconds": round(stage.seconds),
    }
    return vae


def train_decoder(
    vae: AutoencoderKL, encoder: ResNetModel, images: torch.Tensor, args: argparse.Namespace, log: dict
) -> None:
    """Train the decoder further, alone: the latents stay, so the denoiser does not depend on this stage.

    Args:
        vae: Autoencoder whose decoder is trained, in place.
        encoder: Image encoder of the perceptual term.
        images: Images `[N, 3, 64, 64]` in [-1, 1].
        args: The flags of the command.
        log: Gets the entry `decoder`.
    """
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    ema = EMAModel(parameters, decay=0.998, foreach=True)
    stage = Stage("decoder", {"vae": vae}, parameters, ema, args.decoder_steps, 50, args, learning_rate=1e-3)
    if stage.first < args.decoder_steps:
        with torch.no_grad():
            moments = torch.cat([vae.encode(x).latent_dist.parameters for x in images.split(64)]).contiguous()
    for step, generator in stage.draws():
        index = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        latents = DiagonalGaussianDistribution(moments[index]).sample(generator=generator)
        target = images[index].to(memory_format=torch.channels_last)
        decoded = vae.decode(latents.to(memory_format=torch.channels_last)).sample
        l1, perceptual = reconstruction_distance(decoded, target), perceptual_distance(encoder, decoded, target)
        stage.update(l1 + PERCEPTUAL_WEIGHT * perceptual)
        stage.report(step, 50, l1=l1.item(), perceptual=perceptual.item())
        stage.checkpoint(step)
    ema.copy_to(parameters)
    log["decoder"] = {"steps": args.decoder_steps, "seconds": round(stage.seconds)}


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold a shift and a scale of each latent channel into the two 1x1 convolutions, so that `scaling_factor` is 1."""
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
    """The means of the latents `[N, 12, 8, 8]` of images `[N, 3, 64, 64]` in [-1, 1]."""
    batches = images.contiguous(memory_format=torch.channels_last).split(64)
    return torch.cat([vae.encode(x).latent_dist.mean for x in batches]).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The images `[N, 3, 64, 64]` in [-1, 1] of latents `[N, 12, 8, 8]`."""
    batches = latents.split(64)
    return torch.cat([vae.decode(z).sample for z in batches]).clamp(-1, 1).contiguous()
