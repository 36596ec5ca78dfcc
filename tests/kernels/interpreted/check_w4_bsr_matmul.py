"""The Triton kernels of `compress::w4_bsr_matmul` in Triton's interpreter, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.encoding import dequantize
from compress.encoding import pack as pack_bits
from compress.kernels.tuning import Config
from compress.kernels.w4_bsr_matmul import triton as kernels
from compress.kernels.w4_bsr_matmul.layout import pack
from compress.kernels.w4_matmul.layout import kwidth_of
from compress.numerics import relative_error

# rows of blocks: full, empty, and some
USED = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)


def weight(
    rows: int, columns: int, width: int, asymmetric: bool, layout: str
) -> tuple[kernels.Blocks, Tensor]:
    """The packed weight, and its values in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    groups = -(-columns // width)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    if asymmetric:
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    used = USED.repeat_interleave(64, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = torch.where(used, codes, zeros.repeat_interleave(width, 1)[:, :columns])
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 0.01
    words = pack_bits(zeros, 4) if asymmetric else None
    canonical = (pack_bits(codes, 4), scales, words)
    codes, rowptr, colidx, spread, points = pack(*canonical, width, columns, layout)
    assert rowptr is not None and colidx is not None
    blocks = kernels.Blocks(codes, rowptr, colidx, spread, points, kwidth_of(layout))
    return blocks, dequantize(*canonical, 4, width, [rows, columns]).double()


@pytest.mark.parametrize(
    ("m", "rows", "columns", "width", "asymmetric", "layout", "config"),
    [
        (1, 190, 500, 128, False, "bsr_kw2", Config(16, 64, 4, 2, 1)),
        (18, 192, 512, 32, True, "bsr_kw4", Config(16, 64, 4, 2, 1)),
        (5, 130, 400, 64, True, "bsr_kw2", Config(16, 64, 4, 2, 3)),
        (65, 192, 300, 300, True, "bsr_kw4", Config(64, 64, 4, 2, 1)),
    ],
)
def test_product(
    m: int, rows: int, columns: int, width: int, asymmetric: bool, layout: str, config: Config
) -> None:
    blocks, values = weight(rows, columns, width, asymmetric, layout)
    dtype = torch.bfloat16 if asymmetric else torch.float16
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.full((m, rows), float("nan"))
    kernels.launch(x, blocks, config, out=y)
    exact = x.double() @ values.T
    # scales that go on the weights are rounded to the dtype of x first
    limit = 5e-3 if kernels.prescaled(blocks.group, config.block_m) else 1e-6
    assert relative_error(exact, y) < limit
    assert not y[:, 64:128].any()  # a row of blocks that are all zero


@pytest.mark.parametrize(("width", "asymmetric", "layout"), [(128, True, "bsr_kw2"), (32, False, "bsr_kw4")])
def test_decoding(width: int, asymmetric: bool, layout: str) -> None:
    blocks, values = weight(190, 500, width, asymmetric, layout)
    # the interpreter multiplies in float32, but scales are rounded to 16 bits first
    decoded = kernels.decoded(blocks, 500, torch.float16)
    torch.testing.assert_close(decoded.double(), values, rtol=2e-3, atol=0)


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr("compress.kernels.launching.COUNTERS.take", lambda device, count: counters)
    blocks, _ = weight(190, 500, 128, False, "bsr_kw2")
    x = torch.randn(3, 500).half()
    results = [kernels.launch(x, blocks, Config(16, 64, 4, 2, 2)) for _ in range(2)]
    assert torch.equal(*results) and not counters.any()
