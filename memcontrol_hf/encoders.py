"""Image encoders with one small interface: images `[N, 3, H, W]` in [0, 1] -> features `[N, D]`."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .demo import DEMO_ENCODER

NEEDS_ENCODER = (
    "images other than the demo's need an --encoder, which says what is alike in them: facebook/dinov2-small for "
    "photographs, microsoft/rad-dino or xrv:densenet121-res224-all for radiographs, owkin/phikon for histology. "
    "--encoder demo takes the demo's, which was trained on emoji and sees little in other images"
)
"""The error for images without a named encoder."""


class Encoder(nn.Module):
    """An image encoder with its own preprocessing.

    Args:
        model (`nn.Module`):
            Vision model of `transformers`, or any module that maps images to features.
        size (`int`, *optional*):
            Side in pixels to which images are resized. Without it images keep their size.
        mean, std (list of `float`):
            Mean and standard deviation by which each channel is normalized.
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
            images (`torch.Tensor`): images `[N, 3, H, W]` in [0, 1].
            batch_size (`int`): number of images at once; only memory and speed depend on it.

        Returns:
            `torch.Tensor`: features `[N, D]` in float32 on the CPU.

        Raises:
            ValueError: for images of another shape.
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
    """Load an image encoder by its name.

    Args:
        encoder (`str` or `nn.Module`):
            Name of the encoder: `"demo"` for the small encoder that ships in the package, a Hub id or folder for
            `transformers.AutoModel` (DINOv2, RAD-DINO, ...), or `"xrv:<weights>"` for a DenseNet-121 of
            torchxrayvision (`xrv:densenet121-res224-all`; extra `xrv`). A module that maps images in [0, 1] to
            features is wrapped.
        device (`torch.device`):
            Device of the encoder.

    Raises:
        ValueError: when no encoder of this name can be loaded.
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
    """Maps images `[N, 3, 224, 224]` in [0, 1] to the features `[N, 1024]` of a torchxrayvision DenseNet."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # The DenseNet reads one channel with values from -1024 to 1024.
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
    except Exception as error:  # a bare Exception for an unknown name, any kind for a failed download
        raise ValueError(f"cannot load the image encoder 'xrv:{weights}': {error}") from None


def encoder_name(encoder: str | nn.Module) -> str:
    """The name of an encoder in a report. A local folder is named by its last part only."""
    if isinstance(encoder, nn.Module):
        return type(getattr(encoder, "model", encoder)).__name__
    return Path(encoder).name if Path(encoder).exists() else encoder
