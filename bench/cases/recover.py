"""Training with zeros: gradual pruning of a ResNet-20 to 90 %, and fixed random masks from scratch.

The ResNet-20 is pruned by magnitude while it learns from its own dense outputs, on the training images at
hand (4,000 lossless ones, and 6,000 JPEGs, whose damage costs accuracy, but which show the network more); its
batch normalisation is not folded before. Beside it stand magnitudes at once, and CHITA at once, without and
with a few minutes of recovery. The learning rate was chosen by the agreement with the dense network on
held-out training images and on JPEGs of other test images; images are cut together because they are few.

From scratch: a ResNet-8 on images of half the size, masks by Erdos-Renyi-kernel densities beside equal ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import compress
from bench import cifar, models
from bench.measure import Measurement, Setup, measured, true
from bench.train_small import accuracy
from compress.data import load_calibration
from compress.passes.prune_chita import PruneChita
from compress.passes.prune_gradual import PruneGradual
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.recover import Recover
from compress.pipeline import Context

_SPARSITY = 0.9
_IGNORE = ("*downsample*",)
_TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,
    "augment": ("crop", "flip", "color", "cutmix"),
    "hidden": 3.0,
    "precision": "bfloat16",
    "ignore": _IGNORE,
}
_PRUNING = 0.4
"""Of the steps those in which it prunes; the others train what is left."""
_EPOCHS, _EPOCHS_AFTER = 34, 4
"""Of gradual pruning, and of recovery after pruning at once."""


def run(setup: Setup) -> list[Measurement]:
    """When quick: a small part of the steps, images and seeds, and no targets."""
    graph, images = cifar.resnet20(setup), cifar.lossless(setup)
    if setup.quick:
        images = cifar.Images(*(x[:1000] for x in images[:2]), *(x[:400] for x in images[2:]))
    return [*_speed(graph, images, setup), *_gradual(graph, images, setup), *_from_scratch(images, setup)]


def _speed(graph: compress.Graph, images: cifar.Images, setup: Setup) -> Iterator[Measurement]:
    """Milliseconds of a step by what is asked for: the time of more steps less that of fewer, medians."""
    size, fewer = (4, 8) if setup.quick else (64, 20)
    data = load_calibration(images.train[: 5 * size], inputs=graph.inputs, samples=5 * size)
    forms = [(precision, hidden) for precision in ("float32", "bfloat16") for hidden in (0.0, 0.5)]
    found: dict[tuple[str, float], list[float]] = {form: [] for form in forms}
    for _ in range(1 if setup.quick else 3):
        for precision, hidden in forms:
            seconds = []
            for steps in (fewer, 2 * fewer):
                # a fifth is held out, and looked at as often in both
                recover = Recover(epochs=steps / 4, batch_size=size, precision=precision, hidden=hidden)
                began = time.process_time()
                recover.apply(graph, Context(graph, data))
                seconds.append(time.process_time() - began)
            found[precision, hidden].append(1000 * (seconds[1] - seconds[0]) / (fewer * size))
    for (precision, hidden), each in found.items():
        what = f"ResNet-20: training with {precision}{', hidden values learned too' if hidden else ''}"
        yield measured(what, statistics.median(each), "ms/image")


def _gradual(graph: compress.Graph, lossless: cifar.Images, setup: Setup) -> Iterator[Measurement]:
    images, _, test, test_labels = lossless
    if setup.quick:
        images = images[:400]
    else:
        with np.load(setup.file("data/cifar10_jpeg.npz")) as file:
            more = cifar.normalised(file["train_images"][:6000], cifar.CHECKPOINTS["chita"])
        images = torch.cat((images, more))
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    data = load_calibration(images, inputs=graph.inputs, samples=len(images))
    context = Context(graph, data)
    epochs, after = (2, 1) if setup.quick else (_EPOCHS, _EPOCHS_AFTER)

    def percent(graph: compress.Graph) -> float:
        guesses = torch.cat([graph.run([part])[0].argmax(1) for part in test.split(500)])
        return 100 * float((guesses == test_labels).double().mean())

    dense = percent(graph)
    yield measured("ResNet-20: accuracy, dense", dense, "%")
    yield measured("ResNet-20: images, without their labels", len(images))
    once = PruneMagnitude(sparsity=_SPARSITY, refit=False, ignore=_IGNORE).apply(graph, context).graph
    yield measured("ResNet-20 90 %: accuracy, magnitudes at once", percent(once), "%")
    began = time.process_time()
    first = images[:1000]
    some = load_calibration(first, inputs=graph.inputs, samples=len(first))
    chita = PruneChita(sparsity=_SPARSITY, method="obs", mini_batch=5, ignore=_IGNORE)
    once = chita.apply(graph, Context(graph, some)).graph
    yield measured("ResNet-20 90 %: accuracy, CHITA at once", percent(once), "%")
    # least squares made weights that fit the running statistics; those of batches are far from them
    recovered = Recover(epochs=after, **_TRAINING).apply(once, context).graph
    minutes = (time.process_time() - began) / 60
    yield measured("ResNet-20 90 %: accuracy, CHITA at once and recovered", percent(recovered), "%")
    yield measured("ResNet-20 90 %: processor time, CHITA at once and recovered", minutes, "min")
    began = time.process_time()
    gradual = PruneGradual(sparsity=_SPARSITY, epochs=epochs, pruning=_PRUNING, **_TRAINING)
    pruned = gradual.apply(graph, context).graph
    seconds = time.process_time() - began
    sites = {s.weight for s in graph.sites() if "downsample" not in s.name}
    zeros = sum(int((pruned.weight(w) == 0).sum()) for w in sites)
    size = sum(pruned.weight(w).numel() for w in sites)
    yield true("ResNet-20 90 %: exactly as many zeros", zeros == round(_SPARSITY * size))
    lost = round(dense - percent(pruned), 6)
    yield measured("ResNet-20 90 %: accuracy lost, gradual", lost, "points", "" if setup.quick else "<= 2.0")
    minutes = seconds / 60
    yield measured("ResNet-20 90 %: processor time", minutes, "min", "" if setup.quick else "<= 30")


def _from_scratch(lossless: cifar.Images, setup: Setup) -> Iterator[Measurement]:
    images, labels, test, test_labels = lossless
    images, test = (nn.functional.avg_pool2d(x, 2) for x in (images, test))
    seeds, epochs = (1, 1) if setup.quick else (3, 15)
    found: dict[str, list[float]] = {}
    for ratios in ("erk", "uniform"):
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = models.CifarResNet(1, "fc", padded=True)
            compress.sparse_train(
                model, (images, labels), sparsity=_SPARSITY, ratios=ratios, epochs=epochs,
                batch_size=64, augment=("crop", "flip"), seed=seed,
            )  # fmt: skip
            found.setdefault(ratios, []).append(accuracy(model, test, test_labels))
        what = f"ResNet-8 from scratch, 90 % random, {ratios}"
        yield measured(f"{what}: accuracy", statistics.mean(found[ratios]), "%")
        yield measured(f"{what}: accuracy, worst of {seeds}", min(found[ratios]), "%")
    gain = statistics.mean(found["erk"]) - statistics.mean(found["uniform"])
    yield measured("ResNet-8: gain of erk over uniform", gain, "points", "" if setup.quick else "> 0")
