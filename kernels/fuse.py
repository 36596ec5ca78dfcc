"""From a graph of decode-then-operate to one of operators that read packed weights.

============================ ======================================================= ==================
reader of an encoded weight  becomes                                                 the weight
============================ ======================================================= ==================
linear, 4-bit integers       `compress::w4_matmul`, then the bias                    stays packed
embedding                    rows of packed codes, looked up, then decoded           stays packed
everything else              the operator as it is                                   decoded once
============================ ======================================================= ==================

A weight with several readers is packed only if all of them can read it so: it is there once, or not packed.
What cannot stay packed is decoded here and is float from then on: to decode it in every call would cost more
than a float layer. The reason is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx

import compress.kernels.w4_matmul.op  # noqa: F401 - registers the operator
from compress.artifact import Lowered
from compress.codebook import CodebookWeight
from compress.encoding import Encoded, EncodedWeight
from compress.graph import Graph, argument

Decode = Literal["run", "load"]

W4_MATMUL = torch.ops.compress.w4_matmul.default
HALF = (torch.float16, torch.bfloat16)
"""The dtypes in which a GPU reads codes packed; in others the operator decodes the whole weight."""

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
    found = []
    for name, encoded in graph.encodings.items():
        readers, reason = _readers(fused, name, encoded)
        if reason or decode == "load":
            # where the weight is not float32, the cast that follows is a no-op on the plain value
            fused.set_weight(name, encoded.decode())
            found.append(Lowered(name, "float", "decoded at load", reason=reason))
            continue
        packed = fused._weight_node(name)
        forms = dict.fromkeys(_read_packed(fused, node, packed, encoded) for node in readers)
        form = " and ".join(forms)
        found.append(Lowered(name, form, form))
    fused.encodings.clear()
    fused.prune_dead_code()
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
    return f"no kernel for {str(node.target).removeprefix('aten.').split('.')[0]} with a packed weight"


def _read_packed(graph: Graph, node: fx.Node, decoded: fx.Node, encoded: Encoded) -> str:
    """Give a reader its packed form, in place; returns the name of that form."""
    parts = dict(zip(encoded.parts, decoded.all_input_nodes, strict=True))
    with graph.ops.inserting_before(node):
        if node.target is _LINEAR:
            result = _product(graph.ops, node, parts, encoded)
            form = "compress::w4_matmul"
        else:
            result = _rows(graph.ops, node, parts, encoded)
            form = "rows decoded when looked up"
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.ops.erase_node(node)
    return form


def _product(ops: fx.Graph, node: fx.Node, parts: Mapping[str, fx.Node], encoded: Encoded) -> fx.Node:
    assert isinstance(encoded, EncodedWeight)
    width = encoded.encoding.width(encoded.columns)
    tensors = (parts["codes"], parts["scales"], parts.get("zero_points"))
    y = ops.call_function(W4_MATMUL, (node.args[0], *tensors, width, encoded.columns, "canonical"))
    y.meta["dtype"] = encoded.dtype
    bias: Any = argument(node, "bias", None)
    return y if bias is None else ops.call_function(torch.ops.aten.add.Tensor, (y, bias))


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
