"""The demo's network, its training, and its metric, on scikit-learn's handwritten digits (8x8, real)."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST = 360
"""Of the 1,797 digits, those that training never sees."""


def build() -> nn.Module:
    """A CNN of about 160,000 parameters, untrained. Input ``[batch, 1, 8, 8]``, output 10 logits."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def digits(part: str) -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` about -1..1 and labels ``[n]`` of the "train" or "test" part; a fixed split."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:TEST] if part == "test" else order[TEST:]
    return images[chosen], labels[chosen]


def accuracy(model: nn.Module) -> float:
    """Percent of the test digits that a model gets right: the metric the demo gives to `--eval`."""
    images, labels = digits("test")
    return 100 * float((model(images).argmax(1) == labels).double().mean())


def train(epochs: int = 12, batch: int = 64) -> nn.Module:
    """Train from scratch: Adam, one-cycle learning rate, shifts by up to a pixel; seeded."""
    torch.manual_seed(0)
    model = build()
    images, labels = digits("train")
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for rows in order.split(batch)[: len(labels) // batch]:
            across, down = (int(s) for s in torch.randint(-1, 2, (2,)))
            shifted = torch.roll(
                nn.functional.pad(images[rows], (1, 1, 1, 1), value=-1), (down, across), (2, 3)
            )
            loss = nn.functional.cross_entropy(model(shifted[..., 1:-1, 1:-1]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
