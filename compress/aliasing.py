"""Whether a captured graph writes into memory that it reads again under another name.

``x.add_(1)`` by itself is harmless: what comes later reads the result of the write. After ``x[:, 0] = 0`` the
graph goes on with ``x``, though, and the write is an operator whose result nobody reads. That works only for
who runs all operators in their order on values that share memory as they did in the model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx


def writes_behind_names(graph: fx.Graph) -> bool:
    """Whether a value is read after its memory was written to through another value."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    return any(
        order[reader] > order[node]
        for node, sharing in _writes(graph)
        for value in sharing
        for reader in value.users
    )


def keep_state(graph: fx.Graph) -> None:
    """Have a graph write into copies of its inputs and buffers, so that every run starts from the same."""
    targets = {sharing[0] for _, sharing in _writes(graph)}
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for written in [n for n in graph.nodes if n.op in ("placeholder", "get_attr") and n in targets]:
        with graph.inserting_after(written if written.op == "get_attr" else last_input[0]):
            copy = graph.call_function(torch.ops.aten.clone.default, (written,))
        copy.meta = dict(written.meta)
        for reader in [user for user in written.users if user is not copy]:
            reader.replace_input_with(written, copy)


def _writes(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Every operator that writes, with the values before it that share the memory, the oldest first."""
    owner: dict[fx.Node, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for written in _arguments(node, write=True):
            yield node, list(sharing[owner[written]])
        owner[node] = next((owner[source] for source in _shared_inputs(node)), node)
        sharing.setdefault(owner[node], []).append(node)


def _shared_inputs(node: fx.Node) -> list[fx.Node]:
    """Arguments whose memory the result may be."""
    if node.target is operator.getitem:
        return [source for source in node.args[:1] if isinstance(source, fx.Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(result.alias_info is not None for result in schema.returns):
        return []
    return _arguments(node, write=False)


def _arguments(node: fx.Node, *, write: bool) -> list[fx.Node]:
    """Arguments the operator's schema marks as shared with the result, or as written to."""
    schema: Any = getattr(node.target, "_schema", None)
    found = []
    for position, declared in enumerate(schema.arguments if schema is not None else ()):
        if declared.alias_info is None or (write and not declared.alias_info.is_write):
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
        found += [value] if isinstance(value, fx.Node) else []
    return found
