"""What a weight may become: the formats it can take, with exact bytes, and what is known about each.

A format is an integer encoding or float. Which of them fit is decided here; which one is taken, and why, is
the business of a pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor, fx

from compress.encoding import EncodedWeight, IntEncoding
from compress.errors import PassError
from compress.graph import Graph, Site
from compress.pipeline import matches
from compress.sensitivity import output_layers

Format = IntEncoding | None
"""None is float: the weight stays as it is."""

_WORTH_IT = 512
"""Bytes a format must save: below, the operators that decode it take more room in the file."""
_PADDING = 1.125
"""A format is no choice where filling up the last group makes rows longer than this: files store it full."""


def parse_format(text: str) -> Format:
    """A format from its name, the inverse of ``str(IntEncoding)``: "int4 g32 asym", "int8 per row", "float".

    Raises:
        ValueError: it is none.
    """
    if text == "float":
        return None
    found = re.fullmatch(r"int(\d+) (?:per row|g(\d+))( asym)?", text)
    if not found:
        raise ValueError(
            f'format {text!r} is neither "float" nor like "int4 g32", "int4 g32 asym", "int8 per row"'
        )
    try:
        return IntEncoding(int(found[1]), int(found[2] or -1), not found[3])
    except PassError as error:
        raise ValueError(f"format {text!r}: {error.problem}; {error.expected}") from error


_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a number or a text such as "12MB" (10^6) or "1.5 GiB" (2^30).

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", str(size).strip())
    try:
        assert found is not None
        value = int(float(found[1]) * _UNITS[found[2].upper()])
    except (AssertionError, ValueError, KeyError):
        value = 0
    if value <= 0:
        raise ValueError(f'{size!r} is no size; give bytes or a text such as "12MB"')
    return value


def parse_latency(latency: float | str, plain: float) -> float:
    """Milliseconds of a number, or of a ratio to the float model's such as "0.7x".

    Args:
        plain: milliseconds of the float model.

    Raises:
        ValueError: it is neither, or not positive.
    """
    text = str(latency)
    try:
        value = float(text.removesuffix("x")) * (plain if text.endswith("x") else 1.0)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f'{latency!r} is no latency; give milliseconds, or a ratio such as "0.7x"')
    return value


def _a_size(size: int | str) -> int | str:
    parse_size(size)
    return size


def _a_latency(latency: float | str) -> float | str:
    parse_latency(latency, 1.0)
    return latency


Size = Annotated[int | str, AfterValidator(_a_size)]
"""An option of a pass that `parse_size` takes."""
Latency = Annotated[float | str, AfterValidator(_a_latency)]
"""An option of a pass that `parse_latency` takes."""


@dataclass
class Menu:
    """A weight and what is known about each of its formats, the same index in every list.

    Attributes:
        sites: all readers of the weight, in execution order.
        costs: stored bytes.
        encoded: the weight in this format alone; None for float.
        errors: relative error of the layer's output.
        damages: of the model's outputs.
        latencies: milliseconds; empty where they were not measured.
    """

    sites: list[Site]
    value: Tensor
    formats: list[Format] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    encoded: list[EncodedWeight | None] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    damages: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.sites[0].weight

    @property
    def weights(self) -> int:
        return self.value.numel()

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()

    def takes(self, format: IntEncoding) -> bool:
        """Whether the format fits this weight and is worth it."""
        columns = self.value[0].numel()
        width = format.width(columns)
        if any(site.kind == "embedding" for site in self.sites) and columns % width:
            return False
        padded = format.groups(columns) * width
        return padded <= _PADDING * columns and self._size(format) + _WORTH_IT <= self.nbytes

    def add(self, format: Format) -> None:
        if format not in self.formats:
            self.formats.append(format)
            self.costs.append(self.nbytes if format is None else self._size(format))

    def _size(self, format: IntEncoding) -> int:
        return format.nbytes(self.value.shape[0], self.value[0].numel())

    def keep(self, formats: Sequence[Format]) -> None:
        """Drop all other formats."""
        self.costs = [c for c, f in zip(self.costs, self.formats, strict=True) if f in formats]
        self.formats = [f for f in self.formats if f in formats]

    def nearest(self, format: IntEncoding) -> int:
        """The option of this format, else of the least precise one that is more precise, else the best."""
        wanted = self._precision(format)
        order = self.by_precision()
        return next((o for o in order if self._precision(self.formats[o]) >= wanted), order[-1])

    def _precision(self, format: Format) -> tuple[float, ...]:
        """To compare formats by: more bits are more precise, then smaller groups, then zero points."""
        if format is None:
            return (math.inf,)
        return (format.bits, -format.width(self.value[0].numel()), not format.symmetric)

    def replacement(self, option: int) -> Tensor | EncodedWeight:
        encoded = self.encoded[option]
        return self.value if encoded is None else encoded

    def by_precision(self) -> list[int]:
        """Options from the least precise to the most."""
        return sorted(range(len(self.formats)), key=lambda option: self._precision(self.formats[option]))


def fused(graph: Graph, layers: Sequence[Menu]) -> list[list[int]]:
    """Groups of linear layers that read the same input, by index: q, k and v; gate and up.

    Runtimes fuse them, so they should take one format. Their menus are cut down to what all of them can take.
    Output layers are left out: the parts of a split head are there to take different ones.
    """
    readers: dict[str, list[int]] = {}
    outputs = output_layers(graph)
    for i, layer in enumerate(layers):
        site = layer.sites[0]
        free = len(layer.sites) == 1 and site.kind == "linear" and site.node not in outputs
        if free and layer.formats != [None]:
            source = graph.node(site.node).args[0]
            assert isinstance(source, fx.Node)
            readers.setdefault(source.name, []).append(i)
    tied = []
    for group in readers.values():
        common = [f for f in layers[group[0]].formats if all(f in layers[i].formats for i in group)]
        if len(group) > 1 and common:
            tied.append(group)
            for i in group:
                layers[i].keep(common)
    return tied


def is_sensitive(graph: Graph, site: Site, patterns: Sequence[str]) -> bool:
    """Whether a site is named by one of the patterns, or by "first" or "head".

    "first" is any site that reads an input of the model, "head" any that gives an output of it.
    """
    source = graph.node(site.node).args[1 if site.kind == "embedding" else 0]
    words = {
        "first": isinstance(source, fx.Node) and source.op == "placeholder",
        "head": site.node in output_layers(graph),
    }
    return any(words[p] if p in words else matches(site, p) for p in patterns)
