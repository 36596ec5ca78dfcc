"""CHITA: pruning by a quadratic model of the loss, from gradients of single samples (Benbaki et al. 2023).

The weights that go, and new values of those that stay, minimise the loss's quadratic model with the
empirical Fisher information as Hessian (`compress.passes.solvers.chita`). Four samples of five give
gradients; which support, which form of the Fisher information and which ridge are taken is decided by the
loss of the pruned model on the fifth. With several stages the sparsity rises exponentially, and gradients
are taken anew at the weights of each stage (CHITA++, section 3.3).

The loss is the cross-entropy of the model's logits. Where the calibration data has labels, of those; where
not, gradients take labels sampled from the model, and the pruned model is judged by the divergence of its
probabilities.

`objective: layer` needs neither labels nor gradients: layer after layer, what the pruned one computes from
the inputs it will get comes close to what the original does from its own (`compress.passes.solvers.alps`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import Need, Statistics, output_error
from compress.data import Batch, CalibrationData
from compress.errors import CalibrationError, PassError
from compress.gradients import SiteGradient, fits, site_gradients, target_output
from compress.graph import Graph, Site
from compress.passes.solvers.alps import alps
from compress.passes.solvers.chita import Solution, solve
from compress.passes.solvers.fisher import Gradients
from compress.passes.solvers.masks import Scope, keep_largest, keep_largest_of, keep_n_of_m, parse_pattern
from compress.pipeline import Change, Context, Note, Pass, PassResult
from compress.statistics import HELD_OUT_EVERY

_AT_ONCE = 16
"""Samples of one backward pass: patches of a convolution are the largest thing in memory."""
_FISHER_ONLY = ("stages", "samples", "mini_batch", "first_order")
_DAMPING = 0.03
"""Of the mean square input: the pull towards the weight as it is, with objective `layer`."""


class PruneChita(Pass):
    """Prune by a quadratic model of the loss, or of each layer's output."""

    name: ClassVar[str] = "prune_chita"

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the targeted parameters to remove; implied by N:M"
    )
    objective: Literal["fisher", "layer"] = Field(
        "fisher", description="the loss, by gradients of samples; or the output of each layer, without labels"
    )
    pattern: str = Field("unstructured", description='"unstructured", or with objective layer also "N:M"')
    scope: Scope = Field("global", description="rank weights over all layers together, or in each layer")
    stages: int = Field(
        1, ge=1, description="gradients are taken anew for each; the sparsity rises exponentially"
    )
    samples: int | None = Field(
        None, ge=1, description="calibration samples of a stage; all of them by default"
    )
    mini_batch: int = Field(1, ge=1, description="samples whose gradients are added up: less memory")
    ridge: float | None = Field(
        None,
        gt=0,
        description="of the mean Fisher information, by default the best on held-out samples; "
        "with objective layer of the mean square input, 0.03 by default",
    )
    first_order: bool = Field(
        False, description="do not take the model as converged: it is trained further while it is pruned"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PruneChita:
        n_m = parse_pattern(self.pattern)
        if n_m is None and self.sparsity is None:
            raise ValueError("sparsity is required for the unstructured pattern, e.g. sparsity: 0.5")
        if n_m is not None and self.sparsity not in (None, 1 - n_m[0] / n_m[1]):
            raise ValueError(f"{self.pattern} means sparsity {1 - n_m[0] / n_m[1]}; leave sparsity out")
        if n_m is not None and self.objective == "fisher":
            raise ValueError(f"pattern {self.pattern} takes objective: layer")
        if self.objective == "layer":
            idle = {name: type(self).model_fields[name].default for name in _FISHER_ONLY}
            given = [name for name, default in idle.items() if getattr(self, name) != default]
            if given:
                raise ValueError(f"{', '.join(given)} has no meaning with objective: layer; leave it out")
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        if context.calibration is None:
            wanted = "gradients on" if self.objective == "fisher" else "the inputs of layers from"
            raise CalibrationError(
                f"prune_chita has no calibration data to take {wanted}",
                expected="a few hundred samples"
                + (", with labels where there are any" if self.objective == "fisher" else ""),
                fix="give calibration data, or prune by magnitude (prune_magnitude)",
            )
        notes: list[Note] = []
        sites = self._sites(graph, notes)
        if not sites:
            return PassResult(graph, (), tuple(notes))
        if self.objective == "layer":
            result, changes = self._layer_wise(graph, context, {w: s[0] for w, s in sites.items()}, notes)
            return PassResult(result, tuple(changes), tuple(notes))
        return self._by_fisher(graph, context, context.calibration, sites, notes)

    def _by_fisher(
        self,
        graph: Graph,
        context: Context,
        calibration: CalibrationData,
        sites: dict[str, list[Site]],
        notes: list[Note],
    ) -> PassResult:
        assert self.sparsity is not None
        data = _Data.of(graph, calibration)
        if data.labels is None:
            reason = "the calibration data has no class labels; they are sampled from the model"
            notes.append(Note("all", reason))
        result = graph.copy()
        for stage in range(self.stages):
            part = data.part(stage, self.samples)
            step = 1 - (1 - self.sparsity) ** ((stage + 1) / self.stages)
            sparsity = self.sparsity if stage + 1 == self.stages else step
            solution = self._stage(result, sites, part, sparsity, context.seed + stage)
            for (weight, _), values in zip(sites.items(), solution.values, strict=True):
                old = result.weight(weight)
                result.set_weight(weight, values.view_as(old).to(old.dtype))
        what = f"chita {solution.support} {solution.block}"
        changes = [_change(s[0], graph.weight(w), result.weight(w), what, None) for w, s in sites.items()]
        return PassResult(result, tuple(changes), tuple(notes))

    def _sites(self, graph: Graph, notes: list[Note]) -> dict[str, list[Site]]:
        """Every site of each weight to prune."""
        chosen = {s.weight for s in self.select(graph)}
        sites: dict[str, list[Site]] = {}
        for site in graph.sites():
            if site.weight in chosen:
                sites.setdefault(site.weight, []).append(site)
        for weight, all_of_it in list(sites.items()):
            reason = ""
            if weight in graph.encodings:
                # new values would undo the encoding
                reason = f"already {graph.encodings[weight].encoding}; prune before quantizing"
            elif any(site.kind == "embedding" for site in all_of_it):
                reason = "an embedding has neither gradients nor inputs to go by; left dense"
            if reason:
                notes.append(Note(sites.pop(weight)[0].name, reason))
        return sites

    def _stage(
        self, graph: Graph, sites: dict[str, list[Site]], data: _Data, sparsity: float, seed: int
    ) -> Solution:
        fitting, held_out = data.split(self.mini_batch)
        collected = _collect(graph, sites, fitting, self.mini_batch, torch.Generator().manual_seed(seed))
        weights = tuple(graph.weight(w).flatten(1).float() for w in sites)
        trial = graph.copy()

        def judge(values: tuple[Tensor, ...]) -> float:
            for weight, new in zip(sites, values, strict=True):
                old = graph.weight(weight)
                trial.set_weight(weight, new.view_as(old).to(old.dtype))
            return held_out.loss(trial)

        return solve(
            weights,
            collected,
            sparsity,
            scope=self.scope,
            ridge=self.ridge,
            # in the units of sums over mini-batches divided by the root of their size
            first_order=self.mini_batch**-0.5 if self.first_order else 0.0,
            judge=judge,
        )

    def _layer_wise(
        self, graph: Graph, context: Context, sites: dict[str, Site], notes: list[Note]
    ) -> tuple[Graph, list[Change]]:
        n_m = parse_pattern(self.pattern)
        shares: dict[str, float] = {}
        if n_m is None:
            assert self.sparsity is not None
            shares = dict.fromkeys(sites, self.sparsity)
            if self.scope == "global":
                masks = keep_largest_of(
                    [graph.weight(w).abs().float() for w in sites], self.sparsity, "global"
                )
                shares = {w: float((~m).double().mean()) for w, m in zip(sites, masks, strict=True)}
        else:
            for weight in list(sites):
                if (channels := graph.shape(weight)[1]) % n_m[1]:
                    reason = f"{channels} input channels are no multiple of {n_m[1]}; left dense"
                    notes.append(Note(sites.pop(weight).name, reason))
        changes: list[Change] = []

        def visit(site: Site, old: Tensor, statistics: Statistics | None) -> Tensor:
            def keep(scores: Tensor) -> Tensor:
                if n_m is None:
                    return keep_largest(scores, shares[site.weight])
                # channels last, so that the M entries of a group are neighbours
                kept = keep_n_of_m(scores.view_as(old).movedim(1, -1), *n_m)
                return kept.movedim(-1, 1).reshape(scores.shape)

            assert statistics is not None
            assert statistics.H is not None
            damping = _DAMPING if self.ridge is None else self.ridge
            new = alps(old.flatten(1).float(), statistics.H, keep, G=statistics.G, damping=damping)
            new = new.view_as(old).to(old.dtype)
            what = self.pattern if n_m is not None else f"chita layer {self.scope}"
            changes.append(_change(site, old, new, what, statistics))
            return new

        needs: frozenset[Need] = frozenset({"diag", "H", "G"})
        return context.sweep(graph, list(sites.values()), visit, needs), changes


def _change(site: Site, old: Tensor, new: Tensor, what: str, statistics: Statistics | None) -> Change:
    size = old.numel() * old.element_size()
    return Change(
        site=site.name,
        weight=site.weight,
        action=what,
        bits=8.0 * old.element_size(),
        sparsity=float((new == 0).double().mean()),
        bytes_before=size,
        bytes_after=size,
        error=output_error(old, new, statistics),
    )


# -- samples ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """Samples with a class for each row of logits, or (labels None) without."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    dense: Graph
    """What the network is before anything is pruned: without labels its probabilities are aimed at."""

    @classmethod
    def of(cls, graph: Graph, data: CalibrationData) -> _Data:
        output = target_output(graph)
        if any(spec.symbol(0) is None for spec in graph.inputs):
            raise PassError(
                "prune_chita takes gradients of single samples, and the model fixes the size of its batches",
                expected="a model captured with a dynamic batch",
            )
        batches: list[Batch] = list(data)
        shapes = {tuple(t.shape[1:] for t in b.inputs) for b in batches}
        if len(shapes) != 1:
            raise CalibrationError(
                "samples of the calibration data have different shapes", expected="one shape for prune_chita"
            )
        inputs = tuple(torch.cat(column) for column in zip(*(b.inputs for b in batches), strict=True))
        known = [b.labels for b in batches if b.labels is not None]
        labels = torch.cat(known) if known else None
        scores = graph.run([t[:1] for t in inputs])[output]
        if labels is not None and not fits(labels, len(inputs[0]), scores):
            labels = None
        return cls(inputs, labels, graph)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def at(self, rows: Tensor) -> _Data:
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, inputs=tuple(t[rows] for t in self.inputs), labels=labels)

    def part(self, stage: int, count: int | None) -> _Data:
        """The samples of a stage: the next ones, beginning anew at the end."""
        if count is None or count >= len(self):
            return self
        return self.at((torch.arange(count) + stage * count) % len(self))

    def split(self, multiple: int) -> tuple[_Data, _Data]:
        """Samples to fit to, a multiple of a number where there are enough; every fifth to judge by."""
        rows = torch.arange(len(self))
        held = (rows + 1) % HELD_OUT_EVERY == 0
        if not bool(held.any()):
            return self, self
        kept = rows[~held]
        return self.at(kept[: max(len(kept) // multiple * multiple, 1)]), self.at(rows[held])

    def loss(self, graph: Graph) -> float:
        """Mean cross-entropy of a row of logits, nats; with the labels, or the dense probabilities."""
        output, total, rows = target_output(graph), 0.0, 0
        for start in range(0, len(self), _AT_ONCE):
            inputs = [t[start : start + _AT_ONCE] for t in self.inputs]
            scores = graph.run(inputs)[output].float()
            scores = scores.reshape(-1, scores.shape[-1])
            if self.labels is not None:
                wanted = self.labels[start : start + _AT_ONCE].flatten()
            else:
                wanted = self.dense.run(inputs)[output].float().reshape(scores.shape).softmax(-1)
            total += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
            rows += len(scores)
        return total / rows


# -- gradients -------------------------------------------------------------------------------------


def _collect(
    graph: Graph, sites: dict[str, list[Site]], data: _Data, mini_batch: int, generator: torch.Generator
) -> tuple[Gradients, ...]:
    """Gradients of all samples for each weight."""
    size = min(mini_batch, len(data))
    at_once = max(1, _AT_ONCE // size) * size
    every = [site for all_of_it in sites.values() for site in all_of_it]
    collected: dict[str, Gradients] = {}
    for start in range(0, len(data), at_once):
        rows = data.at(torch.arange(start, min(start + at_once, len(data))))
        found: dict[str, Gradients] = {}
        for site, factors in site_gradients(graph, every, rows.inputs, rows.labels, generator):
            new = _gradients(factors)
            found[site.weight] = found[site.weight].plus(new) if site.weight in found else new
        for weight in sites:
            new = found.pop(weight).merged(size)
            if weight not in collected:
                collected[weight] = new.room(len(data) // size)
            collected[weight].put(start // size, new)
    return tuple(collected[weight] for weight in sites)


def _gradients(factors: SiteGradient) -> Gradients:
    x, delta = factors.x, factors.delta
    if len(x) == 1:
        return Gradients.of(x[0], delta[0])
    # a weight of several groups has its rows in the order of the groups
    product = (delta.mT @ x).transpose(0, 1).flatten(1, 2)
    return Gradients(product=product)
