"""`compress::low_rank_matmul` in Triton. Importing this file needs `triton`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.inspection import Compiled, compile_for
from compress.kernels.low_rank_matmul.cost import BLOCK_N, ROWS

INTERPRETED = bool(triton.knobs.runtime.interpret)
STAGES = 4


@triton.jit
def low_rank_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    F32: tl.constexpr,
):
    """``y[M, N] = (x[M, K] @ a[R, K]^T) @ b[N, R]^T + bias`` for `BN` columns of y and all its rows.

    BR: a power of two, at least R. EVEN: it is R, and BK divides K.
    """
    rm = tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rr = tl.arange(0, BR)
    rk = tl.arange(0, BK)
    # asked for before the loop, there after it
    b = tl.load(b_ptr + rn[:, None] * R + rr[None, :], mask=(rn < N)[:, None] & (rr < R)[None, :], other=0.0)
    a_ptrs = a_ptr + rr[:, None] * K + rk[None, :]
    x_ptrs = x_ptr + rm[None, :] * K + rk[:, None]
    middle = tl.zeros((BR, BM), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if EVEN:
            a = tl.load(a_ptrs + k)
            x = tl.load(x_ptrs + k, mask=(rm < M)[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs + k, mask=(rr < R)[:, None] & (rk + k < K)[None, :], other=0.0)
            x = tl.load(x_ptrs + k, mask=(rm < M)[None, :] & (rk + k < K)[:, None], other=0.0)
        if F32:  # bfloat16 is wrong in the interpreter
            a = a.to(tl.float32)
            x = x.to(tl.float32)
        middle = tl.dot(a, x, middle, input_precision="ieee")
    rounded = middle.to(b_ptr.dtype.element_ty)
    if F32:
        rounded = rounded.to(tl.float32)
        b = b.to(tl.float32)
    y = tl.dot(b, rounded, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    mask = (rn < N)[:, None] & (rm < M)[None, :]
    tl.store(y_ptr + rm[None, :] * N + rn[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(x: Tensor, first: Tensor, last: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """One launch: x ``[M, K]``, at most 16 rows, to ``[M, N]``, in the dtype of x or into `out`."""
    (m, columns), (outputs, rank) = x.shape, last.shape
    y = x.new_empty(m, outputs) if out is None else out
    block_r, block_k = blocks(rank)
    low_rank_kernel[(triton.cdiv(outputs, BLOCK_N),)](
        x.contiguous(), first.contiguous(), last.contiguous(), last if bias is None else bias.contiguous(), y,
        m, outputs, columns, rank,
        BM=ROWS, BN=BLOCK_N, BK=block_k, BR=block_r, STAGES=STAGES,
        EVEN=block_r == rank and columns % block_k == 0, BIAS=bias is not None, F32=INTERPRETED,
        num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return y


def blocks(rank: int) -> tuple[int, int]:
    """The rank as a power of two, and the columns of one step: no more than 16 kB of the first factor."""
    block_r = max(16, triton.next_power_of_2(rank))
    return block_r, 128 if block_r <= 64 else 64


def compiled(capability: int, rank: int) -> Compiled:
    """The kernel for a GPU that need not be here, for bfloat16 and sizes divisible by 16."""
    types = {
        "x_ptr": "*bf16", "a_ptr": "*bf16", "b_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16",
        "M": "i32", "N": "i32", "K": "i32", "R": "i32",
    }  # fmt: skip
    block_r, block_k = blocks(rank)
    constants = {
        "BM": ROWS, "BN": BLOCK_N, "BK": block_k, "BR": block_r, "STAGES": STAGES, "EVEN": True, "BIAS": True,
        "F32": False,
    }  # fmt: skip
    aligned = [name for name in types if name != "M"]
    return compile_for(low_rank_kernel, types, constants, aligned, capability, 4, STAGES)
