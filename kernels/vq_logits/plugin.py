"""The lookups of `compress::vq_logits` for hosts that launch PTX: the same kernel, its arguments in the order
of a plugin; see `compress.kernels.w4_matmul.plugin`. The host multiplies by the codebooks. Importing this
file needs `triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.ptx import POINTERS, Launch, Ptx, emit
from compress.kernels.vq_logits.layout import dtype_of, pack
from compress.kernels.vq_logits.triton import BLOCK_M, blocks, gather_kernel

CONFIGS = tuple((*blocks(m), 8 if m == 16 else 4) for m in BLOCK_M)
"""What a host can choose from, for few rows and for many: rows, tokens and warps of one program. Four warps
with sixteen rows spill on sm120 where products are float16: `ptxas` then keeps to 64 registers."""

_STAGES = 3
"""Triton's default. All loads stand one after the other, so nothing is pipelined."""

_CODES = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}


@triton.jit
def plugin_kernel(
    part_ptr,
    codes_ptr,
    bias_ptr,
    M,
    V,
    y_ptr,
    STARTS: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BIAS: tl.constexpr,
    SUB: tl.constexpr,
):
    """`gather_kernel` without the largest logits of a few tokens, which nothing is selected from."""
    gather_kernel(part_ptr, codes_ptr, bias_ptr, y_ptr, y_ptr, M, V, STARTS, BM, BV, BIAS, SUB)


def packed(codes: Tensor, sizes: Sequence[int], token_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes ``[stages, V]`` as the plugin takes them, and always biases ``[V]``."""
    return pack(codes, sizes), torch.zeros(codes.shape[1]) if token_bias is None else token_bias


def launches(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    biases: torch.dtype,
    capability: int,
    sizes: Sequence[int],
) -> list[Launch]:
    """Every launch that a head can have: one for each of `CONFIGS`.

    A launch takes at most 65,535 blocks of rows, and 2^31 products.

    Args:
        shapes: of the products with the codebooks ``[E, ...]``, codes and biases, as `packed` makes them.
        dtype: of products and logits ``[..., V]``: float16 or bfloat16.
        biases: their dtype.
        capability: 90 for 9.0.
        sizes: entries of each codebook, E together.
    """
    _, _, (tokens,) = shapes
    starts = tuple(sum(sizes[:stage]) for stage in range(len(sizes)))
    found = []
    for config in CONFIGS:
        ptx = _emit(config, starts, dtype_of(sizes), dtype, biases, tokens % 16 == 0, capability)
        rows, block, _ = config
        found.append(Launch(ptx, triton.cdiv(tokens, block), rows, (tokens,)))
    return found


@functools.cache
def _emit(
    config: tuple[int, int, int],
    starts: tuple[int, ...],
    codes: torch.dtype,
    dtype: torch.dtype,
    biases: torch.dtype,
    even_tokens: bool,
    capability: int,
) -> Ptx:
    types = {
        "part_ptr": POINTERS[dtype], "codes_ptr": _CODES[codes], "bias_ptr": POINTERS[biases],
        "M": "i32", "V": "i32", "y_ptr": POINTERS[dtype],
    }  # fmt: skip
    uneven = {"M"} | (set() if even_tokens else {"V"})
    rows, block, warps = config
    fixed = {"STARTS": starts, "BM": rows, "BV": block, "BIAS": True, "SUB": 0}
    return emit(plugin_kernel, types, fixed, uneven, capability, warps, _STAGES)
