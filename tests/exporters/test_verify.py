"""Verification: figures that are what they say, and words that do not flatter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.artifact import Timing
from compress.errors import InputSpecError, VerificationError
from compress.report import speed_words
from compress.testing import MODELS, make

pytest.importorskip("onnxruntime", reason="needs the onnx extra")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[compress.Artifact, compress.Result]:
    example = MODELS["encoder"]
    result = compress.run(make("encoder"), "int4", inputs=example.specs, calibration=[example.inputs(6)])
    path = tmp_path_factory.mktemp("verify") / "encoder.onnx"
    return compress.export(result.graph, path, samples=result.samples), result


def test_comparisons_and_timings(written: Any) -> None:
    artifact, result = written
    found = compress.verify(
        artifact, result.reference, samples=result.samples, batch_sizes=(1, 4), seconds=0.05
    )
    by = {(c.what, c.output): c for c in found.comparisons}
    assert {o for _, o in by} == {"hidden", "pooled"}
    assert by["file vs original", "hidden"].cosine > 0.95
    # what quantization costs shows between graph and original; the file adds little to it
    assert (
        by["file vs compressed graph", "hidden"].sqnr_db
        > by["compressed graph vs original", "hidden"].sqnr_db
    )
    assert [t.sizes["batch"] for t in found.timings] == [1, 4]
    assert all(t.samples >= 5 and t.float_ms > 0 and t.compressed_ms > 0 for t in found.timings)
    assert found.float_bytes > artifact.nbytes
    assert found.unfused == ()


def test_metric_is_measured_on_all_three(written: Any) -> None:
    artifact, _ = written
    ids, mask = MODELS["encoder"].inputs(3)
    seen: list[str] = []

    def metric(module: torch.nn.Module) -> float:
        seen.append(type(module).__name__)
        outputs = module(mask=mask, ids=ids)  # keywords, in another order
        assert set(outputs) == {"hidden", "pooled"}
        return float(outputs["hidden"].mean())

    reference = compress.capture(make("encoder"), {"ids": ids, "mask": mask}, inputs=MODELS["encoder"].specs)
    found = compress.verify(artifact, reference, eval_fn=metric, batch_sizes=())
    assert list(found.metric) == ["original", "compressed", "file"]
    assert seen[-1] == "FileModule"
    assert found.metric["file"] == pytest.approx(found.metric["compressed"], abs=0.01)
    assert found.timings == ()


def test_a_module_may_be_the_reference(written: Any) -> None:
    artifact, _ = written
    found = compress.verify(artifact, make("encoder"), batch_sizes=())
    assert min(c.cosine for c in found.comparisons) > 0.9


def test_a_failing_metric_is_named(written: Any) -> None:
    artifact, result = written
    with pytest.raises(InputSpecError, match="ZeroDivisionError"):
        compress.verify(artifact, result.reference, eval_fn=lambda m: 1 / 0, batch_sizes=())


def test_another_model_is_noticed(written: Any) -> None:
    """Fidelity must be bad when the original is another model: the check can fail."""
    artifact, _ = written
    found = compress.verify(artifact, make("encoder", seed=9), batch_sizes=())
    assert min(c.sqnr_db for c in found.comparisons if c.what == "file vs original") < 6


def test_a_truncated_file(written: Any, tmp_path: Path) -> None:
    import dataclasses

    artifact, result = written
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(artifact.path.read_bytes()[:-2000])
    with pytest.raises(VerificationError, match="cannot load"):
        compress.verify(dataclasses.replace(artifact, path=broken), result.reference)


@pytest.mark.parametrize(
    ("speedup", "spread", "words"),
    [
        (2.0, 0.1, "2.00x faster at batch 1"),
        (0.5, 0.1, "2.00x SLOWER at batch 1"),
        (1.04, 0.01, "same speed at batch 1"),
        (1.3, 0.4, "same speed at batch 1"),
        (0.9, 0.02, "1.11x SLOWER at batch 1"),
    ],
)
def test_words(speedup: float, spread: float, words: str) -> None:
    assert speed_words(Timing({"batch": 1}, 1.0, 1.0 / speedup, speedup, spread, 9)) == words


def test_report_as_json_and_markdown(written: Any, tmp_path: Path) -> None:
    artifact, result = written
    report = result.report
    report.artifact = artifact
    report.verification = compress.verify(artifact, result.reference, batch_sizes=(1,), seconds=0.05)
    paths = report.write(tmp_path / "encoder.onnx")
    assert [p.name for p in paths] == ["encoder.onnx.report.json", "encoder.onnx.report.md"]
    data = json.loads(paths[0].read_text())
    assert data["headline"] == report.headline()
    assert data["artifact"]["bytes"] == artifact.path.stat().st_size
    assert {row["layer"] for row in data["layers"]} == {c.site for p in report.passes for c in p.changes}
    text = paths[1].read_text()
    for row in data["layers"]:
        assert f"| `{row['layer']}` |" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
