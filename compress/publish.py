"""From a temporary name to the real one: nothing half-written is ever left under the name of the output."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError, OutputError


def check_writable(path: Path) -> None:
    """Find out before any work is done whether a file can be written here.

    Raises:
        OutputError: it cannot.
    """
    folder = path.parent if str(path.parent) else Path()
    if path.is_dir():
        raise OutputError(f"{path} is a folder", expected="a file name such as model.onnx")
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist", fix=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} is not writable", fix="choose another place")
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"{path} is write-protected", fix="choose another name")


def check_apart(path: Path, read: Sequence[str | Path | None]) -> None:
    """Find out before any work is done whether a file would replace one that is needed.

    Args:
        path: to write.
        read: what is read, or written beside it: paths, or ``file.py:callable``; None is nothing.

    Raises:
        OutputError: it would.
    """
    for given in filter(None, map(str, filter(None, read))):
        for name in filter(None, {given, given.rpartition(":")[0]}):
            same = path.exists() and Path(name).exists() and path.samefile(name)
            if same or path.absolute() == Path(name).absolute():
                raise OutputError(f"{path} is one of the files read or written", fix="choose another name")


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A folder beside the output, so that the final rename stays on one file system.

    Raises:
        OutputError: what is done inside fails for want of room or rights.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder)
    except CompressError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}",
            fix="free some room, or choose another place",
        ) from error


def publish(written: Sequence[Path], path: Path) -> None:
    """Give files their place beside `path`, the main one, which comes first, last."""
    # the data first: a crash in between leaves no .onnx that points to nothing
    for source in reversed(written):
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(path.parent / source.name)
