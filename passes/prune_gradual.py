"""Gradual magnitude pruning: the sparsity rises while the model is trained (Zhu & Gupta 2017, 1710.01878).

The smallest weights go a few at a time, and what is left is trained in between, so it can take over. From the
sparsity s_i that is there to the one asked for, s_f, section 3 has the cubic schedule::

    s(t) = s_f + (s_i - s_f) (1 - t)^3      t = 0 .. 1

which prunes fast while there is much to spare and slowly at the end. What is pruned stays pruned. The rest of
the training, with the mask fixed, is that of `compress.passes.recover`, of which this pass has all options.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.graph import Graph
from compress.passes.recover import Recover
from compress.passes.solvers.masks import Scope, keep_largest_of
from compress.pipeline import Context, Note, PassResult
from compress.training import BatchNorm, Trainee


def cubic(start: float, end: float, progress: float) -> float:
    """The sparsity after this fraction of the pruning steps (Zhu & Gupta 2017, eq. 1)."""
    return end + (start - end) * (1 - progress) ** 3


class PruneGradual(Recover):
    """Prune by magnitude while training."""

    name: ClassVar[str] = "prune_gradual"

    targets: tuple[str, ...] = Field(
        ("linear", "conv"), description="what is pruned: kinds, paths, globs or re: patterns"
    )
    sparsity: float = Field(ge=0, lt=1, description="fraction of the targeted parameters to remove")
    scope: Scope = Field("global", description="rank weights over all layers together, or in each layer")
    stages: int = Field(50, ge=1, description="how often weights are removed")
    batch_norm: BatchNorm = Field("train", description="as in recover")
    pruning: float = Field(
        0.5, gt=0, le=1, description="fraction of the steps in which that happens; then the mask is fixed"
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        weights: dict[str, Tensor] = {}
        for site in self.select(graph):
            if site.weight in graph.encodings:
                reason = f"already {graph.encodings[site.weight].encoding}; prune before quantizing"
                notes.append(Note(site.name, reason))
            else:
                weights[site.weight] = graph.weight(site.weight)
        size = sum(w.numel() for w in weights.values())
        start = min(sum(int((w == 0).sum()) for w in weights.values()) / max(size, 1), self.sparsity)

        def prune(trainee: Trainee, step: int, steps: int) -> bool:
            last = max(1, round(steps * self.pruning))
            every = max(1, last // self.stages)
            if step == last or (step < last and step % every == 0):
                # exactly the sparsity asked for in the end, not nearly
                now = self.sparsity if step == last else cubic(start, self.sparsity, step / last)
                magnitudes = tuple(trainee.variables[name].detach().abs() for name in weights)
                for name, keep in zip(weights, keep_largest_of(magnitudes, now, self.scope), strict=True):
                    trainee.prune(name, ~keep)
            return step >= last

        fitted = self._fit(graph, context, prune)
        return PassResult(
            fitted.graph, tuple(self._changes(graph, fitted.graph)), (*notes, *self._told(fitted))
        )
