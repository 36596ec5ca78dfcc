"""A model as named points: its layers, the value each of them reads, and the value it gives.

`compress.divergence` compares two of these, whatever they were read from: a graph (`GraphPoints`, here) or an
ONNX file (`compress.exporters.onnx_points`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx

from compress.activations import QUANTIZERS
from compress.encoding import EncodedWeight
from compress.float8 import Float8Weight
from compress.graph import Graph
from compress.inputs import InputSpec
from compress.pipeline import example_inputs

How = Literal["name", "chain", "value", "weight", "order"]

_ALIKE = 0.8
"""Cosine from which two weights count as one that was compressed; of unrelated ones it is near 0."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model, or several in a row that stand for one.

    Attributes:
        name: what to call it, the path of the module where that is known.
        keys: other names its weight goes by.
        kind: "linear", "conv" or "embedding".
        bits: of a stored weight; 16 and more for floats.
        source: name of the value it reads, before that is rounded; "" if it is not known.
        output: name of the value it gives, bias included.
        weight: what the points find its weight by.
        float8: whether the weight is stored as 8-bit floats.
    """

    name: str
    keys: frozenset[str]
    kind: str
    bits: int
    source: str
    output: str
    weight: str
    float8: bool = False


class Points(Protocol):
    """A model that tells the values between its layers.

    Attributes:
        label: what it is called in messages.
        inputs: specs of its flat inputs.
        layers: in execution order.
    """

    label: str
    inputs: tuple[InputSpec, ...]
    layers: list[Layer]

    def run(
        self, inputs: Sequence[Tensor], names: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values of these names, and the outputs by name, for flat inputs."""

    def apply(self, given: Mapping[Layer, Tensor], inputs: Sequence[Tensor]) -> dict[Layer, Tensor]:
        """What each layer alone makes of a value of its source; `inputs` are those of the model."""

    def weight(self, layer: Layer) -> Tensor | None:
        """Its weight, float ``[O, I, ...]``, or ``[rows, width]`` of an embedding; None if not known."""

    def holds(self, name: str) -> bool:
        """Whether a value has this name."""

    def random(self, sizes: dict[str, int], seed: int) -> list[Tensor]:
        """Random flat inputs with dynamic axes of these sizes."""


class GraphPoints:
    """The layers (`Graph.sites`) of a graph."""

    def __init__(self, graph: Graph, label: str) -> None:
        self.graph = graph.decoded()
        self.label, self.inputs = label, graph.inputs
        self._nodes = {node.name: node for node in self.graph.ops.nodes}
        self.layers = []
        for site in graph.sites():
            encoded = graph.encodings.get(site.weight)
            bits = graph.weight(site.weight).element_size() * 8 if encoded is None else _bits(encoded)
            read = self._nodes[site.node].args[1 if site.kind == "embedding" else 0]
            assert isinstance(read, fx.Node)
            keys = frozenset({site.name, site.weight.removesuffix(".weight")})
            source, float8 = _unrounded(read).name, isinstance(encoded, Float8Weight)
            self.layers.append(
                Layer(site.name, keys, site.kind, bits, source, site.node, site.weight, float8)
            )

    def run(
        self, inputs: Sequence[Tensor], names: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Points.run`."""
        found: dict[str, Tensor] = {}

        def keep(node: fx.Node, value: Any) -> Any:
            if node.name in names:
                # a later operator may write into it
                found[node.name] = value.clone()
            return value

        results = self.graph.named(self.graph.run(inputs, keep))
        outputs = [name for name in self.graph.output_names if name is not None]
        return found, dict(zip(outputs, results, strict=True))

    def apply(self, given: Mapping[Layer, Tensor], inputs: Sequence[Tensor]) -> dict[Layer, Tensor]:
        """See `Points.apply`."""
        return {layer: self._alone(layer, value, inputs) for layer, value in given.items()}

    def _alone(self, layer: Layer, value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        source, output = self._nodes[layer.source], self._nodes[layer.output]
        needed, open_ = {source}, [output]
        while open_:
            node = open_.pop()
            if node not in needed:
                needed.add(node)
                open_ += node.all_input_nodes
        feed = iter(inputs)
        values: dict[fx.Node, Any] = {}
        for node in self.graph.ops.nodes:
            fed = next(feed) if node.op == "placeholder" else None
            if node is source:
                values[node] = value
            elif node in needed:
                values[node] = fed if node.op == "placeholder" else self.graph.evaluate(node, values)
        found: Tensor = values[output]
        return found

    def weight(self, layer: Layer) -> Tensor | None:
        """See `Points.weight`."""
        return self.graph.weight(layer.weight) if layer.weight in self.graph.tensors else None

    def holds(self, name: str) -> bool:
        """See `Points.holds`."""
        return name in self._nodes

    def random(self, sizes: dict[str, int], seed: int) -> list[Tensor]:
        """See `Points.random`."""
        return example_inputs(self.graph, sizes, seed)


def _bits(encoded: Any) -> int:
    if isinstance(encoded, EncodedWeight):
        return encoded.encoding.bits
    stored = encoded.parts.get("codes")
    count = torch.Size(encoded.shape).numel()
    return 32 if stored is None else max(1, round(8 * stored.numel() * stored.element_size() / count))


def _unrounded(node: fx.Node) -> fx.Node:
    """What is read, before it is rounded and before the steps a chain begins with."""
    while node.target in QUANTIZERS or "_chain" in node.name:
        before = [i for i in node.all_input_nodes if i.op != "get_attr"]
        if len(before) != 1:
            break
        node = before[0]
    return node


# -- which layers are the same ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A layer of either model; None where the other model has none for it."""

    a: Layer | None
    b: Layer | None
    how: How = "name"


def pairs(a: Points, b: Points) -> list[Pair]:
    """Which layers of two models are the same, in execution order of the first; what is left over comes last.

    In turn: names of modules and weights; a chain of layers in place of one (``fc.0``, ``fc.1`` for ``fc``),
    whose output is that of its last; weights that are alike (cosine of at least 0.8); names of values, as a
    file written from a graph keeps them; and, where nothing else is known, order among layers of the same
    kind and shape. Layers of B that then are left, and lead to one that was matched, stand for one with it.
    """
    found: dict[int, Pair] = {}
    left, right = dict(enumerate(a.layers)), dict(enumerate(b.layers))

    def take(i: int, j: int, how: How) -> None:
        found[i] = Pair(left.pop(i), right.pop(j), how)

    for same in (lambda x, y: x.name == y.name, lambda x, y: bool(x.keys & y.keys)):
        for i, x in list(left.items()):
            j = next((j for j, y in right.items() if x.kind == y.kind and same(x, y)), None)
            if j is not None:
                take(i, j, "name")
    for i, x in list(left.items()):
        if parts := _parts(x, right):
            found[i] = Pair(left.pop(i), _joined([right.pop(j) for j in parts], x.name), "chain")
    for j, y in list(right.items()):
        if parts := _parts(y, left):
            found[parts[0]] = Pair(_joined([left.pop(i) for i in parts], y.name), right.pop(j), "chain")
    ways: tuple[How, ...] = ("weight", "order")
    for how in ways:
        if how == "order":
            for i, x in list(left.items()):
                # the other's names mean something only if they are those of this graph
                if b.holds(x.output) and not any(y.output == x.output for y in b.layers):
                    source = x.source if b.holds(x.source) else ""
                    found[i] = Pair(left.pop(i), replace(x, source=source), "value")
        for i, x in list(left.items()):
            ranked = [(_alike(a, x, b, y, how), -j) for j, y in right.items() if x.kind == y.kind]
            score, last = max(ranked, default=(0.0, 0))
            if score >= _ALIKE:
                take(i, -last, how)
    for i, pair in found.items():
        found[i] = _with_what_leads_to(pair, right)
    ordered = [found[i] if i in found else Pair(left[i], None) for i in sorted({*found, *left})]
    return [*ordered, *(Pair(None, y) for y in right.values())]


def _parts(whole: Layer, others: Mapping[int, Layer]) -> list[int]:
    names = "|".join(map(re.escape, sorted(whole.keys | {whole.name})))
    part = re.compile(rf"({names})\.\d+")
    found = [i for i, other in others.items() if any(part.fullmatch(k) for k in (other.name, *other.keys))]
    return found if len(found) > 1 else []


def _joined(chain: Sequence[Layer], name: str) -> Layer:
    first, last = chain[0], chain[-1]
    return replace(last, name=name, source=first.source, bits=min(layer.bits for layer in chain))


def _with_what_leads_to(pair: Pair, others: dict[int, Layer]) -> Pair:
    """Layers of B that A lacks, one after the other up to the one matched, stand for one with it."""
    chain = [pair.b] if pair.b else []
    while (
        chain and (j := next((j for j, y in others.items() if y.output == chain[0].source), None)) is not None
    ):
        chain.insert(0, others.pop(j))
    return pair if len(chain) < 2 else Pair(pair.a, _joined(chain, chain[-1].name), "chain")


def _alike(a: Points, x: Layer, b: Points, y: Layer, how: str) -> float:
    """Cosine of two weights; how="order" asks for the shape only, and takes what has none."""
    one, other = a.weight(x), b.weight(y)
    if how == "order":
        return float(one is None or other is None or one.shape == other.shape)
    if one is None or other is None or one.shape != other.shape:
        return 0.0
    return float(
        torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0)
    )
