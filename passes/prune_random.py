"""Random pruning: the baseline that every other way of pruning must beat.

Positions are drawn without replacement, so counts are exact; how many weights each layer keeps is up to
`ratios` (`compress.passes.solvers.ratios`). In a trained model that is not trained further it costs a lot;
trained from scratch under a fixed random mask, wide networks come close to dense ones (Liu et al. 2022, arXiv
2202.02643). Survivors are refitted as in `prune_magnitude`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.errors import PassError
from compress.graph import Graph, Site
from compress.passes.prune_magnitude import check_sparsity, input_weighted, prunable, pruned
from compress.passes.solvers.masks import keep_count, keep_n_of_m_channels, parse_pattern
from compress.passes.solvers.ratios import Ratios, kept
from compress.pipeline import Context, Note, Pass, PassResult


class PruneRandom(Pass):
    """Set weights drawn at random to zero."""

    name: ClassVar[str] = "prune_random"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the targeted parameters to remove; implied by N:M"
    )
    ratios: Ratios = Field("erk", description="how much each layer keeps; not for N:M")
    pattern: str = Field("unstructured", description='"unstructured" or "N:M" (N of M consecutive stay)')
    refit: bool = Field(True, description="refit the survivors by least squares, given calibration data")

    @model_validator(mode="after")
    def _consistent(self) -> PruneRandom:
        check_sparsity(self.pattern, self.sparsity)
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        sites = prunable(self, graph, parse_pattern(self.pattern), notes)
        masks = self._masks(graph, context, sites)
        action = f"random {self.ratios if self.pattern == 'unstructured' else self.pattern}"
        result, changes = pruned(graph, context, sites, masks, self.refit, action)
        return PassResult(result, changes, tuple(notes))

    def _masks(self, graph: Graph, context: Context, sites: dict[str, Site]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(context.seed)
        # in double precision, for float32 has too few numbers for all places of a large weight to differ
        drawn = {
            name: torch.rand(graph.shape(name), generator=generator, dtype=torch.float64) for name in sites
        }
        n_m = parse_pattern(self.pattern)
        if n_m is not None:
            return {name: keep_n_of_m_channels(scores, *n_m) for name, scores in drawn.items()}
        assert self.sparsity is not None
        scores = tuple(drawn.values())
        if self.ratios == "owl":
            scores = input_weighted(self.name, graph, context, sites)
        shapes = [graph.shape(name) for name in sites]
        try:
            counts = kept(shapes, self.sparsity, self.ratios, scores=scores)
        except ValueError as error:
            raise PassError(
                f"{self.name}: {error}", fix="lower the sparsity, or choose other ratios"
            ) from error
        return {n: keep_count(s, k) for (n, s), k in zip(drawn.items(), counts, strict=True)}
