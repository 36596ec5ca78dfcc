"""Weights and heads for the plugins of `compress.exporters.tensorrt_plugins` in ONNX.

==================================== ========================================================================
weight of linear layers              node
==================================== ========================================================================
4 bits, two of every four zero       ``compress.w4_sparse24_matmul(x, codes, metadata, scales, zero_points)``
4 bits with zero points              ``compress.w4_matmul(x, codes, scales, zero_points)``
==================================== ========================================================================

The codes lie as the kernels take them (`compress.kernels.w4_matmul.layout`,
`compress.kernels.w4_sparse24_matmul.layout`): int32, for one compute capability, which is the attribute
`gpu`; `columns` is K.

The lookups of an output head in codes (`compress.passes.vq_logits`), Slice, Gather and Add for each stage,
become ``Transpose -> compress.vq_logits(products, codes, token_bias)``: of the product with all codebooks,
``[..., E]``, the kernel takes the values of one entry side by side, ``[E, ...]``. The codes lie in words of
int32 (`compress.kernels.vq_logits.layout`); `sizes` are the entries of each codebook. How the codebooks
themselves are stored, and what chooses candidates by these logits, stays what it is.

ONNX Runtime knows no such nodes: `runnable` gives it products with the weights as the operators' references
decode them from the very tensors of the file, and lookups by the codes that stand there.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from compress.exporters.tensorrt_plugins import NAMESPACE, PLUGINS
from compress.exporters.to_onnx import save
from compress.graph import Graph
from compress.kernels.fuse_heads import Codes, find_codes
from compress.kernels.vq_logits import layout as coded
from compress.kernels.w4_matmul import layout as dense
from compress.kernels.w4_sparse24_matmul import layout as sparse24
from compress.kernels.w4_sparse24_matmul import reference as sparse24_reference


def lower_plugins(model: ir.Model, graph: Graph, gpu: int, *, sparse: bool) -> list[Lowered]:
    """Replace by nodes as above the placeholders of weights that the plugins take, inputs by name, and the
    lookups of heads in codes.

    Args:
        model: rewritten in place.
        graph: where they come from.
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
        constants = _constants(builder, plugin, name, parts)
        for i, (_, node, _) in enumerate(uses):
            _product(
                builder, node, plugin, constants, f"{name}/plugin{i}", gpu, graph.encodings[name].columns
            )
        lowered.append(Lowered(name, f"{NAMESPACE}.{plugin}", "a plugin that reads it packed"))
    return lowered + _lower_heads(builder, graph, gpu)


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
        packed = w4.packed(*arguments, gpu)  # type: ignore[arg-type]  # its zero points are there
        return "w4_matmul", packed
    except PassError:
        return None


def _product(
    builder: Builder, node: ir.Node, plugin: str, constants: list[ir.Value], name: str, gpu: int, columns: int
) -> None:
    """A node of the plugin in place of a MatMul or Gemm."""
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    result = _plugin(builder, node, plugin, [x, *constants], name, gpu, columns=columns)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        result.type, result.shape = output.type, output.shape
        result = builder.node(node, "Add", [result, bias], f"{name}/bias")
    builder.take_over(node, result)


def _constants(builder: Builder, plugin: str, name: str, parts: Sequence[Tensor]) -> list[ir.Value]:
    return [
        builder.initializer(f"{name}.{part}", tensor.contiguous().numpy())
        for part, tensor in zip(PLUGINS[plugin].inputs[1:], parts, strict=True)
    ]


def _plugin(
    builder: Builder, before: ir.Node, plugin: str, inputs: list[ir.Value], name: str, gpu: int, **more: Any
) -> ir.Value:
    attributes: dict[str, Any] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1, "gpu": gpu}
    return builder.node(before, plugin, inputs, name, NAMESPACE, **attributes, **more)


def _lower_heads(builder: Builder, graph: Graph, gpu: int) -> list[Lowered]:
    from compress.kernels.vq_logits.plugin import packed

    lowered = []
    for codes in find_codes(graph):
        found = _lookups(builder.model, codes)
        if found is None:
            continue
        products, logits = found
        assert products.shape is not None
        token_bias = None if codes.token_bias is None else graph.tensors[str(codes.token_bias.target)].float()
        name, last = f"{codes.stem}codes", logits.producer()
        assert last is not None
        parts = packed(codes.maps(graph), codes.sizes, token_bias)
        constants = _constants(builder, "vq_logits", f"{name}.plugin", parts)
        *rows, entries = range(len(products.shape))
        turned = builder.node(last, "Transpose", [products], f"{name}/transpose", perm=[entries, *rows])
        turned.type = products.type
        turned.shape = ir.Shape([products.shape[axis] for axis in (entries, *rows)])
        result = _plugin(
            builder, last, "vq_logits", [turned, *constants], f"{name}/plugin", gpu, sizes=codes.sizes
        )
        builder.take_over(last, result)
        lowered.append(Lowered(name, f"{NAMESPACE}.vq_logits", "a plugin that looks logits up"))
    return lowered


def _lookups(model: ir.Model, codes: Codes) -> tuple[ir.Value, ir.Value] | None:
    """In ONNX the products of which a head's logits are sums, and these; None if they stand there in another
    way than `torch.onnx` writes them."""
    value = model.graph.initializers.get(codes.parts[0][2])
    gather = None if value is None else _only_reader(value)
    while gather is not None and gather.op_type in ("Cast", "Reshape"):
        gather = _only_reader(gather.outputs[0])
    if gather is None or gather.op_type != "Gather" or gather.inputs[0] is None:
        return None
    logits, products = gather.outputs[0], gather.inputs[0]
    for _ in range(len(codes.parts) - (codes.token_bias is None)):
        add = _only_reader(logits)
        if add is None or add.op_type != "Add":
            return None
        logits = add.outputs[0]
    cut = products.producer()
    if len(codes.parts) > 1:
        if cut is None or cut.op_type != "Slice" or cut.inputs[0] is None:
            return None
        products = cut.inputs[0]
    # in it all codebooks, and a known number of axes
    return (products, logits) if products.shape and products.shape[-1] == sum(codes.sizes) else None


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


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
        builder.take_over(
            node, _looked_up(builder, node) if "sizes" in node.attributes else _multiplied(builder, node)
        )
    ir.passes.common.RemoveUnusedNodesPass()(model)
    del model.graph.opset_imports[NAMESPACE]
    return save(model, folder / f"decoded-{path.name}")[0]


def _multiplied(builder: Builder, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    value = builder.initializer(f"{node.name}.decoded", _weight(node).t().contiguous().numpy())
    return builder.node(node, "MatMul", [x, value], f"{node.name}/decoded")


def _looked_up(builder: Builder, node: ir.Node) -> ir.Value:
    """Of products ``[E, ...]`` the entries of all stages, added up, with the last axis where it belongs."""
    products, name = node.inputs[0], f"{node.name}/decoded"
    assert products is not None and products.shape is not None
    parts, sizes = _parts(node), node.attributes["sizes"].as_ints()
    bias = parts["token_bias"]
    codes, rank = coded.unpack(parts["codes"], sizes, len(bias)), len(products.shape)
    terms = [builder.initializer(f"{name}.bias", bias.view(-1, *[1] * (rank - 1)).numpy())]
    for stage, indices in enumerate(codes.long() + torch.tensor([0, *sizes[:-1]]).cumsum(0).unsqueeze(1)):
        entries = builder.initializer(f"{name}.entries{stage}", indices.numpy())
        terms.append(builder.node(node, "Gather", [products, entries], f"{name}/gather{stage}", axis=0))
    logits = builder.node(node, "Sum", terms, f"{name}/sum")
    return builder.node(node, "Transpose", [logits], f"{name}/transpose", perm=[*range(1, rank), 0])


def _parts(node: ir.Node) -> dict[str, Tensor]:
    """The constants of a node."""
    parts = {}
    for name, value in zip(PLUGINS[node.op_type].inputs[1:], node.inputs[1:], strict=True):
        assert value is not None and value.const_value is not None
        parts[name] = torch.from_numpy(value.const_value.numpy().copy())
    return parts


def _weight(node: ir.Node) -> Tensor:
    """What a node multiplies by ``[N, K]``, in the dtype of its scales."""
    parts = _parts(node)
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
