"""Weight quantization: integer codes with a scale (and zero point) for every group of columns.

Activations stay in floating point (W4A16, W8A16, ...). The weight ``[O, ...]`` is a matrix ``[O, N]``; each
row is cut into groups of `group_size` columns. How codes and scales are found is in
`compress.passes.solvers.compose`; without data, scales minimise the plain squared error of the weight.

With bias correction codes are chosen by the covariance of the layer's input, and the bias then takes what is
left of the mean (Nagel et al. 2019, arXiv 1906.04721, section 4.2): ``b <- b + W E[x] - Q E[x~]``. Together
that is the minimiser of the output error over codes and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor

from compress.calibration import Need, Statistics, Update, output_error
from compress.encoding import Encoded, EncodedWeight, IntEncoding, encode
from compress.graph import Graph, Site
from compress.passes.solvers.compose import Composed, Inputs, Method, Scales, compose
from compress.passes.solvers.targets import Moments, choose_target
from compress.pipeline import Change, Context, Note, Pass, PassResult

WORTH_IT = 512
"""Bytes a weight must save: below, the operators that decode it take more room in the file."""


class Sized(Protocol):
    """A form of weights."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of ``[rows, columns]`` in it."""


def declined(graph: Graph, site: Site, form: Sized, *, at_any_size: bool = False) -> str | None:
    """Why a weight is not stored in a form: it has one, is no float, or saves too little; None if it is.

    Args:
        at_any_size: where something else than bytes is gained.
    """
    if site.weight in graph.encodings:
        return f"already {graph.encodings[site.weight].encoding}"
    weight = graph.tensors[site.weight]
    if not weight.is_floating_point():
        return f"{weight.dtype} is not a floating-point weight"
    saved = weight.numel() * weight.element_size() - form.nbytes(weight.shape[0], weight[0].numel())
    if saved < WORTH_IT and not at_any_size:
        return f"only {max(saved, 0)} bytes to save; left as it is"
    return None


class QuantizeWeights(Pass):
    """Encode weights as 2-, 3-, 4- or 8-bit integers."""

    name: ClassVar[str] = "quantize_weights"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )
    bits: Literal[2, 3, 4, 8] = Field(
        4, description="bits per weight, scales not counted; 3 uses eight levels and is stored as 4"
    )
    group_size: Literal[-1, 16, 32, 64, 128, 256] = Field(
        32, description="columns that share a scale; -1: one scale for each row"
    )
    symmetric: bool = Field(True, description="no zero points; TensorRT takes nothing else")
    scales: Scales = Field(
        "search", description="weighted search (default), or the plain range of each group"
    )
    method: Method = Field(
        "best",
        description="given calibration data: gpfq, gptq or descent alone, or best, which combines them; "
        "rtn: round to nearest",
    )
    bias_correction: bool = Field(
        True,
        description="let the bias take the mean of the error, given calibration data; adds a missing bias",
    )

    @property
    def encoding(self) -> IntEncoding:
        """What weights are stored as."""
        return IntEncoding(
            4 if self.bits == 3 else self.bits,
            self.group_size,
            self.symmetric,
            grid_bits=3 if self.bits == 3 else None,
        )

    def leaves(self) -> Sequence[object]:
        return (self.encoding,)

    def run(self, graph: Graph, context: Context) -> PassResult:
        encoding = self.encoding
        notes: list[Note] = []
        quantizer = Quantizer(graph, self.scales, self.method, self.bias_correction)

        def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Update | None:
            columns = weight[0].numel()
            reason = declined(graph, site, encoding)
            if reason is None and site.kind == "embedding" and columns % encoding.width(columns):
                reason = f"{columns} columns are no multiple of group_size {self.group_size}; left as it is"
            if reason is not None:
                notes.append(Note(site.name, reason))
                return None
            return quantizer.update(site, weight, statistics, encoding)

        result = context.sweep(graph, self.select(graph), visit, quantizer.needs)
        return PassResult(result, tuple(quantizer.changes), (*notes, *quantizer.notes))


class Quantizer:
    """What the pass does at every site, for other passes too.

    Args:
        graph: the graph that is swept.
        scales, method, bias_correction: options of `QuantizeWeights`.

    Attributes:
        changes, notes: what was done, for the report.
    """

    def __init__(
        self, graph: Graph, scales: Scales = "search", method: Method = "best", bias_correction: bool = True
    ) -> None:
        self.scales: Scales = scales
        self.method: Method = method
        self.changes: list[Change] = []
        self.notes: list[Note] = []
        unshared = graph.unshared() if bias_correction else set()
        self._correctable = {s for s in graph.sites() if s.weight in unshared and graph.owns_bias(s)}
        self._bias_correction = bias_correction

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics to collect."""
        needs: set[Need] = {"diag"}
        if self.method != "rtn":
            needs.add("H")
        if self.method in ("best", "gpfq", "descent"):
            needs.add("G")
        if self.method == "best":
            needs.add("held_out")
        if self._bias_correction:
            needs.add("mean")
        return frozenset(needs)

    def update(
        self,
        site: Site,
        weight: Tensor,
        statistics: Statistics | None,
        encoding: IntEncoding,
        more: str = "",
    ) -> Update:
        """The encoded weight, and what its bias takes over; `more` is for the report's row."""
        if self._bias_correction and statistics is not None:
            if self.corrects(site):
                statistics = statistics.centred
            else:
                reason = "its bias cannot be corrected for it alone; it or the weight is shared"
                self.notes.append(Note(site.name, reason))
        found = _solved(weight, statistics, encoding, self.scales, self.method)
        if found.note:
            self.notes.append(Note(site.name, found.note))
        encoded = _encoded(found, weight, encoding)
        self.changes.append(change(site, found.target, encoded, statistics, more))
        return Update(encoded, self.shift(site, weight, encoded, statistics))

    def corrects(self, site: Site) -> bool:
        """Whether the bias of a site can take up what its weight loses."""
        return site in self._correctable

    def shift(
        self, site: Site, weight: Tensor, encoded: Encoded, statistics: Statistics | None
    ) -> Tensor | None:
        """`mean_shift`, where the bias can be corrected."""
        if statistics is None or not self.corrects(site):
            return None
        return mean_shift(weight, encoded.decode(), statistics)


def quantized(
    weight: Tensor,
    statistics: Statistics | None,
    encoding: IntEncoding,
    *,
    scales: Scales = "search",
    method: Method = "best",
) -> EncodedWeight:
    """Quantize one weight; what the pass does at every site.

    Args:
        weight: float ``[O, ...]``.
        statistics: of the site's input; None without data. The more of them are there (H, G, held_out), the
            more `method` can do.
        encoding: the grid and the groups.
        scales, method: options of `QuantizeWeights`.
    """
    return _encoded(_solved(weight, statistics, encoding, scales, method), weight, encoding)


def mean_shift(weight: Tensor, new: Tensor, statistics: Statistics) -> Tensor:
    """What the bias must take over for the output to keep its mean: ``W E[x] - Q E[x~]``, float32 ``[O]``.

    Args:
        weight, new: ``[O, ...]``, as it was and as it is now.
        statistics: with means.
    """
    assert statistics.mean is not None and statistics.mean_compressed is not None
    groups = len(statistics.mean)
    w, q = (t.float().reshape(groups, t.shape[0] // groups, -1) for t in (weight, new))
    shift = w @ statistics.mean.unsqueeze(-1) - q @ statistics.mean_compressed.unsqueeze(-1)
    return shift.flatten()


def least_squares_target(weight: Tensor, statistics: Statistics | None) -> Tensor:
    """What to make a new weight for: the one that does best on the inputs at hand, if held-out samples agree.

    Args:
        weight: float ``[O, ...]``.
        statistics: with H, G and held_out; the less of them is there, the more it is the weight itself.

    Returns:
        float32, of the weight's shape.
    """
    matrix = weight.reshape(len(weight), -1).float()
    if statistics is not None:
        every, fitting, held = map(_moments, (statistics, statistics.fitting, statistics.held_out))
        if every is not None and fitting is not None and held is not None:
            matrix = choose_target(matrix, every, fitting, held)
    return matrix.view(weight.shape)


def _solved(
    weight: Tensor, statistics: Statistics | None, encoding: IntEncoding, scales: Scales, method: Method
) -> Composed:
    matrix = weight.reshape(weight.shape[0], -1).float()
    inputs = Inputs()
    if statistics is not None:
        fitting = statistics.fitting if method == "best" else None
        inputs = Inputs(
            statistics.diag, statistics.H, statistics.G, _moments(fitting), _moments(statistics.held_out)
        )
    return compose(matrix, inputs, encoding, scales=scales, method=method)


def _moments(statistics: Statistics | None) -> Moments | None:
    if statistics is None or statistics.H is None or statistics.G is None:
        return None
    return Moments(statistics.H, statistics.G)


def _encoded(found: Composed, weight: Tensor, encoding: IntEncoding) -> EncodedWeight:
    codes, scales, zeros = found.rounded.codes, found.rounded.scales, found.rounded.zero_points
    return encode(codes, scales, zeros, encoding, tuple(weight.shape), weight.dtype)


def change(
    site: Site, target: Tensor, encoded: Encoded, statistics: Statistics | None, more: str = ""
) -> Change:
    """The report's row for a weight that was encoded.

    Args:
        target: what the encoding was made to stand for, ``[O, ...]`` or ``[O, N]``.
        more: what else was done, added to the name of the encoding.
    """
    weight = decoded = encoded.decode()
    return Change(
        site=site.name,
        weight=site.weight,
        action=f"{encoded.encoding}{more}",
        bits=8 * encoded.nbytes / weight.numel(),
        sparsity=float((decoded == 0).double().mean()),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=encoded.nbytes,
        error=output_error(target.view_as(decoded), decoded, statistics),
    )
