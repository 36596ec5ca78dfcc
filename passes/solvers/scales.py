"""Round-to-nearest with scales (and zero points) chosen by weighted search.

For every group of columns the scale minimises the layer's output error to second order with the
input covariance taken as diagonal, ``sum_j h_j (w_j - s (q_j - z))^2`` with ``h_j = E[x_j^2]``:
clip ratios of the range are tried, then scale and codes are refitted in turn in closed form,
``s = sum h w (q - z) / sum h (q - z)^2``, as long as the error falls.

The symmetric grid ``-2^(b-1) .. 2^(b-1)-1`` is not symmetric in its range; the signed entry of largest
magnitude is mapped to ``-2^(b-1)``, so its scale may be negative. That costs nothing at run time and
halves the excess error of the usual ``max|w| / (2^(b-1)-1)`` rule at 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.encoding import IntEncoding
from compress.numerics import magnitude

_ROWS_AT_ONCE = 1 << 21
"""Weights worked on at a time: bounds the memory of the search to a few dozen MB."""


@dataclass(frozen=True)
class Rounded:
    """uint8 codes ``[O, N]``, float32 scales ``[O, groups]``, uint8 zero points ``[O, groups]`` or None."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def decoded(rounded: Rounded, encoding: IntEncoding) -> Tensor:
    """The values ``s (q - z)``, float32 ``[O, N]``."""
    columns = rounded.codes.shape[1]
    width = encoding.width(columns)
    scale = rounded.scales.repeat_interleave(width, dim=1)[:, :columns]
    if rounded.zero_points is None:
        return (rounded.codes.float() - encoding.zero) * scale
    zero = rounded.zero_points.float().repeat_interleave(width, dim=1)[:, :columns]
    return (rounded.codes.float() - zero) * scale


def round_to_nearest(weight: Tensor, encoding: IntEncoding) -> Rounded:
    """The plain rule, as baseline and for `scales: absmax`: the full range, no search.

    Symmetric: ``s = max|w| / (2^(b-1)-1)``; asymmetric: ``s = (max - min) / (2^b - 1)``.

    Args:
        weight: float ``[O, N]``.
    """
    groups = _grouped(weight.float(), encoding)
    if encoding.symmetric:
        scale = groups.abs().amax(-1) / (encoding.highest - encoding.zero)
        zero = torch.full_like(scale, encoding.zero)
    else:
        scale, zero = next(_asymmetric(groups, encoding, (1.0,)))
    scale = _nonzero(scale)
    return _finish(_codes(groups, scale, zero, encoding), scale, zero, encoding, weight.shape[1])


def search_scales(weight: Tensor, importance: Tensor | None, encoding: IntEncoding) -> Rounded:
    """Codes, scales and zero points of least weighted error (module docstring).

    Zeros stay exactly zero, so a pruned weight keeps its pattern.

    Args:
        weight: float ``[O, N]``.
        importance: ``h``, nonnegative float ``[N]`` or ``[O, N]``; None for all ones.
        encoding: the grid and the groups.
    """
    rows = max(1, _ROWS_AT_ONCE // max(1, weight.shape[1]))
    parts = []
    for start in range(0, weight.shape[0], rows):
        h = importance
        if h is not None:
            h = (h if h.ndim == 1 else h[start : start + rows]).float()
        parts.append(_search(weight[start : start + rows].float(), h, encoding))
    zeros = [p.zero_points for p in parts if p.zero_points is not None]
    return Rounded(
        torch.cat([p.codes for p in parts]),
        torch.cat([p.scales for p in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _search(weight: Tensor, importance: Tensor | None, encoding: IntEncoding) -> Rounded:
    original = _grouped(weight, encoding)
    # errors are squares: of values around 1, they stay within what float32 can tell apart
    size = magnitude(original)
    w = original / size
    h = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    h = h / magnitude(h)
    # a group whose inputs were never active would leave its scale undefined: give all a little weight
    h = h + 1e-6 * h.mean(-1, keepdim=True).clamp_min(1e-6)
    h = _grouped(h, encoding)
    ratios = _RATIOS[encoding.grid_bits or encoding.bits]
    candidates = _symmetric(w, encoding, ratios) if encoding.symmetric else _asymmetric(w, encoding, ratios)
    best_scale = best_zero = best_error = None
    for scale, zero in candidates:
        scale = _nonzero(scale)
        error = _error(w, h, scale, zero, encoding)
        if best_error is None or best_scale is None or best_zero is None:
            best_scale, best_zero, best_error = scale, zero, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    assert best_scale is not None and best_zero is not None and best_error is not None
    for _ in range(3):
        steps = _codes(w, best_scale, best_zero, encoding) - best_zero.unsqueeze(-1)
        refit = (h * w * steps).sum(-1) / (h * steps.square()).sum(-1).clamp_min(1e-30)
        refit = torch.where(refit == 0, best_scale, refit)
        error = _error(w, h, refit, best_zero, encoding)
        better = error < best_error
        best_scale = torch.where(better, refit, best_scale)
        best_error = torch.where(better, error, best_error)
    scale = _nonzero(best_scale * size.squeeze(-1))
    codes = _codes(original, scale, best_zero, encoding)
    return _finish(codes, scale, best_zero, encoding, weight.shape[1])


_RATIOS = {
    # clip ratios tried at each width: the fewer the levels, the more clipping can pay
    2: tuple(0.30 + 0.05 * i for i in range(17)),
    3: tuple(0.45 + 0.035 * i for i in range(18)),
    4: tuple(0.60 + 0.025 * i for i in range(19)),
    8: (0.97, 0.98, 0.99, 1.0),
}


def _symmetric(
    w: Tensor, encoding: IntEncoding, ratios: tuple[float, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    zero = torch.full_like(extreme, encoding.zero)
    if (
        encoding.levels > 128
    ):  # the one code more below zero is worth nothing, and TensorRT wants positive scales
        for ratio in ratios:
            yield extreme.abs() * ratio / (encoding.highest - encoding.zero), zero
        return
    for ratio in ratios:
        yield extreme * ratio / (encoding.lowest - encoding.zero), zero
        yield extreme * ratio / (encoding.highest - encoding.zero), zero


def _asymmetric(
    w: Tensor, encoding: IntEncoding, ratios: tuple[float, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    # the range includes 0, so that 0 is a code: padding and pruned weights stay exact
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    top = encoding.levels - 1
    for ratio in ratios:
        scale = (high - low) * ratio / top
        zero = torch.round(-low * ratio / _nonzero(scale)).clamp(0, top)
        yield scale, zero


def _grouped(matrix: Tensor, encoding: IntEncoding) -> Tensor:
    """``[O, N]`` -> ``[O, groups, width]``, zero padded."""
    columns = matrix.shape[1]
    groups, width = encoding.groups(columns), encoding.width(columns)
    padded = torch.nn.functional.pad(matrix, (0, groups * width - columns))
    return padded.reshape(-1, groups, width)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _codes(w: Tensor, scale: Tensor, zero: Tensor, encoding: IntEncoding) -> Tensor:
    codes = torch.round(w / scale.unsqueeze(-1)) + zero.unsqueeze(-1)
    return codes.clamp_(encoding.lowest, encoding.highest)


def _error(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, encoding: IntEncoding) -> Tensor:
    value = (_codes(w, scale, zero, encoding) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    return (h * (w - value).square_()).sum(-1)


def _finish(codes: Tensor, scale: Tensor, zero: Tensor, encoding: IntEncoding, columns: int) -> Rounded:
    flat = codes.flatten(1)[:, :columns].to(torch.uint8)
    return Rounded(flat, scale, None if encoding.symmetric else zero.to(torch.uint8))
