"""What came of a benchmark: entries by name, the Pareto front, the best of them, as data and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compress.artifact import Comparison, Timing
from compress.errors import GoalMissed, InputSpecError
from compress.report import (
    SCHEMA_VERSION,
    Report,
    fidelity_words,
    finite,
    noise,
    ratio_words,
    size_words,
    speed_words,
)
from compress.report_files import text, write

Status = Literal["ok", "failed", "interrupted", "skipped"]
By = Literal["size", "speed", "quality", "memory"]


@dataclass
class Baseline:
    """The uncompressed export that everything is held against.

    Attributes:
        nbytes: size of the file; 0 before it is written.
        peak_memory: bytes that loading and running it adds to a process at its highest; None if not counted.
        metric: of the original model; None without one.
        metric_name: "perplexity", or "metric" for one of the user's.
        lower_is_better: whether a smaller metric is a better one.
        timings: of the file; `compressed_ms` is its own time, too.
        path: of the file, where it was kept.
    """

    nbytes: int = 0
    peak_memory: int | None = None
    metric: float | None = None
    metric_name: str = "metric"
    lower_is_better: bool = False
    timings: list[Timing] = field(default_factory=list)
    path: Path | None = None


@dataclass
class Entry:
    """One recipe of ours, or one peer.

    Attributes:
        name: of the recipe or the peer.
        maker: "compress" or "onnxruntime".
        baseline: the uncompressed export.
        status: "skipped" was not begun, or is not for this model: `error` tells.
        error: one line; empty if the status is ok.
        nbytes: size of the file, external data included; 0 if there is none.
        peak_memory: as of `Baseline`.
        timings: for each thread count and each size of the inputs, against the uncompressed export.
        fidelity: file against original, each output, on samples that nothing was calibrated on.
        metric: of the file; None without one.
        seconds: that compressing, writing and proving took.
        path: of the file, where it was kept.
        report: of a recipe: what was done layer by layer.
        pareto: no other file, nor the uncompressed one, is as good in every respect and better in one.
    """

    name: str
    maker: Literal["compress", "onnxruntime"]
    baseline: Baseline
    status: Status = "skipped"
    error: str = "not begun"
    nbytes: int = 0
    peak_memory: int | None = None
    timings: list[Timing] = field(default_factory=list)
    fidelity: list[Comparison] = field(default_factory=list)
    metric: float | None = None
    seconds: float = 0.0
    path: Path | None = None
    report: Report | None = None
    pareto: bool = False

    @property
    def smaller(self) -> float:
        """Size of the uncompressed file over that of this one; nan where there is none."""
        return self.baseline.nbytes / self.nbytes if self.nbytes else math.nan

    @property
    def speedup(self) -> float:
        """Against the uncompressed file, as timed first: the first thread count and the first batch size."""
        return self.timings[0].speedup if self.timings else math.nan

    def speedup_at(self, *, threads: int | None = None, **sizes: int) -> float:
        """Against the uncompressed file at these sizes, such as ``batch=8``; of several the first.

        Raises:
            InputSpecError: nothing was timed there.
        """
        for timing in self.timings:
            if sizes.items() <= timing.sizes.items() and threads in (None, timing.threads):
                return timing.speedup
        timed = "; ".join(f"{t.sizes} on {t.threads} threads" for t in self.timings)
        raise InputSpecError(
            f"{self.name} was not timed at {sizes}" + (f" on {threads} threads" if threads else ""),
            expected=timed or "an entry whose status is ok, of a benchmark with batch sizes",
        )

    @property
    def sqnr_db(self) -> float:
        """Signal to noise against the original in dB, of the worst output; nan where it did not run."""
        return _least([c.sqnr_db for c in self.fidelity])

    @property
    def cosine(self) -> float:
        """To the original, mean over rows, of the worst output."""
        return _least([c.cosine for c in self.fidelity])

    @property
    def top1(self) -> float:
        """Fraction of rows with the original's argmax, of the worst output."""
        return _least([c.top1 for c in self.fidelity])

    @property
    def drop(self) -> float:
        """By how much the metric is worse than the original's; negative where it is better, nan without."""
        if self.metric is None or self.baseline.metric is None:
            return math.nan
        drop = self.baseline.metric - self.metric
        return -drop if self.baseline.lower_is_better else drop

    @property
    def quality(self) -> float:
        """What the Pareto front goes by, larger is better: the negative drop of the metric, else the SQNR.

        Where the original has a metric, a file without a finite one is no match for any other: nan.
        """
        return -self.drop if self.baseline.metric is not None else self.sqnr_db

    def headline(self) -> str:
        """One line: size, speed, metric, fidelity; a loss is said as plainly as a gain."""
        if self.status != "ok":
            return f"{self.status}: {self.error}"
        size = f"({size_words(self.baseline.nbytes)} -> {size_words(self.nbytes)})"
        parts = [f"{ratio_words(self.baseline.nbytes, self.nbytes)} {size}"]
        parts += [speed_words(t) for t in self.timings]
        if self.metric is not None:
            parts.append(f"{self.baseline.metric_name} {self.baseline.metric:.4g} -> {self.metric:.4g}")
        return ", ".join([*parts, fidelity_words(tuple(self.fidelity))])

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, but for infinities."""
        return {
            "name": self.name,
            "maker": self.maker,
            "status": self.status,
            "error": self.error or None,
            "headline": self.headline(),
            "bytes": self.nbytes or None,
            "peak_memory_bytes": self.peak_memory,
            "timings": [
                {
                    "sizes": t.sizes,
                    "threads": t.threads,
                    "float_ms": t.float_ms,
                    "ms": t.compressed_ms,
                    "speedup": t.speedup,
                    "spread": t.spread,
                    "samples": t.samples,
                }
                for t in self.timings
            ],
            "fidelity": [
                {"output": c.output, "sqnr_db": c.sqnr_db, "cosine": c.cosine, "top1": c.top1,
                 "max_abs": c.max_abs}
                for c in self.fidelity
            ],
            "metric": self.metric,
            "pareto": self.pareto,
            "seconds": round(self.seconds, 3),
            "file": self.path.name if self.path else None,
            "report": self.report.as_dict() if self.report else None,
        }  # fmt: skip


@dataclass
class Benchmark:
    """Recipes and peers side by side, from one interleaved run.

    ``benchmark["int8"].smaller > 3`` asks about one entry, ``benchmark.best("speed", max_drop=0.5)`` for one.

    Attributes:
        provenance: source, fingerprints, seed, versions, machine.
        calibration: what the statistics came from.
        held_out: what fidelity was measured on.
        baseline: the uncompressed export.
        entries: in the order they were asked for, recipes first.
        complete: False while it runs, where it was stopped, and where the timing failed.
        interrupted: whether the user stopped it.
        seconds: the whole run took.
        warnings: what the user should know.
    """

    provenance: dict[str, Any]
    calibration: str
    held_out: str
    baseline: Baseline
    entries: dict[str, Entry] = field(default_factory=dict)
    complete: bool = False
    interrupted: bool = False
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Entry:
        """An entry by name.

        Raises:
            InputSpecError: there is none.
        """
        if name not in self.entries:
            raise InputSpecError(f"there is no entry {name!r}", expected=f"one of {', '.join(self.entries)}")
        return self.entries[name]

    @property
    def finished(self) -> list[Entry]:
        """Entries whose status is ok."""
        return [entry for entry in self.entries.values() if entry.status == "ok"]

    @property
    def failed(self) -> list[Entry]:
        """Entries that failed or were interrupted."""
        return [entry for entry in self.entries.values() if entry.status in ("failed", "interrupted")]

    @property
    def ok(self) -> bool:
        """Whether it ran to its end and nothing failed."""
        return self.complete and not self.failed

    @property
    def pareto(self) -> list[Entry]:
        """The Pareto front over size, latency (as timed first) and quality (`Entry.quality`), by size."""
        return sorted((entry for entry in self.finished if entry.pareto), key=lambda entry: entry.nbytes)

    def best(
        self,
        by: By,
        *,
        max_drop: float | None = None,
        min_sqnr_db: float | None = None,
        min_cosine: float | None = None,
        min_speedup: float | None = None,
        max_bytes: int | None = None,
        maker: str | None = None,
        threads: int | None = None,
        **sizes: int,
    ) -> Entry:
        """The entry that is smallest, fastest, closest to the original or needs least memory, within limits.

        Args:
            by: "size", "speed", "quality" or "memory".
            max_drop: of the metric.
            min_sqnr_db, min_cosine: of the worst output.
            min_speedup: against the uncompressed file.
            max_bytes: of the file.
            maker: "compress" or "onnxruntime" alone.
            threads, sizes: where speed counts, such as ``batch=8``; by default what was timed first.

        Raises:
            GoalMissed: no entry keeps within the limits.
            InputSpecError: nothing was timed there.
        """

        def speed(entry: Entry) -> float:
            where = threads is not None or sizes
            return entry.speedup_at(threads=threads, **sizes) if where else entry.speedup

        def within(entry: Entry) -> bool:
            # "not <", so that what was not measured keeps no limit
            return (
                (max_drop is None or entry.drop <= max_drop)
                and (min_sqnr_db is None or entry.sqnr_db >= min_sqnr_db)
                and (min_cosine is None or entry.cosine >= min_cosine)
                and (min_speedup is None or speed(entry) >= min_speedup)
                and (max_bytes is None or entry.nbytes <= max_bytes)
                and maker in (None, entry.maker)
            )

        values: dict[str, Callable[[Entry], float]] = {
            "size": lambda entry: -entry.nbytes,
            "speed": speed,
            "quality": lambda entry: entry.quality,
            "memory": lambda entry: math.nan if entry.peak_memory is None else -entry.peak_memory,
        }
        if by not in values:
            raise InputSpecError(f"best by {by!r}", expected=f"one of {', '.join(values)}")
        fitting = [e for e in self.finished if within(e) and not math.isnan(values[by](e))]
        if not fitting:
            raise GoalMissed(
                "no entry of the benchmark keeps within these limits",
                expected="; ".join(f"{e.name}: {e.headline()}" for e in self.entries.values()),
            )
        # of equals, such as two files that lose nothing by the metric, the one closer to the original
        return max(fitting, key=lambda entry: (values[by](entry), _comparable(entry.sqnr_db)))

    def mark_front(self) -> None:
        """Set `Entry.pareto` of all entries."""
        for entry in self.entries.values():
            rivals = [other for other in self.finished if other is not entry]
            entry.pareto = entry.status == "ok" and not (
                _worse_than_float(entry) or any(_dominates(rival, entry) for rival in rivals)
            )

    def headline(self) -> str:
        """Which entries are smallest, fastest and closest, and what failed."""
        parts = []
        if self.finished:
            small = self.best("size")
            parts.append(f"smallest: {small.name} ({ratio_words(self.baseline.nbytes, small.nbytes)})")
            if any(entry.timings for entry in self.finished):
                fast = self.best("speed")
                parts.append(f"fastest: {fast.name} ({speed_words(fast.timings[0])})")
            if any(not math.isnan(entry.quality) for entry in self.finished):
                parts.append(self._nearest(self.best("quality")))
        parts += [f"{entry.name} {entry.status.upper()}" for entry in self.failed]
        parts += [] if self.complete else ["NOT COMPLETE"]
        return ", ".join(parts) or "nothing to compare"

    def _nearest(self, entry: Entry) -> str:
        if entry.metric is None or self.baseline.metric is None:
            return f"closest to the original: {entry.name} ({entry.sqnr_db:.1f} dB)"
        metrics = f"{self.baseline.metric:.4g} -> {entry.metric:.4g}"
        return f"best {self.baseline.metric_name}: {entry.name} ({metrics})"

    # -- as data -----------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; infinities are None. `compress.schemas` has the schema."""
        base = self.baseline
        data = {
            "schema_version": SCHEMA_VERSION,
            "kind": "benchmark",
            "headline": self.headline(),
            "provenance": self.provenance,
            "calibration": self.calibration,
            "held_out": self.held_out,
            "float": {
                "bytes": base.nbytes,
                "peak_memory_bytes": base.peak_memory,
                "metric": base.metric,
                "timings": [
                    {"sizes": t.sizes, "threads": t.threads, "ms": t.compressed_ms} for t in base.timings
                ],
            },
            "metric_name": None if base.metric is None else base.metric_name,
            "lower_is_better": base.lower_is_better,
            "entries": [entry.as_dict() for entry in self.entries.values()],
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "warnings": self.warnings,
        }
        cleaned: dict[str, Any] = finite(data)
        return cleaned

    def to_json(self) -> str:
        """`as_dict`, indented."""
        return text(self.as_dict(), ".json")

    def write(self, path: str | Path) -> Path:
        """Write it as JSON, a page or a model card, by the end of the name; whole or not at all.

        Raises:
            OutputError: there is no such format, or the file cannot be written.
        """
        return write(self.as_dict(), Path(path))


def _least(values: Sequence[float]) -> float:
    """The least of them, nan where there is none; nan is less than all."""
    return math.nan if not values or any(map(math.isnan, values)) else min(values)


def _dominates(one: Entry, other: Entry) -> bool:
    """As good in every respect and better in one; times within noise are equal."""
    quality = (_comparable(one.quality), _comparable(other.quality))
    no_worse = [one.nbytes <= other.nbytes, quality[0] >= quality[1]]
    better = [one.nbytes < other.nbytes, quality[0] > quality[1]]
    if one.timings and other.timings:
        a, b = one.timings[0], other.timings[0]
        slack = max(noise(a.spread), noise(b.spread))
        no_worse.append(a.speedup * (1 + slack) >= b.speedup)
        better.append(a.speedup > b.speedup * (1 + slack))
    return all(no_worse) and any(better)


def _worse_than_float(entry: Entry) -> bool:
    """Neither smaller nor measurably faster, and not better by the metric."""
    faster = any(t.speedup > 1 + noise(t.spread) for t in entry.timings[:1])
    return entry.nbytes >= entry.baseline.nbytes and not faster and not entry.drop < 0


def _comparable(value: float) -> float:
    """A quality that was not measured is the least."""
    return -math.inf if math.isnan(value) else value
