"""Tucker-2 of convolutions: 1x1 into fewer channels, the kernel among those, 1x1 out of them (Kim et al.
2016).

    W[o, c, k] ~ sum_{p, q} L[o, q] K[q, p, k] R[p, c]

It starts from the whitened higher-order SVD and goes on by orthogonal iteration (HOOI, De Lathauwer et al.
2000), both with regard to the layer's inputs, of which the original knows nothing: given R, the best (L, K)
is a whitened SVD of the least-squares target on the reduced inputs, exactly; given those, R descends by
conjugate gradients. With ``r_in = C`` or ``r_out = O`` the factor in question is left out; with the former
it is the SVD of the filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.passes.solvers.alternating import descend
from compress.passes.solvers.feedback import damped
from compress.passes.solvers.low_rank import DAMPING, Spectrum, spectrum


@dataclass(frozen=True)
class Modes:
    """Both sides of a convolution in the order in which they matter.

    Attributes:
        inward: of the input channels.
        outward: of the output channels.
        shape: ``[O, C, *kernel]``.
    """

    inward: Spectrum
    outward: Spectrum
    shape: tuple[int, ...]

    def bound(self, ranks: tuple[int, int]) -> float:
        """Relative squared error at most, were the inputs of all positions of the kernel independent."""
        return self.inward.error(ranks[0]) + self.outward.error(ranks[1])

    def ranks(self, budget: float, multiple: int = 1) -> tuple[int, int] | None:
        """``(r_in, r_out)`` of the least bound within a number of parameters; None where none fits.

        Args:
            budget: parameters.
            multiple: of ranks below the number of channels.
        """
        outputs, channels = self.shape[:2]
        inward, outward = self.inward.errors, self.outward.errors
        best, least = None, math.inf
        for r_in in _ranks(channels, multiple):
            for r_out in _ranks(outputs, multiple):
                pair = (r_in, r_out)
                bound = inward[min(r_in, len(inward) - 1)] + outward[min(r_out, len(outward) - 1)]
                if bound < least and pair != (channels, outputs) and parameters(self.shape, pair) <= budget:
                    best, least = pair, bound
        return best


def _ranks(channels: int, multiple: int) -> list[int]:
    return [*range(multiple, channels, multiple), channels]


def modes(weight: Tensor, H: Tensor | None = None, damping: float = DAMPING) -> Modes:
    """The whitened higher-order SVD.

    Args:
        weight: float ``[O, C, *kernel]``.
        H: float ``[N, N]``, second moments of patches ``(C, *kernel)``.
        damping: of H.
    """
    outputs, channels = weight.shape[:2]
    matrix = weight.reshape(outputs, channels, -1)
    pixels = matrix.shape[2]
    covariance = None
    if H is not None:
        covariance = torch.einsum("ckdk->cd", H.double().view(channels, pixels, channels, pixels))
    unfolded = matrix.permute(0, 2, 1).reshape(-1, channels)
    return Modes(
        spectrum(unfolded, covariance, damping), spectrum(matrix.flatten(1), H, damping), tuple(weight.shape)
    )


def parameters(shape: tuple[int, ...], ranks: tuple[int, int]) -> int:
    """``C r_in + r_in r_out prod(kernel) + r_out O``, without what is left out."""
    (outputs, channels), (r_in, r_out) = shape[:2], ranks
    inward = channels * r_in if r_in < channels else 0
    outward = outputs * r_out if r_out < outputs else 0
    return inward + r_in * r_out * math.prod(shape[2:]) + outward


def tucker2(
    weight: Tensor,
    ranks: tuple[int, int],
    H: Tensor | None = None,
    *,
    start: Modes | None = None,
    sweeps: int = 3,
    iterations: int = 15,
    damping: float = DAMPING,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Decompose a convolution.

    Args:
        weight: float ``[O, C, *kernel]``.
        ranks: ``(r_in, r_out)``; what is more than the rank of the weight is not used.
        H: float ``[N, N]``, second moments of patches ``(C, *kernel)``.
        start: of `modes`, if it is there already.
        sweeps: of alternating improvement.
        iterations: of conjugate gradients in each.
        damping: of H.

    Returns:
        R ``[r_in, C]`` or None, K ``[r_out, r_in, *kernel]``, L ``[O, r_out]`` or None; float64.
    """
    outputs, channels, *kernel = weight.shape
    w = weight.double().reshape(outputs, -1)
    pixels = w.shape[1] // channels
    h = None if H is None else damped(H.double().unsqueeze(0), damping)[0]
    r_in, r_out = ranks
    if r_in >= channels:
        K, L = _outward(w, h, r_out)
        return None, K.view(-1, channels, *kernel), L
    start = start or modes(weight, H, damping)
    R = _orthonormal(start.inward.factors(r_in)[0])
    r_in = len(R)
    for sweep in range(sweeps + 1):
        target, reduced = _reduced(w, h, R, pixels)
        K, L = _outward(target, reduced, r_out)
        if sweep == sweeps:
            break
        tensor = K.view(-1, r_in, pixels)

        def expand(R: Tensor, tensor: Tensor = tensor) -> Tensor:
            return torch.einsum("qpk,pc->qck", tensor, R).flatten(1)

        wanted = w if L is None else L.mT @ w  # L is orthonormal
        R = _orthonormal(descend(expand, R, wanted, h, iterations=iterations))
    return R, K.view(-1, r_in, *kernel), L


def _outward(w: Tensor, h: Tensor | None, rank: int) -> tuple[Tensor, Tensor | None]:
    """K ``[r_out, M]`` and orthonormal L ``[O, r_out]``, the best of this rank; w and None at full rank."""
    if rank >= len(w):
        return w, None
    L = spectrum(w, h, 0.0).basis[:, :rank]
    return L.mT @ w, L


def _reduced(w: Tensor, h: Tensor | None, R: Tensor, pixels: int) -> tuple[Tensor, Tensor | None]:
    """The least-squares target ``[O, r_in k]`` on inputs reduced by R, and their second moments."""
    channels = R.shape[1]
    if h is None:
        return torch.einsum("ock,pc->opk", w.view(-1, channels, pixels), R).flatten(1), None
    half = torch.einsum("ick,pc->ipk", h.view(-1, channels, pixels), R).flatten(1)
    small = torch.einsum("pc,ckj->pkj", R, half.view(channels, pixels, -1)).flatten(0, 1)
    small = (small + small.mT) / 2
    # H is damped, and R orthonormal: never singular, but for rounding
    return torch.linalg.solve(damped(small.unsqueeze(0), 1e-12)[0], (w @ half).mT).mT, small


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT).Q.mT.contiguous()
