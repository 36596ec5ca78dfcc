"""What `compress::w4a8_matmul` computes, in float32: decode the activations, decode the weight, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.encoding import dequantize
from compress.kernels.w4a8_matmul.layout import unpack


def w4a8_matmul(
    x: Tensor,
    x_scales: Tensor,
    x_zero_points: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """Arguments and result of the operator, on any device."""
    codes, scales, _ = unpack(codes, scales, sums, group_size, columns, layout)
    weight = dequantize(codes, scales, None, 4, group_size, [scales.shape[0], columns])
    values = (x.float() - x_zero_points.unsqueeze(-1)) * x_scales.unsqueeze(-1)
    return torch.nn.functional.linear(values, weight)
