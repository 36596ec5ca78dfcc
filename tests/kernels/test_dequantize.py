"""The operator against its reference, over odd shapes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.encoding import IntEncoding, dequantize, encode, pack, unpack
from compress.kernels.dequantize.reference import dequantize as reference


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32]),
    symmetric=st.booleans(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_operator_equals_reference(
    bits: int, group_size: int, symmetric: bool, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(bits, group_size, symmetric)
    groups = encoding.groups(columns)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.randn(rows, groups, generator=generator)
    zeros = None
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    encoded = encode(codes, scales, zeros, encoding, (rows, columns), torch.float32)
    arguments = (encoded.codes, encoded.scales, encoded.zero_points, bits, encoding.width(columns))
    assert torch.equal(dequantize(*arguments, [rows, columns]), reference(*arguments, [rows, columns]))
    assert encoded.nbytes == encoding.nbytes(rows, columns)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), length=st.integers(1, 33), seed=st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, length), dtype=torch.uint8, generator=generator)
    assert torch.equal(unpack(pack(codes, bits), bits, length), codes)


def test_golden_bytes() -> None:
    """The file format: even columns in the low nibble, row by row."""
    codes = torch.tensor([[1, 2, 3], [15, 0, 8]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x21, 0x03], [0x0F, 0x08]]
    assert pack(codes[:, :2] % 4, 2).tolist() == [[0b1001], [0b0011]]


def test_operator_passes_torch_opcheck() -> None:
    encoded = encode(
        torch.zeros(4, 9, dtype=torch.uint8), torch.ones(4, 1), None, IntEncoding(4), (4, 3, 3), torch.float32
    )
    torch.library.opcheck(dequantize, (encoded.codes, encoded.scales, None, 4, 9, [4, 3, 3]))


def test_no_rows() -> None:
    """A lookup of nothing."""
    empty = torch.zeros(0, 4, dtype=torch.uint8), torch.zeros(0, 1), None
    assert dequantize(*empty, 4, 8, [0, 8]).shape == (0, 8)
