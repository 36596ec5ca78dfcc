"""Codes of a head in 32-bit words, for hosts that have no smaller integers.

The words hold what the kernel reads, ``codes[stages, V]`` row by row in the smallest integers that hold the
entries of any codebook, the first one in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.head import narrow


def dtype_of(sizes: Sequence[int]) -> torch.dtype:
    """The integers of codes for codebooks of these sizes.

    >>> dtype_of([256, 256]), dtype_of([264, 256])
    (torch.uint8, torch.int16)
    """
    return narrow(torch.tensor([max(sizes) - 1])).dtype


def pack(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """int32 words of integers ``[stages, V]``; the last word is filled with zeros.

    Args:
        codes: for each token its entry in the codebook of each stage.
        sizes: entries of each codebook.
    """
    stored = codes.to(dtype_of(sizes)).contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(stored, (0, -len(stored) % 4)).view(torch.int32)


def unpack(words: Tensor, sizes: Sequence[int], tokens: int) -> Tensor:
    """The codes ``[stages, V]`` of `pack`, in its integers."""
    dtype = dtype_of(sizes)
    return words.contiguous().view(dtype)[: len(sizes) * tokens].view(len(sizes), tokens)
