"""Timing of files against each other. No test asserts a duration."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.exporters import timing
from compress.exporters.timing import batch_of, interleaved, time_files
from compress.testing import MODELS, make


def test_the_first_is_the_baseline() -> None:
    order: list[str] = []

    def calling(name: str) -> Callable[[], object]:
        return lambda: order.append(name)

    speeds = interleaved({"a": calling("a"), "b": calling("b"), "c": calling("c")}, 0.0)
    assert list(speeds) == ["a", "b", "c"]
    assert speeds["a"].speedup == 1 and speeds["a"].spread == 0
    assert {s.rounds for s in speeds.values()} == {5}
    # each is warmed up just before it is timed, and all of them take turns
    assert order == ["a", "a", "b", "b", "c", "c"] * 5


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: the ratio of the medians would be 4 / 1."""
    slow, fast = [2.0, 9.0, 4.0, 3.0, 12.0], [1.0, 1.0, 8.0, 1.0, 3.0]
    now = 0.0

    def lasting(seconds: list[float]) -> Callable[[], object]:
        # each round warms up before it is timed
        left = iter([part for s in seconds for part in (100.0, s)])

        def call() -> None:
            nonlocal now
            now += next(left)

        return call

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    speeds = interleaved({"slow": lasting(slow), "fast": lasting(fast)}, 0.0)
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    assert ratios == [0.5, 2, 3, 4, 9]
    assert speeds["fast"].speedup == 3 and speeds["slow"].speedup == 1
    assert speeds["slow"].ms == 4000 and speeds["fast"].ms == 1000
    quarters = statistics.quantiles(ratios, n=4)
    assert speeds["fast"].spread == (quarters[2] - quarters[0]) / 2


class Fake:
    """A file that remembers the shapes it was called with."""

    environment: dict[str, str] = {}  # noqa: RUF012 - the protocol's
    stands_in = ""

    def __init__(self) -> None:
        self.shapes: list[list[int]] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return []

    def call(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        self.shapes.append(list(inputs[0].shape))
        return lambda: None


def test_files_are_timed_at_each_batch() -> None:
    example = MODELS["encoder"]
    graph = compress.capture(make("encoder"), inputs=example.specs)
    files: dict[str, Any] = {name: Fake() for name in ("float", "one", "two")}
    said: list[str] = []
    found = list(
        time_files(files, graph, example.inputs(3), (1, 8), threads=2, seconds=0.0, step=said.append)
    )
    assert [list(timings) for timings in found] == [["float", "one", "two"]] * 2
    assert [timings["two"].sizes for timings in found] == [{"batch": 1, "seq": 9}, {"batch": 8, "seq": 9}]
    assert all(t.threads == 2 and t.float_ms == found[i]["float"].compressed_ms
               for i, timings in enumerate(found) for t in timings.values())  # fmt: skip
    assert all(file.shapes == [[1, 9], [8, 9]] for file in files.values())
    assert said == ["speed at batch 1", "speed at batch 8"]
    assert not list(time_files(files, graph, example.inputs(3), (), threads=1, seconds=0.0))


def test_a_batch_is_cut_or_repeated() -> None:
    graph = compress.capture(make("encoder"), inputs=MODELS["encoder"].specs)
    ids = torch.arange(27).reshape(3, 9)
    longer = batch_of(graph, (ids, torch.ones_like(ids)), 5)
    assert torch.equal(longer[0], ids[[0, 1, 2, 0, 1]])
    assert torch.equal(batch_of(graph, (ids, ids), 2)[1], ids[:2])
