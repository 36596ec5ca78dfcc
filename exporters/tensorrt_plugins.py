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
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import ExportError, MissingExtra
from compress.exporters.tensorrt_engine import builds_for_others

if TYPE_CHECKING:
    from compress.kernels.ptx import Launch

NAMESPACE = "compress"
"""Of the plugins, and of their ONNX nodes."""

INPUTS = {
    "w4_matmul": ("x", "codes", "scales", "zero_points"),
    "w4_sparse24_matmul": ("x", "codes", "metadata", "scales", "zero_points"),
}
"""Plugin -> names of its inputs, in the order of the kernel's arguments. All but x are constants. Each has
one attribute, `gpu`: the compute capability its codes are ordered for, such as 90."""

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
    name: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], gpu: int
) -> list[Launch]:
    """Every kernel there is for these inputs; a tactic is its place in this list, counted from 1.

    Args:
        name: of the plugin.
        shapes: of its inputs; sizes of x but the last may be -1.
        dtypes: of x and of the scales.
        gpu: compute capability.
    """
    kernels = importlib.import_module(f"compress.kernels.{name}.plugin")
    found: list[Launch] = kernels.launches(shapes, *dtypes, gpu)
    return found


@functools.cache
def register() -> None:
    """Make the plugins known to TensorRT, once per process, before a file with their nodes is read."""
    plugin = importlib.import_module("tensorrt.plugin")
    for name in INPUTS:
        _register(plugin, name)


def _register(trtp: Any, name: str) -> None:
    inputs = INPUTS[name]
    scales = inputs.index("scales")

    def choices(descs: Sequence[Any], gpu: int) -> list[Launch]:
        shapes = [tuple(d.shape) for d in descs]
        return launches(name, shapes, [_DTYPES[descs[i].dtype.name] for i in (0, scales)], gpu)

    def describe(*descs: Any, gpu: int) -> Any:
        y = descs[0].like()
        y.shape_expr[y.ndim - 1] = descs[scales].shape_expr[1]
        return y

    def tune(*arguments: Any) -> list[Any]:
        *descs, gpu, outputs = arguments
        fitting = [i for i, launch in enumerate(choices(descs, gpu), 1) if launch.fits]
        if not fitting:
            raise ExportError(f"no kernel of {name} fits sm{gpu}")
        types = ", ".join(d.dtype.name for d in (*descs, *outputs))
        return [trtp.AutoTuneCombination(types, "LINEAR", fitting)]

    def compiled(*arguments: Any) -> tuple[str, str, Any, Any]:
        *descs, gpu, _, tactic = arguments
        launch = choices(descs, gpu)[tactic - 1]
        m = math.prod(descs[0].shape_expr[1 : descs[0].ndim - 1], start=descs[0].shape_expr[0])
        return (launch.ptx.name, launch.ptx.text, *_launch(trtp, launch, m))

    plugin_id = f"{NAMESPACE}::{name}"
    trtp.register(plugin_id)(_signed(describe, trtp, inputs, (), trtp.TensorDesc))
    trtp.autotune(plugin_id)(_signed(tune, trtp, inputs, ("outputs",), list[trtp.AutoTuneCombination]))
    returns = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.aot_impl(plugin_id)(_signed(compiled, trtp, inputs, ("outputs", "tactic"), returns))


def _launch(trtp: Any, launch: Launch, m: Any) -> tuple[Any, Any]:
    """Grid, block and shared memory, and the whole numbers; `m` is an expression for the rows of x."""
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = launch.blocks
    parameters.grid_y = trtp.cdiv(m, launch.rows)
    parameters.block_x = launch.ptx.threads
    parameters.shared_mem = launch.ptx.shared
    numbers = [trtp.SymInt32(n) for n in (m, *launch.scalars)]
    return parameters, trtp.SymIntExprs.from_tuple(numbers)


def _signed(function: Any, trtp: Any, inputs: Sequence[str], more: Sequence[str], returns: Any) -> Any:
    """The function with the signature that TensorRT reads: tensors, the attribute, and what it passes on."""
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    annotations = {**dict.fromkeys(inputs, trtp.TensorDesc), "gpu": int, **dict.fromkeys(more, empty)}
    listed = [inspect.Parameter(name, kind, annotation=a) for name, a in annotations.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)
    return function
