"""CHITA as a pass: counts, scopes, stages, what it leaves alone, and that it beats magnitudes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.errors import CalibrationError, PassError
from compress.passes.prune_chita import PruneChita, _Data
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.pipeline import Context, PassResult
from compress.testing import MODELS, make


def prune(
    name: str, count: int = 40, labelled: bool = True, **options: object
) -> tuple[compress.Graph, PassResult]:
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    generator = torch.Generator().manual_seed(1)
    if name == "convnet":
        x = torch.randn(count, 3, 12, 12, generator=generator)
        y = torch.randint(0, 10, (count,), generator=generator)
    else:
        x = torch.randint(0, 90, (count, 9), generator=generator)
        y = torch.randint(0, 90, (count, 9), generator=generator)
    items = [(x, y) if labelled else (x,)]
    context = Context(graph, load_calibration(items, inputs=graph.inputs), seed=3)
    return graph, PruneChita(**options).apply(graph, context)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stages": 3, "samples": 20},
        {"mini_batch": 4, "first_order": True},
        {"method": "obs"},
        {"method": "obd", "stages": 4, "first_order": True},
        {"method": "magnitude"},
        {"method": "thresholding", "temperature": None},
    ],
)
def test_global_removes_the_exact_number(options: dict[str, object]) -> None:
    graph, result = prune("convnet", sparsity=0.6, **options)
    names = {s.weight for s in graph.sites()}
    new = torch.cat([result.graph.weight(n).flatten() for n in sorted(names)])
    assert int((new == 0).sum()) == round(0.6 * new.numel())
    assert {c.weight for c in result.changes} == names
    assert all(bool(torch.isfinite(result.graph.weight(n)).all()) for n in names)


def test_layer_scope_targets_and_ridge() -> None:
    graph, result = prune("convnet", sparsity=0.5, scope="layer", targets=("linear", "grouped"), ridge=0.5)
    assert {c.site for c in result.changes} == {"fc1", "fc2", "grouped"}
    for change in result.changes:
        assert change.sparsity == pytest.approx(0.5, abs=0.5 / graph.weight(change.weight).numel())


def test_same_seed_same_weights() -> None:
    options: dict[str, object] = {"sparsity": 0.7, "labelled": False, "temperature": None}
    one, other = (prune("convnet", **options)[1] for _ in range(2))  # type: ignore[arg-type]
    for change in one.changes:
        assert torch.equal(one.graph.weight(change.weight), other.graph.weight(change.weight))
    assert any("sampled from the model" in note.reason for note in one.notes)


def test_labels_do_not_matter_to_predictions() -> None:
    """Gradients of the model's own predictions, and no held-out samples to judge by."""
    with_labels, without = (
        prune("convnet", sparsity=0.7, labelled=labelled, method="obs")[1] for labelled in (True, False)
    )
    for change in with_labels.changes:
        assert torch.equal(with_labels.graph.weight(change.weight), without.graph.weight(change.weight))
    assert not without.notes


def test_a_mini_batch_of_more_samples_than_there_are_is_one_of_all() -> None:
    data = _Data(
        (torch.arange(60.0).unsqueeze(1),), None, compress.capture(make("products"), inputs=["1,24"])
    )
    fitting, held_out = data.split()
    assert [len(part) for part in (fitting, held_out)] == [48, 12]
    assert [len(fitting.multiple_of(size)) for size in (50, 20)] == [48, 40]
    rows = fitting.inputs[0].flatten()
    assert torch.equal(fitting.part(2, 20).inputs[0].flatten(), torch.cat((rows[40:], rows[:12])))


def test_gradients_that_do_not_fit_are_refused() -> None:
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    x = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    data = load_calibration([(x,)], inputs=graph.inputs)
    step = PruneChita(sparsity=0.5, method="obs")
    with pytest.raises(PassError, match=r"gradients of 40 samples take 0\.5 MB") as e:
        step.apply(graph, Context(graph, data, max_memory=1 << 18))
    (fitting,) = (int(n) for n in re.findall(r": (\d+) samples", str(e.value)))
    assert 0 < fitting < 40
    for samples, fits in ((fitting, True), (fitting + 1, False)):
        limited = step.model_copy(update={"samples": samples})
        if fits:
            limited.apply(graph, Context(graph, data, max_memory=1 << 18))
        else:
            with pytest.raises(PassError, match="max_memory"):
                limited.apply(graph, Context(graph, data, max_memory=1 << 18))


def test_first_order_takes_labels() -> None:
    with pytest.raises(CalibrationError, match="first_order trains the model on the labels"):
        prune("convnet", sparsity=0.7, labelled=False, first_order=True)


def test_tied_and_encoded_weights_are_left_alone() -> None:
    graph, result = prune("tied_lm", sparsity=0.5)
    assert {c.weight for c in result.changes} == {"mlp.weight"}
    assert any("embedding" in note.reason for note in result.notes)
    data = load_calibration([MODELS["tied_lm"].inputs(8)], inputs=graph.inputs)
    encoded = QuantizeWeights(bits=4).apply(graph, Context(graph)).graph
    again = PruneChita(sparsity=0.5).apply(encoded, Context(encoded, data))
    assert again.graph.encodings.keys() == encoded.encodings.keys()
    assert any("prune before quantizing" in note.reason for note in again.notes)


def test_without_data_or_logits() -> None:
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    with pytest.raises(CalibrationError, match="no calibration data to take gradients on"):
        PruneChita(sparsity=0.5).apply(graph, Context(graph))
    other = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    data = load_calibration([MODELS["encoder"].inputs(8)], inputs=other.inputs)
    with pytest.raises(PassError, match="no logits"):
        PruneChita(sparsity=0.5).apply(other, Context(other, data))


def test_a_fixed_batch_is_declined() -> None:
    graph = compress.capture(make("convnet"), inputs=["!2,3,12,12"])
    data = load_calibration([MODELS["convnet"].inputs(2)], inputs=graph.inputs)
    with pytest.raises(PassError, match="fixes the size of its batches"):
        PruneChita(sparsity=0.5).apply(graph, Context(graph, data))


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes of points around corners, in 20 correlated dimensions."""
    fixed = torch.Generator().manual_seed(0)
    mix, centres = torch.randn(20, 20, generator=fixed), torch.randn(4, 20, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    return (centres[y] + 0.7 * torch.randn(count, 20, generator=generator)) @ mix / 4, y


def trained() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x, y = blobs(1000, 1)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"stages": 4}, {"mini_batch": 4}, {"temperature": None}])
def test_beats_magnitudes(options: dict[str, object], tmp_path: Path) -> None:
    graph = compress.capture(trained(), (torch.randn(2, 20),))
    data = load_calibration([blobs(400, 2)], inputs=graph.inputs)
    test, labels = blobs(2000, 3)

    def loss(pruned: compress.Graph) -> float:
        return float(nn.functional.cross_entropy(pruned.run([test])[0], labels))

    magnitude = PruneMagnitude(sparsity=0.8, refit=False).apply(graph, Context(graph)).graph
    result = PruneChita(sparsity=0.8, **options).apply(graph, Context(graph, data)).graph  # type: ignore[arg-type]
    assert loss(result) < 0.5 * loss(magnitude)
    pytest.importorskip("onnxruntime")
    compress.export(result, tmp_path / "pruned.onnx")


# -- objective: layer ------------------------------------------------------------------------------


def layer_wise(name: str, count: int = 40, **options: object) -> tuple[compress.Graph, PassResult]:
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    inputs = MODELS[name].inputs(count)
    data = load_calibration([inputs], inputs=graph.inputs)
    chita = PruneChita(objective="layer", **options)  # type: ignore[arg-type]
    return graph, chita.apply(graph, Context(graph, data))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_layer_wise_removes_the_exact_number(scope: str) -> None:
    graph, result = layer_wise("convnet", sparsity=0.6, scope=scope)
    names = {s.weight for s in graph.sites()}
    assert {c.weight for c in result.changes} == names
    zeros = {n: int((result.graph.weight(n) == 0).sum()) for n in names}
    if scope == "layer":
        assert all(abs(zeros[n] - 0.6 * graph.weight(n).numel()) <= 1 for n in names)
    assert sum(zeros.values()) == round(0.6 * sum(graph.weight(n).numel() for n in names))
    if scope == "global":
        magnitude = PruneMagnitude(sparsity=0.6, refit=False).apply(graph, Context(graph)).graph
        assert zeros == {n: int((magnitude.weight(n) == 0).sum()) for n in names}


def test_layer_wise_two_of_four_along_the_input_channels(tmp_path: Path) -> None:
    graph, result = layer_wise("convnet", pattern="2:4")
    changed = {c.weight for c in result.changes}
    assert changed == {"grouped.weight", "fc1.weight", "fc2.weight"}
    for name in changed:
        kept = (result.graph.weight(name).movedim(1, -1) != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert (kept <= 2).all()
    assert {n.site for n in result.notes} == {"conv1", "depthwise"}
    assert torch.equal(result.graph.weight("conv1.weight"), graph.weight("conv1.weight"))
    pytest.importorskip("onnxruntime")
    compress.export(result.graph, tmp_path / "pruned.onnx")


@pytest.mark.parametrize("name", ["encoder", "tied_lm", "products"])
def test_layer_wise_takes_any_model(name: str) -> None:
    """No logits, no labels; what cannot be pruned is left alone."""
    graph, result = layer_wise(name, sparsity=0.5, scope="layer")
    again = layer_wise(name, sparsity=0.5, scope="layer")[1]
    for change in result.changes:
        assert change.sparsity == pytest.approx(0.5, abs=0.51 / graph.weight(change.weight).numel())
        assert torch.equal(result.graph.weight(change.weight), again.graph.weight(change.weight))
    assert name != "tied_lm" or any("embedding" in note.reason for note in result.notes)


@pytest.mark.parametrize("options", [{"sparsity": 0.8}, {"pattern": "1:4"}])
def test_layer_wise_beats_magnitudes_with_refit(options: dict[str, object]) -> None:
    graph = compress.capture(trained(), (torch.randn(2, 20),))
    data = load_calibration([(blobs(400, 2)[0],)], inputs=graph.inputs)
    context, test = Context(graph, data), blobs(2000, 3)[0]
    wanted = graph.run([test])[0]

    def error(pruned: compress.Graph) -> float:
        return float((pruned.run([test])[0] - wanted).square().mean())

    magnitude = PruneMagnitude(scope="layer", **options).apply(graph, context).graph  # type: ignore[arg-type]
    chita = PruneChita(objective="layer", scope="layer", **options)  # type: ignore[arg-type]
    assert error(chita.apply(graph, context).graph) < 0.9 * error(magnitude)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity is required"),
        ({"pattern": "2:4"}, "takes objective: layer"),
        ({"pattern": "2:4", "objective": "layer", "sparsity": 0.3}, "leave sparsity out"),
        ({"sparsity": 0.5, "objective": "layer", "stages": 2, "mini_batch": 4}, "stages, mini_batch"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneChita(**options)  # type: ignore[arg-type]


def test_layer_wise_without_data() -> None:
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    with pytest.raises(CalibrationError, match="inputs of layers"):
        PruneChita(objective="layer", sparsity=0.5).apply(graph, Context(graph))
