"""Quantized activations in ONNX: the standard forms that ONNX Runtime fuses into integer kernels.

================ =========================================================== =====================
layer            form in the file                                            ONNX Runtime makes it
================ =========================================================== =====================
linear, dynamic  DynamicQuantizeLinear -> MatMulInteger(INT8) -> Cast -> Mul DynamicQuantizeMatMul
                 (-> Add)
linear, static   QuantizeLinear -> DequantizeLinear -> MatMul (weight: INT8  MatMulIntegerToFloat
                 -> DequantizeLinear) (-> Add)
shared input     one DynamicQuantizeLinear, then the same for each layer     MatMulIntegerToFloat
convolution,     QuantizeLinear -> DequantizeLinear -> Conv (weight: INT8    QLinearConv
static           -> DequantizeLinear) -> Relu -> QuantizeLinear -> ...
addition, static the same around Add                                         QLinearAdd
================ =========================================================== =====================

The rounding operators translate to ``QuantizeLinear`` or ``DynamicQuantizeLinear`` and ``DequantizeLinear``:
the right value wherever nothing more is done. Weights of linear layers and convolutions on rounded values
are written here. Biases stay float: TensorRT wants them so, and ONNX Runtime rounds them as it fuses.

A weight takes an integer form only if no pair of its codes can overflow 16 bits
(`compress.activations.saturates`), so the products are exact on every processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.activations import DYNAMIC, FLOAT8, STATIC, saturates, summation_order
from compress.artifact import Lowered
from compress.encoding import EncodedWeight

if TYPE_CHECKING:
    import onnx_ir as ir


def translations(*, signed: bool = False) -> dict[Any, Any]:
    """How `torch.onnx` writes the rounding operators.

    Args:
        signed: for TensorRT: static codes as int8, 128 less than as uint8, and float8 as QuantizeLinear. With
            that, ONNX Runtime (1.31) fuses integer operators that do not load; it gets casts.
    """
    import ml_dtypes
    import onnx_ir as ir
    from onnxscript import opset21

    op: Any = opset21
    shift, dtype = (128, 3) if signed else (0, 2)

    def static(x: Any, scale: float, zero_point: int) -> Any:
        s = op.Constant(value_float=scale)
        z = op.Cast(op.Constant(value_int=zero_point - shift), to=dtype)
        return op.DequantizeLinear(op.QuantizeLinear(x, s, z), s, z)

    def dynamic(x: Any) -> Any:
        codes, scale, zero_point = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(codes, scale, zero_point)

    def float8(x: Any, scale: float) -> Any:
        s = op.Constant(value_float=scale)
        if not signed:
            rounded = op.Cast(op.Div(x, s), to=ir.DataType.FLOAT8E4M3FN.value)
            return op.Mul(op.Cast(rounded, to=ir.DataType.FLOAT.value), s)
        # its zero point, always 0, says what QuantizeLinear rounds to
        z = op.Constant(value=ir.tensor(np.zeros((), dtype=ml_dtypes.float8_e4m3fn)))
        return op.DequantizeLinear(op.QuantizeLinear(x, s, z), s, z)

    return {STATIC: static, DYNAMIC: dynamic, FLOAT8: float8}


def rounded_input(node: ir.Node, operator: str) -> ir.Node | None:
    """The operator, QuantizeLinear or DynamicQuantizeLinear, whose rounded values a layer reads; None where
    it is no such one."""
    value = node.inputs[0]
    decode = None if value is None else value.producer()
    if decode is None or decode.op_type != "DequantizeLinear" or decode.inputs[0] is None:
        return None
    quantize = decode.inputs[0].producer()
    return quantize if quantize is not None and quantize.op_type == operator else None


def is_integer_weight(encoded: EncodedWeight) -> bool:
    """Whether MatMulInteger can take it: one scale for each row, no zero points, no overflow."""
    return _whole_rows(encoded) and len(encoded.shape) == 2 and not bool(saturates(_signed(encoded)).any())


def _whole_rows(encoded: EncodedWeight) -> bool:
    e = encoded.encoding
    return e.bits in (4, 8) and e.group_size == -1 and e.symmetric


def _signed(encoded: EncodedWeight) -> torch.Tensor:
    """Codes as signed integers, int8 ``[O, N]``."""
    return (encoded.unpacked()[0].to(torch.int16) - encoded.encoding.zero).to(torch.int8)


def _integers(
    builder: Any, before: ir.Node, name: str, encoded: EncodedWeight, codes: torch.Tensor
) -> ir.Value:
    """INT8 codes; those of 4 bits are stored as INT4, and a Cast that is folded at load makes them INT8."""
    if encoded.encoding.bits == 8:
        return builder.initializer(f"{name}.codes", codes.contiguous().numpy())
    import ml_dtypes
    import onnx_ir as ir

    stored = builder.initializer(f"{name}.codes", codes.contiguous().numpy().astype(ml_dtypes.int4))
    return builder.node(before, "Cast", [stored], f"{name}/widen", to=ir.DataType.INT8.value)


def integer_product(builder: Any, name: str, encoded: EncodedWeight, readers: list[ir.Node]) -> Lowered:
    """Replace every MatMul or Gemm on rounded values by the integer product and its scales.

    Args:
        builder: of `compress.exporters.onnx_weights`.
        name: of the weight.
        encoded: the weight.
        readers: of the weight; `rounded_input` finds the DynamicQuantizeLinear of each.
    """
    import onnx_ir as ir

    weight = _integers(builder, readers[0], name, encoded, _signed(encoded).t())
    scales = builder.initializer(f"{name}.scales", encoded.scales[:, 0].contiguous().numpy())
    products, shared = [], False
    for i, node in enumerate(readers):
        quantize = rounded_input(node, "DynamicQuantizeLinear")
        assert quantize is not None
        codes, scale, zero = quantize.outputs
        shared = shared or _products(codes) > 1
        label = f"{name}/{i}" if i else name
        products.append(f"{label}/matmul")
        total = builder.node(node, "MatMulInteger", [codes, weight, zero], f"{label}/matmul")
        as_float = builder.node(node, "Cast", [total], f"{label}/cast", to=ir.DataType.FLOAT.value)
        factor = builder.node(node, "Mul", [scale, scales], f"{label}/factor")
        result = builder.node(node, "Mul", [as_float, factor], f"{label}/scale")
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            result = builder.node(node, "Add", [result, node.inputs[2]], f"{label}/bias")
        builder.take_over(node, result)
    form = f"DynamicQuantizeLinear -> MatMulInteger(INT{encoded.encoding.bits})"
    fused = "MatMulIntegerToFloat" if shared else "DynamicQuantizeMatMul"
    return Lowered(name, form, fused, tuple(products))


def static_product(builder: Any, name: str, encoded: EncodedWeight, readers: list[ir.Node]) -> Lowered:
    """Give every MatMul or Gemm on values rounded on a known range an int8 weight with its decoder, which the
    runtime takes into MatMulIntegerToFloat.

    Args:
        as of `integer_product`; each reads what a QuantizeLinear has rounded.
    """
    weight = _integers(builder, readers[0], name, encoded, _signed(encoded).t())
    scales = builder.initializer(f"{name}.scales", encoded.scales[:, 0].contiguous().numpy())
    decoders = []
    for i, node in enumerate(readers):
        decoders.append(f"{name}/{i}/decode" if i else f"{name}/decode")
        decode = builder.node(node, "DequantizeLinear", [weight, scales], decoders[-1], axis=1)
        if node.op_type == "Gemm":
            builder.gemm_to_matmul(node, decode, torch.float32, detour=True)
        else:
            node.replace_input_with(1, decode)
    form = f"QuantizeLinear -> DequantizeLinear(INT{encoded.encoding.bits}) -> MatMul"
    return Lowered(name, form, "MatMulIntegerToFloat", tuple(decoders))


def _products(codes: ir.Value) -> int:
    """How many layers read these rounded values: those rewritten already, and those that will be."""
    count = 0
    for reader, _ in codes.uses():
        count += len(reader.outputs[0].uses()) if reader.op_type == "DequantizeLinear" else 1
    return count


def integer_convolution(node: ir.Node, encoded: EncodedWeight) -> ir.Node | None:
    """The node, if it is a convolution of rounded values that can take this weight as integers."""
    value = node.inputs[0]
    source = None if value is None else value.producer()
    rounded = source is not None and source.op_type == "DequantizeLinear"
    if node.op_type != "Conv" or not rounded or not _settles_rounded(node) or not _whole_rows(encoded):
        return None
    order = summation_order(encoded.shape)
    depthwise = encoded.shape[1] == 1 and node.attributes.get_int("group", 1) == encoded.shape[0]
    safe = depthwise or not bool(saturates(_signed(encoded)[:, order]).any())
    return node if safe else None


def _settles_rounded(node: ir.Node) -> bool:
    """Whether all that reads the output, perhaps clipped, is one QuantizeLinear."""
    readers = list(node.outputs[0].uses())
    if len(readers) == 1 and readers[0].node.op_type in ("Relu", "Clip"):
        readers = list(readers[0].node.outputs[0].uses())
    return len(readers) == 1 and readers[0].node.op_type == "QuantizeLinear"


def integer_filter(builder: Any, name: str, encoded: EncodedWeight, node: ir.Node) -> Lowered:
    """A convolution's weight as int8 with its decoder, which the runtime takes into QLinearConv."""
    codes = _integers(builder, node, name, encoded, _signed(encoded).reshape(encoded.shape))
    scales = builder.initializer(f"{name}.scales", encoded.scales[:, 0].contiguous().numpy())
    decode = builder.node(node, "DequantizeLinear", [codes, scales], f"{name}/decode", axis=0)
    node.replace_input_with(1, decode)
    form = f"QuantizeLinear -> DequantizeLinear(INT{encoded.encoding.bits}) -> Conv -> QuantizeLinear"
    return Lowered(name, form, "QLinearConv", (f"{name}/decode",))
