"""Low rank in slices and whole: exact at full rank, the error is what is cut off, and no other is better."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.alds import minimax, slices
from compress.passes.solvers.alds import parameters as sliced_parameters
from compress.passes.solvers.alternating import alternate, descend
from compress.passes.solvers.low_rank import parameters, refit_last, spectrum

Sizes = st.integers(1, 12)


def problem(outputs: int, inputs: int, seed: int = 0, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    mix *= torch.logspace(0, -2, inputs, dtype=torch.float64)
    x = torch.randn(samples or 4 * inputs, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), x.mT @ x / len(x)


def error(weight: Tensor, new: Tensor, H: Tensor) -> float:
    d = weight - new
    return float(((d @ H) * d).sum() / ((weight @ H) * weight).sum())


def reference(weight: Tensor, H: Tensor, rank: int) -> Tensor:
    """SVD-LLM as its paper has it: Cholesky factor, SVD, cut off, divided out again."""
    S = torch.linalg.cholesky(H)
    U, s, V = torch.linalg.svd(weight @ S, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank] @ torch.linalg.inv(S)


@settings(max_examples=40, deadline=None)
@given(Sizes, Sizes, st.integers(1, 12), st.integers(0, 99))
def test_whitened(outputs: int, inputs: int, rank: int, seed: int) -> None:
    weight, H = problem(outputs, inputs, seed)
    found = spectrum(weight, H, damping=0)
    first, last = found.factors(rank)
    kept = min(rank, outputs, inputs)
    assert first.shape == (kept, inputs) and last.shape == (outputs, kept)
    assert first.numel() + last.numel() == parameters(outputs, inputs, kept)
    assert error(weight, last @ first, H) == pytest.approx(found.error(kept), abs=1e-9)
    assert error(weight, last @ first, H) == pytest.approx(
        error(weight, reference(weight, H, kept), H), abs=1e-8
    )
    if rank >= min(outputs, inputs):
        assert torch.allclose(last @ first, weight, atol=1e-6)
    assert torch.allclose(first.norm(dim=1), last.norm(dim=0))


@settings(max_examples=20, deadline=None)
@given(Sizes, Sizes, st.integers(1, 12))
def test_plain(outputs: int, inputs: int, rank: int) -> None:
    weight, _ = problem(outputs, inputs)
    found = spectrum(weight)
    values = torch.linalg.svdvals(weight)
    assert torch.allclose(found.energies, values.square())
    first, last = found.factors(rank)
    assert float((weight - last @ first).square().sum()) == pytest.approx(float(values[rank:].square().sum()))


def test_whitening_is_worth_it() -> None:
    weight, H = problem(40, 48)
    plain, white = (spectrum(weight, h).factors(12) for h in (None, H))
    assert error(weight, white[1] @ white[0], H) < 0.5 * error(weight, plain[1] @ plain[0], H)


def test_inputs_that_never_come() -> None:
    """Fewer samples than inputs, and inputs that are zero; in single precision too."""
    weight, H = problem(10, 16, samples=5)
    H[3], H[:, 3] = 0, 0
    for dtype in (torch.float32, torch.float64):
        first, last = spectrum(weight.to(dtype), H.to(dtype)).factors(6)
        assert bool(first.isfinite().all() and last.isfinite().all())
        assert error(weight, last @ first, H) < 1e-3
    first, last = spectrum(weight, torch.zeros_like(H)).factors(10)
    assert torch.allclose(last @ first, weight)
    assert spectrum(torch.zeros(4, 6)).error(2) == 0


def test_effective_rank() -> None:
    assert spectrum(torch.eye(7)).effective_rank == pytest.approx(7)
    assert spectrum(torch.ones(7, 5)).effective_rank == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(Sizes, Sizes, st.integers(1, 6))
def test_the_last_factor_is_refitted(outputs: int, inputs: int, rank: int) -> None:
    """The minimum for this first factor: the gradient is zero. What is best already stays."""
    rank = min(rank, inputs)
    weight, H = problem(outputs, inputs)
    first, start = torch.randn(rank, inputs).double(), torch.randn(outputs, rank).double()
    new = refit_last(weight, first, start, H, damping=0)
    assert torch.allclose((weight - new @ first) @ H @ first.mT, torch.zeros(1).double(), atol=1e-6)
    best_first, best_last = spectrum(weight, H, 0).factors(min(rank, outputs))
    assert torch.allclose(refit_last(weight, best_first, best_last, H, 0), best_last, atol=1e-6)


# -- slices ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(Sizes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_slices(outputs: int, width: int, count: int, rank: int) -> None:
    weight, H = problem(outputs, width * count)
    found = slices(weight, count, H, damping=0)
    first, last = found.factors(rank)
    kept = min(rank, outputs, width)
    assert all(f.shape == (kept, width) for f in first) and last.shape == (outputs, count * kept)
    assert sum(f.numel() for f in first) + last.numel() == sliced_parameters(
        outputs, width * count, count, kept
    )
    new = last @ torch.block_diag(*first)
    if rank >= min(width, outputs):
        assert found.bound(rank) == 0
        assert error(weight, new, H) < 1e-9
    # what each slice leaves, were it alone, and refitting all together is no worse
    alone = torch.cat([s.factors(rank)[1] @ s.factors(rank)[0] for s in found.spectra], 1)
    assert error(weight, new, H) <= error(weight, alone, H) + 1e-9


def test_one_slice_is_the_svd() -> None:
    weight, H = problem(9, 14)
    whole = spectrum(weight, H)
    found = slices(weight, 1, H)
    for rank in range(1, 9):
        first, last = found.factors(rank)
        assert torch.allclose(last @ first[0], whole.factors(rank)[1] @ whole.factors(rank)[0])
        assert found.bound(rank) == pytest.approx(float((whole.energies[rank] / whole.energies[0]).sqrt()))


def test_bounds_are_those_of_eckart_and_young() -> None:
    """Met exactly by slices that are all the same."""
    weight, _ = problem(9, 12)
    for count in (1, 2, 3):
        for whole, tight in ((weight, count == 1), (weight[:, :4].repeat(1, count), True)):
            found = slices(whole, count)
            for rank in range(1, 4):
                first, last = found.factors(rank)
                wrong = whole.double() - last @ torch.block_diag(*first)
                error = float(
                    torch.linalg.matrix_norm(wrong, 2) / torch.linalg.matrix_norm(whole.double(), 2)
                )
                assert error <= found.bound(rank) + 1e-9
                assert not tight or error == pytest.approx(found.bound(rank), abs=1e-9)


Tables = st.lists(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(Tables, st.integers(0, 80))
def test_minimax_is_the_best_of_all(table: list[list[tuple[int, int]]], budget: int) -> None:
    errors, costs = (
        [[float(e) for e, _ in row] for row in table],
        [[float(c) for _, c in row] for row in table],
    )
    best = math.inf
    for choice in itertools.product(*(range(len(row)) for row in table)):
        if sum(costs[i][o] for i, o in enumerate(choice)) <= budget:
            best = min(best, max(errors[i][o] for i, o in enumerate(choice)))
    if math.isinf(best):
        with pytest.raises(ValueError, match="cheapest options cost"):
            minimax(errors, costs, budget)
        return
    found = minimax(errors, costs, budget)
    assert sum(costs[i][o] for i, o in enumerate(found)) <= budget
    assert max(errors[i][o] for i, o in enumerate(found)) == best


# -- alternating -------------------------------------------------------------------------------------


def test_conjugate_gradients_find_the_minimum() -> None:
    weight, H = problem(6, 8)
    last = torch.randn(6, 3).double()
    found = descend(
        lambda f: last @ f, torch.zeros(3, 8).double(), weight, H, iterations=200, tolerance=1e-12
    )
    assert torch.allclose(found, torch.linalg.lstsq(last, weight).solution, atol=1e-5)


def test_no_sweep_raises_the_error() -> None:
    weight, H = problem(10, 12)
    factors = [torch.randn(4, 12).double(), torch.randn(10, 4).double()]
    errors = [math.inf]
    for _ in range(30):
        factors = alternate(lambda f, g: g @ f, factors, weight, H, sweeps=2, iterations=12)
        errors.append(error(weight, factors[1] @ factors[0], H))
        assert errors[-1] <= errors[-2] + 1e-12
    assert errors[-1] == pytest.approx(spectrum(weight, H, 0).error(4), rel=0.1)
