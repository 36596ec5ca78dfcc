"""Layouts of packed codes in GPU memory: the order in which the tensor cores' operands want them.

A layout is a permutation of the canonical codes (`compress.encoding`), made once when a model is loaded.
The weight ``W[N, K]`` is the left operand of ``y^T = W x^T``, so that the many output features fill the rows
of the matrix instruction, whatever the batch.

**frag16**, operand A of the 16-bit instructions: ``int32 [N/16, K/64, 32, 4]``, one tile of 16 rows and 64
columns for each of the 32 lanes of a warp and four words. Lane ``4*g + t`` (``g < 8``, ``t < 4``) holds in
word ``j``, at bit ``4*r + 16*h`` with ``r = r0 + 2*r1``, the code of::

    row     16*n + 8*r0 + g
    column  64*k + 16*j + 8*r1 + 2*t + h        kw = 2: wgmma (sm_90)
    column  64*k + 16*j + 4*t + 2*r1 + h        kw = 4: mma.sync, as Triton orders it (sm_80, sm_89, sm_120)

That is where ``mma.m16n8k16`` has a lane's elements (PTX ISA, "Matrix Fragments"): masking a shifted word
gives one register of the operand. A lane loads 16 bytes, a warp 512 in a row.

**frag8**, operand A of the 8-bit integer instructions: ``int32 [N/16, K/64, 32, 4]`` likewise. In word
``2*i + j``, at bit ``8*c + 4*r``, stands the code less 8, in two's complement, of::

    row     16*n + 8*r + g
    column  64*k + 32*i + 16*j + 4*t + c

That is the order of ``mma.m16n8k32`` and of wgmma for 8-bit integers: the high nibbles of a word are one
register of the operand, 16 times the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

KWIDTHS = (2, 4)
"""Neighbouring columns that one lane holds: the two forms of frag16."""


def pack_frag16(codes: Tensor, kwidth: int) -> Tensor:
    """Permute 4-bit codes to frag16.

    Args:
        codes: uint8 ``[N, K]``, one code below 16 per element; N a multiple of 16, K of 64.
        kwidth: 2 or 4.

    Returns:
        int32 ``[N/16, K/64, 32, 4]``.
    """
    tiles = _tiles(codes, kwidth)
    words = torch.zeros(tiles.shape[:5], dtype=torch.int32, device=codes.device)
    for r0, r1, h in _places():
        words |= tiles[..., r0, r1, h].to(torch.int32) << _bit(r0, r1, h)
    return words.flatten(2, 3)


def unpack_frag16(words: Tensor, kwidth: int) -> Tensor:
    """The inverse of `pack_frag16`: int32 ``[N/16, K/64, 32, 4]`` to uint8 ``[N, K]``."""
    codes = torch.empty(words.shape[0] * 16, words.shape[1] * 64, dtype=torch.uint8, device=words.device)
    tiles, lanes = _tiles(codes, kwidth), words.unflatten(2, (8, 4))
    for r0, r1, h in _places():
        tiles[..., r0, r1, h] = ((lanes >> _bit(r0, r1, h)) & 15).to(torch.uint8)
    return codes


def _tiles(codes: Tensor, kwidth: int) -> Tensor:
    """A view ``[N/16, K/64, g, t, j, r0, r1, h]`` of ``[N, K]``."""
    if kwidth == 2:
        return codes.view(codes.shape[0] // 16, 2, 8, codes.shape[1] // 64, 4, 2, 4, 2).permute(
            0, 3, 2, 6, 4, 1, 5, 7
        )
    return codes.view(codes.shape[0] // 16, 2, 8, codes.shape[1] // 64, 4, 4, 2, 2).permute(
        0, 3, 2, 5, 4, 1, 6, 7
    )


def pack_frag8(codes: Tensor) -> Tensor:
    """Permute 4-bit codes to frag8.

    Args:
        codes: uint8 ``[N, K]``, one code below 16 per element, 8 means zero; N a multiple of 16, K of 64.

    Returns:
        int32 ``[N/16, K/64, 32, 4]``.
    """
    tiles = _byte_tiles(codes ^ 8)  # less 8, in two's complement
    words = torch.zeros(tiles.shape[:6], dtype=torch.int32, device=codes.device)
    for c in range(4):
        for r in range(2):
            words |= tiles[..., c, r].to(torch.int32) << (8 * c + 4 * r)
    return words.flatten(4, 5).flatten(2, 3)


def unpack_frag8(words: Tensor) -> Tensor:
    """The inverse of `pack_frag8`: int32 ``[N/16, K/64, 32, 4]`` to uint8 ``[N, K]``."""
    codes = torch.empty(words.shape[0] * 16, words.shape[1] * 64, dtype=torch.uint8, device=words.device)
    tiles, lanes = _byte_tiles(codes), words.unflatten(3, (2, 2)).unflatten(2, (8, 4))
    for c in range(4):
        for r in range(2):
            tiles[..., c, r] = ((lanes >> (8 * c + 4 * r)) & 15).to(torch.uint8) ^ 8
    return codes


def _byte_tiles(codes: Tensor) -> Tensor:
    """A view ``[N/16, K/64, g, t, i, j, c, r]`` of ``[N, K]``."""
    rows, columns = codes.shape
    return codes.view(rows // 16, 2, 8, columns // 64, 2, 2, 4, 4).permute(0, 3, 2, 6, 4, 5, 7, 1)


def _places() -> list[tuple[int, int, int]]:
    return [(r0, r1, h) for r0 in range(2) for r1 in range(2) for h in range(2)]


def _bit(r0: int, r1: int, h: int) -> int:
    return 4 * (r0 + 2 * r1) + 16 * h
