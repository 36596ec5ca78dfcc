"""Activation quantization: 8-bit activations times 8- or 4-bit weights (W8A8, W4A8), for integer kernels.

*Dynamic*, for linear layers: the input is rounded to uint8 over the range of each call, as ONNX
``DynamicQuantizeLinear`` defines it, so no range is ever wrong. *Static*, for convolutions and, where it is
asked for, for linear layers: ranges come from calibration (`compress.passes.solvers.ranges`). Around
convolutions values are rounded wherever that lets the runtime stay in integers (`compress.regions`), in front
of linear layers the input is.

Weights have one scale for each row. Those of 8 bits never overflow the 16-bit accumulators of processors
without VNNI (`compress.passes.solvers.saturation`); those of 4 bits cannot, and are solved as in
`quantize_weights`. Codes and biases are found for the *rounded* inputs ``x~``: the bias takes up the mean
error, ``b' = b + W E[x] - W' E[x~]`` (Nagel et al. 2019, section 4.2), at no cost.

A layer that loses too much by the rounding of its input keeps float activations and gets 8-bit weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from compress.activations import DYNAMIC, STATIC, Grid, Rounding, summation_order
from compress.calibration import Statistics, Update
from compress.encoding import EncodedWeight, IntEncoding, encode
from compress.graph import Graph, Site
from compress.observe import Histogram, observe
from compress.passes.quantize_weights import Quantizer, change, declined
from compress.passes.solvers.ranges import Method, choose_grid, rounding_error
from compress.passes.solvers.saturation import saturation_free
from compress.pipeline import Context, Note, Pass, PassResult
from compress.regions import find_regions, settled

W8A8, W4A8 = IntEncoding(8, -1), IntEncoding(4, -1)
WEIGHT_ONLY = {"linear": IntEncoding(8, 128), "embedding": IntEncoding(8, 128), "conv": IntEncoding(8, -1)}
"""What a layer gets that keeps float activations. With static activations it is whole rows: these are what
TensorRT decodes as it multiplies."""

FASTER_FROM = 1 << 16
"""Weights of a linear layer from which integers are faster than float in ONNX Runtime, also at one row:
measured 0.8x at 64x10, 0.9x at 128x128, 1.2x at 256x256, 1.4x at 384x384, 1.9x at 512x1000 (AVX2)."""

_CONV2D = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


class QuantizeActivations(Pass):
    """Round activations and weights to 8 bits; weights only where that is all that pays."""

    name: ClassVar[str] = "quantize_activations"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )
    activations: Literal["auto", "static", "dynamic", "none"] = Field(
        "auto",
        description="static: on calibrated ranges; dynamic: linear layers, on those of each call; auto: "
        "convolutions static and linear layers dynamic, where that is faster; none",
    )
    weight_bits: Literal[4, 8] = Field(
        8, description="bits of weights that meet rounded activations; 4 is half the size at the same speed"
    )
    ranges: Method = Field("mse", description="how static ranges are chosen from the calibration data")
    symmetric: bool = Field(False, description="static zero points at the middle, as TensorRT wants them")
    max_error: float = Field(
        0.15,
        gt=0,
        description="relative error from rounding its input above which a layer gets 8-bit weights only",
    )

    def leaves(self) -> Sequence[object]:
        rounded = {
            "auto": (Rounding(static=False), Rounding(static=True, symmetric=self.symmetric)),
            "static": (Rounding(static=True, symmetric=self.symmetric),),
            "dynamic": (Rounding(static=False),),
            "none": (),
        }[self.activations]
        weights = {*map(self._weight_only, WEIGHT_ONLY), W8A8 if self.weight_bits == 8 else W4A8}
        return (*sorted(weights, key=str), *rounded)

    def run(self, graph: Graph, context: Context) -> PassResult:
        graph = graph.copy()
        notes: list[Note] = []
        sites = self._unencoded(graph, notes)
        dynamic = self._dynamic(graph, sites, context, notes)
        static = self._static(graph, sites, context, notes)
        round_inputs(graph, dynamic)
        forms = {s.weight: "uint8 dynamic" for s in dynamic} | {s.weight: "uint8 static" for s in static}
        quantizer = Quantizer(graph)

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Update:
            if site.weight not in forms:
                return quantizer.update(site, weight, statistics, self._weight_only(site.kind))
            action = f", activations {forms[site.weight]}"
            if self.weight_bits == 4:  # products of so small codes never overflow
                update = quantizer.update(site, weight, statistics, W4A8, action)
            else:
                encoded = w8a8(weight, statistics, groups=site.groups)
                quantizer.changes.append(change(site, weight, encoded, statistics, action))
                update = Update(encoded, quantizer.shift(site, weight, encoded, statistics))
            return replace(update, bias=_on_integers(graph, site, update))

        result = context.sweep(graph, sites, visit, quantizer.needs)
        return PassResult(result, tuple(quantizer.changes), (*notes, *quantizer.notes))

    def _weight_only(self, kind: str) -> IntEncoding:
        return W8A8 if self.activations == "static" else WEIGHT_ONLY[kind]

    def _dynamic(self, graph: Graph, sites: list[Site], context: Context, notes: list[Note]) -> list[Site]:
        """Linear layers whose input is rounded on every call: those whose output survives it, measured."""
        if self.activations not in ("auto", "dynamic"):
            return []
        found = [s for s in eligible(graph, sites) if s.kind == "linear"]
        if self.activations == "auto":
            found = [s for s in found if graph.tensors[s.weight].numel() >= FASTER_FROM]
        if context.calibration is None or not found:
            return found
        noises = {source_of(graph, s).name: _Noise() for s in found}
        observe(graph, context.calibration.inputs(), {name: [n] for name, n in noises.items()})
        errors = {s: noises[source_of(graph, s).name].of_output(graph.tensors[s.weight]) for s in found}
        return self._bearable(errors, notes)

    def _static(self, graph: Graph, sites: list[Site], context: Context, notes: list[Note]) -> list[Site]:
        """Layers on calibrated ranges; puts the roundings around them into the graph."""
        if self.activations not in ("auto", "static"):
            return []
        eligible_sites = eligible(graph, sites)
        linear = [s for s in eligible_sites if s.kind == "linear" and self.activations == "static"]
        convs = []
        for site in eligible_sites:
            if site.kind == "conv":
                node = graph.node(site.node)
                if node.target not in _CONV2D:
                    notes.append(Note(site.name, "weights only: no integer kernel for this convolution"))
                elif any(user.op == "output" for user in settled(node).users):
                    notes.append(Note(site.name, "weights only: its output is one of the model's"))
                else:
                    convs.append(site)
        found = [*convs, *linear]
        if found and context.calibration is None:
            reason = "weights only: the ranges of activations need calibration data"
            notes += [Note(s.name, reason) for s in found]
            return []
        if not found:
            return []
        values = {node.name for node in find_regions(graph.ops, [graph.node(s.node) for s in convs]).rounded}
        seen = {name: Histogram() for name in (*sorted(values), *(source_of(graph, s).name for s in linear))}
        observe(graph, _batches(context) or (), {name: [h] for name, h in seen.items()})
        grids = {
            name: choose_grid(h.centers, h.counts, h.low, h.high, self.ranges, symmetric=self.symmetric)
            for name, h in seen.items()
        }
        errors = {
            s: _relative(seen[source_of(graph, s).name], grids[source_of(graph, s).name]) for s in found
        }
        kept = self._bearable(errors, notes)
        regions = find_regions(graph.ops, [graph.node(s.node) for s in kept if s.kind == "conv"])
        for node in regions.rounded:
            root = node
            while root in regions.same_as:
                root = regions.same_as[root]
            round_value(graph, node, grids[root.name])
        # what is rounded for a convolution is so for a linear layer as well
        left = [s for s in kept if s.kind == "linear" and source_of(graph, s).target is not STATIC]
        round_inputs(graph, left, STATIC, {name: (g.scale, g.zero_point) for name, g in grids.items()})
        _keep_float(graph, {s.node for s in kept})
        return kept

    def _unencoded(self, graph: Graph, notes: list[Note]) -> list[Site]:
        """The sites whose weight gains from 8 bits at all; a weight declined at one site is declined."""
        sites = self.select(graph)
        reasons = {s.weight: (s, reason) for s in sites if (reason := self._declined(graph, s))}
        notes += [Note(site.name, reason) for site, reason in reasons.values()]
        return [s for s in sites if s.weight not in reasons]

    def _declined(self, graph: Graph, site: Site) -> str | None:
        encoding = self._weight_only(site.kind)
        if reason := declined(graph, site, encoding, at_any_size=site.kind == "conv"):
            return reason
        columns = graph.tensors[site.weight][0].numel()
        if site.kind == "embedding" and columns % encoding.width(columns):
            return f"{columns} columns are no multiple of {encoding.width(columns)}; left as it is"
        return None

    def _bearable(self, errors: dict[Site, float], notes: list[Note]) -> list[Site]:
        kept = []
        for site, error in errors.items():
            if error <= self.max_error:
                kept.append(site)
            else:
                reason = f"weights only: rounding its input costs {error:.0%} of its output"
                notes.append(Note(site.name, reason))
        return kept


def w8a8(weight: Tensor, statistics: Statistics | None, *, groups: int = 1) -> EncodedWeight:
    """An int8 weight for rounded inputs.

    Args:
        weight: float ``[O, ...]``.
        statistics: of the rounded inputs; None to round the weight as it is.
        groups: of the convolution.
    """
    matrix = weight.reshape(weight.shape[0], -1).float()
    # integer convolutions sum over (kernel, channel), and depthwise ones have a 32-bit kernel of their own
    order = summation_order(weight.shape)
    depthwise = groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1
    importance = H = None
    if statistics is not None:
        H = statistics.H
        importance = statistics.diag.repeat_interleave(len(matrix) // len(statistics.diag), dim=0)
    rounded = saturation_free(matrix, importance, H, order=order, paired=not depthwise)
    return encode(rounded.codes, rounded.scales, None, W8A8, tuple(weight.shape), weight.dtype)


def _on_integers(graph: Graph, site: Site, update: Update) -> Tensor | None:
    """The shift that makes the bias an int32 in steps of the product's scale, as QLinearConv adds it, so that
    file and graph agree: left in between, it moved one code in 2,000 (ResNet-20, measured)."""
    source, shift, encoded = source_of(graph, site), update.bias, update.weight
    assert isinstance(encoded, EncodedWeight)
    name = graph.bias(site)
    if source.target is not STATIC or not graph.owns_bias(site) or (name is None and shift is None):
        return shift
    step = torch.tensor(float(source.args[1])) * encoded.scales[:, 0]  # type: ignore[arg-type]
    bias = torch.zeros(len(step)) if name is None else graph.tensors[name]
    wanted = bias.double() + (0 if shift is None else shift)
    return (torch.round(wanted / step) * step - bias).to(bias.dtype)


class _Noise:
    """Mean squares of a value and of what dynamic rounding takes away from it, for each channel."""

    def __init__(self) -> None:
        self.signal = self.noise = torch.zeros(())

    def update(self, value: Tensor) -> None:
        rows = value.detach().float().flatten(0, -2)
        lost = rows - DYNAMIC(rows)
        self.signal = self.signal + rows.double().square().sum(0)
        self.noise = self.noise + lost.double().square().sum(0)

    def of_output(self, weight: Tensor) -> float:
        """Relative error of ``W x``, channels taken as uncorrelated; a fraction."""
        columns = weight.double().square().sum(0)
        total = float((columns * self.signal).sum())
        return float((columns * self.noise).sum() / total) ** 0.5 if total > 0 else 0.0


def round_inputs(
    graph: Graph,
    sites: Sequence[Site],
    rounding: torch._ops.OpOverload = DYNAMIC,
    arguments: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Put one rounding in front of the layers that read a value, in place; others read it unrounded.

    Args:
        graph: what to change.
        sites: linear layers and convolutions.
        rounding: one of `compress.activations.QUANTIZERS`.
        arguments: of the rounding, by the name of the value's node.
    """
    made: dict[fx.Node, fx.Node] = {}
    for site in sites:
        node, source = graph.node(site.node), source_of(graph, site)
        if source not in made:
            with graph.ops.inserting_before(node):
                more = () if arguments is None else arguments[source.name]
                made[source] = graph.ops.call_function(rounding, (source, *more))
        node.replace_input_with(source, made[source])


def round_value(graph: Graph, node: fx.Node, grid: Grid) -> None:
    """Round a value on a known grid; everything that reads it reads the rounded value. In place."""
    with graph.ops.inserting_after(node):
        rounded = graph.ops.call_function(STATIC, (node, grid.scale, grid.zero_point))
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)


def _keep_float(graph: Graph, integer: set[str]) -> None:
    """Let other convolutions read values as they were before rounding, where their own output is rounded.

    ONNX Runtime rounds the float weight of a convolution between two rounded values on its own, on one grid
    for the whole tensor: 38 dB instead of exact, measured. In place.
    """
    for node in graph.ops.nodes:
        if node.name in integer or not str(node.target).startswith("aten.conv"):
            continue
        source = node.args[0]
        between = source.target is STATIC and any(user.target is STATIC for user in settled(node).users)
        if between:
            node.replace_input_with(source, source.args[0])


def source_of(graph: Graph, site: Site) -> fx.Node:
    """What a linear layer or convolution reads."""
    source = graph.node(site.node).args[0]
    assert isinstance(source, fx.Node)
    return source


def eligible(graph: Graph, sites: Sequence[Site]) -> list[Site]:
    """Those that compute in float32 and whose weight nothing else reads."""
    unshared = graph.unshared()
    return [s for s in sites if s.weight in unshared and graph.tensors[s.weight].dtype == torch.float32]


def _batches(context: Context) -> Iterable[Sequence[Tensor]] | None:
    return None if context.calibration is None else context.calibration.inputs()


def _relative(histogram: Histogram, grid: Grid) -> float:
    """Relative error of a value on a grid, a fraction."""
    signal = float((histogram.counts * histogram.centers.square()).sum())
    noise = rounding_error(histogram.centers, histogram.counts, grid)
    return (noise / signal) ** 0.5 if signal > 0 else 0.0
