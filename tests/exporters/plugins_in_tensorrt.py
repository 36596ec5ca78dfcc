"""Our plugins in TensorRT's own Python code, as far as it goes without TensorRT's libraries.

Not collected: `test_tensorrt_plugins.py` runs it in a process of its own, for it loads the compiled module of
TensorRT's package with libraries in place that hold nothing. Here stands what the builder does with a plugin,
call by call; grids and sizes are evaluated where the builder would. Prints, as JSON, what would be launched.
"""

from __future__ import annotations

import importlib
import json
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorrt_bindings as trt

from compress.exporters import tensorrt_plugins
from compress.kernels.vq_logits import plugin as vq
from compress.kernels.w4_matmul import plugin as w4
from compress.kernels.w4_sparse24_matmul import plugin as w4_sparse24


class Expression:
    """A size: a number, or one that is known when the engine runs."""

    def __init__(self, value: Callable[[dict[str, int]], int], constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value({})


class Argument:
    """A whole number that a kernel gets, or a size of its grid: an expression and its type."""


class Registry:
    """Where TensorRT keeps what makes plugins."""

    def __init__(self) -> None:
        self.creators: dict[str, Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert namespace == "compress"
        self.creators[creator.name] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name]


REGISTRY = Registry()
# objects of these come from the libraries
trt.IDimensionExpr, trt.ISymExpr, trt.DimsExprs = Expression, Argument, lambda length: [None] * length
trt.get_plugin_registry = lambda: REGISTRY
sys.modules["tensorrt"] = trt
sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")

OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: operator.add,
    trt.DimensionOperation.PROD: operator.mul,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}
AT = {"batch": 3, "seq": 7}
"""The dynamic sizes when the engine runs."""


class Expressions:
    """What TensorRT gives a plugin to write expressions with."""

    def constant(self, value: int) -> Expression:
        return Expression(lambda sizes: value, True)

    def operation(self, kind: Any, a: Expression, b: Expression) -> Expression:
        apply = OPERATIONS[kind]
        return Expression(lambda sizes: apply(a.value(sizes), b.value(sizes)), a.constant and b.constant)


class Numbers(dict[int, Any]):
    """The whole numbers of a kernel, by place."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name


class Parameters:
    """Grid, block and shared memory of a kernel."""


def described(shape: tuple[int, ...], kind: Any) -> Any:
    found, desc = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
    desc.dims, desc.type, desc.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
    found.desc = desc
    return found


def sizes_of(shape: tuple[int, ...]) -> list[Expression]:
    names = iter(AT)

    def size(n: int) -> Expression:
        name = next(names) if n < 0 else ""
        return Expression(lambda sizes: sizes[name] if name else n, n >= 0)

    return [size(n) for n in shape]


def build(
    name: str, gpu: int, shapes: list[tuple[int, ...]], kinds: list[Any], **lists: list[int]
) -> dict[str, Any]:
    """What TensorRT does with one node; `lists` are attributes besides `gpu`."""
    attributes = {"gpu": [gpu], **lists}
    fields = trt.PluginFieldCollection(
        [trt.PluginField(n, np.array(v), trt.PluginFieldType.INT64) for n, v in attributes.items()]
    )
    creator, aot = REGISTRY.creators[name], trt.QuickPluginCreationRequest.STRICT_AOT
    assert [field.name for field in creator.field_names] == list(attributes)
    made = creator.create_plugin(name, "compress", fields, trt.TensorRTPhase.BUILD, aot)
    assert made.get_num_outputs() == 1
    assert made.get_output_data_types(kinds, [len(shape) for shape in shapes]) == [kinds[0]]
    (sizes,) = made.get_output_shapes([sizes_of(shape) for shape in shapes], [], Expressions())
    y = [size.value(AT) for size in sizes]
    in_out = [described(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    rows = shapes[0][1:] if name == "vq_logits" else shapes[0][:-1]
    in_out.append(described((*rows, y[-1]), kinds[0]))
    combinations = made.get_supported_format_combinations(in_out, len(shapes))
    assert [c.type for c in combinations] == [*kinds, kinds[0]]
    assert all(c.format == trt.TensorFormat.LINEAR for c in combinations)
    made.configure_plugin(in_out[:-1], in_out[-1:])
    launches = []
    for tactic in sorted(made.get_valid_tactics()):
        made.set_tactic(tactic)
        parameters, numbers = Parameters(), Numbers()
        given = [sizes_of(shape) for shape in shapes]
        made.get_launch_params(given, in_out, len(shapes), parameters, numbers, Expressions())
        assert list(numbers) == list(range(numbers.nbSymExprs))
        assert all(n.dtype == trt.PluginArgDataType.INT32 for n in numbers.values())
        descs = [d.desc for d in in_out]
        entry, program = made.get_kernel(descs[:-1], descs[-1:])
        grid = {key: value.expr.value(AT) for key, value in vars(parameters).items()}
        passed = [n.expr.value(AT) for n in numbers.values()]
        launches.append(
            {"tactic": tactic, "entry": entry, "program": program.decode(), "numbers": passed, **grid}
        )
    return {"y": y, "launches": launches}


def main() -> None:
    tensorrt_plugins.register()
    tensorrt_plugins.register()  # once is enough
    w4.CONFIGS, w4_sparse24.CONFIGS = w4.CONFIGS[:1], w4_sparse24.CONFIGS[:1]
    vq.CONFIGS = vq.CONFIGS[2:3]
    half, whole = trt.float16, trt.int32
    shapes = [(-1, -1, 4096), (256, 64, 32, 4), (16, 4080, 2), (16, 4080)]
    found = {"w4_matmul": build("w4_matmul", 90, shapes, [half, whole, half, whole])}
    found["w4_matmul, vector"] = build("w4_matmul", 90, [(4096,), *shapes[1:]], [half, whole, half, whole])
    shapes = [(-1, 4096), (256, 32, 32, 4), (256, 32, 32, 2), (32, 4080, 4), (32, 4080)]
    kinds = [half, whole, whole, half, whole]
    found["w4_sparse24_matmul"] = build("w4_sparse24_matmul", 80, shapes, kinds)
    shapes = [(1032, -1, -1), (100514,), (50257,)]
    found["vq_logits"] = build("vq_logits", 120, shapes, [half, whole, half], sizes=[264, 256, 256, 256])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
