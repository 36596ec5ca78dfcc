"""Small networks trained here on the data at hand, and kept in build/bench/trained.

Lybrand & Saab (2021, "A Greedy Algorithm for Quantizing Neural Networks", section 6): an MLP 784-500-300-10
on MNIST, and a CNN 2x32C3-P-2x64C3-P-2x128C3-P-128FC-10 on CIFAR-10; batch normalisation after each ReLU.
Training is shorter than theirs, so the float accuracy is reported with every result. `depthwise` is in the
manner of MobileNetV2 (Sandler et al. 2018).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_KEPT = Path(__file__).resolve().parent.parent / "build" / "bench" / "trained"


def mlp() -> nn.Sequential:
    """Input ``[batch, 784]``, logits ``[batch, 10]``."""
    layers: list[nn.Module] = []
    for before, after in ((784, 500), (500, 300)):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.BatchNorm1d(after)]
    return nn.Sequential(*layers, nn.Linear(300, 10))


def cnn() -> nn.Sequential:
    """Input ``[batch, 3, 32, 32]``, logits ``[batch, 10]``."""
    layers: list[nn.Module] = []
    before = 3
    for width, dropout in ((32, 0.2), (64, 0.3), (128, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
            before = width
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    layers += [nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.BatchNorm1d(128), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(128, 10))


class _Inverted(nn.Module):
    """Expand three times, depthwise 3x3, project; a residual where shapes allow."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        wide = 3 * before
        self.residual = before == after and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def depthwise() -> nn.Sequential:
    """Input ``[batch, 3, 32, 32]``, logits ``[batch, 10]``."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()]
    before = 24
    for after, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 1)):
        layers.append(_Inverted(before, after, stride))
        before = after
    layers += [nn.Conv2d(before, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def mnist(file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images ``[60000, 784]`` float32, their labels, test images and labels; mean 0, deviation 1."""
    data = np.load(file)

    def images(name: str) -> Tensor:
        return (torch.from_numpy(data[name]).float().flatten(1) / 255 - 0.1307) / 0.3081

    def labels(name: str) -> Tensor:
        return torch.from_numpy(data[name]).long()

    return images("train_images"), labels("train_labels"), images("test_images"), labels("test_labels")


def cifar(lossless: Path, jpeg: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images ``[14000, 3, 32, 32]`` (4,000 of them lossless), labels, 1,000 lossless test images."""
    first, second = np.load(lossless), np.load(jpeg)

    def images(*arrays: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.concatenate(arrays)).permute(0, 3, 1, 2).float() / 255
        return ((x - 0.473) / 0.251).contiguous()

    def labels(*arrays: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).long()

    return (
        images(first["train_images"], second["train_images"]),
        labels(first["train_labels"], second["train_labels"]),
        images(first["test_images"]),
        labels(first["test_labels"]),
    )


def trained(
    build: Callable[[], nn.Sequential],
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int = 0,
) -> nn.Sequential:
    """Train with Adam and a one-cycle schedule, or take what an earlier run kept.

    Images with an axis of width are shifted by up to 2 pixels and mirrored.
    """
    batch, count = 128, len(images)
    kept = _KEPT / f"{build.__name__}-{count}-{epochs}-{seed}.pt"
    torch.manual_seed(seed)
    model = build()
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(count)[: count // batch * batch].view(-1, batch):
                x = images[rows]
                if x.ndim == 4:
                    x = _moved(x)
                loss = nn.functional.cross_entropy(model(x), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}.part")  # two cases may train the same one
    torch.save(model.state_dict(), temporary)
    temporary.replace(kept)
    return model.eval()


def _moved(x: Tensor) -> Tensor:
    mirrored = torch.rand(len(x)) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    down, right = (int(n) for n in torch.randint(0, 5, (2,)))
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    return padded[:, :, down : down + 32, right : right + 32]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return 100 * float((guesses == labels).double().mean())
