"""A report as one HTML page: for a browser, a phone, a printer; it asks the network for nothing.

`render` takes what `Report.as_dict` or `Benchmark.as_dict` gives. The page works without its script, which
only sorts, filters and points. All that it shows is in it again as JSON. The same data gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.page import benchmark, run
from compress.page.markup import Html, join, tag, typeset
from compress.page.parts import Section

_KINDS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "run": run.sections,
    "benchmark": benchmark.sections,
}
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath "
    "fill='%233553d1' d='M2 2h12v3H2zm2 4.5h8v3H4zM6 11h4v3H6z'/%3E%3C/svg%3E"
)


def render(data: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        data: JSON-able, as of `Report.as_dict` ("kind" is "run", or is not there) or `Benchmark.as_dict`
            ("kind" is "benchmark").

    Returns:
        one HTML document, style, script and data within.

    Raises:
        ValueError: it is of another kind.
    """
    kind = data.get("kind", "run")
    if kind not in _KINDS:
        raise ValueError(f"a report of kind {kind!r}; expected one of {', '.join(_KINDS)}")
    sections = _KINDS[kind](data)
    style, script = _asset("style.css"), _asset("script.js")
    title = f"{run.name_of(data)} · compress"
    head = [
        tag("meta", charset="utf-8"),
        # all that may run or style is this very text: a name that got past the escaping could do nothing
        tag(
            "meta", http_equiv="Content-Security-Policy",
            content=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
            f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
        ),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("meta", name_="description", content=typeset(str(data.get("headline", "")))),
        tag("title", title),
        tag("link", rel="icon", href=_ICON),
        tag("style", Html(style)),
    ]  # fmt: skip
    top = tag(
        "header",
        tag("span", "compress", class_="brand"),
        tag(
            "nav", [tag("a", s.title, href=f"#{s.ident}") for s in sections if s.title], aria_label="Sections"
        ),
        tag("button", "Dark", type="button", id="theme", hidden=True),
        class_="top",
    )
    body = [
        tag("a", "Skip to the report", href="#report", class_="skip"),
        top,
        tag("main", [s.html() for s in sections], id="report"),
        tag(
            "footer",
            tag("p", "Everything on this page is in it as JSON, too. It loads nothing."),
            tag("button", "Save the JSON", type="button", id="save", hidden=True),
        ),
        tag("script", Html(_json(data)), type="application/json", id="data"),
        tag("script", Html(script)),
    ]
    page = join(tag("head", head), tag("body", body))
    return f"<!doctype html>\n{tag('html', page, lang='en')}\n"


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
