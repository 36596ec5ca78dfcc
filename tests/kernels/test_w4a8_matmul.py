"""Products of 4-bit weights and 8-bit activations: layout, operators, choice, machine code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.activations import DYNAMIC
from compress.encoding import IntEncoding, dequantize, encode
from compress.errors import MissingExtra, PassError
from compress.kernels.fuse import fuse
from compress.kernels.products import QUANTIZE_DYNAMIC, W4_MATMUL, W4A8_MATMUL, product_for
from compress.kernels.runtime import CompressedModule, for_device, packed_parts
from compress.kernels.tuning import Config, Problem, rule_for_short_steps
from compress.kernels.w4a8_matmul.layout import LAYOUTS, MOST_COLUMNS, group_of, pack, unpack
from compress.kernels.w4a8_matmul.op import on_gpu, quantize_dynamic, w4a8_matmul
from compress.passes.quantize_activations import QuantizeActivations
from compress.testing import MODELS, assert_close, make
from tests.kernels.gpus import GPUS

Canonical = tuple[Tensor, Tensor, Tensor | None]


def weight(rows: int, columns: int, group_size: int, seed: int = 0) -> tuple[Canonical, int, Tensor]:
    """A canonical symmetric weight, its columns per scale, and its values in float64."""
    generator = torch.Generator().manual_seed(seed)
    encoding = IntEncoding(4, group_size)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = torch.rand(rows, encoding.groups(columns), generator=generator) * 0.02 + 0.01
    encoded = encode(codes, scales, None, encoding, (rows, columns), torch.float32)
    canonical, width = (encoded.codes, encoded.scales, None), encoding.width(columns)
    return canonical, width, dequantize(*canonical, 4, width, [rows, columns]).double()


def activations(*shape: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Codes, scales and zero points, other ones in each row; and their values in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scales = torch.rand(shape[:-1], generator=generator) + 0.5
    zeros = torch.randint(-128, 128, shape[:-1], dtype=torch.int32, generator=generator)
    return (codes, scales, zeros), (codes.double() - zeros.unsqueeze(-1)) * scales.double().unsqueeze(-1)


sizes = st.tuples(st.integers(1, 70), st.integers(1, 400))
group_sizes = st.sampled_from([-1, 64, 128, 256])


@settings(max_examples=30)
@given(size=sizes, group_size=group_sizes)
def test_layouts_lose_nothing(size: tuple[int, int], group_size: int) -> None:
    canonical, width, values = weight(*size, group_size)
    for layout in LAYOUTS:
        packed = pack(*canonical, width, size[1], layout)
        back = unpack(*packed, width, size[1], layout)
        assert torch.equal(back[0], canonical[0]) and torch.equal(back[1], canonical[1])
        if packed[2] is not None:
            torch.testing.assert_close(packed[2].double(), values.sum(1), rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_said() -> None:
    canonical, width, _ = weight(16, 128, 64)
    with pytest.raises(PassError, match="no layout 'frag16'"):
        pack(*canonical, width, 128, "frag16")
    with pytest.raises(PassError, match="groups of 32 columns"):
        pack(canonical[0], torch.ones(16, 4), None, 32, 128, "frag8")
    with pytest.raises(PassError, match=r"scales in torch\.float32, zero points"):
        pack(canonical[0], canonical[1], torch.zeros(16, 1), width, 128, "frag8")
    with pytest.raises(PassError, match=r"in torch\.float32, the weight has 128"):
        w4a8_matmul(torch.ones(2, 128), torch.ones(2), torch.zeros(2), *canonical, width, 128, "canonical")
    sizes = [(100, 100), (128, 4096), (64, 4096), (192, 4096), (32, 4096), (1 << 17, 1 << 17)]
    assert [group_of(*size) for size in sizes] == [128, 128, 64, 64, 0, 128]


def test_sums_of_the_longest_rows_fit() -> None:
    assert (MOST_COLUMNS - 1) * 128 * (16 * 8) < 1 << 31


@settings(max_examples=30)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    size=sizes,
    group_size=group_sizes,
    layout=st.sampled_from(LAYOUTS),
)
def test_operator_equals_float64(
    batch: list[int], size: tuple[int, int], group_size: int, layout: str
) -> None:
    canonical, width, values = weight(*size, group_size)
    given_, x = activations(*batch, size[1])
    y = w4a8_matmul(*given_, *pack(*canonical, width, size[1], layout), width, size[1], layout)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x @ values.T, rtol=1e-5, atol=1e-3)


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_codes_are_what_the_graph_rounds_to(shape: list[int], scale: float, shift: float) -> None:
    x = (torch.randn(shape) + shift) * scale
    codes, scales, zeros = quantize_dynamic(x)
    assert codes.dtype == torch.int8 and zeros.dtype == torch.int32
    assert scales.shape == zeros.shape == x.shape[:-1]
    values = (codes.float() - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    assert torch.equal(values, DYNAMIC(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_pass_torch_opcheck(layout: str) -> None:
    canonical, width, _ = weight(20, 200, 64)
    packed = pack(*canonical, width, 200, layout)
    torch.library.opcheck(w4a8_matmul, (*activations(2, 3, 200)[0], *packed, width, 200, layout))
    torch.library.opcheck(quantize_dynamic, (torch.randn(2, 3, 4),))


# -- in models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> compress.Result:
    example = MODELS["encoder"]
    steps = [QuantizeActivations(activations="dynamic", weight_bits=4)]
    return compress.run(make("encoder"), steps, inputs=example.specs, calibration=[example.inputs(6)])


def test_rounded_activations_and_4_bits(result: compress.Result) -> None:
    module = result.module()
    assert isinstance(module, CompressedModule)
    products = [n for n in module.graph.nodes if n.target is W4A8_MATMUL]
    # layers that read the same value read the same codes
    rounded = {n.args[0] for n in result.graph.ops.nodes if n.target is DYNAMIC}
    assert len(products) == 5 > len(rounded)
    assert sum(n.target is QUANTIZE_DYNAMIC for n in module.graph.nodes) == len(rounded)
    assert not any(n.target is DYNAMIC for n in module.graph.nodes)
    inputs = MODELS["encoder"].inputs(4)
    want, before = result.graph.run(inputs)[0], module.state_dict()
    # codes are the same but where another order of summation moves a value across a tie
    assert_close(want, module(*inputs)["hidden"], db=35)
    for_device(module, (8, 9))
    assert {n.args[-1] for n in module.graph.nodes if n.target is W4A8_MATMUL} == {"frag8"}
    assert {n.rpartition(".")[2] for n in packed_parts(module) if n.startswith("q.weight")} == {
        "codes_device", "scales_device", "sums_device",
    }  # fmt: skip
    assert_close(want, module(*inputs)["hidden"], db=35)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    module.load_state_dict(before)
    assert_close(want, module.cpu()(*inputs)["hidden"], db=35)


def test_it_gets_its_layout_though_in_float32(
    result: compress.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {"meta": (9, 0), "cpu": None}
    monkeypatch.setattr("compress.kernels.runtime.capability_of", lambda device: found[device.type])
    module = result.module().to("meta")
    layouts = {n.args[-1] for n in module.graph.nodes if n.target is W4A8_MATMUL}
    assert layouts == {"frag8"}
    inputs = [t.to("meta") for t in MODELS["encoder"].inputs(2)]
    assert module(*inputs)["hidden"].device.type == "meta"


def test_export_load_run(result: compress.Result, tmp_path: Path) -> None:
    from compress.exporters.to_torch import TorchExporter

    artifact = compress.export(result.graph, tmp_path / "model.safetensors", "torch")
    forms = {form.weight: form for form in artifact.lowered}
    assert forms["q.weight"].loads_as == "compress::w4a8_matmul" and not forms["q.weight"].reason
    assert "q.weight" in TorchExporter().decoded_on_every_call(artifact)  # on the CPU
    inputs = MODELS["encoder"].inputs(3)
    loaded = compress.load(artifact.path)
    assert torch.equal(loaded(*inputs)["hidden"], result.module()(*inputs)["hidden"])
    program = torch.export.export(loaded, inputs)
    assert sum(n.target is W4A8_MATMUL for n in program.graph.nodes) == 5


@pytest.mark.parametrize(
    ("symmetric", "group_size", "rounded", "operator", "said"),
    [
        (True, -1, True, W4A8_MATMUL, ""),
        (True, 64, True, W4A8_MATMUL, ""),
        (True, 32, True, W4_MATMUL, "groups of 32"),
        (False, 64, True, W4_MATMUL, "zero points"),
        (True, 64, False, W4_MATMUL, ""),
    ],
)
def test_which_weights_get_it(
    symmetric: bool, group_size: int, rounded: bool, operator: object, said: str
) -> None:
    encoding = IntEncoding(4, group_size, symmetric)
    groups = encoding.groups(256)
    zeros = None if symmetric else torch.full((64, groups), 7, dtype=torch.uint8)
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    encoded = encode(codes, torch.ones(64, groups), zeros, encoding, (64, 256), torch.float32)
    product, reason = product_for(encoded, rounded)
    assert product.operator is operator
    assert said in reason and bool(said) == bool(reason)


class Both(nn.Module):
    """One layer reads a value as it is rounded; another operator reads the rounded value too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x.relu()


def test_other_readers_keep_the_rounded_value() -> None:
    x = torch.randn(3, 128)
    steps = [QuantizeActivations(activations="dynamic", weight_bits=4)]
    graph = compress.run(Both(), steps, example_inputs=(x,)).graph
    (rounded,) = (n for n in graph.ops.nodes if n.target is DYNAMIC)
    next(n for n in graph.ops.nodes if "relu" in n.name).replace_input_with(rounded.args[0], rounded)
    fused, _ = fuse(graph)
    targets = [n.target for n in fused.ops.nodes]
    assert W4A8_MATMUL in targets and DYNAMIC in targets
    for want, have in zip(graph.run([x]), fused.run([x]), strict=True):
        assert_close(want, have, db=100)


class Two(nn.Module):
    """Two layers that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(128, 64), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


def test_layers_quantized_in_another_order_than_they_are_called() -> None:
    x = torch.randn(3, 128)
    steps = [QuantizeActivations(activations="dynamic", weight_bits=4, targets=(n,)) for n in ("k", "q")]
    graph = compress.run(Two(), steps, example_inputs=(x,)).graph
    assert list(graph.encodings) == ["k.weight", "q.weight"]
    fused, _ = fuse(graph)
    assert [n.target for n in fused.ops.nodes].count(QUANTIZE_DYNAMIC) == 1
    for want, have in zip(graph.run([x]), fused.run([x]), strict=True):
        assert_close(want, have, db=100)


# -- on a GPU -------------------------------------------------------------------------------------


def test_on_a_gpu_the_canonical_layout_is_decoded() -> None:
    canonical, width, values = weight(20, 96, -1)
    given_, x = activations(3, 96)
    y = on_gpu(*given_, *pack(*canonical, width, 96, "canonical"), width, 96, "canonical")
    torch.testing.assert_close(y.double(), x @ values.T, rtol=1e-5, atol=1e-3)


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    canonical, width, _ = weight(4, 64, -1)
    with pytest.raises(MissingExtra, match=r"pip install 'compress-models\[triton\]'"):
        on_gpu(*activations(2, 64)[0], *pack(*canonical, width, 64, "frag8"), width, 64, "frag8")


def test_assembly_splits_words(execute: Any) -> None:
    triton = pytest.importorskip("compress.kernels.w4a8_matmul.triton", reason="triton is not installed")
    words = torch.randint(0, 1 << 32, (4096,), generator=torch.Generator().manual_seed(0))
    done = execute(triton.SPLIT_ASM.value, {"$2": words})
    for c in range(4):
        byte = (words >> (8 * c)) & 255
        for register, nibble in (("$0", byte & 15), ("$1", byte >> 4)):
            signed = torch.where(nibble > 7, nibble - 16, nibble)
            assert torch.equal(
                ((done[register] >> (8 * c)) & 255).to(torch.int8), (16 * signed).to(torch.int8)
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "block_m", "group", "whole", "split", "budget"),
    [
        (90, 16, 128, True, 1, 1.7),
        (90, 64, 128, True, 4, 1.9),
        (90, 64, 128, False, 1, 3.2),
        (80, 16, 64, False, 4, 3.3),
        (89, 64, 128, True, 1, 3.4),
        (120, 32, 128, False, 1, 3.5),
    ],
)
def test_machine_code(
    capability: int, block_m: int, group: int, whole: bool, split: int, budget: float
) -> None:
    """Integer tensor cores; codes stay in registers and are not converted; sums are, once per group.

    Budgets hold for Triton 3.6 and 3.9; the earlier one takes up to a third more instructions.
    """
    triton = pytest.importorskip("compress.kernels.w4a8_matmul.triton", reason="triton is not installed")
    gpu = GPUS[capability]
    problem = Problem(block_m, 4096, 4096, group, 1, 32)
    config = Config(block_m, 64, 4, rule_for_short_steps(problem, gpu, 1).stages, split)
    built = triton.compiled(capability, config, group, whole)
    assert built.spilled == 0 and built.shared <= gpu.shared // 2
    loop = built.loop()
    units = {name.split(".")[0] for name in loop}
    assert ("IGMMA" if capability == 90 else "IMMA") in units
    assert not units & {"STS", "STL", "LDL", "LDG"}, loop
    converted = sum(n for name, n in loop.items() if name.startswith("I2F"))
    assert converted == (0 if whole else 64 * block_m / 128), loop
    assert sum(loop.values()) / (64 * group / (32 * config.warps)) <= budget


def test_launches_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("compress.kernels.w4a8_matmul.triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "measured", lambda *_: None)
    for group_size in (-1, 64):
        canonical, width, _ = weight(256, 2048, group_size)
        codes, scales, sums = pack(*canonical, width, 2048, "frag8")
        packed = triton.Packed(codes, scales, sums)
        for m, block_m in ((1, 16), (17, 32), (300, 64)):
            config = triton.choose(m, 2048, packed, GPUS[90])
            assert config.block_m == block_m and 1 < config.split_k <= 8
