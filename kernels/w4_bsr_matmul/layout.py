"""The layouts of a 4-bit weight with whole blocks of zeros that `compress::w4_bsr_matmul` takes.

``canonical`` is `compress.encoding`: a zero is a code equal to its zero point. ``bsr_kw2`` and ``bsr_kw4``
are block-sparse rows (BSR; `torch.sparse_bsr_tensor`) of blocks of 64 rows and 128 columns, of which those
with a weight other than zero are stored, each in the order of the tensor cores (`compress.kernels.layouts`)::

    codes        int32 [blocks, 4, 2, 32, 4]  one frag16 tile of 64 x 128 for each block, row by row
    rowptr       int32 [N/64 + 1]             the first block of each 64 rows, and past the last
    colidx       int32 [blocks + 1]           which 128 columns; a last 0 is read, but not used
    scales       float32 [K/128, N, S]        of all blocks, S = 1, 2 or 4 groups of 128, 64 or 32 columns
    zero_points  int32 [K/128, N]             byte b of a word: zero point of group b; None: 8

Scales and zero points of blocks that are not stored are never read on the GPU, but make the way back exact.
N is padded to 64, K to 128; longer groups, and whole rows, are stored as several with the same scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.encoding import pack as pack_bits
from compress.encoding import unpack as unpack_bits
from compress.errors import PassError
from compress.kernels.layouts import pack_frag16, unpack_frag16
from compress.kernels.operands import check_layout
from compress.kernels.w4_matmul.layout import (
    kwidth_for,
    kwidth_of,
    pack_scales,
    unpack_scales,
    zero_points_of,
)

LAYOUTS = ("canonical", "bsr_kw2", "bsr_kw4")
ROWS, COLUMNS = 64, 128
"""Of a block."""

GROUPS = (128, 64, 32)
"""Columns per scale that the kernel knows, the longest first."""

Packed = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]


def layout_for(capability: tuple[int, int]) -> str:
    """The layout for a GPU, by its compute capability.

    >>> layout_for((9, 0)), layout_for((12, 0))
    ('bsr_kw2', 'bsr_kw4')
    """
    return f"bsr_kw{kwidth_for(capability)}"


def group_of(group_size: int, columns: int) -> int:
    """Columns per scale in the device layouts; 0 if the kernel knows no group that divides the given one."""
    return next((g for g in GROUPS if group_size >= columns or group_size % g == 0), 0)


def pack(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int, columns: int, layout: str
) -> Packed:
    """Bring a canonical 4-bit weight into a layout.

    Args:
        codes: uint8 ``[N, ceil(columns/2)]``.
        scales: float32 ``[N, groups]``.
        zero_points: uint8 ``[N, ceil(groups/2)]``, or None for the constant 8.
        group_size: columns per scale.
        columns: K.
        layout: one of `LAYOUTS`.

    Returns:
        codes, rowptr and colidx (None for ``canonical``), scales and zero points.

    Raises:
        PassError: there is no such layout, it does not take groups of this size, or scales are not float32.
    """
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, None, None, scales, zero_points
    group = group_of(group_size, columns)
    if not group or scales.dtype != torch.float32:
        raise PassError(
            f"groups of {group_size} columns with scales in {scales.dtype} do not fit blocks of 128 columns",
            expected="a multiple of 32, or one group for the whole row, and float32",
            fix='keep layout="canonical" for this weight',
        )
    rows, steps = len(scales), math.ceil(columns / COLUMNS)
    spread, words = pack_scales(scales, zero_points, group_size, group, COLUMNS // group, steps)
    dense = _zeros(words, rows, steps, group, codes.device)
    zeros = dense.clone()
    dense[:rows, :columns] = unpack_bits(codes, 4, columns)
    used = _blocks(dense != zeros).any(-1).any(-1)
    rowptr = torch.nn.functional.pad(used.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    colidx = torch.nn.functional.pad(used.nonzero()[:, 1], (0, 1)).to(torch.int32)
    kept = _blocks(dense)[used]
    tiles = pack_frag16(kept.reshape(-1, COLUMNS), kwidth_of(layout)).view(-1, ROWS // 16, 2, 32, 4)
    return tiles, rowptr, colidx, spread, words


def unpack(
    codes: Tensor,
    rowptr: Tensor | None,
    colidx: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: canonical codes, scales and zero points."""
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, scales, zero_points
    assert rowptr is not None and colidx is not None
    steps, rows, step = scales.shape
    group = COLUMNS // step
    dense = _zeros(zero_points, rows, steps, group, codes.device)
    kept = unpack_frag16(codes.reshape(-1, 2, 32, 4), kwidth_of(layout)).view(-1, ROWS, COLUMNS)
    block_rows = torch.arange(len(rowptr) - 1, device=codes.device)
    block_rows = block_rows.repeat_interleave(rowptr.diff())
    _blocks(dense)[block_rows, colidx[:-1].long()] = kept
    canonical = unpack_scales(scales, zero_points, group_size, group, columns)
    return pack_bits(dense[:rows, :columns], 4), *canonical


def _blocks(matrix: Tensor) -> Tensor:
    """A view ``[N/64, K/128, 64, 128]`` of ``[N, K]``."""
    rows, columns = matrix.shape
    return matrix.view(rows // ROWS, ROWS, columns // COLUMNS, COLUMNS).transpose(1, 2)


def _zeros(words: Tensor | None, rows: int, steps: int, group: int, device: torch.device) -> Tensor:
    """The code that means zero, for every element of the padded weight: uint8 ``[N, K]``."""
    zeros = torch.full((rows + -rows % ROWS, steps * COLUMNS), 8, dtype=torch.uint8, device=device)
    if words is not None:
        zeros[:rows] = zero_points_of(words, COLUMNS // group).repeat_interleave(group, 1)
    return zeros
