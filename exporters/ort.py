"""ONNX Runtime sessions as this project uses them: CPU, a fixed number of threads, quiet."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import MissingExtra, VerificationError

if TYPE_CHECKING:
    import onnxruntime


def runtime() -> Any:
    """The onnxruntime package.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "onnx", "to write and verify ONNX files") from None
    return onnxruntime


class Session:
    """A loaded file, called with flat torch tensors in the order of its inputs.

    Args:
        path: the ONNX file.
        threads: intra-op threads.
        exact: run operator by operator in float32, nothing fused: what the file *says*, as opposed
            to what the runtime makes of it.
        keep_optimized: where to write the graph as the runtime runs it.
    """

    def __init__(
        self, path: Path, *, threads: int = 1, exact: bool = False, keep_optimized: Path | None = None
    ) -> None:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if exact:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
        if keep_optimized is not None:
            options.optimized_model_filepath = str(keep_optimized)
        try:
            self.session: onnxruntime.InferenceSession = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a family of its own that shares no base class
            missing = "NOT_IMPLEMENTED" in str(error)
            fix = "where the type is the reason (float64, float16), convert the module with .float()"
            raise VerificationError(
                f"ONNX Runtime cannot load the written file: {error}", fix=fix if missing else ""
            ) from error
        self.stands_in = ""
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    @property
    def environment(self) -> dict[str, str]:
        """What the results depend on, for reports."""
        version = runtime().__version__
        return {"runtime": f"ONNX Runtime {version}", "onnxruntime": version}

    def call(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """One call on these inputs, for timing."""
        feed = self.feed(inputs)
        return lambda: self.session.run(None, feed)

    def feed(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
        return {n: t.detach().contiguous().numpy() for n, t in zip(self.inputs, inputs, strict=True)}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Outputs in the file's order."""
        try:
            results = self.session.run(None, self.feed(inputs))
        except Exception as error:
            shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(self.inputs, inputs, strict=True))
            raise VerificationError(f"ONNX Runtime fails on {shapes}: {error}") from error
        return [torch.from_numpy(np.asarray(r)) for r in results]


def decoded_on_every_call(path: Path, nodes: dict[str, str]) -> list[str]:
    """Weights whose standard operator is still there after the runtime has optimised the graph.

    An operator of the runtime's own domain may carry the name on: that is the fused one.


    Args:
        path: the ONNX file.
        nodes: name of the decoding node -> name of the weight.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="compress-ort-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        Session(path, keep_optimized=optimized)
        left = onnx.load(optimized, load_external_data=False).graph.node
        return sorted({nodes[n.name] for n in left if n.name in nodes and not n.domain})
