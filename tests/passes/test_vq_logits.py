"""VQ-logits: heads in codes run, export and keep their promises; what is declined is said."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.passes.frequency_tiers import FrequencyTiers
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.passes.screen_logits import ScreenLogits
from compress.passes.vq_logits import VqLogits
from compress.pipeline import Context, Pass, PassResult
from compress.testing import MODELS, assert_close, calibrated_lm, make

VOCABULARY = 300


class Model(nn.Module):
    """An embedding, a layer and a head of its own, whose rows lie in clusters."""

    def __init__(self, bias: bool = True, width: int = 24, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mlp = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=bias)
        with torch.no_grad():
            near = torch.randn(20, width)[torch.arange(vocabulary) % 20]
            self.lm_head.weight.copy_(near + 0.1 * torch.randn(vocabulary, width))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.mlp(self.embed(ids)).tanh())
        return out


@functools.cache
def captured(bias: bool) -> tuple[compress.Graph, Context]:
    return calibrated_lm(lambda: Model(bias), VOCABULARY, 40)


def coded(bias: bool = True, **options: Any) -> PassResult:
    graph, context = captured(bias)
    return VqLogits(**options).apply(graph, context)


def kl(one: compress.Graph, other: compress.Graph) -> float:
    ids = torch.randint(0, VOCABULARY, (30, 12), generator=torch.Generator().manual_seed(9))
    p, q = (g.run([ids])[0].double().log_softmax(-1) for g in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_better_with_stages_biases_and_training() -> None:
    graph, _ = captured(True)
    plain = kl(graph, coded(codes=8, stages=1, token_bias=False, epochs=0).graph)
    biased = kl(graph, coded(codes=8, stages=1, epochs=0).graph)
    staged = kl(graph, coded(codes=8, stages=3, epochs=0).graph)
    trained = kl(graph, coded(codes=8, stages=3, epochs=4).graph)
    assert plain > biased > staged > trained


def test_enough_codes_are_exact() -> None:
    graph, _ = captured(bias=False)
    assert kl(graph, coded(bias=False, codes=280, stages=1, epochs=0).graph) < 1e-3
    ids = torch.arange(24).reshape(2, 12)
    few = coded(bias=False, codes=8, singletons=200, stages=2, epochs=0, token_bias=False).graph
    same = (few.run([ids])[0] - graph.run([ids])[0]).abs().amax((0, 1)) < 1e-4
    assert 200 <= int(same.sum()) < VOCABULARY


def test_what_is_stored_is_what_is_said() -> None:
    graph, _ = captured(True)
    result = coded(codes=8, stages=3, epochs=1)
    (change,) = result.changes
    head = {n: t for n, t in result.graph.tensors.items() if n.startswith("lm_head.")}
    assert {t.dtype for n, t in head.items() if "map" in n} == {torch.uint8}
    assert head["lm_head.codebook.weight"].shape == (24, 24)
    assert change.bytes_after == sum(t.numel() * t.element_size() for t in head.values())
    assert change.bytes_before == 4 * VOCABULARY * 24
    assert change.bits == 8 * change.bytes_after / (VOCABULARY * 24)
    assert "lm_head.weight" not in result.graph.tensors
    assert 0 < change.error < 1
    (note,) = result.notes
    first, last = (float(w) for w in note.reason.split() if w[0].isdigit())
    assert last < first
    others = {name: t for name, t in graph.tensors.items() if "lm_head" not in name}
    assert all(result.graph.tensors[name] is t for name, t in others.items())


def test_same_seed_same_bytes() -> None:
    one, other = (coded(codes=8, stages=2, epochs=1).graph.tensors for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_codebooks_are_layers() -> None:
    graph, context = captured(True)
    steps = [
        VqLogits(codes=4, stages=2, epochs=0),
        Recover(epochs=8, batch_size=8, learning_rate=3e-3),
        QuantizeWeights(bits=8, group_size=-1, targets=("lm_head.codebook",)),
    ]
    result = compress.run(graph, steps, calibration=context.calibration)
    assert list(result.graph.encodings) == ["lm_head.codebook.weight"]
    assert kl(graph, result.graph) < 0.95 * kl(graph, coded(codes=4, stages=2, epochs=0).graph)


def test_the_file_is_proven_and_as_small(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    graph, context = captured(True)
    result = compress.run(graph, [VqLogits(codes=8, stages=2, epochs=0)], calibration=context.calibration)
    path = compress.export(result.graph, tmp_path / "vq.onnx", samples=result.samples).path
    import onnx

    stored = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert sum(kind == onnx.TensorProto.UINT8 for kind in stored.values()) == 2
    assert path.stat().st_size < result.graph.nbytes + 6000


def test_tied_heads_keep_the_embedding() -> None:
    graph = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    ids = torch.randint(0, 200, (20, 9), generator=torch.Generator().manual_seed(1))
    context = Context(graph, load_calibration(ids, inputs=graph.inputs))
    result = VqLogits(codes=16, stages=2, epochs=0).apply(graph, context)
    assert result.graph.tensors["embed.weight"] is graph.tensors["embed.weight"]
    assert any("time is saved, no bytes" in n.reason for n in result.notes)
    (change,) = result.changes
    assert change.bytes_after - change.bytes_before == result.graph.nbytes - graph.nbytes > 0


def test_half_precision() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model().eval().bfloat16()
    graph = compress.capture(model, inputs=["ids:int64[1,seq=12]"])
    ids = torch.randint(0, VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(1))
    context = Context(graph, load_calibration(ids, inputs=graph.inputs))
    result = VqLogits(codes=32, stages=2, epochs=0).apply(graph, context)
    assert result.graph.tensors["lm_head.codebook.weight"].dtype == torch.bfloat16
    assert math.isfinite(kl(graph, result.graph))


def test_what_is_declined() -> None:
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    result = VqLogits().apply(graph, Context(graph))
    assert not result.changes and "no output" in result.notes[0].reason
    graph, context = captured(True)
    result = VqLogits(codes=256, stages=2).apply(graph, context)
    assert "as many numbers" in result.notes[0].reason
    eight = QuantizeWeights(bits=8, targets=("lm_head",)).apply(graph, context).graph
    result = VqLogits(codes=8, stages=2).apply(eight, context)
    assert "already int8" in result.notes[0].reason
    assert_close(eight.run([torch.arange(12)[None]])[0], result.graph.run([torch.arange(12)[None]])[0])


class Computed(nn.Module):
    """A head whose weight is read through a cast, or whose bias is computed."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.cast = cast
        self.embed = nn.Embedding(40, 8)
        self.lm_head = nn.Linear(8, 40)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, head = self.embed(ids), self.lm_head
        if self.cast:
            return nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())
        return nn.functional.linear(hidden, head.weight, 2 * head.bias)


@pytest.mark.parametrize("cast", [False, True])
def test_heads_of_computed_tensors_are_declined(cast: bool) -> None:
    model = Computed(cast).eval()
    graph = compress.capture(model.half() if cast else model, inputs=["ids:int64[1,seq=6]"])
    ids = torch.randint(0, 40, (10, 6), generator=torch.Generator().manual_seed(1))
    context = Context(graph, load_calibration(ids, inputs=graph.inputs))
    steps: list[Pass] = [
        VqLogits(codes=4, stages=2),
        ScreenLogits(candidates=5, codes=4, stages=2),
        FrequencyTiers(tiers=(10,)),
    ]
    for step in steps:
        result = step.apply(graph, context)
        (note,) = result.notes
        assert ("through another operator" if cast else "bias is computed") in note.reason
        assert result.graph.tensors == graph.tensors and not result.changes


def test_without_data() -> None:
    graph, _ = captured(True)
    result = VqLogits(codes=64, stages=2).apply(graph, Context(graph))
    assert "plain k-means" in result.notes[0].reason
    for option in ("singletons", "token_bias", "epochs", "learning_rate"):
        assert option in result.notes[0].reason
    assert kl(graph, result.graph) < kl(graph, VqLogits(codes=4, stages=1).apply(graph, Context(graph)).graph)


@pytest.mark.parametrize("recipe", ["lm-int4", "lm-extreme", "vq-logits"])
@pytest.mark.parametrize("tied", [False, True])
def test_recipes_for_language_models(recipe: str, tied: bool) -> None:
    vocabulary = 200 if tied else 1200  # more than the thousand tokens of a tier, and codes
    model = make("tied_lm") if tied else Model(width=64, vocabulary=vocabulary).eval()
    graph = compress.capture(model, inputs=["ids:int64[1,seq=9]"])
    ids = torch.randint(0, vocabulary, (16, 9), generator=torch.Generator().manual_seed(1))
    result = compress.run(graph, recipe, calibration=ids)
    assert result.graph.run([ids])[0].shape == (16, 9, vocabulary)
    small = recipe == "vq-logits" and tied  # 200 tokens are too few for a thousand codes
    assert (result.graph.nbytes < graph.nbytes) == (not small)
    tiers = {name for name in result.graph.encodings if "tier" in name}
    split = recipe == "lm-extreme" and not tied
    assert tiers == ({"lm_head.tier0.weight", "lm_head.tier1.weight"} if split else set())
