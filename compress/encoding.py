"""Encoded weights: what every encoding has in common, the packing of codes, and the integer encoding.

An `Encoded` weight is a few tensors and the operator that makes a float weight of them. The encoding
with codebooks is in `compress.codebook`; here is the one with integers.

One canonical packing serves every target. A weight of shape ``[O, ...]`` is viewed as a matrix
``[O, N]`` (``N`` = product of the other dimensions, torch order) and each row is cut into groups
of ``group_size`` consecutive columns that share one scale::

    codes        uint8   [O, ceil(N * bits / 8)]   unsigned codes, low bits first within a byte
    scales       float32 [O, ceil(N / group_size)]
    zero_points  uint8   [O, ceil(groups * bits / 8)], packed like the codes; None when symmetric

    weight[o, n] = (code[o, n] - zero_point[o, group(n)]) * scale[o, group(n)]

A symmetric encoding has the constant zero point ``2**(bits-1)``, so its signed codes run from
``-2**(bits-1)`` to ``2**(bits-1) - 1``, both reachable; scales may be negative. These bytes are
what ``com.microsoft::MatMulNBits`` and ONNX UINT4 read; ONNX INT4 is the same with each code's top
bit flipped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.errors import PassError

BITS = (2, 4, 8)
"""Supported widths of integers. A 3-bit grid is a subset of the 4-bit one (`IntEncoding.grid_bits`)."""

GROUP_SIZES = (16, 32, 64, 128, 256)
"""Block sizes with a fast kernel in ONNX Runtime; -1 stands for one scale per output row."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last axis, low bits first.

    Args:
        codes: uint8 ``[..., N]`` with values below ``2**bits``.
        bits: 1 to 8; a code whose width does not divide 8 may lie across two bytes.

    Returns:
        uint8 ``[..., ceil(N * bits / 8)]``; the last byte is padded with zero bits.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist()
    [33, 15]
    """
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    if 8 % bits:
        places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
        return pack(((codes.to(torch.uint8).unsqueeze(-1) >> places) & 1).flatten(-2), 1)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per_byte))
    lanes = padded.reshape(*padded.shape[:-1], -1, per_byte).to(torch.int32)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=codes.device)
    return (lanes << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack`: uint8 ``[..., bytes]`` to uint8 ``[..., length]``.

    >>> unpack(torch.tensor([33, 15], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 15]
    """
    if bits == 8:
        return packed[..., :length]
    if 8 % bits:
        places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
        single = unpack(packed, 1, length * bits).unflatten(-1, (length, bits))
        return (single << places).sum(-1, dtype=torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return lanes.flatten(-2)[..., :length]


class Encoded(ABC):
    """A weight as stored: tensors, and the operator that decodes them.

    In a graph the weight NAME is a call of `operator`, and each of its tensors is read there as
    ``NAME.<part>``. What is not a tensor stands in the call as a constant.

    Attributes:
        encoding: the format; its ``str`` names it in reports.
        shape, dtype: of the weight that `decode` gives.
        trained: the part that fine-tuning changes.
    """

    trained: ClassVar[str] = "scales"
    encoding: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    @abstractmethod
    def operator(self) -> torch._ops.OpOverload:
        """Decodes to a float32 tensor of `shape`."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name. One is called ``codes``; it is the operator's first argument."""

    @abstractmethod
    def arguments(self, parts: Mapping[str, Any]) -> tuple[Any, ...]:
        """Arguments of `operator`, where `parts` are the tensors or what stands for them in a graph."""

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix ``[shape[0], columns]``."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Exact bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    def decode(self) -> Tensor:
        """The weight, `shape` and `dtype` as before encoding."""
        weight: Tensor = self.operator(*self.arguments(self.parts))
        return weight.to(self.dtype)


@dataclass(frozen=True)
class IntEncoding:
    """Integer codes with one scale (and zero point) per group of columns.

    Args:
        bits: 2, 4 or 8.
        group_size: columns that share a scale, or -1 for a whole row.
        symmetric: True for the constant zero point ``2**(bits-1)``.
        grid_bits: set where fewer levels are used than are stored, such as 3 for a 3-bit grid in 4-bit codes.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    grid_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise PassError(f"bits={self.bits} is not supported", expected="bits of 2, 4 or 8")
        if self.group_size != -1 and self.group_size not in GROUP_SIZES:
            raise PassError(
                f"group_size={self.group_size} is not supported",
                expected=f"-1 (one scale per row) or one of {', '.join(map(str, GROUP_SIZES))}",
            )
        if self.grid_bits is not None and not 1 < self.grid_bits <= self.bits:
            raise PassError(
                f"grid_bits={self.grid_bits} is not supported", expected=f"2 to {self.bits}, the stored bits"
            )

    @property
    def levels(self) -> int:
        """Number of codes in use, ``2**bits`` unless `grid_bits` says fewer."""
        return 1 << (self.grid_bits or self.bits)

    @property
    def lowest(self) -> int:
        """The smallest code in use."""
        return self.zero - self.levels // 2 if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code in use."""
        return self.lowest + self.levels - 1

    @property
    def zero(self) -> int:
        """The zero point of the symmetric form."""
        return 1 << (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns per group for rows of this length: the group size, or the whole row."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Number of groups in a row of this length; the last one may be shorter."""
        return math.ceil(columns / self.width(columns))

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of codes, float32 scales and zero points for ``[rows, columns]``."""
        groups = self.groups(columns)
        per_row = math.ceil(columns * self.bits / 8) + 4 * groups
        if not self.symmetric:
            per_row += math.ceil(groups * self.bits / 8)
        return rows * per_row

    def __str__(self) -> str:
        group = "per row" if self.group_size == -1 else f"g{self.group_size}"
        stored = f" in int{self.bits}" if self.grid_bits not in (None, self.bits) else ""
        return f"int{self.grid_bits or self.bits} {group}{'' if self.symmetric else ' asym'}{stored}"


@dataclass(frozen=True)
class EncodedWeight(Encoded):
    """A weight of integers: packed codes, scales and zero points (layouts in the module docstring)."""

    encoding: IntEncoding
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.compress.dequantize.default

    @property
    def parts(self) -> dict[str, Tensor]:
        parts = {"codes": self.codes, "scales": self.scales}
        return parts if self.zero_points is None else {**parts, "zero_points": self.zero_points}

    def arguments(self, parts: Mapping[str, Any]) -> tuple[Any, ...]:
        width = self.encoding.width(self.columns)
        tensors = (parts["codes"], parts["scales"], parts.get("zero_points"))
        return (*tensors, self.encoding.bits, width, list(self.shape))

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Codes ``[O, N]`` and zero points ``[O, groups]``, both uint8, one value per element."""
        bits, groups = self.encoding.bits, self.encoding.groups(self.columns)
        codes = unpack(self.codes, bits, self.columns)
        if self.zero_points is None:
            zeros = torch.full_like(self.scales, self.encoding.zero, dtype=torch.uint8)
        else:
            zeros = unpack(self.zero_points, bits, groups)
        return codes, zeros


def encode(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    encoding: IntEncoding,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> EncodedWeight:
    """Pack what a solver found.

    Args:
        codes: uint8 ``[O, N]``, unsigned codes.
        scales: float32 ``[O, groups]``.
        zero_points: uint8 ``[O, groups]``, or None for a symmetric encoding.
        shape, dtype: of the weight the codes stand for.
    """
    packed_zeros = None if zero_points is None else pack(zero_points, encoding.bits)
    return EncodedWeight(
        encoding, pack(codes, encoding.bits), scales.float().contiguous(), packed_zeros, shape, dtype
    )


@torch.library.custom_op("compress::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, shape: list[int]
) -> Tensor:
    """Decode packed integer codes to a float32 weight (layouts in the module docstring).

    Args:
        codes: uint8 ``[O, ceil(N * bits / 8)]``.
        scales: float32 ``[O, groups]``.
        zero_points: packed uint8, or None for ``2**(bits-1)``.
        bits: 2, 4 or 8.
        group_size: columns per group, at least 1.
        shape: of the result; ``shape[0] == O`` and the rest multiplies to N.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    groups = scales.shape[1]
    values = unpack(codes, bits, columns).float()
    values = torch.nn.functional.pad(values, (0, groups * group_size - columns))
    values = values.view(rows, groups, group_size)
    if zero_points is None:
        values = values - float(1 << (bits - 1))
    else:
        values = values - unpack(zero_points, bits, groups).float().unsqueeze(-1)
    values = values * scales.unsqueeze(-1)
    # clone: a custom op may not return a view of what it made when columns happen to fill the groups
    return values.view(rows, groups * group_size)[:, :columns].reshape(shape).clone()


@dequantize.register_fake
def _(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, shape: list[int]
) -> Tensor:
    return scales.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scales, zero_points, *ctx.layout = inputs
    ctx.save_for_backward(codes, scales, zero_points)


def _scale_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, zero_points = ctx.saved_tensors
    # the weight is linear in the scales, so what scales of one decode to is its derivative
    units = dequantize(codes, torch.ones_like(scales), zero_points, *ctx.layout)
    return None, sum_groups(gradient * units, ctx.layout[1], scales.shape[1]), None, None, None, None


dequantize.register_autograd(_scale_gradient, setup_context=_keep)


def sum_groups(values: Tensor, group_size: int, groups: int) -> Tensor:
    """Sums over the columns that share a scale: ``[O, ...]`` -> ``[O, groups]``."""
    rows = values.flatten(1)
    padded = torch.nn.functional.pad(rows, (0, groups * group_size - rows.shape[1]))
    return padded.unflatten(1, (groups, group_size)).sum(-1)
