"""Files beside the uncompressed one: those that run are timed, those that do not say why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.exporters.side_by_side import SideBySide
from compress.testing import MODELS, make

pytest.importorskip("onnxruntime", reason="needs the onnx extra")


@pytest.fixture
def files(tmp_path: Path) -> tuple[SideBySide, Path]:
    reference = compress.capture(make("products"), inputs=MODELS["products"].specs)
    side = SideBySide(reference, [(torch.randn(4, 24),)], batch_sizes=(1, 4), threads=(1,))
    side.write_float(tmp_path / "float.onnx")
    return side, tmp_path / "float.onnx"


def test_peers_write_files_that_are_compared_and_timed(files: tuple[SideBySide, Path]) -> None:
    side, path = files
    peer = "ort-int8-dynamic"
    assert peer in side.peers() and side.unsuitable(peer, path, calibrated=False) == ""
    written = path.with_name("int8.onnx")
    assert side.quantize(peer, path, written, None) == written.stat().st_size
    assert sorted(p.name for p in path.parent.iterdir()) == ["float.onnx", "int8.onnx"]
    (found,) = side.verify(written, samples=[(torch.randn(4, 24),)]).comparisons
    assert found.what == "file vs original" and 0.99 < found.cosine < 1
    opened, failed = side.open({"float": path, "int8": written}, threads=1)
    assert failed == {} and list(opened) == ["float", "int8"]
    times = list(side.time(opened, 1, 0.0, lambda name: None))
    assert [t["int8"].sizes["batch"] for t in times] == [1, 4]
    assert all(t["float"].speedup == 1 and t["int8"].compressed_ms > 0 for t in times)


def test_a_file_that_does_not_run_is_told_of(files: tuple[SideBySide, Path]) -> None:
    side, path = files
    damaged = path.with_name("damaged.onnx")
    damaged.write_bytes(path.read_bytes()[:100])
    opened, failed = side.open({"float": path, "damaged": damaged, "again": path}, threads=1)
    assert list(opened) == ["float", "again"] and list(failed) == ["damaged"] and failed["damaged"]
    # without the uncompressed one there is nothing to stand beside
    with pytest.raises(CompressError):
        side.open({"float": damaged, "again": path}, threads=1)
