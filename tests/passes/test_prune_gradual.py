"""Gradual pruning: the schedule, exact counts, what is left alone, and that it beats pruning at once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.errors import CalibrationError
from compress.passes.prune_gradual import PruneGradual, cubic
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.pipeline import Context, PassResult
from compress.testing import MODELS, make
from compress.training import Trainee


def test_the_cubic_schedule() -> None:
    assert cubic(0.2, 0.9, 0.0) == pytest.approx(0.2)
    assert cubic(0.2, 0.9, 1.0) == pytest.approx(0.9)
    values = [cubic(0.0, 0.8, i / 10) for i in range(11)]
    steps = [b - a for a, b in pairwise(values)]
    assert all(a > b > 0 for a, b in pairwise(steps))
    assert values[5] == pytest.approx(0.8 * 0.875)


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes of points around corners, in 20 correlated dimensions."""
    fixed = torch.Generator().manual_seed(0)
    mix, centres = torch.randn(20, 20, generator=fixed), torch.randn(4, 20, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    return (centres[y] + 0.7 * torch.randn(count, 20, generator=generator)) @ mix / 4, y


@pytest.fixture(scope="module")
def trained() -> compress.Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 4))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x, y = blobs(1000, 1)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return compress.capture(model.eval(), (torch.randn(2, 20),))


def context(graph: compress.Graph, count: int = 400, seed: int = 0) -> Context:
    return Context(graph, load_calibration([blobs(count, 2)], inputs=graph.inputs), seed=seed)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("pruning", "precision"), [(0.5, "float32"), (1.0, "float32"), (0.5, "bfloat16")])
def test_exactly_as_many_as_asked_for_and_zeros_only_grow(
    trained: compress.Graph, scope: str, pruning: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = PruneMagnitude(sparsity=0.3, refit=False).apply(trained, Context(trained)).graph
    counts: list[int] = []
    masks: dict[str, Tensor] = {}
    own = Trainee.prune

    def watched(trainee: Trainee, name: str, mask: Tensor) -> None:
        assert not bool((masks.get(name, mask) & ~mask).any()), "a weight came back"
        masks[name] = mask
        own(trainee, name, mask)
        if name == "3.weight":
            counts.append(sum(int((v == 0).sum()) for n, v in trainee.values().items() if n in masks))

    monkeypatch.setattr(Trainee, "prune", watched)
    options = {"scope": scope, "pruning": pruning, "precision": precision, "stages": 5, "epochs": 4}
    result = PruneGradual(sparsity=0.85, **options).apply(before, context(trained))  # type: ignore[arg-type]
    new = {name: result.graph.weight(name) for name in ("0.weight", "3.weight")}
    if scope == "global":
        assert counts[-1] == sum(int((w == 0).sum()) for w in new.values()) == round(0.85 * (20 + 4) * 48)
    assert len(counts) >= 5
    assert counts == sorted(counts)
    assert counts[0] >= 0.3 * 24 * 48 - 1
    for name, weight in new.items():
        assert bool((weight[before.weight(name) == 0] == 0).all())
        if scope == "layer":
            assert int((weight == 0).sum()) == round(0.85 * weight.numel())


def test_beats_pruning_at_once_with_as_much_training(trained: compress.Graph, tmp_path: Path) -> None:
    test, labels = blobs(2000, 3)

    def loss(graph: compress.Graph) -> float:
        return float(nn.functional.cross_entropy(graph.run([test])[0], labels))

    here = context(trained)
    once = PruneMagnitude(sparsity=0.92, refit=False).apply(trained, here).graph
    assert loss(once) > 2 * loss(trained)
    training = {"epochs": 30, "batch_size": 32, "learning_rate": 3e-3}
    recovered = Recover(**training).apply(once, here).graph  # type: ignore[arg-type]
    gradual = PruneGradual(sparsity=0.92, **training).apply(trained, here).graph  # type: ignore[arg-type]
    assert loss(gradual) < loss(recovered) < loss(once)
    pytest.importorskip("onnxruntime")
    from compress.passes.cleanup import Cleanup

    folded = Cleanup().apply(gradual, here).graph
    compress.export(folded, tmp_path / "gradual.onnx", samples=[(test[:8],)])


def test_same_seed_same_weights_and_running_statistics(trained: compress.Graph) -> None:
    def tensors(seed: int) -> dict[str, Tensor]:
        found: PassResult = PruneGradual(sparsity=0.8, epochs=2).apply(trained, context(trained, seed=seed))
        return found.graph.tensors

    one, other, third = tensors(1), tensors(1), tensors(2)
    assert all(torch.equal(t, other[name]) for name, t in one.items())
    assert not torch.equal(one["0.weight"], third["0.weight"])
    assert not torch.equal(one["1.running_mean"], trained.tensors["1.running_mean"])


def test_encoded_and_ignored_weights_are_left_alone() -> None:
    graph = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    data = load_calibration([MODELS["tied_lm"].inputs(40)], inputs=graph.inputs)
    encoded = QuantizeWeights(bits=4, targets=("linear",)).apply(graph, Context(graph)).graph
    result = PruneGradual(sparsity=0.5, epochs=2, ignore=("head",)).apply(encoded, Context(graph, data))
    assert any("prune before quantizing" in note.reason for note in result.notes)
    assert result.graph.encodings.keys() == encoded.encodings.keys()
    assert result.graph.encodings["embed.weight"] is encoded.encodings["embed.weight"]
    with pytest.raises(CalibrationError, match="prune_gradual has no data"):
        PruneGradual(sparsity=0.5).apply(graph, Context(graph))
