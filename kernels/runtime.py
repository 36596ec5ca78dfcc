"""A compressed model as a module that runs its packed weights through our operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from compress.errors import CompressError
from compress.graph import Graph
from compress.kernels.fuse import Decode, fuse
from compress.kernels.products import BY_OPERATOR, CANONICAL, Canonical, Capability, Product

_DECODERS = (torch.ops.compress.dequantize.default, torch.ops.compress.dequantize_codebook.default)
_PARTS = ("codes", "scales", "zero_points")
"""What a canonical weight is stored as."""

_DEVICE = "_device"
"""What the names of tensors in a device layout end in."""


class CompressedModule(fx.GraphModule):
    """The compressed model in eval mode; signature and names of weights are those of the original.

    A packed weight NAME is stored as ``NAME.codes``, ``NAME.scales`` and perhaps ``NAME.zero_points``
    (`compress.encoding`). That is what ``state_dict`` gives and takes on every device. The module is moved,
    exported and compiled like any other; the operators of `compress.kernels` stay single nodes.

    ``.to("cuda")`` brings the weights of 4-bit products into the layout of that GPU's tensor cores
    (`compress.kernels.products`), once, on the GPU; ``.cpu()`` brings them back. A weight that is also looked
    up by rows (a tied embedding) is there in both layouts. Products in float32 keep the canonical layout:
    they have no kernel, but for those of activations rounded to 8 bits.

    A call does nothing but launch operators: group sizes, columns and layouts are constants of the graph, and
    the operators here read no value back to the host. So after a first call, in which Triton compiles, calls
    of one shape can be captured in a CUDA graph.

    The module computes in the dtypes it was captured in: a cast such as ``.half()`` is refused, because the
    graph creates constants and casts of its own.
    """

    def __init__(self, root: Any, graph: fx.Graph, class_name: str = "CompressedModule") -> None:
        super().__init__(root, graph, class_name)
        # torch leaves these three methods without annotations
        self.register_state_dict_post_hook(_give_canonical)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_canonical)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModule:
        tensors = [*self.parameters(), *self.buffers(), torch.empty(0)]
        parts = {id(tensor) for tensor in packed_parts(self).values()}
        for tensor in tensors[:-1]:
            _refuse_cast(tensor, fn, id(tensor) in parts)
        target = fn(tensors[0].new_empty(0)).device
        capability = capability_of(target)
        _relayout(self, lambda node: _kept(node, capability))
        parts = {id(tensor) for tensor in packed_parts(self).values()}
        # scales are float32 in a model of any dtype: rounded, they would stand for other weights
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: t.to(fn(t).device) if id(t) in parts else fn(t), recurse
        )
        _create_on(self.graph, target)
        self.recompile()
        _relayout(self, lambda node: _layout(node, capability if _has_kernel(node) else None))
        return self


def as_module(graph: Graph, decode: Decode = "run") -> CompressedModule:
    """The module of a graph whose weights may be encoded.

    Args:
        graph: left as it is; tensors are shared.
        decode: as for `compress.kernels.fuse.fuse`.
    """
    module = fuse(graph, decode)[0].module(CompressedModule)
    assert isinstance(module, CompressedModule)
    return module


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of a GPU that our kernels run on; None for other devices, and without Triton."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return None
    capability = torch.cuda.get_device_capability(device)
    return capability if capability >= (8, 0) else None


def for_device(module: CompressedModule, capability: Capability | None) -> None:
    """Bring the weights of all 4-bit products into the layouts for a GPU, in place.

    The module computes the same. ``.to`` does this for the GPU it moves to, for products with a kernel there.

    Args:
        capability: of the GPU, 8.0 or later; None for the canonical layout.
    """
    _relayout(module, lambda node: _layout(node, capability))


def _relayout(module: CompressedModule, choose: Callable[[fx.Node], str]) -> None:
    by_weight: dict[tuple[str, str], list[fx.Node]] = {}
    for node in _products(module):
        layout = choose(node)
        if _layout_of(node) != layout:
            by_weight.setdefault((_weight_name(node), layout), []).append(node)
    for (name, layout), nodes in by_weight.items():
        canonical, product = _unpacked(module, nodes[0]), _product(nodes[0])
        packed = product.pack(*canonical, *_sizes(nodes[0]), layout)
        suffix = "" if layout == CANONICAL else _DEVICE
        parts = {f"{name}.{part}{suffix}": tensor for part, tensor in zip(product.parts, packed, strict=True)}
        for target, tensor in parts.items():
            if tensor is not None:
                _set(module, target, tensor)
        targets = [None if tensor is None else target for target, tensor in parts.items()]
        for node in nodes:
            _read(module, node, targets, layout)
    if by_weight:
        module.recompile()


def packed_parts(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that packed weights consist of, by name."""
    found = {}
    for node in module.graph.nodes:
        sources = _product(node).weight_of(node.args) if node.target in BY_OPERATOR else ()
        sources = node.all_input_nodes if node.target in _DECODERS else sources
        for source in sources:
            if isinstance(source, fx.Node) and source.target is torch.ops.aten.index_select.default:
                source = source.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                found[str(source.target)] = _get(module, str(source.target))
    return found


# -- products and their tensors -------------------------------------------------------------------


def _products(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target in BY_OPERATOR]


def _product(node: fx.Node) -> Product:
    operator: Any = node.target
    return BY_OPERATOR[operator]


def _weight_name(node: fx.Node) -> str:
    codes = _product(node).weight_of(node.args)[0]
    return str(codes.target).rpartition(".")[0]


def _sizes(node: fx.Node) -> tuple[int, int]:
    """Columns per scale, and columns, of the weight that a product reads."""
    args: Any = node.args
    return args[-3], args[-2]


def _layout_of(node: fx.Node) -> str:
    """The layout that a product reads."""
    return str(node.args[-1])


def _layout(node: fx.Node, capability: Capability | None) -> str:
    """The layout that a product should read on this GPU."""
    return CANONICAL if capability is None else _product(node).layout_for(capability)


def _has_kernel(node: fx.Node) -> bool:
    """Whether GPUs have a kernel for this product in its dtype."""
    return node.meta.get("dtype") in _product(node).dtypes


def _kept(node: fx.Node, capability: Capability | None) -> str:
    """The layout that a product reads, if it is the one for this GPU; else the canonical one."""
    return _layout_of(node) if _layout_of(node) == _layout(node, capability) else CANONICAL


def _unpacked(module: fx.GraphModule, node: fx.Node) -> Canonical:
    """Canonical codes, scales and zero points of the weight that a product reads."""
    product = _product(node)
    parts = product.weight_of(node.args)
    tensors = (None if part is None else _get(module, str(part.target)) for part in parts)
    return product.unpack(*tensors, *_sizes(node), _layout_of(node))


def _read(module: fx.GraphModule, node: fx.Node, targets: list[str | None], layout: str) -> None:
    """Let a product read other tensors; those that nobody reads any more are deleted."""
    before = [part for part in _product(node).weight_of(node.args) if part is not None]
    with module.graph.inserting_before(node):
        parts = [None if target is None else module.graph.get_attr(target) for target in targets]
    node.args = (*node.args[: -3 - len(parts)], *parts, *node.args[-3:-1], layout)
    for part in before:
        if not part.users:
            module.graph.erase_node(part)
            target = str(part.target)
            if not any(n.op == "get_attr" and n.target == target for n in module.graph.nodes):
                path, _, name = target.rpartition(".")
                delattr(module.get_submodule(path), name)


def _get(module: fx.GraphModule, target: str) -> Tensor:
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    tensor = getattr(owner, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _set(module: fx.GraphModule, target: str, tensor: Tensor) -> None:
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    if not hasattr(owner, name):  # else another operator reads it already
        if tensor.is_floating_point():
            owner.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(name, tensor)


# -- hooks: state_dict is canonical on every device -----------------------------------------------


def _give_canonical(module: CompressedModule, state: dict[str, Any], prefix: str, _: Any) -> None:
    for node in _products(module):
        if _layout_of(node) != CANONICAL:
            name = prefix + _weight_name(node)
            for part in _product(node).parts:
                state.pop(f"{name}.{part}{_DEVICE}", None)
            for part, tensor in zip(_PARTS, _unpacked(module, node), strict=True):
                if tensor is not None:
                    state[f"{name}.{part}"] = tensor


def _take_canonical(module: CompressedModule, state: dict[str, Any], prefix: str, *_: Any) -> None:
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for node in _products(module):
        name = prefix + _weight_name(node)
        layout, product = _layout_of(node), _product(node)
        codes, scales, zeros = (state.get(f"{name}.{part}") for part in _PARTS)
        if layout == CANONICAL or codes is None or scales is None:
            continue
        packed = product.pack(codes, scales, zeros, *_sizes(node), layout)
        for part, tensor in zip(product.parts, packed, strict=True):
            if tensor is not None:
                state[f"{name}.{part}{_DEVICE}"] = tensor
        for part in _PARTS:
            if f"{_weight_name(node)}.{part}" not in read:
                state.pop(f"{name}.{part}", None)


# -- moving ---------------------------------------------------------------------------------------


def _refuse_cast(tensor: Tensor, fn: Callable[[Tensor], Tensor], is_part: bool) -> None:
    cast = fn(tensor.new_empty(0)).dtype
    if cast != tensor.dtype and not is_part:
        raise CompressError(
            f"a compressed module of {tensor.dtype} cannot be made one of {cast}",
            expected="its dtypes as captured",
            fix="convert the model before it is compressed: compress.run(model.bfloat16(), …)",
        )


def _create_on(graph: fx.Graph, device: torch.device) -> None:
    """Let operators that make tensors (``arange``, ``zeros``, ``to``) make them on this device."""
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
