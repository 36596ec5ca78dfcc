"""Pruning by score: the weights whose loss would cost least go, and the others take over what they did.

Three choices, independent of one another:

- `score`, what a weight is worth. Without data its magnitude ``|w|`` (Han et al. 2015); with data what the
  layer's output would miss: Wanda, OBS (`compress.passes.solvers.scores`); SparseGPT, which scores each
  column anew once those before it are pruned (`compress.passes.solvers.sparsegpt`); or ALPS, which seeks all
  that stay at once (`compress.passes.solvers.alps`) and is the best of them.
- `ratios`, how much each layer keeps (`compress.passes.solvers.ratios`): by default the weights of all layers
  are ranked together, which lets insensitive layers give more. Exactly ``round(sparsity * n)`` weights go.
- `pattern`: single weights; N:M, of every M consecutive input channels N stay (Mishra et al. 2021); or whole
  blocks. For convolutions at each kernel position, which is what sparse tensor cores read.

Where there is calibration data the survivors are then refitted by least squares, layer after layer, so that
they take over what the removed weights did (`compress.passes.solvers.refit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import Need, Statistics, output_error, sweep
from compress.errors import CalibrationError, PassError
from compress.graph import Graph, Site
from compress.passes.solvers.alps import alps
from compress.passes.solvers.masks import Pattern, Scope, channels_first, channels_last, parse_pattern
from compress.passes.solvers.ratios import Ratios, kept
from compress.passes.solvers.refit import refit_survivors
from compress.passes.solvers.scores import Score, score
from compress.passes.solvers.sparsegpt import sparsegpt
from compress.pipeline import Change, Context, Note, Pass, PassResult

PATTERNS = '"unstructured", "N:M" (N of M consecutive stay) or "block:RxC" (output x input channels)'


class PruneMagnitude(Pass):
    """Set the weights of least score to zero."""

    name: ClassVar[str] = "prune_magnitude"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the targeted parameters to remove; implied by N:M"
    )
    pattern: str = Field("unstructured", description=PATTERNS)
    score: Literal["magnitude", "wanda", "obs", "sparsegpt", "alps", "best"] = Field(
        "magnitude",
        description="what ranks the weights; all but magnitude need calibration data; "
        "best: alps, or magnitude without data",
    )
    scope: Scope = Field("global", description="rank weights over all layers together, or in each layer")
    ratios: Ratios | None = Field(
        None, description="how much each layer keeps, in place of scope: global is global, layer is uniform"
    )
    refit: bool = Field(True, description="refit the survivors by least squares, given calibration data")

    @model_validator(mode="after")
    def _consistent(self) -> PruneMagnitude:
        pattern = check_sparsity(self.pattern, self.sparsity)
        if pattern.m and self.ratios is not None:
            raise ValueError(f"{self.pattern} is the same in every layer; leave ratios out")
        if pattern.unit > 1 and self.score == "sparsegpt":
            raise ValueError("sparsegpt prunes single weights or N:M; score blocks by obs")
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        pattern = parse_pattern(self.pattern)
        sites = prunable(self, graph, pattern, notes)
        how = self.score
        if how == "best":
            how = "alps"
            if context.calibration is None:
                how = "magnitude"
                notes.append(Note("all", "there is no calibration data; ranked by magnitude"))
        if how != "magnitude":
            check_data(self.name, context)
        plain: Score = "obs" if how == "sparsegpt" or how == "alps" else how
        counts = dict.fromkeys(sites, 0)
        if self.sparsity is not None and not pattern.m:
            ratios = self.ratios or ("global" if self.scope == "global" else "uniform")
            counts = counted(
                self.name, graph, context, sites, pattern, self.sparsity, ratios,
                lambda: scored(graph, context, sites, plain),
            )  # fmt: skip

        def choose(site: Site, weight: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
            if how == "sparsegpt" and statistics is not None:
                return _by_sparsegpt(weight, statistics, pattern, counts[site.weight])
            if how == "alps" and statistics is not None:
                return by_alps(weight, statistics, pattern, counts[site.weight])
            if how != "magnitude" and statistics is None:
                notes.append(Note(site.name, "an embedding has no inputs to measure; ranked by magnitude"))
            return weight, pattern.mask(_scores(plain, weight, statistics), counts[site.weight])

        what = self.pattern if pattern.m or pattern.unit > 1 else f"pruned {self.ratios or self.scope}"
        action = what if how == "magnitude" else f"{what} {how}"
        refit, needs = self.refit, _NEEDS[plain]
        if refit and how == "alps":
            refit, needs = False, needs | {"G"}  # its values are fitted already, to these
        result, changes = pruned(graph, context, sites, choose, refit, action, needs)
        return PassResult(result, changes, tuple(notes))


_NEEDS: dict[Score, frozenset[Need]] = {
    "magnitude": frozenset(),
    "wanda": frozenset({"diag"}),
    "obs": frozenset({"diag", "H"}),
}


def _scores(kind: Score, weight: Tensor, statistics: Statistics | None) -> Tensor:
    """Scores of the shape of the weight; magnitudes where there are no statistics."""
    matrix = weight.reshape(weight.shape[0], -1)
    if statistics is None:
        return score("magnitude", matrix).view(weight.shape)
    return score(kind, matrix, diag=statistics.diag, H=statistics.H).view(weight.shape)


def _by_sparsegpt(
    weight: Tensor, statistics: Statistics, pattern: Pattern, keep: int
) -> tuple[Tensor, Tensor]:
    assert statistics.H is not None
    # groups of a pattern are neighbours among the input channels
    order = channels_last(torch.arange(statistics.H.shape[1]).view(1, *weight.shape[1:]))[0]
    H = statistics.H[:, order][:, :, order]
    found = sparsegpt(channels_last(weight), H, keep, n=pattern.n, m=pattern.m)
    values, mask = (channels_first(t, weight.shape) for t in found)
    return values, mask


# -- for other passes too --------------------------------------------------------------------------


def check_sparsity(text: str, sparsity: float | None) -> Pattern:
    """The pattern; ValueError where the two options contradict each other, or say too little."""
    pattern = parse_pattern(text)
    if pattern.sparsity is None and sparsity is None:
        raise ValueError(f"sparsity is required for the pattern {text}, e.g. sparsity: 0.5")
    if pattern.sparsity is not None and sparsity not in (None, pattern.sparsity):
        raise ValueError(f"{text} means sparsity {pattern.sparsity}; leave sparsity out")
    return pattern


def check_data(name: str, context: Context) -> None:
    """Raise CalibrationError if there is none."""
    if context.calibration is None:
        raise CalibrationError(
            f"{name} has no calibration data to measure the inputs of the layers on",
            expected="a few hundred samples",
            fix="give calibration data, or rank by what needs none (score: magnitude, ratios: erk)",
        )


def prunable(step: Pass, graph: Graph, pattern: Pattern, notes: list[Note]) -> dict[str, Site]:
    """The first site of every weight a pass may prune, by weight, in the order they run.

    Args:
        step: its targets are taken.
        pattern: what a weight's shape must allow.
        notes: told why others are left alone.
    """
    chosen = {s.weight for s in step.select(graph)}
    sites: dict[str, Site] = {}
    for site in graph.sites():
        if site.weight in chosen:
            sites.setdefault(site.weight, site)
    for name, site in list(sites.items()):
        misfit = pattern.misfit(graph.shape(name))
        reason = f"{misfit}; left dense" if misfit else ""
        if name in graph.encodings:
            # new values would undo the encoding
            reason = f"already {graph.encodings[name].encoding}; prune before quantizing"
        if reason:
            notes.append(Note(site.name, reason))
            del sites[name]
    return sites


def scored(graph: Graph, context: Context, sites: dict[str, Site], kind: Score) -> tuple[Tensor, ...]:
    """Scores of all weights in the graph as it is, in the order of `sites`, each of its weight's shape."""
    found: dict[str, Tensor] = {}

    def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        found[site.weight] = _scores(kind, weight, statistics)

    _sweep(graph, context, sites, visit, _NEEDS[kind])
    return tuple(found[weight] for weight in sites)


def counted(
    name: str,
    graph: Graph,
    context: Context,
    sites: dict[str, Site],
    pattern: Pattern,
    sparsity: float,
    ratios: Ratios,
    scores: Callable[[], Sequence[Tensor]],
) -> dict[str, int]:
    """How many weights, or blocks of them, each layer keeps.

    Args:
        name: of the pass, for errors.
        scores: of all weights, asked for where layers are ranked together.
    """
    ranked = None
    if ratios == "owl":
        check_data(name, context)
        ranked = scored(graph, context, sites, "wanda")
    elif ratios == "global":
        ranked = tuple(pattern.ranked(s) for s in scores())
    shapes = [graph.shape(weight) for weight in sites]
    try:
        counts = kept(shapes, sparsity, ratios, scores=ranked, unit=pattern.unit)
    except ValueError as error:
        raise PassError(f"{name}: {error}", fix="lower the sparsity, or choose other ratios") from error
    return dict(zip(sites, counts, strict=True))


def by_alps(
    weight: Tensor, statistics: Statistics, pattern: Pattern, keep: int, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Values by ALPS, fitted, and the mask of those that stay, of the shape of the weight.

    Args:
        weight: float ``[O, I, *kernel]``.
        statistics: with H; with G the outputs of the original network are aimed at.
        pattern: what may stay; of it `keep` weights, or blocks.
        damping: as for `alps`.
    """
    assert statistics.H is not None

    def stay(scores: Tensor) -> Tensor:
        return pattern.mask(scores.view_as(weight), keep).reshape(scores.shape)

    values = alps(weight.flatten(1).float(), statistics.H, stay, G=statistics.G, damping=damping)
    return values.view_as(weight), values.view_as(weight) != 0


Chooser = Callable[[Site, Tensor, Statistics | None], tuple[Tensor, Tensor]]
"""(site, weight, statistics) -> values of the weights that stay if they are not refitted, mask of those."""


def pruned(
    graph: Graph,
    context: Context,
    sites: dict[str, Site],
    choose: Chooser,
    refit: bool,
    action: str,
    needs: frozenset[Need] = frozenset(),
) -> tuple[Graph, tuple[Change, ...]]:
    """The graph with weights set to zero, and a row of the report for each.

    Args:
        sites: from `prunable`.
        choose: called at each site.
        refit: fit the survivors by least squares, where there is calibration data.
        action: for the report.
        needs: statistics that `choose` wants.
    """
    changes: list[Change] = []

    def visit(site: Site, old: Tensor, statistics: Statistics | None) -> Tensor:
        values, mask = choose(site, old, statistics)
        if refit and statistics is not None and statistics.H is not None:
            matrix, kept = (t.reshape(t.shape[0], -1) for t in (old, mask))
            new = refit_survivors(matrix, kept, statistics.H, G=statistics.G).view_as(old).to(old.dtype)
        else:
            new = torch.where(mask, values, 0.0).to(old.dtype)
        changes.append(change(site, old, new, statistics, action))
        return new

    result = _sweep(graph, context, sites, visit, needs | {"diag", "H", "G"} if refit else needs)
    return result, tuple(changes)


def _sweep(
    graph: Graph,
    context: Context,
    sites: dict[str, Site],
    visit: Callable[[Site, Tensor, Statistics | None], Tensor | None],
    needs: frozenset[Need],
) -> Graph:
    if not needs:
        # nothing to learn from the data, so no forward pass
        return sweep(graph, list(sites.values()), visit, progress=context.progress)
    return context.sweep(graph, list(sites.values()), visit, needs)


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
