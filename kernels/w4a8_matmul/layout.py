"""The layouts of a symmetric 4-bit weight that `compress::w4a8_matmul` takes.

``canonical`` is `compress.encoding`. ``frag8`` is for the integer tensor cores, the same on all of them::

    codes   int32 [N/16, K/64, 32, 4]  `compress.kernels.layouts`; N padded to 64, K to 128
    scales  float32 [K/G, N]           G of 128 or 64 columns, or all; past the last column 0
    sums    float32 [N]                of the weights in a row: what the zero point of activations multiplies

The codes that pad a weight are zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.encoding import dequantize
from compress.encoding import pack as pack_bits
from compress.encoding import unpack as unpack_bits
from compress.errors import PassError
from compress.kernels.layouts import pack_frag8, unpack_frag8
from compress.kernels.operands import check_layout
from compress.kernels.w4_matmul.layout import pack_scales, unpack_scales

LAYOUTS = ("canonical", "frag8")
ROWS, COLUMNS = 64, 128
"""What the size of a weight is padded to multiples of."""

GROUPS = (128, 64)
"""Columns per scale that the kernel knows besides whole rows."""

MOST_COLUMNS = 1 << 17
"""Of one scale: products reach 2^14, 16 times the code times the activation, and sums have 31 bits."""


def group_of(group_size: int, columns: int) -> int:
    """Columns per scale in the device layout, all of the padded ones or of `GROUPS`; 0 if none fits."""
    if group_size >= columns and columns < MOST_COLUMNS:
        return math.ceil(columns / COLUMNS) * COLUMNS
    return next((g for g in GROUPS if group_size >= columns or group_size % g == 0), 0)


def pack(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int, columns: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring a canonical 4-bit weight into a layout.

    Args:
        codes: uint8 ``[N, ceil(columns/2)]``.
        scales: float32 ``[N, groups]``.
        zero_points: None; the kernel has no place for those of weights.
        group_size: columns per scale.
        columns: K.
        layout: ``canonical`` or ``frag8``.

    Returns:
        codes, scales and sums (None for ``canonical``).

    Raises:
        PassError: there is no such layout, groups of this size do not fit, or there are zero points.
    """
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, scales, None
    group = group_of(group_size, columns)
    if not group or zero_points is not None or scales.dtype != torch.float32:
        raise PassError(
            f"groups of {group_size} columns, scales in {scales.dtype}, "
            f"{'no ' if zero_points is None else ''}zero points: not for the integer tensor cores",
            expected="a multiple of 64 or one group for the whole row, float32, and a symmetric encoding",
            fix='keep layout="canonical" for this weight',
        )
    rows, padded = len(scales), math.ceil(columns / COLUMNS) * COLUMNS
    fill = (0, padded - columns, 0, -rows % ROWS)
    dense = torch.nn.functional.pad(unpack_bits(codes, 4, columns), fill, value=8)
    spread, _ = pack_scales(scales, None, max(group_size, group), group, 1, padded // group)
    weight = dequantize(codes, scales, None, 4, group_size, [rows, columns])
    return pack_frag8(dense), spread.squeeze(-1), weight.double().sum(1).float()


def unpack(
    codes: Tensor, scales: Tensor, sums: Tensor | None, group_size: int, columns: int, layout: str
) -> tuple[Tensor, Tensor, None]:
    """The inverse of `pack`: canonical codes and scales, and None."""
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, scales, None
    groups, rows = scales.shape
    group = codes.shape[1] * 64 // groups
    canonical, _ = unpack_scales(scales.unsqueeze(-1), None, group_size, group, columns)
    return pack_bits(unpack_frag8(codes)[:rows, :columns], 4), canonical, None
