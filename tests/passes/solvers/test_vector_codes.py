"""Weighted k-means and residual codes against slow references."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.passes.solvers.vector_codes import kmeans, residual_codes


def points(count: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator), torch.rand(count, generator=generator) + 0.01


def error(x: Tensor, mass: Tensor, decoded: Tensor) -> float:
    return float((mass.double() * (x - decoded).double().square().sum(1)).sum())


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.integers(0, 5))
def test_kmeans_is_a_fixed_point(count: int, columns: int, clusters: int, seed: int) -> None:
    x, mass = points(count, columns, seed)
    centres, nearest = kmeans(x, mass, clusters, iterations=100, seed=seed)
    assert centres.shape == (min(clusters, count), columns)
    distance = torch.cdist(x.double(), centres.double())
    assert torch.allclose(distance.gather(1, nearest[:, None])[:, 0], distance.amin(1), atol=1e-3)
    for k in range(len(centres)):
        mine = nearest == k
        assert bool(mine.any())
        mean = (x[mine] * mass[mine, None]).sum(0) / mass[mine].sum()
        assert torch.allclose(centres[k], mean, atol=1e-4)


def test_iterations_never_raise_the_error() -> None:
    x, mass = points(400, 6, 0)
    errors = []
    for iterations in range(6):
        centres, nearest = kmeans(x, mass, 17, iterations=iterations)
        errors.append(error(x, mass, centres[nearest]))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@settings(max_examples=20)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 3))
def test_residual_codes(count: int, columns: int, stages: int, alone: int, seed: int) -> None:
    x, mass = points(count, columns, seed)
    own = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: min(alone, count - 1)]
    found = residual_codes(x, mass, 4, stages, alone=own, seed=seed)
    want = torch.zeros_like(x)
    for stage in range(stages):
        for v in range(count):
            want[v] += found.codebooks[stage][found.maps[stage, v]]
    assert torch.allclose(found.decode(), want, atol=1e-5)
    assert torch.allclose(want[own], x[own], atol=1e-5)
    assert len(set(found.maps[0, own].tolist())) == len(own)
    assert not set(found.maps[0, own].tolist()) & {
        int(found.maps[0, v]) for v in range(count) if v not in own.tolist()
    }


def test_as_many_codes_as_points_are_exact() -> None:
    x, mass = points(33, 5, 0)
    assert torch.allclose(residual_codes(x, mass, 33, 1).decode(), x, atol=1e-6)


def test_more_stages_less_error() -> None:
    x, mass = points(300, 8, 1)
    errors = [error(x, mass, residual_codes(x, mass, 16, stages).decode()) for stages in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
