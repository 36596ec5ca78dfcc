"""From a graph of decode-then-operate to one of operators that read packed weights.

============================ ======================================================= ==================
reader of an encoded weight  becomes                                                 the weight
============================ ======================================================= ==================
linear, 4-bit integers       a product of `compress.kernels.products`, then the bias stays packed
embedding                    rows of packed codes, looked up, then decoded           stays packed
everything else              the operator as it is                                   decoded once
============================ ======================================================= ==================

Output heads in codes become one operator each, encoded or not (`compress.kernels.fuse_heads`), and so do
chains of two small linear layers in 16 bits (`compress.kernels.fuse_chains`).

A weight with several readers is packed only if all of them can read it so: it is there once, or not packed.
What cannot stay packed is decoded here and is float from then on: to decode it in every call would cost more
than a float layer. The reason is given.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx

from compress.activations import DYNAMIC
from compress.artifact import Lowered
from compress.codebook import CodebookWeight
from compress.encoding import Encoded, EncodedWeight
from compress.graph import Graph, argument
from compress.kernels.fuse_chains import LOW_RANK_MATMUL, fuse_chains
from compress.kernels.fuse_heads import VQ_LOGITS, fuse_heads
from compress.kernels.products import CANONICAL, QUANTIZE_DYNAMIC, W4A8_MATMUL, Product, product_for

Decode = Literal["run", "load"]

_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default
_CAST = torch.ops.aten.to.dtype


def fuse(graph: Graph, decode: Decode = "run") -> tuple[Graph, tuple[Lowered, ...]]:
    """A graph that computes the same, with the operators of the table above.

    Args:
        graph: left as it is; tensors are shared.
        decode: "run" keeps packed what can be read so; "load" decodes every weight, for float speed in float
            memory.

    Returns:
        the graph, for running only: no pass knows its operators; and what became of each encoded weight.
    """
    fused = graph.copy()
    fuse_heads(fused)
    found = []
    for name, encoded in graph.encodings.items():
        readers, reason = _readers(fused, name, encoded)
        if reason or decode == "load":
            # where the weight is not float32, the cast that follows is a no-op on the plain value
            fused.set_weight(name, encoded.decode())
            found.append(Lowered(name, "float", "decoded at load", reason=reason))
            continue
        product, reason = None, ""
        if any(node.target is _LINEAR for node in readers):
            assert isinstance(encoded, EncodedWeight)
            product, reason = product_for(encoded, all(_is_rounded(node) for node in readers))
        packed = fused._weight_node(name)
        forms = dict.fromkeys(_read_packed(fused, node, packed, encoded, product) for node in readers)
        form = " and ".join(forms)
        found.append(Lowered(name, form, form, reason=reason))
    fused.encodings.clear()
    fuse_chains(fused)
    fused.prune_dead_code()
    _make_contiguous(fused)
    return fused, tuple(found)


def _readers(graph: Graph, name: str, encoded: Encoded) -> tuple[list[fx.Node], str]:
    """The operators that read a weight, and why it cannot stay packed for them; "" if it can."""
    value = graph._weight_node(name)
    if encoded.dtype != torch.float32:
        # the cast that every such encoding has behind it
        (value,) = value.users
    reasons = [_why_not(node, value, encoded) for node in value.users]
    return list(value.users), next(filter(None, reasons), "")


def _why_not(node: fx.Node, weight: fx.Node, encoded: Encoded) -> str:
    """Why this operator cannot read packed codes."""
    if node.target is _EMBEDDING and node.args[0] is weight:
        indices: Any = node.args[1]
        known = isinstance(encoded, EncodedWeight | CodebookWeight) and "rank" in indices.meta
        return "" if known else f"rows of {encoded.encoding} cannot be looked up here"
    if node.target is _LINEAR and node.args[1] is weight:
        if encoded.dtype == torch.float64:
            return "no kernel multiplies in float64"
        four_bits = isinstance(encoded, EncodedWeight) and encoded.encoding.bits == 4
        return "" if four_bits else f"no kernel multiplies by {encoded.encoding}"
    name = str(node.target).removeprefix("aten.").removeprefix("compress.").split(".")[0]
    return f"no kernel for {name} with a packed weight"


def _read_packed(
    graph: Graph, node: fx.Node, decoded: fx.Node, encoded: Encoded, product: Product | None
) -> str:
    """Give a reader its packed form, in place; returns the name of that form."""
    parts = dict(zip(encoded.parts, decoded.all_input_nodes, strict=True))
    with graph.ops.inserting_before(node):
        if node.target is _LINEAR:
            assert product is not None
            result = _product(graph.ops, node, parts, encoded, product)
            form = product.name
        else:
            result = _rows(graph.ops, node, parts, encoded)
            form = "rows decoded when looked up"
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.ops.erase_node(node)
    return form


def _product(
    ops: fx.Graph, node: fx.Node, parts: Mapping[str, fx.Node], encoded: Encoded, product: Product
) -> fx.Node:
    width = encoded.encoding.width(encoded.columns)
    tensors = [parts.get(part) for part in product.parts]
    x = _codes(ops, node.args[0]) if product.operator is W4A8_MATMUL else [node.args[0]]
    y = ops.call_function(product.operator, (*x, *tensors, width, encoded.columns, CANONICAL))
    y.meta["dtype"] = encoded.dtype
    bias: Any = argument(node, "bias", None)
    return y if bias is None else ops.call_function(torch.ops.aten.add.Tensor, (y, bias))


def _is_rounded(node: fx.Node) -> bool:
    """Whether an operator is a linear layer that reads what is rounded to 8 bits on every call."""
    source: Any = node.args[0]
    return node.target is _LINEAR and source.target is DYNAMIC


def _codes(ops: fx.Graph, rounded: Any) -> list[fx.Node]:
    """Codes, scales and zero points of what is rounded; found once for all that read it."""
    value = rounded.args[0]
    made = [user for user in value.users if user.target is QUANTIZE_DYNAMIC]
    if not made:
        # weights come in the order they were encoded in: a later one may be of a layer that stands before
        with ops.inserting_before(min(value.users)):
            made = [ops.call_function(QUANTIZE_DYNAMIC, (value,))]
    return [ops.call_function(operator.getitem, (made[0], i)) for i in range(3)]


def _rows(ops: fx.Graph, node: fx.Node, parts: Mapping[str, fx.Node], encoded: Encoded) -> fx.Node:
    """Decode the rows that are looked up, and no others: ``[...] -> [..., columns]``."""
    aten = torch.ops.aten
    indices: Any = node.args[1]
    flat = ops.call_function(aten.reshape.default, (indices, [-1]))
    rows = {
        # a table of levels is common to all rows
        part: value if part == "table" else ops.call_function(aten.index_select.default, (value, 0, flat))
        for part, value in parts.items()
    }
    count = ops.call_function(aten.sym_size.int, (flat, 0))
    *arguments, _ = encoded.arguments(rows)
    value = ops.call_function(encoded.operator, (*arguments, [count, encoded.columns]))
    if encoded.dtype != torch.float32:
        value = ops.call_function(_CAST, (value, encoded.dtype))
    sizes = [ops.call_function(aten.sym_size.int, (indices, axis)) for axis in range(indices.meta["rank"])]
    return ops.call_function(aten.reshape.default, (value, [*sizes, encoded.columns]))


def _make_contiguous(graph: Graph) -> None:
    """Float weights as their kernels read them, which know no strides; packed ones are made so."""
    for node in graph.ops.nodes:
        for source in node.all_input_nodes if node.target in (LOW_RANK_MATMUL, VQ_LOGITS) else ():
            if source.op == "get_attr":
                graph.tensors[source.target] = graph.tensors[source.target].contiguous()
