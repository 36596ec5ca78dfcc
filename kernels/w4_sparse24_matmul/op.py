"""`compress::w4_sparse24_matmul`, the operator: the reference on the CPU, ``mma.sp`` on a GPU."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from compress.kernels.operands import check_columns, check_layout, require_triton
from compress.kernels.w4_sparse24_matmul import reference
from compress.kernels.w4_sparse24_matmul.layout import LAYOUTS, pack


@torch.library.custom_op("compress::w4_sparse24_matmul", mutates_args=())
def w4_sparse24_matmul(
    x: Tensor,
    codes: Tensor,
    metadata: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """``y[..., N] = x[..., K] @ W[N, K]^T`` with a packed 4-bit weight, two of every four zero.

    Args:
        x: ``[..., K]``, a floating-point tensor.
        codes, metadata, scales, zero_points: the weight, as `layout.pack` beside this file makes it.
        group_size: columns per scale of the canonical weight, at least 1.
        columns: K.
        layout: ``canonical`` or ``sp24``.

    Returns:
        ``[..., N]`` in the dtype of `x`; sums are taken in float32.

    Raises:
        PassError: `x` does not have K columns, or there is no such layout.
        MissingExtra: on a GPU, where the layout ``sp24`` needs Triton.
    """
    _check(x, columns, layout)
    return reference.w4_sparse24_matmul(x, codes, metadata, scales, zero_points, group_size, columns, layout)


@w4_sparse24_matmul.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    metadata: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    _check(x, columns, layout)
    return x.new_empty(*x.shape[:-1], scales.shape[0 if layout == "canonical" else 1])


@w4_sparse24_matmul.register_kernel("cuda")
def on_gpu(
    x: Tensor,
    codes: Tensor,
    metadata: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> Tensor:
    """The same, on a GPU: ``sp24`` by the sparse instruction for few rows of x, decoded for more."""
    _check(x, columns, layout)
    if metadata is not None and x.dtype in (torch.bfloat16, torch.float16):
        require_triton()
        from compress.kernels.tuning import gpu_of
        from compress.kernels.w4_sparse24_matmul import triton

        flat = x.reshape(-1, columns)
        steps, rows, _ = scales.shape
        with torch.cuda.device(x.device):
            if len(flat) <= triton.CROSS_OVER and instruction_is_right(x.device.index, x.dtype):
                split = triton.split_of(rows, len(flat), steps, gpu_of(x.device.index))
                y = triton.launch(flat, codes, metadata, scales, zero_points, split)
                return y.view(*x.shape[:-1], rows)
            weight = triton.decoded(codes, metadata, scales, zero_points, columns, x.dtype)
        return torch.nn.functional.linear(x, weight)
    arguments = (codes, metadata, scales, zero_points, group_size, columns, layout)
    return torch.nn.functional.linear(x, reference.decoded(*arguments).to(x.dtype))


def instruction_is_right(index: int, dtype: torch.dtype) -> bool:
    """Whether this GPU runs the sparse instruction as its documentation reads; tried once per process.

    Which lane holds which operand is nothing that Triton promises. While a CUDA graph is captured nothing can
    be tried, and the answer is no until it has been.
    """
    if (index, dtype) not in _tried and torch.cuda.is_current_stream_capturing():
        return False
    _tried.add((index, dtype))
    return _try(index, dtype)


_tried: set[tuple[int, torch.dtype]] = set()


@functools.cache
def _try(index: int, dtype: torch.dtype) -> bool:
    from compress.kernels.w4_sparse24_matmul import triton

    rows, columns, m = 160, 384, 13
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns // 4, 4), dtype=torch.uint8, generator=generator)
    gone = torch.rand(codes.shape, generator=generator).argsort(-1)[..., :2]
    codes = codes.scatter_(-1, gone, 8).flatten(1)
    canonical = codes[:, ::2] | codes[:, 1::2] << 4
    scales = torch.rand(rows, columns // 32, generator=generator) * 0.02 + 0.01
    x = torch.randn(m, columns, generator=generator).to(dtype)
    packed, metadata, spread, _ = pack(canonical, scales, None, 32, columns, "sp24")
    assert metadata is not None
    exact = reference.w4_sparse24_matmul(x.float(), packed, metadata, spread, None, 32, columns, "sp24")
    there = [t.to(torch.device("cuda", index)) for t in (x, packed, metadata, spread)]
    y = triton.launch(there[0], there[1], there[2], there[3], None, 2)
    right = bool((y.cpu().float() - exact).norm() <= 0.01 * exact.norm())
    if not right:
        warnings.warn(
            "the sparse tensor cores of this GPU do not compute what they should; "
            "2:4 weights are decoded for each product instead",
            stacklevel=2,
        )
    return right


def _check(x: Tensor, columns: int, layout: str) -> None:
    check_layout(layout, LAYOUTS)
    check_columns(x, columns)
