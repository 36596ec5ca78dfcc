"""Ranges from histograms against brute force on the values themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.activations import STATIC, Grid
from compress.observe import Histogram
from compress.passes.solvers.ranges import Method, choose_grid


def seen(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def grid(x: torch.Tensor, method: Method, symmetric: bool = False) -> Grid:
    h = seen(x)
    return choose_grid(h.centers, h.counts, h.low, h.high, method, symmetric=symmetric)


def loss(x: torch.Tensor, g: Grid) -> float:
    return float((x - STATIC(x, g.scale, g.zero_point)).double().square().sum())


def long_tailed(seed: int, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) / torch.rand(count, generator=generator).clamp_min(0.02)


@given(st.integers(0, 30), st.booleans(), st.booleans())
def test_mse_beats_the_plain_range(seed: int, positive: bool, symmetric: bool) -> None:
    x = long_tailed(seed)
    x = x.relu() if positive else x
    assert loss(x, grid(x, "mse", symmetric)) <= 1.01 * loss(x, grid(x, "minmax", symmetric))


def test_mse_is_near_the_best_clip() -> None:
    x = long_tailed(3).relu()
    best = min(loss(x, Grid.of(0.0, float(x.max()) * i / 200)) for i in range(1, 201))
    assert loss(x, grid(x, "mse")) <= 1.05 * best


@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_after_a_relu_no_code_is_spent_on_negatives(method: Method) -> None:
    assert grid(torch.rand(1000), method).zero_point == 0


def test_percentile_leaves_out_outliers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([50.0])])
    assert grid(x, "percentile").high < 1.1 < 49 < grid(x, "minmax").high


def test_nothing_but_zeros() -> None:
    assert grid(torch.zeros(5), "mse") == Grid(1.0, 0)
