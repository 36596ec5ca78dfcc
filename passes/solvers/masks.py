"""Which weights stay, given a score for each: exact counts, ties broken by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "layer"]


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the entries with the largest scores.

    Args:
        scores: any shape, finite.
        sparsity: fraction of entries to remove, in [0, 1]; exactly ``round(sparsity * numel)`` go.

    Returns:
        bool mask of the same shape, True = keep. Among equal scores the first positions are kept.
    """
    return keep_count(scores, scores.numel() - round(sparsity * scores.numel()))


def keep_count(scores: Tensor, keep: int) -> Tensor:
    """Keep the `keep` entries with the largest scores; otherwise as `keep_largest`."""
    flat = scores.flatten()
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if keep == 0:
        return mask.view(scores.shape)
    threshold = torch.kthvalue(flat, flat.numel() - keep + 1).values
    above = flat > threshold
    tied = (flat == threshold).nonzero().flatten()[: keep - int(above.sum())]
    mask = above
    mask[tied] = True
    return mask.view(scores.shape)


def keep_largest_of(scores: Sequence[Tensor], sparsity: float, scope: Scope) -> tuple[Tensor, ...]:
    """`keep_largest` of several tensors: of all entries together ("global"), or of each tensor ("layer").

    Args:
        scores: any shapes, finite, one dtype.
        sparsity: as there.
        scope: what the fraction is of.

    Returns:
        bool masks of the same shapes, True = keep.
    """
    if scope == "layer" or not scores:
        return tuple(keep_largest(s, sparsity) for s in scores)
    joint = keep_largest(torch.cat([s.flatten() for s in scores]), sparsity)
    parts = torch.split(joint, [s.numel() for s in scores])
    return tuple(part.view_as(s) for part, s in zip(parts, scores, strict=True))


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` largest of every `m` consecutive entries of the last axis.

    Args:
        scores: ``[..., K]`` with K a multiple of `m`.

    Returns:
        bool mask ``[..., K]``, True = keep; exactly `n` in every group, the first among equals.
    """
    if scores.shape[-1] % m:
        raise ValueError(f"last axis is {scores.shape[-1]}, not a multiple of {m}")
    groups = scores.reshape(*scores.shape[:-1], -1, m)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, order[..., :n], True)
    return mask.flatten(-2)


@dataclass(frozen=True)
class Pattern:
    """Which sets of zeros a weight ``[O, I, *kernel]`` may have.

    Input channels are what sparse kernels take as neighbours; for a convolution, at each kernel position.

    Attributes:
        n, m: of every `m` consecutive input channels exactly `n` stay; 0 where that is not asked for.
        rows, columns: blocks of so many output by input channels stay or go whole; 1 x 1 is unstructured.
    """

    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros, where the pattern fixes it."""
        return 1 - self.n / self.m if self.m else None

    @property
    def unit(self) -> int:
        """Weights that go together."""
        return self.rows * self.columns

    def misfit(self, shape: Sequence[int]) -> str:
        """Why a weight cannot have this pattern; empty if it can."""
        if self.m and shape[1] % self.m:
            return f"{shape[1]} input channels are no multiple of {self.m}"
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"{shape[0]} x {shape[1]} channels are no multiple of {self.rows}x{self.columns}"
        return ""

    def ranked(self, scores: Tensor) -> Tensor:
        """Scores of what stays or goes whole: of weights, or of blocks, the root of the sum of squares.

        Args:
            scores: float ``[O, I, *kernel]``, not negative.

        Returns:
            any shape.
        """
        if self.unit == 1:
            return scores
        blocks = channels_last(scores).unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        # the squares of very small numbers do not fit float32
        return blocks.double().square().sum((1, 3)).sqrt().to(scores.dtype)

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """What stays, by rank.

        Args:
            scores: as for `ranked`.
            keep: number of weights, or blocks of them; N:M has its own.

        Returns:
            bool of the shape of `scores`, True = keep.
        """
        if self.m:
            # channels last, so that the M entries of a group are neighbours
            return keep_n_of_m(scores.movedim(1, -1), self.n, self.m).movedim(-1, 1)
        kept = keep_count(self.ranked(scores), keep)
        if self.unit == 1:
            return kept
        whole = kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return channels_first(whole, scores.shape)


def channels_last(weight: Tensor) -> Tensor:
    """``[O, I, *kernel]`` as the matrix ``[O, *kernel * I]``: input channels are neighbours."""
    return weight.movedim(1, -1).flatten(1)


def channels_first(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `channels_last`, to a weight of this shape."""
    rows, channels, *kernel = shape
    return matrix.reshape(rows, *kernel, channels).movedim(-1, 1)


def parse_pattern(text: str) -> Pattern:
    """``"unstructured"``, ``"N:M"`` (N of M stay) or ``"block:RxC"``.

    Raises:
        ValueError: anything else.
    """
    if text == "unstructured":
        return Pattern()
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(found[1]) < int(found[2]):
        return Pattern(n=int(found[1]), m=int(found[2]))
    if (found := re.fullmatch(r"block:(\d+)x(\d+)", text)) and int(found[1]) and int(found[2]):
        return Pattern(rows=int(found[1]), columns=int(found[2]))
    raise ValueError(
        f'pattern {text!r} is neither "unstructured" nor "N:M" with N < M, such as "2:4", '
        'nor "block:RxC", such as "block:1x4"'
    )
