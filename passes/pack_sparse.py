"""Store sparse weights without their zeros: a bit for each entry, and the entries that are left.

What pruning leaves is dense in the file otherwise: zeros take as much room as other numbers. The values are
not changed (`compress.bitmap`). A runtime that reads the file expands the weights when it loads it, so
nothing becomes faster; the file becomes smaller by nearly the sparsity. Weights that are quantized hold
their zeros in a few bits already and are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from compress.bitmap import BitmapEncoding, encode_bitmap
from compress.graph import Graph
from compress.passes.quantize_weights import WORTH_IT, change
from compress.pipeline import Change, Context, Note, Pass, PassResult


class PackSparse(Pass):
    """Leave the zeros of pruned weights out of the file."""

    name: ClassVar[str] = "pack_sparse"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"), description="kinds, paths, globs or re: patterns"
    )

    def leaves(self) -> Sequence[object]:
        return (BitmapEncoding(),)

    def run(self, graph: Graph, context: Context) -> PassResult:
        changes: list[Change] = []
        notes: list[Note] = []
        result = graph.copy()
        done: set[str] = set()
        for site in self.select(graph):
            if site.weight in done:
                continue
            done.add(site.weight)
            if site.weight in graph.encodings:
                notes.append(Note(site.name, f"already {graph.encodings[site.weight].encoding}"))
                continue
            weight = graph.weight(site.weight)
            if not weight.is_floating_point() or weight.dtype == torch.float64:
                notes.append(Note(site.name, f"{weight.dtype} is no floating point of up to 32 bits"))
                continue
            kept, size = int((weight != 0).sum()), weight.element_size()
            before = weight.numel() * size
            after = BitmapEncoding().nbytes(len(weight), weight[0].numel(), kept, size)
            if before - after < WORTH_IT:
                share = 1 - kept / max(weight.numel(), 1)
                notes.append(
                    Note(site.name, f"{share:.1%} zeros save {max(before - after, 0)} bytes; left as it is")
                )
                continue
            encoded = encode_bitmap(weight)
            result.set_encoding(site.weight, encoded)
            changes.append(change(site, weight, encoded, None))
        return PassResult(result, tuple(changes), tuple(notes))
