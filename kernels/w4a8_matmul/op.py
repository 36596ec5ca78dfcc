"""`compress::w4a8_matmul` and `compress::quantize_dynamic`, the operators.

    y = x_scale * (sum over groups of scale * (codes of x . codes of W)  -  x_zero_point * sum of W)

The products of codes and their sums are exact integers; scales and zero points come after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.activations import LEVELS
from compress.errors import PassError
from compress.kernels.operands import check_layout, require_triton
from compress.kernels.w4a8_matmul import reference
from compress.kernels.w4a8_matmul.layout import LAYOUTS

_MIDDLE = LEVELS // 2
"""int8 codes are uint8 codes less this."""


@torch.library.custom_op("compress::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `compress::fake_quantize_dynamic` rounds to, as integers: the range is that of all of `x`.

    Args:
        x: float32 ``[..., K]``.

    Returns:
        codes, int8 ``[..., K]``; scales, float32 ``[...]``; zero points, int32 ``[...]``: one of each for
        every row, all equal. ``x ~ (codes - zero_points) * scales``.
    """
    if not x.numel():
        one = x.new_ones(x.shape[:-1])
        return torch.empty_like(x, dtype=torch.int8), one, torch.zeros_like(one, dtype=torch.int32)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / (LEVELS - 1)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, LEVELS - 1))
    codes = (torch.round(x / scale) + zero).clamp_(0, LEVELS - 1) - _MIDDLE
    zeros = (zero - _MIDDLE).to(torch.int32)
    return codes.to(torch.int8), scale.repeat(x.shape[:-1]), zeros.repeat(x.shape[:-1])


@quantize_dynamic.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.int8),
        x.new_empty(x.shape[:-1]),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


@torch.library.custom_op("compress::w4a8_matmul", mutates_args=())
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
    """``y[..., N] = x[..., K] @ W[N, K]^T`` with 8-bit activations and a packed symmetric 4-bit weight.

    Args:
        x: int8 ``[..., K]``, codes of the activations.
        x_scales, x_zero_points: float32 and int32 ``[...]``, of each row: ``(x - zero_point) * scale``.
        codes, scales, sums: the weight, as `layout.pack` beside this file makes it.
        group_size: columns per scale of the canonical weight, at least 1.
        columns: K.
        layout: ``canonical`` or ``frag8``.

    Returns:
        float32 ``[..., N]``.

    Raises:
        PassError: `x` is not int8 or does not have K columns, or there is no such layout.
        MissingExtra: on a GPU, where the layout ``frag8`` needs Triton.
    """
    _check(x, columns, layout)
    return reference.w4a8_matmul(x, x_scales, x_zero_points, codes, scales, sums, group_size, columns, layout)


@w4a8_matmul.register_fake
def _(
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
    _check(x, columns, layout)
    return scales.new_empty(*x.shape[:-1], scales.shape[0 if layout == "canonical" else 1])


@w4a8_matmul.register_kernel("cuda")
def on_gpu(
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
    """The same, on a GPU: ``frag8`` by Triton, the canonical layout by decoding the whole weight."""
    _check(x, columns, layout)
    if sums is None:
        return reference.w4a8_matmul(
            x, x_scales, x_zero_points, codes, scales, sums, group_size, columns, layout
        )
    require_triton()
    from compress.kernels.w4a8_matmul import triton

    with torch.cuda.device(x.device):
        return triton.w4a8_matmul(x, x_scales, x_zero_points, triton.Packed(codes, scales, sums))


def _check(x: Tensor, columns: int, layout: str) -> None:
    check_layout(layout, LAYOUTS)
    if x.dtype != torch.int8 or x.shape[-1] != columns:
        raise PassError(
            f"x has {x.shape[-1]} columns in {x.dtype}, the weight has {columns}",
            expected="as many, in int8",
        )
