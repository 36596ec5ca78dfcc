"""The Triton kernel of `compress::w4a8_matmul` in Triton's interpreter, beside float64."""

from __future__ import annotations

import pytest
import torch

from compress.encoding import dequantize
from compress.encoding import pack as pack_bits
from compress.kernels.tuning import Config
from compress.kernels.w4a8_matmul import triton as kernels
from compress.kernels.w4a8_matmul.layout import pack
from compress.numerics import relative_error


@pytest.mark.parametrize(
    ("m", "rows", "columns", "width", "config"),
    [
        (1, 40, 500, 500, Config(16, 64, 4, 2, 1)),
        (18, 130, 300, 64, Config(16, 64, 4, 2, 1)),
        (5, 70, 600, 128, Config(16, 64, 4, 2, 2)),
        (33, 64, 512, 512, Config(32, 64, 4, 2, 3)),
        (65, 20, 256, 256, Config(64, 64, 4, 2, 1)),
    ],
)
def test_product(m: int, rows: int, columns: int, width: int, config: Config) -> None:
    generator = torch.Generator().manual_seed(m)
    codes = pack_bits(torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator), 4)
    scales = torch.rand(rows, -(-columns // width), generator=generator) * 0.02 + 0.01
    packed = pack(codes, scales, None, width, columns, "frag8")
    assert packed[2] is not None
    x = torch.randint(-128, 128, (m, columns), dtype=torch.int8, generator=generator)
    x_scales = torch.rand(m, generator=generator) + 0.5
    zeros = torch.randint(-128, 128, (m,), dtype=torch.int32, generator=generator)
    y = torch.full((m, rows), float("nan"))
    kernels.launch(x, x_scales, zeros, kernels.Packed(packed[0], packed[1], packed[2]), config, out=y)
    values = (x.double() - zeros.unsqueeze(-1)) * x_scales.double().unsqueeze(-1)
    exact = values @ dequantize(codes, scales, None, 4, width, [rows, columns]).double().T
    assert relative_error(exact, y) < 2e-6


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr("compress.kernels.launching.COUNTERS.take", lambda device, count: counters)
    codes, scales, sums = pack(
        torch.full((64, 128), 0x91, dtype=torch.uint8), torch.ones(64, 1), None, 256, 256, "frag8"
    )
    assert sums is not None
    x, ones, zeros = torch.ones(3, 256, dtype=torch.int8), torch.ones(3), torch.zeros(3, dtype=torch.int32)
    for _ in range(2):
        y = kernels.launch(x, ones, zeros, kernels.Packed(codes, scales, sums), Config(16, 64, 4, 2, 2))
        assert torch.equal(y, torch.full((3, 64), 128.0 * (1 - 7)))
    assert not counters.any()
