"""Products with blocks of zeros: the layout, the operator on the CPU, which weights get it, machine code."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.encoding import EncodedWeight, IntEncoding, dequantize, encode
from compress.errors import PassError
from compress.kernels.products import BREAK_EVEN, W4_BSR_MATMUL, W4_MATMUL, product_for
from compress.kernels.runtime import CompressedModule, for_device, packed_parts
from compress.kernels.tuning import Config, Problem, rule_for_short_steps
from compress.kernels.w4_bsr_matmul.layout import LAYOUTS, group_of, layout_for, pack, unpack
from compress.testing import assert_close
from tests.kernels.gpus import GPUS

Canonical = tuple[Tensor, Tensor, Tensor | None]


def weight(
    rows: int, columns: int, group_size: int, symmetric: bool, seed: int = 0
) -> tuple[Canonical, int, Tensor]:
    """A canonical weight with about half of its blocks zero, columns per scale, its values in float64."""
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(4, group_size, symmetric)
    groups, width = encoding.groups(columns), encoding.width(columns)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    for row in range(0, rows, 64):
        for column in range(0, columns, 128):
            if torch.rand((), generator=generator) < 0.5:
                for k in range(column, min(column + 128, columns)):
                    codes[row : row + 64, k] = zeros[row : row + 64, k // width]
    scales = torch.rand(rows, groups, generator=generator) * 0.02 + 0.01
    encoded = encode(codes, scales, None if symmetric else zeros, encoding, (rows, columns), torch.float32)
    canonical = (encoded.codes, encoded.scales, encoded.zero_points)
    return canonical, width, dequantize(*canonical, 4, width, [rows, columns]).double()


sizes = st.tuples(st.integers(1, 200), st.integers(1, 400))
group_sizes = st.sampled_from([-1, 32, 64, 128, 256])


@settings(max_examples=30)
@given(size=sizes, group_size=group_sizes, symmetric=st.booleans(), seed=st.integers(0, 99))
def test_layouts_lose_nothing(size: tuple[int, int], group_size: int, symmetric: bool, seed: int) -> None:
    canonical, width, _ = weight(*size, group_size, symmetric, seed)
    for layout in LAYOUTS:
        back = unpack(*pack(*canonical, width, size[1], layout), width, size[1], layout)
        for before, after in zip(canonical, back, strict=True):
            assert (before is None) == (after is None)
            assert before is None or after is None or torch.equal(before, after)


@pytest.mark.parametrize("kwidth", [2, 4])
def test_stored_blocks_from_the_formulas(kwidth: int) -> None:
    """Which blocks are stored, where each says it is, and every code at the place of frag16."""
    rows, columns = 192, 384
    canonical, width, values = weight(rows, columns, 128, symmetric=True, seed=3)
    codes, rowptr, colidx, scales, _ = pack(*canonical, width, columns, f"bsr_kw{kwidth}")
    assert rowptr is not None and colidx is not None
    blocks = values.view(3, 64, 3, 128).transpose(1, 2)
    used = [(i, j) for i in range(3) for j in range(3) if bool(blocks[i, j].any())]
    assert 0 < len(used) < 9 and codes.shape == (len(used), 4, 2, 32, 4)
    counts = [sum(i == row for i, _ in used) for row in range(3)]
    assert rowptr.tolist() == [sum(counts[:i]) for i in range(4)]
    assert colidx.tolist() == [j for _, j in used] + [0]
    assert codes.dtype == rowptr.dtype == colidx.dtype == torch.int32
    for block, (i, j) in enumerate(used):
        for n, k in ((0, 0), (9, 3), (63, 127), (17, 64), (40, 77)):
            inner = k % 16
            if kwidth == 2:
                r1, t, h = inner // 8, inner % 8 // 2, inner % 2
            else:
                t, r1, h = inner // 4, inner % 4 // 2, inner % 2
            word = int(codes[block, n // 16, k // 64, 4 * (n % 8) + t, k % 64 // 16])
            code = (word >> (4 * (n % 16 // 8 + 2 * r1) + 16 * h)) & 15
            assert float((code - 8) * scales[j, 64 * i + n, 0]) == blocks[i, j, n, k]


def test_what_does_not_fit_is_said() -> None:
    canonical, width, _ = weight(64, 128, 32, symmetric=True)
    with pytest.raises(PassError, match="no layout 'csr'"):
        pack(*canonical, width, 128, "csr")
    with pytest.raises(PassError, match="groups of 16 columns"):
        pack(canonical[0], torch.ones(64, 8), None, 16, 128, "bsr_kw2")
    with pytest.raises(PassError, match=r"torch\.bfloat16"):
        pack(canonical[0], canonical[1].bfloat16(), None, width, 128, "bsr_kw2")
    assert [group_of(g, 512) for g in (16, 32, 96, 64, 256, 512, 600)] == [0, 32, 32, 64, 128, 128, 128]
    assert {layout_for(c) for c in ((8, 0), (8, 9), (10, 0), (12, 0))} == {"bsr_kw4"}


# -- in models ------------------------------------------------------------------------------------


def pruned(sparsity: float, dtype: torch.dtype, group: int = 32) -> compress.Result:
    torch.manual_seed(0)
    recipe = {
        "passes": [
            {"pass": "prune_magnitude", "pattern": "block:64x128", "sparsity": sparsity},
            {"pass": "quantize_weights", "bits": 4, "group_size": group, "symmetric": False},
        ]
    }
    return compress.run(
        nn.Linear(512, 256).to(dtype), recipe, example_inputs=(torch.randn(2, 512).to(dtype),)
    )


def test_pruned_by_blocks_and_quantized() -> None:
    result = pruned(0.5, torch.bfloat16)
    module = result.module()
    assert isinstance(module, CompressedModule)
    (node,) = (n for n in module.graph.nodes if n.target is W4_BSR_MATMUL)
    x = torch.randn(3, 512).bfloat16()
    want, before = module(x), module.state_dict()
    # the operator rounds the product before the bias is added, the graph the weight before it multiplies
    assert_close(result.graph.run([x])[0], want, db=35)
    for_device(module, (9, 0))
    (node,) = (n for n in module.graph.nodes if n.target is W4_BSR_MATMUL)
    assert node.args[-1] == "bsr_kw2"
    parts = packed_parts(module)
    assert parts["weight.codes_device"].shape[0] == 8  # of 16 blocks
    assert torch.equal(module(x), want)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    other = copy.deepcopy(module)
    other.load_state_dict(before)
    assert torch.equal(other(x), want)
    program = torch.export.export(module, (x,))
    assert any(n.target is W4_BSR_MATMUL for n in program.graph.nodes)
    assert torch.equal(program.module()(x), want)


@pytest.mark.parametrize(
    ("sparsity", "dtype", "group", "operator", "said"),
    [
        (0.5, torch.float16, 128, W4_BSR_MATMUL, ""),
        (0.5, torch.float32, 32, W4_MATMUL, "in 16 bits only"),
        (0.5, torch.bfloat16, 16, W4_MATMUL, "groups of 16"),
        (0.125, torch.bfloat16, 32, W4_MATMUL, "12% of its blocks of 64x128 are zero"),
        (0.0, torch.bfloat16, 32, W4_MATMUL, ""),
    ],
)
def test_which_weights_get_it(
    sparsity: float, dtype: torch.dtype, group: int, operator: object, said: str
) -> None:
    encoded = pruned(sparsity, dtype, group=group).graph.encodings["weight"]
    assert isinstance(encoded, EncodedWeight)
    product, reason = product_for(encoded)
    assert product.operator is operator
    assert said in reason and bool(said) == bool(reason)
    assert BREAK_EVEN > 0.125


def test_export_load_run(tmp_path: Path) -> None:
    result = pruned(0.5, torch.bfloat16)
    path = tmp_path / "model.safetensors"
    artifact = compress.export(result.graph, path, "torch")
    assert [form.loads_as for form in artifact.lowered] == ["compress::w4_bsr_matmul"]
    x = torch.randn(3, 512).bfloat16()
    assert torch.equal(compress.load(path)(x), result.module()(x))


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "block_m", "group", "zero_points", "split", "budget"),
    [
        (90, 16, 128, False, 1, 3.5),
        (90, 16, 32, True, 4, 5.3),
        (90, 64, 128, True, 1, 5.4),
        (80, 16, 128, True, 1, 4.3),
        (89, 16, 32, True, 1, 5.6),
        (120, 16, 64, True, 4, 4.8),
    ],
)
def test_machine_code(
    capability: int, block_m: int, group: int, zero_points: bool, split: int, budget: float
) -> None:
    """Weights stay in registers; no load waits but the one index. Budgets hold for Triton 3.6 and 3.9."""
    triton = pytest.importorskip("compress.kernels.w4_bsr_matmul.triton", reason="triton is not installed")
    gpu = GPUS[capability]
    problem = Problem(block_m, 4096, 4096, group, 128 // group, 32)
    config = Config(block_m, 64, 4, rule_for_short_steps(problem, gpu, 2).stages, split)
    built = triton.compiled(capability, config, group, zero_points)
    assert built.spilled == 0 and built.shared <= gpu.shared // 2
    loop = built.loop()
    units = {name.split(".")[0] for name in loop}
    assert ("HGMMA" if capability == 90 else "HMMA") in units
    assert not units & {"I2F", "I2FP", "STS", "STL", "LDL"} and loop["LDG.E"] <= 1, loop
    assert sum(n for name, n in loop.items() if name.startswith("LDG.")) == 1, loop
    assert sum(loop.values()) / (64 * 128 / (32 * config.warps)) <= budget


def test_launches_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("compress.kernels.w4_bsr_matmul.triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "measured", lambda *_: None)
    canonical, width, _ = weight(256, 2048, 128, symmetric=True)
    blocks = triton.Blocks(*pack(*canonical, width, 2048, "bsr_kw2"), 2)
    for m, block_m in ((1, 16), (17, 32), (300, 64)):
        config = triton.choose(m, 2048, blocks, GPUS[90])
        assert config.block_m == block_m and config.block_n == 64
        assert 1 < config.split_k <= len(blocks.codes) / 4 or m == 300
