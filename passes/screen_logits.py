"""A two-stage output head: logits from codes choose a few candidates, whose rows then give exact logits.

    coarse = VQ-logits of all tokens;  S = the N first of them;  z_v = w_v . h for v in S, else coarse_v

Reading the V rows of the head is most of what a small language model does at batch 1; here N rows are read
(Shim et al. 2017, SVD-softmax; Chen et al. 2019, Learning to Screen). Greedy decoding gives the same tokens
wherever the most probable one is among the candidates. How often it is, is measured on held-out rows and
reported, as recall at N. The other tokens keep their coarse logits: their probabilities are approximate,
never zero.

The dense rows stay, so this saves time and reads, no bytes; they may be quantized like an embedding, and a
head tied to one needs no second table. For each position N rows are gathered: meant for the last position
(see `cleanup`), in a prefill of many it takes N * columns numbers for each.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from pydantic import Field
from torch import fx

from compress.graph import Graph, Site, argument
from compress.head import HeadBuilder
from compress.passes.solvers.logit_codes import Head, LogitCodes, recall
from compress.passes.vq_logits import NO_EFFECT, VqLogits, coded_logits

_aten = torch.ops.aten


class ScreenLogits(VqLogits):
    """Screen the tokens of an output head by VQ-logits, and compute the candidates exactly."""

    name: ClassVar[str] = "screen_logits"

    candidates: int = Field(256, ge=1, description="tokens whose logits are exact at each position")

    def _too_large(self, graph: Graph, site: Site) -> str:
        tokens = graph.shape(site.weight)[0]
        if self.candidates >= tokens:
            return f"all of its {tokens} tokens would be candidates"
        return super()._too_large(graph, site)

    def _logits(self, builder: HeadBuilder, found: LogitCodes) -> fx.Node:
        return screened_logits(builder, found, self.candidates)

    def _action(self) -> str:
        return f"{self.candidates} candidates by {super()._action()}"

    def _added(self, graph: Graph, site: Site) -> int:
        old = graph.tensors[site.weight]
        return old.numel() * old.element_size()

    def _told(self, graph: Graph, site: Site, found: LogitCodes, head: Head | None) -> list[str]:
        told = ["the dense rows stay for the candidates: time is saved, no bytes"]
        if head is None:
            words = "no calibration data: codes of plain k-means, and their recall is not known"
            return [*told, f"{words}; {NO_EFFECT}"]
        share, rows = recall(head, found, self.candidates)
        return [*told, f"recall at {self.candidates}: {share:.5f} of {rows} held-out rows"]


def screened_logits(builder: HeadBuilder, found: LogitCodes, candidates: int) -> fx.Node:
    """The operators of a two-stage head; its weight is read as an embedding, at the candidates."""
    coarse = coded_logits(builder, found)
    first = builder.call(_aten.topk.default, coarse, candidates, -1, True, False)
    chosen = builder.call(operator.getitem, first, 1)
    if "rank" in builder.layer.meta:
        chosen.meta["rank"] = builder.layer.meta["rank"]  # known, so that rows can stay packed
    weight = builder.layer.args[1]
    rows = builder.call(_aten.embedding.default, weight, chosen, layer="candidates")  # [.., N, columns]
    column = builder.call(_aten.unsqueeze.default, builder.hidden, -1)
    exact = builder.call(_aten.squeeze.dim, builder.call(_aten.matmul.default, rows, column), -1)
    bias = argument(builder.layer, "bias", None)
    if bias is not None:
        exact = builder.call(_aten.add.Tensor, exact, builder.call(_aten.index.Tensor, bias, [chosen]))
    return builder.call(_aten.scatter.src, coarse, -1, chosen, exact)
