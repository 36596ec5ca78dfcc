"""Layers to try solvers on: weights, inputs of the original and of a slightly different network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.encoding import IntEncoding
from compress.passes.solvers.grids import IntegerGrid, columns_of
from compress.passes.solvers.scales import search_scales


@dataclass(frozen=True)
class Problem:
    """weight ``[O, N]``, inputs ``x, x_tilde`` ``[groups, m, N]``, float64."""

    weight: Tensor
    x: Tensor
    x_tilde: Tensor

    @property
    def H(self) -> Tensor:  # noqa: N802
        return self.x_tilde.mT @ self.x_tilde / self.x.shape[1]

    @property
    def G(self) -> Tensor:  # noqa: N802
        return self.x_tilde.mT @ self.x / self.x.shape[1]

    def grid(self, bits: int = 4, group: int = -1, symmetric: bool = True) -> IntegerGrid:
        encoding = IntEncoding(bits, group, symmetric)
        found = search_scales(self.weight, None, encoding)
        groups, dtype = self.x.shape[0], self.weight.dtype
        return IntegerGrid.of(found.scales, found.zero_points, encoding, self.weight.shape[1], groups, dtype)

    def error(self, values: Tensor) -> float:
        """``E |w x - q x~|^2``, summed over rows, on the samples themselves."""
        groups = self.x.shape[0]
        w, q = (t.double().view(groups, -1, t.shape[1]) for t in (self.weight, values))
        return float((self.x @ w.mT - self.x_tilde @ q.mT).square().sum() / self.x.shape[1])


def problem(
    seed: int = 0, rows: int = 6, columns: int = 40, samples: int = 200, groups: int = 1,
    change: float = 0.0, decay: float = 0.7,
) -> Problem:  # fmt: skip
    """Inputs whose covariance falls like ``k^-decay`` in a random basis; `rows` in each group."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = torch.arange(1, columns + 1, dtype=torch.float64).pow(-decay).unsqueeze(1) * noise(columns, columns)
    x = noise(groups, samples, columns) @ mix
    return Problem(noise(groups * rows, columns), x, x + change * noise(groups, samples, columns) @ mix)


def nearest(problem: Problem, grid: IntegerGrid) -> Tensor:
    """Plain rounding on a grid, ``[O, N]``."""
    w = columns_of(problem.weight, problem.x.shape[0])
    return torch.stack([grid.nearest(w[:, t], t) for t in range(w.shape[1])], 1).mT.flatten(0, 1)
