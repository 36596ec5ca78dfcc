"""Running an engine: on a GPU TensorRT itself, elsewhere the ONNX file it was built from, in ONNX Runtime.

The class `Engine` has never been run: it was written where there is no GPU that TensorRT-RTX supports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import VerificationError
from compress.exporters.onnx_half import in_float32
from compress.exporters.ort import Session
from compress.exporters.tensorrt_engine import tensorrt, version


def source_of(engine: Path) -> Path:
    """The ONNX file beside an engine that it was built from."""
    return engine.with_name(engine.name + ".onnx")


class StandIn(Session):
    """The ONNX file in place of its engine, operator by operator, for ONNX Runtime's own fusions round
    activations; float16 as `compress.exporters.onnx_half.in_float32` has it.

    Args:
        path: of the engine.
        threads: of ONNX Runtime.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        # not above: onnx_ir is not there where only the table of exporters is asked
        from compress.exporters.tensorrt_plugin_nodes import runnable

        with tempfile.TemporaryDirectory(prefix="compress-trt-") as folder:
            source = in_float32(runnable(source_of(path), Path(folder)), Path(folder))
            super().__init__(source, threads=threads, exact=True)
        self.stands_in = (
            "The engine was not run, for there is no GPU for it here: figures of fidelity are those of the "
            "ONNX file it was built from, in ONNX Runtime, and there are no timings"
        )


class Engine:
    """A loaded engine, called with flat tensors; outputs come back to the CPU.

    Args:
        path: of the engine.

    Raises:
        VerificationError: TensorRT cannot load it on this GPU.
    """

    stands_in = ""

    def __init__(self, path: Path) -> None:
        trt = tensorrt()
        self.trt = trt
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise VerificationError(
                f"TensorRT cannot load {path.name} on {torch.cuda.get_device_name()}",
                fix="build it for this GPU (--gpu), with the version of TensorRT that loads it",
            )
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = [self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names]
        self.inputs = [n for n, given in zip(names, is_input, strict=True) if given]
        self.outputs = [n for n, given in zip(names, is_input, strict=True) if not given]

    @property
    def environment(self) -> dict[str, str]:
        """What the results depend on, for reports."""
        return {"runtime": f"{version()} on {torch.cuda.get_device_name()}", "tensorrt": version()}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Outputs in the engine's order."""
        return [t.cpu() for t in self._bound(inputs)()]

    def call(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """One call on these inputs, for timing: it returns when the outputs are there."""
        return self._bound(inputs)

    def _bound(self, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        there = [t.contiguous().cuda() for t in inputs]
        for name, tensor in zip(self.inputs, there, strict=True):
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise VerificationError(
                    f"the engine does not take {name} of shape {list(tensor.shape)}",
                    fix="give it a larger profile: --max",
                )
        results = [self._empty(name) for name in self.outputs]
        stream = torch.cuda.Stream()

        def once() -> list[Tensor]:
            # another call may have been prepared in between
            for name, tensor in zip(self.inputs, there, strict=True):
                self.context.set_input_shape(name, tuple(tensor.shape))
            for name, tensor in zip(self.inputs + self.outputs, there + results, strict=True):
                self.context.set_tensor_address(name, tensor.data_ptr())
            if not self.context.execute_async_v3(stream.cuda_stream):
                raise VerificationError("TensorRT failed to run the engine")
            stream.synchronize()
            return results

        torch.cuda.synchronize()
        return once

    def _empty(self, name: str) -> Tensor:
        dtypes: dict[Any, torch.dtype] = {
            self.trt.float32: torch.float32, self.trt.float16: torch.float16, self.trt.int32: torch.int32,
            self.trt.int64: torch.int64, self.trt.bool: torch.bool,
        }  # fmt: skip
        shape = tuple(self.context.get_tensor_shape(name))
        return torch.empty(shape, dtype=dtypes[self.engine.get_tensor_dtype(name)], device="cuda")
