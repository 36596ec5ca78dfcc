"""How long the weight solvers take on one layer, and what they leave of its output error.

    python bench/solvers.py [--size 1024] [--rows 16384] [--bits 4]

Synthetic: Gaussian weights ``[size, size]``, inputs whose covariance falls like 1/k, x~ = x and a tenth of
noise. Seconds are processor time of this process. The error is that of the output on the same rows, against
plain rounding. With ``--raw`` GPFQ is also run on the samples themselves.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor

from compress.encoding import IntEncoding
from compress.passes.solvers.compose import Inputs, Method, compose
from compress.passes.solvers.gpfq import gpfq, gpfq_samples
from compress.passes.solvers.grids import MidTread
from compress.passes.solvers.scales import decoded
from compress.passes.solvers.targets import Moments

_CHUNK = 4096


@click.command()
@click.option("--size", default=1024, show_default=True)
@click.option("--rows", default=16384, show_default=True, help="Rows of calibration data.")
@click.option("--bits", default=4, show_default=True)
@click.option("--raw", is_flag=True, help="Also GPFQ on the samples: much slower.")
def main(size: int, rows: int, bits: int, raw: bool) -> None:
    """Time every method on one layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    mix = torch.randn(size, size, generator=generator) / torch.arange(1, size + 1).unsqueeze(1)

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, size, generator=generator) @ mix
        return x, x + 0.1 * torch.randn(count, size, generator=generator) @ mix

    H, G, K = (torch.zeros(1, size, size) for _ in range(3))
    parts: list[Moments] = []
    spent = 0.0
    for start in range(0, rows, _CHUNK):
        x, x_tilde = inputs(min(_CHUNK, rows - start))
        began = time.process_time()
        H[0].addmm_(x_tilde.T, x_tilde, alpha=1 / rows)
        G[0].addmm_(x_tilde.T, x, alpha=1 / rows)
        spent += time.process_time() - began
        K[0].addmm_(x.T, x, alpha=1 / rows)
        if len(parts) < 2:  # two disjoint parts to choose the target on
            parts.append(Moments(*(m.unsqueeze(0) / len(x) for m in (x_tilde.T @ x_tilde, x_tilde.T @ x))))
    click.echo(f"{'statistics':12}{spent:8.2f} s")
    data = Inputs(H.diagonal(dim1=1, dim2=2), H, G, parts[0], parts[-1])
    encoding = IntEncoding(bits, 32, False)
    worst = 0.0
    methods: tuple[Method, ...] = ("rtn", "descent", "gpfq", "gptq", "best")
    for method in methods:
        began = time.process_time()
        found = compose(weight, data, encoding, method=method)
        spent = time.process_time() - began
        q = decoded(found.rounded, encoding)
        error = float((weight @ K[0] * weight - 2 * (q @ G[0] * weight) + q @ H[0] * q).double().sum())
        worst = worst or error
        click.echo(f"{method:12}{spent:8.2f} s   error {error / worst:.4f}")
    if raw:
        x, x_tilde = inputs(rows)
        grid = MidTread.of_layer(weight, bits)
        slow = _seconds(lambda: gpfq_samples(weight, x, x_tilde, grid))
        H, G = (x_tilde.T @ x_tilde)[None], (x_tilde.T @ x)[None]
        fast = _seconds(lambda: gpfq(weight, H, grid, G=G))
        click.echo(f"GPFQ on samples {slow:.2f} s, on moments {fast:.3f} s: {slow / fast:.0f}x")
    click.echo(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def _seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
