"""The tables of results in README.md, from what `bench/run.py` wrote to bench/results/.

    python bench/readme.py

Rewrites what stands between the two ``results`` comments. A cell is a template: ``{name|.2f}`` is the
measurement of that name. A test holds README.md and bench/results/ together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_BEGIN, _END = "<!-- results: made by bench/readme.py -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Row:
    """One line of the table; `model` is empty where it repeats the line above."""

    case: str
    model: str
    form: str
    size: str
    quality: str
    speed: str


def _minilm(form: str, name: str, model: str = "") -> Row:
    speeds = " · ".join(f"{{{name}: speed-up at {shape}|.2f}}" for shape in ("1x32", "1x128", "8x128"))
    quality = f"cosine {{{name}: mean cosine to the float embeddings|.4f}}"
    return Row("minilm", model, form, f"{{{name}: file|.1f}} MB", quality, speeds)


def _resnet20(form: str, name: str) -> Row:
    name = f"akamaster {name}"
    quality = f"{{{name}: accuracy lost, file|.1f}} points lost"
    return Row(
        "resnet20", "", form, f"{{{name}: file|.0f}} kB", quality, f"{{{name}: speed-up at batch 1|.2f}}"
    )


def _lm(form: str, name: str) -> Row:
    speeds = " · ".join(f"{{{name}: speed-up at {shape}|.2f}}" for shape in ("1x16", "1x256"))
    return Row("lm", "", form, f"{{{name}: file|.1f}} MB", f"perplexity {{{name}: perplexity|.2f}}", speeds)


ROWS = (
    Row(
        "minilm",
        "all-MiniLM-L6-v2 (1×32 · 1×128 · 8×128 tokens)",
        "float",
        "{float: file|.1f} MB",
        "cosine 1",
        "1",
    ),
    _minilm("**int8**", "int8"),
    _minilm("ONNX Runtime dynamic int8", "int8 ONNX Runtime dynamic"),
    _minilm("**int8-weight-only**", "int8-weight-only"),
    _minilm("**int4**", "int4"),
    _minilm("ONNX Runtime int4, RTN", "int4 ONNX Runtime RTN"),
    _minilm("ONNX Runtime int4, HQQ", "int4 ONNX Runtime HQQ"),
    Row(
        "lm",
        "7.4 M language model, WikiText-2 (1×16 · 1×256 tokens)",
        "float",
        "{float: file|.1f} MB",
        "perplexity {float: perplexity|.2f}",
        "1",
    ),
    _lm("**int8**", "int8"),
    _lm("ONNX Runtime dynamic int8", "int8 ONNX Runtime dynamic"),
    _lm("**int8-weight-only**", "int8-weight-only"),
    _lm("**int4**", "int4"),
    _lm("ONNX Runtime int4, RTN", "int4 ONNX Runtime RTN"),
    _lm("ONNX Runtime int4, HQQ", "int4 ONNX Runtime HQQ"),
    Row(
        "resnet20",
        "ResNet-20, CIFAR-10 (batch 1)",
        "float",
        "{akamaster: file, float|.0f} kB",
        "{akamaster: accuracy, float|.1f} %",
        "1",
    ),
    _resnet20("**int8**", "int8"),
    _resnet20("**int8-weight-only**", "int8-weight-only"),
    _resnet20("ONNX Runtime static int8", "int8 ONNX Runtime static"),
    _resnet20("**int4**", "int4"),
)


PRUNED = (
    ("magnitude", ": accuracy, magnitude"),
    ("CHITA, its authors' code, the best of all settings", ""),
    ("**prune_chita**, without refit", ": accuracy"),
    ("**prune_chita**", ": accuracy, refitted"),
)
"""Rows of the table of pruning: what, and the end of the measurement's name; empty for the targets."""

STAGED = (*PRUNED[:2], ("**prune_chita**", ": accuracy"))

DECOMPOSED = (
    ("SVD, the same reduction in each layer", "SVD, uniform"),
    ("Tucker-2, the same", "Tucker-2, uniform"),
    ("ALDS (equal error bounds)", "ALDS"),
    ("**decompose**", "ours"),
)
"""Rows of the table of decomposition: what, and how the measurements call it."""

COMPACTIFIED = (
    ("float", "float", ""),
    ("int4, groups of 32", "int4", ""),
    ("int2, groups of 64", "int2", ""),
    ("matrix products", "mpo -70 %", ""),
    ("matrix products, int8", "mpo -70 %", ", int8"),
    ("matrix products, int4", "mpo -70 %", ", int4"),
    ("low rank", "low rank -70 %", ""),
    ("low rank, int8", "low rank -70 %", ", int8"),
    ("low rank, int4", "low rank -70 %", ", int4"),
)
"""Rows of the table of tensor networks: what, the form, and what follows its recovery."""

_REDUCTIONS = (30, 40, 50, 60, 70)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The lines between the comments, comments included.

    Args:
        results: by case name, as `bench/run.py` writes them.
    """
    lines = ["| model | form | file | quality | speed against float |", "|---|---|---:|---|---|"]
    for row in ROWS:
        values = {m["name"]: m["value"] for m in results[row.case]["measurements"]}
        cells = (row.model, row.form, row.size, row.quality, row.speed)
        lines.append("| " + " | ".join(_filled(cell, values) for cell in cells) + " |")
    machines = {_machine(results[case]["environment"]) for case in {row.case for row in ROWS}}
    lines += [
        "",
        f"Measured in ONNX Runtime, one thread, medians of interleaved runs: {'; '.join(sorted(machines))}.",
        "Bold is ours. Below 1 is slower than float. `python bench/run.py minilm lm resnet20` repeats it.",
        "",
        *_weights(results["weights"]),
        "",
        "Peers: Neural Compressor (rtn, hqq, gptq), Brevitas (gptq, gpfq, qronos); same samples and bits.",
        "`python bench/run.py weights` repeats it.",
        "",
        *_pruning(results["chita"], "ResNet-20", "ResNet-20 pruned at once", (50, 60, 70, 80, 90), PRUNED),
        "",
        _filled(
            "Percent of 1,000 test images; mean of three draws of {ResNet-20: images to prune with|,d} "
            "images to prune with; no training.\n"
            "Pruned to 90 % by magnitude while it learns from its dense outputs (`prune_gradual`), for "
            "{ResNet-20 90 %: processor time|.0f} minutes\non {ResNet-20: images, without their labels|,d} "
            "images without labels, it loses {ResNet-20 90 %: accuracy lost, gradual|.1f} points. "
            "`python bench/run.py chita recover` repeats it.",
            {m["name"]: m["value"] for case in ("chita", "recover") for m in results[case]["measurements"]},
        ),
        "",
        *_pruning(
            results["chita_stages"],
            "MLPNet, 15 stages",
            "MLPNet (MNIST) pruned in 15 stages that train",
            (50, 70, 90, 95, 98),
            STAGED,
        ),
        "",
        "Percent of the test images; mean of three seeds. `python bench/run.py chita_stages` repeats it.",
        "",
        *_decomposition(results["decompose"]),
        "",
        _filled(
            "Percent of 1,000 test images; 512 images to measure with; no training. On JPEGs of all 10,000 "
            "test\nimages, at -30 %: ALDS {ResNet-20 -30 % ALDS: accuracy on JPEGs|.1f}, **decompose** "
            "{ResNet-20 -30 % ours: accuracy on JPEGs|.1f}. Without 60 % of the parameters and recovered for "
            "{ResNet-20 -60 % ours, recovered: processor time|.0f}\nminutes on 14,000 images without labels, "
            "**decompose** loses {ResNet-20 -60 % ours, recovered: accuracy lost|.1f} points, ALDS "
            "{ResNet-20 -60 % ALDS, recovered: accuracy lost|.1f}.\n"
            "`python bench/run.py decompose decompose_recover` repeats it.",
            {
                m["name"]: m["value"]
                for case in ("decompose", "decompose_recover")
                for m in results[case]["measurements"]
            },
        ),
        "",
        *_compactified(results["compactifai"]),
        "",
        _filled(
            "Linear layers of the blocks; where they are quantized, all the rest is in 4 bits. Recovered: "
            "one pass\nover 262,144 tokens towards the original's probabilities, before quantizing. Of those "
            "without 91 % of the\nbytes the best: "
            "{of those with 91 % of the bytes removed or more, the best|s}. "
            "`python bench/run.py compactifai` repeats it.",
            {m["name"]: m["value"] for m in results["compactifai"]["measurements"]},
        ),
        "",
        _filled(
            "Decoding with a key-value cache, one thread, a random Llama of d = 2048 and "
            "{random Llama: parameters|.0f} million parameters in\n`lm-int4`: "
            "{d = 2048, lm-int4: decoding|.1f} tokens/s against {d = 2048, lm-int4: decoding, float|.1f} in "
            "float (**{d = 2048, lm-int4: decoding at batch 1, speed-up|.1f}x**); a prompt of 256 tokens "
            "{d = 2048, lm-int4: prompt of 256 tokens, speed-up|.2f}x; {d = 2048, lm-int4: file|.2f} of the "
            "bytes.\n"
            "`python bench/run.py lm_decode` repeats it, and holds what a file generates against its graph.",
            {m["name"]: m["value"] for m in results["lm_decode"]["measurements"]},
        ),
    ]
    return "\n".join([_BEGIN, *lines, _END])


def _weights(found: dict[str, Any]) -> list[str]:
    """Ours against whichever peer did best, at each width."""
    values = {m["name"]: m["value"] for m in found["measurements"]}
    lines = [
        "| weights alone, groups of 32 | bits | **ours** | best peer | | our time / its |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for subject, model, measure, digits in (
        ("lm", "7.4 M language model, perplexity", "perplexity", 2),
        ("minilm", "all-MiniLM-L6-v2, 1 - cosine", "1 - cosine", 4),
    ):
        for bits in (4, 3, 2):
            what = f"{subject} {bits} bits"
            (ratio,) = (name for name in values if name.startswith(f"{what}: ours best, processor time"))
            peer = ratio.rsplit(" of ", 1)[1]
            ours, theirs = (values[f"{what}, {who}: {measure}"] for who in ("ours best", peer))
            named = peer.replace("_", " ")
            cells = (
                model,
                str(bits),
                f"{ours:.{digits}f}",
                f"{theirs:.{digits}f}",
                named,
                f"{values[ratio]:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
            model = ""
    return lines


def _pruning(
    found: dict[str, Any], net: str, what: str, sparsities: Sequence[int], rows: Sequence[tuple[str, str]]
) -> list[str]:
    measured = {m["name"]: m for m in found["measurements"]}
    names = [f"{net} {percent} %" for percent in sparsities]
    dense = measured[f"{net}: accuracy, dense"]["value"]
    lines = [
        f"| {what} ({dense:.1f} % dense) | " + " | ".join(f"{percent} %" for percent in sparsities) + " |"
    ]
    lines.append("|---|" + "---:|" * len(names))
    for row, end in rows:
        if end:
            cells = [f"{measured[name + end]['value']:.1f}" for name in names]
        else:
            cells = [_bar(measured, f"{name}: accuracy") for name in names]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def _bar(measured: dict[str, Any], start: str) -> str:
    """What is asked for of the one measurement of these that has a target."""
    (target,) = (m["target"] for name, m in measured.items() if name.startswith(start) and m["target"])
    return str(target).removeprefix(">= ")


def _decomposition(found: dict[str, Any]) -> list[str]:
    values = {m["name"]: m["value"] for m in found["measurements"]}
    dense = values["ResNet-20: accuracy, dense"]
    head = f"ResNet-20 decomposed ({dense:.1f} % dense), parameters"
    lines = [f"| {head} | " + " | ".join(f"-{percent} %" for percent in _REDUCTIONS) + " |"]
    lines.append("|---|" + "---:|" * len(_REDUCTIONS))
    for what, name in DECOMPOSED:
        cells = [f"{values[f'ResNet-20 -{percent} % {name}: accuracy']:.1f}" for percent in _REDUCTIONS]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return lines


def _compactified(found: dict[str, Any]) -> list[str]:
    values = {m["name"]: m["value"] for m in found["measurements"]}
    lines = [
        "| 7.4 M language model as CompactifAI does it | parameters | bytes | perplexity | recovered |",
        "|---|---:|---:|---:|---:|",
    ]
    for what, form, ending in COMPACTIFIED:
        last = f"{form}, recovered{ending}" if f"{form}, recovered{ending}: perplexity" in values else form
        removed = [values[f"{last}: {part} of the blocks removed"] for part in ("parameters", "bytes")]
        cells = [f"-{value:.0f} %" if value else "" for value in removed]
        before, after = (values.get(f"{name}: perplexity") for name in (form, last))
        cells += [f"{before:.2f}" if not ending else "", f"{after:.2f}" if last != form else ""]
        lines.append("| " + " | ".join([what, *cells]) + " |")
    return lines


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of the cases the tables show."""
    others = (
        "chita",
        "chita_stages",
        "compactifai",
        "decompose",
        "decompose_recover",
        "lm_decode",
        "recover",
        "weights",
    )
    cases = {*others, *(row.case for row in ROWS)}
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


def current(readme: str) -> str:
    """The table as it stands in the text of README.md."""
    return readme[readme.index(_BEGIN) : readme.index(_END) + len(_END)]


def _filled(template: str, values: dict[str, Any]) -> str:
    return re.sub(r"\{([^|{}]+)\|([^}]*)\}", lambda m: format(values[m[1]], m[2]), template)


def _machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    return f"{environment['processor']}, onnxruntime {versions['onnxruntime']}, torch {versions['torch']}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(current(text), table(read(ROOT / "bench" / "results"))), encoding="utf-8")
