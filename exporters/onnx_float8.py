"""Float8 weights in ONNX: FLOAT8E4M3FN codes -> Cast -> Mul, which ONNX Runtime folds when it loads the file.

The file is as small as the encoding says; speed and memory are those of a float weight: ONNX Runtime's CPU
kernels do not multiply 8-bit floats. What TensorRT reads is in `compress.exporters.tensorrt_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from compress.artifact import Lowered
from compress.exporters.onnx_weights import Builder, lower_at_load
from compress.float8 import Float8Weight


def lower_float8(model: ir.Model, weights: Mapping[str, Float8Weight]) -> list[Lowered]:
    """Replace the placeholders of float8 weights, graph inputs by name, by the form above.

    Args:
        model: rewritten in place.
        weights: by the name of the placeholder.
    """
    return lower_at_load(model, weights, "FLOAT8E4M3FN -> Cast -> Mul", _decoded)


def numbers(weight: Float8Weight) -> np.ndarray:
    """The codes as E4M3 numbers of the weight's shape."""
    found: np.ndarray = weight.codes.numpy().view(ml_dtypes.float8_e4m3fn).reshape(weight.shape)
    return found


def _decoded(builder: Builder, before: ir.Node, name: str, weight: Float8Weight) -> ir.Value:
    codes = builder.initializer(f"{name}.codes", numbers(weight))
    wide = builder.node(before, "Cast", [codes], f"{name}/cast", to=ir.DataType.FLOAT.value)
    rows = weight.scales.reshape(-1, *(1 for _ in weight.shape[1:]))
    scales = builder.initializer(f"{name}.scales", rows.contiguous().numpy())
    decoded = builder.node(before, "Mul", [wide, scales], f"{name}/decode")
    return builder.cast(before, decoded, torch.float32, weight.dtype, f"{name}/from_float")
