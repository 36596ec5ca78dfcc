"""Passes, and the pipeline that runs them in order and holds them to their contract."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.calibration import Need, Visitor, sweep
from compress.chain import Chain
from compress.data import CalibrationData
from compress.encoding import EncodedWeight
from compress.errors import PassError
from compress.graph import Graph, Site
from compress.inputs import summands
from compress.kv_cache import has_cache
from compress.progress import Progress, Silent


@dataclass(frozen=True)
class Change:
    """What a pass did to one weight.

    Attributes:
        site: module path of the (first) site.
        weight: name of the weight.
        action: in the field's words, e.g. "int4 g32" or "2:4".
        bits: stored bits per weight including scales; 32 for plain float32.
        sparsity: fraction of zeros in the weight now.
        bytes_before, bytes_after: stored bytes of this weight.
        error: relative error of the layer's output, estimated from the calibration statistics
            (of the weight itself where there are none); a fraction.
    """

    site: str
    weight: str
    action: str
    bits: float
    sparsity: float
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class Note:
    """Something a pass declined to do, and why."""

    site: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    graph: Graph
    changes: tuple[Change, ...] = ()
    notes: tuple[Note, ...] = ()


LayerForm = EncodedWeight | Chain
"""What a weight may become."""

LayerLatency = Callable[
    [Graph, Sequence[torch.Tensor], Mapping[str, Sequence[LayerForm | None]]], dict[str, list[float]]
]
"""(graph, flat inputs, forms of each weight; None is float) -> milliseconds of each, by weight."""


@dataclass
class Context:
    """What a pass may use besides the graph.

    Attributes:
        reference: what later passes aim at: the graph as captured, or as the last exact pass left it.
        calibration: batches of real inputs, or None.
        seed: for anything random.
        max_memory: bytes of live activations kept in memory while sweeping, and of drafts of layers; of
            gradients that are all needed at once.
        progress: told about every layer.
        latency: measures single layers in the target runtime; None where there is none.
    """

    reference: Graph
    calibration: CalibrationData | None = None
    seed: int = 0
    max_memory: int = 2 << 30
    progress: Progress = field(default_factory=Silent)
    latency: LayerLatency | None = None

    def sweep(
        self,
        graph: Graph,
        sites: Sequence[Site],
        visit: Visitor,
        needs: frozenset[Need] = frozenset({"diag"}),
        original: Graph | None = None,
    ) -> Graph:
        """`compress.calibration.sweep` with this context's data; data-free if there is none.

        Args:
            graph, sites, visit, needs: as there.
            original: whose inputs x the statistics compare with. A weight W is to give on its inputs what W
                gives on x, so by default this is the reference only while it has the weights that the sites
                have now. Those that an earlier pass pruned or trained fit the inputs they got then: with
                these and x of the reference, W x is what no model says.
        """
        if original is None:
            # what is encoded already is not visited to be changed
            weights = {site.weight for site in sites} - set(graph.encodings)
            unchanged = all(graph.tensors[w] is self.reference.tensors.get(w) for w in weights)
            original = self.reference if unchanged else graph
        batches = None if self.calibration is None else self.calibration.inputs()
        return sweep(
            graph,
            sites,
            visit,
            batches=batches,
            reference=original,
            needs=needs,
            max_memory=self.max_memory,
            progress=self.progress,
        )


class Pass(BaseModel):
    """One rewrite of the graph. Fields are the options a recipe can set.

    Subclasses set `name` and write `run`. What `apply` checks afterwards: the graph still runs, its
    outputs have the same shapes and dtypes, and weights outside `targets`/`ignore` are untouched.

    Attributes:
        targets: which weights to work on: kinds ("linear", "conv", "embedding"), module paths,
            globs (``layers.*.mlp``) or regular expressions (``re:.*\\.q_proj$``).
        ignore: which of those to leave alone; same syntax.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    exact: ClassVar[bool] = False
    """Set by passes that change outputs by rounding only, e.g. folding. They may touch weights outside their
    targets, and what they return is what later passes aim at."""

    targets: tuple[str, ...] = Field(("linear", "conv"), description="kinds, paths, globs or re: patterns")
    ignore: tuple[str, ...] = Field((), description="what to leave alone; same syntax")

    def leaves(self) -> Sequence[object]:
        """Formats that this pass may give to weights and activations, as far as they are known beforehand:
        encodings such as `compress.encoding.IntEncoding`, and `compress.activations.Rounding`. For these an
        exporter refuses a recipe before any work is done."""
        return ()

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite the graph; the one method a pass writes. Must not change its argument."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """`run`, then check the contract.

        Raises:
            PassError: the pass broke it; the pass author's fault, not the user's.
        """
        before = dict(graph.tensors)
        result = self.run(graph, context)
        same = graph.tensors.keys() == before.keys()
        if not same or any(graph.tensors[k] is not v for k, v in before.items()):
            raise PassError(f"pass {self.name} changed the graph it was given", expected="a new graph")
        if not self.exact:
            allowed = self.may_change(graph)
            for name, tensor in before.items():
                owner = _owner(name, graph)
                if owner not in allowed and result.graph.tensors.get(name) is not tensor:
                    raise PassError(f"pass {self.name} changed {owner}, which is not among its targets")
        _check_runs(self.name, graph, result.graph)
        return result

    def may_change(self, graph: Graph) -> set[str]:
        """Names of the tensors this pass may change: weights of its sites, and their biases."""
        chosen = self.select(graph)
        return {s.weight for s in chosen} | {name for s in chosen if (name := graph.bias(s))}

    def select(self, graph: Graph) -> list[Site]:
        """Sites that `targets` names and `ignore` does not.

        Raises:
            PassError: a module path in `targets` or `ignore` matches nothing.
        """
        sites = graph.sites()
        for pattern in (*self.targets, *self.ignore):
            _check_regex(self.name, pattern)
            if pattern not in _KIND_NAMES and not any(matches(s, pattern) for s in sites):
                near = _nearest(pattern, [s.name for s in sites])
                raise PassError(
                    f"{self.name}: {pattern!r} matches no layer",
                    expected=f"one of {', '.join(_KIND_NAMES)}, a module path, a glob or re:pattern",
                    fix=f"did you mean {near!r}?" if near else "list the layers with `compress inspect`",
                )
        chosen = [s for s in sites if any(matches(s, p) for p in self.targets)]
        # a weight is left alone when any of its sites is ignored: a tied weight has only one value
        ignored = {s.weight for s in sites if any(matches(s, p) for p in self.ignore)}
        return [s for s in chosen if s.weight not in ignored]

    def options(self) -> dict[str, Any]:
        """The options as plain data, defaults included."""
        return self.model_dump(mode="json")


_KIND_NAMES = ("linear", "conv", "embedding")


def matches(site: Site, pattern: str) -> bool:
    """Whether a `targets` / `ignore` pattern names this site."""
    if pattern in _KIND_NAMES:
        return site.kind == pattern
    names = (site.name, site.weight)
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], n) for n in names)
    # a path also names everything below it
    return any(fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.") for n in names)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise PassError(
            f"{name}: {pattern!r} is no regular expression: {error}", expected="Python's syntax after re:"
        ) from error


def _nearest(word: str, known: Sequence[str]) -> str | None:
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else None


def _owner(tensor: str, graph: Graph) -> str:
    for name in graph.encodings:
        if tensor.startswith(f"{name}."):
            return name
    return tensor


def _check_runs(name: str, before: Graph, after: Graph) -> None:
    """Run both on a small example and compare shapes and dtypes, not values."""
    example = example_inputs(before, {})
    try:
        got = after.run(example)
    except Exception as error:
        raise PassError(f"pass {name} returned a graph that does not run: {error}") from error
    want = before.run(example)
    for label, old, new in zip(before.output_names, want, got, strict=True):
        if isinstance(old, torch.Tensor) and (old.shape != new.shape or old.dtype != new.dtype):
            raise PassError(
                f"pass {name} changed output {label} to {new.dtype} {list(new.shape)}",
                expected=f"{old.dtype} {list(old.shape)}",
            )


def example_inputs(graph: Graph, sizes: dict[str, int], seed: int = 0) -> list[torch.Tensor]:
    """Random inputs for checks of shape and speed, valid where that can be known from the graph.

    Integers that index an embedding stay within its table; other integers and masks are ones.
    """
    generator = torch.Generator().manual_seed(seed)
    tables: dict[str, int] = {}
    for site in graph.sites():
        if site.kind == "embedding":
            indices = cast(Any, graph.node(site.node).args[1])
            rows = graph.shape(site.weight)[0]
            tables[indices.name] = min(rows, tables.get(indices.name, rows))
    placeholders = [n for n in graph.ops.nodes if n.op == "placeholder"]
    return [
        spec.sample(generator, sizes=sizes, high=tables.get(node.name))
        for spec, node in zip(graph.inputs, placeholders, strict=True)
    ]


def shapes_to_try(graph: Graph) -> list[dict[str, int]]:
    """Two assignments of the dynamic dimensions, as different as the captured sizes allow.

    With a key-value cache a third one: one token, as in decoding.
    """
    first: dict[str, int] = {}
    for spec in graph.inputs:
        for axis, symbol in spec.dynamic:
            if len(summands(symbol)) == 1:
                first.setdefault(symbol, max(2, spec.shape[axis]))
    if not first:
        return [{}]
    # smaller, not larger: a position table ends somewhere
    second = {s: (3 if s == "batch" else max(2, n // 2 + 1)) for s, n in first.items()}
    found = [{**first, **({"batch": 2} if "batch" in first else {})}, second]
    return [*found, {**second, "batch": 1, "seq": 1}] if has_cache(graph.inputs) else found


@dataclass(frozen=True)
class PassReport:
    """One pass of a run: what it was asked, what it did, what it declined, how long it took."""

    name: str
    options: dict[str, Any]
    changes: tuple[Change, ...]
    notes: tuple[Note, ...]
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run."""

    passes: tuple[Pass, ...]

    def run(self, graph: Graph, context: Context) -> tuple[Graph, list[PassReport]]:
        """Apply every pass; each is checked before the next one starts."""
        reports = []
        for step in self.passes:
            count = len({s.weight for s in step.select(graph)})
            context.progress.start(step.name, count)
            began = time.perf_counter()
            result = step.apply(graph, context)
            reports.append(
                PassReport(
                    step.name, step.options(), result.changes, result.notes, time.perf_counter() - began
                )
            )
            context.progress.finish()
            graph = result.graph
            if step.exact:
                # what a layer reads may be scaled now, and its weight with it; operators may be others
                context = replace(context, reference=graph)
        return graph, reports
