"""Permutations of codes: nothing is lost, and each word holds what its formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.kernels.layouts import KWIDTHS, pack_frag8, pack_frag16, unpack_frag8, unpack_frag16


def random_codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(max_examples=30)
@given(
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    kwidth=st.sampled_from(KWIDTHS),
    seed=st.integers(0, 99),
)
def test_frag16_round_trip(tiles: tuple[int, int], kwidth: int, seed: int) -> None:
    codes = random_codes(16 * tiles[0], 64 * tiles[1], seed)
    words = pack_frag16(codes, kwidth)
    assert words.dtype == torch.int32 and words.shape == (*tiles, 32, 4) and words.is_contiguous()
    assert torch.equal(unpack_frag16(words, kwidth), codes)


@pytest.mark.parametrize("kwidth", KWIDTHS)
def test_frag16_words(kwidth: int) -> None:
    """Every nibble of every word, one at a time, from the formula."""
    codes = random_codes(32, 128, 0)
    words = pack_frag16(codes, kwidth).tolist()
    for n16 in range(2):
        for k64 in range(2):
            for lane in range(32):
                g, t = divmod(lane, 4)
                for j in range(4):
                    word = 0
                    for r in range(4):
                        for h in range(2):
                            n = 16 * n16 + 8 * (r & 1) + g
                            inner = 8 * (r >> 1) + 2 * t + h if kwidth == 2 else 4 * t + 2 * (r >> 1) + h
                            k = 64 * k64 + 16 * j + inner
                            word |= int(codes[n, k]) << (4 * r + 16 * h)
                    assert words[n16][k64][lane][j] & 0xFFFFFFFF == word


def test_frag16_registers_are_those_of_the_instruction() -> None:
    """`mma.m16n8k16`, operand A (PTX ISA): masking word j shifted by 4*i gives register i of k-tile j."""
    codes = random_codes(16, 64, 1)
    words = pack_frag16(codes, 2)[0, 0]
    for lane in range(32):
        group, place = lane >> 2, lane % 4
        for i in range(8):  # a_i of the PTX ISA, two to a register
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = place * 2 + (i & 1) + (8 if i >= 4 else 0)
            register = (int(words[lane, 0]) >> (4 * (i // 2))) & 0x000F000F
            assert (register >> (16 * (i & 1))) & 15 == codes[row, column]


@settings(max_examples=20)
@given(tiles=st.tuples(st.integers(1, 4), st.integers(1, 3)), seed=st.integers(0, 99))
def test_frag8_round_trip(tiles: tuple[int, int], seed: int) -> None:
    codes = random_codes(16 * tiles[0], 64 * tiles[1], seed)
    words = pack_frag8(codes)
    assert words.dtype == torch.int32 and words.shape == (*tiles, 32, 4) and words.is_contiguous()
    assert torch.equal(unpack_frag8(words), codes)


def test_frag8_from_the_formulas() -> None:
    codes = random_codes(32, 128, 1)
    words = pack_frag8(codes)
    for row in range(32):
        for column in range(128):
            n, r, g = row // 16, row % 16 // 8, row % 8
            k, i, j, t, c = column // 64, column % 64 // 32, column % 32 // 16, column % 16 // 4, column % 4
            nibble = (int(words[n, k, 4 * g + t, 2 * i + j]) >> (8 * c + 4 * r)) & 15
            assert (nibble - 16 if nibble > 7 else nibble) == int(codes[row, column]) - 8
