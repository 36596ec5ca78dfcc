"""The rounding operators against ONNX's definition, written out in float32 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.activations import DYNAMIC, FLOAT8, STATIC, Grid, saturates, summation_order


def linear(x: np.ndarray, scale: np.float32, zero: int) -> np.ndarray:
    """QuantizeLinear, then DequantizeLinear."""
    codes = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int32)
    return (codes - zero).astype(np.float32) * scale


def noise(shape: tuple[int, ...], seed: int, shift: float) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)  # the first call of an operator registers it
@given(SHAPES, st.integers(0, 99), st.floats(1e-3, 10), st.integers(0, 255))
def test_static(shape: tuple[int, ...], seed: int, scale: float, zero: int) -> None:
    x = 100 * noise(shape, seed, 0.3)
    expected = linear(x.numpy(), np.float32(scale), zero)
    assert torch.equal(STATIC(x, scale, zero), torch.from_numpy(expected))


@settings(deadline=None)  # the first call of an operator registers it
@given(SHAPES, st.integers(0, 99), st.sampled_from([-5.0, 0.0, 0.1, 5.0]))
def test_dynamic(shape: tuple[int, ...], seed: int, shift: float) -> None:
    x = noise(shape, seed, shift)
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32(high - low) / np.float32(255)
    expected = linear(x.numpy(), scale, int(np.rint(np.clip(-low / scale, 0, 255))))
    assert torch.equal(DYNAMIC(x), torch.from_numpy(expected))


def test_dynamic_edges() -> None:
    assert torch.equal(DYNAMIC(torch.zeros(3)), torch.zeros(3))
    assert DYNAMIC(torch.zeros(0, 4)).shape == (0, 4)
    assert torch.equal(DYNAMIC(torch.tensor([0.0, 255.0, 1.4])), torch.tensor([0.0, 255.0, 1.0]))


@given(st.floats(-50, 50), st.floats(-50, 50), st.booleans())
@example(0.0, 7.5e-43, False)
def test_a_grid_holds_its_range_and_zero(a: float, b: float, symmetric: bool) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    grid = Grid.of(low, high, symmetric=symmetric)
    assert 0 <= grid.zero_point <= 255
    assert grid.low <= low + grid.scale and grid.high >= high - grid.scale
    assert float(STATIC(torch.zeros(1), grid.scale, grid.zero_point)) == 0
    assert not symmetric or grid.zero_point == 128


@pytest.mark.parametrize(
    ("row", "bad"),
    [([64, 64], False), ([65, 64], True), ([127, 1], False), ([127, 2], True), ([-64, -64], False),
     ([-127, -2], True), ([127, -127], False), ([0, 127, 127], False), ([0, 0, 127, 127], True)],
)  # fmt: skip
def test_saturation_is_where_sixteen_bits_end(row: list[int], bad: bool) -> None:
    codes = torch.tensor([row])
    assert bool(saturates(codes)) == bad
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(-1, 2)
    sums = torch.cat([255 * padded.clamp(min=0).sum(1), 255 * padded.clamp(max=0).sum(1)])
    assert bad == bool(((sums > 2**15 - 1) | (sums < -(2**15))).any())


def test_kernels_sum_channels_last() -> None:
    weight = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7)
    expected = weight.permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(weight.flatten(1)[:, summation_order(weight.shape)], expected)
    assert torch.equal(summation_order((4, 9)), torch.arange(9))


def test_operators_pass_torch_opcheck() -> None:
    x = noise((3, 5), 0, 0.5)
    torch.library.opcheck(STATIC, (x, 0.1, 7))
    torch.library.opcheck(DYNAMIC, (x,))


@pytest.mark.parametrize("operator", [STATIC, DYNAMIC, FLOAT8])
def test_rounded_in_float32_within_mixed_precision(operator: torch._ops.OpOverload) -> None:
    x = noise((64, 64), 0, 0.3).bfloat16()
    arguments = {STATIC: (0.02, 100), DYNAMIC: (), FLOAT8: (0.01,)}[operator]
    with torch.autocast("cpu", torch.bfloat16):
        found = operator(x, *arguments)
    assert found.dtype == torch.float32
    assert torch.equal(found, operator(x.float(), *arguments))
