"""Where rounded activations belong, so that a runtime can run whole stretches of a network in integers.

An integer convolution needs its input *and* its output rounded, an integer addition all three of its values.
So every value between two such operators is rounded once, where it is made, after the activation function
that the kernel does on the way (a clip of its range); everything that reads it reads the rounded value.
Operators that only move values (max pooling, slicing, reshaping) keep the grid of what they move, so rounding
again changes nothing and lets the runtime move integers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

_aten = torch.ops.aten

_CLIPS = {
    _aten.relu.default, _aten.relu_.default, _aten.relu6.default, _aten.relu6_.default,
    _aten.hardtanh.default, _aten.hardtanh_.default,
}  # fmt: skip
"""Activation functions that are a clip of the output's range."""

_ADDS = {_aten.add.Tensor, _aten.add_.Tensor}
_MOVES = {
    _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default,
    _aten.slice.Tensor, _aten.flatten.using_ints, _aten.view.default, _aten.reshape.default,
    _aten.permute.default, _aten.transpose.int, _aten.squeeze.dim, _aten.unsqueeze.default,
    _aten.constant_pad_nd.default, _aten.pad.default, _aten.channel_shuffle.default,
}  # fmt: skip
_AVERAGES = {_aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default}


@dataclass(frozen=True)
class Regions:
    """What `find_regions` found.

    Attributes:
        rounded: nodes whose value is to be rounded, in execution order.
        same_as: of those, nodes that share the grid of another one.
    """

    rounded: tuple[fx.Node, ...]
    same_as: dict[fx.Node, fx.Node]


def find_regions(graph: fx.Graph, layers: Collection[fx.Node]) -> Regions:
    """The values to round around layers that are to run in integers.

    Args:
        graph: the operators.
        layers: convolutions, whose first argument is their input.
    """
    wanted: set[fx.Node] = set()
    made: set[fx.Node] = set()  # by integer operators: rounding these costs nothing
    for layer in layers:
        source = layer.args[0]
        assert isinstance(source, fx.Node)
        wanted.update((source, settled(layer)))
        made.add(settled(layer))
    for node in graph.nodes:
        sources = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if node.target in _ADDS and len(sources) == 2 and not node.kwargs:
            # one operand from outside the region is rounded for it; two would be no gain
            if any(s in made for s in sources) and all(s.op != "get_attr" for s in sources):
                wanted.update((*sources, settled(node)))
                made.add(settled(node))
        elif node.target is _aten.cat.default:
            parts = node.args[0]
            assert isinstance(parts, list | tuple)
            if all(part in made for part in parts):
                wanted.add(node)
                made.add(node)
        elif (
            sources and sources[0] in made and (_moves(node) or (node.target in _AVERAGES and node in wanted))
        ):
            made.add(node)
    same: dict[fx.Node, fx.Node] = {}
    for node in reversed(list(graph.nodes)):
        # what is moved into the region is rounded before it is moved, on the same grid
        if node in wanted and _moves(node) and node.args[0] in made:
            wanted.add(node.args[0])
            same[node] = node.args[0]
    order = [n for n in graph.nodes if n in wanted]
    return Regions(tuple(order), {n: same[n] for n in order if n in same})


def settled(node: fx.Node) -> fx.Node:
    """What an integer operator writes: after the clip that follows it, if nothing else reads it before."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _CLIPS else node


def _moves(node: fx.Node) -> bool:
    if node.target not in _MOVES or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is _aten.constant_pad_nd.default:
        return len(node.args) < 3 or bool(node.args[2] == 0)
    if node.target is _aten.pad.default:
        return len(node.args) < 3 and not node.kwargs
    return True
