"""The operators that multiply by packed 4-bit weights: which one a weight gets, and in which layout on a GPU.

`PRODUCTS` is the whole rule. The first that takes a weight gets it; a special one that would take it but for
its size or dtype says so, and that reason is reported. All of them compute the same from the canonical codes,
so the choice costs no accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import compress.kernels.w4_bsr_matmul.op
import compress.kernels.w4_matmul.op
import compress.kernels.w4_sparse24_matmul.op
import compress.kernels.w4a8_matmul.op  # noqa: F401 - these register the operators
from compress.encoding import EncodedWeight
from compress.kernels.w4_bsr_matmul import layout as bsr
from compress.kernels.w4_matmul import layout as dense
from compress.kernels.w4_sparse24_matmul import layout as sparse24
from compress.kernels.w4a8_matmul import layout as int8

CANONICAL = "canonical"
HALF = (torch.float16, torch.bfloat16)
"""The dtypes in which a GPU multiplies by packed codes; `compress::w4a8_matmul` has integers for it."""

Capability = tuple[int, int]
Canonical = tuple[Tensor, Tensor, Tensor | None]

BREAK_EVEN = 0.25
"""Zero blocks, as a part of all, from which the block-sparse operator is chosen. In the machine code for up
to 16 rows of x a stored weight costs 1.2 to 1.4 instructions for each one of `compress::w4_matmul` (a turn of
its loop is 128 columns, not 512, and blocks have indices): at a quarter of zeros both are equal. No GPU has
measured it."""

_ROWS = 64
"""Rows of a weight that are looked at together: a dense one shows in the first."""


@dataclass(frozen=True)
class Product:
    """One operator ``(..., *parts, group_size, columns, layout) -> y``, x before the parts.

    Attributes:
        operator: as a target of graph nodes.
        parts: names of the tensors a weight is given as; None stands for one that a layout does without.
        dtypes: of y, for which a GPU has a kernel; for others the operator decodes the whole weight.
        declines: why it is not for a weight, given also whether all its inputs are rounded to 8 bits on every
            call: "" it is, None the weight is of another kind, else what is in the way.
        layout_for: the layout for a GPU of this compute capability, 8.0 or later.
        pack: canonical codes, scales and zero points, columns per scale, columns and layout to the parts.
        unpack: the inverse.
    """

    operator: torch._ops.OpOverload
    parts: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    declines: Callable[[EncodedWeight, bool], str | None]
    layout_for: Callable[[Capability], str]
    pack: Callable[..., tuple[Tensor | None, ...]]
    unpack: Callable[..., Canonical]

    @property
    def name(self) -> str:
        """As in ``compress::w4_matmul``."""
        return self.operator.name().partition(".")[0]

    def weight_of(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of a call's arguments that are the parts of the weight."""
        return args[-3 - len(self.parts) : -3]


def product_for(weight: EncodedWeight, rounded: bool = False) -> tuple[Product, str]:
    """The operator for a 4-bit weight, and why not a more special one; "" if there is nothing to say.

    Args:
        rounded: all its inputs are rounded to 8 bits on every call (`compress.activations.DYNAMIC`).
    """
    reasons: list[str] = []
    for product in PRODUCTS:
        reason = product.declines(weight, rounded)
        if reason == "":
            return product, "; ".join(reasons)
        if reason is not None:
            reasons.append(reason)
    raise AssertionError("w4_matmul takes all")


def _not_int8(weight: EncodedWeight, rounded: bool) -> str | None:
    if not rounded:
        return None
    if weight.zero_points is not None:
        return "activations are rounded, but the kernel for them has no place for zero points of weights"
    width = weight.encoding.width(weight.columns)
    if not int8.group_of(width, weight.columns):
        return f"activations are rounded, but groups of {width} do not fit the kernel for them"
    return ""


def _not_sparse24(weight: EncodedWeight, rounded: bool) -> str | None:
    for first in range(0, weight.shape[0], _ROWS):
        used = nonzero(weight, slice(first, first + _ROWS))
        fours = torch.nn.functional.pad(used, (0, -used.shape[1] % 4)).unflatten(1, (-1, 4))
        if (fours.sum(-1) > 2).any():
            return None
    width = weight.encoding.width(weight.columns)
    if weight.dtype not in HALF:
        return "two of every four weights are zero, but sparse tensor cores multiply in 16 bits only"
    if width % sparse24.GROUP and width < weight.columns:
        return f"two of every four weights are zero, but groups of {width} do not fit sparse tensor cores"
    return ""


def _not_bsr(weight: EncodedWeight, rounded: bool) -> str | None:
    # one row of each block: a sixty-fourth of the work, and enough for a weight without zero blocks
    if not _zero_blocks(nonzero(weight, slice(None, None, bsr.ROWS))).any():
        return None
    parts = [nonzero(weight, slice(i, i + bsr.ROWS)) for i in range(0, weight.shape[0], bsr.ROWS)]
    share = float(torch.cat([_zero_blocks(part.any(0, keepdim=True)) for part in parts]).float().mean())
    if share == 0:
        return None
    blocks = f"{share:.0%} of its blocks of {bsr.ROWS}x{bsr.COLUMNS} are zero"
    if share < BREAK_EVEN:
        return f"{blocks}, and below {BREAK_EVEN:.0%} they are not worth being left out"
    if weight.dtype not in HALF:
        return f"{blocks}, but tensor cores take what is left in 16 bits only"
    width = weight.encoding.width(weight.columns)
    if not bsr.group_of(width, weight.columns):
        return f"{blocks}, but groups of {width} do not fit the kernel that leaves them out"
    return ""


def _zero_blocks(used: Tensor) -> Tensor:
    """Of rows ``[R, K]``, which 128 columns are all zero: bool ``[R, ceil(K/128)]``."""
    padded = torch.nn.functional.pad(used, (0, -used.shape[1] % bsr.COLUMNS))
    return ~padded.unflatten(1, (-1, bsr.COLUMNS)).any(-1)


def nonzero(weight: EncodedWeight, rows: slice) -> Tensor:
    """Which weights of some rows have a code other than the zero point: bool ``[rows, columns]``."""
    zeros = None if weight.zero_points is None else weight.zero_points[rows]
    codes, scales = weight.codes[rows], weight.scales[rows]
    part = dataclasses.replace(
        weight, codes=codes, scales=scales, zero_points=zeros, shape=(len(codes), *weight.shape[1:])
    )
    values, points = part.unpacked()
    width = weight.encoding.width(weight.columns)
    return values != points.repeat_interleave(width, 1)[:, : weight.columns]


W4_MATMUL = torch.ops.compress.w4_matmul.default
W4A8_MATMUL = torch.ops.compress.w4a8_matmul.default
QUANTIZE_DYNAMIC = torch.ops.compress.quantize_dynamic.default
W4_BSR_MATMUL = torch.ops.compress.w4_bsr_matmul.default
W4_SPARSE24_MATMUL = torch.ops.compress.w4_sparse24_matmul.default

PRODUCTS = (
    Product(
        W4A8_MATMUL,
        ("codes", "scales", "sums"),
        (torch.float32,),
        _not_int8,
        lambda capability: "frag8",
        int8.pack,
        int8.unpack,
    ),
    Product(
        W4_BSR_MATMUL,
        ("codes", "rowptr", "colidx", "scales", "zero_points"),
        HALF,
        _not_bsr,
        bsr.layout_for,
        bsr.pack,
        bsr.unpack,
    ),
    Product(
        W4_SPARSE24_MATMUL,
        ("codes", "metadata", "scales", "zero_points"),
        HALF,
        _not_sparse24,
        lambda capability: "sp24",
        sparse24.pack,
        sparse24.unpack,
    ),
    Product(
        W4_MATMUL,
        ("codes", "scales", "zero_points"),
        HALF,
        lambda weight, rounded: "",
        dense.layout_for,
        dense.pack,
        dense.unpack,
    ),
)
BY_OPERATOR = {product.operator: product for product in PRODUCTS}
BY_NAME = {product.name: product for product in PRODUCTS}
