"""Quantized activations: how a rounded activation stands in the graph, and what it is on the target.

Three operators say "from here on this value has 8 bits"; all return float32, on the grid of these 8 bits,
so a graph that holds them runs anywhere and computes what the kernels of the target compute up to the order
of summation::

    compress::fake_quantize(x, scale, zero_point)    integers, range known from calibration (static)
    compress::fake_quantize_dynamic(x)               integers, range of this very call (dynamic)
    compress::fake_quantize_float8(x, scale)         floats (E4M3), range known from calibration

The integers are uint8. A symmetric signed one, as TensorRT wants, is the same numbers with the zero point
128: ``int8 code = uint8 code - 128``; so one calibrated graph serves both.

All follow ONNX to the bit: ``QuantizeLinear`` (``saturate(round_half_even(x / scale) + zero_point)``) and
``DynamicQuantizeLinear`` (the range always holds zero; ``scale = (max - min) / 255``); of floats
``saturate(round_half_even(x / scale))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from compress.float8 import LARGEST, to_float8

LEVELS = 256
"""Codes of an activation, 0 to 255."""

SYMMETRIC_ZERO = 128
"""The zero point of the symmetric form."""


PAIR_LIMIT = 128
"""Largest sum of the magnitudes of two neighbouring int8 codes of one sign that a 16-bit accumulator takes:
255 * 128 < 2^15 <= 255 * 129. See `saturates`."""


def pairs_of(codes: Tensor) -> Tensor:
    """Neighbours (0, 1), (2, 3), ...: ``[O, N]`` -> ``[O, ceil(N / 2), 2]``, an odd last one beside zero."""
    return torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))


def saturates(codes: Tensor) -> Tensor:
    """Which rows of an int8 weight can overflow on processors without VNNI; bool ``[O]``.

    These add two neighbouring products with uint8 activations in 16 bits, with saturation
    (``vpmaddubsw``; Intel oneDNN developer guide, "Nuances of int8 computations").

    Args:
        codes: signed integers ``[O, N]`` in the kernel's order of summation (`summation_order`).
    """
    pairs = pairs_of(codes.long())
    over = pairs.clamp(min=0).sum(-1) > PAIR_LIMIT
    under = pairs.clamp(max=0).sum(-1) < -PAIR_LIMIT
    return (over | under).any(1)


def summation_order(shape: Sequence[int]) -> Tensor:
    """The columns of ``weight.flatten(1)`` as integer kernels sum them: channels last; int64 ``[N]``.

    Args:
        shape: of the weight, ``[O, C, *kernel]``.
    """
    columns = math.prod(shape[1:])
    return torch.arange(columns).view(shape[1], -1).t().flatten()


@dataclass(frozen=True)
class Grid:
    """Where the 8-bit codes of an activation lie: ``value = (code - zero_point) * scale``.

    Attributes:
        scale: positive, representable in float32.
        zero_point: 0 to 255; 128 is the symmetric form.
    """

    scale: float
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float, *, symmetric: bool = False) -> Grid:
        """The grid over a range, widened to hold zero exactly.

        >>> Grid.of(0.0, 255.0)
        Grid(scale=1.0, zero_point=0)
        >>> Grid.of(-1.0, 0.5, symmetric=True).zero_point
        128
        """
        low, high = min(low, 0.0), max(high, 0.0)
        # 127 steps on either side if symmetric; code 0 (int8 -128) stays free, as TensorRT leaves it
        scale = max(-low, high) / 127 if symmetric else (high - low) / (LEVELS - 1)
        # subnormal steps have no digits left to be steps of
        scale = max(scale, torch.finfo(torch.float32).tiny) if scale > 0 else 1.0
        scale = float(torch.tensor(scale))
        return cls(scale, SYMMETRIC_ZERO if symmetric else round(-low / scale))

    @property
    def low(self) -> float:
        """The smallest value on the grid."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest value on the grid."""
        return (LEVELS - 1 - self.zero_point) * self.scale


@dataclass(frozen=True)
class Rounding:
    """How activations are rounded to 8 bits: what a pass says it may leave (`Pass.leaves`).

    Attributes:
        static: on ranges known beforehand, from calibration; else on those of each call.
        symmetric: static zero points are all 128.
        float8: to floats (E4M3) instead of integers.
    """

    static: bool
    symmetric: bool = False
    float8: bool = False

    def __str__(self) -> str:
        if self.float8:
            return "static fp8 activations"
        if not self.static:
            return "dynamic 8-bit activations"
        return f"static 8-bit activations{'' if self.symmetric else ' with zero points'}"


@torch.library.custom_op("compress::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Round to uint8 and back on a known grid; ONNX ``QuantizeLinear`` -> ``DequantizeLinear``.

    Args:
        x: float32, any shape.
        scale, zero_point: of a `Grid`.

    Returns:
        float32, the shape of `x`.
    """
    return _round(x, torch.tensor(scale), torch.tensor(float(zero_point)))


@torch.library.custom_op("compress::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """Round to uint8 and back on the range of `x` itself; ONNX ``DynamicQuantizeLinear`` and back.

    Args:
        x: float32, any shape; one range for the whole tensor.

    Returns:
        float32, the shape of `x`.
    """
    if not x.numel():
        return x.clone()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / (LEVELS - 1)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    return _round(x, scale, torch.round((-low / scale).clamp(0, LEVELS - 1)))


@torch.library.custom_op("compress::fake_quantize_float8", mutates_args=())
def fake_quantize_float8(x: Tensor, scale: float) -> Tensor:
    """Round to E4M3 and back on a known scale; ONNX ``QuantizeLinear`` -> ``DequantizeLinear``.

    Args:
        x: float32, any shape.
        scale: positive; values beyond 448 of it are clipped.

    Returns:
        float32, the shape of `x`.
    """
    return to_float8(x / scale).float() * scale


def _round(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    codes = (torch.round(x / scale) + zero_point).clamp_(0, LEVELS - 1)
    return codes.sub_(zero_point).mul_(scale)


@fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_dynamic.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_float8.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


# -- gradients: rounding passes them straight through (Bengio et al. 2013, section 4), clipping stops them ---


def _keep(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
    x, scale, zero_point = inputs
    grid = Grid(scale, zero_point)
    ctx.save_for_backward((x >= grid.low) & (x <= grid.high))


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (within,) = ctx.saved_tensors
    return gradient * within, None, None


def _keep_float8(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, scale = inputs
    ctx.save_for_backward(x.abs() <= LARGEST * scale)


def _straight_through_float8(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (within,) = ctx.saved_tensors
    return gradient * within, None


fake_quantize.register_autograd(_straight_through, setup_context=_keep)
fake_quantize_float8.register_autograd(_straight_through_float8, setup_context=_keep_float8)
# the range is that of the values, so none is clipped
fake_quantize_dynamic.register_autograd(lambda ctx, gradient: gradient)
# bfloat16 has too few digits for places on a grid of 256
for _quantizer in (fake_quantize, fake_quantize_dynamic, fake_quantize_float8):
    _quantizer.register_autocast("cpu", torch.float32)


STATIC = torch.ops.compress.fake_quantize.default
DYNAMIC = torch.ops.compress.fake_quantize_dynamic.default
FLOAT8 = torch.ops.compress.fake_quantize_float8.default
QUANTIZERS = (STATIC, DYNAMIC, FLOAT8)
"""The operators, as targets of graph nodes."""


def rounding(node: fx.Node) -> Rounding:
    """How a node of `QUANTIZERS` rounds."""
    if node.target is FLOAT8:
        return Rounding(static=True, float8=True)
    static = node.target is STATIC
    return Rounding(static, symmetric=static and bool(node.args[2] == SYMMETRIC_ZERO))
