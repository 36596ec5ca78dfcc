"""Graph -> one safetensors file for PyTorch (`compress.package`), opened by `compress.load`.

The file holds the graph as it is, weights encoded. That reading it gives back the same operators and the same
bits is proven first. Which operator runs a packed weight is decided when the file is loaded
(`compress.kernels.fuse`), so the loaded module is proven against the graph as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress.activations import QUANTIZERS
from compress.artifact import Artifact
from compress.errors import ExportError, OutputError, VerificationError
from compress.exporters.proof import compare
from compress.graph import Graph
from compress.kernels.fuse import Decode, fuse
from compress.kernels.products import BY_NAME, HALF
from compress.kernels.runtime import CompressedModule
from compress.package import add_metadata, program, read_metadata, read_package, unwritable, write_package
from compress.pipeline import Pass, example_inputs, shapes_to_try
from compress.progress import Progress, Silent
from compress.publish import check_writable, publish, temporary

_LIMIT_DB = 50.0
_HALF_DB = 25.0
"""Where numbers have 8 to 11 bits, or activations are rounded, the order of two roundings shows."""

_PICKLED = (".pt", ".pth", ".pt2", ".bin", ".ckpt")


class TorchExporter:
    """Writes files for PyTorch, with the kernels of this package: on a GPU 4-bit weights stay packed."""

    target: ClassVar[str] = "torch"
    suffix: ClassVar[str] = ".safetensors"

    def check(self, path: Path) -> None:
        """See `compress.exporters.exporter.Exporter.check`."""
        if path.suffix in _PICKLED:
            raise OutputError(
                f"{path}: files of this name are loaded by running code in them, and this one is not",
                expected="a name that ends in .safetensors",
                fix=f"-o {path.with_suffix(self.suffix)}",
            )
        check_writable(path)

    def unsuitable(self, passes: Sequence[Pass]) -> list[str]:
        """See `compress.exporters.exporter.Exporter.unsuitable`: it takes what any pass leaves."""
        return []

    def unsupported(self, graph: Graph) -> list[str]:
        """Reasons why this graph cannot be written; empty if none is known."""
        return unwritable(graph)

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        samples: Sequence[Sequence[Tensor]] = (),
        metadata: Mapping[str, Any] | None = None,
        results: Callable[[Artifact], Mapping[str, Any]] | None = None,
        decode: Literal["run", "load"] = "run",
        progress: Progress | None = None,
    ) -> Artifact:
        """Write, prove, rename; see `compress.exporters.exporter.Exporter.export`."""
        path = Path(path)
        self.check(path)
        reasons = self.unsupported(graph)
        if reasons:
            raise ExportError("; ".join(reasons))
        with temporary(path) as folder:
            written = folder / path.name
            write_package(graph, written, {**(metadata or {}), "decode": decode})
            trials = [example_inputs(graph, sizes, seed=1) for sizes in shapes_to_try(graph)]
            worst = _prove(written, graph, [*trials, *samples], progress or Silent())
            forms = fuse(graph, decode)[1]
            artifact = Artifact(written, self.target, graph, written.stat().st_size, forms, worst)
            if results is not None:
                add_metadata(written, {"results": results(artifact)})
            publish([written], path)
        return replace(artifact, path=path, nbytes=path.stat().st_size)

    def open(self, path: Path, *, threads: int = 1) -> RunningModule:
        """See `compress.exporters.exporter.Exporter.open`: on the GPU, if there is one."""
        return RunningModule(path, "cuda" if torch.cuda.is_available() else "cpu", threads=threads)

    def nearest(self, graph: Graph, sizes: dict[str, int]) -> dict[str, int]:
        """See `compress.exporters.exporter.Exporter.nearest`: it takes all sizes."""
        return sizes

    def write_float(self, graph: Graph, path: Path) -> None:
        """See `compress.exporters.exporter.Exporter.write_float`."""
        write_package(graph, path)

    def decoded_on_every_call(self, artifact: Artifact) -> list[str]:
        """See `compress.exporters.exporter.Exporter.decoded_on_every_call`; only GPUs have a kernel."""
        products = {
            form.weight: BY_NAME[name]
            for form in artifact.lowered
            for name in form.loads_as.split(" and ")
            if name in BY_NAME
        }
        there, encodings = torch.cuda.is_available(), artifact.graph.encodings
        return sorted(
            name
            for name, product in products.items()
            if not (there and encodings[name].dtype in product.dtypes)
        )


class RunningModule:
    """A loaded file, called with flat tensors.

    Args:
        path: the file.
        device: where it runs; inputs are taken there, outputs brought back.
        threads: of PyTorch while it is called.
    """

    def __init__(self, path: Path, device: str = "cpu", *, threads: int = 1) -> None:
        graph = read_package(path)
        decode: Decode = read_metadata(path).get("decode", "run")
        self.graph, self.device, self.threads = graph, device, threads
        self.stands_in = ""
        self.module = fuse(graph, decode)[0].flat_module(CompressedModule).to(device)

    @property
    def environment(self) -> dict[str, str]:
        """What the results depend on, for reports."""
        where = f" on {torch.cuda.get_device_name()}" if self.device == "cuda" else ""
        return {"runtime": f"PyTorch {torch.__version__}{where}", "torch": torch.__version__}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs that have a name, on the CPU."""
        with torch.inference_mode():
            outputs = self.module(*(t.to(self.device) for t in inputs))
        return [t.cpu() for t in self.graph.named(outputs)]

    def call(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """One call on these inputs, for timing: it returns when the outputs are there."""
        there = [t.to(self.device) for t in inputs]

        def once() -> None:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            with torch.inference_mode():
                self.module(*there)
            if self.device == "cuda":
                torch.cuda.synchronize()
            torch.set_num_threads(before)

        return once


def _prove(path: Path, graph: Graph, trials: Sequence[Sequence[Tensor]], progress: Progress) -> float:
    """Worst SQNR in dB of the loaded module against the graph, on the CPU, at all trials.

    Raises:
        VerificationError: the file holds another graph, or the module computes something else.
    """
    again = read_package(path)
    same = program(again) == program(graph) and again.tensors.keys() == graph.tensors.keys()
    if not same or not all(_equal(again.tensors[name], tensor) for name, tensor in graph.tensors.items()):
        raise VerificationError(
            "what is read from the written file is another graph", expected="the same operators and bits"
        )
    running = RunningModule(path)
    rounded = any(tensor.dtype in HALF for tensor in graph.tensors.values())
    rounded = rounded or any(node.target in QUANTIZERS for node in graph.ops.nodes)
    names = [name for name in graph.output_names if name is not None]
    worst = float("inf")
    progress.start("proof", len(trials))
    for inputs in trials:
        shapes = ", ".join(str(list(t.shape)) for t in inputs)
        progress.step(shapes)
        wanted = graph.named(graph.run(inputs))
        found = dict(zip(names, running(*inputs), strict=True))
        worst = min(worst, compare(found, wanted, _HALF_DB if rounded else _LIMIT_DB, shapes))
    progress.finish()
    return worst


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    bits = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)
