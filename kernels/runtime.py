"""A compressed model as a module that runs its packed weights through our operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from compress.errors import CompressError
from compress.graph import Graph
from compress.kernels.fuse import HALF, W4_MATMUL, Decode, fuse
from compress.kernels.w4_matmul.layout import layout_for, pack, unpack

CANONICAL = "canonical"
_DECODERS = (torch.ops.compress.dequantize.default, torch.ops.compress.dequantize_codebook.default)
_PARTS = ("codes", "scales", "zero_points")
_DEVICE = "_device"
"""What the names of tensors in a device layout end in."""


class CompressedModule(fx.GraphModule):
    """The compressed model in eval mode; signature and names of weights are those of the original.

    A packed weight NAME is stored as ``NAME.codes``, ``NAME.scales`` and perhaps ``NAME.zero_points``
    (`compress.encoding`). That is what ``state_dict`` gives and takes on every device. The module is moved,
    exported and compiled like any other; the operators of `compress.kernels` stay single nodes.

    ``.to("cuda")`` permutes the codes of 4-bit products in 16 bits to the layout of that GPU's tensor cores,
    once, on the GPU; ``.cpu()`` permutes them back. A weight that is also looked up by rows (a tied
    embedding) is there in both layouts. Products in float32 keep the canonical layout: they have no kernel.

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
        layout = layout_of(target)
        _relayout(self, lambda node: layout if node.args[6] == layout else CANONICAL)
        parts = {id(tensor) for tensor in packed_parts(self).values()}
        # scales are float32 in a model of any dtype: rounded, they would stand for other weights
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: t.to(fn(t).device) if id(t) in parts else fn(t), recurse
        )
        _create_on(self.graph, target)
        self.recompile()
        _relayout(self, lambda node: layout if node.meta.get("dtype") in HALF else CANONICAL)
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


def layout_of(device: torch.device) -> str:
    """The layout in which a device reads 4-bit weights fastest; the canonical one without a kernel for it."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return CANONICAL
    capability = torch.cuda.get_device_capability(device)
    return layout_for(capability) if capability >= (8, 0) else CANONICAL


def for_device(module: CompressedModule, layout: str) -> None:
    """Bring the weights of all 4-bit products into a layout, in place; the module computes the same.

    ``.to`` does this with the layout of the device, for products in 16 bits.

    Args:
        layout: one of `compress.kernels.w4_matmul.layout.LAYOUTS`.

    Raises:
        PassError: there is no such layout.
    """
    _relayout(module, lambda node: layout)


def _relayout(module: CompressedModule, choose: Callable[[fx.Node], str]) -> None:
    by_weight: dict[tuple[str, str], list[fx.Node]] = {}
    for node in _products(module):
        layout = choose(node)
        if node.args[6] != layout:
            by_weight.setdefault((_weight_name(node), layout), []).append(node)
    for (name, layout), nodes in by_weight.items():
        packed = pack(*_unpacked(module, nodes[0]), *_sizes(nodes[0]), layout)
        suffix = "" if layout == CANONICAL else _DEVICE
        parts = {f"{name}.{part}{suffix}": tensor for part, tensor in zip(_PARTS, packed, strict=True)}
        for target, tensor in parts.items():
            if tensor is not None:
                _set(module, target, tensor)
        for node in nodes:
            _read(
                module, node, [None if tensor is None else target for target, tensor in parts.items()], layout
            )
    if by_weight:
        module.recompile()


def packed_parts(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that packed weights consist of, by name."""
    found = {}
    for node in module.graph.nodes:
        sources = node.args[1:4] if node.target is W4_MATMUL else ()
        sources = node.all_input_nodes if node.target in _DECODERS else sources
        for source in sources:
            if isinstance(source, fx.Node) and source.target is torch.ops.aten.index_select.default:
                source = source.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                found[str(source.target)] = _get(module, str(source.target))
    return found


# -- products and their tensors -------------------------------------------------------------------


def _products(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is W4_MATMUL]


def _weight_name(product: fx.Node) -> str:
    codes: Any = product.args[1]
    return str(codes.target).rpartition(".")[0]


def _sizes(product: fx.Node) -> tuple[int, int]:
    """Columns per scale, and columns, of the weight that a product reads."""
    args: Any = product.args
    return args[4], args[5]


def _unpacked(module: fx.GraphModule, product: fx.Node) -> tuple[Tensor, Tensor, Tensor | None]:
    """Canonical codes, scales and zero points of the weight that a product reads."""
    nodes: Any = product.args[1:4]
    codes, scales, zeros = (None if node is None else _get(module, str(node.target)) for node in nodes)
    assert codes is not None and scales is not None
    return unpack(codes, scales, zeros, *_sizes(product), str(product.args[6]))


def _read(module: fx.GraphModule, product: fx.Node, targets: list[str | None], layout: str) -> None:
    """Let a product read other tensors; those that nobody reads any more are deleted."""
    before = [node for node in product.args[1:4] if isinstance(node, fx.Node)]
    with module.graph.inserting_before(product):
        parts = [None if target is None else module.graph.get_attr(target) for target in targets]
    product.args = (product.args[0], *parts, *product.args[4:6], layout)
    for node in before:
        if not node.users:
            module.graph.erase_node(node)
            target = str(node.target)
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
        if node.args[6] != CANONICAL:
            name = prefix + _weight_name(node)
            for part, tensor in zip(_PARTS, _unpacked(module, node), strict=True):
                state.pop(f"{name}.{part}{_DEVICE}", None)
                if tensor is not None:
                    state[f"{name}.{part}"] = tensor


def _take_canonical(module: CompressedModule, state: dict[str, Any], prefix: str, *_: Any) -> None:
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for node in _products(module):
        name = prefix + _weight_name(node)
        layout = str(node.args[6])
        codes, scales, zeros = (state.get(f"{name}.{part}") for part in _PARTS)
        if layout == CANONICAL or codes is None or scales is None:
            continue
        packed = pack(codes, scales, zeros, *_sizes(node), layout)
        for part, tensor in zip(_PARTS, packed, strict=True):
            if tensor is not None:
                state[f"{name}.{part}{_DEVICE}"] = tensor
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
