"""`compress::w4_matmul` for hosts that launch PTX: the same kernel, its arguments in the order of a plugin.

TensorRT passes the inputs of a plugin, then whole numbers, then its outputs, to one launch without workspace,
so no programs share the columns of a weight. Steps of the layout are short enough for the shared memory that
any host can give a block. Importing this file needs `triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.ptx import POINTERS, Launch, Ptx, emit
from compress.kernels.tuning import Config, Problem, fits
from compress.kernels.w4_matmul.layout import kwidth_of, layout_for, pack
from compress.kernels.w4_matmul.triton import constants, matmul_kernel

CONFIGS = (
    Config(16, 64, 4, 2, 1),
    Config(16, 64, 4, 3, 1),
    Config(16, 128, 4, 2, 1),
    Config(32, 64, 4, 2, 1),
    Config(64, 64, 4, 2, 1),
    Config(64, 128, 8, 2, 1),
)
"""What a host can choose from, for few rows of x and for many. Not all of them fit every weight and GPU."""

_STEP = 256
"""Columns per step: twice as many take more than `compress.kernels.ptx.SHARED` with two stages."""


@triton.jit
def plugin_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    z_ptr,
    M,
    N,
    K,
    STEPS,
    y_ptr,
    G: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KW: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRE: tl.constexpr,
    SCALES: tl.constexpr,
    ASYM: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
    F32: tl.constexpr,
):
    """`matmul_kernel` without parts and counters, which no launch looks at that is not split."""
    matmul_kernel(
        x_ptr, q_ptr, s_ptr, z_ptr, y_ptr, q_ptr, y_ptr, M, N, K, STEPS,
        G, S, BM, BN, KW, SPLIT, STAGES, PRE, SCALES, ASYM, EVEN_K, ASM, F32,
    )  # fmt: skip


def packed(
    codes: Tensor, scales: Tensor, zero_points: Tensor, group_size: int, columns: int, capability: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A canonical weight as the plugin takes it on this GPU; arguments as for `layout.pack`.

    Raises:
        PassError: no group the kernel knows divides `group_size`.
    """
    layout = layout_for(divmod(capability, 10))
    words, spread, points = pack(codes, scales, zero_points, group_size, columns, layout, _STEP)
    assert points is not None
    return words, spread, points


def launches(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, scales: torch.dtype, capability: int
) -> list[Launch]:
    """Launches for a weight, one for each of `CONFIGS` whose blocks divide the rows; not all of them `fits`.

    Args:
        shapes: of x ``[..., K]``, codes, scales and zero points, as `packed` makes them.
        dtype: of x and y: float16 or bfloat16.
        scales: their dtype.
        capability: 90 for 9.0.
    """
    (*_, columns), (_, tiles, _, _), (steps, rows, step), _ = shapes
    group = tiles * 64 // (steps * step)
    problem = Problem(1, rows, columns, group, step, steps)
    found = []
    for config in CONFIGS:
        if fits(config, problem):
            even = columns == steps * step * group
            ptx = _emit(config, group, step, dtype, scales, even, rows % 16 == 0, steps % 16 == 0, capability)
            found.append(
                Launch(ptx, triton.cdiv(rows, config.block_n), config.block_m, (rows, columns, steps))
            )
    return found


@functools.cache
def _emit(
    config: Config,
    group: int,
    step: int,
    dtype: torch.dtype,
    scales: torch.dtype,
    even: bool,
    even_rows: bool,
    even_steps: bool,
    capability: int,
) -> Ptx:
    types = {
        "x_ptr": POINTERS[dtype], "q_ptr": "*i32", "s_ptr": "*i32", "z_ptr": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "STEPS": "i32", "y_ptr": POINTERS[dtype],
    }  # fmt: skip
    uneven = {"M"} | (set() if even_rows else {"N"}) | (set() if even_steps else {"STEPS"})
    kwidth = kwidth_of(layout_for(divmod(capability, 10)))
    columns = step * group if even else 0
    fixed = constants(config, group, step, kwidth, scales, True, columns, 1, False)
    return emit(plugin_kernel, types, fixed, uneven, capability, config.warps, config.stages)
