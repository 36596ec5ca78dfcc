"""Drafts of a weight: shapes, sizes as named, and that knowing the inputs helps; ranks of the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.passes.solvers.drafts import drafts, ranks


def problem(*shape: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and the diagonal and all of the second moments of its inputs, for each group."""
    g = torch.Generator().manual_seed(0)
    columns = math.prod(shape[1:])
    x = torch.randn(groups, 300, columns, generator=g) * torch.logspace(0, -1.5, columns)
    H = x.mT @ x / 300
    return torch.randn(shape, generator=g), H.diagonal(dim1=1, dim2=2), H


def error(weight: Tensor, new: Tensor, H: Tensor) -> float:
    groups = len(H)
    w, d = (t.reshape(groups, len(t) // groups, -1) for t in (weight, weight - new))
    return float(((d @ H) * d).sum() / ((w @ H) * w).sum())


@pytest.mark.parametrize(
    ("shape", "groups", "methods"),
    [
        ((48, 64), 1, {"integers", "svd", "mpo", "pruned"}),
        ((24, 10, 3, 3), 1, {"integers", "svd", "tucker", "pruned"}),
        ((12, 3, 3), 4, {"integers", "pruned"}),
    ],
)
def test_sizes_and_errors(shape: tuple[int, ...], groups: int, methods: set[str]) -> None:
    weight, diag, H = problem(*shape, groups=groups)
    informed, blind = list(drafts(weight, diag, H)), list(drafts(weight))
    assert {d.method for d in informed} == methods
    parts = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
    for method in methods:
        mine = [d for d in informed if d.method == method]
        sizes = [d.value.nbytes for d in mine]
        errors = [error(weight, d.value.decode(), H) for d in mine]
        assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
        assert all(d.value.decode().shape == weight.shape for d in mine)
        for draft in mine:
            part = parts.get(draft.setting.split()[0])
            if method == "pruned":
                assert int((draft.value.decode() != 0).sum()) == round((part or 0) * weight.numel())
            elif part is not None:
                assert draft.value.nbytes <= part * 4 * weight.numel()
        others = [error(weight, d.value.decode(), H) for d in blind if d.method == method]
        if groups == 1:
            assert sum(errors) < sum(others)


def test_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 3, generator=g) @ torch.randn(3, 60, generator=g)
    found = ranks(weight + 0.01 * torch.randn(40, 60, generator=g))
    values = torch.linalg.svdvals(weight.double())
    assert found["full"] == 40 and found["evidence"] == 3
    assert found["stable"] == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=0.01)
    assert 2 < found["entropy"] < 6 and "stable of the outputs" not in found
    # inputs in two directions: no more can be seen of the weight
    x = torch.randn(500, 2, generator=g) @ torch.randn(2, 60, generator=g)
    seen = ranks(weight, x.mT @ x / 500)
    assert seen["stable of the outputs"] < 2.1
