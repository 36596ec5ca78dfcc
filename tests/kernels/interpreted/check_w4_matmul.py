"""The Triton kernels of `compress::w4_matmul` in Triton's interpreter, beside float64.

Not collected by itself: `tests/kernels/test_triton.py` runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.encoding import IntEncoding, dequantize, encode
from compress.kernels.tuning import Config
from compress.kernels.w4_matmul import plugin
from compress.kernels.w4_matmul import triton as kernels
from compress.kernels.w4_matmul.layout import kwidth_of, pack, step_of, unpack
from compress.numerics import relative_error

LAYOUTS = ("frag16_kw2", "frag16_kw4")


def weight(
    rows: int, columns: int, group_size: int, symmetric: bool, layout: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """The packed weight, and its values in float64 with the scales as they are stored."""
    generator = torch.Generator().manual_seed(rows + columns)
    encoding = IntEncoding(4, group_size, symmetric)
    groups, width = encoding.groups(columns), encoding.width(columns)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 0.01
    zeros = (
        None if symmetric else torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    )
    encoded = encode(codes, scales, zeros, encoding, (rows, columns), torch.float32)
    stored = encoded.scales.to(dtype)
    arguments = (encoded.codes, stored.float(), encoded.zero_points, 4, width, [rows, columns])
    packed = pack(encoded.codes, stored, encoded.zero_points, width, columns, layout)
    return packed, dequantize(*arguments).double()


@pytest.mark.parametrize(
    ("m", "rows", "columns", "group_size", "symmetric", "layout", "scales", "config"),
    [
        # odd sizes in every direction, all layouts, groups and dtypes of scales
        (1, 40, 512, 128, True, LAYOUTS[0], torch.bfloat16, Config(16, 64, 4, 2, 1)),
        (5, 72, 600, 128, False, LAYOUTS[1], torch.bfloat16, Config(16, 128, 4, 2, 1)),
        (17, 70, 200, 64, False, LAYOUTS[0], torch.float32, Config(16, 128, 4, 2, 1)),
        (3, 33, 250, 64, True, LAYOUTS[1], torch.float16, Config(32, 64, 4, 2, 1)),
        (4, 64, 130, 32, False, LAYOUTS[0], torch.bfloat16, Config(16, 64, 4, 2, 1)),
        (4, 64, 128, 32, True, LAYOUTS[1], torch.float32, Config(16, 64, 4, 2, 1)),
        (2, 31, 99, 16, False, LAYOUTS[1], torch.bfloat16, Config(16, 64, 4, 2, 1)),
        (65, 20, 384, 128, False, LAYOUTS[0], torch.bfloat16, Config(64, 64, 4, 2, 1)),
        (2, 50, 70, -1, False, LAYOUTS[0], torch.float32, Config(16, 64, 4, 2, 1)),
        # K shared by several programs, evenly and not
        (5, 70, 1024, 128, False, LAYOUTS[0], torch.bfloat16, Config(16, 64, 4, 2, 2)),
        (18, 40, 640, 32, False, LAYOUTS[1], torch.bfloat16, Config(16, 64, 4, 2, 4)),
    ],
)
def test_product(
    m: int,
    rows: int,
    columns: int,
    group_size: int,
    symmetric: bool,
    layout: str,
    scales: torch.dtype,
    config: Config,
) -> None:
    dtype = torch.float16 if symmetric else torch.bfloat16
    packed, values = weight(rows, columns, group_size, symmetric, layout, scales)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.full((m, rows), float("nan"))
    kernels.launch(x, *packed, kwidth_of(layout), config, out=y)
    # scales that go on the weights are rounded to the dtype of x first
    group, _ = step_of(columns if group_size == -1 else group_size, columns)
    narrowed = kernels.prescaled(group, config.block_m) and scales != dtype
    assert relative_error(x.double() @ values.T, y) < (5e-3 if narrowed else 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("group_size", "symmetric"), [(128, True), (64, False), (32, False), (16, True)])
def test_decoding(layout: str, group_size: int, symmetric: bool) -> None:
    packed, values = weight(70, 300, group_size, symmetric, layout, torch.float16)
    decoded = kernels.decoded(*packed, 300, kwidth_of(layout), torch.float16)
    # exact: the interpreter multiplies in float32, and the result is rounded once
    assert torch.equal(decoded, values.half())


def test_counters_are_left_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr("compress.kernels.launching.COUNTERS.take", lambda device, count: counters)
    packed, values = weight(40, 512, 64, True, LAYOUTS[0], torch.bfloat16)
    x = torch.randn(3, 512).bfloat16()
    results = [kernels.launch(x, *packed, 2, Config(16, 64, 4, 2, 2)) for _ in range(2)]
    assert torch.equal(*results) and not counters.any()
    assert relative_error(x.double() @ values.T, results[0]) < 6e-3  # the interpreter cuts bfloat16 off


def test_arguments_in_the_order_of_a_plugin() -> None:
    """Inputs, whole numbers, output: what a host passes, and no more."""
    m, rows, columns = 19, 70, 304
    (codes, scales, zeros), values = weight(rows, columns, 128, False, "frag16_kw2", torch.float16)
    canonical = unpack(codes, scales, zeros, 128, columns, "frag16_kw2")
    assert canonical[2] is not None
    packed = plugin.packed(*canonical, 128, columns, 90)
    steps, _, step = packed[1].shape
    config = plugin.CONFIGS[0]
    group = packed[0].shape[1] * 64 // (steps * step)
    assert group * step <= 256, "as long as shared memory is short"
    fixed = kernels.constants(config, group, step, 2, torch.float16, True, columns, steps)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(0)).half()
    y = torch.full((m, rows), float("nan"))
    given = (x, packed[0], packed[1].view(torch.int32), packed[2], m, rows, columns, steps, y)
    plugin.plugin_kernel[(-(-rows // config.block_n), -(-m // config.block_m))](*given, **fixed)
    assert relative_error(x.double() @ values.T, y) < 1e-6
