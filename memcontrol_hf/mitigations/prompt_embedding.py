"""Prompt-embedding adjustment: a mitigation that works while images are sampled."""

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
    """Makes a prompt steer less: Wen et al., ICLR 2024 (https://huggingface.co/papers/2407.21720), section 4.1.

    Before an image is sampled, Adam changes its text embedding `e` to lower `||ε(x_T, T, e) − ε(x_T, T, ∅)||₂`. Adam
    starts from the embedding of the caption and uses the first sampling step and the image's own noise. It ends when
    the norm is at most `target`, or after `iterations` steps. The embedding of the start token is not changed. With a
    target, a prompt whose norm is already at most the target is not changed either.

    - Cost: for each image, up to `iterations` forward and backward passes and one further forward pass.
    - Against: captions that call up their image, when images are sampled with this mitigation.
    - Not against: anybody who has the weights and samples without it. It changes no weight, so attacks on the weights
      succeed as before.

    Args:
        target (`float`, *optional*):
            Norm at which Adam stops, in the units of the metric `noise_norm`; none by default.
        iterations (`int`):
            Largest number of Adam's steps, at least 1; the paper uses 10.
        lr (`float`):
            Learning rate of Adam; the paper uses 0.05.
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
        """The arguments that change in the pipeline's call for `N` prompts.

        Args:
            family ([`~memcontrol_hf.families.StableDiffusionFamily`]): family of the pipeline, with its denoiser.
            prompts (list of `str`): prompts `[N]`.
            generators (list of `torch.Generator`): one generator for each image; the first noise is drawn from it.
            resolution (`int`): side of the images in pixels.
            num_inference_steps (`int`): number of sampling steps.

        Returns:
            `dict`: `prompt_embeds` and `negative_prompt_embeds`, `[N, L, D]`, in the place of `prompt`, and the first
            noise `latents`, `[N, C, h, w]`.
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
        scale = family.noise.epsilon_scale(round(first.item()))  # the norm is of the noise that a prediction implies
        adjusted = embeds.clone().requires_grad_()
        optimizer = torch.optim.Adam([adjusted], lr=self.lr)
        for _ in range(self.iterations):
            with torch.enable_grad():
                norms = scale * steering_norms(prediction(adjusted), unconditional)
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
