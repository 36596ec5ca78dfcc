"""Chains: the smaller layers that stand in place of one whose weight has been decomposed.

A chain is data: the weights of its layers, and how they follow one another. `compress.layers` puts it into a
graph, as ordinary operators, so that every factor is a weight like any other and later passes work on it.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """Layers one after the other: ``W_n ( ... W_2 (W_1 x))``, all linear, or all convolutions.

    Stride, padding and dilation of a convolution along an axis of its kernel go with the factor that is
    longer than 1 there; no two may be. Where none is, they go with the first.

    Attributes:
        form: what it is, in the field's words, e.g. "svd 32", "tucker 16x24".
        factors: weights in the order they are applied, float ``[O_i, I_i / groups_i, *kernel]``.
        groups: of each convolution; empty for 1 everywhere.
    """

    form: str
    factors: tuple[Tensor, ...]
    groups: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.form

    def decode(self) -> Tensor:
        """The weight it stands for, ``[O, I, *kernel]``."""
        groups = self.groups or (1,) * len(self.factors)
        dense = [ungrouped(f, g) for f, g in zip(self.factors, groups, strict=True)]
        return functools.reduce(lambda t, f: torch.einsum("oi...,ic...->oc...", f, t), dense)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, the factors first."""
        return self.factors

    @property
    def parameters(self) -> int:
        """Number of all that is stored."""
        return sum(t.numel() for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def to(self, dtype: torch.dtype) -> Chain:
        return replace(self, factors=tuple(f.to(dtype).contiguous() for f in self.factors))

    def on_disk(self) -> Self:
        """The same with its factors in files, mapped into memory, that go when the chain goes."""
        return replace(self, factors=tuple(map(_on_disk, self.factors)))


def _on_disk(tensor: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory(prefix="compress-chain-", ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "factor")
        mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.copy_(tensor.flatten()).view(tensor.shape)  # a file without a name lasts while it is mapped


@dataclass(frozen=True)
class Sliced(Chain):
    """Linear layers on equal slices of the input, then one on what all of them give.

    Attributes:
        factors: ``[j, N / k]`` for each of the k slices, then ``[O, k j]``.
    """

    def decode(self) -> Tensor:
        *slices, last = self.factors
        return last @ torch.block_diag(*slices)


@dataclass(frozen=True)
class MatrixProduct(Chain):
    """A linear layer as a matrix product operator: input and output are tensors with one axis for each site.

    ``W[o_1 .. o_n, i_1 .. i_n] = sum_a A_1[1, o_1, i_1, a_1] A_2[a_1, o_2, i_2, a_2] .. d[i_1 .. i_n]``

    Attributes:
        factors: in the order they are applied. Going from the first site to the last, that of site k is
            ``[o_k a_k, a_{k-1} i_k]``; from the last to the first ``[a_{k-1} o_k, i_k a_k]``.
        sites: ``(o_k, i_k)`` of each site.
        bonds: ``a_1 .. a_{n-1}``.
        scale: float ``[N]``, d; None for ones.
        backwards: from the last site to the first.
    """

    sites: tuple[tuple[int, int], ...] = ()
    bonds: tuple[int, ...] = ()
    scale: Tensor | None = None
    backwards: bool = False

    def cores(self) -> list[Tensor]:
        """``[a_{k-1}, o_k, i_k, a_k]`` of each site, from the first to the last."""
        bonds = (1, *self.bonds, 1)
        cores = []
        for k, (o, i) in enumerate(self.sites):
            left, right = bonds[k], bonds[k + 1]
            if self.backwards:
                cores.append(self.factors[-1 - k].view(left, o, i, right))
            else:
                cores.append(self.factors[k].view(o, right, left, i).permute(2, 0, 3, 1))
        return cores

    def decode(self) -> Tensor:
        dense = contract(self.cores())
        return dense if self.scale is None else dense * self.scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.factors if self.scale is None else (*self.factors, self.scale)

    def to(self, dtype: torch.dtype) -> Chain:
        scale = None if self.scale is None else self.scale.to(dtype)
        return replace(self, factors=tuple(f.to(dtype).contiguous() for f in self.factors), scale=scale)

    @classmethod
    def of(cls, form: str, cores: Sequence[Tensor], scale: Tensor | None = None) -> MatrixProduct:
        """From cores ``[a_{k-1}, o_k, i_k, a_k]``, in the direction that takes fewer operations."""
        sites = tuple((int(c.shape[1]), int(c.shape[2])) for c in cores)
        bonds = tuple(int(c.shape[3]) for c in cores[:-1])
        forwards, backwards = operations(sites, bonds)
        if backwards < forwards:
            factors = [c.reshape(c.shape[0] * c.shape[1], -1) for c in reversed(cores)]
        else:
            factors = [c.permute(1, 3, 0, 2).reshape(c.shape[1] * c.shape[3], -1) for c in cores]
        return cls(form, tuple(factors), (), sites, bonds, scale, backwards < forwards)


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix ``[o_1 .. o_n, i_1 .. i_n]`` of cores ``[a_{k-1}, o_k, i_k, a_k]``."""
    found = cores[0][0]  # [O so far, I so far, a]
    for core in cores[1:]:
        joined = torch.einsum("xya,aoib->xoyib", found, core)
        found = joined.flatten(2, 3).flatten(0, 1)
    return found[..., 0]


def operations(sites: Sequence[tuple[int, int]], bonds: Sequence[int]) -> tuple[int, int]:
    """Multiplications of one row by a chain of cores, from the first site to the last, and the other way."""
    both = []
    for order in (1, -1):
        pairs, links, total = sites[::order], (1, *bonds[::order], 1), 0
        for k, (o, i) in enumerate(pairs):
            done = math.prod(o for o, _ in pairs[:k])
            left = math.prod(i for _, i in pairs[k + 1 :])
            total += done * left * links[k] * i * o * links[k + 1]
        both.append(total)
    return both[0], both[1]


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The same convolution without groups: ``[O, I / groups, *kernel]`` -> ``[O, I, *kernel]``."""
    if groups == 1:
        return weight
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], columns * groups, *weight.shape[2:])
    for g in range(groups):
        full[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = weight[g * rows : (g + 1) * rows]
    return full
