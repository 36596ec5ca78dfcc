"""`compress::w4_matmul` in Triton, for weights in a frag16 layout. Importing this file needs `triton`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.inspection import Compiled, compile_for
from compress.kernels.launching import for_parts
from compress.kernels.tiles import addends, decode, scale_pairs, scale_value, whole_sum, zero_pairs
from compress.kernels.tuning import Config, Problem, choose, gpu_of
from compress.kernels.w4_matmul.layout import kwidth_for

CROSS_OVER = 128
"""Rows of `x` from which on the weight is decoded once and multiplied by torch: the product is then bound by
the tensor cores, and decoding in the inner loop takes from them."""

SCALES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def weight_tile(
    q_ptrs,
    s_ptrs,
    zl,
    zh,
    rows,
    N,
    tile: tl.constexpr,
    SW: tl.constexpr,
    GT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KW: tl.constexpr,
    SCALED: tl.constexpr,
    SCALES: tl.constexpr,
    ASYM: tl.constexpr,
    FP16: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of the weight ``[BN, BK]``, with its scales if SCALED; `zl`, `zh` hold its zero points."""
    words = tl.load(q_ptrs, eviction_policy="evict_first")
    if ASYM:
        low = zero_pairs(zl, tile, GT, FP16)
        high = zero_pairs(zh, tile, GT, FP16)
    else:
        low = addends(tl.full((1, 1, 1, 1, 1), 8, tl.int32), FP16)
        high = low
    low_scale = low
    high_scale = high
    if SCALED:
        low_scale = scale_pairs(s_ptrs, rows < N, tile, GT, SCALES, FP16)
        high_scale = scale_pairs(s_ptrs + 8 * SW, rows + 8 < N, tile, GT, SCALES, FP16)
    return decode(words, low, high, low_scale, high_scale, BN, BK, KW, SCALED, FP16, ASM)


@triton.jit
def matmul_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    z_ptr,
    part_ptr,
    count_ptr,
    y_ptr,
    M,
    N,
    K,
    STEPS,
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
    """``y[M, N] = x[M, K] @ W[N, K]^T`` for `BN` columns and `BM` rows of y and a part of K.

    PRE: scales go on the weights, in their 16 bits, not on the sums of a group. That takes one set of
    accumulators in place of two, and any number of groups per tile.
    """
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    BK: tl.constexpr = G if G >= 64 else 64
    TILES: tl.constexpr = S * G // BK
    GT: tl.constexpr = BK // G
    SW: tl.constexpr = S if tl.float32 == SCALES else S // 2
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    n16 = pid_n * (BN // 16) + tl.arange(0, BN // 16)
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    rows = n16[:, None] * 16 + tl.arange(0, 8)[None, :]
    q_ptrs = q_ptr + n16[:, None] * (STEPS * (S * G * 2)) + tl.arange(0, BK * 2)[None, :]
    # hosts of plugins come with any number of rows: their places need 64 bits
    x_ptrs = x_ptr + rm[None, :].to(tl.int64) * K + rk[:, None]
    mask_m = (rm < M)[None, :]
    per = tl.cdiv(STEPS, SPLIT)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(pid_k * per, tl.minimum(pid_k * per + per, STEPS), num_stages=STAGES):
        s_ptrs = s_ptr + (step * N + rows) * SW
        zl = rows
        zh = rows
        if ASYM:
            zl = tl.load(z_ptr + step * N + rows, mask=rows < N, other=0)
            zh = tl.load(z_ptr + step * N + rows + 8, mask=rows + 8 < N, other=0)
        for tile in tl.static_range(TILES):
            k = step * (S * G) + tile * BK
            w = weight_tile(
                q_ptrs + k * 2, s_ptrs, zl, zh, rows, N,
                tile, SW, GT, BN, BK, KW, PRE, SCALES, ASYM, FP16, ASM,
            )  # fmt: skip
            if EVEN_K:
                x = tl.load(x_ptrs + k, mask=mask_m, other=0.0)
            else:
                x = tl.load(x_ptrs + k, mask=mask_m & (rk + k < K)[:, None], other=0.0)
            if F32:  # bfloat16 is wrong in the interpreter
                w = w.to(tl.float32)
                x = x.to(tl.float32)
            else:
                w = w.to(x.dtype)
            if PRE:
                acc = tl.dot(w, x, acc, input_precision="ieee")
            else:
                scale = scale_value(s_ptr + (step * N + rn) * SW, tile, rn < N, SCALES)
                acc += tl.dot(w, x, input_precision="ieee") * scale[:, None]
    y_ptrs = y_ptr + rm[None, :].to(tl.int64) * N + rn[:, None]
    mask = mask_m & (rn < N)[:, None]
    done = True
    if SPLIT > 1:
        done, acc = whole_sum(acc, part_ptr, count_ptr, SPLIT, BN, BM)
    if done:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    q_ptr,
    s_ptr,
    z_ptr,
    w_ptr,
    N,
    K,
    STEPS,
    G: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    KW: tl.constexpr,
    SCALES: tl.constexpr,
    ASYM: tl.constexpr,
    ASM: tl.constexpr,
):
    """The weight itself, ``w[N, K]``: `BN` rows and one step."""
    FP16: tl.constexpr = w_ptr.dtype.element_ty == tl.float16
    BK: tl.constexpr = G if G >= 64 else 64
    GT: tl.constexpr = BK // G
    SW: tl.constexpr = S if tl.float32 == SCALES else S // 2
    step = tl.program_id(1)
    n16 = tl.program_id(0) * (BN // 16) + tl.arange(0, BN // 16)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = n16[:, None] * 16 + tl.arange(0, 8)[None, :]
    q_ptrs = q_ptr + n16[:, None] * (STEPS * (S * G * 2)) + tl.arange(0, BK * 2)[None, :]
    s_ptrs = s_ptr + (step * N + rows) * SW
    zl = rows
    zh = rows
    if ASYM:
        zl = tl.load(z_ptr + step * N + rows, mask=rows < N, other=0)
        zh = tl.load(z_ptr + step * N + rows + 8, mask=rows + 8 < N, other=0)
    for tile in tl.static_range(S * G // BK):
        rk = step * (S * G) + tile * BK + tl.arange(0, BK)
        w = weight_tile(
            q_ptrs + (step * (S * G) + tile * BK) * 2, s_ptrs, zl, zh, rows, N,
            tile, SW, GT, BN, BK, KW, True, SCALES, ASYM, FP16, ASM,
        )  # fmt: skip
        mask = (rn < N)[:, None] & (rk < K)[None, :]
        tl.store(w_ptr + rn[:, None].to(tl.int64) * K + rk[None, :], w.to(w_ptr.dtype.element_ty), mask=mask)


def w4_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, columns: int, kwidth: int
) -> Tensor:
    """``x[..., K] @ W[N, K]^T`` for a weight in a frag16 layout; x in bfloat16 or float16."""
    steps, rows, step = scales.shape
    group = codes.shape[1] * 64 // (steps * step)
    flat = x.reshape(-1, columns)
    problem = Problem(flat.shape[0], rows, columns, group, step, steps)
    if problem.m > CROSS_OVER:
        weight = decoded(codes, scales, zero_points, columns, kwidth, x.dtype)
        return torch.nn.functional.linear(x, weight)
    config = choose("w4_matmul", problem, gpu_of(x.device.index))
    return launch(flat, codes, scales, zero_points, kwidth, config).view(*x.shape[:-1], rows)


def launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    kwidth: int,
    config: Config,
    out: Tensor | None = None,
) -> Tensor:
    """One launch of the kernel: x ``[M, K]`` to ``[M, N]``, in the dtype of x or into `out`."""
    steps, rows, step = scales.shape
    m = x.shape[0]
    y = x.new_empty(m, rows) if out is None else out
    if m == 0:
        return y
    # loads of 16 bytes need rows that begin at multiples of 16 bytes; Triton looks for 16 elements
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).contiguous()
    columns = x.shape[1]
    group = codes.shape[1] * 64 // (steps * step)
    blocks = (triton.cdiv(rows, config.block_n), triton.cdiv(m, config.block_m))
    parts, counters = for_parts(y, config.split_k, blocks, config.block_n * config.block_m)
    matmul_kernel[(*blocks, config.split_k)](
        x, codes, scales.view(torch.int32), codes if zero_points is None else zero_points, parts, counters, y,
        m, rows, columns, steps,
        **constants(config, group, step, kwidth, scales.dtype, zero_points is not None, columns, steps),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def constants(
    config: Config,
    group: int,
    step: int,
    kwidth: int,
    scales: torch.dtype,
    zero_points: bool,
    columns: int,
    steps: int,
    interpreted: bool = INTERPRETED,
) -> dict[str, Any]:
    """What a launch of the kernel fixes when it is compiled; `columns` are those of x, a multiple of 16."""
    return {
        "G": group, "S": step, "BM": config.block_m, "BN": config.block_n, "KW": kwidth,
        "SPLIT": config.split_k, "STAGES": config.stages, "PRE": prescaled(group, config.block_m),
        "SCALES": SCALES[scales], "ASYM": zero_points, "EVEN_K": columns == steps * step * group,
        "ASM": not interpreted, "F32": interpreted,
    }  # fmt: skip


def prescaled(group: int, block_m: int) -> bool:
    """Whether scales go on the weights: for short groups, and where a second set of accumulators spills."""
    return group < 64 or block_m >= 64


def decoded(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    columns: int,
    kwidth: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``[N, K]`` in bfloat16 or float16."""
    steps, rows, step = scales.shape
    weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    decode_kernel[(triton.cdiv(rows, 64), steps)](
        codes, scales.view(torch.int32), codes if zero_points is None else zero_points, weight,
        rows, columns, steps,
        G=codes.shape[1] * 64 // (steps * step), S=step, BN=64, KW=kwidth, SCALES=SCALES[scales.dtype],
        ASYM=zero_points is not None, ASM=not INTERPRETED,
    )  # fmt: skip
    return weight


def compiled(capability: int, config: Config, group: int, step: int, zero_points: bool) -> Compiled:
    """The kernel for a GPU that need not be here, for bfloat16 and sizes divisible by 16."""
    types = {
        "x_ptr": "*bf16", "q_ptr": "*i32", "s_ptr": "*i32", "z_ptr": "*i32", "part_ptr": "*fp32",
        "count_ptr": "*i32", "y_ptr": "*bf16", "M": "i32", "N": "i32", "K": "i32", "STEPS": "i32",
    }  # fmt: skip
    kwidth = kwidth_for(divmod(capability, 10))
    fixed = constants(config, group, step, kwidth, torch.bfloat16, zero_points, group * step, 1, False)
    aligned = [n for n in types if n not in ("M", "STEPS")]
    return compile_for(matmul_kernel, types, fixed, aligned, capability, config.warps, config.stages)
