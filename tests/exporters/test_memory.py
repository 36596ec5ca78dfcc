"""Memory of a file: in a process of its own, so that only the file counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.exporters.memory import peak_memory

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")


def product(path: Path, size: int) -> Path:
    """``x @ W`` with W float32 ``[size, size]``."""
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    tensors = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "model",
        [tensors("x", onnx.TensorProto.FLOAT, [None, size])],
        [tensors("y", onnx.TensorProto.FLOAT, [None, size])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


def test_weights_and_activations_count(tmp_path: Path) -> None:
    held = bytearray(200 << 20)  # what this process holds must not count
    held[::4096] = b"x" * len(held[::4096])
    path = product(tmp_path / "m.onnx", 2048)  # 16 MiB
    found = peak_memory(path, {"x": np.zeros((1, 2048), np.float32)})
    assert found is not None and 16 << 20 <= found < 100 << 20
    # an output of 32 MiB; what loading needed for a moment is free again
    larger = peak_memory(path, {"x": np.zeros((4096, 2048), np.float32)})
    assert larger is not None and larger > max(found, 48 << 20)


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    path = product(tmp_path / "m.onnx", 8)
    assert peak_memory(path, {"x": np.zeros((1, 9), np.float32)}) is None
    assert peak_memory(tmp_path / "missing.onnx", {}) is None
