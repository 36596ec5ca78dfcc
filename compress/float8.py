"""Float8 encoding: weights as 8-bit floats (E4M3), with one scale for each row.

E4M3 (Micikevicius et al. 2022, arXiv 2209.05433, table 1) has a sign, 4 bits of exponent and 3 of mantissa,
no infinities, and ends at 448; it is ``torch.float8_e4m3fn`` and ONNX FLOAT8E4M3FN. Its steps grow with the
value, so small weights beside large ones keep their three digits::

    codes   uint8   [O, N]   the bits of E4M3 numbers; N = product of the other dimensions, torch order
    scales  float32 [O, 1]   positive

    weight[o, n] = e4m3(code[o, n]) * scale[o]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.encoding import Encoded

LARGEST = 448.0
"""The largest E4M3 number."""


def to_float8(values: Tensor) -> Tensor:
    """The nearest E4M3 numbers, ties to even, as ``torch.float8_e4m3fn``; beyond the largest, the largest.

    Args:
        values: float, any shape.
    """
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def float8_steps(values: Tensor) -> Tensor:
    """From E4M3 numbers to the next larger ones: ``2^(e - 3)`` with e the exponent, -6 at least.

    Args:
        values: float, not negative.
    """
    exponent = torch.frexp(values.clamp(min=2.0**-6)).exponent - 1
    return torch.ldexp(torch.ones_like(values), exponent - 3)


@dataclass(frozen=True)
class Float8Encoding:
    """E4M3 numbers with one scale for each row."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of codes and float32 scales for ``[rows, columns]``."""
        return rows * (columns + 4)

    def __str__(self) -> str:
        return "fp8 per row"


@dataclass(frozen=True)
class Float8Weight(Encoded):
    """A weight of E4M3 numbers and scales (layouts in the module docstring)."""

    encoding: Float8Encoding
    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.compress.dequantize_float8.default

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def arguments(self, parts: Mapping[str, Any]) -> tuple[Any, ...]:
        return (parts["codes"], parts["scales"], list(self.shape))


def encode_float8(values: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Float8Weight:
    """Pack what a solver found.

    Args:
        values: float ``[O, N]``, in units of the scales; rounded to E4M3.
        scales: float32 ``[O, 1]``, positive.
        shape, dtype: of the weight they stand for.
    """
    codes = to_float8(values.float()).view(torch.uint8).contiguous()
    return Float8Weight(Float8Encoding(), codes, scales.float().contiguous(), shape, dtype)


@torch.library.custom_op("compress::dequantize_float8", mutates_args=())
def dequantize_float8(codes: Tensor, scales: Tensor, shape: list[int]) -> Tensor:
    """Decode E4M3 numbers to a float32 weight (layouts in the module docstring).

    Args:
        codes: uint8 ``[O, N]``.
        scales: float32 ``[O, 1]``.
        shape: of the result; ``shape[0] == O`` and the rest multiplies to N.
    """
    return (codes.view(torch.float8_e4m3fn).float() * scales).reshape(shape)


@dequantize_float8.register_fake
def _(codes: Tensor, scales: Tensor, shape: list[int]) -> Tensor:
    return scales.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, _, ctx.shape = inputs
    ctx.save_for_backward(codes)


def _scale_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    # the weight is linear in the scales, so what scales of one decode to is its derivative
    units = codes.view(torch.float8_e4m3fn).float()
    return None, (gradient.reshape(len(codes), math.prod(ctx.shape[1:])) * units).sum(1, keepdim=True), None


dequantize_float8.register_autograd(_scale_gradient, setup_context=_keep)
