"""Gradients of single samples at the sites of a graph, as factors: what a layer reads times what it is worth.

The sweep of `compress.calibration` only goes forwards; this is the other collector. One batched pass
forwards and backwards gives, for all samples of a batch and all sites at once, the input x and the gradient
delta of the loss with respect to the output; a sample's gradient of the weight is ``sum_t delta_t x_t^T``.
Nothing of the size samples x parameters is made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from compress.errors import PassError
from compress.graph import Graph, Site, has_effect
from compress.sensitivity import logits
from compress.statistics import Geometry, columns_of


@dataclass(frozen=True)
class SiteGradient:
    """Factors of the gradients at one site, by convolution group (one group elsewhere).

    Attributes:
        x: float32 ``[groups, B, T, N]``, inputs of B samples: tokens, or patches of a convolution.
        delta: float32 ``[groups, B, T, O / groups]``, gradients of each sample's loss.
    """

    x: Tensor
    delta: Tensor


def target_output(graph: Graph) -> int:
    """Index of the output that the loss is taken of: the first one that is logits.

    Raises:
        PassError: no output comes straight from a linear layer.
    """
    found = logits(graph)
    if not found:
        raise PassError(
            "no output of the model is a linear layer's, so there are no logits to take a loss of",
            expected="a classifier or a language model",
            fix="prune by magnitude instead (prune_magnitude)",
        )
    return found[0]


def fits(labels: Tensor, samples: int, scores: Tensor) -> bool:
    """Whether these are classes, one for each row of logits of all samples.

    Args:
        samples: how many there are.
        scores: logits ``[..., classes]`` of some of them.
    """
    if labels.dtype != torch.int64 or labels.shape != (samples, *scores.shape[1:-1]):
        return False
    return bool(((labels >= 0) & (labels < scores.shape[-1])).all())


def site_gradients(
    graph: Graph,
    sites: Sequence[Site],
    inputs: Sequence[Tensor],
    labels: Tensor | None,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Iterator[tuple[Site, SiteGradient]]:
    """Factors of the gradients of the cross-entropy, summed over a sample's rows of logits, site by site.

    Patches of a convolution are many times its input, so they are made when their site's turn comes.

    Args:
        graph: in eval form, as captured: batch normalisation uses its running statistics.
        sites: linear layers and convolutions.
        inputs: flat inputs; the first axis of each counts the samples.
        labels: int64, one for each row of logits. Anything else: they are sampled from the model's own
            probabilities, which makes second moments of the gradients the Fisher information proper (Kunstner
            et al. 2019, "Limitations of the empirical Fisher approximation", section 2). The most probable
            class instead would make gradients vanish where the model is sure.
        generator: for sampling them.
        temperature: logits are divided by it where classes are sampled. Where the model is sure of nearly
            every sample, a few doubtful ones are all that its Fisher information consists of; at a higher
            temperature every sample tells what moves its logits (as in Hinton et al. 2015, "Distilling the
            knowledge in a neural network", section 2.1, where it goes to infinity). The loss is multiplied by
            it, so that gradients keep their size.

    Raises:
        PassError: the model has no logits, or a layer mixes samples.
    """
    sources = {site.node: graph.node(site.node).all_input_nodes[0].name for site in sites}
    read_by_sites = set(sources.values())
    seen: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    slack: dict[str, Tensor] = {}
    copies = any(has_effect(node) for node in graph.ops.nodes)

    def settle(node: fx.Node, value: Any) -> Any:
        if node.name in sources:
            x = seen[sources[node.name]]
            read[node.name] = x.clone() if copies else x
            # the gradient with respect to these zeros is that of the output, which may be overwritten later
            slack[node.name] = torch.zeros_like(value, requires_grad=True)
            value = value + slack[node.name]
        if node.name in read_by_sites:
            seen[node.name] = value.detach()
        return value

    with torch.enable_grad():
        scores = graph.run(inputs, settle, grad=True)[target_output(graph)].float()
        seen.clear()
        rows = scores.reshape(-1, scores.shape[-1])
        if labels is not None and fits(labels, len(scores), scores):
            classes, scale = labels.flatten(), 1.0
        else:
            rows, scale = rows / temperature, temperature
            odds = rows.detach().softmax(-1)
            classes = torch.multinomial(odds, 1, generator=generator).squeeze(1)
        loss = scale * torch.nn.functional.cross_entropy(rows, classes, reduction="sum")
        used = list(slack)
        found = torch.autograd.grad(loss, [slack[name] for name in used], allow_unused=True)
    samples = len(inputs[0])
    gradients = dict(zip(used, found, strict=True))
    for site in sites:
        zeros, gradient = slack.pop(site.node), gradients.pop(site.node)
        # an output that no loss depends on
        delta = zeros.detach() if gradient is None else gradient
        yield site, _factors(graph, site, read.pop(site.node), delta.float(), samples)


def _factors(graph: Graph, site: Site, x: Tensor, delta: Tensor, samples: int) -> SiteGradient:
    if site.kind == "linear":
        if len(x) != samples and (len(x) % samples or x.ndim != 2):
            raise PassError(
                f"{site.name} reads {list(x.shape)} for {samples} samples",
                expected="an input whose first axis begins with the samples",
                fix=f"leave it out (ignore: [{site.name}])",
            )
        # tokens of a sample follow each other, also where the axes of samples and tokens are one
        return SiteGradient(
            x.float().reshape(1, samples, -1, x.shape[-1]), delta.reshape(1, samples, -1, delta.shape[-1])
        )
    geometry = Geometry.of(graph.node(site.node), tuple(graph.shape(site.weight)[2:]))
    columns = columns_of(x, geometry).unflatten(2, (samples, -1))  # [groups, N, B, T]
    delta = delta.reshape(samples, len(columns), -1, columns.shape[3]).permute(1, 0, 3, 2)
    return SiteGradient(columns.permute(0, 2, 3, 1), delta)
