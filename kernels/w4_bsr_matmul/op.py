"""`compress::w4_bsr_matmul`, the operator: the reference on the CPU, Triton on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.operands import check_columns, check_layout, require_triton
from compress.kernels.w4_bsr_matmul import reference
from compress.kernels.w4_bsr_matmul.layout import LAYOUTS
from compress.kernels.w4_matmul.layout import kwidth_of


@torch.library.custom_op("compress::w4_bsr_matmul", mutates_args=())
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
    """``y[..., N] = x[..., K] @ W[N, K]^T`` with a packed 4-bit weight that has whole blocks of zeros.

    Args:
        x: ``[..., K]``, a floating-point tensor.
        codes, rowptr, colidx, scales, zero_points: the weight, as `layout.pack` beside this file makes it.
        group_size: columns per scale of the canonical weight, at least 1.
        columns: K.
        layout: ``canonical``, ``bsr_kw2`` or ``bsr_kw4``.

    Returns:
        ``[..., N]`` in the dtype of `x`; sums are taken in float32.

    Raises:
        PassError: `x` does not have K columns, or there is no such layout.
        MissingExtra: on a GPU, where a device layout needs Triton.
    """
    _check(x, columns, layout)
    return reference.w4_bsr_matmul(x, codes, rowptr, colidx, scales, zero_points, group_size, columns, layout)


@w4_bsr_matmul.register_fake
def _(
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
    _check(x, columns, layout)
    return x.new_empty(*x.shape[:-1], scales.shape[0 if layout == "canonical" else 1])


@w4_bsr_matmul.register_kernel("cuda")
def on_gpu(
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
    """The same, on a GPU: device layouts by Triton, all else by decoding the whole weight."""
    _check(x, columns, layout)
    if rowptr is None or colidx is None or x.dtype not in (torch.bfloat16, torch.float16):
        arguments = (codes, rowptr, colidx, scales, zero_points, group_size, columns, layout)
        return torch.nn.functional.linear(x, reference.decoded(*arguments).to(x.dtype))
    require_triton()
    from compress.kernels.w4_bsr_matmul import triton

    with torch.cuda.device(x.device):
        weight = triton.Blocks(codes, rowptr, colidx, scales, zero_points, kwidth_of(layout))
        return triton.w4_bsr_matmul(x, weight, columns)


def _check(x: Tensor, columns: int, layout: str) -> None:
    check_layout(layout, LAYOUTS)
    check_columns(x, columns)
