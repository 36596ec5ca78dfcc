"""ALDS: low rank in slices, and ranks of all layers at once (Liebenwein et al. 2021, arXiv 2107.11442).

The inputs of a layer are cut into k equal slices, ``W = [W_1 .. W_k]``, and every slice gets the same rank
j: a grouped layer of k j outputs, then a dense one. By Eckart and Young the relative error in the spectral
norm is bounded by ``eps = sqrt(k) max_i sigma_{j+1}(W_i) / sigma_1(W)`` (the authors' code leaves the root
out, which lets slices seem better than they are). Over a network the largest eps of a
layer is made as small as a budget allows. The authors alternate between a common eps and the
k of each layer, from many random starts; but for a given eps the cheapest (k, j) of one layer does not
depend on the others, so the best of all choices is found by bisection alone (`minimax`).

Here singular values may be whitened, ``W_i H_ii^1/2``, and once the slices have their directions the dense
layer is refitted to all of them together, which sees what the slices have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.passes.solvers.low_rank import DAMPING, Spectrum, refit_last, spectrum


@dataclass(frozen=True)
class Slices:
    """Slices of a weight, each in the order in which its outputs matter.

    Attributes:
        spectra: of ``W_1 .. W_k``.
        largest: ``sigma_1(W)^2``, of the whole.
        weight: float64 ``[O, N]``.
        H: float ``[N, N]`` or None.
    """

    spectra: tuple[Spectrum, ...]
    largest: float
    weight: Tensor
    H: Tensor | None

    def bound(self, rank: int) -> float:
        """eps of the module docstring; 0 at full rank."""
        left = [float(s.energies[rank]) if rank < len(s.energies) else 0.0 for s in self.spectra]
        return (len(left) * max(left) / self.largest) ** 0.5 if self.largest > 0 else 0.0

    def error(self, rank: int) -> float:
        """What is cut off of all slices, relative to what they have, were they independent."""
        total = sum(float(s.energies.sum()) for s in self.spectra)
        left = sum(float(s.energies[rank:].sum()) for s in self.spectra)
        return left / total if total > 0 else 0.0

    def factors(self, rank: int) -> tuple[list[Tensor], Tensor]:
        """``[j, N / k]`` for each slice, and ``[O, k j]``."""
        first, last = zip(*(s.factors(rank) for s in self.spectra), strict=True)
        joined = torch.cat(last, 1)
        if len(first) > 1:
            joined = refit_last(self.weight, torch.block_diag(*first), joined, self.H)
        return list(first), joined


def slices(weight: Tensor, count: int, H: Tensor | None = None, damping: float = DAMPING) -> Slices:
    """Cut a weight into slices.

    Args:
        weight: float ``[O, N]``.
        count: k, a divisor of N; of a convolution of its input channels.
        H: float ``[N, N]``, second moments of the inputs.
        damping: of H.
    """
    width = weight.shape[1] // count
    spans = [slice(i * width, (i + 1) * width) for i in range(count)]
    parts = tuple(spectrum(weight[:, s], None if H is None else H[s, s], damping) for s in spans)
    whole = parts[0] if count == 1 else spectrum(weight, H, damping)
    return Slices(parts, float(whole.energies[0]), weight.double(), H)


def parameters(outputs: int, inputs: int, count: int, rank: int) -> int:
    """Of the slices, ``j N``, and of the dense layer, ``k j O``."""
    return rank * (count * outputs + inputs)


def minimax(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> tuple[int, ...]:
    """The options whose largest error is as small as the budget allows; of those, the cheapest of each item.

    Args:
        errors, costs: of each option of each item.
        budget: for the summed costs.

    Returns:
        index of the option of each item.

    Raises:
        ValueError: even the cheapest options exceed the budget.
    """

    def cheapest(limit: float) -> tuple[int, ...] | None:
        choice = []
        for row, prices in zip(errors, costs, strict=True):
            allowed = [o for o, error in enumerate(row) if error <= limit]
            if not allowed:
                return None
            choice.append(min(allowed, key=lambda o: (prices[o], row[o])))
        total = sum(prices[o] for prices, o in zip(costs, choice, strict=True))
        return tuple(choice) if total <= budget else None

    limits = sorted({error for row in errors for error in row})
    found = cheapest(limits[-1]) if limits else ()
    if found is None:
        least = sum(min(prices) for prices in costs)
        raise ValueError(f"the cheapest options cost {least:g}, the budget is {budget:g}")
    low, high = -1, len(limits) - 1
    while high - low > 1:
        middle = (low + high) // 2
        better = cheapest(limits[middle])
        if better is None:
            low = middle
        else:
            found, high = better, middle
    return found
