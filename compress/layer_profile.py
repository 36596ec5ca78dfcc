"""Layer sensitivity: what compressing each layer alone does to the model's outputs, by method and size.

Each layer is drafted in several forms for the inputs it gets in the calibration data, and the model is run
on held-out samples with that one form in place (`compress.sensitivity`). Without data there is nothing to
run: the squared error of the weight itself stands for the damage, and is called that.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from compress.calibration import Statistics, output_error, sweep
from compress.chain import Chain
from compress.data import CalibrationData
from compress.encoding import Encoded
from compress.graph import Graph, Site
from compress.pipeline import Note
from compress.progress import Progress, Silent
from compress.sensitivity import Damage, held_out


class Draft(Protocol):
    """A weight in another form; `compress.passes.solvers.drafts.Draft`."""

    @property
    def method(self) -> str: ...
    @property
    def setting(self) -> str: ...
    @property
    def form(self) -> str: ...
    @property
    def value(self) -> Encoded | Chain: ...
    def on_disk(self) -> Draft: ...


Drafts = Callable[[Tensor, Tensor | None, Tensor | None], Iterable[Draft]]
"""(weight, diag, H) -> its forms; `compress.passes.solvers.drafts.drafts`."""
Ranks = Callable[[Tensor, Tensor | None], dict[str, float]]
"""(weight, H) -> its ranks by several measures; `compress.passes.solvers.drafts.ranks`."""


@dataclass(frozen=True)
class Point:
    """One form of a layer, and what it does.

    Attributes:
        method: e.g. "integers", "svd".
        setting: the same for all layers, e.g. "4 bits", "1/4 of the parameters".
        form: what it is here, e.g. "svd 32".
        rate: stored bytes, as a fraction of those of the weight.
        error: relative error of the layer's output (of the weight itself without data).
        damage: of the model's outputs; ``error^2`` without data.
    """

    method: str
    setting: str
    form: str
    rate: float
    error: float
    damage: float


@dataclass(frozen=True)
class LayerProfile:
    """A layer, how much there is in its weight, and its points.

    Attributes:
        name, kind, shape: of the layer and its weight.
        ranks: by several measures; see `compress.passes.solvers.drafts.ranks`.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: Mapping[str, float]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Trend:
    """How damage goes with depth for one setting: Spearman's rank correlation over some layers."""

    method: str
    setting: str
    layers: int
    correlation: float


@dataclass(frozen=True)
class Profile:
    """The sensitivity of a model's layers.

    Attributes:
        layers: in execution order.
        measure: "kl", "error", or "weights" without data.
        samples: held out, on which damage was measured.
        notes: layers that were left out, and why.
    """

    layers: tuple[LayerProfile, ...]
    measure: str
    samples: int
    notes: tuple[Note, ...] = ()

    @property
    def unit(self) -> str:
        """What damage is, in words."""
        return {
            "kl": f"divergence of the outputs in nats, on {self.samples} held-out samples",
            "error": f"relative squared error of the outputs, on {self.samples} held-out samples",
        }.get(self.measure, "relative squared error of the weight (no data was given)")

    def trends(self) -> list[Trend]:
        """Of every setting that at least four layers have."""
        damages: dict[tuple[str, str], list[float]] = {}
        for layer in self.layers:
            for point in layer.points:
                damages.setdefault((point.method, point.setting), []).append(point.damage)
        return [
            Trend(*key, len(row), spearman(range(len(row)), row))
            for key, row in damages.items()
            if len(row) >= _FEW
        ]

    def depth(self) -> str:
        """Whether deeper layers tolerate more, in this model, in a sentence.

        A correlation that chance would exceed in one of twenty models without a trend counts for none.
        """
        every = self.trends()
        if not every:
            return f"too few layers (under {_FEW}) to say whether deeper ones tolerate more"
        trends = [t for t in every if math.isfinite(t.correlation)]
        if not trends:
            return "all layers tolerate the same"
        middle = statistics.median(t.correlation for t in trends)
        count = max(t.layers for t in trends)
        said = "depth does not tell what a layer tolerates"
        if abs(middle) > 1.96 / math.sqrt(count - 1):
            said = f"deeper layers tolerate {'more' if middle < 0 else 'less'}"
        return (
            f"{said}: rank correlation of depth and damage {middle:+.2f} (median of {len(trends)} settings, "
            f"up to {count} layers)"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; infinities and what is not known are None."""
        data = {
            "measure": self.measure,
            "samples": self.samples,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "trends": [dataclasses.asdict(trend) for trend in self.trends()],
            "depth": self.depth(),
            "notes": [dataclasses.asdict(note) for note in self.notes],
        }
        found: dict[str, Any] = _finite(data)
        return found

    def plot(self, path: str | Path) -> Path:
        """Draw it; see `compress.picture.draw`."""
        from compress.picture import draw

        return draw(self, Path(path))


_FEW = 4
"""Layers under which a rank correlation says nothing."""


def profile(
    graph: Graph,
    drafts: Drafts,
    ranks: Ranks,
    data: CalibrationData | None = None,
    *,
    max_memory: int = 2 << 30,
    progress: Progress | None = None,
) -> Profile:
    """Measure it; `compress.profile` fills in the drafts.

    Args:
        graph: not changed.
        drafts, ranks: of a weight.
        data: samples, some of which are held out.
        max_memory: bytes of activations kept in memory, and of low-rank drafts; those of integers and bitmaps
            are in memory besides, about twice the model.
        progress: told about every layer.
    """
    progress = progress or Silent()
    notes: list[Note] = []
    sites = _sites(graph, notes)
    found: dict[str, list[Draft]] = {}
    errors: dict[str, list[float]] = {}
    known: dict[str, dict[str, float]] = {}
    held, batches = None, None
    if data is not None:
        batches, held = held_out(graph, data)
    drafted = 0

    def visit(site: Site, weight: Tensor, seen: Statistics | None) -> None:
        nonlocal drafted
        diag, H = (None, None) if seen is None else (seen.diag, seen.H)
        known[site.weight] = ranks(weight, H[0] if H is not None and len(H) == 1 else None)
        found[site.weight], errors[site.weight] = [], []
        for draft in drafts(weight, diag, H):
            drafted += draft.value.nbytes
            errors[site.weight].append(output_error(weight, draft.value.decode(), seen))
            found[site.weight].append(draft.on_disk() if drafted > max_memory else draft)

    progress.start("drafting each layer in each form", len(sites))
    sweep(
        graph, sites, visit, batches=batches, needs=frozenset({"diag", "H"}), max_memory=max_memory,
        progress=progress,
    )  # fmt: skip
    damages = {name: [error**2 for error in row] for name, row in errors.items()}
    measure = "weights"
    if held is not None:
        damage = Damage(graph, held)
        measure = damage.measure
        progress.start("measuring the damage of each layer", len(sites))
        damages = damage.of_each(graph, {n: [d.value for d in row] for n, row in found.items()}, progress)
    layers = [
        LayerProfile(
            site.name,
            site.kind,
            graph.shape(site.weight),
            known[site.weight],
            tuple(
                Point(d.method, d.setting, d.form, _rate(graph.tensors[site.weight], d), error, value)
                for d, error, value in zip(
                    found[site.weight], errors[site.weight], damages[site.weight], strict=True
                )
            ),
        )
        for site in sites
    ]
    progress.finish()
    return Profile(tuple(layers), measure, 0 if held is None else len(held), tuple(notes))


def _sites(graph: Graph, notes: list[Note]) -> list[Site]:
    """The first layer that reads each weight of plain numbers."""
    sites: dict[str, Site] = {}
    for site in graph.sites():
        reason = ""
        if site.weight in graph.encodings:
            reason = f"already {graph.encodings[site.weight].encoding}"
        elif not graph.tensors[site.weight].is_floating_point():
            reason = f"{graph.tensors[site.weight].dtype} is not a floating-point weight"
        elif site.kind == "embedding":
            reason = "an embedding is looked up, not multiplied"
        else:
            sites.setdefault(site.weight, site)
        if reason:
            notes.append(Note(site.name, reason))
    return list(sites.values())


def _rate(weight: Tensor, draft: Draft) -> float:
    return draft.value.nbytes / (weight.numel() * weight.element_size())


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties take their mean rank. NaN where one of them does not vary."""
    ranks = [_ranked(a), _ranked(b)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:
        return math.nan


def _ranked(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {v: order.index(v) for v in set(order)}
    count = {v: order.count(v) for v in set(order)}
    return [first[v] + (count[v] - 1) / 2 for v in values]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
