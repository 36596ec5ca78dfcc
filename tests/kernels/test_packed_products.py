"""What all operators with packed 4-bit weights and float activations promise, for each of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import MissingExtra, PassError
from tests.kernels import test_w4_bsr_matmul, test_w4_matmul, test_w4_sparse24_matmul

Weight = tuple[tuple[Tensor, Tensor, Tensor | None], int, Tensor]
WEIGHTS: dict[str, Callable[..., Weight]] = {
    "w4_bsr_matmul": test_w4_bsr_matmul.weight,
    "w4_matmul": test_w4_matmul.weight,
    "w4_sparse24_matmul": test_w4_sparse24_matmul.weight,
}
LARGEST = {"w4_bsr_matmul": (200, 400), "w4_matmul": (70, 150), "w4_sparse24_matmul": (40, 300)}
"""Rows and columns: of several blocks or tiles."""

every = pytest.mark.parametrize("name", WEIGHTS)


def parts_of(name: str) -> tuple[Any, Any, Any]:
    """The operator, the module of it, and that of its layouts."""
    op = importlib.import_module(f"compress.kernels.{name}.op")
    return getattr(op, name), op, importlib.import_module(f"compress.kernels.{name}.layout")


@every
@settings(max_examples=30)
@given(
    data=st.data(),
    batch=st.lists(st.integers(0, 3), max_size=2),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_operator_equals_float64(
    name: str, data: st.DataObject, batch: list[int], symmetric: bool, dtype: torch.dtype
) -> None:
    operator, _, layouts = parts_of(name)
    rows, columns = (data.draw(st.integers(1, most)) for most in LARGEST[name])
    group_size = data.draw(st.sampled_from([-1, 32, 64, 128] if name != "w4_matmul" else [-1, 16, 32, 64]))
    layout = data.draw(st.sampled_from(layouts.LAYOUTS))
    canonical, width, values = WEIGHTS[name](rows, columns, group_size, symmetric)
    packed = layouts.pack(*canonical, width, columns, layout)
    x = torch.randn(*batch, columns).to(dtype)
    y = operator(x, *packed, width, columns, layout)
    assert y.dtype == dtype and y.shape == (*batch, rows)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y, (x.double() @ values.T).to(dtype), rtol=tolerance, atol=tolerance)


@every
@pytest.mark.parametrize("symmetric", [True, False])
def test_operator_passes_torch_opcheck(name: str, symmetric: bool) -> None:
    operator, _, layouts = parts_of(name)
    canonical, width, _ = WEIGHTS[name](70, 200, 32, symmetric)
    for layout in layouts.LAYOUTS:
        packed = layouts.pack(*canonical, width, 200, layout)
        torch.library.opcheck(operator, (torch.randn(2, 3, 200), *packed, width, 200, layout))


@every
def test_what_does_not_fit_the_operator_is_said(name: str) -> None:
    operator, op, layouts = parts_of(name)
    canonical, width, _ = WEIGHTS[name](4, 32, 32, True)
    packed = layouts.pack(*canonical, width, 32, "canonical")
    for call in (operator, op.on_gpu):
        with pytest.raises(PassError, match="x has 31 columns"):
            call(torch.randn(2, 31), *packed, width, 32, "canonical")
        with pytest.raises(PassError, match="no layout 'other'"):
            call(torch.randn(2, 32), *packed, width, 32, "other")


@every
def test_on_a_gpu_what_is_not_for_the_kernel_is_decoded(name: str) -> None:
    """The canonical layout, and x in float32: no kernel of ours, and so to be tried here."""
    _, op, layouts = parts_of(name)
    canonical, width, values = WEIGHTS[name](20, 96, 32, False)
    x = torch.randn(3, 96)
    for layout in layouts.LAYOUTS:
        y = op.on_gpu(x, *layouts.pack(*canonical, width, 96, layout), width, 96, layout)
        torch.testing.assert_close(y.double(), x.double() @ values.T, rtol=1e-5, atol=1e-5)
    half = op.on_gpu(x.bfloat16(), *layouts.pack(*canonical, width, 96, "canonical"), width, 96, "canonical")
    wanted = torch.nn.functional.linear(x.bfloat16(), values.bfloat16())
    assert torch.equal(half, wanted), "multiplied in the dtype of x"


@every
def test_a_gpu_without_triton_is_told_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, op, layouts = parts_of(name)
    canonical, width, _ = WEIGHTS[name](4, 64, 32, True)
    layout = layouts.LAYOUTS[1]
    packed = layouts.pack(*canonical, width, 64, layout)
    with pytest.raises(MissingExtra, match=r"pip install 'compress-models\[triton\]'"):
        op.on_gpu(torch.randn(2, 64).bfloat16(), *packed, width, 64, layout)
