"""CHITA: pruning by a quadratic model of the loss, from gradients of single samples (Benbaki et al. 2023).

The weights that go, and new values of those that stay, minimise the loss's quadratic model with the Fisher
information as Hessian (`compress.passes.solvers.chita`). Three things are left open by that:

- **Of which loss.** The paper takes the cross-entropy with the samples' labels. A trained model is sure of
  nearly all of these: its Fisher information consists of a few doubtful samples. So here gradients
  are those of the model's own predictions, at a `temperature` (`compress.gradients.site_gradients`): every
  sample tells what must not change, and no labels are needed. ``null`` gives the paper's.
- **Support, form of the Fisher information, and ridge.** By `method: best` four samples of five give
  gradients, and the loss of the pruned model on the fifth decides.
- **How often.** With several `stages` the sparsity rises exponentially, and gradients are taken anew at the
  weights of each (CHITA++, section 3.3). With `first_order` each of them is a step of training, too, down
  the gradient of the labels' loss; the last ones are nothing else.

`objective: layer` needs neither labels nor gradients: layer after layer, what the pruned one computes from
the inputs it will get comes close to what the original does from its own (`compress.passes.solvers.alps`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import Need, Statistics
from compress.data import Batch, CalibrationData
from compress.errors import CalibrationError, PassError
from compress.gradients import SiteGradient, fits, site_gradients, target_output
from compress.graph import Graph, Site
from compress.passes.prune_magnitude import by_alps, change, check_sparsity, counted, prunable, pruned
from compress.passes.solvers.chita import Method, Solution, solve
from compress.passes.solvers.fisher import Gradients
from compress.passes.solvers.masks import Pattern, Scope, parse_pattern
from compress.passes.solvers.ratios import Ratios
from compress.pipeline import Change, Context, Note, Pass, PassResult
from compress.statistics import HELD_OUT_EVERY

_AT_ONCE = 1 << 21
"""Elements of the factors at one site in one backward pass: patches of a convolution are the largest thing
in memory."""
_JUDGED = 64
"""Samples of one forward pass, where a loss is all that is wanted."""
_FISHER_ONLY = ("stages", "samples", "mini_batch", "method", "temperature", "first_order", "refit")
_RISING = 0.7
"""Of the stages, with `first_order`: in the others the sparsity stays."""
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
    pattern: str = Field(
        "unstructured", description='"unstructured"; with objective layer also "N:M" and "block:RxC"'
    )
    scope: Scope = Field("global", description="rank weights over all layers together, or in each layer")
    stages: int = Field(
        1, ge=1, description="gradients are taken anew for each; the sparsity rises exponentially"
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="calibration samples of a stage; all of them by default. The gradient of the loss "
        "(first_order) is always of all",
    )
    mini_batch: int = Field(1, ge=1, description="samples whose gradients are added up: less memory")
    method: Method = Field("best", description="how the support is found; best: as held-out samples say")
    temperature: float | None = Field(
        4.0,
        gt=0,
        description="gradients are those of the model's predictions at this temperature; "
        "null: of the loss with the samples' labels, as in the paper",
    )
    ridge: float | None = Field(
        None,
        gt=0,
        description="of the mean Fisher information; by default the best on held-out samples with method "
        "best or first_order, else 0.05; with objective layer of the mean square input, 0.03 by default",
    )
    first_order: bool = Field(
        False,
        description="do not take the model as converged: it is trained further while it is pruned",
    )
    refit: bool = Field(
        True, description="refit the survivors by least squares, layer after layer; not with first_order"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PruneChita:
        check_sparsity(self.pattern, self.sparsity)
        if self.pattern != "unstructured" and self.objective == "fisher":
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
        sites = prunable(self, graph, parse_pattern(self.pattern), notes)
        for site in graph.sites():
            if site.kind == "embedding" and site.weight in sites:
                reason = "an embedding has neither gradients nor inputs to go by; left dense"
                notes.append(Note(sites.pop(site.weight).name, reason))
        if not sites:
            return PassResult(graph, (), tuple(notes))
        if self.objective == "layer":
            result, changes = self._layer_wise(graph, context, sites)
        else:
            result, changes = self._by_fisher(graph, context, context.calibration, sites, notes)
        return PassResult(result, tuple(changes), tuple(notes))

    def _by_fisher(
        self,
        graph: Graph,
        context: Context,
        calibration: CalibrationData,
        sites: dict[str, Site],
        notes: list[Note],
    ) -> tuple[Graph, Sequence[Change]]:
        data = _Data.of(graph, calibration)
        if data.labels is None and (self.first_order or self.temperature is None):
            if self.first_order:
                raise CalibrationError(
                    "first_order trains the model on the labels of the calibration data, which has none",
                    expected="a class for each row of logits",
                    fix="give labels, or leave first_order out",
                )
            reason = "the calibration data has no class labels; they are sampled from the model"
            notes.append(Note("all", reason))
        result, solution = graph.copy(), None
        for stage in range(self.stages):
            solution = self._stage(result, tuple(sites), data, stage, context)
            for weight, values in zip(sites, solution.values, strict=True):
                old = result.weight(weight)
                result.set_weight(weight, values.view_as(old).to(old.dtype))
        assert solution is not None
        action = f"chita {solution.support} {solution.block}"
        if self.first_order or not self.refit:
            return result, [
                change(s, graph.weight(w), result.weight(w), None, action) for w, s in sites.items()
            ]

        def choose(site: Site, old: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
            values = result.weight(site.weight)
            return values, values != 0

        return pruned(graph, context, sites, choose, True, action)

    def _sparsity(self, stage: int) -> float:
        """After a stage, counted from 0."""
        assert self.sparsity is not None
        # where stages train, the last ones train what is left
        rising = max(1, round(_RISING * self.stages)) if self.first_order else self.stages
        return self.sparsity if stage + 1 >= rising else 1 - (1 - self.sparsity) ** ((stage + 1) / rising)

    def _stage(
        self, graph: Graph, names: tuple[str, ...], data: _Data, stage: int, context: Context
    ) -> Solution:
        chooses = self.method == "best" or self.first_order
        every, held_out = data.split() if chooses else (data, data)
        generator = torch.Generator().manual_seed(context.seed + stage)
        # noise of the gradient is noise of the step, which that of the curvature is hardly
        linear = _mean_gradient(graph, names, every, generator) if self.first_order else None
        fitting = every
        if self.samples is not None:
            judging = self.samples // HELD_OUT_EVERY
            fitting = every.part(stage, self.samples - judging * chooses)
            held_out = held_out.part(stage, max(judging, 1))
        fitting = fitting.multiple_of(self.mini_batch)
        if self.temperature is not None:
            fitting = replace(fitting, labels=None)
        collected = _collect(
            graph, names, fitting, self.mini_batch, generator, self.temperature or 1.0, context.max_memory
        )
        weights = tuple(graph.weight(name).flatten(1).float() for name in names)
        trial = graph.copy()

        def judge(values: tuple[Tensor, ...]) -> float:
            for name, new in zip(names, values, strict=True):
                old = graph.weight(name)
                trial.set_weight(name, new.view_as(old).to(old.dtype))
            return held_out.loss(trial)

        return solve(
            weights,
            collected,
            self._sparsity(stage),
            scope=self.scope,
            method=self.method,
            ridge=self.ridge,
            linear=linear,
            judge=judge if chooses else None,
        )

    def _layer_wise(
        self, graph: Graph, context: Context, sites: dict[str, Site]
    ) -> tuple[Graph, Sequence[Change]]:
        pattern = parse_pattern(self.pattern)
        counts = dict.fromkeys(sites, 0)
        if self.sparsity is not None and not pattern.m:
            ratios: Ratios = "global" if self.scope == "global" else "uniform"
            counts = counted(
                self.name, graph, context, sites, pattern, self.sparsity, ratios,
                lambda: [graph.weight(weight).abs().float() for weight in sites],
            )  # fmt: skip
        damping = _DAMPING if self.ridge is None else self.ridge

        def choose(site: Site, old: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
            assert statistics is not None
            return by_alps(old, statistics, pattern, counts[site.weight], damping)

        action = f"chita layer {self.scope if pattern == Pattern() else self.pattern}"
        needs: frozenset[Need] = frozenset({"diag", "H", "G"})
        return pruned(graph, context, sites, choose, False, action, needs)


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

    def part(self, stage: int, count: int) -> _Data:
        """The samples of a stage: the next ones, beginning anew at the end."""
        if count >= len(self):
            return self
        return self.at((torch.arange(count) + stage * count) % len(self))

    def multiple_of(self, size: int) -> _Data:
        """Without the last ones, if there are enough."""
        return self.at(torch.arange(len(self) // size * size or len(self)))

    def split(self) -> tuple[_Data, _Data]:
        """Samples to fit to; every fifth to judge by."""
        rows = torch.arange(len(self))
        held = (rows + 1) % HELD_OUT_EVERY == 0
        if not bool(held.any()):
            return self, self
        return self.at(rows[~held]), self.at(rows[held])

    def loss(self, graph: Graph) -> float:
        """Mean cross-entropy of a row of logits, nats; with the labels, or the dense probabilities."""
        output, total, rows = target_output(graph), 0.0, 0
        for start in range(0, len(self), _JUDGED):
            inputs = [t[start : start + _JUDGED] for t in self.inputs]
            scores = graph.run(inputs)[output].float()
            scores = scores.reshape(-1, scores.shape[-1])
            if self.labels is not None:
                wanted = self.labels[start : start + _JUDGED].flatten()
            else:
                wanted = self.dense.run(inputs)[output].float().reshape(scores.shape).softmax(-1)
            total += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
            rows += len(scores)
        return total / rows


# -- gradients -------------------------------------------------------------------------------------


def _collect(
    graph: Graph,
    names: tuple[str, ...],
    data: _Data,
    mini_batch: int,
    generator: torch.Generator,
    temperature: float,
    max_memory: int,
) -> tuple[Gradients, ...]:
    """Gradients of all samples for each weight."""
    size = min(mini_batch, len(data))
    collected: dict[str, Gradients] = {}
    for start, part in _parts(graph, names, data, size, generator, temperature):
        merged = {name: gradients.merged(size) for name, gradients in part.items()}
        if not collected:
            _check_memory(merged.values(), len(data) // size, size, max_memory)
            collected = {name: new.room(len(data) // size) for name, new in merged.items()}
        for name, new in merged.items():
            collected[name].put(start // size, new)
    return tuple(collected[name] for name in names)


def _mean_gradient(
    graph: Graph, names: tuple[str, ...], data: _Data, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Of the loss of a sample with its labels: float32 ``[O, K]`` each."""
    total = {name: torch.zeros_like(graph.weight(name).flatten(1), dtype=torch.float32) for name in names}
    for _, part in _parts(graph, names, data, 1, generator, 1.0):
        for name, gradients in part.items():
            total[name] += gradients.transposed(torch.ones(gradients.samples))
    return tuple(total[name].div_(len(data)) for name in names)


def _parts(
    graph: Graph,
    names: tuple[str, ...],
    data: _Data,
    size: int,
    generator: torch.Generator,
    temperature: float,
) -> Iterator[tuple[int, dict[str, Gradients]]]:
    """Gradients of a few samples at a time, a multiple of a number: the first sample's index, and for each
    weight the sum over all places where it is used."""
    sites = [site for site in graph.sites() if site.weight in names]
    start, at_once = 0, size
    while start < len(data):
        part = data.at(torch.arange(start, min(start + at_once, len(data))))
        found: dict[str, Gradients] = {}
        elements = 1
        for site, factors in site_gradients(graph, sites, part.inputs, part.labels, generator, temperature):
            elements = max(elements, (factors.x.numel() + factors.delta.numel()) // len(part))
            new = _gradients(factors)
            found[site.weight] = found[site.weight].plus(new) if site.weight in found else new
        yield start, found
        start += len(part)
        at_once = max(1, _AT_ONCE // (elements * size)) * size


def _check_memory(first: Iterable[Gradients], groups: int, size: int, max_memory: int) -> None:
    """Refuse before the work what does not fit: gradients are all needed at once, and not spilled."""
    each = sum(gradients.nbytes / gradients.samples for gradients in first)
    if groups * each > max_memory:
        fitting = int(max_memory / each) * size
        raise PassError(
            f"prune_chita: the gradients of {groups * size:,} samples take {groups * each / 1e6:,.1f} MB",
            expected=f"at most max_memory, {max_memory / 1e6:,.1f} MB: {fitting:,} samples of this model",
            fix="set samples, add up more of them by mini_batch, raise max_memory, or take objective: layer",
        )


def _gradients(factors: SiteGradient) -> Gradients:
    x, delta = factors.x, factors.delta
    if len(x) == 1:
        return Gradients.of(x[0], delta[0])
    # a weight of several groups has its rows in the order of the groups
    product = (delta.mT @ x).transpose(0, 1).flatten(1, 2)
    return Gradients(product=product)
