"""The compressed module: moved, copied, exported and compiled like any other."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import CompressError
from compress.kernels.products import BY_OPERATOR, W4_MATMUL, W4_SPARSE24_MATMUL, Capability
from compress.kernels.runtime import CompressedModule, for_device, packed_parts
from compress.testing import MODELS, assert_close, make


@pytest.fixture(scope="module")
def result() -> compress.Result:
    example = MODELS["encoder"]
    return compress.run(make("encoder"), "int4", inputs=example.specs, calibration=[example.inputs(6)])


def products(graph: torch.fx.Graph) -> int:
    return sum(n.target is W4_MATMUL for n in graph.nodes)


def test_the_module_computes_what_the_graph_computes(result: compress.Result) -> None:
    module = result.module()
    assert isinstance(module, CompressedModule)
    assert products(module.graph) == 5
    ids, mask = MODELS["encoder"].inputs(4)
    for outputs in (module(ids, mask), copy.deepcopy(module)(ids, mask)):
        want = dict(zip(outputs, result.graph.run([ids, mask]), strict=True))
        for name, value in outputs.items():
            assert_close(want[name], value, db=110)


def test_state_is_the_canonical_packing(result: compress.Result) -> None:
    module = result.module()
    state = module.state_dict()
    for name, encoded in result.graph.encodings.items():
        for part, tensor in encoded.parts.items():
            assert torch.equal(state[f"{name}.{part}"], tensor)
    assert set(packed_parts(module)) == {n for n in state if n.endswith(("codes", "scales", "zero_points"))}
    other = copy.deepcopy(module)  # a module shares its tensors with the graph
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[n], state[n]) for n in state)


def test_export_keeps_the_operators(result: compress.Result) -> None:
    batch = torch.export.Dim.DYNAMIC
    shapes = ({0: batch, 1: batch}, {0: batch, 1: batch})
    program = torch.export.export(result.module(), MODELS["encoder"].inputs(2), dynamic_shapes=shapes)
    assert products(program.graph) == 5
    ids, mask = (t[:, :7] for t in MODELS["encoder"].inputs(6))
    assert torch.equal(program.module()(ids, mask)["hidden"], result.module()(ids, mask)["hidden"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(result: compress.Result, backend: str) -> None:
    seen: list[int] = []

    def counting(module: Any, inputs: Any) -> Any:
        seen.append(products(module.graph))
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    inputs = MODELS["encoder"].inputs(2)
    compiled = torch.compile(result.module(), backend=counting, fullgraph=True)
    assert_close(result.module()(*inputs)["hidden"], compiled(*inputs)["hidden"], db=110)
    assert seen == [5]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_compiled_by_inductor() -> None:
    module = compress.run(nn.Linear(24, 8), "int4", example_inputs=(torch.randn(2, 24),)).module()
    x = torch.randn(5, 24)
    assert_close(module(x), torch.compile(module, fullgraph=True)(x), db=110)


class Masked(nn.Module):
    """Makes tensors of its own, as rotary positions and causal masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        allowed = steps[:, None] >= steps
        scores = torch.where(allowed, x @ x.transpose(1, 2), torch.full((), -1e9))
        out: Tensor = self.linear(scores.softmax(-1) @ x)
        return out


def test_tensors_are_made_where_the_module_is() -> None:
    x = torch.randn(2, 5, 24)
    module = compress.run(Masked(), "int4", example_inputs=(x,)).module().to("meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module(x.to("meta")).device.type == "meta"
    devices = [v for n in module.graph.nodes for v in (*n.args, *n.kwargs.values())]
    assert {v.type for v in devices if isinstance(v, torch.device)} == {"meta"}


def test_casts_are_refused_and_leave_the_module_as_it_was(result: compress.Result) -> None:
    module = result.module()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(CompressError, match=r"torch.float32 cannot be made one of torch.float16"):
        module.half()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    module.to("cpu", torch.float32)


def test_scales_stay_exact_in_half_precision() -> None:
    inputs = MODELS["encoder"].inputs(2)
    module = compress.run(make("encoder").bfloat16(), "int4", example_inputs=inputs).module()
    module.bfloat16()  # the habit of writing .to("cuda", torch.bfloat16)
    scales = [t for n, t in module.state_dict().items() if n.endswith("scales")]
    assert scales and all(t.dtype == torch.float32 for t in scales)
    assert module(*inputs)["hidden"].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def tied() -> compress.Result:
    example = MODELS["tied_lm"]
    return compress.run(make("tied_lm"), "int4", inputs=example.specs, calibration=[example.inputs(6)])


GPUS = {(9, 0): "frag16_kw2", (8, 6): "frag16_kw4"}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["result", "tied"])
def test_device_layouts_compute_the_same(name: str, gpu: Capability, request: pytest.FixtureRequest) -> None:
    result: compress.Result = request.getfixturevalue(name)
    module, inputs = result.module(), tuple(t[:2] for t in result.samples[0])
    want = torch.utils._pytree.tree_leaves(module(*inputs))
    before = module.state_dict()
    for_device(module, gpu)
    assert layouts(module) == {GPUS[gpu]}
    for a, b in zip(want, torch.utils._pytree.tree_leaves(module(*inputs)), strict=True):
        assert_close(a, b, db=110)
    # what only products read is there once, in the layout of the device
    names = [n for n, _ in module.named_buffers()]
    assert "mlp.weight.codes" not in names and "up.weight.codes" not in names
    assert ("embed.weight.codes" in names) == ("embed.weight.codes" in before)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    module.cpu()
    assert layouts(module) == {"canonical"}
    assert {n: type(t) for n, t in module.named_parameters()}.keys() == {
        n for n, _ in result.module().named_parameters()
    }
    for a, b in zip(want, torch.utils._pytree.tree_leaves(module(*inputs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gpu", GPUS)
def test_state_is_taken_in_any_layout(tied: compress.Result, gpu: Capability) -> None:
    source = tied.module()
    other = copy.deepcopy(source)
    for tensor in other.state_dict().values():
        tensor.zero_()
    for_device(other, gpu)
    whole = nn.ModuleDict({"model": copy.deepcopy(other)})  # as a part of another module too
    other.load_state_dict(source.state_dict())
    whole.load_state_dict({f"model.{n}": t for n, t in source.state_dict().items()})
    (ids,) = MODELS["tied_lm"].inputs(2)
    for module in (other, whole["model"]):
        assert_close(source(ids), module(ids), db=110)
    state = whole.state_dict()
    assert {n.removeprefix("model.") for n in state} == set(source.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({n: t for n, t in source.state_dict().items() if n != "mlp.weight.scales"})


def layouts(module: Any) -> set[Any]:
    return {n.args[-1] for n in module.graph.nodes if n.target in BY_OPERATOR}


def test_a_gpu_gets_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `.to` decides, without a GPU: the meta device plays its part."""
    chosen = {"meta": (8, 9), "cpu": None}
    monkeypatch.setattr("compress.kernels.runtime.capability_of", lambda device: chosen[device.type])
    (ids,) = MODELS["tied_lm"].inputs(2)
    for dtype, layout in ((torch.bfloat16, "frag16_kw4"), (torch.float32, "canonical")):
        result = compress.run(make("tied_lm").to(dtype), "int4", example_inputs=(ids,))
        module = result.module().to("meta")
        assert layouts(module) == layouts(copy.deepcopy(module)) == {layout}
        out = module(ids.to("meta"))
        assert out.shape == (2, 9, 200) and out.dtype == dtype
        assert layouts(module.to("meta")) == {layout}


def test_sparse_weights_get_the_layout_of_sparse_tensor_cores() -> None:
    """`int4-sparse` in 16 bits: the operator, its layout on a GPU, and a state that is canonical anywhere."""
    example = MODELS["encoder"]
    result = compress.run(
        make("encoder").bfloat16(), "int4-sparse", inputs=example.specs, calibration=[example.inputs(6)]
    )
    module, inputs = result.module(), example.inputs(3)
    sparse = [n for n in module.graph.nodes if n.target is W4_SPARSE24_MATMUL]
    assert len(sparse) == 5 and layouts(module) == {"canonical"}
    want, before = module(*inputs)["hidden"], module.state_dict()
    for_device(module, (8, 0))
    assert layouts(module) == {"sp24"}
    assert {n.rpartition(".")[2] for n in packed_parts(module) if n.startswith("q.weight")} == {
        "codes_device", "metadata_device", "scales_device", "zero_points_device",
    }  # fmt: skip
    assert torch.equal(module(*inputs)["hidden"], want)
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    other = copy.deepcopy(module)
    for tensor in other.buffers():
        tensor.zero_()
    other.load_state_dict(before)
    assert torch.equal(other(*inputs)["hidden"], want)
    module.cpu()
    assert layouts(module) == {"canonical"} and module.state_dict().keys() == before.keys()
    assert torch.equal(module(*inputs)["hidden"], want)
