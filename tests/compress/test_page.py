"""The page of a report as text: whole, safe, the same for the same data."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from compress.page import plots, render
from compress.page.markup import Html, path, tag
from compress.page.parts import time_words
from compress.report import Report

NAMES = (
    "run", "many", "one", "none", "bare", "engine", "strange", "broken", "benchmark", "judged", "failed",
    "begun", "same",
)  # fmt: skip
VOID = {"meta", "link", "input", "wbr", "br"}
Reports = dict[str, dict[str, Any]]


class Page(HTMLParser):
    """Checks that elements are nested; collects ids, text by element, and what could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.text: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        if name not in VOID:
            self.open.append(name)
        for key, value in attrs:
            self.attributes.append((name, key, value or ""))
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "data", "action", "srcset"):
                self.refers.append(value or "")

    def handle_endtag(self, name: str) -> None:
        assert self.open and self.open.pop() == name, f"</{name}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        self.text[inside] = self.text.get(inside, "") + data


def embedded(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found.group(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_whole_and_loads_nothing(reports: Reports, name: str) -> None:
    data = reports[name]
    text = render(data)
    page = Page(text)
    assert embedded(text) == data
    assert len(set(page.ids)) == len(page.ids)
    assert text == render(json.loads(json.dumps(data)))
    inside = [r for r in page.refers if r.startswith("#")]
    assert all(r[1:] in page.ids for r in inside) and inside
    assert all(r.startswith(("#", "data:")) for r in page.refers)
    assert "http" not in page.text["style"] and "url(" not in page.text["style"]
    assert not any(key.startswith("on") or key == "style" for _, key, _ in page.attributes)
    labels = {value for _, key, value in page.attributes if key in ("aria-labelledby", "aria-describedby")}
    assert labels <= set(page.ids)
    assert not re.search(r"None|\b(nan|inf)\b", page.text.get("td", ""))


def test_what_runs_is_named_by_its_digest(reports: Reports) -> None:
    import base64
    import hashlib

    page = Page(render(reports["strange"]))
    policy = next(v for _, k, v in page.attributes if k == "content" and v.startswith("default-src"))
    for kind in ("style", "script"):
        start = 0 if kind == "style" else page.text["script"].index("// Sorts")
        digest = base64.b64encode(hashlib.sha256(page.text[kind][start:].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_names_stay_text(reports: Reports) -> None:
    text = render(reports["strange"])
    names = [row["layer"] for row in reports["strange"]["layers"]]
    assert "<img" not in text and "onerror=alert(1)&gt;" in text
    shown = Page(text).text["code"]
    assert all(name in shown for name in names)
    assert text.count("</script>") == 2


def test_every_layer_is_in_the_table(reports: Reports) -> None:
    for row in reports["run"]["layers"]:
        text = str(path(row["layer"]))
        assert text in render(reports["run"])
    assert render(reports["many"]).count('role="rowheader"') >= 300


def test_times_at_several_thread_counts_are_told_apart(reports: Reports) -> None:
    page = render(reports["threads"])
    assert "at batch 1 · 1 thread, speed-up 2.00" in page and "slower at batch 1 · 4 threads" in page
    assert "thread" not in render(reports["run"]).split("Size")[1].split("Fidelity")[0]


def test_text_is_sorted_by_what_it_says(reports: Reports) -> None:
    # its cell also shows the number of a dot and the maker
    assert 'data-value="int8-weight-only"' in render(reports["benchmark"])


def test_a_megabyte_is_enough(reports: Reports) -> None:
    assert all(len(render(data).encode()) < 1_000_000 for data in reports.values())


def test_a_loss_looks_like_one(reports: Reports) -> None:
    text = render(reports["run"])
    assert '<span class="bad-text">1.19× slower at batch 32 · seq 32</span>' in text
    assert "not finite" in render(reports["broken"]) and "identical" in render(reports["one"])
    failed = render(reports["benchmark"])
    assert "int4-sparse failed: out of memory" in failed
    assert "static int8 interrupted: no reason was given" in failed


def test_a_metric_that_tells_nothing_apart_is_not_plotted(reports: Reports) -> None:
    text = render(reports["same"])
    assert "The perplexity does not tell them apart" in text and "↑ SQNR, dB" in text
    assert "↑ perplexity, lower is better" in render(reports["judged"])


@pytest.mark.parametrize(
    ("ms", "words"),
    [(0.0432, "0.0432 ms"), (0.5, "0.500 ms"), (12.571, "12.6 ms"), (348.577, "349 ms"), (0, "0 ms")],
)
def test_times(ms: float, words: str) -> None:
    assert time_words(ms) == words


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="of kind 'diff'; expected one of run, benchmark"):
        render({"kind": "diff"})


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", "<b>", Html("<i></i>"), ["&", None], class_="a", data_x='"', hidden=True, id=None) == (
        '<p class="a" data-x="&quot;" hidden>&lt;b&gt;<i></i>&amp;</p>'
    )
    assert path("a.b<c") == "<code>a.<wbr>b&lt;c</code>"


@pytest.mark.parametrize("values", [[3.0], [0.0], [0.1, 0.1000001], [-5.0, 40.0], [1e-9, 1e9], [0.0, 1e-7]])
@pytest.mark.parametrize("zero", [True, False])
def test_axes_hold_their_values_and_have_ticks(values: list[float], zero: bool) -> None:
    for axis in (plots.linear("", values, zero=zero), plots.linear("", values, falls=True)):
        assert 1 <= len(axis.ticks) <= 9 and len(set(map(axis.words, axis.ticks))) == len(axis.ticks)
        assert all(axis.low <= v <= axis.high for v in (*values, *axis.ticks))
        assert all(0 <= axis.at(v) <= 100 and math.isfinite(axis.at(v)) for v in values)
    if min(values) > 0:
        axis = plots.logarithmic("", values)
        assert all(0 < axis.at(v) < 100 for v in values) and axis.ticks


def test_the_border_of_a_plane() -> None:
    points = [plots.Point(n, n, x, y, "") for n, x, y in (("a", 1, 5), ("b", 2, 9), ("c", 3, 8), ("d", 1, 4))]
    axis = plots.linear("", [0, 10])
    assert [p.name for p in plots.front(points, axis, axis, True)] == ["a", "b"]
    assert [p.name for p in plots.front(points, axis, axis, False)] == ["b", "c"]
    falling = plots.linear("", [0, 10], falls=True)
    assert [p.name for p in plots.front(points, axis, falling, True)] == ["d"]


def test_blocks_of_layers() -> None:
    names = ["embed", "layer.0.q", "layer.0.k", "layer.1.q", "head", "layer.1.z", "0.conv", "model"]
    assert plots.blocks_of(names) == [(1, 3, "0"), (3, 4, "1"), (5, 6, "1"), (6, 7, "0")]


def test_a_report_gives_its_page(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "as_dict", lambda self: reports["run"])
    assert Report.to_html(object.__new__(Report)) == render(reports["run"])
