"""Two-stage heads: exact where it was screened in, coarse elsewhere, and the recall that is reported."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.screen_logits import ScreenLogits
from compress.passes.vq_logits import VqLogits
from compress.pipeline import Context
from compress.testing import MODELS, calibrated_lm, make

VOCABULARY = 300


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mlp = nn.Linear(16, 24)
        self.lm_head = nn.Linear(24, VOCABULARY, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(3 * self.mlp(self.embed(ids)).tanh())
        return out


@functools.cache
def captured(bias: bool) -> tuple[compress.Graph, Context]:
    return calibrated_lm(lambda: Model(bias), VOCABULARY, 60)


@pytest.mark.parametrize("bias", [False, True])
def test_candidates_are_exact_and_the_rest_is_coarse(bias: bool) -> None:
    graph, context = captured(bias)
    options: dict[str, Any] = {"codes": 16, "stages": 2, "epochs": 0}
    screened = ScreenLogits(candidates=30, **options).apply(graph, context).graph
    coarse = VqLogits(**options).apply(graph, context).graph
    ids = torch.arange(24).reshape(2, 12)
    dense, rough, both = (g.run([ids])[0].flatten(0, 1) for g in (graph, coarse, screened))
    for d, r, b in zip(dense, rough, both, strict=True):
        chosen = set(r.topk(30).indices.tolist())
        want = torch.stack([d[v] if v in chosen else r[v] for v in range(VOCABULARY)])
        assert torch.allclose(b, want, atol=1e-4)


def test_the_recall_is_that_of_the_held_out_rows() -> None:
    graph, context = captured(True)
    result = ScreenLogits(candidates=12, codes=8, stages=2, epochs=0).apply(graph, context)
    note = result.notes[-1].reason
    assert "recall at 12" in note and "of 144 held-out rows" in note
    coarse = VqLogits(codes=8, stages=2, epochs=0).apply(graph, context).graph
    assert context.calibration is not None
    ids = torch.cat([b.inputs[0] for b in context.calibration])
    dense, rough = (g.run([ids])[0].flatten(0, 1)[-144:] for g in (graph, coarse))
    inside = (rough.topk(12).indices == dense.argmax(-1)[:, None]).any(-1)
    assert float(note.split()[3]) == pytest.approx(float(inside.double().mean()), abs=1e-5)
    assert 0.1 < float(inside.double().mean()) < 1


def test_bytes_and_quantized_rows(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    graph, context = captured(True)
    steps = [
        ScreenLogits(candidates=40, codes=16, stages=2, epochs=0),
        QuantizeWeights(bits=8, group_size=-1, targets=("lm_head.candidates",)),
    ]
    result = compress.run(graph, steps, calibration=context.calibration)
    change = result.report.passes[0].changes[0]
    assert change.bytes_after > change.bytes_before == 4 * 24 * VOCABULARY
    assert list(result.graph.encodings) == ["lm_head.weight"]
    compress.export(result.graph, tmp_path / "screen.onnx", samples=result.samples)


def test_tied_heads_share_the_table() -> None:
    graph = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    ids = torch.randint(0, 200, (20, 9), generator=torch.Generator().manual_seed(1))
    context = Context(graph, load_calibration(ids, inputs=graph.inputs))
    result = ScreenLogits(candidates=20, codes=16, stages=2, epochs=0).apply(graph, context).graph
    assert result.tensors["embed.weight"] is graph.tensors["embed.weight"]
    assert {s.kind for s in result.sites() if s.weight == "embed.weight"} == {"embedding"}


def test_what_is_declined() -> None:
    graph, context = captured(False)
    result = ScreenLogits(candidates=300, codes=4).apply(graph, context)
    assert "all of its 300 tokens" in result.notes[0].reason
    blind = ScreenLogits(candidates=30, codes=8, stages=2).apply(graph, Context(graph))
    assert "their recall is not known; singletons, token_bias" in blind.notes[-1].reason
