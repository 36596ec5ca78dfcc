"""Magnitude pruning: counts, patterns, scopes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.data import load_calibration
from compress.errors import CalibrationError, PassError
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 1.5},
        {"pattern": "2:4", "sparsity": 0.9},
        {"pattern": "block:1x4"},
        {"pattern": "2:4", "ratios": "erk"},
        {"pattern": "block:1x4", "sparsity": 0.5, "score": "sparsegpt"},
    ],
)
def test_inconsistent_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"sparsity|leave ratios out|score blocks"):
        PruneMagnitude(**options)  # type: ignore[arg-type]


def run(name: str, **options: object) -> tuple[compress.Graph, compress.PassResult]:
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    data = load_calibration([MODELS[name].inputs(16)], inputs=graph.inputs)
    return graph, PruneMagnitude(**options).apply(graph, Context(graph, data))  # type: ignore[arg-type]


SCORES = ("magnitude", "wanda", "obs", "sparsegpt", "alps")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("ratios", [None, "erk", "owl"])
def test_every_score_removes_the_exact_number(score: str, ratios: str | None) -> None:
    graph, result = run("convnet", sparsity=0.6, score=score, ratios=ratios, refit=False)
    names = {s.weight for s in graph.sites()}
    new = torch.cat([result.graph.weight(n).flatten() for n in names])
    assert int((new == 0).sum()) == round(0.6 * new.numel())
    assert {c.weight for c in result.changes} == names
    assert all(score == "magnitude" or c.action.endswith(score) for c in result.changes)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("refit", [True, False])
def test_two_of_four_by_every_score(score: str, refit: bool) -> None:
    _, result = run("convnet", pattern="2:4", score=score, refit=refit)
    assert {c.weight for c in result.changes} == {"grouped.weight", "fc1.weight", "fc2.weight"}
    for change in result.changes:
        kept = (result.graph.weight(change.weight).movedim(1, -1) != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept <= 2).all()
        assert change.sparsity == pytest.approx(0.5, abs=0.01)


def test_blocks_over_the_whole_model() -> None:
    graph, result = prune("convnet", sparsity=0.5, pattern="block:4x2")
    changed = {c.weight for c in result.changes}
    assert changed == {"grouped.weight", "fc1.weight", "fc2.weight"} - {
        n for n in ("fc2.weight",) if graph.shape(n)[0] % 4
    }
    blocks = zeros = 0
    for name in changed:
        matrix = result.graph.weight(name).movedim(1, -1).flatten(1) == 0
        found = matrix.unflatten(1, (-1, 2)).unflatten(0, (-1, 4)).movedim(2, 1).flatten(2).sum(-1)
        assert set(found.unique().tolist()) <= {0, 8}
        blocks, zeros = blocks + found.numel(), zeros + int((found == 8).sum())
    assert zeros == round(0.5 * blocks)
    assert any("no multiple of 4x2" in n.reason for n in result.notes)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:1x4"])
def test_what_data_says_beats_magnitude(pattern: str) -> None:
    module, batches = make("encoder"), [MODELS["encoder"].inputs(32)]
    with torch.no_grad():
        wanted = module(*batches[0])["hidden"]
    errors = {}
    for score in ("magnitude", "obs"):
        step = PruneMagnitude(
            pattern=pattern, sparsity=None if pattern == "2:4" else 0.6, scope="layer", score=score
        )  # type: ignore[arg-type]
        result = compress.run(module, [step], inputs=MODELS["encoder"].specs, calibration=batches)
        errors[score] = float((result.graph.run(batches[0])[0] - wanted).norm())
    assert errors["obs"] < errors["magnitude"]


def test_data_is_asked_for_where_it_is_needed() -> None:
    for options in ({"score": "obs", "pattern": "2:4"}, {"ratios": "owl", "sparsity": 0.5}):
        with pytest.raises(CalibrationError, match="no calibration data"):
            prune("convnet", **options)


def test_best_is_what_the_data_allows() -> None:
    for pattern in ("2:4", "block:1x4"):
        options = {"pattern": pattern, "score": "best", "sparsity": None if pattern == "2:4" else 0.5}
        _, result = run("convnet", **options)
        assert all(c.action == f"{pattern} alps" for c in result.changes)
        _, result = prune("convnet", **options)
        assert all(c.action == pattern for c in result.changes)
        assert any("ranked by magnitude" in n.reason for n in result.notes)


def test_recipe_int4_sparse_holds_two_of_four_in_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    module, batches = make("encoder"), [MODELS["encoder"].inputs(32)]
    result = compress.run(module, "int4-sparse", inputs=MODELS["encoder"].specs, calibration=batches)
    pruned = {c.weight: c for p in result.report.passes if p.name == "prune_magnitude" for c in p.changes}
    assert pruned
    assert all(c.action == "2:4 alps" and c.sparsity == 0.5 for c in pruned.values())
    compress.export(result.graph, tmp_path / "sparse.onnx")
    stored = {t.name: t for t in onnx.load(tmp_path / "sparse.onnx").graph.initializer}
    found = 0
    for name in pruned:
        weight = result.graph.weight(name)
        assert ((weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
        if f"{name}.codes" in stored and f"{name}.zero_points" in stored:
            # [rows, groups, columns of a group] and a zero point for each group
            codes, zeros = (
                torch.from_numpy(onnx.numpy_helper.to_array(stored[f"{name}.{part}"]).astype("int16"))
                for part in ("codes", "zero_points")
            )
            assert torch.equal((codes == zeros).flatten(1)[:, : weight.shape[1]], weight == 0)
            found += 1
    assert found, sorted(stored)


def test_embeddings_are_ranked_by_magnitude() -> None:
    _, result = run("tied_lm", sparsity=0.5, score="wanda", targets=("embedding", "linear"))
    assert any("ranked by magnitude" in n.reason for n in result.notes)


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
