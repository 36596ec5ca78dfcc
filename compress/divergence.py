"""Where two models part: the error at every layer they share, what arrives there, and what the layer adds.

Both run on the same inputs. With x and y the input and output of a layer in A, and x', y' in B, all in dB of
``SQNR(r, v) = 10 log10(sum r^2 / sum (r - v)^2)`` over all samples; outputs are taken less A(0), the bias,
which would hide what the weight does:

======== ================= ==================================================================================
arriving ``SQNR(x, x')``   what earlier layers have done to what it reads
output   ``SQNR(y, y')``   how far the models are apart behind it
own      ``SQNR(y, B(x))`` the error of B's layer alone: B's operator on A's input. At least `output`: a layer
                           whose output agrees is right (smoothing rescales what it reads, and its weight)
======== ================= ==================================================================================

A layer is **out of line** if its own SQNR is below what its bits account for, and below the line of its like.
Rounding to b <= 8 bits accounts for ``6 b - 4`` dB, more bits for 60 dB (float32 sums in another order differ
at 100 to 140 dB). 8-bit floats ``m 2^e``, ``1 <= m < 2``, are ``2^(e-3)`` apart, an error of ``10 log10(12 *
64 m^2)`` dB and at least 28.9; a weight and its input, both so rounded, account for 3 dB less. Its like are
the other layers whose weights are stored in as many bits: the line is their median less three standard
deviations (``3 * 1.4826 MAD``), which count for no less than 8 and no more than 12 dB. Where there are fewer
than two, it is what b <= 8 bits account for less 12 dB. Layers that share a weight are not their own like. A
layer whose error arrives at a later one and is undone there (its output is 15 dB better than both) was
rescaled together with it, as `smooth` does; it is in line, and nobody's like.

The first layer out of line is where the models part. If there is none, and all layers agree, it is where
something *between* layers differs: the first input that arrives below 60 dB.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import InputSpecError, VerificationError
from compress.inputs import BATCH, summands
from compress.numerics import Agreement
from compress.points import How, Layer, Pair, Points, pairs
from compress.progress import Progress, Silent

_ROUNDING_DB = 60.0
_FLOAT8_DB = 10 * math.log10(12 * 64 / 2)
_MARGIN_DB, _MOST_DB = 8.0, 12.0
_HEALED_DB = 15.0
"""How much better than its input a layer's output must be for an error to have been undone."""


@dataclass(frozen=True)
class Point:
    """One layer, or one output, that both models have.

    Attributes:
        name: of the layer in A (in B, if A has none), or of the output.
        kind: "linear", "conv", "embedding" or "output".
        bits: of a stored weight, the smaller of the two; None for outputs.
        how: what it was matched by ("name", "chain", "value", "weight", "order"); None if it was not.
        arriving_db, output_db, own_db: see the module; None where it could not be measured.
        cosine: mean over rows of the outputs.
        max_abs: largest difference of the outputs, in their unit.
        gain: ``<y, B(x)> / <y, y>``: 1.5 where B's layer gives values one and a half times as large.
        out_of_line: by the rule of the module.
        undone_by: the later layer it was rescaled with; "" if it was not.
        note: what else there is to say.
        float8: the weight is stored as 8-bit floats in one of them.
    """

    name: str
    kind: str
    bits: int | None = None
    how: How | None = None
    arriving_db: float | None = None
    output_db: float | None = None
    own_db: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    gain: float | None = None
    out_of_line: bool = False
    undone_by: str = ""
    note: str = ""
    float8: bool = False


@dataclass(frozen=True)
class Divergence:
    """What `compress.diff` returns.

    Attributes:
        points: layers in A's execution order, then those only B has, then the outputs.
        parts_at: the first layer out of line, or the one before which something differs; None if none is.
        between: the models part before `parts_at`, not in it.
        level_db: median of its like, or what its bits account for; None if none is out of line.
        likes: number of its like, 0 where there were too few.
        inputs: what both were run on.
        notes: what a reader must know.
    """

    points: tuple[Point, ...]
    parts_at: Point | None
    between: bool
    level_db: float | None
    likes: int
    inputs: str
    notes: tuple[str, ...] = ()

    def headline(self) -> str:
        """The outcome in one line."""
        found = self.parts_at
        layers = [p for p in self.points if p.own_db is not None]
        if found is not None and self.between:
            return (
                f"parts before {found.name}: {found.arriving_db:.1f} dB arrive there, and the layers so far "
                "are right; what stands between them and it differs"
            )
        if found is not None:
            stored = f"{found.bits}-bit floats" if found.float8 else f"{found.bits} bits"
            what = "its like have" if self.likes else f"{stored} account for"
            level = (
                "its like are equal" if math.isinf(self.level_db or 0.0) else f"{what} {self.level_db:.0f} dB"
            )
            return f"parts at {found.name}: {found.own_db:.1f} dB, where {level}"
        least = min((p.output_db for p in self.points if p.output_db is not None), default=math.inf)
        if least >= _ROUNDING_DB:
            at_least = "equal bit for bit" if math.isinf(least) else f"at least {least:.0f} dB everywhere"
            return f"the same up to rounding: {at_least}"
        if not layers:
            return f"no layer could be looked at alone; the largest difference is {least:.1f} dB"
        layers = [p for p in layers if not p.undone_by] or layers
        worst = min(layers, key=lambda p: p.own_db or 0.0)
        return f"no layer is out of line; the largest error is that of {worst.name}, {worst.own_db:.1f} dB"

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able: infinite SQNR (equal values) is the text "inf"."""
        return {
            "headline": self.headline(),
            "parts_at": self.parts_at.name if self.parts_at else None,
            "between": self.between,
            "level_db": _plain(self.level_db),
            "likes": self.likes,
            "inputs": self.inputs,
            "notes": list(self.notes),
            "points": [{k: _plain(v) for k, v in vars(p).items()} for p in self.points],
        }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Measured:
    """Running figures of one pair."""

    pair: Pair
    arriving: Agreement = field(default_factory=Agreement)
    output: Agreement = field(default_factory=Agreement)
    own: Agreement = field(default_factory=Agreement)
    inner: float = 0.0
    bias: Tensor | None = None
    note: str = ""


def compare(
    a: Points,
    b: Points,
    batches: Iterable[Sequence[Tensor]],
    described: str,
    progress: Progress | None = None,
) -> Divergence:
    """Run both models and measure every layer they share.

    Args:
        a: what is taken for right.
        b: what is asked about.
        batches: flat inputs in the order of `a.inputs`; all values between layers of one are kept in memory.
        described: what the inputs are.

    Raises:
        InputSpecError: the models take different inputs.
        VerificationError: they share no layer and no output.
    """
    progress = progress or Silent()
    order = _input_order(a, b)
    found = [_Measured(pair) for pair in pairs(a, b)]
    shared = [m for m in found if m.pair.a is not None and m.pair.b is not None]
    outputs: dict[str, Agreement] = {}
    wanted = [{n for m in shared for n in _values(side(m.pair)) if n} for side in (_a, _b)]
    first = True
    for batch in batches:
        progress.step("samples")
        theirs = [batch[i] for i in order]
        values_a, results_a = a.run(batch, wanted[0])
        values_b, results_b = b.run(theirs, wanted[1])
        if first:
            _find_biases(a, shared, values_a, batch)
            first = False
        given = {}
        for m in shared:
            x, y = _a(m.pair), _b(m.pair)
            if not m.note:
                m.note = _update(m.output, values_a[x.output], values_b[y.output], m.bias)
            if not (x.source and y.source):
                continue
            read, other = values_a[x.source], values_b[y.source]
            if read.is_floating_point():
                _update(m.arriving, read, other)
            # a chain may begin with another layout of the same numbers
            if read.shape == other.shape or (m.pair.how != "chain" and read.numel() == other.numel()):
                given[y] = read.reshape(other.shape).to(other.dtype)
        alone = b.apply(given, theirs)
        for m in shared:
            if (value := alone.get(_b(m.pair))) is None or m.note:
                continue
            right = values_a[_a(m.pair).output]
            _update(m.own, right, value, m.bias)
            right, value = (_less(t.reshape(right.shape), m.bias) for t in (right, value))
            m.inner += float((right * value).sum())
        for name, value, other in _shared_outputs(results_a, results_b):
            _update(outputs.setdefault(name, Agreement()), value, other)
    if not shared and not any(agreement.rows for agreement in outputs.values()):
        raise VerificationError(
            f"{a.label} and {b.label} have no layer and no output in common",
            expected="two forms of one model",
        )
    points = [_point(m) for m in found]
    ends = [
        Point(n, "output", output_db=o.sqnr_db, cosine=o.cosine, max_abs=o.largest)
        for n, o in outputs.items()
    ]
    points = [_rescaled(p, points[i + 1 :]) for i, p in enumerate(points)]
    likes = [_likes(i, points, found) for i in range(len(points))]
    points = [_judged(p, like) for p, like in zip(points, likes, strict=True)]
    at = next((i for i, p in enumerate(points) if p.out_of_line), None)
    found_at = _between(points) if at is None else points[at]
    notes = []
    if any(p.how == "order" for p in points):
        notes.append("layers without a common name were matched by order and shape: check those marked so")
    if any(p.undone_by for p in points):
        notes.append(
            "scales were moved from layer to layer (smooth): if an error hides there, compare with another "
            "form of the same compressed model"
        )
    level, likely = (
        (None, 0)
        if at is None
        else (statistics.median(likes[at]) if likes[at] else _accounted(points[at]), len(likes[at]))
    )
    between = at is None and found_at is not None
    return Divergence((*points, *ends), found_at, between, level, likely, described, tuple(notes))


def _a(pair: Pair) -> Layer:
    assert pair.a is not None
    return pair.a


def _b(pair: Pair) -> Layer:
    assert pair.b is not None
    return pair.b


def _values(layer: Layer) -> tuple[str, str]:
    return layer.source, layer.output


def _find_biases(
    a: Points, shared: Sequence[_Measured], values: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> None:
    """What A's layers make of zeros, of one entry along axis 0."""
    layers = [(m, _a(m.pair)) for m in shared if _a(m.pair).source and _a(m.pair).kind != "embedding"]
    zeros = {x: torch.zeros_like(values[x.source][:1]) for _, x in layers}
    found = a.apply(zeros, inputs)
    for m, x in layers:
        rows = values[x.output].shape[0] == values[x.source].shape[0]
        m.bias = found[x].double().nan_to_num(0.0, 0.0, 0.0) if rows else None


def _less(value: Tensor, bias: Tensor | None) -> Tensor:
    return value.double() if bias is None else value.double() - bias


def _update(agreement: Agreement, right: Tensor, value: Tensor, bias: Tensor | None = None) -> str:
    """Add one batch; what is wrong if the shapes do not fit."""
    if right.numel() != value.numel():
        return f"shapes differ: {list(right.shape)} and {list(value.shape)}"
    agreement.update(_less(right, bias), _less(value.reshape(right.shape), bias))
    return ""


def _shared_outputs(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
    if len(a) == len(b) and not set(a) & set(b):
        return ((name, x, y) for (name, x), y in zip(a.items(), b.values(), strict=True))
    return ((name, x, b[name]) for name, x in a.items() if name in b)


def _input_order(a: Points, b: Points) -> list[int]:
    """For each input of B its position among those of A: by name, else by position."""
    names = [spec.name for spec in a.inputs]
    fits = len(a.inputs) == len(b.inputs)
    order = list(range(len(b.inputs)))
    if fits and {spec.name for spec in b.inputs} == set(names):
        order = [names.index(spec.name) for spec in b.inputs]
    for i, spec in zip(order, b.inputs, strict=True):
        fits = fits and len(a.inputs[i].shape) == len(spec.shape)
        fits = fits and a.inputs[i].dtype.is_floating_point == spec.dtype.is_floating_point
    if not fits:
        raise InputSpecError(
            f"{b.label} takes {', '.join(map(str, b.inputs))}",
            expected=f"{', '.join(map(str, a.inputs))}, as {a.label}",
            fix="give --input for the model that is captured; --no-kv-cache where only one has a cache",
        )
    return order


def sizes_for(a: Points, b: Points, samples: int) -> dict[str, int]:
    """Sizes of A's dynamic axes for random inputs: B's where it fixes them, else those of A's example."""
    sizes: dict[str, int] = {}
    for position, i in enumerate(_input_order(a, b)):
        mine, theirs = a.inputs[i], b.inputs[position]
        for axis, symbol in mine.dynamic:
            if len(summands(symbol)) == 1:
                default = samples if symbol == BATCH else mine.shape[axis]
                sizes.setdefault(symbol, theirs.shape[axis] if theirs.symbol(axis) is None else default)
    return sizes


def _point(m: _Measured) -> Point:
    pair = m.pair
    layer = pair.a or pair.b
    assert layer is not None
    if pair.a is None or pair.b is None:
        side = "the second" if pair.a is None else "the first"
        return Point(layer.name, layer.kind, layer.bits, note=f"unmatched: only in {side} model")
    known = bool(m.output.rows) and not m.note
    point = Point(
        pair.a.name,
        layer.kind,
        min(pair.a.bits, pair.b.bits),
        pair.how,
        m.arriving.sqnr_db if m.arriving.rows else None,
        m.output.sqnr_db if known else None,
        cosine=m.output.cosine if known else None,
        max_abs=m.output.largest if known else None,
        note=m.note or ("" if pair.how in ("name", "chain") else f"matched by {pair.how}"),
        float8=pair.a.float8 or pair.b.float8,
    )
    if m.own.rows and point.output_db is not None:
        own = max(m.own.sqnr_db, point.output_db)
        point = replace(point, own_db=own, gain=m.inner / m.own.signal if m.own.signal else None)
    return point


# -- the rule ----------------------------------------------------------------------------------------


def _likes(index: int, points: Sequence[Point], found: Sequence[_Measured]) -> list[float]:
    """Own SQNR of the other layers of another weight in as many bits; empty if there are fewer than two."""
    me, mine = points[index], found[index].pair.b
    likes = [
        p.own_db
        for p, m in zip(points, found, strict=True)
        if p is not me
        and p.own_db is not None
        and (p.bits, p.float8) == (me.bits, me.float8)
        and not p.undone_by
        and mine is not None
        and m.pair.b is not None
        and not m.pair.b.keys & mine.keys
    ]
    return likes if len(likes) > 1 else []


def _accounted(point: Point) -> float:
    """The SQNR in dB that storing a weight in so many bits accounts for."""
    if point.float8:
        return _FLOAT8_DB
    return 6.0 * point.bits - 4 if point.bits is not None and point.bits <= 8 else _ROUNDING_DB


def _line(point: Point, likes: Sequence[float]) -> float:
    most = _accounted(point)
    if not likes:
        return most if most == _ROUNDING_DB else most - _MOST_DB
    middle = statistics.median(likes)
    if math.isinf(middle):
        return most
    spread = 1.4826 * statistics.median([abs(x - middle) for x in likes])
    return min(middle - min(max(_MARGIN_DB, 3 * spread), _MOST_DB), most)


def _rescaled(point: Point, later: Sequence[Point]) -> Point:
    """The same point; if a later layer undoes its error, it says which."""
    own = math.inf if point.own_db is None else point.own_db
    for other in later:
        arriving, output = other.arriving_db, other.output_db
        # far worse than this error: it is another that arrives there
        if arriving is None or output is None or arriving < own - _MARGIN_DB:
            continue
        if output >= max(own, arriving) + _HEALED_DB:
            note = _said(point.note, f"rescaled with {other.name}, which undoes it")
            return replace(point, undone_by=other.name, note=note)
    return point


def _judged(point: Point, likes: Sequence[float]) -> Point:
    """The same point, marked if it is out of line."""
    if point.own_db is None or point.undone_by or point.own_db >= _line(point, likes):
        return point
    far = point.gain is not None and abs(point.gain - 1) > 0.1
    note = f"about {point.gain:.2f} times as large" if far else "out of line"
    return replace(point, out_of_line=True, note=_said(point.note, note))


def _said(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _between(points: Sequence[Point]) -> Point | None:
    """The first layer that gets another input than in A although every layer before it is right."""
    for point in points:
        if point.arriving_db is not None and point.arriving_db < _ROUNDING_DB:
            return point
        if point.own_db is not None and point.own_db < _ROUNDING_DB:
            return None
    return None
