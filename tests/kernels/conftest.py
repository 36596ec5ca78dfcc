"""An interpreter of PTX, for the inline assembly that Triton's own interpreter does not run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

Execute = Callable[[str, Mapping[str, Tensor]], dict[str, Tensor]]


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """The table's bit at the place that the bits of a, b and c (low) spell."""
    result = torch.zeros_like(a)
    for place in range(8):
        if (table >> place) & 1:
            chosen = [v if (place >> shift) & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 words of 32 bits to two 16-bit floats each, the low half first: float64 ``[n, 2]``."""
    return words.to(torch.int32).view(dtype).view(-1, 2).double()


def mma_sp(a: list[Tensor], b: list[Tensor], c: list[Tensor], meta: Tensor, selector: int) -> list[Tensor]:
    """PTX ISA, sparse mma.m16n8k32 for 16-bit floats; a and b are ``[32, 2]`` for each register."""
    A, B = torch.zeros(16, 32, dtype=torch.float64), torch.zeros(32, 8, dtype=torch.float64)
    for lane in range(32):
        group, place = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            kept = place * 2 + (i & 1) + (8 if i >= 4 else 0)
            # two kept columns of four; the first two or last two lanes of a quad hold their places, the
            # first of them for columns 0 to 15, for row `group` in the low half
            word = int(meta[4 * group + 2 * selector + kept // 8])
            half = word >> 16 if row >= 8 else word
            quad = kept // 2
            A[row, 4 * quad + ((half >> (2 * (kept % 8))) & 3)] = a[i // 2][lane, i & 1]
            B[place * 2 + (i & 1) + 8 * (i // 2), group] = b[i // 2][lane, i & 1]
    product = A @ B
    result = [v.clone() for v in c]
    for lane in range(32):
        for i in range(4):
            result[i][lane] += product[(lane >> 2) + 8 * (i // 2), (lane % 4) * 2 + (i & 1)]
    return result


def run(asm: str, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Execute assembly over many lanes; registers are int64 for 32 bits, float64 for f32."""
    registers = {name: value.clone() for name, value in operands.items()}
    count = len(next(iter(operands.values())))

    def read(word: str) -> Tensor:
        if word.startswith("0f"):
            assert int(word[2:], 16) == 0
            return torch.zeros(count, dtype=torch.float64)
        if not word.startswith("0x"):
            return registers[word]
        value = int(word, 16)
        return torch.full((count,), value - (value >> 31 << 32))

    for line in asm.strip()[1:-1].split(";"):
        name, _, rest = line.strip().partition(" ")
        words = re.findall(r"[$\w]+", rest)
        kind = re.search(r"\.(bf16|f16)", name)
        dtype = torch.bfloat16 if kind and kind[1] == "bf16" else torch.float16
        if name == "lop3.b32":
            registers[words[0]] = lop3(*map(read, words[1:4]), int(words[4], 16))
        elif name in ("mov.b32", "mov.f32"):
            registers[words[0]] = read(words[1])
        elif name == "shl.b32":
            registers[words[0]] = (read(words[1]) << int(words[2])) & 0xFFFFFFFF
        elif name == "and.b32":
            registers[words[0]] = read(words[1]) & read(words[2]) & 0xFFFFFFFF
        elif name == "shr.u32":
            registers[words[0]] = (read(words[1]) & 0xFFFFFFFF) >> int(words[2])
        elif name == "fma.rn.f32":
            a, b, c = map(read, words[1:])
            registers[words[0]] = a * b + c
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            a, b, c = (halves(read(w), dtype) for w in words[1:])
            registers[words[0]] = (a * b + c).to(dtype).view(torch.int32).view(-1).long()
        elif name.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."):
            a, b = ([halves(read(w), dtype) for w in words[first : first + 4]] for first in (4, 8))
            sums = mma_sp(a, b, [read(w) for w in words[12:16]], read(words[16]), int(words[17], 16))
            registers.update(zip(words[:4], sums, strict=True))
        else:
            assert name in ("", ".reg"), f"{name} is not known here"
    return registers


@pytest.fixture(scope="session")
def execute() -> Execute:
    return run
