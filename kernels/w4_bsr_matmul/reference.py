"""What `compress::w4_bsr_matmul` computes, in float32: put the zero blocks back, decode, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.encoding import dequantize
from compress.kernels.w4_bsr_matmul.layout import unpack


def w4_bsr_matmul(
    x: Tensor,
    codes: Tensor,
    rowptr: Tensor | None,
    colidx: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """Arguments and result of the operator, on any device."""
    weight = decoded(codes, rowptr, colidx, scales, zero_points, group_size, columns, layout)
    return torch.nn.functional.linear(x.float(), weight).to(x.dtype)


def decoded(
    codes: Tensor,
    rowptr: Tensor | None,
    colidx: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """The weight with its zeros: float32 ``[N, K]``."""
    canonical = unpack(codes, rowptr, colidx, scales, zero_points, group_size, columns, layout)
    codes, scales, zero_points = canonical
    return dequantize(codes, scales.float(), zero_points, 4, group_size, [scales.shape[0], columns])
