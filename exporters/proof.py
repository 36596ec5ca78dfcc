"""Proof that a written file computes what its graph computes, operator by operator, at several shapes.

Rounded activations need care. File and graph sum in another order, so their values differ by 1e-7, which
now and then moves one to the next code; each layer adds to that, up to the level of the rounding itself
(27 dB for a 6-layer encoder, measured), and a limit loose enough for it would let errors pass. So the graph
is given the file's *decisions*: at every rounding the two must agree to one code, and then the graph goes on
from the file's codes. What is left is the order of summation in single layers, and the limit is as tight as
for floats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from compress.activations import DYNAMIC, FLOAT8, QUANTIZERS
from compress.artifact import Lowered
from compress.errors import ExportError, VerificationError
from compress.exporters.onnx_half import in_float32
from compress.exporters.ort import Session
from compress.float8 import LARGEST, float8_steps
from compress.graph import Graph
from compress.numerics import sqnr_db
from compress.progress import Progress, Silent

if TYPE_CHECKING:
    import onnx_ir as ir

_EXACT_DB = 50.0
_INT8_ACTIVATIONS_DB = 25.0
"""MatMulNBits at 2 and 8 bits rounds its activations to int8 even when nothing is fused."""

_HALF_DB = 30.0
"""float16 rounds each value by 2^-11 of it at most; layers in a row and sums that cancel add to that. The
same file in float32 is proven on its own, so this one need only find what does not fit into float16."""

_IN_FLOATS = "write it in float32 (--precision float32)"


@dataclass(frozen=True)
class _Ties:
    """By how much roundings of file and graph may differ.

    Attributes:
        steps: by how many steps a code may be another. A sum in float16 that cancels is off by parts of its
            largest terms.
        far: fraction of codes that may be further off. Where a sum and a bias are hundreds of times the range
            of the rounding and cancel, float16 leaves too few digits: of a ResNet-18 with random weights one
            code in 200,704, by 6 steps.
        measured: fraction of codes that true ties make others. In float32 these are a few in 100,000; a
            float16 of 64 to 127 steps is known to 1/32 of one, and 1.2 % and two steps were measured (of one
            rounding of a ResNet-18 with random weights 2.9 %).
        share: largest fraction of codes that may be others, where there are many.
        finest: the smallest step of 8-bit floats that counts, as a fraction of the largest number: those near
            zero are finer than the float16 sums they round.
    """

    steps: float
    far: float
    measured: float
    share: float
    finest: float

    def allowed(self, count: int) -> float:
        """How many of so many codes may be others: a share of them, but of few as many as true ties exceed by
        chance once in a million (Poisson's distribution)."""
        share, expected = self.share * count, self.measured * count
        if share >= 100:  # the other is below that
            return share
        most, likely = 0, math.exp(-expected)
        beyond = 1 - likely
        while beyond > 1e-6:
            most += 1
            likely *= expected / most
            beyond -= likely
        return max(most, share)


_SINGLE, _HALF = _Ties(1.1, 0.0, 5e-5, 0.02, 0.0), _Ties(4.1, 1e-4, 0.012, 0.05, 2.0**-10)

_ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear")
_MARK = "rounded_"
_AS_FLOAT = ".float"


def mark_roundings(model: ir.Model, graph: Graph) -> None:
    """Name the outputs of the file's rounding operators after their place in the graph, in place.

    Args:
        model: as `torch.onnx` translated it, nothing optimised.
        graph: what was translated.
    """
    found = [n for n in model.graph if n.op_type in _ROUNDING or _to_float8(n.attributes.get_int("to", 0))]
    if len(found) == len(_roundings(graph)):  # else the model rounds on its own, and nothing is known
        for i, node in enumerate(found):
            for output, part in zip(node.outputs, ("", ".scale", ".zero_point"), strict=False):
                output.name = f"{_MARK}{i}{part}"


def _to_float8(to: int) -> bool:
    """Whether the attribute of a Cast is E4M3."""
    import onnx

    return bool(to == onnx.TensorProto.FLOAT8E4M3FN)


def prove(
    path: Path,
    graph: Graph,
    lowered: Sequence[Lowered],
    trials: Sequence[Sequence[Tensor]],
    *,
    half: bool = False,
    progress: Progress | None = None,
) -> float:
    """Worst SQNR in dB of the file, run operator by operator, against the graph.

    Args:
        path: the file; its folder may be written to.
        graph: what it was written from.
        lowered: the form of every encoded weight.
        trials: flat inputs to run both on.
        half: the file computes in float16, the graph in float32; every value is rounded as the file says.
        progress: told about every trial.

    Raises:
        ExportError: an output is complex.
        VerificationError: the file is not valid, or does not compute what the graph computes.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:
        if "com.microsoft" not in str(error):
            raise VerificationError(f"the written file is not valid ONNX: {error}") from error
    tapped, taps = _with_taps(in_float32(path, path.parent) if half else path)
    session = Session(tapped, exact=True)
    plain = graph.decoded()
    inexact = any("MatMulNBits" in form.form for form in lowered)
    limit = _HALF_DB if half else _INT8_ACTIVATIONS_DB if inexact else _EXACT_DB
    ties = _HALF if half else _SINGLE
    worst = float("inf")
    counts, others = Counter[str](), Counter[str]()
    progress = progress or Silent()
    progress.start(f"proof{' in float16' if half else ''}", len(trials))
    for inputs in trials:
        shapes = ", ".join(str(list(t.shape)) for t in inputs)
        progress.step(shapes)
        found = dict(zip(session.outputs, session(*inputs), strict=True))
        codes = {name.removesuffix(_AS_FLOAT): found.pop(name) for name in taps}
        results = _run_with(plain, inputs, codes, None if inexact else shapes, ties, counts, others)
        wanted = plain.named(results)
        for name, want in zip(found, wanted, strict=True):
            if want.is_complex():
                raise ExportError(
                    f"output {name} is complex, and ONNX has no complex outputs",
                    fix="return torch.view_as_real(...) of it, or its .real and .imag",
                )
        worst = min(worst, compare(found, wanted, limit, shapes, fix=_IN_FLOATS if half else ""))
    progress.finish()
    return worst


def compare(
    found: Mapping[str, Tensor], wanted: Sequence[Tensor], limit: float, shapes: str, fix: str = ""
) -> float:
    """Worst SQNR in dB of a file's outputs.

    Args:
        found: outputs of the file by name.
        wanted: those of the graph, in the same order.
        limit: the least that passes, in dB.
        shapes: of the inputs, for the message.
        fix: what to do where it does not pass.

    Raises:
        VerificationError: a shape is another, or an output is further off than the limit.
    """
    worst = float("inf")
    for (name, have), want in zip(found.items(), wanted, strict=True):
        if want.shape != have.shape:
            raise VerificationError(
                f"at inputs {shapes} the file's {name} is {list(have.shape)}",
                expected=f"{list(want.shape)} as in the graph",
                fix="fix that dimension in the input spec with '!' and run again",
            )
        quality = sqnr_db(want, have)
        worst = min(worst, quality)
        if quality < limit:
            raise VerificationError(
                f"at inputs {shapes} the file's {name} differs from the graph ({quality:.1f} dB)",
                expected=f"at least {limit:.0f} dB; nothing was written",
                fix=fix,
            )
    return worst


def _with_taps(path: Path) -> tuple[Path, list[str]]:
    """A copy of the file that gives out what it rounded, and the names of those outputs."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    made = [o for node in model.graph.node for o in node.output]
    taps = [name for name in made if name.startswith(_MARK)]
    if not taps:
        return path, []
    for i, name in enumerate(taps):
        kind = _type_of(model, name)
        if _to_float8(kind):  # numpy has no such type
            kind, taps[i] = onnx.TensorProto.FLOAT, f"{name}{_AS_FLOAT}"
            model.graph.node.append(onnx.helper.make_node("Cast", [name], [taps[i]], to=kind))
        model.graph.output.append(onnx.helper.make_tensor_value_info(taps[i], kind, None))
    tapped = path.with_name("tapped.onnx")
    onnx.save(model, tapped)
    return tapped, taps


def _type_of(model: Any, name: str) -> int:
    """Of what a rounding operator gives out: codes, their scale or zero point."""
    import onnx

    node = next(n for n in model.graph.node if name in n.output)
    if name.endswith(".scale"):
        return int(onnx.TensorProto.FLOAT)
    if node.op_type == "Cast":
        return next(int(a.i) for a in node.attribute if a.name == "to")
    if node.op_type == "QuantizeLinear":
        zero = next(t for t in model.graph.initializer if t.name == node.input[2])
        return int(zero.data_type)
    return int(onnx.TensorProto.UINT8)


def _roundings(graph: Graph) -> list[fx.Node]:
    return [n for n in graph.ops.nodes if n.target in QUANTIZERS]


def _run_with(
    graph: Graph,
    inputs: Sequence[Tensor],
    codes: dict[str, Tensor],
    shapes: str | None,
    ties: _Ties,
    counts: Counter[str],
    others: Counter[str],
) -> list[Any]:
    """`Graph.run`, going on from the file's codes at every rounding; checked unless `shapes` is None.

    `counts` and `others` are added to: the codes of every rounding so far, and those that are others.
    """
    place = {node: i for i, node in enumerate(_roundings(graph))}

    def settle(node: fx.Node, own: Any) -> Any:
        mark = f"{_MARK}{place.get(node, -1)}"
        if mark not in codes:
            return own
        zero = torch.zeros(())
        if node.target is FLOAT8:
            scale = torch.tensor(node.args[1])
        elif node.target is DYNAMIC:
            scale, zero = codes[f"{mark}.scale"], codes[f"{mark}.zero_point"].float()
        else:
            scale, zero = torch.tensor(node.args[1]), torch.tensor(float(node.args[2]))  # type: ignore[arg-type]
        if codes[mark].dtype == torch.int8:
            zero = zero - 128
        given = (codes[mark].float() - zero) * scale
        step = scale
        if node.target is FLOAT8:
            finer = float8_steps(torch.minimum(given.abs(), own.abs()) / scale)
            step = scale * finer.clamp(min=ties.finest * LARGEST)
        apart = (given - own).abs() / step
        counts[mark] += apart.numel()
        others[mark] += int((apart > 0.5).sum())
        allowed, far = ties.allowed(counts[mark]), int((apart > ties.steps).sum())
        if shapes is not None and (far > ties.far * apart.numel() or others[mark] > allowed):
            raise VerificationError(
                f"at inputs {shapes} the file rounds {node.args[0]} to other codes than the graph",
                expected=f"the same but for ties (at most {allowed:.0f} of {counts[mark]} so far, by "
                f"{ties.steps:.0f} steps at most{' but for few' if ties.far else ''}); nothing was written",
            )
        return given

    return graph.run(inputs, settle)
