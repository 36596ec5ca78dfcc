"""Static int8 convolutions: a depthwise network trained here, and the speed of a ResNet-18.

The depthwise network is judged by its accuracy, the ResNet-18 (random weights) by its time only. ONNX
Runtime's own static quantizer gets the same calibration images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from bench import models, peers, train_small
from bench.measure import Measurement, Setup, caller, measured
from compress.exporters import ort_peers
from compress.exporters.ort import Session
from compress.exporters.timing import interleaved

_CALIBRATION = 512
_STATIC: dict[str, Any] = {"pass": "quantize_activations"}
_RECIPES: dict[str, str | dict[str, Any]] = {
    "int8": "int8",
    "int4 weights, int8 activations": {"passes": [{"pass": "cleanup"}, {**_STATIC, "weight_bits": 4}]},
}
_MUSTS = {"int8": "<= 0.3", "int4 weights, int8 activations": "<= 2"}


def run(setup: Setup) -> list[Measurement]:
    """When quick: a network trained on 2,000 images, few to calibrate with; a narrow ResNet-18 on images of
    64 pixels."""
    return _depthwise(setup) + _resnet18(setup)


def _depthwise(setup: Setup) -> list[Measurement]:
    files = setup.file("data/cifar10.npz"), setup.file("data/cifar10_jpeg.npz")
    images, labels, test, test_labels = train_small.cifar(*files)
    epochs, seen, few = (1, 2000, 128) if setup.quick else (20, len(images), _CALIBRATION)
    model = train_small.trained(train_small.depthwise, images[:seen], labels[:seen], epochs=epochs)
    train = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:few]]
    graph = compress.capture(model, (test[:2],))
    plain = peers.float_export(graph, setup.work / "depthwise-float.onnx")
    dense = _accuracy(plain, test, test_labels)
    found = [
        measured("depthwise: test images", len(test)),
        measured("depthwise: accuracy, float", dense, "%"),
        measured("depthwise: file, float", plain.stat().st_size / 1e3, "kB"),
    ]
    paths: dict[str, Path] = {}
    for name, recipe in _RECIPES.items():
        result = compress.run(graph, recipe, calibration=[(part,) for part in train.split(64)])
        out = setup.work / f"depthwise-{len(paths)}.onnx"
        paths[name] = compress.export(result.graph, out, samples=result.samples).path
    other = "int8 ONNX Runtime static"
    paths[other] = _ort_static(graph, plain, setup.work / "depthwise-ort.onnx", train)
    for name, path in paths.items():
        lost = round(dense - _accuracy(path, test, test_labels), 6)
        target = "" if setup.quick else _MUSTS.get(name, "")
        found.append(measured(f"depthwise {name}: accuracy lost, file", lost, "points", target))
        found.append(measured(f"depthwise {name}: file", path.stat().st_size / 1e3, "kB"))
    return found + _speeds("depthwise", {"float": plain, **paths}, test[:1], {}, 2 if setup.quick else 6)


def _resnet18(setup: Setup) -> list[Measurement]:
    size = 64 if setup.quick else 224
    torch.manual_seed(0)
    model = models.resnet18(16 if setup.quick else 64).eval()
    train = torch.randn(16, 3, size, size)
    graph = compress.capture(model, (train[:2],))
    plain = peers.float_export(graph, setup.work / "resnet18-float.onnx")
    result = compress.run(graph, "int8", calibration=[(part,) for part in train.split(4)])
    paths = {
        "float": plain,
        "int8": compress.export(result.graph, setup.work / "resnet18-int8.onnx").path,
        "int8 ONNX Runtime static": _ort_static(graph, plain, setup.work / "resnet18-ort.onnx", train),
    }
    musts = {} if setup.quick else {"int8": ">= 2"}
    found = []
    for batch in (1,) if setup.quick else (1, 4):
        what = f"resnet18 {batch}x3x{size}x{size}"
        found += _speeds(what, paths, train[:batch], musts, 2 if setup.quick else 20)
    return found


def _speeds(
    what: str, paths: dict[str, Path], image: Tensor, musts: dict[str, str], seconds: float
) -> list[Measurement]:
    calls = {name: caller(Session(path), image) for name, path in paths.items()}
    speeds = interleaved(calls, seconds)
    found = [measured(f"{what}: time of the float file", speeds.pop("float").ms, "ms")]
    return found + [
        measured(f"{what} {name}: speed-up", speed.speedup, "x", musts.get(name, ""))
        for name, speed in speeds.items()
    ]


def _ort_static(graph: compress.Graph, plain: Path, out: Path, images: Tensor) -> Path:
    name = graph.inputs[0].name
    return ort_peers.static(plain, out, ({name: part.numpy()} for part in images.split(16)))


def _accuracy(path: Path, images: Tensor, labels: Tensor) -> float:
    session = Session(path)
    guesses = torch.cat([session(part)[0].argmax(1) for part in images.split(100)])
    return 100 * float((guesses == labels).double().mean())
