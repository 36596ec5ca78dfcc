"""CIFAR-10 ResNet-20s from plain weights through the command line: does the file classify like the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import compress
from bench import peers
from bench.cifar import CHECKPOINTS, normalised
from bench.measure import Measurement, Setup, caller, compress_cli, costs, measured, true
from compress.exporters import ort_peers
from compress.exporters.ort import Session
from compress.exporters.timing import interleaved

Logits = Callable[[Tensor], Tensor]


# rounded activations tie: an image in a thousand is classified otherwise by another order of summation
_MUSTS = {
    "int8-weight-only": ("<= 0.3", ">= 99.9"),
    "int8": ("<= 0.3", ">= 99.5"),
    "int4": ("", ">= 99.9"),
    "int4-sparse": ("", ">= 99.9"),
}


def run(setup: Setup) -> list[Measurement]:
    """Accuracy on 1,000 lossless test images; file against graph on 10,000 others.

    When quick: one checkpoint, one recipe, one batch size, and 500 others.
    """
    with np.load(setup.file("data/cifar10.npz")) as file:
        lossless, labels = file["test_images"], torch.from_numpy(file["test_labels"].astype(np.int64))
    with np.load(setup.file("data/cifar10_jpeg.npz")) as file:
        train = file["train_images"][: 256 if setup.quick else 512]
        many = file["test_images"][: 500 if setup.quick else 10000]
    found = [
        measured("test images, lossless", len(lossless), "", ">= 1000"),
        measured("test images, file against graph", len(many)),
        measured("calibration images", len(train)),
    ]
    for name, checkpoint in list(CHECKPOINTS.items())[: 1 if setup.quick else None]:
        images = {
            k: normalised(v, checkpoint) for k, v in (("test", lossless), ("many", many), ("train", train))
        }
        found += _one(name, setup, images, labels)
    return found


def _one(name: str, setup: Setup, images: dict[str, Tensor], labels: Tensor) -> list[Measurement]:
    source = setup.file(f"models/resnet20_cifar10_{name}.safetensors")
    model = f"bench/models.py:resnet20_{name}"
    samples = setup.work / f"{name}-calibration.npz"
    np.savez(samples, image=images["train"].numpy())
    graph = compress.capture(source, [images["train"][:2]], model=model)
    plain = peers.float_export(graph, setup.work / f"{name}-float.onnx")
    dense = _accuracy(_through(Session(plain)), images["test"], labels)
    found = [
        measured(f"{name}: accuracy, float", dense, "%"),
        measured(f"{name}: file, float", plain.stat().st_size / 1e3, "kB"),
    ]
    files = {}
    for recipe in list(_MUSTS)[: 1 if setup.quick else None]:
        out = setup.work / f"{name}-{recipe}.onnx"
        sizes = "1" if setup.quick else "1,32"
        options = ("--model", model, "--calibration", samples, "--samples", len(images["train"]))
        done = compress_cli(source, out, *options, "--recipe", recipe, "--batch-sizes", sizes)
        files[recipe] = out
        again = compress.run(source, recipe, model=model, calibration=samples, samples=len(images["train"]))
        session, module = Session(out), again.module()
        drop = dense - _accuracy(_through(session), images["test"], labels)
        wanted = _predictions(module, images["many"])
        same = _agreement(_through(session), images["many"], wanted)
        exactly = _agreement(_through(Session(out, exact=True)), images["many"], wanted)
        target = _MUSTS[recipe]
        found += [
            # 0.3 and a bit: accuracies are multiples of 0.1, and floats are not
            measured(f"{name} {recipe}: accuracy lost, file", round(drop, 6), "points", target[0]),
            measured(f"{name} {recipe}: file and graph agree", same, "%", target[1]),
            measured(f"{name} {recipe}: file run exactly and graph agree", exactly, "%", target[1]),
            measured(f"{name} {recipe}: file", done.nbytes / 1e3, "kB"),
            *costs(f"{name} {recipe}", done),
        ]
        if recipe == next(iter(_MUSTS)):
            written = compress.export(again.graph, setup.work / f"{name}-again.onnx")
            found.append(
                true(f"{name}: a second run writes the same weights", _same_weights(out, written.path))
            )
    found += _peers(name, setup, graph, plain, files, images["test"], labels, dense, images["train"])
    return found


def _peers(
    name: str, setup: Setup, graph: compress.Graph, plain: Path, files: dict[str, Path],
    test: Tensor, labels: Tensor, dense: float, train: Tensor,
) -> list[Measurement]:  # fmt: skip
    rounding = {"scales": "absmax", "method": "rtn"}
    step = {"pass": "quantize_weights", "bits": 4, "group_size": 32, "symmetric": False, **rounding}
    rtn = compress.run(graph, {"passes": [{"pass": "cleanup"}, step]})
    others = {
        "int4 round-to-nearest (ours)": compress.export(rtn.graph, setup.work / f"{name}-rtn.onnx").path,
        "int8 ONNX Runtime dynamic": ort_peers.dynamic(plain, setup.work / f"{name}-ort-dynamic.onnx"),
        "int8 ONNX Runtime static": ort_peers.static(
            plain, setup.work / f"{name}-ort-static.onnx", ({"image": b.numpy()} for b in train.split(64))
        ),
    }
    found = []
    for other, path in others.items():
        drop = dense - _accuracy(_through(Session(path)), test, labels)
        found += [
            measured(f"{name} {other}: accuracy lost, file", round(drop, 6), "points"),
            measured(f"{name} {other}: file", path.stat().st_size / 1e3, "kB"),
        ]
    image = test[:1]
    calls = {n: caller(Session(p), image) for n, p in {"float": plain, **files, **others}.items()}
    speeds = interleaved(calls, 2 if setup.quick else 6)
    found.append(measured(f"{name}: time of the float file at batch 1", speeds.pop("float").ms, "ms"))
    found += [measured(f"{name} {what}: speed-up at batch 1", s.speedup, "x") for what, s in speeds.items()]
    return found


def _through(session: Session) -> Logits:
    return lambda x: session(x)[0]


def _predictions(logits: Logits, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits(part).argmax(1) for part in images.split(100)])


def _accuracy(logits: Logits, images: Tensor, labels: Tensor) -> float:
    return 100 * float((_predictions(logits, images) == labels).double().mean())


def _agreement(logits: Logits, images: Tensor, wanted: Tensor) -> float:
    same = _predictions(logits, images) == wanted
    return 100 * float(same.double().mean())


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, byte for byte; their metadata may differ."""
    return _fingerprint(one) == _fingerprint(other)


def _fingerprint(path: Path) -> str:
    import onnx

    print_of = hashlib.sha256()
    for tensor in onnx.load(path).graph.initializer:
        print_of.update(tensor.name.encode() + onnx.numpy_helper.to_array(tensor).tobytes())
    return print_of.hexdigest()
