"""Low rank with regard to the inputs: the matrix of rank r whose outputs differ least (whitened SVD).

With ``H = E[x x^T]`` the error of a new weight B is ``E |W x - B x|^2 = |(W - B) H^1/2|^2`` (Frobenius), so
the best B of rank r comes from the singular value decomposition ``W H^1/2 = U S V^T`` cut off after r
values, and its error is the sum of the squares of those cut off (Eckart and Young 1936; SVD-LLM, arXiv
2403.07378, has it with a Cholesky factor in place of the root). As ``U_r S_r V_r^T = U_r U_r^T
W H^1/2``, B is

    B = U_r (U_r^T W)

the projection of the outputs on their r principal components: no root has to be inverted, and U are
eigenvectors of ``W H W^T``. Where the inputs of the original network were others, W is the least-squares
target for the inputs at hand (`compress.passes.solvers.targets`), for which the same holds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.passes.solvers.feedback import damped

DAMPING = 0.01
"""Added to the diagonal of H, as a fraction of its mean: what the samples never did still counts a little."""


@dataclass(frozen=True)
class Spectrum:
    """A weight in the order in which its outputs matter.

    Attributes:
        weight: float64 ``[O, N]``.
        basis: float64 ``[O, K]``, orthonormal directions of the output, K = min(O, N).
        energies: float64 ``[K]``, mean squares of the output along them, falling.
    """

    weight: Tensor
    basis: Tensor
    energies: Tensor

    @functools.cached_property
    def errors(self) -> list[float]:
        """``E |W x - B x|^2`` of the best B of each rank from 0 to K, relative to ``E |W x|^2``."""
        left = self.energies.flip(0).cumsum(0).flip(0)
        return [*(left / left[0].clamp_min(1e-300)).tolist(), 0.0]

    def error(self, rank: int) -> float:
        """Of one rank; 0 from K on."""
        return self.errors[min(rank, len(self.energies))]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``[r, N]`` and ``[O, r]``, in the order they are applied; rows of one and columns of the other of
        equal length, as ``S^1/2`` in both makes them without data.
        """
        left = self.basis[:, :rank]
        right = left.mT @ self.weight
        size = right.norm(dim=1).clamp_min(1e-30).sqrt()
        return right / size.unsqueeze(1), left * size

    @property
    def stable_rank(self) -> float:
        """``|W|_F^2 / sigma_1^2``."""
        return float(self.energies.sum() / self.energies[0].clamp_min(1e-300))

    @property
    def effective_rank(self) -> float:
        """``exp(- sum p log p)``, p the singular values as fractions of their sum (Roy and Vetterli 2007)."""
        values = self.energies.sqrt()
        p = values / values.sum().clamp_min(1e-300)
        return math.exp(-float((p * p.clamp_min(1e-300).log()).sum()))


def spectrum(weight: Tensor, H: Tensor | None = None, damping: float = DAMPING) -> Spectrum:
    """The whitened singular values of a weight; the plain ones without H.

    Args:
        weight: float ``[O, N]``.
        H: float ``[N, N]``, second moments of the inputs.
        damping: of H.
    """
    w = weight.double()
    if H is not None:
        H = damped(H.double().unsqueeze(0), damping)[0]
    if len(w) <= w.shape[1]:
        energies, basis = torch.linalg.eigh(w @ (w if H is None else w @ H).mT)
        return Spectrum(w, basis.flip(1), energies.flip(0).clamp_min(0))
    basis, values, _ = torch.linalg.svd(w if H is None else w @ root(H), full_matrices=False)
    return Spectrum(w, basis, values.square())


def root(H: Tensor) -> Tensor:
    """A square root R of H, ``R R^T = H``; what is negative by rounding counts as zero."""
    values, vectors = torch.linalg.eigh(H)
    return vectors * values.clamp_min(0).sqrt()


def refit_last(
    weight: Tensor, first: Tensor, last: Tensor, H: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """The best last factor for a given first one: ``L = W H F^T (F H F^T)^-1``, with a pull towards `last`.

    Args:
        weight: float ``[O, N]``.
        first: ``[r, N]``, e.g. block-diagonal, or quantized.
        last: ``[O, r]``, as it was.
        H: float ``[N, N]``; None for the identity.
        damping: of ``F H F^T``.

    Returns:
        ``[O, r]``, float64.
    """
    w, f, start = weight.double(), first.double(), last.double()
    g = f if H is None else f @ H.double()
    A = damped((g @ f.mT).unsqueeze(0), damping)[0]
    step = (w - start @ f) @ g.mT
    lower, failed = torch.linalg.cholesky_ex(A)
    if bool(failed):
        return start
    return start + torch.cholesky_solve(step.mT, lower).mT


def parameters(outputs: int, inputs: int, rank: int) -> int:
    """Of both factors; a rank of ``outputs * inputs / (outputs + inputs)`` is where they break even."""
    return rank * (outputs + inputs)
