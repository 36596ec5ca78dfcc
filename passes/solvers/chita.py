"""CHITA: pruning as an l0-constrained least-squares problem in the gradients of single samples.

With the Fisher information as Hessian, the loss around the dense weights ``w~`` is, but for a constant,

    Q(w) = |G (w - w~)|^2 / (2 n) + ridge / 2 |w - w~|^2 + l (w - w~),

to be minimised over all w with at most k entries that are not zero (Benbaki et al. 2023, "Fast as CHITA:
Neural Network Pruning with Combinatorial Optimization", section 2). The Hessian is never formed. ``l = 0``
says that the dense model has converged; else it is the gradient of the loss (`joint_solutions`).

`back_solve` is the exact solution on a support, over all weights jointly or with a Fisher information that is
block-diagonal in the rows (output channels) of the weights: n samples cannot tell how millions of weights
depend on each other. Supports come from magnitudes, from saliencies of Optimal Brain Surgeon with the
blocks of rows as Hessian, removed in rounds with a back-solve after each (Hassibi & Stork 1993; Singh &
Alistarh 2020), or from iterative hard thresholding (section 3.1).

With a gradient l the solution is a damped step of the natural gradient on the support (Martens 2020, "New
Insights and Perspectives on the Natural Gradient Method", section 8). Its damping and its length (the factor
of l, which may be 0) are chosen by the loss on other samples (as in Marquardt 1963). Supports are sought as
if the model had converged: the step may be a long one, after which saliencies say little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compress.errors import PassError
from compress.passes.solvers.fisher import Gradients
from compress.passes.solvers.masks import Scope, keep_largest_of

Block = Literal["row", "model"]

_CHUNK = 1 << 21
"""Elements of rows x samples x weights worked on at a time."""
_LEAST_RIDGE = 1e-12
_ROUNDS, _HALVINGS = 4, 3
"""Of iterative hard thresholding; each is a factorisation."""


@dataclass(frozen=True)
class Quadratic:
    """The quadratic model Q of the loss around some weights.

    Attributes:
        weights: the dense weights, float32 ``[O, K]`` each.
        gradients: of the samples, at these weights; one for each weight.
        ridge: > 0, in units of the Fisher information.
    """

    weights: tuple[Tensor, ...]
    gradients: tuple[Gradients, ...]
    ridge: float

    @property
    def samples(self) -> int:
        """n"""
        return self.gradients[0].samples

    def times(self, values: tuple[Tensor, ...]) -> Tensor:
        """``G v``, float32 ``[n]``."""
        terms = [g.times(v) for g, v in zip(self.gradients, values, strict=True)]
        return torch.stack(terms).sum(0)

    def objective(self, values: tuple[Tensor, ...]) -> float:
        """Q at l = 0."""
        step = tuple(v - w for v, w in zip(values, self.weights, strict=True))
        curved = float(self.times(step).double().square().sum()) / (2 * self.samples)
        pull = sum(float(d.double().square().sum()) for d in step)
        return curved + self.ridge / 2 * pull

    def slope(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradient of Q at l = 0, float32 ``[O, K]`` each."""
        step = tuple(v - w for v, w in zip(values, self.weights, strict=True))
        r = self.times(step) / self.samples
        return tuple(
            g.transposed(r).add_(d, alpha=self.ridge) for g, d in zip(self.gradients, step, strict=True)
        )


def mean_diagonal(gradients: tuple[Gradients, ...]) -> float:
    """Mean diagonal entry of the Fisher information over all weights: the unit to give a ridge in."""
    entries = [g.diagonal() for g in gradients]
    total = sum(float(e.sum(dtype=torch.float64)) for e in entries)
    return total / max(sum(e.numel() for e in entries), 1)


# -- values on a support ---------------------------------------------------------------------------


def back_solve(problem: Quadratic, masks: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    """The minimiser of Q at l = 0 over the weights that are zero outside a support.

    "model", by Woodbury's identity, with S the support and R the rest:
    ``w_S = w~_S + G_S^T (G_S G_S^T + n ridge I)^-1 G_R w~_R``, one factorisation of an n x n matrix, in
    double precision; where fewer weights stay than there are samples, of ``G_S^T G_S + n ridge I`` instead.
    "row": the same for each row of each weight alone.

    Args:
        masks: bool ``[O, K]`` each, True = kept.

    Returns:
        float32 ``[O, K]`` each, zero where a mask is False.
    """
    if block == "row":
        return tuple(_rows(problem, i, mask)[0] for i, mask in enumerate(masks))
    return next(joint_solutions(problem, masks, [problem.ridge]))


def joint_solutions(
    problem: Quadratic,
    masks: tuple[Tensor, ...],
    ridges: Sequence[float],
    linear: tuple[Tensor, ...] | None = None,
    lengths: Sequence[float] = (1.0,),
) -> Iterator[tuple[Tensor, ...]]:
    """`back_solve` over all weights jointly for each ridge, and for each of these less a factor times
    ``(G_S^T G_S / n + ridge I)^-1 l_S``, at little more than the cost of one.

    Args:
        masks: bool ``[O, K]`` each, True = kept.
        ridges: in place of the problem's.
        linear: l, the gradient of the loss at the dense weights, float32 ``[O, K]`` each; None for zero.
        lengths: the factors.

    Returns:
        float32 ``[O, K]`` each, zero where a mask is False.
    """
    removed = tuple(w.masked_fill(m, 0.0) for w, m in zip(problem.weights, masks, strict=True))
    missing = problem.times(removed).double()
    form = _by_weights if sum(int(m.sum()) for m in masks) < problem.samples else _by_samples
    for change, step in form(problem, masks, missing, linear, ridges):
        for length in lengths:
            total = change
            if step is not None:
                total = tuple(c.add(s, alpha=-length) for c, s in zip(change, step, strict=True))
            yield tuple(
                torch.where(m, w + d, 0.0) for w, m, d in zip(problem.weights, masks, total, strict=True)
            )


_Parts = tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]
"""What makes up for the weights that go, and a step down the gradient (None without one)."""


def _by_samples(
    problem: Quadratic,
    masks: tuple[Tensor, ...],
    missing: Tensor,
    linear: tuple[Tensor, ...] | None,
    ridges: Sequence[float],
) -> Iterator[_Parts]:
    """For each ridge ``G^T (G_S G_S^T + n ridge I)^-1 missing`` and ``(F_SS + ridge I)^-1 l_S``, right on the
    support.

    l is split into ``G_S^T a`` and a rest outside the rows of G_S. Of the first part there is ``G_S^T (G_S
    G_S^T + n ridge I)^-1 n a``; at a small ridge nothing of it would be left among the roundings otherwise.
    """
    n = problem.samples
    kernel = torch.zeros(n, n, dtype=torch.float64)
    for gradients, mask in zip(problem.gradients, masks, strict=True):
        kernel += gradients.gram(mask)
    rest: tuple[Tensor, ...] | None = None
    if linear is not None:
        linear = tuple(v.where(m, 0.0) for v, m in zip(linear, masks, strict=True))
        a = _solved(kernel, 1e-7 * float(kernel.diagonal().mean()), problem.times(linear).double())
        inside = tuple(g.transposed(a.float()) for g in problem.gradients)
        rest = tuple(v - i.where(m, 0.0) for v, i, m in zip(linear, inside, masks, strict=True))
        left = problem.times(rest).double()
    for ridge in ridges:
        z = _solved(kernel, n * ridge, missing).float()
        change, step = tuple(g.transposed(z) for g in problem.gradients), None
        if rest is not None:
            z = _solved(kernel, n * ridge, n * a - left / ridge).float()
            step = tuple(r / ridge + g.transposed(z) for r, g in zip(rest, problem.gradients, strict=True))
        yield change, step


def _by_weights(
    problem: Quadratic,
    masks: tuple[Tensor, ...],
    missing: Tensor,
    linear: tuple[Tensor, ...] | None,
    ridges: Sequence[float],
) -> Iterator[_Parts]:
    """The same as ``(G_S^T G_S + n ridge I)^-1`` times ``G_S^T missing`` and ``n l_S`` on the support, zero
    elsewhere."""
    g = torch.cat([g.columns(m) for g, m in zip(problem.gradients, masks, strict=True)], 1)
    product, right = (g.T @ g).double(), [g.T.double() @ missing]
    if linear is not None:
        kept = torch.cat([v[m] for v, m in zip(linear, masks, strict=True)])
        right.append(problem.samples * kept.double())
    sizes = [int(m.sum()) for m in masks]
    for ridge in ridges:
        found = []
        for r in right:
            parts = _solved(product, problem.samples * ridge, r).float().split(sizes)
            zeros = (torch.zeros_like(w) for w in problem.weights)
            found.append(tuple(z.masked_scatter_(m, p) for z, m, p in zip(zeros, masks, parts, strict=True)))
        yield found[0], found[1] if len(found) > 1 else None


def _solved(matrix: Tensor, ridge: float, r: Tensor) -> Tensor:
    """``(A + ridge I)^-1 r``, float64 ``[m]``."""
    ridged = matrix.clone()
    ridged.diagonal().add_(max(ridge, _LEAST_RIDGE))
    return torch.cholesky_solve(r.unsqueeze(1), _cholesky(ridged)).squeeze(1)


def _rows(problem: Quadratic, index: int, mask: Tensor, *, saliencies: bool = False) -> tuple[Tensor, Tensor]:
    """Row-wise solution of one weight on a support, and saliencies of its entries (zeros if not asked for).

    Of each row only the columns of its support are worked on. The saliency of an entry is what Q rises by
    when it goes and the others of its row take over what they can: ``v_j^2 / (2 [(F_SS + ridge I)^-1]_jj)``.
    """
    gradients, weight = problem.gradients[index], problem.weights[index]
    rows, columns = weight.shape
    n, ridge = problem.samples, max(problem.ridge, _LEAST_RIDGE)
    solution, scores = torch.zeros_like(weight), torch.zeros_like(weight)
    step = max(1, _CHUNK // max(1, n * columns))
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        kept, w = mask[here], weight[here]
        width = int(kept.sum(1).max())
        if width == 0:
            continue
        g = gradients.rows(here.start, here.stop)  # [r, n, K]
        r = g @ w.masked_fill(kept, 0.0).unsqueeze(2)  # [r, n, 1]
        place = torch.argsort(kept, dim=1, descending=True, stable=True)[:, :width]
        valid = kept.gather(1, place)
        if not bool(kept.all()):
            # rows of fewer entries than the widest: zero columns, which the ridge keeps apart
            g = g.gather(2, place.unsqueeze(1).expand(-1, n, -1)).mul_(valid.unsqueeze(1))
        factor = _factor(g @ g.mT if n < width else g.mT @ g, n * ridge)
        if n < width:
            change = g.mT @ torch.cholesky_solve(r, factor)
        else:
            change = torch.cholesky_solve(g.mT @ r, factor)
        found = (w.gather(1, place) + change.squeeze(2)).mul_(valid)
        solution[here].scatter_(1, place, found)
        if saliencies:
            scores[here].scatter_(1, place, found.square() / (2 * _inverse_diagonal(g, factor, n, ridge)))
    return solution, scores


def _factor(matrices: Tensor, ridge: float) -> Tensor:
    """Cholesky factors of ``A + ridge I``: computed in double precision, float32 ``[..., m, m]``."""
    matrices = matrices.double()
    matrices.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return _cholesky(matrices).float()


def _cholesky(matrices: Tensor) -> Tensor:
    """Factors of float64 ``[..., m, m]``, sums of products in float32: a ridge below their rounding does
    not make them positive definite, so the least that does is added.
    """
    rounding = 1e-7 * matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    for attempt in range(6):
        factors, failed = torch.linalg.cholesky_ex(matrices)
        if not bool(failed.any()):
            return factors
        matrices = matrices.clone()
        matrices.diagonal(dim1=-2, dim2=-1).add_(rounding * 10**attempt)
    raise PassError(
        "the gradients of the samples are not finite", expected="finite ones; look at the samples"
    )


def _inverse_diagonal(g: Tensor, factor: Tensor, n: int, ridge: float) -> Tensor:
    """Diagonal of ``(g^T g / n + ridge I)^-1``: float32 ``[r, k]`` for g ``[r, n, k]``."""
    if n < g.shape[2]:
        covered = torch.linalg.solve_triangular(factor, g, upper=False).square().sum(1)
        # never quite 1, whatever rounding says: the inverse is positive
        return (1 - covered).clamp_(min=1e-6).div_(ridge)
    eye = torch.eye(g.shape[2]).expand_as(factor)
    return torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(1).mul_(n)


# -- supports --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """Weights (float32 ``[O, K]`` each), the support they are zero outside of, and where it came from."""

    values: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    support: str
    block: Block


def by_magnitude(problem: Quadratic, sparsity: float, scope: Scope) -> Solution:
    """The largest ``|w~|`` stay, solved for all weights jointly."""
    masks = keep_largest_of(tuple(w.abs() for w in problem.weights), sparsity, scope)
    return Solution(back_solve(problem, masks, "model"), masks, "magnitude", "model")


def by_obd(problem: Quadratic, sparsity: float, scope: Scope) -> Solution:
    """The largest ``w~^2 (F_jj + ridge)`` stay, solved for all weights jointly: Optimal Brain Damage, with
    values (LeCun et al. 1990)."""
    scores = tuple(
        w.square() * (g.diagonal() + problem.ridge)
        for w, g in zip(problem.weights, problem.gradients, strict=True)
    )
    masks = keep_largest_of(scores, sparsity, scope)
    return Solution(back_solve(problem, masks, "model"), masks, "obd", "model")


def by_obs(problem: Quadratic, sparsity: float, scope: Scope, *, rounds: int = 3) -> Solution:
    """The largest saliencies by rows stay; each round removes the same fraction, then solves by rows."""
    masks = tuple(torch.ones_like(w, dtype=torch.bool) for w in problem.weights)
    for done in range(1, rounds + 1):
        found = (_rows(problem, i, mask, saliencies=True)[1] for i, mask in enumerate(masks))
        # what is gone stays gone
        scores = tuple(s.masked_fill(~m, -1.0) for s, m in zip(found, masks, strict=True))
        masks = keep_largest_of(
            scores, 1 - (1 - sparsity) ** (done / rounds) if done < rounds else sparsity, scope
        )
    return Solution(back_solve(problem, masks, "row"), masks, "obs", "row")


def again(problem: Quadratic, start: Solution, block: Block) -> Solution:
    """The same support, solved with this form of the Fisher information."""
    return replace(start, values=back_solve(problem, start.masks, block), block=block)


def by_thresholding(
    problem: Quadratic, sparsity: float, scope: Scope, start: Solution | None = None
) -> Solution:
    """Iterative hard thresholding over all weights jointly, from a joint solution; else from `by_magnitude`.

    ``w <- H_k(w - t grad Q(w))`` followed by the back-solve on the new support, as long as Q falls; t is the
    exact minimiser of Q along its gradient, halved while the step does not pay.
    """
    start = start or by_magnitude(problem, sparsity, scope)
    values, masks = start.values, start.masks
    least = problem.objective(values)
    for _ in range(_ROUNDS):
        slope = problem.slope(values)
        energy = sum(float(s.double().square().sum()) for s in slope)
        along = float(problem.times(slope).double().square().sum()) / problem.samples
        better = None
        for halving in range(_HALVINGS):
            step = energy / max(along + problem.ridge * energy, 1e-300) / 2**halving
            scores = tuple((v - step * s).abs() for v, s in zip(values, slope, strict=True))
            new = keep_largest_of(scores, sparsity, scope)
            if all(bool((a == b).all()) for a, b in zip(new, masks, strict=True)):
                break
            solved = back_solve(problem, new, "model")
            if (objective := problem.objective(solved)) < least * (1 - 1e-7):
                better = (solved, new, objective)
                break
        if better is None:
            break
        values, masks, least = better
    return Solution(values, masks, "thresholding", "model")


# -- all of it -------------------------------------------------------------------------------------

Method = Literal["best", "obs", "obd", "magnitude", "thresholding"]

_BY: dict[str, Callable[[Quadratic, float, Scope], Solution]] = {
    "obs": by_obs,
    "obd": by_obd,
    "magnitude": by_magnitude,
    "thresholding": by_thresholding,
}

RIDGES = (0.05, 0.2, 0.8)
"""Of the mean diagonal of the Fisher information; the first one is tried with every support."""
TRAINING_RIDGES = (1.0, 10.0, 3.0, 0.3, 0.1, 0.03, 0.01)
"""The same where there is a gradient: the damping of a step of Levenberg and Marquardt."""
_LENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Factors of the gradient in such a step; with 0, there is none."""


def solve(
    weights: tuple[Tensor, ...],
    gradients: tuple[Gradients, ...],
    sparsity: float,
    *,
    scope: Scope = "global",
    method: Method = "best",
    ridge: float | None = None,
    linear: tuple[Tensor, ...] | None = None,
    judge: Callable[[tuple[Tensor, ...]], float] | None = None,
) -> Solution:
    """Prune.

    Args:
        weights: dense, float32 ``[O, K]`` each.
        gradients: of the loss of n samples at these weights; one for each weight.
        sparsity: fraction to remove.
        scope: over all weights together, or of each.
        method: `obs`: Optimal Brain Surgeon by rows; `obd`: Optimal Brain Damage, solved jointly;
            `magnitude`: the largest weights, solved jointly; `thresholding`: iterations from there; `best`:
            what the judge likes best of these, of the other form of the Fisher information, and of ridges.
        ridge: in units of `mean_diagonal`; None stands for all of `RIDGES` with `best`, else for the first;
            with a gradient for those of `TRAINING_RIDGES`.
        linear: the gradient of the loss, float32 ``[O, K]`` each, where the model has not converged: weights
            that stay take a step down it, as far as the judge likes.
        judge: where there is something to choose, the loss of given weights on samples that `gradients` does
            not hold.

    Raises:
        ValueError: there is no judge, and method `best` or a gradient.
    """
    if judge is None and (method == "best" or linear is not None):
        raise ValueError("method best and a gradient need a judge")
    unit = mean_diagonal(gradients)
    if ridge is not None:
        ridges: tuple[float, ...] = (ridge,)
    else:
        ridges = RIDGES if linear is None else TRAINING_RIDGES
    first, *others = (
        Quadratic(weights, gradients, max(unit * relative, _LEAST_RIDGE)) for relative in ridges
    )
    if method == "best":
        assert judge is not None
        found = _best(first, others if linear is None else (), sparsity, scope, judge)
    else:
        found = _BY[method](first, sparsity, scope)
    if linear is None or judge is None:
        return found
    least, best = judge(found.values), found
    damped = [max(unit * r, _LEAST_RIDGE) for r in ridges]
    for values in joint_solutions(first, found.masks, damped, linear, _LENGTHS):
        if (loss := judge(values)) < least:
            least, best = loss, replace(found, values=values, block="model")
    return best


def _best(
    first: Quadratic,
    others: Sequence[Quadratic],
    sparsity: float,
    scope: Scope,
    judge: Callable[[tuple[Tensor, ...]], float],
) -> Solution:
    obs, magnitude = by_obs(first, sparsity, scope), by_magnitude(first, sparsity, scope)
    tried = [obs, again(first, obs, "model"), magnitude, again(first, magnitude, "row")]
    tried.append(by_obd(first, sparsity, scope))
    losses = [judge(solution.values) for solution in tried]
    best = tried[losses.index(min(losses))]
    more = [again(p, _BY[best.support](p, sparsity, scope), best.block) for p in others]
    if best.block == "model":
        more.append(by_thresholding(first, sparsity, scope, best))
    tried, losses = [*tried, *more], losses + [judge(solution.values) for solution in more]
    return tried[losses.index(min(losses))]
