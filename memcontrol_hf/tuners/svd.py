"""The singular value decomposition of a base weight: computed once on a machine, kept in memory and on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from weakref import WeakValueDictionary

import torch
import xxhash
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.weak import WeakIdKeyDictionary

from ..whole_files import check_room, write_whole

logger = logging.getLogger(__name__)

LEAST_KEPT = 128
"""Smallest side of a weight whose factors are kept on disk: those of a smaller one are computed as fast as read."""

_NAMES = ("u", "s", "vh")


class SVDFactors:
    """The reduced singular value decomposition of a weight, flattened to `[out, in * kernel]`.

    It is computed on the CPU in float64 and kept in float32. So the tuned weights agree to float32's last digit on
    every device and at any number of threads; a float32 decomposition would turn close singular vectors differently
    each time. For the same reason a shift means something else for a rounded weight: use an adapter on a base model
    of the dtype that it was trained on, or merge it first.

    Args:
        u: `[out, k]`, with `k = min(out, in * kernel)`.
        s: `[k]`, the singular values, at least 0.
        vh: `[k, in * kernel]`.
    """

    def __init__(self, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> None:
        self.u, self.s, self.vh = u, s, vh

    @classmethod
    def of(cls, weight: torch.Tensor) -> SVDFactors:
        """The factors of a weight of shape `[out, ...]`, of any floating dtype."""
        return cls(*_decomposed(weight))

    def difference(self, delta: torch.Tensor, scale: float, selected: torch.Tensor | None = None) -> torch.Tensor:
        """`U diag(relu(s + scale * delta) - s) V^T`, all zeros at `delta = 0`.

        The formula is that of [SV-DIFF](https://huggingface.co/papers/2303.11305).

        Args:
            delta: `[k]`, the trained shift; `[n]` for `n` selected singular values.
            scale: Its factor.
            selected: `[n]`, numbers of the singular values that are shifted; all by default.

        Returns:
            `[out, in * kernel]`, what is added to the flattened weight.
        """
        if self.u.device != delta.device:
            with torch.inference_mode(False):
                self.u, self.s, self.vh = (factor.to(delta.device) for factor in (self.u, self.s, self.vh))
        shift = delta.float() if scale == 1 else scale * delta.float()
        u, s, vh = self.u, self.s, self.vh
        if selected is not None:
            u, s, vh = u[:, selected], s[selected], vh[selected]
        return (u * (torch.relu(s + shift) - s)) @ vh

    def __deepcopy__(self, memo: dict) -> SVDFactors:
        return self


_FACTORS_BY_CONTENT: WeakValueDictionary[tuple, SVDFactors] = WeakValueDictionary()
_FACTORS_BY_WEIGHT = WeakIdKeyDictionary()  # keeps the factors alive as long as the weight


def svd_factors(weight: torch.Tensor) -> SVDFactors:
    """The factors of a weight, computed once for the same values; in memory they are freed with the weight.

    All adapters, copies of a model and trials of a search that share a base weight share its factors, and other
    processes find those of a large weight on disk. It is the values that are compared, because torch does not count
    changes made through `weight.data`.

    Args:
        weight: A weight of shape `[out, ...]`.
    """
    values = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(values.flatten().view(torch.uint8).numpy()).hexdigest()
    content = (weight.dtype, weight.shape, digest)
    factors = _FACTORS_BY_CONTENT.get(content)
    if factors is None:
        factors = _FACTORS_BY_CONTENT[content] = SVDFactors(*_kept(values, digest))
    _FACTORS_BY_WEIGHT[weight] = factors
    return factors


def _decomposed(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`u`, `s` and `vh` of a weight."""
    # The first call may come from inference mode, whose tensors could not be used in training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        matrix = weight.detach().to("cpu", torch.float64).flatten(1)
        # LAPACK is three times as fast for a tall matrix (7 s, not 21 s, for a 3x3 convolution of 1280 channels).
        wide = matrix.shape[0] < matrix.shape[1]
        u, s, vh = torch.linalg.svd(matrix.T if wide else matrix, full_matrices=False)
        u, vh = (vh.T, u.T) if wide else (u, vh)
        return tuple(factor.float().contiguous() for factor in (u, s, vh))


def decomposition_seconds(shapes: Iterable[tuple[int, int]]) -> float:
    """About how long the decomposition of matrices takes here, from the time of one of 512 x 512.

    LAPACK's time grows as the product of both sides and the smaller side. For the weights of Stable Diffusion 1.5 this
    is right to a third; docs/performance.md has their times.
    """
    side = 512
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    _decomposed(matrix[:64, :64])  # the first call starts LAPACK
    started = time.perf_counter()
    _decomposed(matrix)
    of_one = time.perf_counter() - started
    return of_one * sum(rows * columns * min(rows, columns) for rows, columns in shapes) / side**3


# ---- on disk ----


def factors_folder() -> Path:
    """The folder of the factors on disk: `memcontrol_hf/svd` in the cache of the Hub's libraries (`HF_HOME`)."""
    return Path(os.environ.get("MEMCONTROL_SVD_CACHE") or Path(HF_HOME) / "memcontrol_hf" / "svd")


def _kept(weight: torch.Tensor, digest: str) -> tuple[torch.Tensor, ...]:
    """The factors of a weight from disk, or else computed and put there.

    Processes that need the same factors wait for the first. A disk that is full or cannot be written costs nothing but
    the time that it would have saved.
    """
    if min(weight.shape[0], weight[0].numel()) < LEAST_KEPT:
        return _decomposed(weight)
    kind = str(weight.dtype).removeprefix("torch.")
    file = factors_folder() / f"{digest}-{kind}-{'x'.join(map(str, weight.shape))}.safetensors"
    if (found := _read(file, weight)) is not None:
        return found
    with _alone(file.parent):
        found = _read(file, weight)
        if found is None:
            found = _decomposed(weight)
            _write(file, found)
        return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make other processes wait that compute factors, if the folder can be locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(folder / ".lock", mode=0o600)
        lock.acquire()
    except (OSError, NotImplementedError):
        lock = nullcontext()
    with lock:
        yield


def _write(file: Path, factors: tuple[torch.Tensor, ...]) -> None:
    try:
        content = save(dict(zip(_NAMES, factors)), {"xxh3": _checksum(factors)})
        check_room(file.parent, 2 * len(content), "the decomposition of a weight")
        write_whole(file, content)
    except (OSError, ValueError) as error:
        logger.info(f"{file} is not kept: {error}")


def _read(file: Path, weight: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The factors in a file; `None` when there is none, or one that is damaged."""
    rank = min(weight.shape[0], weight[0].numel())
    shapes = ((weight.shape[0], rank), (rank,), (rank, weight[0].numel()))
    try:
        with torch.inference_mode(False), safe_open(file, "pt") as content:
            factors = tuple(content.get_tensor(name) for name in _NAMES)
            whole = _checksum(factors) == (content.metadata() or {}).get("xxh3")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        whole = False
    if whole and tuple(tuple(factor.shape) for factor in factors) == shapes:
        return factors
    logger.warning(f"{file} is damaged: the decomposition is computed again")
    return None


def _checksum(factors: Iterable[torch.Tensor]) -> str:
    """A checksum of the factors: it tells a damaged file, at a tenth of the time of reading it."""
    digest = xxhash.xxh3_128()
    for factor in factors:
        digest.update(factor.numpy())
    return digest.hexdigest()
