"""E4M3 numbers against ml_dtypes and against their definition."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.activations import fake_quantize_float8
from compress.float8 import (
    LARGEST,
    Float8Encoding,
    dequantize_float8,
    encode_float8,
    float8_steps,
    to_float8,
)


def numbers() -> list[float]:
    """All finite E4M3 numbers that are not negative, from the definition (arXiv 2209.05433, table 1)."""
    small = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return small + normal


def test_every_number_is_itself() -> None:
    exact = torch.tensor(numbers())
    assert float(exact[-1]) == LARGEST and len(exact) == 127
    assert torch.equal(to_float8(exact).float(), exact)
    assert torch.equal(to_float8(-exact).float(), -exact)
    assert torch.equal(float8_steps(exact[:-1]), exact.diff())


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_the_nearest_and_ties_to_even(values: list[float]) -> None:
    clipped = torch.tensor(values).clamp(-LARGEST, LARGEST)
    found = to_float8(torch.tensor(values)).float()
    wanted = clipped.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(found.numpy(), wanted)
    distances = clipped.abs().unsqueeze(1) - torch.tensor(numbers())
    assert torch.equal((found - clipped).abs(), distances.abs().amin(1))


@given(st.integers(1, 5), st.integers(1, 7), st.sampled_from([(), (3,), (2, 3)]))
@settings(max_examples=30, deadline=None)
def test_a_weight_is_numbers_times_scales(rows: int, columns: int, kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    shape = (rows, columns, *kernel)
    width = math.prod(shape[1:])
    values = to_float8(100 * torch.randn(rows, width, generator=generator)).float()
    scales = torch.rand(rows, 1, generator=generator) + 0.1
    encoded = encode_float8(values, scales, shape, torch.float32)
    assert encoded.nbytes == Float8Encoding().nbytes(rows, width)
    assert torch.equal(encoded.decode(), (values * scales).view(shape))


def test_gradients_reach_scales_and_values_within_range() -> None:
    encoded = encode_float8(torch.tensor([[1.0, -2.0], [3.5, 0.0]]), torch.ones(2, 1), (2, 2), torch.float32)
    scales = encoded.scales.clone().requires_grad_()
    encoded.operator(encoded.codes, scales, [2, 2]).mul(
        torch.tensor([[1.0, 10.0], [1.0, 1.0]])
    ).sum().backward()
    assert scales.grad is not None and scales.grad.tolist() == [[-19.0], [3.5]]
    x = torch.tensor([1.0, 300.0, -500.0], requires_grad=True)
    rounded = fake_quantize_float8(x, 1.0)
    assert rounded.tolist() == [1.0, 288.0, -448.0]
    rounded.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 0.0]


def test_operators_pass_torch_opcheck() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    encoded = encode_float8(x, torch.rand(3, 1) + 0.1, (3, 2, 3), torch.float32)
    scales = encoded.scales.clone().requires_grad_()
    torch.library.opcheck(dequantize_float8, (encoded.codes, scales, [3, 2, 3]))
    torch.library.opcheck(fake_quantize_float8, (x, 0.01))
