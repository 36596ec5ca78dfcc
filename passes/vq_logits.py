"""VQ-logits: an output head of a few codebooks, and for each token the entries it is the sum of.

    coarse = h C^T,    z_v = coarse[m(v)] + b_v

in place of ``z = h W^T`` (arXiv 2505.10202): K dot products for each position instead of one for each
token, and indices in place of rows. How codes and codebooks are found and trained is in
`compress.passes.solvers.logit_codes`. In the graph these are ordinary operators, MatMul and Gather, and the
codebook is a layer like any other: quantize it, or let `recover` train it together with the rest.

It is a strong compression and costs perplexity (``bench/run.py vq_logits`` measures how much). As the paper
has it, with one codebook, no biases and no training, the distribution collapses: tokens of a code cannot be
told apart. Biases (`token_bias`), more `stages` and training each take a large part of the damage away, at
a few bytes for each token. The paper trains the whole model with its codes; here the head alone is trained,
on the model's own distributions, and `recover` can train the rest.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from compress.calibration import Statistics, output_error
from compress.graph import Graph, Site, argument
from compress.head import HeadBuilder, head_inputs, heads, narrow
from compress.passes.solvers.logit_codes import Head, LogitCodes, Training, code_logits, code_rows
from compress.pipeline import Change, Context, Note, Pass, PassResult

_aten = torch.ops.aten

_ELEMENTS = 1 << 26
"""Of the rows kept to train on; 256 MB."""
_ROWS = 1 << 16
NO_EFFECT = "singletons, token_bias, epochs and learning_rate have no effect"
"""Without calibration data."""


class VqLogits(Pass):
    """Replace output heads by codebooks and a map of tokens."""

    name: ClassVar[str] = "vq_logits"

    targets: tuple[str, ...] = Field(("linear",), description="of which the output heads are replaced")
    codes: int = Field(256, ge=2, le=32767, description="entries of each codebook")
    stages: int = Field(4, ge=1, le=32, description="codebooks; a token is the sum of one entry of each")
    singletons: int = Field(
        0,
        ge=0,
        le=16384,
        description="the most probable tokens keep an entry of the first codebook for themselves",
    )
    token_bias: bool = Field(
        True, description="a bias for each token, so that tokens of the same codes can be told apart"
    )
    epochs: float = Field(
        2.0,
        ge=0,
        description="passes over the calibration rows that train the codebooks; 0: closed forms alone",
    )
    learning_rate: float = Field(
        0.05, gt=0, description="of that training, relative to the size of the codebooks; falls to zero"
    )

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = graph.copy()
        changes: list[Change] = []
        notes: list[Note] = []
        chosen = heads(graph, self.select(graph))
        if not chosen:
            notes.append(Note("", "no output of the model is one linear layer's; nothing to do"))
        for site in chosen:
            reason = declined(graph, site) or self._too_large(graph, site)
            if reason:
                notes.append(Note(site.name, f"{reason}; left as it is"))
                continue
            context.progress.step(site.name)
            head = dense_head(graph, site, context)
            found = self._codes(graph, site, head, context.seed)
            builder = HeadBuilder(result, site)
            builder.finish(self._logits(builder, found))
            changes.append(self._change(graph, site, found, head))
            notes += [Note(site.name, text) for text in self._told(graph, site, found, head)]
        return PassResult(result, tuple(changes), tuple(notes))

    def _logits(self, builder: HeadBuilder, found: LogitCodes) -> fx.Node:
        """What stands in place of the head's output."""
        return coded_logits(builder, found)

    def _codes(self, graph: Graph, site: Site, head: Head | None, seed: int) -> LogitCodes:
        if head is None:
            return code_rows(*_parameters(graph, site), self.codes, self.stages, seed=seed)
        return code_logits(
            head,
            self.codes,
            self.stages,
            singletons=self.singletons,
            token_bias=self.token_bias,
            training=Training(self.epochs, learning_rate=self.learning_rate) if self.epochs else None,
            seed=seed,
        )

    def _too_large(self, graph: Graph, site: Site) -> str:
        tokens, columns = graph.shape(site.weight)
        entries = self.stages * min(self.codes, tokens) + min(self.singletons, tokens)
        if entries * columns + tokens >= tokens * columns:
            return f"{entries} entries take as many numbers as its {tokens} rows"
        return ""

    def _change(self, graph: Graph, site: Site, found: LogitCodes, head: Head | None) -> Change:
        old = graph.weight(site.weight)
        before = _nbytes(old)
        after = codes_nbytes(found, old.element_size()) + self._added(graph, site)
        return Change(
            site=site.name,
            weight=site.weight,
            action=self._action(),
            bits=8 * after / old.numel(),
            sparsity=0.0,
            bytes_before=before,
            bytes_after=after,
            error=output_error(old, found.codes.decode(), None if head is None else _covariance(head.inputs)),
        )

    def _action(self) -> str:
        return f"{self.stages} x {self.codes} codes"

    def _added(self, graph: Graph, site: Site) -> int:
        """Bytes of the head that stay."""
        return 0 if site.weight in graph.unshared() else _nbytes(graph.tensors[site.weight])

    def _told(self, graph: Graph, site: Site, found: LogitCodes, head: Head | None) -> list[str]:
        if head is None:
            told = [f"no calibration data: plain k-means, whose outputs are poor; {NO_EFFECT}"]
        else:
            first, last = found.divergences
            where = "divergence from the dense head on held-out rows"
            told = [f"{where}: {first:.4g} nats at the start, {last:.4g} in the end"]
        if site.weight not in graph.unshared():
            told.append("the weight stays for its other readers: time is saved, no bytes")
        return told


def _covariance(inputs: Tensor) -> Statistics:
    centred = inputs - inputs.mean(0)
    H = centred.mT @ centred / len(centred)
    return Statistics(len(centred), H.diagonal().unsqueeze(0), H=H.unsqueeze(0))


def declined(graph: Graph, site: Site) -> str:
    """Why this head cannot be replaced; empty if it can."""
    if site.weight in graph.encodings:
        return f"already {graph.encodings[site.weight].encoding}"
    dtype = graph.tensors[site.weight].dtype
    if not dtype.is_floating_point:
        return f"{dtype} is not a floating-point weight"
    layer = graph.node(site.node)
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "the weight is read through another operator"
    if graph.bias(site) is None and argument(layer, "bias", None) is not None:
        return "its bias is computed"
    return ""


def dense_head(graph: Graph, site: Site, context: Context) -> Head | None:
    """The head of the original network with its inputs there and here; None without data."""
    if context.calibration is None:
        return None
    reference = context.reference
    twin = next((s for s in reference.sites() if s.node == site.node), None)
    same = twin is not None and reference.shape(twin.weight) == graph.shape(site.weight)
    if twin is None or not same or declined(reference, twin):
        reference, twin = graph, site  # it is aimed at what is there
    data, samples = context.calibration.inputs(), context.calibration.num_samples
    limit = min(_ROWS, _ELEMENTS // graph.shape(site.weight)[1])
    inputs = head_inputs(graph, site, data, samples, limit)
    wanted = inputs if reference is graph else head_inputs(reference, twin, data, samples, limit)
    return Head(*_parameters(reference, twin), wanted, inputs)


def _parameters(graph: Graph, site: Site) -> tuple[Tensor, Tensor | None]:
    bias = graph.bias(site)
    return graph.weight(site.weight).float(), None if bias is None else graph.tensors[bias].float()


def codes_nbytes(found: LogitCodes, element_size: int) -> int:
    """Bytes of codebooks, biases and maps as they are stored."""
    floats = sum(book.numel() for book in found.codes.codebooks)
    floats += 0 if found.bias is None else found.bias.numel()
    maps = [narrow(row) for row in found.codes.maps]
    return floats * element_size + sum(map(_nbytes, maps))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def coded_logits(builder: HeadBuilder, found: LogitCodes) -> fx.Node:
    """The operators that compute logits ``[..., V]`` from codes; one product for all codebooks."""
    dtype = builder.graph.weight(builder.site.weight).dtype
    books = found.codes.codebooks
    codebook = builder.tensor("codebook.weight", torch.cat(books).to(dtype))
    coarse = builder.call(_aten.linear.default, builder.hidden, codebook, layer="codebook")
    total: fx.Node | None = None
    start = 0
    for stage, (book, codes) in enumerate(zip(books, found.codes.maps, strict=True)):
        end = start + len(book)
        part = builder.call(_aten.slice.Tensor, coarse, -1, start, end) if len(books) > 1 else coarse
        indices = builder.indices(f"map{stage}", codes)
        picked = builder.call(_aten.index_select.default, part, -1, indices)
        total = picked if total is None else builder.call(_aten.add.Tensor, total, picked)
        start = end
    assert total is not None
    if found.bias is None:
        return total
    return builder.call(_aten.add.Tensor, total, builder.tensor("token_bias", found.bias.to(dtype)))
