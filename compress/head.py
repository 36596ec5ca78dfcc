"""Output heads of a graph: the linear layers whose values are logits, and what they read."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compress.activations import QUANTIZERS
from compress.errors import PassError
from compress.graph import Graph, Site
from compress.numerics import sqnr_db
from compress.pipeline import example_inputs, shapes_to_try
from compress.sensitivity import logits, output_layers

_aten = torch.ops.aten
_BY_POSITION = {
    *(_aten.linear.default, _aten.add.Tensor, _aten.mul.Tensor, _aten.matmul.default, _aten.to.dtype),
    *(_aten.slice.Tensor, _aten.index_select.default, _aten.cat.default, _aten.topk.default),
    *(_aten.scatter.src, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.embedding.default),
    *(_aten.index.Tensor, _aten.tanh.default, _aten.div.Tensor, _aten.clone.default, operator.getitem),
    *QUANTIZERS,
}
"""Operators of output heads, where they work on the last axis: a position's logits are of its own values."""

_HEAD = "an output head whose logits are those of each position alone"
_WITHOUT = "take the logits of all positions: without --last-logits (last_logits=False)"
_SAME_DB = 20.0
"""Activations rounded on the range of all positions change a little; another position's are others."""

_INDICES = (torch.uint8, torch.int16, torch.int32)


def heads(graph: Graph, sites: Iterable[Site]) -> list[Site]:
    """Those of the sites whose operator is a linear layer and gives a whole output of the model."""
    outputs = output_layers(graph, whole=True)
    return [site for site in sites if site.kind == "linear" and site.node in outputs]


def last_position(graph: Graph) -> Graph:
    """The graph with logits ``[batch, 1, V]``: those of the last position, and the head computed there alone.

    Generating takes no others, and of a long prompt they are most of the memory.

    Raises:
        PassError: no output is the logits of positions, or more than the head lies between.
    """
    before, graph = graph, graph.copy()
    order = {node: i for i, node in enumerate(graph.ops.nodes)}
    varies: set[fx.Node] = set()
    for node in order:
        if node.op == "placeholder" or varies.intersection(node.all_input_nodes):
            varies.add(node)
    outputs: Any = graph.ops.output_node().args[0]
    start = _logits_output(graph)
    head: set[fx.Node] = set()
    open_ends = {start}
    while True:
        node = max(open_ends, key=order.__getitem__)
        passed = any(n.target is _aten.linear.default for n in head)
        if len(open_ends) == 1 and passed and node.target is not _aten.linear.default:
            break
        if node.target not in _BY_POSITION or (node in outputs and node is not start):
            raise PassError(
                f"the logits depend on other positions by {node.name}, or on what is an output itself",
                expected=_HEAD,
                fix=_WITHOUT,
            )
        head.add(node)
        open_ends = (open_ends - {node}) | varies.intersection(node.all_input_nodes)
    hidden = node
    with graph.ops.inserting_after(hidden):
        last = graph.ops.call_function(_aten.slice.Tensor, (hidden, 1, -1, 2**63 - 1))
    last.meta["rank"] = 3
    for node in head:
        node.replace_input_with(hidden, last)
    index = outputs.index(start)
    graph.meta["last_logits"] = True
    trial = example_inputs(graph, shapes_to_try(graph)[0])
    all_positions, one = before.run(trial)[index], graph.run(trial)[index]
    # its operators may still go along the positions
    if one.shape[:2] != (len(all_positions), 1) or sqnr_db(all_positions[:, -1:], one) < _SAME_DB:
        raise PassError(
            "the logits of the last position depend on those of others", expected=_HEAD, fix=_WITHOUT
        )
    return graph


def _logits_output(graph: Graph) -> fx.Node:
    outputs: Any = graph.ops.output_node().args[0]
    names = [name for name in graph.output_names if name is not None]
    if "logits" in graph.output_names:
        node = outputs[graph.output_names.index("logits")]
    else:
        found = logits(graph)
        node = outputs[found[0] if found else graph.output_names.index(names[0])]
    if not isinstance(node, fx.Node) or node.meta.get("rank", 3) != 3:
        raise PassError(
            "no output of the model is the logits of positions, so there is no last one to take",
            expected="a language model that gives [batch, seq, vocabulary]",
        )
    return node


def trunk(graph: Graph, site: Site) -> Graph:
    """The graph up to a layer: its only output is what the layer reads."""
    cut = graph.copy()
    (source,) = (n for n in cut.ops.nodes if n.name == site.node)
    cut.ops.output_node().args = ([source.args[0]],)
    cut.prune_dead_code()
    return replace(cut, output_names=("hidden",))


def head_inputs(
    graph: Graph, site: Site, batches: Iterable[Sequence[Tensor]], samples: int, limit: int
) -> Tensor:
    """What a layer reads, as float32 rows ``[rows, N]`` in the order of the data.

    Args:
        graph: the model.
        site: a linear layer of it.
        batches: flat inputs.
        samples: how many there are in all of them.
        limit: of rows, about; where there are more, every so many-th is taken.
    """
    part = trunk(graph.decoded(), site)
    rows: list[Tensor] = []
    every = 0
    for batch in batches:
        found = part.run([tensor.clone() for tensor in batch])[0]
        found = found.reshape(-1, found.shape[-1])
        every = every or max(1, math.ceil(len(found) / len(batch[0]) * samples / limit))
        rows.append(found[::every].float())
    return torch.cat(rows)


def narrow(indices: Tensor) -> Tensor:
    """Indices in the smallest integers that hold them."""
    largest = int(indices.max()) if indices.numel() else 0
    return indices.to(next(t for t in _INDICES if largest <= torch.iinfo(t).max))


class HeadBuilder:
    """Adds operators and tensors in place of a head, and hands its readers over.

    Tensors are called like the head's weight (``lm_head.weight`` gives ``lm_head.NAME``), operators like its
    node: names that fx makes up may be those of other operators in the original graph.

    Args:
        graph: changed.
        site: the head.
    """

    def __init__(self, graph: Graph, site: Site) -> None:
        self.graph, self.site = graph, site
        self.layer = graph.node(site.node)
        stem = site.weight.removesuffix(".weight")
        # nothing may lie below the name of a tensor, and a shared weight stays
        self.prefix = f"{stem}." if stem != site.weight else f"{stem}_"
        self.count = 0

    @property
    def hidden(self) -> Any:
        """What the head reads."""
        return self.layer.args[0]

    def tensor(self, name: str, value: Tensor) -> fx.Node:
        full = self.graph.free_name(f"{self.prefix}{name}")
        self.graph.tensors[full] = value.contiguous()
        with self.graph.ops.inserting_before(self.layer):
            return self.graph.ops.get_attr(full)

    def indices(self, name: str, value: Tensor) -> fx.Node:
        """Indices as `narrow` stores them, widened where they are used."""
        return self.call(torch.ops.aten.to.dtype, self.tensor(name, narrow(value)), torch.int32)

    def call(self, target: Any, *args: Any, layer: str = "") -> fx.Node:
        """An operator; `layer` names it as a site, below the head."""
        with self.graph.ops.inserting_before(self.layer):
            name = f"{self.layer.name}_{self.count}"
            node = self.graph.ops.create_node("call_function", target, args, name=name)
        self.count += 1
        if layer:
            node.meta["module"] = f"{self.site.name}.{layer}"
        return node

    def finish(self, value: fx.Node) -> None:
        """Everybody who read the head reads this instead; what nobody reads any more is dropped."""
        self.layer.replace_all_uses_with(value)
        self.graph.ops.erase_node(self.layer)
        self.graph.prune_dead_code()
