"""TensorRT itself: ONNX file -> engine, on a machine with or without a GPU, and what the builder says it
built.

Two packages share one interface. TensorRT-RTX (`tensorrt_rtx`) compiles ahead of time for GPUs that are not
here. The datacenter package (`tensorrt`) builds for the GPU of this machine alone; that way has never been
run.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.artifact import BuiltLayer
from compress.errors import ExportError, MissingExtra
from compress.exporters.tensorrt_profiles import Shape
from compress.exporters.tensorrt_progress import interruptible, monitor
from compress.progress import Progress, Silent

_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt")


@dataclass(frozen=True)
class Built:
    """An engine in memory, and its layers (empty where the builder does not list them)."""

    data: bytes
    layers: tuple[BuiltLayer, ...]


def tensorrt() -> Any:
    """The TensorRT package, whichever is installed.

    Raises:
        MissingExtra: none is.
    """
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtra("tensorrt_rtx", "tensorrt", "to build TensorRT engines")


def builds_for_others() -> bool:
    """Whether this package builds for GPUs that are not in this machine: TensorRT-RTX does."""
    return hasattr(tensorrt(), "ComputeCapability")


def own_gpu() -> int | None:
    """The compute capability of the GPU in this machine, as 89 for 8.9; None where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def version() -> str:
    """Name and version of the package, for reports."""
    name = "TensorRT-RTX" if builds_for_others() else "TensorRT"
    return f"{name} {tensorrt().__version__}"


def build(
    onnx: Path,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    gpus: Sequence[int],
    progress: Progress | None = None,
) -> Built:
    """Build an engine.

    Args:
        onnx: the file, its external data beside it.
        shapes: smallest, usual and largest shape of each input.
        gpus: compute capabilities the engine is to run on; of TensorRT-RTX only.
        progress: told about every step of the builder.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the builder has ended.
        ExportError: TensorRT cannot read the file, or build it.
        MissingExtra: TensorRT is not installed.
    """
    trt = tensorrt()
    log = _log(trt)
    builder = trt.Builder(log)
    # TensorRT 10 has to be asked for what later ones always do: types are those of the file
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{e.node_name()} ({e.node_operator()}): {_short(e.desc())}" for e in errors[:3])
        raise ExportError(f"TensorRT cannot read what it was given: {told}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if builds_for_others():
        config.num_compute_capabilities = len(gpus)
        for i, number in enumerate(gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), i)
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    config.add_optimization_profile(profile)
    with interruptible() as mark:
        watcher = monitor(trt, progress or Silent(), mark)
        config.progress_monitor = watcher
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        told = "; ".join(map(_short, log.errors[:2])) or "it gave no reason"
        raise ExportError(
            f"TensorRT cannot build an engine for {', '.join(f'sm{n}' for n in gpus)}: {told}",
            fix="leave the layer it names uncompressed (ignore:), or choose newer GPUs",
        )
    return Built(bytes(serialized), tuple(parse_layers(log.listing)))


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # of a package known when this runs
        """Keeps errors and the list of layers, prints nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.listing = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.lstrip().startswith("Layers:"):
                self.listing += message + "\n"

    return Log()


def _short(message: str) -> str:
    """The part of a message that is about the model, without the builder's source files."""
    message = re.sub(r"\s*In \w+ at /_src/\S*", "", message)
    return message.strip().replace("\n", " ")[:300]


# -- the list of layers ---------------------------------------------------------------------------

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
    r"\[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: ?(?P<metadata>.*)$"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[\d,-]*)\].*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def parse_layers(listing: str) -> list[BuiltLayer]:
    """The layers of the builder's message "Layers: ..." at detailed verbosity; what it cannot read is left
    out."""
    found = []
    for line in listing.splitlines():
        match = _LAYER.match(line.strip())
        if match is None:
            continue
        tensors = {part: _TENSOR.findall(match[part]) for part in ("inputs", "constants", "outputs")}
        constants = tuple(
            (kind, tuple(int(n) for n in shape.split(",") if n)) for shape, kind in tensors["constants"]
        )
        found.append(
            BuiltLayer(
                match["name"], match["kind"], tuple(dict.fromkeys(_NODE.findall(match["metadata"]))),
                tuple(kind for _, kind in tensors["inputs"]), tuple(kind for _, kind in tensors["outputs"]),
                constants,
            )
        )  # fmt: skip
    return found


def packed_in(layers: Sequence[BuiltLayer], node: str, kind: str, count: int) -> list[BuiltLayer]:
    """Layers that hold a weight packed: `count` integers of type `kind`, decoded by the ONNX node `node`."""
    return [
        layer
        for layer in layers
        if node in layer.nodes
        and any(found == kind and math.prod(shape) >= count for found, shape in layer.constants)
    ]


_BYTES = {
    "Float": 4.0, "Half": 2.0, "BFloat16": 2.0, "Int64": 8.0, "Int32": 4.0, "Int8": 1.0, "UInt8": 1.0,
    "Bool": 1.0, "FP8": 1.0, "Int4": 0.5, "FP4E2M1": 0.5,
}  # fmt: skip
"""Types in the list of layers -> bytes of an element."""


def weight_bytes(layers: Sequence[BuiltLayer]) -> int:
    """Bytes of all constants in an engine; what it has besides are compiled kernels and its plan.

    A network of 1,024 channels and the same one of 256 differ by just these bytes (to 100 of 4 million,
    measured for float16, int8, int4 and fp8), so they are what the weights take in the file.
    """
    return round(sum(_BYTES[kind] * math.prod(shape) for layer in layers for kind, shape in layer.constants))
