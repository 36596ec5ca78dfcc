"""What `compress::dequantize_codebook` computes, one weight at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dequantize_codebook(
    codes: Tensor, table: Tensor, scales: Tensor, bits: int, group_size: int, shape: list[int]
) -> Tensor:
    """Same arguments and result as `compress.codebook.dequantize_codebook`; plain Python loops.

    Args:
        codes: uint8 ``[O, ceil(N * bits / 8)]``; each row is a stream of bits, lowest first.
        table: float32 ``[2**bits]``.
        scales: float32 ``[O, groups]``.
        bits: 2, 3 or 4.
        group_size: columns per group.
        shape: of the result, ``[O, ...]`` with N elements for each O.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    result = torch.empty(rows, columns)
    for o in range(rows):
        stream = [(int(byte) >> place) & 1 for byte in codes[o] for place in range(8)]
        for n in range(columns):
            code = sum(bit << place for place, bit in enumerate(stream[n * bits : (n + 1) * bits]))
            result[o, n] = table[code] * scales[o, n // group_size]
    return result.reshape(shape)
