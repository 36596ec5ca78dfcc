"""Decomposition of whole graphs: budgets, what is declined, good choices, and that other passes go on."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

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
    # all that is stored counts: factors, scales of inputs, and a bias that the layer had not
    assert graph.parameters - result.graph.parameters >= 0.4 * before
    assert work(result.graph) <= work(graph)
    assert {c.site for c in result.changes} <= set(chosen)
    assert all(method == "auto" or c.action.startswith(method) for c in result.changes)
    for change in result.changes:
        stored = [
            t for n, t in result.graph.tensors.items() if n.startswith(f"{change.site}.") and "bias" not in n
        ]
        assert change.bytes_after == sum(t.numel() * t.element_size() for t in stored)
        assert change.weight not in result.graph.tensors
    if method not in ("mpo", "kronecker"):  # which find nothing in these weights
        assert far(graph, result.graph) < 0.05


class Products(nn.Module):
    """Two layers on the same input whose weights are sums of Kronecker products, and 3 % of noise."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(32, 64)
        for layer, f in ((self.a, 4), (self.b, 2)):
            o, i = layer.weight.shape
            w = sum(torch.kron(torch.randn(o // f, f), torch.randn(f, i // f)) for _ in range(terms))
            assert isinstance(w, Tensor)
            layer.weight.data = (w / w.std() + 0.03 * torch.randn_like(w)) / 8

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x).relu(), self.b(x)), 1)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(("terms", "method"), [(1, "kronecker"), (1, "mpo"), (3, "mpo")])
def test_products_are_found(terms: int, method: str, calibrated: bool) -> None:
    """Sites and bond are those the weight was made of, so that the noise alone is lost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, unseen = Products(terms).eval(), torch.randn(400, 32), torch.randn(200, 32)
    graph = compress.capture(model, (x[:2],))
    context = Context(graph, load_calibration([x], inputs=graph.inputs) if calibrated else None)
    lost = {}
    for name in (method, "svd"):
        options: dict[str, Any] = {"method": name, "parameter_reduction": 0.8}
        result = Decompose(**options, rank_multiple=1).apply(graph, context)
        assert graph.parameters - result.graph.parameters >= 0.8 * 32 * (48 + 64)
        (a,), (b,) = graph.run([unseen]), result.graph.run([unseen])
        lost[name] = float((a - b).square().sum() / a.square().sum())
        if name == method:
            assert [c.action.partition(" of ")[2] for c in result.changes] == ["12x4, 4x8", "32x2, 2x16"]
    assert lost[method] < 2 * 0.03**2
    assert lost["svd"] > 50 * lost[method]


def test_what_is_of_low_rank_is_found() -> None:
    """Half of all parameters go, and next to nothing is lost: the ranks are chosen for it."""
    graph, result = decomposed(parameter_reduction=0.6)
    assert far(graph, result.graph) < 0.01
    _, uniform = decomposed(parameter_reduction=0.6, allocation="uniform", method="svd")
    assert far(graph, result.graph) < far(graph, uniform.graph)
    note = next(n.reason for n in result.notes if "removed" in n.reason)
    # one convolution has no bias, and gets one
    assert note.startswith(f"{weights(result.graph) + 24:,} parameters of {weights(graph):,}")


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
    """To the byte, with the bias that a layer gets where there is data to correct it by."""
    graph, _ = net()
    for limit in (graph.nbytes // 2, 7 * graph.nbytes // 10):
        _, result = decomposed(max_size=limit)
        assert limit - 1000 < result.graph.nbytes <= limit
    rest, rank = graph.nbytes - 4 * 24 * 216, 4 * (24 + 216)
    for calibrated, missing, found in (
        (False, 0, 9),
        (False, 1, 8),
        (True, 1, 8),
        (True, -96, 9),
        (True, -95, 8),
    ):
        limit = rest + 9 * rank - missing
        one: dict[str, Any] = {"targets": ("b",), "method": "svd", "allocation": "uniform"}
        _, result = decomposed(calibrated, max_size=limit, **one)
        assert result.graph.nbytes <= limit
        assert [c.action for c in result.changes] == [f"svd {found}"]


def test_the_size_of_a_model_of_several_types() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 48).double(), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x.double()).float())
            return out

    graph = compress.capture(Mixed().eval(), (torch.randn(2, 32),))
    for limit in (6000, 12_000):
        step = Decompose(max_size=limit, method="svd", rank_multiple=1)
        assert limit - 1000 < step.apply(graph, Context(graph)).graph.nbytes <= limit


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

            def keep(node: fx.Node, value: Any, seen: dict[str, Tensor] = seen) -> Any:
                seen[node.name] = value
                return value

            g.run([x], keep)
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
        ({"parameter_reduction": 0.5, "storage": True}, "about matrix products"),
        ({"flop_reduction": 0.5, "method": "mpo", "storage": True}, "as fast as dense"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Decompose(**options)


def test_same_bytes_again() -> None:
    (_, first), (_, second) = (decomposed(parameter_reduction=0.5) for _ in range(2))
    assert first.graph.tensors.keys() == second.graph.tensors.keys()
    assert all(torch.equal(t, second.graph.tensors[n]) for n, t in first.graph.tensors.items())


def test_drafts_on_disk(tmp_path: Any, monkeypatch: Any) -> None:
    """Past the memory given, drafts of layers are in files that are gone by the end; nothing else differs."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    graph, data = net()
    calibration = load_calibration(data, inputs=graph.inputs)
    mapped = []

    def chosen(self: Chain) -> Chain:
        mapped.append(on_disk(self))
        assert all(f.untyped_storage().filename for f in mapped[-1].factors)
        return mapped[-1]

    on_disk = Chain.on_disk
    monkeypatch.setattr(Chain, "on_disk", chosen)
    few, many = (
        Decompose(parameter_reduction=0.5, rank_multiple=1).apply(
            graph, Context(graph, calibration, max_memory=m)
        )
        for m in (20_000, 2 << 30)
    )
    assert mapped and few.changes == many.changes and few.notes == many.notes
    assert all(torch.equal(t, many.graph.tensors[n]) for n, t in few.graph.tensors.items())
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("name", ["low-rank", "tensor-network", "tensor-network-int4"])
def test_recipes(name: str, tmp_path: Any) -> None:
    """Each to the end: layers become chains, training does no harm, the file is smaller and proven.

    The weights are sums of eight Kronecker products, so of rank 32 too: every recipe can do them justice.
    """
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes, layers = (96, 384, 256, 96), []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
            w = sum(torch.kron(torch.randn(o // 2, 2), torch.randn(2, i // 2)) for _ in range(8))
            assert isinstance(w, Tensor)
            layers[-2].weight.data = w / (16 * i) ** 0.5
        data, unseen = torch.randn(160, 96), torch.randn(100, 96)
    graph = compress.capture(nn.Sequential(*layers[:-1]).eval(), (data[:2],))
    result = compress.run(graph, name, calibration=[data])
    reports = {report.name: report for report in result.report.passes}
    assert {c.action.split()[0] for c in reports["decompose"].changes} <= (
        {"svd", "alds", "mpo"} if name == "low-rank" else {"mpo"}
    )
    told = next(n.reason for n in reports["recover"].notes if "held-out loss" in n.reason).split()
    assert float(told[4].rstrip(";")) <= float(told[2])
    assert result.graph.parameters < 0.52 * graph.parameters  # biases stay
    (a,), (b,) = graph.run([unseen]), result.graph.run([unseen])
    assert float((a - b).square().sum() / a.square().sum()) < 0.05
    coded = name.endswith("int4")
    assert bool(result.graph.encodings) == coded
    path = compress.export(result.graph, tmp_path / "small.onnx", samples=result.samples).path
    assert path.stat().st_size < (0.15 if coded else 0.56) * graph.nbytes


def test_cores_stored_and_contracted_at_load(tmp_path: Any) -> None:
    """Balanced sites take fewer numbers and more operations: stored, they are a smaller file of dense speed.

    The weights are sums of eight products of two 16x16 matrices, which as chains take as many operations as
    dense layers, so without `storage` other sites have to do, and lose more.
    """
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)]
        for layer in (layers[0], layers[2]):
            w = sum(torch.kron(torch.randn(16, 16), torch.randn(16, 16)) for _ in range(8))
            assert isinstance(w, Tensor) and isinstance(layer, nn.Linear)
            layer.weight.data = w / 40
        data, unseen = torch.randn(300, 256), torch.randn(100, 256)
    graph = compress.capture(nn.Sequential(*layers).eval(), (data[:2],))
    options: dict[str, Any] = {"method": "mpo", "parameter_reduction": 0.9, "rank_multiple": 1}
    results = {
        stored: compress.run(graph, [Decompose(storage=stored, **options)], calibration=[data])
        for stored in (True, False)
    }
    lost = {}
    for stored, result in results.items():
        (a,), (b,) = graph.run([unseen]), result.graph.run([unseen])
        lost[stored] = float((a - b).square().sum() / a.square().sum())
    result = results[True]
    assert lost[True] < 0.01 and lost[False] > 20 * lost[True]
    assert sorted(result.graph.encodings) == ["0.weight", "2.weight"] and not results[False].graph.encodings
    assert all(c.action.endswith("of 16x16, 16x16, stored") for c in result.report.passes[0].changes)
    assert result.graph.nbytes < 0.11 * graph.nbytes
    artifact = compress.export(result.graph, tmp_path / "cores.onnx", samples=result.samples)
    assert artifact.nbytes < 0.13 * graph.nbytes and artifact.proof_db > 60
    found = compress.verify(artifact, graph, samples=result.samples, batch_sizes=())
    assert not found.unfused  # contracted once, when the file is loaded
    healed = Recover(epochs=1, loss="mse").apply(
        result.graph, Context(graph, load_calibration([data], inputs=graph.inputs))
    )
    assert any(c.action.endswith("trained") for c in healed.changes)
    path = compress.export(healed.graph, tmp_path / "cores.safetensors", "torch").path
    again = compress.load(path)
    assert torch.allclose(again(unseen), healed.graph.run([unseen])[0], atol=1e-4)


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
