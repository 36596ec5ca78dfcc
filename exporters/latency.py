"""Milliseconds of single layers in ONNX Runtime, in each format they may take: measured, not modelled.

Every layer is written as a model of one operator, in the form it takes in a whole file, and called with
the input it has in the model. The formats of one layer are timed in turn, so that a busy machine slows
all of them. Equal layers are timed once.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, fx

from compress.encoding import EncodedWeight
from compress.exporters.ort import Session
from compress.exporters.to_onnx import build_model
from compress.graph import Graph
from compress.layers import alone, put
from compress.pipeline import LayerForm

_SAME = 0.05
"""Relative difference to float below which a format is taken to be as fast: the noise of such timings."""
_ROUNDS = 5


def layer_latencies(
    graph: Graph,
    inputs: Sequence[Tensor],
    formats: Mapping[str, Sequence[LayerForm | None]],
    *,
    seconds: float = 0.2,
) -> dict[str, list[float]]:
    """Median time of one call, one thread, for each format of each weight.

    The overhead of calling the runtime (some 10 microseconds) is part of it. A weight with several sites
    counts at each of them.

    Args:
        graph: the model; its weights of these names are float.
        inputs: flat inputs of the size to measure at.
        formats: by weight: the weight in each format, or a chain in its place; None is float.
        seconds: spent on each layer.

    Returns:
        milliseconds by weight, in the order of its formats.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        ExportError: a layer cannot be written.
    """
    found = {name: [0.0] * len(options) for name, options in formats.items()}
    known: dict[object, list[float]] = {}
    for site, layer, x in alone(graph, inputs, formats):
        options = formats[site.weight]
        node = graph.node(site.node)
        rest = str(fx.node.map_arg((node.args[2:], node.kwargs), lambda n: "tensor"))
        key = (node.target, tuple(x.shape), graph.shape(site.weight), rest, tuple(map(_name, options)))
        if key not in known:
            known[key] = _timed(layer, x, options, seconds)
        found[site.weight] = [a + b for a, b in zip(found[site.weight], known[key], strict=True)]
    return found


def _name(option: LayerForm | None) -> str | None:
    if option is None:
        return None
    return str(option.encoding) if isinstance(option, EncodedWeight) else str(option)


def _timed(graph: Graph, x: Tensor, options: Sequence[LayerForm | None], seconds: float) -> list[float]:
    import onnx_ir as ir

    calls = []
    with tempfile.TemporaryDirectory(prefix="compress-layer-") as folder:
        for option in options:
            here = graph.copy()
            dtype = here.tensors["weight"].dtype
            if isinstance(option, EncodedWeight):
                here.set_encoding("weight", replace(option, dtype=dtype))
            elif option is not None:
                put(here, here.sites()[0], option.to(dtype))
            path = Path(folder) / "layer.onnx"
            ir.save(build_model(here)[0], path)
            session = Session(path)
            calls.append((session.session, session.feed([x])))
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _ROUNDS or time.perf_counter() < end:
        for (session, feed), taken in zip(calls, times, strict=True):
            session.run(None, feed)  # warm: another one has just been through the caches
            began = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - began)
        rounds += 1
    medians = [1e3 * statistics.median(taken) for taken in times]
    plain = next((m for m, option in zip(medians, options, strict=True) if option is None), None)
    return [m if plain is None or abs(m / plain - 1) > _SAME else plain for m in medians]
