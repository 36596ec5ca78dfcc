"""A report as a file: a page, JSON or Markdown, by the end of its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import OutputError
from compress.publish import check_apart, check_writable, publish, temporary

FORMATS = (".html", ".json", ".md")


def check(path: Path, keep: Sequence[str | Path | None] = ()) -> None:
    """Find out before any work is done whether a report can be written here.

    Args:
        path: of the report.
        keep: what it may not replace, as for `compress.publish.check_apart`.

    Raises:
        OutputError: the name ends in no format, or it cannot be written there.
    """
    if path.suffix not in FORMATS:
        raise OutputError(f"{path} is no report", expected=f"a name that ends in {', '.join(FORMATS)}")
    check_writable(path)
    check_apart(path, keep)


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
    """Replace a text file by another at once.

    Raises:
        OutputError: there is no room, or no right to.
    """
    with temporary(path) as folder:
        part = folder / path.name
        part.write_text(content, encoding="utf-8", newline="\n")
        publish([part], path)
    return path
