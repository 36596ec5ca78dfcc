"""CompactifAI's claim on a small language model: 70 % of the parameters and 93 % of the bytes, with training.

Layers of the blocks become matrix product operators, the model is trained for a short while (as Tomut et al.
2024, arXiv 2401.14109, do for less than one epoch), and the cores are quantized. Beside it stand low-rank
chains made by the same pass, and integers alone: 4 bits, and 2 bits at the same bytes, also trained. Bytes
are those of the blocks; embedding and head are 4 bits wide wherever anything is quantized.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

import compress
from bench import text
from bench.cases.lm import trained
from bench.measure import MB, Measurement, Setup, measured
from compress.data import load_calibration
from compress.passes.decompose import Decompose
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.pipeline import Context, Pass

_ENDS = ("embed_tokens", "lm_head")


def run(setup: Setup) -> list[Measurement]:
    """When quick: the first block of the model, few short windows, a handful of steps; no low-rank chains,
    and of matrix products only 8-bit cores."""
    case = _Case(setup)
    case.compare()
    return case.found


class _Case:
    """The model, its data, what can be done to it, and what came of it."""

    def __init__(self, setup: Setup) -> None:
        tokenizer = setup.file("models/lm_wikitext2_tokenizer.json")
        length, count, tested = (64, 24, 10) if setup.quick else (256, 1024, 200)
        weights, build = trained(setup)
        self.graph = compress.capture(weights, inputs=[f"ids:int64[1,seq={length}]"], model=build)
        corpus = text.wikitext(setup, "train")
        self.data, self.few = (
            load_calibration(corpus, inputs=self.graph.inputs, tokenizer=tokenizer, samples=n)
            for n in (count, min(64, count))
        )
        test = torch.from_numpy(text.windows(text.wikitext(setup, "test"), tokenizer, length))
        self.test = test[:: len(test) // tested][:tested]
        self.widths = ((8, -1),) if setup.quick else ((8, -1), (4, 32))
        self.plans: dict[str, dict[str, Any]] = {"mpo -70 %": {"method": "mpo"}}
        if not setup.quick:
            self.plans["low rank -70 %"] = {}
        self.found: list[Measurement] = []

    def compare(self) -> None:
        self.tell("float", self.graph)
        self.tell("int4", self.quantized(self.graph, 4, 32))
        plain = self.quantized(self.graph, 2, 64)
        reached = {"int2": self.tell("int2", plain)}
        reached["int2, recovered"] = self.tell("int2, recovered", self.trained("int2", plain))
        for name, options in self.plans.items():
            step = Decompose(parameter_reduction=0.7, targets=("layers",), **options)
            small = step.apply(self.graph, Context(self.graph, self.few)).graph
            self.tell(name, small)
            healed = self.trained(name, small)
            self.tell(f"{name}, recovered", healed)
            for bits, group_size in self.widths:
                what = f"{name}, recovered, int{bits}"
                reached[what] = self.tell(what, self.quantized(healed, bits, group_size))
        best = min(reached, key=reached.__getitem__)
        self.found.append(measured("of those with 91 % of the bytes removed or more, the best", best))

    def quantized(self, graph: compress.Graph, bits: int, group_size: int) -> compress.Graph:
        inner: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": group_size == -1}
        steps: list[Pass] = [
            QuantizeWeights(ignore=_ENDS, **inner),
            QuantizeWeights(bits=4, group_size=32, symmetric=False, targets=_ENDS),
        ]
        for step in steps:
            graph = step.apply(graph, Context(self.graph, self.few)).graph
        return graph

    def trained(self, name: str, graph: compress.Graph) -> compress.Graph:
        """After one pass over a quarter of a million tokens, towards the original's probabilities."""
        began = time.process_time()
        step = Recover(epochs=1, batch_size=8, learning_rate=5e-4)
        graph = step.apply(graph, Context(self.graph, self.data)).graph
        minutes = (time.process_time() - began) / 60
        self.found.append(measured(f"{name}: processor time of training", minutes, "min"))
        return graph

    def tell(self, name: str, graph: compress.Graph) -> float:
        """The perplexity, which is told beside what it costs."""
        fast = graph.decoded()
        perplexity = text.perplexity(lambda rows: fast.run([rows])[0], self.test)
        weights = {site.weight for site in graph.sites() if _in_blocks(site.weight)}
        numbers = sum(math.prod(graph.shape(weight)) for weight in weights)
        stored = sum(t.numel() * t.element_size() for n, t in graph.tensors.items() if _in_blocks(n))
        before = sum(t.numel() for n, t in self.graph.tensors.items() if _in_blocks(n))
        self.found += [
            measured(f"{name}: perplexity", perplexity),
            measured(f"{name}: parameters of the blocks removed", 100 * (1 - numbers / before), "%"),
            measured(f"{name}: bytes of the blocks removed", 100 * (1 - stored / (4 * before)), "%"),
            measured(f"{name}: bytes of the model", graph.nbytes / MB, "MB"),
        ]
        return perplexity


def _in_blocks(tensor: str) -> bool:
    return tensor.startswith("layers.") and "layernorm" not in tensor
