"""Training a captured graph, as it is encoded and pruned, towards the outputs of another graph.

What is zero stays zero: pruned weights are set back to zero after each step, so fine-tuning keeps the mask,
whatever made it. Codes of encoded weights stay; their scales are trained by factors ``s = s_0 exp(t)``,
which keeps their signs and makes a step of any optimizer relative to the scale. Tied weights are one tensor.
Half-precision weights are trained as float32 and rounded where they are used.

Dropout is off, as captured. Batch normalisation that is still in the graph keeps its running statistics, or
(`batch_norm: train`) uses those of each batch and updates the running ones, by which it is judged: pruning
shifts what a layer reads, and running statistics can follow, at the price of the noise of batches.

With `precision: bfloat16` products and convolutions of both graphs are in bfloat16 while training, forwards
and backwards (mixed precision, Micikevicius et al. 2018, section 3). What is trained, the loss, the optimizer
and what is measured on held-out samples stay float32, so values are judged as they will be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from compress.augmentation import Augmentation, augmented, is_images
from compress.data import Batch, CalibrationData
from compress.errors import PassError
from compress.graph import Graph, Site, argument
from compress.losses import Loss, hidden_points, returning, variances, widened, with_hidden
from compress.progress import Progress, Silent
from compress.statistics import HELD_OUT_EVERY

Optimizer = Literal["adam", "sgd"]
BatchNorm = Literal["frozen", "train"]
Precision = Literal["float32", "bfloat16"]

_HELD_OUT = 512
"""Samples kept apart at most: choosing one of a few dozen checkpoints takes no more."""
_CHECKPOINTS = 20
"""How often in a run the held-out loss is looked at."""


# -- what is trained ---------------------------------------------------------------------------------


def trainable(graph: Graph, sites: Iterable[Site]) -> tuple[str, ...]:
    """Names of the tensors that fine-tuning changes: weights of these sites and their biases, and scales and
    shifts of the normalisation layers; of encoded weights the scales, or the values of a bitmap.
    """
    chosen = dict.fromkeys(site.weight for site in sites)
    names = dict.fromkeys(trained_part(graph, weight) for weight in chosen)
    left_alone = {site.node for site in graph.sites() if site.weight not in chosen}
    for node in graph.ops.nodes:
        if node.name not in left_alone:
            names.update(dict.fromkeys(_vectors(graph, node)))
    return tuple(name for name in names if graph.tensors[name].is_floating_point())


def trained_part(graph: Graph, weight: str) -> str:
    """Name of the tensor that is trained: the weight itself, or a part of it where it is encoded."""
    encoded = graph.encodings.get(weight)
    return weight if encoded is None else f"{weight}.{encoded.trained}"


def _vectors(graph: Graph, node: fx.Node) -> list[str]:
    """Vectors that an operator reads as its `weight` or `bias`."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    values = [given.get("weight"), given.get("bias")]
    names = [str(v.target) for v in values if isinstance(v, fx.Node) and v.op == "get_attr"]
    return [name for name in names if name in graph.tensors and graph.tensors[name].ndim == 1]


class Trainee:
    """A graph with tensors to optimise.

    Attributes:
        graph: in eval form, with the current values.
        variables: leaf tensors by name, for an optimizer.
        masks: bool by name, True = stays zero; only of weights that hold zeros.
    """

    def __init__(self, graph: Graph, names: Sequence[str], batch_norm: BatchNorm = "frozen") -> None:
        self.graph = graph.copy()
        self.statistics = running_statistics(graph) if batch_norm == "train" else ()
        # training overwrites them
        self.graph.tensors.update({name: graph.tensors[name].clone() for name in self.statistics})
        self.training = _training_form(self.graph) if self.statistics else self.graph
        self.start = {name: graph.tensors[name] for name in names}
        scales = {f"{name}.scales" for name in graph.encodings}
        self.factors = scales & set(names)
        self.variables: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        weights = {site.weight for site in graph.sites()}
        for name, value in self.start.items():
            wide = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            if name in self.factors:
                wide.zero_()
            elif name in weights and not bool(value.all()):
                self.masks[name] = value == 0
            self.variables[name] = wide.requires_grad_()

    def run(self, inputs: Sequence[Tensor], *, grad: bool = True) -> list[Any]:
        """Flat outputs with the current values."""
        with torch.set_grad_enabled(grad):
            self.graph.tensors.update({name: self.value(name) for name in self.variables})
        # a single sample has no spread
        form = self.training if grad and len(inputs[0]) > 1 else self.graph
        return form.run(inputs, grad=grad)

    def value(self, name: str) -> Tensor:
        """The tensor as the graph reads it."""
        start, variable = self.start[name], self.variables[name]
        return (start * variable.exp() if name in self.factors else variable).to(start.dtype)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One step down the gradients of a loss; pruned weights stay zero."""
        found = torch.autograd.grad(loss, list(self.variables.values()), allow_unused=True)
        for variable, gradient in zip(self.variables.values(), found, strict=True):
            variable.grad = gradient
        optimizer.step()
        for name in self.masks:
            self._mask(name)

    def prune(self, name: str, mask: Tensor) -> None:
        """Set a weight to zero where `mask` is True, from now on."""
        self.masks[name] = mask
        self._mask(name)

    def _mask(self, name: str) -> None:
        with torch.no_grad():
            # not a product, which would leave negative zeros
            self.variables[name].masked_fill_(self.masks[name], 0.0)

    def values(self) -> dict[str, Tensor]:
        """Copies of all tensors as the graph reads them."""
        with torch.no_grad():
            trained = {name: self.value(name).clone() for name in self.variables}
        return trained | {name: self.graph.tensors[name].clone() for name in self.statistics}


def _training_form(graph: Graph) -> Graph:
    """The graph with batch normalisation on statistics of the batch; the tensors are not copied."""
    training = graph.copy()
    training.tensors = graph.tensors
    for node in training.ops.nodes:
        if _statistics(node):
            node.update_arg(5, True)
    return training


def running_statistics(graph: Graph) -> tuple[str, ...]:
    """Names of the means and variances of batch normalisation: what training changes besides `trainable`."""
    return tuple(dict.fromkeys(name for node in graph.ops.nodes for name in _statistics(node)))


def _statistics(node: fx.Node) -> list[str]:
    if node.target is not torch.ops.aten.batch_norm.default:
        return []
    read = [argument(node, name, None) for name in ("running_mean", "running_var")]
    return [str(n.target) for n in read if isinstance(n, fx.Node) and n.op == "get_attr"]


# -- samples -----------------------------------------------------------------------------------------


class Samples:
    """Calibration samples in memory, to be taken in any order.

    Where all have one shape, and the model takes any number of them, a row is a sample, else a batch.
    """

    def __init__(self, graph: Graph, batches: Sequence[Batch]) -> None:
        free = all(spec.symbol(0) is not None for spec in graph.inputs)
        shapes = {tuple(t.shape[1:] for t in (*b.inputs, *_label(b))) for b in batches}
        self.single = free and len(shapes) == 1
        self.batches = [_joined(batches)] if self.single else list(batches)

    def __len__(self) -> int:
        return len(self.batches[0].inputs[0]) if self.single else len(self.batches)

    def take(self, rows: Tensor) -> list[Batch]:
        """These rows as one batch, or these batches."""
        if not self.single:
            return [self.batches[int(row)] for row in rows]
        (whole,) = self.batches
        labels = None if whole.labels is None else whole.labels[rows]
        return [Batch(tuple(t[rows] for t in whole.inputs), labels)]

    def split(self) -> tuple[Tensor, Tensor]:
        """Rows to train on, and rows held out; of a single one both."""
        rows = torch.arange(len(self))
        every = max(HELD_OUT_EVERY, math.ceil(len(self) / _HELD_OUT))
        held = rows % every == every - 1
        if not bool(held.any()):
            held = rows == len(rows) - 1
        return (rows, rows) if len(rows) == 1 else (rows[~held], rows[held])


def _label(batch: Batch) -> tuple[Tensor, ...]:
    return () if batch.labels is None else (batch.labels,)


def _joined(batches: Sequence[Batch]) -> Batch:
    inputs = tuple(torch.cat(column) for column in zip(*(b.inputs for b in batches), strict=True))
    labels = [b.labels for b in batches if b.labels is not None]
    return Batch(inputs, torch.cat(labels) if labels else None)


# -- training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the samples; may be a fraction.
        batch_size: samples of a step, where samples can be grouped.
        learning_rate: at the start; it falls to zero along a cosine (Loshchilov & Hutter 2017).
        optimizer: "adam", or "sgd" with Nesterov momentum 0.9.
        augment: what is done to images by chance, each time they are seen.
        batch_norm: which statistics it uses in training: its running ones, or those of the batch.
        seed: of order and augmentation.
        hidden: weight of the hidden values in the loss (`compress.losses.with_hidden`).
        precision: of products and convolutions in training, of both graphs.
    """

    epochs: float
    batch_size: int
    learning_rate: float
    optimizer: Optimizer = "adam"
    augment: tuple[Augmentation, ...] = ()
    batch_norm: BatchNorm = "frozen"
    seed: int = 0
    hidden: float = 0.0
    precision: Precision = "float32"


@dataclass(frozen=True)
class Fitted:
    """Outcome of `fit`.

    Attributes:
        graph: with the values of the least held-out loss.
        before, after: that loss at the start (of what was allowed to be kept) and in the end.
        steps: how many there were, and of which the values are; 0 for those at the start.
    """

    graph: Graph
    before: float
    after: float
    steps: tuple[int, int]


def fit(
    graph: Graph,
    names: Sequence[str],
    reference: Graph,
    data: CalibrationData,
    loss: Loss,
    plan: Plan,
    *,
    prune: Callable[[Trainee, int, int], bool] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train tensors of a graph; keep the values of the least held-out loss, which may be those at the start.

    Args:
        graph: not changed.
        names: of `trainable` tensors.
        reference: whose outputs the loss is given; its inputs are the graph's.
        data: every fifth sample (at most 512) is held out.
        loss: of outputs, reference outputs and labels.
        plan: how.
        prune: called before each step and after the last with (trainee, step, number of steps); it may prune.
            Values at this point are kept only where it returns True.
        progress: told about every look at the held-out loss.

    Raises:
        PassError: the loss is not finite at the start, or does not depend on what is trained; there are no
            hidden values in common.
    """
    changed = graph
    samples = Samples(graph, list(data))
    training, held = samples.split()
    judged = [b for rows in held.split(plan.batch_size) for b in samples.take(rows)]
    mixed = plan.precision == "bfloat16"
    if mixed:
        loss = widened(loss)
    if plan.hidden:
        points, own = hidden_points(graph, reference), len(graph.output_names)
        graph, reference = returning(graph, points), returning(reference, points)
        loss = with_hidden(loss, variances(reference, own, [b.inputs for b in judged]), plan.hidden)
    channels_last = _channels_last_pays(graph) and _channels_last_pays(reference)
    if channels_last:
        graphs = _of_any_layout(graph), _of_any_layout(reference)
        # of two samples, for in one there is no order of samples
        channels_last = _run_channels_last(graphs, samples.take(training[:2])[0].inputs)
        graph, reference = graphs if channels_last else (graph, reference)
    trainee = Trainee(graph, names, plan.batch_norm)
    generator = torch.Generator().manual_seed(plan.seed)
    size = min(plan.batch_size, len(training)) if samples.single else 1
    total = max(1, round(plan.epochs * (len(training) // size)))
    weights = [len(b.inputs[0]) for b in judged]

    def held_out_loss() -> float:
        parts = []
        for batch in judged:
            # not kept from one look to the next: logits of a language model are its largest value
            target = reference.run(_copies(batch.inputs, channels_last))
            ours = trainee.run(_copies(batch.inputs, channels_last), grad=False)
            parts.append(float(loss(ours, target, batch.labels)))
        return math.fsum(p * w for p, w in zip(parts, weights, strict=True)) / sum(weights)

    optimizer = _optimizer(list(trainee.variables.values()), plan)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    look = max(1, total // _CHECKPOINTS)
    best: tuple[float, int, dict[str, Tensor]] | None = None
    before = math.nan
    progress = progress or Silent()
    order = torch.empty(0, dtype=torch.long)
    for step in range(total + 1):
        final = prune is None or prune(trainee, step, total)
        if final and (best is None or step % look == 0 or step == total):
            now = held_out_loss()
            progress.step(f"step {step} of {total}: held-out loss {now:.4g}")
            if best is None:
                before = now
                if not math.isfinite(now):
                    raise PassError(f"the loss is {now} before training", expected="a finite number")
            if best is None or now < best[0]:
                best = (now, step, trainee.values())
        if step == total:
            break
        if len(order) < size:
            order = training[torch.randperm(len(training), generator=generator)]
        rows, order = order[:size], order[size:]
        for batch in samples.take(rows):
            inputs = augmented(batch.inputs, plan.augment, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                target = reference.run(_copies(inputs, channels_last))
                ours = trainee.run(_copies(inputs, channels_last))
            value = loss(ours, target, batch.labels)
            if not value.requires_grad:
                raise PassError(
                    "the loss does not depend on the outputs of the graph", expected="one that does"
                )
            trainee.step(optimizer, value)
        schedule.step()
    assert best is not None
    result = changed.copy()
    after, kept, values = best
    _store(result, values)
    return Fitted(result, before, after, (total, kept))


def _copies(inputs: Iterable[Tensor], channels_last: bool) -> list[Tensor]:
    """A model may write into its inputs, which others still have to read."""
    last, same = torch.channels_last, torch.preserve_format
    return [t.clone(memory_format=last if channels_last and is_images(t) else same) for t in inputs]


def bfloat16_pays() -> bool:
    """Whether this processor multiplies bfloat16 itself; others emulate it, slower than float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _channels_last_pays(graph: Graph) -> bool:
    """Whether images are to lie in memory with their channels last, as then do the outputs of convolutions:
    with the few channels compressed ones have, in numbers that no vector divides, processors are faster so.
    """
    convolves = any(site.kind == "conv" and len(graph.shape(site.weight)) == 4 for site in graph.sites())
    return convolves and not any("as_strided" in str(node.target) for node in graph.ops.nodes)


def _run_channels_last(graphs: Iterable[Graph], inputs: Sequence[Tensor]) -> bool:
    """Whether no operator asks for values in row-major order, as `view_as` and `view_as_complex` do."""
    try:
        for graph in graphs:
            graph.run(_copies(inputs, channels_last=True))
    except RuntimeError:
        return False
    return True


def _of_any_layout(graph: Graph) -> Graph:
    """The same graph for values in any order in memory: `view` takes those in row-major order only."""
    free = graph.copy()
    for node in free.ops.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    return free


def _optimizer(variables: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.Adam(variables, plan.learning_rate)
    return torch.optim.SGD(variables, plan.learning_rate, momentum=0.9, nesterov=True)


def _store(graph: Graph, values: dict[str, Tensor]) -> None:
    graph.tensors.update(values)
    for name, encoded in graph.encodings.items():
        part = trained_part(graph, name)
        if part in values:
            # `Encoded` is abstract, and cannot say that all of its kinds are dataclasses
            graph.encodings[name] = replace(encoded, **{encoded.trained: values[part]})  # type: ignore[type-var]
