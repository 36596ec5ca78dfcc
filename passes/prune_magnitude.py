"""Magnitude pruning: the weights of least ``|w|`` go (Han et al. 2015; N:M as in Mishra et al. 2021).

Unstructured: exactly ``round(sparsity * n)`` weights are removed, over all targeted layers together
(`scope: global`, which lets insensitive layers give more) or in each (`scope: layer`).
N:M: of every M consecutive input channels N stay; for a convolution at each kernel position, which is
the pattern sparse tensor cores read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.graph import Graph, Site
from compress.numerics import relative_error
from compress.passes.solvers.masks import keep_largest, keep_n_of_m, parse_pattern
from compress.pipeline import Change, Context, Note, Pass, PassResult


class PruneMagnitude(Pass):
    """Set the smallest weights to zero."""

    name: ClassVar[str] = "prune_magnitude"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the targeted parameters to remove; implied by N:M"
    )
    pattern: str = Field("unstructured", description='"unstructured" or "N:M" (N of M consecutive stay)')
    scope: Literal["global", "layer"] = Field(
        "global", description="rank weights over all layers together, or in each layer"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PruneMagnitude:
        n_m = parse_pattern(self.pattern)
        if n_m is None and self.sparsity is None:
            raise ValueError("sparsity is required for the unstructured pattern, e.g. sparsity: 0.5")
        if n_m is not None and self.sparsity not in (None, 1 - n_m[0] / n_m[1]):
            raise ValueError(f"{self.pattern} means sparsity {1 - n_m[0] / n_m[1]}; leave sparsity out")
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        sites = {s.weight: s for s in reversed(self.select(graph))}
        sites = {s.weight: s for s in graph.sites() if s.weight in sites}
        result = graph.copy()
        changes: list[Change] = []
        notes: list[Note] = []
        for weight, mask in self._masks(graph, sites, notes).items():
            site = sites[weight]
            context.progress.step(site.name)
            old = graph.weight(weight)
            new = torch.where(mask, old, torch.zeros((), dtype=old.dtype))
            result.set_weight(weight, new)
            size = old.numel() * old.element_size()
            changes.append(
                Change(
                    site=site.name,
                    weight=weight,
                    action=self.pattern if self.pattern != "unstructured" else f"pruned {self.scope}",
                    bits=8.0 * old.element_size(),
                    sparsity=float((new == 0).double().mean()),
                    bytes_before=size,
                    bytes_after=size,
                    error=relative_error(old, new),
                )
            )
        return PassResult(result, tuple(changes), tuple(notes))

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
        if self.scope == "layer" or not magnitudes:
            return {name: keep_largest(s, self.sparsity) for name, s in magnitudes.items()}
        joint = keep_largest(torch.cat([s.flatten() for s in magnitudes.values()]), self.sparsity)
        parts = torch.split(joint, [s.numel() for s in magnitudes.values()])
        return {name: part.view(s.shape) for part, (name, s) in zip(parts, magnitudes.items(), strict=True)}
