"""Latencies of single layers: one for each format, equal layers once, every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.chain import Chain
from compress.encoding import EncodedWeight, IntEncoding
from compress.passes.quantize_weights import quantized
from compress.testing import MODELS, make

pytest.importorskip("onnxruntime")
from compress.exporters import latency


def encoded(graph: compress.Graph, *encodings: IntEncoding) -> dict[str, list[EncodedWeight | None]]:
    names = dict.fromkeys(site.weight for site in graph.sites())
    return {n: [None, *(quantized(graph.weight(n), None, e) for e in encodings)] for n in names}


@pytest.mark.parametrize("name", ["convnet", "tied_lm"])
def test_every_layer_in_every_format(name: str) -> None:
    """Strided, grouped, "same" and depthwise convolutions, embeddings, ties, biases."""
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    formats = encoded(graph, IntEncoding(4, 16, False))
    found = latency.layer_latencies(graph, MODELS[name].inputs(1), formats, seconds=0)
    assert found.keys() == formats.keys()
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x)))
        return out


def test_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed computes what the layer computes, from the input it has in the model."""
    graph = compress.capture(Twins().eval(), (torch.randn(2, 8),))
    inputs = (torch.randn(3, 8),)
    timed = []

    def fake(alone: compress.Graph, x: Tensor, options: object, seconds: float) -> list[float]:
        timed.append((alone.run([x])[0], x))
        return [1.0, 0.5]

    monkeypatch.setattr(latency, "_timed", fake)
    found = latency.layer_latencies(graph, inputs, encoded(graph, IntEncoding(8)))
    assert found == {f"{name}.weight": [1.0, 0.5] for name in "abc"}
    assert len(timed) == 2
    assert torch.equal(timed[0][1], inputs[0])
    assert torch.allclose(timed[1][0], graph.run(inputs)[0])


def test_a_tied_weight_counts_at_each_of_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    monkeypatch.setattr(latency, "_timed", lambda *_: [1.0])
    found = latency.layer_latencies(graph, MODELS["tied_lm"].inputs(1), encoded(graph))
    assert found == {"embed.weight": [2.0], "mlp.weight": [1.0]}


def test_a_chain_in_place_of_a_layer() -> None:
    """Both are timed as they stand in a file."""
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    chain = Chain("svd 4", (torch.randn(4, 32), torch.randn(48, 4)))
    found = latency.layer_latencies(graph, MODELS["convnet"].inputs(1), {"fc1.weight": [chain]}, seconds=0)
    assert found["fc1.weight"][0] > 0
