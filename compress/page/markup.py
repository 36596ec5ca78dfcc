"""HTML as text, built so that nothing a model is named can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


class Html(str):
    """Markup that may stand in a page as it is. Any other text is escaped by `tag`."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
"""What stands in an element."""

_VOID = frozenset({"br", "hr", "input", "link", "meta", "wbr"})


def tag(name: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        children: text, which is escaped; `Html`, which is not; lists of both; None is nothing.
        attributes: values are escaped; None and False are left out, True is written without a value.
            ``class_`` stands for ``class``, ``_`` for ``-``.
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(key if value is True else f'{key}="{html.escape(_text(value))}"')
    if name in _VOID:
        return Html(f"<{' '.join(written)}>")
    return Html(f"<{' '.join(written)}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after the other, as in `tag`."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(html.escape(child, quote=False))
        elif child is not None:
            parts.append(join(*child))
    return Html("".join(parts))


def path(name: str) -> Html:
    """A module path, which may be broken after its dots where the line is short."""
    parts = [join(part) for part in re.split(r"(?<=[./])", name) if part]
    return tag("code", Html("<wbr>".join(parts)))


def typeset(text: str) -> str:
    """ASCII of the command line in the signs of print: 2.00x is 2.00×, -> is an arrow."""
    return re.sub(r"(?<=\d)x(?= |$)", "×", text).replace(" -> ", " → ")


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        shown: text or markup.
        value: what the column is sorted by; None comes last whichever way it is sorted.
    """

    shown: str
    value: str | float | None


def figure(value: float | None, form: str = ".2f", unit: str = "") -> Cell:
    """A number as a cell; a dash where there is none."""
    if value is None:
        return Cell("–", None)
    return Cell(f"{value:{form}}{unit}", value)


def words(text: str) -> Cell:
    return Cell(text, str(text))


def table(
    label: str,
    columns: Iterable[tuple[str, str]],
    rows: Iterable[Iterable[Cell]],
    *,
    ident: str = "",
    stacks: bool = True,
) -> Html:
    """A table; the first cell of a row is its heading.

    Args:
        label: what it shows, for those who do not see it.
        columns: (heading, "text" or "number").
        rows: as many cells as there are columns.
        ident: id of the element. Tables with one can be sorted.
        stacks: whether a row becomes a card on a narrow screen; otherwise the table scrolls.
    """
    columns = list(columns)
    head = [
        tag("th", title, scope="col", class_=kind, role="columnheader", data_sorts=kind if ident else None)
        for title, kind in columns
    ]
    body = []
    for row in rows:
        cells = []
        for i, (cell, (title, kind)) in enumerate(zip(row, columns, strict=True)):
            value = "" if cell.value is None else cell.value
            cells.append(
                tag(
                    "td" if i else "th", cell.shown, scope=None if i else "row", class_=kind,
                    role="cell" if i else "rowheader", data_label=title if i else None,
                    data_value=value if ident and (kind == "number" or value != cell.shown) else None,
                    data_none=cell.shown in ("", "–"),
                )
            )  # fmt: skip
        body.append(tag("tr", cells, role="row"))
    element = tag(
        "table",
        tag("caption", label, class_="unseen"),
        tag("thead", tag("tr", head, role="row"), role="rowgroup"),
        tag("tbody", body, role="rowgroup"),
        id=ident or None, class_="stacks" if stacks else None, role="table",
    )  # fmt: skip
    return tag("div", element, class_="scrolls", role="region", aria_label=label, tabindex=0)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    # as JavaScript reads it
    return f"{value:.10g}".replace("inf", "Infinity")
