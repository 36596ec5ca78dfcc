"""Decomposition of whole graphs: budgets, what is declined, good choices, and that other passes go on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.chain import Chain
from compress.data import load_calibration
from compress.layers import alone, operations
from compress.passes.decompose import Decompose
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.pipeline import Context, PassResult
from compress.testing import MODELS, assert_close, make


class Net(nn.Module):
    """Convolutions and linear layers whose weights are of low rank but for a little noise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 24, 3, padding=1)
        self.b = nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False)
        self.c = nn.Linear(24, 64)
        self.d = nn.Linear(64, 48)
        self.head = nn.Linear(48, 10)
        for layer, rank in ((self.a, 4), (self.b, 6), (self.c, 5), (self.d, 9)):
            w = layer.weight.data.flatten(1)
            low = torch.randn(len(w), rank) @ torch.randn(rank, w.shape[1])
            layer.weight.data = (low / w.shape[1] + 0.02 * torch.randn_like(low) / 8).view_as(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu().mean((2, 3))
        out: Tensor = self.head(self.d(self.c(200 * x).relu()).relu())
        return out


@functools.cache
def net() -> tuple[compress.Graph, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, data = Net().eval(), [torch.randn(24, 8, 6, 6) for _ in range(2)]
    return compress.capture(module, (data[0][:2],)), data


def decomposed(calibrated: bool = True, **options: Any) -> tuple[compress.Graph, PassResult]:
    graph, data = net()
    context = Context(graph, load_calibration(data, inputs=graph.inputs) if calibrated else None)
    return graph, Decompose(**{"rank_multiple": 1, **options}).apply(graph, context)


def weights(graph: compress.Graph) -> int:
    """Parameters of all layers, biases left out."""
    return sum(graph.tensors[w].numel() for w in {s.weight for s in graph.sites()})


def work(graph: compress.Graph) -> int:
    x = torch.randn(1, 8, 6, 6)
    return sum(operations(g, [v]) for _, g, v in alone(graph, [x], {s.weight for s in graph.sites()}))


def far(one: compress.Graph, other: compress.Graph) -> float:
    """Relative squared error of the outputs on inputs that no pass has seen."""
    x = torch.randn(64, 8, 6, 6, generator=torch.Generator().manual_seed(5))
    (a,), (b,) = one.run([x]), other.run([x])
    return float((a - b).square().sum() / a.square().sum())


@pytest.mark.parametrize("method", ["auto", "svd", "alds", "tucker", "mpo", "kronecker"])
def test_the_budget_holds(method: str) -> None:
    kinds = {"mpo": "linear", "kronecker": "linear", "tucker": "conv"}
    targets = (kinds[method],) if method in kinds else ("linear", "conv")
    chosen = {"linear": "cd", "conv": "ab"}.get("".join(targets), "abcd")
    graph, result = decomposed(
        method=method,
        parameter_reduction=0.4,
        targets=targets,
        ignore=() if targets == ("conv",) else ("head",),
    )
    before = sum(graph.tensors[f"{n}.weight"].numel() for n in chosen)
    assert weights(graph) - weights(result.graph) >= 0.4 * before - (112 if targets == ("linear",) else 0)
    assert work(result.graph) <= work(graph)
    assert {c.site for c in result.changes} <= set(chosen)
    assert all(method == "auto" or c.action.startswith(method) for c in result.changes)
    for change in result.changes:
        stored = [
            t for n, t in result.graph.tensors.items() if n.startswith(f"{change.site}.") and "bias" not in n
        ]
        assert change.bytes_after == sum(t.numel() * t.element_size() for t in stored)
        assert change.weight not in result.graph.tensors
    loose = {"mpo": 0.8, "kronecker": 1.2}
    assert far(graph, result.graph) < loose.get(method, 0.05)


def test_what_is_of_low_rank_is_found() -> None:
    """Half of all parameters go, and next to nothing is lost: the ranks are chosen for it."""
    graph, result = decomposed(parameter_reduction=0.6)
    assert far(graph, result.graph) < 0.01
    _, uniform = decomposed(parameter_reduction=0.6, allocation="uniform", method="svd")
    assert far(graph, result.graph) < far(graph, uniform.graph)
    note = next(n.reason for n in result.notes if "removed" in n.reason)
    assert note.startswith(f"{weights(result.graph):,} parameters of {weights(graph):,}")


@pytest.mark.parametrize("allocation", ["minimax", "uniform"])
def test_other_allocations(allocation: str) -> None:
    graph, result = decomposed(method="alds", allocation=allocation, parameter_reduction=0.5)
    assert weights(result.graph) <= 0.5 * weights(graph)
    assert far(graph, result.graph) < 0.3


@pytest.mark.parametrize("method", ["tt", "cp"])
def test_a_factor_for_each_axis(method: str) -> None:
    options: dict[str, Any] = {"method": method, "allocation": "uniform", "targets": ("a",)}
    graph, result = decomposed(parameter_reduction=0.5, **options)
    assert len([s for s in result.graph.sites() if s.name.startswith("a.")]) == 4
    assert weights(graph) - weights(result.graph) >= 0.5 * graph.tensors["a.weight"].numel()
    assert far(graph, result.graph) < 0.1


def test_operations_as_a_budget() -> None:
    graph, result = decomposed(flop_reduction=0.5)
    assert work(result.graph) <= 0.5 * work(graph)
    assert far(graph, result.graph) < 0.05
    both, result = decomposed(flop_reduction=0.4, parameter_reduction=0.5)
    assert work(result.graph) <= 0.6 * work(both) and weights(result.graph) <= 0.5 * weights(both)


def test_the_size_of_the_model() -> None:
    graph, _ = net()
    limit = graph.nbytes // 2
    _, result = decomposed(max_size=limit, bias_correction=False)
    assert result.graph.nbytes <= limit


def pretended(
    graph: compress.Graph, inputs: Any, options: dict[str, list[Chain | None]]
) -> dict[str, list[float]]:
    """Decomposed layers take half the time, that of ``d`` twice."""
    assert len(inputs[0]) == 1
    return {
        name: [1.0 if chain is None else 2.0 if name == "d.weight" else 0.5 for chain in row]
        for name, row in options.items()
    }


def test_milliseconds_as_a_budget() -> None:
    graph, data = net()
    context = Context(graph, load_calibration(data, inputs=graph.inputs), latency=pretended)
    result = Decompose(max_latency="0.75x", rank_multiple=1).apply(graph, context)
    assert any("3.500 ms of a budget of 3.750" in n.reason for n in result.notes)
    assert any(n.site == "d" and "no form is faster" in n.reason for n in result.notes)
    assert "d" not in {c.site for c in result.changes}
    with pytest.raises(compress.CompressError, match="no runtime to measure in"):
        Decompose(max_latency=1.0).apply(graph, Context(graph))


def test_data_helps_and_is_not_needed() -> None:
    graph, blind = decomposed(calibrated=False, parameter_reduction=0.55, method="svd")
    _, result = decomposed(parameter_reduction=0.55, method="svd")
    assert far(graph, result.graph) < 0.5 * far(graph, blind.graph)
    assert any("relative error of each weight" in n.reason for n in blind.notes)


def test_the_mean_of_the_output_stays() -> None:
    """The bias takes what is left of it; a convolution without one gets one."""
    graph, data = net()
    for on in (True, False):
        step = Decompose(
            method="svd", parameter_reduction=0.8, targets=("b",), rank_multiple=1, bias_correction=on
        )
        result = step.apply(graph, Context(graph, load_calibration(data, inputs=graph.inputs)))
        site = next(s for s in result.graph.sites() if s.name == "b.1")
        assert (result.graph.bias(site) is not None) == on
        x = torch.cat(data)
        means = []
        for g in (graph, result.graph):
            names = {"b", "b.1"} & {s.name for s in g.sites()}
            node = next(s.node for s in g.sites() if s.name in names and s.name == max(names))
            seen: dict[str, Tensor] = {}
            g.run([x], lambda n, v, seen=seen: seen.setdefault(n.name, v))  # type: ignore[misc]
            means.append(seen[node].mean((0, 2, 3)))
        assert bool((means[0] - means[1]).abs().max() < 1e-4) == on


def test_everything_declined_has_its_reason() -> None:
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    context = Context(graph, load_calibration([MODELS["convnet"].inputs(8)], inputs=graph.inputs))
    result = Decompose(parameter_reduction=0.1, rank_multiple=1).apply(graph, context)
    reasons = {n.site: n.reason for n in result.notes if n.site}
    done = {c.site for c in result.changes}
    assert done | set(reasons) == {s.name for s in graph.sites()} and done.isdisjoint(reasons)
    assert "16 groups" in reasons["depthwise"] and "2 groups" in reasons["grouped"]

    tied = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    step = Decompose(parameter_reduction=0.5, targets=("linear", "embedding"))
    result = step.apply(tied, Context(tied))
    reasons = {n.site: n.reason for n in result.notes if n.site}
    assert "shared" in reasons["head"] and "looked up" in reasons["embed"]


def test_encoded_and_pruned_weights_are_left() -> None:
    graph, _ = net()
    context = Context(graph)
    coded = QuantizeWeights(bits=8, targets=("c",)).apply(graph, context).graph
    coded = PruneMagnitude(sparsity=0.5, targets=("d",)).apply(coded, context).graph
    result = Decompose(parameter_reduction=0.5, rank_multiple=1).apply(coded, context)
    reasons = {n.site: n.reason for n in result.notes if n.site}
    assert "decompose before quantizing" in reasons["c"] and "pruned" in reasons["d"]
    assert result.graph.encodings.keys() == coded.encodings.keys()


def test_what_is_of_full_rank_stays_where_there_is_room() -> None:
    """A budget that asks for little leaves the layers whole that lose most."""
    _, result = decomposed(parameter_reduction=0.05)
    assert len(result.changes) == 1
    assert any("stays dense" in n.reason for n in result.notes)


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(compress.CompressError, match="smallest forms take") as caught:
        decomposed(parameter_reduction=0.99, rank_multiple=4)
    assert "rank_multiple" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "a budget is needed"),
        ({"parameter_reduction": 0.5, "max_size": 10}, "give one of them"),
        ({"flop_reduction": 0.5, "max_latency": 1.0}, "give one of them"),
        ({"flop_reduction": 0.5, "allocation": "minimax"}, "knows sizes only"),
        ({"parameter_reduction": 0.5, "flop_reduction": 0.5, "allocation": "uniform"}, "knows sizes only"),
        ({"max_latency": "soon"}, "no latency"),
        ({"parameter_reduction": 0.5, "method": "cp", "allocation": "minimax"}, "no error bound"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Decompose(**options)


def test_same_bytes_again() -> None:
    (_, first), (_, second) = (decomposed(parameter_reduction=0.5) for _ in range(2))
    assert first.graph.tensors.keys() == second.graph.tensors.keys()
    assert all(torch.equal(t, second.graph.tensors[n]) for n, t in first.graph.tensors.items())


def test_training_and_integers_go_on_from_there(tmp_path: Any) -> None:
    """recover makes up for some of the loss, factors are quantized like any layer, and the file is proven."""
    pytest.importorskip("onnxruntime")
    graph, data = net()
    _, blind = decomposed(calibrated=False, parameter_reduction=0.75, method="svd")
    context = Context(graph, load_calibration(data, inputs=graph.inputs))
    healed = Recover(epochs=10, batch_size=8, loss="mse").apply(blind.graph, context)
    told = next(n.reason for n in healed.notes if "held-out loss" in n.reason).split()
    assert float(told[4]) < 0.7 * float(told[2]), told
    result = compress.run(healed.graph, [QuantizeWeights(bits=8, group_size=16)], calibration=data)
    assert any(name.endswith(".0.weight") for name in result.graph.encodings)
    artifact = compress.export(result.graph, tmp_path / "low.onnx", samples=result.samples)
    assert artifact.path.exists()


def test_matrix_products_in_a_file(tmp_path: Any) -> None:
    """Batches and sequences of any length go through the reshapes of a chain of cores; half precision too."""
    pytest.importorskip("onnxruntime")
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    step = Decompose(method="mpo", parameter_reduction=0.6, rank_multiple=1, targets=("up", "down"))
    result = compress.run(graph, [step], calibration=[MODELS["encoder"].inputs(8)])
    assert len(result.report.passes[0].changes) == 2
    assert compress.export(result.graph, tmp_path / "mpo.onnx", samples=result.samples).path.exists()
    half = compress.capture(make("encoder").half(), MODELS["encoder"].inputs(2))
    after = step.apply(half, Context(half)).graph
    for want, have in zip(
        half.run(MODELS["encoder"].inputs(2)), after.run(MODELS["encoder"].inputs(2)), strict=True
    ):
        assert_close(want, have, db=0)
