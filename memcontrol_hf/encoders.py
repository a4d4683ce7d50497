"""Image encoders behind one small interface: images `[N, 3, H, W]` in [0, 1] -> features `[N, D]`."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .demo import DEMO_ENCODER


class Encoder(nn.Module):
    """An image encoder with its own preprocessing.

    Args:
        model (`nn.Module`):
            A `transformers` vision model, or any module that maps images to features.
        size (`int`, *optional*):
            Side in pixels that images are resized to; as they are, when not given.
        mean, std (list of `float`):
            Normalization of each channel.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int | None = None,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """Features of images.

        Args:
            images (`torch.Tensor`): `[N, 3, H, W]` in [0, 1].
            batch_size (`int`): only a matter of memory.

        Returns:
            `torch.Tensor`: `[N, D]` in float32 on the CPU.
        """
        if images.ndim != 4:
            raise ValueError(f"images must be [N, 3, H, W], but got {list(images.shape)}")
        return torch.cat([self._features(batch).float().cpu() for batch in images.split(batch_size)])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.mean)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        output = self.model((images - self.mean) / self.std)
        if isinstance(output, torch.Tensor):
            features = output
        else:  # a transformers model: the pooled output, or the class token where there is no pooler
            pooled = output.get("pooler_output")
            features = pooled if pooled is not None else output["last_hidden_state"][:, 0]
        return features.flatten(1)


def load_encoder(encoder: str | nn.Module, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by name.

    Args:
        encoder (`str` or `nn.Module`):
            `"demo"` for the small encoder that ships in the package, a Hub id or folder for
            `transformers.AutoModel` (DINOv2, RAD-DINO, ...), `"xrv:<weights>"` for a DenseNet-121 of torchxrayvision
            (`xrv:densenet121-res224-all`; extra `xrv`), or a module from images in [0, 1] to features.

    Raises:
        ValueError: when the name can be loaded by none of these.
    """
    if isinstance(encoder, Encoder):
        return encoder.to(device)
    if isinstance(encoder, nn.Module):
        return Encoder(encoder).to(device)
    if encoder.startswith("xrv:"):
        return Encoder(_xray_densenet(encoder.removeprefix("xrv:")), 224).to(device)
    from transformers import AutoImageProcessor, AutoModel

    path = str(DEMO_ENCODER) if encoder == "demo" else encoder
    try:
        processor = AutoImageProcessor.from_pretrained(path)
        model = AutoModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot load the image encoder {encoder!r}: {reason} Give 'demo', a folder or a Hub id of a vision "
            "model, or xrv:<weights of torchxrayvision>."
        ) from None
    size = processor.size.get("height") or processor.size.get("shortest_edge")
    if getattr(processor, "crop_size", None) and getattr(processor, "do_center_crop", False):
        size = processor.crop_size["height"]
    loaded = Encoder(model.eval(), size, tuple(processor.image_mean), tuple(processor.image_std))
    try:
        loaded(torch.zeros(1, 3, 32, 32))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{encoder!r} is no vision model, which has features of images alone: {error}") from None
    return loaded.to(device)


class XRayFeatures(nn.Module):
    """The features of a torchxrayvision DenseNet, `[N, 1024]`, of images `[N, 3, 224, 224]` in [0, 1]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # it reads one channel from -1024 to 1024
        return self.model.features2(images.mean(1, keepdim=True) * 2048 - 1024)


def _xray_densenet(weights: str) -> XRayFeatures:
    try:
        from torchxrayvision.models import DenseNet
    except ImportError as error:
        raise ValueError(
            f"the encoder 'xrv:{weights}' needs torchxrayvision and torchvision ({error}): "
            "pip install 'memcontrol_hf[xrv]'"
        ) from None
    try:
        return XRayFeatures(DenseNet(weights=weights))
    except Exception as error:  # it raises a bare Exception for an unknown name, and any for a failed download
        raise ValueError(f"cannot load the image encoder 'xrv:{weights}': {error}") from None


def encoder_name(encoder: str | nn.Module) -> str:
    """What a report calls an encoder; of a local folder only its last part."""
    if isinstance(encoder, nn.Module):
        return type(getattr(encoder, "model", encoder)).__name__
    return Path(encoder).name if Path(encoder).exists() else encoder
