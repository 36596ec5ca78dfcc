"""`compress::w4_bsr_matmul` in Triton: stored blocks only. Importing this file needs `triton`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.inspection import Compiled, compile_for
from compress.kernels.launching import for_parts
from compress.kernels.tiles import scale_value, whole_sum
from compress.kernels.tuning import Config, Gpu, Problem, gpu_of, measured, rule_for_short_steps
from compress.kernels.w4_matmul.layout import kwidth_for
from compress.kernels.w4_matmul.triton import INTERPRETED, prescaled, weight_tile

CROSS_OVER = 128
"""Rows of `x` above which the weight is decoded once and multiplied by torch."""


class Blocks(NamedTuple):
    """A weight in a device layout, and the kwidth of that layout."""

    codes: Tensor
    rowptr: Tensor
    colidx: Tensor
    scales: Tensor
    zero_points: Tensor | None
    kwidth: int

    @property
    def group(self) -> int:
        """Columns per scale in the layout."""
        return 128 // self.scales.shape[2]


@triton.jit
def block_tile(
    q_ptr,
    s_ptr,
    z_ptr,
    block,
    column,
    rows,
    N,
    tile: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    KW: tl.constexpr,
    SCALED: tl.constexpr,
    ASYM: tl.constexpr,
    FP16: tl.constexpr,
    ASM: tl.constexpr,
):
    """`BK` columns of a stored block, ``[64, BK]``; `column` counts blocks."""
    q_ptrs = q_ptr + block * 1024 + tl.arange(0, 4)[:, None] * 256 + tl.arange(0, BK * 2)[None, :]
    zl = rows
    zh = rows
    if ASYM:
        zl = tl.load(z_ptr + column * N + rows, mask=rows < N, other=0)
        zh = tl.load(z_ptr + column * N + rows + 8, mask=rows + 8 < N, other=0)
    s_ptrs = s_ptr + (column * N + rows) * (128 // G)
    return weight_tile(
        q_ptrs + tile * (BK * 2), s_ptrs, zl, zh, rows, N,
        tile, 128 // G, BK // G, 64, BK, KW, SCALED, tl.float32, ASYM, FP16, ASM,
    )  # fmt: skip


@triton.jit
def matmul_kernel(
    x_ptr,
    q_ptr,
    rp_ptr,
    ci_ptr,
    s_ptr,
    z_ptr,
    part_ptr,
    count_ptr,
    y_ptr,
    M,
    N,
    K,
    G: tl.constexpr,
    BM: tl.constexpr,
    KW: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRE: tl.constexpr,
    ASYM: tl.constexpr,
    ASM: tl.constexpr,
    F32: tl.constexpr,
):
    """``y[M, N] = x[M, K] @ W[N, K]^T`` for 64 columns and `BM` rows of y and a part of the blocks there.

    PRE: scales go on the weights, not on the sums of a group, as in `compress::w4_matmul`.
    """
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    BK: tl.constexpr = G if G >= 64 else 64
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    rn = pid_n * 64 + tl.arange(0, 64)
    rm = pid_m * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    rows = pid_n * 64 + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 8)[None, :]
    x_ptrs = x_ptr + rm[None, :] * K + rk[:, None]
    mask_m = (rm < M)[None, :]
    first = tl.load(rp_ptr + pid_n)
    past = tl.load(rp_ptr + pid_n + 1)
    per = tl.cdiv(past - first, SPLIT)
    begin = tl.minimum(first + pid_k * per, past)
    acc = tl.zeros((64, BM), tl.float32)
    # read one iteration ahead: an index loaded where it is used keeps all other loads from being early
    column = tl.load(ci_ptr + begin)
    for block in tl.range(begin, tl.minimum(begin + per, past), num_stages=STAGES):
        for tile in tl.static_range(128 // BK):
            w = block_tile(q_ptr, s_ptr, z_ptr, block, column, rows, N, tile, G, BK, KW, PRE, ASYM, FP16, ASM)
            x = tl.load(x_ptrs + column * 128 + tile * BK, mask=mask_m, other=0.0)
            if F32:
                x = x.to(tl.float32)
            else:
                w = w.to(x.dtype)
            if PRE:
                acc = tl.dot(w, x, acc, input_precision="ieee")
            else:
                s_ptrs = s_ptr + (column * N + rn) * (128 // G)
                scale = scale_value(s_ptrs, tile, rn < N, tl.float32)
                acc += tl.dot(w, x, input_precision="ieee") * scale[:, None]
        column = tl.load(ci_ptr + block + 1)
    y_ptrs = y_ptr + rm[None, :] * N + rn[:, None]
    mask = mask_m & (rn < N)[:, None]
    done = True
    if SPLIT > 1:
        done, acc = whole_sum(acc, part_ptr, count_ptr, SPLIT, 64, BM)
    if done:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    q_ptr,
    rp_ptr,
    ci_ptr,
    s_ptr,
    z_ptr,
    w_ptr,
    N,
    K,
    G: tl.constexpr,
    KW: tl.constexpr,
    ASYM: tl.constexpr,
    ASM: tl.constexpr,
):
    """The stored blocks of 64 rows to their places in ``w[N, K]``; programs of axis 1 take turns."""
    FP16: tl.constexpr = w_ptr.dtype.element_ty == tl.float16
    BK: tl.constexpr = G if G >= 64 else 64
    pid_n = tl.program_id(0)
    rn = pid_n * 64 + tl.arange(0, 64)
    rows = pid_n * 64 + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 8)[None, :]
    first = tl.load(rp_ptr + pid_n)
    past = tl.load(rp_ptr + pid_n + 1)
    for block in range(first + tl.program_id(1), past, tl.num_programs(1)):
        column = tl.load(ci_ptr + block)
        for tile in tl.static_range(128 // BK):
            w = block_tile(
                q_ptr, s_ptr, z_ptr, block, column, rows, N, tile, G, BK, KW, True, ASYM, FP16, ASM
            )
            rk = column * 128 + tile * BK + tl.arange(0, BK)
            mask = (rn < N)[:, None] & (rk < K)[None, :]
            pointers = w_ptr + rn[:, None].to(tl.int64) * K + rk[None, :]
            tl.store(pointers, w.to(w_ptr.dtype.element_ty), mask=mask)


def w4_bsr_matmul(x: Tensor, weight: Blocks, columns: int) -> Tensor:
    """``x[..., K] @ W[N, K]^T`` for a weight in a device layout; x in bfloat16 or float16."""
    rows = weight.scales.shape[1]
    flat = x.reshape(-1, columns)
    if len(flat) > CROSS_OVER:
        return torch.nn.functional.linear(x, decoded(weight, columns, x.dtype))
    config = choose(len(flat), columns, weight, gpu_of(x.device.index))
    return launch(flat, weight, config).view(*x.shape[:-1], rows)


def problem_of(m: int, columns: int, weight: Blocks) -> Problem:
    """A product, as its launch is looked up."""
    rows = weight.scales.shape[1]
    # what a program goes through depends on how many blocks there are, not on the columns
    steps = max(1, len(weight.codes) * 64 // rows)
    return Problem(m, rows, columns, weight.group, 128 // weight.group, steps)


def choose(m: int, columns: int, weight: Blocks, gpu: Gpu) -> Config:
    """The launch measured for the nearest shape; else by a rule."""
    problem = problem_of(m, columns, weight)
    return measured("w4_bsr_matmul", problem, gpu) or rule_for_short_steps(problem, gpu, 2)


def launch(x: Tensor, weight: Blocks, config: Config, out: Tensor | None = None) -> Tensor:
    """One launch of the kernel: x ``[M, K]`` to ``[M, N]``, in the dtype of x or into `out`."""
    codes, rowptr, colidx, scales, zero_points, kwidth = weight
    steps, rows, _ = scales.shape
    m = x.shape[0]
    y = x.new_empty(m, rows) if out is None else out
    if m == 0:
        return y
    x = torch.nn.functional.pad(x, (0, steps * 128 - x.shape[1])).contiguous()
    programs = (triton.cdiv(rows, 64), triton.cdiv(m, config.block_m))
    parts, counters = for_parts(y, config.split_k, programs, 64 * config.block_m)
    matmul_kernel[(*programs, config.split_k)](
        x, codes, rowptr, colidx, scales.view(torch.int32), codes if zero_points is None else zero_points,
        parts, counters, y, m, rows, x.shape[1],
        G=weight.group, BM=config.block_m, KW=kwidth, SPLIT=config.split_k, STAGES=config.stages,
        PRE=prescaled(weight.group, config.block_m), ASYM=zero_points is not None,
        ASM=not INTERPRETED, F32=INTERPRETED, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def decoded(weight: Blocks, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` with its zeros, in bfloat16 or float16."""
    codes, rowptr, colidx, scales, zero_points, kwidth = weight
    rows = scales.shape[1]
    dense = torch.zeros(rows, columns, dtype=dtype, device=codes.device)
    decode_kernel[(triton.cdiv(rows, 64), min(8, scales.shape[0]))](
        codes, rowptr, colidx, scales.view(torch.int32), codes if zero_points is None else zero_points,
        dense, rows, columns,
        G=weight.group, KW=kwidth, ASYM=zero_points is not None, ASM=not INTERPRETED, num_warps=4,
    )  # fmt: skip
    return dense


def compiled(capability: int, config: Config, group: int, zero_points: bool) -> Compiled:
    """The kernel for a GPU that need not be here, for bfloat16 and sizes divisible by 16."""
    types = {
        "x_ptr": "*bf16", "q_ptr": "*i32", "rp_ptr": "*i32", "ci_ptr": "*i32", "s_ptr": "*i32",
        "z_ptr": "*i32", "part_ptr": "*fp32", "count_ptr": "*i32", "y_ptr": "*bf16",
        "M": "i32", "N": "i32", "K": "i32",
    }  # fmt: skip
    constants = {
        "G": group, "BM": config.block_m, "KW": kwidth_for(divmod(capability, 10)), "SPLIT": config.split_k,
        "STAGES": config.stages, "PRE": prescaled(group, config.block_m), "ASYM": zero_points, "ASM": True,
        "F32": False,
    }  # fmt: skip
    aligned = [n for n in types if n != "M"]
    return compile_for(matmul_kernel, types, constants, aligned, capability, config.warps, config.stages)
