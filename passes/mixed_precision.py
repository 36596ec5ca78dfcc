"""Mixed precision: a format for every layer, chosen to do the least damage within a size.

1. Every weight is quantized in every format of the menu, with the calibration statistics and the solver
   that the final weights get: rounding without them misranks layers at 2 and 3 bits.
2. The damage of each is measured on samples held out from 1: the model runs with that one layer quantized,
   and its outputs are compared (`compress.sensitivity`). To first order damages add up; that one rises with
   precision can only be noise, which is removed (`monotone`).
3. The allocator finds the formats of least summed damage within the budget
   (`compress.passes.solvers.allocate`). Linear layers that read the same input (q, k and v; gate and up) get
   the same one, as runtimes fuse them.
4. Damages do not quite add up, least of all at 2 bits. So the most sensitive layers are measured again with
   all others in their new formats, and the choice is made once more. Of these two and every uniform format
   that fits, the one of least measured damage stays.
5. One sequential sweep quantizes the weights in the chosen formats, on all samples.

Source: the problem is that of HAWQ-V2 (Dong et al. 2020, section 3), with measured divergence in place of
their Hessian traces. `search: policy` is the search of FLIQS (Dotzel et al. 2023) over the same candidates
(`compress.passes.solvers.policy`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.calibration import Statistics, Update, output_error, sweep
from compress.encoding import EncodedWeight, IntEncoding
from compress.errors import PassError
from compress.graph import Graph, Site
from compress.menu import (
    Latency,
    Menu,
    Size,
    fused,
    is_sensitive,
    parse_format,
    parse_latency,
    parse_size,
)
from compress.passes.quantize_weights import Quantizer, quantized
from compress.passes.solvers.allocate import RUINED, allocate, monotone
from compress.passes.solvers.compose import Method, Scales
from compress.passes.solvers.policy import policy_search
from compress.pipeline import Change, Context, Note, Pass, PassResult
from compress.sensitivity import Damage, held_out, sample

_MEASURED = 200
"""Weights up to which every format is measured; beyond, one is, and the others are scaled from it."""
_AGAIN = 10
"""Layers measured again around the first solution."""


class MixedPrecision(Pass):
    """Choose a format for every layer, by measured damage, within a size."""

    name: ClassVar[str] = "mixed_precision"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )
    effective_bits: float | None = Field(
        None, gt=0, description="budget: mean stored bits of the targeted weights, scales included"
    )
    max_size: Size | None = Field(
        None, description='budget: bytes of all tensors of the model, such as 12000000 or "12MB"'
    )
    max_latency: Latency | None = Field(
        None,
        description="budget: milliseconds of all targeted layers for one sample, each measured alone in ONNX "
        'Runtime, or a ratio to float such as "0.7x"; may stand beside a size. Timings differ from run to '
        "run, and so may what is chosen",
    )
    formats: tuple[str, ...] = Field(
        ("int2 g64 asym", "int2 g32 asym", "int4 g128 asym", "int4 g32 asym", "int8 per row", "float"),
        min_length=1,
        description='the menu: "float", or bits, columns that share a scale, "asym" for zero points',
    )
    sensitive: tuple[str, ...] = Field(
        ("first", "head", "embedding"),
        description="layers of at least 8 bits: patterns as in targets, first (reads the model's input), "
        "head (gives its output)",
    )
    damage: Literal["auto", "kl", "error"] = Field(
        "auto",
        description="kl: divergence of the logits; error: squared error of the outputs; auto: kl where the "
        "model ends in a linear layer",
    )
    search: Literal["exact", "policy"] = Field(
        "exact",
        description="exact: the least summed damage of layers measured one by one; policy: search by "
        "reinforcement over whole choices, for comparison (sizes only, slower, rarely as good)",
    )
    scales: Scales = Field("search", description="as in quantize_weights")
    method: Method = Field("best", description="of the final weights, as in quantize_weights")

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_format(text)
        return value

    @model_validator(mode="after")
    def _a_budget(self) -> MixedPrecision:
        if self.effective_bits is not None and self.max_size is not None:
            raise ValueError("effective_bits and max_size are the same budget in two words; give one of them")
        if (self.effective_bits, self.max_size, self.max_latency) == (None, None, None):
            raise ValueError("a budget is needed: effective_bits, max_size or max_latency")
        if self.search == "policy" and self.max_latency is not None:
            raise ValueError("search: policy knows sizes only; leave max_latency out")
        return self

    def leaves(self) -> Sequence[object]:
        return [found for found in map(parse_format, self.formats) if found is not None]

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        problem = self.problem(graph, context, notes)
        if not problem.layers:
            return PassResult(graph.copy(), (), tuple(notes))
        found = problem.search(context) if self.search == "policy" else problem.choose(context)
        result, changes = self._quantize(graph, problem.layers, found.choice, context, notes)
        bits = 8 * found.nbytes / sum(layer.weights for layer in problem.layers)
        budget = f" of a budget of {problem.budget:,}" if math.isfinite(problem.budget) else ""
        notes.append(Note("", f"{found.nbytes:,} bytes{budget}: {bits:.3f} bits per weight"))
        if math.isfinite(problem.latency_budget):
            budget = f"{found.latency:.3f} ms of a budget of {problem.latency_budget:.3f}"
            notes.append(Note("", f"{budget}, layers measured one by one"))
        if problem.damage is None:
            words = "no calibration data: formats chosen by the relative error of each weight"
        else:
            what = "divergence in nats" if problem.damage.measure == "kl" else "relative squared error"
            words = (
                f"{what} on {problem.samples} held-out samples: predicted {found.predicted:.3g}, "
                f"measured {found.measured:.3g}, of the final weights {problem.damage.of(result):.3g}"
            )
        notes.append(Note("", words))
        return PassResult(result, tuple(changes), tuple(notes))

    def problem(self, graph: Graph, context: Context, notes: list[Note]) -> Problem:
        """Every layer in every format it may take, with bytes and measured damage.

        Args:
            graph, context: as for `run`.
            notes: is told of the layers that have no choice, and why.

        Raises:
            PassError: the budget is below what the smallest formats take, or latencies cannot be measured.
        """
        layers = self._layers(graph, notes)
        problem = Problem(graph, layers, self._budget(graph, layers), fused(graph, layers))
        self._check(problem)
        if context.calibration is None:
            self._quantize_each(graph, layers, None, context)
            for layer in layers:
                layer.damages = _monotone(layer, [error**2 for error in layer.errors])
        elif layers:
            kept, held = held_out(graph, context.calibration)
            self._quantize_each(graph, layers, kept, context)
            problem.samples = len(held)
            problem.damage = Damage(graph, held, None if self.damage == "auto" else self.damage)
            _measure(graph, layers, problem.damage, context)
        if self.max_latency is not None and layers:
            self._measure_latency(problem, context)
        return problem

    # -- what there is to choose from --------------------------------------------------------------

    def _layers(self, graph: Graph, notes: list[Note]) -> list[Menu]:
        """One for each weight, with the formats it may take; a Note for each that has no choice."""
        for pattern in self.sensitive:
            if pattern not in ("first", "head", "linear", "conv", "embedding"):
                self.model_copy(update={"targets": (pattern,)}).select(graph)  # says what matches nothing
        sites: dict[str, list[Site]] = {}
        for site in graph.sites():
            sites.setdefault(site.weight, []).append(site)
        layers = []
        for weight in dict.fromkeys(site.weight for site in self.select(graph)):
            readers = sites[weight]
            if weight in graph.encodings:
                notes.append(Note(readers[0].name, f"already {graph.encodings[weight].encoding}"))
                continue
            value = graph.tensors[weight]
            if not value.is_floating_point():
                notes.append(Note(readers[0].name, f"{value.dtype} is not a floating-point weight"))
                continue
            layer = Menu(readers, value)
            least = 8 if any(is_sensitive(graph, site, self.sensitive) for site in readers) else 0
            for format in map(parse_format, self.formats):
                if format is None or (format.bits >= least and layer.takes(format)):
                    layer.add(format)
            if not layer.formats:
                layer.add(None)
            if layer.formats == [None]:
                notes.append(
                    Note(readers[0].name, "no format of the menu fits or is worth it; left as it is")
                )
            layers.append(layer)
        return layers

    def _budget(self, graph: Graph, layers: Sequence[Menu]) -> float:
        """Bytes for the targeted weights."""
        if self.effective_bits is None and self.max_size is None:
            return math.inf
        if self.effective_bits is not None:
            return int(self.effective_bits * sum(layer.weights for layer in layers) / 8)
        assert self.max_size is not None
        return parse_size(self.max_size) - (graph.nbytes - sum(layer.nbytes for layer in layers))

    def _check(self, problem: Problem) -> None:
        """That the budget can be met at all."""
        least = sum(min(layer.costs) for layer in problem.layers)
        if least <= problem.budget:
            return
        weights = sum(layer.weights for layer in problem.layers)
        floor = f"or fewer layers of at least 8 bits; now sensitive is {', '.join(self.sensitive)}"
        raise PassError(
            f"mixed_precision: the budget is {problem.budget:,} bytes for the targeted weights, and the "
            f"smallest formats take {least:,} ({8 * least / weights:.2f} bits per weight)",
            expected="a larger effective_bits or max_size",
            fix=floor if self.sensitive else "",
        )

    def _measure_latency(self, problem: Problem, context: Context) -> None:
        """Fill in the latencies, and the budget for them."""
        if context.latency is None:
            raise PassError(
                "max_latency is set, but there is no runtime to measure in", fix="use compress.run"
            )
        inputs = sample(problem.graph, context.calibration)
        context.progress.start(f"{self.name}: measuring the latency of each layer", 0)
        found = context.latency(
            problem.graph, inputs, {layer.name: layer.encoded for layer in problem.layers}
        )
        plain = 0.0
        for layer in problem.layers:
            layer.latencies = found[layer.name]
            options = zip(layer.latencies, layer.formats, strict=True)
            plain += next((ms for ms, format in options if format is None), max(layer.latencies))
        assert self.max_latency is not None
        problem.latency_budget = parse_latency(self.max_latency, plain)

    # -- quantizing --------------------------------------------------------------------------------

    def _quantize_each(
        self,
        graph: Graph,
        layers: Sequence[Menu],
        batches: Iterable[Sequence[Tensor]] | None,
        context: Context,
    ) -> None:
        """Every weight in every format, each as if it were the only one."""
        by_weight = {layer.name: layer for layer in layers}
        context.progress.start(f"{self.name}: quantizing each layer in each format", len(layers))

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
            layer = by_weight[site.weight]
            for format in layer.formats:
                new = None if format is None else self._draft(weight, statistics, format)
                layer.encoded.append(new)
                layer.errors.append(0.0 if new is None else output_error(weight, new.decode(), statistics))

        sites = [layer.sites[0] for layer in layers]
        sweep(
            graph,
            sites,
            visit,
            batches=batches,
            needs=frozenset({"diag"} if self.method == "rtn" else {"diag", "H"}),
            max_memory=context.max_memory,
            progress=context.progress,
        )

    def _quantize(
        self,
        graph: Graph,
        layers: Sequence[Menu],
        choice: Sequence[int],
        context: Context,
        notes: list[Note],
    ) -> tuple[Graph, list[Change]]:
        """The one sequential sweep that makes the final weights."""
        formats = {layer.name: layer.formats[o] for layer, o in zip(layers, choice, strict=True)}
        for layer in layers:
            if formats[layer.name] is None and layer.formats != [None]:
                notes.append(Note(layer.sites[0].name, "stays float: worth its bytes here"))
        quantizer = Quantizer(graph, self.scales, self.method)

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Update:
            format = formats[site.weight]
            assert format is not None
            return quantizer.update(site, weight, statistics, format)

        sites = [layer.sites[0] for layer in layers if formats[layer.name] is not None]
        context.progress.start(f"{self.name}: quantizing in the chosen formats", len(sites))
        result = context.sweep(graph, sites, visit, quantizer.needs)
        notes += quantizer.notes
        return result, quantizer.changes

    def _draft(self, weight: Tensor, statistics: Statistics | None, format: IntEncoding) -> EncodedWeight:
        """Good enough to compare formats by."""
        method: Method = "descent" if self.method == "best" else self.method
        # at 8 bits what the solver adds to rounding is far below what decides between formats
        return quantized(
            weight, statistics, format, scales=self.scales, method="rtn" if format.bits >= 8 else method
        )


# -- all layers together ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A choice of formats.

    Attributes:
        choice: index into the formats of each layer.
        nbytes: stored bytes of the layers.
        latency: their milliseconds; 0 where it was not measured.
        predicted: sum of the damages of the layers alone.
        measured: damage of all of them together; NaN without data.
    """

    choice: tuple[int, ...]
    nbytes: int
    latency: float
    predicted: float
    measured: float


@dataclass
class Problem:
    """Layers, the bytes they may take together, and how their damage is measured.

    Attributes:
        graph: with float weights.
        layers: the weights and their formats.
        budget: bytes for all of them; may be infinite.
        latency_budget: milliseconds for all of them; may be infinite.
        tied: indices of layers that share a format.
        damage: None without data.
        samples: how many it is measured on.
    """

    graph: Graph
    layers: list[Menu]
    budget: float
    tied: list[list[int]]
    damage: Damage | None = None
    samples: int = 0
    latency_budget: float = math.inf

    def choose(self, context: Context) -> Found:
        """The choice of least measured damage within the budget; of least summed damage without data."""
        alone = [layer.damages for layer in self.layers]
        first = self._solve(alone)
        if self.damage is None:
            return self._found(first, math.nan)
        measured = {choice: self.damage.of(self.at(choice)) for choice in [first, *self._uniform()]}
        second = self._solve(_measured_again(self, first, self.damage, context))
        if second not in measured:
            measured[second] = self.damage.of(self.at(second))
        best = min(measured, key=measured.__getitem__)
        return self._found(best, measured[best])

    def search(self, context: Context) -> Found:
        """The choice of least damage that a policy search finds, without a look at single layers."""

        def measure(choice: tuple[int, ...]) -> float:
            context.progress.step("")
            if self.damage is None:
                return sum(layer.damages[o] for layer, o in zip(self.layers, choice, strict=True))
            return min(self.damage.of(self.at(choice)), RUINED)

        costs = [layer.costs for layer in self.layers]
        smallest = [row.index(min(row)) for row in costs]
        context.progress.start("mixed_precision: searching for formats", 0)
        choice = policy_search(measure, costs, self.budget, start=smallest, tied=self.tied, seed=context.seed)
        return self._found(choice, math.nan if self.damage is None else measure(choice))

    def at(self, choice: Sequence[int]) -> Graph:
        """The graph with every layer in its format, as quantized alone; weights are plain values."""
        graph = self.graph.copy()
        for layer, option in zip(self.layers, choice, strict=True):
            encoded = layer.encoded[option]
            if encoded is not None:
                graph.set_weight(layer.name, encoded.decode())
        return graph

    def uniform(self, format: IntEncoding) -> tuple[int, ...]:
        """All layers in one format, or in the next more precise one they can take."""
        return tuple(layer.nearest(format) for layer in self.layers)

    def nbytes(self, choice: Sequence[int]) -> int:
        return sum(layer.costs[o] for layer, o in zip(self.layers, choice, strict=True))

    def latency(self, choice: Sequence[int]) -> float:
        pairs = zip(self.layers, choice, strict=True)
        return sum(layer.latencies[o] for layer, o in pairs if layer.latencies)

    def _solve(self, damages: Sequence[Sequence[float]]) -> tuple[int, ...]:
        costs = [layer.costs for layer in self.layers]
        latencies = [layer.latencies for layer in self.layers]
        try:
            if math.isinf(self.latency_budget):
                return allocate(damages, costs, self.budget, tied=self.tied).choice
            if math.isinf(self.budget):
                return allocate(damages, latencies, self.latency_budget, tied=self.tied).choice
            limit = self.latency_budget
            found = allocate(
                damages, costs, self.budget, second=latencies, second_budget=limit, tied=self.tied
            )
            return found.choice
        except ValueError as error:
            raise PassError(
                f"mixed_precision: no formats are within max_latency ({self.latency_budget:.3f} ms): {error}",
                expected="a larger max_latency" + (" or size" if math.isfinite(self.budget) else ""),
            ) from error

    def _uniform(self) -> list[tuple[int, ...]]:
        formats = dict.fromkeys(f for layer in self.layers for f in layer.formats if f is not None)
        return [
            choice
            for choice in map(self.uniform, formats)
            if self.nbytes(choice) <= self.budget and self.latency(choice) <= self.latency_budget
        ]

    def _found(self, choice: tuple[int, ...], measured: float) -> Found:
        predicted = sum(layer.damages[o] for layer, o in zip(self.layers, choice, strict=True))
        return Found(choice, self.nbytes(choice), self.latency(choice), predicted, measured)


# -- measuring and choosing ------------------------------------------------------------------------


def _measure(graph: Graph, layers: Sequence[Menu], damage: Damage, context: Context) -> None:
    """Fill in the damages."""
    choosing = [layer for layer in layers if any(new is not None for new in layer.encoded)]
    # one format stands for all where there are too many: for the others it is scaled by their output error
    alone = len(choosing) > _MEASURED
    options: dict[str, list[int]] = {}
    for layer in choosing:
        quantized = [o for o, new in enumerate(layer.encoded) if new is not None]
        options[layer.name] = [max(quantized, key=layer.errors.__getitem__)] if alone else quantized
    context.progress.start("mixed_precision: measuring the damage of each layer", len(choosing))
    found = damage.of_each(
        graph,
        {layer.name: [layer.replacement(o) for o in options[layer.name]] for layer in choosing},
        context.progress,
    )
    for layer in layers:
        damages = [0.0] * len(layer.formats)
        if layer.name in found and alone:
            (option,), (value,) = options[layer.name], found[layer.name]
            scale = value / max(layer.errors[option], 1e-30) ** 2
            damages = [scale * error**2 for error in layer.errors]
        elif layer.name in found:
            for option, value in zip(options[layer.name], found[layer.name], strict=True):
                damages[option] = value
        layer.damages = _monotone(layer, damages)


def _monotone(layer: Menu, damages: Sequence[float]) -> list[float]:
    """Damages above that of float, without the noise that makes them rise with precision."""
    base = next((d for d, f in zip(damages, layer.formats, strict=True) if f is None), 0.0)
    base = base if math.isfinite(base) else 0.0
    return monotone([d - base for d in damages], layer.by_precision())


def _measured_again(
    problem: Problem, choice: Sequence[int], damage: Damage, context: Context
) -> list[list[float]]:
    """Damages, those of the most sensitive layers and of layers tied to them with all others as chosen."""
    layers = problem.layers
    now = [layer.damages[option] for layer, option in zip(layers, choice, strict=True)]
    worst = {i for i in sorted(range(len(layers)), key=lambda i: -now[i])[:_AGAIN] if now[i] > 0}
    worst |= {i for group in problem.tied if not worst.isdisjoint(group) for i in group}
    context.progress.start("mixed_precision: measuring again around the solution", len(worst))
    every = {i: [layers[i].replacement(o) for o in range(len(layers[i].formats))] for i in sorted(worst)}
    found = damage.of_each(
        problem.at(choice), {layers[i].name: new for i, new in every.items()}, context.progress
    )
    return [
        _monotone(layer, found[layer.name]) if i in worst else layer.damages for i, layer in enumerate(layers)
    ]
