"""Scales fitted to codes against one least-squares problem for each row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encoding import IntEncoding
from compress.passes.solvers.scale_refit import refit_scales
from compress.passes.solvers.scales import Rounded, decoded, search_scales
from compress.testing import assert_close
from tests.passes.solvers.problems import problem


def error(weight: Tensor, rounded: Rounded, H: Tensor, encoding: IntEncoding) -> Tensor:
    d = (weight - decoded(rounded, encoding)).view(len(H), -1, weight.shape[1])
    return ((d @ H) * d).sum(-1).flatten()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 70),
    groups=st.sampled_from([1, 2]),
    bits=st.sampled_from([2, 4]),
    group=st.sampled_from([-1, 16]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_least_squares_and_never_worse(
    rows: int, columns: int, groups: int, bits: int, group: int, symmetric: bool, seed: int
) -> None:
    p = problem(seed, rows, columns, 3 * columns, groups)
    encoding = IntEncoding(bits, group, symmetric)
    old = search_scales(p.weight, None, encoding)
    new = refit_scales(p.weight, old, p.H, encoding, damping=0.0)
    before, after = (error(p.weight, r, p.H, encoding) for r in (old, new))
    assert (after <= before * (1 + 1e-5) + 1e-12).all()
    assert (new.scales * old.scales > 0).all()
    assert torch.equal(new.codes, old.codes)
    width, count = encoding.width(columns), encoding.groups(columns)
    for i, w in enumerate(p.weight):
        steps = torch.zeros(columns, count, dtype=torch.float64)
        for j in range(columns):
            z = encoding.zero if old.zero_points is None else int(old.zero_points[i, j // width])
            steps[j, j // width] = int(old.codes[i, j]) - z
        x = p.x[i // rows]
        truth = torch.linalg.lstsq(x @ steps, (x @ w).unsqueeze(1), driver="gelsd").solution[:, 0]
        if (truth * old.scales[i] > 0.11 * old.scales[i].square()).all():
            assert_close(x @ steps @ truth, x @ steps @ new.scales[i].double(), db=60)


def test_a_scale_does_not_change_its_sign() -> None:
    encoding = IntEncoding(4, 16, False)
    weight = torch.ones(1, 32)
    weight[0, 16:] = -1
    codes = torch.full((1, 32), 9, dtype=torch.uint8)
    old = Rounded(codes, torch.ones(1, 2), torch.full((1, 2), 8, dtype=torch.uint8))
    new = refit_scales(weight, old, torch.eye(32)[None], encoding, damping=0.0)
    assert torch.allclose(new.scales, torch.ones(1, 2))  # the second would like to be -1


def test_empty_groups_and_no_data() -> None:
    p = problem(1, 3, 40)
    p.weight[:, 16:32] = 0
    encoding = IntEncoding(4, 16, True)
    old = search_scales(p.weight, None, encoding)
    new = refit_scales(p.weight, old, p.H, encoding)
    assert torch.equal(new.scales[:, 1], old.scales[:, 1])
    assert torch.isfinite(refit_scales(p.weight, old, torch.zeros_like(p.H), encoding).scales).all()
