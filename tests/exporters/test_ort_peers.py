"""ONNX Runtime's quantizers on our float export: which of them are for which model, and what they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.testing import MODELS, make

pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from compress.exporters.ort import Session
from compress.exporters.ort_peers import ORT_PEERS, arrays, weighted_operators
from compress.exporters.to_onnx import OnnxExporter

SUITED = {
    "convnet": ["ort-int8-dynamic", "ort-int8-static"],
    "encoder": ["ort-int8-dynamic", "ort-int4-rtn", "ort-int4-hqq"],
}


@pytest.mark.parametrize("name", SUITED)
def test_each_model_gets_the_peers_that_suit_it(name: str, tmp_path: Path) -> None:
    example = MODELS[name]
    graph = compress.capture(make(name), inputs=example.specs)
    plain = tmp_path / "float.onnx"
    OnnxExporter().write_float(graph, plain)
    reasons = {peer.name: peer.unsuitable(plain, calibrated=True) for peer in ORT_PEERS}
    assert [peer for peer, reason in reasons.items() if not reason] == SUITED[name]
    assert all("no constant weight" in reason for reason in reasons.values() if reason)
    inputs = example.inputs(4)
    wanted = Session(plain)(*inputs)[0]
    for peer in ORT_PEERS:
        if not reasons[peer.name]:
            out = peer.write(plain, tmp_path / f"{peer.name}.onnx", arrays(graph, [inputs]))
            got = Session(out)(*inputs)[0]
            assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.3, peer.name
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(["float", *SUITED[name]])


def test_one_without_data(tmp_path: Path) -> None:
    graph = compress.capture(make("convnet"), inputs=MODELS["convnet"].specs)
    OnnxExporter().write_float(graph, tmp_path / "float.onnx")
    assert weighted_operators(tmp_path / "float.onnx") == {"Conv", "Gemm"}
    reasons = {peer.name: peer.unsuitable(tmp_path / "float.onnx", calibrated=False) for peer in ORT_PEERS}
    assert reasons["ort-int8-static"] == "it needs calibration data"


def test_arrays_go_by_name() -> None:
    graph = compress.capture(make("encoder"), inputs=MODELS["encoder"].specs)
    ids, mask = MODELS["encoder"].inputs(2)
    (batch,) = arrays(graph, [(ids, mask)])
    assert list(batch) == ["ids", "mask"] and torch.equal(torch.from_numpy(batch["ids"]), ids)
