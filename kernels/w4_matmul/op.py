"""`compress::w4_matmul`, the operator: the reference on the CPU, Triton on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.operands import check_columns, check_layout, require_triton
from compress.kernels.w4_matmul import reference
from compress.kernels.w4_matmul.layout import LAYOUTS, kwidth_of


@torch.library.custom_op("compress::w4_matmul", mutates_args=())
def w4_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """``y[..., N] = x[..., K] @ W[N, K]^T`` with a packed 4-bit weight.

    Args:
        x: ``[..., K]``, a floating-point tensor.
        codes, scales, zero_points: the weight in `layout`, as `layout.pack` beside this file makes it.
        group_size: columns per scale of the canonical weight, at least 1.
        columns: K.
        layout: ``canonical``, ``frag16_kw2`` or ``frag16_kw4``.

    Returns:
        ``[..., N]`` in the dtype of `x`; sums are taken in float32.

    Raises:
        PassError: `x` does not have K columns, or there is no such layout.
        MissingExtra: on a GPU, where a device layout needs Triton.
    """
    _check(x, columns, layout)
    return reference.w4_matmul(x, codes, scales, zero_points, group_size, columns, layout)


@w4_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    _check(x, columns, layout)
    return x.new_empty(*x.shape[:-1], scales.shape[0 if layout == "canonical" else 1])


@w4_matmul.register_kernel("cuda")
def on_gpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """The same, on a GPU: device layouts in 16 bits by Triton, all else by decoding the weight."""
    _check(x, columns, layout)
    if layout == "canonical" or x.dtype not in (torch.bfloat16, torch.float16):
        weight = reference.decoded(codes, scales, zero_points, group_size, columns, layout)
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    require_triton()
    from compress.kernels.w4_matmul import triton

    with torch.cuda.device(x.device):
        return triton.w4_matmul(x, codes, scales, zero_points, columns, kwidth_of(layout))


def _check(x: Tensor, columns: int, layout: str) -> None:
    check_layout(layout, LAYOUTS)
    check_columns(x, columns)
