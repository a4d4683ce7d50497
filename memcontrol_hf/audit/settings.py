"""The settings of an audit, and the constants of its attacks."""

from dataclasses import dataclass

from ..images import Framing

CLIQUE = 3
"""Number of images of one prompt that must be alike to count as an extraction."""

PAPER_THRESHOLD = 20.0
"""Threshold in MemControl's paper for the tile distance of RGB images of 224 pixels; it scales with the side."""

FALSE_ALARMS = 0.01
"""Rate of false alarms at which a threshold is set: the share of held-out images taken for copies or members."""

REFERENCES = 500
"""Largest number of held-out images among which the calibrated extraction looks for neighbours."""

CANARY_TIMESTEPS = 20
"""Number of timesteps at which the loss of a canary is measured, to guess whether it was trained on."""

REVIEWED = 50
"""Number of image pairs on the page for a person to look through."""

BINS = 40
"""Number of bins of the histograms of distances."""

LEAST_IMAGES = {"train": 2, "held_out": 8}
"""Smallest number of different images in each set."""

LEAST_PERSONS = {"train": 2, "held_out": 4}
"""Smallest number of persons in each set, where persons are known."""

_LEAST = {"images_per_prompt": CLIQUE, "num_quality_images": 2}  # fid needs two images
_MAY_BE_ZERO = ("guidance_scale", "embedding_attack", "near_duplicates", "seed")


@dataclass(frozen=True)
class AuditSettings:
    """Settings of an audit.

    Args:
        resolution (`int`):
            Side of the images in pixels.
        num_prompts (`int`):
            Number of training captions from which images are generated; the canaries' captions come first.
        images_per_prompt (`int`):
            Number of images generated from each of these captions; at least 3, the size of a clique.
        num_quality_images (`int`):
            Number of held-out captions from which images are generated to measure the quality, one image for each; at
                least 2.
        inference_steps (`int`):
            Number of sampling steps.
        guidance_scale (`float`):
            Guidance scale of the sampling.
        num_timesteps (`int`):
            Number of fixed timesteps of the denoising-loss attack.
        embedding_attack (`int`):
            Number of training images, and of held-out images, for which an embedding is searched that brings them
            back; at most half of the held-out images, since the others calibrate the distances. The search trains 400
            images for each of them, on the model and for each control; 0 leaves it out.
        fit (`str`), background (`str`):
            How an image becomes a square; see [`~memcontrol_hf.images.Framing`]. A model is attacked with images as it
            was trained on.
        near_duplicates (`float`):
            Threshold of [`~memcontrol_hf.metrics.near_duplicates`]. A held-out image that is nearer to a training
            image is an error; with 0, only equal thumbnails are an error.
        batch_size (`int`):
            Number of images at once; only the speed depends on it.
        seed (`int`):
            Random seed of all draws.

    Raises:
        ValueError: for a number that is too small, and a wrong fit or background.
    """

    resolution: int = 512
    num_prompts: int = 100
    num_quality_images: int = 256
    images_per_prompt: int = 10
    inference_steps: int = 25
    guidance_scale: float = 7.5
    num_timesteps: int = 5
    embedding_attack: int = 0
    fit: str = "crop"
    background: str = "white"
    near_duplicates: float = 0.05
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.framing  # a wrong one is an error
        for name, value in vars(self).items():
            if name in ("fit", "background"):
                continue
            least = {**_LEAST, **dict.fromkeys(_MAY_BE_ZERO, 0)}.get(name, 1)
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")

    @property
    def framing(self) -> Framing:
        """How an image becomes a square."""
        return Framing(self.fit, self.background)


@dataclass(frozen=True)
class Figure:
    """Value of a measure with its 95 % interval. If there is no value, `note` says why it could not be estimated."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str | None = None
