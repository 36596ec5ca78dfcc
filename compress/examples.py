"""Samples of the calibration data: to capture with, where the user gives no others, and to verify with."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data import CalibrationData, load_calibration
from compress.errors import CalibrationError
from compress.graph import Graph
from compress.hf import causal_lm_folder
from compress.kv_cache import has_cache

_LABELS = ("labels", "label", "y", "targets", "target")


def described(source: object, kv_cache: bool | None) -> bool:
    """Whether the model itself says what goes in, so that no sample is needed to capture it.

    A graph does, and a model with a key-value cache.
    """
    if isinstance(source, Graph) or kv_cache:
        return True
    return kv_cache is None and isinstance(source, str | Path) and causal_lm_folder(Path(source))


def to_capture_with(
    source: object, example_inputs: Any, inputs: Sequence[Any], calibration: Any, kv_cache: bool | None
) -> tuple[Any, Any]:
    """Example inputs, those given or `first_sample` where nothing else says what goes in, and the data."""
    if example_inputs is None and not inputs and calibration is not None and not described(source, kv_cache):
        return first_sample(calibration, source)
    return example_inputs, calibration


def first_sample(calibration: Any, source: object) -> tuple[Any, Any]:
    """Example inputs, and the calibration data with nothing taken away from it.

    Args:
        calibration: as the user gave it: an iterable of items, or a path of arrays.
        source: the model, where it is a module: its signature tells inputs from labels.

    Returns:
        (example inputs or None if this kind of data cannot give them, calibration).
    """
    if isinstance(calibration, str | Path):
        return _from_file(Path(calibration), source), calibration
    if isinstance(calibration, CalibrationData):
        return next(iter(calibration)).inputs, calibration
    if isinstance(calibration, Mapping):
        # all samples at once, of which the model is captured, and checked after every pass, on two
        return _inputs({k: _head(v) for k, v in calibration.items()}, source), calibration
    if isinstance(calibration, Tensor | np.ndarray) or not isinstance(calibration, Iterable):
        return _inputs(_head(calibration), source), calibration
    iterator = iter(calibration)
    try:
        item = next(iterator)
    except StopIteration:
        raise CalibrationError("the calibration data is empty", expected="at least one sample") from None
    if iterator is calibration:  # a generator: what was taken must be put back
        calibration = itertools.chain([item], iterator)
    return _inputs(item, source), calibration


def read_calibration(
    source: Any,
    reference: Graph,
    tokenizer: str | Path | None,
    samples: int,
    normalize: tuple[Sequence[float], Sequence[float]] | None,
    seed: int,
) -> CalibrationData | None:
    """As `load_calibration`, for a model that may know its tokenizer; None for no data."""
    if source is None or isinstance(source, CalibrationData):
        return source
    return load_calibration(
        source,
        inputs=reference.inputs,
        tokenizer=tokenizer or reference.meta.get("tokenizer"),
        samples=samples,
        normalize=normalize,
        seed=seed,
    )


def some_samples(data: CalibrationData | None, reference: Graph) -> list[tuple[Tensor, ...]]:
    """Up to 128 samples to verify with, eight at a time: outputs can be much larger than inputs.

    Of a language model 16, one at a time.
    """
    batches: list[tuple[Tensor, ...]] = []
    every = all(spec.dynamic and spec.dynamic[0] == (0, "batch") for spec in reference.inputs)
    size = 1 if has_cache(reference.inputs) else 8
    for batch in data or ():
        parts = [t.split(size) for t in batch.inputs] if every else [(t,) for t in batch.inputs]
        batches.extend(zip(*parts, strict=True))
        if len(batches) >= 16:
            break
    return batches[:16]


def _head(value: Any) -> Any:
    """The first two samples of an array; anything else as it is."""
    return value[:2] if isinstance(value, Tensor | np.ndarray) and value.ndim else value


def _inputs(item: Any, source: object) -> Any:
    if isinstance(item, Tensor | np.ndarray):
        return (torch.as_tensor(item),)
    if isinstance(item, Mapping):
        return {k: _as_tensor(v, f"{k!r}") for k, v in item.items() if k not in _LABELS or _takes(source, k)}
    if isinstance(item, tuple | list):
        tensors = [_as_tensor(v, f"number {i + 1}") for i, v in enumerate(item)]
        return tuple(tensors[: _arity(source, len(tensors))])
    inputs = getattr(item, "inputs", None)
    if isinstance(inputs, tuple):
        return inputs
    raise CalibrationError(
        f"the first calibration item is a {type(item).__name__}",
        expected="a tensor, a tuple of tensors, or a dict of tensors by input name",
    )


def _as_tensor(value: Any, which: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"input {which} of the first calibration item is a {type(value).__name__}",
            expected="a tensor for each input",
            fix="wrap the model in a module whose forward() takes tensors only",
        ) from None


def _from_file(path: Path, source: object) -> Any:
    """The first two samples of a file of arrays; None for anything else."""
    try:
        head = path.open("rb").read(8)
    except OSError:
        return None  # a folder, a callable, or missing: told apart, and explained, by load_calibration
    arrays: dict[str, Tensor] = {}
    if head[:6] == b"\x93NUMPY":
        arrays = {"": torch.as_tensor(np.array(np.load(path, mmap_mode="r", allow_pickle=False)[:2]))}
    elif head[:2] == b"PK":
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: torch.as_tensor(archive[name][:2]) for name in archive.files}
    arrays = {k: v for k, v in arrays.items() if k not in _LABELS or _takes(source, k)}
    if len(arrays) == 1:
        return (_model_dtype(next(iter(arrays.values()))),)
    return {k: _model_dtype(v) for k, v in arrays.items()} or None


def _model_dtype(value: Tensor) -> Tensor:
    """Arrays come as float64 and int32 where models want float32 and int64."""
    if value.dtype == torch.float64:
        return value.float()
    return value.long() if value.dtype == torch.int32 else value


def _parameters(source: object) -> list[inspect.Parameter] | None:
    if not isinstance(source, torch.nn.Module):
        return None
    return list(inspect.signature(source.forward).parameters.values())


def _takes(source: object, name: str) -> bool:
    parameters = _parameters(source)
    return parameters is not None and any(p.name == name for p in parameters)


def _arity(source: object, given: int) -> int:
    """How many of the given tensors are inputs; one more than forward() takes are labels."""
    parameters = _parameters(source)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return given
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(given, len(positional))
