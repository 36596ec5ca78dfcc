"""Streaming observers against the same figures of all the data at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compress
from compress.errors import CalibrationError
from compress.observe import Channels, Histogram, observe
from compress.testing import MODELS, assert_close, make


def batches(sizes: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 5, generator=generator) * 4**i for i, n in enumerate(sizes)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 50), st.sampled_from([-1, 1]))
def test_channels(sizes: list[int], seed: int, axis: int) -> None:
    seen, parts = Channels(axis), batches(sizes, seed)
    for part in parts:
        seen.update(part)
    rows = torch.cat(parts).movedim(axis, -1).flatten(0, -2)
    assert torch.equal(seen.low, rows.amin(0)) and torch.equal(seen.high, rows.amax(0))
    assert_close(rows.double().square().mean(0).float(), seen.energy)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 50))
def test_histogram(sizes: list[int], seed: int) -> None:
    seen, parts = Histogram(), batches(sizes, seed)
    for part in parts:
        seen.update(part)
    x = torch.cat(parts).flatten()
    assert (seen.low, seen.high) == (min(0.0, float(x.min())), max(0.0, float(x.max())))
    assert int(seen.counts.sum()) == x.numel()
    step = 2 * seen.reach / seen.BINS
    assert abs(float((seen.counts * seen.centers).sum()) / x.numel() - float(x.mean())) <= step


def test_histogram_of_zeros() -> None:
    seen = Histogram()
    seen.update(torch.zeros(4))
    seen.update(torch.tensor([3.0, -1.0]))
    assert seen.counts.sum() == 6 and seen.reach >= 3


def test_observing_a_graph() -> None:
    graph = compress.capture(make("convnet"), list(MODELS["convnet"].inputs(1)))
    data = [MODELS["convnet"].inputs(2), MODELS["convnet"].inputs(3)]
    nodes = {n.name: Channels(1) for n in graph.ops.nodes if "conv2d" in n.name}
    observe(graph, data, {name: [c] for name, c in nodes.items()})
    assert nodes and all(c.rows > 0 for c in nodes.values())
    first = next(iter(nodes.values()))
    expected = make("convnet").conv1(torch.cat([d[0] for d in data]))  # type: ignore[operator]
    assert_close(expected.amax((0, 2, 3)).detach(), first.high)
    with pytest.raises(CalibrationError):
        observe(graph, [], {})
