"""Weights stored as cores in ONNX, contracted by standard operators.

Every reader gets products of the cores, all of constants: ONNX Runtime folds them when it loads the file. So
the file is as small as the encoding says, and speed and memory are those of a dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from compress.artifact import Lowered
from compress.cores import CoreWeight
from compress.exporters.onnx_weights import Builder, lower_at_load


def lower_cores(model: ir.Model, weights: Mapping[str, CoreWeight]) -> list[Lowered]:
    """Replace the placeholders of weights stored as cores, graph inputs by name, by the form above.

    Args:
        model: rewritten in place.
        weights: by the name of the placeholder.
    """
    return lower_at_load(model, weights, "MatMul of cores", _contracted)


def _contracted(builder: Builder, before: ir.Node, name: str, weight: CoreWeight) -> ir.Value:
    def constant(part: str, array: np.ndarray) -> ir.Value:
        return builder.initializer(f"{name}.{part}", np.ascontiguousarray(array))

    def reshaped(value: ir.Value, part: str, shape: list[int]) -> ir.Value:
        sizes = constant(f"{part}.shape", np.array(shape, dtype=np.int64))
        return builder.node(before, "Reshape", [value, sizes], f"{name}/{part}")

    cores = [core.detach().numpy() for core in weight.cores()]
    _, outputs, inputs, bond = cores[0].shape
    found = constant("core0", cores[0].reshape(-1, bond))
    for k, core in enumerate(cores[1:], 1):
        left, o, i, bond = core.shape
        found = builder.node(
            before, "MatMul", [found, constant(f"core{k}", core.reshape(left, -1))], f"{name}/product{k}"
        )
        # [O, I, o, i, a] -> [O o, I i, a]
        apart = reshaped(found, f"apart{k}", [outputs, inputs, o, i, bond])
        turned = builder.node(before, "Transpose", [apart], f"{name}/turn{k}", perm=[0, 2, 1, 3, 4])
        outputs, inputs = outputs * o, inputs * i
        found = reshaped(turned, f"joined{k}", [outputs * inputs, bond])
    if weight.scales is None:
        return reshaped(found, "decode", [outputs, inputs])
    dense = reshaped(found, "dense", [outputs, inputs])
    scales = constant("scales", weight.scales.detach().numpy())
    return builder.node(before, "Mul", [dense, scales], f"{name}/decode")
