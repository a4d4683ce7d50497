"""Anti-memorization guidance: a mitigation that works while images are sampled."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..families import Family, StableDiffusionFamily
from .base import Mitigation, Sampling, check_stable_diffusion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


@dataclass
class AntiMemorizationGuidance(Mitigation):
    """Steers sampling away from training images: Chen et al., CVPR 2024 (https://huggingface.co/papers/2404.00922).

    Sampling uses classifier-free guidance with the scale `s₀`. At each step, `x̂₀` is the clean image that the guided
    prediction implies, `n` is the training image nearest to `x̂₀`, and `σ` is the similarity of the two. Where
    `σ > λ_t`, three terms are added to the noise prediction (equations 13 to 17):

    - despecification, away from the prompt: `−s₁ (ε(x_t, y) − ε(x_t, ∅))`, `s₁ = max(min(c₁ σ, s₀ − 1), 0)`;
    - caption deduplication, away from the neighbour's caption `y_n`: `−s₂ (ε(x_t, y_n) − ε(x_t, ∅))`,
      `s₂ = max(min(c₂ σ, s₀ − s₁ − 1), 0)`;
    - dissimilarity: `c₃ √(1 − ᾱ_t) ∇_{x_t} σ`, with a gradient through the denoiser.

    The paper compares SSCD features of decoded images. Here `σ` is the cosine similarity of latents, from which the
    mean training latent has been subtracted. This similarity finds copies of a picture, but not the same object in
    another place of the picture. The paper does not give its parabola `λ_t`; here `λ_t = threshold · (1 − (t / T)²)`.

    - Cost: for each image and step above the threshold, two forward passes with a gradient and one without.
    - Against: copies, when images are sampled with this mitigation. It reads the latents of the training images.
    - Not against: anybody who has the weights and samples without it. It changes no weight, so attacks on the weights
      succeed as before.

    Args:
        threshold (`float`):
            Threshold `λ_0`, between 0 and 1; the paper uses 0.5.
        c1, c2, c3 (`float`):
            Factors of the three terms, at least 0; with 0 a term is left out. `c₃` has to grow with the number of
            values in a latent.
    """

    usage = (
        "anti_memorization_guidance[:threshold=0.5,c1=10,c2=10,c3=100]; threshold is a similarity between 0 and 1, "
        "the others are numbers of at least 0"
    )
    guards_weights = False
    threshold: float = 0.5
    c1: float = 10.0
    c2: float = 10.0
    c3: float = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}")
        for name in ("c1", "c2", "c3"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}")

    def check_arguments(self, args: "TrainingArguments", others: Mapping[str, Mitigation]) -> None:
        """Raise `ValueError` for sampling without classifier-free guidance, which the mitigation needs."""
        if args.eval_guidance_scale <= 1:
            raise ValueError(
                f"anti_memorization_guidance needs a guidance scale above 1, not {args.eval_guidance_scale:g}"
            )

    def check(self, family: Family, images: "Dataset", args: "TrainingArguments", tunes_text: bool) -> None:
        check_stable_diffusion("anti_memorization_guidance", family)

    def sampling(self, context: Sampling) -> AbstractContextManager[None]:
        latents, condition = context.training_latents_and_conditions()
        embeds = condition["prompt_embeds"]
        return self.on(context.family, context.denoiser, latents, embeds, context.guidance_scale)

    @contextmanager
    def on(
        self,
        family: StableDiffusionFamily,
        denoiser: nn.Module,
        latents: torch.Tensor,
        embeds: torch.Tensor,
        guidance_scale: float,
    ) -> Iterator[None]:
        """A context in which every image that a pipeline samples with `denoiser` is guided.

        Args:
            family ([`~memcontrol_hf.families.StableDiffusionFamily`]): family of the pipeline.
            denoiser (`nn.Module`): denoiser that the pipeline calls.
            latents (`torch.Tensor`): latents of the training images, `[N, C, h, w]`.
            embeds (`torch.Tensor`): text embeddings of the training captions, `[N, L, D]`.
            guidance_scale (`float`): guidance scale `s₀` of the sampling, above 1.
        """
        center = latents.mean(0, keepdim=True)
        neighbours = F.normalize((latents - center).flatten(1), dim=1)

        def guide(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple:
            """Change the output of one denoiser call, whose batch holds the null conditions and then the prompts."""
            noisy, timestep = args[0].float().chunk(2)[0], args[1]
            conditions = kwargs["encoder_hidden_states"].chunk(2)
            unconditional, conditional = output[0].float().chunk(2)
            device, step, config = noisy.device, int(timestep), family.noise.scheduler.config
            signal, noise = family.noise.coefficients(step)
            limit = self.threshold * (1 - (step / config.num_train_timesteps) ** 2)

            def predict(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
                call = {**kwargs, "encoder_hidden_states": condition.to(args[0].dtype)}
                return module.forward(x.to(args[0].dtype), timestep, **call)[0].float()  # forward runs no hook

            def similarities(x: torch.Tensor, null: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                guided = null + guidance_scale * (text - null)
                clean = (x - noise * family.noise.to_epsilon(guided, x, step)) / signal
                return F.normalize((clean - center.to(device)).flatten(1), dim=1) @ neighbours.to(device).T

            found, nearest = similarities(noisy, unconditional, conditional).max(1)
            near = (found > limit).nonzero().flatten()
            if not len(near):
                return output
            null, text = unconditional[near], conditional[near]
            scale = found[near].view(-1, 1, 1, 1)
            s1 = (self.c1 * scale).clamp(max=guidance_scale - 1).clamp(min=0)
            s2 = (self.c2 * scale).clamp(max=guidance_scale - s1 - 1).clamp(min=0)
            change = -s1 * (text - null)
            change -= s2 * (predict(noisy[near], embeds[nearest[near].cpu()].to(device)) - null)
            if self.c3:
                with torch.enable_grad():
                    x = noisy[near].detach().requires_grad_()
                    both = similarities(x, *(predict(x, condition[near]) for condition in conditions))
                    to_nearest = both.gather(1, nearest[near][:, None]).sum()
                    (gradient,) = torch.autograd.grad(to_nearest, x)
                # The gradient is added in the units of the model's prediction; a predicted clean image goes down where
                # the predicted noise goes up.
                sign = -1 if config.prediction_type == "sample" else 1
                change += sign / family.noise.epsilon_scale(step) * self.c3 * noise * gradient
            # The pipeline multiplies by the guidance scale again.
            conditional = conditional.index_add(0, near, change / guidance_scale)
            return (torch.cat([unconditional, conditional]).to(output[0].dtype), *output[1:])

        handle = denoiser.register_forward_hook(guide, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
