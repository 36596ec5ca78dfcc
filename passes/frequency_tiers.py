"""Frequency tiers: an output head split by how probable its tokens are; each part can have its own bits.

    z = concatenate(h W_1^T, h W_2^T, ..)[.., place of each token]

A few thousand tokens carry most of the probability, and the error of their rows most of the damage. Split,
the rows of each tier are a layer like any other (``lm_head.tier0``, ``lm_head.tier1``, ..; the most
probable first), and `quantize_weights` gives, say, 8 bits to the first and 4 to the second. By itself the
split changes nothing but the order of summation. Adaptive input and softmax layers (Baevski and Auli 2019;
Grave et al. 2017) are split so when they are trained.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from compress.errors import CalibrationError
from compress.graph import Graph, Site
from compress.head import HeadBuilder, heads
from compress.passes.solvers.logit_codes import Head, held_out, token_masses
from compress.passes.vq_logits import declined, dense_head
from compress.pipeline import Context, Note, Pass, PassResult

_aten = torch.ops.aten


class FrequencyTiers(Pass):
    """Split output heads by the probability of their tokens."""

    name: ClassVar[str] = "frequency_tiers"
    exact: ClassVar[bool] = True

    targets: tuple[str, ...] = Field(("linear",), description="of which the output heads are split")
    tiers: tuple[int, ...] = Field(
        (1024,),
        min_length=1,
        description="tokens of each tier, the most probable first; the rest is the last one",
    )

    @field_validator("tiers")
    @classmethod
    def _positive(cls, tiers: tuple[int, ...]) -> tuple[int, ...]:
        if min(tiers) < 2:
            raise ValueError("a tier has at least two tokens")
        return tiers

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = graph.copy()
        notes: list[Note] = []
        chosen = heads(graph, self.select(graph))
        if not chosen:
            notes.append(Note("", "no output of the model is one linear layer's; nothing to do"))
        unshared = graph.unshared()
        for site in chosen:
            tokens = graph.shape(site.weight)[0]
            reason = declined(graph, site)
            if site.weight not in unshared:
                reason = "the weight has other readers, and would be stored twice"
            elif sum(self.tiers) >= tokens:
                reason = f"its {tokens} tokens do not go beyond the tiers"
            if reason:
                notes.append(Note(site.name, f"{reason}; left as it is"))
                continue
            context.progress.step(site.name)
            head = dense_head(graph, site, context)
            if head is None:
                raise CalibrationError(
                    "frequency_tiers does not know which tokens are probable",
                    expected="samples of what the model reads",
                    fix="give calibration data",
                )
            notes.append(Note(site.name, self._split(result, site, head)))
        return PassResult(result, notes=tuple(notes))

    def _split(self, graph: Graph, site: Site, head: Head) -> str:
        probability, _ = token_masses(head, held_out(len(head.inputs), 1)[0])
        order = probability.argsort(descending=True, stable=True)
        builder = HeadBuilder(graph, site)
        weight = graph.tensors[site.weight]
        name = graph.bias(site)
        bias = None if name is None else graph.tensors[name]
        ends = [0, *itertools.accumulate(self.tiers), len(order)]
        parts, sizes = [], []
        for i, (start, end) in enumerate(itertools.pairwise(ends)):
            chosen = order[start:end]
            rows = builder.tensor(f"tier{i}.weight", weight[chosen])
            own = None if bias is None else builder.tensor(f"tier{i}.bias", bias[chosen])
            parts.append(builder.call(_aten.linear.default, builder.hidden, rows, own, layer=f"tier{i}"))
            sizes.append(f"{len(chosen)} tokens of {float(probability[chosen].sum()):.1%}")
        places = builder.indices("places", order.argsort())
        joined = builder.call(_aten.cat.default, parts, -1)
        builder.finish(builder.call(_aten.index_select.default, joined, -1, places))
        return f"tiers of {', '.join(sizes)} of the probability"
