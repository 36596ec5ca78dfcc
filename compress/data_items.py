"""Calibration data from Python: items of any iterable, checked one by one and kept as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.data_checks import (
    Batch,
    as_labels,
    as_tensor,
    called,
    check_dtype,
    check_shape,
    check_sizes,
    fit,
    fixed_batch,
    match_names,
    too_few,
)
from compress.errors import CalibrationError
from compress.inputs import InputSpec


class ItemKeeper:
    """Collects items into batches; samples wait in `_group` until a batch is full or the next one differs."""

    def __init__(self, specs: tuple[InputSpec, ...], samples: int, batch_size: int, where: str) -> None:
        self._specs, self._left, self._where = specs, samples, where
        self._fixed = {spec.shape[0] for spec in specs if spec.symbol(0) is None}
        self._size = batch_size
        self._batches: list[Batch] = []
        self._group: list[Batch] = []
        self._form: object = None
        self._labelled: bool | None = None

    @property
    def wants_more(self) -> bool:
        return self._left > 0

    def add(self, item: Any, where: str) -> None:
        """Check one item and keep it.

        Raises:
            CalibrationError: names the item, the input, what it is and what was expected.
        """
        raw, labels = _parts(item, self._specs, where)
        places = [f"{where}, {called(spec, index)}" for index, spec in enumerate(self._specs)]
        tensors = [as_tensor(value, place) for value, place in zip(raw, places, strict=True)]
        single = all(
            tensor.ndim == len(spec.shape) - 1 for tensor, spec in zip(tensors, self._specs, strict=True)
        )
        if single:
            if self._fixed:
                self._size = fixed_batch(self._specs, self._where) or self._size
            tensors = [tensor.unsqueeze(0) for tensor in tensors]
        for tensor, spec, place in zip(tensors, self._specs, places, strict=True):
            check_dtype(tensor.dtype, spec, place)
            check_shape(tensor.shape, spec, place, any_count=single)
        inputs = tuple(
            fit(tensor, spec, place) for tensor, spec, place in zip(tensors, self._specs, places, strict=True)
        )
        check_sizes(inputs, self._specs, where)
        batch = Batch(inputs, _labels(labels, inputs[0].shape[0], single, f"{where}, labels"))
        if self._labelled not in (None, batch.labels is not None):
            with_or_without = (
                "labels, and earlier items had none" if batch.labels is not None else "no labels"
            )
            raise CalibrationError(
                f"{where} has {with_or_without}", expected="labels with every item or with none"
            )
        self._labelled = batch.labels is not None
        if single:
            self._add_sample(batch)
        else:
            self._close_group()
            batch = self._cut(batch)
            self._batches.append(batch)
            self._left -= batch.inputs[0].shape[0]

    def finish(self, items: int) -> list[Batch]:
        """All batches.

        Raises:
            CalibrationError: there were none.
        """
        waiting = len(self._group)
        self._close_group()
        if items == 0:
            raise CalibrationError(f"{self._where} gave no items", expected="at least one")
        if not self._batches:
            raise too_few(waiting, self._size, self._where)
        return self._batches

    def _add_sample(self, sample: Batch) -> None:
        every = sample.inputs if sample.labels is None else (*sample.inputs, sample.labels)
        form = [(tensor.shape, tensor.dtype) for tensor in every]
        if form != self._form:
            self._close_group()
            self._form = form
        self._group.append(sample)
        self._left -= 1
        if len(self._group) == self._size:
            self._close_group()

    def _close_group(self) -> None:
        group, self._group = self._group, []
        if not group or (self._fixed and len(group) != self._size):
            return
        columns = zip(*(sample.inputs for sample in group), strict=True)
        labels = [sample.labels for sample in group if sample.labels is not None]
        self._batches.append(
            Batch(tuple(torch.cat(column) for column in columns), torch.cat(labels) if labels else None)
        )

    def _cut(self, batch: Batch) -> Batch:
        """The first samples of a batch that exceeds the number asked for, where axis 0 is surely samples."""
        count = batch.inputs[0].shape[0]
        if count <= self._left or len({spec.symbol(0) for spec in self._specs}) != 1 or self._fixed:
            return batch
        labels = batch.labels[: self._left].clone() if batch.labels is not None else None
        return Batch(tuple(tensor[: self._left].clone() for tensor in batch.inputs), labels)


def _parts(item: Any, specs: Sequence[InputSpec], where: str) -> tuple[list[Any], Any]:
    """The inputs and the labels (or None) of one item, unchecked."""
    values: list[Any]
    labels: Any = None
    if isinstance(item, Batch):
        values, labels = list(item.inputs), item.labels
    elif isinstance(item, Mapping):
        names, label = match_names(list(item), specs, where)
        return [item[name] for name in names], item[label] if label is not None else None
    elif isinstance(item, (tuple, list)):
        longer = len(item) == len(specs) + 1
        values, labels = list(item[: len(specs)] if longer else item), item[-1] if longer else None
    else:
        values = [item]
    if len(values) != len(specs):
        shown = ", ".join(called(spec, index) for index, spec in enumerate(specs))
        raise CalibrationError(
            f"{where} has {len(values)} tensors",
            expected=f"{len(specs)} ({shown}), and possibly the labels after them",
        )
    return values, labels


def _labels(value: Any, count: int, single: bool, where: str) -> Tensor | None:
    if value is None:
        return None
    labels = as_labels(value, where)
    if single or (labels.ndim == 0 and count == 1):
        return labels.unsqueeze(0)
    if labels.ndim == 0 or labels.shape[0] != count:
        raise CalibrationError(
            f"{where} has shape {list(labels.shape)}", expected=f"one label for each of {count} samples"
        )
    return labels


def copied(batch: Batch) -> Batch:
    """The same batch in memory of its own."""
    labels = batch.labels.clone() if batch.labels is not None else None
    return Batch(tuple(tensor.clone() for tensor in batch.inputs), labels)
