"""Float8 quantization (FP8): weights and activations as E4M3 floats of 8 bits, for GPUs that multiply them.

Weights have one scale for each row, found with the layer's inputs (`compress.passes.solvers.float8`). Inputs
of linear layers and convolutions are rounded on a scale known beforehand: the largest value that calibration
saw becomes 448, the largest E4M3 number (Micikevicius et al. 2022, arXiv 2209.05433, section 3). Unlike with
integers no range is clipped for finer steps: a float has the same three digits at every size. The bias takes
up the mean error, as in `quantize_activations`.

Each value keeps about 3 % of error, more than with 8-bit integers where ranges are narrow and less where
there are outliers. TensorRT runs it on sm89 and newer; ONNX Runtime computes it in floats, at float speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.activations import FLOAT8, Rounding
from compress.calibration import Need, Statistics, Update
from compress.float8 import LARGEST, Float8Encoding, encode_float8
from compress.graph import Graph, Site
from compress.observe import Largest, observe
from compress.passes.quantize_activations import eligible, round_inputs, source_of
from compress.passes.quantize_weights import Quantizer, change, declined
from compress.passes.solvers.compose import importance
from compress.passes.solvers.float8 import fit_float8
from compress.pipeline import Context, Note, Pass, PassResult


class QuantizeFP8(Pass):
    """Encode weights as 8-bit floats, and round the inputs of their layers to 8-bit floats."""

    name: ClassVar[str] = "quantize_fp8"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )
    activations: Literal["static", "none"] = Field(
        "static",
        description="static: inputs of linear layers and convolutions too, on calibrated ranges; none: "
        "weights only",
    )
    method: Literal["rtn", "descent"] = Field(
        "descent",
        description="rtn: nearest number; descent: then coordinate descent, given calibration data",
    )

    def leaves(self) -> Sequence[object]:
        rounded = (Rounding(static=True, float8=True),) if self.activations == "static" else ()
        return (Float8Encoding(), *rounded)

    def run(self, graph: Graph, context: Context) -> PassResult:
        graph = graph.copy()
        notes: list[Note] = []
        sites = []
        for site in self.select(graph):
            if reason := declined(graph, site, Float8Encoding()):
                notes.append(Note(site.name, reason))
            else:
                sites.append(site)
        rounded = self._round(graph, sites, context, notes)
        quantizer = Quantizer(graph, method="descent")
        needs: frozenset[Need] = quantizer.needs if self.method == "descent" else frozenset({"diag", "mean"})

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Update:
            matrix = weight.reshape(len(weight), -1)
            found = statistics.centred if statistics is not None and quantizer.corrects(site) else statistics
            diag = None if found is None else importance(found.diag, matrix)
            H, G = (None, None) if found is None or self.method == "rtn" else (found.H, found.G)
            values, scales = fit_float8(matrix, diag, H, G)
            encoded = encode_float8(values, scales, tuple(weight.shape), weight.dtype)
            action = ", activations fp8 static" if site.weight in rounded else ""
            quantizer.changes.append(change(site, weight, encoded, found, action))
            return Update(encoded, quantizer.shift(site, weight, encoded, statistics))

        result = context.sweep(graph, sites, visit, needs)
        return PassResult(result, tuple(quantizer.changes), (*notes, *quantizer.notes))

    def _round(self, graph: Graph, sites: list[Site], context: Context, notes: list[Note]) -> set[str]:
        """Round the inputs of layers, in place; the names of their weights."""
        found = [s for s in eligible(graph, sites) if s.kind != "embedding"]
        if self.activations == "none" or not found:
            return set()
        if context.calibration is None:
            reason = "weights only: the ranges of activations need calibration data"
            notes += [Note(s.name, reason) for s in found]
            return set()
        seen = {source_of(graph, s).name: Largest() for s in found}
        observe(graph, context.calibration.inputs(), {name: [largest] for name, largest in seen.items()})
        scales = {name: (largest.value / LARGEST or 1.0,) for name, largest in seen.items()}
        round_inputs(graph, found, FLOAT8, scales)
        return {s.weight for s in found}
