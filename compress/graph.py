"""The graph a pipeline works on: ATen operators as `torch.export` gave them, and weights by name.

A `Graph` is a value: passes take one and return another (`copy` shares the tensors, so it is
cheap). A `Site` is one (operator, weight) pair of it. Tied weights are one weight with several
sites. An encoded weight stands in the graph as a call such as ``compress::dequantize(codes, scales, ...)``
in front of the unchanged operator, so every graph runs, whatever has been done to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from compress.encoding import Encoded
from compress.errors import InputSpecError, PassError
from compress.inputs import InputSpec

Kind = Literal["linear", "conv", "embedding"]

_KINDS: dict[Any, tuple[Kind, int]] = {
    # operator -> (kind, position of the weight argument)
    torch.ops.aten.linear.default: ("linear", 1),
    torch.ops.aten.conv1d.default: ("conv", 1),
    torch.ops.aten.conv2d.default: ("conv", 1),
    torch.ops.aten.conv3d.default: ("conv", 1),
    torch.ops.aten.conv1d.padding: ("conv", 1),
    torch.ops.aten.conv2d.padding: ("conv", 1),
    torch.ops.aten.conv3d.padding: ("conv", 1),
    torch.ops.aten.embedding.default: ("embedding", 0),
}
_WORTH_NAMING = 1024
"""Entries of a weight below which nobody asks why it is still in floating point."""


@dataclass(frozen=True)
class Site:
    """One operator and the weight it reads.

    Attributes:
        name: path of the module in the user's model, e.g. ``layer1.0.conv1``.
        kind: "linear", "conv" or "embedding".
        node: name of the operator's node.
        weight: name of the weight, e.g. ``layer1.0.conv1.weight``.
        groups: convolution groups, 1 otherwise.
    """

    name: str
    kind: Kind
    node: str
    weight: str
    groups: int = 1


@dataclass
class Graph:
    """Operators, tensors and signature of a captured model.

    Attributes:
        ops: the operators; `get_attr` targets are keys of `tensors` or `submodules`.
        tensors: parameters, buffers and constants by name.
        encodings: encoded weights by name; their parts are in `tensors` as ``<name>.<part>``.
        inputs: name, dtype, shape and dynamic axes of each flat input, in order.
        output_names: one for each flat output; None where the model returns None.
        submodules: bodies of higher-order operators, by attribute name.
        meta: what is known about the origin (source, fingerprint, recipe, ...): JSON-able.
    """

    ops: fx.Graph
    tensors: dict[str, Tensor]
    inputs: tuple[InputSpec, ...]
    output_names: tuple[str | None, ...]
    codegen: Any
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    encodings: dict[str, Encoded] = field(default_factory=dict)
    submodules: dict[str, torch.nn.Module] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        return f"Graph({inputs} -> {len(self.output_names)} outputs, {self.parameters:,} parameters)"

    # -- reading ---------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        """Every supported (operator, weight) pair, in execution order."""
        found = []
        for node in self.ops.nodes:
            kind_position = _KINDS.get(node.target) if node.op == "call_function" else None
            if kind_position is None:
                continue
            kind, position = kind_position
            weight = self._weight_name(node.args[position])
            if weight is None:
                continue
            groups = 1
            if kind == "conv":
                groups = int(argument(node, "groups", 1))
            name = node.meta.get("module") or weight.removesuffix(".weight")
            found.append(Site(name, kind, node.name, weight, groups))
        return found

    def unreached(self) -> dict[str, str]:
        """Float matrices worth compressing that belong to no site -> the operator that reads them."""
        sites = {site.weight for site in self.sites()}
        found = {}
        for node in self.ops.nodes:
            name = str(node.target)
            tensor = self.tensors.get(name) if node.op == "get_attr" else None
            if tensor is None or name in sites or not tensor.is_floating_point():
                continue
            if tensor.ndim >= 2 and tensor.numel() >= _WORTH_NAMING and not _is_part(name, self.encodings):
                readers = (str(user.target).removeprefix("aten.").split(".")[0] for user in node.users)
                found[name] = ", ".join(dict.fromkeys(readers))
        return found

    def weight(self, name: str) -> Tensor:
        """The weight of this name, decoded if it is encoded."""
        if name in self.encodings:
            return self.encodings[name].decode()
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, without decoding it."""
        return self.encodings[name].shape if name in self.encodings else tuple(self.tensors[name].shape)

    def bias(self, site: Site) -> str | None:
        """Name of the bias tensor a site's operator reads; None if it reads none, or a computed one."""
        value = None if site.kind == "embedding" else argument(self.node(site.node), "bias", None)
        if isinstance(value, fx.Node) and value.op == "get_attr" and value.target in self.tensors:
            return str(value.target)
        return None

    def unshared(self) -> set[str]:
        """Names of the weights that exactly one site reads."""
        readers = Counter(site.weight for site in self.sites())
        return {weight for weight, count in readers.items() if count == 1}

    def owns_bias(self, site: Site) -> bool:
        """Whether the bias can be changed without changing another operator: it is missing, or read once."""
        if site.kind == "embedding":
            return False
        name = self.bias(site)
        if name is None:
            # behind a cast the operator computes in another precision than the weight is stored in
            return argument(self.node(site.node), "bias", None) is None and not self._is_cast(site)
        readers = [u for n in self.ops.nodes if n.op == "get_attr" and n.target == name for u in n.users]
        return len(readers) == 1

    def node(self, name: str) -> fx.Node:
        """The node of this name."""
        for node in self.ops.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of weights, encoded ones counted decoded; buffers of integers are not counted."""
        hidden = {f"{name}.{part}" for name, encoded in self.encodings.items() for part in encoded.parts}
        plain = sum(t.numel() for n, t in self.tensors.items() if n not in hidden and t.is_floating_point())
        return plain + sum(torch.Size(e.shape).numel() for e in self.encodings.values())

    def _weight_name(self, value: object) -> str | None:
        if not isinstance(value, fx.Node):
            return None
        if value.op == "get_attr" and value.target in self.tensors:
            return str(value.target)
        if value.op == "call_function" and value.target is torch.ops.aten.to.dtype:
            return self._weight_name(value.args[0])
        codes = value.args[0] if value.op == "call_function" and value.args else None
        if isinstance(codes, fx.Node) and codes.op == "get_attr":
            name = str(codes.target).removesuffix(".codes")
            encoded = self.encodings.get(name)
            return name if encoded is not None and value.target is encoded.operator else None
        return None

    # -- rewriting -------------------------------------------------------------------------------

    def free_name(self, name: str) -> str:
        """This name for a new tensor, with an underscore for each time that it is taken."""
        taken = name in self.tensors or name in self.encodings
        return self.free_name(f"{name}_") if taken else name

    def copy(self) -> Graph:
        """A graph that can be rewritten on its own; the tensors are shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.ops, mapping)
        graph.output(result)
        return replace(
            self,
            ops=graph,
            tensors=dict(self.tensors),
            encodings=dict(self.encodings),
            meta=dict(self.meta),
        )

    def set_weight(self, name: str, value: Tensor) -> None:
        """Give a weight new values, same shape and dtype; an encoding on it is removed."""
        old = self.weight(name)
        if value.shape != old.shape or value.dtype != old.dtype:
            raise PassError(
                f"new value of {name} is {value.dtype} {list(value.shape)}",
                expected=f"{old.dtype} {list(old.shape)}",
            )
        if name in self.encodings:
            decode = self._weight_node(name)
            with self.ops.inserting_before(decode):
                plain = self.ops.get_attr(name)
            decode.replace_all_uses_with(plain)
            self._erase(decode)
            self._forget(name)
        self.tensors[name] = value.contiguous()

    def set_encoding(self, name: str, encoded: Encoded) -> None:
        """Replace a weight by its encoding: every site of it now reads the decoded codes."""
        old = self.weight(name)
        if encoded.shape != tuple(old.shape) or encoded.dtype != old.dtype:
            raise PassError(
                f"encoding of {name} decodes to {encoded.dtype} {list(encoded.shape)}",
                expected=f"{old.dtype} {list(old.shape)}",
            )
        node = self._weight_node(name)
        with self.ops.inserting_before(node):
            parts = {part: self.ops.get_attr(f"{name}.{part}") for part in encoded.parts}
            decode = self.ops.call_function(encoded.operator, encoded.arguments(parts))
            value = decode
            if encoded.dtype != torch.float32:
                value = self.ops.call_function(torch.ops.aten.to.dtype, (decode, encoded.dtype))
        node.replace_all_uses_with(value)
        self._erase(node)
        self.tensors.pop(name, None)
        self._forget(name)
        self.tensors.update({f"{name}.{part}": tensor for part, tensor in encoded.parts.items()})
        self.encodings[name] = encoded

    def _is_cast(self, site: Site) -> bool:
        weight = self.node(site.node).args[1]
        return (
            isinstance(weight, fx.Node)
            and weight.target is torch.ops.aten.to.dtype
            and site.weight not in self.encodings
        )

    def shift_bias(self, site: Site, shift: Tensor) -> None:
        """Add to the bias of a linear layer or convolution that `owns_bias`; one that is missing is made.

        Args:
            shift: float ``[O]``.
        """
        dtype = self.weight(site.weight).dtype
        name = self.bias(site)
        if name is not None:
            self.tensors[name] = (self.tensors[name].double() + shift).to(self.tensors[name].dtype)
            return
        stem = site.weight.removesuffix(".weight")
        # nothing may lie below the name of a tensor: a weight "a" and a bias "a.bias" exclude each other
        name = f"{stem}.bias" if stem != site.weight else f"{stem}_bias"
        name = self.free_name(name)
        self.tensors[name] = shift.to(dtype)
        node = self.node(site.node)
        with self.ops.inserting_before(node):
            set_bias(node, self.ops.get_attr(name))

    def prune_dead_code(self) -> list[str]:
        """Remove nodes nobody reads and tensors no node reads; returns the names of those tensors."""
        for node in reversed(list(self.ops.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not has_effect(node):
                self.ops.erase_node(node)
        used = {str(n.target) for n in self.ops.nodes if n.op == "get_attr"}
        dead = [name for name in self.tensors if name not in used]
        for name in dead:
            del self.tensors[name]
        return dead

    def _forget(self, name: str) -> None:
        """Drop the encoding of a weight and the tensors it consists of."""
        if name in self.encodings:
            for part in self.encodings.pop(name).parts:
                del self.tensors[f"{name}.{part}"]

    def _weight_node(self, name: str) -> fx.Node:
        encoded = name in self.encodings
        target = f"{name}.codes" if encoded else name
        node = next(n for n in self.ops.nodes if n.op == "get_attr" and n.target == target)
        return next(iter(node.users)) if encoded else node

    def _erase(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        self.ops.erase_node(node)
        for source in inputs:
            if not source.users:
                self._erase(source)

    def decoded(self) -> Graph:
        """The same graph with every encoded weight as plain values: runs faster, takes more memory."""
        graph = self.copy()
        for name in list(graph.encodings):
            # where the weight is not float32, the cast that follows is a no-op on the plain value
            graph.set_weight(name, graph.weight(name))
        return graph

    # -- running ---------------------------------------------------------------------------------

    def flatten(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call arguments as the flat list of inputs this graph takes, keywords in any order."""
        flat = pytree.tree_leaves(args)
        names = [spec.name for spec in self.inputs[len(flat) :]]
        if kwargs and set(names) == set(kwargs):
            flat += [kwargs[str(name)] for name in names]
        else:
            flat += pytree.tree_leaves(kwargs)
        if len(flat) != len(self.inputs):
            raise InputSpecError(
                f"the model was given {len(flat)} inputs", expected=", ".join(map(str, self.inputs))
            )
        return flat

    def run(
        self,
        inputs: Sequence[Any],
        settle: Callable[[fx.Node, Any], Any] | None = None,
        *,
        grad: bool = False,
    ) -> list[Any]:
        """Run on flat inputs, freeing every value after its last use; returns flat outputs.

        Args:
            inputs: in the order of `self.inputs`.
            settle: given every node and its value, says which value to go on with.
            grad: record what autograd needs, for tensors that require gradients.
        """
        values: dict[fx.Node, Any] = {}
        last_use = last_uses(self.ops)
        feed: Iterator[Any] = iter(inputs)
        for node in self.ops.nodes:
            if node.op == "output":
                return list(fx.node.map_arg(node.args[0], lambda n: values[n]))
            values[node] = next(feed) if node.op == "placeholder" else self.evaluate(node, values, grad=grad)
            if settle is not None:
                values[node] = settle(node, values[node])
            for dead in last_use.get(node, ()):
                del values[dead]
        raise AssertionError("a graph ends in an output node")

    def named(self, outputs: Sequence[Any]) -> list[Tensor]:
        """Of the flat outputs those with a name, as tensors: what a written file returns."""
        pairs = zip(self.output_names, outputs, strict=True)
        return [torch.as_tensor(value) for name, value in pairs if name is not None]

    def evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any], *, grad: bool = False) -> Any:
        """Compute one node from the values of its arguments; `grad` as for `run`."""
        if node.op == "get_attr":
            target = str(node.target)
            return self.tensors[target] if target in self.tensors else self.submodules[target]
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
        assert callable(node.target)
        with torch.set_grad_enabled(grad):
            return node.target(*args, **kwargs)

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Flat outputs in the structure the user's model returns."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def module(self, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
        """A callable `nn.Module` with the signature of the captured one; weights keep their names.

        Args:
            kind: the class of the module.
        """
        graph = self.copy().ops
        graph.set_codegen(self.codegen)
        return self._graph_module(graph, kind)

    def flat_module(self, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
        """A callable `nn.Module` from flat inputs to a flat tuple of outputs; `kind` as for `module`."""
        return self._graph_module(self.copy().ops, kind)

    def _graph_module(self, graph: fx.Graph, kind: type[fx.GraphModule]) -> fx.GraphModule:
        root: dict[str, Any] = dict(self.submodules)
        for name, tensor in self.tensors.items():
            trainable = tensor.is_floating_point() or tensor.is_complex()
            root[name] = torch.nn.Parameter(tensor, requires_grad=False) if trainable else tensor
        return kind(root, graph, class_name="CompressedModule").eval()


def argument(node: fx.Node, name: str, default: Any) -> Any:
    """An operator's argument by its schema name, given by position or keyword or left out."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema")  # noqa: B009 - OpOverload keeps its schema there
    names = [a.name for a in schema.arguments]
    position = names.index(name)
    return node.args[position] if position < len(node.args) else default


def set_bias(layer: fx.Node, bias: fx.Node) -> None:
    """Make a linear or convolution node read this bias."""
    if "bias" in layer.kwargs:
        layer.kwargs = {**layer.kwargs, "bias": bias}
    elif len(layer.args) > 2:
        layer.update_arg(2, bias)
    else:
        layer.args = (*layer.args, bias)


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nothing reads after it (itself, if nobody reads it)."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        last = max(node.users, key=order.__getitem__, default=node)
        result.setdefault(last, []).append(node)
    return result


def _is_part(name: str, encodings: Mapping[str, Encoded]) -> bool:
    owner, _, part = name.rpartition(".")
    return owner in encodings and part in encodings[owner].parts


def has_effect(node: fx.Node) -> bool:
    """Whether an operator changes one of its arguments, so that it matters even if nobody reads it."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
