"""Plots as inline SVG.

Positions are percentages and text has a fixed size, so a plot fits any width and its letters stay readable;
colours come from the page's style sheet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.page.markup import Html, tag


@dataclass(frozen=True)
class Point:
    """One candidate of a scatter plot.

    Attributes:
        name: what it is.
        mark: the sign inside its circle, the same as in the table.
        x, y: its coordinates, in the units of the axes.
        style: class of the circle.
    """

    name: str
    mark: str
    x: float
    y: float
    style: str


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: what it shows, with its unit and the better direction.
        low, high: its ends.
        ticks: marked values.
        form: how they are written.
        log: whether it is logarithmic.
        falls: whether small values are on the far side.
    """

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    form: str = "g"
    log: bool = False
    falls: bool = False

    def at(self, value: float) -> float:
        """Percent of the length of the axis."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = 100 * min(1.0, max(0.0, (value - low) / (high - low)))
        return 100 - share if self.falls else share

    def words(self, value: float) -> str:
        return f"{value:{self.form}}"


def linear(label: str, values: Sequence[float], *, zero: bool = False, falls: bool = False) -> Axis:
    """An axis around the values, with about five round ticks."""
    low, high = min(values), max(values)
    low = min(0.0, low) if zero else low
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-6):
        around = max(0.05 * abs(high), 1e-6)
        low, high = low if zero else low - around, high + around
    margin = 0.08 * (high - low)
    low, high = low if zero else low - margin, high + margin
    step = _round_step((high - low) / 4)
    ticks = tuple(i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(label, low, high, ticks, f".{digits}f", falls=falls)


def logarithmic(label: str, values: Sequence[float]) -> Axis:
    """An axis of positive values, with ticks at 1, 2, 5, 10, ..."""
    low, high = min(values) / 1.25, max(values) * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = tuple(m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high)
    if len(ticks) < 3:  # a narrow range
        ticks = tuple(t for t in linear("", [low, high]).ticks if low <= t <= high)
    return Axis(label, low, high, ticks, ".6g", log=True)


def scatter(ident: str, title: str, description: str, x: Axis, y: Axis, points: Sequence[Point],
            border: Sequence[Point] = (), line: tuple[float, str] | None = None) -> Html:  # fmt: skip
    """Candidates in a plane, up is better.

    Args:
        ident: prefix of the ids in it.
        title, description: for those who do not see it.
        x, y: the axes.
        points: the candidates.
        border: those that no other beats in this plane, joined by a line.
        line: a value of x to mark, and what it means.
    """
    parts = [*_grid(y, x)]
    # nominal size of the plot, to keep labels apart; on narrow screens they are not shown
    wide, high = 5.2, 2.9
    taken: list[tuple[float, float, float, float]] = []
    if line is not None and x.low <= line[0] <= x.high:
        at = x.at(line[0])
        parts.append(_line(at, 0, at, 100, "reference"))
        end, length = at > 75, 6.8 * len(line[1])
        start = at * wide - length if end else at * wide
        taken.append((start, 0.0, start + length, 16.0))
        parts.append(
            tag("text", line[1], x=f"{at:.4g}%", y="0", dx=-6 if end else 6, dy=12, class_="note",
                text_anchor="end" if end else None)
        )  # fmt: skip
    along = sorted(border, key=lambda p: x.at(p.x))
    for a, b in pairwise(along):
        parts.append(_line(x.at(a.x), 100 - y.at(a.y), x.at(b.x), 100 - y.at(b.y), "front"))
    places = [(x.at(p.x) * wide, (100 - y.at(p.y)) * high) for p in points]
    taken += [(px - 12, py - 12, px + 12, py + 12) for px, py in places]
    for point, (px, py) in zip(points, places, strict=True):
        left, top = f"{x.at(point.x):.4g}%", f"{100 - y.at(point.y):.4g}%"
        dx, dy, anchor = _place(point.name, px, py, wide * 100, high * 100, taken)
        parts.append(
            tag(
                "g",
                tag("title", f"{point.name}: {x.words(point.x)} {x.label}, {y.words(point.y)} {y.label}"),
                tag("circle", cx=left, cy=top, r=11),
                tag("text", point.mark, x=left, y=top, dy="0.35em", text_anchor="middle", class_="mark"),
                tag("text", point.name, x=left, y=top, dx=dx, dy=dy, text_anchor=anchor, class_="label"),
                class_=f"point {point.style}",
            )
        )
    return _svg(ident, "scatter", title, description, parts, x)


def _place(name: str, px: float, py: float, wide: float, high: float,
           taken: list[tuple[float, float, float, float]]) -> tuple[float, float, str]:  # fmt: skip
    """Where the label of a point stands so that it covers no other: dx, dy, anchor."""
    length = 6.8 * len(name)
    choices = (
        (16, 4, "start", (px + 14, py - 8, px + 16 + length, py + 8)),
        (-16, 4, "end", (px - 16 - length, py - 8, px - 14, py + 8)),
        (0, -17, "middle", (px - length / 2, py - 30, px + length / 2, py - 13)),
        (0, 26, "middle", (px - length / 2, py + 13, px + length / 2, py + 30)),
    )
    best = None
    for dx, dy, anchor, box in choices:
        outside = max(0.0, -box[0]) + max(0.0, box[2] - wide) + max(0.0, -box[1]) + max(0.0, box[3] - high)
        own = (px - 12, py - 12, px + 12, py + 12)
        hidden = sum(_overlap(box, other) for other in taken if other != own)
        cost = hidden + 20 * outside
        if best is None or cost < best[0] - 1e-9:
            best = (cost, dx, dy, anchor, box)
    assert best is not None
    taken.append(best[4])
    return best[1], best[2], best[3]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def bars(ident: str, title: str, description: str, y: Axis, values: Sequence[float | None],
         style: str, blocks: Sequence[tuple[int, int, str]]) -> Html:  # fmt: skip
    """One bar for each layer, in execution order; a value that is None (not finite) fills its column.

    Args:
        ident, title, description, y: as for `scatter`.
        values: one for each layer.
        style: class of the bars.
        blocks: (first layer, past the last, label) of layers that belong together.
    """
    width = 100 / len(values)
    # bars of few layers stay slender
    gap = max(min(0.25 * width, 0.5), width - 6)
    parts = []
    for k, (first, last, _) in enumerate(blocks):
        if k % 2:
            parts.append(tag("rect", x=f"{first * width:.4f}%", width=f"{(last - first) * width:.4f}%",
                             y="0", height="100%", class_="block"))  # fmt: skip
    parts += _grid(y, None)
    for i, value in enumerate(values):
        height = 100.0 if value is None else y.at(value)
        parts.append(
            tag("rect", x=f"{i * width + gap / 2:.4f}%", width=f"{width - gap:.4f}%",
                y=f"{100 - height:.3f}%", height=f"{height:.3f}%", data_layer=i,
                class_=f"bar {style if value is not None else 'unknown'}")
        )  # fmt: skip
    shown = -(-len(blocks) // 12)
    for first, last, label in blocks[::shown] if shown else ():
        middle = (first + last) / 2 * width
        parts.append(tag("text", label, x=f"{middle:.4g}%", y="100%", dy=16, text_anchor="middle",
                         class_="tick"))  # fmt: skip
    return _svg(ident, "bars", title, description, parts, None)


def blocks_of(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Runs of layers whose paths share all up to the first number: (first, past the last, number)."""
    found: list[tuple[int, int, str]] = []
    before = ""
    for i, name in enumerate(names):
        match = re.match(r"(?:.*?\.)?(\d+)(?=\.|$)", name)
        prefix = match.group(0) if match else ""
        if match and prefix == before:
            found[-1] = (found[-1][0], i + 1, found[-1][2])
        elif match:
            found.append((i, i + 1, match.group(1)))
        before = prefix
    return found


def meter(share: float, style: str) -> Html:
    """A bar for a number that stands beside it."""
    filled = tag("rect", width=f"{100 * min(1.0, max(0.004, share)):.4g}%", height="100%", rx=2, class_=style)
    track = tag("rect", width="100%", height="100%", rx=2, class_="track")
    return tag("svg", track, filled, class_="meter", aria_hidden="true", focusable="false")


def front(points: Sequence[Point], x: Axis, y: Axis, small_x: bool) -> list[Point]:
    """The points that no other is at least as good as in both coordinates and better in one."""

    def better(a: Point, b: Point) -> bool:
        ax, bx = (-a.x, -b.x) if small_x else (a.x, b.x)
        ay, by = y.at(a.y), y.at(b.y)
        return ax >= bx and ay >= by and (ax > bx or ay > by)

    return [p for p in points if not any(better(q, p) for q in points)]


# -- pieces ---------------------------------------------------------------------------------------


def _grid(y: Axis, x: Axis | None) -> list[Html]:
    parts = []
    for value in y.ticks:
        at = 100 - y.at(value)
        parts.append(_line(0, at, 100, at, "grid"))
        parts.append(tag("text", y.words(value), x="0", y=f"{at:.4g}%", dx=-8, dy="0.35em",
                         text_anchor="end", class_="tick"))  # fmt: skip
    for value in x.ticks if x else ():
        at = x.at(value) if x else 0
        parts.append(_line(at, 0, at, 100, "grid"))
        parts.append(tag("text", x.words(value) if x else "", x=f"{at:.4g}%", y="100%", dy=18,
                         text_anchor="middle", class_="tick"))  # fmt: skip
    parts.append(_line(0, 100, 100, 100, "axis"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return tag("line", x1=f"{x1:.4g}%", y1=f"{y1:.4g}%", x2=f"{x2:.4g}%", y2=f"{y2:.4g}%", class_=style)


def _svg(ident: str, kind: str, title: str, description: str, parts: Sequence[Html], x: Axis | None) -> Html:
    # a label, for a title would hang under the pointer wherever it goes
    drawn = tag("svg", tag("desc", description, id=f"{ident}-desc"), parts, class_=kind, role="img",
                aria_label=title, aria_describedby=f"{ident}-desc")  # fmt: skip
    below = tag("p", x.label, class_="axis-label", aria_hidden="true") if x else None
    return tag("div", drawn, below, class_="plot")


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5, 10, ... that is at least as large."""
    scale = 10.0 ** math.floor(math.log10(step))
    return next(m * scale for m in (1, 2, 5, 10) if m * scale >= step * (1 - 1e-9))
