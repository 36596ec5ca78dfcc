"""A compressed model as a module that runs its packed weights through our operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, fx

from compress.errors import CompressError
from compress.graph import Graph
from compress.kernels.fuse import W4_MATMUL, Decode, fuse

_DECODERS = (torch.ops.compress.dequantize.default, torch.ops.compress.dequantize_codebook.default)


class CompressedModule(fx.GraphModule):
    """The compressed model in eval mode; signature and names of weights are those of the original.

    A packed weight NAME is stored as ``NAME.codes``, ``NAME.scales`` and perhaps ``NAME.zero_points``
    (`compress.encoding`). The module is moved (`.to(device)`), exported and compiled like any other; the
    operators of `compress.kernels` stay single nodes. It computes in the dtypes it was captured in: a cast
    such as ``.half()`` is refused, because the graph creates constants and casts of its own.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModule:
        parts = {id(tensor) for tensor in packed_parts(self).values()}
        self._refuse_casts(fn, parts)
        # scales are float32 in a model of any dtype: rounded, they would stand for other weights
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: t.to(fn(t).device) if id(t) in parts else fn(t), recurse
        )
        _create_on(self.graph, fn(torch.empty(0)).device)
        self.recompile()
        return self

    def _refuse_casts(self, fn: Callable[[Tensor], Tensor], parts: set[int]) -> None:
        for tensor in [*self.parameters(), *self.buffers()]:
            cast = fn(tensor.new_empty(0)).dtype
            if cast != tensor.dtype and id(tensor) not in parts:
                raise CompressError(
                    f"a compressed module of {tensor.dtype} cannot be made one of {cast}",
                    expected="its dtypes as captured",
                    fix="convert the model before it is compressed: compress.run(model.bfloat16(), …)",
                )


def as_module(graph: Graph, decode: Decode = "run") -> CompressedModule:
    """The module of a graph whose weights may be encoded.

    Args:
        graph: left as it is; tensors are shared.
        decode: as for `compress.kernels.fuse.fuse`.
    """
    return fuse(graph, decode)[0].module(CompressedModule)


def packed_parts(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that packed weights consist of, by name."""
    found: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        sources = node.args[1:4] if node.target is W4_MATMUL else ()
        sources = node.all_input_nodes if node.target in _DECODERS else sources
        for source in sources:
            if isinstance(source, fx.Node) and source.target is torch.ops.aten.index_select.default:
                source = source.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                name = str(source.target)
                found[name] = reduce(getattr, name.split("."), module)  # type: ignore[assignment, arg-type]
    return found


def _create_on(graph: fx.Graph, device: torch.device) -> None:
    """Let operators that make tensors (``arange``, ``zeros``, ``to``) make them on this device."""
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
