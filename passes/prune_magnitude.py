"""Magnitude pruning: the weights of least ``|w|`` go (Han et al. 2015; N:M as in Mishra et al. 2021).

Unstructured: exactly ``round(sparsity * n)`` weights are removed, over all targeted layers together
(`scope: global`, which lets insensitive layers give more) or in each (`scope: layer`).
N:M: of every M consecutive input channels N stay; for a convolution at each kernel position, which is
the pattern sparse tensor cores read.

Where there is calibration data the survivors are then refitted by least squares, layer after layer, so that
they take over what the removed weights did (`compress.passes.solvers.refit`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import Statistics, output_error, sweep
from compress.graph import Graph, Site
from compress.passes.solvers.masks import Scope, keep_largest_of, keep_n_of_m, parse_pattern
from compress.passes.solvers.refit import refit_survivors
from compress.pipeline import Change, Context, Note, Pass, PassResult


class PruneMagnitude(Pass):
    """Set the smallest weights to zero."""

    name: ClassVar[str] = "prune_magnitude"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the targeted parameters to remove; implied by N:M"
    )
    pattern: str = Field("unstructured", description='"unstructured" or "N:M" (N of M consecutive stay)')
    scope: Scope = Field("global", description="rank weights over all layers together, or in each layer")

    refit: bool = Field(True, description="refit the survivors by least squares, given calibration data")

    @model_validator(mode="after")
    def _consistent(self) -> PruneMagnitude:
        n_m = parse_pattern(self.pattern)
        if n_m is None and self.sparsity is None:
            raise ValueError("sparsity is required for the unstructured pattern, e.g. sparsity: 0.5")
        if n_m is not None and self.sparsity not in (None, 1 - n_m[0] / n_m[1]):
            raise ValueError(f"{self.pattern} means sparsity {1 - n_m[0] / n_m[1]}; leave sparsity out")
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        chosen = {s.weight for s in self.select(graph)}
        sites: dict[str, Site] = {}
        for site in graph.sites():
            if site.weight in chosen:
                sites.setdefault(site.weight, site)
        changes: list[Change] = []
        notes: list[Note] = []
        for weight in [w for w in sites if w in graph.encodings]:
            # new values would undo the encoding
            reason = f"already {graph.encodings[weight].encoding}; prune before quantizing"
            notes.append(Note(sites.pop(weight).name, reason))
        masks = self._masks(graph, sites, notes)

        def visit(site: Site, old: Tensor, statistics: Statistics | None) -> Tensor:
            mask = masks[site.weight]
            if self.refit and statistics is not None and statistics.H is not None:
                matrix, kept = (t.reshape(t.shape[0], -1) for t in (old, mask))
                new = refit_survivors(matrix, kept, statistics.H).view_as(old).to(old.dtype)
            else:
                new = torch.where(mask, old, torch.zeros((), dtype=old.dtype))
            changes.append(self._change(site, old, new, statistics))
            return new

        targets = [site for weight, site in sites.items() if weight in masks]
        if not self.refit or context.calibration is None:
            # nothing to learn from the data, so no forward pass
            result = sweep(graph, targets, visit, progress=context.progress)
        else:
            result = context.sweep(graph, targets, visit, frozenset({"diag", "H"}))
        return PassResult(result, tuple(changes), tuple(notes))

    def _change(self, site: Site, old: Tensor, new: Tensor, statistics: Statistics | None) -> Change:
        size = old.numel() * old.element_size()
        return Change(
            site=site.name,
            weight=site.weight,
            action=self.pattern if self.pattern != "unstructured" else f"pruned {self.scope}",
            bits=8.0 * old.element_size(),
            sparsity=float((new == 0).double().mean()),
            bytes_before=size,
            bytes_after=size,
            error=output_error(old, new, statistics),
        )

    def _masks(self, graph: Graph, sites: dict[str, Site], notes: list[Note]) -> dict[str, Tensor]:
        n_m = parse_pattern(self.pattern)
        if n_m is not None:
            masks = {}
            for name, site in sites.items():
                weight = graph.weight(name)
                if weight.shape[1] % n_m[1]:
                    reason = f"{weight.shape[1]} input channels are no multiple of {n_m[1]}; left dense"
                    notes.append(Note(site.name, reason))
                    continue
                # channels last, so that the M entries of a group are neighbours
                scores = weight.abs().movedim(1, -1)
                masks[name] = keep_n_of_m(scores, *n_m).movedim(-1, 1)
            return masks
        assert self.sparsity is not None
        magnitudes = {name: graph.weight(name).abs().float() for name in sites}
        masks_of_all = keep_largest_of(tuple(magnitudes.values()), self.sparsity, self.scope)
        return dict(zip(magnitudes, masks_of_all, strict=True))
