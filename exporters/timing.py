"""Time files against each other: in one process, called in turn, so that a busy machine slows all of them.

The figures are medians; how much faster a file is, is the median of the ratios of neighbouring calls.
Slower is an outcome like any other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.artifact import Timing
from compress.exporters.exporter import Running
from compress.graph import Graph
from compress.inputs import sizes_of
from compress.kv_cache import decoding, has_cache

_LEAST, _MOST = 5, 300
"""Rounds."""


@dataclass(frozen=True)
class Speed:
    """Of one callable among several.

    Attributes:
        ms: median milliseconds of a call.
        speedup: median of the ratios baseline / this one of the same round; above 1 is faster.
        spread: half the interquartile range of those ratios; differences below it are noise.
        rounds: how often each was called.
    """

    ms: float
    speedup: float
    spread: float
    rounds: int


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Speed]:
    """Call all of them in turn; the first is the baseline.

    Args:
        calls: by name.
        seconds: after which no further round begins, once there were five; 300 are enough.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.perf_counter
    end = clock() + seconds
    rounds = 0
    while rounds < _LEAST or (clock() < end and rounds < _MOST):
        for name, call in calls.items():
            call()  # warm: another one has just been through the caches
            began = clock()
            call()
            taken[name].append(clock() - began)
        rounds += 1
    first = next(iter(taken.values()))
    found = {}
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(first, times, strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        found[name] = Speed(
            1e3 * statistics.median(times), statistics.median(ratios), (quarters[2] - quarters[0]) / 2, rounds
        )
    return found


def time_files(
    files: Mapping[str, Running],
    reference: Graph,
    sample: Sequence[Tensor],
    batch_sizes: Sequence[int],
    *,
    threads: int,
    seconds: float,
    step: Callable[[str], object] = lambda name: None,
    takes: Callable[[Sequence[Tensor]], bool] = lambda inputs: True,
) -> Iterator[dict[str, Timing]]:
    """Time files of one model, all of them interleaved; yields once for each size of the inputs.

    A model with a key-value cache decodes one token, at each batch size, and reads a prompt at the first.

    Args:
        files: by name, opened; the first is the uncompressed one.
        reference: the model, for its inputs.
        sample: flat inputs, repeated or cut to each batch size.
        batch_sizes: where the batch is fixed, that one is timed.
        threads: that the files were opened with, for the record.
        seconds: for each size.
        step: told what is timed next.
        takes: whether the files take flat inputs of these sizes; others are left out.

    Raises:
        VerificationError: a file does not run on these inputs.
    """
    for given, size in _cases(reference, sample, batch_sizes):
        inputs = batch_of(reference, given, size)
        if not takes(inputs):
            continue
        step(f"speed at batch {size}" if size else "speed")
        sizes = sizes_of(reference.inputs, inputs)
        speeds = interleaved({name: file.call(inputs) for name, file in files.items()}, seconds)
        baseline = next(iter(speeds.values())).ms
        yield {
            name: Timing(sizes, baseline, s.ms, s.speedup, s.spread, s.rounds, threads)
            for name, s in speeds.items()
        }


def _cases(
    reference: Graph, sample: Sequence[Tensor], batch_sizes: Sequence[int]
) -> list[tuple[Sequence[Tensor], int]]:
    """Flat inputs and the batch to give them; 0 for a batch that is fixed."""
    if not batch_sizes:
        return []
    cases = [(sample, size) for size in (batch_sizes if _has_batch(reference) else [0])]
    if has_cache(reference.inputs) and not sizes_of(reference.inputs, sample)["past"]:
        # decoding is what takes the time; of prompts the smallest batch
        token = decoding(reference, batch_of(reference, sample, 1), tokens=1)
        cases = [*((token, size) for _, size in cases), cases[0]]
    return cases


def _has_batch(reference: Graph) -> bool:
    return any(symbol == "batch" for spec in reference.inputs for _, symbol in spec.dynamic)


def batch_of(reference: Graph, sample: Sequence[Tensor], size: int) -> list[Tensor]:
    """The sample repeated or cut to a batch of this size."""
    result = []
    for spec, tensor in zip(reference.inputs, sample, strict=True):
        for axis, symbol in spec.dynamic:
            if symbol == "batch":
                index = torch.arange(size) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        result.append(tensor)
    return result
