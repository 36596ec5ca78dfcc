"""The base class holds passes to their contract, whatever their authors do."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.activations import QUANTIZERS, rounding
from compress.calibration import Statistics
from compress.data import load_calibration
from compress.errors import PassError
from compress.graph import Site
from compress.passes import PASSES
from compress.pipeline import Context, Pass, PassResult, Pipeline, example_inputs, matches
from compress.testing import MODELS, assert_close, make


@pytest.fixture
def graph() -> compress.Graph:
    return compress.capture(make("encoder"), inputs=MODELS["encoder"].specs)


class Changes(Pass):
    name: ClassVar[str] = "changes"
    what: str

    def run(self, graph: compress.Graph, context: Context) -> PassResult:
        work = graph if self.what == "argument" else graph.copy()
        if self.what in ("argument", "target"):
            work.set_weight("up.weight", work.weight("up.weight") * 2)
        elif self.what == "other":
            work.set_weight("down.weight", work.weight("down.weight") * 2)
        elif self.what == "shape":
            output = next(n for n in work.ops.nodes if n.op == "output")
            first, second = output.args[0]  # type: ignore[misc]
            with work.ops.inserting_before(output):
                first = work.ops.call_function(torch.ops.aten.sum.dim_IntList, (first, [-1]))
            output.args = ((first, second),)
        elif self.what == "broken":
            del work.tensors["up.weight"]
        return PassResult(work)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("argument", "changed the graph it was given"),
        ("other", "changed down.weight, which is not among its targets"),
        ("shape", r"changed output hidden to .*\[1, 9\]"),
        ("broken", "does not run"),
    ],
)
def test_broken_promises_are_found(graph: compress.Graph, what: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Changes(what=what, targets=("up",)).apply(graph, Context(graph))


def test_kept_promises_pass(graph: compress.Graph) -> None:
    after, reports = Pipeline((Changes(what="target", targets=("up",)),)).run(graph, Context(graph))
    assert torch.equal(after.weight("up.weight"), 2 * graph.weight("up.weight"))
    assert reports[0].name == "changes"
    assert reports[0].options == {"targets": ["up"], "ignore": [], "what": "target"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("linear", {"q", "k", "v", "up", "down"}),
        ("embedding", {"embed"}),
        ("q", {"q"}),
        ("?", {"q", "k", "v"}),
        ("re:(up|down)$", {"up", "down"}),
        ("up.weight", {"up"}),
    ],
)
def test_patterns(graph: compress.Graph, pattern: str, expected: set[str]) -> None:
    assert {s.name for s in graph.sites() if matches(s, pattern)} == expected


def test_a_broken_regular_expression_is_named(graph: compress.Graph) -> None:
    with pytest.raises(PassError, match=r"'re:\(up' is no regular expression"):
        Changes(what="target", targets=("up",), ignore=("re:(up",)).select(graph)


def test_example_inputs_stay_within_the_embedding(graph: compress.Graph) -> None:
    ids, mask = example_inputs(graph, {"batch": 64, "seq": 5})
    assert ids.shape == mask.shape == (64, 5)
    assert int(ids.min()) >= 0
    assert 50 < int(ids.max()) < 96
    assert (mask == 1).all()


def test_exact_passes_are_what_later_ones_aim_at(graph: compress.Graph) -> None:
    seen = []

    class Lossy(Pass):
        name = "lossy"

        def run(self, graph: compress.Graph, context: Context) -> PassResult:
            seen.append(context.reference)
            return PassResult(graph.copy())

    class Exact(Lossy):
        name = "exact"
        exact = True

    Pipeline((Lossy(), Exact(), Lossy(), Lossy())).run(graph, Context(graph))
    assert seen[0] is seen[1] is graph
    assert seen[2] is seen[3] is not graph


def test_weights_that_a_pass_changed_are_compared_on_the_inputs_they_fit() -> None:
    """G = E[x~ x^T], with x of the graph whose weights they fit."""
    g = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval(), torch.randn(20, 6, generator=g)
    captured = compress.capture(model, (x[:2],))
    context = Context(captured, load_calibration(x, inputs=captured.inputs))
    pruned = captured.copy()
    pruned.set_weight("0.weight", pruned.weight("0.weight").triu())

    def found(graph: compress.Graph, **options: Any) -> Tensor:
        seen: list[Statistics] = []

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Tensor:
            assert statistics is not None
            seen.append(statistics)
            return weight * 0.5

        context.sweep(graph, graph.sites(), visit, frozenset({"H", "G"}), **options)
        assert seen[1].G is not None
        return seen[1].G[0]

    def expected(graph: compress.Graph, original: compress.Graph) -> Tensor:
        weights = 0.5 * graph.weight("0.weight"), original.weight("0.weight")
        now, then = (x @ w.T + captured.tensors["0.bias"] for w in weights)
        return now.T @ then / len(x)

    assert_close(expected(captured, captured), found(captured), db=80)
    assert_close(expected(pruned, pruned), found(pruned), db=80)
    assert_close(expected(pruned, captured), found(pruned, original=captured), db=80)


@pytest.mark.parametrize(
    "step",
    [
        {"pass": "quantize_weights", "bits": 3},
        {"pass": "quantize_codebook"},
        {"pass": "quantize_activations"},
        {"pass": "quantize_activations", "activations": "static", "symmetric": True, "weight_bits": 4},
        {"pass": "quantize_fp8"},
        {"pass": "pack_sparse"},
    ],
    ids=lambda step: "-".join(map(str, step.values())),
)
def test_passes_say_what_they_leave(step: dict[str, Any]) -> None:
    """An exporter refuses a recipe for what its passes say; so nothing may be left that was not said."""
    name, options = step["pass"], {k: v for k, v in step.items() if k != "pass"}
    said = {str(form) for form in PASSES[name](**options).leaves()}
    for model in ("convnet", "encoder"):
        data = [MODELS[model].inputs(4)]
        found = compress.run(
            make(model), {"passes": [step]}, inputs=MODELS[model].specs, calibration=data
        ).graph
        left = {str(encoded.encoding) for encoded in found.encodings.values()}
        left |= {str(rounding(node)) for node in found.ops.nodes if node.target in QUANTIZERS}
        assert left <= said, model
