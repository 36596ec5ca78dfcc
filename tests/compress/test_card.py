"""Model cards, and reports as files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.card import card
from compress.errors import OutputError
from compress.page import render
from compress.report_files import check, write

Reports = dict[str, dict[str, Any]]


def tables(text: str) -> list[list[list[str]]]:
    """Cells of all tables; every line has as many as the heading."""
    found: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [c.strip() for c in line.replace("\\|", "\0").strip("|").split("|")]
            found[-1].append(cells) if before.startswith("|") else found.append([cells])
            assert len(cells) == len(found[-1][0]), line
        before = line
    return found


def test_every_report_has_a_card(reports: Reports) -> None:
    for name, data in reports.items():
        text = card(data)
        assert text == card(data) and text.endswith("\n"), name
        _, front, rest = text.split("---\n", 2)
        assert yaml.safe_load(front)["tags"][0] == "compress"
        assert rest.startswith("\n# ") and "None" not in text and not re.search(r"\|[^|]*\bnan\b", text)
        assert tables(text), name
        assert "<" not in text.replace("`</script><img", "").replace("&lt;", ""), name


def test_the_card_of_a_run(reports: Reports) -> None:
    text = card(reports["run"])
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"library_name": "onnx", "tags": ["compress", "onnx", "int4"]}
    assert "InferenceSession('minilm.onnx')" in text
    layers = next(t for t in tables(text) if t[0][0] == "layer")
    assert len(layers) == 2 + len(reports["run"]["layers"])
    assert layers[2][:3] == ["`encoder.layer.0.attention.self.query`", "int4 g32 asym", "5.12"]
    assert "| batch 32, seq 32 | 420.000 | 500.000 | 0.84 ± 0.02 | 1.19x SLOWER at batch 32 |" in text
    assert "`up.weight` (all passes): read by conv_transpose1d" in text
    assert "its error would be 12 %" in text and "metadata:\n  name: int4" in text
    assert "ONNX Runtime 1.31.1, 1 thread, AMD EPYC; medians" in text
    several = card(reports["threads"])
    assert "| batch 1, 1 thread | 8.000 | 4.000 |" in several and "| batch 1, 4 threads |" in several
    assert "\nas measured; medians of" in several
    assert "identical" in card(reports["one"]) and "not finite" in card(reports["broken"])


def test_names_are_no_markup(reports: Reports) -> None:
    odd = {**reports["run"], "warnings": ["![x](http://a.b)", "[a](javascript:b)"]}
    odd["layers"] = [{**odd["layers"][0], "layer": "a<b|c`d", "note": "e<f"}]
    text = card(odd)
    assert "- !\\[x](http://a.b)" in text and "- \\[a](javascript:b)" in text
    assert "| `a<b\\|c'd` |" in text and "| e&lt;f |" in text


def test_the_card_of_a_benchmark(reports: Reports) -> None:
    text = card(reports["benchmark"])
    (rows,) = tables(text)
    names = [row[0] for row in rows[2:]]
    assert names == ["float", *(e["name"] for e in reports["benchmark"]["entries"])]
    assert [row[0] for row in rows if row[-1] == "yes"] == ["int8", "int8-weight-only", "int4"]
    assert rows[-2][2] == "failed: out of memory"
    assert "perplexity, lower" not in text and "lower is better" in card(reports["judged"])


@pytest.mark.parametrize("suffix", [".html", ".json", ".md"])
def test_the_end_of_the_name_says_the_format(reports: Reports, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"out{suffix}"
    file.write_text("before")
    assert write(reports["run"], file) == file
    text = file.read_text(encoding="utf-8")
    wanted = {".html": render, ".md": card, ".json": lambda d: json.dumps(d, indent=2) + "\n"}[suffix]
    assert text == wanted(reports["run"])
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    for name, words in (
        ("out.pdf", r"ends in \.html"),
        ("no/out.html", "does not exist"),
        ("folder.html", "a folder"),
    ):
        with pytest.raises(OutputError, match=words):
            check(tmp_path / name)
    text = tmp_path / "text.md"
    text.write_text("to calibrate with")
    with pytest.raises(OutputError, match="one of the files read"):
        check(text, (None, "not there", str(tmp_path / "." / "text.md")))
