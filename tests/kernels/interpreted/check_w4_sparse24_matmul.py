"""Decoding a weight in the layout of the sparse tensor cores, in Triton's interpreter.

The product itself is inline assembly, which the interpreter does not run: `tests/kernels/conftest.py` does.
"""

from __future__ import annotations

import pytest
import torch

from compress.encoding import pack as pack_bits
from compress.kernels.w4_sparse24_matmul import reference
from compress.kernels.w4_sparse24_matmul import triton as kernels
from compress.kernels.w4_sparse24_matmul.layout import pack


@pytest.mark.parametrize(
    ("rows", "columns", "width", "asymmetric", "scales"),
    [
        (40, 256, 32, True, torch.float32),
        (33, 250, 128, False, torch.bfloat16),
        (7, 100, 100, True, torch.float16),
    ],
)
def test_decoding(rows: int, columns: int, width: int, asymmetric: bool, scales: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // width)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    if asymmetric:
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = zeros.repeat_interleave(width, 1)[:, :columns].clone()
    for first in range(0, columns, 4):  # one or two of four, anywhere
        kept = torch.rand(rows, min(4, columns - first), generator=generator).argsort(1)[:, :2]
        codes.scatter_(
            1, first + kept, torch.randint(0, 16, kept.shape, dtype=torch.uint8, generator=generator)
        )
    spread = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.01).to(scales)
    words = pack_bits(zeros, 4) if asymmetric else None
    packed, metadata, *rest = pack(pack_bits(codes, 4), spread, words, width, columns, "sp24")
    assert metadata is not None
    exact = reference.decoded(packed, metadata, *rest, width, columns, "sp24")
    decoded = kernels.decoded(packed, metadata, *rest, columns, torch.float16)
    assert torch.equal(decoded, exact.half())
