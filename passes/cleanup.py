"""Exact simplifications that every other pass profits from; outputs change by rounding only.

1. Batch normalisation after a convolution or linear layer is folded into it
   (Jacob et al. 2018, section 3.2): with ``a = gamma / sqrt(var + eps)``,
   ``W' = a W`` and ``b' = a (b - mean) + beta``.
2. ``x @ W`` and ``addmm(b, x, W)`` with a stored 2-D weight become ``linear(x, W^T, b)``, so that GPT-2
   style layers are linear sites like any other; ``matmul(x, W^T)`` becomes ``linear(x, W)``.
3. What is computed from weights alone is computed once, here, unless that takes more room: so weight and
   spectral norms, and slices of a packed projection, are weights like any other.
4. Positions that are taken from the output of a linear layer are taken from its input: where a language model
   returns the logits of its last position, the head is computed there alone.
5. Operators that do nothing in inference (dropout, detach, alias) and values nobody reads are dropped.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from compress.graph import Graph, argument, has_effect, set_bias
from compress.pipeline import Context, Note, Pass, PassResult

_aten = torch.ops.aten
_NO_OPS = {
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.detach.default,
    _aten.detach_.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
}
_FOLDABLE = {
    _aten.linear.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv3d.padding,
}


class Cleanup(Pass):
    """Fold batch normalisation, normalise matrix products, drop no-ops."""

    name: ClassVar[str] = "cleanup"
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        graph = graph.copy()
        kept = {s.node for s in graph.sites()} - {s.node for s in self.select(graph)}
        counts = dict.fromkeys(("folded", "normalised", "moved", "dropped"), 0)
        counts["computed"] = _fold_constants(graph)
        graph.prune_dead_code()
        for node in list(graph.ops.nodes):
            if node.op != "call_function":
                continue
            if node.target in _NO_OPS and not _trains(node):
                node.replace_all_uses_with(node.args[0])
                graph.ops.erase_node(node)
                counts["dropped"] += 1
            elif node.target is _aten.batch_norm.default:
                counts["folded"] += _fold_batch_norm(graph, node, kept)
            elif node.target in (_aten.matmul.default, _aten.mm.default, _aten.addmm.default):
                counts["normalised"] += _as_linear(graph, node)
            elif node.target in (_aten.slice.Tensor, _aten.select.int):
                counts["moved"] += _take_before(graph, node, kept)
        dead = graph.prune_dead_code()
        words = {
            "computed": "values computed from weights alone stored",
            "folded": "batch normalisations folded",
            "normalised": "matrix products made linear layers",
            "moved": "slices taken before a linear layer",
            "dropped": "no-ops dropped",
        }
        notes = [Note("", f"{counts[k]} {words[k]}") for k in counts if counts[k]]
        if dead:
            notes.append(Note("", f"{len(dead)} unused tensors dropped"))
        return PassResult(graph, notes=tuple(notes))


def _trains(node: fx.Node) -> bool:
    """Whether a dropout is live; only a module captured in training mode has one."""
    return "dropout" in str(node.target) and bool(argument(node, "train", False))


def _plain(graph: Graph, value: Any) -> str | None:
    """Name of the tensor a `get_attr` node reads; None for anything else."""
    if isinstance(value, fx.Node) and value.op == "get_attr" and value.target in graph.tensors:
        return str(value.target)
    return None


def _fold_constants(graph: Graph) -> int:
    """Store what is computed from weights alone, wherever that takes no more room than the weights did."""
    root: dict[fx.Node, fx.Node] = {}  # union-find: what shares a weight is folded together or not at all

    def find(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            node = root[node]
        return node

    for node in graph.ops.nodes:
        inputs = node.all_input_nodes
        if _plain(graph, node) or (inputs and _is_pure(node) and all(i in root for i in inputs)):
            root[node] = node
            for source in inputs:
                root[find(source)] = node
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in root:
        groups[find(node)].append(node)
    return sum(_fold_group(graph, group) for group in groups.values() if len(group) > 1)


def _fold_group(graph: Graph, group: list[fx.Node]) -> int:
    inside = set(group)
    if any(has_effect(user) for node in group for user in node.users):
        return 0  # a buffer that is written to is no constant
    values: dict[fx.Node, Any] = {}
    for node in group:
        values[node] = graph.evaluate(node, values)
    weights = [n for n in group if n.op == "get_attr"]
    freed = [n for n in weights if inside.issuperset(n.users)]
    results = [n for n in group if n.op != "get_attr" and not inside.issuperset(n.users)]
    if not all(isinstance(values[n], Tensor) for n in results):
        return 0
    if sum(values[n].nbytes for n in results) > sum(values[n].nbytes for n in freed):
        return 0
    for node in freed:
        del graph.tensors[str(node.target)]  # its name is free for what takes its place
    largest = max(weights, key=lambda n: values[n].nbytes)
    for node in results:
        name = _free_name(graph, str(largest.target))
        graph.tensors[name] = values[node].contiguous()
        with graph.ops.inserting_before(node):
            node.replace_all_uses_with(graph.ops.get_attr(name))
    return len(results)


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is torch.ops.compress.dequantize.default:
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and not has_effect(node)


def _free_name(graph: Graph, name: str) -> str:
    """``fc.parametrizations.weight.original1`` and ``fc.weight_v`` stand for ``fc.weight``."""
    plain = re.sub(r"(?:parametrizations\.)?(\w+?)(?:\.original\d*|_v|_g|_orig)$", r"\1", name)
    # "_", for what stands below a tensor's name cannot be an attribute of a module
    names = itertools.chain([plain], (f"{plain}_{i}" for i in itertools.count(1)))
    return next(n for n in names if n not in graph.tensors)


def _fold_batch_norm(graph: Graph, norm: fx.Node, kept: set[str]) -> bool:
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or layer.target not in _FOLDABLE or layer.name in kept:
        return False
    weight_name, bias_name = _plain(graph, layer.args[1]), _plain(graph, argument(layer, "bias", None))
    gamma, beta, mean, var = (_plain(graph, a) for a in norm.args[1:5])
    if weight_name is None or mean is None or var is None or argument(norm, "training", False):
        return False
    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    shared = len(weight_node.users) > 1 or len(layer.users) > 1
    has_unknown_bias = argument(layer, "bias", None) is not None and bias_name is None
    weight = graph.tensors[weight_name]
    # the norm's channels are on axis 1: those of a linear layer only if its output is [rows, channels],
    # those of a convolution only if it has a batch
    if shared or has_unknown_bias or layer.meta.get("rank") != weight.ndim:
        return False
    one = torch.ones(weight.shape[0], dtype=torch.float64)
    scale = graph.tensors[gamma].double() if gamma else one
    shift = graph.tensors[beta].double() if beta else torch.zeros_like(one)
    bias = graph.tensors[bias_name].double() if bias_name else torch.zeros_like(one)
    eps = float(argument(norm, "eps", 1e-5))
    a = scale / torch.sqrt(graph.tensors[var].double() + eps)
    folded = (weight.double() * a.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
    graph.set_weight(weight_name, folded)
    new_bias = (a * (bias - graph.tensors[mean].double()) + shift).to(weight.dtype)
    name = bias_name or f"{weight_name.removesuffix('.weight')}.bias"
    taken = len(_reads(graph, bias_name)) > 1 if bias_name else name in graph.tensors
    if taken:
        name = _free_name(graph, name)
    graph.tensors[name] = new_bias
    with graph.ops.inserting_before(layer):
        bias_node = graph.ops.get_attr(name)
    set_bias(layer, bias_node)
    norm.replace_all_uses_with(layer)
    graph.ops.erase_node(norm)
    return True


def _reads(graph: Graph, name: str) -> list[fx.Node]:
    return [u for n in graph.ops.nodes if n.op == "get_attr" and n.target == name for u in n.users]


def _as_linear(graph: Graph, node: fx.Node) -> bool:
    """Rewrite a product with a stored weight; the weight is transposed once, here."""
    bias: Any = None
    if node.target is _aten.addmm.default:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return False
        bias, x, w = node.args[:3]
        bias_name = _plain(graph, bias)
        if bias_name is None or graph.tensors[bias_name].ndim != 1:
            return False
    else:
        x, w = node.args[:2]
    if not isinstance(w, fx.Node):
        return False
    name = _plain(graph, w)
    if name is not None and graph.tensors[name].ndim == 2 and len(w.users) == 1 and _plain(graph, x) is None:
        graph.tensors[name] = graph.tensors[name].t().contiguous()
        weight = w
    else:
        stored = _transposed(graph, w)
        if stored is None:
            return False
        weight = stored
    with graph.ops.inserting_before(node):
        linear = graph.ops.call_function(_aten.linear.default, (x, weight, bias))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    graph.ops.erase_node(node)
    return True


def _take_before(graph: Graph, node: fx.Node, kept: set[str]) -> bool:
    """Take a slice from the input of a linear layer instead of its output, where nobody reads the rest."""
    layer = node.args[0]
    if not isinstance(layer, fx.Node) or layer.target is not _aten.linear.default or layer.name in kept:
        return False
    rank, axis = layer.meta.get("rank"), argument(node, "dim", 0)
    if rank is None or len(layer.users) != 1 or axis % rank == rank - 1 or node.meta.get("rank", 0) < 2:
        return False
    if any(layer < read for read in node.all_input_nodes):
        return False  # where to slice is known only after the layer
    assert callable(node.target)
    with graph.ops.inserting_before(layer):
        taken = graph.ops.call_function(
            node.target, (layer.args[0], axis % rank, *node.args[2:]), node.kwargs
        )
    taken.meta["rank"] = layer.meta["rank"] = node.meta["rank"]
    layer.update_arg(0, taken)
    node.replace_all_uses_with(layer)
    graph.ops.erase_node(node)
    return True


def _transposed(graph: Graph, value: fx.Node) -> fx.Node | None:
    """The stored matrix that `value` is the transpose of; None if it is anything else."""
    source = value.args[0] if value.args else None
    name = _plain(graph, source)
    if name is None or graph.tensors[name].ndim != 2:
        return None
    axes: tuple[Any, ...] = value.args[1:]
    order: tuple[int, ...] = (0, 1)
    if value.target in (_aten.t.default, _aten.numpy_T.default, _aten.mT.default):
        order = (1, 0)
    elif value.target is _aten.permute.default:
        order = tuple(axis % 2 for axis in axes[0])
    elif value.target is _aten.transpose.int:
        # transpose(0, 0) is the matrix itself
        order = (1, 0) if (axes[0] - axes[1]) % 2 else (0, 1)
    if order != (1, 0):
        return None
    assert isinstance(source, fx.Node)
    return source
