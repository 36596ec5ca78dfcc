"""Heads in codes as one operator: on the CPU, in fused graphs, in files, and what is left as it is."""

from __future__ import annotations

import copy
import functools
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
from compress.kernels.fuse_heads import VQ_LOGITS
from compress.kernels.runtime import CompressedModule
from compress.kernels.vq_logits import layout
from compress.kernels.vq_logits.op import on_gpu, vq_logits
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.screen_logits import ScreenLogits
from compress.passes.vq_logits import VqLogits
from compress.pipeline import Context, Pass
from compress.testing import MODELS, assert_close, calibrated_lm, make

Arguments = tuple[Tensor, Tensor, list[int], Tensor | None, Tensor | None, Tensor | None, int]


def head(tokens: int, columns: int, sizes: list[int], candidates: int, dtype: torch.dtype) -> Arguments:
    """Random arguments of the operator, all but x."""
    generator = torch.Generator().manual_seed(tokens)
    maps = [torch.randint(0, size, (tokens,), generator=generator) for size in sizes]
    codebook, bias, rows = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((sum(sizes), columns), (tokens,), (tokens, columns))
    )
    codes = torch.stack(maps).to(torch.uint8)
    return (
        codebook,
        codes,
        sizes,
        bias,
        rows if candidates else None,
        bias if candidates else None,
        candidates,
    )


def logits(x: Tensor, arguments: Arguments) -> Tensor:
    """What the operator should give, in float64, one row of x and one token at a time."""
    codebook, codes, sizes, token_bias, rows, bias, candidates = arguments
    books = codebook.double().split(sizes)
    result = torch.zeros(len(x), codes.shape[1], dtype=torch.float64)
    for m, row in enumerate(x.double()):
        for v in range(codes.shape[1]):
            result[m, v] = sum(float(book[int(codes[s, v])] @ row) for s, book in enumerate(books))
            result[m, v] += 0 if token_bias is None else float(token_bias[v])
        order = sorted(range(codes.shape[1]), key=lambda v: -float(result[m, v]))
        for v in order[:candidates]:
            assert rows is not None
            result[m, v] = float(rows[v].double() @ row) + (0 if bias is None else float(bias[v]))
    return result


@settings(max_examples=20)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    tokens=st.integers(2, 60),
    columns=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    part=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_operator_equals_float64(
    batch: list[int], tokens: int, columns: int, sizes: list[int], part: float, dtype: torch.dtype
) -> None:
    # in 16 bits many coarse logits tie, and which of them are candidates is not defined
    candidates = int(part * tokens) if dtype == torch.float32 or part == 1 else 0
    arguments = head(tokens, columns, sizes, candidates, dtype)
    x = torch.randn(*batch, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = vq_logits(x, *arguments)
    assert y.dtype == dtype and y.shape == (*batch, tokens)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    exact = logits(x.reshape(-1, columns), arguments).view(y.shape)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=5 * tolerance)


@given(
    tokens=st.integers(1, 41),
    sizes=st.lists(st.sampled_from([1, 2, 16, 256, 257, 32768, 32769]), min_size=1, max_size=5),
)
def test_codes_in_words(tokens: int, sizes: list[int]) -> None:
    """As narrow as the largest codebook allows, and the same codes again."""
    codes = torch.stack([torch.arange(tokens).add(size - 1).remainder(size) for size in sizes])
    words = layout.pack(codes, sizes)
    width = 1 if max(sizes) <= 256 else 2 if max(sizes) <= 32768 else 4
    assert words.dtype == torch.int32 and words.shape == (-(-codes.numel() * width // 4),)
    found = layout.unpack(words, sizes, tokens)
    assert found.element_size() == width and torch.equal(found.long(), codes)


@pytest.mark.parametrize("candidates", [0, 5])
def test_operator_passes_torch_opcheck(candidates: int) -> None:
    arguments = head(20, 12, [4, 3], candidates, torch.float32)
    torch.library.opcheck(vq_logits, (torch.randn(2, 3, 12), *arguments))


def test_sizes_that_do_not_fit_are_said() -> None:
    codebook, codes, sizes, bias, rows, *_ = head(20, 12, [4, 3], 5, torch.float32)
    x = torch.randn(2, 12)
    with pytest.raises(PassError, match="x has 11 columns"):
        vq_logits(x[:, 1:], codebook, codes, sizes, bias, None, None, 0)
    with pytest.raises(PassError, match=r"codebooks of \[4, 4\] entries"):
        vq_logits(x, codebook, codes, [4, 4], bias, None, None, 0)
    with pytest.raises(PassError, match="3 candidates of 20 tokens, without rows"):
        vq_logits(x, codebook, codes, sizes, bias, None, None, 3)
    with pytest.raises(PassError, match="21 candidates"):
        vq_logits(x, codebook, codes, sizes, bias, rows, None, 21)
    assert bias is not None and rows is not None
    with pytest.raises(PassError, match=r"token_bias is \[1\]"):
        vq_logits(x, codebook, codes, sizes, bias[:1], None, None, 0)
    with pytest.raises(PassError, match=r"rows is \[19, 12\]"):
        vq_logits(x, codebook, codes, sizes, None, rows[1:], None, 3)
    with pytest.raises(PassError, match=r"bias is \[20, 1\]"):
        vq_logits(x, codebook, codes, sizes, None, rows, bias[:, None], 3)


def test_a_gpu_without_triton_takes_the_operators_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = head(20, 12, [4, 3], 5, torch.float32)
    x = torch.randn(2, 12)
    assert torch.equal(on_gpu(x, *arguments), vq_logits(x, *arguments))


# -- fused -----------------------------------------------------------------------------------------

VOCABULARY = 200


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mlp = nn.Linear(16, 24)
        self.lm_head = nn.Linear(24, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(3 * self.mlp(self.embed(ids)).tanh())
        return out


@functools.cache
def captured() -> tuple[compress.Graph, Context]:
    return calibrated_lm(Model, VOCABULARY, 30)


def compressed(*passes: Pass) -> compress.Result:
    graph, context = captured()
    return compress.run(graph, list(passes), calibration=context.calibration)


VQ = VqLogits(codes=8, stages=2, epochs=0)
FEW = VqLogits(codes=8, stages=1, singletons=20, token_bias=False, epochs=0)
SCREEN = ScreenLogits(candidates=20, codes=8, stages=3, epochs=0)


def heads(graph: Any) -> list[Any]:
    return [node for node in graph.nodes if node.target is VQ_LOGITS]


def ids(count: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("chosen", [VQ, FEW, SCREEN], ids=lambda p: str(p.name))
def test_a_head_is_one_operator(chosen: Pass) -> None:
    result = compressed(chosen)
    fused, forms = fuse(result.graph)
    (node,) = heads(fused.ops)
    assert not forms
    left = {str(n.target) for n in fused.ops.nodes if n.op == "call_function"}
    assert left == {
        f"aten.{n}" for n in ("embedding.default", "linear.default", "tanh.default", "mul.Tensor")
    } | {"compress.vq_logits.default"}
    assert sum(n.target is torch.ops.aten.linear.default for n in fused.ops.nodes) == 1
    assert node.args[7] == (20 if chosen is SCREEN else 0)
    assert torch.equal(fused.run([ids()])[0], result.graph.run([ids()])[0])
    # maps are stored once, as narrow as before
    assert fused.nbytes == result.graph.nbytes
    assert not heads(result.graph.ops)


def test_the_module_is_moved_copied_and_stored_like_any_other() -> None:
    module = compressed(SCREEN).module()
    assert isinstance(module, CompressedModule)
    state = module.state_dict()
    assert state["lm_head.codes"].dtype == torch.uint8 and state["lm_head.codes"].shape == (3, VOCABULARY)
    other = copy.deepcopy(module)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(module(ids()), other(ids()))
    assert module.to("meta")(ids().to("meta")).shape == (4, 12, VOCABULARY)


@pytest.mark.parametrize("chosen", [VQ, SCREEN], ids=lambda p: str(p.name))
def test_export_and_compile_keep_the_operator(chosen: Pass) -> None:
    module = compressed(chosen).module()
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (ids(),), dynamic_shapes=({0: batch, 1: batch},))
    assert len(heads(program.graph)) == 1
    assert torch.equal(program.module()(ids(2)[:, :7]), module(ids(2)[:, :7]))
    seen: list[int] = []

    def counting(module: Any, inputs: Any) -> Any:
        seen.append(len(heads(module.graph)))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    found = torch.compile(module, backend=counting, fullgraph=True)(ids())
    assert_close(module(ids()), found, db=110)
    assert seen == [1]


@pytest.mark.parametrize("chosen", [VQ, SCREEN], ids=lambda p: str(p.name))
def test_files_for_torch_and_onnx(chosen: Pass, tmp_path: Path) -> None:
    result = compressed(chosen)
    path = compress.export(result.graph, tmp_path / "head.safetensors", "torch").path
    loaded = compress.load(path)
    assert len(heads(loaded.graph)) == 1
    assert torch.equal(loaded(ids()), result.graph.run([ids()])[0])
    pytest.importorskip("onnxruntime")
    import onnx

    written = compress.export(result.graph, tmp_path / "head.onnx").path
    operators = {node.op_type for node in onnx.load(written).graph.node}
    assert ("TopK" in operators) == (chosen is SCREEN) and "Gather" in operators | {"GatherElements"}


def test_quantized_codebooks_are_decoded_once() -> None:
    result = compressed(VQ, QuantizeWeights(bits=4, group_size=16, targets=("lm_head.codebook",)))
    assert "lm_head.codebook.bias" in result.graph.tensors  # of the correction of its mean
    fused, (form,) = fuse(result.graph)
    assert len(heads(fused.ops)) == 1
    assert form.reason == "no kernel for vq_logits with a packed weight"
    # the bias of the codebook has become one of tokens
    assert_close(result.graph.run([ids()])[0], fused.run([ids()])[0], db=120)


def test_quantized_rows_stay_packed() -> None:
    result = compressed(SCREEN, QuantizeWeights(bits=8, group_size=-1, targets=("lm_head.candidates",)))
    fused, (form,) = fuse(result.graph)
    (node,) = heads(fused.ops)
    assert form.loads_as == "rows decoded when looked up" and node.args[7] == 0
    assert torch.equal(result.graph.run([ids()])[0], fused.run([ids()])[0])


def test_a_tied_head_shares_its_rows() -> None:
    example = MODELS["tied_lm"]
    step = ScreenLogits(candidates=20, codes=16, stages=2, epochs=0)
    result = compress.run(make("tied_lm"), [step], inputs=example.specs, calibration=[example.inputs(6)])
    fused, _ = fuse(result.graph)
    (node,) = heads(fused.ops)
    assert node.args[5].target == "embed.weight" and fused.nbytes == result.graph.nbytes
    inputs = example.inputs(3)
    assert torch.equal(result.graph.run(inputs)[0], fused.run(inputs)[0])


def test_tensors_stored_with_strides_are_copied() -> None:
    """The kernels know no strides."""
    graph = compressed(SCREEN).graph.copy()
    for name, tensor in graph.tensors.items():
        if name.startswith("lm_head") and tensor.is_floating_point():
            graph.tensors[name] = torch.stack([tensor, tensor], -1)[..., 0]
    fused, _ = fuse(graph)
    (node,) = heads(fused.ops)
    read = [fused.tensors[n.target] for n in node.all_input_nodes if n.op == "get_attr"]
    assert len(read) == 5 and all(tensor.is_contiguous() for tensor in read)
    assert torch.equal(graph.run([ids()])[0], fused.run([ids()])[0])


def test_half_precision() -> None:
    model = make("tied_lm").bfloat16()
    step = VqLogits(codes=16, stages=2)
    inputs = MODELS["tied_lm"].inputs(3)
    result = compress.run(model, [step], example_inputs=inputs)
    fused, _ = fuse(result.graph)
    assert len(heads(fused.ops)) == 1
    # the graph rounds every sum to bfloat16, the operator one
    assert_close(result.graph.run(inputs)[0], fused.run(inputs)[0], db=40)


class InOtherWays(nn.Module):
    """A head in codes, and variations that are none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.codebook = nn.Linear(6, 8, bias=kind == "biased")
        self.bias = nn.Parameter(torch.randn(1 if kind == "one bias" else 30))
        self.register_buffer("map0", torch.randint(0, 5, (30,), dtype=torch.int32))
        self.register_buffer("map1", torch.randint(0, 3, (30,), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        z = self.codebook(x)
        part0, part1 = torch.ops.aten.slice.Tensor(z, -1, 0, 5), torch.ops.aten.slice.Tensor(z, -1, 5, 8)
        if self.kind == "between":
            part0 = part0.tanh()
        a, b = torch.index_select(part0, -1, self.map0), torch.index_select(part1, -1, self.map1)
        if self.kind == "product":
            return a * b
        total = a + b if self.kind != "alpha" else torch.add(a, b, alpha=2)
        if self.kind == "both":
            return total + self.bias + a
        if self.kind == "other reader":
            return total + z.sum(-1, keepdim=True)
        if self.kind == "computed bias":
            return total + x.sum(-1, keepdim=True)
        return total + self.bias


LEFT = ("between", "product", "alpha", "both", "other reader", "double")
APART = ("computed bias", "one bias", "wide bias")
KINDS = ("plain", "biased", *APART, *LEFT)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_a_head_in_codes_and_what_is_not(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = InOtherWays(kind).eval(), torch.randn(4, 6)
    if kind == "double":
        model, x = model.double(), x.double()
    if kind == "wide bias":
        model.codebook, x = model.codebook.bfloat16(), x.bfloat16()
    graph = compress.capture(model, [x])
    fused, _ = fuse(graph)
    found = heads(fused.ops)
    assert len(found) == (kind not in LEFT)
    assert all((node.args[4] is None) == (kind in APART) for node in found)
    want, have = graph.run([x])[0], fused.run([x])[0]
    assert want.dtype == have.dtype
    # the graph rounds every sum to bfloat16, the operator one
    assert_close(want, have, db=40 if kind == "wide bias" else 120)


def test_a_head_of_few_tokens_is_left() -> None:
    """Fewer tokens than entries: some rows of a layer, not a head in codes."""
    linear = nn.Linear(6, 40)

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear
            self.register_buffer("map0", torch.arange(0, 40, 2, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.index_select(self.linear(x), -1, self.map0)

    assert not heads(fuse(compress.capture(Some(), [torch.randn(3, 6)]))[0].ops)
