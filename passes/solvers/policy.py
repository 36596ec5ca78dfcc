"""Policy search over per-layer choices: the allocator that needs no table of damages, only a way to measure.

Every item has a categorical policy over its options. Choices are drawn from all policies together and
measured, and REINFORCE moves the policies towards what was good::

    reward   r = -damage + beta |cost / budget - 1|       (beta < 0; the absolute reward of TuNAS)
    loss       = -(r - moving average of r) sum_l log pi_l(o_l)  -  weight(t) sum_l entropy(pi_l)

with an entropy weight that falls along a cosine, so that exploration ends in one choice. Both sides of the
budget are penalised, so the search settles beside it; the best choice *within* it that was ever measured is
returned. Nothing is trained but the policies.

Source: FLIQS (Dotzel et al. 2023, section 3), whose reward is the accuracy of a batch; the absolute reward is
that of TuNAS (Bender et al. 2020, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

_BETA = -2.0
"""Penalty for missing the budget by its own size, in units of the largest damage seen."""
_RATE = 0.3
_ENTROPY = 0.02


def policy_search(
    measure: Callable[[tuple[int, ...]], float],
    costs: Sequence[Sequence[float]],
    budget: float,
    *,
    start: Sequence[int],
    tied: Sequence[Sequence[int]] = (),
    steps: int = 200,
    seed: int = 0,
) -> tuple[int, ...]:
    """The best choice within the budget among those a policy search measures.

    Args:
        measure: damage of a choice, at least 0; called for each new choice, at most `steps` + 1 times.
        costs: of each option of each item.
        budget: for the summed costs, above 0.
        start: a choice within the budget; measured first, and the result if nothing better is found.
        tied: groups of items that choose alike; options are matched by position.
        steps: choices drawn.
        seed: of the draws.

    Raises:
        ValueError: the start exceeds the budget.
    """
    generator = torch.Generator().manual_seed(seed)
    group = list(range(len(costs)))
    for items in tied:
        for item in items:
            group[item] = min(items)
    leaders = sorted(set(group))
    logits = {leader: torch.zeros(len(costs[leader])) for leader in leaders}

    def total(choice: Sequence[int]) -> float:
        return sum(row[option] for row, option in zip(costs, choice, strict=True))

    if total(start) > budget:
        raise ValueError(f"the start costs {total(start):g}, the budget is {budget:g}")
    best = tuple(start)
    known = {best: measure(best)}
    scale = average = None
    for step in range(steps):
        policies = {leader: logits[leader].softmax(0) for leader in leaders}
        drawn = {
            leader: int(torch.multinomial(policy, 1, generator=generator))
            for leader, policy in policies.items()
        }
        choice = tuple(drawn[leader] for leader in group)
        if choice not in known:
            known[choice] = measure(choice)
        damage, cost = known[choice], total(choice)
        if cost <= budget and damage < known[best]:
            best = choice
        scale = max(scale or 0.0, damage, 1e-30)
        reward = -damage / scale + _BETA * abs(cost / budget - 1)
        average = reward if average is None else 0.9 * average + 0.1 * reward
        weight = _ENTROPY * (1 + math.cos(math.pi * step / steps)) / 2
        for leader, policy in policies.items():
            # gradients of log pi(o) and of the entropy with respect to the logits, in closed form
            towards = -policy
            towards[drawn[leader]] += 1
            log = policy.clamp_min(1e-12).log()
            spread = -policy * (log - (policy * log).sum())
            logits[leader] = logits[leader] + _RATE * ((reward - average) * towards + weight * spread)
    return best
