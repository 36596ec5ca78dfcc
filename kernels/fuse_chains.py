"""Two linear layers in a row as `compress::low_rank_matmul`, where one launch on a GPU is faster than two.

They are the chains of `decompose` and the branches of `low_rank_correction`, of float weights in 16 bits, and
any other two of that kind. Where it pays is `compress.kernels.low_rank_matmul.cost`.
"""

from __future__ import annotations

from typing import Any

import torch

import compress.kernels.low_rank_matmul.op  # noqa: F401 - registers the operator
from compress.graph import Graph, argument
from compress.kernels.fuse_heads import stored
from compress.kernels.low_rank_matmul import cost

LOW_RANK_MATMUL = torch.ops.compress.low_rank_matmul.default

_LINEAR = torch.ops.aten.linear.default


def fuse_chains(graph: Graph) -> None:
    """Replace every two linear layers that one launch does faster, in place."""
    for last in [node for node in graph.ops.nodes if node.target is _LINEAR]:
        first: Any = last.args[0]
        if first.target is not _LINEAR or len(first.users) != 1 or argument(first, "bias", None) is not None:
            continue
        a, b = stored(graph, first.args[1]), stored(graph, last.args[1])
        if a is None or b is None or {a.dtype, b.dtype} - set(cost.DTYPES):
            continue
        bias = argument(last, "bias", None)
        added = stored(graph, bias)
        # a layer spreads a bias of one number, the operator does not
        if bias is not None and (added is None or added.shape != b.shape[:1]):
            continue
        if not cost.pays(1, b.shape[0], a.shape[1], a.shape[0]):
            continue
        with graph.ops.inserting_before(last):
            new = graph.ops.call_function(LOW_RANK_MATMUL, (*first.args[:2], last.args[1], bias))
        new.meta.update(last.meta)
        last.replace_all_uses_with(new)
        graph.ops.erase_node(last)
        graph.ops.erase_node(first)
