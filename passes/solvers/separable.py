"""Convolutions with one factor for each axis of the kernel: CP and tensor trains.

CP (Lebedev et al. 2015, arXiv 1412.6553) is a sum of R products of vectors: 1x1 into R channels, a column
and a row of the kernel on each channel by itself, 1x1 out. A tensor train lets the channels mix on the way:

    CP  W[o, c, i, j] ~ sum_r A[r, c] B[r, i] D[r, j] E[o, r]
    TT  W[o, c, i, j] ~ sum_{p, q, s} A[p, c] B[q, p, i] D[s, q, j] E[o, s]

TT starts from TT-SVD of the weight with whitened channels, CP from noise, as it has no closed form, and
both are improved in turn with regard to the layer's inputs. CP has no best approximation at some ranks, and
loses to the others without training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.passes.solvers.alternating import alternate
from compress.passes.solvers.feedback import damped
from compress.passes.solvers.low_rank import DAMPING

_FIRST = 15
"""Sweeps of CP over the weight itself, before the inputs are looked at."""


def tensor_train(
    weight: Tensor, ranks: Sequence[int], H: Tensor | None = None, *, sweeps: int = 3
) -> list[Tensor]:
    """Decompose a convolution into a chain of four.

    Args:
        weight: float ``[O, C, h, w]``.
        ranks: ``(p, q, s)``, see `useful`.
        H: float ``[N, N]``, second moments of patches ``(C, h, w)``.
        sweeps: of alternating improvement.

    Returns:
        ``[p, C, 1, 1], [q, p, h, 1], [s, q, 1, w], [O, s, 1, 1]``, float64.
    """
    channels, height, width = weight.shape[1:]
    scale = _channel_root(weight, H)
    rest = torch.einsum("ocij,cd->dijo", weight.double(), scale).reshape(channels, -1)
    cores = []
    for size, rank in zip((channels, height, width), ranks, strict=True):
        left = len(rest) // size
        U, values, V = torch.linalg.svd(rest, full_matrices=False)
        cores.append(U[:, :rank].reshape(left, size, -1))
        rest = values[:rank, None] * V[:rank]
        if len(cores) < 3:
            rest = rest.reshape(len(rest) * (height, width)[len(cores) - 1], -1)
    A = torch.linalg.solve(scale, cores[0][0]).mT
    factors = [A, cores[1].permute(2, 0, 1), cores[2].permute(2, 0, 1), rest.mT]
    found = _improved("pc,qpi,sqj,os->ocij", factors, weight, H, sweeps)
    return _four(found)


def canonical(
    weight: Tensor, rank: int, H: Tensor | None = None, *, sweeps: int = 3, seed: int = 0
) -> list[Tensor]:
    """CP decomposition of a convolution into a chain of four, the middle two one channel at a time.

    Args:
        weight, H, sweeps: as for `tensor_train`.
        rank: R.
        seed: of the noise it begins with.

    Returns:
        ``[R, C, 1, 1], [R, 1, h, 1], [R, 1, 1, w], [O, R, 1, 1]``, float64; all of a component of one size.
    """
    outputs, channels, height, width = weight.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, channels), (rank, height), (rank, width), (outputs, rank))
    factors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    form = "rc,ri,rj,or->ocij"
    factors = _improved(form, factors, weight, None, _FIRST)
    A, B, D, E = _improved(form, factors, weight, H, sweeps)
    sizes = torch.stack([A.norm(dim=1), B.norm(dim=1), D.norm(dim=1), E.norm(dim=0)]).clamp_min(1e-30)
    even = sizes.log().mean(0).exp() / sizes
    A, B, D, E = A * even[0, :, None], B * even[1, :, None], D * even[2, :, None], E * even[3]
    return _four([A, B[:, None], D[:, None], E])


def useful(shape: Sequence[int]) -> tuple[int, int, int]:
    """Ranks ``(p, q, s)`` with which any weight is exact."""
    outputs, channels, height, width = shape
    p = min(channels, height * width * outputs)
    q = min(p * height, width * outputs)
    return p, q, min(q * width, outputs)


def train_parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """``C p + p q h + q s w + s O``."""
    outputs, channels, height, width = shape
    p, q, s = ranks
    return channels * p + p * q * height + q * s * width + s * outputs


def canonical_parameters(shape: Sequence[int], rank: int) -> int:
    """``R (C + h + w + O)``."""
    return rank * sum(shape)


def train_ranks(
    weight: Tensor, budget: float, multiple: int = 1, H: Tensor | None = None
) -> tuple[int, int, int] | None:
    """The ranks that cut off the same fraction of energy at each place, as small as the budget allows.

    Args:
        weight, H: as for `tensor_train`.
        budget: parameters.
        multiple: of each rank below what is `useful`.
    """
    channels, height, width = weight.shape[1:]
    tensor = torch.einsum("ocij,cd->dijo", weight.double(), _channel_root(weight, H))
    cuts = [tensor.reshape(rows, -1) for rows in (channels, channels * height, channels * height * width)]
    left = []
    for cut in cuts:
        energies = torch.linalg.svdvals(cut).square()
        left.append((energies.flip(0).cumsum(0).flip(0) / energies.sum().clamp_min(1e-300)).tolist())

    def at(fraction: float) -> tuple[int, int, int]:
        found = []
        for energies, most in zip(left, useful(weight.shape), strict=True):
            rank = max(1, sum(e > fraction for e in energies))
            found.append(min(-(-rank // multiple) * multiple, most))
        p, q, s = found
        q = min(q, p * height)
        return p, q, min(s, q * width)

    fractions = sorted({0.0, *(e for energies in left for e in energies)})
    low, high = -1, len(fractions)
    while high - low > 1:
        middle = (low + high) // 2
        fits = train_parameters(weight.shape, at(fractions[middle])) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return at(fractions[high]) if high < len(fractions) else None


def _channel_root(weight: Tensor, H: Tensor | None) -> Tensor:
    """A symmetric root of the input channels' covariance, summed over the kernel; invertible."""
    channels = weight.shape[1]
    if H is None:
        return torch.eye(channels, dtype=torch.float64)
    pixels = weight[0, 0].numel()
    covariance = torch.einsum("ckdk->cd", H.double().view(channels, pixels, channels, pixels))
    values, vectors = torch.linalg.eigh(damped(covariance.unsqueeze(0), DAMPING)[0])
    return vectors * values.clamp_min(1e-300).sqrt() @ vectors.mT


def _improved(
    form: str, factors: Sequence[Tensor], weight: Tensor, H: Tensor | None, sweeps: int
) -> list[Tensor]:
    matrix = weight.double().flatten(1)
    h = None if H is None else damped(H.double().unsqueeze(0), DAMPING)[0]

    def contract(*parts: Tensor) -> Tensor:
        return torch.einsum(form, *parts).flatten(1)

    return alternate(contract, factors, matrix, h, sweeps=sweeps)


def _four(factors: Sequence[Tensor]) -> list[Tensor]:
    A, B, D, E = factors
    return [A[..., None, None], B[..., None], D[..., None, :], E[..., None, None]]
