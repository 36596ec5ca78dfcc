"""Calibration data: from whatever a user has to batches that surely fit the model.

`load_calibration` takes a file of arrays (.npz, .npy, .safetensors), a text file with a tokenizer, a folder
of images, "module:callable", or a Python iterable, and gives a `CalibrationData` that can be gone through any
number of times with the same outcome. What a file is, is found from its content, never from its suffix.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gzip
import itertools
import random
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compress.data_checks import Batch, Fingerprint, called, file_sha256, fixed_batch, too_few
from compress.data_items import ItemKeeper, copied
from compress.data_sources import ImageTable, Table, open_memory, open_npy, open_npz, open_safetensors
from compress.data_text import open_text
from compress.errors import CalibrationError, CompressError
from compress.inputs import InputSpec
from compress.kv_cache import has_cache, with_empty_past, without_past

__all__ = ["NO_CALIBRATION", "Batch", "CalibrationData", "describe_missing", "load_calibration"]

NO_CALIBRATION = (
    "no calibration data: weights are rounded data-free, each by itself; a few hundred real samples "
    "usually lose much less accuracy, and activations cannot be quantized without them"
)
_SOURCES = "an .npz, .npy or .safetensors file, a UTF-8 text file, a folder of images, or module:callable"


def describe_missing() -> str:
    """The one line to show where no calibration data was given."""
    return NO_CALIBRATION


class CalibrationData:
    """Batches that can be iterated any number of times, always the same ones in the same order.

    Args:
        make: batch number -> batch; called again on every pass.
        sizes: samples of each batch.
        description: what it is, as in "512 samples from calib.npz".
        sha256: fingerprint of the file, of the chosen images, or of the tensors; 64 hex digits.
    """

    def __init__(
        self, make: Callable[[int], Batch], sizes: Sequence[int], description: str, sha256: str | None
    ) -> None:
        self._make, self._sizes = make, tuple(sizes)
        self.description, self.sha256 = description, sha256

    @property
    def num_samples(self) -> int:
        """Samples over all batches."""
        return sum(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Batch]:
        return (self._make(index) for index in range(len(self._sizes)))

    def inputs(self) -> Iterable[tuple[Tensor, ...]]:
        """The inputs of the batches without labels; re-iterable like the data itself."""
        return _Inputs(self)

    def extended(self, add: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> CalibrationData:
        """The same data with other inputs made from those of each batch."""

        def make(index: int) -> Batch:
            batch = self._make(index)
            return replace(batch, inputs=add(batch.inputs))

        return CalibrationData(make, self._sizes, self.description, self.sha256)

    def parted(self, held: int) -> tuple[CalibrationData, CalibrationData]:
        """The first samples, and the last `held` of them, in batches of the same sizes but where they part.

        Raises:
            ValueError: one of the two would be empty.
        """
        kept = self.num_samples - held
        if held < 1 or kept < 1:
            raise ValueError(f"{held} of {self.num_samples} samples cannot be held out")
        return self._rows(0, kept), self._rows(kept, self.num_samples)

    def _rows(self, begin: int, end: int) -> CalibrationData:
        """Samples `begin` to `end`, which fall into whole batches or, at the ends, into parts of them."""
        parts = []
        start = 0
        for index, size in enumerate(self._sizes):
            first, last = max(begin - start, 0), min(end - start, size)
            if first < last:
                parts.append((index, slice(first, last)))
            start += size

        def make(number: int) -> Batch:
            index, rows = parts[number]
            batch = self._make(index)
            inputs = tuple(tensor[rows] for tensor in batch.inputs)
            return Batch(inputs, None if batch.labels is None else batch.labels[rows])

        sizes = [rows.stop - rows.start for _, rows in parts]
        description = f"{end - begin} of {self.description}"
        return CalibrationData(make, sizes, description, self.sha256)

    def __repr__(self) -> str:
        return f"CalibrationData({self.description}, {len(self)} batches)"


class _Inputs:
    def __init__(self, data: CalibrationData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (batch.inputs for batch in self._data)


def load_calibration(
    source: Any,
    *,
    inputs: Sequence[InputSpec],
    tokenizer: str | Path | None = None,
    samples: int = 512,
    batch_size: int = 32,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    seed: int = 0,
    causal: bool = False,
) -> CalibrationData:
    """Calibration data from a path, a "module:callable", arrays, or any iterable of items.

    Files, arrays, images and text: a seeded random choice of `samples` of them, in their order, in batches of
    `batch_size`. Where the model fixes axis 0, that is the batch size, and an incomplete batch is left out.

    Iterables: the first `samples`. An item is a tensor or array, a tuple (inputs..., and labels if one longer
    than the inputs), a mapping by input name, or a `Batch`. Items of the spec's rank are batches and stay as
    they are; items of one axis less are samples and are grouped. They are kept, so generators may run out.

    Args:
        source: see above. A mapping, tensor or array holds samples along axis 0.
        inputs: the model's inputs, in its order.
        tokenizer: a tokenizer.json or a Hugging Face folder; needed for text, otherwise not looked at.
        samples: at most this many.
        batch_size: samples per batch, the last one may have fewer.
        normalize: mean and std per channel, for images only.
        seed: of the random choice.
        causal: the model is a causal one, so text is cut into windows even if it takes a mask; models with a
            key-value cache always are, and their cache is empty.

    Raises:
        CalibrationError: the source cannot be read, is empty, or does not fit `inputs`.
        MissingExtra: a package that reads this kind of source is not installed.
    """
    if has_cache(inputs):
        given = without_past(inputs)
        if isinstance(source, Iterator):
            source = list(itertools.islice(source, samples))
        if len(given) == 2 and not _gives(source, str(given[1].name)):
            given = given[:1]
        data = load_calibration(
            source, inputs=given, tokenizer=tokenizer, samples=samples, batch_size=batch_size,
            normalize=normalize, seed=seed, causal=True,
        )  # fmt: skip
        return data.extended(lambda given: with_empty_past(inputs, given))
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"{name} is {value}", expected="1 or more")
    scalars = [called(spec, index) for index, spec in enumerate(inputs) if not spec.shape]
    if scalars or not inputs:
        raise CalibrationError(
            f"{scalars[0]} has no axes" if scalars else "the model has no inputs",
            expected="inputs whose axis 0 is the batch",
        )
    loader = _Loader(tuple(inputs), tokenizer, samples, batch_size, normalize, seed, causal)
    if isinstance(source, (str, Path)):
        return loader.path(source)
    return loader.value(source, f"a Python {type(source).__name__}")


def _gives(source: Any, name: str) -> bool:
    """Whether data has an entry for the second input, where that may be left out."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        kind = _kind(path) if path.is_file() else ""
        if kind == "npz":
            with zipfile.ZipFile(path) as archive:
                return f"{name}.npy" in archive.namelist()
        if kind == "safetensors":
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                return f'"{name}"'.encode() in stream.read(length)
        return kind != "npy"
    if isinstance(source, (Tensor, np.ndarray)):
        return False
    if not isinstance(source, Iterable):
        return True
    item = source if isinstance(source, Mapping) else next(iter(source), None)
    if isinstance(item, Mapping):
        return name in item
    return not isinstance(item, (Tensor, np.ndarray)) and not (isinstance(item, tuple) and len(item) == 1)


class _Loader:
    """The arguments of one `load_calibration`, and one method per kind of source."""

    def __init__(
        self,
        specs: tuple[InputSpec, ...],
        tokenizer: str | Path | None,
        samples: int,
        batch_size: int,
        normalize: tuple[Sequence[float], Sequence[float]] | None,
        seed: int,
        causal: bool,
    ) -> None:
        self.specs, self.tokenizer, self.normalize = specs, tokenizer, normalize
        self.samples, self.batch_size, self.seed, self.causal = samples, batch_size, seed, causal

    def path(self, source: str | Path) -> CalibrationData:
        """A file, a folder, or "module:callable" where nothing of that name exists."""
        path = Path(source).expanduser()
        if path.is_dir():
            images = ImageTable(path, self.specs, self.normalize)
            return self.table(images, path.name or str(path), lambda: file_sha256(images.paths, path))
        if not path.exists():
            if ":" in str(source):
                return self.named(str(source))
            raise _missing(path)
        self.no_normalize(path.name)
        kind = _kind(path)
        table: Table
        if kind == "npy":
            table = open_npy(path, self.specs)
        elif kind == "npz":
            table = open_npz(path, self.specs)
        elif kind == "safetensors":
            table = open_safetensors(path, self.specs)
        elif path.suffix == ".py":
            raise CalibrationError(f"{path} is a Python file", fix=f"name a function in it: {path}:batches")
        else:
            table = open_text(path, self.specs, self.tokenizer, causal=self.causal)
        return self.table(table, path.name, lambda: file_sha256([path]))

    def named(self, source: str) -> CalibrationData:
        """A callable of no arguments that gives an iterable."""
        from compress.loading import resolve_callable  # only this kind of source needs it

        function = resolve_callable(source, "calibration data")
        with _running(source):
            value = function()
        return self.value(value, source)

    def value(self, value: Any, where: str) -> CalibrationData:
        """A Python object: arrays by name, one array, or an iterable of items."""
        self.no_normalize(where)
        if isinstance(value, Mapping):
            return self.table(open_memory(value, self.specs, where), where, None)
        if isinstance(value, (Tensor, np.ndarray)):
            if len(self.specs) != 1:
                raise CalibrationError(
                    f"{where} is one array, and the model has {len(self.specs)} inputs",
                    expected="a mapping by input name",
                )
            return self.table(
                open_memory({self.specs[0].name or "array": value}, self.specs, where), where, None
            )
        if callable(value) and not isinstance(value, Iterable):
            with _running(where):
                value = value()
        return self.items(value, where)

    def no_normalize(self, where: str) -> None:
        if self.normalize is not None:
            raise CalibrationError(
                f"normalize was given, and {where} is no folder of images",
                fix="normalise the data itself, and leave normalize out",
            )

    def table(self, table: Table, name: str, fingerprint: Callable[[], str] | None) -> CalibrationData:
        """Choose samples, go through them once (images excepted) so that errors come now, and fingerprint."""
        fixed = fixed_batch(self.specs, name)
        size = fixed or self.batch_size
        rows = list(range(table.count))
        if table.count > self.samples:
            rows = sorted(random.Random(self.seed).sample(range(table.count), self.samples))
        if fixed is not None:
            rows = rows[: len(rows) // fixed * fixed]
            if not rows:
                raise too_few(min(table.count, self.samples), fixed, name)
        table.prepare(rows)
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        if fingerprint is None or not isinstance(table, ImageTable):
            print_of = Fingerprint(self.specs)
            for chunk in chunks:
                batch = table.fetch(chunk)
                if fingerprint is None:
                    print_of.update(batch)
        sha256 = fingerprint() if fingerprint is not None else print_of.hexdigest()
        description = f"{len(rows)} samples from {name}" + (f" ({table.note})" if table.note else "")
        return CalibrationData(
            lambda index: table.fetch(chunks[index]), list(map(len, chunks)), description, sha256
        )

    def items(self, source: Any, where: str) -> CalibrationData:
        """Check and keep the first `samples` of an iterable."""
        keeper = ItemKeeper(self.specs, self.samples, self.batch_size, where)
        with _running(where):
            iterator = iter(source)
        number = 0
        while keeper.wants_more:
            with _running(f"{where}, item {number}"):
                try:
                    item = next(iterator)
                except StopIteration:
                    break
            keeper.add(item, f"{where}, item {number}")
            number += 1
        batches = keeper.finish(number)
        print_of = Fingerprint(self.specs)
        for batch in batches:
            print_of.update(batch)
        sizes = [batch.inputs[0].shape[0] for batch in batches]
        # Copies are handed out: an operator that writes into its input must not change the next pass.
        return CalibrationData(
            lambda index: copied(batches[index]),
            sizes,
            f"{sum(sizes)} samples from {where}",
            print_of.hexdigest(),
        )


@contextlib.contextmanager
def _running(where: str) -> Iterator[None]:
    """Turns what a user's own code raises into a CalibrationError that names it."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{where} failed: {type(error).__name__}: {error}",
            expected="an iterable of items, or a function without arguments that gives one",
        ) from error


def _kind(path: Path) -> str:
    """npy, npz, safetensors or text, from the first bytes.

    Raises:
        CalibrationError: anything else; an empty file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(1 << 16)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(path) as stream:
                head = stream.read(1 << 16)
            if not _is_text(head):
                raise CalibrationError(f"{path.name} is a gzip of something binary", fix=f"gunzip {path}")
            return "text"
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if not head:
        raise CalibrationError(f"{path} is empty", expected=_SOURCES)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz"
    # A safetensors file begins with the length of its JSON header; read as text, that number is huge.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size:
        return "safetensors"
    if _is_text(head):
        return "text"
    if head.startswith(b"\x80"):
        raise CalibrationError(
            f"{path} is a pickle, which is never opened: reading one can run code stored in it",
            expected=_SOURCES,
            fix="np.savez(path, name=array)",
        )
    raise CalibrationError(f"{path} is none of the files that can be read", expected=_SOURCES)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character cut at the end is no error
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _missing(path: Path) -> CalibrationError:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return CalibrationError(
        f"there is no calibration data at {path}",
        expected=_SOURCES,
        fix=str(path.parent / near[0]) if near else "",
    )
