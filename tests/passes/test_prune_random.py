"""Random pruning: exact counts with every provider, patterns, seeds, and the refit of survivors."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

import compress
from compress.data import load_calibration
from compress.errors import CalibrationError, PassError
from compress.passes.prune_random import PruneRandom
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.solvers.ratios import Ratios, densities
from compress.pipeline import Context, PassResult
from compress.testing import MODELS, make


def prune(
    name: str, *, data: bool = False, seed: int = 0, **options: object
) -> tuple[compress.Graph, PassResult]:
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    batches = load_calibration([MODELS[name].inputs(16)], inputs=graph.inputs) if data else None
    context = Context(graph, batches, seed=seed)
    return graph, PruneRandom(**options).apply(graph, context)  # type: ignore[arg-type]


def weights_of(graph: compress.Graph) -> list[str]:
    return list(dict.fromkeys(s.weight for s in graph.sites()))


@pytest.mark.parametrize("ratios", get_args(Ratios))
def test_the_exact_number_of_weights_goes(ratios: Ratios) -> None:
    graph, result = prune("convnet", data=ratios == "owl", sparsity=0.55, ratios=ratios, refit=False)
    names = weights_of(graph)
    new = [result.graph.weight(n) for n in names]
    total = sum(w.numel() for w in new)
    assert sum(int((w == 0).sum()) for w in new) == round(0.55 * total)
    for name, w in zip(names, new, strict=True):
        kept = w != 0
        assert torch.equal(w[kept], graph.weight(name)[kept])
    if ratios not in ("owl", "global"):
        wanted = densities([tuple(w.shape) for w in new], 0.45, ratios)
        for w, d in zip(new, wanted, strict=True):
            assert abs(int((w != 0).sum()) - d * w.numel()) <= 1


def test_positions_are_drawn_from_the_seed_alone() -> None:
    first, same, other = (prune("convnet", sparsity=0.5, seed=s)[1].graph for s in (3, 3, 4))
    for name in weights_of(first):
        assert torch.equal(first.weight(name), same.weight(name))
    assert any(not torch.equal(first.weight(n), other.weight(n)) for n in weights_of(first))


def test_positions_are_spread_evenly() -> None:
    _, result = prune("encoder", sparsity=0.5, ratios="uniform", refit=False)
    for change in result.changes:
        zero = (result.graph.weight(change.weight) == 0).double()
        for axis in (0, 1):
            # the mean of n draws of one half is within five standard deviations of it
            share, n = zero.mean(axis), zero.shape[axis]
            assert float((share - 0.5).abs().max()) < 2.5 / n**0.5


def test_two_of_four_with_refit_and_export(tmp_path: Path) -> None:
    graph, result = prune("encoder", data=True, pattern="2:4")
    for change in result.changes:
        kept = (result.graph.weight(change.weight) != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept <= 2).all()
        assert change.action == "random 2:4"
    without = prune("encoder", pattern="2:4", refit=False)[1]
    x = MODELS["encoder"].inputs(16)
    errors = [float((r.graph.run(x)[0] - graph.run(x)[0]).norm()) for r in (result, without)]
    assert errors[0] < 0.9 * errors[1]
    pytest.importorskip("onnxruntime")
    compress.export(result.graph, tmp_path / "random.onnx")


def test_what_is_left_alone() -> None:
    graph, result = prune("convnet", pattern="2:4")
    assert {n.site for n in result.notes} == {"conv1", "depthwise"}
    encoded = QuantizeWeights(bits=4).apply(graph, Context(graph)).graph
    again = PruneRandom(sparsity=0.5).apply(encoded, Context(encoded))
    assert again.graph.encodings.keys() == encoded.encodings.keys() != set()
    assert any("prune before quantizing" in n.reason for n in again.notes)
    _, tied = prune("tied_lm", sparsity=0.5, targets=("linear",))
    assert [c.weight for c in tied.changes].count("embed.weight") == 1


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(PassError, match="uniform\\+ keeps at least"):
        prune("convnet", sparsity=0.95, ratios="uniform+")
    with pytest.raises(CalibrationError, match="no calibration data"):
        prune("convnet", sparsity=0.5, ratios="owl")


@pytest.mark.parametrize("options", [{}, {"sparsity": 1.0}, {"pattern": "2:4", "sparsity": 0.9}])
def test_inconsistent_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        PruneRandom(**options)  # type: ignore[arg-type]
