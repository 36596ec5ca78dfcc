"""Calibration samples from a text file and a tokenizer.

Two ways, chosen by the model's inputs. With an attention mask (an encoder): every non-empty line is one
sample, truncated and padded to the spec's length, special tokens included. With ids alone, or for a model
known to be causal: the tokens of the text, without special tokens, are cut into windows of the spec's length;
no padding, a last incomplete window is dropped.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.data_checks import Batch
from compress.errors import CalibrationError, MissingExtra
from compress.inputs import InputSpec

TEXT_LIMIT = 32 << 20
"""Characters of text that are cut into windows; tokenizing more for a few hundred samples is a waste."""

_PIECE = 1 << 20
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")


class Tokenizer(Protocol):
    """What both kinds of tokenizer can do here."""

    pad: int

    def encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        """Token ids; truncated to `length` with special tokens, or all of them without special tokens."""
        ...


class _FastTokenizer:
    """A `tokenizers` JSON file."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtra("tokenizers", "hf", "to turn text into token ids") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CalibrationError(
                f"{path} is no tokenizer: {error}",
                expected="a tokenizer.json of the tokenizers library, or a Hugging Face folder",
            ) from error
        known = self._tokenizer.padding or {}
        named = (self._tokenizer.token_to_id(token) for token in _PAD_TOKENS)
        self.pad = int(known.get("pad_id") or next((number for number in named if number is not None), 0))
        # The file may ask for its own padding and truncation; ours are the spec's.
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        if length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(length)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=length is not None)
        return [encoding.ids for encoding in encodings]


class _SlowTokenizer:
    """A Hugging Face folder without a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MissingExtra("transformers", "hf", "for a tokenizer without tokenizer.json") from error
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True
            )
        except Exception as error:  # anything at all, from a missing file to a missing package
            raise CalibrationError(
                f"{path} holds no tokenizer: {str(error).splitlines()[0] if str(error) else error!r}",
                expected="a folder with tokenizer.json, or one transformers.AutoTokenizer can load",
            ) from error
        self.pad = int(self._tokenizer.pad_token_id or 0)

    def encode(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        options = {"truncation": True, "max_length": length} if length is not None else {"verbose": False}
        encoded = self._tokenizer(list(texts), add_special_tokens=length is not None, **options)
        return [list(ids) for ids in encoded["input_ids"]]


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from a JSON file or a folder; nothing is ever downloaded.

    Raises:
        CalibrationError: there is none at `path`.
        MissingExtra: the package that reads it is not installed.
    """
    if path.is_dir():
        inside = path / "tokenizer.json"
        return _FastTokenizer(inside) if inside.is_file() else _SlowTokenizer(path)
    if not path.is_file():
        raise CalibrationError(
            f"there is no tokenizer at {path}",
            expected="a tokenizer.json or a Hugging Face folder on this disk",
        )
    return _FastTokenizer(path)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, gzipped or not, with their line ends, one at a time.

    Raises:
        CalibrationError: not UTF-8, or a broken gzip stream.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        # "utf-8-sig" drops the mark some editors put first; text mode makes \r\n one line end.
        opened: Any = gzip.open if zipped else open
        with opened(path, "rt", encoding="utf-8-sig") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path.name} is not UTF-8 text: {error}", fix="save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path.name} cannot be read: {error}") from error


class _Roles:
    """Which input is the ids, the mask and the token types, by name.

    Raises:
        CalibrationError: text cannot feed these inputs.
    """

    def __init__(self, specs: Sequence[InputSpec], where: str, fix: str) -> None:
        names = [(spec.name or "").lower() for spec in specs]
        self.mask = [index for index, name in enumerate(names) if "mask" in name]
        types = [index for index, name in enumerate(names) if "token_type" in name or "segment" in name]
        self.types = [index for index in types if index not in self.mask]
        self.ids = [index for index in range(len(specs)) if index not in (*self.mask, *self.types)]
        lengths = {spec.shape[1] for spec in specs if len(spec.shape) == 2}
        fits = (
            (len(self.ids), len(self.mask) <= 1, len(self.types) <= 1, len(lengths)) == (1, True, True, 1)
            and all(len(spec.shape) == 2 and not spec.dtype.is_floating_point for spec in specs)
            and specs[self.ids[0]].dtype in (torch.int64, torch.int32)
        )
        if not fits:
            raise CalibrationError(
                f"{where} is text, and the model takes {'; '.join(map(str, specs))}",
                expected="token ids (int64 or int32, [batch, length]), and possibly an attention mask and "
                "token types of the same shape",
                fix=fix,
            )
        self.length = lengths.pop()


class LineTable:
    """One sample per non-empty line; the chosen lines are tokenized once, in `prepare`."""

    note = ""

    def __init__(self, path: Path, specs: Sequence[InputSpec], tokenizer: Tokenizer, roles: _Roles) -> None:
        self._path, self._specs, self._tokenizer, self._roles = path, specs, tokenizer, roles
        self.count = sum(1 for _ in self._lines())
        self._ids: dict[int, list[int]] = {}
        if self.count == 0:
            raise CalibrationError(f"{path.name} holds no text", expected="one sample per line")

    def _lines(self) -> Iterator[str]:
        return (stripped for line in read_lines(self._path) if (stripped := line.strip()))

    def prepare(self, rows: Sequence[int]) -> None:
        chosen = set(rows)
        texts = [line for row, line in enumerate(self._lines()) if row in chosen]
        ids = self._tokenizer.encode(texts, self._roles.length)
        for row, line, text in zip(rows, ids, texts, strict=True):
            if not line:
                raise CalibrationError(f"{self._path.name}: the line {text[:40]!r} has no tokens")
            # A tokenizer whose special tokens alone exceed the length truncates less than asked.
            self._ids[row] = line[: self._roles.length]

    def fetch(self, rows: Sequence[int]) -> Batch:
        ids = torch.full((len(rows), self._roles.length), self._tokenizer.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            line = self._ids[row]
            ids[at, : len(line)] = torch.tensor(line)
            mask[at, : len(line)] = 1
        return Batch(_placed(ids, mask, self._specs, self._roles))


class WindowTable:
    """Windows of consecutive tokens; ids are held as int32, four bytes for each token of the text.

    Args:
        path, specs, tokenizer, roles: of the text and the model.
        limit: only the first windows, at most so many.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[InputSpec],
        tokenizer: Tokenizer,
        roles: _Roles,
        limit: int | None = None,
    ) -> None:
        self._specs, self._roles, self.note = specs, roles, ""
        length = roles.length
        pieces: list[np.ndarray[Any, Any]] = []
        taken = found = 0
        for piece in _pieces(read_lines(path)):
            if taken + len(piece) > TEXT_LIMIT:
                self.note = f"from its first {taken} characters"
                break
            taken += len(piece)
            pieces += [np.asarray(ids, dtype=np.int32) for ids in tokenizer.encode([piece], None)]
            found += len(pieces[-1])
            if limit is not None and found >= limit * length:
                break
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        self.count = min(len(tokens) // length, limit or len(tokens))
        self.length = length
        self._windows = tokens[: self.count * length].reshape(self.count, length)
        if self.count == 0:
            raise CalibrationError(
                f"{path.name} holds {len(tokens)} tokens",
                expected=f"at least one window of {length}",
                fix="give more text, or a shorter example input",
            )

    def prepare(self, rows: Sequence[int]) -> None:
        pass

    def fetch(self, rows: Sequence[int]) -> Batch:
        return Batch(self.inputs(self.ids(rows)))

    def ids(self, rows: Sequence[int]) -> Tensor:
        """Token ids of these windows, int64 ``[rows, length]``."""
        return torch.from_numpy(self._windows[list(rows)]).to(torch.int64)

    def inputs(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The model's flat inputs for these ids, nothing masked."""
        return _placed(ids, torch.ones_like(ids), self._specs, self._roles)


def open_text(
    path: Path, specs: Sequence[InputSpec], tokenizer: str | Path | None, *, causal: bool = False
) -> LineTable | WindowTable:
    """The samples of a text file: windows if the model is causal or takes no mask, lines otherwise.

    Raises:
        CalibrationError: no tokenizer, inputs that text cannot feed, JSON lines, or too little text.
        MissingExtra: the tokenizer's package is not installed.
    """
    roles = _Roles(specs, path.name, "give an .npz with one array for each input")
    kind = LineTable if roles.mask and not causal else WindowTable
    return kind(path, specs, _tokenizer_for(path, tokenizer), roles)


def open_windows(
    path: Path, specs: Sequence[InputSpec], tokenizer: str | Path | None, limit: int
) -> WindowTable:
    """The first `limit` windows of a text file, also for a model with an attention mask.

    Raises:
        CalibrationError, MissingExtra: as for `open_text`.
    """
    roles = _Roles(specs, path.name, "measure it with a callable of your own")
    return WindowTable(path, specs, _tokenizer_for(path, tokenizer), roles, limit)


def _tokenizer_for(path: Path, tokenizer: str | Path | None) -> Tokenizer:
    """The tokenizer, for a file that holds text.

    Raises:
        CalibrationError, MissingExtra: as for `open_text`.
    """
    if tokenizer is None:
        raise CalibrationError(
            f"{path.name} is text, and no tokenizer was given",
            fix="--tokenizer with a tokenizer.json or the model's Hugging Face folder",
        )
    first = next((line for line in read_lines(path) if line.strip()), "")
    if _is_json_object(first):
        raise CalibrationError(
            f"{path.name} holds JSON, whose syntax would be tokenized along with the text",
            expected="plain text, one sample per line",
            fix="write out the text field alone",
        )
    return load_tokenizer(Path(tokenizer))


def _placed(ids: Tensor, mask: Tensor, specs: Sequence[InputSpec], roles: _Roles) -> tuple[Tensor, ...]:
    """Ids, mask and zero token types, each at its input's place and in its dtype."""
    values = {roles.ids[0]: ids}
    values.update(dict.fromkeys(roles.mask, mask))
    values.update(dict.fromkeys(roles.types, torch.zeros_like(ids)))
    return tuple(values[index].to(spec.dtype) for index, spec in enumerate(specs))


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Whole lines, joined to about a million characters at a time; never the whole text."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _is_json_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return line.strip() == "{"
