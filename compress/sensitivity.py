"""How much the model's outputs suffer when weights change: measured by running it, one weight at a time.

A batch goes through the graph node by node, keeping only the values that are still needed. Where it reaches
the first operator that depends on a weight, the rest of the graph is run once for each replacement of that
weight, from the values at hand. So nothing is computed again that comes before the weight, and no
activations are stored; on average a replacement costs half a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from compress.chain import Chain
from compress.data import CalibrationData
from compress.encoding import Encoded
from compress.errors import PassError
from compress.graph import Graph
from compress.pipeline import example_inputs
from compress.progress import Progress, Silent

Measure = Literal["kl", "error"]
Replacement = Tensor | Encoded | Chain

_SAME_ENTRIES = {
    torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.squeeze.dim,
    torch.ops.aten.unsqueeze.default, torch.ops.aten.slice.Tensor, torch.ops.aten.to.dtype,
    torch.ops.aten.contiguous.default, torch.ops.aten.clone.default, torch.ops.aten.log_softmax.int,
    torch.ops.aten.index_select.default,
}  # fmt: skip
"""Operators between the last layer and the output that leave logits what they are."""


class Samples:
    """Some samples of each calibration batch, any number of times."""

    def __init__(self, batches: Iterable[Sequence[Tensor]], parts: Sequence[slice]) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        """Number of samples."""
        return sum(part.stop - part.start for part in self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch, part in zip(self.batches, self.parts, strict=True):
            if part.stop > part.start:
                yield tuple(tensor[part] for tensor in batch)


_ROWS, _SAMPLES = 1024, (4, 128)
"""Held-out samples: as many as give this many rows of output, within these bounds."""


def sample(graph: Graph, data: CalibrationData | None) -> tuple[Tensor, ...]:
    """Flat inputs of one sample, or of a batch where the model fixes its size; random without data."""
    if data is None:
        return tuple(example_inputs(graph, {"batch": 1}))
    first = next(iter(data.inputs()))
    return tuple(tensor[:1] for tensor in first) if _free(graph) else first


def _free(graph: Graph) -> bool:
    """Whether every input takes any number of samples."""
    return all(spec.dynamic and spec.dynamic[0] == (0, "batch") for spec in graph.inputs)


def held_out(graph: Graph, data: CalibrationData) -> tuple[Samples, Samples]:
    """Samples to fit to, and samples to measure on.

    The last samples are held out: a few rows of images, a few windows of text, never more than half. A
    single sample (or batch, where the model fixes its size) is used for both.
    """
    batches = data.inputs()
    free = _free(graph)
    sizes = [len(batch[0]) for batch in batches]
    outputs = graph.run(sample(graph, data))
    rows = max((math.prod(o.shape[:-1]) for o in outputs if isinstance(o, Tensor)), default=1)
    if not free:
        rows = math.ceil(rows / sizes[0])
    left = min(max(_ROWS // max(rows, 1), _SAMPLES[0]), _SAMPLES[1], sum(sizes) // 2)
    kept: list[slice] = []
    held: list[slice] = []
    for size in reversed(sizes):
        taken = min(size, left) if free else size * (left > 0 and len(held) < len(sizes) // 2)
        left -= taken
        kept.insert(0, slice(0, size - taken))
        held.insert(0, slice(size - taken, size))
    if sum(part.stop - part.start for part in held) == 0:
        kept = held = [slice(0, size) for size in sizes]
    return Samples(batches, kept), Samples(batches, held)


class Damage:
    """Distance of a graph's outputs from those of a reference, on held-out data; never negative.

    "kl": the mean Kullback-Leibler divergence, in nats for each row of logits (``[..., classes]``), of the
    class probabilities from those of the reference. Outputs that are no logits are not looked at.
    "error": ``sum |y - y'|^2 / sum |y|^2``, averaged over the floating-point outputs.

    To first order both are sums over layers, and both grow with the square of the weights' error.

    Args:
        reference: the original graph.
        batches: its flat inputs, re-iterable.
        measure: None for "kl" where the model ends in logits (`logits`), else "error".

    Raises:
        PassError: no output can be measured this way.
    """

    def __init__(
        self, reference: Graph, batches: Iterable[Sequence[Tensor]], measure: Measure | None = None
    ) -> None:
        self.reference, self.batches = reference, batches
        found = logits(reference)
        self.measure: Measure = measure or ("kl" if found else "error")
        self.outputs = found if self.measure == "kl" else list(range(len(reference.output_names)))
        if not self.outputs:
            raise PassError(
                "no output of the model is a linear layer's, so it has no logits to compare",
                fix="measure the error of the outputs instead (damage: error)",
            )

    def of(self, graph: Graph) -> float:
        """Damage of a whole graph that has the reference's inputs and outputs."""
        total = _Mean()
        for batch in self.batches:
            total.add(self._distances(self._wanted(batch), graph.run(list(batch))))
        return total.value(self.measure)

    def of_each(
        self,
        graph: Graph,
        replacements: Mapping[str, Sequence[Replacement]],
        progress: Progress | None = None,
    ) -> dict[str, list[float]]:
        """Damage of the graph with one weight replaced, for each replacement of each weight.

        Args:
            graph: has the reference's inputs and outputs; its other weights stay as they are.
            replacements: by name of a weight that is not encoded: values of its shape.
            progress: told about every weight of the first batch.
        """
        totals = {name: [_Mean() for _ in values] for name, values in replacements.items()}
        runner = _Runner(graph)
        steps = progress or Silent()
        for batch in self.batches:
            wanted = self._wanted(batch)
            for name, index, outputs in runner.variants(batch, replacements, steps):
                totals[name][index].add(self._distances(wanted, outputs))
            steps = Silent()
        return {name: [mean.value(self.measure) for mean in means] for name, means in totals.items()}

    def _wanted(self, batch: Sequence[Tensor]) -> list[Any]:
        """Outputs of the reference; log-probabilities in place of logits."""
        outputs = self.reference.run(list(batch))
        if self.measure == "error":
            return outputs
        return [y.float().log_softmax(-1) if i in self.outputs else None for i, y in enumerate(outputs)]

    def _distances(self, wanted: Sequence[Any], got: Sequence[Any]) -> list[tuple[float, float]]:
        """Numerator and denominator for each output looked at."""
        distance = _kl if self.measure == "kl" else _squared_error
        return [
            distance(wanted[i], got[i])
            for i in self.outputs
            if isinstance(wanted[i], Tensor) and wanted[i].is_floating_point()
        ]


def logits(graph: Graph) -> list[int]:
    """Indices of the outputs that come straight from a linear layer of two or more outputs."""
    rows = {site.node: graph.shape(site.weight)[0] for site in graph.sites() if site.kind == "linear"}
    found = enumerate(_sources(graph))
    return [i for i, parts in found if rows.keys() >= set(parts) and sum(rows[part] for part in parts) > 1]


def output_layers(graph: Graph, *, whole: bool = False) -> set[str]:
    """Nodes whose values are outputs of the model, apart from their shape.

    Args:
        whole: without the parts of a split output layer (`frequency_tiers`).
    """
    return {part for parts in _sources(graph) for part in parts if len(parts) == 1 or not whole}


def _sources(graph: Graph) -> list[list[str]]:
    """For each output the node that it comes from, or those of the parts of a split output layer."""
    outputs = graph.ops.output_node().args[0]
    assert isinstance(outputs, list | tuple)
    return [_source(value) for value in outputs]


def _source(value: Any) -> list[str]:
    while isinstance(value, fx.Node) and value.target in _SAME_ENTRIES:
        parts = _tiers(value)
        if parts:
            return [part.name for part in parts]
        value = value.args[0]
    return [value.name] if isinstance(value, fx.Node) else []


def _tiers(node: fx.Node) -> list[fx.Node]:
    """The parts of an output layer if `frequency_tiers` has split it here; other concatenations are none."""
    joined = node.args[0]
    if node.target != torch.ops.aten.index_select.default or node.args[1] != -1:
        return []
    if not isinstance(joined, fx.Node) or joined.target != torch.ops.aten.cat.default:
        return []
    linear = all(part.target == torch.ops.aten.linear.default for part in joined.all_input_nodes)
    if joined.args[1:] != (-1,) or not linear:
        return []
    one_input = len({part.args[0] for part in joined.all_input_nodes}) == 1
    return joined.all_input_nodes if one_input else []


class _Mean:
    """Ratios of sums over batches, averaged over outputs."""

    def __init__(self) -> None:
        self.sums: list[tuple[float, float]] = []

    def add(self, parts: list[tuple[float, float]]) -> None:
        before = self.sums or [(0.0, 0.0)] * len(parts)
        self.sums = [(a + c, b + d) for (a, b), (c, d) in zip(before, parts, strict=True)]

    def value(self, measure: Measure) -> float:
        ratios = [a / b if b > 0 else a for a, b in self.sums]
        # a model may give one set of logits several times; outputs of an encoder are different things
        return sum(ratios) / max(1, len(ratios))


_AT_ONCE = 1 << 22
"""Elements compared at a time: the logits of a language model are its largest value."""


def _rows(reference: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    width = max(1, reference.shape[-1] if reference.ndim else 1)
    count = max(1, _AT_ONCE // width)
    yield from zip(
        reference.reshape(-1, width).float().split(count),
        value.reshape(-1, width).float().split(count),
        strict=True,
    )


def _kl(log_p: Tensor, value: Tensor) -> tuple[float, float]:
    """Summed ``KL(p || softmax(value))`` and the number of rows."""
    total, count = 0.0, 0
    for wanted, got in _rows(log_p, value):
        log_q, impossible = got.log_softmax(-1), wanted == -torch.inf
        difference = (log_q - wanted).masked_fill_(impossible, 0.0)
        # p (e^d - 1 - d) sums to the divergence, as both distributions sum to one, and unlike -p d it is
        # never negative: what is left of close distributions is not rounding. The clamp is for exp alone;
        # where p is zero (a masked class), q itself is what the sum of q - p needs.
        terms = difference.clamp(max=80).expm1_().sub_(difference).mul_(wanted.exp())
        terms = torch.where(impossible, log_q.exp(), terms)
        total += float(terms.sum(-1).sum(dtype=torch.float64))
        count += len(got)
    return total, float(count)


def _squared_error(reference: Tensor, value: Tensor) -> tuple[float, float]:
    error = signal = 0.0
    for a, b in _rows(reference, value):
        error += float((a - b).square().sum(dtype=torch.float64))
        signal += float(a.square().sum(dtype=torch.float64))
    return error, signal


class _Runner:
    """A graph evaluated node by node, with branches that go on to the end with other weights."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = list(graph.ops.nodes)
        position = {node: i for i, node in enumerate(self.nodes)}
        self.last = {n: max((position[u] for u in n.users), default=i) for n, i in position.items()}
        self.variable: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(i in self.variable for i in node.all_input_nodes):
                self.variable.add(node)
        self.constants: dict[fx.Node, Any] = {}

    def variants(
        self, batch: Sequence[Tensor], replacements: Mapping[str, Sequence[Replacement]], progress: Progress
    ) -> Iterator[tuple[str, int, list[Any]]]:
        """(weight, index of the replacement, flat outputs with it), in execution order."""
        changed = {name: self._changed(name) for name in replacements}
        starts: dict[int, list[str]] = {}
        for name, nodes in changed.items():
            first = next(
                i
                for i, node in enumerate(self.nodes)
                if node in self.variable and not nodes.isdisjoint(node.all_input_nodes)
            )
            starts.setdefault(first, []).append(name)
        values = dict(zip((n for n in self.nodes if n.op == "placeholder"), batch, strict=True))
        for here in range(max(starts, default=-1) + 1):
            for name in starts.get(here, ()):
                progress.step(name)
                for index, new in enumerate(replacements[name]):
                    value = new if isinstance(new, Tensor) else new.decode()
                    replaced = dict.fromkeys(changed[name])
                    outputs = self._finish(here, dict(values), name, value, replaced)
                    yield name, index, outputs
            self._step(here, values, self._constant)

    def _changed(self, name: str) -> set[fx.Node]:
        """Nodes that depend on this weight but on no input."""
        nodes: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.variable:
                continue
            read = node.op == "get_attr" and node.target == name
            if read or not nodes.isdisjoint(node.all_input_nodes):
                nodes.add(node)
        return nodes

    def _finish(
        self,
        start: int,
        values: dict[fx.Node, Any],
        name: str,
        value: Tensor,
        replaced: dict[fx.Node, Any],
    ) -> list[Any]:
        """Run from this position to the end with one weight replaced."""

        def constant(node: fx.Node) -> Any:
            if node not in replaced:
                return self._constant(node)
            if replaced[node] is None:
                if node.op == "get_attr":
                    replaced[node] = value
                else:
                    arguments = {i: constant(i) for i in node.all_input_nodes}
                    replaced[node] = self.graph.evaluate(node, arguments)
            return replaced[node]

        for here in range(start, len(self.nodes) - 1):
            self._step(here, values, constant)
        output = self.nodes[-1]
        arguments = {i: values[i] if i in values else constant(i) for i in output.all_input_nodes}
        return list(fx.node.map_arg(output.args[0], lambda n: arguments[n]))

    def _step(self, here: int, values: dict[fx.Node, Any], constant: Any) -> None:
        """Compute one node that depends on the inputs, then drop what nobody reads any more."""
        node = self.nodes[here]
        if node.op == "placeholder" or node not in self.variable:
            return
        arguments = {i: values[i] if i in self.variable else constant(i) for i in node.all_input_nodes}
        values[node] = self.graph.evaluate(node, arguments)
        for source in (node, *node.all_input_nodes):
            if self.last[source] <= here:
                values.pop(source, None)

    def _constant(self, node: fx.Node) -> Any:
        if node not in self.constants:
            arguments = {i: self._constant(i) for i in node.all_input_nodes}
            self.constants[node] = self.graph.evaluate(node, arguments)
        return self.constants[node]
