"""The weight solvers on one layer: GPFQ from moments beside GPFQ on samples, and what a large layer costs.

Synthetic: Gaussian weights, inputs whose covariance falls like 1/k, and ``x~ = x`` plus a tenth of noise.
Errors are those of the layer's output on the same rows.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure import Measurement, Setup, measured, true
from compress.encoding import IntEncoding
from compress.passes.solvers.compose import Inputs, Method, compose
from compress.passes.solvers.gpfq import gpfq, gpfq_samples
from compress.passes.solvers.grids import MidTread
from compress.passes.solvers.scales import decoded
from compress.passes.solvers.targets import Moments

_CHUNK = 4096
_ENCODING = IntEncoding(4, 32, False)


def run(setup: Setup) -> list[Measurement]:
    """Memory first, while this process is small; smaller layers when quick."""
    size, rows = (512, 8192) if setup.quick else (4096, 131072)
    found = list(_large(size, rows))
    found += _on_moments(128 if setup.quick else 256, 4096)
    found += _ladder(256 if setup.quick else 1024, 16384)
    return found


@dataclass(frozen=True)
class _Layer:
    weight: Tensor
    H: Tensor
    G: Tensor
    seconds: float
    """Spent on H and G."""
    parts: tuple[Moments, Moments]
    """Moments of two disjoint parts of the rows."""


def _inputs(mix: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, count, len(mix), generator=generator, dtype=mix.dtype)
    return noise[0] @ mix, (noise[0] + 0.1 * noise[1]) @ mix


def _mix(size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    falling = torch.arange(1, size + 1, dtype=dtype).unsqueeze(1)
    return torch.randn(size, size, generator=generator, dtype=dtype) / falling


def _layer(size: int, rows: int) -> _Layer:
    generator = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(size, size, generator=generator), _mix(size, generator)
    H, G = (torch.zeros(1, size, size) for _ in range(2))
    spent, parts = 0.0, []
    for start in range(0, rows, _CHUNK):
        x, x_tilde = _inputs(mix, min(_CHUNK, rows - start), generator)
        began = time.perf_counter()
        H[0].addmm_(x_tilde.T, x_tilde, alpha=1 / rows)
        G[0].addmm_(x_tilde.T, x, alpha=1 / rows)
        spent += time.perf_counter() - began
        if len(parts) < 2 and size <= 1024:
            parts.append(Moments((x_tilde.T @ x_tilde)[None] / len(x), (x_tilde.T @ x)[None] / len(x)))
    return _Layer(weight, H, G, spent, (parts[0], parts[-1]) if parts else (Moments(H, G), Moments(H, G)))


def _large(size: int, rows: int) -> Iterator[Measurement]:
    what = f"layer {size}x{size}, {rows:,} rows"
    before = _peak()
    layer = _layer(size, rows)
    grid = MidTread.of_layer(layer.weight, 4)
    solved = _seconds(lambda: gpfq(layer.weight, layer.H, grid, G=layer.G))
    yield measured(f"{what}: H and G", layer.seconds, "s")
    yield measured(f"{what}: GPFQ", solved, "s", "<= 60")
    full = size == 4096
    yield measured(f"{what}: peak memory, all told", _peak() / 1e9, "GB", "<= 2" if full else "")
    yield measured(f"{what}: of that before it began", before / 1e9, "GB")


def _on_moments(size: int, samples: int) -> Iterator[Measurement]:
    """The two forms in float64 give the same codes; their times are in float32, moments counted."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x, x_tilde = _inputs(_mix(size, generator, torch.float64), samples, generator)
    grid = MidTread.of_layer(weight, 4)

    def moments(x: Tensor, x_tilde: Tensor) -> tuple[Tensor, Tensor]:
        return (x_tilde.T @ x_tilde).unsqueeze(0), (x_tilde.T @ x).unsqueeze(0)

    H, G = moments(x, x_tilde)
    same = torch.equal(gpfq(weight, H, grid, G=G), gpfq_samples(weight, x, x_tilde, grid))
    what = f"{size} columns, {samples} samples"
    yield true(f"{what}: GPFQ on moments gives the codes of GPFQ on samples", same)
    weight, x, x_tilde = (t.float() for t in (weight, x, x_tilde))
    grid = MidTread.of_layer(weight, 4)

    def quick() -> None:
        H, G = moments(x, x_tilde)
        gpfq(weight, H, grid, G=G)

    slow = [_seconds(lambda: gpfq_samples(weight, x, x_tilde, grid)) for _ in range(3)]
    fast = [_seconds(quick) for _ in range(9)]
    ratio = sorted(slow)[1] / sorted(fast)[4]
    yield measured(f"{what}: time on samples", sorted(slow)[1], "s")
    yield measured(f"{what}: time on samples / on moments", ratio, "", ">= 30" if size >= 256 else "")


def _ladder(size: int, rows: int) -> Iterator[Measurement]:
    layer = _layer(size, rows)
    weight, H, G = layer.weight, layer.H, layer.G
    data = Inputs(H.diagonal(dim1=1, dim2=2), H, G, *layer.parts)
    methods: tuple[Method, ...] = ("rtn", "descent", "gpfq", "gptq", "best")
    errors: dict[str, float] = {}
    wanted = weight.double() @ G[0].double().T
    for method in methods:
        began = time.perf_counter()
        found = compose(weight, data, _ENCODING, method=method)
        seconds = time.perf_counter() - began
        q = decoded(found.rounded, _ENCODING).double()
        # E |W x - Q x~|^2 but for what does not depend on Q
        errors[method] = float(((q @ H[0].double() - 2 * wanted) * q).sum())
        yield measured(f"layer {size}x{size}, int4 g32: {method}", seconds, "s")
    least = -float((wanted @ torch.linalg.pinv(H[0].double()) * wanted).sum())  # of any real Q
    for method in methods:
        share = (errors[method] - least) / (errors["rtn"] - least)
        yield measured(f"layer {size}x{size}, int4 g32: {method}, avoidable error / that of rtn", share)
    yield true("rtn > gpfq > best", errors["rtn"] > errors["gpfq"] > errors["best"])


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _peak() -> int:
    """Bytes; the most this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
