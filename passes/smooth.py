"""SmoothQuant: moves the outliers of activations into weights, where rounding them costs less.

For a linear layer ``y = W x``, ``x / s`` and ``W diag(s)`` give the same y (Xiao et al. 2023). The strength
is searched for each input on its own, by predicted output error (`compress.passes.solvers.smoothing`).
``1 / s`` is folded into the layer norm or the gain before the layer where nothing else reads it: free.
Elsewhere (a residual connection reads it as well, or a nonlinearity made it) it is a multiplication, which
costs time, so it is put in only where activation rounding would be a large part of the layer's output.

Outputs change by float rounding only. For use before `quantize_activations`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from compress.graph import Graph, Site
from compress.observe import Channels, observe
from compress.passes.solvers.smoothing import Smoothing, smoothing
from compress.pipeline import Context, Note, Pass, PassResult

_aten = torch.ops.aten


class Smooth(Pass):
    """Scale activations down and weights up, channel by channel."""

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True

    targets: tuple[str, ...] = Field(("linear",), description="kinds, paths, globs or re: patterns")
    min_error: float = Field(
        0.02,
        ge=0,
        description="where it costs a multiplication: only above this predicted relative error of the output",
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        if context.calibration is None:
            return PassResult(graph, notes=(Note("", "no calibration data: nothing smoothed"),))
        graph = graph.copy()
        inputs = _by_input(graph, self.select(graph))
        seen = {source.name: Channels() for source in inputs}
        observe(graph, context.calibration.inputs(), {name: [c] for name, c in seen.items()})
        folded = multiplied = left = 0
        for source, sites in inputs.items():
            context.progress.step(sites[0].name)
            channels = seen[source.name]
            weight = torch.cat([graph.tensors[s.weight].float() for s in sites])
            found = smoothing(channels.low, channels.high, channels.energy, weight)
            if found.gain < 1.1:
                continue
            if _fold(graph, source, sites, found):
                folded += 1
            elif found.error_before >= self.min_error:
                _multiply(graph, source, sites, found)
                multiplied += 1
            else:
                left += 1
                continue
            for site in sites:
                old = graph.tensors[site.weight]
                graph.tensors[site.weight] = (old.float() * found.scales).to(old.dtype)
        summary = (
            f"inputs smoothed for free: {folded}, by a multiplication: {multiplied}, not worth one: {left}"
        )
        graph.prune_dead_code()
        return PassResult(graph, notes=(Note("", summary),))


def _by_input(graph: Graph, sites: list[Site]) -> dict[fx.Node, list[Site]]:
    """Linear layers by the value they read; only plain float weights that are read once."""
    readers: dict[str, int] = {}
    for site in graph.sites():
        readers[site.weight] = readers.get(site.weight, 0) + 1
    found: dict[fx.Node, list[Site]] = {}
    for site in sites:
        plain = site.weight not in graph.encodings and site.kind == "linear" and readers[site.weight] == 1
        source = graph.node(site.node).args[0]
        if plain and isinstance(source, fx.Node) and graph.tensors[site.weight].dtype == torch.float32:
            found.setdefault(source, []).append(site)
    return found


def _fold(graph: Graph, source: fx.Node, sites: list[Site], found: Smoothing) -> bool:
    """Divide what the value is made with, if these layers are all that reads it."""
    if {user.name for user in source.users} != {site.node for site in sites}:
        return False
    parts: list[Any] = []
    if source.target is _aten.layer_norm.default:
        parts = [a for a in source.args[2:4] if a is not None]
    elif source.target is _aten.mul.Tensor:
        parts = [a for a in source.args if isinstance(a, fx.Node) and _gain(graph, a, found.scales)]
        parts = parts[:1]
    if not parts or not all(_gain(graph, part, found.scales) for part in parts):
        return False
    for part in parts:
        name = str(part.target)
        graph.tensors[name] = graph.tensors[name] / found.scales
    return True


def _gain(graph: Graph, part: Any, scales: Tensor) -> bool:
    """Whether this is a stored vector over the channels that only one operator reads."""
    if not isinstance(part, fx.Node) or part.op != "get_attr" or part.target not in graph.tensors:
        return False
    tensor = graph.tensors[str(part.target)]
    readers = [u for n in graph.ops.nodes if n.op == "get_attr" and n.target == part.target for u in n.users]
    return tensor.shape == scales.shape and tensor.dtype == torch.float32 and len(readers) == 1


def _multiply(graph: Graph, source: fx.Node, sites: list[Site], found: Smoothing) -> None:
    name = f"{sites[0].weight.removesuffix('.weight')}.smoothing"
    graph.tensors[name] = 1 / found.scales
    first = min((graph.node(s.node) for s in sites), key=list(graph.ops.nodes).index)
    with graph.ops.inserting_before(first):
        factor = graph.ops.get_attr(name)
        scaled = graph.ops.call_function(_aten.mul.Tensor, (source, factor))
    for site in sites:
        graph.node(site.node).replace_input_with(source, scaled)
