"""Images changed by chance in what does not change what they show, for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compress.errors import PassError

Augmentation = Literal["crop", "flip", "color", "cutmix"]


def augmented(
    inputs: Sequence[Tensor], kinds: Sequence[Augmentation], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Images changed by chance, each in its own way.

    - flip: mirrored, one in two.
    - crop: moved by up to an eighth of their size (He et al. 2016, section 4.2). What that uncovers is zero,
      which is the mean of images normalised as usual.
    - color: each channel times 0.9 to 1.1, plus -0.1 to 0.1 of its spread.
    - cutmix: one in two gets a rectangle of another one, of an area drawn evenly from nothing to all (Yun et
      al. 2019, section 3.1). Labels are not mixed: this is for learning what the original says of the images.

    Args:
        inputs: images are float ``[B, C, H, W]``; others stay as they are.
        kinds: what to do; done in the order above.
        generator: of chance.

    Raises:
        PassError: there is no such kind, or there are no images; or images would mix, and other inputs not.
    """
    if unknown := set(kinds) - set(_STEPS):
        raise PassError(f"augment: {min(unknown)}", expected=", ".join(_STEPS))
    if kinds and not any(is_images(t) for t in inputs):
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in inputs)
        raise PassError(f"augment, and the model reads {shapes}", expected="images, float [B, C, H, W]")
    if "cutmix" in kinds and len(inputs) > 1:
        raise PassError(
            f"augment: cutmix, and the model reads {len(inputs)} inputs",
            expected="images alone: parts of several samples have no second input in common",
        )
    steps = [step for kind, step in _STEPS.items() if kind in kinds]
    return tuple(_after(steps, t, generator) if is_images(t) else t for t in inputs)


def is_images(x: Tensor) -> bool:
    """Whether a tensor has the form of images, float ``[B, C, H, W]``."""
    return x.ndim == 4 and x.is_floating_point()


_Step = Callable[[Tensor, torch.Generator], Tensor]


def _after(steps: Sequence[_Step], x: Tensor, generator: torch.Generator) -> Tensor:
    for step in steps:
        x = step(x, generator)
    return x


def _flip(x: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def _crop(x: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = x.shape
    down, right = height // 8, width // 8
    padded = nn.functional.pad(x, (right, right, down, down))
    tops = torch.randint(0, 2 * down + 1, (count,), generator=generator)
    lefts = torch.randint(0, 2 * right + 1, (count,), generator=generator)
    rows = (tops[:, None] + torch.arange(height))[:, :, None]
    columns = (lefts[:, None] + torch.arange(width))[:, None, :]
    moved = padded.movedim(1, -1)[torch.arange(count)[:, None, None], rows, columns]
    return moved.movedim(-1, 1).contiguous()


def _color(x: Tensor, generator: torch.Generator) -> Tensor:
    factor, offset = (0.2 * torch.rand(2, *x.shape[:2], 1, 1, generator=generator) - 0.1).to(x.dtype)
    return x * (1 + factor) + offset * x.std((0, 2, 3), correction=0, keepdim=True)


def _cutmix(x: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = x.shape
    others = torch.randperm(count, generator=generator)
    mixed = torch.rand(count, generator=generator) < 0.5
    side = torch.rand(count, generator=generator).sqrt()
    along = [
        (_between(side * n, torch.rand(count, generator=generator) * n, n)) & mixed[:, None]
        for n in (height, width)
    ]
    inside = along[0][:, None, :, None] & along[1][:, None, None, :]
    return torch.where(inside, x[others], x)


def _between(length: Tensor, middle: Tensor, size: int) -> Tensor:
    """Bool ``[B, size]``: the pixels within half a length of the middle."""
    return (torch.arange(size) + 0.5 - middle[:, None]).abs() < length[:, None] / 2


_STEPS: dict[Augmentation, _Step] = {"flip": _flip, "crop": _crop, "color": _color, "cutmix": _cutmix}
