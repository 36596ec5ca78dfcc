"""Sparse weights in less room: one bit for each entry says whether it is zero, and the others follow.

The weight is a matrix of rows, as in `compress.encoding`::

    codes   uint8         [O, ceil(N / 8)]  bit n % 8 of byte n // 8 is 1 where the entry is not zero
    values  weight dtype  [entries]         those entries, row after row

That is exact, and ``1/32 + (1 - sparsity)`` of the size in float32: it pays from a sparsity of 3 % on. It is
for storage alone; what multiplies by the weight sees it dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.encoding import Encoded, pack, unpack


@dataclass(frozen=True)
class BitmapEncoding:
    """A bitmap and the entries that are not zero."""

    def nbytes(self, rows: int, columns: int, entries: int, element_size: int = 4) -> int:
        """Exact bytes for ``[rows, columns]`` with this many entries that are not zero, and bytes of each."""
        return rows * math.ceil(columns / 8) + entries * element_size

    def __str__(self) -> str:
        return "bitmap"


@dataclass(frozen=True)
class BitmapWeight(Encoded):
    """A sparse weight (layouts in the module docstring)."""

    trained: ClassVar[str] = "values"
    encoding: BitmapEncoding
    codes: Tensor
    values: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.compress.expand_bitmap.default

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "values": self.values}

    def arguments(self, parts: Mapping[str, Any]) -> tuple[Any, ...]:
        return (parts["codes"], parts["values"], list(self.shape))


def encode_bitmap(weight: Tensor) -> BitmapWeight:
    """Leave the zeros of a weight out.

    Args:
        weight: float ``[O, ...]``. A negative zero becomes a positive one.
    """
    matrix = weight.detach().reshape(weight.shape[0], -1)
    kept = matrix != 0
    return BitmapWeight(
        BitmapEncoding(), pack(kept.byte(), 1), matrix[kept].contiguous(), tuple(weight.shape), weight.dtype
    )


@torch.library.custom_op("compress::expand_bitmap", mutates_args=())
def expand_bitmap(codes: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Decode a bitmap to a float32 weight (layouts in the module docstring).

    Args:
        codes: uint8 ``[O, ceil(N / 8)]``.
        values: float ``[entries]``, as many as there are ones.
        shape: of the result; ``shape[0] == O`` and the rest multiplies to N.
    """
    kept = unpack(codes, 1, math.prod(shape[1:])).bool()
    weight = torch.zeros(kept.shape, dtype=torch.float32, device=codes.device)
    return weight.masked_scatter_(kept, values.float()).view(shape)


@expand_bitmap.register_fake
def _(codes: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    return values.new_empty(shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, values, ctx.shape = inputs
    ctx.dtype = values.dtype
    ctx.save_for_backward(codes)


def _value_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    kept = unpack(codes, 1, math.prod(ctx.shape[1:])).bool()
    return None, gradient.reshape(kept.shape)[kept].to(ctx.dtype), None


expand_bitmap.register_autograd(_value_gradient, setup_context=_keep)
