"""Reports to show: of a run, of a compiled file, of a benchmark; with the numbers of real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import Artifact, BuiltLayer, Comparison, Lowered, Timing, Verification
from compress.graph import Graph
from compress.pipeline import Change, Note, PassReport
from compress.report import Report

NOT_SO_NICE = "</script><img src=x onerror=alert(1)>|`'\"&"


def report(layers: int = 24, **changed: Any) -> Report:
    """Of a run with that many layers; errors, bits and actions differ from layer to layer."""
    parts = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    names = [f"encoder.layer.{i // 4}.{parts[i % 4]}" for i in range(layers)]
    changes = tuple(
        Change(name, f"{name}.weight", *(("int8 g32", 8.5) if i % 5 == 4 else ("int4 g32 asym", 5.125)),
               0.1 + 0.001 * i, 589_824 * (1 + i % 3), 94_464 * (1 + i % 3), 0.03 + 0.02 * math.sin(i))
        for i, name in enumerate(names)
    )  # fmt: skip
    notes = (Note("", "19 no-ops dropped"), Note("pooler.dense", "its error would be 12 %, more than 10 %"))
    lowered = tuple(Lowered(c.weight, "DequantizeLinear(UINT4) -> MatMul", "MatMulNBits") for c in changes)
    verification = Verification(
        "calibration samples",
        tuple(Comparison(what, "last_hidden_state", (16, 16, 384), db, 0.99487, 0.584, 0.8829)
              for what, db in (("file vs original", 19.6), ("file vs compressed graph", 32.9))),
        (Timing({"batch": 1, "seq": 32}, 23.5, 12.2, 1.93, 0.04, 40),
         Timing({"batch": 32, "seq": 32}, 420.0, 500.0, 0.84, 0.02, 9)),
        90_919_764, metric={"original": 0.912, "compressed": 0.911, "file": 0.91}, metric_name="accuracy",
        environment={"runtime": "ONNX Runtime 1.31.1", "threads": 1, "processor": "AMD EPYC"},
    )  # fmt: skip
    made = Report(
        recipe={"metadata": {"name": "int4"}, "passes": [{"pass": "quantize_weights", "bits": 4}]},
        provenance={"source": "all-MiniLM-L6-v2", "sha256": "fbd7" * 16, "calibration_sha256": None,
                    "notes": [], "seed": 0, "versions": {"compress": "0.1.0", "torch": "2.13.0"}},
        passes=[PassReport("quantize_weights", {"bits": 4}, changes, notes, 12.5)],
        float_bytes=90_861_056, tensor_bytes=14_663_336, parameters=22_713_216,
        calibration="256 samples from sentences.txt", order=[c.weight for c in changes],
        unreached={"up.weight": "conv_transpose1d"},
        artifact=Artifact(Path("minilm.onnx"), "onnx", _no_graph(), 14_742_436, lowered, 119.6),
        verification=verification, seconds=97.03, warnings=["slower than float at some batch sizes"],
    )  # fmt: skip
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def odd_reports() -> dict[str, dict[str, Any]]:
    """What a page must bear: many layers, one, none, no timings, strange names, an engine, no numbers."""
    engine = report(8)
    half = BuiltLayer(
        "__myl_Fc_myl0_3", "runtime_fusion", ("a", "b"), ("Half",), ("Half",), (("Int4", (384, 384)),)
    )
    engine.artifact = Artifact(
        Path("m.engine"), "tensorrt", _no_graph(), 15_000_000, (), 60.0,
        {"GPUs": "sm89", "precision": "float16"},
        tuple(BuiltLayer(f"{half.name}{i}", *list(vars(half).values())[1:]) for i in range(30)),
    )  # fmt: skip
    engine.verification = Verification(
        "calibration samples", report().verification.comparisons,
        stands_in="there is no GPU here: the ONNX file the engine was built from was run in its place",
    )  # fmt: skip
    strange = report(3)
    for i, name in enumerate((NOT_SO_NICE, "моделью.слой_0.注意力.🙂", "very_long_name" * 40)):
        change = strange.passes[0].changes[i]
        object.__setattr__(change, "site", name)
    strange.provenance["source"] = f"модель{NOT_SO_NICE}"
    strange.warnings.append(NOT_SO_NICE)
    broken = report(5, warnings=[])
    for change in broken.passes[0].changes[:2]:
        object.__setattr__(change, "error", math.inf)
    broken.verification = Verification(
        "samples", (Comparison("file vs original", "out", (1,), math.nan, math.nan, math.nan, 0.0),),
        (Timing({}, 1.0, 1.01, 0.99, 0.01, 9),),
        metric={"original": math.nan, "compressed": 1.0, "file": math.inf},
    )  # fmt: skip
    threads = report(2)
    one, two = (Timing({"batch": 1}, 8.0, 8.0 / s, s, 0.01, 9, n) for s, n in ((2.0, 1), (0.5, 4)))
    threads.verification = Verification("samples", report().verification.comparisons, (one, two))
    same = Comparison("file vs original", "out", (1,), math.inf, 1.0, 0.0, 1.0)
    bare = report(1, artifact=None, verification=None)
    return {
        "many": report(300).as_dict(),
        "one": report(1, verification=Verification("random inputs", (same,))).as_dict(),
        "none": report(0, unreached={}).as_dict(),
        "bare": bare.as_dict(),
        "engine": engine.as_dict(),
        "strange": strange.as_dict(),
        "threads": threads.as_dict(),
        "broken": broken.as_dict(),
    }


def benchmark() -> dict[str, Any]:
    """Of all-MiniLM-L6-v2, with what `bench/results/minilm.json` holds, and with two that came to no end."""
    results = Path(__file__).parents[2] / "bench" / "results" / "minilm.json"
    values = {m["name"]: m["value"] for m in json.loads(results.read_text())["measurements"]}
    shapes = {"1x32": (1, 32), "1x128": (1, 128), "8x128": (8, 128)}

    def entry(name: str, maker: str, known_as: str, pareto: bool) -> dict[str, Any]:
        cosine = values[f"{known_as}: mean cosine to the float embeddings"]
        timings = []
        for shape, (batch, seq) in shapes.items():
            plain, speedup = values[f"float: time at {shape}"], values[f"{known_as}: speed-up at {shape}"]
            timings.append(
                {"sizes": {"batch": batch, "seq": seq}, "threads": 1, "float_ms": plain,
                 "ms": plain / speedup, "speedup": speedup, "spread": 0.02, "samples": 40}
            )  # fmt: skip
        return {
            "name": name, "maker": maker, "status": "ok", "error": None, "headline": name, "file": None,
            "bytes": round(values[f"{known_as}: file"] * 1e6), "peak_memory_bytes": 200_000_000,
            "timings": timings, "metric": None, "pareto": pareto, "seconds": 41.5,
            "fidelity": [{"output": "last_hidden_state", "sqnr_db": -10 * math.log10(2 * (1 - cosine)),
                          "cosine": cosine, "top1": 0.9, "max_abs": 0.5}],
            "report": report().as_dict() if maker == "compress" else None,
        }  # fmt: skip

    entries = [
        entry("int8", "compress", "int8", True),
        entry("int8-weight-only", "compress", "int8-weight-only", True),
        entry("int4", "compress", "int4", True),
        entry("dynamic int8", "onnxruntime", "int8 ONNX Runtime dynamic", False),
        entry("int4, RTN", "onnxruntime", "int4 ONNX Runtime RTN", False),
        entry("int4, HQQ", "onnxruntime", "int4 ONNX Runtime HQQ", False),
    ]
    nothing = {"headline": "", "file": None, "bytes": None, "peak_memory_bytes": None, "timings": [],
               "fidelity": [], "metric": None,
               "pareto": False, "seconds": 1.5, "report": None}  # fmt: skip
    entries.append({"name": "int4-sparse", "maker": "compress", "status": "failed",
                    "error": "out of memory", **nothing})  # fmt: skip
    entries.append(
        {"name": "static int8", "maker": "onnxruntime", "status": "interrupted", "error": None, **nothing}
    )
    size = round(values["float: file"] * 1e6)
    return {
        "schema_version": 1, "kind": "benchmark",
        "headline": "int4: 6.17x smaller, 1.15x faster at batch 1; int8: 3.88x smaller, 1.93x faster",
        "provenance": {**report().provenance, "machine": {"processor": "AMD EPYC", "threads": 1}},
        "calibration": "256 samples from sentences.txt", "held_out": "16 samples held out", "complete": True,
        "float": {"bytes": size, "peak_memory_bytes": 300_000_000, "metric": None,
                  "timings": [{"sizes": {"batch": batch, "seq": seq}, "threads": 1,
                               "ms": values[f"float: time at {shape}"]}
                              for shape, (batch, seq) in shapes.items()]},
        "metric_name": None, "lower_is_better": False, "entries": entries, "seconds": 353.1, "warnings": [],
    }  # fmt: skip


def judged_benchmark() -> dict[str, Any]:
    """The same with a perplexity, and with outputs that are identical and some that are not finite."""
    data = benchmark()
    data.update(metric_name="perplexity", lower_is_better=True)
    data["float"]["metric"] = 43.88
    for i, entry in enumerate(data["entries"][:6]):
        entry["metric"] = 43.9 + 0.1 * i
    data["entries"][0]["fidelity"][0].update(sqnr_db=None, cosine=1.0)
    data["entries"][5]["fidelity"][0].update(sqnr_db=None, cosine=None, top1=None)
    data["entries"][5]["metric"] = None
    return data


def all_reports() -> dict[str, dict[str, Any]]:
    failed = benchmark()
    failed["entries"] = failed["entries"][-2:]
    same = judged_benchmark()
    for entry in same["entries"][:6]:
        entry["metric"] = 43.88
    begun = benchmark()
    begun["float"].update(bytes=0, timings=[], peak_memory_bytes=None)
    begun.update(complete=False)
    for i, entry in enumerate(begun["entries"]):
        entry.update(timings=[], pareto=False)
        entry.update({} if i else {"status": "skipped", "error": "not begun", "bytes": None, "fidelity": []})
    return {"run": report().as_dict(), **odd_reports(), "benchmark": benchmark(),
            "judged": judged_benchmark(), "failed": failed, "begun": begun, "same": same}  # fmt: skip


def _no_graph() -> Graph:
    return None  # type: ignore[return-value]  # reports look at names and sizes only


@pytest.fixture(scope="session")
def reports() -> dict[str, dict[str, Any]]:
    return all_reports()
