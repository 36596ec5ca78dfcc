"""Tensor decompositions: exact at full ranks, counts by the formulas, better if they know the inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.chain import Chain, MatrixProduct, contract
from compress.passes.solvers import mpo, separable, tucker
from compress.passes.solvers.low_rank import spectrum

Sizes = st.integers(1, 6)


def problem(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of correlated inputs of different sizes."""
    g = torch.Generator().manual_seed(seed)
    inputs = math.prod(shape[1:])
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    mix *= torch.logspace(0, -2, inputs, dtype=torch.float64)
    x = torch.randn(4 * inputs, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(*shape, generator=g, dtype=torch.float64), x.mT @ x / len(x)


def error(weight: Tensor, new: Tensor, H: Tensor | None = None) -> float:
    w, d = weight.flatten(1), (weight - new).flatten(1)
    h = torch.eye(w.shape[1]).double() if H is None else H
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def dense(found: tuple[Tensor | None, Tensor, Tensor | None]) -> Tensor:
    R, K, L = found
    ones = (1,) * (K.ndim - 2)
    R, L = (None if f is None else f.reshape(*f.shape, *ones) for f in (R, L))
    return Chain("tucker", tuple(f for f in (R, K, L) if f is not None)).decode()


# -- Tucker ------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(Sizes, Sizes, st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_tucker(outputs: int, channels: int, kernel: list[int], data: st.DataObject) -> None:
    weight, H = problem(outputs, channels, *kernel)
    r_in, r_out = data.draw(st.integers(1, channels)), data.draw(st.integers(1, outputs))
    found = tucker.tucker2(weight, (r_in, r_out), H, damping=0)
    count, pixels = sum(f.numel() for f in found if f is not None), math.prod(kernel)
    expected = tucker.parameters(tuple(weight.shape), (r_in, r_out))
    useful = r_in in (channels, min(r_in, outputs * pixels)) and r_out in (outputs, min(r_out, r_in * pixels))
    assert count == expected if useful else count < expected
    new = dense(found)
    assert new.shape == weight.shape
    if (r_in, r_out) == (channels, outputs):
        assert torch.allclose(new, weight)
    # more sweeps are never worse, and none are worse than the best of one side alone
    errors = [
        error(weight, dense(tucker.tucker2(weight, (r_in, r_out), H, sweeps=s, damping=0)), H)
        for s in (0, 2, 6)
    ]
    assert errors[0] + 1e-9 >= errors[1] >= errors[2] - 1e-9
    if r_in == channels:
        assert errors[0] == pytest.approx(spectrum(weight.flatten(1), H, 0).error(r_out), abs=1e-9)


def test_tucker_of_what_has_these_ranks_is_exact() -> None:
    R, K, L = problem(3, 8)[0], problem(4, 3, 3, 3)[0], problem(9, 4)[0]
    weight = dense((R, K, L))
    for H in (None, problem(9, 8 * 9)[1]):
        assert error(weight, dense(tucker.tucker2(weight, (3, 4), H))) < 1e-8


def test_tucker_against_tensorly() -> None:
    """Without inputs it is HOOI; tensorly's is at most as good, to the last digits."""
    tensorly = pytest.importorskip("tensorly")
    partial = pytest.importorskip("tensorly.decomposition").partial_tucker
    weight, _ = problem(12, 10, 3, 3)
    (core, factors), _ = partial(weight.numpy(), rank=[5, 4], modes=[0, 1], n_iter_max=100)
    theirs = torch.from_numpy(tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    ours = dense(tucker.tucker2(weight, (4, 5), sweeps=40))
    assert error(weight, ours) == pytest.approx(error(weight, theirs), rel=0.02)


def test_tucker_knows_the_inputs() -> None:
    weight, H = problem(16, 12, 3, 3)
    plain, white = (error(weight, dense(tucker.tucker2(weight, (5, 6), h)), H) for h in (None, H))
    assert white < 0.5 * plain


def test_tucker_ranks_fit_the_budget() -> None:
    weight, H = problem(20, 12, 3, 3)
    modes = tucker.modes(weight, H)
    shape = tuple(weight.shape)
    for budget in (60, 300, 900, 2000):
        found = modes.ranks(budget)
        assert found is not None and tucker.parameters(shape, found) <= budget
        every = [(i, o) for i in range(1, 13) for o in range(1, 21) if (i, o) != (12, 20)]
        best = min(modes.bound(r) for r in every if tucker.parameters(shape, r) <= budget)
        assert modes.bound(found) == best
    assert modes.ranks(10) is None
    rounded = modes.ranks(900, multiple=4)
    assert rounded is not None and rounded[0] % 4 == 0 and rounded[1] % 4 == 0


# -- matrix product operators ------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.integers(1, 20))
def test_mpo(sites: list[tuple[int, int]], bond: int) -> None:
    """Exact at full bonds; else the error of the first cut at least, of all of them together at most."""
    outputs, inputs = (math.prod(s) for s in zip(*sites, strict=True))
    weight, _ = problem(outputs, inputs)
    shape = tuple(sites)
    cores = mpo.cores_of(weight, shape, bond)
    bonds = [min(bond, b) for b in mpo.full_bonds(shape)]
    assert [c.shape[3] for c in cores[:-1]] == bonds
    assert sum(c.numel() for c in cores) == mpo.parameters(shape, bonds)
    found = float((weight - contract(cores)).square().sum())
    if bond >= max([1, *mpo.full_bonds(shape)]):
        assert found < 1e-18 * weight.numel() + 1e-20
    count = len(sites)
    tensor = weight.reshape(*(o for o, _ in sites), *(i for _, i in sites))
    tensor = tensor.permute([axis for k in range(count) for axis in (k, count + k)])
    cuts = []
    for k in range(1, count):
        rows = math.prod(o * i for o, i in sites[:k])
        cuts.append(float(torch.linalg.svdvals(tensor.reshape(rows, -1))[bond:].square().sum()))
    assert max(cuts, default=0.0) - 1e-9 <= found <= sum(cuts) + 1e-9


def test_mpo_of_unbalanced_sites_is_the_svd() -> None:
    weight, _ = problem(8, 12)
    found = contract(mpo.cores_of(weight, ((8, 1), (1, 12)), 3))
    first, last = spectrum(weight).factors(3)
    assert torch.allclose(found, last @ first)


def test_kronecker_products_are_found() -> None:
    a, b = problem(4, 3)[0], problem(5, 6, seed=1)[0]
    assert torch.allclose(contract(mpo.cores_of(torch.kron(a, b), ((4, 3), (5, 6)), 1)), torch.kron(a, b))


def test_sweeps_with_the_inputs() -> None:
    weight, H = problem(24, 36)
    sites = ((6, 6), (4, 6))
    plain = contract(mpo.cores_of(weight, sites, 5))
    scaled, swept = (
        MatrixProduct.of("mpo", *mpo.matrix_product(weight, sites, 5, H, sweeps=s)).decode() for s in (0, 4)
    )
    assert error(weight, scaled, H) < 0.9 * error(weight, plain, H)
    assert error(weight, swept, H) < 0.8 * error(weight, scaled, H)


def test_bonds_fit_the_budget() -> None:
    sites = ((8, 4), (4, 8))
    for budget in (63, 64, 500, 2000):
        bond = mpo.bond_within(sites, budget)
        assert (bond == 0) == (budget < 64)
        assert mpo.parameters(sites, [bond]) <= budget
        assert bond == 32 or mpo.parameters(sites, [bond + 1]) > budget
    assert mpo.bond_within(sites, 500, 4) == 4
    assert mpo.two_sites(64, 24) == [((32, 2), (2, 12)), ((16, 4), (4, 6))]


# -- one factor for each axis ------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(Sizes, Sizes, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_tensor_trains(outputs: int, channels: int, height: int, width: int, known: bool) -> None:
    weight, H = problem(outputs, channels, height, width)
    h = H if known else None
    full = separable.useful(weight.shape)
    factors = separable.tensor_train(weight, full, h, sweeps=0)
    assert error(weight, Chain("tt", tuple(factors)).decode()) < 1e-12
    p, q, s = (max(1, r // 2) for r in full)
    q = min(q, p * height)
    ranks = (p, q, min(s, q * width))
    factors = separable.tensor_train(weight, ranks, h)
    assert sum(f.numel() for f in factors) == separable.train_parameters(weight.shape, ranks)
    before = Chain("tt", tuple(separable.tensor_train(weight, ranks, h, sweeps=0))).decode()
    # the error that is brought down is that on the damped moments
    assert (
        error(weight, Chain("tt", tuple(factors)).decode(), H if known else None)
        <= 1.1 * error(weight, before, H if known else None) + 1e-9
    )


def test_tensor_train_ranks() -> None:
    weight, H = problem(16, 12, 3, 3)
    assert separable.train_ranks(weight, 20) is None
    errors = []
    for budget in (100, 300, 600, 1200):
        ranks = separable.train_ranks(weight, budget, H=H)
        assert ranks is not None and separable.train_parameters(weight.shape, ranks) <= budget
        errors.append(error(weight, Chain("tt", tuple(separable.tensor_train(weight, ranks, H))).decode(), H))
    assert errors == sorted(errors, reverse=True)
    rounded = separable.train_ranks(weight, 1200, 4, H)
    assert rounded is not None and all(r % 4 == 0 or r in (12, 16) for r in rounded)


def test_cp() -> None:
    """A weight of this rank is found, counts are by the formula, and the inputs are worth knowing."""
    g = torch.Generator().manual_seed(2)
    A, B, D, E = (torch.randn(s, generator=g).double() for s in ((3, 8), (3, 3), (3, 3), (9, 3)))
    weight = torch.einsum("rc,ri,rj,or->ocij", A, B, D, E)
    factors = separable.canonical(weight, 5)
    assert sum(f.numel() for f in factors) == separable.canonical_parameters(weight.shape, 5) == 5 * 23
    assert error(weight, Chain("cp", tuple(factors), (1, 5, 5, 1)).decode()) < 0.02
    weight, H = problem(12, 8, 3, 3)
    plain, known = (
        error(weight, Chain("cp", tuple(separable.canonical(weight, 10, h)), (1, 10, 10, 1)).decode(), H)
        for h in (None, H)
    )
    assert known < 0.8 * plain
