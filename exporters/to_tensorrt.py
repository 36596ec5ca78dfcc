"""Graph -> TensorRT engine, built without a GPU, and the ONNX file it was built from beside it.

The graph becomes ONNX of standard operators (`compress.exporters.tensorrt_weights`), whose float32 form is
proven against the graph as tightly as any ONNX file; then it is cast to float16
(`compress.exporters.onnx_half`) and proven again, and that very file is what TensorRT reads. The builder
lists the layers of the engine with the types of their weights, and there it is looked up whether integers
have stayed packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from compress.artifact import Artifact, BuiltLayer, Lowered
from compress.errors import ExportError, MissingExtra, OutputError, VerificationError
from compress.exporters.exporter import Running
from compress.exporters.onnx_half import to_float16
from compress.exporters.ort import runtime
from compress.exporters.proof import prove
from compress.exporters.tensorrt_engine import (
    Built,
    build,
    builds_for_others,
    own_gpu,
    packed_in,
    tensorrt,
    version,
    weight_bytes,
)
from compress.exporters.tensorrt_plugins import plugins_for, register, sparse_works
from compress.exporters.tensorrt_profiles import Profile, parse_sizes, profile_of
from compress.exporters.tensorrt_run import Engine, StandIn, source_of
from compress.exporters.tensorrt_support import parse_gpus, reasons_of_graph, reasons_of_passes, too_old
from compress.exporters.to_onnx import add_metadata, as_text, assemble, save
from compress.graph import Graph
from compress.pipeline import Pass, example_inputs, shapes_to_try
from compress.progress import Progress, Silent
from compress.publish import check_writable, publish, temporary

if TYPE_CHECKING:
    import onnx_ir as ir

Precision = Literal["float32", "float16"]

_PACKED = {"INT4": "Int4", "INT8": "Int8", "FLOAT8E4M3FN": "FP8"}
"""Type in the ONNX file -> in the list of layers."""


@dataclass(frozen=True)
class TensorRTExporter:
    """Writes TensorRT engines.

    Args:
        gpu: compute capabilities the engine is to run on, such as "sm89,sm120"; by default sm86, sm89 and
            sm120. The datacenter package builds for the GPU of this machine alone.
        precision: what is computed in where nothing is quantized; inputs and outputs keep their types.
        min, opt, max: sizes of dynamic dimensions, such as "batch=32,seq=512": the smallest the engine takes,
            those it is tuned for, the largest. See `compress.exporters.tensorrt_profiles.profile_of` for what
            is left out.
    """

    gpu: str = ""
    precision: Precision = "float16"
    min: str = ""
    opt: str = ""
    max: str = ""

    target: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".engine"

    def check(self, path: Path) -> None:
        """See `compress.exporters.exporter.Exporter.check`."""
        if self.precision not in ("float32", "float16"):
            raise ExportError(f"precision is {self.precision!r}", expected="float32 or float16")
        for name in ("min", "opt", "max"):
            parse_sizes(name, getattr(self, name))
        runtime()
        tensorrt()
        if not builds_for_others() and own_gpu() is None:
            raise ExportError(
                f"{version()} builds for the GPU of this machine alone, and there is none",
                fix="install TensorRT-RTX: pip install 'compress-models[tensorrt]'",
            )
        if self.gpu and not builds_for_others():
            raise ExportError(
                f"gpu is {self.gpu!r}, and {version()} builds for the GPU of this machine alone",
                fix="leave it out, or install TensorRT-RTX: pip install 'compress-models[tensorrt]'",
            )
        reasons = too_old([self.precision], self._gpus())
        if reasons:
            raise ExportError("; ".join(reasons))
        if path.suffix == ".onnx":
            raise OutputError(
                f"{path} is a name of an ONNX file", expected=f"-o {path.with_suffix(self.suffix)}"
            )
        check_writable(path)
        check_writable(source_of(path))

    def unsuitable(self, passes: Sequence[Pass]) -> list[str]:
        """See `compress.exporters.exporter.Exporter.unsuitable`."""
        return reasons_of_passes(passes, self._gpus(), plugins=self._plugins() is not None)

    def unsupported(self, graph: Graph) -> list[str]:
        """Reasons why this graph cannot be written; empty if none is known.

        Raises:
            InputSpecError: the given sizes do not fit its inputs.
        """
        self._profile(graph)
        return reasons_of_graph(graph, self._gpus(), plugins=self._plugins() is not None)

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
        """Write, prove, build, rename; see `compress.exporters.exporter.Exporter.export`."""
        path = Path(path)
        self.check(path)
        reasons = self.unsupported(graph)
        if decode == "load":
            reasons.append("an engine has no weights that are decoded when it is loaded: decode is run")
        if reasons:
            raise ExportError("; ".join(reasons))
        progress = progress or Silent()
        with temporary(path) as folder:
            source, engine = folder / source_of(path).name, folder / path.name
            trials = [example_inputs(graph, sizes, seed=1) for sizes in shapes_to_try(graph)]
            written, lowered, worst = self._write(
                graph, source, metadata or {}, [*trials, *samples], progress
            )
            built = self._build(graph, source, progress)
            engine.write_bytes(built.data)
            artifact = Artifact(
                engine, self.target, graph, len(built.data), tuple(_as_built(lowered, source, built.layers)),
                worst, self._built_for(graph, built), built.layers, asdict(self),
            )  # fmt: skip
            if results is not None:
                add_metadata(source, {"results": results(artifact)})
            publish([engine, *written], path)
        return replace(artifact, path=path)

    def open(self, path: Path, *, threads: int = 1) -> Running:
        """See `compress.exporters.exporter.Exporter.open`: on the GPU, if engines are built for it."""
        return Engine(path) if own_gpu() in self._gpus() else StandIn(path, threads=threads)

    def nearest(self, graph: Graph, sizes: dict[str, int]) -> dict[str, int]:
        """See `compress.exporters.exporter.Exporter.nearest`."""
        return self._profile(graph).nearest(sizes)

    def write_float(self, graph: Graph, path: Path) -> None:
        """See `compress.exporters.exporter.Exporter.write_float`."""
        self._write(graph, source_of(path), {}, [], Silent())
        path.write_bytes(self._build(graph, source_of(path), Silent()).data)

    def decoded_on_every_call(self, artifact: Artifact) -> list[str]:
        """See `compress.exporters.exporter.Exporter.decoded_on_every_call`."""
        return sorted(form.weight for form in artifact.lowered if form.loads_as.endswith(_APART))

    def _gpus(self) -> tuple[int, ...]:
        """Those asked for; where the package builds for no others, the one in this machine."""
        own = None
        if not self.gpu:
            with suppress(MissingExtra):  # `check` tells of it
                own = None if builds_for_others() else own_gpu()
        return parse_gpus(self.gpu) if own is None else (own,)

    def _profile(self, graph: Graph) -> Profile:
        given = [parse_sizes(name, getattr(self, name)) for name in ("min", "opt", "max")]
        return profile_of(graph.inputs, *given)

    def _built_for(self, graph: Graph, built: Built) -> dict[str, str]:
        held = weight_bytes(built.layers)
        split = f"{held:,} of weights, {len(built.data) - held:,} of compiled kernels"
        return {
            "GPUs": ", ".join(f"sm{n}" for n in self._gpus()),
            "precision": self.precision,
            "sizes": str(self._profile(graph)) or "fixed",
            "builder": version(),
            "bytes": split if built.layers else f"{len(built.data):,}",
        }

    def _write(
        self,
        graph: Graph,
        path: Path,
        metadata: Mapping[str, Any],
        trials: Sequence[Sequence[Tensor]],
        progress: Progress,
    ) -> tuple[list[Path], list[Lowered], float]:
        """The ONNX file, proven: its files, the form of every weight, the worst SQNR in dB."""
        # not above: onnx_ir is not there where only the table of exporters is asked
        from compress.exporters.tensorrt_plugin_nodes import lower_plugins, runnable
        from compress.exporters.tensorrt_weights import lower_packed, only_packed

        packed, lowered, notes = only_packed(graph)
        gpu = self._plugins()

        def lower(model: ir.Model) -> list[Lowered]:
            found = [] if gpu is None else lower_plugins(model, packed, gpu, sparse=sparse_works())
            return found + lower_packed(model, packed, notes)

        model, forms = assemble(packed, lower, signed=True)
        model.metadata_props.update(as_text(metadata))
        written = save(model, path)
        half = self.precision == "float16"
        worst = math.inf
        if trials:
            worst = prove(runnable(path, path.parent), packed, forms, trials, progress=progress)
        if half:
            _cast(model)
            written = save(model, path)
        if half and trials:
            twin = runnable(path, path.parent)
            worst = prove(twin, packed, forms, trials, half=True, progress=progress)
        return written, lowered + forms, worst

    def _plugins(self) -> int | None:
        """The compute capability that plugins are compiled for, if there are any: they compute in 16 bits."""
        return plugins_for() if self.precision == "float16" else None

    def _build(self, graph: Graph, source: Path, progress: Progress) -> Built:
        profile = self._profile(graph)
        if self._plugins() is not None:
            register()
        return build(source, {str(s.name): profile.shapes(s) for s in graph.inputs}, self._gpus(), progress)


def _cast(model: ir.Model) -> None:
    import onnx_ir as ir

    to_float16(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.TopologicalSortPass()(model)


_APART = "decoded by a layer of its own"


def _as_built(lowered: Sequence[Lowered], source: Path, layers: Sequence[BuiltLayer]) -> list[Lowered]:
    """What the builder made of every weight.

    Raises:
        VerificationError: a weight did not stay packed.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    nodes = {n.name: n for n in model.graph.node}
    sizes = {t.name: math.prod(t.dims) for t in model.graph.initializer}
    found = []
    for form in lowered:
        kind = next((_PACKED[k] for k in _PACKED if k in form.form), None)
        if kind is None or not layers:
            found.append(form)
            continue
        decode = nodes[form.nodes[0]]
        count = sizes[decode.input[0]]
        held = packed_in(layers, decode.name, kind, count)
        if not held:
            raise VerificationError(
                f"TensorRT did not keep {form.weight} packed: no layer of the engine holds {count} {kind}",
                fix="leave this layer uncompressed (ignore:)",
            )
        # a layer without inputs makes nothing but the weight
        with_product = any(layer.inputs for layer in held)
        how = f"one layer with {_reader(model, decode.output[0])}" if with_product else _APART
        found.append(replace(form, loads_as=f"{kind}, {how}"))
    return found


def _reader(model: Any, value: str) -> str:
    """The operator that reads a weight, behind Transpose and Reshape."""
    for node in model.graph.node:
        if value in node.input:
            through = node.op_type in ("Transpose", "Reshape")
            return _reader(model, node.output[0]) if through else str(node.op_type)
    return "nothing"
