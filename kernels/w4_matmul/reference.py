"""What `compress::w4_matmul` computes, in float32: undo the layout, decode the weight, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.encoding import dequantize
from compress.kernels.w4_matmul.layout import unpack


def w4_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """Same arguments and result as `compress.kernels.w4_matmul.op.w4_matmul`, on any device."""
    weight = decoded(codes, scales, zero_points, group_size, columns, layout)
    return torch.nn.functional.linear(x.float(), weight).to(x.dtype)


def decoded(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int, columns: int, layout: str
) -> Tensor:
    """The weight: float32 ``[N, K]``."""
    codes, scales, zero_points = unpack(codes, scales, zero_points, group_size, columns, layout)
    return dequantize(codes, scales.float(), zero_points, 4, group_size, [scales.shape[0], columns])
