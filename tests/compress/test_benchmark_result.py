"""What a benchmark says of its entries: the Pareto front, the best within limits, honest words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact import Comparison, Timing
from compress.benchmark_result import Baseline, Benchmark, Entry
from compress.errors import GoalMissed, InputSpecError, OutputError
from compress.schemas import report_schema


def fidelity(db: float, cosine: float = 0.99) -> Comparison:
    return Comparison("file vs original", "out", (2, 10), db, cosine, 0.1, 0.98)


def timing(speedup: float, batch: int = 1, threads: int = 1, spread: float = 0.01) -> Timing:
    return Timing({"batch": batch}, 8.0, 8.0 / speedup, speedup, spread, 20, threads)


def entry(
    name: str,
    nbytes: int,
    db: float,
    *timings: Timing,
    metric: float | None = None,
    base: Baseline | None = None,
) -> Entry:
    return Entry(
        name, "onnxruntime" if name.startswith("ort") else "compress", base or Baseline(1000), "ok", "",
        nbytes, 2 * nbytes, list(timings), [fidelity(db + 5), fidelity(db)], metric,
    )  # fmt: skip


def benchmark(*entries: Entry, complete: bool = True) -> Benchmark:
    base = entries[0].baseline if entries else Baseline(1000)
    provenance = {
        "source": "m", "sha256": None, "calibration_sha256": None, "notes": [], "seed": 0, "versions": {},
    }  # fmt: skip
    found = Benchmark(provenance, "none", "random inputs", base, {e.name: e for e in entries}, complete)
    found.mark_front()
    return found


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=8))
def test_the_front_of_two_goals(points: list[tuple[int, int]]) -> None:
    """The definition for two goals: going by size, the best quality so far rises at each point."""
    found = benchmark(*(entry(str(i), size, float(q)) for i, (size, q) in enumerate(points)))
    best = -1
    front = set()
    for size in sorted({s for s, _ in points}):
        top = max(q for s, q in points if s == size)
        if top > best:
            best = top
            front |= {str(i) for i, point in enumerate(points) if point == (size, top)}
    assert {e.name for e in found.pareto} == front
    assert [e.nbytes for e in found.pareto] == sorted(e.nbytes for e in found.pareto)


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 3), st.floats(0.5, 2), st.floats(0, 0.3)),
        min_size=1,
        max_size=8,
    )
)
def test_noise_never_empties_the_front(points: list[tuple[int, int, float, float]]) -> None:
    found = benchmark(
        *(entry(str(i), n, float(q), timing(s, spread=w)) for i, (n, q, s, w) in enumerate(points))
    )
    assert found.pareto


def test_times_within_noise_are_equal() -> None:
    # larger and no better, and only 3 % faster
    near = benchmark(entry("a", 100, 30, timing(2.0)), entry("b", 110, 30, timing(2.06)))
    assert [e.name for e in near.pareto] == ["a"]
    far = benchmark(entry("a", 100, 30, timing(2.0)), entry("b", 110, 30, timing(2.4)))
    assert [e.name for e in far.pareto] == ["a", "b"]
    wide = benchmark(entry("a", 100, 30, timing(2.0)), entry("b", 110, 30, timing(2.4, spread=0.3)))
    assert [e.name for e in wide.pareto] == ["a"]


def test_a_file_that_is_worse_than_float_is_not_on_the_front() -> None:
    assert not benchmark(entry("a", 1100, 30, timing(0.9))).pareto
    assert benchmark(entry("a", 1100, 30, timing(1.5))).pareto
    base = Baseline(1000, metric=0.9)
    assert benchmark(entry("a", 1100, 30, timing(0.9), metric=0.91, base=base)).pareto


def test_the_metric_counts_before_the_noise() -> None:
    base = Baseline(1000, metric=40.0, metric_name="perplexity", lower_is_better=True)
    found = benchmark(
        entry("a", 100, 30, metric=41.0, base=base),
        entry("b", 100, 20, metric=40.5, base=base),
        entry("c", 120, 10, metric=39.0, base=base),
    )
    assert [e.name for e in found.pareto] == ["b", "c"]
    assert found["a"].drop == 1 and found["c"].drop == -1
    assert found.best("quality").name == "c"
    assert "best perplexity: c (40 -> 39)" in found.headline()


def test_without_a_metric_of_its_own_an_entry_is_no_match() -> None:
    base = Baseline(1000, metric=0.9)
    found = benchmark(
        entry("good", 100, 40, metric=0.895, base=base), entry("bad", 100, 3, metric=math.nan, base=base)
    )
    assert [e.name for e in found.pareto] == ["good"]
    assert found.headline().endswith("best metric: good (0.9 -> 0.895)")
    lost = benchmark(entry("bad", 100, 3, metric=math.nan, base=base))
    assert lost.headline() == "smallest: bad (10.00x smaller)"


def test_the_best_metric_is_not_called_the_closest() -> None:
    base = Baseline(1000, metric=0.9)
    near, far = entry("near", 100, 60, metric=0.9, base=base), entry("far", 90, 2, metric=0.97, base=base)
    assert "best metric: far (0.9 -> 0.97)" in benchmark(near, far).headline()
    plain = benchmark(entry("near", 100, 60), entry("far", 90, 2))
    assert "closest to the original: near (60.0 dB)" in plain.headline()


def test_an_output_that_is_not_finite_keeps_no_limit() -> None:
    odd = entry("odd", 100, 40)
    odd.fidelity.append(Comparison("file vs original", "two", (2,), -math.inf, math.nan, math.inf, 0.0))
    assert math.isnan(odd.cosine) and odd.sqnr_db == -math.inf
    with pytest.raises(GoalMissed):
        benchmark(odd).best("size", min_cosine=0.9)


def test_the_best_within_limits() -> None:
    found = benchmark(
        entry("int8", 250, 40, timing(2.0), timing(0.8, batch=8)),
        entry("int4", 150, 25, timing(1.1), timing(1.0, batch=8)),
        entry("ort-int8-dynamic", 240, 20, timing(2.1), timing(1.4, batch=8)),
    )
    assert found.best("size").name == "int4"
    assert found.best("size", min_sqnr_db=30).name == "int8"
    assert found.best("speed").name == "ort-int8-dynamic"
    assert found.best("speed", maker="compress").name == "int8"
    assert found.best("speed", maker="compress", batch=8).name == "int4"
    assert found.best("quality", max_bytes=245).name == "int4"
    assert found.best("memory", min_speedup=1.5).name == "ort-int8-dynamic"
    with pytest.raises(GoalMissed, match="within these limits") as missed:
        found.best("size", min_sqnr_db=90)
    assert "int8: 4.00x smaller" in str(missed.value)
    with pytest.raises(GoalMissed):  # there is no metric, so nobody keeps within a limit of it
        found.best("size", max_drop=100)
    with pytest.raises(InputSpecError, match="best by 'luck'"):
        found.best("luck")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputSpecError, match="not timed at"):
        found.best("speed", batch=64)


def test_figures_of_an_entry() -> None:
    one = entry("int8", 250, 40, timing(2.0), timing(0.5, batch=8, threads=2))
    assert one.smaller == 4 and one.speedup == 2 and one.sqnr_db == 40 and one.top1 == 0.98
    assert one.speedup_at(batch=8) == 0.5 == one.speedup_at(threads=2)
    assert math.isnan(one.drop)
    assert one.headline() == (
        "4.00x smaller (1.0 kB -> 0.2 kB), 2.00x faster at batch 1, 2.00x SLOWER at batch 8 on 2 threads, "
        "cosine 0.9900 (40.0 dB) to the original"
    )
    found = benchmark(one)
    with pytest.raises(InputSpecError, match="no entry 'int3'"):
        found["int3"]


def test_what_failed_is_in_the_headline_and_takes_part_in_nothing() -> None:
    bad = entry("int4", 1, 99)
    bad.status, bad.error = "failed", "no such luck"
    stopped = entry("int3", 1, 99)
    stopped.status, stopped.error = "interrupted", "interrupted by the user"
    found = benchmark(entry("int8", 250, 40, timing(2.0)), bad, stopped)
    assert [e.name for e in found.pareto] == ["int8"] == [e.name for e in found.finished]
    assert [e.name for e in found.failed] == ["int4", "int3"] and not found.ok
    assert found.headline().endswith("int4 FAILED, int3 INTERRUPTED")
    assert bad.headline() == "failed: no such luck"
    assert benchmark(complete=False).headline() == "NOT COMPLETE"


def test_as_json(tmp_path: Path) -> None:
    found = benchmark(entry("int8", 250, math.inf, timing(2.0)))
    path = found.write(tmp_path / "b.json")
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    data = json.loads(path.read_text())
    jsonschema.Draft202012Validator(report_schema()).validate(data)
    assert data["entries"][0]["fidelity"][1]["sqnr_db"] is None  # infinite
    assert data["entries"][0]["timings"] == [
        {
            "sizes": {"batch": 1},
            "threads": 1,
            "float_ms": 8,
            "ms": 4,
            "speedup": 2,
            "spread": 0.01,
            "samples": 20,
        }
    ]
    for wrong in (
        {**data, "more": 1},
        {**data, "kind": "run"},
        {k: v for k, v in data.items() if k != "float"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(report_schema()).validate(wrong)
    with pytest.raises(OutputError, match="is no report"):
        found.write(tmp_path / "b.pdf")
    with pytest.raises(OutputError, match="does not exist"):
        found.write(tmp_path / "missing" / "b.json")
