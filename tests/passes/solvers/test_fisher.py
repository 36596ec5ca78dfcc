"""Products with factored gradients against the matrix of all samples and parameters."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes.solvers.fisher import Gradients
from compress.testing import assert_close


def example(n: int, tokens: int, rows: int, columns: int, seed: int) -> tuple[Gradients, torch.Tensor]:
    """Gradients, and the same as float64 ``[n, O, K]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, tokens, columns, generator=generator)
    delta = torch.randn(n, tokens, rows, generator=generator)
    slow = torch.zeros(n, rows, columns, dtype=torch.float64)
    for i in range(n):
        for t in range(tokens):
            slow[i] += torch.outer(delta[i, t].double(), x[i, t].double())
    return Gradients.of(x, delta), slow


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 7),
    tokens=st.integers(1, 6),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_products(n: int, tokens: int, rows: int, columns: int, seed: int) -> None:
    gradients, slow = example(n, tokens, rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    weight, r = torch.randn(rows, columns, generator=generator), torch.randn(n, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    flat = slow.flatten(1)
    assert (gradients.samples, gradients.shape) == (n, (rows, columns))
    assert_close((flat @ weight.double().flatten()).float(), gradients.times(weight))
    assert_close((r.double() @ flat).view(rows, columns).float(), gradients.transposed(r))
    kept = flat * mask.flatten()
    assert_close((kept @ kept.T).float(), gradients.gram(mask))
    assert_close(slow.float(), gradients.dense())
    assert_close(slow[:, rows // 2 :].transpose(0, 1).float(), gradients.rows(rows // 2, rows))
    assert_close(2 * slow.float(), gradients.plus(gradients).dense())


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 9), size=st.integers(1, 4), tokens=st.sampled_from([1, 2, 40]), seed=st.integers(0, 99)
)
def test_mini_batches(n: int, size: int, tokens: int, seed: int) -> None:
    gradients, slow = example(n, tokens, 3, 8, seed)
    count = n // size
    if count:
        sums = slow[: count * size].view(count, size, 3, 8).sum(1) / size**0.5
        assert_close(sums.float(), gradients.merged(size).dense())


def test_the_smaller_of_factors_and_product_is_kept() -> None:
    assert example(3, 1, 20, 30, 0)[0].nbytes == 4 * 3 * (20 + 30)
    assert example(3, 50, 2, 3, 0)[0].nbytes == 4 * 3 * 2 * 3


def test_parts_are_put_together() -> None:
    for tokens in (2, 50):
        (a, slow_a), (b, slow_b) = example(3, tokens, 20, 30, 0), example(2, tokens, 20, 30, 1)
        joined = a.room(5)
        joined.put(0, a)
        joined.put(3, b)
        assert joined.samples == 5
        assert_close(torch.cat([slow_a, slow_b]).float(), joined.dense())
