"""The calibration sweep: what every layer's input looks like, layer after layer, in one pass.

The sweep runs the compressed graph (and, where a method asks for it, the original one in lockstep)
node by node over *all* calibration batches. At a site it hands the streamed statistics of the site's
input to a visitor, takes the new weight, and goes on from the compressed prefix. So every layer sees
the inputs it will see in the finished model, for the price of one forward pass on each side.

Only live values are kept, and past `max_memory` the ones needed last are spilled to disk, so memory
does not grow with the number of samples.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from compress.encoding import Encoded
from compress.errors import CalibrationError
from compress.graph import Graph, Site, has_effect
from compress.progress import Progress, Silent
from compress.statistics import (
    HELD_OUT_EVERY,
    Geometry,
    Need,
    Statistics,
    Sums,
    batched,
    chunks,
    output_error,
    thinning,
)

__all__ = ["Need", "Statistics", "Update", "Visitor", "output_error", "sweep"]


@dataclass(frozen=True)
class Update:
    """What a visitor can return to change more than the weight.

    Attributes:
        weight: new values, or an encoding.
        bias: float ``[O]``, added to the bias of the site's operator; one is made if it has none. Only where
            `Graph.owns_bias`.
    """

    weight: Tensor | Encoded
    bias: Tensor | None = None


Visitor = Callable[[Site, Tensor, Statistics | None], Tensor | Encoded | Update | None]
"""(site, weight, statistics or None without data) -> new values, an encoding, more, or None to leave it."""


def sweep(
    graph: Graph,
    sites: Sequence[Site],
    visit: Visitor,
    *,
    batches: Iterable[Sequence[Tensor]] | None = None,
    reference: Graph | None = None,
    needs: frozenset[Need] = frozenset({"diag"}),
    max_memory: int = 2 << 30,
    progress: Progress | None = None,
) -> Graph:
    """Visit sites in execution order and return the graph with the weights the visitor gave.

    A weight with several sites is visited at the first of them. Embeddings have no statistics.

    Args:
        graph: what is being compressed; not changed.
        sites: which of its sites to visit.
        visit: called once for each weight.
        batches: flat inputs of the graph, re-iterable; None for a data-free visit.
        reference: the original graph, for "mean" and "G"; a site whose node it lacks counts as
            unchanged upstream (``x = x~``).
        needs: statistics to collect.
        max_memory: bytes of live activations kept in memory.
        progress: told about every visited site.
    """
    progress = progress or Silent()
    result = graph.copy()
    todo: dict[str, Site] = {}
    for site in sites:
        todo.setdefault(site.weight, site)
    at_node = {site.node: site for site in todo.values()}
    if batches is None:
        for site in todo.values():
            progress.step(site.name)
            _store(result, site, visit(site, graph.weight(site.weight), None))
        return result
    with tempfile.TemporaryDirectory(prefix="compress-sweep-") as folder:
        store = _ValueStore(max_memory, Path(folder))
        original = None
        if reference is not None and needs & {"mean", "G"}:
            original = _Lane("original", reference, batches, store)
        lane = _Lane("compressed", graph, batches, store, twin=original)
        cache: dict[Any, Statistics] = {}
        path = lane.until_last(at_node)
        for node in path:
            here = at_node.get(node.name)
            if here is not None:
                statistics = _statistics(here, node, lane, original, needs, cache)
                progress.step(here.name)
                source = _weight_node(node)
                new = visit(here, graph.weight(here.weight), statistics)
                _store(result, here, new)
                if new is not None:
                    # the operator may read the weight through a cast
                    lane.override(source, result.weight(here.weight).to(lane.constant(source).dtype))
                if isinstance(new, Update) and new.bias is not None:
                    lane.shift(node, new.bias)
            if node is path[-1]:
                break  # nobody needs its output, which in a language model is the largest value of all
            lane.compute(node)
            for key in [k for k in cache if not lane.alive(k[0])]:
                del cache[key]
    return result


def _store(graph: Graph, site: Site, new: Tensor | Encoded | Update | None) -> None:
    if isinstance(new, Update):
        if new.bias is not None:
            graph.shift_bias(site, new.bias)
        new = new.weight
    if isinstance(new, Encoded):
        graph.set_encoding(site.weight, new)
    elif new is not None:
        graph.set_weight(site.weight, new)


def _weight_node(node: fx.Node) -> fx.Node:
    value = node.args[0 if node.target is torch.ops.aten.embedding.default else 1]
    assert isinstance(value, fx.Node)
    return value


# -- statistics -----------------------------------------------------------------------------------


def _statistics(
    site: Site,
    node: fx.Node,
    lane: _Lane,
    original: _Lane | None,
    needs: frozenset[Need],
    cache: dict[Any, Statistics],
) -> Statistics | None:
    if site.kind == "embedding":
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    geometry = None
    if site.kind == "conv":
        geometry = Geometry.of(node, tuple(lane.constant(_weight_node(node)).shape[2:]))
    key = (source.name, geometry)
    if key not in cache:
        cache[key] = _collect(node, source, lane, original, needs, geometry)
    return cache[key]


def _collect(
    node: fx.Node,
    source: fx.Node,
    lane: _Lane,
    original: _Lane | None,
    needs: frozenset[Need],
    geometry: Geometry | None,
) -> Statistics:
    """Stream over the batches; one row matrix of one batch is the most that is held."""
    twin = original.input_of(node.name) if original is not None else None
    every = 1
    if geometry is not None:
        first = lane.value(source, 0)
        columns = math.prod(geometry.kernel) * first.shape[-len(geometry.kernel) - 1] // geometry.groups
        every = thinning(geometry.places(first.shape), lane.batches * len(first), columns)
    fitting, held_out = Sums(needs, geometry, every), Sums(needs, geometry, every)
    samples = 0
    for batch in range(lane.batches):
        mine = lane.value(source, batch)
        other = original.value(twin, batch) if original is not None and twin is not None else None
        for x_tilde, x in chunks(mine, None if other is mine else other, geometry):
            if "held_out" not in needs or not batched(x_tilde, geometry):
                fitting.add(x_tilde, x)
                continue
            last = (torch.arange(samples, samples + len(x_tilde)) + 1) % HELD_OUT_EVERY == 0
            samples += len(x_tilde)
            for sums, chosen in ((fitting, ~last), (held_out, last)):
                if bool(chosen.any()):
                    sums.add(x_tilde[chosen], None if x is None else x[chosen])
    if not held_out.rows:
        return fitting.statistics()
    apart = held_out.statistics()
    fitting.include(held_out)
    return replace(fitting.statistics(), held_out=apart)


# -- running node by node over all batches ---------------------------------------------------------


class _Lane:
    """One graph, evaluated node by node over all batches at once.

    Where a `twin` (the original graph) has computed the same node from the same inputs, its values
    are taken over, so the prefix that is not compressed yet costs nothing twice.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        feed: Iterable[Sequence[Tensor]],
        store: _ValueStore,
        twin: _Lane | None = None,
    ) -> None:
        self.name = name
        self.graph = graph
        self.store = store
        # a value changed in place must not be the other lane's
        self.twin = None if any(has_effect(n) for n in graph.ops.nodes) else twin
        self.batches = 0
        self.nodes = list(graph.ops.nodes)
        self.by_name = {n.name: n for n in self.nodes}
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.uses = {n: sorted(self.position[u] for u in n.users) for n in self.nodes}
        self.constants: dict[fx.Node, Any] = {}
        self.variable: set[fx.Node] = set()
        self.diverged: set[str] = set()
        self.overridden: set[fx.Node] = set()
        self.shifts: dict[fx.Node, Tensor] = {}
        self.done = 0
        self.live: set[str] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(i in self.variable for i in node.all_input_nodes):
                self.variable.add(node)
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        for batch in feed:
            for node, value in zip(placeholders, batch, strict=True):
                self.store.put((name, node.name, self.batches), value, self.uses[node], -1)
            self.batches += 1
        if not self.batches:
            raise CalibrationError("the calibration data is empty", expected="at least one sample")

    def until_last(self, sites: dict[str, Site]) -> list[fx.Node]:
        """The nodes up to the last site: nothing after it needs computing."""
        last = max((self.position[self.by_name[name]] for name in sites), default=-1)
        return self.nodes[: last + 1]

    def alive(self, name: str) -> bool:
        return name in self.live

    def constant(self, node: fx.Node) -> Tensor:
        """The value of a node that depends on weights only."""
        if node not in self.constants:
            arguments = {i: self.constant(i) for i in node.all_input_nodes}
            self.constants[node] = self._evaluate(node, arguments)
        value: Tensor = self.constants[node]
        return value

    def override(self, node: fx.Node, value: Tensor) -> None:
        """From here on this weight has another value."""
        self.constants[node] = value
        self.diverged.add(node.name)
        self.overridden.add(node)

    def shift(self, node: fx.Node, bias: Tensor) -> None:
        """From here on the channels of this operator's output are shifted."""
        spatial = self.constant(_weight_node(node)).ndim - 2
        self.shifts[node] = bias.view(-1, *[1] * spatial)

    def _evaluate(self, node: fx.Node, arguments: dict[fx.Node, Any]) -> Any:
        if _is_slow(node, arguments):
            # sums are in float32 either way, and rounded at the end
            wide = {n: t.float() for n, t in arguments.items()}
            value = self.graph.evaluate(node, wide).to(next(iter(arguments.values())).dtype)
        else:
            value = self.graph.evaluate(node, arguments)
        return value + self.shifts[node].to(value.dtype) if node in self.shifts else value

    def value(self, node: fx.Node, batch: int) -> Any:
        if node not in self.variable:
            return self.constant(node)
        return self.store.get((self.name, node.name, batch))

    def input_of(self, name: str) -> fx.Node | None:
        """The first input of the node of this name, computed; None if there is no such node."""
        node = self.by_name.get(name)
        if node is None:
            return None
        for earlier in self.nodes[self.done : self.position[node]]:
            self.compute(earlier)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source

    def compute(self, node: fx.Node) -> None:
        """Evaluate one node for all batches, then drop the values nobody reads any more."""
        here = self.position[node]
        self.done = here + 1
        if node.op == "output":
            return
        if node.op == "placeholder":
            self.live.add(node.name)
        elif node in self.variable:
            shared = self._shared(node)
            for batch in range(self.batches):
                key = (self.name, node.name, batch)
                if shared:
                    assert self.twin is not None
                    value = self.store.get((self.twin.name, node.name, batch))
                else:
                    arguments = {i: self.value(i, batch) for i in node.all_input_nodes}
                    value = self._evaluate(node, arguments)
                self.store.put(key, value, self.uses[node], here)
            self.live.add(node.name)
            if not shared:
                self.diverged.add(node.name)
        else:
            if not self._same_constant(node):
                self.diverged.add(node.name)
            if any(i in self.overridden for i in node.all_input_nodes):
                self.constant(node)  # now: the value it was given is dropped below
                self.overridden.add(node)
        for source in [node, *node.all_input_nodes]:
            if not self.uses[source] or self.uses[source][-1] <= here:
                self._drop(source)

    def _drop(self, node: fx.Node) -> None:
        self.constants.pop(node, None)
        self.live.discard(node.name)
        for batch in range(self.batches):
            self.store.drop((self.name, node.name, batch))

    def _same_constant(self, node: fx.Node) -> bool:
        if self.twin is None or node.op != "get_attr":
            return False
        other = self.twin.graph.tensors.get(str(node.target))
        return other is not None and other is self.graph.tensors.get(str(node.target))

    def _shared(self, node: fx.Node) -> bool:
        """Whether the twin computes the same value at this node; if so, it has done so now."""
        twin = self.twin and self.twin.by_name.get(node.name)
        if not self.twin or not twin or twin.target != node.target or twin.op != node.op:
            return False
        if any(i.name in self.diverged for i in node.all_input_nodes):
            return False
        if str(twin.args) != str(node.args) or str(twin.kwargs) != str(node.kwargs):
            return False
        for earlier in self.twin.nodes[self.twin.done : self.twin.position[twin] + 1]:
            self.twin.compute(earlier)
        return (self.twin.name, node.name, 0) in self.store


def _is_slow(node: fx.Node, arguments: dict[fx.Node, Any]) -> bool:
    """A linear layer in 16 bits: a processor without kernels for it takes several times as long as in 32."""
    if node.target is not torch.ops.aten.linear.default:
        return False
    return all(t.dtype in (torch.bfloat16, torch.float16) and t.is_cpu for t in arguments.values())


class _ValueStore:
    """Live values under a memory cap; what is needed last goes to disk first."""

    def __init__(self, max_bytes: int, folder: Path) -> None:
        self.max_bytes = max_bytes
        self.folder = folder
        self.memory: dict[tuple[str, str, int], Any] = {}
        # what can be spilled, by lane and node: all batches of a node are needed at the same time, and
        # looking at each of them for every value that comes in would be quadratic in their number
        self.nodes: dict[tuple[str, str], dict[tuple[str, str, int], None]] = {}
        self.sizes: dict[tuple[str, str, int], int] = {}
        self.uses: dict[tuple[str, str, int], list[int]] = {}
        self.spilled: dict[tuple[str, str, int], Path] = {}
        self.held = 0
        self.files = 0

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self.memory or key in self.spilled

    def put(self, key: tuple[str, str, int], value: Any, uses: list[int], now: int) -> None:
        size = sum(
            t.numel() * t.element_size()
            for t in (value if isinstance(value, tuple | list) else [value])
            if isinstance(t, Tensor)
        )
        self.memory[key], self.sizes[key], self.uses[key] = value, size, uses
        self.held += size
        if size:
            self.nodes.setdefault(key[:2], {})[key] = None
        while self.held > self.max_bytes and self.nodes:
            first = (next(iter(keys)) for keys in self.nodes.values())
            self._spill(max(first, key=lambda k: self._next(k, now)))

    def get(self, key: tuple[str, str, int]) -> Any:
        if key in self.memory:
            return self.memory[key]
        return torch.load(self.spilled[key], weights_only=True)

    def drop(self, key: tuple[str, str, int]) -> None:
        if key in self.memory:
            self._release(key)
        elif key in self.spilled:
            self.spilled.pop(key).unlink()
        self.sizes.pop(key, None)
        self.uses.pop(key, None)

    def _next(self, key: tuple[str, str, int], now: int) -> int:
        return next((use for use in self.uses[key] if use > now), 1 << 60)

    def _spill(self, key: tuple[str, str, int]) -> None:
        self.files += 1
        path = self.folder / f"{self.files}.pt"
        torch.save(self.memory[key], path)
        self._release(key)
        self.spilled[key] = path

    def _release(self, key: tuple[str, str, int]) -> None:
        del self.memory[key]
        self.held -= self.sizes[key]
        keys = self.nodes.get(key[:2], {})
        keys.pop(key, None)
        if not keys:
            self.nodes.pop(key[:2], None)
