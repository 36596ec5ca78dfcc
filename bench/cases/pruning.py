"""Pruning baselines: budgets of the layer ratios, masks of one layer, and 2:4 sparsity with 4-bit weights.

One synthetic layer: Gaussian weights, inputs whose covariance falls like 1/k in a random basis, and four
input channels twenty times as large as the others, as transformers have them. Errors are relative, of the
output's energy, on rows that nothing was fitted to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from bench.measure import Measurement, Setup, measured, true
from compress.encoding import IntEncoding
from compress.passes.solvers.alps import alps
from compress.passes.solvers.compose import Inputs, Method, Scales, compose
from compress.passes.solvers.masks import keep_count, keep_n_of_m
from compress.passes.solvers.ratios import Ratios, densities, kept
from compress.passes.solvers.refit import refit_survivors
from compress.passes.solvers.scales import decoded
from compress.passes.solvers.scores import Score, score
from compress.passes.solvers.sparsegpt import sparsegpt

_OUTLIERS, _SIZE = 4, 20.0
_ENCODING = IntEncoding(4, 32, False)
_CONVNET = [
    (64, 3, 7, 7),
    *[(64, 64, 3, 3), (256, 64, 1, 1)] * 3,
    *[(128, 128, 3, 3), (512, 128, 1, 1)] * 4,
    *[(256, 256, 3, 3), (1024, 256, 1, 1)] * 6,
    *[(512, 512, 3, 3), (2048, 512, 1, 1)] * 3,
    (1000, 2048),
]
_DECODER = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)] * 32


def run(setup: Setup) -> list[Measurement]:
    """A narrow layer when quick."""
    layer = _layer(*((512, 128, 4096) if setup.quick else (4096, 256, 16384)))
    return [*_budgets(), *_masks(layer), *_compositions(layer)]


# -- ratios ----------------------------------------------------------------------------------------


def _budgets() -> Iterator[Measurement]:
    for ratios in get_args(Ratios):
        if ratios == "global":
            continue  # has no densities of its own
        worst, exact = 0.0, True
        for shapes in (_CONVNET, _DECODER):
            sizes = [math.prod(shape) for shape in shapes]
            outliers = [(7 * i % 11) / 100 for i in range(len(shapes))]
            for density in (0.05, 0.1, 0.5, 0.9):
                found = densities(shapes, density, ratios, outliers=outliers)
                mean = math.fsum(d * n for d, n in zip(found, sizes, strict=True)) / sum(sizes)
                worst = max(worst, abs(mean - density))
                if ratios != "owl":
                    counts = kept(shapes, 1 - density, ratios)
                    exact &= sum(counts) == sum(sizes) - round((1 - density) * sum(sizes))
        yield measured(f"{ratios}: budget missed at most by", worst, "", "<= 0.000001")
        yield true(f"{ratios}: counts are exact", exact)


# -- one layer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """weight ``[O, N]``; second moments ``[1, N, N]`` of rows to fit to, and of others."""

    weight: Tensor
    H: Tensor
    held_out: Tensor

    def error(self, values: Tensor) -> float:
        d = values - self.weight

        def energy(m: Tensor) -> float:
            return float(((m @ self.held_out[0]) * m).double().sum())

        return energy(d) / energy(self.weight)


def _layer(columns: int, rows: int, samples: int) -> _Layer:
    generator = torch.Generator().manual_seed(0)
    falling = torch.arange(1, columns + 1).unsqueeze(1).float()
    mix = torch.randn(columns, columns, generator=generator) / falling.sqrt() / math.sqrt(columns)
    mix[:, torch.randperm(columns, generator=generator)[:_OUTLIERS]] *= _SIZE
    moments = []
    for _ in range(2):
        H = torch.zeros(1, columns, columns)
        for _ in range(samples // 2048):
            x = torch.randn(2048, columns, generator=generator) @ mix
            H[0].addmm_(x.T, x, alpha=1 / samples)
        moments.append(H)
    return _Layer(torch.randn(rows, columns, generator=generator), moments[0], moments[1])


def _two_of_four(scores: Tensor) -> Tensor:
    return keep_n_of_m(scores, 2, 4)


def _masks(layer: _Layer) -> Iterator[Measurement]:
    """2:4 and 80 % by every score, refitted; SparseGPT and ALPS, which are no scores."""
    w, H = layer.weight, layer.H
    keep = w.numel() // 5
    patterns: dict[str, Callable[[Tensor], Tensor]] = {
        "2:4": _two_of_four,
        "80 %": lambda scores: keep_count(scores, keep),
    }
    for pattern, choose in patterns.items():
        errors = {}
        for kind in get_args(Score):
            mask = choose(score(kind, w, diag=H.diagonal(dim1=1, dim2=2), H=H))
            errors[kind] = layer.error(refit_survivors(w, mask, H))
            yield measured(f"{pattern} by {kind}: error as it is", layer.error(w * mask))
            yield measured(f"{pattern} by {kind}: error, refitted", errors[kind])
        n_m = (2, 4) if pattern == "2:4" else (0, 0)
        began = time.process_time()
        values, mask = sparsegpt(w, H, keep, n=n_m[0], m=n_m[1])
        spent = time.process_time() - began
        errors["sparsegpt"] = layer.error(refit_survivors(w, mask, H))
        yield measured(f"{pattern} by sparsegpt: error as it is", layer.error(values))
        yield measured(f"{pattern} by sparsegpt: error, refitted", errors["sparsegpt"])
        yield measured(f"{pattern} by sparsegpt: processor time", spent, "s")
        began = time.process_time()
        values = alps(w, H, choose)
        spent = time.process_time() - began
        errors["alps"] = layer.error(refit_survivors(w, values != 0, H))
        yield measured(f"{pattern} by alps: error as it is", layer.error(values))
        yield measured(f"{pattern} by alps: error, refitted", errors["alps"])
        yield measured(f"{pattern} by alps: processor time", spent, "s")
        order = sorted(errors, key=errors.__getitem__)
        yield true(f"{pattern}: alps is best, sparsegpt next", order[:2] == ["alps", "sparsegpt"])


def _compositions(layer: _Layer) -> Iterator[Measurement]:
    """2:4 and int4 in every order."""
    w, H = layer.weight, layer.H
    mask = alps(w, H, _two_of_four) != 0
    refitted = refit_survivors(w, mask, H)
    dense = _quantized(layer, w)
    orders = {
        "prune, refit, masked quantize": _quantized(layer, refitted),
        "prune, masked quantize": _quantized(layer, w * mask),
        "prune, refit, round to nearest": _quantized(layer, refitted, "rtn", "absmax"),
        "prune, refit, round with searched scales": _quantized(layer, refitted, "rtn"),
        "quantize, then prune": dense * (alps(dense, H, _two_of_four) != 0),
        "masks by magnitude, refit, masked quantize": _quantized(
            layer, refit_survivors(w, _two_of_four(w.abs()), H)
        ),
    }
    errors = {name: layer.error(values) for name, values in orders.items()}
    yield measured("int4 alone: error", layer.error(dense))
    for name, error in errors.items():
        yield measured(f"2:4 and int4, {name}: error", error)
    first = next(iter(orders))
    yield true(f"2:4 and int4: best is to {first}", min(errors, key=errors.__getitem__) == first)
    groups = (orders[first] != 0).unflatten(1, (-1, 4)).sum(-1)
    yield true("2:4 and int4: at most two of every four codes are not zero", bool((groups <= 2).all()))
    bits = 8 * _ENCODING.nbytes(*w.shape) / w.numel()
    yield measured("2:4 and int4: stored with all zeros", bits, "bits per weight")
    # half of the codes, and one bit for each weight to tell where they go
    yield measured("2:4 and int4: stored as sparse kernels take it", bits - 1, "bits per weight")


def _quantized(layer: _Layer, weight: Tensor, method: Method = "best", scales: Scales = "search") -> Tensor:
    inputs = Inputs(diag=layer.H.diagonal(dim1=1, dim2=2), H=layer.H)
    return decoded(compose(weight, inputs, _ENCODING, method=method, scales=scales).rounded, _ENCODING)
