"""The operator against its reference, over odd shapes and all shares of zeros."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.bitmap import BitmapEncoding, encode_bitmap, expand_bitmap
from compress.kernels.expand_bitmap.reference import expand_bitmap as reference


def sparse(rows: int, columns: int, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < share)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_operator_equals_reference_and_the_weight(rows: int, columns: int, share: float, seed: int) -> None:
    weight = sparse(rows, columns, share, seed)
    encoded = encode_bitmap(weight)
    found = expand_bitmap(encoded.codes, encoded.values, [rows, columns])
    assert torch.equal(found, weight)
    assert torch.equal(found, reference(encoded.codes, encoded.values, [rows, columns]))
    kept = int((weight != 0).sum())
    assert (
        encoded.nbytes == BitmapEncoding().nbytes(rows, columns, kept) == rows * -(-columns // 8) + 4 * kept
    )


def test_half_precision_is_kept() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = sparse(3, 20, 0.4, 0).to(dtype).view(3, 5, 2, 2)
        encoded = encode_bitmap(weight)
        assert encoded.values.dtype == dtype
        assert encoded.decode().dtype == dtype
        assert torch.equal(encoded.decode(), weight)


def test_golden_bytes() -> None:
    weight = torch.tensor([[0.0, 2, 0, 0, 0, 0, 0, 3, 4], [-0.0, 0, 0, 0, 0, 0, 0, 0, 0]])
    encoded = encode_bitmap(weight)
    assert encoded.codes.tolist() == [[0b10000010, 1], [0, 0]]
    assert encoded.values.tolist() == [2, 3, 4]
    assert str(encoded.encoding) == "bitmap"


def test_gradients_reach_the_values() -> None:
    encoded = encode_bitmap(sparse(4, 9, 0.5, 1))
    values = encoded.values.clone().requires_grad_()
    factors = torch.arange(36.0).view(4, 9)
    (expand_bitmap(encoded.codes, values, [4, 9]) * factors).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, factors[encoded.decode() != 0])


def test_operator_passes_torch_opcheck() -> None:
    encoded = encode_bitmap(sparse(4, 9, 0.5, 2))
    values = encoded.values.clone().requires_grad_()
    torch.library.opcheck(expand_bitmap, (encoded.codes, values, [4, 3, 3]))
