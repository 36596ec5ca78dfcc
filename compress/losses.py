"""What training minimises: how far outputs, or hidden values, are from another graph's, or from labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CalibrationError, PassError
from compress.gradients import fits, target_output
from compress.graph import Graph, has_effect
from compress.sensitivity import logits

Loss = Callable[[Sequence[Any], Sequence[Any], Tensor | None], Tensor]
"""(flat outputs, flat outputs of the reference, labels or None) -> what to minimise, a scalar."""


def kl_loss(graph: Graph, temperature: float) -> Loss:
    """Distillation (Hinton et al. 2015, section 2): ``T^2 KL(softmax(z'/T) || softmax(z/T))``, mean of rows.

    Raises:
        PassError: the model has no logits.
    """
    target_output(graph)
    found = logits(graph)

    def loss(outputs: Sequence[Any], wanted: Sequence[Any], labels: Tensor | None) -> Tensor:
        parts = []
        for i in found:
            ours, theirs = (y[i].float().flatten(0, -2) / temperature for y in (outputs, wanted))
            kl = nn.functional.kl_div(
                ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
            )
            parts.append(kl * temperature**2)
        return torch.stack(parts).mean()

    return loss


def label_loss(graph: Graph) -> Loss:
    """Cross-entropy of the logits with the labels of the data, a row's mean.

    Raises:
        PassError: the model has no logits.
        CalibrationError: (by the loss) the data has no class for each row of logits.
    """
    output = target_output(graph)

    def loss(outputs: Sequence[Any], wanted: Sequence[Any], labels: Tensor | None) -> Tensor:
        scores = outputs[output].float()
        if labels is None or not fits(labels, len(scores), scores):
            shape = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
            raise CalibrationError(
                f"loss: labels, and the labels of the calibration data are {shape}",
                expected=f"int64 {list(scores.shape[:-1])}, classes below {scores.shape[-1]}",
                fix="loss: kl learns from the original model and needs no labels",
            )
        return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())

    return loss


def mse_loss(outputs: Sequence[Any], wanted: Sequence[Any], labels: Tensor | None) -> Tensor:
    """Mean squared error of the floating-point outputs, averaged over outputs."""
    pairs = [(a, b) for a, b in zip(outputs, wanted, strict=True) if isinstance(b, Tensor)]
    return torch.stack(
        [nn.functional.mse_loss(a.float(), b.float()) for a, b in pairs if b.is_floating_point()]
    ).mean()


# -- hidden values -----------------------------------------------------------------------------------

_HIDDEN = {
    *("relu", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish"),
    *("layer_norm", "rms_norm"),
}
"""Operators whose values are looked at: of convolutional networks the activation functions, which follow each
layer or block; of transformers also the normalised inputs of the layers."""


def hidden_points(graph: Graph, reference: Graph) -> tuple[str, ...]:
    """Nodes whose values both graphs have: outputs of activation functions and layer normalisation.

    Raises:
        PassError: there are none.
    """
    names = _points(graph)
    found = tuple(name for name in _points(reference) if name in names)
    if not found:
        raise PassError(
            "hidden: the graph and the original share no activation function or layer normalisation",
            expected="some that are in both",
            fix="hidden: 0",
        )
    return found


def _points(graph: Graph) -> dict[str, None]:
    return {
        node.name: None
        for node in graph.ops.nodes
        if node.op == "call_function"
        and getattr(node.target, "__name__", "").split(".")[0].rstrip("_") in _HIDDEN
        # what is written into later is another value by then
        and not any(has_effect(user) for user in node.users)
    }


def returning(graph: Graph, names: Sequence[str]) -> Graph:
    """A copy of the graph that also returns the values of these nodes, after its own outputs."""
    more = graph.copy()
    by_name = {node.name: node for node in more.ops.nodes}
    output = more.ops.output_node()
    own: Any = output.args[0]
    output.args = ([*own, *(by_name[name] for name in names)],)
    return replace(more, output_names=(*graph.output_names, *names))


_CONSTANT = 1e-8
"""Hidden values whose variance is this fraction of the largest are constant."""


def with_hidden(loss: Loss, outputs: int, weight: float) -> Loss:
    """The loss plus hidden values, ``weight * mean_i E|h_i - h'_i|^2 / Var(h'_i)`` with h' the reference's.

    FitNets (Romero et al. 2015, section 2.2) without its regressor, for layers have the sizes they had, and
    at every block as in BRECQ (Li et al. 2021), but in one training of all.

    Args:
        loss: of the outputs.
        outputs: how many there are; what follows them are hidden values (`returning`).
        weight: of the hidden values.
    """

    def both(found: Sequence[Any], wanted: Sequence[Any], labels: Tensor | None) -> Tensor:
        pairs = [(a.float(), b.float()) for a, b in zip(found[outputs:], wanted[outputs:], strict=True)]
        errors = torch.stack([mean_square(ours - theirs) for ours, theirs in pairs])
        variances = torch.stack([mean_square(theirs - theirs.mean()) for _, theirs in pairs])
        # values that are all the same, such as those of dead activations, have no scale to measure errors by
        least = (_CONSTANT * variances.max()).clamp(min=torch.finfo(torch.float32).tiny)
        errors = torch.where(variances > least, errors / variances.clamp(min=least), 0.0)
        return loss(found[:outputs], wanted[:outputs], labels) + weight * errors.mean()

    def mean_square(values: Tensor) -> Tensor:
        # of its equals the one whose gradients keep the layout in memory: of others they come row by row, and
        # mixing layouts takes as long as the convolutions
        return torch.linalg.vector_norm(values).square() / values.numel()

    return both
