"""Models that write in place: found, captured right, and seen right by the sweep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.aliasing import keep_state, writes_behind_names
from compress.calibration import Statistics, sweep
from compress.graph import Site
from compress.testing import assert_close


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write = write
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.write(self.first(x)))
        return out


def chain(h: Tensor) -> Tensor:
    h = torch.relu_(h)
    h += 1
    return h


def part(h: Tensor) -> Tensor:
    h[:, 2:5] = 0
    return h


def other_view(h: Tensor) -> Tensor:
    view = h.view(-1, 2, 4)
    h.mul_(2)
    return h + view.flatten(1)


def constant(h: Tensor) -> Tensor:
    mask = torch.zeros(8)
    mask[3:] = 5
    return h + mask


@pytest.mark.parametrize("max_memory", [1 << 30, 0])
@pytest.mark.parametrize(
    ("write", "behind"), [(chain, False), (part, True), (other_view, True), (constant, True)]
)
def test_the_sweep_sees_writes(write: Callable[[Tensor], Tensor], behind: bool, max_memory: int) -> None:
    torch.manual_seed(0)
    module = Writes(write).eval()
    x = torch.randn(6, 8)
    with torch.no_grad():
        program = torch.export.export(module, (x,), strict=False)
        rows = write(module.first(x))
    assert writes_behind_names(program.graph) == behind
    graph = compress.capture(module, (x,))
    assert {site.name for site in graph.sites()} == {"first", "last"}
    found: dict[str, Statistics | None] = {}

    def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> None:
        found[site.name] = statistics

    sweep(graph, graph.sites(), visit, batches=[(x,)], needs=frozenset({"H"}), max_memory=max_memory)
    statistics = found["last"]
    assert statistics is not None and statistics.H is not None
    assert_close(rows.T @ rows / 6, statistics.H[0], db=90)


@pytest.mark.parametrize("whole", [True, False])
def test_inputs_are_not_written_to(whole: bool) -> None:
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if whole:
                x.sub_(0.5)
            else:
                x[:, 0] = 0
            out: Tensor = self.layer(x)
            return out

    module = Normalises().eval()
    x = torch.randn(6, 8)
    before = x.clone()
    graph = compress.capture(module, (x,))
    have = graph.run([x])[0]
    assert torch.equal(x, before)
    with torch.no_grad():
        assert_close(module(x), have, db=90)


def test_graphs_without_writes_stay_as_they_are() -> None:
    with torch.no_grad():
        program = torch.export.export(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), strict=False)
    before = str(program.graph)
    keep_state(program.graph)
    assert str(program.graph) == before
