"""Mixed precision on whole graphs: budgets, constraints, and that measured choices beat uniform ones."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.encoding import EncodedWeight
from compress.passes import mixed_precision
from compress.passes.cleanup import Cleanup
from compress.passes.mixed_precision import MixedPrecision
from compress.passes.quantize_weights import QuantizeWeights
from compress.pipeline import Context
from compress.sensitivity import Damage
from compress.testing import MODELS, assert_close, make

SMALL: dict[str, Any] = {
    "formats": ("int2 g16", "int4 g32", "int4 g16 asym", "int8 per row", "float"),
    "sensitive": (),
    "method": "rtn",  # for speed; the solver itself is tested elsewhere, and here once with the default
}


class Sensitive(nn.Module):
    """Three equal layers; what the second one does to the output is ten times that of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 96)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + 10 * self.b(x.roll(1, -1)) + self.c(x.roll(2, -1))
        z = y.tanh()
        z = z + 0.1 * (self.q(z) + self.k(z)[..., :64])
        out: Tensor = self.head(z)
        return out


@functools.cache
def sensitive() -> tuple[compress.Graph, list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, data = Sensitive().eval(), [torch.randn(48, 64) for _ in range(2)]
    return compress.capture(module, (data[0][:2],)), data


@functools.cache
def captured(name: str) -> compress.Graph:
    return compress.capture(make(name), MODELS[name].inputs(2))


def run(
    name: str, step: MixedPrecision, *before: compress.Pass, calibrated: bool = True
) -> tuple[compress.Graph, compress.Result]:
    example = MODELS[name]
    batches = [example.inputs(8), example.inputs(5)] if calibrated else None
    return captured(name), compress.run(captured(name), [*before, step], calibration=batches)


def stored(result: compress.Result) -> int:
    """Bytes of the weights the pass works on, encoded or not."""
    names = dict.fromkeys(site.weight for site in result.graph.sites())
    encodings, tensors = result.graph.encodings, result.graph.tensors
    return sum(
        encodings[n].nbytes if n in encodings else tensors[n].numel() * tensors[n].element_size()
        for n in names
    )


def prepared(bits: float, **options: Any) -> tuple[mixed_precision.Problem, Context]:
    graph, data = sensitive()
    context = Context(graph, load_calibration(data, inputs=graph.inputs))
    step = MixedPrecision(effective_bits=bits, **{**SMALL, **options})
    return step.problem(graph, context, []), context


@pytest.mark.parametrize(
    ("name", "bits"), [("convnet", 5.6), ("convnet", 12), ("encoder", 4.2), ("encoder", 6), ("tied_lm", 4.2)]
)
def test_the_budget_holds_and_the_graph_runs(name: str, bits: float) -> None:
    original, result = run(name, MixedPrecision(effective_bits=bits, **SMALL))
    weights = {site.weight: result.graph.shape(site.weight) for site in result.graph.sites()}
    count = sum(math.prod(shape) for shape in weights.values())
    assert stored(result) <= bits * count / 8
    inputs = MODELS[name].inputs(3)
    for want, have in zip(original.run(inputs), result.graph.run(inputs), strict=True):
        assert_close(want, have, db=0.0 if bits < 5.8 else 8.0)
    assert result.report.passes[0].changes


def test_size_of_the_whole_model() -> None:
    _, result = run("encoder", MixedPrecision(max_size="9 kB", **SMALL))
    assert result.graph.nbytes <= 9000
    _, larger = run("encoder", MixedPrecision(max_size=20_000, **SMALL))
    assert 9000 < larger.graph.nbytes <= 20_000


def test_bytes_in_the_report_are_those_of_the_graph() -> None:
    _, result = run("encoder", MixedPrecision(effective_bits=5, **SMALL))
    note = next(n.reason for n in result.report.passes[0].notes if "budget" in n.reason)
    assert note.startswith(f"{stored(result):,} bytes of a budget of")
    for change in result.report.passes[0].changes:
        encoded = result.graph.encodings[change.weight]
        assert change.bytes_after == encoded.nbytes and change.action == str(encoded.encoding)


def test_the_layer_that_matters_gets_the_bits() -> None:
    """The budget is four bits for one of three layers and two for the others."""
    graph, data = sensitive()
    options = {**SMALL, "formats": ("int2 g32", "int4 g32"), "targets": ("a", "b", "c")}
    result = compress.run(graph, [MixedPrecision(effective_bits=3.7, **options)], calibration=data)
    bits = {c.site: c.bits for c in result.report.passes[0].changes}
    assert bits == {"a": 3, "b": 5, "c": 3}


def test_the_choice_is_the_best_of_all() -> None:
    """Measured damage against every combination of formats; damages nearly add up here."""
    problem, context = prepared(
        4.6, formats=("int2 g16", "int4 g32", "int8 per row"), targets=("a", "b", "c")
    )
    assert problem.damage is not None
    best = math.inf
    for choice in itertools.product(*(range(len(layer.formats)) for layer in problem.layers)):
        if problem.nbytes(choice) <= problem.budget:
            best = min(best, problem.damage.of(problem.at(choice)))
    found = problem.choose(context)
    assert found.measured == pytest.approx(problem.damage.of(problem.at(found.choice)))
    assert found.measured <= 1.02 * best
    assert found.predicted == pytest.approx(found.measured, rel=0.5)


@pytest.mark.parametrize("name", ["int2 g16", "int4 g32", "int4 g16 asym"])
def test_never_worse_than_uniform(name: str) -> None:
    problem, context = prepared(32)
    uniform = problem.uniform(mixed_precision.parse_format(name))  # type: ignore[arg-type]
    problem.budget = problem.nbytes(uniform)
    assert problem.damage is not None
    found = problem.choose(context)
    assert found.nbytes <= problem.budget
    assert found.measured <= problem.damage.of(problem.at(uniform)) * (1 + 1e-9)


def test_policy_search_does_not_beat_the_exact_one() -> None:
    """Measured damages, not predictions: what remains is that they do not quite add up."""
    problem, context = prepared(4.6)
    exact, policy = problem.choose(context), problem.search(context)
    assert policy.nbytes <= problem.budget
    assert policy.measured >= 0.95 * exact.measured
    q, k = problem.tied[0]
    assert policy.choice[q] == policy.choice[k]
    assert problem.search(context) == policy
    _, result = run("encoder", MixedPrecision(effective_bits=5, search="policy", **SMALL), calibrated=False)
    assert result.graph.encodings


def test_layers_that_read_the_same_input_share_a_format() -> None:
    problem, context = prepared(4.2)
    names = [layer.name for layer in problem.layers]
    q, k = names.index("q.weight"), names.index("k.weight")
    assert [sorted(group) for group in problem.tied] == [[q, k]]
    assert problem.layers[q].formats == problem.layers[k].formats
    choice = problem.choose(context).choice
    assert choice[q] == choice[k]


def test_damage_is_measured_on_other_samples() -> None:
    """What layers are fitted to and what they are judged by is disjoint, and together everything."""
    from compress.sensitivity import held_out

    graph, data = sensitive()
    for batches, expected in (([data[0], data[1]], 48), ([data[0][:1]], 1), ([data[0][:7], data[1][:2]], 4)):
        kept, held = held_out(graph, load_calibration(batches, inputs=graph.inputs))
        rows = [x for part in (kept, held) for (batch,) in part for x in batch]
        assert len(held) == expected == sum(len(batch) for (batch,) in held)
        if sum(map(len, batches)) > 1:
            assert len(kept) + len(held) == sum(map(len, batches)) == len(rows)
            assert len(torch.unique(torch.stack(rows), dim=0)) == len(rows)
        else:
            assert len(kept) == len(held) == 1  # nothing to hold out


def test_held_out_batches_stay_whole_where_the_batch_is_fixed() -> None:
    from compress.sensitivity import held_out

    _, data = sensitive()
    graph = compress.capture(Sensitive().eval(), (data[0][:4],), inputs=["x:float32[!4,64]"])
    parts = [data[0][i : i + 4] for i in range(0, 40, 4)]
    kept, held = held_out(graph, load_calibration(parts, inputs=graph.inputs))
    assert {len(batch) for part in (kept, held) for (batch,) in part} == {4}
    assert (len(kept), len(held)) == (20, 20)


def test_sensitive_layers_keep_eight_bits() -> None:
    for name, protected in (("convnet", {"conv1", "fc2"}), ("tied_lm", {"embed"}), ("encoder", {"embed"})):
        step = MixedPrecision(effective_bits=9.5, formats=SMALL["formats"], method="rtn")
        _, result = run(name, step, Cleanup())
        for change in result.report.passes[1].changes:
            if change.site in protected:
                assert change.bits >= 8, change
    _, result = run("encoder", MixedPrecision(effective_bits=7, **{**SMALL, "sensitive": ("re:q|k|v",)}))
    bits = {c.site: c.bits for c in result.report.passes[0].changes}
    assert all(bits.get(name, 32) >= 8 for name in "qkv") and bits["up"] < 8


def test_too_small_a_budget_says_what_would_do() -> None:
    with pytest.raises(compress.CompressError, match="smallest formats take") as caught:
        run("encoder", MixedPrecision(effective_bits=2))
    assert "sensitive" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "a budget is needed"),
        ({"effective_bits": 4, "max_size": 100}, "give one of them"),
        ({"max_latency": "fast"}, "no latency"),
        ({"max_latency": "0.5x", "search": "policy"}, "sizes only"),
        ({"max_latency": -1}, "no latency"),
        ({"max_size": "12 elephants"}, "no size"),
        ({"effective_bits": 4, "formats": ["int5 g32"]}, "int5 g32"),
        ({"effective_bits": 4, "sensitive": ["tail"]}, "'tail' matches no layer"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    recipe = {"passes": [{"pass": "mixed_precision", **options}]}
    example = MODELS["encoder"].inputs(2)
    with pytest.raises(compress.CompressError, match=says):
        compress.run(captured("encoder"), recipe, calibration=[example])


def test_without_data() -> None:
    _, result = run("encoder", MixedPrecision(effective_bits=5, **SMALL), calibrated=False)
    assert result.graph.encodings
    assert any("relative error of each weight" in n.reason for n in result.report.passes[0].notes)


def test_many_layers_are_scaled_from_one_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measured format for each layer still tells the layer that matters."""
    calls = []
    of_each = Damage.of_each

    def counted(self: Damage, graph: compress.Graph, replacements: Any, *rest: Any) -> Any:
        calls.append([len(values) for values in replacements.values()])
        return of_each(self, graph, replacements, *rest)

    monkeypatch.setattr(Damage, "of_each", counted)
    full, _ = prepared(4.5)
    monkeypatch.setattr(mixed_precision, "_MEASURED", 2)
    quick, context = prepared(4.5)
    assert set(calls[1]) == {1} and max(calls[0]) == 4
    for one, other in zip(full.layers, quick.layers, strict=True):
        assert other.damages == pytest.approx(one.damages, rel=1.0, abs=1e-4)
    assert quick.choose(context).nbytes <= quick.budget


def test_encoded_weights_and_integers_are_left() -> None:
    first = QuantizeWeights(bits=8, group_size=16, targets=("q", "k"))
    _, result = run("encoder", MixedPrecision(effective_bits=6, **SMALL), first)
    assert str(result.graph.encodings["q.weight"].encoding) == "int8 g16"
    assert any(n.site == "q" and "already int8" in n.reason for n in result.report.passes[1].notes)


def test_outputs_that_overflow_are_never_chosen() -> None:
    graph = captured("encoder")
    data = load_calibration([MODELS["encoder"].inputs(8)], inputs=graph.inputs)
    step = MixedPrecision(effective_bits=20, **SMALL)
    problem = step.problem(graph, Context(graph, data), [])
    layer = problem.layers[2]
    options = [math.nan if f is not None and f.bits == 2 else 0.0 for f in layer.formats]
    layer.damages = mixed_precision._monotone(layer, options)
    assert problem._solve([one.damages for one in problem.layers])[2] != options.index(math.nan)


def test_same_seed_same_bytes() -> None:
    _, first = run("encoder", MixedPrecision(effective_bits=5, **SMALL))
    _, second = run("encoder", MixedPrecision(effective_bits=5, **SMALL))
    assert first.graph.tensors.keys() == second.graph.tensors.keys()
    for name, tensor in first.graph.tensors.items():
        assert torch.equal(tensor, second.graph.tensors[name])


def test_the_file_is_proven(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    """With the default solver, and formats mixed within one file."""
    _, result = run("encoder", MixedPrecision(effective_bits=4.6, **{**SMALL, "method": "descent"}))
    assert len({c.action for c in result.report.passes[0].changes}) > 1
    artifact = compress.export(result.graph, tmp_path / "mixed.onnx", samples=result.samples)
    assert artifact.path.exists()


def pretended(
    graph: compress.Graph, inputs: Any, formats: dict[str, list[EncodedWeight | None]]
) -> dict[str, list[float]]:
    """2 and 8 bits are half as fast as float, 4 bits twice as fast."""
    assert len(inputs[0]) == 1
    speed = {None: 1.0, 2: 2.0, 4: 0.5, 8: 2.0}
    return {
        name: [graph.shape(name)[0] * speed[e.encoding.bits if e else None] / 100 for e in options]
        for name, options in formats.items()
    }


@pytest.mark.parametrize("bits", [None, 5.0, 14])
def test_a_latency_budget(bits: float | None) -> None:
    """Alone and beside a size: the least damage of everything within both."""
    graph, data = sensitive()
    context = Context(graph, load_calibration(data, inputs=graph.inputs), latency=pretended)
    options = {**SMALL, "formats": ("int2 g16", "int4 g32", "float"), "targets": ("a", "b", "c")}
    step = MixedPrecision(effective_bits=bits, max_latency="0.8x", **options)
    problem = step.problem(graph, context, [])
    assert problem.latency_budget == pytest.approx(0.8 * 3 * 0.64)
    found = problem.choose(context)
    assert found.latency <= problem.latency_budget and found.nbytes <= problem.budget
    assert found.latency == pytest.approx(problem.latency(found.choice))
    assert problem.damage is not None
    best = min(
        problem.damage.of(problem.at(choice))
        for choice in itertools.product(*(range(len(layer.formats)) for layer in problem.layers))
        if problem.latency(choice) <= problem.latency_budget and problem.nbytes(choice) <= problem.budget
    )
    assert found.measured <= 1.02 * best
    result = step.run(graph, context)
    assert any("ms of a budget of 1.536" in note.reason for note in result.notes)


def test_latencies_come_from_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from compress.exporters import latency

    monkeypatch.setattr(latency, "layer_latencies", pretended)
    graph, data = sensitive()
    run_it = functools.partial(compress.run, graph, calibration=data)
    result = run_it([MixedPrecision(max_latency=10.0, **SMALL)])
    assert not result.graph.encodings  # nothing is better than float, and it fits
    with pytest.raises(compress.CompressError, match="no formats are within max_latency"):
        run_it([MixedPrecision(max_latency="0.4x", **SMALL)])
    with pytest.raises(compress.CompressError, match="no runtime to measure in"):
        MixedPrecision(max_latency=1.0, **SMALL).run(graph, Context(graph))


def test_nothing_to_do() -> None:
    _, result = run("encoder", MixedPrecision(effective_bits=32, targets=("conv",)))
    assert not result.report.passes[0].changes
