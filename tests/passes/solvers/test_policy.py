"""Policy search: within the budget, no worse than its start, and never better than the exact allocator."""

from __future__ import annotations

import numpy as np
import pytest

from compress.passes.solvers import policy
from compress.passes.solvers.allocate import allocate
from compress.passes.solvers.policy import policy_search


def problem(seed: int, layers: int = 8) -> tuple[list[list[float]], list[list[float]], float]:
    rng = np.random.default_rng(seed)
    n, bits = rng.integers(10, 100, (layers, 1)), np.array([2.0, 4, 8])
    damages = rng.lognormal(0, 1.5, (layers, 1)) * 4.0**-bits
    return damages.tolist(), (n * bits).tolist(), float(4.2 * n.sum())


def total(table: list[list[float]], choice: tuple[int, ...]) -> float:
    return sum(row[o] for row, o in zip(table, choice, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_never_better_than_exact_and_much_better_than_its_start(seed: int) -> None:
    damages, costs, budget = problem(seed)
    start = (0,) * len(damages)
    found = policy_search(lambda c: total(damages, c), costs, budget, start=start, steps=300, seed=seed)
    exact = allocate(damages, costs, budget)
    assert total(costs, found) <= budget
    assert total(damages, found) >= exact.damage * (1 - 1e-9)
    assert total(damages, found) < 0.5 * total(damages, start)


def test_the_policies_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closer to the optimum than as many draws from policies that never move."""

    def behind() -> float:
        ratios = []
        for seed in range(5):
            damages, costs, budget = problem(seed)
            found = policy_search(
                lambda c, d=damages: total(d, c), costs, budget, start=(0,) * 8, steps=300, seed=seed
            )
            ratios.append(total(damages, found) / allocate(damages, costs, budget).damage)
        return float(np.exp(np.log(ratios).mean()))

    learned = behind()
    monkeypatch.setattr(policy, "_RATE", 0.0)
    assert learned < 1.2 < 1.4 < behind()


def test_measured_once_each() -> None:
    damages, costs, budget = problem(0)
    seen: list[tuple[int, ...]] = []

    def measure(choice: tuple[int, ...]) -> float:
        seen.append(choice)
        return total(damages, choice)

    policy_search(measure, costs, budget, start=(0,) * 8, steps=100)
    assert len(seen) == len(set(seen)) <= 101


def test_deterministic_tied_and_kept() -> None:
    damages, costs, budget = problem(1)
    costs[3], tied = costs[2], [(2, 3, 5)]
    exact = allocate(damages, costs, budget, tied=tied).choice
    runs = [
        policy_search(lambda c: total(damages, c), costs, budget, start=exact, tied=tied, steps=50, seed=7)
        for _ in range(2)
    ]
    assert runs[0] == runs[1] == exact  # nothing is better than the optimum
    seen = []
    policy_search(
        lambda c: seen.append(c) or total(damages, c), costs, budget, start=exact, tied=tied, steps=50
    )
    assert all(c[2] == c[3] == c[5] for c in seen) and len(seen) > 10
    with pytest.raises(ValueError, match="the start costs"):
        policy_search(lambda c: 0.0, costs, 1.0, start=exact)
