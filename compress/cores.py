"""Matrix product operators for storage: the cores are stored, and contracted to a weight where it is used.

    codes   weight dtype  [entries]  the cores [a_{k-1}, o_k, i_k, a_k], one after the other
    scales  weight dtype  [N]        d, of the columns; None for ones

    W[o_1 .. o_n, i_1 .. i_n] = sum_a A_1[1, o_1, i_1, a_1] A_2[a_1, o_2, i_2, a_2] .. d[i_1 .. i_n]

What multiplies by the weight sees it dense, at dense speed and in dense memory. As layers of its own
(`compress.chain.MatrixProduct`) the same operator saves operations too, where it has few enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.chain import MatrixProduct, contract
from compress.encoding import Encoded


@dataclass(frozen=True)
class CoreEncoding:
    """Sites and bonds of a matrix product operator.

    Args:
        sites: ``(o_k, i_k)`` of each site.
        bonds: ``a_1 .. a_{n-1}``.
    """

    sites: Sequence[Sequence[int]]
    bonds: Sequence[int]

    def __str__(self) -> str:
        bonds = "x".join(map(str, self.bonds))
        return f"mpo {bonds} of {', '.join(f'{o}x{i}' for o, i in self.sites)}, stored"


@dataclass(frozen=True)
class CoreWeight(Encoded):
    """A weight stored as cores (layouts in the module docstring)."""

    trained: ClassVar[str] = "codes"
    encoding: CoreEncoding
    codes: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: Tensor | None = None

    def __str__(self) -> str:
        return str(self.encoding)

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.compress.contract_cores.default

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes} if self.scales is None else {"codes": self.codes, "scales": self.scales}

    def arguments(self, parts: Mapping[str, Any]) -> tuple[Any, ...]:
        sites = [size for site in self.encoding.sites for size in site]
        return (parts["codes"], parts.get("scales"), sites, list(self.encoding.bonds))

    def cores(self) -> list[Tensor]:
        """``[a_{k-1}, o_k, i_k, a_k]`` of each site."""
        return split_cores(self.codes, [n for s in self.encoding.sites for n in s], self.encoding.bonds)

    @classmethod
    def of(cls, chain: MatrixProduct) -> CoreWeight:
        """What a chain of layers stands for."""
        cores = chain.cores()
        codes = torch.cat([core.flatten() for core in cores])
        shape = tuple(math.prod(sizes) for sizes in zip(*chain.sites, strict=True))
        return cls(CoreEncoding(chain.sites, chain.bonds), codes, shape, codes.dtype, chain.scale)


def split_cores(codes: Tensor, sites: Sequence[int], bonds: Sequence[int]) -> list[Tensor]:
    """Cores of a flat tensor; `sites` is ``o_1, i_1, o_2, i_2, ..``."""
    links = (1, *bonds, 1)
    shapes = [(links[k], sites[2 * k], sites[2 * k + 1], links[k + 1]) for k in range(len(sites) // 2)]
    parts = codes.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@torch.library.custom_op("compress::contract_cores", mutates_args=())
def contract_cores(codes: Tensor, scales: Tensor | None, sites: list[int], bonds: list[int]) -> Tensor:
    """Contract cores to a float32 weight ``[O, N]`` (layouts in the module docstring).

    Args:
        codes: float ``[entries]``.
        scales: float ``[N]``, or None for ones.
        sites: ``o_1, i_1, o_2, i_2, ..``.
        bonds: one less than sites.
    """
    weight = contract(split_cores(codes.float(), sites, bonds))
    # clone: a custom op may not return a view of its argument, as a single core is
    return weight.clone() if scales is None else weight * scales.float()


@contract_cores.register_fake
def _(codes: Tensor, scales: Tensor | None, sites: list[int], bonds: list[int]) -> Tensor:
    return codes.new_empty((math.prod(sites[::2]), math.prod(sites[1::2])), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scales, *ctx.layout = inputs
    ctx.save_for_backward(codes, scales)


def _core_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    with torch.enable_grad():
        leaf = codes.detach().requires_grad_()
        weight = contract(split_cores(leaf.float(), *ctx.layout))
        (found,) = torch.autograd.grad(
            weight, leaf, gradient if scales is None else gradient * scales.float()
        )
    return found, None, None, None


contract_cores.register_autograd(_core_gradient, setup_context=_keep)
