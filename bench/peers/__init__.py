"""Baselines: the float export, and other programs, each run in an environment of its own (`environments`)."""

from __future__ import annotations

from pathlib import Path

from compress.exporters.to_onnx import OnnxExporter
from compress.graph import Graph


def float_export(graph: Graph, path: Path) -> Path:
    """The uncompressed model as `torch.onnx` writes it, the baseline of every comparison."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OnnxExporter().write_float(graph, path)
    return path
