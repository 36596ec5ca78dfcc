"""Pages in a real, headless Chromium: what is seen is the data, on every screen, and nothing is asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.page import render
from compress.report import size_words

NAMES = (
    "run", "many", "one", "none", "bare", "engine", "strange", "broken", "benchmark", "judged", "failed",
    "begun",
)  # fmt: skip
BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
INSTALL = "apt-get install chromium-headless-shell, or playwright install --only-shell chromium"
Open = Callable[..., Any]

OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const worst = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "DESC", "TITLE", "OPTION"].includes(element.tagName.toUpperCase())) continue;
    const style = getComputedStyle(element);
    const circle = element.classList.contains("mark") && element.parentElement.querySelector("circle");
    const back = circle ? parse(getComputedStyle(circle).fill) : behind(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink.slice(0, 3)), light(back.slice(0, 3))].sort((x, y) => y - x);
    worst.push([(a + 0.05) / (b + 0.05), element.tagName + "." + element.getAttribute("class") + ": " + element.textContent.slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
}"""  # noqa: E501 - JavaScript


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as p:
        own = p.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own if Path(own).exists() else None)
        if found is None:
            pytest.skip(f"no Chromium here: {INSTALL}")
        # its sandbox does not start as root
        opened = p.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture
def show(browser: Any, reports: dict[str, dict[str, Any]], tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a report; at the end nothing may have been complained of, or asked for."""
    contexts, complaints, asked = [], [], []

    def opened(name: str, width: int = 1280, **options: Any) -> Any:
        file = tmp_path / f"{name}.html"
        file.write_text(render(reports[name]), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("data:image/svg") or url.endswith(".html") for url in asked)
    assert sum(url.startswith("file:") for url in asked) == len(contexts)


def column(page: Any, index: int, table: str = "layer-table") -> list[str]:
    """Text of the visible cells of a column."""
    script = """([table, i]) => [...document.querySelectorAll(`#${table} tbody tr`)]
        .filter((row) => row.checkVisibility()).map((row) => row.cells[i].textContent)"""
    found: list[str] = page.evaluate(script, [table, index])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_on_every_screen_and_paper(name: str, show: Open, reports: dict[str, dict[str, Any]]) -> None:
    page = show(name, width=360)
    for width in (360, 700, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(OVERFLOWING) <= 0, f"{name} is too wide for {width} pixels"
    for scheme in ("light", "dark") if name in ("run", "benchmark", "strange") else ():
        page.emulate_media(color_scheme=scheme)
        ratio, where = page.evaluate(CONTRAST)
        assert ratio >= 4.5, f"{scheme}: contrast {ratio:.2f} of {where}"
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 800})
    assert page.evaluate(OVERFLOWING) <= 0
    assert not page.locator(".top").is_visible()
    assert page.evaluate("JSON.parse(document.getElementById('data').textContent)") == reports[name]


def test_the_table_is_the_data(show: Open, reports: dict[str, dict[str, Any]]) -> None:
    for name in ("run", "strange"):
        page, rows = show(name), reports[name]["layers"]
        assert column(page, 0) == [row["layer"] for row in rows]
        assert column(page, 1) == [row["action"] for row in rows]
        assert column(page, 2) == [f"{row['bits']:.2f}" for row in rows]
        assert column(page, 5) == [size_words(row["bytes"]) for row in rows]
        assert column(page, 6) == [f"{100 * row['error']:.2f} %" for row in rows]
        assert set(column(page, 7)) == {"MatMulNBits"}
        heights = [float(bar.get_attribute("height").rstrip("%")) for bar in page.locator(".bar.error").all()]
        largest = max(row["error"] for row in rows)
        scale = max(heights) / largest
        assert heights == pytest.approx([scale * row["error"] for row in rows], abs=0.01)


def test_headings_sort(show: Open, reports: dict[str, dict[str, Any]]) -> None:
    page, rows = show("run"), reports["run"]["layers"]
    headings = page.locator("#layer-table thead th")
    assert [h.get_attribute("aria-sort") for h in headings.all()] == ["none"] * 8
    natural = [row["layer"] for row in rows]
    by_error = [row["layer"] for row in sorted(rows, key=lambda row: row["error"])]
    error = headings.filter(has_text="error")
    for wanted, order in (("descending", by_error[::-1]), ("ascending", by_error), ("none", natural)):
        error.get_by_role("button").click()
        assert error.get_attribute("aria-sort") == wanted
        assert column(page, 0) == order
    # by keyboard; and one column at a time
    first = headings.first.get_by_role("button")
    first.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert headings.first.get_attribute("aria-sort") == "descending"
    assert column(page, 0) == sorted(natural, reverse=True)
    assert error.get_attribute("aria-sort") == "none"


def test_what_has_no_number_comes_last(show: Open) -> None:
    page = show("broken")
    for _ in range(2):
        page.locator("#layer-table thead th").filter(has_text="error").get_by_role("button").click()
        assert [text == "not finite" for text in column(page, 6)] == [False, False, False, True, True]
    page = show("judged")
    assert column(page, 7, "candidates-table")[:2] == ["exact", "identical"]
    heading = page.locator("#candidates-table thead th").filter(has_text="SQNR")
    for way in ("descending", "ascending"):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == way
        values = column(page, 7, "candidates-table")
        assert values[-2:] == ["–", "–"], "what failed has none"
        assert values[:-2][:: 1 if way == "descending" else -1][-1] == "not finite"
        assert {"exact", "identical"} == set(values[:2] if way == "descending" else values[-4:-2])


def test_filters(show: Open, reports: dict[str, dict[str, Any]]) -> None:
    page, rows = show("run"), reports["run"]["layers"]
    find, count = page.get_by_label("Find"), page.locator(".count")
    find.fill("LAYER.1 dense")
    wanted = [row["layer"] for row in rows if "layer.1." in row["layer"] and "dense" in row["layer"]]
    assert column(page, 0) == wanted and len(wanted) == 3
    assert count.text_content() == f"{len(wanted)} of {len(rows)} layers"
    assert page.locator(".bar.error.dim").count() == len(rows) - len(wanted)
    page.get_by_label("Action").select_option("int8 g32")
    wanted = [row["layer"] for row in rows if row["layer"] in wanted and row["action"] == "int8 g32"]
    assert column(page, 0) == wanted
    page.locator("#layer-table thead th").first.get_by_role("button").click()
    assert column(page, 0) == sorted(wanted)
    find.fill("no such layer")
    assert column(page, 0) == [] and count.text_content() == f"0 of {len(rows)} layers"
    find.fill("")
    page.get_by_label("Action").select_option("")
    assert sorted(column(page, 0)) == sorted(row["layer"] for row in rows)
    assert page.locator(".dim").count() == 0


def test_the_plots_name_the_layer_pointed_at(show: Open, reports: dict[str, dict[str, Any]]) -> None:
    page, rows = show("run"), reports["run"]["layers"]
    # a sorted table must not change which layer is meant
    page.locator("#layer-table thead th").filter(has_text="error").get_by_role("button").click()
    readout = page.locator(".readout")
    resting = readout.text_content()
    page.locator(".bar.bits").nth(5).hover()
    assert rows[5]["layer"] in readout.text_content()
    assert f"error {100 * rows[5]['error']:.2f} %" in readout.text_content()
    page.mouse.move(0, 0)
    assert readout.text_content() == resting
    slider = page.get_by_role("slider", name="Layer")
    slider.focus()
    for key in ("End", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert rows[-2]["layer"] in slider.get_attribute("aria-valuetext")
    assert slider.get_attribute("aria-valuenow") == str(len(rows) - 1)
    assert page.locator("tr.shown th").text_content() == rows[-2]["layer"]
    page.keyboard.press("Escape")
    assert readout.text_content() == resting


def test_light_and_dark(show: Open) -> None:
    def lightness(page: Any) -> float:
        text = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, text[text.index("(") + 1 : -1].split(",")[:3])) / 765

    dark, light = show("one", color_scheme="dark"), show("one", color_scheme="light")
    assert lightness(dark) < 0.2 and lightness(light) > 0.9
    button = dark.get_by_role("button", name="Change to light colours")
    button.click()
    assert lightness(dark) > 0.9
    dark.get_by_role("button", name="Change to dark colours").click()
    assert lightness(dark) < 0.2
    dark.emulate_media(media="print")
    assert lightness(dark) > 0.9, "paper is white"


def test_folded_parts_are_printed(show: Open) -> None:
    page = show("benchmark")
    states = "[...document.querySelectorAll('details')].map((d) => d.open)"
    assert set(page.evaluate(states)) == {False}
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(page.evaluate(states)) == {True}
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert set(page.evaluate(states)) == {False}


def test_without_script_all_is_there(show: Open, reports: dict[str, dict[str, Any]]) -> None:
    page = show("run", java_script_enabled=False)
    assert page.locator("#layer-table tbody tr").count() == len(reports["run"]["layers"])
    assert not page.locator(".controls").is_visible() and page.locator("button:visible").count() == 0


def test_the_json_can_be_saved(show: Open, reports: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    page = show("strange")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save the JSON").click()
    waiting.value.save_as(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text(encoding="utf-8")) == reports["strange"]


def test_motion_is_reduced_where_asked(show: Open) -> None:
    scroll = "getComputedStyle(document.documentElement).scrollBehavior"
    assert show("one", reduced_motion="reduce").evaluate(scroll) == "auto"
    assert show("one").evaluate(scroll) == "smooth"
