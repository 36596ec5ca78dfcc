"""Weights for the plugins of `compress.exporters.tensorrt_plugins` in ONNX.

==================================== ========================================================================
weight of linear layers              node
==================================== ========================================================================
4 bits, two of every four zero       ``compress.w4_sparse24_matmul(x, codes, metadata, scales, zero_points)``
4 bits with zero points              ``compress.w4_matmul(x, codes, scales, zero_points)``
==================================== ========================================================================

The codes lie as the kernels take them (`compress.kernels.w4_matmul.layout`,
`compress.kernels.w4_sparse24_matmul.layout`): int32, for one compute capability, which is the attribute
`gpu`; `columns` is K. ONNX Runtime knows no such nodes: `runnable` gives it products with the weights as the
operators' references decode them from the very tensors of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from compress.artifact import Lowered
from compress.encoding import EncodedWeight, dequantize
from compress.errors import PassError, VerificationError
from compress.exporters.onnx_weights import Builder, placeholders, readers
from compress.exporters.tensorrt_plugins import INPUTS, NAMESPACE
from compress.exporters.to_onnx import save
from compress.graph import Graph
from compress.kernels.w4_matmul import layout as dense
from compress.kernels.w4_sparse24_matmul import layout as sparse24
from compress.kernels.w4_sparse24_matmul import reference as sparse24_reference


def lower_plugins(model: ir.Model, graph: Graph, gpu: int, *, sparse: bool) -> list[Lowered]:
    """Replace the placeholders of weights that the plugins take, graph inputs by name, by nodes as above.

    Args:
        model: rewritten in place.
        graph: where the weights come from.
        gpu: compute capability, such as 90.
        sparse: whether sparse tensor cores may be used.
    """
    builder, lowered = Builder(model), []
    inputs = {value.name: value for value in model.graph.inputs}
    taken = {}
    for name, encoded in graph.encodings.items():
        if name not in inputs or not isinstance(encoded, EncodedWeight):
            continue
        if {kind for kind, _, _ in readers(inputs[name])} == {"linear"}:
            form = _form(encoded, gpu, sparse)
            if form is not None:
                taken[name] = form
    for name, _, uses in placeholders(model, taken):
        plugin, parts = taken[name]
        constants = [
            builder.initializer(f"{name}.{part}", tensor.contiguous().numpy())
            for part, tensor in zip(INPUTS[plugin][1:], parts, strict=True)
        ]
        for i, (_, node, _) in enumerate(uses):
            _product(
                builder, node, plugin, constants, f"{name}/plugin{i}", gpu, graph.encodings[name].columns
            )
        lowered.append(Lowered(name, f"{NAMESPACE}.{plugin}", "a plugin that reads it packed"))
    return lowered


def _form(encoded: EncodedWeight, gpu: int, sparse: bool) -> tuple[str, tuple[Tensor, ...]] | None:
    """The plugin that takes a weight, and the weight as it takes it; None where there is none, or no need."""
    from compress.kernels.w4_matmul import plugin as w4
    from compress.kernels.w4_sparse24_matmul import plugin as w4_sparse24

    encoding, columns = encoded.encoding, encoded.columns
    if encoding.bits != 4:
        return None
    arguments = (encoded.codes, encoded.scales, encoded.zero_points, encoding.width(columns), columns)
    if sparse and columns % (4 * sparse24.GROUP) == 0:
        try:
            return "w4_sparse24_matmul", w4_sparse24.packed(*arguments)
        except PassError:  # it is not sparse so
            pass
    if encoded.zero_points is None or columns % 16:
        return None
    try:
        return "w4_matmul", w4.packed(*arguments, gpu)  # type: ignore[arg-type]
    except PassError:
        return None


def _product(
    builder: Builder, node: ir.Node, plugin: str, constants: list[ir.Value], name: str, gpu: int, columns: int
) -> None:
    """A node of the plugin in place of a MatMul or Gemm."""
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    attributes: dict[str, Any] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1, "gpu": gpu}
    result = builder.node(node, plugin, [x, *constants], name, NAMESPACE, **attributes, columns=columns)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        result.type, result.shape = output.type, output.shape
        result = builder.node(node, "Add", [result, bias], f"{name}/bias")
    builder.take_over(node, result)


# -- the same without plugins ---------------------------------------------------------------------


def runnable(path: Path, folder: Path) -> Path:
    """A file that computes the same in ONNX Runtime: in `folder` if this one holds plugins, else itself.

    Raises:
        VerificationError: it is not valid ONNX.
    """
    model = ir.load(path)
    nodes = [node for node in model.graph if node.domain == NAMESPACE]
    if not nodes:
        return path
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker has no errors of its own
        raise VerificationError(f"the written file is not valid ONNX: {error}") from error
    builder = Builder(model)
    for node in nodes:
        x, weight = node.inputs[0], _weight(node)
        assert x is not None
        value = builder.initializer(f"{node.name}.decoded", weight.t().contiguous().numpy())
        builder.take_over(node, builder.node(node, "MatMul", [x, value], f"{node.name}/decoded"))
    ir.passes.common.RemoveUnusedNodesPass()(model)
    del model.graph.opset_imports[NAMESPACE]
    return save(model, folder / f"decoded-{path.name}")[0]


def _weight(node: ir.Node) -> Tensor:
    """What a node multiplies by ``[N, K]``, in the dtype of its scales."""
    parts = {}
    for name, value in zip(INPUTS[node.op_type][1:], node.inputs[1:], strict=True):
        assert value is not None and value.const_value is not None
        parts[name] = torch.from_numpy(value.const_value.numpy().copy())
    columns, gpu = node.attributes["columns"].as_int(), node.attributes["gpu"].as_int()
    scales = parts["scales"]
    steps, rows, step = scales.shape
    if "metadata" in parts:
        decoded = sparse24_reference.decoded(
            **parts, group_size=sparse24.GROUP, columns=columns, layout="sp24"
        )
    else:
        group = parts["codes"].shape[1] * 64 // (steps * step)
        layout = dense.layout_for((gpu // 10, gpu % 10))
        codes, spread, zeros = dense.unpack(**parts, group_size=group, columns=columns, layout=layout)
        decoded = dequantize(codes, spread.float(), zeros, 4, group, [rows, columns])
    return decoded.to(scales.dtype)
