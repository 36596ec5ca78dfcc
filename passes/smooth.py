"""Smoothing and equalization: scales move between layers, to where rounding costs less.

For a layer ``y = W x``, ``x / s`` and ``W diag(s)`` give the same y for any positive s, one for each input
channel (SmoothQuant, Xiao et al. 2023). The strength is searched for each input on its own, by predicted
output error (`compress.passes.solvers.smoothing`). Where ``1 / s`` goes, if nothing else reads the input:

- into the layer norm or the gain before the layer;
- into the rows of the layer before it, through ReLU, pooling and other positively homogeneous functions
  (cross-layer equalization, Nagel et al. 2019, section 4.1). Rows have scales of their own: free.

Elsewhere (a residual connection reads the input as well, or GELU made it) it is a multiplication. That costs
time, so it is put in only before linear layers where activation rounding would be a large part of the output.

Outputs change by float rounding only. For use before `quantize_activations`.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from compress.graph import Graph, Site
from compress.observe import Channels, observe
from compress.passes.solvers.smoothing import Smoothing, smoothing
from compress.pipeline import Context, Note, Pass, PassResult

_aten = torch.ops.aten

_HOMOGENEOUS = {
    _aten.relu.default, _aten.relu_.default, _aten.leaky_relu.default, _aten.leaky_relu_.default,
    _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.avg_pool1d.default, _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
}  # fmt: skip
"""``f(s x) = s f(x)`` for positive s, channel by channel."""


class Smooth(Pass):
    """Scale activations down and weights up, channel by channel."""

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True

    targets: tuple[str, ...] = Field(("linear", "conv"), description="kinds, paths, globs or re: patterns")
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
        # channels are in front of the kernel's axes
        axis = {source: -(graph.tensors[sites[0].weight].ndim - 1) for source, sites in inputs.items()}
        seen = {source.name: Channels(axis[source]) for source in inputs}
        observe(graph, context.calibration.inputs(), {name: [c] for name, c in seen.items()})
        folded = multiplied = left = 0
        for source, sites in inputs.items():
            context.progress.step(sites[0].name)
            channels = seen[source.name]
            parts = [_by_channel(graph.tensors[s.weight], s.groups) for s in sites]
            taps = max(part.shape[2] for part in parts)
            weight = torch.cat([torch.nn.functional.pad(p, (0, taps - p.shape[2])) for p in parts])
            found = smoothing(channels.low, channels.high, channels.energy, weight)
            if found.gain < 1.1:
                continue
            if _fold(graph, source, sites, found):
                folded += 1
            elif sites[0].kind == "linear" and found.error_before >= self.min_error:
                _multiply(graph, source, sites, found)
                multiplied += 1
            else:
                left += 1
                continue
            for site in sites:
                graph.tensors[site.weight] = _multiplied(
                    graph.tensors[site.weight], found.scales, site.groups
                )
        summary = (
            f"inputs smoothed for free: {folded}, by a multiplication: {multiplied}, not worth one: {left}"
        )
        graph.prune_dead_code()
        return PassResult(graph, notes=(Note("", summary),))


def _by_input(graph: Graph, sites: list[Site]) -> dict[fx.Node, list[Site]]:
    """Layers by the value they read; only plain float weights that are read once."""
    unshared = graph.unshared()
    found: dict[fx.Node, list[Site]] = {}
    for site in sites:
        source = graph.node(site.node).args[0]
        if site.kind != "embedding" and isinstance(source, fx.Node) and _plain(graph, site, unshared):
            found.setdefault(source, []).append(site)
    return {source: sites for source, sites in found.items() if len({s.kind for s in sites}) == 1}


def _plain(graph: Graph, site: Site, unshared: Container[str]) -> bool:
    """Whether the weight is a float tensor that only this operator reads, as it is."""
    if site.weight in graph.encodings or site.weight not in unshared:
        return False
    return graph.tensors[site.weight].dtype == torch.float32


def _by_channel(weight: Tensor, groups: int) -> Tensor:
    """``[O, C / groups, *kernel]`` -> ``[O, C, taps]``; zero where a row does not see a channel."""
    w = weight.float().reshape(*weight.shape[:2], -1)
    dense = w.new_zeros(groups, len(w) // groups, groups, *w.shape[1:])
    for g, part in enumerate(w.unflatten(0, (groups, -1))):
        dense[g, :, g] = part
    return dense.flatten(2, 3).flatten(0, 1)


def _multiplied(weight: Tensor, scales: Tensor, groups: int) -> Tensor:
    """The weight times one number for each input channel."""
    rows = scales.view(groups, -1).repeat_interleave(len(weight) // groups, 0)  # [O, C / groups]
    return weight * rows.view(*rows.shape, *[1] * (weight.ndim - 2))


def _fold(graph: Graph, source: fx.Node, sites: list[Site], found: Smoothing) -> bool:
    """Divide what the value is made with, if these layers are all that reads it."""
    if {user.name for user in source.users} != {site.node for site in sites}:
        return False
    if _fold_into_rows(graph, source, found.scales):
        return True
    if sites[0].kind == "conv":
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


def _fold_into_rows(graph: Graph, source: fx.Node, scales: Tensor) -> bool:
    """Divide the rows of the layer whose output, through homogeneous functions alone, is the value."""
    while source.target in _HOMOGENEOUS:
        before = source.args[0]
        if not isinstance(before, fx.Node) or len(before.users) > 1:
            return False
        source = before
    layer = next((s for s in graph.sites() if s.node == source.name and s.kind != "embedding"), None)
    if layer is None or not graph.owns_bias(layer) or not _plain(graph, layer, graph.unshared()):
        return False
    weight = graph.tensors[layer.weight]
    if len(weight) != len(scales):
        return False
    graph.tensors[layer.weight] = weight / scales.view(-1, *[1] * (weight.ndim - 1))
    bias = graph.bias(layer)
    if bias is not None:
        graph.tensors[bias] = graph.tensors[bias] / scales
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
