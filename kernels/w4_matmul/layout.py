"""The layouts of a 4-bit weight that `compress::w4_matmul` takes, and the way between them.

``canonical`` is `compress.encoding`: codes ``uint8 [N, ceil(K/2)]``, scales ``[N, groups]``, zero points
packed like the codes, or None. ``frag16_kw2`` and ``frag16_kw4`` are for the tensor cores::

    codes        int32 [N/16, K/64, 32, 4]  `compress.kernels.layouts`; N padded to 64, K to whole steps
    scales       [steps, N, S]              in the dtype they were given
    zero_points  int32 [steps, N]           byte b of a word: zero point of the step's group b; None: 8

A *step* is `S` groups of columns: what one iteration of the kernel takes. The kernel knows groups of 16, 32,
64 and 128 columns; longer groups, and whole rows, are stored as several with the same scale. The codes that
pad a weight only ever meet an `x` of zero or a scale of zero.
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

LAYOUTS = ("canonical", "frag16_kw2", "frag16_kw4")
GROUPS = (128, 64, 32, 16)
"""Columns per scale that the kernel knows, the longest first."""

ROWS = 64
"""The rows of a weight are padded to a multiple of this."""

STEP = 512
"""The most columns that a step can have: four groups of the longest."""

WASTE = 1 / 16
"""Columns that may be padded, as a part of all, for a longer step."""


def layout_for(capability: tuple[int, int]) -> str:
    """The layout for a GPU, by its compute capability as `torch.cuda.get_device_capability` gives it.

    >>> layout_for((9, 0)), layout_for((8, 9))
    ('frag16_kw2', 'frag16_kw4')
    """
    return f"frag16_kw{kwidth_for(capability)}"


def step_of(group_size: int, columns: int, longest: int = STEP) -> tuple[int, int]:
    """Columns per scale and groups per step of the device layout.

    The longest group the kernel knows that divides the given one, and four of it to a step or two: the first
    choice that pads few columns, and has no more than `longest` columns in a step.

    Raises:
        PassError: no group the kernel knows divides it.

    >>> step_of(128, 4096), step_of(128, 384)
    ((128, 4), (64, 2))
    """
    groups = [g for g in GROUPS if group_size >= columns or group_size % g == 0]
    if not groups:
        raise PassError(
            f"groups of {group_size} columns do not fit the tensor cores",
            expected="a multiple of 16, or one group for the whole row",
            fix='keep layout="canonical" for this weight',
        )
    least = math.ceil(columns / 64) * 64
    # 16-bit scales are read in pairs, and a tile has 64 columns: no fewer than two groups, no less than 64
    steps = [(g, s) for g in groups for s in (4, 2) if 64 <= g * s <= longest]
    padded = [math.ceil(columns / (g * s)) * g * s for g, s in steps]
    fitting = [step for step, all_ in zip(steps, padded, strict=True) if all_ - least <= WASTE * least]
    return fitting[0] if fitting else steps[-1]


def pack(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    group_size: int,
    columns: int,
    layout: str,
    longest: int = STEP,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring a canonical 4-bit weight into a layout.

    Args:
        codes: uint8 ``[N, ceil(columns/2)]``.
        scales: ``[N, groups]``; they keep their dtype, and 16 bits are less to read than 32.
        zero_points: uint8 ``[N, ceil(groups/2)]``, or None for the constant 8.
        group_size: columns per scale.
        columns: K, the columns of the weight.
        layout: one of `LAYOUTS`.
        longest: columns that a step may have, at least 64.

    Returns:
        codes, scales and zero points as `compress::w4_matmul` takes them with this layout.

    Raises:
        PassError: there is no such layout, or it does not take groups of this size.
    """
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, scales, zero_points
    kwidth = kwidth_of(layout)
    group, step = step_of(group_size, columns, longest)
    steps = math.ceil(columns / (step * group))
    fill = (0, steps * step * group - columns, 0, -len(scales) % ROWS)
    padded = torch.nn.functional.pad(unpack_bits(codes, 4, columns), fill, value=8)
    return pack_frag16(padded, kwidth), *pack_scales(scales, zero_points, group_size, group, step, steps)


def unpack(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int, columns: int, layout: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: a weight in any layout as canonical codes, scales and zero points."""
    if check_layout(layout, LAYOUTS) == "canonical":
        return codes, scales, zero_points
    steps, rows, step = scales.shape
    group = codes.shape[1] * 64 // (steps * step)
    whole = unpack_frag16(codes, kwidth_of(layout))[:rows, :columns]
    return pack_bits(whole, 4), *unpack_scales(scales, zero_points, group_size, group, columns)


def pack_scales(
    scales: Tensor, zero_points: Tensor | None, group_size: int, group: int, step: int, steps: int
) -> tuple[Tensor, Tensor | None]:
    """Canonical scales and zero points step by step: ``[steps, N, step]``, int32 ``[steps, N]``.

    Args:
        group_size: columns per scale of the canonical weight.
        group: columns per scale in the device layout; it divides `group_size`.
        step: groups per step, at most 4.
        steps: of `step` groups; those past the last column get scales of zero.
    """
    rows, groups = scales.shape
    places = torch.arange(steps * step, device=scales.device) * group // group_size
    inside = places < groups
    places = places.clamp(max=groups - 1)
    spread = (scales[:, places] * inside).view(rows, steps, step).transpose(0, 1).contiguous()
    if zero_points is None:
        return spread, None
    points = unpack_bits(zero_points, 4, groups)[:, places].view(rows, steps, step).to(torch.int32)
    shifts = 8 * torch.arange(step, dtype=torch.int32, device=scales.device)
    return spread, (points << shifts).sum(-1, dtype=torch.int32).t().contiguous()


def unpack_scales(
    scales: Tensor, zero_points: Tensor | None, group_size: int, group: int, columns: int
) -> tuple[Tensor, Tensor | None]:
    """The inverse of `pack_scales`: canonical scales and packed zero points."""
    steps, rows, step = scales.shape
    first = torch.arange(0, columns, min(group_size, columns), device=scales.device) // group
    spread = scales.transpose(0, 1).reshape(rows, steps * step)[:, first]
    if zero_points is None:
        return spread, None
    return spread, pack_bits(zero_points_of(zero_points, step)[:, first], 4)


def zero_points_of(words: Tensor, step: int) -> Tensor:
    """The zero points in words int32 ``[steps, N]``, `step` bytes in each: uint8 ``[N, steps * step]``."""
    shifts = 8 * torch.arange(step, dtype=torch.int32, device=words.device)
    return ((words.t().unsqueeze(-1) >> shifts) & 255).to(torch.uint8).flatten(1)


def kwidth_of(layout: str) -> int:
    """2 or 4: what the name of a device layout ends in."""
    return int(layout[-1])


def kwidth_for(capability: tuple[int, int]) -> int:
    """That of the layout for a GPU, by its compute capability."""
    return 2 if capability == (9, 0) else 4
