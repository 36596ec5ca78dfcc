"""Single layers of a graph: each as a graph of its own, what it costs, and chains in its place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from compress.chain import Chain, MatrixProduct, Sliced
from compress.graph import Graph, Site, argument, last_uses
from compress.inputs import InputSpec

_aten = torch.ops.aten


def alone(
    graph: Graph, inputs: Sequence[Tensor], weights: Collection[str]
) -> Iterator[tuple[Site, Graph, Tensor]]:
    """Every site of these weights as a graph with one input, and what that input is.

    The graph's weight is called ``weight``; other tensors are called otherwise. Arguments that are computed
    stand in it as constants.

    Args:
        graph: the model; the weights are not encoded.
        inputs: flat inputs of it.
        weights: names.
    """
    sites = {site.node: site for site in graph.sites() if site.weight in weights}
    values: dict[fx.Node, Any] = {}
    last = last_uses(graph.ops)
    feed = iter(inputs)
    for node in graph.ops.nodes:
        if node.op == "output":
            break
        if node.name in sites:
            yield sites[node.name], *_alone(node, sites[node.name], values)
        values[node] = next(feed) if node.op == "placeholder" else graph.evaluate(node, values)
        for dead in last.get(node, ()):
            del values[dead]


def _alone(node: fx.Node, site: Site, values: dict[fx.Node, Any]) -> tuple[Graph, Tensor]:
    source, weight = (node.args[1], node.args[0]) if site.kind == "embedding" else node.args[:2]
    assert isinstance(source, fx.Node)
    x = values[source]
    ops = fx.Graph()
    tensors: dict[str, Tensor] = {}

    def argument(old: fx.Node) -> fx.Node:
        if old is source:
            return placeholder
        name = "weight" if old is weight else f"constant{len(tensors)}"
        tensors[name] = values[old]
        return ops.get_attr(name)

    placeholder = ops.placeholder("x")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
    assert callable(node.target)
    ops.output([ops.call_function(node.target, args, kwargs)])
    spec = InputSpec("x", x.dtype, tuple(x.shape), ())
    _, tree = pytree.tree_flatten((0,))
    return Graph(ops, tensors, (spec,), ("y",), ops._codegen, tree, tree), x


def operations(graph: Graph, inputs: Sequence[Tensor]) -> int:
    """Multiplications of matrix products and convolutions, counted on shapes alone.

    What is computed from weights alone is done once, when a model is loaded, and does not count.
    """
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    variable = []
    for node in graph.ops.nodes:
        if node.op == "placeholder":
            values[node] = next(feed).to("meta")
        elif node.op == "get_attr":
            values[node] = graph.tensors[str(node.target)].to("meta")
        elif any(i.op == "placeholder" or i in variable for i in node.all_input_nodes):
            variable.append(node)
        else:
            values[node] = graph.evaluate(node, values)
    with FlopCounterMode(display=False) as counter:
        for node in variable[:-1]:  # the last one is the output
            values[node] = graph.evaluate(node, values)
    return counter.get_total_flops() // 2


# -- chains ------------------------------------------------------------------------------------------


def put(graph: Graph, site: Site, chain: Chain) -> None:
    """Replace a layer by a chain; its bias stays, at the end.

    The factors are called like the layers of a `torch.nn.Sequential` in the layer's place: ``fc.0.weight``.

    Args:
        graph: changed. The weight is read by this site alone and is not encoded.
    """
    layer = graph.node(site.node)
    ops = graph.ops
    stem = site.weight.removesuffix(".weight")
    with ops.inserting_before(layer):
        factors = []
        for i, factor in enumerate(chain.factors):
            name = graph.free_name(f"{stem}.{i}.weight")
            graph.tensors[name] = factor
            factors.append(ops.get_attr(name))
        step = _Step(ops, layer, site.name)
        if isinstance(chain, MatrixProduct):
            scale = None
            if chain.scale is not None:
                name = graph.free_name(f"{stem}.scale")
                graph.tensors[name] = chain.scale
                scale = ops.get_attr(name)
            value = _matrix_product(step, chain, factors, scale)
        elif isinstance(chain, Sliced):
            value = _sliced(step, factors, chain.factors[0].shape[1])
        else:
            value = _one_by_one(step, chain, factors)
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    layer.replace_all_uses_with(value)
    ops.erase_node(layer)
    if not weight.users:
        ops.erase_node(weight)
        del graph.tensors[site.weight]


class _Step:
    """Adds operators in place of a layer, named after it.

    Names that fx makes up may be those of other operators in the original graph, and passes look up by name.
    """

    def __init__(self, ops: fx.Graph, layer: fx.Node, path: str) -> None:
        self.ops, self.layer, self.path = ops, layer, path
        self.bias = argument(layer, "bias", None)
        self.count = self.layers = 0

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.ops.create_node(
            "call_function", target, args, name=f"{self.layer.name}_chain{self.count}"
        )
        self.count += 1
        return node

    def site(self, target: Any, *args: Any) -> fx.Node:
        """A linear layer or convolution."""
        node = self.call(target, *args)
        node.meta["module"] = f"{self.path}.{self.layers}"
        if "rank" in self.layer.meta:
            node.meta["rank"] = self.layer.meta["rank"]
        self.layers += 1
        return node


def _one_by_one(step: _Step, chain: Chain, factors: Sequence[fx.Node]) -> fx.Node:
    value: Any = step.layer.args[0]
    for i, weight in enumerate(factors):
        bias = step.bias if i == len(factors) - 1 else None
        if step.layer.target is _aten.linear.default:
            value = step.site(_aten.linear.default, value, weight, bias)
        else:
            value = step.site(step.layer.target, value, weight, bias, *_geometry(step.layer, chain, i))
    assert isinstance(value, fx.Node)
    return value


def _geometry(layer: fx.Node, chain: Chain, index: int) -> list[Any]:
    """stride, padding, dilation and groups of a factor."""
    kernels = [tuple(f.shape[2:]) for f in chain.factors]
    rank = len(kernels[0])
    longest = [max(k[axis] for k in kernels) for axis in range(rank)]
    # the first of the longest: where all are 1 long, the first of all
    owner = [[k[axis] for k in kernels].index(longest[axis]) for axis in range(rank)]

    def each(name: str, default: int) -> list[int]:
        value = argument(layer, name, default)
        values = [value] if isinstance(value, int) else list(value)
        values = values * rank if len(values) == 1 else values
        return [v if owner[axis] == index else default for axis, v in enumerate(values)]

    padding = argument(layer, "padding", 0)
    return [
        each("stride", 1),
        padding if isinstance(padding, str) else each("padding", 0),
        each("dilation", 1),
        chain.groups[index] if chain.groups else 1,
    ]


def _sliced(step: _Step, factors: Sequence[fx.Node], width: int) -> fx.Node:
    *slices, last = factors
    read = []
    for i, weight in enumerate(slices):
        part = step.call(_aten.slice.Tensor, step.layer.args[0], -1, i * width, (i + 1) * width)
        read.append(step.site(_aten.linear.default, part, weight))
    return step.site(_aten.linear.default, step.call(_aten.cat.default, read, -1), last, step.bias)


def _matrix_product(
    step: _Step, chain: MatrixProduct, factors: Sequence[fx.Node], scale: fx.Node | None
) -> fx.Node:
    """One site after the other: its axis of the input becomes the last, and that of the output is set apart.

    Going forwards the axes are ``[i_k .. i_n, o_1 .. o_{k-1}, a]``, so that those of the output end up in
    order; backwards ``[o_{k+1} .. o_n, i_1 .. i_k, a]``.
    """
    value: Any = step.layer.args[0]
    if scale is not None:
        value = step.call(_aten.mul.Tensor, value, scale)
    sites = chain.sites
    count = len(sites)
    if count > 1:
        value = step.call(_aten.unflatten.int, value, -1, [i for _, i in sites])
    bonds = (1, *chain.bonds, 1)
    for done, weight in enumerate(factors):
        k = count - 1 - done if chain.backwards else done
        o, left, right = sites[k][0], bonds[k], bonds[k + 1]
        if chain.backwards:
            # [o.., i_1 .. i_k (, a)]: what is to be multiplied is last already
            if done:
                value = step.call(_aten.flatten.using_ints, value, -2, -1)
            value = step.site(_aten.linear.default, value, weight)
            if k == 0:
                # [o_2 .. o_n, o_1]
                value = step.call(_aten.movedim.int, value, -1, -count) if count > 1 else value
                continue
            value = step.call(_aten.unflatten.int, value, -1, [left, o])
            # [o.., i_1 .. i_{k-1}, a, o] -> [o, o.., i_1 .. i_{k-1}, a]
            value = step.call(_aten.movedim.int, value, -1, -(count + 1))
        else:
            # [i_k .. i_n, o_1 .. o_{k-1} (, a)] -> [i_{k+1} .. i_n, o.., a i_k]
            if done:
                value = step.call(_aten.movedim.int, value, -(count + 1), -1)
                value = step.call(_aten.flatten.using_ints, value, -2, -1)
            elif count > 1:
                value = step.call(_aten.movedim.int, value, -count, -1)
            value = step.site(_aten.linear.default, value, weight)
            if k < count - 1:
                value = step.call(_aten.unflatten.int, value, -1, [o, right])
    if count > 1:
        value = step.call(_aten.flatten.using_ints, value, -count, -1)
    if step.bias is not None:
        value = step.call(_aten.add.Tensor, value, step.bias)
    assert isinstance(value, fx.Node)
    return value
