"""The methods together: each rung of the ladder helps, and none of them minds bad data."""

from __future__ import annotations

import pytest
import torch

from compress.encoding import IntEncoding
from compress.passes.solvers.compose import Inputs, compose
from compress.passes.solvers.scales import decoded
from compress.passes.solvers.targets import Moments
from tests.passes.solvers.problems import Problem, problem

METHODS = ("best", "gptq", "gpfq", "descent", "rtn")


def inputs(p: Problem) -> Inputs:
    cut = p.x.shape[1] // 5

    def moments(part: slice) -> Moments:
        x, x_tilde = p.x[:, part].float(), p.x_tilde[:, part].float()
        return Moments(x_tilde.mT @ x_tilde / x.shape[1], x_tilde.mT @ x / x.shape[1])

    both = moments(slice(None))
    diag = both.H.diagonal(dim1=1, dim2=2)
    return Inputs(diag, both.H, both.G, moments(slice(cut, None)), moments(slice(cut)))


def quantize(p: Problem, data: Inputs, encoding: IntEncoding, method: str) -> torch.Tensor:
    found = compose(p.weight.float(), data, encoding, method=method)  # type: ignore[arg-type]
    return decoded(found.rounded, encoding)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [(2, None), (4, 3), (4, None)])
def test_best_is_best_on_samples_it_has_not_seen(groups: int, bits: tuple[int, int | None]) -> None:
    encoding = IntEncoding(bits[0], 32, False, bits[1])
    p = problem(1, 48, 96, 6000, groups, change=0.2)
    half = Problem(p.weight, p.x[:, :3000], p.x_tilde[:, :3000])
    fresh = Problem(p.weight, p.x[:, 3000:], p.x_tilde[:, 3000:])
    errors = {m: fresh.error(quantize(p, inputs(half), encoding, m)) for m in METHODS}
    assert min(errors, key=errors.__getitem__) == "best"
    assert max(errors, key=errors.__getitem__) == "rtn"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_zeros_stay_zero(method: str, symmetric: bool) -> None:
    p = problem(2, 5, 70, 200, 2, change=0.2)
    p.weight[p.weight.abs() < 0.6] = 0
    values = quantize(p, inputs(p), IntEncoding(4, 16, symmetric), method)
    assert (values[p.weight == 0] == 0).all()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("method", METHODS)
def test_depthwise_dead_and_missing_statistics(method: str) -> None:
    p = problem(3, 1, 9, 40, 12)
    encoding = IntEncoding(4, -1, True)
    H = p.H.float()
    for data in (
        inputs(p),
        Inputs(),
        Inputs(H.diagonal(dim1=1, dim2=2), H),
        Inputs(torch.zeros(12, 9), torch.zeros_like(H), torch.zeros_like(H)),
        Inputs(torch.ones(12, 9), torch.ones_like(H), torch.ones_like(H)),
    ):
        values = quantize(p, data, encoding, method)
        assert (values - p.weight).abs().max() < 0.5 * p.weight.abs().max()


def test_one_row_of_data() -> None:
    p = problem(4, 6, 50, 1)
    H = p.H.float()
    values = quantize(p, Inputs(H.diagonal(dim1=1, dim2=2), H, H), IntEncoding(4, 16, True), "best")
    assert p.error(values) <= p.error(quantize(p, Inputs(), IntEncoding(4, 16, True), "rtn"))


def test_the_same_every_time() -> None:
    p = problem(5, 8, 40)
    encoding = IntEncoding(4, 16, False)
    first, second = (quantize(p, inputs(p), encoding, "best") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-21, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_weights_and_inputs_does_not_matter(method: str, size: float) -> None:
    """Squares of such numbers are 0 or infinite in float32; filters that died in training look like this."""
    p = problem(6, 4, 48, 300, 2, change=0.1)
    encoding, data = IntEncoding(4, 16, False), inputs(p)

    def error(by: float, data: Inputs) -> float:
        weight = (p.weight * by).float()
        found = compose(weight, data, encoding, method=method)  # type: ignore[arg-type]
        return float((weight.double() - decoded(found.rounded, encoding)).norm() / weight.double().norm())

    def scaled(by: float) -> Inputs:
        by /= float(data.H.max())  # type: ignore[union-attr]
        parts = (data.fitting, data.held_out)
        fitting, held_out = (Moments(m.H * by, m.G * by) for m in parts if m is not None)
        return Inputs(data.diag * by, data.H * by, data.G * by, fitting, held_out)  # type: ignore[operator]

    usual = error(1.0, data)
    assert error(size, data) == pytest.approx(usual, rel=0.1)
    assert error(1.0, scaled(size)) == pytest.approx(usual, rel=0.1)
