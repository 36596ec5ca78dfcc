"""The table of exporters: target -> module and class, imported when asked for."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from compress.errors import ExportError

EXPORTERS: dict[str, str] = {
    "onnx": "compress.exporters.to_onnx:OnnxExporter",
    "torch": "compress.exporters.to_torch:TorchExporter",
    "tensorrt": "compress.exporters.to_tensorrt:TensorRTExporter",
}


def target_of(path: str | Path) -> str:
    """The target that the name of a file stands for; "onnx" where it stands for no other."""
    suffix = Path(path).suffix
    if suffix in (".engine", ".plan"):
        return "tensorrt"
    return "torch" if suffix in (".safetensors", ".pt", ".pth", ".pt2") else "onnx"


def find(target: str, **options: Any) -> Any:
    """The exporter of a target.

    Args:
        target: one of `EXPORTERS`.
        options: of that target, such as ``gpu`` of "tensorrt": fields of its exporter.

    Raises:
        ExportError: there is no such target, or it has no such option.
    """
    if target not in EXPORTERS:
        raise ExportError(f"there is no target {target!r}", expected=f"one of {', '.join(EXPORTERS)}")
    module, name = EXPORTERS[target].split(":")
    exporter = getattr(importlib.import_module(module), name)
    known = [f.name for f in dataclasses.fields(exporter)] if dataclasses.is_dataclass(exporter) else []
    for option in options:
        if option not in known:
            raise ExportError(
                f"target {target} has no option {option!r}", expected=f"one of {', '.join(known) or 'none'}"
            )
    return exporter(**options)
