"""CIFAR-10 images as the published networks read them, and the ResNet-20 that most benchmarks compress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import compress
from bench.measure import Setup
from bench.models import resnet20_chita


@dataclass(frozen=True)
class Checkpoint:
    """Mean and standard deviation of the channels, as the images were normalised in training."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CHECKPOINTS = {
    "akamaster": Checkpoint((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "chita": Checkpoint((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


class Images(NamedTuple):
    """The lossless ones: images float32 ``[n, 3, 32, 32]``, normalised; labels int64 ``[n]``."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


def normalised(images: np.ndarray, checkpoint: Checkpoint) -> Tensor:
    """uint8 ``[n, 32, 32, 3]`` to what the model takes."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (checkpoint.mean, checkpoint.std))
    return ((x - mean) / std).contiguous()


def lossless(setup: Setup) -> Images:
    """4,000 training images and 1,000 test images, as `resnet20` reads them."""
    with np.load(setup.file("data/cifar10.npz")) as file:
        train, test = (normalised(file[f"{k}_images"], CHECKPOINTS["chita"]) for k in ("train", "test"))
        labels, test_labels = (torch.from_numpy(file[f"{k}_labels"]).long() for k in ("train", "test"))
    return Images(train, labels, test, test_labels)


def resnet20(setup: Setup) -> compress.Graph:
    """The ResNet-20 that CHITA's authors pruned, in eval mode, any batch, normalisation not folded."""
    model = resnet20_chita()
    source = setup.file("models/resnet20_cifar10_chita.safetensors")
    model.load_state_dict(load_file(source), strict=False)  # batch counters are not in the file
    return compress.capture(model.eval(), inputs=["1,3,32,32"])
