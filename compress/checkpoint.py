"""Weights out of a checkpoint file, and into a module: nothing executed, nothing dropped silently."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import difflib
import itertools
import os
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import ModelFileError, UntrustedFileError
from compress.pickles import HARMLESS_GLOBALS
from compress.sniff import Sniffed

# Where training programs put the weights, most specific first.
_CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights"),
    *("params", "params_ema", "ema", "ema_state_dict", "state"),
)
_MODEL_PREFIXES = ("model.", "net.", "network.")
# torch.compile, FSDP, activation checkpointing (these also occur inside names) and DataParallel
_WRAPPERS = (
    *("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module."),
    *_MODEL_PREFIXES,
)
_SHOWN = 5


# --- stand-ins ----------------------------------------------------------------------------------------
# numpy's own unpickling trusts dtype flags and object pointers in the file, so it is not used: these take
# the plain numeric cases and refuse the rest.

_NUMERIC = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|[SU]\d+)")


class _Dtype:
    """``numpy.dtype`` in a checkpoint: a type code, later a byte order; never fields, flags or objects."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise pickle.UnpicklingError(f"a numpy array of type {code!r}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">") and self.code[0] not in "<>=|":
            self.code = state[1] + self.code

    def read(self, data: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.frombuffer(data, dtype=self.code).reshape(shape)


class _Array:
    """``numpy.ndarray`` in a checkpoint."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("a numpy array of Python objects")
        self.value = dtype.read(data, shape[::-1]).T if fortran else dtype.read(data, shape)


def _scalar(dtype: _Dtype, data: bytes) -> object:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is a Python object")
    return dtype.read(data, ()).item()


def _array(*_: object) -> _Array:
    return _Array()


def _dict(*_: object) -> dict[object, object]:
    return {}


def _list(items: Iterable[object] = (), _maxlen: object = None) -> list[object]:
    return list(items)


def _stand_in(name: str) -> Callable[..., object]:
    """What the weights-only unpickler uses for one of `HARMLESS_GLOBALS`. None of them has a side effect."""
    module, _, kind = name.rpartition(".")
    if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return _scalar if kind == "scalar" else _array
    if module.startswith("pathlib"):
        # the pure classes never touch the disk and exist for the other system's paths too
        return pathlib.PureWindowsPath if "Windows" in kind else pathlib.PurePosixPath
    table: dict[str, Callable[..., object]] = {
        "argparse.Namespace": argparse.Namespace,
        "types.SimpleNamespace": types.SimpleNamespace,
        # the unpickler fills only plain dicts and lists
        "collections.defaultdict": _dict,
        "collections.deque": _list,
        "numpy.ndarray": _Array,
        "numpy.dtype": _Dtype,
    }
    if name in table:
        return table[name]
    home = {"builtins": builtins, "datetime": datetime, "numpy": np}[module]
    found: Callable[..., object] = getattr(home, kind)
    return found


# --- reading ------------------------------------------------------------------------------------------


def load_weights_only(path: Path, found: Sniffed) -> object:
    """What a checkpoint holds, by `torch.load(weights_only=True)`; harmless extra types are stood in for.

    Raises:
        UntrustedFileError: weights-only loading refused the file.
        ModelFileError: the file is damaged.
    """
    allowed: list[Any] = [(_stand_in(n), n) for n in found.globals if n in HARMLESS_GLOBALS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # torch.load goes by this suffix, we do not
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    except pickle.UnpicklingError as error:
        raise UntrustedFileError(
            f"{path} holds more than weights: {_reason(error)}",
            expected="tensors, numbers, strings, lists and dicts",
            fix="save only the weights: torch.save(model.state_dict(), 'weights.pt'); or --trust, "
            "if you know who made the file",
        ) from error
    except Exception as error:  # torch and zip readers promise no particular error for damaged files
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> ModelFileError:
    return ModelFileError(
        f"{path} cannot be read to its end: {first_line(error)}",
        fix="copy or download it again; or save it again with the PyTorch installed here",
    )


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).strip()[:300]


def _reason(error: BaseException) -> str:
    """The one line that matters of torch's long message."""
    text = str(error)
    for pattern in (
        r"GLOBAL (\S+) was not an allowed global",
        r"unsupported GLOBAL (\S+) whose module",
        r"(Unsupported operand \d+)",
        r"((?:Can only|Trying to call) [^\n]*)",
    ):
        match = re.search(pattern, text)
        if match:
            return match[1]
    lines = [line for line in text.splitlines() if line.strip() and "eights only" not in line]
    return lines[0].strip()[:200] if lines else first_line(error)


def _can_map(path: Path) -> bool:
    """Whether the tensors lie in the file as they are, so that it can be mapped instead of read."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())


# --- finding the weights ------------------------------------------------------------------------------


def find_state_dict(value: object, path: Path, notes: list[str]) -> dict[str, Any]:
    """The name -> tensor dict in what a checkpoint held, at most two levels down.

    Raises:
        ModelFileError: there is none, or several with nothing to choose by.
    """
    inner: object = value
    where: list[str] = []
    for _ in range(3):
        if not isinstance(inner, Mapping):
            break
        tensors = _tensors(inner)
        keys = [k for k in _CONTAINERS if isinstance(inner.get(k), Mapping) and _holds_tensors(inner[k])]
        others = [k for k, v in inner.items() if isinstance(v, Mapping) and _tensors(v)]
        if tensors and not keys:
            left = [str(k) for k in inner if str(k) not in tensors and not str(k).endswith("_extra_state")]
            if left:
                notes.append(f"left out {len(left)} entries that are no tensors: {shown(left)}")
            if where:
                notes.append(f"took the weights under {'.'.join(where)!r}")
            return _with_metadata(inner, tensors)
        if not keys and len(others) > 1:
            raise ModelFileError(
                f"{path} holds several sets of weights: {shown([str(k) for k in others])}",
                expected="one, or one of them under 'state_dict' or 'model'",
                fix=f"torch.save(torch.load({path.name!r})[{others[0]!r}], 'weights.pt')",
            )
        keys = keys or others
        if not keys:
            break
        if len(keys) > 1:
            notes.append(f"took {keys[0]!r}; the file also holds {shown(keys[1:])}")
        where.append(str(keys[0]))
        inner = inner[keys[0]]
    held = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        held = f"a dict with {shown([str(k) for k in value])}" if value else "an empty dict"
    raise ModelFileError(
        f"{path} holds no weights, but {held}",
        expected="a dict of tensors by name, perhaps under 'state_dict' or 'model'",
        fix="torch.save(model.state_dict(), 'weights.pt')",
    )


def _tensors(table: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, _Array | np.ndarray):
            array = value.value if isinstance(value, _Array) else value
            if array.dtype.kind in "biuf":
                found[str(key)] = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        elif isinstance(value, Tensor):
            found[str(key)] = value
    if found:
        found.update({str(k): v for k, v in table.items() if str(k).endswith("_extra_state")})
    return found


def _holds_tensors(table: Mapping[Any, Any]) -> bool:
    values = list(table.values())
    return bool(_tensors(table)) or any(isinstance(v, Mapping) and _tensors(v) for v in values)


def _with_metadata(source: object, tensors: dict[str, Any]) -> dict[str, Any]:
    """Keep module versions, which `load_state_dict` reads to take in weights of older PyTorch."""
    state: dict[str, Any] = collections.OrderedDict(tensors)
    metadata = getattr(source, "_metadata", None)
    if isinstance(metadata, dict):
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def shown(names: Iterable[str], limit: int = _SHOWN) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- into the module ----------------------------------------------------------------------------------


def fill(module: nn.Module, state: dict[str, Any], path: Path, notes: list[str]) -> None:
    """Copy weights into a module, in its own dtypes.

    A module built on the meta device has nothing to copy to and takes the tensors themselves; those of a
    safetensors file are the file mapped into memory, so a model larger than memory can be loaded like this.

    Args:
        module: changed in place.
        state: name -> tensor of any floating dtype; wrapper prefixes are stripped.
        path: for messages.
        notes: gets a line for everything that was not a plain copy.

    Raises:
        ModelFileError: names, shapes or kinds of tensors do not match.
    """
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    hollow = any(_is_meta(t) for t in own.values())
    state = _rename(state, own, notes)
    hidden = {n for n, _ in module.named_buffers() if n not in own}
    skipped = [k for k in state if k not in own and (k in hidden or k.endswith("num_batches_tracked"))]
    if skipped:
        notes.append(f"left out {len(skipped)} entries the module computes itself: {shown(skipped)}")
    state = _with_metadata(state, {k: v for k, v in state.items() if k not in skipped})
    lines = _misfits(state, own)
    missing: list[str] = []
    unexpected: list[str] = []
    if not lines:
        _check_tied(state, own)
        casts = _casts(state, own)
        try:
            with torch.no_grad():
                if hollow:
                    for key in [k for k in state if isinstance(own.get(k), Tensor)]:
                        state[key] = state[key].to(own[key].dtype)
                # hooks of the module may rename old keys, so what is missing is its word, not ours
                missing, unexpected = module.load_state_dict(state, strict=False, assign=hollow)
        except Exception as error:  # a hook is anyone's code
            raise ModelFileError(f"{path} does not fit the module: {first_line(error)}") from error
        notes.extend(casts)
    else:
        missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    present = {id(v) for k, v in own.items() if k not in missing}
    missing = [k for k in missing if id(own[k]) not in present and not k.endswith("num_batches_tracked")]
    if missing:
        lines.append(f"{len(missing)} missing: {shown(_described(missing, own, unexpected))}")
    if unexpected:
        lines.append(f"{len(unexpected)} not in the module: {shown(_described(unexpected, state, missing))}")
    if lines:
        name = type(module).__name__
        raise ModelFileError(
            f"the weights in {path} do not fit {name}, which has {len(own)} tensors\n    "
            + "\n    ".join(lines),
            expected=f"the state_dict of this {name}",
            fix="check the arguments --model builds the module with",
        )
    if hollow:
        _tie(module, own)
        named = itertools.chain(module.named_parameters(), module.named_buffers())
        empty = [name for name, tensor in named if _is_meta(tensor)]
        if empty:
            raise ModelFileError(
                f"--model built {len(empty)} tensors without memory (on the meta device), and {path} "
                f"does not hold them: {shown(empty)}",
                expected="only what the file holds to be on the meta device",
                fix="give these their values after the module is built",
            )


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and not nn.parameter.is_lazy(value) and value.is_meta


def _tie(module: nn.Module, own: Mapping[str, Any]) -> None:
    """Make one parameter again of those that were one before each of their names was assigned to."""
    first: dict[int, nn.Parameter] = {}
    names = [name for name in own if isinstance(own[name], nn.Parameter)]
    held = [name for name in names if not _is_meta(module.get_parameter(name))]
    for name in sorted(names, key=held.__contains__, reverse=True):
        kept = first.setdefault(id(own[name]), module.get_parameter(name))
        place, _, last = name.rpartition(".")
        setattr(module.get_submodule(place), last, kept)


def _rename(state: dict[str, Any], own: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Strip what wrappers (DataParallel, compile, FSDP, Lightning) put into the names, where that helps."""

    def matches(keys: Iterable[str]) -> int:
        return sum(k in own for k in keys)

    present = [w for w in _WRAPPERS if any(w in k for k in state)]
    chosen: tuple[str, ...] = ()
    best = (matches(state), False)
    for count in range(1, len(present) + 1):
        for wrappers in itertools.combinations(present, count):
            names = {k: _strip(k, wrappers) for k in state}
            whole = set(names.values()) == set(own)
            # these may well be names of the module's own, so only where every name then fits
            if wrappers[-1] in _MODEL_PREFIXES and not (whole and not matches(state)):
                continue
            if len(set(names.values())) == len(names) and (matches(names.values()), whole) > best:
                best, chosen = (matches(names.values()), whole), wrappers
    if not chosen:
        return state
    names = {k: _strip(k, chosen) for k in state}
    changed = sum(k != v for k, v in names.items())
    notes.append(f"stripped {' and '.join(map(repr, chosen))} from {changed} names")
    # versions are by module name; without them load_state_dict takes the weights for older ones
    return {names[k]: v for k, v in state.items()}


def _strip(key: str, wrappers: Iterable[str]) -> str:
    for wrapper in wrappers:
        inner = wrapper.startswith("_")
        key = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", key) if inner else key.removeprefix(wrapper)
    return key


def _misfits(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    shapes, kinds = [], []
    for key, mine in own.items():
        given = state.get(key)
        if not isinstance(given, Tensor) or not isinstance(mine, Tensor) or nn.parameter.is_lazy(mine):
            continue
        # load_state_dict takes a 1-element tensor for a scalar
        if given.shape != mine.shape and not (given.numel() == 1 and mine.ndim == 0):
            shapes.append(f"{key} is {list(given.shape)}, the module has {list(mine.shape)}")
        elif mine.is_floating_point() and not given.is_floating_point():
            kinds.append(f"{key} is {given.dtype}, the module has {mine.dtype}")
    lines = [f"{len(shapes)} of another shape: {shown(shapes)}"] if shapes else []
    if kinds:
        lines.append(f"{len(kinds)} not floating point (a quantized model?): {shown(kinds)}")
    return lines


def _check_tied(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """One parameter under two names must not be given two values: the later would win unseen."""
    first: dict[int, str] = {}
    for key, mine in own.items():
        if key not in state or not isinstance(mine, Tensor):
            continue
        other = first.setdefault(id(mine), key)
        if other != key and not torch.equal(state[other], state[key]):
            raise ModelFileError(
                f"{other} and {key} are one tied weight in the module, but differ in the file",
                expected="equal tensors, or a module that does not tie them",
            )


def _casts(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for key, mine in own.items():
        given = state.get(key)
        if isinstance(given, Tensor) and isinstance(mine, Tensor) and given.dtype != mine.dtype:
            counts[str(given.dtype).removeprefix("torch."), str(mine.dtype).removeprefix("torch.")] += 1
    return [f"cast {n} tensors from {a} to {b}" for (a, b), n in sorted(counts.items())]


def _described(names: list[str], table: Mapping[str, Any], candidates: list[str]) -> list[str]:
    """Names with shapes, and for the first few the nearest name on the other side."""
    lines = []
    for position, name in enumerate(names):
        value: Any = table.get(name)
        shape = (
            f" {list(value.shape)}" if isinstance(value, Tensor) and not nn.parameter.is_lazy(value) else ""
        )
        near = (
            difflib.get_close_matches(name, candidates[:2000], n=1, cutoff=0.75) if position < _SHOWN else []
        )
        lines.append(f"{name}{shape}" + (f" (is it {near[0]}?)" if near else ""))
    return lines


def check_finite(module: nn.Module | torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Refuse NaN and infinite weights. Infinite buffers pass: attention masks are made of them.

    Raises:
        ModelFileError: names the tensors.
    """
    bad = [n for n, t in module.named_parameters() if _breaks(t, torch.isfinite)]
    bad += [n for n, t in module.named_buffers() if _breaks(t, lambda t: ~torch.isnan(t))]
    if bad:
        raise ModelFileError(
            f"{path} holds NaN or infinite weights in {len(bad)} tensors: {shown(bad)}",
            expected="finite numbers",
            fix="take an earlier checkpoint; this one comes from a training run that diverged",
        )


def _breaks(tensor: Tensor, test: Callable[[Tensor], Tensor]) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or nn.parameter.is_lazy(tensor):
        return False
    plain = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    return not bool(test(plain).all())
