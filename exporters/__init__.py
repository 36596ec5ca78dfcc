"""The table of exporters: target -> module and class, imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from compress.errors import ExportError

EXPORTERS: dict[str, str] = {
    "onnx": "compress.exporters.to_onnx:OnnxExporter",
    "torch": "compress.exporters.to_torch:TorchExporter",
}


def find(target: str) -> Any:
    """The exporter of a target.

    Raises:
        ExportError: there is none.
    """
    if target not in EXPORTERS:
        raise ExportError(f"there is no target {target!r}", expected=f"one of {', '.join(EXPORTERS)}")
    module, name = EXPORTERS[target].split(":")
    return getattr(importlib.import_module(module), name)()
