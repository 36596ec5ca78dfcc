"""A test kit, ours and our users': small models of every kind, and a check that two models agree.

from compress.testing import assert_close, MODELS
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.capture import capture
from compress.data import load_calibration
from compress.graph import Graph
from compress.numerics import sqnr_db
from compress.pipeline import Context


def assert_close(reference: Tensor, value: Tensor, *, db: float = 80.0) -> None:
    """Equal shapes and dtypes, and at least `db` decibels of signal over the difference.

    Raises:
        AssertionError: naming what differs.
    """
    assert reference.shape == value.shape, f"shape {list(value.shape)}, expected {list(reference.shape)}"
    assert reference.dtype == value.dtype, f"dtype {value.dtype}, expected {reference.dtype}"
    quality = sqnr_db(reference, value)
    assert quality >= db, f"SQNR {quality:.1f} dB, expected at least {db:.0f} dB"


class ConvNet(nn.Module):
    """Convolutions of every sort (strided, grouped, depthwise, "same"), batch norms, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
        self.bn2 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, padding="same", groups=2, dilation=2)
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(32, 48)
        self.bn3 = nn.BatchNorm1d(48)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.depthwise(x)).relu()
        x = self.grouped(x).relu().mean((2, 3))
        out: Tensor = self.fc2(self.bn3(self.fc1(self.dropout(x))).relu())
        return out


class Encoder(nn.Module):
    """Embedding, attention with a mask, layer norm, a dict as output."""

    def __init__(self, vocabulary: int = 96, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        bias = (1.0 - mask[:, None, :].to(x.dtype)) * -1e9
        scores = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5 + bias
        x = self.norm(x + scores.softmax(-1) @ self.v(x))
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return {"hidden": x, "pooled": x[:, 0].tanh()}


class TiedLM(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, vocabulary: int = 200, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mlp = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.mlp(self.embed(ids)).relu())
        return out


class Products(nn.Module):
    """Weights used by matmul and addmm instead of linear, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(24, 40))
        self.b = nn.Parameter(torch.randn(40, 16))
        self.c = nn.Parameter(torch.randn(16))
        self.d = nn.Parameter(torch.randn(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.c, (x @ self.a).relu(), self.b)
        return x @ self.d.t()


@dataclass(frozen=True)
class Example:
    """A model to test with: how to build it and how to make inputs for a batch of a size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    specs: tuple[str, ...]


def _tokens(batch: int) -> Tensor:
    return torch.arange(batch * 9).reshape(batch, 9) % 90


MODELS: dict[str, Example] = {
    "convnet": Example(ConvNet, lambda n: (_noise(n, 3, 12, 12),), ("1,3,12,12",)),
    "encoder": Example(
        Encoder,
        lambda n: (_tokens(n), torch.ones(n, 9, dtype=torch.int64)),
        ("ids:int64[1,seq=9]", "mask:int64[1,seq=9]"),
    ),
    "tied_lm": Example(TiedLM, lambda n: (_tokens(n),), ("ids:int64[1,seq=9]",)),
    "products": Example(Products, lambda n: (_noise(n, 24),), ("1,24",)),
}
"""Every kind of model in small."""


def make(name: str, seed: int = 0) -> nn.Module:
    """One of `MODELS` in eval mode, with weights and batch-norm statistics that are not the defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name].build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def calibrated_lm(build: Callable[[], nn.Module], vocabulary: int, windows: int) -> tuple[Graph, Context]:
    """A model of token ids, captured with the same weights each time, beside windows of 12 random tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    graph = capture(model, inputs=["ids:int64[1,seq=12]"])
    ids = torch.randint(0, vocabulary, (windows, 12), generator=torch.Generator().manual_seed(1))
    return graph, Context(graph, load_calibration(ids, inputs=graph.inputs))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))
