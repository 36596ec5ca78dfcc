"""Open the written file again and find out what it is worth: fidelity, speed, the user's metric.

Speed is measured against the uncompressed export of the same model on the same runtime, both files in one
process (`compress.exporters.timing`).
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact, Comparison, Timing, Verification
from compress.errors import CompressError, InputSpecError, VerificationError
from compress.exporters import find
from compress.exporters.exporter import Exporter, Running
from compress.exporters.timing import time_files
from compress.graph import Graph
from compress.inputs import cut, sizes_of
from compress.kv_cache import decoding, has_cache
from compress.numerics import Agreement
from compress.perplexity import EvalFn, Perplexity, Runner
from compress.pipeline import example_inputs, shapes_to_try
from compress.progress import Progress, Silent


def verify(
    artifact: Artifact,
    reference: Graph,
    *,
    samples: Sequence[Sequence[Tensor]] = (),
    described: str = "",
    eval_fn: EvalFn | None = None,
    original_metric: float | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    threads: int = 1,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> Verification:
    """Compare and time a written file.

    Args:
        artifact: the file and the graph it was written from.
        reference: the original, uncompressed graph.
        samples: real flat inputs, cut to the largest sizes that the file takes; what is too small is left
            out, as are batch sizes. Two random shapes are used where there are none.
        described: where the samples came from, for the report.
        eval_fn: a metric of a module, higher is better unless it has a true attribute `lower_is_better`; or
            a `Perplexity`.
        original_metric: what it gives for the original, where that is known already; no perplexity.
        batch_sizes: sizes to time at, where the batch is dynamic; empty to skip timing.
        threads: of the runtime.
        seconds: time spent on each batch size.

    Raises:
        VerificationError: the file cannot be run, or its shapes are wrong.
        InputSpecError: the metric fails.
        CalibrationError: the text of a perplexity does not fit the model.
    """
    progress = progress or Silent()
    exporter: Exporter = find(artifact.target, **artifact.options)
    session = exporter.open(artifact.path, threads=threads)
    specs = artifact.graph.inputs

    def within(inputs: Sequence[Tensor]) -> list[Tensor]:
        sizes = sizes_of(specs, inputs)
        nearest = exporter.nearest(artifact.graph, sizes)
        return cut(specs, inputs, {name: min(size, nearest[name]) for name, size in sizes.items()})

    def takes(inputs: Sequence[Tensor]) -> bool:
        sizes = sizes_of(specs, inputs)
        return exporter.nearest(artifact.graph, sizes) == sizes

    if session.stands_in:
        batch_sizes = ()
    progress.start("verify", 2 + len(batch_sizes) + _stages(eval_fn, "original", "compressed", "file"))
    plain = artifact.graph.decoded()
    inputs = [sample for sample in map(within, inputs_to_try(reference, samples)) if takes(sample)]
    if not inputs:
        samples, described = (), ""
        shapes = [exporter.nearest(artifact.graph, sizes) for sizes in shapes_to_try(artifact.graph)]
        inputs = [example_inputs(artifact.graph, sizes, seed=2) for sizes in shapes]
    progress.step("fidelity")
    comparisons = _compare(session, plain, reference, inputs)
    progress.step("fusion")
    unfused = exporter.decoded_on_every_call(artifact)
    measured = _measure(eval_fn, reference, plain, session, artifact.graph, original_metric, progress)
    timings, float_bytes = _time(
        exporter, session, reference, inputs[0], batch_sizes, threads, seconds, takes, progress
    )
    progress.finish()
    return Verification(
        inputs=described or _described(samples),
        comparisons=tuple(comparisons),
        timings=tuple(timings),
        float_bytes=float_bytes,
        unfused=tuple(unfused),
        environment={**session.environment, "threads": threads, "processor": processor()},
        stands_in=session.stands_in,
        **measured,
    )


def verify_foreign(
    session: Running,
    reference: Graph,
    *,
    samples: Sequence[Sequence[Tensor]] = (),
    described: str = "",
    eval_fn: EvalFn | None = None,
    original_metric: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a file of the same model that somebody else wrote, of which there is no graph; untimed.

    Args:
        session: the file, opened; it has the inputs and outputs of the model.
        reference, samples, described, eval_fn, original_metric: as for `verify`.

    Raises:
        VerificationError, InputSpecError, CalibrationError: as for `verify`.
    """
    progress = progress or Silent()
    progress.start("verify", 1 + _stages(eval_fn, "original", "file"))
    progress.step("fidelity")
    comparisons = _compare(session, None, reference, inputs_to_try(reference, samples))
    measured = _measure(eval_fn, reference, None, session, reference, original_metric, progress)
    progress.finish()
    return Verification(
        inputs=described or _described(samples), comparisons=tuple(comparisons),
        environment=dict(session.environment), **measured,
    )  # fmt: skip


def measure_original(eval_fn: EvalFn, reference: Graph) -> float:
    """The metric of the uncompressed model.

    Raises:
        InputSpecError: the metric fails.
        CalibrationError: the text of a perplexity does not fit the model.
    """
    if isinstance(eval_fn, Perplexity):
        eval_fn.prepare(reference)
    return _evaluate(eval_fn, reference.module())


class FileModule(torch.nn.Module):
    """A written file with the call signature of the captured model."""

    def __init__(self, session: Running, graph: Graph) -> None:
        super().__init__()
        self.session = session
        self.graph = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = iter(self.session(*self.graph.flatten(*args, **kwargs)))
        return self.graph.unflatten([None if n is None else next(flat) for n in self.graph.output_names])


def processor() -> str:
    """Name of the processor, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _described(samples: Sequence[Sequence[Tensor]]) -> str:
    return "calibration samples" if samples else "random inputs"


def inputs_to_try(reference: Graph, samples: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The samples and, at another shape, a part of the first; or random inputs at two shapes.

    With a key-value cache also the second half of a sample, whose cache holds the first.
    """
    if not samples:
        return [example_inputs(reference, sizes, seed=2) for sizes in shapes_to_try(reference)]
    half = {name: (size + 1) // 2 for name, size in sizes_of(reference.inputs, samples[0]).items()}
    found = [*(list(s) for s in samples), cut(reference.inputs, samples[0], half)]
    return [*found, decoding(reference, samples[0])] if has_cache(reference.inputs) else found


def _compare(
    session: Running, plain: Graph | None, reference: Graph, inputs: Sequence[Sequence[Tensor]]
) -> list[Comparison]:
    """File against original; both against the compressed graph, where there is one."""
    names = [n for n in reference.output_names if n is not None]
    # keys and values of every layer: their shapes are checked, and the logits tell what they are worth
    told = [n for n in names if not (n.startswith("present.") and has_cache(reference.inputs))]
    pairs = ["file vs original"]
    pairs += ["compressed graph vs original", "file vs compressed graph"] if plain else []
    found = {(pair, name): Agreement() for name in told for pair in pairs}
    for sample in inputs:
        original = reference.named(reference.run(sample))
        compressed = plain.named(plain.run(sample)) if plain else original
        written = session(*sample)
        for name, o, c, w in zip(names, original, compressed, written, strict=True):
            if o.shape != w.shape:
                shapes = ", ".join(str(list(t.shape)) for t in sample)
                raise VerificationError(
                    f"at inputs {shapes} the file's {name} is {list(w.shape)}", expected=f"{list(o.shape)}"
                )
            for pair, (a, b) in zip(pairs, ((o, w), (o, c), (c, w)), strict=False):
                if name in told:
                    found[pair, name].update(a, b)
    return [
        Comparison(pair, name, a.shape, a.sqnr_db, a.cosine, a.largest, a.top1)
        for (pair, name), a in found.items()
    ]


def _stages(eval_fn: EvalFn | None, *models: str) -> int:
    return 0 if eval_fn is None else 1 if isinstance(eval_fn, Perplexity) else len(models)


def _measure(
    eval_fn: EvalFn | None,
    reference: Graph,
    plain: Graph | None,
    session: Running,
    written: Graph,
    known: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Fields of `Verification` about the metric; `written` has the signature of the file."""
    if eval_fn is None:
        return {}
    if isinstance(eval_fn, Perplexity):
        progress.step("perplexity")
        return _perplexity(eval_fn, reference, plain, session)
    metric = {}
    progress.step("metric of the original")
    metric["original"] = _evaluate(eval_fn, reference.module()) if known is None else known
    if plain is not None:
        progress.step("metric of the compressed")
        metric["compressed"] = _evaluate(eval_fn, plain.module())
    progress.step("metric of the file")
    metric["file"] = _evaluate(eval_fn, FileModule(session, written))
    return {"metric": metric, "lower_is_better": bool(getattr(eval_fn, "lower_is_better", False))}


def _perplexity(
    perplexity: Perplexity, reference: Graph, plain: Graph | None, session: Running
) -> dict[str, Any]:
    """Fields of `Verification`, from running all of them side by side."""
    perplexity.prepare(reference)
    models: dict[str, Runner] = {"original": lambda inputs: reference.named(reference.run(inputs))}
    if plain is not None:
        models["compressed"] = lambda inputs: plain.named(plain.run(inputs))
    models["file"] = lambda inputs: session(*inputs)
    scores = perplexity.compare(models)
    return {
        "metric": {name: score.perplexity for name, score in scores.items()},
        "metric_name": "perplexity",
        "lower_is_better": perplexity.lower_is_better,
        "measured_on": perplexity.description,
        "kl": {name: score.kl for name, score in scores.items() if name != "original"},
    }


def _evaluate(eval_fn: EvalFn, module: torch.nn.Module) -> float:
    try:
        with torch.no_grad():
            return float(eval_fn(module))
    except CompressError:
        raise
    except Exception as error:
        # the user's code, not a file that would be wrong
        raise InputSpecError(
            f"the metric failed: {type(error).__name__}: {error}",
            expected="a callable that takes the model and returns a number",
        ) from error


def _time(
    exporter: Exporter,
    session: Running,
    reference: Graph,
    sample: Sequence[Tensor],
    batch_sizes: Sequence[int],
    threads: int,
    seconds: float,
    takes: Callable[[Sequence[Tensor]], bool],
    progress: Progress,
) -> tuple[list[Timing], int]:
    if not batch_sizes:
        return [], 0
    with tempfile.TemporaryDirectory(prefix="compress-float-") as folder:
        baseline = Path(folder) / f"float{exporter.suffix}"
        exporter.write_float(reference, baseline)
        # as `Artifact.nbytes` counts, not the ONNX file that an engine is built from
        counted = (baseline.name, f"{baseline.name}.data")
        nbytes = sum(f.stat().st_size for f in Path(folder).iterdir() if f.name in counted)
        files = {"float": exporter.open(baseline, threads=threads), "file": session}
        found = time_files(
            files, reference, sample, batch_sizes, threads=threads, seconds=seconds, step=progress.step,
            takes=takes,
        )  # fmt: skip
        return [timing["file"] for timing in found], nbytes


def machine() -> dict[str, Any]:
    """What results depend on, for reports."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
