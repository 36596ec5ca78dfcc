"""An output head in codes: logits from a few codebooks, fitted to the distributions of the dense head.

    z_v = sum_j C_j[m_j(v)] . h + b_v                       instead of  z_v = w_v . h

With one codebook and no ``b`` that is VQ-Logits (arXiv 2505.10202): tokens that share a code have equal
logits. A number for each token tells them apart, and makes of it a class-based model, ``p(v) = p(class) p(v
| class)`` (Brown et al. 1992); several codebooks (`compress.passes.solvers.vector_codes`) give each token a
row of its own.

**First codes.** To second order the divergence from the dense head is ``1/2 sum_v E[p_v (1 - p_v) ((w_v -
w^_v) . (h - E h))^2]``, taken as separable: k-means of rows whitened by the covariance of h, with mass
``E[p_v (1 - p_v)]``, of which a tenth is spread evenly over the vocabulary.

**New codes.** With Z' the present partition function, ``log Z <= log Z' + Z / Z' - 1``, so that

    KL <= const + sum_v E[ -p_v z_v + exp(z_v) / Z' ]

with equality at present: a majorizer that falls apart into tokens. For code k of one stage, the others
fixed, the best ``b_v`` is in closed form, and the best code the one of largest ``E[p_v a_k] - E[p_v] log
E[exp(r_v + a_k) / Z']`` with ``a_k = C[k] . h`` and r_v the rest of ``z_v``: two matrix products for all
tokens and codes. No such step raises the divergence on the rows it is made from (but for what the even
tenth, kept as a prior, asks for).

**Training.** Codebooks and biases go down the gradient of the divergence with Adam, in whitened
coordinates, in turn with new codes. What is best on held-out rows is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.passes.solvers.vector_codes import VectorCodes, residual_codes

_EVENLY = 0.1
"""Of the mass, spread evenly: rare tokens are hardly seen in calibration data, and are not worth nothing."""
_DAMPING = 1e-4
_AT_ONCE = 1 << 22
"""Logits held at a time."""
_MASS_ROWS, _CODE_ROWS, _HELD_ROWS, _RECALL_ROWS = 8192, 8192, 2048, 4096
"""Rows from which masses are estimated, new codes are found, and states and shortlists are judged."""
_ROUNDS = 2
"""Of new codes and training: the first codes are moved a lot, later ones hardly."""
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Head:
    """A dense output layer and what it reads.

    Attributes:
        weight: float32 ``[V, N]``.
        bias: float32 ``[V]`` or None.
        wanted: float32 ``[rows, N]``, inputs in the original network, whose logits are the aim.
        inputs: float32 ``[rows, N]``, the same rows in the network at hand.
    """

    weight: Tensor
    bias: Tensor | None
    wanted: Tensor
    inputs: Tensor

    def probabilities(self, rows: Tensor) -> Tensor:
        """Of the classes, for these rows: ``[V, rows]``."""
        logits = self.weight @ self.wanted[rows].mT
        return (logits if self.bias is None else logits + self.bias.unsqueeze(1)).softmax(0)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """So few rows at a time that their logits fit."""
        return rows.split(max(1, _AT_ONCE // len(self.weight)))


@dataclass(frozen=True)
class Training:
    """How codebooks are trained.

    Attributes:
        epochs: passes over the rows; 0 for none, and may be a fraction.
        batch_rows: rows of a step.
        learning_rate: of a step, relative to the root mean square of the whitened codebooks; falls to zero
            along a cosine.
    """

    epochs: float
    batch_rows: int = 512
    learning_rate: float = 0.05


@dataclass(frozen=True)
class LogitCodes:
    """``z_v = sum_j codes.codebooks[j][codes.maps[j, v]] . h + bias_v``.

    Attributes:
        codes: of the weight's rows.
        bias: float32 ``[V]``, or None.
        divergences: mean KL from the dense head on held-out rows, in nats: of the first codes, and of these;
            empty without data.
    """

    codes: VectorCodes
    bias: Tensor | None
    divergences: tuple[float, ...] = ()


def code_rows(weight: Tensor, bias: Tensor | None, codes: int, stages: int, *, seed: int = 0) -> LogitCodes:
    """Codes without data: plain k-means of the rows."""
    return LogitCodes(residual_codes(weight, torch.ones(len(weight)), codes, stages, seed=seed), bias)


def code_logits(
    head: Head,
    codes: int,
    stages: int,
    *,
    singletons: int = 0,
    token_bias: bool = True,
    training: Training | None = None,
    seed: int = 0,
) -> LogitCodes:
    """Codebooks, codes and biases of small divergence from the dense head; see the module docstring.

    Args:
        head: the layer, with rows; the last fifth of them is held out.
        codes: entries of each codebook.
        stages: number of codebooks.
        singletons: the most probable tokens keep a row of the first codebook for themselves, and start exact.
        token_bias: give each token a bias of its own, whether or not the layer has one.
        training: None for codes in closed form alone.
        seed: of k-means and of the order of rows.
    """
    fit = Fit(head, token_bias, seed)
    fit.start(codes, stages, singletons)
    first = fit.held_out()
    kept = (first, fit.state())
    total = 0
    if training is not None:
        size = min(training.batch_rows, len(fit.rows))
        total = round(training.epochs * len(fit.rows) / size)
    trainer = Trainer(fit, training, total) if training is not None and total else None
    for i in range(_ROUNDS if trainer else 1):
        before = (fit.held_out(), fit.state()) if i else kept
        fit.recode()
        now = fit.held_out()
        if now > before[0]:
            fit.restore(before[1])  # codes of few rows: those held out know better
            now = before[0]
        if trainer:
            for _ in range(total * i // _ROUNDS, total * (i + 1) // _ROUNDS):
                trainer.step()
            now = fit.held_out()
        if now < kept[0]:
            kept = (now, fit.state())
    fit.restore(kept[1])
    return fit.result((first, kept[0]))


def recall(head: Head, found: LogitCodes, candidates: int) -> tuple[float, int]:
    """How often the dense head's most probable token is among the first by the codes' logits.

    Args:
        head: the last fifth of its rows, at most 4096, are looked at: those that codes were not fitted to.
        found: codes of it.
        candidates: how many are first.

    Returns:
        A fraction, and the number of rows.
    """
    _, held = held_out(len(head.inputs), _RECALL_ROWS)
    kept = found.codes.decode()
    hits = 0
    for part in head.parts(held):
        z = head.inputs[part] @ kept.mT
        z = z if found.bias is None else z + found.bias
        chosen = z.topk(min(candidates, len(kept)), sorted=False).indices
        hits += int((chosen == head.probabilities(part).argmax(0).unsqueeze(1)).sum())
    return hits / len(held), len(held)


def held_out(count: int, limit: int) -> tuple[Tensor, Tensor]:
    """Of so many rows those to fit to, and at most `limit` of the last fifth; a handful is used for both."""
    fitting = torch.arange(count - count // 5)
    return fitting, _spread(torch.arange(len(fitting), count) if count >= 5 else fitting, limit)


State = tuple[list[Tensor], Tensor, Tensor]


def token_masses(head: Head, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``E[p_v]`` and ``E[p_v (1 - p_v)]`` over some of these rows, float32 ``[V]`` each."""
    rows = _spread(rows, _MASS_ROWS)
    probability, mass = torch.zeros(2, len(head.weight)).unbind()
    for part in head.parts(rows):
        p = head.probabilities(part)
        probability += p.sum(1)
        mass += (p * (1 - p)).sum(1)
    return probability / len(rows), mass / len(rows)


class Fit:
    """Codebooks in whitened coordinates ``y = L^-1 (h - mean)``, ``L L^T`` the covariance."""

    def __init__(self, head: Head, token_bias: bool, seed: int) -> None:
        self.head, self.token_bias, self.seed = head, token_bias, seed
        self.generator = torch.Generator().manual_seed(seed)
        count = len(head.inputs)
        self.rows, self.held = held_out(count, _HELD_ROWS)
        x = head.inputs.double()
        # a bias can stand for the mean; without it the logits are of h itself
        mean = x.mean(0) if token_bias else torch.zeros_like(x[0])
        moments = (x - mean).mT @ (x - mean) / count
        damping = _DAMPING * float(moments.diagonal().mean()) or 1.0
        root = torch.linalg.cholesky(moments + damping * torch.eye(len(moments), dtype=moments.dtype))
        self.root, self.mean = root, mean
        self.y = torch.linalg.solve_triangular(root, (x - mean).mT, upper=False).float()  # [N, rows]
        self.points = (head.weight.double() @ root).float()
        vocabulary = len(head.weight)
        self.bias = torch.zeros(vocabulary) if head.bias is None else head.bias.clone()
        self.bias += head.weight @ mean.float()
        self.codebooks: list[Tensor] = []
        self.maps = torch.empty(0)
        self.alone = torch.empty(0, dtype=torch.long)

    def start(self, codes: int, stages: int, singletons: int) -> None:
        """The first codes."""
        probability, mass = token_masses(self.head, self.rows)
        mass = (1 - _EVENLY) * mass / mass.sum().clamp_min(1e-30) + _EVENLY / len(mass)
        self.alone = probability.topk(min(singletons, len(mass))).indices
        found = residual_codes(self.points, mass, codes, stages, alone=self.alone, seed=self.seed)
        self.codebooks, self.maps = list(found.codebooks), found.maps

    def state(self) -> State:
        return [c.clone() for c in self.codebooks], self.maps.clone(), self.bias.clone()

    def restore(self, state: State) -> None:
        # in place: they are what is trained
        for tensor, value in zip((*self.codebooks, self.bias), (*state[0], state[2]), strict=True):
            tensor.copy_(value)
        self.maps = state[1].clone()

    def logits(self, rows: Tensor) -> Tensor:
        """``[V, rows]``."""
        y = self.y[:, rows]
        z = self.bias.unsqueeze(1).expand(-1, len(rows))
        for book, codes in zip(self.codebooks, self.maps, strict=True):
            z = z + (book @ y)[codes]
        return z

    def held_out(self) -> float:
        """Mean KL in nats."""
        total = 0.0
        for part in self.head.parts(self.held):
            p = self.head.probabilities(part)
            terms = p * (p.clamp_min(1e-30).log() - self.logits(part).log_softmax(0))
            total += float(terms.sum(dtype=torch.float64))
        return total / len(self.held)

    def recode(self) -> None:
        """New codes, one stage after the other, and biases to go with them."""
        rows = _spread(self.rows, _CODE_ROWS)
        for stage in range(len(self.codebooks)):
            self.recode_stage(stage, rows)

    def recode_stage(self, stage: int, rows: Tensor) -> None:
        """New codes of one stage, from these rows."""
        book, old = self.codebooks[stage], self.maps[stage]
        shared = len(book) - (len(self.alone) if stage == 0 else 0)
        seen = torch.zeros(len(old))
        linear, expected = torch.zeros(2, len(old), len(book)).unbind()
        for part in self.head.parts(rows):
            p = self.head.probabilities(part)
            a = book @ self.y[:, part]
            a -= a.amax(0)  # exponentials of differences alone are needed
            rest = self.logits(part).log_softmax(0) - a[old]
            seen += p.sum(1)
            linear += p @ a.mT
            expected += rest.clamp_(max=80.0).exp_() @ a.exp_().mT
        seen, linear, expected = seen / len(rows), linear / len(rows), expected / len(rows)
        # the quadratic form of the even part of the mass: what k-means would do
        left = self.points - VectorCodes(tuple(self.codebooks), self.maps).decode() + book[old]
        prior = book.square().sum(1) - 2 * left @ book.mT
        prior *= 0.5 * _EVENLY / len(old)
        few = _EVENLY / len(old)
        if self.token_bias:
            gain = linear - seen.unsqueeze(1) * expected.clamp_min(1e-30).log()
        else:
            gain = linear - expected
        new = (gain - prior)[:, :shared].argmax(1)
        new[self.alone] = old[self.alone]
        if self.token_bias:
            now = expected.gather(1, new.unsqueeze(1)).squeeze(1)
            self.bias += ((seen + few) / (now + few)).log()
        self.maps[stage] = new

    def result(self, divergences: tuple[float, ...]) -> LogitCodes:
        back = [
            torch.linalg.solve_triangular(self.root, c.double(), upper=False, left=False)
            for c in self.codebooks
        ]
        bias = None
        if self.token_bias or self.head.bias is not None:
            shift = torch.stack([(c @ self.mean)[m] for c, m in zip(back, self.maps, strict=True)]).sum(0)
            bias = (self.bias.double() - shift).float()
        codes = VectorCodes(tuple(c.float().contiguous() for c in back), self.maps)
        return LogitCodes(codes, bias, divergences)


class Trainer:
    """Steps of Adam down the gradient of the divergence, over rows in random order."""

    def __init__(self, fit: Fit, training: Training, total: int) -> None:
        self.fit = fit
        self.size = min(training.batch_rows, len(fit.rows))
        self.order = torch.empty(0, dtype=torch.long)
        self.variables = [*fit.codebooks, *([fit.bias] if fit.token_bias else [])]
        rate = training.learning_rate * float(torch.cat(fit.codebooks).square().mean().sqrt())
        self.optimizer = torch.optim.Adam(self.variables, rate, _BETAS, eps=1e-12)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)

    def step(self) -> None:
        fit = self.fit
        if len(self.order) < self.size:
            self.order = fit.rows[torch.randperm(len(fit.rows), generator=fit.generator)]
        rows, self.order = self.order[: self.size], self.order[self.size :]
        for variable, gradient in zip(self.variables, self.gradients(rows), strict=True):
            variable.grad = gradient
        self.optimizer.step()
        self.schedule.step()

    def gradients(self, rows: Tensor) -> list[Tensor]:
        """Of the mean divergence of these rows, by codebooks and biases."""
        fit = self.fit
        gradients = [torch.zeros_like(v) for v in self.variables]
        for part in fit.head.parts(rows):
            difference = fit.logits(part).softmax(0).sub_(fit.head.probabilities(part)).div_(len(rows))
            y = fit.y[:, part].mT
            for stage, codes in enumerate(fit.maps):
                summed = y.new_zeros(len(fit.codebooks[stage]), len(part)).index_add_(0, codes, difference)
                gradients[stage].addmm_(summed, y)
            if fit.token_bias:
                gradients[-1].add_(difference.sum(1))
        return gradients


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of these, evenly spread."""
    return rows[:: math.ceil(len(rows) / count)] if len(rows) else rows
