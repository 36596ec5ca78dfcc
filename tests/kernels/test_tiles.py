"""The inline assembly of the Triton kernels, executed instruction by instruction on all patterns of bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

tiles = pytest.importorskip("compress.kernels.tiles", reason="triton is not installed")


def halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.to(torch.int32).view(dtype).view(-1, 2).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_all_words_with_all_zero_points(execute: Any, dtype: torch.dtype, scaled: bool) -> None:
    """Two codes, all that may surround them in the word, 16 zero points: exact differences, scaled."""
    fp16 = dtype == torch.float16
    low = torch.arange(1 << 16)
    words = low | (low.flip(0) << 16)
    words = words - (words >> 31 << 32)
    scale = torch.tensor([0.0123, 0.0123]).to(dtype)
    base = (tiles.FP16_ADDEND if fp16 else tiles.BF16_ADDEND).value
    for zero in range(16):
        operands = {
            "$1": words,
            "$2": torch.full_like(words, base | zero * 0x00010001),
            "$3": torch.full_like(words, int(scale.view(torch.int32))),
        }
        result = halves(execute(tiles._asm(fp16, scaled), operands)["$0"], dtype)
        codes = torch.stack([words & 15, (words >> 16) & 15], 1)
        exact = (codes - zero).double() * (float(scale[0]) if scaled else 1.0)
        assert torch.equal(result, exact.to(dtype).double())


def test_lop3_table(execute: Any) -> None:
    """0xEA is (a and b) or c; the other tables of one input are the inputs themselves."""
    bits = torch.tensor([0, -1])
    a, b, c = (v.flatten() for v in torch.meshgrid(bits, bits, bits, indexing="ij"))
    for table, expected in ((0xEA, (a & b) | c), (0xF0, a), (0xCC, b), (0xAA, c)):
        done = execute(f"{{ lop3.b32 $0, $1, $2, $3, {table:#x}; }}", {"$1": a, "$2": b, "$3": c})
        assert torch.equal(done["$0"], expected)
