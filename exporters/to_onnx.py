"""Graph -> ONNX file, in the one standard form that ONNX Runtime and TensorRT both run fast.

`torch.onnx` translates the operators; encoded weights travel through it as empty placeholders and get
their integers afterwards (`compress.exporters.onnx_weights`), so the float weight never exists. Tied
weights stay one tensor. The file is written under a temporary name, run operator by operator at two
shapes, compared with the graph, and only then renamed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from compress.artifact import Artifact, Lowered
from compress.bitmap import BitmapWeight
from compress.codebook import CodebookWeight
from compress.cores import CoreWeight
from compress.encoding import EncodedWeight
from compress.errors import ExportError, MissingExtra
from compress.exporters.onnx_activations import translations
from compress.exporters.ort import Session, decoded_on_every_call, runtime
from compress.exporters.proof import mark_roundings, prove
from compress.float8 import Float8Weight
from compress.graph import Graph
from compress.pipeline import Pass, example_inputs, shapes_to_try
from compress.progress import Progress, quiet
from compress.publish import check_writable, publish, temporary

if TYPE_CHECKING:
    import onnx_ir as ir

Decode = Literal["run", "load"]

OPSET = 21
"""The first with block-wise DequantizeLinear and INT4."""

_EXTERNAL = 1 << 30
"""Weights past this many bytes go to `<name>.data`; protobuf itself ends at 2 GiB."""


class OnnxExporter:
    """Writes ONNX for ONNX Runtime (CPU) and other ONNX runtimes."""

    target: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"

    def check(self, path: Path) -> None:
        """See `compress.exporters.exporter.Exporter.check`."""
        runtime()
        _packages()
        check_writable(path)

    def unsuitable(self, passes: Sequence[Pass]) -> list[str]:
        """See `compress.exporters.exporter.Exporter.unsuitable`: it takes what any pass leaves."""
        return []

    def unsupported(self, graph: Graph) -> list[str]:
        """Reasons why this graph cannot be written; empty if none is known."""
        reasons = []
        for dtype in (torch.bfloat16, torch.complex64, torch.complex128):
            names = [n for n, t in graph.tensors.items() if t.dtype == dtype]
            names += [n for n, e in graph.encodings.items() if e.dtype == dtype]
            if names:
                reasons.append(
                    f"{len(names)} weights are {str(dtype).removeprefix('torch.')} (e.g. {names[0]}), for "
                    "which ONNX Runtime has no CPU kernels; convert the module with .float() first"
                )
        for name, encoded in graph.encodings.items():
            if not isinstance(
                encoded, EncodedWeight | CodebookWeight | BitmapWeight | CoreWeight | Float8Weight
            ):
                reasons.append(f"{name} is encoded as {encoded.encoding}, which has no ONNX form")
        if graph.submodules:
            reasons.append("the model holds sub-graphs (torch.cond or similar), which are not written yet")
        return reasons

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        samples: Sequence[Sequence[Tensor]] = (),
        metadata: Mapping[str, Any] | None = None,
        results: Callable[[Artifact], Mapping[str, Any]] | None = None,
        decode: Decode = "run",
        progress: Progress | None = None,
    ) -> Artifact:
        """Write, prove, rename; see `compress.exporters.exporter.Exporter.export`."""
        path = Path(path)
        self.check(path)
        reasons = self.unsupported(graph)
        if reasons:
            raise ExportError("; ".join(reasons))
        model, lowered = build_model(graph, decode)
        model.metadata_props.update(as_text(metadata or {}))
        with temporary(path) as folder:
            written = save(model, folder / path.name)
            trials = [example_inputs(graph, sizes, seed=1) for sizes in shapes_to_try(graph)]
            worst = prove(written[0], graph, lowered, [*trials, *samples], progress=progress)
            size = sum(f.stat().st_size for f in written)
            artifact = Artifact(written[0], self.target, graph, size, tuple(lowered), worst)
            if results is not None:
                add_metadata(written[0], {"results": results(artifact)})
            publish(written, path)
        size = sum((path.parent / f.name).stat().st_size for f in written)
        return replace(artifact, path=path, nbytes=size)

    def open(self, path: Path, *, threads: int = 1) -> Session:
        """See `compress.exporters.exporter.Exporter.open`."""
        return Session(path, threads=threads)

    def nearest(self, graph: Graph, sizes: dict[str, int]) -> dict[str, int]:
        """See `compress.exporters.exporter.Exporter.nearest`: it takes all sizes."""
        return sizes

    def write_float(self, graph: Graph, path: Path) -> None:
        """See `compress.exporters.exporter.Exporter.write_float`."""
        save(build_model(graph, faster=False)[0], path)

    def decoded_on_every_call(self, artifact: Artifact) -> list[str]:
        """See `compress.exporters.exporter.Exporter.decoded_on_every_call`."""
        decoders = {node: form.weight for form in artifact.lowered for node in form.nodes}
        return decoded_on_every_call(artifact.path, decoders) if decoders else []


def build_model(
    graph: Graph, decode: Decode = "run", *, faster: bool = True
) -> tuple[ir.Model, list[Lowered]]:
    """The ONNX model in memory, and the form every encoded weight took.

    Args:
        graph: what to translate.
        decode: "run" leaves large linear weights packed in memory and the runtime decodes them as it
            multiplies; "load" lets it decode them once, into float weights, at float speed.
        faster: take `compress.exporters.onnx_forms`; False for what `torch.onnx` makes of it.

    Raises:
        ExportError: an operator has no ONNX form.
        MissingExtra: the packages that write ONNX are not installed.
    """
    _packages()
    from compress.exporters.onnx_bitmap import lower_bitmaps
    from compress.exporters.onnx_codebook import lower_codebooks
    from compress.exporters.onnx_cores import lower_cores
    from compress.exporters.onnx_float8 import lower_float8
    from compress.exporters.onnx_forms import faster_forms
    from compress.exporters.onnx_weights import FOLD_BELOW, lower_weights

    def lower(model: ir.Model) -> list[Lowered]:
        fold_below = math.inf if decode == "load" else FOLD_BELOW
        encoded = graph.encodings.items()
        integers = {name: weight for name, weight in encoded if isinstance(weight, EncodedWeight)}
        codebooks = {name: weight for name, weight in encoded if isinstance(weight, CodebookWeight)}
        bitmaps = {name: weight for name, weight in encoded if isinstance(weight, BitmapWeight)}
        cores = {name: weight for name, weight in encoded if isinstance(weight, CoreWeight)}
        lowered = lower_weights(model, integers, fold_below=fold_below) + lower_cores(model, cores)
        float8 = {name: weight for name, weight in encoded if isinstance(weight, Float8Weight)}
        lowered += lower_codebooks(model, codebooks) + lower_bitmaps(model, bitmaps)
        lowered += lower_float8(model, float8)
        if faster:
            faster_forms(model)
        return lowered

    return assemble(graph, lower)


@quiet()
def assemble(
    graph: Graph, lower: Callable[[ir.Model], list[Lowered]], *, signed: bool = False
) -> tuple[ir.Model, list[Lowered]]:
    """An ONNX model in memory, for any target.

    Args:
        graph: what to translate.
        lower: gives encoded weights their form, in place: each is an input of the model by its name.
        signed: write codes of rounded activations as int8 instead of uint8; all must be symmetric.

    Returns:
        the model, and what `lower` says of the weights.

    Raises:
        ExportError: an operator has no ONNX form.
        MissingExtra: the packages that write ONNX are not installed.
    """
    _packages()
    import onnx_ir as ir

    program = _translate(graph, translations(signed=signed))
    model = program.model
    mark_roundings(model, graph)
    hidden = _hide(model, graph)
    program.optimize()
    model = program.model
    for value in [v for v in model.graph.inputs if v.name in hidden]:
        if value.name not in graph.encodings:
            model.graph.inputs.remove(value)
            value.const_value = hidden[str(value.name)]
            model.graph.register_initializer(value)
    lowered = lower(model)
    common = ir.passes.common
    for step in (
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    _name_dimensions(model, graph)
    model.producer_name, model.producer_version = "compress", _version()
    model.doc_string = None
    model.graph.name = "model"
    return model, lowered


def _translate(graph: Graph, table: Mapping[Any, Any]) -> Any:
    """`torch.onnx` on the graph with empty placeholders for encoded weights."""
    hollow = graph.copy()
    for name, encoded in graph.encodings.items():
        # one element, repeated by stride 0: shape and dtype without the memory
        empty = torch.zeros((), dtype=encoded.dtype).expand(encoded.shape)
        decode = hollow._weight_node(name)
        with hollow.ops.inserting_before(decode):
            plain = hollow.ops.get_attr(name)
        decode.replace_all_uses_with(plain)
        hollow.tensors[name] = empty
    _plain_outputs(hollow)
    hollow.prune_dead_code()
    module = hollow.flat_module()
    args = tuple(_two_or_more(graph))
    shapes = tuple({a: torch.export.Dim.DYNAMIC for a, _ in spec.dynamic} for spec in graph.inputs)
    try:
        with torch.no_grad():
            exported = torch.export.export(module, args, dynamic_shapes=shapes)
            return torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[str(s.name) for s in graph.inputs],
                output_names=[n for n in graph.output_names if n is not None],
                custom_translation_table=dict(table),
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot translate the model: {_first_cause(error)}",
            fix="replace the operator it names, or register a translation for it with torch.onnx",
        ) from error


def _plain_outputs(graph: Graph) -> None:
    """Only what was computed can be an output of a file: no constants, and of a weight a copy."""
    output = next(n for n in graph.ops.nodes if n.op == "output")
    values = [value for value in output.args[0] if isinstance(value, fx.Node)]
    with graph.ops.inserting_before(output):
        copies = [
            graph.ops.call_function(torch.ops.aten.clone.default, (v,)) if v.op == "get_attr" else v
            for v in values
        ]
    output.args = (tuple(copies),)


def _two_or_more(graph: Graph) -> list[Tensor]:
    """Example inputs whose dynamic axes are at least 2: `torch.export` takes a 1 for a constant."""
    return example_inputs(graph, shapes_to_try(graph)[0])


def _first_cause(error: BaseException) -> str:
    """The innermost message, one line: torch.onnx wraps the reason in advice."""
    found = re.search(r"No ONNX function found for (<[^>]*>|\S+)", str(error))
    while error.__cause__ is not None:
        error = error.__cause__
        found = found or re.search(r"No ONNX function found for (<[^>]*>|\S+)", str(error))
    if found:
        return f"operator {found[1]} has no ONNX form"
    line = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
    return f"{type(error).__name__}: {line}"


def _hide(model: ir.Model, graph: Graph) -> dict[str, Any]:
    """Make weights that constant folding must not touch into inputs; returns their values.

    Those are the placeholders, weights with several readers (folding the transpose in front of one
    reader would give the file a second copy), and indices stored in fewer bits than they are used in.
    """
    import onnx_ir as ir

    short = (ir.DataType.UINT8, ir.DataType.INT16)
    hidden = {}
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        widened = value.dtype in short and all(node.op_type == "Cast" for node, _ in value.uses())
        if name in graph.encodings or len(value.uses()) > 1 or widened:
            hidden[name] = value.const_value
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
    return hidden


def _name_dimensions(model: ir.Model, graph: Graph) -> None:
    """Give dynamic axes the names of the input specs instead of torch's s0, s1, ..."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    specs = {s.name: s for s in graph.inputs}
    for value in model.graph.inputs:
        spec = specs.get(value.name)
        if spec is None or value.shape is None:
            continue
        for axis, symbol in spec.dynamic:
            dim = value.shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                names[dim.value] = symbol
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values: list[Any] = [*model.graph.inputs, *model.graph.outputs]
    values += [o for node in model.graph for o in node.outputs]
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                value.shape[axis] = pattern.sub(lambda m: names[m[1]], dim.value)


# -- writing --------------------------------------------------------------------------------------


def _packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401 - torch.onnx needs it and says so less clearly
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "onnx", "to write ONNX files") from None


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write a model; large weights go to a second file beside it, `<name>.data`."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > _EXTERNAL:
        data = path.with_name(path.name + ".data")
        ir.save(model, path, external_data=data.name)
        return [path, data]
    ir.save(model, path)
    return [path]


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Properties of an ONNX file."""
    return {
        f"compress.{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in sorted(metadata.items())
    }


def add_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Add properties to a file already written; its tensors are not touched."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for key, value in as_text(metadata).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("compress-models")
    except PackageNotFoundError:
        return "0"
