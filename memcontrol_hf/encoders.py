"""Image encoders with one small interface: images `[N, 3, H, W]` in [0, 1] -> features `[N, D]`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image as PILImage
from torch import nn
from torch.nn import functional as F

from .demo import DEMO_ENCODER, demo_dataset
from .error_lines import first_line
from .images import pixel_digest


def _needs_encoder(argument: str, demo: str) -> str:
    return (
        f"images other than the demo's need an {argument}, which says what is alike in them: facebook/dinov2-small "
        "for photographs, microsoft/rad-dino or xrv:densenet121-res224-all for radiographs, owkin/phikon for "
        f"histology. {demo} takes the demo's, which was trained on emoji and sees little in other images"
    )


NEEDS_ENCODER = _needs_encoder("--encoder", "--encoder demo")
"""The error for images without a named encoder, where encoders are named by a flag."""


def named_encoder(encoder: str | nn.Module | None, *sets: Dataset) -> str | nn.Module:
    """The encoder that was named, or without one the demo's, which judges the demo's images alone.

    Args:
        encoder (`str` or `nn.Module`, *optional*): encoder as [`load_encoder`] takes it.
        *sets (`Dataset`): images that the encoder is for: column `image`.

    Raises:
        ValueError: when no encoder is named and an image is none of the demo's.
    """
    if encoder is not None:
        return encoder
    if all(pixel_digest(row["image"]) in _demo_digests() for images in sets for row in images):
        return "demo"
    raise ValueError(_needs_encoder("encoder=", 'encoder="demo"'))


@cache
def _demo_digests() -> frozenset[str]:
    return frozenset(pixel_digest(row["image"]) for images in demo_dataset().values() for row in images)


class Encoder(nn.Module):
    """An image encoder with its own preprocessing.

    Args:
        model (`nn.Module`):
            Vision model of `transformers`, or any module that maps images to features.
        size (`int`, *optional*):
            Side in pixels to which images are resized. Without it images keep their size.
        mean, std (list of `float`):
            Mean and standard deviation by which each channel is normalized.
        processor (`Callable`, *optional*):
            Image processor of `transformers` that comes with the model. It resizes, crops and normalizes the images
            as the model's authors did, in the place of `size`, `mean` and `std`.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int | None = None,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        processor: Callable[..., Any] | None = None,
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.processor = processor
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
        if self.processor is not None:
            output = self.model(_processed(images, self.processor).to(self.mean))
        else:
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


def _processed(images: torch.Tensor, processor: Callable[..., Any]) -> torch.Tensor:
    """The inputs of a model by its image processor, from images `[N, 3, H, W]` in [0, 1].

    The processor resizes images of 8 bits. Images that have its size already are not rounded to 8 bits.
    """
    size, images = processor.size, images.float().cpu()
    if (size.get("height"), size.get("width")) == tuple(images.shape[-2:]):
        as_floats = {"do_resize": False, "do_convert_rgb": False, "rescale_factor": 255 * processor.rescale_factor}
        return processor(list(images.numpy()), return_tensors="pt", **as_floats)["pixel_values"]
    pixels = (255 * images).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return processor([PILImage.fromarray(image) for image in pixels], return_tensors="pt")["pixel_values"]


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
        # by PIL, so that the features are the same whether torchvision is installed or not
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        model = AutoModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(
            f"cannot load the image encoder {encoder!r}: {reason} Give 'demo', a folder or a Hub id of a vision "
            "model, or xrv:<weights of torchxrayvision>."
        ) from None
    loaded = Encoder(model, processor=processor)
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
