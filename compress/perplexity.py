"""Perplexity of a causal language model on held-out text, and its divergence from the original.

The text becomes tokens without special tokens, the tokens become windows of T: those of the model's example
input, one after the other, without overlap; a last partial window is dropped. Of N windows x_1 .. x_N

    perplexity = exp( - 1 / (N (T - 1))  sum_n sum_{t=2..T}  log q(x_nt | x_n1 .. x_n,t-1) )

so the first token of each window is not predicted. This is what is reported for WikiText-2 (Frantar et al.
2023, GPTQ, arXiv 2210.17323, section 4), though at their own context lengths: perplexities compare at the
same tokenizer, text and T only. With p the original's distribution of the next token and V the vocabulary,

    divergence = 1 / (N (T - 1))  sum_n sum_{t=2..T}  sum_{v=1..V}  p(v | ..) log( p(v | ..) / q(v | ..) )

is the mean Kullback-Leibler divergence in nats per token. Changes that cancel in the perplexity, some tokens
more probable and others less, do not cancel there (Dutta et al. 2024, "Accuracy is Not All You Need", arXiv
2407.09141).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from compress.data_checks import fixed_batch, too_few
from compress.data_text import WindowTable, open_windows
from compress.errors import CalibrationError, InputSpecError
from compress.graph import Graph
from compress.kv_cache import with_empty_past, without_past

WINDOWS = 64
"""Windows of a text that are measured by default: the first ones."""

_BATCH = 4
"""Windows at a time where the batch is dynamic: logits of a large vocabulary take 100 MB."""

EvalFn = Callable[[torch.nn.Module], float]
"""A metric of a module: higher is better, unless it has a true attribute `lower_is_better`."""

Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Flat inputs -> the outputs that have a name."""


@dataclass(frozen=True)
class LanguageScore:
    """What a model makes of a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        kl: mean KL divergence from the original, nats per token.
    """

    perplexity: float
    kl: float


class Perplexity:
    """A metric of causal language models, lower is better: for `eval_fn` of `run` and `verify`.

    The model takes ids ``[batch, T]`` (int64 or int32), and perhaps an attention mask and token types of that
    shape, which are all ones and all zeros, and a key-value cache, which is empty; it gives logits
    ``[batch, T, V]``.

    Args:
        text: a UTF-8 file, gzipped or not.
        tokenizer: a tokenizer.json or a Hugging Face folder; by default that of the model's folder.
        windows: at most this many, from the start of the text.

    Raises:
        CalibrationError: there is no such file, or `windows` is not positive.
    """

    lower_is_better = True

    def __init__(
        self, text: str | Path, tokenizer: str | Path | None = None, *, windows: int = WINDOWS
    ) -> None:
        self.text, self.tokenizer, self.limit = Path(text).expanduser(), tokenizer, windows
        if not self.text.is_file():
            raise CalibrationError(
                f"there is no text at {str(text)!r} to measure the perplexity on",
                expected="a UTF-8 text file, gzipped or not",
            )
        if windows < 1:
            raise CalibrationError(f"windows is {windows}", expected="1 or more")
        self._graph: Graph | None = None
        self._table: WindowTable
        self._batches: list[range]
        self._logits: int

    def prepare(self, graph: Graph) -> None:
        """Read the text as the windows of this model and check that it is a causal language model.

        Args:
            graph: the original.

        Raises:
            CalibrationError: no tokenizer, no text for one batch, or the model does not take ids.
            InputSpecError: the model gives no next-token logits, or none for all ids of the tokenizer.
            MissingExtra: the tokenizer's package is not installed.
        """
        if graph is self._graph:
            return
        tokenizer = self.tokenizer or graph.meta.get("tokenizer")
        fixed = fixed_batch(graph.inputs, self.text.name)
        specs = without_past(graph.inputs)
        table = open_windows(self.text, specs, tokenizer, max(self.limit, fixed or 1))
        if table.length < 2:
            raise InputSpecError(
                "the model's windows are of 1 token, and the first one is not predicted",
                expected="a longer example input",
                fix='--input "ids:int64[1,seq=256]"',
            )
        size = fixed or _BATCH
        count = table.count // fixed * fixed if fixed else table.count
        if not count:
            raise too_few(table.count, size, self.text.name)
        self._batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        self._logits = _check(graph, table, fixed or 1)
        self._table, self._graph = table, graph

    @property
    def description(self) -> str:
        """What it is measured on, once prepared: "64 windows of 256 tokens of a.txt (16,320 predicted)"."""
        count = sum(map(len, self._batches))
        predicted = count * (self._table.length - 1)
        words = f"{count} window{'' if count == 1 else 's'} of {self._table.length} tokens"
        return f"{words} of {self.text.name} ({predicted:,} predicted)"

    def compare(self, models: Mapping[str, Runner]) -> dict[str, LanguageScore]:
        """Run models side by side; the first one is the original that the others diverge from.

        Args:
            models: name -> how it runs on flat inputs.

        Raises:
            InputSpecError: nothing was prepared.
        """
        if self._graph is None:
            raise InputSpecError(
                "the perplexity knows no model yet",
                expected="the inputs and the vocabulary of the original",
                fix="metric.prepare(compress.capture(model, …))",
            )
        losses = dict.fromkeys(models, 0.0)
        divergences = dict.fromkeys(models, 0.0)
        count = 0
        for rows in self._batches:
            ids = self._table.ids(rows)
            inputs = _inputs(self._graph, self._table, ids)
            with torch.no_grad():
                logits = {name: run(inputs)[self._logits] for name, run in models.items()}
            count += ids[:, 1:].numel()
            for row, window in enumerate(ids):
                original: Tensor | None = None
                for name, values in logits.items():
                    chances = values[row, :-1].float().log_softmax(-1)
                    original = chances if original is None else original
                    taken = chances.gather(1, window[1:, None])
                    losses[name] -= float(taken.sum(dtype=torch.float64))
                    divergences[name] += _divergence(original, chances)
        return {name: LanguageScore(_exp(losses[name] / count), divergences[name] / count) for name in models}

    def __call__(self, module: torch.nn.Module) -> float:
        """Perplexity of a module that is called like the original."""

        def run(inputs: Sequence[Tensor]) -> list[Any]:
            assert self._graph is not None
            args, kwargs = pytree.tree_unflatten(list(inputs), self._graph.in_spec)
            names = self._graph.output_names
            outputs = pytree.tree_leaves(module(*args, **kwargs))
            return [value for name, value in zip(names, outputs, strict=True) if name is not None]

        return self.compare({"model": run})["model"].perplexity


PERPLEXITY = "perplexity:"
"""What a metric that is a perplexity begins with, on the command line."""


def metric_named(name: str, tokenizer: str | Path | None = None) -> Callable[[torch.nn.Module], float]:
    """A metric as the command line names it: "perplexity:FILE", or "module:callable".

    Raises:
        CalibrationError: there is no such text.
        ModelFileError: there is no such callable.
    """
    if name.startswith(PERPLEXITY):
        return Perplexity(name.removeprefix(PERPLEXITY), tokenizer)
    from compress.loading import resolve_callable

    return resolve_callable(name, what="--eval")


def _inputs(graph: Graph, table: WindowTable, ids: Tensor) -> tuple[Tensor, ...]:
    """Flat inputs; a key-value cache, if the model has one, is empty."""
    return with_empty_past(graph.inputs, table.inputs(ids))


def _check(graph: Graph, table: WindowTable, batch: int) -> int:
    """Which of the named outputs holds the logits; tried on windows of one token.

    Raises:
        InputSpecError: none of them, the tokenizer has more ids than they do, or they look ahead.
    """
    length = table.length
    ids = torch.zeros(batch, length, dtype=torch.int64)
    names = [name for name in graph.output_names if name is not None]
    outputs = graph.named(graph.run(_inputs(graph, table, ids)))
    fitting = [
        index
        for index, value in enumerate(outputs)
        if value.is_floating_point() and value.ndim == 3 and tuple(value.shape[:2]) == (batch, length)
    ]
    if "logits" in names:
        fitting = [index for index in fitting if names[index] == "logits"]
    if len(fitting) != 1:
        given = "; ".join(f"{n} {list(v.shape)}" for n, v in zip(names, outputs, strict=True))
        raise InputSpecError(
            f"for ids [{batch}, {length}] the model gives {given}",
            expected=f"logits of a causal language model, [{batch}, {length}, vocabulary], for a perplexity",
        )
    logits = outputs[fitting[0]]
    largest = max(int(table.ids([row]).max()) for row in range(table.count))
    if largest >= logits.shape[2]:
        raise InputSpecError(
            f"the text has token {largest}, and the model has logits of {logits.shape[2]} tokens",
            expected="the tokenizer that the model was trained with",
        )
    ids[:, -1] = largest
    later = graph.named(graph.run(_inputs(graph, table, ids)))[fitting[0]]
    difference = (later - logits)[:, :-1].abs().max()
    if difference > math.sqrt(torch.finfo(logits.dtype).eps) * logits.abs().max():
        raise InputSpecError(
            "another last token changes the logits before it, so they are no predictions of the next token",
            expected="a causal language model, for a perplexity",
        )
    return fitting[0]


def _divergence(p: Tensor, q: Tensor) -> float:
    """Sum over positions of KL(p || q), from log-probabilities ``[positions, V]``."""
    weights = p.exp()
    # what p never takes costs nothing, also where both logarithms are minus infinity
    terms = torch.where(weights > 0, weights * (p - q), 0.0)
    return float(terms.sum(dtype=torch.float64))


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
