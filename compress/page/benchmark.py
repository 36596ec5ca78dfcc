"""The page of a benchmark: `Benchmark.as_dict`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from compress.page import plots
from compress.page.markup import Cell, Child, Html, figure, table, tag, typeset, words
from compress.page.parts import (
    Data,
    Section,
    hero,
    latency_bars,
    layer_sections,
    left_alone,
    pace,
    provenance,
    ratio,
    recipe,
    shape_words,
    sqnr,
    tile,
)
from compress.report import decibel_words, decibels, size_words, thread_words, worst_output

_MAKERS = {"compress": "compress", "onnxruntime": "ONNX Runtime"}


def sections(data: Data) -> list[Section]:
    """All parts of the page, in order."""
    entries = data["entries"]
    done = [e for e in entries if e["status"] == "ok"]
    count = f"{len(entries)} candidate{'s' * (len(entries) != 1)}"
    name = str(data["provenance"].get("source") or "model")
    warnings = [*_failures(entries), *data["warnings"]]
    # it is written as it grows
    count += "" if data.get("complete", True) else " · not complete"
    found = [hero(f"benchmark · {count}", name, data["headline"], tiles(data, done), warnings)]
    if done:
        found.append(Section("trade-off", "Trade-off", trade_off(data)))
    found.append(Section("candidates", "Candidates", candidates(data)))
    if any(e["timings"] for e in done):
        found.append(Section("speed", "Speed", speed(data)))
    found.append(Section("fidelity", "Fidelity", fidelity(done, data.get("held_out"))))
    found += [Section(f"recipe-{mark(data, e)}", e["name"], details(data, e)) for e in done if e["report"]]
    more = [("took", f"{data['seconds']:.1f} s"), ("schema", f"version {data['schema_version']}")]
    found.append(Section("provenance", "Provenance", provenance(data, more)))
    return found


def mark(data: Data, entry: Data) -> str:
    """The number of an entry, in plots and table."""
    return str(1 + next(i for i, e in enumerate(data["entries"]) if e is entry))


def labels(data: Data) -> Callable[[Data], str]:
    """How a timing is named: its threads only where they differ."""
    threads = {t["threads"] for e in data["entries"] for t in e["timings"]}
    return partial(shape_words, threads=len(threads) > 1)


def first_timing(data: Data, entry: Data) -> Data | None:
    """The timing of an entry at the first shape of the benchmark, if it was measured."""
    first = next((t for e in data["entries"] for t in e["timings"]), None)
    if first is None:
        return None
    same = (t for t in entry["timings"] if (t["sizes"], t["threads"]) == (first["sizes"], first["threads"]))
    return next(same, None)


def judged_by(data: Data) -> str | None:
    """The metric, where it tells candidates apart; otherwise None, for the SQNR."""
    values = {e["metric"] for e in data["entries"] if e["metric"] is not None}
    return str(data["metric_name"]) if data.get("metric_name") and len(values) > 1 else None


def quality(data: Data, entry: Data) -> float | None:
    """What the vertical axis shows: the metric (`judged_by`), or the SQNR of the worst output, in dB."""
    if judged_by(data):
        return entry["metric"]
    found = worst_output(entry["fidelity"])
    return found["sqnr_db"] if found else None


def tiles(data: Data, done: Sequence[Data]) -> list[Html]:
    """Who is smallest, fastest and closest to the original."""
    found: list[Html] = []
    label = labels(data)
    if not done:
        return [tile("Result", "none", ["No candidate came to an end."], "bad")]
    before = data["float"]["bytes"]
    sized = [e for e in done if e["bytes"] and before]
    if sized:
        entry = min(sized, key=lambda e: e["bytes"])
        times, word, tone = ratio(before, entry["bytes"])
        lines = [entry["name"], f"{size_words(before)} → {size_words(entry['bytes'])}"]
        bar = plots.meter(entry["bytes"] / before, tone or "even")
        found.append(tile("Smallest", [times, " ", tag("small", word)], lines, tone, bar))
    timed = [(t, e) for e in done if (t := first_timing(data, e)) is not None]
    if timed:
        timing, entry = max(timed, key=lambda pair: pair[0]["speedup"])
        value, word, tone = pace(timing)
        others = [t for t in entry["timings"] if t is not timing]
        lines = [entry["name"], f"at {label(timing)}"]
        lines += [f"{' '.join(pace(t)[:2])} at {label(t)}" for t in others]
        found.append(tile("Fastest", [value, " ", tag("small", word)], lines, tone))
    close = [(fit, e) for e in done if (fit := worst_output(e["fidelity"]))]
    if close:
        fit, entry = max(close, key=lambda pair: decibels(pair[0]))
        lines = [entry["name"], f"cosine {fit['cosine']:.4f}" if fit["cosine"] is not None else ""]
        lines += [f"{100 * fit['top1']:.1f} % the same top-1"] if fit.get("top1") is not None else []
        value, _, unit = decibel_words(decibels(fit)).partition(" ")
        found.append(tile("Closest", [value, " ", tag("small", unit)], lines))
    judged = [e for e in done if e["metric"] is not None]
    if judged and data.get("metric_name"):
        sign = -1 if data["lower_is_better"] else 1
        entry = max(judged, key=lambda e: sign * e["metric"])
        original = data["float"].get("metric")
        lines = [entry["name"], f"{original:.4g} in float" if original is not None else ""]
        found.append(tile(f"Best {data['metric_name']}", f"{entry['metric']:.4g}", lines))
    return found


def trade_off(data: Data) -> list[Child]:
    """Quality against size, and against speed."""
    shown = [(e, q) for e in data["entries"] if e["status"] == "ok" and (q := quality(data, e)) is not None]
    if not shown:
        return [
            tag("p", "Nothing to plot: no candidate has a quality that is a finite number.", class_="empty")
        ]
    name = judged_by(data)
    unit = f"{name}, {'lower' if data['lower_is_better'] else 'higher'} is better" if name else "SQNR, dB"
    original = data["float"].get("metric") if name else None
    values = [q for _, q in shown] + ([original] if original is not None else [])
    y = plots.linear(unit, values, falls=bool(name and data["lower_is_better"]))
    figures = []
    before = data["float"]["bytes"]
    sized = [(e, q) for e, q in shown if e["bytes"] and before]
    if sized:
        unit, scale = ("MB", 1e6) if before >= 1e6 else ("kB", 1e3)
        x = plots.logarithmic(f"{unit}, log scale; further left is smaller",
                              [*(e["bytes"] / scale for e, _ in sized), before / scale])  # fmt: skip
        points = [_point(data, e, e["bytes"] / scale, q) for e, q in sized]
        figures.append(_plane(data, "size", "Size and quality", x, y, points, True,
                              (before / scale, f"float {size_words(before)}")))  # fmt: skip
    timed = [(e, q, t) for e, q in shown if (t := first_timing(data, e)) is not None]
    if timed:
        shape = labels(data)(timed[0][2])
        x = plots.linear(f"times as fast as float, {shape}", [*(t["speedup"] for _, _, t in timed), 1.0])
        points = [_point(data, e, t["speedup"], q) for e, q, t in timed]
        figures.append(_plane(data, "pace", "Speed and quality", x, y, points, False, (1.0, "float speed")))
    if not figures:
        return [tag("p", "Nothing to plot yet: neither sizes nor times are known.", class_="empty")]
    makers = dict.fromkeys(e["maker"] for e, _ in shown)
    key = [tag("li", tag("i", class_=f"dot {_style(m)}"), _MAKERS.get(m, m)) for m in makers]
    key.append(tag("li", tag("i", class_="dash"), "the best in this plane"))
    key.append(tag("li", tag("i", class_="dot ring"), "on the Pareto front of the benchmark"))
    plotted = [e for e, _ in shown]
    same = data.get("metric_name") if not name else None
    missing = [e["name"] for e in data["entries"] if e["status"] == "ok" and e not in plotted]
    note = f"The {same} does not tell them apart, so the plots show the SQNR. " if same else ""
    note += f"Not in the plots, for want of a finite quality: {', '.join(missing)}." if missing else ""
    return [tag("div", figures, class_="planes"), tag("ul", key, class_="key"),
            tag("p", note, class_="about") if note else None]  # fmt: skip


def _style(maker: str) -> str:
    return "ours" if maker == "compress" else "peer"


def _point(data: Data, entry: Data, x: float, y: float) -> plots.Point:
    style = _style(entry["maker"]) + (" ring" if entry["pareto"] else "")
    return plots.Point(entry["name"], mark(data, entry), x, y, style)


def _plane(data: Data, ident: str, title: str, x: plots.Axis, y: plots.Axis, points: Sequence[plots.Point],
           small_x: bool, line: tuple[float, str]) -> Html:  # fmt: skip
    border = plots.front(points, x, y, small_x)
    described = "; ".join(f"{p.name}: {p.x:.4g} and {p.y:.4g}" for p in points)
    drawn = plots.scatter(ident, f"{title}: {y.label}, against {x.label}",
                          f"{described}. Best in this plane: {', '.join(p.name for p in border)}.",
                          x, y, points, border, line)  # fmt: skip
    return tag("figure", tag("h3", title), tag("p", f"↑ {y.label}", class_="axis-label y"), drawn)


def candidates(data: Data) -> list[Child]:
    """All of them, and float, to sort."""
    done, label = [e for e in data["entries"] if e["status"] == "ok"], labels(data)
    shapes = list(dict.fromkeys(label(t) for e in done for t in e["timings"]))
    name = data.get("metric_name")
    memory = any(e["peak_memory_bytes"] for e in data["entries"])
    columns = [("candidate", "text"), ("file", "number"), ("smaller", "number")]
    columns += [("memory", "number")] * memory
    columns += [(shape, "number") for shape in shapes]
    columns += [("SQNR", "number"), ("cosine", "number"), ("same top-1", "number")]
    columns += [(str(name), "number")] * bool(name) + [("front", "text"), ("took", "number")]
    before = data["float"]["bytes"]
    rows = []
    for entry in data["entries"]:
        by = tag("small", _MAKERS.get(entry["maker"], entry["maker"]))
        dot = tag("i", mark(data, entry), class_=f"dot {_style(entry['maker'])}")
        shown = tag("span", dot, tag("span", entry["name"], " ", by), class_="named")
        fit = worst_output(entry["fidelity"]) or {}
        row = [Cell(shown, entry["name"])]
        size = entry["bytes"]
        if entry["status"] != "ok":
            tone = "" if entry["status"] == "skipped" else " bad"
            row.append(Cell(tag("span", entry["status"], class_=f"verdict{tone}"), None))
        else:
            row.append(_bytes(size))
        row.append(figure(before / size if before and size else None, ".2f", "×"))
        row += [_bytes(entry["peak_memory_bytes"])] * memory
        timings = {label(t): t for t in entry["timings"]}
        row += [_speed_cell(timings.get(shape)) for shape in shapes]
        row += [
            sqnr(fit) if fit else figure(None),
            figure(fit.get("cosine"), ".5f"),
            figure(None if fit.get("top1") is None else 100 * fit["top1"], ".1f", " %"),
        ]
        row += [figure(entry["metric"], ".5g")] * bool(name)
        rows.append([*row, words("yes" if entry["pareto"] else "no"), figure(entry["seconds"], ".1f", " s")])
    exported = tag(
        "span",
        tag("i", "–", class_="dot"),
        tag("span", "float ", tag("small", "uncompressed")),
        class_="named",
    )
    plain = [Cell(exported, "float"), _bytes(before), figure(1.0, unit="×")]
    plain += [_bytes(data["float"].get("peak_memory_bytes"))] * memory + [Cell("1.00×", 1.0)] * len(shapes)
    plain += [Cell("exact", math.inf), figure(1.0, ".5f"), figure(100.0, ".1f", " %")]
    plain += [figure(data["float"].get("metric"), ".5g")] * bool(name) + [words(""), figure(None)]
    about = "Under each shape: how many times as fast as float; red is slower, outside the noise."
    listed = table("Candidates, and the float export", columns, [plain, *rows], ident="candidates-table")
    return [tag("p", about, class_="about") if shapes else None, listed]


def _bytes(nbytes: int | None) -> Cell:
    return Cell(size_words(nbytes) if nbytes else "–", nbytes)


def _speed_cell(timing: Data | None) -> Cell:
    if timing is None:
        return Cell("–", None)
    tone = pace(timing)[2]
    shown = tag("span", f"{timing['speedup']:.2f}×", class_=f"verdict {tone}".strip())
    return Cell(shown, timing["speedup"])


def speed(data: Data) -> list[Child]:
    """For each shape the times of all candidates."""
    done, label = [e for e in data["entries"] if e["status"] == "ok"], labels(data)
    shapes = list(dict.fromkeys(label(t) for e in done for t in e["timings"]))
    floats = {label(t): t["ms"] for t in data["float"].get("timings", ())}
    figures = []
    for shape in shapes:
        timed = [(e, t) for e in done for t in e["timings"] if label(t) == shape]
        rows: list[tuple[str, float | None, Any, str]] = [
            ("float", floats.get(shape, timed[0][1]["float_ms"]), None, "reference")
        ]
        rows += [(e["name"], t["ms"], t, _style(e["maker"])) for e, t in timed]
        figures.append(latency_bars(shape, rows))
    about = (
        "Medians of interleaved runs against the uncompressed export; ± is half the interquartile range of "
        "the ratios of neighbouring runs. Each shape has its own scale."
    )
    threads = {t["threads"] for e in done for t in e["timings"]}
    about = f"{thread_words(threads.pop())}. {about}" if len(threads) == 1 else about
    return [tag("p", about, class_="about"), tag("div", figures, class_="shapes")]


def fidelity(done: Sequence[Data], held_out: str | None = None) -> list[Child]:
    """Each output of each candidate against the original."""
    columns = [("candidate", "text"), ("output", "text"), ("SQNR", "number"), ("cosine", "number"),
               ("same top-1", "number")]  # fmt: skip
    rows = [
        [
            words(e["name"]),
            Cell(tag("code", c["output"]), c["output"]),
            sqnr(c),
            figure(c["cosine"], ".5f"),
            figure(None if c["top1"] is None else 100 * c["top1"], ".2f", " %"),
        ]
        for e in done
        for c in e["fidelity"]
    ]
    if not rows:
        return [tag("p", "No output was compared.", class_="empty")]
    about = tag("p", f"On {held_out}.", class_="about") if held_out else None
    return [
        about,
        table("Outputs of each candidate against the original", columns, rows, ident="fidelity-table"),
    ]


def details(data: Data, entry: Data) -> list[Child]:
    """Layers, what was left alone and the recipe of one candidate, folded away."""
    report, prefix = entry["report"], f"r{mark(data, entry)}-"
    return [
        tag("p", typeset(report["headline"]), class_="about"),
        [tag("p", typeset(w), class_="about") for w in report["warnings"]],
        tag("details", tag("summary", f"Layers of {entry['name']}"), layer_sections(report, prefix)),
        tag("details", tag("summary", "Left alone"), left_alone(report)),
        tag("details", tag("summary", "Recipe"), recipe(report, prefix)),
    ]


def _failures(entries: Sequence[Data]) -> list[str]:
    return [f"{e['name']} {e['status']}: {e['error'] or 'no reason was given'}"
            for e in entries if e["status"] != "ok"]  # fmt: skip
