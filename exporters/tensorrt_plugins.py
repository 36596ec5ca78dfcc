"""Our Triton kernels as plugins of TensorRT, compiled when the engine is built.

The package `tensorrt` (not TensorRT-RTX) has Quickly Deployable Plugins: three Python functions, called while
an engine is built, say which shape comes out, which kernels there are to choose from, and what each of them
is: PTX, a grid, and whole numbers, all of which may depend on dynamic sizes. TensorRT times the kernels and
puts the fastest into the engine (NVIDIA, "TensorRT Python API", `tensorrt.plugin`). A kernel gets the inputs
of its node, then the numbers, then the outputs.

The functions pass the checks of TensorRT's own Python code. Engines with these plugins have never been built:
that takes TensorRT's libraries and a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import ExportError, MissingExtra
from compress.exporters.tensorrt_engine import builds_for_others

if TYPE_CHECKING:
    from compress.kernels.ptx import Launch

NAMESPACE = "compress"
"""Of the plugins, and of their ONNX nodes."""


@dataclass(frozen=True)
class Plugin:
    """What TensorRT is told of a kernel.

    Attributes:
        inputs: names, in the order of the kernel's arguments. All but the first are constants.
        rows: axes of the first input that y has as well, in front of its last.
        columns: the constant, by name, and its axis, that is as long as the last axis of y. The kernel is
            compiled for its type, and for that of the first input.
        attributes: lists of whole numbers in the node. All have `gpu` before them, the compute capability the
            codes are ordered for, such as 90. Others that a node has TensorRT does not read.
    """

    inputs: tuple[str, ...]
    rows: slice
    columns: tuple[str, int]
    attributes: tuple[str, ...] = ()


PLUGINS = {
    "w4_matmul": Plugin(("x", "codes", "scales", "zero_points"), slice(0, -1), ("scales", 1)),
    "w4_sparse24_matmul": Plugin(
        ("x", "codes", "metadata", "scales", "zero_points"), slice(0, -1), ("scales", 1)
    ),
    "vq_logits": Plugin(("products", "codes", "token_bias"), slice(1, None), ("token_bias", 0), ("sizes",)),
}
"""By the name of the operator in PyTorch."""

_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


def plugins_for() -> int | None:
    """The compute capability that plugins would be compiled for, as 90 for 9.0; None where there can be none:
    with TensorRT-RTX, without Triton, or without a GPU of sm80 or later."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    try:
        if builds_for_others():
            return None
        importlib.import_module("tensorrt.plugin")
    except (ImportError, MissingExtra):
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor if major >= 8 else None


def sparse_works() -> bool:
    """Whether this GPU's sparse tensor cores do what their documentation says; see the operator."""
    from compress.kernels.w4_sparse24_matmul.op import instruction_is_right

    return instruction_is_right(torch.cuda.current_device(), torch.float16)


def launches(
    name: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], gpu: int, *more: Sequence[int]
) -> list[Launch]:
    """Every kernel there is for these inputs; a tactic is its place in this list, counted from 1.

    Args:
        name: of the plugin.
        shapes: of its inputs; rows of the first may be -1.
        dtypes: of the first input, and of the constant that is named in `Plugin.columns`.
        gpu: compute capability.
        more: `Plugin.attributes`.
    """
    kernels = importlib.import_module(f"compress.kernels.{name}.plugin")
    found: list[Launch] = kernels.launches(shapes, *dtypes, gpu, *more)
    return found


@functools.cache
def register() -> None:
    """Make the plugins known to TensorRT, once per process, before a file with their nodes is read."""
    plugin = importlib.import_module("tensorrt.plugin")
    for name, told in PLUGINS.items():
        _register(plugin, name, told)


def _register(trtp: Any, name: str, plugin: Plugin) -> None:
    constant, axis = plugin.inputs.index(plugin.columns[0]), plugin.columns[1]
    count, attributes = len(plugin.inputs), 1 + len(plugin.attributes)

    def rows_of(descs: Sequence[Any]) -> list[Any]:
        return [descs[0].shape_expr[i] for i in range(descs[0].ndim)[plugin.rows]]

    def choices(descs: Sequence[Any], gpu: int, *more: Any) -> list[Launch]:
        shapes = [tuple(d.shape) for d in descs]
        dtypes = [_DTYPES[descs[i].dtype.name] for i in (0, constant)]
        return launches(name, shapes, dtypes, gpu, *(tuple(map(int, numbers)) for numbers in more))

    def describe(*descs: Any, **_: Any) -> Any:
        y = descs[0].like()
        for i, size in enumerate([*rows_of(descs), descs[constant].shape_expr[axis]]):
            y.shape_expr[i] = size
        return y

    def tune(*arguments: Any) -> list[Any]:
        descs, numbers = arguments[:count], arguments[count : count + attributes]
        (outputs,) = arguments[count + attributes :]
        fitting = [i for i, launch in enumerate(choices(descs, *numbers), 1) if launch.fits]
        if not fitting:
            raise ExportError(f"no kernel of {name} fits sm{numbers[0]}")
        types = ", ".join(d.dtype.name for d in (*descs, *outputs))
        return [trtp.AutoTuneCombination(types, "LINEAR", fitting)]

    def compiled(*arguments: Any) -> tuple[str, str, Any, Any]:
        descs, numbers = arguments[:count], arguments[count : count + attributes]
        _, tactic = arguments[count + attributes :]
        launch = choices(descs, *numbers)[tactic - 1]
        m = functools.reduce(operator.mul, rows_of(descs), trtp.ShapeExpr(1))
        return (launch.ptx.name, launch.ptx.text, *_launch(trtp, launch, m))

    plugin_id = f"{NAMESPACE}::{name}"
    trtp.register(plugin_id)(_signed(describe, trtp, plugin, (), trtp.TensorDesc))
    trtp.autotune(plugin_id)(_signed(tune, trtp, plugin, ("outputs",), list[trtp.AutoTuneCombination]))
    returns = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.aot_impl(plugin_id)(_signed(compiled, trtp, plugin, ("outputs", "tactic"), returns))


def _launch(trtp: Any, launch: Launch, m: Any) -> tuple[Any, Any]:
    """Grid, block and shared memory, and the whole numbers; `m` is an expression for the rows of y."""
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = launch.blocks
    parameters.grid_y = trtp.cdiv(m, launch.rows)
    parameters.block_x = launch.ptx.threads
    parameters.shared_mem = launch.ptx.shared
    numbers = [trtp.SymInt32(n) for n in (m, *launch.scalars)]
    return parameters, trtp.SymIntExprs.from_tuple(numbers)


def _signed(function: Any, trtp: Any, plugin: Plugin, more: Sequence[str], returns: Any) -> Any:
    """The function with the signature that TensorRT reads: tensors, the attributes, and what it passes on."""
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    annotations = {**dict.fromkeys(plugin.inputs, trtp.TensorDesc), "gpu": int}
    annotations |= dict.fromkeys(plugin.attributes, NDArray[np.int64]) | dict.fromkeys(more, empty)
    listed = [inspect.Parameter(name, kind, annotation=a) for name, a in annotations.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)
    return function
