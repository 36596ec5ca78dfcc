"""2:4 products: the layout, the operator on the CPU, and the assembly of the GPU kernel lane by lane."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.encoding import IntEncoding, dequantize, encode
from compress.errors import PassError
from compress.kernels.w4_sparse24_matmul import op
from compress.kernels.w4_sparse24_matmul.layout import LAYOUTS, pack, unpack

Canonical = tuple[Tensor, Tensor, Tensor | None]


def weight(
    rows: int, columns: int, group_size: int, symmetric: bool, seed: int = 0
) -> tuple[Canonical, int, Tensor]:
    """A canonical weight with at most two of four in use, columns per scale, and its values in float64."""
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(4, group_size, symmetric)
    groups, width = encoding.groups(columns), encoding.width(columns)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    for first in range(0, columns, 4):
        count = min(4, columns - first)
        order = torch.rand(rows, count, generator=generator).argsort(1)
        gone = torch.arange(first, first + count)[order[:, :2]]
        codes.scatter_(1, gone, zeros[:, first // width].unsqueeze(1).expand_as(gone))
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 0.01
    encoded = encode(codes, scales, None if symmetric else zeros, encoding, (rows, columns), torch.float32)
    canonical = (encoded.codes, encoded.scales, encoded.zero_points)
    return canonical, width, dequantize(*canonical, 4, width, [rows, columns]).double()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 300))


@settings(max_examples=30)
@given(size=sizes, group_size=st.sampled_from([-1, 32, 64, 128]), symmetric=st.booleans())
def test_layout_loses_nothing(size: tuple[int, int], group_size: int, symmetric: bool) -> None:
    canonical, width, _ = weight(*size, group_size, symmetric)
    for layout in LAYOUTS:
        back = unpack(*pack(*canonical, width, size[1], layout), width, size[1], layout)
        for before, after in zip(canonical, back, strict=True):
            assert (before is None) == (after is None)
            assert before is None or after is None or torch.equal(before, after)


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_the_layout(symmetric: bool) -> None:
    """Every code and every place of every word, one at a time, from the formulas."""
    rows, columns = 24, 256
    (codes, scales, zeros), width, _ = weight(rows, columns, 32, symmetric)
    packed, metadata, spread, words = pack(codes, scales, zeros, width, columns, "sp24")
    assert packed.shape == (8, 2, 32, 4) and metadata is not None and metadata.shape == (8, 2, 32, 2)
    assert packed.dtype == metadata.dtype == torch.int32
    dense = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    rebuilt = torch.full((128, columns), 255, dtype=torch.uint8)
    for row in range(rows):
        for k in range(columns // 2):
            k128, kept = divmod(k, 64)
            j, inner = divmod(kept, 16)
            r1, t, h = inner // 8, inner % 8 // 2, inner % 2
            g, r0 = row % 8, row % 16 // 8
            code = (int(packed[row // 16, k128, 4 * g + t, j]) >> (4 * (r0 + 2 * r1) + 16 * h)) & 15
            quad, s = inner // 2, inner % 2
            lane = 4 * g + 2 * (j % 2) + quad // 4
            word = int(metadata[row // 16, k128, lane, j // 2])
            place = (word >> (4 * (quad % 4) + 2 * s + 16 * r0)) & 3
            rebuilt[row, 128 * k128 + 32 * j + 4 * quad + place] = code
    used = rebuilt[:rows] != 255
    assert torch.equal(used.view(rows, -1, 4).sum(-1), torch.full((rows, columns // 4), 2))
    assert torch.equal(rebuilt[:rows][used], dense[used])
    for step in range(2):
        for b in range(4):
            assert torch.equal(spread[step, :, b], scales[:, 4 * step + b])
            if zeros is not None:
                assert words is not None
                nibbles = (zeros[:, (4 * step + b) // 2] >> (4 * (b % 2))) & 15
                assert torch.equal((words[step] >> (8 * b)) & 255, nibbles.int())


def test_what_is_not_sparse_is_said() -> None:
    codes = torch.full((2, 8), 0x99, dtype=torch.uint8)
    with pytest.raises(PassError, match="more than two of four"):
        pack(codes, torch.ones(2, 1), None, 16, 16, "sp24")
    with pytest.raises(PassError, match="groups of 16"):
        pack(codes, torch.ones(2, 1), None, 16, 32, "sp24")
    with pytest.raises(PassError, match="no layout 'sp'"):
        pack(codes, torch.ones(2, 1), None, 16, 16, "sp")


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.1, False)])
def test_the_instruction_is_tried_first(
    factor: float, right: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Where it computes something else, it is said once and weights are decoded."""
    triton = pytest.importorskip(
        "compress.kernels.w4_sparse24_matmul.triton", reason="triton is not installed"
    )

    def launch(x: Tensor, *packed: Any) -> Tensor:
        return factor * op.reference.w4_sparse24_matmul(x, *packed[:4], 32, x.shape[1], "sp24")

    monkeypatch.setattr(triton, "launch", launch)
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    op._try.cache_clear()
    assert op._try(0, torch.bfloat16) is op._try(0, torch.bfloat16) is right
    op._try.cache_clear()
    assert len(recwarn) == (not right)


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(op, "_tried", set())
    assert not op.instruction_is_right(0, torch.bfloat16)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_assembly_lane_by_lane(execute: Any, blocks: int, dtype: torch.dtype, symmetric: bool) -> None:
    """One warp, 16 rows, two steps: operands as the kernel addresses them, `mma.sp` as PTX defines it."""
    triton = pytest.importorskip(
        "compress.kernels.w4_sparse24_matmul.triton", reason="triton is not installed"
    )
    tiles = pytest.importorskip("compress.kernels.tiles")
    canonical, width, values = weight(16, 256, 32, symmetric)
    codes, metadata, scales, words = pack(*canonical, width, 256, "sp24")
    assert metadata is not None
    x = torch.randn(8 * blocks, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = x.view(torch.int32).long()
    fp16 = dtype == torch.float16
    base = (tiles.FP16_ADDEND if fp16 else tiles.BF16_ADDEND).value
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    y = torch.zeros(8 * blocks, 16, dtype=torch.float64)
    for step in range(2):
        zeros = (
            torch.full((16, 4), 8)
            if words is None
            else (words[step, :, None] >> torch.arange(0, 32, 8)) & 255
        )
        addends = (zeros.long() * 0x10001) | base
        operands = []
        for four in (codes[0, step].long(), *_x_operands(pairs, g, t, step, blocks)):
            operands += list(four.unbind(1))
        operands += [metadata[0, step, :, i].long() for i in (0, 0, 0, 0, 1, 1, 1, 1)]
        for rows in (g, g + 8):
            operands += list(addends[rows].unbind(1))
        for rows in (g, g + 8):
            operands += list(scales[step, rows].double().unbind(1))
        named = {f"${4 * blocks + i}": value for i, value in enumerate(operands)}
        done = execute(triton._asm(fp16, blocks), named)
        assert triton._constraints(blocks).count(",") + 1 == 4 * blocks + len(operands)
        for i in range(4 * blocks):
            y[8 * (i // 4) + 2 * t + i % 2, g + 8 * (i % 4 // 2)] += done[f"${i}"]
    torch.testing.assert_close(y, x.double() @ values.T, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_decoding_compiles() -> None:
    triton = pytest.importorskip(
        "compress.kernels.w4_sparse24_matmul.triton", reason="triton is not installed"
    )
    for capability in (80, 120):
        assert triton.compiled_decoding(capability, zero_points=True).spilled == 0


def _x_operands(pairs: Tensor, g: Tensor, t: Tensor, step: int, blocks: int) -> list[Tensor]:
    """``x0 + k + 4 * i`` and ``x1 + k + 4 * i`` of the kernel."""
    place = 64 * step + t[:, None] + 16 * torch.arange(4)
    return [pairs[g[:, None] + 8 * block, place + 4 * i] for block in range(blocks) for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "blocks", "split", "zero_points", "budget"),
    [
        (90, 1, 1, False, 2.6),
        (90, 1, 4, True, 3.0),
        (90, 2, 4, True, 3.9),
        (80, 1, 1, True, 3.0),
        (120, 1, 4, True, 3.2),
    ],
)
def test_machine_code(capability: int, blocks: int, split: int, zero_points: bool, budget: float) -> None:
    """The sparse instruction is there, nothing spills, and lanes hold the rows that the kernel gives them."""
    triton = pytest.importorskip(
        "compress.kernels.w4_sparse24_matmul.triton", reason="triton is not installed"
    )
    built = triton.compiled(capability, blocks, split, zero_points)
    loop = built.loop()
    units = {name.split(".")[0] for name in loop}
    assert sum(n for name, n in loop.items() if name.startswith("HMMA.SP")) == 8 * blocks
    assert built.spilled == 0 and not units & {"I2F", "I2FP", "STS", "STL", "LDL", "LDG"}, loop
    assert built.shared <= 101376
    # places of rows of x and of y: hosts of plugins come with any number of them
    assert all(f"arith.extsi %{width} : i32 to i64" in built.ttgir for width in "KN")
    assert sum(loop.values()) / 128 <= budget  # two tiles of 16 x 128 weights for 32 lanes
    for layout in built.layouts("elementwise_inline_asm"):
        assert (
            "sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [4, 1], order = [1, 0]" in layout
        )
