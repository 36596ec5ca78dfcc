"""float32 -> float16 in an ONNX model, for runtimes whose types are what the file says (strongly typed).

Weights, scales and what is computed become float16; inputs and outputs of the model stay float32. Three kinds
of operators stay float32, with casts around them:

- what sums many terms or leaves the range of float16 (65504) in between: means, norms, softmax, powers,
  squares;
- arithmetic on nothing but results of those, such as the epsilon and the root of an RMS norm;
- all that positions are computed from, for 2,049 is no float16: what sines and cosines read, floats that
  become integers (indices, sizes), and counted values that are compared.
"""

from __future__ import annotations

from pathlib import Path
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

_CHOICES = {"ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK"}
"""What compares values: of positions 2,048 and 2,049 one is the larger."""

_FLOAT_OPERANDS = {"Resize": (0,)}
"""Operators of which only these inputs follow the type of the model."""

_MASK = 16384.0
"""What finite constants beyond float16 become. They are masks such as -1e9: three of them and a score must
still have a sum, and where all of a row are infinite a softmax has none."""


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
            square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
            stays = node in positions or node.op_type in _WIDE or square or arithmetic
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
        waiting = self._positions()
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            sources = (v.producer() for v in node.inputs if v is not None and self._is_float(v))
            waiting += [s for s in sources if s is not None]
        return found

    def _positions(self) -> list[ir.Node]:
        """Operators whose result is another one where an integer is off by one."""
        found = []
        counted: set[ir.Value] = set()
        for node in self.graph:
            given = [v for v in node.inputs if v is not None and not self._is_number(v)]
            floats = [v for v in given if self._is_float(v)]
            compares = node.op_type in _CHOICES and not counted.isdisjoint(floats)
            if node.op_type in _POSITIONS or compares or (floats and self._to_integer(node)):
                found.append(node)
            # from integers alone, not from a table they are looked up in
            if given and counted.issuperset(floats):
                counted.update(v for v in node.outputs if self._is_float(v))
        return found

    def _to_integer(self, node: ir.Node) -> bool:
        to = node.attributes.get_int("to") if node.op_type == "Cast" else None
        return to is not None and self.ir.DataType(to).is_integer()

    def _is_number(self, value: ir.Value) -> bool:
        return value in self.constants and value.const_value is not None and value.const_value.size == 1

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


# -- float16 in ONNX Runtime ----------------------------------------------------------------------

_TYPED = {"Cast", "Constant", "ConstantOfShape"}
"""Operators that name the type they give out."""

_MOVES = {
    "Clip", "Concat", "Expand", "Flatten", "Gather", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad",
    "Relu", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that give out float16 where they are given it: there is nothing to round."""


def in_float32(path: Path, folder: Path) -> Path:
    """A float32 file that gives what a float16 one does: each operator computes in float32, as GPUs sum, and
    what it gives out is rounded to float16, which makes what is too large infinite.

    ONNX Runtime itself rounds less: on processors it has no float16 kernels of most operators, and runs
    chains of them in float32.

    Args:
        path: the float16 file; types of all values stand in it, as `to_float16` leaves them.
        folder: where the other one is written.

    Returns:
        that, or `path` where nothing is float16.
    """
    import onnx_ir as ir

    model = ir.load(path)
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    constants = [v for v in model.graph.initializers.values() if v.dtype == half]
    values = [v for node in model.graph for v in node.outputs if v.dtype == half]
    if not constants and not values:
        return path
    for value in constants:
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        value.type = ir.TensorType(single)
    for value in values:
        source, uses = value.producer(), list(value.uses())
        assert source is not None
        if source.op_type not in _TYPED:
            value.type = ir.TensorType(single)
        if source.op_type in _MOVES:
            continue
        last, after = value, source
        for dtype in (single,) if source.op_type in _TYPED else (half, single):
            cast = ir.node("Cast", [last], attributes={"to": dtype.value})
            model.graph.insert_after(after, cast)
            last, after = cast.outputs[0], cast
            last.type = ir.TensorType(dtype)
        for reader, i in uses:
            reader.replace_input_with(i, last)
    found = folder / f"float32-{path.name}"
    ir.save(model, found, external_data=f"{found.name}.data")
    return found
