"""Benchmarks of small models: all entries side by side, and what happens when one of them goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import torch

import compress
from compress import api
from compress.errors import InputSpecError, PassError, RecipeError
from compress.pipeline import Context, PassResult
from compress.schemas import report_schema
from compress.testing import MODELS, make

pytest.importorskip("onnxruntime", reason="needs the onnx extra")

FIGURES: dict[str, Any] = {"seconds": 0.0, "batch_sizes": (1, 4)}


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory takes a process for each file; `tests/exporters/test_memory.py` tests that."""
    monkeypatch.setattr("compress.exporters.memory.peak_memory", lambda *_, **__: 1000)


class Broken(compress.Pass):
    """Raises what it is told."""

    name: ClassVar[str] = "broken"
    error: ClassVar[BaseException] = ZeroDivisionError("on purpose\nand more")

    def run(self, graph: compress.Graph, context: Context) -> PassResult:
        raise self.error


def test_all_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.exporters import ort_peers

    monkeypatch.setattr(ort_peers, "ORT_PEERS", ort_peers.ORT_PEERS[:3])  # the last takes long
    x = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    seen: list[str] = []

    def metric(module: torch.nn.Module) -> float:
        seen.append(type(module).__name__)
        return float(module(x).square().mean())

    grown: list[dict[str, Any]] = []
    found = compress.benchmark(
        make("products"),
        {"four": "int4"},
        peers=["ort"],
        eval_fn=metric,
        threads=(1, 2),
        calibration=x,
        folder=tmp_path,
        on_change=lambda b: grown.append(json.loads(b.to_json())),
        **FIGURES,
    )
    assert found.ok and found.complete
    statuses = {name: entry.status for name, entry in found.entries.items()}
    assert statuses == {
        "four": "ok", "ort-int8-dynamic": "ok", "ort-int8-static": "skipped",
        "ort-int4-rtn": "ok",
    }  # fmt: skip
    # the original's metric once, then that of our graph and file, and of the peers' files
    assert len(seen) == 1 + 2 + 2
    assert found.held_out.startswith("4 of 32 samples") and found.calibration.startswith("28 of 32 samples")
    for entry in found.finished:
        assert entry.path == tmp_path / f"{entry.name}.onnx" and entry.nbytes == entry.path.stat().st_size
        assert [(t.sizes["batch"], t.threads) for t in entry.timings] == [(1, 1), (4, 1), (1, 2), (4, 2)]
        # all files were timed in the same rounds
        assert [t.float_ms for t in entry.timings] == [t.compressed_ms for t in found.baseline.timings]
        assert entry.cosine > 0.9 and entry.sqnr_db > 8
        assert entry.metric == pytest.approx(found.baseline.metric, rel=0.2)
    assert found["four"].sqnr_db > found["ort-int4-rtn"].sqnr_db
    assert found["four"].report is not None
    verification = found["four"].report.verification
    assert verification is not None and list(verification.timings) == found["four"].timings
    assert verification.float_bytes == found.baseline.nbytes
    assert found["ort-int4-rtn"].report is None
    # as it grew, and in the end
    validator = jsonschema.Draft202012Validator(report_schema())
    for data in grown:
        validator.validate(data)
    assert [data["complete"] for data in grown] == [False] * (len(grown) - 1) + [True]
    assert grown[0]["entries"][0]["status"] == "ok" and grown[0]["entries"][1]["status"] == "skipped"
    validator.validate(json.loads(json.dumps(found["four"].report.as_dict())))


FINE: dict[str, Any] = {"int8-weight-only": "int8-weight-only"}
BROKEN: dict[str, Any] = {"broken": [Broken()]}


def run(recipes: dict[str, Any], **options: Any) -> compress.Benchmark:
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    return compress.benchmark(make("products"), recipes, calibration=x, **{**FIGURES, **options})


def test_one_that_fails_takes_nothing_from_the_others() -> None:
    found = run({**BROKEN, **FINE})
    assert [e.status for e in found.entries.values()] == ["failed", "ok"]
    assert found["broken"].error == "ZeroDivisionError: on purpose"
    assert found.complete and not found.ok
    assert all(len(e.timings) == 2 for e in found.finished)
    assert found.headline().endswith("broken FAILED")


def test_an_error_of_ours_is_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "error", PassError("bits is 9", expected="8"))
    assert run(BROKEN)["broken"].error == "bits is 9"


def test_an_interrupt_ends_one_entry_and_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "error", KeyboardInterrupt())
    found = run({**FINE, **BROKEN, "int4": "int4"}, peers=["ort"])
    assert [e.status for e in found.entries.values()][:3] == ["ok", "interrupted", "skipped"]
    assert found["int4"].error == "stopped before it began"
    assert len(found["int8-weight-only"].timings) == 2  # measured in spite of it
    assert found.interrupted and found.headline().endswith("broken INTERRUPTED, NOT COMPLETE")


def test_an_interrupted_timing_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.exporters.timing.time_files", stop)
    found = run(FINE)
    assert [(e.status, e.timings, e.sqnr_db > 10) for e in found.finished] == [("ok", [], True)]
    assert not found.complete and "the timing was interrupted" in found.warnings[-1]


def test_a_failed_timing_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise MemoryError("no room for batch 100000")

    monkeypatch.setattr("compress.exporters.timing.interleaved", fail)
    found = run(FINE)
    assert [(e.status, e.timings, e.sqnr_db > 10) for e in found.finished] == [("ok", [], True)]
    assert not found.complete and not found.interrupted
    assert found.warnings[-1].endswith("MemoryError: no room for batch 100000")


def test_each_report_tells_its_threads() -> None:
    found = run(FINE, threads=(2, 3))
    report = found["int8-weight-only"].report
    assert report is not None and report.verification is not None
    assert report.verification.environment["threads"] == 2
    assert [t.threads for t in report.verification.timings] == [2, 2, 3, 3]


def test_without_data_it_says_so() -> None:
    found = compress.benchmark(
        make("products"), ["int8-weight-only"], inputs=MODELS["products"].specs, batch_sizes=()
    )
    assert found.held_out == "random inputs" and "no calibration data" in found.warnings[0]
    assert found["int8-weight-only"].timings == [] and found.pareto


def test_a_fixed_batch_is_never_cut() -> None:
    x = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    found = compress.benchmark(
        make("products"), ["int8-weight-only"], inputs=["!2,24"], calibration=x, **FIGURES
    )
    assert found.held_out.startswith("2 of 10 samples")
    assert [t.sizes for t in found["int8-weight-only"].timings] == [{}]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"recipes": ["int8", "int8"]}, RecipeError, "two entries have the name int8"),
        ({"recipes": ["int9"]}, RecipeError, "int9"),
        ({"recipes": {"a/b": "int8", "a-b": "int4"}}, RecipeError, "two entries have the name a-b"),
        ({"recipes": "int8"}, RecipeError, "a list of recipes"),
        ({"recipes": []}, RecipeError, "no recipe"),
        ({"recipes": {"ort-int4-rtn": "int8"}, "peers": ["ort"]}, RecipeError, "name of a peer"),
        ({"peers": ["inc"]}, InputSpecError, "no peer 'inc'"),
        ({"threads": ()}, InputSpecError, "positive number"),
        ({"recipes": [{"passes": [{"pass": "quantize_weights", "bits": 9}]}]}, RecipeError, "bits"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    wrong: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> Any:
        raise AssertionError

    monkeypatch.setattr(api, "run", never)
    with pytest.raises(error, match=words):
        compress.benchmark(make("convnet"), **{"inputs": MODELS["convnet"].specs, **wrong})
