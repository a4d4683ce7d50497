"""Base-anchored spectral filtering: what an adapter changes far from the main directions of its base is removed."""

from collections.abc import Callable, Mapping

import torch

from ..tuners.svd import svd_factors

PRINCIPAL_ENERGY = 0.9
"""Share of a base weight's squared singular values that the directions of its principal subspace hold."""

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_WITHOUT_CHANNELS = ("lora_A.bias", "lora_B.bias", "memcontrol_bias", "memcontrol_gamma")


def filter_channels(
    tensors: Mapping[str, torch.Tensor], weight_of: Callable[[str], torch.Tensor], fraction: float
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Remove from each matrix of an adapter the channels that are aligned least with the base weight.

    Base-Anchored Filtering (https://huggingface.co/papers/2605.10439) divides the change `Δ` of a weight `W` into its
    spectral channels `σ_i u_i v_iᵀ`, keeps those that are aligned with the principal subspace of `W`, and suppresses
    the others as likely carriers of memorized images. The paper's abstract was read, not its formulas. The following
    is this package's own reading: `Δ = Σ σ_i u_i v_iᵀ` is the singular value decomposition; the principal subspace is
    spanned by the first `k` left and right singular vectors of `W`, with the smallest `k` that holds
    `PRINCIPAL_ENERGY` of the squared singular values; the alignment of a channel is `‖U_kᵀ u_i‖² · ‖V_kᵀ v_i‖²`, in
    [0, 1]; and a channel is kept as it is or removed as a whole.

    A LoRA keeps its rank: the factors that are not needed any more are 0. In SV-DIFF the channels are those of `W`
    itself, so the shifts of its smallest singular values are removed. Biases, norms and output scales have no
    channels and stay as they are.

    Args:
        tensors (`dict`): tensors of the adapter, by their names in its file.
        weight_of (`Callable`): function from the name of a module to its weight in the base, `[out, ...]`. It is not
            called for SV-DIFF.
        fraction (`float`): share of the channels of each matrix that is removed, in (0, 1), rounded to whole channels.

    Returns:
        the filtered tensors, the number of channels that were removed, and the number of all channels.

    Raises:
        ValueError: for a tensor of a kind of which no channels are known, and for an adapter that changes no matrix
            or whose matrices have too few channels for the fraction.
    """
    filtered, removed, channels = dict(tensors), 0, 0
    for name, tensor in tensors.items():
        first = next((pair for pair in _PAIRS if name.endswith(pair[0])), None)
        if first is not None:
            other = name.removesuffix(first[0]) + first[1]
            module = _module(name, first[0])
            pair, gone, count = _filtered_pair(tensor, tensors[other], weight_of(module), module, fraction)
            filtered[name], filtered[other] = pair
        elif name.endswith("memcontrol_delta"):
            count = len(tensor)
            gone = round(fraction * count)
            filtered[name] = torch.cat([tensor[: count - gone], torch.zeros_like(tensor[count - gone :])])
        elif name.endswith("memcontrol_weight") and tensor.ndim > 1:
            module = _module(name, "memcontrol_weight")
            u, s, vh = torch.linalg.svd(tensor.double().flatten(1), full_matrices=False)
            keep = _kept(u, vh, weight_of(module), module, fraction)
            filtered[name] = ((u * (s * keep)) @ vh).view_as(tensor).to(tensor)
            gone, count = int((~keep).sum()), len(s)
        elif name.endswith((*_WITHOUT_CHANNELS, "memcontrol_weight", *(pair[1] for pair in _PAIRS))):
            continue
        else:
            raise ValueError(
                f"the adapter has a tensor {name!r}, of which no channels are known: leave --spectral out"
            )
        removed, channels = removed + gone, channels + count
    if not channels:
        raise ValueError("the adapter changes no matrix, so there are no channels to filter: use --shrink or --drop")
    if not removed:
        raise ValueError(f"--spectral {fraction:g} of the channels of each matrix is less than one: give a larger one")
    return filtered, removed, channels


def _module(name: str, end: str) -> str:
    """The module of a tensor of an adapter."""
    return name.removeprefix("base_model.model.").removesuffix(f".{end}")


def _filtered_pair(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, module: str, fraction: float
) -> tuple[tuple[torch.Tensor, torch.Tensor], int, int]:
    """The factors `A` `[r, in, ...]` and `B` `[out, r, ...]` of a LoRA without some channels of `B A`."""
    right, left = a.double().flatten(1), b.double().flatten(1)
    if tuple(weight.flatten(1).shape) == (right.shape[1], len(left)) != (len(left), right.shape[1]):
        weight = weight.T  # an embedding's weight is [num, dim]
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)  # of r × r numbers, not of the product
    u, vh = q_left @ u, vh @ q_right.T
    keep = _kept(u, vh, weight, module, fraction)
    root, count = (s * keep).sqrt(), len(s)
    new_a, new_b = torch.zeros_like(right), torch.zeros_like(left)
    new_a[:count], new_b[:, :count] = root[:, None] * vh, u * root
    return (new_a.view_as(a).to(a), new_b.view_as(b).to(b)), int((~keep).sum()), count


def _kept(u: torch.Tensor, vh: torch.Tensor, weight: torch.Tensor, module: str, fraction: float) -> torch.Tensor:
    """Which channels `u` `[out, n]`, `vh` `[n, in]` are kept: those that are aligned best with the weight, `[n]`."""
    if tuple(weight.flatten(1).shape) != (len(u), vh.shape[1]):
        raise ValueError(
            f"the adapter's change of {module!r} is {len(u)} × {vh.shape[1]}, but the base's weight is "
            f"{' × '.join(map(str, weight.flatten(1).shape))}: give the adapter's own base with --pipeline"
        )
    base = svd_factors(weight)
    energy = base.s.double().square().cumsum(0)
    k = int((energy < PRINCIPAL_ENERGY * energy[-1]).sum()) + 1
    left = (base.u[:, :k].double().T @ u).square().sum(0)
    right = (base.vh[:k].double() @ vh.T).square().sum(0)
    keep = torch.ones(u.shape[1], dtype=torch.bool)
    keep[torch.argsort(left * right, stable=True)[: round(fraction * len(keep))]] = False
    return keep
