"""Equal forms of float operators that ONNX Runtime runs faster. Values stay what they are, bit for bit.

============================ ============================== ==================================================
in the graph                 in the file                    why
============================ ============================== ==================================================
Add -> LayerNormalization    Sum -> LayerNormalization      Add and LayerNormalization are fused into
(a residual or an embedding)                                SkipLayerNormalization, which on processors takes
                                                            several times as long as the two (1.31). See
                                                            "float, our forms" of `bench/run.py minilm`
============================ ============================== ==================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def faster_forms(model: ir.Model) -> None:
    """Apply the table above, in place."""
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.inputs[0] is None:
            continue
        added = node.inputs[0].producer()
        if (
            added is not None
            and added.op_type == "Add"
            and added.outputs[0].dtype == ir.DataType.FLOAT
            and not any(value is None or value.const_value is not None for value in added.inputs)
        ):
            added.op_type = "Sum"
