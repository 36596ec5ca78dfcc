"""What a run did and what came of it, as data, as a table, as files and as one headline."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.artifact import Artifact, Comparison, Timing, Verification
from compress.data import CalibrationData
from compress.graph import Graph
from compress.pipeline import Change, PassReport
from compress.report_files import put, text

SCHEMA_VERSION = 1


@dataclass
class Report:
    """Everything known about a run.

    Attributes:
        recipe: the resolved recipe, every default written out.
        provenance: source, fingerprints, seed, versions, machine.
        passes: what each pass did and declined.
        float_bytes: bytes of all tensors as captured.
        tensor_bytes: bytes of all tensors now.
        parameters: weights of the model as captured.
        calibration: what the statistics came from, or the line that says there were none.
        order: weights in execution order.
        unreached: weights that no pass can work on -> the operator that reads them.
        artifact, verification: of the written file, once there is one.
        seconds: the whole run took.
        warnings: what the user should know before using the file.
    """

    recipe: dict[str, Any]
    provenance: dict[str, Any]
    passes: list[PassReport]
    float_bytes: int
    tensor_bytes: int
    parameters: int
    calibration: str
    order: list[str] = field(default_factory=list)
    unreached: dict[str, str] = field(default_factory=dict)
    artifact: Artifact | None = None
    verification: Verification | None = None
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    # -- views -----------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One row for each changed weight: what all passes together did to it."""
        merged: dict[str, list[Change]] = defaultdict(list)
        for step in self.passes:
            for change in step.changes:
                merged[change.weight].append(change)
        unfused = set(self.verification.unfused) if self.verification else set()
        floats = {form.weight: form.reason for form in self.artifact.lowered} if self.artifact else {}
        loads = {form.weight: form.loads_as for form in self.artifact.lowered} if self.artifact else {}
        rank = {weight: i for i, weight in enumerate(self.order)}
        rows = []
        for weight, changes in sorted(merged.items(), key=lambda item: rank.get(item[0], len(rank))):
            last = changes[-1]
            note = f"{loads[weight]}: {floats[weight]}" if floats.get(weight) else ""
            rows.append(
                {
                    "layer": last.site,
                    "weight": weight,
                    "action": " + ".join(c.action for c in changes),
                    "bits": last.bits,
                    "sparsity": last.sparsity,
                    "bytes_before": changes[0].bytes_before,
                    "bytes": last.bytes_after,
                    "error": math.sqrt(sum(c.error**2 for c in changes)),
                    "note": "decoded on every call: slow" if weight in unfused else note,
                }
            )
        return rows

    def notes(self) -> list[tuple[str, str, str]]:
        """(pass, layer or "", reason) of everything that was declined or is worth knowing."""
        noted = [(step.name, n.site, n.reason) for step in self.passes for n in step.notes]
        return noted + [
            ("all passes", weight, unreached_words(operator)) for weight, operator in self.unreached.items()
        ]

    def headline(self) -> str:
        """One line: size, speed, fidelity; a loss is said as plainly as a gain."""
        parts = []
        if self.artifact is not None:
            before = self.verification.float_bytes if self.verification else 0
            before, after = before or self.float_bytes, self.artifact.nbytes
            parts.append(f"{ratio_words(before, after)} ({size_words(before)} -> {size_words(after)})")
        else:
            parts.append(
                f"{ratio_words(self.float_bytes, self.tensor_bytes)} weights "
                f"({size_words(self.float_bytes)} -> {size_words(self.tensor_bytes)})"
            )
        if self.verification is not None:
            parts += [speed_words(t) for t in self.verification.timings]
            if self.verification.metric:
                parts.append(metric_words(self.verification))
            parts.append(fidelity_words(self.verification.comparisons))
            parts += ["the file itself was NOT RUN"] if self.verification.stands_in else []
        return ", ".join(parts)

    def slower(self) -> bool:
        """Whether the file was measurably slower than the float export at any batch size."""
        timings = self.verification.timings if self.verification else ()
        return any("SLOWER" in speed_words(t) for t in timings)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; infinities are None."""
        verification = dataclasses.asdict(self.verification) if self.verification else None
        artifact = None
        if self.artifact is not None:
            artifact = {
                "path": self.artifact.path.name,
                "target": self.artifact.target,
                "bytes": self.artifact.nbytes,
                "proof_db": self.artifact.proof_db,
                "lowered": [dataclasses.asdict(form) for form in self.artifact.lowered],
                "built_for": self.artifact.built_for,
                "layers": [dataclasses.asdict(layer) for layer in self.artifact.layers],
            }
        data = {
            "schema_version": SCHEMA_VERSION,
            "kind": "run",
            "headline": self.headline(),
            "recipe": self.recipe,
            "provenance": self.provenance,
            "calibration": self.calibration,
            "parameters": self.parameters,
            "float_bytes": self.float_bytes,
            "tensor_bytes": self.tensor_bytes,
            "seconds": round(self.seconds, 3),
            "layers": self.rows(),
            "unreached": self.unreached,
            "passes": [dataclasses.asdict(p) for p in self.passes],
            "artifact": artifact,
            "verification": verification,
            "warnings": self.warnings,
        }
        cleaned: dict[str, Any] = finite(data)
        return cleaned

    def to_json(self) -> str:
        """`as_dict`, indented."""
        return text(self.as_dict(), ".json")

    def to_markdown(self) -> str:
        """A model card: `compress.card`."""
        return text(self.as_dict(), ".md")

    def to_html(self) -> str:
        """One page without anything to load: `compress.page`."""
        return text(self.as_dict(), ".html")

    def table(self) -> list[tuple[str, ...]]:
        """The rows as text: layer, action, bits, sparsity, bytes, error, note."""
        return [
            (
                r["layer"],
                r["action"],
                f"{r['bits']:.2f}",
                f"{100 * r['sparsity']:.0f} %",
                f"{size_words(r['bytes_before'])} -> {size_words(r['bytes'])}",
                f"{100 * r['error']:.2f} %",
                r["note"],
            )
            for r in self.rows()
        ]

    def write(self, path: Path) -> list[Path]:
        """Write JSON and Markdown beside the output; returns their paths."""
        data = self.as_dict()
        return [
            put(text(data, suffix), path.with_name(f"{path.name}.report{suffix}"))
            for suffix in (".json", ".md")
        ]


def noise(spread: float) -> float:
    """How far a speed-up of this spread may be from another, relatively, without being a difference."""
    return max(0.05, spread)


def thread_words(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def unreached_words(operator: str) -> str:
    """Why no pass compresses a weight."""
    return f"read by {operator}, which no pass compresses; left as it is"


def speed_words(timing: Timing) -> str:
    """A timing in words; within its own spread (at least 5 %) it is no difference."""
    where = f"at batch {timing.sizes['batch']}" if "batch" in timing.sizes else "at fixed shape"
    if "past" in timing.sizes:  # a key-value cache, which a prompt finds empty
        where = f"{'decoding' if timing.sizes['past'] else 'prompt'} {where}"
    where += f" on {timing.threads} threads" if timing.threads > 1 else ""
    if abs(timing.speedup - 1) <= noise(timing.spread):
        return f"same speed {where}"
    if timing.speedup > 1:
        return f"{timing.speedup:.2f}x faster {where}"
    return f"{1 / timing.speedup:.2f}x SLOWER {where}"


def fidelity_words(comparisons: tuple[Comparison, ...]) -> str:
    """The worst output of the file against the original."""
    worst = min((c for c in comparisons if c.what == "file vs original"), key=lambda c: c.sqnr_db)
    if math.isinf(worst.sqnr_db) and worst.sqnr_db > 0:
        return "outputs identical"
    return f"cosine {worst.cosine:.4f} ({worst.sqnr_db:.1f} dB) to the original"


def decibels(compared: Mapping[str, Any]) -> float:
    """SQNR of a comparison as JSON has it: infinite for equal outputs, minus infinite where not finite."""
    found = compared.get("sqnr_db")
    if found is not None:
        return float(found)
    same = compared.get("cosine") is not None and compared["cosine"] > 1 - 1e-6
    return math.inf if same else -math.inf


def worst_output(comparisons: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The comparison as JSON has it of the output that suffered most, if there is any."""
    return min(comparisons, key=decibels, default=None)


def decibel_words(value: float, unit: str = " dB") -> str:
    """What `decibels` gave."""
    if math.isinf(value):
        return "identical" if value > 0 else "not finite"
    return f"{value:.1f}{unit}"


def metric_words(v: Verification) -> str:
    """The metric of the original and of the file; of a perplexity also the change and the divergence."""
    original, file = v.metric["original"], v.metric["file"]
    words = f"{v.metric_name} {original:.4g} -> {file:.4g}"
    if not v.kl:
        return words
    return f"{words} ({100 * (file / original - 1):+.1f} %), KL {v.kl['file']:.3g} nats/token"


def same_size(ratio: float) -> bool:
    """Whether two sizes of this ratio are the same in words."""
    return 0.995 < ratio < 1.005


def ratio_words(before: int, after: int) -> str:
    """How many times smaller a file is, or larger."""
    ratio = before / after if after else math.inf
    if same_size(ratio):
        return "same size"
    return f"{ratio:.2f}x smaller" if ratio > 1 else f"{1 / ratio:.2f}x LARGER"


def size_words(nbytes: int) -> str:
    """Bytes in decimal units, as file managers and disks count them."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def finite(value: Any) -> Any:
    """The same value as JSON can hold it: infinities and nan are None, tuples lists, keys text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def versions() -> dict[str, str]:
    """Of this package and of torch, for files and reports."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("compress-models")
    except PackageNotFoundError:
        own = "unknown"
    return {"compress": own, "torch": torch.__version__}


def provenance(reference: Graph, data: CalibrationData | None, seed: int) -> dict[str, Any]:
    """Where a run's model and data came from; `reference` is the graph as captured."""
    return {
        "source": reference.meta.get("source"),
        "sha256": reference.meta.get("sha256"),
        "calibration_sha256": data.sha256 if data else None,
        "notes": reference.meta.get("notes", []),
        "seed": seed,
        "versions": versions(),
    }
