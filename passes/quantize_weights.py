"""Weight quantization: integer codes with a scale (and zero point) for every group of columns.

Activations stay in floating point (W4A16, W8A16, ...). The weight ``[O, ...]`` is a matrix ``[O, N]``; each
row is cut into groups of `group_size` columns. Scales are chosen to minimise
``sum_j E[x_j^2] (w_j - w^_j)^2`` (`compress.passes.solvers.scales`), with ``E[x_j^2]`` from the
calibration sweep, or all ones without data. Where there is data, the codes are then moved to lower the
layer's true output error ``E |(w - w^) x|^2`` (`compress.passes.solvers.descent`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.calibration import Need, Statistics, output_error
from compress.encoding import EncodedWeight, IntEncoding, encode
from compress.graph import Graph, Site
from compress.passes.solvers.descent import coordinate_descent
from compress.passes.solvers.grids import IntegerGrid, Masked, columns_of
from compress.passes.solvers.scales import Rounded, decoded, round_to_nearest, search_scales
from compress.pipeline import Change, Context, Note, Pass, PassResult

_WORTH_IT = 512
"""Bytes a weight must save: below, the operators that decode it take more room in the file."""


Scales = Literal["search", "absmax"]
Method = Literal["rtn", "descent"]


class QuantizeWeights(Pass):
    """Encode weights as 2-, 4- or 8-bit integers."""

    name: ClassVar[str] = "quantize_weights"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )
    bits: Literal[2, 4, 8] = Field(4, description="bits per weight, scales not counted")
    group_size: Literal[-1, 16, 32, 64, 128, 256] = Field(
        32, description="columns that share a scale; -1: one scale for each row"
    )
    symmetric: bool = Field(True, description="no zero points; TensorRT takes nothing else")
    scales: Scales = Field(
        "search", description="weighted search (default), or the plain range of each group"
    )
    method: Method = Field(
        "descent",
        description="rtn: round to nearest; descent: then coordinate descent, given calibration data",
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        encoding = IntEncoding(self.bits, self.group_size, self.symmetric)
        changes: list[Change] = []
        notes: list[Note] = []

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> EncodedWeight | None:
            declined = self._declined(site, weight, encoding)
            if site.weight in graph.encodings:
                declined = f"already {graph.encodings[site.weight].encoding}"
            if declined:
                notes.append(Note(site.name, declined))
                return None
            encoded = quantized(weight, statistics, encoding, scales=self.scales, method=self.method)
            changes.append(_change(site, weight, encoded, statistics))
            return encoded

        needs: frozenset[Need] = frozenset({"diag", "H"} if self.method == "descent" else {"diag"})
        result = context.sweep(graph, self.select(graph), visit, needs)
        return PassResult(result, tuple(changes), tuple(notes))

    def _declined(self, site: Site, weight: Tensor, encoding: IntEncoding) -> str | None:
        if not weight.is_floating_point():
            return f"{weight.dtype} is not a floating-point weight"
        rows, columns = weight.shape[0], weight[0].numel()
        saved = weight.numel() * weight.element_size() - encoding.nbytes(rows, columns)
        if saved < _WORTH_IT:
            return f"only {max(saved, 0)} bytes to save; left as it is"
        if site.kind == "embedding" and columns % encoding.width(columns):
            return f"{columns} columns are no multiple of group_size {self.group_size}; left as it is"
        return None


def quantized(
    weight: Tensor,
    statistics: Statistics | None,
    encoding: IntEncoding,
    *,
    scales: Scales = "search",
    method: Method = "descent",
) -> EncodedWeight:
    """Quantize one weight; what the pass does at every site.

    Args:
        weight: float ``[O, ...]``.
        statistics: of the site's input; None without data.
        encoding: the grid and the groups.
        scales, method: options of `QuantizeWeights`.
    """
    matrix = weight.reshape(weight.shape[0], -1).float()
    if scales == "search":
        rounded = search_scales(matrix, _importance(statistics, matrix), encoding)
    else:
        rounded = round_to_nearest(matrix, encoding)
    if method == "descent" and statistics is not None and statistics.H is not None:
        rounded = _descended(matrix, rounded, statistics.H, encoding)
    return encode(
        rounded.codes, rounded.scales, rounded.zero_points, encoding, tuple(weight.shape), weight.dtype
    )


def _descended(matrix: Tensor, rounded: Rounded, H: Tensor, encoding: IntEncoding) -> Rounded:
    groups, columns = H.shape[0], matrix.shape[1]
    grid = IntegerGrid.of(rounded.scales, rounded.zero_points, encoding, columns, groups)
    start = decoded(rounded, encoding)
    masked = Masked(grid, columns_of(matrix, groups) != 0)
    values = coordinate_descent(matrix, start, H, masked)
    return Rounded(grid.codes(columns_of(values, groups)), rounded.scales, rounded.zero_points)


def _importance(statistics: Statistics | None, matrix: Tensor) -> Tensor | None:
    """``E[x_j^2]`` for each column, ``[N]``, or for each row's group ``[O, N]``."""
    if statistics is None:
        return None
    groups = statistics.diag.shape[0]
    if groups == 1:
        return statistics.diag[0]
    return statistics.diag.repeat_interleave(matrix.shape[0] // groups, dim=0)


def _change(site: Site, weight: Tensor, encoded: EncodedWeight, statistics: Statistics | None) -> Change:
    decoded = encoded.decode()
    return Change(
        site=site.name,
        weight=site.weight,
        action=str(encoded.encoding),
        bits=8 * encoded.nbytes / weight.numel(),
        sparsity=float((decoded == 0).double().mean()),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=encoded.nbytes,
        error=output_error(weight, decoded, statistics),
    )
