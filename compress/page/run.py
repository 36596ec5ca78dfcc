"""The page of one run: `Report.as_dict`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.page import plots
from compress.page.markup import Cell, Child, Html, path, table, tag, typeset, words
from compress.page.parts import (
    Data,
    Section,
    facts,
    fidelity_table,
    hero,
    latency_bars,
    layer_sections,
    left_alone,
    pace,
    provenance,
    ratio,
    recipe,
    shape_words,
    speedup_words,
    tile,
)
from compress.report import decibel_words, decibels, size_words, thread_words, worst_output


def name_of(data: Data) -> str:
    """What was compressed."""
    return str(data.get("provenance", {}).get("source") or "model")


def sections(data: Data) -> list[Section]:
    """All parts of the page, in order; parts there is nothing to say in are left out."""
    verification = data.get("verification")
    name = data["recipe"].get("metadata", {}).get("name", "recipe")
    target = (data.get("artifact") or {}).get("target")
    kicker = f"recipe {name}" + (f" · {target}" if target else " · nothing written yet")
    found = [hero(kicker, name_of(data), data["headline"], tiles(data), data["warnings"])]
    if verification and (verification["timings"] or verification.get("stands_in")):
        found.append(Section("speed", "Speed", speed(verification)))
    if verification:
        found.append(Section("fidelity", "Fidelity", fidelity(verification)))
    found.append(Section("layers", "Layers", layer_sections(data)))
    built = (data.get("artifact") or {}).get("layers")
    if built:
        found.append(Section("engine", "Engine", engine(data["artifact"])))
    found.append(Section("left-alone", "Left alone", left_alone(data)))
    found.append(Section("recipe", "Recipe", recipe(data)))
    environment = (verification or {}).get("environment")
    more = [("machine", environment), *outcome(data)]
    found.append(Section("provenance", "Provenance", provenance(data, more)))
    return found


def tiles(data: Data) -> list[Html]:
    """Size, speed, fidelity, the metric, the proof."""
    return [made for make in (_size, _speed, _fidelity, _metric, _proof) if (made := make(data))]


def _size(data: Data) -> Html:
    verification, artifact = data.get("verification"), data.get("artifact")
    before, after = data["float_bytes"], data["tensor_bytes"]
    if artifact:
        before, after = (verification or {}).get("float_bytes") or before, artifact["bytes"]
    times, word, tone = ratio(before, after)
    lines = [
        f"{size_words(before)} → {size_words(after)}",
        "of the file" if artifact else "of the weights alone",
    ]
    bar = plots.meter(after / before if before else 0, tone or "even")
    return tile("Size", [times, " ", tag("small", word)], [" ".join(lines)], tone, bar)


def _speed(data: Data) -> Html | None:
    verification = data.get("verification")
    if not verification:
        return None
    timings = verification["timings"]
    if not timings:
        reason = verification.get("stands_in") or "No batch size was timed."
        return tile("Speed", "–", [typeset(reason)])
    value, word, tone = pace(timings[0])
    several = _threads_differ(verification)
    lines: list[Child] = [f"at {shape_words(timings[0], several)}, {speedup_words(timings[0])}"]
    for timing in timings[1:]:
        times, pace_word, kind = pace(timing)
        said = f"{times} {pace_word} at {shape_words(timing, several)}"
        lines.append(tag("span", said, class_="bad-text" if kind == "bad" else None))
    return tile("Speed", [value, " ", tag("small", word)], lines, tone)


def _fidelity(data: Data) -> Html | None:
    compared = [
        c for c in (data.get("verification") or {}).get("comparisons", ()) if c["what"] == "file vs original"
    ]
    worst = worst_output(compared)
    if worst is None:
        return None
    value = decibels(worst)
    if math.isinf(value):
        tone = "good" if value > 0 else "bad"
        return tile("Fidelity", decibel_words(value), ["outputs of the file, beside the original's"], tone)
    lines: list[Child] = [
        f"{decibel_words(value)} to the original",
        [path(worst["output"]), ", the worst output"],
    ]
    if worst["top1"] is not None:
        lines.append(f"{100 * worst['top1']:.1f} % the same top-1")
    return tile("Fidelity", [f"{worst['cosine']:.4f}", " ", tag("small", "cosine")], lines)


def _metric(data: Data) -> Html | None:
    v = data.get("verification") or {}
    metric = v.get("metric")
    if not metric:
        return None
    before, after = metric["original"], metric["file"]
    lines = [f"from {_number(before)} of the original"]
    tone = ""
    if before is not None and after is not None:
        drop = (before - after) * (-1 if v.get("lower_is_better") else 1)
        tone = "good" if drop <= 0 else ""
        lines.append(f"{'worse' if drop > 0 else 'better'} by {abs(drop):.4g}" if drop else "the same")
    if v.get("lower_is_better"):
        lines.append("lower is better")
    if v.get("kl"):
        lines.append(f"KL {_number(v['kl']['file'])} nats/token")
    name = v.get("metric_name", "metric")
    return tile(name[:1].upper() + name[1:], _number(after), lines, tone)


def _proof(data: Data) -> Html | None:
    artifact = data.get("artifact")
    if not artifact:
        return None
    proof = artifact["proof_db"]
    shown = "exact" if proof is None else [f"{proof:.0f}", " ", tag("small", "dB")]
    return tile("Proof", shown, ["the written file, run operator by operator, against the compressed model"])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def speed(verification: Data) -> list[Child]:
    """One group of bars for each shape."""
    env = verification.get("environment", {})
    if not verification["timings"]:
        return [tag("p", typeset(f"{verification['stands_in']}."), class_="empty")]
    runtime = env.get("runtime") or ", ".join(f"{k} {v}" for k, v in env.items() if k.startswith("onnx"))
    several = _threads_differ(verification)
    threads = "" if several else thread_words(verification["timings"][0]["threads"])
    where = ", ".join(filter(None, [runtime, threads, env.get("processor")]))
    shapes = [
        latency_bars(
            shape_words(t, several),
            [("float", t["float_ms"], None, "reference"),
             ("compressed", t["compressed_ms"], t, pace(t)[2] or "even")],
        )
        for t in verification["timings"]
    ]  # fmt: skip
    about = (
        f"{where + '. ' if where else ''}Medians of interleaved runs; the speed-up is the median of the "
        "ratios of neighbouring runs, ± half their interquartile range. Each shape has its own scale."
    )
    slow = verification.get("unfused") or []
    return [
        tag("p", about, class_="about"),
        tag("div", shapes, class_="shapes"),
        tag("p", "Decoded on every call, so slow: ", [_listed(i, w) for i, w in enumerate(slow)])
        if slow
        else None,
    ]


def _threads_differ(verification: Data) -> bool:
    """Then each timing is named with its threads."""
    return len({timing["threads"] for timing in verification["timings"]}) > 1


def _listed(index: int, name: str) -> Html:
    return tag("span", ", " if index else "", path(name))


def fidelity(v: Data) -> list[Child]:
    """Comparisons of outputs, and the metric."""
    content: list[Child] = [tag("p", f"On {v['inputs']}.", class_="about")]
    content.append(fidelity_table(v["comparisons"], "Outputs compared"))
    if v.get("metric"):
        if v.get("measured_on"):
            content.append(tag("p", f"The {v['metric_name']} is that of {v['measured_on']}.", class_="about"))
        content.append(_metric_table(v))
    return content


def _metric_table(v: Data) -> Html:
    columns = [("", "text"), ("original", "number"), ("compressed graph", "number"), ("file", "number")]

    def line(name: str, values: Mapping[str, Any]) -> list[Cell]:
        return [words(name), *(Cell(_number(values.get(k)) if k in values else "0", values.get(k))
                               for k in ("original", "compressed", "file"))]  # fmt: skip

    better = "lower is better" if v.get("lower_is_better") else "higher is better"
    rows = [line(f"{v.get('metric_name', 'metric')}, {better}", v["metric"])]
    if v.get("kl"):
        rows.append(line("KL divergence from the original, nats per token", v["kl"]))
    return table("The metric", columns, rows)


def engine(artifact: Data) -> list[Child]:
    """What a compiled file is for, and the layers its compiler made."""
    columns = [("layer of the engine", "text"), ("kind", "text"), ("reads", "text"), ("writes", "text"),
               ("weights", "text"), ("stands for", "number")]  # fmt: skip
    rows = [
        [
            Cell(path(layer["name"]), layer["name"]),
            words(layer["kind"]),
            words(", ".join(dict.fromkeys(layer["inputs"]))),
            words(", ".join(dict.fromkeys(layer["outputs"]))),
            words(", ".join(f"{kind} {'×'.join(map(str, shape))}" for kind, shape in layer["constants"])),
            Cell(f"{len(layer['nodes'])} nodes", len(layer["nodes"])),
        ]
        for layer in artifact["layers"]
    ]
    return [facts(artifact.get("built_for", {}).items()),
            table("Layers of the engine", columns, rows, ident="engine-table")]  # fmt: skip


def outcome(data: Data) -> list[tuple[str, Any]]:
    """What else is known of a run."""
    artifact = data.get("artifact") or {}
    built = artifact.get("built_for")
    return [
        ("file", artifact.get("path")),
        ("built for", None if artifact.get("layers") else built),
        ("parameters", f"{data['parameters']:,}"),
        ("took", f"{data['seconds']:.1f} s"),
        ("schema", f"version {data['schema_version']}"),
    ]
