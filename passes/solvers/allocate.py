"""One allocator for every per-layer choice: the least summed damage under one budget or two.

Items (layers) each take one of their options; an option has a damage and a cost, and what these stand for
(bits, ranks, sparsities; bytes, milliseconds) is the caller's business::

    minimise  sum_l d_l(o_l)    subject to  sum_l c_l(o_l) <= budget    [and  sum_l t_l(o_l) <= second_budget]

This is the multiple-choice knapsack. `lagrangian` walks the lower convex hulls in order of damage saved per
cost (Shoham and Gersho 1988, section III), which is what bisecting the multiplier converges to; it also
gives a lower bound, the dual value. `allocate` starts from there and runs dynamic programming over the
Pareto-optimal partial sums (Nemhauser and Ullmann 1969), dropping each that the dual bound proves to be no
better than what is already in hand (Dyer, Kayal and Walker 1984, section 3). That is exact for any real
costs; should the partial sums ever outgrow `states`, they are thinned to the best of each cost bucket with
their exact costs, so that the budget still holds and only optimality is no longer proven (`bound` says by
how much). A second budget is priced into the damage, and the price bisected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Table = Sequence[Sequence[float]]
"""One row for each item, one entry for each of its options; rows may have different lengths."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        choice: index of the option of each item.
        damage: summed damage of it.
        cost: summed cost of it, at most the budget.
        second: summed second cost; 0 where there is none.
        bound: no choice within the budgets has less damage than this; equal to `damage` where the choice
            is proven to be optimal.
    """

    choice: tuple[int, ...]
    damage: float
    cost: float
    second: float
    bound: float


def allocate(
    damages: Table,
    costs: Table,
    budget: float,
    *,
    second: Table | None = None,
    second_budget: float = math.inf,
    tied: Sequence[Sequence[int]] = (),
    states: int = 2048,
) -> Allocation:
    """The choice of least damage within the budgets.

    No budget is ever exceeded, and no single item can be improved within what is left of them.

    Args:
        damages: of each option of each item; finite.
        costs: the same shape; finite.
        budget: for the summed costs.
        second, second_budget: a second cost and its budget. With it the result is optimal up to the
            duality gap, for which see `Allocation.bound`.
        tied: groups of items that must choose the same option; options are matched by position.
        states: partial sums kept at most. Fewer are quicker.

    Raises:
        ValueError: tables of different shapes, tied items with different numbers of options, or a budget
            that even the cheapest options exceed.
    """
    problem, groups = _problem(damages, costs, budget, second, second_budget, tied)
    found = _one_budget(problem, states) if second is None else _two_budgets(problem, states)
    choice = [0] * len(damages)
    for option, group in zip(found.choice, groups, strict=True):
        for item in group:
            choice[item] = option
    return replace(found, choice=tuple(choice))


def lagrangian(damages: Table, costs: Table, budget: float) -> Allocation:
    """The best choice on the lower convex hulls, and the lower bound that goes with it.

    At most one hull step short of the optimum: ``damage - bound`` is below the damage that the first
    step that no longer fits would have saved.

    Args, raises: as for `allocate`.
    """
    found, _ = _lagrangian(_problem(damages, costs, budget, None, math.inf, ())[0])
    return found


def isotonic(damages: Sequence[float]) -> list[float]:
    """The closest sequence, in least squares, that is never negative and never rises.

    For damages of one item in order of rising precision, where a rise can only be noise: neighbours that
    violate the order are pooled (Ayer et al. 1955).

    >>> isotonic([4.0, 1.0, 2.0, -1.0])
    [4.0, 1.5, 1.5, 0.0]
    """
    pools: list[tuple[float, int]] = []
    for value in damages:
        mean, count = float(value), 1
        while pools and pools[-1][0] < mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    return [max(mean, 0.0) for mean, count in pools for _ in range(count)]


RUINED = 1e12
"""Damage that counts for one that is not finite."""


def monotone(damages: Sequence[float], order: Sequence[int]) -> list[float]:
    """Measured damages of an item's options without their noise.

    Args:
        damages: of each option; what is not finite counts as `RUINED`.
        order: options from the one that should do most damage to the one that should do least.

    >>> monotone([1.0, 2.0, 4.0], order=[2, 0, 1])
    [1.5, 1.5, 4.0]
    """
    clean = isotonic([damages[option] if math.isfinite(damages[option]) else RUINED for option in order])
    return [clean[order.index(option)] for option in range(len(order))]


# -- the problem as arrays ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Damages and costs of items, ties merged: one float64 row of options for each item."""

    damages: list[_Array]
    costs: list[_Array]
    budget: float
    second: list[_Array] | None
    second_budget: float

    def allocation(self, choice: Sequence[int], bound: float) -> Allocation:
        second = 0.0 if self.second is None else _total(self.second, choice)
        return Allocation(
            tuple(choice), _total(self.damages, choice), _total(self.costs, choice), second, bound
        )


def _problem(
    damages: Table,
    costs: Table,
    budget: float,
    second: Table | None,
    second_budget: float,
    tied: Sequence[Sequence[int]],
) -> tuple[_Problem, list[list[int]]]:
    tables = [damages, costs] + ([] if second is None else [second])
    for table in tables[1:]:
        if [len(row) for row in table] != [len(row) for row in damages]:
            raise ValueError("damages and costs must have the same shape")
    if not all(math.isfinite(value) for table in tables for row in table for value in row):
        raise ValueError("damages and costs must be finite")
    if not all(len(row) for row in damages):
        raise ValueError("every item needs an option")
    member = {item for group in tied for item in group}
    groups = [list(group) for group in tied if group]
    if len(member) != sum(map(len, groups)):
        raise ValueError("an item is in two tied groups")
    groups = sorted(groups + [[i] for i in range(len(damages)) if i not in member])

    def merged(table: Table) -> list[_Array]:
        rows = []
        for group in groups:
            if len({len(table[i]) for i in group}) > 1:
                raise ValueError(f"tied items {group} have different numbers of options")
            rows.append(np.sum([np.asarray(table[i], np.float64) for i in group], axis=0))
        return rows

    problem = _Problem(
        merged(damages), merged(costs), budget, None if second is None else merged(second), second_budget
    )
    cheapest = _total(problem.costs, [int(row.argmin()) for row in problem.costs])
    if cheapest > budget:
        raise ValueError(f"the cheapest options cost {cheapest:g}, the budget is {budget:g}")
    return problem, groups


def _total(rows: Sequence[_Array], choice: Sequence[int]) -> float:
    """Left to right, as the dynamic programme adds up, so that both get the same float."""
    total = 0.0
    for row, option in zip(rows, choice, strict=True):
        total += float(row[option])
    return total


# -- one budget -----------------------------------------------------------------------------------


def _lagrangian(problem: _Problem) -> tuple[Allocation, float]:
    """The hull solution and the multiplier it is optimal for."""
    hulls = [_hull(d, c) for d, c in zip(problem.damages, problem.costs, strict=True)]
    steps = []  # (damage saved for each unit of cost, item, position on its hull)
    for item, hull in enumerate(hulls):
        d, c = problem.damages[item], problem.costs[item]
        for position, (a, b) in enumerate(itertools.pairwise(hull), 1):
            steps.append((-(d[a] - d[b]) / (c[b] - c[a]), item, position))
    choice = [hull[0] for hull in hulls]
    multiplier = 0.0
    for slope, item, position in sorted(steps):
        trial = list(choice)
        trial[item] = hulls[item][position]
        if _total(problem.costs, trial) > problem.budget:
            multiplier = -float(slope)
            break
        choice = trial
    left = problem.budget - _total(problem.costs, choice)
    bound = _total(problem.damages, choice) - (multiplier * left if multiplier else 0.0)
    return problem.allocation(choice, bound), multiplier


def _hull(damage: _Array, cost: _Array) -> list[int]:
    """Options on the lower convex hull, from the cheapest to the one of least damage."""
    hull: list[int] = []
    for option in np.lexsort((damage, cost)).tolist():
        if hull and damage[option] >= damage[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rise = (damage[a] - damage[b]) * (cost[option] - cost[b])
            if rise > (damage[b] - damage[option]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(option)
    return hull


def _improved(problem: _Problem, choice: Sequence[int]) -> list[int]:
    """Take single changes that lower the damage within what is left of the budgets, until there is none."""
    current = list(choice)
    limits = [(problem.costs, problem.budget)]
    if problem.second is not None:
        limits.append((problem.second, problem.second_budget))
    while True:
        totals = [_total(rows, current) for rows, _ in limits]
        best, change = 0.0, None
        for item, row in enumerate(problem.damages):
            saved = row[current[item]] - row
            for option in np.flatnonzero(saved > 0).tolist():
                trial = [*current[:item], option, *current[item + 1 :]]
                near = all(
                    total + rows[item][option] - rows[item][current[item]] <= limit * (1 + 1e-9)
                    for total, (rows, limit) in zip(totals, limits, strict=True)
                )
                if near and saved[option] > best and all(_total(r, trial) <= b for r, b in limits):
                    best, change = float(saved[option]), trial
        if change is None:
            return current
        current = change


def _one_budget(problem: _Problem, states: int) -> Allocation:
    start, multiplier = _lagrangian(problem)
    hand = problem.allocation(_improved(problem, start.choice), start.bound)
    choice, proven = _pareto(problem, multiplier, hand, states)
    if choice is not None:
        better = problem.allocation(choice if proven else _improved(problem, choice), start.bound)
        hand = min(hand, better, key=lambda a: a.damage)
    return replace(hand, bound=hand.damage) if proven else hand


def _pareto(
    problem: _Problem, multiplier: float, hand: Allocation, states: int
) -> tuple[list[int] | None, bool]:
    """A choice better than the one in hand, if one was found, and whether that is proven to be the best."""
    count = len(problem.costs)
    least = np.zeros(count + 1)  # cost of everything still to come, at least
    dual = np.zeros(count + 1)  # Lagrangian of everything still to come, at least
    for item in reversed(range(count)):
        d, c = problem.damages[item], problem.costs[item]
        least[item] = least[item + 1] + c.min()
        dual[item] = dual[item + 1] + (d + multiplier * c).min()
    slack = 1e-12 * (abs(problem.budget) + abs(least[0]))
    goal = hand.damage - 1e-12 * abs(hand.damage)
    cost, damage = np.zeros(1), np.zeros(1)
    path: list[
        tuple[NDArray[np.intp], int]
    ] = []  # which state of the item before, times options, plus option
    proven = True
    for item in range(count):
        d, c = problem.damages[item], problem.costs[item]
        cost, damage = (cost[:, None] + c).ravel(), (damage[:, None] + d).ravel()
        room = problem.budget + (slack if item < count - 1 else 0.0) - cost - least[item + 1]
        bound = damage + dual[item + 1]
        if multiplier:  # the budget may be infinite, but not then
            bound += multiplier * (cost - problem.budget)
        kept = np.flatnonzero((room >= 0) & (bound < goal))
        kept = kept[np.lexsort((damage[kept], cost[kept]))]
        if not len(kept):
            return None, proven
        falls = np.minimum.accumulate(damage[kept])
        kept = kept[np.concatenate(([True], falls[1:] < falls[:-1]))]
        if len(kept) > states:
            kept, proven = kept[_thin(cost[kept], damage[kept], multiplier, states)], False
        path.append((kept, len(d)))
        cost, damage = cost[kept], damage[kept]
    state, choice = int(damage.argmin()), []
    for kept, options in reversed(path):
        state, option = divmod(int(kept[state]), options)
        choice.append(option)
    return choice[::-1], proven


def _thin(cost: _Array, damage: _Array, multiplier: float, states: int) -> NDArray[np.intp]:
    """Of states sorted by cost: the cheapest, and the best of each of `states` - 1 buckets of equal width."""
    width = (cost[-1] - cost[0]) / (states - 1)
    bucket = np.minimum((cost - cost[0]) / width, states - 2).astype(np.int64)
    order = np.lexsort((damage + multiplier * cost, bucket))
    first = order[np.concatenate(([True], np.diff(bucket[order]) > 0))]
    return np.unique(np.concatenate(([0], first)))


# -- two budgets ----------------------------------------------------------------------------------

_PRICES = 24
"""Bisections of the price of the second cost; each is one solution for the first budget."""


def _two_budgets(problem: _Problem, states: int) -> Allocation:
    """Bisect theta in ``(1 - theta) d + theta scale t``, the second cost's price relative to the damage."""
    assert problem.second is not None
    rows = list(zip(problem.damages, problem.second, strict=True))
    spread = sum(float(np.ptp(d)) for d, _ in rows), sum(float(np.ptp(t)) for _, t in rows)
    scale = spread[0] / spread[1] if min(spread) > 0 else 1.0

    def solve(theta: float) -> Allocation:
        priced = [(1 - theta) * d + theta * scale * t for d, t in rows]
        return _one_budget(replace(problem, damages=priced, second=None), states)

    frugal = problem.allocation(solve(1.0).choice, -math.inf)
    if frugal.second > problem.second_budget:
        raise ValueError(
            f"within the budget of {problem.budget:g} the second cost is at least {frugal.second:g}, "
            f"its budget {problem.second_budget:g}"
        )
    low, high, bound, best = 0.0, 1.0, -math.inf, frugal
    for step in range(_PRICES):
        theta = (low + high) / 2 if step else 0.0  # first without a price: it may not bind at all
        solved = solve(theta)
        # weak duality: the Lagrangian's least value, less the price of the whole budget
        if theta == 0 or math.isfinite(problem.second_budget):
            dual = solved.bound - (theta * scale * problem.second_budget if theta else 0.0)
            bound = max(bound, dual / (1 - theta))
        found = problem.allocation(solved.choice, 0.0)
        if found.second > problem.second_budget:
            low = theta
            continue
        high = theta
        best = min(best, problem.allocation(_improved(problem, found.choice), 0.0), key=lambda a: a.damage)
        if not theta:
            break
    return replace(best, bound=min(bound, best.damage))
