"""Time of GPU work as a model sees it: in a CUDA graph, with weights that are not in the cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def copies(nbytes: int, device: torch.device) -> int:
    """How many different weights of this size one graph must read, so that no cache holds the next one."""
    found: Any = torch.cuda.get_device_properties(device)
    return max(1, math.ceil(4 * found.L2_cache_size / nbytes))


def seconds(contenders: Mapping[str, Sequence[Call]], replays: int = 20) -> dict[str, float]:
    """Median seconds of one call, for each contender.

    The calls of a contender are captured in one CUDA graph, so what Python and a launch cost is not in the
    result. Graphs of all contenders are replayed in turn, so all see the same clocks and temperature.

    Args:
        contenders: by name, equal calls on different weights (`copies`). Each is called once before the
            capture, in which Triton compiles.
        replays: of each graph.
    """
    graphs = {name: _captured(calls) for name, calls in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(replays):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / 1e3 / len(contenders[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph
