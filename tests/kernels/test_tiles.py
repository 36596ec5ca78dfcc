"""The inline assembly of the Triton kernels, executed instruction by instruction on all patterns of bits."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

tiles = pytest.importorskip("compress.kernels.tiles", reason="triton is not installed")


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """PTX ISA, lop3: the table's bit at the place that the bits of a, b and c (low) spell."""
    result = torch.zeros_like(a)
    for place in range(8):
        if (table >> place) & 1:
            chosen = [v if (place >> shift) & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def float_halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.to(torch.int32).view(dtype).view(-1, 2).double()


def execute(asm: str, operands: dict[str, Tensor]) -> Tensor:
    """Run PTX of the few instructions that `tiles` uses; int64 ``[n]`` of 32 bits in and out."""
    registers = {name: value.clone() for name, value in operands.items()}
    count = len(next(iter(operands.values())))

    def read(word: str) -> Tensor:
        if not word.startswith("0x"):
            return registers[word]
        value = int(word, 16)
        return torch.full((count,), value - (value >> 31 << 32))

    for line in asm.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        words = [w.strip() for w in rest.split(",")]
        if name == "lop3.b32":
            registers[words[0]] = lop3(*map(read, words[1:4]), int(words[4], 16))
        elif name == "mov.b32":
            registers[words[0]] = read(words[1])
        elif kind := re.fullmatch(r"fma\.rn\.(bf16|f16)x2", name):
            dtype = torch.bfloat16 if kind[1] == "bf16" else torch.float16
            a, b, c = (float_halves(read(w), dtype) for w in words[1:])
            registers[words[0]] = (a * b + c).to(dtype).view(torch.int32).view(-1).long()
        else:
            assert name in ("", ".reg"), f"{name} is not known here"
    return registers["$0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_all_words_with_all_zero_points(dtype: torch.dtype, scaled: bool) -> None:
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
        result = float_halves(execute(tiles._asm(fp16, scaled), operands), dtype)
        codes = torch.stack([words & 15, (words >> 16) & 15], 1)
        exact = (codes - zero).double() * (float(scale[0]) if scaled else 1.0)
        assert torch.equal(result, exact.to(dtype).double())


def test_lop3_table() -> None:
    """0xEA is (a and b) or c: the table is read at bit 4*a + 2*b + c."""
    bits = torch.tensor([0, -1])
    a, b, c = (v.flatten() for v in torch.meshgrid(bits, bits, bits, indexing="ij"))
    assert torch.equal(lop3(a, b, c, 0xEA), (a & b) | c)
