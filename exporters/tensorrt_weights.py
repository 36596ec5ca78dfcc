"""Encoded weights in ONNX for TensorRT: signed integers or floats of 8 bits, scales, DequantizeLinear.

========================== ======================================== =======================================
weight                     form in the ONNX file                    what TensorRT-RTX makes of it
========================== ======================================== =======================================
linear, 4 bits             INT4 ``[O, N]`` -> DequantizeLinear      packed; one layer with the product,
                           (axis 1, blocks) -> the product          which decodes as it multiplies
linear, groups and rows    the same of padded rows; Pad -> the      the same; Pad in one layer with what is
that share short blocks    product                                  computed before it
linear, 8 bits, whole rows INT8 -> DequantizeLinear (axis 0) ->     the same
                           the product
embedding                  either -> Gather                         packed; one layer that decodes the
                                                                    rows looked up
linear, 8 bits, groups     INT8 -> DequantizeLinear (axis 1,        packed; decoded on every call by a
                           blocks) -> the product                   layer of its own
float8                     FLOAT8E4M3FN -> DequantizeLinear (axis   as 8 bits, whole rows
                           0) -> the product or Gather
convolution                either (-> Reshape) -> Conv              packed; decoded on every call by a
                                                                    layer of its own
linear or convolution,     INT8 or FLOAT8E4M3FN ->                  a product or convolution of 8 bits, but
8-bit input                DequantizeLinear (axis 0) -> the         for 1 of the 21 float8 weights of a
                           product or Conv                          ResNet-18, which is decoded apart
codebook, bitmap, cores    a float weight, decoded at export        a float weight
========================== ======================================== =======================================

All found in the layers that TensorRT-RTX 1.7.1 lists. It takes 4-bit weights of two blocks or more into the
product, and an even number of outputs, but no whole rows; 8-bit weights by the row, but no blocks. So 4-bit
rows with one scale are cut into blocks: the same weight, bit for bit.

How long a block is TensorRT takes from the shapes, whatever ``block_size`` says: seven scales for 784 columns
are blocks of 112, and where they do not divide the columns the file is refused. So the groups of a weight,
where the last one is shorter, are cut into the largest blocks that divide them and the row, with the scales
repeated. That can be many scales (784 columns in groups of 128: blocks of 16): then rows get zeros at their
end, and x as well, as `_cut` counts bytes. Where less than `_SMALLEST` divides both and x cannot be padded,
the weight is written as floats.

Scales of 8-bit weights must be positive. Codes of a group with a negative one change their sign with it,
where -128 becomes 127: `only_packed` says of which weights that is true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from compress.artifact import Lowered
from compress.encoding import EncodedWeight, encode
from compress.exporters.onnx_float8 import numbers
from compress.exporters.onnx_weights import Builder, Use, placeholders
from compress.float8 import Float8Weight
from compress.graph import Graph

_SMALLEST = 8
"""The shortest block that is written; shorter ones would cost more in scales than 8 bits cost in all."""

_WORTH_PADDING = 0.05
"""Of its bytes, that a weight must save for another operator in front of the product."""

_DECODED = ("MatMul", "Gemm", "Gather", "Conv")
"""Readers of a weight that TensorRT takes DequantizeLinear in front of."""


def only_packed(graph: Graph) -> tuple[Graph, list[Lowered], dict[str, str]]:
    """The graph with no encodings but those TensorRT has.

    Returns:
        the graph; what is to be said of weights that are floats in it; and of those whose values are a little
        different, by name.
    """
    graph, lowered, notes = graph.copy(), [], {}
    for name, encoded in list(graph.encodings.items()):
        if isinstance(encoded, Float8Weight):
            continue
        if not isinstance(encoded, EncodedWeight):
            graph.set_weight(name, encoded.decode())
            reason = f"TensorRT has no form of {encoded.encoding}"
            lowered.append(Lowered(name, "float", "decoded at export", reason=reason))
        elif encoded.encoding.bits == 8 and bool((encoded.scales < 0).any()):
            codes, count = _positive(encoded)
            if count:
                notes[name] = f"{count} codes of -128 became 127: scales have to be positive"
            unsigned = (codes + encoded.encoding.zero).to(torch.uint8)
            graph.set_weight(name, torch.zeros(encoded.shape))
            graph.set_encoding(
                name,
                encode(unsigned, encoded.scales.abs(), None, encoded.encoding, encoded.shape, encoded.dtype),
            )
    return graph, lowered, notes


def _positive(encoded: EncodedWeight) -> tuple[torch.Tensor, int]:
    """Signed codes int16 ``[O, N]`` for positive scales, and how many had to become one step smaller."""
    signed = encoded.unpacked()[0].to(torch.int16) - encoded.encoding.zero
    width = encoded.encoding.width(encoded.columns)
    scales = encoded.scales.repeat_interleave(width, 1)[:, : encoded.columns]
    turned = torch.where(scales < 0, -signed, signed)
    return turned.clamp(max=127), int((turned > 127).sum())


def lower_packed(model: ir.Model, graph: Graph, notes: Mapping[str, str]) -> list[Lowered]:
    """Replace the placeholders of packed weights, graph inputs by name, by the forms above.

    Args:
        model: rewritten in place.
        graph, notes: of `only_packed`; all integers are of 4 or 8 bits, and all weights float32.
    """
    builder = Builder(model)
    packed = {n: e for n, e in graph.encodings.items() if isinstance(e, EncodedWeight | Float8Weight)}
    lowered = []
    for name, value, uses in placeholders(model, packed):
        encoded, before = packed[name], next(iter(value.uses())).node
        cut = _cut(encoded, uses) if isinstance(encoded, EncodedWeight) else _Cut(0, 0)
        reason = _why_not(encoded, uses, cut)
        if reason:
            plain = builder.initializer(f"{name}.values", encoded.decode().contiguous().numpy())
            value.replace_all_uses_with(plain)
            lowered.append(Lowered(name, "float", "decoded at export", reason=reason))
            continue
        told = [notes[name]] if name in notes else []
        if isinstance(encoded, Float8Weight):
            result, form = _floats(builder, before, name, encoded)
        else:
            result, form = _decoder(builder, before, name, encoded, cut, wide=any(map(_rounded, uses)))
            if cut.columns > encoded.columns:
                told.append(
                    f"rows of {encoded.columns} are padded to {cut.columns}, whole blocks of {cut.block}"
                )
                for _, node, _ in uses:
                    _pad(builder, node, cut.columns - encoded.columns)
        value.replace_all_uses_with(result)
        lowered.append(Lowered(name, form, "", (f"{name}/decode",), "; ".join(told)))
    return lowered


def _why_not(encoded: EncodedWeight | Float8Weight, uses: list[Use], cut: _Cut) -> str:
    if isinstance(encoded, EncodedWeight) and not encoded.encoding.symmetric:
        return "it has zero points, and no plugin takes it"
    others = sorted({node.op_type for _, node, _ in uses} - set(_DECODED))
    if others:
        return f"read by {', '.join(others)}"
    if isinstance(encoded, Float8Weight):
        return ""
    if cut.block < _SMALLEST:
        return (
            f"rows of {encoded.columns} are not made of blocks: {encoded.encoding.group_size} and it share "
            f"{cut.block}"
        )
    return ""


class _Cut(NamedTuple):
    """How a row is written: columns per block, and columns, perhaps more than the weight has."""

    block: int
    columns: int

    def nbytes(self, bits: int) -> float:
        """Of a row as it stands in the engine; floats where blocks are too short."""
        return self.columns * (bits / 8 + 2 / self.block if self.block >= _SMALLEST else 2)


def _cut(encoded: EncodedWeight, uses: list[Use]) -> _Cut:
    columns, encoding = encoded.columns, encoded.encoding
    exact = _Cut(_block(encoded), columns)
    if _whole(encoded) or any(use[0] != "linear" or _rounded(use) for use in uses):
        return exact
    blocks = [n for n in _BLOCKS if encoding.group_size % n == 0]
    padded = min(
        (_Cut(n, math.ceil(columns / n) * n) for n in blocks), key=lambda cut: cut.nbytes(encoding.bits)
    )
    worth_it = padded.nbytes(encoding.bits) < (1 - _WORTH_PADDING) * exact.nbytes(encoding.bits)
    return padded if worth_it else exact


_BLOCKS = (128, 64, 32, 16, 8)


def _block(encoded: EncodedWeight) -> int:
    """The longest blocks that divide both a row and the groups of its scales."""
    columns, encoding = encoded.columns, encoded.encoding
    if not _whole(encoded):
        return math.gcd(encoding.group_size, columns)
    if encoding.bits == 8 or len(encoded.shape) != 2:
        return columns
    sizes = (n for n in (*_BLOCKS, columns // 2) if n >= _SMALLEST)
    return next((n for n in sizes if columns % n == 0 and columns > n), columns)


def _whole(encoded: EncodedWeight) -> bool:
    return encoded.encoding.groups(encoded.columns) == 1


def _rounded(use: Use) -> bool:
    """Whether the other operand is a rounded activation: integer kernels take two of one type."""
    kind, node, index = use
    other = node.inputs[1 - index] if kind != "embedding" and node.op_type != "Gather" else None
    source = None if other is None else other.producer()
    return source is not None and source.op_type == "DequantizeLinear"


def _floats(builder: Builder, before: ir.Node, name: str, encoded: Float8Weight) -> tuple[ir.Value, str]:
    """The decoded weight, and the form for the report."""
    codes = builder.initializer(f"{name}.codes", numbers(encoded))
    scales = builder.initializer(f"{name}.scales", encoded.scales[:, 0].contiguous().numpy())
    result = builder.node(before, "DequantizeLinear", [codes, scales], f"{name}/decode", axis=0)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(encoded.shape)
    return result, "DequantizeLinear(FLOAT8E4M3FN)"


def _decoder(
    builder: Builder, before: ir.Node, name: str, encoded: EncodedWeight, cut: _Cut, *, wide: bool
) -> tuple[ir.Value, str]:
    """The decoded weight, and the form for the report."""
    signed = encoded.unpacked()[0].to(torch.int16) - encoded.encoding.zero
    scales = encoded.scales
    # an odd number of 4-bit codes does not build
    four = encoded.encoding.bits == 4 and not wide and len(signed) * cut.columns % 2 == 0
    if not four:
        signed, scales = _positive(encoded)[0], scales.abs()
    dtype, kind = (ml_dtypes.int4, "INT4") if four else (np.int8, "INT8")
    attributes: dict[str, Any] = {"axis": 0}
    shape = encoded.shape
    block, width = cut.block, encoded.encoding.width(encoded.columns)
    if block < encoded.columns and not (wide and _whole(encoded)):
        signed = torch.nn.functional.pad(signed, (0, cut.columns - encoded.columns))
        scales = scales.repeat_interleave(max(width // block, 1), 1)[:, : cut.columns // block]
        shape, attributes = tuple(signed.shape), {"axis": 1, "block_size": block}
    else:
        scales = scales[:, 0]
    codes = builder.initializer(f"{name}.codes", signed.reshape(shape).numpy().astype(dtype))
    steps = builder.initializer(f"{name}.scales", scales.contiguous().numpy())
    result = builder.node(before, "DequantizeLinear", [codes, steps], f"{name}/decode", **attributes)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    form = f"DequantizeLinear({kind})"
    if len(shape) != len(encoded.shape):
        sizes = builder.initializer(f"{name}.shape", np.array(encoded.shape, dtype=np.int64))
        result = builder.node(before, "Reshape", [result, sizes], f"{name}/reshape")
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(encoded.shape)
        form += " -> Reshape"
    return result, form


def _pad(builder: Builder, product: ir.Node, count: int) -> None:
    """Zeros behind the columns of what a MatMul or Gemm multiplies a weight by, once for all that read it."""
    x, weight = product.inputs[:2]
    assert x is not None and weight is not None
    name = f"{x.name}/pad{count}"
    found = next((node for node, _ in x.uses() if node.name == name), None)
    if found is None:
        zeros = builder.initializer(f"compress.pad{count}", np.array([0, count], dtype=np.int64))
        last = builder.initializer("compress.last", np.array([-1], dtype=np.int64))
        zero = builder.initializer("compress.zero", np.array(0, dtype=np.float32))
        padded = builder.node(product, "Pad", [x, zeros, zero, last], name)
        padded.type = x.type
    else:
        padded = found.outputs[0]
    product.replace_input_with(0, padded)
    if weight.producer() is not None:
        weight.shape = None  # of a Transpose: it was that of shorter rows
