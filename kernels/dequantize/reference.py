"""What `compress::dequantize` computes, one weight at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dequantize(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, shape: list[int]
) -> Tensor:
    """Same arguments and result as `compress.encoding.dequantize`; plain Python loops.

    Args:
        codes: uint8 ``[O, ceil(N * bits / 8)]``, low bits first.
        scales: float32 ``[O, groups]``.
        zero_points: uint8 ``[O, ceil(groups * bits / 8)]``, low bits first; None for ``2**(bits-1)``.
        bits: 2, 4 or 8.
        group_size: columns per group.
        shape: of the result, ``[O, ...]`` with N elements for each O.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    result = torch.empty(rows, columns)
    for o in range(rows):
        for n in range(columns):
            group = n // group_size
            zero = 2 ** (bits - 1) if zero_points is None else _field(zero_points[o], group, bits)
            result[o, n] = (_field(codes[o], n, bits) - zero) * float(scales[o, group])
    return result.reshape(shape)


def _field(row: Tensor, index: int, bits: int) -> int:
    bit = index * bits
    return (int(row[bit // 8]) >> (bit % 8)) % 2**bits
