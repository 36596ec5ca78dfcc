"""A report as a file: a page, JSON or Markdown, by the end of its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import OutputError

FORMATS = (".html", ".json", ".md")


def check(path: Path, keep: Sequence[str | None] = ()) -> None:
    """Find out before any work is done whether a report can be written here.

    Args:
        path: of the report.
        keep: paths of what is read, none of which it may replace.

    Raises:
        OutputError: the name ends in no format, the folder is not there, or it is one of the files read.
    """
    if path.suffix not in FORMATS:
        raise OutputError(f"{path} is no report", expected=f"a name that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}", fix="make it, or choose another with --report")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", expected="the name of a file")
    for given in filter(None, keep):
        if path.exists() and Path(given).exists() and path.samefile(given):
            raise OutputError(f"{path} is one of the files read", fix="choose another name with --report")


def text(data: Mapping[str, Any], suffix: str) -> str:
    """The report in one of `FORMATS`.

    Args:
        data: of `Report.as_dict` or `Benchmark.as_dict`.
        suffix: with its dot.
    """
    if suffix == ".html":
        from compress.page import render

        return render(data)
    if suffix == ".md":
        from compress.card import card

        return card(data)
    return json.dumps(data, indent=2) + "\n"


def write(data: Mapping[str, Any], path: Path) -> Path:
    """Write a report, whole or not at all; the same data gives the same bytes.

    Raises:
        OutputError: see `check`.
    """
    check(path)
    return put(text(data, path.suffix), path)


def put(content: str, path: Path) -> Path:
    """Replace a text file by another at once."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        part.write_text(content, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
