"""Frequency tiers: the same logits from parts, sorted by probability, each with its own bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.api import pass_table
from compress.errors import CalibrationError, RecipeError
from compress.passes.frequency_tiers import FrequencyTiers
from compress.passes.mixed_precision import MixedPrecision
from compress.passes.quantize_weights import QuantizeWeights
from compress.pipeline import Context
from compress.recipe import Recipe
from compress.sensitivity import logits, output_layers
from compress.testing import MODELS, assert_close, calibrated_lm, make

VOCABULARY = 200


class Model(nn.Module):
    """A head with a bias that makes every seventh token probable."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.lm_head = nn.Linear(32, VOCABULARY, bias=bias)
        with torch.no_grad():
            if bias:
                self.lm_head.bias.copy_(4.0 * (torch.arange(VOCABULARY) % 7 == 0))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.embed(ids).tanh())
        return out


@functools.cache
def captured(bias: bool) -> tuple[compress.Graph, Context]:
    return calibrated_lm(lambda: Model(bias), VOCABULARY, 20)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tiers", [(2,), (29,), (10, 50, 139)])
def test_logits_stay(bias: bool, tiers: tuple[int, ...]) -> None:
    graph, context = captured(bias)
    result = FrequencyTiers(tiers=tiers).apply(graph, context).graph
    ids = torch.arange(36).reshape(3, 12)
    assert_close(graph.run([ids])[0], result.run([ids])[0], db=120)
    sizes = [result.shape(s.weight)[0] for s in result.sites() if s.name.startswith("lm_head.tier")]
    assert sizes == [*tiers, VOCABULARY - sum(tiers)]
    assert "lm_head.weight" not in result.tensors
    assert logits(result) == [0]


def test_the_probable_tokens_come_first() -> None:
    graph, context = captured(True)
    result = FrequencyTiers(tiers=(29,)).apply(graph, context)
    probable = graph.tensors["lm_head.weight"][::7]
    first = result.graph.tensors["lm_head.tier0.weight"]
    assert len(probable) == 29
    assert {tuple(row) for row in first.tolist()} == {tuple(row) for row in probable.tolist()}
    shares = [float(w.rstrip("%")) for w in result.notes[0].reason.replace(",", "").split() if "%" in w]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares[0] > 80


def test_tiers_are_layers_and_the_file_is_proven(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    graph, context = captured(True)
    steps = [
        FrequencyTiers(tiers=(29,)),
        QuantizeWeights(bits=8, targets=("lm_head.tier0",)),
        QuantizeWeights(bits=4, targets=("lm_head.tier1",)),
    ]
    result = compress.run(graph, steps, calibration=context.calibration)
    found = {name: e.encoding.bits for name, e in result.graph.encodings.items()}
    assert found == {"lm_head.tier0.weight": 8, "lm_head.tier1.weight": 4}
    path = compress.export(result.graph, tmp_path / "tiers.onnx", samples=result.samples).path
    import onnx

    kinds = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.INT16 in kinds.values() or onnx.TensorProto.UINT8 in kinds.values()


def test_mixed_precision_gives_the_probable_tier_more_bits() -> None:
    graph, context = captured(True)
    split = FrequencyTiers(tiers=(29,)).apply(graph, context).graph
    tiers = {site.node for site in split.sites() if site.name.startswith("lm_head")}
    assert output_layers(split) == tiers and not output_layers(split, whole=True)
    step = MixedPrecision(
        effective_bits=3.4,
        formats=("int2 g32", "int4 g32"),
        targets=("lm_head.*",),
        sensitive=(),
        method="rtn",
    )
    result = step.apply(split, context)
    assert {c.site: c.action for c in result.changes} == {
        "lm_head.tier0": "int4 g32",
        "lm_head.tier1": "int2 g32",
    }


def test_what_is_declined() -> None:
    graph, context = captured(False)
    split = FrequencyTiers(tiers=(50,)).apply(graph, context).graph
    again = FrequencyTiers(tiers=(20,)).apply(split, context)  # the parts are layers, not heads
    assert "no output" in again.notes[0].reason and again.graph.tensors == split.tensors
    result = FrequencyTiers(tiers=(150, 50)).apply(graph, context)
    assert "do not go beyond" in result.notes[0].reason and result.graph.tensors == graph.tensors
    tied = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    assert "stored twice" in FrequencyTiers(tiers=(50,)).apply(tied, Context(tied)).notes[0].reason
    encoder = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    assert "no output" in FrequencyTiers().apply(encoder, Context(encoder)).notes[0].reason
    with pytest.raises(CalibrationError, match="which tokens are probable"):
        FrequencyTiers(tiers=(50,)).apply(graph, Context(graph))
    recipe = Recipe.from_dict({"passes": [{"pass": "frequency_tiers", "tiers": [1]}]})
    with pytest.raises(RecipeError, match="at least two tokens"):
        recipe.build(pass_table())
