"""A report as a model card: Markdown with the front matter of Hugging Face, ready to be a README."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from compress.artifact import Timing
from compress.report import (
    decibel_words,
    decibels,
    size_words,
    speed_words,
    thread_words,
    unreached_words,
    worst_output,
)

Data = Mapping[str, Any]

_TAGS = {"onnx": "onnx", "torch": "pytorch", "tensorrt": "tensorrt"}
_USE = {
    "onnx": "import onnxruntime\n\nsession = onnxruntime.InferenceSession({path})\n"
    "print([(x.name, x.type, x.shape) for x in session.get_inputs()])",
    "torch": "import compress\n\nmodule = compress.load({path})",
}


def card(data: Data) -> str:
    """The Markdown of a report; the same data gives the same text.

    What is not known, such as the license or the base model, is left out of the front matter.

    Args:
        data: of `Report.as_dict` or `Benchmark.as_dict`.
    """
    lines = _benchmark(data) if data.get("kind") == "benchmark" else _run(data)
    return "\n".join(lines) + "\n"


def _run(data: Data) -> list[str]:
    artifact, verification = data["artifact"] or {}, data["verification"]
    recipe = str(data["recipe"].get("metadata", {}).get("name", "recipe"))
    target = artifact.get("target", "")
    lines = _front([_TAGS.get(target, target), recipe], "onnx" if target == "onnx" else None)
    lines += _head(f"{data['provenance'].get('source') or 'model'}: {recipe}", data)
    if target in _USE:
        lines += [
            "## How to run it",
            "",
            "```python",
            _USE[target].format(path=repr(artifact["path"])),
            "```",
            "",
        ]
    if artifact.get("built_for"):
        lines += ["## Built for", ""]
        lines += [f"- {what}: {value}" for what, value in artifact["built_for"].items()] + [""]
    if verification:
        lines += _fidelity(verification) + _metric(verification) + _speed(verification)
    lines += ["## Layers", ""]
    rows = [
        (_code(r["layer"]), r["action"], f"{r['bits']:.2f}", f"{100 * r['sparsity']:.0f} %",
         f"{size_words(r['bytes_before'])} -> {size_words(r['bytes'])}", _figure(r["error"], "{:.2%}"),
         r["note"])
        for r in data["layers"]
    ]  # fmt: skip
    lines += _table(("layer", "action", "bits", "sparsity", "bytes", "error", ""), rows)
    lines += _left_alone(data)
    recipe_file = yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True)
    lines += ["## Recipe", "", "```yaml", *recipe_file.splitlines(), "```", ""]
    machine = (verification or {}).get("environment")
    return lines + _provenance(data, {"machine": machine, "took": f"{data['seconds']:.1f} s"})


def _benchmark(data: Data) -> list[str]:
    lines = _front(["benchmark"], None)
    lines += _head(f"{data['provenance'].get('source') or 'model'}: benchmark", data)
    name = data.get("metric_name")
    shapes = {_shape(t): t for e in data["entries"] for t in e["timings"]}
    head = ("candidate", "by", "file", "smaller", "peak memory", *(f"speed-up, {s}" for s in shapes),
            "SQNR dB", "cosine", "top-1 agreement", *([name] if name else []), "Pareto front")  # fmt: skip
    before = data["float"]
    exact = ("exact", "1", "100 %")
    rows = [
        ("float", "", _figure(before["bytes"] or None, size_words), "1",
         _figure(before.get("peak_memory_bytes"), size_words), *("1" for _ in shapes), *exact,
         *([_figure(before.get("metric"), "{:.5g}")] if name else []), "")
    ]  # fmt: skip
    for e in data["entries"]:
        maker = "ONNX Runtime" if e["maker"] == "onnxruntime" else e["maker"]
        if e["status"] != "ok":
            rows.append((e["name"], maker, f"{e['status']}: {e['error'] or ''}", *[""] * (len(head) - 3)))
            continue
        worst = worst_output(e["fidelity"]) or {}
        timings = {_shape(t): t for t in e["timings"]}
        rows.append(
            (e["name"], maker, _figure(e["bytes"], size_words),
             _figure(before["bytes"] / e["bytes"] if before["bytes"] and e["bytes"] else None, "{:.2f}"),
             _figure(e["peak_memory_bytes"], size_words), *(_ratio(timings.get(s)) for s in shapes),
             decibel_words(decibels(worst), "") if worst else "–",
             _figure(worst.get("cosine"), "{:.5f}"), _figure(worst.get("top1"), "{:.2%}"),
             *([_figure(e["metric"], "{:.5g}")] if name else []), "yes" if e["pareto"] else "")
        )  # fmt: skip
    lines += ["## Candidates", "", *_table(head, rows)]
    lines += [
        "Speed-ups are medians of interleaved runs against the float export, ± half the interquartile "
        "range of the ratios; below 1 is slower. Fidelity is that of the worst output, on "
        f"{_plain(data['held_out'])}.",
        "",
    ]
    if name:
        lines += [f"Of the {name}, {'lower' if data['lower_is_better'] else 'higher'} is better.", ""]
    return lines + _provenance(data, {"took": f"{data['seconds']:.1f} s"})


# -- pieces ---------------------------------------------------------------------------------------


def _front(tags: Sequence[str], library: str | None) -> list[str]:
    front: dict[str, Any] = {"library_name": library} if library else {}
    front["tags"] = list(dict.fromkeys(["compress", *filter(None, tags)]))
    return ["---", *yaml.safe_dump(front, sort_keys=False).splitlines(), "---", ""]


def _head(title: str, data: Data) -> list[str]:
    lines = [f"# {_plain(title)}", "", f"**{_plain(data['headline'])}**", ""]
    lines += [f"Calibration: {_plain(data['calibration'])}", ""]
    return lines + [f"- {_plain(w)}" for w in data["warnings"]] + ([""] if data["warnings"] else [])


def _fidelity(v: Data) -> list[str]:
    lines = ["## Fidelity", "", f"On {v['inputs']}.", ""] + (
        [f"{v['stands_in']}.", ""] if v["stands_in"] else []
    )
    rows = [
        (c["what"], _code(c["output"]), decibel_words(decibels(c), ""),
         _figure(c["cosine"], "{:.5f}"), _figure(c["max_abs"], "{:.3g}"), _figure(c["top1"], "{:.2%}"))
        for c in v["comparisons"]
    ]  # fmt: skip
    return lines + _table(("", "output", "SQNR dB", "cosine", "max abs", "top-1 agreement"), rows)


def _metric(v: Data) -> list[str]:
    m = v["metric"]
    if not m:
        return []
    lines = [f"The perplexity is that of {v['measured_on']}.", ""] if v["measured_on"] else []
    name = f"{v['metric_name']}, lower is better" if v["lower_is_better"] else v["metric_name"]
    rows = [(name, *(_figure(m[k], "{:.5g}") for k in ("original", "compressed", "file")))]
    if v["kl"]:
        what = "KL divergence from the original, nats per token"
        rows.append((what, "0", *(_figure(v["kl"][k], "{:.3g}") for k in ("compressed", "file"))))
    return lines + _table(("metric", "original", "compressed graph", "file"), rows)


def _speed(v: Data) -> list[str]:
    if not v["timings"]:
        return []
    env = v["environment"]
    counts = {t["threads"] for t in v["timings"]}
    several = len(counts) > 1
    where = (env.get("runtime"), "" if several else thread_words(*counts), env.get("processor"))
    about = (
        f"{', '.join(filter(None, where)) or 'as measured'}; medians of interleaved runs against the "
        "uncompressed export. The "
        "speed-up is the median of the ratios of neighbouring runs, ± half their interquartile range."
    )
    lines = ["## Speed", "", about, ""]
    rows = [
        (_shape(t) if several else _sizes(t), _figure(t["float_ms"], "{:.3f}"),
         _figure(t["compressed_ms"], "{:.3f}"), _ratio(t), speed_words(Timing(**t)))
        for t in v["timings"]
    ]  # fmt: skip
    return lines + _table(("shape", "float ms", "compressed ms", "speed-up", ""), rows)


def _left_alone(data: Data) -> list[str]:
    noted = [(s["name"], n["site"], n["reason"]) for s in data["passes"] for n in s["notes"] if n["site"]]
    noted += [
        ("all passes", weight, unreached_words(operator)) for weight, operator in data["unreached"].items()
    ]
    lines = [f"- {_code(site)} ({name}): {_plain(reason)}" for name, site, reason in noted]
    return ["## Left alone", "", *lines, ""] if lines else []


def _provenance(data: Data, more: Mapping[str, Any]) -> list[str]:
    lines = ["## Provenance", ""]
    for key, value in {**data["provenance"], **more}.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "; ".join(map(str, value))
        # a seed of 0 is a seed
        lines += [f"- {key.replace('_', ' ')}: {_plain(str(value))}"] if value not in (None, "") else []
    return lines


def _shape(timing: Data) -> str:
    return f"{_sizes(timing)}, {thread_words(timing['threads'])}"


def _sizes(timing: Data) -> str:
    return ", ".join(f"{name} {n}" for name, n in timing["sizes"].items()) or "fixed shape"


def _ratio(timing: Data | None) -> str:
    return "–" if timing is None else f"{timing['speedup']:.2f} ± {timing['spread']:.2f}"


def _figure(value: Any, form: str | Callable[[Any], str]) -> str:
    """A number in words; "–" where there is none, or where it is not finite."""
    if value is None:
        return "–"
    return (form(value) if callable(form) else form.format(value)).replace("%", " %")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell if cell.startswith("`") else _plain(cell) for cell in line] for line in lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells] + [""]


def _plain(text: str) -> str:
    """On one line, without links, images and HTML: names come from models."""
    return " ".join(text.split()).replace("<", "&lt;").replace("[", "\\[").replace("`", "'")


def _code(name: str) -> str:
    """A name as code; what would end the code is replaced."""
    return f"`{' '.join(name.split()).replace('`', chr(39))}`"
