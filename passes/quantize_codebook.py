"""Codebook quantization: each code selects one of up to 16 float values, and its group has a scale.

Weights of trained networks are not uniformly distributed, so at 2 to 4 bits values placed where the
weights are cost less error than an integer grid: NF4 (Dettmers et al. 2023, QLoRA), a table learned for
each weight by k-means, or a power grid (Yvinec et al. 2023, PowerQuant). Table, scales and codes minimise
``sum_j E[x_j^2] (w_j - w^_j)^2`` (`compress.passes.solvers.codebooks`); with calibration data the codes
are then moved to lower the layer's true output error (`compress.passes.solvers.codebook_descent`).

No runtime multiplies by codes of a table directly; ONNX files are as small as with integers of the same
width and run at the speed of float. Prefer `quantize_weights` where speed at batch 1 counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration import Need, Statistics
from compress.codebook import CodebookEncoding, CodebookWeight, Table, encode_codebook
from compress.errors import PassError
from compress.graph import Graph, Site
from compress.passes.quantize_weights import change, declined
from compress.passes.solvers.codebook_descent import codebook_descent
from compress.passes.solvers.codebooks import fit_codebook
from compress.passes.solvers.compose import importance
from compress.pipeline import Change, Context, Note, Pass, PassResult

Method = Literal["rtn", "descent"]


class QuantizeCodebook(Pass):
    """Encode weights as 2- to 4-bit codes of a table of values."""

    name: ClassVar[str] = "quantize_codebook"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )
    table: Table = Field(
        "nf4", description="nf4: published levels; kmeans: learned for each weight; power: a power grid"
    )
    bits: Literal[2, 3, 4] = Field(4, description="bits per weight, scales and table not counted; nf4 has 4")
    group_size: Literal[-1, 16, 32, 64, 128, 256] = Field(
        64, description="columns that share a scale; -1: one scale for each row"
    )
    method: Method = Field(
        "descent",
        description="rtn: nearest entry; descent: then coordinate descent, given calibration data",
    )

    @model_validator(mode="after")
    def _exists(self) -> QuantizeCodebook:
        try:
            _ = self.encoding
        except PassError as error:
            raise ValueError(str(error)) from error  # what pydantic reports as a bad recipe
        return self

    @property
    def encoding(self) -> CodebookEncoding:
        """What weights are stored as."""
        return CodebookEncoding(self.table, self.bits, self.group_size)

    def leaves(self) -> Sequence[object]:
        return (self.encoding,)

    def run(self, graph: Graph, context: Context) -> PassResult:
        encoding = self.encoding
        changes: list[Change] = []
        notes: list[Note] = []

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> CodebookWeight | None:
            if reason := declined(graph, site, encoding):
                notes.append(Note(site.name, reason))
                return None
            encoded = quantized_codebook(weight, statistics, encoding, method=self.method)
            changes.append(change(site, weight, encoded, statistics))
            return encoded

        needs: frozenset[Need] = frozenset({"diag", "H"} if self.method == "descent" else {"diag"})
        result = context.sweep(graph, self.select(graph), visit, needs)
        return PassResult(result, tuple(changes), tuple(notes))


def quantized_codebook(
    weight: Tensor,
    statistics: Statistics | None,
    encoding: CodebookEncoding,
    *,
    method: Method = "descent",
) -> CodebookWeight:
    """Quantize one weight; what the pass does at every site.

    Args:
        weight: float ``[O, ...]``.
        statistics: of the site's input; None without data.
        encoding: the table and the groups.
        method: option of `QuantizeCodebook`.
    """
    matrix = weight.reshape(weight.shape[0], -1).float()
    coded = fit_codebook(matrix, importance(statistics.diag if statistics else None, matrix), encoding)
    if method == "descent" and statistics is not None and statistics.H is not None:
        coded = codebook_descent(matrix, coded, statistics.H, encoding)
    return encode_codebook(
        coded.codes, coded.table, coded.scales, encoding, tuple(weight.shape), weight.dtype
    )
