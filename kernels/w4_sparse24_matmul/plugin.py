"""`compress::w4_sparse24_matmul` for hosts that launch PTX: the same kernel, its arguments in the order of a
plugin; see `compress.kernels.w4_matmul.plugin`. Importing this file needs `triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.encoding import pack as pack_bits
from compress.kernels.ptx import POINTERS, Launch, Ptx, emit
from compress.kernels.w4_sparse24_matmul.layout import pack
from compress.kernels.w4_sparse24_matmul.triton import WARPS, constants, sparse_kernel

CONFIGS = ((1, 2), (1, 3), (2, 2))
"""What a host can choose from: blocks of 8 rows of x, and stages."""


@triton.jit
def plugin_kernel(
    x_ptr,
    q_ptr,
    e_ptr,
    s_ptr,
    z_ptr,
    M,
    N,
    K,
    STEPS,
    y_ptr,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    SCALES: tl.constexpr,
    ASYM: tl.constexpr,
    FP16: tl.constexpr,
):
    """`sparse_kernel` without parts and counters, which no launch looks at that is not split."""
    sparse_kernel(
        x_ptr, q_ptr, e_ptr, s_ptr, z_ptr, y_ptr, q_ptr, y_ptr, M, N, K, STEPS,
        BLOCKS, SPLIT, STAGES, WARPS, SCALES, ASYM, FP16,
    )  # fmt: skip


def packed(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A canonical weight as the plugin takes it, always with zero points; arguments as for `layout.pack`.

    Raises:
        PassError: more than two of four weights are not zero, or groups of this size do not fit.
    """
    if zero_points is None:
        zero_points = pack_bits(torch.full(scales.shape, 8, dtype=torch.uint8), 4)
    words, metadata, spread, points = pack(codes, scales, zero_points, group_size, columns, "sp24")
    assert metadata is not None and points is not None
    return words, metadata, spread, points


def launches(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, scales: torch.dtype, capability: int
) -> list[Launch]:
    """Launches for a weight, one for each of `CONFIGS`; not all of them `fits`.

    Args:
        shapes: of x ``[..., K]``, K a multiple of 128, codes, metadata, scales and zero points, as `packed`
            makes them.
        dtype: of x and y: float16 or bfloat16.
        scales: their dtype.
        capability: 90 for 9.0.
    """
    (*_, columns), _, _, (steps, rows, _), _ = shapes
    found = []
    for blocks, stages in CONFIGS:
        ptx = _emit(blocks, stages, dtype, scales, rows % 16 == 0, steps % 16 == 0, capability)
        grid = triton.cdiv(rows, 32 * WARPS)
        found.append(Launch(ptx, grid, 8 * blocks, (rows, columns // 2, steps)))
    return found


@functools.cache
def _emit(
    blocks: int,
    stages: int,
    dtype: torch.dtype,
    scales: torch.dtype,
    even_rows: bool,
    even_steps: bool,
    capability: int,
) -> Ptx:
    types = {
        "x_ptr": "*i32", "q_ptr": "*i32", "e_ptr": "*i32",
        "s_ptr": "*fp32" if scales == torch.float32 else "*i64", "z_ptr": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "STEPS": "i32",
        "y_ptr": POINTERS[dtype],
    }  # fmt: skip
    uneven = {"M"} | (set() if even_rows else {"N"}) | (set() if even_steps else {"STEPS"})
    fixed = constants(blocks, 1, stages, scales, True, dtype == torch.float16)
    return emit(plugin_kernel, types, fixed, uneven, capability, WARPS, stages)
