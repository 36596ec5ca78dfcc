"""The solver against explicit solves with the dense Hessian, and against all supports of tiny problems."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import PassError
from compress.passes.solvers.chita import (
    Block,
    Method,
    Quadratic,
    _rows,
    back_solve,
    by_magnitude,
    by_obd,
    by_obs,
    by_thresholding,
    joint_solutions,
    mean_diagonal,
    solve,
)
from compress.passes.solvers.fisher import Gradients
from compress.passes.solvers.masks import Scope
from compress.testing import assert_close

BLOCKS: tuple[Block, ...] = ("row", "model")


def example(n: int, seed: int, *, ridge: float = 0.1, rows: int = 3, columns: int = 5) -> Quadratic:
    """Two weights, one with factored gradients and one without."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = noise(rows, columns), noise(2, 3)
    mix = torch.eye(columns) + noise(columns, columns) / 2
    gradients = (
        Gradients.of(noise(n, 1, columns) @ mix, noise(n, 1, rows)),
        Gradients(product=noise(n, 2, 3)),
    )
    return Quadratic(weights, gradients, ridge)


Values = tuple[Tensor, ...]


def gradient(problem: Quadratic, seed: int, slope: float) -> Values:
    """Of the loss, of about this size."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(slope * torch.randn(w.shape, generator=generator) for w in problem.weights)


def flat(values: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([v.flatten() for v in values])


def rows_of(problem: Quadratic) -> Tensor:
    """Which row each parameter belongs to, counted over both weights."""
    (a, b), (c, d) = (w.shape for w in problem.weights)
    return torch.cat([torch.arange(a).repeat_interleave(b), a + torch.arange(c).repeat_interleave(d)])


def dense(problem: Quadratic, block: Block) -> Tensor:
    """Hessian, float64."""
    G = torch.cat([g.dense().flatten(1) for g in problem.gradients], 1).double()
    hessian = G.T @ G / len(G)
    if block == "row":
        owner = rows_of(problem)
        hessian *= owner[:, None] == owner[None, :]
    hessian += problem.ridge * torch.eye(len(hessian), dtype=torch.float64)
    return hessian


def explicit(problem: Quadratic, mask: Tensor, block: Block, linear: Values | None = None) -> Tensor:
    """The minimiser on a support from the normal equations."""
    hessian = dense(problem, block)
    slope = torch.zeros(len(hessian)) if linear is None else flat(linear)
    w = flat(problem.weights).double()
    found = torch.zeros_like(w)
    s = mask.nonzero().flatten()
    if len(s):
        found[s] = torch.linalg.solve(hessian[s][:, s], (hessian @ w - slope.double())[s])
    return found.float()


def value(problem: Quadratic, v: Tensor, block: Block) -> float:
    d = v.double() - flat(problem.weights).double()
    return float(d @ dense(problem, block) @ d / 2)


def masks_like(problem: Quadratic, seed: int, share: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(w.shape, generator=generator) < share for w in problem.weights)


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    ridge=st.sampled_from([1e-3, 0.1, 10.0]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
)
def test_back_solve_is_the_explicit_solution(
    block: Block, n: int, seed: int, share: float, ridge: float, rows: int, columns: int
) -> None:
    problem = example(n, seed, ridge=ridge, rows=rows, columns=columns)
    masks = masks_like(problem, seed, share)
    found = flat(back_solve(problem, masks, block))
    kept = flat(masks)
    assert (found[~kept] == 0).all()
    if kept.any():
        assert_close(explicit(problem, kept, block), found, db=50)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    ridge=st.sampled_from([1e-3, 0.1, 10.0]),
    slope=st.sampled_from([0.0, 1.0, 16.0]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
)
def test_a_step_is_the_explicit_solution(
    n: int, seed: int, share: float, ridge: float, slope: float, rows: int, columns: int
) -> None:
    problem = example(n, seed, ridge=ridge, rows=rows, columns=columns)
    masks, linear = masks_like(problem, seed, share), gradient(problem, seed + 1, slope)
    found = flat(next(joint_solutions(problem, masks, [ridge], linear)))
    kept = flat(masks)
    assert (found[~kept] == 0).all()
    if kept.any():
        assert_close(explicit(problem, kept, "model", linear), found, db=50)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 99), share=st.floats(0.1, 1), columns=st.integers(1, 9))
def test_saliency_is_what_removing_an_entry_costs(n: int, seed: int, share: float, columns: int) -> None:
    problem = example(n, seed, columns=columns)
    masks = masks_like(problem, seed, share)
    kept = flat(masks)
    start = explicit(problem, kept, "row")
    found = flat(tuple(_rows(problem, i, m, saliencies=True)[1] for i, m in enumerate(masks)))
    assert (found[~kept] == 0).all()
    base = value(problem, start, "row")
    for j in kept.nonzero().flatten():
        without = kept.clone()
        without[j] = False
        rise = value(problem, explicit(problem, without, "row"), "row") - base
        assert float(found[j]) == pytest.approx(rise, rel=2e-3, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_objective_and_slope(seed: int) -> None:
    problem = example(6, seed)
    masks = masks_like(problem, seed, 0.5)
    at = tuple(w * m for w, m in zip(problem.weights, masks, strict=True))
    assert problem.objective(at) == pytest.approx(value(problem, flat(at), "model"), rel=1e-4, abs=1e-5)
    expected = dense(problem, "model") @ (flat(at).double() - flat(problem.weights).double())
    assert_close(expected.float(), flat(problem.slope(at)), db=60)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), keep=st.integers(1, 6))
def test_thresholding_is_never_worse_and_the_optimum_never_better(seed: int, keep: int) -> None:
    """Of all supports of 9 parameters, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(9, 9, generator=generator)
    x = torch.randn(30, 9, generator=generator) @ mix
    gradients = (Gradients(x.unsqueeze(1), torch.ones(30, 1, 1)),)
    problem = Quadratic((torch.randn(1, 9, generator=generator),), gradients, 1e-2)
    sparsity = 1 - keep / 9
    best = min(
        value(problem, explicit(problem, mask, "model"), "model")
        for chosen in itertools.combinations(range(9), keep)
        for mask in [torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)]
    )
    start = by_magnitude(problem, sparsity, "global")
    found = by_thresholding(problem, sparsity, "global", start)
    greedy = by_obs(problem, sparsity, "global", rounds=9 - keep)
    assert problem.objective(found.values) <= problem.objective(start.values) * (1 + 1e-6)
    for solution in (found, greedy, by_obd(problem, sparsity, "global")):
        assert int(sum((v != 0).sum() for v in solution.values)) == keep
        assert problem.objective(solution.values) >= best * (1 - 1e-3) - 1e-6


def test_saliency_is_optimal_where_weights_do_not_interact() -> None:
    """Orthogonal gradients: the entries of largest h_j w_j^2 stay, whatever their magnitudes."""
    h = torch.tensor([4.0, 1.0, 9.0, 0.25])
    gradients = (Gradients(product=(torch.diag(h.sqrt()) * 2).view(4, 2, 2)),)
    problem = Quadratic((torch.tensor([[0.6, 1.0], [0.5, 1.5]]),), gradients, 1e-6)
    found = by_obs(problem, 0.5, "global", rounds=1)
    assert found.masks[0].tolist() == [[True, False], [True, False]]
    assert by_obd(problem, 0.5, "global").masks[0].tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_solve_counts_exactly_and_takes_what_the_judge_likes(scope: Scope) -> None:
    problem = example(8, 0, rows=7, columns=11)
    judged: list[float] = []

    def judge(values: tuple[Tensor, ...]) -> float:
        judged.append(value(problem, flat(values), "model"))
        return judged[-1]

    found = solve(problem.weights, problem.gradients, 0.6, scope=scope, judge=judge)
    assert value(problem, flat(found.values), "model") == min(judged)
    removed = [int((v == 0).sum()) for v in found.values]
    if scope == "layer":
        assert removed == [round(0.6 * 77), round(0.6 * 6)]
    assert sum(removed) == round(0.6 * 83)


@pytest.mark.parametrize("method", ["obs", "obd", "magnitude", "thresholding"])
def test_solve_by_one_method(method: Method) -> None:
    problem = example(8, 0, rows=7, columns=11)
    weights, gradients = problem.weights, problem.gradients
    found = solve(weights, gradients, 0.6, method=method, ridge=0.1)
    assert sum(int((v == 0).sum()) for v in found.values) == round(0.6 * 83)
    assert found.support in (method, "magnitude")
    assert found.block == ("row" if method == "obs" else "model")
    for needing in ({}, {"method": method, "linear": weights}):
        with pytest.raises(ValueError, match="need a judge"):
            solve(weights, gradients, 0.6, **needing)


@pytest.mark.parametrize("n", [6, 60])
def test_solutions_for_several_ridges_and_steps_are_those_of_each(n: int) -> None:
    """Six samples for thirty weights, and sixty."""
    masks = masks_like(example(n, 0), 1, 0.7)
    ridges, lengths = (0.1, 2.0), (0.0, 1.0, 4.0)
    problem = example(n, 0)
    linear = gradient(problem, 1, 1.0)
    solutions = joint_solutions(problem, masks, ridges, linear, lengths)
    for (ridge, length), found in zip(itertools.product(ridges, lengths), solutions, strict=True):
        step = tuple(length * v for v in linear)
        expected = explicit(replace(problem, ridge=ridge), flat(masks), "model", step)
        assert_close(expected, flat(found), db=60)


@pytest.mark.parametrize("ridge", [1e-2, 1e-4])
def test_a_small_ridge_leaves_the_step_along_the_gradients_exact(ridge: float) -> None:
    """The gradient of the loss is the mean of those of the samples, as where both are of labels."""
    problem = example(6, 0, columns=9)
    problem = replace(problem, ridge=ridge)
    linear = tuple(g.dense().mean(0) for g in problem.gradients)
    masks = masks_like(problem, 1, 0.9)
    assert int(flat(masks).sum()) > 6
    found = flat(next(joint_solutions(problem, masks, [ridge], linear)))
    assert_close(explicit(problem, flat(masks), "model", linear), found, db=50)


def test_a_training_step_is_the_one_the_judge_likes() -> None:
    """It may be a long one, or none but the pruning."""
    problem = example(8, 0, rows=7, columns=11)
    weights, gradients, linear = problem.weights, problem.gradients, gradient(problem, 1, 1.0)
    unit = mean_diagonal(gradients)
    one = solve(weights, gradients, 0.6, method="obd", ridge=1.0)
    (far,) = joint_solutions(problem, one.masks, [0.03 * unit], linear, [2.0])
    assert float((flat(far) - flat(one.values)).norm()) > 1
    for wanted in (far, one.values):

        def distance(values: tuple[Tensor, ...], wanted: tuple[Tensor, ...] = wanted) -> float:
            return float((flat(values) - flat(wanted)).norm())

        found = solve(weights, gradients, 0.6, method="obd", linear=linear, judge=distance)
        assert_close(flat(wanted), flat(found.values), db=60)


@pytest.mark.parametrize("method", ["obs", "obd", "magnitude", "thresholding"])
def test_a_gradient_that_leads_astray(method: Method) -> None:
    """The support is that without it, and the values are no worse."""
    problem = example(8, 0)
    weights, gradients, linear = problem.weights, problem.gradients, gradient(problem, 1, 1e6)
    plain = solve(weights, gradients, 0.6, method=method, ridge=0.5)

    def loss(values: tuple[Tensor, ...]) -> float:
        return float((flat(values) - flat(weights)).norm())

    found = solve(weights, gradients, 0.6, method=method, ridge=0.5, linear=linear, judge=loss)
    assert torch.equal(flat(found.masks), flat(plain.masks))
    assert loss(found.values) <= loss(plain.values)


@pytest.mark.parametrize("method", ["obs", "obd"])
def test_a_ridge_below_rounding(method: Method) -> None:
    """The same five samples twenty times: their products have no inverse."""
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(5, 1, k, generator=generator).repeat(20, 1, 1) for k in (60, 8))
    weight = torch.randn(8, 60, generator=generator)
    found = solve((weight,), (Gradients(x, delta),), 0.5, method=method, ridge=1e-9)
    assert bool(found.values[0].isfinite().all())
    with pytest.raises(PassError, match="not finite"):
        solve((weight,), (Gradients(x / 0, delta),), 0.5, method=method, ridge=1e-9)


def test_ridge_is_relative_to_the_fisher_information() -> None:
    """Gradients a thousand times larger: the same weights."""
    problem = example(8, 1)
    larger = tuple(Gradients(product=1e3 * g.dense()) for g in problem.gradients)
    assert mean_diagonal(larger) == pytest.approx(1e6 * mean_diagonal(problem.gradients), rel=1e-4)
    results = [
        solve(problem.weights, g, 0.5, ridge=0.2, judge=lambda v: float(v[0].square().sum()))
        for g in (problem.gradients, larger)
    ]
    assert_close(flat(results[0].values), flat(results[1].values), db=60)


def test_dead_inputs_are_removed_first() -> None:
    x = torch.randn(20, 1, 6, generator=torch.Generator().manual_seed(0))
    x[..., :3] = 0
    gradients = (Gradients(x, torch.ones(20, 1, 2)),)
    problem = Quadratic((torch.full((2, 6), 0.3),), gradients, 1e-3)
    found = by_obs(problem, 0.5, "global").masks[0]
    assert (found == torch.tensor([False] * 3 + [True] * 3)).all()
