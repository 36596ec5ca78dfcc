"""Matrix product operators: a linear layer as a chain of small tensors (Oseledets 2011; Novikov et al. 2015).

    W[o_1 .. o_n, i_1 .. i_n] ~ sum_a A_1[1, o_1, i_1, a_1] A_2[a_1, o_2, i_2, a_2] .. A_n[.., o_n, i_n, 1]

The cores come from n - 1 singular value decompositions one after the other (TT-SVD), which is exact where
the bonds a_k are large enough, and for two sites the best there is in the Frobenius norm (Van Loan and
Pitsianis 1993). Only scalings that are themselves products of the sites commute with it, so what is known
of the inputs enters in two steps: the weight is decomposed with each column times ``d_j = (E x_j^2)^1/2``,
which is divided out of the inputs again; then the cores are improved in turn with the whole of H
(`compress.passes.solvers.alternating`).

One bond of 1 makes two sites a Kronecker product; sites ``(O, 1), (1, N)`` make them an SVD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.chain import contract
from compress.passes.solvers.alternating import alternate
from compress.passes.solvers.feedback import damped

_DAMPING = 0.01
"""Added to the diagonal of moments, as a fraction of its mean."""

Sites = Sequence[tuple[int, int]]
"""``(o_k, i_k)`` of each."""


def full_bonds(sites: Sites) -> tuple[int, ...]:
    """Bonds with which any weight is exact."""
    sizes = [o * i for o, i in sites]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def parameters(sites: Sites, bonds: Sequence[int]) -> int:
    """Of all cores, ``sum_k a_{k-1} o_k i_k a_k``."""
    links = (1, *bonds, 1)
    return sum(links[k] * o * i * links[k + 1] for k, (o, i) in enumerate(sites))


def cores_of(weight: Tensor, sites: Sites, bond: int) -> list[Tensor]:
    """TT-SVD.

    Args:
        weight: float ``[O, N]``, O and N the products of the sites' sizes.
        sites: ``(o_k, i_k)``.
        bond: of any two neighbours at most.

    Returns:
        cores ``[a_{k-1}, o_k, i_k, a_k]``, float64; all but the last are orthonormal.
    """
    outputs, inputs = zip(*sites, strict=True)
    count = len(sites)
    pairs = [axis for k in range(count) for axis in (k, count + k)]
    rest = weight.double().reshape(*outputs, *inputs).permute(pairs).reshape(1, -1)
    cores = []
    for (o, i), most in zip(sites, full_bonds(sites), strict=False):
        left = len(rest)
        U, values, V = torch.linalg.svd(rest.reshape(left * o * i, -1), full_matrices=False)
        kept = min(bond, most, len(values))
        cores.append(U[:, :kept].reshape(left, o, i, kept))
        rest = values[:kept, None] * V[:kept]
    return [*cores, rest.reshape(len(rest), *sites[-1], 1)]


def matrix_product(
    weight: Tensor, sites: Sites, bond: int, H: Tensor | None = None, *, sweeps: int = 2, iterations: int = 10
) -> tuple[list[Tensor], Tensor | None]:
    """Decompose a linear layer with regard to its inputs.

    Args:
        weight: float ``[O, N]``.
        sites, bond: as for `cores_of`.
        H: float ``[N, N]``, second moments of the inputs.
        sweeps: of improvement over all cores; 0 for none.
        iterations: of conjugate gradients for each.

    Returns:
        cores, and the scale of the inputs ``[N]``, ``1 / d`` (None without H); float64.
    """
    if H is None:
        return cores_of(weight, sites, bond), None
    d = sizes(H)
    return improved(cores_of(weight.double() * d, sites, bond), weight, H, sweeps, iterations), 1 / d


def improved(
    cores: list[Tensor], weight: Tensor, H: Tensor, sweeps: int = 2, iterations: int = 10
) -> list[Tensor]:
    """Cores of ``W d`` after some sweeps with the whole of H; arguments as for `matrix_product`."""
    d = sizes(H)
    # of few samples H knows some directions only, and the others must not be given away
    h = damped((H.double() / (d * d[:, None])).unsqueeze(0), _DAMPING)[0]
    w = weight.double() * d
    return alternate(lambda *c: contract(c), cores, w, h, sweeps=sweeps, iterations=iterations)


def sizes(H: Tensor) -> Tensor:
    """d of the module docstring, float64 ``[N]``.

    An input that the samples hardly have may come all the same, and what is wrong with its column is divided
    by d: hence the damping.
    """
    return damped(H.double().unsqueeze(0), _DAMPING)[0].diagonal().sqrt()


def bond_within(sites: Sites, budget: float, multiple: int = 1) -> int:
    """The largest bond, a multiple of `multiple`, with at most this many parameters; 0 if there is none."""
    most = max(full_bonds(sites))

    def size(bond: int) -> int:
        return parameters(sites, [min(bond, b) for b in full_bonds(sites)])

    low, high = 0, most // multiple
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle * multiple) <= budget else (low, middle - 1)
    return low * multiple


def two_sites(outputs: int, inputs: int) -> list[Sites]:
    """Ways to share a weight between two sites: the first takes most of the output, the second of the input.

    From ``(O / 2, 2), (2, N / 2)``, which as a chain saves operations, to equal ones, which save memory only.
    """
    found: list[Sites] = []
    factor = 2
    while factor * factor <= min(outputs, inputs):
        if outputs % factor == 0 and inputs % factor == 0:
            found.append(((outputs // factor, factor), (factor, inputs // factor)))
        factor *= 2
    return found
