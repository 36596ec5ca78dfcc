"""A language model at three effective bits: mixed precision beside uniform ones, ours and a peer's.

Linear layers, scales and zero points counted. The mixed form shares three bits for each weight out by damage
measured on the calibration text; uniform groups of 32 take 2.6 or 3.6 bits with their scales. `int4 g128` is
what `lm-int4` gives these layers. The peer gets the same samples and stores the same bits as our uniform
forms; the case `weights` has more of them.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import torch

import compress
from bench.cases.weights import Subject, language_model, ours
from bench.measure import Measurement, Setup, measured, true
from bench.peers.environments import Job, PeerMissing, ask, write_samples

_BITS = 3.0
_INT4 = {"pass": "quantize_weights", "bits": 4, "group_size": 128, "symmetric": False, "targets": ["linear"]}
_MIXED = {"pass": "mixed_precision", "effective_bits": _BITS, "sensitive": [], "targets": ["linear"]}


def run(setup: Setup) -> list[Measurement]:
    """When quick: the model cut to its first block, few samples, uniform forms of two bits, and no peer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_grad_enabled(False)
    return list(_compared(setup, language_model(setup)))


def _compared(setup: Setup, subject: Subject) -> Iterator[Measurement]:
    dense = subject.damage({})
    yield measured("float: perplexity", dense)
    four, _ = yield from _recipe(subject, "int4 g128", _INT4)
    yield measured("int4 g128: perplexity / float", four / dense, "", "<= 1.02")
    mixed, bits = yield from _recipe(subject, f"mixed at {_BITS:g} bits", _MIXED)
    yield true(f"mixed: at most {_BITS:g} bits for each weight", bits <= _BITS)
    reached: dict[str, float] = {}
    for width in (2,) if setup.quick else (3, 2):
        for method in ("rtn", "gptq", "best"):
            name = f"int{width} g32, ours {method}"
            reached[name] = ours(subject, width, method)[0]
            yield measured(f"{name}: perplexity", reached[name])
        if setup.quick:
            continue
        samples = write_samples(setup.work / "samples.safetensors", subject.calibration)
        job = Job(subject.model, subject.weights, str(samples), subject.batch, "gptq", width, 32, False)
        name = f"int{width} g32, brevitas gptq"
        try:
            reached[name] = subject.damage(ask("brevitas", job, setup.work).weights)
        except (PeerMissing, RuntimeError) as error:
            yield measured(f"{name}: not measured", str(error).strip().splitlines()[-1])
            continue
        yield measured(f"{name}: perplexity", reached[name])
    fewer = min(value for name, value in reached.items() if name.startswith("int2"))
    yield true("mixed: better than every uniform form of two bits", mixed < fewer)


def _recipe(
    subject: Subject, name: str, step: dict[str, Any]
) -> Generator[Measurement, None, tuple[float, float]]:
    """Tells perplexity and bits; returns both."""
    batches = subject.batches()
    recipe = {"passes": [step]}
    result = compress.run(subject.module, recipe, example_inputs=batches[0], calibration=batches)
    graph = result.graph
    linear = {site.weight: site for site in graph.sites() if site.kind == "linear"}
    perplexity = subject.damage({weight: graph.weight(weight) for weight in linear})
    stored = sum(graph.encodings[weight].nbytes for weight in linear)
    bits = 8 * stored / sum(graph.weight(weight).numel() for weight in linear)
    yield measured(f"{name}: perplexity", perplexity)
    yield measured(f"{name}: bits for each weight", bits)
    return perplexity, bits
