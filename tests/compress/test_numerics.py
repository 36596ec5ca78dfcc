"""Figures against their definitions, in one go and in batches."""

from __future__ import annotations

import math

import pytest
import torch

from compress.numerics import Agreement, cosine, magnitude, max_abs, relative_error, sqnr_db, top1_agreement


def test_known_values() -> None:
    r, v = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert sqnr_db(r, v) == pytest.approx(10 * math.log10(26 / 2))
    assert cosine(r, v) == pytest.approx(0.5)
    assert max_abs(r, v) == 1.0
    assert top1_agreement(r, v) == 0.5
    assert relative_error(r, v) == pytest.approx(math.sqrt(2 / 26))


def test_equal_and_broken() -> None:
    x = torch.randn(4, 5)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x * math.nan) == -math.inf
    assert relative_error(x, x) == 0.0
    assert relative_error(x, x * math.nan) == relative_error(x, x / 0) == math.inf
    assert cosine(torch.zeros(2, 3), torch.zeros(2, 3)) == 1.0


def test_magnitude_is_a_power_of_two_and_dividing_by_it_is_exact() -> None:
    rows = torch.tensor([[3.0, -5.0], [0.0, 0.0], [1e-30, 3e-30], [-3e38, 1.0], [1e-44, 0.0]])
    size = magnitude(rows)
    assert size.shape == (5, 1)
    assert size[:2, 0].tolist() == [8.0, 1.0]
    assert torch.equal(rows / size * size, rows)
    assert float((rows / size).abs().max()) <= 2


def test_infinities_agree_where_both_have_them() -> None:
    """Masked logits: -inf is the right answer, and any other one is wrong."""
    r, v = torch.tensor([[3.0, 4.0, -math.inf]]), torch.tensor([[3.0, 5.0, -math.inf]])
    total = Agreement()
    total.update(r, v)
    assert sqnr_db(r, v) == total.sqnr_db == pytest.approx(10 * math.log10(25 / 1))
    assert sqnr_db(r, r) == math.inf
    assert max_abs(r, v) == total.largest == 1.0
    assert cosine(r, v) == total.cosine == pytest.approx(cosine(r[:, :2], v[:, :2]))
    for wrong in (-r, r.nan_to_num(), r * 0):
        assert sqnr_db(r, wrong) == sqnr_db(wrong, r) == -math.inf


def test_batches_add_up() -> None:
    r, v = torch.randn(12, 7), torch.randn(12, 7)
    total = Agreement()
    for part in (slice(0, 5), slice(5, 12)):
        total.update(r[part], v[part])
    assert total.sqnr_db == pytest.approx(sqnr_db(r, v))
    assert total.cosine == pytest.approx(cosine(r, v))
    assert total.top1 == pytest.approx(top1_agreement(r, v))
    assert total.largest == pytest.approx(max_abs(r, v))
    with pytest.raises(ValueError, match="differ"):
        total.update(r, v[:3])


def test_masked_logits_agree() -> None:
    r = torch.tensor([[1.0, -math.inf, 2.0]])
    v = torch.tensor([[1.0, -math.inf, 2.5]])
    assert sqnr_db(r, r) == math.inf
    assert sqnr_db(r, v) == pytest.approx(10 * math.log10(5 / 0.25))
    assert max_abs(r, v) == 0.5
    assert sqnr_db(r, -r) == -math.inf
    assert sqnr_db(r, torch.zeros(1, 3)) == -math.inf
    total = Agreement()
    total.update(r, v)
    assert total.sqnr_db == pytest.approx(sqnr_db(r, v))
    assert total.cosine == pytest.approx(cosine(r, v)) and total.cosine > 0.9


def test_both_parts_of_complex_numbers_count() -> None:
    x = torch.complex(torch.randn(4, 5), torch.randn(4, 5))
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x.conj().resolve_conj()) < 10
