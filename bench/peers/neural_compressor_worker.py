"""Intel Neural Compressor: RTN, GPTQ (act-order and its scale search on) or HQQ on group-wise integers."""

from __future__ import annotations

from neural_compressor.torch.quantization import (
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    convert,
    prepare,
)
from worker import linears, main

_CONFIGS = {"rtn": RTNConfig, "hqq": HQQConfig}


def quantize(model, batches, job):
    """Weights as Neural Compressor would use them, by name."""
    names = list(linears(model))
    options = {"bits": job["bits"], "group_size": job["group_size"]}
    if job["method"] != "hqq":
        options["use_sym"] = job["symmetric"]
    if job["method"] == "gptq":
        # its static_groups fails with an IndexError; the folder is only looked at
        config = GPTQConfig(act_order=True, use_mse_search=True, model_path=".", **options)
    else:
        config = _CONFIGS[job["method"]](quant_lm_head=True, **options)
    prepared = prepare(model, config, example_inputs=batches[0])
    for batch in batches:
        prepared(**batch)
    done = convert(prepared)
    if job["method"] == "gptq":
        # its GPTQ leaves the output head and lone layers alone: they get its round-to-nearest
        rest = RTNConfig(quant_lm_head=True, **options)
        done = convert(prepare(done, rest, example_inputs=batches[0]))
    return {f"{name}.weight": _dequantized(done.get_submodule(name)) for name in names}


def _dequantized(layer):
    for way in ("recover", "dequantize_weight"):
        if hasattr(layer, way):
            return getattr(layer, way)()
    return layer.weight.detach()


main(quantize)
