"""What goes into a model: name, dtype, example shape, and which axes may change size.

The written form, as the command line takes it::

    1,3,32,32               one unnamed float32 input
    x:float32[1,3,224,224]  with a name and a dtype
    ids:int64[1,seq=128]    axis 1 is dynamic, called "seq", 128 in the example

Axis 0 is the batch: dynamic under the name "batch" unless written ``!1`` (fixed) or ``other=1`` (renamed).
A dynamic name means the same size wherever it appears, in one input or across inputs. A sum of names,
``mask:int64[1,past+seq=48]``, is an axis whose size is that of others together.
``str(spec)`` gives the written form back.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import InputSpecError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
BATCH = "batch"

_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
# What people type for a dtype, where spelling distance alone would guess wrong.
_OTHER_WORDS = {
    "float": "float32",
    "single": "float32",
    "fp32": "float32",
    "f32": "float32",
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
    "fp64": "float64",
    "f64": "float64",
    "long": "int64",
    "i64": "int64",
    "uint64": "int64",
    "int": "int64",
    "i32": "int32",
    "uint32": "int32",
    "int16": "int32",
    "uint16": "int32",
    "byte": "uint8",
    "boolean": "bool",
}
_EXAMPLES = 'a shape such as "1,3,32,32", or name:dtype[shape] such as "ids:int64[1,seq=128]"'
_NAME = re.compile(r"[^\W\d][\w./-]*")
_SPEC = re.compile(
    r"(?:(?P<name>[^:\[\],]*):)?\s*(?:(?P<dtype>[^:\[\],\s]*)\s*\[(?P<boxed>[^\[\]]*)\]|(?P<bare>[^:\[\]]*))"
)
_DIM = re.compile(r"(?:(?P<fixed>!)|(?P<symbol>[^=!]*)=)?\s*(?P<size>[+-]?[0-9]+)")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class InputSpec:
    """One model input.

    Args:
        name: the input's name, or None where it is only known by position.
        dtype: one of `DTYPES`.
        shape: the example's sizes, batch first, each at least 1; () for a scalar.
        dynamic: (axis, name of its size) for the axes whose size may change, kept in the order of the axes. A
            mapping is taken as well. `symbol` and `symbols` look axes up.

    Raises:
        InputSpecError: for a dtype, size, name or axis that cannot be.
    """

    name: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    dynamic: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        pairs = self.dynamic.items() if isinstance(self.dynamic, Mapping) else self.dynamic
        object.__setattr__(self, "dynamic", tuple(sorted((int(axis), str(symbol)) for axis, symbol in pairs)))
        what = f"input {self.name!r}" if self.name else "an input"
        if self.dtype not in _NAME_OF:
            raise InputSpecError(
                f"{what} has dtype {self.dtype}",
                expected=f"one of {', '.join(DTYPES)}",
                fix="cast it inside the model",
            )
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InputSpecError(
                f"{self.name!r} is not an input name",
                expected="a letter or underscore, then letters, digits, '_', '.', '/' or '-'",
                fix='the parameter name of forward(), as in "ids:int64[1,128]"',
            )
        for size in self.shape:
            if not 1 <= size <= _LARGEST:
                raise InputSpecError(
                    f"{what} has a size of {size} in shape {list(self.shape)}",
                    expected="sizes of 1 or more" if size < 1 else f"sizes up to {_LARGEST}",
                    fix="write an example size; to let an axis change size, name it: seq=128",
                )
        seen: dict[str, int] = {}
        if len(self.symbols) != len(self.dynamic):
            raise InputSpecError(f"{what} names an axis twice: {self.dynamic}", expected="one name per axis")
        for axis, symbol in self.dynamic:
            if not 0 <= axis < len(self.shape):
                raise InputSpecError(f"{what} names axis {axis} {symbol!r}, but has {len(self.shape)} axes")
            if not _is_name(symbol):
                raise InputSpecError(
                    f"{what}: {symbol!r} cannot name an axis",
                    expected="an identifier",
                    fix="for example seq=128",
                )
            _same_size(seen, symbol, self.shape[axis], what)

    @classmethod
    def like(cls, tensor: Tensor, name: str | None = None) -> InputSpec:
        """The spec of an example tensor: its dtype and shape, only axis 0 dynamic (as "batch").

        Raises:
            InputSpecError: the tensor has an empty axis, or a dtype that is not in `DTYPES`.
        """
        return cls(name, tensor.dtype, tuple(tensor.shape), ((0, BATCH),) if tensor.ndim else ())

    @property
    def symbols(self) -> dict[int, str]:
        """Axis -> name of its size, for the dynamic axes; a new dictionary each time."""
        return dict(self.dynamic)

    def symbol(self, axis: int) -> str | None:
        """The name of a dynamic axis, None for a fixed one."""
        return self.symbols.get(axis)

    @property
    def dtype_name(self) -> str:
        """The dtype as it is written: "float32"."""
        return _NAME_OF[self.dtype]

    def sized(self, sizes: Mapping[str, int] | None = None, *, least: int = 1) -> tuple[int, ...]:
        """The shape with dynamic axes at `sizes`; names this input does not have are ignored.

        Args:
            sizes: by name.
            least: the smallest size that is taken; 0 where a key-value cache may be empty.

        Raises:
            InputSpecError: a size below that.
        """
        shape = list(self.shape)
        for axis, symbol in self.dynamic:
            found = [(sizes or {}).get(part) for part in summands(symbol)]
            known = [size for size in found if size is not None]
            if len(known) == len(found):
                shape[axis] = sum(known)
        if min(shape, default=1) < least:
            raise InputSpecError(
                f"input {self} was asked for at shape {shape}", expected=f"sizes of {least} or more"
            )
        return tuple(shape)

    def sample(
        self,
        generator: torch.Generator | None,
        *,
        sizes: Mapping[str, int] | None = None,
        high: int | None = None,
    ) -> Tensor:
        """A random example of this input, on the generator's device.

        Floats are standard normal; integers are uniform in [0, high), or ones where `high` is None;
        bools are True.

        Args:
            generator: source of randomness; None for torch's global one.
            sizes: sizes of dynamic axes by name, instead of those of the example.
            high: the first integer that is too large, such as a vocabulary size.

        Returns:
            A tensor of this dtype, shape `sized(sizes)`.

        Raises:
            InputSpecError: a size below 1, or a `high` that is below 1 or beyond the dtype.
        """
        shape = self.sized(sizes)
        device = generator.device if generator is not None else torch.device("cpu")
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=self.dtype, device=device)
        if self.dtype == torch.bool or high is None:
            return torch.ones(shape, dtype=self.dtype, device=device)
        limit = min(torch.iinfo(self.dtype).max + 1, 2**63 - 1)
        if not 1 <= high <= limit:
            raise InputSpecError(
                f"input {self} was asked for integers below {high}", expected=f"a bound from 1 to {limit}"
            )
        return torch.randint(0, high, shape, generator=generator, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        dims = []
        for axis, size in enumerate(self.shape):
            symbol = self.symbol(axis)
            if symbol is None:
                dims.append(f"!{size}" if axis == 0 else str(size))
            elif axis == 0 and symbol == BATCH:
                dims.append(str(size))
            else:
                dims.append(f"{symbol}={size}")
        text = ",".join(dims)
        if self.name is None:
            return text if text and self.dtype == torch.float32 else f"{self.dtype_name}[{text}]"
        return f"{self.name}:{self.dtype_name}[{text}]"


def parse_input_spec(text: str) -> InputSpec:
    """Read one written input specification; the module docstring has the forms.

    Name and dtype may each be left out (no name, float32). Spaces do not matter.

    Raises:
        InputSpecError: anything else, with what was given and two right examples.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise _malformed(text, "it is not a shape and not name:dtype[shape]")
    name = match["name"].strip() if match["name"] is not None else None
    if name is not None and not _NAME.fullmatch(name):
        raise _malformed(text, f"{name!r} is not an input name")
    bare = match["bare"]
    if bare is not None and _NAME.fullmatch(bare.strip()):
        raise _malformed(text, "it has no shape")
    dtype = _parse_dtype(text, match["dtype"] or "float32")
    shape: list[int] = []
    dynamic: dict[int, str] = {}
    body = bare if bare is not None else match["boxed"]
    parts = body.split(",") if body.strip() or bare is not None else []  # "float32[]" is a scalar
    for axis, part in enumerate(parts):
        size, symbol = _parse_dim(text, part.strip(), axis)
        shape.append(size)
        if symbol is not None:
            dynamic[axis] = symbol
    return InputSpec(name, dtype, tuple(shape), tuple(dynamic.items()))


def parse_input_specs(texts: Iterable[str]) -> tuple[InputSpec, ...]:
    """Read the specifications of all inputs of one model and check them together (`check_input_specs`)."""
    specs = tuple(parse_input_spec(text) for text in texts)
    check_input_specs(specs)
    return specs


def check_input_specs(specs: Sequence[InputSpec]) -> dict[str, int]:
    """Check that inputs fit together; returns the example size of every dynamic name.

    Raises:
        InputSpecError: two inputs of the same name, one dynamic name with two sizes, or a wrong sum.
    """
    names: set[str] = set()
    sizes: dict[str, int] = {}
    for index, spec in enumerate(specs):
        if spec.name is not None and spec.name in names:
            raise InputSpecError(f"two inputs are called {spec.name!r}", fix="give each input its own name")
        names.add(spec.name or "")
        for axis, symbol in spec.dynamic:
            if len(summands(symbol)) == 1:
                _same_size(sizes, symbol, spec.shape[axis], f"input {spec.name or index}")
    for index, spec in enumerate(specs):
        _check_sums(spec, index, sizes)
    return sizes


def _check_sums(spec: InputSpec, index: int, sizes: Mapping[str, int]) -> None:
    what = f"input {spec.name or index}"
    for axis, symbol in spec.dynamic:
        parts = summands(symbol)
        unknown = [part for part in parts if part not in sizes]
        if unknown:
            raise InputSpecError(
                f"{what} has an axis {symbol}, but no axis is called {unknown[0]}",
                expected="a sum of names of other axes",
            )
        total = sum(sizes[part] for part in parts)
        if spec.shape[axis] != total:
            shown = ", ".join(f"{part}={sizes[part]}" for part in parts)
            raise InputSpecError(f"{what} has {symbol}={spec.shape[axis]}", expected=f"{total}, as {shown}")


def summands(symbol: str) -> tuple[str, ...]:
    """The names that the name of an axis is the sum of: ``past+seq`` of two, ``seq`` of one."""
    return tuple(part.strip() for part in symbol.split("+"))


def sizes_of(specs: Sequence[InputSpec], inputs: Sequence[Tensor]) -> dict[str, int]:
    """The size of every named axis in these flat inputs; of a sum those of its parts alone."""
    return {
        symbol: tensor.shape[axis]
        for spec, tensor in zip(specs, inputs, strict=True)
        for axis, symbol in spec.dynamic
        if len(summands(symbol)) == 1
    }


def cut(specs: Sequence[InputSpec], inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> list[Tensor]:
    """The first entries of flat inputs along named axes, as many as `sizes` says."""
    sizes = {**sizes_of(specs, inputs), **sizes}
    found = []
    for spec, tensor in zip(specs, inputs, strict=True):
        shape = spec.sized(sizes, least=0)
        for axis, _ in spec.dynamic:
            tensor = tensor.narrow(axis, 0, shape[axis])
        found.append(tensor.contiguous())
    return found


def _is_name(symbol: str) -> bool:
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in summands(symbol))


def _same_size(sizes: dict[str, int], symbol: str, size: int, what: str) -> None:
    known = sizes.setdefault(symbol, size)
    if known != size:
        fix = f"write the same size for each {symbol!r}, or another name for one of them"
        if symbol == BATCH:
            fix += '; where axis 0 is no batch, fix it: "!1"'
        raise InputSpecError(
            f"{what} has {symbol}={size}, but {symbol} was {known} before",
            expected="one size for one name",
            fix=fix,
        )


def _parse_dtype(text: str, word: str) -> torch.dtype:
    dtype = DTYPES.get(word.lower().removeprefix("torch."))
    if dtype is not None:
        return dtype
    lower = word.lower()
    close = difflib.get_close_matches(lower, DTYPES, n=1, cutoff=0.4)
    if lower not in _OTHER_WORDS and not close and ":" not in text and _NAME.fullmatch(word):
        # nothing like a dtype: most likely a name without one
        raise InputSpecError(
            f"input {text!r}: {word!r} is no dtype; a name stands before a colon",
            expected=_EXAMPLES,
            fix=repr(text.replace(word, f"{word}:float32", 1)),
        )
    nearest = (
        _OTHER_WORDS.get(lower) or (close or difflib.get_close_matches(lower, DTYPES, n=1, cutoff=0.0))[0]
    )
    raise InputSpecError(
        f"input {text!r}: unknown dtype {word!r}; the nearest is {nearest!r}",
        expected=f"one of {', '.join(DTYPES)}",
        fix=repr(text.replace(word, nearest)),
    )


def _parse_dim(text: str, part: str, axis: int) -> tuple[int, str | None]:
    match = _DIM.fullmatch(part)
    if match is None:
        raise _malformed(text, f"{part!r} is not a size" if part else f"size {axis + 1} is empty")
    # Longer digit strings are refused before int(): Python itself raises on very long ones.
    size = int(match["size"]) if len(match["size"]) < 20 else _LARGEST + 1
    if not 1 <= size <= _LARGEST:
        raise _malformed(text, f"size {match['size'][:20]} is not between 1 and {_LARGEST}")
    symbol = match["symbol"].strip() if match["symbol"] is not None else None
    if symbol is not None and not _is_name(symbol):
        raise _malformed(text, f"{symbol!r} cannot name an axis")
    if symbol is None and axis == 0 and not match["fixed"]:
        symbol = BATCH
    return size, symbol


def _malformed(text: str, why: str) -> InputSpecError:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return InputSpecError(f"input {shown!r} cannot be read: {why}", expected=_EXAMPLES)
