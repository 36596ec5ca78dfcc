"""The allocator against every possible choice, its own bounds, and the rate-distortion law."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes.solvers.allocate import Table, allocate, isotonic, lagrangian


def brute_force(
    damages: Table, costs: Table, budget: float, second: Table | None = None, second_budget: float = math.inf
) -> float:
    """Least damage over every choice that fits."""
    best = math.inf
    for choice in itertools.product(*(range(len(row)) for row in damages)):
        if total(costs, choice) <= budget and (second is None or total(second, choice) <= second_budget):
            best = min(best, total(damages, choice))
    return best


def total(table: Table, choice: tuple[int, ...]) -> float:
    return sum(row[option] for row, option in zip(table, choice, strict=True))


def no_single_upgrade_fits(
    damages: Table, costs: Table, budget: float, choice: tuple[int, ...], slack: float = 1e-9
) -> bool:
    for item, row in enumerate(damages):
        for option, damage in enumerate(row):
            extra = costs[item][option] - costs[item][choice[item]]
            if damage < row[choice[item]] - slack and total(costs, choice) + extra <= budget - slack:
                return False
    return True


def tables(draw: st.DrawFn, whole: bool, layers: int = 6) -> tuple[Table, Table]:
    """Ragged tables, damages that need not fall with cost, costs with ties and zeros."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=layers))
    number = st.integers(0, 20) if whole else st.floats(0, 20, allow_subnormal=False)
    damage = st.one_of(st.integers(0, 9), st.floats(0, 10, allow_subnormal=False))
    rows = [draw(st.lists(damage, min_size=n, max_size=n)) for n in sizes]
    return rows, [draw(st.lists(number, min_size=n, max_size=n)) for n in sizes]


@st.composite
def problems(draw: st.DrawFn, whole: bool = True) -> tuple[Table, Table, float]:
    damages, costs = tables(draw, whole)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return damages, costs, draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])) * (most - least) + least


@settings(max_examples=150, deadline=None)
@given(problem=st.one_of(problems(whole=True), problems(whole=False)), states=st.sampled_from([2, 5, 2048]))
def test_equals_brute_force(problem: tuple[Table, Table, float], states: int) -> None:
    damages, costs, budget = problem
    try:
        found = allocate(damages, costs, budget, states=states)
    except ValueError:  # sums of floats in another order
        assert total(costs, tuple(int(np.argmin(row)) for row in costs)) > budget
        return
    best = brute_force(damages, costs, budget)
    assert total(costs, found.choice) == found.cost <= budget
    assert found.damage == pytest.approx(total(damages, found.choice), abs=1e-12)
    assert found.bound <= best * (1 + 1e-9) + 1e-9
    assert no_single_upgrade_fits(damages, costs, budget, found.choice)
    if states == 2048 or found.bound == found.damage:
        assert found.damage <= best + 1e-9


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_lagrangian_is_at_most_one_step_behind(problem: tuple[Table, Table, float]) -> None:
    damages, costs, budget = problem
    exact, quick = allocate(damages, costs, budget), lagrangian(damages, costs, budget)
    step = max(max(row) - min(row) for row in damages)
    assert quick.cost <= budget
    assert quick.bound - 1e-9 <= exact.damage <= quick.damage + 1e-9
    assert quick.damage <= exact.damage + step + 1e-9


def test_bisecting_the_multiplier_finds_the_same() -> None:
    """The slow and obvious way to the Lagrangian's solution."""
    rng = np.random.default_rng(0)
    costs = np.sort(rng.uniform(1, 9, (12, 5)), axis=1)
    damages = -np.sort(-rng.uniform(0, 9, (12, 5)), axis=1)
    rows = np.arange(12)
    for budget in np.linspace(costs.min(1).sum() * 1.01, costs.max(1).sum(), 7):
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            choice = (damages + middle * costs).argmin(1)
            low, high = (low, middle) if costs[rows, choice].sum() <= budget else (middle, high)
        choice = (damages + high * costs).argmin(1)
        found = lagrangian(damages.tolist(), costs.tolist(), float(budget))
        assert found.choice == tuple(choice.tolist())
        dual = (damages + high * costs).min(1).sum() - high * budget
        assert found.bound == pytest.approx(dual, rel=1e-6)


def test_rate_distortion_law() -> None:
    """With ``d = c 4^-b`` for n weights: ``b_l = mean + 1/2 log2(c_l / n_l)`` up to a constant."""
    rng = np.random.default_rng(1)
    c, n = rng.lognormal(0, 2, 30), rng.integers(100, 9000, 30)
    menu = np.arange(0, 12, 1 / 16)
    budget = float(5 * n.sum())
    found = allocate((c[:, None] * 4.0**-menu).tolist(), (n[:, None] * menu).tolist(), budget)
    ratio = 0.5 * np.log2(c / n)
    expected = 5 + ratio - (n * ratio).sum() / n.sum()
    assert expected.min() > 0 and expected.max() < 11.9  # inside the menu, or the law does not hold
    chosen = menu[list(found.choice)]
    assert np.abs(chosen - expected).max() < 0.2
    assert np.abs(chosen - expected).mean() < 0.05


@settings(max_examples=80, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_two_budgets(problem: tuple[Table, Table, float], seed: int, share: float) -> None:
    damages, costs, budget = problem
    rng = np.random.default_rng(seed)
    second = [rng.integers(0, 9, len(row)).tolist() for row in costs]
    limit = share * sum(map(max, second))
    best = brute_force(damages, costs, budget, second, limit)
    if best == math.inf:
        with pytest.raises(ValueError, match="second cost is at least"):
            allocate(damages, costs, budget, second=second, second_budget=limit)
        return
    found = allocate(damages, costs, budget, second=second, second_budget=limit)
    assert found.cost <= budget and found.second == total(second, found.choice) <= limit
    assert found.bound - 1e-9 <= best <= found.damage + 1e-9


def test_two_budgets_are_close_to_optimal_when_there_are_many_items() -> None:
    """The duality gap is that of one item, so it vanishes among many."""
    rng = np.random.default_rng(2)
    n, t = rng.integers(10, 1000, (60, 1)), rng.uniform(1, 5, (60, 1))
    bits = np.array([2.0, 3, 4, 5, 8])
    damages = rng.lognormal(0, 1, (60, 1)) * 4.0**-bits
    costs, second = (n * bits).tolist(), (t * np.array([3.0, 2, 1, 1.5, 2])).tolist()
    budget = float(n.sum() * 4.5)
    free = allocate(damages.tolist(), costs, budget)
    limit = 0.93 * total(second, free.choice)
    found = allocate(damages.tolist(), costs, budget, second=second, second_budget=limit)
    assert free.damage < found.bound <= found.damage < 1.02 * found.bound
    assert found.second <= limit and found.cost <= budget


def test_a_second_budget_that_does_not_bind_changes_nothing() -> None:
    damages, costs = [[3.0, 1.0, 0.0]] * 4, [[1.0, 2.0, 4.0]] * 4
    free = allocate(damages, costs, 9)
    assert allocate(damages, costs, 9, second=costs, second_budget=9).choice == free.choice
    assert allocate(damages, costs, 9, second=costs).choice == free.choice


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_tied_items_choose_alike(problem: tuple[Table, Table, float], data: st.DataObject) -> None:
    damages, costs, budget = problem
    same = [i for i, row in enumerate(damages) if len(row) == len(damages[0])]
    group = data.draw(st.lists(st.sampled_from(same), unique=True))
    best = math.inf
    for choice in itertools.product(*(range(len(row)) for row in damages)):
        if len({choice[i] for i in group}) <= 1 and total(costs, choice) <= budget:
            best = min(best, total(damages, choice))
    if best == math.inf:
        with pytest.raises(ValueError, match="cheapest"):
            allocate(damages, costs, budget, tied=[group])
        return
    found = allocate(damages, costs, budget, tied=[group])
    assert len({found.choice[i] for i in group}) <= 1
    assert found.cost <= budget
    assert total(damages, found.choice) == pytest.approx(best)


def test_thinned_states_stay_near_the_bound() -> None:
    """Few states for many layers: not proven, but within the budget and within a hair of the bound."""
    rng = np.random.default_rng(3)
    n = rng.integers(1000, 100000, (200, 1))
    bits = np.array([2.25, 2.5, 3, 4.25, 4.5, 5, 8.25, 32])
    damages = (rng.lognormal(0, 2, (200, 1)) * 4.0**-bits * rng.lognormal(0, 0.3, (200, 8))).tolist()
    budget = float(3.3 * n.sum())
    found = allocate(damages, (n * bits).tolist(), budget, states=64)
    assert found.cost <= budget
    assert found.bound < found.damage < 1.005 * found.bound
    assert found.damage <= lagrangian(damages, (n * bits).tolist(), budget).damage
    assert no_single_upgrade_fits(damages, (n * bits).tolist(), budget, found.choice)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=7))
def test_isotonic_is_the_projection(values: list[float]) -> None:
    """It obeys the order, keeps the mean (before clamping), and no blend with a feasible point is closer."""
    found = isotonic(values)
    assert all(a >= b for a, b in itertools.pairwise(found)) and min(found) >= 0
    assert isotonic(found) == pytest.approx(found)
    x, y = np.array(values), np.array(found)
    for corner in range(len(values) + 1):  # the cone is generated by 1..1 0..0
        ray = np.arange(len(values)) < corner
        assert ((x - y) * (ray * 5.0 - y)).sum() <= 1e-6


@pytest.mark.parametrize(
    ("damages", "costs", "budget", "tied", "says"),
    [
        ([[1.0, 2.0]], [[1.0]], 9, (), "same shape"),
        ([[1.0], []], [[1.0], []], 9, (), "needs an option"),
        ([[math.nan]], [[1.0]], 9, (), "finite"),
        ([[1.0]], [[math.inf]], 9, (), "finite"),
        ([[1.0]], [[5.0]], 4, (), "cheapest options cost 5, the budget is 4"),
        ([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]], 9, [(0, 1)], "different numbers"),
        ([[1.0], [1.0]], [[1.0], [1.0]], 9, [(0, 1), (1,)], "two tied groups"),
    ],
)
def test_bad_problems(
    damages: Table, costs: Table, budget: float, tied: list[tuple[int, ...]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        allocate(damages, costs, budget, tied=tied)


def test_nothing_to_choose() -> None:
    assert allocate([], [], 0).choice == ()
