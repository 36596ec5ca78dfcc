"""float32 -> float16 in an ONNX model, for runtimes whose types are what the file says (strongly typed).

Weights, scales and what is computed become float16; inputs and outputs of the model stay float32. Three kinds
of
operators stay float32, with casts around them:

- what sums many terms or leaves the range of float16 (65504) in between: means, norms, softmax, powers;
- arithmetic on nothing but results of those, such as the epsilon and the root of an RMS norm;
- all that sines and cosines are computed from: a rotary position of 2,049 is no float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_WIDE = {
    "CumSum", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax",
    "LpNormalization", "Pow", "RMSNormalization", "Range", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softmax",
}  # fmt: skip

_ARITHMETIC = {"Add", "Div", "Mul", "Neg", "Reciprocal", "Sqrt", "Sub", "Expand", "Reshape", "Unsqueeze"}

_POSITIONS = {"Sin", "Cos"}

_FLOAT_OPERANDS = {"Resize": (0,)}
"""Operators of which only these inputs follow the type of the model."""

_MASK = 32768.0
"""What finite constants beyond float16 become. They are masks such as -1e9: two of them, or one and a score,
must still have a sum, and that of the largest float16 and anything is infinite."""


def to_float16(model: ir.Model) -> None:
    """Make a float32 model compute in float16, in place; see above for what stays."""
    _Half(model).run()


class _Half:
    def __init__(self, model: ir.Model) -> None:
        import onnx_ir

        self.ir, self.graph = onnx_ir, model.graph
        self.float, self.half = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16
        self.versions: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.constants = set(model.graph.initializers.values())

    def run(self) -> None:
        positions = self._before_positions()
        wide: set[ir.Value] = set()
        for node in list(self.graph):
            given = [v for v in node.inputs if v is not None and v not in self.constants]
            given = [v for v in given if v.dtype in (self.float, self.half)]
            arithmetic = node.op_type in _ARITHMETIC and bool(given) and all(v in wide for v in given)
            stays = node in positions or node.op_type in _WIDE or arithmetic
            wanted = self.float if stays else self.half
            floats = [v for v in node.outputs if self._is_float(v)]
            self._inputs(node, wanted)
            self._attributes(node, wanted)
            for value in floats:
                value.type = self.ir.TensorType(wanted)
                self.versions[value, wanted] = value
                if stays:
                    wide.add(value)
        self._outputs()

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype == self.float

    def _before_positions(self) -> set[ir.Node]:
        found: set[ir.Node] = set()
        waiting = [node for node in self.graph if node.op_type in _POSITIONS]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            sources = (v.producer() for v in node.inputs if v is not None and self._is_float(v))
            waiting += [s for s in sources if s is not None]
        return found

    def _inputs(self, node: ir.Node, wanted: ir.DataType) -> None:
        which = _FLOAT_OPERANDS.get(node.op_type, range(len(node.inputs)))
        for i in which:
            value = node.inputs[i]
            if node.op_type != "Cast" and value is not None and value.dtype in (self.float, self.half):
                node.replace_input_with(i, self._as(value, wanted, node))

    def _attributes(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Types and tensors that stand in the node itself."""
        attributes = node.attributes
        if node.op_type == "Cast" and attributes.get_int("to") == self.float.value:
            attributes.add(self.ir.AttrInt64("to", wanted.value))
        value = attributes.get("value")
        if node.op_type in ("Constant", "ConstantOfShape") and value is not None:
            tensor = value.as_tensor()
            if tensor.dtype == self.float and wanted == self.half:
                attributes.add(self.ir.AttrTensor("value", self.ir.tensor(_halved(tensor.numpy()))))

    def _as(self, value: ir.Value, wanted: ir.DataType, before: ir.Node | None) -> ir.Value:
        """This value in another type: an initializer of its own, or a cast, made once."""
        if value.dtype == wanted:
            return value
        found = self.versions.get((value, wanted))
        if found is None:
            found = self._new(value, wanted, before)
            self.versions[value, wanted] = found
        return found

    def _new(self, value: ir.Value, wanted: ir.DataType, before: ir.Node | None) -> ir.Value:
        suffix = "float16" if wanted == self.half else "float32"
        if value in self.constants:
            assert value.const_value is not None
            found = self.ir.val(
                f"{value.name}.{suffix}", const_value=self.ir.tensor(_halved(value.const_value.numpy()))
            )
            self.graph.register_initializer(found)
            return found
        node = self.ir.node("Cast", [value], attributes={"to": wanted.value}, name=f"{value.name}/{suffix}")
        result = node.outputs[0]
        result.name, result.shape = f"{value.name}/{suffix}_out", value.shape
        result.type = self.ir.TensorType(wanted)
        source = value.producer()
        if source is not None:
            self.graph.insert_after(source, node)
        elif before is not None:
            self.graph.insert_before(next(iter(self.graph)), node)
        return result

    def _outputs(self) -> None:
        for i, value in enumerate(self.graph.outputs):
            if value.dtype == self.half:
                name = value.name
                value.name = f"{name}/float16"
                result = self._as(value, self.float, None)
                result.name = name
                self.graph.outputs[i] = result


def _halved(array: np.ndarray) -> np.ndarray:
    """In float16; what is finite stays so."""
    limit = float(np.finfo(np.float16).max)
    inside = np.where(np.isfinite(array) & (np.abs(array) > limit), np.sign(array) * _MASK, array)
    return np.asarray(inside, dtype=np.float16)
