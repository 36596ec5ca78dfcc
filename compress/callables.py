"""Callables the user names on the command line: ``package.module:callable`` or ``path/file.py:callable``."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from compress.checkpoint import first_line, shown
from compress.errors import CompressError, ModelFileError

Builder = str | Callable[[], nn.Module]
BUILDERS = "package.module:callable or path/file.py:callable"


def build(model: Builder) -> nn.Module:
    """The module a builder makes, on the CPU.

    Raises:
        ModelFileError: the builder cannot be found, raises, needs arguments, or returns no module.
    """
    name = model if isinstance(model, str) else getattr(model, "__qualname__", repr(model))
    builder = resolve_callable(model) if isinstance(model, str) else model
    if isinstance(builder, nn.Module):
        return builder.cpu()
    if not callable(builder):
        raise ModelFileError(f"--model is a {type(builder).__name__}", expected="a callable, or its name")
    with contextlib.suppress(ValueError, TypeError):  # some builtins have no signature
        needed = [
            p.name
            for p in inspect.signature(builder).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if needed:
            raise ModelFileError(
                f"--model {name} needs arguments: {shown(needed)}",
                expected="a callable without required arguments",
                fix=f"write a function that calls it: def build(): return {name.rpartition(':')[2]}(…)",
            )
    try:
        module = builder()
    except Exception as error:  # it is the user's code
        raise ModelFileError(
            f"--model {name} raised {type(error).__name__}: {first_line(error)}",
            expected="a callable that returns an nn.Module",
        ) from error
    if isinstance(module, nn.Module):
        return module if any(p.is_meta for p in module.parameters()) else module.cpu()
    what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
    raise ModelFileError(
        f"--model {name} returned {what}",
        expected="an nn.Module",
        fix=f"return {module.__name__}()" if isinstance(module, type) else "return the module itself",
    )


def resolve_callable(
    spec: str, what: str = "--model", *, error: type[CompressError] = ModelFileError
) -> Callable[..., Any]:
    """Import a callable named ``package.module:callable`` or ``path/to/file.py:callable``.

    The current folder counts as a place to import from. A file is imported once, under a name of its
    own; its folder stays at the end of `sys.path`, so that imports inside its functions work too.

    Args:
        spec: where it is; after the colon, attributes may be dotted.
        what: the option or argument it was given for, for messages.
        error: class of the errors raised.

    Raises:
        CompressError: of class `error`: malformed, not found, import failed, or not callable.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        example = spec.rstrip(":") or "package.module"
        raise error(f"{what} {spec!r} names no callable", expected=BUILDERS, fix=f"{what} {example}:build")
    is_file = place.endswith(".py") or "/" in place or os.sep in place
    module = _import_file(Path(place), what, error) if is_file else _import_module(place, what, error)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in dir(value) if not n.startswith("_") and callable(getattr(value, n, None))]
            near = difflib.get_close_matches(part, public, n=3)
            own = [n for n in public if getattr(getattr(value, n), "__module__", None) == module.__name__]
            raise error(
                f"{what} {spec}: {place} has no {part!r}",
                expected=f"one of {shown(own)}" if own else "the name of a function or class in it",
                fix=", ".join(f"{place}:{n}" for n in near),
            )
        value = getattr(value, part)
    if not callable(value):
        raise error(f"{what} {spec} is a {type(value).__name__}", expected="a callable")
    found: Callable[..., Any] = value
    return found


def _import_module(name: str, what: str, error: type[CompressError]) -> types.ModuleType:
    with on_path(Path.cwd(), keep=True):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as cause:
            if cause.name is None or not (name == cause.name or name.startswith(cause.name + ".")):
                raise _import_failed(name, what, cause, error) from cause
            parent, _, last = cause.name.rpartition(".")
            where = getattr(sys.modules.get(parent), "__path__", None) if parent else None
            known = [m.name for m in pkgutil.iter_modules(where)] if where or not parent else []
            near = [f"{parent}.{n}" if parent else n for n in difflib.get_close_matches(last, known, n=3)]
            raise error(
                f"{what}: there is no module {cause.name!r} here",
                expected=f"{BUILDERS}, importable from {Path.cwd()} or PYTHONPATH",
                fix=", ".join(near),
            ) from cause
        except (Exception, SystemExit) as cause:  # importing runs the user's code
            raise _import_failed(name, what, cause, error) from cause


def _import_file(path: Path, what: str, error: type[CompressError]) -> types.ModuleType:
    if not path.is_file():
        near: list[str] = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        raise error(
            f"{what}: there is no file {path}",
            expected="path/file.py:callable",
            fix=", ".join(str(path.parent / n) for n in near),
        )
    real = path.resolve()
    # one module for one version of the file, so that two options that name it share its classes
    digest = hashlib.sha256(f"{real}:{real.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"_compress_file_{real.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None or spec.loader is None:
        raise error(f"{what}: {path} is no Python file", expected="path/file.py:callable")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        with on_path(real.parent, keep=True):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as cause:  # importing runs the user's code
        del sys.modules[name]
        raise _import_failed(str(path), what, cause, error) from cause
    return module


def _import_failed(name: str, what: str, cause: BaseException, error: type[CompressError]) -> CompressError:
    return error(
        f"{what}: importing {name} raised {type(cause).__name__}: {first_line(cause)}",
        expected="a module that imports without error",
        fix=f"python {name}" if name.endswith(".py") else f"python -c 'import {name}'",
    )


@contextlib.contextmanager
def on_path(folder: Path, *, keep: bool) -> Iterator[None]:
    """First on `sys.path` meanwhile, as for a script run there; with `keep`, afterwards last."""
    entry = str(folder)
    before = entry in sys.path
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
        if keep and not before:
            sys.path.append(entry)
