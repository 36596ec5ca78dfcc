"""Sparse weights without their zeros: exact everywhere, as small as computed, trained like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.bitmap import BitmapWeight
from compress.passes.pack_sparse import PackSparse
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.testing import MODELS, make


def packed(name: str, *passes: compress.Pass, sparsity: float = 0.75) -> compress.Result:
    example = MODELS[name]
    prune = PruneMagnitude(sparsity=sparsity, refit=False, targets=("linear", "conv", "embedding"))
    return compress.run(make(name), [prune, PackSparse(), *passes], example_inputs=example.inputs(2))


@pytest.mark.parametrize("name", ["convnet", "encoder", "tied_lm"])
def test_values_stay_and_bytes_go(name: str) -> None:
    result = packed(name)
    pruned = compress.run(
        make(name),
        [PruneMagnitude(sparsity=0.75, refit=False, targets=("linear", "conv", "embedding"))],
        example_inputs=MODELS[name].inputs(2),
    )
    changes = result.report.passes[1].changes
    assert changes
    for change in changes:
        encoded = result.graph.encodings[change.weight]
        assert isinstance(encoded, BitmapWeight)
        assert torch.equal(result.graph.weight(change.weight), pruned.graph.weight(change.weight))
        assert change.bytes_after == encoded.nbytes < change.bytes_before
    for want, have in zip(
        pruned.graph.run(MODELS[name].inputs(3)), result.graph.run(MODELS[name].inputs(3)), strict=True
    ):
        assert torch.equal(want, have)


def test_what_would_not_become_smaller_is_left() -> None:
    result = packed("convnet", sparsity=0.0)
    assert not result.report.passes[1].changes
    assert all("zeros save 0 bytes" in note.reason for note in result.report.passes[1].notes)
    example = MODELS["encoder"]
    passes = [QuantizeWeights(bits=4, group_size=16, method="rtn"), PackSparse()]
    result = compress.run(make("encoder"), passes, example_inputs=example.inputs(2))
    assert any(note.reason.startswith("already int4") for note in result.report.passes[1].notes)


def test_float64_is_left() -> None:
    module = nn.Linear(64, 64).double().eval()
    steps: list[Any] = [PruneMagnitude(sparsity=0.9, refit=False), PackSparse()]
    result = compress.run(module, steps, example_inputs=(torch.zeros(2, 64, dtype=torch.float64),))
    assert not result.graph.encodings
    assert "float64" in result.report.passes[1].notes[0].reason


def test_recover_trains_the_values_and_keeps_the_zeros() -> None:
    example = MODELS["convnet"]
    passes: list[Any] = [
        PruneMagnitude(sparsity=0.6, refit=False), PackSparse(),
        Recover(epochs=3, batch_size=8, learning_rate=1e-2, targets=("linear", "conv")),
    ]  # fmt: skip
    samples = [example.inputs(40)]
    result = compress.run(make("convnet"), passes, example_inputs=example.inputs(2), calibration=samples)
    before = compress.run(make("convnet"), passes[:2], example_inputs=example.inputs(2))
    assert result.report.passes[2].changes
    moved = []
    for name, encoded in result.graph.encodings.items():
        start = before.graph.encodings[name]
        assert isinstance(start, BitmapWeight)
        assert isinstance(encoded, BitmapWeight)
        assert torch.equal(start.codes, encoded.codes)
        moved.append(not torch.equal(start.values, encoded.values))
    assert all(moved)
    assert moved


def test_files_are_as_small_as_computed(tmp_path: Path) -> None:
    """Also where rows end within a byte; and nothing is expanded more than once."""
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    from compress.exporters.ort import Session, decoded_on_every_call

    module = nn.Sequential(nn.Linear(301, 400), nn.ReLU(), nn.Linear(400, 64, bias=False)).eval()
    x = torch.randn(4, 301, generator=torch.Generator().manual_seed(0))
    steps: list[Any] = [PruneMagnitude(sparsity=0.9, refit=False)]
    dense = compress.run(module, steps, example_inputs=(x,))
    result = compress.run(module, [*steps, PackSparse()], example_inputs=(x,))
    artifact = compress.export(result.graph, tmp_path / "model.onnx")
    stored = sum(e.nbytes for e in result.graph.encodings.values())
    assert stored < 0.14 * 4 * (301 * 400 + 400 * 64)
    assert stored < artifact.nbytes < stored + 4 * 400 + 6000  # a bias, and the graph
    session = Session(artifact.path)
    assert torch.allclose(session(x)[0], dense.graph.run([x])[0], atol=1e-5)
    decoders = {node: form.weight for form in artifact.lowered for node in form.nodes}
    assert len(decoders) == 2
    assert decoded_on_every_call(artifact.path, decoders) == []


@pytest.mark.parametrize("name", ["convnet", "tied_lm"])
def test_every_reader_in_a_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    result = packed(name)
    artifact = compress.export(result.graph, tmp_path / "model.onnx")
    assert artifact.proof_db > 90
    assert {form.weight for form in artifact.lowered} == set(result.graph.encodings)


def test_half_precision_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    module = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 16)).half().eval()
    steps: list[Any] = [PruneMagnitude(sparsity=0.5, refit=False), PackSparse()]
    result = compress.run(module, steps, example_inputs=(torch.zeros(2, 64, dtype=torch.float16),))
    assert result.graph.encodings
    assert compress.export(result.graph, tmp_path / "model.onnx").proof_db > 50
