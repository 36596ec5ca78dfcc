"""What all calibration data must satisfy before a model sees it: count, names, dtype, shape, values.

Conversions happen only where no value can change its meaning: between float widths, and between integer
widths where every value fits. Integers never become floats or the reverse: uint8 pixels fed to a network that
was trained on normalised floats would calibrate it on nonsense without any error.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.inputs import InputSpec

LABEL_NAMES = ("labels", "label", "targets", "y")


@dataclass(frozen=True)
class Batch:
    """One calibration batch.

    Args:
        inputs: one tensor per model input, in the model's order, on the CPU, of the spec's dtype.
        labels: int64, float or bool tensor whose first axis is the batch; None where the source has none.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None


def as_tensor(value: Any, where: str) -> Tensor:
    """A CPU tensor of its own memory from a tensor or a numpy array, in the nearest dtype torch has.

    Raises:
        CalibrationError: `value` is something else, is sparse, or holds objects, text or complex numbers.
    """
    if isinstance(value, Tensor):
        kind = "quantized" if value.is_quantized else "meta" if value.is_meta else ""
        kind = kind or ("" if value.layout == torch.strided else str(value.layout))
        kind = kind or ("complex" if value.is_complex() else "")
        if kind:
            raise CalibrationError(
                f"{where} is a {kind} tensor", expected="an ordinary dense tensor of real numbers"
            )
        return value.detach().to("cpu", copy=True).contiguous()
    if not isinstance(value, (np.ndarray, np.generic)):
        raise CalibrationError(
            f"{where} is a {type(value).__name__}", expected="a torch tensor or a numpy array"
        )
    return torch.from_numpy(native(value, where))


def native(value: Any, where: str) -> np.ndarray[Any, Any]:
    """A copy of a numpy array in a dtype that torch has: native byte order, no wide floats or unsigned words.

    Raises:
        CalibrationError: the array holds objects, text or complex numbers, or uint64 beyond int64.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        fix = "np.save(path, np.asarray(data, dtype=np.float32))" if array.dtype.kind == "O" else ""
        raise CalibrationError(
            f"{where} has dtype {array.dtype}", expected="floats, integers or bools", fix=fix
        )
    target = array.dtype.newbyteorder("=")
    if target.kind == "f" and target.itemsize > 8:
        target = np.dtype(np.float64)
    elif target.kind == "u" and target.itemsize > 1:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise CalibrationError(f"{where} has the value {array.max()}", expected="values that fit int64")
        target = np.dtype(np.int64)
    return np.array(array, dtype=target, order="C")


def as_labels(value: Any, where: str) -> Tensor:
    """Labels from a tensor, an array or a Python number; integers become int64, the rest keep their dtype.

    Raises:
        CalibrationError: not numbers, or not finite.
    """
    if isinstance(value, (bool, int, float)):
        value = torch.tensor(value)
    labels = as_tensor(value, where)
    if labels.dtype.is_floating_point:
        if not bool(torch.isfinite(labels).all()):
            raise CalibrationError(f"{where} holds NaN or infinity", expected="finite labels")
        return labels
    return labels if labels.dtype == torch.bool else labels.to(torch.int64)


def called(spec: InputSpec, index: int) -> str:
    """How an input is named in messages."""
    return f"input {spec.name!r}" if spec.name else f"input {index}"


def wanted(spec: InputSpec) -> str:
    """The spec as data must fit it, dynamic axes by name: "float32 of shape [batch, 3, 32, 32]"."""
    dims = ", ".join(str(spec.symbol(axis) or size) for axis, size in enumerate(spec.shape))
    return f"{spec.dtype_name} of shape [{dims}]"


def check_dtype(got: torch.dtype, spec: InputSpec, where: str) -> None:
    """Refuse dtypes that no conversion brings to the spec's without changing what the numbers mean.

    Raises:
        CalibrationError: integers or bools for floats, floats for integers, complex for anything.
    """
    want = spec.dtype
    if got == want or (got.is_floating_point and want.is_floating_point):
        return
    shown = str(got).removeprefix("torch.")
    if want.is_floating_point:
        fix = (
            "the model expects preprocessed floats: scale and normalise the data the way its training did, "
            "and give the floats"
        )
    elif got.is_floating_point:
        fix = "give the integers (token ids, for example); they are not rounded for you"
    elif got.is_complex:
        fix = ""
    else:
        return
    raise CalibrationError(f"{where} is {shown}", expected=wanted(spec), fix=fix)


def check_shape(shape: Sequence[int], spec: InputSpec, where: str, *, any_count: bool = False) -> None:
    """Compare a shape with the spec: the rank, and every axis that is not dynamic.

    Args:
        any_count: axis 0 counts samples and may be anything, as in a file that holds all of them.

    Raises:
        CalibrationError: names both shapes.
    """
    got = tuple(shape)
    dynamic = spec.symbols

    def fits(candidate: tuple[int, ...]) -> bool:
        return len(candidate) == len(spec.shape) and all(
            size == want or axis in dynamic or (any_count and axis == 0)
            for axis, (size, want) in enumerate(zip(candidate, spec.shape, strict=True))
        )

    if fits(got) and 0 not in got:
        return
    fix = ""
    if len(got) == 4 and fits((got[0], got[3], got[1], got[2])):
        fix = "the channels are last; transpose the data to channels first: data.transpose(0, 3, 1, 2)"
    elif fits((1, *got)):
        fix = "a leading axis is missing: data[None]"
    raise CalibrationError(f"{where} has shape {list(got)}", expected=wanted(spec), fix=fix)


def fit(tensor: Tensor, spec: InputSpec, where: str, rows: Sequence[int] | None = None) -> Tensor:
    """Bring values to the spec's dtype, and refuse those that cannot be right.

    Args:
        tensor: of a dtype that passed or will pass `check_dtype`.
        rows: sample numbers of axis 0, to name the sample in messages.

    Raises:
        CalibrationError: a wrong dtype; NaN or infinity, before or after the conversion; an integer that
            does not fit; a negative integer in an int32 or int64 input (such inputs are ids or masks).
    """
    check_dtype(tensor.dtype, spec, where)

    def refuse(bad: Tensor, what: str, expected: str) -> None:
        first = int(bad.flatten().nonzero()[0])
        place = where
        if rows is not None:
            place += f", sample {rows[first // max(1, tensor.numel() // len(rows))]}"
        raise CalibrationError(f"{place} {what.format(tensor.flatten()[first].item())}", expected=expected)

    if spec.dtype.is_floating_point:
        converted = tensor.to(spec.dtype)
        if not bool(torch.isfinite(converted).all()):
            if bool(torch.isfinite(tensor).all()):
                refuse(~torch.isfinite(converted), "has the value {}", f"values that fit {spec.dtype_name}")
            refuse(~torch.isfinite(tensor), "holds {}", "finite values")
        return converted
    if tensor.dtype != spec.dtype:
        is_bool = spec.dtype == torch.bool
        low, high = (0, 1) if is_bool else (torch.iinfo(spec.dtype).min, torch.iinfo(spec.dtype).max)
        wide = tensor.to(torch.int64)
        outside = (wide < low) | (wide > high)
        if bool(outside.any()):
            refuse(outside, "has the value {}", f"{spec.dtype_name} values, {low} to {high}")
    if spec.dtype in (torch.int64, torch.int32) and tensor.dtype != torch.bool:
        negative = tensor < 0
        if bool(negative.any()):
            refuse(negative, "has the negative value {}", "ids of 0 or more")
    return tensor.to(spec.dtype)


def check_sizes(inputs: Sequence[Tensor], specs: Sequence[InputSpec], where: str) -> None:
    """Check that one dynamic name has one size over all inputs of a batch.

    Raises:
        CalibrationError: names the axis and both sizes.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for index, (tensor, spec) in enumerate(zip(inputs, specs, strict=True)):
        for axis, symbol in spec.dynamic:
            here = (tensor.shape[axis], f"axis {axis} of {called(spec, index)}")
            size, there = sizes.setdefault(symbol, here)
            if size != here[0]:
                raise CalibrationError(
                    f"{where}: {symbol} is {size} at {there}, but {here[0]} at {here[1]}",
                    expected="one size for one name",
                )


def match_names(
    have: Sequence[str], specs: Sequence[InputSpec], where: str
) -> tuple[tuple[str, ...], str | None]:
    """Which array feeds which input, and which one holds the labels.

    A single array feeds a single-input model whatever its name; unnamed inputs take arr_0, arr_1, ...
    (numpy's own names for unnamed arrays); otherwise names must agree. Further arrays are left alone.

    Returns:
        One name per spec, and the name of the labels or None.

    Raises:
        CalibrationError: lists both sides, with near misses.
    """
    names = [spec.name for spec in specs]
    labels = next((name for name in LABEL_NAMES if name in have and name not in names), None)
    if all(name is not None and name in have for name in names):
        return tuple(name for name in names if name is not None), labels
    if len(specs) == 1:
        others = [name for name in have if name not in LABEL_NAMES]
        if len(have) == 1:
            return (have[0],), None
        if len(others) == 1:
            return (others[0],), labels
    numbered = tuple(f"arr_{index}" for index in range(len(specs)))
    if not any(names) and all(name in have for name in numbered):
        return numbered, labels
    hints = []
    for name in names:
        near = difflib.get_close_matches(name, have, n=1) if name is not None and name not in have else []
        hints += [f"{near[0]!r} may be meant as {name!r}"] if near else []
    missing = [name for name in names if name is not None and name not in have]
    shown = ", ".join(repr(name) if name else f"(unnamed input {i})" for i, name in enumerate(names))
    lacks = f"but not {', '.join(map(repr, missing))}"
    problem = lacks if missing else "and the model's inputs have no names"
    raise CalibrationError(
        f"{where} holds {', '.join(map(repr, have)) or 'nothing'}, {problem}",
        expected=f"one array for each input: {shown}" + (f" ({'; '.join(hints)})" if hints else ""),
        fix="rename the arrays to the model's input names"
        if missing
        else "name the inputs, as in ids:int64[1,128]",
    )


def fixed_batch(specs: Sequence[InputSpec], where: str) -> int | None:
    """The batch size the model insists on, or None where every axis 0 is dynamic.

    Raises:
        CalibrationError: inputs insist on different sizes, so axis 0 cannot be the samples.
    """
    sizes = sorted({spec.shape[0] for spec in specs if spec.symbol(0) is None})
    if len(sizes) > 1:
        raise CalibrationError(
            f"{where}: the inputs fix axis 0 at different sizes ({', '.join(map(str, sizes))})",
            expected="one batch size for all inputs, so that samples can be counted along axis 0",
            fix="give a Python iterable that yields whole batches",
        )
    return sizes[0] if sizes else None


def too_few(count: int, size: int, where: str) -> CalibrationError:
    """The error for samples that do not fill one batch of a fixed size."""
    return CalibrationError(
        f"{where} gives {count} samples, and the model's batch is fixed at {size}",
        expected=f"at least {size} samples",
        fix="give more, or leave axis 0 of the input dynamic",
    )


class Fingerprint:
    """SHA-256 of batches as they stream by: names, dtypes, sizes and values, however they were batched."""

    def __init__(self, specs: Sequence[InputSpec]) -> None:
        names = [*(spec.name or "" for spec in specs), "labels"]
        self._parts = [hashlib.sha256(name.encode()) for name in names]
        self._forms: list[object] = [None] * len(self._parts)

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        for index, tensor in enumerate((*batch.inputs, batch.labels)):
            if tensor is None:
                continue
            form = (str(tensor.dtype), tuple(tensor.shape[1:]))
            if form != self._forms[index]:
                self._forms[index] = form
                self._parts[index].update(repr(form).encode())
            self._parts[index].update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """The fingerprint of everything taken in so far, 64 hex digits."""
        return hashlib.sha256("".join(part.hexdigest() for part in self._parts).encode()).hexdigest()


def file_sha256(paths: Sequence[Path], root: Path | None = None) -> str:
    """SHA-256 of one file, or of several with their names relative to `root`; read in pieces.

    Raises:
        CalibrationError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as stream:
                if root is None:
                    return hashlib.file_digest(stream, "sha256").hexdigest()
                total.update(path.relative_to(root).as_posix().encode() + b"\0")
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()
