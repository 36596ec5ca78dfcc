"""Magnitude pruning: the weights of least ``|w|`` go (Han et al. 2015; N:M as in Mishra et al. 2021).

Unstructured: exactly ``round(sparsity * n)`` weights are removed, over all targeted layers together
(`scope: global`, which lets insensitive layers give more) or in each (`scope: layer`).
N:M: of every M consecutive input channels N stay; for a convolution at each kernel position, which is
the pattern sparse tensor cores read.

Where there is calibration data the survivors are then refitted by least squares, layer after layer, so that
they take over what the removed weights did (`compress.passes.solvers.refit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import Statistics, output_error, sweep
from compress.errors import CalibrationError
from compress.graph import Graph, Site
from compress.passes.solvers.masks import Scope, keep_largest_of, keep_n_of_m_channels, parse_pattern
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
        check_sparsity(self.pattern, self.sparsity)
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        sites = prunable(self, graph, parse_pattern(self.pattern), notes)
        masks = self._masks(graph, sites)
        action = self.pattern if self.pattern != "unstructured" else f"pruned {self.scope}"
        result, changes = pruned(graph, context, sites, masks, self.refit, action)
        return PassResult(result, changes, tuple(notes))

    def _masks(self, graph: Graph, sites: dict[str, Site]) -> dict[str, Tensor]:
        n_m = parse_pattern(self.pattern)
        if n_m is not None:
            return {name: keep_n_of_m_channels(graph.weight(name).abs(), *n_m) for name in sites}
        assert self.sparsity is not None
        magnitudes = {name: graph.weight(name).abs().float() for name in sites}
        masks_of_all = keep_largest_of(tuple(magnitudes.values()), self.sparsity, self.scope)
        return dict(zip(magnitudes, masks_of_all, strict=True))


# -- for other passes too --------------------------------------------------------------------------


def check_sparsity(pattern: str, sparsity: float | None) -> None:
    """Raise ValueError where the two options contradict each other, or say too little."""
    n_m = parse_pattern(pattern)
    if n_m is None and sparsity is None:
        raise ValueError("sparsity is required for the unstructured pattern, e.g. sparsity: 0.5")
    if n_m is not None and sparsity not in (None, 1 - n_m[0] / n_m[1]):
        raise ValueError(f"{pattern} means sparsity {1 - n_m[0] / n_m[1]}; leave sparsity out")


def prunable(step: Pass, graph: Graph, n_m: tuple[int, int] | None, notes: list[Note]) -> dict[str, Site]:
    """The first site of every weight a pass may prune, by weight, in the order they run.

    Args:
        step: its targets are taken.
        n_m: input channels must be a multiple of M; None for any shape.
        notes: told why others are left alone.
    """
    chosen = {s.weight for s in step.select(graph)}
    sites: dict[str, Site] = {}
    for site in graph.sites():
        if site.weight in chosen:
            sites.setdefault(site.weight, site)
    for name, site in list(sites.items()):
        reason = ""
        channels = graph.shape(name)[1]
        if name in graph.encodings:
            # new values would undo the encoding
            reason = f"already {graph.encodings[name].encoding}; prune before quantizing"
        elif n_m is not None and channels % n_m[1]:
            reason = f"{channels} input channels are no multiple of {n_m[1]}; left dense"
        if reason:
            notes.append(Note(site.name, reason))
            del sites[name]
    return sites


def pruned(
    graph: Graph,
    context: Context,
    sites: dict[str, Site],
    masks: Mapping[str, Tensor],
    refit: bool,
    action: str,
) -> tuple[Graph, tuple[Change, ...]]:
    """The graph with weights set to zero, and a row of the report for each.

    Args:
        sites: from `prunable`.
        masks: bool, for each weight, True = keep.
        refit: fit the survivors by least squares, where there is calibration data.
        action: for the report.
    """
    changes: list[Change] = []

    def visit(site: Site, old: Tensor, statistics: Statistics | None) -> Tensor:
        mask = masks[site.weight]
        if refit and statistics is not None and statistics.H is not None:
            matrix, kept = (t.reshape(t.shape[0], -1) for t in (old, mask))
            new = refit_survivors(matrix, kept, statistics.H).view_as(old).to(old.dtype)
        else:
            new = torch.where(mask, old, torch.zeros((), dtype=old.dtype))
        changes.append(change(site, old, new, statistics, action))
        return new

    targets = list(sites.values())
    if not refit or context.calibration is None:
        # nothing to learn from the data, so no forward pass
        result = sweep(graph, targets, visit, progress=context.progress)
    else:
        result = context.sweep(graph, targets, visit, frozenset({"diag", "H"}))
    return result, tuple(changes)


def input_weighted(name: str, graph: Graph, context: Context, sites: dict[str, Site]) -> tuple[Tensor, ...]:
    """``|w| sqrt(E x^2)`` for every weight, in the order of `sites`.

    Raises:
        CalibrationError: there is no calibration data.
    """
    if context.calibration is None:
        raise CalibrationError(
            f"{name} has no calibration data to measure the inputs of the layers on",
            expected="a few hundred samples",
            fix="give calibration data, or choose other ratios",
        )
    found: dict[str, Tensor] = {}

    def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        scores = weight.reshape(weight.shape[0], -1).abs().float()
        if statistics is not None:
            rms = statistics.diag.sqrt()
            scores = (scores.view(len(rms), -1, rms.shape[1]) * rms.unsqueeze(1)).flatten(0, 1)
        found[site.weight] = scores

    context.sweep(graph, list(sites.values()), visit)
    return tuple(found[weight] for weight in sites)


def change(site: Site, old: Tensor, new: Tensor, statistics: Statistics | None, action: str) -> Change:
    """The report's row for a weight with new values, some of them zero."""
    size = old.numel() * old.element_size()
    return Change(
        site=site.name,
        weight=site.weight,
        action=action,
        bits=8.0 * old.element_size(),
        sparsity=float((new == 0).double().mean()),
        bytes_before=size,
        bytes_after=size,
        error=output_error(old, new, statistics),
    )
