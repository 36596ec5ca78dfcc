"""What `compress::expand_bitmap` computes, one weight at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expand_bitmap(codes: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Same arguments and result as `compress.bitmap.expand_bitmap`; plain Python loops.

    Args:
        codes: uint8 ``[O, ceil(N / 8)]``, low bits first.
        values: float ``[entries]``.
        shape: of the result, ``[O, ...]`` with N elements for each O.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    result = torch.zeros(rows, columns)
    taken = 0
    for o in range(rows):
        for n in range(columns):
            if (int(codes[o, n // 8]) >> (n % 8)) & 1:
                result[o, n] = values[taken]
                taken += 1
    return result.reshape(shape)
