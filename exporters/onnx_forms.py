"""Equal forms of float operators that ONNX Runtime runs faster. Values stay what they are, bit for bit.

============================ ============================== ==================================================
in the graph                 in the file                    why
============================ ============================== ==================================================
Add -> LayerNormalization    Sum -> LayerNormalization      Add and LayerNormalization are fused into
(a residual or an embedding)                                SkipLayerNormalization, which on processors takes
                                                            several times as long as the two (1.31). See
                                                            "float, our forms" of `bench/run.py minilm`
Gather(axis -1), one row of  Expand -> GatherElements       Gather calls a copy for each entry, which takes
constant indices (the map                                   several times as long (1.31)
of `vq_logits`)
============================ ============================== ==================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from compress.exporters.onnx_weights import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

_WORTH_IT = 256
"""Indices from which a lookup takes longer than the operators around it."""


def faster_forms(model: ir.Model) -> None:
    """Apply the table above, in place."""
    builder = Builder(model)
    for node in list(model.graph):
        if node.op_type == "LayerNormalization":
            _sum_before(node)
        elif node.op_type == "Gather":
            _elements_in_place_of(builder, node)


def _sum_before(norm: ir.Node) -> None:
    import onnx_ir as ir

    if norm.inputs[0] is None:
        return
    added = norm.inputs[0].producer()
    if (
        added is not None
        and added.op_type == "Add"
        and added.outputs[0].dtype == ir.DataType.FLOAT
        and not any(value is None or value.const_value is not None for value in added.inputs)
    ):
        added.op_type = "Sum"


def _elements_in_place_of(builder: Builder, gather: ir.Node) -> None:
    data, indices = gather.inputs
    assert data is not None and indices is not None
    count = _constant_length(indices)
    if data.producer() is None or data.shape is None or count is None or count < _WORTH_IT:
        return
    if gather.attributes.get_int("axis", 0) not in (-1, len(data.shape) - 1):
        return
    name = gather.name or f"{gather.outputs[0].name}"
    length = builder.initializer(f"compress.length{count}", np.array([count], dtype=np.int64))
    outer = builder.node(gather, "Shape", [data], f"{name}/outer", start=0, end=-1)
    shape = builder.node(gather, "Concat", [outer, length], f"{name}/shape", axis=0)
    everywhere = builder.node(gather, "Expand", [indices, shape], f"{name}/everywhere")
    builder.take_over(
        gather, builder.node(gather, "GatherElements", [data, everywhere], f"{name}/elements", axis=-1)
    )


def _constant_length(indices: ir.Value) -> int | None:
    """Entries of a vector that is stored, perhaps in fewer bits than it is used in; None of anything else."""
    if indices.shape is None or len(indices.shape) != 1:
        return None
    while (node := indices.producer()) is not None:
        if node.op_type not in ("Cast", "Reshape") or node.inputs[0] is None:
            return None
        indices = node.inputs[0]
    stored = indices.const_value
    return None if stored is None else stored.size
