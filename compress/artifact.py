"""A written file, and what was found out about it by running it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.graph import Graph


@dataclass(frozen=True)
class Lowered:
    """How one weight stands in the file.

    Attributes:
        weight: its name.
        form: operators, e.g. "DequantizeLinear(INT4) -> MatMul".
        loads_as: what the target makes of it, e.g. "MatMulNBits" or "decoded at load".
        nodes: names of the file's nodes that decode it.
        reason: why the target runs it as a float weight, where that is worth saying.
    """

    weight: str
    form: str
    loads_as: str
    nodes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class BuiltLayer:
    """One layer of a file that was compiled for its target, as the compiler lists it.

    Attributes:
        name: the compiler's own.
        kind: e.g. "runtime_fusion" (finished on the GPU it will run on), "correlation" (a convolution).
        nodes: names of the ONNX nodes it stands for.
        inputs, outputs: types of what it reads and writes, e.g. "Half".
        constants: type and shape of every weight in it.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Artifact:
    """A proven file.

    Attributes:
        path: the file (external data lies beside it as ``<name>.data``).
        target: exporter that wrote it.
        graph: what was written.
        nbytes: size on disk, external data included.
        lowered: the form of every encoded weight.
        proof_db: worst SQNR over outputs and shapes of the file, run operator by operator,
            against `graph`, in dB.
        built_for: what a compiled file runs on and takes: GPUs, precision, sizes; empty otherwise.
        layers: of a compiled file.
        options: of the exporter that wrote it.
    """

    path: Path
    target: str
    graph: Graph
    nbytes: int
    lowered: tuple[Lowered, ...]
    proof_db: float
    built_for: dict[str, str] = field(default_factory=dict)
    layers: tuple[BuiltLayer, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same inputs, one output.

    Attributes:
        what: e.g. "file vs original".
        output: name of the output.
        shape: of the output.
        sqnr_db: signal to noise in dB.
        cosine: mean over rows.
        max_abs: largest absolute difference.
        top1: fraction of rows with the same argmax.
    """

    what: str
    output: str
    shape: tuple[int, ...]
    sqnr_db: float
    cosine: float
    max_abs: float
    top1: float


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved runs.

    Attributes:
        sizes: the dynamic dimensions of this run.
        float_ms, compressed_ms: median milliseconds of one call.
        speedup: median of the pairwise ratios float / compressed; above 1 is faster.
        spread: half the interquartile range of those ratios; differences below it are noise.
        samples: pairs measured.
        threads: of the runtime.
    """

    sizes: dict[str, int]
    float_ms: float
    compressed_ms: float
    speedup: float
    spread: float
    samples: int
    threads: int = 1


@dataclass(frozen=True)
class Verification:
    """What running the file showed.

    Attributes:
        inputs: where the inputs came from.
        comparisons: file and compressed graph against the original, file against compressed graph.
        timings: against the uncompressed export on the same runtime; empty if not asked for.
        float_bytes: size of that export; 0 if not made.
        stands_in: why the file itself was not run, and what was run in its place; empty if it was.
        unfused: weights that the runtime decodes on every call.
        metric: value of the metric for "original", "compressed" and "file"; empty without one.
        metric_name: "perplexity", or "metric" for one of the user's.
        lower_is_better: whether a smaller metric is a better one.
        measured_on: the text of a perplexity, its windows and tokens.
        kl: with a perplexity, mean KL divergence from the original's next token, nats, for "compressed" and
            "file".
        environment: runtime version, processor, threads.
    """

    inputs: str
    comparisons: tuple[Comparison, ...]
    timings: tuple[Timing, ...] = ()
    float_bytes: int = 0
    unfused: tuple[str, ...] = ()
    metric: dict[str, float] = field(default_factory=dict)
    metric_name: str = "metric"
    lower_is_better: bool = False
    measured_on: str = ""
    kl: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    stands_in: str = ""

    @property
    def drop(self) -> float:
        """By how much the file's metric is worse than the original's; negative where it is better."""
        drop = self.metric["original"] - self.metric["file"]
        return -drop if self.lower_is_better else drop

    def stored(self) -> dict[str, Any]:
        """What goes into the file: no timings, they differ from run to run; no infinities, JSON has none."""
        compared = [
            {"what": c.what, "output": c.output, "cosine": round(c.cosine, 4), "top1": round(c.top1, 4)}
            for c in self.comparisons
            if c.what == "file vs original"
        ]

        def finite(values: dict[str, float]) -> dict[str, float | str]:
            return {k: float(f"{v:.6g}") if math.isfinite(v) else str(v) for k, v in values.items()}

        results = {"compared": compared, "metric": finite(self.metric), "inputs": self.inputs}
        if self.kl:
            results["perplexity"] = {"text": self.measured_on, "kl": finite(self.kl)}
        return results
