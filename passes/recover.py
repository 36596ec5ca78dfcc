"""Recovery: fine-tuning a compressed model towards what the original says (Hinton et al. 2015, section 2).

What is zero stays zero and codes stay codes: the floats are trained, which are unpruned weights, biases,
scales and shifts of normalisation layers, and the scales of encoded weights (`compress.training`). By default
the model learns from the original's outputs, so no labels are needed.

Every fifth sample (at most 512) is held out. The values of the least loss on these are kept, which may be
those at the start: a pass that learned nothing changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, field_serializer, model_validator
from pydantic.json_schema import SkipJsonSchema

from compress.augmentation import Augmentation
from compress.calibration import output_error
from compress.errors import CalibrationError
from compress.graph import Graph, Site
from compress.losses import Loss, kl_loss, label_loss, mse_loss
from compress.pipeline import Change, Context, Note, Pass, PassResult
from compress.sensitivity import logits
from compress.training import (
    BatchNorm,
    Fitted,
    Optimizer,
    Plan,
    Precision,
    Trainee,
    bfloat16_pays,
    fit,
    running_statistics,
    trainable,
    trained_part,
)


class Recover(Pass):
    """Train what is left of a compressed model."""

    name: ClassVar[str] = "recover"

    targets: tuple[str, ...] = Field(
        ("linear", "conv", "embedding"),
        description="kinds, paths, globs or re: patterns; normalisation layers are always trained",
    )
    loss: Literal["auto", "kl", "labels", "mse"] | SkipJsonSchema[Callable[..., Any]] = Field(
        "auto",
        description="kl: divergence from the original's class probabilities; labels: cross-entropy with the "
        "labels of the data; mse: squared error of the outputs; auto: kl where there are logits, else mse; "
        "from Python also a function of (outputs, outputs of the original, labels or None)",
    )
    temperature: float = Field(2.0, gt=0, description="of the probabilities of kl: higher ones are softer")
    epochs: float = Field(10.0, gt=0, description="passes over the calibration samples; may be a fraction")
    batch_size: int = Field(64, ge=1, description="samples of a step")
    learning_rate: float = Field(1e-3, gt=0, description="at the start; falls to zero along a cosine")
    optimizer: Optimizer = Field("adam", description="adam, or sgd with Nesterov momentum 0.9")
    augment: tuple[Augmentation, ...] = Field(
        (),
        description="changes of images, by chance: crop: moved by up to an eighth; flip: mirrored; "
        "color: contrast and brightness of each channel; cutmix: a part is another image's",
    )
    hidden: float = Field(
        0.0,
        ge=0,
        description="weight in the loss of hidden values: squared errors of what activation functions and "
        "layer normalisations give, over its variance. Each sample teaches more than by its outputs alone",
    )

    batch_norm: BatchNorm = Field(
        "frozen",
        description="train: where it has not been folded yet, use the statistics of each batch and update "
        "the running ones",
    )
    precision: Precision = Field(
        "float32",
        description="of products and convolutions while training: bfloat16 is faster on processors "
        "that have it. What is trained and kept is float32 in both",
    )

    @model_validator(mode="after")
    def _mixed(self) -> Recover:
        if self.loss == "labels" and "cutmix" in self.augment:
            raise ValueError("augment: cutmix puts parts of two images into one, which has no label")
        return self

    @field_serializer("loss")
    def _named(self, loss: Any) -> str:
        return loss if isinstance(loss, str) else f"{loss.__module__}:{loss.__qualname__}"

    def may_change(self, graph: Graph) -> set[str]:
        parts = {trained_part(graph, name): name for name in graph.encodings}
        statistics = running_statistics(graph) if self.batch_norm == "train" else ()
        names = (*trainable(graph, self.select(graph)), *statistics)
        return {parts.get(name, name) for name in names}

    def run(self, graph: Graph, context: Context) -> PassResult:
        fitted = self._fit(graph, context)
        return PassResult(fitted.graph, tuple(self._changes(graph, fitted.graph)), self._told(fitted))

    def _told(self, fitted: Fitted) -> tuple[Note, ...]:
        total, kept = fitted.steps
        losses = f"held-out loss {fitted.before:.4g} before, {fitted.after:.4g} after"
        told = Note("all", f"{losses}; weights of step {kept} of {total} kept")
        if self.precision == "float32" or bfloat16_pays():
            return (told,)
        return told, Note("all", "this processor has no bfloat16 instructions: precision: float32 is faster")

    def _fit(
        self, graph: Graph, context: Context, prune: Callable[[Trainee, int, int], bool] | None = None
    ) -> Fitted:
        if context.calibration is None:
            raise CalibrationError(
                f"{self.name} has no data to train on",
                expected="samples, the more the better; labels are needed for loss: labels only",
                fix="give calibration data",
            )
        plan = Plan(
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.optimizer,
            self.augment,
            self.batch_norm,
            context.seed,
            self.hidden,
            self.precision,
        )
        names = trainable(graph, self.select(graph))
        return fit(
            graph,
            names,
            context.reference,
            context.calibration,
            self._loss(context.reference),
            plan,
            prune=prune,
            progress=context.progress,
        )

    def _loss(self, reference: Graph) -> Loss:
        if callable(self.loss):
            return self.loss
        kind = self.loss
        if kind == "auto":
            kind = "kl" if logits(reference) else "mse"
        if kind == "kl":
            return kl_loss(reference, self.temperature)
        return label_loss(reference) if kind == "labels" else mse_loss

    def _changes(self, before: Graph, after: Graph) -> list[Change]:
        sites: dict[str, Site] = {}
        for site in self.select(before):
            sites.setdefault(site.weight, site)
        changes = []
        for weight, site in sites.items():
            old, new = before.weight(weight), after.weight(weight)
            encoded = before.encodings.get(weight)
            size = encoded.nbytes if encoded else old.numel() * old.element_size()
            changes.append(
                Change(
                    site=site.name,
                    weight=weight,
                    action=f"{encoded.encoding}, trained" if encoded else "trained",
                    bits=8 * size / old.numel(),
                    sparsity=float((new == 0).double().mean()),
                    bytes_before=size,
                    bytes_after=size,
                    error=output_error(old, new, None),
                )
            )
        return changes
