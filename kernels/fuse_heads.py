"""Output heads in codes, as `vq_logits` and `screen_logits` leave them, as one operator each.

::

    linear -> slice -> index_select -> add ..  [-> add of biases]            becomes  compress::vq_logits
    .. -> topk -> embedding -> matmul [-> add of biases] -> scatter          its part that is exact

They are found by their operators, not by their names, so a head is found in a file as in a graph just made.
What another pass has put in between stays as it is, and so do rows of candidates that are encoded: they are
decoded as they are looked up. A codebook that is encoded is decoded when the module is made.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import compress.kernels.vq_logits.op  # noqa: F401 - registers the operator
from compress.graph import Graph, argument

VQ_LOGITS = torch.ops.compress.vq_logits.default

_aten = torch.ops.aten


@dataclass(frozen=True)
class Codes:
    """Coarse logits.

    Attributes:
        product: the layer that multiplies by all codebooks.
        parts: of each stage, where its codebook begins and ends, and the name of its map.
        tokens: in each map.
        token_bias: the tensor of biases ``[V]`` that is added to them, or None.
        logits: the operator that gives them.
    """

    product: fx.Node
    parts: tuple[tuple[int, int, str], ...]
    tokens: int
    token_bias: fx.Node | None
    logits: fx.Node

    @property
    def stem(self) -> str:
        """What the names of its maps begin with, such as "lm_head."."""
        return self.parts[0][2].removesuffix("map0")

    @property
    def sizes(self) -> list[int]:
        """Entries of each codebook."""
        return [end - start for start, end, _ in self.parts]

    def maps(self, graph: Graph) -> Tensor:
        """Integers ``[stages, V]``, as wide as the widest that are stored."""
        maps = [graph.tensors[name] for _, _, name in self.parts]
        widest = max((m.dtype for m in maps), key=lambda dtype: dtype.itemsize)
        return torch.stack([m.to(widest) for m in maps])


@dataclass(frozen=True)
class _Candidates:
    """Exact logits in place of the largest coarse ones: rows and bias of a dense head, and the result."""

    rows: fx.Node
    bias: fx.Node | None
    count: int
    logits: fx.Node


def fuse_heads(graph: Graph) -> None:
    """Replace the operators of every head in codes, in place."""
    for codes in find_codes(graph):
        _replace(graph, codes, _candidates(graph, codes))


def find_codes(graph: Graph) -> list[Codes]:
    """The heads in codes of a graph."""
    products = [node for node in graph.ops.nodes if node.target is _aten.linear.default]
    return [codes for product in products if (codes := _codes(graph, product)) is not None]


def _codes(graph: Graph, product: fx.Node) -> Codes | None:
    """The coarse logits of which this is the product, if it is one of codebooks."""
    weight: Any = product.args[1]
    name = graph._weight_name(weight)
    bias = argument(product, "bias", None)
    if name is None:
        return None
    is_cast = weight.target is _aten.to.dtype and name not in graph.encodings
    if is_cast or _product_dtype(graph, product) not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    entries = graph.shape(name)[0]
    added = stored(graph, bias)
    if bias is not None and (added is None or added.shape != (entries,)):
        return None
    picks: dict[fx.Node, tuple[int, int, str]] = {}
    for user in product.users:
        is_slice = user.target is _aten.slice.Tensor and len(user.args) == 4 and user.args[1] == -1
        readers: Any = list(user.users) if is_slice else [user]
        bounds: Any = user.args[2:] if is_slice else (0, entries)
        start, end = bounds
        for reader in readers:
            indices = _map(graph, reader)
            if indices is None:
                return None
            picks[reader] = (start, min(end, entries), indices)
    parts = list(picks.values())
    # one codebook after the other, and fewer entries than tokens
    contiguous = [0, *(end for _, end, _ in parts)] == [*(start for start, _, _ in parts), entries]
    tokens = {graph.tensors[indices].numel() for _, _, indices in parts}
    if len(tokens) != 1 or not contiguous or entries >= min(tokens):
        return None
    return _sum(graph, product, picks, min(tokens))


def _map(graph: Graph, node: fx.Node) -> str | None:
    """The name of the map by which an operator takes entries of its last axis, if it does."""
    if node.target is not _aten.index_select.default or node.args[1] != -1:
        return None
    indices: Any = node.args[2]
    if indices.target is _aten.to.dtype and indices.args[1] in (torch.int32, torch.int64):
        indices = indices.args[0]
    name = str(indices.target)
    return name if indices.op == "get_attr" and name in graph.tensors else None


def _sum(
    graph: Graph, product: fx.Node, picks: dict[fx.Node, tuple[int, int, str]], tokens: int
) -> Codes | None:
    """The sum of all that is picked from a product, in this order, and perhaps a bias."""
    total, *rest = picks
    for pick in rest:
        both = _only_user(total)
        if both is None or both.target is not _aten.add.Tensor or both.args != (total, pick) or both.kwargs:
            return None
        if _only_user(pick) is None:
            return None
        total = both
    token_bias = None
    last = _only_user(total)
    if last is not None and last.target is _aten.add.Tensor and last.args[0] is total and not last.kwargs:
        other = stored(graph, last.args[1])
        dtype = _product_dtype(graph, product)
        # one for each token, and of no wider dtype: the sum would have that dtype
        if (
            other is not None
            and other.shape == (tokens,)
            and torch.promote_types(other.dtype, dtype) == dtype
        ):
            token_bias, total = last.args[1], last
    assert token_bias is None or isinstance(token_bias, fx.Node)
    return Codes(product, tuple(picks.values()), tokens, token_bias, total)


def _candidates(graph: Graph, codes: Codes) -> _Candidates | None:
    """The exact part of the head with these coarse logits, if all that reads them belongs to one."""
    scatter = next((user for user in codes.logits.users if user.target is _aten.scatter.src), None)
    if scatter is None or len(codes.logits.users) != 2 or scatter.args[:2] != (codes.logits, -1):
        return None
    chosen: Any = scatter.args[2]
    exact: Any = scatter.args[3]
    first: Any = chosen.args[0] if chosen.target is operator.getitem and chosen.args[1] == 1 else None
    if first is None or first.target is not _aten.topk.default or first.args[0] is not codes.logits:
        return None
    bias = None
    if exact.target is _aten.add.Tensor and not exact.kwargs:
        exact, index = exact.args
        if index.target is not _aten.index.Tensor or index.args[1] != [chosen]:
            return None
        bias = index.args[0]
    # squeeze(matmul(embedding(rows, chosen), unsqueeze(hidden, -1)), -1)
    matmul = exact.args[0] if exact.target is _aten.squeeze.dim and exact.args[1] == -1 else None
    if matmul is None or matmul.target is not _aten.matmul.default:
        return None
    table, column = matmul.args
    if table.target is not _aten.embedding.default or table.args[1] is not chosen:
        return None
    if column.target is not _aten.unsqueeze.default or column.args != (codes.product.args[0], -1):
        return None
    rows = table.args[0]
    columns = graph.shape(str(graph._weight_name(codes.product.args[1])))[1]
    for node, shape in ((rows, (codes.tokens, columns)), (bias, (codes.tokens,))):
        tensor = stored(graph, node)
        if node is not None and (tensor is None or tensor.shape != shape):
            return None
        if tensor is not None and tensor.dtype != _product_dtype(graph, codes.product):
            return None
    if list(first.args[2:3]) not in ([], [-1]) or list(first.args[3:4]) not in ([], [True]):
        return None
    return _Candidates(rows, bias, first.args[1], scatter)


def stored(graph: Graph, node: Any) -> Tensor | None:
    """The tensor that this reads as it is stored; None if it is something else."""
    is_read = isinstance(node, fx.Node) and node.op == "get_attr"
    return graph.tensors.get(str(node.target)) if is_read else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(graph: Graph, codes: Codes, exact: _Candidates | None) -> None:
    old = codes.logits if exact is None else exact.logits
    hidden, codebook = codes.product.args[:2]
    stacked, stem = codes.maps(graph), codes.stem
    token_bias: Any = codes.token_bias
    added = stored(graph, argument(codes.product, "bias", None))
    with graph.ops.inserting_before(old):
        maps_node = _tensor(graph, f"{stem}codes", stacked)
        if added is not None:
            # a bias of entries is one of tokens
            whole = torch.zeros(stacked.shape[1]) if token_bias is None else stored(graph, token_bias)
            assert whole is not None
            whole = whole.float()
            for start, end, name in codes.parts:
                whole = whole + added[start:end].float()[graph.tensors[name].long()]
            token_bias = _tensor(graph, f"{stem}token_bias", whole)
        rest = (None, None, 0) if exact is None else (exact.rows, exact.bias, exact.count)
        new = graph.ops.call_function(
            VQ_LOGITS, (hidden, codebook, maps_node, codes.sizes, token_bias, *rest)
        )
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    graph.prune_dead_code()


def _tensor(graph: Graph, name: str, value: Tensor) -> fx.Node:
    name = graph.free_name(name)
    graph.tensors[name] = value
    return graph.ops.get_attr(name)


def _product_dtype(graph: Graph, product: fx.Node) -> torch.dtype:
    """The dtype of the weight of a layer, and so of what it gives."""
    name = str(graph._weight_name(product.args[1]))
    encoded = graph.encodings.get(name)
    return graph.tensors[name].dtype if encoded is None else encoded.dtype
