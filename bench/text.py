"""Sentences and tokens of the texts in the data folder."""

from __future__ import annotations

import gzip
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.measure import Setup

_SPACED = re.compile(r" ([,.;:!?%)\]]|'s\b|n't\b|'re\b|'ve\b|'ll\b)")
_OPENED = re.compile(r"([(\[]) ")


_QUICK_LINES = 1000
"""Of a text, when quick: turning all of it into tokens takes longer than what the tokens are for."""


def wikitext(setup: Setup, part: str) -> Path:
    """WikiText-2, ``train`` or ``test``, as a gzipped text; when quick only the start of it."""
    whole = setup.file(f"data/wikitext2.{part}.txt.gz")
    if not setup.quick:
        return whole
    start = setup.work / f"{part}.txt.gz"
    with gzip.open(start, "wt", encoding="utf-8") as file:
        file.writelines(lines(whole)[:_QUICK_LINES])
    return start


def lines(path: Path) -> list[str]:
    """The lines of a gzipped text, line ends kept."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.readlines()


def sentences(path: Path, counts: Sequence[int], seed: int = 0) -> list[list[str]]:
    """Disjoint seeded draws of real sentences of 8 to 60 words, without unknown words.

    Args:
        path: a gzipped text whose words and punctuation are separated by spaces.
        counts: how many to draw for each list.

    Raises:
        ValueError: the text holds fewer.
    """
    found: dict[str, None] = {}
    for line in lines(path):
        if line.lstrip().startswith("="):
            continue  # a heading
        for part in line.strip().split(" . "):
            if 8 <= len(part.split()) <= 60 and "<unk>" not in part:
                found[_clean(part.removesuffix(" .") + " .")] = None
    everything = sorted(found)
    random.Random(seed).shuffle(everything)
    if len(everything) < sum(counts):
        raise ValueError(f"{path.name} holds {len(everything)} sentences, {sum(counts)} are needed")
    ends = np.cumsum(counts)
    return [everything[end - n : end] for n, end in zip(counts, ends, strict=True)]


def _clean(words: str) -> str:
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" - ", "-")):
        words = words.replace(spaced, plain)
    return _OPENED.sub(r"\1", _SPACED.sub(r"\1", words)).replace('" ', '"', 1).strip()


def windows(path: Path, tokenizer: Path, length: int, most: int | None = None) -> np.ndarray:
    """A text as token ids ``[n, length]``: each line encoded with its end, a last partial window dropped.

    Args:
        path: a gzipped text.
        tokenizer: a tokenizer.json.
        length: of a window.
        most: only the first lines, so many.
    """
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    encoded = loaded.encode_batch(lines(path)[:most], add_special_tokens=False)
    tokens = np.concatenate([np.asarray(e.ids, np.int64) for e in encoded])
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def perplexity(logits: Callable[[Tensor], Tensor], tokens: Tensor, inputs: Tensor | None = None) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        logits: of a model, float ``[B, T, V]`` of `inputs`.
        tokens: int64 ``[windows, T]``.
        inputs: what the model reads of each window; None: the tokens.
    """
    read = tokens if inputs is None else inputs
    total, count = 0.0, 0
    for x, rows in zip(read.split(4), tokens.split(4), strict=True):
        guess = logits(x)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(guess, rows[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + rows[:, 1:].numel()
    return math.exp(total / count)
