"""How far two tensors are apart. Every figure states its unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _compared(reference: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both in double precision; where both hold the same infinity (a mask), it counts as a plain 0."""
    if reference.is_complex() and value.is_complex():
        reference, value = torch.view_as_real(reference), torch.view_as_real(value)
    r, v = reference.detach().double(), value.detach().double()
    same = torch.isinf(r) & (r == v)
    return r.masked_fill(same, 0.0), v.masked_fill(same, 0.0)


def _decibels(signal: float, noise: float) -> float:
    if not (math.isfinite(noise) and math.isfinite(signal)):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum r^2 / sum (r - v)^2)``.

    Infinite for equal tensors; NaN anywhere, or an infinity in only one of them, gives ``-inf``, so that it
    can never pass for good.
    """
    r, v = _compared(reference, value)
    return _decibels(float(r.square().sum()), float((r - v).square().sum()))


def cosine(reference: Tensor, value: Tensor) -> float:
    """Mean cosine over the rows (last axis) of two tensors of equal shape; 1 for equal directions.

    A mean over rows, not one cosine of the flattened tensors: that would hide a bad row.
    """
    r, v = _compared(reference, value)
    if r.ndim == 0:
        r, v = r.reshape(1, 1), v.reshape(1, 1)
    r, v = r.reshape(-1, r.shape[-1]), v.reshape(-1, v.shape[-1])
    both_zero = (r.abs().amax(-1) == 0) & (v.abs().amax(-1) == 0)
    similarity = torch.nn.functional.cosine_similarity(r, v, dim=-1)
    return float(torch.where(both_zero, torch.ones_like(similarity), similarity).mean())


def max_abs(reference: Tensor, value: Tensor) -> float:
    """Largest absolute difference, in the tensors' own unit."""
    r, v = _compared(reference, value)
    return float((r - v).abs().max()) if r.numel() else 0.0


def top1_agreement(reference: Tensor, value: Tensor) -> float:
    """Fraction of rows (last axis) whose largest entry is at the same place."""
    return float((reference.argmax(-1) == value.argmax(-1)).double().mean())


def relative_error(reference: Tensor, value: Tensor) -> float:
    """``||r - v|| / ||r||``, a fraction; 0 for equal tensors.

    NaN anywhere, or an infinity in only one of them, gives ``inf``: as NaN it would be lost in a maximum.
    """
    r, v = _compared(reference, value)
    norm, difference = float(r.norm()), float((r - v).norm())
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm > 0 else difference


def magnitude(value: Tensor) -> Tensor:
    """A power of two as large as the largest ``|value|`` of each row: float32 ``[..., 1]`` for ``[..., N]``.

    Dividing by it rounds nothing, and brings values whose squares float32 cannot hold (weights of a dead
    filter, 1e-30) to around 1. It is 1 for a row of zeros.
    """
    exponent = torch.frexp(value.float().abs().amax(-1, keepdim=True)).exponent
    # 2^-126 is the smallest number float32 holds with all its digits
    return torch.exp2(exponent.clamp(-126, 127).float())


_AT_ONCE = 1 << 22
"""Elements that `Agreement` looks at in one go."""


class Agreement:
    """`sqnr_db`, `cosine`, `max_abs` and `top1_agreement` over many batches, in constant memory."""

    def __init__(self) -> None:
        self.noise = self.signal = self.largest = self.cosines = self.tops = 0.0
        self.rows = 0
        self.shape: tuple[int, ...] = ()

    def update(self, reference: Tensor, value: Tensor) -> None:
        """Add one batch; both tensors of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != value.shape:
            raise ValueError(f"shapes {list(reference.shape)} and {list(value.shape)} differ")
        width = reference.shape[-1] if reference.ndim else 1
        self.shape = tuple(reference.shape)
        if not reference.numel():
            return
        # in parts: the logits of a language model are large, and twice that in double precision
        at_once = max(1, _AT_ONCE // width)
        rows = zip(
            reference.reshape(-1, width).split(at_once), value.reshape(-1, width).split(at_once), strict=True
        )
        for before, after in rows:
            self.tops += top1_agreement(before, after) * len(before)
            r, v = _compared(before, after)
            self.noise += float((r - v).square().sum())
            self.signal += float(r.square().sum())
            self.largest = max(self.largest, max_abs(r, v))
            self.cosines += cosine(r, v) * len(r)
            self.rows += len(r)

    @property
    def sqnr_db(self) -> float:
        return _decibels(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        # nothing is equal to nothing
        return self.cosines / self.rows if self.rows else 1.0

    @property
    def top1(self) -> float:
        return self.tops / self.rows if self.rows else 1.0
