"""An ONNX file, ours or anybody's, as named points (`compress.points`).

A layer is a product, convolution or lookup one operand of which is computed from constants alone. Operators
that belong to it are followed on both sides: what rounds its input, and what scales, casts or shifts its
output. Its name is that of the stored weight; where an exporter has folded that away, that of the bias, if no
other layer has it; else the path in the operator's name.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import MissingExtra, ModelFileError
from compress.exporters.ort import Session, runtime
from compress.inputs import BATCH, InputSpec
from compress.points import Layer

_LAYERS = {
    # operator -> (kind, position of the weight, position of the bias or None)
    "Conv": ("conv", 1, 2),
    "ConvInteger": ("conv", 1, None),
    "Gemm": ("linear", 1, 2),
    "MatMul": ("linear", 1, None),
    "MatMulInteger": ("linear", 1, None),
    "MatMulNBits": ("linear", 1, 5),
    "Gather": ("embedding", 0, None),
    "GatherBlockQuantized": ("embedding", 0, None),
}
_ROUNDERS = ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear")
_PART = re.compile(r"\.(codes|scales|zero_points|values|mask)$")
_FOREIGN = re.compile(r"(_quantized|_Q\d\w*|_q\d\w*)$")
_NO_NAME = re.compile(r"(val_\d+|onnx::.*|\d+|.*_output_\d+)$")
_BITS = {
    "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "INT8": 8, "UINT8": 8, "FLOAT8E4M3FN": 8, "FLOAT16": 16,
    "BFLOAT16": 16,
}  # fmt: skip
_LARGEST = 1 << 30
_SIZE = 16
"""Of axes whose size neither the file nor the caller knows."""


class OnnxPoints:
    """The layers of an ONNX file; it runs operator by operator, nothing fused.

    Args:
        path: the file.

    Raises:
        ModelFileError: it cannot be read.
        MissingExtra: onnx or onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        runtime()
        try:
            import onnx
        except ImportError:
            raise MissingExtra("onnx", "onnx", "to read ONNX files") from None
        try:
            self.model = onnx.load(path)
        except Exception as error:  # protobuf and onnx raise families of their own
            raise ModelFileError(f"{path} cannot be read as ONNX: {error}") from error
        self.label = path.name
        graph = self.model.graph
        self._stored = {t.name: t for t in graph.initializer}
        self._producer = {o: node for node in graph.node for o in node.output if o}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = [o.name for o in graph.output]
        self._constant = set(self._stored)
        for node in graph.node:
            if all(name in self._constant or not name for name in node.input) and not _random(node):
                self._constant.update(node.output)
        fed = [v for v in graph.input if v.name not in self._stored]
        self.inputs = tuple(map(_spec, fed))
        self.layers = self._layers()
        self._tapped: tuple[frozenset[str], Session] | None = None
        self._alone: tuple[tuple[Layer, ...], Session] | None = None

    # -- see `compress.points.Points` --------------------------------------------------------------

    def run(
        self, inputs: Sequence[Tensor], names: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `compress.points.Points.run`."""
        import onnx

        key = frozenset(names)
        if self._tapped is None or self._tapped[0] != key:
            model = copy.deepcopy(self.model)
            for name in sorted(key & set(self._producer) - set(self._outputs)):
                # without a type: the runtime infers it
                model.graph.output.append(onnx.ValueInfoProto(name=name))
            self._tapped = key, _session(model)
        session = self._tapped[1]
        given = [t.to(spec.dtype) for t, spec in zip(inputs, self.inputs, strict=True)]
        values = dict(zip(session.outputs, session(*given), strict=True))
        values |= {str(spec.name): t for spec, t in zip(self.inputs, given, strict=True)}
        return {n: values[n] for n in key}, {n: values[n] for n in self._outputs}

    def apply(self, given: Mapping[Layer, Tensor], inputs: Sequence[Tensor]) -> dict[Layer, Tensor]:
        """See `compress.points.Points.apply`: one session holds all layers, each with its own input."""
        layers = tuple(given)
        if not layers:
            return {}
        if self._alone is None or self._alone[0] != layers:
            self._alone = layers, _session(self._apart(given))
        session = self._alone[1]
        real = {str(spec.name): t.to(spec.dtype) for spec, t in zip(self.inputs, inputs, strict=True)}
        fed = {f"{i}/source": t for i, t in enumerate(given.values())}
        results = session(*({**real, **fed}[name] for name in session.inputs))
        found = dict(zip(session.outputs, results, strict=True))
        return {layer: found[f"{i}/{layer.output}"] for i, layer in enumerate(layers)}

    def weight(self, layer: Layer) -> Tensor | None:
        """See `compress.points.Points.weight`; None where packed codes are an operand."""
        node = self._producer_of(layer.weight)
        if node is None:
            return None
        kind, at, _ = _LAYERS[node.op_type]
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            return None
        name = node.input[at]
        if name in self._stored:
            value = _tensor(self._stored[name])
        else:
            value = _session(self._sub([name])).session.run(None, {})[0]
            value = torch.from_numpy(np.asarray(value))
        transposed = node.op_type in ("MatMul", "MatMulInteger") or (
            node.op_type == "Gemm" and not _attribute(node, "transB", 0)
        )
        return value.float().t() if kind == "linear" and transposed and value.ndim == 2 else value.float()

    def holds(self, name: str) -> bool:
        """See `compress.points.Points.holds`."""
        return name in self._producer or any(spec.name == name for spec in self.inputs)

    def random(self, sizes: dict[str, int], seed: int) -> list[Tensor]:
        """See `compress.points.Points.random`; indices stay within the tables they are looked up in."""
        generator = torch.Generator().manual_seed(seed)
        tables: dict[str, int] = {}
        for layer in self.layers:
            node = self._producer_of(layer.weight)
            codes = self._largest(node.input[0]) if node is not None and layer.kind == "embedding" else None
            if codes is not None:
                tables[layer.source] = min(codes.dims[0], tables.get(layer.source, codes.dims[0]))
        return [spec.sample(generator, sizes=sizes, high=tables.get(str(spec.name))) for spec in self.inputs]

    # -- reading -------------------------------------------------------------------------------------

    def _layers(self) -> list[Layer]:
        nodes = []
        for node in self.model.graph.node:
            kind, at, place = _LAYERS.get(node.op_type, ("", 0, None))
            if not kind or len(node.input) <= at or node.input[at] not in self._constant:
                continue
            if node.input[1 - at] in self._constant or not self._is_table(node, kind):
                continue
            nodes.append((node, kind, at, *self._end(node, place)))
        shared = Counter(bias for *_, bias in nodes)
        layers = []
        for node, kind, at, output, bias in nodes:
            keys = {_stem(n) for n in [self._name(node.input[at])] if n}
            if not keys and bias and shared[bias] == 1:
                keys = {_stem(n) for n in [self._name(bias)] if n}
            if "/" in node.name.strip("/") and not keys:
                keys = {".".join(node.name.strip("/").split("/")[:-1])}
            name = min(keys, default=output)
            source = self._unrounded(node.input[1 - at])
            bits, float8 = self._bits(node, at), _is_float8(self._largest(node.input[at]))
            layers.append(Layer(name, frozenset(keys), kind, bits, source, output, node.output[0], float8))
        return layers

    def _is_table(self, node: Any, kind: str) -> bool:
        if kind != "embedding":
            return True
        stored = self._stored.get(node.input[0])
        return _attribute(node, "axis", 0) == 0 and (
            stored is None or (len(stored.dims) == 2 and (node.op_type != "Gather" or _is_float(stored)))
        )

    def _end(self, node: Any, bias: int | None) -> tuple[str, str]:
        """The value the layer gives, and its bias ("" if it has none)."""
        name: str = node.output[0]
        added = node.input[bias] if bias is not None and len(node.input) > bias else ""
        scaled = not node.op_type.endswith("Integer")
        while name not in self._outputs and len(self._readers.get(name, ())) == 1:
            reader = self._readers[name][0]
            other = next((n for n in reader.input if n != name), "")
            if reader.op_type == "Add" and not added and self._is_vector(other):
                added = other
            elif reader.op_type == "Mul" and not scaled:
                scaled = True
            elif reader.op_type not in ("Cast", "Squeeze", "BatchNormalization"):
                break
            name = reader.output[0]
        return name, added

    def _is_vector(self, name: str) -> bool:
        stored = self._stored.get(name)
        if stored is None:
            return name in self._constant
        return max(stored.dims, default=1) == np.prod(stored.dims or [1])

    def _unrounded(self, name: str) -> str:
        while (node := self._producer.get(name)) is not None:
            before = node.input[0] if node.op_type in _ROUNDERS else self._before_float8(node)
            if not before:
                break
            name = before
        return name

    def _before_float8(self, node: Any) -> str:
        """What Div -> Cast -> Cast -> Mul rounds to 8-bit floats, if this is its last operator; else ""."""
        kinds = []
        for op in ("Mul", "Cast", "Cast", "Div"):
            if node is None or node.op_type != op:
                return ""
            kinds.append(_attribute(node, "to", 0))
            before, node = node.input[0], self._producer.get(node.input[0])
        return before if kinds[2] == _float8() else ""

    def _cone(self, names: Iterable[str], stop: Collection[str] = ()) -> tuple[set[int], set[str]]:
        """Ids of the nodes that compute these values, and what they read besides; nothing behind `stop`."""
        nodes, leaves, open_ = set(), set(), list(names)
        while open_:
            name = open_.pop()
            node = self._producer.get(name) if name not in stop else None
            if node is None:
                leaves.add(name)
            elif id(node) not in nodes:
                nodes.add(id(node))
                open_ += [n for n in node.input if n]
        return nodes, leaves

    def _largest(self, name: str) -> Any:
        """Of what a constant is computed from the largest stored tensor: its codes, or its values."""
        _, leaves = self._cone([name])
        stored = [self._stored[n] for n in sorted(leaves) if n in self._stored]
        return max(stored, key=lambda t: int(np.prod(t.dims or [1])), default=None)

    def _name(self, value: str) -> str:
        stored = self._largest(value)
        return "" if stored is None or _NO_NAME.match(stored.name) else str(stored.name)

    def _bits(self, node: Any, at: int) -> int:
        import onnx

        if bits := _attribute(node, "bits", 0):
            return int(bits)
        if node.op_type == "GatherBlockQuantized":
            return 4
        nodes, _ = self._cone([node.input[at]])
        shift = next((n for n in self.model.graph.node if id(n) in nodes and n.op_type == "BitShift"), None)
        if shift is not None and (lanes := self._stored.get(shift.input[1])) is not None:
            return 8 // max(1, int(np.prod(lanes.dims)))  # as many codes in a byte as there are shifts
        stored = self._largest(node.input[at])
        return 32 if stored is None else _BITS.get(onnx.TensorProto.DataType.Name(stored.data_type), 32)

    def _producer_of(self, name: str) -> Any:
        node = self._producer.get(name)
        return node if node is not None and node.op_type in _LAYERS else None

    # -- models of a part of the file ----------------------------------------------------------------

    def _sub(self, names: Sequence[str]) -> Any:
        """The part of the model that computes these values from constants."""
        import onnx

        nodes, leaves = self._cone(names)
        chosen = [n for n in self.model.graph.node if id(n) in nodes]
        return self._model(chosen, [], [onnx.ValueInfoProto(name=n) for n in names], leaves)

    def _apart(self, given: Mapping[Layer, Tensor]) -> Any:
        """Each layer with an input of its own, ``0/source``, and an output ``0/NAME``."""
        import onnx

        once: set[int] = set()
        copies, sources, outputs, needed = [], [], [], set[str]()
        for i, (layer, value) in enumerate(given.items()):
            nodes, leaves = self._cone([layer.output], {layer.source})
            needed |= leaves
            new = {layer.source: f"{i}/source"}
            for node in self.model.graph.node:
                if id(node) not in nodes:
                    continue
                if not any(name in new for name in node.input):
                    once.add(id(node))  # constant, or computed from other inputs: the same for all layers
                    continue
                twin = copy.deepcopy(node)
                new |= {name: f"{i}/{name}" for name in node.output if name}
                twin.name = f"{i}/{node.name or node.output[0]}"
                twin.input[:] = [new.get(name, name) for name in node.input]
                twin.output[:] = [new.get(name, name) for name in node.output]
                copies.append(twin)
            dtype = onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype)
            sources.append(onnx.helper.make_tensor_value_info(f"{i}/source", dtype, None))
            outputs.append(onnx.ValueInfoProto(name=f"{i}/{layer.output}"))
        shared = [n for n in self.model.graph.node if id(n) in once]
        real = [v for v in self.model.graph.input if v.name in needed and v.name not in self._stored]
        used = {name for node in (*shared, *copies) for name in node.input}
        return self._model(
            [*shared, *copies], [*(v for v in real if v.name in used), *sources], outputs, needed
        )

    def _model(
        self, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], used: set[str]
    ) -> Any:
        import onnx

        stored = [t for n, t in self._stored.items() if n in used]
        graph = onnx.helper.make_graph(nodes, "part", inputs, outputs, stored)
        return onnx.helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=self.model.functions,
        )


def _session(model: Any) -> Session:
    import onnx

    with tempfile.TemporaryDirectory(prefix="compress-points-") as folder:
        path = Path(folder) / "model.onnx"
        large = sum(len(t.raw_data) for t in model.graph.initializer) > _LARGEST
        onnx.save(model, path, save_as_external_data=large, location="model.data" if large else None)
        return Session(path, exact=True)


def _stem(name: str) -> str:
    """The module a stored tensor belongs to: ``q.weight.codes`` -> ``q``."""
    name = _FOREIGN.sub("", _PART.sub("", name))
    return re.sub(r"\.(weight|bias)$", "", name)


def _random(node: Any) -> bool:
    return node.op_type.startswith(("Random", "Multinomial", "Bernoulli"))


def _float8() -> int:
    import onnx

    return int(onnx.TensorProto.FLOAT8E4M3FN)


def _is_float8(stored: Any) -> bool:
    return stored is not None and bool(stored.data_type == _float8())


def _is_float(stored: Any) -> bool:
    import onnx

    kinds = onnx.TensorProto
    return stored.data_type in (kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _tensor(stored: Any) -> Tensor:
    import onnx

    return torch.from_numpy(onnx.numpy_helper.to_array(stored).astype(np.float32))


def _spec(value: Any) -> InputSpec:
    import onnx

    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape, dynamic = [], []
    for axis, dim in enumerate(kind.shape.dim):
        shape.append(dim.dim_value or (1 if axis == 0 else _SIZE))
        if not dim.dim_value:
            word = re.sub(r"[^\w+]", "_", dim.dim_param.replace(" ", "")) or f"{value.name}_{axis}"
            dynamic.append((axis, BATCH if axis == 0 else word))
    return InputSpec(value.name, torch.from_numpy(np.empty(0, dtype)).dtype, tuple(shape), tuple(dynamic))
