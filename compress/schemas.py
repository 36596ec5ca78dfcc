"""The schema of the JSON reports: of one run (`Report`) and of a benchmark (`Benchmark`).

It describes what is written and nothing else: a key that is not in it is an error. `schema_version` goes up
when a key changes its meaning or goes; new keys may come without. Numbers that are infinite (the SQNR of
equal outputs) or that nobody measured are null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


Sizes = Annotated[dict[str, int], Field(description="Dynamic dimensions of the inputs, such as batch.")]
Names = list[str]
Sparse = Annotated[float, Field(ge=0, le=1, description="Fraction of zeros.")]


# -- of one run -----------------------------------------------------------------------------------


class Provenance(_Closed):
    """Where model, data and figures came from."""

    source: str | None
    sha256: str | None = Field(description="Of the model's weights.")
    calibration_sha256: str | None
    notes: Names
    seed: int
    versions: dict[str, str]
    metric: dict[str, float | None] = Field({}, description="Of the graphs, where `run` was given a metric.")
    machine: dict[str, str | int | None] = Field(
        {}, description="Of a benchmark: processor, system, runtime."
    )


class Layer(_Closed):
    """What all passes together did to one weight."""

    layer: str
    weight: str
    action: str = Field(description='In the field\'s words, such as "int4 g32".')
    bits: float = Field(description="Stored for each weight, scales included.")
    sparsity: Sparse
    bytes_before: int
    bytes: int
    error: float | None = Field(description="Relative error of the layer's output on the calibration data.")
    note: str


class Change(_Closed):
    """What one pass did to one weight."""

    site: str
    weight: str
    action: str
    bits: float
    sparsity: Sparse
    bytes_before: int
    bytes_after: int
    error: float | None


class Note(_Closed):
    """What a pass declined to do, and why."""

    site: str
    reason: str


class PassStep(_Closed):
    """One pass of the recipe."""

    name: str
    options: dict[str, Any]
    changes: list[Change]
    notes: list[Note]
    seconds: float


class Lowered(_Closed):
    """How one weight stands in the file."""

    weight: str
    form: str
    loads_as: str
    nodes: Names
    reason: str


class BuiltLayer(_Closed):
    """One layer of a file that was compiled for its target."""

    name: str
    kind: str
    nodes: Names
    inputs: Names
    outputs: Names
    constants: list[tuple[str, list[int]]]


class File(_Closed):
    """The proven file."""

    path: str = Field(description="Its name, without the folder.")
    target: str
    bytes: int
    proof_db: float | None = Field(description="Worst SQNR of the file, nothing fused, against the graph.")
    lowered: list[Lowered]
    built_for: dict[str, str]
    layers: list[BuiltLayer]


class Comparison(_Closed):
    """Two models on the same inputs, one output."""

    what: str
    output: str
    shape: list[int]
    sqnr_db: float | None
    cosine: float | None
    max_abs: float | None
    top1: float | None = Field(description="Fraction of rows with the same argmax.")


class RunTiming(_Closed):
    """Medians of interleaved calls against the uncompressed export."""

    sizes: Sizes
    float_ms: float
    compressed_ms: float
    speedup: float = Field(description="Median ratio of neighbouring calls; above 1 is faster.")
    spread: float = Field(description="Half the interquartile range of these ratios.")
    samples: int
    threads: int


class Verification(_Closed):
    """What running the file showed."""

    inputs: str
    comparisons: list[Comparison]
    timings: list[RunTiming]
    float_bytes: int
    unfused: Names
    metric: dict[str, float | None]
    metric_name: str
    lower_is_better: bool
    measured_on: str
    kl: dict[str, float | None]
    environment: dict[str, str | int]
    stands_in: str


class RunReport(_Closed):
    """One run: `compress MODEL`, written as OUT.report.json."""

    schema_version: Literal[1]
    kind: Literal["run"]
    headline: str
    recipe: dict[str, Any] = Field(description="Resolved: every default is written out.")
    provenance: Provenance
    calibration: str
    parameters: int
    float_bytes: int = Field(description="Of all tensors as captured.")
    tensor_bytes: int = Field(description="Of all tensors now.")
    seconds: float
    layers: list[Layer]
    unreached: dict[str, str] = Field(description="Weight -> the operator that reads it.")
    passes: list[PassStep]
    artifact: File | None
    verification: Verification | None
    warnings: Names


# -- of a benchmark -------------------------------------------------------------------------------


class FloatTiming(_Closed):
    """Of the uncompressed file."""

    sizes: Sizes
    threads: int
    ms: float


class Float(_Closed):
    """The uncompressed file."""

    bytes: int
    peak_memory_bytes: int | None = Field(
        description="What loading and running it at the first batch size adds to a process at its highest."
    )
    metric: float | None = Field(description="Of the original model.")
    timings: list[FloatTiming]


class EntryTiming(_Closed):
    """Medians of calls interleaved with those of every other file."""

    sizes: Sizes
    threads: int
    float_ms: float
    ms: float
    speedup: float = Field(description="Median ratio float / this of neighbouring calls; above 1 is faster.")
    spread: float = Field(description="Half the interquartile range of these ratios.")
    samples: int


class Fidelity(_Closed):
    """File against original, one output, on what `held_out` of the benchmark says."""

    output: str
    sqnr_db: float | None
    cosine: float | None
    top1: float | None = Field(description="Fraction of rows with the same argmax.")
    max_abs: float | None


class EntryReport(_Closed):
    """One recipe or peer."""

    name: str
    maker: Literal["compress", "onnxruntime"]
    status: Literal["ok", "failed", "interrupted", "skipped"]
    error: str | None
    headline: str
    bytes: int | None
    peak_memory_bytes: int | None
    timings: list[EntryTiming]
    fidelity: list[Fidelity]
    metric: float | None
    pareto: bool = Field(description="By size, first timing, and the metric, or else the SQNR.")
    seconds: float
    file: str | None = Field(description="Its name, where it was kept.")
    report: RunReport | None


class BenchmarkReport(_Closed):
    """One benchmark: `compress bench`."""

    schema_version: Literal[1]
    kind: Literal["benchmark"]
    headline: str
    provenance: Provenance
    calibration: str
    held_out: str = Field(description="What fidelity was measured on.")
    float_: Float = Field(alias="float")
    metric_name: str | None
    lower_is_better: bool
    entries: list[EntryReport]
    complete: bool = Field(description="False while it runs, and where it was stopped.")
    seconds: float
    warnings: Names


def report_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of both kinds of reports, told apart by `kind`."""
    either: TypeAdapter[Any] = TypeAdapter(
        Annotated[RunReport | BenchmarkReport, Field(discriminator="kind")]
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Reports of compress",
        **either.json_schema(),
    }
