"""Two linear layers in one operator: on the CPU, in fused graphs, in files, and where it would not pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.errors import PassError
from compress.kernels.fuse import fuse
from compress.kernels.fuse_chains import LOW_RANK_MATMUL
from compress.kernels.low_rank_matmul.cost import pays
from compress.kernels.low_rank_matmul.op import low_rank_matmul, on_gpu
from compress.passes.decompose import Decompose
from compress.passes.low_rank_correction import LowRankCorrection
from compress.passes.quantize_weights import QuantizeWeights
from compress.testing import assert_close


def factors(outputs: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = ((rank, columns), (outputs, rank), (outputs,))
    first, last, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return first, last, bias


@settings(max_examples=20)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    outputs=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 12),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_operator_equals_float64(
    batch: list[int], outputs: int, columns: int, rank: int, biased: bool, dtype: torch.dtype
) -> None:
    first, last, bias = factors(outputs, columns, rank, dtype)
    x = torch.randn(*batch, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = low_rank_matmul(x, first, last, bias if biased else None)
    assert y.dtype == dtype and y.shape == (*batch, outputs)
    exact = torch.zeros(*batch, outputs, dtype=torch.float64)
    for r in range(rank):
        exact += (x.double() * first[r].double()).sum(-1, keepdim=True) * last[:, r].double()
    exact += bias.double() if biased else 0
    size = float(exact.norm()) if exact.numel() else 0.0
    assert float((y.double() - exact).norm()) <= (1e-5 if dtype == torch.float32 else 2e-2) * max(size, 1.0)


def test_operator_passes_torch_opcheck() -> None:
    first, last, bias = factors(20, 12, 3, torch.float32)
    torch.library.opcheck(low_rank_matmul, (torch.randn(2, 3, 12), first, last, bias))
    torch.library.opcheck(low_rank_matmul, (torch.randn(12), first, last, None))


def test_sizes_that_do_not_fit_are_said() -> None:
    first, last, _ = factors(20, 12, 3, torch.float32)
    with pytest.raises(PassError, match=r"x has 11 columns, the factors are \[3, 12\] and \[20, 3\]"):
        low_rank_matmul(torch.randn(2, 11), first, last, None)
    with pytest.raises(PassError, match=r"and \[20, 2\]"):
        low_rank_matmul(torch.randn(2, 12), first, last[:, 1:], None)
    with pytest.raises(PassError, match=r"the bias is \[1\]"):
        low_rank_matmul(torch.randn(2, 12), first, last, torch.zeros(1))


def test_on_a_gpu_two_products_where_one_launch_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 12)
    arguments = factors(20, 12, 3, torch.float32)  # no kernel for float32
    assert torch.equal(on_gpu(x, *arguments), low_rank_matmul(x, *arguments))
    arguments = factors(20, 12, 3, torch.bfloat16)
    many = torch.randn(17, 12).bfloat16()
    assert torch.equal(on_gpu(many, *arguments), low_rank_matmul(many, *arguments))
    assert on_gpu(many[:0], *arguments).shape == (0, 20)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert torch.equal(on_gpu(many[:1], *arguments), low_rank_matmul(many[:1], *arguments))


def test_where_it_pays() -> None:
    """The table of the docstring: less is never worse."""
    for small, large in (((4096, 4096, 16), (4096, 4096, 32)), ((4096, 4096, 16), (14336, 4096, 16))):
        assert pays(1, *small) and pays(16, *small) and not pays(1, *large)
    assert not pays(17, 512, 512, 8) and not pays(0, 512, 512, 8)
    assert pays(1, 512, 512, 128) and not pays(1, 64, 64, 129)
    assert not pays(1, 4096, 4096, 1024)


# -- fused -----------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(48, 64)
        self.two = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).relu())
        return out


def model(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval().to(dtype), torch.randn(6, 48).to(dtype)


def chains(graph: Any) -> list[Any]:
    return [node for node in graph.nodes if node.target is LOW_RANK_MATMUL]


def test_decomposed_layers(tmp_path: Path) -> None:
    module, x = model()
    step = Decompose(method="svd", parameter_reduction=0.5)
    result = compress.run(module, [step], example_inputs=(x,))
    linear = sum(n.target is torch.ops.aten.linear.default for n in result.graph.ops.nodes)
    fused, forms = fuse(result.graph)
    assert linear == 4 and not forms and len(chains(fused.ops)) == 2
    assert [n.args[3] is None for n in chains(fused.ops)] == [False, True]
    assert torch.equal(result.graph.run([x])[0], fused.run([x])[0])
    made = result.module()
    program = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert len(chains(program.graph)) == 2
    assert torch.equal(program.module()(x[:3]), made(x[:3]))
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert_close(made(x), compiled(x), db=110)
    path = compress.export(result.graph, tmp_path / "chain.safetensors", "torch").path
    loaded = compress.load(path)
    assert len(chains(loaded.graph)) == 2 and torch.equal(loaded(x), made(x))


def test_corrections_of_packed_layers() -> None:
    module, x = model()
    steps = [QuantizeWeights(bits=4, group_size=16), LowRankCorrection(rank=2)]
    result = compress.run(module, steps, example_inputs=(x,))
    fused, forms = fuse(result.graph)
    assert {f.loads_as for f in forms} == {"compress::w4_matmul"} and len(chains(fused.ops)) == 2
    assert_close(result.graph.run([x])[0], fused.run([x])[0], db=35)


def test_what_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decompose(method="svd", parameter_reduction=0.5)
    module, x = model(torch.float32)
    assert not chains(fuse(compress.run(module, [step], example_inputs=(x,)).graph)[0].ops)
    module, x = model()
    result = compress.run(module, [step], example_inputs=(x,))
    coded = QuantizeWeights(bits=4, group_size=16, targets=("*.1",))
    assert not chains(fuse(compress.run(result.graph, [coded]).graph)[0].ops)
    monkeypatch.setattr("compress.kernels.low_rank_matmul.cost.RANK", 1)
    assert not chains(fuse(result.graph)[0].ops)

    class Two(nn.Module):
        """The first layer has a bias, or another reader, or the second one bias for all outputs."""

        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind
            self.a, self.b = nn.Linear(48, 8, bias=kind == "biased"), nn.Linear(8, 48)
            if kind == "one bias":
                self.b.bias = nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.a(x)
            return self.b(z), z if self.kind == "read twice" else x

    monkeypatch.undo()
    for kind in ("biased", "read twice", "one bias"):
        graph = compress.capture(Two(kind).bfloat16(), [x])
        assert not chains(fuse(graph)[0].ops), kind


def test_weights_stored_with_strides_are_copied() -> None:
    """The kernel knows no strides."""
    x = torch.randn(3, 48).bfloat16()
    model = nn.Sequential(nn.Linear(48, 8, bias=False), nn.Linear(8, 48)).bfloat16()
    graph = compress.capture(model, [x])
    graph.tensors.update({name: torch.stack([t, t], -1)[..., 0] for name, t in graph.tensors.items()})
    fused, _ = fuse(graph)
    (node,) = chains(fused.ops)
    assert all(fused.tensors[n.target].is_contiguous() for n in node.args[1:])
    assert torch.equal(graph.run([x])[0], fused.run([x])[0])
