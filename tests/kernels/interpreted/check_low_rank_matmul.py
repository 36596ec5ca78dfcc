"""The Triton kernel of `compress::low_rank_matmul` in Triton's interpreter, beside float64.

Not collected by itself: `tests/kernels/test_triton.py` runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

from compress.kernels.low_rank_matmul import triton as kernels
from compress.numerics import relative_error


@pytest.mark.parametrize(
    ("m", "outputs", "columns", "rank", "dtype", "biased"),
    [
        (1, 256, 256, 16, torch.bfloat16, True),
        (16, 128, 128, 64, torch.float16, False),
        (3, 130, 200, 7, torch.bfloat16, True),
        (5, 33, 17, 1, torch.float16, True),
        (2, 300, 130, 100, torch.float16, False),
        (16, 129, 192, 128, torch.bfloat16, False),
    ],
)
def test_product(m: int, outputs: int, columns: int, rank: int, dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(m)
    x, first, last, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((m, columns), (rank, columns), (outputs, rank), (outputs,))
    )
    given = bias if biased else None
    y = torch.full((m, outputs), float("nan"))
    kernels.launch(x, first, last, given, out=y)
    middle = x.double() @ first.double().T
    shift = bias.double() if biased else 0
    exact = middle @ last.double().T + shift
    # what is between is rounded once; the interpreter cuts bfloat16 off
    assert relative_error(exact, y) < (6e-3 if dtype == torch.bfloat16 else 1e-3)
    rounded = (x.float() @ first.float().T).to(dtype)
    if dtype == torch.float16:
        once = rounded.double() @ last.double().T + shift
        assert relative_error(once, y) < 1e-4
    assert kernels.launch(x, first, last, given).dtype == dtype


def test_weights_with_strides() -> None:
    shapes = ((3, 40), (7, 40), (33, 7), (33,))
    plain = [torch.randn(shape).half() for shape in shapes]
    strided = [torch.stack([t, t], -1)[..., 0] for t in plain]
    assert torch.equal(kernels.launch(*strided), kernels.launch(*plain))
