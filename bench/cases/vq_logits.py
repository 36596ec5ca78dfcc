"""Output heads: VQ-logits by codes and training, beside integers, tiers and two stages; a head's time.

The head of a small language model is taken for itself: perplexities are those of the model with its other
layers as they are. The claims for VQ-Logits (arXiv 2505.10202: 99 % fewer parameters, +4 % perplexity, logits
6 times as fast) are for models trained with their codes; here a trained model's head is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from bench import models, text
from bench.measure import Measurement, Setup, caller, measured, true
from compress.data import load_calibration
from compress.exporters.ort import Session
from compress.exporters.timing import interleaved
from compress.head import HeadBuilder, head_inputs, heads
from compress.passes.frequency_tiers import FrequencyTiers
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.passes.screen_logits import ScreenLogits, screened_logits
from compress.passes.solvers.logit_codes import LogitCodes
from compress.passes.solvers.vector_codes import VectorCodes
from compress.passes.vq_logits import VqLogits, coded_logits
from compress.pipeline import Context, Pass, PassResult

_MODEL = "bench/models.py:small_lm"
_VOCABULARY, _WIDTH = 32000, 512
"""Of the head that is timed."""


def run(setup: Setup) -> list[Measurement]:
    """When quick: few short windows and forms, one epoch; the model as a whole is left out."""
    case = _Case.of(setup)
    found = [*_integers(case, setup.quick), *_codes(case, setup.quick), *_two_stages(case, setup.quick)]
    found += _speed(setup)
    return found if setup.quick else [*found, *_whole_model(setup, case)]


class _HeadOnly(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(weight)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(h)
        return logits


def _capture(weight: Tensor, length: int) -> compress.Graph:
    module = _HeadOnly(weight).eval()
    return compress.capture(module, inputs=[f"h:float32[1,seq={length},!{weight.shape[1]}]"])


@dataclass(frozen=True)
class _Case:
    """The head as a graph of its own, what it reads, and the tokens that follow.

    Attributes:
        graph: of the head.
        context: with what it reads on training text.
        test: float32 ``[windows, length, width]``, what it reads on test text.
        tokens: int64 ``[windows, length]`` of that.
        dense: its perplexity.
    """

    graph: compress.Graph
    context: Context
    test: Tensor
    tokens: Tensor
    dense: float

    @classmethod
    def of(cls, setup: Setup) -> _Case:
        length = 64 if setup.quick else 256
        whole = _whole(setup, length)
        (site,) = heads(whole, whole.sites())
        train = _windows(setup, "train", length, 48 if setup.quick else 128)
        tokens = _windows(setup, "test", length, 12 if setup.quick else 96)
        read = [
            head_inputs(whole, site, [(part,) for part in ids.split(8)], len(ids), ids.numel())
            for ids in (train, tokens)
        ]
        hidden, test = (rows.unflatten(0, (-1, length)) for rows in read)
        graph = _capture(whole.weight(site.weight), length)
        data = load_calibration(hidden, inputs=graph.inputs, samples=len(hidden))
        return cls(graph, Context(graph, data), test, tokens, text.perplexity(_logits(graph), tokens, test))

    def apply(self, *steps: Pass) -> PassResult:
        result = PassResult(self.graph)
        for step in steps:
            more = step.apply(result.graph, self.context)
            result = PassResult(more.graph, (*result.changes, *more.changes), (*result.notes, *more.notes))
        return result

    def told(self, name: str, graph: compress.Graph) -> Iterator[Measurement]:
        yield measured(f"{name}: bytes of the head", 100 * graph.nbytes / self.graph.nbytes, "% of float")
        yield measured(
            f"{name}: perplexity / dense",
            text.perplexity(_logits(graph), self.tokens, self.test) / self.dense,
        )


def _whole(setup: Setup, length: int) -> compress.Graph:
    weights = setup.file("models/lm_wikitext2_d256.safetensors")
    module = models.small_lm().eval()
    module.load_state_dict(load_file(weights))
    return compress.capture(module, inputs=[f"ids:int64[1,seq={length}]"])


def _windows(setup: Setup, part: str, length: int, count: int) -> Tensor:
    tokenizer = setup.file("models/lm_wikitext2_tokenizer.json")
    everything = text.windows(text.wikitext(setup, part), tokenizer, length)
    return torch.from_numpy(np.ascontiguousarray(everything[:: len(everything) // count][:count]))


def _logits(graph: compress.Graph) -> Callable[[Tensor], Tensor]:
    def logits(x: Tensor) -> Tensor:
        found: Tensor = graph.run([x])[0]
        return found

    return logits


# -- quality -----------------------------------------------------------------------------------------


def _integers(case: _Case, quick: bool) -> Iterator[Measurement]:
    def bits(
        count: Literal[2, 4, 8], group_size: Literal[-1, 32, 128], target: str = "linear"
    ) -> QuantizeWeights:
        return QuantizeWeights(
            bits=count, group_size=group_size, symmetric=False, targets=(target,), bias_correction=False
        )

    tiers = FrequencyTiers(tiers=(1024,))
    forms: dict[str, Sequence[Pass]] = {
        "int4 g128": [bits(4, 128)],
        "int2 g32": [bits(2, 32)],
        "tiers, 8 and 4 bits": [tiers, bits(8, 128, "lm_head.tier0"), bits(4, 128, "lm_head.tier1")],
        "tiers, 4 and 2 bits": [tiers, bits(4, 32, "lm_head.tier0"), bits(2, 32, "lm_head.tier1")],
    }
    yield measured("dense: perplexity", case.dense)
    for name, steps in list(forms.items())[:: 2 if quick else 1]:
        yield from case.told(name, case.apply(*steps).graph)


def _codes(case: _Case, quick: bool) -> Iterator[Measurement]:
    """5 % of the parameters in several forms, trained more and more; then more codes in 8 bits."""
    published = VqLogits(codes=400, stages=1, token_bias=False, epochs=0)
    yield from case.told("vq 1 x 400, no biases, not trained", case.apply(published).graph)
    budget: tuple[tuple[int, int], ...] = ((4, 92),) if quick else ((1, 368), (4, 92), (8, 46))
    dense = case.graph.parameters
    for stages, codes in budget:
        reached = []
        for epochs in (0, 1) if quick else (0, 1, 8):
            graph = case.apply(VqLogits(codes=codes, stages=stages, epochs=epochs)).graph
            name = f"vq {stages} x {codes}, {epochs} epochs"
            yield measured(f"{name}: parameters of the head", 100 * graph.parameters / dense, "%", "<= 5")
            numbers = list(case.told(name, graph))
            yield from numbers
            reached.append(float(numbers[-1].value))
        yield true(f"vq {stages} x {codes}: training helps", reached[-1] < reached[0])
    if not quick:
        eight = QuantizeWeights(bits=8, group_size=-1, targets=("lm_head.codebook",), bias_correction=False)
        for stages, codes in ((4, 256), (8, 256)):
            graph = case.apply(VqLogits(codes=codes, stages=stages, epochs=4), eight).graph
            yield from case.told(f"vq {stages} x {codes} in 8 bits, 4 epochs", graph)


def _two_stages(case: _Case, quick: bool) -> Iterator[Measurement]:
    step = ScreenLogits(candidates=2048, codes=256, stages=4 if quick else 8, epochs=1 if quick else 2)
    result = case.apply(step)
    name = f"two stages, {step.candidates} candidates"
    yield measured(f"{name}: what the pass says", result.notes[-1].reason)
    positions = missed = wrong = 0
    for x in case.test.split(4):
        dense, ours = (graph.run([x])[0].flatten(0, 1) for graph in (case.graph, result.graph))
        best = dense.argmax(-1)
        # logits of candidates are those of the dense head
        inside = (ours - dense).gather(1, best.unsqueeze(1)).abs().squeeze(1) < 1e-4
        positions, missed = positions + len(best), missed + int((~inside).sum())
        wrong += int((inside & (ours.argmax(-1) != best)).sum())
    yield measured(f"{name}: test positions", positions, "", "" if quick else ">= 20000")
    yield measured(f"{name}: recall there", 1 - missed / positions)
    yield measured(f"{name}: other greedy tokens than dense where it was screened in", wrong, "", "== 0")
    yield from case.told(name, result.graph)


# -- time --------------------------------------------------------------------------------------------


def _speed(setup: Setup) -> Iterator[Measurement]:
    """Of random codes: which ones they are does not matter."""
    generator = torch.Generator().manual_seed(0)
    graph = _capture(torch.randn(_VOCABULARY, _WIDTH, generator=generator), 4)
    (site,) = heads(graph, graph.sites())
    files: dict[str, Path] = {"dense": compress.export(graph, setup.work / "dense.onnx").path}
    coarse = {"vq 1 x 1024": (1, 1024), "vq 2 x 256": (2, 256), "vq 4 x 256": (4, 256)}
    for name, (stages, codes) in coarse.items():
        found = _random_codes(stages, codes, generator)
        changed = graph.copy()
        builder = HeadBuilder(changed, site)
        builder.finish(coded_logits(builder, found))
        files[name] = compress.export(changed, setup.work / f"{stages}x{codes}.onnx").path
    changed = graph.copy()
    builder = HeadBuilder(changed, site)
    builder.finish(screened_logits(builder, found, 256))
    files["two stages, 256 candidates"] = compress.export(changed, setup.work / "screen.onnx").path
    rounded = QuantizeWeights(bits=4, group_size=128, method="rtn", scales="absmax")
    int4 = rounded.apply(graph, Context(graph)).graph
    files["int4 g128"] = compress.export(int4, setup.work / "int4.onnx").path
    sessions = {name: Session(path) for name, path in files.items()}
    for rows in (1, 8):
        x = torch.randn(1, rows, _WIDTH, generator=generator)
        calls: dict[str, Any] = {name: caller(session, x) for name, session in sessions.items()}
        for name, speed in interleaved(calls, 2 if setup.quick else 10).items():
            if name == "dense":
                yield measured(f"head of {_VOCABULARY}x{_WIDTH}, {rows} rows, dense: time", speed.ms, "ms")
                continue
            target = ">= 6" if rows == 1 and name in coarse else ""
            yield measured(
                f"head of {_VOCABULARY}x{_WIDTH}, {rows} rows, {name}: speed-up", speed.speedup, "x", target
            )


def _random_codes(stages: int, codes: int, generator: torch.Generator) -> LogitCodes:
    books = tuple(torch.randn(codes, _WIDTH, generator=generator) for _ in range(stages))
    maps = torch.randint(0, codes, (stages, _VOCABULARY), generator=generator)
    return LogitCodes(VectorCodes(books, maps), torch.randn(_VOCABULARY, generator=generator))


# -- the whole model ---------------------------------------------------------------------------------


def _whole_model(setup: Setup, case: _Case) -> Iterator[Measurement]:
    """The recipes for language models, and codes with the other layers trained towards them."""
    graph = _whole(setup, 256)
    train = _windows(setup, "train", 256, 128)
    data = load_calibration(train, inputs=graph.inputs, samples=len(train), batch_size=8)
    dense = text.perplexity(_logits(graph), case.tokens)
    steps = [
        VqLogits(codes=92, stages=4, epochs=4),
        Recover(epochs=1, batch_size=8, learning_rate=3e-4, temperature=1.0),
    ]
    for name, recipe in (
        ("lm-int4", "lm-int4"),
        ("lm-extreme", "lm-extreme"),
        ("vq 4 x 92, 4 epochs, then 1 epoch of recover", steps),
    ):
        after = compress.run(graph, recipe, calibration=data).graph
        target = "<= 1.02" if name == "lm-int4" else ""
        ratio = text.perplexity(_logits(after.decoded()), case.tokens) / dense
        yield measured(f"whole model, {name}: bytes", 100 * after.nbytes / graph.nbytes, "% of float")
        yield measured(f"whole model, {name}: perplexity / float", ratio, "", target)
