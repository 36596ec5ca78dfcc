"""`compress::w4_sparse24_matmul` in Triton: the sparse matrix instruction, which Triton itself does not know.

``mma.sp`` takes the kept half of the weights, and two bits for each that say where it belongs. It is reached
by inline assembly on four words of each lane at once: a tensor ``[threads, 4]`` whose rows are threads, so
the compiler must give row 32*w + l to lane l of warp w. It does where the tests look, but promises nothing.
Importing this file needs `triton`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.inspection import Compiled, compile_for
from compress.kernels.launching import for_parts
from compress.kernels.tiles import BF16_ADDEND, FP16_ADDEND
from compress.kernels.tuning import Gpu

CROSS_OVER = 64
"""Rows of `x` above which the weight is decoded once and multiplied by torch."""

WARPS = 4
STAGES = 3
SCALES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _asm(fp16: bool, blocks: int) -> str:
    """One tile of 16 rows and 128 columns times `blocks` times 8 rows of x.

    Operands, four registers each: sums for each block; then words, four of x for each block, both words of
    metadata, addends of rows g and g + 8, scales of rows g and g + 8.
    """
    magic, one, kind, name = "0x43004300", "0x3f803f80", "bf16x2", "bf16"
    if fp16:
        magic, one, kind, name = "0x64006400", "0x3c003c00", "f16x2", "f16"
    first = 4 * blocks
    words, x = first, first + 4
    rest = x + 16 * blocks
    meta, low, high, low_scale, high_scale = (rest + i for i in (0, 8, 12, 16, 20))
    lines = [".reg .b32 a<4>, o, t;", ".reg .f32 d<4>, z;", f"mov.b32 o, {one};", "mov.f32 z, 0f00000000;"]
    lines += [f"mov.f32 ${i}, z;" for i in range(first)]
    for j in range(4):
        for r in range(4):
            lines.append(f"shr.u32 t, ${words + j}, {4 * r};")
            lines.append(f"lop3.b32 t, t, 0x000f000f, {magic}, 0xea;")
            lines.append(f"fma.rn.{kind} a{r}, t, o, ${(high if r % 2 else low) + j};")
        for block in range(blocks):
            operands = ", ".join(f"${x + 16 * block + 4 * i + j}" for i in range(4))
            lines.append(
                f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{name}.{name}.f32 "
                f"{{d0, d1, d2, d3}}, {{a0, a1, a2, a3}}, {{{operands}}}, {{z, z, z, z}}, "
                f"${meta + 4 * (j // 2)}, 0x{j % 2};"
            )
            for i in range(4):
                scale = (low_scale if i < 2 else high_scale) + j
                lines.append(f"fma.rn.f32 ${4 * block + i}, d{i}, ${scale}, ${4 * block + i};")
    return "{ " + "\n".join(lines) + " }"


def _constraints(blocks: int) -> str:
    # early-clobbered: sums are written before all operands are read
    return ",".join(["=&f"] * 4 * blocks + ["r"] * (4 + 16 * blocks + 16) + ["f"] * 8)


ASM_1 = tl.constexpr((_asm(False, 1), _asm(True, 1)))
ASM_2 = tl.constexpr((_asm(False, 2), _asm(True, 2)))
CONSTRAINTS_1 = tl.constexpr(_constraints(1))
CONSTRAINTS_2 = tl.constexpr(_constraints(2))


@triton.jit
def scale_four(s_ptr, row, N, step, T: tl.constexpr, SCALES: tl.constexpr):
    """The four scales of a row in one step, ``[T, 4]`` in float32."""
    j = tl.arange(0, 4)
    if tl.float32 == SCALES:
        pointers = s_ptr + (step * N + row)[:, None] * 4 + j[None, :]
        return tl.load(pointers, mask=(row < N)[:, None], other=0.0)
    else:
        four = tl.load(s_ptr + step * N + row, mask=row < N, other=0)  # int64
        half = tl.broadcast_to(four[:, None], (T, 4)) >> (16 * j)[None, :]
        if tl.bfloat16 == SCALES:
            return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def addend_four(z_ptr, row, N, step, ASYM: tl.constexpr, FP16: tl.constexpr, T: tl.constexpr):
    """What is added to the codes of a row in one step: int32 ``[T, 4]``."""
    base: tl.constexpr = FP16_ADDEND if FP16 else BF16_ADDEND
    if ASYM:
        word = tl.load(z_ptr + step * N + row, mask=row < N, other=0)
        zeros = (tl.broadcast_to(word[:, None], (T, 4)) >> (8 * tl.arange(0, 4))[None, :]) & 255
        return (zeros * 0x00010001) | base
    else:
        return tl.full((T, 4), 8 * 0x00010001, tl.int32) | base


@triton.jit
def tile_sums(
    b0, b1, b2, b3, b4, b5, b6, b7,
    q_ptr, e_ptr, s_ptr, z_ptr, n16, lane, step, N, STEPS,
    BLOCKS: tl.constexpr, T: tl.constexpr, SCALES: tl.constexpr, ASYM: tl.constexpr, FP16: tl.constexpr,
):  # fmt: skip
    """Sums over one step for a tile of 16 rows per warp: two of ``[T, 4]``, for 8 rows of x each."""
    j = tl.arange(0, 4)
    row = n16 * 16 + lane // 4
    tile = (n16 * STEPS + step) * 32 + lane
    words = tl.load(q_ptr + tile[:, None] * 4 + j[None, :], eviction_policy="evict_first")
    meta = tl.load(e_ptr + tile[:, None] * 2 + tl.arange(0, 2)[None, :], eviction_policy="evict_first")
    e0, e1 = tl.split(meta)
    e0 = tl.broadcast_to(e0[:, None], (T, 4))
    e1 = tl.broadcast_to(e1[:, None], (T, 4))
    low = addend_four(z_ptr, row, N, step, ASYM, FP16, T)
    high = addend_four(z_ptr, row + 8, N, step, ASYM, FP16, T)
    low_scale = scale_four(s_ptr, row, N, step, T, SCALES)
    high_scale = scale_four(s_ptr, row + 8, N, step, T, SCALES)
    if BLOCKS == 1:
        sums = tl.inline_asm_elementwise(
            ASM_1[FP16], CONSTRAINTS_1,
            [words, b0, b1, b2, b3, e0, e1, low, high, low_scale, high_scale],
            tl.float32, False, 4,
        )  # fmt: skip
        return sums, sums
    else:
        sums, more = tl.inline_asm_elementwise(
            ASM_2[FP16], CONSTRAINTS_2,
            [words, b0, b1, b2, b3, b4, b5, b6, b7, e0, e1, low, high, low_scale, high_scale],
            (tl.float32, tl.float32), False, 4,
        )  # fmt: skip
        return sums, more


@triton.jit
def store_tile(y_ptr, acc, m, n, M, N):
    """Sums of one tile and block to their places in y."""
    tl.store(y_ptr + m.to(tl.int64) * N + n, acc.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def sparse_kernel(
    x_ptr,
    q_ptr,
    e_ptr,
    s_ptr,
    z_ptr,
    part_ptr,
    count_ptr,
    y_ptr,
    M,
    N,
    K,
    STEPS,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    SCALES: tl.constexpr,
    ASYM: tl.constexpr,
    FP16: tl.constexpr,
):
    """``y = x @ W^T`` for two tiles of 16 columns of y per warp, 8 rows for each block, and a part of K.

    x is read as int32, two elements at a time, so K is half its columns.
    """
    T: tl.constexpr = 32 * WARPS
    thread = tl.arange(0, T)
    lane = thread % 32
    g = lane // 4
    t = lane % 4
    j = tl.arange(0, 4)
    n16 = tl.program_id(0) * (2 * WARPS) + thread // 32
    first_m = tl.program_id(1) * (8 * BLOCKS)
    # rows past the last one read it again: their sums are not stored. Places of rows need 64 bits: hosts of
    # plugins come with any number of them
    row0 = tl.minimum(first_m + g, M - 1).to(tl.int64)
    row1 = tl.minimum(first_m + 8 + g, M - 1).to(tl.int64)
    x0 = x_ptr + row0[:, None] * K + (t[:, None] + 16 * j[None, :])
    x1 = x_ptr + row1[:, None] * K + (t[:, None] + 16 * j[None, :])
    per = tl.cdiv(STEPS, SPLIT)
    pid_k = tl.program_id(2)
    acc0 = tl.zeros((T, 4), tl.float32)
    acc1 = tl.zeros((T, 4), tl.float32)
    acc2 = tl.zeros((T, 4), tl.float32)
    acc3 = tl.zeros((T, 4), tl.float32)
    for step in tl.range(pid_k * per, tl.minimum(pid_k * per + per, STEPS), num_stages=STAGES):
        k = step * 64
        b0 = tl.load(x0 + k)
        b1 = tl.load(x0 + k + 4)
        b2 = tl.load(x0 + k + 8)
        b3 = tl.load(x0 + k + 12)
        b4 = b0
        b5 = b1
        b6 = b2
        b7 = b3
        if BLOCKS == 2:
            b4 = tl.load(x1 + k)
            b5 = tl.load(x1 + k + 4)
            b6 = tl.load(x1 + k + 8)
            b7 = tl.load(x1 + k + 12)
        sums, more = tile_sums(
            b0, b1, b2, b3, b4, b5, b6, b7, q_ptr, e_ptr, s_ptr, z_ptr, n16, lane, step, N, STEPS,
            BLOCKS, T, SCALES, ASYM, FP16,
        )  # fmt: skip
        acc0 += sums
        if BLOCKS == 2:
            acc1 += more
        sums, more = tile_sums(
            b0, b1, b2, b3, b4, b5, b6, b7, q_ptr, e_ptr, s_ptr, z_ptr, n16 + WARPS, lane, step, N, STEPS,
            BLOCKS, T, SCALES, ASYM, FP16,
        )  # fmt: skip
        acc2 += sums
        if BLOCKS == 2:
            acc3 += more
    m = first_m + 2 * t[:, None] + (j % 2)[None, :]
    n = (n16 * 16 + g)[:, None] + 8 * (j // 2)[None, :]
    done = True
    if SPLIT > 1:
        # the last program to come adds all parts, in order: the sum is the same every time
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        parts = part_ptr + program * (16 * T) + thread[:, None] * 4 + j[None, :]
        mine = parts + pid_k * programs * (16 * T)
        tl.store(mine, acc0)
        tl.store(mine + 8 * T, acc2)
        if BLOCKS == 2:
            tl.store(mine + 4 * T, acc1)
            tl.store(mine + 12 * T, acc3)
        tl.debug_barrier()
        done = tl.atomic_add(count_ptr + program, 1, sem="acq_rel") == SPLIT - 1
        if done:
            acc0 = tl.zeros((T, 4), tl.float32)
            acc1 = tl.zeros((T, 4), tl.float32)
            acc2 = tl.zeros((T, 4), tl.float32)
            acc3 = tl.zeros((T, 4), tl.float32)
            for i in range(SPLIT):
                theirs = parts + i * programs * (16 * T)
                acc0 += tl.load(theirs, cache_modifier=".cg")
                acc2 += tl.load(theirs + 8 * T, cache_modifier=".cg")
                if BLOCKS == 2:
                    acc1 += tl.load(theirs + 4 * T, cache_modifier=".cg")
                    acc3 += tl.load(theirs + 12 * T, cache_modifier=".cg")
            tl.store(count_ptr + program, 0)
    if done:
        store_tile(y_ptr, acc0, m, n, M, N)
        store_tile(y_ptr, acc2, m, n + 16 * WARPS, M, N)
        if BLOCKS == 2:
            store_tile(y_ptr, acc1, m + 8, n, M, N)
            store_tile(y_ptr, acc3, m + 8, n + 16 * WARPS, M, N)


@triton.jit
def decode_kernel(
    q_ptr,
    e_ptr,
    s_ptr,
    z_ptr,
    w_ptr,
    N,
    K,
    STEPS,
    BN: tl.constexpr,
    ASYM: tl.constexpr,
):
    """The weight itself, ``w[N, K]`` with its zeros: `BN` rows and one step."""
    step = tl.program_id(1)
    row = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    quad = tl.arange(0, 32)[None, :]  # four columns, of which two are kept
    j = quad // 8
    lane = 4 * (row % 8)
    tile = (row // 16 * STEPS + step) * 32
    word = tl.load(q_ptr + (tile + lane + quad % 4) * 4 + j)
    kept = word >> (4 * (row % 16 // 8) + 8 * (quad % 8 // 4))
    meta = tl.load(e_ptr + (tile + lane + 2 * (j % 2) + quad % 8 // 4) * 2 + j // 2)
    places = meta >> (4 * (quad % 4) + 16 * (row % 16 // 8))
    zero = 8
    if ASYM:
        zero = (tl.load(z_ptr + step * N + row, mask=row < N, other=0) >> (8 * j)) & 255
    scale = tl.load(s_ptr + (step * N + row) * 4 + j, mask=row < N, other=0.0).to(tl.float32)
    first = ((kept & 15) - zero).to(tl.float32) * scale
    second = (((kept >> 16) & 15) - zero).to(tl.float32) * scale
    for place in tl.static_range(4):
        value = tl.where((places & 3) == place, first, 0.0)
        value = tl.where(((places >> 2) & 3) == place, second, value)
        column = step * 128 + 4 * quad + place
        pointers = w_ptr + row.to(tl.int64) * K + column
        tl.store(pointers, value.to(w_ptr.dtype.element_ty), mask=(row < N) & (column < K))


def split_of(rows: int, m: int, steps: int, gpu: Gpu) -> int:
    """Programs that share K: as many as give each multiprocessor four programs, which are small."""
    blocks = triton.cdiv(rows, 32 * WARPS) * triton.cdiv(m, 16 if m > 8 else 8)
    split = 1
    while split < 8 and 2 * split <= steps and 2 * split * blocks <= 4 * gpu.multiprocessors:
        split *= 2
    return split


def launch(
    x: Tensor,
    codes: Tensor,
    metadata: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    split: int,
    out: Tensor | None = None,
) -> Tensor:
    """One launch of the kernel: x ``[M, K]`` to ``[M, N]``, in the dtype of x or into `out`."""
    steps, rows, _ = scales.shape
    m = x.shape[0]
    y = x.new_empty(m, rows) if out is None else out
    if m == 0:
        return y
    fp16 = x.dtype == torch.float16
    x = torch.nn.functional.pad(x, (0, steps * 128 - x.shape[1])).contiguous().view(torch.int32)
    blocks = 2 if m > 8 else 1
    grid = (triton.cdiv(rows, 32 * WARPS), triton.cdiv(m, 8 * blocks))
    parts, counters = for_parts(y, split, grid, 16 * 32 * WARPS)
    stored = scales if scales.dtype == torch.float32 else scales.view(torch.int64)
    sparse_kernel[(*grid, split)](
        x, codes, metadata, stored, codes if zero_points is None else zero_points, parts, counters, y,
        m, rows, x.shape[1], steps,
        **constants(blocks, split, STAGES, scales.dtype, zero_points is not None, fp16),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y


def constants(
    blocks: int, split: int, stages: int, scales: torch.dtype, zero_points: bool, fp16: bool
) -> dict[str, Any]:
    """What a launch of the kernel fixes when it is compiled."""
    return {
        "BLOCKS": blocks, "SPLIT": split, "STAGES": stages, "WARPS": WARPS, "SCALES": SCALES[scales],
        "ASYM": zero_points, "FP16": fp16,
    }  # fmt: skip


def decoded(
    codes: Tensor,
    metadata: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``[N, K]`` with its zeros, in bfloat16 or float16."""
    steps, rows, _ = scales.shape
    weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    decode_kernel[(triton.cdiv(rows, 32), steps)](
        codes, metadata, scales, codes if zero_points is None else zero_points, weight, rows, columns, steps,
        BN=32, ASYM=zero_points is not None, num_warps=4,
    )  # fmt: skip
    return weight


def compiled_decoding(capability: int, zero_points: bool) -> Compiled:
    """The kernel behind `decoded` for a GPU that need not be here, for scales in float32."""
    types = {
        "q_ptr": "*i32", "e_ptr": "*i32", "s_ptr": "*fp32", "z_ptr": "*i32", "w_ptr": "*bf16",
        "N": "i32", "K": "i32", "STEPS": "i32",
    }  # fmt: skip
    fixed = {"BN": 32, "ASYM": zero_points}
    return compile_for(decode_kernel, types, fixed, list(types)[:-1], capability, 4, 1)


def compiled(capability: int, blocks: int, split: int, zero_points: bool) -> Compiled:
    """The kernel for a GPU that need not be here, for bfloat16 and sizes divisible by 16."""
    types = {
        "x_ptr": "*i32", "q_ptr": "*i32", "e_ptr": "*i32", "s_ptr": "*i64", "z_ptr": "*i32",
        "part_ptr": "*fp32", "count_ptr": "*i32", "y_ptr": "*bf16",
        "M": "i32", "N": "i32", "K": "i32", "STEPS": "i32",
    }  # fmt: skip
    fixed = constants(blocks, split, STAGES, torch.bfloat16, zero_points, False)
    aligned = [n for n in types if n not in ("M", "STEPS")]
    return compile_for(sparse_kernel, types, fixed, aligned, capability, WARPS, STAGES)
