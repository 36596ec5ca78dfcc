"""Brevitas: GPTQ, GPFQ or Qronos on group-wise integer weights, with act-order as in its LLM example."""

from __future__ import annotations

from brevitas import nn as qnn
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
from brevitas.quant.shifted_scaled_int import ShiftedUint8WeightGroupQuantFloat
from brevitas_examples.llm.llm_quant.gpxq import apply_gpfq, apply_gptq, apply_qronos
from torch import nn
from worker import linears, main

_APPLY = {"gptq": apply_gptq, "gpfq": apply_gpfq, "qronos": apply_qronos}


def quantize(model, batches, job):
    """Weights as Brevitas would use them, by name."""
    options = {"bit_width": job["bits"], "group_size": job["group_size"]}
    base = ShiftedUint8WeightGroupQuantFloat
    if job["symmetric"]:
        base = Int8WeightPerChannelFloat
        options.update(scaling_per_output_type="group")
    layers = {nn.Linear: (qnn.QuantLinear, {"weight_quant": base.let(**options)})}
    model = layerwise_quantize(model=model, compute_layer_map=layers)
    model.eval()
    model(**batches[0])
    if job["method"] != "rtn":
        _APPLY[job["method"]](model, batches)
    return {f"{name}.weight": layer.quant_weight().value for name, layer in linears(model).items()}


main(quantize)
