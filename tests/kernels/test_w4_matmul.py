"""4-bit products: the layouts of the weight, and the operator on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encoding import IntEncoding, encode
from compress.errors import PassError
from compress.kernels.w4_matmul.layout import LAYOUTS, layout_for, pack, step_of, unpack
from compress.kernels.w4_matmul.op import w4_matmul

DEVICE = LAYOUTS[1:]


def weight(
    rows: int, columns: int, group_size: int, symmetric: bool, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor | None], int, Tensor]:
    """A canonical 4-bit weight, its columns per scale, and its values in float64, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(4, group_size, symmetric)
    groups, width = encoding.groups(columns), encoding.width(columns)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 0.01
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    if symmetric:
        zeros.fill_(8)
    values = torch.tensor(
        [
            [
                (int(codes[n, k]) - int(zeros[n, k // width])) * float(scales[n, k // width])
                for k in range(columns)
            ]
            for n in range(rows)
        ],
        dtype=torch.float64,
    )
    encoded = encode(codes, scales, None if symmetric else zeros, encoding, (rows, columns), torch.float32)
    return (encoded.codes, encoded.scales, encoded.zero_points), width, values


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    group_size=st.sampled_from([-1, 16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_layouts_lose_nothing(rows: int, columns: int, group_size: int, symmetric: bool, layout: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    encoding = IntEncoding(4, group_size, symmetric)
    groups, width = encoding.groups(columns), encoding.width(columns)
    codes = torch.randint(0, 256, (rows, (columns + 1) // 2), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 256, (rows, (groups + 1) // 2), dtype=torch.uint8, generator=generator)
    if columns % 2:
        codes[:, -1] &= 15  # bits past the last column are zero
    if groups % 2:
        zeros[:, -1] &= 15
    scales = torch.randn(rows, groups, generator=generator)
    canonical = (codes, scales, None if symmetric else zeros)
    packed = pack(*canonical, width, columns, layout)
    back = unpack(*packed, width, columns, layout)
    for before, after in zip(canonical, back, strict=True):
        assert (before is None) == (after is None)
        assert before is None or after is None or torch.equal(before, after)


@pytest.mark.parametrize("layout", DEVICE)
@pytest.mark.parametrize("group_size", [16, 32, 128, 256, -1])
def test_device_layout_one_step_at_a_time(layout: str, group_size: int) -> None:
    """Scales and zero points stand where the kernel reads them: step, row, group of the step."""
    rows, columns = 40, 600
    (codes, scales, zeros), width, _ = weight(rows, columns, group_size, symmetric=False)
    device_codes, device_scales, words = pack(codes, scales, zeros, width, columns, layout)
    group, step = step_of(width, columns)
    steps, out_rows, _ = device_scales.shape
    assert device_scales.shape[2] == step
    assert zeros is not None
    assert out_rows == rows and words is not None and words.shape == (steps, rows)
    assert device_codes.shape[0] * 16 == 64
    assert device_codes.shape[1] * 64 == steps * step * group >= columns
    for i in range(steps):
        for b in range(step):
            column = (i * step + b) * group
            for n in range(rows):
                if column >= columns:
                    assert device_scales[i, n, b] == 0
                    continue
                source = column // width
                assert device_scales[i, n, b] == scales[n, source]
                nibble = (int(zeros[n, source // 2]) >> (4 * (source % 2))) & 15
                assert (int(words[i, n]) >> (8 * b)) & 255 == nibble


def test_scales_keep_their_dtype() -> None:
    (codes, scales, _), width, _ = weight(16, 128, 32, symmetric=True)
    packed = pack(codes, scales.bfloat16(), None, width, 128, "frag16_kw2")
    assert packed[1].dtype == torch.bfloat16 and packed[2] is None


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [
        (128, 4096, (128, 4)),
        (256, 11008, (128, 4)),
        (128, 1280, (128, 2)),
        (128, 384, (64, 2)),
        (384, 384, (64, 2)),
        (64, 192, (32, 2)),
        (32, 384, (32, 4)),
        (48, 480, (16, 4)),
        (100, 100, (64, 2)),
        (7, 7, (32, 2)),
    ],
)
def test_steps_pad_few_columns(group_size: int, columns: int, expected: tuple[int, int]) -> None:
    assert step_of(group_size, columns) == expected


def test_the_layout_of_a_gpu() -> None:
    assert layout_for((9, 0)) == "frag16_kw2"
    assert {layout_for(c) for c in ((8, 0), (8, 9), (10, 0), (12, 0))} == {"frag16_kw4"}


def test_what_does_not_fit_is_said() -> None:
    (codes, scales, zeros), width, _ = weight(16, 128, 32, symmetric=True)
    with pytest.raises(PassError, match="no layout 'frag8'"):
        pack(codes, scales, zeros, width, 128, "frag8")
    with pytest.raises(PassError, match="groups of 24"):
        pack(codes, torch.ones(16, 6), None, 24, 128, "frag16_kw2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_exports_with_a_dynamic_batch(layout: str) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            canonical, self.width, _ = weight(20, 96, 32, symmetric=True)
            codes, scales, _ = pack(*canonical, self.width, 96, layout)
            self.register_buffer("codes", codes)
            self.register_buffer("scales", scales)

        def forward(self, x: Tensor) -> Tensor:
            return w4_matmul(x, self.codes, self.scales, None, self.width, 96, layout)

    module, x = Linear(), torch.randn(7, 96)
    program = torch.export.export(
        module, (torch.randn(2, 96),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["compress.w4_matmul.default"]
    assert torch.equal(program.module()(x), module(x))
