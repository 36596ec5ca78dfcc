"""Decomposition: layers become chains of smaller ones, with the forms and ranks that do the least damage.

1. Every layer gets a menu: dense, and decompositions of several methods at several ranks, fitted to the
   layer's inputs (`compress.passes.solvers.forms`). A form that would not save parameters and operations is
   none.
2. The damage of each is measured on samples held out from 1: the model runs with that one layer decomposed
   (`compress.sensitivity`). What another form beats in cost and output error is dropped before that.
3. The allocator finds the forms of least summed damage within a number of parameters, of operations, or of
   measured milliseconds (`compress.passes.solvers.allocate`). Damages do not quite add up, so the most
   sensitive layers are measured again around the solution, and the choice is made once more. Of these two,
   the same reduction everywhere, and equal errors everywhere, the one of least measured damage stays.
4. One sequential sweep makes the final chains, each for the inputs it will really get: it decomposes the
   least-squares target where held-out samples agree, and the bias takes what is left of the mean.

What results are ordinary linear layers and convolutions: later passes train or quantize them like any other.

Sources: SVD-LLM (arXiv 2403.07378) for the whitening, ALDS (arXiv 2107.11442) for slices and for `minimax`,
Tucker-2 (arXiv 1511.06530), matrix product operators as in CompactifAI (arXiv 2401.14109).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, fx

from compress.calibration import Statistics, Update, output_error, sweep
from compress.chain import Chain, MatrixProduct
from compress.chain_menu import ChainMenu, ChainOption
from compress.cores import CoreWeight
from compress.errors import PassError
from compress.graph import Graph, Site
from compress.layers import alone, put
from compress.menu import Latency, Size, parse_latency, parse_size
from compress.passes.quantize_weights import least_squares_target, mean_shift
from compress.passes.solvers.alds import minimax
from compress.passes.solvers.allocate import allocate, monotone
from compress.passes.solvers.forms import LARGEST_MPO, Decomposer, Form, Method
from compress.pipeline import Change, Context, Note, Pass, PassResult
from compress.sensitivity import Damage, held_out, sample

_RATES = (0.06, 0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.55, 0.67, 0.8, 0.9)
"""Parameters of the forms on a menu, as fractions of the dense layer's."""
_FINE = tuple(i / 50 for i in range(2, 48))
"""The same where nothing has to be measured."""
_OPTIONS = 12
"""Forms of a layer that are measured."""
_AGAIN = 10
"""Layers measured again around the first solution."""


class Decompose(Pass):
    """Replace layers by chains of smaller ones: low rank, Tucker, matrix product operators."""

    name: ClassVar[str] = "decompose"

    method: Literal["auto", "svd", "alds", "tucker", "tt", "cp", "mpo", "kronecker"] = Field(
        "auto",
        description="svd; alds: svd in slices of the input; tucker: convolutions as 1x1, kernel, 1x1; tt, cp "
        "with a column and a row of the kernel; mpo: linear layers as matrix product operators; kronecker: "
        "as products of two matrices; auto: the best of svd, alds, tucker and mpo, layer by layer",
    )
    parameter_reduction: float | None = Field(
        None, gt=0, lt=1, description="budget: fraction of the targeted parameters to remove"
    )
    max_size: Size | None = Field(
        None, description='budget: bytes of all tensors of the model, such as 12000000 or "12MB"'
    )
    flop_reduction: float | None = Field(
        None, gt=0, lt=1, description="budget: fraction of the targeted layers' operations to remove"
    )
    max_latency: Latency | None = Field(
        None,
        description="budget: milliseconds of all targeted layers for one sample, each measured alone in ONNX "
        'Runtime, or a ratio to dense such as "0.7x"; may stand beside a size. Timings differ from run to '
        "run, and so may what is chosen",
    )
    allocation: Literal["damage", "minimax", "uniform"] = Field(
        "damage",
        description="damage: least measured damage to the outputs; minimax: equal error bounds (ALDS); "
        "uniform: the same reduction in each layer",
    )
    rank_multiple: int = Field(8, ge=1, description="ranks are multiples of it")
    storage: bool = Field(
        False,
        description="mpo and kronecker: store the cores of layers that as chains would take more operations "
        "than dense ones, and contract them when the model is loaded: smaller, as fast as dense",
    )
    bias_correction: bool = Field(
        True,
        description="let the bias take the mean of the error, given calibration data; adds a missing bias",
    )
    damage: Literal["auto", "kl", "error"] = Field(
        "auto",
        description="kl: divergence of the logits; error: squared error of the outputs; auto: kl where the "
        "model ends in a linear layer",
    )

    @model_validator(mode="after")
    def _a_budget(self) -> Decompose:
        if self.parameter_reduction is not None and self.max_size is not None:
            raise ValueError(
                "parameter_reduction and max_size are the same budget in two words; give one of them"
            )
        if self.flop_reduction is not None and self.max_latency is not None:
            raise ValueError("flop_reduction and max_latency are both about speed; give one of them")
        given = (self.parameter_reduction, self.max_size, self.flop_reduction, self.max_latency)
        if given == (None,) * 4:
            raise ValueError(
                "a budget is needed: parameter_reduction, max_size, flop_reduction or max_latency"
            )
        if self.allocation != "damage" and self.parameter_reduction is None and self.max_size is None:
            raise ValueError(
                f"allocation: {self.allocation} knows sizes only; give parameter_reduction or max_size"
            )
        if self.allocation == "minimax" and self.method in ("tt", "cp"):
            raise ValueError(f"there is no error bound for {self.method}; choose another allocation")
        if self.allocation != "damage" and (self.flop_reduction or self.max_latency):
            raise ValueError(f"allocation: {self.allocation} knows sizes only; leave the other budget out")
        if self.storage and self.method not in ("mpo", "kronecker"):
            raise ValueError("storage is about matrix products; give method: mpo or kronecker")
        if self.storage and (self.flop_reduction or self.max_latency):
            raise ValueError("what is stored as cores is as fast as dense; leave storage or that budget out")
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        notes: list[Note] = []
        layers = self._layers(graph, notes, context.calibration is not None)
        if not layers:
            return PassResult(graph.copy(), (), tuple(notes))
        problem = self._problem(graph, layers, context)
        choice, words = problem.choose(self.allocation, context)
        for layer, option in zip(layers, choice, strict=True):
            if len(layer.options) == 1:
                notes.append(Note(layer.site.name, f"{layer.declined}; left dense"))
            elif layer.options[option].form is None:
                notes.append(Note(layer.site.name, "stays dense: worth its cost here"))
        result, changes = self._decompose(graph, problem, choice, context)
        notes += [Note("", text) for text in (*problem.costs(choice), *words)]
        if problem.damage is not None and changes:
            notes.append(Note("", f"damage of the final weights {problem.damage.of(result):.3g}"))
        return PassResult(result, tuple(changes), tuple(notes))

    # -- what there is to choose from --------------------------------------------------------------

    def _layers(self, graph: Graph, notes: list[Note], calibrated: bool) -> list[ChainMenu]:
        unshared = graph.unshared()
        layers = []

        def added(site: Site) -> int:
            corrected = self.bias_correction and calibrated and graph.owns_bias(site)
            return graph.shape(site.weight)[0] if corrected and graph.bias(site) is None else 0

        for site in self.select(graph):
            reason = self._declined(graph, site, site.weight in unshared)
            if reason:
                notes.append(Note(site.name, f"{reason}; left as it is"))
            else:
                layers.append(ChainMenu(site, graph.tensors[site.weight], added(site)))
        return layers

    def _declined(self, graph: Graph, site: Site, alone: bool) -> str:
        if site.kind == "embedding":
            return "an embedding is looked up, not multiplied"
        if site.weight in graph.encodings:
            return f"already {graph.encodings[site.weight].encoding}; decompose before quantizing"
        if not alone:
            return "the weight is shared with another operator"
        value = graph.node(site.node).args[1]
        if not graph.tensors[site.weight].is_floating_point():
            return f"{graph.tensors[site.weight].dtype} is not a floating-point weight"
        if not isinstance(value, fx.Node) or value.op != "get_attr" or len(value.users) > 1:
            return "the weight is read through another operator"
        if site.groups > 1:
            return f"a convolution in {site.groups} groups"
        if bool((graph.tensors[site.weight] == 0).double().mean() > 0.25):
            return "the weight is pruned, which factors would undo"
        return ""

    def _methods(self, site: Site, weights: int) -> tuple[Method, ...]:
        if self.method != "auto":
            return (self.method,)
        if site.kind == "conv":
            return ("svd", "alds", "tucker")
        return ("svd", "alds", "mpo") if weights <= LARGEST_MPO else ("svd", "alds")

    def _problem(self, graph: Graph, layers: list[ChainMenu], context: Context) -> _Problem:
        problem = _Problem(graph, layers)
        inputs = sample(graph, context.calibration)
        by_weight = {layer.site.weight: layer for layer in layers}
        for site, dense, x in alone(graph, inputs, by_weight):
            layer = by_weight[site.weight]
            layer.alone, layer.x = dense, x.to("meta")
            layer.options = [layer.dense()]
        batches: Iterable[Sequence[Tensor]] | None = None
        if context.calibration is not None:
            batches, held = held_out(graph, context.calibration)
            problem.damage = Damage(graph, held, None if self.damage == "auto" else self.damage)
            problem.samples = len(held)
        context.progress.start(f"{self.name}: decomposing each layer in each form", len(layers))

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
            layer = by_weight[site.weight]
            self._fill(layer, weight, statistics)
            # drafts of all layers are several times the model
            for option in layer.options:
                if option.chain is not None:
                    problem.drafted += option.nbytes
                    if problem.drafted > context.max_memory:
                        option.chain = option.chain.on_disk()

        sweep(
            graph, [layer.site for layer in layers], visit, batches=batches, needs=frozenset({"diag", "H"}),
            max_memory=context.max_memory, progress=context.progress,
        )  # fmt: skip
        if self.allocation == "damage":
            problem.measure(context)
        self._budgets(problem, context, inputs)
        return problem

    def _fill(self, layer: ChainMenu, weight: Tensor, statistics: Statistics | None) -> None:
        """The menu of one layer."""
        H = None if statistics is None or statistics.H is None else statistics.H[0]
        decomposer = Decomposer(weight.float(), H)
        measured = self.allocation == "damage"
        dense = layer.options[0]
        forms: dict[Form, None] = {}
        for rate in _RATES if measured else _FINE:
            for method in self._methods(layer.site, weight.numel()):
                found = decomposer.forms(method, rate * dense.parameters, self.rank_multiple)
                forms.update(dict.fromkeys(found))
        if not forms:
            layer.declined = "no form of fewer parameters" + (
                "" if self.rank_multiple == 1 else f" with ranks that are multiples of {self.rank_multiple}"
            )
        for form in forms:
            option = layer.option(form, decomposer.hollow(form))
            if self.storage and option.operations >= dense.operations:
                option.stored, option.operations = True, dense.operations
            slower = option.operations >= dense.operations and not option.stored
            if option.parameters >= dense.parameters or slower:
                layer.declined = "no form has both fewer parameters and fewer operations"
                continue
            if measured:
                option.chain = decomposer.fit(form, sweeps=0 if form.sites else 1).to(weight.dtype)
                option.error = output_error(weight, option.chain.decode(), statistics)
            elif self.allocation == "minimax" or self.method == "auto":
                option.bound = decomposer.bound(form)
            layer.options.append(option)
        if measured:
            by_size = self.parameter_reduction is not None or self.max_size is not None
            by_speed = self.flop_reduction is not None or self.max_latency is not None
            layer.thin(_OPTIONS, by_size, by_speed)

    def _budgets(self, problem: _Problem, context: Context, inputs: Sequence[Tensor]) -> None:
        """Fill in what the choice may cost."""
        dense = [layer.options[0] for layer in problem.layers]
        if self.parameter_reduction is not None:
            problem.size_budget = (1 - self.parameter_reduction) * sum(o.parameters for o in dense)
        elif self.max_size is not None:
            problem.size = "nbytes"
            over = problem.graph.nbytes - parse_size(self.max_size)
            problem.size_budget = sum(o.nbytes for o in dense) - over
        if self.flop_reduction is not None:
            problem.operations = (1 - self.flop_reduction) * sum(o.operations for o in dense)
        elif self.max_latency is not None:
            problem.measure_latency(context, inputs)
            plain = sum(o.latency for o in dense)
            problem.latency = parse_latency(self.max_latency, plain)
        total, least = (sum(map(by, problem.sizes())) for by in (max, min))
        if least > problem.size_budget:
            what = "bytes" if problem.size == "nbytes" else "parameters"
            raise PassError(
                f"decompose: {total:,} {what} are targeted; the budget leaves "
                f"{max(0, int(problem.size_budget)):,} of them, and the smallest forms take {least:,}",
                expected="a smaller parameter_reduction or a larger max_size",
                fix="a smaller rank_multiple gives smaller forms" if self.rank_multiple > 1 else "",
            )

    # -- the final weights -------------------------------------------------------------------------

    def _decompose(
        self, graph: Graph, problem: _Problem, choice: Sequence[int], context: Context
    ) -> tuple[Graph, list[Change]]:
        """The one sequential sweep, and chains in the places of layers."""
        chosen = {m.site.weight: m.options[o] for m, o in zip(problem.layers, choice, strict=True)}
        sites = [m.site for m in problem.layers if chosen[m.site.weight].form is not None]
        corrected = {s.weight for s in sites if self.bias_correction and graph.owns_bias(s)}
        forms: dict[str, Chain | CoreWeight] = {}
        changes: list[Change] = []
        context.progress.start("decompose: decomposing in the chosen forms", len(sites))

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Update:
            centred = statistics
            if statistics is not None and site.weight in corrected:
                centred = statistics.centred
            H = None if centred is None or centred.H is None else centred.H[0]
            target = least_squares_target(weight, centred)
            chain = Decomposer(target, H).fit(chosen[site.weight].form).to(weight.dtype)
            new = chain.decode()
            forms[site.weight] = chain
            if isinstance(chain, MatrixProduct) and chosen[site.weight].stored:
                forms[site.weight] = CoreWeight.of(chain)
            error = output_error(weight, new, centred)
            changes.append(_change(site, weight, forms[site.weight], error))
            shift = None
            if statistics is not None and site.weight in corrected:
                shift = mean_shift(weight, new, statistics)
            return Update(new, shift)

        result = context.sweep(graph, sites, visit, frozenset({"diag", "H", "G", "mean", "held_out"}))
        for site in sites:
            made = forms[site.weight]
            if isinstance(made, CoreWeight):
                result.set_encoding(site.weight, made)
            else:
                put(result, site, made)
        return result, changes


def _change(site: Site, weight: Tensor, form: Chain | CoreWeight, error: float) -> Change:
    before = weight.numel() * weight.element_size()
    return Change(
        site=site.name,
        weight=site.weight,
        action=str(form),
        bits=8 * form.nbytes / weight.numel(),
        sparsity=0.0,
        bytes_before=before,
        bytes_after=form.nbytes,
        error=error,
    )


# -- all layers together ----------------------------------------------------------------------------


@dataclass
class _Problem:
    """Layers, what they may cost together, and how their damage is measured.

    Attributes:
        samples: held out, for the damage.
        drafted: bytes of the drafts of all options.
        size: what of an option `size_budget` is for, "parameters" or "nbytes".
        size_budget, operations, latency: for all layers together.
    """

    graph: Graph
    layers: list[ChainMenu]
    damage: Damage | None = None
    samples: int = 0
    drafted: int = 0
    size: str = "parameters"
    size_budget: float = math.inf
    operations: float = math.inf
    latency: float = math.inf

    def measure(self, context: Context) -> None:
        """Damages of all options; without data, their squared errors."""
        for layer in self.layers:
            for option in layer.options:
                option.damage = option.error**2
        if self.damage is None:
            return
        choosing = {i: layer.options[1:] for i, layer in enumerate(self.layers) if len(layer.options) > 1}
        context.progress.start("decompose: measuring the damage of each layer", len(choosing))
        found = self._measured(self.graph, choosing, context)
        for i, options in choosing.items():
            for option, value in zip(options, _monotone(options, found[i]), strict=True):
                option.damage = value

    def measure_latency(self, context: Context, inputs: Sequence[Tensor]) -> None:
        """Fill in the milliseconds; what is slower than dense is no option."""
        if context.latency is None:
            raise PassError(
                "max_latency is set, but there is no runtime to measure in", fix="use compress.run"
            )
        context.progress.start("decompose: measuring the latency of each layer", 0)
        chains = {layer.site.weight: [o.chain for o in layer.options] for layer in self.layers}
        found = context.latency(self.graph, inputs, chains)
        for layer in self.layers:
            for option, ms in zip(layer.options, found[layer.site.weight], strict=True):
                option.latency = ms
            dense, *rest = layer.options
            layer.options = [dense, *(o for o in rest if o.latency < dense.latency)]
            if rest and len(layer.options) == 1:
                layer.declined = "no form is faster"

    def choose(self, how: str, context: Context) -> tuple[tuple[int, ...], list[str]]:
        """Index of the option of each layer, and what there is to say about it."""
        if how == "minimax":
            return self._minimax(), []
        if how == "uniform":
            return self._uniform(), []
        first = self._solve([[o.damage for o in layer.options] for layer in self.layers])
        if self.damage is None:
            return first, ["no calibration data: forms chosen by the relative error of each weight"]
        tried = {first: self.damage.of(self._at(first))}
        second = self._solve(self._again(first, context))
        others = [second]
        if math.isfinite(self.size_budget):
            others += [self._uniform(), self._minimax()]
        for choice in others:
            if choice not in tried and self._within(choice):
                tried[choice] = self.damage.of(self._at(choice))
        best = min(tried, key=tried.__getitem__)
        predicted = sum(layer.options[o].damage for layer, o in zip(self.layers, best, strict=True))
        what = "divergence in nats" if self.damage.measure == "kl" else "relative squared error"
        words = f"predicted {predicted:.3g}, measured {tried[best]:.3g}"
        return best, [f"{what} on {self.samples} held-out samples: {words}"]

    def costs(self, choice: Sequence[int]) -> list[str]:
        """What the choice costs, in words."""
        chosen = [layer.options[o] for layer, o in zip(self.layers, choice, strict=True)]
        dense = [layer.options[0] for layer in self.layers]
        said = []
        for what in ("parameters", "operations"):
            now, before = (sum(getattr(o, what) for o in options) for options in (chosen, dense))
            said.append(f"{now:,} {what} of {before:,}: {100 * (1 - now / max(1, before)):.1f} % removed")
        if math.isfinite(self.latency):
            now = sum(o.latency for o in chosen)
            said.append(f"{now:.3f} ms of a budget of {self.latency:.3f}, layers measured one by one")
        return said

    def _at(self, choice: Sequence[int]) -> Graph:
        """The graph with every layer in its form, as drafted; weights are plain values."""
        graph = self.graph.copy()
        for layer, option in zip(self.layers, choice, strict=True):
            chain = layer.options[option].chain
            if chain is not None:
                graph.set_weight(layer.site.weight, chain.decode())
        return graph

    def _measured(
        self, graph: Graph, options: dict[int, list[ChainOption]], context: Context
    ) -> dict[int, list[float]]:
        assert self.damage is not None
        replacements: dict[str, list[Any]] = {
            self.layers[i].site.weight: [o.chain or self.layers[i].weight for o in row]
            for i, row in options.items()
        }
        found = self.damage.of_each(graph, replacements, context.progress)
        return {i: found[self.layers[i].site.weight] for i in options}

    def _again(self, choice: Sequence[int], context: Context) -> list[list[float]]:
        """Damages, those of the most sensitive layers with all others as chosen."""
        now = [layer.options[o].damage for layer, o in zip(self.layers, choice, strict=True)]
        worst = [i for i in sorted(range(len(now)), key=lambda i: -now[i])[:_AGAIN] if now[i] > 0]
        context.progress.start("decompose: measuring again around the solution", len(worst))
        found = self._measured(self._at(choice), {i: self.layers[i].options for i in sorted(worst)}, context)
        damages = [[o.damage for o in layer.options] for layer in self.layers]
        for i, values in found.items():
            damages[i] = _monotone(self.layers[i].options, [v - values[0] for v in values])
        return damages

    def _solve(self, damages: Sequence[Sequence[float]]) -> tuple[int, ...]:
        speed, limit = (
            ("latency", self.latency) if math.isfinite(self.latency) else ("operations", self.operations)
        )
        try:
            if math.isinf(limit):
                return allocate(damages, self.sizes(), self.size_budget).choice
            if math.isinf(self.size_budget):
                return allocate(damages, self._table(speed), limit).choice
            found = allocate(
                damages, self.sizes(), self.size_budget, second=self._table(speed), second_budget=limit
            )
            return found.choice
        except ValueError as error:
            raise PassError(
                f"decompose: no forms are within the budget for {speed}: {error}", expected="a larger budget"
            ) from error

    def sizes(self) -> list[list[float]]:
        """What the size budget is for, of every option of each layer."""
        return self._table(self.size)

    def _table(self, what: str) -> list[list[float]]:
        return [[getattr(o, what) for o in layer.options] for layer in self.layers]

    def _within(self, choice: Sequence[int]) -> bool:
        chosen = [layer.options[o] for layer, o in zip(self.layers, choice, strict=True)]
        limits = {self.size: self.size_budget, "operations": self.operations, "latency": self.latency}
        return all(sum(getattr(o, what) for o in chosen) <= limit for what, limit in limits.items())

    def _uniform(self) -> tuple[int, ...]:
        """The same reduction in each layer, as small as it may be."""

        def at(rate: float) -> tuple[int, ...]:
            choice = []
            for layer in self.layers:
                fits = [i for i, o in enumerate(layer.options) if o.parameters <= rate * layer.weight.numel()]
                smallest = min(range(len(layer.options)), key=lambda i: layer.options[i].parameters)
                best = min(fits, key=lambda i: self._goodness(layer.options[i]), default=smallest)
                choice.append(best)
            return tuple(choice)

        rates = sorted({o.parameters / layer.weight.numel() for layer in self.layers for o in layer.options})
        fitting = [rate for rate in rates if self._within(at(rate))]
        return at(max(fitting, default=0.0))

    def _goodness(self, option: ChainOption) -> tuple[float, int]:
        return option.bound or option.error, -option.parameters

    def _minimax(self) -> tuple[int, ...]:
        bounds = [[o.bound or o.error for o in layer.options] for layer in self.layers]
        return minimax(bounds, self.sizes(), self.size_budget)


def _monotone(options: Sequence[ChainOption], damages: Sequence[float]) -> list[float]:
    """Damages without the noise that makes them rise where the layer's error falls."""
    return monotone(damages, sorted(range(len(options)), key=lambda i: -options[i].error))
