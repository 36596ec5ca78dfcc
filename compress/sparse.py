"""Training a module from scratch with fixed masks: what is masked is zero before, during and after.

A mask holds because it is applied after each step of the optimizer (`FixedMasks.hold`), which works with any
optimizer and training loop. Weights are those of linear layers and convolutions; biases, normalisation
layers and embeddings stay dense (Liu et al. 2022, arXiv 2202.02643, section 4).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

import torch
from torch import Tensor, nn

from compress.augmentation import Augmentation, augmented
from compress.errors import CalibrationError, PassError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

TrainingData = tuple[Tensor, Tensor] | Iterable[Sequence[Tensor]]
"""Inputs and labels of all samples, or batches (inputs..., labels) that can be gone through in each epoch."""


def prunable(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions by name, tied ones once.

    Args:
        ignore: paths of modules, or globs; everything below a path is left out, too.

    Raises:
        PassError: a pattern matches no module.
    """
    found: dict[str, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for pattern in ignore:
        if not any(_matches(name, pattern) for name in modules):
            raise PassError(f"ignore: {pattern!r} matches no module", expected="a module path or a glob")
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(module, _LAYERS) or not isinstance(weight, nn.Parameter):
            continue
        if not any(_matches(name, p) for p in ignore) and not any(weight is w for w in found.values()):
            found[f"{name}.weight" if name else "weight"] = weight
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


class FixedMasks:
    """Masks of some weights of a module, and what keeps them.

    Args:
        model: its weights are set to zero where masked, in place.
        masks: bool by name of a parameter, True = keep.

    Raises:
        PassError: there is no such parameter, or it has another shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                shape = list(parameters[name].shape) if name in parameters else "no parameter of the model"
                raise PassError(f"mask {name} is {list(mask.shape)}", expected=f"the shape of it: {shape}")
        self._removed = [(parameters[name], ~mask) for name, mask in masks.items()]
        self.apply()

    def apply(self) -> None:
        """Set what is masked to zero."""
        with torch.no_grad():
            for parameter, removed in self._removed:
                parameter.masked_fill_(removed.to(parameter.device), 0.0)

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the masks after each step of this optimizer from now on."""
        optimizer.register_step_post_hook(lambda *_: self.apply())


def train(
    model: nn.Module,
    data: TrainingData,
    masks: Mapping[str, Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    augment: Sequence[Augmentation],
    loss: Callable[[Tensor, Tensor], Tensor],
    seed: int,
) -> None:
    """Train in place under fixed masks; arguments as for `compress.sparse_train`."""
    fixed = FixedMasks(model, masks)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * _length(data, batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    fixed.hold(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for _ in range(epochs):
            for batch in _batches(data, batch_size, generator):
                *inputs, labels = batch
                value = loss(model(*augmented(inputs, augment, generator)), labels)
                if not math.isfinite(value.item()):
                    raise PassError(
                        f"the loss is {value.item()}", expected="a finite number", fix="lower learning_rate"
                    )
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
    model.eval()


def _length(data: TrainingData, batch_size: int) -> int:
    """Batches of an epoch."""
    if _whole(data):
        inputs, labels = data
        if len(inputs) != len(labels) or not len(inputs):
            raise CalibrationError(
                f"{len(inputs)} inputs and {len(labels)} labels", expected="as many of both"
            )
        return max(1, len(inputs) // batch_size)
    length = len(data) if isinstance(data, Sized) else 0
    if not length:
        raise CalibrationError(
            f"the training data is a {type(data).__name__}, and its length is unknown or 0",
            expected="inputs and labels, or a list or DataLoader of batches",
        )
    return length


def _batches(data: TrainingData, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    if not _whole(data):
        yield from (tuple(batch) for batch in data)
        return
    inputs, labels = data
    size = min(batch_size, len(inputs))
    order = torch.randperm(len(inputs), generator=generator)
    for rows in order[: len(order) // size * size].split(size):
        yield inputs[rows], labels[rows]


def _whole(data: TrainingData) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
