"""The measures, as functions of tensors. No result depends on the batch size or on the global random state."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from scipy.optimize import brentq
from scipy.stats import mannwhitneyu, norm
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_roc
from torchmetrics.image.fid import FrechetInceptionDistance

from ..diffusion import StableDiffusionFamily, predict, seeded_generator


def _check_features(**sets: torch.Tensor) -> None:
    widths = set()
    for name, features in sets.items():
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"{name}: features must be [N, D] with N > 0, but got {list(features.shape)}")
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features).all(1)).sum())
            raise ValueError(f"{name}: {bad} of {len(features)} rows of features are not finite")
        widths.add(features.shape[1])
    if len(widths) > 1:
        raise ValueError(f"features of different widths: {sorted(widths)}; use one encoder for all sets")


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Cosine distance of each query to its nearest reference.

    Args:
        queries (`torch.Tensor`): features `[M, D]`.
        references (`torch.Tensor`): features `[N, D]`.
        chunk (`int`): references compared at once; bounds the memory.

    Returns:
        `torch.Tensor`: `[M]`, in [0, 2]; 0 for a copy.

    Raises:
        ValueError: for empty, non-finite or mismatched features.
    """
    _check_features(queries=queries, references=references)
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_full((len(queries),), -1.0)
    for part in references.split(chunk):
        best = torch.maximum(best, (queries @ F.normalize(part.float(), dim=1).T).amax(1))
    return (1 - best).clamp(0, 2)


def amd(generated: torch.Tensor, train: torch.Tensor) -> float:
    """Average minimum distance: the mean cosine distance of generated images to the nearest training image.

    As in MemControl (https://huggingface.co/papers/2405.19458). Higher is safer; it means little without the same
    distance to as many held-out images of the same domain beside it.

    Args:
        generated (`torch.Tensor`): features `[M, D]`.
        train (`torch.Tensor`): features `[N, D]`.

    Returns:
        `float`: in [0, 2].
    """
    return nearest_distances(generated, train).mean().item()


def fid(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (https://huggingface.co/papers/1706.08500).

    Biased upwards for small sets: compare figures only at equal numbers of images, and have more images than features.

    Args:
        generated (`torch.Tensor`): features `[M, D]`, M > 1.
        real (`torch.Tensor`): features `[N, D]`, N > 1.

    Returns:
        `float`: 0 for equal sets, unbounded above.
    """
    _check_features(generated=generated, real=real)
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < 2:
            raise ValueError(f"{name}: a Fréchet distance needs at least 2 images, but got {len(features)}")
        if len(features) <= features.shape[1]:
            warnings.warn(
                f"fid of {len(features)} {name} images in {features.shape[1]} features is unstable: use more images",
                stacklevel=2,
            )
    identity = nn.Identity()
    identity.num_features = real.shape[1]
    # Each process holds all of the features: summing them over the processes would count them several times.
    metric = FrechetInceptionDistance(feature=identity, sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, metric.compute().item())


@dataclass(frozen=True)
class MembershipResult:
    """How well an attack tells members from non-members.

    Args:
        auc (`float`):
            Area under the ROC curve: .5 is chance, 1 finds every member.
        interval (`tuple[float, float]`):
            Of `auc`, at 95 %.
        members, nonmembers (`int`):
            How many scores of each.
    """

    auc: float
    interval: tuple[float, float]
    members: int
    nonmembers: int
    fpr: torch.Tensor
    tpr: torch.Tensor

    def tpr_at_fpr(self, fpr: float) -> float:
        """The share of members found at a false-positive rate of at most `fpr`.

        NaN where it cannot be estimated: with fewer than `1 / fpr` non-members.
        """
        if not 0 < fpr < 1:
            raise ValueError(f"fpr must lie between 0 and 1, but got {fpr}")
        if self.nonmembers * fpr < 1:
            return math.nan
        return self.tpr[self.fpr <= fpr].max().item()


def membership(member_scores: torch.Tensor, nonmember_scores: torch.Tensor) -> MembershipResult:
    """Judge a membership inference attack by its scores.

    Args:
        member_scores (`torch.Tensor`): `[M]`, of images that were trained on; higher = more member-like.
        nonmember_scores (`torch.Tensor`): `[N]`, of held-out images of the same domain.

    Returns:
        [`MembershipResult`]: AUC with its 95 % score interval (Newcombe 2006, method 5, which keeps a width at
        AUC 0 and 1), and the ROC curve.

    Raises:
        ValueError: when a set has no score, or one that is not finite.
    """
    member_scores, nonmember_scores = (torch.as_tensor(s).double().cpu() for s in (member_scores, nonmember_scores))
    for name, scores in (("member_scores", member_scores), ("nonmember_scores", nonmember_scores)):
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"{name}: must be [N] with N > 0, but got {list(scores.shape)}")
        if not torch.isfinite(scores).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(scores)).sum())} of {len(scores)} are not finite")
    auc = mannwhitneyu(member_scores, nonmember_scores).statistic.item() / (len(member_scores) * len(nonmember_scores))
    # Ranks in [0, 1]: torchmetrics takes scores as logits unless all lie there. Ties stay ties.
    ranks = torch.unique(torch.cat([member_scores, nonmember_scores]), return_inverse=True)[1].double()
    ranks = ranks / ranks.max().clamp(min=1)
    labels = torch.cat([torch.ones(len(member_scores)), torch.zeros(len(nonmember_scores))]).int()
    fpr, tpr, _ = binary_roc(ranks, labels)
    interval = _auc_interval(auc, len(member_scores), len(nonmember_scores))
    return MembershipResult(auc, interval, len(member_scores), len(nonmember_scores), fpr, tpr)


def _auc_interval(auc: float, members: int, nonmembers: int, level: float = 0.95) -> tuple[float, float]:
    """Where the observed AUC lies within z standard errors of the true one (Newcombe, Stat. Med. 2006, 25:559)."""
    z = norm.ppf((1 + level) / 2)
    mean_size = (members + nonmembers) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) / (members * nonmembers)
        variance *= 1 + mean_size * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(auc - theta) - z * math.sqrt(variance)

    # 0 and 1 themselves are roots without a meaning: stay off them.
    low = 0.0 if auc <= 0 else brentq(excess, 0.0, min(auc, 1 - 1e-9))
    high = 1.0 if auc >= 1 else brentq(excess, max(auc, 1e-9), 1.0)
    return low, high


def _noise(seed: int | tuple[int, ...], shape: Sequence[int], count: int) -> torch.Tensor:
    key = (seed,) if isinstance(seed, int) else seed
    return torch.randn((count, *shape), generator=seeded_generator(*key))


def _check_seeds(latents: torch.Tensor, seeds: Sequence) -> None:
    if len(seeds) != len(latents):
        raise ValueError(f"{len(latents)} images but {len(seeds)} seeds: give one for each image")


@torch.no_grad()
def denoising_losses(
    family: StableDiffusionFamily,
    denoiser: nn.Module,
    latents: torch.Tensor,
    embeds: torch.Tensor,
    timesteps: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
) -> torch.Tensor:
    """The unweighted denoising loss of each image at fixed timesteps under its own fixed noise.

    Its negative mean over the timesteps is the score of the loss-threshold membership attack
    (https://huggingface.co/papers/2302.01316).

    Args:
        family: the pipeline's family (`memcontrol_hf.diffusion.family_of`).
        denoiser (`nn.Module`): as the family calls it.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeds (`torch.Tensor`): `[N, L, D]`.
        timesteps (list of `int`): `T` of them.
        seeds (list of `int` or tuples): one for each image.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU.
    """
    _check_seeds(latents, seeds)
    device = next(denoiser.parameters()).device
    rows = []
    for start in range(0, len(latents), batch_size):
        batch = slice(start, start + batch_size)
        x, c = latents[batch].to(device), embeds[batch].to(device)
        noise = torch.stack([_noise(seed, x.shape[1:], len(timesteps)) for seed in seeds[batch]]).to(device)
        columns = [
            family.losses(denoiser, x, c, torch.full((len(x),), t, device=device), noise[:, k])
            for k, t in enumerate(timesteps)
        ]
        rows.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(rows)


def steering_norms(conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of the difference of two noise predictions `[N, ...]`, for each image: `[N]`."""
    return (conditional - unconditional).float().flatten(1).norm(dim=1)


@torch.no_grad()
def noise_norm(
    unet: nn.Module,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    null_embedding: torch.Tensor,
    scheduler: SchedulerMixin,
    timesteps: Sequence[int],
    seeds: Sequence[int | tuple[int, ...]],
    batch_size: int = 64,
) -> torch.Tensor:
    """How hard the text alone steers: the norm of the conditional minus the unconditional prediction.

    `||ε(x_t, t, c) − ε(x_t, t, ∅)||₂` of Wen et al. (https://huggingface.co/papers/2407.21720), on noised latents, at
    fixed timesteps and with one generator for each image.

    Args:
        unet (`nn.Module`): called as `unet(x, t, encoder_hidden_states=...)`.
        latents (`torch.Tensor`): `[N, C, h, w]`.
        embeddings (`torch.Tensor`): text embeddings `[N, L, D]`.
        null_embedding (`torch.Tensor`): of the empty prompt, `[L, D]` or `[1, L, D]`.
        scheduler: with `add_noise`.
        timesteps (list of `int`): `T` of them.
        seeds (list of `int` or tuples): one for each image.
        batch_size (`int`): only a matter of speed.

    Returns:
        `torch.Tensor`: `[N, T]` on the CPU, ≥ 0.
    """
    _check_seeds(latents, seeds)
    device = next(unet.parameters()).device
    null = null_embedding.reshape(1, *embeddings.shape[1:]).to(device)
    rows = []
    for start in range(0, len(latents), batch_size):
        batch = slice(start, start + batch_size)
        x, c = latents[batch].to(device), embeddings[batch].to(device)
        noise = torch.stack([_noise(seed, x.shape[1:], len(timesteps)) for seed in seeds[batch]]).to(device)
        both = torch.cat([c, null.expand_as(c)])
        columns = []
        for k, t in enumerate(timesteps):
            steps = torch.full((2 * len(x),), t, device=device)
            twice = noise[:, k].repeat(2, 1, 1, 1)
            conditional, unconditional = predict(unet, scheduler, x.repeat(2, 1, 1, 1), both, steps, twice).chunk(2)
            columns.append(steering_norms(conditional, unconditional))
        rows.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(rows)
