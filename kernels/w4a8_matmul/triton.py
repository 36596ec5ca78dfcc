"""`compress::w4a8_matmul` in Triton: integer tensor cores. Importing this file needs `triton`.

A word holds the 4-bit codes of two rows, in two's complement: its high nibbles alone are 16 times the codes
of one of them as int8, and shifted by four bits those of the other. No code is converted; the 16 goes into
the result. A scale is applied to the int32 sums of its columns: at the end of a row, or once per group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.inspection import Compiled, compile_for
from compress.kernels.launching import for_parts
from compress.kernels.tiles import whole_sum
from compress.kernels.tuning import Config, Gpu, Problem, gpu_of, measured, rule_for_short_steps
from compress.kernels.w4a8_matmul.layout import COLUMNS

INTERPRETED = bool(triton.knobs.runtime.interpret)
SPLIT_ASM = tl.constexpr("{ shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }")
HIGH_NIBBLES = tl.constexpr(0xF0F0F0F0 - (1 << 32))


class Packed(NamedTuple):
    """A weight in the layout frag8."""

    codes: Tensor
    scales: Tensor
    sums: Tensor

    @property
    def group(self) -> int:
        """Columns per scale, all where there is one for the row."""
        return self.codes.shape[1] * 64 // len(self.scales)


@triton.jit
def int8_tile(words, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr):
    """int32 ``[BN/16, 2*BK]``, frag8, to 16 times the codes: int8 ``[BN, BK]``."""
    words = words.reshape(BN // 16, BK // 64, 8, 4, 2, 2)
    if ASM:
        low, high = tl.inline_asm_elementwise(SPLIT_ASM, "=&r,=r,r", [words], (tl.int32, tl.int32), True, 1)
    else:
        low = (words << 4) & HIGH_NIBBLES
        high = words & HIGH_NIBBLES
    both = tl.join(low, high)
    b0 = both.to(tl.int8)
    b1 = (both >> 8).to(tl.int8)
    b2 = (both >> 16).to(tl.int8)
    b3 = (both >> 24).to(tl.int8)
    # [n16, k64, g, t, kt, kh, row half, c // 2 of the column, c % 2]
    tile = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    return tile.permute(0, 6, 2, 1, 4, 5, 3, 7, 8).reshape(BN, BK)


@triton.jit
def matmul_kernel(
    x_ptr,
    xs_ptr,
    xz_ptr,
    q_ptr,
    s_ptr,
    sum_ptr,
    part_ptr,
    count_ptr,
    y_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """``y[M, N]`` for `BN` columns and `BM` rows and a part of K; WHOLE: one scale per row, else per `BK`."""
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    n16 = pid_n * (BN // 16) + tl.arange(0, BN // 16)
    rn = pid_n * BN + tl.arange(0, BN)
    rm = pid_m * BM + tl.arange(0, BM)
    mask_m = (rm < M)[None, :]
    q_ptrs = q_ptr + n16[:, None] * (K * 2) + tl.arange(0, BK * 2)[None, :]
    # any number of rows comes here: their places need 64 bits
    x_ptrs = x_ptr + rm[None, :].to(tl.int64) * K + tl.arange(0, BK)[:, None]
    steps = K // BK
    per = tl.cdiv(steps, SPLIT)
    sums = tl.zeros((BN, BM), tl.int32 if WHOLE else tl.float32)
    for step in tl.range(pid_k * per, tl.minimum(pid_k * per + per, steps), num_stages=STAGES):
        words = tl.load(q_ptrs + step * (BK * 2), eviction_policy="evict_first")
        x = tl.load(x_ptrs + step * BK, mask=mask_m, other=0)
        w = int8_tile(words, BN, BK, ASM)
        if WHOLE:
            sums = tl.dot(w, x, sums, out_dtype=tl.int32)
        else:
            scale = tl.load(s_ptr + step * N + rn, mask=rn < N, other=0.0)
            sums += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
    total = sums.to(tl.float32)
    if WHOLE:
        total *= tl.load(s_ptr + rn, mask=rn < N, other=0.0)[:, None]
    done = True
    if SPLIT > 1:
        done, total = whole_sum(total, part_ptr, count_ptr, SPLIT, BN, BM)
    if done:
        weights = tl.load(sum_ptr + rn, mask=rn < N, other=0.0)
        zero = tl.load(xz_ptr + rm, mask=rm < M, other=0).to(tl.float32)
        scale = tl.load(xs_ptr + rm, mask=rm < M, other=0.0)
        y = (total * 0.0625 - weights[:, None] * zero[None, :]) * scale[None, :]
        y_ptrs = y_ptr + rm[None, :].to(tl.int64) * N + rn[:, None]
        tl.store(y_ptrs, y, mask=mask_m & (rn < N)[:, None])


def w4a8_matmul(x: Tensor, x_scales: Tensor, x_zero_points: Tensor, weight: Packed) -> Tensor:
    """``x[..., K] @ W[N, K]^T`` for int8 codes of x: float32 ``[..., N]``."""
    rows = len(weight.sums)
    flat = x.reshape(-1, x.shape[-1])
    config = choose(len(flat), x.shape[-1], weight, gpu_of(x.device.index))
    y = launch(flat, x_scales.reshape(-1), x_zero_points.reshape(-1), weight, config)
    return y.view(*x.shape[:-1], rows)


def problem_of(m: int, columns: int, weight: Packed) -> Problem:
    """A product, as its launch is looked up."""
    # whole rows are looked up as groups of 128: what a turn of the loop takes
    step = min(weight.group, COLUMNS)
    return Problem(m, len(weight.sums), columns, step, 1, weight.codes.shape[1] * 64 // step)


def choose(m: int, columns: int, weight: Packed, gpu: Gpu) -> Config:
    """The launch measured for the nearest shape; else by a rule."""
    problem = problem_of(m, columns, weight)
    return measured("w4a8_matmul", problem, gpu) or rule_for_short_steps(problem, gpu, 1)


def launch(
    x: Tensor,
    x_scales: Tensor,
    x_zero_points: Tensor,
    weight: Packed,
    config: Config,
    out: Tensor | None = None,
) -> Tensor:
    """One launch of the kernel: int8 x ``[M, K]`` to float32 ``[M, N]``, new or `out`."""
    rows, m, columns = len(weight.sums), len(x), weight.codes.shape[1] * 64
    y = torch.empty(m, rows, dtype=torch.float32, device=x.device) if out is None else out
    if m == 0:
        return y
    x = torch.nn.functional.pad(x, (0, columns - x.shape[1])).contiguous()
    programs = (triton.cdiv(rows, config.block_n), triton.cdiv(m, config.block_m))
    parts, counters = for_parts(y, config.split_k, programs, config.block_n * config.block_m)
    whole = len(weight.scales) == 1
    matmul_kernel[(*programs, config.split_k)](
        x, x_scales, x_zero_points, weight.codes, weight.scales, weight.sums, parts, counters, y,
        m, rows, columns,
        BM=config.block_m, BN=config.block_n, BK=COLUMNS if whole else weight.group, WHOLE=whole,
        SPLIT=config.split_k, STAGES=config.stages, ASM=not INTERPRETED,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def compiled(capability: int, config: Config, group: int, whole: bool) -> Compiled:
    """The kernel for a GPU that need not be here, for sizes divisible by 16."""
    types = {
        "x_ptr": "*i8", "xs_ptr": "*fp32", "xz_ptr": "*i32", "q_ptr": "*i32", "s_ptr": "*fp32",
        "sum_ptr": "*fp32", "part_ptr": "*fp32", "count_ptr": "*i32", "y_ptr": "*fp32",
        "M": "i32", "N": "i32", "K": "i32",
    }  # fmt: skip
    constants = {
        "BM": config.block_m, "BN": config.block_n, "BK": group, "WHOLE": whole, "SPLIT": config.split_k,
        "STAGES": config.stages, "ASM": True,
    }  # fmt: skip
    aligned = [n for n in types if n != "M"]
    return compile_for(matmul_kernel, types, constants, aligned, capability, config.warps, config.stages)
