"""Codebook encodings: a code selects one of ``2**bits`` float values, and its group's scale multiplies it.

The weight is a matrix of rows and groups, and the codes are packed, as in `compress.encoding`::

    codes   uint8   [O, ceil(N * bits / 8)]
    table   float32 [2**bits]                  ascending, one of the entries exactly 0
    scales  float32 [O, ceil(N / group_size)]  may be negative

    weight[o, n] = table[code[o, n]] * scale[o, group(n)]

The table is what distinguishes the formats: the published NF4 levels, levels learned for this weight, or
powers of an integer grid (`compress.passes.solvers.codebooks`). All are stored and decoded alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from compress.encoding import GROUP_SIZES, Encoded, pack, sum_groups, unpack
from compress.errors import PassError

Table = Literal["nf4", "kmeans", "power"]

BITS = (2, 3, 4)
"""Supported code widths."""


@dataclass(frozen=True)
class CodebookEncoding:
    """Which table, how many entries, and how many columns share a scale.

    Args:
        table: "nf4", "kmeans" or "power": where the values come from.
        bits: 2, 3 or 4 for each code; NF4 has 4.
        group_size: columns per scale; -1 for the whole row.

    Raises:
        PassError: a combination that does not exist.
    """

    table: Table = "nf4"
    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.table not in get_args(Table):
            raise PassError(f"table={self.table!r} is unknown", expected=" or ".join(get_args(Table)))
        if self.bits not in BITS:
            raise PassError(f"bits={self.bits} is no width of a codebook", expected="2, 3 or 4")
        if self.table == "nf4" and self.bits != 4:
            raise PassError(
                f"nf4 with bits={self.bits}",
                expected="bits=4: the published table has 16 levels",
                fix="take table=kmeans",
            )
        if self.group_size != -1 and self.group_size not in GROUP_SIZES:
            raise PassError(
                f"group_size={self.group_size} is not supported",
                expected=f"-1 (one scale per row) or one of {', '.join(map(str, GROUP_SIZES))}",
            )

    @property
    def levels(self) -> int:
        """Number of table entries, ``2**bits``."""
        return 1 << self.bits

    def width(self, columns: int) -> int:
        """Columns per group for rows of this length: the group size, or the whole row."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Number of groups in a row of this length; the last one may be shorter."""
        return math.ceil(columns / self.width(columns))

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of codes, table and float32 scales for ``[rows, columns]``."""
        return rows * (math.ceil(columns * self.bits / 8) + 4 * self.groups(columns)) + 4 * self.levels

    def __str__(self) -> str:
        name = "nf4" if self.table == "nf4" else f"{self.table}{self.bits}"
        return f"{name} {'per row' if self.group_size == -1 else f'g{self.group_size}'}"


@dataclass(frozen=True)
class CodebookWeight(Encoded):
    """A weight of codes, their table and scales (layouts in the module docstring)."""

    encoding: CodebookEncoding
    codes: Tensor
    table: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.compress.dequantize_codebook.default

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "table": self.table, "scales": self.scales}

    def arguments(self, parts: Mapping[str, Any]) -> tuple[Any, ...]:
        width = self.encoding.width(self.columns)
        return (parts["codes"], parts["table"], parts["scales"], self.encoding.bits, width, list(self.shape))


def encode_codebook(
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    encoding: CodebookEncoding,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> CodebookWeight:
    """Pack what a solver found.

    Args:
        codes: uint8 ``[O, N]``, indices of table entries.
        table: float32 ``[2**bits]``, ascending, with an entry that is exactly 0.
        scales: float32 ``[O, groups]``.
        shape, dtype: of the weight the codes stand for.

    Raises:
        PassError: the table has another number of entries, is not ascending, or has no 0, so that
            a pruned weight could not stay zero.
    """
    if table.shape != (encoding.levels,) or bool((table.diff() < 0).any()) or not bool((table == 0).any()):
        raise PassError(
            f"table {[round(float(t), 4) for t in table.flatten()]}",
            expected=f"{encoding.levels} ascending values, one of them 0",
        )
    packed = pack(codes, encoding.bits)
    return CodebookWeight(
        encoding, packed, table.float().contiguous(), scales.float().contiguous(), shape, dtype
    )


@torch.library.custom_op("compress::dequantize_codebook", mutates_args=())
def dequantize_codebook(
    codes: Tensor, table: Tensor, scales: Tensor, bits: int, group_size: int, shape: list[int]
) -> Tensor:
    """Decode packed codes to a float32 weight (layouts in the module docstring).

    Args:
        codes: uint8 ``[O, ceil(N * bits / 8)]``.
        table: float32 ``[2**bits]``.
        scales: float32 ``[O, groups]``.
        bits: 2, 3 or 4.
        group_size: columns per group, at least 1.
        shape: of the result; ``shape[0] == O`` and the rest multiplies to N.
    """
    columns = math.prod(shape[1:])
    values = table[unpack(codes, bits, columns).int()]
    per_column = scales.repeat_interleave(group_size, dim=1)[:, :columns]
    return (values * per_column).reshape(shape)


@dequantize_codebook.register_fake
def _(codes: Tensor, table: Tensor, scales: Tensor, bits: int, group_size: int, shape: list[int]) -> Tensor:
    return scales.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, table, scales, *ctx.layout = inputs
    ctx.save_for_backward(codes, table, scales)


def _scale_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, table, scales = ctx.saved_tensors
    units = dequantize_codebook(codes, table, torch.ones_like(scales), *ctx.layout)
    return None, None, sum_groups(gradient * units, ctx.layout[1], scales.shape[1]), None, None, None


dequantize_codebook.register_autograd(_scale_gradient, setup_context=_keep)
