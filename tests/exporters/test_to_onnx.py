"""Written files against the graph: every form of a weight, two shapes, nothing left behind on failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import ExportError, OutputError, VerificationError
from compress.exporters.ort import Session, decoded_on_every_call
from compress.passes.cleanup import Cleanup
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.testing import MODELS, assert_close, make

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")


@pytest.fixture
def fuse_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers take the form of large ones, so that it is tested without large models."""
    monkeypatch.setattr("compress.exporters.onnx_weights.FOLD_BELOW", 0)


def write(name: str, path: Path, *passes: compress.Pass) -> tuple[compress.Artifact, compress.Result]:
    result = compress.run(
        make(name),
        [Cleanup(), *passes],
        example_inputs=MODELS[name].inputs(2),
        inputs=MODELS[name].specs,
        calibration=[MODELS[name].inputs(6)],
    )
    return compress.export(result.graph, path / "model.onnx"), result


FORMS = [
    (8, -1, True),
    (8, 32, False),
    (4, 32, True),
    (4, 16, False),
    (2, 32, True),
    (2, -1, False),
    (4, -1, True),
]
# every form on the two models that hold every kind of reader, three of them on the others
CASES = [(name, *form) for name in ("convnet", "tied_lm") for form in FORMS]
CASES += [(name, *form) for name in ("encoder", "products") for form in FORMS[1:7:2]]


@pytest.mark.parametrize(("name", "bits", "group_size", "symmetric"), CASES)
def test_every_form_equals_the_graph(
    name: str, bits: Any, group_size: Any, symmetric: bool, tmp_path: Path, fuse_all: None
) -> None:
    artifact, result = write(
        name, tmp_path, QuantizeWeights(bits=bits, group_size=group_size, symmetric=symmetric)
    )
    # exact where nothing rounds activations; `export` has already refused anything worse
    assert artifact.proof_db > (25 if any("MatMulNBits" in f.form for f in artifact.lowered) else 90)
    session = Session(artifact.path)
    for batch in (1, 5):
        inputs = MODELS[name].inputs(batch)
        for want, have in zip(result.graph.run(inputs), session(*inputs), strict=True):
            assert_close(want, have, db=20)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_float_models_are_exact_and_named(name: str, tmp_path: Path) -> None:
    artifact, result = write(name, tmp_path)
    assert artifact.proof_db > 90
    model = onnx.load(artifact.path)
    assert [i.name for i in model.graph.input] == [s.name for s in result.graph.inputs]
    assert [o.name for o in model.graph.output] == [n for n in result.graph.output_names if n]
    dims = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    assert dims == {s for spec in result.graph.inputs for _, s in spec.dynamic}


def test_linear_layers_fuse_also_before_an_activation(tmp_path: Path, fuse_all: None) -> None:
    """ONNX Runtime makes FusedGemm of MatMul, Add and Relu before it looks at the weight."""
    artifact, _ = write("convnet", tmp_path, QuantizeWeights(bits=4))
    decoders = {node: form.weight for form in artifact.lowered for node in form.nodes}
    assert {"fc1.weight/decode", "fc2.weight/decode"} <= set(decoders)
    assert decoded_on_every_call(artifact.path, decoders) == []


def test_a_layer_that_does_not_fuse_is_named(tmp_path: Path, fuse_all: None) -> None:
    """The detector must see something: the same operators in an order the runtime does not fuse."""
    artifact, _ = write("encoder", tmp_path, QuantizeWeights(bits=4, targets=("up",)))
    model = onnx.load(artifact.path)
    decode = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    extra = onnx.helper.make_node("Identity", [decode.output[0]], ["watched"])
    model.graph.node.append(extra)
    model.graph.output.append(onnx.helper.make_tensor_value_info("watched", 1, None))
    onnx.save(model, tmp_path / "unfused.onnx")
    assert decoded_on_every_call(tmp_path / "unfused.onnx", {decode.name: "up.weight"}) == ["up.weight"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_layers_are_decoded_at_load_and_exact(bits: Any, tmp_path: Path) -> None:
    """The deployed session, not only the exact one, computes what the graph computes."""
    artifact, result = write("encoder", tmp_path, QuantizeWeights(bits=bits, targets=("linear",)))
    assert {form.loads_as for form in artifact.lowered} == {"decoded at load"}
    decoders = {node: form.weight for form in artifact.lowered for node in form.nodes}
    assert len(decoders) == len(artifact.lowered)
    assert decoded_on_every_call(artifact.path, decoders) == []
    inputs = MODELS["encoder"].inputs(3)
    for want, have in zip(result.graph.run(inputs), Session(artifact.path)(*inputs), strict=True):
        assert_close(want, have, db=90)


class TwoTexts(nn.Module):
    """One table for two texts and the head, as in T5 and BART."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mixed = self.table(source).mean(1, keepdim=True) + self.table(target)
        return nn.functional.linear(mixed, self.table.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path, fuse_all: None) -> None:
    module = make("tied_lm").to(dtype)
    inputs = MODELS["tied_lm"].inputs(3)
    result = compress.run(module, [QuantizeWeights(bits=4)], example_inputs=inputs, calibration=[inputs])
    artifact = compress.export(result.graph, tmp_path / "model.onnx", samples=result.samples)
    have = Session(artifact.path)(*inputs)[0]
    assert have.dtype == dtype
    assert_close(result.graph.run(inputs)[0], have, db=30)  # MatMulNBits rounds activations to 8 bits


def test_encoded_bfloat16_is_refused_with_a_reason(tmp_path: Path) -> None:
    module = nn.Linear(64, 64, bias=False).bfloat16()
    x = torch.randn(2, 64).bfloat16()
    result = compress.run(module, [QuantizeWeights(bits=4)], example_inputs=(x,))
    with pytest.raises(ExportError, match="bfloat16"):
        compress.export(result.graph, tmp_path / "model.onnx")


def test_a_table_with_two_lookups(tmp_path: Path) -> None:
    inputs = tuple(torch.randint(0, 64, (2, n), generator=torch.Generator().manual_seed(n)) for n in (5, 7))
    result = compress.run(TwoTexts(), [QuantizeWeights(bits=4)], example_inputs=inputs)
    artifact = compress.export(result.graph, tmp_path / "model.onnx")
    assert_close(result.graph.run(inputs)[0], Session(artifact.path)(*inputs)[0], db=20)


@pytest.mark.parametrize("bits", [None, 4, 8, 2])
def test_tied_weights_stay_one_tensor(bits: Any, tmp_path: Path) -> None:
    passes = [] if bits is None else [QuantizeWeights(bits=bits)]
    artifact, result = write("tied_lm", tmp_path, *passes)
    model = onnx.load(artifact.path)
    codes = [i for i in model.graph.initializer if i.name.startswith("embed.weight") or 200 in i.dims]
    big = [i for i in codes if i.name.endswith((".codes", "embed.weight"))]
    assert len(big) == 1, [i.name for i in codes]
    stored = sum(t.numel() * t.element_size() for t in result.graph.tensors.values())
    assert artifact.nbytes < stored + 6000


def test_masks_survive_in_the_file(tmp_path: Path, fuse_all: None) -> None:
    artifact, result = write("encoder", tmp_path, PruneMagnitude(pattern="2:4"), QuantizeWeights(bits=4))
    model = onnx.load(artifact.path)
    codes = next(i for i in model.graph.initializer if i.name == "up.weight.codes")
    assert codes.data_type == onnx.TensorProto.INT4
    values = torch.from_numpy(onnx.numpy_helper.to_array(codes).astype("int8")).t()
    assert ((values != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    assert torch.equal(values == 0, result.graph.weight("up.weight") == 0)


def test_no_source_paths_in_the_file(tmp_path: Path) -> None:
    artifact, _ = write("encoder", tmp_path)
    content = artifact.path.read_bytes()
    assert b"testing.py" not in content
    assert b"stack_trace" not in content
    assert str(Path(__file__).parent).encode() not in content


def test_metadata(tmp_path: Path) -> None:
    artifact, _ = write("encoder", tmp_path, QuantizeWeights(bits=4))
    stored = {p.key: p.value for p in onnx.load(artifact.path).metadata_props}
    assert {"compress.recipe", "compress.seed", "compress.versions"} <= set(stored)
    assert "quantize_weights" in stored["compress.recipe"]


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, _ = write("convnet", tmp_path / "a", PruneMagnitude(pattern="2:4"), QuantizeWeights(bits=4))
    second, _ = write("convnet", tmp_path / "b", PruneMagnitude(pattern="2:4"), QuantizeWeights(bits=4))
    assert first.path.read_bytes() == second.path.read_bytes()


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.exporters.to_onnx._EXTERNAL", 1000)
    artifact, result = write("encoder", tmp_path)
    assert (tmp_path / "model.onnx.data").exists()
    inputs = MODELS["encoder"].inputs(3)
    for want, have in zip(result.graph.run(inputs), Session(artifact.path)(*inputs), strict=True):
        assert_close(want, have, db=90)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.linalg.eigvalsh(x @ x.mT)
        return out


def test_an_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    graph = compress.capture(Unsupported(), (torch.randn(2, 3, 3),))
    with pytest.raises(ExportError, match="eigh"):
        compress.export(graph, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrupt the scales on the way out: the proof must fail and nothing may be left."""
    from compress.exporters import onnx_weights

    original = onnx_weights.Builder.initializer

    def corrupt(self: Any, name: str, array: Any) -> Any:
        return original(self, name, array * 1.1 if name.endswith("up.weight.scales") else array)

    monkeypatch.setattr(onnx_weights.Builder, "initializer", corrupt)
    (tmp_path / "model.onnx").write_bytes(b"what was there before")
    with pytest.raises(VerificationError, match="differs from the graph"):
        write("encoder", tmp_path, QuantizeWeights(bits=4))
    assert (tmp_path / "model.onnx").read_bytes() == b"what was there before"
    assert len(list(tmp_path.iterdir())) == 1


def test_bfloat16_is_refused_before_any_work(tmp_path: Path) -> None:
    graph = compress.capture(nn.Linear(8, 8).bfloat16(), (torch.zeros(2, 8, dtype=torch.bfloat16),))
    with pytest.raises(ExportError, match=r"bfloat16.*float\(\)"):
        compress.export(graph, tmp_path / "x.onnx")


def test_output_in_a_missing_folder(tmp_path: Path) -> None:
    graph = compress.capture(nn.Linear(8, 8), (torch.zeros(2, 8),))
    with pytest.raises(OutputError, match="does not exist"):
        compress.export(graph, tmp_path / "no" / "x.onnx")


def test_unknown_target() -> None:
    graph = compress.capture(nn.Linear(8, 8), (torch.zeros(2, 8),))
    with pytest.raises(ExportError, match="onnx"):
        compress.export(graph, "x", target="onxx")


def test_decode_at_load_is_exact_for_large_layers_too(tmp_path: Path, fuse_all: None) -> None:
    _, result = write("encoder", tmp_path, QuantizeWeights(bits=4))
    artifact = compress.export(result.graph, tmp_path / "loaded.onnx", decode="load")
    assert "MatMulNBits" not in {form.loads_as for form in artifact.lowered}
    inputs = MODELS["encoder"].inputs(3)
    for want, have in zip(result.graph.run(inputs), Session(artifact.path)(*inputs), strict=True):
        assert_close(want, have, db=90)
    with pytest.raises(ExportError, match="run"):
        compress.export(result.graph, tmp_path / "x.onnx", decode="now")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("convnet", torch.float16),
        *[(name, dtype) for name in ("tied_lm", "products") for dtype in (torch.float16, torch.float64)],
    ],
)
def test_other_types_of_floats(name: str, dtype: torch.dtype, tmp_path: Path, fuse_all: None) -> None:
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in MODELS[name].inputs(4)]
    result = compress.run(
        make(name).to(dtype), [Cleanup(), QuantizeWeights(group_size=16)], example_inputs=inputs
    )
    assert result.graph.encodings
    artifact = compress.export(result.graph, tmp_path / "model.onnx")
    wanted = result.graph.run(inputs)
    for want, have in zip(wanted, Session(artifact.path)(*inputs), strict=True):
        assert_close(want, have, db=20)


class Returns(nn.Module):
    """A layer, and whatever else a model may return."""

    def __init__(self, also: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.also = also
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[object, ...]:
        return self.fc(x), self.also(self.fc, x)


ALSO: dict[str, Callable[[nn.Linear, Tensor], object]] = {
    "a number": lambda fc, x: 3,
    "a string": lambda fc, x: "name",
    "the batch size": lambda fc, x: x.shape[0],
    "the weight": lambda fc, x: fc.weight,
    "the input": lambda fc, x: x,
}


@pytest.mark.parametrize("also", ALSO)
def test_unusual_outputs(also: str, tmp_path: Path) -> None:
    x = torch.randn(4, 64)
    result = compress.run(Returns(ALSO[also]), [QuantizeWeights()], example_inputs=(x,))
    artifact = compress.export(result.graph, tmp_path / "model.onnx", samples=[(x,)])
    verification = compress.verify(artifact, result.reference, samples=[(x,)], batch_sizes=())
    assert all(c.sqnr_db > 15 for c in verification.comparisons)


def test_complex_outputs_are_refused(tmp_path: Path) -> None:
    graph = compress.capture(Returns(lambda fc, x: torch.fft.fft(x)), (torch.randn(4, 64),))
    with pytest.raises(ExportError, match="output_1 is complex"):
        compress.export(graph, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_type_without_kernels_is_said(tmp_path: Path) -> None:
    graph = compress.capture(nn.Conv2d(3, 4, 3).double(), (torch.randn(2, 3, 5, 5).double(),))
    with pytest.raises(VerificationError, match=r"\.float\(\)"):
        compress.export(graph, tmp_path / "model.onnx")


def test_libraries_keep_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = compress.capture(nn.EmbeddingBag(8, 4), (torch.zeros(4, 6, dtype=torch.int64),))
    compress.export(graph, tmp_path / "model.onnx")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
