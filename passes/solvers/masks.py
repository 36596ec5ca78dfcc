"""Which weights stay, given a score for each: exact counts, ties broken by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def keep_n_of_m_channels(scores: Tensor, n: int, m: int) -> Tensor:
    """`keep_n_of_m` along the input channels, the second axis of a weight ``[O, I, *kernel]``."""
    # channels last, so that the M entries of a group are neighbours
    return keep_n_of_m(scores.movedim(1, -1), n, m).movedim(-1, 1)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """``"unstructured"`` -> None, ``"N:M"`` -> (N, M) where N of M stay.

    Raises:
        ValueError: anything else.
    """
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f'pattern {pattern!r} is neither "unstructured" nor "N:M" with N < M, such as "2:4"')
    return int(found[1]), int(found[2])
