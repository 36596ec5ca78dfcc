"""Files for PyTorch: what `load` opens computes what was compressed; nothing half-written is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import ExportError, ModelFileError, OutputError, VerificationError
from compress.kernels.products import W4_MATMUL
from compress.package import read_metadata
from compress.testing import MODELS, assert_close, make


class MLP(nn.Sequential):
    """Odd sizes: no group and no tile divides them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(37, 51), nn.ReLU(), nn.Linear(51, 7, bias=False))


def write(name: str, path: Path, recipe: Any = "int4") -> tuple[compress.Artifact, compress.Result]:
    example = MODELS[name]
    result = compress.run(make(name), recipe, inputs=example.specs, calibration=[example.inputs(6)])
    return compress.export(result.graph, path / "model.safetensors", "torch", samples=result.samples), result


@pytest.mark.parametrize(
    ("name", "packed"), [("convnet", 2), ("encoder", 5), ("tied_lm", 2), ("products", 3)]
)
def test_export_load_run(name: str, packed: int, tmp_path: Path) -> None:
    artifact, result = write(name, tmp_path)
    assert artifact.target == "torch" and artifact.proof_db >= 50
    assert artifact.nbytes == artifact.path.stat().st_size < result.reference.nbytes + 20_000
    module = compress.load(artifact.path)
    assert sum(n.target is W4_MATMUL for n in module.graph.nodes) == packed
    for batch in (1, 4):
        inputs = MODELS[name].inputs(batch)
        found = torch.utils._pytree.tree_leaves(module(*inputs))
        for want, have in zip(result.graph.run(inputs), found, strict=True):
            assert_close(want, have, db=100)


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_sizes(group_size: int, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    step = {"pass": "quantize_weights", "bits": 4, "group_size": group_size, "symmetric": symmetric}
    result = compress.run(MLP(), {"passes": [step]}, example_inputs=(torch.randn(3, 37),))
    artifact = compress.export(result.graph, tmp_path / "mlp.safetensors", "torch")
    assert {form.loads_as for form in artifact.lowered} == {"compress::w4_matmul"}
    x = torch.randn(5, 37)
    assert_close(result.graph.run([x])[0], compress.load(artifact.path)(x), db=100)


def test_sparse_weights_keep_their_operator(tmp_path: Path) -> None:
    example = MODELS["encoder"]
    module = make("encoder").bfloat16()
    result = compress.run(module, "int4-sparse", inputs=example.specs, calibration=[example.inputs(6)])
    artifact = compress.export(result.graph, tmp_path / "model.safetensors", "torch")
    forms = {form.weight: form.loads_as for form in artifact.lowered}
    assert forms["q.weight"] == "compress::w4_sparse24_matmul"
    loaded, inputs = compress.load(artifact.path), example.inputs(4)
    assert torch.equal(loaded(*inputs)["hidden"], result.module()(*inputs)["hidden"])


def test_what_is_not_packed_has_a_reason(tmp_path: Path) -> None:
    artifact, result = write("convnet", tmp_path)
    reasons = {form.weight: form.reason for form in artifact.lowered}
    assert "conv2d" in reasons["conv1.weight"] and not reasons["fc1.weight"]
    result.report.artifact = artifact
    notes = {row["layer"]: row["note"] for row in result.report.rows()}
    assert "decoded at load: no kernel for conv2d" in notes["conv1"]


def test_decode_load_is_remembered(tmp_path: Path) -> None:
    example = MODELS["encoder"]
    result = compress.run(make("encoder"), "int4", inputs=example.specs)
    path = tmp_path / "model.safetensors"
    artifact = compress.export(result.graph, path, "torch", decode="load")
    assert {form.loads_as for form in artifact.lowered} == {"decoded at load"}
    assert not any(n.target is W4_MATMUL for n in compress.load(path).graph.nodes)
    assert any(n.target is W4_MATMUL for n in compress.load(path, decode="run").graph.nodes)


def test_a_half_precision_model(tmp_path: Path) -> None:
    inputs = MODELS["encoder"].inputs(2)
    result = compress.run(make("encoder").bfloat16(), "int4", example_inputs=inputs)
    artifact = compress.export(result.graph, tmp_path / "half.safetensors", "torch")
    assert compress.load(artifact.path)(*inputs)["hidden"].dtype == torch.bfloat16


def test_rounded_activations(tmp_path: Path) -> None:
    artifact, _ = write("encoder", tmp_path, "int8")
    assert artifact.proof_db >= 50


def test_the_same_bytes_again(tmp_path: Path) -> None:
    first = write("encoder", tmp_path)[0].path.read_bytes()
    assert write("encoder", tmp_path)[0].path.read_bytes() == first


def test_metadata_and_results(tmp_path: Path) -> None:
    result = compress.run(make("products"), "int4", inputs=MODELS["products"].specs)
    seen: list[Path] = []

    def results(artifact: compress.Artifact) -> dict[str, Any]:
        seen.append(artifact.path)
        return {"top1": 1.0}

    path = tmp_path / "model.safetensors"
    compress.export(result.graph, path, "torch", results=results)
    metadata = read_metadata(path)
    assert metadata["results"] == {"top1": 1.0} and metadata["decode"] == "run"
    assert metadata["recipe"]["metadata"]["name"] == "int4" and "torch" in metadata["versions"]
    assert seen != [path]  # under its temporary name


def test_verification_and_timing(tmp_path: Path) -> None:
    artifact, result = write("encoder", tmp_path)
    found = compress.verify(
        artifact, result.reference, samples=result.samples, batch_sizes=(1, 3), seconds=0.05
    )
    by = {(c.what, c.output): c for c in found.comparisons}
    assert by["file vs original", "hidden"].cosine > 0.95
    assert by["file vs compressed graph", "hidden"].sqnr_db > 80
    assert [t.sizes["batch"] for t in found.timings] == [1, 3]
    assert found.float_bytes > artifact.nbytes
    assert found.environment["runtime"].startswith("PyTorch")
    if not torch.cuda.is_available():
        assert "q.weight" in found.unfused and "embed.weight" not in found.unfused


@pytest.mark.parametrize("part", ["tensor", "operator"])
def test_a_wrong_file_leaves_nothing(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compress.run(make("products"), "int4", inputs=MODELS["products"].specs)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    from compress.exporters import to_torch

    def spoil(graph: compress.Graph, path: Path, *rest: Any) -> None:
        graph = graph.copy()
        if part == "tensor":
            graph.tensors["c"] = graph.tensors["c"] + 1e-6
        else:
            next(n for n in graph.ops.nodes if "relu" in n.name).target = torch.ops.aten.tanh.default
        write_package(graph, path, *rest)

    write_package = to_torch.write_package
    monkeypatch.setattr(to_torch, "write_package", spoil)
    with pytest.raises(VerificationError, match="another graph"):
        compress.export(result.graph, path, "torch")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] and path.read_bytes() == b"before"


def test_a_wrong_operator_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is right, but what `load` makes of it is not."""
    result = compress.run(make("products"), "int4", inputs=MODELS["products"].specs)
    from compress.kernels import fuse

    product = fuse._product

    def wrong(ops: Any, *rest: Any) -> Any:
        return ops.call_function(torch.ops.aten.mul.Tensor, (product(ops, *rest), 1.01))

    monkeypatch.setattr(fuse, "_product", wrong)
    with pytest.raises(VerificationError, match="differs from the graph"):
        compress.export(result.graph, tmp_path / "model.safetensors", "torch")
    assert list(tmp_path.iterdir()) == []


def test_reasons_come_before_any_work(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
            return out

    graph = compress.capture(Branch(), [torch.randn(2, 3)])
    with pytest.raises(ExportError, match="sub-graphs"):
        compress.export(graph, tmp_path / "model.safetensors", "torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.pt2", "model.pt"])
def test_names_that_promise_something_else(name: str, tmp_path: Path) -> None:
    result = compress.run(make("products"), "int4", inputs=MODELS["products"].specs)
    with pytest.raises(OutputError, match="running code"):
        compress.export(result.graph, tmp_path / name, "torch")
    with pytest.raises(OutputError, match="does not exist"):
        compress.export(result.graph, tmp_path / "missing" / "model.safetensors", "torch")


def test_a_damaged_file(tmp_path: Path) -> None:
    artifact, _ = write("products", tmp_path)
    artifact.path.write_bytes(artifact.path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        compress.load(artifact.path)
