"""What a layer may be decomposed into, at a number of parameters, and the decompositions themselves."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.chain import Chain, MatrixProduct, Sliced
from compress.passes.solvers import alds, mpo, separable, tucker
from compress.passes.solvers.low_rank import spectrum

Method = Literal["svd", "alds", "tucker", "tt", "cp", "mpo", "kronecker"]
LARGEST_MPO = 1 << 21
"""Weights of a layer up to which matrix product operators are worth trying among others: the singular values
of many large rearranged matrices take long."""
_SLICES = (2, 3, 4, 5, 6, 8)
"""Numbers of slices that ALDS tries."""


@dataclass(frozen=True)
class Form:
    """A method and its ranks.

    Attributes:
        method: "svd", "alds", "tucker", "tt", "cp", "mpo", or "kronecker", which is mpo with a bond of 1.
        ranks: svd and cp ``(r,)``; alds ``(slices, r)``; tucker ``(r_in, r_out)``; tt ``(p, q, s)``; mpo
            ``(bond,)``.
        sites: of mpo, ``(o_k, i_k)``.
    """

    method: Method
    ranks: tuple[int, ...]
    sites: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        ranks = "x".join(map(str, self.ranks))
        sites = " of " + ", ".join(f"{o}x{i}" for o, i in self.sites) if self.sites else ""
        return f"{self.method} {ranks}{sites}"

    def hollow(self, shape: tuple[int, ...], scaled: bool) -> Chain:
        """The chain in shape alone, on the meta device: what it costs is known before it is made.

        Args:
            shape: of the weight, ``[O, I, *kernel]``.
            scaled: whether mpo scales the inputs.
        """
        outputs, inputs, *kernel = shape
        ones = (1,) * len(kernel)

        def empty(*size: int) -> Tensor:
            return torch.empty(size, device="meta")

        if self.method == "tucker":
            r_in, r_out = self.ranks
            R = empty(r_in, inputs, *ones) if r_in < inputs else None
            L = empty(outputs, r_out, *ones) if r_out < outputs else None
            return self._chain([f for f in (R, empty(r_out, r_in, *kernel), L) if f is not None])
        if self.method in ("tt", "cp"):
            p, q, s = self.ranks * 3 if self.method == "cp" else self.ranks
            height, width = kernel
            one = self.method == "cp"
            inner = [empty(q, 1 if one else p, height, 1), empty(s, 1 if one else q, 1, width)]
            return self._chain([empty(p, inputs, 1, 1), *inner, empty(outputs, s, 1, 1)])
        if self.method in ("mpo", "kronecker"):
            bonds = [min(self.ranks[0], b) for b in mpo.full_bonds(self.sites)]
            links = (1, *bonds, 1)
            cores = [empty(links[k], o, i, links[k + 1]) for k, (o, i) in enumerate(self.sites)]
            return MatrixProduct.of(str(self), cores, empty(inputs) if scaled else None)
        count, rank = (1, *self.ranks) if self.method == "svd" else self.ranks
        slices = [empty(rank, inputs // count, *kernel) for _ in range(count)]
        return self._chain([*slices, empty(outputs, count * rank, *ones)])

    def _chain(self, factors: list[Tensor]) -> Chain:
        if self.method == "cp":
            return Chain(str(self), tuple(factors), (1, *self.ranks, *self.ranks, 1))
        if self.method != "alds":
            return Chain(str(self), tuple(factors))
        *slices, last = factors
        if last.ndim == 2:
            return Sliced(str(self), tuple(factors))
        return Chain(str(self), (torch.cat(slices), last), (len(slices), 1))


class Decomposer:
    """One weight, to be decomposed in several ways; what they have in common is computed once.

    Args:
        weight: float ``[O, I]`` or ``[O, I, *kernel]``, without groups.
        H: float ``[N, N]``, second moments of the inputs; None for none.
    """

    def __init__(self, weight: Tensor, H: Tensor | None = None) -> None:
        self.weight, self.H = weight, H
        self.matrix = weight.reshape(weight.shape[0], -1)
        self._whole = functools.cache(lambda: spectrum(self.matrix, H))
        self._modes = functools.cache(lambda: tucker.modes(weight, H))
        self._slices = functools.cache(lambda count: alds.slices(self.matrix, count, H))
        self._cores = functools.cache(self._full_cores)

    def forms(self, method: Method, budget: float, multiple: int = 1) -> list[Form]:
        """The best form of a method with at most this many parameters, by what it cuts off; none or one.

        Args:
            budget: parameters.
            multiple: ranks are multiples of it, or those of a dense layer.
        """
        (outputs, inputs), columns = self.weight.shape[:2], self.matrix.shape[1]
        if method == "tucker":
            ranks = self._modes().ranks(budget, multiple) if self.weight.ndim > 2 else None
            return [Form("tucker", ranks)] if ranks else []
        if method in ("tt", "cp"):
            if self.weight.ndim != 4 or self.weight[0, 0].numel() == 1:
                return []
            if method == "tt":
                three = separable.train_ranks(self.weight, budget, multiple, self.H)
                return [Form("tt", three)] if three else []
            rank = int(budget / separable.canonical_parameters(self.weight.shape, 1)) // multiple * multiple
            return [Form("cp", (rank,))] if rank else []
        if method in ("mpo", "kronecker"):
            room = budget - (inputs if self.H is not None else 0)
            found = []
            for sites in mpo.two_sites(outputs, inputs) if self.weight.ndim == 2 else ():
                bond = mpo.bond_within(sites, room, multiple if method == "mpo" else 1)
                if bond:
                    found.append(Form(method, (bond if method == "mpo" else 1,), tuple(sites)))
            return sorted(found, key=self._cut_off)[:1]
        if method == "svd":
            rank = _rounded(budget / (outputs + columns), min(outputs, columns), multiple)
            return [Form("svd", (rank,))] if rank else []
        found = []
        for count in _SLICES:
            if inputs % count == 0:
                # k j channels are what the next layer reads
                step = multiple // math.gcd(multiple, count)
                rank = _rounded(budget / (count * outputs + columns), min(outputs, columns // count), step)
                if rank:
                    found.append(Form("alds", (count, rank)))
        return sorted(found, key=self._cut_off)[:1]

    def _cut_off(self, form: Form) -> float:
        if form.method == "alds":
            return self._slices(form.ranks[0]).error(form.ranks[1])
        last = self._cores(form.sites)[1]
        return float(last[form.ranks[0] :].square().sum())

    def _full_cores(self, sites: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """Two cores with all bonds, the first orthonormal, from the strongest bond to the weakest."""
        d = 1.0 if self.H is None else mpo.sizes(self.H)
        return mpo.cores_of(self.matrix.double() * d, sites, max(mpo.full_bonds(sites)))

    def hollow(self, form: Form) -> Chain:
        """What `fit` will give, in shape alone."""
        return form.hollow(tuple(self.weight.shape), self.H is not None)

    def bound(self, form: Form) -> float:
        """Relative error by singular values alone, which tt and cp have not.

        Of ALDS and SVD it is in the spectral norm, as ALDS has it, of the others in that of Frobenius.
        """
        if form.method == "svd":
            energies = self._whole().energies
            total = float(energies[0])
            rank = form.ranks[0]
            return math.sqrt(float(energies[rank]) / total) if total > 0 and rank < len(energies) else 0.0
        if form.method == "alds":
            count, rank = form.ranks
            return self._slices(count).bound(rank)
        if form.method == "tucker":
            return math.sqrt(self._modes().bound((form.ranks[0], form.ranks[1])))
        total = float(self._cores(form.sites)[1].square().sum())
        return math.sqrt(self._cut_off(form) / total) if total > 0 else 0.0

    def fit(self, form: Form, sweeps: int = 3) -> Chain:
        """The decomposition, float64.

        Args:
            form: one of `forms`.
            sweeps: of alternating improvement, where a method has it.
        """
        ones = (1,) * (self.weight.ndim - 2)
        if form.method == "tucker":
            ranks = (form.ranks[0], form.ranks[1])
            R, K, L = tucker.tucker2(self.weight, ranks, self.H, start=self._modes(), sweeps=sweeps)
            R, L = (None if f is None else f.reshape(*f.shape, *ones) for f in (R, L))
            return form._chain([f for f in (R, K, L) if f is not None])
        if form.method == "tt":
            return form._chain(separable.tensor_train(self.weight, form.ranks, self.H, sweeps=sweeps))
        if form.method == "cp":
            return form._chain(separable.canonical(self.weight, form.ranks[0], self.H, sweeps=sweeps))
        if form.method in ("mpo", "kronecker"):
            bond = form.ranks[0]
            first, second = self._cores(form.sites)
            cores = [first[..., :bond], second[:bond]]
            if self.H is None:
                return MatrixProduct.of(str(form), cores)
            cores = mpo.improved(cores, self.matrix, self.H, sweeps)
            return MatrixProduct.of(str(form), cores, 1 / mpo.sizes(self.H))
        if form.method == "svd":
            first, last = self._whole().factors(form.ranks[0])
            parts = [first]
        else:
            parts, last = self._slices(form.ranks[0]).factors(form.ranks[1])
        _, inputs, *kernel = self.weight.shape
        shape = (-1, inputs // len(parts), *kernel)
        return form._chain([*(p.reshape(shape) for p in parts), last.reshape(*last.shape, *ones)])


def _rounded(rank: float, full: int, multiple: int) -> int:
    """The largest multiple within a rank that is less than the full one; 0 if there is none."""
    return min(int(rank), full - 1) // multiple * multiple
