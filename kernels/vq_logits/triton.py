"""`compress::vq_logits` in Triton. Importing this file needs `triton`.

A head of V tokens, E entries and N columns reads ``2 E N`` bytes of codebooks, a byte or two per stage and
token of codes, and writes its logits: for a vocabulary of 128,256, four codebooks of 256 entries and 4,096
columns 9.5 MB at one row of x, where the dense head reads 1.05 GB. As the operators of the graph that takes
thirteen launches, each of which costs about as much as 9 MB by what is assumed of launches in
`compress.kernels.low_rank_matmul.cost`; here it takes two, and the exact logits of candidates two more:

1. products of all entries, by cuBLAS, as ``[E, M]`` in float32, so that the values of one entry for
   neighbouring rows of x lie side by side;
2. `gather_kernel`: they are looked up and summed in registers. Of each few tokens the largest logit is kept;
3. `select_kernel`: the k first tokens, exactly. The k-th largest of these maxima bounds the k-th largest
   logit from below: the candidates are among the tokens of k maxima, and few enough for one program. A k-th
   largest number is found by bisection of its bits;
4. `rescore_kernel`: their exact logits.

These are counts and arithmetic; nothing here has been timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.inspection import Compiled, compile_for

BLOCK_M = (1, 2, 4, 8, 16)
"""Rows of x that one program gathers for: the products of a thousand entries for 16 rows are 64 kB."""

ROWS = 8192
"""Rows of x whose products are held at a time; grids and offsets of 32 bits go no further than some more."""

SELECTED = 8192
"""Numbers that one program holds while it looks for the largest; beyond, `torch.topk`."""

RESCORED = (2, 1024)
"""Rows and columns of the dense head that one program takes at a time."""


@triton.jit
def gather_kernel(
    part_ptr,
    codes_ptr,
    bias_ptr,
    y_ptr,
    top_ptr,
    M,
    V,
    STARTS: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BIAS: tl.constexpr,
    SUB: tl.constexpr,
):
    """Logits ``y[M, V]`` from products ``part[E, M]``; with SUB, of each SUB tokens the largest one.

    STARTS: the first entry of the codebook of each stage.
    """
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (v < V)[:, None] & (m < M)[None, :]
    total = tl.zeros((BV, BM), tl.float32)
    for stage in tl.static_range(len(STARTS)):
        code = tl.load(codes_ptr + stage * V + v, mask=v < V, other=0).to(tl.int32) + STARTS[stage]
        total += tl.load(part_ptr + code[:, None] * M + m[None, :], mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[:, None]
    logits = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[None, :].to(tl.int64) * V + v[:, None], logits, mask=mask)
    if SUB:
        # as they are stored: what is selected is read from there
        stored = tl.where(mask, logits.to(tl.float32), float("-inf"))
        top = tl.max(stored.reshape(BV // SUB, SUB, BM), 1)
        s = tl.program_id(0) * (BV // SUB) + tl.arange(0, BV // SUB)
        count = tl.cdiv(V, SUB)
        tl.store(top_ptr + m[None, :] * count + s[:, None], top, mask=(s < count)[:, None] & (m < M)[None, :])


@triton.jit
def ordered(values):
    """float32 to uint32 in the same order; zero is less than all of them."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def largest(keys, count):
    """Which of these numbers are the `count` largest, and the place of each among them.

    Of equal ones the first are taken.
    """
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        trial = found | bit
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= count, trial, found)
        bit = bit >> 1
    above = (keys > found).to(tl.int32)
    equal = (keys == found).to(tl.int32)
    left = count - tl.sum(above, 0)
    chosen = above | (equal & (tl.cumsum(equal, 0) <= left).to(tl.int32))
    return chosen != 0, tl.cumsum(chosen, 0) - 1


@triton.jit
def select_kernel(
    y_ptr,
    top_ptr,
    chosen_ptr,
    V,
    K,
    SUB: tl.constexpr,
    TOPS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The K tokens of the largest logits of one row: int32 ``chosen[M, K]``.

    TOPS, KEPT: powers of two that are at least ``ceil(V / SUB)`` and K.
    """
    m = tl.program_id(0)
    count = tl.cdiv(V, SUB)
    out = chosen_ptr + m * K
    s = tl.arange(0, TOPS)
    tops = tl.load(top_ptr + m * count + s, mask=s < count, other=0.0)
    chosen, place = largest(tl.where(s < count, ordered(tops), 0), K)
    tl.store(out + place, s, mask=chosen)
    tl.debug_barrier()
    i = tl.arange(0, KEPT * SUB)
    kept = i // SUB < K
    v = tl.load(out + i // SUB, mask=kept, other=0) * SUB + i % SUB
    tl.debug_barrier()
    kept = kept & (v < V)
    logits = tl.load(y_ptr + m.to(tl.int64) * V + v, mask=kept, other=0.0).to(tl.float32)
    chosen, place = largest(tl.where(kept, ordered(logits), 0), K)
    tl.store(out + place, v, mask=chosen)


@triton.jit
def rescore_kernel(
    x_ptr,
    rows_ptr,
    bias_ptr,
    chosen_ptr,
    y_ptr,
    N,
    V,
    K,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """``y[m, v] = rows[v] . x[m] + bias[v]`` for BC of the tokens v chosen for row m of x."""
    m = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    n = tl.arange(0, BN)
    v = tl.load(chosen_ptr + m * K + c, mask=c < K, other=0)
    row = rows_ptr + v[:, None].to(tl.int64) * N
    total = tl.zeros((BC, BN), tl.float32)
    for start in range(0, N, BN):
        k = start + n
        mask = (c < K)[:, None] & (k < N)[None, :]
        x = tl.load(x_ptr + m * N + k, mask=k < N, other=0.0).to(tl.float32)
        total += tl.load(row + k[None, :], mask=mask, other=0.0).to(tl.float32) * x[None, :]
    exact = tl.sum(total, 1)
    if BIAS:
        exact += tl.load(bias_ptr + v, mask=c < K, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * V + v, exact.to(y_ptr.dtype.element_ty), mask=c < K)


def vq_logits(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
) -> Tensor:
    """See `compress.kernels.vq_logits.op.vq_logits`; x in float32, bfloat16 or float16."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = flat.new_empty(len(flat), codes.shape[1])
    for part, out in zip(flat.split(ROWS), y.split(ROWS), strict=True):
        launch(part, codebook, codes, sizes, token_bias, rows, bias, candidates, out)
    return y.view(*x.shape[:-1], codes.shape[1])


def launch(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
    out: Tensor | None = None,
) -> Tensor:
    """The launches for x ``[M, N]``, to ``[M, V]`` in the dtype of x or into `out`."""
    (m, columns), tokens = x.shape, codes.shape[1]
    y = x.new_empty(m, tokens) if out is None else out
    if m == 0:
        return y
    part = products(x, codebook)
    sub = subtile(tokens, candidates) if rows is not None else 0
    tops = x.new_empty((m, triton.cdiv(tokens, sub)) if sub else 0, dtype=torch.float32)
    block_m, block_v = blocks(m)
    starts = tuple(sum(sizes[:stage]) for stage in range(len(sizes)))
    gather_kernel[(triton.cdiv(tokens, block_v), triton.cdiv(m, block_m))](
        part, codes.contiguous(), codes if token_bias is None else token_bias.contiguous(), y, tops,
        m, tokens,
        STARTS=starts, BM=block_m, BV=block_v, BIAS=token_bias is not None, SUB=sub, num_warps=4,
    )  # fmt: skip
    if rows is None:
        return y
    chosen = selected(y, tops, candidates, sub)
    rescore_kernel[(triton.cdiv(candidates, RESCORED[0]), m)](
        x.contiguous(), rows.contiguous(), rows if bias is None else bias.contiguous(), chosen, y,
        columns, tokens, candidates,
        BC=RESCORED[0], BN=RESCORED[1], BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return y


def products(x: Tensor, codebook: Tensor) -> Tensor:
    """``codebook[E, N] @ x[M, N]^T`` in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.ops.aten.mm.dtype(codebook, x.t(), torch.float32)
    return codebook.float() @ x.float().t()


def blocks(m: int) -> tuple[int, int]:
    """Rows of x and tokens of one program of `gather_kernel`."""
    block_m = next((b for b in BLOCK_M if m <= b), BLOCK_M[-1])
    return block_m, max(128, 512 // block_m)


def subtile(tokens: int, candidates: int) -> int:
    """Of how many tokens the largest logit is kept, a power of two up to 128; 0 where it would not pay.

    As few numbers as possible for `select_kernel`: the maxima, and then the tokens of the k largest.

    >>> subtile(128256, 256), subtile(32000, 64), subtile(128256, 8192)
    (16, 16, 0)
    """
    sizes = [1 << i for i in range(8) if candidates << i <= tokens]
    held = {sub: sum(_held(tokens, candidates, sub)) for sub in sizes}
    best = min(held, key=held.__getitem__)
    return best if max(_held(tokens, candidates, best)) <= SELECTED else 0


def _held(tokens: int, candidates: int, sub: int) -> tuple[int, int]:
    """Numbers that `select_kernel` holds in its two steps."""
    return triton.next_power_of_2(triton.cdiv(tokens, sub)), triton.next_power_of_2(candidates) * sub


def selected(y: Tensor, tops: Tensor, candidates: int, sub: int) -> Tensor:
    """The candidates of each row of y, in any order: integers ``[M, candidates]``."""
    if not sub:
        return y.topk(candidates, -1, sorted=False).indices
    chosen = torch.empty(len(y), candidates, dtype=torch.int32, device=y.device)
    count, kept = _held(y.shape[1], candidates, sub)
    select_kernel[(len(y),)](
        y, tops, chosen, y.shape[1], candidates,
        SUB=sub, TOPS=count, KEPT=kept // sub, num_warps=warps(max(count, kept)),
    )  # fmt: skip
    return chosen


def warps(held: int) -> int:
    """Of a program of `select_kernel` with so many numbers: sixteen for each thread, as far as that goes.

    Not 32: a thread would have 64 registers, and spill.
    """
    return max(4, min(16, held // 512))


def compiled(
    kernel: str, capability: int, m: int, tokens: int, stages: int = 4, candidates: int = 256
) -> Compiled:
    """A kernel for a GPU that need not be here, for bfloat16 and sizes divisible by 16, m aside.

    Args:
        kernel: "gather", "select" or "rescore".
    """
    sub, (block_m, block_v) = subtile(tokens, candidates), blocks(m)
    count, kept = _held(tokens, candidates, sub)
    y: dict[str, str] = {"y_ptr": "*bf16", "V": "i32"}
    if kernel == "gather":
        types = {**y, "part_ptr": "*fp32", "codes_ptr": "*u8", "bias_ptr": "*bf16", "top_ptr": "*fp32"}
        constants: dict[str, Any] = {"STARTS": tuple(256 * s for s in range(stages)), "BM": block_m}
        constants |= {"BV": block_v, "BIAS": True, "SUB": sub}
        aligned = list(types)
        if m == 1:
            constants["M"] = 1  # as Triton compiles it at run time
        else:
            types["M"] = "i32"
        return compile_for(gather_kernel, types, constants, aligned, capability, 4, 3)
    types = {**y, "chosen_ptr": "*i32", "K": "i32"}
    if kernel == "select":
        types["top_ptr"] = "*fp32"
        constants = {"SUB": sub, "TOPS": count, "KEPT": kept // sub}
        held = warps(max(count, kept))
        return compile_for(select_kernel, types, constants, list(types), capability, held, 3)
    types |= {"x_ptr": "*bf16", "rows_ptr": "*bf16", "bias_ptr": "*bf16", "N": "i32"}
    constants = {"BC": RESCORED[0], "BN": RESCORED[1], "BIAS": True}
    return compile_for(rescore_kernel, types, constants, list(types), capability, 4, 3)
