"""Sparse weights in ONNX: a bitmap and the entries that are not zero, expanded by standard operators.

Every reader gets ``Gather([0, values], CumSum(bits) * bits)``, all of constants: ONNX Runtime folds it when
it loads the file. So the file is as small as the encoding says, and speed and memory are those of a dense
weight: zeros save no time on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from compress.artifact import Lowered
from compress.bitmap import BitmapWeight
from compress.exporters.onnx_weights import Builder, lower_at_load


def lower_bitmaps(model: ir.Model, weights: Mapping[str, BitmapWeight]) -> list[Lowered]:
    """Replace the placeholders of sparse weights, graph inputs by name, by the form above.

    Args:
        model: rewritten in place.
        weights: by the name of the placeholder.
    """
    return lower_at_load(model, weights, "bits -> CumSum -> Gather(values)", _expanded)


def _expanded(builder: Builder, before: ir.Node, name: str, weight: BitmapWeight) -> ir.Value:
    def constant(part: str, array: np.ndarray) -> ir.Value:
        return builder.initializer(f"{name}.{part}", np.ascontiguousarray(array))

    def node(op: str, inputs: list[ir.Value], part: str, **attributes: int | str) -> ir.Value:
        return builder.node(before, op, inputs, f"{name}/{part}", "", **attributes)

    shifts = constant("shifts", np.arange(8, dtype=np.uint8))
    bits = node(
        "BitShift", [constant("codes", weight.codes.unsqueeze(-1).numpy()), shifts], "bit", direction="RIGHT"
    )
    bits = node("BitwiseAnd", [bits, constant("one", np.array([1], dtype=np.uint8))], "mask")
    if weight.columns % 8:
        row = constant("row", np.array([0, -1], dtype=np.int64))
        bounds = (("begin", 0), ("columns", weight.columns), ("axis", 1))
        cuts = [constant(part, np.array([at], dtype=np.int64)) for part, at in bounds]
        bits = node("Slice", [node("Reshape", [bits, row], "rows"), *cuts], "cut")
    flat = node("Reshape", [bits, constant("flat", np.array([-1], dtype=np.int64))], "flatten")
    wide = node("Cast", [flat], "wide", to=ir.DataType.INT32.value)
    count = node("CumSum", [wide, constant("zero", np.array(0, dtype=np.int64))], "count")
    # entry 0 of the values is the zero of those that are left out
    index = node("Mul", [count, wide], "index")
    values = constant("values", torch.nn.functional.pad(weight.values, (1, 0)).numpy())
    dense = node("Gather", [values, index], "expand")
    return node("Reshape", [dense, constant("shape", np.array(weight.shape, dtype=np.int64))], "decode")
