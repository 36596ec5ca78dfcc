"""Open the written file again and find out what it is worth: fidelity, speed, the user's metric.

Speed is measured against the uncompressed export of the same model on the same runtime: both files in
one process, one thread, called in turn, so that a busy machine slows both; the figure is the median of
the pairwise ratios. Slower is an outcome like any other and is reported as such.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact, Comparison, Timing, Verification
from compress.errors import CompressError, InputSpecError, VerificationError
from compress.exporters import find
from compress.exporters.exporter import Exporter, Running
from compress.graph import Graph
from compress.inputs import cut, sizes_of
from compress.kv_cache import decoding, has_cache
from compress.numerics import Agreement
from compress.perplexity import Perplexity
from compress.pipeline import example_inputs, shapes_to_try
from compress.progress import Progress, Silent

EvalFn = Callable[[torch.nn.Module], float]


def verify(
    artifact: Artifact,
    reference: Graph,
    *,
    samples: Sequence[Sequence[Tensor]] = (),
    described: str = "",
    eval_fn: EvalFn | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    threads: int = 1,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> Verification:
    """Compare and time a written file.

    Args:
        artifact: the file and the graph it was written from.
        reference: the original, uncompressed graph.
        samples: real flat inputs; two random shapes are used where there are none.
        described: where the samples came from, for the report.
        eval_fn: a metric of a module, higher is better unless it has a true attribute `lower_is_better`; or
            a `Perplexity`.
        batch_sizes: sizes to time at, where the batch is dynamic; empty to skip timing.
        threads: of the runtime.
        seconds: time spent on each batch size.

    Raises:
        VerificationError: the file cannot be run, or its shapes are wrong.
        InputSpecError: the metric fails.
        CalibrationError: the text of a perplexity does not fit the model.
    """
    progress = progress or Silent()
    stages = 0 if eval_fn is None else 1 if isinstance(eval_fn, Perplexity) else 3
    exporter: Exporter = find(artifact.target)
    session = exporter.open(artifact.path, threads=threads)
    if session.stands_in:
        batch_sizes = ()
    progress.start("verify", 2 + len(batch_sizes) + stages)
    plain = artifact.graph.decoded()
    inputs = _inputs(reference, samples)
    progress.step("fidelity")
    comparisons = _compare(session, plain, reference, inputs)
    progress.step("fusion")
    unfused = exporter.decoded_on_every_call(artifact)
    measured: dict[str, Any] = {}
    if isinstance(eval_fn, Perplexity):
        progress.step("perplexity")
        measured = _perplexity(eval_fn, reference, plain, session)
    elif eval_fn is not None:
        models = {
            "original": reference.module(),
            "compressed": plain.module(),
            "file": FileModule(session, artifact.graph),
        }
        metric = {}
        for name, module in models.items():
            progress.step(f"metric of the {name}")
            metric[name] = _evaluate(eval_fn, module)
        measured = {"metric": metric, "lower_is_better": bool(getattr(eval_fn, "lower_is_better", False))}
    timings, float_bytes = _time(
        exporter, session, reference, inputs[0], batch_sizes, threads, seconds, progress
    )
    progress.finish()
    return Verification(
        inputs=described or ("calibration samples" if samples else "random inputs"),
        comparisons=tuple(comparisons),
        timings=tuple(timings),
        float_bytes=float_bytes,
        unfused=tuple(unfused),
        environment={**session.environment, "threads": threads, "processor": processor()},
        stands_in=session.stands_in,
        **measured,
    )


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


def _inputs(reference: Graph, samples: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The samples and, at another shape, a part of the first; or random inputs at two shapes.

    With a key-value cache also the second half of a sample, whose cache holds the first.
    """
    if not samples:
        return [example_inputs(reference, sizes, seed=2) for sizes in shapes_to_try(reference)]
    half = {name: (size + 1) // 2 for name, size in sizes_of(reference.inputs, samples[0]).items()}
    found = [*(list(s) for s in samples), cut(reference.inputs, samples[0], half)]
    return [*found, decoding(reference, samples[0])] if has_cache(reference.inputs) else found


def _compare(
    session: Running, plain: Graph, reference: Graph, inputs: Sequence[Sequence[Tensor]]
) -> list[Comparison]:
    names = [n for n in reference.output_names if n is not None]
    # keys and values of every layer: their shapes are checked, and the logits tell what they are worth
    told = [n for n in names if not (n.startswith("present.") and has_cache(reference.inputs))]
    pairs = ("file vs original", "compressed graph vs original", "file vs compressed graph")
    found = {(pair, name): Agreement() for name in told for pair in pairs}
    for sample in inputs:
        original = reference.named(reference.run(sample))
        compressed = plain.named(plain.run(sample))
        written = session(*sample)
        for name, o, c, w in zip(names, original, compressed, written, strict=True):
            if o.shape != w.shape:
                shapes = ", ".join(str(list(t.shape)) for t in sample)
                raise VerificationError(
                    f"at inputs {shapes} the file's {name} is {list(w.shape)}", expected=f"{list(o.shape)}"
                )
            for pair, (a, b) in zip(pairs, ((o, w), (o, c), (c, w)), strict=True):
                if name in told:
                    found[pair, name].update(a, b)
    return [
        Comparison(pair, name, a.shape, a.sqnr_db, a.cosine, a.largest, a.top1)
        for (pair, name), a in found.items()
    ]


def _perplexity(perplexity: Perplexity, reference: Graph, plain: Graph, session: Running) -> dict[str, Any]:
    """Fields of `Verification`, from running all three side by side."""
    perplexity.prepare(reference)
    scores = perplexity.compare(
        {
            "original": lambda inputs: reference.named(reference.run(inputs)),
            "compressed": lambda inputs: plain.named(plain.run(inputs)),
            "file": lambda inputs: session(*inputs),
        }
    )
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
    progress: Progress,
) -> tuple[list[Timing], int]:
    if not batch_sizes:
        return [], 0
    with tempfile.TemporaryDirectory(prefix="compress-float-") as folder:
        baseline = Path(folder) / f"float{exporter.suffix}"
        exporter.write_float(reference, baseline)
        nbytes = sum(f.stat().st_size for f in Path(folder).iterdir())
        original = exporter.open(baseline, threads=threads)
        timings = []
        cases = [(sample, size) for size in (batch_sizes if _has_batch(reference) else [0])]
        if has_cache(reference.inputs) and not sizes_of(reference.inputs, sample)["past"]:
            # decoding is what takes the time; of prompts the smallest batch
            step = decoding(reference, _batch_of(reference, sample, 1), tokens=1)
            cases = [*((step, size) for _, size in cases), cases[0]]
        for given, size in cases:
            progress.step(f"speed at batch {size}" if size else "speed")
            inputs = _batch_of(reference, given, size)
            sizes = sizes_of(reference.inputs, inputs)
            timings.append(_pairwise(original, session, inputs, sizes, seconds))
    return timings, nbytes


def _has_batch(reference: Graph) -> bool:
    return any(symbol == "batch" for spec in reference.inputs for _, symbol in spec.dynamic)


def _batch_of(reference: Graph, sample: Sequence[Tensor], size: int) -> list[Tensor]:
    """The sample repeated or cut to a batch of this size."""
    result = []
    for spec, tensor in zip(reference.inputs, sample, strict=True):
        for axis, symbol in spec.dynamic:
            if symbol == "batch":
                index = torch.arange(size) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        result.append(tensor)
    return result


def _pairwise(
    original: Running, compressed: Running, inputs: Sequence[Tensor], sizes: dict[str, int], seconds: float
) -> Timing:
    calls = (original.call(inputs), compressed.call(inputs))
    pairs: list[tuple[float, float]] = []
    clock = time.perf_counter
    end = clock() + seconds
    while len(pairs) < 5 or (clock() < end and len(pairs) < 300):
        pair = []
        for call in calls:
            call()  # warm: the other file has just been through the caches
            began = clock()
            call()
            pair.append(clock() - began)
        pairs.append((pair[0], pair[1]))
    ratios = sorted(a / b for a, b in pairs)
    quarters = statistics.quantiles(ratios, n=4)
    return Timing(
        sizes=sizes,
        float_ms=1e3 * statistics.median(a for a, _ in pairs),
        compressed_ms=1e3 * statistics.median(b for _, b in pairs),
        speedup=statistics.median(ratios),
        spread=(quarters[2] - quarters[0]) / 2,
        samples=len(pairs),
    )


def machine() -> dict[str, Any]:
    """What results depend on, for reports."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
