"""The table of exporters: target -> module and class, imported when asked for."""

from __future__ import annotations

EXPORTERS: dict[str, str] = {
    "onnx": "compress.exporters.to_onnx:OnnxExporter",
}
