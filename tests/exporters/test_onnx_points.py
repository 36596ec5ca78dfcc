"""ONNX files as named points: ours and others', sound ones and ones with a layer made wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import ModelFileError
from compress.testing import MODELS, make

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")
ir = pytest.importorskip("onnx_ir", reason="needs the onnx extra")

# these import what is looked for above
from compress.exporters.onnx_points import OnnxPoints  # noqa: E402
from compress.exporters.to_onnx import build_model  # noqa: E402

CASES = {"convnet": ("grouped", "int4"), "encoder": ("v", "int8"), "tied_lm": ("mlp", "int4")}


class Written:
    """A model as captured, its compressed file, and the same file with one layer's scales times 1.5."""

    def __init__(self, name: str, folder: Path) -> None:
        self.layer, recipe = CASES[name]
        self.graph = compress.capture(make(name), inputs=MODELS[name].specs)
        self.sound, self.broken = folder / f"{name}.onnx", folder / f"{name}-broken.onnx"
        save(compress.run(self.graph, recipe).graph, self.sound)
        scale(self.sound, f"{self.layer}.weight.scales", self.broken)


def save(graph: compress.Graph, path: Path) -> Path:
    ir.save(build_model(graph)[0], path)
    return path


def scale(path: Path, name: str, to: Path) -> None:
    model = onnx.load(path)
    stored = next(t for t in model.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(stored) * np.float32(1.5)
    stored.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, to)


@pytest.fixture(scope="module", params=list(CASES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(request.param, tmp_path_factory.mktemp(request.param))


def test_a_sound_file_has_no_layer_out_of_line(written: Written) -> None:
    found = compress.diff(written.graph, written.sound)
    assert found.parts_at is None, found.headline()
    assert all(p.how == "name" for p in found.points if p.kind != "output")
    assert all(p.own_db is not None and p.own_db > 20 for p in found.points if p.kind != "output")


def test_the_wrong_layer_is_named_torch_against_onnx(written: Written) -> None:
    found = compress.diff(written.graph, written.broken)
    assert found.parts_at is not None
    assert found.parts_at.name == written.layer, found.headline()
    assert found.parts_at.own_db == pytest.approx(6, abs=0.3)
    assert [p.name for p in found.points if p.out_of_line] == [written.layer]


def test_the_wrong_layer_is_named_onnx_against_onnx(written: Written) -> None:
    found = compress.diff(written.sound, written.broken)
    assert found.parts_at is not None
    assert found.parts_at.name == written.layer
    assert [p.name for p in found.points if p.own_db is not None and p.own_db < 100] == [written.layer]
    assert found.parts_at.gain == pytest.approx(1.5, abs=0.01)


def test_onnx_against_torch(written: Written) -> None:
    found = compress.diff(written.sound, written.graph)
    assert found.parts_at is None, found.headline()
    assert not [p.name for p in found.points if p.how is None and p.kind != "output"]


def test_a_table_shared_by_embedding_and_head(written: Written, tmp_path: Path) -> None:
    if written.layer != "mlp":
        pytest.skip("only the language model has one")
    scale(written.sound, "embed.weight.scales", tmp_path / "broken.onnx")
    found = compress.diff(written.graph, tmp_path / "broken.onnx")
    assert found.parts_at is not None
    assert found.parts_at.name == "embed"
    assert found.likes == 0  # the head is the same weight
    assert [p.name for p in found.points if p.out_of_line] == ["embed", "head"]


class Wide(nn.Module):
    """Products large enough for the packed and the integer forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


@pytest.mark.parametrize(("recipe", "bits", "own"), [("int8", 8, 35.0), ("nf4", 4, 18.0)])
def test_forms_of_large_products(recipe: str, bits: int, own: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = compress.capture(Wide().eval(), inputs=["1,256"])
    path = save(compress.run(graph, recipe).graph, tmp_path / "wide.onnx")
    found = compress.diff(graph, path, samples=4)
    assert [(p.name, p.how, p.bits) for p in found.points[:2]] == [("a", "name", bits), ("b", "name", bits)]
    assert all(p.own_db is not None and own < p.own_db < 60 for p in found.points[:2])
    assert found.parts_at is None


def test_layers_of_8_bit_floats(tmp_path: Path) -> None:
    example = MODELS["encoder"]
    graph = compress.capture(make("encoder"), inputs=example.specs)
    result = compress.run(graph, "fp8", calibration=[example.inputs(4)])
    path = save(result.graph, tmp_path / "encoder.onnx")
    same = compress.diff(result.graph, path)
    layers = [p for p in same.points if p.kind != "output"]
    assert len(layers) == 6 and all(p.bits == 8 and p.float8 for p in layers)
    assert all(p.own_db is not None and p.own_db > 100 for p in layers), "its rounded input is its own"
    found = compress.diff(graph, path)
    assert found.parts_at is None, found.headline()
    scales = result.graph.tensors["up.weight.scales"]
    scales *= 1.5
    found = compress.diff(graph, save(result.graph, tmp_path / "wrong.onnx"))
    assert found.parts_at is not None and found.parts_at.name == "up"


def foreign(path: Path, names: Callable[[str], str], change: float = 1.0) -> Path:
    """A file as others write it: a rounded convolution, a batch norm behind it, operators without names."""
    rng = np.random.default_rng(0)
    helper, numpy = onnx.helper, onnx.numpy_helper
    weights = {
        "filter": rng.standard_normal((8, 3, 3, 3)),
        "bn": np.array([1.5] * 8),
        "zero": np.zeros(8),
        "one": np.ones(8),
        "first": rng.standard_normal((8, 12)) * change,
        "second": rng.standard_normal((12, 12)),
        "bias": rng.standard_normal(12),
    }
    stored = [numpy.from_array(v.astype(np.float32), names(k)) for k, v in weights.items()]
    stored += [
        numpy.from_array(np.float32(0.05), "step"),
        numpy.from_array(np.uint8(128), "middle"),
        numpy.from_array(np.array([2, 3]), "axes"),
    ]
    nodes = [
        ("QuantizeLinear", ["x", "step", "middle"], "codes"),
        ("DequantizeLinear", ["codes", "step", "middle"], "rounded"),
        ("Conv", ["rounded", names("filter")], "convolved"),
        ("BatchNormalization", ["convolved", *map(names, ("bn", "zero", "zero", "one"))], "normed"),
        ("Relu", ["normed"], "relu"),
        ("ReduceMean", ["relu", "axes"], "mean"),
        ("MatMul", ["mean", names("first")], "p"),
        ("Relu", ["p"], "p2"),
        ("MatMul", ["p2", names("second")], "q"),
        ("Add", ["q", names("bias")], "y"),
    ]
    graph = helper.make_graph(
        [
            helper.make_node(op, given, [out], **({"keepdims": 0} if op == "ReduceMean" else {}))
            for op, given, out in nodes
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 12])],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_files_of_others(tmp_path: Path) -> None:
    plain = foreign(tmp_path / "a.onnx", lambda n: f"net.{n}.weight")
    layers = OnnxPoints(plain).layers
    assert [(x.name, x.kind, x.source, x.output) for x in layers] == [
        ("net.filter", "conv", "x", "normed"),
        ("net.first", "linear", "mean", "p"),
        ("net.second", "linear", "p2", "y"),
    ]
    other = foreign(tmp_path / "b.onnx", lambda n: f"onnx::Thing_{len(n)}{n[0]}{n[-1]}", change=1.2)
    found = compress.diff(plain, other)
    assert [p.how for p in found.points[:3]] == ["weight"] * 3
    assert found.parts_at is not None
    assert found.parts_at.name == "net.first"
    assert found.parts_at.gain == pytest.approx(1.2, abs=1e-4)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a.onnx", str)
    (tmp_path / "b.onnx").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelFileError, match=r"b\.onnx"):
        compress.diff(path, tmp_path / "b.onnx")
