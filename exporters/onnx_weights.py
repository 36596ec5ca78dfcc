"""Encoded weights in ONNX: the forms that ONNX Runtime and TensorRT run fast.

============ =========================================================== =========================
reader       form in the file                                            ONNX Runtime makes of it
============ =========================================================== =========================
linear       INT4/INT8 ``[K, N]``, DequantizeLinear(axis 0, block) ->    MatMulNBits
             MatMul (-> Add); UINT4/UINT8 with zero points if asymmetric
linear, int2 MatMulNBits (INT2 needs opset 25)                           MatMulNBits
small linear integers -> Cast -> Mul (-> Reshape)                        float weight, folded at load
tied         one uint8 blob: GatherBlockQuantized for the embedding,     both as they are
             Reshape -> MatMulNBits for the head
embedding    GatherBlockQuantized                                        as it is
convolution  integers -> Cast -> Mul (-> Reshape)                        float weight, folded at load
============ =========================================================== =========================

A convolution's weight is deliberately *not* written as DequantizeLinear: ONNX Runtime keeps that
operator and would decode the weight on every call (1.3x slower than float, measured), while Cast and
Mul of constants are folded when the file is loaded: the file is small, the speed is that of float.
Linear layers below `FOLD_BELOW` weights take that form too: there MatMulNBits is slower than float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from compress.artifact import Lowered
from compress.encoding import Encoded, EncodedWeight, pack
from compress.exporters.onnx_activations import (
    integer_convolution,
    integer_filter,
    integer_product,
    is_integer_weight,
    rounded_input,
    static_product,
)

FOLD_BELOW = 1 << 16
"""Weights of a linear layer under which float is faster than MatMulNBits, also at batch 1: measured
0.83x at 64x10, 0.9x at 128x128, 1.0x at 256x256, 1.1x at 384x384, 1.4x at 768x768 (4 bits, one thread)."""

_LEVEL = 4
"""accuracy_level of MatMulNBits: int8 activations; lower levels of 2 and 8 bits have no fast kernel."""

_FUSED_ACTIVATIONS = {
    "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Selu", "HardSigmoid", "Softplus", "Softsign",
    "ThresholdedRelu",
}  # fmt: skip
"""What ONNX Runtime's GemmActivationFusion takes."""

_ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


def lower_weights(
    model: ir.Model, encodings: dict[str, EncodedWeight], *, fold_below: float
) -> list[Lowered]:
    """Replace the placeholders of encoded weights, graph inputs by name, by their forms above.

    Args:
        model: rewritten in place.
        encodings: by the name of the placeholder.
        fold_below: number of weights under which a linear layer is decoded when the file is loaded.
    """
    builder = Builder(model)
    lowered = []
    for name, value, uses in placeholders(model, encodings):
        encoded = encodings[name]
        kinds = {kind for kind, _, _ in uses}
        nodes = [node for _, node, _ in uses]
        whole = encoded.dtype == torch.float32  # integer products give float32
        integers = whole and kinds == {"linear"} and is_integer_weight(encoded)
        if integers and all(rounded_input(node, "DynamicQuantizeLinear") for node in nodes):
            form = integer_product(builder, name, encoded, nodes)
        elif integers and all(rounded_input(node, "QuantizeLinear") for node in nodes):
            form = static_product(builder, name, encoded, nodes)
        elif whole and len(uses) == 1 and (conv := integer_convolution(nodes[0], encoded)):
            form = integer_filter(builder, name, encoded, conv)
        elif len(uses) > 1 and kinds <= {"linear", "embedding"}:
            form = builder.shared(name, encoded, uses)
        elif kinds == {"linear"} and math.prod(encoded.shape) >= fold_below:
            form = builder.linear(name, encoded, uses[0])
        elif kinds == {"embedding"}:
            form = builder.embedding(name, encoded, uses[0])
        else:
            form = builder.constant(name, encoded, value)
        lowered.append(form)
    return lowered


Use = tuple[str, ir.Node, int]
Weight = TypeVar("Weight", bound=Encoded)


def placeholders(model: ir.Model, names: Iterable[str]) -> Iterator[tuple[str, ir.Value, list[Use]]]:
    """The graph inputs that stand for weights and what reads them; each is removed when its turn is over."""
    for name in names:
        value = next((v for v in model.graph.inputs if v.name == name), None)
        if value is not None:  # else nothing reads it
            yield name, value, readers(value)
            model.graph.inputs.remove(value)


def lower_at_load(
    model: ir.Model,
    weights: Mapping[str, Weight],
    form: str,
    decode: Callable[[Builder, ir.Node, str, Weight], ir.Value],
) -> list[Lowered]:
    """Replace the placeholders of weights by operators on constants, which ONNX Runtime folds at load.

    Args:
        model: rewritten in place.
        weights: by the name of the placeholder.
        form: what the operators are, for the report.
        decode: adds them, given the node to put them before and the weight's name; the last one is called
            ``NAME/decode``.
    """
    lowered = []
    for name, value, _ in placeholders(model, weights):
        before = next(iter(value.uses())).node
        value.replace_all_uses_with(decode(Builder(model), before, name, weights[name]))
        lowered.append(Lowered(name, form, "decoded at load", (f"{name}/decode",)))
    return lowered


def readers(value: ir.Value) -> list[Use]:
    """(kind, node, input index) of every reader; a Transpose in between is looked through."""
    found: list[Use] = []
    for node, index in value.uses():
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
            for reader, at in node.outputs[0].uses():
                found.append(("linear" if reader.op_type == "MatMul" and at == 1 else "other", reader, at))
        elif node.op_type == "Gemm" and index == 1 and _plain_gemm(node):
            found.append(("linear", node, index))
        elif node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0:
            found.append(("embedding", node, index))
        else:
            found.append(("other", node, index))
    return found


def _plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    return (
        attributes.get_int("transB", 0) == 1
        and attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
    )


class Builder:
    """Nodes and initializers of the forms, in the model given."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph

    # -- the forms -------------------------------------------------------------------------------

    def linear(self, name: str, encoded: EncodedWeight, use: Use) -> Lowered:
        encoding = encoded.encoding
        if encoding.bits == 2:
            return self.shared(name, encoded, [use])
        codes, zeros = encoded.unpacked()
        block = encoding.width(encoded.columns)
        scales = encoded.scales.t()
        attributes: dict[str, Any] = {"axis": 0, "block_size": block}
        if encoding.group_size == -1:
            attributes, scales = {"axis": 1}, encoded.scales[:, 0]
        dtype = {4: (ml_dtypes.int4, ml_dtypes.uint4), 8: (np.int8, np.uint8)}[encoding.bits]
        if encoding.symmetric:
            signed = codes.t().to(torch.int16) - encoding.zero
            inputs = [self.initializer(f"{name}.codes", signed.numpy().astype(dtype[0]))]
            inputs.append(self.initializer(f"{name}.scales", scales.contiguous().numpy()))
        else:
            inputs = [self.initializer(f"{name}.codes", codes.t().contiguous().numpy().astype(dtype[1]))]
            inputs.append(self.initializer(f"{name}.scales", scales.contiguous().numpy()))
            zero = zeros[:, 0] if encoding.group_size == -1 else zeros.t().contiguous()
            inputs.append(self.initializer(f"{name}.zero_points", zero.numpy().astype(dtype[1])))
        _, node, _ = use
        decode = self.node(node, "DequantizeLinear", inputs, f"{name}/decode", **attributes)
        if node.op_type == "Gemm":
            self.gemm_to_matmul(node, decode, encoded.dtype)
        elif encoded.dtype == torch.float32:
            node.replace_input_with(1, decode)
        else:
            operand = self.cast(node, _input(node, 0), encoded.dtype, torch.float32, f"{name}/to_float")
            product = self.node(node, "MatMul", [operand, decode], f"{name}/matmul")
            product = self.cast(node, product, torch.float32, encoded.dtype, f"{name}/from_float")
            self.take_over(node, product)
        kind = ("INT" if encoding.symmetric else "UINT") + str(encoding.bits)
        return Lowered(name, f"DequantizeLinear({kind}) -> MatMul", "MatMulNBits", (f"{name}/decode",))

    def embedding(self, name: str, encoded: EncodedWeight, use: Use) -> Lowered:
        block, scales, zeros = _blocks(encoded, embedding_only=True)
        inputs = [self.initializer(f"{name}.codes", encoded.codes.numpy())]
        self.gather(name, use[1], inputs[0], self.block_inputs(name, scales, zeros), encoded, block)
        return Lowered(name, "GatherBlockQuantized", "GatherBlockQuantized")

    def shared(self, name: str, encoded: EncodedWeight, uses: list[Use]) -> Lowered:
        """One blob for all readers."""
        bits = encoded.encoding.bits
        block, scales, zeros = _blocks(encoded, embedding_only=False)
        rows, count = scales.shape
        width = count * block * bits // 8
        blob = torch.nn.functional.pad(encoded.codes, (0, width - encoded.codes.shape[1]))
        gathered = any(kind == "embedding" for kind, _, _ in uses)
        shape = (rows, count, block * bits // 8)
        # GatherBlockQuantized wants two axes, MatMulNBits three; a Reshape of a constant folds at load
        data = blob if gathered else blob.reshape(shape)
        codes = self.initializer(f"{name}.codes", data.contiguous().numpy())
        extra = self.block_inputs(name, scales, zeros)
        for i, (kind, node, _) in enumerate(uses):
            if kind == "embedding":
                self.gather(name, node, codes, extra, encoded, block)
                continue
            operand = codes
            if gathered:
                target = self.initializer(f"{name}.shape{i}", np.array(shape, dtype=np.int64))
                operand = self.node(node, "Reshape", [codes, target], f"{name}/reshape{i}")
            activation = _input(node, 0)
            activation = self.cast(node, activation, encoded.dtype, torch.float32, f"{name}/to_float{i}")
            product = self.node(
                node,
                "MatMulNBits",
                [activation, operand, *extra],
                f"{name}/matmul{i}",
                "com.microsoft",
                K=encoded.columns,
                N=rows,
                bits=bits,
                block_size=block,
                accuracy_level=_LEVEL,
            )
            product = self.cast(node, product, torch.float32, encoded.dtype, f"{name}/from_float{i}")
            if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
                product = self.node(node, "Add", [product, _input(node, 2)], f"{name}/bias{i}")
            self.take_over(node, product)
        form = " + ".join(sorted({"GatherBlockQuantized" if k == "embedding" else "MatMulNBits"
                                  for k, _, _ in uses}))  # fmt: skip
        if len(uses) > 1:
            form += " on one blob"
        return Lowered(name, form, form)

    def constant(self, name: str, encoded: EncodedWeight, value: ir.Value) -> Lowered:
        """Integers and the arithmetic that decodes them, all constant: folded when the file is loaded."""
        encoding = encoded.encoding
        first = next(iter(value.uses())).node
        rows, columns = encoded.shape[0], encoded.columns
        groups, width = encoding.groups(columns), encoding.width(columns)
        codes, zeros = encoded.unpacked()
        padded = groups * width
        if groups == 1:
            padded = width = columns
        codes = torch.nn.functional.pad(codes, (0, padded - columns), value=encoding.zero)
        unsigned = np.uint8 if encoding.bits == 8 else ml_dtypes.uint4
        to = ir.DataType.FLOAT.value
        shift: ir.Value | None = None
        if not encoding.symmetric:
            packed = zeros.unsqueeze(-1).numpy().astype(unsigned)
            integer_zeros = self.initializer(f"{name}.zero_points", packed)
            shift = self.node(first, "Cast", [integer_zeros], f"{name}/cast_zero", to=to)
        if encoding.bits == 2:
            integers = self.unpack2(name, first, codes.view(rows, groups, width))
            if shift is None:
                shift = self.initializer(f"{name}.zero", np.array([encoding.zero], dtype=np.float32))
        else:
            signed = np.int8 if encoding.bits == 8 else ml_dtypes.int4
            data = codes.view(rows, groups, width).to(torch.int16)
            array = (
                (data - encoding.zero).numpy().astype(signed)
                if shift is None
                else data.numpy().astype(unsigned)
            )
            integers = self.initializer(f"{name}.codes", array)
        result = self.node(first, "Cast", [integers], f"{name}/cast", to=to)
        if shift is not None:
            result = self.node(first, "Sub", [result, shift], f"{name}/shift")
        scales = self.initializer(f"{name}.scales", encoded.scales.unsqueeze(-1).numpy())
        result = self.node(first, "Mul", [result, scales], f"{name}/scale")
        if padded != columns:
            flat = self.initializer(f"{name}.flat", np.array([rows, padded], dtype=np.int64))
            result = self.node(first, "Reshape", [result, flat], f"{name}/flatten")
            bounds = [
                self.initializer(f"{name}.{k}", np.array([v], dtype=np.int64))
                for k, v in (("start", 0), ("end", columns), ("axis", 1))
            ]
            result = self.node(first, "Slice", [result, *bounds], f"{name}/slice")
        shape = self.initializer(f"{name}.shape", np.array(encoded.shape, dtype=np.int64))
        result = self.node(first, "Reshape", [result, shape], f"{name}/decode")
        result = self.cast(first, result, torch.float32, encoded.dtype, f"{name}/from_float")
        value.replace_all_uses_with(result)
        return Lowered(name, f"INT{encoding.bits} -> Cast -> Mul", "decoded at load", (f"{name}/decode",))

    def unpack2(self, name: str, before: ir.Node, codes: torch.Tensor) -> ir.Value:
        """Four codes a byte, taken apart by shift and mask: opset 21 has no 2-bit type."""
        rows, groups, width = codes.shape
        packed = pack(codes.reshape(rows, -1), 2)
        blob = self.initializer(f"{name}.codes", packed.unsqueeze(-1).numpy())
        shifts = self.initializer(f"{name}.shifts", np.array([0, 2, 4, 6], dtype=np.uint8))
        mask = self.initializer(f"{name}.mask", np.array([3], dtype=np.uint8))
        value = self.node(before, "BitShift", [blob, shifts], f"{name}/shift2", direction="RIGHT")
        value = self.node(before, "BitwiseAnd", [value, mask], f"{name}/mask2")
        flat = self.initializer(f"{name}.lanes", np.array([rows, -1], dtype=np.int64))
        value = self.node(before, "Reshape", [value, flat], f"{name}/lanes2")
        length = groups * width
        if packed.shape[1] * 4 != length:
            bounds = [
                self.initializer(f"{name}.{k}", np.array([v], dtype=np.int64))
                for k, v in (("start2", 0), ("end2", length), ("axis2", 1))
            ]
            value = self.node(before, "Slice", [value, *bounds], f"{name}/cut2")
        shape = self.initializer(f"{name}.groups", np.array([rows, groups, width], dtype=np.int64))
        return self.node(before, "Reshape", [value, shape], f"{name}/group2")

    # -- pieces ----------------------------------------------------------------------------------

    def gather(
        self,
        name: str,
        node: ir.Node,
        codes: ir.Value,
        extra: list[ir.Value],
        encoded: EncodedWeight,
        block: int,
    ) -> None:
        use = f"{name}/{node.outputs[0].name}"  # there may be several
        result = self.node(
            node,
            "GatherBlockQuantized",
            [codes, _input(node, 1), *extra],
            f"{use}/gather",
            "com.microsoft",
            bits=encoded.encoding.bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )
        result = self.cast(node, result, torch.float32, encoded.dtype, f"{use}/from_float")
        self.take_over(node, result)

    def block_inputs(self, name: str, scales: torch.Tensor, zeros: torch.Tensor | None) -> list[ir.Value]:
        values = [self.initializer(f"{name}.scales", scales.contiguous().numpy())]
        if zeros is not None:
            values.append(self.initializer(f"{name}.zero_points", zeros.contiguous().numpy()))
        return values

    def cast(
        self, before: ir.Node, value: ir.Value, given: torch.dtype, dtype: torch.dtype, name: str
    ) -> ir.Value:
        """Weights are decoded and multiplied in float32, whatever the model around them computes in."""
        if given == dtype:
            return value
        return self.node(before, "Cast", [value], name, to=_ONNX_TYPES[dtype].value)

    def gemm_to_matmul(
        self, gemm: ir.Node, weight: ir.Value, dtype: torch.dtype, *, detour: bool = False
    ) -> None:
        """Gemm with a transposed weight is not fused with its decoder; MatMul and Add are.

        Before an activation ONNX Runtime fuses a 2-D MatMul, Add and the activation into one float
        FusedGemm first, and the weight would be decoded on every call; with a third axis it does not. Between
        rounded activations it makes a Gemm of any 2-D MatMul and Add: `detour` adds the axis there too.
        """
        name = gemm.name or gemm.outputs[0].name or "gemm"
        detour = detour or any(reader.op_type in _FUSED_ACTIVATIONS for reader, _ in gemm.outputs[0].uses())
        operand = _input(gemm, 0)
        operand = self.cast(gemm, operand, dtype, torch.float32, f"{name}/to_float")
        if detour:
            axis = self.initializer("compress.axis0", np.array([0], dtype=np.int64))
            operand = self.node(gemm, "Unsqueeze", [operand, axis], f"{name}/unsqueeze")
        result = self.node(gemm, "MatMul", [operand, weight], f"{name}/matmul")
        result = self.cast(gemm, result, torch.float32, dtype, f"{name}/from_float")
        if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
            result = self.node(gemm, "Add", [result, _input(gemm, 2)], f"{name}/bias")
        if detour:
            result = self.node(gemm, "Squeeze", [result, axis], f"{name}/squeeze")
        self.take_over(gemm, result)

    def take_over(self, old: ir.Node, new: ir.Value) -> None:
        """Give `new` the readers, name and type of the only output of `old`, and remove `old`."""
        output = old.outputs[0]
        new.shape, new.type = output.shape, output.type
        outputs = self.graph.outputs
        for i, value in enumerate(outputs):
            if value is output:
                outputs[i] = new
        output.replace_all_uses_with(new)
        name = output.name
        output.name = f"{name}/replaced"
        new.name = name
        self.graph.remove(old, safe=True)

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value],
        name: str,
        domain: str = "",
        **attributes: int | str | list[int],
    ) -> ir.Value:
        new = ir.node(op, inputs, attributes=attributes, domain=domain, name=name)
        new.outputs[0].name = f"{name}_out"
        self.graph.insert_before(before, new)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return new.outputs[0]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _blocks(encoded: EncodedWeight, *, embedding_only: bool) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """Block size, scales ``[O, blocks]`` and packed zero points as the block operators want them.

    They know no "whole row": for an embedding one block takes any row, a product has kernels up to
    block 128 only, so there the row's scale is repeated.
    """
    encoding, columns = encoded.encoding, encoded.columns
    if encoding.group_size != -1:
        return encoding.group_size, encoded.scales, encoded.zero_points
    block = 1 << max(4, math.ceil(math.log2(columns)))
    if embedding_only or block <= 128:
        return block, encoded.scales, encoded.zero_points
    count = math.ceil(columns / 128)
    zeros = None
    if encoded.zero_points is not None:
        _, unpacked = encoded.unpacked()
        zeros = pack(unpacked.repeat(1, count), encoding.bits)
    return 128, encoded.scales.repeat(1, count), zeros
