"""Attacks on a denoiser or on its images. No result depends on the batch size or on the global random state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import networkx
import torch
from diffusers import SchedulerMixin
from scipy.optimize import brentq
from scipy.stats import binomtest, mannwhitneyu, norm
from torch import nn
from torchmetrics.functional.classification import binary_roc

from ..diffusion import StableDiffusionFamily, predict, seeded_generator


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
    (https://huggingface.co/papers/2301.09956).

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


TILES = 4
"""Tiles along each side of an image in the extraction attack."""


@dataclass(frozen=True)
class ExtractionResult:
    """What the extraction attack found, prompt by prompt.

    Args:
        memorized (`torch.Tensor`): bool `[P]`: the images of the prompt hold a large enough clique.
        extracted (`torch.Tensor`): bool `[P]`: and a member of such a clique is as close to the training image.
        rate (`float`): the share of prompts that are extracted.
        interval (`tuple[float, float]`): of the rate, Clopper-Pearson at 95 %.
    """

    memorized: torch.Tensor
    extracted: torch.Tensor
    rate: float
    interval: tuple[float, float]


def tile_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pairwise distance of images: the largest Euclidean distance over 4 x 4 tiles at the same place.

    Of Carlini et al. (https://huggingface.co/papers/2301.13188), without their division by the number of values.

    Args:
        a (`torch.Tensor`): images `[M, C, H, W]`; H and W multiples of 4.
        b (`torch.Tensor`): images `[N, C, H, W]`.

    Returns:
        `torch.Tensor`: `[M, N]`.
    """
    return torch.cdist(_tiles(a), _tiles(b)).amax(0)


def _tiles(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` -> tiles `[16, N, C * H / 4 * W / 4]`."""
    n, c, h, w = images.shape
    tiles = images.reshape(n, c, TILES, h // TILES, TILES, w // TILES)
    return tiles.permute(2, 4, 0, 1, 3, 5).reshape(TILES * TILES, n, -1)


def extraction(
    generated: torch.Tensor, train: torch.Tensor, threshold: float = 20.0, clique_size: int = 3
) -> ExtractionResult:
    """The extraction attack of Carlini et al. 2023 (https://huggingface.co/papers/2301.13188).

    Two images of one prompt are joined when their tile distance is at most the threshold. The prompt counts as
    memorized when `clique_size` images are all joined with each other, and as extracted when a member of such a clique
    is also within the threshold of the training image.

    Args:
        generated (`torch.Tensor`): images in [0, 1], `[P, K, C, H, W]`: K for each of P prompts.
        train (`torch.Tensor`): the prompts' training images in [0, 1], `[P, C, H, W]`.
        threshold (`float`): of the tile distance; 20 is MemControl's for RGB at 224 px, and it scales with the side.
        clique_size (`int`): at least 2.

    Returns:
        [`ExtractionResult`]

    Raises:
        ValueError: for shapes that do not fit, fewer images than a clique needs, values outside [0, 1], and a side
            that 4 does not divide.
    """
    if generated.ndim != 5 or train.ndim != 4 or generated.shape[2:] != train.shape[1:]:
        raise ValueError(
            f"generated must be [P, K, C, H, W] and train [P, C, H, W], but got {list(generated.shape)} and "
            f"{list(train.shape)}"
        )
    if len(generated) != len(train) or len(train) == 0:
        raise ValueError(f"{len(generated)} prompts but {len(train)} training images: give one for each, at least one")
    if clique_size < 2 or generated.shape[1] < clique_size:
        raise ValueError(
            f"cliques of {clique_size} need {max(2, clique_size)} images or more of each prompt, but there are "
            f"{generated.shape[1]}; the smallest clique is 2"
        )
    if generated.shape[-1] % TILES or generated.shape[-2] % TILES:
        raise ValueError(f"images of {list(generated.shape[-2:])} pixels cannot be cut into {TILES} x {TILES} tiles")
    for name, images in (("generated", generated), ("train", train)):
        if not (images.min() >= 0 and images.max() <= 1):  # so that NaN is refused too
            raise ValueError(f"{name}: images must lie in [0, 1], but reach {images.min():.4g} to {images.max():.4g}")
    memorized, extracted = [], []
    for images, original in zip(generated.float(), train.float()):
        joined = tile_distances(images, images) <= threshold
        near = (tile_distances(images, original[None])[:, 0] <= threshold).tolist()
        graph = networkx.from_numpy_array(joined.fill_diagonal_(False).cpu().numpy())
        members = {node for node in graph if _in_clique(graph, node, clique_size)}
        memorized.append(bool(members))
        extracted.append(any(near[node] for node in members))
    found = sum(extracted)
    interval = binomtest(found, len(train)).proportion_ci(method="exact")
    return ExtractionResult(
        torch.tensor(memorized), torch.tensor(extracted), found / len(train), (interval.low, interval.high)
    )


def _in_clique(graph: networkx.Graph, node: int, size: int) -> bool:
    """Whether a node belongs to a clique of at least `size`: its neighbours hold one of `size - 1`."""
    neighbours = graph.subgraph(graph[node])
    return any(len(clique) >= size - 1 for clique in networkx.find_cliques(neighbours))
