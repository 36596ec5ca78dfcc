"""The layouts of a 4-bit weight with 2:4 sparsity that `compress::w4_sparse24_matmul` takes.

``canonical`` is `compress.encoding`, with its zeros: of every four columns in a row at most two have a code
other than the zero point. ``sp24`` keeps two of four, in the order of ``mma.sp.m16n8k32`` (PTX ISA, "Matrix
Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types"), for the 32 lanes ``4*g + t`` of a warp::

    codes        int32 [N/16, K/128, 32, 4]  word j: the tile of columns 32*j to 32*j + 31; at bit 4*r + 16*h,
                                             r = r0 + 2*r1: row g + 8*r0, kept column 8*r1 + 2*t + h
    metadata     int32 [N/16, K/128, 32, 2]  word i: tile 2*i + t//2, columns 16*(t%2) to 16*(t%2) + 15;
                                             at bit 4*q + 2*s + 16*r0: place of kept column s of four q
    scales       [K/128, N, 4]               one per 32 columns, in the dtype they were given
    zero_points  int32 [K/128, N]            byte b of a word: zero point of columns 32*b and on; None: 8

Kept columns 2*q and 2*q + 1 are those of the columns 4*q to 4*q + 3, in order: three bits for each weight of
the dense matrix, scales aside. N and K are padded to 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.encoding import pack as pack_bits
from compress.encoding import unpack as unpack_bits
from compress.errors import PassError
from compress.kernels.operands import check_layout
from compress.kernels.w4_matmul.layout import pack_scales, unpack_scales, zero_points_of

LAYOUTS = ("canonical", "sp24")
ROWS = 128
"""The rows of a weight are padded to a multiple of this."""

GROUP = 32
"""Columns per scale in the device layout: those of one instruction."""

Packed = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def pack(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int, columns: int, layout: str
) -> Packed:
    """Bring a canonical 4-bit weight with 2:4 sparsity into a layout.

    Args:
        codes: uint8 ``[N, ceil(columns/2)]``.
        scales: ``[N, groups]``.
        zero_points: uint8 ``[N, ceil(groups/2)]``, or None for the constant 8.
        group_size: columns per scale: a multiple of 32, or at least `columns`.
        columns: K.
        layout: ``canonical`` or ``sp24``.

    Returns:
        codes, metadata (None for ``canonical``), scales and zero points.

    Raises:
        PassError: more than two of four weights are not zero, or groups of this size do not fit.
    """
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, None, scales, zero_points
    if group_size % GROUP and group_size < columns:
        raise PassError(
            f"groups of {group_size} columns do not fit the sparse tensor cores",
            expected="a multiple of 32, or one group for the whole row",
            fix='keep layout="canonical" for this weight',
        )
    rows, steps = len(scales), math.ceil(columns / 128)
    spread, words = pack_scales(scales, zero_points, max(group_size, GROUP), GROUP, 4, steps)
    zeros = _zeros(words, rows, steps, codes.device)
    dense = zeros.repeat_interleave(GROUP, 1)
    dense[:, :columns] = unpack_bits(codes, 4, columns)
    fours, zero_of = dense.view(rows, -1, 4), zeros.repeat_interleave(GROUP // 4, 1).unsqueeze(-1)
    used = fours != zero_of
    if int(used.sum(-1).max()) > 2:
        raise PassError(
            "more than two of four weights in a row are not zero",
            expected="2:4 sparsity along the columns",
            fix='prune with pattern "2:4" first',
        )
    # stable: the places in use come first, in order; where fewer than two are, unused ones fill up
    order = torch.argsort((~used).to(torch.uint8), dim=-1, stable=True)[..., :2].sort(-1).values
    kept = fours.gather(-1, order)
    fill = (0, 0, 0, 0, 0, -rows % ROWS)
    kept = torch.nn.functional.pad(kept, fill, value=8)
    places = torch.nn.functional.pad(order, fill)
    places[rows:, :, 1] = 1  # two places are never the same
    return _pack_codes(kept.flatten(1)), _pack_metadata(places), spread, words


def unpack(
    codes: Tensor,
    metadata: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: canonical codes, scales and zero points."""
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, scales, zero_points
    assert metadata is not None
    steps, rows, _ = scales.shape
    dense = _zeros(zero_points, rows, steps, codes.device).repeat_interleave(GROUP, 1)
    places = _unpack_metadata(metadata)[:rows]
    kept = _unpack_codes(codes)[:rows].view(rows, -1, 2)
    dense.view(rows, -1, 4).scatter_(-1, places, kept)
    return pack_bits(dense[:, :columns], 4), *unpack_scales(scales, zero_points, group_size, GROUP, columns)


def _zeros(words: Tensor | None, rows: int, steps: int, device: torch.device) -> Tensor:
    """Zero points one by one: uint8 ``[N, 4 * steps]``."""
    if words is None:
        return torch.full((rows, 4 * steps), 8, dtype=torch.uint8, device=device)
    return zero_points_of(words, 4)


def _code_tiles(kept: Tensor) -> Tensor:
    """A view ``[N/16, K/128, g, t, j, r0, r1, h]`` of the kept columns ``[N, K/2]``."""
    tiles = kept.view(kept.shape[0] // 16, 2, 8, kept.shape[1] // 64, 4, 2, 4, 2)
    return tiles.permute(0, 3, 2, 6, 4, 1, 5, 7)


def _code_bits() -> list[tuple[int, int, int, int]]:
    places = [(r0, r1, h) for r0 in range(2) for r1 in range(2) for h in range(2)]
    return [(r0, r1, h, 4 * (r0 + 2 * r1) + 16 * h) for r0, r1, h in places]


def _pack_codes(kept: Tensor) -> Tensor:
    tiles = _code_tiles(kept)
    words = torch.zeros(tiles.shape[:5], dtype=torch.int32, device=kept.device)
    for r0, r1, h, bit in _code_bits():
        words |= tiles[..., r0, r1, h].to(torch.int32) << bit
    return words.flatten(2, 3)


def _unpack_codes(words: Tensor) -> Tensor:
    kept = torch.empty(words.shape[0] * 16, words.shape[1] * 64, dtype=torch.uint8, device=words.device)
    tiles, lanes = _code_tiles(kept), words.unflatten(2, (8, 4))
    for r0, r1, h, bit in _code_bits():
        tiles[..., r0, r1, h] = ((lanes >> bit) & 15).to(torch.uint8)
    return kept


def _place_tiles(places: Tensor) -> Tensor:
    """A view ``[N/16, K/128, g, t//2, t%2, i, r0, q, s]`` of the places ``[N, K/4, 2]``."""
    tiles = places.view(places.shape[0] // 16, 2, 8, places.shape[1] // 32, 2, 2, 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 6, 4, 1, 7, 8)


def _place_bits() -> list[tuple[int, int, int, int]]:
    return [(r0, q, s, 4 * q + 2 * s + 16 * r0) for r0 in range(2) for q in range(4) for s in range(2)]


def _pack_metadata(places: Tensor) -> Tensor:
    tiles = _place_tiles(places)
    words = torch.zeros(tiles.shape[:6], dtype=torch.int32, device=places.device)
    for r0, q, s, bit in _place_bits():
        words |= tiles[..., r0, q, s].to(torch.int32) << bit
    return words.flatten(2, 4)


def _unpack_metadata(words: Tensor) -> Tensor:
    places = torch.empty(words.shape[0] * 16, words.shape[1] * 32, 2, dtype=torch.int64, device=words.device)
    tiles, lanes = _place_tiles(places), words.unflatten(2, (8, 2, 2))
    for r0, q, s, bit in _place_bits():
        tiles[..., r0, q, s] = ((lanes >> bit) & 3).long()
    return places
