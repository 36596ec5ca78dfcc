"""Magnitude pruning: counts, patterns, scopes, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.errors import PassError
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.pipeline import Context
from compress.testing import MODELS, make


def prune(name: str, **options: object) -> tuple[compress.Graph, compress.PassResult]:
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    return graph, PruneMagnitude(**options).apply(graph, Context(graph))  # type: ignore[arg-type]


def test_global_removes_the_exact_number_and_the_smallest() -> None:
    graph, result = prune("convnet", sparsity=0.6)
    names = {s.weight for s in graph.sites()}
    old = torch.cat([graph.weight(n).flatten().abs() for n in sorted(names)])
    new = torch.cat([result.graph.weight(n).flatten().abs() for n in sorted(names)])
    assert int((new == 0).sum()) == round(0.6 * old.numel())
    assert old[new == 0].max() <= new[new > 0].min()


def test_layer_scope_removes_the_same_share_everywhere() -> None:
    graph, result = prune("convnet", sparsity=0.5, scope="layer")
    for change in result.changes:
        assert change.sparsity == pytest.approx(0.5, abs=0.5 / graph.weight(change.weight).numel())


def test_two_of_four_along_the_input_channels() -> None:
    graph, result = prune("convnet", pattern="2:4")
    changed = {c.weight for c in result.changes}
    assert changed == {"grouped.weight", "fc1.weight", "fc2.weight"}
    for name in changed:
        weight = result.graph.weight(name).movedim(1, -1)
        kept = (weight != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept == 2).all()
    # 3 input channels and depthwise layers have no groups of four
    declined = {n.site: n.reason for n in result.notes}
    assert set(declined) == {"conv1", "depthwise"}
    assert torch.equal(result.graph.weight("conv1.weight"), graph.weight("conv1.weight"))


def test_targets_and_ignore() -> None:
    _, result = prune("convnet", sparsity=0.5, targets=("linear", "re:conv.*"), ignore=("fc2",))
    assert {c.site for c in result.changes} == {"conv1", "fc1"}


def test_a_tied_weight_is_pruned_once_and_stays_tied() -> None:
    graph, result = prune("tied_lm", sparsity=0.5, targets=("linear",), scope="layer")
    assert [c.weight for c in result.changes].count("embed.weight") == 1
    assert [s.weight for s in result.graph.sites()] == [s.weight for s in graph.sites()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("layer9",), "sparsity": 0.5}, "matches no layer"),
        ({"ignore": ("fc3",), "sparsity": 0.5}, "fc"),
    ],
)
def test_patterns_that_match_nothing_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message):
        prune("convnet", **options)


@pytest.mark.parametrize("options", [{}, {"sparsity": 1.5}, {"pattern": "2:4", "sparsity": 0.9}])
def test_inconsistent_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        PruneMagnitude(**options)  # type: ignore[arg-type]


def test_refit_keeps_the_mask_and_lowers_the_output_error() -> None:
    module, batches = make("encoder"), [MODELS["encoder"].inputs(8)]
    outputs = []
    with torch.no_grad():
        wanted = module(*batches[0])["hidden"]
    for refit in (False, True):
        prune = PruneMagnitude(pattern="2:4", refit=refit)
        result = compress.run(module, [prune], inputs=MODELS["encoder"].specs, calibration=batches)
        for change in result.report.passes[0].changes:
            kept = (result.graph.weight(change.weight) != 0).unflatten(-1, (-1, 4)).sum(-1)
            assert (kept <= 2).all()
        outputs.append(float((result.graph.run(batches[0])[0] - wanted).norm()))
    assert outputs[1] < 0.9 * outputs[0]


def test_encoded_weights_keep_their_encoding() -> None:
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    encoded = QuantizeWeights(bits=4).apply(graph, Context(graph)).graph
    result = PruneMagnitude(sparsity=0.5).apply(encoded, Context(encoded))
    assert result.graph.encodings.keys() == encoded.encodings.keys() != set()
    assert not {c.weight for c in result.changes} & encoded.encodings.keys()
    assert all("prune before quantizing" in n.reason for n in result.notes)
