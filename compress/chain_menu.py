"""What a layer may be decomposed into, and what is known of each form; `compress.menu` is that of formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compress.chain import Chain
from compress.graph import Graph, Site
from compress.layers import operations, put


@dataclass
class ChainOption:
    """One form of a layer.

    Attributes:
        form: what the pass that made it calls it; None is dense.
        parameters: stored numbers, those of a bias that comes with the form too.
        nbytes: that they take.
        operations: multiplications for one sample.
        chain: the layer in this form; None is dense, or not made.
        error: relative error of the layer's output.
        bound: an upper bound of it, by singular values.
        damage: of the model's outputs.
        latency: milliseconds, where they were measured.
        stored: the form is for storage: it is contracted to the dense weight where it is used.
    """

    form: Any
    parameters: int
    nbytes: int
    operations: int
    chain: Chain | None = None
    error: float = 0.0
    bound: float = 0.0
    damage: float = 0.0
    latency: float = 0.0
    stored: bool = False


@dataclass
class ChainMenu:
    """A layer and its options, dense first.

    Attributes:
        bias: entries of the bias that any form but dense adds.
        alone: the layer as a graph of its own (`compress.layers.alone`).
        x: like its input for one sample; on the meta device.
        declined: why there is no other option than dense, where there is none.
    """

    site: Site
    weight: Tensor
    bias: int = 0
    options: list[ChainOption] = field(default_factory=list)
    alone: Graph | None = None
    x: Tensor | None = None
    declined: str = ""

    def dense(self) -> ChainOption:
        """The layer as it is."""
        assert self.alone is not None and self.x is not None
        count = self.weight.numel()
        return ChainOption(None, count, count * self.weight.element_size(), operations(self.alone, [self.x]))

    def option(self, form: Any, chain: Chain) -> ChainOption:
        """An option whose costs are known from the chain's shapes; its factors may be on the meta device."""
        assert self.alone is not None and self.x is not None
        graph, count = self.alone.copy(), chain.parameters + self.bias
        put(graph, graph.sites()[0], chain.to(self.weight.dtype))
        return ChainOption(form, count, count * self.weight.element_size(), operations(graph, [self.x]))

    def thin(self, count: int, by_size: bool, by_speed: bool) -> None:
        """Drop options that another one is better than, and keep at most `count` besides dense.

        Args:
            by_size: fewer parameters are better.
            by_speed: fewer operations are better.
        """

        def costs(o: ChainOption) -> tuple[float, ...]:
            return (*([o.parameters] * by_size), *([o.operations] * by_speed), o.error)

        def beaten(mine: tuple[float, ...]) -> bool:
            others = (costs(o) for o in self.options)
            return any(c != mine and all(a <= b for a, b in zip(c, mine, strict=True)) for c in others)

        dense, *rest = self.options
        rest = sorted((o for o in rest if not beaten(costs(o))), key=costs)
        if len(rest) > count:
            rest = [rest[round(i * (len(rest) - 1) / (count - 1))] for i in range(count)]
        self.options = [dense, *rest]
