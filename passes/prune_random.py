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

from compress.calibration import Statistics
from compress.graph import Graph, Site
from compress.passes.prune_magnitude import PATTERNS, check_sparsity, counted, prunable, pruned
from compress.passes.solvers.masks import parse_pattern
from compress.passes.solvers.ratios import Ratios
from compress.pipeline import Context, Note, Pass, PassResult


class PruneRandom(Pass):
    """Set weights drawn at random to zero."""

    name: ClassVar[str] = "prune_random"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the targeted parameters to remove; implied by N:M"
    )
    ratios: Ratios = Field("erk", description="how much each layer keeps; not for N:M")
    pattern: str = Field("unstructured", description=PATTERNS)
    refit: bool = Field(True, description="refit the survivors by least squares, given calibration data")

    @model_validator(mode="after")
    def _consistent(self) -> PruneRandom:
        check_sparsity(self.pattern, self.sparsity)
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        pattern = parse_pattern(self.pattern)
        sites = prunable(self, graph, pattern, notes)
        generator = torch.Generator().manual_seed(context.seed)
        # in double precision, for float32 has too few numbers for all places of a large weight to differ
        drawn = {
            name: torch.rand(graph.shape(name), generator=generator, dtype=torch.float64) for name in sites
        }
        counts = dict.fromkeys(sites, 0)
        if self.sparsity is not None and not pattern.m:
            counts = counted(
                self.name, graph, context, sites, pattern, self.sparsity, self.ratios,
                lambda: tuple(drawn.values()),
            )  # fmt: skip

        def choose(site: Site, weight: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
            return weight, pattern.mask(drawn[site.weight], counts[site.weight])

        action = f"random {self.pattern if pattern.m else self.ratios}"
        result, changes = pruned(graph, context, sites, choose, self.refit, action)
        return PassResult(result, changes, tuple(notes))
