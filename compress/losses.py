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


def widened(loss: Loss) -> Loss:
    """A loss of outputs in float32 where they are in bfloat16."""

    def wide(outputs: Sequence[Any]) -> list[Any]:
        return [y.float() if isinstance(y, Tensor) and y.dtype == torch.bfloat16 else y for y in outputs]

    return lambda outputs, wanted, labels: loss(wide(outputs), wide(wanted), labels)


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


def variances(reference: Graph, own: int, batches: Sequence[Sequence[Tensor]]) -> Tensor:
    """Variances of the hidden values that a graph returns after its own outputs, means of batches.

    Args:
        reference: of `returning`.
        own: how many outputs come first.
        batches: inputs; not written into.

    Returns:
        float32 ``[points]``.
    """
    found = [
        torch.stack([y.float().var(correction=0) for y in reference.run([t.clone() for t in inputs])[own:]])
        for inputs in batches
    ]
    return torch.stack(found).mean(0)


def with_hidden(loss: Loss, spread: Tensor, weight: float) -> Loss:
    """The loss plus hidden values, ``weight * mean_i E|h_i - h'_i|^2 / Var(h'_i)`` with h' the reference's.

    FitNets (Romero et al. 2015, section 2.2) without its regressor, for layers have the sizes they had, and
    at every block as in BRECQ (Li et al. 2021), but in one training of all.

    Args:
        loss: of the outputs; hidden values come after them (`returning`).
        spread: `variances` of the hidden values, float32 ``[points]``.
        weight: of the hidden values.
    """
    count = len(spread)
    # values that are all the same, such as those of dead activations, have no scale to measure errors by
    least = (_CONSTANT * spread.max()).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(spread > least, weight / (count * spread.clamp(min=least)), 0.0)

    def both(found: Sequence[Any], wanted: Sequence[Any], labels: Tensor | None) -> Tensor:
        pairs = zip(found[-count:], wanted[-count:], strict=True)
        errors = torch.stack([_mean_square(ours, theirs) for ours, theirs in pairs])
        return loss(found[:-count], wanted[:-count], labels) + scales @ errors

    return both


def _mean_square(x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = _MeanSquare.apply(x, y)  # type: ignore[no-untyped-call]  # torch leaves it so
    return found


class _MeanSquare(torch.autograd.Function):
    """``E|x - y|^2`` in float32, and its gradient for x, ``2 (x - y) / n``.

    Hidden values are many, and left to autograd this takes longer than the convolutions: gradients of a norm
    are divided by it, those of a sum of squares come row by row and mix layouts in memory, and halves are
    widened. Here they stay halves, for differences of those near each other are exact.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16:
            x, y = x.float(), y.float()
        difference = x - y
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference).float().square() / difference.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (gradients[0] * 2 / difference.numel()), None
