"""Anti-memorization guidance, while images are sampled."""

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
    """Chen et al., CVPR 2024 (https://huggingface.co/papers/2404.00922): sampling turns away from training images.

    At each step with classifier-free guidance of the scale `s₀`, `x̂₀` is what the guided prediction takes for the
    clean image, `n` its nearest training image and `σ` their similarity. Where `σ > λ_t`, three terms are added to the
    noise prediction (equations 13 to 17):

    - despecification, away from the prompt: `−s₁ (ε(x_t, y) − ε(x_t, ∅))`, `s₁ = max(min(c₁ σ, s₀ − 1), 0)`;
    - caption deduplication, away from the neighbour's caption `y_n`: `−s₂ (ε(x_t, y_n) − ε(x_t, ∅))`,
      `s₂ = max(min(c₂ σ, s₀ − s₁ − 1), 0)`;
    - dissimilarity: `c₃ √(1 − ᾱ_t) ∇_{x_t} σ`, through the denoiser.

    The paper compares SSCD features of decoded images. Here `σ` is the cosine similarity of latents after the mean
    training latent is taken off: it finds copies, not the same object elsewhere in the picture. The paper's `λ_t` is
    a parabola that it does not give; here `λ_t = threshold · (1 − (t / T)²)`.

    - Cost: for an image and step above the threshold two forward passes with a gradient and one without.
    - Against: copies, by whoever samples this way. It needs the training images' latents at hand.
    - Not against: whoever has the weights, who leaves it out. It changes no weight and no attack on them.

    Args:
        threshold (`float`):
            `λ_0`, between 0 and 1; 0.5 is the paper's.
        c1, c2, c3 (`float`):
            At least 0; 0 leaves a term out. `c₃` has to grow with the number of a latent's values.
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
        """Raise `ValueError` for sampling without classifier-free guidance, on which the mitigation rests."""
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
        """Guide whatever a pipeline samples meanwhile with `denoiser`.

        Args:
            latents (`torch.Tensor`): of the training images, `[N, C, h, w]`.
            embeds (`torch.Tensor`): of their captions, `[N, L, D]`.
            guidance_scale (`float`): `s₀`, that the pipeline samples with; above 1.
        """
        center = latents.mean(0, keepdim=True)
        neighbours = F.normalize((latents - center).flatten(1), dim=1)

        def guide(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple:
            """The pipeline's call, whose batch holds the null conditions and then the prompts."""
            noisy, timestep = args[0].float().chunk(2)[0], args[1]
            conditions = kwargs["encoder_hidden_states"].chunk(2)
            unconditional, conditional = output[0].float().chunk(2)
            device, step, config = noisy.device, int(timestep), family.noise.scheduler.config
            signal, noise = family.noise.coefficients(step)
            limit = self.threshold * (1 - (step / config.num_train_timesteps) ** 2)

            def predict(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
                call = {**kwargs, "encoder_hidden_states": condition.to(args[0].dtype)}
                return module.forward(x.to(args[0].dtype), timestep, **call)[0].float()  # not through this hook

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
                # In the units of the model's own prediction, which where it is the image falls as the noise grows.
                sign = -1 if config.prediction_type == "sample" else 1
                change += sign / family.noise.epsilon_scale(step) * self.c3 * noise * gradient
            conditional = conditional.index_add(0, near, change / guidance_scale)  # the pipeline multiplies it again
            return (torch.cat([unconditional, conditional]).to(output[0].dtype), *output[1:])

        handle = denoiser.register_forward_hook(guide, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
