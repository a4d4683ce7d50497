"""Prompt-embedding adjustment, while images are sampled."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..families import Family, StableDiffusionFamily, null_like
from ..metrics import steering_norms
from .base import Mitigation, Sampling, check_stable_diffusion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


@dataclass
class PromptEmbedding(Mitigation):
    """Wen et al., ICLR 2024 (https://huggingface.co/papers/2407.21720), section 4.1: the prompt is made to steer less.

    Before an image is sampled, Adam lowers `||ε(x_T, T, e) − ε(x_T, T, ∅)||₂` over the text embedding `e`, from the
    caption's own, at the first step with the image's own noise, until the norm is at most `target` or for `iterations`
    steps. The embedding of the start token is kept. With a target, prompts that steer little are left as they are.

    - Cost: up to `iterations` forward and backward passes of an image, and one forward pass.
    - Against: captions that call up their image, by whoever samples this way.
    - Not against: whoever has the weights, who leaves it out. It changes no weight and no attack on them.

    Args:
        target (`float`, *optional*):
            A norm of the model's prediction, in the units of the metric `noise_norm`; none by default.
        iterations (`int`):
            At least 1; 10 is the paper's.
        lr (`float`):
            Of Adam; 0.05 is the paper's.
    """

    usage = (
        "prompt_embedding[:target], a norm above 0, with iterations=10, a whole number of at least 1, and lr=0.05, a "
        "number above 0"
    )
    guards_weights = False
    target: float | None = None
    iterations: int = 10
    lr: float = 0.05

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}")
        for name in ("target", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}")

    def check(self, family: Family, images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        check_stable_diffusion("prompt_embedding", family)

    def sampling(self, context: Sampling) -> "AbstractContextManager[Callable[..., dict[str, Any]]]":
        return nullcontext(self.inputs)

    def inputs(
        self,
        family: StableDiffusionFamily,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        resolution: int,
        num_inference_steps: int,
    ) -> dict[str, Any]:
        """What changes in the call of a pipeline with `N` prompts.

        Args:
            family: the pipeline's, whose own denoiser is used.
            generators (list of `torch.Generator`): one for each image; its first noise is drawn here.
            resolution (`int`): of the images in pixels.
            num_inference_steps (`int`): of their sampling.

        Returns:
            `dict`: no `prompt`, but `prompt_embeds` and `negative_prompt_embeds`, `[N, L, D]`, and the first noise
            `latents`.
        """
        pipeline, denoiser = family.pipeline, family.denoiser
        side = resolution // pipeline.vae_scale_factor
        shape = (len(prompts), denoiser.config.in_channels, side, side)
        with torch.no_grad():
            condition = family.encode_prompts(prompts)
            embeds, null = (c["prompt_embeds"] for c in (condition, null_like(family.null_condition(), condition)))
        noise = randn_tensor(shape, list(generators), embeds.device, embeds.dtype)
        pipeline.scheduler.set_timesteps(num_inference_steps, device=noise.device)
        first = pipeline.scheduler.timesteps[0]
        noisy = pipeline.scheduler.scale_model_input(noise * pipeline.scheduler.init_noise_sigma, first)

        def prediction(embeds: torch.Tensor) -> torch.Tensor:
            return family.denoise(denoiser, noisy, first, embeds)

        with torch.no_grad():
            unconditional = prediction(null)
        adjusted = embeds.clone().requires_grad_()
        optimizer = torch.optim.Adam([adjusted], lr=self.lr)
        for _ in range(self.iterations):
            with torch.enable_grad():
                norms = steering_norms(prediction(adjusted), unconditional)
                (adjusted.grad,) = torch.autograd.grad(norms.sum(), adjusted)
            reached = norms <= (-math.inf if self.target is None else self.target)
            if reached.all():
                break
            adjusted.grad[:, 0] = 0
            before = adjusted.detach().clone()
            optimizer.step()
            with torch.no_grad():  # an image that has reached the target takes no part in the steps of the others
                adjusted[reached] = before[reached]
        adjusted = adjusted.detach()
        return {"prompt": None, "prompt_embeds": adjusted, "negative_prompt_embeds": null, "latents": noise}
