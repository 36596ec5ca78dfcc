"""Recipes of ours and other people's quantizers on one model, side by side: what `compress.benchmark` does.

The model is captured once and the data read once. Every file is written, proven and compared by itself; what
fails is an entry like any other and takes nothing from the rest. In the end all files are timed together,
each call of one next to a call of each other, so that a busy machine slows all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.artifact import Artifact, Timing, Verification
from compress.benchmark_result import Baseline, Benchmark, Entry
from compress.capture import Source, capture
from compress.data import CalibrationData, describe_missing
from compress.errors import CompressError, InputSpecError, RecipeError
from compress.examples import read_calibration, some_samples, to_capture_with
from compress.graph import Graph
from compress.inputs import InputSpec
from compress.perplexity import EvalFn, Perplexity
from compress.pipeline import Pass
from compress.progress import Progress, Silent
from compress.recipes import RecipeLike, resolve
from compress.report import provenance, thread_words

PEERS = ("ort",)
"""Quantizers to compare with: ONNX Runtime's own."""

_FLOAT = ""
"""Key of the uncompressed file; no recipe has this name."""

_HELD = (8, 64)
"""One sample of this many is held out, and no more than so many."""


class Files(Protocol):
    """Files of one model in a runtime; `compress.exporters.side_by_side.SideBySide` says what does what."""

    def peers(self) -> list[str]: ...

    def unsuitable(self, peer: str, file: Path, calibrated: bool) -> str: ...

    def quantize(self, peer: str, file: Path, path: Path, data: CalibrationData | None) -> int: ...

    def write_float(self, path: Path) -> int: ...

    def environment(self, file: Path) -> dict[str, Any]: ...

    def metric(self, eval_fn: EvalFn) -> float: ...

    def verify(self, path: Path, **options: Any) -> Verification: ...

    def peak_memory(self, path: Path) -> int | None: ...

    def open(self, files: Mapping[str, Path], threads: int) -> tuple[dict[str, Any], dict[str, str]]: ...

    def time(
        self, opened: Mapping[str, Any], threads: int, seconds: float, step: Callable[[str], object]
    ) -> Iterator[dict[str, Timing]]: ...


@dataclass(frozen=True)
class Tools:
    """What `compress.api` lends: its calls of these names, and the files of a model.

    Attributes:
        files: (reference, flat samples, batch sizes, thread counts) -> `Files`.
    """

    pass_table: Callable[[], Mapping[str, type[Pass]]]
    check_graph: Callable[[Graph], object]
    run: Callable[..., Any]
    export: Callable[..., Artifact]
    verify: Callable[..., Verification]
    files: Callable[..., Files]


def benchmark(
    tools: Tools,
    source: Source,
    recipes: Sequence[RecipeLike] | Mapping[str, RecipeLike] = ("int8", "int4"),
    *,
    peers: Sequence[str] = (),
    eval_fn: EvalFn | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    seconds: float = 1.0,
    folder: str | Path | None = None,
    on_change: Callable[[Benchmark], object] | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    calibration: Any = None,
    seed: int = 0,
    inputs: Sequence[str | InputSpec] = (),
    model: str | Callable[[], torch.nn.Module] | None = None,
    trust: bool = False,
    kv_cache: bool | None = None,
    tokenizer: str | Path | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    samples: int = 512,
    max_memory: int = 2 << 30,
    progress: Progress | None = None,
) -> Benchmark:
    """Compress a model by several recipes and hold the files against each other and the uncompressed one.

    Sizes, fidelity, the metric and peak memory are measured file by file; then all files are timed in one
    interleaved run for each thread count and batch size. Every eighth sample (64 at most) is held out of
    the calibration, and fidelity is measured on those. Peak memory is that of a process that loads the file
    and runs it at the first batch size (`compress.exporters.memory`).

    Ctrl-C ends the entry it falls into; what is finished is still timed (a second Ctrl-C ends that too) and
    the result is returned, not complete.

    Args:
        tools: given by `compress.benchmark`.
        source: anything `run` takes.
        recipes: as for `run`; a mapping gives them names of their own.
        peers: "ort": ONNX Runtime's quantizers that suit the model, on the same samples.
        eval_fn: metric of a module, or a `Perplexity`: measured once on the original, and on every file.
        batch_sizes: to time at, where the batch is dynamic; empty for no timing.
        threads: of the runtime: thread counts to time at.
        seconds: for each file, thread count and batch size.
        folder: where the files stay, as ``<name>.onnx``; by default they are not kept.
        on_change: called with the result so far whenever it has grown.
        example_inputs, calibration, seed, inputs, model, trust, kv_cache, tokenizer, normalize, samples,
            max_memory: as for `run`.
        progress: told about every layer of every recipe.

    Raises:
        CompressError: the model, the data, the metric or a recipe's text are at fault, before anything runs.
            Whatever `on_change` raises.
    """
    began = time.perf_counter()
    plans = _plans(recipes, tools.pass_table())
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise InputSpecError(f"there is no peer {unknown[0]!r}", expected=f"one of {', '.join(PEERS)}")
    if not threads or min(threads) < 1:
        raise InputSpecError(f"threads are {list(threads)}", expected="at least one positive number")
    stages = _Stages(progress or Silent())
    stages.start("capture", 0)
    example_inputs, calibration = to_capture_with(source, example_inputs, inputs, calibration, kv_cache)
    reference = capture(source, example_inputs, inputs=inputs, model=model, trust=trust, kv_cache=kv_cache)
    tools.check_graph(reference)
    if isinstance(eval_fn, Perplexity):
        eval_fn.prepare(reference)
    data = read_calibration(calibration, reference, tokenizer, samples, normalize, seed)
    kept, held, words = _parted(data, reference)
    result = Benchmark(
        provenance=provenance(reference, data, seed),
        calibration=kept.description if kept else describe_missing(),
        held_out=words,
        baseline=Baseline(),
    )
    result.warnings += reference.meta.get("notes", [])
    result.warnings += [] if data else [result.calibration]
    with contextlib.ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-bench-")))
        place.mkdir(parents=True, exist_ok=True)
        shown = some_samples(held, reference)
        files = tools.files(reference, shown, batch_sizes, threads)
        work = _Work(
            tools, files, result, reference, kept, shown, eval_fn, place, folder is not None,
            tuple(threads), bool(batch_sizes), stages, seed, max_memory,
            on_change or (lambda benchmark: None), began,
        )  # fmt: skip
        work.everything(plans, seconds, "ort" in peers)
    return result


@dataclass
class _Work:
    """One benchmark under way."""

    tools: Tools
    files: Files
    result: Benchmark
    reference: Graph
    data: CalibrationData | None
    samples: list[tuple[Tensor, ...]]
    eval_fn: EvalFn | None
    folder: Path
    keep: bool
    threads: tuple[int, ...]
    timed: bool
    stages: _Stages
    seed: int
    max_memory: int
    on_change: Callable[[Benchmark], object]
    began: float
    paths: dict[str, Path] = field(default_factory=dict)
    stopped: bool = False

    def everything(self, plans: Mapping[str, RecipeLike], seconds: float, ort: bool) -> None:
        """The baseline, the recipes, the peers, the timing."""
        others = self.files.peers() if ort else []
        both = sorted(set(plans) & set(others))
        if both:
            raise RecipeError(f"{both[0]} is the name of a peer", fix="give the recipe another name")
        for name in plans:
            self.result.entries[name] = Entry(name, "compress", self.result.baseline)
        for name in others:
            self.result.entries[name] = Entry(name, "onnxruntime", self.result.baseline)
        self._baseline()
        self.result.provenance["machine"] = self.files.environment(self.paths[_FLOAT])
        try:
            self._entries(plans)
        except KeyboardInterrupt:  # between two entries
            self.stopped = True
        try:
            self._time(seconds)
        except KeyboardInterrupt:
            self.stopped = True
            self.result.warnings.append("the timing was interrupted: sizes or thread counts are missing")
        except Exception as error:  # whatever a runtime raises; what is known is worth hours
            failed = f"the timing failed, so sizes or thread counts are missing: {_one_line(error)}"
            self.result.warnings.append(failed)
        else:
            self.result.complete = not self.stopped
        self.result.interrupted = self.stopped
        self._changed()

    def _entries(self, plans: Mapping[str, RecipeLike]) -> None:
        count = len(self.result.entries)
        for number, (name, entry) in enumerate(self.result.entries.items(), 1):
            self.stages.prefix = f"{name} ({number} of {count}): "
            if name in plans:
                self._attempt(entry, partial(self._recipe, plans[name]))
                continue
            entry.error = self.files.unsuitable(name, self.paths[_FLOAT], self.data is not None)
            if not entry.error:
                self._attempt(entry, self._peer)

    def _changed(self) -> None:
        self.result.mark_front()
        self.result.seconds = time.perf_counter() - self.began
        self.on_change(self.result)

    def _attempt(self, entry: Entry, work: Callable[[Entry], object]) -> None:
        """Do the work of one entry; what goes wrong is written into it."""
        if self.stopped:
            entry.error = "stopped before it began"
            return
        began = time.perf_counter()
        try:
            work(entry)
            entry.status, entry.error = "ok", ""
        except KeyboardInterrupt:
            self.stopped = True
            entry.status, entry.error = "interrupted", "interrupted by the user"
        except Exception as error:  # whatever a pass or somebody else's quantizer raises
            entry.status, entry.error = "failed", _one_line(error)
        entry.seconds = time.perf_counter() - began
        self._changed()

    def _baseline(self) -> None:
        base, path = self.result.baseline, self._path("float")
        self.stages.start("float export", 0)
        base.nbytes, base.path = self.files.write_float(path), path if self.keep else None
        self.paths[_FLOAT] = path
        base.peak_memory = self.files.peak_memory(path)
        if self.eval_fn is not None:
            self.stages.start("metric of the original", 0)
            base.metric = self.files.metric(self.eval_fn)
            base.lower_is_better = bool(getattr(self.eval_fn, "lower_is_better", False))
            base.metric_name = "perplexity" if isinstance(self.eval_fn, Perplexity) else "metric"

    def _recipe(self, plan: RecipeLike, entry: Entry) -> None:
        began = time.perf_counter()
        done = self.tools.run(
            self.reference, plan, calibration=self.data, seed=self.seed, max_memory=self.max_memory,
            progress=self.stages,
        )  # fmt: skip
        report = done.report

        def results(artifact: Artifact) -> dict[str, Any]:
            options = {**self._judging(), "batch_sizes": (), "threads": self.threads[0]}
            report.verification = self.tools.verify(artifact, self.reference, **options)
            return report.verification.stored()

        self.stages.start("export", 0)
        path = self._path(entry.name)
        artifact = self.tools.export(done.graph, path, samples=done.samples[:1], results=results)
        assert report.verification is not None
        report.artifact = artifact
        report.verification = replace(report.verification, float_bytes=entry.baseline.nbytes)
        report.seconds = time.perf_counter() - began
        entry.report = report
        self._written(entry, artifact.path, artifact.nbytes, report.verification)

    def _peer(self, entry: Entry) -> None:
        self.stages.start("quantize", 0)
        path = self._path(entry.name)
        nbytes = self.files.quantize(entry.name, self.paths[_FLOAT], path, self.data)
        self._written(entry, path, nbytes, self.files.verify(path, **self._judging()))

    def _judging(self) -> dict[str, Any]:
        """What both kinds of files are compared by."""
        return {
            "samples": self.samples,
            "described": self.result.held_out,
            "eval_fn": self.eval_fn,
            "original_metric": self.result.baseline.metric,
            "progress": self.stages,
        }

    def _written(self, entry: Entry, path: Path, nbytes: int, verification: Verification) -> None:
        entry.nbytes, entry.path = nbytes, path if self.keep else None
        entry.fidelity = [c for c in verification.comparisons if c.what == "file vs original"]
        entry.metric = verification.metric.get("file")
        self.stages.start("memory", 0)
        entry.peak_memory = self.files.peak_memory(path)
        self.paths[entry.name] = path

    def _time(self, seconds: float) -> None:
        """All files together; the figures go to their entries as they come."""
        for threads in self.threads if self.timed and self.result.finished else ():
            self.stages.prefix = ""
            self.stages.start(f"timing on {thread_words(threads)}", 0)
            paths = {_FLOAT: self.paths[_FLOAT], **{e.name: self.paths[e.name] for e in self.result.finished}}
            opened, failed = self.files.open(paths, threads)
            for name, problem in failed.items():
                entry = self.result.entries[name]
                entry.status, entry.error = "failed", " ".join(problem.split())
            for timings in self.files.time(opened, threads, seconds, self.stages.step):
                self.result.baseline.timings.append(timings.pop(_FLOAT))
                for name, timing in timings.items():
                    self._timed(self.result.entries[name], timing)
                self._changed()

    def _timed(self, entry: Entry, timing: Timing) -> None:
        entry.timings.append(timing)
        if entry.report is not None and entry.report.verification is not None:
            entry.report.verification = replace(entry.report.verification, timings=tuple(entry.timings))

    def _path(self, name: str) -> Path:
        return self.folder / f"{_file_name(name)}.onnx"


class _Stages:
    """Progress whose titles begin with the entry that is at work."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.prefix = progress, ""

    def start(self, title: str, total: int) -> None:
        self.progress.start(self.prefix + title, total)

    def step(self, name: str) -> None:
        self.progress.step(name)

    def finish(self) -> None:
        self.progress.finish()


def _plans(
    recipes: Sequence[RecipeLike] | Mapping[str, RecipeLike], table: Mapping[str, type[Pass]]
) -> dict[str, RecipeLike]:
    """Recipes by name, read and checked."""
    if isinstance(recipes, str):
        raise RecipeError(f"recipes is {recipes!r}", expected="a list of recipes", fix=f"[{recipes!r}]")
    named = list(recipes.items()) if isinstance(recipes, Mapping) else [("", recipe) for recipe in recipes]
    if not named:
        raise RecipeError("there is no recipe", expected="at least one")
    plans: dict[str, RecipeLike] = {}
    for given, recipe in named:
        plan = resolve(recipe)
        if plan is not None:
            plan.build(table)
        name = given or (plan.name if plan is not None else "custom")
        # the uncompressed file is float.onnx
        if _file_name(name) in {"float", *map(_file_name, plans)}:
            raise RecipeError(
                f"two entries have the name {name}", fix="give a mapping of recipes by names of your own"
            )
        plans[name] = recipe if plan is None else plan
    return plans


def _parted(
    data: CalibrationData | None, reference: Graph
) -> tuple[CalibrationData | None, CalibrationData | None, str]:
    """Samples to calibrate on, samples to measure fidelity on, and words about the latter."""
    if data is None:
        return None, None, "random inputs"
    free = all(spec.dynamic and spec.dynamic[0] == (0, "batch") for spec in reference.inputs)
    least = 1 if free else len(next(iter(data)).inputs[0])
    held = min(max(data.num_samples // _HELD[0], least), max(_HELD[1], least)) // least * least
    if held >= data.num_samples:
        return data, data, f"{data.description}, which are the calibration samples"
    kept, out = data.parted(held)
    return kept, out, f"{out.description}, held out of the calibration"


def _file_name(name: str) -> str:
    return name.replace("/", "-")


def _one_line(error: Exception) -> str:
    """What went wrong, without what to do about it."""
    if isinstance(error, CompressError):
        return " ".join(error.problem.split())
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
