"""The operator against its reference, over odd shapes and every width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codebook import CodebookEncoding, dequantize_codebook, encode_codebook
from compress.encoding import pack, unpack
from compress.errors import PassError
from compress.kernels.dequantize_codebook.reference import dequantize_codebook as reference


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([-1, 16, 32]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_operator_equals_reference(bits: int, group_size: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    encoding = CodebookEncoding("kmeans", bits, group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    table = torch.randn(2**bits, generator=generator).sort().values
    table[1] = 0
    table = table.sort().values
    scales = torch.randn(rows, encoding.groups(columns), generator=generator)
    encoded = encode_codebook(codes, table, scales, encoding, (rows, columns), torch.float32)
    arguments = (encoded.codes, encoded.table, encoded.scales, bits, encoding.width(columns))
    wanted = reference(*arguments, [rows, columns])
    assert torch.equal(dequantize_codebook(*arguments, [rows, columns]), wanted)
    assert torch.equal(encoded.decode(), wanted)
    assert encoded.nbytes == encoding.nbytes(rows, columns)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(1, 8), length=st.integers(1, 33), seed=st.integers(0, 99))
def test_unpack_inverts_pack_at_every_width(bits: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, length), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, -(-length * bits // 8))
    assert torch.equal(unpack(packed, bits, length), codes)


def test_golden_bytes_of_three_bits() -> None:
    """The file format: a row is one stream of bits, lowest first; eight codes fill three bytes."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 5]], dtype=torch.uint8)
    stream = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    assert pack(codes, 3).tolist() == [list(stream.to_bytes(4, "little"))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nf4", 3, 64), "table=kmeans"),
        (("kmeans", 8, 64), "2, 3 or 4"),
        (("kmeans", 4, 24), "group_size=24"),
        (("fp4", 4, 64), "nf4 or kmeans or power"),
    ],
)
def test_encodings_that_do_not_exist(options: tuple[str, int, int], message: str) -> None:
    with pytest.raises(PassError, match=message):
        CodebookEncoding(*options)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("table", [[-1.0, -0.5, 0.5, 1.0], [0.0, 1.0], [1.0, 0.0, 2.0, 3.0]])
def test_tables_without_zero_or_order_are_refused(table: list[float]) -> None:
    with pytest.raises(PassError, match="4 ascending values"):
        encode_codebook(
            torch.zeros(2, 3, dtype=torch.uint8),
            torch.tensor(table),
            torch.ones(2, 1),
            CodebookEncoding("kmeans", 2),
            (2, 3),
            torch.float32,
        )


def test_names() -> None:
    assert str(CodebookEncoding()) == "nf4 g64"
    assert str(CodebookEncoding("kmeans", 3, -1)) == "kmeans3 per row"


def test_operator_passes_torch_opcheck() -> None:
    arguments = (torch.zeros(4, 4, dtype=torch.uint8), torch.arange(8.0), torch.ones(4, 1), 3, 9, [4, 3, 3])
    torch.library.opcheck(dequantize_codebook, arguments)
