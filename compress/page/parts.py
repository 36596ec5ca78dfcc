"""What the pages of runs and benchmarks share: sections, tiles, layers, times, recipe, provenance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from compress.page import plots
from compress.page.markup import Cell, Child, Html, figure, path, table, tag, typeset, words
from compress.report import (
    decibel_words,
    decibels,
    noise,
    same_size,
    size_words,
    thread_words,
    unreached_words,
)

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page with a place in its navigation.

    Attributes:
        ident: its id.
        title: its heading; without one it is in no navigation.
        content: what stands in it.
    """

    ident: str
    title: str
    content: Sequence[Child]

    def html(self) -> Html:
        heading = tag("h2", self.title, id=f"{self.ident}-heading") if self.title else None
        label = f"{self.ident}-heading" if self.title else None
        return tag("section", heading, self.content, id=self.ident, aria_labelledby=label)


def hero(kicker: str, name: str, headline: str, tiles: Sequence[Html], warnings: Iterable[str]) -> Section:
    """The verdict: what it is about, one sentence, its figures, what to know before using it."""
    noted = [tag("li", typeset(w)) for w in warnings]
    return Section(
        "verdict",
        "",
        [
            tag("p", kicker, class_="kicker"),
            tag("h1", name),
            tag("p", typeset(headline[:1].upper() + headline[1:]), class_="headline"),
            tag("div", list(tiles), class_="tiles"),
            tag("div", tag("h2", "Know before you use it"), tag("ul", noted), class_="warnings")
            if noted
            else None,
        ],
    )


def tile(label: str, value: Child, lines: Iterable[Child], tone: str = "", bar: Html | None = None) -> Html:
    """One figure of the verdict.

    Args:
        label: what it is.
        value: in large letters.
        lines: what belongs to it.
        tone: "good", "bad" or "".
        bar: a `plots.meter`.
    """
    return tag(
        "div", tag("h2", label), tag("p", value, class_="value"), bar,
        [tag("p", line) for line in lines], class_=f"tile {tone}".strip(),
    )  # fmt: skip


def ratio(before: float, after: float) -> tuple[str, str, str]:
    """How much smaller: figure, word, tone."""
    times = before / after if after else float("inf")
    if same_size(times):
        return "1×", "same size", ""
    return (f"{times:.2f}×", "smaller", "good") if times > 1 else (f"{1 / times:.2f}×", "larger", "bad")


def pace(timing: Data) -> tuple[str, str, str]:
    """How much faster: figure, word, tone. Within its own spread (at least 5 %) it is no difference."""
    speedup = timing["speedup"]
    if abs(speedup - 1) <= noise(timing["spread"]):
        return "same", "speed", ""
    return (f"{speedup:.2f}×", "faster", "good") if speedup > 1 else (f"{1 / speedup:.2f}×", "slower", "bad")


def speedup_words(timing: Data) -> str:
    """The speed-up as a number, with its spread."""
    return f"speed-up {timing['speedup']:.2f} ± {timing['spread']:.2f}"


def shape_words(timing: Data, threads: bool = False) -> str:
    """Sizes of a timing, and its threads where they are asked for."""
    sizes = [f"{name} {n}" for name, n in timing["sizes"].items()] or ["fixed shape"]
    return " · ".join(sizes + ([thread_words(timing["threads"])] if threads else []))


def layer_sections(data: Data, prefix: str = "") -> list[Html]:
    """Plots and table of the layers of a run.

    Args:
        data: of the run.
        prefix: of the ids, where several runs are on one page.
    """
    rows = data["layers"]
    if not rows:
        return [tag("p", "No weight was changed.", class_="empty")]
    ident = f"{prefix}layer-table"
    runs_as = {form["weight"]: form["loads_as"] for form in (data.get("artifact") or {}).get("lowered", ())}
    return [layer_plots(rows, ident), layer_table(rows, ident, runs_as)]


def layer_plots(rows: Sequence[Data], ident: str) -> Html:
    """Error and bits of each layer, one above the other in execution order."""
    names = [row["layer"] for row in rows]
    blocks = plots.blocks_of(names)
    errors = [None if row["error"] is None else 100 * row["error"] for row in rows]
    known = [(e, n) for e, n in zip(errors, names, strict=True) if e is not None]
    largest = sorted(known, reverse=True)[:3]
    worst = ", ".join(f"{name} {error:.2f} %" for error, name in largest)
    bits = [row["bits"] for row in rows]
    error_axis = plots.linear("", [e for e, _ in known] or [1.0], zero=True)
    bits_axis = plots.linear("", [*bits, 1.0], zero=True)
    first, last = min(bits), max(bits)
    spread = f"{first:.2f}" if first == last else f"{first:.2f} to {last:.2f}"
    return tag(
        "figure",
        tag("h3", "Error of each layer's output, %"),
        plots.bars(f"{ident}-errors", "Error of each layer's output in percent, in execution order",
                   f"{len(rows)} layers. The largest: {worst}.", error_axis, errors, "error", ()),
        tag("h3", "Bits of each weight, scales included"),
        plots.bars(f"{ident}-bits", "Stored bits of each weight, in execution order",
                   f"{len(rows)} layers, {spread} bits.", bits_axis, bits, "bits", blocks),
        tag("p", "Layers in execution order" + (", by block" if blocks else ""), class_="axis-label"),
        tag("figcaption", "Largest errors: ",
            [join_code(i, name, error) for i, (error, name) in enumerate(largest)], class_="readout"),
        class_="layers-plot", data_table=ident,
    )  # fmt: skip


def join_code(index: int, name: str, error: float) -> Html:
    return tag("span", ", " if index else "", path(name), f" {error:.2f} %")


def layer_table(rows: Sequence[Data], ident: str, runs_as: Mapping[str, str]) -> Html:
    """The layers, to sort and filter."""
    actions = list(dict.fromkeys(row["action"] for row in rows))
    columns = [("layer", "text"), ("action", "text"), ("bits", "number"), ("zeros", "number"),
               ("before", "number"), ("after", "number"), ("error", "number")]  # fmt: skip
    noted = any(row["note"] for row in rows)
    runs = any(runs_as.get(row.get("weight", "")) for row in rows)
    columns += [("runs as", "text")] * runs + [("note", "text")] * noted
    cells = []
    for row in rows:
        error = row["error"]
        line = [
            Cell(path(row["layer"]), row["layer"]),
            words(row["action"]),
            figure(row["bits"]),
            Cell(f"{100 * row['sparsity']:.0f} %", row["sparsity"]),
            Cell(size_words(row["bytes_before"]), row["bytes_before"]),
            Cell(size_words(row["bytes"]), row["bytes"]),
            Cell("not finite" if error is None else f"{100 * error:.2f} %", error),
        ]
        line += [words(typeset(runs_as.get(row.get("weight", ""), "")))] * runs
        line += [words(row["note"])] * noted
        cells.append(line)
    select = tag("select", tag("option", "all actions", value=""),
                 [tag("option", a, value=a) for a in actions], id=f"{ident}-action")  # fmt: skip
    find = tag("input", type="search", id=f"{ident}-find", placeholder="layer, action, note",
               autocomplete="off", spellcheck="false")  # fmt: skip
    controls = tag(
        "div",
        tag("label", "Find ", find, class_="find"),
        tag("label", "Action ", select) if len(actions) > 1 else None,
        tag("span", f"{len(rows)} layers", class_="count", role="status"),
        class_="controls", data_table=ident, hidden=True,
    )  # fmt: skip
    listed = table(f"What was done to each of {len(rows)} layers", columns, cells, ident=ident)
    return tag("div", controls, listed, class_="layer-table")


def left_alone(data: Data) -> list[Html]:
    """What passes declined, with their reasons, each once, and what they noted of the whole model."""
    reasons: dict[tuple[str, str], list[str]] = {}
    general = []
    for step in data["passes"]:
        for note in step["notes"]:
            if not note["site"]:
                general.append((step["name"], note["reason"]))
                continue
            reasons.setdefault((step["name"], note["reason"]), []).append(note["site"])
    for weight, operator in data.get("unreached", {}).items():
        reasons.setdefault(("all passes", unreached_words(operator)), []).append(weight)
    rows = [
        [words(name), Cell(typeset(reason), reason), Cell(tag("ul", [tag("li", path(site)) for site in sites],
                                                              class_="sites"), None)]
        for (name, reason), sites in reasons.items()
    ]  # fmt: skip
    columns = [("pass", "text"), ("reason", "text"), ("layers", "text")]
    found = [table("What passes declined, and why", columns, rows)] if rows else []
    if not rows:
        found.append(tag("p", "No layer that could be compressed was left as it is.", class_="empty"))
    if general:
        noted = [tag("li", tag("b", name), f": {typeset(reason)}") for name, reason in general]
        found.append(tag("div", tag("h3", "Noted by passes"), tag("ul", noted), class_="noted"))
    return found


def sqnr(compared: Data) -> Cell:
    """The SQNR of a comparison."""
    value = decibels(compared)
    return Cell(decibel_words(value), value)


def fidelity_table(comparisons: Sequence[Data], label: str) -> Html:
    """What differs from what, by output."""
    columns = [("", "text"), ("output", "text"), ("SQNR", "number"), ("cosine", "number"),
               ("largest difference", "number"), ("same top-1", "number")]  # fmt: skip
    rows = [
        [
            words(c["what"]),
            Cell(path(c["output"]), c["output"]),
            sqnr(c),
            figure(c["cosine"], ".5f"),
            figure(c["max_abs"], ".3g"),
            Cell("–" if c["top1"] is None else f"{100 * c['top1']:.2f} %", c["top1"]),
        ]
        for c in comparisons
    ]
    return table(label, columns, rows)


def time_words(ms: float) -> str:
    """Milliseconds with at least three figures."""
    return f"{ms:.{max(0, min(4, 2 - math.floor(math.log10(ms)))) if ms > 0 else 0}f} ms"


def latency_bars(title: str, rows: Sequence[tuple[str, float | None, Data | None, str]]) -> Html:
    """Times of one shape, longest bar the slowest.

    Args:
        title: the shape.
        rows: (what, milliseconds, its timing or None for float, style of the bar).
    """
    longest = max((ms for _, ms, _, _ in rows if ms is not None), default=0.0)
    body = []
    for what, ms, timing, style in rows:
        verdict: Child = "the scale"
        if timing is not None:
            value, word, tone = pace(timing)
            verdict = [tag("span", f"{value} {word}", class_=f"verdict {tone}".strip()),
                       tag("small", speedup_words(timing))]  # fmt: skip
        bar = plots.meter(ms / longest, style) if ms is not None and longest else None
        body.append(
            tag("tr", tag("th", what, scope="row"), tag("td", bar, class_="bar"),
                tag("td", "–" if ms is None else time_words(ms), class_="number"),
                tag("td", verdict if timing is not None else tag("small", "reference")))
        )  # fmt: skip
    head = tag("tr", [tag("th", tag("span", t, class_="unseen"), scope="col")
                      for t in ("model", "bar", "median time", "against float")])  # fmt: skip
    return tag("figure", tag("h3", title),
               tag("table", tag("caption", f"Times at {title}", class_="unseen"), tag("thead", head),
                   tag("tbody", body), class_="latency"), class_="shape")  # fmt: skip


def recipe(data: Data, prefix: str = "") -> list[Html]:
    """The resolved recipe as a file, and what each pass took."""
    text = yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True)
    rows = [
        [words(step["name"]), figure(len(step["changes"]), "d"), figure(step.get("seconds"), ".1f", " s")]
        for step in data["passes"]
    ]
    option = tag("code", "--recipe")
    columns = [("pass", "text"), ("weights changed", "number"), ("time", "number")]
    return [
        tag(
            "div",
            tag("div", tag("p", "Every default written out; saved as a file, ", option, " takes it again."),
                tag("pre", tag("code", text), id=f"{prefix}recipe-text", tabindex=0, data_copies=True)),
            table("Passes of the recipe", columns, rows, stacks=False),
            class_="pair",
        )
    ]  # fmt: skip


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and values; those that are empty are left out, but a 0 is none of them."""
    items = []
    for name, value in pairs:
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list | tuple):
            value = "; ".join(map(str, value))
        long = len(str(value)) == 64 and " " not in str(value)
        items.append(tag("div", tag("dt", name.replace("_", " ")),
                         tag("dd", tag("code", str(value)) if long else str(value))))  # fmt: skip
    return tag("dl", items, class_="facts")


def provenance(data: Data, more: Iterable[tuple[str, Any]] = ()) -> list[Html]:
    """Where it came from and on what it was made."""
    known = dict(data["provenance"])
    names = {"sha256": "SHA-256 of the model", "calibration_sha256": "SHA-256 of the calibration data"}
    machine = known.pop("machine", None)
    pairs = [(names.get(key, key), value) for key, value in known.items()]
    pairs += [("calibration", data.get("calibration")), ("machine", machine), *more]
    return [facts(pairs)]
