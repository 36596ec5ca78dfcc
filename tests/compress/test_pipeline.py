"""The base class holds passes to their contract, whatever their authors do."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import compress
from compress.activations import QUANTIZERS, rounding
from compress.errors import PassError
from compress.passes import PASSES
from compress.pipeline import Context, Pass, PassResult, Pipeline, example_inputs, matches
from compress.testing import MODELS, make


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
