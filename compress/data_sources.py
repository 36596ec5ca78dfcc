"""Where calibration samples come from: arrays in files or in memory, and folders of images.

A `Table` has a number of samples and fetches any of them; nothing is read before it is asked for. So memory
stays at one batch for .npy, .safetensors, stored .npz and images; a compressed .npz is decompressed once, as
a stream, and only the chosen samples are kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
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
    match_names,
    native,
)
from compress.errors import CalibrationError, MissingExtra
from compress.inputs import InputSpec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_PIECE = 1 << 20
_AGAIN = "write the file again"


class Table(Protocol):
    """Samples by number."""

    note: str
    """What the description should add, or nothing."""

    @property
    def count(self) -> int:
        """How many samples there are."""
        ...

    def prepare(self, rows: Sequence[int]) -> None:
        """Told once which samples (ascending) will be fetched; the place to read a stream."""
        ...

    def fetch(self, rows: Sequence[int]) -> Batch:
        """These samples as one batch of checked tensors.

        Raises:
            CalibrationError: a sample cannot be read or does not fit its spec.
        """
        ...


class Column(Protocol):
    """One array whose first axis is the samples."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def prepare(self, rows: Sequence[int]) -> None: ...

    def take(self, rows: Sequence[int]) -> Tensor: ...


class NumpyColumn:
    """An array, in memory or mapped; `keep` copies the chosen samples, so that later changes do not show."""

    def __init__(self, array: np.ndarray[Any, Any], where: str, *, keep: bool = False) -> None:
        self._array, self._where, self._keep = array, where, keep
        self._kept: dict[int, int] | None = None
        self.shape = tuple(array.shape)
        self.dtype = torch_dtype(array.dtype, where)

    def prepare(self, rows: Sequence[int]) -> None:
        if self._keep:
            self._array, self._kept = self._array[list(rows)], {row: at for at, row in enumerate(rows)}

    def take(self, rows: Sequence[int]) -> Tensor:
        places = list(rows) if self._kept is None else [self._kept[row] for row in rows]
        return torch.from_numpy(native(self._array[places], self._where))


class TensorColumn:
    """A tensor in memory; the chosen samples are copied, so later changes to it do not show."""

    def __init__(self, tensor: Tensor, where: str) -> None:
        self._tensor, self._where = tensor, where
        self._kept: dict[int, int] = {}
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def prepare(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(list(rows), device=self._tensor.device)
        self._tensor = as_tensor(self._tensor.detach().index_select(0, chosen), self._where)
        self._kept = {row: at for at, row in enumerate(rows)}

    def take(self, rows: Sequence[int]) -> Tensor:
        return self._tensor[[self._kept[row] for row in rows]]


class SafetensorsColumn:
    """One tensor of a .safetensors file, read by slices; the file is opened for each fetch and never held."""

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._path, self._key, self.shape, self.dtype = path, key, shape, dtype

    def prepare(self, rows: Sequence[int]) -> None:
        pass

    def take(self, rows: Sequence[int]) -> Tensor:
        with _safe_open(self._path) as file:
            view = file.get_slice(self._key)
            return torch.cat([view[row : row + 1] for row in rows])


class StreamColumn:
    """One compressed array of an .npz: it has no random access, so one pass keeps the chosen samples."""

    def __init__(self, path: Path, member: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._path, self._member, self._numpy, self.shape = path, member, dtype, shape
        self._where = f"{path.name}: array {member.removesuffix('.npy')!r}"
        self.dtype = torch_dtype(dtype, self._where)
        self._kept: dict[int, np.ndarray[Any, Any]] = {}

    def prepare(self, rows: Sequence[int]) -> None:
        size = math.prod(self.shape[1:]) * self._numpy.itemsize
        with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as stream:
            _npy_header(stream, self._where)
            at = 0
            for row in rows:
                skip = (row - at) * size
                while skip > 0:
                    skip -= len(stream.read(min(skip, _PIECE))) or skip
                data = stream.read(size)
                if len(data) != size:
                    raise CalibrationError(f"{self._where} ends before sample {row}", fix=_AGAIN)
                self._kept[row] = np.frombuffer(data, self._numpy).reshape(self.shape[1:])
                at = row + 1

    def take(self, rows: Sequence[int]) -> Tensor:
        return torch.from_numpy(native(np.stack([self._kept[row] for row in rows]), self._where))


class ArrayTable:
    """Columns matched to the inputs by name; everything but the values is checked on construction.

    Raises:
        CalibrationError: names, dtypes, shapes or lengths do not fit.
    """

    def __init__(self, columns: Mapping[str, Column], specs: Sequence[InputSpec], where: str) -> None:
        names, label = match_names(list(columns), specs, where)
        self._specs, self._where = specs, where
        self._columns = [columns[name] for name in names]
        self._labels = columns[label] if label is not None else None
        self._places = [f"{where}: {called(spec, index)}" for index, spec in enumerate(specs)]
        unused = sorted(set(columns) - {*names, label})
        self.note = f"not used: {', '.join(unused)}" if unused else ""
        for column, spec, place in zip(self._columns, specs, self._places, strict=True):
            if 0 in column.shape[:1]:
                raise CalibrationError(
                    f"{place} holds no samples (shape {list(column.shape)})", expected="at least one"
                )
            check_dtype(column.dtype, spec, place)
            check_shape(column.shape, spec, place, any_count=True)
        lengths = {name: columns[name].shape[0] for name in names}
        if label is not None:
            lengths[label] = columns[label].shape[0] if columns[label].shape else 0
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
            raise CalibrationError(
                f"{where}: the arrays have different numbers of samples: {shown}",
                expected="the same length of the first axis for all inputs and labels",
            )
        self.count = self._columns[0].shape[0]

    def prepare(self, rows: Sequence[int]) -> None:
        for column in {id(column): column for column in (*self._columns, self._labels) if column}.values():
            with reading(self._where):
                column.prepare(rows)

    def fetch(self, rows: Sequence[int]) -> Batch:
        with reading(self._where):
            raw = [column.take(rows) for column in self._columns]
            labels = self._labels.take(rows) if self._labels is not None else None
        inputs = tuple(
            fit(tensor, spec, place, rows)
            for tensor, spec, place in zip(raw, self._specs, self._places, strict=True)
        )
        check_sizes(inputs, self._specs, self._where)
        return Batch(inputs, None if labels is None else as_labels(labels, f"{self._where}: the labels"))


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Turns what a broken or vanished file raises into a CalibrationError that names it."""
    broken = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        yield
    except Exception as error:
        # safetensors has an exception of its own, not importable where it is not installed
        if isinstance(error, broken) or type(error).__name__ == "SafetensorError":
            raise CalibrationError(f"{where} cannot be read: {error}", fix=_AGAIN) from error
        raise


def torch_dtype(dtype: np.dtype[Any], where: str) -> torch.dtype:
    """The torch dtype that data of this numpy dtype arrives in.

    Raises:
        CalibrationError: objects, text, complex numbers or records.
    """
    return torch.from_numpy(native(np.empty(0, dtype), where)).dtype


def open_npy(path: Path, specs: Sequence[InputSpec]) -> ArrayTable:
    """A single-input table over a memory-mapped .npy."""
    with path.open("rb") as stream:
        shape, _, dtype = _npy_header(stream, path.name)
    torch_dtype(dtype, path.name)  # np.load would complain about objects in words of its own
    if math.prod(shape) == 0 or not shape:
        array: np.ndarray[Any, Any] = np.empty(shape, dtype)  # nothing to map; the checks will say so
    else:
        with reading(path.name):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(specs) != 1:
        raise CalibrationError(
            f"{path.name} holds one array, and the model has {len(specs)} inputs",
            fix="np.savez(path, name=array, ...) with one array for each input",
        )
    return ArrayTable({specs[0].name or "array": NumpyColumn(array, path.name)}, specs, path.name)


def open_npz(path: Path, specs: Sequence[InputSpec]) -> ArrayTable:
    """A table over the arrays of an .npz: stored ones are memory-mapped, compressed ones are streamed.

    Raises:
        CalibrationError: a zip file of something else (such as torch.save's), encrypted, or broken.
    """
    columns: dict[str, Column] = {}
    with reading(path.name), zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        if not infos:
            raise CalibrationError(
                f"{path.name} is a zip file without arrays" + _torch_hint(archive.namelist()),
                expected="an .npz, written with np.savez(path, name=array)",
            )
        for info in infos:
            name = info.filename.removesuffix(".npy")
            where = f"{path.name}: array {name!r}"
            with archive.open(info) as stream:
                shape, fortran, dtype = _npy_header(stream, where)
                header = stream.tell()
            if dtype.kind not in "fiub":  # only a problem if this array is wanted
                columns[name] = _Unreadable(shape, dtype, where)
            elif math.prod(shape) == 0 or not shape:
                columns[name] = NumpyColumn(np.empty(shape, dtype), where)
            elif info.compress_type == zipfile.ZIP_STORED:
                offset = _stored_at(path, info) + header
                order = "F" if fortran else "C"
                mapped = np.memmap(path, dtype, "r", offset, shape, order)  # type: ignore[call-overload]
                columns[name] = NumpyColumn(mapped, where)
            elif fortran:  # samples are not contiguous in the stream
                with np.load(path, allow_pickle=False) as arrays:
                    columns[name] = NumpyColumn(arrays[name], where)
            else:
                columns[name] = StreamColumn(path, info.filename, shape, dtype)
    return ArrayTable(columns, specs, path.name)


class _Unreadable:
    """An array that may sit in the file as long as nobody wants it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
        self.shape, self._dtype, self._where = shape, dtype, where

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self._dtype, self._where)

    def prepare(self, rows: Sequence[int]) -> None:
        torch_dtype(self._dtype, self._where)

    def take(self, rows: Sequence[int]) -> Tensor:
        raise CalibrationError(f"{self._where} has dtype {self._dtype}")


def open_safetensors(path: Path, specs: Sequence[InputSpec]) -> ArrayTable:
    """A table over the tensors of a .safetensors file.

    Raises:
        MissingExtra: safetensors is not installed.
        CalibrationError: the file is broken.
    """
    columns: dict[str, Column] = {}
    with reading(path.name), _safe_open(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            view = file.get_slice(key)
            shape = tuple(view.get_shape())
            dtype = view[:1].dtype if shape and 0 not in shape else torch.float32
            columns[key] = SafetensorsColumn(path, key, shape, dtype)
    return ArrayTable(columns, specs, path.name)


def open_memory(arrays: Mapping[str, Any], specs: Sequence[InputSpec], where: str) -> ArrayTable:
    """A table over tensors and numpy arrays by input name; the chosen samples are copied."""
    columns: dict[str, Column] = {}
    for name, value in arrays.items():
        place = f"{where}: {name!r}"
        if isinstance(value, Tensor):
            columns[name] = TensorColumn(value, place)
        elif isinstance(value, np.ndarray):
            columns[name] = NumpyColumn(value, place, keep=True)
        else:
            raise CalibrationError(
                f"{place} is a {type(value).__name__}", expected="a torch tensor or a numpy array"
            )
    return ArrayTable(columns, specs, where)


class ImageTable:
    """The images of a folder, recursively, in the order of their paths; decoded when fetched.

    Each is scaled so that it covers the spec's height and width, cropped at the centre, taken as RGB (or grey
    for a one-channel spec), brought to [0, 1], then to (x - mean) / std.

    Args:
        root: the folder.
        specs: one float input [batch, 1 or 3, height, width].
        normalize: mean and std, one number per channel (or one for all).

    Raises:
        MissingExtra: Pillow is not installed.
        CalibrationError: the spec is not one image input, or there are no images.
    """

    note = ""

    def __init__(
        self,
        root: Path,
        specs: Sequence[InputSpec],
        normalize: tuple[Sequence[float], Sequence[float]] | None,
    ) -> None:
        self._root, self._spec = root, specs[0]
        spec = specs[0]
        channels = spec.shape[1] if len(spec.shape) == 4 else 0
        if len(specs) != 1 or channels not in (1, 3) or spec.symbol(1) or not spec.dtype.is_floating_point:
            raise CalibrationError(
                f"{root} is a folder, and the model takes {'; '.join(map(str, specs))}",
                expected="for a folder of images: one float input [batch, 1 or 3, height, width]",
                fix="give an .npz with one array for each input",
            )
        self._scale = _normalisation(normalize, channels)
        try:
            import PIL.Image
        except ImportError as error:
            raise MissingExtra("PIL", "images", "to read images") from error
        self._open = PIL.Image.open
        self.paths: list[Path] = []
        for folder, _, names in os.walk(root):
            self.paths += [Path(folder, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        self.paths.sort(key=lambda path: path.relative_to(root).as_posix())
        if not self.paths:
            raise CalibrationError(
                f"{root} holds no images",
                expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}",
                fix="give the folder of images, or a .npz, .npy, .safetensors or text file",
            )
        self.count = len(self.paths)

    def prepare(self, rows: Sequence[int]) -> None:
        self.paths = [self.paths[row] for row in rows]
        self._at = {row: at for at, row in enumerate(rows)}

    def fetch(self, rows: Sequence[int]) -> Batch:
        images = torch.stack([self._decode(self.paths[self._at[row]]) for row in rows])
        return Batch((images.to(self._spec.dtype),))

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        channels, height, width = self._spec.shape[1:]
        try:
            with self._open(path) as file:
                image: Image.Image = file
                if image.mode.startswith("I"):
                    # 16 bits of grey: convert() would cut at 255, and nearly everything be white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                plain = image.convert("RGB" if channels == 3 else "L")
            sized = ImageOps.fit(plain, (width, height), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CalibrationError(f"{path} cannot be read as an image: {error}", fix="remove it") from error
        pixels = torch.from_numpy(np.array(sized, dtype=np.float32)).reshape(height, width, channels)
        mean, std = self._scale
        return ((pixels.permute(2, 0, 1) / 255 - mean) / std).contiguous()


def _normalisation(
    normalize: tuple[Sequence[float], Sequence[float]] | None, channels: int
) -> tuple[Tensor, Tensor]:
    mean, std = normalize if normalize is not None else ([0.0], [1.0])
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels) or not all(math.isfinite(value) for value in values):
            raise CalibrationError(
                f"normalize has {name} {list(values)}", expected=f"{channels} finite numbers, one per channel"
            )
    if min(std) <= 0:
        raise CalibrationError(f"normalize has std {list(std)}", expected="numbers above 0")
    return torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)


def _npy_header(stream: Any, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    with reading(where):
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):  # 3 only differs in the names of record fields, refused anyway
            raise CalibrationError(f"{where} is of .npy version {version}", expected="plain numbers")
        form = np.lib.format
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    return tuple(shape), bool(fortran), dtype


def _stored_at(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, whose name and extra fields vary."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def _safe_open(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingExtra("safetensors", "hf", "to read .safetensors files") from error
    return safe_open(str(path), framework="pt")


def _torch_hint(names: Sequence[str]) -> str:
    return " (it looks like torch.save's)" if any(name.endswith("data.pkl") for name in names) else ""
