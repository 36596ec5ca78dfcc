"""Low-rank correction of quantized layers: two small layers beside each add what its codes lost.

    y = Q x + L (R x),    L R = the best matrix of rank r for the error W - Q, seen by the layer's inputs

Errors of rounding are nearly of full rank, but the inputs are not: as these see it, some of the error is of
low rank (LQER, arXiv 2402.02446; whitening as in `compress.passes.solvers.low_rank`). The factors are layers
like any other and can be quantized next. Layers are done in sequence, so each also corrects what those before
it have changed of its inputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration import Need, Statistics, output_error
from compress.graph import Graph, Site
from compress.passes.quantize_weights import least_squares_target
from compress.passes.solvers.low_rank import parameters, spectrum
from compress.pipeline import Change, Context, Note, Pass, PassResult

_aten = torch.ops.aten


class LowRankCorrection(Pass):
    """Add a low-rank branch to quantized linear layers."""

    name: ClassVar[str] = "low_rank_correction"

    targets: tuple[str, ...] = Field(("linear",), description="kinds, paths, globs or re: patterns")
    rank: int = Field(16, ge=1, description="of the correction; it takes rank * (outputs + inputs) numbers")

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        changes: list[Change] = []
        factors: dict[Site, tuple[Tensor, Tensor]] = {}
        originals: dict[str, Tensor] = {}
        unshared = graph.unshared()
        for site in self.select(graph):
            reason = self._declined(graph, context.reference, site, site.weight in unshared)
            if reason:
                notes.append(Note(site.name, f"{reason}; left as it is"))
            else:
                originals[site.weight] = context.reference.tensors[site.weight]
        sites = [site for site in graph.sites() if site.weight in originals]

        def visit(site: Site, coded: Tensor, statistics: Statistics | None) -> Tensor:
            original = originals[site.weight]
            target = least_squares_target(original, statistics)
            H = None if statistics is None or statistics.H is None else statistics.H[0]
            first, last = spectrum(target - coded.float(), H).factors(self.rank)
            first, last = first.to(coded.dtype).contiguous(), last.to(coded.dtype).contiguous()
            factors[site] = (first, last)
            new = (coded + last @ first).to(coded.dtype)
            changes.append(self._change(graph, site, original, new, statistics, first.numel() + last.numel()))
            return new

        # a graph of plain values takes the sums, and is not needed any more
        needs: frozenset[Need] = frozenset({"diag", "H", "G", "held_out"})
        context.sweep(graph.decoded(), sites, visit, needs, original=context.reference)
        result = graph.copy()
        for site, (first, last) in factors.items():
            _add_branch(result, site, first, last)
        return PassResult(result, tuple(changes), tuple(notes))

    def _declined(self, graph: Graph, reference: Graph, site: Site, alone: bool) -> str:
        if site.kind != "linear":
            return f"a correction is for linear layers, this is a {site.kind}"
        if site.weight not in graph.encodings:
            return "not quantized: there is nothing to correct"
        if not alone:
            return "the weight is shared with another operator"
        if any(user.name == _corrected(site.node) for user in graph.node(site.node).users):
            return "has a correction already"
        outputs, inputs = graph.shape(site.weight)
        known = reference.tensors.get(site.weight)
        if known is None or tuple(known.shape) != (outputs, inputs):
            return "its weight before quantization is not known"
        if parameters(outputs, inputs, self.rank) >= outputs * inputs:
            return f"rank {self.rank} takes more numbers than the layer has"
        return ""

    def _change(
        self,
        graph: Graph,
        site: Site,
        original: Tensor,
        new: Tensor,
        statistics: Statistics | None,
        added: int,
    ) -> Change:
        before = graph.encodings[site.weight].nbytes
        after = before + added * new.element_size()
        return Change(
            site=site.name,
            weight=site.weight,
            action=f"low rank {self.rank}",
            bits=8 * after / new.numel(),
            sparsity=0.0,
            bytes_before=before,
            bytes_after=after,
            error=output_error(original, new, statistics),
        )


def _add_branch(graph: Graph, site: Site, first: Tensor, last: Tensor) -> None:
    """``y`` becomes ``y + linear(linear(x, first), last)``, under names that the original does not have."""
    layer = graph.node(site.node)
    stem = f"{site.weight.removesuffix('.weight')}.correction"
    value = layer.args[0]
    following = layer.next
    with graph.ops.inserting_before(following):
        for i, factor in enumerate((first, last)):
            name = graph.free_name(f"{stem}.{i}.weight")
            graph.tensors[name] = factor
            value = graph.ops.create_node(
                "call_function", _aten.linear.default, (value, graph.ops.get_attr(name)),
                name=f"{layer.name}_correction{i}",
            )  # fmt: skip
            value.meta["module"] = f"{site.name}.correction.{i}"
        both = graph.ops.create_node(
            "call_function", _aten.add.Tensor, (layer, value), name=_corrected(layer.name)
        )
    layer.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)


def _corrected(layer: str) -> str:
    """Name of the sum of a layer and its branch."""
    return f"{layer}_corrected"
