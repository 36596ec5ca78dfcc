"""Migration strengths against the output error of really rounded products."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.activations import DYNAMIC
from compress.passes.solvers.saturation import saturation_free
from compress.passes.solvers.smoothing import Smoothing, smoothing


def layer(seed: int, outlier: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 48, generator=generator)
    x[:, 5] *= outlier
    return x, torch.randn(24, 48, generator=generator)


def search(x: torch.Tensor, w: torch.Tensor) -> Smoothing:
    return smoothing(x.amin(0), x.amax(0), x.square().mean(0), w)


def measured(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> float:
    rounded = saturation_free(w * s, paired=False)
    decoded = (rounded.codes.float() - 128) * rounded.scales
    return float((DYNAMIC(x / s) @ decoded.T - x @ w.T).square().mean())


@given(st.integers(0, 40), st.sampled_from([1.0, 10.0, 60.0]))
def test_the_gain_is_real(seed: int, outlier: float) -> None:
    x, w = layer(seed, outlier)
    found = search(x, w)
    assert found.gain >= 1 and (found.scales > 0).all()
    plain, smooth = measured(x, w, torch.ones(48)), measured(x, w, found.scales)
    assert smooth <= 1.1 * plain
    assert 0.5 < (plain / smooth) / found.gain < 2


def test_outliers_are_what_it_is_for() -> None:
    x, w = layer(0, 60.0)
    found = search(x, w)
    assert found.gain > 10 and int(found.scales.argmax()) == 5
    assert (
        abs(found.error_before / (measured(x, w, torch.ones(48)) / (x @ w.T).square().mean()) ** 0.5 - 1)
        < 0.3
    )


def test_a_channel_that_never_fires_is_left_alone() -> None:
    x, w = layer(1, 10.0)
    x[:, 7] = 0
    assert float(search(x, w).scales[7]) == 1
